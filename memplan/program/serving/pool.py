"""The pool of a serving engine: blocks or tokens of every layer's cache, and how many requests they hold."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple, Protocol


class Pool(Protocol):
    """What an engine makes of the bytes it has for caches."""

    @property
    def tokens(self) -> int:
        """How many tokens of one sequence the engine says it holds."""
        ...

    @property
    def blocks(self) -> int:
        """How many blocks there are; of an engine without blocks, tokens."""
        ...

    @property
    def block(self) -> int:
        """Tokens of a block, the fewest of any layer."""
        ...

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers that have it, on each rank."""
        ...

    @property
    def bytes(self) -> int:
        """Bytes that the pool takes on each rank."""
        ...

    def concurrency(self, context: int) -> Fraction:
        """How many requests of so many tokens it holds at once; a part of one where it holds none."""
        ...

    def holds(self, context: int, requests: int) -> bool:
        """Whether so many requests of so many tokens fit at once."""
        ...

    def needs(self, context: int, requests: int) -> int:
        """Bytes of a pool that holds so many requests of so many tokens."""
        ...


class Group(NamedTuple):
    """Layers that share a table of blocks.

    kind    full, sliding, chunked, or state
    layers  how many there are
    page    bytes of one layer's block on a rank, padding included; `own` without it
    block   tokens of a block
    window  the tokens that a layer with a window sees
    states  blocks that a request holds of a state
    """

    kind: str
    layers: int
    page: int
    block: int
    own: int = 0
    window: int = 0
    states: int = 1

    def blocks_of(self, context: int, in_flight: int) -> int:
        """Blocks that one request of `context` tokens holds, with `in_flight` tokens under way at once."""
        match self.kind:
            case "sliding":  # one more, as a window may begin within a block
                return -(-min(self.window - 1 + in_flight, context) // self.block) + 1
            case "chunked":
                return -(-min(self.window + in_flight, context) // self.block)
            case "state":
                return self.states
            case _:
                return -(-context // self.block)


class Blocks(NamedTuple):
    """Blocks that groups of layers draw from one pool."""

    groups: tuple[Group, ...]
    number: int
    in_flight: int
    longest: int
    by_group: bool  # tokens are counted as blocks of one group
    reserved: int  # blocks that are never given out
    ahead: int = 0  # slots of a request beyond its tokens, but for those beyond the longest request

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
        """Blocks that one request of so many tokens holds."""
        context = max(context, min(context + self.ahead, self.longest))
        return sum(g.blocks_of(context, self.in_flight) for g in self.groups)

    def concurrency(self, context: int) -> Fraction:
        return Fraction(self.number, self.of_request(context))

    def holds(self, context: int, requests: int) -> bool:
        return self.of_request(context) * requests + self.reserved <= self.number

    def needs(self, context: int, requests: int) -> int:
        return (self.of_request(context) * requests + self.reserved) * self.block_bytes


def block_bytes(groups: tuple[Group, ...]) -> int:
    """Bytes of a block: of the group that has most. Groups lie over each other, block by block."""
    return max(g.layers * g.page for g in groups)


class Tokens(NamedTuple):
    """Slots for tokens: so many for layers that keep all, so many for those with a window, and states of requests.

    full, sliding  slots, and bytes of one in all such layers
    states         states that requests may have, beside one that pads; None where there are none
    more_bytes     what a draft's slot takes beyond what was counted for it when slots were (negative: less)
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
        """Whether any layer keeps keys."""
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
        """Slots that a request takes, without and with a window."""

        def paged(tokens: int) -> int:
            return -(-tokens // self.page) * self.page

        return paged(context) if self.full_bytes else 0, (
            paged(min(context, self.window + self.page)) if self.sliding_bytes else 0
        )

    def concurrency(self, context: int) -> Fraction:
        full, sliding = self._slots(context)
        found = [Fraction(have, take) for have, take in ((self.full, full), (self.sliding, sliding)) if take]
        found += [Fraction(self.states, self.per_request)] if self.states is not None else []
        return min(found)

    def holds(self, context: int, requests: int) -> bool:
        return self.concurrency(context) >= requests

    def needs(self, context: int, requests: int) -> int:
        full, sliding = self._slots(context)
        states = self.state_bytes * (self.per_request * requests + 1) if self.states is not None else 0
        return requests * (full * self.full_bytes + sliding * self.sliding_bytes) + states


class Slots(NamedTuple):
    """A cache made for so many requests of so many tokens, and no more: what llama.cpp has."""

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
