"""Reading `torch.cuda.memory._dump_snapshot` files: pickles of plain data, read without running anything in them.

A file is scanned before it is unpickled: only opcodes that torch's own files have are let through, with lengths that
fit the file. No class is ever looked up.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, cast

from memplan.core.errors import SpecError, printable
from memplan.core.records import NamedTuple
from memplan.core.units import GIB, gib

LONGEST = GIB // 2  # bytes of a file, which takes some eight times as much memory
MOST_EVENTS = 20_000_000
MOST_BYTES = 2**44  # of a device
_MOST_SEGMENTS = 2_000_000
_MOST_BLOCKS = 10_000_000
_MOST_FRAMES = 1000  # of a stack

# Opcodes without a length, and numbers and strings whose length is one byte: a scan passes over a run of them at once.
# `r`, which sets an entry of the memo by its number, may only set low ones: the memo grows up to the number.
_FIXED = (
    rb"[(.N)\]}aeust0121\x85\x86\x87\x88\x89\x94]",
    rb"[Khq].",
    rb"M..",
    rb"[jJ]....",
    rb"r..[\x00-\x1f]\x00",
    rb"[\x95G]........",
    *(b"\\x8a" + re.escape(bytes([n])) + b"." * n for n in range(17)),
    *(b"\\x8c" + re.escape(bytes([n])) + b"." * n for n in range(33)),
)
_RUN = re.compile(b"(?:" + b"|".join(_FIXED) + b")*+", re.DOTALL)
# Opcode -> bytes of the length that follows it, for text and integers.
_LENGTHS = {b"\x8c": 1, b"X": 4, b"\x8d": 8, b"\x8a": 1, b"\x8b": 4}
_LONGEST_TEXT, _LONGEST_INTEGER = 2**16, 64


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler of plain data: it finds no class, and loads nothing persistent."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise refused(f"it names {printable(f'{module_name}.{global_name}', 60)}")

    def persistent_load(self, pid: object) -> NoReturn:
        raise refused("it names a persistent object")


def refused(why: str) -> SpecError:
    """Return the error that a file is not what torch writes."""
    return SpecError(f"snapshot: {why}; this is no file of torch.cuda.memory._dump_snapshot", "snapshot")


def is_snapshot(data: bytes) -> bool:
    """Whether a file begins as a snapshot does: a pickle whose first words are a snapshot's."""
    return data[:1] == b"\x80" and any(word in data[:200] for word in (b"segments", b"device_traces"))


def check_opcodes(data: bytes) -> None:
    """Raise SpecError unless a pickle has only the opcodes of plain data, with lengths that fit it."""
    if data[:1] != b"\x80":
        raise refused("it does not begin as a pickle")
    at, end = 2, len(data)
    while at < end:
        match = _RUN.match(data, at)
        at = match.end() if match else at
        if at >= end:
            break
        code = data[at : at + 1]
        width = _LENGTHS.get(code)
        if width is None:
            name = f"opcode {code!r}"[7:].strip("b'")
            raise refused(f"it has opcode {name} at byte {at:,}, which runs code or is not plain data")
        length = int.from_bytes(data[at + 1 : at + 1 + width], "little")
        longest = _LONGEST_INTEGER if code in b"\x8a\x8b" else _LONGEST_TEXT
        if length > min(longest, end - at):
            raise refused(f"it has a value of {length:,} bytes at byte {at:,}")
        at += 1 + width + length


class SnapshotEvent(NamedTuple):
    """One event of the allocator's history.

    action  alloc, free_completed, segment_alloc, oom, ...
    address of the block or segment
    size    bytes; of an oom what was asked for
    frames  identity of its stack
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


class Snapshot:
    """A snapshot of one device.

    device    its number
    segments  its segments at the end
    settings  PYTORCH_CUDA_ALLOC_CONF, as it was set
    """

    def __init__(self, device: int, segments: list[SnapshotSegment], events: list[Any], settings: str) -> None:
        self.device, self.segments, self.settings = device, segments, settings
        self._events = events
        self._stacks: dict[int, list[Any]] = {}

    def __len__(self) -> int:
        return len(self._events)

    def events(self) -> Iterator[SnapshotEvent]:
        """Yield the history in order. The first events may be missing: torch keeps a limited number."""
        for event in self._events:
            action = event.get("action")
            if action.__class__ is not str:
                raise refused("an event has no action")
            if action not in _ACTIONS:
                continue
            frames: list[Any] = event.get("frames", _NO_FRAMES)
            if frames and frames.__class__ is list:
                self._stacks[id(frames)] = frames
            address, size = event.get("addr", 0), event.get("size", 0)
            if address.__class__ is not int or size.__class__ is not int or not 0 <= size < MOST_BYTES:
                raise refused("an event has no size that a device has")
            free = event.get("device_free", 0) if action == "oom" else 0
            yield SnapshotEvent(action, address, size, id(frames), free if isinstance(free, int) else 0)

    def remember(self, frames: object) -> int:
        """Return the identity of a stack."""
        if isinstance(frames, list):
            stack = cast("list[Any]", frames)
            self._stacks[id(stack)] = stack
            return id(stack)
        return 0

    def stack(self, frames: int) -> list[tuple[str, int, str]]:
        """Return a stack as file, line and function, innermost first."""
        out: list[tuple[str, int, str]] = []
        for frame in self._stacks.get(frames, ())[:_MOST_FRAMES]:
            if isinstance(frame, dict):
                named = cast("dict[str, Any]", frame)
                line = named.get("line")
                place = str(named.get("filename", ""))[:400], line if isinstance(line, int) else 0
                out.append((*place, str(named.get("name", ""))[:200]))
        return out


_NO_FRAMES: list[Any] = []
_ACTIONS = frozenset(
    (
        "alloc",
        "free_requested",
        "free_completed",
        "segment_alloc",
        "segment_free",
        "segment_map",
        "segment_unmap",
        "oom",
    )
)


def read_snapshot(data: bytes, device: int | None = None) -> Snapshot:
    """Return the snapshot of the device with the most memory, or of another one.

    Raises SpecError for a file that is no snapshot, or is larger than `LONGEST`.
    """
    if len(data) > LONGEST:
        fewer = "record fewer events with max_entries"
        raise SpecError(f"snapshot: more than the {gib(LONGEST)} that are read; {fewer}", "snapshot")
    check_opcodes(data)
    try:
        loaded: object = _PlainUnpickler(io.BytesIO(data)).load()
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
    return _of_device(cast("list[Any]", segments), cast("list[Any]", traces), device, whole)


def _of_device(segments: list[Any], traces: list[Any], device: int | None, whole: Mapping[str, Any]) -> Snapshot:
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
    if not isinstance(events, list) or len(cast("list[Any]", events)) > MOST_EVENTS:
        raise refused("its history is no list, or too long")
    if not all(event.__class__ is dict for event in cast("list[Any]", events)):
        raise refused("an event is no dictionary")
    settings = whole.get("allocator_settings")
    named = cast("dict[str, Any]", settings).get("PYTORCH_CUDA_ALLOC_CONF", "") if isinstance(settings, dict) else ""
    out = Snapshot(device, [], cast("list[Any]", events), named if isinstance(named, str) else "")
    blocks = 0
    for segment in segments:
        if _whole(segment, "device", 0) == device:
            out.segments.append(_segment(out, segment))
            blocks += len(out.segments[-1].blocks)
            if blocks > _MOST_BLOCKS:
                raise refused(f"it has more than {_MOST_BLOCKS:,} blocks")
    return out


def _segment(out: Snapshot, segment: dict[str, Any]) -> SnapshotSegment:
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
        read.append(SnapshotBlock(_whole(named, "address", at), size, requested, is_live, out.remember(_frames(named))))
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
