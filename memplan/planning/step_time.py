"""How long a step takes, and what it costs: operations and bytes counted, the share of a card's peak assumed.

The operations are those that the memory estimate walks, so that what a method leaves out (LoRA's gradients of frozen
matrices) or does twice (a checkpoint's blocks) shows. Counting is derived; seconds rest on
`memplan.catalogue.hardware.rates`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from memplan.catalogue.hardware import rates
from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.rates import Rate
from memplan.catalogue.kernels import flops
from memplan.catalogue.kernels.flops import Moved, Points
from memplan.core.arithmetic import ONE_RUN
from memplan.core.ir import Tensor
from memplan.core.units import ITEMSIZE
from memplan.engine.walk import shared
from memplan.engine.work import Call
from memplan.program.axes import run_axes
from memplan.program.graph import Graph, built, worked
from memplan.program.run import Decided
from memplan.program.sharding.ranks import pieces
from memplan.program.training.pipeline import idle, may_be_worst
from memplan.program.training.program import Structure, gradients_of, host_bytes, host_of, program, trained_parameters
from memplan.resolve.batches import check_batch
from memplan.resolve.decide import decide
from memplan.resolve.refusals import refuse_untrained
from memplan.spec.run import RunSpec

PARTS = ("forward", "recomputed", "inputs", "weights")

_Amount = tuple[tuple[tuple[str, ...], int], ...]  # a sum: a factor for every product of the run's axes


class _Product(NamedTuple):
    """Equal products: of one part and dtype, so many operations and bytes each, `times` in a pass."""

    part: str
    dtype: str
    attention: bool
    operations: _Amount
    bytes: _Amount
    times: int


class _Pass(NamedTuple):
    """A forward and backward pass with the model's numbers put in: its products, all other bytes, and its calls."""

    products: tuple[_Product, ...]
    rest: _Amount
    calls: int


class Product(NamedTuple):
    """Equal products of a step: the dtype, floating-point operations and bytes of one, and how many there are.

    `attention`: both products of attention in one kernel.
    """

    dtype: str
    attention: bool
    operations: int
    bytes: int
    times: int


class Work(NamedTuple):
    """What one optimizer step does on one GPU.

    tokens      batch x sequence x accumulation
    forward, recomputed, inputs, weights   floating-point operations of products: forward; once more, where a checkpoint
                computes its block again; of the gradients of activations; of the gradients of weights
    products    those of each size, for a roofline
    moved       bytes that everything else reads and writes
    update      bytes that the optimizer's step, clipping and adding up gradients read and write
    copied      bytes between the card and host memory: checkpoints, or an optimizer's gradients and parameters
    on_host     bytes that an update on the host reads and writes in its own memory
    calls       kernels or so that are launched, but for the optimizer's
    idle        how long a pipeline's rank waits for the others, as a share of what it computes
    """

    tokens: int
    forward: int
    recomputed: int
    inputs: int
    weights: int
    products: tuple[Product, ...]
    moved: int
    update: int
    copied: int
    on_host: int
    calls: int
    idle: float = 0.0

    @property
    def operations(self) -> int:
        return self.forward + self.recomputed + self.inputs + self.weights

    @property
    def bytes(self) -> int:
        """All bytes of the step, those of products too."""
        return sum(p.bytes * p.times for p in self.products) + self.moved + self.update


def work(run: RunSpec) -> Work:
    """What one optimizer step of the run does on one GPU. Raises MemplanError where the run cannot be answered. What
    several GPUs send each other is not counted. Of a pipeline it is the stage that computes most."""
    refuse_untrained(run, "the work of a step")
    decided = decide(run)
    if decided.structure.pipe.engine:
        stages = (decided._replace(structure=one) for one in may_be_worst(decided.structure))
        slowest = max((_work(one) for one in stages), key=lambda work: work.operations)
        return slowest._replace(idle=idle(decided.structure))
    return _work(decided)


def _work(decided: Decided) -> Work:
    """What one optimizer step does on one GPU, of a pipeline on its stage."""
    p = program(decided.structure)
    b = decided.batch
    check_batch(b, p.structure.graph.model)
    lengths = (decided.pictures, b.target_sequence)
    axes = run_axes(p, b.micro, b.sequence, decided.half, decided.large_tiles, ONE_RUN, *lengths)
    passed = _passed(decided.structure.graph)
    parts: dict[str, int] = dict.fromkeys(PARTS, 0)
    products: list[Product] = []
    values = _Values(axes)
    for q in passed.products:
        operations, times = values.of(q.operations), q.times * b.accumulation
        parts[q.part] += operations * times
        products.append(Product(q.dtype, q.attention, operations, values.of(q.bytes), times))
    return Work(
        tokens=b.micro * b.sequence * b.accumulation,
        **parts,
        products=tuple(products),
        moved=values.of(passed.rest) * b.accumulation,
        update=_update(decided.structure) + _added(decided.structure) * (b.accumulation - 1),
        copied=_copied(decided.structure, b.accumulation) + 2 * (host_bytes(p, axes) - p.host) * b.accumulation,
        on_host=2 * (p.host if decided.structure.on_host else _stepped_on_host(decided.structure)),
        calls=passed.calls * b.accumulation,
    )


class _Values:
    """Products of a run's axes, each made once."""

    def __init__(self, axes: Mapping[str, int]) -> None:
        self._axes = axes
        self._known: dict[tuple[str, ...], int] = {}

    def of(self, amount: _Amount) -> int:
        total = 0
        for names, factor in amount:
            if names not in self._known:
                self._known[names] = prod(self._axes[name] for name in names)
            total += factor * self._known[names]
        return total


@lru_cache(maxsize=256)
def _passed(graph: Graph) -> _Pass:
    """The graph's calls as numbers."""
    _, axes = built(graph)
    sizes = _Sizes(axes)
    products: dict[tuple[str, str, bool, _Amount, _Amount], int] = {}
    rest: dict[tuple[str, ...], int] = {}
    calls = 0

    def add(call: Call, part: str, points: Iterable[Points], own: list[Moved], beside: Iterable[Moved]) -> None:
        nonlocal calls
        operations = sizes.operations(points)
        if operations:
            dtype, attends = flops.computes_in(call.op, call.part == "backward"), flops.attends(call.op)
            key = (part, dtype, attends, operations, sizes.bytes(own))
            products[key] = products.get(key, 0) + call.copies
        for names, factor in (*sizes.bytes(beside), *(() if operations else sizes.bytes(own))):
            rest[names] = rest.get(names, 0) + factor * call.copies
        calls += call.copies if own else 0

    for call in worked(graph):
        op, tensors = call.op, call.tensors
        match call.part:
            case "sum":
                (like,) = call.targets
                add(call, "inputs", (), [Moved(like, flops.ADDING)], ())
            case "backward":
                for target in call.targets:
                    own, beside = flops.backward_bytes(op, tensors, call.of, target)
                    part = "inputs" if sizes.runs(target) else "weights"
                    add(call, part, flops.backward(op, tensors, target), own, beside)
                add(call, "inputs", (), [], flops.scratch_back(op, [t.name for t in call.targets]))
            case part:
                own, beside = flops.forward_bytes(op, tensors)
                add(call, part, flops.forward(op, tensors), own, beside)
    found = tuple(_Product(*key, times) for key, times in products.items())
    return _Pass(found, tuple(rest.items()), calls)


class _Sizes:
    """Shapes with a model's numbers put in."""

    def __init__(self, axes: Mapping[str, int]) -> None:
        self._axes = axes
        self._known: dict[str, tuple[tuple[str, ...], int]] = {}

    def elements(self, shape: str) -> tuple[tuple[str, ...], int]:
        """A shape's axes that the run decides, and how many elements it has at every point of those."""
        if shape not in self._known:
            tokens = shape.split()
            known = {t: int(t) for t in tokens if t.isdigit()} | {t: shared(t, self._axes) for t in tokens if "/" in t}
            known |= {t: self._axes[t] for t in tokens if t in self._axes}
            free = tuple(sorted(t for t in tokens if t not in known))
            self._known[shape] = free, prod(known[t] for t in tokens if t in known)
        return self._known[shape]

    def runs(self, tensor: Tensor) -> bool:
        """Whether the run decides how large the tensor is, as it does of activations."""
        return bool(self.elements(tensor.shape)[0])

    def operations(self, points: Iterable[Points]) -> _Amount:
        return _summed((*self.elements(p.shape), p.operations) for p in points)

    def bytes(self, moved: Iterable[Moved]) -> _Amount:
        def each() -> Iterable[tuple[tuple[str, ...], int, int]]:
            for tensor, times in moved:
                free, factor = self.elements(tensor.shape)
                name, _, per = tensor.dtype.partition("/")
                yield free, factor * ITEMSIZE[name] // int(per or 1), times

        return _summed(each())


def _summed(terms: Iterable[tuple[tuple[str, ...], int, int]]) -> _Amount:
    total: dict[tuple[str, ...], int] = {}
    for free, factor, times in terms:
        total[free] = total.get(free, 0) + factor * times
    return tuple(sorted(total.items()))


@lru_cache(maxsize=2048)
def _update(structure: Structure) -> int:
    """Bytes that clipping and the optimizer's step move on the card. Paged states are counted as if they were there."""
    p = program(structure)
    gradients = _gradients(structure)
    before = (flops.CLIPPING if structure.clips else 0) + (flops.UNSCALING if structure.scales else 0)
    if structure.on_host or structure.ranks.offloads:
        return before * gradients
    passes = flops.IN_LISTS if p.optimizer.listed else flops.AT_ONCE
    stepped = passes.states * (p.states + p.host) + passes.gradients * gradients
    return stepped + passes.parameters * _weights(structure) + before * gradients


def _copied(structure: Structure, passes: int) -> int:
    """Bytes that an update on the host takes and gives back: gradients and parameters. Under FSDP a rank's parts of
    all weights are brought for every forward and backward pass, and gradients go as often as they are reduced."""
    ranks = structure.ranks
    if ranks.offloads:
        parts = sum(prod(p.shape) * ITEMSIZE[p.dtype] * p.copies for p in pieces(structure.graph, ranks))
        gathered = 1 if ranks.keeps else 2
        return passes * gathered * parts + (1 if ranks.delayed else passes) * _weights(structure)
    return _gradients(structure) + _weights(structure) if structure.on_host else 0


def _stepped_on_host(structure: Structure) -> int:
    """Bytes of what FSDP's update on the host works on: a rank's parts of weights and gradients, and its states."""
    if not structure.ranks.offloads:
        return 0
    states = sum(h.bytes * h.copies for h in host_of(structure) if h.kind == "optstate")
    return 2 * _weights(structure) + states


def _gradients(structure: Structure) -> int:
    return sum(h.bytes * h.copies for h in gradients_of(structure))


def _weights(structure: Structure) -> int:
    """Bytes of the parameters that train."""
    return sum(prod(t.shape) * ITEMSIZE[t.dtype] * t.copies for t in trained_parameters(structure))


@lru_cache(maxsize=2048)
def _added(structure: Structure) -> int:
    """Bytes that adding a later pass's gradients moves."""
    return flops.ADDING * _gradients(structure)


class Range(NamedTuple):
    """A figure as low, usual and high. Never certain: each rests on rates that are measured elsewhere or assumed."""

    low: float
    usual: float
    high: float

    def times(self, factor: float) -> Range:
        return Range(*(factor * n for n in self))


class Pace(NamedTuple):
    """How long a step takes on one device of a card.

    seconds     of an optimizer step; tokens are those of the step
    products, attention, bandwidth, launch   the rates it rests on, each with its basis and source; the short time is at
                high ones
    bus, host   those of copies to and from host memory, and of an update there; None where there is nothing of the kind
    bound       what most of the usual time goes to: products, bytes, the host or copies
    note        what stands in for a rate that the card does not have
    """

    seconds: Range
    tokens: int
    products: Rate
    attention: Rate
    bandwidth: Rate
    launch: Rate
    bus: Rate | None
    host: Rate | None
    bound: str
    note: str

    @property
    def tokens_per_second(self) -> Range:
        return Range(*(self.tokens / seconds for seconds in reversed(self.seconds)))

    @property
    def basis(self) -> str:
        """measured, or assumed where a rate is."""
        every = (self.products, self.attention, self.bandwidth, self.launch, self.bus, self.host)
        return "assumed" if any(rate is not None and rate.basis == "assumed" for rate in every) else "measured"


class Limits(NamedTuple):
    """What one device of a card does at most in a second: operations by dtype, bytes of its memory and over its bus.

    `note` as in `Pace`.
    """

    operations: dict[str, float]
    bytes: float
    bus: float
    note: str


class Shares(NamedTuple):
    """One choice of rates: shares of the card's most and of its bus, seconds a kernel, bytes a second of the host."""

    products: float
    attention: float
    bandwidth: float
    launch: float
    bus: float
    host: float


def pace(work: Work, gpu: GPU) -> Pace | None:
    """How long the work takes on one device of the card; None where the catalogue has no rate for its products."""
    card = limits(gpu, frozenset(p.dtype for p in work.products))
    if card is None:
        return None
    high, usual, low = shares(gpu)
    seconds = Range(*(_seconds(work, card, choice) for choice in (high, usual, low)))
    multiplying, moving = busy(work, card, usual)
    parts = {"products": multiplying, "bytes": moving, "copies": _away(work, card, usual)}
    launching = work.calls * usual.launch
    if launching > multiplying + moving:  # which then goes on beside it
        parts["host"] = launching
    bus, host = (rates.BUS if work.copied else None), (rates.HOST_MEMORY if work.on_host else None)
    return Pace(seconds, work.tokens, *_own(gpu), rates.LAUNCH, bus, host, max(parts, key=parts.__getitem__), card.note)


def _own(gpu: GPU) -> tuple[Rate, Rate, Rate]:
    """The card's rates of products, attention and bandwidth."""
    capability = gpu.compute_capability
    return rates.products(capability), rates.attention(capability), rates.bandwidth(capability)


def shares(gpu: GPU) -> tuple[Shares, Shares, Shares]:
    """The rates of a card, all at their high, usual and low figures; the host is as fast."""
    p, a, b = _own(gpu)
    launch, bus, host = rates.LAUNCH, rates.BUS, rates.HOST_MEMORY
    return (
        Shares(p.high / 100, a.high / 100, b.high / 100, launch.low / 1e6, bus.high / 100, host.high * 1e9),
        Shares(p.usual / 100, a.usual / 100, b.usual / 100, launch.usual / 1e6, bus.usual / 100, host.usual * 1e9),
        Shares(p.low / 100, a.low / 100, b.low / 100, launch.high / 1e6, bus.low / 100, host.low * 1e9),
    )


def ratio(before: Work, after: Work, gpu: GPU) -> tuple[float, float] | None:
    """How many times longer `after` takes for the same number of tokens, at least and at most.

    Both are timed at the same rates, all that a card may have, so that most of what is unsure about each falls away.
    None where the catalogue has no rate for the products of one.
    """
    card = limits(gpu, frozenset(p.dtype for w in (before, after) for p in w.products))
    if card is None:
        return None
    high, _, low = shares(gpu)
    found: list[float] = []
    for choice in map(Shares._make, product(*zip(high, low, strict=True))):
        first, second = (_seconds(w, card, choice) / w.tokens for w in (before, after))
        found.append(second / first)
    return min(found), max(found)


def _seconds(work: Work, card: Limits, shares: Shares) -> float:
    """How long the card is busy, or the host with launching if that takes longer; then what is done off the card."""
    computing = max(sum(busy(work, card, shares)), work.calls * shares.launch)
    return computing * (1 + work.idle) + _away(work, card, shares)


def _away(work: Work, card: Limits, shares: Shares) -> float:
    """Seconds of copies to and from host memory, and of an update there, one after the other."""
    return work.copied / (card.bus * shares.bus) + work.on_host / shares.host


def busy(work: Work, card: Limits, shares: Shares) -> tuple[float, float]:
    """Seconds of products that operations bound, and of all else that bytes bound."""
    per_byte = 1 / (card.bytes * shares.bandwidth)
    multiplying, moving = 0.0, (work.moved + work.update) * per_byte
    for dtype, attention, operations, bytes_, times in work.products:
        share = shares.attention if attention else shares.products
        computing, reading = operations / (card.operations[dtype] * share), bytes_ * per_byte
        if computing >= reading:
            multiplying += times * computing
        else:
            moving += times * reading
    return multiplying, moving


@lru_cache(maxsize=4096)
def limits(gpu: GPU, dtypes: frozenset[str]) -> Limits | None:
    """What one device of the card does at most, with products in those dtypes; None where a rate is not known."""
    if gpu.bandwidth_gbps is None:
        return None
    found: dict[str, float] = {}
    notes: list[str] = []
    for dtype in sorted(dtypes):
        tera, note = _tera(gpu, dtype)
        if tera is None:
            return None
        found[dtype] = tera * 1e12 / gpu.devices
        notes += [note] if note else []
    bus = rates.bus_gbps(gpu.pcie) * 1e9 / gpu.devices
    return Limits(found, gpu.bandwidth_gbps * 1e9 / gpu.devices, bus, "; ".join(dict.fromkeys(notes)))


def _tera(gpu: GPU, dtype: str) -> tuple[float | None, str]:
    """10**12 operations a second in that dtype, and what stands in for a rate that the card does not have."""
    match dtype:
        case "bf16" if gpu.bf16_tflops is not None:
            return gpu.bf16_tflops, ""
        case "bf16":  # the product is made by the units for fp32
            fp32, _ = _tera(gpu, "fp32")
            return fp32, f"{gpu.title} has no units for bf16: its products take as long as in fp32"
        case "fp16":
            return gpu.fp16_tflops, ""
        case "int8":
            return gpu.int8_tops, ""
        case _:
            half = gpu.fp16_tflops or gpu.bf16_tflops
            units = rates.fp32_units(gpu.compute_capability)
            halved = gpu.vendor == "NVIDIA" and gpu.market in ("consumer", "laptop")
            note = "" if units.basis == "derived" else f"fp32 is taken as 1/{units.per} of the rate in 16 bits, assumed"
            return (None if half is None else half * (2 if halved else 1) / units.per), note


class Hourly(NamedTuple):
    """What one GPU is asked for an hour, in US dollars: the least and the most of the prices found, and the latest day
    on which one of them was (ISO 8601)."""

    low: float
    high: float
    date: str


def hourly(gpu: GPU) -> Hourly | None:
    """The range of the card's dated prices; None where there is none."""
    dated = [price for price in gpu.prices if price.date]
    if not dated:
        return None
    asked = [price.usd_per_hour for price in dated]
    return Hourly(min(asked), max(asked), max(price.date for price in dated))


class Cost(NamedTuple):
    """What so many tokens take: seconds of one GPU, and US dollars where a price is known."""

    tokens: int
    seconds: Range
    usd: Range | None


MILLION = 1_000_000


def cost(pace: Pace, usd_per_hour: Hourly | float | None = None, tokens: int = MILLION) -> Cost:
    """What `tokens` take at that pace, by default a million.

    `usd_per_hour` is a price or the range of `hourly`: the least is paid for the short time, the most for the long one,
    and what is usual lies in the middle of the range.
    """
    seconds = pace.seconds.times(tokens / pace.tokens)
    if usd_per_hour is None:
        return Cost(tokens, seconds, None)
    low, high = (usd_per_hour, usd_per_hour) if isinstance(usd_per_hour, (int, float)) else usd_per_hour[:2]
    prices = (low, (low + high) / 2, high)
    return Cost(tokens, seconds, Range(*(s / 3600 * usd for s, usd in zip(seconds, prices, strict=True))))
