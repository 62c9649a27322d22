"""Resolving dtypes as torch's type promotion and autocast do.

The catalogue states dtypes relative to the inputs (`""` promoted, `"=x"` as x). Here they become literal, casts to the
dtype that a tensor already has are dropped, and the casts that autocast inserts become operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from memplan.core.ir import Op, Tensor, Weight, named

FLOATING = frozenset(("fp32", "bf16", "fp16"))
_AUTOCAST = "torch 2.13 aten/src/ATen/autocast_mode.cpp cached_cast"


def promote(dtypes: Iterable[str]) -> str:
    """Return torch's promoted dtype: the widest floating dtype, or fp32 for bf16 with fp16.

    >>> promote(["bf16", "fp32"]), promote(["bf16", "int64"])
    ('fp32', 'bf16')
    """
    dtypes = list(dtypes)
    floating = FLOATING.intersection(dtypes)
    if not floating:
        return dtypes[0]
    return next(iter(floating)) if len(floating) == 1 else "fp32"


def _dtype_of(dtype: str, tensors: Mapping[str, Tensor], names: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the literal dtype for `=x`; a suffix `/n` (one element per n) is kept."""
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

    def beyond(self, outer: Scope) -> Scope:
        """Return the difference to the outer scope: tensors, casts and trained weights that are new or other."""
        difference = Scope(casts=self.casts)
        difference._tensors = {name: t for name, t in self._tensors.items() if outer._tensors.get(name) is not t}
        difference._casts = {name: t for name, t in self._casts.items() if outer._casts.get(name) is not t}
        difference._trained = {name: w for name, w in self._trained.items() if outer._trained.get(name) is not w}
        return difference

    def with_(self, difference: Scope) -> Scope:
        """Return an inner scope with a difference that `beyond` returned."""
        inner = Scope(self, difference._tensors)
        inner._casts |= difference._casts
        inner._trained |= difference._trained
        return inner

    def seen(self, names: Iterable[str]) -> tuple[object, ...]:
        """Return a cache key for resolving operations that use these names."""
        return tuple((self._tensors.get(name), self._casts.get(name), self._trained.get(name)) for name in names)

    def resolve(self, ops: Iterable[Op], autocast: str | None) -> tuple[Op, ...]:
        """Return `ops` with literal dtypes, in torch's order; `autocast` is the compute dtype, or None."""
        out: list[Op] = []
        ops = tuple(ops)
        for w in (w for op in ops for w in op.weights):  # a dtype may refer to a later operation's weight
            self._tensors[w.name] = Tensor(w.name, w.shape, w.dtype)
        for op in ops:
            self._resolve(op, autocast, out)
        return tuple(out)

    def _resolve(self, op: Op, autocast: str | None, out: list[Op]) -> None:
        tensors = self._tensors
        for w in op.weights:
            tensors[w.name] = Tensor(w.name, w.shape, w.dtype)
            if w.trains:
                self._trained[w.name] = w
        past = tuple(t._replace(dtype=_dtype_of(t.dtype, tensors)) if t.dtype.startswith("=") else t for t in op.past)
        tensors.update((t.name, t) for t in past)
        if op.copies_layout and autocast and tensors[op.reads[0]].dtype in FLOATING - {autocast}:
            tensors[op.writes[0].name] = tensors[op.reads[0]]
            return
        new_name = {r: tensors[r].name for r in op.reads if tensors[r].name != r}
        weights = op.weights
        if autocast and op.autocast in ("lower", "fp32"):
            target = autocast if op.autocast == "lower" else "fp32"
            for w in reversed(op.weights):  # autocast casts arguments from last to first: bias, weight, input
                if w.dtype in FLOATING and w.dtype != target and not w.stored:
                    new_name[w.name] = self._cast_weight(op, w, target, out).name
                    weights = tuple(v for v in weights if v is not w)
            unique = {tensors[r].name: r for r in reversed(op.reads)}  # a dropped `laid` copy makes two names of one
            for r in unique.values():
                t = tensors[r]
                if t.dtype in FLOATING and t.dtype != target:
                    to = Tensor(f"{op.name}.autocast({t.name})", t.shape, target)
                    out.append(
                        Op(to.name, (t.name,), (to,), cast=True, needs_recording=op.needs_recording, source=_AUTOCAST)
                    )
                    tensors[to.name] = to
                    new_name.update((name, to.name) for name in op.reads if tensors[name] is t)
        reads = tuple(new_name.get(r, r) for r in op.reads)
        if not self._trained.keys().isdisjoint(reads):  # the output of a dropped cast is the weight itself
            weights += tuple(self._trained[r] for r in reads if r in self._trained)
            reads = tuple(r for r in reads if r not in self._trained)
        reads += tuple(new_name[w.name] for w in op.weights if w.name in new_name)
        inputs = [tensors[r].dtype for r in reads] + [w.dtype for w in weights]

        def literal(t: Tensor) -> Tensor:
            name, shape, dtype = t
            if dtype.startswith("="):
                return Tensor(name, shape, _dtype_of(dtype, tensors, new_name))
            if autocast and op.autocast == "wide":
                return Tensor(name, shape, "fp32")
            return t if dtype else Tensor(name, shape, promote(inputs))

        writes: list[Tensor] = []
        for t in op.writes:
            writes.append(literal(t))
            tensors[t.name] = writes[-1]
        wraps = tuple(literal(t) for t in op.wraps)
        tensors.update((t.name, t) for t in wraps)
        if op.cast:
            source = tensors[reads[0] if reads else weights[0].name]
            if source.dtype in (writes[0].dtype, op.uncast_dtype):
                tensors[op.writes[0].name] = source
                return
        out.append(
            op._replace(
                reads=reads,
                writes=tuple(writes),
                weights=weights,
                keeps=tuple(
                    k._replace(what=new_name.get(k.what, k.what), of=new_name.get(k.of, k.of)) for k in op.keeps
                ),
                captures=tuple(new_name.get(c, c) for c in op.captures),
                wraps=wraps,
                past=past,
                scratch=tuple(literal(t) for t in op.scratch),
                scratch_back=tuple(
                    s._replace(tensor=literal(s.tensor), of=new_name.get(s.of, s.of)) for s in op.scratch_back
                ),
            )
        )

    def _cast_weight(self, op: Op, w: Weight, target: str, out: list[Op]) -> Tensor:
        """Return the cast of a weight, appending the operation that makes it to `out`.

        Autocast caches the casts of trainable fp32 weights until it ends, and casts any other weight at every use.
        """
        cached = (w.trains or w.idle) and w.dtype == "fp32" and not w.is_read_as_view
        if cached and w.name in self._casts:
            return self._casts[w.name]
        to = Tensor(f"autocast({w.name})" + ("" if cached else f" for {op.writes[0].name}"), w.shape, target)
        cast = Op(to.name, (), (to,), (w,), cast=True, holds="forward" if cached else "", source=_AUTOCAST)
        if cached and self.casts:
            cast = cast._replace(holds="cache")
        if cached and self.casts == "there":
            before = to._replace(name=f"{to.name} before")
            cast = cast._replace(reads=(before.name,), weights=(), past=(before,), view=True, cast=False)
        out.append(cast)
        self._tensors[to.name] = to
        if cached:
            self._casts[w.name] = to
        return to


class BlockDtypes:
    """Resolves the blocks of one pass; blocks with the same operations and the same inputs only once."""

    def __init__(self, autocast: str | None) -> None:
        self._autocast = autocast
        self._names: dict[int, tuple[str, ...]] = {}
        self._resolved: dict[object, tuple[tuple[Op, ...], Scope]] = {}

    def resolve(self, ops: tuple[Op, ...], outer: Scope, x: Tensor) -> tuple[tuple[Op, ...], Scope]:
        """Return the operations of a block whose input is `x`, with literal dtypes, and their scope."""
        names = self._names.get(id(ops))
        if names is None:
            used = (name for op in ops for name in (*op.reads, *named(op), *(w.name for w in op.weights)))
            names = self._names[id(ops)] = tuple(dict.fromkeys(used))
        key = id(ops), x, outer.seen(names)
        if key not in self._resolved:
            inner = Scope(outer, {"x": x})
            self._resolved[key] = inner.resolve(ops, self._autocast), inner.beyond(outer)
        resolved, difference = self._resolved[key]
        return resolved, outer.with_(difference)
