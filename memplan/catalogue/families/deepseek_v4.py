"""DeepSeek V4: several residual streams mixed by small matrices, one key head, and keys that stand for windows.

The one head of keys is also the values. Keys are compressed lightly (and then selected by an indexer) or heavily.

Axes of the model:

n        residual streams
nh       all streams of a token concatenated
n2       entries of a matrix between streams
nw       all mixing weights of a token
d, dn    width of a head, and of its part that is not rotated
og       groups of the output projection
gd       what a group reads
ol, ogl  width of a group's output, and of all groups'
rc, rh   tokens of a lightly and of a heavily compressed window
ih, id   heads of the indexer, and their width

Axes of the run:

wc, wh                windows, light and heavy
wc1                   wc + 1
uc, uh                tokens in those windows
kc, kh                keys of the tokens and of the windows
kc1, kh1, s1          kc, kh and s, each with a sink
tk                    windows that a query selects
several               number of sequences if there is more than one, else 0
kc_masked, kh_masked  kc and kh if there is a window, else 0
rc_kept               rc if there is a window, else 0

`memplan.catalogue.attention.compressed_tokens` has what a token finds of earlier passes.

Source: transformers 5.24 models/deepseek_v4/modeling_deepseek_v4.py.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import mask
from memplan.catalogue.attention.compressed_keys import (
    HEAVY,
    PLAIN,
    SOURCE,
    SPARSE,
    Windows,
    compressed,
    compressor,
    norm,
    plain_norm,
    summed,
    table,
    turned,
)
from memplan.catalogue.attention.compressed_tokens import token_compressed, token_compressor
from memplan.catalogue.attention.latent import concat_parts
from memplan.catalogue.attention.sparse_indexer import detached, lowered
from memplan.catalogue.decoder.frame import inputs, lm_head, runs
from memplan.catalogue.experts import experts, routers
from memplan.catalogue.families.deepseek_v4_streams import STREAMS, combine_streams, project_streams, spread_output
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.positions import positions
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Scratch, Stack, Tensor, Weight
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_CACHE = f"{SOURCE} DeepseekV4HCACache.update; transformers 5.24 cache_utils.py DynamicSlidingWindowLayer.update"


# Streams


# Windows of compressed keys


def _windows(name: str, x: str, y: str, w: Windows, width: str, where: str, wiring: Wiring) -> tuple[Op, ...]:
    """The keys of all windows, in a pass over all tokens or for one token after others."""
    if not wiring.decodes:
        return compressor(name, x, y, w, width, where, wiring.caching)
    return token_compressor(
        name, x, y, w, width, where, w.kind in wiring.opened_windows, w.kind in wiring.filled_windows
    )


def _return_keys(y: str, w: Windows, wiring: Wiring) -> tuple[Op, ...]:
    """Return from the function that made the keys `y`."""
    if not wiring.decodes:
        return (compressed(y, w.kind == "sparse"),)
    return token_compressed(y, w.kind == "sparse", w.kind in wiring.filled_windows)


def indexer(name: str, x: str, latent: str, wiring: Wiring) -> tuple[Op, ...]:
    """The windows each query selects, `chosen`. They get no gradient, though autograd records until they are made."""
    i, w = "index", SPARSE
    copy_or_view = ops.view if wiring.decodes else ops.copy  # a single token already has the layout the product needs
    scores = f"b s ih {w.number}"
    operations = (
        *_windows(name, x, f"{i}.keys", w, "id", name, wiring),
        *table(f"{i}.q", where="", weighs=False),
        ops.linear(f"{name}.q_b_proj", latent, f"{i}.q0", "ih id", "ql", "attention"),
        *turned(f"{name}.rope_q", f"{i}.q0", f"{i}.query", "b s ih", f"{i}.q", width="id"),
        ops.release_names(f"{i}.q0"),
        ops.cast(f"{name}.q_float", f"{i}.query", f"{i}.q32", "b s ih id", "fp32"),
        ops.cast(f"{name}.k_float", f"{i}.keys", f"{i}.k32", f"b {w.number} id", "fp32"),
        lowered(f"{name}.q_lowered", f"{i}.q32", f"{i}.q.given", "b s ih id"),
        lowered(f"{name}.k_lowered", f"{i}.k32", f"{i}.k.given", f"b {w.number} id"),
        # rows of several sequences are stored head by head, and are copied to be contiguous
        copy_or_view(f"{name}.q_flat", f"{i}.q.given", f"{i}.q.flat", "b s ih id"),
        copy_or_view(f"{name}.k_expand", f"{i}.k.given", f"{i}.k.every", f"several s id {w.number}"),
        Op(
            f"{name}.products",
            (f"{i}.q.flat", f"{i}.k.given", f"{i}.k.every", f"{i}.q.given"),
            (Tensor(f"{i}.products", scores),),
            product="matrix",
        ),
        ops.release_names(f"{i}.q32", f"{i}.k32"),
        ops.activation(f"{name}.relu", f"{i}.products", f"{i}.relu", scores),
        ops.scale(f"{name}.scale", f"{i}.relu", f"{i}.scores", scores),
        ops.release_names(f"{i}.products"),
        ops.linear(f"{name}.scorer.weights_proj", x, f"{i}.w0", "ih", "h", "attention"),
        ops.cast(f"{name}.scorer.float", f"{i}.w0", f"{i}.w32", "b s ih", "fp32"),
        ops.scale(f"{name}.scorer.scale", f"{i}.w32", f"{i}.w", "b s ih"),
        Op(f"{name}.scorer.weigh", (f"{i}.scores", f"{i}.w"), (Tensor(f"{i}.weighed", scores),)),
        Op(f"{name}.scorer.sum", (f"{i}.weighed",), (Tensor(f"{i}.sum", f"b s {w.number}"),)),
        ops.release_names(f"{i}.scores", f"{i}.w"),
        Op(
            f"{name}.future",
            (f"{i}.sum",),
            (Tensor(f"{i}.masked", f"b s {w.number}", f"={i}.sum"), Tensor(f"{i}.future", f"s {w.number}", "bool")),
        ),
        Op(
            f"{name}.topk",
            (f"{i}.masked",),
            (Tensor(f"{i}.best", "b s tk", f"={i}.sum"), Tensor(f"{i}.top", "b s tk", "int64")),
        ),
        ops.release_names(f"{i}.best"),
        Op(
            f"{name}.where",
            (f"{i}.top",),
            (Tensor("chosen", "b s tk", "int64"),),
            scratch=(Tensor("invalid", "b s tk", "bool"), Tensor("none", "b s tk", "int64")),
        ),
        ops.release_names(
            f"{i}.top", f"{i}.masked", f"{i}.future", f"{i}.keys", f"{i}.query", f"{i}.q.cos", f"{i}.q.sin"
        ),
        *_return_keys(f"{i}.keys", w, wiring),
    )
    if wiring.decodes:
        return detached(*operations)
    release = ops.release_names(  # released with the function: what autograd recorded
        *(f"{i}.{t}" for t in ("relu", "scores", "w", "q.flat", "k32", "k.every")),
        *(f"{i}.keys.c.{t}" for t in ("kv.laid", "soft", "weights", "normed.x32", "normed.n32")),
    )
    return detached(*operations, release._replace(needs_recording=True))


def _windows_mask(w: Windows, decodes: bool) -> tuple[Op, ...]:
    """The windows a query sees, appended to the token mask. It sees all heavily compressed windows before it."""
    shape = f"b s {w.number}"
    if decodes and w.kind == "heavy":
        return (Op("windows.mask", ("mask",), (Tensor("mask.all", f"b s {w.masked}", "=mask"),)),)
    if w.kind == "sparse":
        operations = (
            Op(
                "windows.bias",
                ("chosen",),
                (
                    Tensor("windows", "b s wc1", "=compressed"),
                    Tensor("safe", "b s tk", "int64"),
                    Tensor("valid", "b s tk", "bool"),
                ),
                scratch=(Tensor("none", "b s tk", "int64"),),
            ),
            ops.release_names("chosen", "valid", "safe"),
        )
    else:
        operations = (
            Op("windows.zeros", (), (Tensor("windows.zeros", shape, "=compressed"),)),
            Op(
                "windows.bias",
                ("windows.zeros",),
                (Tensor("windows", shape, "=compressed"),),
                scratch=(Tensor("future", f"s {w.number}", "bool"),),
            ),
            ops.release_names("windows.zeros"),
        )
    return detached(
        *operations,
        ops.cast("windows.to", "windows", "windows.like", shape, "=mask"),
        Op("windows.mask", ("mask", "windows.like"), (Tensor("mask.all", f"b s {w.masked}", "=mask"),)),
    )


# Attention


def _product(name: str, x: str, heads: str, y: str, shape: str, w: Windows) -> tuple[Op, ...]:
    """Product with one head expanded to all, which is a view for a single sequence, and a copy for several."""
    flat, op = f"{heads}.flat", ops.matmul(name, x, heads, y, shape)
    return (
        Op(
            f"{name}.flat",
            (heads,),
            (Tensor(flat, f"several {w.keys} a d", f"={heads}"),),
            gradient="none",
            copies_layout=True,
        ),
        op._replace(reads=(*op.reads, flat), keeps=(*op.keeps, Keep(flat, x))),
    )


def sink_attention(name: str, keys: str, y: str, mask_name: str, w: Windows, wiring: Wiring) -> tuple[Op, ...]:
    """Attention with one head of keys, which are also the values, expanded to all query heads.

    The sinks are fp32, and so is the softmax.
    """
    scores, with_sinks = f"b a s {w.keys}", f"b a s {w.with_sink}"
    sinks, drop = Weight("self_attn.sinks", "a", "attention", "fp32"), wiring.drops
    contiguous = ops.view if wiring.decodes else ops.copy
    return (
        *(ops.view(f"{name}.repeat_{t}", keys, f"{t}.heads", f"b {w.keys} a d", gradient="new") for t in "kv"),
        *_product(f"{name}.scores", "q", "k.heads", "scores", scores, w),
        ops.scale(f"{name}.scaling", "scores", "scaled", scores),
        Op(f"{name}.add_mask", ("scaled", mask_name), (Tensor("masked", scores),), gradient="same"),
        ops.view(f"{name}.part", "masked", "masked.part", with_sinks),
        Op(f"{name}.join", ("masked.part",), (Tensor("joined", with_sinks),), (sinks,), gradient="same"),
        Op(
            f"{name}.max",
            ("joined",),
            (Tensor("largest", "b a s", "=joined"), Tensor("largest.at", "b a s", "int64")),
            (),
            (Keep("largest.at", "joined"),),
        ),
        Op(
            f"{name}.minus",
            ("joined", "largest"),
            (Tensor("shifted", with_sinks),),
            gradient="same",
            scratch_back=(Scratch(Tensor("negative", with_sinks, "=joined"), "largest"),),
        ),
        ops.release_names("joined", "largest"),
        *ops.softmax(f"{name}.softmax", "shifted", "softmax", with_sinks, "=shifted"),
        ops.view(f"{name}.drop_sink", "softmax", "kept", scores, gradient="new"),
        *((ops.dropout(f"{name}.dropout", "kept", "dropped", scores),) if drop else ()),
        ops.cast(f"{name}.cast", "dropped" if drop else "kept", "probs", scores, "=v.heads"),
        ops.release_names("masked"),
        *_product(f"{name}.product", "probs", "v.heads", "heads", "b s a d", w),
        contiguous(f"{name}.contiguous", "heads", y, "b s a d", gradient="new"),
        ops.release_names("k.heads", "v.heads", "shifted", "softmax"),
    )


def _window_cache(name: str, turns: str, keeps: tuple[str, ...], wiring: Wiring) -> tuple[Op, ...]:
    """Cache the pass's keys, and the window's (`keeps`), concatenated with the earlier ones."""
    length = Tensor("length of the window", "", "int64")
    if not wiring.decodes:
        return (
            Op(f"{name}.window", (), (length,), holds="cache", source=_CACHE),
            *(Op(name, (turns,), (Tensor(t, "b s d", f"={turns}"),), holds="cache", source=_CACHE) for t in keeps),
            ops.release_names(turns),
        )
    past_length = length._replace(name=f"{length.name} before")
    before = [Tensor(f"{t} before", "b past_window d", f"={turns}") for t in keeps]
    return (
        Op(
            f"{name}.window",
            (past_length.name,),
            (length,),
            view=True,
            holds="cache",
            past=(past_length,),
            source=_CACHE,
        ),
        *(
            Op(
                name,
                (past.name, turns),
                (Tensor(t, "b kv_window d", f"={turns}"),),
                holds="cache",
                past=(past,),
                source=_CACHE,
            )
            for t, past in zip(keeps, before, strict=True)
        ),
        ops.release_names(turns, *(past.name for past in before)),
    )


def attention(x: str, y: str, w: Windows, wiring: Wiring) -> tuple[Op, ...]:
    n, g, caching = "self_attn", "attention", wiring.caching
    kind = "compress" if w.kind else "main"
    turns = "kv.turned" if caching else "kv"
    w = w if w.kind or not wiring.decodes else w._replace(keys="kv_window", with_sink="kv_window1")
    keys, mask_name = ("kv.all", "mask.all") if w.kind else ("kv", "mask")
    keeps = ("kv",) if w.kind else ("kv", "values of the window")  # a plain layer caches them twice
    mask_ops = _windows_mask(w, wiring.decodes) if w.kind else ()
    seen = (t.name for op in mask_ops for t in op.writes if t.name in ("mask.all", "windows"))
    window_ops: tuple[Op, ...] = ()
    if w.kind:
        inner = f"{n}.compressor"
        window_ops = (
            *_windows(inner, x, "compressed", w, "d", inner, wiring),
            *(indexer(f"{inner}.indexer", x, "q.normed", wiring) if w.kind == "sparse" else ()),
            *mask_ops,
            *_return_keys("compressed", w, wiring),
            *concat_parts(f"{n}.kv_cat", ("kv", "compressed"), "kv.all", f"b {w.keys} d"),
            ops.release_names("kv", "compressed"),
        )
    flatten = ops.view if wiring.decodes and wiring.is_single_sequence else ops.copy
    low_weight = Weight(
        f"{n}.o_a_proj.weight", "og ol gd", g, matrix=True, rows=2, is_read_as_view=True, returns_more=True
    )
    return (
        ops.linear(f"{n}.q_a_proj", x, "q.low", "ql", "h", g),
        *norm(f"{n}.q_a_norm", "q.low", "q.normed", "b s ql", "ql"),
        ops.release_names("q.low"),
        ops.linear(f"{n}.q_b_proj", "q.normed", "q0", "a d", "ql", g),
        ops.view(f"{n}.q_heads", "q0", "q1", "b s a d", gradient="new"),
        *plain_norm(f"{n}.q_b_norm", "q1", "q2", "b s a d"),
        ops.release_names("q1"),
        *turned(f"{n}.rope_q", "q2", "q", "b s a", kind),
        ops.release_names("q2"),
        ops.linear(f"{n}.kv_proj", x, "kv.low", "d", "h", g),
        *norm(f"{n}.kv_norm", "kv.low", "kv.normed", "b s d", "d"),
        ops.release_names("kv.low"),
        *turned(f"{n}.rope_kv", "kv.normed", turns, "b s", kind),
        ops.release_names("kv.normed"),
        *(_window_cache(f"{n}.cache", turns, keeps, wiring) if caching else ()),
        *window_ops,
        *sink_attention(f"{n}.attention", keys, "o", mask_name, w, wiring),
        Op(f"{n}.back", (f"{kind}.sin",), (Tensor("minus_sin", "s rot2", f"={kind}.sin"),), gradient="none"),
        *turned(f"{n}.rope_back", "o", "o.back", "b s a", kind, sine="minus_sin"),
        ops.release_names("o", "minus_sin"),
        (ops.view if wiring.decodes else ops.copy)(f"{n}.group", "o.back", "o.grouped", "b s a d", gradient="new"),
        Op(
            f"{n}.o_a_proj",
            ("o.grouped",),
            (Tensor("o.low.raw", "b s ogl"),),
            (low_weight,),
            (Keep(low_weight.name, "o.grouped"), Keep("o.grouped", low_weight.name)),
            scratch_back=(
                Scratch(Tensor("transposed gradient", low_weight.shape, f"={low_weight.name}"), low_weight.name),
            ),
            gradient="view",
            autocast="lower",
            product="matrix",
            source=f"{ops.DERIVATIVES}: bmm",
        ),
        flatten(f"{n}.flatten", "o.low.raw", "o.low", "b s ogl"),
        ops.release_names("o.low.raw", "o.grouped"),
        ops.linear(f"{n}.o_b_proj", "o.low", y, "h", "ogl", g),
        ops.release_names("q", "q.normed", keys, "o.back", "o.low", x, *seen),
    )


# Experts


def _limited(name: str, gate: str, up: str, y: str, shape: str) -> tuple[Op, ...]:
    return (
        ops.clamp(f"{name}.clamp_gate", gate, f"{y}.gate", shape, 1),
        ops.clamp(f"{name}.clamp_up", up, f"{y}.up", shape, 2),
        ops.activation(f"{name}.act_fn", f"{y}.gate", f"{y}.act", shape),
        ops.mul(f"{name}.product", f"{y}.act", f"{y}.up", y, shape),
        ops.release_names(f"{y}.gate", f"{y}.up"),
    )


def _gated(name: str, x: str, y: str) -> tuple[Op, ...]:
    shape = f"{routers.PAIRS} m"
    return (
        ops.split(f"{name}.chunk", x, (Tensor(f"{y}.gate0", shape), Tensor(f"{y}.up0", shape))),
        *_limited(name, f"{y}.gate0", f"{y}.up0", y, shape),
        ops.release_names(x),
    )


def router(name: str, x: str, hashed: bool) -> tuple[Op, ...]:
    """Scores are square roots of softplus. `hashed`: the experts of a token are looked up by its id."""
    logits, soft, scores = "router.logits", "router.soft", "router.roots"
    bias = Weight(f"{name}.e_score_correction_bias", "E", "buffer", "fp32", False)
    listed = Weight(f"{name}.tid2eid", "v e", "buffer", "int64", False)
    chosen = (
        (Op(f"{name}.lookup", ("ids",), (Tensor(routers.CHOSEN, routers.PAIRS, "int64"),), (listed,), gradient="none"),)
        if hashed
        else (
            Op(f"{name}.bias", (scores,), (Tensor("router.biased", "b s E", "fp32"),), (bias,), gradient="none"),
            routers.top_k(f"{name}.topk", "router.biased", "router.top")._replace(gradient="none"),
        )
    )
    return (
        routers.gate(name, x, logits),
        ops.activation(f"{name}.softplus", logits, soft, "b s E")._replace(autocast="fp32"),
        Op(
            f"{name}.sqrt",
            (soft,),
            (Tensor(scores, "b s E"),),
            (),
            (Keep(scores, soft),),
            scratch_back=(Scratch(Tensor("twice the root", "b s E", f"={scores}")),),
            source=f"{ops.DERIVATIVES}: sqrt",
        ),
        *chosen,
        routers.gathered(f"{name}.gather", scores, routers.CHOSEN, "router.picked"),
        Op(f"{name}.sum", ("router.picked",), (Tensor("router.total", "b s 1"),), autocast="wide"),
        Op(f"{name}.eps", ("router.total",), (Tensor("router.total.eps", "b s 1"),), gradient="same"),
        Op(
            f"{name}.divide",
            ("router.picked", "router.total.eps"),
            (Tensor("router.normal", routers.PAIRS),),
            (),
            (
                Keep("router.total.eps", "router.picked"),
                Keep("router.picked", "router.total.eps"),
                Keep("router.total.eps", "router.total.eps"),
            ),
        ),
        ops.release_names("router.picked"),
        ops.scale(f"{name}.scale", "router.normal", routers.SCORES, routers.PAIRS),
        ops.release_names(scores, "router.normal"),
    )


def feed(x: str, y: str, hashed: bool, bias: bool) -> tuple[Op, ...]:
    n = "mlp.shared_experts"
    return (
        *experts.mixture(x, router("mlp.gate", x, hashed), experts.experts(x, "routed", act=_gated), leaves=False),
        ops.linear(f"{n}.gate_proj", x, "shared.gate0", "m", "h", "mlp", bias),
        ops.clamp(f"{n}.clamp_gate", "shared.gate0", "shared.gate", "b s m", 1),
        ops.linear(f"{n}.up_proj", x, "shared.up0", "m", "h", "mlp", bias),
        ops.clamp(f"{n}.clamp_up", "shared.up0", "shared.up", "b s m", 2),
        ops.activation(f"{n}.act_fn", "shared.gate", "shared.act", "b s m"),
        ops.mul(f"{n}.product", "shared.act", "shared.up", "shared.product", "b s m"),
        ops.linear(f"{n}.down_proj", "shared.product", "shared", "h", "m", "mlp", bias),
        ops.release_names("shared.gate", "shared.up"),
        ops.add("mlp.add", "routed", "shared", y, "b s h"),
        ops.release_names("routed", "shared", *routers.HELD, x),
    )


# The model

_KINDS = {"sliding": PLAIN, "sparse": SPARSE, "heavy": HEAVY}


def deepseek_v4(m: ModelSpec, wiring: Wiring) -> Stack:
    iterations = m.config_int("hc_sinkhorn_iters", 20, most=100)  # published models have 20; each is operations

    def block(layer: Layer) -> Block:
        return Block(
            "model.layers",
            (
                *combine_streams("attn_hc", "x", "c1", iterations),
                *norm("input_layernorm", "c1", "n1", "b s h", "h"),
                *attention("n1", "ao", _KINDS[layer.mixer], wiring),
                *spread_output("attn_hc", "x", "ao", "x1"),
                *combine_streams("ffn_hc", "x1", "c2", iterations),
                ops.release_names("c1", "attn_hc.post", "attn_hc.comb"),
                *norm("post_attention_layernorm", "c2", "n2", "b s h", "h"),
                *feed("n2", "mo", layer.ffn == "hashed", m.get("mlp_bias", False)),
                *spread_output(
                    "ffn_hc", "x1", "mo", "y", ("c2", "ao", "mo", "probs", "ffn_hc.post", "ffn_hc.comb", "x1")
                ),
            ),
        )

    eager = wiring._replace(backend="eager", masked="eager")
    embedding = ops.embedding("model.embed_tokens", "ids", "tokens", "v", "h")
    before = (
        inputs(wiring.padded),
        embedding,
        positions(),
        *(
            op._replace(
                name="window_mask",
                writes=tuple(t._replace(dtype="=tokens") if t.dtype == "=embeds" else t for t in op.writes),
            )
            for op in mask(eager, "embeds")
        ),
        ops.copy("model.streams", "tokens", "embeds", STREAMS, gradient="new"),
        *table("main"),
        *table("compress", weighs=False),
    )
    h = "model.hc_head"
    after = (
        *project_streams(h, "x", "n", "hc_fn", "head"),
        Op(
            f"{h}.hc_scale",
            ("head.mixes",),
            (Tensor("head.scaled", "b s n"),),
            (Weight(f"{h}.hc_scale", "1", "mixer", "fp32"),),
            (Keep("head.mixes", f"{h}.hc_scale"),),
        ),
        Op(
            f"{h}.hc_base",
            ("head.scaled",),
            (Tensor("head.sum", "b s n"),),
            (Weight(f"{h}.hc_base", "n", "mixer", "fp32"),),
            gradient="same",
        ),
        routers.sigmoid(f"{h}.sigmoid", "head.sum", "head.gate", "b s n"),
        Op(f"{h}.eps", ("head.gate",), (Tensor("head.pre", "b s n"),), gradient="same"),
        ops.spread(f"{h}.weigh", "x", "head.pre", "head.weighed", STREAMS),
        *summed(f"{h}.collapse", "head.weighed", "head.one", "b s h"),
        ops.cast(f"{h}.to", "head.one", "hidden", "b s h", "=x"),
        ops.release_names("head.normed", "head.mixes", "head.pre"),
        *norm("model.norm", "hidden", "n", "b s h", "h"),
        ops.release_names(
            "hidden",
            "x",
            "tokens",
            "positions",
            "mask",
            *(f"{k}.{t}" for k in ("main", "compress") for t in ("cos", "sin")),
        ),
        lm_head("n", "model.embed_tokens.weight" if m.tie_word_embeddings else ""),
    )
    return Stack(before, runs(m, block), after)


BUILDERS = {"deepseek_v4": deepseek_v4}
