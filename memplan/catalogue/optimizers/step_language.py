"""A step of an optimizer that goes parameter by parameter: what may happen to the memory in it, and how much that is.

A loop is what one parameter's turn does, line by line, in the order of the optimizer's source. Storages have the names
of its variables. What a turn leaves behind is still there in the next one, until its name is taken again: so it is in
Python, where a variable keeps its tensor until the loop comes by once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum, auto
from typing import NamedTuple


class Step(Enum):
    """The kinds of steps. Steps 1, 201, 401 ... make new projections: `FIRST` does, and `PROJECTING` are the others."""

    FIRST = auto()
    LATER = auto()
    PROJECTING = auto()


class Turn(NamedTuple):
    """A parameter whose turn it is: its shape, and `low`, what it is projected to (its own, where `rank` is 0).

    moment      the dtype of moments
    made        bytes of the states it gets on the GPU: those of the projector by name, all others as `states`
    shared      bytes of those that come with the first parameter that has them
    loop        what its turn does
    """

    shape: tuple[int, ...]
    low: tuple[int, ...]
    rank: int
    dtype: str
    moment: str
    made: Mapping[str, int]
    shared: int
    loop: Loop


Size = Callable[[Turn], int]  # bytes of a storage


class New(NamedTuple):
    """See `new`."""

    name: str
    size: Size


class Rename(NamedTuple):
    """See `rename`."""

    old: str
    to: str


class Free(NamedTuple):
    """See `free`."""

    names: tuple[str, ...]


class Keep(NamedTuple):
    """See `keep`."""

    what: str


class Hold(NamedTuple):
    """See `hold` and `lose`."""

    size: Size
    sign: int


Action = New | Rename | Free | Keep | Hold


class Only(NamedTuple):
    """See `later` and `projecting`."""

    steps: tuple[Step, ...]
    actions: tuple[Action, ...]


Line = Action | Only
Loop = tuple[Line, ...]


def new(name: str, size: Size) -> New:
    """A new storage for the name. What it named before goes afterwards, so for a moment both are there."""
    return New(name, size)


def rename(old: str, to: str) -> Rename:
    """`to = old`: the storage has another name, and what that named goes."""
    return Rename(old, to)


def free(*names: str) -> Free:
    """The storages go, those that are there."""
    return Free(names)


def keep(what: str) -> Keep:
    """States are made, where this is the first step: those of the projector by name, all others as `states`."""
    return Keep(what)


def hold(size: Size) -> Hold:
    """Something is there until the step ends, for every parameter that had its turn."""
    return Hold(size, 1)


def lose(size: Size) -> Hold:
    """Something that was there before the step is away until it ends."""
    return Hold(size, -1)


def later(*actions: Action) -> Only:
    """In all steps but the first."""
    return Only((Step.LATER, Step.PROJECTING), actions)


def projecting(*actions: Action) -> Only:
    """In steps that make new projections."""
    return Only((Step.FIRST, Step.PROJECTING), actions)


def makes_states(loop: Loop) -> bool:
    """Whether states come up within the loop, so that the first step begins without them."""
    return any(isinstance(action, Keep) for action in _actions(loop, Step.FIRST))


_Live = tuple[tuple[str, int], ...]  # storages, by name


def peak(runs: Iterable[tuple[int, Sequence[Turn]]], step: Step) -> int:
    """The most that is alive in a step over all turns, beside what there is before it. Runs are repeated turns.

    The first copy of a run follows something else than the others; those between the second and the last only add up.
    """
    live: _Live = ()
    kept = most = 0
    have_shared = False
    done: dict[tuple[int, int, _Live], tuple[int, int, _Live]] = {}
    for copies, run in runs:
        before = kept
        for skipped in (0, 0, copies - 3)[:copies]:
            before, kept = kept, kept + skipped * (kept - before)
            for turn in run:
                shared = 0 if have_shared else turn.shared
                have_shared = have_shared or turn.shared > 0
                key = (id(turn), shared, live)  # a model has few kinds of turns, and they leave little behind
                if key not in done:
                    done[key] = _take(turn, step, live, shared)
                highest, grown, live = done[key]
                most = max(most, kept + highest)
                kept += grown
    return most


def largest_update(turns: Iterable[Turn]) -> int:
    """The most that one parameter's update has alive, each on its own, where all states are there already."""
    return max((_take(turn, step)[0] for turn in turns for step in (Step.LATER, Step.PROJECTING)), default=0)


def _actions(loop: Loop, step: Step) -> Iterator[Action]:
    for line in loop:
        if not isinstance(line, Only):
            yield line
        elif step in line.steps:
            yield from line.actions


def _take(turn: Turn, step: Step, before: _Live = (), shared: int = 0) -> tuple[int, int, _Live]:
    """One turn: the most it has alive, what it adds for the rest of the step, and what it leaves behind."""
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
            case Keep(what):
                if step is Step.FIRST:
                    kept += turn.made[what] + (shared if what == "states" else 0)
                    most = max(most, kept + now)
            case Hold(size_of, sign):
                kept += sign * size_of(turn)
    return most, kept, tuple(live.items())
