"""What loading a model takes on a GPU where FSDP divides it, event by event: see `memplan.program.loading.loading`.

Under FSDP2 with `cpu_ram_efficient_loading` each weight is sent whole, and divided, one after the other. Otherwise a
unit's weights are brought together from the host, FSDP1's copied into one tensor, and the rank's parts copied out;
blocks come first. A quantised model is whole on every GPU before that, but of older versions of transformers.

Source: accelerate 1.15 utils/fsdp_utils.py fsdp2_prepare_model, fsdp2_load_full_state_dict, accelerator.py
prepare_model; torch 2.13 distributed/fsdp/_init_utils.py, _flat_param.py, _fully_shard/_fsdp_param.py,
distributed/tensor/placement_types.py Shard._shard_tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from math import prod

from memplan.catalogue.parallelism.sharding import aligned, part, rows_of
from memplan.core.ir import Weight, outside
from memplan.engine.gather import REST
from memplan.engine.walk import size
from memplan.program.graph import Graph, built, parameters_of
from memplan.program.loading import in_order
from memplan.program.sharding.ranks import Ranks, kept_dtype, shape_in, shared_tables, units_of

Events = Iterator[tuple[int, int]]


def loading_events(graph: Graph, ranks: Ranks, together: bool = False) -> Events:
    """What loading allocates and frees, in order. `together`: equal tensors that come and go at once are told as one,
    for thousands of ranks have thousands."""
    numbers = count()
    if ranks.efficient and not ranks.row.flat:
        yield from _one_by_one(graph, ranks, numbers, together)
    else:
        yield from _unit_by_unit(graph, ranks, numbers)
    for held in parameters_of(graph):
        if held.kind == "buffer":
            for _ in range(held.copies):
                yield next(numbers), held.bytes


def _one_by_one(graph: Graph, ranks: Ranks, numbers: Iterator[int], together: bool) -> Events:
    """Every weight as it is sent: whole, cut into parts of which the last are copied to be padded, and the rank's own.
    A weight with several names is sent once for each."""
    _, axes = built(graph)
    for w in in_order(graph):
        if w.group != "buffer":
            yield from _sent(shape_in(w, axes, ranks.storage), kept_dtype(w, ranks), ranks, numbers, together)
    again: list[int] = []
    for w in _named_again(graph):
        sent = list(_sent(shape_in(w, axes, ranks.storage), kept_dtype(w, ranks), ranks, numbers, together))
        yield from sent
        again += [] if ranks.offloads else [_part_of(sent)]
    for number in again:  # all are tied at last
        yield number, 0


def _part_of(events: list[tuple[int, int]]) -> int:
    """The storage that a weight's events leave."""
    gone = {number for number, bytes_ in events if not bytes_}
    return next(number for number, _ in events if number not in gone)


def _sent(shape: tuple[int, ...], dtype: str, ranks: Ranks, numbers: Iterator[int], together: bool) -> Events:
    bytes_ = size(str(prod(shape)), dtype, {})[1]
    mine = size(str(prod(rows_of(shape, ranks.world))), dtype, {})[1]
    each = part(shape[0], ranks.world) if shape else 1
    padded = ranks.world - shape[0] // each if shape else 0
    copies, of_one = (1, padded * mine) if together and padded else (padded, mine)
    whole, *cut = (next(numbers) for _ in range(1 + copies))
    yield whole, bytes_
    for number in cut:
        yield number, of_one
    own = next(numbers)
    yield own, mine
    for number in (*cut, whole):
        yield number, 0
    if ranks.offloads:
        yield own, 0


def _named_again(graph: Graph) -> list[Weight]:
    """The weight of every further name: a head that is the embeddings' table, and encoder and decoder that share it."""
    stack, _ = built(graph)
    before = {w.name: w for ops in outside(stack)[:-1] for op in ops for w in op.weights if w.group != "buffer"}
    after = {w.name for op in (*stack.after, *stack.loss) for w in op.weights}
    tied = [w for name, w in before.items() if name in after]
    return [*tied, *shared_tables(graph), *shared_tables(graph)]


def _unit_by_unit(graph: Graph, ranks: Ranks, numbers: Iterator[int]) -> Events:
    """Every unit whole, then the rank's parts of it; FSDP1 casts those that train at last."""
    units: list[list[Weight]] = []
    places: list[int] = []
    for place, copies, weights in _ordered(graph, ranks):
        units += [weights] * copies
        places += [place] * copies
    there: dict[tuple[int, int], int] = {}
    if ranks.there and any(w.stored for weights in units for w in weights):
        every = [(i, j) for i in sorted(range(len(units)), key=places.__getitem__) for j in range(len(units[i]))]
        for i, j in sorted(every, key=lambda at: units[at[0]][at[1]].group == "adapter"):  # which come last
            found: list[int] = []
            yield from _brought(graph, ranks, units[i][j], numbers, found)
            there[i, j] = found[0]
    widened: list[tuple[int, int]] = []
    for i, weights in enumerate(units):
        alone = [[j] for j, w in enumerate(weights) if w.group == "adapter"] if ranks.row.flat else []
        apart = {j for group in alone for j in group}
        rest = [j for j in range(len(weights)) if j not in apart]
        for group in (*alone, *([rest] if rest else ())):
            whole: list[int] = []
            if there:
                whole = [there[i, j] for j in group]
            else:
                for j in group:
                    yield from _brought(graph, ranks, weights[j], numbers, whole)
            divide = _laid if ranks.row.flat else _cut
            yield from divide(graph, ranks, [weights[j] for j in group], whole, numbers, widened)
    for _, bytes_ in widened:
        yield next(numbers), bytes_
    for number, _ in widened:  # which the parameters' own views have until they are used
        yield number, 0


def _ordered(graph: Graph, ranks: Ranks) -> Iterator[tuple[int, int, list[Weight]]]:
    """Units in the order they are made: blocks, what is outside of them; or that, and then all blocks as one. With
    each, its place in the model and how many such there are."""
    found = list(enumerate(units_of(graph, ranks)))
    yield from ((i, copies, weights) for i, (unit, where, copies, weights) in found if where and unit != REST)
    yield from ((i, copies, weights) for i, (unit, where, copies, weights) in found if not where and unit != REST)
    rest = [w for _, (unit, _, copies, weights) in found if unit == REST for _ in range(copies) for w in weights]
    if rest:
        yield next(i for i, (unit, *_) in found if unit == REST), 1, rest


def _loaded(w: Weight, ranks: Ranks) -> str:
    """The dtype a weight is loaded in: FSDP2's are cast on the host, FSDP1's once they are divided."""
    if w.stored or not ranks.row.flat or w.group == "adapter":
        return kept_dtype(w, ranks)
    return ranks.frozen or w.dtype


def _brought(graph: Graph, ranks: Ranks, w: Weight, numbers: Iterator[int], whole: list[int]) -> Events:
    """One weight on the GPU, its number added to `whole`; a quantised one is there as it was loaded until that is
    done."""
    _, axes = built(graph)
    if not w.stored:
        whole.append(next(numbers))
        yield whole[-1], size(str(prod(shape_in(w, axes, ranks.storage))), _loaded(w, ranks), {})[1]
        return
    loaded, quantises = next(numbers), ranks.there and not graph.recipe.packed
    if quantises:
        yield loaded, size(w.shape, graph.recipe.weights, axes)[1]
    for t in w.stored:
        number = next(numbers)
        yield number, size(t.shape, t.dtype, axes)[1]
        if t.name == "packed":
            whole.append(number)
    if quantises:
        yield loaded, 0


def _laid(
    graph: Graph,
    ranks: Ranks,
    weights: list[Weight],
    whole: list[int],
    numbers: Iterator[int],
    widened: list[tuple[int, int]],
) -> Events:
    """Weights that are laid one after the other, and the rank's part of that; `widened` is what is cast later."""
    _, axes = built(graph)
    first = weights[0]
    dtype = ranks.storage if first.stored else _loaded(first, ranks)
    laid = sum(aligned(prod(shape_in(w, axes, ranks.storage)), dtype) for w in weights)
    flat, mine = next(numbers), next(numbers)
    own = part(laid, ranks.among)
    yield flat, size(str(laid), dtype, {})[1]
    if ranks.whole:  # and that is the rank's
        flat, mine = mine, flat
    else:
        yield mine, size(str(own), dtype, {})[1]
        whole = [flat, *whole]
    for number in whole:
        yield number, 0
    if ranks.offloads:
        yield mine, 0
    elif kept_dtype(first, ranks) != dtype:
        widened.append((mine, size(str(own), kept_dtype(first, ranks), {})[1]))


def _cut(
    graph: Graph,
    ranks: Ranks,
    weights: list[Weight],
    whole: list[int],
    numbers: Iterator[int],
    widened: list[tuple[int, int]],
) -> Events:
    """Weights each of which is divided by itself, and that go when all are."""
    _, axes = built(graph)
    for w in weights:
        mine = next(numbers)
        yield mine, size(str(prod(rows_of(shape_in(w, axes, ranks.storage), ranks.world))), kept_dtype(w, ranks), {})[1]
        if ranks.offloads:
            yield mine, 0
    for number in whole:
        yield number, 0
