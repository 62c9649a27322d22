"""gpt-oss and MiMo-V2-Flash: attention sinks, one learned number per head that joins the softmax like a key's score.

transformers has no sdpa attention for them. This is eager attention, and for gpt-oss a kernel from the Hub that is
FlashAttention 3 with sinks, which get no gradient from it.

Source: transformers 5.24 models/gpt_oss/modeling_gpt_oss.py, models/mimo_v2_flash/modeling_mimo_v2_flash.py;
kernels-community/vllm-flash-attn3 flash_attn_interface.py FlashAttnFunc.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import QUERIES, SCORES, attention, cached, mask_name, repeated
from memplan.catalogue.decoder.attention import llama_attention, project_heads
from memplan.catalogue.decoder.decoder import Decoder, decoder
from memplan.catalogue.decoder.frame import BOTH, after, before, decoder_block, returned, runs
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.rotation import PHI3, partly_rotated
from memplan.catalogue.experts import experts, routers
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.positions import rotary_table
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Stack, Tensor, Weight
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_GPT_OSS = "transformers 5.24 models/gpt_oss/modeling_gpt_oss.py"
_WITH_SINK = "b a s s1"
SINKS = Weight("self_attn.sinks", "a", "attention")


def sink_attention(
    name: str,
    y: str,
    mask: str,
    sinks: bool,
    grouped: bool,
    value: str,
    one_name: bool = False,
    drop: bool = False,
    laid: bool = False,
) -> tuple[Op, ...]:
    """Eager attention of `q` to `k` and `v`, subtracting each row's largest score before the softmax.

    The softmax runs in the dtype of the scores.

    sinks     rows of scores are one longer, and the probabilities are a view of the other columns
    value     axis of the width of a value head
    one_name  one variable holds in turn every tensor from the joined scores to the probabilities
    drop      dropout on the probabilities, before they are cast
    laid      k and v are stored head by head, as in a cache
    """
    scores, heads = (_WITH_SINK if sinks else SCORES), f"b s a {value}"
    n, joined, kept = name, *(("joined", "kept") if sinks else ("masked", "softmax"))
    return (
        ops.copy(f"{n}.repeat_k", "k", "k.heads", "b s a d", gradient="new")
        if grouped
        else ops.view(f"{n}.k_same", "k", "k.heads", "b s a d"),
        ops.view(f"{n}.v_view", "v", "v.view", f"b s k {value}", gradient="new"),
        (ops.view if laid and not grouped else ops.copy)(
            f"{n}.repeat_v", "v.view", "v.heads", heads, gradient="new" if grouped else "same"
        ),
        ops.matmul(f"{n}.scores", "q", "k.heads", "scores", SCORES),
        ops.scale(f"{n}.scaling", "scores", "scaled", SCORES),
        Op(f"{n}.add_mask", ("scaled", mask), (Tensor("masked", SCORES),), gradient="same", source="add.Tensor"),
        *(_append_sinks(n) if sinks else ()),
        *((ops.release_names("masked"),) if sinks and one_name else ()),
        Op(
            f"{n}.max",
            (joined,),
            (Tensor("largest", "b a s", f"={joined}"), Tensor("largest.at", "b a s", "int64")),
            (),
            (Keep("largest.at", joined),),
            source=f"{ops.DERIVATIVES}: max.dim",
        ),
        ops.subtract(f"{n}.minus", joined, "largest", "shifted", scores),
        ops.release_names(joined, "largest"),
        *ops.softmax(f"{n}.softmax", "shifted", "softmax", scores, "=shifted"),
        *((ops.view(f"{n}.drop_sink", "softmax", "kept", SCORES, gradient="new"),) if sinks else ()),
        *((ops.dropout(f"{n}.dropout", kept, "dropped", SCORES),) if drop else ()),
        ops.cast(f"{n}.cast", "dropped" if drop else kept, "probs", SCORES, "=v.heads"),
        ops.release_names("shifted" if one_name else "masked"),
        ops.matmul(f"{n}.product", "probs", "v.heads", "heads", heads),
        ops.copy(f"{n}.contiguous", "heads", y, heads, gradient="new"),
        ops.release_names("k.heads", "v.heads", *(() if one_name else ("shifted",))),
    )


def _append_sinks(name: str, sinks: Weight = SINKS) -> tuple[Op, ...]:
    """Append the sinks to the scores. The gradients of both are views of one tensor."""
    return (
        ops.view(f"{name}.scores_part", "masked", "masked.part", _WITH_SINK),
        Op(
            f"{name}.join",
            ("masked.part",),
            (Tensor("joined", _WITH_SINK),),
            (sinks,),
            gradient="same",
            source=f"{ops.DERIVATIVES}: cat",
        ),
    )


def rotate_halves(name: str, x: str, y: str, heads: str) -> tuple[Op, ...]:
    """Rotate both halves of each head separately, with cos and sin of half its width, and concatenate them."""
    half, shape = f"b s {heads} rot2", f"b s {heads} d"
    operations: list[Op] = [ops.split(f"{name}.chunk", x, (Tensor(f"{y}.first", half), Tensor(f"{y}.second", half)))]
    for part, (a, b) in {"one": ("first", "second"), "two": ("second", "first")}.items():
        cosine, sine = f"{y}.{part}.cosine", f"{y}.{part}.sine"
        for half_name, factor, product in ((a, "cos", cosine), (b, "sin", sine)):
            operations.append(
                ops.with_constant(f"{name}.{part}_{factor}", f"{y}.{half_name}", factor, product, half, "mul.Tensor")
            )
        if part == "one":
            operations.append(ops.view(f"{name}.minus", sine, f"{sine}.negative", half, gradient="new"))
            sine = f"{sine}.negative"
        operations.append(ops.add(f"{name}.{part}", cosine, sine, f"{y}.{part}", half))
    return (
        *operations,
        *(ops.view(f"{name}.{part}_part", f"{y}.{part}", f"{y}.{part}.part", shape) for part in ("one", "two")),
        Op(
            f"{name}.cat",
            (f"{y}.one.part", f"{y}.two.part"),
            (Tensor(y, shape),),
            gradient="same",
            source=f"{_GPT_OSS} _apply_rotary_emb",
        ),
        ops.release_names(f"{y}.one", f"{y}.two"),
    )


def _attend(
    wiring: Wiring, layer: Layer, sinks: bool, grouped: bool, value: str, one_name: bool = False
) -> tuple[Op, ...]:
    name, mask = "self_attn.attention", mask_name(layer.sliding)
    if wiring.backend == "flash_2":
        kernel = attention(name, "q", "k", "v", "o", wiring, grouped, layer.sliding)
        return (Op(f"{name}.sinks", weights=(SINKS,), gradient="none"), *kernel)
    kernel = sink_attention(name, "o", mask, sinks, grouped, value, one_name, wiring.drops, wiring.caching)
    return cached(name, wiring, kernel, layer.sliding)


def _gpt_oss_attention(m: ModelSpec, layer: Layer, wiring: Wiring, name: str = "self_attn") -> tuple[Op, ...]:
    grouped, bias = m.num_key_value_heads != m.num_attention_heads, m.get("attention_bias", False)
    return (
        *project_heads(name, "n1", bias, gradient="new"),
        *rotate_halves(f"{name}.rope_q", "q1", "q", "a"),
        *rotate_halves(f"{name}.rope_k", "k1", "k", "k"),
        ops.release_names("q1", "k1"),
        *_attend(wiring, layer, True, grouped, "d"),
        ops.linear(f"{name}.o_proj", "o", "ao", "h", "a d", "attention", bias),
        ops.release_names("q", "k", "v", "o", "n1"),
    )


def rms_norm(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """RMSNorm that multiplies by the weight in fp32 and casts afterwards."""
    *normalise, _, _, _ = ops.rms_norm(name, x, y, shape, axis)
    n32, y32 = f"{y}.n32", f"{y}.y32"
    return (
        *normalise,
        ops.multiply_weight(f"{name}.weight", n32, y32, shape, Weight(f"{name}.weight", axis, "norm")),
        ops.release_names(f"{y}.mean", n32),
        ops.cast(f"{name}.cast", y32, y, shape, f"={x}"),
    )


def _router(x: str, name: str = "mlp.router") -> tuple[Op, ...]:
    """The largest logits, and a softmax over only these, in their dtype."""
    product = ops.linear(name, x, "router.logits", "E", "h", "router", bias=True, flat=True)
    weights = tuple(w._replace(matrix=False) for w in product.weights)
    return (
        product._replace(weights=weights),
        routers.top_k(f"{name}.topk", "router.logits", "router.top"),
        *ops.softmax(f"{name}.softmax", "router.top", routers.SCORES, routers.PAIRS, "=router.top"),
        ops.release_names("router.top"),
    )


def gpt_oss(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build gpt-oss: attention sinks, and experts with biases and clamped gates."""
    if wiring.backend != "flash_2":
        wiring = wiring._replace(backend="eager", masked="eager")
    mlp = (
        *_router("n2"),
        *experts.experts("n2", "mo", gate_up=(), down=(), act=experts.clamped(slices=True), biased=True),
        ops.release_names("router.logits", routers.CHOSEN, "n2", *returned(wiring)),
    )

    def block(layer: Layer) -> Block:
        return decoder_block(_gpt_oss_attention(m, layer, wiring), mlp, norm=rms_norm, held=(routers.SCORES,))

    table = tuple(op for op in rotary_table("embeds") if op.name != "rotary.cat")
    halves = tuple(op._replace(reads=tuple("angles" if r == "both" else r for r in op.reads)) for op in table)
    return Stack(
        before(wiring, BOTH, table=ops.with_axes(halves, {"rot": "rot2"})),
        runs(m, block),
        after(m, wiring, BOTH, norm=rms_norm),
    )


def _mimo_attention(m: ModelSpec, wiring: Wiring, layer: Layer, name: str = "self_attn") -> tuple[Op, ...]:
    """Attention with scaled values narrower than keys, partial rotation, and sinks in sliding-window layers."""
    operations = (
        *project_heads(name, "n1", m.get("attention_bias", False), gradient="new", value=("v0", "dv")),
        ops.scale(f"{name}.v_scale", "v0", "v", "b s k dv"),
        ops.release_names("v0"),
        *partly_rotated(m, f"{name}.rope", "q1", "k1", PHI3, partial=True),
        ops.release_names("q1", "k1"),
        *_attend(wiring, layer, layer.sliding, layer.k != m.num_attention_heads, "dv", one_name=True),
        ops.linear(f"{name}.o_proj", "o", "ao", "h", "a dv", "attention"),
        ops.release_names("q", "k", "v", "o", "n1"),
    )
    return ops.with_axes(operations, {"k": f"k{layer.k}"})


def mimo(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build MiMo-V2-Flash, whose sliding-window layers have more key heads, sinks and a separate rotary table."""
    return decoder(m, wiring._replace(backend="eager", masked="eager"), _MIMO)


def _mimo_mixture(m: ModelSpec) -> tuple[Op, ...]:
    routed = routers.without_adapter_targets(routers.grouped_router("mlp.gate", "n2", m.get("norm_topk_prob", True)))
    return experts.mixture("n2", routed, experts.experts("n2", "mo", gate_up=(), down=()))


_MIMO = Decoder(attention=_mimo_attention, experts=_mimo_mixture, local_table=True, masks=BOTH)


def _attend_with_wide_sink(
    name: str, q: str, k: str, v: str, y: str, wiring: Wiring, grouped: bool, sliding: bool, mask: str
) -> tuple[Op, ...]:
    """Eager attention with a sink, whose scores are computed in fp32, even under autocast."""
    n, laid = name, grouped or wiring.caching
    kernel = (
        *repeated(n, k, v, grouped, "d"),
        ops.cast(f"{n}.q_float", q, "q32", QUERIES, "fp32"),
        ops.cast(f"{n}.k_float", "k.heads", "k32", QUERIES, "fp32"),
        ops.copy(f"{n}.q_flat", "q32", "q.flat", QUERIES),
        (ops.view if laid else ops.copy)(f"{n}.k_flat", "k32", "k.flat", QUERIES),
        ops.matmul(f"{n}.scores", "q.flat", "k.flat", "scores", SCORES)._replace(autocast=""),
        ops.scale(f"{n}.scaling", "scores", "scaled", SCORES),
        Op(f"{n}.add_mask", ("scaled", mask), (Tensor("masked", SCORES),), gradient="same", source="add.Tensor"),
        *_append_sinks(n, SINKS._replace(dtype="fp32")),
        *ops.softmax(f"{n}.softmax", "joined", "softmax", _WITH_SINK),
        ops.view(f"{n}.drop_sink", "softmax", "kept", SCORES, gradient="new"),
        ops.cast(f"{n}.cast", "kept", "probs.whole" if wiring.drops else "probs", SCORES, "=v.heads"),
        ops.release_names("masked"),
        *((ops.dropout(f"{n}.dropout", "probs.whole", "probs", SCORES),) if wiring.drops else ()),
        (ops.view if laid else ops.copy)(f"{n}.v_flat", "v.heads", "v.flat", QUERIES),
        ops.matmul(f"{n}.product", "probs", "v.flat", "heads", QUERIES),
        ops.copy(f"{n}.contiguous", "heads", y, QUERIES, gradient="new"),
        ops.release_names("probs", "k.heads", "v.heads"),
    )
    return cached(n, wiring, kernel, sliding)


def _flint_attention(m: ModelSpec, wiring: Wiring, layer: Layer) -> tuple[Op, ...]:
    """Attention with normalised heads, rotated only in windows."""
    bias = m.get("attention_bias", False)
    return llama_attention(
        m,
        wiring,
        "n1",
        "ao",
        bias=bias,
        out_bias=bias,
        qk_norm="each",
        rotary=layer.rotary,
        sliding=layer.sliding,
        attend=_attend_with_wide_sink,
        norm=rms_norm,
    )


def _flint_mixture(m: ModelSpec) -> tuple[Op, ...]:
    """The largest sigmoids of fp32 logits weigh the experts."""
    normalise, top = m.get("norm_topk_prob", True), "router.top"
    routed = (
        *routers.fp32_gate("mlp.gate", "n2", autocast=""),
        routers.sigmoid("mlp.gate.sigmoid", "router.logits", "router.sigmoids", "b s E"),
        routers.top_k("mlp.gate.topk", "router.sigmoids", top if normalise else routers.SCORES),
        *(routers.divided("mlp.gate.normalise", top, routers.SCORES) if normalise else ()),
        ops.release_names("router.sigmoids"),
    )
    return with_shared_expert(routed)


def with_shared_expert(routed: tuple[Op, ...]) -> tuple[Op, ...]:
    """Return the routed experts plus a shared one that nothing weighs."""
    stacks = experts.experts("n2", "routed", gate_up=(), down=())
    return (
        *experts.mixture("n2", routers.without_adapter_targets(routed), stacks, leaves=False),
        *gated_mlp("n2", "shared", "mlp.shared_expert", width="fs", flat=True),
        ops.add("mlp.add", "routed", "shared", "mo", "b s h"),
        ops.release_names("routed", "shared", *routers.HELD, "n2"),
    )


def flint(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Flint: windows with sinks, and experts next to a shared one."""
    row = Decoder(attention=_flint_attention, experts=_flint_mixture, norm=rms_norm, masks=BOTH)
    return decoder(m, wiring._replace(backend="eager", masked="eager"), row)


BUILDERS = {"flint": flint, "gpt_oss": gpt_oss, "mimo_v2_flash": mimo}
