"""The cause of a change is the changed value that, put back alone, takes most of the change away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import memplan
from memplan.gate.difference import RunChange, difference
from memplan.gate.rows import Check, CheckedRun
from tests.gate.team import AXOLOTL, LLAMAFACTORY, OWN, TRL, edited, write

BUDGET = '[[budget]]\nruns = ["{name}"]\ngpu = ["3090"]\n'
CASES: list[tuple[str, str, dict[str, object]]] = [
    ("a.yaml", AXOLOTL, {"sequence_len": 4096}),
    ("a.yaml", AXOLOTL, {"sequence_len": 1024}),
    ("a.yaml", AXOLOTL, {"micro_batch_size": 8}),
    ("a.yaml", AXOLOTL, {"lora_r": 64}),
    ("a.yaml", AXOLOTL, {"gradient_checkpointing": "false"}),
    ("a.yaml", AXOLOTL, {"optimizer": "adamw_bnb_8bit", "lora_r": 256}),
    ("a.yaml", AXOLOTL, {"base_model": "qwen2.5-0.5b"}),
    ("a.yaml", AXOLOTL, {"flash_attention": "true"}),
    ("a.yaml", AXOLOTL, {"adapter": "lora", "load_in_4bit": "false"}),
    ("a.yaml", AXOLOTL, {"sample_packing": "true"}),
    ("a.yaml", AXOLOTL, {"gradient_accumulation_steps": 1, "sequence_len": 3072}),
    ("a.yaml", AXOLOTL, {"sequence_len": 4096, "micro_batch_size": 1}),  # which offset each other
    ("a.yaml", AXOLOTL, {"sequence_len": 8192, "micro_batch_size": 1}),
    ("a.yaml", AXOLOTL, {"sequence_len": 1024, "micro_batch_size": 6}),
    ("a.yaml", AXOLOTL, {"lora_r": 128, "micro_batch_size": 1}),
    ("a.yaml", AXOLOTL, {"gradient_checkpointing": "false", "sequence_len": 1024}),
    ("a.yaml", AXOLOTL, {"lora_r": 32, "lora_alpha": 64, "sequence_len": 2560}),
    ("a.yaml", AXOLOTL, {"gradient_checkpointing": None}),
    ("b.yaml", LLAMAFACTORY, {"cutoff_len": 4096}),
    ("b.yaml", LLAMAFACTORY, {"lora_rank": 64}),
    ("b.yaml", LLAMAFACTORY, {"per_device_train_batch_size": 8}),
    ("b.yaml", LLAMAFACTORY, {"per_device_train_batch_size": 1, "cutoff_len": 4096}),
    ("b.yaml", LLAMAFACTORY, {"finetuning_type": "full", "lora_rank": None, "lora_target": None}),
    ("b.yaml", LLAMAFACTORY, {"quantization_bit": 4}),
    ("b.yaml", LLAMAFACTORY, {"bf16": "false"}),
    ("b.yaml", LLAMAFACTORY, {"model_name_or_path": "qwen2.5-0.5b", "cutoff_len": 2048}),
    ("c.yaml", OWN, {"micro": 4}),
    ("c.yaml", OWN, {"sequence": 4096}),
    ("c.yaml", OWN, {"checkpointing": "none"}),
    ("c.yaml", OWN, {"method": "qlora"}),
    ("c.yaml", OWN, {"micro": 1, "sequence": 3072}),
    ("c.yaml", OWN, {"micro": 8, "checkpointing": "none"}),
]


def changes_of(base: Path, head: Path) -> list[RunChange]:
    return list(difference(str(base), str(head)).changes)


def pair(folder: Path, name: str, before: str, after: str, budget: str = BUDGET) -> tuple[Path, Path]:
    files = {"memplan.toml": budget.format(name=name)}
    return write(folder / "base", {**files, name: before}), write(folder / "head", {**files, name: after})


def peak(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Return what a run takes, checked on its own; None if its file is wrong."""
    monkeypatch.chdir(write(folder / "put back", {name: text}))
    [row] = memplan.check([name], gpu="3090").rows
    return row.peak or None


@pytest.mark.parametrize(("name", "text", "changes"), CASES, ids=[f"{c[0]} {' '.join(c[2])}" for c in CASES])
def test_the_cause_is_the_value_that_takes_most_of_the_change_away(
    name: str, text: str, changes: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = edited(text, **changes)
    [change] = changes_of(*pair(tmp_path, name, text, after))
    assert change.base is not None
    assert change.head is not None
    total = change.head.peak - change.base.peak
    said = dict(line.strip().split(": ") for line in text.splitlines() if ": " in line)
    effects: dict[str, int] = {}
    for key in changes:  # an oracle of its own: the text with one line put back
        without = peak(tmp_path, name, edited(after, **{key: said.get(key)}), monkeypatch)
        if without is not None:
            effects[key] = change.head.peak - without
    if total == 0:
        assert not change.causes or len(changes) > 1
        return
    first = change.causes[0]
    best = max(effects, key=lambda key: effects[key] * (1 if total > 0 else -1), default="")
    keys = [each.key.rpartition(".")[2] for each in first.changes]
    if len(keys) == 1:
        assert keys == [best]
        assert first.bytes == (effects[best] if len(changes) > 1 else total)
    else:  # what only changes together
        assert set(keys) <= set(changes)
    [line] = [n for n, each in enumerate(after.splitlines(), 1) if f"{keys[0]}:" in each] or [None]
    if line is not None:
        assert first.changes[0].line == line
        assert first.changes[0].file == name


def test_offsetting_values_are_each_named_with_their_bytes(tmp_path: Path) -> None:
    after = edited(AXOLOTL, sequence_len=8192, micro_batch_size=1)
    [change] = changes_of(*pair(tmp_path, "a.yaml", AXOLOTL, after))
    keys = {cause.changes[0].key: cause.bytes for cause in change.causes}
    assert set(keys) == {"sequence_len", "micro_batch_size"}
    assert keys["sequence_len"] > change.bytes > 0 > keys["micro_batch_size"]


def test_the_flag_of_a_command_is_the_cause(tmp_path: Path) -> None:
    after = TRL.replace("--max_length 1024", "--max_length 4096").replace("batch_size 2", "batch_size 1")
    [change] = changes_of(*pair(tmp_path, "train.sh", TRL, after))
    assert [change.causes[0].changes[0].key, change.causes[0].changes[0].line] == ["max_length", 2]


def test_a_key_of_a_file_that_the_run_names_is_the_cause(tmp_path: Path) -> None:
    text = edited(AXOLOTL, adapter="lora", load_in_4bit="false", deepspeed="ds.json")
    zero = {stage: json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}) for stage in (1, 3)}
    budget = BUDGET + "gpus = 2\n"
    base, head = pair(tmp_path, "a.yaml", text, text, budget)
    write(base, {"ds.json": zero[1]})
    write(head, {"ds.json": zero[3]})
    [change] = changes_of(base, head)
    assert change.bytes != 0
    [cause] = change.causes
    assert cause.bytes == change.bytes
    [stage] = cause.changes
    assert (stage.key, stage.file, stage.line) == ("zero_optimization.stage", "ds.json", 1)
    assert (stage.before, stage.after) == ("zero1", "zero3")


def test_another_version_of_the_framework_is_a_cause_of_its_own(tmp_path: Path) -> None:
    text = "model_name_or_path: qwen2-1.5b\ndataset_name: mine\nmax_length: 4096\n"
    budget = '[[budget]]\nruns = ["{name}"]\ngpu = ["3090"]\nframework = "trl-%s"\n'
    base, _ = pair(tmp_path / "old", "t.yaml", text, text, budget % "1.5")
    _, head = pair(tmp_path / "new", "t.yaml", text, text, budget % "1.16")
    [change] = changes_of(base, head)
    assert change.bytes < 0
    assert change.causes[0].kind == "framework"
    assert [change.causes[0].changes[0].before, change.causes[0].changes[0].after] == ["TRL 1.5", "TRL 1.16"]
    # and next to a value that goes the other way
    _, head = pair(tmp_path / "both", "t.yaml", text, text.replace("4096", "8192"), budget % "1.16")
    [change] = changes_of(base, head)
    assert {cause.kind for cause in change.causes} == {"framework", "value"}


def checked_json(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch, **more: Any) -> dict[str, Any]:
    monkeypatch.chdir(write(folder, {name: text}))
    return {**memplan.check([name], gpu="3090").model_dump(), **more}


def test_another_version_of_memplan_is_a_cause_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = checked_json(tmp_path, "a.yaml", AXOLOTL, monkeypatch)
    old = json.loads(json.dumps({**new, "memplan_version": "0.0.1"}))
    old["runs"][0]["peak"] -= 2**30
    for name, values in (("base.json", old), ("head.json", new)):
        (tmp_path / name).write_text(json.dumps(values))
    [change] = changes_of(tmp_path / "base.json", tmp_path / "head.json")
    assert [(cause.kind, cause.bytes) for cause in change.causes] == [("memplan", 2**30)]
    assert change.causes[0].changes[0].before == "0.0.1"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"sequence_len": 4096}, "sequence_len"),
        ({"sequence_len": 4096, "micro_batch_size": 1}, "sequence_len"),
        ({"lora_r": 256, "lora_alpha": 512}, "lora_r"),
        ({"gradient_checkpointing": "false"}, "gradient_checkpointing"),
        ({"base_model": "qwen2.5-0.5b"}, "base_model"),
    ],
)
def test_the_cause_is_found_from_two_checks_json_alone(
    changes: dict[str, object], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("base", AXOLOTL), ("head", edited(AXOLOTL, **changes))):
        (tmp_path / f"{name}.json").write_text(json.dumps(checked_json(tmp_path, "a.yaml", text, monkeypatch)))
    (tmp_path / "a.yaml").unlink()
    [change] = changes_of(tmp_path / "base.json", tmp_path / "head.json")
    [first] = change.causes[0].changes
    expected = [n for n, line in enumerate(edited(AXOLOTL, **changes).splitlines(), 1) if line.startswith(key)]
    assert [first.key, first.line] == [key, *expected]


def test_another_limit_is_a_cause_though_no_byte_changed(tmp_path: Path) -> None:
    base, head = pair(tmp_path, "a.yaml", AXOLOTL, AXOLOTL)
    write(head, {"memplan.toml": BUDGET.format(name="a.yaml") + 'fail = "1 GiB"\n'})
    [change] = changes_of(base, head)
    assert change.kind == "broken"
    assert change.bytes == 0
    assert [cause.kind for cause in change.causes] == ["limit"]
    assert [change.causes[0].changes[0].before, change.causes[0].changes[0].after] == ["100%", "1 GiB"]


@pytest.mark.parametrize("changes", [{}, {"lora_r": 32}], ids=["alone", "and changed"])
def test_a_renamed_file_is_compared_with_its_old_self(changes: dict[str, object], tmp_path: Path) -> None:
    budget = '[[budget]]\nruns = ["*.yaml"]\ngpu = ["3090"]\n'
    base = write(tmp_path / "base", {"memplan.toml": budget, "old.yaml": AXOLOTL, "other.yaml": LLAMAFACTORY})
    files = {"memplan.toml": budget, "new.yaml": edited(AXOLOTL, **changes), "other.yaml": LLAMAFACTORY}
    found = {change.row.run: change for change in changes_of(base, write(tmp_path / "head", files))}
    assert found.keys() == {"new.yaml", "other.yaml"}
    assert found["new.yaml"].renamed == "old.yaml"
    assert (found["new.yaml"].kind, found["other.yaml"].kind) == ("changed" if changes else "unchanged", "unchanged")


def test_a_removed_run_is_told_and_does_not_fail(tmp_path: Path) -> None:
    budget = '[[budget]]\nruns = ["*.yaml"]\ngpu = ["3090", "a100-40gb"]\n'
    base = write(tmp_path / "base", {"memplan.toml": budget, "a.yaml": AXOLOTL, "b.yaml": OWN})
    found = difference(str(base), str(write(tmp_path / "head", {"memplan.toml": budget, "b.yaml": OWN})))
    assert [(each.row.run, each.kind) for each in found.changes if each.row.run == "a.yaml"] == [("a.yaml", "removed")]
    assert found.exit_code() == 0


def test_a_run_that_failed_before_does_not_fail_again(tmp_path: Path) -> None:
    large = edited(AXOLOTL, micro_batch_size=64)
    base, head = pair(tmp_path, "a.yaml", large, edited(large, micro_batch_size=65))
    found = difference(str(base), str(head))
    assert [each.kind for each in found.changes] == ["over"]
    assert found.exit_code() == 0
    assert [each.kind for each in changes_of(head, write(base, {"a.yaml": AXOLOTL}))] == ["fixed"]


def test_a_change_of_equal_checks_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path, {"a.yaml": AXOLOTL}))
    check: Check = memplan.check(["a.yaml"], gpu=["3090", "a100-40gb"])
    (tmp_path / "one.json").write_text(json.dumps(check.model_dump()))
    rows: list[CheckedRun] = [change.row for change in changes_of(tmp_path / "one.json", tmp_path / "one.json")]
    assert sorted(row.key for row in rows) == sorted(row.key for row in check.rows)
    assert [each.kind for each in changes_of(tmp_path / "one.json", tmp_path / "one.json")] == ["unchanged"] * 2
