"""Nemotron-NAS (DeciLM): Llama with layers found by search, each with its own heads and FFN width, or without either.

transformers has no class for it. This follows the code published with the weights, which is Llama's.
"""

from __future__ import annotations

from memplan.catalogue.decoder.attention import llama_attention
from memplan.catalogue.decoder.frame import after, before
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op, Run, Stack
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec


def nemotron_nas(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Nemotron-NAS. A layer without attention or FFN has no norm for it either."""
    runs = tuple(
        Run(tuple(_block(m, wiring, layer) for layer in run.pattern if layer.k or layer.f), run.times) for run in m.runs
    )
    return Stack(before(wiring), tuple(run for run in runs if run.blocks), after(m, wiring))


def _block(m: ModelSpec, wiring: Wiring, layer: Layer) -> Block:
    bias, middle = m.get("attention_bias", False), "x1" if layer.k and layer.f else ("y" if layer.k else "x")
    operations: list[Op] = []
    if layer.k:
        operations += ops.rms_norm("input_layernorm", "x", "n1", "b s h", "h")
        operations += llama_attention(
            m, wiring, "n1", "ao", bias=bias, out_bias=bias, grouped=layer.k != m.num_attention_heads
        )
        operations.append(ops.add("residual_1", "x", "ao", middle, "b s h"))
    if layer.f:
        operations += ops.rms_norm("post_attention_layernorm", middle, "n2", "b s h", "h")
        operations += gated_mlp("n2", "mo", bias=m.get("mlp_bias", False))
        operations.append(ops.add("residual_2", middle, "mo", "y", "b s h"))
    operations.append(ops.release_names("positions"))
    axes = {"k": f"k{layer.k}", "f": f"f{layer.f}"}
    return Block("model.layers", ops.with_axes(tuple(operations), axes))


BUILDERS = {"nemotron-nas": nemotron_nas}
