"""Loading a model that FSDP shards, event by event (see `memplan.program.loading.loading`).

FSDP2 with `cpu_ram_efficient_loading` broadcasts each weight whole and then shards it, one after another. Otherwise a
unit's weights are copied from the host together, FSDP1 flattens them, and the rank's parts are copied out; blocks come
first. A quantised model is whole on every GPU before that, except with older versions of transformers.

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
from memplan.program.graph import Graph, operations_of, parameters_of
from memplan.program.loading import in_order
from memplan.program.sharding.ranks import Ranks, kept_dtype, shape_in, shared_tables, units_of

Events = Iterator[tuple[int, int]]


def loading_events(graph: Graph, ranks: Ranks, together: bool = False) -> Events:
    """Yield what loading allocates and frees, in order. With `together`, equal tensors that are allocated and freed at
    once are merged into one event, as thousands of ranks have thousands of them."""
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
    """Yield the events of broadcasting every weight: whole, then padded copies of the last parts, then the rank's part.
    A weight with several names is sent once for each name."""
    _, axes = operations_of(graph)
    for w in in_order(graph):
        if w.group != "buffer":
            yield from _broadcast(shape_in(w, axes, ranks.storage), kept_dtype(w, ranks), ranks, numbers, together)
    duplicates: list[int] = []
    for w in _named_again(graph):
        events = list(_broadcast(shape_in(w, axes, ranks.storage), kept_dtype(w, ranks), ranks, numbers, together))
        yield from events
        duplicates += [] if ranks.offloads else [_remaining_storage(events)]
    for number in duplicates:  # freed when all weights are tied at the end
        yield number, 0


def _remaining_storage(events: list[tuple[int, int]]) -> int:
    """Return the storage that is left alive after a weight's events."""
    freed = {number for number, bytes_ in events if not bytes_}
    return next(number for number, _ in events if number not in freed)


def _broadcast(shape: tuple[int, ...], dtype: str, ranks: Ranks, numbers: Iterator[int], together: bool) -> Events:
    bytes_ = size(str(prod(shape)), dtype, {})[1]
    part_bytes = size(str(prod(rows_of(shape, ranks.world))), dtype, {})[1]
    rows = part(shape[0], ranks.world) if shape else 1
    padded = ranks.world - shape[0] // rows if shape else 0
    copies, copy_bytes = (1, padded * part_bytes) if together and padded else (padded, part_bytes)
    whole, *padded_parts = (next(numbers) for _ in range(1 + copies))
    yield whole, bytes_
    for number in padded_parts:
        yield number, copy_bytes
    local = next(numbers)
    yield local, part_bytes
    for number in (*padded_parts, whole):
        yield number, 0
    if ranks.offloads:
        yield local, 0


def _named_again(graph: Graph) -> list[Weight]:
    """Return a weight for every additional name it has: a tied head, and tables that encoder and decoder share."""
    stack, _ = operations_of(graph)
    before = {w.name: w for ops in outside(stack)[:-1] for op in ops for w in op.weights if w.group != "buffer"}
    after = {w.name for op in (*stack.after, *stack.loss) for w in op.weights}
    tied = [w for name, w in before.items() if name in after]
    return [*tied, *shared_tables(graph), *shared_tables(graph)]


def _unit_by_unit(graph: Graph, ranks: Ranks, numbers: Iterator[int]) -> Events:
    """Yield the events of loading each unit whole and cutting out the rank's parts. FSDP1 casts trained parts last."""
    units: list[list[Weight]] = []
    places: list[int] = []
    for place, copies, weights in _ordered(graph, ranks):
        units += [weights] * copies
        places += [place] * copies
    loaded: dict[tuple[int, int], int] = {}
    if ranks.loads_whole and any(w.stored for weights in units for w in weights):
        indices = [(i, j) for i in sorted(range(len(units)), key=places.__getitem__) for j in range(len(units[i]))]
        for i, j in sorted(indices, key=lambda at: units[at[0]][at[1]].group == "adapter"):  # adapters come last
            storages: list[int] = []
            yield from _load(graph, ranks, units[i][j], numbers, storages)
            loaded[i, j] = storages[0]
    to_cast: list[tuple[int, int]] = []
    for i, weights in enumerate(units):
        adapters = [[j] for j, w in enumerate(weights) if w.group == "adapter"] if ranks.row.flat else []
        nested = {j for group in adapters for j in group}
        rest = [j for j in range(len(weights)) if j not in nested]
        for group in (*adapters, *([rest] if rest else ())):
            whole: list[int] = []
            if loaded:
                whole = [loaded[i, j] for j in group]
            else:
                for j in group:
                    yield from _load(graph, ranks, weights[j], numbers, whole)
            shard = _flatten if ranks.row.flat else _shard_each
            yield from shard(graph, ranks, [weights[j] for j in group], whole, numbers, to_cast)
    for _, bytes_ in to_cast:
        yield next(numbers), bytes_
    for number, _ in to_cast:  # the parameters are views of the uncast parts until they are used
        yield number, 0


def _ordered(graph: Graph, ranks: Ranks) -> Iterator[tuple[int, int, list[Weight]]]:
    """Yield the units in the order they are created, with their place in the model and the number of copies.

    Blocks come before units outside of blocks. If blocks are no units of their own, all of them are one last unit.
    """
    units = list(enumerate(units_of(graph, ranks)))
    yield from ((i, copies, weights) for i, (unit, where, copies, weights) in units if where and unit != REST)
    yield from ((i, copies, weights) for i, (unit, where, copies, weights) in units if not where and unit != REST)
    rest = [w for _, (unit, _, copies, weights) in units if unit == REST for _ in range(copies) for w in weights]
    if rest:
        yield next(i for i, (unit, *_) in units if unit == REST), 1, rest


def _loaded_dtype(w: Weight, ranks: Ranks) -> str:
    """Return the dtype a weight is loaded in. FSDP2's weights are cast on the host, FSDP1's once they are sharded."""
    if w.stored or not ranks.row.flat or w.group == "adapter":
        return kept_dtype(w, ranks)
    return ranks.frozen or w.dtype


def _load(graph: Graph, ranks: Ranks, w: Weight, numbers: Iterator[int], whole: list[int]) -> Events:
    """Load one weight and append its storage to `whole`. A weight to be quantised exists in its loaded dtype until it
    is quantised."""
    _, axes = operations_of(graph)
    if not w.stored:
        whole.append(next(numbers))
        yield whole[-1], size(str(prod(shape_in(w, axes, ranks.storage))), _loaded_dtype(w, ranks), {})[1]
        return
    loaded, quantises = next(numbers), ranks.loads_whole and not graph.recipe.packed
    if quantises:
        yield loaded, size(w.shape, graph.recipe.weights, axes)[1]
    for t in w.stored:
        number = next(numbers)
        yield number, size(t.shape, t.dtype, axes)[1]
        if t.name == "packed":
            whole.append(number)
    if quantises:
        yield loaded, 0


def _flatten(
    graph: Graph,
    ranks: Ranks,
    weights: list[Weight],
    whole: list[int],
    numbers: Iterator[int],
    to_cast: list[tuple[int, int]],
) -> Events:
    """Flatten weights into one tensor and copy out the rank's part. Parts to be cast later are added to `to_cast`."""
    _, axes = operations_of(graph)
    first = weights[0]
    dtype = ranks.storage if first.stored else _loaded_dtype(first, ranks)
    total = sum(aligned(prod(shape_in(w, axes, ranks.storage)), dtype) for w in weights)
    flat, mine = next(numbers), next(numbers)
    local = part(total, ranks.shard_count)
    yield flat, size(str(total), dtype, {})[1]
    if ranks.is_unsharded:  # the rank keeps the whole flat tensor
        flat, mine = mine, flat
    else:
        yield mine, size(str(local), dtype, {})[1]
        whole = [flat, *whole]
    for number in whole:
        yield number, 0
    if ranks.offloads:
        yield mine, 0
    elif kept_dtype(first, ranks) != dtype:
        to_cast.append((mine, size(str(local), kept_dtype(first, ranks), {})[1]))


def _shard_each(
    graph: Graph,
    ranks: Ranks,
    weights: list[Weight],
    whole: list[int],
    numbers: Iterator[int],
    to_cast: list[tuple[int, int]],
) -> Events:
    """Copy out the rank's part of each weight, and free the whole weights when all are sharded."""
    _, axes = operations_of(graph)
    for w in weights:
        mine = next(numbers)
        yield mine, size(str(prod(rows_of(shape_in(w, axes, ranks.storage), ranks.world))), kept_dtype(w, ranks), {})[1]
        if ranks.offloads:
            yield mine, 0
    for number in whole:
        yield number, 0
