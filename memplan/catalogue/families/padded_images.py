"""LFM2-VL: images of any size, each padded to as many patches as the largest has.

Source: transformers 5.24 models/lfm2_vl, models/siglip2.
"""

from __future__ import annotations

from memplan.catalogue.decoder.decoder import stack_of
from memplan.catalogue.decoder.frame import masks
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import renamed
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision import towers as t
from memplan.catalogue.vision.towers import Tower
from memplan.catalogue.vision.vision import scattered, text_with_tower
from memplan.core.errors import UnsupportedModelError
from memplan.core.ir import Keep, Op, Run, Scratch, Stack, Tensor, Weight
from memplan.models.configs import family
from memplan.models.model import ModelSpec

_LEAD = "b images grid"
_SHAPE = f"{_LEAD} vh"
# Axes of a text's mask -> those of the tower's.
_AXES = {"b": "b images", **{f"s{n}": f"grid{n}" for n in ("", "8", "32", "128")}}


def tower_mask(wiring: Wiring) -> tuple[Op, ...]:
    """Return the mask of the patches that pad images, if there are any."""
    backend = "eager" if wiring.tower == "eager" else "efficient"
    own = Wiring(wiring.tower or "flash", backend, padded=wiring.pads_tower, causal=False, records=wiring.records)
    return renamed(ops.with_axes(masks(own, "embeds"), _AXES), {"mask": "v.mask"})


def selected(name: str, x: str, rows: str, y: str, shape: str) -> tuple[Op, ...]:
    """Return those of the `rows` of x that a mask selects."""
    mask = f"{y}.selected"
    return (
        Op(f"{name}.mask", (), (Tensor(mask, rows, "bool"),), gradient="none"),
        selected_by(mask, name, x, y, shape),
        ops.release_names(mask),
    )


def selected_by(mask: str, name: str, x: str, y: str, shape: str) -> Op:
    """Return the rows of x that the `mask` selects."""
    places = Tensor("places", shape.rpartition(" ")[0], "int64")
    return ops.index(name, x, mask, y, shape)._replace(scratch=(places,), scratch_back=(Scratch(places),))


def _positions(name: str) -> tuple[Op, ...]:
    """The table of positions resized to each image in fp32, as the product of the weights of its rows and columns."""
    table = Weight(f"{name}.weight", "vpositions vh", "vision", rows=1)
    return (
        Op(
            f"{name}.weights",
            (),
            (Tensor("v.weights", f"{_LEAD} vpositions", "fp32"),),
            scratch=(Tensor("weights of rows and columns", f"{_LEAD} 2 vside", "fp32"),),
            gradient="none",
            source="transformers 5.24 models/siglip2/modeling_siglip2.py resize_positional_embeddings",
        ),
        Op(
            f"{name}.float",
            (),
            (Tensor("v.table", "vpositions vh", "fp32"),),
            (table,),
            cast=True,
            source=f"{ops.DERIVATIVES}: _to_copy",
        ),
        Op(
            f"{name}.resize",
            ("v.weights", "v.table"),
            (Tensor("v.resized", _SHAPE),),
            (),
            (Keep("v.weights", "v.table"),),
            gradient="view",
            autocast="lower",
            product="matrix",
            source=f"{ops.DERIVATIVES}: mm",
        ),
        ops.cast(f"{name}.to", "v.resized", "v.position", _SHAPE, f"={table.name}"),
        ops.release_names("v.weights", "v.table", "v.resized"),
    )


def lfm2_vl(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build LFM2-VL, whose projector reads the patches of all images, padded ones too, as one large image."""
    n, p, group, slots = "vision_tower", "multi_modal_projector", "projector", "b slots"
    part, merged = m.part("vision_config"), "b slots vm"
    if part.get("vision_use_head", True):
        raise UnsupportedModelError(
            "vision_config.vision_use_head: lfm2_vl's images are only supported with false", "vision_config"
        )
    act = str(part.get("hidden_act", "gelu_pytorch_tanh"))
    mask = "v.mask" if wiring.pads_tower else ""
    block = t.encoder_block(f"{n}.encoder.layers", act, wiring, mask=mask)
    patches = t.linear(f"{n}.embeddings.patch_embedding", "v.pixels", "v.patches", "vh", "vin", lead=_LEAD, flat=False)
    before = (
        ops.cast(f"{n}.embeddings.to", "pixel_values", "v.pixels", f"{_LEAD} vin", f"={patches.weights[0].name}"),
        patches._replace(requires_gradient=True),
        *_positions(f"{n}.embeddings.position_embedding"),
        ops.add(f"{n}.embeddings", "v.patches", "v.position", "embeds", _SHAPE),
        ops.release_names("v.pixels", "v.patches", "v.position"),
        *tower_mask(wiring),
    )
    bias, has_norm = bool(m.get("projector_bias", True)), bool(m.get("projector_use_layernorm", True))
    square = "v.normed" if has_norm else "v.square"
    places = Tensor("v.places", t.P, "int64")
    after = (
        *t.norm(f"{n}.post_layernorm", "x", "v.last", _SHAPE, "vh"),
        ops.release_names("x", "embeds", *((mask,) if mask else ())),
        Op("patch_index", (), (places,), scratch=(places,), gradient="none"),
        ops.index("patch_grid", "v.last", "v.places", "v.grid", f"{t.P} vh"),
        ops.copy(f"{p}.pixel_unshuffle", "v.grid", "v.square", merged),
        *(t.norm(f"{p}.layer_norm", "v.square", "v.normed", merged, "vm", group) if has_norm else ()),
        t.linear(f"{p}.linear_1", square, "v.m1", "valigned", "vm", group, slots, bias, flat=False),
        *t.acted(str(m.get("projector_hidden_act", "gelu")), f"{p}.act", "v.m1", "v.m2", f"{slots} valigned"),
        t.linear(f"{p}.linear_2", "v.m2", "v.projected", "h", "valigned", group, slots, bias, flat=False),
        ops.release_names("v.m1", "v.m2", "v.square"),
        *selected("image_features", "v.projected", slots, "features", "b merged h"),
        *t.returned_states("v.last", "features"),
        ops.release_names("v.last", "v.places", "v.grid", "v.projected"),
    )
    inputs = (
        Tensor("pixel_values", f"{t.P} vin", "fp32"),
        Tensor("pixel_attention_mask", _LEAD, "int32"),
        Tensor("spatial_shapes", "b images 2", "int64"),
    )
    text = stack_of(m, wiring, family(m.family.wraps).stack, m.family.wraps)
    tower = Tower(inputs, before, (Run((block,), "vL1"),), after)
    return text_with_tower(wiring, text, tower, scattered(), ("image_embeds", "image_mask"))
