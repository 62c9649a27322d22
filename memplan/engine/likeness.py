"""`Likeness`: lists of operations that differ only in names and shapes of tensors.

Layers that read the outputs of more and more earlier layers are such lists. The engine compares names with names and
shapes with shapes, so it resolves one of the lists and runs it, and renames the results for those that are like it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

from memplan.core.identity import Identity
from memplan.core.ir import Keep, Op, Tensor
from memplan.core.records import NamedTuple

Ops = tuple[Op, ...]
_Renamed = Mapping[str, str]


class Likeness(NamedTuple):
    """How operations differ from others.

    names   names of the others' tensors -> the names here, of those that differ
    shapes  shapes, likewise
    """

    names: _Renamed
    shapes: _Renamed

    @classmethod
    def of(cls, first: Ops, ops: Ops, inputs: Iterable[tuple[Tensor, Tensor]]) -> Likeness | None:
        """Compare two lists of equally many operations, and their inputs; None if they differ in anything else."""
        names, shapes = set[tuple[str, str]](), set[tuple[str, str]]()
        different = {i: b for i, (a, b) in enumerate(zip(first, ops, strict=True)) if a is not b and a != b}
        for i, b in different.items():
            a = first[i]
            for pairs, own, others in ((names, _names(a), _names(b)), (shapes, _shapes(a), _shapes(b))):
                if len(own) != len(others):
                    return None
                pairs.update(zip(own, others, strict=True))
        for t, u in inputs:
            if t.dtype != u.dtype:
                return None
            names.add((t.name, u.name))
            shapes.add((t.shape, u.shape))
        if any(len(pairs) != len({*each}) for pairs in (names, shapes) for each in zip(*pairs, strict=True)):
            return None  # not one to one
        like = cls(*({a: b for a, b in pairs if a != b} for pairs in (names, shapes)))
        if any(like.operation(first[i]) != b for i, b in different.items()):
            return None
        dtypes = _dtypes(Identity(first))  # which may be that of a tensor
        if any(name in dtypes for name in like.names):
            return None
        renamed = [word for words in like for pair in words.items() for word in pair]
        return like if different.keys() >= _using(renamed, first) else None

    def after(self, other: Likeness) -> Likeness:
        """Return how these operations differ from ones that differ from the same first ones as `other` says."""
        back = zip(self, other.inverse(), strict=True)
        return Likeness(*({**own, **{word: own.get(first, first) for word, first in of.items()}} for own, of in back))

    def inverse(self) -> Likeness:
        """Return how the others differ from these operations."""
        return Likeness(*({own: word for word, own in words.items()} for words in self))

    def name(self, name: str) -> str:
        """Return the name of a tensor here, given its name there."""
        return self.names.get(name, name)

    def tensor(self, t: Tensor) -> Tensor:
        """Return a tensor here, given the one there."""
        if t.name in self.names or t.shape in self.shapes:
            return Tensor(self.name(t.name), self.shapes.get(t.shape, t.shape), t.dtype)
        return t

    def operations(self, ops: Ops) -> Ops:
        """Return the operations here, given those there."""
        changed = _using((*self.names, *self.shapes), ops)
        return tuple([self.operation(op) if i in changed else op for i, op in enumerate(ops)])

    def operation(self, op: Op) -> Op:
        """Return an operation here, given the one there."""
        name, shapes = self.name, self.shapes
        lists = {field: tuple(map(self.tensor, getattr(op, field))) for field in ("writes", "scratch", "past", "wraps")}
        return op._replace(
            reads=tuple(map(name, op.reads)),
            keeps=tuple([Keep(name(k.what), name(k.of), k.is_gradient, shapes.get(k.seen, k.seen)) for k in op.keeps]),
            captures=tuple(map(name, op.captures)),
            scratch_back=tuple(
                [
                    s._replace(tensor=self.tensor(s.tensor), of=name(s.of), unless=name(s.unless))
                    for s in op.scratch_back
                ]
            ),
            **lists,
        )


ALIKE = Likeness({}, {})


def _using(words: Iterable[str], ops: Ops) -> set[int]:
    """Return the indices of the operations that use any of these names or shapes."""
    places = _places(Identity(ops))
    return {i for word in words for i in places.get(word, ())}


@lru_cache(maxsize=16)
def _places(ops: Identity[Ops]) -> Mapping[str, list[int]]:
    """Map each name and shape to the indices of the operations that use it."""
    places: dict[str, list[int]] = {}
    for i, op in enumerate(ops.value):
        for word in (*_names(op), *_shapes(op)):
            places.setdefault(word, []).append(i)
    return places


@lru_cache(maxsize=16)
def _dtypes(ops: Identity[Ops]) -> str:
    """Return the dtypes of the operations' tensors, in one text."""
    return " ".join([t.dtype for op in ops.value for t in _tensors(op)])


def _tensors(op: Op) -> tuple[Tensor, ...]:
    if not (op.scratch or op.scratch_back or op.past or op.wraps):  # as of most operations
        return op.writes
    return (*op.writes, *op.scratch, *op.past, *op.wraps, *[s.tensor for s in op.scratch_back])


def _names(op: Op) -> list[str]:
    names = [*op.reads, *[t.name for t in _tensors(op)]]
    if op.keeps or op.captures or op.scratch_back:
        names += [*op.captures, *[s.of for s in op.scratch_back]]
        for keep in op.keeps:
            names += keep.what, keep.of
    return names


def _shapes(op: Op) -> list[str]:
    shapes = [t.shape for t in _tensors(op)]
    if op.keeps:
        shapes += [keep.seen for keep in op.keeps]
    for w in op.weights:
        shapes += w.shape, w.gradient
    return shapes
