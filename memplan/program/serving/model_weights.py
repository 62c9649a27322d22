"""Weights on one rank of a serving engine: its part of every matrix, rotary tables, adapter slots, runner buffers.

Source: vllm 0.33.0 model_executor/layers/linear.py and vocab_parallel_embedding.py, whose classes SGLang and TGI took.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from memplan.catalogue.quantization.engine_repacking import Mxfp4Kernel, mxfp4_kernel
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE
from memplan.models.model import ModelSpec
from memplan.program.serving.adapters import slot
from memplan.program.serving.images import profiled_items
from memplan.program.serving.rank_share import bytes_on_rank, is_on_stage
from memplan.program.serving.settings import Settings
from memplan.program.stored.quantization_config import FIELD
from memplan.program.stored.weights import StoredWeight, stored_weights

SLOTS = "adapter"  # the group of the slots for adapters
TABLE = "table"  # the group of the runner's buffers for requests
MXFP4_GROUP = 32  # numbers that share a scale


class WeightGroup(NamedTuple):
    """Weights of one kind on a rank.

    what     name in the report
    group    part of the model they belong to
    tensors  number of tensors
    dtype    dtype of the tensors
    bytes    bytes of all tensors
    source   where the size was read
    basis    derived, measured or assumed
    """

    what: str
    group: str
    tensors: int
    dtype: str
    bytes: int
    source: str
    basis: str = "derived"


def model_weights(s: Settings) -> tuple[WeightGroup, ...]:
    """Return the model's weights on one GPU by group and dtype, and the buffers that its runner makes for requests."""
    matrices = _matrices(s._replace(context=0, prompt=0, batch=0))  # cached for all requests
    return (*matrices, *_rotary_tables(s), *_adapters(s), *_runner(s))


@lru_cache(maxsize=256)
def _matrices(s: Settings) -> tuple[WeightGroup, ...]:
    """Return the model's own tensors."""
    groups: dict[tuple[str, str, str, str], list[int]] = {}
    kernel = kernel_of(s)
    for w in stored_weights(s.model, s.quantization, s.dtype):
        if not is_on_stage(s, w):
            continue
        bytes_, source = w.bytes if s.engine.kind == "llama.cpp" else bytes_on_rank(s, w), w.source
        if kernel is not None and ".experts." in w.name:
            bytes_, source = _repacked(s, kernel, w), kernel.source
        entry = groups.setdefault((w.group, w.dtype, source, w.basis), [0, 0])
        entry[0] += 1
        entry[1] += bytes_
    return tuple(
        WeightGroup(_NAMES.get(group, group), group, count, dtype, bytes_, source, basis)
        for (group, dtype, source, basis), (count, bytes_) in groups.items()
    )


_NAMES = {"embedding": "embeddings", "norm": "norms", "lm_head": "head", "router": "routers"}


def kernel_of(s: Settings) -> Mxfp4Kernel | None:
    """Return the kernel of the model's experts if they are in mxfp4, else None."""
    q = s.quantization
    config: Mapping[str, Any] = s.model.config.get(FIELD) or {}
    format_ = q if isinstance(q, str) else q.format if q is not None else str(config.get("quant_method"))
    if format_.lower() != "mxfp4" or not s.model.family.checkpoint.runs_mxfp4:
        return None
    return mxfp4_kernel(s.engine.name, s.gpu.compute_capability if s.gpu else None)


def _repacked(s: Settings, kernel: Mxfp4Kernel, w: StoredWeight) -> int:
    """Return a rank's bytes of one tensor of a layer's experts, padded for the kernel: codes, scales or biases."""
    axes = s.model.axes()
    blocks = -(-axes["m"] // (MXFP4_GROUP * s.ranks.etp))  # a rank has whole blocks of 32 numbers
    width, hidden = _rounded_up(blocks * MXFP4_GROUP, kernel.width), _rounded_up(axes["h"], kernel.hidden)
    out, into = (2 * width, hidden) if "gate_up" in w.name else (hidden, width)
    experts = -(-axes["E"] // s.ranks.ep)
    if w.name.endswith("bias"):
        return experts * out * ITEMSIZE[kernel.bias]
    if w.part.endswith(("scale", "scales")):
        return experts * _rounded_up(out, kernel.rows) * _rounded_up(into // MXFP4_GROUP, kernel.columns)
    return experts * out * into // 2


def _rounded_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _rotary_tables(s: Settings) -> Iterator[WeightGroup]:
    """Yield the cosines and sines of every position, in one table for all layers with the same rotary parameters."""
    if s.engine.kind == "llama.cpp" or not s.model.family.attention.rotary or not s.model.max_position_embeddings:
        return
    axes = s.model.axes()
    if "rc" in axes:
        kinds = len({layer.sliding for layer in s.model.layers})
        source = "vllm 0.33.0 model_executor/layers/rotary_embedding/deepseek_scaling_rope.py DeepseekV4..., rope.py"
        bytes_ = kinds * s.model.max_position_embeddings * axes["rot"] * ITEMSIZE["fp32"]
        yield WeightGroup("cosines and sines of positions", "buffer", kinds, "fp32", bytes_, source)
        return
    width = axes["klr"] - axes["kl"] if "kl" in axes else s.model.rotary_width
    tables = tuple(_rotary_rows(s.model))
    source = "vllm 0.33.0 model_executor/layers/rotary_embedding/base.py RotaryEmbedding.cos_sin_cache, and those of it"
    bytes_ = sum(tables) * width * ITEMSIZE[s.dtype]
    yield WeightGroup("cosines and sines of positions", "buffer", len(tables), s.dtype, bytes_, source)


def _rotary_rows(model: ModelSpec) -> Iterator[int]:
    """Yield the rows of each rotary table: one for each position.

    Images with three-dimensional positions need four times as many (mrope.py), a linear scaling multiplies them by its
    factor (linear_scaling_rope.py), and sliding-window layers with other rotary parameters have a table of their own.
    """
    rows = model.max_position_embeddings or 0
    if model.family.images is not None and model.family.images.video:
        rows *= 4
    scaling: Mapping[str, Any] = model.config.get("rope_scaling") or {}
    factor: object = scaling.get("factor", 1)
    linear = "linear" in (scaling.get("rope_type"), scaling.get("type"))
    yield int(rows * factor) if linear and isinstance(factor, (int, float)) else rows
    if model.config.get("rope_local_base_freq") is not None:
        yield rows


def _runner(s: Settings) -> Iterator[WeightGroup]:
    """Yield the buffers that vLLM's runner allocates before it profiles a step, for its most requests or tokens."""
    requests, vocabulary = s.serving.max_num_seqs or 1, s.model.vocab_size
    if s.behaviour.runner == "requests" and s.stage.headed:
        source = "vllm 0.33.0 v1/worker/gpu/sample"
        counts = requests * vocabulary * 4
        yield WeightGroup("counts of the tokens of every request", TABLE, 1, "int32", counts, f"{source}/penalties.py")
        rows = requests * (2 + (s.draft.tokens if s.draft else 0))  # every proposed token may be masked
        masks = rows * -(-vocabulary // 32) * 4
        yield WeightGroup(
            "masks of the vocabulary", TABLE, 2, "int32", masks, f"{source}/penalties.py, structured_outputs.py"
        )
        rows = requests * 4 * (_BIASES + _BAD_WORDS + _LOGPROBS)
        yield WeightGroup(
            "what requests ask of sampling", TABLE, 7, "int32", rows, f"{source}/logit_bias.py, bad_words.py"
        )
    images = profiled_items(s)
    if images is not None and s.behaviour.runner == "requests":
        wide = images.levels * s.steps * s.model.hidden_size * ITEMSIZE[s.dtype]
        source = "vllm 0.33.0 v1/worker/gpu/mm/encoder_runner.py inputs_embeds, models/qwen3_vl.py"
        yield WeightGroup("embeddings of a step", TABLE, images.levels, s.dtype, wide, source)
    if s.behaviour.runner == "tokens":
        source = "vllm 0.11.0 v1/worker/gpu_model_runner.py inputs_embeds, block_table.py"
        wide = s.steps * s.model.hidden_size * ITEMSIZE[s.dtype]
        yield WeightGroup("embeddings of a step", TABLE, 1, s.dtype, wide, source)
        blocks = requests * -(-s.longest // s.block) * 4
        yield WeightGroup("tables of blocks", TABLE, 1, "int32", blocks, source)


# Most entries per request: MAX_NUM_..., VLLM_MAX_NUM_BAD_WORDS and similar constants.
_BIASES, _BAD_WORDS, _LOGPROBS = 3 * 1024 + 128, 1024 + 128 + 1, 128


def _adapters(s: Settings) -> Iterator[WeightGroup]:
    """Yield the slots for adapters: A and B of the largest rank, for every matrix that takes adapters."""
    slots = s.serving.lora_slots or 0
    if slots and s.serving.lora_rank:
        source = "vllm 0.33.0 lora/layers create_lora_weights; sglang 0.5.23 lora/mem_pool.py"
        bytes_ = slots * slot(s) * ITEMSIZE[s.dtype]
        yield WeightGroup(f"slots for {slots} adapters", SLOTS, slots, s.dtype, bytes_, source)


def host_of_adapters(s: Settings) -> int:
    """Return the host bytes of adapters cached there, each of the largest rank.

    Source: vllm 0.33.0 config/lora.py max_cpu_loras, by default the number of slots.
    """
    slots = s.serving.lora_slots or 0
    if s.engine.kind != "vllm" or not slots:
        return 0
    return max(s.serving.lora_cpu_slots or slots, slots) * slot(s, divided=False) * ITEMSIZE[s.dtype]
