"""Other ways to keep keys and values than a run asks for, the mildest first: what its engine has, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.profiles.engines import find_engine
from memplan.catalogue.profiles.profiles import decided
from memplan.catalogue.quantization.weight_formats import Step
from memplan.estimate.answer import Estimate
from memplan.spec.generation import CacheConfig
from memplan.spec.run import RunSpec, changed

CHUNK = 2048  # tokens of a prompt that are read at once, where that is offered

_CHUNKS = Step("a prompt in parts", "nothing; slower", "transformers 5.24 generation/utils.py _prefill")
_FOUR = Step(
    "quantized, 4 bits",
    "little, by perplexity; slower",
    "Hugging Face 2024, Unlocking longer generation with key-value cache quantization, Llama-2-7B",
)
_AWAY = Step("offloaded", "nothing; every token waits for the host", "transformers 5.24 cache_utils.py Cache.update")
_FP8 = Step("fp8", "little, and less with calibrated scales", "vLLM's documentation, Quantized KV Cache")
_Q8 = Step("q8_0", "next to nothing, by perplexity", "llama.cpp pull request 7412, measurements of the KV cache")


def others(answer: Estimate) -> Iterator[tuple[Step, RunSpec]]:
    """What may be tried in place of the answer's cache, and the run with it; nothing where a run says itself what it
    has, but for a plain one."""
    run, engine = answer.asked, find_engine(answer.asked.profile)
    if engine is not None:
        if run.serving.cache_dtype in (None, "auto"):
            step = _Q8 if engine.kind == "llama.cpp" else _FP8
            yield step, changed(run, "serving", cache_dtype=step.format)
        return
    words = decided(run.profile, "", False)
    if not words["further_caches"] or run.generation.cache_implementation not in (None, "dynamic"):
        return
    if run.generation.prefill_chunk_size is None and answer.run.batch.sequence > CHUNK:
        yield _CHUNKS, changed(run, "generation", prefill_chunk_size=CHUNK)
    yield _FOUR, changed(run, "generation", cache_implementation="quantized", cache_config=CacheConfig())
    yield _AWAY, changed(run, "generation", cache_implementation="offloaded")
