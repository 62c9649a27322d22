"""BLOOM and MPT: ALiBi's biases are added to the scores, so attention is written out whatever kernel is requested."""

from __future__ import annotations

from memplan.catalogue.attention.attention import QUERIES, SCORES, cached, mask
from memplan.catalogue.decoder.frame import inputs, lm_head
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import dropped, drops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Run, Scratch, Stack, Tensor
from memplan.models.model import ModelSpec

_BLOOM = "transformers 5.24 models/bloom/modeling_bloom.py"
_MPT = "transformers 5.24 models/mpt/modeling_mpt.py"


def bloom(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build BLOOM: normalised embeddings; q, k and v copied head by head; GELU with a hand-written derivative."""
    scratch = (Tensor("slopes over positions", "a s", "fp32"), Tensor("alibi in fp32", "b a s", "fp32"))
    written = (Tensor("alibi", "b a s", "=embeds"), *(() if wiring.padded else (Tensor("slopes", "a", "fp32"),)))
    counted = (Tensor("tokens so far", "", "int64"),) if wiring.static and wiring.decodes else ()
    written = (*written, *counted)
    before = (
        inputs(wiring.padded),
        ops.embedding("transformer.word_embeddings", "ids", "tokens", "v", "h"),
        ops.layer_norm("transformer.word_embeddings_layernorm", "tokens", "embeds", "b s h", "h"),
        Op("alibi", (), written, scratch=scratch, source=_BLOOM),
        *mask(wiring._replace(backend="eager"), "tokens"),
    )
    after = (
        ops.layer_norm("transformer.ln_f", "x", "n", "b s h", "h"),
        ops.release_names("x", "tokens", *(t.name for t in written), "mask", "probs"),
        lm_head("n", "transformer.word_embeddings.weight" if m.tie_word_embeddings else ""),
    )
    return Stack(before, (Run((_bloom_block(m, wiring),), "L"),), after)


def _bloom_block(m: ModelSpec, wiring: Wiring) -> Block:
    """One layer. Each half adds its input, or its norm's output, by itself."""
    normed, drop = m.get("apply_residual_connection_post_layernorm", False), drops(m, "hidden_dropout")
    return Block(
        "transformer.h",
        (
            ops.layer_norm("input_layernorm", "x", "n1", "b s h", "h"),
            *_bloom_attention(m, wiring),
            *dropped("self_attention.hidden_dropout", "ao", "ao.dropped", "b s h", drop),
            ops.add("residual_1", "n1" if normed else "x", "ao.dropped", "x1", "b s h"),
            ops.release_names("qkv", "q", "k", "v", "scores", "masked", "o"),
            ops.layer_norm("post_attention_layernorm", "x1", "n2", "b s h", "h"),
            ops.release_names("n1"),
            ops.linear("mlp.dense_h_to_4h", "n2", "up", "f", "h", "mlp", bias=True),
            _bloom_gelu("mlp.gelu_impl", "up", "act"),
            ops.linear("mlp.dense_4h_to_h", "act", "mo", "h", "f", "mlp", bias=True),
            *dropped("mlp.hidden_dropout", "mo", "mo.dropped", "b s h", drop),
            ops.add("residual_2", "n2" if normed else "x1", "mo.dropped", "y", "b s h"),
            ops.release_names("act", "n2", "x1", "probs"),
        ),
    )


def _bloom_attention(m: ModelSpec, wiring: Wiring, name: str = "self_attention") -> tuple[Op, ...]:
    return (
        ops.linear(f"{name}.query_key_value", "n1", "qkv", "qkv", "h", "attention", bias=True),
        *(ops.view(f"{name}.{t}_select", "qkv", f"{t}.view", QUERIES, gradient="new") for t in "qkv"),
        *cached(name, wiring, (), tensors=("k.view", "v.view")),
        *(
            (ops.view if (wiring.has_one_query if t == "q" else wiring.is_head_major) else ops.copy)(
                f"{name}.{t}_flat", f"{t}.view", t, QUERIES
            )
            for t in "qkv"
        ),
        Op(
            f"{name}.baddbmm",
            ("alibi", "q", "k"),
            (Tensor("scores", SCORES, "=q"),),
            (),
            (Keep("k", "q"), Keep("q", "k")),
            scratch_back=(Scratch(Tensor("unscaled gradient", QUERIES, "=q")),),
            autocast="lower",
            product="matrix",
            source=f"{ops.DERIVATIVES}: baddbmm",
        ),
        Op(f"{name}.add_mask", ("scores", "mask"), (Tensor("masked", SCORES),), gradient="same"),
        *ops.softmax(f"{name}.softmax", "masked", "softmax", SCORES, "fp32"),
        ops.cast(f"{name}.cast", "softmax", "probs.whole", SCORES, "=q"),
        *dropped(f"{name}.attention_dropout", "probs.whole", "probs", SCORES, drops(m, "attention_dropout")),
        _bmm(f"{name}.product", "probs", "v", "heads", QUERIES),
        ops.view(f"{name}.permute", "heads", "permuted", QUERIES, gradient="new"),
        (ops.view if wiring.has_one_query else ops.copy)(f"{name}.merge", "permuted", "o", QUERIES),
        ops.linear(f"{name}.dense", "o", "ao", "h", "a d", "attention", bias=True),
    )


def _bmm(name: str, a: str, b: str, y: str, shape: str) -> Op:
    """A plain batched product, into whose gradients autograd can add in place."""
    return ops.matmul(name, a, b, y, shape)._replace(gradient="new")


def _bloom_gelu(name: str, x: str, y: str) -> Op:
    """GELU, which keeps x and recomputes the rest: up to three temporaries in forward, and four in backward."""
    wide = "b s f"
    return Op(
        name,
        (x,),
        (Tensor(y, wide),),
        (),
        (Keep(x, x),),
        scratch=tuple(Tensor(t, wide, f"={x}") for t in ("half", "inner", "square")),
        scratch_back=tuple(Scratch(Tensor(t, wide, f"={x}")) for t in ("tanh", "half", "slope", "square")),
        source=f"{_BLOOM} GeLUFunction",
    )


def mpt(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build MPT: no biases, and ALiBi in fp32, which makes the scores fp32. A boolean mask fills them in all layers."""
    longest = m.max_position_embeddings or 2048
    before = (
        inputs(wiring.padded),
        ops.embedding("transformer.wte", "ids", "embeds", "v", "h"),
        Op("alibi", (), (Tensor("alibi", f"a {longest}", "fp32"),), scratch=(Tensor("arange", f"{longest}", "int32"),)),
        Op(
            "mask", (), (Tensor("mask", "b s s", "bool"),), scratch=(Tensor("to add", "b s s", "=embeds"),), source=_MPT
        ),
    )
    after = (
        ops.layer_norm("transformer.norm_f", "x", "n", "b s h", "h", bias=False),
        ops.release_names("x", "embeds", "alibi", "mask", "probs"),
        lm_head("n", "transformer.wte.weight" if m.tie_word_embeddings else ""),
    )
    return Stack(before, (Run((_mpt_block(m, wiring),), "L"),), after)


def _mpt_block(m: ModelSpec, wiring: Wiring) -> Block:
    drop = m.probability("attn_pdrop", "attn_config") > 0
    clipped = bool(m.part("attn_config").get("clip_qkv"))
    return Block(
        "transformer.blocks",
        (
            ops.layer_norm("norm_1", "x", "n1", "b s h", "h", bias=False),
            *_mpt_attention(drop, clipped, wiring),
            *dropped("resid_attn_dropout", "ao", "ao.dropped", "b s h", drop),
            ops.add("residual_1", "ao.dropped", "x", "x1", "b s h"),
            ops.layer_norm("norm_2", "x1", "n2", "b s h", "h", bias=False),
            ops.release_names("n1"),
            ops.linear("ffn.up_proj", "n2", "up", "f", "h", "mlp"),
            ops.activation("ffn.act", "up", "act", "b s f"),
            ops.linear("ffn.down_proj", "act", "mo", "h", "f", "mlp"),
            *dropped("ffn.dropout", "mo", "mo.dropped", "b s h", drop),
            ops.add("residual_2", "mo.dropped", "x1", "y", "b s h"),
            ops.release_names("act", "n2", "x1", "ao", "mo", "probs"),
        ),
    )


def _mpt_attention(drop: bool, clipped: bool, wiring: Wiring, name: str = "attn") -> tuple[Op, ...]:
    projected = ops.linear(f"{name}.Wqkv", "n1", "projected" if clipped else "qkv", "3 a d", "h", "attention")
    clip = Op(
        f"{name}.clip",
        ("projected",),
        (Tensor("qkv", "b s 3 a d"),),
        (),
        (Keep("projected", "projected"),),
        source=f"{ops.DERIVATIVES}: clamp",
    )
    gradients = {"q": "new", "k": "same", "v": "new"}
    return (
        projected,
        *((clip,) if clipped else ()),
        ops.split(f"{name}.chunk", "qkv", tuple(Tensor(f"{t}.part", QUERIES) for t in "qkv")),
        *(ops.view(f"{name}.{t}_heads", f"{t}.part", t, QUERIES, gradients[t]) for t in "qkv"),
        *cached(name, wiring, ()),
        *(
            (ops.view if wiring.is_head_major and t == "k" else ops.copy)(f"{name}.{t}_flat", t, f"{t}.flat", QUERIES)
            for t in "qk"
        ),
        ops.matmul(f"{name}.scores", "q.flat", "k.flat", "scores", SCORES),
        ops.scale(f"{name}.scaling", "scores", "scaled", SCORES),
        Op(f"{name}.add_alibi", ("scaled", "alibi"), (Tensor("biased", SCORES),), gradient="same"),
        ops.with_constant(f"{name}.masked_fill", "biased", "mask", "filled", SCORES, "masked_fill", "=biased"),
        *ops.softmax(f"{name}.softmax", "filled", "softmax", SCORES),
        ops.cast(f"{name}.cast", "softmax", "probs.whole", SCORES, "=v"),
        *dropped(f"{name}.attn_dropout", "probs.whole", "probs", SCORES, drop),
        (ops.view if wiring.is_head_major else ops.copy)(f"{name}.v_flat", "v", "v.flat", QUERIES),
        ops.matmul(f"{name}.product", "probs", "v.flat", "heads", QUERIES),
        ops.view(f"{name}.permute", "heads", "permuted", QUERIES, gradient="new"),
        ops.copy(f"{name}.contiguous", "permuted", "o", QUERIES),
        ops.linear(f"{name}.out_proj", "o", "ao", "h", "a d", "attention"),
        ops.release_names("qkv", "filled", "o"),
    )


BUILDERS = {"bloom": bloom, "mpt": mpt}
