"""GLM-4: Llama whose heads are rotated in part and pair by pair, with gate and up in one projection."""

from __future__ import annotations

from memplan.catalogue import ops
from memplan.catalogue.attention import Wiring
from memplan.catalogue.llama import decoder_block, llama_attention, returned, runs
from memplan.catalogue.mixed import after, before, normed_block, renamed, tables
from memplan.catalogue.phi3 import heads_first
from memplan.ir import Op, Stack, Tensor
from memplan.models import ModelSpec

_SOURCE = "transformers 5.24 models/glm/modeling_glm.py apply_rotary_pos_emb"


def glm(m: ModelSpec, wiring: Wiring) -> Stack:
    """GLM-4 9B: Llama's frame."""
    block = decoder_block(_attention(m, wiring), fused_mlp("n2", "mo"), held=returned(wiring))
    return Stack(before(wiring, False, tables()), runs(m, lambda _: block), after(m, wiring, False))


def glm4(m: ModelSpec, wiring: Wiring) -> Stack:
    """GLM-4-0414: norms at the end of the branches too."""
    block = normed_block(
        _attention(m, wiring),
        fused_mlp("n2", "mo"),
        ops.rms_norm,
        ("input_layernorm", "post_attention_layernorm"),
        ("post_self_attn_layernorm", "post_mlp_layernorm"),
        returned(wiring),
    )
    return Stack(before(wiring, False, tables()), runs(m, lambda _: block), after(m, wiring, False))


def _attention(m: ModelSpec, wiring: Wiring) -> tuple[Op, ...]:
    partial = m.rotary_width < m.head_dim

    def rope(name: str, q: str, k: str) -> tuple[Op, ...]:
        """cos and sin are spread over the pairs anew in every layer, which keeps them."""
        turned = partly_rotated(name, q, k, partial)
        return (
            ops.copy(f"{name}.pairs_of_cos", "cos", "cos.pairs", "s rot"),
            ops.copy(f"{name}.pairs_of_sin", "sin", "sin.pairs", "s rot"),
            *renamed(turned, {"cos": "cos.pairs", "sin": "sin.pairs"}),
            ops.leave("cos.pairs", "sin.pairs"),
            ops.leave(q, k),
        )

    return llama_attention(
        m, wiring, "n1", "ao", bias=m.get("attention_bias", False), turn=rope, attend=attend_heads_first
    )


def attend_heads_first(
    name: str, q: str, k: str, v: str, y: str, wiring: Wiring, grouped: bool, sliding: bool, mask: str
) -> tuple[Op, ...]:
    """Attention where q and k lie in memory head by head, as joining their parts leaves them."""
    return heads_first(name, q, k, v, y, wiring, grouped, sliding)


def partly_rotated(name: str, q: str, k: str, partial: bool) -> tuple[Op, ...]:
    """q and k from the first `rot` of each head's dimensions rotated and the others, joined in new storage.

    What is cut off is cut off by a view, whose gradient is made as wide as a head again.
    """
    both = (("q", q, "a"), ("k", k, "k"))
    return (
        *(
            ops.view(f"{name}.{t}_{part}", x, f"{t}.{part}", f"b s {heads} {width}", gradient)
            for t, x, heads in both
            for part, width, gradient in (("rot", "rot", "new" if partial else "same"), ("pass", "d", "new"))
        ),
        *(
            op
            for t, _, heads in both
            for op in ops.rotate(f"{name}.{t}", f"{t}.rot", f"{t}.turned", f"b s {heads} rot", f"b s {heads} rot2")
        ),
        *(op for t, _, heads in both for op in _joined(f"{name}.{t}", t, f"b s {heads} d")),
    )


def _joined(name: str, t: str, shape: str) -> tuple[Op, ...]:
    """The gradients of the joined parts are views of one."""
    parts = (f"{t}.part", f"{t}.pass")
    return (
        ops.view(f"{name}.part", f"{t}.turned", parts[0], shape),
        Op(f"{name}.cat", parts, (Tensor(t, shape),), gradient="same", source=_SOURCE),
    )


def fused_mlp(
    x: str, y: str, name: str = "mlp", layers: tuple[str, str] = ("gate_up_proj", "down_proj"), bias: bool = False
) -> tuple[Op, ...]:
    """The projection's output stays whole for both its halves, whose gradients are joined into one."""
    up, down = layers
    return (
        ops.linear(f"{name}.{up}", x, "gate_up", "2 f", "h", "mlp", bias),
        ops.split(f"{name}.chunk", "gate_up", (Tensor("gate", "b s f"), Tensor("up", "b s f"))),
        ops.activation(f"{name}.activation_fn", "gate", "act", "b s f"),
        ops.mul(f"{name}.product", "up", "act", "product", "b s f"),
        ops.linear(f"{name}.{down}", "product", y, "h", "f", "mlp", bias),
        ops.leave("gate", x),
    )


BUILDERS = {"glm": glm, "glm4": glm4}
