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

from memplan.core.units import MIB

SMALL_REQUEST = MIB  # kSmallSize: the largest request of the small pool
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT = 20 * MIB  # kLargeBuffer
OWN_SEGMENT = 10 * MIB  # kMinLargeAlloc: the smallest request with a segment of its own
OWN_SEGMENT_STEP = 2 * MIB  # kRoundLarge


class OutOfMemoryError(Exception):
    """A request that the capacity does not hold, even with every wholly free segment given back."""


class Pool:
    """The free blocks of a pool by size, and the end of its last segment.

    of_size  the addresses of the free blocks of one size, sorted
    sizes    the keys of `of_size`, sorted
    free     the free blocks by address
    end      the address where the last segment ends
    last     the last block of a segment that grows
    """

    __slots__ = ("end", "free", "is_small", "last", "of_size", "sizes")

    def __init__(self, is_small: bool) -> None:
        self.is_small = is_small
        self.of_size: dict[int, list[int]] = {}
        self.free: dict[int, Block] = {}
        self.sizes: list[int] = []
        self.end = 0
        self.last: Block | None = None

    def add(self, block: Block, size: int) -> None:
        """List a free block, of that size."""
        start = block.start
        self.free[start] = block
        starts = self.of_size.get(size)
        if starts is None:
            self.of_size[size] = [start]
            insort(self.sizes, size)
        else:
            insort(starts, start)

    def remove(self, block: Block, size: int) -> None:
        """Take a free block of that size off the list."""
        start = block.start
        del self.free[start]
        starts = self.of_size[size]
        if len(starts) > 1:
            del starts[bisect_left(starts, start)]
        else:
            del self.of_size[size], self.sizes[bisect_left(self.sizes, size)]


class Block:
    """A piece of a segment, free or handed out, and its neighbours there."""

    __slots__ = ("after", "before", "free", "pool", "size", "start")

    def __init__(self, start: int, size: int, pool: Pool) -> None:
        self.start = start
        self.size = size
        self.pool = pool
        self.free = False
        self.before: Block | None = None
        self.after: Block | None = None


class Allocator:
    """One device's allocator. Bytes throughout.

    allocated   in blocks handed out, as torch.cuda.memory_allocated counts
    reserved    in segments
    requests    how often the driver was asked for memory

    `expandable`: as with `expandable_segments:True`. `capacity`: what the driver has for it; None is without end.
    `streams`: how many the process allocates on; the first is the one it computes on.
    """

    def __init__(self, expandable: bool = False, capacity: int | None = None, streams: int = 1) -> None:
        self.expandable = expandable
        self.capacity = capacity
        self.allocated = self.reserved = self.requests = 0
        self.peak_allocated = self.peak_reserved = 0
        self._pools = [Pool(is_small) for _ in range(streams) for is_small in (False, True)]

    def alloc(self, size: int, stream: int = 0) -> Block:
        """Hand out a block of at least `size` bytes. Raises OutOfMemoryError if the capacity does not hold it."""
        size = (size + 511) & -512  # as rounded() does, without a call for every event of a replay
        is_small = size <= SMALL_REQUEST
        pool = self._pools[2 * stream + is_small]
        if not size:
            return Block(-1, 0, pool)
        i = bisect_left(pool.sizes, size)
        if i < len(pool.sizes):
            whole = pool.sizes[i]
            starts = pool.of_size[whole]
            block = pool.free.pop(starts.pop(0))
            if not starts:
                del pool.of_size[whole], pool.sizes[i]
            block.free = False
        else:
            block = self._grown(size, pool) if self.expandable else self._reserve(size, pool)
            whole = block.size
        rest = whole - size
        if rest > SMALL_REQUEST or (rest and (is_small or self.expandable)):
            other = Block(block.start + size, rest, pool)
            other.before, other.after, other.free = block, block.after, True
            if block.after is None:
                pool.last = other
            else:
                block.after.before = other
            block.after = other
            block.size = whole = size
            pool.add(other, rest)
        self.allocated += whole
        if self.allocated > self.peak_allocated:  # noqa: PLR1730 (max is a call, for every event of a replay)
            self.peak_allocated = self.allocated
        return block

    def free(self, block: Block) -> None:
        """Take a block back, and merge it with neighbours that are free."""
        size = block.size
        if not size:
            return
        self.allocated -= size
        pool, after, before = block.pool, block.after, block.before
        if after is not None and after.free:
            pool.remove(after, after.size)
            block.size = size = size + after.size
            after = block.after = after.after
            if after is None:
                pool.last = block
            else:
                after.before = block
        if before is not None and before.free:
            pool.remove(before, before.size)
            before.size = size = size + before.size
            before.after = after
            if after is None:
                pool.last = before
            else:
                after.before = before
            block = before
        block.free = True
        pool.add(block, size)

    def release(self) -> None:
        """Give what is wholly free back to the driver, as a full card or torch.cuda.empty_cache() does."""
        for pool in self._pools:
            if self.expandable:
                self._unmap(pool)
                continue
            for block in list(pool.free.values()):
                if block.before is None and block.after is None:
                    pool.remove(block, block.size)
                    self.reserved -= block.size

    def _reserve(self, size: int, pool: Pool) -> Block:
        """A block that is a new segment."""
        if pool.is_small:
            whole = SMALL_SEGMENT
        elif size < OWN_SEGMENT:
            whole = LARGE_SEGMENT
        else:
            whole = -(-size // OWN_SEGMENT_STEP) * OWN_SEGMENT_STEP
        self._ask(whole)
        start = pool.end
        pool.end = start + whole
        return Block(start, whole, pool)

    def _grown(self, size: int, pool: Pool) -> Block:
        """The last block of the pool's segment, if it is free, with as many more pages as it needs."""
        if self._is_full(self._needed(size, pool)):
            self.release()  # the free end of the segment may go, too
        more = self._needed(size, pool)
        self._ask(more)
        last = pool.last
        if last is not None and last.free:
            pool.remove(last, last.size)
            last.free = False
            last.size += more
            block = last
        else:
            block = Block(pool.end, more, pool)
            block.before = last
            if last is not None:
                last.after = block
        pool.last = block
        pool.end = block.start + block.size
        return block

    def _needed(self, size: int, pool: Pool) -> int:
        """The bytes in pages that a growing segment needs to end with a free block of `size`."""
        free = pool.last.size if pool.last is not None and pool.last.free else 0
        return -(-(size - free) // _pages(pool)) * _pages(pool)

    def _is_full(self, more: int) -> bool:
        """Whether the driver does not have `more` bytes."""
        return self.capacity is not None and self.reserved + more > self.capacity

    def _unmap(self, pool: Pool) -> None:
        """Whole free pages at the end of a growing segment go; those within it are not modelled, and stay."""
        block = pool.last
        less = block.size // _pages(pool) * _pages(pool) if block is not None and block.free else 0
        if block is None or not less:
            return
        pool.remove(block, block.size)
        pool.end -= less
        self.reserved -= less
        block.size -= less
        if block.size:
            pool.add(block, block.size)
        else:
            pool.last = block.before
            if block.before is not None:
                block.before.after = None

    def _ask(self, more: int) -> None:
        """Have the driver give `more`, once everything free has gone back if need be."""
        if self._is_full(more):
            self.release()
            if self._is_full(more):
                raise OutOfMemoryError(f"{more} bytes more than {self.reserved} of {self.capacity}")
        self.requests += 1
        self.reserved += more
        self.peak_reserved = max(self.peak_reserved, self.reserved)


def _pages(pool: Pool) -> int:
    """The bytes that a segment grows by."""
    return SMALL_SEGMENT if pool.is_small else LARGE_SEGMENT
