"""Turn the tracker's records into a trace's report: sizes, phases, and the kind of every storage."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any, cast

import torch

from memplan.core.units import rounded
from memplan.probe.fake.modules import plain
from memplan.probe.fake.tracker import Interval, Tracker

Named = tuple[str, torch.Tensor]

_NO_NODE = 2**62  # AccumulateGrad nodes have sequence numbers above this


class StorageLabels:
    """Kinds and names of storages: parameters, buffers, gradients and states, noted while they are alive."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.kinds: dict[int, str] = {}
        self.names: dict[int, str] = {}

    def note(self, kind: str, tensors: Iterable[Named]) -> None:
        """Record the kind and names of these tensors' storages, unless already recorded."""
        for name, tensor in tensors:
            number = self.tracker.number_of(tensor)
            if number is not None:
                self.kinds.setdefault(number, kind)
                self.names.setdefault(number, plain(name))

    def name_of(self, tensor: torch.Tensor) -> str:
        """Return a recorded tensor's name; empty if it was not recorded."""
        number = self.tracker.number_of(tensor)
        return self.names.get(number, "") if number is not None else ""


def parameters_of(model: Any) -> Iterator[Named]:
    """Yield every parameter, and the scales and tables of quantised ones."""
    for name, parameter in model.named_parameters():
        yield name, parameter
        state = getattr(parameter, "quant_state", None)
        for holder, prefix in ((state, ""), (getattr(state, "state2", None), "nested ")):
            for part in ("absmax", "code", "offset"):
                tensor = getattr(holder, part, None)
                if isinstance(tensor, torch.Tensor):
                    yield f"{name} {prefix}{part}", tensor
    for name, module in model.named_modules():
        state = getattr(module, "state", None)
        for holder in (state, getattr(module, "weight", None)):
            for part in ("CB", "SCB"):
                tensor = getattr(holder, part, None)
                if isinstance(tensor, torch.Tensor):
                    yield f"{name}.weight {part}", tensor


def buffers_of(model: Any) -> Iterator[Named]:
    """Yield every buffer, and every other tensor that is an attribute of a module."""
    yield from model.named_buffers()
    for name, module in model.named_modules():
        attributes = cast(dict[str, Any], vars(module))
        for key, value in attributes.items():
            if isinstance(value, torch.Tensor):
                yield f"{name}.{key}".removeprefix("."), value


def gradients_of(parameters: list[Any], known: StorageLabels) -> Iterator[Named]:
    for parameter in parameters:
        if parameter.grad is not None:
            yield f"gradient of {known.name_of(parameter)}", parameter.grad


def states_of(optimizers: list[Any], known: StorageLabels) -> Iterator[Named]:
    """Yield the optimizers' states, and the tables that bitsandbytes' optimizers share."""
    for optimizer in optimizers:
        for parameter, state in cast(dict[Any, dict[str, Any]], optimizer.state).items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    yield f"{known.name_of(parameter)} {key}".strip(), value
        tables: dict[str, Any] = getattr(optimizer, "name2qmap", {})
        yield from ((f"table {name}", table) for name, table in tables.items())


def report(tracker: Tracker, known: StorageLabels) -> dict[str, Any]:
    """Return storages, events and phases as JSON, with the fields of `trace.TracedStorage` and `trace.TracedPhase`."""
    born, died = _lifetimes(tracker)
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
        lifetime = (born[number], died[number])
        name = known.names.get(number, "")
        storages.append([size, made.asked, made.shape, made.dtype, made.op, module, kind, *lifetime, name])
    sizes = [storage[0] for storage in storages]
    allocated = list(accumulate(sizes[e] if e >= 0 else -sizes[~e] for e in tracker.events))
    return {
        "storages": storages,
        "events": tracker.events,
        "phases": [list(_phase(interval, allocated)) for interval in intervals],
    }


def _lifetimes(tracker: Tracker) -> tuple[list[int], list[int]]:
    born, died = [0] * len(tracker.made), [len(tracker.events)] * len(tracker.made)
    for event, number in enumerate(tracker.events):
        if number >= 0:
            born[number] = event
        else:
            died[~number] = event
    return born, died


def _with_loss(intervals: list[Interval]) -> Iterator[Interval]:
    """Split each forward pass where its loss begins."""
    for interval in intervals:
        if interval.loss < 0:
            yield interval
        else:
            yield interval._replace(end=interval.loss)
            yield interval._replace(name="loss", start=interval.loss)


def _phase(interval: Interval, allocated: list[int]) -> Iterator[Any]:
    """Yield the fields of a phase. Memory allocated when it begins counts towards its peak."""
    start = max(interval.start - 1, 0)
    inside = allocated[start : interval.end]
    peak = max(inside)
    yield from (interval.name, interval.step, interval.start, interval.end)
    yield from (peak, start + inside.index(peak), inside[-1])


def _kind(born: int, died: int, intervals: list[Interval], recomputed: list[tuple[int, int]]) -> str:
    """Return activation for a storage that outlives the forward pass or recomputed block that created it, else temp."""
    within = next((i for i in intervals if i.start <= born < i.end), None)
    if within is None:
        return "other"
    end = within.end
    if within.name == "forward":  # the loss belongs to it
        loss = next((i for i in intervals if i.name == "loss" and i.start == end), None)
        end = loss.end if loss is not None else end
    if within.name in ("forward", "loss", "encode", "prefill", "decode"):
        return "activation" if died > end else "temp"
    block = next((b for b in recomputed if b[0] <= born < b[1]), None)
    return "activation" if block is not None and died > block[1] else "temp"
