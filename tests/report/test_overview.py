"""The first screen of an answer: one screen of a terminal, whose rows sum to the used memory and whose commands run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memplan import Estimate, RunSpec, estimate
from memplan.cli.plain import run_plain
from memplan.report import render
from memplan.report.next_steps import ways
from memplan.report.overview import CommandLine, rows, with_options
from memplan.report.table import stacks
from memplan.report.text import Screen, width_of
from tests.sampling import sampled

ROOT = Path(__file__).parents[2]
# What is typed after `memplan`, one of each kind of answer.
VLLM = "llama-3.3-70b --method generate --profile vllm"
LINES = (
    "qwen3-8b --method qlora --gpu 4060ti-16gb",
    "qwen3-8b --method lora --gpu rtx-3090 --no-gradient-checkpointing",
    "qwen2-7b --gpu 3090",
    "qwen2-0.5b --method lora",
    "smollm2-135m --gpu 3060 --batch-size 4 --seq-len 512",
    "qwen3-8b --method generate --gpu 3090",
    "qwen3-32b --method generate --gpu 3090",
    "qwen3-32b --method generate --profile vllm-0.33 --gpu h100",
    "gpt-oss-20b --method generate --profile llama.cpp --gpu 3090",
    "llama-3.1-8b --gpu h100 --gpus 8 --fsdp fsdp2",
    "bert-base-uncased --method lora",
    "deepseek-v3 --gpu h100",
    "llama-3.1-8b --method generate --gpu 2x3090",
    "qwen2-7b --gpu 8xa100-40gb",
    f"{VLLM} --gpu 4xa100",
)
FULL = "llama-3.3-70b --method full"
DIVIDED = {
    "qwen2-7b --gpu 8xa100-40gb": "qwen2-7b --gpu 8xa100-40gb --fsdp fsdp2",
    f"{FULL} --zero 3 --gpu 8x4090": f"{FULL} --zero 3 --gpu 8x4090 --offload parameters,optimizer",
    f"{VLLM} --gpu 4xa100": f"{VLLM} --gpu 4xa100 --tp 4",
    f"{FULL} --gpu 8xh100": f"{FULL} --gpu 8xh100 --zero 3 --offload parameters,optimizer",
}
every_line = pytest.mark.parametrize("line", sampled(list(LINES)))


def printed(line: str, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int | None, str]:
    code = run_plain([*shlex.split(line), *more])
    return code, capsys.readouterr().out


@pytest.fixture(autouse=True)
def _terminal_of_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


def answer_of(**fields: Any) -> Estimate:
    return estimate(RunSpec.model_validate(fields))


QLORA = answer_of(model="qwen3-8b", method="qlora", gpu="rtx-3090")
ANSWERS = {
    "qlora": QLORA,
    "full": answer_of(model="qwen2-7b", gpu="3090"),
    "without a card": answer_of(model="qwen2-7b", method="lora"),
    "generate": answer_of(model="qwen3-8b", task="generate", gpu="3090"),
    "vLLM": answer_of(model="qwen3-8b", task="generate", profile="vllm", gpu="3090"),
    "llama.cpp": answer_of(model="gpt-oss-20b", task="generate", profile="llama.cpp", gpu="3090"),
    "sharded": answer_of(model="qwen2-7b", parallelism={"world": 4, "dp": 4, "strategy": "fsdp2"}, gpu="a100"),
}


@every_line
def test_the_first_screen_fits_eighty_by_twenty_four_and_its_commands_run(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cards are named only without one."""
    code, text = printed(line, capsys)
    shown = text.splitlines()
    assert len(shown) <= 24
    assert [one for one in shown if len(one) > 80 and not one.startswith("  memplan ")] == []
    assert ("held by" in text) == ("--gpu" not in line)
    commands = re.findall(r"^  memplan (.*)$", text, re.M)
    assert sorted(commands[-1].split()) == sorted(f"{line} --details".split())
    for command in commands:
        announced = code if command == commands[-1] else 0
        assert (command, printed(command, capsys)[0]) == (command, announced)


@pytest.mark.parametrize("name", ["qlora", "full"])
def test_a_terminal_has_room_for_the_other_stacks(name: str) -> None:
    to = Screen(80, True)
    line = CommandLine("qwen3-8b --method qlora", "--gpu rtx-3090")
    text = render("table", [ANSWERS[name]], to=to, details=False, line=line) + stacks(ANSWERS[name], to)
    assert "same run in" in text
    assert len(text.splitlines()) <= 24


def test_a_card_that_the_name_may_mean_is_proposed_first() -> None:
    found = {gpu: ways(answer_of(model="qwen3-8b", method="qlora", gpu=gpu))[-1] for gpu in ("4060ti", "rtx-4060")}
    assert found["4060ti"].text == "GeForce RTX 4060 Ti 16GB (15.6 GiB usable), which 4060ti may mean"
    assert found["4060ti"].options == "--gpu rtx-4060-ti-16gb"
    assert found["rtx-4060"].text == "Tesla T4 (14.6 GiB usable), the smallest NVIDIA card that holds it"


def test_a_change_that_only_a_file_can_say_is_not_proposed() -> None:
    engine = {"memory_utilization": 0.9, "max_model_len": 1024}  # no option takes the length back
    batch = {"micro": 6, "sequence": 256, "new_tokens": 768, "generations": 6}
    run = {"trainer": "grpo", "reference": "none", "rollout": "colocate", "profile": "trl-1.15", "serving": engine}
    answer = answer_of(model="llama-3.1-8b", method="qlora", gpu="t4", batch=batch, **run)
    assert [way.text for way in ways(answer) if "uses" in way.text] == []
    assert [row.why for row in rows(answer) if row.key == "kv"] == ["vLLM's KV cache"]  # bytes, no tensor of a dtype


def test_other_stacks_take_what_their_own_profiles_take() -> None:
    line = " ".join(stacks(QLORA, Screen()).split())
    for profile in ("unsloth-2026.10", "trl-1.15", "axolotl-0.21", "llamafactory-0.9.5", "ms-swift-4.6"):
        used = answer_of(model="qwen3-8b", method="qlora", gpu="rtx-3090", profile=profile).bytes.used
        assert f"{profile} {used / 2**30:.1f}" in line
    assert "transformers" not in line


def test_the_first_line_has_the_question_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    _, text = printed("qwen2-7b --gpu 3090", capsys)
    assert text.splitlines()[0] == "DOES NOT FIT  full fine-tuning of qwen2-7b on GeForce RTX 3090"


def test_a_step_of_memory_within_the_free_part_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    _, text = printed("qwen3-8b --method qlora --gpu 4060ti-16gb", capsys)
    asked = {"model": "qwen3-8b", "method": "qlora", "gpu": "rtx-4060-ti-16gb"}
    now, more = (answer_of(**asked, batch={"sequence": tokens}) for tokens in (2048, 2304))
    step = (more.bytes.used - now.bytes.used) / 2**30
    assert more.verdict.answer != "fits"
    assert f"fewer than 256 tokens more: they take {step:.1f} GiB" in text


@pytest.mark.parametrize(("line", "first"), DIVIDED.items(), ids=DIVIDED.keys())
def test_replicas_that_do_not_fit_are_divided_on_as_many_gpus(
    line: str, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, text = printed(line, capsys)
    assert re.findall(r"^  memplan (.*)$", text, re.M)[0] == first
    assert ("context and left free" in text) == line.startswith(VLLM)
    says_host = re.search(r"\(uses [\d.]+ GiB, and [\d,.]+ on the host\)", " ".join(text.split()))
    assert bool(says_host) == ("--offload" in first)


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
def test_the_rows_sum_to_the_used_memory(answer: Estimate) -> None:
    shares = rows(answer)
    assert sum(row.bytes for row in shares) == answer.bytes.used
    assert all(row.bytes > 0 for row in shares)
    sizes = [row.bytes for row in shares[:-1]]
    assert sizes == sorted(sizes, reverse=True)


def test_a_saving_is_the_difference_of_two_peaks() -> None:
    found = {row.key: row for row in with_options(QLORA, rows(QLORA), 9)}
    assert found["weights"].option == "--kbit-preparation false"
    assert found["loss"].option == "--loss fused"
    fused = answer_of(model="qwen3-8b", method="qlora", gpu="rtx-3090", kernels={"loss": "fused"})
    assert found["loss"].saves == QLORA.bytes.allocated - fused.bytes.allocated
    assert found["optimizer"].option == ""  # less than a twentieth of the memory


def test_a_terminal_shows_what_each_option_saves_and_wraps_within_its_indent() -> None:
    text = re.sub(r"\x1b\[[\d;]*m", "", render("table", [QLORA], to=Screen(80, True), details=False))
    options = [row for row in with_options(QLORA, rows(QLORA), 9) if row.saves]
    assert len(options) == 3
    for row in options:
        assert re.search(rf"{row.option} +{row.saves / 2**30:.1f}$", text, re.MULTILINE)
    assert re.search(r"^  1 x 2,048 tokens,.*\n  checkpointing, transformers-5$", text, re.MULTILINE)


def test_a_short_answer_computes_no_saving_that_needs_other_operations() -> None:
    found = {row.key: row for row in with_options(QLORA, rows(QLORA))}
    assert (found["loss"].option, found["loss"].saves) == ("--loss fused", 0)
    assert found["activations"].saves > 0  # another length is the same operations


def test_plain_has_words_and_numbers_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    for more in ((), ("--details",), ("--explain",)):
        _, text = printed(LINES[0], capsys, "--plain", *more)
        assert not set(text) & set("█▓▒░│├┤─\x1b")
        assert text.startswith("FITS  QLoRA of qwen3-8b on GeForce RTX 4060 Ti 16GB\n")


def test_letters_that_take_two_columns_are_counted_as_two() -> None:
    assert [width_of(text) for text in ("abc", "千问", "é", "e\u0301")] == [3, 4, 1, 1]


ENVIRONMENTS: dict[str, dict[str, str]] = {
    "colour in a pipe": {"FORCE_COLOR": "1"},
    "ten columns": {"COLUMNS": "10"},
    "no columns": {"COLUMNS": "0"},
    "forty columns": {"COLUMNS": "40"},
    "a wrong number of columns": {"COLUMNS": "wide"},
    "a dumb terminal": {"TERM": "dumb"},
    "no colour": {"NO_COLOR": "1"},
    "no locale": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    "ten columns in colour": {"COLUMNS": "10", "FORCE_COLOR": "1"},
}


@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
def test_any_environment_gets_an_answer(environment: dict[str, str]) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR", "NO_COLOR")}
    command = [sys.executable, "-m", "memplan", "smollm2-135m", "--gpu", "3060"]
    env = {**kept, "PYTHONPATH": str(ROOT), **environment}
    ran = subprocess.run(command, env=env, capture_output=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert b"FITS" in ran.stdout
    assert (b"\x1b[" in ran.stdout) == ("FORCE_COLOR" in environment)


def test_a_reader_that_stops_reading_ends_the_command() -> None:
    command = f"{shlex.quote(sys.executable)} -m memplan smollm2-135m --gpu 3060 | head -1; exit ${{PIPESTATUS[0]}}"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    closed = subprocess.run(
        ["bash", "-c", f"{shlex.quote(sys.executable)} -m memplan smollm2-135m --gpu 3060 >&-"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (closed.returncode, closed.stderr) == (0, "")
