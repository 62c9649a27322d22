"""LLaVA, InternVL, PaliGemma, Idefics 3 and SmolVLM: a tower for images of one size, a projector, and any decoder.

Source: transformers 5.24 models/llava, models/internvl, models/paligemma, models/smolvlm; models/clip, models/siglip.
"""

from __future__ import annotations

from memplan.catalogue.decoder.decoder import stack_of
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import renamed, skipped
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision import towers as t
from memplan.catalogue.vision.towers import Tower
from memplan.catalogue.vision.uncalled_towers import newline
from memplan.catalogue.vision.vision import masked_text, scattered, text_with_tower
from memplan.core.errors import UnsupportedModelError
from memplan.core.ir import Block, Op, Run, Scratch, Stack, Tensor, Weight
from memplan.models.configs import family
from memplan.models.model import ModelSpec

_LEAD = "b images grid"
_SHAPE, _MERGED = f"{_LEAD} vh", "b merged"
_HELD = ("image_embeds", "image_mask")
_PIXELS = (Tensor("pixel_values", f"{t.P} vin", "fp32"),)


def _text(m: ModelSpec, wiring: Wiring) -> Stack:
    return stack_of(m, wiring, family(m.family.wraps).stack, m.family.wraps)


def _vision(m: ModelSpec, key: str, default: str) -> str:
    return str(m.part("vision_config").get(key, default))


def _with_class(name: str, x: str, y: str, patches: str) -> tuple[Op, ...]:
    """Join a class token and the patches `x`, and add positions."""
    token = Weight(name, "vh", "vision")
    table = Weight(patches, "vpositions vh", "vision", rows=1)
    return (
        Op(f"{name}.cat", (x,), (Tensor(f"{y}.joined", _SHAPE),), (token,), gradient="same", source=ops.DERIVATIVES),
        ops.add_weight(f"{name}.add", f"{y}.joined", y, _SHAPE, table),
        ops.release_names(f"{y}.joined"),
    )


def _projector(
    n: str, act: str, x: str, into: str, bias: bool = True, lead: str = _MERGED, y: str = "features"
) -> tuple[Op, ...]:
    """Two linear layers over merged patches with an activation between them, from `x` to `features`."""
    g = "projector"
    return (
        t.linear(f"{n}.linear_1", x, "v.m1", "h", into, g, lead, bias, flat=False),
        *t.acted(act, f"{n}.act", "v.m1", "v.m2", f"{lead} h"),
        ops.release_names("v.m1"),
        t.linear(f"{n}.linear_2", "v.m2", y, "h", "h", g, lead, bias, flat=False),
        ops.release_names("v.m2"),
    )


def llava(m: ModelSpec, wiring: Wiring, is_next: bool = False) -> Stack:
    """Build LLaVA, or LLaVA-NeXT, with CLIP's tower, whose last layers run although nothing reads their output."""
    kind = _vision(m, "model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise UnsupportedModelError(
            f"vision_config.model_type: {kind!r:.40} is not supported yet for llava; supported: clip_vision_model",
            "vision_config",
        )
    n, is_cropped = "vision_tower", m.get("vision_feature_select_strategy", "default") == "default"
    ids = Weight(f"{n}.embeddings.position_ids", "vpositions", "buffer", "int64", False)
    lead, pixels, projected = (
        ("b images tile", "v.tiles", "v.projected") if is_next else (_MERGED, "pixel_values", "features")
    )
    before = (
        *((ops.copy("pixel_values.cat", "pixel_values", pixels, f"{t.P} vin"),) if is_next else ()),
        *t.convolution(f"{n}.embeddings.patch_embedding", pixels, "v.patches", f"{t.P} vh", False, asks=True),
        *_with_class(
            f"{n}.embeddings.class_embedding", "v.patches", "v.embedded", f"{n}.embeddings.position_embedding"
        ),
        Op(f"{n}.embeddings.position_ids", weights=(ids,), gradient="none"),
        *t.norm(f"{n}.pre_layrnorm", "v.embedded", "embeds", _SHAPE, "vh"),
        ops.release_names("v.embedded"),
    )
    block = t.encoder_block(f"{n}.encoder.layers", _vision(m, "hidden_act", "quick_gelu"), wiring)
    chosen = (ops.view("v.choose", "x", "v.chosen", _SHAPE), ops.view("v.go_on", "x", "stream", _SHAPE))
    has_unread = "vL2" in m.axes()
    runs = (Run((block,), "vL1"), *((Run((block._replace(unread=True),), "vL2", chosen),) if has_unread else ()))
    last = t.norm(f"{n}.post_layernorm", "v.class", "v.pooled", "b images vh", "vh")
    x = "v.chosen" if has_unread else "x"
    after = (
        ops.release_names("v.patches", "embeds"),
        ops.view("v.class", "x", "v.class", "b images vh", "new"),
        *(op._replace(gradient="none", keeps=()) for op in last),
        *((ops.view("v.crop", x, "v.cropped", f"{lead} vh", "new"),) if is_cropped else ()),
        *((ops.copy("v.rows", "v.cropped", "v.rows", f"{lead} vh"),) if is_cropped else ()),
        *_projector(
            *("multi_modal_projector", str(m.get("projector_hidden_act", "gelu"))),
            *("v.rows" if is_cropped else x, "vh", m.get("multimodal_projector_bias", True), lead, projected),
        ),
        *(_packed() if is_next else ()),
        *t.returned_states("x", "features"),
        *((ops.view("image_outputs.chosen", x, "v.returned", _SHAPE)._replace(holds="forward"),) if has_unread else ()),
        ops.release_names("x", "v.pooled", "v.cropped", "v.rows"),
    )
    held = (*_HELD, *(("v.chosen",) if has_unread else ()))
    return text_with_tower(wiring, _text(m, wiring), Tower(_PIXELS, before, runs, after), scattered(), held)


def _packed() -> tuple[Op, ...]:
    """Put the tiles of each image together, add a token to each row, and put the downscaled image in front."""
    end = Weight("model.image_newline", "h", "projector")
    tiles = "b images tile h"
    return (
        Op(
            "pack_image_features",
            ("v.projected",),
            (Tensor("features", f"{_MERGED} h"),),
            (end,),
            scratch=(
                Tensor("rows of tiles", "cells h", "=v.projected"),
                Tensor("rows with ends", "lined h", "=v.projected"),
            ),
            scratch_back=(Scratch(Tensor("gradients of images", tiles, "=v.projected")),),
            source="transformers 5.24 models/llava_next/modeling_llava_next.py pack_image_features",
        ),
        ops.release_names("v.projected", "v.tiles"),
    )


def llava_next(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build LLaVA-NeXT: LLaVA over the tiles of an image, and the embedding of the end of a row of patches."""
    return llava(m, wiring, is_next=True)


def llava_next_video(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build LLaVA-NeXT-Video for text."""
    stack = llava(m, wiring)
    return stack._replace(before=(*skipped(newline()), *stack.before))


def _unread_norm(tower: str) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """Return SigLIP's last norm if nothing reads its output, and what its graph holds while the output is returned."""
    norm = t.strided_norm(f"{tower}.post_layernorm", "x", "v.last", _SHAPE, "vh")
    kept = (("x", _SHAPE), ("v.last.mean", _LEAD), ("v.last.rstd", _LEAD))
    return (
        tuple(op._replace(gradient="none", keeps=()) for op in norm),
        tuple(ops.view(f"image_outputs.{x}", x, f"{x}.kept", shape)._replace(holds="forward") for x, shape in kept),
    )


def llava_onevision(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build LLaVA-OneVision with SigLIP's tower, whose last norm runs although nothing reads its output."""
    n, lead = "vision_tower", "b images tile"
    layer = m.config.get("vision_feature_layer", -1)
    if layer != -1 or m.part("vision_config").get("vision_use_head", True):
        raise UnsupportedModelError(
            "vision_feature_layer: llava_onevision's images are only supported with -1, and vision_use_head false",
            "vision_feature_layer",
        )
    act = _vision(m, "hidden_act", "gelu_pytorch_tanh")
    block = t.encoder_block(f"{n}.encoder.layers", act, wiring, t.strided_norm)
    before = (
        ops.copy("pixel_values.cat", "pixel_values", "v.tiles", f"{t.P} vin"),
        *renamed(t.embedded_patches(f"{n}.embeddings", _SHAPE), {"pixel_values": "v.tiles"}),
    )
    last, kept = _unread_norm(n)
    after = (
        *last,
        ops.release_names("embeds"),
        ops.copy("v.rows", "x", "v.rows", f"{lead} vh"),
        *_projector(
            *("multi_modal_projector", str(m.get("projector_hidden_act", "gelu")), "v.rows", "vh"),
            *(bool(m.get("multimodal_projector_bias", True)), lead, "v.projected"),
        ),
        *_packed(),
        *t.returned_states("v.last", "features"),
        *kept,
        ops.release_names("x", "v.last", "v.rows"),
    )
    tower = Tower(_PIXELS, before, (Run((block,), "vL1"),), after)
    return text_with_tower(wiring, _text(m, wiring), tower, scattered(), _HELD)


def paligemma(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build PaliGemma with SigLIP's tower."""
    n, act = "vision_tower", _vision(m, "hidden_act", "gelu_pytorch_tanh")
    block = t.encoder_block(f"{n}.encoder.layers", act, wiring, t.strided_norm)
    after = (
        *t.strided_norm(f"{n}.post_layernorm", "x", "v.last", _SHAPE, "vh"),
        ops.release_names("x", "embeds"),
        t.linear("multi_modal_projector.linear", "v.last", "features", "h", "vh", "projector", _LEAD, flat=False),
        *t.returned_states("v.last", "features"),
        ops.release_names("v.last"),
    )
    inputs = (*_PIXELS, Tensor("token_type_ids", "b s", "int64"))
    tower = Tower(inputs, t.embedded_patches(f"{n}.embeddings", _SHAPE), (Run((block,), "vL1"),), after)
    text = masked_text(wiring.images, wiring, lambda masked: _text(m, masked))
    return text_with_tower(wiring, text, tower, scattered(joined=False), _HELD)


def _scaled_block(m: ModelSpec, wiring: Wiring) -> Block:
    """A block of InternVL's tower, which multiplies each branch by a weight before it is added."""
    bias = bool(m.part("vision_config").get("attention_bias", False))
    is_normed = bool(m.part("vision_config").get("use_qk_norm", False))
    norm = t.rms_norm if _vision(m, "norm_type", "layer_norm") == "rms_norm" else t.norm
    wide = f"{_LEAD} va vd"

    def projected(x: str) -> tuple[Op, ...]:
        y = f"v.{x}.raw" if is_normed and x != "v" else f"v.{x}"
        layer = t.linear(f"attention.{x}_proj", "v.n1", y, "va vd", "vh", lead=_LEAD, bias=bias, flat=False)
        if y == f"v.{x}":
            return (layer,)
        return (layer, *t.rms_norm(f"attention.{x}_norm", y, f"v.{x}", wide, "vh"), ops.release_names(y))

    def scaled(name: str, x: str, y: str) -> tuple[Op, ...]:
        return (ops.multiply_weight(name, x, y, _SHAPE, Weight(name, "vh", "vision")), ops.release_names(x))

    heads = (
        *(op for x in ("q", "k", "v") for op in projected(x)),
        *t.joint_attention("attention", "v.q", "v.k", "v.v", "v.o", wiring, softmax=""),  # in eager's dtype
        t.linear("attention.projection_layer", "v.o", "v.ao.raw", "vh", "va vd", lead=_LEAD, flat=False),
        ops.release_names("v.q", "v.k", "v.v", "v.o", "v.n1"),
        *scaled("lambda_1", "v.ao.raw", "v.ao"),
    )
    feed = t.mlp("mlp", "v.n2", "v.mo.raw", _vision(m, "hidden_act", "gelu"), lead=_LEAD, flat=False)
    feeds = (*feed, *scaled("lambda_2", "v.mo.raw", "v.mo"))
    norms = ("layernorm_before", "layernorm_after")
    return t.block("vision_tower.encoder.layer", heads, feeds, norm, norms, _LEAD, t.returned(wiring))


def internvl(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build InternVL, which merges its patches four by four in two copies."""
    n, merged = "vision_tower", f"{_MERGED} vm"
    before = (
        *t.convolution(
            f"{n}.embeddings.patch_embeddings.projection", "pixel_values", "v.patches", f"{t.P} vh", True, asks=True
        ),
        *_with_class(f"{n}.embeddings.cls_token", "v.patches", "embeds", f"{n}.embeddings.position_embeddings"),
    )
    is_normed = not m.part("vision_config").get("use_mean_pooling", True)
    last = "v.last" if is_normed else "x"
    p = "multi_modal_projector"
    after = (
        ops.release_names("v.patches", "embeds"),
        *(t.norm(f"{n}.layernorm", "x", last, _SHAPE, "vh") if is_normed else ()),
        ops.view("v.crop", last, "v.cropped", merged, "new"),
        ops.copy("v.shuffle_rows", "v.cropped", "v.half", merged),
        ops.copy("v.shuffle_columns", "v.half", "v.square", merged),
        ops.release_names("v.half", "v.cropped"),
        *t.norm(f"{p}.layer_norm", "v.square", "v.normed", merged, "vm", "projector"),
        *_projector(p, str(m.get("projector_hidden_act", "gelu")), "v.normed", "vm"),
        *t.returned_states(last, "features"),
        ops.release_names("v.square", "v.normed", "x"),
    )
    tower = Tower(_PIXELS, before, (Run((_scaled_block(m, wiring),), "vL1"),), after)
    return text_with_tower(wiring, _text(m, wiring), tower, scattered(joined=False), _HELD)


def cohere2_vision(m: ModelSpec, wiring: Wiring, norm: str = "") -> Stack:
    """Build Command A Vision with SigLIP's tower, or Aya Vision, which has a `norm` of merged patches."""
    n, p, merged = "vision_tower", "multi_modal_projector", f"{_MERGED} vm"
    part, half = m.part("vision_config"), f"{_MERGED} valigned2"
    if m.config.get("vision_feature_layer", -1) != -1 or part.get("vision_use_head", True):
        raise UnsupportedModelError(
            f"vision_feature_layer: {m.model_type}'s images are only supported with -1, and vision_use_head false",
            "vision_feature_layer",
        )
    act = _vision(m, "hidden_act", "gelu_pytorch_tanh")
    block = t.encoder_block(f"{n}.encoder.layers", act, wiring, t.strided_norm)
    if norm:  # the projector reads the last layer's states, by column
        last, kept = _unread_norm(n)
        states = (ops.copy("v.columns", "x", "v.states", merged),)
        rows = t.strided_norm(f"{p}.{norm}", "v.square", "v.normed", merged, "vm")
    else:
        last, kept = t.strided_norm(f"{n}.post_layernorm", "x", "v.last", _SHAPE, "vh"), ()
        states = (ops.release_names("x"), ops.view("v.columns", "v.last", "v.states", merged))
        rows = (ops.copy(f"{p}.linear_1.rows", "v.square", "v.normed", merged),)
    after = (
        *last,
        *states,
        ops.release_names("embeds"),
        ops.copy("v.shuffle", "v.states", "v.half", merged),
        ops.release_names("v.states"),
        ops.view("v.shuffled", "v.half", "v.square", merged, "new"),
        *t.grouped(rows, "projector"),
        t.linear(f"{p}.linear_1", "v.normed", "v.m1", "valigned", "vm", "projector", _MERGED),
        ops.release_names("v.half", "v.square", "v.normed"),
        ops.split(f"{p}.chunk", "v.m1", (Tensor("v.x", half), Tensor("v.gate", half))),
        ops.activation(f"{p}.act", "v.gate", "v.acted", half),
        ops.mul(f"{p}.product", "v.acted", "v.x", "v.m2", half),
        ops.release_names("v.acted"),
        t.linear(f"{p}.linear_2", "v.m2", "features", "h", "valigned2", "projector", _MERGED, flat=False),
        *t.returned_states("v.last", "features"),
        *kept,
        ops.release_names("x", "v.last", "v.m1", "v.x", "v.gate", "v.m2"),
    )
    tower = Tower(_PIXELS, t.embedded_patches(f"{n}.embeddings", _SHAPE), (Run((block,), "vL1"),), after)
    return text_with_tower(wiring, _text(m, wiring), tower, scattered(joined=False), _HELD)


def smolvlm(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Idefics 3 and SmolVLM with SigLIP's tower, whose positions are looked up for every image.

    Images that are not padding, and their masks of pixels, are copied and live until the projector returns.
    """
    n, merged = "vision_model", f"{_MERGED} vm"
    table = Weight(f"{n}.embeddings.position_embedding.weight", "vpositions vh", "vision", rows=1)
    block = t.encoder_block(
        f"{n}.encoder.layers", _vision(m, "hidden_act", "gelu_pytorch_tanh"), wiring, t.strided_norm
    )
    cast, patches = t.convolution(
        f"{n}.embeddings.patch_embedding", "pixel_values", "v.patches", _SHAPE, True, asks=False
    )
    mask = Tensor("pixel_attention_mask", f"{t.P} patch patch", "int64")
    kept = (
        Tensor("v.images", f"{t.P} vin", "=pixel_values.cast"),
        mask._replace(name="v.mask"),
        Tensor("v.patch_mask", t.P, "bool"),
        Tensor("v.is_image", "b images", "bool"),
        Tensor("v.counts", "b", "int64"),
    )
    before = (
        cast,
        Op("real_images", ("pixel_values.cast", mask.name), kept, gradient="none"),
        ops.release_names("pixel_values.cast"),
        *renamed((patches,), {"pixel_values.cast": "v.images"}),
        Op(f"{n}.embeddings.position_ids", (), (Tensor("v.ids", t.P, "int64"),), gradient="none"),
        ops.lookup(f"{n}.embeddings.position_embedding", "v.ids", "v.position", _SHAPE, table),
        ops.add(f"{n}.embeddings", "v.patches", "v.position", "embeds", _SHAPE)._replace(requires_gradient=True),
        ops.release_names("v.patches", "v.position"),
    )
    after = (
        *t.strided_norm(f"{n}.post_layernorm", "x", "v.last", _SHAPE, "vh"),
        ops.release_names("x", "embeds"),
        ops.copy("connector.rows", "v.last", "v.half", merged),
        ops.copy("connector.columns", "v.half", "v.square", merged),
        ops.release_names("v.half"),
        t.linear(
            "connector.modality_projection.proj",
            "v.square",
            "features",
            "h",
            "vm",
            "projector",
            _MERGED,
            False,
            flat=False,
        ),
        ops.release_names("v.square"),
        *t.returned_states("v.last", "features"),
        ops.release_names("v.last", *(tensor.name for tensor in kept)),
    )
    tower = Tower((*_PIXELS, mask), before, (Run((block,), "vL1"),), after)
    return text_with_tower(wiring, _text(m, wiring), tower, scattered(), _HELD)


BUILDERS = {
    "idefics3": smolvlm,
    "internvl": internvl,
    "llava": llava,
    "llava_next": llava_next,
    "llava_next_video": llava_next_video,
    "paligemma": paligemma,
    "smolvlm": smolvlm,
}
