"""Run files of training frameworks: which framework it is, the run that it would start, and why each value."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from memplan.cli.runs import runs_of
from memplan.core.errors import MemplanError, SpecError
from memplan.estimate.estimate import estimate
from memplan.frameworks.axolotl import AXOLOTL
from memplan.frameworks.change_table import change_lines
from memplan.frameworks.llamafactory import LLAMAFACTORY
from memplan.frameworks.reading.config import defaults_of
from memplan.frameworks.reading.document import Document
from memplan.frameworks.reading.run_file import RunFile, detect, read_run
from memplan.frameworks.reading.run_format import FORMATS, format_named
from memplan.frameworks.trl import TRL
from memplan.spec.run import RunSpec

AXOLOTL_QLORA = """
base_model: Qwen/Qwen2-7B
load_in_4bit: true
adapter: qlora
lora_r: 8
lora_target_linear: true
sequence_len: 1024
sample_packing: true
micro_batch_size: 3
gradient_accumulation_steps: 2
optimizer: paged_adamw_8bit
learning_rate: 2e-5
bf16: auto
flash_attention: true
gradient_checkpointing: true
wandb_project: mine
"""
LLAMAFACTORY_LORA = """
model_name_or_path: Qwen/Qwen2-7B
stage: sft
finetuning_type: lora
lora_target: q_proj,v_proj
cutoff_len: 512
per_device_train_batch_size: 2
bf16: true
"""
TRL_SFT = """
model_name_or_path: Qwen/Qwen2-7B
dataset_name: trl-lib/Capybara
use_peft: true
load_in_4bit: true
"""


def read(tmp_path: Path, text: str, framework: str | None = None, name: str = "run.yaml", **companions: Any) -> RunFile:
    (tmp_path / name).write_text(text, "utf-8")
    given: dict[str, str] = {}
    for kind, value in companions.items():
        given[kind] = str(tmp_path / f"{kind}.json")
        Path(given[kind]).write_text(json.dumps(value), "utf-8")
    return read_run(str(tmp_path / name), framework, given)


def values(file: RunFile) -> dict[str, Any]:
    RunSpec.model_validate({"model": "qwen2-7b", **file.fields})  # the run is one that memplan accepts
    return {origin.field: origin.value for origin in file.origins}


def why(file: RunFile) -> dict[str, str]:
    return {origin.field: origin.why for origin in file.origins}


# --- Axolotl ---


def test_an_axolotl_file_is_the_run_that_axolotl_starts(tmp_path: Path) -> None:
    file = read(tmp_path, AXOLOTL_QLORA)
    assert file.headline == "run.yaml: Axolotl 0.21, by base_model and micro_batch_size"
    assert file.unread == ()
    found = values(file)
    assert found["model"] == "Qwen/Qwen2-7B"
    assert (found["method.kind"], found["method.rank"], found["method.targets"]) == ("qlora", 8, "all-linear")
    assert (found["method.quantization.format"], found["method.quantization.double_quant"]) == ("nf4", True)
    assert (found["batch.micro"], found["batch.sequence"], found["batch.accumulation"]) == (3, 1024, 2)
    assert found["batch.packing"] == "sample_packing"
    assert "loop.padded" not in found
    assert (found["precision.weights"], found["precision.autocast"]) == ("bf16", True)
    assert (found["kernels.attention"], found["kernels.checkpointing"]) == ("flash_attention_2", "full")
    assert (found["kernels.fused"], found["kernels.reentrant"]) == (["lora"], False)
    assert (found["optimizer.name"], found["loop.expandable_segments"]) == ("paged_adamw_8bit", True)


SWIFT_LORA = "model: a\ntuner_type: lora\n"
AXOLOTL_LORA = "base_model: a\nmicro_batch_size: 1\nadapter: lora\nlora_target_linear: true\n"


@pytest.mark.parametrize(
    ("text", "trainer", "reference"),
    [
        (f"{AXOLOTL_LORA}rl: dpo", "dpo", None),
        (f"{AXOLOTL_LORA}rl: dpo\nplugins: [liger]\nliger_fused_linear_cross_entropy: true", "dpo", None),
        ("base_model: a\nmicro_batch_size: 1\nrl: ipo\nprecompute_ref_log_probs: true", "dpo", "precomputed"),
        (f"{AXOLOTL_LORA}rl: dpo\nrl_adapter_ref_model: true\ndpo_use_liger_kernel: true", "dpo", "copy"),
        ("base_model: a\nmicro_batch_size: 1\nrl: simpo", "cpo", None),
        ("base_model: a\nmicro_batch_size: 1\nrl: simpo\ncpo_alpha: 0", "simpo", None),
        ("model_name_or_path: a\nfinetuning_type: lora\nstage: dpo\nenable_liger_kernel: true", "dpo", None),
        ("model_name_or_path: a\nfinetuning_type: full\nstage: dpo\npref_loss: orpo", "orpo", None),
        ("model_name_or_path: a\nfinetuning_type: lora\nstage: dpo\nref_model: b", "dpo", "copy"),
        ("model_name_or_path: a\nfinetuning_type: full\nstage: kto", "kto", None),
        ("model_name_or_path: a\nfinetuning_type: lora\nstage: rm", "reward", None),
        ("model_name_or_path: a\nuse_peft: true\nprecompute_ref_log_probs: true", "dpo", "precomputed"),
        ("model_name_or_path: a\nuse_peft: true\nmax_length: 512\ncenter_rewards_coefficient: 0.1", "reward", None),
        ("model_name_or_path: a\nuse_peft: true\nbeta: 0.05\noutput_dir: out/zephyr-orpo-7b", "orpo", None),
        ("model_name_or_path: a\ndataset_name: b\nmax_length: 512\ndesirable_weight: 1.0", "kto", None),
        (f"{SWIFT_LORA}rlhf_type: dpo\nuse_liger_kernel: true", "dpo", None),
        (f"{SWIFT_LORA}rlhf_type: simpo", "cpo", None),
        (f"{SWIFT_LORA}rlhf_type: simpo\ncpo_alpha: 0", "simpo", None),
        (f"{SWIFT_LORA}rlhf_type: rm", "reward", None),
        (f"{SWIFT_LORA}rlhf_type: kto", "kto", None),
        (f"{SWIFT_LORA}rlhf_type: gkd\nteacher_model: qwen2-7b", "gkd", None),
        ("model: a\ntuner_type: boft\nboft_block_size: 8\nrlhf_type: dpo", "dpo", None),
        ("model: a\ntuner_type: adalora\nrlhf_type: dpo", "dpo", None),
        ("model: a\ntuner_type: full\nrlhf_type: ppo\nreward_model: [qwen2-0.5b]", "ppo", None),
        (f"{SWIFT_LORA}rlhf_type: ppo\nreward_model: [qwen2-0.5b]", "ppo", None),
        (f"{SWIFT_LORA}rlhf_type: grpo\nper_device_train_batch_size: 8\nuse_liger_kernel: true", "grpo", "adapters"),
    ],
)
def test_a_preference_file_names_its_trainer(tmp_path: Path, text: str, trainer: str, reference: str | None) -> None:
    fields = {k: v for k, v in read(tmp_path, text).fields.items() if k != "model"}
    assert (fields["trainer"], fields.get("reference")) == (trainer, reference)
    answer = estimate(RunSpec.model_validate({"model": "qwen2-0.5b", **fields}))
    assert answer.run.trainer == trainer


_PARTS = "num_generations: 4\n{i}max_completion_length: 256\n{i}use_vllm: true\n{i}vllm_mode: colocate\n"
_TRL_GRPO = f"{_PARTS.format(i='')}beta: 0.04\nvllm_gpu_memory_utilization: 0.4\n"
GENERATING = {
    "trl": f"model_name_or_path: a\nuse_peft: true\nmax_prompt_length: 512\nper_device_train_batch_size: 4\n{_TRL_GRPO}"
    "vllm_max_model_length: 2048\nvllm_enable_sleep_mode: true\n",
    "ms-swift": f"{SWIFT_LORA}rlhf_type: grpo\nmax_length: 512\nper_device_train_batch_size: 4\n{_TRL_GRPO}"
    "vllm_max_model_len: 2048\nsleep_level: 1\n",
    "axolotl": f"{AXOLOTL_LORA}rl: grpo\nsequence_len: 512\nrl_beta: 0.04\ntrl:\n  {_PARTS.format(i='  ')}"
    "  vllm_enable_sleep_mode: true\nvllm: {gpu_memory_utilization: 0.4, max_model_len: 2048}\n",
}


@pytest.mark.parametrize(("framework", "text"), GENERATING.items())
def test_a_generating_trainers_file_says_its_completions_and_its_engine(
    tmp_path: Path, framework: str, text: str
) -> None:
    file = read(tmp_path, text)
    found = values(file)
    assert (file.framework, file.unread) == (framework, ())
    assert (found["trainer"], found["reference"], found["rollout"]) == ("grpo", "adapters", "colocate")
    assert (found["batch.sequence"], found["batch.new_tokens"], found["batch.generations"]) == (512, 256, 4)
    engine = found["serving.memory_utilization"], found["serving.max_model_len"], found["serving.sleep"]
    assert engine == (0.4, 2048, True)


def test_what_a_generating_trainer_is_not_counted_with_is_named(tmp_path: Path) -> None:
    text = GENERATING["axolotl"].replace("rl_beta: 0.04", "").replace("vllm: {", "vllm: {tensor_parallel_size: 2, ")
    text = text.replace("trl:\n", "trl:\n  reward_funcs: [mine.reward, org/scores]\n  generation_batch_size: 8\n")
    named = {"trl.generation_batch_size", "trl.reward_funcs"}
    known = read(tmp_path, text.replace("org/scores", "Qwen/Qwen2.5-0.5B"))
    assert values(known)["roles.reward.model"] == "Qwen/Qwen2.5-0.5B"
    assert {each.key for each in read(tmp_path, text).unread} == named
    assert "reference" not in values(read(tmp_path, text))  # beta is 0, the trainer's default
    assert values(read(tmp_path, text))["serving.tensor_parallel"] == 2
    bonus = f"{GENERATING['trl']}\nentropy_coef: 0.01\nuse_adaptive_entropy: false\n"
    assert values(read(tmp_path, bonus))["loop.entropy_bonus"]


@pytest.mark.parametrize(("version", "packing"), [("0.24", "padding_free"), ("1.13", None)])
def test_pairs_are_joined_without_padding(tmp_path: Path, version: str, packing: Any) -> None:
    text = "model_name_or_path: a\nprecompute_ref_log_probs: false\npadding_free: true"
    file = read(tmp_path, text, f"trl-{version}")
    assert (values(file).get("batch.packing"), len(file.unread)) == (packing, packing is None)


@pytest.mark.parametrize(
    ("version", "key", "loss"),
    [
        *((version, "use_liger_kernel", "fused") for version in ("1.13", "1.14")),
        *(("0.24", "use_liger_kernel", None), ("0.24", "use_liger_loss", "fused")),
    ],
)
def test_ligers_loss_of_pairs_has_the_key_of_its_version(tmp_path: Path, version: str, key: str, loss: Any) -> None:
    file = read(tmp_path, f"model_name_or_path: a\nprecompute_ref_log_probs: false\n{key}: true", f"trl-{version}")
    assert (values(file)["trainer"], values(file).get("kernels.loss")) == ("dpo", loss)


def test_losses_that_take_the_same_memory_are_not_listed(tmp_path: Path) -> None:
    assert read(tmp_path, f"{SWIFT_LORA}rlhf_type: grpo\nmax_length: 512\nloss_type: sapo").notes == ()
    assert read(tmp_path, f"{SWIFT_LORA}rlhf_type: dpo\nmax_length: 512\nloss_type: sigmoid").notes == ()
    assert len(read(tmp_path, f"{SWIFT_LORA}rlhf_type: dpo\nloss_type: [sigmoid, sft]").notes) == 1


def test_the_value_model_of_ppo_trains_as_the_model_does(tmp_path: Path) -> None:
    text = "model: a\nrlhf_type: ppo\nreward_model: [qwen2-0.5b]\nquant_method: bnb\nquant_bits: 4\nlora_rank: 4\n"
    found = read(tmp_path, text).fields
    assert found["roles"]["value"] == {"model": "qwen2-0.5b", "method": found["method"]}
    assert (found["method"]["kind"], found["method"]["rank"]) == ("qlora", 4)
    assert found["roles"]["reward"] == {"model": "qwen2-0.5b", "quantization": found["method"]["quantization"]}
    found = read(tmp_path, "model: a\nrlhf_type: ppo\nreward_model: [qwen2-0.5b]\ntuner_type: full\n").fields
    assert found["roles"] == {"reward": {"model": "qwen2-0.5b"}}


def test_a_file_may_turn_dropout_off_or_on(tmp_path: Path) -> None:
    text = "model_name_or_path: a\nuse_peft: true\nlora_dropout: 0.1\nmax_prompt_length: 512\ndisable_dropout: {}\n{}"
    file = read(tmp_path, text.format("true", "num_generations: 4"))
    assert (values(file)["trainer"], values(file)["method.dropout"], file.notes) == ("grpo", 0, ())
    file = read(tmp_path, text.format("false", "beta: 0.1"))
    assert file.notes == ("disable_dropout (run.yaml:5): dropout is counted as off",)


def test_each_value_says_where_it_is_from(tmp_path: Path) -> None:
    reasons = why(read(tmp_path, AXOLOTL_QLORA))
    assert reasons["method.rank"] == "run.yaml:5 lora_r"
    assert reasons["method.dropout"] == "default of Axolotl 0.21"
    assert reasons["batch.packing"] == "run.yaml:8 sample_packing"
    assert reasons["kernels.attention"] == "run.yaml:14 flash_attention"
    assert reasons["kernels.fused"] == "LoRA kernels turn themselves on: run.yaml:4 adapter"
    assert reasons["precision.weights"] == "run.yaml:13 bf16: auto, on a GPU with bf16"


@pytest.mark.parametrize(
    ("version", "dropout", "fused", "reentrant"),
    [
        ("0.12", "", None, True),
        ("0.12", "lora_dropout: 0", ["lora"], True),
        ("0.21", "lora_dropout: 0.1", ["lora"], False),
    ],
)
def test_a_version_has_its_own_rules(
    tmp_path: Path, version: str, dropout: str, fused: list[str] | None, reentrant: bool
) -> None:
    file = read(tmp_path, f"{AXOLOTL_QLORA}{dropout}\n", f"axolotl-{version}")
    assert file.title == f"Axolotl {version}"
    found = values(file)
    assert (found.get("kernels.fused"), found["kernels.reentrant"]) == (fused, reentrant)


FULL = "base_model: Qwen/Qwen2-7B\nmicro_batch_size: 2\n"
AXOLOTL_KEYS: dict[str, dict[str, Any]] = {
    "": {"method.kind": "full", "batch.sequence": 512, "kernels.checkpointing": "none", "loop.padded": True},
    "bf16: false\nfp16: true": {"precision.weights": "fp16", "precision.compute": "fp16", "loop.grad_scaler": True},
    "bf16: false": {"precision.weights": "fp32", "precision.autocast": None},
    "bf16: full": {"precision.weights": "bf16", "precision.autocast": None},
    "max_grad_norm: 0": {"loop.clip_grad_norm": None},
    "gradient_accumulation_steps:\nbatch_size: 8": {"batch.accumulation": 4},
    "gradient_checkpointing: offload": {"kernels.checkpointing": "offload"},
    "gradient_checkpointing: unsloth": {"kernels.checkpointing": "offload"},
    "gradient_checkpointing: true\nactivation_offloading: true": {"kernels.checkpointing": "offload"},
    "gradient_checkpointing: true\ngradient_checkpointing_kwargs: {use_reentrant: true}": {"kernels.reentrant": True},
    "val_set_size: 0.1\neval_batch_size: 6": {"also.evaluation.micro": 6},
    "val_set_size: 0.1": {"also.evaluation.micro": 2},
    "eval_batch_size: 6": {"also.evaluation.micro": None},
    "sample_packing: true": {"batch.micro": 2, "batch.sequence": 512, "batch.packing": "sample_packing"},
    "batch_flattening: true\nflash_attention: true": {"batch.packing": "padding_free", "loop.padded": None},
    "torch_compile: auto": {"kernels.compile": True},
    "plugins: [axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin]": {
        "kernels.loss": "fused",
        "also.evaluation.fuses": None,
    },
    "plugins: [axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin]\nval_set_size: 0.1": {
        "also.evaluation.fuses": True
    },
    "plugins: [axolotl.integrations.liger.LigerPlugin]\nliger_fused_linear_cross_entropy: true\nval_set_size: 0.1": {
        "kernels.loss": "fused",
        "also.evaluation.fuses": None,
    },
    "plugins: [axolotl.integrations.liger.LigerPlugin]\nliger_rms_norm: true\nliger_glu_activation: true": {
        "kernels.fused": ["rms_norm", "swiglu"]
    },
    "chunked_cross_entropy: true": {"kernels.loss": "chunked"},
    r"""adapter: lora
lora_target_modules: 'model.language_model.layers.[\d]+.(_checkpoint_wrapped_module.)?(mlp|self_attn).(up|q)_proj'""": {
        "method.targets": ["up_proj", "q_proj"]
    },
    "adapter: lora\nload_in_8bit: true\nlora_target_modules: [q_proj]": {
        "method.kind": "qlora",
        "method.quantization.format": "int8",
        "method.targets": ["q_proj"],
        "kernels.fused": None,
    },
    "adapter: qlora\nload_in_4bit: true\nlora_target_linear: true": {"method.quantization.kbit_preparation": None},
    "adapter: qlora\nload_in_4bit: true\nlora_target_linear: true\nquantize_moe_experts: true": {
        "method.quantization.experts": None,
        "method.quantization.kbit_preparation": False,
    },
    "adapter: qlora\nload_in_4bit: true\nlora_target_linear: true\nembeddings_skip_upcast: true": {
        "method.quantization.kbit_preparation": "axolotl"
    },
    "adapter: lora\nlora_target_linear: true\npeft_use_dora: true\nlora_modules_to_save: [lm_head]": {
        "method.kind": "dora",
        "method.modules_to_save": ["lm_head"],
    },
    "fsdp_version: 2\nfsdp_config: {reshard_after_forward: true, offload_params: true}": {
        "parallelism.strategy": "fsdp2",
        "parallelism.offload.parameters": True,
        "parallelism.offload.optimizer": True,
        "parallelism.cpu_ram_efficient_loading": False,
        "precision.weights": "fp32",
        "precision.compute": "bf16",
    },
    "fsdp_version: 2\nfsdp_config: {cpu_ram_efficient_loading: true}": {"parallelism.cpu_ram_efficient_loading": None},
    "fsdp_version: 2\nfsdp_config: {offload_params: true}\nexperimental_skip_move_to_device: true": {
        "parallelism.cpu_ram_efficient_loading": True
    },
    "dp_shard_size: 4\nfsdp_config: {reshard_after_forward: false}": {
        "parallelism.world": 4,
        "parallelism.dp": 4,
        "parallelism.reshard_after_forward": False,
    },
    "deepspeed: {zero_optimization: {stage: 3, reduce_bucket_size: auto}, bf16: {enabled: true}}": {
        "parallelism.strategy": "zero3",
        "parallelism.zero.reduce_bucket_size": "auto",
        "precision.weights": "bf16",
        "precision.master": "fp32",
        "precision.autocast": None,
    },
}


@pytest.mark.parametrize(("keys", "expected"), AXOLOTL_KEYS.items(), ids=AXOLOTL_KEYS.keys())
def test_axolotls_keys(tmp_path: Path, keys: str, expected: dict[str, Any]) -> None:
    found = values(read(tmp_path, FULL + keys + "\n"))
    assert {field: found.get(field) for field in expected} == expected


def test_axolotl_freezes_the_tower_if_only_the_language_model_is_unfrozen(tmp_path: Path) -> None:
    tower = "base_model: qwen3-vl-4b\nmicro_batch_size: 1\nunfrozen_parameters: "
    file = read(tmp_path, f"{tower}[model.language_model.*, lm_head.*]")
    assert (values(file)["method.frozen"], file.unread) == (["vision", "projector"], ())
    file = read(tmp_path, f"{tower}[model.language_model.layers.1.*]")
    assert "method.frozen" not in values(file)
    assert file.notes == ("unfrozen_parameters (run.yaml:3): what trains, not supported yet",)


def test_axolotl_quantises_experts(tmp_path: Path) -> None:
    model = FULL.replace("Qwen2-7B", "Qwen3-30B-A3B")
    found = values(read(tmp_path, f"{model}adapter: qlora\nload_in_4bit: true\nlora_target_linear: true\n"))
    assert "method.quantization.experts" not in found
    keys = "adapter: qlora\nload_in_4bit: true\nlora_target_linear: true\nquantize_moe_experts: true\n"
    assert values(read(tmp_path, model + keys))["method.quantization.experts"] is True


# --- LLaMA-Factory ---

LLAMAFACTORY_KEYS: dict[str, dict[str, Any]] = {
    "": {
        "method.kind": "lora",
        "method.rank": 8,
        "method.alpha": 2 * 8,
        "method.targets": ["q_proj", "v_proj"],
        "batch.micro": 2,
        "kernels.checkpointing": "full",
        "kernels.reentrant": True,
        "precision.weights": "bf16",
        "precision.autocast": True,
    },
    "finetuning_type: full": {"precision.weights": "fp32", "precision.compute": "bf16", "precision.autocast": True},
    "finetuning_type: full\nbf16: false\npure_bf16: true": {"precision.weights": "bf16", "precision.autocast": None},
    "pure_bf16: true": {"method.adapter_dtype": "bf16"},
    "finetuning_type: freeze\nfreeze_trainable_layers: 3": {"method.kind": "freeze", "method.trainable_layers": 3},
    "quantization_bit: 4": {"method.quantization.format": "nf4", "method.quantization.double_quant": True},
    "quantization_bit: 8": {"method.quantization.format": "int8"},
    "finetuning_type: oft\nquantization_bit: 4": {
        "method.kind": "oft",
        "method.options": {"oft_block_size": 32},
        "method.quantization.format": "nf4",
        "method.rank": None,
    },
    "model_name_or_path: /data/models/Qwen2.5-7B-Instruct-GPTQ-Int4": {
        "model": "qwen2.5-7b",
        "method.quantization.format": "gptq-int4",
    },
    "lora_target: all\nlora_rank: 4\nlora_alpha: 4": {"method.targets": "all-linear", "method.alpha": 4},
    "packing: true": {"batch.sequence": 512, "batch.packing": "knapsack", "loop.padded": None},
    "packing: true\nneat_packing: true": {"batch.packing": "neat_packing", "loop.padded": None},
    "stage: pt": {"batch.packing": None, "loop.padded": None},
    "flash_attn: fa2\nenable_liger_kernel: true": {"kernels.attention": "flash_attention_2", "kernels.loss": "fused"},
    "ray_num_workers: 4": {"parallelism.world": 4, "parallelism.strategy": "ddp"},
    "flash_attn: fa3": {"kernels.attention": "flash_attention_3"},
    "disable_gradient_checkpointing: true": {"kernels.checkpointing": "none", "kernels.reentrant": None},
    "use_unsloth_gc: true": {"kernels.checkpointing": "offload"},
    "finetuning_type: full\nuse_galore: true\ngalore_layerwise: true": {"optimizer.name": "galore_adamw_layerwise"},
    "val_size: 0.1\neval_strategy: steps\nper_device_eval_batch_size: 1": {"also.evaluation.micro": 1},
    "val_size: 0.1": {"also.evaluation.micro": None},
    "cutoff_len: ${oc.env:LENGTH,64}": {"batch.sequence": 64},
}


@pytest.mark.parametrize(("keys", "expected"), LLAMAFACTORY_KEYS.items(), ids=LLAMAFACTORY_KEYS.keys())
def test_llamafactorys_keys(tmp_path: Path, keys: str, expected: dict[str, Any]) -> None:
    config = yaml.safe_load(LLAMAFACTORY_LORA) | (yaml.safe_load(keys) or {})
    file = read(tmp_path, json.dumps(config), name="run.json")
    assert file.headline.startswith("run.json: LLaMA-Factory 0.9.5, by model_name_or_path and ")
    found = values(file)
    assert {field: found.get(field) for field in expected} == expected


# --- TRL and transformers ---

TRL_KEYS: dict[str, dict[str, Any]] = {
    "{packing: true, packing_strategy: ffd}": {"batch.packing": "bfd"},
    "{activation_offloading: true, torch_compile: true}": {
        "kernels.checkpointing": "offload",
        "kernels.compile": True,
        "parallelism.offload.activations": None,
    },
    "{activation_offloading: true, gradient_checkpointing: false}": {"parallelism.offload.activations": True},
    "": {
        "method.kind": "qlora",
        "method.rank": 16,
        "method.alpha": 32,
        "method.dropout": 0.05,
        "method.targets": ["q_proj", "v_proj"],
        "method.quantization.double_quant": False,
        "precision.weights": "fp32",
        "precision.compute": "bf16",
        "batch.micro": 8,
        "batch.sequence": 1024,
        "kernels.checkpointing": "full",
    },
    "torch_dtype: bfloat16": {"precision.weights": "bf16", "precision.autocast": True},
    "bf16: false\ndtype: bfloat16": {"precision.weights": "bf16", "precision.autocast": None},
    "fp16: true": {"precision.compute": "fp16", "loop.grad_scaler": True},
    "load_in_4bit: false\nuse_peft: false": {"method.kind": "full", "precision.weights": "fp32"},
    "load_in_8bit: true\nload_in_4bit: false": {"method.quantization.format": "int8"},
    "lora_target_modules: all-linear": {"method.targets": "all-linear"},
    "packing: true\nmax_seq_length: 256": {"batch.packing": "bfd", "batch.sequence": 256, "loop.padded": None},
    "packing: true\npacking_strategy: wrapped": {"batch.packing": "wrapped", "loop.padded": None},
    "padding_free: true": {"batch.micro": 8, "batch.packing": "padding_free", "loop.padded": None},
    "evaluation_strategy: epoch\nper_device_eval_batch_size: 3": {"also.evaluation.micro": 3},
    "use_liger_kernel: true": {"kernels.loss": None, "kernels.fused": ["rope", "rms_norm", "swiglu"]},
    "gradient_checkpointing: false": {"kernels.checkpointing": "none"},
    "label_smoothing_factor: 0.1\nuse_liger_kernel: true": {"kernels.loss": "label_smoothing"},
    "gradient_checkpointing_kwargs: {every_n_layers: 2, use_reentrant: false}": {
        "kernels.checkpointing": "full",
        "kernels.every_n_layers": 2,
    },
    "activation_checkpointing: {every_n_layers: 4}": {"kernels.checkpointing": "full", "kernels.every_n_layers": 4},
    "attn_implementation: flash_attention_3": {"kernels.attention": "flash_attention_3"},
    "attn_implementation: flash_attention_4": {"kernels.attention": "flash_attention_2"},
    "label_smoothing_factor: 0": {"kernels.loss": None},
    "accelerator_config: {gradient_accumulation_kwargs: {sync_each_batch: true}}": {"loop.sync_each_batch": True},
    "optim: sgd\noptim_args: momentum=0.9": {"optimizer.name": "sgd", "optimizer.momentum": 0.9},
    "fsdp: full_shard auto_wrap\nfsdp_config: {version: 1, sharding_strategy: SHARD_GRAD_OP}": {
        "parallelism.strategy": "fsdp",
        "parallelism.reshard_after_forward": False,
    },
}


@pytest.mark.parametrize(("keys", "expected"), TRL_KEYS.items(), ids=TRL_KEYS.keys())
def test_trls_keys(tmp_path: Path, keys: str, expected: dict[str, Any]) -> None:
    config = yaml.safe_load(TRL_SFT) | (yaml.safe_load(keys) or {})
    found = values(read(tmp_path, json.dumps(config), name="run.json"))
    assert {field: found.get(field) for field in expected} == expected


def test_trl_before_0_27_loads_the_checkpoints_dtype(tmp_path: Path) -> None:
    file = read(tmp_path, TRL_SFT, "trl-0.24")
    assert values(file)["precision.weights"] == "bf16"
    assert "assumed" in why(file)["precision.weights"]


def test_training_arguments_name_no_model(tmp_path: Path) -> None:
    text = json.dumps({"per_device_train_batch_size": 4, "bf16": True, "output_dir": "out", "seed": 1})
    file = read(tmp_path, text, name="training_args.json")
    assert file.headline.startswith("training_args.json: transformers 5.24, by per_device_train_batch_size")
    assert "model" not in file.fields
    assert (values(file)["batch.micro"], file.unread) == (4, ())


# --- what a model does not have ---


def test_targets_that_a_model_does_not_have_are_skipped(tmp_path: Path) -> None:
    """peft refuses targets only if the model has none of them."""
    path = tmp_path / "run.yaml"
    config: dict[str, Any] = {"base_model": "glm-4.7-flash", "micro_batch_size": 1, "adapter": "lora"}
    path.write_text(yaml.safe_dump({**config, "lora_target_modules": ["q_proj", "o_proj"]}))
    [run] = runs_of({"model": str(path)})
    alone = run.model_copy(update={"method": run.method.model_copy(update={"targets": ("o_proj",)})})
    assert estimate(run).bytes == estimate(alone).bytes


@pytest.mark.parametrize(
    "text",
    [
        "base_model: voxtral-mini-3b\nmicro_batch_size: 1\nadapter: lora\nlora_target_modules: "
        r"'model.language_model.layers.[\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj'",
        "model: voxtral-mini-3b\ntuner_type: lora",
        "model_name_or_path: voxtral-mini-3b\nfinetuning_type: lora\nfreeze_vision_tower: true",
    ],
)
def test_a_frozen_tower_may_be_one_that_hears(tmp_path: Path, text: str) -> None:
    fields = read(tmp_path, text).fields
    assert fields["method"]["frozen"] == ["audio", "projector"]
    assert estimate(RunSpec.model_validate(fields)).run.method.frozen == ("audio", "projector")


FLEXIBLE = {
    "base_model: qwen2-0.5b\nmicro_batch_size: 2\nflex_attention: true\n": True,
    "base_model: gemma-4-31b\nmicro_batch_size: 2\nflex_attention: true\n": False,
    "base_model: qwen2-0.5b\nmicro_batch_size: 2\nattn_implementation: flex_attention\nsample_packing: true\n": False,
    "model: qwen2-0.5b\ntuner_type: lora\nattn_impl: flex_attention\n": True,
    "model: qwen2-0.5b\ntuner_type: lora\nattn_impl: flex_attention\nrlhf_type: dpo\n": False,
    "model_name_or_path: qwen2-0.5b\nuse_peft: true\nmax_length: 64\nattn_implementation: flex_attention\n": True,
}


@pytest.mark.parametrize(("text", "is_counted"), FLEXIBLE.items())
def test_flex_attention_is_read_where_it_is_counted(tmp_path: Path, text: str, is_counted: bool) -> None:
    file = read(tmp_path, text)
    note = "flex_attention: sdpa, or eager without it, is counted instead"
    assert [each.note for each in file.unread if "flex" in each.note] == ([] if is_counted else [note])
    assert values(file).get("kernels.attention") == ("flex_attention" if is_counted else None)
    answer = estimate(RunSpec.model_validate(file.fields))
    assert answer.run.kernels.attention == ("flex_attention" if is_counted else "sdpa")


def test_flash_attention_by_another_name_is_not_refused(tmp_path: Path) -> None:
    """transformers runs gpt-oss with flash attention that knows sinks, but not with flash_attention_2."""
    text = "base_model: gpt-oss-20b\nmicro_batch_size: 1\nattn_implementation: "
    file = read(tmp_path, f"{text}kernels-community/vllm-flash-attn3\n")
    assert values(file)["kernels.attention"] == "flash_attention_3"
    assert not file.notes
    file = read(tmp_path, "base_model: gemma-4-31b\nmicro_batch_size: 1\nattn_implementation: flash_attention_4\n")
    assert file.notes == (
        "attn_implementation (run.yaml:3): 'flash_attention_4': sdpa, or eager without it, is counted instead",
    )
    assert values(read(tmp_path, f"{text}flash_attention_2\n"))["kernels.attention"] == "flash_attention_2"
    packed = "sample_packing: true\nsequence_len: 64\n"
    found = values(
        read(tmp_path, text.replace("_size: 1", "_size: 2") + "kernels-community/vllm-flash-attn3\n" + packed)
    )
    assert (found["batch.sequence"], found["batch.packing"]) == (64, "sample_packing")
    hybrid = f"base_model: gemma-4-31b\nmicro_batch_size: 2\ngemma4_hybrid_attn_impl: true\n{packed}"
    file = read(tmp_path, hybrid)
    assert file.notes == ("gemma4_hybrid_attn_impl (run.yaml:3): sdpa is counted in every layer",)
    assert (values(file)["batch.sequence"], values(file)["batch.packing"]) == (64, "sample_packing")


# --- files given along ---

ACCELERATE: dict[str, Any] = {"compute_environment": "LOCAL_MACHINE", "num_processes": 4, "mixed_precision": "bf16"}
LAUNCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ddp": ({"distributed_type": "MULTI_GPU"}, {"parallelism.strategy": "ddp", "parallelism.dp": 4}),
    "one process": ({"distributed_type": "NO"}, {"parallelism.world": None}),
    "fsdp 1": (
        {
            "distributed_type": "FSDP",
            "fsdp_config": {"fsdp_sharding_strategy": 4, "fsdp_backward_prefetch": "BACKWARD_POST"},
        },
        {"parallelism.strategy": "fsdp", "parallelism.shard_group": 8, "parallelism.backward_prefetch": "post"},
    ),
    "fsdp 2": (
        {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_cpu_ram_efficient_loading": False}},
        {"parallelism.strategy": "fsdp2", "parallelism.cpu_ram_efficient_loading": False, "precision.weights": "fp32"},
    ),
    "zero 3": (
        {
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {"zero_stage": 3, "zero3_init_flag": True, "offload_optimizer_device": "cpu"},
        },
        {
            "parallelism.strategy": "zero3",
            "parallelism.zero.zero3_init_flag": True,
            "parallelism.offload.optimizer": True,
            "precision.master": "fp32",
        },
    ),
}


@pytest.mark.parametrize(("launch", "expected"), LAUNCHES.values(), ids=LAUNCHES.keys())
def test_accelerates_file(tmp_path: Path, launch: dict[str, Any], expected: dict[str, Any]) -> None:
    text = "model_name_or_path: Qwen/Qwen2-7B\ndataset_name: mine\n"
    found = values(read(tmp_path, text, accelerate={**ACCELERATE, **launch}))
    assert {field: found.get(field) for field in expected} == expected


@pytest.mark.parametrize(
    ("more", "layers"),
    [
        ({}, "the first that is installed"),
        ({"fp8_config": {"backend": "TE"}}, "layers of Transformer Engine"),
        ({"fp8_config": {"fp8_backend": "ao"}}, "layers of torchao: their copies in fp8 for each product"),
        ({"fp8_config": {"backend": "MSAMP"}}, "layers of MS-AMP"),
    ],
    ids=str,
)
def test_accelerates_fp8_computes_in_bf16_around_layers_that_are_not_counted(
    tmp_path: Path, more: dict[str, Any], layers: str
) -> None:
    text = "model_name_or_path: Qwen/Qwen2-7B\ndataset_name: mine\nbf16: false\n"
    file = read(tmp_path, text, accelerate={**ACCELERATE, "mixed_precision": "fp8", **more})
    (note,) = file.notes
    assert note.startswith("mixed_precision")
    assert layers in note
    alike = read(tmp_path, text, accelerate={**ACCELERATE, "mixed_precision": "bf16"})
    assert values(file) == values(alike)


def test_a_file_that_a_key_names_is_found_next_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "zero2.json").write_text(
        '{\n "zero_optimization": {\n  "stage": 2,\n  "overlap_comm": true,\n  "reduce_bucket_size": 2e8\n }\n}'
    )
    file = read(tmp_path, LLAMAFACTORY_LORA + "deepspeed: zero2.json\n")
    run = RunSpec.model_validate({**file.fields, "model": "qwen2-0.5b"})
    shown = next(origin for origin in file.origins_of(run) if origin.field.endswith("reduce_bucket_size"))
    assert (shown.value, shown.why) == (2 * 10**8, "zero2.json:5 zero_optimization.reduce_bucket_size")
    assert values(file)["parallelism.strategy"] == "zero2"
    assert why(file)["parallelism.strategy"] == "zero2.json:3 zero_optimization.stage"
    assert why(file)["parallelism.world"] == "assumed: the file does not say how many GPUs; add --gpus"
    (tmp_path / "zero2.json").unlink()
    with pytest.raises(SpecError, match=r"^run\.yaml:9: deepspeed: there is no file 'zero2\.json' next to run\.yaml"):
        read(tmp_path, LLAMAFACTORY_LORA + "deepspeed: zero2.json\n")


PUBLISHED = {
    "examples/deepspeed/ds_z3_offload_config.json": ("zero3", ["parameters", "optimizer"], "LLaMA-Factory's ds_z3_off"),
    "../deepspeed_configs/zero2.json": ("zero2", ["optimizer"], "Axolotl's zero2.json"),
}


@pytest.mark.parametrize(("path", "expected"), PUBLISHED.items())
def test_a_config_that_a_framework_publishes_is_known_by_its_path(
    tmp_path: Path, path: str, expected: tuple[str, list[str], str]
) -> None:
    strategy, offloaded, title = expected
    file = read(tmp_path, f"{LLAMAFACTORY_LORA}deepspeed: {path}\n")
    found = values(file)
    assert found["parallelism.strategy"] == strategy
    assert [name for name in ("parameters", "optimizer") if found.get(f"parallelism.offload.{name}")] == offloaded
    assert why(file)["parallelism.strategy"].startswith(title)


def test_a_file_with_a_folder_is_found_in_folders_around_the_run(tmp_path: Path) -> None:
    (tmp_path / "deepspeed_configs").mkdir()
    (tmp_path / "deepspeed_configs" / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    (tmp_path / "examples").mkdir()
    file = read(tmp_path, LLAMAFACTORY_LORA + "deepspeed: deepspeed_configs/zero2.json\n", name="examples/run.yaml")
    assert values(file).get("parallelism.offload.optimizer") is None


def test_a_typed_value_replaces_the_files_before_the_rules(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(AXOLOTL_QLORA)
    [run] = runs_of({"model": str(tmp_path / "run.yaml"), "batch_size": 2, "seq_len": 100, "gpus": 2})
    assert (run.batch.micro, run.batch.sequence, run.batch.packing) == (2, 100, "sample_packing")
    assert (run.parallelism.world, run.parallelism.strategy, run.method.rank) == (2, "ddp", 8)
    file = read_run(str(tmp_path / "run.yaml"), typed={"method.rank": 4})
    assert why(file)["method.rank"] == "the command line"
    [run] = runs_of({"model": "qwen2-0.5b", "spec": [str(tmp_path / "run.yaml")], "optimizer": "sgd"})
    assert (run.model, run.optimizer.name) == ("qwen2-0.5b", "sgd")


# --- ms-swift ---

SWIFT = """
model: Qwen/Qwen2-7B
tuner_type: lora
max_length: 1024
attn_impl: flash_attn
packing: true
per_device_train_batch_size: 3
deepspeed: zero2
ENV: {PYTORCH_CUDA_ALLOC_CONF: "expandable_segments:True", NPROC_PER_NODE: 2, MAX_PIXELS: 1003520}
dataset: [mine]
"""


def test_an_ms_swift_file_is_the_run_that_it_starts(tmp_path: Path) -> None:
    file = read(tmp_path, SWIFT)
    found = values(file)
    assert file.headline == "run.yaml: ms-swift 4.6, by model and tuner_type"
    assert file.unread == ()
    assert (found["method.kind"], found["method.rank"], found["method.targets"]) == ("lora", 8, "all-linear")
    assert (found["batch.sequence"], found["batch.micro"], found["batch.packing"]) == (1024, 3, "binpack")
    assert found["batch.accumulation"] == -(-16 // (3 * 2))
    assert (found["parallelism.strategy"], found["parallelism.world"]) == ("zero2", 2)
    assert found["parallelism.zero.reduce_bucket_size"] == 200_000_000
    assert (found["precision.weights"], found["precision.master"]) == ("bf16", "fp32")
    assert (found["kernels.reentrant"], found["loop.expandable_segments"]) == (True, True)
    assert found["profile"] == "ms-swift-4.6"


SWIFT_CASES: dict[str, dict[str, Any]] = {
    "tuner_type: full\ntorch_dtype: float32": {"precision.weights": "fp32", "precision.compute": "fp16"},
    "quant_method: bnb\nquant_bits: 4": {"method.kind": "qlora", "method.quantization.double_quant": True},
    "train_type: lora\nuse_dora: true\nlora_dtype: bfloat16": {"method.kind": "dora", "method.adapter_dtype": "bf16"},
    "tuner_type: lora\nENV: {NPROC_PER_NODE: 2}": {"parallelism.strategy": "ddp", "kernels.reentrant": False},
    "tuner_type: full\nfsdp: fsdp2\nENV: {NPROC_PER_NODE: 4}": {"parallelism.strategy": "fsdp2"},
    "tuner_type: lora\nsplit_dataset_ratio: 0.1": {"also.evaluation.micro": 1, "batch.sequence": 2048},
    "tuner_type: lora\nsplit_dataset_ratio: 0.0\nuse_liger_kernel: true": {
        "also.evaluation.micro": None,
        "kernels.loss": "fused",
    },
    "tuner_type: lora\ntask_type: seq_cls\nnum_labels: 2": {"objective": "sequence_classification"},
    "tuner_type: full\ndeepspeed: zero3_offload": {"parallelism.offload.parameters": True},
    "tuner_type: full\nuse_galore: true\ngalore_optim_per_parameter: true": {"optimizer.name": "galore_adamw"},
    "tuner_type: full\nuse_galore: true\noptim: adamw_8bit": {"optimizer.name": "galore_adamw_8bit"},
    "tuner_type: full\nuse_galore: true\noptim: adafactor": {"optimizer.name": "galore_adafactor"},
}


@pytest.mark.parametrize(("text", "expected"), SWIFT_CASES.items())
def test_keys_of_ms_swift_are_fields(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    found = values(read(tmp_path, f"model: Qwen/Qwen2-7B\n{text}\n"))
    assert {field: found.get(field) for field in expected} == expected


# --- detection ---


@pytest.mark.parametrize("name", FORMATS)
def test_a_framework_can_be_named(tmp_path: Path, name: str) -> None:
    more = "algorithm.adv_estimator: grpo\nactor_rollout_ref.actor.use_dynamic_bsz: true\n" if name == "verl" else ""
    file = read(tmp_path, f"{format_named(name).model}: Qwen/Qwen2-7B\n{more}", name)
    assert (file.framework, file.told) == (name, ())


@pytest.mark.parametrize(
    ("version", "more", "evaluates"),
    [("3.5", "", 1), ("3.6", "", None), ("3.5", "split_dataset_ratio: 0", None), ("3.5", "streaming: true", None)],
)
def test_ms_swift_before_3_6_evaluates_unless_nothing_is_split_off(
    tmp_path: Path, version: str, more: str, evaluates: int | None
) -> None:
    found = values(read(tmp_path, f"model: qwen2-0.5b\ntrain_type: full\n{more}\n", f"ms-swift-{version}"))
    assert found.get("also.evaluation.micro") == evaluates


@pytest.mark.parametrize(("version", "overlaps"), [("3.0", True), ("3.2.1", True), ("3.2.2", False), ("4.6", False)])
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_ms_swifts_own_deepspeed_configs_are_those_of_the_version(
    tmp_path: Path, name: str, version: str, overlaps: bool
) -> None:
    text = f"model: qwen2-0.5b\ntuner_type: lora\ndeepspeed: {name}\nENV: {{NPROC_PER_NODE: 2}}\n"
    assert values(read(tmp_path, text, f"ms-swift-{version}"))["parallelism.zero.overlap_comm"] is overlaps


def test_ms_swift_3_has_the_optimizer_of_its_transformers(tmp_path: Path) -> None:
    text = "model: qwen2-0.5b\ntrain_type: full\nmax_length: 64\n"
    old, new = (read(tmp_path, text, f"ms-swift{version}").fields for version in ("-3.3", ""))
    assert (old["profile"], new["profile"]) == ("ms-swift-3", "ms-swift-4.6")
    runs = [estimate(RunSpec.model_validate(fields)).run for fields in (old, new)]
    assert [run.optimizer.name for run in runs] == ["adamw_torch", "adamw_torch_fused"]


SWIFT_GALORE = "model: a\ntuner_type: full\nuse_galore: true\n"
REFUSED: dict[str, str] = {
    "model_name_or_path: a\nfinetuning_type: lora\nstage: ppo": "run.yaml:3: stage: ppo is not supported yet: its own",
    f"{LLAMAFACTORY_LORA}use_galore: true": "use_galore: LLaMA-Factory does not combine it with adapters; set one",
    "model_name_or_path: a\ntemplate: llama3\ninfer_backend: vllm": "run.yaml:3: infer_backend: nothing trains without",
    "model_name_or_path: a\nstage: sft\ndo_train: false\nexport_dir: b": "run.yaml:4: export_dir: nothing trains",
    "base_model: a\nmicro_batch_size: 1\nrl: ebft": "run.yaml:3: rl: 'ebft' is not supported yet; supported: dpo, ",
    "model: a\ntuner_type: lora\nrlhf_type: pPO": "run.yaml:3: rlhf_type: 'pPO' is not supported yet; supported: rm, ",
    "model: a\ntemplate: b\npeft_config: {name: lora}\ndist_config: {name: fsdp2}": "run.yaml:4: dist_config: LLaMA-F",
    "model_name: a\ntokenizer_dir: b\ntrain: {micro_batch_size: 4}": "run.yaml:2: tokenizer_dir: LitGPT's pretraining",
    "model: a\ntuner_type: lora\nrlhf_type: gkd": "run.yaml:3: rlhf_type: gkd without a teacher_model of its own",
    "model: a\ntuner_type: lora\nrlhf_type: gkd\nteacher_model: a": "run.yaml:4: teacher_model: gkd without a",
    "base_model: a\nmicro_batch_size: two": "run.yaml:2: micro_batch_size: must be a number, not 'two'",
    "base_model: a\nmicro_batch_size: 1.5": "run.yaml:2: micro_batch_size: must be a whole number",
    "model_name_or_path: a\nstage: sft\ntensor_model_parallel_size: 1": "run.yaml:3: tensor_model_parallel_size: LLa",
    "base_model: [a]\nmicro_batch_size: 1": "run.yaml:1: base_model: must be text",
    "base_model: a\nadapter: qlora": "run.yaml:2: adapter: qlora needs load_in_4bit: true",
    "base_model: a\nmicro_batch_size: 1\nactivation_offloading: true": "run.yaml:3: activation_offloading: Axolotl ",
    "base_model: a\nadapter: lora": "run.yaml:2: adapter: set lora_target_linear: true",
    "base_model: a\nadapter: lora\nlora_target_modules: {a: 1}": "run.yaml:3: lora_target_modules: must be a list",
    "base_model: a\nmicro_batch_size: 1\noptimizer: adamw_8bits": "run.yaml:3: optimizer: the optimizer 'adamw_8bits'",
    "base_model: a\nmicro_batch_size: 1\ngradient_checkpointing: maybe": "must be true or false, not 'maybe'",
    "model_name_or_path: a\ndataset_name: b\nload_in_4bit: true": "quantised weights train only under adapters",
    "distributed_type: FSDP": "is accelerate's config, without a model; add it to a run with --accelerate",
    "zero_optimization: {stage: 2}": "is deepspeed's config, without a model; add it to a run with --deepspeed",
    "model: a\ntuner_type: vera": "run.yaml:2: tuner_type: 'vera' is not supported; supported: lora, full",
    "model: a\ntuner_type: lora\npacking: true": "run.yaml:3: packing: needs flash attention; set attn_impl",
    "model: a\ntuner_type: full\nquant_method: bnb\nquant_bits: 4": "quantised weights train only under adapters",
    "model: a\ntuner_type: lora\nuse_galore: true": "run.yaml:3: use_galore: GaLore projects the gradients of full",
    f"{SWIFT_GALORE}galore_quantization: true": "run.yaml:4: galore_quantization: Q-GaLore is not supported yet",
    "actor_rollout_ref: {model: a}\nalgorithm: {adv_estimator: mine}": "adv_estimator: 'mine' is not supported",
    "actor_rollout_ref: {actor: {strategy: megatron}}": "actor_rollout_ref.actor.strategy: 'megatron' is not supp",
    "algorithm: {adv_estimator: grpo}\nactor_rollout_ref: {actor: {}}": "set it, or actor_rollout_ref.actor.ppo",
    f"{LLAMAFACTORY_LORA}use_kt: true": "use_kt: true is not supported yet",
    "policy_model: {a: b}\ntokenizer: {c: d}\nmax_grad_norm: 1": "policy_model: torchtune's PPO files are not read yet",
    "model: {a: b}\ntokenizer: {c: d}\ncheckpointer: {e: f}": "checkpointer: torchtune's evaluation and",
    "model: {a: b}\ntokenizer: {c: d}\nloss: {e: f}\ngrpo_samples: 4": "run.yaml:4: grpo_samples: torchtune's GRPO",
    "base_model: a\nmicro_batch_size: 1\ndeepspeed: ~~/a.json": "deepspeed: there is no file '~~/a.json'",
    "surprise: {a: b}": "is not a file of Axolotl, LLaMA-Factory, ms-swift, Megatron-SWIFT, torchtune, LitGPT, ",
    "base_model: a\nmodel_name_or_path: b\nmicro_batch_size: 1\ncutoff_len: 3": "",
}


@pytest.mark.parametrize(("text", "expected"), REFUSED.items())
def test_a_file_that_is_not_understood_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    if not expected:
        assert read(tmp_path, text).framework == "axolotl"  # only Axolotl has base_model
        return
    with pytest.raises(SpecError) as error:
        read(tmp_path, text)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


_FACTORY = "model_name_or_path: a\nfinetuning_type: full\n"
NOT_COUNTED = {
    f"{_FACTORY}use_galore: true": ("galore_rank (run.yaml): rank 128 is counted, transformers' default",),
    f"{_FACTORY}use_galore: true\ngalore_rank: 128": (),
    f"{SWIFT_GALORE}max_length: 8\ngalore_rank: 64\ngalore_with_embedding: true": (
        "galore_rank (run.yaml:5): rank 128 is counted, ms-swift's default",
        "galore_with_embedding (run.yaml:6): all linear layers but the head are counted as projected",
    ),
    "base_model: a\nqat: {a: 1}\nmicro_batch_size: 1\n\n\n\n\n\n\ntiled_mlp: true": (
        "qat.a (run.yaml:2): not counted, not supported yet",
        "tiled_mlp (run.yaml:10): not counted, not supported yet",
    ),
    f"{SWIFT_LORA}target_modules: [all-linear, lm_head]\nmax_length: 8\nnum_iterations: 1": (
        "target_modules (run.yaml:3): 'lm_head' next to all-linear: not counted",
    ),
    "base_model: a\nmicro_batch_size: 1\ntiled-mlp: true": ("tiled_mlp (run.yaml:3): not counted, not supported yet",),
    "model_name_or_path: qwen3-vl-4b\nfinetuning_type: full\nimage_max_pixels: 262144": (
        "image_max_pixels (run.yaml:3): no images are counted; add --images",
    ),
    "model_name_or_path: a\nnum_generations: 2\nreward_funcs: [f]\nreward_model_name_or_path: b": (
        "reward_model_name_or_path (run.yaml:4): the reward model 'b' is not known, so not counted; name one with "
        "roles.reward",
    ),
}


@pytest.mark.parametrize(("text", "notes"), NOT_COUNTED.items())
def test_what_is_not_counted_is_named(tmp_path: Path, text: str, notes: tuple[str, ...]) -> None:
    assert read(tmp_path, text).notes == notes


def test_long_values_are_read_at_once(tmp_path: Path) -> None:
    name, digits = "$-q4_" * 40_000, "0" * 200_000  # in quadratic time, minutes
    assert read(tmp_path, "base_model: ~~~a\nmicro_batch_size: 1").fields["model"] == "~~~a"  # no user's home
    text = f"base_model: '{name}'\nmicro_batch_size: 1\nseed: {digits} 1\nlearning_rate: 1.5e-1"
    assert read(tmp_path, text).fields["model"] == name


def test_an_unknown_key_is_named_with_its_line_and_the_nearest(tmp_path: Path) -> None:
    file = read(tmp_path, AXOLOTL_QLORA + "lora_dropuot: 0.1\ntiled_mlp: true\nx-of: {a: 1}\nlayer_offloading: no\n")
    assert file.notes == (
        "lora_dropuot (run.yaml:17): unknown key of Axolotl; did you mean lora_dropout?",
        "tiled_mlp (run.yaml:18): not counted, not supported yet",
    )


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    for start in (b"\x80\x04\x95", b"PK\x03\x04"):
        (tmp_path / "training_args.bin").write_bytes(start + b"anything")
        with pytest.raises(SpecError, match=r"training_args\.bin is a pickle"):
            read_run(str(tmp_path / "training_args.bin"))


KEYS = st.sampled_from(
    sorted({*defaults_of("axolotl").keys, *defaults_of("llamafactory").keys, *defaults_of("trl").keys, "?", ""})
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


@contextmanager
def suppress_errors(lines: list[str]) -> Iterator[None]:
    try:
        yield
    except MemplanError as error:
        lines.append(str(error))


@given(st.sampled_from(sorted(FORMATS)), st.dictionaries(KEYS, VALUES, max_size=12))
def test_any_mapping_is_read_or_refused_in_one_line(framework: str, config: dict[str, Any]) -> None:
    from memplan.frameworks.reading import run_file

    document = Document("run.yaml", None, {format_named(framework).model: "qwen2-7b", **config}, {})
    lines: list[str] = []
    with suppress_errors(lines):
        detect(document)
    with suppress_errors(lines):
        file = run_file.read_as(document, format_named(framework))
        assert json.loads(json.dumps([origin._asdict() for origin in file.origins]))
    assert not any("\n" in line for line in lines)


# --- the same rows write and read ---


@pytest.mark.parametrize(("table", "text"), [(AXOLOTL, FULL), (LLAMAFACTORY, LLAMAFACTORY_LORA), (TRL, TRL_SFT)])
@pytest.mark.parametrize(
    "change",
    [
        {"batch": {"micro": 5, "sequence": 96, "accumulation": 7}},
        {"loop": {"clip_grad_norm": 0.5}},
        {"optimizer": {"name": "lion_8bit"}},
        {"method": {"kind": "lora", "rank": 3, "alpha": 6, "dropout": 0.25, "targets": ["k_proj"]}},
    ],
)
def test_what_is_written_is_read(tmp_path: Path, table: Any, text: str, change: dict[str, Any]) -> None:
    plain = RunSpec(model="qwen2-7b")
    changed = RunSpec.model_validate({"model": "qwen2-7b", **change})
    written = yaml.safe_load("\n".join(change_lines(table, plain, changed).lines)) or {}
    config = yaml.safe_load(text) | {"load_in_4bit": False, "quantization_bit": None} | written
    found = values(read(tmp_path, json.dumps(config), name="run.json"))
    for part, fields in change.items():
        for name, value in fields.items():
            assert found[f"{part}.{name}"] == value, name
