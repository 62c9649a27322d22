"""A model whose modules lie on several GPUs of one process, as `device_map` has it, or on the host between their uses.

All GPUs are one timeline: what is made on one has an axis that is 1 where that GPU is asked about, and 0 elsewhere. A
module's inputs are copied to its GPU when it is called, and are there until it returns; the caches of a layer stay
where the layer is; what the model returns is copied to the first GPU. Of a module whose weights are in host memory the
first GPU runs the operations, and has a copy of the weights while it does.

Source: transformers 5.24 integrations/accelerate.py get_balanced_memory, infer_auto_device_map; accelerate 1.15
big_modeling.py dispatch_model, hooks.py AlignDevicesHook, attach_align_device_hook_on_blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from memplan.catalogue.kernels import ops
from memplan.catalogue.parallelism.device_map_packing import HOST
from memplan.catalogue.parallelism.pipeline import between
from memplan.core.ir import Block, Op, Run, Stack, Tensor, Weight

_HOOKS = "accelerate 1.15 hooks.py AlignDevicesHook"


class Placed(NamedTuple):
    """Where modules lie: GPUs by number, the first being 0, or `HOST`.

    before, after   of what comes before and after the layers, by the path of the module
    rotary          of the module that makes tables of positions
    layers          of every layer
    cards           how many GPUs there are
    card            the one that is asked about, or the host
    stays           weights of modules on the host that are buffers, which stay on the first GPU
    embeds          where a module without weights takes the embeddings to before the first layer; None where none does
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
        there = {self.rotary, *self.layers, *(card for _, card in (*self.before, *self.after))}
        return tuple(sorted(card for card in there if card != HOST))


def axis_of(card: int) -> str:
    """The axis of what is on a GPU, or on the host."""
    return "@host" if card == HOST else f"@{card}"


def axes_of(placed: Placed) -> dict[str, int]:
    """The axes of all places: 1 of the one that is asked about."""
    return {axis_of(card): int(card == placed.card) for card in (HOST, *range(placed.cards))}


# What is made where.


def placed(stack: Stack, axes: Mapping[str, int], p: Placed) -> tuple[Stack, dict[str, int]]:
    """The operations of a pass of inference, each on its GPU, with what is copied between them; and the axes."""
    out = {**axes, **axes_of(p)}
    site = _Site(p)
    before = tuple(site.before(stack.before))
    runs: list[Run] = []
    x = site.card_of("embeds")
    for first, last in _stretches(p.layers):
        place = p.layers[first]
        card = max(place, 0)
        split = first + 1 if card != x else first
        runs += (site.run(run, place, moves=True) for run in between(stack, out, first, split))
        runs += (site.run(run, place, moves=False) for run in between(stack, out, split, last))
        x = card
    return stack._replace(before=before, runs=tuple(runs), after=tuple(site.after(stack.after, x))), out


def _stretches(layers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """From where to where layers lie in one place."""
    start = 0
    for i in range(1, len(layers) + 1):
        if i == len(layers) or layers[i] != layers[start]:
            yield start, i
            start = i


class _Site:
    """Puts operations on GPUs, and remembers what was made where."""

    def __init__(self, p: Placed) -> None:
        self._p = p
        self._on: dict[str, int] = {}
        self._made: dict[str, Tensor] = {}

    def before(self, some: Iterable[Op]) -> Iterator[Op]:
        """What comes before the layers. The module of positions is given the embeddings, for their dtype."""
        rotary = max(self._p.rotary, 0)
        given: dict[str, str] = {}
        tables = 1  # of positions, each made by a call of the module
        for op in some:
            if _leaves(op):
                yield op
                continue
            turns = op.name.startswith("rotary") or ".rotary_emb" in op.name
            card = rotary if turns else self._card(op, self._p.before, 0)
            if turns and not given and rotary != self._on.get("embeds", 0) and "embeds" in self._made:
                moved, given["embeds"] = self._moved("embeds", rotary, op.name, there=f"embeds for {op.name}, {tables}")
                yield moved
            names: dict[str, str] = {}
            for name in dict.fromkeys(op.reads):
                if self._on.get(name, card) != card:
                    moved, names[name] = self._moved(name, card, op.name, there=f"{name} for {op.name}, {tables}")
                    yield moved
                    given |= {name: names[name]} if turns else {}
            yield from self._embedded(self._put(self._renamed(op, names), card))
            if turns and given and any(t.name.startswith("sin") and "32" not in t.name for t in op.writes):
                yield ops.leave(*given.values())
                given, tables = {}, tables + 1

    def _embedded(self, op: Op) -> Iterator[Op]:
        """The operation, and after that of the embeddings their way to another GPU, by the same name."""
        card = self._p.embeds
        if card is None or not any(t.name == "embeds" for t in op.writes) or self._on["embeds"] == card:
            yield op
            return
        first = "embeds of the first GPU"
        yield op._replace(writes=tuple(t._replace(name=first) if t.name == "embeds" else t for t in op.writes))
        self._on["embeds"] = card
        moved = self._made["embeds"]._replace(dtype=f"={first}")
        yield Op("embeds.copy", (first,), (self._at(moved, card),), source=_HOOKS)
        yield ops.leave(first)

    def run(self, run: Run, place: int, moves: bool) -> Run:
        """A run of layers, whose inputs but the hidden states every layer is given anew."""
        card = max(place, 0)
        blocks = tuple(self._block(block, place, card, moves) for block in run.blocks)
        return run._replace(blocks=blocks, before=tuple(self._put(op, card) for op in run.before))

    def _block(self, block: Block, place: int, card: int, moves: bool) -> Block:
        inside = {t.name for op in block.ops for t in (*op.writes, *op.past)}
        reads = dict.fromkeys(r for op in block.ops for r in op.reads)
        given = [r for r in reads if r not in inside and r != "x" and self._on.get(r, card) != card]
        copies: list[Op] = []
        names: dict[str, str] = {}
        if moves:
            here = Tensor("x here", "b s h", "=x")
            copies.append(Op("receive", ("x",), (self._at(here, card),), source=_HOOKS))
            names["x"] = here.name
        for name in given:
            shape = self._made[name].shape
            if "mask" in name and "b" not in shape.split():  # a view that is one for all sequences, which a copy is not
                shape = f"b {shape}"
            copy, names[name] = self._moved(name, card, "receive", shape, f"{name} here")
            copies.append(copy)
        kept = self._p.stays or place != HOST
        body = [self._renamed(op, names) for op in block.ops]
        body = [self._put(op, card, place if not kept else card) for op in body]
        if not kept:
            body = list(_with_copies(body, card))
        body = [*copies, *body, *((ops.leave(*names.values()),) if names else ())]
        return block._replace(ops=tuple(body))

    def after(self, some: Iterable[Op], x: int) -> Iterator[Op]:
        """What comes after the layers; what the model returns is copied to the first GPU."""
        self._on["x"] = x
        self._made["x"] = Tensor("x", "b s h", "=x")
        ends = dict(self._p.after)
        card, module, names = x, "", dict[str, str]()
        returned = last = ""
        given: dict[str, str] = {}
        for op in some:
            if _leaves(op):
                yield op._replace(reads=tuple(dict.fromkeys(names.get(r, r) for r in op.reads)))
                continue
            if op.name == "generate.reorder":
                yield from self._reordered(op)
                continue
            if op.name.startswith("generate."):
                if given:
                    yield ops.leave(*given.values())
                    given = {}
                if not returned and last:
                    returned = last
                    if self._on[last] != 0:
                        moved, names[last] = self._moved(last, 0, "return")
                        yield moved
                yield self._put(self._renamed(op, names), 0)
                continue
            now = next((path for path in ends if op.name == path or op.name.startswith(f"{path}.")), "")
            if now != module and given:
                yield ops.leave(*given.values())
                given = {}
            module = now
            place = ends.get(module, card)
            card = max(place, 0)
            moved_here: dict[str, str] = {}
            for name in dict.fromkeys(op.reads):
                if self._on.get(name, card) != card:
                    shape = self._made[name].shape
                    if "s" in shape.split() and op.writes and not _has(op.writes[0], "s"):
                        shape = " ".join(token for token in shape.split() if token != "s")  # the last token alone
                    moved, moved_here[name] = self._moved(name, card, op.name, shape)
                    yield moved
            given |= moved_here
            copies = place == HOST and not self._p.stays
            one = self._put(self._renamed(op, moved_here), card, HOST if copies else card)
            yield from _with_copies([one], card) if copies else (one,)
            last = op.writes[-1].name if op.writes else last
        if given:
            yield ops.leave(*given.values())
        if not returned and last and self._on[last] != 0:
            moved, _ = self._moved(last, 0, "return")
            yield moved

    def _reordered(self, op: Op) -> Iterator[Op]:
        """Every layer's cache is put in another order where it is."""
        for card in dict.fromkeys(max(place, 0) for place in self._p.layers):
            yield self._put(op, card)

    def _card(self, op: Op, ends: Iterable[tuple[str, int]], usual: int) -> int:
        place = next((card for path, card in ends if _of(op, path)), usual)
        return max(place, 0)

    def card_of(self, name: str) -> int:
        """Where a tensor was made."""
        return self._on.get(name, 0)

    def _moved(self, name: str, card: int, where: str, shape: str | None = None, there: str = "") -> tuple[Op, str]:
        """A copy of a tensor on another GPU, and its name `there`."""
        t = self._made[name]
        there = there or f"{name} on GPU {card}"
        copy = Tensor(there, t.shape if shape is None else shape, f"={name}")
        self._on[there], self._made[there] = card, copy
        return Op(f"{where}.copy", (name,), (self._at(copy, card),), source=_HOOKS), there

    def _put(self, op: Op, card: int, weights: int | None = None) -> Op:
        """The operation on a GPU; its `weights` are there, or on the host."""
        for t in op.writes:
            self._on[t.name], self._made[t.name] = card, t
        place = card if weights is None else weights
        return op._replace(
            writes=tuple(self._at(t, card) for t in op.writes),
            scratch=tuple(self._at(t, card) for t in op.scratch),
            past=tuple(self._at(t, card) for t in op.past),
            weights=tuple(_weight_at(w, card if w.group == "buffer" else place) for w in op.weights),
        )

    @staticmethod
    def _at(t: Tensor, card: int) -> Tensor:
        return t._replace(shape=f"{axis_of(card)} {t.shape}".strip())

    @staticmethod
    def _renamed(op: Op, names: Mapping[str, str]) -> Op:
        return op._replace(reads=tuple(names.get(r, r) for r in op.reads)) if names else op


def _of(op: Op, path: str) -> bool:
    """Whether an operation is of a module, by its name or its weights'."""
    names = (op.name, *(w.name for w in op.weights))
    return any(name == path or name.startswith(f"{path}.") for name in names)


def _has(t: Tensor, axis: str) -> bool:
    return axis in t.shape.split()


def _leaves(op: Op) -> bool:
    """Whether it only lets go of names."""
    return not op.writes and not op.weights and not op.scratch


def _weight_at(w: Weight, place: int) -> Weight:
    def at(shape: str) -> str:
        return f"{axis_of(place)} {shape}".strip()

    stored = tuple(t._replace(shape=at(t.shape)) for t in w.stored)
    return w._replace(shape=at(w.shape), rows=w.rows + 1 if w.rows else 0, stored=stored)


def _with_copies(some: Sequence[Op], card: int) -> Iterator[Op]:
    """The operations with copies of their weights, which come when a module is called and go when it returns."""
    begins: dict[int, list[Tensor]] = {}
    ends: dict[int, list[str]] = {}
    modules: dict[str, list[Weight]] = {}
    for op in some:
        for w in op.weights:
            if w.group != "buffer":
                path = w.name.rpartition(".")[0]
                if w.name not in {other.name for other in modules.get(path, ())}:
                    modules.setdefault(path, []).append(w)
    for path, weights in modules.items():
        own = [i for i, op in enumerate(some) if op.weights and _of(op, path)]
        named = [i for i, op in enumerate(some) if op.name == path or op.name.startswith(f"{path}.")]
        places = sorted({*own, *named})
        copies = [
            Tensor(f"copy of {w.name}{f' ({t.name})' if t.name else ''}", _moved_shape(t.shape, card), t.dtype)
            for w in weights
            for t in (w.stored or (Tensor("", w.shape, w.dtype),))
        ]
        begins.setdefault(places[0], []).extend(copies)
        ends.setdefault(places[-1], []).extend(t.name for t in copies)
    for i, op in enumerate(some):
        if i in begins:
            yield Op(f"{op.name}.load", (), tuple(begins[i]), source=_HOOKS)
        yield op
        if i in ends:
            yield ops.leave(*ends[i])


def _moved_shape(shape: str, card: int) -> str:
    return " ".join((axis_of(card), *(token for token in shape.split() if not token.startswith("@"))))
