"""A language for optimizer steps that loop over parameters, and an interpreter that finds their peak.

A loop lists what one parameter's turn allocates and frees, in the order of the optimizer's source, with storages named
after its variables. A storage that a turn leaves behind lives on in the next turn until its name is assigned again, as
a Python variable keeps its tensor until the loop body rebinds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum, auto

from memplan.core.records import NamedTuple


class StepInstruction(Enum):
    """Kinds of steps. Steps 1, 201, 401 ... make new projections: step 1 is `FIRST`, the others are `PROJECTING`."""

    FIRST = auto()
    LATER = auto()
    PROJECTING = auto()


class Turn(NamedTuple):
    """The turn of one parameter.

    shape        shape of the parameter
    low          its projected shape; the parameter's if `rank` is 0
    rank         rank of the projection; 0 without one
    dtype        dtype of the parameter
    moment       dtype of the moments
    state_bytes  bytes of the states it gets on the GPU: the projector's by name, all others as `states`
    shared       bytes of the shared states, which are created with the first parameter that has them
    loop         the actions of the turn
    """

    shape: tuple[int, ...]
    low: tuple[int, ...]
    rank: int
    dtype: str
    moment: str
    state_bytes: Mapping[str, int]
    shared: int
    loop: Loop


Size = Callable[[Turn], int]  # bytes of a storage


class New(NamedTuple):
    """Assign a new storage to `name`. The old one is freed afterwards, so both are alive for a moment."""

    name: str
    size: Size


class Rename(NamedTuple):
    """`to = old`: give the storage another name and free what that name held before."""

    old: str
    to: str


class Free(NamedTuple):
    """See `free`."""

    names: tuple[str, ...]


class CreateState(NamedTuple):
    """In the first step, create states: one of the projector's by name, or all others as `states`."""

    what: str


class Hold(NamedTuple):
    """See `hold` and `lose`."""

    size: Size
    sign: int


Action = New | Rename | Free | CreateState | Hold


class Only(NamedTuple):
    """See `later` and `projecting`."""

    steps: tuple[StepInstruction, ...]
    actions: tuple[Action, ...]


Line = Action | Only
Loop = tuple[Line, ...]


def free(*names: str) -> Free:
    """Free the storages; names without a storage are ignored."""
    return Free(names)


def hold(size: Size) -> Hold:
    """Allocate bytes that stay until the step ends, for every parameter that has had its turn."""
    return Hold(size, 1)


def lose(size: Size) -> Hold:
    """Free bytes from before the step until it ends."""
    return Hold(size, -1)


def later(*actions: Action) -> Only:
    """Run the actions in every step but the first."""
    return Only((StepInstruction.LATER, StepInstruction.PROJECTING), actions)


def projecting(*actions: Action) -> Only:
    """Run the actions in steps that make new projections."""
    return Only((StepInstruction.FIRST, StepInstruction.PROJECTING), actions)


def makes_states(loop: Loop) -> bool:
    """Whether the loop creates states, so that the first step begins without them."""
    return any(isinstance(action, CreateState) for action in _actions(loop, StepInstruction.FIRST))


_Live = tuple[tuple[str, int], ...]  # (name, bytes) of each live storage


def peak(runs: Iterable[tuple[int, Sequence[Turn]]], step: StepInstruction) -> int:
    """Return the most bytes alive in a step over all turns, in addition to those alive before it.

    runs  turns with the number of times they repeat. The first copy of a run can start from other leftovers than the
          rest; copies between the second and the last all add the same.
    """
    live: _Live = ()
    kept = most = 0
    have_shared = False
    cache: dict[tuple[int, int, _Live], tuple[int, int, _Live]] = {}
    for copies, run in runs:
        before = kept
        for skipped in (0, 0, copies - 3)[:copies]:
            before, kept = kept, kept + skipped * (kept - before)
            for turn in run:
                shared = 0 if have_shared else turn.shared
                have_shared = have_shared or turn.shared > 0
                key = (id(turn), shared, live)  # a model has few kinds of turns, and they leave little behind
                if key not in cache:
                    cache[key] = _play(turn, step, live, shared)
                highest, added, live = cache[key]
                most = max(most, kept + highest)
                kept += added
    return most


def largest_update(turns: Iterable[Turn]) -> int:
    """Return the most bytes that any single parameter's update has alive, once all states exist."""
    return max(
        (_play(turn, step)[0] for turn in turns for step in (StepInstruction.LATER, StepInstruction.PROJECTING)),
        default=0,
    )


def _actions(loop: Loop, step: StepInstruction) -> Iterator[Action]:
    for line in loop:
        if not isinstance(line, Only):
            yield line
        elif step in line.steps:
            yield from line.actions


def _play(turn: Turn, step: StepInstruction, before: _Live = (), shared: int = 0) -> tuple[int, int, _Live]:
    """Return a turn's peak bytes, the bytes it adds for the rest of the step, and the storages it leaves behind."""
    live = dict(before)
    most = now = sum(live.values())
    kept = 0
    for action in _actions(turn.loop, step):
        match action:
            case New(name, size_of):
                size = size_of(turn)
                most = max(most, kept + now + size)
                now += size - live.get(name, 0)
                live[name] = size
            case Rename(old, to):
                now -= live.get(to, 0)
                live[to] = live.pop(old)
            case Free(names):
                now -= sum(live.pop(name, 0) for name in names)
            case CreateState(what):
                if step is StepInstruction.FIRST:
                    kept += turn.state_bytes[what] + (shared if what == "states" else 0)
                    most = max(most, kept + now)
            case Hold(size_of, sign):
                kept += sign * size_of(turn)
    return most, kept, tuple(live.items())
