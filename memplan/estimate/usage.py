"""From torch's tensors to what the card shows, and whether that fits: segments, the CUDA context, the band.

Made when asked for: how much torch reserves takes a replay of the run, milliseconds where the tensors take
microseconds. A verdict that is clear without one needs none.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Protocol

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.overhead import (
    COVERAGE,
    LIVING,
    SHOWN,
    SHOWN_OF_RANKS,
    Communicator,
    Overhead,
    cuda_context,
    nccl,
)
from memplan.core.arithmetic import ONE_RUN, Arithmetic, Size
from memplan.core.cached_property import cached_property
from memplan.engine.allocator import Allocator, OutOfMemoryError
from memplan.estimate.calibration import Calibration
from memplan.estimate.side_task import Aside
from memplan.program.training.program import Program, Structure, chunks_of, program
from memplan.program.training.replay import (
    LONG_PASS,
    cached_logits,
    pass_of,
    replayed_microbatches,
    segments,
    streams_apart,
)


class Allocations(Protocol):
    """A run's allocations in order, to be replayed through a model of torch's allocator."""

    def reserved(self, capacity: int | None = None) -> int | None:
        """The peak of what torch reserves, on a card with `capacity` bytes for it; None where it runs out of memory."""
        ...

    @property
    def is_long(self) -> bool:
        """Whether a replay takes seconds: then there is none for a full card."""
        ...

    def apart(self) -> int:
        """Bytes that may lie free in pools of other streams, which a bound without a replay leaves room for."""
        ...

    def beside(self) -> int:
        """Bytes in segments that a replay does not see."""
        ...


class Replay(NamedTuple):
    """What decides the allocations of a run: its structure, its axes, cuBLAS's workspace, how the allocator works, and
    what it does beside its steps."""

    structure: Structure
    axes: tuple[tuple[str, int], ...]
    workspace: int
    expandable: bool
    asides: tuple[Aside, ...] = ()

    def reserved(self, capacity: int | None = None) -> int | None:
        return reserved(self, capacity)

    @property
    def is_long(self) -> bool:
        return sum(pass_of(chunk, later=False).length for chunk in chunks_of(self.structure)) > LONG_PASS

    def apart(self) -> int:
        return streams_apart(self.structure)

    def beside(self) -> int:
        return cached_logits(self.structure, dict(self.axes))


@lru_cache(maxsize=1024)
def reserved(replay: Replay, capacity: int | None = None) -> int | None:
    """The peak of what torch reserves, on a card with `capacity` bytes for it; None where it runs out of memory."""
    short, more = shortened(replay)
    if short is not replay:
        found = reserved(short, None if capacity is None else capacity - more)
        return None if found is None else found + more
    p = program(replay.structure)
    after = [aside.replay for aside in replay.asides if aside.alone is None]
    apart = [Allocator(replay.expandable, capacity) for aside in replay.asides if aside.alone is not None]
    try:
        most = segments(p, dict(replay.axes), replay.workspace, replay.expandable, capacity, after)
        for aside, allocator in zip((a for a in replay.asides if a.alone is not None), apart, strict=True):
            aside.replay(allocator)
        return max(most, *(allocator.peak_reserved for allocator in apart), 0)
    except OutOfMemoryError:
        return None


@lru_cache(maxsize=1024)
def shortened(replay: Replay) -> tuple[Replay, int]:
    """A replay with as many microbatches of a pipeline as are replayed, and the bytes that the others add to its peak,
    as the second half of those replayed did."""
    structure = replay.structure
    pipe = structure.pipe
    few = replayed_microbatches(structure) if pipe.engine else pipe.microbatches
    if pipe.microbatches <= few:
        return replay, 0

    def with_microbatches(count: int) -> Replay:
        return replay._replace(structure=structure._replace(pipe=pipe._replace(microbatches=count)))

    short, half = with_microbatches(few), with_microbatches(few // 2)
    growth = (reserved(short) or 0) - (reserved(half) or 0)
    return short, max(0, growth) * (pipe.microbatches - few) // (few - few // 2)


class Around(NamedTuple):
    """What a process takes beside torch's segments, and how sure that is.

    `context` in bytes; `low`, `usual` and `high` in millionths of segments and context together; `coverage` is the
    share of runs between `low` and `high`. `less` and `more` are bytes by which the context may differ where it was
    measured of no run. `rows` are what it consists of.
    """

    context: int
    low: int
    usual: int
    high: int
    coverage: float
    less: int = 0
    more: int = 0
    rows: tuple[Overhead, ...] = ()


def around(context: Overhead, calibration: Calibration | None = None, nccl: tuple[Overhead, ...] = ()) -> Around:
    """By the catalogue's rows, or by a machine's own profile. With rows of NCCL's there are several ranks, about whose
    errors a profile of one says nothing; those that are assumed widen the band."""
    own = context
    if calibration:
        ours = calibration.context
        own = context._replace(low=ours.low, usual=ours.usual, high=ours.high, basis="measured", source="this machine")
    rows = (own, *nccl)
    held = sum(row.usual for row in rows)
    if nccl:
        assumed = [row for row in nccl if row.basis == "assumed"]
        less, more = sum(row.usual - row.low for row in assumed), sum(row.high - row.usual for row in assumed)
        return Around(held, SHOWN_OF_RANKS.low * 1000, 0, SHOWN_OF_RANKS.high * 1000, COVERAGE, less, more, rows)
    if calibration is None:
        return Around(held, SHOWN.low * 1000, 0, SHOWN.high * 1000, COVERAGE, rows=rows)
    error = calibration.used_error
    low, usual, high = (round(1_000_000 * share) for share in (error.low, error.usual, error.high))
    return Around(held, low, usual, high, calibration.coverage, rows=rows)


class Room(NamedTuple):
    """The most bytes torch may hold on a card: for a run that surely fits, and for one that possibly does."""

    sure: int
    possible: int


def room(usable: int, beside: Around) -> Room:
    """What of a card's usable bytes is left for torch's segments."""

    def left(error: int, more: int) -> int:
        return usable * 1_000_000 // (1_000_000 + error) - beside.context - more

    return Room(left(beside.high, beside.more), left(beside.low, -beside.less))


def resident(p: Program) -> int:
    """Bytes that are there throughout, once the optimizer has made its states; buckets of gradients, which may come to
    lie anywhere, are not among them."""
    return p.parameters + p.buffered + p.scaler + p.states


def enough(allocated: Size, resident: int, load: int, by: Arithmetic[Size]) -> Size:
    """Bytes for segments that a run lives in on a full card, however its tensors lie; `load` is the peak of loading."""
    held = by.most(load, allocated)
    return held + by.most(0, held - resident) * LIVING.share // 1000 + LIVING.bytes


class Usage:
    """What a run takes of a card, in bytes.

    With room torch holds on to every segment. On a full card it gives back what is wholly free before it fails, so a
    run may live in less than it would show elsewhere. A run with a long replay is replayed with room alone: it is tight
    on a card that holds its tensors and has less room than that.
    """

    def __init__(
        self, replay: Allocations, resident: int, load: int, peak: int, gpu: GPU | None, beside: Around
    ) -> None:
        """`resident` bytes are there throughout; `load` is the peak of loading, `peak` of all."""
        self._replay = replay
        self._load = load
        self._resident = resident
        self._gpu = gpu
        self._beside = beside
        self.allocated = peak

    @property
    def beside(self) -> tuple[Overhead, ...]:
        """What the process has beside torch's segments."""
        return self._beside.rows

    @property
    def answer(self) -> str | None:
        """fits, tight or does not fit; None without a card."""
        if self._gpu is None:
            return None
        if self.fits:
            return "fits"
        return "tight" if self._possible else "does not fit"

    @cached_property
    def fits(self) -> bool:
        """Whether the run surely lives on its card: half of the answer, for half of the replays."""
        if self._gpu is None:
            return False
        told = self.told(self._gpu.usable)
        return self._lives_in(self._sure(self._gpu.usable)) if told is None else told

    def told(self, usable: int, replayed: bool = False) -> bool | None:
        """Whether the run surely fits a card with so many usable bytes, as far as bounds tell, and with `replayed` a
        replay on a card with room, one for any number of cards; None where one with that card's end has to."""
        sure = self._sure(usable)
        if self.allocated > sure:
            return False
        return True if self.enough + self._replay.apart() <= sure or (replayed and self._roomy <= sure) else None

    @property
    def least(self) -> int:
        """No card with fewer usable bytes holds the run."""
        return self._shown(self.allocated, self._beside.low, -self._beside.less)

    def _sure(self, usable: int) -> int:
        """What is left for torch's segments."""
        return room(usable, self._beside).sure

    @cached_property
    def _possible(self) -> bool:
        if self._gpu is None:
            return False
        capacity = room(self._gpu.usable, self._beside).possible
        return capacity >= self.allocated and (self._replay.is_long or self._lives_in(capacity))

    @cached_property
    def used(self) -> int:
        """What the card shows for the process; for a run that does not fit, what a card with room would show."""
        used = self._shown(self.reserved, self._beside.usual)
        if self._gpu is None or self.answer == "does not fit":
            return max(used, self.reserved)
        return max(min(used, self._gpu.usable), self.reserved)

    @cached_property
    def reserved(self) -> int:
        """What torch holds at its peak: all it ever asked for, or what the card has, if the run can live in that."""
        if self._gpu is None or self.answer == "does not fit":
            return self._roomy
        capacity = self._gpu.usable - self._beside.context
        if self._roomy <= capacity:
            return self._roomy
        return max((not self._replay.is_long and self._replay.reserved(capacity)) or capacity, self.allocated)

    @property
    def band(self) -> Band:
        low = min(self._shown(self.reserved, self._beside.low, -self._beside.less), self.used)
        high = max(self._shown(self.reserved, self._beside.high, self._beside.more), self.used)
        if self._gpu is not None:
            usable = self._gpu.usable
            match self.answer:
                case "fits":  # and if it would show more with room, the card's end is the band's
                    high = min(high, usable)
                case "tight":
                    low, high = min(low, usable), max(high, usable + 1)
                case _:
                    low = max(low, usable + 1)
        return Band(low, high, self._beside.coverage)

    @property
    def enough(self) -> int:
        """Bytes for segments that the run lives in on a full card, where all are of one stream."""
        return enough(self.allocated, self._resident, self._load, ONE_RUN)

    @cached_property
    def _roomy(self) -> int:
        found = self._replay.reserved()
        assert found is not None
        return max(found, self.allocated) + self._replay.beside()

    def _lives_in(self, capacity: int) -> bool:
        if self._replay.is_long:
            return self._roomy <= capacity
        return capacity >= self.allocated and self._replay.reserved(capacity) is not None

    def _shown(self, segments: int, error: int, more: int = 0) -> int:
        """What the card shows where torch holds `segments`, off by `error` millionths, and the context by `more`."""
        return (segments + self._beside.context + more) * (1_000_000 + error) // 1_000_000


class Band(NamedTuple):
    """Where `used` lies in `coverage` of runs."""

    low: int
    high: int
    coverage: float


def around_of(gpu: GPU | None, communicators: tuple[Communicator, ...], calibration: Calibration | None) -> Around:
    """What a process takes beside torch's segments, on the run's card and in so many `communicators`."""
    return around(cuda_context(gpu.compute_capability if gpu else None), calibration, nccl(communicators))
