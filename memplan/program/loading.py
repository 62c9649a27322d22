"""Loading a model: the allocations of every weight that is read, converted or quantised, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain

from memplan.catalogue.methods.methods import AXOLOTLS_EMBEDDINGS, inside
from memplan.catalogue.quantization.inference_formats import LoadStep, is_freed, laying, quantising, unpacking
from memplan.catalogue.quantization.quantization import codes_of_scales
from memplan.catalogue.quantization.storage import parts_of
from memplan.core.ir import Op, Tensor, Weight
from memplan.engine.walk import size
from memplan.program.graph import NO_AXES, Graph, operations_of, parameters_of, total_bytes, weights_of
from memplan.program.weight_sizes import dims_of, elements

EMPTIED = -1  # in place of a storage's number: torch.cuda.empty_cache()


class LoadingTape:
    """The allocations and frees of loading, in order.

    events  a storage's number with its bytes, or with 0 when it is freed
    """

    def __init__(self, axes: Mapping[str, int] = NO_AXES) -> None:
        self.events: list[tuple[int, int]] = []
        self._axes = axes
        self._sizes: dict[tuple[str | int, str], int] = {}
        self._storages = 0

    def enter(self, axes: Mapping[str, int]) -> None:
        """Begin a model with these axes."""
        self._axes, self._sizes = axes, {}

    def alloc(self, shape: str | int, dtype: str) -> int:
        """Allocate a tensor of a shape, or of a number of elements. Return the number of its storage."""
        bytes_, number = self._sizes.get((shape, dtype)), self._storages  # a model has thousands of weights
        self.events.append((number, self.bytes_of(shape, dtype) if bytes_ is None else bytes_))
        self._storages = number + 1
        return number

    def bytes_of(self, shape: str | int, dtype: str) -> int:
        """Return the rounded bytes of a tensor."""
        key = shape, dtype
        bytes_ = self._sizes.get(key)
        if bytes_ is None:
            bytes_ = self._sizes[key] = size(str(shape), dtype, self._axes)[1]
        return bytes_

    def alloc_bytes(self, bytes_: int) -> int:
        """Allocate a storage of rounded bytes, and return its number."""
        number = self._storages
        self.events.append((number, bytes_))
        self._storages = number + 1
        return number

    def alloc_each(self, sizes: Sequence[int]) -> range:
        """Allocate storages of rounded bytes, and return their numbers."""
        numbers = range(self._storages, self._storages + len(sizes))
        self.events += zip(numbers, sizes, strict=True)
        self._storages = numbers.stop
        return numbers

    def free(self, *numbers: int) -> None:
        for number in numbers:
            self.events.append((number, 0))

    def empty_cache(self) -> None:
        self.events.append((EMPTIED, 0))

    def alive(self) -> list[int]:
        """Return the storages that are alive, in the order they were allocated."""
        bytes_of = dict(self.events)
        return [number for number, bytes_ in bytes_of.items() if bytes_]


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
            if live > most:  # noqa: PLR1730 (a model has thousands of weights)
                most = live
        elif number != EMPTIED:
            live -= alive.pop(number, 0)
    return most


def loading_peak(*graphs: Graph) -> int:
    """Return the peak bytes while models are loaded, one after another."""
    if any(map(_changes_weights, graphs)):
        return most_at_once(loading(*graphs))
    return sum(total_bytes(parameters_of(graph)) for graph in graphs)


def _changes_weights(graph: Graph) -> bool:
    """Whether weights are loaded otherwise than they stay, so that loading takes more than they do."""
    recipe = graph.recipe
    if graph.inference is not None or recipe.preparation or recipe.decomposition:
        return True
    base = (w for w, _, _ in weights_of(graph) if w.group not in ("adapter", "buffer"))
    return any(w.stored or w.kernel or w.dtype != recipe.weights for w in base)


@lru_cache(maxsize=4)
def loading(*graphs: Graph) -> tuple[tuple[int, int], ...]:
    """Return what loading models, one after another, allocates and frees, in order (see `LoadingTape`)."""
    tape = LoadingTape()
    for graph in graphs:
        tape.enter(operations_of(graph)[1])
        load(graph, tape)
    return tuple(tape.events)


def load(graph: Graph, tape: LoadingTape) -> dict[int, Weight]:  # noqa: PLR0912 (a branch for each way to load)
    """Record how a model is loaded, and return its unquantised weights by their final storage.

    A weight to be quantised exists in its loaded dtype until it is quantised, unless the checkpoint has it packed. A
    weight to be cast exists in its loaded dtype until all weights are loaded; TRL's and Axolotl's preparation cast some
    weights twice. Adapters come last. Weights that a library of its own quantises or unpacks are loaded in the order of
    their names, and those unpacked by the first call of the model come after all others. If the checkpoint has a head
    although it is tied to the embeddings, both exist to the end.
    """
    stack, axes = operations_of(graph)
    loaded, how = graph.recipe.weights, graph.recipe.running
    weights = list(in_order(graph, by_name=how is not None))
    if graph.placed is not None:  # weights on other GPUs have no bytes here
        weights = [w for w in weights if size(w.shape, loaded, axes)[1]]
    adapters = [w for w in weights if w.group == "adapter"]
    unpacked_later: dict[int, list[list[int]]] = {}  # by the first call of the model: quantised numbers by weight
    unquantised: dict[int, Weight] = {}
    wide: dict[int, Weight] = {}
    _alloc(tape, () if graph.recipe.packed else codes_of_scales(weights))
    for w in weights:
        if w.group == "adapter":
            continue
        if w.kernel and how is not None and how.whole:
            codes: list[int] = []
            for part in parts_of(w, how.of(w)):
                number = tape.alloc(part.shape, part.dtype)
                codes += [number] if is_freed(part, w, how) else []
            if w.stacked or how.at_once:
                _record(tape, unpacking(w, how), codes)
            else:
                unpacked_later.setdefault(id(w), []).append(codes)
        elif w.kernel and how is not None and how.lays:
            codes = _alloc(tape, w.stored)
            _record(tape, laying(w, how), codes[:1])
        elif w.stored and graph.recipe.packed:
            _alloc(tape, w.stored)
        elif w.group == "buffer":
            tape.alloc(w.shape, w.dtype)
        else:
            is_wide = bool(graph.recipe.wide) and inside(w.name, graph.recipe.wide)
            first = tape.alloc(w.shape, w.dtype if is_wide else loaded)
            if w.kernel and how is not None:
                _alloc(tape, w.stored[1:])  # scales come first
                _record(tape, quantising(w, how), (), w.stored[:1])
                tape.free(first)
            elif w.stored:
                _alloc(tape, w.stored)
                tape.free(first)
            else:
                (wide if is_wide else unquantised)[first] = w
    left: dict[int, Weight] = {}
    if graph.recipe.preparation:
        if graph.recipe.preparation == "axolotl":
            left = {n: w for n, w in unquantised.items() if any(name in w.name for name in AXOLOTLS_EMBEDDINGS)}
        cast = {number: w for number, w in unquantised.items() if number not in left}
        unquantised = _cast(tape, cast, loaded, "fp32")
        loaded = "fp32"
    unquantised = {**left, **wide, **_cast(tape, unquantised, loaded)}
    if unpacked_later and how is not None:  # layer by layer
        for w in in_order(graph):
            if id(w) in unpacked_later:
                _record(tape, unpacking(w, how), unpacked_later[id(w)].pop(0))
    unquantised |= _decomposed(graph, tape, adapters) if graph.recipe.decomposition else _adapters(tape, adapters)
    if graph.inference is not None and graph.inference.loaded.stores_head:
        for w in (w for op in stack.after for w in op.weights if w.group == "embedding"):  # tied to the embeddings
            tape.free(tape.alloc(w.shape, graph.recipe.weights))
    return unquantised


def _adapters(tape: LoadingTape, adapters: Iterable[Weight], dtype: str = "") -> dict[int, Weight]:
    return {tape.alloc(w.shape, dtype or w.dtype): w for w in adapters}


def _decomposed(graph: Graph, tape: LoadingTape, adapters: Iterable[Weight]) -> dict[int, Weight]:
    """Record how peft initialises LoRA from a decomposition of each matrix, in fp32, and return the adapters.

    They have the dtype of the model until all layers are adapted. CorDA's pass over data leaves factors of all layers.
    Source: peft 0.21.2 tuners/lora/layer.py pissa_init, olora_init, corda_init, update_layer.
    """
    loaded, axes, how = graph.recipe.weights, operations_of(graph)[1], graph.recipe.decomposition
    out: dict[int, Weight] = {}
    layer: list[Weight] = []
    factors = [*_adapters(tape, adapters, "fp32")] if how == "corda" else []
    ends = [w for w in adapters if w.name.endswith("lora_B.weight")]
    values = [tape.alloc(dims_of(w, axes)[-1], "fp32") for w in (ends if factors else ())]
    for w in adapters:
        layer.append(w)
        if w.name.endswith("lora_B.weight"):
            tape.free(*_adapters(tape, layer, loaded))
            a, b = (elements(half, axes) for half in layer[-2:])
            rank = dims_of(w, axes)[-1]
            rows, columns = b // rank, a // rank
            full, kept = rows * columns, min(rows, columns)
            made = {
                "olora": (rows * kept, kept * columns, b),
                "pissa": (rows * kept, kept, kept * columns, full),
                "corda": (full,),
            }
            parts = [a, b, full, *made.get(how, (b, rank, a, full))]
            matrix = [full] if loaded != "fp32" else []
            tape.free(*[tape.alloc(number, "fp32") for number in (*matrix, *parts)])
            tape.free(*factors[: len(layer)], *values[:1])
            factors, values = factors[len(layer) :], values[1:]
            out |= _adapters(tape, layer, loaded)
            layer = []
    return _cast(tape, out | _adapters(tape, layer, loaded), loaded)


def _alloc(tape: LoadingTape, tensors: Iterable[Tensor]) -> list[int]:
    return [tape.alloc(t.shape, t.dtype) for t in tensors]


def _cast(tape: LoadingTape, weights: dict[int, Weight], loaded: str, dtype: str = "") -> dict[int, Weight]:
    """Cast each weight to `dtype`, by default to its final one, and return the weights by their new storage."""
    out: dict[int, Weight] = {}
    if {dtype or w.dtype for w in weights.values()} == {loaded}:
        return weights
    for number, w in weights.items():
        to = dtype or w.dtype
        if to == loaded:
            out[number] = w
        else:
            out[tape.alloc(w.shape, to)] = w
            tape.free(number)
    return out


def _record(
    tape: LoadingTape, steps: Iterable[LoadStep], codes: Sequence[int] = (), parts: Sequence[Tensor] = ()
) -> None:
    """Record allocations and frees while a matrix is unpacked or quantised. `codes` are the storages of its quantised
    numbers, alive before; `parts` are the tensors that quantising makes of it."""
    alive: dict[str, int] = {}
    for step in steps:
        if step.made is None and step.name == "codes":
            tape.free(*codes)
        elif step.made is None:
            tape.free(alive.pop(step.name))
        else:
            for t in parts if step.name == "codes" else (step.made,):
                alive[step.name] = tape.alloc(t.shape, t.dtype)


def in_order(graph: Graph, by_name: bool = False) -> Iterator[Weight]:
    """Yield every weight once: before the layers, layer by layer, after them. With `by_name`, in the order in which
    transformers 5.24 sorts names: core_model_loading.py dot_natural_key."""
    if not by_name:
        return chain.from_iterable(weights for _, weights in _by_block(graph))
    paths = ((block, w) for block, weights in _by_block(graph) for w in weights)
    return (w for _, w in sorted(paths, key=_natural_key))


def _natural_key(weight: tuple[str, Weight]) -> tuple[tuple[int, str], ...]:
    """Return a weight's path split at dots, in which numbers sort numerically."""
    block, w = weight
    name = f"{w.name}_blocks" if block and w.stacked else w.name  # gpt-oss' files have them after their biases
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in f"{block}{name}".split("."))


def _by_block(graph: Graph) -> Iterator[tuple[str, list[Weight]]]:
    """Yield every block's path and weights, each weight once."""
    stack, axes = operations_of(graph)
    outside: set[str] = set()
    number: dict[str, int] = {}
    yield "", list(_weights(stack.before, outside))
    for run in stack.runs:
        yield "", list(_weights(run.before, outside))
        blocks = [(block.name, list(_weights(block.ops, set()))) for block in run.blocks]
        for _ in range(axes[run.times]):
            for name, weights in blocks:
                number[name] = number.get(name, -1) + 1
                yield f"{name}.{number[name]}.", weights
    yield "", list(_weights((*stack.after, *stack.loss), outside))


def _weights(ops: Iterable[Op], seen: set[str]) -> Iterator[Weight]:
    for op in ops:
        for w in op.weights:
            if w.name not in seen:
                seen.add(w.name)
                yield w
