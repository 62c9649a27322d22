"""State spaces and linear attention: configs, refusals of peft and bitsandbytes, and activations of a scan."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from memplan import Estimate, RunSpec, estimate
from memplan.core.arithmetic import ONE_RUN
from memplan.core.errors import ConfigError, SpecError
from memplan.models.cards import load_card
from memplan.models.model import ModelSpec
from memplan.program.axes import chunked
from tests.tiny import TINY

SCANS = ("mamba_ssm", "causal_conv1d")


def config(model_type: str, **changed: Any) -> dict[str, Any]:
    return {"model_type": model_type, **TINY[model_type], **changed}


def run(model_type: str, **fields: Any) -> RunSpec:
    return RunSpec(model={"config": config(model_type)}, batch={"sequence": 64}, **fields)


@pytest.mark.parametrize(
    ("card", "mixers", "ffns"),
    [
        ("granite-4.0-h-tiny", {"mamba": 36, "attention": 4}, {"experts": 40}),
        ("granite-4.0-h-micro", {"mamba": 36, "attention": 4}, {"dense": 40}),
        ("jamba-v0.1", {"mamba": 28, "attention": 4}, {"experts": 16, "dense": 16}),
        ("mamba-2.8b", {"mamba": 64}, {"none": 64}),
        ("nemotron-3-nano-30b-a3b", {"mamba": 23, "attention": 6, "none": 23}, {"none": 29, "experts": 23}),
        ("qwen3-next-80b-a3b", {"linear_attention": 36, "attention": 12}, {"experts": 48}),
        ("qwen3.5-4b-text", {"linear_attention": 24, "attention": 8}, {"dense": 32}),
    ],
)
def test_layer_types_follow_the_configs_list(card: str, mixers: dict[str, int], ffns: dict[str, int]) -> None:
    layers = load_card(card).layers
    assert Counter(layer.mixer for layer in layers) == mixers
    assert Counter(layer.ffn for layer in layers) == ffns


def test_the_length_of_nemotron_h_s_list_is_its_number_of_layers() -> None:
    stated = config("nemotron_h")
    silent = {key: value for key, value in stated.items() if key != "num_hidden_layers"}
    letters = dict(zip("ME*-", ("mamba", "moe", "attention", "mlp"), strict=True))
    words = [letters[letter] for letter in silent.pop("hybrid_override_pattern")]
    model = ModelSpec({**silent, "layers_block_type": words})
    assert model.num_hidden_layers == len(words) == 6
    assert model.layers == ModelSpec(stated).layers


KINDS = {"layer_types": ["linear_attention"] * 129, "mlp_layer_types": ["dense"] * 129}


@pytest.mark.parametrize(
    ("model_type", "changed", "field"),
    [
        ("granitemoehybrid", {"layer_types": ["mamba", "mamba", "recurrent", "mamba"]}, "layer_types"),
        ("granitemoehybrid", {"layer_types": ["mamba"]}, "layer_types"),
        ("granitemoehybrid", {"mamba_d_head": 24}, "mamba_n_heads"),
        ("mamba2", {"n_groups": 3}, "n_groups"),
        ("nemotron_h", {"hybrid_override_pattern": "MEX"}, "hybrid_override_pattern"),
        ("nemotron_h", {"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ("qwen3_5_text", {"linear_num_key_heads": 3}, "linear_num_key_heads"),
        ("qwen3_5_text", {"layer_types": "linear_attention"}, "layer_types"),
        ("kimi_linear", {"attn_res_block_size": 0}, "attn_res_block_size"),
        ("kimi_linear", {"attn_res_block_size": 1, "num_hidden_layers": 129, **KINDS}, "attn_res_block_size"),
        (
            "kimi_linear",
            {"layer_types": None, "linear_attn_config": {"full_attn_layers": [4], "kda_layers": [1, 2]}},
            "linear_attn_config",
        ),
        ("qwen3_next", {"mlp_only_layers": 3}, "mlp_only_layers"),
        ("mamba", {"state_size": 0}, "state_size"),
    ],
)
def test_a_wrong_value_is_refused_in_a_line_that_names_its_key(
    model_type: str, changed: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        ModelSpec(config(model_type, **changed)).axes()
    assert caught.value.field == field


@pytest.mark.parametrize("model_type", ["falcon_mamba", "mamba", "mamba2", "nemotron_h"])
def test_targets_that_peft_refuses_are_refused(model_type: str) -> None:
    for targets in ("all-linear", ["in_proj", "out_proj"], ["mixer.out_proj"]):
        with pytest.raises(SpecError, match=r"peft cannot adapt out_proj in .*; choose from in_proj"):
            estimate(run(model_type, method={"kind": "lora", "targets": targets}))
    assert estimate(run(model_type, method={"kind": "lora", "targets": ["in_proj"]})).parameters.trainable > 0


def test_mamba_layers_that_read_a_weight_directly_are_unquantised() -> None:
    with pytest.raises(SpecError, match="dt_proj") as caught:
        estimate(run("mamba", method={"kind": "qlora", "targets": ["in_proj"]}))
    assert caught.value.field == "method.quantization.skip"
    skipped = {"kind": "qlora", "targets": ["in_proj"], "quantization": {"skip": ["lm_head", "dt_proj"]}}
    estimate(run("mamba", method=skipped))
    estimate(run("falcon_mamba", method={"kind": "qlora", "targets": ["in_proj"]}))


def test_adapters_on_layers_that_are_never_called_exist_without_gradients() -> None:
    def answer(*targets: str, kind: str = "lora") -> Estimate:
        return estimate(run("jamba", method={"kind": kind, "rank": 4, "targets": targets}))

    made, mambas = config("jamba"), 3
    into, out = made["mamba_dt_rank"], 2 * made["hidden_size"]
    adapters = mambas * 4 * (into + out)
    bytes_ = mambas * sum((4 * 4 * width + 511) // 512 * 512 for width in (into, out))
    without, with_unused = answer("in_proj"), answer("in_proj", "dt_proj")
    assert with_unused.parameters.trainable - without.parameters.trainable == adapters
    assert with_unused.categories["optstate"] == without.categories["optstate"]
    loaded = [next(phase.peak for phase in a.phases if phase.phase == "load") for a in (without, with_unused)]
    assert loaded[1] - loaded[0] == bytes_
    called = answer("in_proj", "dt_proj", kind="qlora").categories["optstate"]
    steps = 2 * mambas * 512  # one number per matrix
    assert called - answer("in_proj", kind="qlora").categories["optstate"] == 2 * bytes_ + steps
    with pytest.raises(SpecError, match="dt_proj") as caught:
        answer("dt_proj")
    assert caught.value.field == "method.targets"


@pytest.mark.parametrize("model_type", ["jamba", "mamba2", "qwen3_next", "llama"])
def test_a_note_says_that_fused_kernels_need_less(model_type: str) -> None:
    notes = [note for note in estimate(run(model_type)).notes if "causal-conv1d" in note]
    package = {"jamba": "mamba-ssm", "mamba2": "mamba-ssm", "qwen3_next": "flash-linear-attention"}.get(model_type)
    assert [package in note for note in notes if package] == [True] * (package is not None)


def test_no_note_says_so_if_the_packages_are_installed() -> None:
    packages = ("fla", "causal_conv1d")
    answer = estimate(run("qwen3_next", kernels={"packages": packages}))
    assert not [note for note in answer.notes if "causal-conv1d" in note]
    assert answer.run.model_dump(mode="json")["kernels"]["packages"] == list(packages)
    assert "packages" not in estimate(run("qwen3_next")).run.model_dump(mode="json")["kernels"]


def test_adapters_of_a_projection_that_mamba_ssm_reads_itself_never_train() -> None:
    method = {"kind": "lora", "targets": ["in_proj", "out_proj"]}
    torch_code, fused = (estimate(run("bamba", method=method, kernels={"packages": p})) for p in ((), SCANS))
    assert torch_code.parameters == fused.parameters
    assert fused.categories["optstate"] < torch_code.categories["optstate"]


def test_jamba_calls_only_the_scan_of_mamba_ssm() -> None:
    kernels = {"packages": SCANS}
    for fields in ({"method": "qlora"}, {"also": {"evaluation": {}}}):
        estimate(run("jamba", kernels=kernels, **fields))
        with pytest.raises(SpecError, match=r"quantised|evaluation"):
            estimate(run("falcon_mamba", kernels=kernels, **fields))


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("llama", {}, "kernels of fla are not counted for llama; leave it out"),
        ("qwen3_next", {"kernels": {"packages": ("mamba_ssm",)}}, "supported: fla, causal_conv1d"),
        ("qwen3_next", {"task": "generate"}, "none with task generate"),
        (
            "mamba2",
            {"kernels": {"packages": ("mamba_ssm",)}},
            "mamba_ssm is counted together with causal_conv1d; name both",
        ),
        ("bamba", {"kernels": {"packages": SCANS}, "method": "qlora"}, "fails quantised"),
        ("bamba", {"kernels": {"packages": SCANS}, "precision": "amp"}, "autocast over fp32 weights"),
        ("jamba", {"kernels": {"packages": SCANS}, "precision": "amp"}, "autocast over fp32 weights"),
        (
            "mamba",
            {"model": {"config": config("mamba", use_bias=True)}, "kernels": {"packages": SCANS}},
            "bias of out_proj",
        ),
        ("bamba", {"kernels": {"packages": SCANS}, "also": {"evaluation": {}}}, "mamba_ssm and evaluation"),
        ("qwen3_next", {"batch": {"packing": "padding_free"}}, "packed batches"),
    ],
)
def test_packages_without_kernels_for_the_run_are_refused(model_type: str, fields: Any, message: str) -> None:
    refused = RunSpec(**{"model": {"config": config(model_type)}, "kernels": {"packages": ("fla",)}, **fields})
    with pytest.raises(SpecError, match=message) as caught:
        estimate(refused)
    assert caught.value.field == "kernels.packages"


@pytest.mark.parametrize("loss", ["hf", "chunked", "chunked_lm_head", "fused"])
@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "nemotron_h", "qwen3_5_text"])
def test_every_loss_finds_the_head(model_type: str, loss: str) -> None:
    tokens = 4096  # more than one chunk
    made = config(model_type, vocab_size=50_000, max_position_embeddings=tokens)
    kernels = {"loss": loss, "checkpointing": "full"}
    answer = estimate(RunSpec(model={"config": made}, batch={"sequence": tokens}, kernels=kernels))
    logits = tokens * 50_000 * 4
    most = max(phase.peak for phase in answer.phases if phase.phase == "loss")
    assert (most < logits) == (loss == "fused")


def test_sequences_are_counted_in_whole_chunks() -> None:
    of = {"chunk": 64, "kernel": 4}
    assert chunked(of, 128, ONE_RUN) == {
        "s_conv": 128 + 3,
        "earlier": 126,
        "second_last": 1,
        "chunks": 2,
        "borders": 3,
        "later": 1,
        "s_chunks": 128,
        "s_later": 64,
        "s_one": 0,
        "s_two": 128,
        "slice": 64,
        "s_whole": 128,
        "s_whole_two": 128,
        "s_padded": 0,
        "copied": 64,
        "s_laid": 64,
    }
    assert chunked(of, 129, ONE_RUN) == {
        "s_conv": 129 + 3,
        "earlier": 127,
        "second_last": 1,
        "chunks": 3,
        "borders": 4,
        "later": 2,
        "s_chunks": 192,
        "s_later": 128,
        "s_one": 0,
        "s_two": 192,
        "slice": 64,
        "s_whole": 0,
        "s_whole_two": 0,
        "s_padded": 192,
        "copied": 0,
        "s_laid": 192,
    }
    alone = chunked(of, 50, ONE_RUN)
    assert {name: alone[name] for name in ("later", "s_later", "s_one", "s_two", "slice", "s_laid")} == {
        "later": 0,
        "s_later": 0,
        "s_one": 64,
        "s_two": 0,
        "slice": 0,
        "s_laid": 0,
    }


def test_mamba_keeps_the_states_of_every_token() -> None:
    """Without checkpointing each token adds, in every layer, the discretised A and B and its state in fp32, and the
    state in bf16: 14 bytes per state number and channel. Everything else is far smaller."""
    made = config("mamba", state_size=64)
    channels, layers, tokens = 2 * made["hidden_size"], made["num_hidden_layers"], 1024

    def peak(sequence: int) -> int:
        kernels = {"checkpointing": "none"}
        answer = estimate(RunSpec(model={"config": made}, batch={"sequence": sequence}, kernels=kernels))
        return max(phase.peak for phase in answer.phases)

    states = 14 * channels * 64 * layers
    assert states < (peak(2 * tokens) - peak(tokens)) / tokens < 1.6 * states
