"""Kimi K3, which transformers has no class for: its stack against a torch reference, its parameters and its notes."""

from __future__ import annotations

from typing import Any

import pytest

from memplan import RunSpec, estimate, load_card
from memplan.catalogue import build
from memplan.catalogue.families.kimi_k3 import DELTA_RULE
from memplan.catalogue.kernels import losses
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.methods import methods
from memplan.core.arithmetic import ONE_RUN
from memplan.core.errors import ConfigError, SpecError
from memplan.engine.step import ExecutionOptions, lower
from memplan.models.model import ModelSpec
from memplan.program.axes import chunked
from tests.cases import Lazy
from tests.catalogue.test_autograd import in_bytes
from tests.golden.ask_libraries import kimi_k3_saves
from tests.models.test_cards import read_card

torch: Any = Lazy("torch")
pytestmark = pytest.mark.torch
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
OWN: dict[str, Any] = {
    "hidden_act": "situ",
    "activation_situ_beta": 4.0,
    "activation_situ_linear_beta": 25.0,
    "attn_res_block_size": 2,
    "latent_moe_use_norm": True,
    "mla_use_output_gate": True,
    "routed_expert_hidden_size": 32,
}
DELTA = {"gate_lower_bound": -5.0, "use_full_rank_gate": True, "head_dim": 32, "num_heads": 16}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 176,
    "vocab_size": 300,
    "pad_token_id": 0,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse", "sparse"],
    "linear_head_dim": 32,
    "linear_num_heads": 16,
    "moe_intermediate_size": 48,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
ATTEND = ["full_attention"] * 5
MIXED = ["linear_attention", "linear_attention", "full_attention", "linear_attention", "full_attention"]


def config(kinds: list[str], **changed: Any) -> dict[str, Any]:
    return {"model_type": "kimi_linear", **SIZES, **OWN, "layer_types": kinds, "linear_attn_config": DELTA, **changed}


def kept(kinds: list[str], dtype: str, batch: int, sequence: int) -> int:
    model = ModelSpec(config(kinds))
    stack = build(model, Wiring("eager", "eager"))
    stack = losses.attach(methods.apply(stack, methods.Recipe("full", dtype, dtype)), "hf")
    axes = {**model.axes(), "b": batch, "s": sequence, "targets": batch * sequence, "s1": sequence + 1}
    axes |= {"padded_labels": batch * (sequence + 1), "several": batch}
    axes |= chunked(axes, sequence, ONE_RUN)
    return in_bytes(lower(stack, {run.times: axes[run.times] for run in stack.runs}, labelled=True), axes)


def saved(kinds: list[str], dtype: str, batch: int, sequence: int) -> int:
    return kimi_k3_saves(config(kinds), DTYPES[dtype], batch, sequence)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_that_attend_keep_what_autograd_saves(dtype: str) -> None:
    """Residuals, activations, experts and the gate of attention, to the byte."""
    assert kept(ATTEND, dtype, 2, 40) == saved(ATTEND, dtype, 2, 40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sequence", [40, 150])
def test_delta_rule_layers_keep_what_autograd_saves_except_for_the_last_state(sequence: int, dtype: str) -> None:
    """A hook keeps the graph of the scan's last state: its decay and, with several chunks, the state it decays."""
    layers, heads, width = 3, SIZES["linear_num_heads"], SIZES["linear_head_dim"]
    state = width + (2 * width * width if sequence > 64 else 0)
    dropped = 4 * 2 * heads * state
    assert saved(MIXED, dtype, 2, sequence) - kept(MIXED, dtype, 2, sequence) == layers * dropped


def test_earlier_sums_are_freed_when_a_layer_starts_the_next() -> None:
    """Without checkpointing the model holds the input of the layer that starts a sum, and the layer its result.

    A checkpointed layer keeps its input.
    """
    model = ModelSpec(config(ATTEND))
    made = losses.attach(
        methods.apply(build(model, Wiring("eager", "eager")), methods.Recipe("full", "bf16", "bf16")), "hf"
    )
    depth = {run.times: run.number for run in model.runs}
    alive: dict[bool, list[int]] = {}
    for checkpoint in (False, True):
        low = lower(made, depth, ExecutionOptions(checkpoint=checkpoint), labelled=True)
        last = next(m for m in low.moments if m.where.startswith("model.layers.4.mlp."))
        of = [key for key, size in enumerate(low.sizes) if size[5] in ("sums.1", "sums.2", "sums.3")]
        alive[checkpoint] = [last.counts.get(key, 0) for key in of]
    assert alive == {False: [0, 1, 1], True: [1, 1, 1]}


def test_the_parameters_are_those_of_the_reference() -> None:
    vision = {
        "vt_hidden_size": 48,
        "vt_intermediate_size": 80,
        "qkv_hidden_size": 96,
        "vt_num_hidden_layers": 3,
        "mm_hidden_size": 48,
        "text_hidden_size": 64,
        "patch_size": 14,
        "init_pos_emb_height": 6,
        "init_pos_emb_width": 7,
        "init_pos_emb_time": 4,
        **dict.fromkeys(("attn_bias", "linear_bias", "patch_embed_proj_bias"), False),
    }
    whole = {"model_type": "kimi_k3", "text_config": config(MIXED), "vision_config": vision}
    from tests.kimi_k3 import Whole

    with torch.device("meta"):
        expected = sum(p.numel() for p in Whole({**whole, "text_config": config(MIXED)}).parameters())
    made = estimate(RunSpec.model_validate({"model": {"config": whole}, "batch": {"sequence": 64}}))
    assert made.parameters.total == expected


def test_the_card_leaves_two_kinds_of_numbers_to_the_published_total() -> None:
    card = read_card("kimi-k3")
    routers, padding = 92 * 896, 69 * (128 - 96)
    assert card["published"] - card["parameters"] == routers + padding
    layers = load_card("kimi-k3").layers
    assert [layer.mixer for layer in layers].count("linear_attention") == 69
    assert [i for i, layer in enumerate(layers) if layer.opens_sum] == [0, 12, 24, 36, 48, 60, 72, 84]
    assert (layers[11].choosable_sums, layers[12].choosable_sums, layers[92].choosable_sums) == (1, 1, 8)


def test_kimi_k3_answers_for_every_method_and_says_what_is_assumed() -> None:
    for method in ("full", "qlora", "lora"):
        answer = estimate(RunSpec(model="kimi-k3", method=method, batch={"sequence": 256}))
        assert any(note.startswith("kimi_k3: ") and "we assume" in note for note in answer.notes)
        assert any("float4" in note and "dequantised" in note for note in answer.notes)
        named = "self_attention_res_proj, mlp_res_proj, output_attn_res_proj"
        assert any(named in note and "multiplies by them" in note for note in answer.notes) == (method == "qlora")
    assert any(line.source.startswith(f"assumed: {DELTA_RULE}") for line in answer.ledger if line.basis == "assumed")


def test_adapters_on_unused_layers_exist_without_gradients() -> None:
    def trained(*targets: str) -> int:
        run = {"model": {"config": config(ATTEND)}, "method": {"kind": "lora", "rank": 4, "targets": targets}}
        return estimate(RunSpec.model_validate({**run, "batch": {"sequence": 64}})).parameters.trainable

    residual_projections = trained("q_a_proj", "mlp_res_proj") - trained("q_a_proj")
    assert residual_projections == SIZES["num_hidden_layers"] * 4 * (SIZES["hidden_size"] + 1)


def test_images_and_other_projectors_are_refused_in_a_line() -> None:
    with pytest.raises(SpecError, match="images are not supported yet for kimi_k3"):
        estimate(RunSpec(model="kimi-k3", batch={"images": 1}))
    card = read_card("kimi-k3")["config"]
    with pytest.raises(ConfigError, match="mm_projector_type of Kimi K3 must be patchmergerv2") as caught:
        ModelSpec({**card, "vision_config": {**card["vision_config"], "mm_projector_type": "mlp"}}).axes()
    assert caught.value.field == "mm_projector_type"
