"""Alternative KV caches for a run, mildest first, with their effect on the result."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.profiles.engines import find_engine
from memplan.catalogue.profiles.profiles import library_behaviour
from memplan.catalogue.quantization.weight_formats import FormatChoice
from memplan.estimate.answer import Estimate
from memplan.spec.generation import CacheConfig
from memplan.spec.run import RunSpec, changed

CHUNK = 2048  # prompt tokens per pass of the proposed chunked prefill

_CHUNKS = FormatChoice("chunked prefill", "none; slower", "transformers 5.24 generation/utils.py _prefill")
_FOUR_BITS = FormatChoice(
    "quantized, 4 bits",
    "little, by perplexity; slower",
    "Hugging Face 2024, Unlocking longer generation with key-value cache quantization, Llama-2-7B",
)
_OFFLOADED = FormatChoice(
    "offloaded", "none; every token waits for the host", "transformers 5.24 cache_utils.py Cache.update"
)
_FP8 = FormatChoice("fp8", "little, and less with calibrated scales", "vLLM's documentation, Quantized KV Cache")
_Q8 = FormatChoice("q8_0", "almost none, by perplexity", "llama.cpp pull request 7412, measurements of the KV cache")


def alternative_caches(answer: Estimate) -> Iterator[tuple[FormatChoice, RunSpec]]:
    """Yield alternatives to the answer's cache, each with the run that uses it.

    Yields nothing if the run already chose a special cache.
    """
    run, engine = answer.asked, find_engine(answer.asked.profile)
    if engine is not None:
        if run.serving.cache_dtype in (None, "auto"):
            step = _Q8 if engine.kind == "llama.cpp" else _FP8
            yield step, changed(run, "serving", cache_dtype=step.format)
        return
    library = library_behaviour(run.profile, "", False)
    if not library.generation.further_caches or run.generation.cache_implementation not in (None, "dynamic"):
        return
    if run.generation.prefill_chunk_size is None and answer.run.batch.sequence > CHUNK:
        yield _CHUNKS, changed(run, "generation", prefill_chunk_size=CHUNK)
    yield _FOUR_BITS, changed(run, "generation", cache_implementation="quantized", cache_config=CacheConfig())
    yield _OFFLOADED, changed(run, "generation", cache_implementation="offloaded")
