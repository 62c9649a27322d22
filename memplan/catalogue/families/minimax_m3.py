"""MiniMax-M3's text decoder: an indexer selects blocks of keys for every query, and all gates are clamped.

Attention gets the selection as a mask for all heads.

Source: transformers 5.24 models/minimax_m3_vl/modeling_minimax_m3_vl.py.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import attention, cached
from memplan.catalogue.decoder.attention import project_heads
from memplan.catalogue.decoder.decoder import Decoder
from memplan.catalogue.decoder.frame import FULL
from memplan.catalogue.decoder.norms import gemma_norm
from memplan.catalogue.decoder.rotation import PHI3, heads_first, partly_rotated
from memplan.catalogue.experts import experts, routers
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Op, Tensor
from memplan.models.configs.block_sparse import INDEXED
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_SOURCE = "transformers 5.24 models/minimax_m3_vl/modeling_minimax_m3_vl.py"


def _mlp(x: str, y: str, name: str, width: str) -> tuple[Op, ...]:
    *gated, frame = experts.clamped_gate(name, "gate_up", "product", f"b s {width}")  # here the MLP's own frame
    return (
        ops.linear(f"{name}.gate_up_proj", x, "gate_up", f"2 {width}", "h", "mlp"),
        *gated,
        ops.linear(f"{name}.down_proj", "product", y, "h", width, "mlp"),
        ops.release_names("product", x),
        frame,
    )


def _dense_mlp(x: str, y: str, bias: bool) -> tuple[Op, ...]:
    return _mlp(x, y, "mlp", "fd")


def _mixture(m: ModelSpec) -> tuple[Op, ...]:
    """A shared expert, then the routed experts, scaled."""
    x, y, name, gate = "n2", "mo", "mlp", "mlp.gate"
    return (
        *_mlp(x, "shared", f"{name}.shared_experts", "fs"),
        *routers.without_adapter_targets(routers.sigmoid_router(gate, x, f"{gate}.e_score_correction_bias")),
        *experts.experts(x, "chosen", gate_up=(), down=(), act=experts.clamped(slices=False)),
        *experts.scaled_and_shared(name, x, y),
    )


def _heads(m: ModelSpec, wiring: Wiring, layer: Layer) -> tuple[Op, ...]:
    name, x, y = "self_attn", "n1", "ao"
    grouped = m.num_key_value_heads != m.num_attention_heads
    indexed = layer.mixer == INDEXED
    attention_name = f"{name}.attention"
    attention_ops = (
        _block_sparse_attention(wiring._replace(caching=False), grouped, attention_name)
        if indexed
        else _full_attention(wiring, grouped, attention_name)
    )
    return (
        *project_heads(name, x, norm=gemma_norm),
        *partly_rotated(m, f"{name}.rope", "q1", "k1", PHI3),
        ops.release_names("q1", "k1"),
        *(cached(attention_name, wiring, ()) if indexed else ()),
        *(_indexer(x, wiring, f"{name}.indexer") if indexed else ()),
        *(_block_mask(wiring) if indexed else ()),
        *attention_ops,
        ops.linear(f"{name}.o_proj", "o", y, "h", "a d", "attention"),
        ops.release_names("q", "k", "v", "o", x, *(("block_mask", "blocks") if indexed else ())),
    )


def _full_attention(wiring: Wiring, grouped: bool, name: str) -> tuple[Op, ...]:
    return heads_first(name, "q", "k", "v", "o", wiring, grouped)


def _block_sparse_attention(wiring: Wiring, grouped: bool, name: str) -> tuple[Op, ...]:
    """Attention with the block mask, which has a number for every head already and is not copied."""
    kernel = attention(name, "q", "k", "v", "o", wiring._replace(padded=True), grouped, False, "block_mask")
    flat = (f"{name}.q_flat", f"{name}.k_flat") if wiring.backend in ("eager", "math") else ()

    def use_block_mask(op: Op) -> Op:
        if op.name == f"{name}.mask":
            return ops.view(op.name, "block_mask", op.writes[0].name, "b a s s")
        if op.name == f"{name}.mask_float":
            return op._replace(writes=(op.writes[0]._replace(shape="b a s s"),))
        return ops.view(op.name, op.reads[0], op.writes[0].name, op.writes[0].shape) if op.name in flat else op

    return tuple(map(use_block_mask, kernel))


def _without_gradient(*operations: Op) -> tuple[Op, ...]:
    """Return the ops without gradients: the indexer has none, though its weights are trainable."""
    return tuple(op._replace(gradient="none", keeps=(), scratch_back=(), unit="") for op in operations)


def _rotate_index_heads(name: str, t: str, heads: str) -> tuple[Op, ...]:
    """Rotate a part of every indexer head, and concatenate it with the rest."""
    rot = f"b s {heads} irot"
    return (
        *ops.rotate(f"{name}.rope_{t}", f"index.{t}1", f"index.{t}.turned", rot, f"b s {heads} irot2"),
        Op(f"{name}.cat_{t}", (f"index.{t}.turned", f"index.{t}1"), (Tensor(f"index.{t}", f"b s {heads} di"),)),
    )


def _indexer(x: str, wiring: Wiring, name: str) -> tuple[Op, ...]:
    """Scores in fp32 of a few narrow heads against all keys. The blocks with the largest scores are returned.

    What autograd saves of them stays alive until the indexer returns.
    """
    heads, one, scores, chosen = "b s i di", "b s 1 di", "b i s s", "b i s chosen_blocks"
    saved = tuple(f"index.{t}1.{part}" for t in "qk" for part in ("x32", "rstd", "n32", "factor"))
    return _without_gradient(
        ops.linear(f"{name}.q_proj", x, "index.q0", "i di", "h", "attention"),
        *gemma_norm(f"{name}.q_norm", "index.q0", "index.q1", heads, "di"),
        ops.release_names("index.q0"),
        ops.linear(f"{name}.k_proj", x, "index.k0", "di", "h", "attention"),
        *gemma_norm(f"{name}.k_norm", "index.k0", "index.k1", one, "di"),
        ops.release_names("index.k0"),
        *_rotate_index_heads(name, "q", "i"),
        *_rotate_index_heads(name, "k", "1"),
        ops.release_names("index.q1", "index.k1"),
        *(op._replace(holds="cache") for op in cached(f"{name}.keys", wiring, (), tensors=("index.k",))),
        ops.cast(f"{name}.float_q", "index.q", "index.q32", heads, "fp32"),
        ops.cast(f"{name}.float_k", "index.k", "index.k32", one, "fp32"),
        ops.copy(f"{name}.k_heads", "index.k32", "index.keys", "several s i di"),
        Op(f"{name}.scores", ("index.q32", "index.keys"), (Tensor("index.scores", scores, "fp32"),)),
        ops.release_names("index.k32"),
        Op(f"{name}.places", ("index.k",), (Tensor("index.places", "s", "int64"),)),
        Op(f"{name}.future", (), (Tensor("index.future", "b s s", "bool"),)),
        Op(f"{name}.masked", ("index.scores", "index.future"), (Tensor("index.masked", scores, "fp32"),)),
        ops.release_names("index.scores"),
        Op(f"{name}.pad", ("index.masked",), (Tensor("index.padded", "b i s padded_keys", "fp32"),)),
        Op(f"{name}.largest", ("index.masked", "index.padded"), (Tensor("index.blocks", "b i s key_blocks", "fp32"),)),
        Op(f"{name}.own", (), (Tensor("index.own", "b s", "int64"),)),
        Op(f"{name}.near", (), (Tensor("index.near", "near_blocks", "int64"),)),
        Op(f"{name}.less", ("index.own", "index.near"), (Tensor("index.less", "b s near_blocks", "int64"),)),
        Op(f"{name}.at_least", ("index.less",), (Tensor("index.local", "b s near_blocks", "int64"),)),
        Op(
            f"{name}.choose",
            ("index.blocks", "index.local"),
            (Tensor("index.best", chosen, "fp32"), Tensor("index.chosen", chosen, "int64")),
        ),
        Op(
            f"{name}.left_out",
            ("index.chosen", "index.best"),
            (Tensor("blocks", chosen, "int64"),),
            scratch=(Tensor("none", chosen, "bool"),),
            source=f"{_SOURCE} MiniMaxM3VLIndexer.forward",
        ),
        ops.release_names("index.q", "index.k", "index.places", "index.future", "index.masked", "index.padded"),
        ops.release_names("index.blocks", "index.own", "index.near", "index.local"),
        ops.release_names(*saved, "index.q32", "index.keys")._replace(needs_recording=True),
    )


def _block_mask(wiring: Wiring) -> tuple[Op, ...]:
    """The mask for every head, query and key, from the selected blocks and the model's own mask, if it has one."""
    every, dtype, chosen = "b a s s", "=q", "b i s chosen_blocks"
    source = f"{_SOURCE} MiniMaxM3VLIndexer.build_block_mask"
    has_mask = wiring.has_mask()
    seen: tuple[Op, ...] = (
        Op("block_mask.places", ("k",), (Tensor("keep.places", "s", "int64"),)),
        Op("block_mask.future", ("keep.places",), (Tensor("keep.future", "b s s", "bool"),)),
        Op("block_mask.past", ("keep.future",), (Tensor("keep.seen", "b s s", "bool"),)),
    )
    if has_mask:
        shown = "s s" if wiring.one_mask and not wiring.padded else "b s s"
        boolean = Op("block_mask.shown", ("mask",), (Tensor("keep.seen", shown, "bool"),))
        seen = (boolean if wiring.backend == "eager" else ops.view("block_mask.shown", "mask", "keep.seen", shown),)
    return _without_gradient(
        Op(
            "block_mask.safe",
            ("blocks",),
            (Tensor("blocks.safe", chosen, "int64"),),
            scratch=(Tensor("none", chosen, "bool"),),
        ),
        Op("block_mask.bias", ("blocks.safe",), (Tensor("keep.bias", "b i s key_blocks1", dtype),)),
        Op("block_mask.zero", ("keep.bias",), (Tensor("keep.blocks", "b i s key_blocks", "bool"),)),
        Op("block_mask.keys", ("keep.blocks",), (Tensor("keep.groups", "b i s block_keys", "bool"),)),
        Op("block_mask.heads", ("keep.groups",), (Tensor("keep.heads", every, "bool"),)),
        *seen,
        Op("block_mask.and", ("keep.heads", "keep.seen"), (Tensor("keep", every, "bool"),)),
        Op("block_mask.zeros", ("keep",), (Tensor("zeros", every, dtype),)),
        Op(
            "block_mask",
            ("keep", "zeros"),
            (Tensor("block_mask", every, dtype),),
            scratch=(Tensor("not kept", every, "bool"),),
            source=source,
        ),
        ops.release_names("keep", "keep.heads", "keep.bias", "blocks.safe"),
        ops.release_names(*(("keep.seen",) if has_mask else ("keep.places", "keep.future"))),
    )


BUILDERS = {
    "minimax_m3_vl_text": Decoder(
        attention=_heads,
        mlp=_dense_mlp,
        experts=_mixture,
        norm=gemma_norm,
        masks=FULL,
    )
}
