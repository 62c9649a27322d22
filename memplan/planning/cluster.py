"""How a cluster's GPUs should divide a run: every grid of degrees and strategies, those that fit by the time they take.

A grid is ruled out where the weights, gradients and states alone do not fit; of the others the fastest are estimated
first, as they stand, until as many fit as were asked for. What memplan refuses is counted with its reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from math import gcd, prod
from typing import Any, NamedTuple

from memplan.catalogue.families.megatron import KIND
from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.links import inside, network
from memplan.catalogue.parallelism.sharding import STAGES, STRATEGIES
from memplan.core.errors import MemplanError, SpecError
from memplan.estimate.answer import Estimate
from memplan.estimate.calibration import Calibration
from memplan.estimate.demand import FITS, Demand
from memplan.estimate.estimate import estimate
from memplan.models.cards import find_model
from memplan.models.model import ModelSpec
from memplan.planning.levers import spread, with_fields
from memplan.planning.traffic import Cluster, Facts, Grid, Step, facts, least, step
from memplan.spec.parallelism import Offload, Parallelism
from memplan.spec.run import RunSpec

MOST_GPUS = 65_536
DEGREES = ("tp", "pp", "cp", "ep")
_IN_ORDER = ("none", "ddp", "zero1", "zero2", "fsdp2", "fsdp", "zero3")  # where two take as long


class Pinned(NamedTuple):
    """What is not searched but asked for; None is any."""

    tp: int | None = None
    pp: int | None = None
    cp: int | None = None
    ep: int | None = None
    strategies: tuple[str, ...] | None = None
    sequences: int | None = None  # of a step, all GPUs together


ANY = Pinned()


class Placed(NamedTuple):
    """A grid that fits: the run on its worst rank, and how long a step takes."""

    grid: Grid
    answer: Estimate
    step: Step


class Refused(NamedTuple):
    """Why memplan does not answer for some grids, in the words of one of them, and how many those are."""

    reason: str
    field: str
    grids: int


class Together(NamedTuple):
    """What so many cards bring: bytes of tensors at the peak of one that is alone, and of each of all under DDP and
    FSDP2; None where memplan does not answer."""

    alone: int
    ddp: int | None
    fsdp2: int | None


class Found(NamedTuple):
    """What a search found.

    placed       the fastest grids that fit, fastest first
    nearest      where none does, the one that lacks least of those that were estimated
    grids        how many were looked at in all
    too_large    those whose weights, gradients and states alone are too large
    missed       those that were estimated, and do not fit
    refused      those that memplan does not answer for, by reason
    slower       those that were not estimated, as enough that are faster fit
    sequences    of a step, all GPUs together: the same for every grid
    """

    cluster: Cluster
    asked: Estimate
    placed: tuple[Placed, ...]
    nearest: Placed | None
    grids: int
    too_large: int
    missed: int
    refused: tuple[Refused, ...]
    slower: int
    sequences: int
    together: Together

    @property
    def best(self) -> Placed | None:
        return self.placed[0] if self.placed else None


def cluster_of(gpu: GPU, nodes: int, each: int, gbps: float | None = None) -> Cluster:
    """`nodes` of `each` such GPUs. Raises SpecError for counts that are none, or a network without a rate."""
    for field, n in (("nodes", nodes), ("gpus", each)):
        if n < 1:
            raise SpecError(f"{field}: must be at least 1, not {n:,}", field)
    if nodes * each > MOST_GPUS:
        raise SpecError(f"nodes: {nodes:,} x {each:,} GPUs are more than {MOST_GPUS:,}", "nodes")
    if gbps is not None and not 0 < gbps < 1e6:
        raise SpecError(f"network_gbps: must be more than 0 and less than a million, not {gbps:g}", "network_gbps")
    return Cluster(gpu, nodes, each, inside(gpu, each), network(gpu, gbps))


def search(
    run: RunSpec,
    cluster: Cluster,
    pinned: Pinned = ANY,
    *,
    most: int | None = 5,
    demand: Demand = FITS,
    calibration: Calibration | None = None,
) -> Found:
    """Up to `most` grids that fit, by the time of a step; with None, all of them.

    The run's batch is that of one GPU if all of them share the data: every grid takes as many sequences a step. Its own
    degrees and strategy say nothing.

    Raises SpecError where no grid is there, naming every factor, and what `estimate` raises for the run on one GPU.
    """
    bare = _alone(run, cluster)
    asked = estimate(bare, calibration)
    demand.check(cluster.gpu)
    known = facts(bare, asked, run)
    model = find_model(bare.model)
    sequences = pinned.sequences or run.batch.micro * run.batch.accumulation * cluster.world
    grids = list(_grids(run, model, cluster, pinned, sequences))
    if not grids:
        raise _none(run, model, cluster, pinned, sequences)
    small = [grid for grid in grids if least(known, grid) <= cluster.gpu.usable - demand.headroom]
    timed = sorted(((grid, step(known, cluster, grid)) for grid in small), key=_order)
    looked = _Looked(run, cluster, demand, calibration)
    placed: list[Placed] = []
    for grid, took in timed:
        if most is not None and len(placed) >= most:
            break
        found = looked.fitting(grid, took)
        placed += [found] if found is not None else []
    slower = len(small) - len(placed) - looked.missed - looked.refused.total()
    if not placed and looked.nearest() is None:
        looked.smallest(known, grids)
    return Found(
        cluster=cluster,
        asked=asked,
        placed=tuple(placed),
        nearest=None if placed else looked.nearest(),
        grids=len(grids),
        too_large=len(grids) - len(small),
        missed=looked.missed,
        refused=tuple(looked.reasons()),
        slower=slower,
        sequences=sequences,
        together=_together(run, cluster, asked, calibration),
    )


class _Looked:
    """The grids that were estimated, but for those that fit."""

    def __init__(self, run: RunSpec, cluster: Cluster, demand: Demand, calibration: Calibration | None) -> None:
        self._run = run
        self._cluster = cluster
        self._demand = demand
        self._calibration = calibration
        self._words: dict[str, tuple[str, str]] = {}
        self.refused: Counter[str] = Counter()
        self.missed = 0
        self._cut: list[tuple[int, Grid, Step]] = []  # of which one stage alone was looked at, and its bytes
        self._nearest: Placed | None = None

    def fitting(self, grid: Grid, took: Step) -> Placed | None:
        """The grid, where it meets the demand. Of a pipeline whose second stage, which has most layers and nearly as
        much in flight as the first, has no room, the other stages are not looked at."""
        try:
            run = run_of(self._run, self._cluster, grid)
            if grid.pp > 1:
                one = estimate(with_fields(run, [("parallelism.stage", 1)]), self._calibration).least
                if one > self._cluster.gpu.usable - self._demand.headroom:
                    self.missed += 1
                    self._cut.append((one, grid, took))
                    return None
            answer = estimate(run, self._calibration)
        except MemplanError as error:
            kind = re.sub(r"\d[\d,]*", "#", str(error))
            self._words.setdefault(kind, (str(error), error.field))
            self.refused[kind] += 1
            return None
        found = Placed(grid, answer, took)
        told = self._demand.told(answer, self._cluster.gpu.usable)
        if told or (told is None and self._demand.met(answer)):
            return found
        self.missed += 1
        self._nearer(found)
        return None

    def _nearer(self, found: Placed) -> None:
        if self._nearest is None or found.answer.least < self._nearest.answer.least:
            self._nearest = found

    def nearest(self) -> Placed | None:
        """Of the grids that do not fit, the one that lacks least."""
        for one, grid, took in sorted(self._cut, key=lambda found: found[0]):
            if self._nearest is not None and self._nearest.answer.least <= one:
                break
            self._nearer(Placed(grid, estimate(run_of(self._run, self._cluster, grid), self._calibration), took))
        return self._nearest

    def smallest(self, known: Facts, grids: list[Grid]) -> None:
        """Of grids whose weights, gradients and states are too large, the one with least of them is the nearest."""
        for grid in sorted(grids, key=lambda grid: least(known, grid)):
            try:
                answer = estimate(run_of(self._run, self._cluster, grid), self._calibration)
            except MemplanError:
                continue
            self._nearest = Placed(grid, answer, step(known, self._cluster, grid))
            return

    def reasons(self) -> Iterator[Refused]:
        for kind, grids in self.refused.most_common():
            yield Refused(*self._words[kind], grids)


def run_of(run: RunSpec, cluster: Cluster, grid: Grid) -> RunSpec:
    """The run as one of the cluster's GPUs has it in the grid. Raises SpecError where a run cannot be so."""
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
    there = run.model_copy(update={"gpu": cluster.gpu.name, "parallelism": Parallelism()})
    return with_fields(there, [*fields, *storage, *batch])


def _keeps(name: str, grid: Grid) -> bool:
    """Whether a further field of the asked parallelism says something in the grid: most are of a pipeline."""
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
    """One GPU, with what the run offloads, but for weights, which only several do."""
    return Parallelism(offload=Offload(**{**dict(run.parallelism.offload), "parameters": False}))


def _alone(run: RunSpec, cluster: Cluster) -> RunSpec:
    return run.model_copy(update={"gpu": cluster.gpu.name, "parallelism": plain_parallelism(run)})


def _order(timed: tuple[Grid, Step]) -> tuple[float, int, int, int]:
    """By the usual time, then by what is sent, then the simplest."""
    grid, took = timed
    place = _IN_ORDER.index(grid.strategy) if grid.strategy in _IN_ORDER else len(_IN_ORDER)
    return took.seconds.usual, took.bytes, grid.tp * grid.pp * grid.cp * grid.ep, place


# --- the grids -----------------------------------------------------------------------------------------------------


def divided_by(run: RunSpec, model: ModelSpec) -> dict[str, tuple[tuple[int, str], ...]]:
    """What each degree must divide, and what that is called; a pipeline has at most as many stages as layers.

    A vocabulary that tp does not divide is padded. Context parallelism gives each rank two parts of a sequence, one
    from either end, so that under a causal mask all have as much to do.
    """
    heads = ((model.num_attention_heads, "attention heads"), (model.num_key_value_heads, "key/value heads"))
    return {
        "tp": heads,
        "pp": (),
        "cp": ((run.batch.sequence, "tokens of a sequence, in two parts for each rank,"),),
        "ep": ((model.axes().get("E", 1), "experts"),),
    }


def degrees_of(run: RunSpec, model: ModelSpec, world: int) -> dict[str, tuple[int, ...]]:
    """The degrees that divide what they must."""
    numbers = {name: [n for n, _ in of] for name, of in divided_by(run, model).items()}
    return {
        "tp": _divisors(gcd(world, *numbers["tp"])),
        "pp": tuple(n for n in _divisors(world) if n <= model.num_hidden_layers),
        "cp": tuple(n for n in _divisors(world) if n == 1 or run.batch.sequence % (2 * n) == 0),
        "ep": _divisors(gcd(world, *numbers["ep"])),
    }


def _divisors(n: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, n + 1) if n % d == 0)


def _grids(run: RunSpec, model: ModelSpec, cluster: Cluster, pinned: Pinned, sequences: int) -> Iterator[Grid]:
    world, micro = cluster.world, run.batch.micro
    degrees = degrees_of(run, model, world)
    alike = model.model_type != KIND  # transformers' experts may be among the ranks that divide matrices
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
                    if (dp * cp) % ep and not (alike and ep == tp == world):
                        continue
                    for strategy in _strategies(dp * cp, pinned):
                        yield Grid(dp, tp, pp, cp, ep, strategy, micro, passes, virtual)


def _strategies(replicas: int, pinned: Pinned) -> tuple[str, ...]:
    if replicas == 1:
        return ("none",)
    return tuple(name for name in STRATEGIES if pinned.strategies is None or name in pinned.strategies)


def _none(run: RunSpec, model: ModelSpec, cluster: Cluster, pinned: Pinned, sequences: int) -> SpecError:
    """Why there is no grid: of what is asked for, all that does not divide what it must."""
    world = cluster.world
    size = f"{cluster.nodes:,} x {cluster.each:,} = {world:,} GPUs"
    wrong: list[str] = []
    first = ""
    for name, of in divided_by(run, model).items():
        asked: int | None = getattr(pinned, name)
        if asked is None:
            continue
        left = [f"{n:,} {what}" for n, what in of if n % (asked * (2 if name == "cp" and asked > 1 else 1))]
        left += [f"{world:,} GPUs"] if world % asked else []
        if left:
            wrong.append(f"{name} {asked:,} does not divide {' and '.join(left)}")
        elif name == "pp" and asked > model.num_hidden_layers:
            wrong.append(f"pp {asked:,} is more than {model.num_hidden_layers:,} layers")
        first = first or (f"parallelism.{name}" if wrong else "")
    if wrong:
        return SpecError(f"{first}: {'; '.join(wrong)}", first)
    degrees = {name: int(getattr(pinned, name) or 1) for name in ("tp", "pp", "cp")}
    taken = prod(degrees.values())
    factors = " x ".join(f"{name} {n:,}" for name, n in degrees.items())
    if world % taken:
        field = "parallelism.world"
        return SpecError(f"{field}: {size} are no multiple of {factors} = {taken:,}", field)
    field = "global_batch" if pinned.sequences else "batch.micro"
    experts = f", and ep {pinned.ep:,} must divide dp x cp" if pinned.ep else ""
    return SpecError(
        f"{field}: {sequences:,} sequences a step do not divide into micro-batches of {run.batch.micro:,} for any dp "
        f"of {size}, of which {factors} leave {world // taken:,}{experts}",
        field,
    )


def _together(run: RunSpec, cluster: Cluster, asked: Estimate, calibration: Calibration | None) -> Together:
    held: list[int | None] = []
    for strategy in ("ddp", "fsdp2") if cluster.world > 1 else ():
        grid = Grid(cluster.world, 1, 1, 1, 1, strategy, run.batch.micro, run.batch.accumulation)
        try:
            held.append(estimate(run_of(run, cluster, grid), calibration).bytes.allocated)
        except MemplanError:
            held.append(None)
    ddp, fsdp2 = held or (None, None)
    return Together(asked.bytes.allocated, ddp, fsdp2)
