"""Phi-3, Phi-3.5, Phi-4: Llama with fused projections, whose parts are views of one storage."""

from __future__ import annotations

from memplan.catalogue import ops
from memplan.catalogue.attention import Wiring, attention
from memplan.catalogue.llama import after, before, decoder_block, returned, rope
from memplan.ir import Op, Run, Stack, Tensor
from memplan.models import ModelSpec

_Q, _K = "b s a d", "b s k d"


def phi3(m: ModelSpec, wiring: Wiring) -> Stack:
    """`qkv_proj` and `gate_up_proj` stay whole as long as one part is kept; q and k are put together again rotated."""
    sliding = m.sliding_window is not None
    branch = _dropped if float(m.get("resid_pdrop", 0.0)) > 0 else None
    heads = _attention(m, wiring, "n1", "ao", sliding)
    block = decoder_block(heads, _mlp("n2", "mo"), branch, held=returned(wiring))
    return Stack(before(wiring, (sliding,)), (Run((block,), "L"),), after(m, wiring, (sliding,)))


def _dropped(name: str, x: str, y: str) -> tuple[Op, ...]:
    return (ops.dropout(f"{name}.dropout", x, y, "b s h"),)


def _attention(m: ModelSpec, wiring: Wiring, x: str, y: str, sliding: bool, name: str = "self_attn") -> tuple[Op, ...]:
    """The three slices of the projection give three gradients as wide as all of it, summed."""
    grouped, partial = m.num_key_value_heads != m.num_attention_heads, m.rotary_width < m.head_dim
    kernel = attention if wiring.whole_rotary else heads_first
    return (
        ops.linear(f"{name}.qkv_proj", x, "qkv", "qkv", "h", "attention"),
        ops.view(f"{name}.q_slice", "qkv", "q0", "b s a d", gradient="new"),
        ops.view(f"{name}.k_slice", "qkv", "k0", "b s k d", gradient="new"),
        ops.view(f"{name}.v_slice", "qkv", "v", "b s k d", gradient="new"),
        ops.view(f"{name}.q_heads", "q0", "q1", _Q, gradient="new"),
        ops.view(f"{name}.k_heads", "k0", "k1", _K, gradient="new"),
        *(rope(name, "q1", "k1") if wiring.whole_rotary else rotate_part(f"{name}.rope", partial)),
        ops.leave("q1", "k1"),
        *kernel(f"{name}.attention", "q", "k", "v", "o", wiring, grouped, sliding),
        ops.linear(f"{name}.o_proj", "o", y, "h", "a d", "attention"),
        ops.leave("qkv", "q", "k", "v", "o", x),
    )


def rotate_part(name: str, partial: bool) -> tuple[Op, ...]:
    """q1 and k1 to q and k: the first `rot` of each head's dimensions rotated, joined with the rest into new storage.

    The rest is cut off, and its gradient made as wide as a head again, even where it is empty.
    """
    return (
        *(
            ops.view(f"{name}.{t}_{part}", f"{t}1", f"{t}.{part}", f"b s {heads} {width}", gradient)
            for t, heads in (("q", "a"), ("k", "k"))
            for part, width, gradient in (("rot", "rot", "new" if partial else "same"), ("pass", "d", "new"))
        ),
        *_rotate_and_join(f"{name}.q", "q", "a"),
        *_rotate_and_join(f"{name}.k", "k", "k"),
    )


def _rotate_and_join(name: str, t: str, heads: str) -> tuple[Op, ...]:
    """The gradients of the joined parts are views of one."""
    shape = f"b s {heads} d"
    return (
        *ops.rotate(name, f"{t}.rot", f"{t}.turned_part", f"b s {heads} rot", f"b s {heads} rot2"),
        ops.view(f"{name}.part", f"{t}.turned_part", f"{t}.part", shape),
        Op(
            f"{name}.cat",
            (f"{t}.part", f"{t}.pass"),
            (Tensor(t, shape),),
            gradient="same",
            source="transformers 5.24 models/phi3/modeling_phi3.py apply_rotary_pos_emb",
        ),
    )


def heads_first(
    name: str, q: str, k: str, v: str, y: str, wiring: Wiring, grouped: bool, sliding: bool = False
) -> tuple[Op, ...]:
    """Attention where q and k lie in memory head by head.

    Flash attention then gives its output that way too, and it is copied; attention that is written out, eager or
    torch's plain one, has no need to copy q and k.
    """
    match wiring.masked if wiring.has_mask(sliding) else wiring.backend:
        case "flash" | "flash_2":
            kernel = attention(name, q, k, v, f"{y}.heads", wiring, grouped, sliding)
            return (*kernel, ops.copy(f"{name}.contiguous", f"{y}.heads", y, _Q))
        case "eager" | "math":
            flat = (f"{name}.q_flat", f"{name}.k_flat")
            return tuple(
                ops.view(op.name, op.reads[0], op.writes[0].name, op.writes[0].shape) if op.name in flat else op
                for op in attention(name, q, k, v, y, wiring, grouped, sliding)
            )
        case _:
            return attention(name, q, k, v, y, wiring, grouped, sliding)


def _mlp(x: str, y: str, name: str = "mlp") -> tuple[Op, ...]:
    """The gradients of gate and up are joined into one; the projection's output stays for both."""
    return (
        ops.linear(f"{name}.gate_up_proj", x, "gate_up", "2 f", "h", "mlp"),
        ops.split(f"{name}.chunk", "gate_up", (Tensor("gate", "b s f"), Tensor("up", "b s f"))),
        ops.activation(f"{name}.activation_fn", "gate", "act", "b s f"),
        ops.mul(f"{name}.product", "up", "act", "product", "b s f"),
        ops.linear(f"{name}.down_proj", "product", y, "h", "f", "mlp"),
        ops.leave("gate", x),
    )


BUILDERS = {"phi3": phi3}
