"""Rotary embeddings of part of a head or in another order, and attention over heads stored one after the other."""

from __future__ import annotations

from memplan.catalogue.attention.attention import KEYS, QUERIES, attention
from memplan.catalogue.decoder.attention import rope
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import renamed
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Keep, Op, Tensor
from memplan.core.records import NamedTuple
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec


class PartialRotation(NamedTuple):
    """How a family's code rotates part of each head.

    steps   what is done to q and then to k, one group after the other
    turned  name of the rotated parts
    source  where it is written
    """

    steps: tuple[tuple[str, ...], ...]
    turned: str
    source: str


GLM = PartialRotation(
    (("rotate",), ("join",)), "turned", "transformers 5.24 models/glm/modeling_glm.py apply_rotary_pos_emb"
)
NEOX = PartialRotation((("rotate", "part"), ("cat",)), "turned", f"{ops.DERIVATIVES}: cat")
PHI3 = PartialRotation(
    (("rotate", "join"),), "turned_part", "transformers 5.24 models/phi3/modeling_phi3.py apply_rotary_pos_emb"
)


def partly_rotated(
    m: ModelSpec, name: str, q: str, k: str, code: PartialRotation = GLM, partial: bool | None = None
) -> tuple[Op, ...]:
    """Rotate the first `rot` dimensions of each head of q and k, and join them with the rest in new storage.

    Both parts are views, the rest even if it is empty. The gradient of a slice is as wide as a head. The gradients of
    joined parts are views of one tensor.
    """
    partial = m.rotary_width < m.head_dim if partial is None else partial
    both = (("q", q, "a"), ("k", k, "k"))

    def step(what: str, t: str, heads: str) -> tuple[Op, ...]:
        n, turned, parts, shape = f"{name}.{t}", f"{t}.{code.turned}", (f"{t}.part", f"{t}.pass"), f"b s {heads} d"
        if what == "rotate":
            return ops.rotate(n, f"{t}.rot", turned, f"b s {heads} rot", f"b s {heads} rot2")
        part = ops.view(f"{n}.part", turned, parts[0], shape)
        cat = Op(f"{n}.cat", parts, (Tensor(t, shape),), gradient="same", source=code.source)
        return {"part": (part,), "cat": (cat,), "join": (part, cat)}[what]

    return (
        *(
            ops.view(f"{name}.{t}_{part}", x, f"{t}.{part}", f"b s {heads} {width}", gradient)
            for t, x, heads in both
            for part, width, gradient in (("rot", "rot", "new" if partial else "same"), ("pass", "d", "new"))
        ),
        *(op for group in code.steps for t, _, heads in both for what in group for op in step(what, t, heads)),
    )


def partial_rope(m: ModelSpec, name: str, q: str, k: str) -> tuple[Op, ...]:
    """Rotate part of each head, as in GLM-4 MoE and MiniMax-M2."""
    return (*partly_rotated(m, name, q, k), ops.release_names(q, k))


def rope_of_pairs(m: ModelSpec, name: str, q: str, k: str) -> tuple[Op, ...]:
    """Rotate each head, as in Helium. Every layer repeats cos and sin for each pair, and keeps the copies."""
    return _of_pairs(name, rope(m, name, q, k))


def partial_rope_of_pairs(m: ModelSpec, name: str, q: str, k: str) -> tuple[Op, ...]:
    """Rotate part of each head, as in GLM-4, with cos and sin as in `rope_of_pairs`."""
    return (*_of_pairs(name, partly_rotated(m, name, q, k)), ops.release_names(q, k))


def _of_pairs(name: str, rotated: tuple[Op, ...]) -> tuple[Op, ...]:
    return (
        ops.copy(f"{name}.pairs_of_cos", "cos", "cos.pairs", "s rot"),
        ops.copy(f"{name}.pairs_of_sin", "sin", "sin.pairs", "s rot"),
        *renamed(rotated, {"cos": "cos.pairs", "sin": "sin.pairs"}),
        ops.release_names("cos.pairs", "sin.pairs"),
    )


def rope_and_norm(m: ModelSpec, name: str, q: str, k: str) -> tuple[Op, ...]:
    """Rotate q and k, then normalise each head, as in Hunyuan."""
    return (
        *ops.rotate(f"{name}.rope_q", q, "q.rotated", QUERIES, "b s a rot2"),
        *ops.rotate(f"{name}.rope_k", k, "k.rotated", KEYS, "b s k rot2"),
        ops.release_names(q, k),
        *ops.rms_norm(f"{name}.query_layernorm", "q.rotated", "q", QUERIES, "d"),
        ops.release_names("q.rotated"),
        *ops.rms_norm(f"{name}.key_layernorm", "k.rotated", "k", KEYS, "d"),
        ops.release_names("k.rotated"),
    )


def rope_and_scale(m: ModelSpec, name: str, q: str, k: str) -> tuple[Op, ...]:
    """Rotate q and k, then multiply q by a factor of its position, as in Ministral 3."""
    return (
        *ops.rotate(f"{name}.rope_q", q, "q.rotated", QUERIES, "b s a rot2"),
        *ops.rotate(f"{name}.rope_k", k, "k", KEYS, "b s k rot2"),
        ops.release_names(q, k),
        *scaled_queries(name),
    )


def scaled_queries(name: str) -> tuple[Op, ...]:
    """Multiply `q.rotated` by a factor of its position, in its dtype, to make `q`.

    The factor is `1 + beta * log(1 + floor(position / length))`.
    """
    steps = (Tensor("logarithm", "s", "fp32"), Tensor("scaled", "s", "fp32"))
    return (
        Op(f"{name}.factors", ("positions",), (Tensor("factors32", "s", "fp32"),), scratch=steps),
        Op(f"{name}.cast_factors", ("factors32",), (Tensor("factors", "s", "=q.rotated"),), cast=True),
        Op(
            f"{name}.scale_query",
            ("q.rotated", "factors"),
            (Tensor("q", QUERIES),),
            (),
            (Keep("factors", "q.rotated"),),
            source="transformers 5.24 models/ministral3/modeling_ministral3.py Ministral3Attention",
        ),
    )


def attend_heads_first(
    name: str, q: str, k: str, v: str, y: str, wiring: Wiring, grouped: bool, sliding: bool, mask: str
) -> tuple[Op, ...]:
    """Attend with q and k contiguous head by head, as joining their parts leaves them."""
    return heads_first(name, q, k, v, y, wiring, grouped, sliding)


def heads_first(
    name: str, q: str, k: str, v: str, y: str, wiring: Wiring, grouped: bool, sliding: bool = False
) -> tuple[Op, ...]:
    """Attend with q and k contiguous head by head.

    Flash and flex attention then write their output in that layout too, which takes a copy. Eager attention and torch's
    math kernel need no copies of q and k.
    """
    match wiring.masked if wiring.has_mask(sliding) else wiring.backend:
        case "flash" | "flash_2" | "flex":
            if wiring.packed is not None and wiring.packed.flattens:
                shapes = {q: QUERIES, k: KEYS, v: KEYS}
                copies = (ops.copy(f"{name}.{x}_given", x, f"{x}.given", shape) for x, shape in shapes.items())
                q, k, v = (f"{x}.given" for x in shapes)
                return (*copies, *attention(name, q, k, v, y, wiring, grouped, sliding), ops.release_names(q, k, v))
            kernel = attention(name, q, k, v, f"{y}.heads", wiring, grouped, sliding)
            return (*kernel, ops.copy(f"{name}.contiguous", f"{y}.heads", y, QUERIES))
        case "eager" | "math":
            flat = (f"{name}.q_flat", f"{name}.k_flat")
            return tuple(
                ops.view(op.name, op.reads[0], op.writes[0].name, op.writes[0].shape) if op.name in flat else op
                for op in attention(name, q, k, v, y, wiring, grouped, sliding)
            )
        case _:
            return attention(name, q, k, v, y, wiring, grouped, sliding)


def fused_heads(m: ModelSpec, wiring: Wiring, layer: Layer) -> tuple[Op, ...]:
    """Return attention with q, k and v in one projection, as in Phi-3.

    Each of the three slices has a gradient as wide as the projection's output; the three are summed.
    """
    name, grouped = "self_attn", m.num_key_value_heads != m.num_attention_heads
    kernel = attention if wiring.whole_rotary else heads_first
    rotated = rope(m, name, "q1", "k1") if wiring.whole_rotary else partly_rotated(m, f"{name}.rope", "q1", "k1", PHI3)
    return (
        ops.linear(f"{name}.qkv_proj", "n1", "qkv", "qkv", "h", "attention"),
        ops.view(f"{name}.q_slice", "qkv", "q0", QUERIES, gradient="new"),
        ops.view(f"{name}.k_slice", "qkv", "k0", KEYS, gradient="new"),
        ops.view(f"{name}.v_slice", "qkv", "v", KEYS, gradient="new"),
        ops.view(f"{name}.q_heads", "q0", "q1", QUERIES, gradient="new"),
        ops.view(f"{name}.k_heads", "k0", "k1", KEYS, gradient="new"),
        *rotated,
        ops.release_names("q1", "k1"),
        *kernel(f"{name}.attention", "q", "k", "v", "o", wiring, grouped, layer.sliding),
        ops.linear(f"{name}.o_proj", "o", "ao", "h", "a d", "attention"),
        ops.release_names("qkv", "q", "k", "v", "o", "n1"),
    )
