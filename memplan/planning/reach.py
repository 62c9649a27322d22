"""The limits of a run: the largest batch, sequence, completion, group, rank or model that its GPU holds, what binds
there, the frontier of batch and sequence, and the GPUs that hold the run.

Limits are found by calling `estimate` repeatedly, with the machine's own profile if there is one. Allocated bytes only
grow with batch, sequence and rank, so bisection works for them. Reserved bytes may jump by a block, so larger values
are sampled too, up to where the tensors alone do not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from math import gcd
from typing import TYPE_CHECKING

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import all_gpus
from memplan.catalogue.kernels.wiring import GENERATING, TRAINERS
from memplan.catalogue.methods.methods import ADAPTERS
from memplan.core.errors import SpecError, UnknownNameError, refused
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE
from memplan.estimate.answer import Estimate, Holding
from memplan.estimate.demand import FITS, Demand
from memplan.estimate.estimate import estimate, fullest
from memplan.models.cards import card_names, find_model, load_card
from memplan.models.peft_methods import has_rank
from memplan.planning.trials import FIELDS, MAX_VALUE, attempt, attempt_stages, last, needed_gpu, unless_refused
from memplan.resolve.refusals.vendors import not_on
from memplan.spec.run import RunSpec, changed
from memplan.spec.serving import Serving

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration

_OF_COMPLETIONS = ("completion", "generations")  # of trainers that generate: tokens, and completions of a prompt
AXES = (*FIELDS, *_OF_COMPLETIONS, "model")
# samples beyond the bisection, their multiple
_SAMPLING = {"batch": (64, 1), "sequence": (16, 64), "rank": (64, 1), "completion": (16, 64), "generations": (16, 1)}


class Reach(NamedTuple):
    """The largest value of an axis that fits.

    axis     batch, sequence, rank, completion, generations or model
    value    the value; 0 or an empty name if none fits
    answer   the run with it; None if none fits
    beyond   the run with the next value; None if there is none or memplan refuses it
    binds    the limit: memory
                        positions   the model's maximum length
                        rank        the dimensions of its matrices
                        models      no larger model is bundled
                        nothing     no limit was found
    step     between two values: batches and groups of a trainer that generates are those of whole prompts
    """

    axis: str
    value: int | str
    answer: Estimate | None
    beyond: Estimate | None
    binds: str
    step: int = 1


def largest_batch(run: RunSpec, demand: Demand = FITS, calibration: Calibration | None = None) -> int:
    """Return the largest `batch.micro` that the run's GPU holds with all other fields unchanged; 0 if none fits."""
    return limit(run, "batch", demand, calibration)[0]


def largest_sequence(run: RunSpec, demand: Demand = FITS, calibration: Calibration | None = None) -> int:
    """Return the largest `batch.sequence` that the run's GPU holds with all other fields unchanged; 0 if none fits."""
    return limit(run, "sequence", demand, calibration)[0]


def limit(
    run: RunSpec, axis: str, demand: Demand = FITS, calibration: Calibration | None = None, samples_beyond: bool = True
) -> tuple[int, str]:
    """Return the `value` of `reach`, and what `binds`, for any axis but the model.

    Without `samples_beyond`, values beyond the first that does not fit are not sampled: a tenth of the time, but the
    result may be slightly too small.
    """
    step = _step(run, axis)
    value, binds = _limit(_tried(run, axis, demand, calibration, step), axis, samples_beyond)
    return value * step, binds


def _limit(tried: _Tried, axis: str, samples_beyond: bool = True) -> tuple[int, str]:
    """Return the largest value of the axis that meets the demand, and what limits it."""
    samples, multiple = _SAMPLING[axis]
    value = _largest(tried, samples if samples_beyond else 0, multiple)
    if value < MAX_VALUE and tried.may_hold(value + 1) is not None:
        return value, "memory"
    return value, {"batch": "nothing", "generations": "nothing", "rank": "rank"}.get(axis, "positions")


def reach(run: RunSpec, axis: str, demand: Demand = FITS, calibration: Calibration | None = None) -> Reach:
    """Return the largest value of the axis that the run's GPU holds with all other fields unchanged.

    Raises UnknownNameError for an unknown axis, SpecError if the run names no GPU or if `rank` is asked of a run
    without adapters, and whatever `estimate` raises for the run itself.
    """
    if axis not in AXES:
        raise UnknownNameError("max", axis, AXES)
    estimate(run, calibration)
    if axis == "model":
        return _largest_model(run, demand, calibration)
    if axis == "rank" and not (run.method.kind in ADAPTERS and has_rank(run.method.kind)):
        what = "rank" if run.method.kind in ADAPTERS else "adapters"
        raise refused("method.rank", f"method.kind {run.method.kind} has no {what}")
    several = " several completions of a prompt" if axis == "generations" else ""
    trainers = [name for name in GENERATING if TRAINERS[name].completions > 1 or not several]
    if axis in _OF_COMPLETIONS and run.trainer not in trainers:
        raise SpecError(f"max: {axis} only applies to trainers that generate{several}: {', '.join(trainers)}", "max")
    step = _step(run, axis)
    tried = _tried(run, axis, demand, calibration, step)
    value, binds = _limit(tried, axis)
    beyond = tried.answer(value + 1) if value < MAX_VALUE else None
    return Reach(axis, value * step, tried.answer(value) if value else None, beyond, binds, step)


ROOM_STEPS = {"batch": 1, "sequence": 256}


def room(run: RunSpec, axis: str, calibration: Calibration | None = None) -> Reach:
    """Return how far the batch or sequence of a run that fits can grow, in `ROOM_STEPS`.

    Takes a fifth of the time of `reach`, whose value may be larger: by less than a step, or beyond ones that fail.
    """
    tried, step = _tried(run, axis, FITS, calibration), ROOM_STEPS[axis]
    own: int = getattr(run.batch, FIELDS[axis][1])
    value = max(own, step * last(lambda n: tried.holds(step * n), own // step))
    beyond = tried.answer(value + step)
    return Reach(axis, value, tried.answer(value), beyond, "memory" if beyond else "positions")


class _Tried(NamedTuple):
    """Functions that try a run at a value of an axis.

    answer    its estimate; None if memplan refuses the run, for example if there are more tokens than learned positions
    holds     whether it meets the demand
    may_hold  whether bounds and the replay of its prompt allow that; None if memplan refuses the run
    has_room  whether its allocated bytes allow that
    """

    answer: Callable[[int], Estimate | None]
    holds: Callable[[int], bool]
    may_hold: Callable[[int], bool | None]
    has_room: Callable[[int], bool]


def _tried(run: RunSpec, axis: str, demand: Demand, calibration: Calibration | None, step: int = 1) -> _Tried:
    """Return functions of a value of the axis, in units of `step`."""
    needed_gpu(run)
    group = estimate(run).run.batch.generations if axis == "generations" else 1
    part, field = ("batch", "new_tokens") if axis == "completion" else FIELDS.get(axis, ("batch", axis))

    @cache
    def stages(n: int) -> list[Estimate]:
        value = n * step
        more = {"accumulation": value * run.batch.accumulation // group} if axis == "generations" else {}
        return attempt_stages(lambda: changed(run, part, **{field: value, **more}), calibration)

    @cache
    def answer(n: int) -> Estimate | None:
        return unless_refused(lambda: fullest(stages(n)), None) if stages(n) else None

    def holds(n: int) -> bool:
        tried = answer(n)
        return tried is not None and demand.met(tried)

    def may_hold(n: int) -> bool | None:
        return not any(map(demand.rules_out, stages(n))) if stages(n) else None

    def has_room(n: int) -> bool:
        tried = answer(n)
        if tried is None or tried.gpu is None:
            return False
        return demand.fits_card_of(tried, tried.gpu.usable) is not False

    return _Tried(answer, holds, may_hold, has_room)


def _step(run: RunSpec, axis: str) -> int:
    """Return the step between values of the axis: completions of a trainer that generates are those of whole prompts,
    and a larger group has as many more passes."""
    if run.trainer not in GENERATING or axis not in ("batch", "generations"):
        return 1
    group, parts = estimate(run).run.batch.generations, run.batch.accumulation
    if axis == "generations":
        return group // gcd(group, parts)
    return group // gcd(group, parts * run.parallelism.dp)


def _largest(tried: _Tried, samples: int, multiple: int) -> int:
    """Return the largest value that meets the demand, see `_SAMPLING`."""
    holds = tried.holds
    low = last(tried.may_hold, 0)  # without a replay of all passes
    if low and not holds(low):
        low = last(holds, 0)
    if multiple > 1 and low:  # bisection over round values may find a larger one
        low = max(low, multiple * last(lambda n: holds(multiple * n), low // multiple))
        if low < MAX_VALUE and holds(low + 1):
            low = last(holds, low)
    if not low or low >= MAX_VALUE or not samples:
        return low
    end = last(tried.has_room, low)  # allocated bytes rule out everything beyond
    step = max(1, -(-(end - low) // samples))
    step = -(-step // multiple) * multiple if step > 1 else 1
    further = next((n for n in range(end // step * step, low, -step) if holds(n)), low)
    return low if further == low else last(holds, further)


def _largest_model(run: RunSpec, demand: Demand, calibration: Calibration | None) -> Reach:
    """Return the bundled model with most parameters that fits."""
    usable, trains = needed_gpu(run).usable, estimate(run).parameters.trainable > 0
    beyond: Estimate | None = None
    for name in by_size():
        other = run.model_copy(update={"model": name})
        if _min_weight_bytes(other, trains) > usable:
            continue
        answer = attempt(other, calibration)
        if answer is None:
            continue
        if demand.met(answer):
            return Reach("model", name, answer, beyond, "memory" if beyond or name != by_size()[0] else "models")
        beyond = answer
    return Reach("model", "", None, beyond, "memory")


def by_size() -> list[str]:
    """Return the names of the bundled models, largest first."""
    return sorted(card_names(), key=lambda name: (-int(load_card(name).card["parameters"]), name))


def smaller_models(run: RunSpec) -> Iterator[str]:
    """Yield the bundled models with fewer parameters than the run's, largest first, its own family before others."""
    model = find_model(run.model)
    total = estimate(run.model_copy(update={"gpu": None})).parameters.total
    smaller = [name for name in by_size() if int(load_card(name).card["parameters"]) < total]
    family = [name for name in smaller if load_card(name).model_type == model.model_type]
    yield from family
    yield from (name for name in smaller if name not in family)


def _min_weight_bytes(run: RunSpec, trains: bool) -> int:
    """Return a lower bound of a GPU's bytes of weights.

    Assumes four bits per parameter for quantised training, one bit for inference, and even shares for all ranks.
    """
    parameters = int(find_model(run.model).card["parameters"])
    if not trains:
        return parameters // 8 // run.parallelism.world
    total = parameters // 2 if run.method.quantization else parameters * ITEMSIZE[run.precision.weights]
    return total // run.parallelism.world


class Frontier(NamedTuple):
    """The limits of batch and sequence together.

    longest    (batch, longest sequence that fits with it), until nothing fits
    sequences  powers of two around them
    around     the answers of each batch with these sequences; None if memplan refuses the run
    """

    longest: tuple[tuple[int, int], ...]
    sequences: tuple[int, ...]
    around: tuple[tuple[Estimate | None, ...], ...]


def frontier(run: RunSpec, demand: Demand = FITS, calibration: Calibration | None = None) -> Frontier:
    """Return the frontier for batches of 1, 2, 4 and so on. Raises as `reach` does."""
    longest: list[tuple[int, int]] = []
    batch = _step(run, "batch")
    while batch <= MAX_VALUE:
        tokens = largest_sequence(changed(run, "batch", micro=batch), demand, calibration)
        if tokens < _MIN_TOKENS and longest:
            break
        longest.append((batch, tokens))
        batch *= 2
        if not tokens:
            break
    most = max(tokens for _, tokens in longest)
    sequences = tuple(1 << n for n in range(_MIN_TOKENS.bit_length() - 1, max(most, _MIN_TOKENS).bit_length() + 1))

    def answer(batch: int, tokens: int) -> Estimate | None:
        return attempt(lambda: changed(run, "batch", micro=batch, sequence=tokens), calibration)

    around = tuple(tuple(answer(batch, tokens) for tokens in sequences) for batch, _ in longest)
    return Frontier(tuple(longest), sequences, around)


_MIN_TOKENS = 128  # batches that only fit with shorter sequences are not listed


def cards_that_hold(run: RunSpec, vendor: str = "", calibration: Calibration | None = None) -> Iterator[Holding]:
    """Yield the catalogued GPUs, optionally of one vendor, that hold the run, least memory first. Evaluated lazily."""
    shares = run.rollout == "colocate"  # the card with an engine, which takes a part of any card
    alone = run.model_copy(update={"gpu": None, **({"rollout": "server", "serving": Serving()} if shares else {})})
    weights = estimate(alone).phases[0].peak  # loading needs this much on any card
    cards = sorted((gpu for gpu in all_gpus() if not any(not_on(gpu, run))), key=lambda gpu: (gpu.usable, gpu.name))
    largest = {gpu.compute_capability: gpu for gpu in cards}  # cards of one capability run the same kernels

    @cache
    def answer_on(gpu: GPU) -> Estimate | None:
        return attempt(run.model_copy(update={"gpu": gpu.name}), calibration)

    for gpu in cards:
        kind = answer_on(largest[gpu.compute_capability])
        if kind is None or gpu.usable < weights or vendor not in ("", gpu.vendor):
            continue
        # one replay decides all cards of a kind
        if calibration is None and not shares and kind.fits_card_of(gpu.usable, replayed=True):
            yield Holding(gpu, "fits")
            continue
        answer = answer_on(gpu)
        if answer is not None and answer.verdict.answer in ("fits", "tight"):
            yield Holding(gpu, answer.verdict.answer)
