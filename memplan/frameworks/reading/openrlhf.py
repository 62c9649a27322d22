"""OpenRLHF's rules. Its flags say everything, and there are no files.

Source: openrlhf 0.11.2 cli/train_{sft,dpo,rm,ppo_ray}.py, models/actor.py, models/model.py, utils/deepspeed,
trainer/ray; openrlhf 0.9.10 and 0.8.11 for the flags before, of which `frameworks.toml` has the new names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.frameworks.reading import trainer
from memplan.frameworks.reading.config import Config, Rule
from memplan.frameworks.reading.document import Document

# Program -> its trainer, and defaults that differ from those of train_sft.
_PROGRAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "train_sft": ("sft", {}),
    "train_dpo": ("dpo", {"data.max_len": 512}),
    "train_rm": ("reward", {"data.max_len": 512, "train.micro_batch_size": 1}),
    "train_kto": ("kto", {}),
    "train_ppo_ray": ("ppo", {"train.micro_batch_size": 1}),
}
_ESTIMATORS = {"group_norm": "grpo", "dr_grpo": "grpo"} | dict.fromkeys(
    ("rloo", "reinforce", "reinforce_baseline", "flash_reinforce", "gae"), "rloo"
)


def _program(config: Config) -> None:
    kind, defaults = _PROGRAMS.get(config.command.rpartition(".")[2], ("sft", {}))
    config.defaults = {**config.defaults, **defaults}
    config.set("loop.clip_grad_norm", config.number("max_norm") or None, "max_norm")
    config.set("batch.micro", config.whole("train.micro_batch_size"), "train.micro_batch_size")
    if kind == "ppo":
        _generation(config)
        return
    config.set("batch.sequence", config.whole("data.max_len"), "data.max_len")
    if kind == "sft":
        return
    config.set("trainer", kind, why=config.command)
    if kind in ("dpo", "kto"):
        config.set("reference", "copy", "ref.model_name_or_path", why="a model of its own, also next to adapters")
        if config.flag("ref.offload"):
            config.leave("ref.offload", "the reference is counted on the GPU")


def _generation(config: Config) -> None:
    """PPO and what it is without a critic. Models have GPUs of their own unless they are colocated."""
    key = "algo.advantage.estimator"
    estimator = str(config.get(key))
    if estimator not in _ESTIMATORS:
        raise config.refuse(key, ", ".join(_ESTIMATORS))
    if estimator == "gae":
        _critic(config)
    config.set("trainer", _ESTIMATORS[estimator], key)
    total, answer = config.whole("data.max_len") or 0, config.whole("rollout.max_new_tokens")
    why = "" if answer else "assumed: prompts and completions take half each"
    config.set("batch.new_tokens", answer or total // 2, *(("rollout.max_new_tokens",) if answer else ()), why=why)
    if config.whole("prompt_max_len"):  # until 0.9
        config.set("batch.sequence", config.whole("prompt_max_len"), "prompt_max_len")
    else:
        config.set("batch.sequence", max(total - (answer or total // 2), 1), "data.max_len", why=why)
    config.set("batch.generations", config.whole("rollout.n_samples_per_prompt"), "rollout.n_samples_per_prompt")
    together, with_actor = config.flag("train.colocate_all"), config.flag("train.colocate_actor_ref")
    key = "algo.kl.init_coef"
    if not config.number(key):
        config.set("reference", "none", key)
    elif together or with_actor:
        config.set("reference", "copy", "train.colocate_all" if together else "train.colocate_actor_ref")
        if config.flag("ref.offload"):
            config.leave("ref.offload", "the reference is counted on the GPU")
    else:
        config.set("reference", "none", why="the reference has GPUs of its own: train.colocate_all is not set")
    rewards = _reward_models(config)
    if together and rewards and not config.flag("reward.offload"):
        trainer.role(config, "reward", rewards[0], "reward.model_name_or_path")
        if config.value("roles.reward.model") is not None:
            key = "rollout.micro_batch_size"
            config.set("roles.reward.micro", config.whole(key), key)
        if len(rewards) > 1:
            config.leave("reward.model_name_or_path", f"only the first of {len(rewards)} reward models is counted")
    if not config.whole("vllm.num_engines"):
        return
    shares = together and not config.flag("train.async_enable")
    config.set("rollout", "colocate" if shares else "server", "vllm.num_engines", "train.colocate_all")
    if shares:
        key = "vllm.gpu_memory_utilization"
        config.set("serving.memory_utilization", config.number(key), key)
        config.set("serving.sleep", config.flag("vllm.enable_sleep"), "vllm.enable_sleep")
        trainer.engine_ranks(config, "vllm.tensor_parallel_size")
        if config.flag("ds.enable_sleep"):
            config.set("serving.trainer_offload", ["optimizer"], "ds.enable_sleep")


def _reward_models(config: Config) -> list[str]:
    return [] if config.said("reward.remote_url") is not None else config.names("reward.model_name_or_path") or []


def _critic(config: Config) -> None:
    """The critic of PPO, like the reward model unless it is named. It shares the GPUs if all models do."""
    key, rewards = "critic.model_name_or_path", _reward_models(config)
    name = config.text(key)
    if name is None and rewards:
        key, name = "reward.model_name_or_path", rewards[0]
    trainer.role(config, "value", name, key, needed=True)
    if not config.flag("train.colocate_all"):
        config.set("roles.value.location", "server", why="it has GPUs of its own: train.colocate_all is not set")


def _method(config: Config) -> None:
    rank = config.whole("ds.lora.rank") or 0
    if config.flag("ds.load_in_4bit"):
        if not rank:
            raise config.error("ds.load_in_4bit", "quantised weights train only under adapters; set ds.lora.rank")
        config.set("method.quantization.format", "nf4", "ds.load_in_4bit")
        config.set("method.quantization.double_quant", True, why=f"{config.title} sets it")
    trainer.adapter(config, rank > 0, False, "ds.lora.rank")
    if rank:
        names = config.names("ds.lora.target_modules") or ["all-linear"]
        config.set("method.rank", rank, "ds.lora.rank")
        config.set("method.targets", "all-linear" if names == ["all-linear"] else names, "ds.lora.target_modules")


def _kernels(config: Config) -> None:
    trainer.attention(config, "ds.attn_implementation")
    on = config.flag("model.gradient_checkpointing_enable")
    config.set("kernels.checkpointing", "full" if on else "none", "model.gradient_checkpointing_enable")
    if on:
        key = "model.gradient_checkpointing_reentrant"
        config.set("kernels.reentrant", config.flag(key), key)
    if config.flag("ds.use_liger_kernel"):  # the loss is computed outside of the model
        config.set("kernels.fused", ["rope", "rms_norm", "swiglu"], "ds.use_liger_kernel")
    packs = config.flag("ds.packing_samples")
    if config.value("trainer") is None:
        trainer.packing(config, "padding_free" if packs else None, "ds.packing_samples")
    else:
        trainer.padding(config, packs)
    if config.text("optim") == "muon":
        config.set("optimizer.name", "muon", "optim")


def _parallelism(config: Config) -> None:
    """DeepSpeed with a config that OpenRLHF writes; what it leaves at `auto` has DeepSpeed's own defaults."""
    stage, zero = config.whole("ds.zero_stage"), "ds.zero_stage"
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}} if config.flag("ds.adam_offload") else {}
    overlaps = {"overlap_comm": True} if config.flag("ds.overlap_comm") else {}
    dtype = config.word("ds.param_dtype", "bf16", "fp16") or "bf16"
    values = {"zero_optimization": {"stage": stage, **offload, **overlaps}, dtype: {"enabled": True}}
    if config.value("trainer") in ("grpo", "rloo"):
        gpus, nodes = config.whole("actor.num_gpus_per_node") or 1, config.whole("actor.num_nodes") or 1
        config.set("parallelism.world", gpus * nodes, "actor.num_gpus_per_node", "actor.num_nodes")
    found = {field: origin for field, origin in config.found.items() if field.startswith("loop.")}
    trainer.deepspeed(config, Document(config.title, None, values, {}))
    why = config.why(zero, *(["ds.adam_offload"] if offload else []))
    for field, origin in config.found.items():
        if field.startswith(("parallelism.strategy", "parallelism.offload", "precision.")):
            config.found[field] = origin._replace(why=why if field.startswith("par") else config.why("ds.param_dtype"))
    config.found |= found
    trainer.parallelism(config)
    for key in ("ds.ring_attn_size", "ds.tensor_parallel_size"):
        if (config.whole(key) or 1) > 1:
            config.leave(key, "each GPU is counted with whole sequences and weights")
    each = max((config.whole("train.batch_size") or 1) // (config.value("parallelism.world") or 1), 1)
    scores, scored = "rollout.micro_batch_size", config.whole("rollout.micro_batch_size") or 1
    if config.flag("train.dynamic_batch_enable"):
        key, length = "train.max_tokens_per_gpu", config.whole("data.max_len") or 1
        config.set("batch.micro", trainer.largest_micro_batch(config, (config.whole(key) or 0) // length, each), key)
        scores = "rollout.max_tokens_per_gpu"
        scored = (config.whole(scores) or config.whole(key) or 0) // length
    if config.value("trainer") in ("grpo", "rloo") and scored > (config.value("batch.micro") or 1):
        config.set("batch.scored", scored, scores)  # of passes for log-probabilities before a step
    config.set("batch.accumulation", max(each // max(config.value("batch.micro") or 1, 1), 1), "train.batch_size")


RULES: Mapping[str, tuple[Rule, ...]] = {"openrlhf": (_program, _method, _kernels, _parallelism)}
