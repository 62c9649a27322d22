"""What to know beside an answer: of the card, of the model's code, of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from memplan.catalogue.degrees import Degrees
from memplan.catalogue.families.kimi_k3 import of_its_own
from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import ambiguous_with
from memplan.catalogue.parallelism.pipeline import ENGINES
from memplan.catalogue.parallelism.sharding import WRAPPED_TWICE
from memplan.catalogue.profiles.profiles import find_profile
from memplan.core.errors import SpecError
from memplan.core.ir import operations
from memplan.models.model import ModelSpec
from memplan.program.graph import Graph, built, elements, weights_of
from memplan.program.sharding.ranks import Ranks, shared_tables
from memplan.program.training.program import Pipe
from memplan.resolve.parallelism import replicas
from memplan.spec.parallelism import Parallelism
from memplan.spec.training import Method, Precision


def dtype_notes(gpu: GPU | None, compute: str) -> Iterator[str]:
    """What to know of a card on which a run computes in some dtype."""
    if gpu is not None and compute == "bf16" and "bf16" not in gpu.native_dtypes:
        yield f"bf16 is not native to {gpu.title}: slow or refused there; fp16 takes the same memory"


def gpu_notes(gpu: GPU, typed: str) -> Iterator[str]:
    """What to know of a card, and of the name it was asked by."""
    others = () if typed == gpu.name else ambiguous_with(typed)
    if others:
        yield f"{typed!r} is taken as {gpu.title}; also: {', '.join(o.name for o in others)}"
    if gpu.driver_basis == "rule":
        yield f"no driver reading of {gpu.title}'s usable memory was found: a conservative rule stands in for it"
    if gpu.vendor != "NVIDIA":
        yield f"kernels are taken as on an NVIDIA card of compute capability 8.0, not measured on {gpu.vendor}"


def wrapping_notes(graph: Graph, ranks: Ranks) -> Iterator[str]:
    """The notes on models that accelerate cannot wrap under FSDP2: it stops with an error, and the answer is of units
    that torch takes.

    Source: accelerate 1.15 utils/fsdp_utils.py fsdp2_prepare_model; torch 2.13 distributed/fsdp/_fully_shard.
    """
    if ranks.strategy != "fsdp2" or ranks.world == 1:
        return
    family = graph.model.model_type
    if shared_tables(graph):
        yield (
            f"accelerate 1.15 cannot wrap {family} for fsdp2: torch refuses a table that modules of two groups share; "
            "counted with all of them in one call of fully_shard"
        )
    if family in WRAPPED_TWICE and ranks.wraps:
        yield (
            f"accelerate 1.15 cannot wrap {family} for fsdp2: it wraps the embeddings and then the table inside them; "
            "counted with the table alone as a unit, as a script of your own can wrap it"
        )


# Packages whose kernels transformers takes in place of its torch code, by what mixes tokens. Source: transformers 5.24
# models/mamba2, models/qwen3_next: use_kernel_func_from_hub_with_fallback.
_KERNELS = {"mamba": "mamba-ssm", "linear_attention": "flash-linear-attention"}


def kernel_notes(model: ModelSpec) -> Iterator[str]:
    """What a model with fused kernels takes is less than what is counted."""
    for package in sorted({_KERNELS[layer.mixer] for layer in model.layers if layer.mixer in _KERNELS}):
        yield (
            f"{model.model_type}: layers without attention are counted as transformers' torch code computes them; with "
            f"{package} and causal-conv1d installed, or their kernels from the hub, their activations take less"
        )
    if model.model_type in ("kimi_k3", "kimi_linear") and of_its_own(model):
        yield (
            "kimi_k3: transformers 5.24 has no class for it. Its own parts (attention residuals, bounded activation "
            "and decay, gates, a narrower space for experts) were read in the modeling_kimi_linear.py published with "
            "its weights. That calls flash-linear-attention and runs routed experts without gradients: that it trains "
            "as transformers' Kimi Linear does, and keeps the same while it generates, is assumed. Nothing of it was "
            "traced"
        )
    if model.model_type == "llama4":
        yield (
            "llama4: transformers 5.24's model for images and text fails as it returns its loss, with images and "
            "without (its decoder's outputs have no image_outputs); counted as if it had them"
        )


def published_code_note(model_type: str) -> str:
    """Of a family whose cache is that of its own code."""
    return (
        f"{model_type}: what it keeps from token to token was read in the code published with its weights, and not "
        "traced, as transformers 5 does not run that code"
    )


def unknown_note(model: ModelSpec, profile: str) -> str:
    """The note on a family that the profile's framework does not have at its version."""
    title = find_profile(profile).title
    return f"{title} has no {model.model_type}: its layers are counted as transformers 5.24 writes them"


def unmasked_note(profile: str) -> str:
    """The note on padded batches that come without an attention mask."""
    title = find_profile(profile).title
    return f"loop.padded changes nothing: {title} gives the model no attention mask for padding"


def checkpoint_notes(config: Mapping[str, Any], method: Method, precision: Precision) -> Iterator[str]:
    """What a config says of a checkpoint that is stored quantised, where the run is traced: dense, or as the run
    quantises it. Raises SpecError where it does not train so."""
    stored: Any = config.get("quantization_config")
    if not isinstance(stored, Mapping) or not stored:
        return
    how = str(cast(Mapping[str, object], stored).get("quant_method", "?"))
    if how in ("fp8", "mxfp4", "compressed-tensors"):
        yield f"the checkpoint is stored in {how}, and is taken as dequantised in {precision.weights}"
    elif how != "bitsandbytes":
        raise SpecError(f"quantization_config: a checkpoint of {how:.40} is not supported yet", "model")
    elif method.quantization is None:
        raise SpecError("quantization_config: the checkpoint is quantised by bitsandbytes; use qlora or qdora", "model")


def norm_notes(graph: Graph) -> Iterator[str]:
    """A layer norm whose weights are in another dtype than the first hidden states: a card refuses it without autocast.

    Source: torch 2.13 aten/src/ATen/native/cuda/layer_norm_kernel.cu, which takes weights in the dtype of their input.
    """
    stack, _ = built(graph)
    some = [(op, w) for op in operations(stack) for w in op.weights if w.dtype.startswith(("fp", "bf"))]
    norms = {w.dtype for op, w in some if op.source.endswith("native_layer_norm")}
    embeddings = {w.dtype for _, w in some if w.group == "embedding"}
    if not graph.recipe.autocast and graph.recipe.quantization and norms and not norms & embeddings:
        yield (
            f"embeddings are in {' and '.join(sorted(embeddings))} and the layer norms after them in "
            f"{' and '.join(sorted(norms))}: torch refuses that on a card without autocast"
        )


def expert_notes(graph: Graph, capability: tuple[int, int] | None) -> Iterator[str]:
    """How much of a mixture of experts bitsandbytes quantises: linear layers alone, and experts are parameters. Before
    compute capability 8.0 torch has no grouped product.

    Source: transformers 5.24 integrations/moe.py _can_use_grouped_mm, _grouped_mm_fallback_setup_context.
    """
    _, axes = built(graph)
    weights = [(w, elements(w, axes) * n) for w, n, _ in weights_of(graph) if w.group not in ("adapter", "buffer")]
    left = {w.dtype for w, _ in weights if w.chosen and not w.stored}
    frozen = any(w.stacked and not w.trains for w, _ in weights)
    if frozen and capability is not None and capability < (8, 0):
        yield (
            "before compute capability 8.0 transformers multiplies experts in a loop of its own, which keeps their "
            "rows and makes gradients of matrices that are frozen: that is not counted"
        )
    ranks = graph.degrees.ep
    if ranks > 1 and graph.degrees.imbalance == 1000 and graph.model.model_type != "megatron_gpt":
        yield (
            f"tokens are counted as spread evenly over {ranks} ranks' experts; one that is sent more holds more rows: "
            f"parallelism.expert_imbalance says how many times the mean, up to {ranks}"
        )
    if graph.recipe.quantization and left and graph.recipe.running is None:
        share = 100 * sum(n for w, n in weights if w.stored) / sum(n for _, n in weights)
        yield (
            f"{share:.1f}% of the parameters are quantised: experts are no linear layers in transformers 5, and "
            f"bitsandbytes leaves them in {' and '.join(sorted(left))}"
        )


def pipeline_notes(degrees: Degrees, pipe: Pipe, asked: Parallelism) -> Iterator[str]:
    """What runs a pipeline, and GPUs that it leaves empty."""
    if not pipe.engine:
        return
    engine = ENGINES[pipe.engine]
    if not engine.moves:
        yield f"pipeline: {pipe.schedule} of {pipe.microbatches} microbatches by {engine.title}"
        if asked.strategy == "fsdp2" and replicas(asked) > 1:
            yield "fsdp2 in stages: weights stay whole for a step, and gradients are summed whole until its end"
        if asked.strategy == "zero1" and engine.buffers:
            yield "zero1 in stages: passes and buffers are counted as torch runs them, not DeepSpeed's PipelineModule"
        return
    yield "device_map: one process, one GPU at a time; say schedule 1f1b for a pipeline of torch.distributed.pipelining"
    if degrees.pp < asked.pp:
        yield f"device_map: layers are on {degrees.pp} GPUs, and {asked.pp - degrees.pp} stay empty"
