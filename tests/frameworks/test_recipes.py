"""Files of torchtune, LitGPT, Unsloth and NeMo Automodel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memplan import estimate
from memplan.core.errors import SpecError
from memplan.frameworks.reading.run_file import RunFile, read_command, read_run
from memplan.spec.run import RunSpec

GOLDEN = Path(__file__).parents[1] / "golden" / "published.jsonl"
TORCHTUNE = """
model:
  _component_: torchtune.models.llama3_1.qlora_llama3_1_8b
  lora_attn_modules: [q_proj, v_proj, output_proj]
  apply_lora_to_mlp: true
  lora_rank: 16
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, max_seq_len: 512}
dataset: {_component_: torchtune.datasets.alpaca_dataset, packed: false}
batch_size: 2
gradient_accumulation_steps: 4
optimizer: {_component_: torch.optim.AdamW, fused: true, lr: 3e-4}
loss: {_component_: torchtune.modules.loss.LinearCrossEntropyLoss}
clip_grad_norm: null
enable_activation_checkpointing: true
dtype: bf16
"""
LITGPT = """
checkpoint_dir: checkpoints/google/gemma-2-2b
precision: bf16-true
devices: 1
lora_r: 8
lora_dropout: 0.1
lora_query: true
lora_key: true
lora_value: true
lora_projection: true
lora_mlp: true
lora_head: true
train: {global_batch_size: 6, micro_batch_size: 2, max_seq_length: 512}
optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.0002}}
"""
UNSLOTH = """
model: unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit
training: {max_seq_length: 1024, batch_size: 4}
lora: {lora_r: 32}
"""
AUTOMODEL = """
recipe: TrainFinetuneRecipeForNextTokenPrediction
step_scheduler: {global_batch_size: 32, local_batch_size: 4}
model:
  _target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained
  pretrained_model_name_or_path: meta-llama/Llama-3.1-8B
  torch_dtype: bfloat16
peft: {_target_: nemo_automodel.components._peft.lora.PeftConfig, target_modules: "*_proj", dim: 16}
distributed: {strategy: fsdp2, dp_size: 2, activation_checkpointing: true}
quantization: {load_in_4bit: true, bnb_4bit_use_double_quant: true, bnb_4bit_quant_type: nf4}
packed_sequence: {packed_sequence_size: 4096}
"""
LLAMA = {"model": "llama-3.1-8b"}


def read(tmp_path: Path, text: str, typed: dict[str, Any] | None = None) -> RunFile:
    (tmp_path / "run.yaml").write_text(text, "utf-8")
    return read_run(str(tmp_path / "run.yaml"), typed=typed)


def values(file: RunFile) -> dict[str, Any]:
    RunSpec.model_validate({"model": "qwen2-7b", **file.fields})
    return {origin.field: origin.value for origin in file.origins}


FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "torchtune": (
        TORCHTUNE,
        {
            "model": "llama-3.1-8b",
            "method.kind": "qlora",
            "method.quantization.double_quant": True,
            "method.targets": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "method.rank": 16,
            "batch.micro": 2,
            "batch.sequence": 512,
            "batch.accumulation": 4,
            "optimizer.name": "adamw_torch_fused",
            "kernels.loss": "chunked",
            "kernels.checkpointing": "full",
            "loop.clip_grad_norm": None,
            "precision.weights": "bf16",
            "profile": "torchtune",
        },
    ),
    "litgpt": (
        LITGPT,
        {
            "method.kind": "lora",
            "method.targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
            "batch.accumulation": 6 // 2,
            "precision.weights": "bf16",
            "profile": "litgpt-2024",
        },
    ),
    "unsloth": (
        UNSLOTH,
        {
            "model": "llama-3.1-8b",
            "method.kind": "qlora",
            "method.rank": 32,
            "batch.micro": 4,
            "batch.sequence": 1024,
            "kernels.checkpointing": "offload",
            "optimizer.name": "adamw_8bit",
            "profile": "unsloth-2026.10",
        },
    ),
    "automodel": (
        AUTOMODEL,
        {
            "model": "meta-llama/Llama-3.1-8B",
            "method.kind": "qlora",
            "profile": "automodel-0.7",
            "method.targets": "all-linear",
            "batch.sequence": 4096,
            "batch.accumulation": 32 // (4 * 2),
            "parallelism.world": 2,
            "parallelism.strategy": "fsdp2",
            "kernels.checkpointing": "full",
            "precision.weights": "bf16",
        },
    ),
}


@pytest.mark.parametrize("framework", FILES)
def test_a_file_is_the_run_that_its_framework_starts(tmp_path: Path, framework: str) -> None:
    text, expected = FILES[framework]
    file = read(tmp_path, text)
    found = values(file)
    assert (file.framework, file.unread) == (framework, ())
    assert {field: found.get(field) for field in expected} == expected


def test_a_litgpt_file_is_the_run_whose_memory_was_published(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in GOLDEN.read_text("utf-8").splitlines()]
    row = next(row for row in rows if row["id"] == "litgpt-hub-gemma2-2b-lora-1xa10g")
    read_file = estimate(RunSpec.model_validate({**read(tmp_path, LITGPT).fields, "gpu": "a10g"}))
    published = estimate(RunSpec.model_validate(row["run"]))
    assert read_file.bytes.used == published.bytes.used


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "torchtune full, in backward": (
        TORCHTUNE.replace("qlora_llama3_1_8b", "qwen2_5_0_5b").replace(
            "torch.optim.AdamW", "bitsandbytes.optim.PagedAdamW"
        )
        + "optimizer_in_bwd: true\n",
        {
            "model": "qwen2.5-0.5b",
            "method.kind": "full",
            "optimizer.name": "paged_adamw_32bit",
            "optimizer.in_backward": True,
        },
    ),
    "torchtune dora, offloaded": (
        TORCHTUNE.replace("qlora_llama3_1_8b", "lora_llama3_2_1b").replace("lora_rank: 16", "use_dora: true")
        + "enable_activation_offloading: true\n",
        {"model": "llama-3.2-1b", "method.kind": "dora", "kernels.checkpointing": "offload"},
    ),
    "torchtune, by a model without a size": (
        TORCHTUNE.replace("qlora_llama3_1_8b", "qlora_phi4_14b"),
        {"model": "phi-4", "method.kind": "qlora"},
    ),
    "litgpt on two devices": (
        LITGPT.replace("devices: 1", "devices: 2"),
        {
            "parallelism.strategy": "fsdp2",
            "parallelism.world": 2,
            "kernels.checkpointing": "full",
            "batch.accumulation": 1,
        },
    ),
    "litgpt in 4 bits": (
        LITGPT + "quantize: bnb.nf4-dq\n",
        {"method.kind": "qlora", "method.quantization.double_quant": True},
    ),
    "litgpt full": (
        "checkpoint_dir: EleutherAI/pythia-1b\ntrain: {max_norm: 1}\n",
        {"method.kind": "full", "loop.clip_grad_norm": 1.0, "precision.compute": "bf16", "precision.weights": "fp32"},
    ),
    "unsloth full": (
        "model: unsloth/Qwen2.5-0.5B\ntraining: {training_type: full, gradient_checkpointing: 'true', packing: true}\n",
        {
            "model": "unsloth/Qwen2.5-0.5B",
            "method.kind": "full",
            "kernels.checkpointing": "full",
            "batch.packing": "bfd",
        },
    ),
    "automodel full": (
        "step_scheduler: {local_batch_size: 8}\nmodel: {pretrained_model_name_or_path: a}\ndataset: {_target_: b}\n"
        "loss_fn: {_target_: c.FusedLinearCrossEntropy}\n",
        {"method.kind": "full", "kernels.loss": "fused", "kernels.checkpointing": "none", "batch.sequence": 2048},
    ),
    "automodel in fp32 under FSDP2": (
        "step_scheduler: {local_batch_size: 1, global_batch_size: 16}\ndataset: {_target_: b}\n"
        "model: {pretrained_model_name_or_path: a, torch_dtype: float32}\n"
        "distributed: {strategy: fsdp2, dp_size: 8, defer_fsdp_grad_sync: false}\n",
        {
            "precision.weights": "fp32",
            "precision.compute": "bf16",
            "precision.autocast": True,
            "batch.accumulation": 2,
            "loop.sync_each_batch": True,
            "loop.clip_grad_norm": 1.0,
        },
    ),
}


@pytest.mark.parametrize(("text", "expected"), CASES.values(), ids=CASES.keys())
def test_keys_of_recipes_are_fields(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    found = values(read(tmp_path, text))
    assert {field: found.get(field) for field in expected} == expected


def test_commands_start_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    read(tmp_path, TORCHTUNE)
    command = "tune run --nproc_per_node 2 lora_finetune_distributed --config run.yaml batch_size=3 dtype=fp32"
    found = values(read_command(command))
    assert (found["batch.micro"], found["precision.weights"]) == (3, "fp32")
    assert (found["parallelism.strategy"], found["parallelism.world"]) == ("fsdp2", 2)
    command = "tune run --nproc_per_node 4 lora_finetune_distributed --config {} batch_size=3"
    found = values(read_command(command.format("llama3_1/8B_lora")))  # torchtune's own
    assert (found["model"], found["method.rank"], found["method.alpha"]) == ("llama-3.1-8b", 8, 16)
    assert (found["batch.micro"], found["batch.accumulation"], found["parallelism.world"]) == (3, 8, 4)
    with pytest.raises(SpecError, match=r"no file 'llama3_1/8B_lore' .*; did you mean llama3_1/8B_lora\?"):
        read_command(command.format("llama3_1/8B_lore"))
    command = "litgpt finetune_lora Qwen/Qwen2.5-0.5B --train.micro_batch_size 3 --precision bf16-true --lora_r 4"
    found = values(read_command(command))
    assert (found["batch.micro"], found["method.rank"]) == (3, 4)
    assert values(read_command("litgpt finetune_lora checkpoints/microsoft/phi-4"))["model"] == "microsoft/phi-4"
    found = values(read_command("litgpt finetune_lora checkpoints/microsoft/Phi-3-mini-4k-instruct"))
    assert found["model"] == "microsoft/Phi-3-mini-4k-instruct"
    read(tmp_path, AUTOMODEL)
    found = values(read_command("automodel run.yaml --nproc-per-node 4 --step_scheduler.local_batch_size 2"))
    assert (found["batch.micro"], found["parallelism.world"]) == (2, 4)


TITAN = """
[model]
name = "llama3"  # 8B
flavor = "8B"
[optimizer]
name = "AdamW"
[training]
local_batch_size = 2
seq_len = 8192
[parallelism]
data_parallel_shard_degree = -1
tensor_parallel_degree = 2
[activation_checkpoint]
mode = "full"
"""


def test_a_torchtitan_file_is_the_run_that_it_starts(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(TITAN, "utf-8")
    file = read_run(str(tmp_path / "run.toml"), typed={"parallelism.world": 8})
    found = values(file)
    assert (file.framework, file.unread, found["model"]) == ("torchtitan", (), "llama-3.1-8b")
    assert (found["batch.micro"], found["batch.sequence"], found["kernels.checkpointing"]) == (2, 8192, "full")
    assert (found["parallelism.tp"], found["parallelism.dp"], found["parallelism.strategy"]) == (2, 8 // 2, "fsdp2")
    assert (found["precision.weights"], found["precision.compute"]) == ("fp32", "bf16")
    assert {o.field: o.why for o in file.origins}["batch.sequence"] == "run.toml:9 training.seq_len"
    every_second = TITAN.replace('"full"', '"selective"')  # the option's default
    (tmp_path / "run.toml").write_text(every_second, "utf-8")
    file = read_run(str(tmp_path / "run.toml"))
    found = values(file)
    assert (found["kernels.checkpointing"], found["kernels.every_n_layers"], file.notes) == ("full", 2, ())
    assert found["parallelism.world"] == 2
    (tmp_path / "run.toml").write_text(every_second + 'selective_ac_option = "1"\n', "utf-8")
    found = values(read_run(str(tmp_path / "run.toml")))
    assert (found["kernels.checkpointing"], found.get("kernels.every_n_layers")) == ("full", None)
    (tmp_path / "run.toml").write_text(every_second.replace("tensor_parallel", "pipeline_parallel"), "utf-8")
    file = read_run(str(tmp_path / "run.toml"))
    assert values(file)["kernels.checkpointing"] == "none"
    assert [note.partition(": every 2 ")[0] for note in file.notes] == ["activation_checkpoint.mode (run.toml:14)"]
    by_operation = TITAN.replace('"full"', '"selective"\nselective_ac_option = "op"')
    (tmp_path / "run.toml").write_text(by_operation, "utf-8")
    file = read_run(str(tmp_path / "run.toml"))
    assert (values(file)["kernels.checkpointing"], file.notes) == ("selective", ())
    for text, error in (("a = ", "run.toml is not TOML"), (TITAN.replace("8B", "9B"), "llama3 9B is not known here")):
        (tmp_path / "run.toml").write_text(text, "utf-8")
        with pytest.raises(SpecError, match=error):
            read_run(str(tmp_path / "run.toml"))


REFUSED = {
    TORCHTUNE.replace("qlora_llama3_1_8b", "my_model"): "model._component_: 'my_model' is not known here",
    TORCHTUNE.replace("qlora_llama3_1_8b", "lora_surprise9_8b"): "write memplan MODEL --spec run.yaml",
    TORCHTUNE.replace("torch.optim.AdamW", "mine.Lion"): "optimizer._component_: 'mine.Lion' is not supported yet",
    TORCHTUNE.replace("torchtune.modules.loss", "torchtune.rlhf.loss"): "only supervised fine-tuning is supported yet",
    TORCHTUNE.replace("checkpointing: true", "offloading: true"): "torchtune needs enable_activation_checkpointing",
    LITGPT.replace("bf16-true", "bf8"): "run.yaml:3: precision: must be bf16-true, ",
    LITGPT + "quantize: bnb.int8-training\n": "'bnb.int8-training' is not supported; supported with LoRA: bnb.nf4, ",
    UNSLOTH.replace("batch_size: 4", "gradient_checkpointing: maybe"): "must be unsloth, true or none, not 'maybe'",
    AUTOMODEL.replace("TrainFinetune", "KnowledgeDistillation"): "is not supported yet; supported: TrainFinetuneRecipe",
    AUTOMODEL.replace("strategy: fsdp2", "strategy: megatron_fsdp"): "'megatron_fsdp' is not supported yet",
}


@pytest.mark.parametrize(("text", "error"), REFUSED.items())
def test_a_recipe_that_is_not_supported_is_one_line(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(SpecError) as raised:
        read(tmp_path, text)
    assert error in str(raised.value)
    assert str(raised.value).startswith("run.yaml:")


def test_a_typed_model_replaces_that_of_a_recipe(tmp_path: Path) -> None:
    text = TORCHTUNE.replace("qlora_llama3_1_8b", "lora_surprise9_8b")
    assert read(tmp_path, text, LLAMA).fields["model"] == "llama-3.1-8b"


def test_an_unknown_key_of_a_section_is_named(tmp_path: Path) -> None:
    assert read(tmp_path, TORCHTUNE + "tensor_parallel_dim: 1\n").notes == ()
    assert len(read(tmp_path, TORCHTUNE + "tensor_parallel_dim: 2\n").notes) == 1
    file = read(tmp_path, LITGPT.replace("max_seq_length", "max_seq_lenght"))
    assert file.notes == (
        "train.max_seq_lenght (run.yaml:13): unknown key of LitGPT; did you mean train.max_seq_length?",
    )
