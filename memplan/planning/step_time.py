"""The time and cost of a training step: operations and bytes are counted, the share of a card's peak is assumed.

The ops are those that the memory estimate walks, so work that a method skips (LoRA's gradients of frozen matrices) or
repeats (checkpointed blocks) is accounted for. Counts are derived; seconds come from
`memplan.catalogue.hardware.rates`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import product
from math import prod

from memplan.catalogue.hardware import rates
from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.rates import Rate
from memplan.catalogue.kernels import flops
from memplan.catalogue.kernels.flops import MemoryTraffic, Points
from memplan.core.arithmetic import ONE_RUN
from memplan.core.ir import Tensor
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE
from memplan.engine.walk import shared
from memplan.engine.work import Call
from memplan.program.axes import run_axes
from memplan.program.graph import Graph, operations_of, work_of_pass
from memplan.program.run import ResolvedRun
from memplan.program.sharding.choice import sharding_of
from memplan.program.structure import Structure
from memplan.program.training.pipeline import idle, may_be_worst
from memplan.program.training.program import host_bytes, program
from memplan.resolve.batches import check_batch
from memplan.resolve.decide import decide
from memplan.resolve.refusals.across_parts import refuse_unless_training
from memplan.spec.run import RunSpec

PARTS = ("forward", "recomputed", "inputs", "weights")

_Amount = tuple[tuple[tuple[str, ...], int], ...]  # a polynomial in the run's axes: (axes multiplied, factor)


class _Product(NamedTuple):
    """Matrix products of one size: `times` per pass, with the operations and bytes of each."""

    part: str
    dtype: str
    attention: bool
    operations: _Amount
    bytes: _Amount
    times: int


class _Pass(NamedTuple):
    """A forward and backward pass of a model: its products, the bytes of everything else, and its kernel calls."""

    products: tuple[_Product, ...]
    rest: _Amount
    calls: int


class Product(NamedTuple):
    """Matrix products of one size in a step.

    dtype       dtype of computation
    attention   whether it is a fused attention kernel, which computes two products
    operations  floating-point operations of one
    bytes       bytes that one reads and writes
    times       number of them
    """

    dtype: str
    attention: bool
    operations: int
    bytes: int
    times: int


class Work(NamedTuple):
    """The work of one optimizer step on one GPU. Operations are floating-point operations of matrix products.

    tokens      batch x sequence x accumulation
    forward     operations of forward passes
    recomputed  operations of checkpointed blocks computed again
    inputs      operations of gradients of activations
    weights     operations of gradients of weights
    products    the products by size, for a roofline
    moved       bytes that everything else reads and writes
    update      bytes that the optimizer step, clipping and gradient accumulation read and write
    copied      bytes between the card and host memory: checkpoints, or an optimizer's gradients and parameters
    on_host     bytes that an update on the host reads and writes in host memory
    calls       approximate number of kernel launches, without the optimizer's
    idle        time that a pipeline rank waits for others, as a share of its computing time
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
        """All bytes of the step, including those of products."""
        return sum(p.bytes * p.times for p in self.products) + self.moved + self.update


def work(run: RunSpec) -> Work:
    """Return the work of one optimizer step on one GPU; in a pipeline, on the stage that computes most.

    Communication between GPUs is not counted. Raises MemplanError if the run cannot be estimated.
    """
    refuse_unless_training(run, "the work of a step")
    decided = decide(run)
    if decided.structure.pipe.engine:
        stages = (decided._replace(structure=stage) for stage in may_be_worst(decided.structure))
        slowest = max((_work(stage) for stage in stages), key=lambda work: work.operations)
        return slowest._replace(idle=idle(decided.structure))
    return _work(decided)


def _work(decided: ResolvedRun) -> Work:
    """Return the work of one optimizer step on one GPU; in a pipeline, on the run's own stage."""
    p = program(decided.structure)
    b = decided.batch
    check_batch(b, p.structure.graph.model)
    lengths = (decided.pictures, b.target_sequence)
    axes = run_axes(p, b.micro, b.sequence, decided.half, decided.large_tiles, ONE_RUN, *lengths)
    per_pass, packed = _pass_work(decided.structure.graph), decided.structure.graph.wiring.packed
    is_one_row = packed is not None and packed.is_one_row
    parts: dict[str, int] = dict.fromkeys(PARTS, 0)
    products: list[Product] = []
    values = _Values(axes)
    for q in per_pass.products:
        operations, times = values.of(q.operations), q.times * b.accumulation
        parts[q.part] += operations * times
        products.append(Product(q.dtype, q.attention, operations, values.of(q.bytes), times))
    return Work(
        tokens=axes["b"] * (axes["text"] if is_one_row else b.sequence) * b.accumulation,
        **parts,
        products=tuple(products),
        moved=values.of(per_pass.rest) * b.accumulation,
        update=_update(decided.structure) + _accumulation(decided.structure) * (b.accumulation - 1),
        copied=_copied(decided.structure, b.accumulation) + 2 * (host_bytes(p, axes) - p.host) * b.accumulation,
        on_host=2 * (p.host if decided.structure.on_host else _fsdp_host_update(decided.structure)),
        calls=per_pass.calls * b.accumulation,
    )


class _Values:
    """Evaluates amounts at a run's axes, caching products of axes."""

    def __init__(self, axes: Mapping[str, int]) -> None:
        self._axes = axes
        self._cache: dict[tuple[str, ...], int] = {}

    def of(self, amount: _Amount) -> int:
        total = 0
        for names, factor in amount:
            if names not in self._cache:
                self._cache[names] = prod(self._axes[name] for name in names)
            total += factor * self._cache[names]
        return total


@lru_cache(maxsize=256)
def _pass_work(graph: Graph) -> _Pass:
    """Return the work of one forward and backward pass of the graph."""
    _, axes = operations_of(graph)
    sizes = _Sizes(axes)
    products: dict[tuple[str, str, bool, _Amount, _Amount], int] = {}
    rest: dict[tuple[str, ...], int] = {}
    calls = 0

    def add(
        call: Call, part: str, points: Iterable[Points], own: list[MemoryTraffic], extra: Iterable[MemoryTraffic]
    ) -> None:
        """Add a call: `own` bytes belong to its product, if it has one; `extra` bytes are always moved separately."""
        nonlocal calls
        operations = sizes.operations(points)
        if operations:
            dtype, attends = flops.computes_in(call.op, call.part == "backward"), flops.attends(call.op)
            key = (part, dtype, attends, operations, sizes.bytes(own))
            products[key] = products.get(key, 0) + call.copies
        for names, factor in (*sizes.bytes(extra), *(() if operations else sizes.bytes(own))):
            rest[names] = rest.get(names, 0) + factor * call.copies
        calls += call.copies if own else 0

    for call in _distinct(work_of_pass(graph)):
        op, tensors = call.op, call.tensors
        match call.part:
            case "sum":
                (like,) = call.targets
                add(call, "inputs", (), [MemoryTraffic(like, flops.ADDING)], ())
            case "backward":
                for target in call.targets:
                    own, extra = flops.backward_bytes(op, tensors, call.of, target)
                    part = "inputs" if sizes.is_activation(target) else "weights"
                    add(call, part, flops.backward(op, tensors, target), own, extra)
                add(call, "inputs", (), [], flops.scratch_back(op, [t.name for t in call.targets]))
            case part:
                own, extra = flops.forward_bytes(op, tensors)
                add(call, part, flops.forward(op, tensors), own, extra)
    return _Pass(tuple(_Product(*key, times) for key, times in products.items()), tuple(rest.items()), calls)


def _distinct(calls: Iterable[Call]) -> Iterator[Call]:
    """Yield each computation once, with the copies of all that are equal: most copies of a block are."""
    first: dict[tuple[object, ...], Call] = {}
    copies = Counter[tuple[object, ...]]()
    for call in calls:
        key = (id(call.op), call.part, call.of, call.targets, *call.tensors.values())
        first.setdefault(key, call)
        copies[key] += call.copies
    return (call._replace(copies=copies[key]) for key, call in first.items())


class _Sizes:
    """Evaluates shapes at a model's axes, leaving those that the run decides."""

    def __init__(self, axes: Mapping[str, int]) -> None:
        self._axes = axes
        self._cache: dict[str, tuple[tuple[str, ...], int]] = {}

    def elements(self, shape: str) -> tuple[tuple[str, ...], int]:
        """Return the shape's axes that the run decides, and the product of the others."""
        if shape not in self._cache:
            tokens = shape.split()
            known = {t: int(t) for t in tokens if t.isdigit()} | {t: shared(t, self._axes) for t in tokens if "/" in t}
            known |= {t: self._axes[t] for t in tokens if t in self._axes}
            free = tuple(sorted(t for t in tokens if t not in known))
            self._cache[shape] = free, prod(known[t] for t in tokens if t in known)
        return self._cache[shape]

    def is_activation(self, tensor: Tensor) -> bool:
        """Whether the tensor's size depends on the run's batch or sequence."""
        return bool(self.elements(tensor.shape)[0])

    def operations(self, points: Iterable[Points]) -> _Amount:
        return _summed((*self.elements(p.shape), p.operations) for p in points)

    def bytes(self, moved: Iterable[MemoryTraffic]) -> _Amount:
        def terms() -> Iterable[tuple[tuple[str, ...], int, int]]:
            for tensor, times in moved:
                free, factor = self.elements(tensor.shape)
                name, _, per = tensor.dtype.partition("/")
                yield free, factor * ITEMSIZE[name] // int(per or 1), times

        return _summed(terms())


def _summed(terms: Iterable[tuple[tuple[str, ...], int, int]]) -> _Amount:
    total: dict[tuple[str, ...], int] = {}
    for free, factor, times in terms:
        total[free] = total.get(free, 0) + factor * times
    return tuple(sorted(total.items()))


@lru_cache(maxsize=2048)
def _update(structure: Structure) -> int:
    """Return the bytes that clipping and the optimizer step move on the card; paged states count as on the card."""
    p = program(structure)
    gradients = _gradients(structure)
    before = (flops.CLIPPING if structure.clips else 0) + (flops.UNSCALING if structure.scales else 0)
    if structure.on_host or structure.ranks.offloads:
        return before * gradients
    passes = flops.IN_LISTS if p.optimizer.foreach_lists else flops.AT_ONCE
    stepped = passes.states * (p.states + p.host) + passes.gradients * gradients
    return stepped + passes.parameters * _weights(structure) + before * gradients


def _copied(structure: Structure, passes: int) -> int:
    """Return the bytes copied for an update on the host: gradients there, parameters back.

    A rank's offloaded parts of all weights are copied to the card for every forward and backward pass. FSDP copies
    gradients whenever they are reduced.
    """
    ranks = structure.ranks
    gathered = passes * (1 if ranks.keeps else 2) * sharding_of(structure).host_shards()
    if ranks.offloads:
        return gathered + (1 if ranks.delayed else passes) * _weights(structure)
    return gathered + (_gradients(structure) + _weights(structure) if structure.on_host else 0)


def _fsdp_host_update(structure: Structure) -> int:
    """Return the bytes of a rank's weights, gradients and states that FSDP updates on the host."""
    if not structure.ranks.offloads:
        return 0
    states = sum(h.bytes * h.copies for h in sharding_of(structure).host() if h.kind == "optstate")
    return 2 * _weights(structure) + states


def _gradients(structure: Structure) -> int:
    return sum(h.bytes * h.copies for h in sharding_of(structure).gradients())


def _weights(structure: Structure) -> int:
    """Return the bytes of the trained parameters."""
    return sum(prod(t.shape) * ITEMSIZE[t.dtype] * t.copies for t in sharding_of(structure).trained())


@lru_cache(maxsize=2048)
def _accumulation(structure: Structure) -> int:
    """Return the bytes moved to add a later pass's gradients."""
    return flops.ADDING * _gradients(structure)


class Range(NamedTuple):
    """A low, usual and high figure. All are uncertain: they rest on rates measured elsewhere or assumed."""

    low: float
    usual: float
    high: float

    def times(self, factor: float) -> Range:
        return Range(*(factor * n for n in self))


class Pace(NamedTuple):
    """The time of a step on one device of a card, and the rates behind it; the short time is at the high rates.

    seconds     time of an optimizer step
    tokens      tokens of the step
    products    rate of matrix products
    attention   rate of attention
    bandwidth   rate of the card's memory
    launch      time of a kernel launch
    bus         rate of copies to and from host memory; None if there are none
    host        rate of an update in host memory; None if there is none
    bound       what takes most of the usual time: products, bytes, host or copies
    note        substitute for a rate that the card does not have
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
        """`assumed` if any rate is assumed, else `measured`."""
        every = (self.products, self.attention, self.bandwidth, self.launch, self.bus, self.host)
        return "assumed" if any(rate is not None and rate.basis == "assumed" for rate in every) else "measured"


class StepLimits(NamedTuple):
    """Peak rates of one device of a card, per second.

    operations  floating-point operations by dtype
    bytes       bytes of its memory
    bus         bytes over its bus
    note        see `Pace`
    """

    operations: dict[str, float]
    bytes: float
    bus: float
    note: str


class Shares(NamedTuple):
    """One choice of rates: shares of the card's peak and its bus, seconds per kernel launch, host bytes per second."""

    products: float
    attention: float
    bandwidth: float
    launch: float
    bus: float
    host: float


def step_pace(work: Work, gpu: GPU) -> Pace | None:
    """Return the time of the work on one device of the card; None if the catalogue has no rate for its products."""
    card = limits(gpu, frozenset(p.dtype for p in work.products))
    if card is None:
        return None
    high, usual, low = shares(gpu)
    seconds = Range(*(_seconds(work, card, choice) for choice in (high, usual, low)))
    multiplying, moving = busy(work, card, usual)
    parts = {"products": multiplying, "bytes": moving, "copies": _host_seconds(work, card, usual)}
    launching = work.calls * usual.launch
    if launching > multiplying + moving:  # the card's work then hides behind the launches
        parts["host"] = launching
    bus, host = (rates.BUS if work.copied else None), (rates.HOST_MEMORY if work.on_host else None)
    return Pace(
        seconds, work.tokens, *_card_rates(gpu), rates.LAUNCH, bus, host, max(parts, key=parts.__getitem__), card.note
    )


def _card_rates(gpu: GPU) -> tuple[Rate, Rate, Rate]:
    """Return the card's rates of products, attention and bandwidth."""
    capability = gpu.compute_capability
    return rates.products(capability), rates.attention(capability), rates.bandwidth(capability)


def shares(gpu: GPU) -> tuple[Shares, Shares, Shares]:
    """Return the rates of a card and its host, all high, all usual and all low."""
    p, a, b = _card_rates(gpu)
    launch, bus, host = rates.LAUNCH, rates.BUS, rates.HOST_MEMORY
    return (
        Shares(p.high / 100, a.high / 100, b.high / 100, launch.low / 1e6, bus.high / 100, host.high * 1e9),
        Shares(p.usual / 100, a.usual / 100, b.usual / 100, launch.usual / 1e6, bus.usual / 100, host.usual * 1e9),
        Shares(p.low / 100, a.low / 100, b.low / 100, launch.high / 1e6, bus.low / 100, host.low * 1e9),
    )


def ratio(before: Work, after: Work, gpu: GPU) -> tuple[float, float] | None:
    """Return how many times longer `after` takes for the same number of tokens, at least and at most.

    Both are timed at the same rates, over all combinations of high and low ones, so that most of the uncertainty
    cancels. None if the catalogue has no rate for the products of one.
    """
    card = limits(gpu, frozenset(p.dtype for w in (before, after) for p in w.products))
    if card is None:
        return None
    high, _, low = shares(gpu)
    ratios: list[float] = []
    for choice in map(Shares._make, product(*zip(high, low, strict=True))):
        first, second = (_seconds(w, card, choice) / w.tokens for w in (before, after))
        ratios.append(second / first)
    return min(ratios), max(ratios)


def _seconds(work: Work, card: StepLimits, shares: Shares) -> float:
    """Return the seconds of the card's work or of kernel launches, whichever takes longer, plus those off the card."""
    computing = max(sum(busy(work, card, shares)), work.calls * shares.launch)
    return computing * (1 + work.idle) + _host_seconds(work, card, shares)


def _host_seconds(work: Work, card: StepLimits, shares: Shares) -> float:
    """Return the seconds of copies to and from host memory plus those of an update there."""
    return work.copied / (card.bus * shares.bus) + work.on_host / shares.host


def busy(work: Work, card: StepLimits, shares: Shares) -> tuple[float, float]:
    """Return the seconds of compute-bound products, and those of everything else, which memory bandwidth bounds."""
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
def limits(gpu: GPU, dtypes: frozenset[str]) -> StepLimits | None:
    """Return the peak rates of one device of the card for products in the dtypes; None if a rate is unknown."""
    if gpu.bandwidth_gbps is None:
        return None
    operations: dict[str, float] = {}
    notes: list[str] = []
    for dtype in sorted(dtypes):
        tera, note = _tera(gpu, dtype)
        if tera is None:
            return None
        operations[dtype] = tera * 1e12 / gpu.devices
        notes += [note] if note else []
    bus = rates.bus_gbps(gpu.pcie) * 1e9 / gpu.devices
    return StepLimits(operations, gpu.bandwidth_gbps * 1e9 / gpu.devices, bus, "; ".join(dict.fromkeys(notes)))


def _tera(gpu: GPU, dtype: str) -> tuple[float | None, str]:
    """Return 10**12 operations per second in the dtype, and a note if another rate is substituted."""
    match dtype:
        case "bf16" if gpu.bf16_tflops is not None:
            return gpu.bf16_tflops, ""
        case "bf16":  # computed by the fp32 units
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
    """Lowest and highest known price of a GPU, in US dollars per hour, and the date of the latest one (ISO 8601)."""

    low: float
    high: float
    date: str


def hourly(gpu: GPU, count: int = 1) -> Hourly | None:
    """Return the range of the dated prices of `count` cards together; None if there are none."""
    dated = [price for price in gpu.prices if price.date]
    if not dated:
        return None
    prices = [price.usd_per_hour for price in dated]
    return Hourly(min(prices) * count, max(prices) * count, max(price.date for price in dated))


class Cost(NamedTuple):
    """The cost of a number of tokens: seconds, and US dollars if a price is known."""

    tokens: int
    seconds: Range
    usd: Range | None


MILLION = 1_000_000


def cost(pace: Pace, usd_per_hour: Hourly | float | None = None, tokens: int = MILLION) -> Cost:
    """Return the cost of `tokens` tokens at a pace.

    `usd_per_hour` is a price or the range from `hourly`: the low price goes with the short time, the high price with
    the long time, and their mean with the usual time.
    """
    seconds = pace.seconds.times(tokens / pace.tokens)
    if usd_per_hour is None:
        return Cost(tokens, seconds, None)
    low, high = (usd_per_hour, usd_per_hour) if isinstance(usd_per_hour, (int, float)) else usd_per_hour[:2]
    prices = (low, (low + high) / 2, high)
    return Cost(tokens, seconds, Range(*(s / 3600 * usd for s, usd in zip(seconds, prices, strict=True))))
