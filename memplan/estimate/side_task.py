"""One side task of a training run (an evaluation, a save or a merge) at its peak."""

from __future__ import annotations

from typing import NamedTuple

from memplan.engine.allocator import Allocator, Block
from memplan.engine.step import Lowered
from memplan.program.graph import Graph, Held, inferred, recorded_inference
from memplan.program.inference.passes import Step
from memplan.program.inference.replay import Left, load, replayed

_REPLAYED = 8  # batches whose passes are replayed for what torch reserves, and the last one's


class Aside(NamedTuple):
    """One of the things a run does beside its steps, at its peak.

    standing    bytes that are there throughout it; of a process of its own (`alone`) its weights
    held        what is there beside that, and beside a pass
    passes      the passes of a model it runs, with their axes; `top` is that of the peak, and the moment in it
    moving      bytes alive at that moment
    kept        bytes of what an evaluation keeps of a batch on the GPU, of so many `batches`; whether it `concatenates`
    host        bytes in host memory
    loads       of a process of its own, the most while it loads
    """

    phase: str
    where: str
    standing: int
    held: tuple[Held, ...] = ()
    passes: tuple[tuple[Step, tuple[tuple[str, int], ...]], ...] = ()
    top: tuple[int, int] = (-1, -1)
    moving: int = 0
    kept: tuple[int, ...] = ()
    batches: int = 1
    concatenates: bool = True
    host: int = 0
    alone: Graph | None = None
    loads: int = 0

    @property
    def beside(self) -> int:
        """Bytes of what is held."""
        return sum(h.bytes * h.copies for h in self.held)

    @property
    def peak(self) -> int:
        return max(self.loads, self.standing + self.moving + self.beside)

    def low(self, i: int, labelled: bool = False) -> Lowered:
        """The moments of one of its passes."""
        step, _ = self.passes[i]
        return inferred(step.graph, labelled, step.division)

    def replay(self, allocator: Allocator) -> None:
        """Make and free what the aside does. In a process of its own, that begins with loading."""
        if self.alone is not None:
            load(self.alone, allocator)
        if self.phase == "eval":
            self._replay_batches(allocator)
            return
        blocks = [allocator.alloc(h.bytes) for h in self.held for _ in range(h.copies)]
        self._replay_passes(allocator)
        for block in blocks:
            allocator.free(block)

    def _replay_passes(self, allocator: Allocator) -> None:
        left: list[Left] = []
        for step, axes in self.passes:
            left = replayed(recorded_inference(step.graph, step.division), dict(axes), allocator, left)
        while left:
            allocator.free(left.pop().block)

    def _replay_batches(self, allocator: Allocator) -> None:
        """Batches, of which predictions are kept; of more than a few the last one's pass stands for the rest."""
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


def _free(blocks: list[Block], allocator: Allocator) -> None:
    while blocks:
        allocator.free(blocks.pop())
