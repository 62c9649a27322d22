"""Run files of a team, for the tests of the gate."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.main import get_command

from memplan.cli.app import app

COMMAND = get_command(app)

AXOLOTL = """base_model: qwen2-1.5b
adapter: qlora
load_in_4bit: true
lora_r: 16
lora_alpha: 32
lora_target_linear: true
sequence_len: 2048
micro_batch_size: 2
gradient_accumulation_steps: 4
optimizer: adamw_torch_fused
bf16: true
gradient_checkpointing: true
"""
LLAMAFACTORY = """model_name_or_path: qwen2-1.5b
stage: sft
finetuning_type: lora
lora_rank: 8
lora_target: all
cutoff_len: 1024
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
bf16: true
"""
TRL = """#!/bin/bash
trl sft --model_name_or_path qwen2-1.5b --use_peft --lora_r 16 \\
  --max_length 1024 \\
  --per_device_train_batch_size 2 \\
  --gradient_checkpointing true
"""
OWN = """model: qwen2-1.5b
method: lora
batch:
  micro: 2
  sequence: 1024
kernels:
  checkpointing: full
"""
BUDGET = """[[budget]]
runs = ["configs/*.yaml"]
gpu = ["3090", "a100-40gb"]
"""


def write(folder: Path, files: Mapping[str, str]) -> Path:
    """Write files by their paths, and return the folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def git(folder: Path, *words: str) -> str:
    """Run git in a folder as nobody in particular, and return what it prints."""
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def edited(text: str, **changes: object) -> str:
    """Return a YAML text with other values of keys; None removes a key's line, a new key is a line more."""
    lines = text.splitlines()
    for key, value in changes.items():
        at = [n for n, line in enumerate(lines) if line.strip().startswith(f"{key}:")]
        if not at:
            lines.append(f"{key}: {value}")
        elif value is None:
            del lines[at[0]]
        else:
            indent = lines[at[0]][: len(lines[at[0]]) - len(lines[at[0]].lstrip())]
            lines[at[0]] = f"{indent}{key}: {value}"
    return "\n".join(lines) + "\n"


class Ran:
    """A command's exit code and output."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *words: str) -> None:
        with pytest.raises(SystemExit) as left:
            COMMAND.main(list(words))
        self.code = left.value.code
        self.out, self.err = capsys.readouterr()
