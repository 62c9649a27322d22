"""The GPUs of a run that one process spreads over several: which differ, and which may hold the most."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.parallelism.device_maps import ModulePlacement
from memplan.program.graph import operations_of, parameters_of
from memplan.program.structure import Structure


def placement(structure: Structure) -> ModulePlacement:
    """Return where the modules are."""
    assert structure.graph.placed is not None
    return structure.graph.placed


def on_device(structure: Structure, card: int) -> Structure:
    """Return the run on another GPU, or on the host."""
    graph = structure.graph
    return structure._replace(graph=graph._replace(placed=placement(structure)._replace(card=card)))


def every_gpu(structure: Structure) -> Iterator[Structure]:
    """Yield the run on each GPU that holds modules."""
    return (on_device(structure, card) for card in range(placement(structure).cards))


def may_be_fullest(structure: Structure) -> Iterator[Structure]:
    """Yield the GPUs that may hold the most: the first, the last, and the largest that only has layers."""
    first, *middle, last = every_gpu(structure)
    yield first
    if middle:
        yield max(middle, key=weight_bytes)
    yield last


def weight_bytes(structure: Structure) -> int:
    """Return the bytes of weights and buffers on the GPU, or on the host."""
    return sum(h.bytes * h.copies for h in parameters_of(structure.graph))


def layer_kinds_alone(structure: Structure) -> tuple[int, ...]:
    """Return the kinds of the layers on a GPU that holds nothing else, or () for other GPUs.

    GPUs with equal kinds hold the same.
    """
    graph, placed = structure.graph, placement(structure)
    ends = {0, placed.rotary, placed.embeds, *(card for _, card in (*placed.before, *placed.after))}
    if placed.card in ends:
        return ()
    stack, axes = operations_of(graph._replace(placed=None))
    kinds = [id(block) for run in stack.runs for _ in range(axes[run.times]) for block in run.blocks]
    return tuple(kind for kind, card in zip(kinds, placed.layers, strict=True) if card == placed.card)
