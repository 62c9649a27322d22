"""DeepSeek V4: several residual streams mixed by small matrices, one head of keys that are values too, and keys that
stand for windows of tokens.

Axes of its own: `n` streams, `nh` all of them side by side, `n2` the numbers of a matrix between them, `nw` all that a
token's mixing takes; of a head `d`, `dn` the part that is not rotated; `og` groups of the output projection, `ol` the
width of each and `ogl` of all, `gd` what a group reads; `rc` and `rh` the tokens of a window where keys are compressed
a little (and chosen from, by an indexer of `ih` heads `id` wide) and where much. Of the run: `wc` and `wh` the windows,
`uc` and `uh` the tokens in them, `wc1` one more than the windows, `kc` and `kh` the keys with them, each with a sink
`kc1`, `kh1` and `s1`; `tk` the windows that a query chooses; `several` the sequences of more than one, else 0.
`kc_masked` and `kh_masked` are the keys where there is a window, else 0, and `rc_kept` so
the tokens of one. What a token finds of the passes before it is in `memplan.catalogue.attention.compressed_tokens`.
Source: transformers 5.24 models/deepseek_v4/modeling_deepseek_v4.py.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    times,
    turned,
)
from memplan.catalogue.attention.compressed_tokens import token_compressed, token_compressor
from memplan.catalogue.attention.latent import joined
from memplan.catalogue.attention.sparse_indexer import detached, lowered
from memplan.catalogue.decoder.frame import inputs, lm_head, runs
from memplan.catalogue.experts import experts, routers
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.positions import positions
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Scratch, Stack, Tensor, Weight
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_CACHE = f"{SOURCE} DeepseekV4HCACache.update; transformers 5.24 cache_utils.py DynamicSlidingWindowLayer.update"
_STREAMS = "b s n h"


# Streams


def mixed(name: str, x: str) -> tuple[Op, ...]:
    """What the streams are put together with, and what a module's result is spread over them with."""
    t = name
    return (
        *_mixes(name, x, "nw", "fn", t),
        ops.split(
            f"{name}.split",
            f"{t}.mixes",
            (Tensor(f"{t}.pre.raw", "b s n"), Tensor(f"{t}.post.raw", "b s n"), Tensor(f"{t}.comb.raw", "b s n2")),
        ),
        Op(f"{name}.base", (), (Tensor(f"{t}.bases", "nw", "fp32"),), (Weight(f"{name}.base", "nw", "mixer", "fp32"),)),
        Op(
            f"{name}.scales",
            (),
            (Tensor(f"{t}.scales", "3", "fp32"),),
            (Weight(f"{name}.scale", "3", "mixer", "fp32"),),
        ),
        *_scaled(f"{name}.pre", f"{t}.pre.raw", f"{t}.pre.sum", "b s n", t),
        routers.sigmoid(f"{name}.pre.sigmoid", f"{t}.pre.sum", f"{t}.pre.gate", "b s n"),
        Op(f"{name}.pre.eps", (f"{t}.pre.gate",), (Tensor(f"{t}.pre", "b s n"),), gradient="same"),
        *_scaled(f"{name}.post", f"{t}.post.raw", f"{t}.post.sum", "b s n", t),
        routers.sigmoid(f"{name}.post.sigmoid", f"{t}.post.sum", f"{t}.post.gate", "b s n"),
        ops.scale(f"{name}.post.twice", f"{t}.post.gate", f"{t}.post", "b s n"),
        *_scaled(f"{name}.comb", f"{t}.comb.raw", f"{t}.comb.sum", "b s n2", t),
        *ops.softmax(f"{name}.comb.softmax", f"{t}.comb.sum", f"{t}.comb.soft", "b s n2"),
        Op(f"{name}.comb.eps", (f"{t}.comb.soft",), (Tensor(f"{t}.comb.0", "b s n2"),), gradient="same"),
    )


def _mixes(name: str, x: str, out: str, weight: str, t: str) -> tuple[Op, ...]:
    """All streams of a token normalised together in fp32, and multiplied."""
    w = Weight(f"{name}.{weight}", f"{out} nh", "mixer", "fp32", rows=1)
    product = ops.linear(f"{name}.{weight}", f"{t}.normed", f"{t}.mixes", out, "nh", "mlp")
    keeps = (Keep(w.name, f"{t}.normed"), Keep(f"{t}.normed", w.name))
    return (
        ops.view(f"{name}.flatten", x, f"{t}.rows", "b s nh"),
        ops.cast(f"{name}.float", f"{t}.rows", f"{t}.flat", "b s nh", "fp32"),
        *plain_norm(f"{name}.input_norm", f"{t}.flat", f"{t}.normed", "b s nh"),
        ops.leave(f"{t}.flat"),
        product._replace(weights=(w,), keeps=keeps),
    )


def _scaled(name: str, x: str, y: str, shape: str, t: str) -> tuple[Op, ...]:
    return (
        times(f"{name}.scale", x, f"{t}.scales", f"{y}.scaled", shape),
        Op(f"{name}.shift", (f"{y}.scaled", f"{t}.bases"), (Tensor(y, shape),), gradient="same"),
    )


def balanced(name: str, iterations: int) -> Iterator[Op]:
    """Sinkhorn and Knopp's iterations: rows and columns are divided by their sums in turn; each division keeps both."""
    t = name
    for i in range(2 * iterations - 1):
        total, shifted = f"{t}.{i}.total", f"{t}.{i}.shifted"
        yield from summed(f"{name}.sum_{i}", f"{t}.{i}", total, "b s n")
        yield Op(f"{name}.eps_{i}", (total,), (Tensor(shifted, "b s n"),), gradient="same")
        yield Op(
            f"{name}.divide_{i}",
            (f"{t}.{i}", shifted),
            (Tensor(f"{t}.{i + 1}", "b s n2"),),
            (),
            (Keep(shifted, f"{t}.{i}"), Keep(f"{t}.{i}", shifted), Keep(shifted, shifted)),
            scratch_back=(Scratch(Tensor("quotient", "b s n2", f"={t}.{i}"), shifted),),
            source=f"{ops.DERIVATIVES}: div.Tensor",
        )


def entered(name: str, x: str, y: str, iterations: int) -> tuple[Op, ...]:
    """From the streams to what a module reads."""
    t = name
    last = f"{t}.comb.{2 * iterations - 1}"
    return (
        *mixed(name, x),
        *balanced(f"{name}.comb", iterations),
        times(f"{name}.weigh", x, f"{t}.pre", f"{t}.weighed", _STREAMS),
        *summed(f"{name}.collapse", f"{t}.weighed", f"{t}.one", "b s h"),
        ops.cast(f"{name}.to", f"{t}.one", y, "b s h", f"={x}"),
        ops.leave(f"{t}.mixes", f"{t}.pre", f"{t}.bases", f"{t}.scales"),
        ops.view(f"{name}.comb", last, f"{t}.comb", "b s n2"),
    )


def left(t: str, x: str, result: str, y: str, held: tuple[str, ...] = ()) -> tuple[Op, ...]:
    """A module's result spread over the streams, and these mixed among each other, added; `t` has their weights."""
    name = f"{t}.out"
    return (
        ops.cast(f"{name}.post", f"{t}.post", f"{t}.post.low", "b s n", f"={x}"),
        # both products are made whole before one of them is summed
        ops.view(f"{name}.weights", f"{t}.post.low", f"{t}.post.rows", _STREAMS, gradient="new"),
        ops.view(f"{name}.result", result, f"{t}.result.rows", _STREAMS, gradient="new"),
        ops.mul(f"{name}.spread", f"{t}.post.rows", f"{t}.result.rows", f"{t}.spread", _STREAMS),
        ops.cast(f"{name}.comb", f"{t}.comb", f"{t}.comb.low", "b s n2", f"={x}"),
        ops.matmul(f"{name}.mix", f"{t}.comb.low", x, f"{t}.mixed", _STREAMS),
        ops.add(f"{name}.add", f"{t}.spread", f"{t}.mixed", y, _STREAMS),
        ops.leave(*held),
    )


# Windows that a query sees


def _windows(name: str, x: str, y: str, w: Windows, width: str, where: str, wiring: Wiring) -> tuple[Op, ...]:
    """The keys of all windows, of a pass over all tokens or of a token after others."""
    if not wiring.decodes:
        return compressor(name, x, y, w, width, where, wiring.caching)
    return token_compressor(name, x, y, w, width, where, w.kind in wiring.begins, w.kind in wiring.fills)


def _made(y: str, w: Windows, wiring: Wiring) -> tuple[Op, ...]:
    """The function that made the keys `y` returns."""
    if not wiring.decodes:
        return (compressed(y, w.kind == "sparse"),)
    return token_compressed(y, w.kind == "sparse", w.kind in wiring.fills)


def indexer(name: str, x: str, latent: str, wiring: Wiring) -> tuple[Op, ...]:
    """The windows a query chooses, `chosen`. Nothing of it gets a gradient, though autograd records it meanwhile."""
    i, w = "index", SPARSE
    laid = ops.view if wiring.decodes else ops.copy  # one token's lie as the product needs them
    scores = f"b s ih {w.number}"
    operations = (
        *_windows(name, x, f"{i}.keys", w, "id", name, wiring),
        *table(f"{i}.q", where="", weighs=False),
        ops.linear(f"{name}.q_b_proj", latent, f"{i}.q0", "ih id", "ql", "attention"),
        *turned(f"{name}.rope_q", f"{i}.q0", f"{i}.query", "b s ih", f"{i}.q", width="id"),
        ops.leave(f"{i}.q0"),
        ops.cast(f"{name}.q_float", f"{i}.query", f"{i}.q32", "b s ih id", "fp32"),
        ops.cast(f"{name}.k_float", f"{i}.keys", f"{i}.k32", f"b {w.number} id", "fp32"),
        lowered(f"{name}.q_lowered", f"{i}.q32", f"{i}.q.given", "b s ih id"),
        lowered(f"{name}.k_lowered", f"{i}.k32", f"{i}.k.given", f"b {w.number} id"),
        # rows of several sequences, which lie head by head, are copied to lie one after another
        laid(f"{name}.q_flat", f"{i}.q.given", f"{i}.q.flat", "b s ih id"),
        laid(f"{name}.k_expand", f"{i}.k.given", f"{i}.k.every", f"several s id {w.number}"),
        Op(
            f"{name}.products",
            (f"{i}.q.flat", f"{i}.k.given", f"{i}.k.every", f"{i}.q.given"),
            (Tensor(f"{i}.products", scores),),
            product="matrix",
        ),
        ops.leave(f"{i}.q32", f"{i}.k32"),
        ops.activation(f"{name}.relu", f"{i}.products", f"{i}.relu", scores),
        ops.scale(f"{name}.scale", f"{i}.relu", f"{i}.scores", scores),
        ops.leave(f"{i}.products"),
        ops.linear(f"{name}.scorer.weights_proj", x, f"{i}.w0", "ih", "h", "attention"),
        ops.cast(f"{name}.scorer.float", f"{i}.w0", f"{i}.w32", "b s ih", "fp32"),
        ops.scale(f"{name}.scorer.scale", f"{i}.w32", f"{i}.w", "b s ih"),
        Op(f"{name}.scorer.weigh", (f"{i}.scores", f"{i}.w"), (Tensor(f"{i}.weighed", scores),)),
        Op(f"{name}.scorer.sum", (f"{i}.weighed",), (Tensor(f"{i}.sum", f"b s {w.number}"),)),
        ops.leave(f"{i}.scores", f"{i}.w"),
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
        ops.leave(f"{i}.best"),
        Op(
            f"{name}.where",
            (f"{i}.top",),
            (Tensor("chosen", "b s tk", "int64"),),
            scratch=(Tensor("invalid", "b s tk", "bool"), Tensor("none", "b s tk", "int64")),
        ),
        ops.leave(f"{i}.top", f"{i}.masked", f"{i}.future", f"{i}.keys", f"{i}.query", f"{i}.q.cos", f"{i}.q.sin"),
        *_made(f"{i}.keys", w, wiring),
    )
    if wiring.decodes:
        return detached(*operations)
    recorded = ops.leave(  # what autograd has recorded goes with the function
        *(f"{i}.{t}" for t in ("relu", "scores", "w", "q.flat", "k32", "k.every")),
        *(f"{i}.keys.c.{t}" for t in ("kv.laid", "soft", "weights", "normed.x32", "normed.n32")),
    )
    return detached(*operations, recorded._replace(recorded=True))


def _windows_mask(w: Windows, decodes: bool) -> tuple[Op, ...]:
    """Which windows a query sees, behind the mask of tokens: of a large one a token sees all before it."""
    shape = f"b s {w.number}"
    if decodes and w.kind == "heavy":
        return (Op("windows.mask", ("mask",), (Tensor("mask.all", f"b s {w.masked}", "=mask"),)),)
    if w.kind == "sparse":
        made = (
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
            ops.leave("chosen", "valid", "safe"),
        )
    else:
        made = (
            Op("windows.zeros", (), (Tensor("windows.zeros", shape, "=compressed"),)),
            Op(
                "windows.bias",
                ("windows.zeros",),
                (Tensor("windows", shape, "=compressed"),),
                scratch=(Tensor("future", f"s {w.number}", "bool"),),
            ),
            ops.leave("windows.zeros"),
        )
    return detached(
        *made,
        ops.cast("windows.to", "windows", "windows.like", shape, "=mask"),
        Op("windows.mask", ("mask", "windows.like"), (Tensor("mask.all", f"b s {w.masked}", "=mask"),)),
    )


# Attention


def _product(name: str, x: str, heads: str, y: str, shape: str, w: Windows) -> tuple[Op, ...]:
    """With one head spread over all: of a single sequence without a copy, of several a copy is made for the product."""
    flat, op = f"{heads}.flat", ops.matmul(name, x, heads, y, shape)
    return (
        Op(f"{name}.flat", (heads,), (Tensor(flat, f"several {w.keys} a d", f"={heads}"),), gradient="none", laid=True),
        op._replace(reads=(*op.reads, flat), keeps=(*op.keeps, Keep(flat, x))),
    )


def sink_attention(name: str, keys: str, y: str, given: str, w: Windows, wiring: Wiring) -> tuple[Op, ...]:
    """Of one head of keys, which are values too, copied for every head of queries; sinks make the softmax fp32."""
    scores, every = f"b a s {w.keys}", f"b a s {w.with_sink}"
    sinks, drop = Weight("self_attn.sinks", "a", "attention", "fp32"), wiring.drops
    contiguous = ops.view if wiring.decodes else ops.copy
    return (
        *(ops.view(f"{name}.repeat_{t}", keys, f"{t}.heads", f"b {w.keys} a d", gradient="new") for t in "kv"),
        *_product(f"{name}.scores", "q", "k.heads", "scores", scores, w),
        ops.scale(f"{name}.scaling", "scores", "scaled", scores),
        Op(f"{name}.add_mask", ("scaled", given), (Tensor("masked", scores),), gradient="same"),
        ops.view(f"{name}.part", "masked", "masked.part", every),
        Op(f"{name}.join", ("masked.part",), (Tensor("joined", every),), (sinks,), gradient="same"),
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
            (Tensor("shifted", every),),
            gradient="same",
            scratch_back=(Scratch(Tensor("negative", every, "=joined"), "largest"),),
        ),
        ops.leave("joined", "largest"),
        *ops.softmax(f"{name}.softmax", "shifted", "softmax", every, "=shifted"),
        ops.view(f"{name}.drop_sink", "softmax", "kept", scores, gradient="new"),
        *((ops.dropout(f"{name}.dropout", "kept", "dropped", scores),) if drop else ()),
        ops.cast(f"{name}.cast", "dropped" if drop else "kept", "probs", scores, "=v.heads"),
        ops.leave("masked"),
        *_product(f"{name}.product", "probs", "v.heads", "heads", "b s a d", w),
        contiguous(f"{name}.contiguous", "heads", y, "b s a d", gradient="new"),
        ops.leave("k.heads", "v.heads", "shifted", "softmax"),
    )


def _window(name: str, turns: str, keeps: tuple[str, ...], wiring: Wiring) -> tuple[Op, ...]:
    """A cache takes the keys of the pass's tokens, and `keeps` those of the window, joined with the ones before."""
    length = Tensor("length of the window", "", "int64")
    if not wiring.decodes:
        return (
            Op(f"{name}.window", (), (length,), holds="cache", source=_CACHE),
            *(Op(name, (turns,), (Tensor(t, "b s d", f"={turns}"),), holds="cache", source=_CACHE) for t in keeps),
            ops.leave(turns),
        )
    found = length._replace(name=f"{length.name} before")
    before = [Tensor(f"{t} before", "b past_window d", f"={turns}") for t in keeps]
    return (
        Op(f"{name}.window", (found.name,), (length,), view=True, holds="cache", past=(found,), source=_CACHE),
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
        ops.leave(turns, *(past.name for past in before)),
    )


def attention(x: str, y: str, w: Windows, wiring: Wiring) -> tuple[Op, ...]:
    n, g, caching = "self_attn", "attention", wiring.caching
    kind = "compress" if w.kind else "main"
    turns = "kv.turned" if caching else "kv"
    w = w if w.kind or not wiring.decodes else w._replace(keys="kv_window", with_sink="kv_window1")
    keys, given = ("kv.all", "mask.all") if w.kind else ("kv", "mask")
    keeps = ("kv",) if w.kind else ("kv", "values of the window")  # a plain layer's are kept twice
    masked = _windows_mask(w, wiring.decodes) if w.kind else ()
    seen = (t.name for op in masked for t in op.writes if t.name in ("mask.all", "windows"))
    more: tuple[Op, ...] = ()
    if w.kind:
        inner = f"{n}.compressor"
        more = (
            *_windows(inner, x, "compressed", w, "d", inner, wiring),
            *(indexer(f"{inner}.indexer", x, "q.normed", wiring) if w.kind == "sparse" else ()),
            *masked,
            *_made("compressed", w, wiring),
            *joined(f"{n}.kv_cat", ("kv", "compressed"), "kv.all", f"b {w.keys} d"),
            ops.leave("kv", "compressed"),
        )
    flatten = ops.view if wiring.decodes and wiring.single else ops.copy
    low = Weight(f"{n}.o_a_proj.weight", "og ol gd", g, matrix=True, rows=2, viewed=True, several=True)
    return (
        ops.linear(f"{n}.q_a_proj", x, "q.low", "ql", "h", g),
        *norm(f"{n}.q_a_norm", "q.low", "q.normed", "b s ql", "ql"),
        ops.leave("q.low"),
        ops.linear(f"{n}.q_b_proj", "q.normed", "q0", "a d", "ql", g),
        ops.view(f"{n}.q_heads", "q0", "q1", "b s a d", gradient="new"),
        *plain_norm(f"{n}.q_b_norm", "q1", "q2", "b s a d"),
        ops.leave("q1"),
        *turned(f"{n}.rope_q", "q2", "q", "b s a", kind),
        ops.leave("q2"),
        ops.linear(f"{n}.kv_proj", x, "kv.low", "d", "h", g),
        *norm(f"{n}.kv_norm", "kv.low", "kv.normed", "b s d", "d"),
        ops.leave("kv.low"),
        *turned(f"{n}.rope_kv", "kv.normed", turns, "b s", kind),
        ops.leave("kv.normed"),
        *(_window(f"{n}.cache", turns, keeps, wiring) if caching else ()),
        *more,
        *sink_attention(f"{n}.attention", keys, "o", given, w, wiring),
        Op(f"{n}.back", (f"{kind}.sin",), (Tensor("minus_sin", "s rot2", f"={kind}.sin"),), gradient="none"),
        *turned(f"{n}.rope_back", "o", "o.back", "b s a", kind, sine="minus_sin"),
        ops.leave("o", "minus_sin"),
        (ops.view if wiring.decodes else ops.copy)(f"{n}.group", "o.back", "o.grouped", "b s a d", gradient="new"),
        Op(
            f"{n}.o_a_proj",
            ("o.grouped",),
            (Tensor("o.low.raw", "b s ogl"),),
            (low,),
            (Keep(low.name, "o.grouped"), Keep("o.grouped", low.name)),
            scratch_back=(Scratch(Tensor("transposed gradient", low.shape, f"={low.name}"), low.name),),
            gradient="view",
            autocast="lower",
            product="matrix",
            source=f"{ops.DERIVATIVES}: bmm",
        ),
        flatten(f"{n}.flatten", "o.low.raw", "o.low", "b s ogl"),
        ops.leave("o.low.raw", "o.grouped"),
        ops.linear(f"{n}.o_b_proj", "o.low", y, "h", "ogl", g),
        ops.leave(
            "q",
            "q.normed",
            keys,
            "o.back",
            "o.low",
            x,
            *seen,
        ),
    )


# Experts


def _limited(name: str, gate: str, up: str, y: str, shape: str) -> tuple[Op, ...]:
    return (
        ops.clamp(f"{name}.clamp_gate", gate, f"{y}.gate", shape, 1),
        ops.clamp(f"{name}.clamp_up", up, f"{y}.up", shape, 2),
        ops.activation(f"{name}.act_fn", f"{y}.gate", f"{y}.act", shape),
        ops.mul(f"{name}.product", f"{y}.act", f"{y}.up", y, shape),
        ops.leave(f"{y}.gate", f"{y}.up"),
    )


def _gated(name: str, x: str, y: str) -> tuple[Op, ...]:
    shape = f"{routers.PAIRS} m"
    return (
        ops.split(f"{name}.chunk", x, (Tensor(f"{y}.gate0", shape), Tensor(f"{y}.up0", shape))),
        *_limited(name, f"{y}.gate0", f"{y}.up0", y, shape),
        ops.leave(x),
    )


def router(name: str, x: str, hashed: bool) -> tuple[Op, ...]:
    """Roots of softplus. `hashed`: a token's experts are looked up by its id."""
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
        ops.leave("router.picked"),
        ops.scale(f"{name}.scale", "router.normal", routers.SCORES, routers.PAIRS),
        ops.leave(scores, "router.normal"),
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
        ops.leave("shared.gate", "shared.up"),
        ops.add("mlp.add", "routed", "shared", y, "b s h"),
        ops.leave("routed", "shared", *routers.HELD, x),
    )


# The model

_KINDS = {"sliding": PLAIN, "sparse": SPARSE, "heavy": HEAVY}


def deepseek_v4(m: ModelSpec, wiring: Wiring) -> Stack:
    iterations = m.whole("hc_sinkhorn_iters", 20)

    def block(layer: Layer) -> Block:
        return Block(
            "model.layers",
            (
                *entered("attn_hc", "x", "c1", iterations),
                *norm("input_layernorm", "c1", "n1", "b s h", "h"),
                *attention("n1", "ao", _KINDS[layer.mixer], wiring),
                *left("attn_hc", "x", "ao", "x1"),
                *entered("ffn_hc", "x1", "c2", iterations),
                ops.leave("c1", "attn_hc.post", "attn_hc.comb"),
                *norm("post_attention_layernorm", "c2", "n2", "b s h", "h"),
                *feed("n2", "mo", layer.ffn == "hashed", m.get("mlp_bias", False)),
                *left("ffn_hc", "x1", "mo", "y", ("c2", "ao", "mo", "probs", "ffn_hc.post", "ffn_hc.comb", "x1")),
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
        ops.copy("model.streams", "tokens", "embeds", _STREAMS, gradient="new"),
        *table("main"),
        *table("compress", weighs=False),
    )
    h = "model.hc_head"
    after = (
        *_mixes(h, "x", "n", "hc_fn", "head"),
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
        times(f"{h}.weigh", "x", "head.pre", "head.weighed", _STREAMS),
        *summed(f"{h}.collapse", "head.weighed", "head.one", "b s h"),
        ops.cast(f"{h}.to", "head.one", "hidden", "b s h", "=x"),
        ops.leave("head.normed", "head.mixes", "head.pre"),
        *norm("model.norm", "hidden", "n", "b s h", "h"),
        ops.leave(
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
