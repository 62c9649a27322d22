"""GGUF files of a model: every tensor's type against llama.cpp's tables, and the sizes of real files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan import RunSpec, estimate
from memplan.catalogue.quantization.gguf import (
    ALIASES,
    BLOCKS,
    FILE_TYPES,
    NEEDS_IMATRIX,
    Sizes,
    quantises,
    types_of,
)
from memplan.core.errors import MemplanError, UnknownNameError, UnsupportedModelError
from memplan.core.units import GIB
from memplan.models.cards import card_names, find_model, load_card
from memplan.models.gguf import config_of
from memplan.models.headers import Gguf
from memplan.models.model import ModelSpec
from memplan.program.stored.checkpoint import built_tensors, parameters
from memplan.program.stored.gguf import file_type_of, gguf_file
from memplan.program.stored.weights import stored_weights
from tests.cases import each
from tests.checkpoints import write_gguf
from tests.sampling import examples, sampled
from tests.tiny import TINY

GOLDEN = [json.loads(line) for line in (Path(__file__).parents[1] / "golden/gguf_types.jsonl").read_text().splitlines()]


def layers(runs: str) -> Iterator[int]:
    for run in runs.split():
        first, _, last = run.partition("-") if run != "-1" else (run, "", "")
        yield from range(int(first), int(last or first) + 1)


@each(sampled(GOLDEN[1:], 8), lambda row: f"{row['model']}-{row['file_type']}")
def test_every_tensor_has_the_type_that_llama_cpp_gives_it(row: dict[str, Any]) -> None:
    file = gguf_file(load_card(row["model"]), row["file_type"], imatrix=False)
    wanted = {t.name: FILE_TYPES[row["file_type"]] for t in file.tensors if quantises(t.name, t.shape)}
    for kind, runs in row["others"].items():
        name, type_ = kind.split()
        for layer in layers(runs):
            path = f"{name}.weight" if layer < 0 else f"blk.{layer}.{name}.weight"
            assert path in wanted
            wanted[path] = type_
    assert {t.name: t.type for t in file.tensors if t.name in wanted} == wanted


# Bits per weight printed by llama.cpp's quantize tool for Llama-3.1-8B: 8,030,261,312 weights with its table of rotary
# factors. Source: ggml-org/llama.cpp tools/quantize/README.md.
BITS = {
    "IQ1_S": 2.0042,
    "IQ1_M": 2.1460,
    "IQ2_XXS": 2.3824,
    "IQ2_XS": 2.5882,
    "IQ2_S": 2.7403,
    "IQ2_M": 2.9294,
    "IQ3_XXS": 3.2548,
    "IQ3_XS": 3.4977,
    "IQ3_S": 3.6606,
    "IQ3_M": 3.7628,
    "IQ4_XS": 4.4597,
    "IQ4_NL": 4.6818,
    "Q2_K_S": 2.9697,
    "Q2_K": 3.1593,
    "Q3_K_S": 3.6429,
    "Q3_K_L": 4.2979,
    "Q4_K_S": 4.6672,
    "Q4_K_M": 4.8944,
    "Q5_K_S": 5.5704,
    "Q5_K_M": 5.7036,
    "Q6_K": 6.5633,
    "Q8_0": 8.5008,
    "F16": 16.0005,
}


@pytest.mark.parametrize("file_type", BITS)
def test_bits_per_weight_equal_the_tools_output(file_type: str) -> None:
    tensors = gguf_file(load_card("llama-3.1-8b"), file_type).tensors
    assert round(8 * sum(t.bytes for t in tensors) / 8_030_261_312, 4) == BITS[file_type]


# Bytes of files on the Hugging Face Hub, as pinned with a SHA-256 by repositories that fetch them; read in November
# 2026. They differ by the header, whose tokenizer is assumed; Phi's were made by older versions.
FILES = (
    ("llama-2-7b", "Q4_K_M", 4_081_004_224, "TheBloke/Llama-2-7B-GGUF"),
    ("llama-2-7b", "Q8_0", 7_161_089_728, "TheBloke/Llama-2-7B-GGUF"),
    ("llama-3.1-8b", "Q4_K_M", 4_920_739_232, "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF@bf5b95e9"),
    ("llama-3.1-8b", "Q5_K_M", 5_732_992_416, "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF"),
    ("llama-3.1-8b", "Q6_K", 6_596_011_424, "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF"),
    ("llama-3.1-8b", "Q8_0", 8_540_775_840, "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF"),
    ("llama-3.2-1b", "Q4_K_M", 807_694_464, "bartowski/Llama-3.2-1B-Instruct-GGUF@067b946c"),
    ("llama-3.2-3b", "Q4_K_M", 2_019_377_696, "bartowski/Llama-3.2-3B-Instruct-GGUF@5ab33fa9"),
    ("llama-3.3-70b", "Q4_K_M", 42_520_398_432, "unsloth/Llama-3.3-70B-Instruct-GGUF@8f14c5c5"),
    ("llama-3.3-70b", "Q5_K_M", 49_949_822_112, "bartowski/Llama-3.3-70B-Instruct-GGUF"),
    ("mistral-7b-v0.3", "Q4_K_M", 4_372_812_000, "bartowski/Mistral-7B-Instruct-v0.3-GGUF"),
    ("mistral-nemo-12b", "Q3_K_M", 6_083_093_632, "bartowski/Mistral-Nemo-Instruct-2407-GGUF"),
    ("mistral-nemo-12b", "Q4_K_M", 7_477_208_192, "bartowski/Mistral-Nemo-Instruct-2407-GGUF"),
    ("starcoder2-15b", "Q4_K_M", 9_860_188_000, "a quantised starcoder2-15b"),
    ("falcon3-10b", "Q4_K_M", 6_287_521_408, "a quantised Falcon3-10B-Instruct"),
    ("mistral-small-3.1-24b", "Q4_K_M", 14_333_915_264, "a quantised Mistral-Small-3.2-24B-Instruct-2506"),
    ("mixtral-8x7b", "Q4_K_M", 28_448_468_608, "mradermacher's i1 of Mixtral-8x7B-Instruct-v0.1"),
    ("qwen2.5-7b", "Q4_K_M", 4_683_074_240, "bartowski/Qwen2.5-7B-Instruct-GGUF"),
    ("qwen2.5-7b", "Q6_K", 6_254_199_488, "bartowski/Qwen2.5-7B-Instruct-GGUF"),
    ("qwen2.5-32b", "Q4_K_M", 19_851_336_576, "bartowski/Qwen2.5-32B-Instruct-GGUF"),
    ("qwen3-0.6b", "Q8_0", 639_446_688, "Qwen/Qwen3-0.6B-GGUF@23749fef"),
    ("qwen3-8b", "Q4_K_M", 5_027_783_488, "Qwen/Qwen3-8B-GGUF@7c41481"),
    ("qwen3-30b-a3b", "Q3_K_S", 13_292_468_800, "unsloth/Qwen3-30B-A3B-GGUF"),
    ("qwen3-30b-a3b", "Q4_K_M", 18_556_686_752, "unsloth/Qwen3-30B-A3B-Instruct-2507-GGUF"),
    ("qwen3-30b-a3b", "Q8_0", 32_483_932_576, "unsloth/Qwen3-30B-A3B-Instruct-2507-GGUF"),
    ("qwen3-30b-a3b", "BF16", 61_095_803_232, "unsloth/Qwen3-30B-A3B-Instruct-2507-GGUF"),
    ("granite-4.0-h-small", "Q4_K_M", 19_476_621_984, "ibm-granite/granite-4.0-h-small-GGUF"),
    ("gemma-2-9b", "Q4_K_M", 5_761_057_728, "bartowski/gemma-2-9b-it-GGUF"),
    ("gemma-3-12b", "Q4_K_M", 7_300_574_976, "ggml-org/gemma-3-12b-it-GGUF"),
    ("phi-3.5-mini", "Q4_K_M", 2_393_232_672, "bartowski/Phi-3.5-mini-instruct-GGUF"),
    ("phi-4", "Q4_K_M", 9_053_114_816, "bartowski/phi-4-GGUF"),
    ("phi-4", "Q4_K_S", 8_440_762_560, "microsoft/phi-4-gguf"),
    ("gpt-oss-20b", "MXFP4_MOE", 12_109_566_624, "ggml-org/gpt-oss-20b-GGUF"),
    ("gpt-oss-120b", "MXFP4_MOE", 63_387_346_208, "ggml-org/gpt-oss-120b-GGUF"),
)


@pytest.mark.parametrize(("model", "file_type", "size", "source"), FILES, ids=str)
def test_files_are_as_large_as_real_ones(model: str, file_type: str, size: int, source: str) -> None:
    assert gguf_file(load_card(model), file_type).bytes == pytest.approx(size, rel=0.005), source


def test_gguf_tensors_are_aligned() -> None:
    file = gguf_file(load_card("gpt2"), "Q4_K_M")
    assert file.bytes % 32 == 0
    assert file.bytes - file.header < sum(t.bytes for t in file.tensors) + 32 * (len(file.tensors) + 1)


@each(lambda: sampled([name for name in card_names() if load_card(name).family.checkpoint.gguf], 6))
def test_a_file_has_every_parameter_once(name: str) -> None:
    model = load_card(name)
    apart = ("vision", "projector", "audio")  # in mmproj
    inside = {one.name for one in parameters(model) if one.weight.group not in apart}
    built = {key: one for key, one in built_tensors(model).items() if key in inside}
    found: dict[str, int] = {}
    for tensor in gguf_file(model, "F16").tensors:
        elements = tensor.bytes // (4 if tensor.type == "F32" else 2)
        found[tensor.parameter] = found.get(tensor.parameter, 0) + elements
    extra = {key for key in found if not key or key.endswith("e_score_correction_bias")}
    assert {key: n for key, n in found.items() if key not in extra} == {key: one.elements for key, one in built.items()}


def test_a_table_of_rotary_factors_is_in_files_of_llama_3() -> None:
    assert "rope_freqs.weight" in {t.name for t in gguf_file(load_card("llama-3.1-8b"), "F16").tensors}
    assert "rope_freqs.weight" not in {t.name for t in gguf_file(load_card("llama-2-7b"), "F16").tensors}


def test_latent_attention_is_stored_by_head() -> None:
    model = load_card("deepseek-v2-lite")
    shapes = {t.name: t.shape for t in gguf_file(model, "F16").tensors}
    assert (shapes["blk.0.attn_k_b.weight"], shapes["blk.0.attn_v_b.weight"]) == ((16, 512, 128), (16, 128, 512))


def test_a_family_without_names_in_gguf_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnsupportedModelError, match=r"gemma4 in GGUF are not known yet; .*gemma"):
        gguf_file(load_card("gemma-4-31b"), "Q4_0")


@pytest.mark.parametrize("written", ["Q4_K_M", "q4_k_m", "gguf:Q4_K_M", " GGUF:q4-k-m ", "Q4_K"])
def test_a_type_of_file_is_known_however_written(written: str) -> None:
    assert file_type_of(written) == "Q4_K_M"


def test_unknown_file_types_are_refused() -> None:
    assert file_type_of("fp8") is None
    with pytest.raises(UnknownNameError, match=r"did you mean .*Q4_K_M"):
        file_type_of("gguf:Q4_K_XM")
    assert set(ALIASES.values()) <= set(FILE_TYPES)


# Metadata of small models of families whose files name their sizes differently from their configs.
SMALL = {"context_length": 128, "block_count": 3, "embedding_length": 64, "attention.head_count": 4}
WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": (
        "deepseek2",
        {
            "feed_forward_length": 176,
            "attention.head_count_kv": 1,
            "attention.key_length": 40,
            "attention.key_length_mla": 24,
            "attention.value_length_mla": 16,
            "attention.value_length": 32,
            "attention.q_lora_rank": 24,
            "attention.kv_lora_rank": 32,
            "rope.dimension_count": 8,
            "expert_count": 16,
            "expert_used_count": 4,
            "expert_shared_count": 2,
            "expert_gating_func": 1,
            "expert_feed_forward_length": 48,
            "leading_dense_block_count": 1,
        },
    ),
    "falcon": ("falcon", {"feed_forward_length": 256, "attention.head_count_kv": 1}),
    "glm4_moe": (
        "glm4moe",
        {
            "feed_forward_length": 176,
            "attention.head_count_kv": 2,
            "attention.key_length": 16,
            "expert_count": 8,
            "expert_used_count": 2,
            "expert_shared_count": 1,
            "block_count": 4,
            "expert_feed_forward_length": 48,
            "leading_dense_block_count": 1,
            "nextn_predict_layers": 1,
        },
    ),
    "gpt_oss": (
        "gpt-oss",
        {
            "attention.head_count_kv": 2,
            "attention.key_length": 16,
            "attention.sliding_window": 24,
            "expert_count": 8,
            "expert_used_count": 2,
            "expert_feed_forward_length": 176,
        },
    ),
    "qwen3_next": (
        "qwen3next",
        {
            "block_count": 4,
            "embedding_length": 96,
            "attention.head_count": 4,
            "attention.head_count_kv": 2,
            "attention.key_length": 32,
            "ssm.conv_kernel": 4,
            "ssm.state_size": 8,
            "ssm.group_count": 2,
            "ssm.time_step_rank": 32,
            "ssm.inner_size": 32 * 12,
            "full_attention_interval": 4,
            "expert_count": 16,
            "expert_used_count": 3,
            "expert_feed_forward_length": 40,
            "expert_shared_feed_forward_length": 56,
            "feed_forward_length": 176,
        },
    ),
}


WRITTEN["deepseek_v3"] = ("deepseek2", {**WRITTEN["deepseek_v2"][1], "expert_gating_func": 2})


@pytest.mark.parametrize("model_type", WRITTEN)
def test_a_file_that_llama_cpp_would_write_is_read_as_its_model(model_type: str, tmp_path: Path) -> None:
    """Its tensors are those of the model's file, and its metadata builds the same parameters."""
    architecture, more = WRITTEN[model_type]
    metadata = {"general.architecture": architecture}
    metadata |= {f"{architecture}.{key}": value for key, value in {**SMALL, **more}.items()}
    kept = {key: value for key, value in TINY[model_type].items() if key not in ("layer_types", "hidden_act")}
    made = gguf_file(ModelSpec({"model_type": model_type, **kept}), "F16").tensors
    tensors = [(t.name, t.type, t.shape) for t in made]
    if model_type == "glm4_moe":
        tensors.append(("blk.3.nextn.eh_proj.weight", "F16", (64, 128)))
        tensors.append(("blk.3.attn_q.weight", "F16", (64, 64)))
    path = write_gguf(tmp_path / "model.gguf", metadata, tensors)
    model = find_model(str(path))
    assert model.model_type == model_type
    assert estimate(RunSpec(model=str(path), method="lora")).parameters.total > 0
    assert sum(row.bytes for row in stored_weights(model)) == sum(t.bytes for t in made)


NUMBERS = st.integers(-3, 2**33) | st.booleans() | st.text(max_size=3)


@settings(max_examples=examples(60), deadline=None)
@given(st.sampled_from(sorted(WRITTEN)), st.data())
def test_any_sizes_that_a_file_says_are_a_model_or_one_line(model_type: str, data: st.DataObject) -> None:
    architecture, more = WRITTEN[model_type]
    said = {**SMALL, **more, "vocab_size": 300}
    said |= {key: data.draw(NUMBERS) for key in data.draw(st.lists(st.sampled_from(sorted(said)), max_size=3))}
    metadata = {"general.architecture": architecture, **{f"{architecture}.{key}": it for key, it in said.items()}}
    line = ""
    try:
        rows = stored_weights(ModelSpec(config_of(Gguf(metadata, ()), "x.gguf")), "none")
    except MemplanError as error:
        line, rows = str(error), ()
    assert line.isprintable()
    assert all(row.bytes > 0 for row in rows)


SIZES = Sizes("llama", 32, 0, 4, False, False, 32, False)


@settings(max_examples=examples(40), deadline=None)
@given(
    st.sampled_from(sorted(FILE_TYPES)),
    st.integers(1, 80),
    st.sampled_from((0, 8, 128)),
    st.integers(1, 16),
    st.sampled_from((32, 96, 256, 2880, 4096, 77)),
    st.booleans(),
)
def test_every_tensor_fits_whole_blocks(
    file_type: str, n: int, experts: int, ratio: int, columns: int, imatrix: bool
) -> None:
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm")
    tensors = [(f"blk.{i}.{name}.weight", (64, columns)) for i in range(n) for name in names]
    sizes = SIZES._replace(layers=n, experts=experts, ratio=ratio, values=n, imatrix=imatrix)
    for name, shape, kind in types_of([("output.weight", (100, columns)), *tensors], file_type, sizes):
        assert shape[-1] % BLOCKS[kind][0] == 0
        assert kind == "F32" or "norm" not in name


def test_more_bits_are_larger_files() -> None:
    model = ModelSpec(
        {
            "model_type": "llama",
            "hidden_size": 512,
            "num_hidden_layers": 16,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "intermediate_size": 1024,
            "vocab_size": 1000,
        }
    )
    order = (
        "IQ1_S",
        "IQ2_XXS",
        "Q2_K",
        "Q3_K_S",
        "Q3_K_M",
        "Q3_K_L",
        "Q4_K_S",
        "Q4_K_M",
        "Q5_K_M",
        "Q6_K",
        "Q8_0",
        "F16",
    )
    sizes = [gguf_file(model, file_type).bytes for file_type in order]
    assert sizes == sorted(sizes)
    assert gguf_file(model, "IQ2_XXS") == gguf_file(model, "IQ2_XXS", imatrix="IQ2_XXS" in NEEDS_IMATRIX)
    assert sizes[-1] < GIB
