"""Falcon: LayerNorm, attention and MLP in parallel, a mask for every batch, one or few key/value heads.

transformers calls torch's attention itself, with a mask even if nothing is padded, which flash attention does not take.
A key/value head shared by all queries is passed as one head, which only torch's reference product takes.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import KEYS, QUERIES, SCORES, attention, cached, mask
from memplan.catalogue.decoder.frame import before, lm_head, returned
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import activation, dropped, drops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Run, Stack, Tensor, Weight
from memplan.models.model import ModelSpec

_SOURCE = "transformers 5.24 models/falcon/modeling_falcon.py"


def falcon(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Falcon. The 7B model shares one key/value head; the 40B and 180B models copy theirs for each query head."""
    mask_ops = () if wiring.backend == "flash_2" else _mask(wiring, m.get("alibi", False))
    embedded = (ops.embedding("transformer.word_embeddings", "ids", "embeds", "v", "h"),)
    return Stack(
        before(wiring, embedded=embedded, made=mask_ops),
        (Run((_block(m, wiring),), "L"),),
        (
            ops.layer_norm("transformer.ln_f", "x", "n", "b s h", "h"),
            ops.release_names(
                "x", "embeds", "positions", "cos", "sin", *(op.name for op in mask_ops), *returned(wiring)
            ),
            lm_head("n", "transformer.word_embeddings.weight" if m.tie_word_embeddings else ""),
        ),
    )


def _mask(wiring: Wiring, alibi: bool) -> tuple[Op, ...]:
    """The mask. ALiBi's biases are filled into one of the model's dtype for every head."""
    if alibi:
        parts = (
            Tensor("causal", "s s", "bool"),
            Tensor("mask", "b s s", "=embeds"),
            Tensor("scaled", "b a s", "=embeds"),
        )
        return (
            *(() if wiring.padded else (Op("ones", (), (Tensor("ones", "b s", "int64"),)),)),
            Op("alibi", (), (Tensor("alibi", "b a s", "=embeds"),)),
            Op("mask", (), (Tensor("mask", SCORES, "=embeds"),), scratch=parts, source=_SOURCE),
        )
    if wiring.backend == "eager" or wiring.padded:
        return mask(wiring, "embeds")
    compared = (("sequences", "b"), ("heads", "1"), ("queries", "s"), ("keys", "s"))
    numbers = tuple(Tensor(f"numbers of {what}", shape, "int64") for what, shape in compared)
    source = "transformers 5.24 masking_utils.py sdpa_mask"
    return (Op("mask", (), (Tensor("mask", "s s", "bool"),), scratch=numbers, source=source),)


def _block(m: ModelSpec, wiring: Wiring) -> Block:
    """One layer, with one norm for attention and MLP or one for each.

    In parallel, MLP and attention are added in place, and their sum then to the input.
    """
    two_norms = m.get("new_decoder_architecture", False) and m.get("num_ln_in_parallel_attn", 2) == 2
    norms = (("ln_attn", "n1"), ("ln_mlp", "n2")) if two_norms else (("input_layernorm", "n1"),)
    n2, bias, drop = norms[-1][1], m.get("bias", False), drops(m, "hidden_dropout")
    if not m.get("parallel_attn", True) and not m.get("new_decoder_architecture", False):
        branch = (
            *dropped("dropout_1", "ao", "ao.dropped", "b s h", drops(m, "attention_dropout")),
            ops.add("residual_1", "x", "ao.dropped", "x1", "b s h"),
            ops.layer_norm("post_attention_layernorm", "x1", "n2", "b s h", "h"),
            *_mlp(m, "n2", "branches", bias),
        )
        stream = "x1"
    else:
        branches = Op("parallel", ("mo", "ao"), (Tensor("branches", "b s h", "=mo"),), gradient="same", view=True)
        branch = (*_mlp(m, n2, "mo", bias), branches)
        stream = "x"
    passed = ("positions", "cos", "sin", *(("alibi",) if m.get("alibi", False) else ()))
    return Block(
        "transformer.h",
        (
            *(ops.layer_norm(name, "x", y, "b s h", "h") for name, y in norms),
            *_attention(m, wiring, "n1", "ao", bias),
            *branch,
            *dropped("dropout_2", "branches", "branches.dropped", "b s h", drop),
            ops.add("residual_2", stream, "branches.dropped", "y", "b s h"),
            ops.release_names("ao", "branches", "n1", *passed, *returned(wiring)),
        ),
    )


def _linear(name: str, x: str, y: str, out: str, into: str, group: str, bias: bool) -> tuple[Op, ...]:
    """A linear layer that adds its bias to the product in a new tensor."""
    product = ops.linear(name, x, f"{y}.product" if bias else y, out, into, group)
    written = product.writes[0]._replace(dtype=f"={x}")
    product = product._replace(writes=(written,), weights=(product.weights[0]._replace(is_read_as_view=True),))
    if not bias:
        return (product,)
    weight = Weight(f"{name}.bias", out, group)
    return (
        product,
        Op(f"{name}.bias", (f"{y}.product",), (Tensor(y, f"b s {out}"),), (weight,), gradient="same", source=_SOURCE),
        ops.release_names(f"{y}.product"),
    )


def _mlp(m: ModelSpec, x: str, y: str, bias: bool, name: str = "mlp") -> tuple[Op, ...]:
    return (
        *_linear(f"{name}.dense_h_to_4h", x, "up", "f", "h", "mlp", bias),
        *activation(m, f"{name}.act", "up", "act", "b s f"),
        *_linear(f"{name}.dense_4h_to_h", "act", y, "h", "f", "mlp", bias),
        ops.release_names(x),
    )


def _attention(
    m: ModelSpec, wiring: Wiring, x: str, y: str, bias: bool, name: str = "self_attention"
) -> tuple[Op, ...]:
    shared = m.num_key_value_heads == 1 and m.num_attention_heads > 1 and not m.get("new_decoder_architecture", False)
    kv = ("k", KEYS) if shared else ("a", QUERIES)
    alibi = m.get("alibi", False)
    rotated = (
        *ops.rotate(f"{name}.rope_q", "q1", "q", QUERIES, "b s a rot2"),
        *ops.rotate(f"{name}.rope_k", "k1", "k", kv[1], f"b s {kv[0]} rot2"),
        ops.release_names("q1", "k1"),
    )
    unrotated = (ops.view(f"{name}.q", "q1", "q", QUERIES), ops.view(f"{name}.k", "k1", "k", kv[1]))
    return (
        *_linear(f"{name}.query_key_value", x, "qkv", "qkv", "h", "attention", bias),
        *(
            _shared_head(name)
            if shared
            else _per_group(name)
            if m.get("new_decoder_architecture", False)
            else _per_head_views(name)
        ),
        *(unrotated if alibi else rotated),
        *_kernel(f"{name}.attention", wiring, shared, kv[1], alibi, drops(m, "attention_dropout")),
        *_linear(f"{name}.dense", "o", y, "h", "a d", "attention", bias),
        ops.release_names("qkv", "q", "k", "v", "o"),
    )


def _shared_head(name: str) -> tuple[Op, ...]:
    """A view of the projection for q, copies for k and v. Three gradients as wide as the projection are summed."""
    return (
        ops.view(f"{name}.q_slice", "qkv", "q1", QUERIES, gradient="new"),
        *(_index_copy(name, t, y) for t, y in (("k", "k1"), ("v", "v"))),
    )


def _index_copy(name: str, t: str, y: str) -> Op:
    index = f"{t}.index"
    return Op(
        f"{name}.{t}_index",
        ("qkv",),
        (Tensor(y, KEYS), Tensor(index, "1", "int64")),
        (),
        (Keep(index, "qkv"),),
        source=f"{ops.DERIVATIVES}: index",
    )


def _per_head_views(name: str) -> tuple[Op, ...]:
    """q, k and v of a head side by side: views, whose gradients are each as wide as the whole projection."""
    return tuple(
        ops.view(f"{name}.{t}_slice", "qkv", y, QUERIES, gradient="new")
        for t, y in (("q", "q1"), ("k", "k1"), ("v", "v"))
    )


def _per_group(name: str) -> tuple[Op, ...]:
    """q is copied out from between the k and v of its group; k and v are copied for every query head."""
    return (
        ops.view(f"{name}.q_slice", "qkv", "q0", QUERIES, gradient="new"),
        *(_index_copy(name, t, f"{t}.group") for t in "kv"),
        ops.copy(f"{name}.q_flatten", "q0", "q1", QUERIES),
        ops.copy(f"{name}.k_flatten", "k.group", "k1", QUERIES, gradient="new"),
        ops.copy(f"{name}.v_flatten", "v.group", "v", QUERIES, gradient="new"),
        ops.release_names("k.group", "v.group"),
    )


def _kernel(name: str, wiring: Wiring, shared: bool, kv: str, alibi: bool, drop: bool) -> tuple[Op, ...]:
    kernel = _uncached_kernel(name, wiring._replace(caching=False), shared, kv, alibi, drop)
    return cached(name, wiring, _without_head_copies(name, kernel, wiring, shared))


def _without_head_copies(name: str, kernel: tuple[Op, ...], wiring: Wiring, shared: bool) -> tuple[Op, ...]:
    """Return the kernel without copies of what is stored head by head already.

    That is a single token's heads, and cached k and v unless all queries share them.
    """
    flat = {f"{name}.{what}" for what in ("q_flat", "contiguous", "reshape") if wiring.has_one_query}
    flat |= {f"{name}.{t}_flat" for t in "kv" if wiring.is_head_major and not shared}
    return tuple(op._replace(view=True) if op.name in flat else op for op in kernel)


def _uncached_kernel(name: str, wiring: Wiring, shared: bool, kv: str, alibi: bool, drop: bool) -> tuple[Op, ...]:
    if wiring.backend == "flash_2":
        return attention(name, "q", "k", "v", "o", wiring, False)
    if wiring.backend == "eager":
        return _eager_with_alibi(name, drop) if alibi else _eager(name, shared, kv)
    if shared or wiring.masked == "math":
        kernel = _math(name, shared, kv, "=q.low" if wiring.half_math else "fp32")
    else:
        masked_wiring = wiring._replace(backend="efficient", masked="efficient", padded=True)
        kernel = attention(name, "q", "k", "v", "o", masked_wiring, False)
        kernel = _with_padded_biases(name, kernel) if alibi else kernel
    if not alibi:
        return kernel
    return tuple(_per_head_mask(op) if op.name in (f"{name}.mask", f"{name}.mask_float") else op for op in kernel)


def _with_padded_biases(name: str, kernel: tuple[Op, ...]) -> tuple[Op, ...]:
    """The memory-efficient kernel with biases. Every layer pads rows that are no multiple of 8, and keeps them padded.

    Source: torch 2.13 aten/src/ATen/native/transformers/attention.cpp preprocess_mask, pad_bias.
    """
    padded, operands = "bias.padded", ("q.lowered", "k.lowered", "v.lowered")
    pad = Op(f"{name}.pad_mask", ("mask",), (Tensor(padded, "b a s s_uneven8", "=mask"),))
    operations: list[Op] = []
    for op in kernel:
        if op.name == name:
            keeps = (*op.keeps, *(Keep(padded, x) for x in operands))
            operations += (pad, op._replace(reads=(*op.reads, padded), keeps=keeps, scratch=()))
        else:
            operations.append(op)
    return tuple(operations)


def _per_head_mask(op: Op) -> Op:
    """Return the op of a mask that has a bias for every head, and the model's dtype, already."""
    written = op.writes[0]._replace(shape=SCORES)
    return op._replace(writes=(written,)) if op.cast else ops.view(op.name, "mask", written.name, SCORES)


def _scores(name: str, q: str, k: str, shared: bool, autocast: str) -> tuple[Op, ...]:
    """Scores of q and k, which a batched product needs contiguous, and k for every query head."""
    return (
        ops.copy(f"{name}.q_flat", q, "q.flat", QUERIES),
        ops.copy(f"{name}.k_flat", k, "k.flat", QUERIES, gradient="new" if shared else "same"),
        ops.matmul(f"{name}.scores", "q.flat", "k.flat", "scores", SCORES)._replace(autocast=autocast),
    )


def _eager(name: str, shared: bool, kv: str) -> tuple[Op, ...]:
    """Eager attention. Scores are divided in place; the softmax is in the dtype of the norm's output."""
    return (
        *_autocast_inputs(name, ("q", "k"), kv),
        *_scores(name, "q.low", "k.low", shared, "lower"),
        ops.view(f"{name}.divide", "scores", "divided", SCORES, gradient="new"),
        Op(f"{name}.add_mask", ("divided", "mask"), (Tensor("masked", SCORES),), gradient="same"),
        *ops.softmax(f"{name}.softmax", "masked", "probs", SCORES),
        ops.release_names("scores"),
        ops.copy(f"{name}.v_flat", "v", "v.flat", QUERIES, gradient="new" if shared else "same"),
        ops.matmul(f"{name}.product", "probs", "v.flat", "heads", QUERIES),
        ops.copy(f"{name}.reshape", "heads", "o", QUERIES, gradient="new"),
    )


def _eager_with_alibi(name: str, drop: bool) -> tuple[Op, ...]:
    """Eager attention with ALiBi. Scores and biases are added in fp32, and every step stays alive to the end."""
    return (
        *_autocast_inputs(name, ("q", "k"), QUERIES),
        *_scores(name, "q.low", "k.low", False, "lower"),
        ops.cast(f"{name}.float", "scores", "wide", SCORES, "fp32"),
        Op(f"{name}.add_alibi", ("wide", "alibi"), (Tensor("logits", SCORES),), gradient="same"),
        ops.view(f"{name}.scaling", "logits", "scaled", SCORES, gradient="new"),
        Op(f"{name}.add_mask", ("scaled", "mask"), (Tensor("masked", SCORES),), gradient="same"),
        ops.cast(f"{name}.cast", "masked", "masked.low", SCORES, "=n1"),
        *ops.softmax(f"{name}.softmax", "masked.low", "probs.whole", SCORES),
        ops.release_names("masked"),
        *dropped(f"{name}.attention_dropout", "probs.whole", "probs", SCORES, drop),
        ops.copy(f"{name}.v_flat", "v", "v.flat", QUERIES),
        ops.matmul(f"{name}.product", "probs", "v.flat", "heads", QUERIES),
        ops.copy(f"{name}.reshape", "heads", "o", QUERIES, gradient="new"),
        ops.release_names("scores", "wide", "logits", "probs", "heads"),
    )


def _math(name: str, shared: bool, kv: str, to: str) -> tuple[Op, ...]:
    """torch's reference product with a mask, in `to` even under autocast. The mask is added in place."""
    low = ("q.low", "k.low", "v.low")
    return (
        *_autocast_inputs(name, ("q", "k", "v"), kv),
        Op(f"{name}.mask", ("mask",), (Tensor("bias", "b s s", "=q.low"),), source=ops.DERIVATIVES),
        ops.cast(f"{name}.q_float", "q.low", "q32", QUERIES, to),
        ops.cast(f"{name}.k_float", "k.low", "k32", kv, to),
        ops.cast(f"{name}.v_float", "v.low", "v32", kv, to),
        ops.cast(f"{name}.mask_float", "bias", "bias32", "b s s", to),
        ops.scale(f"{name}.scale_q", "q32", "q.scaled", QUERIES),
        ops.scale(f"{name}.scale_k", "k32", "k.scaled", kv),
        *_scores(name, "q.scaled", "k.scaled", shared, ""),
        ops.release_names("k.scaled"),
        *ops.softmax(f"{name}.softmax", "scores", "probs", SCORES, to),
        ops.cast(f"{name}.second", "probs", "second", SCORES, "=q.low"),
        ops.copy(f"{name}.v_flat", "v32", "v.flat", QUERIES, gradient="new" if shared else "same"),
        ops.matmul(f"{name}.product", "probs", "v.flat", "product", QUERIES)._replace(autocast=""),
        ops.view(f"{name}.unflatten", "product", "heads32", QUERIES, gradient="new"),
        ops.cast(f"{name}.cast", "heads32", "heads", QUERIES, "=q.low"),
        ops.release_names("second", "q.scaled", "probs", "k32", "v32", "bias32", "bias", *low),
        ops.copy(f"{name}.contiguous", "heads", "o", QUERIES),
    )


def _autocast_inputs(name: str, tensors: tuple[str, ...], kv: str) -> tuple[Op, ...]:
    """Autocast's casts of what the call is given; nothing without autocast."""
    return tuple(
        Op(
            f"{name}.{t}.autocast",
            (t,),
            (Tensor(f"{t}.low", QUERIES if t == "q" else kv),),
            cast=True,
            autocast="lower",
            source="torch 2.13 aten/src/ATen/autocast_mode.h lower_precision_fp",
        )
        for t in tensors
    )


BUILDERS = {"falcon": falcon}
