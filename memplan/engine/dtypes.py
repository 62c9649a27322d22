"""Resolving dtypes as torch's type promotion and autocast do.

The catalogue states dtypes relative to the inputs (`""` promoted, `"=x"` as x). Here they become literal, casts to the
dtype that a tensor already has are dropped, and the casts that autocast inserts become operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, TypeVar

from memplan.core.identity import Identity
from memplan.core.ir import Op, Tensor, Weight, taken_and_written
from memplan.core.records import NamedTuple
from memplan.engine.likeness import ALIKE, Likeness

FLOATING = frozenset(("fp32", "bf16", "fp16"))
K = TypeVar("K", Tensor, Weight)
_Known = tuple[Tensor | None, Tensor | None, Weight | None]  # of a name: tensor, autocast's cast, trained weight
_FREES = Op("")[2:]  # all fields of an operation but its name and reads, if it only lets go of names
_AUTOCAST = "torch 2.13 aten/src/ATen/autocast_mode.cpp cached_cast"


def promote(dtypes: Sequence[str]) -> str:
    """Return torch's promoted dtype: the widest floating dtype, or fp32 for bf16 with fp16.

    >>> promote(["bf16", "fp32"]), promote(["bf16", "int64"])
    ('fp32', 'bf16')
    """
    floating = FLOATING.intersection(dtypes)
    if not floating:
        return dtypes[0]
    return next(iter(floating)) if len(floating) == 1 else "fp32"


def _dtype_of(
    dtype: str, tensors: Mapping[str, Tensor], autocast: str | None, names: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Return the literal dtype for `=x` and `product`; a suffix `/n` (one element per n) is kept."""
    if dtype == "product":
        return autocast or "fp32"
    if not dtype.startswith("="):
        return dtype
    name, per = dtype[1:], ""
    if name not in names and name not in tensors:
        name, _, per = name.rpartition("/")
    return f"{tensors[names.get(name, name)].dtype}{per and '/'}{per}"


class Scope:
    """The tensors known at a point of the model, by name, and the casts that autocast has cached there.

    `casts` is for an autocast context around several passes: `made` in the first pass, which casts the weights, and
    `there` in the others, which find them cast. It is empty if the context ends with the pass.
    """

    def __init__(self, outer: Scope | None = None, inputs: Mapping[str, Tensor] | None = None, casts: str = "") -> None:
        self.casts: str = outer.casts if outer else casts
        self._tensors: dict[str, Tensor] = {**(outer._tensors if outer else {}), **(inputs or {})}
        self._casts: dict[str, Tensor] = dict(outer._casts) if outer else {}
        self._trained: dict[str, Weight] = dict(outer._trained) if outer else {}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def resolve(self, ops: tuple[Op, ...], autocast: str | None) -> tuple[Op, ...]:
        """Return `ops` with literal dtypes, in torch's order; `autocast` is the compute dtype, or None."""
        listed = _listed(Identity(ops))
        outside: list[_Known] = []
        for name in listed.names:
            tensor = self._tensors.get(name)
            trained = self._trained.get(name if tensor is None else tensor.name)
            outside.append((tensor, self._casts.get(name), trained))
        resolved = _resolved(listed, autocast, self.casts, tuple(outside))
        self._tensors.update(resolved.tensors)
        self._casts.update(resolved.casts)
        self._trained.update(resolved.trained)
        return resolved.ops


@lru_cache(maxsize=64)
def with_cached_casts(ops: Identity[tuple[Op, ...]], leaves: frozenset[str]) -> tuple[Op, ...]:
    """Return the operations with one cast of each of these fp32 leaves, which autocast caches like casts of weights."""
    made: dict[str, str] = {}
    out: list[Op] = []
    for op in ops.value:
        cast = op
        if op.cast and op.source == _AUTOCAST and not leaves.isdisjoint(op.reads):
            first = made.setdefault(op.reads[0], op.name)
            again = op._replace(reads=(first,), cast=False, view=True, gradient="same")
            cast = op._replace(holds="autocast") if first == op.name else again
        out.append(cast)
    return tuple(out) if made else ops.value


class _Listed:
    """Operations as a cache key, which is hashed by what they are called, and the names that they take from outside."""

    def __init__(self, ops: tuple[Op, ...]) -> None:
        self.ops = ops
        self.called = tuple([op.name for op in ops])
        taken, _ = taken_and_written(Identity(ops))
        self.names = tuple({name: None for _, name in taken} | {w.name: None for op in ops for w in op.weights})
        self._hash = hash(self.called)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Listed) and self.ops == other.ops


@lru_cache(maxsize=64)
def _listed(ops: Identity[tuple[Op, ...]]) -> _Listed:
    return _Listed(ops.value)


class ResolvedOps(tuple[Op, ...]):
    """Operations with literal dtypes.

    first  the operations that they are like; empty if they are the first of their kind
    like   how they differ from those
    """

    first: tuple[Op, ...] = ()
    like: Likeness = ALIKE


class _Resolved(NamedTuple):
    """Operations with literal dtypes, and what is known after them: tensors, autocast's casts, trained weights."""

    ops: ResolvedOps
    tensors: Mapping[str, Tensor]
    casts: Mapping[str, Tensor]
    trained: Mapping[str, Weight]


@lru_cache(maxsize=64)
def _resolved(
    listed: _Listed,
    autocast: str | None,
    casts: str,
    outside: tuple[_Known, ...],
) -> _Resolved:
    """Resolve the operations, given what is known of each of their names outside."""
    tensors: dict[str, Tensor] = {}
    cached: dict[str, Tensor] = {}
    trained: dict[str, Weight] = {}
    for name, (tensor, cast, weight) in zip(listed.names, outside, strict=True):
        if tensor is not None:
            tensors[name] = tensor
        if cast is not None:
            cached[name] = cast
        if weight is not None:
            trained[weight.name] = weight
    for tensor in [*tensors.values()]:  # a dropped cast is known by its own name and by that of its input
        tensors.setdefault(tensor.name, tensor)
    kinds = _kinds(listed.called, autocast, casts)
    for first in kinds:
        resolved = first.renamed(listed, outside)
        if resolved is not None:
            return resolved
    resolver = _Resolver(autocast, casts, tensors, cached, trained)
    ops = ResolvedOps(resolver.resolve(listed.ops))
    resolved = _Resolved(
        ops, _new(resolver.tensors, tensors), _new(resolver.casts, cached), _new(resolver.trained, trained)
    )
    kinds[:] = [*kinds[1 - _MOST_KINDS :], _Kind(listed, outside, resolved)]
    return resolved


_MOST_KINDS = 4  # of operations with the same names, the last ones met


class _Kind(NamedTuple):
    """The first of lists that are alike, what is known of its names outside, and what it is resolved to."""

    listed: _Listed
    outside: tuple[_Known, ...]
    resolved: _Resolved

    def renamed(self, listed: _Listed, outside: tuple[_Known, ...]) -> _Resolved | None:
        """Return what other operations are resolved to; None if they are not like these."""
        inputs: list[tuple[Tensor, Tensor]] = []
        if len(outside) != len(self.outside):
            return None
        for (t, *known), (u, *others) in zip(self.outside, outside, strict=True):
            if known != others or (t is None) != (u is None):
                return None
            if t is not None and u is not None:
                inputs.append((t, u))
        ops, tensors, casts, trained = self.resolved
        like = Likeness.of(self.listed.ops, listed.ops, inputs)
        named = " ".join([op.name for op in ops])
        if like is None or any(f"({name})" in named for name in like.names):  # a cast of such a tensor
            return None
        renamed = ResolvedOps(like.operations(ops))
        renamed.first, renamed.like = ops, like
        return _Resolved(renamed, {like.name(name): like.tensor(t) for name, t in tensors.items()}, casts, trained)


@lru_cache(maxsize=16)
def _kinds(names: tuple[str, ...], autocast: str | None, casts: str) -> list[_Kind]:
    """Return the kinds of operations with these names, to be changed in place."""
    return []


def _new(known: Mapping[str, K], old: Mapping[str, K]) -> dict[str, K]:
    """Return the entries of `known` that are not in `old`."""
    return {name: value for name, value in known.items() if old.get(name) is not value}


class _Resolver:
    """Resolves operations one by one, and notes the tensors, autocast's casts and the trained weights known so far."""

    def __init__(
        self,
        autocast: str | None,
        mode: str,
        tensors: Mapping[str, Tensor],
        casts: Mapping[str, Tensor],
        trained: Mapping[str, Weight],
    ) -> None:
        self.tensors, self.casts, self.trained = dict(tensors), dict(casts), dict(trained)
        self._autocast = autocast
        self._mode = mode  # as `Scope.casts`

    def resolve(self, ops: Iterable[Op]) -> tuple[Op, ...]:
        """Return the operations with literal dtypes, in torch's order."""
        out: list[Op] = []
        for w in (w for op in ops for w in op.weights):  # a dtype may refer to a later operation's weight
            self.tensors[w.name] = Tensor(w.name, w.shape, w.dtype)
        for op in ops:
            if not op.writes and op[2:] == _FREES and self._are_known_alike(op.reads):
                out.append(op)
            else:
                self._resolve(op, out)
        return tuple(out)

    def _are_known_alike(self, names: tuple[str, ...]) -> bool:
        """Whether none of the names stands for the input of a dropped cast."""
        return names == tuple([self.tensors[name].name for name in names]) and self.trained.keys().isdisjoint(names)

    def _resolve(self, op: Op, out: list[Op]) -> None:
        tensors, autocast = self.tensors, self._autocast
        for w in op.weights:
            if w.trains:
                self.trained[w.name] = w
        changed: dict[str, Any] = {}  # fields of the operation; most operations change in few
        if op.past:
            changed["past"] = past = tuple(t._replace(dtype=_dtype_of(t.dtype, tensors, autocast)) for t in op.past)
            tensors.update((t.name, t) for t in past)
        if op.copies_layout and autocast and tensors[op.reads[0]].dtype in FLOATING - {autocast}:
            tensors[op.writes[0].name] = tensors[op.reads[0]]
            return
        if op.only_dtype and tensors[op.reads[0]].dtype != op.only_dtype:
            gradient = "none" if op.gradient == "none" else "same"
            op = op._replace(reads=op.reads[:1], keeps=(), scratch=(), scratch_back=(), view=True, gradient=gradient)
        new_name = {r: name for r in op.reads if (name := tensors[r].name) != r}
        weights = op.weights
        if autocast and op.autocast in ("lower", "fp32"):
            weights = self._cast_inputs(op, autocast if op.autocast == "lower" else "fp32", new_name, out)
        reads = op.reads
        if new_name:
            reads = tuple([new_name.get(r, r) for r in reads])
            changed["captures"] = tuple([new_name.get(c, c) for c in op.captures])
            changed["keeps"] = tuple(
                [k._replace(what=new_name.get(k.what, k.what), of=new_name.get(k.of, k.of)) for k in op.keeps]
            )
        if not self.trained.keys().isdisjoint(reads):  # the output of a dropped cast is the weight itself
            weights += tuple(self.trained[r] for r in reads if r in self.trained and op.writes)
            reads = tuple(r for r in reads if r not in self.trained)
        if new_name and op.weights:
            reads += tuple([new_name[w.name] for w in op.weights if w.name in new_name])
        inputs = [*[tensors[r].dtype for r in reads], *[w.dtype for w in weights]]
        is_wide = autocast and op.autocast == "wide"

        def literal(t: Tensor) -> Tensor:
            name, shape, dtype = t
            if dtype.startswith("=") or dtype == "product":
                return Tensor(name, shape, _dtype_of(dtype, tensors, autocast, new_name))
            if dtype and not is_wide:
                return t
            return Tensor(name, shape, "fp32" if is_wide else promote(inputs))

        def temporary(t: Tensor) -> Tensor | None:
            dtype, _, source = t.dtype.partition("!")
            made = literal(t._replace(dtype=dtype) if source else t)
            return None if source and made.dtype == tensors[new_name.get(source, source)].dtype else made

        writes: list[Tensor] = []
        for t in op.writes:  # one may have the dtype of the one before it
            writes.append(literal(t))
            tensors[t.name] = writes[-1]
        if op.wraps:
            changed["wraps"] = wraps = tuple([literal(t) for t in op.wraps])
            tensors.update([(t.name, t) for t in wraps])
        if op.cast:
            source = tensors[reads[0] if reads else weights[0].name]
            if source.dtype in (writes[0].dtype, op.uncast_dtype):
                if not op.holds or not reads:
                    tensors[op.writes[0].name] = source
                    return
                op = op._replace(cast=False, view=True, gradient="same")  # what is held is the tensor itself
        if op.scratch:
            changed["scratch"] = tuple([made for t in op.scratch if (made := temporary(t))])
        if op.scratch_back:
            changed["scratch_back"] = tuple(
                [
                    s._replace(tensor=made, of=new_name.get(s.of, s.of), unless=new_name.get(s.unless, s.unless))
                    for s in op.scratch_back
                    if (made := temporary(s.tensor))
                ]
            )
        out.append(op._replace(reads=reads, writes=tuple(writes), weights=weights, **changed))

    def _cast_inputs(self, op: Op, target: str, new_name: dict[str, str], out: list[Op]) -> tuple[Weight, ...]:
        """Append autocast's casts of the inputs to `out`, their names to `new_name`; return the weights not cast."""
        tensors, weights = self.tensors, op.weights
        for w in reversed(op.weights):  # autocast casts arguments from last to first: bias, weight, input
            if w.dtype in FLOATING and w.dtype != target and not w.stored:
                new_name[w.name] = self._cast_weight(op, w, target, out).name
                weights = tuple(v for v in weights if v is not w)
        unique = {tensors[r].name: r for r in reversed(op.reads)}  # a dropped `laid` copy makes two names of one
        for r in unique.values():
            t = tensors[r]
            if t.dtype in FLOATING and t.dtype != target:
                to = Tensor(f"{op.name}.autocast({t.name})", t.shape, target)
                records = op.needs_recording
                out.append(Op(to.name, (t.name,), (to,), cast=True, needs_recording=records, source=_AUTOCAST))
                tensors[to.name] = to
                new_name.update((name, to.name) for name in op.reads if tensors[name] is t)
        return weights

    def _cast_weight(self, op: Op, w: Weight, target: str, out: list[Op]) -> Tensor:
        """Return the cast of a weight, appending the operation that makes it to `out`.

        Autocast caches the casts of trainable fp32 weights until it ends, and casts any other weight at every use.
        """
        cached = w.requires_grad and w.dtype == "fp32" and not w.is_read_as_view
        if cached and w.name in self.casts:
            return self.casts[w.name]
        to = Tensor(f"autocast({w.name})" + ("" if cached else f" for {op.writes[0].name}"), w.shape, target)
        cast = Op(to.name, (), (to,), (w,), cast=True, holds="autocast" if cached else "", source=_AUTOCAST)
        if cached and self._mode:
            cast = cast._replace(holds="cache")
        if cached and self._mode == "there":
            before = to._replace(name=f"{to.name} before")
            cast = cast._replace(reads=(before.name,), weights=(), past=(before,), view=True, cast=False)
        out.append(cast)
        self.tensors[to.name] = to
        if cached:
            self.casts[w.name] = to
        return to
