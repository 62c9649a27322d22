"""Where a scheduler's jobs go: onto the GPUs of a pool that hold them.

A job is placed on whole GPUs that it surely fits, with the upper end of its band, or on a shared GPU with that many
bytes left. Jobs that need the fewest GPUs are placed first, of these the largest, each on what its policy ranks first.
If GPUs are shared, that order is compared with some at random: the one that places most jobs on the fewest GPUs is
taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from math import inf
from random import Random
from typing import Any, Literal, get_args

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import find_gpu, mig_instances
from memplan.core.cached_property import cached_property
from memplan.core.errors import MemplanError, UnknownNameError, errors_about, printable, refused
from memplan.core.records import NamedTuple
from memplan.core.units import gib
from memplan.estimate.answer import Estimate
from memplan.estimate.estimate import estimate
from memplan.planning.fitting import CardAnswers, card_answers
from memplan.planning.levers import spread, with_fields
from memplan.spec.base import MOST_GPUS
from memplan.spec.pool import Job, NodeShape, listed
from memplan.spec.run import RunSpec

Policy = Literal["tightest", "cheapest", "spread"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
_SHARDING = "fsdp2"  # of a job on more GPUs than its run says
_MORE_ORDERS = 12  # of the jobs, at random, if GPUs are shared


class Seat(NamedTuple):
    """GPUs of one machine, by number."""

    machine: str
    cards: tuple[int, ...]


class PlacedJob:
    """A job and the GPUs it is placed on.

    job     the job
    index   its place among the jobs
    gpu     the kind of GPU
    seats   the GPUs of each machine
    run     the run on that number of GPUs
    """

    def __init__(self, job: Job, index: int, gpu: GPU, seats: tuple[Seat, ...], run: RunSpec) -> None:
        self.job, self.index, self.gpu, self.seats, self.run = job, index, gpu, seats, run

    def __repr__(self) -> str:
        return f"PlacedJob(index={self.index}, gpu={self.gpu.name!r}, seats={self.seats!r})"

    @property
    def gpus(self) -> int:
        return sum(len(seat.cards) for seat in self.seats)

    @cached_property
    def answer(self) -> Estimate:
        """The estimate of the run on one of its GPUs."""
        return estimate(self.run.model_copy(update={"gpu": self.gpu.name}))

    @property
    def bytes(self) -> int:
        """The bytes that each GPU shows at the upper end of the band."""
        return self.answer.band.high

    @property
    def host_bytes(self) -> int:
        """The bytes of host memory that the job takes of each machine."""
        return self.answer.host.peak.node

    def as_dict(self) -> dict[str, Any]:
        names = {"job": self.index, "name": self.job.name, "gpu": self.gpu.name, "gpus": self.gpus}
        seats = [{"machine": seat.machine, "cards": list(seat.cards)} for seat in self.seats]
        return {**names, "seats": seats, "bytes": self.bytes, "host_bytes": self.host_bytes}


class PendingJob(NamedTuple):
    """A job that is not placed.

    code    too_large, too_few_cards, host_memory or no_free_card; or that of the error that refuses the run
    reason  the same in a line
    """

    job: Job
    index: int  # pyright: ignore[reportIncompatibleMethodOverride] (the place among the jobs)
    code: str
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return {"job": self.index, "name": self.job.name, "code": self.code, "reason": self.reason}


class Placement(NamedTuple):
    """The jobs that are placed and those that are not, each in the order of the jobs.

    cards_used   GPUs with a job
    cards        GPUs of the pool; a MIG instance counts as one
    """

    placed: tuple[PlacedJob, ...]
    pending: tuple[PendingJob, ...]
    cards_used: int
    cards: int

    def as_dict(self) -> dict[str, Any]:
        jobs = {"placed": [p.as_dict() for p in self.placed], "pending": [p.as_dict() for p in self.pending]}
        return {**jobs, "cards_used": self.cards_used, "cards": self.cards}


def place(
    jobs: Iterable[Job | RunSpec | Mapping[str, Any]],
    pool: Iterable[NodeShape | str | Mapping[str, Any]],
    policy: Policy = "tightest",
) -> Placement:
    """Return where the jobs go.

    tightest  the GPU with the least memory that holds the job
    cheapest  the lowest price of all the job's GPUs
    spread    the machine with the most free

    A job that cannot be placed is pending, with the reason. Raises MemplanError for a job, a node or a policy that is
    malformed, and for a pool without a node.
    """
    if policy not in POLICIES:
        raise UnknownNameError("policy", str(policy), POLICIES)
    nodes: list[NodeShape] = []
    for index, node in enumerate(listed("pool", pool)):
        with errors_about(f"pool.{index}", ""), errors_about("", "run"):  # as which one that is no node is refused
            nodes.append(NodeShape.model_validate(node))
    if not nodes:
        raise refused("pool", "has no node; give one, as in '8x a100'")
    cards = sum(node.cards * node.count for node in nodes)
    if cards > MOST_GPUS:
        raise refused("pool", f"must have at most {MOST_GPUS:,} GPUs, not {cards:,}")
    asked: list[JobDemand] = []
    for index, job in enumerate(listed("jobs", jobs)):
        with errors_about(f"jobs.{index}", ""):
            asked.append(JobDemand(Job.model_validate(job), index))
    kinds = tuple(pool_gpus(nodes))
    for job in asked:
        job.weigh(kinds)
    best = packed(nodes, policy, sorted(asked, key=lambda job: (job.fewest, -job.size)))
    if any(kind.is_shared for kind in kinds):
        for seed in range(_MORE_ORDERS):
            order = Random(seed).sample(asked, len(asked))
            best = min(best, packed(nodes, policy, order), key=lambda tried: (len(tried.pending), tried.cards_used))
    placed = sorted(best.placed, key=lambda job: job.index)
    pending = sorted(map(best.pending_job, best.pending), key=lambda job: job.index)
    return Placement(tuple(placed), tuple(pending), best.cards_used, sum(kind.total for kind in kinds))


class JobDemand:
    """The memory that a job asks of a GPU, for each number of GPUs that it may use.

    fewest  the fewest GPUs of the pool that hold it, were they all free; 0 if none do
    size    bytes that these hold together, at least
    """

    def __init__(self, job: Job, index: int) -> None:
        self.job, self.index = job, index
        self.counts = tuple(sorted(set(job.gpus))) or (job.run.parallelism.world,)
        self.fewest = self.size = 0
        self._answers: dict[int, CardAnswers | MemplanError] = {}

    def weigh(self, kinds: Iterable[PoolGPU]) -> None:
        """Find the fewest GPUs that hold the job."""
        largest: dict[object, PoolGPU] = {}  # of GPUs that run the same kernels, those with the most memory
        for kind in sorted(kinds, key=lambda kind: (kind.gpu.usable, kind.total)):
            largest[kind.gpu.compute_capability, bool(kind.gpu.mig)] = kind
        for count in self.counts:
            for kind in sorted(largest.values(), key=lambda kind: -kind.gpu.usable):
                if _is_wide_enough(count, kind) and self.fits(count, kind.gpu):
                    self.fewest, self.size = count, count * self.estimate(count, kind.gpu).least
                    return

    def on(self, count: int, gpu: GPU) -> Estimate | MemplanError:
        """Return the estimate on GPUs of this kind, or the error that refuses it."""
        if count not in self._answers:
            try:
                self._answers[count] = card_answers(_on(self.job.run, count))
            except MemplanError as error:
                self._answers[count] = error
        answers = self._answers[count]
        return answers if isinstance(answers, MemplanError) else answers.on(gpu)

    def fits(self, count: int, gpu: GPU) -> bool:
        if isinstance(self.on(count, gpu), MemplanError):
            return False
        answers = self._answers[count]
        return isinstance(answers, CardAnswers) and answers.fit(gpu).fits

    def estimate(self, count: int, gpu: GPU) -> Estimate:
        """Return the estimate on GPUs of this kind, which do not refuse the run."""
        found = self.on(count, gpu)
        assert not isinstance(found, MemplanError)
        return found


def _on(run: RunSpec, count: int) -> RunSpec:
    """Return the run on a number of GPUs, without one of its own. Raises SpecError."""
    p, run = run.parallelism, run.model_copy(update={"gpu": None})
    if count == p.world:
        return run
    if p.tp * p.pp * p.cp > 1 or p.device_map is not None:
        raise refused("gpus", f"{count} are not the {p.world} that tp, pp, cp or a device map divide the run among")
    return with_fields(run, spread(run, count, _SHARDING if p.strategy == "none" else p.strategy))


class PoolMachine:
    """A machine of the pool. `host_free` is the host memory left, in bytes; None for enough."""

    def __init__(self, name: str, host_memory: int | None) -> None:
        self.name, self.host_free = name, host_memory


class CardRow:
    """Equal GPUs of one machine: the bytes free of each, and whether it has a job; `unused` have none."""

    def __init__(self, machine: PoolMachine, cards: int, usable: int) -> None:
        self.machine, self.usable, self.unused = machine, usable, cards
        self.free, self.used = [usable] * cards, [False] * cards


class PoolGPU(NamedTuple):
    """One kind of GPU of the pool, or of MIG instance: its price in dollars an hour, and the machines that have it."""

    gpu: GPU
    is_shared: bool
    usd: float
    rows: tuple[CardRow, ...]

    @property
    def cards(self) -> int:
        """GPUs of one machine."""
        return len(self.rows[0].free)

    @property
    def total(self) -> int:
        return self.cards * len(self.rows)

    @property
    def unused(self) -> int:
        return sum(row.unused for row in self.rows)

    @property
    def has_limited_hosts(self) -> bool:
        return self.rows[0].machine.host_free is not None


def pool_gpus(nodes: Iterable[NodeShape]) -> Iterator[PoolGPU]:
    """Yield the kinds of GPU of a pool on which nothing runs yet. Raises UnknownNameError or SpecError."""
    numbers: Counter[str] = Counter()
    for node in nodes:
        with errors_about("pool", "gpu"):
            gpu, name = find_gpu(node.gpu), node.name or node.gpu
        machines = [PoolMachine(f"{name}-{numbers[name] + i}", node.host_memory) for i in range(node.count)]
        numbers[name] += node.count
        usd = node.usd_per_hour
        if usd is None:
            usd = min((price.usd_per_hour for price in gpu.prices if price.date), default=inf)
        for part, number in _parts(gpu, node.mig):
            rows = tuple(CardRow(machine, node.cards * number, part.usable) for machine in machines)
            yield PoolGPU(part, node.shared, usd * part.usable / gpu.usable, rows)


def _parts(gpu: GPU, profiles: tuple[str, ...]) -> Iterator[tuple[GPU, int]]:
    """Yield what a GPU is divided into, and the number of each."""
    if not profiles:
        yield gpu, gpu.devices
        return
    instances = {instance.mig: instance for instance in mig_instances(gpu)}
    if not instances:
        raise refused("mig", f"{gpu.name} has no MIG profiles in the table")
    for profile in profiles:
        if profile not in instances:
            raise UnknownNameError("mig", profile, instances)
    named = printable(" and ".join(profiles), 60)
    if sum(instances[profile].usable for profile in profiles) > gpu.driver_total:
        raise refused("mig", f"{named} need more memory than one {gpu.title} has")
    slices = {profile: int(profile.partition("g")[0]) for profile in instances}
    most = max(slices.values())  # the largest profile is all of the GPU
    if sum(slices[profile] for profile in profiles) > most:
        raise refused("mig", f"{named} need more slices than the {most} of one {gpu.title}")
    yield from ((instances[profile], number) for profile, number in Counter(profiles).items())


def packed(nodes: Iterable[NodeShape], policy: Policy, jobs: Iterable[JobDemand]) -> Packing:
    """Return the pool with the jobs, placed in this order."""
    packing = Packing(tuple(pool_gpus(nodes)), policy)
    for job in jobs:
        packing.take(job)
    return packing


class Packing:
    """A pool that is filled job by job."""

    def __init__(self, kinds: tuple[PoolGPU, ...], policy: Policy) -> None:
        self.kinds, self._policy = kinds, policy
        self.placed: list[PlacedJob] = []
        self.pending: list[JobDemand] = []
        self._orders: dict[tuple[int, ...], list[tuple[int, PoolGPU, bool]]] = {}
        self._short: dict[int, tuple[int, int]] = {}  # by job: host memory needed, and the most that was left

    @property
    def cards_used(self) -> int:
        return sum(len(row.used) - row.unused for kind in self.kinds for row in kind.rows)

    def take(self, job: JobDemand) -> None:
        """Place a job on what the policy ranks first, or note that it is pending."""
        for count, kind, opens in self._ranked(job.counts) if job.fewest else ():
            if count < job.fewest or not _is_wide_enough(count, kind) or not (kind.is_shared or kind.unused):
                continue
            seats = self._seats(job, count, kind, opens) if job.fits(count, kind.gpu) else ()
            if seats:
                self.placed.append(PlacedJob(job.job, job.index, kind.gpu, seats, _on(job.job.run, count)))
                return
        self.pending.append(job)

    def _ranked(self, counts: tuple[int, ...]) -> list[tuple[int, PoolGPU, bool]]:
        """Return numbers and kinds of GPU, best first, and whether GPUs without a job may be taken: not of those that
        are shared, which come first."""
        if counts in self._orders and self._policy != "spread":
            return self._orders[counts]

        def rank(choice: tuple[int, PoolGPU]) -> tuple[float | str, ...]:
            count, kind = choice
            size = (count, kind.gpu.usable, kind.gpu.name)
            if self._policy == "cheapest":
                return (count * kind.usd, *size)
            if self._policy == "spread":
                return (count, -max(sum(row.free) / row.usable for row in kind.rows), *size)
            return size

        choices = sorted(((count, kind) for count in counts for kind in self.kinds), key=rank)
        open_first = [(*choice, False) for choice in choices if choice[1].is_shared and self._policy != "spread"]
        self._orders[counts] = [*open_first, *((*choice, True) for choice in choices)]
        return self._orders[counts]

    def _seats(self, job: JobDemand, count: int, kind: PoolGPU, opens: bool) -> tuple[Seat, ...]:
        """Take GPUs for a job that they hold, and return them; empty if too few are free."""
        answer = job.estimate(count, kind.gpu)
        need = answer.most if kind.is_shared else kind.gpu.usable
        host = answer.host.peak.node if kind.has_limited_hosts else 0
        each, sign = min(count, kind.cards), -1 if self._policy == "spread" else 1
        found: list[tuple[CardRow, list[int]]] = []
        most_left = -1
        for row in sorted(kind.rows, key=lambda row: sign * sum(row.free)):
            cards = [i for i, free in enumerate(row.free) if free >= need and (opens or row.used[i])]
            if len(cards) < each:
                continue
            if row.machine.host_free is not None and row.machine.host_free < host:
                most_left = max(most_left, row.machine.host_free)
                continue
            found.append((row, sorted(cards, key=lambda i: sign * row.free[i])[:each]))
            if len(found) * each == count:
                return tuple(_taken(row, cards, need, host) for row, cards in found)
        if most_left >= 0:
            self._short[job.index] = host, most_left
        return ()

    def pending_job(self, job: JobDemand) -> PendingJob:
        """Return why a job is not placed."""
        wide = [(count, kind) for count in job.counts for kind in self.kinds if _is_wide_enough(count, kind)]
        if not wide:
            most = max((kind.cards for kind in self.kinds if not kind.gpu.mig), default=1)
            reason = f"no machines have {job.counts[0]:,} GPUs for it; the largest has {most:,}"
            return PendingJob(job.job, job.index, "too_few_cards", reason)
        if not job.fewest:
            return PendingJob(job.job, job.index, *_too_large(job, wide))
        if job.index in self._short:
            host, left = map(gib, self._short[job.index])
            reason = f"host memory: needs {host} of one machine; the most left is {left}"
            return PendingJob(job.job, job.index, "host_memory", reason)
        return PendingJob(job.job, job.index, "no_free_card", "the GPUs of the pool that hold it are taken")


def _is_wide_enough(count: int, kind: PoolGPU) -> bool:
    """Return whether machines with these GPUs have that number, or several of them together."""
    if kind.gpu.mig:
        return count == 1  # NCCL does not connect MIG instances
    return count <= kind.cards or (count % kind.cards == 0 and count <= kind.total)


def _taken(row: CardRow, cards: list[int], need: int, host: int) -> Seat:
    for i in cards:
        row.free[i] -= need
        row.unused -= not row.used[i]
        row.used[i] = True
    if row.machine.host_free is not None:
        row.machine.host_free -= host
    return Seat(row.machine.name, tuple(sorted(cards)))


def _too_large(job: JobDemand, wide: list[tuple[int, PoolGPU]]) -> tuple[str, str]:
    """Return that no GPU holds the job, and the one that comes nearest."""
    count, kind = max(wide, key=lambda choice: (choice[0], choice[1].gpu.usable))
    answer = job.on(count, kind.gpu)
    if isinstance(answer, MemplanError):
        return answer.code, str(answer)
    need = max(answer.least if answer.walk.is_long else answer.most, kind.gpu.usable + 1)
    of_each = f" of each of {count:,}" if count > 1 else ""
    has = f"the nearest is {kind.gpu.name} with {gib(kind.gpu.usable)}"
    return "too_large", f"no GPU of the pool holds it: needs {gib(need)}{of_each}; {has}"
