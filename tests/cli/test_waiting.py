"""Long work says on standard error what it does, and keeps what it has if it is interrupted."""

from __future__ import annotations

import os
import sys
import time

import pytest

from memplan import RunSpec
from memplan.cli import waiting
from memplan.cli.waiting import shown_while
from memplan.core.doing import note
from memplan.planning import plan as planning
from memplan.planning.search import Trials
from memplan.report.table import stacks
from memplan.report.text import Screen


def test_a_terminal_sees_what_long_work_does(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(os, "write", lambda _, text: written.append(text))
    monkeypatch.setattr(waiting, "_PATIENCE", 0.01)

    def work() -> int:
        note("estimating a\x1b[31m model")
        while not any(b"model" in text for text in written):
            time.sleep(0.01)
        return 3

    assert shown_while(work) == 3
    shown = b"".join(written).decode("ascii")
    assert "\rmemplan: estimating a\\x1b[31m model, 0 s" in shown
    assert shown.endswith(f"\r{'':79}\r")


def test_a_pipe_sees_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown_while(lambda: 0) == 0
    assert capsys.readouterr().err == ""


def test_an_interrupted_plan_keeps_the_ways_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(trials: Trials, levers: tuple[object, ...], most: int) -> list[object]:
        for lever in levers:
            trials.fits((lever,))  # pyright: ignore[reportArgumentType]
        raise KeyboardInterrupt

    monkeypatch.setattr(planning, "cheapest", interrupted)
    found = planning.plan(RunSpec(model="qwen2-0.5b", gpu="rtx-3060-12gb", batch={"micro": 4}))
    assert found.is_partial
    assert 1 <= len(found.proposals) <= 4
    assert all(proposal.answer.fits for proposal in found.proposals)


def test_interrupted_stacks_are_those_found_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    from memplan import estimate
    from memplan.planning import stacks as module

    answer = estimate(RunSpec(model="qwen2-0.5b", method="lora", gpu="3060"))
    estimated = module.attempt
    asked: list[str] = []

    def second_is_interrupted(run: RunSpec, *more: object) -> object:
        asked.append(run.profile)
        if len(asked) > 1:
            raise KeyboardInterrupt
        return estimated(run)

    monkeypatch.setattr(module, "attempt", second_is_interrupted)
    line = stacks(answer, Screen())
    assert "unsloth" in line
    assert "trl" not in line
