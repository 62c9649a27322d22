"""Loading a model that FSDP shards, event by event (see `memplan.program.loading`).

FSDP2 with `cpu_ram_efficient_loading` broadcasts each weight whole and then shards it, one after another; the scales of
a quantised one stay whole. Otherwise a
unit's weights are copied from the host together, FSDP1 flattens them, and the rank's parts are copied out; blocks come
first. A quantised model is whole on every GPU before that, except with older versions of transformers, and so is any
model that the framework itself has moved there.

Source: accelerate 1.15 utils/fsdp_utils.py fsdp2_prepare_model, fsdp2_load_full_state_dict, accelerator.py
prepare_model; torch 2.13 distributed/fsdp/_init_utils.py, _flat_param.py, _fully_shard/_fsdp_param.py,
distributed/tensor/placement_types.py Shard._shard_tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod

from memplan.catalogue.parallelism.sharding import aligned, part, rows_of
from memplan.core.ir import Weight, outside
from memplan.engine.gather import REST
from memplan.program.graph import Graph, operations_of, parameters_of
from memplan.program.loading import LoadingTape, in_order
from memplan.program.sharding.fsdp_units import units_of
from memplan.program.sharding.ranks import PACKED, Ranks, kept_dtype, sent_dtype, shape_in
from memplan.program.stack_facts import shared_tables


def loading_events(graph: Graph, ranks: Ranks, together: bool = False) -> tuple[tuple[int, int], ...]:
    """Return what loading allocates and frees, in order. With `together`, equal tensors that are allocated and freed at
    once are merged into one event, as thousands of ranks have thousands of them."""
    events, has_merged = _loaded(graph, ranks, together=True)  # which the peak takes, too, so they are there
    return events if together or not has_merged else _loaded(graph, ranks, together=False)[0]


@lru_cache(maxsize=4)
def _loaded(graph: Graph, ranks: Ranks, together: bool) -> tuple[tuple[tuple[int, int], ...], bool]:
    """Return what loading allocates and frees, and whether events are merged."""
    loader = _Loader(graph, ranks)
    if ranks.efficient and not ranks.row.flat:
        loader.load_one_by_one(together)
    else:
        loader.load_unit_by_unit()
    for held in parameters_of(graph):
        if held.kind == "buffer":
            for _ in range(held.copies):
                loader.tape.alloc_bytes(held.bytes)
    return tuple(loader.tape.events), loader.has_merged


class _Loader:
    """Records how a rank loads its parts of a model."""

    def __init__(self, graph: Graph, ranks: Ranks) -> None:
        self.graph, self.ranks = graph, ranks
        self.stack, self.axes = operations_of(graph)  # the stack keeps the weights, whose ids are keys
        self.tape = LoadingTape(self.axes)
        self._messages: dict[int, list[int]] = {}  # by the weight's id: layers have the same weights
        self.has_merged = False
        self.to_cast: list[tuple[Weight, int, int, str]] = []  # the rank's parts that are cast last

    def _shape(self, w: Weight) -> tuple[int, ...]:
        return shape_in(w, self.axes, self.ranks.storage)

    def load_one_by_one(self, together: bool) -> None:
        """Broadcast every weight: whole, then padded copies of the last parts, then the rank's part. A weight with
        several names is sent once for each name; its further copies are freed when all weights are tied at the end."""
        for w in in_order(self.graph):
            if w.group != "buffer":
                self._broadcast(w, together)
        again = [self._broadcast(w, together) for w in self._named_again()]
        if not self.ranks.offloads:
            self.tape.free(*again)
        self._cast()

    def _broadcast(self, w: Weight, together: bool) -> int:
        """Broadcast a weight, then its scales if it is quantised, and return the storage of the rank's part."""
        if id(w) not in self._messages:
            self._messages[id(w)] = self._message(w, together)
        whole, *copies, local = self.tape.alloc_each(self._messages[id(w)])
        self.tape.free(*copies, whole)
        if self.ranks.offloads:
            self.tape.free(local)
        for t in w.stored:
            if t.name not in PACKED:
                self.tape.alloc(t.shape, t.dtype)
        self._cast_last(w, local)
        return local

    def _message(self, w: Weight, together: bool) -> list[int]:
        """Return the bytes that broadcasting a weight allocates: the weight, padded copies of the last parts, the
        rank's part."""
        world, shape, dtype = self.ranks.world, self._shape(w), self._divided_dtype(w)
        own = self.tape.bytes_of(prod(rows_of(shape, world)), dtype)
        padded = world - shape[0] // part(shape[0], world) if shape else 0
        self.has_merged = self.has_merged or (together and padded > 1)
        copies = [padded * own] if together and padded else [own] * padded
        return [self.tape.bytes_of(prod(shape), dtype), *copies, own]

    def _named_again(self) -> list[Weight]:
        """Return a weight for every additional name it has: a tied head, and tables that encoder and decoder share."""
        stack = self.stack
        before = {w.name: w for ops in outside(stack)[:-1] for op in ops for w in op.weights if w.group != "buffer"}
        after = {w.name for op in (*stack.after, *stack.loss) for w in op.weights}
        tied = [w for name, w in before.items() if name in after]
        return [*tied, *shared_tables(self.graph), *shared_tables(self.graph)]

    def load_unit_by_unit(self) -> None:
        """Load each unit whole and cut out the rank's parts. FSDP1 casts trained parts last."""
        units: list[list[Weight]] = []
        places: list[int] = []
        for place, copies, weights in self._ordered():
            units += [weights] * copies
            places += [place] * copies
        loaded: dict[tuple[int, int], list[int]] = {}
        quantised = self.ranks.loads_whole and any(w.stored for weights in units for w in weights)
        if quantised or self.ranks.moves_whole:
            indices = [(i, j) for i in sorted(range(len(units)), key=places.__getitem__) for j in range(len(units[i]))]
            for i, j in sorted(indices, key=lambda at: units[at[0]][at[1]].group == "adapter"):  # adapters come last
                loaded[i, j] = self._load(units[i][j])
        shard = self._flatten if self.ranks.row.flat else self._shard_each
        for i, weights in enumerate(units):
            adapters = [[j] for j, w in enumerate(weights) if w.group == "adapter"] if self.ranks.row.flat else []
            rest = [j for j in range(len(weights)) if [j] not in adapters]
            for group in (*adapters, *([rest] if rest else ())):
                whole = [n for j in group for n in (loaded[i, j] if loaded else self._load(weights[j]))]
                shard([weights[j] for j in group], whole)
        self._cast()

    def _cast(self) -> None:
        """Cast the parts that are cast last. FSDP1's stay until all are cast, as until used the parameters are views of
        them; FSDP2's until those of their unit are, and the root is the last unit."""
        in_blocks = {id(w) for run in self.stack.runs for block in run.blocks for op in block.ops for w in op.weights}
        stay: list[int] = []
        for w, number, numbers, dtype in self.to_cast:
            self.tape.alloc(numbers, dtype)
            if self.ranks.row.flat or id(w) not in in_blocks:
                stay.append(number)
            else:
                self.tape.free(number)
        self.tape.free(*stay)

    def _ordered(self) -> Iterator[tuple[int, int, list[Weight]]]:
        """Yield the units in the order they are created, with their place in the model and the number of copies.

        Blocks come before units outside of blocks. If blocks are no units of their own, all of them are one last unit.
        """
        units = list(enumerate(units_of(self.graph, self.ranks)))
        yield from ((i, copies, weights) for i, (unit, where, copies, weights) in units if where and unit != REST)
        yield from ((i, copies, weights) for i, (unit, where, copies, weights) in units if not where and unit != REST)
        rest = [w for _, (unit, _, copies, weights) in units if unit == REST for _ in range(copies) for w in weights]
        if rest:
            yield next(i for i, (unit, *_) in units if unit == REST), 1, rest

    def _loaded_dtype(self, w: Weight) -> str:
        """Return the dtype a weight is loaded in. FSDP2's weights are cast on the host unless they are cast last,
        FSDP1's once they are sharded."""
        if self.ranks.moves_whole and not w.stored and self.graph.recipe.autocast:
            return self.graph.recipe.compute
        if w.stored or not self.ranks.row.flat or w.group == "adapter":
            return self._divided_dtype(w)
        return self.ranks.frozen or w.dtype

    def _divided_dtype(self, w: Weight) -> str:
        """Return the dtype in which FSDP2 divides a weight."""
        return w.dtype if self.ranks.casts_last and not w.stored else kept_dtype(w, self.ranks)

    def _cast_last(self, w: Weight, local: int) -> None:
        """Note that the rank's part of a weight is cast last, if it is."""
        kept = kept_dtype(w, self.ranks)
        if kept != self._divided_dtype(w) and not self.ranks.offloads:
            self.to_cast.append((w, local, prod(rows_of(self._shape(w), self.ranks.world)), kept))

    def _load(self, w: Weight) -> list[int]:
        """Load one weight and return the storages of its parameters. A weight to be quantised exists in its loaded
        dtype until it is quantised."""
        if not w.stored:
            return [self.tape.alloc(prod(self._shape(w)), self._loaded_dtype(w))]
        recipe, whole = self.graph.recipe, list[int]()
        quantises = self.ranks.loads_whole and not recipe.packed
        loaded = [self.tape.alloc(w.shape, recipe.weights)] if quantises else []
        for t in w.stored:
            number = self.tape.alloc(t.shape, t.dtype)
            whole += [number] if t.name in PACKED else []
        self.tape.free(*loaded)
        return whole

    def _flatten(self, weights: list[Weight], whole: list[int]) -> None:
        """Flatten weights into one tensor and copy out the rank's part."""
        first, tape = weights[0], self.tape
        dtype = sent_dtype(first, self.ranks.storage) if first.stored else self._loaded_dtype(first)
        kept = kept_dtype(first, self.ranks)
        total = sum(aligned(prod(self._shape(w)), dtype) for w in weights)
        local = part(total, self.ranks.shard_count)
        flat = mine = tape.alloc(total, dtype)
        if not self.ranks.is_unsharded:  # else the rank keeps the whole flat tensor
            mine = tape.alloc(local, dtype)
            tape.free(flat)
        tape.free(*whole)
        if self.ranks.offloads:
            tape.free(mine)
        elif kept != dtype:
            self.to_cast.append((first, mine, local, kept))

    def _shard_each(self, weights: list[Weight], whole: list[int]) -> None:
        """Copy out the rank's part of each weight, and free the whole weights when all are sharded."""
        for w in weights:
            mine = self.tape.alloc(prod(rows_of(self._shape(w), self.ranks.world)), self._divided_dtype(w))
            if self.ranks.offloads:
                self.tape.free(mine)
            self._cast_last(w, mine)
        self.tape.free(*whole)
