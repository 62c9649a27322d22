"""The golden runs: published measurements, and memplan's answers for the same runs.

Each line of a file in `tests/golden` is a run: its source, libraries, card, metric and bytes, and the run as a RunSpec.

published.jsonl         training on one GPU
ranks.jsonl             training on several GPUs
megatron.jsonl          Megatron-LM's own CI; `beside` is memory not described by a RunSpec
                        (`CUBLAS_WORKSPACE_CONFIG=:4096:8` on an A100)
oom.jsonl, ranks_oom.jsonl  runs that ran out of memory
not_expressed.jsonl     measurements that a RunSpec cannot describe yet, with the reason
reports.jsonl           what people reported in issues and documentation: `outcome` ran or oom; `gib` in a `metric`,
                        if it was measured; `grade` A if all settings are stated, B if one or two are assumed, C if more
                        are; `as_of` the framework's version, or the day, that a figure was written for, whose file and
                        defaults the run has; `padded` if rows are padded or packed to a stated length, or the longest
                        row of published data is counted; `partly` if a part is not counted; the `cause` of a miss, the
                        `reason` for no run, the `quote` of a figure
inference.jsonl         forward passes and generation; a figure may be of one `phase`, or `summed` over all GPUs

`other_tools.jsonl` in this folder has the answers of other estimators for the same runs.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from functools import cache, wraps
from hashlib import sha256
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple, TypeVar

from memplan import Estimate, MemplanError, RunSpec, estimate
from memplan.estimate.answer import Card, Parameters, Peak, Phase, phase_peaks
from memplan.estimate.inference import InferenceWalk

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
OTHER_TOOLS = Path(__file__).resolve().parent / "other_tools.jsonl"
MIB = 2**20
LARGE = 4 * 2**30  # smaller errors are counted in bytes: workspaces and unsplit remainders of blocks dominate
NEAR = 60 * MIB  # the largest error allowed for a peak below LARGE
SLACK = 32 * MIB  # on a card the unsplit remainder of a block counts as allocated
Found = TypeVar("Found")
SHARED = "MEMPLAN_GOLDEN_FIGURES"  # environment variable: a folder of figures that processes of one session share


def rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of a golden file."""
    lines = (GOLDEN / name).read_text("utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "run" in row]


def phase_peak(answer: Estimate, phase: str) -> int:
    """Return the peak of forward (including the loss), backward or step in a later step."""
    those = ("forward", "loss") if phase == "forward" else (phase,)
    return max(p.peak for p in answer.phases if p.phase in those and p.step in (2, None))


class TraceFigures(NamedTuple):
    """The parts of an answer that a trace of the run shows, and the bytes left unsplit, which it does not show.

    The attributes are as in `Estimate`; `unsplit` is 0 for training.
    """

    parameters: Parameters
    phases: tuple[Phase, ...]
    peak: Peak
    gpu: Card | None
    unsplit: int


def shared(answer: Callable[[dict[str, Any]], Found]) -> Callable[[dict[str, Any]], Found]:
    """Decorate a function of JSON: if there is a folder of shared figures, one process answers, and the others read."""

    @wraps(answer)
    def once(asked: dict[str, Any]) -> Found:
        folder = os.environ.get(SHARED)
        if folder is None:
            return answer(asked)
        key = json.dumps([answer.__name__, asked], sort_keys=True)
        path = Path(folder) / sha256(key.encode()).hexdigest()
        try:
            return pickle.loads(path.read_bytes())
        except FileNotFoundError:
            found, part = answer(asked), path.with_suffix(f".{os.getpid()}")
            part.write_bytes(pickle.dumps(found))
            part.replace(path)  # so that no process reads a part of it
            return found

    return once


@shared
def trace_figures(run: dict[str, Any]) -> TraceFigures:
    """Return the figures of a traced run, given as a row has it."""
    answer = estimate(RunSpec(**run))
    unsplit = answer.walk.unsplit if isinstance(answer.walk, InferenceWalk) else 0
    return TraceFigures(answer.parameters, answer.phases, answer.peak, answer.gpu, unsplit)


class Refused(NamedTuple):
    """A run that memplan refuses, and why."""

    id: str
    family: str
    field: str
    reason: str


class Measured(NamedTuple):
    """A published run and memplan's answer.

    cause   why the run is missed, if it is
    after   bytes allocated after a step
    slack   allowed error of a met peak in bytes: the allocator's unsplit remainder, and half the last published digit
    """

    id: str
    family: str
    method: str
    card: str
    allocated: int
    process: int | None
    answer: Estimate
    cause: str
    reserved: int | None
    phases: dict[str, int]
    after: int | None
    slack: int

    @property
    def inside(self) -> bool | None:
        """Whether the process's memory was within the range; None if it was not measured."""
        return None if self.process is None else self.answer.band.low <= self.process <= self.answer.band.high

    @property
    def half_width(self) -> float:
        return (self.answer.band.high - self.answer.band.low) / 2 / self.answer.bytes.used

    @property
    def off(self) -> int:
        """Bytes that memplan answers too many (or, negative, too few)."""
        return self.answer.bytes.allocated - self.allocated

    @property
    def error(self) -> float:
        return self.off / self.allocated

    @property
    def kept(self) -> int:
        """The bytes that memplan keeps between steps: weights, optimizer states, buffers and cuBLAS's workspaces."""
        return sum(self.answer.categories[kind] for kind in ("parameter", "optstate", "buffer", "other"))

    @property
    def large(self) -> bool:
        return self.allocated >= LARGE

    @property
    def fused(self) -> bool:
        kernels = self.answer.asked.kernels
        return bool(kernels.fused) or kernels.loss == "fused"


@shared
def answered(run: dict[str, Any]) -> Estimate | MemplanError:
    """Return the answer for a published run, given as a row has it, with what its rows of the accuracy page show."""
    try:
        answer = estimate(RunSpec(**run))
    except MemplanError as refusal:
        return refusal
    _ = answer.band, answer.bytes.reserved, answer.categories, answer.phases, answer.verdict.answer
    return answer


def _answer(row: dict[str, Any]) -> Estimate:
    """Return the answer for a row's run, which is not refused."""
    answer = answered(row["run"])
    if isinstance(answer, MemplanError):
        raise answer
    return answer


def _measured(row: dict[str, Any], answer: Estimate) -> Measured:
    run = row["run"]
    return Measured(
        row["id"],
        row["family"],
        run["method"] if isinstance(run["method"], str) else run["method"]["kind"],
        row["measured"],
        row["allocated"] - row.get("beside", 0),
        row.get("process"),
        answer,
        row.get("cause", ""),
        row.get("reserved"),
        row.get("phases", {}),
        row["after"] - row.get("beside", 0) if "after" in row else None,
        SLACK + row.get("digits", 0) // 2,
    )


def published() -> tuple[list[Measured], list[Refused]]:
    """Return the published runs on one GPU that memplan answers, and those that it refuses, without compiled ones."""
    found, refused = _published()
    return [m for m in found if not m.answer.run.kernels.compile], refused


def compiled() -> list[Measured]:
    """Return the published runs of compiled code, which memplan answers with a range."""
    return [m for m in _published()[0] if m.answer.run.kernels.compile]


@cache
def _published() -> tuple[list[Measured], list[Refused]]:
    found: list[Measured] = []
    refused: list[Refused] = []
    for row in rows("published.jsonl"):
        answer = answered(row["run"])
        if isinstance(answer, MemplanError):
            refused.append(Refused(row["id"], row["family"], answer.field or "", str(answer)))
        else:
            found.append(_measured(row, answer))
    return found, refused


@cache
def ranks() -> list[Measured]:
    """Return every published run on several GPUs, with one GPU's memory."""
    return [_measured(row, _answer(row)) for row in rows("ranks.jsonl")]


SEVERAL_GOAL = 0.04  # the goal for the mean error of every family of runs on several GPUs


class Reserved(NamedTuple):
    """A published run of which only torch's reserved bytes are known, and memplan's answer."""

    id: str
    card: str
    strategy: str
    reserved: int
    answered: int

    @property
    def error(self) -> float:
        return self.answered / self.reserved - 1


@cache
def ranks_reserved() -> list[Reserved]:
    """Return every published run under DeepSpeed's ZeRO."""
    found = ((row, _answer(row)) for row in rows("ranks_reserved.jsonl"))
    return [
        Reserved(row["id"], row["measured"], str(a.run.parallelism.strategy), row["reserved"], a.bytes.reserved)
        for row, a in found
    ]


@cache
def megatron() -> list[Measured]:
    """Return the runs of Megatron-LM's CI, with the last rank's memory."""
    return [_measured(row, _answer(row)) for row in rows("megatron.jsonl")]


class Ran(NamedTuple):
    """A published inference run and memplan's answer for it, or for its `phase`.

    cause   why the run is missed, if it is
    slack   allowed error of a met peak in bytes
    """

    id: str
    family: str
    card: str
    phase: str
    allocated: int
    answered: int
    answer: Estimate
    cause: str
    within: float
    slack: int
    reserved: int | None

    @property
    def off(self) -> int:
        """Bytes that memplan answers too many (or, negative, too few)."""
        return self.answered - self.allocated

    @property
    def error(self) -> float:
        return self.off / self.allocated

    @property
    def large(self) -> bool:
        return self.allocated >= LARGE


RUNNING, RUNNING_NEAR = 0.03, 150 * MIB  # limits: a family's mean error of large peaks, and the error of a small one


def ran(row: dict[str, Any]) -> Ran:
    """Return a row of `inference.jsonl` with memplan's answer."""
    answer, phase = _answer(row), row.get("phase", "")
    return Ran(
        row["id"],
        row["family"],
        row["measured"],
        phase,
        row["allocated"],
        phase_peaks(answer)[phase] if phase else _of_all(answer) if row.get("summed") else answer.bytes.allocated,
        answer,
        row.get("cause", ""),
        row.get("within", 0.0),
        SLACK * (max(1, len(answer.ranks)) if row.get("summed") else 1) + row["digits"] // 2,
        row.get("reserved"),
    )


def _of_all(answer: Estimate) -> int:
    """Return the sum of all GPUs' peaks."""
    return sum(rank.bytes.allocated for rank in answer.ranks)


@cache
def running() -> list[Ran]:
    """Return every published inference run."""
    return [ran(row) for row in rows("inference.jsonl")]


class Replayed(NamedTuple):
    """A published run traced with the libraries of its time, with the card's measurement and the estimate.

    `traced` is the trace's peak plus the card's cuBLAS workspaces, which a trace does not see.
    """

    measured: Measured
    traced: int
    versions: dict[str, str]

    @property
    def error(self) -> float:
        return self.traced / self.measured.allocated - 1

    @property
    def engine(self) -> float:
        """The estimate's error relative to the trace."""
        return self.measured.answer.bytes.allocated / self.traced - 1


@cache
def replayed() -> list[Replayed]:
    """Return the published runs that were traced."""
    ours = {m.id: m for m in published()[0]}
    lines = [json.loads(line) for line in (GOLDEN / "traced_published.jsonl").read_text("utf-8").splitlines()]
    return [Replayed(ours[line["id"]], line["traced"], line["versions"]) for line in lines]


class Goal(NamedTuple):
    """A goal for the mean error of a group of runs with large peaks."""

    title: str
    most: float
    of: Callable[[Measured], bool]


STOCK = ("fms-acceleration, stock", "fitcheck")
GOALS = (
    Goal("stock Hugging Face training", 0.01, lambda m: m.family in STOCK and not m.fused),
    Goal("fused losses and kernels", 0.02, lambda m: m.fused),
    Goal("LitGPT and torchtune", 0.03, lambda m: m.family in ("litgpt", "torchtune")),
    Goal("all", 0.03, lambda _: True),
)


def means(goal: Goal) -> list[float]:
    """Return the absolute relative errors of the goal's runs with large peaks."""
    return [abs(m.error) for m in published()[0] if m.large and goal.of(m)]


VERDICTS = ("fits", "tight", "does not fit", "refused")


@cache
def verdicts() -> dict[str, dict[str, list[str]]]:
    """Return the ids of runs on the 80 GB card by outcome (`ran`, `died`) and memplan's verdict."""
    those = {
        "ran": [row for row in rows("published.jsonl") if row["measured"] == "A100-80GB"],
        "died": rows("oom.jsonl"),
    }
    said: dict[str, dict[str, list[str]]] = {happened: {word: [] for word in VERDICTS} for happened in those}
    for happened, runs in those.items():
        for row in runs:
            answer = answered(row["run"])
            word = "refused" if isinstance(answer, MemplanError) else str(answer.verdict.answer)
            said[happened][word].append(row["id"])
    return said


def not_expressed() -> list[dict[str, Any]]:
    """Return groups of published measurements without a RunSpec: family, source, reason and ids."""
    return [json.loads(line) for line in (GOLDEN / "not_expressed.jsonl").read_text("utf-8").splitlines()]


NEAR_REPORT = 0.1  # relative error above which a report needs a cause


class Report(NamedTuple):
    """A run that people reported, and memplan's answer.

    row       the row of reports.jsonl
    answered  GiB in the row's metric; None if it has none
    verdict   fits, tight or does not fit; empty if no run describes it
    """

    row: dict[str, Any]
    answered: float | None
    verdict: str

    @property
    def error(self) -> float | None:
        return None if self.answered is None else self.answered / self.row["gib"] - 1

    @property
    def has_known_rows(self) -> bool:
        """Whether the lengths are known: all settings are stated, or most, and rows are packed, padded or published, or
        the figure is of an engine's pool, which does not depend on the lengths of requests."""
        packing = self.row["run"].get("batch", {}).get("packing", "padding_free")
        is_filled = packing != "padding_free" or self.row.get("padded", False) or self.row.get("metric") == "pool"
        return self.row["grade"] == "A" or (self.row["grade"] == "B" and is_filled)

    @property
    def is_missed(self) -> bool:
        """Whether the error is large, or, without a figure, the answer is another than what happened."""
        if self.error is not None and self.row["outcome"] == "ran":
            return abs(self.error) > NEAR_REPORT
        wrong = ("fits",) if self.row["outcome"] == "oom" else ("does not fit", "does not start")
        return self.verdict in wrong or (self.error is not None and abs(self.error) > NEAR_REPORT)


@cache
def reports() -> list[Report]:
    """Return what people reported."""
    lines = map(json.loads, (GOLDEN / "reports.jsonl").read_text("utf-8").splitlines())
    return [_report(row) for row in lines]


@shared
def _report(row: dict[str, Any]) -> Report:
    if "run" not in row:
        return Report(row, None, "")
    answer = estimate(RunSpec(**row["run"]))
    metric, pool = row.get("metric"), (answer.serving or {}).get("pool", 0)
    bytes_ = {"pool": pool, "reserved": answer.bytes.reserved, "used": answer.bytes.used}
    return Report(row, bytes_[metric] / 2**30 if metric else None, str(answer.verdict.answer))


class Tool(NamedTuple):
    """Another estimator on the golden runs: the number it answers, its mean error, and memplan's on the same runs."""

    name: str
    asked: int
    answered: int
    error: float
    worst: float
    memplan: float


def other_tools(family: str = "") -> list[Tool]:
    """Return other estimators by mean absolute error of `allocated` on the runs (of a family) that both answer."""
    lines = [json.loads(line) for line in OTHER_TOOLS.read_text("utf-8").splitlines()]
    ours = {m.id: m for m in published()[0] if not family or m.family == family}
    peaks: dict[str, dict[str, int]] = {}
    for line in lines:
        said = peaks.setdefault(f"{line['tool']} {line['version']}", {})
        if line.get("metric") == "allocated" and line["id"] in ours:
            said[line["id"]] = line["bytes"]
    found: list[Tool] = []
    for name, said in peaks.items():
        if said:
            errors = [abs(bytes_ / ours[id].allocated - 1) for id, bytes_ in said.items()]
            same = mean(abs(ours[id].error) for id in said)
            found.append(Tool(name, len(ours), len(said), mean(errors), max(errors), same))
    return sorted(found, key=lambda tool: tool.error)
