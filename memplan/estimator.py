"""The hinge: a run becomes a program, a program and a batch become an answer.

Pure: no network, no printing, no state but caches; the same run gives the same answer on any thread.
"""

from __future__ import annotations

from operator import mul
from typing import TYPE_CHECKING, NamedTuple

from memplan.answer import Card, Estimate, Parameters, Peak, Phase
from memplan.catalogue.overhead import cublas_workspace, cuda_context
from memplan.engine.walk import largest, values
from memplan.program import PHASES, Program, program, run_axes
from memplan.resolve import Decided, check_batch, decide
from memplan.spec import RunSpec
from memplan.usage import Replay, Usage, around

if TYPE_CHECKING:
    from memplan.calibration import Calibration


def estimate(run: RunSpec, calibration: Calibration | None = None) -> Estimate:
    """How much memory the run takes, when, and whether it fits.

    `calibration` is a machine's own profile, for runs on the card it is of; others are answered without it.

    Raises SpecError, UnknownNameError, ConfigError or FactsMissingError (all MemplanError) where the run cannot be
    answered. A run that does not fit is an answer, not an error.
    """
    decided = decide(run)
    walked = walk(run, decided)
    p = walked.program
    note = check_batch(run, p.structure.graph.model)
    top = walked.phases[walked.peak]
    replay = Replay(decided.structure, tuple(walked.axes.items()), walked.workspace, run.loop.expandable_segments)
    context = cuda_context(decided.gpu.compute_capability if decided.gpu else None)
    if calibration is not None and (decided.gpu is None or calibration.gpu != decided.gpu.name):
        calibration = None
    notes = [*decided.notes, *((note,) if note else ()), *((calibration.named(),) if calibration else ())]
    return Estimate(
        run,
        decided,
        Parameters(p.total_parameters, p.trainable_parameters, p.total_parameters),
        Usage(replay, p, walked.phases[0].peak, top.peak, decided.gpu, around(context, calibration)),
        Card(decided.gpu.name, decided.gpu.usable, 1) if decided.gpu else None,
        Peak(top.phase, top.where),
        tuple(walked.phases),
        p.host,
        tuple(notes),
        walked,
        calibration,
    )


class Numbers(NamedTuple):
    """The values of a program's variables and of its chain of products for one run."""

    values: list[int]
    products: list[int]


class Walked(NamedTuple):
    """A run's peaks, phase by phase, and which is the largest."""

    program: Program
    axes: dict[str, int]
    numbers: Numbers
    workspace: int
    phases: list[Phase]
    moments: list[tuple[bool, int]]  # per phase: whether in a later micro-batch, and the moment's index (-1: none)
    peak: int


def walk(run: RunSpec, decided: Decided) -> Walked:
    """Put batch and sequence into the run's program: the peak of every phase of the first and of later steps."""
    p = program(decided.structure)
    axes = run_axes(p, run.batch.micro, run.batch.sequence, decided.half, decided.large_tiles)
    numbers = Numbers(values(p.variables, axes), values(p.products, axes))
    capability = decided.gpu.compute_capability if decided.gpu else None
    workspace = cublas_workspace(capability).usual
    found = [(False, *_best(p, False, phase, numbers)) for phase in PHASES]
    if p.structure.accumulates:
        later = [(True, *_best(p, True, phase, numbers)) for phase in PHASES]
        found = [max(a, (b[0], b[1] + p.gradients, b[2]), key=_bytes) for a, b in zip(found, later, strict=True)]
    fixed = p.parameters + p.buffered + p.scaler + workspace
    phases = [Phase("load", None, p.loading, "")]
    moments = [(False, -1)]
    updates = fixed + workspace + p.gradients + sum(map(mul, p.held, numbers.values))
    made = p.states and not p.optimizer.at_once
    steps = (1, 2) if made or p.optimizer.first != p.optimizer.later else (None,)
    for step in steps:
        states = p.states if step == 2 or p.optimizer.at_once else 0
        for (micro, moving, index), phase in zip(found, PHASES, strict=True):
            second = workspace if phase == "backward" or step != 1 else 0
            phases.append(Phase(phase, step, fixed + second + states + moving, p.where[micro][index]))
            moments.append((micro, index))
        scratch = p.optimizer.first if step == 1 else p.optimizer.later
        stepping, clipped = updates + p.states + scratch, updates + states + p.clipping
        phases.append(Phase("step", step, max(stepping, clipped), "optimizer" if stepping >= clipped else "clipping"))
        moments.append((False, -1))
    peak = max(range(len(phases)), key=lambda i: (phases[i].peak, i))
    return Walked(p, axes, numbers, workspace, phases, moments, peak)


def _best(p: Program, later: bool, phase: str, numbers: Numbers) -> tuple[int, int]:
    return largest((p.later if later else p.first)[phase], *numbers)


def _bytes(found: tuple[bool, int, int]) -> int:
    return found[1]
