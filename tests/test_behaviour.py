"""Answers match `tests/golden/behaviour.txt`; each run of the suite checks a different sample of its cases.

`python -m benchmarks.behaviour` compares all of them, and `--write` accepts an intended change.
"""

from __future__ import annotations

import os
import random

import pytest

from benchmarks.behaviour import CASES, cases, digest, golden, text_of, workplace

PARTS = 4
SAMPLE = 12
# Differs between runs, but is equal in all processes of one run, so that they draw the same cases.
SEED = os.environ.get("PYTEST_XDIST_TESTRUNUID", "alone")
SLOW = ("plan ", "probe ", "--via trace", "small/", "--images", "qwen3-next", "granite-4", "jamba", "kimi", "nemotron")


def sample() -> list[str]:
    """Return the cases of this run, without slow ones."""
    return random.Random(SEED).sample([case for case in cases() if not any(word in case for word in SLOW)], SAMPLE)


def test_the_file_has_every_case_once_and_no_other() -> None:
    assert list(golden()) == list(CASES)
    assert len(set(CASES)) == len(CASES) > 260


@pytest.mark.parametrize("part", range(PARTS))
def test_a_case_gives_its_recorded_answer(part: int) -> None:
    expected = golden()
    with workplace():
        changed = [case for case in sample()[part::PARTS] if digest(text_of(case)) != expected[case]]
    assert changed == [], "answers changed; python -m benchmarks.behaviour --show prints them"
