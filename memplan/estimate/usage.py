"""From torch's tensors to what the card shows, and whether that fits: segments, the CUDA context, the band.

Computed when asked for: how much torch reserves takes a replay of the run, which takes milliseconds where the peak
takes microseconds. A verdict that is clear without a replay does not run one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.overhead import (
    COVERAGE,
    PREDICTION_BAND,
    PREDICTION_BAND_OF_RANKS,
    SURVIVAL_MARGIN,
    Communicator,
    Overhead,
    cuda_context,
    nccl,
)
from memplan.core.arithmetic import ONE_RUN, Arithmetic, Size
from memplan.core.cached_property import cached_property
from memplan.core.records import NamedTuple

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration


Answer = Literal["fits", "tight", "does not fit", "does not start"]


class Replay:
    """A run's allocations in order on one rank, to be replayed through a model of torch's allocator.

    gpu            the GPU, if one was given
    communicators  NCCL communicators that the rank is in
    resident       bytes held throughout
    load           peak bytes while the model is loaded
    """

    gpu: GPU | None
    communicators: tuple[Communicator, ...] = ()
    resident: int
    load: int

    @property
    def peak(self) -> int:
        """Peak bytes of the run."""
        raise NotImplementedError

    @property
    def compiled_away(self) -> int:
        """Bytes of the peak that torch.compile may do without."""
        return 0

    @property
    def compiled_more(self) -> int:
        """Bytes that torch.compile may take in addition."""
        return 0

    @property
    def is_long(self) -> bool:
        """Whether a replay takes seconds. If so, none is run for a full card."""
        return False

    def reserved(self, capacity: int | None = None) -> int | None:
        """Return the peak that torch reserves on a card with `capacity` bytes, or None if it runs out of memory."""
        raise NotImplementedError

    def reserved_within(self, most: int) -> int | None:
        """Return the peak that torch reserves with room to spare, or None if that is more than `most` bytes."""
        peak = self.reserved()
        return peak if peak is not None and peak <= most else None

    def surely_reserved(self) -> int:
        """Return bytes that torch reserves at least with room to spare, if a short replay tells; 0 otherwise."""
        return 0

    def free_in_other_streams(self) -> int:
        """Return the bytes that may be free in other streams' pools: a bound without a replay leaves room for them."""
        return 0

    def unreplayed_bytes(self) -> int:
        """Return the bytes in segments that a replay does not see."""
        return 0


class ProcessOverhead(NamedTuple):
    """The memory of a process outside torch's segments, and how certain it is.

    context           bytes
    low, usual, high  errors of segments and context together, in millionths
    coverage          share of runs between `low` and `high`
    less, more        bytes by which an unmeasured context, or compiled code, may differ
    rows              the parts of the context
    """

    context: int
    low: int
    usual: int
    high: int
    coverage: float
    less: int = 0
    more: int = 0
    rows: tuple[Overhead, ...] = ()


def run_overhead(
    gpu: GPU | None, communicators: tuple[Communicator, ...], calibration: Calibration | None
) -> ProcessOverhead:
    """Return what a process takes outside torch's segments, from the catalogue's rows or a machine's own profile.

    Communicators mean several ranks: a profile of one rank says nothing about their errors, and assumed rows widen the
    band.
    """
    return _overhead_of(gpu.compute_capability if gpu else None, communicators, calibration)


@lru_cache(maxsize=1024)
def _overhead_of(
    compute_capability: tuple[int, int] | None,
    communicators: tuple[Communicator, ...],
    calibration: Calibration | None,
) -> ProcessOverhead:
    context = cuda_context(compute_capability)
    if calibration:
        measured = calibration.context
        context = context._replace(
            low=measured.low, usual=measured.usual, high=measured.high, basis="measured", source="this machine"
        )
    buffers = nccl(communicators)
    rows = (context, *buffers)
    bytes_ = sum(row.usual for row in rows)
    if buffers:
        assumed = [row for row in buffers if row.basis == "assumed"]
        less, more = sum(row.usual - row.low for row in assumed), sum(row.high - row.usual for row in assumed)
        band = PREDICTION_BAND_OF_RANKS
        return ProcessOverhead(bytes_, band.low * 1000, 0, band.high * 1000, COVERAGE, less, more, rows)
    if calibration is None:
        return ProcessOverhead(bytes_, PREDICTION_BAND.low * 1000, 0, PREDICTION_BAND.high * 1000, COVERAGE, rows=rows)
    error = calibration.used_error
    low, usual, high = (round(1_000_000 * share) for share in (error.low, error.usual, error.high))
    return ProcessOverhead(bytes_, low, usual, high, calibration.coverage, rows=rows)


class SegmentRoom(NamedTuple):
    """The most bytes torch may reserve on a card.

    sure      for a run that surely fits
    possible  for a run that possibly fits
    """

    sure: int
    possible: int


def room(usable: int, overhead: ProcessOverhead) -> SegmentRoom:
    """Return how many of a card's usable bytes are left for torch's segments."""
    millionths = usable * 1_000_000
    return SegmentRoom(
        millionths // (1_000_000 + overhead.high) - overhead.context - overhead.more,
        millionths // (1_000_000 + overhead.low) - overhead.context + overhead.less,
    )


def usable_for(segments: int, overhead: ProcessOverhead) -> int:
    """Return the fewest usable bytes of a card on which torch may surely reserve `segments`: see `room`."""
    return -(-(segments + overhead.context + overhead.more) * (1_000_000 + overhead.high) // 1_000_000)


def enough_for_segments(allocated: Size, resident: int, load: int, by: Arithmetic[Size]) -> Size:
    """Return how many bytes of segments are enough on a full card, however the tensors are placed.

    `load` is the peak while the model is loaded.
    """
    held = by.most(load, allocated)
    return held + by.most(0, held - resident) * SURVIVAL_MARGIN.share // 1000 + SURVIVAL_MARGIN.bytes


class Usage:
    """The memory of a card that a run takes, in bytes.

    With room to spare torch keeps every segment. On a full card it releases free segments before it fails, so a run may
    survive in less than it would show elsewhere: it fits if it has that room, or if its tensors leave room for any
    placement, and is tight if it only survives. A run with a long replay is only replayed with room to spare: it is
    tight on a card that holds its tensors but has less room than that.
    """

    def __init__(self, replay: Replay, calibration: Calibration | None = None) -> None:
        self._replay = replay
        self._gpu = replay.gpu
        self._calibration = calibration
        self.allocated = replay.peak
        self._survivals: dict[int, bool] = {}  # by usable bytes

    @property
    def usable(self) -> int | None:
        """Usable bytes of the card; None without one."""
        return None if self._gpu is None else self._gpu.usable

    @cached_property
    def _overhead(self) -> ProcessOverhead:
        overhead = run_overhead(self._gpu, self._replay.communicators, self._calibration)
        return overhead._replace(
            less=overhead.less + self._replay.compiled_away, more=overhead.more + self._replay.compiled_more
        )

    @property
    def overheads(self) -> tuple[Overhead, ...]:
        """Memory of the process outside torch's segments."""
        return self._overhead.rows

    @property
    def answer(self) -> Answer | None:
        """fits, tight or does not fit; None without a card."""
        return None if self._gpu is None else self.answer_on(self._gpu.usable)

    def answer_on(self, usable: int) -> Answer:
        """Return the answer for a card of this kind with `usable` bytes."""
        if self.fits_card_of(usable, replayed=True):  # by the replay that `used` takes too, if one is needed
            return "fits"
        return "tight" if self._may_fit(usable) else "does not fit"

    @property
    def reason(self) -> str | None:
        """Why the run does not start; None for one that starts."""
        return None

    @cached_property
    def fits(self) -> bool:
        """Whether the run surely fits its card. Cheaper than `answer` if nothing else is asked."""
        if self._gpu is None or self.is_ruled_out:
            return False
        usable = self._gpu.usable
        return self.fits_card_of(usable) or self._reserves_within(*room(usable, self._overhead))

    @cached_property
    def is_ruled_out(self) -> bool:
        """Whether bounds tell, without a long replay, that the run does not surely fit its card."""
        usable = self._gpu.usable if self._gpu is not None else 0
        surely_fits = self.fits_card_of(usable)
        if surely_fits is None:
            return self._replay.surely_reserved() > room(usable, self._overhead).sure
        return not surely_fits

    def fits_card_of(self, usable: int, replayed: bool = False) -> bool | None:
        """Return whether the run surely fits a card with `usable` bytes, or None if that takes a replay at that size.

        `replayed` allows one replay with room to spare, which serves any number of cards.
        """
        sure, possible = room(usable, self._overhead)
        if self.allocated > sure:
            return False
        return True if usable >= self.ample or (replayed and self._reserves_within(sure, possible)) else None

    @cached_property
    def ample(self) -> int:
        """The fewest usable bytes with which a card surely holds the run, as far as the bounds tell."""
        return usable_for(self.enough + self._replay.free_in_other_streams(), self._overhead)

    @cached_property
    def least(self) -> int:
        """The fewest usable bytes that a card needs to hold the run."""
        return self._shown(self.allocated, self._overhead.low, -self._overhead.less)

    @property
    def most(self) -> int:
        """The most that a card with room to spare may show for the run."""
        return self._shown_at("high", self._roomy)

    @property
    def may_fit(self) -> bool:
        """Whether the run fits its card if the process takes the least that was measured."""
        return self._gpu is not None and self._may_fit(self._gpu.usable)

    def _may_fit(self, usable: int) -> bool:
        if usable not in self._survivals:
            capacity = room(usable, self._overhead).possible
            lives = capacity >= self.allocated and (self._replay.is_long or self._lives_in(capacity))
            self._survivals[usable] = lives
        return self._survivals[usable]

    @cached_property
    def used(self) -> int:
        """The bytes that the card shows for the process; for a run that does not fit, those of a larger card."""
        used = self._shown_at("usual")
        if self._gpu is None or self.answer == "does not fit":
            return max(used, self.reserved)
        return max(min(used, self._gpu.usable), self.reserved)

    @cached_property
    def reserved(self) -> int:
        """The bytes that torch reserves at its peak: all it requests, or what the card has if the run fits in that."""
        if self._gpu is None or self.answer == "does not fit":
            return self._roomy
        capacity = self._gpu.usable - self._overhead.context
        if self._roomy <= capacity:
            return self._roomy
        return max((not self._replay.is_long and self._replay.reserved(capacity)) or capacity, self.allocated)

    @property
    def band(self) -> Band:
        low, high = min(self._shown_at("low"), self.used), max(self._shown_at("high"), self.used)
        if self._gpu is not None:
            usable = self._gpu.usable
            match self.answer:
                case "fits" | "does not start":  # a run that would show more elsewhere is bounded by the card
                    high = min(high, usable)
                case "tight":  # with room to spare it would show more than its card does
                    low, high = min(low, usable), max(high, usable + 1, self._shown_at("high", self._roomy))
                case _:
                    low, high = max(low, usable + 1), max(high, usable + 1)
        return Band(low, high, self._overhead.coverage)

    @property
    def enough(self) -> int:
        """Bytes of segments that are enough on a full card, if all are of one stream."""
        return enough_for_segments(self.allocated, self._replay.resident, self._replay.load, ONE_RUN)

    @cached_property
    def _replayed_with_room(self) -> int:
        peak = self._replay.reserved()
        assert peak is not None
        return peak

    @cached_property
    def _roomy(self) -> int:
        return max(self._replayed_with_room, self.allocated) + self._replay.unreplayed_bytes()

    def _reserves_within(self, sure: int, possible: int) -> bool:
        """Return whether torch reserves at most `sure` bytes with room to spare. A replay with the `possible` ones
        tells, and whether a run that reserves more survives."""
        is_known = "_replayed_with_room" in vars(self) or self._replay.is_long
        return (is_known or self._replay.reserved_within(max(sure, possible)) is not None) and self._roomy <= sure

    def _lives_in(self, capacity: int) -> bool:
        if self._replay.is_long:
            return self._roomy <= capacity
        if capacity < self.allocated:
            return False
        # a run that never fills the card does not notice its capacity
        with_room: int | None = vars(self).get("_replayed_with_room")
        return (with_room is not None and with_room <= capacity) or self._replay.reserved(capacity) is not None

    def _shown_at(self, level: str, segments: int | None = None) -> int:
        """Return what the card shows at the `low`, `usual` or `high` end of what was measured, for what torch reserves
        or other `segments`."""
        more = {"low": -self._overhead.less, "usual": 0, "high": self._overhead.more}[level]
        return self._shown(self.reserved if segments is None else segments, getattr(self._overhead, level), more)

    def _shown(self, segments: int, error: int, more: int = 0) -> int:
        """Return what the card shows for `segments`, with an `error` in millionths and `more` bytes of context."""
        return (segments + self._overhead.context + more) * (1_000_000 + error) // 1_000_000


class Band(NamedTuple):
    """The range of `used` in `coverage` of runs."""

    low: int
    high: int
    coverage: float


def calibration_of(gpu: GPU | None, calibration: Calibration | None) -> Calibration | None:
    """Return the profile if it belongs to the run's card, else None."""
    if calibration is None or gpu is None or calibration.gpu != gpu.name:
        return None
    return calibration
