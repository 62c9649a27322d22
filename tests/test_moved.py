"""The list of facts that a new release moved, on two small releases of a package."""

from __future__ import annotations

from pathlib import Path
from zipfile import ZipFile

import pytest

from benchmarks import moved
from benchmarks.moved import Fact, facts_of

OLD = """
class Config:
    \"\"\"Old words.\"\"\"
    checkpointing: bool = False
    rank: int = 8

def loss(x):
    return x.float()  # as before

def prepare(model):
    return model
"""
NEW = (
    OLD.replace("Old words", "New words")
    .replace("= False", "= True")
    .replace("  # as before", "")
    .replace("prepare", "ready")
)


def wheel(folder: Path, version: str, text: str) -> Path:
    path = folder / f"tuner-{version}-py3-none-any.whl"
    with ZipFile(path, "w") as archive:
        archive.writestr("tuner/train/config.py", text)
    return path


def test_a_source_names_files_and_definitions() -> None:
    source = "trl 1.16.0 trainer/sft_config.py, scripts/sft.py add_head; transformers 5.24 trainer.py Trainer.train"
    assert list(facts_of(source, "trl")) == [Fact("trainer/sft_config.py", ""), Fact("scripts/sft.py", "add_head")]
    assert list(facts_of(source, "transformers")) == [Fact("trainer.py", "Trainer.train")]
    assert list(facts_of(source, "peft")) == []


def test_only_code_that_changed_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        (f"tuner 1.0 train/config.py {name}", name)
        for name in ("Config.checkpointing", "Config.rank_", "compute_loss", "prepare_", "Config")
    ]
    monkeypatch.setattr(moved, "sources", lambda: iter([*rows, ("tuner 1.0 train/gone.py Loss", "gone")]))
    text = OLD.replace("rank:", "rank_:").replace("def loss", "def compute_loss").replace("def prepare", "def prepare_")
    new = NEW.replace("rank:", "rank_:").replace("def loss", "def compute_loss").replace("def ready", "def ready_")
    found = moved.moved(wheel(tmp_path, "1.0", text), wheel(tmp_path, "2.0", new))
    assert [(m.status, m.fact.name, m.named_by) for m in found] == [
        ("changed", "Config", ("Config",)),
        ("changed", "Config.checkpointing", ("Config.checkpointing",)),
        ("gone", "prepare_", ("prepare_",)),
    ]
