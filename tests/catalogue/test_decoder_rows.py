"""Rows of `Decoder`: what a column changes in the stack that it builds."""

from __future__ import annotations

from typing import Any

from memplan.catalogue.decoder.decoder import Decoder, decoder
from memplan.catalogue.decoder.rotation import rope_and_norm
from memplan.catalogue.decoder.scaling import scaled_branches
from memplan.catalogue.families.dense import BUILDERS, LLAMA
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Op, Stack
from memplan.models.model import ModelSpec
from tests.tiny import TINY

FLASH = Wiring("flash", "efficient")


def model(**more: Any) -> ModelSpec:
    return ModelSpec({"model_type": "llama", **TINY["llama"], **more})


def layer(stack: Stack) -> tuple[Op, ...]:
    return stack.runs[0].blocks[0].ops


def weights(row: Decoder, **more: Any) -> set[str]:
    return {w.name for op in layer(decoder(model(**more), FLASH, row)) for w in op.weights}


def test_a_column_in_quotes_is_a_key_of_the_config() -> None:
    plain, biased = weights(LLAMA), weights(LLAMA, attention_bias=True)
    assert biased - plain == {f"self_attn.{t}_proj.bias" for t in "qkvo"}
    assert weights(LLAMA, mlp_bias=True) - plain == {f"mlp.{t}_proj.bias" for t in ("gate", "up", "down")}


def test_biases_may_be_of_one_projection() -> None:
    assert weights(Decoder(bias=("k",))) - weights(Decoder()) == {"self_attn.k_proj.bias"}


def test_a_made_up_family_is_a_row() -> None:
    """Biases on k alone, a norm after the rotation, and scaled branches."""
    row = Decoder(bias=("k",), rotate=rope_and_norm, branch=scaled_branches)
    names = [op.name for op in layer(decoder(model(), FLASH, row))]
    norm, attention = names.index("self_attn.key_layernorm.weight"), names.index("self_attn.attention")
    assert names.index("self_attn.rope_k.add") < norm < attention
    assert names.index("attention_branch.residual_multiplier") < names.index("residual_1")
    assert names.index("mlp_branch.residual_multiplier") < names.index("residual_2")


def test_norms_are_named_in_the_order_of_the_block() -> None:
    names = [op.name for op in layer(decoder(model(), FLASH, Decoder(norms=("a", "b", "", "d"))))]
    order = ["a.weight", "self_attn.q_proj", "b.weight", "residual_1", "mlp.gate_proj", "d.weight", "residual_2"]
    assert [name for name in names if name in {*order, "c.weight"}] == order


def test_parallel_branches_read_one_norm() -> None:
    operations = layer(decoder(model(), FLASH, Decoder(parallel=True)))
    assert {op.reads[0] for op in operations if op.name in ("self_attn.q_proj", "mlp.gate_proj")} == {"n1"}


def test_rows_are_listed_alphabetically() -> None:
    assert list(BUILDERS) == sorted(BUILDERS)
