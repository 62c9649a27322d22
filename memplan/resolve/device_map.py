"""Where `device_map` puts the modules of a run that runs a model: on which GPU, or on the host.

What is free on a card is what its driver reports less a CUDA context; the host is taken to have room for what is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.overhead import cuda_context
from memplan.catalogue.parallelism.device_map_packing import HOST, place, shares
from memplan.catalogue.parallelism.device_maps import Placed
from memplan.catalogue.parallelism.pipeline import unstageable
from memplan.core.errors import SpecError
from memplan.core.ir import Op, Stack, Weight
from memplan.core.units import ITEMSIZE, gib
from memplan.engine.walk import size
from memplan.program.graph import Graph, built, elements
from memplan.spec.parallelism import Parallelism

_BITSANDBYTES = ("nf4", "fp4", "int8")  # whose layers run on the GPU alone
_BUFFERS = ("gptq-int4", "gptq-int8", "awq-int4")  # whose packed weights are buffers, which no hook offloads


class _Module(NamedTuple):
    """A module that is placed as one: its path, its bytes as transformers counts them, whether it is a layer."""

    path: str
    bytes: int
    layer: bool = False


def placed_on(graph: Graph, p: Parallelism, gpu: GPU | None, largest: bool) -> tuple[Placed, tuple[str, ...]]:
    """Where the modules of a graph that nothing divides are, and what to know of it. `largest`: room is left for the
    largest module without modules, where it is larger than a layer.

    Raises SpecError for models whose modules are not known so, and for a stage that has none.
    """
    stack, axes = built(graph)
    _check(graph, stack)
    stored = graph.recipe.quantization
    modules = list(_modules(stack, graph, axes))
    sizes = [module.bytes for module in modules]
    layers = [i for i, module in enumerate(modules) if module.layer]
    policy = "balanced" if p.device_map in (None, "auto") else p.device_map
    context = cuda_context(gpu.compute_capability).usual if gpu else 0
    free = max(0, gpu.usable - context) if gpu else None
    leaf = max(_leaves(stack, graph, axes)) if largest else 0
    between = slice(layers[0], layers[-1] + 1)
    room = shares(sizes, between, leaf, p.world, policy, free, stored in _BITSANDBYTES)
    on = place(sizes, room, stored not in _BITSANDBYTES)
    if set(on) == {HOST}:
        raise SpecError(
            f"parallelism.device_map: {p.device_map or 'auto'} has no room for a module on {gpu.name if gpu else ''} "
            f"beside its largest, {gib(max(sizes))}, and runs the model on the host",
            "parallelism.device_map",
        )
    numbers = {card: i for i, card in enumerate(sorted({*on} - {HOST}))} | {HOST: HOST}
    on = [numbers[card] for card in on]
    where = {module.path: card for module, card in zip(modules, on, strict=True)}
    first, *_ = on
    if first == HOST:
        raise SpecError(
            "parallelism.device_map: the embeddings do not fit beside the largest layer, and are on the host, which is "
            "not supported yet",
            "parallelism.device_map",
        )
    ends = tuple((path, where.get(path, first)) for path in _ends(stack))
    found = Placed(
        tuple((path, card) for path, card in where.items() if path in _starts(stack)),
        where.get(_ROTARY, on[-1]),
        tuple(on[i] for i in layers),
        ends,
        len(numbers) - 1,
        stays=stored in _BUFFERS,
        embeds=max(on[-1], 0) if graph.model.model_type in _DROPS_LATE else None,
    )
    if p.stage is not None and p.stage >= found.cards:
        raise SpecError(
            f"parallelism.stage: device_map places modules on {found.cards} of {p.world} GPUs; stages are 0 to "
            f"{found.cards - 1}",
            "parallelism.stage",
        )
    return found, tuple(_notes(found, p, room, sizes, on, stored))


def placed_in_sequence(graph: Graph, p: Parallelism) -> tuple[Placed, tuple[str, ...]]:
    """Where LitGPT puts a model's blocks, as many on each GPU and fewer on the last, all else on the first.

    Raises SpecError where a GPU would have none, or another policy is asked for.
    Source: litgpt 0.5.3 generate/sequentially.py sequential.
    """
    if p.device_map not in (None, "sequential"):
        raise SpecError(
            f"parallelism.device_map: LitGPT has no {p.device_map}; it puts blocks on GPUs in sequence: sequential",
            "parallelism.device_map",
        )
    stack, axes = built(graph)
    gpus = max(p.world, p.pp)
    layers = sum(len(run.blocks) * axes[run.times] for run in stack.runs)
    each = -(-layers // gpus)
    if -(-layers // each) != gpus:
        raise SpecError(
            f"parallelism.world: LitGPT puts {each} of {layers} blocks on each of {-(-layers // each)} GPUs, and none "
            f"on the others of {gpus}",
            "parallelism.world",
        )
    starts, ends = (dict.fromkeys(some, 0) for some in (_starts(stack), _ends(stack)))
    placed = Placed(tuple(starts.items()), 0, tuple(i // each for i in range(layers)), tuple(ends.items()), gpus)
    return placed, ("device_map: one process, one GPU at a time",) if gpus > 1 else ()


_ROTARY = "rotary_emb"
# Families whose dropout of the embeddings comes after the layers, where the last GPU has it.
# Source: transformers 5.24 models/phi/modeling_phi.py PhiModel.
_DROPS_LATE = frozenset(("phi",))


def _check(graph: Graph, stack: Stack) -> None:
    model = graph.model
    groups = {w.group for op in (*stack.before, *stack.after) for w in op.weights}
    several = unstageable(stack) or model.is_encoder_decoder or model.objective != "causal_lm"
    if several or not groups.isdisjoint(("vision", "projector", "audio")):
        raise SpecError(
            f"parallelism.device_map: is not supported yet for {model.name or model.model_type}; supported: decoders "
            "of text whose layers share nothing but hidden states",
            "parallelism.device_map",
        )


def _modules(stack: Stack, graph: Graph, axes: Mapping[str, int]) -> Iterator[_Module]:
    """The modules in the order they are placed: before the layers, the layers, what comes after them; tables of
    positions are made by a module that comes with that, and a head of its own is last."""
    starts, ends = _starts(stack), _ends(stack)
    weights = list(_own((*stack.before, *stack.after)))
    there: set[str] = set()

    def bytes_of(path: str) -> int:
        own = {w.name: w for w in weights if _path(w) == path and w.name not in there}
        there.update(own)
        return sum(_counted(w, graph, axes) for w in own.values())

    for path in starts:
        yield _Module(path, bytes_of(path))
    for run in stack.runs:
        sums = [sum(_counted(w, graph, axes) for w in _unique(block.ops)) for block in run.blocks]
        for _ in range(axes[run.times]):
            yield from (_Module(block.name, n, layer=True) for block, n in zip(run.blocks, sums, strict=True))
    tied = {w.name for op in stack.before for w in op.weights}
    *inner, head = ends
    for path in inner:
        yield _Module(path, bytes_of(path))
    turned = [w for op in stack.before if _turns(op) for w in op.weights]
    if turned:
        yield _Module(_ROTARY, sum(_counted(w, graph, axes) for w in turned))
    if not any(w.name in tied for op in stack.after if op.name == head for w in op.weights):
        yield _Module(head, bytes_of(head))


def _starts(stack: Stack) -> tuple[str, ...]:
    """The paths of modules before the layers."""
    return tuple(dict.fromkeys(_path(w) for op in stack.before if not _turns(op) for w in op.weights))


def _ends(stack: Stack) -> tuple[str, ...]:
    """The paths of modules after the layers, the head last; a tied head goes by its own name."""
    tied = {w.name for op in stack.before for w in op.weights}
    found = (op.name if w.name in tied else _path(w) for op in stack.after for w in op.weights)
    return tuple(dict.fromkeys(found))


def _turns(op: Op) -> bool:
    return op.name.startswith("rotary") or ".rotary_emb" in op.name


def _path(w: Weight) -> str:
    return w.name.rpartition(".")[0]


def _own(some: Iterable[Op]) -> Iterator[Weight]:
    for op in some:
        yield from op.weights


def _unique(some: Iterable[Op]) -> Iterable[Weight]:
    return {w.name: w for w in _own(some)}.values()


def _counted(w: Weight, graph: Graph, axes: Mapping[str, int]) -> int:
    """Bytes of a weight as they are counted before it is loaded: of one that bitsandbytes quantises, its numbers. What
    is stored packed is rounded up to 512 bytes a tensor."""
    if w.group == "adapter":
        return 0
    stored = w.stored[:1] if graph.recipe.quantization in _BITSANDBYTES else w.stored
    if stored:
        return sum(size(t.shape, t.dtype, axes)[1] for t in stored)
    return elements(w, axes) * ITEMSIZE[w.dtype or graph.recipe.weights]


def _leaves(stack: Stack, graph: Graph, axes: Mapping[str, int]) -> Iterator[int]:
    """Bytes of every module without modules."""
    some = [(*stack.before, *stack.after), *(block.ops for run in stack.runs for block in run.blocks)]
    for group in some:
        found: dict[str, int] = {}
        for w in _unique(group):
            found[_path(w)] = found.get(_path(w), 0) + _counted(w, graph, axes)
        yield from found.values()


def _notes(
    found: Placed, p: Parallelism, room: list[int | None], sizes: list[int], on: list[int], stored: str
) -> Iterator[str]:
    if p.world > 1:
        shown = ", ".join(str(found.layers.count(card)) for card in range(found.cards))
        host = found.layers.count(HOST)
        yield f"device_map: one process, one GPU at a time; layers on each GPU: {shown}" + (
            f", on the host {host}" if host else ""
        )
    if found.cards < p.world:
        yield f"device_map: modules are on {found.cards} GPUs, and {p.world - found.cards} stay empty"
    moved = sum(n for n, card in zip(sizes, on, strict=True) if card == HOST)
    if moved:
        what = "buffers, which stay on the first GPU" if found.stays else "copied to the first GPU, module by module"
        yield f"device_map: {gib(moved)} of weights are on the host: {what}; the host is taken to have room for them"
    last = room[-1]
    if (
        stored in _BITSANDBYTES
        and last is not None
        and sum(n for n, c in zip(sizes, on, strict=True) if c == max(on)) > last
    ):
        yield (
            "device_map: bitsandbytes runs no layer on the host, and transformers refuses to load what does not fit; "
            "the last GPU is counted as if it took the rest"
        )
