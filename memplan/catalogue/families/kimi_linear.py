"""Kimi Linear: a delta rule with a decay per channel, latent attention without rotation, experts.

transformers computes the delta rule with flash-linear-attention's kernels if they are installed
(`memplan.catalogue.kernels.packages`), otherwise chunk by chunk in torch. Below is the torch code, exact against a
trace of it. In three tensors it holds a number for every two rows of a chunk and every channel of a key, which is most
of what a layer takes: `_CUBE`.

Axes (more in `memplan.program.axes.chunked`):

lv, ldk    heads, and their width
convolved  channels of q, k and v together
chunk      rows of a chunk
chunks     number of chunks, of which `later` are not the first
s_chunks   rows of all chunks
s_later    rows of the `later` chunks

Source: transformers 5.24 models/kimi_linear/modeling_kimi_linear.py.
"""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue.attention.attention import cached
from memplan.catalogue.attention.latent import attend, expanded_keys, latent_queries
from memplan.catalogue.decoder.frame import before, decoder_block, lm_head, masks, returned, runs
from memplan.catalogue.experts import routers
from memplan.catalogue.families import kimi_k3
from memplan.catalogue.families.kimi_k3 import attention_residual, residual_sums_name
from memplan.catalogue.kernels import ops, packages
from memplan.catalogue.kernels.recurrent import causal_conv, cumulate, differences, exp, pad, unpadded
from memplan.catalogue.kernels.recurrent_step import cached_state, kda_step
from memplan.catalogue.kernels.rewriting import rewrite_weights
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Scratch, Stack, Tensor, Weight
from memplan.models.configs.mla import has_k3_parts
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_INPUT, _HEADS = "b s lv ldk", "b lv s ldk"
_ROWS, _NUMBERS, _SQUARE = "b lv s_chunks ldk", "b lv s_chunks", "b lv s_chunks chunk"
_CUBE, _BEFORE = "b lv s_chunks chunk ldk", "b lv s_later ldk"
CHUNK = 64
_LOCALS = ("inter", "intra", "recalled", "corrected")  # of the last chunk, held until the function returns


def _l2_norm(name: str, x: str, y: str) -> tuple[Op, ...]:
    """`x / sqrt((x * x).sum(-1) + eps)`."""
    row = "b lv s"
    square, total, shifted, root = (f"{y}.{part}" for part in ("square", "sum", "shifted", "root"))
    return (
        ops.product_with_itself(f"{name}.square", x, square, _HEADS),
        Op(f"{name}.sum", (square,), (Tensor(total, row),), source=f"{ops.DERIVATIVES}: sum.dim_IntList"),
        ops.add_number(f"{name}.eps", total, shifted, row),
        exp(f"{name}.sqrt", shifted, root, row),
        ops.divide(name, x, root, y, _HEADS, quotient=f"={y}"),
        ops.release_names(root),
    )


def _chunked_delta_rule(name: str, y: str, at_once: bool = False, records: bool = True) -> tuple[Op, ...]:
    """chunk_kimi_delta_attention: from `query`, `key`, `value`, `g` and `beta` to the heads' outputs.

    Backward holds the most when the second chunk from the end is done.

    at_once  the rows of the inverse are one operation
    records  autograd records, and the loop over chunks is described by what it keeps
    """
    n, f, ones = name, "fp32", Tensor("ones", "chunk chunk", "bool")
    inputs = {"query": _INPUT, "key": _INPUT, "value": _INPUT, "beta": "b s lv", "g": _INPUT}
    return (
        *(
            op
            for t, shape in inputs.items()
            for op in (
                ops.copy(f"{n}.{t}_heads", t, f"{t}.heads", shape),
                ops.cast(f"{n}.{t}_float", f"{t}.heads", f"{t}32", shape, f),
            )
        ),
        *_l2_norm(f"{n}.query_norm", "query32", "q.normed"),
        *_l2_norm(f"{n}.key_norm", "key32", "k.normed"),
        pad(f"{n}.pad_query", "q.normed", "q.rows", _ROWS),
        ops.scale(f"{n}.scaling", "q.rows", "q", _ROWS),
        pad(f"{n}.pad_key", "k.normed", "k", _ROWS),
        ops.release_names("q.normed", "k.normed"),
        pad(f"{n}.pad_value", "value32", "v.rows", _ROWS),
        pad(f"{n}.pad_decay", "g32", "decay", _ROWS),
        pad(f"{n}.pad_beta", "beta32", "beta.rows", _NUMBERS),
        ops.release_names("value32", "g32", "beta32"),
        ops.spread(f"{n}.v_beta", "v.rows", "beta.rows", "v.beta", _ROWS),
        ops.spread(f"{n}.k_beta", "k", "beta.rows", "k.beta", _ROWS),
        cumulate(f"{n}.cum_decay", "decay", "cum", _ROWS),
        *(Op(f"{n}.{t}", (), (Tensor(t, "chunk chunk", "bool"),), scratch=(ones,)) for t in ("not before", "after")),
        *_pairs(n),
        *(_inverse_at_once if at_once else _inverse)(f"{n}.rows", "pairs.0"),
        ops.matmul(f"{n}.new_values", "attn", "v.beta", "values", _ROWS),
        ops.release_names("v.rows"),
        exp(f"{n}.decay_of_keys", "cum", "cum.exp", _ROWS)._replace(autocast=f),
        ops.mul(f"{n}.decayed_k_beta", "k.beta", "cum.exp", "k.beta.decayed", _ROWS),
        ops.release_names("cum.exp"),
        ops.matmul(f"{n}.k_cumdecay", "attn", "k.beta.decayed", "k.cumulated", _ROWS),
        ops.release_names("k.beta.decayed"),
        Op(f"{n}.also_after", (), (Tensor("also after", "chunk chunk", "bool"),), scratch=(ones,)),
        ops.release_names("not before"),
        *(_scan if records else _scan_one_chunk)(f"{n}.scan"),
        ops.copy(f"{n}.contiguous", "outputs", "outputs.rows", _INPUT),
        ops.cast(f"{n}.cast", "outputs.rows", y, _INPUT, "=query"),
        ops.release_names(
            "outputs", "q", "k", "beta.rows", "v.beta", "k.beta", "cum", "after", "also after", "factors", "attn"
        ),
        ops.release_names(*(("scan.last",) if records else tuple(f"scan.{t}" for t in _LOCALS))),
        ops.release_names("values", "k.cumulated", f"row{CHUNK - 1}", f"rest{CHUNK - 1}"),
    )


def _pairwise_product(name: str, x: str, other: str, y: str) -> Op:
    """Multiply each row of one by each row of the other, channel by channel."""
    sums = tuple(Scratch(Tensor(f"before the sum of {of}", _CUBE, "fp32"), of, summed=True) for of in (x, other))
    source = f"{ops.DERIVATIVES}: mul.Tensor"
    return Op(name, (x, other), (Tensor(y, _CUBE),), (), (Keep(other, x), Keep(x, other)), (), sums, source=source)


def _pairs(n: str) -> tuple[Op, ...]:
    """How much each key of a chunk corrects each later one (`pairs.0`), and how far a key has decayed (`factors`)."""
    return (
        differences(f"{n}.differences", "cum", "differences", _CUBE),
        ops.masked_fill(f"{n}.causal", "differences", "after", "differences.masked", _CUBE),
        ops.release_names("differences"),
        exp(f"{n}.decay", "differences.masked", "factors", _CUBE)._replace(autocast="fp32"),
        ops.release_names("differences.masked"),
        _pairwise_product(f"{n}.keys", "k.beta", "k", "keys"),
        Op(f"{n}.decayed_keys", ("keys", "factors"), (Tensor("keys.decayed", _CUBE),), gradient="none"),
        ops.release_names("keys.decayed"),
        Op(  # its gradient is the sum's, expanded
            f"{n}.sum",
            ("keys", "factors"),
            (Tensor("sums", _SQUARE),),
            (),
            (Keep("factors", "keys"), Keep("keys", "factors")),
            source=f"{ops.DERIVATIVES}: mul.Tensor, sum.dim_IntList",
        ),
        ops.release_names("keys"),
        ops.masked_fill(f"{n}.strictly_causal", "sums", "not before", "sums.masked", _SQUARE),
        ops.release_names("sums"),
        ops.scale(f"{n}.negative", "sums.masked", "pairs.0", _SQUARE),
        ops.release_names("sums.masked"),
    )


def _inverse(n: str, x: str) -> tuple[Op, ...]:
    """Forward substitution row by row, in place, plus the identity. Copies of each row and those above it are kept."""
    out: list[Op] = []
    whole = Tensor("whole", _SQUARE, "fp32")
    for i in range(1, CHUNK):
        row, rest, result = f"row{i}", f"rest{i}", f"pairs.{i}"
        row_shape, square = f"b lv chunks {i}", f"b lv chunks {i} {i}"
        out += (
            Op(
                f"{n}.{i}.clone",
                (x,),
                (Tensor(row, row_shape), Tensor(rest, square)),
                scratch_back=(Scratch(whole),),
                source=f"{ops.DERIVATIVES}: clone, slice",
            ),
            Op(
                f"{n}.{i}.set",
                (x, row, rest),
                (Tensor(result, _SQUARE),),
                (),
                (Keep(rest, row), Keep(row, rest)),
                scratch=(Tensor("product", square, "fp32"), Tensor("sum", row_shape, "fp32")),
                scratch_back=(Scratch(Tensor("product", square, "fp32"), row),),
                view=True,
                source="torch 2.13 torch/csrc/autograd/functions/tensor.cpp CopySlices",
            ),
        )
        x = result
    return (*out, *_add_identity(n, x))


def _inverse_at_once(n: str, x: str) -> tuple[Op, ...]:
    """`_inverse` as one operation, for models with many different layers.

    It keeps the same elements in one tensor. In backward, what is alive is what one row needs.
    """
    last, whole = CHUNK - 1, Tensor("whole", _SQUARE, "fp32")
    kept = sum(i + i * i for i in range(1, last))
    product = Tensor("product", f"b lv chunks {last} {last}", "fp32")
    rows = (Tensor(f"row{last}", f"b lv chunks {last}"), Tensor(f"rest{last}", product.shape))
    names = ("rows.kept", *(t.name for t in rows))
    return (
        Op(f"{n}.clone", (x,), rows, gradient="none"),
        Op(
            f"{n}.kept",
            (x,),
            (Tensor("rows.kept", f"b lv chunks {kept}", "fp32"),),
            gradient="none",
            needs_recording=True,
        ),
        Op(
            f"{n}.set",
            (x, *names),
            (Tensor(f"pairs.{last}", _SQUARE),),
            (),
            tuple(Keep(name, x) for name in names),
            scratch=(product, Tensor("sum", f"b lv chunks {last}", "fp32")),
            scratch_back=(Scratch(whole), Scratch(product)),
            view=True,
            source="torch 2.13 torch/csrc/autograd/functions/tensor.cpp CopySlices",
        ),
        ops.release_names("rows.kept")._replace(needs_recording=True),
        *_add_identity(n, f"pairs.{last}"),
    )


def _add_identity(n: str, x: str) -> tuple[Op, ...]:
    eye = Tensor("eye", "chunk chunk", "fp32")
    return (
        Op(f"{n}.identity", (x,), (Tensor("attn", _SQUARE),), scratch=(eye,), gradient="same", source=ops.DERIVATIVES),
        ops.release_names(x),
    )


def _scan(name: str) -> tuple[Op, ...]:
    """The loop over chunks as one operation, and what autograd keeps of all chunks.

    The state before the first chunk has no gradient, and the one after the last is discarded; neither keeps what the
    others do. Autocast casts what is multiplied chunk by chunk: each state and its corrected values twice.
    """
    kept_shapes = {
        "q.factors": _ROWS,
        "q.decayed": _BEFORE,
        "q.k": _CUBE,
        "intra": _SQUARE,
        "corrected": _ROWS,
        "states": "b lv chunks ldk ldk",
        "k.factors": _BEFORE,
        "k.decayed": _BEFORE,
        "end": "b lv later ldk",
    }
    twice = {f"{t}.{part}": t for t in ("states", "corrected") for part in ("low", "again")}
    once = {f"{t}.low": t for t in ("q.decayed", "intra", "k.decayed")}
    shapes = {**kept_shapes, "k.cumulated": _ROWS}
    low = {**twice, **once, "k.cumulated.low": "k.cumulated"}
    inputs = ("q", "k", "cum", "factors", "values", "k.cumulated.low")
    kept = ("q", "k", "factors", "also after", "q.factors", "q.k", "states", "k.factors", "end", *low)
    return (
        Op(
            f"{name}.kept",
            ("values",),
            tuple(Tensor(t, shape, "fp32") for t, shape in kept_shapes.items()),
            gradient="none",
            needs_recording=True,
        ),
        *(ops.lowered(f"{name}.{y}", t, y, shapes[t])._replace(needs_recording=True) for y, t in low.items()),
        ops.release_names("q.decayed", "intra", "corrected", "k.decayed")._replace(needs_recording=True),
        Op(
            name,
            (*inputs, *(t for t in kept if t not in inputs)),
            (Tensor("outputs", _ROWS, "fp32"), Tensor("scan.last", "4 b lv chunk ldk", "fp32")),
            (),
            tuple(Keep(what, of) for of in inputs for what in kept),
            scratch=(Tensor("decayed", "b lv chunk chunk ldk", "fp32"),),
            scratch_back=(
                Scratch(Tensor("of the chunk before", "b lv s_two chunk ldk", "fp32")),
                Scratch(Tensor("products of the only chunk", "2 b lv s_one chunk ldk", "fp32")),
            ),
            source="transformers 5.24 models/kimi_linear/modeling_kimi_linear.py chunk_kimi_delta_attention",
        ),
        ops.release_names(*kept[4:])._replace(needs_recording=True),
    )


def _scan_one_chunk(name: str) -> tuple[Op, ...]:
    """The loop if nothing is kept: one chunk of it, after which only its sums and the state are alive."""
    state, chunk, cube, f = "b lv ldk ldk", "b lv chunk ldk", "b lv chunk chunk ldk", "fp32"
    square = Tensor("scan.intra", "b lv chunk chunk", f)
    chunk_scratch = tuple(Tensor(what, chunk, f) for what in ("product", "sum"))
    return (
        Op(f"{name}.zeros", ("values",), (Tensor("state.zero", state, f),)),
        Op(f"{name}.outputs", ("values",), (Tensor("outputs", _ROWS, f),)),
        Op(f"{name}.inter", ("q", "cum", "state.zero"), (Tensor("scan.inter", chunk, f),), scratch=chunk_scratch),
        Op(
            f"{name}.products",
            ("q", "k", "factors"),
            scratch=(Tensor("q times k", cube, f), Tensor("decayed", cube, f)),
            source="transformers 5.24 models/kimi_linear/modeling_kimi_linear.py chunk_kimi_delta_attention",
        ),
        Op(f"{name}.intra", ("q", "k", "factors"), (square,), scratch=(square._replace(name="sum"),)),
        Op(f"{name}.recall", ("k.cumulated", "state.zero"), (Tensor("scan.recalled", chunk, f),)),
        Op(f"{name}.correct", ("values", "scan.recalled"), (Tensor("scan.corrected", chunk, f),)),
        Op(f"{name}.out", ("scan.inter", "scan.intra", "scan.corrected", "outputs"), scratch=chunk_scratch),
        Op(
            f"{name}.update",
            ("state.zero", "k", "cum", "scan.corrected"),
            (Tensor("state.now", state, f),),
            scratch=(Tensor("decayed state", state, f), Tensor("product", state, f), chunk_scratch[0]),
        ),
        ops.release_names("factors", "also after"),
    )


def _forget_gate(name: str, x: str, y: str, bounded: bool) -> tuple[Op, ...]:
    """`-exp(A_log) * softplus(f_b(f_a(x)) + dt_bias)` in fp32, where softplus returns large inputs unchanged.

    `bounded`: `bound * sigmoid(exp(A_log) * (f_b(f_a(x)) + dt_bias))`.
    """
    a, f = f"{name}.A_log", "fp32"
    return (
        ops.linear(f"{name}.f_a_proj", x, "f.low", "ldk", "h", "mixer"),
        ops.linear(f"{name}.f_b_proj", "f.low", "f", "lv ldk", "ldk", "mixer"),
        ops.release_names("f.low"),
        ops.cast(f"{name}.float", "f", "f32", _INPUT, f),
        ops.add_weight(f"{name}.dt", "f32", "dt", _INPUT, Weight(f"{name}.dt_bias", "lv ldk", "mixer", f), f),
        ops.release_names("f32"),
        Op(
            f"{a}.exp",
            (),
            (Tensor("rate", "lv", f),),
            (Weight(a, "1 1 lv 1", "mixer"),),
            (Keep("rate", a),),
            source=ops.DERIVATIVES,
        ),
        *(_bounded(name, y) if bounded else _softplus(name, y)),
        ops.release_names("f", "dt", "rate"),
    )


def _bounded(name: str, y: str) -> tuple[Op, ...]:
    """The bounded decay.

    Source: transformers 5.24 models/glm5_next/modeling_glm5_next.py Glm5NextTextForgetGate.
    """
    return (
        ops.spread(f"{name}.decay", "dt", "rate", "decayed", _INPUT),
        routers.sigmoid(f"{name}.sigmoid", "decayed", "opened", _INPUT),
        ops.release_names("decayed"),
        ops.scale(name, "opened", y, _INPUT),
        ops.release_names("opened"),
    )


def _softplus(name: str, y: str) -> tuple[Op, ...]:
    f = "fp32"
    return (
        Op(f"{name}.large", ("dt",), (Tensor("large", _INPUT, "bool"),), gradient="none"),
        exp(f"{name}.exp", "dt", "dt.exp", _INPUT)._replace(autocast=f),
        ops.add_number(f"{name}.one", "dt.exp", "dt.more", _INPUT),
        ops.activation(f"{name}.log", "dt.more", "dt.log", _INPUT)._replace(autocast=f),
        Op(
            f"{name}.where",
            ("dt", "dt.log", "large"),
            (Tensor("softplus", _INPUT, f),),
            (),
            (Keep("large", "dt"), Keep("large", "dt.log")),
            scratch_back=(Scratch(Tensor("zeros", "", f)),),
            source=f"{ops.DERIVATIVES}: where",
        ),
        ops.release_names("large", "dt.exp", "dt.more", "dt.log"),
        ops.scale(f"{name}.negative", "rate", "rate.negative", "lv"),
        ops.spread(name, "softplus", "rate.negative", y, _INPUT),
        ops.release_names("softplus", "rate.negative"),
    )


def gated_norm(
    name: str,
    x: str,
    gate: str,
    y: str,
    shape: str = _INPUT,
    axis: str = "ldk",
    act: Callable[[str, str, str, str], Op] = routers.sigmoid,
) -> tuple[Op, ...]:
    """KimiLinearRMSNormGated, all in fp32: normalised, multiplied by the weight and by an activation of the gate.

    Its variances live to its end. Liger has no kernel for it, so it is no unit to fuse.
    """
    f, weight = "fp32", f"{y}.weight"
    *normed, cast, weighed, returns = (
        op._replace(unit="") for op in ops.rms_norm(name, x, f"{y}.weighed", shape, axis)
    )
    return (
        *normed,
        Op(f"{name}.weight_float", (), (Tensor(weight, axis, f),), weighed.weights, cast=True, source=cast.source),
        ops.spread(weighed.name, cast.reads[0], weight, f"{y}.weighed", shape, small_first=True),
        ops.cast(f"{name}.gate_float", gate, f"{y}.gate", shape, f),
        act(f"{name}.sigmoid", f"{y}.gate", f"{y}.open", shape),
        ops.release_names(f"{y}.gate"),
        ops.mul(f"{name}.product", f"{y}.weighed", f"{y}.open", f"{y}.wide", shape),
        ops.release_names(f"{y}.weighed", f"{y}.open"),
        ops.cast(f"{name}.cast", f"{y}.wide", y, shape, f"={x}"),
        ops.release_names(f"{y}.wide", returns.reads[0]),
    )


def _delta_attention(m: ModelSpec, wiring: Wiring, x: str, y: str, name: str = "self_attn") -> tuple[Op, ...]:
    """KimiLinearDeltaAttention.

    Kimi K3's output gate is one matrix, and its decay has a bound. If a cache copies the last state, the state stays
    alive to the end.
    """
    parts, config = ("q", "k", "v"), m.part("linear_attn_config")
    gate: tuple[Op, ...] = (
        ops.linear(f"{name}.g_a_proj", x, "gate.low", "ldk", "h", "mixer"),
        ops.linear(f"{name}.g_b_proj", "gate.low", "out.gate", "lv ldk", "ldk", "mixer"),
        ops.release_names("gate.low"),
    )
    if config.get("use_full_rank_gate"):
        gate = (ops.linear(f"{name}.g_proj", x, "out.gate", "lv ldk", "h", "mixer"),)
    rows_at_once = bool(m.config.get("attn_res_block_size"))
    state = cached_state(wiring, f"{name}.state", "state", "b lv ldk ldk", "fp32", "g")
    rule = f"{name}.rule"
    if wiring.decodes:
        rule = (*state, *kda_step(rule, "core"))
    elif "fla" in wiring.packages:
        rule = (packages.kimi_delta_rule(rule, "core"),)
    else:
        rule = (*_chunked_delta_rule(rule, "core", rows_at_once, wiring.records), *state)
    return (
        *(ops.linear(f"{name}.{t}_proj", x, f"{t}.flat", "lv ldk", "h", "mixer") for t in parts),
        ops.cat(f"{name}.cat", tuple(f"{t}.flat" for t in parts), "qkv", "b s convolved", gradient="view"),
        *causal_conv(f"{name}.conv1d", "qkv", "mixed", "convolved", False, wiring=wiring),
        ops.split(f"{name}.split", "mixed", tuple(Tensor(t, _INPUT) for t in ("query", "key", "value"))),
        *_forget_gate(f"{name}.forget_gate", x, "g", config.get("gate_lower_bound") is not None),
        ops.linear(f"{name}.b_proj", x, "b_", "lv", "h", "mixer"),
        exp(f"{name}.sigmoid", "b_", "beta", "b s lv"),
        ops.release_names("b_"),
        *(kimi_k3.mark_assumed(rule, kimi_k3.DELTA_RULE) if has_k3_parts(m) else rule),
        *gate,
        *gated_norm(f"{name}.o_norm", "core", "out.gate", "gated"),
        ops.linear(f"{name}.o_proj", "gated", y, "h", "lv ldk", "mixer"),
        ops.release_names("mixed", "g", "beta", "core", "out.gate", "gated", x),
        *((ops.release_names("state.now"),) if wiring.caching else ()),
    )


def _latent_attention(m: ModelSpec, wiring: Wiring, x: str, y: str, name: str = "self_attn") -> tuple[Op, ...]:
    """Latent attention without rotation. A part of the keys is shared by all heads. Kimi K3 gates the output."""
    g, bias = "attention", m.get("attention_bias", False)
    o, gate = "o", ()
    if m.get("mla_use_output_gate", False):
        o, gate = (
            "o.gated",
            (
                ops.linear(f"{name}.g_proj", x, "o.gate", "a dv", "h", g),
                routers.sigmoid(f"{name}.sigmoid", "o.gate", "o.open", "b s a dv"),
                ops.release_names("o.gate"),
                ops.mul(f"{name}.gate", "o", "o.open", "o.gated", "b s a dv"),
                ops.release_names("o"),
            ),
        )
    return (
        *latent_queries(m, name, x, bias),
        ops.view(f"{name}.q_heads", "q0", "q", "b s a d", gradient="new"),
        ops.linear(f"{name}.kv_a_proj_with_mqa", x, "kv.low", "klr", "h", g, bias),
        ops.split(f"{name}.kv_split", "kv.low", (Tensor("kv.latent", "b s kl"), Tensor("k.turned", "b s rot"))),
        *ops.rms_norm(f"{name}.kv_a_layernorm", "kv.latent", "kv.normed", "b s kl", "kl"),
        *cached(f"{name}.attention", wiring, (), tensors=("kv.normed", "k.turned")),
        *expanded_keys(name),
        *attend(f"{name}.attention", m, wiring._replace(caching=False), "mask", joined=False),
        *gate,
        ops.linear(f"{name}.o_proj", o, y, "h", "a dv", g, bias),
        ops.release_names("q0", "kv.low", "kv.normed", "k.turned", "q", "k", "v", o, *(("o.open",) if gate else ()), x),
    )


def kimi_linear(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Kimi Linear. The config may have any of Kimi K3's parts.

    Positions are counted, though nothing reads them. peft cannot tell which linear layers the experts stand for.
    """
    routed = routers.grouped_router("mlp.gate", "n2", m.get("norm_topk_prob", True))
    linear = (
        *unpadded(wiring, "n1", "n1.real", "b s h"),
        *_delta_attention(m, wiring, "n1.real", "ao"),
        ops.release_names("n1"),
    )

    latent = _latent_attention(m, wiring, "n1", "ao")
    mlps = {ffn: kimi_k3.kimi_mlp(m, ffn, routed) for ffn in {layer.ffn for layer in m.layers}}

    def block(layer: Layer) -> Block:
        ffn, is_linear = mlps[layer.ffn], layer.mixer == "linear_attention"
        mixed = linear if is_linear else latent
        held = () if is_linear else returned(wiring)
        if layer.opens_sum or layer.choosable_sums:
            return kimi_k3.attention_residual_block(layer, mixed, ffn, held)
        return decoder_block(mixed, ffn, held=held)

    last, sums = m.layers[-1], ()
    number, normed = last.choosable_sums + last.opens_sum, "x"
    if number:
        sums, normed = (residual_sums_name(number),), "x.chosen"
    mask_ops = masks(wiring, "embeds")
    after = (
        *(
            (*attention_residual("model.output_attn_res", "x", normed, number), ops.release_names("x"))
            if number
            else ()
        ),
        *ops.rms_norm("model.norm", normed, "n", "b s h", "h"),
        ops.release_names(normed, *sums, "embeds", "positions", *(op.name for op in mask_ops)),
        lm_head("n"),  # the class never ties it, whatever the config says
    )
    return rewrite_weights(Stack(before(wiring, table=()), runs(m, block), after), _counted_as_attention)


def _counted_as_attention(w: Weight) -> Weight:
    """Count the delta rule's weights as attention, because its module is also called self_attn."""
    return w._replace(stands_for=(), group="attention" if w.group == "mixer" else w.group)


BUILDERS = {"kimi_linear": kimi_linear}
