"""`Signature`: how a framework's files and commands are told, so that only its own rules are imported."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

from memplan.core.records import NamedTuple
from memplan.frameworks.reading.run_format import RunFormat


class Signature(NamedTuple):
    """The keys and programs that tell a framework's files and commands.

    title       its name as shown
    module      the module of `memplan.frameworks.reading` with its rules
    needs       keys that all of its files have
    any_of      keys of which its files have some; none if no file is told by its keys
    excludes    keys that none of its files have
    programs    program -> the subcommands that are read, of those that start it; none for a program without any
    is_general  whether other frameworks' files have its keys too, so that theirs come first
    """

    title: str
    module: str
    needs: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    programs: Mapping[str, tuple[str, ...]] = {}
    is_general: bool = False

    def told_by(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the keys that tell that a file is this framework's; empty if it is not."""
        has = {key for key, value in values.items() if value is not None}
        some = [key for key in self.any_of if key in has]
        fits = some and has.issuperset(self.needs) and has.isdisjoint(self.excludes)
        return (*self.needs, *some[: 2 - len(self.needs[:1])]) if fits else ()


SIGNATURES = {
    "axolotl": Signature(
        "Axolotl",
        "axolotl",
        needs=("base_model",),
        any_of=(
            *("micro_batch_size", "sequence_len", "adapter", "sample_packing"),
            *("gradient_accumulation_steps", "val_set_size", "datasets"),
        ),
        programs={"axolotl": ("train",), "axolotl.cli.train": ()},
    ),
    "llamafactory": Signature(
        "LLaMA-Factory",
        "llamafactory",
        needs=("model_name_or_path",),
        any_of=(
            *("finetuning_type", "stage", "cutoff_len", "template", "quantization_bit", "lora_rank"),
            *("lora_target", "pure_bf16", "dataset_dir"),
        ),
        excludes=("base_model",),
        programs={"llamafactory-cli": ("train",)},
    ),
    "ms-swift": Signature(
        "ms-swift",
        "swift",
        needs=("model",),
        any_of=(
            *("tuner_type", "train_type", "target_modules", "torch_dtype", "split_dataset_ratio"),
            *("attn_impl", "quant_bits", "freeze_vit", "model_author", "lora_rank"),
        ),
        excludes=("base_model", "model_name_or_path"),
        programs={"swift": ("sft", "pt"), "swift.cli.sft": (), "swift.cli.pt": ()},
    ),
    "torchtune": Signature(
        "torchtune",
        "torchtune",
        needs=("model", "tokenizer"),
        any_of=("optimizer", "loss", "checkpointer"),
        excludes=("recipe", "base_model"),
        programs={
            "lora_finetune_single_device": (),
            "lora_finetune_distributed": (),
            "full_finetune_single_device": (),
            "full_finetune_distributed": (),
        },
    ),
    "litgpt": Signature(
        "LitGPT",
        "litgpt",
        needs=("checkpoint_dir",),
        any_of=("precision", "train", "lora_r", "devices", "quantize"),
        programs={"litgpt": ("finetune_lora", "finetune_full", "finetune")},
    ),
    "unsloth": Signature(
        "Unsloth",
        "unsloth",
        needs=("training",),
        any_of=("lora", "training"),
        excludes=("actor_rollout_ref", "recipe", "job", "parallelism", "optimizer"),
        programs={"unsloth": ("train",)},
    ),
    "automodel": Signature(
        "NeMo Automodel",
        "automodel",
        needs=("step_scheduler", "model"),
        any_of=("recipe", "dataset", "distributed", "peft"),
        programs={"automodel": (), "am": (), "nemo_automodel.cli.app": ()},
    ),
    "torchtitan": Signature(
        "torchtitan",
        "torchtitan",
        needs=("model", "training"),
        any_of=("parallelism", "activation_checkpoint", "job"),
        excludes=("lora", "recipe"),
        programs={"torchtitan.train": ()},
    ),
    "trl": Signature(
        "TRL",
        "trl",
        any_of=(
            *("dataset_name", "use_peft", "max_seq_length", "lora_r", "load_in_4bit", "load_in_8bit"),
            *("padding_free", "packing_strategy", "assistant_only_loss", "completion_only_loss"),
            *("dataset_text_field", "num_generations", "reward_funcs", "max_prompt_length"),
            *("dataset_mixer", "dataset_mixture", "lora_target_modules"),
        ),
        excludes=(
            *("base_model", "finetuning_type", "stage", "cutoff_len", "checkpoint_dir", "tuner_type"),
            *("train_type", "torch_dtype_str", "recipe", "lora_rank"),
        ),
        programs={"trl": ("sft",)},
    ),
    "transformers": Signature(
        "transformers",
        "trl",
        any_of=(
            *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"),
            *("lr_scheduler_type", "gradient_checkpointing", "per_device_eval_batch_size"),
            *("max_grad_norm", "optim"),
        ),
        excludes=("base_model", "checkpoint_dir", "tuner_type", "train_type", "recipe"),
        is_general=True,
    ),
    "peft": Signature(
        "peft",
        "adapters",
        needs=("peft_type",),
        any_of=("base_model_name_or_path", "r", "target_modules"),
    ),
    "ollama": Signature(
        "Ollama",
        "modelfile",
    ),
    "vllm": Signature(
        "vLLM",
        "serving",
        programs={"vllm": ("serve",), "vllm.entrypoints.openai.api_server": ()},
    ),
    "sglang": Signature(
        "SGLang",
        "serving",
        programs={"sglang": ("serve",), "sglang.launch_server": ()},
    ),
    "tgi": Signature(
        "Text Generation Inference",
        "serving",
        programs={"text-generation-launcher": ()},
    ),
    "llama.cpp": Signature(
        "llama.cpp",
        "serving",
        programs={"llama-server": (), "llama-cli": ()},
    ),
}
PROGRAMS = {program: name for name, each in SIGNATURES.items() for program in each.programs}


@cache
def format_named(name: str) -> RunFormat:
    """Return the framework with its rules."""
    module = import_module(f"memplan.frameworks.reading.{SIGNATURES[name].module}")
    return next(form for form in module.FORMATS if form.name == name)
