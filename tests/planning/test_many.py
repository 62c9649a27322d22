"""Many runs at once have the answers of one run at a time, and no run spoils the others."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest

from memplan import Estimate, MemplanError, RunSpec, card_names, estimate, estimate_many, find_model, fits, warm
from memplan.core.workers import mapped
from memplan.estimate.estimate import walk
from memplan.program.training.passes import Moments
from memplan.program.training.program import program
from memplan.spec.run import changed

RUNS = [
    RunSpec(model=model, method=method, batch={"micro": micro}, gpu=gpu)
    for model in ("qwen2-0.5b", "olmoe-1b-7b", "gemma-2-2b", "smollm2-135m")
    for method in ("full", "qlora")
    for micro, gpu in ((1, "3090"), (3, None))
]
PARTS: dict[str, dict[str, Any]] = {
    "generation": {"task": "generate"},
    "server": {"task": "generate", "profile": "vllm"},
    "pipeline": {"parallelism": {"world": 2, "pp": 2, "schedule": "gpipe"}},
    "shards": {"parallelism": {"world": 2, "dp": 2, "strategy": "zero3"}},
    "preferences": {"method": "lora", "trainer": "dpo"},
    "rollouts": {"method": "lora", "trainer": "grpo", "batch": {"micro": 8}},
}
BAD = {"model": "qwen2-0.5c"}


@pytest.mark.parametrize("processes", [None, 1, 2, 3, 50])
def test_answers_are_those_of_estimate_in_order(processes: int | None) -> None:
    found = estimate_many([*RUNS, BAD, *RUNS[:3]], processes)
    assert isinstance(found[len(RUNS)], MemplanError)
    answers = [answer for answer in found if isinstance(answer, Estimate)]
    assert answers == [estimate(run) for run in (*RUNS, *RUNS[:3])]
    for answer, run in zip(answers, (*RUNS, *RUNS[:3]), strict=True):
        assert answer.model_dump() == estimate(run).model_dump()


def test_a_bad_run_is_its_error() -> None:
    runs: list[Any] = [BAD, {"model": "gpt2", "batch": {"micro": 0}}, RUNS[0], {"modle": "gpt2"}, "gpt2", None]
    found = estimate_many(runs, 2)
    codes = [answer.code if isinstance(answer, MemplanError) else answer.verdict.answer for answer in found]
    assert codes == ["unknown_name", "invalid_value", "fits", "unknown_field", "invalid_value", "invalid_value"]
    alone: list[Any] = [BAD, RUNS[0], "gpt2", None]
    for runs in alone:
        with pytest.raises(MemplanError, match="runs: must be a list"):
            estimate_many(runs)
    assert estimate_many([]) == []
    with pytest.raises(MemplanError, match="processes: must be at least 1, not 0"):
        estimate_many(RUNS, 0)


def test_a_crash_is_an_error_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(run: RunSpec) -> Estimate:
        if run.model == "gpt2":
            raise ZeroDivisionError("in a walk")
        return estimate(run)

    monkeypatch.setattr("memplan.planning.many.estimate", crash)
    found = estimate_many([{"model": "gpt2"}, RUNS[0]], 1)
    assert isinstance(found[0], MemplanError)
    assert (found[0].code, found[1]) == ("internal", estimate(RUNS[0]))


def test_a_result_may_be_longer_than_a_pipe_holds() -> None:
    def repeated(n: int) -> bytes:
        return bytes([n]) * (n << 18)

    results: Callable[[int], bytes] = repeated
    assert mapped(results, range(1, 12), 3) == [repeated(n) for n in range(1, 12)]


def test_every_familys_answer_is_pickled() -> None:
    seen: set[str] = set()
    for name in card_names():
        model = find_model(name)
        if model.model_type in seen:
            continue
        seen.add(model.model_type)
        again = pickle.loads(pickle.dumps(model))
        assert (again, again.family) == (model, model.family)
    answer = estimate("mixtral-8x7b", method="lora")
    assert pickle.loads(pickle.dumps(answer)).model_dump() == answer.model_dump()


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_every_kind_of_run_comes_from_another_process(parts: dict[str, Any]) -> None:
    """The numbers of a pickled answer are computed again at another length, as those of the first."""
    run = RunSpec(model="qwen2-0.5b", gpu="3090", **parts)
    others = [changed(run, "batch", sequence=96), run]
    assert [a.model_dump() for a in estimate_many(others, 2) if isinstance(a, Estimate)] == [
        estimate(other).model_dump() for other in others
    ]


def test_models_are_made_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every GPU another sequence builds no program, and searches no moments that can be the peak."""
    warm(["smollm2-135m", "gpt2", RUNS[0]])  # gpt2 has 1,024 positions
    built = program.cache_info().misses
    monkeypatch.setattr(Moments, "terms", property(lambda moments: vars(moments)["terms"]))
    fits(changed(RUNS[0], "batch", sequence=160))
    assert program.cache_info().misses == built
    assert walk(RUNS[0]).peak == estimate(RUNS[0]).bytes.allocated
    with pytest.raises(MemplanError, match="unknown name"):
        warm(["smollm2-135n"])
