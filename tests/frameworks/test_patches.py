"""Patches of run files: what is written is read again as promised, and nothing else of the file changes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memplan.cli.file_patches import file_levers
from memplan.cli.run_files import run_file
from memplan.cli.runs import runs_of
from memplan.core.errors import MemplanError, SpecError
from memplan.estimate.estimate import estimate
from memplan.frameworks.patching.json_text import edited_json
from memplan.frameworks.patching.manifest_text import edited_manifest
from memplan.frameworks.patching.patch import diff
from memplan.frameworks.patching.script_text import edited_script
from memplan.frameworks.patching.yaml_text import edited_yaml
from memplan.frameworks.reading.run_file import command_in, manifest_command
from memplan.planning.file_levers import FileLevers

# --- positions in a text ---

YAML = """# above
a: 1  # one
list:
- x   # first
- y
flow: [x, 'y']   # flow
word: "quoted"
text: |
  several
  lines
section:
    inner: true   # deep
    other: {p: 1,
            q: 2}
empty:
anchored: &n 3
alias: *n
# below
"""
EDITS: dict[str, tuple[dict[tuple[str, ...], Any], dict[str, str]]] = {
    "a scalar keeps its comment": ({("a",): 2}, {"a: 1  # one": "a: 2  # one"}),
    "quotes stay": ({("word",): "b c"}, {'"quoted"': '"b c"'}),
    "a list is extended": ({("list",): ["x", "y", "z"]}, {"- y\n": "- y\n- z\n"}),
    "a list is replaced": ({("list",): ["z"]}, {"- x   # first\n- y\n": "- z\n"}),
    "a flow list is extended": ({("flow",): ["x", "y", "z"]}, {"'y']": "'y', z]"}),
    "a flow list is replaced": ({("flow",): ["z"]}, {"[x, 'y']": "[z]"}),
    "a list becomes a word": ({("list",): "all"}, {"list:\n- x   # first\n- y": "list: all"}),
    "a block of text is replaced": ({("text",): "one"}, {"|\n  several\n  lines": "one"}),
    "an empty value": ({("empty",): 4}, {"empty:": "empty: 4"}),
    "a key deep inside": ({("section", "inner"): False}, {"inner: true ": "inner: false "}),
    "a key in a flow section": (
        {("section", "other", "q"): None, ("section", "other", "r"): 3},
        {"{p: 1,\n            q: 2}": "{p: 1, r: 3}"},
    ),
    "a key that is new": ({("a",): 2, ("b",): 3}, {"a: 1  # one\n": "a: 2  # one\nb: 3\n"}),
    "a last key": ({("b",): 3}, {"alias: *n\n": "alias: *n\nb: 3\n"}),
    "a new section": ({("new", "deep"): 1, ("new", "other"): 2}, {"*n\n": "*n\nnew: {deep: 1, other: 2}\n"}),
    "a key is removed": ({("text",): None}, {"text: |\n  several\n  lines\n": ""}),
    "a section's key is removed": ({("section", "inner"): None}, {"    inner: true   # deep\n": ""}),
    "a key that is not there is removed": ({("b",): None}, {}),
}


@pytest.mark.parametrize(("edits", "expected"), EDITS.values(), ids=EDITS.keys())
def test_yaml_changes_only_where_a_key_changes(edits: dict[tuple[str, ...], Any], expected: dict[str, str]) -> None:
    text = YAML
    for old, new in expected.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    assert edited_yaml(YAML, edits) == text
    windows = edited_yaml(YAML.replace("\n", "\r\n"), edits)
    assert yaml.safe_load(windows) == yaml.safe_load(text)
    assert not re.search(r"[^\r]\n", windows)
    for path, value in edits.items():
        found: Any = yaml.safe_load(text)
        for name in path[:-1]:
            found = found[name]
        assert found.get(path[-1]) == value


def test_an_alias_is_left_alone() -> None:
    with pytest.raises(SpecError, match="alias is an alias"):
        edited_yaml(YAML, {("alias",): 4})
    with pytest.raises(SpecError, match="a is not a section"):
        edited_yaml(YAML, {("a", "b"): 4})


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
NAMES = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Zs")), min_size=1, max_size=4)
MAPPINGS = st.dictionaries(NAMES, SCALARS | st.dictionaries(NAMES, SCALARS, max_size=3), max_size=4)


def at(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    *parents, name = path
    for parent in parents:
        if value is None and parent not in values:
            return
        values = values.setdefault(parent, {})
    if value is None:
        values.pop(name, None)
    else:
        values[name] = value


@given(MAPPINGS, st.data())
def test_any_json_is_edited_as_its_values_are(values: dict[str, Any], data: st.DataObject) -> None:
    paths = [(name,) for name in values]
    paths += [(name, inner) for name, value in values.items() if isinstance(value, dict) for inner in [*value, "new"]]
    path = data.draw(st.sampled_from([*paths, ("a new one",), ("a new section", "deep")]))
    value = data.draw(SCALARS | st.lists(SCALARS, max_size=2))
    indent = data.draw(st.sampled_from([None, 1, 4, "\t"]))
    text = edited_json(json.dumps(values, indent=indent), {path: value})
    at(values, path, value)
    assert json.loads(text) == values


SCRIPT = """#!/bin/bash
accelerate launch --num_processes 2 {program} \\
    --per-device-train-batch-size 8 --use_peft \\
    --max_length=512 > log   # a run
echo --max_length 3
"""


def test_a_script_changes_only_its_command() -> None:
    text = SCRIPT.format(program="train.py")
    command = command_in(text, "run.sh")
    edits: dict[str, Any] = {"per_device_train_batch_size": 2, "max_length": 256, "use_peft": None, "a": {"b": True}}
    new = edited_script(text, command, edits, ["export A=1"])
    expected = text.replace("size 8 --use_peft", "size 2").replace("=512", "=256 \\\n    --a '{\"b\": true}'")
    assert new == expected.replace("accelerate", "export A=1\naccelerate")


def test_torchtunes_command_takes_pairs() -> None:
    text = "tune run lora_finetune_single_device --config llama3_1/8B_lora batch_size=4\n"
    edits: dict[str, Any] = {
        "batch_size": 2,
        "tokenizer.max_seq_len": 5,
        "model.lora_attn_modules": ["q_proj", "v_proj"],
    }
    new = edited_script(text, command_in(text, "run.sh"), edits)
    added = " tokenizer.max_seq_len=5 model.lora_attn_modules='[q_proj,v_proj]'"
    assert new == text.replace("batch_size=4", f"batch_size=2{added}")


def test_llamafactorys_command_takes_pairs() -> None:
    text = "llamafactory-cli train run.yaml lora_rank=8 && echo done\n"
    new = edited_script(text, command_in(text, "run.sh"), {"lora_rank": 4, "cutoff_len": 5})
    assert new == "llamafactory-cli train run.yaml lora_rank=4 cutoff_len=5 && echo done\n"


def test_axolotls_command_has_switches() -> None:
    text = "axolotl train run.yaml --micro-batch-size 4 --launcher torchrun -- --nproc_per_node=2\n"
    command = command_in(text, "run.sh")
    new = edited_script(text, command, {"micro_batch_size": 2, "load_in_4bit": True})
    assert new == text.replace("size 4", "size 2").replace("torchrun --", "torchrun --load-in-4bit --")
    with pytest.raises(SpecError, match="axolotl's command line cannot set load_in_4bit to false"):
        edited_script(text, command, {"load_in_4bit": False})


@pytest.mark.skipif(shutil.which("patch") is None, reason="needs the program patch")
@pytest.mark.parametrize("end", ["", "\n"])
def test_patch_applies_a_diff(tmp_path: Path, end: str) -> None:
    before = "a: 1\n\nb: 2" + end
    (tmp_path / "run.yaml").write_text(before)
    after = edited_yaml(before, {("b",): 3, ("c",): 4})
    subprocess.run(["patch", "-p0", "-s"], cwd=tmp_path, input=diff("run.yaml", before, after), text=True, check=True)
    assert (tmp_path / "run.yaml").read_text() == after


# --- the file, read again ---

MODEL = "qwen2-0.5b"
AXOLOTL: dict[str, Any] = {"base_model": MODEL, "sequence_len": 768, "micro_batch_size": 4, "lora_target_linear": True}
LLAMAFACTORY: dict[str, Any] = {"model_name_or_path": MODEL, "cutoff_len": 768, "per_device_train_batch_size": 4}
TRL: dict[str, Any] = {"model_name_or_path": MODEL, "dataset_name": "a", "max_length": 768}
OWN: dict[str, Any] = {"model": MODEL, "batch": {"micro": 4}}
FORMS: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "axolotl": (
        AXOLOTL,
        {
            "adapter": [None, "lora"],
            "sample_packing": [False, True],
            "attn_implementation": [None, "flash_attention_2", "eager"],
            "sdp_attention": [None, True],
            "gradient_checkpointing": [None, True],
            "gradient_checkpointing_kwargs": [None, {"use_reentrant": True}],
            "plugins": [None, ["axolotl.integrations.liger.LigerPlugin"]],
            "liger_rope": [None, True],
            "optimizer": [None, "adamw_torch", "adamw_torch_fused"],
            "bf16": ["auto", False],
            "val_set_size": [None, 0.1],
        },
    ),
    "llamafactory": (
        LLAMAFACTORY,
        {
            "finetuning_type": ["lora", "full", "freeze"],
            "packing": [False, True],
            "flash_attn": [None, "fa2", "disabled"],
            "disable_gradient_checkpointing": [None, True],
            "optim": [None, "adamw_torch"],
            "bf16": [True],
        },
    ),
    "ms-swift": (
        {"model": MODEL, "max_length": 768, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {
            "tuner_type": ["lora", "full"],
            "quant_method": [None, "bnb"],
            "quant_bits": [None, 4],
            "torch_dtype": ["bfloat16"],
            "target_modules": [None, "all-linear"],
            "attn_impl": [None, "flash_attn", "sdpa"],
            "packing": [None, True],
            "gradient_checkpointing": [None, False],
            "use_liger_kernel": [None, True],
            "optim": [None, "adamw_torch"],
        },
    ),
    "trl": (
        TRL,
        {
            "use_peft": [False, True],
            "lora_target_modules": [None, ["q_proj", "v_proj", "o_proj", "k_proj", "up_proj"]],
            "packing": [False, True],
            "dtype": [None, "bfloat16"],
            "attn_implementation": [None, "eager", "flash_attention_2"],
            "gradient_checkpointing": [None, False],
            "gradient_checkpointing_kwargs": [None, {"use_reentrant": False}],
            "optim": [None, "adamw_torch"],
            "eval_strategy": [None, "epoch"],
        },
    ),
    "memplan": (
        OWN,
        {
            "method": [None, "lora", {"kind": "lora", "rank": 64}],
            "precision": [None, "amp", {"weights": "bf16"}],
            "kernels": [None, {"attention": "eager"}, {"checkpointing": "full"}],
            "optimizer": [None, "adamw_torch", {"name": "adamw_torch", "foreach": True}],
        },
    ),
}


def flags(values: dict[str, Any]) -> str:
    """Return values as the flags of a script."""
    words: list[str] = []
    for key, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value)
        words += [f"--{key} {' '.join(value) if isinstance(value, list) else repr(text)}"]
    return " \\\n    ".join(words)


def written(values: dict[str, Any], kind: str, framework: str) -> str:
    """Return a config file with comments, as YAML, JSON or a script."""
    if kind == "json":
        return json.dumps(values, indent=2)
    if kind == "sh":
        program = {"trl": "trl sft", "llamafactory": "llamafactory-cli train", "ms-swift": "swift sft"}[framework]
        return f"# a script\n{program} {flags(values)}\necho done\n"
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=len(values) % 2 == 0 and None)
    return "# a run\n" + text.replace("\n", "   # said\n", 1) + "# end\n"


@st.composite
def files(draw: st.DrawFn) -> tuple[str, str, str]:
    """Draw a framework, a kind of file, and its text."""
    framework = draw(st.sampled_from(sorted(FORMS)))
    always, choices = FORMS[framework]
    drawn = {key: draw(st.sampled_from(values)) for key, values in choices.items()}
    values = {**always, **{key: value for key, value in drawn.items() if value is not None}}
    if values.get("attn_implementation") is not None:
        values.pop("sdp_attention", None)
    kinds = ["yaml", "json", "sh"] if framework in ("trl", "llamafactory", "ms-swift") else ["yaml", "json"]
    kind = draw(st.sampled_from(kinds))
    return framework, kind, written(values, kind, framework)


def levers_in(name: str, **options: Any) -> FileLevers:
    given: dict[str, Any] = {"model": name, "gpu": ["3090"], **options}
    file = run_file(given)
    levers = file_levers(given, file, runs_of(given, file)[0])
    assert levers is not None
    return levers


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(files(), st.data())
def test_a_patched_file_gives_the_run_that_was_promised(
    tmp_path: Path, drawn: tuple[str, str, str], data: st.DataObject
) -> None:
    framework, kind, text = drawn
    path = tmp_path / f"run.{kind}"
    path.write_text(text)
    try:
        levers = levers_in(str(path))
        known = levers(estimate(levers.asked).run)
    except MemplanError:
        return  # not a run
    chosen = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique_by=lambda lever: lever.group))
    chosen.sort(key=known.index)
    try:
        new = levers.write(tuple(chosen))
    except MemplanError:
        return  # which the file cannot say
    copy = tmp_path / f"copy.{kind}"
    copy.write_text(new.text)
    again = {"model": str(copy), "gpu": ["3090"]}
    file = run_file(again)
    [run] = runs_of(again, file)
    assert run == new.run
    assert file is not None
    assert file.framework == framework
    for lever in chosen:
        for field, value in lever.fields:
            if field != "batch.sequence" and not hasattr(value, "model_fields"):
                found: Any = run
                for name in field.split("."):
                    found = getattr(found, name, None)
                assert found == value, (lever.title, field)
    kept = [line for line in text.splitlines() if line.startswith("#") or "echo" in line]
    assert [line for line in new.text.splitlines() if line.startswith("#") or "echo" in line] == kept


SAID: dict[str, tuple[str, str]] = {
    "micro_batch": ("axolotl", "micro_batch_size"),
    "offload_optimizer": ("axolotl", ""),
    "in_backward": ("trl", ""),
    "more_gpus": ("llamafactory", ""),
    "expandable_segments": ("trl", ""),
    "rank": ("trl", "lora_r"),
    "optimizer_8bit": ("llamafactory", "optim"),
    "method_qlora": ("ms-swift", "quant_bits"),
    "attention_flash": ("ms-swift", "attn_impl"),
    "fused_loss": ("ms-swift", "use_liger_kernel"),
    "offload_all": ("ms-swift", "deepspeed"),
    "targets": ("ms-swift", "target_modules"),
}


@pytest.mark.parametrize(("key", "where"), SAID.items(), ids=SAID.keys())
def test_a_file_says_some_levers_and_not_others(tmp_path: Path, key: str, where: tuple[str, str]) -> None:
    framework, name = where
    wanted = {
        "axolotl": AXOLOTL,
        "trl": {**TRL, "use_peft": True},
        "llamafactory": {**LLAMAFACTORY, "stage": "sft"},
        "ms-swift": {**FORMS["ms-swift"][0], "tuner_type": "lora", "target_modules": "all-linear"},
    }
    extra = {"optim": "adamw_torch"} if framework != "axolotl" else {"optimizer": "adamw_torch"}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**wanted[framework], **extra, "gradient_accumulation_steps": 1}))
    levers = levers_in(str(path))
    [lever, *_] = [lever for lever in levers(estimate(levers.asked).run) if key in lever.keys]
    if name:
        assert f"{name}: " in levers.write((lever,)).text
    else:
        with pytest.raises(SpecError, match=r"^no key of "):
            levers.write((lever,))


SWITCHES = {
    "tune run lora_finetune_distributed --config llama3_2/1B_lora": "enable_activation_checkpointing=true",
    "python -m openrlhf.cli.train_sft --pretrain qwen2-0.5b": "--model.gradient_checkpointing_enable",
    "python -m verl.trainer.sft_trainer model.path=qwen2-0.5b data.micro_batch_size_per_gpu=4 "
    "model.enable_gradient_checkpointing=false": "model.enable_gradient_checkpointing=true",
}


@pytest.mark.parametrize(("command", "switch"), SWITCHES.items())
def test_a_switch_turns_checkpointing_on(tmp_path: Path, command: str, switch: str) -> None:
    path = tmp_path / "run.sh"
    path.write_text(f"{command}\n")
    levers = levers_in(str(path))
    [lever] = [lever for lever in levers(estimate(levers.asked).run) if lever.keys == ("checkpointing",)]
    new = levers.write((lever,))
    assert new.text.rstrip().endswith(f" {switch}")
    assert new.run.kernels.checkpointing == "full"


def test_adapters_take_galores_switch_out(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**LLAMAFACTORY, "finetuning_type": "full", "use_galore": True, "stage": "sft"}))
    levers = levers_in(str(path))
    [lora, *_] = [lever for lever in levers(estimate(levers.asked).run) if "method_lora" in lever.keys]
    assert "use_galore" not in levers.write((lora,)).text


def test_a_packed_row_has_fewer_sequences(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**AXOLOTL, "sample_packing": True, "attn_implementation": "flash_attention_2"}))
    levers = levers_in(str(path))
    assert (levers.asked.batch.micro, levers.asked.batch.packing) == (4, "sample_packing")
    known = levers(estimate(levers.asked).run)
    [half, _] = [lever for lever in known if lever.group == "batch"]
    new = levers.write((half,))
    assert "micro_batch_size: 2\ngradient_accumulation_steps: 2\n" in new.text
    assert (new.run.batch.micro, new.run.batch.accumulation) == (2, 2)
    [shorter, *_] = [lever for lever in known if lever.group == "sequence"]
    new = levers.write((shorter,))
    assert "sequence_len: 384\n" in new.text
    assert new.run.batch.sequence == 384


def test_a_key_does_not_stand_next_to_its_old_name(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**AXOLOTL, "sdp_attention": True}))
    levers = levers_in(str(path))
    [flash] = [lever for lever in levers(estimate(levers.asked).run) if lever.group == "attention"]
    values = yaml.safe_load(levers.write((flash,)).text)
    assert values["attn_implementation"] == "flash_attention_2"
    assert "sdp_attention" not in values
    path.write_text(yaml.safe_dump({**TRL, "max_seq_length": TRL["max_length"], "max_length": None}))
    [shorter, *_] = [each for each in levers_in(str(path))(estimate(levers.asked).run) if each.group == "sequence"]
    assert yaml.safe_load(levers_in(str(path)).write((shorter,)).text)["max_seq_length"] == 384


def test_a_patch_says_what_was_typed_too(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**TRL, "use_peft": True}))
    levers = levers_in(str(path), rank=8, gpus=2)
    assert levers.original.run.parallelism.world == 2  # which is typed again
    [lever, *_] = [lever for lever in levers(estimate(levers.asked).run) if lever.group == "batch"]
    new = levers.write((lever,))
    assert "lora_r: 8\n" in new.text
    assert (new.run.method.rank, new.run.batch.micro) == (8, lever.fields[0][1])


def test_options_that_a_file_cannot_say_stay_typed(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**TRL, "use_peft": True}))
    levers = levers_in(str(path), rank=8, trainer="off")
    assert levers.typed
    [lever, *_] = [lever for lever in levers(estimate(levers.asked).run) if lever.group == "batch"]
    new = levers.write((lever,))
    assert "lora_r" not in new.text
    assert (new.run.method.rank, new.run.loop.trainer) == (8, False)


def test_a_command_in_quotes_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "job.sh"
    path.write_text("bash -c 'trl sft --model_name_or_path qwen2-0.5b --use_peft --max_length 64'\n")
    levers = levers_in(str(path))
    [lever] = [lever for lever in levers(estimate(levers.asked).run) if lever.group == "optimizer"][:1]
    with pytest.raises(SpecError, match="trl is inside a quoted command, which stays as it is"):
        levers.write((lever,))


def test_a_script_exports_what_its_command_has_no_key_for(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text("# a script\ntrl sft --model_name_or_path qwen2-0.5b --use_peft --per_device_train_batch_size 2\n")
    levers = levers_in(str(path))
    [segments] = [lever for lever in levers(estimate(levers.asked).run) if lever.group == "allocator"]
    new = levers.write((segments,))
    assert new.text.startswith("# a script\nexport PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True\ntrl sft ")
    assert new.run.loop.expandable_segments


def test_a_file_that_a_key_names_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "zero2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**TRL, "deepspeed": "zero2.json"}))
    levers = levers_in(str(path), gpus=2)
    [host] = [lever for lever in levers(estimate(levers.asked).run) if lever.group == "offload"]
    with pytest.raises(SpecError, match=r"^deepspeed names the file 'zero2\.json', which stays as it is$"):
        levers.write((host,))


_WORDS = "sft.py --model_name_or_path qwen2-0.5b --dataset_name a --max_length 768 --use_peft --bf16"
_BLOCK = "\n".join(f"        - {json.dumps(word)}" for word in f"--num_processes 1 {_WORDS}".split())
MANIFESTS = {
    "script": (
        "apiVersion: v1\nspec:\n  containers:\n    - command: [bash, -c]\n      args:\n        - |\n          cd a\n"
        f"          accelerate launch --num_processes 1 {_WORDS}\n      resources: {{limits: {{nvidia.com/gpu: 1}}}}\n",
        ("--num_processes 1", "gpu: 1", "--max_length 768"),
        ("--num_processes 4", "gpu: 4", ""),
    ),
    "block": (
        "apiVersion: v1\nspec:\n  containers:\n    - command: [accelerate, launch]\n      args:\n"
        f"{_BLOCK}\n      resources: {{limits: {{nvidia.com/gpu: 1}}}}\n",
        ('"--num_processes"\n        - "1"', "gpu: 1", '- "768"'),
        ('"--num_processes"\n        - "4"', "gpu: 4", ""),
    ),
    "task": (
        f"resources:\n  accelerators: H100:1\nrun: |\n  cd a\n  accelerate launch --num_processes 1 {_WORDS}\n",
        ("--num_processes 1", "H100:1", "--max_length 768"),
        ("--num_processes 4", "H100:4", ""),
    ),
    "compose": (
        "services:\n  a:\n    retry: {count: 1}\n    gpus: [{count: 1}]\n    deploy: {count: 1}\n    command: "
        f"[accelerate, launch, {', '.join(_WORDS.replace('_length ', '_length=').split())}]\n",
        ("gpus: [{count: 1", "_length=768"),
        ("gpus: [{count: 4", ""),
    ),
}


@pytest.mark.parametrize(("text", "before", "after"), MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_manifest_changes_its_command_and_gpus(
    tmp_path: Path, text: str, before: tuple[str, ...], after: tuple[str, ...]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    levers = levers_in(str(path))
    every = levers(estimate(levers.asked).run)
    chosen = [
        next(lever for lever in every if dict(lever.fields).get(field) == value)
        for field, value in (("parallelism.world", 4), ("batch.sequence", 384), ("batch.micro", 4))
    ]
    new = levers.write((chosen[0], chosen[2]))
    assert (new.run.parallelism.world, new.run.batch.micro) == (4, 4)
    for old, changed in zip(before[:-1], after[:-1], strict=True):
        text = text.replace(old, changed)
    lines = new.text.splitlines()
    assert [line for line in text.splitlines() if line not in lines and "accelerate" not in line] == []
    assert "per_device_train_batch_size" in new.text
    assert before[-1].replace("768", "384") in levers.write((chosen[1],)).text


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ('"--dataset_name", "x", "--packing"', '"--dataset_name", "x", "--packing=false"'),
        ('"--packing", "--bf16"', '"--packing=false", "--bf16"'),
        ('"--packing=true"', '"--packing=false"'),
        ('"--packing", "true"', '"--packing", "false"'),
    ],
)
def test_a_flag_without_a_value_gets_one_in_a_list(words: str, changed: str) -> None:
    text = f'services:\n  a:\n    command: ["trl", "sft", "--model_name_or_path", "qwen2-0.5b", {words}]\n'
    command, container = manifest_command(text, "compose.yaml", None)
    assert edited_manifest(text, command, container, {"packing": False}) == text.replace(words, changed)


_SFT = "sft.py --model_name_or_path qwen2-0.5b --dataset_name a --use_peft --bf16 true"
COUNTS: dict[str, tuple[str, str]] = {
    f"accelerate launch --num_processes 1 {_SFT}": ("--num_processes 1", "--num_processes 4"),
    f"torchrun --nnodes=1 --nproc_per_node=1 {_SFT}": ("--nproc_per_node=1", "--nproc_per_node=4"),
    f"export N=1\ntorchrun --nproc-per-node $N {_SFT}": ("N=1", "N=4"),
    f"#SBATCH --gres=gpu:a100:1\nsrun torchrun --nproc_per_node $SLURM_GPUS_ON_NODE {_SFT}": (":a100:1", ":a100:4"),
    f"#SBATCH -G 1\nCUDA_VISIBLE_DEVICES=0 accelerate launch {_SFT}": (
        "-G 1\nCUDA_VISIBLE_DEVICES=0",
        "-G 4\nCUDA_VISIBLE_DEVICES=0,1,2,3",
    ),
    f"#SBATCH --gres=gpu:1\ntorchrun --nproc_per_node=1 {_SFT}": (
        f"gpu:1\ntorchrun --nproc_per_node=1 {_SFT}",
        f"gpu:4\ntorchrun --nproc_per_node=4 {_SFT}",
    ),
    f"accelerate launch --config_file one.yaml {_SFT}": ("launch", "launch --num_processes 4"),
    f"python {_SFT}": ("", "the script does not say how many processes train"),
}


@pytest.mark.parametrize(("command", "change"), COUNTS.items(), ids=COUNTS.keys())
def test_a_script_says_how_many_gpus_where_its_launcher_does(
    tmp_path: Path, command: str, change: tuple[str, str]
) -> None:
    path = tmp_path / "run.sh"
    path.write_text(f"# a script\n{command}\n")
    (tmp_path / "one.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 1\n")
    levers = levers_in(str(path))
    more = next(
        lever for lever in levers(estimate(levers.asked).run) if dict(lever.fields).get("parallelism.world") == 4
    )
    before, after = change
    if not before:
        with pytest.raises(SpecError, match=after):
            levers.write((more,))
        return
    new = levers.write((more,))
    assert new.text.startswith(path.read_text().rstrip("\n").replace(before, after))
    assert (new.run.parallelism.world, new.run.parallelism.strategy) == (4, "fsdp2")
