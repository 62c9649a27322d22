"""The KV cache pool of a serving engine: its blocks or token slots, and how many requests fit in them."""

from __future__ import annotations

from fractions import Fraction
from typing import Protocol

from memplan.core.records import NamedTuple


class Pool(Protocol):
    """How an engine uses the bytes it has for caches."""

    @property
    def tokens(self) -> int:
        """Tokens of one sequence that fit, as the engine reports them."""
        ...

    @property
    def blocks(self) -> int:
        """Number of blocks; for an engine without blocks, of token slots."""
        ...

    @property
    def block(self) -> int:
        """Tokens of a block, the fewest among all layers."""
        ...

    @property
    def block_bytes(self) -> int:
        """Bytes of one block on each rank, in all layers that share it."""
        ...

    @property
    def bytes(self) -> int:
        """Bytes of the pool on each rank."""
        ...

    def concurrency(self, context: int) -> Fraction:
        """Return how many requests of `context` tokens fit at once; less than 1 if a single one does not fit."""
        ...

    def holds(self, context: int, requests: int) -> bool:
        """Whether `requests` requests of `context` tokens fit at once."""
        ...

    def needs(self, context: int, requests: int) -> int:
        """Return the bytes of a pool that fits `requests` requests of `context` tokens."""
        ...


class CacheGroup(NamedTuple):
    """Layers that share a table of blocks.

    kind    full, sliding, chunked, or state
    layers  number of layers
    page    bytes of one layer's block on a rank, with padding
    block   tokens of a block
    own     bytes of one layer's block on a rank, without padding
    window  tokens that a layer with a sliding window sees
    states  blocks of a state that a request holds
    """

    kind: str
    layers: int
    page: int
    block: int
    own: int = 0
    window: int = 0
    states: int = 1

    def blocks_of(self, context: int, in_flight: int) -> int:
        """Return the blocks that one request of `context` tokens holds, with `in_flight` tokens computed at once."""
        match self.kind:
            case "sliding":  # one more, as a window may begin inside a block
                return -(-min(self.window - 1 + in_flight, context) // self.block) + 1
            case "chunked":
                return -(-min(self.window + in_flight, context) // self.block)
            case "state":
                return self.states
            case _:
                return -(-context // self.block)


class Blocks(NamedTuple):
    """A pool of blocks that all groups of layers share.

    groups     groups of layers
    number     number of blocks
    in_flight  tokens that may be computed at once
    longest    tokens of the longest request
    by_group   the engine reports tokens as the blocks of one group
    reserved   blocks that are never given out
    ahead      slots of a request beyond its tokens, up to the longest request
    """

    groups: tuple[CacheGroup, ...]
    number: int
    in_flight: int
    longest: int
    by_group: bool
    reserved: int
    ahead: int = 0

    @property
    def blocks(self) -> int:
        return self.number

    @property
    def block_bytes(self) -> int:
        return block_bytes(self.groups)

    @property
    def bytes(self) -> int:
        return self.number * self.block_bytes

    @property
    def block(self) -> int:
        return min((g.block for g in self.groups if g.kind != "state"), default=self.longest)

    @property
    def tokens(self) -> int:
        if self.by_group:
            return self.number // len(self.groups) * self.block
        return int(self.concurrency(self.longest) * self.longest)

    def of_request(self, context: int) -> int:
        """Return the blocks that one request of `context` tokens holds."""
        context = max(context, min(context + self.ahead, self.longest))
        return sum(g.blocks_of(context, self.in_flight) for g in self.groups)

    def concurrency(self, context: int) -> Fraction:
        return Fraction(self.number, self.of_request(context))

    def holds(self, context: int, requests: int) -> bool:
        return self.of_request(context) * requests + self.reserved <= self.number

    def needs(self, context: int, requests: int) -> int:
        return (self.of_request(context) * requests + self.reserved) * self.block_bytes


def block_bytes(groups: tuple[CacheGroup, ...]) -> int:
    """Return the bytes of a block: those of the largest group, as all groups use the same blocks."""
    return max(g.layers * g.page for g in groups)


class Tokens(NamedTuple):
    """Pools of token slots, one for layers with full attention and one for layers with a sliding window, and states.

    full           slots of layers with full attention
    full_bytes     bytes of a slot in all layers with full attention
    page           slots of a page
    sliding        slots of layers with a sliding window
    sliding_bytes  bytes of a slot in all layers with a sliding window
    window         tokens of the window
    states         states for requests, in addition to one for padding; None without such layers
    state_bytes    bytes of one state
    per_request    states of one request
    more_bytes     bytes of a draft's slot beyond the engine's own estimate of it; negative if it takes less
    """

    full: int
    full_bytes: int
    page: int
    sliding: int = 0
    sliding_bytes: int = 0
    window: int = 0
    states: int | None = None
    state_bytes: int = 0
    per_request: int = 1
    more_bytes: int = 0

    @property
    def blocks(self) -> int:
        return (self.full or self.sliding) // self.page if self._keeps else self.states or 0

    @property
    def _keeps(self) -> bool:
        """Whether any layer caches keys."""
        return bool(self.full_bytes or self.sliding_bytes)

    @property
    def block(self) -> int:
        return self.page

    @property
    def block_bytes(self) -> int:
        return self.page * (self.full_bytes or self.sliding_bytes) if self._keeps else self.state_bytes

    @property
    def tokens(self) -> int:
        return self.full or self.sliding

    @property
    def bytes(self) -> int:
        slots = self.full * (self.full_bytes + self.more_bytes) + self.sliding * self.sliding_bytes
        return slots + (self.states + 1) * self.state_bytes if self.states else slots

    def _slots(self, context: int) -> tuple[int, int]:
        """Return the slots that a request takes in layers without and with a window."""

        def paged(tokens: int) -> int:
            return -(-tokens // self.page) * self.page

        return paged(context) if self.full_bytes else 0, (
            paged(min(context, self.window + self.page)) if self.sliding_bytes else 0
        )

    def concurrency(self, context: int) -> Fraction:
        full, sliding = self._slots(context)
        requests = [Fraction(slots, taken) for slots, taken in ((self.full, full), (self.sliding, sliding)) if taken]
        requests += [Fraction(self.states, self.per_request)] if self.states is not None else []
        return min(requests)

    def holds(self, context: int, requests: int) -> bool:
        return self.concurrency(context) >= requests

    def needs(self, context: int, requests: int) -> int:
        full, sliding = self._slots(context)
        states = self.state_bytes * (self.per_request * requests + 1) if self.states is not None else 0
        return requests * (full * self.full_bytes + sliding * self.sliding_bytes) + states


class Slots(NamedTuple):
    """A cache for a fixed number of requests of a fixed length, as in llama.cpp.

    cells     tokens of all requests
    requests  number of requests
    total     bytes of the cache
    longest   tokens of one request
    """

    cells: int
    requests: int
    total: int
    longest: int

    @property
    def blocks(self) -> int:
        return self.cells

    @property
    def block(self) -> int:
        return 1

    @property
    def block_bytes(self) -> int:
        return self.total // max(1, self.cells)

    @property
    def bytes(self) -> int:
        return self.total

    @property
    def tokens(self) -> int:
        return self.cells

    def concurrency(self, context: int) -> Fraction:
        if context <= self.longest:
            return Fraction(self.requests)
        return Fraction(self.longest, context)

    def holds(self, context: int, requests: int) -> bool:
        return context <= self.longest and requests <= self.requests

    def needs(self, context: int, requests: int) -> int:
        return self.total
