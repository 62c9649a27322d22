"""One side task of a training run (an evaluation, a generation, a save or a merge) at its peak."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE, rounded
from memplan.engine.allocator import Allocator, Block
from memplan.program.graph import Graph, TensorGroup
from memplan.program.inference.passes import SizedPass
from memplan.program.inference.replay import NOTHING, load, replay_pass
from memplan.program.training.program import Program

_REPLAYED = 8  # batches whose passes are replayed, in addition to the last one


class BetweenSteps(NamedTuple):
    """The program of a training run, for what it holds between two steps; `workspace` is cuBLAS's for one handle."""

    program: Program
    workspace: int

    @property
    def bytes(self) -> int:
        return self.program.between_steps(self.workspace)


class SideTask(NamedTuple):
    """One side task of a run, at its peak.

    phase              eval, generate, save or merge
    name               the operation at the peak, or what precedes the operation's name if it is in a pass
    persistent_bytes   bytes held throughout; for a separate process (`own_process_graph`), its weights
    held               tensors held in addition, also during a pass
    passes             the model's passes
    at                 the pass with the peak; -1 if it is in none
    kept               bytes of each tensor that an evaluation keeps of a batch on the GPU
    batches            how many batches are kept
    concatenates       whether the kept tensors are concatenated
    host               bytes in host memory
    own_process_graph  the graph of a separate process, if the task runs in one
    loads              peak bytes while that process loads
    empties_cache      torch's cached segments are freed before it
    moved              parts of the trainer that are on the host meanwhile: `parameters`, `optimizer`
    """

    phase: str
    name: str
    persistent_bytes: int
    held: tuple[TensorGroup, ...] = ()
    passes: tuple[SizedPass, ...] = ()
    at: int = -1
    kept: tuple[int, ...] = ()
    batches: int = 1
    concatenates: bool = True
    host: int = 0
    own_process_graph: Graph | None = None
    loads: int = 0
    empties_cache: bool = False
    moved: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The operation at the peak."""
        return self.name if self.at < 0 else self.name + self.passes[self.at].peak.where

    @property
    def top(self) -> tuple[int, int]:
        """The pass and the moment of the peak; (-1, -1) if it is in no pass."""
        return self.at, self.passes[self.at].peak.moment if self.at >= 0 else -1

    @property
    def moving(self) -> int:
        """Bytes alive at that moment of the pass."""
        return self.passes[self.at].peak.bytes if self.at >= 0 else 0

    @property
    def held_bytes(self) -> int:
        """Bytes of what is held."""
        return sum(h.bytes * h.copies for h in self.held)

    @property
    def peak(self) -> int:
        return max(self.loads, self.persistent_bytes + self.moving + self.held_bytes)

    def replay(self, allocator: Allocator) -> None:
        """Replay the task's allocations and frees. A separate process starts by loading the model."""
        if self.empties_cache:
            allocator.release()
        if self.own_process_graph is not None:
            load(self.own_process_graph, allocator)
        if self.phase == "eval":
            self._replay_batches(allocator)
            return
        blocks = [allocator.alloc(h.bytes) for h in self.held for _ in range(h.copies)]
        self._replay_passes(allocator)
        for block in blocks:
            allocator.free(block)

    def _replay_passes(self, allocator: Allocator) -> None:
        left = NOTHING
        for each in self.passes:
            left = replay_pass(each, allocator, left)
        _free([*left.blocks], allocator)

    def _replay_batches(self, allocator: Allocator) -> None:
        """Replay the batches whose predictions are kept; only the first few and the last replay their passes."""
        together: list[Block] = []
        last: list[Block] = []
        for count in range(1, self.batches + 1):
            if count <= _REPLAYED or count == self.batches:
                self._replay_passes(allocator)
            new = [allocator.alloc(bytes_) for bytes_ in self.kept]
            _free(last, allocator)
            if not self.concatenates or count == 1:
                together += new
                continue
            joined = [allocator.alloc(count * bytes_) for bytes_ in self.kept]
            _free(together, allocator)
            together, last = joined, new
        _free([*together, *last], allocator)


def tensors(
    kind: str, what: str, sizes: Sequence[int], dtype: str, source: str, where: str, copies: int = 1
) -> TensorGroup:
    """Return a group of tensors of some sizes, which may be expressions."""
    bytes_ = rounded(prod(sizes) * ITEMSIZE[dtype])
    return TensorGroup(kind, what, where, " ".join(map(str, sizes)), dtype, copies, bytes_, source)


def largest(moments: Iterable[SideTask]) -> SideTask:
    """Return a task at its peak, given it at each moment that may be its peak; the first of equals."""
    return max(moments, key=lambda moment: moment.peak)


def _free(blocks: list[Block], allocator: Allocator) -> None:
    while blocks:
        allocator.free(blocks.pop())
