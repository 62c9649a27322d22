"""Encoder-decoders: operations written for one sequence, applied to the decoder's and the encoder's sequences.

If encoder and decoder run in one pass, the decoder's tokens are `t`. If the decoder runs alone, as in `generate`, its
tokens are `s`, as in any decoder, and the encoder's are `source`.
"""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Op, Tensor

# Axes of the encoder's sequence, and the corresponding axes of the decoder's.
_TARGET = {
    "s": "t",
    "s8": "t8",
    "s32": "t32",
    "s128": "t128",
    "s_uneven": "t_uneven",
    "s_uneven8": "t_uneven8",
    "sorted_ids": "sorted_targets",
    "segments": "target_segments",
    "pairs": "target_pairs",
    "pair_segments": "target_pair_segments",
    "efficient_workspace": "efficient_workspace_t",
}


_SOURCE = {axis: axis.replace("s", "source", 1) for axis in ("s", "s8", "s32", "s128", "s_uneven", "s_uneven8")}


def decoding(operations: tuple[Op, ...], wiring: Wiring) -> tuple[Op, ...]:
    """Return the operations on the decoder's own sequence, with `t` tokens in place of the encoder's `s`."""
    return operations if wiring.encoder_decoder_half else tuple(_changed(op, _decoder_axes) for op in operations)


def attend_to_encoder(operations: tuple[Op, ...], wiring: Wiring, *outputs: str) -> tuple[Op, ...]:
    """Return attention from the decoder's queries to the encoder's keys and values, up to its `outputs`.

    Tensors named k... and v... have the encoder's sequence axis; in tensors with two sequence axes, the second is the
    encoder's. All get names distinct from those of the decoder's self-attention.
    """
    inner = {t.name for op in operations for t in op.writes if t.name not in outputs} | {"k", "v"}
    cross = _cross_axes_alone if wiring.encoder_decoder_half else _cross_axes
    return tuple(_renamed(_changed(op, cross), inner) for op in operations)


def ids_of_labels() -> Op:
    """Return the decoder's ids when it computes the loss: the shifted labels."""
    return Op(
        "decoder_input_ids",
        ("labels",),
        (Tensor("decoder_ids", "b t", "int64"),),
        scratch=(Tensor("clone", "b t", "int64"), Tensor("ignored", "b t", "bool")),
    )


def cached_across(name: str, like: str, there: bool, shape: str = "b s a d") -> tuple[Op, ...]:
    """Cache the keys and values of an encoder's or tower's output, or read them from the cache if they are `there`.

    They have the dtype of the tensor `like`.
    """
    kept = tuple(Tensor(f"{t}.kept", shape, f"={like}") for t in ("k", "v"))
    return (Op(f"{name}.cache", (like,) if there else ("k", "v"), kept, caches="source"),)


SOURCES, MASK = Tensor("sources", "prompts source", "int64"), Tensor("sources' mask", "rows source", "int64")
_KEPT = "transformers 5.24 generation/utils.py generate, _expand_inputs_for_generation"


def encoder_results(
    operations: tuple[Op, ...], made: tuple[str, ...], sources: str, mask: str, beams: bool
) -> tuple[Op, ...]:
    """Return an encoder's last operations, and what stays until its decoder has generated all tokens.

    made     names of the encoder's output; the last one stays
    sources  the encoder's ids or features, which stay
    mask     their mask, which stays; empty if there is none
    beams    every beam of a prompt gets its own copy of what the decoder reads
    """
    names = dict.fromkeys(made if not beams else ())
    outputs = tuple(
        op._replace(writes=tuple(t._replace(shape="rows source h") if t.name in names else t for t in op.writes))
        for op in operations
    )
    stays = {made[-1]: Tensor("encoded", "rows source h", f"={made[-1]}"), **({mask: MASK} if mask else {})}
    copies = (
        Op(f"{t.name}.repeat_interleave", (name,), (t,), holds="cache", source=_KEPT)
        if beams
        else Op(f"{t.name}.kept", (name,), (t,), view=True, holds="cache", source=_KEPT)
        for name, t in stays.items()
    )
    sources_kept = Op("sources.kept", (sources,), (SOURCES,), view=True, holds="cache", source=_KEPT)
    return (*outputs, sources_kept, *copies)


def read_encoder_results(*tensors: Tensor) -> tuple[Op, ...]:
    """Return the encoder's output and the other tensors that the encoder's pass has left for the decoder."""
    befores = {t: t._replace(name=f"{t.name} before") for t in tensors}
    return tuple(
        Op(t.name, (before.name,), (t,), past=(before,), view=True, holds="cache", source=_KEPT)
        for t, before in befores.items()
    )


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


def _decoder_axes(t: Tensor) -> Tensor:
    return t._replace(shape=" ".join(_TARGET.get(axis, axis) for axis in t.shape.split()))


def _cross_axes(t: Tensor) -> Tensor:
    if t.name[:1] in ("k", "v"):
        return t
    axes = t.shape.split()
    first = next((i for i, axis in enumerate(axes) if axis in _TARGET), len(axes))
    moved = [_TARGET[axis] if i == first else axis for i, axis in enumerate(axes)]
    return t._replace(shape=" ".join(moved).replace("efficient_workspace_t", "efficient_workspace_cross"))


def _cross_axes_alone(t: Tensor) -> Tensor:
    """Put all axes of keys and values, and the second of two sequence axes elsewhere, on the encoder's sequence."""
    axes = t.shape.split()
    places = [i for i, axis in enumerate(axes) if axis in _SOURCE]
    moved = places if t.name[:1] in ("k", "v") else places[1:]
    return t._replace(shape=" ".join(_SOURCE[axis] if i in moved else axis for i, axis in enumerate(axes)))


def _changed(op: Op, change: Callable[[Tensor], Tensor]) -> Op:
    return op._replace(
        writes=tuple(map(change, op.writes)),
        scratch=tuple(map(change, op.scratch)),
        scratch_back=tuple(s._replace(tensor=change(s.tensor)) for s in op.scratch_back),
    )
