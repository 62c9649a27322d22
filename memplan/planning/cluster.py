"""How to divide a run over a cluster: the grids of degrees and strategies that fit, fastest first.

A grid is ruled out if its weights, gradients and optimizer states alone do not fit. The others are estimated in full,
fastest first, until enough of them fit. Grids that memplan refuses to estimate are counted by reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from math import gcd, prod
from typing import TYPE_CHECKING, Any

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.links import network, node_link
from memplan.catalogue.parallelism.sharding import STAGES, STRATEGIES
from memplan.core.errors import MemplanError, SpecError, refused
from memplan.core.records import NamedTuple
from memplan.estimate.answer import Estimate
from memplan.estimate.demand import FITS, Demand
from memplan.estimate.estimate import estimate
from memplan.models.cards import find_model
from memplan.models.model import ModelSpec
from memplan.planning.levers import spread, with_fields
from memplan.planning.traffic import Cluster, ParallelGrid, StepTime, TrafficFacts, min_state_bytes, step, traffic_facts
from memplan.planning.trials import attempt
from memplan.spec.parallelism import Offload, Parallelism
from memplan.spec.run import RunSpec

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration

MOST_GPUS = 65_536
DEGREES = ("tp", "pp", "cp", "ep")
_SIMPLEST_FIRST = ("none", "ddp", "zero1", "zero2", "fsdp2", "fsdp", "zero3")  # breaks ties in time


class FixedDegrees(NamedTuple):
    """Degrees and strategies that are fixed rather than searched; None leaves one open."""

    tp: int | None = None
    pp: int | None = None
    cp: int | None = None
    ep: int | None = None
    strategies: tuple[str, ...] | None = None
    sequences: int | None = None  # per step, over all GPUs


ANY = FixedDegrees()


class GridFit(NamedTuple):
    """A grid with the estimate of its worst rank and the time of a step."""

    grid: ParallelGrid
    answer: Estimate
    step: StepTime


class RefusedGrids(NamedTuple):
    """Why memplan refuses to estimate some grids: the message of one of them, its field, and how many they are."""

    reason: str
    field: str
    grids: int


class PeakComparison(NamedTuple):
    """Peak bytes of tensors on one GPU alone, and on each GPU if all of them run DDP or FSDP2; None if refused."""

    alone: int
    ddp: int | None
    fsdp2: int | None


class ClusterSearch(NamedTuple):
    """The result of a search.

    asked        the estimate of the run on one GPU
    placed       the fastest grids that fit, fastest first
    nearest      the estimated grid that comes nearest, if none fits
    grids        number of grids in all
    too_large    number whose weights, gradients and optimizer states alone do not fit
    missed       number that were estimated and do not fit
    refused      grids that memplan refuses to estimate, by reason
    slower       number not estimated because enough faster grids fit
    sequences    sequences per step over all GPUs, the same for every grid
    """

    cluster: Cluster
    asked: Estimate
    placed: tuple[GridFit, ...]
    nearest: GridFit | None
    grids: int
    too_large: int
    missed: int
    refused: tuple[RefusedGrids, ...]
    slower: int
    sequences: int
    together: PeakComparison

    @property
    def best(self) -> GridFit | None:
        return self.placed[0] if self.placed else None


def cluster_of(gpu: GPU, nodes: int, each: int, gbps: float | None = None) -> Cluster:
    """Return a cluster of `nodes` nodes with `each` GPUs each.

    Raises SpecError for counts below one, too many GPUs, or a network rate out of range.
    """
    for field, n in (("nodes", nodes), ("gpus", each)):
        if n < 1:
            raise refused(field, f"must be at least 1, not {n:,}")
    if nodes * each > MOST_GPUS:
        raise refused("nodes", f"{nodes:,} x {each:,} GPUs are more than {MOST_GPUS:,}")
    if gbps is not None and not 0 < gbps < 1e6:
        raise refused("network_gbps", f"must be more than 0 and less than a million, not {gbps:g}")
    return Cluster(gpu, nodes, each, node_link(gpu, each), network(gpu, gbps))


def search(
    run: RunSpec,
    cluster: Cluster,
    pinned: FixedDegrees = ANY,
    *,
    most: int | None = 5,
    demand: Demand = FITS,
    calibration: Calibration | None = None,
) -> ClusterSearch:
    """Return up to `most` grids that fit, or all of them if `most` is None, ordered by the time of a step.

    Every grid processes the same number of sequences per step: the run's batch, taken per GPU as in plain data
    parallelism, times the number of GPUs. The run's own degrees and strategy are ignored.

    Raises SpecError, naming every factor, if no grid is possible, and whatever `estimate` raises for the run on one
    GPU.
    """
    bare = _alone(run, cluster)
    asked = estimate(bare, calibration)
    demand.check(cluster.gpu)
    known = traffic_facts(bare, asked, run)
    model = find_model(bare.model)
    sequences = pinned.sequences or run.batch.micro * run.batch.accumulation * cluster.world
    grids = list(_grids(run, model, cluster, pinned, sequences))
    if not grids:
        raise _no_grid(run, model, cluster, pinned, sequences)
    small = [grid for grid in grids if min_state_bytes(known, grid) <= cluster.gpu.usable - demand.headroom]
    timed = sorted(((grid, step(known, cluster, grid)) for grid in small), key=_order)
    trials = _Trials(run, cluster, demand, calibration)
    placed: list[GridFit] = []
    for grid, took in timed:
        if most is not None and len(placed) >= most:
            break
        candidate = trials.place(grid, took)
        placed += [candidate] if candidate is not None else []
    slower = len(small) - len(placed) - trials.missed - trials.refused.total()
    if not placed and trials.nearest() is None:
        trials.set_nearest_by_states(known, grids)
    return ClusterSearch(
        cluster=cluster,
        asked=asked,
        placed=tuple(placed),
        nearest=None if placed else trials.nearest(),
        grids=len(grids),
        too_large=len(grids) - len(small),
        missed=trials.missed,
        refused=tuple(trials.reasons()),
        slower=slower,
        sequences=sequences,
        together=_together(run, cluster, asked, calibration),
    )


class _Trials:
    """Estimates grids, and counts those that do not fit or are refused."""

    def __init__(self, run: RunSpec, cluster: Cluster, demand: Demand, calibration: Calibration | None) -> None:
        self._run = run
        self._cluster = cluster
        self._demand = demand
        self._calibration = calibration
        self._messages: dict[str, tuple[str, str]] = {}
        self.refused: Counter[str] = Counter()
        self.missed = 0
        self._cut_short: list[
            tuple[int, ParallelGrid, StepTime]
        ] = []  # second stage does not fit: its bytes, the grid, its time
        self._nearest: GridFit | None = None

    def place(self, grid: ParallelGrid, took: StepTime) -> GridFit | None:
        """Return the grid's estimate if it meets the demand.

        A pipeline's second stage has most layers and nearly as much in flight as the first, so it is tried first; if it
        does not fit, the other stages are skipped.
        """
        try:
            run = run_of(self._run, self._cluster, grid)
            if grid.pp > 1:
                second = estimate(with_fields(run, [("parallelism.stage", 1)]), self._calibration).least
                if second > self._cluster.gpu.usable - self._demand.headroom:
                    self.missed += 1
                    self._cut_short.append((second, grid, took))
                    return None
            answer = estimate(run, self._calibration)
        except MemplanError as error:
            kind = re.sub(r"\d[\d,]*", "#", str(error))
            self._messages.setdefault(kind, (str(error), error.field))
            self.refused[kind] += 1
            return None
        candidate = GridFit(grid, answer, took)
        is_met = self._demand.fits_card_of(answer, self._cluster.gpu.usable)
        if is_met or (is_met is None and self._demand.met(answer)):
            return candidate
        self.missed += 1
        self._keep_if_nearer(candidate)
        return None

    def _keep_if_nearer(self, candidate: GridFit) -> None:
        if self._nearest is None or candidate.answer.least < self._nearest.answer.least:
            self._nearest = candidate

    def nearest(self) -> GridFit | None:
        """Return the grid that is short of the fewest bytes."""
        for stage_bytes, grid, took in sorted(self._cut_short, key=lambda entry: entry[0]):
            if self._nearest is not None and self._nearest.answer.least <= stage_bytes:
                break
            self._keep_if_nearer(
                GridFit(grid, estimate(run_of(self._run, self._cluster, grid), self._calibration), took)
            )
        return self._nearest

    def set_nearest_by_states(self, known: TrafficFacts, grids: list[ParallelGrid]) -> None:
        """Take as nearest the grid with the fewest bytes of weights, gradients and states; no grid can hold them."""
        for grid in sorted(grids, key=lambda grid: min_state_bytes(known, grid)):
            answer = attempt(partial(run_of, self._run, self._cluster, grid), self._calibration)
            if answer is not None:
                self._nearest = GridFit(grid, answer, step(known, self._cluster, grid))
                return

    def reasons(self) -> Iterator[RefusedGrids]:
        for kind, grids in self.refused.most_common():
            yield RefusedGrids(*self._messages[kind], grids)


def run_of(run: RunSpec, cluster: Cluster, grid: ParallelGrid) -> RunSpec:
    """Return the run divided by the grid on the cluster's GPUs. Raises SpecError if the resulting run is invalid."""
    asked = run.parallelism
    values: dict[str, Any] = {
        "world": cluster.world,
        **{name: getattr(grid, name) for name in ("dp", "tp", "pp", "cp", "ep", "strategy")},
        "offload": asked.offload,
        "sequence_parallel": asked.sequence_parallel and grid.tp > 1,
    }
    others = [name for name in Parallelism.model_fields if name not in values]
    values |= {name: getattr(asked, name) for name in others if _keeps(name, grid)}
    fields = [(f"parallelism.{name}", value) for name, value in values.items()]
    storage = [field for field in spread(run, grid.replicas, grid.strategy) if not field[0].startswith("parallelism.")]
    batch = [("batch.micro", grid.micro), ("batch.accumulation", grid.accumulation)]
    undivided = run.model_copy(update={"gpu": cluster.gpu.name, "parallelism": Parallelism()})
    return with_fields(undivided, [*fields, *storage, *batch])


def _keeps(name: str, grid: ParallelGrid) -> bool:
    """Whether another field of the run's parallelism still applies in the grid; most belong to a pipeline."""
    match name:
        case "stage":
            return False
        case "etp":
            return grid.ep > 1
        case "zero":
            return grid.strategy in STAGES
        case _:
            return grid.pp > 1


def plain_parallelism(run: RunSpec) -> Parallelism:
    """Return the parallelism of one GPU, with the run's offloading except that of weights, which needs several."""
    return Parallelism(offload=Offload(**{**dict(run.parallelism.offload), "parameters": False}))


def _alone(run: RunSpec, cluster: Cluster) -> RunSpec:
    return run.model_copy(update={"gpu": cluster.gpu.name, "parallelism": plain_parallelism(run)})


def _order(timed: tuple[ParallelGrid, StepTime]) -> tuple[float, int, int, int]:
    """Sort key: usual time, then bytes sent, then the simplest."""
    grid, took = timed
    place = _SIMPLEST_FIRST.index(grid.strategy) if grid.strategy in _SIMPLEST_FIRST else len(_SIMPLEST_FIRST)
    return took.seconds.usual, took.bytes, grid.tp * grid.pp * grid.cp * grid.ep, place


# --- the grids -----------------------------------------------------------------------------------------------------


def divided_by(run: RunSpec, model: ModelSpec) -> dict[str, tuple[tuple[int, str], ...]]:
    """Return the counts that each degree must divide, with their names. pp is bounded by the layers instead.

    A vocabulary that tp does not divide is padded. Context parallelism gives each rank two parts of a sequence, one
    from either end, to balance the work under a causal mask.
    """
    heads = ((model.num_attention_heads, "attention heads"), (model.num_key_value_heads, "key/value heads"))
    return {
        "tp": heads,
        "pp": (),
        "cp": ((run.batch.sequence, "tokens of a sequence, in two parts for each rank,"),),
        "ep": ((model.axes().get("E", 1), "experts"),),
    }


def degrees_of(run: RunSpec, model: ModelSpec, world: int) -> dict[str, tuple[int, ...]]:
    """Return the valid values of each degree in a world of that size."""
    counts = {name: [n for n, _ in named] for name, named in divided_by(run, model).items()}
    return {
        "tp": _divisors(gcd(world, *counts["tp"])),
        "pp": tuple(n for n in _divisors(world) if n <= model.num_hidden_layers),
        "cp": tuple(n for n in _divisors(world) if n == 1 or run.batch.sequence % (2 * n) == 0),
        "ep": _divisors(gcd(world, *counts["ep"])),
    }


def _divisors(n: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, n + 1) if n % d == 0)


def _grids(
    run: RunSpec, model: ModelSpec, cluster: Cluster, pinned: FixedDegrees, sequences: int
) -> Iterator[ParallelGrid]:
    world, micro = cluster.world, run.batch.micro
    degrees = degrees_of(run, model, world)
    may_share_tp = not model.is_megatron  # transformers may divide experts among the tensor-parallel ranks
    for name in DEGREES:
        asked = getattr(pinned, name)
        if asked is not None:
            degrees[name] = tuple(n for n in degrees[name] if n == asked)
    for tp in degrees["tp"]:
        for pp in degrees["pp"]:
            for cp in degrees["cp"]:
                dp, over = divmod(world, tp * pp * cp)
                if over or sequences % (dp * micro):
                    continue
                passes = sequences // (dp * micro)
                virtual = run.parallelism.virtual_stages if pp > 1 else 1
                for ep in degrees["ep"]:
                    if (dp * cp) % ep and not (may_share_tp and ep == tp == world):
                        continue
                    for strategy in _strategies(dp * cp, pinned):
                        yield ParallelGrid(dp, tp, pp, cp, ep, strategy, micro, passes, virtual)


def _strategies(replicas: int, pinned: FixedDegrees) -> tuple[str, ...]:
    if replicas == 1:
        return ("none",)
    proposed = pinned.strategies or [name for name in STRATEGIES if name != "zero0"]  # which divides no more than ddp
    return tuple(name for name in STRATEGIES if name in proposed)


def _no_grid(run: RunSpec, model: ModelSpec, cluster: Cluster, pinned: FixedDegrees, sequences: int) -> SpecError:
    """Return the error that says why there is no grid: every pinned degree that does not divide what it must."""
    world = cluster.world
    size = f"{cluster.nodes:,} x {cluster.each:,} = {world:,} GPUs"
    problems: list[str] = []
    first = ""
    for name, counts in divided_by(run, model).items():
        asked: int | None = getattr(pinned, name)
        if asked is None:
            continue
        undivided = [f"{n:,} {what}" for n, what in counts if n % (asked * (2 if name == "cp" and asked > 1 else 1))]
        undivided += [f"{world:,} GPUs"] if world % asked else []
        if undivided:
            problems.append(f"{name} {asked:,} does not divide {' and '.join(undivided)}")
        elif name == "pp" and asked > model.num_hidden_layers:
            problems.append(f"pp {asked:,} is more than {model.num_hidden_layers:,} layers")
        first = first or (f"parallelism.{name}" if problems else "")
    if problems:
        return refused(first, f"{'; '.join(problems)}")
    degrees = {name: int(getattr(pinned, name) or 1) for name in ("tp", "pp", "cp")}
    taken = prod(degrees.values())
    factors = " x ".join(f"{name} {n:,}" for name, n in degrees.items())
    if world % taken:
        field = "parallelism.world"
        return refused(field, f"{size} are not a multiple of {factors} = {taken:,}")
    field = "global_batch" if pinned.sequences else "batch.micro"
    experts = f", and ep {pinned.ep:,} must divide dp x cp" if pinned.ep else ""
    return refused(
        field,
        f"{sequences:,} sequences a step do not divide into micro-batches of {run.batch.micro:,} for any dp: "
        f"of {size}, {factors} leave {world // taken:,}{experts}",
    )


def _together(run: RunSpec, cluster: Cluster, asked: Estimate, calibration: Calibration | None) -> PeakComparison:
    peaks: list[int | None] = []
    for strategy in ("ddp", "fsdp2") if cluster.world > 1 else ():
        grid = ParallelGrid(cluster.world, 1, 1, 1, 1, strategy, run.batch.micro, run.batch.accumulation)
        answer = attempt(partial(run_of, run, cluster, grid), calibration)
        peaks.append(answer.bytes.allocated if answer else None)
    ddp, fsdp2 = peaks or (None, None)
    return PeakComparison(asked.bytes.allocated, ddp, fsdp2)
