"""Inference: forward passes and generation, against traces, arithmetic and laws."""

from __future__ import annotations

from operator import mul
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.accuracy import passes_without_workspace
from benchmarks.golden import rows, trace_figures
from memplan import RunSpec, estimate, find_gpu
from memplan.catalogue.inference import caches
from memplan.core.errors import MemplanError
from memplan.core.units import ITEMSIZE, rounded
from memplan.engine.walk import values
from memplan.estimate.answer import phase_peaks
from memplan.planning.reach import limit
from memplan.program.graph import operations_of
from memplan.program.inference.passes import Contenders, sized, token_after
from memplan.program.inference.steps import steps_of
from memplan.resolve.decide import decide
from memplan.resolve.defaults import NEW_TOKENS
from memplan.spec.run import changed
from tests import cases
from tests.cases import in_groups
from tests.encoders import SMALL
from tests.sampling import ALL, examples, sampled
from tests.tiny import TINY
from tests.tiny_vision import TINY as TOWERS
from tests.walks import left, lines_at, walk

CASES: list[dict[str, Any]] = sampled(rows("traced_inference.jsonl"))

laws = settings(max_examples=examples(20), deadline=None, suppress_health_check=[HealthCheck.too_slow])


def label(case: dict[str, Any]) -> str:
    run = case["run"]
    kernels, method = run.get("kernels", {}), run.get("method", {})
    more = [kernels.get("attention", ""), method.get("kind", ""), "4-bit" if "quantization" in method else ""]
    more += ["padded" if run.get("loop", {}).get("padded") else "", run.get("precision", {}).get("weights", "")]
    return "-".join([case["name"], run["task"], f"s{run['batch'].get('sequence', 2048)}", *filter(None, more)])


@in_groups(CASES, label)
def test_every_pass_is_near_its_trace(case: dict[str, Any]) -> None:
    answer = trace_figures(case["run"])
    assert answer.parameters.total == case["parameters"]
    mine = passes_without_workspace(answer)
    table = 1024 if "quantization" in case["run"].get("method", {}) else 0  # bitsandbytes' table, shared by all layers
    for phase, bytes_ in case["phases"].items():
        if phase != "load":
            assert mine[phase] == pytest.approx(bytes_, rel=case.get("within", 1e-4), abs=table), phase


@ALL
def test_the_mean_error_of_all_passes_is_below_0_1_per_cent() -> None:
    errors: list[float] = []
    for case in CASES:
        mine = passes_without_workspace(trace_figures(case["run"]))
        errors += [abs(mine[phase] / n - 1) for phase, n in case["phases"].items() if phase != "load"]
    assert len(errors) > 400
    assert sum(errors) / len(errors) < 1e-3


# --- components


def cached(run: RunSpec, phase: str) -> int:
    """Return the bytes of caches alive at a phase's peak."""
    lines = lines_at(run, phase)
    return sum(line.bytes for line in lines if "cache" in line.what and line.kind == "activation")


def generating(model: Any = "llama-3.2-1b", **fields: Any) -> RunSpec:
    return RunSpec(**{"model": model, "task": "generate", **fields})


def test_a_cache_has_one_key_and_value_per_token_layer_and_head() -> None:
    run = generating("llama-3.1-8b", batch={"micro": 4, "sequence": 1000, "new_tokens": 25})
    layers, heads, width, bf16 = 32, 8, 128, 2
    # the last token is read with the previous ones in the cache, and concatenated to one layer's values while the old
    # ones are alive
    one = 4 * heads * width * bf16
    assert cached(run, "decode") == 2 * layers * one * (1000 + 25 - 1) + one * (1000 + 25 - 2)


def test_a_legacy_cache_has_all_layers_twice() -> None:
    fields: dict[str, Any] = {"batch": {"micro": 4, "sequence": 1000, "new_tokens": 25}}
    legacy = generating("llama-3.1-8b", **fields, generation={"cache_implementation": "legacy"})
    one = 4 * 8 * 128 * 2
    assert cached(legacy, "decode") == 2 * 32 * one * (1024 + 1023)


def test_the_prompt_has_one_row_of_logits_in_versions_that_support_it() -> None:
    last, every = (
        estimate(generating("qwen2-0.5b", batch={"sequence": 4096}, profile=profile))
        for profile in ("transformers-5", "transformers-4.38")
    )
    logits = 4096 * 151936
    assert every.peak.phase == "prefill"
    assert phase_peaks(every)["prefill"] - phase_peaks(last)["prefill"] > logits * ITEMSIZE["fp32"]


def test_the_default_of_256_tokens_is_noted() -> None:
    answer = estimate(generating())
    assert answer.run.batch.new_tokens == NEW_TOKENS == 256
    assert answer.run.generation.cache_implementation == "dynamic"
    assert [p.phase for p in answer.phases] == ["load", "prefill", "decode"]


CODEGEN = {
    "model_type": "codegen",
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 8,
    "vocab_size": 300,
    "n_positions": 128,
    "rotary_dim": 4,
}


# The last has moments of different tensors that take equally many bytes.
@pytest.mark.parametrize(
    "fields",
    [
        {"model": "qwen2-7b"},
        {"model": "gemma-2-9b"},
        {"model": "flan-t5-base"},
        {
            "model": {"config": CODEGEN},
            "batch": {"micro": 3, "sequence": 75, "new_tokens": 5},
            "generation": {"cache_implementation": "static"},
        },
    ],
)
def test_the_first_peaks_of_a_pass_are_those_of_its_terms(fields: dict[str, Any]) -> None:
    """The first two sizes take the sums of all moments, which show that none is missing; later ones do not."""
    decided = decide(RunSpec(task="generate", **fields))
    for step in steps_of(decided):
        moments, sizes = Contenders(step.graph, step.division), [{**sized(step, decided).sizes} for _ in range(4)]
        first, second, *later = map(moments.peak, sizes)
        numbers = values(moments.variables, sizes[0])
        sums = {term.moment: sum(map(mul, term.coefficients, numbers)) for term in moments.terms}
        assert first == second == later[0] == later[1]
        assert (first.bytes, sums[first.moment]) == (max(sums.values()),) * 2


def test_generating_one_token_is_only_the_prefill() -> None:
    assert [p.phase for p in estimate(generating(batch={"new_tokens": 1})).phases] == ["load", "prefill"]


def test_a_forward_pass_has_all_logits_and_keeps_nothing() -> None:
    answer = estimate(RunSpec(model="qwen2-0.5b", task="forward", batch={"micro": 2, "sequence": 512}))
    assert [p.phase for p in answer.phases] == ["load", "forward"]
    top = answer.ledger[0] if answer.ledger[0].what == "logits" else answer.ledger[1]
    assert (top.what, top.bytes) == ("logits", rounded(2 * 512 * 151936 * 2))
    assert not {"gradient", "optstate"} & {line.kind for line in answer.ledger}
    assert answer.parameters.trainable == 0


def test_weights_are_as_they_are_stored() -> None:
    four = estimate(generating("llama-3.1-8b", method={"quantization": {}}))
    whole = estimate(generating("llama-3.1-8b"))
    assert four.categories["parameter"] < 0.4 * whole.categories["parameter"]
    assert four.run.method.quantization is not None
    assert four.run.method.quantization.kbit_preparation is False


@pytest.mark.parametrize(
    "model_type",
    sorted(
        {
            "llama",
            "qwen3",
            "mixtral",
            "bloom",
            "falcon",
            "deepseek_v3",
            "gpt_bigcode",
            "mamba2",
            "jamba",
            "qwen3_next",
            "nemotron_h",
            "gemma4_text",
            "deepseek_v32",
            "kimi_linear",
            "minimax_m3_vl_text",
        }
    ),
)
def test_a_prompts_cache_matches_the_catalogue(model_type: str) -> None:
    model = {"config": {"model_type": model_type, **TINY[model_type]}}
    run = generating(model, batch={"micro": 64, "sequence": 16, "new_tokens": 3})
    decided = decide(run)
    walked = walk(run, decided)
    kept = left(walked.passes[0])
    said = caches.bytes_of(caches.caches(decided.structure.graph.model), 16)
    assert sum(n for what, n in kept if "length" not in what) == 64 * said


# Two-byte numbers that a prompt token leaves per layer, including everything that k and v are views of.
PUBLISHED = {
    "baichuan2-7b": 4096 + 3 * 4096,  # rotated k, and q, k and v
    "baichuan2-13b": 3 * 5120,  # q, k and v as projected
    "internlm2-7b": 8 * 128 + (32 + 2 * 8) * 128,  # rotated k, and all of wqkv's output
    "minicpm-2b": 2 * 2304,
    "chatglm3-6b": 2 * 2 * 128,  # copied
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_custom_model_code_keeps_the_prompts_keys_and_values_unchanged(name: str) -> None:
    run = generating(name, batch={"micro": 1, "sequence": 512, "new_tokens": 3})
    decided = decide(run)
    walked = walk(run, decided)
    kept = sum(n for _, n in left(walked.passes[0]))
    assert kept == decided.structure.graph.model.num_hidden_layers * 512 * PUBLISHED[name] * 2
    answer = estimate(generating(name, batch={"new_tokens": 3}))
    assert any("published with its weights" in note for note in answer.notes)


def test_baichuans_alibi_covers_all_positions_and_pairs() -> None:
    heads, longest, bf16 = 40, 4096, 2
    run = generating("baichuan2-13b", batch={"micro": 2, "sequence": 1000, "new_tokens": 25})
    lines = {line.what: line.bytes for line in lines_at(run, "decode")}
    assert lines["model.future_mask"] == heads * longest**2 * bf16
    assert lines["mask"] == rounded(2 * heads * 1001**2 * bf16)  # also in a token's pass
    for name in ("expanded", "filled"):  # local variables of the forward pass, alive through all layers
        assert lines[name] == rounded(2 * 1001**2 * bf16)


def test_minicpm_keeps_the_cache_that_generate_creates() -> None:
    """A DynamicCache grows layer by layer; before transformers 4.42 a tuple, of which the old and the new coexist."""
    tokens = {"sequence": 2048, "new_tokens": 25}
    now, before = (
        phase_peaks(estimate(generating("minicpm-2b", profile=profile, batch=tokens)))["decode"]
        for profile in ("transformers-5", "transformers-4.38")
    )
    layer = 2 * 36 * 64 * 2048 * 2  # keys and values, heads, width, tokens, bytes of bf16
    assert before - now > 38 * layer  # of 40 layers


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        (
            "minicpm-2b",
            {"cache_implementation": "static"},
            "minicpm-2b's weights has no cache of fixed size, so static",
        ),
        ("chatglm3-6b", {"cache_implementation": "static"}, "returns its cache as tuples, so static"),
        ("baichuan2-7b", {"cache_implementation": "dynamic"}, "returns its cache as tuples, so dynamic"),
        (
            "internlm2-7b",
            {"prompt_lookup_num_tokens": 4},
            "lookup.* is not supported yet for models that run code published",
        ),
    ],
)
def test_code_published_with_weights_has_only_the_caches_it_has(name: str, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(MemplanError, match=said):
        estimate(generating(name, generation=asked))


def test_tensor_parallel_inference_refuses_quantised_formats() -> None:
    with pytest.raises(MemplanError, match=r"cannot run nf4 with tensor parallelism: .*; use fp8, or"):
        estimate(generating("llama-3.1-8b", method={"quantization": {}}, parallelism={"world": 2, "tp": 2}))


@pytest.mark.parametrize(("vocabulary", "turned"), [(65024, True), (151552, False)])
def test_the_first_glm_4_turns_nothing_sequence_first(vocabulary: int, turned: bool) -> None:
    config = {"model_type": "chatglm", "hidden_size": 256, "num_layers": 2, "num_attention_heads": 4, "kv_channels": 64}
    stack, _ = operations_of(
        decide(generating({"config": {**config, "padded_vocab_size": vocabulary}})).structure.graph
    )
    names = {op.name for op in (*stack.before, *stack.after)}
    assert ("transformer.output_layer.transpose" in names) == turned == ("transformer.embedding.transpose" in names)


def test_autocast_keeps_its_casts_from_the_prompt_on() -> None:
    run = generating("llama-3.2-1b", precision={"weights": "fp32", "autocast": True}, batch={"new_tokens": 9})
    walked = walk(run)
    cast = [sum(n for what, n in left(each) if "autocast" in what) for each in walked.passes]
    tables = 128256 * 2048  # embeddings are looked up, and the tied head is cast
    assert cast[0] == cast[-1]
    layers = 16 * (2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 8192 * 2048)
    assert cast[0] == 2 * (layers + tables)


# --- encoder-decoders


def over_source(name: str, **fields: Any) -> RunSpec:
    """Return a small encoder-decoder's generation, with three sources by default."""
    read = {} if SMALL[name]["model_type"] == "whisper" else {"sequence": 75}
    batch = {"micro": 3, **read, "new_tokens": 4, **fields.pop("batch", {})}
    return generating({"config": SMALL[name]}, batch=batch, **fields)


@pytest.mark.parametrize("name", ["bart", "m2m_100", "t5", "flan-t5", "umt5", "whisper"])
def test_a_decoder_caches_its_tokens_and_the_encoders_output(name: str) -> None:
    run = over_source(name, batch={"micro": 64})
    decided = decide(run)
    walked, source = walk(run, decided), decided.batch.sequence
    encoded, first, *_ = (dict(left(each)) for each in walked.passes)
    table = caches.caches(decided.structure.graph.model)
    prompt = decided.batch.target_sequence or 0
    assert prompt == (4 if name == "whisper" else 1)
    assert sum(n for what, n in first.items() if what.endswith("cache")) == 64 * caches.bytes_of(
        table, prompt, source=source
    )
    assert sum(encoded.values()) == sum(n for what, n in first.items() if not what.endswith("cache"))


def test_cross_attention_layers_cache_the_towers_output() -> None:
    config = {"config": {"model_type": "mllama", **TOWERS["mllama"]}}
    run = generating(config, batch={"micro": 64, "sequence": 75, "images": 1, "new_tokens": 3})
    decided = decide(run)
    walked = walk(run, decided)
    rows = 4 * ((56 // 14) ** 2 + 1)  # tiles per image, patches per tile and a class token
    said = caches.bytes_of(caches.caches(decided.structure.graph.model), 75, source=rows)
    assert sum(n for what, n in left(walked.passes[0]) if "length" not in what) == 64 * said
    alone = walk(generating(config, batch={"micro": 64, "sequence": 75, "new_tokens": 3}))
    assert sum(n for _, n in left(alone.passes[0])) < 64 * said


def test_the_encoder_reads_once_however_many_beams_there_are() -> None:
    one, four = (phase_peaks(estimate(over_source("t5", generation={"num_beams": n}))) for n in (1, 4))
    assert one["encode"] == four["encode"]
    encoded = 3 * 75 * 128 * 2  # sources, tokens, width, bytes of bf16
    assert four["decode"] - one["decode"] > 3 * (1 + 2 * 3) * encoded  # output, keys and values of three layers


def test_an_encoders_weights_stay_while_its_decoder_runs() -> None:
    for phase in ("load", "encode", "prefill", "decode"):
        held = {line.where for line in lines_at(over_source("whisper"), phase) if line.kind == "parameter"}
        assert any(where.startswith("model.encoder") for where in held), phase
        assert any(where.startswith("model.decoder") for where in held), phase


ACROSS = {
    "name": st.sampled_from(["bart", "m2m_100", "t5", "flan-t5", "umt5", "whisper"]),
    "attention": st.sampled_from(["sdpa", "eager", "sdpa_efficient"]),
    "beams": st.integers(1, 4),
    "cache": st.sampled_from(["dynamic", "static"]),
    "micro": st.integers(1, 9),
    "prompt": st.integers(1, 30),
    "new": st.integers(2, 40),
}


@settings(laws, max_examples=examples(12))
@given(st.fixed_dictionaries(ACROSS), st.sampled_from(["micro", "new", "beams"]), st.integers(1, 20))
def test_more_of_a_decoder_over_sources_never_takes_less(drawn: dict[str, Any], axis: str, more: int) -> None:
    def run(d: dict[str, Any]) -> RunSpec:
        return over_source(
            d["name"],
            batch={"micro": d["micro"], "target_sequence": d["prompt"], "new_tokens": d["new"]},
            kernels={"attention": d["attention"]},
            generation={"num_beams": d["beams"], "cache_implementation": d["cache"]},
        )

    before, after = (estimate(run(d)) for d in (drawn, {**drawn, axis: drawn[axis] + more}))
    assert all(phase_peaks(after)[phase] >= n for phase, n in phase_peaks(before).items())
    assert sum(line.bytes for line in before.ledger) == before.bytes.allocated <= before.bytes.reserved


def test_a_prompt_in_parts_is_that_of_the_decoder() -> None:
    whole, parts = (estimate(over_source("t5", generation=g)) for g in ({}, {"prefill_chunk_size": 4}))
    assert parts.phases == whole.phases
    assert parts.run.generation.prefill_chunk_size is None
    assert any(note.startswith("generation.prefill_chunk_size only divides") for note in parts.notes)


OVER_SOURCE_REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("whisper", {"batch": {"new_tokens": 93}}, "93 new tokens after a decoder prompt of 4 exceed"),
    ("t5", {"kernels": {"attention": "flash_attention_2"}}, "it adds positions to the attention scores; use sdpa"),
    ("whisper", {"profile": "transformers-4.51"}, "not supported yet for seq2seq_lm"),
    ("t5", {"generation": {"cache_implementation": "legacy"}}, "supported: dynamic, static"),
]


@pytest.mark.parametrize(("name", "fields", "said"), OVER_SOURCE_REFUSED, ids=str)
def test_options_unsupported_by_encoder_decoders_are_refused(name: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(MemplanError, match=said):
        estimate(over_source(name, **fields))


# --- laws


@st.composite
def generations(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a generation as the fields of a RunSpec."""
    model = draw(st.sampled_from(["llama-3.2-1b", "qwen2-0.5b", "gemma-2-2b", "gpt2"]))
    sdpa = ("sdpa", "sdpa_math", "sdpa_efficient") if model != "gemma-2-2b" else (None,)  # its class has none
    return {
        "model": model,
        "task": "generate",
        "batch": {
            "micro": draw(st.integers(1, 40)),
            "sequence": draw(st.integers(1, 900)),
            "new_tokens": draw(st.integers(2, 100)),
        },
        "kernels": {"attention": draw(st.sampled_from(["eager", *sdpa]))},
        "precision": draw(st.sampled_from(["bf16", "fp16", "fp32"])),
        "generation": {"cache_implementation": draw(st.sampled_from(["dynamic", "legacy"]))},
        "loop": {"padded": draw(st.booleans())},
    }


@laws
@given(generations(), st.sampled_from(["micro", "sequence", "new_tokens"]), st.integers(1, 50))
def test_more_never_takes_less(fields: dict[str, Any], axis: str, more: int) -> None:
    larger = {**fields, "batch": {**fields["batch"], axis: fields["batch"][axis] + more}}
    before, after = (phase_peaks(estimate(RunSpec(**f))) for f in (fields, larger))
    assert all(after[phase] >= n for phase, n in before.items())


@laws
@given(generations())
def test_the_ledger_sums_to_the_peak_of_every_phase(fields: dict[str, Any]) -> None:
    run = RunSpec(**fields)
    answer, walked = estimate(run), walk(run)
    assert sum(line.bytes for line in answer.ledger) == answer.bytes.allocated
    for phase in walked.phases:
        assert sum(line.bytes for line in walked.lines(phase)) == phase.peak
    assert answer.bytes.reserved >= answer.bytes.allocated


@laws
@given(generations())
def test_a_pass_leaves_only_its_cache(fields: dict[str, Any]) -> None:
    walked = walk(RunSpec(**fields))
    for each in walked.passes:
        kept, axes = left(each), each.axes
        assert {what for what, _ in kept if "length" not in what} == {"key cache", "value cache"}
        heads, width = axes["k"] * axes["d"], ITEMSIZE[fields["precision"]]
        tokens = each.step.past + each.step.fed
        most = 2 * walked.decided.structure.graph.model.num_hidden_layers * rounded(axes["b"] * tokens * heads * width)
        assert most // 2 <= sum(n for what, n in kept if "length" not in what) <= most


@laws
@given(generations())
def test_a_forward_pass_takes_no_more_than_one_that_is_trained(fields: dict[str, Any]) -> None:
    batch = {k: v for k, v in fields["batch"].items() if k != "new_tokens"}
    shared = {"batch": batch, **{k: fields[k] for k in ("model", "kernels", "precision", "loop")}}
    forward = phase_peaks(estimate(RunSpec(**{**shared, "task": "forward"})))
    kernels = {**fields["kernels"], "checkpointing": "none"}
    trained = phase_peaks(estimate(RunSpec(**{**shared, "kernels": kernels})))
    assert forward["forward"] <= max(trained["forward"], trained["loss"])


# --- refusals


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"task": "forward", "batch": {"new_tokens": 2}}, "batch.new_tokens"),
    ({"task": "forward", "generation": {"cache_implementation": "dynamic"}}, "generation"),
    ({"task": "generate", "method": "freeze"}, "method.kind"),
    ({"task": "generate", "precision": "mixed"}, "precision.grads"),
    ({"task": "generate", "batch": {"accumulation": 2}}, "batch.accumulation"),
    ({"task": "generate", "kernels": {"checkpointing": "full"}}, "kernels.checkpointing"),
    ({"task": "generate", "kernels": {"fused": ["rope"]}}, "kernels.fused"),
    ({"task": "generate", "loop": {"trainer": True}}, "loop.trainer"),
    ({"task": "generate", "profile": "megatron-core"}, "profile"),
    ({"task": "generate", "parallelism": {"world": 2, "dp": 2, "strategy": "ddp"}}, "parallelism.dp"),
    (
        {"task": "generate", "method": {"kind": "qlora", "quantization": {"kbit_preparation": True}}},
        "method.quantization.kbit_preparation",
    ),
]


@pytest.mark.parametrize(("fields", "field"), REFUSED, ids=str)
def test_training_options_are_refused_by_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(MemplanError) as caught:
        estimate(RunSpec(model="qwen2-0.5b", **fields))
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


def windows_of_tokens(**fields: Any) -> RunSpec:
    """Return a run of DeepSeek V4's tiny model, whose windows have 4 and 128 tokens."""
    return generating({"config": {"model_type": "deepseek_v4", **TINY["deepseek_v4"]}}, **fields)


@cases.each(
    [
        {},
        {"generation": {"num_beams": 2}},
        {"generation": {"prefill_chunk_size": 512}},
        {"generation": {"cache_implementation": "static"}},
        {"model": "flan-t5-large", "batch": {"sequence": 512, "new_tokens": 64}},
        {"method": {"quantization": {"format": "nf4"}}},
    ]
)
def test_a_run_fits_if_its_prompt_and_then_all_its_passes_do(fields: dict[str, Any]) -> None:
    """A search replays the prompt first, and the rest only if that leaves room. The verdict replays all."""
    run = generating(**{"gpu": "3060-12gb", "batch": {"sequence": 2000, "new_tokens": 200}, **fields})
    most = limit(run, "batch", samples_beyond=False)[0]
    for micro in (most, most + 1):
        answer = estimate(changed(run, "batch", micro=micro))
        walked, replays = answer.walk, bool(answer.fits_card_of(find_gpu(str(run.gpu)).usable, replayed=True))
        assert 0 < walked.surely_reserved() <= (walked.reserved() or 0)
        assert answer.fits == replays == (micro == most)


WITHOUT_WINDOWS: list[tuple[dict[str, Any], str, str]] = [
    ({"cache_implementation": "static"}, "cache_implementation", "static cache has no layers for the compressed keys"),
    ({"cache_implementation": "offloaded"}, "cache_implementation", "offloaded is not supported yet"),
    ({"cache_implementation": "quantized"}, "cache_implementation", "quantized is not supported yet"),
    ({"num_beams": 2}, "num_beams", "2 is not supported yet"),
    ({"prefill_chunk_size": 16}, "prefill_chunk_size", "is not supported yet"),
    ({"prompt_lookup_num_tokens": 4}, "prompt_lookup_num_tokens", "keeps states"),
]


@pytest.mark.parametrize(("generation", "field", "said"), WITHOUT_WINDOWS, ids=str)
def test_compressed_windows_need_a_dynamic_cache(generation: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(MemplanError, match=said) as caught:
        estimate(windows_of_tokens(generation=generation))
    assert caught.value.field == f"generation.{field}"


def test_a_model_with_only_large_windows_cannot_use_prompt_lookup() -> None:
    config = {"model_type": "deepseek_v4", **TINY["deepseek_v4"], "compress_ratios": [0, 128, 128, 0]}
    with pytest.raises(MemplanError, match="keeps states"):
        estimate(generating({"config": config}, generation={"prompt_lookup_num_tokens": 4}))


def test_a_decoded_token_leaves_partial_windows_waiting() -> None:
    """After 99 tokens 24 small windows and no large one are full, so 3 and 99 tokens wait."""
    walked = walk(windows_of_tokens(batch={"micro": 2, "sequence": 90, "new_tokens": 10}))
    (last,) = (each for each in walked.passes if each.step.past == 98)
    kept = sum(n for what, n in left(last) if "length" not in what)
    rows, bf16, fp32 = 2, 2, 4
    small = sum(
        rounded(rows * 24 * width * bf16)  # keys of windows
        + 2 * rounded(rows * 3 * 2 * width * bf16)  # waiting tokens and their gates
        + rounded(rows * 4 * width * bf16)  # the overlapping half
        + rounded(rows * 4 * width * fp32)  # its gates
        for width in (32, 24)  # attention's and the indexer's
    )
    large = 2 * rounded(rows * 99 * 32 * bf16)
    window = rounded(rows * 64 * 32 * bf16)  # with the oldest token, because the rest is a view; a plain layer has two
    assert kept == 5 * window + 2 * small + large


@settings(laws, max_examples=examples(6))
@given(prompt=st.integers(1, 300), new=st.integers(2, 150))
def test_the_most_expensive_tokens_that_fill_windows_are_walked(prompt: int, new: int) -> None:
    config = {"model_type": "deepseek_v4", **TINY["deepseek_v4"], "sliding_window": 8}
    run = generating({"config": config}, batch={"micro": 2, "sequence": prompt, "new_tokens": new})
    decided = decide(run)
    walked = walk(run, decided)
    every = (token_after(past, decided) for past in range(prompt, prompt + new - 1))
    most = max(sized(step, decided).peak.bytes for step in every)
    assert max(n for each, n in zip(walked.passes, walked.peaks, strict=True) if each.phase == "decode") == most
