"""Suites: the runs chosen for a card, reading suite files, and what an interrupted suite keeps."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest

import memplan
from memplan import RunSpec
from memplan.core.errors import MemplanError, ProbeError
from memplan.models.peft_methods import PEFT_METHODS
from memplan.planning.reach import largest_batch
from memplan.probe.run import process, trace
from memplan.probe.run.process import MeasuredRun
from memplan.probe.run.suite import MODELS, RECIPES, default_suite, minutes, plan, read_suite
from memplan.spec.training import MethodKind
from tests.probe.test_cuda import (
    MACHINE,
    Card3090,
    Probing,
    Ran,
    _probe,  # noqa: F401 (the fixture)
    on_card,
)
from tests.sampling import ALL
from tests.tiny import SMALLEST

CARD = "a100-sxm-80gb"  # holds most candidates, so that its suite is chosen quickly


@cache
def chosen() -> list[RunSpec]:
    return default_suite(memplan.find_gpu(CARD), largest_batch)


# --- the default suite for a card ---


@ALL
def test_the_default_suite_has_sixty_runs_of_every_method_and_loss() -> None:
    """Every method but peft's less common ones, every loss and kind of checkpointing is among a card's runs."""
    runs = chosen()
    assert len(runs) >= 60
    assert len(set(runs)) == len(runs)
    assert {run.gpu for run in runs} == {CARD}
    assert {run.method.kind for run in runs} == set(get_args(MethodKind)) - PEFT_METHODS.keys()
    assert {run.kernels.loss for run in runs} == {"hf", "chunked", "fused"}
    assert {run.kernels.checkpointing for run in runs} == {"none", "full"}
    assert {run.kernels.attention for run in runs} == {None, "eager", "sdpa_math", "sdpa_efficient"}
    assert len({run.optimizer.name for run in runs}) >= 5
    assert {run.precision.autocast for run in runs} == {True, False}


@ALL
def test_most_fit_and_a_few_are_at_the_limit() -> None:
    answers = Counter(memplan.estimate(run).verdict.answer for run in chosen())
    assert answers["fits"] >= 60
    assert 2 <= answers["does not fit"] <= 4
    for run in chosen():
        if memplan.estimate(run).verdict.answer == "does not fit":  # one sequence fewer may still fit
            fewer = run.batch.model_copy(update={"micro": run.batch.micro - 1})
            assert memplan.estimate(run.model_copy(update={"batch": fewer})).verdict.answer in ("fits", "tight")


@ALL
def test_models_reach_from_half_a_billion_parameters_to_what_the_card_holds() -> None:
    sizes = [memplan.load_card(name).card["parameters"] for name in MODELS]
    assert sizes[0] < 0.6e9
    assert sizes[-1] > 70e9
    assert {MODELS[0], MODELS[-1]} <= {str(run.model) for run in chosen()}


def test_a_card_without_bf16_gets_fp16() -> None:
    t4 = memplan.find_gpu("t4")
    assert "bf16" not in t4.native_dtypes
    from memplan.probe.run.suite import run_with

    assert run_with(MODELS[0], RECIPES[0], t4).precision.weights == "fp16"
    assert run_with(MODELS[0], RECIPES[0], memplan.find_gpu("3090")).precision.weights == "bf16"


def test_a_probe_refuses_none_of_the_recipes() -> None:
    from memplan.probe.refusals import checked_run
    from memplan.probe.run.suite import run_with

    for recipe in RECIPES:
        checked_run(run_with(MODELS[0], recipe, memplan.find_gpu("3090")))


def test_a_plan_shows_each_runs_estimate() -> None:
    gpu = memplan.find_gpu("3090")
    fine = RunSpec(model={"config": SMALLEST}, gpu="3090")
    refused = RunSpec(model={"config": SMALLEST}, gpu="3090", kernels={"compile": True})
    unknown = RunSpec(model={"config": {**SMALLEST, "model_type": "flex_olmo", "num_experts": 4}}, gpu="3090")
    planned = plan([fine, refused, unknown], gpu, 2)
    assert planned[0].answer == memplan.estimate(fine)
    assert planned[1].refused.startswith("kernels.compile: ")
    assert planned[2].refused
    parameters, tokens, rate = memplan.estimate(fine).parameters.total, 2048, gpu.bf16_tflops or 0
    seconds = 40 + parameters / 500_000_000 + 2 * 8 * parameters * tokens / (0.2 * rate * 1e12)
    assert planned[0].seconds == pytest.approx(seconds)
    assert minutes(planned) == pytest.approx((seconds + 40 + 40) / 60)


# --- suites in files ---

LINE = json.dumps({"model": {"config": SMALLEST}, "method": "lora"})


def test_a_suite_is_lines_of_json_or_yaml(tmp_path: Path) -> None:
    runs = [RunSpec(model={"config": SMALLEST}, method="lora"), RunSpec(model="qwen2-7b", gpu="3090")]
    lines = tmp_path / "suite.jsonl"
    measured = {"id": "x", "outcome": "measured", "run": {"model": "qwen2-7b", "gpu": "3090"}}
    lines.write_text(f'{{"about": "golden"}}\n{LINE}\n\n{json.dumps(measured)}\n{LINE}\n')
    assert read_suite(str(lines)) == runs
    yaml = tmp_path / "suite.yaml"
    yaml.write_text(f"runs:\n- {LINE}\n- model: qwen2-7b\n  gpu: 3090\n".replace("gpu: 3090", "gpu: '3090'"))
    assert read_suite(str(yaml)) == runs


FILES = {
    "none.jsonl": (None, "cannot be read"),
    "none.yaml": (None, "cannot be read"),
    "empty.jsonl": ("\n", "holds no runs"),
    "empty.yaml": ("runs: []", "holds no runs"),
    "one.yaml": ("model: qwen2-7b", "has no list of runs under the key runs"),
    "list.yaml": ("- model: qwen2-7b", "must be a mapping"),
    "word.jsonl": (f"{LINE}\nqwen2-7b\n", "line 2 is not JSON"),
    "cut.jsonl": (f'{LINE}\n{{"model": ', "line 2 is not JSON"),
    "field.jsonl": ('{"model": "qwen2-7b", "metod": "lora"}', "line 1: metod: no such key; did you mean method?"),
    "value.yaml": ("runs:\n- model: qwen2-7b\n- 3\n", "run 2: run: must be a mapping, not 3"),
    "latin.jsonl": (b"\xff", "is not text in UTF-8"),
}


@pytest.mark.parametrize(("name", "file"), FILES.items(), ids=FILES)
def test_an_invalid_suite_is_one_error_line(
    probe: Probing, tmp_path: Path, name: str, file: tuple[str | bytes | None, str]
) -> None:
    text, said = file
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    ran = probe("--suite", str(tmp_path / name), "--dry-run")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("\n") == 1
    assert name in ran.err
    assert said in ran.err


# --- measuring one ---


@pytest.fixture
def suite(tmp_path: Path) -> str:
    """Return a suite of three runs, with one, two and three sequences."""
    path = tmp_path / "suite.jsonl"
    batches = ({"micro": n, "sequence": 64} for n in (1, 2, 3))
    path.write_text("".join(json.dumps({"model": {"config": SMALLEST}, "batch": batch}) + "\n" for batch in batches))
    return str(path)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def batches(card: Card3090) -> list[int]:
    return [run.batch.micro for run in card.asked]


def test_every_run_is_written_as_soon_as_it_ends(
    probe: Probing, suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    there: list[int] = []

    class Watching(Card3090):
        def __call__(self, *args: Any) -> MeasuredRun:
            there.append(len(lines_of(output)) if output.exists() else 0)
            return super().__call__(*args)

    card = on_card(monkeypatch, Watching(b2="out of memory"))
    ran = probe("--suite", suite, "--cuda", "--output", str(output))
    assert (ran.code, ran.err) == (0, "")  # out of memory is a result
    assert there == [0, 1, 2]
    assert {run.gpu for run in card.asked} == {"rtx-3090"}
    found = lines_of(output)
    assert [line["outcome"] for line in found] == ["measured", "out of memory", "measured"]
    assert [RunSpec(**line["run"]) for line in found] == card.asked
    assert [line.partition(":")[0] for line in ran.out.splitlines()] == [
        f"[{n}/3] {line['id']}" for n, line in enumerate(found, 1)
    ]
    assert "out of memory in load; the out of memory" in ran.out


def test_an_interrupted_suite_resumes(
    probe: Probing, suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    on_card(monkeypatch, Card3090(b2="killed"))
    assert probe("--suite", suite, "--output", str(output)).code == 1  # a suite needs a GPU
    assert [line["outcome"] for line in lines_of(output)] == ["measured", "killed", "measured"]
    with output.open("a") as file:
        file.write('{"id": "cut off he')
    planned = probe("--suite", suite, "--dry-run", "--gpu", "3090", "--output", str(output))
    assert planned.out.count("already done") == 2
    assert "1 run to do" in planned.out
    again = on_card(monkeypatch, Card3090())
    ran = probe("--suite", suite, "--output", str(output))
    assert ran.code == 0
    assert ran.out.startswith(f"2 of 3 runs are already in {output}\n[1/1] ")
    assert batches(again) == [2]  # only the one that was killed
    assert [line["outcome"] for line in lines_of(output)] == ["measured", "killed", "measured", "measured"]


def test_a_card_that_is_gone_ends_the_suite_and_keeps_the_lines(
    probe: Probing, suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    answers = iter([MACHINE])

    def here() -> Any:
        machine = next(answers, None)
        if machine is None:
            raise MemplanError("cuda: the driver did not answer in 180 seconds", "cuda")
        return machine

    card = on_card(monkeypatch, Card3090(b2="no answer"))
    monkeypatch.setattr(process, "local_machine", here)
    ran = probe("--suite", suite, "--cuda", "--output", str(output))
    assert ran.code == 2
    assert ran.err == "memplan: cuda (--cuda): the driver did not answer in 180 seconds\n"
    assert batches(card) == [1, 2]
    assert [line["outcome"] for line in lines_of(output)] == ["measured", "no answer"]


def test_an_interrupted_suite_keeps_the_lines(
    probe: Probing, suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    measure = Card3090()

    def interrupted(*args: Any) -> MeasuredRun:
        if measure.asked:
            raise KeyboardInterrupt
        return measure(*args)

    on_card(monkeypatch, interrupted)
    assert probe("--suite", suite, "--output", str(output)).code == 130
    assert len(lines_of(output)) == 1


def test_without_a_file_rows_go_to_stdout_and_messages_to_stderr(
    probe: Probing, suite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_card(monkeypatch, Card3090())
    ran = probe("--suite", suite)
    assert [json.loads(line)["outcome"] for line in ran.out.splitlines()] == ["measured"] * 3
    assert [line[:15] for line in ran.err.splitlines()] == [f"memplan: [{n}/3] " for n in (1, 2, 3)]


def test_an_output_file_of_another_kind_is_not_touched(probe: Probing, suite: str, tmp_path: Path) -> None:
    output = tmp_path / "notes.txt"
    output.write_text("my notes\n")
    ran = probe("--suite", suite, "--output", str(output))
    assert ran.code == 2
    assert "output (--output): " in ran.err
    assert "line 1 is not JSON" in ran.err
    assert output.read_text() == "my notes\n"
    assert probe("--suite", suite, "--output", str(tmp_path)).code == 2


@ALL
def test_a_bare_suite_is_chosen_for_the_card_that_is_named(probe: Probing, monkeypatch: pytest.MonkeyPatch) -> None:
    few = chosen()[::12]
    asked: list[str] = []
    monkeypatch.setattr("memplan.probe.run.suite.default_suite", lambda gpu, _: asked.append(gpu.name) or few)
    ran = probe("--suite", "--dry-run", "--gpu", CARD)
    assert (ran.code, ran.err) == (0, "")
    assert f"{len(few)} runs to do" in ran.out
    listed = json.loads(probe("--suite", "--dry-run", "--gpu", CARD, "--json").out)
    assert asked == [CARD, CARD]
    assert [RunSpec(**one["run"]) for one in listed] == few
    assert {one["basis"] for one in listed} == {"assumed"}
    assert [one["used"] for one in listed] == [memplan.estimate(run).bytes.used for run in few]


def test_a_suite_without_a_card_asks_for_one(probe: Probing, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Any:
        raise MemplanError("cuda: no GPU is here", "cuda")

    monkeypatch.setattr(process, "local_machine", nowhere)
    ran = probe("--suite", "--dry-run")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == ("memplan: gpu: name the card that the suite is for, as in --gpu 3090 (cuda: no GPU is here)\n")


MISTAKES = {
    "--suite --rank 3": "leave out --rank",
    "--suite qwen2-7b --method lora": "leave out --method",
    "--gradients --suite": "--gradients takes one model",
    "--suite --gpu 3090 --gpu t4 --dry-run": "a suite runs on one card",
    "--suite --gpu a100-80gb --cuda": "A100",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_suites_fields_cannot_also_be_options(probe: Probing, typed: str) -> None:
    ran: Ran = probe(*typed.split())
    assert (ran.code, ran.out) == (2, "")
    assert MISTAKES[typed] in ran.err


def test_a_single_run_can_be_planned(probe: Probing) -> None:
    ran = probe("qwen2-7b", "--method", "qlora", "--gpu", "3090", "--dry-run")
    assert ran.code == 0
    assert "1 run to do (1 fits)" in ran.out


# --- tracing one ---


def test_a_suite_is_traced_into_golden_lines(
    probe: Probing, suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def traces(runs: list[RunSpec], steps: int) -> Any:
        for run in runs:
            yield traced(run) if run.batch.micro != 2 else ProbeError("probe: the step cannot be traced")

    monkeypatch.setattr(trace, "traces", traces)
    output = tmp_path / "out.jsonl"
    ran = probe("--suite", suite, "--trace", "--output", str(output))
    assert ran.code == 1
    found = lines_of(output)
    assert [line["outcome"] for line in found] == ["traced", "failed", "traced"]
    assert found[1]["said"] == "probe: the step cannot be traced"
    assert found[0]["steps"] == {
        "1": {"fwd": 40, "bwd": 60, "clip": 20, "opt": 30},
        "2": {"fwd": 50, "bwd": 70, "clip": 20, "opt": 30},
    }
    assert (found[0]["peak"], found[0]["phase"], found[0]["loaded"]) == (70, "backward", 10)
    assert RunSpec(**found[0]["run"]) == RunSpec(model={"config": SMALLEST}, batch={"micro": 1, "sequence": 64})
    assert probe("--suite", suite, "--trace", "--output", str(output)).out.startswith("2 of 3 runs are already in ")


def traced(run: RunSpec) -> trace.TracedRun:
    """Return a trace with one storage per phase, given the bytes after loading and those of each phase."""
    peaks = [("load", 0, 10), ("forward", 1, 20), ("loss", 1, 40), ("backward", 1, 60), ("clip", 1, 20)]
    peaks += [("step", 1, 30), ("forward", 2, 50), ("backward", 2, 70), ("clip", 2, 20), ("step", 2, 30)]
    storages = [trace.TracedStorage(10, 10, (5,), "bfloat16", "empty", "model", "parameter", 0, 2 * len(peaks) - 1)]
    events, phases = [0], [trace.TracedPhase("load", 0, 0, 1, 10, 0, 10)]
    for phase, step, peak in peaks[1:]:
        at = len(events)
        storages.append(
            trace.TracedStorage(peak - 10, peak - 10, (peak - 10,), "uint8", "mm", "model", "temp", at, at + 1)
        )
        events += [len(storages) - 1, ~(len(storages) - 1)]
        phases.append(trace.TracedPhase(phase, step, at, at + 2, peak, at, 10))
    return trace.TracedRun(run, tuple(storages), tuple(events), tuple(phases), 5, 5, {"torch": "2.13.0"}, 0.5)


def test_a_trace_is_shown_over_time_and_next_to_the_estimate(
    probe: Probing, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALLEST))
    monkeypatch.setattr(trace, "trace", lambda run, steps: traced(run))
    ran = probe(str(tmp_path / "config.json"), "--trace")
    assert (ran.code, ran.err) == (0, "")
    text = ran.out
    assert text.startswith("traced: <0.01 GiB at the peak, in backward 2; 0.02 GiB in torch")
    assert "█" in text
    assert "differ" in text
    assert "cuBLAS's workspaces are left out on both sides" in " ".join(text.split())
    found = json.loads(probe(str(tmp_path / "config.json"), "--trace", "--json").out)
    assert found["timeline"] == [10, 20, 10, 40, 10, 60, 10, 20, 10, 30, 10, 50, 10, 70, 10, 20, 10, 30, 10]
    assert found["categories"]["parameter"] == 10
    assert found["categories"]["temp"] == 60
    compared = {(row["phase"], row["step"]): row for row in found["compared"]}
    assert compared["backward", 2]["traced"] == 70
    del compared["load", 0]  # compared line by line only if it is the peak
    for key, row in compared.items():
        lines = [line["bytes"] for line in found["differences"] if (line["phase"], line["step"]) == key]
        assert sum(lines) == row["estimated"] - row["traced"], key


def test_a_model_without_a_stack_is_traced_without_an_estimate(
    probe: Probing, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SMALLEST, "model_type": "flex_olmo", "num_experts": 4}))
    monkeypatch.setattr(trace, "trace", lambda run, steps: traced(run))
    ran = probe(str(tmp_path / "config.json"), "--trace")
    assert ran.code == 0
    assert "- there is no estimate to compare with: " in ran.out
    found = json.loads(probe(str(tmp_path / "config.json"), "--trace", "--json").out)
    assert found["compared"] is found["differences"] is None


def test_the_plot_is_as_high_as_the_most_in_each_column() -> None:
    from memplan.report.text import Screen
    from memplan.report.trace import plot

    def drawn(*of: Any) -> list[str]:
        return ["".join(text for text, _ in line).rstrip() for line in plot(*of)]

    lines = drawn([8, 16, 4, 0], [("load", 0)], Screen(100))
    assert [line[8:] for line in lines[:8]] == [" █"] * 4 + ["██"] * 2 + ["███"] * 2
    assert lines[8] == "    GiB load"
    assert drawn([], [], Screen(100)) == []
    assert max(map(len, drawn(range(1000), [("load", 0), ("forward", 500)], Screen(60)))) <= 60
