"""ChatGLM 2 and 3: sequence-first, q, k and v in one projection, partial rotation. The first GLM-4: batch-first.

transformers has no class for them. This follows the published code (`modeling_chatglm.py`), with transformers' own
loss. That code calls torch's attention whatever transformers is told to use; `eager` is taken as the memory-efficient
kernel. Its rotation is compiled by TorchScript; here nothing is fused.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import KEYS, QUERIES, attention, cached
from memplan.catalogue.decoder.frame import inputs, lm_head, runs
from memplan.catalogue.decoder.mlp import fused_mlp
from memplan.catalogue.decoder.norms import rms_norm_in_fp32
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Stack, Tensor, Weight
from memplan.models.model import ModelSpec

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
            ops.release_names("n1"),
            *half_norm("post_attention_layernorm", "x1", "n2", "b s h", "h"),
            *fused_mlp("n2", "mo", layers=("dense_h_to_4h", "dense_4h_to_h"), bias=bias),
            ops.add("residual_2", "x1", "mo", "y", "b s h"),
            ops.release_names("ao", "n2", "mo"),
        ),
    )
    return Stack(_before(m, wiring), runs(m, lambda _: block), _after(m, wiring))


def _batch_first(m: ModelSpec) -> bool:
    """Whether this is a GLM-4, whose code stays batch-first. Only the size of its vocabulary tells."""
    return m.vocab_size == 151_552


def _before(m: ModelSpec, wiring: Wiring) -> tuple[Op, ...]:
    """Embeddings, a rotary table for all positions of the model, and a mask only if the batch is padded."""
    longest, name = m.max_position_embeddings or 2048, "transformer.rotary_pos_emb"
    inv_freq = Weight(f"{name}.inv_freq", "rot2", "buffer", "fp32", False)
    angles, parts = Tensor("angles", f"{longest} rot2", "fp32"), ("cosines", "sines")
    product = Tensor("padded", "b s s", "fp32")
    looked_up = "embeds" if _batch_first(m) else "batch_first"
    return (
        inputs(wiring.padded),
        ops.embedding("transformer.embedding.word_embeddings", "ids", looked_up, "v", "h"),
        *(
            (ops.copy("transformer.embedding.transpose", looked_up, "embeds", "b s h"), ops.release_names(looked_up))
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
        ops.release_names("angles", *parts),
    )


def _after(m: ModelSpec, wiring: Wiring) -> tuple[Op, ...]:
    """The last norm and the head. ChatGLM's logits are copied to batch-first.

    A prompt's keys and values are copied layer by layer into one tensor, while all of them are still alive.
    """
    head = lm_head("n")
    weight = head.weights[0]._replace(name="transformer.output_layer.weight")
    keeps = (Keep(weight.name, "n"), Keep("n", weight.name))
    first = Tensor("logits" if _batch_first(m) else "sequence_first", "b s v")
    together = Tensor("keys and values of all layers", "L 2 b s k d", "=embeds")
    copies = wiring.caching and not wiring.decodes
    source = f"{_READ}: GLMTransformer.forward"
    presents = Op("transformer.encoder.presents", ("embeds",), scratch=(together,), source=source)
    return (
        *((presents,) if copies else ()),
        *half_norm("transformer.encoder.final_layernorm", "x", "n", "b s h", "h"),
        ops.release_names("x", "embeds", "table", *(("mask",) if wiring.padded else ())),
        head._replace(name="transformer.output_layer", writes=(first,), weights=(weight,), keeps=keeps),
        *(
            (
                ops.copy("transformer.output_layer.transpose", first.name, "logits", "b s v"),
                ops.release_names(first.name),
            )
            if first.name != "logits"
            else ()
        ),
    )


def half_norm(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """RMSNorm that squares a cast of x and multiplies x itself: both are kept, and so is the fp32 result."""
    cast, square, mean, eps, rsqrt, scale, *rest = rms_norm_in_fp32(name, x, y, shape, axis)
    rstd = scale.reads[1]
    product = scale._replace(reads=(x, rstd), keeps=(Keep(rstd, x), Keep(x, rstd)))
    return (cast, square, mean, eps, rsqrt, product, *rest)


def _attention(m: ModelSpec, wiring: Wiring, name: str = "self_attention") -> tuple[Op, ...]:
    """Attention. k and v are repeated for every query head first; every layer inverts a padded batch's mask."""
    bias = m.get("add_bias_linear", False)
    qkv_bias = bias or m.get("add_qkv_bias", False)
    inverted = "inverted" if wiring.padded else "mask"
    backend = wiring.masked if wiring.padded else wiring.backend
    heads = "o" if backend == "flash" or _batch_first(m) else "o.heads"  # the other kernels write batch-first
    uncached = wiring._replace(caching=False)
    return (
        ops.linear(f"{name}.query_key_value", "n1", "qkv", "qkv", "h", "attention", qkv_bias),
        ops.split(f"{name}.split", "qkv", (Tensor("q0", QUERIES), Tensor("k0", KEYS), Tensor("v0", KEYS))),
        *_rotate_pairs(f"{name}.rope_q", "q", "a"),
        *_rotate_pairs(f"{name}.rope_k", "k", "k"),
        *_cache(f"{name}.cache", wiring),
        *(
            (
                ops.copy(f"{name}.expand_k", "k.rotated", "k", QUERIES, gradient="new"),
                ops.release_names("k.rotated"),
                ops.copy(f"{name}.expand_v", "v0", "v", QUERIES, gradient="new"),
            )
            if m.num_key_value_heads != m.num_attention_heads
            else (ops.view(f"{name}.k", "k.rotated", "k", QUERIES), ops.view(f"{name}.v", "v0", "v", QUERIES))
        ),
        *((Op(f"{name}.invert", ("mask",), (Tensor("inverted", "b s s", "bool"),)),) if wiring.padded else ()),
        *attention(f"{name}.core_attention", "q.rotated", "k", "v", heads, uncached, False, mask=inverted),
        *((ops.release_names("inverted"),) if wiring.padded else ()),
        *((ops.copy(f"{name}.sequence_first", heads, "o", QUERIES),) if heads != "o" else ()),
        ops.linear(f"{name}.dense", "o", "ao", "h", "a d", "attention", bias),
        ops.release_names("qkv", "q.rotated", "k", "v", "o"),
    )


def _cache(name: str, wiring: Wiring) -> tuple[Op, ...]:
    """The cache. Every further token's keys and values are concatenated with the earlier ones; a prompt's are copied.

    (The first revisions of ChatGLM2 and 3 kept a prompt's without copying them.)
    """
    source = f"{_READ}: SelfAttention.forward"
    return tuple(op._replace(source=source) for op in cached(name, wiring, (), tensors=("k.rotated", "v0")))


def _rotate_pairs(name: str, t: str, heads: str) -> tuple[Op, ...]:
    """Rotate neighbouring dimensions as pairs: four products with the table's columns, stacked and joined with the
    rest.
    """
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
        ops.release_names(f"{t}.turned"),
    )


def _product(name: str, t: str, part: str, shape: str) -> tuple[Op, ...]:
    column = f"{t}.{part}.column"
    return (
        ops.view(f"{name}.select", f"{t}.rot", column, shape, gradient="new"),
        Op(name, (column, "table"), (Tensor(f"{t}.{part}", shape),), (), (Keep("table", column),)),
    )


BUILDERS = {"chatglm": chatglm}
