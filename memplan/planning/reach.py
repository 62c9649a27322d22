"""How far a run goes: the largest batch, sequence, rank or model that its GPU holds, what binds there, the frontier of
batch and sequence, and the GPUs that hold it.

Answers are found by asking `estimate` again, with the machine's own profile where there is one. What is allocated only
grows with batch, sequence and rank, so bisection finds where it ends; what torch reserves beyond may jump by a block,
so that values beyond are looked at too, up to where the tensors alone are too many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import all_gpus
from memplan.catalogue.methods.methods import ADAPTERS
from memplan.core.errors import MemplanError, SpecError, UnknownNameError
from memplan.core.units import ITEMSIZE
from memplan.estimate.answer import Estimate, Holding
from memplan.estimate.calibration import Calibration
from memplan.estimate.demand import FITS, Demand
from memplan.estimate.estimate import estimate
from memplan.models.cards import card_names, find_model, load_card
from memplan.planning.sweep import FIELDS, Grid, grid
from memplan.spec.run import RunSpec, changed

AXES = (*FIELDS, "model")
_MOST = 2**32  # nothing beyond is looked for: without it a run that takes no memory would have no end
_LOOKS = {"batch": (64, 1), "sequence": (16, 64), "rank": (64, 1)}


class Reach(NamedTuple):
    """The largest value of an axis that fits.

    value    0, or an empty name, where none does
    answer   the run with it; None where none fits
    beyond   the run with the next value; None where there is none, or it cannot run at all
    binds    what ends it: `memory`; `positions`, the model's; `rank`, the sides of its matrices; `models`, for there is
             none larger; `nothing`
    """

    axis: str
    value: int | str
    answer: Estimate | None
    beyond: Estimate | None
    binds: str


def largest_batch(run: RunSpec, demand: Demand = FITS, calibration: Calibration | None = None) -> int:
    """The largest `batch.micro` that the run's GPU holds, all else as it is; 0 where none does."""
    return _largest(_tried(run, "batch", calibration), demand, *_LOOKS["batch"])


def largest_sequence(run: RunSpec, demand: Demand = FITS, calibration: Calibration | None = None) -> int:
    """The largest `batch.sequence` that the run's GPU holds, all else as it is; 0 where none does."""
    return _largest(_tried(run, "sequence", calibration), demand, *_LOOKS["sequence"])


def reach(
    run: RunSpec, axis: str, demand: Demand = FITS, calibration: Calibration | None = None, looks: bool = True
) -> Reach:
    """The largest value of the axis that the run's GPU holds, all else as it is. Without `looks` beyond the first that
    does not fit it may be a few less, and takes a tenth of the time.

    Raises UnknownNameError for another axis, SpecError where the run names no GPU, or has no adapters whose rank could
    be asked, and what `estimate` raises where the run cannot be answered whatever the value.
    """
    if axis not in AXES:
        raise UnknownNameError("max", axis, AXES)
    estimate(run, calibration)
    if axis == "model":
        return _largest_model(run, demand, calibration)
    if axis == "rank" and run.method.kind not in ADAPTERS:
        raise SpecError(f"method.rank: method.kind {run.method.kind} has no adapters", "method.rank")
    tried = _tried(run, axis, calibration)
    many, multiple = _LOOKS[axis]
    value = _largest(tried, demand, many if looks else 0, multiple)
    beyond = tried(value + 1) if value < _MOST else None
    ends = {"batch": "nothing", "sequence": "positions", "rank": "rank"}
    return Reach(axis, value, tried(value) if value else None, beyond, "memory" if beyond else ends[axis])


def _tried(run: RunSpec, axis: str, calibration: Calibration | None) -> Callable[[int], Estimate | None]:
    """The run with another value of the axis; None where it cannot run (more tokens than learned positions, say)."""
    if run.gpu is None:
        raise SpecError("gpu: what fits depends on it; name one", "gpu")
    part, field = FIELDS[axis]

    def tried(value: int) -> Estimate | None:
        try:
            return estimate(changed(run, part, **{field: value}), calibration)
        except MemplanError:
            return None

    return tried


def _largest(tried: Callable[[int], Estimate | None], demand: Demand, looks: int, multiple: int) -> int:
    """The largest value that meets the demand, see `_LOOKS`."""

    def holds(n: int) -> bool:
        answer = tried(n)
        return answer is not None and demand.met(answer)

    def may(n: int) -> bool:
        answer = tried(n)
        return answer is not None and answer.gpu is not None and demand.told(answer, answer.gpu.usable) is not False

    low = _last(holds, 0)
    if multiple > 1 and low:  # halving among round values alone may end elsewhere
        low = max(low, multiple * _last(lambda n: holds(multiple * n), low // multiple))
        if low < _MOST and holds(low + 1):
            low = _last(holds, low)
    if not low or low >= _MOST or not looks:
        return low
    end = _last(may, low)  # allocated bytes rule out everything beyond
    step = max(1, -(-(end - low) // looks))
    step = -(-step // multiple) * multiple if step > 1 else 1
    further = next((n for n in range(end // step * step, low, -step) if holds(n)), low)
    return low if further == low else _last(holds, further)


def _last(holds: Callable[[int], bool], low: int) -> int:
    """From a value that holds, or 0, the last before one that does not, found by doubling and halving."""
    high = 2 * low or 1
    while holds(high):
        if high >= _MOST:
            return high
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _largest_model(run: RunSpec, demand: Demand, calibration: Calibration | None) -> Reach:
    """Of the bundled models, by the number of parameters."""
    usable = _usable(run)
    beyond: Estimate | None = None
    for name in by_size():
        other = run.model_copy(update={"model": name})
        if _least_weights(other) > usable:
            continue
        try:
            answer = estimate(other, calibration)
        except MemplanError:
            continue
        if demand.met(answer):
            return Reach("model", name, answer, beyond, "memory" if beyond or name != by_size()[0] else "models")
        beyond = answer
    return Reach("model", "", None, beyond, "memory")


def by_size() -> list[str]:
    """The names of the bundled models, the largest first."""
    return sorted(card_names(), key=lambda name: (-int(load_card(name).card["parameters"]), name))


def smaller_models(run: RunSpec) -> Iterator[str]:
    """The bundled models with fewer parameters than the run's, the largest first, those of its family before others."""
    own = find_model(run.model)
    total = estimate(run.model_copy(update={"gpu": None})).parameters.total
    less = [name for name in by_size() if int(load_card(name).card["parameters"]) < total]
    family = [name for name in less if load_card(name).model_type == own.model_type]
    yield from family
    yield from (name for name in less if name not in family)


def _usable(run: RunSpec) -> int:
    answer = estimate(run)
    if answer.gpu is None:
        raise SpecError("gpu: what fits depends on it; name one", "gpu")
    return answer.gpu.usable


def _least_weights(run: RunSpec) -> int:
    """No GPU holds fewer bytes of the model's weights: four bits each where they are quantised, and one where they are
    only run; its part of them where ranks divide them."""
    parameters = int(find_model(run.model).card["parameters"])
    if run.task != "train":
        return parameters // 8 // run.parallelism.world
    whole = parameters // 2 if run.method.quantization else parameters * ITEMSIZE[run.precision.weights]
    return whole // run.parallelism.world


class Frontier(NamedTuple):
    """Where batch and sequence end: the longest sequence for every batch, and the answers around it.

    longest  batch and the longest sequence that fits with it, while there is one
    around   the runs of those batches and of round sequences
    """

    longest: tuple[tuple[int, int], ...]
    around: Grid


def frontier(run: RunSpec, demand: Demand = FITS, calibration: Calibration | None = None) -> Frontier:
    """For batches of one, two, four and so on. Raises as `reach` does."""
    longest: list[tuple[int, int]] = []
    batch = 1
    while batch <= _MOST:
        tokens = largest_sequence(changed(run, "batch", micro=batch), demand, calibration)
        if tokens < _SHORTEST and longest:
            break
        longest.append((batch, tokens))
        batch *= 2
        if not tokens:
            break
    widest = max(tokens for _, tokens in longest)
    sequences = [1 << n for n in range(_SHORTEST.bit_length() - 1, max(widest, _SHORTEST).bit_length() + 1)]
    around = grid(run, batch=[b for b, _ in longest], sequence=sequences, calibration=calibration)
    return Frontier(tuple(longest), around)


_SHORTEST = 128  # tokens: what only fits with shorter sequences is not worth a row


def holding(run: RunSpec, vendor: str = "", calibration: Calibration | None = None) -> Iterator[Holding]:
    """Every catalogued GPU that holds the run, or of one vendor every one, least memory first. Asked as needed."""
    weights = estimate(run.model_copy(update={"gpu": None})).phases[0].peak  # loaded on any card
    cards = sorted(all_gpus(), key=lambda gpu: (gpu.usable, gpu.name))
    largest = {gpu.compute_capability: gpu for gpu in cards}  # cards of one kind run the same kernels

    @cache
    def on(gpu: GPU) -> Estimate | None:
        try:
            return estimate(run.model_copy(update={"gpu": gpu.name}), calibration)
        except MemplanError:  # flash attention on a card that is too old, say
            return None

    for gpu in cards:
        kind = on(largest[gpu.compute_capability])
        if kind is None or gpu.usable < weights or vendor not in ("", gpu.vendor):
            continue
        if calibration is None and kind.told(gpu.usable, replayed=True):  # one replay tells of all cards of a kind
            yield Holding(gpu, "fits")
            continue
        answer = on(gpu)
        if answer is not None and answer.verdict.answer in ("fits", "tight"):
            yield Holding(gpu, str(answer.verdict.answer))
