"""Where `device_map` places the modules of an inference run: on which GPU, or on the host.

A card's free memory is what its driver reports less a CUDA context. We assume the host has room for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.overhead import cuda_context
from memplan.catalogue.parallelism.device_map_packing import HOST, gpu_shares, place_modules
from memplan.catalogue.parallelism.device_maps import ModulePlacement
from memplan.catalogue.parallelism.pipeline_stages import cannot_be_staged
from memplan.core.errors import refused
from memplan.core.ir import Op, Stack, Weight
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE, gib
from memplan.engine.walk import size
from memplan.program.graph import Graph, operations_of
from memplan.program.weight_sizes import elements
from memplan.spec.parallelism import Parallelism

_BITSANDBYTES = ("nf4", "fp4", "int8")  # layers in these formats only run on a GPU
_BUFFERS = ("gptq-int4", "gptq-int8", "awq-int4")  # packed weights are buffers, which hooks never offload


class _Module(NamedTuple):
    """A module that is placed as a unit.

    path      its name in the model
    bytes     its size as transformers counts it
    is_layer  whether it is a transformer layer
    """

    path: str
    bytes: int
    is_layer: bool = False


@lru_cache(maxsize=256)
def place_on_devices(
    graph: Graph, p: Parallelism, gpu: GPU | None, largest: bool
) -> tuple[ModulePlacement, tuple[str, ...]]:
    """Return where the modules of an undivided graph are placed, and notes on it.

    `largest`: also keep room for the largest leaf module, if it is larger than a layer.
    Raises SpecError for models whose modules memplan cannot place, and for a stage without modules.
    """
    stack, axes = operations_of(graph)
    _check(graph, stack)
    stored = graph.recipe.quantization
    modules = list(_modules(stack, graph, axes))
    sizes = [module.bytes for module in modules]
    layers = [i for i, module in enumerate(modules) if module.is_layer]
    policy = "balanced" if p.device_map in (None, "auto") else p.device_map
    context = cuda_context(gpu.compute_capability).usual if gpu else 0
    free = max(0, gpu.usable - context) if gpu else None
    largest_leaf = max(_leaves(stack, graph, axes)) if largest else 0
    span = slice(layers[0], layers[-1] + 1)
    room = gpu_shares(sizes, span, largest_leaf, p.world, policy, free, stored in _BITSANDBYTES)
    on = place_modules(sizes, room, stored not in _BITSANDBYTES)
    if set(on) == {HOST}:
        raise refused(
            "parallelism.device_map",
            f"{p.device_map or 'auto'} keeps {gib(max(sizes))} free for the largest module, which leaves "
            f"{gpu.name if gpu else 'the GPU'} no room for any, and runs the model on the host",
        )
    numbers = {card: i for i, card in enumerate(sorted({*on} - {HOST}))} | {HOST: HOST}
    on = [numbers[card] for card in on]
    card_of = {module.path: card for module, card in zip(modules, on, strict=True)}
    first, *_ = on
    if first == HOST:
        raise refused(
            "parallelism.device_map",
            "the GPU has no room for both the embeddings and the largest layer; embeddings on the host are not "
            "supported yet",
        )
    ends = tuple((path, card_of.get(path, first)) for path in _ends(stack))
    placed = ModulePlacement(
        tuple((path, card) for path, card in card_of.items() if path in _starts(stack)),
        card_of.get(_ROTARY, on[-1]),
        tuple(on[i] for i in layers),
        ends,
        len(numbers) - 1,
        stays=stored in _BUFFERS,
        embeds=max(on[-1], 0) if graph.model.family.training.late_dropout else None,
    )
    if p.stage is not None and p.stage >= placed.cards:
        raise refused(
            "parallelism.stage",
            f"device_map only uses {placed.cards} of {p.world} GPUs; choose a stage from 0 to {placed.cards - 1}",
        )
    return placed, tuple(_notes(placed, p, room, sizes, on, stored))


def place_litgpt_blocks(graph: Graph, p: Parallelism) -> tuple[ModulePlacement, tuple[str, ...]]:
    """Return where LitGPT places a model's blocks, and notes on it.

    Each GPU gets the same number of blocks, the last one the remainder, and the first one everything else.
    Raises SpecError if a GPU would get none, or for another policy.
    Source: litgpt 0.5.3 generate/sequentially.py sequential.
    """
    if p.device_map not in (None, "sequential"):
        raise refused("parallelism.device_map", f"LitGPT does not support {p.device_map}; use sequential")
    stack, axes = operations_of(graph)
    gpus = max(p.world, p.pp)
    layers = sum(len(run.blocks) * axes[run.times] for run in stack.runs)
    per_gpu = -(-layers // gpus)
    used = -(-layers // per_gpu)
    if used != gpus:
        raise refused(
            "parallelism.world",
            f"LitGPT places {per_gpu} of {layers} blocks per GPU, which leaves {gpus - used} of {gpus} GPUs empty; "
            f"use {used}",
        )
    starts, ends = (dict.fromkeys(some, 0) for some in (_starts(stack), _ends(stack)))
    placed = ModulePlacement(
        tuple(starts.items()), 0, tuple(i // per_gpu for i in range(layers)), tuple(ends.items()), gpus
    )
    return placed, ("device_map: one process, one GPU at a time",) if gpus > 1 else ()


_ROTARY = "rotary_emb"


def _check(graph: Graph, stack: Stack) -> None:
    model = graph.model
    groups = {w.group for op in (*stack.before, *stack.after) for w in op.weights}
    is_unsupported = cannot_be_staged(stack) or model.is_encoder_decoder or model.objective != "causal_lm"
    if is_unsupported or not groups.isdisjoint(("vision", "projector", "audio")):
        raise refused(
            "parallelism.device_map",
            f"is not supported yet for {model.name or model.model_type}; supported: text decoders whose layers share "
            "only hidden states",
        )


def _modules(stack: Stack, graph: Graph, axes: Mapping[str, int]) -> Iterator[_Module]:
    """Yield the modules in placement order: those before the layers, the layers, those after, an untied head.

    Position tables belong to a module that comes after the layers.
    """
    starts, ends = _starts(stack), _ends(stack)
    weights = list(_weights((*stack.before, *stack.after)))
    seen: set[str] = set()

    def bytes_of(path: str) -> int:
        members = {w.name: w for w in weights if _path(w) == path and w.name not in seen}
        seen.update(members)
        return sum(_loaded_bytes(w, graph, axes) for w in members.values())

    for path in starts:
        yield _Module(path, bytes_of(path))
    for run in stack.runs:
        sums = [sum(_loaded_bytes(w, graph, axes) for w in _unique(block.ops)) for block in run.blocks]
        for _ in range(axes[run.times]):
            yield from (_Module(block.name, n, is_layer=True) for block, n in zip(run.blocks, sums, strict=True))
    tied = {w.name for op in stack.before for w in op.weights}
    *inner, head = ends
    for path in inner:
        yield _Module(path, bytes_of(path))
    rotary = [w for op in stack.before if _is_rotary(op) for w in op.weights]
    if rotary:
        yield _Module(_ROTARY, sum(_loaded_bytes(w, graph, axes) for w in rotary))
    if not any(w.name in tied for op in stack.after if op.name == head for w in op.weights):
        yield _Module(head, bytes_of(head))


def _starts(stack: Stack) -> tuple[str, ...]:
    """Return the paths of the modules before the layers."""
    return tuple(dict.fromkeys(_path(w) for op in stack.before if not _is_rotary(op) for w in op.weights))


def _ends(stack: Stack) -> tuple[str, ...]:
    """Return the paths of the modules after the layers, the head last. A tied head has its own name."""
    tied = {w.name for op in stack.before for w in op.weights}
    names = (op.name if w.name in tied else _path(w) for op in stack.after for w in op.weights)
    return tuple(dict.fromkeys(names))


def _is_rotary(op: Op) -> bool:
    return op.name.startswith("rotary") or ".rotary_emb" in op.name


def _path(w: Weight) -> str:
    return w.name.rpartition(".")[0]


def _weights(ops: Iterable[Op]) -> Iterator[Weight]:
    for op in ops:
        yield from op.weights


def _unique(ops: Iterable[Op]) -> Iterable[Weight]:
    return {w.name: w for w in _weights(ops)}.values()


def _loaded_bytes(w: Weight, graph: Graph, axes: Mapping[str, int]) -> int:
    """Return a weight's bytes as transformers counts them before loading.

    For weights that bitsandbytes quantises, the packed numbers without their scales. Packed tensors are rounded up to
    512 bytes.
    """
    if w.group == "adapter":
        return 0
    stored = w.stored[:1] if graph.recipe.quantization in _BITSANDBYTES else w.stored
    if stored:
        return sum(size(t.shape, t.dtype, axes)[1] for t in stored)
    return elements(w, axes) * ITEMSIZE[w.dtype or graph.recipe.weights]


def _leaves(stack: Stack, graph: Graph, axes: Mapping[str, int]) -> Iterator[int]:
    """Yield the bytes of every leaf module."""
    groups = [(*stack.before, *stack.after), *(block.ops for run in stack.runs for block in run.blocks)]
    for group in groups:
        totals: dict[str, int] = {}
        for w in _unique(group):
            totals[_path(w)] = totals.get(_path(w), 0) + _loaded_bytes(w, graph, axes)
        yield from totals.values()


def _notes(
    placed: ModulePlacement, p: Parallelism, room: list[int | None], sizes: list[int], on: list[int], stored: str
) -> Iterator[str]:
    if p.world > 1:
        shown = ", ".join(str(placed.layers.count(card)) for card in range(placed.cards))
        host = placed.layers.count(HOST)
        yield f"device_map: one process, one GPU at a time; layers per GPU: {shown}" + (
            f"; on the host: {host}" if host else ""
        )
    if placed.cards < p.world:
        yield f"device_map: modules are placed on {placed.cards} GPUs; {p.world - placed.cards} stay empty"
    moved = sum(n for n, card in zip(sizes, on, strict=True) if card == HOST)
    if moved:
        what = "buffers, which stay on the first GPU" if placed.stays else "copied to the first GPU, module by module"
        yield f"device_map: {gib(moved)} of weights are on the host: {what}; the host is assumed to have room for them"
    last = room[-1]
    if (
        stored in _BITSANDBYTES
        and last is not None
        and sum(n for n, c in zip(sizes, on, strict=True) if c == max(on)) > last
    ):
        yield (
            "device_map: bitsandbytes layers cannot run on the host, so transformers refuses to load this model; "
            "counted as if the last GPU took the rest"
        )
