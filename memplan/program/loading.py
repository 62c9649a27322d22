"""Loading a model: the allocations of every weight that is read, converted or quantised, in order."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

from memplan.catalogue.quantization.inference_formats import LoadStep, is_freed, laying, quantising, unpacking
from memplan.catalogue.quantization.storage import parts_of
from memplan.core.ir import Op, Tensor, Weight
from memplan.engine.walk import size
from memplan.program.graph import Graph, operations_of

EMPTIED = -1  # in place of a storage's number: torch.cuda.empty_cache()


def most_at_once(events: Iterable[tuple[int, int]]) -> int:
    """Return the peak bytes alive during the events of `loading`.

    A tensor without elements looks like a free of a storage that is not alive, and is ignored.
    """
    alive: dict[int, int] = {}
    live = most = 0
    for number, bytes_ in events:
        if bytes_:
            alive[number] = bytes_
            live += bytes_
            most = max(most, live)
        elif number != EMPTIED:
            live -= alive.pop(number, 0)
    return most


def loading(graph: Graph, places: dict[int, Weight] | None = None) -> Iterator[tuple[int, int]]:  # noqa: PLR0912, PLR0915 (one loader, step after step)
    """Yield what loading allocates and frees, in order: a storage's number with its bytes, or with 0 when it is freed.

    If `places` is given, it is filled with the final storage of every unquantised weight.

    A weight to be quantised exists in its loaded dtype until it is quantised, unless the checkpoint has it packed. A
    weight to be cast exists in its loaded dtype until all weights are loaded; TRL's preparation casts most weights
    twice. Adapters come last. Weights that a library of its own quantises or unpacks are loaded in the order of their
    names, and those unpacked by the first call of the model come after all others. If the checkpoint has a head
    although it is tied to the embeddings, both exist to the end.
    """
    stack, axes = operations_of(graph)
    loaded = graph.recipe.weights
    sizes_of: dict[int, tuple[int, tuple[int, ...]]] = {}  # bytes of a weight as loaded, and of its final tensors

    def sizes(w: Weight) -> tuple[int, tuple[int, ...]]:
        if id(w) not in sizes_of:
            ends = tuple(size(t.shape, t.dtype, axes)[1] for t in w.stored or (Tensor("", w.shape, w.dtype),))
            sizes_of[id(w)] = size(w.shape, loaded, axes)[1], ends
        return sizes_of[id(w)]

    numbers = itertools.count()
    weights = list(in_order(graph, by_name=graph.recipe.running is not None))
    if graph.placed is not None:  # weights on other GPUs have no bytes here
        weights = [w for w in weights if sizes(w)[0]]
    widened, how = "fp32" if graph.recipe.preparation else "", graph.recipe.running
    unpacked_later: list[tuple[Weight, list[int]]] = []  # by the first call of the model
    waiting: list[tuple[int, Weight, str]] = []
    for w in weights:
        if w.group == "adapter":
            continue
        whole, ends = sizes(w)
        if w.kernel and how is not None and how.whole:
            codes: list[int] = []
            for part in parts_of(w, how.of(w)):
                number = next(numbers)
                yield number, size(part.shape, part.dtype, axes)[1]
                codes += [number] if is_freed(part, w, how) else []
            if w.stacked or how.at_once:
                yield from _steps(unpacking(w, how), codes, numbers, axes)
            else:
                unpacked_later.append((w, codes))
            continue
        if w.kernel and how is not None and how.lays:
            first = next(numbers)
            yield first, ends[0]
            for bytes_ in ends[1:]:
                yield next(numbers), bytes_
            yield from _steps(laying(w, how), [first], numbers, axes)
            continue
        if w.stored and graph.recipe.packed:
            for bytes_ in ends:
                yield next(numbers), bytes_
            continue
        first = next(numbers)
        yield first, ends[0] if w.group == "buffer" else whole
        if w.kernel and how is not None:
            for bytes_ in ends[1:]:  # scales come first
                yield next(numbers), bytes_
            codes_made = (Tensor("", str(ends[0]), "uint8"),)
            yield from _steps(quantising(w, how), [], numbers, axes, codes_made)
            yield first, 0
        elif w.stored:
            for bytes_ in ends:
                yield next(numbers), bytes_
            yield first, 0
        elif w.group != "buffer":
            waiting.append((first, w, loaded))
    for target in (widened, ""):  # all to fp32 if the preparation does that, then each to its final dtype
        for i, (first, w, dtype) in enumerate(waiting):
            to = target or w.dtype
            if to != dtype:
                number = next(numbers)
                yield number, size(w.shape, to, axes)[1]
                yield first, 0
                waiting[i] = (number, w, to)
    if unpacked_later and how is not None:  # layer by layer
        codes_of: dict[int, list[list[int]]] = {}
        for w, codes in reversed(unpacked_later):
            codes_of.setdefault(id(w), []).append(codes)
        for w in in_order(graph):
            if id(w) in codes_of:
                yield from _steps(unpacking(w, how), codes_of[id(w)].pop(), numbers, axes)
    if places is not None:
        places.update((number, w) for number, w, _ in waiting)
    for w in weights:
        if w.group == "adapter":
            number = next(numbers)
            yield number, sizes(w)[1][0]
            if places is not None:
                places[number] = w
    if graph.inference is not None and graph.inference.loaded.stores_head:
        heads = [w for op in stack.after for w in op.weights if w.group == "embedding"]  # tied to the embeddings
        for first, w in zip(numbers, heads, strict=False):
            yield first, size(w.shape, loaded, axes)[1]
            yield first, 0


def _steps(
    steps: Iterable[LoadStep],
    codes: list[int],
    numbers: Iterator[int],
    axes: Mapping[str, int],
    parts: tuple[Tensor, ...] = (),
) -> Iterator[tuple[int, int]]:
    """Yield allocations and frees while a matrix is unpacked or quantised. `codes` are the storages of its quantised
    numbers, alive before; `parts` are the tensors that quantising makes of it."""
    alive: dict[str, int] = {}
    for step in steps:
        if step.made is None and step.name == "codes":
            yield from ((number, 0) for number in codes)
        elif step.made is None:
            yield alive.pop(step.name), 0
        else:
            for t in parts if step.name == "codes" else (step.made,):
                alive[step.name] = number = next(numbers)
                yield number, size(t.shape, t.dtype, axes)[1]


def in_order(graph: Graph, by_name: bool = False) -> Iterator[Weight]:
    """Yield every weight once: before the layers, layer by layer, after them. With `by_name`, in the order in which
    transformers 5.24 sorts names: core_model_loading.py dot_natural_key."""
    if by_name:
        yield from (w for _, w in sorted(_by_path(graph), key=lambda pair: pair[0]))
        return
    stack, axes = operations_of(graph)
    outside: set[str] = set()
    yield from _weights(stack.before, outside)
    for run in stack.runs:
        yield from _weights(run.before, outside)
        blocks = [list(_weights(block.ops, set())) for block in run.blocks]
        for _ in range(axes[run.times]):
            for block in blocks:
                yield from block
    yield from _weights((*stack.after, *stack.loss), outside)


def _by_path(graph: Graph) -> Iterator[tuple[tuple[tuple[int, str], ...], Weight]]:
    """Yield every weight with its path split at dots, in which numbers sort numerically."""
    stack, axes = operations_of(graph)
    outside: set[str] = set()

    def path(name: str) -> tuple[tuple[int, str], ...]:
        return tuple((int(part), "") if part.isdigit() else (-1, part) for part in name.split("."))

    for w in _weights((*stack.before, *(op for run in stack.runs for op in run.before)), outside):
        yield path(w.name), w
    place: dict[str, int] = {}
    for run in stack.runs:
        for _ in range(axes[run.times]):
            for block in run.blocks:
                place[block.name] = at = place.get(block.name, -1) + 1
                for w in _weights(block.ops, set()):
                    name = f"{w.name}_blocks" if w.stacked else w.name  # gpt-oss' files have them after their biases
                    yield path(f"{block.name}.{at}.{name}"), w
    for w in _weights((*stack.after, *stack.loss), outside):
        yield path(w.name), w


def _weights(ops: Iterable[Op], seen: set[str]) -> Iterator[Weight]:
    for op in ops:
        for w in op.weights:
            if w.name not in seen:
                seen.add(w.name)
                yield w
