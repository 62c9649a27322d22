"""The decision in four steps: full fine-tuning, LoRA, QLoRA, or the least other change. Every step is estimated."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from math import inf
from typing import Any, NamedTuple

from memplan.catalogue.profiles.costs import cost_of
from memplan.core.errors import MemplanError, SpecError
from memplan.core.units import gib
from memplan.estimate.answer import Estimate
from memplan.estimate.calibration import Calibration
from memplan.estimate.demand import FITS, Demand
from memplan.estimate.estimate import estimate
from memplan.planning.levers import ATTENTION, FIRST, sequence_of, spread, with_fields
from memplan.planning.offers import Offer, Wanted, offers
from memplan.planning.plan import Time, time_between
from memplan.planning.reach import largest_sequence, smaller_models
from memplan.spec.run import RunSpec, changed
from memplan.spec.training import Method

RANKS = (256, 128, 64, 32, 16, 8)
_MODELS = 12  # smaller models that are tried


class Choice(NamedTuple):
    """One way to run it.

    answer    the run that way, estimated
    time      of a step over as many tokens, as a multiple of full fine-tuning in pure bf16's; None where not known
    quality   what it does to the result, and `source` who says so
    """

    title: str
    answer: Estimate
    fits: bool
    time: Time | None
    quality: str
    source: str

    @property
    def run(self) -> RunSpec:
        return self.answer.asked


class Step(NamedTuple):
    """A question, its answer yes, no or not needed, and why; every way that was tried, those that fit first."""

    title: str
    question: str
    answer: str
    reason: str
    options: tuple[Choice, ...]


class Advice(NamedTuple):
    """The steps, and of the first with a way that fits the best: the one that changes the result least."""

    steps: tuple[Step, ...]
    best: Choice | None


class _Way(NamedTuple):
    """A run to be tried, what it is called, and the rows of what it costs."""

    title: str
    run: RunSpec
    costs: tuple[str, ...]


def advise(run: RunSpec, demand: Demand = FITS, calibration: Calibration | None = None) -> Advice:
    """For the run's model, batch, sequence and GPU; its method, precision and optimizer are what is advised on.

    Raises SpecError where the run names no GPU, and what `estimate` raises for the model.
    """
    if run.gpu is None:
        raise SpecError("gpu: what fits depends on it; name one", "gpu")
    plain = _plain(run)
    table = _Table(plain, demand, calibration)
    full = _step(
        "Full fine-tuning", "Can every weight be trained here?", [table.choice(way) for way in _full(plain)], demand
    )
    lora = _step("LoRA", "Can adapters be trained on 16-bit weights?", list(table.ranked(plain, "lora")), demand)
    qlora = _step("QLoRA", "Can adapters be trained on 4-bit weights?", list(table.ranked(plain, "qlora")), demand)
    steps = (full, lora, qlora)
    if any(step.answer == "yes" for step in steps):
        last = Step(_LEAST, _LEAST_QUESTION, "not needed", "an earlier step has a way that fits", ())
    else:
        last = _step(_LEAST, _LEAST_QUESTION, list(table.others(plain)), demand)
    ways = [choice for step in (*steps, last) for choice in step.options if choice.fits]
    return Advice((*steps, last), ways[0] if ways else None)


_LEAST = "The least other change"
_LEAST_QUESTION = "Which smaller model, shorter sequence, second card or rented card would do?"


def _plain(run: RunSpec) -> RunSpec:
    """Full fine-tuning in pure bf16 of the same model, batch, sequence and loop, with checkpointing."""
    parts: dict[str, Any] = {"method": "full", "precision": "bf16", "optimizer": "adamw_torch_fused"}
    run = RunSpec.model_validate({**dict(run), **parts})
    return changed(run, "kernels", checkpointing="full")


def _full(plain: RunSpec) -> Iterator[_Way]:
    amp = RunSpec.model_validate({**dict(plain), "precision": "amp"})
    yield _Way("fp32 weights under autocast, AdamW", amp, ())
    yield _Way("pure bf16, AdamW", plain, ("precision_pure",))
    eight = changed(plain, "optimizer", name="adamw_8bit")
    yield _Way("pure bf16, 8-bit AdamW", eight, ("precision_pure", "optimizer_8bit"))
    adafactor = changed(plain, "optimizer", name="adafactor")
    yield _Way("pure bf16, Adafactor", adafactor, ("precision_pure", "optimizer_adafactor"))
    host = with_fields(plain, (("parallelism.offload", {"optimizer": True}),))
    yield _Way("pure bf16, AdamW on the host", host, ("precision_pure", "offload_optimizer"))


class _Table:
    """Ways tried, each beside full fine-tuning."""

    def __init__(self, plain: RunSpec, demand: Demand, calibration: Calibration | None) -> None:
        self._demand = demand
        self._calibration = calibration
        self._plain = estimate(plain, calibration)

    def choice(self, way: _Way) -> Choice | None:
        """None where a run cannot be so."""
        try:
            answer = estimate(way.run, self._calibration)
        except MemplanError:
            return None
        rows = [cost_of(key) for key in way.costs]
        return Choice(
            way.title,
            answer,
            self._demand.met(answer),
            time_between(self._plain, answer, rows),
            "; ".join(dict.fromkeys(row.quality for row in rows)) or "none",
            "; ".join(dict.fromkeys(row.quality_source for row in rows)),
        )

    def ranked(self, plain: RunSpec, kind: str) -> Iterator[Choice | None]:
        """Adapters on all layers, on attention, and on two of its matrices: each at the highest rank that fits, or the
        lowest where none does."""
        costs = ("method_lora", "method_qlora")[: 1 + kind.startswith("q")]
        for targets, words, row in (
            ("all-linear", "all linear layers", ()),
            (ATTENTION, "attention", ("targets",)),
            (FIRST, ", ".join(FIRST), ("targets",)),
        ):
            tried: Choice | None = None
            for rank in RANKS:
                method = Method.model_validate({"kind": kind, "rank": rank, "targets": targets})
                run = plain.model_copy(update={"method": method})
                found = self.choice(_Way(f"rank {rank} on {words}", run, (*costs, *row)))
                tried = found or tried
                if found is not None and found.fits:
                    break
            yield tried

    def others(self, plain: RunSpec) -> Iterator[Choice | None]:
        """QLoRA of a smaller model, of shorter sequences, on two cards or on a rented one."""
        qlora = plain.model_copy(update={"method": Method.model_validate("qlora")})
        costs = ("method_lora", "method_qlora")
        yield self._smaller(qlora, costs)
        tokens = largest_sequence(qlora, self._demand, self._calibration)
        if tokens:
            shorter = with_fields(qlora, sequence_of(tokens).fields)
            yield self.choice(_Way(f"QLoRA with sequences of {tokens:,} tokens", shorter, (*costs, "sequence")))
        two = with_fields(qlora, spread(qlora, 2, "fsdp2"))
        yield self.choice(_Way("QLoRA on two of the card, sharded by fsdp2", two, (*costs, "more_gpus")))
        for offer in offers(qlora, _PRICED, most=1, demand=self._demand, calibration=self._calibration).offers:
            yield self.choice(_Way(f"QLoRA on {_rented(offer)}", offer.answer.asked, costs))

    def _smaller(self, qlora: RunSpec, costs: tuple[str, ...]) -> Choice | None:
        """The largest smaller model that fits, of the same family where one does; else the last that was tried."""
        found: Choice | None = None
        for name in islice(smaller_models(qlora), _MODELS):
            found = self.choice(_Way(f"QLoRA of {name}", qlora.model_copy(update={"model": name}), costs)) or found
            if found is not None and found.fits:
                break
        return found


_PRICED = Wanted(usd_per_hour=inf)


def _rented(offer: Offer) -> str:
    card = offer.gpu.title if offer.count == 1 else f"{offer.count} × {offer.gpu.title} by {offer.strategy}"
    return card if offer.price is None else f"{card}, rented from {offer.price.low:.2f} US dollars an hour"


def _step(title: str, question: str, tried: list[Choice | None], demand: Demand) -> Step:
    options = sorted((choice for choice in tried if choice is not None), key=lambda choice: not choice.fits)
    if not options:
        return Step(title, question, "no", "no such run can be", ())
    best = options[0]
    if best.fits:
        return Step(title, question, "yes", f"{best.title} {_room(best.answer)}", tuple(options))
    least = min(options, key=lambda choice: choice.answer.least)
    left = f", with {gib(demand.headroom)} to be left free" if demand.headroom else ""
    return Step(title, question, "no", f"the least, {least.title}, {_room(least.answer)}{left}", tuple(options))


def _room(answer: Estimate) -> str:
    """How much is needed of what there is, by the verdict."""
    assert answer.gpu is not None
    have = f"{gib(answer.gpu.usable)}"
    match answer.verdict.answer:
        case "fits":
            return f"uses {gib(answer.bytes.used)} of {have}"
        case "tight":
            return f"may just do with {have}"
        case _:
            return f"needs {gib(answer.bytes.used)}, and there are {have}"
