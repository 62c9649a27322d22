"""Reading `torch.cuda.memory._dump_snapshot` files: pickles of plain data, read without running anything in them.

A file is scanned before it is unpickled: only opcodes that torch's own files have are let through, with lengths that
fit the file. No class is ever looked up. Events are taken out of their list as it grows, by opcodes put in between its
parts, so a file may be larger than what its objects would take.
"""

from __future__ import annotations

import io
import pickle
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from mmap import mmap
from typing import Any, NoReturn, cast

from memplan.core.errors import SpecError, printable
from memplan.core.records import NamedTuple
from memplan.core.units import GIB, gib

MOST_KEPT = GIB // 2  # bytes of a file that are no events, and take some eight times as much memory
MOST_EVENTS = 20_000_000
MOST_BYTES = 2**44  # of a device
_MOST_SEGMENTS = 2_000_000
_MOST_BLOCKS = 10_000_000
_MOST_FRAMES = 1000  # of a stack

# Opcodes without a length, and numbers and strings whose length is one byte: a scan passes over a run of them at once.
# `r`, which sets an entry of the memo by its number, may only set low ones: the memo grows up to the number.
_FIXED = (
    rb"[(.N)\]}aust0121\x85\x86\x87\x88\x89\x94]",
    rb"[Khq].",
    rb"M..",
    rb"[jJ]....",
    rb"r..[\x00-\x1f]\x00",
    rb"G........",
    *(b"\\x8a" + re.escape(bytes([n])) + b"." * n for n in range(17)),
    *(b"\\x8c" + re.escape(bytes([n])) + b"." * n for n in range(33)),
)
_RUN = re.compile(b"(?:" + b"|".join(_FIXED) + b")*+", re.DOTALL)
# Opcode -> bytes of the length that follows it, for text and integers.
_LENGTHS = {b"\x8c": 1, b"X": 4, b"\x8d": 8, b"\x8a": 1, b"\x8b": 4}
_LONGEST_TEXT, _LONGEST_INTEGER = 2**16, 64
_SHOW_LIST = b"2Q0"  # duplicates the list on the stack, gives it to `persistent_load`, and drops what that returns


class Edit(NamedTuple):
    """Bytes of a file that are replaced before it is unpickled."""

    start: int
    end: int
    by: bytes = b""


class _Stream(io.RawIOBase):
    """A file with edits."""

    def __init__(self, data: bytes | mmap, edits: Iterable[Edit]) -> None:
        self._pieces = filter(None, self._of(memoryview(data), edits))
        self._piece = memoryview(b"")

    @staticmethod
    def _of(view: memoryview, edits: Iterable[Edit]) -> Iterator[memoryview]:
        at = 0
        for edit in edits:
            yield view[at : edit.start]
            yield memoryview(edit.by)
            at = edit.end
        yield view[at:]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._piece:
            self._piece = next(self._pieces, self._piece)
        size = min(len(buffer), len(self._piece))
        buffer[:size], self._piece = self._piece[:size], self._piece[size:]
        return size


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler of plain data: it finds no class. Events that it is shown are taken from their list."""

    def __init__(self, data: bytes | mmap) -> None:
        edits = check_opcodes(data)
        super().__init__(io.BufferedReader(_Stream(data, edits), 2**20))
        self.stacks = _Stacks()
        self.taken: dict[int, _Events] = {}  # by the identity of their list
        self._places = (edit.end for edit in edits if edit.by)
        self._before, self._kept, self._events = 0, 0, 0  # bytes, and events taken

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise refused(f"it names {printable(f'{module_name}.{global_name}', 60)}")

    def persistent_load(self, pid: object) -> None:
        """Take the events from a list that grows. No file has this opcode: see `check_opcodes`."""
        place = next(self._places)
        is_history = _has_events(pid)
        self._kept += 0 if is_history else place - self._before
        self._before = place
        if self._kept > MOST_KEPT:
            raise refused(f"more than {gib(MOST_KEPT)} of it are no events")
        if is_history:
            self.take(cast("list[Any]", pid))

    def take(self, history: list[Any]) -> _Events:
        """Move the events of a list to those of the list that were taken before."""
        self._events += len(history)
        if self._events > MOST_EVENTS:
            raise refused(f"it has more than {MOST_EVENTS:,} events")
        events = self.taken.setdefault(id(history), _Events(self.stacks))
        events.add(history)
        history.clear()
        return events


def _has_events(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    first: object = cast("list[object]", value)[0]
    return isinstance(first, dict) and "action" in first


def refused(why: str) -> SpecError:
    """Return the error that a file is not what torch writes."""
    return SpecError(f"snapshot: {why}; this is no file of torch.cuda.memory._dump_snapshot", "snapshot")


def is_snapshot(data: bytes) -> bool:
    """Whether a file begins as a snapshot does: a pickle whose first words are a snapshot's."""
    return data[:1] == b"\x80" and any(word in data[:200] for word in (b"segments", b"device_traces"))


def check_opcodes(data: bytes | mmap) -> list[Edit]:
    """Return the edits that show each long list as it grows, and leave out frames, whose lengths would be wrong.

    Raises SpecError unless a pickle has only the opcodes of plain data, with lengths that fit it.
    """
    edits: list[Edit] = []
    if data[:1] != b"\x80":
        raise refused("it does not begin as a pickle")
    at, end = 2, len(data)
    while at < end:
        match = _RUN.match(data, at)
        at = match.end() if match else at
        if at >= end:
            break
        code = data[at : at + 1]
        if code == b"\x95":
            edits.append(Edit(at, at := at + 9))
            continue
        if code == b"e":
            at += 1
            if data[at : at + 1] == b"(":  # another part of the list follows
                edits.append(Edit(at, at, _SHOW_LIST))
            continue
        width = _LENGTHS.get(code)
        if width is None:
            name = f"opcode {code!r}"[7:].strip("b'")
            raise refused(f"it has opcode {name} at byte {at:,}, which runs code or is not plain data")
        length = int.from_bytes(data[at + 1 : at + 1 + width], "little")
        longest = _LONGEST_INTEGER if code in b"\x8a\x8b" else _LONGEST_TEXT
        if length > min(longest, end - at):
            raise refused(f"it has a value of {length:,} bytes at byte {at:,}")
        at += 1 + width + length
    if max(b - a for a, b in pairwise((0, *(edit.start for edit in edits if edit.by), end))) > MOST_KEPT:
        raise refused(f"it has a part of more than {gib(MOST_KEPT)}")
    return edits


class SnapshotEvent(NamedTuple):
    """One event of the allocator's history.

    action  alloc, free_completed, segment_alloc, oom, ...
    address of the block or segment
    size    bytes; of an oom what was asked for
    frames  number of its stack
    free    bytes free on the device, of an oom
    """

    action: str
    address: int
    size: int
    frames: int
    free: int = 0


class SnapshotBlock(NamedTuple):
    """A block of a segment; `requested` bytes of its size were asked for."""

    address: int
    size: int
    requested: int
    is_live: bool
    frames: int


class SnapshotSegment(NamedTuple):
    """A segment of one device, with its blocks."""

    address: int
    size: int
    is_small: bool
    is_expandable: bool
    blocks: tuple[SnapshotBlock, ...]

    @property
    def live(self) -> int:
        """Bytes of blocks in use."""
        return sum(block.size for block in self.blocks if block.is_live)


class _Stacks:
    """Stacks, each a list of frames. Equal ones have one number; 0 is none."""

    def __init__(self) -> None:
        self.frames: list[list[Any]] = [[]]
        self._numbers: dict[tuple[int, ...], int] = {(): 0}  # by the identities of the frames
        self._known: dict[int, int] = {}  # by the identity of a list
        self._kept: list[object] = []  # so that an identity stays one

    def number(self, frames: object) -> int:
        number = self._known.get(id(frames))
        if number is not None or not isinstance(frames, list) or not frames:
            return number or 0
        stack = cast("list[Any]", frames)
        number = self._numbers.setdefault(tuple(map(id, stack)), len(self.frames))
        if number == len(self.frames):
            self.frames.append(stack[:_MOST_FRAMES])
            self._kept += stack
        self._known[id(stack)] = number
        self._kept.append(stack)
        return number


class _Events:
    """Events in columns, a tenth of the memory of torch's dictionaries."""

    def __init__(self, stacks: _Stacks) -> None:
        self.count = 0
        self._stacks = stacks
        self._actions, self._frames = array("b"), array("I")
        self._addresses, self._sizes, self._free = array("Q"), array("q"), array("q")

    def add(self, events: list[Any]) -> None:
        """Take the content of events. Raises SpecError for one that is none."""
        self.count += len(events)
        for event in events:
            if event.__class__ is not dict:
                raise refused("an event is no dictionary")
            action = event.get("action")
            if action.__class__ is not str:
                raise refused("an event has no action")
            number = _ACTIONS.get(action)
            if number is not None:
                address, size = event.get("addr", 0), event.get("size", 0)
                if size.__class__ is not int or not 0 <= size < MOST_BYTES:
                    raise refused("an event has no size that a device has")
                if address.__class__ is not int or not 0 <= address < 2**64:
                    raise refused("an event has no address that a device has")
                free = event.get("device_free", 0) if action == "oom" else 0
                frames = event.get("frames", _NO_FRAMES)
                self._actions.append(number)
                self._addresses.append(address)
                self._sizes.append(size)
                self._frames.append(self._stacks.number(frames))
                self._free.append(free if isinstance(free, int) and 0 <= free < MOST_BYTES else 0)
                if frames.__class__ is list:
                    frames.clear()  # the unpickler's memo keeps every list and dictionary
            event.clear()

    def __iter__(self) -> Iterator[SnapshotEvent]:
        columns = (self._addresses, self._sizes, self._frames, self._free)
        return map(SnapshotEvent, map(_NAMES.__getitem__, self._actions), *columns)


class Snapshot:
    """A snapshot of one device.

    device    its number
    segments  its segments at the end
    settings  PYTORCH_CUDA_ALLOC_CONF, as it was set
    """

    def __init__(self, device: int, events: _Events, stacks: _Stacks, settings: str) -> None:
        self.device, self.settings = device, settings
        self.segments: list[SnapshotSegment] = []
        self._events, self._stacks = events, stacks

    def __len__(self) -> int:
        return self._events.count

    def events(self) -> Iterator[SnapshotEvent]:
        """Return the history in order. The first events may be missing: torch keeps a limited number."""
        return iter(self._events)

    def stack(self, frames: int) -> list[tuple[str, int, str]]:
        """Return a stack as file, line and function, innermost first."""
        out: list[tuple[str, int, str]] = []
        for frame in self._stacks.frames[frames]:
            if isinstance(frame, dict):
                named = cast("dict[str, Any]", frame)
                line = named.get("line")
                place = str(named.get("filename", ""))[:400], line if isinstance(line, int) else 0
                out.append((*place, str(named.get("name", ""))[:200]))
        return out


_NO_FRAMES: list[Any] = []
_NAMES = (
    *("alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap"),
    "oom",
)
_ACTIONS = {name: number for number, name in enumerate(_NAMES)}


def read_snapshot(data: bytes | mmap, device: int | None = None) -> Snapshot:
    """Return the snapshot of the device with the most memory, or of another one.

    Raises SpecError for a file that is no snapshot, or has more than `MOST_EVENTS`.
    """
    unpickler = _PlainUnpickler(data)
    try:
        loaded: object = unpickler.load()
    except SpecError:
        raise
    except Exception as error:
        raise refused(f"it cannot be read ({printable(str(error), 60)})") from None
    if not isinstance(loaded, dict):
        raise refused("it is no dictionary")
    whole = cast("dict[str, Any]", loaded)
    segments, traces = whole.get("segments"), whole.get("device_traces", [])
    if not isinstance(segments, list) or not isinstance(traces, list):
        raise refused("it has no segments")
    return _of_device(cast("list[Any]", segments), cast("list[Any]", traces), device, whole, unpickler)


def _of_device(
    segments: list[Any], traces: list[Any], device: int | None, whole: Mapping[str, Any], unpickler: _PlainUnpickler
) -> Snapshot:
    if len(segments) > _MOST_SEGMENTS:
        raise refused(f"it has {len(segments):,} segments")
    by_device: dict[int, int] = {}
    for segment in segments:
        if not isinstance(segment, dict):
            raise refused("a segment is no dictionary")
        number = _whole(cast("dict[str, Any]", segment), "device", 0)
        by_device[number] = by_device.get(number, 0) + _whole(cast("dict[str, Any]", segment), "total_size")
    device = max(by_device, key=lambda n: (by_device[n], -n), default=0) if device is None else device
    events: object = traces[device] if 0 <= device < len(traces) else []
    if not isinstance(events, list):
        raise refused("its history is no list")
    history = unpickler.take(cast("list[Any]", events))
    settings = whole.get("allocator_settings")
    named = cast("dict[str, Any]", settings).get("PYTORCH_CUDA_ALLOC_CONF", "") if isinstance(settings, dict) else ""
    out = Snapshot(device, history, unpickler.stacks, named if isinstance(named, str) else "")
    blocks = 0
    for segment in segments:
        if _whole(segment, "device", 0) == device:
            out.segments.append(_segment(unpickler.stacks, segment))
            blocks += len(out.segments[-1].blocks)
            if blocks > _MOST_BLOCKS:
                raise refused(f"it has more than {_MOST_BLOCKS:,} blocks")
    return out


def _segment(stacks: _Stacks, segment: dict[str, Any]) -> SnapshotSegment:
    blocks: object = segment.get("blocks", [])
    if not isinstance(blocks, list) or len(cast("list[Any]", blocks)) > _MOST_BLOCKS:
        raise refused("a segment's blocks are no list")
    read: list[SnapshotBlock] = []
    at = _whole(segment, "address")
    for block in cast("list[Any]", blocks):
        if not isinstance(block, dict):
            raise refused("a block is no dictionary")
        named = cast("dict[str, Any]", block)
        size = _whole(named, "size")
        is_live = named.get("state") == "active_allocated"
        requested = min(_whole(named, "requested_size", size), size)
        read.append(
            SnapshotBlock(_whole(named, "address", at), size, requested, is_live, stacks.number(_frames(named)))
        )
        at += size
    small, expandable = segment.get("segment_type") == "small", segment.get("is_expandable") is True
    return SnapshotSegment(_whole(segment, "address"), _whole(segment, "total_size"), small, expandable, tuple(read))


def _frames(block: Mapping[str, Any]) -> object:
    """Return a block's stack; before torch 2.1 it was in the block's history."""
    history: object = block.get("history")
    if "frames" not in block and isinstance(history, list) and history and isinstance(history[0], dict):
        return cast("dict[str, Any]", history[0]).get("frames")
    return block.get("frames")


def _whole(of: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = of.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**64:
        raise refused(f"{name} is {printable(repr(value), 40)}")
    return value
