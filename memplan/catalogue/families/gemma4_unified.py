"""The unified Gemma 4: no towers, but layers that embed the patches of an image or the samples of a clip.

Source: transformers 5.24 models/gemma4_unified/modeling_gemma4_unified.py.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import mask_name
from memplan.catalogue.families.gemma4 import gemma4, rms_norm
from memplan.catalogue.families.padded_images import selected, selected_by
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision import towers as t
from memplan.catalogue.vision.towers import Tower
from memplan.catalogue.vision.uncalled_towers import unified_embedders
from memplan.catalogue.vision.vision import masked_text, outlived, scattered, text_with_tower
from memplan.core.ir import Op, Stack, Tensor, Weight
from memplan.models.model import ModelSpec

_SOURCE = "transformers 5.24 models/gemma4_unified/modeling_gemma4_unified.py"
_LEAD = "b images grid"
_SHAPE = f"{_LEAD} vh"
_FEATURES = "b merged h"


def _positions(name: str) -> tuple[Op, ...]:
    """The sum of the embeddings of each patch's column and row, of which those of padding are zero."""
    table, pairs = Weight(f"{name}.pos_embedding", "vpositions 2 vh", "vision", rows=2), f"{_LEAD} 2 vh"
    places, valid = Tensor("v.places", f"{_LEAD} 2", "int64"), Tensor("v.valid", f"{_LEAD} 2", "=v.pairs")
    return (
        Op(f"{name}.clamp", (), (places,), gradient="none"),
        ops.lookup(f"{name}.pos_embedding", places.name, "v.pairs", pairs, table, "index"),
        Op(f"{name}.valid", ("v.pairs",), (valid,), gradient="none"),
        ops.with_constant(f"{name}.pos_embedding.valid", "v.pairs", valid.name, "v.known", pairs, "mul.Tensor"),
        ops.release_names("v.pairs"),
        Op(
            f"{name}.sum",
            ("v.known",),
            (Tensor("v.position", _SHAPE),),
            gradient="view",
            source=f"{ops.DERIVATIVES}: sum",
        ),
        ops.release_names("v.known"),
    )


def _seen(m: ModelSpec) -> Tower:
    """The layers that embed pixels, from `pixel_values` to `features`."""
    n, projector = "model.embed_vision", "model.embed_vision.multimodal_embedder"
    dense = t.linear(f"{n}.patch_dense", "v.n1", "v.dense", "vh", "vin", lead=_LEAD, flat=False)
    features = (
        # to the dtype of the dense layer, unless it is quantised: then peft has made the norm fp32
        ops.cast(f"{n}.to", "pixel_values", "v.pixels", f"{_LEAD} vin", f"={n}.patch_ln1.weight"),
        *t.norm(f"{n}.patch_ln1", "v.pixels", "v.n1", f"{_LEAD} vin", "vin"),
        dense,
        ops.release_names("v.n1"),
        *t.norm(f"{n}.patch_ln2", "v.dense", "v.n2", _SHAPE, "vh"),
        ops.release_names("v.dense"),
        *_positions(n),
        ops.add(f"{n}.add", "v.n2", "v.position", "v.sum", _SHAPE),
        ops.release_names("v.n2"),
        *t.norm(f"{n}.pos_norm", "v.sum", "v.last", _SHAPE, "vh"),
        ops.release_names("v.sum"),
        *rms_norm(f"{projector}.norm", "v.last", "v.normed", _SHAPE, "vh", affine=False),
        t.linear(
            f"{projector}.embedding_projection", "v.normed", "v.projected", "h", "vo", "projector", _LEAD, False, False
        ),
        ops.release_names("v.normed", "v.places", "v.valid", "v.position", "v.pixels"),
        *selected("image_features", "v.projected", _LEAD, "features", _FEATURES),
        ops.release_names("v.projected"),
        ops.view("image_outputs.last", "v.last", "v.returned", _SHAPE)._replace(holds="forward"),
        ops.view("image_outputs.pooled", "features", "features.returned", _FEATURES)._replace(holds="forward"),
        ops.release_names("v.last"),
    )
    inputs = (
        Tensor("pixel_values", f"{_LEAD} vin", "fp32"),
        Tensor("image_position_ids", f"{_LEAD} 2", "int64"),
        Tensor("mm_token_type_ids", "b s", "int64"),
    )
    return Tower(inputs, (), (), features)


def _heard() -> Tower:
    """The layer that embeds samples, from `input_features` to `features`."""
    n, wide = "model.embed_audio", f"{_LEAD} uo"
    project = t.linear(f"{n}.embedding_projection", "v.normed", "v.projected", "h", "uo", "audio", _LEAD, False, False)
    features = (
        # to the dtype of the layer, unless it is quantised: then peft has made the embeddings fp32
        ops.cast(f"{n}.to", "input_features", "v.sound", wide, "=model.embed_tokens.weight"),
        *rms_norm(f"{n}.embedding_pre_projection_norm", "v.sound", "v.normed", wide, "uo", affine=False),
        project,
        ops.release_names("v.sound", "v.normed"),
        selected_by("input_features_mask", "audio_features", "v.projected", "features", _FEATURES),
    )
    inputs = (
        Tensor("input_features", wide, "fp32"),
        Tensor("input_features_mask", _LEAD, "bool"),
        Tensor("mm_token_type_ids", "b s", "int64"),
    )
    return Tower(inputs, (), (), features)


_MASKS = tuple(map(mask_name, (False, True)))


def _with_numbers(mask: Op) -> Op:
    """Return a mask with the image numbers of all keys, which are those of a cached token's, padded.

    Source: transformers 5.24 masking_utils.py maybe_pad_block_sequence_ids, blockwise_overlay.
    """
    numbers = (Tensor(name, "b s s", "int64") for name in ("padded numbers", "numbers of keys"))
    places = (Tensor(f"place {axis}", axis, "int64") for axis in ("b", "", "s", "s s"))  # batch, head, query, key
    query = (Tensor("number of query", "b s", "int64"), Tensor("is of image", "b s", "bool"))
    more = (*numbers, *places, *query, Tensor("same image", "b s s", "bool"))
    return mask._replace(scratch=(*mask.scratch, *more))


def unified(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build the unified model: no per-layer embeddings, embedders in place of towers, and masks.

    Masks are made even of a text without padding, from the number of each token's image, unless images are read as text
    is.
    """
    masked = m.config.get("use_bidirectional_attention", "vision") == "vision"
    text = masked_text(masked, wiring, lambda masked: gemma4(m, masked, is_multimodal=True))
    if masked:
        blocks = Tensor("blocks", "b s", "int64")
        made = Op(
            "model.block_sequence_ids", (), (blocks,), gradient="none", source=f"{_SOURCE} Gemma4UnifiedModel.forward"
        )
        if wiring.decodes:
            before = tuple(_with_numbers(op) if op.name in _MASKS else op for op in text.before)
            text = text._replace(before=before)
        at = 1
        if wiring.images:
            at += next(i for i, op in enumerate(text.before) if any(w.name == "embeds" for w in op.writes))
        after = outlived(text.after, (blocks.name,))
        text = text._replace(before=(*text.before[:at], made, *text.before[at:]), after=after)
    if not wiring.images:
        return unified_embedders(m, text)
    held = ("image_embeds", "image_tokens", *(("v.projected",) if wiring.hears else ()))
    tower, scatter = _heard() if wiring.hears else _seen(m), scattered(joined=not wiring.hears, checks=True)
    called = "audio_config" if wiring.hears else "vision_config"
    return unified_embedders(m, text_with_tower(wiring, text, tower, scatter, held), called)


BUILDERS = {"gemma4_unified": unified}
