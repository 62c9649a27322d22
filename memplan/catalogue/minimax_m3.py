"""MiniMax-M3's decoder: an indexer chooses blocks of keys for every query, a mask of all heads tells attention of them,
and gates are clamped in dense and expert layers alike.

Source: transformers 5.24 models/minimax_m3_vl/modeling_minimax_m3_vl.py.
"""

from __future__ import annotations

from memplan.catalogue import experts, ops, routers
from memplan.catalogue.attention import Wiring, attention
from memplan.catalogue.gemma import rms_norm
from memplan.catalogue.llama import decoder_block, returned, runs
from memplan.catalogue.mixed import after, before, tables
from memplan.catalogue.phi3 import heads_first, rotate_part
from memplan.catalogue.sinks import unadapted
from memplan.families.blocks import INDEXED
from memplan.ir import Block, Op, Stack, Tensor
from memplan.layers import Layer
from memplan.models import ModelSpec

_SOURCE = "transformers 5.24 models/minimax_m3_vl/modeling_minimax_m3_vl.py"
_Q, _K = "b s a d", "b s k d"


def _mlp(x: str, y: str, name: str, width: str) -> tuple[Op, ...]:
    shape = f"b s {width}"
    return (
        ops.linear(f"{name}.gate_up_proj", x, "gate_up", f"2 {width}", "h", "mlp"),
        *experts.clamped_gate(name, "gate_up", "product", shape),
        ops.linear(f"{name}.down_proj", "product", y, "h", width, "mlp"),
        ops.leave(x),
    )


def _mixture(x: str, y: str, name: str = "mlp") -> tuple[Op, ...]:
    """An expert that all share, then those chosen, scaled."""
    return (
        *_mlp(x, "shared", f"{name}.shared_experts", "fs"),
        *unadapted(routers.sigmoid_router(f"{name}.gate", x, f"{name}.gate.e_score_correction_bias")),
        *experts.experts(x, "chosen", gate_up=(), down=(), act=experts.clamped(slices=False)),
        ops.scale(f"{name}.scale", "chosen", "experts.scaled", "b s h"),
        ops.leave("chosen"),
        ops.add(f"{name}.add", "experts.scaled", "shared", y, "b s h"),
        ops.leave("experts.scaled", "shared", *routers.HELD, x),
    )


def _heads(m: ModelSpec, wiring: Wiring, layer: Layer, x: str, y: str, name: str = "self_attn") -> tuple[Op, ...]:
    grouped = m.num_key_value_heads != m.num_attention_heads
    indexed = layer.mixer == INDEXED
    made = _masked(m, wiring, grouped, f"{name}.attention") if indexed else _whole(wiring, grouped, f"{name}.attention")
    return (
        ops.linear(f"{name}.q_proj", x, "q0", "a d", "h", "attention"),
        ops.view(f"{name}.q_heads", "q0", "qh", _Q),
        *rms_norm(f"{name}.q_norm", "qh", "q1", _Q, "d"),
        ops.leave("qh"),
        ops.linear(f"{name}.k_proj", x, "k0", "k d", "h", "attention"),
        ops.view(f"{name}.k_heads", "k0", "kh", _K),
        *rms_norm(f"{name}.k_norm", "kh", "k1", _K, "d"),
        ops.leave("kh"),
        ops.linear(f"{name}.v_proj", x, "v", "k d", "h", "attention"),
        *rotate_part(f"{name}.rope", partial=m.rotary_width < m.head_dim),
        ops.leave("q1", "k1"),
        *(_indexer(x, f"{name}.indexer") if indexed else ()),
        *(_block_mask() if indexed else ()),
        *made,
        ops.linear(f"{name}.o_proj", "o", y, "h", "a d", "attention"),
        ops.leave("q", "k", "v", "o", x, *(("block_mask",) if indexed else ())),
    )


def _whole(wiring: Wiring, grouped: bool, name: str) -> tuple[Op, ...]:
    return heads_first(name, "q", "k", "v", "o", wiring, grouped)


def _masked(m: ModelSpec, wiring: Wiring, grouped: bool, name: str) -> tuple[Op, ...]:
    """The mask is one of numbers for every head already: what reads it makes no other of it."""
    eager = wiring.backend == "eager"
    kernel = attention(name, "q", "k", "v", "o", wiring._replace(padded=True), grouped, False, "block_mask")
    given = ops.view(f"{name}.mask", "block_mask", "o.bias", "b a s s")
    flat = (f"{name}.q_flat", f"{name}.k_flat")
    return tuple(
        given
        if op.name == f"{name}.mask"
        else ops.view(op.name, op.reads[0], op.writes[0].name, _Q)
        if eager and op.name in flat
        else op
        for op in kernel
    )


def _still(*operations: Op) -> tuple[Op, ...]:
    """What chooses gets no gradient, though its weights train."""
    return tuple(op._replace(gradient="none", keeps=(), scratch_back=(), unit="") for op in operations)


def _indexer(x: str, name: str) -> tuple[Op, ...]:
    """Scores in fp32 of a few narrow heads against all keys: only the blocks of the largest are handed on."""
    heads, one, scores = "b s i di", "b s 1 di", "b i s s"
    return _still(
        ops.linear(f"{name}.q_proj", x, "iq0", "i di", "h", "attention"),
        *rms_norm(f"{name}.q_norm", "iq0", "iq1", heads, "di"),
        ops.linear(f"{name}.k_proj", x, "ik0", "di", "h", "attention"),
        *rms_norm(f"{name}.k_norm", "ik0", "ik1", one, "di"),
        Op(f"{name}.rope_q", ("iq1",), (Tensor("iq", heads),)),
        Op(f"{name}.rope_k", ("ik1",), (Tensor("ik", one),)),
        ops.leave("iq0", "iq1", "ik0", "ik1"),
        ops.cast(f"{name}.float_q", "iq", "iq32", heads, "fp32"),
        ops.cast(f"{name}.float_k", "ik", "ik32", one, "fp32"),
        Op(
            f"{name}.scores",
            ("iq32", "ik32"),
            (Tensor("index.scores", scores, "fp32"),),
            scratch=(Tensor("keys of all heads", heads, "fp32"),),
        ),
        ops.leave("iq32", "ik32"),
        Op(f"{name}.future", (), (Tensor("index.future", "b s s", "bool"),)),
        Op(f"{name}.masked", ("index.scores",), (Tensor("index.masked", scores, "fp32"),)),
        ops.leave("index.scores"),
        Op(f"{name}.choose", ("index.masked",), (Tensor("blocks", "b i s ti", "int64"),)),
        ops.leave("index.masked", "index.future", "iq", "ik"),
    )


def _block_mask() -> tuple[Op, ...]:
    """A number for every head, query and key, made of the blocks chosen."""
    every, dtype = "b a s s", "=q"
    return (
        Op("block_mask.safe", ("blocks",), (Tensor("blocks.safe", "b i s ti", "int64"),), gradient="none"),
        Op("block_mask.keep", ("blocks",), (Tensor("keep.groups", "b i s s", "bool"),), gradient="none"),
        Op("block_mask.heads", ("keep.groups",), (Tensor("keep.heads", every, "bool"),), gradient="none"),
        ops.leave("keep.groups"),
        Op("block_mask.future", (), (Tensor("keep.future", "b s s", "bool"),), gradient="none"),
        Op("block_mask.and", ("keep.heads",), (Tensor("keep", every, "bool"),), gradient="none"),
        Op(
            "block_mask",
            ("keep", "q"),
            (Tensor("block_mask", every, dtype),),
            scratch=(Tensor("zeros", every, dtype), Tensor("not kept", every, "bool")),
            gradient="none",
            source=f"{_SOURCE} MiniMaxM3VLIndexer.build_block_mask",
        ),
        ops.leave("keep", "keep.heads", "keep.future", "blocks", "blocks.safe"),
    )


def minimax_m3(m: ModelSpec, wiring: Wiring) -> Stack:
    """The decoder alone."""

    def block(layer: Layer) -> Block:
        ffn = _mixture("n2", "mo") if layer.ffn == "experts" else _mlp("n2", "mo", "mlp", "fd")
        return decoder_block(_heads(m, wiring, layer, "n1", "ao"), ffn, norm=rms_norm, held=returned(wiring))

    return Stack(before(wiring, False, tables()), runs(m, block), after(m, wiring, False, rms_norm))


BUILDERS = {"minimax_m3_vl_text": minimax_m3}
