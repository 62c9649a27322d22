"""Write the keys of training frameworks, and their defaults, from unpacked packages.

`python -m benchmarks.framework_defaults FRAMEWORK VERSION FOLDER [READ]` reads the package of one version, unpacked in
FOLDER, and adds it to that framework's file in `memplan/frameworks/reading/defaults/`. Classes are read as syntax
trees: nothing is imported. A default that is not written as a literal, or as a member of an enum, is left out.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from memplan.frameworks import reading
from memplan.frameworks.reading.document import paths
from memplan.frameworks.reading.run_file import nested

FOLDER = Path(reading.__file__).parent / "defaults"
_VERL_PARTS = {"model/hf_model.yaml": "model", "engine/fsdp.yaml": "engine", "optim/fsdp.yaml": "optim"}
_VERL_MODEL = (
    *("lora_rank", "lora_alpha", "target_modules", "enable_gradient_checkpointing", "enable_activation_offload"),
    *("use_remove_padding", "use_liger", "use_fused_kernels"),
)
_VERL_ENGINE = (
    *("param_offload", "optimizer_offload", "offload_policy", "reshard_after_forward", "fsdp_size"),
    *("model_dtype", "forward_prefetch"),
)
# Framework -> its package, the files whose classes hold its config, and the keys whose defaults are read.
SOURCES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "axolotl": (
        "axolotl",
        ("utils/schemas/*.py", "integrations/*/args.py"),
        (
            *("micro_batch_size", "gradient_accumulation_steps", "sequence_len", "optimizer", "bf16", "val_set_size"),
            *("gradient_checkpointing", "activation_offloading", "lora_dropout", "cut_cross_entropy", "fsdp_version"),
        ),
    ),
    "llamafactory": (
        "llamafactory",
        ("hparams/*.py",),
        (
            *("finetuning_type", "stage", "lora_rank", "lora_dropout", "lora_target", "oft_block_size"),
            *("freeze_trainable_layers",),
            *("quantization_method", "quantization_type", "double_quantization", "flash_attn", "use_reentrant_gc"),
            *("disable_gradient_checkpointing", "cutoff_len", "val_size", "freeze_vision_tower"),
            *("freeze_multi_modal_projector", "freeze_language_model", "enable_liger_kernel", "pure_bf16"),
        ),
    ),
    "trl": (
        "trl",
        (
            *("trainer/sft_config.py", "trainer/base_config.py", "trainer/model_config.py", "scripts/utils.py"),
            *("trainer/dpo_config.py", "trainer/grpo_config.py", "trainer/kto_config.py", "trainer/reward_config.py"),
            *("trainer/rloo_config.py", "scripts/grpo.py"),
        ),
        (
            *("dtype", "use_peft", "lora_r", "lora_alpha", "lora_dropout", "load_in_4bit", "load_in_8bit"),
            *("bnb_4bit_quant_type", "use_bnb_nested_quant", "gradient_checkpointing", "max_length", "packing"),
            *("packing_strategy", "padding_free", "activation_offloading", "eval_packing"),
        ),
    ),
    "transformers": (
        "transformers",
        ("training_args.py", "training_args_seq2seq.py"),
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("gradient_checkpointing", "max_grad_norm", "eval_strategy", "bf16", "fp16", "use_liger_kernel"),
            *("torch_compile", "eval_do_concat_batches", "batch_eval_metrics"),
        ),
    ),
    "accelerate": (
        "accelerate",
        ("commands/config/config_args.py",),
        ("num_processes", "num_machines", "mixed_precision"),
    ),
    "ms-swift": (
        "swift",
        (
            *("llm/argument/base_args/*.py", "llm/argument/t*_args.py", "llm/argument/rlhf_args.py"),  # of 3
            *("arguments/base_args/*.py", "arguments/tuner_args.py", "trainers/arguments.py", "arguments/sft_args.py"),
            *("arguments/pretrain_args.py", "arguments/rlhf_args.py", "rlhf_trainers/args_mixin.py"),
        ),
        (
            *("tuner_type", "lora_rank", "lora_alpha", "lora_dropout", "freeze_vit", "freeze_aligner", "freeze_llm"),
            *("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "per_device_train_batch_size", "packing"),
            *("per_device_eval_batch_size", "gradient_checkpointing", "use_liger_kernel", "padding_free"),
            *("vllm_gpu_memory_utilization", "cpo_alpha", "split_dataset_ratio"),
        ),
    ),
    "megatron-swift": (
        "swift",
        ("arguments/base_args/*.py", "megatron/arguments/*.py"),
        (
            *("tuner_type", "lora_rank", "lora_alpha", "lora_dropout", "freeze_vit", "freeze_aligner", "freeze_llm"),
            *("micro_batch_size", "global_batch_size", "recompute_granularity", "cross_entropy_loss_fusion"),
            *("cross_entropy_fusion_impl", "attention_backend", "optimizer", "clip_grad", "use_distributed_optimizer"),
            *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
            *("expert_model_parallel_size", "expert_tensor_parallel_size", "sequence_parallel"),
        ),
    ),
    "peft": (
        "peft",
        ("config.py", "tuners/*/config.py", "tuners/lora/config.py"),
        ("r", "lora_alpha", "lora_dropout"),
    ),
    "litgpt": (
        "litgpt",
        ("args.py", "finetune/full.py", "finetune/lora.py"),
        (
            *("lora_r", "lora_alpha", "lora_dropout", "lora_query", "lora_key", "lora_value", "lora_projection"),
            *("lora_mlp", "lora_head", "train.micro_batch_size", "train.global_batch_size", "devices", "num_nodes"),
        ),
    ),
    "unsloth": (
        "unsloth_cli",
        ("config.py",),
        (
            *("training.training_type", "training.max_seq_length", "training.load_in_4bit", "training.batch_size"),
            *("training.gradient_accumulation_steps", "training.gradient_checkpointing", "training.packing"),
            *("lora.lora_r", "lora.lora_alpha", "lora.lora_dropout", "lora.finetune_vision_layers"),
            "lora.finetune_language_layers",
        ),
    ),
    "torchtune": ("recipes", ("configs/*/*.yaml",), ()),
    "torchtitan": (
        "torchtitan",
        ("config/job_config.py",),
        (
            *("training.local_batch_size", "training.seq_len", "training.max_norm", "training.dtype"),
            *("training.mixed_precision_param", "activation_checkpoint.mode", "optimizer.name"),
            *("activation_checkpoint.selective_ac_option", "parallelism.data_parallel_shard_degree"),
            "parallelism.data_parallel_replicate_degree",
        ),
    ),
    "openrlhf": (
        "openrlhf",
        ("cli/train_*.py",),
        (
            *("ds.zero_stage", "ds.param_dtype", "ds.adam_offload", "ds.attn_implementation", "ds.load_in_4bit"),
            *("ds.lora.rank", "ds.lora.alpha", "ds.lora.dropout", "ds.packing_samples", "ds.use_liger_kernel"),
            *("ds.ring_attn_size", "ds.tensor_parallel_size", "ds.enable_sleep", "ds.overlap_comm", "optim"),
            *("model.gradient_checkpointing_enable", "model.gradient_checkpointing_reentrant", "max_norm"),
            *("train.micro_batch_size", "train.batch_size", "data.max_len", "rollout.n_samples_per_prompt"),
            *("rollout.max_new_tokens", "rollout.micro_batch_size", "algo.kl.init_coef", "algo.advantage.estimator"),
            *("actor.num_nodes", "actor.num_gpus_per_node", "vllm.gpu_memory_utilization", "vllm.enable_sleep"),
            *("vllm.tensor_parallel_size", "train.colocate_all", "train.colocate_actor_ref", "train.async_enable"),
            *("train.dynamic_batch_enable", "train.max_tokens_per_gpu", "ref.offload"),
        ),
    ),
    "verl": (
        "verl",
        ("trainer/config/_generated_ppo_trainer.yaml",),
        (
            *(f"actor_rollout_ref.model.{name}" for name in _VERL_MODEL),
            *(f"actor_rollout_ref.actor.fsdp_config.{name}" for name in _VERL_ENGINE),
            *("actor_rollout_ref.actor.strategy", "actor_rollout_ref.actor.ppo_mini_batch_size"),
            *("actor_rollout_ref.actor.use_dynamic_bsz", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"),
            *("actor_rollout_ref.actor.use_kl_loss", "actor_rollout_ref.actor.calculate_entropy"),
            *("actor_rollout_ref.actor.entropy_coeff", "actor_rollout_ref.actor.grad_clip"),
            *("actor_rollout_ref.actor.ulysses_sequence_parallel_size", "actor_rollout_ref.actor.optim.optimizer"),
            *("actor_rollout_ref.rollout.gpu_memory_utilization", "actor_rollout_ref.rollout.free_cache_engine"),
            *("actor_rollout_ref.rollout.n", "actor_rollout_ref.rollout.tensor_model_parallel_size"),
            *("actor_rollout_ref.rollout.max_num_batched_tokens", "actor_rollout_ref.rollout.max_num_seqs"),
            *("actor_rollout_ref.hybrid_engine", "algorithm.adv_estimator", "algorithm.use_kl_in_reward"),
            *("data.max_prompt_length", "data.max_response_length", "data.train_batch_size"),
            *("trainer.nnodes", "trainer.n_gpus_per_node"),
        ),
    ),
    "verl-sft": (
        "verl",
        ("trainer/config/sft_trainer_engine.yaml", *(f"trainer/config/{name}" for name in _VERL_PARTS)),
        (
            *(f"model.{name}" for name in _VERL_MODEL),
            *(f"engine.{name}" for name in (*_VERL_ENGINE, "strategy", "ulysses_sequence_parallel_size")),
            *("data.micro_batch_size_per_gpu", "data.max_token_len_per_gpu", "data.use_dynamic_bsz", "data.max_length"),
            *("data.train_batch_size", "optim.optimizer", "optim.clip_grad", "trainer.nnodes"),
            "trainer.n_gpus_per_node",
        ),
    ),
    "automodel": ("nemo_automodel", ("recipes/llm/train_ft.py", "recipes/_typed_config.py"), ()),
    "vllm": ("vllm", ("engine/arg_utils.py", "entrypoints/common/cli_args.py"), ()),
    "sglang": ("sglang", ("srt/arg_groups/fields/*.py",), ()),
    "tgi": ("launcher", ("src/main.rs",), ()),
    "llama.cpp": ("common", ("arg.cpp",), ()),
}
# Framework -> class -> the section of the config that it is of.
SECTIONS: dict[str, dict[str, str]] = {
    "litgpt": {"TrainArgs": "train", "EvalArgs": "eval", "LogArgs": "log"},
    "torchtitan": {
        "Training": "training",
        "Parallelism": "parallelism",
        "ActivationCheckpoint": "activation_checkpoint",
        "Optimizer": "optimizer",
    },
    "verl-sft": _VERL_PARTS,
    "unsloth": {"TrainingConfig": "training", "LoraConfig": "lora", "DataConfig": "data", "LoggingConfig": "logging"},
}
# What memory depends on in torchtune's recipes, of which `tune run` finds one by its name.
_RECIPE = (
    *("model", "tokenizer.max_seq_len", "dataset.packed", "batch_size", "gradient_accumulation_steps", "compile"),
    *("optimizer._component_", "optimizer.fused", "optimizer_in_bwd", "loss._component_", "clip_grad_norm", "dtype"),
    *("enable_activation_checkpointing", "enable_activation_offloading", "fsdp_cpu_offload", "custom_sharded_layers"),
    *("quantizer._component_", "tensor_parallel_dim", "teacher_model._component_", "policy_model._component_"),
)
# Suffix of a file that is not Python -> its flags or keys.
_FLAGS = {
    ".yaml": re.compile(r"^(\w+):", re.MULTILINE),
    ".rs": re.compile(r"#\[clap\([^\n]*\n    (\w+): "),
    ".cpp": re.compile(r'[{ ]"-{1,2}([a-z][\w-]*)" ?[,}]'),
}
# What a recipe reads of its config.
_READS = re.compile(r"\bcfg\.(?:get\(\s*\"(\w+)|(?!get\b)(\w+))|raw\.(?:get|pop)\(\"(\w+)")
_CALLS = ("field", "Field")


def fields(path: Path, sections: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield the name and default of every annotated field in the classes of a file; Ellipsis if it is not a literal.

    A field of a class in `sections` is named with its section. The arguments of a function `setup` are fields too. Of a
    file that is not Python, yield the names of its flags.
    """
    if "config" in path.parts and path.suffix == ".yaml":  # verl's, of which each leaf is a key
        start = next((f"{section}." for end, section in sections.items() if str(path).endswith(end)), "")
        yield from ((start + name, value) for name, value in paths(yaml.safe_load(path.read_text("utf-8"))))
        return
    if path.suffix in _FLAGS:
        yield from ((name.replace("-", "_"), ...) for name in _FLAGS[path.suffix].findall(path.read_text("utf-8")))
        return
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ClassDef):
            start = f"{sections[node.name]}." if node.name in sections else ""
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    yield start + line.target.id, default(line.value)
                    yield from ((name, ...) for name in aliases(line.value))
        elif isinstance(node, ast.FunctionDef) and node.name == "setup":
            yield from arguments(node.args)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            yield from options(node)


def options(call: ast.Call) -> Iterator[tuple[str, Any]]:
    """Yield the name and default of an argparse option; of one whose name has a variable, of the actor and critic."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    name = call.args[0]
    parts = name.values if isinstance(name, ast.JoinedStr) else [name]
    for model in ("actor", "critic"):
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else model for part in parts)
        yield text.lstrip("-"), default(given.get("default"))


def arguments(args: ast.arguments) -> Iterator[tuple[str, Any]]:
    """Yield the name and default of a function's arguments; those of a call as an argument's parts."""
    for arg, value in zip(reversed(args.args), reversed(args.defaults), strict=False):
        yield arg.arg, default(value)
        for keyword in value.keywords if isinstance(value, ast.Call) else ():
            yield f"{arg.arg}.{keyword.arg}", default(keyword.value)
    yield from ((arg.arg, ...) for arg in args.args)


def aliases(value: ast.expr | None) -> Iterator[str]:
    """Yield the other names of a pydantic field."""
    for keyword in value.keywords if isinstance(value, ast.Call) else ():
        if keyword.arg in ("alias", "validation_alias"):
            nodes = ast.walk(keyword.value)
            yield from (str(node.value) for node in nodes if isinstance(node, ast.Constant))


def default(value: ast.expr | None) -> Any:
    """Return a default as a literal; Ellipsis if it has none."""
    if isinstance(value, ast.Call) and getattr(value.func, "id", getattr(value.func, "attr", "")) in _CALLS:
        given = [keyword.value for keyword in value.keywords if keyword.arg == "default"]
        return default((value.args or given or [None])[0])
    if isinstance(value, ast.Attribute) and value.attr.isupper():  # a member of an enum, whose value is its name
        return value.attr.lower()
    try:
        return ... if value is None else ast.literal_eval(value)
    except ValueError:
        return ...


def recipes(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each of torchtune's recipes, and what memory depends on in it, if it trains."""
    for path in sorted(folder.glob("configs/*/*.yaml")):
        values = dict(paths(yaml.safe_load(path.read_text("utf-8"))))
        said = {key: value for key, value in values.items() if key in _RECIPE or key.partition(".")[0] == "model"}
        if "optimizer._component_" in said:
            kept = {key: value for key, value in said.items() if value not in (None, False)}
            yield f"{path.parent.name}/{path.stem}", {"title": "torchtune", "tokenizer": {}, **nested(kept)}


def main(framework: str, version: str, folder: str, read: str = "") -> None:
    """Add one version of a framework to its file, with what was `read` if that is no package of that version."""
    package, patterns, wanted = SOURCES[framework]
    root = next(path for path in (Path(folder) / package, Path(folder) / "src" / package) if path.is_dir())
    found: dict[str, Any] = {}
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            if framework == "automodel":
                found |= {name: ... for names in _READS.findall(path.read_text("utf-8")) for name in names if name}
                continue
            for name, value in fields(path, SECTIONS.get(framework, {})):
                found[name] = value if value is not ... or name not in found else found[name]
    target = FOLDER / f"{framework}.json"
    data = json.loads(target.read_text("utf-8")) if target.exists() else {"read": {}, "defaults": {}, "keys": []}
    short = ".".join(version.split(".")[:2]) if framework != "llamafactory" else version
    data["read"][short] = read or f"{package} {version}"
    data["defaults"][short] = {name: found[name] for name in wanted if found.get(name, ...) not in (..., None)}
    data["keys"] = sorted({*data["keys"], *found})
    target.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    if framework == "torchtune":
        lines = (f"{json.dumps(name)}: {json.dumps(values)}" for name, values in recipes(root))
        (FOLDER / "torchtune-recipes.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
