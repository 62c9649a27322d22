"""A snapshot's history: how much was allocated when, what was live at the peak and by which stacks, fragmentation."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from memplan.core.errors import printable
from memplan.core.records import NamedTuple
from memplan.core.units import rounded
from memplan.estimate.answer import Estimate, Line
from memplan.explain.frames import position
from memplan.explain.message import TraceFrame
from memplan.explain.snapshot import MOST_BYTES, Snapshot, SnapshotSegment, refused

_NO_STACK = "no stack: allocated before the history begins, or recorded without stacks"
_LIBRARIES = ("/torch/", "/functorch/", "contextlib.py", "<")  # frames that say little about whose tensor it is


class LiveGroup(NamedTuple):
    """Tensors that are live at the peak and were allocated at one place.

    place   file, line and function
    words   the operation, in words, if the stack tells
    bytes   of all of them
    count   how many
    sizes   bytes of one -> how many
    """

    place: str
    words: str
    bytes: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] (a count)
    sizes: tuple[tuple[int, int], ...]


class LineMatch(NamedTuple):
    """A line of the ledger, and how many of its tensors are live at the snapshot's peak."""

    line: Line
    unit: int
    found: int


class FailedRequest(NamedTuple):
    """An out-of-memory event: what was asked for, what the device had free, where, and after how many events."""

    size: int
    free: int
    place: str
    at: int


class History:
    """The facts of a snapshot.

    levels      bytes allocated after every allocation and free
    peak        the largest of them
    peak_at     its index
    start, end  bytes at the beginning of the history, and at its end
    reserved    bytes of segments at the end
    groups      what is live at the peak, by place, the largest first
    failed      out-of-memory events
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.segments: list[SnapshotSegment] = snapshot.segments
        self.reserved = sum(segment.size for segment in snapshot.segments)
        self._read(snapshot)
        self.groups = tuple(self._groups())

    def _read(self, snapshot: Snapshot) -> None:
        """Walk the events once, then back from the end to the peak."""
        allocs: dict[int, tuple[int, int]] = {}
        before: dict[int, int] = {}  # address -> bytes of what was there at the beginning
        failed: list[tuple[int, int, int, int]] = []
        self.segment_changes = 0
        level = 0
        levels = array("q")
        for event in snapshot.events():
            match event.action:
                case "alloc":
                    size = rounded(event.size)
                    allocs[event.address] = size, event.frames
                case "free_completed":
                    known = allocs.pop(event.address, None)
                    if known is None:
                        before[event.address] = rounded(event.size)
                        known = rounded(event.size), event.frames
                    size = -known[0]
                case "oom":
                    failed.append((event.size, event.free, event.frames, len(levels)))
                    continue
                case action:
                    self.segment_changes += action.startswith("segment")
                    continue
            level += size
            if not -MOST_BYTES <= level <= MOST_BYTES:
                raise refused("its events allocate more than a device has")
            levels.append(level)
        ended = {block.address: block for segment in snapshot.segments for block in segment.blocks if block.is_live}
        self.end = sum(rounded(block.size) for block in ended.values())
        kept = {address: block for address, block in ended.items() if address not in allocs}
        self.start = sum(before.values()) + sum(rounded(block.requested) for block in kept.values())
        if self.start > MOST_BYTES:
            raise refused("its blocks are more than a device has")
        self.levels = array("q", (self.start + n for n in levels))
        self.peak = max(self.levels, default=self.end)
        self.peak_at = self.levels.index(self.peak) if self.levels else 0
        live: dict[int, tuple[int, int]] = {address: (size, 0) for address, size in before.items()}
        live |= {address: (rounded(block.requested), block.frames) for address, block in kept.items()}
        changes = (event for event in snapshot.events() if event.action in ("alloc", "free_completed"))
        for event in islice(changes, self.peak_at + 1):
            if event.action == "alloc" and event.size:
                live[event.address] = rounded(event.size), event.frames
            else:
                live.pop(event.address, None)
        self.live = live
        self.failed = tuple(FailedRequest(size, free, self.place(frames)[0], at) for size, free, frames, at in failed)

    def place(self, frames: int) -> tuple[str, str]:
        """Return where a stack allocates, and the operation in words; the innermost frame outside torch names it."""
        stack = self.snapshot.stack(frames)
        if not stack:
            return _NO_STACK, ""
        python = [frame for frame in stack if frame[0].endswith(".py")] or stack
        own = next((f for f in python if not any(part in f[0] for part in _LIBRARIES)), python[0])
        at = position([TraceFrame(*frame) for frame in reversed(python)])
        return printable(f"{'/'.join(own[0].split('/')[-2:])}:{own[1]} {own[2]}"), at.words

    def _groups(self) -> Iterable[LiveGroup]:
        by_place: dict[tuple[str, str], Counter[int]] = {}
        places: dict[int, tuple[str, str]] = {}
        for size, frames in self.live.values():
            if frames not in places:
                places[frames] = self.place(frames)
            by_place.setdefault(places[frames], Counter())[size] += 1
        made = [
            LiveGroup(*place, sum(n * k for n, k in sizes.items()), sizes.total(), tuple(sorted(sizes.items())))
            for place, sizes in by_place.items()
        ]
        return sorted(made, key=lambda group: (-group.bytes, group.place))

    def buckets(self, width: int) -> list[int]:
        """Return the largest level in each of `width` equal parts of the history."""
        n = len(self.levels)
        if not n:
            return [self.end]
        width = min(width, n)
        return [max(self.levels[i * n // width : (i + 1) * n // width]) for i in range(width)]

    def matches(self, answer: Estimate) -> tuple[list[LineMatch], list[LiveGroup]]:
        """Return the ledger's lines with how many of their tensors are live at the peak, and what no line predicts."""
        left = Counter(size for size, _ in self.live.values())
        out: list[LineMatch] = []
        for line in answer.ledger:
            unit = rounded(line.bytes // line.count)
            found = min(line.count, left[unit])
            left[unit] -= found
            out.append(LineMatch(line, unit, found))
        rest: list[LiveGroup] = []
        for group in self.groups:
            sizes = {size: min(n, left[size]) for size, n in group.sizes}
            left.subtract(sizes)
            bytes_ = sum(size * n for size, n in sizes.items())
            if bytes_:
                kept = tuple((size, n) for size, n in sizes.items() if n)
                rest.append(group._replace(bytes=bytes_, count=sum(sizes.values()), sizes=kept))
        return out, sorted(rest, key=lambda group: -group.bytes)

    def fragmented(self) -> Sequence[SnapshotSegment]:
        """Return the segments that have blocks in use and free ones, those with the most free first."""
        partly = [segment for segment in self.segments if 0 < segment.live < segment.size]
        return sorted(partly, key=lambda segment: segment.live - segment.size)
