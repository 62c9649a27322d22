"""Rules of transformers' Trainer and accelerate, which all frameworks here build on.

Source: transformers 5.24 training_args.py, trainer.py; accelerate 1.15 accelerator.py, utils/dataclasses.py,
utils/fsdp_utils.py, commands/config/config_args.py; DeepSpeed 0.19.8 runtime/config.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from memplan.catalogue.kernels.wiring import TRAINERS
from memplan.catalogue.optimizers.states import optimizer_names
from memplan.catalogue.profiles.profiles import library_behaviour
from memplan.core.errors import MemplanError, SpecError, nearest
from memplan.core.files import expanded
from memplan.frameworks.deepspeed import read as deepspeed_parts
from memplan.frameworks.reading.config import TYPED, Config, FieldOrigin, Unread, shown
from memplan.frameworks.reading.document import Document, is_there, paths
from memplan.models.cards import card_names, find_config, find_model, is_bundled, other_format
from memplan.models.model import ModelSpec
from memplan.spec.run import Batch

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
_FLEX = "flex_attention"
_ATTENTION = {name: name for name in ("sdpa", "eager", _FLEX, *FLASH[:2])} | {"flash_attention_4": "flash_attention_2"}
# Old names of keys -> names that replaced them.
ALIASES = {
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "torch_dtype": "dtype",
    "activation_checkpointing": "gradient_checkpointing",
}
# FSDP1's sharding strategies, by the number that old files have.
_STRATEGIES = {"1": "FULL_SHARD", "2": "SHARD_GRAD_OP", "3": "NO_SHARD", "4": "HYBRID_SHARD", "5": "HYBRID_SHARD_ZERO2"}
_MOST_SEQUENCES = 2**16  # of a micro-batch whose size is that of its tokens
_AS_LARGE = "assumed: as large as the policy"
_NODE = 8  # GPUs among which hybrid sharding shards


def loop(config: Config) -> None:
    """The Trainer drives the step, with the gradient norm that it clips to; it smooths labels outside of the model."""
    config.set("loop.trainer", True, why=f"{config.title} trains with transformers' Trainer")
    if not config.value("loop.clip_grad_norm"):
        config.found.pop("loop.clip_grad_norm", None)
        if config.said("max_grad_norm") is not None:
            config.set("loop.clip_grad_norm", None, "max_grad_norm")
    sync = "accelerator_config.gradient_accumulation_kwargs.sync_each_batch"
    if config.flag(sync):
        config.set("loop.sync_each_batch", True, sync)
    if config.number("label_smoothing_factor") and config.value("trainer") in (None, "sft"):
        config.set("kernels.loss", "label_smoothing", "label_smoothing_factor")


def optimizer(config: Config, key: str = "optim") -> None:
    """The optimizer; its default is left to the profile. Raises SpecError for one that is not supported."""
    name = config.text(key)
    known = optimizer_names()
    if name is None:
        return
    if name not in known:
        near = " or ".join(nearest(name, known))
        raise config.error(key, f"the optimizer {shown(name)} is not supported yet; near: {near}")
    config.set("optimizer.name", name, key)
    if isinstance(config.said("optim_args"), str) and "momentum=" in config.said("optim_args"):
        text = config.said("optim_args").partition("momentum=")[2].partition(",")[0]
        try:
            config.set("optimizer.momentum", float(text), "optim_args")
        except ValueError:
            raise config.error("optim_args", f"momentum must be a number, not {shown(text)}") from None


def fused_loss(config: Config, key: str) -> None:
    """A loss of Liger's: that of the model's forward, to which only SFT passes labels, or the trainer's own."""
    name = str(config.value("trainer") or "sft")
    facts = library_behaviour(str(config.value("profile")), "", False).trainer
    if name == "sft" or (facts.fused_gradients and name in facts.fused_trainers):
        config.set("kernels.loss", "fused", key)


def preference(config: Config, name: str, *keys: str, why: str = "") -> None:
    """A trainer of TRL, whether its reference's log-probabilities are precomputed, and whether it has dropout."""
    config.set("trainer", name, *keys, why=why)
    key = "disable_dropout"
    if config.said(key) is not None and config.flag(key) != TRAINERS[name].no_dropout:
        if config.flag(key):
            config.set("method.dropout", 0.0, key)
        else:
            config.leave(key, "dropout is counted as off")
    if config.flag("precompute_ref_log_probs"):
        config.set("reference", "precomputed", "precompute_ref_log_probs")


def role(config: Config, name: str, model: str | None, key: str, needed: bool = False) -> None:
    """Another model of the trainer's step, if memplan knows it. One that is `needed` is else taken to be as large as
    the policy."""
    if model is not None and (config.value("model") == model or _is_known(model)):
        config.set(f"roles.{name}.model", model, key)
    elif needed:
        config.set(f"roles.{name}.model", config.value("model"), *([key] if model else ()), why=_AS_LARGE)
    elif model is not None:
        config.leave(key, f"the {name} model {shown(model)} is not known, so not counted; name one with roles.{name}")


def _is_known(model: str) -> bool:
    with suppress(MemplanError):
        find_model(model)
        return True
    return False


def ppo(config: Config, reward: str, length: str, *keys: str, why: str = "") -> None:
    """TRL's PPO: its reward model, like which the value model is, and the tokens of its completions."""
    preference(config, "ppo", *keys, why=why)
    role(config, "reward", (config.names(reward) or [None])[0], reward, needed=True)
    chunk = "local_rollout_forward_batch_size"
    if config.whole(chunk) not in (None, 64):
        config.leave(chunk, "up to 64 completions are counted as generated and scored at once")
    for key in (length, "max_new_tokens", "max_completion_length"):
        if config.get(key) is not None:
            config.set("batch.new_tokens", config.whole(key), key)
            return


def generation(
    config: Config, name: str, *keys: str, adapts: bool, mode: str = "colocate", why: str = "", **named: str
) -> None:
    """A trainer of TRL that generates: its completions, its reference, and vLLM if it generates.

    adapts  adapters train
    mode    `vllm_mode`, if it is not set
    named   TRL's key -> the framework's name of it, if that is another
    """
    preference(config, name, *keys, why=why)
    for key, field in (
        ("num_generations", "batch.generations"),
        ("max_completion_length", "batch.new_tokens"),
        ("max_prompt_length", "batch.sequence"),
    ):
        own = named.get(key, key)
        if config.get(own) is not None:
            config.set(field, config.whole(own), own)
        elif field == "batch.sequence":
            assume_length(config, own)
    beta = config.number(named.get("beta", "beta"))
    if beta is not None:
        config.set("reference", ("adapters" if adapts else "copy") if beta else "none", named.get("beta", "beta"))
    default = {"steps_per_generation": config.value("batch.accumulation"), "num_iterations": 1}
    for key in (*default, "generation_batch_size"):
        own = named.get(key, key)
        if config.said(own) is not None and config.whole(own) != default.get(key):
            config.leave(own, "one batch is counted as generated for each step")
    engine, places = (named.get(key, key) for key in ("use_vllm", "vllm_mode"))
    if not config.flag(engine):
        return
    config.set("rollout", config.word(places, "colocate", "server") or mode, engine, places)
    if config.value("rollout") == "server":
        return
    for key, field, value in (
        ("vllm_gpu_memory_utilization", "memory_utilization", config.number),
        ("vllm_max_model_length", "max_model_len", config.whole),
        ("vllm_enable_sleep_mode", "sleep", config.flag),
    ):
        own = named.get(key, key)
        if config.get(own) is not None:
            config.set(f"serving.{field}", value(own), own)
    engine_ranks(config, named.get("vllm_tensor_parallel_size", "vllm_tensor_parallel_size"))


def engine_ranks(config: Config, key: str) -> None:
    """How many of the GPUs that train an engine is divided among."""
    if (config.whole(key) or 1) > 1:
        config.set("serving.tensor_parallel", config.whole(key), key)


def largest_micro_batch(config: Config, most: int, each: int) -> int:
    """Return the largest micro-batch, of at most `most` completions, with which a step of `each` has whole groups."""
    most, group = max(min(most, each, _MOST_SEQUENCES), 1), config.value("batch.generations") or 1
    world = config.value("parallelism.world") or 1
    return next((size for size in range(most, 0, -1) if size * -(-each // size) * world % group == 0), most)


def is_flash(name: object) -> bool:
    """Whether an attention is FlashAttention of any version, or a kernel of the Hub that is."""
    return isinstance(name, str) and (name in FLASH or ("/" in name and "flash" in name))


def attention(config: Config, key: str = "attn_implementation") -> None:
    name = config.text(key)
    if name is None:
        return
    kind = _ATTENTION.get(name, "flash_attention_2" if is_flash(name) else None)
    model = model_of(config)
    # transformers lets some families run flash attention only by other names than flash_attention_2, as gpt-oss does:
    # modeling_utils.py _compatible_flash_implementations.
    facts = model.family.attention if model is not None and is_flash(name) and name != FLASH[0] else None
    if facts is not None and facts.no_flash_2:
        kind = FLASH[1] if facts.flash_3 else None
    if kind is None:
        config.leave(key, f"{shown(name)}: sdpa, or eager without it, is counted instead")
    else:
        config.set("kernels.attention", kind, key)


def settle_attention(config: Config) -> None:
    """Count torch's choice, with a note, for flex attention in a run with which memplan does not count it."""
    if config.value("kernels.attention") != _FLEX:
        return
    model = model_of(config)
    library = library_behaviour(str(config.value("profile")), "", False).attention
    is_known = model is not None and model.family.attention.flex and not model.probability("attention_dropout")
    others = ("batch.packing", "parallelism.tp", "parallelism.cp", "parallelism.pp")
    is_alone = config.value("trainer") in (None, "sft") and all((config.value(name) or 1) == 1 for name in others)
    if is_known and is_alone and library.flex:
        return
    where, _, key = config.found.pop("kernels.attention").why.rpartition(" ")
    config.unread.append(Unread(where, key, f"{_FLEX}: sdpa, or eager without it, is counted instead"))


def checkpointing(config: Config) -> None:
    """Checkpointing as TrainingArguments say it, and its keywords."""
    key = "gradient_checkpointing"
    if TRAINERS[config.value("trainer") or "sft"].own_loop:
        config.set("kernels.checkpointing", "none", why="PPOTrainer's own loop checkpoints nothing")
        return
    value = config.get(key)
    kind = "full"
    if isinstance(value, Mapping):  # transformers 5.24: {every_n_layers, offload}
        kind = "offload" if config.flag(f"{key}.offload") else "full"
        config.set("kernels.checkpointing", kind, key)
        _every_n_layers(config, f"{key}.every_n_layers")
    else:
        config.set("kernels.checkpointing", "full" if config.flag(key) else "none", key)
    keywords = config.section(f"{key}_kwargs")
    if keywords is not None and config.value("kernels.checkpointing") != "none":
        for name, setting in keywords.values.items():
            path = f"{key}_kwargs.{name}"
            if name == "use_reentrant":
                config.set("kernels.reentrant", config.flag(path), path)
            elif name == "every_n_layers":
                _every_n_layers(config, path)
            elif name == "offload" and config.flag(path):
                config.set("kernels.checkpointing", name, path)
            elif setting and name != "offload":
                config.leave(path, "not counted")


def _every_n_layers(config: Config, path: str) -> None:
    """Which layers are checkpointed; offloaded, all of them."""
    n = config.whole(path) or 1
    if n > 1 and config.value("kernels.checkpointing") == "offload":
        config.leave(path, "every layer is counted as checkpointed")
    elif n > 1:
        config.set("kernels.every_n_layers", n, path)


def adapter(config: Config, is_adapter: bool, dora: bool, *keys: str) -> None:
    """The method, from whether adapters train, and whether the weights under them are quantised."""
    quantised = "method.quantization.format" in config.found
    kind = "dora" if dora else "lora"
    config.set("method.kind", ("q" * quantised + kind) if is_adapter else "full", *keys)


def lower_precision(config: Config, weights: str, casts: str | None, *keys: str) -> None:
    """The dtypes of a run that loads `weights`, and casts to `casts` in the forward pass; None: it does not cast.

    DeepSpeed keeps fp32 master weights instead. FSDP's trainable weights are fp32: accelerate casts them before it
    shards them, unless they are quantised.
    """
    strategy = str(config.value("parallelism.strategy"))
    launched = config.launched.why if config.launched is not None and casts is None else ""
    if config.launched is not None and casts is None:
        casts, keys = str(config.launched.value), ()
    if "precision.master" in config.found:  # DeepSpeed's config says so itself
        return
    values: dict[str, Any] = {"weights": weights}
    why = ""
    if casts and strategy.startswith("zero"):
        values = {"weights": casts, "grads": casts, "master": "fp32"}
        why = "DeepSpeed keeps fp32 master weights"
    elif casts and strategy.startswith("fsdp") and config.value("method.kind") == "full":
        values = {"weights": "fp32", "compute": casts, "autocast": True}
        why = "accelerate makes FSDP's trainable weights fp32"
    elif casts:
        values = {"weights": weights, "compute": casts, "autocast": True}
    for name, value in values.items():
        config.set(f"precision.{name}", value, *keys, why=": ".join(filter(None, (why, launched))))
    if casts == "fp16" and not strategy.startswith("zero"):
        config.set("loop.grad_scaler", True, *keys, why="fp16 gradients are scaled")


def evaluation(config: Config, does: bool, why_key: str, batch_key: str) -> None:
    """Evaluation between steps: the Trainer keeps no logits unless it computes metrics."""
    kind, groups = config.value("trainer") or "sft", "num_generations_eval"
    if does and TRAINERS[kind].completions and config.said(groups) is not None:
        config.leave(groups, "an evaluation with another number of completions of a prompt is not counted yet")
        does = False
    if not does:
        for field in [field for field in config.found if field.startswith("also.evaluation.")]:
            del config.found[field]
        return
    micro = config.whole(batch_key)
    key = batch_key if micro is not None else why_key
    config.set(
        "also.evaluation.micro", micro or config.value("batch.micro"), key, why="" if micro else "as in training"
    )


def packing(config: Config, name: str | None, *keys: str) -> None:
    """Sequences are packed as `name` says; else batches of more than one are padded, as sequences differ in length."""
    if name is not None:
        config.set("batch.packing", name, *keys)
    else:
        padding(config, False)


def padding(config: Config, is_packed: bool) -> None:
    """Batches of more than one sequence are padded, as sequences differ in length."""
    micro = config.value("batch.micro") or 1
    if not is_packed and micro > 1:
        config.set("loop.padded", True, why="assumed: the sequences of a batch differ in length")


def parallelism(config: Config) -> None:
    """Strategy and number of GPUs, from DeepSpeed's and accelerate's files, or those that the file names."""
    launch = config.companions.get("accelerate")
    if launch is not None:
        accelerate(config, launch)
    given = config.companions.get("deepspeed")
    named = config.section("deepspeed")
    if given is not None or named is not None:
        deepspeed(config, given or named)  # pyright: ignore[reportArgumentType] (one is there)
    fsdp_config = config.section("fsdp_config")
    says_fsdp = config.get("fsdp")
    if says_fsdp or fsdp_config is not None:
        words = " ".join(config.names("fsdp") or []) if isinstance(says_fsdp, (str, list)) else ""
        fsdp(config, fsdp_config, 1 if words else 2, words)
    degrees(config)


def degrees(config: Config) -> None:
    """Replicas are the GPUs that the other degrees leave; several of them without a strategy are DDP's."""
    if config.gpus is not None:
        config.set("parallelism.world", config.gpus, why=TYPED)
    model_ranks = 1
    for name in ("tp", "pp", "cp"):
        model_ranks *= config.value(f"parallelism.{name}") or 1
    world = config.value("parallelism.world") or model_ranks
    launch = config.companions.get("accelerate")
    is_launched = launch is not None and "num_processes" not in launch.values
    if (
        world == 1
        and (is_launched or "parallelism.strategy" in config.found)
        and "parallelism.world" not in config.found
    ):
        config.set("parallelism.world", 1, why="assumed: the file does not say how many GPUs; add --gpus")
    if world > 1:
        why = config.found.get("parallelism.world") or next(
            config.found[f"parallelism.{name}"] for name in ("tp", "pp", "cp") if config.value(f"parallelism.{name}")
        )
        config.set("parallelism.world", world, why=why.why)
        config.set("parallelism.dp", max(world // model_ranks, 1), why=why.why)
        if world > model_ranks and "parallelism.strategy" not in config.found:
            config.set("parallelism.strategy", "ddp", why=f"{why.why}: replicas without another strategy")
    key = "ddp_find_unused_parameters"
    if config.value("parallelism.strategy") == "ddp" and config.said(key) is not None:
        config.set("parallelism.find_unused_parameters", config.flag(key), key)


def deepspeed(config: Config, document: Document) -> None:
    """Set the fields of a DeepSpeed config. Raises SpecError with its file and line."""
    try:
        parts = deepspeed_parts(document.values)
    except SpecError as error:
        key = str(error).removeprefix("deepspeed: ").partition(":")[0]
        raise SpecError(f"{document.where(key)}: {error}", error.field) from None
    for field, value in paths(parts):
        config.set(field, value, why=_deepspeed_source(document, field))


def _deepspeed_source(document: Document, field: str) -> str:
    """Return the line of the key that sets a field."""
    name = field.rpartition(".")[2]
    names = {"strategy": "stage", "parameters": "offload_param", "optimizer": "offload_optimizer"}
    names |= {"micro": "train_micro_batch_size_per_gpu", "accumulation": "gradient_accumulation_steps"}
    names |= {"clip_grad_norm": "gradient_clipping", "master": "enabled", "grads": "enabled", "weights": "enabled"}
    wanted = (names.get(name, name), name.removeprefix("stage3_"))
    outer = field.split(".")[-2]
    keys = [path for path in document.lines if path[-1] in wanted and (name != "device" or outer in path)]
    keys = [path for path in keys if outer in path] or keys
    return f"{document.where('.'.join(keys[0]))} {'.'.join(keys[0])}" if keys else document.name


# Whose layers replace linear ones, and which tensors are not counted. Source: accelerate 1.15 accelerator.py
# Accelerator.__init__, utils/modeling.py get_mixed_precision_context_manager, utils/ao.py; torchao 0.18
# float8/float8_linear.py, which keeps inputs and weights as they are.
_FP8_LAYERS = {
    "AO": "torchao: their copies in fp8 for each product are not counted",
    "TE": "Transformer Engine: what they keep in fp8 is not counted",
    "MSAMP": "MS-AMP: their weights and states in 8 bits are not counted",
}
_ANY_FP8_LAYERS = "torchao, Transformer Engine or MS-AMP, the first that is installed: what they take is not counted"


def accelerate(config: Config, document: Document) -> None:
    """Set the fields of an accelerate config: its processes, FSDP or DeepSpeed, and mixed precision."""
    inner = Config(document, "accelerate", {}, {})
    inner.found = config.found
    kind = str(inner.get("distributed_type") or "NO").upper()
    processes = inner.whole("num_processes")
    if kind != "NO" and processes is not None and processes > 0:
        inner.set("parallelism.world", processes, "num_processes")
    word = inner.text("mixed_precision")
    casts = "bf16" if word == "fp8" else word
    if casts in ("bf16", "fp16"):
        config.launched = FieldOrigin("precision", casts, inner.why("mixed_precision"))
    if word == "fp8":
        backend = inner.text("fp8_config.backend") or inner.text("fp8_config.fp8_backend") or ""
        layers = _FP8_LAYERS.get(backend.upper(), _ANY_FP8_LAYERS)
        inner.leave("mixed_precision", f"counted as bf16, in which accelerate computes around the layers of {layers}")
    section = inner.section("deepspeed_config")
    if kind == "DEEPSPEED" and section is not None:
        _accelerate_deepspeed(inner, section)
    elif kind == "FSDP":
        fsdp(inner, inner.section("fsdp_config"), 1, "")
    elif kind not in ("NO", "MULTI_GPU", "DEEPSPEED"):
        raise document.error("distributed_type", f"{shown(kind)} is not supported yet; leave the file out")
    for name in ("tp", "cp"):
        size = inner.whole(f"parallelism_config.parallelism_config_{name}_size")
        if size is not None and size > 1:
            inner.set(f"parallelism.{name}", size, f"parallelism_config.parallelism_config_{name}_size")
    config.unread += inner.unread


def _accelerate_deepspeed(config: Config, section: Document) -> None:
    """Set the fields of accelerate's own DeepSpeed keys, or of the file that it names."""
    name = config.text("deepspeed_config.deepspeed_config_file")
    if name is not None:
        file = config.section("deepspeed_config.deepspeed_config_file")
        if file is not None:
            deepspeed(config, file)
    else:
        stage = config.whole("deepspeed_config.zero_stage")
        stage = 2 if stage is None else stage  # accelerate 1.15 utils/dataclasses.py DeepSpeedPlugin
        zero: dict[str, Any] = {"stage": stage}
        for part in ("optimizer", "param"):
            device = config.text(f"deepspeed_config.offload_{part}_device")
            if device not in (None, "none"):
                zero[f"offload_{part}"] = {"device": device}
        keys = {"zero_optimization": zero}
        accumulation = config.whole("deepspeed_config.gradient_accumulation_steps")
        for field, value in paths(deepspeed_parts(keys)):
            config.set(field, value, why=f"{section.where('zero_stage')} zero_stage")
        if accumulation is not None:
            config.set("batch.accumulation", accumulation, "deepspeed_config.gradient_accumulation_steps")
    if config.value("parallelism.strategy") == "zero3":
        init = config.get("deepspeed_config.zero3_init_flag")
        if init is not None:
            key = "deepspeed_config.zero3_init_flag"
            config.set("parallelism.zero.zero3_init_flag", config.flag(key), key)


def fsdp(config: Config, section: Document | None, version: int, words: str) -> None:
    """Set the fields of FSDP's keys, of which old ones begin with `fsdp_`."""
    key = "fsdp_config" if section is not None else "fsdp"
    inner = Config(section, config.title, {}, {}) if section is not None else None

    def get(name: str) -> Any:
        return (
            None
            if inner is None
            else next((v for n in (name, f"fsdp_{name}") if (v := inner.said(n)) is not None), None)
        )

    said = get("version")
    version = int(said) if str(said) in ("1", "2") else version
    if said is not None and str(said) not in ("1", "2"):
        raise config.error(f"{key}.fsdp_version", f"must be 1 or 2, not {shown(said)}")
    config.set("parallelism.strategy", "fsdp" if version == 1 else "fsdp2", key)
    reshard = get("reshard_after_forward")
    strategy = str(get("sharding_strategy") or (reshard if isinstance(reshard, str) else "") or words).upper()
    strategy = _STRATEGIES.get(strategy, strategy)
    if version == 1:
        if "SHARD_GRAD_OP" in strategy or "ZERO2" in strategy:
            config.set("parallelism.reshard_after_forward", False, key)
        if "NO_SHARD" in strategy:
            config.set("parallelism.shard_group", 1, key)
        elif "HYBRID" in strategy:
            config.set("parallelism.shard_group", _NODE, key, why="a node's GPUs")
        if get("forward_prefetch") in (True, "true"):
            config.set("parallelism.forward_prefetch", True, key)
        prefetch = {"BACKWARD_PRE": "pre", "BACKWARD_POST": "post"}.get(str(get("backward_prefetch")).upper(), "none")
        config.set("parallelism.backward_prefetch", prefetch, key)
    elif str(reshard).lower() in ("false", "shard_grad_op"):
        config.set("parallelism.reshard_after_forward", False, key)
    if str(get("offload_params")).lower() == "true" or str(get("cpu_offload")).lower() == "true" or "offload" in words:
        config.set("parallelism.offload.parameters", True, key)
        config.set("parallelism.offload.optimizer", True, key, why="FSDP steps offloaded parameters on the host")
    if str(get("cpu_ram_efficient_loading")).lower() == "false":
        config.set("parallelism.cpu_ram_efficient_loading", False, key)
    if str(get("activation_checkpointing")).lower() == "true":
        config.set("kernels.checkpointing", "full", key)
    if config.value("method.quantization.format") in ("nf4", "fp4"):
        config.set("method.quantization.storage", "bf16", key, why="FSDP shards floating-point storage")


def set_model(config: Config, name: str | None, *keys: str, why: str = "") -> None:
    """Set the model that a file names, unless one is typed."""
    if name and "model" not in config.options:
        known, by_folder = _by_folder(name)
        config.set("model", known, *keys, why=", ".join(filter(None, (why, by_folder))))


def _by_folder(name: str) -> tuple[str, str]:
    """Return the model that a path's last folder or GGUF file is named after, and why, if it is not here; else the name
    itself."""
    path = name.replace("\\", "/").rstrip("/")
    cached = [folder.rpartition("--")[2] for folder in path.split("/") if folder.startswith("models--")]
    last = (cached or [path.rpartition("/")[2]])[0].replace("___", ".")  # ModelScope's folders have no dots
    file = _GGUF_FILE.fullmatch(last) if last.lower().endswith(".gguf") else None
    last = f"{file[1]}-{file[2]}-GGUF" if file is not None else last
    is_path = path.startswith(("/", ".", "~", "$")) or path[1:2] == ":" or path.count("/") > 1 or path.endswith(".gguf")
    is_address = "://" in path or path.startswith(("hf.co/", "huggingface.co/"))
    if is_path and not is_address and not is_there(expanded(name)):
        with suppress(MemplanError):
            if other_format(last) or is_bundled(last):
                return last, "assumed: by the name of a path that is not here"
    return name, ""


_FORMAT = re.compile(r"--(?:quant-format|stored) ((?:awq|gptq)-\w+|fp8|w4a16|I?Q\d_\w+)|--method (qlora)")
_GGUF_FILE = re.compile(r"(?i)(.+?)[.-](i?q\d_\w+?)(?:-\d+-of-\d+)?\.gguf")  # of one or several parts


def checkpoint(config: Config, name: str, key: str, trains: bool) -> None:
    """The model that a key names. A known one's checkpoint in AWQ, GPTQ, FP8 or bitsandbytes' nf4 is that model in the
    format, unless its own config is cached."""
    name, why = _by_folder(name)
    card, options = other_format(name) or (name, "")
    match = _FORMAT.search(options)
    stored, is_nf4 = match.groups() if match is not None else ("", "")
    format = "nf4" if is_nf4 and trains else stored if stored and not (trains and "-int" not in stored) else ""
    if format:
        with suppress(MemplanError):
            find_config(name)
            format = ""
    if not format:
        config.set("model", name, key, why=why)
        return
    why = why or "by the checkpoint's name"
    config.set("model", card, key, why=why)
    config.set("method.quantization.format" if trains else "serving.weights", format, key, why=why)
    if format == "nf4":
        config.set("method.quantization.double_quant", True, key, why=f"{why}, as Unsloth makes them")


def card_of(family: str, version: str, size: str) -> str | None:
    """Return the card of a model that is named by parts: llama, 3.1, 8b; None if there is none. A size that the family
    has alone is not part of a name: phi-4."""
    names = card_names()
    plain = [f"{family}{dash}{version}-{size}".replace("--", "-") for dash in ("-", "")]
    alone = f"{family}-{version}"
    found = [name for name in plain if name in names]
    found += [name for name in names for start in plain if name.startswith(f"{start}-")]
    return next(iter([*found, *[alone for name in names if name == alone]]), None)


def assume_length(config: Config, key: str) -> None:
    """Samples of any length are counted with the default length."""
    config.set("batch.sequence", Batch().sequence, why=f"assumed: {key} is not set; add --seq-len")


def model_of(config: Config) -> ModelSpec | None:
    """Return the model that the file names; None if memplan does not have it."""
    name = config.value("model")
    try:
        return find_model(name) if name is not None else None
    except MemplanError:
        return None


def towers(model: ModelSpec) -> list[str]:
    """Return the parts of a model that see or hear."""
    return [part for part, key in (("vision", "vision_config"), ("audio", "audio_config")) if model.get(key)]


def frozen(config: Config, tower: str, projector: str, language: str) -> None:
    """The parts that the keys freeze, of a model that sees or hears."""
    model = model_of(config)
    if model is not None and model.has_tower:
        keys = {**dict.fromkeys(towers(model), tower), "projector": projector, "language": language}
        config.set("method.frozen", [part for part, key in keys.items() if config.flag(key)], *keys.values())
