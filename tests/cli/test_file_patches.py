"""`memplan plan FILE`: the patch of the file, and what the file cannot say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from memplan.cli.app import app
from memplan.report.schema import plan_model
from memplan.report.text import Screen
from tests.cli.test_plan import SCHEMA
from tests.report.test_reports import conforms

COMMAND = get_command(app)
# Of each kind of file: a run that does not fit, with comments.
FILES = {
    "axolotl.yml": """# packed
base_model: qwen2-1.5b  # a small one
adapter: lora
lora_target_linear: true
sample_packing: true
attn_implementation: flash_attention_2
sequence_len: 2048
micro_batch_size: 4
""",
    "llamafactory.json": """{
    "model_name_or_path": "qwen2-1.5b",
    "finetuning_type": "full",
    "cutoff_len": 2048,
    "per_device_train_batch_size": 4
}
""",
    "trl.yaml": """model_name_or_path: qwen2-1.5b
dataset_name: mine # of texts
attn_implementation: 'eager'
max_seq_length: 1536
""",
    "trl.sh": """#!/bin/bash
trl sft --model_name_or_path qwen2-1.5b --use_peft \\
    --max_length 4096 --gradient_checkpointing false  # a run
echo done
""",
    "training_args.json": '{"model_name_or_path": "qwen2-1.5b", "optim": "adamw_torch", "num_train_epochs": 1}',
    "own.yaml": "model: qwen2-1.5b\nmethod: lora # small\nbatch: {micro: 16, sequence: 2048}\n",
}


class Ran:
    """A command's exit code and output."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *words: str) -> None:
        with pytest.raises(SystemExit) as left:
            COMMAND.main(list(words))
        self.code = left.value.code
        self.out, self.err = capsys.readouterr()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_the_written_file_gives_the_promised_answer(
    capsys: pytest.CaptureFixture[str], folder: Path, name: str
) -> None:
    ran = Ran(capsys, "plan", name, "--gpu", "3090", "--json", "--write")
    stem, _, suffix = name.partition(".")
    copy = f"{stem}.patched.{suffix}"
    assert (ran.code, ran.err) == (0, f"memplan: written to {copy}\n")
    planned = json.loads(ran.out)
    conforms(planned, SCHEMA(), SCHEMA())
    assert plan_model().validate_json(ran.out).model_dump(mode="json", exclude_unset=True) == planned
    promised = planned["patch"]["at"]
    answer = json.loads(Ran(capsys, copy, "--gpu", "3090", "--json").out)
    assert {part: answer[part] for part in promised} == promised
    assert promised["verdict"]["answer"] == "fits"
    assert planned["verdict"]["answer"] != "fits"
    assert (folder / name).read_text() == FILES[name]
    for comment in re.findall(r"\s*#.*|echo.*", FILES[name]):
        assert comment in (folder / copy).read_text()
    assert planned["patch"]["diff"].startswith(f"--- {name}\n+++ {name}\n@@ ")


def test_a_report_ends_with_the_patch(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    out = Ran(capsys, "plan", "axolotl.yml", "--gpu", "3090").out
    heading = r"^Patch of axolotl\.yml, a fused loss: fits, "
    assert re.search(heading, out, re.MULTILINE)
    assert "\n+liger_fused_linear_cross_entropy: true\n" in out
    assert "Hugging Face / TRL" not in out  # other frameworks' keys
    page = Ran(capsys, "plan", "axolotl.yml", "--gpu", "3090", "--format", "markdown").out
    assert "```diff\n--- axolotl.yml\n+++ axolotl.yml\n@@ " in page
    del folder


def test_a_terminal_shows_a_patch_in_colour() -> None:
    from memplan.report.blocks import Verbatim
    from memplan.report.display import display

    lines = ["@@ -1 +1 @@", "-a: 1", "+a: 2", " " + "x" * 200]
    text = display([Verbatim(lines, "diff")], Screen(40, True, True))
    assert re.sub(r"\x1b\[[\d;]*m", "", text).splitlines() == lines
    assert "\x1b[32m+a: 2" in text


def test_what_a_file_cannot_say_is_named(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (folder / "run.yaml").write_text(
        "model_name_or_path: qwen2-1.5b\ndataset_name: a\nuse_peft: false\nper_device_train_batch_size: 1\n"
        "dtype: bfloat16\noptim: adamw_torch_fused\n"
    )
    planned: Any = json.loads(Ran(capsys, "plan", "run.yaml", "--gpu", "3060", "--json").out)
    patch = planned["patch"]
    first = planned["proposals"][0]
    assert patch["left_out"][0]["levers"] == [lever["title"] for lever in first["levers"]]
    assert patch["left_out"][0]["reason"].startswith("no key of TRL 1.16 sets ")
    assert patch["at"]["verdict"]["answer"] == "fits"


SERVED = {
    "run.sh": ("vllm serve llama-3.1-8b --port 80\n", " --port 80 --max-model-len {longest}\n"),
    "sg.sh": ("python -m sglang.launch_server --model-path qwen2-7b --kv-cache-dtype auto --page-size 1\n", ""),
    "pod.yaml": (
        "apiVersion: v1\nspec: {containers: [{image: 'vllm/vllm-openai:v0.33.0', args: [--model=llama-3.1-8b]}]}\n",
        'args: [--model=llama-3.1-8b, "--max-model-len={longest}"]',
    ),
    "compose.yaml": (
        "services:\n  a:\n    image: vllm/vllm-openai:v0.33.0\n    command: --model llama-3.1-8b\n",
        "command: --model llama-3.1-8b --max_model_len {longest}\n",
    ),
}


@pytest.mark.parametrize("name", SERVED)
def test_an_engines_file_gets_the_longest_request_that_it_starts_with(
    capsys: pytest.CaptureFixture[str], folder: Path, name: str
) -> None:
    text, changed = SERVED[name]
    (folder / name).write_text(text)
    ran = Ran(capsys, "plan", name, "--gpu", "4090", "--json")
    planned: Any = json.loads(ran.out)
    if not changed:
        assert (ran.code, "patch" in planned) == (0, False)
        return
    longest = planned["context"]["value"]
    assert f"with serving.max_model_len (--max-model-len) {longest}" in planned["verdict"]["reason"]
    assert planned["patch"]["at"]["verdict"]["answer"] == "fits"
    assert Ran(capsys, "plan", name, "--gpu", "4090", "--write").code == 0
    copy = name.replace(".", ".patched.")
    assert changed.format(longest=longest) in (folder / copy).read_text()
    assert (Ran(capsys, name, "--gpu", "4090").code, Ran(capsys, copy, "--gpu", "4090").code) == (1, 0)


def test_a_copy_never_replaces_a_file(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (folder / "own.patched.yaml").write_text("mine")
    ran = Ran(capsys, "plan", "own.yaml", "--gpu", "3090", "--write")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "memplan: write (--write): own.patched.yaml exists already; move it away\n"
    assert (folder / "own.patched.yaml").read_text() == "mine"


def test_only_a_file_is_written(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    del folder
    only = "memplan: write (--write): only applies to a plan for the file of a run on a card\n"
    for words in (("qwen2-0.5b", "--gpu", "3090"), ("own.yaml", "--gpu", "3090", "--max", "batch"), ("own.yaml",)):
        ran = Ran(capsys, "plan", *words, "--write")
        assert (ran.code, ran.err) == (2, only)
    ran = Ran(capsys, "plan", "own.yaml", "--gpu", "b200", "--write")
    assert (ran.code, ran.err) == (0, "memplan: nothing is written: there is no patch\n")
    assert "Patch of" not in ran.out
