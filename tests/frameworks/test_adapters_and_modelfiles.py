"""Folders with peft's adapters, and Ollama's Modelfiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memplan.cli.run_files import is_run_file
from memplan.core.errors import SpecError
from memplan.frameworks.reading.run_file import RunFile, read_run
from memplan.models.peft_methods import PEFT_METHODS
from memplan.resolve.serving import resolve_serving
from memplan.spec.run import RunSpec

LORA = {
    "base_model_name_or_path": "Qwen/Qwen2-7B",
    "peft_type": "LORA",
    "r": 32,
    "lora_alpha": 64,
    "target_modules": ["v_proj", "model.layers.0.self_attn.q_proj"],
    "bias": "none",
    "rank_pattern": {},
    "modules_to_save": None,
    "inference_mode": True,
}


def adapters(tmp_path: Path, typed: dict[str, Any] | None = None, **more: Any) -> RunFile:
    (tmp_path / "adapter_config.json").write_text(json.dumps({**LORA, **more}), "utf-8")
    return read_run(str(tmp_path), typed=typed)


def values(file: RunFile) -> dict[str, Any]:
    RunSpec.model_validate(file.fields)
    return {origin.field: origin.value for origin in file.origins}


def test_a_folder_of_adapters_is_trained_further(tmp_path: Path) -> None:
    file = adapters(tmp_path)
    found = values(file)
    assert file.unread == ()
    assert (found["model"], found["method.kind"], found["method.rank"]) == ("Qwen/Qwen2-7B", "lora", 32)
    assert found["method.targets"] == ["q_proj", "v_proj"]
    assert found["profile"] == "transformers-5"


def test_a_folder_of_adapters_is_served_by_an_engine(tmp_path: Path) -> None:
    found = values(adapters(tmp_path, {"profile": "vllm"}))
    assert (found["task"], found["serving.lora_slots"], found["serving.lora_rank"]) == ("generate", 1, 32)
    assert "method.rank" not in found
    file = adapters(tmp_path, {"method.kind": "generate"})
    assert file.notes == (
        "peft_type (adapter_config.json:1): adapters are not counted when generating, as if they were merged",
    )


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dora": ({"use_dora": True, "use_rslora": True}, {"method.kind": "dora", "method.options": {"use_rslora": True}}),
    "vera": ({"peft_type": "VERA", "r": 16, "vera_dropout": 0.1}, {"method.rank": 16, "method.dropout": 0.1}),
    "oft": (
        {"peft_type": "OFT", "r": 0, "oft_block_size": 64},
        {"method.rank": None, "method.options": {"r": 0, "oft_block_size": 64}},
    ),
    "all": ({"target_modules": "all-linear"}, {"method.targets": "all-linear"}),
    "default": ({"target_modules": None}, {"method.targets": ["q_proj", "v_proj"]}),
    "saved": ({"modules_to_save": ["lm_head"]}, {"method.modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize(("more", "expected"), CASES.values(), ids=CASES.keys())
def test_settings_of_adapters_are_fields(tmp_path: Path, more: dict[str, Any], expected: dict[str, Any]) -> None:
    found = values(adapters(tmp_path, **more))
    assert {field: found.get(field) for field in expected} == expected


@pytest.mark.parametrize("kind", PEFT_METHODS)
def test_every_method_of_peft_is_read(tmp_path: Path, kind: str) -> None:
    assert values(adapters(tmp_path, peft_type=kind.upper(), r=8))["method.kind"] == kind


NOTED = {
    "rank_pattern": ({"q_proj": 4}, "what trains, not supported yet"),
    "bias": ("all", "trained biases are not counted"),
    "target_modules": (".*q_proj", "a pattern: all linear layers are counted instead"),
}


@pytest.mark.parametrize("key", NOTED)
def test_a_setting_that_is_not_counted_is_named(tmp_path: Path, key: str) -> None:
    value, note = NOTED[key]
    notes = adapters(tmp_path, **{key: value}).notes
    assert [text.partition(" (")[0].partition(".")[0] for text in notes] == [key]
    assert notes[0].endswith(note)


def test_another_method_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="peft_type: 'SHADE' is not supported yet; supported: LORA, "):
        adapters(tmp_path, peft_type="SHADE")


def test_layers_that_a_second_stream_goes_through_are_all_or_named(tmp_path: Path) -> None:
    layers = [f"model.layers.{i}" for i in range(28)]
    file = adapters(tmp_path, peft_type="SHADOW", r=4, target_modules=layers, shadow_num_hidden_layers=2)
    assert not file.notes
    assert values(file)["method.options"] == {"shadow_num_hidden_layers": 2}
    notes = adapters(tmp_path, peft_type="SHADOW", target_modules=layers[:3], shadow_hidden_size=64).notes
    assert [note.partition(" ")[0] for note in notes] == ["target_modules", "shadow_hidden_size"]


def test_a_folder_with_a_config_is_a_model(tmp_path: Path) -> None:
    adapters(tmp_path)
    assert is_run_file(str(tmp_path))
    (tmp_path / "config.json").write_text("{}", "utf-8")
    assert not is_run_file(str(tmp_path))
    with pytest.raises(SpecError, match="cannot be read"):
        read_run(str(tmp_path / "none"))


# --- Modelfile ---

LONG = "x" * 5000  # longer than a file's name may be

MODELFILE = """FROM llama3.1:8b-instruct-q8_0
# num_ctx
PARAMETER num_ctx 16384
PARAMETER temperature 1
SYSTEM \"\"\"
FROM me
\"\"\"
"""


def modelfile(tmp_path: Path, text: str, name: str = "Modelfile") -> RunFile:
    (tmp_path / name).write_text(text, "utf-8")
    assert is_run_file(str(tmp_path / name))
    return read_run(str(tmp_path / name))


def test_a_modelfile_is_served_by_llama_cpp(tmp_path: Path) -> None:
    file = modelfile(tmp_path, MODELFILE)
    found = values(file)
    resolve_serving(RunSpec.model_validate(file.fields))
    assert (found["model"], found["serving.weights"], found["profile"]) == ("llama-3.1-8b", "Q8_0", "llama.cpp-2026")
    assert found["serving.max_model_len"] == 16384
    assert {o.field: o.why for o in file.origins}["serving.max_model_len"] == "Modelfile:3 num_ctx"
    assert file.unread == ()


FROM: dict[str, dict[str, Any]] = {
    "FROM qwen2.5:7b": {"model": "qwen2.5-7b", "serving.weights": "Q4_K_M"},
    "from gemma3:4b-it-fp16": {"model": "gemma-3-4b"},
    "FROM hf.co/someone/Qwen2-7B-GGUF:IQ3_XS": {"model": "someone/Qwen2-7B-GGUF", "serving.weights": "IQ3_XS"},
    "FROM llama3.2:3b\nPARAMETER num_gpu 20\nPARAMETER num_batch 256": {
        "serving.gpu_layers": 20,
        "serving.max_num_batched_tokens": 256,
        "serving.max_model_len": None,
    },
    "FROM llama3.2:3b\nPARAMETER num_ctx 1024": {"batch.sequence": 1024 - 256, "batch.new_tokens": 256},
}


@pytest.mark.parametrize(("text", "expected"), FROM.items())
def test_parameters_of_a_modelfile_are_fields(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    found = values(modelfile(tmp_path, text, "chat.modelfile"))
    assert {field: found.get(field) for field in expected} == expected


def test_a_modelfile_may_name_a_file_next_to_it(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert modelfile(tmp_path, "FROM ./model.gguf\nADAPTER a.gguf").fields["model"] == str(tmp_path / "model.gguf")


REFUSED = {
    "PARAMETER num_ctx 3": "Modelfile has no FROM, which names the model",
    "FROM a\nRUN ls": "Modelfile:2: run is not an instruction of a Modelfile",
    "FROM unknown:7b": "Modelfile:1: from: 'unknown:7b' is not known here; write memplan MODEL --spec Modelfile",
    f"FROM {LONG}.gguf": f"Modelfile:1: from: '{LONG[:59]} is not known here; write memplan MODEL --spec Modelfile",
    "FROM llama3.2:3b\nPARAMETER num_ctx many": "Modelfile:2: num_ctx: must be a number, not 'many'",
}


@pytest.mark.parametrize(("text", "error"), REFUSED.items())
def test_a_modelfile_that_is_wrong_is_one_line(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(SpecError) as raised:
        modelfile(tmp_path, text)
    assert str(raised.value) == error
