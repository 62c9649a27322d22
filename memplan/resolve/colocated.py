"""A vLLM engine on the GPU that trains, which generates for TRL's trainers: its share of the GPU.

The engine loads the model a second time, unless the policy is made of its weights. With sleep mode its weights and its
cache only exist while it generates; CUDA graphs stay.

Source: trl 1.16.0 generation/vllm_generation.py _init_vllm, generate; vllm 0.33.0 v1/worker/gpu_worker.py sleep.
"""

from __future__ import annotations

from functools import lru_cache

from memplan.catalogue.profiles.profiles import library_behaviour
from memplan.core.errors import refused
from memplan.models.model import ModelSpec
from memplan.program.graph import TensorGroup, tensor_group
from memplan.program.serving.budget import Budget, budget
from memplan.program.serving.settings import Settings
from memplan.resolve.serving import resolve_serving
from memplan.spec.generation import InlineModel
from memplan.spec.run import Batch, RunSpec
from memplan.spec.serving import Serving

ENGINE = "vllm-0.33"
_SOURCE = "trl 1.16.0 generation/vllm_generation.py _init_vllm"
_STEP_TOKENS = 4096  # _SOURCE


def colocated_settings(run: RunSpec, gpu: str | None, batch: Batch, model: ModelSpec) -> Settings:
    """Return the settings of the engine. `batch` is the run's, filled in.

    Raises SpecError without a GPU, and as `resolve_serving` does.
    """
    if gpu is None:
        raise refused("rollout", "colocate: vLLM takes a share of the GPU; name one (--gpu)")
    s, world = run.serving, run.parallelism.world
    ranks = s.tensor_parallel or 1
    if world % ranks:
        raise refused("serving.tensor_parallel", f"{ranks} does not divide the GPUs that train, {world}; set --gpus")
    requests, own = batch.micro * batch.accumulation * ranks, library_behaviour(run.profile, "", False).generation
    serving = {
        "memory_utilization": s.memory_utilization or own.engine_share,
        "max_num_seqs": s.max_num_seqs or requests,
        "max_num_batched_tokens": s.max_num_batched_tokens or _STEP_TOKENS,
        "max_model_len": s.max_model_len or (batch.tokens if own.engine_is_short else None),
        **dict.fromkeys(("sleep", "tensor_parallel", "trainer_offload")),
    }
    quantization = run.method.quantization  # bitsandbytes' 4 bits, in vLLM too
    form = None if quantization is None else quantization.format
    fixed = run.model, model, gpu, form, s.model_copy(update=serving), requests, ranks
    settings = _settings(*fixed)
    if settings.draft is not None or settings.longest < batch.tokens:
        settings = _settings(*fixed, batch.sequence, batch.new_tokens)
    return settings._replace(context=batch.tokens, prompt=batch.sequence)


def colocated_budget(s: Settings) -> Budget:
    """Return how the engine divides its share of the GPU."""
    return budget(s, s.gpu.usable if s.gpu else None)


def at_lengths(b: Budget, s: Settings) -> Budget | None:
    """Return a budget at the settings of other lengths, or None if these decide more of it than what requests need."""
    is_alike = s == b.settings._replace(context=s.context, prompt=s.prompt)
    return b._replace(settings=s) if is_alike and s.serving.max_model_len is not None else None


@lru_cache(maxsize=256)
def _settings(
    name: str | InlineModel,
    model: ModelSpec,
    gpu: str,
    quantization: str | None,
    serving: Serving,
    requests: int,
    ranks: int,
    sequence: int = 1,
    new_tokens: int = 1,
) -> Settings:
    run = RunSpec(
        model=name,
        task="generate",
        profile=ENGINE,
        gpu=gpu,
        method={"quantization": None if quantization is None else {"format": quantization}},
        batch={"micro": requests, "sequence": sequence, "new_tokens": new_tokens},
        serving=serving,
        parallelism={"world": ranks, "tp": ranks},
    )
    return resolve_serving(run, model)


def awake(b: Budget, profile: str) -> tuple[TensorGroup, ...]:
    """Return what the engine holds only while it is awake, with sleep mode: its cache, and weights of its own."""
    weights = tensor_group("parameter", "vLLM's weights", b.parameters, "uint8", _SOURCE)
    cache = tensor_group("buffer", "vLLM's KV cache", b.pool.bytes, "uint8", _SOURCE)
    return (cache,) if library_behaviour(profile, "", False).generation.shares_weights else (cache, weights)


def asleep(b: Budget) -> tuple[TensorGroup, ...]:
    """Return what the engine holds throughout."""
    graphs = b.graphs.usual
    return (tensor_group("other", "vLLM's CUDA graphs", graphs, "uint8", b.graphs.source),) if graphs else ()
