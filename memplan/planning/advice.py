"""Advice in four steps: full fine-tuning, LoRA, QLoRA, or the smallest other change. Every option is estimated."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from math import inf
from typing import TYPE_CHECKING, Any

from memplan.catalogue.profiles.costs import cost_of
from memplan.core.records import NamedTuple
from memplan.core.units import gib
from memplan.estimate.answer import Estimate
from memplan.estimate.demand import FITS, Demand
from memplan.estimate.estimate import estimate
from memplan.planning.levers import ATTENTION, FIRST, sequence_of, spread, with_fields
from memplan.planning.offers import CardFilter, Offer, offers
from memplan.planning.plan import Time, plan, time_between
from memplan.planning.reach import largest_sequence, smaller_models
from memplan.planning.trials import attempt, needed_gpu
from memplan.spec.run import RunSpec, changed
from memplan.spec.training import Method

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration

RANKS = (256, 128, 64, 32, 16, 8)
_MAX_MODELS = 12  # smaller models to try


class AdviceOption(NamedTuple):
    """One option.

    answer    the estimate of the run
    time      step time for the same number of tokens, relative to full fine-tuning in pure bf16; None if unknown
    quality   the effect on the result
    source    publication that says so
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


class AdviceStep(NamedTuple):
    """A question, its answer (yes, no or not needed), the reason, and the options tried, those that fit first."""

    title: str
    question: str
    answer: str
    reason: str
    options: tuple[AdviceOption, ...]


class Advice(NamedTuple):
    """The steps, and the best option: the first of the first step that has one that fits."""

    steps: tuple[AdviceStep, ...]
    best: AdviceOption | None


class _Option(NamedTuple):
    """A run to try, its title, and the keys of its cost rows."""

    title: str
    run: RunSpec
    costs: tuple[str, ...]


def advise(run: RunSpec, demand: Demand = FITS, calibration: Calibration | None = None) -> Advice:
    """Advise on method, precision and optimizer for the run's model, batch, sequence and GPU.

    Raises SpecError if the run names no GPU, and whatever `estimate` raises for the model.
    """
    needed_gpu(run)
    plain = _plain(run)
    table = _Table(plain, demand, calibration)
    options = [table.choice(option) for option in _full(plain)]
    tried = table.with_levers(options, _Option("pure bf16", plain, ("precision_pure",)))
    full = _step("Full fine-tuning", "Can every weight be trained here?", tried, demand)
    lora, qlora = (
        _step(title, f"Can adapters be trained on {bits}-bit weights?", table.adapters(plain, kind), demand)
        for title, bits, kind in (("LoRA", 16, "lora"), ("QLoRA", 4, "qlora"))
    )
    steps = (full, lora, qlora)
    if any(step.answer == "yes" for step in steps):
        last = AdviceStep(_OTHER, _OTHER_QUESTION, "not needed", "an earlier step has an option that fits", ())
    else:
        last = _step(_OTHER, _OTHER_QUESTION, list(table.others(plain)), demand)
    fitting = [choice for step in (*steps, last) for choice in step.options if choice.fits]
    return Advice((*steps, last), fitting[0] if fitting else None)


_OTHER = "The smallest other change"
_OTHER_QUESTION = "Which smaller model, shorter sequence, second card or rented card would do?"


def _plain(run: RunSpec) -> RunSpec:
    """Return full fine-tuning in pure bf16 with checkpointing, for the same model, batch, sequence and loop."""
    parts: dict[str, Any] = {"method": "full", "precision": "bf16", "optimizer": "adamw_torch_fused"}
    run = RunSpec.model_validate({**dict(run), **parts})
    return changed(run, "kernels", checkpointing="full")


def _full(plain: RunSpec) -> Iterator[_Option]:
    amp = RunSpec.model_validate({**dict(plain), "precision": "amp"})
    yield _Option("fp32 weights under autocast, AdamW", amp, ())
    yield _Option("pure bf16, AdamW", plain, ("precision_pure",))
    eight = changed(plain, "optimizer", name="adamw_8bit")
    yield _Option("pure bf16, 8-bit AdamW", eight, ("precision_pure", "optimizer_8bit"))
    adafactor = changed(plain, "optimizer", name="adafactor")
    yield _Option("pure bf16, Adafactor", adafactor, ("precision_pure", "optimizer_adafactor"))
    host = with_fields(plain, (("parallelism.offload", {"optimizer": True}),))
    yield _Option("pure bf16, AdamW on the host", host, ("precision_pure", "offload_optimizer"))


class _Table:
    """Estimates options, with their step time relative to full fine-tuning."""

    def __init__(self, plain: RunSpec, demand: Demand, calibration: Calibration | None) -> None:
        self._demand = demand
        self._calibration = calibration
        self._plain = estimate(plain, calibration)

    def choice(self, option: _Option) -> AdviceOption | None:
        """Return the estimated option; None if memplan refuses the run."""
        answer = attempt(option.run, self._calibration)
        if answer is None:
            return None
        rows = [cost_of(key) for key in option.costs]
        return AdviceOption(
            option.title,
            answer,
            self._demand.met(answer),
            time_between(self._plain, answer, rows),
            "; ".join(dict.fromkeys(row.quality for row in rows)) or "none",
            "; ".join(dict.fromkeys(row.quality_source for row in rows)),
        )

    def ranked(self, plain: RunSpec, kind: str) -> Iterator[AdviceOption | None]:
        """Yield adapters on all linear layers, on attention, and on q_proj and v_proj.

        Each has the highest rank that fits, or the lowest if none does.
        """
        costs = ("method_lora", "method_qlora")[: 1 + kind.startswith("q")]
        for targets, words, row in (
            ("all-linear", "all linear layers", ()),
            (ATTENTION, "attention", ("targets",)),
            (FIRST, ", ".join(FIRST), ("targets",)),
        ):
            last: AdviceOption | None = None
            for rank in RANKS:
                method = Method.model_validate({"kind": kind, "rank": rank, "targets": targets})
                run = plain.model_copy(update={"method": method})
                choice = self.choice(_Option(f"rank {rank} on {words}", run, (*costs, *row)))
                last = choice or last
                if choice is not None and choice.fits:
                    break
            yield last

    def adapters(self, plain: RunSpec, kind: str) -> list[AdviceOption | None]:
        """Return `ranked`, and if none fits the changes that make the default adapters fit."""
        method = Method.model_validate({"kind": kind, "rank": RANKS[-1]})
        costs = ("method_lora", "method_qlora")[: 1 + kind.startswith("q")]
        option = _Option(f"rank {RANKS[-1]}", plain.model_copy(update={"method": method}), costs)
        return self.with_levers(list(self.ranked(plain, kind)), option)

    def with_levers(self, tried: list[AdviceOption | None], option: _Option) -> list[AdviceOption | None]:
        """Return the options tried, and if none of them fits the mildest changes that make `option` fit."""
        if any(choice is not None and choice.fits for choice in tried) or not any(tried):
            return tried
        demand = self._demand
        found = plan(
            option.run,
            headroom=demand.headroom,
            tight=demand.tight,
            most=1,
            calibration=self._calibration,
            without=_OF_OTHER_STEPS,
        )
        if found.best is None:
            return tried
        levers = found.best.levers
        titles = ", ".join([option.title, *(lever.title for lever in levers)])
        costs = (*option.costs, *(key for lever in levers for key in lever.keys))
        return [*tried, self.choice(_Option(titles, found.best.run, costs))]

    def others(self, plain: RunSpec) -> Iterator[AdviceOption | None]:
        """Yield QLoRA with a smaller model, with shorter sequences, on two cards, and on a rented card."""
        qlora = plain.model_copy(update={"method": Method.model_validate("qlora")})
        costs = ("method_lora", "method_qlora")
        yield self._smaller(qlora, costs)
        tokens = largest_sequence(qlora, self._demand, self._calibration)
        if tokens:
            shorter = with_fields(qlora, sequence_of(tokens).fields)
            yield self.choice(_Option(f"QLoRA with sequences of {tokens:,} tokens", shorter, (*costs, "sequence")))
        two = with_fields(qlora, spread(qlora, 2, "fsdp2"))
        yield self.choice(_Option("QLoRA on two of these cards, sharded by fsdp2", two, (*costs, "more_gpus")))
        for offer in offers(qlora, _PRICED, most=1, demand=self._demand, calibration=self._calibration).offers:
            yield self.choice(_Option(f"QLoRA on {_rented(offer)}", offer.answer.asked, costs))

    def _smaller(self, qlora: RunSpec, costs: tuple[str, ...]) -> AdviceOption | None:
        """Return the largest smaller model that fits, preferring the same family; else the last one tried."""
        choice: AdviceOption | None = None
        for name in islice(smaller_models(qlora), _MAX_MODELS):
            choice = self.choice(_Option(f"QLoRA of {name}", qlora.model_copy(update={"model": name}), costs)) or choice
            if choice is not None and choice.fits:
                break
        return choice


_OF_OTHER_STEPS = ("method", "gpus", "sequence", "batch")  # groups of levers
_PRICED = CardFilter(usd_per_hour=inf)  # any card with a dated price


def _rented(offer: Offer) -> str:
    card = offer.gpu.title if offer.count == 1 else f"{offer.count} × {offer.gpu.title} by {offer.strategy}"
    return card if offer.price is None else f"{card}, rented from {offer.price.low:.2f} US dollars an hour"


def _step(title: str, question: str, tried: list[AdviceOption | None], demand: Demand) -> AdviceStep:
    options = sorted((choice for choice in tried if choice is not None), key=lambda choice: not choice.fits)
    if not options:
        return AdviceStep(title, question, "no", "no such run is possible", ())
    best = options[0]
    if best.fits:
        return AdviceStep(title, question, "yes", f"{best.title} {_room(best.answer)}", tuple(options))
    least = min(options, key=lambda choice: choice.answer.least)
    headroom = f", with {gib(demand.headroom)} to stay free" if demand.headroom else ""
    reason = f"the smallest option, {least.title}, {_room(least.answer)}{headroom}"
    return AdviceStep(title, question, "no", reason, tuple(options))


def _room(answer: Estimate) -> str:
    """Return a phrase that says how much of the card's memory is needed."""
    assert answer.gpu is not None
    have = f"{gib(answer.gpu.usable)}"
    match answer.verdict.answer:
        case "fits":
            return f"uses {gib(answer.bytes.used)} of {have}"
        case "tight":
            return f"is tight in {have}"
        case _:
            return f"needs {gib(answer.bytes.used)}, and the card has {have}"
