"""Families whose code lives with their cards: Llama's frame, each with an attention, a norm or a head of its own.

transformers has no class for them. What is said here follows the code published beside the weights (their
`modeling_*.py`, loaded with `trust_remote_code`), with transformers' own loss. That code calls torch's attention
itself: where transformers' `sdpa` would need no mask, Baichuan and Qwen still hand it one, which flash refuses.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import attention, cached, flash, mask
from memplan.catalogue.decoder.attention import llama_attention
from memplan.catalogue.decoder.frame import decoder_block, inputs, lm_head
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.scaling import scaled_branch
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.positions import positions, rotary_table
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Run, Scratch, Stack, Tensor, Weight
from memplan.models.model import ModelSpec

_Q, _K = "b s a d", "b s k d"
_BAICHUAN = "modeling_baichuan.py"
_READ = f"assumed: read in the {_BAICHUAN} published with the weights, not traced"


def internlm2(m: ModelSpec, wiring: Wiring) -> Stack:
    """One projection for q, k, v, interleaved by group: q is copied out of it, k and v are views that keep it whole."""
    name, masks = "attention", mask(wiring, "embeds") if wiring.has_mask() else ()
    grouped, bias = m.num_key_value_heads != m.num_attention_heads, m.get("bias", False)
    heads = (
        ops.linear(f"{name}.wqkv", "n1", "qkv", "qkv", "h", "attention", bias),
        ops.view(f"{name}.q_slice", "qkv", "q.slice", _Q, gradient="new"),
        ops.copy(f"{name}.q_heads", "q.slice", "q1", _Q),
        ops.view(f"{name}.k_slice", "qkv", "k1", _K, gradient="new"),
        ops.view(f"{name}.v_slice", "qkv", "v", _K, gradient="new"),
        *rotary_table("v"),
        *ops.rotate(f"{name}.rope_q", "q1", "q", _Q, "b s a rot2"),
        *ops.rotate(f"{name}.rope_k", "k1", "k", _K, "b s k rot2"),
        ops.leave("q1", "k1"),
        *as_published(f"{name}.attention", wiring, ("k", "v"), "modeling_internlm2.py InternLM2SdpaAttention.forward"),
        *repeated_attention(f"{name}.attention", "q", "k", "v", "o", wiring._replace(caching=False), grouped),
        ops.linear(f"{name}.wo", "o", "ao", "h", "a d", "attention", bias),
        ops.leave("qkv", "o", "n1", "cos", "sin"),
    )
    mlp = gated_mlp("n2", "mo", "feed_forward", projections=("w1", "w3", "w2"))
    block = decoder_block(heads, mlp, norms=("attention_norm", "ffn_norm"))
    return Stack(
        (
            inputs(wiring.padded),
            ops.embedding("model.tok_embeddings", "ids", "embeds", "v", "h"),
            positions(),
            *masks,
        ),
        (Run((block,), "L"),),
        (
            *ops.rms_norm("model.norm", "x", "n", "b s h", "h"),
            ops.leave("x", "embeds", "positions", *(op.name for op in masks)),
            _renamed(lm_head("n"), "lm_head.weight", "output.weight"),
        ),
    )


def as_published(name: str, wiring: Wiring, tensors: tuple[str, ...], code: str) -> tuple[Op, ...]:
    """The place of a cache that the code published with the weights has: it keeps the prompt's keys and values as they
    are, with all they are views of, and joins them with every further token's."""
    source = f"assumed: read in the {code} published with the weights, not traced"
    return tuple(op._replace(holds="cache", source=source) for op in cached(name, wiring, (), tensors=tensors))


def repeated_attention(
    name: str,
    q: str,
    k: str,
    v: str,
    y: str,
    wiring: Wiring,
    grouped: bool,
    sliding: bool = False,
    mask: str = "mask",
) -> tuple[Op, ...]:
    """As transformers 4.3x wrote it: k and v repeated for every query head before any kernel, all copied for a mask."""
    wiring = wiring._replace(copies="")
    match wiring.masked if wiring.has_mask(sliding) else wiring.backend:
        case "flash" if grouped:
            return (
                ops.copy(f"{name}.repeat_k", k, f"{k}.repeated", _Q, gradient="new"),
                ops.copy(f"{name}.repeat_v", v, f"{v}.repeated", _Q, gradient="new"),
                flash(name, q, f"{k}.repeated", f"{v}.repeated", y, False),
            )
        case "efficient" if wiring.has_mask(sliding):
            same = () if grouped else (k, v)
            made = {t: f"{t}.contiguous" for t in (q, *same)}
            return (
                *(ops.copy(f"{name}.{t}", t, made[t], _Q) for t in (q, *same)),
                *attention(name, made[q], made.get(k, k), made.get(v, v), y, wiring, grouped, sliding, mask),
            )
        case _:
            return attention(name, q, k, v, y, wiring, grouped, sliding, mask)


def _cached_and_repeated(
    name: str, q: str, k: str, v: str, y: str, wiring: Wiring, grouped: bool, sliding: bool, mask: str
) -> tuple[Op, ...]:
    kernel = repeated_attention(name, q, k, v, y, wiring._replace(caching=False), grouped, sliding, mask)
    return (*as_published(name, wiring, (k, v), "modeling_minicpm.py MiniCPMSdpaAttention.forward"), *kernel)


def minicpm(m: ModelSpec, wiring: Wiring) -> Stack:
    """Embeddings, branches and the last hidden states scaled; rotated in fp32, by tables every layer has for itself."""
    masks = mask(wiring, "embeds") if wiring.has_mask() else ()
    bias = m.get("attention_bias", False)
    heads = llama_attention(
        m,
        wiring,
        "n1",
        "ao",
        bias=bias,
        out_bias=bias,
        turn=lambda name, q, k: _rope_in_fp32(name, q, k, m.max_position_embeddings or 2048, at_once=True),
        attend=_cached_and_repeated,
    )
    block = decoder_block(heads, gated_mlp("n2", "mo"), scaled_branch)
    return Stack(
        (
            inputs(wiring.padded),
            positions(),
            ops.embedding("model.embed_tokens", "ids", "unscaled_embeds", "v", "h"),
            ops.scale("scale_emb", "unscaled_embeds", "embeds", "b s h"),
            *masks,
        ),
        (Run((block,), "L"),),
        (
            *ops.rms_norm("model.norm", "x", "unscaled", "b s h", "h"),
            ops.leave("x", "embeds", "positions", *(op.name for op in masks)),
            ops.scale("dim_model_base", "unscaled", "n", "b s h"),
            lm_head("n", "model.embed_tokens.weight" if m.tie_word_embeddings else ""),
        ),
    )


def _rope_in_fp32(name: str, q: str, k: str, longest: int, at_once: bool) -> tuple[Op, ...]:
    """cos and sin are picked in every layer from its own fp32 tables, and kept; q and k are rotated in fp32.

    `at_once`: they are cast once for both products (MiniCPM), else for each (Baichuan).
    """
    tables = tuple(Weight(f"{name}.rotary_emb.{t}", f"{longest} d", "buffer", "fp32", False) for t in _TABLES)
    cast = (ops.cast(f"{name}.float_q", q, "q.wide", _Q, "fp32"), ops.cast(f"{name}.float_k", k, "k.wide", _K, "fp32"))
    return (
        Op(f"{name}.cos", ("positions",), (Tensor("cos", "s rot", "fp32"),), tables[:1]),
        Op(f"{name}.sin", ("positions",), (Tensor("sin", "s rot", "fp32"),), tables[1:]),
        *(cast if at_once else ()),
        *_rotated_in_fp32(f"{name}.rope_q", q, "q", "a", at_once),
        *_rotated_in_fp32(f"{name}.rope_k", k, "k", "k", at_once),
        ops.cast(f"{name}.cast_q", "q.rotated", "q", _Q, f"={q}"),
        ops.cast(f"{name}.cast_k", "k.rotated", "k", _K, f"={k}"),
        ops.leave("q.rotated", "k.rotated", *(("q.wide", "k.wide") if at_once else ())),
        ops.leave(q, k),
    )


_TABLES = ("cos_cached", "sin_cached")


def _rotated_in_fp32(name: str, x: str, t: str, heads: str, at_once: bool) -> tuple[Op, ...]:
    shape, half = f"b s {heads} d", f"b s {heads} rot2"
    if at_once:
        return ops.rotate(name, f"{t}.wide", f"{t}.rotated", shape, half)
    cosine, turned, *rest = ops.rotate(name, f"{t}.wide", f"{t}.rotated", shape, half)
    again = f"{t}.again"
    return (
        ops.cast(f"{name}.float", x, f"{t}.wide", shape, "fp32"),
        cosine,
        ops.cast(f"{name}.float_again", x, again, shape, "fp32"),
        turned._replace(reads=(again,)),
        *rest,
    )


def baichuan(m: ModelSpec, wiring: Wiring) -> Stack:
    """`W_pack` seen as three, fp32 kept beside the norms' input, and in Baichuan 2 a head whose rows are normalised.

    The 7B model rotates, and hands torch's attention a mask of the model's dtype; the 13B model has ALiBi's biases.
    Only the 7B model's config has `max_position_embeddings`, only Baichuan 2's vocabulary 125,696 tokens.
    """
    longest = m.config.get("max_position_embeddings")
    attention_ops = _rotary_attention(wiring, longest) if longest else _unrotated_attention(wiring)
    block = decoder_block(attention_ops, gated_mlp("n2", "mo"), norm=_half_norm)
    masks = _causal_mask() if longest else _alibi(m, wiring)
    named = (t.name for op in masks for t in op.writes if t.name in _IN_FORWARD)
    return Stack(
        (
            inputs(wiring.padded),
            positions(),
            ops.embedding("model.embed_tokens", "ids", "embeds", "v", "h"),
            *masks,
        ),
        (Run((block,), "L"),),
        (
            *_half_norm("model.norm", "x", "n", "b s h", "h"),
            ops.leave("x", "embeds", "positions", *named),
            *(_norm_head("n", wiring) if m.vocab_size == 125_696 else (lm_head("n"),)),
        ),
    )


def _packed(name: str) -> tuple[Op, ...]:
    return (
        ops.linear(f"{name}.W_pack", "n1", "packed", "3 a d", "h", "attention"),
        ops.view(f"{name}.unflatten", "packed", "proj", "b s 3 a d", gradient="new"),
        *(ops.view(f"{name}.{t}_slice", "proj", f"{t}.slice", _Q, gradient="new") for t in "qkv"),
    )


def _rotary_attention(wiring: Wiring, longest: int, name: str = "self_attn") -> tuple[Op, ...]:
    return (
        *_packed(name),
        *_heads(name, "qk", "new"),
        *_heads(name, "v", "same"),
        *_rope_in_fp32(name, "q1", "k1", longest, at_once=False),
        *as_published(f"{name}.attention", wiring, ("k", "v1"), f"{_BAICHUAN}, 7B, Attention.forward"),
        *_biased_attention(f"{name}.attention", "q", "k", "v1", "o", wiring._replace(caching=False), "b s s"),
        ops.linear(f"{name}.o_proj", "o", "ao", "h", "a d", "attention"),
        ops.leave("packed", "q", "k", "o", "n1", "cos", "sin"),
    )


def _unrotated_attention(wiring: Wiring, name: str = "self_attn") -> tuple[Op, ...]:
    """ALiBi: written out for `eager`, and where the model does not train; else with the biases as a mask, as xformers'
    and torch's attention take them."""
    eager = wiring.backend == "eager" or not wiring.records
    kernel = (
        _alibi_attention(f"{name}.attention", "q1", "k1", "v1", "o", wiring)
        if eager
        else _biased_attention(f"{name}.attention", "q1", "k1", "v1", "o", wiring, "b a s s")
    )
    kernel = (
        *as_published(f"{name}.attention", wiring, ("k1", "v1"), f"{_BAICHUAN}, 13B, BaichuanAttention.forward"),
        *kernel,
    )
    return (
        *_packed(name),
        *_heads(name, "q", "new" if eager else "same"),
        *_heads(name, "k", "same"),
        *_heads(name, "v", "new" if eager else "same"),
        *kernel,
        ops.linear(f"{name}.o_proj", "o", "ao", "h", "a d", "attention"),
        ops.leave("packed", "q1", "o", "n1", *(("probs",) if eager else ())),
    )


def _heads(name: str, tensors: str, gradient: str) -> tuple[Op, ...]:
    return tuple(ops.view(f"{name}.{t}_heads", f"{t}.slice", f"{t}1", _Q, gradient) for t in tensors)


def _half_norm(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """The variance is taken from a cast of x that the square keeps; x itself is kept for the product."""
    cast, square, mean, eps, rsqrt, scale, to_half, weight, _ = ops.rms_norm(name, x, y, shape, axis)
    normalised, rstd = scale.writes[0].name, scale.reads[1]
    product = scale._replace(reads=(x, rstd), keeps=(Keep(rstd, x), Keep(x, rstd)), writes=(Tensor(normalised, shape),))
    left = ops.leave(mean.writes[0].name, to_half.writes[0].name)
    return (cast, square, mean, eps, rsqrt, product, to_half, weight, left)


def _norm_head(x: str, wiring: Wiring) -> tuple[Op, ...]:
    """NormHead: every row of the matrix divided by its length; both matrices are kept, and five are there backward.

    Where the model does not train, the first pass puts the divided rows in the matrix's place."""
    w = Weight("lm_head.weight", "v h", "lm_head", rows=1)
    if not wiring.records:
        made = (Tensor("normalised", "v h", f"={w.name}"), Tensor("lengths", "v"), Tensor("clamped", "v"))
        source = f"{_READ}: NormHead.forward"
        once = Op("lm_head.normalize", (), scratch=made, weights=(w,), source=source)
        return (*(() if wiring.decodes else (once,)), lm_head(x))
    parts = ("quotient", "negative gradient", "product")
    full = tuple(Scratch(Tensor(t, "v h", "=normalised"), w.name) for t in parts)
    return (
        Op(
            "lm_head.normalize",
            (),
            (Tensor("normalised", "v h"), Tensor("lengths", "v"), Tensor("clamped", "v")),
            (w,),
            (Keep("lengths", w.name), Keep("clamped", w.name)),
            scratch_back=full,
            source="torch 2.13 torch/nn/functional.py normalize",
        ),
        Op(
            "lm_head",
            (x, "normalised"),
            (Tensor("logits", "b s v"),),
            (),
            (Keep("normalised", x), Keep(x, "normalised")),
            gradient="view",
            autocast="lower",
            product="matrix",
            source=f"{ops.DERIVATIVES}: mm",
        ),
    )


def _causal_mask() -> tuple[Op, ...]:
    """A mask in the model's dtype for every sequence, whether one is padded or not."""
    parts = (Tensor("causal", "s s", "=embeds"), *(Tensor(t, "b s s", "=embeds") for t in ("expanded", "inverted")))
    return (Op("mask", (), (Tensor("mask", "b s s", "=embeds"),), scratch=parts),)


def _alibi(m: ModelSpec, wiring: Wiring) -> tuple[Op, ...]:
    """ALiBi's biases with the causal mask, for every head: made on the host, and held by the model; of a model that
    does not train for all its positions, once. Beside a mask of tokens, as generation gives it one, all pairs of tokens
    so far have a number for every sequence and head, in the pass of a token too."""
    if wiring.records:
        alibi = "alibi" if wiring.padded else "mask"
        made = Op("alibi_mask", (), (Tensor(alibi, "a s s", "=embeds"),), holds="step")
        if not wiring.padded:
            return (made,)
        parts = (Tensor("expanded", "b s s", "=embeds"), Tensor("inverted", "b s s", "=embeds"))
        return (made, Op("mask", (alibi,), (Tensor("mask", "b a s s", "=embeds"),), scratch=parts))
    longest = m.whole("model_max_length", m.max_position_embeddings or 4096)
    table = Weight("model.future_mask", f"a {longest} {longest}", "buffer", trains=False)
    if not wiring.padded and not wiring.generates:
        return (Op("mask", (), (Tensor("mask", "0", "=embeds"),), (table,)),)
    tokens = "kv kv" if wiring.decodes else "s s"
    each = "=embeds"
    source = f"{_READ}: 13B, BaichuanModel.forward"

    def pairs_of(name: str, *reads: str, dtype: str = "bool", scratch: tuple[Tensor, ...] = ()) -> Op:
        return Op(f"mask.{name}", reads, (Tensor(name, f"b {tokens}", dtype),), scratch=scratch, source=source)

    return (
        pairs_of("product", dtype=each),
        pairs_of("positive", "product"),
        pairs_of("lower", "positive"),
        pairs_of("difference", dtype=each),
        pairs_of("equal", "difference"),
        pairs_of("both", "lower", "equal"),
        pairs_of("expanded", "both", dtype=each),
        pairs_of("inverted", "expanded", dtype=each),
        pairs_of("filled", "inverted", dtype=each, scratch=(Tensor("where", f"b {tokens}", "bool"),)),
        Op("mask", ("filled",), (Tensor("mask", f"b a {tokens}", each),), (table,), source=source),
    )


_IN_FORWARD = ("mask", "expanded", "filled")  # names of the model's forward pass, which have them until it returns


def _biased_attention(name: str, q: str, k: str, v: str, y: str, wiring: Wiring, shape: str) -> tuple[Op, ...]:
    """torch's attention with a mask of the model's dtype, which is kept as it is; flash attention takes none.

    Where autocast casts the mask, every layer has one of `shape`.
    """
    return tuple(
        ops.view(op.name, "mask", op.writes[0].name, shape) if op.name == f"{name}.mask" else op
        for op in attention(name, q, k, v, y, _always_masked(wiring), False)
    )


def _always_masked(wiring: Wiring) -> Wiring:
    """The code asks torch for its attention whatever transformers is told to use."""
    backend = "efficient" if wiring.masked == "eager" else wiring.masked
    return wiring._replace(backend=backend, masked=backend, padded=True)


def _alibi_attention(name: str, q: str, k: str, v: str, y: str, wiring: Wiring) -> tuple[Op, ...]:
    """Scores, scaled, biased, cut off below and normalised, all in one dtype; the biased ones are kept for the cut.
    Keys and values that were joined lie head by head, and need no copy."""
    scores, laid = "b a s s", ops.view if wiring.decodes else ops.copy
    return (
        ops.copy(f"{name}.{q}_flat", q, f"{q}.flat", _Q),
        laid(f"{name}.{k}_flat", k, f"{k}.flat", _Q),
        ops.matmul(f"{name}.scores", f"{q}.flat", f"{k}.flat", "scores", scores),
        ops.leave(f"{q}.flat", f"{k}.flat"),
        ops.scale(f"{name}.scaling", "scores", "scaled", scores),
        ops.leave("scores"),
        Op(f"{name}.add_mask", ("scaled", "mask"), (Tensor("biased", scores),), gradient="same"),
        ops.leave("scaled"),
        Op(
            f"{name}.cut",
            ("biased",),
            (Tensor("cut", scores),),
            (),
            (Keep("biased", "biased"),),
            scratch_back=(
                *(Scratch(Tensor(t, scores, "bool")) for t in ("equal", "less")),
                Scratch(Tensor("half gradient", scores, "=cut")),
            ),
            source=f"{ops.DERIVATIVES}: maximum",
        ),
        *ops.softmax(f"{name}.softmax", "cut", "probs", scores),
        ops.leave("cut"),
        laid(f"{name}.v_flat", v, f"{v}.flat", _Q),
        ops.matmul(f"{name}.product", "probs", f"{v}.flat", "heads", _Q),
        ops.copy(f"{name}.reshape", "heads", y, _Q, gradient="new"),
    )


def qwen(m: ModelSpec, wiring: Wiring) -> Stack:
    """The first Qwen: `c_attn` split in three, rotated in fp32 by a table for twice the sequence, a mask every layer.

    `intermediate_size` counts gate and up together. The scaling of long sequences (`use_logn_attn`) is for inference.
    """
    name, masked = "attn", "mask" if wiring.padded else ""
    block = (
        *ops.rms_norm("ln_1", "x", "n1", "b s h", "h")[:-1],
        ops.linear(f"{name}.c_attn", "n1", "qkv", "3 a d", "h", "attention", bias=True),
        ops.split(f"{name}.split", "qkv", tuple(Tensor(t, _Q) for t in ("q1", "k1", "v"))),
        *_joined_rope(f"{name}.rope_q", "q1", "q"),
        *_joined_rope(f"{name}.rope_k", "k1", "k"),
        *_masked_every_layer(f"{name}.attention", "q", "k", "v", "o", wiring),
        ops.linear(f"{name}.c_proj", "o", "ao", "h", "a d", "attention", bias=not m.get("no_bias", True)),
        ops.leave("qkv", "q", "k", "v", "o"),
        ops.add("residual_1", "ao", "x", "x1", "b s h"),
        *ops.rms_norm("ln_2", "x1", "n2", "b s h", "h")[:-1],
        ops.leave("n1"),
        ops.linear("mlp.w1", "n2", "up", "f2", "h", "mlp", bias=not m.get("no_bias", True)),
        ops.linear("mlp.w2", "n2", "gate", "f2", "h", "mlp", bias=not m.get("no_bias", True)),
        ops.activation("mlp.silu", "gate", "act", "b s f2"),
        ops.mul("mlp.product", "up", "act", "product", "b s f2"),
        ops.linear("mlp.c_proj", "product", "mo", "h", "f2", "mlp", bias=not m.get("no_bias", True)),
        ops.leave("up", "gate", "product"),
        ops.add("residual_2", "x1", "mo", "y", "b s h"),
        ops.leave("ao", "n2", "mo"),
    )
    table = Op("rotary.table", (), tuple(Tensor(t, "2 s d", "fp32") for t in ("cos", "sin")), holds="step")
    padding = Op("mask", (), (Tensor("mask", "b s", "=embeds"),))
    return Stack(
        (
            inputs(wiring.padded),
            positions(),
            ops.embedding("transformer.wte", "ids", "embeds", "v", "h"),
            *((padding,) if masked else ()),
            table,
        ),
        (Run((Block("transformer.h", block),), "L"),),
        (
            *ops.rms_norm("transformer.ln_f", "x", "n", "b s h", "h")[:-1],
            ops.leave("x", "embeds", "positions", *((masked,) if masked else ())),
            lm_head("n"),
        ),
    )


def _joined_rope(name: str, x: str, y: str) -> tuple[Op, ...]:
    """Rotated in fp32 and joined with the dimensions that are not rotated, though there are none."""
    wide, summed, joined = f"{y}.wide", f"{y}.summed", f"{y}.joined"
    cosine, turned, *rest = ops.rotate(name, f"{y}.rot", summed, _Q, "b s a rot2")
    return (
        ops.cast(f"{name}.float", x, wide, _Q, "fp32"),
        ops.view(f"{name}.rot", wide, f"{y}.rot", _Q),
        ops.view(f"{name}.pass", wide, f"{y}.pass", _Q, gradient="new"),
        cosine,
        turned._replace(scratch_back=(Scratch(Tensor("negative", "b s a rot2", "fp32")),), gradient="view"),
        *rest,
        Op(f"{name}.cat", (summed, f"{y}.pass"), (Tensor(joined, _Q),), gradient="same"),
        ops.cast(f"{name}.cast", joined, y, _Q, f"={x}"),
        ops.leave(wide, summed),
    )


def _masked_every_layer(name: str, q: str, k: str, v: str, y: str, wiring: Wiring) -> tuple[Op, ...]:
    """A causal mask is made in every layer: boolean, or in the model's dtype where the batch is padded."""
    if wiring.backend == "flash_2":
        return attention(name, q, k, v, y, wiring, False)
    masked = _always_masked(wiring)
    ones = Tensor("ones", "s s", "bool")
    causal = Op(f"{name}.causal", (), (Tensor(f"{y}.causal", "s s", "bool"),), scratch=(ones,))
    kernel = attention(name, q, k, v, y, masked, False, mask=f"{y}.causal")
    if not wiring.padded:
        made = {f"{name}.mask": "s s8"}
        kernel = tuple(_reshaped(op, made[op.name]) if op.name in made else op for op in kernel)
        return (causal, *kernel, ops.leave(f"{y}.causal"))
    filled = Op(
        f"{name}.fill",
        ("mask", f"{y}.causal"),
        (Tensor(f"{y}.filled", "b s s", f"={q}"),),
        scratch=(Tensor("inverted", "s s", "bool"),),
    )
    kernel = tuple(
        ops.view(op.name, f"{y}.filled", op.writes[0].name, "b s s") if op.name == f"{name}.mask" else op
        for op in kernel
    )
    return (causal, filled, *kernel, ops.leave(f"{y}.causal", f"{y}.filled"))


def _reshaped(op: Op, shape: str) -> Op:
    return op._replace(writes=(op.writes[0]._replace(shape=shape),))


def _renamed(op: Op, old: str, new: str) -> Op:
    """The operation with another name for its weight."""
    weights = tuple(w._replace(name=new) if w.name == old else w for w in op.weights)
    keeps = tuple(k._replace(what=new if k.what == old else k.what, of=new if k.of == old else k.of) for k in op.keeps)
    return op._replace(weights=weights, keeps=keeps)


BUILDERS = {"baichuan": baichuan, "internlm2": internlm2, "minicpm": minicpm, "qwen": qwen}
