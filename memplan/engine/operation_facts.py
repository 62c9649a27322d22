"""Facts about lists of operations that hold wherever the list runs, computed once for each list: equal layers share it.

A list is looked up by its identity: resolving dtypes returns the same list for equal blocks (`memplan.engine.dtypes`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, KeysView, Mapping
from collections.abc import Set as AbstractSet
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType

from memplan.core.cached_property import cached_property
from memplan.core.identity import Identity
from memplan.core.ir import Op, Tensor
from memplan.core.records import NamedTuple
from memplan.engine.dtypes import FLOATING

Ops = tuple[Op, ...]


def leaves(op: Op) -> tuple[str, ...]:
    """Return the outputs that are autograd leaves requiring a gradient."""
    return tuple(t.name for t in op.writes) if op.requires_gradient and op.gradient == "none" else ()


def without_recorded(op: Op) -> Op:
    """Return the operation without the outputs that it makes only if a gradient flows through it."""
    return op._replace(writes=tuple(t for t in op.writes if t.name not in op.recorded))


def _past_with_gradients(op: Op) -> tuple[str, ...]:
    return tuple(t.name for t in op.past) if op.gradient == "part" else ()


class Backward(NamedTuple):
    """The gradients that one operation's backward computes and the tensors that it keeps, given which need a gradient.

    targets  reads and weights that need a gradient
    pins     names of the tensors it keeps from forward
    weights  names of its weights
    wraps    names of the parameters that it creates
    past     names of what the pass before or the operations before the blocks left, if that needs gradients
    shapes   shapes of gradients that differ from their weights'
    becomes  targets whose gradient is a kept tensor
    sums     targets whose gradient is first computed in a broadcast shape
    early    tensors that are freed before the gradients are allocated
    late     tensors that are freed after them
    """

    targets: tuple[str, ...]
    pins: tuple[str, ...]
    weights: tuple[str, ...]
    wraps: tuple[str, ...]
    past: tuple[str, ...]
    shapes: Mapping[str, str]
    becomes: Mapping[str, str]
    sums: Mapping[str, Tensor]
    early: tuple[Tensor, ...]
    late: tuple[Tensor, ...]


NO_BACKWARD = Backward((), (), (), (), (), {}, {}, {}, (), ())


def _backward_of(op: Op, targets: tuple[str, ...]) -> Backward:
    past, keeps, weights, scratch_back = _past_with_gradients(op), op.keeps, op.weights, op.scratch_back
    if not (keeps or weights or scratch_back or op.wraps):  # as most operations
        return Backward(targets, (), (), (), past, {}, {}, {}, (), ())
    sums: dict[str, Tensor] = {}
    early: list[Tensor] = []
    late: list[Tensor] = []
    for s in scratch_back:
        if s.summed:
            sums.setdefault(s.of, s.tensor)
        elif (not s.of or s.of in targets) and s.unless not in targets:
            (early if s.early else late).append(s.tensor)
    return Backward(
        targets,
        tuple(dict.fromkeys([k.what for k in keeps if k.of in targets])),
        tuple([w.name for w in weights]),
        tuple([t.name for t in op.wraps]),
        past,
        {w.name: "0" if w.accumulates else w.gradient for w in weights if w.accumulates or w.gradient},
        {k.of: k.what for k in reversed(keeps) if k.is_gradient},
        sums,
        tuple(early),
        tuple(late),
    )


class GradientFlow:
    """The flow of gradients through operations, given which tensors need a gradient before them.

    entering  names that the operations read and that need a gradient before them
    flows     names that need a gradient after the operations, in addition to those before them
    """

    def __init__(
        self, ops: Ops, targets: Iterable[tuple[str, ...]], entering: frozenset[str], flows: frozenset[str]
    ) -> None:
        self._ops, self._targets, self.entering, self.flows = ops, targets, entering, flows

    @cached_property
    def keeps(self) -> bool:
        """Whether any operation keeps a tensor for its backward."""
        pairs = zip(self._ops, self._targets, strict=True)
        return any(keep.of in targets for op, targets in pairs for keep in op.keeps)

    @cached_property
    def backwards(self) -> tuple[Backward, ...]:
        """The backward of each operation."""
        pairs = zip(self._ops, self._targets, strict=True)
        return tuple(_backward_of(op, targets) if targets else NO_BACKWARD for op, targets in pairs)


def gradient_flow(ops: Ops, entering: AbstractSet[str]) -> GradientFlow:
    """Return how gradients flow through the operations; tensors named in `entering` need one."""
    key = Identity(ops)
    return _gradient_flow(key, frozenset(names_read(key) & entering))


@lru_cache(maxsize=64)
def names_read(ops: Identity[Ops]) -> KeysView[str]:
    """Return the names of the tensors that the operations read, in order."""
    return dict.fromkeys([r for op in ops.value for r in op.reads]).keys()


@lru_cache(maxsize=64)
def leaf_names(ops: Identity[Ops]) -> frozenset[str]:
    """Return the outputs of the operations that are autograd leaves requiring a gradient."""
    return frozenset(name for op in ops.value if op.requires_gradient for name in leaves(op))


@lru_cache(maxsize=64)
def _gradient_flow(ops: Identity[Ops], entering: frozenset[str]) -> GradientFlow:
    flows = set(entering)
    targets_of_each: list[tuple[str, ...]] = []
    for op in ops.value:
        targets: tuple[str, ...] = ()
        if op.gradient != "none":
            targets = tuple(filter(flows.__contains__, dict.fromkeys(op.reads)))
            if op.weights or op.wraps or op.past:  # unlike most operations
                weights = [w.name for w in op.weights if w.requires_grad]
                targets += (*weights, *[t.name for t in op.wraps], *_past_with_gradients(op))
            for t in op.writes if targets else ():
                if t.dtype in FLOATING:
                    flows.add(t.name)
        elif op.requires_gradient:
            flows.update(leaves(op))
        targets_of_each.append(targets)
    return GradientFlow(ops.value, targets_of_each, entering, frozenset(flows))


def last_uses(ops: Ops, keep: bool) -> tuple[tuple[str, ...], ...]:
    """Return, for each operation, the tensors that it uses and no later operation reads.

    A view counts as a use of its base. Operations that need recording run only if it is kept (`keep`).
    """
    key = Identity(ops)
    return _last_uses(key, keep or not _needs_recording(key))


@lru_cache(maxsize=64)
def _needs_recording(ops: Identity[Ops]) -> bool:
    return any(op.needs_recording for op in ops.value)


@lru_cache(maxsize=64)
def _last_uses(ops: Identity[Ops], keep: bool) -> tuple[tuple[str, ...], ...]:
    root: dict[str, str] = {}
    last: dict[str, int] = {}
    for i, op in enumerate(ops.value):
        for r in () if op.needs_recording and not keep else op.reads:
            last[root.get(r, r)] = i
        if op.view:
            root[op.writes[0].name] = root.get(op.reads[0], op.reads[0])
            for t in op.writes[1:]:
                root[t.name] = root[op.writes[0].name]
    ends: list[tuple[str, ...]] = []
    for i, op in enumerate(ops.value):
        written = [t.name for t in op.writes]
        names = (*written, *op.reads, *[t.name for t in op.past]) if op.past else (*written, *op.reads)
        ends.append(tuple(dict.fromkeys([base for n in names if last.get(base := root.get(n, n), i) == i])))
    return tuple(ends)


def are_holding(ops: Ops) -> tuple[bool, ...]:
    """Return, for each operation, whether its module, its node or a variable holds or releases tensors."""
    return _are_holding(Identity(ops))


@lru_cache(maxsize=64)
def _are_holding(ops: Identity[Ops]) -> tuple[bool, ...]:
    return tuple(bool(op.holds or op.releases or op.captures or op.requires_gradient) for op in ops.value)


def weights_used_again(ops: Ops) -> dict[str, int]:
    """Return the weights that train and that several of the operations use, each with the number of operations."""
    return dict(_weights_used_again(Identity(ops)))


@lru_cache(maxsize=64)
def _weights_used_again(ops: Identity[Ops]) -> tuple[tuple[str, int], ...]:
    uses = Counter(w.name for op in ops.value if op.gradient != "none" for w in op.weights if w.trains)
    return tuple((name, n) for name, n in uses.items() if n > 1)


@lru_cache(maxsize=64)
def parts_behind(ops: Identity[Ops]) -> Mapping[str, str]:
    """Map names to parts of a storage, for those that do not begin where their storage does: views of such a part."""
    parts: dict[str, str] = {}
    for op in ops.value:
        for i, t in enumerate(op.writes if op.view else ()):
            part = t.name if i else parts.get(op.reads[0])
            if part is not None:
                parts[t.name] = part
    return parts


def storages_behind(ops: Ops, inputs: Mapping[str, str] = MappingProxyType({})) -> Mapping[str, str]:
    """Map names to storages: those of `inputs` and those that the operations write or find left by the previous pass.

    A view has the storage of its base.
    """
    return _storages_behind(Identity(ops), tuple(inputs.items()))


@lru_cache(maxsize=64)
def _storages_behind(ops: Identity[Ops], inputs: tuple[tuple[str, str], ...]) -> Mapping[str, str]:
    behind = dict(inputs)
    for op in ops.value:
        for t in op.past:
            behind[t.name] = t.name
        for t in op.writes:
            behind[t.name] = behind[op.reads[0]] if op.view and op.reads[0] in behind else t.name
    return MappingProxyType(behind)


# Kinds of products that are recomputed: torch 2.13 _functorch/partitioners.py get_default_op_list.
_RECOMPUTED = ("", "grouped")


def saved_operations(ops: Ops, kind: str) -> frozenset[str]:
    """Return the names of the operations whose outputs a block's checkpoint keeps; all others are recomputed.

    all, alternate  every matrix product, or every second one, attention and reduce-scatters; none of bitsandbytes'
                    functions, which are not listed
    modules         what a module of the block reads from another, as if a checkpoint were around each module

    Source: torchtitan 0.3.0 distributed/activation_checkpoint.py SelectiveAC.
    """
    if kind == "modules":
        writers = {t.name: op.name for op in ops for t in op.writes}
        modules = {_module(op.name) for op in ops if op.weights}
        read = ((_module(op.name), writers[r]) for op in ops for r in op.reads if r in writers)
        return frozenset(writer for module, writer in read if module in modules and module != _module(writer))
    listed = [op for op in ops if not any(w.stored for w in op.weights)]
    products = [op.name for op in listed if op.product == "matrix"]
    again = products[1::2] if kind == "alternate" else ()
    kept = (op.name for op in listed if op.product not in _RECOMPUTED or op.name.endswith(".reduce_scatter"))
    return frozenset(kept).difference(again)


def part_begins(ops: Ops) -> tuple[int, ...]:
    """Return the index of each module's first operation."""
    modules = [_module(op.name) if op.writes else "" for op in ops]
    named = [i for i, module in enumerate(modules) if module]
    return tuple(i for before, i in pairwise((0, *named)) if not i or modules[i] != modules[before])


def _module(operation: str) -> str:
    return operation.partition(".")[0]
