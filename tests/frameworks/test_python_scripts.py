"""Training scripts and notebooks: the run that their calls start, without executing anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memplan.core.errors import MemplanError, SpecError
from memplan.frameworks.reading.run_file import RunFile, read_command, read_run
from memplan.spec.run import RunSpec

UNSLOTH = """
from unsloth import FastLanguageModel, is_bfloat16_supported
from trl import SFTConfig, SFTTrainer
max_seq_length = 2 * 1024
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="unsloth/Meta-Llama-3.1-8B-bnb-4bit", max_seq_length=max_seq_length, load_in_4bit=True, dtype=None,
)
model = FastLanguageModel.get_peft_model(
    model, r=32, target_modules=["q_proj", "v_proj"], use_gradient_checkpointing="unsloth")
trainer = SFTTrainer(model=model, max_seq_length=max_seq_length, args=SFTConfig(
    per_device_train_batch_size=2, bf16=is_bfloat16_supported(), fp16=not is_bfloat16_supported(), max_steps=60))
"""
TRL = """
import torch
from datasets import load_dataset
config = LoraConfig(r=16, target_modules="all-linear")
args = SFTConfig(max_length=512, **{"packing": True}, attn_implementation="flash_attention_2", bf16=True,
                 gradient_checkpointing=False)
trainer = SFTTrainer(model="Qwen/Qwen2-7B", args=args, peft_config=config)
"""
DPO = """
model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-7B-Instruct", torch_dtype=torch.bfloat16)
args = DPOConfig("out", per_device_train_batch_size=2, beta=0.1, max_length=2048, max_prompt_length=512)
DPOTrainer(model, None, args=args).train()
"""
GRPO = """
args = GRPOConfig("out", num_generations=4, max_completion_length=512, max_prompt_length=64, use_vllm=True,
                  vllm_mode="colocate", model_init_kwargs={"torch_dtype": "bfloat16", "use_cache": False,
                                                           "attn_implementation": "flash_attention_2"})
score = "Qwen/Qwen2.5-1.5B-Instruct"
GRPOTrainer("Qwen/Qwen2.5-1.5B-Instruct", reward_funcs=score, args=args, peft_config=LoraConfig()).train()
"""
TRAINER = """
import argparse, os, torch
parser = argparse.ArgumentParser()
parser.add_argument("--model", default="Qwen/Qwen2-7B")
parser.add_argument("--batch-size", type=int, default=4)
opts = parser.parse_args()
class Settings:
    rank: int = 8
bnb = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
model = AutoModelForCausalLM.from_pretrained(opts.model, quantization_config=bnb, torch_dtype=torch.bfloat16)
model = prepare_model_for_kbit_training(model)
model = get_peft_model(model, LoraConfig(r=Settings.rank, lora_alpha=int(os.environ.get("ALPHA", 64)),
                                         target_modules=["q_proj"]))
args = TrainingArguments("out", per_device_train_batch_size=opts.batch_size, bf16=True, optim=choose(), seed=choose(),
                         gradient_checkpointing=True if torch.cuda.is_bf16_supported() else False)
Trainer(model=model, args=args).train()
"""


def read(tmp_path: Path, text: str, name: str = "train.py", typed: dict[str, Any] | None = None) -> RunFile:
    (tmp_path / name).write_text(text, "utf-8")
    return read_run(str(tmp_path / name), typed=typed)


def values(file: RunFile) -> dict[str, Any]:
    RunSpec.model_validate(file.fields)
    return {origin.field: origin.value for origin in file.origins}


SCRIPTS: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "Unsloth": (
        UNSLOTH,
        "train.py: Unsloth 2026.10, by train.py:10 SFTTrainer",
        {
            "model": "llama-3.1-8b",
            "method.kind": "qlora",
            "method.rank": 32,
            "method.alpha": 16,
            "batch.sequence": 2 * 1024,
            "batch.micro": 2,
            "batch.accumulation": 2,
            "kernels.checkpointing": "offload",
            "optimizer.name": "adamw_8bit",
        },
        (),
    ),
    "Unsloth, embeddings among the targets": (
        UNSLOTH.replace('"v_proj"]', '"lm_head", "embed_tokens"], modules_to_save=["norm"]').replace(
            "Meta-Llama-3.1-8B-bnb", "mistral-7b-instruct-v0.3-bnb"
        ),
        "train.py: Unsloth 2026.10, by train.py:10 SFTTrainer",
        {
            "model": "mistral-7b-v0.3",
            "method.targets": ["q_proj"],
            "method.modules_to_save": ["norm", "lm_head", "embed_tokens"],
        },
        (),
    ),
    "Unsloth, DPO": (
        UNSLOTH.replace("SFT", "DPO").replace("=2, bf16", "=2, max_length=1024, beta=0.1, bf16"),
        "train.py: Unsloth 2026.10, by train.py:10 DPOTrainer",
        {"trainer": "dpo", "method.kind": "qlora", "batch.sequence": 2 * 1024, "kernels.checkpointing": "offload"},
        (),
    ),
    "Unsloth, GRPO": (  # 2 x 2 completions of a pass and step are no group of 3
        UNSLOTH.replace("SFT", "GRPO")
        .replace("dtype=None", "dtype=None, fast_inference=True, gpu_memory_utilization=0.6, unsloth_vllm_standby=True")
        .replace(
            "trainer = GRPOTrainer(model=model, max_seq_length=max_seq_length,", "trainer = GRPOTrainer(model=model,"
        )
        .replace("=2, bf16", "=2, num_generations=3, max_prompt_length=256, max_completion_length=128, bf16"),
        "train.py: Unsloth 2026.10, by train.py:10 GRPOTrainer",
        {
            "trainer": "grpo",
            "reference": "none",
            "rollout": "colocate",
            "batch.sequence": 256,
            "batch.new_tokens": 128,
            "batch.generations": 3,
            "batch.micro": 3,
            "serving.memory_utilization": 0.6,
            "serving.max_model_len": 2 * 1024,
            "serving.sleep": True,
        },
        (),
    ),
    "Unsloth, adapters that are not counted": (
        UNSLOTH.replace("r=32,", "r=32, finetune_mlp_modules=False, qat_scheme='int4',").replace(
            "Meta-Llama-3.1-8B-bnb-4bit", "gemma-3-4b-it"
        ),
        "train.py: Unsloth 2026.10, by train.py:10 SFTTrainer",
        {"method.rank": 32},
        (
            "lora.finetune_mlp_modules (train.py:9): adapters of these modules are counted",
            "qat_scheme (train.py:9): fake quantisation, not supported yet",
        ),
    ),
    "Unsloth, GRPO with lengths of the data": (
        UNSLOTH.replace("SFT", "GRPO")
        .replace(
            "trainer = GRPOTrainer(model=model, max_seq_length=max_seq_length,", "trainer = GRPOTrainer(model=model,"
        )
        .replace("=2, bf16", "=2, max_prompt_length=longest + 1, bf16"),
        "train.py: Unsloth 2026.10, by train.py:10 GRPOTrainer",
        {"batch.sequence": 2 * 1024 - 256, "batch.new_tokens": 256},
        ("max_prompt_length (train.py:11): cannot be told without running the script",),
    ),
    "a reference that is loaded later": (
        DPO.replace("model = Auto", "policy = Auto")
        .replace("DPOTrainer(model, None", "DPOTrainer(policy, ref")
        .replace("args =", "ref = AutoModelForCausalLM.from_pretrained('Qwen/Qwen2-0.5B')\nargs ="),
        "train.py: TRL 1.16, by train.py:5 DPOTrainer",
        {"model": "Qwen/Qwen2.5-7B-Instruct", "precision.weights": "bf16"},
        (),
    ),
    "GKD": (
        "student = AutoModelForCausalLM.from_pretrained('Qwen/Qwen2-0.5B', dtype='bfloat16')\n"
        "teacher = AutoModelForCausalLM.from_pretrained('Qwen/Qwen2-1.5B')\n"
        "GKDTrainer(model=student, teacher_model=teacher, args=GKDConfig(max_length=512, lmbda=0.5))",
        "train.py: TRL 1.16, by train.py:3 GKDTrainer",
        {
            "trainer": "gkd",
            "model": "Qwen/Qwen2-0.5B",
            "roles.teacher.model": "Qwen/Qwen2-1.5B",
            "batch.sequence": 512,
            "precision.weights": "bf16",
        },
        (),
    ),
    "distillation": (
        "args = DistillationConfig(max_completion_length=512)\n"
        "DistillationTrainer(model='Qwen/Qwen2-0.5B', teacher_model='Qwen/Qwen2-1.5B', args=args)",
        "train.py: TRL 1.16, by train.py:2 DistillationTrainer",
        {"trainer": "distill", "roles.teacher.model": "Qwen/Qwen2-1.5B", "batch.new_tokens": 512},
        (),
    ),
    "GRPO with a reward model that is loaded": (
        GRPO.replace("score =", "score = AutoModelForSequenceClassification.from_pretrained(").replace(
            '-Instruct"\nGRPO', '-Instruct")\nGRPO'
        ),
        "train.py: TRL 1.16, by train.py:6 GRPOTrainer",
        {"model": "Qwen/Qwen2.5-1.5B-Instruct", "roles.reward.model": "Qwen/Qwen2.5-1.5B-Instruct"},
        (),
    ),
    "a stored adapter": (
        "base = Qwen2ForCausalLM.from_pretrained('Qwen/Qwen2-7B')\n"
        "model = PeftModel.from_pretrained(base, 'mine', is_trainable=True)\nSFTTrainer(model)",
        "train.py: TRL 1.16, by train.py:3 SFTTrainer",
        {"model": "Qwen/Qwen2-7B", "method.kind": "lora", "method.rank": 8},
        (
            "PeftModel.from_pretrained (train.py:2): the adapter's own settings are not known: rank 8 on peft's "
            "default modules is counted",
        ),
    ),
    "two trainers": (
        TRL + "DPOTrainer(model='a')",
        "train.py: TRL 1.16, by train.py:7 SFTTrainer",
        {"model": "Qwen/Qwen2-7B", "trainer": None},
        ("DPOTrainer (train.py:8): a second trainer; SFTTrainer is counted",),
    ),
    "TRL": (
        TRL,
        "train.py: TRL 1.16, by train.py:7 SFTTrainer",
        {
            "model": "Qwen/Qwen2-7B",
            "method.kind": "lora",
            "method.rank": 16,
            "method.alpha": 8,
            "batch.sequence": 512,
            "batch.packing": "bfd",
            "kernels.attention": "flash_attention_2",
            "kernels.checkpointing": "none",
            "precision.weights": "fp32",
        },
        (),
    ),
    "DPO": (
        DPO,
        "train.py: TRL 1.16, by train.py:4 DPOTrainer",
        {"trainer": "dpo", "batch.sequence": 2048, "batch.micro": 2, "precision.weights": "bf16"},
        (),
    ),
    "GRPO": (
        GRPO,
        "train.py: TRL 1.16, by train.py:6 GRPOTrainer",
        {
            "trainer": "grpo",
            "model": "Qwen/Qwen2.5-1.5B-Instruct",
            "method.kind": "lora",
            "batch.generations": 4,
            "batch.new_tokens": 512,
            "rollout": "colocate",
            "kernels.attention": "flash_attention_2",
            "precision.weights": "bf16",
            "roles.reward.model": "Qwen/Qwen2.5-1.5B-Instruct",
        },
        (),
    ),
    "SimPO": (
        "CPOTrainer(model='Qwen/Qwen2-7B', args=CPOConfig(loss_type='simpo', cpo_alpha=0.0))",
        "train.py: TRL 1.16, by train.py:1 CPOTrainer",
        {"trainer": "simpo", "precision.weights": "fp32"},
        (),
    ),
    "transformers": (
        TRAINER,
        "train.py: transformers 5.24, by train.py:16 Trainer",
        {
            "method.kind": "qlora",
            "method.rank": 8,
            "method.alpha": 64,
            "method.targets": ["q_proj"],
            "method.quantization.format": "nf4",
            "method.quantization.double_quant": False,
            "method.quantization.kbit_preparation": True,
            "batch.micro": 4,
            "batch.sequence": 2048,
            "kernels.checkpointing": "full",
            "precision.weights": "bf16",
        },
        ("optim (train.py:14): cannot be told without running the script",),
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_the_run_that_it_starts(tmp_path: Path, name: str) -> None:
    text, headline, expected, notes = SCRIPTS[name]
    file = read(tmp_path, text)
    found = values(file)
    assert (file.headline, file.notes) == (headline, notes)
    assert {field: found.get(field) for field in expected} == expected


def test_a_value_of_a_script_says_its_line_and_argument(tmp_path: Path) -> None:
    reasons = {origin.field: origin.why for origin in read(tmp_path, UNSLOTH).origins}
    assert reasons["method.rank"] == "train.py:9 r"
    assert reasons["model"] == "a copy of the original: train.py:6 model_name"
    assert reasons["method.kind"] == "train.py:8 get_peft_model"
    assert reasons["batch.accumulation"] == "default of Unsloth 2026.10"


def test_a_script_is_read_as_a_version_of_its_framework(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(tmp_path, DPO)
    monkeypatch.chdir(tmp_path)
    for file in (read_run("train.py", "trl-0.24"), read_command("python train.py", "trl-0.24")):
        assert (file.title, file.fields["profile"]) == ("TRL 0.24", "trl-0.24")
    with pytest.raises(SpecError, match=r"framework: train\.py:4 DPOTrainer is TRL's, not Axolotl's"):
        read_run("train.py", "axolotl")


def notebook(*cells: str) -> str:
    code = [{"cell_type": "code", "source": cell.splitlines(keepends=True)} for cell in cells]
    return json.dumps({"cells": [{"cell_type": "markdown", "source": ["# Title"]}, *code], "nbformat": 4})


COMMANDS = {
    "%env CUDA_VISIBLE_DEVICES=0,1\nlength = 32\n!trl sft --model_name_or_path {model} \\\n  --max_length $length"
    " --dataset_name x": 2,
    "%%bash\ncd x\ntrl sft --model_name_or_path Qwen/Qwen2-7B --max_length 32 --dataset_name x": 1,
    "import os\nos.environ['CUDA_VISIBLE_DEVICES'] = '0,1,2'\n!trl sft --config run.yaml": 3,
}


@pytest.mark.parametrize("cell", COMMANDS)
def test_a_notebook_is_the_run_that_its_command_starts(tmp_path: Path, cell: str) -> None:
    written = "%%writefile run.yaml\nmodel_name_or_path: Qwen/Qwen2-7B\ndataset_name: x\nmax_length: 32"
    cells = ("!pip install trl", 'size = "7B"\nmodel = f"Qwen/Qwen2-{size}"  # small', written, "%%html\ntrl sft", cell)
    file = read(tmp_path, notebook(*cells), "a.ipynb")
    line = next(number for number, text in enumerate(cell.splitlines(), 1) if "trl sft" in text)
    assert file.name == f"a.ipynb:cell 6, line {line}"
    assert (file.fields["model"], file.fields["batch"]["sequence"], file.notes) == ("Qwen/Qwen2-7B", 32, ())
    assert file.fields.get("parallelism", {}).get("world", 1) == COMMANDS[cell]


def test_a_command_of_a_notebook_that_is_wrong_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^a\.ipynb:cell 2, line 1: config: there is no file 'no\.yaml' next to"):
        read(tmp_path, notebook("!trl sft --config no.yaml"), "a.ipynb")


def test_a_notebook_says_cells(tmp_path: Path) -> None:
    first, second = UNSLOTH.split("trainer =")
    file = read(
        tmp_path, notebook("%%capture\n!pip install x (", f"!pip install y\n{first}", f"trainer ={second}"), "a.ipynb"
    )
    assert file.headline == "a.ipynb: Unsloth 2026.10, by a.ipynb:cell 4, line 1 SFTTrainer"
    assert {o.field: o.why for o in file.origins}["method.rank"] == "a.ipynb:cell 3, line 10 r"


def test_a_cell_that_is_not_python_is_left_out(tmp_path: Path) -> None:
    file = read(tmp_path, notebook("!pip install \\\n  trl", "a b", TRL), "a.ipynb")
    assert file.headline == "a.ipynb: TRL 1.16, by a.ipynb:cell 4, line 7 SFTTrainer"
    assert file.notes == ("the cell (a.ipynb:cell 3, line 1): is not Python, so not read",)


def test_a_command_runs_a_script_with_its_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(tmp_path, TRAINER)
    monkeypatch.chdir(tmp_path)
    file = read_command("accelerate launch --num_processes 2 train.py --batch-size 3 --model Qwen/Qwen2-0.5B")
    found = values(file)
    assert (found["model"], found["batch.micro"], found["parallelism.world"]) == ("Qwen/Qwen2-0.5B", "3" and 3, 2)


OWN_ARGUMENTS = """
@dataclass
class Own:
    model_id: str = field(default="Qwen/Qwen2-7B", metadata={"help": "its name"})
    lora_r: int = 32
own, args = HfArgumentParser((Own, SFTConfig)).parse_args_into_dataclasses()
model = AutoModelForCausalLM.from_pretrained(own.model_id)
SFTTrainer(model=model, args=args, peft_config=LoraConfig(r=own.lora_r))
"""
SWITCHES = """
parser.add_argument("--gc", action="store_true")
parser.add_argument("--full-logits", action="store_false")
args = TrainingArguments("out", gradient_checkpointing=args.gc, bf16=args.full_logits)
Trainer(model=AutoModelForCausalLM.from_pretrained("Qwen/Qwen2-7B"), args=args)
"""


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        (OWN_ARGUMENTS, "", {"model": "Qwen/Qwen2-7B", "method.rank": 32, "batch.micro": 8}),
        (
            OWN_ARGUMENTS,
            "--model_id Qwen/Qwen2-0.5B --lora_r 8 --per_device_train_batch_size 4 --max_length 4096",
            {"model": "Qwen/Qwen2-0.5B", "method.rank": 8, "batch.micro": 4, "batch.sequence": 4096},
        ),
        (SWITCHES, "", {"kernels.checkpointing": "none", "precision.autocast": True}),
        (SWITCHES, "--gc", {"kernels.checkpointing": "full"}),
        (SWITCHES, "--per_device_train_batch_size 4", {"batch.micro": 8}),  # argparse does not know it
    ],
)
def test_a_script_takes_flags_of_its_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, flags: str, expected: dict[str, Any]
) -> None:
    read(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    file = read_command(f"python train.py {flags}")
    found = values(file)
    assert ({field: found.get(field) for field in expected}, file.notes) == (expected, ())


@pytest.mark.parametrize("ask", ["import os\nos.system('touch {}')\n", "__import__('pathlib').Path({!r}).touch()\n"])
def test_nothing_is_executed(tmp_path: Path, ask: str) -> None:
    proof = tmp_path / "proof"
    read(tmp_path, ask.format(str(proof)) + TRL)
    assert not proof.exists()


REFUSED: dict[str, tuple[str, str, str]] = {
    "no trainer": ("train.py", "print(1)", "train.py has no trainer that is read; SFTTrainer, DPOTrainer, "),
    "another trainer": (
        "train.py",
        "\nXPOTrainer(model='a')",
        "train.py:2: XPOTrainer is not supported yet; ",
    ),
    "syntax": ("train.py", "x = (\n", "train.py:1: is not Python ('(' was never closed)"),
    "NUL": ("train.py", "x = '\0'", "train.py"),
    "deep": ("train.py", "(" * 5000, "train.py"),
    "no cell of Python": ("a.ipynb", notebook("a b", "c d"), "a.ipynb:cell 2, line 1: is not Python"),
    "a cell that is not Python": (
        "a.ipynb",
        notebook("x = 1", "trainer = SFTTrainer("),
        "a.ipynb has no trainer that is read, and a.ipynb:cell 3, line 1 is not Python; SFTTrainer, ",
    ),
    "no code": ("a.ipynb", notebook(), "a.ipynb has no code"),
    "no notebook": ("a.ipynb", "[1]", "a.ipynb is not a notebook: it is no JSON with cells"),
    "no JSON": ("a.ipynb", "{", "a.ipynb is not a notebook"),
    "value": (
        "train.py",
        TRL.replace("max_length=512", "max_length='long'"),
        "train.py:5: max_length: must be",
    ),
    "folder": ("train.py/x", "", "cannot be read"),
    "large": ("train.py", "#" * (2**20 + 1), "is larger than 1 MiB, too large for a run"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_script_that_is_not_read_is_one_line(tmp_path: Path, name: str) -> None:
    file, text, error = REFUSED[name]
    if "/" in file:
        (tmp_path / "train.py").mkdir()
        with pytest.raises(SpecError, match="cannot be read"):
            read_run(str(tmp_path / "train.py" / "x.py"))
        return
    with pytest.raises(SpecError) as raised:
        read(tmp_path, text, file)
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_name_that_is_set_to_itself_cannot_be_told(tmp_path: Path) -> None:
    file = read(tmp_path, TRL.replace("max_length=512", "max_length=n").replace("import torch", "n = n + 1"))
    assert file.notes == ("max_length (train.py:5): cannot be told without running the script",)


@pytest.mark.parametrize(
    ("more", "left_out"),
    [
        ("**dict(packing=True)", ""),
        ("**{**{'packing': True}}", ""),
        ("packing=True if torch.cuda.is_available() else False", ""),
        ("**dict(**{'packing': True})", ""),
        ("packing=is_available()", "packing"),
        ("**dict(base, packing=True)", "**dict(base, packing=True)"),
        ("**more(1)", "**more(1)"),
        ("**{**more}", "**more"),
    ],
)
def test_arguments_in_a_mapping_are_told_or_listed(tmp_path: Path, more: str, left_out: str) -> None:
    file = read(tmp_path, TRL.replace('**{"packing": True}', more))
    assert ("packing" in file.fields["batch"]) == (not left_out)
    assert [each.key for each in file.unread] == [left_out] * bool(left_out)


EXPRESSIONS = ["n", "1", "n.m", "f(n)", "[n, 2]", "-n", "not n", "n if 1 else 2", "2 * n // 0", "{'a': n}", "lambda: n"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.lists(st.sampled_from(EXPRESSIONS), min_size=2, max_size=2))
def test_any_expression_is_told_or_listed(tmp_path: Path, parts: list[str]) -> None:
    try:
        read(tmp_path, f"n = {parts[0]}\n{TRL.replace('max_length=512', f'max_length={parts[1]}')}")
    except MemplanError:
        return


@pytest.mark.parametrize(
    ("config", "format"),
    [
        ("HqqConfig(nbits=4, group_size=64)", "hqq-int4"),
        ("TorchAoConfig(quant_type=Int8WeightOnlyConfig())", "torchao-int8"),
        ('TorchAoConfig("int8_weight_only")', "torchao-int8"),
        ("HqqConfig(nbits=2)", None),
    ],
)
def test_weights_of_other_libraries_are_read(tmp_path: Path, config: str, format: str | None) -> None:
    text = f'q = {config}\nmodel = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2-7B", quantization_config=q)\n'
    text += 'trainer = SFTTrainer(model, args=SFTConfig(), peft_config=LoraConfig(target_modules=["q_proj"]))\n'
    file = read(tmp_path, text)
    found = {origin.field: origin.value for origin in file.origins}
    assert found.get("method.quantization.format") == format
    assert found["method.kind"] == ("qlora" if format else "lora")
    assert any(unread.key == "HqqConfig" for unread in file.unread) == (format is None)
