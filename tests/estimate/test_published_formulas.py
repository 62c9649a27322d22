"""Published formulas."""

from __future__ import annotations

import pytest

from memplan import RunSpec, estimate
from memplan.catalogue.attention.flash_attention import flash
from memplan.catalogue.degrees import Degrees
from memplan.catalogue.kernels import ops
from memplan.catalogue.methods import methods
from memplan.catalogue.parallelism import megatron_parallel
from memplan.core.ir import Block, Op, Run, Stack, Tensor, Weight
from memplan.engine.step import lower
from memplan.engine.walk import alive, size


def test_full_training_of_mistral_7b_peaks_at_ten_bytes_per_parameter() -> None:
    """Weights 2, gradients 2, two bf16 moments 4, and foreach's list of new parameters 2: published by
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


def korthikanti_layer(recomputed: bool = False) -> Block:
    """One layer of "Reducing Activation Recomputation in Large Transformer Models" (arXiv:2205.05198), section 4.1.

    With `recomputed` the attention's core keeps only its inputs, like flash attention.
    """
    heads, pairs = "b s a d", "b a s s"
    core = (
        ops.matmul("scores", "q", "k", "scores", pairs),
        *ops.softmax("softmax", "scores", "probs", pairs),
        ops.dropout("attention_dropout", "probs", "dropped", pairs),
        ops.matmul("product", "dropped", "v", "o", heads),
    )
    return Block(
        "layers",
        (
            ops.layer_norm("ln_1", "x", "n1", "b s h", "h"),
            ops.linear("q", "n1", "q", "a d", "h", "attention"),
            ops.linear("k", "n1", "k", "a d", "h", "attention"),
            ops.linear("v", "n1", "v", "a d", "h", "attention"),
            *((flash("core", "q", "k", "v", "o", False),) if recomputed else core),
            ops.linear("dense", "o", "ao", "h", "a d", "attention"),
            ops.dropout("dropout_1", "ao", "ad", "b s h"),
            ops.add("residual_1", "x", "ad", "x1", "b s h"),
            ops.layer_norm("ln_2", "x1", "n2", "b s h", "h"),
            ops.linear("up", "n2", "u", "f", "h", "mlp"),
            ops.activation("gelu", "u", "g", "b s f"),
            ops.linear("down", "g", "d", "h", "f", "mlp"),
            ops.dropout("dropout_2", "d", "dd", "b s h"),
            ops.add("residual_2", "x1", "dd", "y", "b s h"),
        ),
    )


def kept_by_a_layer(
    b: int, s: int, h: int, a: int, t: int = 1, tokens_divided: bool = False, recomputed: bool = False
) -> int:
    """Return the bytes that one more layer keeps from forward to backward on one of `t` ranks."""
    axes = {"b": b, "s": s, "s_tp": s // t, "s128": s, "d32": h // a, "h": h, "f": 4 * h // t, "a": a // t, "d": h // a}
    table = Weight("embed.weight", "h h", "embedding", "bf16")
    stack = Stack(
        (Op("embed", (), (Tensor("embeds", "b s h", "bf16"),), (table,)),),
        (Run((korthikanti_layer(recomputed),), "L"),),
        (),
        (Op("loss", ("x",), (Tensor("loss"),)),),
    )
    if t > 1:
        degrees = Degrees(tp=t, sequence_parallel=tokens_divided, style="megatron")
        stack = megatron_parallel.divide(stack, ("q", "k", "v", "up"), ("dense", "down"), degrees)
    stack = methods.rewrite_weights(stack, lambda w: w._replace(dtype="bf16"))
    low = lower(stack, {"L": 24})

    def kept(layers: int) -> int:
        numbers = {**axes, "L": layers}
        counts = alive(low.kept, low.runs, numbers)
        return sum(n * size(low.sizes[key][0], low.sizes[key][1], numbers)[1] for key, n in counts.items())

    return kept(25) - kept(24)


KORTHIKANTI = [(1, 1024, 1024, 16), (4, 2048, 6144, 64)]


def statistics(b: int, s: int) -> int:
    """Return the bytes that the paper leaves out: two fp32 numbers per row of each LayerNorm."""
    return 2 * 2 * 4 * b * s


@pytest.mark.parametrize(("b", "s", "h", "a"), KORTHIKANTI)
def test_a_megatron_layer_keeps_34_sbh_and_5_a_s_squared_b(b: int, s: int, h: int, a: int) -> None:
    """Equation 1: sbh (34 + 5as/h)."""
    assert kept_by_a_layer(b, s, h, a) == 34 * s * b * h + 5 * a * s * s * b + statistics(b, s)


@pytest.mark.parametrize("t", [2, 8])
@pytest.mark.parametrize(("b", "s", "h", "a"), KORTHIKANTI)
def test_tensor_parallelism_divides_24_of_the_34(b: int, s: int, h: int, a: int, t: int) -> None:
    """Equation 2: sbh (10 + 24/t + 5as/(ht))."""
    expected = 10 * s * b * h + 24 * s * b * h // t + 5 * a * s * s * b // t
    assert kept_by_a_layer(b, s, h, a, t) == expected + statistics(b, s)


@pytest.mark.parametrize("t", [2, 8])
@pytest.mark.parametrize(("b", "s", "h", "a"), KORTHIKANTI)
def test_sequence_parallelism_divides_all_of_it(b: int, s: int, h: int, a: int, t: int) -> None:
    """Equation 4: sbh/t (34 + 5as/h)."""
    expected = (34 * s * b * h + 5 * a * s * s * b) // t
    assert kept_by_a_layer(b, s, h, a, t, tokens_divided=True) == expected + statistics(b, s) // t


@pytest.mark.parametrize("t", [2, 8])
@pytest.mark.parametrize(("b", "s", "h", "a"), KORTHIKANTI)
def test_recomputing_the_attentions_core_leaves_34_sbh(b: int, s: int, h: int, a: int, t: int) -> None:
    """Section 5, selective recomputation: 34 sbh/t. Flash attention also keeps one number per row and head, and the
    random generator's state."""
    kernel_state = 4 * b * a * s // t + 512 + 512
    kept = kept_by_a_layer(b, s, h, a, t, tokens_divided=True, recomputed=True)
    assert kept == 34 * s * b * h // t + statistics(b, s) // t + kernel_state
