"""Families whose code is published with their weights: Llama's frame, each with another attention, norm or head.

transformers has no class for them. This follows the published `modeling_*.py` (loaded with `trust_remote_code`), with
transformers' own loss. That code calls torch's attention itself: if transformers' `sdpa` would need no mask, Baichuan
and Qwen still pass one, which flash attention refuses.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import KEYS, QUERIES, attention, cached, mask
from memplan.catalogue.attention.flash_attention import flash
from memplan.catalogue.decoder.attention import llama_attention
from memplan.catalogue.decoder.frame import after, before, decoder_block, inputs, lm_head
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.scaling import scaled_branch
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.positions import positions, rotary_table
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Run, Scratch, Stack, Tensor, Weight
from memplan.models.model import ModelSpec

_BAICHUAN = "modeling_baichuan.py"
_READ = f"assumed: read in the {_BAICHUAN} published with the weights, not traced"


def internlm2(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build InternLM2, with q, k and v in one projection, interleaved by group.

    q is copied out of the projection; k and v are views that keep all of it alive.
    """
    name, masks = "attention", mask(wiring, "embeds") if wiring.has_mask() else ()
    grouped, bias = m.num_key_value_heads != m.num_attention_heads, m.get("bias", False)
    heads = (
        ops.linear(f"{name}.wqkv", "n1", "qkv", "qkv", "h", "attention", bias),
        ops.view(f"{name}.q_slice", "qkv", "q.slice", QUERIES, gradient="new"),
        ops.copy(f"{name}.q_heads", "q.slice", "q1", QUERIES),
        ops.view(f"{name}.k_slice", "qkv", "k1", KEYS, gradient="new"),
        ops.view(f"{name}.v_slice", "qkv", "v", KEYS, gradient="new"),
        *rotary_table("v"),
        *ops.rotate(f"{name}.rope_q", "q1", "q", QUERIES, "b s a rot2"),
        *ops.rotate(f"{name}.rope_k", "k1", "k", KEYS, "b s k rot2"),
        ops.release_names("q1", "k1"),
        *as_published(f"{name}.attention", wiring, ("k", "v"), "modeling_internlm2.py InternLM2SdpaAttention.forward"),
        *repeated_attention(f"{name}.attention", "q", "k", "v", "o", wiring._replace(caching=False), grouped),
        ops.linear(f"{name}.wo", "o", "ao", "h", "a d", "attention", bias),
        ops.release_names("qkv", "o", "n1", "cos", "sin"),
    )
    mlp = gated_mlp("n2", "mo", "feed_forward", projections=("w1", "w3", "w2"))
    block = decoder_block(heads, mlp, norms=("attention_norm", "", "ffn_norm", ""))
    embedded = (ops.embedding("model.tok_embeddings", "ids", "embeds", "v", "h"),)
    *last, _ = after(m, wiring, made=masks, table=())
    head = _renamed(lm_head("n"), "lm_head.weight", "output.weight")
    return Stack(before(wiring, embedded=embedded, made=masks, table=()), (Run((block,), "L"),), (*last, head))


def as_published(name: str, wiring: Wiring, tensors: tuple[str, ...], code: str) -> tuple[Op, ...]:
    """The cache of the published code, which keeps a prompt's keys and values with everything they are views of.

    Every further token's are concatenated with them.
    """
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
    """Attention as transformers 4.3x wrote it: k and v are repeated for every query head before any kernel.

    With a mask, the memory-efficient kernel gets contiguous copies of q, k and v.
    """
    wiring = wiring._replace(copies="")
    match wiring.masked if wiring.has_mask(sliding) else wiring.backend:
        case "flash" if grouped:
            return (
                ops.copy(f"{name}.repeat_k", k, f"{k}.repeated", QUERIES, gradient="new"),
                ops.copy(f"{name}.repeat_v", v, f"{v}.repeated", QUERIES, gradient="new"),
                flash(name, q, f"{k}.repeated", f"{v}.repeated", y, False),
            )
        case "efficient" if wiring.has_mask(sliding):
            same = () if grouped else (k, v)
            contiguous = {t: f"{t}.contiguous" for t in (q, *same)}
            return (
                *(ops.copy(f"{name}.{t}", t, contiguous[t], QUERIES) for t in (q, *same)),
                *attention(
                    name, contiguous[q], contiguous.get(k, k), contiguous.get(v, v), y, wiring, grouped, sliding, mask
                ),
            )
        case _:
            return attention(name, q, k, v, y, wiring, grouped, sliding, mask)


def _cached_and_repeated(
    name: str, q: str, k: str, v: str, y: str, wiring: Wiring, grouped: bool, sliding: bool, mask: str
) -> tuple[Op, ...]:
    kernel = repeated_attention(name, q, k, v, y, wiring._replace(caching=False), grouped, sliding, mask)
    return (*as_published(name, wiring, (k, v), "modeling_minicpm.py MiniCPMSdpaAttention.forward"), *kernel)


def minicpm(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build MiniCPM: scaled embeddings, branches and last hidden states; every layer has tables to rotate in fp32."""
    masks = mask(wiring, "embeds") if wiring.has_mask() else ()
    bias = m.get("attention_bias", False)
    heads = llama_attention(
        m,
        wiring,
        "n1",
        "ao",
        bias=bias,
        out_bias=bias,
        rotate=lambda m, name, q, k: _rope_in_fp32(name, q, k, m.max_position_embeddings or 2048, at_once=True),
        attend=_cached_and_repeated,
    )
    block = decoder_block(heads, gated_mlp("n2", "mo"), branch=scaled_branch)
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
            ops.release_names("x", "embeds", "positions", *(op.name for op in masks)),
            ops.scale("dim_model_base", "unscaled", "n", "b s h"),
            lm_head("n", "model.embed_tokens.weight" if m.tie_word_embeddings else ""),
        ),
    )


def _rope_in_fp32(name: str, q: str, k: str, longest: int, at_once: bool) -> tuple[Op, ...]:
    """Rotate q and k in fp32. Every layer looks up cos and sin in its own fp32 tables, and keeps them.

    `at_once`: q and k are cast once for both products (MiniCPM); otherwise once for each (Baichuan).
    """
    tables = tuple(Weight(f"{name}.rotary_emb.{t}", f"{longest} d", "buffer", "fp32", False) for t in _TABLES)
    cast = (
        ops.cast(f"{name}.float_q", q, "q.wide", QUERIES, "fp32"),
        ops.cast(f"{name}.float_k", k, "k.wide", KEYS, "fp32"),
    )
    return (
        Op(f"{name}.cos", ("positions",), (Tensor("cos", "s rot", "fp32"),), tables[:1]),
        Op(f"{name}.sin", ("positions",), (Tensor("sin", "s rot", "fp32"),), tables[1:]),
        *(cast if at_once else ()),
        *_rotated_in_fp32(f"{name}.rope_q", q, "q", "a", at_once),
        *_rotated_in_fp32(f"{name}.rope_k", k, "k", "k", at_once),
        ops.cast(f"{name}.cast_q", "q.rotated", "q", QUERIES, f"={q}"),
        ops.cast(f"{name}.cast_k", "k.rotated", "k", KEYS, f"={k}"),
        ops.release_names("q.rotated", "k.rotated", *(("q.wide", "k.wide") if at_once else ())),
        ops.release_names(q, k),
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
    """Build Baichuan: `W_pack` viewed as q, k and v, norms that keep x in fp32 too, and Baichuan 2's normalised head.

    The 7B model rotates, and passes a mask of the model's dtype to torch's attention; the 13B model has ALiBi. Only the
    7B config has `max_position_embeddings`, and only Baichuan 2 has a vocabulary of 125,696 tokens.
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
            ops.release_names("x", "embeds", "positions", *named),
            *(_norm_head("n", wiring) if m.vocab_size == 125_696 else (lm_head("n"),)),
        ),
    )


def _packed_projection(name: str) -> tuple[Op, ...]:
    return (
        ops.linear(f"{name}.W_pack", "n1", "packed", "3 a d", "h", "attention"),
        ops.view(f"{name}.unflatten", "packed", "proj", "b s 3 a d", gradient="new"),
        *(ops.view(f"{name}.{t}_slice", "proj", f"{t}.slice", QUERIES, gradient="new") for t in "qkv"),
    )


def _rotary_attention(wiring: Wiring, longest: int, name: str = "self_attn") -> tuple[Op, ...]:
    return (
        *_packed_projection(name),
        *_heads(name, "qk", "new"),
        *_heads(name, "v", "same"),
        *_rope_in_fp32(name, "q1", "k1", longest, at_once=False),
        *as_published(f"{name}.attention", wiring, ("k", "v1"), f"{_BAICHUAN}, 7B, Attention.forward"),
        *_biased_attention(f"{name}.attention", "q", "k", "v1", "o", wiring._replace(caching=False), "b s s"),
        ops.linear(f"{name}.o_proj", "o", "ao", "h", "a d", "attention"),
        ops.release_names("packed", "q", "k", "o", "n1", "cos", "sin"),
    )


def _unrotated_attention(wiring: Wiring, name: str = "self_attn") -> tuple[Op, ...]:
    """Attention with ALiBi.

    It is written out for `eager`, and if the model does not train. Otherwise the biases are the mask, as xformers' and
    torch's attention take them.
    """
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
        *_packed_projection(name),
        *_heads(name, "q", "new" if eager else "same"),
        *_heads(name, "k", "same"),
        *_heads(name, "v", "new" if eager else "same"),
        *kernel,
        ops.linear(f"{name}.o_proj", "o", "ao", "h", "a d", "attention"),
        ops.release_names("packed", "q1", "o", "n1", *(("probs",) if eager else ())),
    )


def _heads(name: str, tensors: str, gradient: str) -> tuple[Op, ...]:
    return tuple(ops.view(f"{name}.{t}_heads", f"{t}.slice", f"{t}1", QUERIES, gradient) for t in tensors)


def _half_norm(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """RMSNorm that takes the variance from a cast of x, which the square keeps, and keeps x itself for the product."""
    cast, square, mean, eps, rsqrt, scale, to_half, weight, _ = ops.rms_norm(name, x, y, shape, axis)
    normalised, rstd = scale.writes[0].name, scale.reads[1]
    product = scale._replace(reads=(x, rstd), keeps=(Keep(rstd, x), Keep(x, rstd)), writes=(Tensor(normalised, shape),))
    left = ops.release_names(mean.writes[0].name, to_half.writes[0].name)
    return (cast, square, mean, eps, rsqrt, product, to_half, weight, left)


def _norm_head(x: str, wiring: Wiring) -> tuple[Op, ...]:
    """NormHead: every row of the matrix divided by its length. Both matrices are kept; five are alive in backward.

    If the model does not train, the first pass overwrites the matrix with the divided rows.
    """
    w = Weight("lm_head.weight", "v h", "lm_head", rows=1)
    if not wiring.records:
        written = (Tensor("normalised", "v h", f"={w.name}"), Tensor("lengths", "v"), Tensor("clamped", "v"))
        source = f"{_READ}: NormHead.forward"
        once = Op("lm_head.normalize", (), scratch=written, weights=(w,), source=source)
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
        ops.matmul("lm_head", x, "normalised", "logits", "b s v", "mm"),
    )


def _causal_mask() -> tuple[Op, ...]:
    """A mask in the model's dtype for every sequence, padded or not."""
    parts = (Tensor("causal", "s s", "=embeds"), *(Tensor(t, "b s s", "=embeds") for t in ("expanded", "inverted")))
    return (Op("mask", (), (Tensor("mask", "b s s", "=embeds"),), scratch=parts),)


def _alibi(m: ModelSpec, wiring: Wiring) -> tuple[Op, ...]:
    """ALiBi's biases together with the causal mask, for every head.

    They are made on the host and held by the model; for a model that does not train, once for all its positions. With a
    mask of tokens, which generation passes, every pair of tokens so far has a number for each sequence and head, also
    in the pass of a single token.
    """
    if wiring.records:
        alibi = "alibi" if wiring.padded else "mask"
        bias_op = Op("alibi_mask", (), (Tensor(alibi, "a s s", "=embeds"),), holds="step")
        if not wiring.padded:
            return (bias_op,)
        parts = (Tensor("expanded", "b s s", "=embeds"), Tensor("inverted", "b s s", "=embeds"))
        return (bias_op, Op("mask", (alibi,), (Tensor("mask", "b a s s", "=embeds"),), scratch=parts))
    longest = m.config_int("model_max_length", m.max_position_embeddings or 4096)
    table = Weight("model.future_mask", f"a {longest} {longest}", "buffer", trains=False)
    if not wiring.padded and not wiring.generates:
        return (Op("mask", (), (Tensor("mask", "0", "=embeds"),), (table,)),)
    tokens = "kv kv" if wiring.decodes else "s s"
    like_embeds = "=embeds"
    source = f"{_READ}: 13B, BaichuanModel.forward"

    def pairs_of(name: str, *reads: str, dtype: str = "bool", scratch: tuple[Tensor, ...] = ()) -> Op:
        return Op(f"mask.{name}", reads, (Tensor(name, f"b {tokens}", dtype),), scratch=scratch, source=source)

    return (
        pairs_of("product", dtype=like_embeds),
        pairs_of("positive", "product"),
        pairs_of("lower", "positive"),
        pairs_of("difference", dtype=like_embeds),
        pairs_of("equal", "difference"),
        pairs_of("both", "lower", "equal"),
        pairs_of("expanded", "both", dtype=like_embeds),
        pairs_of("inverted", "expanded", dtype=like_embeds),
        pairs_of("filled", "inverted", dtype=like_embeds, scratch=(Tensor("where", f"b {tokens}", "bool"),)),
        Op("mask", ("filled",), (Tensor("mask", f"b a {tokens}", like_embeds),), (table,), source=source),
    )


_IN_FORWARD = ("mask", "expanded", "filled")  # variables of the model's forward, held until it returns


def _biased_attention(name: str, q: str, k: str, v: str, y: str, wiring: Wiring, shape: str) -> tuple[Op, ...]:
    """torch's attention with a mask of the model's dtype, which it keeps as it is. Flash attention takes no mask.

    If autocast casts the mask, every layer has a copy of `shape`.
    """
    return tuple(
        ops.view(op.name, "mask", op.writes[0].name, shape) if op.name == f"{name}.mask" else op
        for op in attention(name, q, k, v, y, _always_masked(wiring), False)
    )


def _always_masked(wiring: Wiring) -> Wiring:
    """Return the wiring of torch's attention with a mask, which the code calls whatever transformers is told to use."""
    backend = "efficient" if wiring.masked == "eager" else wiring.masked
    return wiring._replace(backend=backend, masked=backend, padded=True)


def _alibi_attention(name: str, q: str, k: str, v: str, y: str, wiring: Wiring) -> tuple[Op, ...]:
    """Eager attention with ALiBi in one dtype: scores, scaled, biased, clipped from below, softmax.

    The clip keeps the biased scores. Concatenated keys and values are stored head by head, and need no copy.
    """
    scores, copy_or_view = "b a s s", ops.view if wiring.decodes else ops.copy
    return (
        ops.copy(f"{name}.{q}_flat", q, f"{q}.flat", QUERIES),
        copy_or_view(f"{name}.{k}_flat", k, f"{k}.flat", QUERIES),
        ops.matmul(f"{name}.scores", f"{q}.flat", f"{k}.flat", "scores", scores),
        ops.release_names(f"{q}.flat", f"{k}.flat"),
        ops.scale(f"{name}.scaling", "scores", "scaled", scores),
        ops.release_names("scores"),
        Op(f"{name}.add_mask", ("scaled", "mask"), (Tensor("biased", scores),), gradient="same"),
        ops.release_names("scaled"),
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
        ops.release_names("cut"),
        copy_or_view(f"{name}.v_flat", v, f"{v}.flat", QUERIES),
        ops.matmul(f"{name}.product", "probs", f"{v}.flat", "heads", QUERIES),
        ops.copy(f"{name}.reshape", "heads", y, QUERIES, gradient="new"),
    )


def qwen(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build the first Qwen: `c_attn` split in three, rotation in fp32, and a mask in every layer.

    The rotary table is for twice the sequence. `intermediate_size` counts gate and up together. The scaling of long
    sequences (`use_logn_attn`) is for inference.
    """
    name, masked = "attn", "mask" if wiring.padded else ""
    block = (
        *ops.rms_norm("ln_1", "x", "n1", "b s h", "h")[:-1],
        ops.linear(f"{name}.c_attn", "n1", "qkv", "3 a d", "h", "attention", bias=True),
        ops.split(f"{name}.split", "qkv", tuple(Tensor(t, QUERIES) for t in ("q1", "k1", "v"))),
        *_rope_with_empty_rest(f"{name}.rope_q", "q1", "q"),
        *_rope_with_empty_rest(f"{name}.rope_k", "k1", "k"),
        *_attention_with_layer_masks(f"{name}.attention", "q", "k", "v", "o", wiring),
        ops.linear(f"{name}.c_proj", "o", "ao", "h", "a d", "attention", bias=not m.get("no_bias", True)),
        ops.release_names("qkv", "q", "k", "v", "o"),
        ops.add("residual_1", "ao", "x", "x1", "b s h"),
        *ops.rms_norm("ln_2", "x1", "n2", "b s h", "h")[:-1],
        ops.release_names("n1"),
        ops.linear("mlp.w1", "n2", "up", "f2", "h", "mlp", bias=not m.get("no_bias", True)),
        ops.linear("mlp.w2", "n2", "gate", "f2", "h", "mlp", bias=not m.get("no_bias", True)),
        ops.activation("mlp.silu", "gate", "act", "b s f2"),
        ops.mul("mlp.product", "up", "act", "product", "b s f2"),
        ops.linear("mlp.c_proj", "product", "mo", "h", "f2", "mlp", bias=not m.get("no_bias", True)),
        ops.release_names("up", "gate", "product"),
        ops.add("residual_2", "x1", "mo", "y", "b s h"),
        ops.release_names("ao", "n2", "mo"),
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
            ops.release_names("x", "embeds", "positions", *((masked,) if masked else ())),
            lm_head("n"),
        ),
    )


def _rope_with_empty_rest(name: str, x: str, y: str) -> tuple[Op, ...]:
    """Rotate in fp32 and concatenate with the dimensions that are not rotated, though there are none."""
    wide, summed, joined = f"{y}.wide", f"{y}.summed", f"{y}.joined"
    cosine, turned, *rest = ops.rotate(name, f"{y}.rot", summed, QUERIES, "b s a rot2")
    return (
        ops.cast(f"{name}.float", x, wide, QUERIES, "fp32"),
        ops.view(f"{name}.rot", wide, f"{y}.rot", QUERIES),
        ops.view(f"{name}.pass", wide, f"{y}.pass", QUERIES, gradient="new"),
        cosine,
        turned._replace(scratch_back=(Scratch(Tensor("negative", "b s a rot2", "fp32")),), gradient="view"),
        *rest,
        Op(f"{name}.cat", (summed, f"{y}.pass"), (Tensor(joined, QUERIES),), gradient="same"),
        ops.cast(f"{name}.cast", joined, y, QUERIES, f"={x}"),
        ops.release_names(wide, summed),
    )


def _attention_with_layer_masks(name: str, q: str, k: str, v: str, y: str, wiring: Wiring) -> tuple[Op, ...]:
    """Attention with a causal mask made in every layer: boolean, or in the model's dtype if the batch is padded."""
    if wiring.backend == "flash_2":
        return attention(name, q, k, v, y, wiring, False)
    masked = _always_masked(wiring)
    ones = Tensor("ones", "s s", "bool")
    causal = Op(f"{name}.causal", (), (Tensor(f"{y}.causal", "s s", "bool"),), scratch=(ones,))
    kernel = attention(name, q, k, v, y, masked, False, mask=f"{y}.causal")
    if not wiring.padded:
        shapes = {f"{name}.mask": "s s8"}
        kernel = tuple(_reshaped(op, shapes[op.name]) if op.name in shapes else op for op in kernel)
        return (causal, *kernel, ops.release_names(f"{y}.causal"))
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
    return (causal, filled, *kernel, ops.release_names(f"{y}.causal", f"{y}.filled"))


def _reshaped(op: Op, shape: str) -> Op:
    return op._replace(writes=(op.writes[0]._replace(shape=shape),))


def _renamed(op: Op, old: str, new: str) -> Op:
    """Return the op with a weight renamed."""
    weights = tuple(w._replace(name=new) if w.name == old else w for w in op.weights)
    keeps = tuple(k._replace(what=new if k.what == old else k.what, of=new if k.of == old else k.of) for k in op.keeps)
    return op._replace(weights=weights, keeps=keeps)


BUILDERS = {"baichuan": baichuan, "internlm2": internlm2, "minicpm": minicpm, "qwen": qwen}
