"""Sequences that are not all equal: the longest batch that can occur, how soon, and what a typical one takes."""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from memplan.core.errors import SpecError, UnknownNameError, printable, refused
from memplan.core.files import open_file
from memplan.core.records import NamedTuple
from memplan.estimate.answer import Estimate
from memplan.estimate.estimate import estimate
from memplan.planning.reach import largest_sequence
from memplan.spec.run import RunSpec

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration

BATCHINGS = ("random", "grouped", "packed", "padded")
_KEYS = ("length", "lengths", "tokens", "n_tokens", "num_tokens", "token_count", "seq_len", "input_length", "input_ids")
_MOST = 50_000_000  # sequences of a file
_LONGEST = 2**24  # tokens of one
_PERCENTILE = re.compile(r"(?:p(\d{1,2}(?:\.\d{1,3})?)|(max))=(\d{1,8})")
_GRID = 10_000  # sequences that stand for percentiles


class Lengths(NamedTuple):
    """The lengths of a data set's sequences, in tokens.

    sorted     every length, in ascending order
    source     what they were read from
    is_sample  whether they stand for percentiles, with straight lines in between
    """

    sorted: tuple[int, ...]
    source: str
    is_sample: bool = False

    def quantile(self, share: float) -> int:
        """Return the shortest length that at least this share of sequences does not exceed."""
        return self.sorted[min(len(self.sorted) - 1, max(0, math.ceil(share * len(self.sorted)) - 1))]

    def at_least(self, length: int) -> float:
        """Return the share of sequences with at least that many tokens."""
        return 1 - bisect_left(self.sorted, length) / len(self.sorted)

    def cut(self, longest: int) -> Lengths:
        """Return the lengths as truncated to a maximum."""
        return self._replace(sorted=tuple(min(n, longest) for n in self.sorted))


def read_lengths(said: str) -> Lengths:
    """Return the lengths that `--lengths` names: a file, `max`, or percentiles as in `p50=700,p99=3800,max=8192`.

    A file is a column of numbers, CSV with a column of token counts, or JSON lines of numbers or objects.

    Raises SpecError for anything else, with the line of a file.
    """
    if said == "max":
        return Lengths((_LONGEST,), "max")
    if "=" in said or re.fullmatch(r"p\d.*", said):
        return _percentiles(said)
    try:
        with TextIOWrapper(open_file(Path(said)), encoding="utf-8", errors="replace") as file:
            return Lengths(tuple(sorted(_of_lines(file))), said)
    except (OSError, ValueError) as error:  # ValueError: NUL in a path
        reason = getattr(error, "strerror", None) or error
        raise refused("lengths", f"{printable(said, 80)!r} cannot be read ({reason})") from None


def _percentiles(said: str) -> Lengths:
    points: dict[float, int] = {0.0: 1}
    for part in said.split(","):
        match = _PERCENTILE.fullmatch(part.strip())
        if match is None:
            raise refused(
                "lengths", f"{printable(part, 40)!r} is no percentile; write p50=700,p99=3800,max=8192, or a file"
            )
        points[100.0 if match[2] else float(match[1])] = int(match[3])
    shares, numbers = zip(*sorted(points.items()), strict=True)
    if list(numbers) != sorted(numbers) or numbers[-1] > _LONGEST:
        raise refused("lengths", "percentiles must rise, up to 16,777,216 tokens")
    if shares[-1] < 100:
        shares, numbers = (*shares, 100.0), (*numbers, numbers[-1])

    def at(percent: float) -> int:
        i = min(max(1, bisect_left(shares, percent)), len(shares) - 1)
        low, high = shares[i - 1], shares[i]
        part = (percent - low) / (high - low) if high > low else 1.0
        return round(numbers[i - 1] + part * (numbers[i] - numbers[i - 1]))

    return Lengths(tuple(at(100 * (n + 1) / _GRID) for n in range(_GRID)), said, is_sample=True)


def _of_lines(lines: Iterable[str]) -> Iterator[int]:
    column: int | None = None
    count, begins = 0, True
    for number, line in enumerate(lines, 1):
        text = line.strip().lstrip("\ufeff")
        if not text or text.startswith("#"):
            continue
        is_first, begins = begins, False
        if is_first and not text[0].isdecimal() and text[0] not in "{[":
            column = _column(text)
            continue
        length = _length(text, column, number)
        if not 1 <= length <= _LONGEST:
            raise refused("lengths", f"line {number}: {length:,} tokens; a sequence has 1 to {_LONGEST:,}")
        count += 1
        if count > _MOST:
            raise refused("lengths", f"more than {_MOST:,} sequences; give a sample, or percentiles")
        yield length
    if not count:
        raise refused("lengths", "the file has no lengths")


def _column(header: str) -> int:
    names = [name.strip().strip('"').lower() for name in re.split(r"[,;\t]", header)]
    found = [names.index(key) for key in _KEYS if key in names]
    if found or len(names) == 1:
        return found[0] if found else 0
    raise refused(
        "lengths", f"line 1: no column is one of {', '.join(_KEYS[:6])}; it has {printable(', '.join(names), 80)}"
    )


def _length(text: str, column: int | None, number: int) -> int:
    try:
        value: object = (
            json.loads(text) if text[0] in "{[" else re.split(r"[,;\t]", text)[column or 0].strip().strip('"')
        )
        if isinstance(value, dict):
            named = cast("dict[str, Any]", value)
            key = next((key for key in _KEYS if key in named), None)
            if key is None:
                raise refused("lengths", f"line {number}: no key is one of {', '.join(_KEYS)}")
            value = named[key]
        return len(cast("list[object]", value)) if isinstance(value, list) else int(cast(Any, value))
    except SpecError:
        raise
    except (ValueError, TypeError, IndexError, RecursionError):
        raise refused("lengths", f"line {number}: {printable(text, 40)!r} has no number of tokens") from None


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


def batching_of(keys: Mapping[str, Any]) -> str:
    """Return how a run's file batches sequences, given its keys; random if it does not say.

    >>> batching_of({"model": "qwen2-7b", "training_args.group_by_length": True})
    'grouped'
    """
    said = {key.rpartition(".")[2] for key, value in keys.items() if value in (True, "true", "True")}
    return next((name for name, asking in _ASKED_BY.items() if not said.isdisjoint(asking)), "random")


def with_longest(run: RunSpec, lengths: Lengths, batching: str) -> RunSpec:
    """Return the run with the longest sequence that can occur: `batch.sequence` is the maximum that they are cut to."""
    if batching not in BATCHINGS:
        raise UnknownNameError("batching", batching, BATCHINGS)
    if run.task != "train":
        raise refused("lengths", f"only applies to training, not to task {run.task}")
    if batching in ("packed", "padded"):
        return run
    longest = min(run.batch.sequence, lengths.sorted[-1])
    return run.model_copy(update={"batch": run.batch.model_copy(update={"sequence": longest})})


def lengths_answer(
    answer: Estimate, lengths: Lengths, batching: str, calibration: Calibration | None = None
) -> LengthsAnswer:
    """Return how soon the batch of an answer occurs, and what a typical one takes. `answer` is of `with_longest`."""
    run = answer.asked
    longest, batch = run.batch.sequence, run.batch.micro
    cut = lengths.cut(longest)
    a_step = batch * run.batch.accumulation * run.parallelism.dp
    passes = max(1, a_step // batch)
    equal = batching in ("packed", "padded")
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
    shorter = run.model_copy(update={"batch": run.batch.model_copy(update={"sequence": typical})})
    used = answer.bytes.used if typical == longest else estimate(shorter, calibration).bytes.used
    fits_up_to, fatal = None, 0.0
    if answer.verdict.answer in ("does not fit", "tight"):
        fits_up_to = largest_sequence(run, calibration=calibration)
        fatal = odds(fits_up_to + 1) if fits_up_to < longest else 0.0
    return LengthsAnswer(cut, batching, batch, a_step, longest, typical, worst, even, epoch, used, fits_up_to, fatal)
