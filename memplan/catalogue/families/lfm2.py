"""LFM2 and LFM3: gated short convolutions, and attention in some layers."""

from __future__ import annotations

from typing import Any

from memplan.catalogue.attention.attention import KEYS, QUERIES, attention, keys_and_values, mask_name
from memplan.catalogue.decoder.attention import llama_attention, rope
from memplan.catalogue.decoder.frame import (
    after,
    before,
    decoder_block,
    local,
    returned,
    rotary_tables,
    runs,
    table_names,
)
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.rotation_fp32 import rope_in_table_dtype
from memplan.catalogue.experts import experts, routers
from memplan.catalogue.experts.experts import mixture
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.recurrent import causal_conv, unpadded
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op, Stack, Tensor
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec


def _attention(m: ModelSpec, wiring: Wiring, name: str = "self_attn") -> tuple[Op, ...]:
    """Attention whose heads are normalised as they are projected."""
    repeated, k, v, heads, grouped = keys_and_values(m, f"{name}.attention", wiring)
    return (
        *(
            op
            for t, axis, shape in (("q", "a", QUERIES), ("k", "k", KEYS))
            for op in (
                ops.linear(f"{name}.{t}_proj", "n1", f"{t}0", f"{axis} d", "h", "attention"),
                ops.view(f"{name}.{t}_heads", f"{t}0", f"{t}1", shape, "new"),
                *ops.rms_norm(f"{name}.{t}_layernorm", f"{t}1", f"{t}2", shape, "d"),
                ops.release_names(f"{t}0", f"{t}1"),
            )
        ),
        ops.linear(f"{name}.v_proj", "n1", "v", "k d", "h", "attention"),
        *rope(m, name, "q2", "k2"),
        *repeated,
        *attention(f"{name}.attention", "q", k, v, "o", heads, grouped, False, mask_name(False)),
        ops.linear(f"{name}.out_proj", "o", "ao", "h", "a d", "attention"),
        ops.release_names("q", "k", "v", "o", "n1"),
    )


def _short_convolution(m: ModelSpec, wiring: Wiring, name: str = "conv") -> tuple[Op, ...]:
    """One projection to two gates and the channels that a convolution mixes between them; the output projection."""
    bias, shape = m.get("conv_bias", False), "b h s"
    return (
        *unpadded(wiring, "n1", "real", "b s h"),
        ops.linear(f"{name}.in_proj", "real", "gated.flat", "3 h", "h", "mixer", bias),
        ops.view(f"{name}.by_channel", "gated.flat", "gated", "b 3 h s", gradient="new"),
        ops.split(f"{name}.chunk", "gated", tuple(Tensor(t, shape) for t in ("opens", "closes", "channels"))),
        ops.mul(f"{name}.open", "opens", "channels", "mixed.in", shape),
        ops.release_names("real", "n1"),
        *causal_conv(f"{name}.conv", "mixed.in", "mixed", "h", bias, wiring, activates=False),
        ops.release_names("mixed.in"),
        ops.mul(f"{name}.product", "closes", "mixed", "mixed.out", shape),
        ops.linear(f"{name}.out_proj", "mixed.out", "ao", "h", "h", "mixer", bias),
        ops.release_names("gated", "mixed", "mixed.out"),
    )


def _mixture(m: ModelSpec, name: str = "feed_forward") -> tuple[Op, ...]:
    """LFM2's mixture, which has no shared experts."""
    if "E" not in m.axes():
        return ()
    normalise, biased = m.get("norm_topk_prob", True), m.get("use_expert_bias", True)
    router = routers.scaled_sigmoid_router(f"{name}.gate", "n2", f"{name}.expert_bias" if biased else "", normalise)
    routed = routers.without_adapter_targets(router)
    return mixture("n2", routed, experts.experts("n2", "mo", f"{name}.experts", gate_up=(), down=()))


def lfm2(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build LFM2."""
    bodies = {"attention": _attention(m, wiring), "convolution": _short_convolution(m, wiring)}
    mlps = {"dense": gated_mlp("n2", "mo", "feed_forward", projections=("w1", "w3", "w2")), "experts": _mixture(m)}

    def block(layer: Layer) -> Block:
        held = returned(wiring) if layer.mixer == "attention" else ("cos", "sin")  # convolutions get them too
        norms = ("operator_norm", "", "ffn_norm", "")
        return decoder_block(bodies[layer.mixer], mlps[layer.ffn], norms=norms, held=held)

    return Stack(before(wiring), runs(m, block), after(m, wiring, name="model.embedding_norm"))


def _attend_and_gate(name: str, q: str, k: str, v: str, y: str, *kernel: Any) -> tuple[Op, ...]:
    """Attend, and multiply each head's output by the sigmoid of a projection of the layer's input."""
    gate = f"{name.rpartition('.')[0]}.g_proj"
    return (
        *attention(name, q, k, v, "o.whole", *kernel),
        ops.linear(gate, "n1", "closed", "a", "h", "attention"),
        routers.sigmoid(f"{gate}.sigmoid", "closed", "open", "b s a"),
        ops.spread(f"{gate}.gated", "o.whole", "open", y, QUERIES),
        ops.release_names("o.whole"),
    )


def lfm3(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build LFM3: LFM2 with windows in some layers, rotated in fp32 by their own table, and norms after branches.

    Source: transformers 5.24 models/lfm3/modeling_lfm3.py.
    """
    kinds = tuple(sorted({layer.sliding for layer in m.layers if layer.mixer == "attention"}))
    bias, has_local = m.get("attention_bias", False), len(kinds) > 1
    ends = ("post_operator_norm", "post_ffn_norm") if m.get("use_sandwich_norm", True) else ("", "")
    attend = _attend_and_gate if m.get("use_attention_gate", True) else attention
    mlp = gated_mlp("n2", "mo", "feed_forward", projections=("w1", "w3", "w2"))

    def block(layer: Layer) -> Block:
        attends = layer.mixer == "attention"
        heads = (
            llama_attention(
                m,
                wiring,
                "n1",
                "ao",
                bias=bias,
                out_bias=bias,
                qk_norm="each",
                sliding=layer.sliding,
                rotate=rope_in_table_dtype,
                attend=attend,
            )
            if attends
            else _short_convolution(m, wiring)
        )
        norms = ("operator_norm", ends[0], "ffn_norm", ends[1])
        whole = decoder_block(heads, mlp, norms=norms, held=returned(wiring) if attends else ())
        return local(whole) if has_local and layer.sliding else whole

    return Stack(
        before(wiring, kinds, table=rotary_tables(has_local, "fp32")),
        runs(m, block),
        after(m, wiring, kinds, name="model.embedding_norm", table=table_names(has_local)),
    )


BUILDERS = {"lfm2": lfm2, "lfm2_moe": lfm2, "lfm3": lfm3}
