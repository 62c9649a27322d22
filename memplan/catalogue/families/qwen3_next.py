"""Gated delta networks: Qwen3-Next and Qwen3.5, with linear attention in three of four layers.

transformers computes the delta rule with flash-linear-attention's kernels if they are installed, otherwise chunk by
chunk in torch. This is the torch code, exact against a trace of it.

Axes (more in `memplan.program.axes.chunked`):

lk, ldk    key heads, and their width
lv, ldv    value heads, and their width
convolved  channels of q, k and v together
chunk      rows of a chunk
chunks     number of chunks
s_chunks   rows of all chunks
s_conv     rows of a convolution padded at both ends
"""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue.attention.attention import mask_name
from memplan.catalogue.decoder.frame import after, before, decoder_block, returned, runs
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.norms import gemma_norm
from memplan.catalogue.decoder.rotation import attend_heads_first, partly_rotated
from memplan.catalogue.experts import experts, routers
from memplan.catalogue.kernels import ops, packages
from memplan.catalogue.kernels.positions import rotary_angles, rotary_table
from memplan.catalogue.kernels.recurrent import (
    causal_conv,
    cumulate,
    differences,
    exp,
    negative_exp,
    pad,
    unpadded,
)
from memplan.catalogue.kernels.recurrent_step import cached_state, delta_step
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Run, Scratch, Stack, Tensor, Weight
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_SOURCE = "transformers 5.24 models/qwen3_5/modeling_qwen3_5.py"
_ROWS, _QK, _V = "b lv s", "b lv s ldk", "b lv s ldv"
_CHUNKS, _QK_CHUNKS, _V_CHUNKS, _PAIRS = (
    "b lv s_chunks",
    "b lv s_chunks ldk",
    "b lv s_chunks ldv",
    "b lv s_chunks chunk",
)


def l2_norm(name: str, x: str, y: str, shape: str) -> tuple[Op, ...]:
    """`x * rsqrt((x * x).sum(-1) + eps)`."""
    row = shape.rsplit(" ", 1)[0]
    square, total, shifted, inverse = (f"{y}.{part}" for part in ("square", "sum", "shifted", "inverse"))
    return (
        ops.product_with_itself(f"{name}.square", x, square, shape),
        Op(f"{name}.sum", (square,), (Tensor(total, row),), source=f"{ops.DERIVATIVES}: sum.dim_IntList"),
        ops.add_number(f"{name}.eps", total, shifted, row),
        ops.rsqrt(f"{name}.rsqrt", shifted, inverse, row),
        ops.spread(f"{name}.scale", x, inverse, y, shape),
    )


def chunked_delta_rule(name: str, y: str, repeats: bool, wide: bool) -> tuple[Op, ...]:
    """torch_chunk_gated_delta_rule: from `query`, `key` (`b s lk ldk`), `value`, `g` and `beta` to `b s lv ldv`.

    repeats  each key head serves several value heads
    wide     the inputs are fp32

    No cast lays out `wide` inputs head by head. Padding does; if the sequence is a multiple of the chunk, every product
    makes its own copy instead. Without `repeats`, the product of a single chunk reads them as the convolution left
    them.
    """
    of = name
    whole = ("s_whole" if repeats else "s_whole_two") if wide else ""
    q, k = ("query.all", "key.all") if repeats else ("query", "key")
    return (
        *(
            ops.copy(f"{of}.repeat_{t}", t, f"{t}.all", "b s lv ldk", gradient="new")
            for t in ("query", "key")
            if repeats
        ),
        ops.cast(f"{of}.query_float", q, "q32", _QK, "fp32"),
        ops.cast(f"{of}.key_float", k, "k32", _QK, "fp32"),
        ops.cast(f"{of}.value_float", "value", "v32", _V, "fp32"),
        ops.cast(f"{of}.beta_float", "beta", "beta32", _ROWS, "fp32"),
        *((ops.release_names("query.all", "key.all"),) if repeats else ()),
        *l2_norm(f"{of}.query_norm", "q32", "q.normed", _QK),
        *l2_norm(f"{of}.key_norm", "k32", "k.normed", _QK),
        ops.scale(f"{of}.scaling", "q.normed", "q.scaled", _QK),
        pad(f"{of}.pad_query", "q.scaled", "q.rows", _QK_CHUNKS),
        pad(f"{of}.pad_key", "k.normed", "k.rows", _QK_CHUNKS),
        pad(f"{of}.pad_value", "v32", "v.rows", _V_CHUNKS),
        ops.release_names("q.scaled", "k.normed", "v32"),
        pad(f"{of}.pad_beta", "beta32", "beta.rows", _CHUNKS),
        pad(f"{of}.pad_decay", "g", "decay", _CHUNKS),
        ops.release_names("beta32"),
        ops.spread(f"{of}.v_beta", "v.rows", "beta.rows", "v.beta", _V_CHUNKS),
        ops.spread(f"{of}.k_beta", "k.rows", "beta.rows", "k.beta", _QK_CHUNKS),
        ops.view(f"{of}.query_chunks", "q.rows", "q.chunks", _QK_CHUNKS),
        ops.view(f"{of}.key_chunks", "k.rows", "k.chunks", _QK_CHUNKS, gradient="view"),
        ops.view(f"{of}.k_beta_chunks", "k.beta", "k.beta.chunks", _QK_CHUNKS, gradient="new"),
        ops.view(f"{of}.v_beta_chunks", "v.beta", "v.beta.chunks", _V_CHUNKS, gradient="new"),
        Op(
            f"{of}.mask",
            (),
            (Tensor("later", "chunk chunk", "bool"),),
            scratch=(Tensor("ones", "chunk chunk", "bool"),),
        ),
        cumulate(f"{of}.cum_decay", "decay", "cum", _CHUNKS),
        differences(f"{of}.differences", "cum", "pairs.difference", _PAIRS),
        ops.masked_fill(f"{of}.causal", "pairs.difference", "later", "pairs.masked", _PAIRS),
        exp(f"{of}.pairwise_decay", "pairs.masked", "pairs", _PAIRS)._replace(autocast="fp32"),
        *_product(f"{of}.keys", "k.beta.chunks", "k.chunks", "keys", whole),
        ops.mul(f"{of}.ut_system", "keys", "pairs", "system", _PAIRS),
        *_product(f"{of}.scores", "q.chunks", "k.chunks", "scores", whole),
        ops.mul(f"{of}.intra_chunk", "scores", "pairs", "intra", _PAIRS),
        exp(f"{of}.decay_of_keys", "cum", "cum.k_beta", _CHUNKS)._replace(autocast="fp32"),
        ops.spread(f"{of}.decayed_k_beta", "k.beta.chunks", "cum.k_beta", "k.beta.decayed", _QK_CHUNKS),
        _solve(f"{of}.new_values", "v.beta.chunks", "values", _V_CHUNKS, wide),
        _solve(f"{of}.k_cumdecay", "k.beta.decayed", "k.cumulated", _QK_CHUNKS, wide),
        Op(f"{of}.zeros", (), (Tensor("outputs.zero", _V_CHUNKS, "fp32"),)),
        exp(f"{of}.decay_of_queries", "cum", "cum.query", _CHUNKS)._replace(autocast="fp32"),
        _decayed(f"{of}.decayed_query", "q.chunks", "cum.query", "q.decayed"),
        differences(f"{of}.to_the_end", "cum", "cum.left", _CHUNKS),
        exp(f"{of}.decay_of_states", "cum.left", "cum.key", _CHUNKS)._replace(autocast="fp32"),
        ops.view(f"{of}.several_keys", "k.chunks", "k.several", "b lv s_two ldk"),
        _decayed(f"{of}.decayed_key", "k.several", "cum.key", "k.decayed")._replace(gradient="view"),
        exp(f"{of}.chunk_decay", "cum", "cum.chunk", "b lv chunks")._replace(autocast="fp32"),
        *_scan(f"{of}.scan", wide and repeats),
        ops.copy(f"{of}.flatten", "outputs", "outputs.flat", _V_CHUNKS, gradient="same"),
        ops.release_names("outputs"),
        ops.view(f"{of}.rows", "outputs.flat", "outputs.rows", _V, gradient="new"),
        ops.copy(f"{of}.cast", "outputs.rows", y, "b s lv ldv")._replace(
            writes=(Tensor(y, "b s lv ldv", "=query"),), gradient="new"
        ),
        ops.release_names("outputs.flat"),
        ops.release_names("q.decayed", "q.decayed.one", "k.decayed", "k.decayed.one"),
        ops.release_names("v.rows", "beta.rows", "decay", "v.beta", "k.beta", "later", "cum"),
        ops.release_names("pairs", "system", "intra", "k.beta.decayed", "values", "k.cumulated", "cum.chunk"),
        ops.release_names("corrected.last", "read"),
    )


def _product(name: str, a: str, b: str, y: str, copied: str) -> tuple[Op, ...]:
    """Rows by columns of every chunk.

    `copied` is the axis of rows that are not stored head by head: they are copied so, and the copies are kept.
    """
    product = ops.matmul(name, a, b, y, _PAIRS)
    if not copied:
        return (product,)
    copies = (f"{y}.rows", f"{y}.columns")
    return (
        *(_copy_by_head(f"{name}.flatten", x, t, copied) for x, t in zip((a, b), copies, strict=True)),
        product._replace(keeps=(Keep(copies[1], a), Keep(copies[0], b))),
        ops.release_names(*copies),
    )


def _copy_by_head(name: str, x: str, y: str, rows: str) -> Op:
    """A copy that is stored head by head."""
    return Op(name, (x,), (Tensor(y, f"b lv {rows} ldk", "fp32"),), gradient="none")


def _solve(name: str, x: str, y: str, shape: str, wide: bool) -> Op:
    """Solve a triangular system for every chunk. The system's gradient is a product, negated, and its triangle.

    Queries that were padded, and so need no copy, are kept for their product with the keys.
    """
    padded = (Scratch(Tensor("padded queries", "b lv s_padded ldk", "fp32")),) if wide else ()
    return Op(
        name,
        ("system", x),
        (Tensor(y, shape),),
        (),
        tuple(Keep(what, of) for of in ("system", x) for what in ("system", y)),
        scratch_back=(Scratch(Tensor("product", _PAIRS, f"={x}"), "system"), *padded),
        source=f"{ops.DERIVATIVES}: linalg_solve_triangular",
    )


def _decayed(name: str, x: str, decay: str, y: str) -> Op:
    """`x * decay`, with one output for a single chunk, of which the scan keeps nothing, and one for several."""
    op = ops.spread(name, x, decay, y, _QK_CHUNKS)
    return op._replace(writes=(Tensor(y, "b lv s_two ldk"), Tensor(f"{y}.one", "b lv s_one ldk")))


def _scan(name: str, copied: bool) -> tuple[Op, ...]:
    """The loop over chunks as one operation, and what autograd keeps of all chunks.

    That is each chunk's first state, its corrected values, and what they are multiplied by, with two exceptions:
    nothing that multiplies the zero state of the first chunk is kept, and nothing that makes the last state, which is
    not read. Autocast casts what is multiplied chunk by chunk: each state and its corrected values twice. `copied`:
    each chunk of the queries and keys is copied.

    In backward every chunk's part of a gradient is expanded to the full size and added. The most is alive when the
    second chunk from the end is done: the gradients of all five inputs, and two more of the outputs' or one more of the
    largest.
    """
    some, state, chunk = "b lv s_later ldk", "b lv ldk ldv", "b lv chunk ldv"
    products = {"k.cumulated": some, "q.decayed": some, "intra": "b lv s_later chunk", "k.decayed": some}
    last = {"state.last": state, "corrected.last": chunk}
    kept_shapes = {**last, "states": "b lv later ldk ldv", "corrected": "b lv s_later ldv"}
    casts = {f"{t}.{part}": t for t in kept_shapes for part in ("low", "again")}
    last_operands = ("corrected.last.again", "k.decayed.last")  # released with the last state, made of them
    operands = ("values", "k.cumulated", "q.decayed", "q.decayed.one", "intra", "k.decayed", "cum.chunk")
    kept_reads = (
        *(f"{t}.low" for t in products),
        "intra.last",
        "states",
        *(y for y in casts if y not in last_operands),
    )
    sums = (
        Tensor("decayed state", state, "fp32"),
        Tensor("product", state, "=k.decayed.low"),
        Tensor("sum", state, "fp32"),
    )
    parts = tuple(Scratch(Tensor(f"of a chunk {i}", "b lv slice ldv", "fp32")) for i in range(2))

    def part(t: str, y: str, shape: str, laid: str = "") -> tuple[Op, ...]:
        """Some rows of `t`, cast or copied chunk by chunk. If neither is needed, they are a view."""
        if copied and laid:
            return (_copy_by_head(f"{name}.{y}", t, y, laid)._replace(needs_recording=True),)
        rows = ops.view(f"{name}.{y}.rows", t, f"{y}.rows", shape, gradient="none")
        return (
            rows._replace(needs_recording=True),
            ops.lowered(f"{name}.{y}", f"{y}.rows", y, shape)._replace(needs_recording=True),
        )

    return (
        *(
            Op(f"{name}.{t}", ("values",), (Tensor(t, shape, "fp32"),), gradient="none", needs_recording=t not in last)
            for t, shape in kept_shapes.items()
        ),
        *(op for y, t in casts.items() for op in part(t, y, kept_shapes[t])),
        *(
            op
            for t, shape in products.items()
            for op in part(t, f"{t}.low", shape, "s_laid" if t in ("q.decayed", "k.decayed") else "")
        ),
        *part("k.decayed", "k.decayed.last", "b lv chunk ldk", "copied"),
        *(op._replace(needs_recording=False) for op in part("intra", "intra.last", "b lv chunk chunk")),
        Op(
            name,
            (*operands, *kept_reads),
            (Tensor("outputs", _V_CHUNKS, "fp32"), Tensor("read", chunk, "=intra.low")),
            (),
            tuple(Keep(what, of) for of in operands for what in (*kept_reads, "cum.chunk")),
            scratch=(Tensor("of the outputs", chunk, "=intra.low"), Tensor("sum", chunk, "=intra.low")),
            scratch_back=(Scratch(Tensor("of the chunk before", "b lv s_two widest", "fp32")), *parts),
            source=f"{_SOURCE} torch_chunk_gated_delta_rule",
        ),
        Op(f"{name}.update", ("state.last", "outputs", *last_operands), scratch=sums),
    )


def gated_norm(name: str, x: str, gate: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """Qwen3NextRMSNormGated: normalised, then multiplied by silu of the gate in fp32. Its variances live to its end.

    Liger has no kernel for it (liger-kernel 0.8.5 transformers/monkey_patch.py), so it is no unit to fuse.
    """
    *normalise, returns = (op._replace(unit="") for op in ops.rms_norm(name, x, f"{y}.normed", shape, axis))
    mean, wide = returns.reads
    return (
        *normalise,
        returns._replace(reads=(wide,)),
        ops.cast(f"{name}.gate_float", gate, f"{y}.gate32", shape, "fp32"),
        ops.activation(f"{name}.silu", f"{y}.gate32", f"{y}.act", shape),
        ops.mul(f"{name}.product", f"{y}.normed", f"{y}.act", f"{y}.wide", shape),
        ops.cast(f"{name}.cast_back", f"{y}.wide", y, shape, f"={x}"),
        ops.release_names(x, mean),
    )


def split_projections(n: str, x: str) -> tuple[Op, ...]:
    """Qwen3.5's projections: one for q, k and v together, and one each for the gate `z`, `b` and `a`."""
    return (
        ops.linear(f"{n}.in_proj_qkv", x, "qkv.flat", "convolved", "h", "mixer"),
        ops.view(f"{n}.qkv", "qkv.flat", "qkv", "b s convolved", gradient="new"),
        ops.linear(f"{n}.in_proj_z", x, "z", "lv ldv", "h", "mixer"),
        ops.linear(f"{n}.in_proj_b", x, "b.flat", "lv", "h", "mixer"),
        ops.view(f"{n}.b", "b.flat", "b_", "b s lv", gradient="new"),
        ops.linear(f"{n}.in_proj_a", x, "a_", "lv", "h", "mixer"),
    )


def joined_projections(n: str, x: str) -> tuple[Op, ...]:
    """Qwen3-Next's projections: q, k, v and z in one, grouped by key head, and b and a in another.

    All are copied out; q, k and v are then concatenated.
    """
    parts = tuple(Tensor(f"{t}.part", f"b s {w}") for t, w in (("q", "lk ldk"), ("k", "lk ldk"), ("v", "lv ldv")))
    return (
        ops.linear(f"{n}.in_proj_qkvz", x, "qkvz", "projected", "h", "mixer"),
        ops.linear(f"{n}.in_proj_ba", x, "ba", "2 lv", "h", "mixer"),
        ops.split(f"{n}.split", "qkvz", (*parts, Tensor("z.part", "b s lv ldv"))),
        ops.split(f"{n}.split_ba", "ba", (Tensor("b.part", "b s lv"), Tensor("a.part", "b s lv"))),
        ops.copy(f"{n}.value", "v.part", "v.copy", "b s lv ldv"),
        ops.copy(f"{n}.z", "z.part", "z", "b s lv ldv"),
        ops.copy(f"{n}.b", "b.part", "b_", "b s lv"),
        ops.copy(f"{n}.a", "a.part", "a_", "b s lv"),
        ops.copy(f"{n}.query", "q.part", "q.copy", "b s lk ldk"),
        ops.copy(f"{n}.key", "k.part", "k.copy", "b s lk ldk"),
        ops.cat(f"{n}.cat", ("q.copy", "k.copy", "v.copy"), "qkv", "b s convolved", gradient="new"),
    )


def gated_delta_net(
    m: ModelSpec,
    wiring: Wiring,
    x: str,
    y: str,
    name: str = "linear_attn",
    norm: Callable[..., tuple[Op, ...]] = gated_norm,
) -> tuple[Op, ...]:
    """Projections, a convolution over q, k and v, the delta rule, a gated norm of each head, the output projection."""
    n = name
    repeats = m.config_int("linear_num_key_heads") != m.config_int("linear_num_value_heads")
    parts = (Tensor("query", "b s lk ldk"), Tensor("key", "b s lk ldk"), Tensor("value", "b s lv ldv"))
    joined = m.model_type == "qwen3_next"
    rule = (
        (packages.gated_delta_rule(f"{n}.rule", "core", repeats),)
        if "fla" in wiring.packages
        else chunked_delta_rule(f"{n}.rule", "core", repeats, wiring.has_fp32_inputs)
    )
    return (
        *(joined_projections if joined else split_projections)(n, x),
        *causal_conv(f"{n}.conv1d", "qkv", "mixed", "convolved", False, wiring=wiring),
        *((ops.release_names("q.copy", "k.copy", "v.copy"),) if joined else ()),
        ops.split(f"{n}.split_qkv", "mixed", parts),
        exp(f"{n}.sigmoid", "b_", "beta", "b s lv"),
        *negative_exp(f"{n}.A_log", "decay_rate", "lv"),
        ops.cast(f"{n}.a_float", "a_", "a32", "b s lv", "fp32"),
        ops.add_weight(f"{n}.dt", "a32", "dt", "b s lv", Weight(f"{n}.dt_bias", "lv", "mixer"), "fp32"),
        ops.activation(f"{n}.softplus", "dt", "dt.plus", "b s lv"),
        ops.spread(f"{n}.g", "dt.plus", "decay_rate", "g", "b s lv"),
        *(() if wiring.decodes else rule),
        *cached_state(wiring, f"{n}.state", "state", "b lv ldk ldv", "fp32", "g"),
        *(delta_step(f"{n}.rule", "core", repeats) if wiring.decodes else ()),
        *norm(f"{n}.norm", "core", "z", "core.gated", shape="b s lv ldv", axis="ldv"),
        ops.linear(f"{n}.out_proj", "core.gated", y, "h", "lv ldv", "mixer"),
        ops.release_names("mixed", "z", "b_", "a_", "beta", "g", *(("qkvz", "ba") if joined else ()), x),
        *((ops.release_names("state.now"),) if wiring.decodes else ()),
    )


def gated_attention(m: ModelSpec, wiring: Wiring, x: str, y: str, name: str = "self_attn") -> tuple[Op, ...]:
    """Attention whose output is multiplied by the sigmoid of a gate from the query projection."""
    g, bias = "attention", m.get("attention_bias", False)
    grouped = m.num_key_value_heads != m.num_attention_heads
    return (
        ops.linear(f"{name}.q_proj", x, "qg", "a 2 d", "h", g, bias),
        ops.split(f"{name}.chunk", "qg", (Tensor("q1", "b s a d"), Tensor("gate.part", "b s a d"))),
        ops.copy(f"{name}.gate", "gate.part", "gate.heads", "b s a d"),
        *gemma_norm(f"{name}.q_norm", "q1", "q2", "b s a d", "d"),
        ops.release_names("q1"),
        ops.linear(f"{name}.k_proj", x, "k0", "k d", "h", g, bias),
        ops.view(f"{name}.k_heads", "k0", "k1", "b s k d", "new"),
        *gemma_norm(f"{name}.k_norm", "k1", "k2", "b s k d", "d"),
        ops.release_names("k1"),
        ops.linear(f"{name}.v_proj", x, "v", "k d", "h", g, bias),
        *partly_rotated(m, name, "q2", "k2"),
        ops.release_names("q2", "k2"),
        *attend_heads_first(f"{name}.attention", "q", "k", "v", "o", wiring, grouped, False, mask_name(False)),
        exp(f"{name}.sigmoid", "gate.heads", "gate.open", "b s a d"),
        ops.mul(f"{name}.gated", "o", "gate.open", "o.gated", "b s a d"),
        ops.linear(f"{name}.o_proj", "o.gated", y, "h", "a d", g, bias),
        ops.release_names("q", "k", "v", "o", "gate.heads", "o.gated", x),
    )


def table() -> tuple[Op, ...]:
    """cos and sin from every sequence's positions in time, height and width; each frequency uses one of the three."""
    f, source = "fp32", f"{_SOURCE} Qwen3_5TextRotaryEmbedding"
    shape = "3 b s rot2"
    return (
        rotary_angles(source, "3 b s"),
        Op("rotary.cos", ("angles",), (Tensor("cos3", shape, f),), scratch=(Tensor("cosine", shape, f),)),
        Op("rotary.sin", ("angles",), (Tensor("sin3", shape, f),), scratch=(Tensor("sine", shape, f),)),
        Op("rotary.join_sin", ("sin3",), (Tensor("sin32", "b s rot", f),)),
        Op("rotary.join_cos", ("cos3",), (Tensor("cos32", "b s rot", f),)),
        Op("rotary.cast_cos", ("cos32",), (Tensor("cos", "b s rot", "=embeds"),), cast=True, source=source),
        Op("rotary.cast_sin", ("sin32",), (Tensor("sin", "b s rot", "=embeds"),), cast=True, source=source),
        ops.release_names("angles", "cos32", "sin32"),
    )


def block(m: ModelSpec, wiring: Wiring, layer: Layer, mlp: tuple[Op, ...]) -> Block:
    """One layer: linear or full attention, then `mlp`, the MLP or the experts from `n2` to `mo`."""
    if layer.mixer == "linear_attention":
        linear = (
            *unpadded(wiring, "n1", "n1.real", "b s h"),
            *gated_delta_net(m, wiring, "n1.real", "ao"),
            ops.release_names("n1"),
        )
        return decoder_block(linear, mlp, norm=gemma_norm, held=("cos", "sin"))  # every layer takes them as arguments
    return decoder_block(gated_attention(m, wiring, "n1", "ao"), mlp, norm=gemma_norm, held=returned(wiring))


def shared_mixture(x: str, y: str, normalise: bool, by_name: bool) -> tuple[Op, ...]:
    """Routed experts plus a shared expert that a separate gate scales, which is computed first.

    `by_name`: peft finds the stacked experts by the names that their linear layers had.
    """
    named = ("gate",), ("gate_proj", "up_proj"), ("down_proj",)
    router, up, down = named if by_name else ((), (), ())
    return (
        *gated_mlp(x, "shared.whole", "mlp.shared_expert", width="fs", flat=True),
        *routers.softmax_router("mlp.gate", x, normalise, stands_for=router),
        *experts.experts(x, "routed", gate_up=up, down=down),
        ops.linear("mlp.shared_expert_gate", x, "shared.gate", "1", "h", "mlp", flat=True),
        exp("mlp.shared_expert_gate.sigmoid", "shared.gate", "shared.share", "b s 1"),
        ops.spread("mlp.shared_expert_gate.product", "shared.whole", "shared.share", "shared", "b s h"),
        ops.release_names("shared.whole"),
        ops.add("mlp.add", "routed", "shared", y, "b s h"),
        ops.release_names("routed", "shared", *routers.HELD, x),
    )


def blocks(m: ModelSpec, wiring: Wiring) -> tuple[Run, ...]:
    """The decoder's layers, each with its mixer, and with experts or an MLP."""
    is_next = m.model_type == "qwen3_next"
    has_experts = any(layer.ffn == "experts" for layer in m.layers)
    normalise = m.get("norm_topk_prob", True) if is_next else True
    mixture = shared_mixture("n2", "mo", normalise, is_next) if has_experts else ()
    mlp = gated_mlp("n2", "mo")
    return runs(m, lambda layer: block(m, wiring, layer, mixture if layer.ffn == "experts" else mlp))


def qwen3_5(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Qwen3.5's text models, with experts or without, and Qwen3-Next."""
    rotary = rotary_table("embeds") if m.model_type == "qwen3_next" else table()
    return Stack(before(wiring, table=rotary), blocks(m, wiring), after(m, wiring, norm=gemma_norm))


BUILDERS = {"qwen3_5_moe_text": qwen3_5, "qwen3_5_text": qwen3_5, "qwen3_next": qwen3_5}
