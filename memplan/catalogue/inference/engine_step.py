"""Memory of a serving engine's step, kernel by kernel. No gradients are computed, so little stays alive.

An engine packs the tokens of all requests into one row of `s`, and computes logits for the last token of each of `n`
requests. Kernels are fused: norms add the residual, rotary embeddings are applied in place, and gate and up are one
product. An `Instant` is a point just before memory is freed, with everything alive then except the weights.

Axes of this module:

    n             requests
    room          tokens of cached prompts whose latents are expanded
    qh, kh        the rank's query and key/value heads
    fp, mp, vp    the rank's part of an FFN, of an expert and of the vocabulary
    all, se       tokens that meet at the experts, and their rows
    wide          the wider of an expert's gate and up together, and of its output
    narrow        the wider of an expert's activations, and of its output
    ip, cp, pp    the rank's part of a mixer's channels, of the convolved and of the projected ones
    most          tokens of the longest step

Source: vllm 0.33.0 model_executor/models/llama.py and the layers that it names; sglang 0.5.23 has the same kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from memplan.catalogue.inference.caches import keeps_nothing
from memplan.catalogue.inference.instant import Instant
from memplan.core.ir import Tensor
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_RESIDUAL = Tensor("residual", "s h")
_VLLM = "vllm 0.33.0 model_executor"


def parts_of_rank(model: ModelSpec, tp: int, dense: int = 0, experts: int = 0) -> Mapping[str, int]:
    """Return the axes of one of `tp` ranks. If key/value heads are fewer than ranks, ranks share copies of them.

    `dense` ranks divide MLPs and the head, and `experts` ranks an expert's width, if they differ from `tp`.
    """
    axes, a = model.axes(), model.num_attention_heads
    vocabulary = -(-axes["v"] // 64) * 64
    parts = {
        "qh": -(-a // tp),
        "kh": -(-model.num_key_value_heads // tp),
        "fp": -(-max(layer.f for layer in model.layers) // (dense or tp)),
        "vp": -(-vocabulary // (dense or tp)),
    }
    for letter, axis in (("mp", "m"), ("ip", "inner"), ("cp", "convolved"), ("pp", "projected")):
        if axis in axes:
            parts[letter] = -(-axes[axis] // (experts or tp if letter == "mp" else tp))
    if "mp" in parts:
        parts["wide"], parts["narrow"] = max(2 * parts["mp"], axes["h"]), max(parts["mp"], axes["h"])
    return {**axes, "dv": axes.get("dv", axes["d"]), **parts}


def instants(
    model: ModelSpec,
    tp: int,
    sampler: str,
    eager: bool,
    layers: tuple[Layer, ...] = (),
    draws: bool = True,
    fed: bool = False,
    gathered: bool = False,
    room: str = "shared",
) -> tuple[Instant, ...]:
    """Return the candidate peaks of a step: one of each kind of layer, and of sampling the next tokens.

    layers    the layers of a pipeline stage
    draws     this stage samples, as the last one does
    fed       buffers hold the previous stage's outputs, in all stages but the first
    gathered  tokens of other data-parallel groups meet at the experts
    room      how experts share buffers (`memplan.catalogue.profiles.engines.EngineBehaviour`)
    eager     layers run in Python, whose frames hold a layer's input and its norm's output until the layer returns;
              compiled code frees tensors after their last use
    """
    axes = model.axes()
    gated = model.family.gated
    points: dict[Instant, None] = {}
    if "rc" in axes:
        from memplan.catalogue.inference.engine_step_deepseek_v4 import compressed_instants

        points |= dict.fromkeys(compressed_instants(layers or model.layers))
        complete = (*points, *(_sampling(tp, sampler) if draws else ()))
        return (
            tuple(i._replace(alive=(*i.alive, Tensor("streams from before", "most nh"))) for i in complete if fed)
            or complete
        )
    for layer in dict.fromkeys(layers or model.layers):
        points |= dict.fromkeys(_mixer(axes, layer))
        points |= dict.fromkeys(_feed_forward(axes, layer, gated, gathered, room))
    frame_locals = _FRAME_LOCALS if eager else ()
    sampling = _sampling(tp, sampler) if draws else ()
    complete = (*(i._replace(alive=(*i.alive, *frame_locals)) for i in points), *sampling)
    return tuple(i._replace(alive=(*i.alive, *_FED)) for i in complete) if fed else complete


# Sized for the longest step. Source: vllm 0.33.0 models/utils.py make_empty_intermediate_tensors_factory.
_FED = (Tensor("hidden from the stage before", "most h"), Tensor("residual from the stage before", "most h"))
_FRAME_LOCALS = (Tensor("the layer's input", "s h"), Tensor("the layer's input after its norm", "s h"))


def _mixer(axes: Mapping[str, int], layer: Layer) -> Iterator[Instant]:
    """Yield the instants of the layer's token mixer."""
    if layer.mixer == "linear_attention":
        inputs = (Tensor("q, k, v and gates", "s pp" if "projected" in axes else "s cp"), Tensor("convolved", "s cp"))
        yield Instant(
            "linear_attention.scan",
            (_RESIDUAL, *inputs, Tensor("output", "s cp"), Tensor("chunks' states", "s cp", "fp32")),
            f"{_VLLM}/layers/mamba/gdn: the kernel's scratch is assumed to be as wide in fp32",
            "assumed",
        )
        return
    if layer.mixer == "mamba":
        width = "s pp" if "projected" in axes else "s 2 ip"
        mixed = "s cp" if "convolved" in axes else "s ip"
        yield Instant(
            "mamba.scan",
            (_RESIDUAL, Tensor("projected", width), Tensor("convolved", mixed), Tensor("output", "s ip", "fp32")),
            f"{_VLLM}/layers/mamba: states of chunks are not counted",
            "assumed",
        )
        return
    if layer.mixer == "none":
        return
    if "kl" in axes:
        q, expanded = Tensor("q", "s qh d"), Tensor("k and v of the latent", "s qh dkv")
        yield Instant(
            "attention.prefill",
            (_RESIDUAL, q, Tensor("latent", "s klr"), expanded, Tensor("k", "s qh d"), Tensor("output", "s qh d")),
            f"{_VLLM}/layers/attention/mla_attention.py forward_mha",
        )
        yield Instant(
            "attention.workspace",
            (
                *(_RESIDUAL, q, Tensor("latent", "s klr"), Tensor("output", "s qh dv")),
                Tensor("room for k and v of cached prompts", "room qh dkv"),
            ),
            f"{_VLLM}/layers/attention/mla_attention.py forward_impl, as the profile run has it",
        )
        return
    heads = "s qh d"
    keys_values = () if keeps_nothing(layer) else (Tensor("k and v", "s kh 2 d"),)
    yield Instant(
        "attention",
        (_RESIDUAL, Tensor("q", heads), *keys_values, Tensor("output", heads)),
        f"{_VLLM}/models/llama.py LlamaAttention.forward: q, k and v are one product, rotated in place",
    )
    yield Instant(
        "attention.o_proj",
        (_RESIDUAL, Tensor("output", heads), Tensor("projected", "s h")),
        f"{_VLLM}/models/llama.py LlamaAttention.forward",
    )


def _feed_forward(axes: Mapping[str, int], layer: Layer, gated: bool, gathered: bool, room: str) -> Iterator[Instant]:
    """Yield the instants of the FFN, or of the experts."""
    if layer.ffn in ("none", ""):
        return
    if layer.ffn in ("experts", "hashed") and "m" in axes:
        rank_inputs = (
            (Tensor("the rank's hidden", "s h"), Tensor("the rank's router's logits", "s E")) if gathered else ()
        )
        inputs = (_RESIDUAL, *rank_inputs, Tensor("hidden", "all h"), Tensor("router's logits", "all E"))
        if room == "two":
            rows = (Tensor("activated, then outputs", "se narrow"), Tensor("gates and ups, permuted", "se wide"))
            source = f"{_VLLM}/layers/fused_moe/experts/triton_moe.py workspace_shapes, which other kernels have too"
            yield Instant("experts", (*inputs, *rows), source)
            return
        yield Instant(
            "experts",
            (
                *inputs,
                Tensor("gates and ups, then outputs", "se wide"),
                Tensor("activated", "se mp"),
                Tensor("sum", "all h"),
            ),
            f"{_VLLM}/layers/fused_moe/fused_moe.py: the first and third product share a buffer",
        )
        return
    up = Tensor("gate and up", "s 2 fp") if gated else Tensor("up", "s fp")
    yield Instant(
        "mlp",
        (_RESIDUAL, up, Tensor("activated", "s fp")),
        f"{_VLLM}/models/llama.py LlamaMLP.forward: gate and up are one product",
    )


def _sampling(tp: int, sampler: str) -> Iterator[Instant]:
    """Yield the instants of the head and the sampler.

    Logits are for the last token of every request; the model's output is still alive.
    """
    hidden = (Tensor("hidden", "s h"), Tensor("hidden of last tokens", "n h"))
    logits = (*hidden, Tensor("logits", "n v"))
    if tp > 1:
        yield Instant(
            "lm_head.gather",
            (*logits, Tensor("the rank's logits", "n vp")),
            f"{_VLLM}/layers/logits_processor.py _gather_logits",
        )
    logits32 = Tensor("logits in fp32", "n v", "fp32")
    if sampler == "filtered":
        yield Instant(
            "sampler",
            (*logits, logits32, Tensor("top-k logits", "n v", "fp32"), Tensor("probabilities", "n v", "fp32")),
            "vllm 0.33.0 v1/worker/gpu/sample/sampler.py Sampler.sample; v1/sample/ops/topk_topp_sampler.py "
            "flashinfer_sample, with top-k before top-p",
        )
        return
    scratch = (
        Tensor("sort's pairs of index and row", "n v", "int64"),
        Tensor("sorted pairs of index and row", "n v", "int64"),
        Tensor("sort's keys", "n v", "fp32"),
    )
    yield Instant(
        "sampler.sort",
        (*logits, logits32, Tensor("sorted", "n v", "fp32"), Tensor("order", "n v", "int64"), *scratch),
        "vllm 0.11.0 v1/sample/ops/topk_topp_sampler.py apply_top_k_top_p; torch's sort's own scratch is assumed",
        "assumed",
    )
