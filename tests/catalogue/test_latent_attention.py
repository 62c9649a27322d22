"""Latent attention: the kernels for its widths, required config keys, and weights without gradients."""

from __future__ import annotations

from typing import Any

import pytest

from memplan import RunSpec, estimate
from memplan.catalogue.attention.efficient_workspace import efficient_workspace_bytes
from memplan.core.arithmetic import ONE_RUN
from memplan.core.errors import ConfigError
from memplan.models.model import ModelSpec
from tests.tiny import TINY


def config(model_type: str, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, **TINY[model_type], **more}


def run(model_type: str, given: dict[str, Any] | None = None, **fields: Any) -> RunSpec:
    model = {"config": config(model_type, **(given or {}))}
    return RunSpec.model_validate({"model": model, "batch": {"sequence": 128, "micro": 2}, **fields})


@pytest.mark.parametrize(
    ("model_type", "widths"), [("deepseek_v3", (24, 16)), ("glm4_moe_lite", (24, 24)), ("minicpm3", (24, 16))]
)
def test_a_head_has_a_width_for_keys_and_one_for_values(model_type: str, widths: tuple[int, int]) -> None:
    model = ModelSpec(config(model_type))
    assert model.head_widths == widths
    assert model.rotary_width == 8


def test_flash_attention_needs_values_as_wide_as_keys() -> None:
    def peak(values: int, attention: str) -> int:
        given, kernels = {"v_head_dim": values}, {"attention": attention}
        return estimate(run("deepseek_v3", given, kernels=kernels)).bytes.allocated

    assert peak(16, "sdpa") == peak(16, "sdpa_efficient")
    assert peak(24, "sdpa") != peak(24, "sdpa_efficient")


def test_the_efficient_kernels_workspace_counts_both_widths() -> None:
    # 256 rows in 4 of 64, keys 192 wide in 3 tiles of 64: 4 x 3 x (64 x 64 x 4 + 16) bytes, and per split of the keys
    # (4 of 64 columns, 200 // 8 of them at most) gradients in fp32 of 192 and 128 columns
    own, gradients = 4 * 3 * (64 * 64 * 4 + 16), 4 * 4 * 256 * (192 + 128)
    assert efficient_workspace_bytes(256, (192, 128), 8, True, True, ONE_RUN) == own + gradients


def test_an_indexers_weights_count_as_trainable_and_have_no_states() -> None:
    plain, indexed = (
        estimate(run(t, task="train", optimizer={"name": "adamw_torch"})) for t in ("deepseek_v3", "deepseek_v32")
    )
    more = indexed.parameters.trainable - plain.parameters.trainable
    # 16 heads of 24 from 24, one key of 24 and 16 weights from 64, and a LayerNorm, in each of three layers
    assert more == 3 * (16 * 24 * 24 + 24 * 64 + 16 * 64 + 2 * 24)
    assert indexed.categories["optstate"] == plain.categories["optstate"]


def test_a_layer_that_shares_its_keys_has_no_indexer() -> None:
    def total(*kinds: str) -> int:
        return estimate(run("glm_moe_dsa", {"indexer_types": list(kinds)})).parameters.total

    assert total("full", "full", "full") - total("full", "shared", "full") == 16 * 24 * 24 + 24 * 64 + 16 * 64 + 2 * 24


@pytest.mark.parametrize(
    ("model_type", "given", "message"),
    [
        ("deepseek_v3", {"kv_lora_rank": None}, "no kv_lora_rank"),
        ("deepseek_v3", {"qk_nope_head_dim": 0}, "qk_nope_head_dim must be a whole number from 1"),
        ("deepseek_v3", {"num_experts_per_tok": 17}, "num_experts_per_tok 17 is more than the 16 of n_routed_experts"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, "mlp_layer_types must be a list of 3 words, dense or sparse"),
        ("glm_moe_dsa", {"indexer_types": ["shared"] * 3}, "indexer_types must be a list of 3 words, full or shared"),
    ],
)
def test_an_invalid_config_names_its_key(model_type: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelSpec(config(model_type, **given)).axes()
