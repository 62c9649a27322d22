"""Makefiles whose recipes train or serve, and scripts that other commands start."""

from __future__ import annotations

from pathlib import Path

import pytest

from memplan.cli.run_files import is_run_file
from memplan.core.errors import SpecError
from memplan.frameworks.patching.script_text import with_processes
from memplan.frameworks.reading.makefile import is_makefile, recipes_of
from memplan.frameworks.reading.run_file import RunFile, read_command, read_run
from memplan.gate.discovery import discover

MAKEFILE = """\
SHELL := /bin/bash
MODEL ?= Qwen/Qwen2-7B  # of the Hub
GPUS := 2
ARGS = --dataset_name "a" \\
       --max_length 64
ARGS += --bf16 True
SEEN != echo 32

.PHONY: data train short

data:
\tpython prepare.py

train: data
\t@accelerate launch --num_processes $(GPUS) sft.py --model_name_or_path ${MODEL} \\
\t\t$(ARGS) --output_dir $@/$$(date) | tee $@.log

short: more ; -trl sft --model_name_or_path $(MODEL) --max_length $(SEEN) --dataset_name $(shell pwd)/a

more:
ifeq ($(GPUS),2)
\techo "$$HOME"
endif
serve-%: more
\t+vllm serve $(MODEL) --max-model-len 128
"""


def read(folder: Path, command: str = "") -> RunFile:
    """Return the run of the Makefile, or of a command that is typed next to it."""
    (folder / "Makefile").write_text(MAKEFILE)
    return read_command(command) if command else read_run(str(folder / "Makefile"))


def test_a_makefile_is_the_first_recipe_that_trains(tmp_path: Path) -> None:
    file = read(tmp_path)
    found = {origin.field: origin.value for origin in file.origins}
    assert (file.headline, file.unread) == ("Makefile: TRL 1.16, by dataset_name", ())
    assert found["model"] == "Qwen/Qwen2-7B"
    assert (found["batch.sequence"], found["parallelism.world"]) == (64, 2)
    assert next(o.why for o in file.origins if o.field == "batch.sequence") == "Makefile:15 max_length"


MADE = {
    "make train": {"batch": 64, "model": "Qwen/Qwen2-7B"},
    "make -j4 short MODEL=Qwen/Qwen2-1.5B": {"batch": 32, "model": "Qwen/Qwen2-1.5B"},
    "CUDA_VISIBLE_DEVICES=0 make ARGS='--max_length 16 --dataset_name b' train": {"batch": 16},
    "make -C .. -f runs/Makefile train": {"batch": 64},
}


@pytest.mark.parametrize("command", MADE)
def test_make_starts_the_recipe_of_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    file, expected = read(folder, command), MADE[command]
    assert file.fields["batch"]["sequence"] == expected["batch"]
    assert file.fields["model"] == expected.get("model", "Qwen/Qwen2-7B")


def test_a_target_without_a_run_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("make none", "make -f none.mk train"):
        with pytest.raises(SpecError, match=r"^the command does not train or serve; "):
            read(tmp_path, command)


def test_recipes_stay_in_their_lines() -> None:
    script = recipes_of(MAKEFILE, ["short"])
    assert len(script.split("\n")) == len(MAKEFILE.split("\n"))
    assert [line for line in script.splitlines()[10:] if line] == [
        "trl sft --model_name_or_path ${MODEL} --max_length ${SEEN} --dataset_name $(pwd)/a",
        'echo "$HOME"',
    ]


def test_makefiles_are_told_by_their_names(tmp_path: Path) -> None:
    names = ("Makefile", "GNUmakefile", "makefile", "train.mk")
    for name in names:
        (tmp_path / name).write_text(MAKEFILE)
    assert all(is_makefile(name) and is_run_file(str(tmp_path / name)) for name in names)
    assert not is_makefile("Makefile.txt")
    assert discover([tmp_path]).runs == len(names)


def test_a_patch_sets_makes_variable() -> None:
    assert with_processes(MAKEFILE, 4, 2) == MAKEFILE.replace("GPUS := 2", "GPUS := 4")


STARTED = ("bash inner.sh 32", "sbatch --export=ALL inner.sh 32", "./inner.sh 32", "bash -c 'bash -x inner.sh 32'")


@pytest.mark.parametrize("command", STARTED)
def test_a_script_that_a_command_starts_is_read(tmp_path: Path, command: str) -> None:
    inner = "#SBATCH --gres=gpu:2\ntrl sft --model_name_or_path Qwen/Qwen2-7B --dataset_name a --max_length $1\n"
    (tmp_path / "inner.sh").write_text(f"{command}\n{inner}")
    (tmp_path / "outer.sh").write_text(f"echo\n{command}\n")
    file = read_run(str(tmp_path / "outer.sh"))
    assert file.fields["batch"]["sequence"] == 32
    assert file.headline == "outer.sh: TRL 1.16, by outer.sh:2 trl sft"


def test_a_value_with_many_spaces_is_read_in_one_pass() -> None:
    assert recipes_of(f"A = x{' ' * 300_000}y # why\n").splitlines()[0] == f'A="x{" " * 300_000}y"'
