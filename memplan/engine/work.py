"""Work: a pass as the sequence of what it computes, forward, again, and backward. Structure only: no sizes.

Of a run of equal blocks one copy is run, and counts as often as the run has copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from memplan.core.ir import Op, SavedTensors, Stack, Tensor
from memplan.engine.gather import Gatherer
from memplan.engine.lower import Frame, Node, Storage, Tape
from memplan.engine.step import run_pass


class Call(NamedTuple):
    """One computation: of what an operation writes, or of the gradients it hands back.

    part     forward; recomputed, for a checkpoint; backward; sum, of two gradients of one tensor
    tensors  what the operation reads and keeps, by the names it has for them, its weights as if they were stored whole
    of       the outputs whose gradients came; empty but in backward
    targets  what gradients are made for; of a sum, the tensor whose two are added
    copies   how many equal blocks do the same
    """

    op: Op
    part: str
    tensors: Mapping[str, Tensor]
    of: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    copies: int


class _Noted(NamedTuple):
    call: Call
    run: int | None


class Worker(Tape):
    """A tape that notes what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[_Noted] = []

    def computed(self, frame: Frame, op: Op) -> None:
        part = "recomputed" if self.phase == "backward" else "forward"
        self._add(Call(op, part, _known(frame, op), (), (), 1))

    def differentiated(self, frame: Frame, node: Node, of: tuple[Tensor, ...]) -> None:
        targets = tuple(frame.scope[t]._replace(name=t) for t in node.targets)
        self._add(Call(node.op, "backward", _known(frame, node.op), of, targets, 1))

    def note(self) -> None:
        """Moments are not asked for."""

    def _sum(self, like: Tensor, old: Storage | None, new: Storage, kind: str = "temp") -> Storage:
        if old is not None:
            self._add(Call(Op("sum"), "sum", {}, (), (like,), 1))
        return super()._sum(like, old, new, kind)

    def _add(self, call: Call) -> None:
        self.noted.append(_Noted(call, self._in_run))


def _known(frame: Frame, op: Op) -> dict[str, Tensor]:
    names = (*op.reads, *(w.name for w in op.weights), *(k.what for k in op.keeps))
    return {name: frame.scope[name] for name in names}


def work(
    stack: Stack,
    depth: Mapping[str, int],
    autocast: str | None = None,
    checkpoint: bool = False,
    reentrant: bool = False,
    input_grad: bool = False,
    to_host: bool = False,
    saves: SavedTensors | None = None,
) -> tuple[Call, ...]:
    """What one forward and backward pass computes, in order. The arguments are those of `lower`."""
    tape = Worker()
    tape.saves = saves
    gatherer = Gatherer(tape, None, grads_exist=False)
    runs = run_pass(tape, gatherer, stack, depth, autocast, checkpoint, reentrant, input_grad, to_host).runs
    copies = [depth[axis] - counted + 1 for axis, counted in runs]
    return tuple(call._replace(copies=1 if run is None else copies[run]) for call, run in tape.noted)
