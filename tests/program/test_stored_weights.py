"""Stored weight formats: bytes against published checkpoints, unquantised modules, and unreadable configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan import RunSpec, estimate
from memplan.catalogue.quantization.gguf import FILE_TYPES
from memplan.catalogue.quantization.storage import KINDS
from memplan.core.errors import ConfigError, MemplanError, SpecError, UnknownNameError
from memplan.models.cards import find_model, load_card
from memplan.models.headers import Checkpoint, StoredTensor
from memplan.models.model import ModelSpec
from memplan.program.stored.checkpoint import parameters
from memplan.program.stored.quantization_config import Modules, scheme_of
from memplan.program.stored.weights import format_of, stored_weights
from memplan.spec.formats import Format, Quantization
from tests.checkpoints import folder_of, gguf_tensors, of_model, write_gguf
from tests.models.test_headers import METADATA
from tests.sampling import examples

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 1000,
}
MOE: dict[str, Any] = {
    **TINY,
    "model_type": "qwen3_moe",
    "head_dim": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def compressed(weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a compressed-tensors config with one group for all linear layers."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": more.pop("inputs", None)}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"], **more}


FIXED = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
TENSOR = compressed({"num_bits": 8, "type": "float", "strategy": "tensor"}, inputs=FIXED)
CHANNEL = compressed({"num_bits": 8, "type": "float", "strategy": "channel"})


def total(model: ModelSpec, quantization: str | Quantization | None = None) -> int:
    return sum(row.bytes for row in stored_weights(model, quantization))


def published(card: str, config: dict[str, Any] | None) -> ModelSpec:
    own = load_card(card).config
    return ModelSpec({**own, "quantization_config": config} if config else own)


# Bytes of all tensors, from an index. Source: huggingface.co/openai/gpt-oss-20b model.safetensors.index.json
# (total_size), gpt-oss-120b; as copied by public repositories, read in November 2026.
@pytest.mark.parametrize(("card", "size"), [("gpt-oss-20b", 13_761_264_768), ("gpt-oss-120b", 65_248_815_744)])
def test_mxfp4_experts_match_the_published_checkpoint(card: str, size: int) -> None:
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    assert total(published(card, config)) == size == total(load_card(card), "mxfp4")


# Bytes of safetensors files, all shards together, on the Hugging Face Hub in 2026. A file also has a header, of 100 to
# 125 bytes per tensor.
FILES = (
    ("llama-3.1-8b", None, 16_060_556_376, "meta-llama/Llama-3.1-8B-Instruct"),
    ("llama-3.1-8b", AWQ, 5_727_938_576, "Llama-3.1-8B-Instruct, AWQ in 4 bits"),
    ("llama-3.1-8b", TENSOR, 9_081_287_016, "Llama-3.1-8B-Instruct, FP8 with fixed scales"),
    ("llama-3.3-70b", AWQ, 39_767_996_256, "Llama-3.3-70B-Instruct, AWQ in 4 bits"),
    ("llama-3.3-70b", CHANNEL, 72_669_954_704, "Llama-3.3-70B-Instruct, FP8 with a scale a row"),
    ("qwen2.5-7b", AWQ, 5_570_829_760, "Qwen/Qwen2.5-7B-Instruct-AWQ"),
    ("qwen3-8b", AWQ, 6_098_581_864, "Qwen/Qwen3-8B-AWQ"),
    ("qwen3-32b", AWQ, 19_325_481_744, "Qwen/Qwen3-32B-AWQ"),
    ("qwen3-8b", FP8, 9_436_628_784, "Qwen/Qwen3-8B-FP8, scales in bf16"),
    ("qwen3-32b", FP8, 34_322_567_640, "Qwen/Qwen3-32B-FP8, scales in bf16"),
)


@pytest.mark.parametrize(("card", "config", "size", "source"), FILES, ids=lambda value: str(value)[:24])
def test_checkpoints_are_as_large_as_their_files(card: str, config: Any, size: int, source: str) -> None:
    rows = stored_weights(published(card, config))
    header = size - sum(row.bytes for row in rows)
    assert 100 * len(rows) < header < 125 * len(rows), source


def test_kimi_s_experts_are_in_four_bits_and_nothing_else() -> None:
    model = ModelSpec({**MOE, "quantization_config": KIMI})
    rows = stored_weights(model)
    packed = {row.name.rpartition(".")[2] for row in rows if row.part == "weight_packed"}
    assert packed == {"gate_up_proj", "down_proj"}
    experts = 4 * (2 * 128 * 256 + 256 * 128)  # in a layer
    wanted = experts // 2 + 2 * experts // 32 + 4 * 3 * 16  # int4, a bf16 scale per 32, and the shape of each matrix
    assert sum(row.bytes for row in rows if ".mlp.experts." in row.name) == 2 * wanted


KIMI = compressed(
    {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
    format="pack-quantized",
)
KIMI["ignore"] = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]

# Bytes of a single 256 x 512 matrix, as its library stores it.
MATRIX = 256 * 512
EACH = {
    "fp8": MATRIX + 4 * 2 * 4,
    "fp8-tensor": MATRIX + 2,
    "fp8-channel": MATRIX + 2 * 256,
    "w8a8-int8": MATRIX + 2 * 256,
    "w8a16": MATRIX + 2 * MATRIX // 128 + 16,
    "w4a16": MATRIX // 2 + 2 * MATRIX // 128 + 16,
    "gptq-int4": MATRIX // 2 + 2 * MATRIX // 128 + MATRIX // 128 // 2 + 4 * 512,
    "awq-int4": MATRIX // 2 + 2 * MATRIX // 128 + MATRIX // 128 // 2,
    "mxfp4": MATRIX // 2 + MATRIX // 32,
    "mxfp8": MATRIX + MATRIX // 32,
    "nvfp4": MATRIX // 2 + MATRIX // 16 + 4,
    "int8": MATRIX + 4 * 256,
    "torchao-int8": MATRIX + 4 * 256 + 256,
    "torchao-int4": MATRIX // 2 + 2 * 2 * MATRIX // 128,
    "hqq-int4": MATRIX // 2 + 2 * 2 * MATRIX // 64,
    "quanto-int8": MATRIX + 2 * 256,
    "quanto-int4": MATRIX // 2 + 2 * 2 * MATRIX // 128,
    "nf4": MATRIX // 2 + 4 * MATRIX // 64 + 4 * 16,
}


@pytest.mark.parametrize("name", EACH)
def test_a_matrix_is_stored_as_its_library_has_it(name: str) -> None:
    rows = stored_weights(ModelSpec(TINY), name)
    assert sum(row.bytes for row in rows if row.name == "model.layers.1.mlp.down_proj.weight") == EACH[name]


def test_every_format_is_tried_or_as_another() -> None:
    assert set(KINDS) - set(EACH) == {"fp4", "gptq-int8"}


@pytest.mark.parametrize("name", sorted(KINDS))
def test_formats_leave_norms_and_routers_unquantised(name: str) -> None:
    rows = stored_weights(ModelSpec(MOE), name)
    whole = {row.name.rpartition("layers.")[2][2:] for row in rows if not row.part}
    left = {"input_layernorm.weight", "mlp.gate.weight", "self_attn.q_norm.weight"}
    assert {name for name in left if name in whole} == left
    assert {row.group for row in rows if row.part} <= ({"mlp"} if KINDS[name].alone else {"attention", "mlp"})
    stacked = {row.part != "" for row in rows if ".experts." in row.name}
    assert stacked == {KINDS[name].experts}


def test_a_run_may_name_every_format() -> None:
    assert set(get_args(Format)) == {*KINDS, *FILE_TYPES}
    for name, wanted in (("gguf:q4_k_m", "Q4_K_M"), ("Q4_K", "Q4_K_M"), ("W4A16", "w4a16"), ("mxfp4_moe", "MXFP4_MOE")):
        assert Quantization.model_validate({"format": name}).format == wanted
    assert Quantization(format="nvfp4").block_size == KINDS["nvfp4"].group
    rows = stored_weights(ModelSpec(TINY), Quantization(format="Q8_0"))
    assert rows == stored_weights(ModelSpec(TINY), "Q8_0")
    assert stored_weights(ModelSpec(TINY), Quantization(format="awq-int4")) == stored_weights(
        ModelSpec(TINY), "awq-int4"
    )


@pytest.mark.parametrize("name", ["w4a16", "Q4_K_M", "quanto-int8"])
def test_inference_only_formats_cannot_be_trained(name: str) -> None:
    method = {"kind": "qlora", "quantization": {"format": name}}
    with pytest.raises(SpecError, match=f"format: '{name}' is not supported yet; supported: nf4, fp4, int8, gptq-int4"):
        estimate(RunSpec(model={"config": {**TINY, "max_position_embeddings": 4096}}, method=method))


def test_names_of_formats_are_read_however_written() -> None:
    assert [format_of(name) for name in ("FP8", "awq_int4", " W4A16 ", "q4_k_m", "gguf:Q8_0", "None")] == [
        *("fp8", "awq-int4", "w4a16", "Q4_K_M", "Q8_0", "none")
    ]
    with pytest.raises(UnknownNameError, match=r"unknown name 'q4_k_x'; did you mean .*Q4_K_"):
        stored_weights(ModelSpec(TINY), "q4_k_x")


def test_plain_weights_are_every_parameter() -> None:
    elements = sum(one.elements for one in map(_Elements, parameters(ModelSpec(TINY))) if one.counts)
    assert total(ModelSpec(TINY), "none") == 2 * elements == total(ModelSpec(TINY))
    assert sum(row.bytes for row in stored_weights(ModelSpec(TINY), None, "fp32")) == 4 * elements
    assert total(ModelSpec({**TINY, "quantization_config": AWQ}), "none") == 2 * elements


class _Elements:
    def __init__(self, one: Any) -> None:
        self.counts, self.elements = one.weight.group != "buffer", 1
        for n in one.shape:
            self.elements *= n


def test_a_run_s_own_settings_are_kept() -> None:
    model = ModelSpec(TINY)
    small, large = (total(model, Quantization(format="nf4", double_quant=False, block_size=n)) for n in (32, 64))
    matrices = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 512)
    assert small - large == 4 * matrices // 64
    head = Quantization(format="fp8", skip=())
    assert total(model, head) < total(model, Quantization(format="fp8"))


def test_a_gguf_file_is_as_large_as_its_tensors(tmp_path: Path) -> None:
    config = {**TINY, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 192, "vocab_size": 512}
    path = write_gguf(tmp_path / "model.gguf", METADATA, gguf_tensors(config))
    matrices, norms = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 192) + 2 * 512 * 64, 7 * 64
    rows = stored_weights(find_model(str(path)))
    assert sum(row.bytes for row in rows) == matrices // 32 * 18 + 4 * norms
    down = next(row for row in rows if row.part == "blk.1.ffn_down.weight")
    assert (down.name, down.dtype, down.group) == ("model.layers.1.mlp.down_proj.weight", "Q4_0", "mlp")


def test_an_available_quantised_checkpoint_is_counted_from_its_headers() -> None:
    config = {**MOE, "quantization_config": FP8}
    tensors = [
        StoredTensor("model.layers.0.mlp.experts.3.gate_proj.weight", "F8_E4M3", (128, 256), 128 * 256),
        StoredTensor("model.layers.0.mlp.experts.3.gate_proj.weight_scale_inv", "F32", (1, 2), 8),
        StoredTensor("model.layers.0.self_attn.q_proj.weight_scale_inv", "F32", (2, 2), 16),
        StoredTensor("model.layers.7.eh_proj.weight", "BF16", (256, 512), 2 * 256 * 512),
    ]
    rows = stored_weights(ModelSpec(config, checkpoint=Checkpoint("here", tuple(tensors))))
    assert [(row.name, row.bytes, row.group) for row in rows] == [
        ("model.layers.0.mlp.experts.gate_up_proj", 128 * 256, "mlp"),
        ("model.layers.0.mlp.experts.gate_up_proj", 8, "mlp"),
        ("model.layers.0.self_attn.q_proj.weight", 16, "attention"),
    ]


def test_a_bf16_checkpoint_is_counted_in_its_loaded_dtype(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, TINY, of_model(TINY))
    assert total(find_model(str(folder))) == total(ModelSpec(TINY))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "vptq"}, "a checkpoint of vptq is not supported yet; supported: awq, bitsandbytes"),
        ({"quant_method": None}, "a checkpoint of null is not supported yet"),
        ({"quant_method": ["fp8"]}, 'a checkpoint of ["fp8"] is not supported yet'),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ in 3 bits is not supported yet; supported: 4, 8"),
        ({"quant_method": "gptq", "bits": "4"}, "bits must be a whole number"),
        ({"quant_method": "gptq", "group_size": 100}, "group_size must be -1 or a power of two"),
        ({"quant_method": "gptq", "dynamic": {"+:.*q_proj": {"bits": 8}}}, "per-layer settings (dynamic)"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ of 4 bits, gemv, is not supported yet"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "fp8 in blocks of [64, 64] is not supported yet"),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 2}}}, "HQQ in 2 bits"),
        ({"quant_method": "quanto", "weights": "int2"}, "quanto's weights in"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "X\n"}}}, r"torchao's X\n is not"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8"}, "ModelOpt's W4A8 is not supported yet; supported: FP8"),
        (compressed({"num_bits": 3, "type": "int", "strategy": "group", "group_size": 32}), "compressed-tensors with"),
        (compressed({"num_bits": 8, "type": "float"}, sparsity_config={"format": "sparse-24"}), "sparse weights"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "x"}, "must be nf4 or fp4"),
    ],
)
def test_a_config_that_cannot_be_read_is_one_line(config: dict[str, Any], said: str) -> None:
    with pytest.raises((SpecError, ConfigError)) as error:
        stored_weights(ModelSpec({**TINY, "quantization_config": config}))
    line = str(error.value)
    assert line.startswith("quantization_config: ")
    assert said in line
    assert line.isprintable()


METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "qweight"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}, "weight_global_scale"),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, "weight_scale"),
    "torchao": ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "weight_zero_point"),
    "hqq": ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}}, "weight_zero_point"),
    "quanto": ({"quant_method": "quanto", "weights": "int8"}, "weight_scale"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "row scales"),
    "static": ({**FP8, "activation_scheme": "static", "weight_block_size": None}, "input_scale"),
    "mxfp8": (
        compressed({"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}),
        "weight_scale",
    ),
    "asymmetric": (
        compressed({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": False}),
        "weight_zero_point",
    ),
    "ordered": (
        compressed({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "actorder": "group"}),
        "weight_g_idx",
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_have_the_tensors_that_their_libraries_write(method: str) -> None:
    config, part = METHODS[method]
    rows = stored_weights(ModelSpec({**TINY, "quantization_config": config}))
    assert part in {row.part for row in rows}
    assert {row.part for row in rows if row.name.startswith(("lm_head", "model.embed"))} == {""}


def test_modules_are_left_out_by_name_by_end_and_by_pattern() -> None:
    w = next(one.weight for one in parameters(ModelSpec(TINY)) if one.name.endswith("mlp.up_proj.weight"))
    name = "model.layers.1.mlp.up_proj.weight"
    for listed in (
        "up_proj",
        "model.layers.1",
        "re:.*mlp.*",
        r"re:.*mlp\.(gate|up)_proj$",
        "*.mlp.up_proj",
        "layers.1",
    ):
        assert Modules([listed])(name, w), listed
    for listed in ("model.layers.11", "down_proj", "re:.*experts.*", "model.layers.0.*", "up", ""):
        assert not Modules([listed])(name, w), listed


def test_experts_of_deepseek_v4_are_in_fp4() -> None:
    stacks, matrices = (
        {one.name: one.weight for one in parameters(ModelSpec(MOE)) if one.weight.stacked == it} for it in (True, False)
    )
    scheme = scheme_of(FP8, "bf16", "fp4")
    kinds = {layout.format for name, w in stacks.items() if (layout := scheme.layout_of(name, w)) is not None}
    assert kinds == {"mxfp4"}
    kinds = {layout.format for name, w in matrices.items() if (layout := scheme.layout_of(name, w)) is not None}
    assert kinds == {"fp8"}


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("bits", "group_size", "ignore", "config_groups", "weights", "dynamic", "modules_to_not_convert", "quant_type")


@settings(max_examples=examples(150), deadline=None)
@given(st.sampled_from(("gptq", "awq", "fp8", "compressed-tensors", "torchao", "hqq", "modelopt", "mxfp4")), st.data())
def test_no_config_does_more_than_refuse(method: str, data: st.DataObject) -> None:
    config = {"quant_method": method, **{key: data.draw(JUNK) for key in data.draw(st.sets(st.sampled_from(KEYS)))}}
    try:
        rows = stored_weights(ModelSpec({**TINY, "quantization_config": config}))
    except MemplanError as error:
        line = str(error)
        rows = ()
    else:
        line = ""
    assert line.isprintable()
    assert all(row.bytes > 0 for row in rows)


@settings(max_examples=examples(30), deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(1, 4), st.integers(1, 4))
def test_quantised_weights_are_smaller_than_plain_ones(name: str, layers: int, width: int) -> None:
    model = ModelSpec({**TINY, "num_hidden_layers": layers, "intermediate_size": 256 * width})
    rows, plain = stored_weights(model, name), stored_weights(model, "none")
    assert sum(row.bytes for row in rows) < sum(row.bytes for row in plain)
    assert dict.fromkeys(row.name for row in rows) == dict.fromkeys(row.name for row in plain)
