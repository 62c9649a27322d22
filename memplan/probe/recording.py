"""From what the tracker saw to what a trace reports: sizes, phases, and what every storage is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any, cast

import torch

from memplan.probe.tracker import Interval, Tracker
from memplan.units import rounded

_NO_NODE = 2**62  # accumulations into parameters have a number beyond all others


class Known:
    """Which storages are parameters, buffers, gradients, states: asked while they are there, kept by number."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.kinds: dict[int, str] = {}

    def note(self, kind: str, tensors: Iterator[torch.Tensor]) -> None:
        """These tensors' storages are of this kind, unless they are known already."""
        for tensor in tensors:
            number = self.tracker.number_of(tensor)
            if number is not None:
                self.kinds.setdefault(number, kind)


def parameters_of(model: Any) -> Iterator[torch.Tensor]:
    """Every parameter, and what a quantised one consists of beside its codes."""
    for parameter in model.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        for holder in (state, getattr(state, "state2", None)):
            for name in ("absmax", "code", "offset"):
                tensor = getattr(holder, name, None)
                if isinstance(tensor, torch.Tensor):
                    yield tensor
    for module in model.modules():
        state = getattr(module, "state", None)
        for holder in (state, getattr(module, "weight", None)):
            for name in ("CB", "SCB"):
                tensor = getattr(holder, name, None)
                if isinstance(tensor, torch.Tensor):
                    yield tensor


def buffers_of(model: Any) -> Iterator[torch.Tensor]:
    """Every buffer, and every other tensor a module holds."""
    yield from model.buffers()
    for module in model.modules():
        held = cast(dict[str, Any], vars(module))
        for value in held.values():
            if isinstance(value, torch.Tensor):
                yield value


def gradients_of(parameters: list[Any]) -> Iterator[torch.Tensor]:
    for parameter in parameters:
        if parameter.grad is not None:
            yield parameter.grad


def states_of(optimizers: list[Any]) -> Iterator[torch.Tensor]:
    """What the optimizers keep of parameters, and the tables bitsandbytes' share."""
    for optimizer in optimizers:
        states: Iterable[dict[str, Any]] = optimizer.state.values()
        for state in states:
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
        yield from getattr(optimizer, "name2qmap", {}).values()


def report(tracker: Tracker, known: Known) -> dict[str, Any]:
    """Storages, events and phases as JSON holds them, in the order of `trace.Storage` and `trace.TracedPhase`."""
    born, died = _lives(tracker)
    starts = [number for number, _ in tracker.modules]
    names = [name for _, name in tracker.modules]
    intervals = list(_with_loss(tracker.intervals))
    storages: list[list[Any]] = []
    for number, made in enumerate(tracker.made):
        kind = known.kinds.get(number) or _kind(born[number], died[number], intervals, tracker.recomputed)
        module = made.module
        if not module and 0 <= made.node < _NO_NODE and starts:
            module = names[max(0, bisect_right(starts, made.node) - 1)]
        size = rounded(made.asked) if made.asked else 0
        storages.append([size, made.asked, made.shape, made.dtype, made.op, module, kind, born[number], died[number]])
    sizes = [storage[0] for storage in storages]
    allocated = list(accumulate(sizes[e] if e >= 0 else -sizes[~e] for e in tracker.events))
    return {
        "storages": storages,
        "events": tracker.events,
        "phases": [list(_phase(interval, allocated)) for interval in intervals],
    }


def _lives(tracker: Tracker) -> tuple[list[int], list[int]]:
    born, died = [0] * len(tracker.made), [len(tracker.events)] * len(tracker.made)
    for event, number in enumerate(tracker.events):
        if number >= 0:
            born[number] = event
        else:
            died[~number] = event
    return born, died


def _with_loss(intervals: list[Interval]) -> Iterator[Interval]:
    """Forward passes divided where the head is done."""
    for interval in intervals:
        if interval.loss < 0:
            yield interval
        else:
            yield interval._replace(end=interval.loss)
            yield interval._replace(name="loss", start=interval.loss)


def _phase(interval: Interval, allocated: list[int]) -> Iterator[Any]:
    """What is there when a phase begins counts for its peak."""
    start = max(interval.start - 1, 0)
    inside = allocated[start : interval.end]
    peak = max(inside)
    yield from (interval.name, interval.step, interval.start, interval.end)
    yield from (peak, start + inside.index(peak), inside[-1])


def _kind(born: int, died: int, intervals: list[Interval], recomputed: list[tuple[int, int]]) -> str:
    """Activations are what outlives the forward pass, or the recomputed block, that made it."""
    within = next((i for i in intervals if i.start <= born < i.end), None)
    if within is None:
        return "other"
    end = within.end
    if within.name == "forward":  # the loss belongs to it
        follows = next((i for i in intervals if i.name == "loss" and i.start == end), None)
        end = follows.end if follows is not None else end
    if within.name in ("forward", "loss", "prefill", "decode"):
        return "activation" if died > end else "temp"
    block = next((b for b in recomputed if b[0] <= born < b[1]), None)
    return "activation" if block is not None and died > block[1] else "temp"
