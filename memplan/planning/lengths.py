"""Sequences that are not all equal: the longest batch that can occur, how soon, and what a typical one takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from memplan.core.records import NamedTuple
from memplan.estimate.answer import Estimate
from memplan.estimate.estimate import estimate
from memplan.planning.reach import largest_sequence
from memplan.spec.lengths import FULL, Lengths, batching_of, read_lengths
from memplan.spec.run import changed


class LengthsAnswer(NamedTuple):
    """The longest and a typical batch of sequences of different lengths, and the run with each.

    lengths      of the data set, as truncated to the run's sequence
    batching     random, grouped, packed or padded
    batch        sequences of one forward pass
    a_step       sequences of a step, on all GPUs
    longest      tokens a sequence of the longest batch, for which the answer holds
    typical      tokens a sequence of the batch in the middle
    odds         share of steps that have a batch as long as the longest
    even_odds    steps after which the longest has been met with odds of one half
    epoch        steps of an epoch
    used         bytes used by a typical batch
    fits_up_to   tokens a sequence that fit the card; None if the longest do, or without a card
    fatal        share of steps that have a longer batch than fits
    """

    lengths: Lengths
    batching: str
    batch: int
    a_step: int
    longest: int
    typical: int
    odds: float
    even_odds: int
    epoch: int
    used: int
    fits_up_to: int | None
    fatal: float

    def as_dict(self) -> Mapping[str, object]:
        """Return the facts as JSON has them."""
        counted = {
            "sequences": None if self.lengths.is_sample else len(self.lengths.sorted),
            "source": self.lengths.source,
        }
        return {**counted, **{name: value for name, value in self._asdict().items() if name != "lengths"}}


# Batching -> keys of run files that ask for it, of any framework: the first that is set decides.
_ASKED_BY = {
    "packed": ("sample_packing", "packing", "neat_packing"),
    "grouped": ("group_by_length",),
    "padded": ("pad_to_max_length", "pad_to_sequence_len"),
}


def batching_of_file(keys: Mapping[str, Any]) -> str:
    """Return how a run's file batches sequences, given its keys; empty if it does not say.

    >>> batching_of_file({"model": "qwen2-7b", "training_args.group_by_length": True})
    'grouped'
    """
    said = {key.rpartition(".")[2] for key, value in keys.items() if value in (True, "true", "True")}
    return next((name for name, asking in _ASKED_BY.items() if not said.isdisjoint(asking)), "")


def lengths_answer(answer: Estimate) -> LengthsAnswer | None:
    """Return how soon the batch of an answer occurs, and what a typical one takes; None for equal sequences."""
    asked = answer.asked.batch
    if asked.lengths is None:
        return None
    lengths, batching = read_lengths(asked.lengths), batching_of(dict(asked))
    run = changed(answer.asked, "batch", sequence=asked.sequence)
    longest, batch = run.batch.sequence, run.batch.micro
    cut = lengths.cut(longest)
    a_step = batch * run.batch.accumulation * run.parallelism.dp
    passes = max(1, a_step // batch)
    equal = batching in FULL
    # of a random batch the longest decides; of a grouped one all sequences are about as long
    share = 0.5 if batching == "grouped" else 0.5 ** (1 / batch)
    typical = longest if equal else cut.quantile(share)

    def odds(length: int) -> float:
        """The share of steps that have a batch with a sequence of at least that length."""
        if equal:
            return 1.0
        of_one = cut.at_least(length)
        return min(1.0, of_one * passes) if batching == "grouped" else 1 - (1 - of_one) ** a_step

    worst = odds(longest)
    epoch = max(1, math.ceil(len(cut.sorted) / a_step)) if not lengths.is_sample else 0
    even = 1 if equal or batching == "grouped" else math.ceil(math.log(0.5) / math.log(1 - worst)) if worst < 1 else 1
    shorter = changed(run, "batch", sequence=typical)
    used = answer.bytes.used if typical == longest else estimate(shorter, answer.calibration).bytes.used
    fits_up_to, fatal = None, 0.0
    if answer.verdict.answer in ("does not fit", "tight"):
        fits_up_to = largest_sequence(run, calibration=answer.calibration)
        fatal = odds(fits_up_to + 1) if fits_up_to < longest else 0.0
    return LengthsAnswer(cut, batching, batch, a_step, longest, typical, worst, even, epoch, used, fits_up_to, fatal)


def dumped(answer: Estimate) -> dict[str, Any]:
    """Return an answer as JSON has it, with its lengths if it has some."""
    found = lengths_answer(answer)
    return answer.model_dump() | ({"lengths": found.as_dict()} if found else {})
