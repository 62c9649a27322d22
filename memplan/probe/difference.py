"""Compare a trace with the estimate of the same run: phase by phase, and tensor by tensor if they differ.

Tensors are matched by their rounded bytes; equally large tensors are interchangeable. Each unmatched group at a phase's
peak is a line, and the lines of a phase sum to the difference of its peaks.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from memplan.catalogue.hardware.overhead import cublas_workspace
from memplan.core.records import NamedTuple
from memplan.estimate.answer import Estimate, Phase, Walk
from memplan.estimate.answer import Line as Estimated
from memplan.probe.run.trace import TracedPhase, TracedRun, TracedStorage

Verdict = Literal["lacks", "too many", "lives too long", "goes too early"]


class PhaseLine(NamedTuple):
    """One phase of one step: its traced and estimated peaks, without cuBLAS's workspaces, and the place of each."""

    phase: str
    step: int
    traced: int
    estimated: int
    traced_at: str
    estimated_at: str


class Mismatch(NamedTuple):
    """Tensors of one size that only the trace or only the estimate has at a phase's peak.

    verdict     about the estimate: tensors are missing, too many, freed too late or freed too early
    bytes       contribution to the estimate's peak minus the trace's: negative if the estimate has less
    what, where the tensors, and their operation or module, as named by the side that has them
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


def phases(traced: TracedRun, answer: Estimate) -> tuple[PhaseLine, ...]:
    """Return every phase that both the trace and the estimate have, in order."""
    return tuple(pair.line for pair in _pairs(traced, answer))


def difference(traced: TracedRun, answer: Estimate) -> tuple[Mismatch, ...]:
    """Return the tensors in which they differ, phase by phase, largest first. Empty if they agree to the byte.

    Loading is skipped unless it is the peak of either side, because its tensors depend on the order of loading.
    """
    lines: list[Mismatch] = []
    loads = "load" in (traced.peak_phase, answer.peak.phase)
    for pair in _pairs(traced, answer):
        if pair.line.phase == "load" and not loads:
            continue
        phase_lines = (line for line in _lines(pair, traced, answer.walk) if line.bytes)
        lines += sorted(phase_lines, key=lambda line: (-abs(line.bytes), line.what))
    return tuple(lines)


class _Pair(NamedTuple):
    line: PhaseLine
    traced: TracedPhase
    number: int  # of the estimate's phase


# The traced phases that each estimated phase is compared with: an estimate's step includes clipping.
_ASIDES = ("eval", "generate", "rollout", "reward", "save", "merge")  # like loading, they belong to no step
_SAME = {name: (name,) for name in ("load", "forward", "loss", "backward", "encode", "prefill", "decode", *_ASIDES)}
_STEP = {"step": ("clip", "step")}


def _pairs(traced: TracedRun, answer: Estimate) -> list[_Pair]:
    """Return the phases that both have, side tasks last."""
    return sorted(_iter_pairs(traced, answer), key=lambda pair: pair.line.phase in _ASIDES)


def _iter_pairs(traced: TracedRun, answer: Estimate) -> Iterator[_Pair]:
    workspace = cublas_workspace(_capability(answer)).usual
    traced_phases = {(p.phase, p.step) for p in traced.phases}
    for step in sorted({p.step for p in traced.phases}):
        estimated: dict[str, int] = {}
        for i, phase in enumerate(answer.phases):
            is_aside = phase.phase in _ASIDES and (phase.phase, step) in traced_phases and step != 1  # with states
            is_outside = phase.phase in ("load", *_ASIDES)
            if phase.step in (None, min(step, 2)) and (is_aside or is_outside == (step == 0)):
                estimated[phase.phase] = i
        if ("loss", step) not in traced_phases and estimated.keys() >= {"forward", "loss"}:
            # the traced model, or its trainer with a reference model, computes the loss inside forward
            inside = [estimated.pop(name) for name in ("loss", "reference", "teacher") if name in estimated]
            estimated["forward"] = max(estimated["forward"], *inside, key=lambda i: answer.phases[i].peak)
        for name, i in estimated.items():
            names = {**_SAME, **_STEP}[name]
            candidates = [p for p in traced.phases if p.phase in names and p.step == step]
            if not candidates:
                continue
            top = max(candidates, key=lambda p: p.peak)
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


def _place(traced: TracedRun, phase: TracedPhase) -> str:
    """Return the module and operation at a traced peak."""
    event = traced.events[phase.peak_at]
    storage = traced.storages[event if event >= 0 else ~event]
    return f"{storage.module}.{storage.op}".removeprefix(".")


def _lines(pair: _Pair, traced: TracedRun, walk: Walk) -> Iterator[Mismatch]:
    name, step = pair.line.phase, pair.line.step
    traced_by_size: dict[int, list[TracedStorage]] = defaultdict(list)
    for storage in traced.alive_at(pair.traced.peak_at):
        traced_by_size[storage.bytes].append(storage)
    estimated_by_size: dict[int, list[Estimated]] = defaultdict(list)
    lumps: list[Estimated] = []
    for line in walk.lines(walk.phases[pair.number]):
        if line.what.startswith("cuBLAS"):
            continue
        if line.shape or line.dtype or line.kind != "temp":
            estimated_by_size[line.bytes // line.count].append(line)
        else:
            lumps.append(line)  # a step's scratch, estimated as one number
    most_traced = _most_traced(traced, pair.traced)
    most_estimated = _most_estimated(walk, walk.phases[pair.number])
    scratch: list[TracedStorage] = []
    for bytes_ in {*traced_by_size, *estimated_by_size}:
        have, want = Counter[str](), Counter[str]()
        for storage in traced_by_size[bytes_]:
            want[storage.kind] += 1
        for line in estimated_by_size[bytes_]:
            have[line.kind] += line.count
        net = have.total() - want.total()
        if net < 0:
            group = _unmatched(traced_by_size[bytes_], have, -net)
            if lumps:  # the step's temporaries are compared as one sum
                temporary = [s for s in group if s.kind == "temp"]
                scratch += temporary
                group = [s for s in group if s.kind != "temp"]
            verdict = "goes too early" if most_estimated.get(bytes_, 0) >= want.total() else "lacks"
            yield from _missing_lines(name, step, verdict, bytes_, group)
        elif net > 0:
            verdict = "lives too long" if most_traced.get(bytes_, 0) >= have.total() else "too many"
            yield from _surplus_lines(name, step, verdict, bytes_, estimated_by_size[bytes_], want, net)
    if lumps:
        less = sum(line.bytes for line in lumps) - sum(s.bytes for s in scratch)
        if less:
            verdict = "lacks" if less < 0 else "too many"
            what = lumps[0].what
            yield Mismatch(name, step, verdict, what, "optimizer", "temp", (), "", max(1, len(scratch)), less)


def _unmatched(storages: Sequence[TracedStorage], have: Counter[str], number: int) -> list[TracedStorage]:
    """Return `number` of the equally large storages as unmatched, kinds that the estimate has fewest of first."""
    left = Counter(have)
    over: list[TracedStorage] = []
    matched: list[TracedStorage] = []
    for storage in storages:
        if left[storage.kind] > 0:
            left[storage.kind] -= 1
            matched.append(storage)
        else:
            over.append(storage)
    return [*over, *matched][:number]


def _missing_lines(
    phase: str, step: int, verdict: Verdict, bytes_: int, storages: Iterable[TracedStorage]
) -> Iterator[Mismatch]:
    """Yield a line for every operation and module (layers counted together) that made some of `storages`."""
    groups: dict[tuple[str, str, str], list[TracedStorage]] = defaultdict(list)
    for storage in storages:
        groups[storage.op, re.sub(r"\.\d+(?=\.|$)", ".N", storage.module), storage.kind].append(storage)
    for (op, module, kind), group in groups.items():
        first, count = group[0], len(group)
        yield Mismatch(phase, step, verdict, op, module, kind, first.shape, first.dtype, count, -count * bytes_)


def _surplus_lines(
    phase: str, step: int, verdict: Verdict, bytes_: int, lines: Sequence[Estimated], want: Counter[str], number: int
) -> Iterator[Mismatch]:
    """Yield lines for `number` of the estimate's tensors of one size, kinds that the trace has fewest of first."""
    left = Counter(want)
    for line in sorted(lines, key=lambda line: left[line.kind]):
        matched = min(line.count, max(0, left[line.kind]))
        left[line.kind] -= matched
        over = min(number, line.count - matched)
        if over:
            number -= over
            yield Mismatch(
                phase, step, verdict, line.what, line.where, line.kind, line.dims, line.dtype, over, over * bytes_
            )
    for line in lines:  # all kinds matched, but there are still too many: name any of them
        if number <= 0:
            return
        over = min(number, line.count)
        number -= over
        yield Mismatch(
            phase, step, verdict, line.what, line.where, line.kind, line.dims, line.dtype, over, over * bytes_
        )


def _most_traced(traced: TracedRun, phase: TracedPhase) -> Mapping[int, int]:
    """Return the largest number of storages of each size alive at once in a phase."""
    counts = Counter(s.bytes for s in traced.storages if s.born < phase.start <= s.died)
    most = Counter(counts)
    for event in traced.events[phase.start : phase.end]:
        bytes_ = traced.storages[event if event >= 0 else ~event].bytes
        counts[bytes_] += 1 if event >= 0 else -1
        most[bytes_] = max(most[bytes_], counts[bytes_])
    return most


def _most_estimated(walk: Walk, at: Phase) -> Mapping[int, int]:
    """Return the largest number of tensors of each size that the estimate has alive at once in a phase."""
    moments = walk.counts(at)
    most, stays = Counter[int](), Counter[int]()
    if moments is None:
        return most
    for counts in moments:
        for bytes_, count in counts.items():
            most[bytes_] = max(most[bytes_], count)
    for line in walk.lines(at):
        if line.kind in ("parameter", "buffer", "optstate") and line.count:
            stays[line.bytes // line.count] += line.count
    return most + stays
