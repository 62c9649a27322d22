"""Spellings that people type: other tools' options, sizes and cards in words, and models by their addresses."""

from __future__ import annotations

from pathlib import Path

import pytest

from memplan.catalogue.hardware.gpus import all_gpus, find_gpu
from memplan.cli.commands import Subcommand
from memplan.cli.gpu_names import TypedCard, typed_cards
from memplan.cli.model_defaults import in_other_format, with_model_defaults
from memplan.cli.plain import COMMANDS, command_of
from memplan.cli.runs import runs_of
from memplan.cli.typer_commands import given_by_typer
from memplan.core.errors import FactsMissingError, MemplanError, SpecError
from memplan.core.machines import machines_by_type
from memplan.core.units import GIB
from memplan.estimate.estimate import estimate
from memplan.models.cards import card_names, find_model
from memplan.spec.options import OPTIONS, flag
from tests.cases import each

ESTIMATE: Subcommand = command_of("estimate")
ROWS = {name: option for group in OPTIONS.values() for name, option in group.items()}


@each(
    [
        (
            "qwen2-7b --method lora --lora-r 8 --per-device-train-batch-size 2 --max-length 512 --optim adamw_bnb_8bit",
            "qwen2-7b --method lora --rank 8 --batch-size 2 --seq-len 512 --optimizer adamw_bnb_8bit",
        ),
        ("qwen2-7b --seq_len=512 --no-gradient-checkpointing", "qwen2-7b --seq-len=512 --checkpointing none"),
        ("qwen2-7b --bs 2 --seq 512 --ga 3", "qwen2-7b --batch-size 2 --seq-len 512 --grad-accum 3"),
        ("qwen2-7b --method QLoRA --context 4k", "qwen2-7b --method qlora --seq-len 4096"),
        ("qwen2-7b --method inference", "qwen2-7b --method generate"),
        ("--model_name_or_path qwen2-7b --method lora", "qwen2-7b --method lora"),
        ("qwen2-7b --method lora --gpu 2x4090", "qwen2-7b --method lora --gpu 4090 --gpus 2"),
        ("qwen2-7b --method lora --gpu 3090,4090", "qwen2-7b --method lora --gpu 3090 --gpu 4090"),
    ]
)
def test_another_spelling_is_the_same_run(lines: tuple[str, str]) -> None:
    typed, own = (runs_of(ESTIMATE.given(line.split()) or {}) for line in lines)
    assert typed == own
    assert runs_of(given_by_typer(ESTIMATE, lines[0].split())) == own


def test_no_name_stands_for_two_options() -> None:
    aliases = [alias for option in ROWS.values() for alias in option.aliases]
    assert len(aliases) == len({*aliases})
    for name in COMMANDS:
        command = command_of(name)
        if isinstance(command, Subcommand):
            own = {option for group in command.options.values() for option in group}
            assert own.isdisjoint(aliases)


def test_the_docs_list_every_other_name() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "cli.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for name, option in ROWS.items():
        if option.aliases:
            own = "MODEL" if option.is_argument else flag(name)
            others = ", ".join(f"`{flag(alias)}`" for alias in option.aliases)
            assert f"| `{own}` | {others} |" in rows


@each(
    {
        "2x4090": TypedCard("4090", 2),
        "8 x h100": TypedCard("h100", 8),
        "h100 x8": TypedCard("h100", 8),
        "3090x2": TypedCard("3090", 2),
        "mi300x": TypedCard("mi300x", None),
        "7900xtx": TypedCard("7900xtx", None),
        "9070 XT 16GB": TypedCard("9070 XT 16GB", None),
        "2xt4": TypedCard("t4", 2),
        "2x7900xtx": TypedCard("7900xtx", 2),
        "2 * RTX 3090": TypedCard("RTX 3090", 2),
        "g5.12xlarge": TypedCard("a10g", 4),  # the types of clouds' machines
        "ml.P4d.24xlarge": TypedCard("a100-sxm-40gb", 8),
        "Standard_NC48ads_A100_v4": TypedCard("a100-pcie-80gb", 2),
    }.items()
)
def test_a_number_of_cards_is_told_from_a_name(case: tuple[str, TypedCard]) -> None:
    assert [*typed_cards([case[0]])] == [case[1]]


def test_every_machine_of_a_cloud_has_cards_of_the_table() -> None:
    machines = machines_by_type().values()
    assert {find_gpu(machine.gpu).name for machine in machines} == {machine.gpu for machine in machines}
    assert {machine.cards for machine in machines} == {1, 2, 4, 8, 16}
    assert all(machine.host_memory >= 16 * GIB for machine in machines)


def test_a_size_means_the_card_with_the_least_usable_memory() -> None:
    for size in (12, 16, 24, 48, 80):
        found = find_gpu(f"{size}gb")
        same = [
            gpu.driver_total for gpu in all_gpus() if (gpu.vendor, gpu.memory_gb, gpu.devices) == ("NVIDIA", size, 1)
        ]
        assert found.driver_total == min(same)


def test_the_driver_names_this_machines_card(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(("NVIDIA GeForce RTX 3090", ""))
    monkeypatch.setattr("memplan.probe.run.driver.nvidia_smi", lambda fields, uuid: next(answers))
    assert find_gpu(next(typed_cards(["auto"])).name).name == "rtx-3090"
    with pytest.raises(SpecError, match="auto asks nvidia-smi, which did not answer"):
        next(typed_cards(["auto"]))


def test_a_files_rules_know_how_many_cards_were_typed(tmp_path: Path) -> None:
    """FSDP shards floating-point storage, which Axolotl's rule sets on several GPUs."""
    file = tmp_path / "axolotl.yml"
    base = (
        "base_model: Qwen/Qwen2-7B\nadapter: qlora\nload_in_4bit: true\nlora_target_linear: true\nmicro_batch_size: 1\n"
    )
    file.write_text(base + "fsdp_version: 2\nfsdp_config: {offload_params: false}\n", "utf-8")
    for gpu in ("2x4090", "2x4090,4x4090"):
        for run in runs_of({"model": str(file), "gpu": [gpu]}):
            assert run.method.quantization is not None
            assert run.method.quantization.storage == "bf16"


def test_two_numbers_of_cards_are_refused() -> None:
    with pytest.raises(SpecError, match="2 of a card, but --gpus 4"):
        runs_of({"model": "qwen2-7b", "gpu": ["2x4090"], "gpus": 4})


@each(
    {
        "https://huggingface.co/Qwen/Qwen2-7B": "qwen2-7b",
        "https://huggingface.co/Qwen/Qwen2-7B/tree/main": "qwen2-7b",
        "hf.co/Qwen/Qwen2-7B": "qwen2-7b",
        "unsloth/Qwen3-8B": "qwen3-8b",
        "unsloth/Meta-Llama-3.1-8B-Instruct": "llama-3.1-8b",
        "mistral:7b": "mistral-7b-v0.3",
        "deepseek-r1:7b": "deepseek-r1-distill-qwen-7b",
    }.items()
)
def test_a_model_is_found_by_address_mirror_and_tag(case: tuple[str, str]) -> None:
    typed, card = case
    assert find_model(typed).name == card


@each(
    {
        "Qwen/Qwen3-8B-AWQ": "memplan qwen3-8b --method generate --quant-format awq-int4",
        "unsloth/Qwen3-8B-unsloth-bnb-4bit": "memplan qwen3-8b --method qlora",
        "qwen3-8b-gguf": "memplan qwen3-8b --method generate --profile llama.cpp --stored Q4_K_M",
        "bartowski/Qwen_Qwen3-8B-GGUF": "memplan qwen3-8b --method generate --profile llama.cpp --stored Q4_K_M",
        "ggml-org/gpt-oss-20b-GGUF": "memplan gpt-oss-20b --method generate --profile llama.cpp",
        "google/gemma-3-12b-it-qat-q4_0-gguf": "memplan gemma-3-12b --method generate --profile llama.cpp "
        "--stored Q4_0",
        "TheBloke/Llama-2-7B-GPTQ": "memplan llama-2-7b --method generate --quant-format gptq-int4",
        "RedHatAI/Qwen3-8B-quantized.w4a16": "memplan qwen3-8b --method generate --profile vllm --stored w4a16",
        "acme/Qwen3-8B-AWQ": "memplan qwen3-8b --method generate --quant-format awq-int4",
    }.items()
)
def test_a_checkpoint_in_another_format_names_the_line_for_it(case: tuple[str, str]) -> None:
    typed, line = case
    with pytest.raises(FactsMissingError) as caught:
        find_model(typed)
    assert f"write {line}, or ask the Hub" in str(caught.value)
    is_answered = in_other_format({"model": typed})["model"] != typed  # by the command, unless it is anyone's
    assert is_answered != typed.startswith("acme/")
    _, *words = line.split()
    assert estimate(runs_of(ESTIMATE.given([*words, "--gpu", "h100"]) or {})[0]).bytes.used > 0


def test_a_model_and_a_method_are_a_run() -> None:
    for name in card_names():
        fields = with_model_defaults({"model": name, "method": {"kind": "lora"}})
        changed = {part: value for part, value in fields.items() if part not in ("model", "method")}
        changed |= {"targets": fields["method"]["targets"]} if "targets" in fields["method"] else {}
        if changed:
            [run] = runs_of({"model": name, "method": "lora"})
            assert estimate(run).bytes.used > 0
            if name.startswith("deberta"):  # which has more positions than its checkpoints were trained with
                assert changed == {"batch": {"sequence": 512}}
                continue
            with pytest.raises(MemplanError):  # without the changed ones it would not run
                estimate(run.model_validate({"model": name, "method": "lora"}))
