"""torch's caching allocator, as a model: from a sequence of allocations to the segments it holds.

A request is rounded up to 512 bytes and served by the smallest free block that holds it, in one of two pools: requests
up to 1 MiB come from segments of 2 MiB, larger ones from segments of 20 MiB, and from 10 MiB on from segments of their
own, rounded up to 2 MiB. A block that is larger than asked is split where the rest is worth it; neighbours that are
free merge. A segment stays reserved until the card is full: then all that are wholly free go back to the driver and the
request is tried once more.

With `expandable_segments:True` a pool has one segment, which grows by pages of 2 or 20 MiB, and blocks are split to the
byte.

Every stream has pools of its own: what one has free serves no other, though it may be more than another lacks.

Source: torch 2.13 c10/cuda/CUDACachingAllocator.cpp: get_free_block, should_split, get_allocation_size,
release_cached_blocks, try_allocate_expandable_block; BlockComparatorSize, by which a block is of one stream.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any

from memplan.units import MIB

SMALL_REQUEST = MIB  # kSmallSize: the largest request of the small pool
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT = 20 * MIB  # kLargeBuffer
OWN_SEGMENT = 10 * MIB  # kMinLargeAlloc: the smallest request with a segment of its own
OWN_SEGMENT_STEP = 2 * MIB  # kRoundLarge


class OutOfMemoryError(Exception):
    """A request that the capacity does not hold, even with every wholly free segment given back."""


class Segment:
    """What the driver gave: its size, its pool, and how many blocks of it are handed out."""

    __slots__ = ("blocks", "last", "pool", "size")

    def __init__(self, size: int, pool: int) -> None:
        self.size = size
        self.pool = pool
        self.blocks = 0
        self.last: Block | None = None  # of a segment that grows


class Block:
    """A piece of a segment, free or handed out, and its neighbours there."""

    __slots__ = ("after", "before", "free", "segment", "size", "start")

    def __init__(self, start: int, size: int, segment: Segment) -> None:
        self.start = start
        self.size = size
        self.segment = segment
        self.free = False
        self.before: Block | None = None
        self.after: Block | None = None


Free = tuple[Any, ...]  # a block that is free, after its size and address, by which they are sorted


class Allocator:
    """One device's allocator. Bytes throughout.

    allocated   in blocks handed out, as torch.cuda.memory_allocated counts
    reserved    in segments

    `expandable`: as with `expandable_segments:True`. `capacity`: what the driver has for it; None is without end.
    `streams`: how many the process allocates on; the first is the one it computes on.
    """

    def __init__(self, expandable: bool = False, capacity: int | None = None, streams: int = 1) -> None:
        self.expandable = expandable
        self.capacity = capacity
        self.allocated = self.reserved = 0
        self.peak_allocated = self.peak_reserved = 0
        pools = 2 * streams  # of each stream the large one and the small
        self._free: list[list[Free]] = [[] for _ in range(pools)]  # by size and then by address
        self._next = [pool << 60 for pool in range(pools)]  # an address for the next segment of each
        self._growing: list[Segment | None] = [None] * pools

    def alloc(self, size: int, stream: int = 0) -> Block:
        """Hand out a block of at least `size` bytes. Raises OutOfMemoryError where the capacity does not hold it."""
        size = -(-size // 512) * 512  # as rounded() does, without a call for every event of a replay
        if not size:
            return Block(-1, 0, Segment(0, 1))  # no memory, and in no pool
        small = size <= SMALL_REQUEST
        pool = 2 * stream + small
        free = self._free[pool]
        i = bisect_left(free, (size, -1))
        if i < len(free):
            block: Block = free.pop(i)[2]
            block.free = False
        else:
            block = self._grown(size, pool) if self.expandable else self._reserve(size, pool)
        rest = block.size - size
        if rest > SMALL_REQUEST or (rest and (small or self.expandable)):
            start = block.start + size
            other = Block(start, rest, block.segment)
            other.before, other.after, other.free = block, block.after, True
            if block.after is None:
                block.segment.last = other
            else:
                block.after.before = other
            block.after = other
            block.size = size
            insort(free, (rest, start, other))
        block.segment.blocks += 1
        self.allocated += block.size
        if self.allocated > self.peak_allocated:  # noqa: PLR1730 (max is a call, for every event of a replay)
            self.peak_allocated = self.allocated
        return block

    def free(self, block: Block) -> None:
        """Take a block back, and merge it with neighbours that are free."""
        size = block.size
        if not size:
            return
        self.allocated -= size
        segment, after, before = block.segment, block.after, block.before
        segment.blocks -= 1
        free = self._free[segment.pool]
        if after is not None and after.free:
            del free[bisect_left(free, (after.size, after.start))]
            block.size = size = size + after.size
            after = block.after = after.after
            if after is None:
                segment.last = block
            else:
                after.before = block
        if before is not None and before.free:
            del free[bisect_left(free, (before.size, before.start))]
            before.size = size = size + before.size
            before.after = after
            if after is None:
                segment.last = before
            else:
                after.before = before
            block = before
        block.free = True
        insort(free, (size, block.start, block))

    def release(self) -> None:
        """Give what is wholly free back to the driver, as a full card or torch.cuda.empty_cache() does."""
        for free in self._free:
            for _, _, block in list(free):
                if self.expandable:
                    self._unmap(block)
                elif not block.segment.blocks:
                    self._take(block)
                    self.reserved -= block.segment.size

    def _take(self, block: Block) -> None:
        block.free = False
        free = self._free[block.segment.pool]
        del free[bisect_left(free, (block.size, block.start))]

    def _reserve(self, size: int, pool: int) -> Block:
        """A block that is a new segment."""
        if pool & 1:
            whole = SMALL_SEGMENT
        elif size < OWN_SEGMENT:
            whole = LARGE_SEGMENT
        else:
            whole = -(-size // OWN_SEGMENT_STEP) * OWN_SEGMENT_STEP
        self._ask(whole)
        start = self._next[pool]
        self._next[pool] = start + whole
        return Block(start, whole, Segment(whole, pool))

    def _grown(self, size: int, pool: int) -> Block:
        """The last block of the pool's segment, if it is free, with as many more pages as it needs."""
        pages = SMALL_SEGMENT if pool & 1 else LARGE_SEGMENT
        segment = self._growing[pool] or Segment(0, pool)
        last = segment.last
        whole = last.size if last is not None and last.free else 0
        more = -(-(size - whole) // pages) * pages
        self._ask(more)
        last = segment.last  # what was free may have been given back
        if last is not None and last.free:
            self._take(last)
            last.size += more
            block = last
        else:
            block = Block(self._next[pool], more, segment)
            block.before = last
            if last is not None:
                last.after = block
        self._growing[pool] = segment
        segment.last = block
        self._next[pool] = block.start + block.size
        segment.size += more
        return block

    def _unmap(self, block: Block) -> None:
        """Whole free pages at the end of a growing segment go; those within it are not modelled, and stay."""
        segment = block.segment
        pages = SMALL_SEGMENT if segment.pool & 1 else LARGE_SEGMENT
        less = block.size // pages * pages
        if block is not segment.last or not less:
            return
        self._take(block)
        self._next[segment.pool] -= less
        self.reserved -= less
        segment.size -= less
        block.size -= less
        if block.size:
            block.free = True
            insort(self._free[segment.pool], (block.size, block.start, block))
        else:
            segment.last = block.before
            if block.before is not None:
                block.before.after = None

    def _ask(self, more: int) -> None:
        """Have the driver give `more`, once everything free has gone back if need be."""
        if self.capacity is not None and self.reserved + more > self.capacity:
            self.release()
            if self.reserved + more > self.capacity:
                raise OutOfMemoryError(f"{more} bytes more than {self.reserved} of {self.capacity}")
        self.reserved += more
        self.peak_reserved = max(self.peak_reserved, self.reserved)
