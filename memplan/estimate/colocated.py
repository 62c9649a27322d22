"""A vLLM engine on the GPU that trains: the generation in a step by it, and whether it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.core.cached_property import cached_property
from memplan.estimate.serving import why_not_started
from memplan.estimate.side_task import SideTask
from memplan.estimate.usage import Answer, Replay, Usage
from memplan.program.graph import tensor_group
from memplan.program.serving.budget import Budget
from memplan.resolve.colocated import awake

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration
    from memplan.spec.run import RunSpec


def by_engine(b: Budget, standing: SideTask, pushed: SideTask, run: RunSpec) -> tuple[SideTask, SideTask]:
    """Return the generation by a colocated vLLM engine at its largest step, and while the weights are pushed to it,
    when a sleeping one has woken its weights only."""
    woken = awake(b, run.profile) if run.serving.sleep else ()
    step = tensor_group("temp", "vLLM's step", b.step.bytes, "uint8", "vllm 0.33.0 v1/worker/gpu_model_runner.py")
    batch = (h for h in pushed.held if h.where == "generate")
    task = standing._replace(name=f"vLLM: {b.step.where}", held=(*batch, *woken, step), empties_cache=bool(woken))
    return task, pushed._replace(held=(*pushed.held, *woken[1:]), empties_cache=bool(woken))


class ColocatedUsage(Usage):
    """Usage of a card that a run shares with an engine: it does not start if vLLM refuses the share that it gets."""

    def __init__(self, walk: Replay, engine: Budget, calibration: Calibration | None) -> None:
        super().__init__(walk, calibration)
        self._engine = engine

    @cached_property
    def is_ruled_out(self) -> bool:
        return not self._engine.starts or super().is_ruled_out

    @property
    def answer(self) -> Answer | None:
        return super().answer if self._engine.starts or not self.may_fit else "does not start"

    @property
    def reason(self) -> str | None:
        return None if self._engine.starts else why_not_started(self._engine, self._engine)
