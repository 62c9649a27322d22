"""DBRX: LayerNorms without biases, q, k and v in one clipped projection, experts in a loop."""

from __future__ import annotations

from memplan.catalogue.attention.attention import KEYS, QUERIES, attention, mask_name
from memplan.catalogue.decoder.attention import rope
from memplan.catalogue.decoder.frame import after, before, lm_head, returned
from memplan.catalogue.experts import expert_loops, routers
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import drops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op, Run, Stack, Tensor
from memplan.models.model import ModelSpec

_SOURCE = "transformers 5.24 models/dbrx/modeling_dbrx.py"


def dbrx(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build DBRX. Noise multiplies the router's input in place, so the experts read it too."""
    dropped, name = drops(m, "resid_pdrop"), "norm_attn_norm"
    block = Block(
        "transformer.blocks",
        (
            *_layer_norm(f"{name}.norm_1", "x", "n1"),
            *_attention(m, wiring, f"{name}.attn"),
            *_dropped(f"{name}.dropout", "ao", "ao.branch", dropped),
            ops.add("residual_1", "ao.branch" if dropped else "ao", "x", "x1", "b s h"),
            *_layer_norm(f"{name}.norm_2", "x1", "n2"),
            *_ffn(m),
            *_dropped("dropout", "mo", "mo.branch", dropped),
            ops.add("residual_2", "x1", "mo.branch" if dropped else "mo", "y", "b s h"),
            ops.release_names("positions", *returned(wiring)),
        ),
    )
    embedded = (ops.embedding("transformer.wte", "ids", "embeds", "v", "h"),)
    norm = (ops.layer_norm("transformer.norm_f", "x", "n", "b s h", "h", bias=False),)
    last = (*after(m, wiring, last=norm)[:-1], lm_head("n"))  # never tied
    return Stack(before(wiring, embedded=embedded), (Run((block,), "L"),), last)


def _layer_norm(name: str, x: str, y: str) -> tuple[Op, ...]:
    return (
        ops.layer_norm(name, x, f"{y}.own", "b s h", "h", bias=False),
        ops.cast(f"{name}.cast", f"{y}.own", y, "b s h", f"={x}"),
    )


def _dropped(name: str, x: str, y: str, drop: bool) -> tuple[Op, ...]:
    return (ops.dropout(name, x, y, "b s h"), ops.release_names(x)) if drop else ()


def _attention(m: ModelSpec, wiring: Wiring, name: str) -> tuple[Op, ...]:
    """Attention. q, k and v are views of the projection; clipping makes a new tensor, and keeps the unclipped one."""
    grouped, clipped = m.num_key_value_heads != m.num_attention_heads, m.get("clip_qkv", 0.0) > 0
    wiring = wiring._replace(drops=drops(m, "attn_pdrop"))
    clamp = ops.clamp(f"{name}.clamp", "projected", "qkv", "b s qkv", 2)
    return (
        ops.linear(f"{name}.Wqkv", "n1", "projected" if clipped else "qkv", "qkv", "h", "attention"),
        *((clamp, ops.release_names("projected")) if clipped else ()),
        ops.split(f"{name}.split", "qkv", (Tensor("q1", QUERIES), Tensor("k1", KEYS), Tensor("v", KEYS))),
        *rope(m, name, "q1", "k1"),
        *attention(f"{name}.attention", "q", "k", "v", "o", wiring, grouped, False, mask_name(False)),
        ops.linear(f"{name}.out_proj", "o", "ao", "h", "a d", "attention"),
        ops.release_names("qkv", "q", "k", "v", "o", "n1"),
    )


def _ffn(m: ModelSpec) -> tuple[Op, ...]:
    """Routed experts. The softmax is in the dtype of the logits, and the selected scores are divided by their sum."""
    name, ffn = "ffn.router", m.part("ffn_config")
    noisy = ffn.get("moe_jitter_eps") is not None
    x = "n2.noisy" if noisy else "n2"
    normalised = ffn.get("moe_normalize_expert_weights", 1.0) is not None
    top = "router.top" if normalised else routers.SCORES
    softmax = ops.softmax(f"{name}.softmax", "router.logits", "router.probs", "b s E")
    return (
        *(routers.jitter(f"{name}.jitter", "n2", x) if noisy else ()),
        routers.gate(f"{name}.layer", x, stands_for=(), matrix=True),
        *(op._replace(autocast="") for op in softmax),
        routers.top_k(f"{name}.topk", "router.probs", top),
        ops.release_names("router.probs"),
        *(routers.divided(f"{name}.normalise", top, routers.SCORES, "norm") if normalised else ()),
        *expert_loops.loop(x, "mo", "ffn.experts", [expert_loops.in_rows("ffn.experts")] * expert_loops.experts_of(m)),
        ops.release_names(*routers.HELD, "n2"),
    )


BUILDERS = {"dbrx": dbrx}
