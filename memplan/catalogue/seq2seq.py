"""Encoder-decoders: operations written for one sequence, as a decoder runs them on its own and on the encoder's."""

from __future__ import annotations

from collections.abc import Callable

from memplan.ir import Op, Tensor

# Axes of the encoder's sequence, and what they are in the decoder.
_TARGET = {
    "s": "t",
    "s8": "t8",
    "s32": "t32",
    "s128": "t128",
    "sorted_ids": "sorted_targets",
    "segments": "target_segments",
    "pairs": "target_pairs",
    "pair_segments": "target_pair_segments",
    "efficient_workspace": "efficient_workspace_t",
}


def decoding(operations: tuple[Op, ...]) -> tuple[Op, ...]:
    """The operations on the decoder's own sequence, `t` tokens of it."""
    return tuple(_changed(op, _own) for op in operations)


def crossing(operations: tuple[Op, ...], *outputs: str) -> tuple[Op, ...]:
    """Attention of the decoder's queries to the encoder's keys and values, up to its `outputs`.

    Tensors called after keys and values, k... and v..., are of the encoder's sequence, and so is the second of two.
    All have names of their own beside those of the decoder's attention to itself.
    """
    inner = {t.name for op in operations for t in op.writes if t.name not in outputs}
    return tuple(_renamed(_changed(op, _cross), inner) for op in operations)


def _renamed(op: Op, inner: set[str]) -> Op:
    def name(old: str) -> str:
        return f"{old}.cross" if old in inner else old

    def tensor(t: Tensor) -> Tensor:
        return t._replace(name=name(t.name), dtype=f"={name(t.dtype[1:])}" if t.dtype.startswith("=") else t.dtype)

    return _changed(op, tensor)._replace(
        reads=tuple(map(name, op.reads)),
        keeps=tuple(k._replace(what=name(k.what), of=name(k.of)) for k in op.keeps),
        scratch_back=tuple(s._replace(tensor=tensor(s.tensor), of=name(s.of)) for s in op.scratch_back),
    )


def _own(t: Tensor) -> Tensor:
    return t._replace(shape=" ".join(_TARGET.get(axis, axis) for axis in t.shape.split()))


def _cross(t: Tensor) -> Tensor:
    if t.name[:1] in ("k", "v"):
        return t
    axes = t.shape.split()
    first = next((i for i, axis in enumerate(axes) if axis in _TARGET), len(axes))
    moved = [_TARGET[axis] if i == first else axis for i, axis in enumerate(axes)]
    return t._replace(shape=" ".join(moved).replace("efficient_workspace_t", "efficient_workspace_cross"))


def _changed(op: Op, change: Callable[[Tensor], Tensor]) -> Op:
    return op._replace(
        writes=tuple(map(change, op.writes)),
        scratch=tuple(map(change, op.scratch)),
        scratch_back=tuple(s._replace(tensor=change(s.tensor)) for s in op.scratch_back),
    )
