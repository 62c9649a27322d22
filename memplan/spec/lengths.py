"""Lengths of a data set's sequences, in tokens: read from a file, or from percentiles."""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from io import TextIOWrapper
from pathlib import Path
from typing import Any, cast

from memplan.core.errors import SpecError, printable, refused
from memplan.core.files import are_given, open_file
from memplan.core.records import NamedTuple

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
    """Return the lengths that `batch.lengths` names: a file, `max`, or percentiles as in `p50=700,p99=3800,max=8192`.

    A file is a column of numbers, CSV with a column of token counts, or JSON lines of numbers or objects.

    Raises SpecError for anything else, with the line of a file.
    """
    if said == "max":
        return Lengths((_LONGEST,), "max")
    if "=" in said or re.fullmatch(r"p\d.*", said):
        return _percentiles(said)
    try:
        return _of_text(said) if are_given() else _of_file(said, _version(Path(said)))
    except (OSError, ValueError) as error:  # ValueError: NUL in a path
        reason = getattr(error, "strerror", None) or error
        raise refused("batch.lengths", f"{printable(said, 80)!r} cannot be read ({reason})") from None


def _version(path: Path) -> tuple[int, int]:
    """Return what changes when a file is written; a pipe is read once."""
    if not path.is_file():
        return 0, 0
    status = path.stat()
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=1)  # a plan makes hundreds of runs of one file
def _of_file(name: str, version: tuple[int, int]) -> Lengths:
    del version
    return _of_text(name)


def _of_text(name: str) -> Lengths:
    with TextIOWrapper(open_file(Path(name)), encoding="utf-8", errors="replace") as file:
        return Lengths(tuple(sorted(_of_lines(file))), name)


@lru_cache(maxsize=4)
def _percentiles(said: str) -> Lengths:
    points: dict[float, int] = {0.0: 1}
    for part in said.split(","):
        match = _PERCENTILE.fullmatch(part.strip())
        if match is None:
            raise refused(
                "batch.lengths", f"{printable(part, 40)!r} is no percentile; write p50=700,p99=3800,max=8192, or a file"
            )
        points[100.0 if match[2] else float(match[1])] = int(match[3])
    shares, numbers = zip(*sorted(points.items()), strict=True)
    if list(numbers) != sorted(numbers) or numbers[-1] > _LONGEST:
        raise refused("batch.lengths", "percentiles must rise, up to 16,777,216 tokens")
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
            raise refused("batch.lengths", f"line {number}: {length:,} tokens; a sequence has 1 to {_LONGEST:,}")
        count += 1
        if count > _MOST:
            raise refused("batch.lengths", f"more than {_MOST:,} sequences; give a sample, or percentiles")
        yield length
    if not count:
        raise refused("batch.lengths", "the file has no lengths")


def _column(header: str) -> int:
    names = [name.strip().strip('"').lower() for name in re.split(r"[,;\t]", header)]
    found = [names.index(key) for key in _KEYS if key in names]
    if found or len(names) == 1:
        return found[0] if found else 0
    raise refused(
        "batch.lengths", f"line 1: no column is one of {', '.join(_KEYS[:6])}; it has {printable(', '.join(names), 80)}"
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
                raise refused("batch.lengths", f"line {number}: no key is one of {', '.join(_KEYS)}")
            value = named[key]
        return len(cast("list[object]", value)) if isinstance(value, list) else int(cast(Any, value))
    except SpecError:
        raise
    except (ValueError, TypeError, IndexError, RecursionError):
        raise refused("batch.lengths", f"line {number}: {printable(text, 40)!r} has no number of tokens") from None


def with_longest(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a batch's fields with the longest sequence that can occur: `sequence` is what the lengths are cut to.

    Packed rows, and sequences padded to the maximum, are all as long as that.
    """
    if batching_of(batch) in FULL or type(batch["sequence"]) is not int:
        return batch
    return {**batch, "sequence": min(batch["sequence"], read_lengths(batch["lengths"]).sorted[-1])}


def batching_of(batch: Mapping[str, Any]) -> str:
    """Return how a batch's sequences are put together: as it says, else packed if the run packs, else random."""
    packs = batch.get("packing") not in (None, "padding_free")
    return batch.get("batching") or ("packed" if packs else "random")


FULL = ("packed", "padded")
