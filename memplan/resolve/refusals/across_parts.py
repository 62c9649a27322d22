"""Settings of a run that contradict each other across its parts, whatever the model."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.kernels.wiring import GENERATING
from memplan.catalogue.profiles.profiles import library_behaviour
from memplan.core.errors import SpecError, refused
from memplan.resolve.refusals.parallelism import ONE_GPU, offloaded_parameters, parallelism
from memplan.resolve.refusals.refuse import not_yet
from memplan.spec.parallelism import Parallelism
from memplan.spec.run import RunSpec, is_default


def contradictions(run: RunSpec) -> Iterator[SpecError]:
    """Yield errors for settings that contradict each other across the parts of a run."""
    generates = run.task == "train" and run.trainer in GENERATING
    if run.batch.packing and run.task != "train":
        yield refused("batch.packing", "only applies to training")
    if run.batch.lengths and run.task != "train":
        yield refused("batch.lengths", f"only applies to training, not to task {run.task}")
    if run.batch.batching and not run.batch.lengths:
        yield refused("batch.batching", "only applies with batch.lengths")
    if run.batch.generations and not generates:
        yield refused("batch.generations", f"only applies to trainers that generate: {', '.join(GENERATING)}")
    if run.batch.scored and not (generates and run.trainer in ("grpo", "rloo")):
        yield refused("batch.scored", "only applies to trainers that score completions before a step: grpo, rloo")
    if run.loop.entropy_bonus and not (generates and run.trainer == "grpo"):
        yield refused("loop.entropy_bonus", "only applies to trainer grpo")
    if run.task != "generate":
        if run.batch.new_tokens and not generates:
            yield refused("batch.new_tokens", "only task generate makes new tokens")
        if not is_default(run, "generation"):
            yield refused("generation", "only applies to task generate")
    for part in ("also", "roles") if run.task != "train" else ():
        if not is_default(run, part):
            yield refused(part, f"only applies to training, not to task {run.task}")
    if run.serving.cache_dtype is not None and run.rollout != "colocate":
        yield refused(
            "serving.cache_dtype",
            f"only applies to serving engines (vllm, sglang, tgi, llama.cpp); with {run.profile} use "
            "generation.cache_implementation quantized, and cache_config.backend quanto, hqq or fp8",
        )
    if run.rollout != "transformers" and not generates:
        yield refused("rollout", f"only applies to trainers that generate: {', '.join(GENERATING)}")
    if not is_default(run, "serving") and run.rollout != "colocate":
        hint = "; --seq-len sets the tokens" if run.serving.max_model_len is not None else ""
        hint += "; --rank sets that of an adapter that trains" if run.serving.lora_rank is not None else ""
        engines = "profiles of engines are vllm, sglang, tgi and llama.cpp"
        hint += "; for vLLM on the same GPU use --rollout colocate" if generates else f"; {engines}"
        yield refused("serving", f"only applies to serving engines, not {run.profile}{hint}")
    if not is_default(run, "parallelism"):
        yield from parallelism(run.parallelism)
        yield from offloaded_parameters(run)
    if run.parallelism.device_map is not None and run.task == "train":
        yield refused(
            "parallelism.device_map",
            "only applies to tasks forward and generate; to train, set pp (--pp) with a transformers profile",
        )


def refuse_unless_training(run: RunSpec, what: str) -> None:
    """Raise SpecError if the run does not train and `what` is only supported in training."""
    if run.task != "train":
        raise refused("task", f"{what} of task {run.task} is not supported yet; supported: train")


def training_settings(run: RunSpec) -> Iterator[SpecError]:
    """Yield errors for training settings of a run that does not train, and for what is not supported yet."""
    task, method, loop = run.task, run.method, run.loop
    yield from _inference_parallelism(run.parallelism, task)
    if run.generation.assisted and run.parallelism != ONE_GPU:
        field = "parallelism.tp" if run.parallelism.tp > 1 else "parallelism.device_map"
        yield refused(field, "is not supported yet with an assistant; supported: one GPU")
    if method.kind == "freeze" or method.frozen or method.modules_to_save:
        field = "kind" if method.kind == "freeze" else "frozen" if method.frozen else "modules_to_save"
        yield refused(f"method.{field}", f"only applies to training, not to task {task}")
    for field in ("grads", "master"):
        if getattr(run.precision, field) is not None:
            yield refused(f"precision.{field}", f"only applies to training, not to task {task}")
    if run.batch.accumulation > 1:
        yield refused("batch.accumulation", f"only applies to training, not to task {task}")
    if run.kernels.checkpointing not in (None, "none") or run.kernels.reentrant:
        yield refused("kernels.checkpointing", f"task {task} has no backward pass")
    if run.kernels.loss not in (None, library_behaviour(run.profile, "", False).defaults.kernels_loss):
        yield refused("kernels.loss", f"task {task} has no loss")
    for field in ("fused", "packages"):
        if getattr(run.kernels, field):
            yield not_yet(f"kernels.{field}", ", ".join(getattr(run.kernels, field)), f"none with task {task}")
    if task == "generate" and loop.use_cache is False:
        yield not_yet("loop.use_cache", False, "true with task generate")
    for field in ("hold_outputs", "grad_scaler", "trainer"):
        if getattr(loop, field):
            yield refused(f"loop.{field}", f"only applies to training, not to task {task}")


def _inference_parallelism(p: Parallelism, task: str) -> Iterator[SpecError]:
    """Yield errors for GPUs that divide anything other than matrices or layers."""
    for field in ("dp", "cp", "ep"):
        if getattr(p, field) > 1:
            yield not_yet(
                f"parallelism.{field}", getattr(p, field), f"tp (--tp) or a device_map (--device-map) with task {task}"
            )
    if p.tp > 1 and p.device_map is not None:
        yield refused(
            "parallelism.device_map",
            f"{p.device_map} runs one process, but tp {p.tp} needs several; set only one of them",
        )
    if p.tp > 1 and p.pp > 1:
        yield refused(
            "parallelism.pp",
            f"pp {p.pp} runs one process with a device_map, but tp {p.tp} needs several; set only one of them",
        )
    if p.schedule not in (None, "device_map"):
        yield refused(
            "parallelism.schedule",
            f"{p.schedule} only applies to training; task {task} places layers with a device_map",
        )
    for field in ("virtual_stages", "first_stage_layers", "last_stage_layers", "ends_as_layers", "strategy", "offload"):
        if getattr(p, field) != getattr(ONE_GPU, field):
            yield refused(f"parallelism.{field}", f"only applies to training, not to task {task}")
