"""Questions about running a model: does it fit, how many concurrent requests, how long a context, on how many GPUs, in
which format, how fast, and on which cards.

Every answer has been estimated in full, except the speed, which is a range (`memplan.planning.roofline`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from functools import partial
from math import inf
from typing import TYPE_CHECKING

from memplan.catalogue.hardware import token_rates
from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import find_gpu
from memplan.catalogue.profiles.engines import find_engine
from memplan.catalogue.quantization.inference_formats import UNPACKED
from memplan.catalogue.quantization.weight_formats import FormatChoice, formats
from memplan.core.errors import MemplanError, refused
from memplan.core.records import NamedTuple
from memplan.estimate.answer import Estimate
from memplan.estimate.demand import FITS, Demand
from memplan.estimate.estimate import estimate
from memplan.models.cards import find_model
from memplan.planning.cache_choices import alternative_caches
from memplan.planning.offers import ANY, CardFilter, by_list_price, has_room, wanted_cards
from memplan.planning.reach import limit
from memplan.planning.roofline import DecodingPace, Load, decode, prefill
from memplan.planning.step_time import Hourly, hourly
from memplan.planning.trials import attempt, last, needed_gpu, unless_refused
from memplan.program.serving.rank_share import bytes_on_rank
from memplan.program.serving.settings import Settings
from memplan.program.stored.weights import UNQUANTISED, StoredWeight, stored_weights
from memplan.resolve.decide import decide
from memplan.resolve.serving import resolve_serving
from memplan.spec.formats import Quantization
from memplan.spec.parallelism import Parallelism
from memplan.spec.run import RunSpec, changed

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration

DEGREES = (1, 2, 4, 8, 16)
PLACED = (1, 2, 3, 4, 8)  # numbers of GPUs to try with a device_map


class Limit(NamedTuple):
    """The largest value that the card holds, and the limit that binds.

    value   0 if none fits
    binds   memory
            positions      the model's maximum length
            max_num_seqs   the engine's limit of requests per step
            assistant      assisted generation in transformers handles one request at a time
    """

    value: int
    binds: str


class Variant(NamedTuple):
    """The run in another format or with another cache, or divided among more GPUs.

    name      the format, or the number of GPUs
    answer    the estimate; None if memplan refuses the run
    refused   why it refuses
    weights   bytes of weights on one GPU
    requests  concurrent requests of the run's length
    pace      speed with as many requests as the run has; None if unknown
    step      the format's effect on the result; None for degrees
    """

    name: str
    answer: Estimate | None
    refused: str
    fits: bool
    weights: int
    requests: int
    pace: DecodingPace | None
    step: FormatChoice | None = None


class Questions(NamedTuple):
    """The answers about a run on its card.

    requests  most concurrent requests of the run's length
    context   longest single request, prompt and new tokens together
    degrees   the run at several tensor-parallel degrees
    placed    the run with a device_map, each GPU holding some layers
    formats   the run's own weight format, then smaller ones, mildest first
    caches    caches that allow more requests than the run's own, or use less memory
    decoding  decoding speed with as many requests as the run has
    full      decoding speed with as many requests as fit
    prompt    speed until the first token
    unpaced   why the speed is unknown; else empty
    """

    answer: Estimate
    demand: Demand
    requests: Limit
    context: Limit
    degrees: tuple[Variant, ...]
    placed: tuple[Variant, ...]
    formats: tuple[Variant, ...]
    caches: tuple[Variant, ...]
    decoding: DecodingPace | None
    full: DecodingPace | None
    prompt: DecodingPace | None
    unpaced: str

    @property
    def fits(self) -> bool:
        return self.demand.starts(self.answer)

    @property
    def mildest(self) -> Variant | None:
        """The mildest format that fits; else the mildest whose requests fit, if those of the run do not."""
        smaller = () if self.demand.met(self.answer) else self.formats
        held = (choice for choice in smaller if choice.answer and self.demand.met(choice.answer))
        return next((choice for choice in self.formats if choice.fits), next(held, None))

    @property
    def fewest(self) -> Variant | None:
        """The fewest GPUs that hold the run in its own format without using the host; prefers tensor parallelism."""
        every = (*self.degrees, *self.placed)
        fitting = [choice for choice in every if choice.fits and choice.answer and not choice.answer.host_bytes]
        return min(fitting, key=lambda choice: int(choice.name), default=None)


class CardFit(NamedTuple):
    """Cards of one type that hold the run.

    tp        number of cards, dividing the run by tensor parallelism or by a device_map
    requests  most concurrent requests
    pace      decoding speed; None if unknown
    price     price per hour of all the cards; None if unknown
    """

    gpu: GPU
    tp: int
    answer: Estimate
    requests: int
    pace: DecodingPace | None
    price: Hourly | None


def questions(run: RunSpec, demand: Demand = FITS, calibration: Calibration | None = None) -> Questions:
    """Answer the questions about a run on its card.

    Raises SpecError if the run names no GPU or its task is not generate, and whatever `estimate` raises.
    """
    _check(run)
    gpu = needed_gpu(run)
    demand.check(gpu)
    answer = estimate(run, calibration)
    most = _requests(run, answer, demand, calibration)
    base = _Base(answer, most, demand, calibration)
    load, unpaced = load_of(answer)
    (tokens, new), micro = lengths(answer), run.batch.micro
    decoding = full = prompt = None
    if load is not None:
        decoding = decode(load, gpu, tokens, new, micro)
        full = decode(load, gpu, tokens, new, most.value) if most.value else None
        prompt = prefill(load, gpu, tokens)
    return Questions(
        answer,
        demand,
        most,
        _context(run, answer, demand, calibration),
        tuple(_degrees(run, base)),
        tuple(_placements(run, base)),
        tuple(_formats(run, base)),
        tuple(_caches(base)),
        decoding,
        full,
        prompt,
        unpaced,
    )


def places(run: RunSpec, wanted: CardFilter = ANY, most: int = 20, demand: Demand = FITS) -> tuple[CardFit, ...]:
    """Return up to `most` types of card that hold the run, each in the smallest number that does.

    To rent, cards with a dated price come first, cheapest first; the others follow by total memory. To own, they are
    those with a list price, in the order of `offers`.

    Raises SpecError if no card matches `wanted` or the run's task is not generate, and whatever `estimate` raises.
    """
    _check(run)
    estimate(run.model_copy(update={"gpu": None}))
    order = _by_rent
    if wanted.to == "own":
        wanted, order = wanted._replace(counts=wanted.tiers[0]), by_list_price
    queue: list[tuple[tuple[float | str, ...], _Cards, Iterator[_Cards]]] = []

    def push(choices: Iterator[_Cards]) -> None:
        cards = next(choices, None)
        if cards is not None:
            heapq.heappush(queue, (order(cards), cards, choices))

    for gpu, counts in wanted_cards(wanted, run):
        push(_priced(gpu, sorted(counts), wanted))
    fitting: list[CardFit] = []
    while queue and len(fitting) < most:
        _, cards, more = heapq.heappop(queue)
        answer = _fitting_answer(run, cards, demand, wanted)
        if answer is None:
            push(more)
            continue
        requests = _requests(answer.asked, answer, demand, None, False).value
        fitting.append(CardFit(cards.gpu, cards.count, answer, requests, _pace(answer, cards.gpu), cards.price))
    return tuple(fitting)


def most_requests(run: RunSpec, demand: Demand = FITS, calibration: Calibration | None = None) -> Limit:
    """Return the most concurrent requests of the run's length on its card. Raises as `questions` does."""
    _check(run)
    return _requests(run, estimate(run, calibration), demand, calibration)


def lengths(answer: Estimate) -> tuple[int, int]:
    """Return the prompt tokens and the generated tokens of a request."""
    batch = answer.run.batch
    if answer.serving is not None:
        return batch.sequence, int(answer.serving["context"]) - batch.sequence
    return batch.sequence, batch.new_tokens


def load_of(answer: Estimate) -> tuple[Load | None, str]:  # noqa: PLR0911 (a return for each reason)
    """Return the load that decides a run's speed, or None and the reason why it is unknown."""
    run = answer.asked
    if run.generation.assisted:
        return None, _ACCEPTANCE_UNKNOWN
    if find_engine(run.profile) is None:
        decided, model = answer.run, find_model(run.model)
        if model.is_encoder_decoder:
            return None, "no rates are known for encoder-decoder models"
        quantization, dtype = decided.method.quantization, decided.precision.weights
        if decided.generation.cache_implementation in ("quantized", "offloaded", "offloaded_static"):
            return None, f"no rate is known for reading a cache that is {decided.generation.cache_implementation}"
        if answer.host_bytes:
            return None, _HOST_LAYERS_UNKNOWN
        unpacked = quantization is None or quantization.backend in UNPACKED
        return Load(model, UNQUANTISED if unpacked else quantization, dtype, tp=run.parallelism.tp, recorded=False), ""
    s = resolve_serving(run)
    if s.draft is not None:
        return None, _ACCEPTANCE_UNKNOWN
    if s.engine.kind == "llama.cpp":
        if (s.serving.gpu_layers or 0) <= s.model.num_hidden_layers or s.serving.overrides:
            return None, _HOST_LAYERS_UNKNOWN
        return Load(s.model, s.quantization, s.dtype, s.cache_dtype, host=token_rates.REPLAY), ""
    share = _Share(s) if s.tp > 1 else None
    recorded = s.serving.cuda_graphs is not False
    return Load(s.model, s.quantization, s.dtype, s.cache_dtype, tp=s.tp, share=share, recorded=recorded), ""


_ACCEPTANCE_UNKNOWN = "how many proposed tokens are accepted depends on the text"
_HOST_LAYERS_UNKNOWN = "no rate is known for layers on the host"


class _Share(NamedTuple):
    """Callable that returns the bytes of a stored tensor on one of an engine's ranks."""

    settings: Settings

    def __call__(self, w: StoredWeight) -> int:
        return bytes_on_rank(self.settings, w)


def _check(run: RunSpec) -> None:
    if run.task != "generate":
        raise refused("task", f"requests and speed are only known for generate, not {run.task}")


class _Base(NamedTuple):
    """The answer of the run itself, its most concurrent requests, and what every variant of it is held to."""

    answer: Estimate
    most: Limit
    demand: Demand
    calibration: Calibration | None


def _requests(
    run: RunSpec, answer: Estimate, demand: Demand, calibration: Calibration | None, samples_beyond: bool = True
) -> Limit:
    """Return the most concurrent requests of the run's length; `samples_beyond` as in `limit`."""
    serving, engine = answer.serving, find_engine(run.profile)
    if serving is not None and engine is not None and engine.kind != "llama.cpp":  # llama.cpp sizes its pool by the run
        fitting, most = _largest(run, int(serving["requests"]), demand, calibration), int(serving["max_num_seqs"])
        return Limit(most, "max_num_seqs") if fitting > most else Limit(fitting, "memory")
    if run.generation.assisted:
        fits = demand.met(estimate(changed(run, "batch", micro=1), calibration))
        return Limit(1, "assistant") if fits else Limit(0, "memory")
    return Limit(*limit(run, "batch", demand, calibration, samples_beyond))


def _largest(run: RunSpec, guess: int, demand: Demand, calibration: Calibration | None) -> int:
    """Return the largest number of requests that meets the demand, searching from what the cache pool holds."""

    return last(lambda n: demand.met(estimate(changed(run, "batch", micro=n), calibration)), 0, guess + 1)


def _context(run: RunSpec, answer: Estimate, demand: Demand, calibration: Calibration | None) -> Limit:
    """Return the longest single request: the longest prompt that fits with the run's number of new tokens."""
    single = changed(run, "batch", micro=1)
    _, new = lengths(answer)
    model = find_model(run.model)
    if model.only_sequence is not None:  # the encoder accepts no other length
        total = model.only_sequence + new
        return Limit(total, "positions") if _met(single, demand, calibration) else Limit(0, "memory")
    positions = model.longest_sequence
    if positions is not None and positions > new:
        longest = changed(single, "batch", sequence=positions - new)
        if _met(longest, demand, calibration):
            return Limit(positions, "positions")
    tokens, binds = limit(single, "sequence", demand, calibration)
    return Limit(tokens + new if tokens else 0, binds)


def _met(run: RunSpec, demand: Demand, calibration: Calibration | None) -> bool:
    answer = attempt(run, calibration)
    return answer is not None and demand.met(answer)


def _degrees(run: RunSpec, base: _Base) -> Iterator[Variant]:
    return (_choice(str(tp), with_tp(run, tp), base) for tp in DEGREES)


def with_tp(run: RunSpec, tp: int) -> RunSpec:
    """Return the run with tensor parallelism over `tp` GPUs, or in llama.cpp with the layers split over them."""
    engine = find_engine(run.profile)
    if engine is not None and engine.kind == "llama.cpp":
        return run.model_copy(update={"parallelism": Parallelism(world=tp, pp=tp)})
    return run.model_copy(update={"parallelism": Parallelism(world=tp, tp=tp)})


def _placements(run: RunSpec, base: _Base) -> Iterator[Variant]:
    """Yield the run with a device_map over more and more GPUs, until one of them gets no layers.

    On one GPU that holds the run, it is the run itself.
    """
    for gpus in PLACED:
        divided = with_layers(run, gpus)
        if divided is None:
            continue
        if gpus == run.parallelism.world == 1 and base.demand.met(base.answer):
            divided = run
        decided = unless_refused(partial(decide, divided), None)
        if decided is not None and any("stay empty" in note for note in decided.notes):
            return
        yield _choice(str(gpus), divided, base)


def with_layers(run: RunSpec, gpus: int) -> RunSpec | None:
    """Return the run with its layers placed on several GPUs by a device_map; None outside transformers."""
    if find_engine(run.profile) is not None or not run.profile.startswith("transformers"):
        return None
    return run.model_copy(update={"parallelism": Parallelism(world=gpus, device_map="auto")})


def _formats(run: RunSpec, base: _Base) -> Iterator[Variant]:
    """Yield the run in its own weight format, then in each smaller one."""
    yield _choice(_format(base.answer) or f"as asked, {run.precision.weights}", run, base)
    for step in _smaller_formats(base.answer):
        yield _choice(step.format, with_format(run, step.format), base, step)


def _caches(base: _Base) -> Iterator[Variant]:
    """Yield the run with each other cache that allows more requests, or as many with less memory."""
    most = base.most.value
    for step, run in alternative_caches(base.answer):
        choice = _choice(step.format, run, base, step)
        is_smaller = choice.answer is not None and choice.answer.bytes.used < base.answer.bytes.used
        if choice.requests > most or (is_smaller and choice.requests == most):
            yield choice


def _smaller_formats(answer: Estimate) -> Iterator[FormatChoice]:
    """Yield the profile's formats that are stronger than the run's own and shrink its weights.

    Skips formats that the model cannot be stored in, or that are larger than a milder one.
    """
    run, current = answer.run, _format(answer)
    ladder = formats(run.profile, find_gpu(run.gpu).compute_capability if run.gpu else None)
    names = [step.format for step in ladder]
    model, dtype = find_model(run.model), run.precision.weights
    total = least = sum(w.bytes for w in stored_weights(model, _requested_format(run), dtype))
    for step in ladder[names.index(current) + 1 if current in names else 0 :]:
        try:
            smaller = sum(w.bytes for w in stored_weights(model, step.format, dtype))
        except MemplanError:
            continue
        if smaller < total and smaller <= least:
            least = smaller
            yield step


def mildest_format(
    answer: Estimate, demand: Demand = FITS, calibration: Calibration | None = None
) -> tuple[str, Estimate] | None:
    """Return the mildest smaller weight format that fits, and the estimate with it; None if there is none."""
    for step in _smaller_formats(answer):
        other = attempt(partial(with_format, answer.asked, step.format), calibration)
        if other is not None and demand.met(other):
            return step.format, other
    return None


def divided(answer: Estimate, calibration: Calibration | None = None) -> Estimate | None:
    """Return the estimate of a run whose replicas each hold the model, with the model divided among their GPUs; None
    if it does not fit, or has no replicas."""
    p = answer.run.parallelism
    if p.dp != p.world or p.world == 1 or answer.serving is None:
        return None
    other = attempt(lambda: with_tp(answer.asked, p.world), calibration)
    return other if other is not None and FITS.met(other) else None


def with_format(run: RunSpec, name: str) -> RunSpec:
    """Return the run with its weights stored in the named format."""
    stored = changed(run, "method", quantization=Quantization.model_validate({"format": name}))
    return changed(stored, "serving", weights=None)


def _requested_format(run: RunSpec) -> str | Quantization | None:
    return run.serving.weights or run.method.quantization


def _format(answer: Estimate) -> str:
    requested = _requested_format(answer.run)
    return requested.format if isinstance(requested, Quantization) else requested or ""


def _choice(name: str, run: RunSpec, base: _Base, step: FormatChoice | None = None) -> Variant:
    """Return the run as a variant of the base."""
    demand, calibration = base.demand, base.calibration
    try:
        is_base = run == base.answer.asked
        answer = base.answer if is_base else estimate(run, calibration)
        is_single = run.batch.micro == 1 and find_engine(run.profile) is None
        requests = base.most if is_base else _requests(run, answer, demand, calibration, False)
        if is_single and not demand.met(answer):
            requests = Limit(0, "memory")
    except MemplanError as error:
        return Variant(name, None, str(error), False, 0, 0, None, step)
    assert run.gpu is not None
    return Variant(
        name,
        answer,
        "",
        demand.starts(answer),
        weights_of(answer),
        requests.value,
        _pace(answer, find_gpu(run.gpu)),
        step,
    )


def weights_of(answer: Estimate) -> int:
    """Return the bytes of the weights on one GPU."""
    serving = answer.serving
    return int(serving["weights"]) if serving is not None else answer.categories["parameter"]


def _pace(answer: Estimate, gpu: GPU) -> DecodingPace | None:
    load, _ = load_of(answer)
    return decode(load, gpu, *lengths(answer), answer.run.batch.micro) if load is not None else None


class _Cards(NamedTuple):
    """A number of cards, and their price per hour."""

    gpu: GPU
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] (the contract's word)
    price: Hourly | None


def _priced(gpu: GPU, counts: Sequence[int], wanted: CardFilter) -> Iterator[_Cards]:
    """Yield the counts of a card that do not cost too much."""
    for count in counts:
        price = hourly(gpu, count)
        if wanted.usd_per_hour is None or (price is not None and price.low <= wanted.usd_per_hour):
            yield _Cards(gpu, count, price)


def _fitting_answer(run: RunSpec, cards: _Cards, demand: Demand, wanted: CardFilter) -> Estimate | None:
    """Return the estimate of the run on the cards, by tensor parallelism or else by a device_map; None if it does not
    fit without using the host, or leaves next to nothing free."""
    n = cards.count
    divisions = [with_tp(run, n)] if n in DEGREES else []
    divisions += [mapped for mapped in (with_layers(run, n),) if mapped is not None and n in PLACED and n > 1]
    runs = (divided.model_copy(update={"gpu": cards.gpu.name}) for divided in divisions)
    answers = (attempt(divided, if_fits=not demand.tight) for divided in runs)
    held = (a for a in answers if a is not None and demand.met(a) and not a.host_bytes)
    return next((a for a in held if has_room(a, wanted)), None)


def _by_rent(cards: _Cards) -> tuple[float | str, ...]:
    """Sort key: cheapest first, then least memory. It grows with the count."""
    return cards.price.low if cards.price else inf, cards.gpu.usable * cards.count, cards.gpu.name
