"""verl's rules: its YAML, and the overrides that Hydra takes as `key=value`.

The actor's FSDP shards are fp32 and computed in bf16; between its updates, vLLM or SGLang generates on the same GPUs. A
reference is a model of its own on the host, gathered block by block, or the actor without its adapters.

Source: verl 0.9.1 trainer/config, workers/engine/fsdp/transformer_impl.py, workers/engine_workers.py,
workers/rollout/vllm_rollout, trainer/sft_trainer.py, trainer/ppo/utils.py need_critic, experimental/reward_loop.
"""

from __future__ import annotations

from collections.abc import Mapping

from memplan.frameworks.reading import trainer
from memplan.frameworks.reading.config import Config, Rule, shown

_ACTOR, _MODEL, _ROLLOUT = (f"actor_rollout_ref.{part}" for part in ("actor", "model", "rollout"))
_ESTIMATORS = dict.fromkeys(("rloo", "rloo_vectorized", "gae"), "rloo") | dict.fromkeys(
    (
        *("grpo", "grpo_passk", "grpo_vectorized", "gdpo", "gpg", "opo", "reinforce_plus_plus_baseline"),
        *("reinforce_plus_plus", "remax", "optimal_token_baseline", "tir_optimal_token_baseline"),
    ),
    "grpo",
)
_REWARD_SHARE = 0.5  # trainer/config/reward/reward.yaml reward_model.rollout.gpu_memory_utilization
_OFFLOADS = {"parameters": "param_offload", "optimizer": "optimizer_offload"}


def _config_name(config: Config) -> None:
    """Refuse Hydra's config for Megatron; one of another name has keys that are not read."""
    name = config.text("config_name") or "ppo_trainer"
    config.get("config_path")
    if "megatron" in name:
        raise config.refuse("config_name", "ppo_trainer, with FSDP")
    megatron = f"{_ACTOR}.megatron"
    if config.said(megatron) is not None:
        raise config.error(megatron, "verl with Megatron is not supported yet; supported: fsdp, fsdp2")
    if name not in ("ppo_trainer", "sft_trainer", "sft_trainer_engine"):
        config.leave("config_name", "the file's keys are not read: they are verl's defaults")


def _program(config: Config) -> None:
    key = f"{_ACTOR}.strategy"
    if config.word(key, "fsdp", "fsdp2", "megatron", "veomni", "torchtitan") not in ("fsdp", "fsdp2"):
        raise config.refuse(key, "fsdp, fsdp2")
    key = "algorithm.adv_estimator"
    estimator = str(config.get(key))
    if estimator not in _ESTIMATORS:
        raise config.refuse(key, ", ".join(_ESTIMATORS))
    config.set("trainer", _ESTIMATORS[estimator], key)
    used = [key for key in (f"{_ACTOR}.use_kl_loss", "algorithm.use_kl_in_reward") if config.flag(key)]
    has_adapters = (config.whole(f"{_MODEL}.lora_rank") or 0) > 0
    has_copy = bool(used) and not has_adapters
    why = f"{config.title} keeps the reference on the host" if has_copy else ""
    keys = used or (f"{_ACTOR}.use_kl_loss", "algorithm.use_kl_in_reward")
    config.set("reference", "adapters" if used and has_adapters else "none", *keys, why=why)
    config.set("loop.clip_grad_norm", config.number(f"{_ACTOR}.grad_clip") or None, f"{_ACTOR}.grad_clip")
    _engine(config, f"{_ACTOR}.fsdp_config", f"{_ACTOR}.strategy", f"{_ACTOR}.optim")
    _model(config, _MODEL)
    _micro_batch(config, has_copy)
    _rollout(config)
    if config.flag("critic.enable") if config.said("critic.enable") is not None else estimator == "gae":
        _critic(config)
    if config.flag(f"{_ACTOR}.calculate_entropy") or config.number(f"{_ACTOR}.entropy_coeff"):
        config.leave(f"{_ACTOR}.entropy_coeff", "the entropy of all logits is not counted")
    if (config.whole(f"{_ACTOR}.ulysses_sequence_parallel_size") or 1) > 1:
        config.leave(f"{_ACTOR}.ulysses_sequence_parallel_size", "each GPU is counted with whole sequences")
    for name in ("reward.reward_model", "reward_model"):
        if config.flag(f"{name}.enable") and not config.flag(f"{name}.enable_resource_pool"):
            _reward_model(config, name)


def _reward_model(config: Config, name: str) -> None:
    """A reward model's engine is awake while it scores, when the one that generates sleeps: the larger share counts."""
    if config.said(f"{name}.rollout.name") is None and config.said(f"{name}.micro_batch_size_per_gpu") is not None:
        config.leave(f"{name}.enable", "a reward model under FSDP, as until verl 0.6, is not counted")
        return
    key = f"{name}.rollout.gpu_memory_utilization"
    share = config.number(key) or _REWARD_SHARE
    if share > (config.value("serving.memory_utilization") or 0):
        config.set("serving.memory_utilization", share, key, why="of the reward model's engine, while it scores")


def _micro_batch(config: Config, has_copy: bool) -> None:
    """As many sequences as `ppo_max_token_len_per_gpu` holds of the longest; a step has a mini-batch of prompts."""
    key, mini = f"{_ACTOR}.ppo_micro_batch_size_per_gpu", f"{_ACTOR}.ppo_mini_batch_size"
    micro, length = config.whole(key), sum(config.value(f"batch.{part}") or 0 for part in ("sequence", "new_tokens"))
    step = (config.whole(mini) or 1) * (config.value("batch.generations") or 1)
    each = max(step // (config.value("parallelism.world") or 1), 1)
    if config.flag(f"{_ACTOR}.use_dynamic_bsz"):
        key = f"{_ACTOR}.ppo_max_token_len_per_gpu"
        micro = trainer.largest_micro_batch(config, (config.whole(key) or 0) // max(length, 1), each)
    elif micro is None and config.said(f"{_ACTOR}.ppo_micro_batch_size") is not None:  # verl until 0.5, among all GPUs
        key = f"{_ACTOR}.ppo_micro_batch_size"
        micro = max((config.whole(key) or 1) // (config.value("parallelism.world") or 1), 1)
    elif micro is None:
        raise config.error(f"{_ACTOR}.use_dynamic_bsz", f"set it, or {key}")
    config.set("batch.micro", micro, key)
    config.set("batch.accumulation", -(-each // max(micro, 1)), mini)
    _scored(config, length, has_copy)


def _scored(config: Config, length: int, has_copy: bool) -> None:
    """Log-probabilities before a step have micro-batches of their own, which are as large as the actor's unless set."""
    world, name = config.value("parallelism.world") or 1, "log_prob_micro_batch_size"
    rows = (config.whole("data.train_batch_size") or 1) * (config.value("batch.generations") or 1)
    for part in (_ROLLOUT, *(("actor_rollout_ref.ref",) if has_copy else ())):
        dynamic, key = f"{part}.log_prob_use_dynamic_bsz", f"{part}.{name}_per_gpu"
        if config.flag(f"{_ACTOR}.use_dynamic_bsz" if config.said(dynamic) is None else dynamic):
            key = f"{part}.log_prob_max_token_len_per_gpu"
            scored = (config.whole(key) or 0) // max(length, 1)
        elif config.said(key) is None and config.said(f"{part}.{name}") is not None:  # verl until 0.5, among all GPUs
            key = f"{part}.{name}"
            scored = (config.whole(key) or 0) // world
        else:
            scored = config.whole(key) or 0
        scored = min(scored, -(-rows // world))
        if scored > max(config.value("batch.micro") or 1, config.value("batch.scored") or 0):
            config.set("batch.scored", scored, key)


_CRITIC_TOKENS = 32768  # trainer/config/critic/critic.yaml ppo_max_token_len_per_gpu


def _critic(config: Config) -> None:
    """The critic of PPO, which is divided among the same GPUs and has micro-batches and an optimizer of its own."""
    trainer.role(config, "value", config.text("critic.model.path"), "critic.model.path", needed=True)
    length = sum(config.value(f"batch.{part}") or 0 for part in ("sequence", "new_tokens"))
    rows = (config.value("batch.micro") or 1) * (config.value("batch.accumulation") or 1)
    key, own = "critic.ppo_micro_batch_size_per_gpu", "critic.use_dynamic_bsz"
    micro = config.whole(key)
    if config.flag(f"{_ACTOR}.use_dynamic_bsz" if config.said(own) is None else own):
        key = "critic.ppo_max_token_len_per_gpu"
        micro = trainer.largest_micro_batch(config, (config.whole(key) or _CRITIC_TOKENS) // max(length, 1), rows)
    if micro is not None:
        config.set("roles.value.micro", micro, key)
    for name in _OFFLOADS.values():
        for key in (f"critic.fsdp.{name}", f"critic.model.fsdp_config.{name}"):
            if config.said(key) is not None and config.flag(key):
                config.leave(key, "the critic's is counted on the GPU")


def _rollout(config: Config) -> None:
    if config.said("actor_rollout_ref.hybrid_engine") is not None and not config.flag(
        "actor_rollout_ref.hybrid_engine"
    ):
        config.set("rollout", "server", "actor_rollout_ref.hybrid_engine")
        config.found = {field: origin for field, origin in config.found.items() if not field.startswith("serving.")}
        return
    config.set("rollout", "colocate", f"{_ROLLOUT}.name", why="the hybrid engine generates on the GPUs that train")
    trainer.engine_ranks(config, f"{_ROLLOUT}.tensor_model_parallel_size")
    moved = [name for name in ("parameters", "optimizer") if config.flag(f"{_ACTOR}.fsdp_config.{_OFFLOADS[name]}")]
    if moved:
        keys = (f"{_ACTOR}.fsdp_config.{_OFFLOADS[name]}" for name in moved)
        config.set("serving.trainer_offload", moved, *keys)


def _engine(config: Config, engine: str, strategy: str, optim: str) -> None:
    """FSDP among all GPUs, or groups of them, with fp32 shards that are cast to bf16."""
    launch = config.companions.get("accelerate")  # torchrun's processes, in SFT
    if launch is not None and "num_processes" in launch.values:
        trainer.accelerate(config, launch)
    else:
        world = (config.whole("trainer.nnodes") or 1) * (config.whole("trainer.n_gpus_per_node") or 1)
        config.set("parallelism.world", world, "trainer.n_gpus_per_node", "trainer.nnodes")
    world = config.gpus or config.value("parallelism.world") or 1
    if world > 1:
        config.set("parallelism.strategy", config.text(strategy), strategy)
        group = config.whole(f"{engine}.fsdp_size") or -1
        if 0 < group < world:
            config.set("parallelism.shard_group", group, f"{engine}.fsdp_size")
        if not config.flag(f"{engine}.reshard_after_forward"):
            config.set("parallelism.reshard_after_forward", False, f"{engine}.reshard_after_forward")
        if config.flag(f"{engine}.offload_policy") and config.text(strategy) == "fsdp2":
            for part in ("parameters", "optimizer"):
                config.set(f"parallelism.offload.{part}", True, f"{engine}.offload_policy")
    key = f"{engine}.model_dtype"
    weights = trainer.DTYPES.get(str(config.get(key)), "")
    if not weights:
        raise config.error(key, f"must be fp32, bf16 or fp16, not {shown(config.get(key))}")
    config.set("precision.weights", weights, key)
    config.set("precision.compute", "bf16", why=f"{config.title} casts to bf16")
    config.set("precision.autocast", True, why=f"{config.title} casts to bf16")
    name = str(config.get(f"{optim}.optimizer"))
    if name != "AdamW":
        config.leave(f"{optim}.optimizer", f"{shown(name)}: torch's AdamW is counted instead")
    config.set("optimizer.name", "adamw_torch", f"{optim}.optimizer")


def _model(config: Config, model: str) -> None:
    trainer.set_model(config, config.text(f"{model}.path"), f"{model}.path")
    rank = config.whole(f"{model}.lora_rank") or 0
    trainer.adapter(config, rank > 0, False, f"{model}.lora_rank")
    if rank:
        names = config.names(f"{model}.target_modules") or ["all-linear"]
        config.set("method.rank", rank, f"{model}.lora_rank")
        config.set("method.targets", "all-linear" if names == ["all-linear"] else names, f"{model}.target_modules")
        weights = config.value("precision.weights")
        config.set("method.adapter_dtype", weights, why="adapters have the base weights' dtype")
    key = f"{model}.override_config.attn_implementation"
    if config.said(key) is not None:
        trainer.attention(config, key)
    else:
        config.set("kernels.attention", "flash_attention_2", why=f"{config.title} sets it")
    kind = "full" if config.flag(f"{model}.enable_gradient_checkpointing") else "none"
    if kind == "full" and config.flag(f"{model}.enable_activation_offload"):
        kind = "offload"
    config.set("kernels.checkpointing", kind, f"{model}.enable_gradient_checkpointing")
    if config.flag(f"{model}.use_liger"):
        config.set("kernels.fused", ["rope", "rms_norm", "swiglu"], f"{model}.use_liger")
    if config.flag(f"{model}.use_fused_kernels"):
        config.leave(f"{model}.use_fused_kernels", "logits are counted as if they were computed at once")
    if not config.flag(f"{model}.use_remove_padding"):
        trainer.padding(config, False)
    trainer.degrees(config)


def _sft(config: Config) -> None:
    """SFT. A kernel computes the loss of all logits, and writes their gradient over them."""
    if config.command.endswith("fsdp_sft_trainer"):  # until verl 0.7
        config.defaults = {**config.defaults, "data.use_dynamic_bsz": False}
    if config.get("engine.strategy") not in ("fsdp", "fsdp2"):
        raise config.refuse("engine.strategy", "fsdp, fsdp2")
    config.set("loop.clip_grad_norm", config.number("optim.clip_grad") or None, "optim.clip_grad")
    _engine(config, "engine", "engine.strategy", "optim")
    config.set("kernels.fused", [], why=f"{config.title} has none")
    _model(config, "model")
    kernels = [*(config.value("kernels.fused") or ()), "cross_entropy"]
    config.set("kernels.fused", kernels, why="flash-attn's cross_entropy_loss, in place")
    length = config.whole("data.max_length") or 1
    key = "data.micro_batch_size_per_gpu"
    micro = config.whole(key) or 1
    if config.flag("data.use_dynamic_bsz"):
        key = "data.max_token_len_per_gpu"
        micro = max((config.whole(key) or 0) // length, 1)
    config.set("batch.micro", micro, key)
    if config.flag("model.use_remove_padding"):
        trainer.packing(config, "padding_free", "model.use_remove_padding")
    world = config.value("parallelism.world") or 1
    config.set(
        "batch.accumulation",
        max((config.whole("data.train_batch_size") or 1) // (micro * world), 1),
        "data.train_batch_size",
    )
    if (config.whole("engine.ulysses_sequence_parallel_size") or 1) > 1:
        config.leave("engine.ulysses_sequence_parallel_size", "each GPU is counted with whole sequences")
    if config.flag("engine.param_offload") or config.flag("engine.optimizer_offload"):
        config.leave("engine.optimizer_offload", "what is on the host between steps is counted on the GPU")


RULES: Mapping[str, tuple[Rule, ...]] = {"verl": (_config_name, _program), "verl-sft": (_config_name, _sft)}
