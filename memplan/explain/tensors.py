"""The tensors that a request may be: those of a run's own program, and those that other kernels would make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from math import isqrt, prod

from memplan.core.arithmetic import ONE_RUN
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE, MIB
from memplan.engine.allocator import LARGE_SEGMENT, OWN_SEGMENT_STEP, SMALL_SEGMENT
from memplan.engine.walk import size
from memplan.estimate.answer import Line, Walk
from memplan.estimate.inference import InferenceWalk
from memplan.estimate.lines import in_letters, in_numbers
from memplan.estimate.training import TrainingWalk
from memplan.explain.frames import ATTENTION, GRADIENT, HIDDEN, LOGITS, MLP, OTHER_ROLE, SCORES, STATES, TOWER, WEIGHT
from memplan.explain.message import Amount
from memplan.models.model import ModelSpec
from memplan.program.axes import run_axes
from memplan.program.graph import operations_of, weights_of
from memplan.program.sharding.choice import sharding_of
from memplan.program.training.passes import pass_of

LONGEST = 2**21  # tokens of a sequence that is solved for
_TOKENS = (
    "s",
    "s1",
    "s8",
    "s32",
    "s128",
    "text",
    "targets",
    "shifted_rows",
    "lm_rows",
    "kv",
    "kv1",
    "kv8",
    "kv32",
    "kv128",
)
_BATCH = ("b", "targets", "shifted_rows")


class RunTensor(NamedTuple):
    """A tensor of a run, or one that another kernel makes.

    what    its name
    where   block and operation
    kind    as in a ledger
    shape   axes, separated by spaces
    dtype   memplan's name
    phase   load, forward, backward or step
    role    as of `memplan.explain.frames`
    """

    what: str
    where: str
    kind: str
    shape: str
    dtype: str
    phase: str
    role: str


class RequestRange(NamedTuple):
    """The sizes of tensors for which torch asks the driver for what a message prints."""

    low: int
    high: int

    def __contains__(self, bytes_: object) -> bool:
        return isinstance(bytes_, int) and self.low <= bytes_ <= self.high


def tensors_behind(request: Amount) -> RequestRange:
    """Return the sizes of tensors behind a request: it is rounded up to a segment, and then to the printed digits.

    Source: torch 2.13 c10/cuda/CUDACachingAllocator.cpp get_allocation_size, format_size
    """
    least, most = request.bytes - request.slack, request.bytes + request.slack
    if most < 2 * SMALL_SEGMENT and least <= SMALL_SEGMENT <= most:
        return RequestRange(1, MIB)
    if least <= LARGE_SEGMENT <= most:
        return RequestRange(MIB + 1, LARGE_SEGMENT)
    return RequestRange(max(1, least - OWN_SEGMENT_STEP + 1), most)


def says_nothing(request: Amount) -> bool:
    """Whether a request is that of any tensor of a pool: 2 MiB up to 1 MiB, 20 MiB up to 10 MiB."""
    return tensors_behind(request).high in (MIB, LARGE_SEGMENT)


# Tensors that other kernels than the run's, or older libraries, make: what, shape, dtypes, role, and when.
_OTHERS = (
    ("logits", "b s v", ("fp32", "bf16"), LOGITS, "a copy of the logits, as losses make it"),
    ("attention scores", "b a s s", ("bf16", "fp32"), SCORES, "eager attention, or sdpa without a fused kernel"),
    ("attention mask", "b s s", ("fp32", "bf16", "bool"), SCORES, "a mask for every pair of positions"),
)
_TOWER = (
    ("scores of the vision tower's attention", "va n n", ("bf16", "fp32"), TOWER, "without a fused kernel"),
    (
        "mask of the vision tower's attention",
        "n n",
        ("fp32", "bf16", "bool"),
        TOWER,
        "a mask for every pair of patches",
    ),
)


class Candidate(NamedTuple):
    """A tensor that a request may be.

    tensor     the tensor
    names      other tensors of the run with the same shape and dtype
    dims       its shape in numbers
    bytes      its size
    batch      sequences of the batch that gives it
    sequence   tokens of a sequence that gives it; 0 if it has no tokens
    given      whether that is the run's own sequence
    note       when it is made, if the run itself does not
    lengths    the shortest and the longest sequence that give it, in the digits that the request is printed with
    """

    tensor: RunTensor
    names: tuple[str, ...]
    dims: tuple[int, ...]
    bytes: int
    batch: int
    sequence: int
    given: bool
    note: str = ""
    lengths: tuple[int, int] = (0, 0)

    @property
    def factors(self) -> str:
        """The product, in numbers: 2 x 9,910 x 128,256 x 4."""
        name, _, block = self.tensor.dtype.partition("/")
        width = f"{ITEMSIZE[name]:,}" + (f" / {block}" if block else "")
        return " x ".join((*(f"{n:,}" for n in self.dims), width))


def role_of(shape: str, kind: str, name: str) -> str:
    """Return what kind of tensor a shape is, by its axes."""
    axes = shape.split()
    tokens = [axis for axis in axes if axis in _TOKENS]
    if kind in ("gradient", "optstate"):
        return GRADIENT if kind == "gradient" else STATES
    if not tokens:
        return GRADIENT if name.startswith("gradient of ") else WEIGHT
    if "v" in axes:
        return LOGITS
    if len(tokens) > 1:
        return SCORES
    if "f" in axes or any(axis[:1] == "f" and axis[1:].isdigit() for axis in axes):
        return MLP
    if "d" in axes:
        return ATTENTION
    return HIDDEN if "h" in axes else OTHER_ROLE


class RunSizes:
    """The tensors of a walk, perhaps only those of some roles, and their sizes for any sequence."""

    def __init__(self, walk: Walk, roles: tuple[str, ...] = ()) -> None:
        self.walk = walk
        self.batch, self.sequence = walk.run.batch.micro, walk.run.batch.sequence
        self._by_length: dict[int, Mapping[str, int]] = {}
        self.tensors = [t for t in dict.fromkeys(_tensors(walk)) if not roles or t.role in roles]

    def axes(self, sequence: int) -> Mapping[str, int]:
        """Return the run's axes with another sequence."""
        if sequence not in self._by_length:
            self._by_length[sequence] = self._axes(sequence)
        return self._by_length[sequence]

    def _axes(self, sequence: int) -> Mapping[str, int]:
        walk = self.walk
        if isinstance(walk, TrainingWalk):
            decided, p = walk.decided, walk.peaks.program
            lengths = decided.pictures, decided.batch.target_sequence
            axes = run_axes(p, self.batch, sequence, decided.half, decided.large_tiles, ONE_RUN, *lengths)
            return {**operations_of(decided.structure.graph)[1], **axes}
        if isinstance(walk, InferenceWalk):
            fixed = walk.passes[0].axes
            return {**fixed, "b": self.batch, "s": sequence, "kv": sequence} if sequence != self.sequence else fixed
        return {"b": self.batch, "s": sequence}

    def bytes_at(self, tensor: RunTensor, sequence: int) -> int | None:
        """Return a tensor's size for a sequence; None if its axes are not known."""
        axes = self.axes(sequence)
        with suppress(KeyError, ValueError):
            variable, bytes_ = size(tensor.shape, tensor.dtype, axes)
            return None if variable.axes else bytes_
        return None

    def dims_at(self, tensor: RunTensor, sequence: int) -> tuple[int, ...]:
        return in_numbers(tensor.shape, self.axes(sequence))

    def solved(self, tensor: RunTensor, wanted: RequestRange) -> tuple[int, int] | None:
        """Return the shortest and the longest sequence for which a tensor has the wanted size; None if none has."""
        if not any(axis in _TOKENS for axis in tensor.shape.split()):
            return None
        first = self._least(tensor, wanted.low)
        if first is None or (self.bytes_at(tensor, first) or 0) > wanted.high:
            return None
        last = first
        while step := _doublings(lambda n: (self.bytes_at(tensor, n) or 0) <= wanted.high, last):
            last += step
        return first, last

    def _least(self, tensor: RunTensor, bytes_: int) -> int | None:
        """Return the shortest sequence for which a tensor has that many bytes."""
        low, high = 1, 2
        while (self.bytes_at(tensor, high) or 0) < bytes_:
            low, high = high, high * 2
            if high > LONGEST:
                return None
        while low < high:
            middle = (low + high) // 2
            if (self.bytes_at(tensor, middle) or 0) < bytes_:
                low = middle + 1
            else:
                high = middle
        return low


def _doublings(holds: Callable[[int], bool], start: int) -> int:
    """Return the largest power of two that can be added to `start` so that the condition still holds; 0 if none can."""
    step = 0
    following = 1
    while start + following <= LONGEST and holds(start + following):
        step, following = following, following * 2
    return step


def roundest(first: int, last: int) -> int:
    """Return the number between two, both included, that the most powers of two divide.

    >>> roundest(2041, 2055), roundest(9905, 9909)
    (2048, 9908)
    """
    step = 1
    while (last // (step * 2)) * step * 2 >= first:
        step *= 2
    return last // step * step


def _tensors(walk: Walk) -> Iterator[RunTensor]:
    if isinstance(walk, TrainingWalk):
        structure = walk.decided.structure
        for later in (False, True)[: 1 + structure.accumulates]:
            for key in pass_of(structure, later).sizes:
                yield from _of_pass(key)
        sharding = sharding_of(structure)
        for held in sharding.weights():
            yield RunTensor(held.what, held.where, held.kind, held.shape, held.dtype, "load", WEIGHT)
        for held in sharding.gradients():
            yield RunTensor(held.what, held.where, "gradient", held.shape, held.dtype, "backward", GRADIENT)
        for state in sharding.optimizer().states:
            shape = " ".join(map(str, state.shape))
            what = f"{state.parameter} {state.what}".strip()
            yield RunTensor(what, "optimizer", "optstate", shape, state.dtype, "step", STATES)
    elif isinstance(walk, InferenceWalk):
        for each in walk.passes:
            for key in each.low(labelled=True).sizes:
                yield from _of_pass(key)
    if isinstance(walk, (TrainingWalk, InferenceWalk)):
        for weight, _, where in weights_of(walk.decided.structure.graph):
            if weight.stored or isinstance(walk, InferenceWalk):
                dtype = weight.dtype or "bf16"
                yield RunTensor(weight.name, where.rstrip("."), "parameter", weight.shape, dtype, "load", WEIGHT)


def _of_pass(key: tuple[str, ...]) -> Iterator[RunTensor]:
    shape, dtype, *labels = key
    if len(labels) < 5 or any(token.startswith("@") for token in shape.split()):
        return
    kind, block, op, name, _ = labels
    where = f"{block}.{op}" if block else op
    phase = "backward" if kind == "gradient" or name.startswith("gradient of ") else "forward"
    yield RunTensor(name, where, kind, shape, dtype, phase, role_of(shape, kind, name))


def fused_weights(model: ModelSpec) -> Iterator[RunTensor]:
    """Yield the weights that serving engines join: query, key and value, and gate and up.

    Source: vllm 0.11 vllm/model_executor/layers/linear.py QKVParallelLinear, MergedColumnParallelLinear
    """
    axes = model.axes()
    joined = (axes["a"] + 2 * axes["k"]) * axes["d"] if "d" in axes else 0
    for what, rows in (("qkv_proj.weight", joined), ("gate_up_proj.weight", 2 * axes.get("f", 0))):
        if rows:
            for dtype in ("bf16", "fp8"):
                yield RunTensor(what, "layers", "parameter", f"{rows} h", dtype, "load", WEIGHT)


def candidates(request: Amount, sizes: RunSizes, model: ModelSpec, lengths_known: bool) -> list[Candidate]:
    """Return the tensors that a request may be, equal shapes once; not in order.

    lengths_known  whether the run says its batch and its sequence
    """
    wanted = tensors_behind(request)
    found: dict[tuple[tuple[int, ...], str, str], Candidate] = {}

    def add(candidate: Candidate) -> None:
        key = (tuple(sorted(candidate.dims)), candidate.tensor.dtype, candidate.tensor.role)
        known = found.get(key)
        if known is None or (candidate.given and not known.given):
            found[key] = candidate._replace(names=() if known is None else (known.tensor.what, *known.names))
        elif candidate.tensor.what != known.tensor.what and len(known.names) < 8:
            found[key] = known._replace(names=(*known.names, candidate.tensor.what))

    for tensor in sizes.tensors:
        exact = sizes.bytes_at(tensor, sizes.sequence)
        tokens = any(axis in _TOKENS for axis in tensor.shape.split())
        if exact is not None and exact in wanted and (lengths_known or not tokens):
            dims = sizes.dims_at(tensor, sizes.sequence)
            add(Candidate(tensor, (), dims, exact, sizes.batch, sizes.sequence * tokens, True))
            continue
        lengths = sizes.solved(tensor, wanted)
        if lengths is not None:
            length = roundest(*lengths)
            bytes_ = sizes.bytes_at(tensor, length) or 0
            add(
                Candidate(
                    tensor, (), sizes.dims_at(tensor, length), bytes_, sizes.batch, length, False, lengths=lengths
                )
            )
    for candidate in _by_other_kernels(wanted, sizes, model):
        add(candidate)
    for tensor in sizes.tensors:
        if tensor.kind == "parameter" and tensor.dtype in ("bf16", "fp16"):
            loaded = tensor._replace(dtype="fp32")
            bytes_ = sizes.bytes_at(loaded, sizes.sequence)
            if bytes_ is not None and bytes_ in wanted:
                dims = sizes.dims_at(loaded, sizes.sequence)
                add(Candidate(loaded, (), dims, bytes_, 0, 0, True, "if the model is loaded in fp32"))
    for tensor in fused_weights(model):
        bytes_ = sizes.bytes_at(tensor._replace(shape=tensor.shape.replace("h", str(model.axes()["h"]))), 1)
        if bytes_ is not None and bytes_ in wanted:
            dims = (int(tensor.shape.split()[0]), model.axes()["h"])
            add(Candidate(tensor, (), dims, bytes_, 0, 0, True, "serving engines join these weights"))
    return [*found.values()]


def _by_other_kernels(wanted: RequestRange, sizes: RunSizes, model: ModelSpec) -> Iterator[Candidate]:
    axes: dict[str, int] = {**model.axes(), "b": sizes.batch}
    for what, shape, dtypes, role, note in (*_OTHERS, *(_TOWER if "va" in axes else ())):
        free = "n" if "n" in shape.split() else "s"
        tokens = shape.split()
        try:
            factor = prod(axes[token] for token in tokens if token != free)
        except KeyError:
            continue
        for dtype in dtypes:
            per = factor * ITEMSIZE[dtype]
            low, high = -(-wanted.low // per), wanted.high // per
            if tokens.count(free) == 2:
                low, high = isqrt(max(low - 1, 0)) + 1, isqrt(high)
            if not 1 <= low <= high <= LONGEST:
                continue
            length = sizes.sequence if free == "s" and low <= sizes.sequence <= high else roundest(low, high)
            numbers = tuple(length if token == free else axes[token] for token in tokens)
            tensor = RunTensor(what, "", "temp", shape, dtype, "forward", role)
            bytes_ = prod(numbers) * ITEMSIZE[dtype]
            given = free == "s" and length == sizes.sequence
            yield Candidate(tensor, (), numbers, bytes_, sizes.batch, length, given, note, (low, high))


def ledger_lines(request: Amount, lines: Iterable[Line]) -> list[Line]:
    """Return the lines of a ledger whose bytes are within 3 % of a request that no allocator rounded."""
    near = max(request.slack, request.bytes * 3 // 100)
    return [line for line in lines if abs(line.bytes - request.bytes) <= near]


def letters(candidate: Candidate) -> str:
    """Return a candidate's shape in letters."""
    return in_letters(candidate.tensor.shape)
