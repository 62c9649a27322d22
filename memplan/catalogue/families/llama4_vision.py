"""Llama 4 with images: tiles of one size with a class token each, complex rotation, four patches per text token.

Source: transformers 5.24 models/llama4/modeling_llama4.py.
"""

from __future__ import annotations

from memplan.catalogue.families.llama4 import llama4, rotate_complex
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision import towers as t
from memplan.catalogue.vision.towers import Tower
from memplan.catalogue.vision.vision import scattered, text_with_tower
from memplan.core.ir import Op, Run, Stack, Tensor, Weight
from memplan.models.model import ModelSpec

_LEAD = "b images grid"
_TILE = "b images tile"
_SHAPE, _HEADS = f"{_LEAD} vh", f"{_LEAD} va vd"
_TURNS = "vpositions vd"  # complex numbers, each two fp32
_NAME = "vision_model"
_TABLE = f"{_NAME}.rotary_embedding.freqs_ci"


def _patches() -> tuple[Op, ...]:
    """Patches unfolded into columns, which the linear layer copies into rows. The processor makes pixels in bf16.

    The linear layer copies only if its weight trains; otherwise nothing of the copy is kept.
    """
    n = f"{_NAME}.patch_embedding"
    place = Weight(f"{_NAME}.positional_embedding_vlm", "vpositions vh", "vision", rows=1)
    return (
        Op(
            f"{n}.unfold",
            ("pixel_values",),
            (Tensor("v.columns", f"{_TILE} vin", "=pixel_values"),),
            gradient="none",
            source="torch 2.13 aten/src/ATen/native/cuda/Im2Col.cu",
        ),
        Op(
            f"{n}.fold",
            ("v.columns",),
            (Tensor("v.rows", f"{_TILE} vin", "=v.columns"),),
            gradient="none",
            source="torch 2.13 aten/src/ATen/native/LinearAlgebra.cpp should_fold",
        ),
        t.linear(f"{n}.linear", "v.rows", "v.patches", "vh", "vin", lead=_TILE, bias=False, flat=False)._replace(
            requires_gradient=True
        ),
        ops.release_names("v.columns"),
        Op(
            f"{_NAME}.class_embedding",
            ("v.patches",),
            (Tensor("v.tiles", _SHAPE),),
            (Weight(f"{_NAME}.class_embedding", "vh", "vision"),),
            source=f"{ops.DERIVATIVES}: cat",
        ),
        Op(place.name, (), (Tensor("v.place", "vpositions vh", "=v.tiles"),), (place,), cast=True),
        ops.add(f"{_NAME}.place", "v.tiles", "v.place", "v.placed", _SHAPE),
        *t.norm(f"{_NAME}.layernorm_pre", "v.placed", "embeds", _SHAPE, "vh"),
        Op(f"{_NAME}.rotary_embedding", weights=(Weight(_TABLE, _TURNS, "buffer", "fp32", False),)),
    )


def _block(wiring: Wiring) -> Run:
    name = "self_attn"
    heads = (
        *(
            t.linear(f"{name}.{x}_proj", "v.n1", y, "va vd", "vh", lead=_LEAD, flat=False)
            for x, y in (("q", "v.q0"), ("k", "v.k0"), ("v", "v.v"))
        ),
        *rotate_complex(f"{name}.rope", ("v.q0", "v.q", _HEADS), ("v.k0", "v.k", _HEADS), (), _TURNS),
        *t.joint_attention(name, "v.q", "v.k", "v.v", "v.o", wiring, softmax=""),
        t.linear(f"{name}.o_proj", "v.o", "v.ao", "vh", "va vd", lead=_LEAD, flat=False),
        ops.release_names("v.q", "v.k", "v.v", "v.o", "v.n1"),
    )
    feed = t.mlp("mlp", "v.n2", "v.mo", "gelu", lead=_LEAD, flat=False)
    norms = ("input_layernorm", "post_attention_layernorm")
    return Run(
        (t.block(f"{_NAME}.model.layers", heads, feed, norms=norms, lead=_LEAD, held=t.returned(wiring)),), "vL1"
    )


def _adapter(m: ModelSpec) -> tuple[Op, ...]:
    """The adapter, without class tokens: merge four patches in two copies, then two linear layers, each with a GELU."""
    n, lead, shuffled = f"{_NAME}.vision_adapter", "b merged", f"{_TILE} vh"
    drops = bool(m.part("vision_config").get("projector_dropout", 0.0))
    inner = "v.dropped" if drops else "v.m2"
    return (
        ops.release_names("embeds"),
        *t.norm(f"{_NAME}.layernorm_post", "x", "v.last", _SHAPE, "vh"),
        ops.view(f"{n}.patches", "v.last", "v.seen", shuffled, gradient="new"),
        ops.copy(f"{n}.shuffle_columns", "v.seen", "v.half", shuffled, gradient="new"),
        ops.copy(f"{n}.shuffle_rows", "v.half", "v.square", f"{lead} vf", gradient="new"),
        t.linear(f"{n}.mlp.fc1", "v.square", "v.m1", "vp", "vf", lead=lead, bias=False, flat=False),
        ops.activation(f"{n}.mlp.act_1", "v.m1", "v.m2", f"{lead} vp"),
        *((ops.dropout(f"{n}.mlp.dropout", "v.m2", inner, f"{lead} vp"),) if drops else ()),
        t.linear(f"{n}.mlp.fc2", inner, "v.m3", "vpo", "vpo", lead=lead, bias=False, flat=False),
        ops.activation(f"{n}.mlp.act_2", "v.m3", "v.adapted", f"{lead} vpo"),
        ops.release_names("v.square", "v.last", "x", "v.place"),
        t.linear("multi_modal_projector.linear_1", "v.adapted", "features", "h", "vo", "projector", lead, bias=False),
    )


def _held_by_frame(x: str, shape: str) -> Op:
    """A view that the forward of the multimodal model holds until the loss is computed."""
    return ops.view(f"frame.{x}", x, f"{x}.framed", shape)._replace(holds="forward")


def with_tower(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Llama 4 with its vision tower.

    The multimodal model's forward computes the loss after its decoder and its head have returned.
    """
    text = llama4(m, wiring)
    text = text._replace(
        before=(*text.before, _held_by_frame("embeds", "b s h")), after=(*text.after, ops.release_names("n"))
    )
    tower = Tower((Tensor("pixel_values", f"{_TILE} vin", "bf16"),), _patches(), (_block(wiring),), _adapter(m))
    frame = (
        _held_by_frame("v.adapted", "b merged vo"),
        _held_by_frame("image_embeds", "b merged h"),
        _held_by_frame("image_mask", "b s"),
    )
    return text_with_tower(wiring, text, tower, (*scattered(joined=False), *frame))


BUILDERS = {"llama4": with_tower}
