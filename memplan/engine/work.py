"""The computations of a pass in order: forward, recomputation, backward. Structure only: no sizes.

One copy stands for a run of equal blocks, with the number of copies.
"""

from __future__ import annotations

from collections.abc import Mapping

from memplan.core.ir import Op, Stack, Tensor
from memplan.core.records import NamedTuple
from memplan.engine.frames import Frame, Node
from memplan.engine.gather import Gatherer
from memplan.engine.step import PLAIN, ExecutionOptions, run_pass
from memplan.engine.storages import Storage
from memplan.engine.tape import Tape


class Call(NamedTuple):
    """One computation: of an operation's outputs, or of gradients.

    part     forward; recomputed (for a checkpoint); backward; sum (of two gradients of one tensor)
    tensors  the tensors that the operation reads and keeps, by their names there; weights are not quantised here
    of       in backward, the outputs whose gradients came in
    targets  in backward, the tensors whose gradients are computed; in a sum, the tensor whose gradients are added
    copies   number of equal blocks that do the same
    """

    op: Op
    part: str
    tensors: Mapping[str, Tensor]
    of: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    copies: int


class _CallInRun(NamedTuple):
    call: Call
    run: int | None


class CallRecorder(Tape):
    """A tape that records computations, and no moments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_CallInRun] = []

    def computed(self, frame: Frame, op: Op) -> None:
        part = "recomputed" if self.phase == "backward" else "forward"
        self._add(Call(op, part, _known(frame, op), (), (), 1))

    def differentiated(self, frame: Frame, node: Node, incoming: list[tuple[Tensor, Storage]]) -> None:
        of, targets = tuple(t for t, _ in incoming), tuple(frame.scope[t]._replace(name=t) for t in node.targets)
        self._add(Call(node.op, "backward", _known(frame, node.op), of, targets, 1))

    def note(self) -> None:
        """Record no moments."""

    def _sum(self, like: Tensor, old: Storage | None, new: Storage, kind: str = "temp") -> Storage:
        if old is not None:
            self._add(Call(Op("sum"), "sum", {}, (), (like,), 1))
        return super()._sum(like, old, new, kind)

    def _add(self, call: Call) -> None:
        self.calls.append(_CallInRun(call, self._in_run))


def _known(frame: Frame, op: Op) -> dict[str, Tensor]:
    names = (*op.reads, *(w.name for w in op.weights), *(k.what for k in op.keeps))
    return {name: frame.scope[name] for name in names}


def work(
    stack: Stack,
    depth: Mapping[str, int],
    options: ExecutionOptions = PLAIN,
) -> tuple[Call, ...]:
    """Return the computations of one forward and backward pass, in order. The arguments are those of `lower`."""
    tape = CallRecorder()
    gatherer = Gatherer(tape, None, grads_exist=False)
    runs = run_pass(tape, gatherer, stack, depth, options).runs
    copies = [depth[axis] - counted + 1 for axis, counted in runs]
    return tuple(call._replace(copies=1 if run is None else copies[run]) for call, run in tape.calls)
