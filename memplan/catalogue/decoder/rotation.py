"""Rotary embeddings of part of a head, and attention over transposed heads."""

from __future__ import annotations

from memplan.catalogue.attention.attention import attention
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Op, Tensor

_SOURCE = "transformers 5.24 models/glm/modeling_glm.py apply_rotary_pos_emb"


def attend_heads_first(
    name: str, q: str, k: str, v: str, y: str, wiring: Wiring, grouped: bool, sliding: bool, mask: str
) -> tuple[Op, ...]:
    """Attend with q and k contiguous head by head, as joining their parts leaves them."""
    return heads_first(name, q, k, v, y, wiring, grouped, sliding)


def partly_rotated(name: str, q: str, k: str, partial: bool) -> tuple[Op, ...]:
    """Rotate the first `rot` dimensions of each head of q and k, and join them with the rest in new storage.

    Both parts are views, whose gradients are as wide as a head.
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
    """Join the rotated and the other part. The parts' gradients are views of one tensor."""
    parts = (f"{t}.part", f"{t}.pass")
    return (
        ops.view(f"{name}.part", f"{t}.turned", parts[0], shape),
        Op(f"{name}.cat", parts, (Tensor(t, shape),), gradient="same", source=_SOURCE),
    )


QUERIES, KEYS = "b s a d", "b s k d"


def rotate_part(name: str, partial: bool) -> tuple[Op, ...]:
    """Rotate the first `rot` dimensions of each head of q1 and k1, and join them with the rest as q and k.

    The rest is a view, even if it is empty, and its gradient is as wide as a head.
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
    """Rotate one part and join it with the rest. The parts' gradients are views of one tensor."""
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
    """Attend with q and k contiguous head by head.

    Flash attention then writes its output in that layout too, which takes a copy. Eager attention and torch's math
    kernel need no copies of q and k.
    """
    match wiring.masked if wiring.has_mask(sliding) else wiring.backend:
        case "flash" | "flash_2":
            kernel = attention(name, q, k, v, f"{y}.heads", wiring, grouped, sliding)
            return (*kernel, ops.copy(f"{name}.contiguous", f"{y}.heads", y, QUERIES))
        case "eager" | "math":
            flat = (f"{name}.q_flat", f"{name}.k_flat")
            return tuple(
                ops.view(op.name, op.reads[0], op.writes[0].name, op.writes[0].shape) if op.name in flat else op
                for op in attention(name, q, k, v, y, wiring, grouped, sliding)
            )
        case _:
            return attention(name, q, k, v, y, wiring, grouped, sliding)
