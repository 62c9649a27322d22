"""Llama 4: complex rotation, layers that attend in chunks, and experts that each compute every token.

A token's score is 0 for the experts it did not select.

Source: transformers 5.24 models/llama4/modeling_llama4.py.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import KEYS, QUERIES, attention, mask_name
from memplan.catalogue.decoder.attention import project_heads
from memplan.catalogue.decoder.frame import after, before, decoder_block, masks, returned, runs
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.norms import rms_norm_without_weight
from memplan.catalogue.experts import routers
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.positions import rotary_angles
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Scratch, Stack, Tensor, Weight
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_SOURCE = "transformers 5.24 models/llama4/modeling_llama4.py"
_ROWS = "E b s"
_TURNS = "1 s rot2 2"  # complex numbers, each two fp32


def _rotary_table() -> tuple[Op, ...]:
    """One complex number for every position and pair of a head's dimensions."""
    return (
        rotary_angles(f"{_SOURCE} Llama4TextRotaryEmbedding"),
        Op(
            "rotary.polar", ("angles",), (Tensor("polar", _TURNS, "fp32"),), scratch=(Tensor("ones", "s rot2", "fp32"),)
        ),
        Op("rotary.scale", ("polar",), (Tensor("turns", _TURNS, "fp32"),)),
        ops.release_names("angles", "polar"),
    )


def rotate_complex(
    name: str,
    q: tuple[str, str, str],
    k: tuple[str, str, str],
    table: tuple[str, ...] = ("turns",),
    shape: str = _TURNS,
) -> tuple[Op, ...]:
    """Rotate heads as complex numbers, pair by pair and in fp32, and cast them back.

    `q` and `k` are each the name of the heads, the name of the result, and the shape.
    """
    heads = (q, k)
    return (
        *(ops.cast(f"{name}.float_{x}", x, f"{x}.wide", head_shape, "fp32") for x, _, head_shape in heads),
        *(
            Op(
                f"{name}.turn_{x}",
                (f"{x}.wide", *table),
                (Tensor(f"{x}.turned", head_shape, "fp32"),),
                (),
                tuple(Keep(held, f"{x}.wide") for held in table),
                scratch_back=(Scratch(Tensor("conjugate", shape, "fp32")),),
                source=f"{ops.DERIVATIVES}: mul.Tensor",
            )
            for x, _, head_shape in heads
        ),
        *(ops.cast(f"{name}.type_as_{x}", f"{x}.turned", y, head_shape, f"={x}") for x, y, head_shape in heads),
        ops.release_names(*(f"{x}.{part}" for x, *_ in heads for part in ("wide", "turned")), q[0], k[0]),
    )


def _chunk_mask(wiring: Wiring) -> tuple[Op, ...]:
    """The mask of layers that attend in chunks: one per sequence, because each may begin at another position."""
    if not wiring.has_mask(True) or wiring.backend == "eager":
        return masks(wiring, "embeds", True)
    parts = (Tensor("within the chunk", "b s s", "bool"),)
    source = "transformers 5.24 masking_utils.py create_chunked_causal_mask"
    return (Op("window_mask", (), (Tensor("window_mask", "b s s", "bool"),), scratch=parts, source=source),)


def _scale_by_position(name: str, x: str, y: str) -> tuple[Op, ...]:
    """Multiply q by a number for each position, in fp32, and cast it back."""
    return (
        Op(
            f"{name}.scales",
            (),
            (Tensor("temperatures", "s", "fp32"),),
            scratch=(Tensor("positions", "s", "int64"), Tensor("logarithm", "s", "fp32")),
        ),
        ops.with_constant(f"{name}.temper", x, "temperatures", f"{x}.tempered", QUERIES, "mul.Tensor"),
        ops.cast(f"{name}.to", f"{x}.tempered", y, QUERIES, f"={x}"),
        ops.release_names(f"{x}.tempered", x),
    )


def _attend(name: str, wiring: Wiring, grouped: bool, sliding: bool) -> tuple[Op, ...]:
    """Attention. If it is written out, the softmax is in the dtype of the scores."""
    kernel = attention(name, "q", "k", "v", "o", wiring, grouped, sliding, mask_name(sliding))
    if (wiring.masked if wiring.has_mask(sliding) else wiring.backend) != "eager":
        return kernel
    written = {f"{name}.softmax.float", f"{name}.softmax", f"{name}.cast"}
    i = next(i for i, op in enumerate(kernel) if op.name in written)
    plain = ops.softmax(f"{name}.softmax", "masked", "probs.whole" if wiring.drops else "probs", "b a s s")
    return (*kernel[:i], *plain, *(op for op in kernel[i:] if op.name not in written))


def _heads(m: ModelSpec, wiring: Wiring, layer: Layer, x: str, y: str, name: str = "self_attn") -> tuple[Op, ...]:
    bias, normed = m.get("attention_bias", False), layer.rotary and m.get("use_qk_norm", True)
    query_key_ops: list[Op] = []
    q, k = ("q2", "k2") if normed else ("q", "k")
    if layer.rotary:
        query_key_ops += rotate_complex(f"{name}.rope", ("q1", q, QUERIES), ("k1", k, KEYS))
    if normed:
        query_key_ops += (*rms_norm_without_weight(f"{name}.qk_norm", "q2", "q", QUERIES, "d"), ops.release_names("q2"))
        query_key_ops += (*rms_norm_without_weight(f"{name}.qk_norm", "k2", "k", KEYS, "d"), ops.release_names("k2"))
    if not layer.rotary:
        tempered = m.get("attn_temperature_tuning", True)
        query_key_ops += (
            _scale_by_position(name, "q1", "q") if tempered else (ops.view(f"{name}.q", "q1", "q", QUERIES),)
        )
        query_key_ops.append(ops.view(f"{name}.k", "k1", "k", KEYS))
    grouped = m.num_key_value_heads != m.num_attention_heads
    return (
        *project_heads(name, x, bias),
        *query_key_ops,
        *_attend(f"{name}.attention", wiring, grouped, layer.sliding),
        ops.linear(f"{name}.o_proj", "o", y, "h", "a d", "attention", bias),
        ops.release_names("q", "k", "v", "o", x),
    )


def _router(x: str, name: str) -> tuple[Op, ...]:
    """The sigmoid of the largest logits, and 0 for the other experts."""
    return (
        routers.gate(name, x, stands_for=()),
        routers.top_k(f"{name}.topk", "router.logits", "router.top"),
        ops.with_constant(
            f"{name}.scatter", "router.top", routers.CHOSEN, "router.sparse", "b s E", "scatter.src", "=router.top"
        ),
        ops.cast(f"{name}.float", "router.sparse", "router.wide", "b s E", "fp32"),
        routers.sigmoid(f"{name}.sigmoid", "router.wide", "router.sigmoids", "b s E"),
        ops.cast(f"{name}.to", "router.sigmoids", "router.scores", "b s E", "=router.sparse"),
        ops.release_names("router.top", routers.CHOSEN, "router.sparse"),
    )


def _product(name: str, x: str, y: str, out: str, into: str) -> Op:
    """A batched matrix product with one batch entry per expert."""
    w = Weight(name, f"E {out} {into}", "mlp", rows=1 + len(out.split()), chosen="e", stacked=True)
    return Op(
        name,
        (x,),
        (Tensor(y, f"{_ROWS} {out}"),),
        (w,),
        (Keep(w.name, x), Keep(x, w.name)),
        autocast="lower",
        product="matrix",
        source=f"{ops.DERIVATIVES}: bmm",
    )


def mixture(x: str, y: str, name: str = "feed_forward") -> tuple[Op, ...]:
    """Give every token to every expert, multiplied by its score, and add a shared expert's output."""
    inner, shape = "routed", f"{_ROWS} h"
    return (
        *_router(x, f"{name}.router"),
        ops.copy(f"{name}.repeat", x, "repeated", shape, gradient="new"),
        ops.copy(f"{name}.scores", "router.scores", "routed.scores", _ROWS, gradient="same"),
        ops.spread(f"{name}.weigh", "repeated", "routed.scores", inner, shape),
        ops.release_names("repeated", "routed.scores"),
        _product(f"{name}.experts.gate_up_proj", inner, "routed.gate_up", "2 m", "h"),
        ops.split(
            f"{name}.chunk", "routed.gate_up", (Tensor("routed.gate", f"{_ROWS} m"), Tensor("routed.up", f"{_ROWS} m"))
        ),
        ops.activation(f"{name}.act_fn", "routed.gate", "routed.act", f"{_ROWS} m"),
        ops.mul(f"{name}.product", "routed.up", "routed.act", "routed.product", f"{_ROWS} m"),
        _product(f"{name}.experts.down_proj", "routed.product", "routed_out", "h", "m"),
        ops.release_names("routed.gate", "routed.gate_up"),
        *ops.with_axes(gated_mlp(x, "shared", f"{name}.shared_expert"), {"f": "m"}),
        Op(f"{name}.sum", ("routed_out",), (Tensor("routed_sum", "b s h"),), autocast="wide", source="sum.dim_IntList"),
        ops.add(f"{name}.add", "shared", "routed_sum", y, "b s h")._replace(
            view=True,
            writes=(Tensor(y, "b s h", "=shared"),),  # in place, so under autocast the wide sum is cast
        ),
        ops.release_names("routed_sum"),
        ops.release_names("router.logits", "router.scores", inner, "routed_out", x),
    )


def llama4(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build the text decoder."""

    def block(layer: Layer) -> Block:
        ffn = (
            mixture("n2", "mo")
            if layer.ffn == "experts"
            else ops.with_axes(gated_mlp("n2", "mo", "feed_forward"), {"f": "fd"})
        )
        return decoder_block(_heads(m, wiring, layer, "n1", "ao"), ffn, held=("ao", *returned(wiring)))

    kinds = sorted({layer.sliding for layer in m.layers})
    made = tuple(op for kind in kinds for op in (_chunk_mask(wiring) if kind else masks(wiring, "embeds")))
    return Stack(
        before(wiring, made=made, table=_rotary_table()),
        runs(m, block),
        after(m, wiring, made=made, table=("turns",)),
    )


BUILDERS = {"llama4_text": llama4}
