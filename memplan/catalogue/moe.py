"""Decoders whose MLPs are mixtures of experts, and which are Llama or one of its like else."""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue import experts, ops
from memplan.catalogue.attention import Wiring
from memplan.catalogue.llama import gated_mlp, llama
from memplan.ir import Op, Stack
from memplan.layers import Layer
from memplan.models import ModelSpec

Ffn = Callable[[Layer], tuple[Op, ...]]


def mixture(routed: tuple[Op, ...], made: tuple[Op, ...]) -> tuple[Op, ...]:
    """The router's choice, then the experts; what the module has names for stays until it returns."""
    return (*routed, *made, ops.leave(experts.SCORES, experts.CHOSEN, "router.logits", "n2"))


def either(of_experts: tuple[Op, ...]) -> Ffn:
    """A layer's MLP: the mixture, or a dense one where the layer has no experts."""
    return lambda layer: of_experts if layer.ffn == "experts" else gated_mlp("n2", "mo")


def mixtral(m: ModelSpec, wiring: Wiring) -> Stack:
    """Scores stay fp32, and so do the weighed rows and their sums."""
    routed = experts.softmax_router("mlp.gate", "n2", normalise=True, narrow=False, together=False)
    made = experts.experts("n2", "mo", gate_up=("w1", "w3"), down=("w2",))
    return llama(m, wiring, mlp=either(mixture(routed, made)))


def qwen3_moe(m: ModelSpec, wiring: Wiring) -> Stack:
    routed = experts.softmax_router("mlp.gate", "n2", normalise=m.get("norm_topk_prob", False))
    bias = m.get("attention_bias", False)
    ffn = either(mixture(routed, experts.experts("n2", "mo")))
    return llama(m, wiring, bias=bias, out_bias=bias, qk_norm=True, mlp=ffn)


BUILDERS = {"mixtral": mixtral, "qwen3_moe": qwen3_moe}
