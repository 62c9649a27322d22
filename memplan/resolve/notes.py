"""Notes that accompany an answer: on the model's code, the checkpoint, the experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from memplan.catalogue.degrees import Degrees
from memplan.catalogue.kernels.packing import SAMPLE_TOKENS
from memplan.catalogue.parallelism.pipeline import ENGINES, group_size
from memplan.catalogue.profiles.profiles import find_profile
from memplan.core.errors import SpecError
from memplan.core.ir import operations
from memplan.models.model import ModelSpec
from memplan.program.graph import Graph, operations_of, weights_of
from memplan.program.sharding.ranks import Ranks
from memplan.program.stack_facts import shared_tables
from memplan.program.structure import Pipe
from memplan.program.weight_sizes import elements
from memplan.resolve.parallelism import replicas
from memplan.spec.parallelism import Parallelism
from memplan.spec.training import Method, Precision

# Families whose default list of blocks for FSDP has classes that they do not: one of these, and the others.
# Source: transformers 5.24 PreTrainedModel._no_split_modules; accelerate 1.15 dataclasses.py set_auto_wrap_policy.
_CLIP = ("CLIPTextEmbeddings", "CLIPEncoderLayer, CLIPVisionEmbeddings and the decoder's layer")
_SIGLIP, _SIGLIP2 = (tuple(name.replace("CLIP", tower) for name in _CLIP) for tower in ("Siglip", "Siglip2"))
ABSENT_BLOCKS = {
    **dict.fromkeys(("llava", "llava_next", "llava_next_video"), _CLIP),
    **dict.fromkeys(("aya_vision", "cohere2_vision", "gemma3", "llava_onevision", "paligemma"), _SIGLIP),
    "lfm2_vl": _SIGLIP2,
    "minimax_m3_vl_text": ("MiniMaxM3VLVisionEncoderLayer", "MiniMaxM3VLDecoderLayer"),
    "qwen3_5_moe_text": ("Qwen3_5MoeVisionBlock", "Qwen3_5MoeDecoderLayer"),
    "qwen3_5_text": ("Qwen3_5VisionBlock", "Qwen3_5DecoderLayer"),
    "roberta-prelayernorm": ("RobertaPreLayerNormCrossAttention", "RobertaPreLayerNormLayer"),
}


def wrapping_notes(graph: Graph, ranks: Ranks) -> Iterator[str]:
    """Yield notes on models that accelerate does not wrap for FSDP as it is configured by default, or not at all.

    Those that it cannot wrap for FSDP2 are counted with units that torch accepts.

    Source: accelerate 1.15 utils/fsdp_utils.py fsdp2_prepare_model; torch 2.13 distributed/fsdp/_fully_shard.
    """
    family = graph.model.model_type
    if ranks.strategy in ("fsdp", "fsdp2") and ranks.wraps and family in ABSENT_BLOCKS:
        absent, blocks = ABSENT_BLOCKS[family]
        yield (
            f"accelerate fails to wrap {family} for {ranks.strategy}, whose list of blocks has {absent}, unless "
            f"fsdp_transformer_layer_cls_to_wrap names {blocks}"
        )
    if ranks.strategy != "fsdp2" or ranks.world == 1:
        return
    if shared_tables(graph):
        yield (
            f"accelerate 1.15 cannot wrap {family} for fsdp2: torch rejects a table shared by modules of two groups; "
            "counted with all of them in one fully_shard call"
        )
    if graph.model.family.parallel.wraps_twice and ranks.wraps:
        yield (
            f"accelerate 1.15 cannot wrap {family} for fsdp2: it wraps the embeddings and then the table inside them; "
            "counted with only the table as a unit, as your own script could wrap it"
        )


# Packages whose kernels transformers uses instead of its torch code, by token mixer.
# Source: transformers 5.24 models/mamba2, models/qwen3_next: use_kernel_func_from_hub_with_fallback.
_KERNELS = {"mamba": "mamba-ssm", "linear_attention": "flash-linear-attention"}


def kernel_notes(model: ModelSpec, packages: tuple[str, ...], trains: bool) -> Iterator[str]:
    """Yield notes on models whose code runs differently from what is counted, given the `packages` that are."""
    known = ",".join(model.family.training.packages) if trains else ""
    hint = f"; --packages {known} counts them" if known else ""
    mixers = {_KERNELS[layer.mixer] for layer in model.layers if layer.mixer in _KERNELS and not packages}
    for package in sorted(mixers):
        yield (
            f"{model.model_type}: layers without attention are counted with transformers' torch code; with {package} "
            f"and causal-conv1d installed, or their kernels from the Hub, their activations take less{hint}"
        )
    note = model.family.note(model) if model.family.note is not None else ""
    if note:
        yield note


def published_code_note(model_type: str) -> str:
    """Return the note on a family whose cache is implemented by the code published with its weights."""
    return (
        f"{model_type}: its cache follows the code published with its weights, which transformers 5 does not run; it "
        "was not traced"
    )


def unknown_note(model: ModelSpec, profile: str) -> str:
    """Return the note on a family that the profile's framework does not have in its version."""
    title = find_profile(profile).title
    return f"{title} has no {model.model_type}: counted with the layers of transformers 5.24"


def unmasked_note(profile: str) -> str:
    """Return the note on padded batches that come without an attention mask."""
    title = find_profile(profile).title
    return f"loop.padded changes nothing: {title} passes no attention mask for padding"


SAMPLES_NOTE = (
    f"packing: samples are assumed to have {SAMPLE_TOKENS} tokens on average, on which a scratch of backward depends"
)


def unseparated_note(model: ModelSpec) -> str:
    """Return the note on a family whose attention to packed rows was not read."""
    return f"packing: what separates the sequences of a row in {model.model_type} is not counted yet"


def checkpoint_notes(config: Mapping[str, Any], method: Method, precision: Precision) -> Iterator[str]:
    """Yield notes on how a traced run loads a quantised checkpoint: dequantised, or as the run quantises it.

    Raises SpecError if it cannot be trained that way.
    """
    stored: Any = config.get("quantization_config")
    if not isinstance(stored, Mapping) or not stored:
        return
    how = str(cast(Mapping[str, object], stored).get("quant_method", "?"))
    if how in ("fp8", "mxfp4", "compressed-tensors"):
        yield f"the checkpoint is stored in {how}, and is traced dequantised to {precision.weights}"
    elif how != "bitsandbytes":
        raise SpecError(f"quantization_config: {how:.40} checkpoints are not supported yet", "model")
    elif method.quantization is None:
        raise SpecError("quantization_config: the checkpoint is quantised by bitsandbytes; use qlora or qdora", "model")


def norm_notes(graph: Graph) -> Iterator[str]:
    """Yield a note if layer norms have another dtype than the hidden states, which a GPU rejects without autocast.

    Source: torch 2.13 aten/src/ATen/native/cuda/layer_norm_kernel.cu, which takes weights in the dtype of their input.
    """
    if graph.recipe.autocast or not graph.recipe.quantization:
        return
    stack, _ = operations_of(graph)
    floats = [(op, w) for op in operations(stack) for w in op.weights if w.dtype.startswith(("fp", "bf"))]
    norms = {w.dtype for op, w in floats if op.source.endswith("native_layer_norm")}
    embeddings = {w.dtype for _, w in floats if w.group == "embedding"}
    if norms and not norms & embeddings:
        yield (
            f"embeddings are in {' and '.join(sorted(embeddings))} and the layer norms after them in "
            f"{' and '.join(sorted(norms))}: on a GPU torch rejects that without autocast"
        )


def expert_notes(graph: Graph, capability: tuple[int, int] | None) -> Iterator[str]:
    """Yield notes on a mixture of experts: its old-GPU fallback, its balance, how much of it bitsandbytes quantises.

    bitsandbytes only quantises linear layers, and experts are parameters. Torch's grouped matrix product needs compute
    capability 8.0.

    Source: transformers 5.24 integrations/moe.py _can_use_grouped_mm, _grouped_mm_fallback_setup_context.
    """
    weights = [(w, n) for w, n, _ in weights_of(graph) if w.group not in ("adapter", "buffer")]
    unquantised = {w.dtype for w, _ in weights if w.chosen and not w.stored}
    frozen = any(w.stacked and not w.trains for w, _ in weights)
    if frozen and capability is not None and capability < (8, 0):
        yield (
            "below compute capability 8.0 transformers multiplies experts in a fallback loop, which keeps their rows "
            "and computes gradients even of frozen matrices: not counted"
        )
    ranks = graph.degrees.ep
    if ranks > 1 and graph.degrees.imbalance == 1000 and not graph.model.is_megatron:
        yield (
            f"tokens are assumed to spread evenly over the experts of {ranks} ranks; a rank that receives more needs "
            f"more memory: set parallelism.expert_imbalance to the multiple of the mean, up to {ranks}"
        )
    r = graph.recipe
    if r.quantization and unquantised and r.running is None and not r.experts:
        _, axes = operations_of(graph)
        numbers = [(elements(w, axes) * n, bool(w.stored)) for w, n in weights]
        share = 100 * sum(n for n, is_stored in numbers if is_stored) / sum(n for n, _ in numbers)
        yield (
            f"{share:.1f}% of the parameters are quantised: experts are not linear layers in transformers 5, so "
            f"bitsandbytes leaves them in {' and '.join(sorted(unquantised))}; --quantize-experts counts them "
            "quantised, as Axolotl's quantize_moe_experts does"
        )


def pipeline_notes(degrees: Degrees, pipe: Pipe, asked: Parallelism) -> Iterator[str]:
    """Yield notes on what runs the pipeline, and on GPUs that it leaves empty."""
    if not pipe.engine:
        return
    engine = ENGINES[pipe.engine]
    if not engine.moves_tensors:
        yield f"pipeline: {pipe.schedule} with {pipe.microbatches} microbatches, run by {engine.title}"
        if engine.needs_equal_stages and degrees.virtual_stages > 1 and pipe.microbatches % degrees.pp:
            group = group_size(degrees.pp, pipe.microbatches)
            yield f"counted with Megatron-core's --microbatch-group-size-per-virtual-pipeline-stage {group}"
        if asked.strategy == "fsdp2" and replicas(asked) > 1:
            yield "fsdp2 with pipeline stages: weights stay gathered and gradients unsharded until the end of the step"
        if asked.strategy == "zero1" and engine.buffers:
            yield "zero1 with pipeline stages: counted as torch runs passes and buffers, not DeepSpeed's PipelineModule"
        return
    yield "device_map: one process, one GPU at a time; for torch.distributed.pipelining use schedule 1f1b"
    if degrees.pp < asked.pp:
        yield f"device_map: layers are placed on {degrees.pp} GPUs; {asked.pp - degrees.pp} stay empty"
