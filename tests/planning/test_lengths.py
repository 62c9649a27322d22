"""Lengths of sequences: the longest batch, its odds, a typical batch; files of every kind, and bad ones in one line."""

from __future__ import annotations

import json
from math import isclose
from pathlib import Path
from random import Random

import pytest

from memplan.core.errors import MemplanError
from memplan.estimate.estimate import estimate
from memplan.planning.lengths import Lengths, lengths_answer, read_lengths, with_longest
from memplan.spec.run import RunSpec

RUN = RunSpec.model_validate(
    {"model": "smollm2-135m", "method": "lora", "gpu": "t4", "batch": {"micro": 4, "sequence": 2000, "accumulation": 2}}
)
UNEQUAL = Lengths((*(100,) * 990, *(1000,) * 9, 3000), "data")


def answered(lengths: Lengths, batching: str = "random", run: RunSpec = RUN):
    longest = with_longest(run, lengths, batching)
    return lengths_answer(estimate(longest), lengths, batching)


def test_the_longest_sequence_is_cut_to_the_runs_maximum() -> None:
    assert with_longest(RUN, UNEQUAL, "random").batch.sequence == 2000
    assert with_longest(RUN, UNEQUAL.cut(1500), "random").batch.sequence == 1500
    assert with_longest(RUN, UNEQUAL.cut(1500), "packed").batch.sequence == 2000


def test_random_batches_meet_the_longest_with_the_odds_of_drawing_it() -> None:
    found = answered(UNEQUAL)
    assert (found.longest, found.a_step, found.epoch) == (2000, 8, 125)
    assert isclose(found.odds, 1 - (1 - 1 / 1000) ** 8)
    assert (1 - found.odds) ** found.even_odds <= 0.5 < (1 - found.odds) ** (found.even_odds - 1)
    assert found.typical == 100
    assert found.used == estimate(with_longest(RUN, UNEQUAL.cut(100), "random")).bytes.used


def test_the_typical_batch_is_the_median_of_drawn_ones() -> None:
    drawn = Random(1)
    lengths = Lengths(tuple(sorted(drawn.randint(1, 2000) for _ in range(2000))), "data")
    longest = sorted(max(drawn.choices(lengths.sorted, k=4)) for _ in range(4001))
    assert abs(answered(lengths).typical - longest[2000]) < 60


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_full_rows_are_all_as_long(batching: str) -> None:
    found = answered(UNEQUAL, batching)
    assert (found.longest, found.typical, found.odds, found.even_odds) == (2000, 2000, 1.0, 1)


def test_grouped_batches_meet_the_longest_first() -> None:
    found = answered(UNEQUAL, "grouped")
    assert (found.longest, found.even_odds, found.typical) == (2000, 1, 100)


def test_a_run_that_does_not_fit_says_up_to_where_it_does() -> None:
    run = RUN.model_copy(update={"batch": RUN.batch.model_copy(update={"micro": 16, "sequence": 8192})})
    found = answered(Lengths((*(50,) * 99, 8192), "data"), run=run)
    assert found.fits_up_to is not None
    assert 50 < found.fits_up_to < 8192
    assert isclose(found.fatal, 1 - 0.99**32)


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("3\n1\n2\n", (1, 2, 3)),
        ("length\n10\n20\n", (10, 20)),
        ("id,tokens,x\na,7,z\nb,9,z\n", (7, 9)),
        ('{"length": 5}\n{"length": 4}\n', (4, 5)),
        ('{"input_ids": [1, 2, 3]}\n', (3,)),
        ("[1, 2]\n[1]\n", (1, 2)),
        ("\ufeff8\n\n", (8,)),
        ("# tokens\nlength\n8\n", (8,)),
    ],
)
def test_files_of_lengths_are_read(text: str, lengths: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text(text, "utf-8")
    assert read_lengths(str(path)).sorted == lengths


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no lengths"),
        ("1\nx\n", "line 2: 'x' has no number of tokens"),
        ("0\n", "line 1: 0 tokens"),
        ("99999999999\n", "tokens; a sequence has 1 to 16,777,216"),
        ("a,b\n1,2\n", "line 1: no column is one of length"),
        ('{"text": "a"}\n', "line 1: no key is one of length"),
        ("[" * 10_000, "line 1"),
        ("\x00\n", "has no lengths"),
    ],
)
def test_bad_files_are_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text(text, "utf-8")
    with pytest.raises(MemplanError, match="lengths: ") as error:
        read_lengths(str(path))
    assert said in str(error.value)


def test_percentiles_stand_for_lengths() -> None:
    lengths = read_lengths("p50=700,p99=3800,max=8192")
    assert lengths.is_sample
    assert (lengths.quantile(0.5), lengths.quantile(0.99), lengths.sorted[-1]) == (700, 3800, 8192)
    assert read_lengths("max").sorted == (2**24,)
    for wrong in ("p50=9,p99=3", "p50", "p50=x", "median=3", "no-such-file"):
        with pytest.raises(MemplanError, match="lengths: "):
            read_lengths(wrong)


def test_the_answer_is_json() -> None:
    assert json.loads(json.dumps(answered(UNEQUAL).as_dict()))["sequences"] == 1000
