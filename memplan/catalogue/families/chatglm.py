"""ChatGLM 2 and 3: sequence first, one projection for q, k and v, heads rotated in part. The first GLM-4: batch first.

transformers has no class for it. What is said here follows the code published beside the weights
(`modeling_chatglm.py`), with transformers' own loss. It calls torch's attention whatever transformers is told to use;
`eager` is taken as the memory-efficient kernel. Its rotation is compiled by TorchScript: here, nothing is fused.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import attention, cached
from memplan.catalogue.decoder.frame import inputs, lm_head, runs
from memplan.catalogue.decoder.mlp import fused_mlp
from memplan.catalogue.families.olmo import rms_norm
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Stack, Tensor, Weight
from memplan.models.model import ModelSpec

_Q, _K = "b s a d", "b s k d"
_SOURCE = "modeling_chatglm.py"
_READ = f"assumed: read in the {_SOURCE} published with the weights, not traced"


def chatglm(m: ModelSpec, wiring: Wiring) -> Stack:
    if wiring.backend == "eager":
        wiring = wiring._replace(backend="efficient", masked="efficient")
    bias = m.get("add_bias_linear", False)
    block = Block(
        "transformer.encoder.layers",
        (
            *half_norm("input_layernorm", "x", "n1", "b s h", "h"),
            *_attention(m, wiring),
            ops.add("residual_1", "x", "ao", "x1", "b s h"),
            ops.leave("n1"),
            *half_norm("post_attention_layernorm", "x1", "n2", "b s h", "h"),
            *fused_mlp("n2", "mo", layers=("dense_h_to_4h", "dense_4h_to_h"), bias=bias),
            ops.add("residual_2", "x1", "mo", "y", "b s h"),
            ops.leave("ao", "n2", "mo"),
        ),
    )
    return Stack(_before(m, wiring), runs(m, lambda _: block), _after(m, wiring))


def _batch_first(m: ModelSpec) -> bool:
    """Whether it is a GLM-4, whose code turns nothing sequence first: by its vocabulary, as the config has no word."""
    return m.vocab_size == 151_552


def _before(m: ModelSpec, wiring: Wiring) -> tuple[Op, ...]:
    """A rotary table for as many tokens as the model has positions; a mask only where the batch is padded."""
    longest, name = m.max_position_embeddings or 2048, "transformer.rotary_pos_emb"
    inv_freq = Weight(f"{name}.inv_freq", "rot2", "buffer", "fp32", False)
    angles, parts = Tensor("angles", f"{longest} rot2", "fp32"), ("cosines", "sines")
    product = Tensor("padded", "b s s", "fp32")
    looked_up = "embeds" if _batch_first(m) else "batch_first"
    return (
        inputs(wiring.padded),
        ops.embedding("transformer.embedding.word_embeddings", "ids", looked_up, "v", "h"),
        *(
            (ops.copy("transformer.embedding.transpose", looked_up, "embeds", "b s h"), ops.leave(looked_up))
            if looked_up != "embeds"
            else ()
        ),
        *(
            (
                Op("mask.padded", (), (product,), scratch=(Tensor("ones", "b s s", "fp32"),)),
                Op("mask", ("padded",), (Tensor("mask", "b s s", "bool"),)),
            )
            if wiring.padded
            else ()
        ),
        Op(f"{name}.angles", (), (angles,), (inv_freq,)),
        *(Op(f"{name}.{part}", ("angles",), (Tensor(part, f"{longest} rot2", "fp32"),)) for part in parts),
        Op(f"{name}.stack", parts, (Tensor("table32", f"{longest} rot", "fp32"),)),
        ops.cast(f"{name}.cast", "table32", "table", f"{longest} rot", "=embeds"),
        ops.leave("angles", *parts),
    )


def _after(m: ModelSpec, wiring: Wiring) -> tuple[Op, ...]:
    """ChatGLM's logits are copied batch first. A prompt's keys and values are copied layer by layer into one tensor, at
    last with all of them there."""
    head = lm_head("n")
    weight = head.weights[0]._replace(name="transformer.output_layer.weight")
    keeps = (Keep(weight.name, "n"), Keep("n", weight.name))
    first = Tensor("logits" if _batch_first(m) else "sequence_first", "b s v")
    together = Tensor("keys and values of all layers", "L 2 b s k d", "=embeds")
    copies = wiring.caching and not wiring.decodes
    source = f"{_READ}: GLMTransformer.forward"
    joined = Op("transformer.encoder.presents", ("embeds",), scratch=(together,), source=source)
    return (
        *((joined,) if copies else ()),
        *half_norm("transformer.encoder.final_layernorm", "x", "n", "b s h", "h"),
        ops.leave("x", "embeds", "table", *(("mask",) if wiring.padded else ())),
        head._replace(name="transformer.output_layer", writes=(first,), weights=(weight,), keeps=keeps),
        *(
            (ops.copy("transformer.output_layer.transpose", first.name, "logits", "b s v"), ops.leave(first.name))
            if first.name != "logits"
            else ()
        ),
    )


def half_norm(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """The square is taken of a cast of x, and x itself is multiplied: both are kept, and the fp32 result."""
    cast, square, mean, eps, rsqrt, scale, *rest = rms_norm(name, x, y, shape, axis)
    rstd = scale.reads[1]
    product = scale._replace(reads=(x, rstd), keeps=(Keep(rstd, x), Keep(x, rstd)))
    return (cast, square, mean, eps, rsqrt, product, *rest)


def _attention(m: ModelSpec, wiring: Wiring, name: str = "self_attention") -> tuple[Op, ...]:
    """k and v are repeated for every query head before torch sees them; a padded batch's mask is inverted anew."""
    bias = m.get("add_bias_linear", False)
    qkv_bias = bias or m.get("add_qkv_bias", False)
    inverted = "inverted" if wiring.padded else "mask"
    backend = wiring.masked if wiring.padded else wiring.backend
    heads = "o" if backend == "flash" or _batch_first(m) else "o.heads"  # the other kernels write batch first
    alone = wiring._replace(caching=False)
    return (
        ops.linear(f"{name}.query_key_value", "n1", "qkv", "qkv", "h", "attention", qkv_bias),
        ops.split(f"{name}.split", "qkv", (Tensor("q0", _Q), Tensor("k0", _K), Tensor("v0", _K))),
        *_rotated(f"{name}.rope_q", "q", "a"),
        *_rotated(f"{name}.rope_k", "k", "k"),
        *_cached(f"{name}.cache", wiring),
        *(
            (
                ops.copy(f"{name}.expand_k", "k.rotated", "k", _Q, gradient="new"),
                ops.leave("k.rotated"),
                ops.copy(f"{name}.expand_v", "v0", "v", _Q, gradient="new"),
            )
            if m.num_key_value_heads != m.num_attention_heads
            else (ops.view(f"{name}.k", "k.rotated", "k", _Q), ops.view(f"{name}.v", "v0", "v", _Q))
        ),
        *((Op(f"{name}.invert", ("mask",), (Tensor("inverted", "b s s", "bool"),)),) if wiring.padded else ()),
        *attention(f"{name}.core_attention", "q.rotated", "k", "v", heads, alone, False, mask=inverted),
        *((ops.leave("inverted"),) if wiring.padded else ()),
        *((ops.copy(f"{name}.sequence_first", heads, "o", _Q),) if heads != "o" else ()),
        ops.linear(f"{name}.dense", "o", "ao", "h", "a d", "attention", bias),
        ops.leave("qkv", "q.rotated", "k", "v", "o"),
    )


def _cached(name: str, wiring: Wiring) -> tuple[Op, ...]:
    """The code joins keys and values of every further token with those before; of a prompt it copies both. (The first
    revisions of ChatGLM2 and 3 kept a prompt's as they were.)"""
    source = f"{_READ}: SelfAttention.forward"
    return tuple(op._replace(source=source) for op in cached(name, wiring, (), tensors=("k.rotated", "v0")))


def _rotated(name: str, t: str, heads: str) -> tuple[Op, ...]:
    """Neighbouring dimensions are pairs: four products with the table's columns, stacked, joined with the rest."""
    half, rot, full = (f"b s {heads} {width}" for width in ("rot2", "rot", "d"))
    products = ("even_cos", "odd_sin", "odd_cos", "even_sin")
    return (
        ops.view(f"{name}.rot", f"{t}0", f"{t}.rot", rot, gradient="new"),
        ops.view(f"{name}.pass", f"{t}0", f"{t}.pass", full, gradient="new"),
        *(op for part in products[:2] for op in _product(f"{name}.{part}", t, part, half)),
        ops.view(f"{name}.negate", f"{t}.odd_sin", f"{t}.negated", half, gradient="new"),
        ops.add(f"{name}.first", f"{t}.even_cos", f"{t}.negated", f"{t}.first", half),
        *(op for part in products[2:] for op in _product(f"{name}.{part}", t, part, half)),
        ops.add(f"{name}.second", f"{t}.odd_cos", f"{t}.even_sin", f"{t}.second", half),
        *(ops.view(f"{name}.{part}_half", f"{t}.{part}", f"{t}.{part}_half", rot) for part in ("first", "second")),
        Op(
            f"{name}.stack",
            (f"{t}.first_half", f"{t}.second_half"),
            (Tensor(f"{t}.turned", rot),),
            gradient="same",
            source=f"{_SOURCE} apply_rotary_pos_emb",
        ),
        ops.view(f"{name}.part", f"{t}.turned", f"{t}.part", full),
        Op(f"{name}.cat", (f"{t}.part", f"{t}.pass"), (Tensor(f"{t}.rotated", full),), gradient="same"),
        ops.leave(f"{t}.turned"),
    )


def _product(name: str, t: str, part: str, shape: str) -> tuple[Op, ...]:
    column = f"{t}.{part}.column"
    return (
        ops.view(f"{name}.select", f"{t}.rot", column, shape, gradient="new"),
        Op(name, (column, "table"), (Tensor(f"{t}.{part}", shape),), (), (Keep("table", column),)),
    )


BUILDERS = {"chatglm": chatglm}
