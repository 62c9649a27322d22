"""torchtitan's TOML files, which it had until 0.2.

Source: torchtitan 0.2.2 config/job_config.py, models/*/__init__.py, distributed/utils.py maybe_enable_amp, train.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from memplan.frameworks.reading import trainer
from memplan.frameworks.reading.config import Config, Rule, shown

# Model and flavor -> the card of the same shape.
_CARDS = {
    "llama3 8B": "llama-3.1-8b",
    "llama3 70B": "llama-3.1-70b",
    "llama3 405B": "llama-3.1-405b",
    "llama4 17bx16e": "llama-4-scout",
    "llama4 17bx128e": "llama-4-maverick",
    "deepseek_v3 16B": "deepseek-v2-lite",
    "deepseek_v3 236B": "deepseek-v2",
    "deepseek_v3 671B": "deepseek-v3",
    "gpt_oss 20b": "gpt-oss-20b",
    "gpt_oss 120b": "gpt-oss-120b",
    **{f"qwen3 {size}": f"qwen3-{size.lower()}" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")},
    "qwen3 30B-A3B": "qwen3-30b-a3b",
    "qwen3 235B-A22B": "qwen3-235b-a22b",
}
_DEGREES = {"tp": "tensor", "pp": "pipeline", "cp": "context", "ep": "expert"}


def _model(config: Config) -> None:
    config.set("method.kind", "full", why=f"{config.title} has no adapters")
    if config.text("model.name") is None:
        return
    name = f"{config.text('model.name')} {config.text('model.flavor')}"
    if name not in _CARDS and "model" not in config.options:
        text = f"{name} is not known here; write memplan MODEL --spec {config.document.name}"
        raise config.error("model.flavor", text)
    trainer.set_model(config, _CARDS.get(name), "model.name", "model.flavor")
    if config.names("model.converters"):
        config.leave("model.converters", "quantised training is not counted")


def _kernels(config: Config) -> None:
    key, option = "activation_checkpoint.mode", "activation_checkpoint.selective_ac_option"
    mode = config.word(key, "none", "selective", "full")
    if mode == "selective" and config.get(option) != "op":
        n = config.whole(option) or 1
        mode = "full" if n == 1 or (config.whole("parallelism.pipeline_parallel_degree") or 1) == 1 else "none"
        if mode == "none":
            config.leave(key, f"every {n} layers of a pipeline's stage: counted as none, which takes more")
        elif n > 1:
            config.set("kernels.every_n_layers", n, option)
    config.set("kernels.checkpointing", mode or "none", key)
    name = config.text("optimizer.name") or "AdamW"
    if name not in ("AdamW", "Adam"):
        raise config.error("optimizer.name", f"{shown(name)} is not supported yet; supported: AdamW, Adam")
    config.set("optimizer.name", "adamw_torch_fused", "optimizer.name")
    if config.flag("compile.enable"):
        config.set("kernels.compile", True, "compile.enable")
    if config.flag("validation.enable"):
        config.leave("validation.enable", "not counted")


def _parallelism(config: Config) -> None:
    """The GPUs that the degrees leave shard the weights; how many there are, the file does not say."""
    least = 1
    for field, name in _DEGREES.items():
        key = f"parallelism.{name}_parallel_degree"
        degree = config.whole(key) or 1
        if degree > 1:
            config.set(f"parallelism.{field}", degree, key)
        least = max(least, degree) if field == "ep" else least * degree
    shards, replicas = (
        config.whole(f"parallelism.data_parallel_{kind}_degree") or 1 for kind in ("shard", "replicate")
    )
    launch = config.companions.get("accelerate")
    said = launch.values.get("num_processes") if launch is not None else None
    world = said if isinstance(said, int) else max(least, replicas) * max(shards, 1) if shards > 1 else least
    if world > 1 or config.gpus is not None:
        why = "assumed: the fewest GPUs that the degrees need; add --gpus" if said is None else "the launcher"
        config.set("parallelism.world", config.gpus or world, why=why)
        config.set("parallelism.strategy", "ddp" if shards == 1 and replicas > 1 else "fsdp2", "parallelism")
    if config.get("parallelism.fsdp_reshard_after_forward") == "never":
        config.set("parallelism.reshard_after_forward", False, "parallelism.fsdp_reshard_after_forward")
    if (config.whole("parallelism.expert_tensor_parallel_degree") or 1) > 1:
        config.leave("parallelism.expert_tensor_parallel_degree", "not counted")
    if config.flag("training.enable_cpu_offload"):
        for part in ("parameters", "optimizer"):
            config.set(f"parallelism.offload.{part}", True, "training.enable_cpu_offload")
    trainer.degrees(config)


def _precision(config: Config) -> None:
    weights = trainer.DTYPES[config.word("training.dtype", "float32", "bfloat16") or "float32"]
    key = "training.mixed_precision_param"
    casts = trainer.DTYPES[config.word(key, "float32", "bfloat16") or "bfloat16"]
    config.set("precision.weights", weights, "training.dtype")
    if casts != weights:
        config.set("precision.compute", casts, key)
        config.set("precision.autocast", True, key)


RULES: Mapping[str, tuple[Rule, ...]] = {
    "torchtitan": (_model, _kernels, _parallelism, _precision),
}
