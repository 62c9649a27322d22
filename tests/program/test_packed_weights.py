"""Inference-only weight formats, as transformers loads and runs them: traces, arithmetic, refusals."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.accuracy import rows
from memplan import Estimate, RunSpec, estimate
from memplan.catalogue.quantization.inference_formats import KERNELS, RUNS, InferenceFormat, bytes_at_once, unpacking
from memplan.catalogue.quantization.storage import KINDS, plain
from memplan.core.errors import MemplanError
from memplan.core.ir import Weight, operations
from memplan.core.units import rounded
from memplan.models.cards import load_card
from memplan.planning.inference import load_of
from memplan.program.graph import operations_of, parameters_of
from memplan.program.loading import loading, most_at_once
from memplan.resolve.decide import decide
from tests.checkpoints import TINY
from tests.sampling import examples, sampled
from tests.walks import lines_at

TRACED = sampled([row for row in rows("traced_inference.jsonl") if ", " in row.get("name", "")], every=8)
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
ROWS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, **({"input_activations": inputs} if inputs else {})}
    return {"quant_method": "compressed-tensors", "config_groups": {"g": group}, "ignore": ["lm_head"], **more}


def run_of(stored: dict[str, Any] | None = None, config: dict[str, Any] = TINY, **fields: Any) -> RunSpec:
    said = {**config, **({"quantization_config": stored} if stored else {})}
    batch = {"micro": 2, "sequence": 64, "new_tokens": 2}
    return RunSpec(**{"model": {"config": said}, "task": "generate", "batch": batch, **fields})


def answer(stored: dict[str, Any] | None = None, config: dict[str, Any] = TINY, **fields: Any) -> Estimate:
    return estimate(run_of(stored, config, **fields))


def parameters(found: Estimate, of: str) -> dict[str, int]:
    """Return the bytes of each tensor of one layer's matrix by name."""
    lines = [line for line in found.ledger if line.kind == "parameter" and line.what.startswith(f"{of}.weight")]
    return {line.what.removeprefix(f"{of}.weight").strip(" ()"): line.bytes // line.count for line in lines}


def named(format: str, **more: Any) -> dict[str, Any]:
    return {"method": {"quantization": {"format": format, **more}}}


@pytest.mark.parametrize("case", TRACED, ids=lambda case: case["name"])
def test_loading_is_as_from_pretrained_does_it(case: dict[str, Any]) -> None:
    graph = decide(RunSpec(**case["run"])).structure.graph
    assert most_at_once(loading(graph)) == pytest.approx(case["phases"]["load"], rel=case.get("within", 5e-4))


def test_compressed_weights_are_whole_once_the_model_was_called() -> None:
    out, into, bf16 = 192, 64, 2  # gate_proj
    found = answer(compressed(INT4))
    assert parameters(found, "mlp.gate_proj") == {
        "weight": bf16 * out * into,
        "weight_scale": rounded(bf16 * out * into // 64),
        "weight_shape": rounded(8 * 2),
    }
    assert "dequantised in the first forward pass" in found.notes[0]
    assert {line.source for line in found.ledger if "weight_scale" in line.what} == {KINDS["w4a16"].source}
    assert answer(compressed(INT4, dequantize=True)).bytes == answer().bytes


def test_speeds_use_the_weights_read_while_computing() -> None:
    """Weights unpacked on the first call are read unpacked; those that stay packed are read packed."""
    whole, packed, kept = (load_of(answer(**fields))[0] for fields in ({}, named("w4a16"), named("torchao-int8")))
    assert whole is not None
    assert packed == whole
    assert kept != whole


def test_experts_are_unpacked_on_loading_and_linear_layers_when_called() -> None:
    moe = {**TINY, "model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 64, "num_experts_per_tok": 2}
    moe |= {"head_dim": 16, "decoder_sparse_step": 1, "mlp_only_layers": []}
    found = answer(compressed(INT4), moe)
    lines = {line.what for line in found.ledger if line.kind == "parameter"}
    assert {"mlp.experts.gate_up_proj", "self_attn.q_proj.weight (weight_scale)"} <= lines
    steps = [step.name for step in unpacking(expert_stack(), InferenceFormat(plain("w4a16"), "decompressed"))]
    assert steps == ["apart", "codes", "weight", "apart"]  # expert by expert, then gates and ups are concatenated


def expert_stack() -> Weight:
    return Weight("mlp.experts.gate_up_proj", "8 2 64 64", "mlp", "bf16", rows=3, stacked=True)


def test_optimised_inference_keeps_fp8_where_the_card_has_it() -> None:
    out, into = 192, 64
    stored = compressed(FP8, ROWS, use_optimized_inference=True)
    kept = parameters(answer(stored, gpu="h100"), "mlp.gate_proj")
    assert kept == {"weight": out * into, "weight_scale": rounded(2 * out)}
    assert parameters(answer(stored, gpu="a100-80gb"), "mlp.gate_proj")["weight"] == 2 * out * into


def test_inputs_in_8_bits_are_rounded_in_four_tensors() -> None:
    """For a down projection: the inputs divided by scales, rounded, less zero points, and cast."""
    tokens, into, bf16 = 2 * 64, 192, 2
    lines = lines_at(run_of(compressed(FP8, ROWS), kernels={"attention": "flash_attention_2"}), "prefill")
    made = [line for line in lines if line.where.startswith("model.layers.mlp.down_proj.")]
    assert sorted(line.bytes for line in made if line.bytes >= bf16 * tokens * into) == 4 * [bf16 * tokens * into]


@pytest.mark.parametrize("format", ["torchao-int8", "quanto-int8"])
def test_a_product_makes_one_whole_copy_of_its_matrix(format: str) -> None:
    wide = {**TINY, "intermediate_size": 8192}
    lines = lines_at(run_of(config=wide, **named(format)), "decode")
    copies = [line.bytes for line in lines if line.kind == "activation" and line.bytes >= 2 * 64 * 8192]
    assert copies == [2 * 64 * 8192]


OSS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}
EXPERTS, WIDTH, HIDDEN, LAYERS = 32, 2880, 2880, 24  # gpt-oss-20b


def published(**fields: Any) -> RunSpec:
    config = {**load_card("gpt-oss-20b").config, "quantization_config": OSS}
    batch = {"micro": 1, "sequence": 1024, "new_tokens": 2}
    return RunSpec(**{"model": {"config": config}, "task": "generate", "batch": batch, **fields})


def test_gpt_oss_experts_stay_in_mxfp4_from_compute_capability_7_5_on() -> None:
    numbers = EXPERTS * 3 * WIDTH * HIDDEN
    kept, whole = (estimate(published(gpu=gpu)) for gpu in ("a100-80gb", "v100-32gb"))
    biases = EXPERTS * (2 * WIDTH + HIDDEN)  # in fp32, for the kernels
    assert whole.phases[0].peak > kept.phases[0].peak
    rest = [sum(line.bytes for line in a.ledger if line.kind == "parameter") for a in (kept, whole)]
    assert rest[1] - rest[0] == LAYERS * (2 * numbers - numbers * 17 // 32 - biases * (4 - 2))
    assert any("without these they are dequantised" in note for note in kept.notes)
    assert any("the kernels need compute capability 7.5" in note for note in whole.notes)
    asked = estimate(published(gpu="a100-80gb", **named("mxfp4", backend="dequantised")))
    assert asked.phases[1:] == whole.phases[1:]


def test_a_model_card_runs_as_published() -> None:
    plain_, asked = (RunSpec(model="gpt-oss-20b", task="generate", **more) for more in ({}, named("mxfp4")))
    assert estimate(plain_).bytes == estimate(asked).bytes
    assert estimate(plain_).run.method.quantization == estimate(asked).run.method.quantization


def test_each_chosen_experts_row_exists_before_summation() -> None:
    graph = decide(published(gpu="h100")).structure.graph
    (down,) = {op for op in operations(operations_of(graph)[0]) if op.name == "mlp.experts.down_proj"}
    assert [(t.shape, t.dtype) for t in (*down.writes, *down.scratch)] == [("b s h", "=n2"), ("b s e h", "=n2")]


def test_hopper_cards_rearrange_experts_while_loading() -> None:
    """The last rearranged stack: its codes, the permuted codes, and words of eight times as many bytes."""
    hopper, ampere, blackwell = (decide(published(gpu=gpu)).structure.graph for gpu in ("h100", "a100-80gb", "b200"))
    peaks = [most_at_once(loading(graph)) for graph in (hopper, ampere)]
    assert most_at_once(loading(blackwell)) == peaks[1]
    resting = sum(h.bytes * h.copies for h in parameters_of(ampere))
    codes = EXPERTS * 2 * WIDTH * HIDDEN // 2
    assert peaks[1] - resting < codes // 100
    assert 7 * codes < peaks[0] - resting < 9 * codes


def test_inputs_of_torchao_are_int8_and_products_int32() -> None:
    """A product in int32 and in fp32, and a copy of the matrix: read from the code of the CUDA path."""
    stored = {"quant_method": "torchao", "quant_type": "int8_dynamic_activation_int8_weight"}
    graph = decide(run_of(stored)).structure.graph
    made = [t for op in operations(operations_of(graph)[0]) if op.name.startswith("mlp.gate_proj") for t in op.writes]
    assert [t.dtype for t in made][2:] == [*4 * ["fp32"], "int8", "int8", "int32", "fp32", "=n2", "fp32", "=n2"]
    assert all(
        op.source.startswith("assumed") for op in operations(operations_of(graph)[0]) if op.name == "mlp.gate_proj"
    )
    scales = {
        t.name: t.dtype for op in operations(operations_of(graph)[0]) for t in op.writes if t.name.startswith("gate.")
    }
    assert (scales["gate.scales"], scales["gate.points"]) == ("fp32", "int8")


def test_optimised_inference_divides_its_inputs_in_fp32() -> None:
    stored = compressed(FP8, ROWS, use_optimized_inference=True)
    graph = decide(run_of(stored, gpu="h100")).structure.graph
    ops_ = [op for op in operations(operations_of(graph)[0]) if op.name.startswith("mlp.gate_proj")]
    made = [(t.name.rpartition(".")[2], t.dtype) for op in ops_ for t in op.writes]
    assert made[:3] == [("wide", "fp32"), ("scales", "fp32"), ("divided", "=" + ops_[0].writes[0].name)]
    assert ("codes", "fp8") in made


def test_experts_in_mxfp4_are_looked_up_a_gibibyte_of_weights_at_once() -> None:
    """Two numbers per byte, and at most 32,768 x 1,024 rows of 16 bytes."""
    assert (bytes_at_once(32 * 100), bytes_at_once(2**40)) == (32 * 100 // 2, 32768 * 1024 * 16)
    experts = Weight("experts.gate_up_proj", "E 2 m h", "mlp", "bf16", stacked=True)
    steps = list(unpacking(experts, InferenceFormat(plain("mxfp4"), "dequantised", at_once=True)))
    made = {step.name: step.made.dtype for step in steps if step.made is not None}
    assert made["exponents"] == made["wide exponents"] == "int32/32"  # one per 32 numbers
    alive: list[str] = []
    for step in steps:
        alive = [*alive, step.name] if step.made is not None else [name for name in alive if name != step.name]
    assert alive == ["weight"]


def test_a_module_quantised_in_half_of_its_layers_counts_as_unquantised() -> None:
    stored = compressed(INT4)
    stored["ignore"] = ["lm_head", "model.layers.0.mlp.down_proj"]
    found = answer(stored, {**TINY, "num_hidden_layers": 2})
    assert "down_proj is quantised in 1 of 2 layers: counted as not quantised" in found.notes


def test_every_kernel_runs_a_format_and_every_format_of_storage_is_known() -> None:
    assert {kernel for kernels in RUNS.values() for kernel in kernels} - {""} == set(KERNELS)
    assert set(RUNS) <= set(KINDS)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"stored": {"quant_method": "hqq"}}, "transformers 5.24 cannot load hqq checkpoints"),
        ({"stored": {"quant_method": "modelopt", "quant_algo": "FP8"}}, "cannot load modelopt checkpoints"),
        ({"stored": compressed({**INT4, "symmetric": False})}, "cannot load packed weights with zero points"),
        (
            {"stored": {"quant_method": "fbgemm_fp8"}, "gpu": "a100-80gb"},
            "fbgemm needs compute capability 9.0",
        ),
        ({"stored": {"quant_method": "torchao", "quant_type": "float8_dynamic"}}, "torchao's float8_dynamic"),
        (named("w4a16", backend="torchao"), "torchao does not run w4a16; choose decompressed"),
        ({**named("quanto-int4"), "gpu": "t4"}, "quanto needs compute capability 8.0 for quanto-int4, not 7.5"),
        ({**named("torchao-int4"), "precision": {"weights": "fp16"}}, "torchao runs torchao-int4 with bf16, not fp16"),
        (named("mxfp4"), "and llama has no experts; use decompressed"),
        ({"stored": {"quant_method": "quanto", "dequantize": True}}, "does not dequantise quanto checkpoints"),
        ({**named("w4a16"), "profile": "transformers-4.51"}, "'w4a16' is not supported yet"),
        (
            {"stored": compressed(INT4), **named("fp8")},
            "is stored in compressed-tensors, w4a16, not fp8",
        ),
    ],
)
def test_unsupported_packed_weights_are_refused_in_one_line(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(MemplanError) as refused:
        answer(**fields)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.sampled_from(["int8", "float", "channel", "group", "local"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["weights", "targets"]), inner),
    max_leaves=5,
)
KEYS = ("config_groups", "quant_type", "weights", "dequantize", "modules_to_not_convert", "quant_config", "ignore")


@settings(max_examples=examples(100), deadline=None)
@given(
    st.sampled_from(["compressed-tensors", "torchao", "quanto", "fbgemm_fp8", "mxfp4", "hqq", "modelopt", "bitnet"]),
    st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4),
)
def test_any_config_is_answered_or_one_line(how: str, said: dict[str, Any]) -> None:
    failed = ""
    try:
        answer({**said, "quant_method": how})
    except MemplanError as error:
        failed = str(error)
    assert "\n" not in failed


@pytest.mark.parametrize(
    ("gpu", "rows", "profile"),
    [  # of down_proj, 2048 x 8192: bitsandbytes 0.50 _gemm_4bit_use_custom_cuda, _rocm; 0.45 matmul_4bit
        ("4090", 12, "transformers-5"),
        ("a100-80gb", 7, "transformers-5"),
        ("t4", 7, "transformers-5"),
        ("mi300x", 4, "transformers-5"),
        ("4090", 1, "transformers-4.51"),
    ],
)
def test_the_card_decides_how_many_rows_read_a_4_bit_matrix_packed(gpu: str, rows: int, profile: str) -> None:
    for tokens, is_copied in ((rows, False), (rows + 1, True)):
        fields: dict[str, Any] = {"task": "forward", "gpu": gpu, "profile": profile, "batch": {"sequence": tokens}}
        answer = estimate(RunSpec(model="llama-3.2-1b", method={"quantization": {}}, **fields))
        assert ("dequantised" in {line.what for line in answer.ledger}) == is_copied, tokens
