"""A model spread by `device_map` over several GPUs of one process, with some modules possibly kept on the host.

All GPUs share one timeline: every tensor gets the axis of its GPU, which is 1 for the GPU being estimated and 0 for
the others. A module's inputs are copied to its GPU when it is called and live until it returns; a layer's cache stays
with the layer; the model's output is copied to the first GPU. A module with its weights in host memory runs on the
first GPU, which holds a copy of the weights during the call.

Source: transformers 5.24 integrations/accelerate.py get_balanced_memory, infer_auto_device_map; accelerate 1.15
big_modeling.py dispatch_model, hooks.py AlignDevicesHook, attach_align_device_hook_on_blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from memplan.catalogue.kernels import ops
from memplan.catalogue.parallelism.device_map_packing import HOST
from memplan.catalogue.parallelism.pipeline_stages import layer_runs
from memplan.core.ir import Block, Op, Run, Stack, Tensor, Weight
from memplan.core.records import NamedTuple

_HOOKS = "accelerate 1.15 hooks.py AlignDevicesHook"


class ModulePlacement(NamedTuple):
    """The device of every module: the number of a GPU, counted from 0, or `HOST`.

    before  devices of the modules before the layers, by path
    rotary  device of the rotary embedding
    layers  device of each layer
    after   devices of the modules after the layers, by path
    cards   number of GPUs
    card    the GPU being estimated, or the host
    stays   host modules keep their weights, which are buffers, on the first GPU
    embeds  device to which a module without weights moves the embeddings before the first layer, if any
    """

    before: tuple[tuple[str, int], ...]
    rotary: int
    layers: tuple[int, ...]
    after: tuple[tuple[str, int], ...]
    cards: int = 1
    card: int = 0
    stays: bool = False
    embeds: int | None = None

    @property
    def used(self) -> tuple[int, ...]:
        """The GPUs that any module is on, in order."""
        devices = {self.rotary, *self.layers, *(card for _, card in (*self.before, *self.after))}
        return tuple(sorted(card for card in devices if card != HOST))


def axis_of(card: int) -> str:
    """The axis of tensors on a GPU, or on the host."""
    return "@host" if card == HOST else f"@{card}"


def axes_of(placed: ModulePlacement) -> dict[str, int]:
    """The size of every device's axis: 1 for the device being estimated, 0 for the others."""
    return {axis_of(card): int(card == placed.card) for card in (HOST, *range(placed.cards))}


def place_operations(stack: Stack, axes: Mapping[str, int], p: ModulePlacement) -> tuple[Stack, dict[str, int]]:
    """Return an inference pass with every operation on its GPU and the copies between GPUs, and its axes."""
    out = {**axes, **axes_of(p)}
    placement = _Placement(p)
    before = tuple(placement.before(stack.before))
    runs: list[Run] = []
    x = placement.card_of("embeds")
    for first, last in _same_device_ranges(p.layers):
        device = p.layers[first]
        card = max(device, 0)
        split = first + 1 if card != x else first
        runs += (placement.run(run, device, moves=True) for run in layer_runs(stack, out, first, split))
        runs += (placement.run(run, device, moves=False) for run in layer_runs(stack, out, split, last))
        x = card
    return stack._replace(before=before, runs=tuple(runs), after=tuple(placement.after(stack.after, x))), out


def _same_device_ranges(layers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of consecutive layers on one device."""
    start = 0
    for i in range(1, len(layers) + 1):
        if i == len(layers) or layers[i] != layers[start]:
            yield start, i
            start = i


class _Placement:
    """Puts operations on GPUs, and remembers the GPU of every tensor."""

    def __init__(self, p: ModulePlacement) -> None:
        self._p = p
        self._cards: dict[str, int] = {}
        self._tensors: dict[str, Tensor] = {}

    def before(self, operations: Iterable[Op]) -> Iterator[Op]:
        """Yield the operations before the layers. The rotary embedding takes the embeddings, for their dtype."""
        rotary_card = max(self._p.rotary, 0)
        inputs: dict[str, str] = {}  # copied for the current call of the rotary embedding
        calls = 1
        for op in operations:
            if _only_frees(op):
                yield op
                continue
            is_rotary = op.name.startswith("rotary") or ".rotary_emb" in op.name
            card = rotary_card if is_rotary else self._card(op, self._p.before, 0)
            if is_rotary and not inputs and card != self._cards.get("embeds", 0) and "embeds" in self._tensors:
                copy, inputs["embeds"] = self._copied(
                    "embeds", card, op.name, name_there=f"embeds for {op.name}, {calls}"
                )
                yield copy
            names: dict[str, str] = {}
            for name in dict.fromkeys(op.reads):
                if self._cards.get(name, card) != card:
                    copy, names[name] = self._copied(name, card, op.name, name_there=f"{name} for {op.name}, {calls}")
                    yield copy
                    inputs |= {name: names[name]} if is_rotary else {}
            yield from self._with_embeds_moved(self._put(self._renamed(op, names), card))
            if is_rotary and inputs and any(t.name.startswith("sin") and "32" not in t.name for t in op.writes):
                yield ops.release_names(*inputs.values())
                inputs, calls = {}, calls + 1

    def _with_embeds_moved(self, op: Op) -> Iterator[Op]:
        """Yield the operation and, if it writes the embeddings, their copy to another GPU under the same name."""
        card = self._p.embeds
        if card is None or not any(t.name == "embeds" for t in op.writes) or self._cards["embeds"] == card:
            yield op
            return
        first = "embeds of the first GPU"
        yield op._replace(writes=tuple(t._replace(name=first) if t.name == "embeds" else t for t in op.writes))
        self._cards["embeds"] = card
        copy = self._tensors["embeds"]._replace(dtype=f"={first}")
        yield Op("embeds.copy", (first,), (self._at(copy, card),), source=_HOOKS)
        yield ops.release_names(first)

    def run(self, run: Run, device: int, moves: bool) -> Run:
        """Return a run of layers on a device, each layer with its own copies of all inputs but the hidden states.

        `moves`: the hidden states come from another GPU.
        """
        card = max(device, 0)
        blocks = tuple(self._block(block, device, card, moves) for block in run.blocks)
        return run._replace(blocks=blocks, before=tuple(self._put(op, card) for op in run.before))

    def _block(self, block: Block, device: int, card: int, moves: bool) -> Block:
        inside = {t.name for op in block.ops for t in (*op.writes, *op.past)}
        reads = dict.fromkeys(r for op in block.ops for r in op.reads)
        inputs = [r for r in reads if r not in inside and r != "x" and self._cards.get(r, card) != card]
        copies: list[Op] = []
        names: dict[str, str] = {}
        if moves:
            received = Tensor("x here", "b s h", "=x")
            copies.append(Op("receive", ("x",), (self._at(received, card),), source=_HOOKS))
            names["x"] = received.name
        for name in inputs:
            shape = self._tensors[name].shape
            if "mask" in name and "b" not in shape.split():  # a view expanded over sequences; its copy is not
                shape = f"b {shape}"
            copy, names[name] = self._copied(name, card, "receive", shape, f"{name} here")
            copies.append(copy)
        on_gpu = self._p.stays or device != HOST
        body = [self._renamed(op, names) for op in block.ops]
        body = [self._put(op, card, card if on_gpu else device) for op in body]
        if not on_gpu:
            body = list(_with_weight_copies(body, card))
        body = [*copies, *body, *((ops.release_names(*names.values()),) if names else ())]
        return block._replace(ops=tuple(body))

    def after(self, operations: Iterable[Op], x: int) -> Iterator[Op]:
        """Yield the operations after the layers; the model's output is copied to the first GPU."""
        self._cards["x"] = x
        self._tensors["x"] = Tensor("x", "b s h", "=x")
        devices = dict(self._p.after)
        card, module, names = x, "", dict[str, str]()
        returned = last = ""
        inputs: dict[str, str] = {}
        for op in operations:
            if _only_frees(op):
                yield op._replace(reads=tuple(dict.fromkeys(names.get(r, r) for r in op.reads)))
                continue
            if op.name == "generate.reorder":
                yield from self._reordered_caches(op)
                continue
            if op.name.startswith("generate."):
                if inputs:
                    yield ops.release_names(*inputs.values())
                    inputs = {}
                if not returned and last:
                    returned = last
                    if self._cards[last] != 0:
                        copy, names[last] = self._copied(last, 0, "return")
                        yield copy
                yield self._put(self._renamed(op, names), 0)
                continue
            current = next((path for path in devices if op.name == path or op.name.startswith(f"{path}.")), "")
            if current != module and inputs:
                yield ops.release_names(*inputs.values())
                inputs = {}
            module = current
            device = devices.get(module, card)
            card = max(device, 0)
            copied: dict[str, str] = {}
            for name in dict.fromkeys(op.reads):
                if self._cards.get(name, card) != card:
                    shape = self._tensors[name].shape
                    if "s" in shape.split() and op.writes and not _has_axis(op.writes[0], "s"):
                        shape = " ".join(token for token in shape.split() if token != "s")  # only the last token
                    copy, copied[name] = self._copied(name, card, op.name, shape)
                    yield copy
            inputs |= copied
            copies_weights = device == HOST and not self._p.stays
            new = self._put(self._renamed(op, copied), card, HOST if copies_weights else card)
            yield from _with_weight_copies([new], card) if copies_weights else (new,)
            last = op.writes[-1].name if op.writes else last
        if inputs:
            yield ops.release_names(*inputs.values())
        if not returned and last and self._cards[last] != 0:
            copy, _ = self._copied(last, 0, "return")
            yield copy

    def _reordered_caches(self, op: Op) -> Iterator[Op]:
        """Yield the reordering of the caches once per GPU: a layer's cache stays on the layer's GPU."""
        for card in dict.fromkeys(max(device, 0) for device in self._p.layers):
            yield self._put(op, card)

    def _card(self, op: Op, devices: Iterable[tuple[str, int]], default: int) -> int:
        device = next((device for path, device in devices if _is_in_module(op, path)), default)
        return max(device, 0)

    def card_of(self, name: str) -> int:
        """The GPU that a tensor is on."""
        return self._cards.get(name, 0)

    def _copied(
        self, name: str, card: int, where: str, shape: str | None = None, name_there: str = ""
    ) -> tuple[Op, str]:
        """Return a copy of a tensor to another GPU, and its name there."""
        t = self._tensors[name]
        name_there = name_there or f"{name} on GPU {card}"
        copy = Tensor(name_there, t.shape if shape is None else shape, f"={name}")
        self._cards[name_there], self._tensors[name_there] = card, copy
        return Op(f"{where}.copy", (name,), (self._at(copy, card),), source=_HOOKS), name_there

    def _put(self, op: Op, card: int, weights: int | None = None) -> Op:
        """Return the operation on a GPU, with its weights on the device `weights`, by default the same GPU."""
        for t in op.writes:
            self._cards[t.name], self._tensors[t.name] = card, t
        device = card if weights is None else weights
        return op._replace(
            writes=tuple(self._at(t, card) for t in op.writes),
            scratch=tuple(self._at(t, card) for t in op.scratch),
            past=tuple(self._at(t, card) for t in op.past),
            weights=tuple(_weight_at(w, card if w.group == "buffer" else device) for w in op.weights),
        )

    @staticmethod
    def _at(t: Tensor, card: int) -> Tensor:
        return t._replace(shape=f"{axis_of(card)} {t.shape}".strip())

    @staticmethod
    def _renamed(op: Op, names: Mapping[str, str]) -> Op:
        return op._replace(reads=tuple(names.get(r, r) for r in op.reads)) if names else op


def _is_in_module(op: Op, path: str) -> bool:
    """Whether an operation belongs to a module, by its name or its weights' names."""
    names = (op.name, *(w.name for w in op.weights))
    return any(name == path or name.startswith(f"{path}.") for name in names)


def _has_axis(t: Tensor, axis: str) -> bool:
    return axis in t.shape.split()


def _only_frees(op: Op) -> bool:
    """Whether an operation does nothing but drop references."""
    return not op.writes and not op.weights and not op.scratch


def _weight_at(w: Weight, device: int) -> Weight:
    def at(shape: str) -> str:
        return f"{axis_of(device)} {shape}".strip()

    stored = tuple(t._replace(shape=at(t.shape)) for t in w.stored)
    return w._replace(shape=at(w.shape), rows=w.rows + 1 if w.rows else 0, stored=stored)


def _with_weight_copies(operations: Sequence[Op], card: int) -> Iterator[Op]:
    """Yield the operations with copies of their weights, from the call of a module until it returns."""
    loads: dict[int, list[Tensor]] = {}  # by the index of the operation before which they come
    frees: dict[int, list[str]] = {}  # by the index of the operation after which they go
    modules: dict[str, list[Weight]] = {}
    for op in operations:
        for w in op.weights:
            if w.group != "buffer":
                path = w.name.rpartition(".")[0]
                if w.name not in {other.name for other in modules.get(path, ())}:
                    modules.setdefault(path, []).append(w)
    for path, weights in modules.items():
        using = {i for i, op in enumerate(operations) if op.weights and _is_in_module(op, path)}
        named = {i for i, op in enumerate(operations) if op.name == path or op.name.startswith(f"{path}.")}
        indices = sorted(using | named)
        copies = [
            Tensor(f"copy of {w.name}{f' ({t.name})' if t.name else ''}", _shape_on(t.shape, card), t.dtype)
            for w in weights
            for t in (w.stored or (Tensor("", w.shape, w.dtype),))
        ]
        loads.setdefault(indices[0], []).extend(copies)
        frees.setdefault(indices[-1], []).extend(t.name for t in copies)
    for i, op in enumerate(operations):
        if i in loads:
            yield Op(f"{op.name}.load", (), tuple(loads[i]), source=_HOOKS)
        yield op
        if i in frees:
            yield ops.release_names(*frees[i])


def _shape_on(shape: str, card: int) -> str:
    return " ".join((axis_of(card), *(token for token in shape.split() if not token.startswith("@"))))
