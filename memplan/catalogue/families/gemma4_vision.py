"""Gemma 4's vision tower: patches of images padded to as many each, gated blocks, and pooling by position.

Source: transformers 5.24 models/gemma4/modeling_gemma4.py.
"""

from __future__ import annotations

from memplan.catalogue.families.gemma4 import rms_norm
from memplan.catalogue.families.padded_images import selected_by, tower_mask
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision import towers as t
from memplan.catalogue.vision.towers import Tower
from memplan.core.errors import UnsupportedModelError
from memplan.core.ir import Block, Op, Run, Scratch, Tensor, Weight
from memplan.models.model import ModelSpec

_TOWER, _PROJECTOR = "model.vision_tower", "model.embed_vision"
_LEAD = "b images grid"
_SHAPE, _HEADS, _FEATURES = f"{_LEAD} vh", f"{_LEAD} va vd", "b merged h"


def clipped(
    name: str, x: str, y: str, out: str, into: str, clips: bool, group: str = "vision", lead: str = _LEAD
) -> tuple[Op, ...]:
    """Return a linear layer whose wrapper module can clip input and output to bounds stored as buffers."""
    inside, outside = (f"{y}.in", f"{y}.out") if clips else (x, y)
    linear = t.linear(f"{name}.linear", inside, outside, out, into, group, lead, False, False)
    if not clips:
        return (linear,)
    bounds = tuple(
        Weight(f"{name}.{bound}", "", "buffer", "fp32", False)
        for bound in ("input_min", "input_max", "output_min", "output_max")
    )
    return (
        _clip(f"{name}.clip_input", x, inside, f"{lead} {into}", bounds[:2]),
        linear,
        ops.release_names(inside),
        _clip(f"{name}.clip_output", outside, y, f"{lead} {out}", bounds[2:]),
        ops.release_names(outside),
    )


def _clip(name: str, x: str, y: str, shape: str, bounds: tuple[Weight, ...]) -> Op:
    """Return a clamp whose bounds, single numbers, do not change the dtype of x."""
    return ops.clamp(name, x, y, shape, 2)._replace(writes=(Tensor(y, shape, f"={x}"),), weights=bounds)


def _norm(name: str, x: str, y: str, shape: str = _SHAPE, axis: str = "vh") -> tuple[Op, ...]:
    return t.grouped(rms_norm(name, x, y, shape, axis), "vision")


def _rotated(name: str, x: str, y: str) -> tuple[Op, ...]:
    """Return the heads with one half rotated by the patch's column, the other by its row, and joined."""
    half, quarter = f"{_LEAD} va vd2", f"{_LEAD} va vd4"
    parts = tuple(Tensor(f"{x}.{n}", half, f"={x}") for n in ("columns", "rows"))
    turned = tuple(f"{y}.{n}" for n in ("columns", "rows"))
    rotated = (t.rotated(f"{name}.{to}", p.name, to, half, quarter) for p, to in zip(parts, turned, strict=True))
    return (
        ops.split(f"{name}.split", x, parts),
        *(op for operations in rotated for op in operations),
        ops.cat(f"{name}.cat", turned, y, _HEADS),
        ops.release_names(*(p.name for p in parts), *turned, x),
    )


def _heads(clips: bool, wiring: Wiring, name: str = "self_attn") -> tuple[Op, ...]:
    """Attention from `v.n1` to `v.ao`."""

    def projected(n: str) -> tuple[Op, ...]:
        return (
            *clipped(f"{name}.{n}_proj", "v.n1", f"v.{n}0", "va vd" if n == "q" else "vk vd", "vh", clips),
            ops.view(f"{name}.{n}_heads", f"v.{n}0", f"v.{n}1", _HEADS),
        )

    mask = "v.mask" if wiring.pads_tower else ""
    return (
        *(
            op
            for n in ("q", "k")
            for op in (
                *projected(n),
                *_norm(f"{name}.{n}_norm", f"v.{n}1", f"v.{n}2", _HEADS, "vd"),
                ops.release_names(f"v.{n}1"),
                *_rotated(f"{name}.rope_{n}", f"v.{n}2", f"v.{n}"),
            )
        ),
        *projected("v"),
        *rms_norm(f"{name}.v_norm", "v.v1", "v.v", _HEADS, "vd", affine=False),
        ops.release_names("v.v1"),
        *t.joint_attention(name, "v.q", "v.k", "v.v", "v.o", wiring, mask=mask, converts=True),
        *clipped(f"{name}.o_proj", "v.o", "v.ao", "vh", "va vd", clips),
        ops.release_names("v.q", "v.k", "v.v", "v.o", "v.n1"),
    )


def _mlp(clips: bool, name: str = "mlp") -> tuple[Op, ...]:
    wide = f"{_LEAD} vf"
    return (
        *clipped(f"{name}.gate_proj", "v.n2", "v.gate", "vf", "vh", clips),
        ops.activation(f"{name}.act_fn", "v.gate", "v.act", wide),
        ops.release_names("v.gate"),
        *clipped(f"{name}.up_proj", "v.n2", "v.up", "vf", "vh", clips),
        ops.mul(f"{name}.product", "v.act", "v.up", "v.product", wide),
        ops.release_names("v.act", "v.up"),
        *clipped(f"{name}.down_proj", "v.product", "v.mo", "vh", "vf", clips),
        ops.release_names("v.product", "v.n2"),
    )


def _block(clips: bool, wiring: Wiring) -> Block:
    operations = (
        *_norm("input_layernorm", "x", "v.n1"),
        *_heads(clips, wiring),
        *_norm("post_attention_layernorm", "v.ao", "v.ao.normed"),
        ops.release_names("v.ao"),
        ops.add("residual_1", "x", "v.ao.normed", "v.x1", _SHAPE),
        ops.release_names("v.ao.normed"),
        *_norm("pre_feedforward_layernorm", "v.x1", "v.n2"),
        *_mlp(clips),
        *_norm("post_feedforward_layernorm", "v.mo", "v.mo.normed"),
        ops.release_names("v.mo"),
        ops.add("residual_2", "v.x1", "v.mo.normed", "y", _SHAPE),
        ops.release_names("v.mo.normed", *t.returned(wiring)),
    )
    return Block(f"{_TOWER}.encoder.layers", operations)


def _positions(name: str) -> tuple[Op, ...]:
    """The sum of the embeddings of each patch's column and row, and zero for padding."""
    table = Weight(f"{name}.position_embedding_table", "2 vpositions vh", "vision")
    rows = Scratch(Tensor("rows", "vpositions vh", f"={table.name}"), table.name)

    def looked_up(of: str) -> Op:
        return ops.lookup(f"{name}.{of}", "v.places", f"v.at_{of}", _SHAPE, table)._replace(
            scratch_back=(
                *(
                    Scratch(Tensor(part, "tower_ids", "int64"), table.name, early=True)
                    for part in ("ids", "positions", "sorted", "order")
                ),
                Scratch(Tensor("segments", "tower_segments", "int64"), table.name, early=True),
                Scratch(Tensor("partial sums", "tower_segments vh32", "fp32"), table.name, early=True),
                rows,
            )
        )

    return (
        Op(f"{name}.clamp", (), (Tensor("v.places", f"{_LEAD} 2", "int64"),), gradient="none"),
        looked_up("columns"),
        looked_up("rows"),
        ops.add(f"{name}.sum", "v.at_columns", "v.at_rows", "v.pairs", _SHAPE),
        ops.with_constant(f"{name}.where", "v.pairs", "v.padding", "v.position", _SHAPE, "where", "=v.pairs"),
        ops.release_names("v.places", "v.at_columns", "v.at_rows", "v.pairs"),
    )


def _table() -> tuple[Op, ...]:
    """cos and sin of every patch's column and row."""
    half, whole, f, n = f"{_LEAD} vd2", f"{_LEAD} vd", "fp32", f"{_TOWER}.encoder.rotary_emb"
    frequencies = tuple(Weight(f"{n}.{x}", "vd4", "buffer", f, False) for x in ("inv_freq", "original_inv_freq"))
    positions = Tensor("positions", f"{_LEAD} 2", f)
    return (
        Op(f"{n}.angles", (), (Tensor("v.angles", half, f),), frequencies, scratch=(positions,), gradient="none"),
        *(
            Op(f"{n}.{x}", ("v.angles",), (Tensor(f"v.half_{x}", half, f),), scratch=(Tensor("unscaled", half, f),))
            for x in ("cos", "sin")
        ),
        *(
            op
            for x in ("cos", "sin")
            for op in (
                Op(f"{n}.cat_{x}", (f"v.half_{x}",), (Tensor(f"v.{x}32", whole, f),)),
                ops.release_names(f"v.half_{x}"),
            )
        ),
        *(ops.cast(f"{n}.to_{x}", f"v.{x}32", f"v.{x}", whole, "=embeds") for x in ("cos", "sin")),
        ops.release_names("v.angles", "v.cos32", "v.sin32"),
    )


def _before(wiring: Wiring) -> tuple[Op, ...]:
    n = f"{_TOWER}.patch_embedder"
    patches = t.linear(f"{n}.input_proj", "v.pixels", "v.patches", "vh", "vin", lead=_LEAD, bias=False, flat=False)
    pixels, padding = f"{_LEAD} vin", Tensor("v.padding", _LEAD, "bool")
    valid = Tensor("v.valid", _LEAD, "bool")
    return (
        Op(f"{_TOWER}.padding", (), (padding,), scratch=(Tensor("padded", f"{_LEAD} 2", "bool"),), gradient="none"),
        Op(
            f"{n}.centre",
            ("pixel_values",),
            (Tensor("v.centred", pixels, "fp32"),),
            scratch=(Tensor("less a half", pixels, "fp32"),),
            gradient="none",
        ),
        ops.cast(f"{n}.to", "v.centred", "v.pixels", pixels, f"={patches.weights[0].name}"),
        ops.release_names("v.centred"),
        patches,
        *_positions(n),
        ops.add(f"{n}.add", "v.patches", "v.position", "embeds", _SHAPE),
        ops.release_names("v.pixels", "v.patches", "v.position"),
        Op(f"{_TOWER}.valid", ("v.padding",), (valid,), gradient="none"),
        *tower_mask(wiring),
        *_table(),
    )


def _standardised(x: str, y: str, shape: str) -> tuple[Op, ...]:
    """Subtract a buffer from x and multiply the rest by another, both in fp32."""
    bias, scale = (Weight(f"{_TOWER}.{of}", "vh", "buffer", "", False) for of in ("std_bias", "std_scale"))
    return (
        *(Op(f"{w.name}.float", (), (Tensor(f"{y}.{w.name}", "vh", "fp32"),), (w,), cast=True) for w in (bias, scale)),
        Op(f"{_TOWER}.less", (x, f"{y}.{bias.name}"), (Tensor(f"{y}.less", shape),), gradient="same"),
        ops.with_constant(f"{_TOWER}.times", f"{y}.less", f"{y}.{scale.name}", y, shape, "mul.Tensor"),
        ops.release_names(x, f"{y}.less"),
    )


def _after(wiring: Wiring, standardises: bool) -> tuple[Op, ...]:
    """Pool the patches of every square, select those that are not padding, and project them."""
    slots, pooled, weights = "b slots", "b slots vh", "b slots grid"
    merged = "b merged vh"
    return (
        ops.release_names("v.valid", "v.cos", "v.sin", *(("v.mask",) if wiring.pads_tower else ())),
        ops.masked_fill(f"{_TOWER}.pooler.fill", "x", "v.padding", "v.filled", _SHAPE),
        Op(
            f"{_TOWER}.pooler.weights",
            (),
            (Tensor("v.weights", weights, "fp32"),),
            scratch=(Tensor("one hot", weights, "int64"), Tensor("float", weights, "fp32")),
            gradient="none",
        ),
        ops.cast(f"{_TOWER}.pooler.float", "v.filled", "v.filled32", _SHAPE, "fp32"),
        ops.matmul(f"{_TOWER}.pooler.pool", "v.weights", "v.filled32", "v.pooled", pooled),
        ops.release_names("v.filled32"),
        Op(
            f"{_TOWER}.pooler.mask",
            ("v.weights",),
            (Tensor("v.kept", slots, "bool"),),
            scratch=(Tensor("zero", weights, "bool"), Tensor("all", slots, "bool")),
            gradient="none",
        ),
        ops.cast(f"{_TOWER}.pooler.to", "v.pooled", "v.small", pooled, "=v.filled"),
        ops.release_names("v.weights", "v.pooled", "v.filled"),
        ops.cast(f"{_TOWER}.pooler.wide", "v.small", "v.small32", pooled, "fp32"),
        ops.scale(f"{_TOWER}.pooler.scale", "v.small32", "v.scaled", pooled),
        ops.release_names("v.small", "v.small32"),
        selected_by("v.kept", f"{_TOWER}.strip", "v.scaled", "v.rows", merged),
        ops.release_names("v.scaled"),
        *(_standardised("v.rows", "v.standard", merged) if standardises else ()),
        ops.cast(f"{_TOWER}.to", "v.standard" if standardises else "v.rows", "v.last", merged, "=embeds"),
        ops.release_names("v.standard" if standardises else "v.rows", "x", "embeds", "v.padding", "v.kept"),
        *rms_norm(f"{_PROJECTOR}.embedding_pre_projection_norm", "v.last", "v.normed", merged, "vh", affine=False),
        t.linear(
            f"{_PROJECTOR}.embedding_projection", "v.normed", "features", "h", "vh", "projector", "b merged", False
        ),
        ops.release_names("v.normed"),
        ops.view("image_outputs.last", "v.last", "v.returned", merged)._replace(holds="forward"),
        ops.view("image_outputs.pooled", "features", "features.returned", _FEATURES)._replace(holds="forward"),
        ops.release_names("v.last"),
    )


def tower_of(m: ModelSpec, wiring: Wiring) -> Tower:
    """Return the vision tower, from `pixel_values` to `features`."""
    part, axes = m.part("vision_config"), m.axes()
    if wiring.images and not wiring.hears and axes["va"] != axes["vk"]:
        key = "vision_config.num_key_value_heads"
        raise UnsupportedModelError(f"{key}: a number other than that of heads is not supported yet with images", key)
    clips = bool(part.get("use_clipped_linears", False))
    inputs = (
        Tensor("pixel_values", f"{_LEAD} vin", "fp32"),
        Tensor("image_position_ids", f"{_LEAD} 2", "int64"),
        Tensor("mm_token_type_ids", "b s", "int64"),
    )
    after = _after(wiring, bool(part.get("standardize", False)))
    return Tower(inputs, _before(wiring), (Run((_block(clips, wiring),), "vL"),), after)
