"""Formulas other people published."""

from __future__ import annotations

import pytest

from memplan import RunSpec, estimate
from memplan.catalogue import methods, ops
from memplan.engine.step import lower
from memplan.engine.walk import alive, size
from memplan.ir import Block, Op, Run, Stack, Tensor, Weight


def test_a_full_step_of_mistral_7b_takes_ten_bytes_a_parameter_at_the_optimizer() -> None:
    """Weights 2, gradients 2, two bf16 moments 4, and the list of new parameters foreach makes 2: published by
    foundation-model-stack/fms-acceleration as 72,434,837,504 bytes on an A100."""
    run = RunSpec(
        model="mistral-7b-v0.1",
        optimizer="adamw_torch",
        batch={"micro": 4, "sequence": 4096},
        kernels={"attention": "flash_attention_2"},
        gpu="a100-80gb",
    )
    answer = estimate(run)
    parameters = 7_241_732_096
    workspaces, rotary = 2 * 8_519_680, 2 * 512
    assert answer.peak.phase == "step"
    assert answer.bytes.allocated == (2 + 2 + 4 + 2) * parameters + workspaces + rotary
    assert abs(answer.bytes.allocated / 72_434_837_504 - 1) < 0.0001


def korthikanti_layer() -> Block:
    """One layer of "Reducing Activation Recomputation in Large Transformer Models" (arXiv:2205.05198), section 4.1."""
    heads = "b a s d"
    return Block(
        "layers",
        (
            ops.layer_norm("ln_1", "x", "n1", "b s h", "h"),
            ops.linear("q", "n1", "q", "h", "h", "attention"),
            ops.linear("k", "n1", "k", "h", "h", "attention"),
            ops.linear("v", "n1", "v", "h", "h", "attention"),
            ops.matmul("scores", "q", "k", "scores", "b a s s"),
            *ops.softmax("softmax", "scores", "probs", "b a s s"),
            ops.dropout("attention_dropout", "probs", "dropped", "b a s s"),
            ops.matmul("product", "dropped", "v", "o", heads),
            ops.linear("dense", "o", "ao", "h", "h", "attention"),
            ops.dropout("dropout_1", "ao", "ad", "b s h"),
            ops.add("residual_1", "x", "ad", "x1", "b s h"),
            ops.layer_norm("ln_2", "x1", "n2", "b s h", "h"),
            ops.linear("up", "n2", "u", "h4", "h", "mlp"),
            ops.activation("gelu", "u", "g", "b s h4"),
            ops.linear("down", "g", "d", "h", "h4", "mlp"),
            ops.dropout("dropout_2", "d", "dd", "b s h"),
            ops.add("residual_2", "x1", "dd", "y", "b s h"),
        ),
    )


@pytest.mark.parametrize(("b", "s", "h", "a"), [(1, 1024, 1024, 16), (4, 2048, 6144, 64)])
def test_a_megatron_layer_keeps_34_sbh_and_5_a_s_squared_b(b: int, s: int, h: int, a: int) -> None:
    axes = {"b": b, "s": s, "h": h, "h4": 4 * h, "a": a, "d": h // a, "L": 24}
    table = Weight("embed.weight", "h h", "embedding", "bf16")
    stack = Stack(
        (Op("embed", (), (Tensor("embeds", "b s h", "bf16"),), (table,)),),
        (Run((korthikanti_layer(),), "L"),),
        (),
        (Op("loss", ("x",), (Tensor("loss"),)),),
    )
    stack = methods.reweigh(stack, lambda w: w._replace(dtype="bf16"))
    low = lower(stack, {"L": axes["L"]})

    def kept(layers: int) -> int:
        numbers = {**axes, "L": layers}
        counts = alive(low.kept, low.runs, numbers)
        return sum(n * size(low.sizes[key][0], low.sizes[key][1], numbers)[1] for key, n in counts.items())

    statistics = 2 * 2 * 4 * b * s  # the paper leaves out the two fp32 numbers a row that each of its LayerNorms keeps
    assert kept(25) - kept(24) == 34 * s * b * h + 5 * a * s * s * b + statistics
