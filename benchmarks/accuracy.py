"""Estimates against traced steps and against published measurements.

`python -m benchmarks.accuracy` writes docs/accuracy.md, its chart, docs/accuracy-tables.md and the README's table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from operator import itemgetter
from pathlib import Path
from statistics import mean, median
from textwrap import wrap
from typing import Any, NamedTuple

from benchmarks import golden
from benchmarks.accuracy_chart import chart
from benchmarks.golden import (
    GOALS,
    MIB,
    NEAR,
    SLACK,
    VERDICTS,
    Measured,
    Refused,
    TraceFigures,
    not_expressed,
    other_tools,
    phase_peak,
    replayed,
    rows,
    trace_figures,
    verdicts,
)
from memplan import Estimate, MemplanError, find_gpu
from memplan.catalogue.hardware.overhead import cublas_workspace
from memplan.models.cards import load_card

FAMILIES = ("traced_families.jsonl", "traced_decoders.jsonl", "traced_encoders.jsonl", "traced_vision.jsonl")
MISS = 0.01  # relative error of a peak that needs a cause
TRACED = {**dict.fromkeys(("forward", "reference", "teacher", "loss"), "fwd"), "backward": "bwd", "step": "opt"}
TRACED |= {"generate": "gen", "rollout": "rollout", "reward": "reward", "eval": "eval"}


class Compared(NamedTuple):
    """One run: relative errors of the peak and of its worst phase, and whether the peak is in the same phase."""

    name: str
    group: str
    peak: float
    phase: float
    same: bool
    cause: str


def without_workspaces(answer: Estimate | TraceFigures) -> dict[tuple[int, str], int]:
    """Return peaks of training by step and phase without cuBLAS's workspaces, which a trace does not see."""
    workspace = _workspace(answer)
    found: dict[tuple[int, str], int] = {}
    for phase in answer.phases:
        if phase.phase in TRACED:
            for step in (phase.step,) if phase.step else (1, 2):
                handles = 2 if phase.phase in ("backward", "step") or phase.step != 1 else 1
                key = (step, TRACED[phase.phase])
                found[key] = max(found.get(key, 0), phase.peak - handles * workspace)
    return found


def _workspace(answer: Estimate | TraceFigures) -> int:
    """Return the bytes of one of cuBLAS's workspaces."""
    return cublas_workspace(find_gpu(answer.gpu.name).compute_capability if answer.gpu else None).usual


def passes_without_workspace(figures: TraceFigures) -> dict[str, int]:
    """Return the peak of every phase of running a model without what a trace does not see."""
    found: dict[str, int] = {}
    for phase in figures.phases:
        workspace = 0 if phase.phase == "load" else _workspace(figures)
        found[phase.phase] = max(found.get(phase.phase, 0), phase.peak - figures.unsplit - workspace)
    return found


def compared_with_trace(row: dict[str, Any], group: str = "") -> Compared:
    mine = without_workspaces(trace_figures(row["run"]))
    errors: list[float] = []
    for step, peaks in row["steps"].items():
        expected = {"fwd": peaks["fwd"], "bwd": peaks["bwd"], "opt": max(peaks["opt"], peaks["clip"])}
        if step == "2":  # optimizer states exist
            expected |= {phase: peaks[phase] for phase in ("gen", "rollout", "eval") if phase in peaks}
        errors += [abs(mine[int(step), phase] / bytes_ - 1) for phase, bytes_ in expected.items()]
    highest = max(mine.values())
    same = any(bytes_ == highest and phase == TRACED[row["phase"]] for (_, phase), bytes_ in mine.items())
    return Compared(row["name"], group, abs(highest / row["peak"] - 1), max(errors), same, row.get("cause", ""))


def peak_error(row: dict[str, Any]) -> float:
    """Return the relative error of the peak of a traced row, of training or of running a model."""
    if "steps" in row:
        return compared_with_trace(row).peak
    mine = passes_without_workspace(trace_figures(row["run"]))
    traced = {phase: bytes_ for phase, bytes_ in row["phases"].items() if phase != "load"}
    return abs(max(mine.get(phase, 0) for phase in traced) / max(traced.values()) - 1)


class Drawn(NamedTuple):
    """A run drawn at random and traced: its error, None if it is refused, and the cause of a miss."""

    name: str
    error: float | None
    cause: str

    @property
    def seed(self) -> str:
        return self.name.partition(":")[0]


@cache
def drawn() -> list[Drawn]:
    """Return the runs of `benchmarks/blind.py` as memplan answers them now."""
    found: list[Drawn] = []
    for row in rows("blind.jsonl"):
        try:
            found.append(Drawn(row["name"], peak_error(row), row.get("cause", "")))
        except MemplanError:
            found.append(Drawn(row["name"], None, row.get("cause", "")))
    return found


def drawn_runs() -> Iterable[str]:
    """Yield a row for every seed and all, then each miss above 1 % and its cause."""
    yield DRAWN
    yield "| seed | runs | refused | mean | median | nine in ten at most | worst | above 1 % |"
    yield "|---|---|---|---|---|---|---|---|"
    for seed in (*dict.fromkeys(run.seed for run in drawn()), ""):
        those = [run for run in drawn() if seed in ("", run.seed)]
        errors = sorted(run.error for run in those if run.error is not None)
        figures = mean(errors), median(errors), errors[int(0.9 * (len(errors) - 1))], errors[-1]
        yield (
            f"| {seed or '**all**'} | {len(those)} | {len(those) - len(errors)} | {' | '.join(map(percent, figures))} "
            f"| {sum(error > MISS for error in errors)} |"
        )
    yield ""
    missed = ((run, run.error or 0.0) for run in drawn())
    yield from (f"- {run.name}, {percent(error)}: {run.cause}." for run, error in missed if error > MISS)
    yield ""


@cache
def traced() -> list[Compared]:
    """Yield common models at real size, by method."""
    by_method = sorted(rows("traced.jsonl"), key=lambda row: row["run"].get("method", {}).get("kind", "full"))
    return [compared_with_trace(row, row["run"].get("method", {}).get("kind", "full")) for row in by_method]


@cache
def traced_families() -> list[Compared]:
    """Yield every family at a small size, and many at real widths."""
    found = [(model_type_of(row["run"]["model"]), row) for name in FAMILIES for row in rows(name)]
    return [compared_with_trace(row, group) for group, row in sorted(found, key=itemgetter(0))]


def model_type_of(model: str | dict[str, Any]) -> str:
    """Return the family of a run's model: a card's name or a config."""
    return load_card(model).model_type if isinstance(model, str) else model["config"]["model_type"]


@cache
def traced_runs() -> list[Compared]:
    """Yield every family at a real size, by method."""
    by_method = sorted(rows("traced_runs.jsonl"), key=lambda row: row["run"].get("method", {}).get("kind", "full"))
    return [compared_with_trace(row, row["run"].get("method", {}).get("kind", "full")) for row in by_method]


@cache
def traced_losses() -> list[Compared]:
    """Yield losses other than transformers', by loss."""
    return [compared_with_trace(row, row["run"]["kernels"]["loss"]) for row in rows("traced_losses.jsonl")]


@cache
def traced_trainers() -> list[Compared]:
    """Yield steps of trainers themselves, by profile and trainer."""
    files = ("trainers", "unsloth", "preference", "generation", "packing")
    every = [row for name in files for row in rows(f"traced_{name}.jsonl") if "run" in row]
    return [compared_with_trace(row, f"{row['run']['profile']} {_trainer(row['run'])}") for row in every]


def _trainer(run: dict[str, Any]) -> str:
    packed = ", packed" if run.get("batch", {}).get("packing") else ""
    return f"{run.get('trainer', 'sft')}{packed}"


@cache
def traced_passes() -> dict[str, list[float]]:
    """Return the errors of forward passes and generation, by phase of each run."""
    found: dict[str, list[float]] = {}
    for row in rows("traced_inference.jsonl"):
        mine = passes_without_workspace(trace_figures(row["run"]))
        for phase, bytes_ in row["phases"].items():
            if phase != "load":
                found.setdefault(phase, []).append(abs(mine[phase] / bytes_ - 1))
    return found


def passes() -> Iterable[str]:
    yield "| phase | runs | mean | worst |"
    yield "|---|---|---|---|"
    for phase, errors in traced_passes().items():
        yield f"| {phase} | {len(errors)} | {percent(mean(errors))} | {percent(max(errors))} |"


def percent(error: float) -> str:
    return f"{100 * error:.4f} %" if error < 0.001 else f"{100 * error:.2f} %"


def table(head: str, compared: list[Compared]) -> Iterable[str]:
    yield f"| {head} | runs | peak, mean | peak, worst | any phase, worst | same phase |"
    yield "|---|---|---|---|---|---|"
    for group in (*dict.fromkeys(c.group for c in compared), ""):
        those = [c for c in compared if not group or c.group == group]
        yield (
            f"| {group or '**all**'} | {len(those)} | {percent(mean(c.peak for c in those))} "
            f"| {percent(max(c.peak for c in those))} | {percent(max(c.phase for c in those))} "
            f"| {sum(c.same for c in those)} of {len(those)} |"
        )


def runs(published: Sequence[Measured], causes: Sequence[str] = ()) -> Iterable[str]:
    """Yield a table of runs; with `causes`, numbered references to the causes."""
    yield "| run | card | measured MiB | memplan MiB | error | peak | in the band |" + " cause |" * bool(causes)
    yield "|---|---|---|---|---|---|---|" + "---|" * bool(causes)
    for m in published:
        inside = {True: "yes", False: "no", None: ""}[m.inside]
        yield (
            f"| {m.id} | {m.card} | {m.allocated / MIB:,.0f} | {m.answer.bytes.allocated / MIB:,.0f} "
            f"| {100 * m.error:+.2f} % | {m.answer.peak.phase} | {inside} |"
        ) + (f" {causes.index(m.cause) + 1} |" if causes else "")


def goals(published: Sequence[Measured]) -> Iterable[str]:
    yield "| peaks | runs | mean error | at most | worst run |"
    yield "|---|---|---|---|---|"
    for goal in GOALS:
        those = [m for m in published if m.large and goal.of(m)]
        if not those:
            yield f"| above 4 GiB, {goal.title} | 0 | | {100 * goal.most:.0f} % | |"
            continue
        worst = max(those, key=lambda m: abs(m.error))
        error = mean(abs(m.error) for m in those)
        missed = "" if error <= goal.most else ", missed"
        yield (
            f"| above 4 GiB, {goal.title} | {len(those)} | {percent(error)} | {100 * goal.most:.0f} %{missed} "
            f"| {100 * worst.error:+.2f} %, {worst.id} |"
        )
    small = [m for m in published if not m.large]
    worst = max(small, key=lambda m: abs(m.off))
    missed = "" if abs(worst.off) <= NEAR else " each, missed"
    yield (
        f"| below 4 GiB | {len(small)} | {mean(abs(m.off) for m in small) / MIB:,.0f} MiB | {NEAR // MIB} MiB{missed} "
        f"| {worst.off / MIB:+,.0f} MiB, {worst.id} |"
    )


def of_several() -> Iterable[str]:
    """Yield a row for every family of published runs on several GPUs, with the causes of misses, and every run."""
    yield "| family | metric | runs | mean | from | to | at most 4 % |"
    yield "|---|---|---|---|---|---|---|"
    reserved = golden.ranks_reserved()
    families = [(f"{family}, {strategy}", "allocated", list(those)) for (family, strategy), those in _families()]
    errors = [(title, metric, [m.error for m in those]) for title, metric, those in families]
    errors += [
        (f"ml-engineering, {strategy}", "reserved", [r.error for r in reserved if r.strategy == strategy])
        for strategy in dict.fromkeys(r.strategy for r in reserved)
    ]
    megatron = [m.error for m in golden.megatron() if m.large]
    errors.append(("Megatron-LM, below", "allocated", megatron))
    for title, metric, some in errors:
        found = mean(map(abs, some))
        met = "yes" if found <= golden.SEVERAL_GOAL else "no"
        yield f"| {title} | {metric} | {len(some)} | {percent(found)} | {min(some):+.2%} | {max(some):+.2%} | {met} |"
    yield ""
    causes = list(dict.fromkeys(m.cause for m in golden.ranks() if m.cause))
    yield from runs([m for m in golden.ranks() if not m.cause])
    yield f"\nMissed by more than {SLACK // MIB} MiB:\n"
    yield from runs([m for m in golden.ranks() if m.cause], causes)
    yield ""
    yield from (f"{i}. {cause[0].upper()}{cause[1:]}." for i, cause in enumerate(causes, 1))
    yield RESERVED.rstrip("\n")
    for r in reserved:
        yield f"| {r.id} | {r.card} | {r.reserved / 2**30:.1f} | {r.answered / 2**30:.2f} | {r.error:+.2%} |"


def _families() -> Iterable[tuple[tuple[str, str], Sequence[Measured]]]:
    """Return the published runs with large peaks on several GPUs, by family and strategy."""
    found: dict[tuple[str, str], list[Measured]] = {}
    for m in golden.ranks():
        if m.large:
            found.setdefault((m.family, str(m.answer.run.parallelism.strategy)), []).append(m)
    return found.items()


def groups(published: Sequence[Measured], head: str, key: Callable[[Measured], str]) -> Iterable[str]:
    """Yield the errors of runs grouped by `key`: in per cent above 4 GiB, in MiB below."""
    yield f"| {head} | above 4 GiB | mean | from | to | below 4 GiB | mean MiB | worst MiB |"
    yield "|---|---|---|---|---|---|---|---|"
    for group in dict.fromkeys(map(key, published)):
        those = [m for m in published if key(m) == group]
        large, small = [m.error for m in those if m.large], [m.off for m in those if not m.large]
        left = f"{percent(mean(map(abs, large)))} | {min(large):+.2%} | {max(large):+.2%}" if large else " | | "
        right = f"{mean(map(abs, small)) / MIB:,.0f} | {max(small, key=abs) / MIB:+,.0f}" if small else " | "
        yield f"| {group} | {len(large)} | {left} | {len(small)} | {right} |".replace("%", " %").replace("  %", " %")


def by_phase(published: Sequence[Measured]) -> Iterable[str]:
    yield "| phase | runs | mean MiB | worst MiB |"
    yield "|---|---|---|---|"
    for phase in ("forward", "backward", "step"):
        off = [(phase_peak(m.answer, phase) - m.phases[phase]) / MIB for m in published if phase in m.phases]
        yield f"| {phase} | {len(off)} | {mean(map(abs, off)):,.0f} | {max(off, key=abs):+,.0f} |"
    kept = [(m.kept - m.after) / MIB for m in published if m.after is not None]
    yield f"| after a step | {len(kept)} | {mean(map(abs, kept)):,.0f} | {max(kept, key=abs):+,.0f} |"


def ran_models() -> Iterable[str]:
    """Yield inference runs."""
    ran = golden.running()
    yield RUNNING.format(count=len(ran))
    yield "| family | weights | above 4 GiB | mean | from | to | below 4 GiB | worst MiB |"
    yield "|---|---|---|---|---|---|---|---|"
    for family, weights in dict.fromkeys((r.family, _weights(r.answer)) for r in ran):
        those = [r for r in ran if (r.family, _weights(r.answer)) == (family, weights)]
        large, small = [r.error for r in those if r.large], [r.off for r in those if not r.large]
        left = f"{percent(mean(map(abs, large)))} | {_signed(min(large))} | {_signed(max(large))}" if large else " | | "
        right = f"{max(small, key=abs) / MIB:+,.0f}" if small else ""
        yield f"| {family} | {weights} | {len(large)} | {left} | {len(small)} | {right} |"
    yield ""
    for cause in dict.fromkeys(r.cause for r in ran if r.cause):
        those = [r for r in ran if r.cause == cause]
        what = those[0].id if len(those) == 1 else f"{len(those)} runs"
        yield f"- {what}, {span([r.error for r in those])}: {cause}."
    held = [r.answer.bytes.reserved / r.reserved - 1 for r in ran if r.reserved]
    yield f"""
`reserved` against `torch.cuda.max_memory_reserved`, {len(held)} runs: {span(held)}. Caches that grow by a token, all
layers twice, leave freed blocks that no later one fits: 80 GB are held where 26 are allocated."""


def _signed(error: float) -> str:
    return f"{100 * error:+.2f} %"


def _weights(answer: Estimate) -> str:
    """Return the format of a run's weights."""
    q = answer.run.method.quantization
    return q.format if q is not None else str(answer.run.precision.weights)


def bands(published: Sequence[Measured]) -> Iterable[str]:
    yield "| card | runs | below the band | in it | above it | half its width |"
    yield "|---|---|---|---|---|---|"
    read = [(m, m.process) for m in published if m.process is not None]
    for card in dict.fromkeys(m.card for m, _ in read):
        those = [(m, process) for m, process in read if m.card == card]
        below = sum(process < m.answer.band.low for m, process in those)
        inside = sum(bool(m.inside) for m, _ in those)
        yield (
            f"| {card} | {len(those)} | {below} | {inside} | {len(those) - below - inside} "
            f"| {100 * mean(m.half_width for m, _ in those):.0f} % of `used` |"
        )


def traces() -> Iterable[str]:
    yield "| transformers | runs | trace against card, mean | worst | estimate against trace, mean | worst |"
    yield "|---|---|---|---|---|---|"
    for version in (*dict.fromkeys(r.versions["transformers"] for r in replayed()), ""):
        those = [r for r in replayed() if r.measured.large and version in ("", r.versions["transformers"])]
        yield (
            f"| {version or '**all**'} | {len(those)} | {percent(mean(abs(r.error) for r in those))} "
            f"| {percent(max(abs(r.error) for r in those))} | {percent(mean(abs(r.engine) for r in those))} "
            f"| {percent(max(abs(r.engine) for r in those))} |"
        )


def confusion() -> Iterable[str]:
    yield f"| on the 80 GB card | {' | '.join(VERDICTS)} |"
    yield "|---|---|---|---|---|"
    for happened, said in verdicts().items():
        yield f"| {happened} | {' | '.join(str(len(said[word])) for word in VERDICTS)} |"
    wrong = [*verdicts()["died"]["fits"], *verdicts()["ran"]["does not fit"]]
    yield ""
    yield f"Wrong: {', '.join(wrong)}." if wrong else "None is wrong."


def other_estimators() -> Iterable[str]:
    yield "| tool | runs answered | its mean error | its worst | memplan's mean on the same |"
    yield "|---|---|---|---|---|"
    for tool in other_tools():
        yield (
            f"| {tool.name} | {tool.answered} of {tool.asked} | {percent(tool.error)} | {percent(tool.worst)} "
            f"| {percent(tool.memplan)} |"
        )


def best_estimators() -> Iterable[str]:
    yield "| family | tool | runs answered | its mean error | memplan's mean on the same |"
    yield "|---|---|---|---|---|"
    for family in dict.fromkeys(m.family for m in golden.published()[0]):
        best = next((tool for tool in other_tools(family) if 2 * tool.answered >= tool.asked), None)
        if best:
            yield (
                f"| {family} | {best.name} | {best.answered} of {best.asked} | {percent(best.error)} "
                f"| {percent(best.memplan)} |"
            )


def unanswered(refused: Sequence[Refused]) -> Iterable[str]:
    yield "| family | runs | why |"
    yield "|---|---|---|"
    for family, reason in dict.fromkeys((r.family, r.reason) for r in refused):
        yield f"| {family} | {sum((r.family, r.reason) == (family, reason) for r in refused)} | {reason} |"


def left_out() -> Iterable[str]:
    yield "| source | measurements | why |"
    yield "|---|---|---|"
    for group in not_expressed():
        yield f"| [{group['family']}]({group['source']}) | {len(group['ids'])} | {group['reason']} |"


def reported() -> Iterable[str]:
    """Yield a row for each framework, then each report that a run describes, and why the others have none."""
    known = [each for each in golden.reports() if each.verdict]
    yield REPORTED.format(known=len(known), all=len(golden.reports()))
    yield "| framework | measured | median error | within 10 % | of known rows | died | does not fit | tight | fits |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for framework in sorted({each.row["framework"] for each in known}):
        those = [each for each in known if each.row["framework"] == framework and not each.row.get("partly")]
        errors = [abs(each.error) for each in those if each.error is not None]
        said = [each.verdict for each in those if each.row["outcome"] == "oom"]
        sure = [abs(each.error) for each in those if each.error is not None and each.has_known_rows]
        middle, middle_sure = (f"{median(each):.1%}" if each else "" for each in (errors, sure))
        middle_sure += f" of {len(sure)}" if sure else ""
        within = f"{sum(error <= golden.NEAR_REPORT for error in errors)}" if errors else ""
        counts = " | ".join(str(said.count(word)) for word in ("does not fit", "tight", "fits"))
        yield f"| {framework} | {len(errors)} | {middle} | {within} | {middle_sure} | {len(said)} | {counts} |"
    yield "\n| report | framework | grade | reported GiB | memplan | error | cause |\n|---|---|---|---|---|---|---|"
    for each in known:
        row = each.row
        measured = f"{row['gib']} {row['metric']}" if each.answered is not None else "ran"
        measured = "out of memory" if row["outcome"] == "oom" else measured
        said = each.verdict if each.answered is None else f"{each.answered:.1f}"
        error = f"{each.error:+.1%}" if each.error is not None else ""
        yield (
            f"| [{row['id']}]({row['source']}) | {row['framework']} {row.get('as_of', '')} | {row['grade']} "
            f"| {measured} | {said} | {error} | {row.get('cause', '')} |"
        )
    yield "\n| report without a run | why |\n|---|---|"
    for each in golden.reports():
        if not each.verdict:
            yield f"| [{each.row['id']}]({each.row['source']}) | {each.row['reason']} |"


def span(errors: list[float]) -> str:
    return f"mean {percent(mean(map(abs, errors)))}, from {100 * min(errors):+.2f} % to {100 * max(errors):+.2f} %"


def front() -> Iterable[str]:
    """Yield the first page: a chart, a table, and what a reader asks next."""
    yield FRONT
    yield from HEAD
    yield from summary()
    yield ""
    yield from outcomes()
    yield MEANING
    yield OTHERS
    yield from other_estimators()
    yield KNOWN


def tables() -> Iterable[str]:
    """Yield the page of every comparison."""
    families = traced_families()
    published, refused = golden.published()
    met, missed = [m for m in published if not m.cause], [m for m in published if m.cause]
    reserved = [m.answer.bytes.reserved / m.reserved - 1 for m in published if m.reserved]
    yield TRACED_STEPS
    yield from table("method", traced())
    yield TRACED_RUNS
    yield from table("method", traced_runs())
    yield TRACED_FAMILIES
    yield from table("family", families)
    yield TRACED_LOSSES
    yield from table("loss", traced_losses())
    yield TRACED_TRAINERS
    yield from table("profile and trainer", traced_trainers())
    yield TRACED_PASSES
    yield from passes()
    yield from drawn_runs()
    yield from (
        f"- {c.name} is missed by {percent(c.peak)}, in a phase by {percent(c.phase)}: {c.cause}."
        for c in (*traced_runs(), *families, *traced_losses(), *traced_trainers())
        if c.cause
    )
    yield f"""
## Against cards

Peaks that other people published, with the source of each in `tests/golden/published.jsonl`; nothing was fitted to
them. {len(published)} runs, error of `allocated` against `torch.cuda.max_memory_allocated`:
"""
    yield from goals(published)
    yield "\nBy family and method:\n"
    yield from groups(published, "family and method", lambda m: f"{m.family}, {m.method}")
    yield "\nBy the phase in which memplan has the peak:\n"
    yield from groups(published, "phase", lambda m: m.answer.peak.phase)
    yield "\nPhase by phase, and what stays allocated after a step, where that was published:\n"
    yield from by_phase(published)
    yield f"""
### Met

{len(met)} runs within {SLACK // MIB} MiB, which the allocator leaves unsplit, and half the last digit published:
"""
    yield from runs(met)
    if missed:
        yield f"\n### Missed, and why\n\n{len(missed)} runs: {span([m.error for m in missed])}.\n"
        missed.sort(key=lambda m: -abs(m.error))
        causes = list(dict.fromkeys(m.cause for m in missed))
        yield from runs(missed, causes)
        yield ""
        yield from (f"{i}. {cause[0].upper()}{cause[1:]}." for i, cause in enumerate(causes, 1))
    yield SEVERAL
    yield from of_several()
    yield MEGATRON.format(count=len(golden.megatron()))
    yield from groups(golden.megatron(), "model, GPUs by tensors and stages", _of_megatron)
    yield ""
    yield from runs([m for m in golden.megatron() if m.large])
    causes = list(dict.fromkeys(m.cause for m in golden.megatron() if m.cause))
    yield ""
    yield from (
        f"- Missed by more than {SLACK // MIB} MiB, {sum(m.cause == c for m in golden.megatron())} runs: {c}."
        for c in causes
    )
    yield from ran_models()
    yield REPLAYED
    yield from traces()
    yield FIT
    yield from (*confusion(), *reported())
    yield BANDS
    yield from bands(published)
    yield f"\n`reserved` against `torch.cuda.max_memory_reserved`, {len(reserved)} runs: {span(reserved)}."
    yield OTHERS_BY_FAMILY
    yield from best_estimators()
    if refused:
        yield "\n## Not answered yet\n\nPublished runs that a RunSpec says and memplan refuses:\n"
        yield from unanswered(refused)
    yield LEFT_OUT
    yield from left_out()


def _of_megatron(m: Measured) -> str:
    """Return a run's model and its parallel layout."""
    p = m.answer.asked.parallelism
    kind = "mixture" if m.answer.parameters.active < m.answer.parameters.total else "dense"
    return f"{kind}, tp {p.tp}, pp {p.pp}"


HEAD = ("| compared with | runs | mean error | worst |", "|---|---:|---:|---:|")


def summary() -> Iterable[str]:
    """Yield the rows of the table that README and the first page have."""
    steps = [c.peak for c in (*traced(), *traced_runs(), *traced_families(), *traced_losses(), *traced_trainers())]
    several = [abs(m.error) for m in (*golden.ranks(), *golden.megatron()) if m.large]
    for what, errors in (
        ("training steps of the real libraries, every allocation recorded", steps),
        ("forward passes and generation, the same", [error for of in traced_passes().values() for error in of]),
        ("peaks that people measured, training on one GPU", golden.means(GOALS[-1])),
        ("peaks that people measured, training on several", several),
        ("peaks that people measured, running a model", [abs(r.error) for r in golden.running() if r.large]),
    ):
        yield f"| {what} | {len(errors):,} | {percent(mean(errors))} | {percent(max(errors))} |"


def outcomes() -> Iterable[str]:
    """Yield a paragraph of what memplan says of runs that ran, and of runs that died."""
    died, ran = ({word: len(ids) for word, ids in verdicts()[happened].items()} for happened in ("died", "ran"))
    refused = f"; {ran['refused']} are refused" * bool(ran["refused"])
    text = (
        f"{sum(died.values())} published runs ran out of memory on an 80 GB card: {died['does not fit']} are said not "
        f"to fit, {died['fits']} to fit. {sum(ran.values())} ran there: {ran['fits']} are said to fit, "
        f"{ran['tight']} to be tight, {ran['does not fit']} not to fit{refused}."
    )
    return wrap(text, 120)


def measured() -> dict[str, list[tuple[str, int, int]]]:
    """Return the published runs above 4 GiB: name, measured bytes, memplan's bytes."""

    def pairs(those: Iterable[Measured]) -> list[tuple[str, int, int]]:
        return [(m.id, m.allocated, m.answer.bytes.allocated) for m in those if m.large]

    return {
        "training, one GPU": pairs(golden.published()[0]),
        "training, several GPUs": pairs((*golden.ranks(), *golden.megatron())),
        "running a model": [(r.id, r.allocated, r.answered) for r in golden.running() if r.large],
    }


def pages() -> Iterator[tuple[Path, str]]:
    """Yield every file that is written here, and its text."""
    yield DOCS / "accuracy.md", "\n".join(front())
    yield DOCS / "accuracy-tables.md", "\n".join(tables())
    yield DOCS / "pictures" / "accuracy.svg", chart(measured())
    readme = DOCS.parent / "README.md"
    table = "\n".join((*HEAD, *summary(), "", *outcomes())) + "\n"
    old = re.compile(r"^\| compared with .*\n(?:\|.*\n)*\n(?:.+\n)*", re.MULTILINE)
    yield readme, old.sub(lambda _: table, readme.read_text("utf-8"))


DOCS = Path(__file__).parents[1] / "docs"
FRONT = """# How right it is

Written by `python -m benchmarks.accuracy`; a test holds it to what the program answers.

![Measured memory of published runs against memplan's answer: the dots lie on the diagonal](pictures/accuracy.svg)
"""
MEANING = """
The first two rows compare every allocation: a step or a pass of the real libraries runs on tensors without data, and
memplan's peak is held to it. The next three are published peaks above 4 GiB, which other people measured with
`torch.cuda.max_memory_allocated`. Each has its source, and nothing was fitted to them.
[Every comparison](accuracy-tables.md) is listed by family and run by run, each miss with its cause or as not found.

`used`, what `nvidia-smi` shows, adds a replay of the allocations through torch's allocator and the CUDA context. Its
range holds 94 of 100 runs that were read; `tight` means that the card's end lies inside it.
"""
OTHERS_BY_FAMILY = """
## Other tools, by family

The best of the tools in [How right it is](accuracy.md#compared-with-other-tools) by family, among those that answer at
least half of its runs:
"""
TRACED_STEPS = """# Every comparison

Written by `python -m benchmarks.accuracy`; a test holds it to what the program answers.

## Against traced steps

Two whole training steps of the real libraries (transformers 5.24, PEFT 0.21, bitsandbytes 0.50 on torch 2.13), run on
fake CUDA tensors, with every allocation recorded. Peaks are of live tensors, without cuBLAS's workspaces.
"""

TRACED_RUNS = """
Every dense family at real sizes, 0.1 to 123 billion parameters, x full, LoRA, QLoRA, DoRA x checkpointing on and off,
and sixty more; attention, loss, ten optimizers, bf16, fp16 and autocast over either or fp32, batch, padding and
accumulation in turn (`tests/golden/trace_runs.py`). Traced by `memplan probe --trace`:
"""

TRACED_FAMILIES = """
Every family that transformers can build, small and, of mixtures, hybrids, vision-language models and encoders, at real
widths, whole or cut to a few layers. Dense decoders with the rest of the run drawn at random (the first four drawn of
each, and fifteen more in which a fault of an earlier version showed); the others with full, LoRA and QLoRA,
checkpointing on and off, eager attention, padding and dropout, and with images and frozen towers where there are some
(`tests/golden/trace_families.py` and its neighbours).
"""

TRACED_LOSSES = """
Other losses than transformers' on a small Qwen2, by every method and precision: liger-kernel 0.8's own function with
kernels that compute nothing, torchtune's and LitGPT's written out.
"""

TRACED_TRAINERS = """
Steps of a trainer itself, as its release constructs it around a model and adapters: its preparation, casts, loss,
metrics, clipping and optimizer (`tests/golden/trace_trainers.py`, `trace_preference.py`, `trace_generation.py` and
`trace_packing.py`):
"""
TRACED_PASSES = """
Passes in which nothing trains, of every family that generates, small, and of some cards at their own sizes
(`tests/golden/trace_inference.py`): forward passes, prompts, and the tokens after them, with caches that grow, that
have room from the start, and of several beams, with padding, eager attention, autocast, adapters and 4-bit weights.

"""

DRAWN = """
Runs that nobody chose: `python -m benchmarks.blind` draws a family, small, or a card below 4 billion parameters, and
method, precision, optimizer, kernels, loss, loop, lengths, images, caches and beams by a seed, and traces what the
installed libraries can run (`tests/golden/blind.jsonl`). The smallest take a few MB, where one tensor is a per cent.
The figures are today's: what a run showed when it was first drawn is mended, or has its cause below.
"""

SEVERAL = """
## Several GPUs

What one GPU of 2 to 8 took, as published: under FSDP1 (`full_shard`), with full fine-tuning, LoRA and QLoRA of 1 to
70 billion parameters (`tests/golden/ranks.jsonl`), and what torch reserved under DeepSpeed's ZeRO (ml-engineering,
Llama 3.1 8B on 8 H200 and 8 B200, `tests/golden/ranks_reserved.jsonl`). The band of several GPUs is the shortest range
with 59 of the 61 FSDP runs in it that say what the process took. DDP, FSDP1 and FSDP2 are compared with what torch's
own code allocates, too ([several GPUs](how-it-works/parallelism.md)); DeepSpeed's partitions, buckets,
streams and the order in which it gathers and lays weights together were read in its code. Of runs above 4 GiB:
"""

RESERVED = """
What torch reserved of the whole process, by memplan's replay of the run through torch's allocator:

| run | card | measured GiB | memplan GiB | error |
|---|---|---|---|---|
"""

MEGATRON = """
## Megatron-LM's own CI

What the last rank took at most in {count} of its functional tests (golden values of 2025 and 2026), as its layers are
read in megatron-core 0.12 and TransformerEngine 2.3; `tests/golden/megatron.jsonl` has each. They set
`CUBLAS_WORKSPACE_CONFIG=:4096:8`, which gives an A100 47.75 MiB of workspaces more than it has else; these are taken
off.
"""

RUNNING = """
## Running models

What {count} forward passes and generations took (`tests/golden/inference.jsonl`), of weights in 16 and 32 bits, GPTQ,
AWQ, FP8 and bitsandbytes' 4 bits, prompts of 1 to 30,720 tokens and batches of 1 to 64: Qwen's speed benchmarks with
transformers 4.38, 4.46 and 4.51, Hugging Face's optimum-benchmark with 4.35, and LitGPT's tables. Nothing was fitted to
them: what older libraries made was read in them. Of large weights that an older library loads one by one the ends of
blocks are counted, which torch counts as allocated.

Qwen3's figures leave out the prompt's own pass: they are weights, the cache of all tokens and cuBLAS's workspace to
4 MiB, where the hidden states of a prompt of 30,720 tokens alone would take hundreds. They are compared with the pass
that decodes, which joins the new key with the old ones in a tensor of its own: what they do not show either.
"""

REPLAYED = """
## Traces against cards

Steps of stock Hugging Face runs above 4 GiB, traced by `memplan probe --trace` with the transformers and PEFT of their
time on torch 2.13, and cuBLAS's workspaces added.
"""

FIT = """
## Fit, or out of memory

Published runs on an 80 GB A100, those that ran and those that died for want of memory. `tight` is neither right nor
wrong.
"""

REPORTED = """
## What people reported

{known} of {all} runs that people reported in issues and documentation of frameworks, as their files or flags are read
today, by the newest version that memplan knows, or by the one that is named with the framework, if the report or the
history of its file names one (`tests/golden/reports.jsonl`). Graded A if all settings are stated, B if one or two are
assumed, C if more are. Nothing was fitted to them; lengths of data are rarely stated, so a peak may be of a shorter
batch than the settings allow. Reserved by torch, used as `nvidia-smi` shows it, or the cache that an engine made. The
medians leave out runs of which a part is not counted; *of known rows* is the median of those whose rows have a known
length: graded A, or B with rows that are packed, padded to one, or published, or an engine's cache:
"""

BANDS = """
## `used` and its band

Against what `nvidia-smi` showed (A100), or what reserved and context add up to (T4). The band is the shortest range
with 94 of 100 of these runs in it; leaving a configuration's runs out of what sets it, it still holds 93 of 100 of
them (tests/estimate/test_band.py):
"""

OTHERS = """
## Compared with other tools

What other estimators answer for the same runs, on those that they answer; `benchmarks/other_tools.jsonl` has each.
The comparison is not blind: memplan's profiles were read with these runs in view, though none has a constant that was
fitted to one, and fitcheck-llm's own constants come from the fitcheck runs.
"""

LEFT_OUT = """
## Published, and not expressed

Measurements that were published and are no golden run, with the reason; `tests/golden/not_expressed.jsonl` names each.
"""

KNOWN = """
## What is known to be missed

- A card counts as allocated what the allocator leaves unsplit at the end of a block, up to 1 MiB a tensor: some 25 MiB
  for a small quantised model, which is most of the error above. It is there once the model is loaded, and differs
  between two loads of the same weights. memplan counts tensors.
- Trainer updates biases and norms apart from the rest, so that `adamw_torch` needs less memory at once by as many
  parameters (under 0.1 %).
- Kernels that allocate inside themselves do not show in a trace. One such row was found by the published runs (the
  softmax's backward with eager attention multiplies gradient and output first) and is in the ledger; there may be
  others.
- LLM.int8's outlier columns depend on the data and are not counted.
- bitsandbytes chooses its fused 4-bit product by the number of multiprocessors, of which memplan knows one per compute
  capability. Another card of the same may dequantise a matrix for a few rows more or fewer than is counted.
- The backward of Kimi Linear's delta rule is counted as one operation (1.2 to 1.3 % of small models).
- Generation from Bamba with eager attention holds a layer's probabilities until the next layer returns, which is not
  counted (3 % of a tiny model's prompt).
- Reentrant checkpoints of T5Gemma keep the rotary tables with the graph, which is not counted (0.06 % of a tiny model).
  DeepSeek V4 on sequences shorter than a layer compresses into one token counts gradients of a compressor that gets
  none (1.1 % of a tiny model). A trace of BART alike with padding masks the decoder's own tokens too (up to 1 %), which
  a step on a card does not.
- Under autocast over fp32 weights, a reentrant checkpoint of BART alike casts a layer's input once, as a leaf that
  autocast remembers; each of its linear layers is counted with a cast (1.0 % of a tiny model).
- States that an optimizer makes while it steps in the first backward are counted from the second step on, whose peak is
  the larger one. Adafactor's states of a convolution are counted as a matrix's (0.3 % of a tiny ViT).
- The band comes from replaying traced steps through a model of torch's allocator, not on cards. It is wide, and
  `reserved` with eager attention is 8 % too low on average.
- No reading of the CUDA context was found for cards other than the T4, V100 and A100.
- Families without a class in transformers (Baichuan, DeepSeek-MoE, InternLM 2, MiniCPM, Nemotron-NAS, Qwen 1) are
  declared from their published code; none of it was traced.
- State spaces and linear attention are counted as transformers' own torch code computes them, unless `--packages` names
  those of mamba-ssm, causal-conv1d and flash-linear-attention that are installed. With them they take less; answers say
  so.
- torch.compile: the figure is that of eager code, which takes the most. Three published runs of torchtune took 6, 11
  and 21 % less; the range goes down to less than that.
- Reports without the versions of the libraries, the lengths of the data or a log cannot be told from a miss:
  [what people reported](accuracy-tables.md#what-people-reported) has the causes that are known.
- Experts in a loop over those chosen (DBRX, DeepSeek-MoE, Step 3.7) depend on the data: rows are counted as spread
  evenly.
"""


if __name__ == "__main__":
    for path, text in pages():
        path.write_text(text, "utf-8")
