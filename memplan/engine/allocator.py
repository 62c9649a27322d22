"""A model of torch's caching allocator: from a sequence of allocations and frees to reserved segments.

A request is rounded up to 512 bytes and served by the smallest free block that holds it, from one of two pools.
Requests up to 1 MiB come from segments of 2 MiB, larger ones from segments of 20 MiB, and requests from 10 MiB on get a
segment of their own, rounded up to 2 MiB. A larger block is split if the rest is large enough; adjacent free blocks
merge. Segments stay reserved until the GPU is full: then all completely free ones go back to the driver, and the
request is tried once more.

With `expandable_segments:True` a pool has one segment, which grows by pages of 2 or 20 MiB, and blocks are always
split.

Every stream has its own pools: a block that is free on one stream cannot serve another.

Source: torch 2.13 c10/cuda/CUDACachingAllocator.cpp: get_free_block, should_split, get_allocation_size,
release_cached_blocks, try_allocate_expandable_block; BlockComparatorSize, by which a block is of one stream.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import MutableSequence, Sequence
from typing import Any, Protocol

from memplan.core.units import MIB
from memplan.engine.events import FREED, RELEASED, Events

SMALL_REQUEST = MIB  # kSmallSize: the largest request of the small pool
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT = 20 * MIB  # kLargeBuffer
OWN_SEGMENT = 10 * MIB  # kMinLargeAlloc: the smallest request with a segment of its own
OWN_SEGMENT_STEP = 2 * MIB  # kRoundLarge

Block = Any  # an allocator's own handle of one of its blocks
LiveBlocks = MutableSequence[Any]  # the block of each storage by its number, or the allocator's own sign for none


class OutOfMemoryError(Exception):
    """A request does not fit the capacity, even after releasing all free segments."""


class Allocator(Protocol):
    """One device's allocator. All sizes are in bytes.

    allocated  size of allocated blocks, as torch.cuda.memory_allocated counts them
    reserved   size of segments
    requests   number of requests to the driver
    refused    the fewest bytes of segments that were more than the capacity, so that free ones were released; 0 if none
    """

    allocated: int
    reserved: int
    peak_allocated: int
    peak_reserved: int
    requests: int
    refused: int

    def alloc(self, size: int, stream: int = 0) -> Block:
        """Return a block of at least `size` bytes. Raises OutOfMemoryError if it does not fit the capacity."""
        ...

    def free(self, block: Block) -> None:
        """Free a block and merge it with free neighbours."""

    def release(self) -> None:
        """Return free segments to the driver, as torch does in empty_cache() and when the GPU is full."""

    def live_blocks(self, storages: int) -> LiveBlocks:
        """Return a table for `replay` in which none of the storages is live."""
        ...

    def replay(self, events: Events, sizes: Sequence[int], live: LiveBlocks) -> None:
        """Allocate and free as the events say. A storage that is live already is not allocated again.

        Once a repetition of a span requests nothing from the driver, it leaves the allocator unchanged, and the
        remaining repetitions are skipped. Raises as `alloc` does, and KeyError if an unknown storage is freed.
        """


class BlockPool:
    """The free blocks of a pool.

    of_size  size -> addresses of the free blocks of that size, sorted
    sizes    the keys of `of_size`, sorted
    free     address -> free block
    end      end address of the last segment
    last     last block of an expandable segment
    """

    __slots__ = ("end", "free", "is_small", "last", "of_size", "sizes")

    def __init__(self, is_small: bool) -> None:
        self.is_small = is_small
        self.of_size: dict[int, list[int]] = {}
        self.free: dict[int, AllocatorBlock] = {}
        self.sizes: list[int] = []
        self.end = 0
        self.last: AllocatorBlock | None = None

    def add(self, block: AllocatorBlock, size: int) -> None:
        """Add a free block of this size."""
        start = block.start
        self.free[start] = block
        starts = self.of_size.get(size)
        if starts is None:
            self.of_size[size] = [start]
            insort(self.sizes, size)
        else:
            insort(starts, start)

    def remove(self, block: AllocatorBlock, size: int) -> None:
        """Remove a free block of this size."""
        start = block.start
        del self.free[start]
        starts = self.of_size[size]
        if len(starts) > 1:
            del starts[bisect_left(starts, start)]
        else:
            del self.of_size[size], self.sizes[bisect_left(self.sizes, size)]


class AllocatorBlock:
    """A piece of a segment, free or allocated, with its neighbours."""

    __slots__ = ("after", "before", "free", "pool", "size", "start")

    def __init__(self, start: int, size: int, pool: BlockPool) -> None:
        self.start = start
        self.size = size
        self.pool = pool
        self.free = False
        self.before: AllocatorBlock | None = None
        self.after: AllocatorBlock | None = None


class PythonAllocator:
    """`Allocator` in Python, which the compiled one (native.c) equals.

    expandable  whether `expandable_segments:True` is set
    capacity    memory that the driver can give; None for no limit
    streams     number of streams that the process allocates on; the first is the compute stream
    """

    def __init__(self, expandable: bool = False, capacity: int | None = None, streams: int = 1) -> None:
        self.expandable = expandable
        self.capacity = capacity
        self.allocated = self.reserved = self.requests = 0
        self.peak_allocated = self.peak_reserved = 0
        self.refused = 0
        self._pools = [BlockPool(is_small) for _ in range(streams) for is_small in (False, True)]

    def alloc(self, size: int, stream: int = 0) -> AllocatorBlock:
        size = (size + 511) & -512  # rounded(), inlined because every event of a replay comes here
        is_small = size <= SMALL_REQUEST
        pool = self._pools[2 * stream + is_small]
        if not size:
            return AllocatorBlock(-1, 0, pool)
        i = bisect_left(pool.sizes, size)
        if i < len(pool.sizes):
            block_size = pool.sizes[i]
            starts = pool.of_size[block_size]
            block = pool.free.pop(starts.pop(0))
            if not starts:
                del pool.of_size[block_size], pool.sizes[i]
            block.free = False
        else:
            block = self._grow(size, pool) if self.expandable else self._reserve(size, pool)
            block_size = block.size
        rest = block_size - size
        if rest > SMALL_REQUEST or (rest and (is_small or self.expandable)):
            other = AllocatorBlock(block.start + size, rest, pool)
            other.before, other.after, other.free = block, block.after, True
            if block.after is None:
                pool.last = other
            else:
                block.after.before = other
            block.after = other
            block.size = block_size = size
            pool.add(other, rest)
        self.allocated += block_size
        if self.allocated > self.peak_allocated:  # noqa: PLR1730 (max would be a call per event of a replay)
            self.peak_allocated = self.allocated
        return block

    def free(self, block: AllocatorBlock) -> None:
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
        for pool in self._pools:
            if self.expandable:
                self._unmap(pool)
                continue
            for block in list(pool.free.values()):
                if block.before is None and block.after is None:
                    pool.remove(block, block.size)
                    self.reserved -= block.size

    def live_blocks(self, storages: int) -> LiveBlocks:
        return [None] * storages

    def replay(self, events: Events, sizes: Sequence[int], live: LiveBlocks) -> None:
        alloc, free, streams = self.alloc, self.free, events.streams
        for span in events.spans_of(events.every):
            repeated = events.of(span)
            for _ in range(span.times):
                requests = self.requests
                for number, key in repeated:
                    if key == RELEASED:
                        self.release()
                    elif key != FREED:
                        if live[number] is None:
                            live[number] = alloc(sizes[key], streams[key])
                    elif live[number] is None:
                        raise KeyError(number)
                    else:
                        free(live[number])
                        live[number] = None
                if self.requests == requests:
                    break

    def _reserve(self, size: int, pool: BlockPool) -> AllocatorBlock:
        """Return a new segment as one block."""
        if pool.is_small:
            segment_size = SMALL_SEGMENT
        elif size < OWN_SEGMENT:
            segment_size = LARGE_SEGMENT
        else:
            segment_size = -(-size // OWN_SEGMENT_STEP) * OWN_SEGMENT_STEP
        self._request(segment_size)
        start = pool.end
        pool.end = start + segment_size
        return AllocatorBlock(start, segment_size, pool)

    def _grow(self, size: int, pool: BlockPool) -> AllocatorBlock:
        """Return the last block of the pool's segment, after growing the segment until that block has `size` bytes."""
        self._make_room(self._missing(size, pool))  # may also release the free end of this segment
        more = self._missing(size, pool)
        self._request(more)
        last = pool.last
        if last is not None and last.free:
            pool.remove(last, last.size)
            last.free = False
            last.size += more
            block = last
        else:
            block = AllocatorBlock(pool.end, more, pool)
            block.before = last
            if last is not None:
                last.after = block
        pool.last = block
        pool.end = block.start + block.size
        return block

    def _missing(self, size: int, pool: BlockPool) -> int:
        """Return the bytes, in whole pages, that the segment must grow by to end with a free block of `size`."""
        free = pool.last.size if pool.last is not None and pool.last.free else 0
        return -(-(size - free) // _page_size(pool)) * _page_size(pool)

    def _refuses(self, more: int) -> bool:
        """Whether the driver refuses `more` bytes, which `refused` then counts."""
        reserved = self.reserved + more
        if self.capacity is None or reserved <= self.capacity:
            return False
        self.refused = min(self.refused or reserved, reserved)
        return True

    def _make_room(self, more: int) -> None:
        """Release free segments if the driver cannot give `more` bytes."""
        if self._refuses(more):
            self.release()

    def _unmap(self, pool: BlockPool) -> None:
        """Unmap whole free pages at the end of the segment. Free pages inside it stay mapped: that is not modelled."""
        block = pool.last
        less = block.size // _page_size(pool) * _page_size(pool) if block is not None and block.free else 0
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

    def _request(self, more: int) -> None:
        """Request `more` bytes from the driver, after releasing free segments if it is full."""
        self._make_room(more)
        if self._refuses(more):
            raise OutOfMemoryError(f"{more} bytes more than {self.reserved} of {self.capacity}")
        self.requests += 1
        self.reserved += more
        self.peak_reserved = max(self.peak_reserved, self.reserved)


def _page_size(pool: BlockPool) -> int:
    """Return the page size of an expandable segment."""
    return SMALL_SEGMENT if pool.is_small else LARGE_SEGMENT
