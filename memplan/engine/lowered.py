"""`Lowered`: a pass as moments, which models share that differ only in the number of layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from sys import intern

from memplan.core.ir import Stack
from memplan.core.records import NamedTuple
from memplan.engine.moments import Moment, PassMoments


class Lowered(NamedTuple):
    """A forward and backward pass as moments.

    moments  their counts index `sizes`
    kept     storages alive at the end of forward
    left     storages alive at the end of backward
    held     storages that variables of the script and the graph's nodes reference after backward
    host     tensors that checkpoints and operations keep in host memory
    sizes    shape and dtype of a storage; if labelled, also its kind, block, operation, name and source
    runs     for each run, the axis of its number of copies, and how many of them the counts already include
    """

    moments: PassMoments
    kept: Moment
    left: Moment
    held: Moment
    host: Moment
    sizes: tuple[tuple[str, ...], ...]
    runs: tuple[tuple[str, int], ...]

    @property
    def kinds(self) -> list[str]:
        """The kind of each size of a labelled pass; empty for tensors in host memory, which no moment counts."""
        return [key[2] if len(key) > 2 else "" for key in self.sizes]


_FEW = 12  # copies of a run that are enough to tell all that differ


def at_depth(
    stack: Stack, depth: Mapping[str, int], lowered: Callable[[tuple[tuple[str, int], ...]], Lowered]
) -> Lowered:
    """Return the pass of a stack, which models share that differ only in the number of layers.

    `lowered` is called with the number of copies of each run: at most `_FEW`, if one copy stands for all others. Layers
    are then numbered by the real depth: those of the first half from the start of their run, the others from its end.
    """
    few = {axis: min(n, _FEW) for axis, n in depth.items()}
    low = lowered(tuple(few.items()))
    if few == depth:
        return low
    alone = dict(low.runs)
    if any(n > _FEW and alone.get(axis, n) > _FEW // 2 for axis, n in depth.items()):
        return lowered(tuple(depth.items()))
    layers: dict[str, dict[str, str]] = {}  # block -> number -> number
    starts, real_starts = Counter[str](), Counter[str]()
    for run in stack.runs:
        n, first, period = few[run.times], run.blocks[0].name, len(run.blocks)
        for copy in range(n):
            real = copy if copy < _FEW // 2 else copy + depth[run.times] - n
            for i, block in enumerate(run.blocks):
                number = str(starts[first] + copy * period + i)
                layers.setdefault(block.name, {})[number] = str(real_starts[first] + real * period + i)
        starts[first] += n * period
        real_starts[first] += depth[run.times] * period
    return low._replace(moments=low.moments.renamed(lambda where: _renumbered(where, layers)))


def _renumbered(where: str, layers: Mapping[str, Mapping[str, str]]) -> str:
    """Return the name of an operation with the layer's number replaced."""
    for block, numbers in layers.items():
        if where.startswith(f"{block}."):
            number, dot, operation = where.removeprefix(f"{block}.").partition(".")
            if number in numbers:
                return intern(f"{block}.{numbers[number]}{dot}{operation}")
    return where
