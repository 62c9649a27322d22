"""Lengths of sequences: the longest batch, its odds, a typical batch; files of every kind, and bad ones in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from math import isclose
from pathlib import Path
from random import Random

import pytest

from memplan.core.errors import MemplanError
from memplan.estimate.estimate import estimate
from memplan.planning.lengths import LengthsAnswer, dumped, lengths_answer
from memplan.planning.reach import largest_sequence
from memplan.spec.lengths import read_lengths
from memplan.spec.run import Batch, RunSpec, changed

Named = Callable[[Sequence[int]], str]
BATCH = {"micro": 4, "sequence": 2000, "accumulation": 2}
RUN = {"model": "smollm2-135m", "method": "lora", "gpu": "t4"}
UNEQUAL = (*(100,) * 990, *(1000,) * 9, 3000)


@pytest.fixture
def named(tmp_path: Path) -> Named:
    """Return what writes lengths into a file, and returns its name."""

    def write(lengths: Sequence[int]) -> str:
        path = tmp_path / "lengths.txt"
        path.write_text("\n".join(map(str, lengths)), "utf-8")
        return str(path)

    return write


def answered(lengths: str, batching: str = "random", **batch: object) -> LengthsAnswer:
    run = RunSpec.model_validate({**RUN, "batch": {**BATCH, "lengths": lengths, "batching": batching, **batch}})
    found = lengths_answer(estimate(run))
    assert found is not None
    return found


def test_the_longest_sequence_is_cut_to_the_runs_maximum() -> None:
    def sequence(lengths: str, **batch: object) -> int:
        return RunSpec.model_validate({**RUN, "batch": {**BATCH, "lengths": lengths, **batch}}).batch.sequence

    assert sequence("max") == 2000
    assert sequence("p50=100,max=1500") == 1500
    assert sequence("p50=100,max=1500", packing="padding_free") == 1500
    for full in ({"batching": "packed"}, {"batching": "padded"}, {"packing": "bfd"}):
        assert sequence("p50=100,max=1500", **full) == 2000
    assert Batch(lengths="p50=100").sequence == 100


def test_a_file_of_lengths_is_read_again(named: Named) -> None:
    for longest in (700, 900):
        assert RunSpec.model_validate({**RUN, "batch": {"lengths": named([100, longest])}}).batch.sequence == longest


def test_a_run_has_lengths_until_its_sequence_is_changed() -> None:
    run = RunSpec.model_validate({**RUN, "batch": {**BATCH, "lengths": "max=1500"}})
    assert RunSpec.model_validate(run.model_dump(mode="json")) == run
    assert changed(run, "batch", micro=8).batch == Batch(micro=8, sequence=1500, accumulation=2, lengths="max=1500")
    longer = changed(run, "batch", sequence=4000)
    assert longer.batch == Batch(micro=4, sequence=4000, accumulation=2)
    assert lengths_answer(estimate(longer)) is None
    assert largest_sequence(run) == largest_sequence(longer)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({"batch": {"lengths": "max"}, "task": "generate"}, "batch.lengths: only applies to training"),
        ({"batch": {"batching": "padded"}}, "batch.batching: only applies with batch.lengths"),
        ({"batch": {"lengths": 4}}, "batch.lengths: "),
        ({"batch": {"lengths": "max", "sequence": "long"}}, "batch.sequence: "),
        ({"batch": {"lengths": "p50"}}, "lengths: 'p50' is no percentile"),
        ({"batch": {"lengths": "max", "batching": "sorted"}}, "batch.batching: "),
    ],
)
def test_wrong_fields_are_one_line(run: dict[str, object], said: str) -> None:
    with pytest.raises(MemplanError, match=re.escape(said)):
        estimate(RunSpec.model_validate({**RUN, "method": "full", **run}))


def test_random_batches_meet_the_longest_with_the_odds_of_drawing_it(named: Named) -> None:
    found = answered(named(UNEQUAL))
    assert (found.longest, found.a_step, found.epoch) == (2000, 8, 125)
    assert isclose(found.odds, 1 - (1 - 1 / 1000) ** 8)
    assert (1 - found.odds) ** found.even_odds <= 0.5 < (1 - found.odds) ** (found.even_odds - 1)
    assert found.typical == 100
    assert found.used == estimate(RunSpec.model_validate({**RUN, "batch": {**BATCH, "sequence": 100}})).bytes.used


def test_the_typical_batch_is_the_median_of_drawn_ones(named: Named) -> None:
    drawn = Random(1)
    lengths = [drawn.randint(1, 2000) for _ in range(2000)]
    longest = sorted(max(drawn.choices(lengths, k=4)) for _ in range(4001))
    assert abs(answered(named(lengths)).typical - longest[2000]) < 60


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_full_rows_are_all_as_long(batching: str, named: Named) -> None:
    found = answered(named(UNEQUAL), batching)
    assert (found.longest, found.typical, found.odds, found.even_odds) == (2000, 2000, 1.0, 1)


def test_grouped_batches_meet_the_longest_first(named: Named) -> None:
    found = answered(named(UNEQUAL), "grouped")
    assert (found.longest, found.even_odds, found.typical) == (2000, 1, 100)


def test_a_run_that_does_not_fit_says_up_to_where_it_does(named: Named) -> None:
    found = answered(named((*(50,) * 99, 8192)), micro=16, sequence=8192)
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


def test_the_answer_is_json(named: Named) -> None:
    run = RunSpec.model_validate({**RUN, "batch": {**BATCH, "lengths": named(UNEQUAL)}})
    assert json.loads(json.dumps(dumped(estimate(run))["lengths"]))["sequences"] == 1000
    assert dumped(estimate(RunSpec.model_validate(RUN))).keys().isdisjoint({"lengths"})
