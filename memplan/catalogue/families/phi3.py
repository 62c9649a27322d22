"""Phi-3, Phi-3.5 and Phi-4: Llama with fused projections, whose parts are views of one tensor."""

from __future__ import annotations

from memplan.catalogue.attention.attention import attention
from memplan.catalogue.decoder.attention import rope
from memplan.catalogue.decoder.frame import after, before, decoder_block, returned
from memplan.catalogue.decoder.rotation import KEYS, QUERIES, heads_first, rotate_part
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Op, Run, Stack, Tensor
from memplan.models.model import ModelSpec


def phi3(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Phi-3.

    The outputs of `qkv_proj` and `gate_up_proj` stay alive as long as one of their parts is kept. Rotated q and k are
    new tensors.
    """
    sliding = m.sliding_window is not None
    branch = _dropped if float(m.get("resid_pdrop", 0.0)) > 0 else None
    heads = _attention(m, wiring, "n1", "ao", sliding)
    block = decoder_block(heads, _mlp("n2", "mo"), branch, held=returned(wiring))
    return Stack(before(wiring, (sliding,)), (Run((block,), "L"),), after(m, wiring, (sliding,)))


def _dropped(name: str, x: str, y: str) -> tuple[Op, ...]:
    return (ops.dropout(f"{name}.dropout", x, y, "b s h"),)


def _attention(m: ModelSpec, wiring: Wiring, x: str, y: str, sliding: bool, name: str = "self_attn") -> tuple[Op, ...]:
    """Attention. Each of the three slices has a gradient as wide as the whole projection; the three are summed."""
    grouped, partial = m.num_key_value_heads != m.num_attention_heads, m.rotary_width < m.head_dim
    kernel = attention if wiring.whole_rotary else heads_first
    return (
        ops.linear(f"{name}.qkv_proj", x, "qkv", "qkv", "h", "attention"),
        ops.view(f"{name}.q_slice", "qkv", "q0", "b s a d", gradient="new"),
        ops.view(f"{name}.k_slice", "qkv", "k0", "b s k d", gradient="new"),
        ops.view(f"{name}.v_slice", "qkv", "v", "b s k d", gradient="new"),
        ops.view(f"{name}.q_heads", "q0", "q1", QUERIES, gradient="new"),
        ops.view(f"{name}.k_heads", "k0", "k1", KEYS, gradient="new"),
        *(rope(name, "q1", "k1") if wiring.whole_rotary else rotate_part(f"{name}.rope", partial)),
        ops.release_names("q1", "k1"),
        *kernel(f"{name}.attention", "q", "k", "v", "o", wiring, grouped, sliding),
        ops.linear(f"{name}.o_proj", "o", y, "h", "a d", "attention"),
        ops.release_names("qkv", "q", "k", "v", "o", x),
    )


def _mlp(x: str, y: str, name: str = "mlp") -> tuple[Op, ...]:
    """Gated MLP. The gradients of gate and up are joined, and the projection's output stays alive for both."""
    return (
        ops.linear(f"{name}.gate_up_proj", x, "gate_up", "2 f", "h", "mlp"),
        ops.split(f"{name}.chunk", "gate_up", (Tensor("gate", "b s f"), Tensor("up", "b s f"))),
        ops.activation(f"{name}.activation_fn", "gate", "act", "b s f"),
        ops.mul(f"{name}.product", "up", "act", "product", "b s f"),
        ops.linear(f"{name}.down_proj", "product", y, "h", "f", "mlp"),
        ops.release_names("gate", x),
    )


BUILDERS = {"phi3": phi3}
