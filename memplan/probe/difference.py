"""A trace beside the estimate of the same run: phase by phase, and tensor by tensor where they differ.

Tensors are matched by their rounded bytes: two that are equally large stand for each other. What is left over at a
phase's peak is a line, and the lines of a phase sum to the difference of its peaks.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

from memplan.catalogue.hardware.overhead import cublas_workspace
from memplan.engine.walk import alive, size
from memplan.estimate import inference, ledger
from memplan.estimate.answer import Estimate
from memplan.estimate.answer import Line as Estimated
from memplan.estimate.side_tasks import asides
from memplan.estimate.walk import Walked, walk
from memplan.probe.run.trace import Storage, Traced, TracedPhase
from memplan.program.graph import built
from memplan.program.run import Decided
from memplan.program.training.program import pass_of
from memplan.resolve.decide import decide
from memplan.spec.run import RunSpec

Verdict = Literal["lacks", "too many", "lives too long", "goes too early"]


class PhaseLine(NamedTuple):
    """One phase of one step: its peak as traced and as estimated, without cuBLAS's workspaces, and where each was."""

    phase: str
    step: int
    traced: int
    estimated: int
    traced_at: str
    estimated_at: str


class Line(NamedTuple):
    """Tensors of one size that the trace and the estimate do not both have at a phase's peak.

    verdict     of the estimate: it lacks them, has too many, keeps them too long or lets them go too early
    bytes       how much of the estimate's peak less the trace's they are: negative where it has less
    what, where what they are and which operation or module they belong to, in the words of the side that has them
    """

    phase: str
    step: int
    verdict: Verdict
    what: str
    where: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] (as in the ledger)
    bytes: int


def phases(traced: Traced, answer: Estimate) -> tuple[PhaseLine, ...]:
    """Every phase that both have, in order."""
    return tuple(pair.line for pair in _pairs(traced, answer))


def difference(traced: Traced, answer: Estimate) -> tuple[Line, ...]:
    """Every tensor in which they differ, phase by phase, largest first. Empty where they are equal to the byte.

    Loading is left out unless it is the peak of either: before that, what is loaded first decides what is there.
    """
    decided = decide(answer.asked)
    theirs = _Trained(_walked(answer.asked, decided), decided) if answer.asked.task == "train" else _Inferred(decided)
    found: list[Line] = []
    loads = "load" in (traced.peak_phase, answer.peak.phase)
    for pair in _pairs(traced, answer):
        if pair.line.phase == "load" and not loads:
            continue
        lines = (line for line in _lines(pair, traced, theirs) if line.bytes)
        found += sorted(lines, key=lambda line: (-abs(line.bytes), line.what))
    return tuple(found)


def _walked(run: RunSpec, decided: Decided) -> Walked:
    """The steps, and what comes beside them."""
    walked = walk(run, decided)
    return walked.followed_by(asides(run, walked, decided, None))


class _Pair(NamedTuple):
    line: PhaseLine
    traced: TracedPhase
    number: int  # of the estimate's phase


# Phases of an estimate, and those of a trace that they are compared with: clipping is part of an estimate's step.
_ASIDES = ("eval", "generate", "save", "merge")  # as loading, they are of no step
_SAME = {name: (name,) for name in ("load", "forward", "loss", "backward", "encode", "prefill", "decode", *_ASIDES)}
_STEP = {"step": ("clip", "step")}


def _pairs(traced: Traced, answer: Estimate) -> list[_Pair]:
    """What comes beside the steps last."""
    return sorted(_each(traced, answer), key=lambda pair: pair.line.phase in _ASIDES)


def _each(traced: Traced, answer: Estimate) -> Iterator[_Pair]:
    workspace = cublas_workspace(_capability(answer)).usual
    there = {(p.phase, p.step) for p in traced.phases}
    for step in sorted({p.step for p in traced.phases}):
        estimated: dict[str, int] = {}
        for i, phase in enumerate(answer.phases):
            if phase.step in (None, min(step, 2)) and (phase.phase in ("load", *_ASIDES)) == (step == 0):
                estimated[phase.phase] = i
        if ("loss", step) not in there and {"forward", "loss"} <= estimated.keys():  # a loss that has no head apart
            loss = estimated.pop("loss")
            estimated["forward"] = max(estimated["forward"], loss, key=lambda i: answer.phases[i].peak)
        for name, i in estimated.items():
            wanted = {**_SAME, **_STEP}[name]
            ours = [p for p in traced.phases if p.phase in wanted and p.step == step]
            if not ours:
                continue
            top = max(ours, key=lambda p: p.peak)
            phase = answer.phases[i]
            second = answer.asked.task == "train" and (phase.phase in ("backward", "step") or phase.step != 1)
            handles = 0 if name == "load" else 1 + second
            yield _Pair(
                PhaseLine(name, step, top.peak, phase.peak - handles * workspace, _place(traced, top), phase.where),
                top,
                i,
            )


def _capability(answer: Estimate) -> tuple[int, int] | None:
    from memplan.catalogue.hardware.gpus import find_gpu

    return find_gpu(answer.gpu.name).compute_capability if answer.gpu else None


def _place(traced: Traced, phase: TracedPhase) -> str:
    """The operation at a traced peak, and its module."""
    event = traced.events[phase.peak_at]
    storage = traced.storages[event if event >= 0 else ~event]
    return f"{storage.module}.{storage.op}".removeprefix(".")


class _Tensors(Protocol):
    """What an estimate has in memory, by the number of a phase."""

    def lines(self, phase: int) -> Sequence[Estimated]:
        """The tensors alive at its peak."""
        ...

    def most(self, phase: int) -> Mapping[int, int]:
        """How many tensors of each size there are at once in it, at most, beside those that stay."""
        ...


class _Trained(NamedTuple):
    walked: Walked
    decided: Decided

    def lines(self, phase: int) -> Sequence[Estimated]:
        return ledger.lines(self.walked._replace(peak=phase), self.decided)

    def most(self, phase: int) -> Mapping[int, int]:
        return _most_estimated(self.walked, self.decided, phase)


class _Inferred:
    def __init__(self, decided: Decided) -> None:
        self._walked = inference.walk(decided)

    def lines(self, phase: int) -> Sequence[Estimated]:
        return self._walked.lines(self._walked.phases[phase].phase)

    def most(self, phase: int) -> Mapping[int, int]:
        most, stays = Counter[int](), Counter[int]()
        name = self._walked.phases[phase].phase
        for counts in self._walked.counts(name):
            for bytes_, count in counts.items():
                most[bytes_] = max(most[bytes_], count)
        for line in self.lines(phase):
            if line.kind in ("parameter", "buffer") and line.count:
                stays[line.bytes // line.count] += line.count
        return most + stays


def _lines(pair: _Pair, traced: Traced, estimated: _Tensors) -> Iterator[Line]:
    name, step = pair.line.phase, pair.line.step
    ours: dict[int, list[Storage]] = defaultdict(list)
    for storage in traced.alive_at(pair.traced.peak_at):
        ours[storage.bytes].append(storage)
    theirs: dict[int, list[Estimated]] = defaultdict(list)
    lumps: list[Estimated] = []
    for line in estimated.lines(pair.number):
        if line.what.startswith("cuBLAS"):
            continue
        if line.shape or line.dtype or line.kind != "temp":
            theirs[line.bytes // line.count].append(line)
        else:
            lumps.append(line)  # a step's scratch, in one number
    most_traced = _most_traced(traced, pair.traced)
    most_estimated = estimated.most(pair.number)
    scratch: list[Storage] = []
    for bytes_ in {*ours, *theirs}:
        have, want = Counter[str](), Counter[str]()
        for storage in ours[bytes_]:
            want[storage.kind] += 1
        for line in theirs[bytes_]:
            have[line.kind] += line.count
        net = have.total() - want.total()
        if net < 0:
            group = _left_over(ours[bytes_], have, -net)
            if lumps:  # what the step allocates is compared as a whole
                temporary = [s for s in group if s.kind == "temp"]
                scratch += temporary
                group = [s for s in group if s.kind != "temp"]
            verdict = "goes too early" if most_estimated.get(bytes_, 0) >= want.total() else "lacks"
            yield from _of_trace(name, step, verdict, bytes_, group)
        elif net > 0:
            verdict = "lives too long" if most_traced.get(bytes_, 0) >= have.total() else "too many"
            yield from _of_estimate(name, step, verdict, bytes_, theirs[bytes_], want, net)
    if lumps:
        less = sum(line.bytes for line in lumps) - sum(s.bytes for s in scratch)
        if less:
            verdict = "lacks" if less < 0 else "too many"
            what = lumps[0].what
            yield Line(name, step, verdict, what, "optimizer", "temp", (), "", max(1, len(scratch)), less)


def _left_over(storages: Sequence[Storage], have: Counter[str], number: int) -> list[Storage]:
    """Which of equally large storages are taken to be those too many: of the kinds the estimate has fewest of."""
    left = Counter(have)
    over: list[Storage] = []
    matched: list[Storage] = []
    for storage in storages:
        if left[storage.kind] > 0:
            left[storage.kind] -= 1
            matched.append(storage)
        else:
            over.append(storage)
    return [*over, *matched][:number]


def _of_trace(phase: str, step: int, verdict: Verdict, bytes_: int, storages: Iterable[Storage]) -> Iterator[Line]:
    """A line for every operation and module (layers counted together) that made some of `storages`."""
    groups: dict[tuple[str, str, str], list[Storage]] = defaultdict(list)
    for storage in storages:
        groups[storage.op, re.sub(r"\.\d+(?=\.|$)", ".N", storage.module), storage.kind].append(storage)
    for (op, module, kind), group in groups.items():
        first, count = group[0], len(group)
        yield Line(phase, step, verdict, op, module, kind, first.shape, first.dtype, count, -count * bytes_)


def _of_estimate(
    phase: str, step: int, verdict: Verdict, bytes_: int, lines: Sequence[Estimated], want: Counter[str], number: int
) -> Iterator[Line]:
    """Lines for `number` of the estimate's tensors of one size: of the kinds the trace has fewest of first."""
    left = Counter(want)
    for line in sorted(lines, key=lambda line: left[line.kind]):
        matched = min(line.count, max(0, left[line.kind]))
        left[line.kind] -= matched
        over = min(number, line.count - matched)
        if over:
            number -= over
            yield Line(
                phase, step, verdict, line.what, line.where, line.kind, line.dims, line.dtype, over, over * bytes_
            )
    for line in lines:  # kinds that cancel: named by whichever is there
        if number <= 0:
            return
        over = min(number, line.count)
        number -= over
        yield Line(phase, step, verdict, line.what, line.where, line.kind, line.dims, line.dtype, over, over * bytes_)


def _most_traced(traced: Traced, phase: TracedPhase) -> Mapping[int, int]:
    """How many storages of each size were alive at once, at most, in a phase until its peak."""
    counts = Counter(s.bytes for s in traced.storages if s.born < phase.start <= s.died)
    most = Counter(counts)
    for event in traced.events[phase.start : phase.end]:
        bytes_ = traced.storages[event if event >= 0 else ~event].bytes
        counts[bytes_] += 1 if event >= 0 else -1
        most[bytes_] = max(most[bytes_], counts[bytes_])
    return most


def _most_estimated(walked: Walked, decided: Decided, index: int) -> Mapping[int, int]:
    """How many tensors of each size the estimate has alive at once in a phase, at most, beside those that stay."""
    later, moment = walked.moments[index]
    most = Counter[int]()
    if moment < 0:
        return most
    low = pass_of(decided.structure, later)
    axes = {**built(decided.structure.graph)[1], **walked.axes}
    sizes = [size(key[0], key[1], axes)[1] for key in low.sizes]
    stays = Counter[int]()
    for line in ledger.lines(walked._replace(peak=index), decided):
        if line.kind in ("parameter", "buffer", "optstate") and line.count:
            stays[line.bytes // line.count] += line.count
    for at in low.moments:
        if at.phase == walked.phases[index].phase:
            counts = Counter[int]()
            for key, count in alive(at, low.runs, axes).items():
                counts[sizes[key]] += count
            for bytes_, count in counts.items():
                most[bytes_] = max(most[bytes_], count)
    return most + stays
