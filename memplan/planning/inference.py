"""The questions of those who run a model: does it fit, how many requests at once, how long a context, on how many GPUs,
in which format, how fast, and on which cards.

Every answer was estimated as it stands, but for the speed, which is a range (`memplan.planning.roofline`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from memplan.catalogue.hardware import token_rates
from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import find_gpu
from memplan.catalogue.profiles.engines import find_engine
from memplan.catalogue.quantization.inference_formats import UNPACKED
from memplan.catalogue.quantization.weight_formats import Step, formats
from memplan.core.errors import MemplanError, SpecError
from memplan.estimate.answer import Estimate
from memplan.estimate.calibration import Calibration
from memplan.estimate.demand import FITS, Demand
from memplan.estimate.estimate import estimate
from memplan.models.cards import find_model
from memplan.planning.cache_choices import others
from memplan.planning.offers import ANY, Wanted, wanted_cards
from memplan.planning.reach import reach
from memplan.planning.roofline import Load, Pace, decode, prefill
from memplan.planning.step_time import Hourly, hourly
from memplan.program.serving.rank_share import of_rank
from memplan.program.serving.settings import Settings
from memplan.program.stored.weights import UNQUANTISED, StoredWeight, stored_weights
from memplan.resolve.serving import settled
from memplan.spec.formats import Quantization
from memplan.spec.parallelism import Parallelism
from memplan.spec.run import RunSpec, changed

DEGREES = (1, 2, 4, 8, 16)
PLACED = (1, 2, 3, 4, 8)  # GPUs that a device_map is tried on


class Most(NamedTuple):
    """The most of something that the card holds: `value`, 0 where it holds none, and what ends it.

    binds   memory; positions, the model's; `max_num_seqs`, the engine's requests in one step; `assistant`, with which
            transformers generates for one at a time
    """

    value: int
    binds: str


class Choice(NamedTuple):
    """The run in another format, or divided among more GPUs, or on another card.

    name      of the format, the degree or the card
    answer    estimated; None where it cannot be so, and `refused` says why
    weights   bytes of them on one GPU
    requests  of the run's length that are answered at once
    pace      of so many requests as the run has; None where nothing is known of it
    step      what the format does to the result; None but for formats
    """

    name: str
    answer: Estimate | None
    refused: str
    fits: bool
    weights: int
    requests: int
    pace: Pace | None
    step: Step | None = None


class Questions(NamedTuple):
    """The answers about a run on its card.

    requests  at once, of the run's length; `context` of one request alone, prompt and new tokens together
    degrees   of tensor parallelism; `placed`: GPUs of one process that each have some layers
    formats   of the weights, the mildest first, the run's own before them
    caches    that hold more requests than its own, or less of the card
    decoding  with as many requests as the run has, `full` with as many as there may be; `prompt` until the first token
    unpaced   why nothing is known of the speed; else empty
    """

    answer: Estimate
    demand: Demand
    requests: Most
    context: Most
    degrees: tuple[Choice, ...]
    placed: tuple[Choice, ...]
    formats: tuple[Choice, ...]
    caches: tuple[Choice, ...]
    decoding: Pace | None
    full: Pace | None
    prompt: Pace | None
    unpaced: str

    @property
    def fits(self) -> bool:
        return self.demand.met(self.answer)

    @property
    def mildest(self) -> Choice | None:
        """The mildest format that fits."""
        return next((choice for choice in self.formats if choice.fits), None)

    @property
    def fewest(self) -> Choice | None:
        """The fewest GPUs that hold all of it in the format it was asked in; of as many those that divide every
        matrix."""
        every = (*self.degrees, *self.placed)
        found = [choice for choice in every if choice.fits and choice.answer and not choice.answer.host_bytes]
        return min(found, key=lambda choice: int(choice.name), default=None)


class Placed(NamedTuple):
    """Cards that hold the run: so many of one, `tp`, which divide it by tensor parallelism or else are `placed` layers
    on by a device_map; and what they are asked for an hour."""

    gpu: GPU
    tp: int
    answer: Estimate
    requests: int
    pace: Pace | None
    price: Hourly | None


def questions(run: RunSpec, demand: Demand = FITS, calibration: Calibration | None = None) -> Questions:
    """The answers about a run of task generate on its card. Raises SpecError where it names none, or is of another
    task, and what `estimate` raises."""
    _check(run)
    if run.gpu is None:
        raise SpecError("gpu: what fits depends on it; name one", "gpu")
    demand.check(find_gpu(run.gpu))
    answer = estimate(run, calibration)
    most = _requests(run, answer, demand, calibration)
    asked = _Asked(answer, most)
    load, unpaced = load_of(answer)
    gpu, (tokens, new), micro = find_gpu(run.gpu), lengths(answer), run.batch.micro
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
        tuple(_degrees(run, asked, demand, calibration)),
        tuple(_placements(run, asked, demand, calibration)),
        tuple(_formats(run, asked, demand, calibration)),
        tuple(_caches(asked, demand, calibration)),
        decoding,
        full,
        prompt,
        unpaced,
    )


def places(run: RunSpec, wanted: Wanted = ANY, most: int = 20, demand: Demand = FITS) -> tuple[Placed, ...]:
    """Cards that hold a run of task generate, of each the fewest, divided by tensor parallelism: those with a dated
    price first, the cheapest of them first, then by their memory in all.

    Raises SpecError where no card is as wanted, or the run is of another task, and what `estimate` raises.
    """
    _check(run)
    estimate(run.model_copy(update={"gpu": None}))
    found: list[_Place] = []
    for gpu, counts in wanted_cards(wanted):
        placed = next(_placed(run, gpu, counts, wanted, demand), None)
        found += [placed] if placed else []
    cheapest = sorted(found, key=_order)[:most]
    return tuple(
        Placed(gpu, tp, answer, _requests(answer.asked, answer, demand, None, False).value, _pace(answer, gpu), price)
        for gpu, tp, answer, price in cheapest
    )


def most_requests(run: RunSpec, demand: Demand = FITS, calibration: Calibration | None = None) -> Most:
    """The most requests of the run's length at once on its card. Raises as `questions` does."""
    _check(run)
    return _requests(run, estimate(run, calibration), demand, calibration)


def lengths(answer: Estimate) -> tuple[int, int]:
    """The tokens of a request: of its prompt, and those that are generated."""
    batch = answer.run.batch
    if answer.serving is not None:
        return batch.sequence, int(answer.serving["context"]) - batch.sequence
    return batch.sequence, batch.new_tokens


def load_of(answer: Estimate) -> tuple[Load | None, str]:
    """What an answer's run reads, for its speed; None, and why, where that is not known."""
    run = answer.asked
    if run.generation.assisted:
        return None, "how many of the proposed tokens are accepted is in the text"
    if find_engine(run.profile) is None:
        done, model = answer.run, find_model(run.model)
        if model.is_encoder_decoder:
            return None, "how fast an encoder and its decoder are is not known"
        quantization, dtype = done.method.quantization, done.precision.weights
        if done.generation.cache_implementation in ("quantized", "offloaded", "offloaded_static"):
            return None, f"how fast a cache that is {done.generation.cache_implementation} is read is not known"
        if answer.host_bytes:
            return None, "how fast layers are that the host has is not known"
        whole = quantization is None or quantization.backend in UNPACKED
        return Load(model, UNQUANTISED if whole else quantization, dtype, tp=run.parallelism.tp, recorded=False), ""
    s = settled(run)
    if s.draft is not None:
        return None, "how many of the proposed tokens are accepted is in the text"
    if s.engine.kind == "llama.cpp":
        if (s.serving.gpu_layers or 0) <= s.model.num_hidden_layers:
            return None, "how fast layers are that the host has is not known"
        return Load(s.model, s.quantization, s.dtype, s.cache_dtype, host=token_rates.REPLAY), ""
    share = _Share(s) if s.tp > 1 else None
    recorded = s.serving.cuda_graphs is not False
    return Load(s.model, s.quantization, s.dtype, s.cache_dtype, tp=s.tp, share=share, recorded=recorded), ""


class _Share(NamedTuple):
    """Bytes of a stored tensor on one of an engine's ranks."""

    settings: Settings

    def __call__(self, w: StoredWeight) -> int:
        return of_rank(self.settings, w)


def _check(run: RunSpec) -> None:
    if run.task != "generate":
        raise SpecError(f"task: requests and tokens a second are of generate, not {run.task}", "task")


class _Asked(NamedTuple):
    """The run's own answer, and the most requests that it may have at once."""

    answer: Estimate
    most: Most


def _requests(
    run: RunSpec, answer: Estimate, demand: Demand, calibration: Calibration | None, looks: bool = True
) -> Most:
    """The most requests of the run's length at once; without `looks` as `reach` finds them then."""
    serving, engine = answer.serving, find_engine(run.profile)
    if serving is not None and engine is not None and engine.kind != "llama.cpp":  # whose pool is made for the run's
        held, most = _last(run, int(serving["requests"]), demand, calibration), int(serving["max_num_seqs"])
        return Most(most, "max_num_seqs") if held > most else Most(held, "memory")
    if run.generation.assisted:
        fits = demand.met(estimate(changed(run, "batch", micro=1), calibration))
        return Most(1, "assistant") if fits else Most(0, "memory")
    found = reach(run, "batch", demand, calibration, looks)
    return Most(int(found.value), found.binds)


def _last(run: RunSpec, guess: int, demand: Demand, calibration: Calibration | None) -> int:
    """The largest number of requests that meets the demand, sought from what the pool says that it holds."""

    def holds(n: int) -> bool:
        return demand.met(estimate(changed(run, "batch", micro=n), calibration))

    low, high = 0, guess + 1
    while holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _context(run: RunSpec, answer: Estimate, demand: Demand, calibration: Calibration | None) -> Most:
    """The longest request alone: the prompt as long as it may be, the new tokens as many as were asked for."""
    alone = changed(run, "batch", micro=1)
    _, new = lengths(answer)
    model = find_model(run.model)
    if model.only_sequence is not None:  # its encoder reads no other
        whole = model.only_sequence + new
        return Most(whole, "positions") if _met(alone, demand, calibration) else Most(0, "memory")
    positions = model.longest_sequence
    if positions is not None and positions > new:
        longest = _met(changed(alone, "batch", sequence=positions - new), demand, calibration)
        if longest:
            return Most(positions, "positions")
    found = reach(alone, "sequence", demand, calibration)
    return Most(int(found.value) + new if found.value else 0, found.binds)


def _met(run: RunSpec, demand: Demand, calibration: Calibration | None) -> bool:
    try:
        return demand.met(estimate(run, calibration))
    except MemplanError:
        return False


def _degrees(run: RunSpec, asked: _Asked, demand: Demand, calibration: Calibration | None) -> Iterator[Choice]:
    for tp in DEGREES:
        divided = with_tp(run, tp)
        yield _choice(str(tp), divided, asked, demand, calibration)


def with_tp(run: RunSpec, tp: int) -> RunSpec:
    """The run on so many GPUs that divide every matrix; of llama.cpp, that have some of the layers each."""
    engine = find_engine(run.profile)
    if engine is not None and engine.kind == "llama.cpp":
        return run.model_copy(update={"parallelism": Parallelism(world=tp, pp=tp)})
    return run.model_copy(update={"parallelism": Parallelism(world=tp, tp=tp)})


def _placements(run: RunSpec, asked: _Asked, demand: Demand, calibration: Calibration | None) -> Iterator[Choice]:
    """Of one GPU, where the run fits it, the run as it was asked; of more until there are some without layers."""
    for gpus in PLACED:
        divided = with_layers(run, gpus)
        if divided is None:
            continue
        if gpus == 1 and demand.met(asked.answer):
            divided = run
        if _leaves_empty(divided, calibration):
            return
        yield _choice(str(gpus), divided, asked, demand, calibration)


def _leaves_empty(run: RunSpec, calibration: Calibration | None) -> bool:
    """Whether a device_map leaves a GPU without layers."""
    try:
        return any("stay empty" in note for note in estimate(run, calibration).notes)
    except MemplanError:
        return False


def with_layers(run: RunSpec, gpus: int) -> RunSpec | None:
    """The run on so many GPUs of one process that each have some layers; None where its profile has no such way."""
    if find_engine(run.profile) is not None or not run.profile.startswith("transformers"):
        return None
    return run.model_copy(update={"parallelism": Parallelism(world=gpus, device_map="auto")})


def _formats(run: RunSpec, asked: _Asked, demand: Demand, calibration: Calibration | None) -> Iterator[Choice]:
    """As it was asked, and in each format that comes after that and makes the weights smaller."""
    yield _choice(_format(asked.answer) or f"as asked, {run.precision.weights}", run, asked, demand, calibration)
    for step in _smaller(asked.answer):
        yield _choice(step.format, with_format(run, step.format), asked, demand, calibration, step)


def _caches(asked: _Asked, demand: Demand, calibration: Calibration | None) -> Iterator[Choice]:
    """Each cache in place of the run's own that takes less: with it more requests fit, or the run leaves more free."""
    most = asked.most.value
    for step, run in others(asked.answer):
        choice = _choice(step.format, run, asked, demand, calibration, step)
        less = choice.answer is not None and choice.answer.bytes.used < asked.answer.bytes.used
        if choice.requests > most or (less and choice.requests == most):
            yield choice


def _smaller(answer: Estimate) -> Iterator[Step]:
    """The formats of the run's profile that come after its own, where they make its weights smaller, and no larger than
    a milder one; those that the model cannot be stored in are left out."""
    run, own = answer.run, _format(answer)
    ladder = formats(run.profile, find_gpu(run.gpu).compute_capability if run.gpu else None)
    names = [step.format for step in ladder]
    model, dtype = find_model(run.model), run.precision.weights
    whole = least = sum(w.bytes for w in stored_weights(model, _asked(run), dtype))
    for step in ladder[names.index(own) + 1 if own in names else 0 :]:
        try:
            smaller = sum(w.bytes for w in stored_weights(model, step.format, dtype))
        except MemplanError:
            continue
        if smaller < whole and smaller <= least:
            least = smaller
            yield step


def mildest_format(
    answer: Estimate, demand: Demand = FITS, calibration: Calibration | None = None
) -> tuple[str, Estimate] | None:
    """Of a run that does not fit the mildest format of its weights that does, and the run in it."""
    for step in _smaller(answer):
        try:
            other = estimate(with_format(answer.asked, step.format), calibration)
        except MemplanError:
            continue
        if demand.met(other):
            return step.format, other
    return None


def with_format(run: RunSpec, name: str) -> RunSpec:
    """The run with its weights stored in that format."""
    stored = changed(run, "method", quantization=Quantization.model_validate({"format": name}))
    return changed(stored, "serving", weights=None)


def _asked(run: RunSpec) -> str | Quantization | None:
    return run.serving.weights or run.method.quantization


def _format(answer: Estimate) -> str:
    asked = _asked(answer.run)
    return asked.format if isinstance(asked, Quantization) else asked or ""


def _choice(
    name: str,
    run: RunSpec,
    asked: _Asked,
    demand: Demand,
    calibration: Calibration | None,
    step: Step | None = None,
) -> Choice:
    try:
        same = run == asked.answer.asked
        answer = asked.answer if same else estimate(run, calibration)
        one = run.batch.micro == 1 and find_engine(run.profile) is None
        none = one and not demand.met(answer)
        requests = asked.most if same else _requests(run, answer, demand, calibration, False)
        requests = Most(0, "memory") if none else requests
    except MemplanError as error:
        return Choice(name, None, str(error), False, 0, 0, None, step)
    assert run.gpu is not None
    return Choice(
        name, answer, "", demand.met(answer), weights_of(answer), requests.value, _pace(answer, find_gpu(run.gpu)), step
    )


def weights_of(answer: Estimate) -> int:
    """Bytes of the weights on one GPU."""
    serving = answer.serving
    return int(serving["weights"]) if serving is not None else answer.categories["parameter"]


def _pace(answer: Estimate, gpu: GPU) -> Pace | None:
    load, _ = load_of(answer)
    return decode(load, gpu, *lengths(answer), answer.run.batch.micro) if load is not None else None


class _Place(NamedTuple):
    """Cards that hold the run, and what they are asked for an hour."""

    gpu: GPU
    tp: int
    answer: Estimate
    price: Hourly | None


def _placed(run: RunSpec, gpu: GPU, counts: tuple[int, ...], wanted: Wanted, demand: Demand) -> Iterator[_Place]:
    """The card in every number that holds the run, the fewest first, and all of its weights."""
    price = hourly(gpu)
    for n in counts:
        whole = None if price is None else price._replace(low=price.low * n, high=price.high * n)
        if wanted.usd_per_hour is not None and (whole is None or whole.low > wanted.usd_per_hour):
            continue
        ways = [with_tp(run, n)] if n in DEGREES else []
        ways += [one for one in (with_layers(run, n),) if one is not None and n in PLACED and n > 1]
        for there in ways:
            try:
                answer = estimate(there.model_copy(update={"gpu": gpu.name}))
            except MemplanError:
                continue
            if demand.met(answer) and not answer.host_bytes:
                yield _Place(gpu, n, answer, whole)
                break


def _order(placed: _Place) -> tuple[float, int, str]:
    usd = placed.price.low if placed.price else float("inf")
    return usd, placed.gpu.usable * placed.tp, placed.gpu.name
