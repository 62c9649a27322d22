"""What a serving engine's step has in memory, kernel by kernel: no gradient is asked, so that little stays.

An engine packs the tokens of all requests into one row of `s`, and computes logits for the last token of each of `n`
requests. Kernels are fused: norms add the residual as they go, rotary positions are written in place, gates and ups are
one product. `Instant` is a moment at which memory is about to fall, with all that is alive then beside the weights.

Letters of their own: `n` requests, `room` tokens of cached prompts whose latents are expanded, `qh` and `kh` the rank's
query and key/value heads, `fp`, `mp` and `vp` its part of an FFN, of an expert and of the vocabulary, `all` tokens that
meet at the experts and `se` their rows, `wide` and `narrow` the wider of an expert's gate and up and of its activations
on one side, and of its outputs on the other, `ip`, `cp` and `pp` the rank's part of a mixer's channels, of what is
convolved and of what is projected, `most` the tokens of the longest step.

Source: vllm 0.33.0 model_executor/models/llama.py and the layers that it names; sglang 0.5.23 has the same kernels."""

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
    """The axes of one of `tp` ranks. Key/value heads that are fewer than ranks are there several times.

    `dense` ranks divide MLPs and the head, and `experts` the width of an expert, where those are not `tp` too.
    """
    axes, a = model.axes(), model.num_attention_heads
    vocabulary = -(-axes["v"] // 64) * 64
    wide = {
        "qh": -(-a // tp),
        "kh": -(-model.num_key_value_heads // tp),
        "fp": -(-max(layer.f for layer in model.layers) // (dense or tp)),
        "vp": -(-vocabulary // (dense or tp)),
    }
    for own, of in (("mp", "m"), ("ip", "inner"), ("cp", "convolved"), ("pp", "projected")):
        if of in axes:
            wide[own] = -(-axes[of] // (experts or tp if own == "mp" else tp))
    if "mp" in wide:
        wide["wide"], wide["narrow"] = max(2 * wide["mp"], axes["h"]), max(wide["mp"], axes["h"])
    return {**axes, "dv": axes.get("dv", axes["d"]), **wide}


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
    """The moments of a step that may have the most, of every kind of layer once, and of drawing the next tokens.

    `layers` are those of a pipeline's stage, of which the last `draws`, and all but the first are `fed`: what came from
    the stage before has a place of its own. `gathered`: the tokens of other groups of ranks meet at the experts.
    `room`: how buffers of experts are shared (`memplan.catalogue.profiles.engines.WORDS`, experts_room).

    `eager`: the layers are run by Python as they are written, whose frames have names for a layer's input and for what
    its norm made of that until the layer is over; compiled, what is read no more is gone.
    """
    axes = model.axes()
    gated = model.model_type not in _UNGATED
    found: dict[Instant, None] = {}
    if "rc" in axes:
        from memplan.catalogue.inference.engine_step_deepseek_v4 import compressed_instants

        found |= dict.fromkeys(compressed_instants(layers or model.layers))
        every = (*found, *(_drawing(tp, sampler) if draws else ()))
        return (
            tuple(i._replace(alive=(*i.alive, Tensor("streams from before", "most nh"))) for i in every if fed) or every
        )
    for layer in dict.fromkeys(layers or model.layers):
        found |= dict.fromkeys(_mixing(model, axes, layer))
        found |= dict.fromkeys(_feeding(axes, layer, gated, gathered, room))
    named = _NAMED if eager else ()
    drawing = _drawing(tp, sampler) if draws else ()
    every = (*(i._replace(alive=(*i.alive, *named)) for i in found), *drawing)
    return tuple(i._replace(alive=(*i.alive, *_FED)) for i in every) if fed else every


# Of as many tokens as a step. Source: vllm 0.33.0 models/utils.py make_empty_intermediate_tensors_factory.
_FED = (Tensor("hidden from the stage before", "most h"), Tensor("residual from the stage before", "most h"))
_NAMED = (Tensor("the layer's input", "s h"), Tensor("the same after its norm", "s h"))


# FFNs of two matrices, with an activation between.
_UNGATED = frozenset(
    (
        *("gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "mpt", "falcon", "phi", "starcoder2"),
        *("nemotron", "nemotron_h", "t5", "whisper"),
    )
)


def _mixing(model: ModelSpec, axes: Mapping[str, int], layer: Layer) -> Iterator[Instant]:
    """What mixes tokens."""
    if layer.mixer == "linear_attention":
        made = (Tensor("q, k, v and gates", "s pp" if "projected" in axes else "s cp"), Tensor("convolved", "s cp"))
        yield Instant(
            "linear_attention.scan",
            (_RESIDUAL, *made, Tensor("output", "s cp"), Tensor("chunks' states", "s cp", "fp32")),
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
    own = () if keeps_nothing(layer) else (Tensor("k and v", "s kh 2 d"),)
    yield Instant(
        "attention",
        (_RESIDUAL, Tensor("q", heads), *own, Tensor("output", heads)),
        f"{_VLLM}/models/llama.py LlamaAttention.forward: q, k and v are one product, rotated in place",
    )
    yield Instant(
        "attention.o_proj",
        (_RESIDUAL, Tensor("output", heads), Tensor("projected", "s h")),
        f"{_VLLM}/models/llama.py LlamaAttention.forward",
    )


def _feeding(axes: Mapping[str, int], layer: Layer, gated: bool, gathered: bool, room: str) -> Iterator[Instant]:
    """The FFN, or the experts."""
    if layer.ffn in ("none", ""):
        return
    if layer.ffn in ("experts", "hashed") and "m" in axes:
        own = (Tensor("the rank's hidden", "s h"), Tensor("the rank's router's logits", "s E")) if gathered else ()
        there = (_RESIDUAL, *own, Tensor("hidden", "all h"), Tensor("router's logits", "all E"))
        if room == "two":
            rows = (Tensor("activated, then outputs", "se narrow"), Tensor("gates and ups, permuted", "se wide"))
            source = f"{_VLLM}/layers/fused_moe/experts/triton_moe.py workspace_shapes, which other kernels have too"
            yield Instant("experts", (*there, *rows), source)
            return
        yield Instant(
            "experts",
            (
                *there,
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


def _drawing(tp: int, sampler: str) -> Iterator[Instant]:
    """The head and the sampler: logits of the last token of every request; what the model returned is still there."""
    hidden = (Tensor("hidden", "s h"), Tensor("hidden of last tokens", "n h"))
    logits = (*hidden, Tensor("logits", "n v"))
    if tp > 1:
        yield Instant(
            "lm_head.gather",
            (*logits, Tensor("the rank's logits", "n vp")),
            f"{_VLLM}/layers/logits_processor.py _gather_logits",
        )
    wide = Tensor("logits in fp32", "n v", "fp32")
    if sampler == "filtered":
        yield Instant(
            "sampler",
            (*logits, wide, Tensor("the likeliest alone", "n v", "fp32"), Tensor("probabilities", "n v", "fp32")),
            "vllm 0.33.0 v1/worker/gpu/sample/sampler.py Sampler.sample; v1/sample/ops/topk_topp_sampler.py "
            "flashinfer_sample, with top-k before top-p",
        )
        return
    scratch = (
        Tensor("sort's pairs of index and row", "n v", "int64"),
        Tensor("the same, sorted", "n v", "int64"),
        Tensor("sort's keys", "n v", "fp32"),
    )
    yield Instant(
        "sampler.sort",
        (*logits, wide, Tensor("sorted", "n v", "fp32"), Tensor("order", "n v", "int64"), *scratch),
        "vllm 0.11.0 v1/sample/ops/topk_topp_sampler.py apply_top_k_top_p; torch's sort's own scratch is assumed",
        "assumed",
    )
