"""Quantised checkpoints: every stored tensor to the byte, training on them, and refusals."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan import Estimate, ModelSpec, RunSpec, estimate
from memplan.catalogue.quantization.quantization import fp8_experts_at_once
from memplan.core.errors import MemplanError, SpecError
from memplan.core.units import gib, rounded
from memplan.planning.levers import levers_of
from memplan.probe.refusals import checked_run
from memplan.report.assumptions import assumptions
from memplan.resolve.quantized_checkpoint import checkpoint_format
from tests.checkpoints import TINY, folder_of, of_model
from tests.sampling import examples

# Sizes that are not multiples of 128: 9 heads of 24 are 216 wide.
ODD = {**TINY, "hidden_size": 216, "intermediate_size": 600, "num_attention_heads": 9, "num_key_value_heads": 3}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {}}}
PACKED["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}}


def ask(
    stored: Mapping[str, Any] | None, method: Any = "lora", config: Mapping[str, Any] = TINY, **run: Any
) -> Estimate:
    model = {**config, **({"quantization_config": dict(stored)} if stored else {})}
    return estimate(RunSpec(model={"config": model}, method=method, batch={"sequence": 256}, **run))


def weights(answer: Estimate, of: str) -> dict[str, int]:
    """Return the bytes of each tensor that stores one layer's matrix."""
    return {
        line.what.removeprefix(f"{of}.weight").strip(" ()"): line.bytes // line.count
        for line in answer.ledger
        if line.kind == "parameter" and line.what.startswith(f"{of}.weight")
    }


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (8, 64), (4, -1)])
def test_gptq_stores_int32_words_scales_zeros_and_group_indices(bits: int, group: int) -> None:
    out, into = 192, 64  # gate_proj
    groups = 1 if group == -1 else -(-into // group)
    found = weights(ask({**GPTQ, "bits": bits, "group_size": group}), "mlp.gate_proj")
    assert found == {
        "qweight": rounded(4 * out * into * bits // 32),
        "scales": rounded(2 * out * groups),
        "qzeros": rounded(4 * out * groups * bits // 32),
        "g_idx": rounded(4 * into),
    }


def test_awq_has_the_same_without_groups_of_inputs() -> None:
    found = weights(ask({**AWQ, "group_size": 64}), "mlp.down_proj")
    out, into = 64, 192
    assert found == {
        "qweight": rounded(4 * out * into // 8),
        "scales": rounded(2 * out * into // 64),
        "qzeros": rounded(4 * out * into // 64 // 8),
    }


def test_fp8_stores_one_byte_per_weight_and_scales_per_128_square() -> None:
    answer = ask(FP8, config=ODD)
    for name, out, into in (("self_attn.q_proj", 216, 216), ("mlp.up_proj", 600, 216), ("self_attn.k_proj", 72, 216)):
        squares = -(-out // 128) * -(-into // 128)
        assert weights(answer, name) == {"fp8": rounded(out * into), "weight_scale_inv": rounded(4 * squares)}
    whole = weights(ask({**FP8, "weight_block_size": None}, config=ODD), "mlp.up_proj")
    assert whole["weight_scale_inv"] == rounded(4)


@pytest.mark.torch
def test_fp8_is_stored_as_the_layer_of_transformers_stores_it() -> None:
    torch = pytest.importorskip("torch")
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    answer = ask(FP8, config=ODD)
    for name, out, into in (("mlp.down_proj", 216, 600), ("self_attn.v_proj", 72, 216)):
        with torch.device("meta"):
            layer = fp8.FP8Linear(into, out, block_size=(128, 128))
        sizes = sorted(rounded(p.numel() * p.element_size()) for p in layer.parameters())
        assert sorted(weights(answer, name).values()) == sizes


EXPERTS = {
    **TINY,
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 208,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
ATTENTION = {"kind": "lora", "targets": ["q_proj", "v_proj"]}


def stacks(answer: Estimate) -> dict[str, int]:
    """Return the bytes of each tensor that stores one layer's stacked experts."""
    lines = [line for line in answer.ledger if line.kind == "parameter" and ".experts." in line.what]
    return {line.what: line.bytes // line.count for line in lines}


def test_experts_in_fp8_have_scales_each() -> None:
    found = stacks(ask(FP8, ATTENTION, config=EXPERTS))
    e, m, h = 8, 208, 64
    assert found == {
        "mlp.experts.gate_up_proj (fp8)": e * 2 * m * h,
        "mlp.experts.gate_up_proj (weight_scale_inv)": rounded(4 * e * -(-2 * m // 128) * 1),
        "mlp.experts.down_proj (fp8)": e * m * h,
        "mlp.experts.down_proj (weight_scale_inv)": rounded(4 * e * 1 * -(-m // 128)),
    }


@pytest.mark.torch
def test_experts_are_stored_as_the_layer_of_transformers_stores_them() -> None:
    torch = pytest.importorskip("torch")
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(**{key: value for key, value in EXPERTS.items() if key != "model_type"})
    in_fp4 = RunSpec(
        model={"config": {**EXPERTS, "expert_dtype": "fp4", "quantization_config": FP8}}, task="generate", gpu="h100"
    )
    for answer, fp4 in (
        (ask(FP8, ATTENTION, config=EXPERTS), {}),
        (estimate(in_fp4), {"expert_dtype": "fp4", "scale_fmt": "ue8m0"}),
    ):
        with torch.device("meta"):
            layer = fp8.FP8Experts(config, block_size=(128, 128), **fp4)
        sizes = sorted(rounded(p.numel() * p.element_size()) for p in layer.parameters())
        assert sorted(stacks(answer).values()) == sizes


def test_backward_dequantises_a_gibibyte_of_experts_at_once() -> None:
    assert fp8_experts_at_once(128 * 1536 * 2048, 128, 2) == 128
    assert fp8_experts_at_once(256 * 4096 * 7168, 256, 2) == 2**30 // (4096 * 7168 * 2) == 18
    assert fp8_experts_at_once(2 * 2**40, 2, 2) == 1


def test_adapters_on_experts_need_their_matrices_whole() -> None:
    answer = ask(FP8, config=EXPERTS)
    assert answer.phases == ask(None, config=EXPERTS).phases
    assert "name targets other than experts" in answer.notes[0]
    with pytest.raises(MemplanError, match="experts quantised by GPTQ or AWQ are not supported"):
        ask(GPTQ, ATTENTION, config=EXPERTS)


def test_a_4_bit_bitsandbytes_checkpoint_equals_qlora() -> None:
    for double in (True, False):
        quantization = {"format": "nf4", "double_quant": double}
        made = ask(None, {"kind": "qlora", "quantization": quantization})
        stored = ask({**NF4, "bnb_4bit_use_double_quant": double})
        codes = 256 * 4 * double  # which quantising scales on loading leaves
        assert {**stored.categories, "buffer": stored.categories["buffer"] + codes} == made.categories
    eight = ask({"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert eight.categories == ask(None, {"kind": "qlora", "quantization": {"format": "int8"}}).categories


def test_decided_fields_are_in_the_run_and_the_assumptions() -> None:
    answer = ask(GPTQ)
    assert answer.run.method.kind == "lora"
    assert answer.run.method.quantization is not None
    assert (answer.run.method.quantization.format, answer.run.method.quantization.block_size) == ("gptq-int4", 128)
    assert "gptq-int4 in blocks of 128; as the checkpoint is stored" in dict(assumptions(answer))["method"]
    assert any("auto_trainable" in note for note in answer.notes)


@pytest.mark.parametrize("stored", [GPTQ, AWQ, FP8, NF4, {**GPTQ, "bits": 8, "group_size": -1}, PACKED])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_stating_the_decided_fields_gives_the_same_answer(stored: dict[str, Any], method: str) -> None:
    answer = ask(stored, method)
    again = estimate(answer.run)
    assert (again.phases, again.run) == (answer.phases, answer.run)
    if stored not in (PACKED, FP8):
        assert answer.phases == ask(stored, "lora").phases


def test_a_bundled_model_runs_as_it_is_published() -> None:
    """Its card holds the `quantization_config` of the checkpoint that has its name."""

    def asked(model: str, gpu: str, **method: Mapping[str, Any]) -> Estimate:
        fields: dict[str, Any] = {"model": model, "task": "generate", "gpu": gpu, "method": method}
        return estimate(RunSpec(**fields))

    for model in ("deepseek-r1", "deepseek-v3", "deepseek-v3.2", "kimi-k2", "mimo-v2-flash", "devstral-small-2-24b"):
        stored = asked(model, "h200").run.method.quantization
        assert stored is not None
        assert stored.format == "fp8"
    older, other = asked("devstral-small-2-24b", "a100"), asked("devstral-small-2-24b", "h200", quantization={})
    assert older.run.method.quantization is None
    assert other.run.method.quantization is not None
    assert other.run.method.quantization.format == "nf4"
    assert any("runs dequantised: its kernels need" in note for note in older.notes)
    assert any("another format only of a copy in 16 bits" in note for note in other.notes)
    v4 = RunSpec(model="deepseek-v4-flash", method={"kind": "lora", "targets": ["q_a_proj"]}, gpu="h200")
    assert any("no gradients through its experts in fp4" in note for note in estimate(v4).notes)
    fields: dict[str, Any] = {"model": "devstral-small-2-24b", "method": {"kind": "lora"}, "gpu": "h200"}
    lora, zero3 = RunSpec(**fields), {"world": 2, "dp": 2, "strategy": "zero3"}
    sharded = estimate(RunSpec(**fields, parallelism=zero3))
    assert any("where GPUs divide the weights" in note for note in sharded.notes)
    whole = estimate(RunSpec(**fields, parallelism={**zero3, "strategy": "zero2"}))
    assert any("DeepSpeed before 0.19.8 casts" in note for note in whole.notes)
    quantised = {"kind": "qlora", "quantization": {"format": "fp8"}}
    with pytest.raises(SpecError, match=r"fp8 under zero2: DeepSpeed before 0\.19\.8 casts .* leave it out"):
        estimate(RunSpec(model="qwen3-8b", method=quantised, parallelism={**zero3, "strategy": "zero2"}, gpu="h100"))
    assert "method_qlora" in {key for lever in levers_of(lora) for key in lever.keys}


def test_modules_that_are_left_out_are_whole() -> None:
    answer = ask({**AWQ, "modules_to_not_convert": ["down_proj", "model.layers.0.self_attn.q_proj"]})
    assert weights(answer, "mlp.down_proj") == {"": rounded(2 * 64 * 192)}
    assert answer.run.method.quantization is not None
    assert answer.run.method.quantization.skip == ("lm_head", "down_proj")
    assert "q_proj is not quantised in 1 of 3 layers: counted as quantised" in answer.notes
    listed = {**GPTQ, "modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.up_proj"]]}
    skip = ask(listed).run.method.quantization
    assert skip is not None
    assert set(skip.skip or ()) == {"lm_head", "v_proj", "o_proj", "gate_proj", "down_proj"}


@pytest.mark.parametrize(
    ("pattern", "left_out"),
    [
        ("re:.*mlp.up_proj", True),
        ("re:.*\\.up_proj$", True),
        ("model.layers.*.mlp", True),
        ("mlp.up", False),
        ("up_proj", True),
        ("re:model.layers.1.*", False),
        ("model.layers", True),
        ("re:(a+)+$", False),
    ],
)
def test_skip_patterns_match_transformers(pattern: str, left_out: bool) -> None:
    stored = checkpoint_format(ModelSpec(TINY), {**AWQ, "modules_to_not_convert": [pattern]})
    assert stored.quantization is not None
    assert ("up_proj" in (stored.quantization.skip or ())) == left_out


def test_more_patterns_than_a_config_needs_are_not_read() -> None:
    many = [f"nothing.*{i}" for i in range(256)]
    for listed, left_out in (([*many[1:], ".*up_proj"], True), ([*many, ".*up_proj"], False)):
        stored = checkpoint_format(ModelSpec(TINY), {**AWQ, "modules_to_not_convert": listed})
        assert stored.quantization is not None
        assert ("up_proj" in (stored.quantization.skip or ())) == left_out


@pytest.mark.parametrize(("said", "skipped"), [({}, True), ({"lm_head": False}, True), ({"lm_head": True}, False)])
def test_gptqs_head_is_unquantised_unless_the_config_says_otherwise(said: dict[str, bool], skipped: bool) -> None:
    stored = checkpoint_format(ModelSpec(TINY), {**GPTQ, **said})
    assert stored.quantization is not None
    assert ("lm_head" in (stored.quantization.skip or ())) == skipped


def test_without_checkpointing_gptqmodel_keeps_every_dequantised_matrix() -> None:
    def kept(stored: Any, **run: Any) -> int:
        answer = ask(stored, kernels={"checkpointing": "none"}, **run)
        return sum(line.bytes for line in answer.ledger if line.kind == "activation" and "dequantised" in line.what)

    matrices = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 192)
    matrices -= 64 * 64 + 2 * 32 * 64  # inputs from the embeddings require no gradient
    lines = [line for line in ask(GPTQ, kernels={"checkpointing": "none"}).ledger if "dequantised" in line.what]
    assert kept(GPTQ) == 2 * matrices
    assert {line.basis for line in lines} == {"assumed"}
    assert kept(GPTQ, profile="transformers-4.48") == 0
    assert kept(AWQ) == kept(FP8) == kept(NF4) == 0


def test_a_checkpoint_is_loaded_in_its_stored_format() -> None:
    loaded = {name: ask(stored).phases[0].peak for name, stored in (("gptq", GPTQ), ("fp8", FP8), ("", None))}
    assert loaded["gptq"] < loaded["fp8"] < loaded[""]


@pytest.mark.parametrize(
    ("stored", "why"), [(PACKED, "int4"), ({"quant_method": "mxfp4"}, "Mxfp4Config(dequantize=True)")]
)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_formats_without_training_support_are_dequantised(stored: dict[str, Any], why: str, method: str) -> None:
    answer = ask(stored, method)
    assert answer.phases == ask(None, method).phases
    (note,) = answer.notes
    assert "trains dequantised" in note
    assert why in note


def test_fp8_is_dequantised_if_its_kernels_or_library_cannot_train() -> None:
    whole = ask(None, "lora").phases
    assert ask(FP8, "lora").phases != whole
    assert ask(FP8, "lora", gpu="4090").phases[0] == ask(FP8, "lora").phases[0]
    assert ask(FP8, "lora", gpu="a100-80gb").phases == ask(None, "lora", gpu="a100-80gb").phases
    assert "compute capability 8.9" in str(ask(FP8, "lora", gpu="a100-80gb").notes)
    old: dict[str, Any] = {"profile": "transformers-4.51"}
    assert ask(FP8, "lora", **old).phases == ask(None, "lora", **old).phases
    assert ask(FP8, "full").phases == ask(None, "full").phases
    assert (
        ask(FP8, {"kind": "qlora", "quantization": {"format": "int8"}}).phases
        == ask(None, {"kind": "qlora", "quantization": {"format": "int8"}}).phases
    )


def torchao(name: str) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": name, "_data": {}}}}


def test_adapters_train_over_torchaos_weights_in_8_bits() -> None:
    stored = ask(torchao("Int8WeightOnlyConfig"), "lora")
    assert stored.phases == ask(None, {"kind": "qlora", "quantization": {"format": "torchao-int8"}}).phases


@pytest.mark.parametrize(
    ("stored", "method", "field", "words"),
    [
        (GPTQ, "full", "method.kind", "quantised weights cannot be fully trained; use lora"),
        (NF4, "freeze", "method.kind", "quantised weights cannot be fully trained; use lora"),
        (GPTQ, {"kind": "qlora", "quantization": {"format": "fp4"}}, "method.quantization.format", "stored in gptq"),
        (NF4, {"kind": "qlora", "quantization": {"format": "int8"}}, "method.quantization.format", "stored in bits"),
        (AWQ, "dora", "method.kind", "no DoRA over awq-int4"),
        ({**GPTQ, "bits": 3}, "lora", "model", "GPTQ in 3 bits is not supported yet"),
        ({**GPTQ, "group_size": 100}, "lora", "quantization_config", "group_size must be one of"),
        ({**GPTQ, "bits": "four"}, "lora", "quantization_config", "bits must be a whole number"),
        ({**GPTQ, "dynamic": {"x": {}}}, "lora", "model", "dynamic"),
        ({**AWQ, "version": "gemv_fast"}, "lora", "model", "gemv_fast"),
        ({**FP8, "weight_block_size": [64, 64]}, "lora", "model", "supported: 128"),
        ({**NF4, "bnb_4bit_quant_type": "nf3"}, "lora", "quantization_config", "must be nf4 or fp4"),
        (torchao("Int4WeightOnlyConfig"), "lora", "model", "nothing trains over torchao, torchao-int4"),
        (torchao("Int8DynamicActivationInt8WeightConfig"), "lora", "model", "only over weights alone in int8"),
        ({"quant_method": "aqlm"}, "lora", "model", "aqlm checkpoints are not supported yet"),
        ({"bits": 4}, "lora", "model", "? checkpoints are not supported yet"),
    ],
)
def test_untrainable_formats_are_refused_in_one_line(stored: Any, method: Any, field: str, words: str) -> None:
    with pytest.raises(MemplanError) as error:
        ask(stored, method)
    assert words in str(error.value)
    assert error.value.field == field
    assert "\n" not in str(error.value)


def test_a_quantised_checkpoints_tensors_give_no_notes(tmp_path: Path) -> None:
    config = {**TINY, "quantization_config": {**GPTQ, "group_size": 32}}
    tensors = dict(of_model(TINY, "F16"))
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        out, into = tensors.pop(name)[1]
        module = name.removesuffix(".weight")
        tensors[f"{module}.qweight"] = ("I32", (into // 8, out))
        tensors[f"{module}.qzeros"] = ("I32", (into // 32, out // 8))
        tensors[f"{module}.scales"] = ("F16", (into // 32, out))
        tensors[f"{module}.g_idx"] = ("I32", (into,))
    notes = estimate(RunSpec(model=str(folder_of(tmp_path, config, tensors)), method="lora")).notes
    assert not [note for note in notes if "the checkpoint also has" in note or "lacks" in note]
    tensors["model.layers.1.mlp.up_proj.scales"] = ("F16", (1, 192))
    with pytest.raises(MemplanError) as error:
        estimate(RunSpec(model=str(folder_of(tmp_path, config, tensors)), method="lora"))
    assert str(error.value) == (
        "model: model.layers.1.mlp.up_proj.scales has 192 elements in the checkpoint, but its "
        "quantization_config implies 384"
    )


def of_experts(layers: int, packed: bool) -> dict[str, tuple[str, Any]]:
    """Return EXPERTS' experts separately, in fp8 with scales or packed by compressed-tensors."""
    found: dict[str, tuple[str, Any]] = {}
    for i in range(layers):
        for e in range(8):
            for name, out, into in (("gate_proj", 208, 64), ("up_proj", 208, 64), ("down_proj", 64, 208)):
                module = f"model.layers.{i}.mlp.experts.{e}.{name}"
                if packed:
                    found[f"{module}.weight_packed"] = ("I32", (out, into // 8))
                    found[f"{module}.weight_scale"] = ("BF16", (out, into // 32))
                    found[f"{module}.weight_shape"] = ("I64", (2,))
                else:
                    found[f"{module}.weight"] = ("F8_E4M3", (out, into))
                    found[f"{module}.weight_scale_inv"] = ("F32", (-(-out // 128), -(-into // 128)))
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_separate_experts_and_mtp_blocks_are_told_apart(packed: bool, tmp_path: Path) -> None:
    config = {**EXPERTS, "quantization_config": PACKED if packed else FP8}
    tensors = {name: of for name, of in of_model(EXPERTS).items() if ".experts." not in name}
    tensors |= of_experts(4, packed)
    further = [name for name in tensors if ".layers.3." in name]
    run = RunSpec(model=str(folder_of(tmp_path, config, tensors)), method=ATTENTION)
    (first, *rest) = estimate(run).notes
    assert first.startswith(f"the checkpoint also has {len(further)} × model.layers.3.* (")
    assert not any("lacks" in note for note in rest)


def test_mxfp4_blocks_give_no_notes(tmp_path: Path) -> None:
    config = {**EXPERTS, "quantization_config": {"quant_method": "mxfp4"}}
    tensors = of_model(EXPERTS)
    for name in [name for name in tensors if ".experts." in name]:
        e, out, into = tensors.pop(name)[1]
        tensors[f"{name}_blocks"] = ("U8", (e, out, into // 32, 16))
        tensors[f"{name}_scales"] = ("U8", (e, out, into // 32))
    notes = estimate(RunSpec(model=str(folder_of(tmp_path, config, tensors)), method="full")).notes
    stored = {
        dtype: sum(prod(s) * n for d, s in tensors.values() if d == dtype) for dtype, n in (("BF16", 2), ("U8", 1))
    }
    most, least = sorted(stored, key=lambda dtype: -stored[dtype])
    by_type = f"{most} {gib(stored[most])}, {least} {gib(stored[least])}"
    assert [note for note in notes if "mxfp4" not in note] == [
        f"the checkpoint has {gib(sum(stored.values()))} of tensors ({by_type})"
    ]
    assert any("stored in mxfp4" in note for note in notes)


def test_quantised_checkpoints_get_no_proposal_to_quantise() -> None:
    def keys(config: dict[str, Any]) -> set[str]:
        return {key for lever in levers_of(RunSpec(model={"config": config}, method="lora")) for key in lever.keys}

    assert keys(TINY) - keys({**TINY, "quantization_config": GPTQ}) == {"method_qlora"}


def test_a_probe_stores_weights_as_the_run_says_and_no_other_way() -> None:
    def asked(stored: Any, method: str = "lora", gpu: str = "h100") -> RunSpec:
        return RunSpec(model={"config": {**TINY, "quantization_config": stored}}, method=method, gpu=gpu)

    for stored in (GPTQ, AWQ, NF4, FP8):
        with pytest.raises(MemplanError, match="a probe creates its own weights"):
            checked_run(asked(stored))
    for run in (asked(FP8, gpu="a100-80gb"), asked(FP8, "full"), asked(PACKED), asked({"quant_method": "mxfp4"})):
        assert checked_run(run).method.kind == run.method.kind


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("bits", "group_size", "version", "modules_to_not_convert", "weight_block_size", "load_in_4bit", "load_in_8bit")
MORE = ("modules_in_block_to_quantize", "config_groups", "llm_int8_skip_modules", "bnb_4bit_quant_type", "lm_head")


@settings(max_examples=examples(150), deadline=None)
@given(
    how=st.sampled_from(["gptq", "awq", "fp8", "bitsandbytes", "mxfp4", "compressed-tensors"]) | JSON,
    said=st.dictionaries(st.sampled_from([*KEYS, *MORE]), JSON, max_size=4),
)
def test_any_quantization_config_is_answered_or_one_line(how: Any, said: dict[str, Any]) -> None:
    failed = ""
    try:
        ask({**said, "quant_method": how})
    except MemplanError as error:
        failed = str(error)
    assert "\n" not in failed
