"""LFM2: gated short convolutions, and attention in some layers."""

from __future__ import annotations

from memplan.catalogue.attention.attention import KEYS, QUERIES, attention, keys_and_values, mask_name
from memplan.catalogue.decoder.attention import rope
from memplan.catalogue.decoder.frame import after, before, decoder_block, returned, runs
from memplan.catalogue.decoder.mlp import gated_mlp
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


BUILDERS = {"lfm2": lfm2, "lfm2_moe": lfm2}
