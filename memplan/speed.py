"""How long a step takes, and what it costs: operations and bytes counted, the share of a card's peak assumed.

The operations are those that the memory estimate walks, so that what a method leaves out (LoRA's gradients of frozen
matrices) or does twice (a checkpoint's blocks) shows. Counting is derived; seconds rest on `memplan.catalogue.rates`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

from memplan.catalogue import flops
from memplan.catalogue.flops import Moved, Points
from memplan.engine.work import Call
from memplan.graph import Graph, built, worked
from memplan.ir import Tensor
from memplan.program import Structure, gradients_of, program, run_axes, trained_parameters
from memplan.resolve import decide
from memplan.spec import RunSpec
from memplan.units import ITEMSIZE

PARTS = ("forward", "recomputed", "inputs", "weights")

_Amount = tuple[tuple[tuple[str, ...], int], ...]  # a sum: a factor for every product of the run's axes


class _Product(NamedTuple):
    """Equal products: of one part and dtype, so many operations and bytes each, `times` in a pass."""

    part: str
    dtype: str
    operations: _Amount
    bytes: _Amount
    times: int


class _Pass(NamedTuple):
    """A forward and backward pass with the model's numbers put in: its products, all other bytes, and its calls."""

    products: tuple[_Product, ...]
    rest: _Amount
    calls: int


class Product(NamedTuple):
    """Equal products of a step: what one computes in, its floating-point operations and bytes, and how many they are."""

    dtype: str
    operations: int
    bytes: int
    times: int


class Work(NamedTuple):
    """What one optimizer step does on one GPU.

    tokens      batch x sequence x accumulation
    forward, recomputed, inputs, weights   floating-point operations of products: forward; once more, where a checkpoint
                computes its block again; of the gradients of activations; of the gradients of weights
    products    those of each size, for a roofline
    moved       bytes that everything else reads and writes
    update      bytes that the optimizer's step, clipping and adding up gradients read and write
    calls       kernels or so that are launched, but for the optimizer's
    """

    tokens: int
    forward: int
    recomputed: int
    inputs: int
    weights: int
    products: tuple[Product, ...]
    moved: int
    update: int
    calls: int

    @property
    def operations(self) -> int:
        return self.forward + self.recomputed + self.inputs + self.weights

    @property
    def bytes(self) -> int:
        """All bytes of the step, those of products too."""
        return sum(p.bytes * p.times for p in self.products) + self.moved + self.update


def work(run: RunSpec) -> Work:
    """What one optimizer step of the run does on one GPU. Raises MemplanError where the run cannot be answered."""
    decided = decide(run)
    p = program(decided.structure)
    b = run.batch
    axes = run_axes(p, b.micro, b.sequence, decided.half, decided.large_tiles)
    passed = _passed(decided.structure.graph)
    parts = dict.fromkeys(PARTS, 0)
    products: list[Product] = []
    values = _Values(axes)
    for q in passed.products:
        operations, times = values.of(q.operations), q.times * b.accumulation
        parts[q.part] += operations * times
        products.append(Product(q.dtype, operations, values.of(q.bytes), times))
    return Work(
        tokens=b.micro * b.sequence * b.accumulation,
        **parts,
        products=tuple(products),
        moved=values.of(passed.rest) * b.accumulation,
        update=_update(decided.structure) + _added(decided.structure) * (b.accumulation - 1),
        calls=passed.calls * b.accumulation,
    )


class _Values:
    """Products of a run's axes, each made once."""

    def __init__(self, axes: Mapping[str, int]) -> None:
        self._axes = axes
        self._known: dict[tuple[str, ...], int] = {}

    def of(self, amount: _Amount) -> int:
        total = 0
        for names, factor in amount:
            if names not in self._known:
                self._known[names] = prod(self._axes[name] for name in names)
            total += factor * self._known[names]
        return total


@lru_cache(maxsize=256)
def _passed(graph: Graph) -> _Pass:
    """The graph's calls as numbers."""
    _, axes = built(graph)
    sizes = _Sizes(axes)
    products: dict[tuple[str, str, _Amount, _Amount], int] = {}
    rest: dict[tuple[str, ...], int] = {}
    calls = 0

    def add(call: Call, part: str, points: Iterable[Points], own: list[Moved], beside: Iterable[Moved]) -> None:
        nonlocal calls
        operations = sizes.operations(points)
        if operations:
            key = (part, flops.computes_in(call.op, call.part == "backward"), operations, sizes.bytes(own))
            products[key] = products.get(key, 0) + call.copies
        for names, factor in (*sizes.bytes(beside), *(() if operations else sizes.bytes(own))):
            rest[names] = rest.get(names, 0) + factor * call.copies
        calls += call.copies if own else 0

    for call in worked(graph):
        op, tensors = call.op, call.tensors
        match call.part:
            case "sum":
                (like,) = call.targets
                add(call, "inputs", (), [Moved(like, flops.ADDING)], ())
            case "backward":
                for target in call.targets:
                    own, beside = flops.backward_bytes(op, tensors, call.of, target)
                    part = "inputs" if sizes.runs(target) else "weights"
                    add(call, part, flops.backward(op, tensors, target), own, beside)
                add(call, "inputs", (), [], flops.scratch_back(op, [t.name for t in call.targets]))
            case part:
                own, beside = flops.forward_bytes(op, tensors)
                add(call, part, flops.forward(op, tensors), own, beside)
    found = tuple(_Product(*key, times) for key, times in products.items())
    return _Pass(found, tuple(rest.items()), calls)


class _Sizes:
    """Shapes with a model's numbers put in."""

    def __init__(self, axes: Mapping[str, int]) -> None:
        self._axes = axes
        self._known: dict[str, tuple[tuple[str, ...], int]] = {}

    def elements(self, shape: str) -> tuple[tuple[str, ...], int]:
        """A shape's axes that the run decides, and how many elements it has at every point of those."""
        if shape not in self._known:
            tokens = shape.split()
            free = tuple(sorted(t for t in tokens if not t.isdigit() and t not in self._axes))
            factor = prod(int(t) if t.isdigit() else self._axes[t] for t in tokens if t.isdigit() or t in self._axes)
            self._known[shape] = free, factor
        return self._known[shape]

    def runs(self, tensor: Tensor) -> bool:
        """Whether the run decides how large the tensor is, as it does of activations."""
        return bool(self.elements(tensor.shape)[0])

    def operations(self, points: Iterable[Points]) -> _Amount:
        return _summed((*self.elements(p.shape), p.operations) for p in points)

    def bytes(self, moved: Iterable[Moved]) -> _Amount:
        def each() -> Iterable[tuple[tuple[str, ...], int, int]]:
            for tensor, times in moved:
                free, factor = self.elements(tensor.shape)
                name, _, per = tensor.dtype.partition("/")
                yield free, factor * ITEMSIZE[name] // int(per or 1), times

        return _summed(each())


def _summed(terms: Iterable[tuple[tuple[str, ...], int, int]]) -> _Amount:
    total: dict[tuple[str, ...], int] = {}
    for free, factor, times in terms:
        total[free] = total.get(free, 0) + factor * times
    return tuple(sorted(total.items()))


@lru_cache(maxsize=2048)
def _update(structure: Structure) -> int:
    """Bytes that clipping and the optimizer's step move. States in the host's memory are counted as if on the card."""
    p = program(structure)
    gradients = sum(h.bytes * h.copies for h in gradients_of(structure))
    weights = sum(prod(t.shape) * ITEMSIZE[t.dtype] * t.copies for t in trained_parameters(structure))
    passes = flops.IN_LISTS if p.optimizer.listed else flops.AT_ONCE
    stepped = passes.states * (p.states + p.host) + passes.gradients * gradients + passes.parameters * weights
    before = (flops.CLIPPING if structure.clips else 0) + (flops.UNSCALING if structure.scales else 0)
    return stepped + before * gradients


@lru_cache(maxsize=2048)
def _added(structure: Structure) -> int:
    """Bytes that adding a later pass's gradients moves."""
    return flops.ADDING * sum(h.bytes * h.copies for h in gradients_of(structure))
