"""Qwen2-Audio and Voxtral: Whisper's encoder over windows of audio, a projector, and any decoder.

Source: transformers 5.24 models/qwen2_audio, models/voxtral.
"""

from __future__ import annotations

from memplan.catalogue.decoder.decoder import stack_of
from memplan.catalogue.decoder.frame import masks
from memplan.catalogue.families.whisper import convolution, encoder_block, encoder_of
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.losses import cross_entropy
from memplan.catalogue.kernels.rewriting import renamed
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision import towers as t
from memplan.catalogue.vision.towers import Tower
from memplan.catalogue.vision.vision import scattered, text_with_tower
from memplan.core.ir import Block, Keep, Op, Run, Scratch, Stack, Tensor, Weight
from memplan.models.configs import family
from memplan.models.model import ModelSpec

# Axes of Whisper's encoder -> axes of this tower.
_AXES = {
    "b": "b images",
    "s": "grid",
    **{f"s{n}": f"grid{n}" for n in ("8", "32", "128", "_uneven")},
    "h": "uh",
    "a": "va",
    "k": "va",
    "d": "vd",
    "d32": "vd32",
    "f": "uf",
    "mel": "uin",
    "frames": "2 grid",
    "efficient_workspace": "batched_workspace",
    "efficient_fp32": "tower_fp32",
}
_NAMES = {"mask": "v.mask", "o.lse": "v.o.lse"}
_TOWER, _PROJECTOR = "model.audio_tower", "multi_modal_projector"
_SHAPE = "b images grid uh"
_HELD = ("image_embeds", "image_mask")


def _here(operations: tuple[Op, ...]) -> tuple[Op, ...]:
    """Return operations of Whisper's encoder as the tower's."""
    own = renamed(t.grouped(ops.with_axes(operations, _AXES), "audio"), _NAMES)
    whole = {"whole attention": "whole attention over grid"}
    return tuple(op._replace(product=whole.get(op.product, op.product)) for op in own)


def _before(masked: tuple[Op, ...], wide_positions: bool) -> tuple[Op, ...]:
    """The convolutions and positions of the encoder. The table of positions never trains.

    `wide_positions`: the table is in fp32, and the sum is cast back.
    """
    first, second = f"{_TOWER}.conv1", f"{_TOWER}.conv2"
    w, w2 = Weight(f"{first}.weight", "h mel 3", "embedding"), Weight(f"{second}.weight", "h h 3", "embedding")
    dtype = "fp32" if wide_positions else ""
    table = Weight(f"{_TOWER}.embed_positions.weight", "upositions uh", "audio", trains=False, dtype=dtype)
    total = "v.wide" if wide_positions else "embeds"
    mel = Tensor("v.mel", "b mel frames", f"={w.name}")
    convolutions = (
        *masked,
        Op(f"{first}.features", ("input_features",), (mel,), (w,), cast=True, gradient="none"),
        convolution(first, "v.mel", "v.c1", "b frames h", w)._replace(requires_gradient=True),
        ops.activation(f"{_TOWER}.gelu_1", "v.c1", "v.g1", "b frames h"),
        convolution(second, "v.g1", "v.c2", "b s h", w2),
        ops.activation(f"{_TOWER}.gelu_2", "v.c2", "v.g2", "b s h"),
    )
    return (
        *_here(convolutions),
        ops.release_names("v.c1", "v.g1", "v.c2"),
        ops.add_weight(f"{_TOWER}.embed_positions", "v.g2", total, _SHAPE, table),
        *((ops.cast(f"{_TOWER}.to", total, "embeds", _SHAPE, "=v.g2"),) if wide_positions else ()),
        ops.release_names(*((total,) if wide_positions else ())),
    )


def _listening(
    m: ModelSpec,
    wiring: Wiring,
    after: tuple[Op, ...],
    scatter: tuple[Op, ...],
    held: tuple[str, ...] = (),
    more: tuple[Tensor, ...] = (),
    is_pooled: bool = False,
) -> Stack:
    """Return the encoder, operations from its output `x` to `features`, and the decoder that they are scattered in.

    `is_pooled`: its states are averaged in pairs, and masked if clips are shorter than a window; else its table of
    positions is in fp32.
    """
    own = Wiring(
        wiring.tower or "flash",
        "eager" if wiring.tower == "eager" else "efficient",
        padded=wiring.pads_tower,
        causal=False,
        records=wiring.records,
    )
    block = encoder_block(encoder_of(m), own)
    layer = _here(block.ops) if not is_pooled else tuple(map(_flattening, _here(block.ops)))
    features = Tensor("input_features", "b images uin 2 grid", "fp32")
    tower = Tower(
        (features, *more),
        (
            *((Op(f"{_TOWER}.lengths", (), _LENGTHS, gradient="none"),) if is_pooled else ()),
            *_before(masks(own, "text"), not is_pooled),
        ),
        (Run((Block(f"{_TOWER}.layers", layer),), "uL"),),
        (*after, ops.release_names("v.mel", "v.g2")),
    )
    text = stack_of(m, wiring, family(m.family.wraps).stack, m.family.wraps)
    return text_with_tower(wiring, text, tower, scatter, (*_HELD, *held))


# What Qwen2AudioModel.forward holds of the clips' lengths until it returns.
_LENGTHS = (
    Tensor("v.lengths", "b images", "int64"),
    Tensor("v.tokens", "b images", "int64"),
    Tensor("v.places", "grid", "int64"),
    Tensor("v.silent", "b images grid", "bool"),
    Tensor("v.loud", "b images grid", "int64"),
    Tensor("v.dummy", "b images grid", "=text"),
)


def _flattening(op: Op) -> Op:
    """Return a branch's output with a copy of its gradient, which comes by column, as the pooled states."""
    return op._replace(gradient="new") if op.name in ("self_attn.dropout", "dropout") and op.view else op


def qwen2_audio(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Qwen2-Audio, whose class never casts the logits, and copies all but the last unless that is a view."""
    pooled = "b images pooled"
    after = (
        Op(
            f"{_TOWER}.avg_pooler",
            ("x",),
            (Tensor("v.pooled", f"{pooled} uh"),),
            (),
            (Keep("x", "x"),),
            source=f"{ops.DERIVATIVES}: avg_pool2d",
        ),
        ops.layer_norm(f"{_TOWER}.layer_norm", "v.pooled", "v.encoded", f"{pooled} uh", "uh", group="audio"),
        ops.release_names("x", "v.pooled"),
        t.linear(f"{_PROJECTOR}.linear", "v.encoded", "v.projected", "h", "uh", "projector", pooled, flat=False),
        Op(
            "audio_features_mask",
            (),
            (Tensor("v.heard", pooled, "bool"),),
            gradient="none",
        ),
        Op(
            "audio_features",
            ("v.projected", "v.heard"),
            (Tensor("features", "b merged h", "=v.projected"),),
            (),
            (Keep("v.heard", "v.projected"),),
            scratch=(Tensor("positions", "2 b merged", "int64"),),
            scratch_back=(Scratch(Tensor("positions", "2 b merged", "int64")),),
            source=f"{ops.DERIVATIVES}: index.Tensor",
        ),
        ops.release_names("v.projected"),
    )
    mask = Tensor("feature_attention_mask", "b images 2 grid", "int32")
    held = ("v.encoded", "v.heard", *(t.name for t in _LENGTHS), *(("v.mask",) if wiring.pads_tower else ()))
    stack = _listening(m, wiring, after, scattered(joined=False), held, (mask,), True)
    single = wiring.is_single_sequence and not wiring.padded
    return stack._replace(loss=cross_entropy("logits", "half", single))


def voxtral(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Voxtral, which joins positions of the encoder's output until they are as wide as its FFN."""
    p, lead = _PROJECTOR, "b merged"
    after = (
        ops.layer_norm(f"{_TOWER}.layer_norm", "x", "v.encoded", _SHAPE, "uh", group="audio"),
        ops.release_names("x"),
        t.linear(f"{p}.linear_1", "v.encoded", "v.m1", "h", "uf", "projector", lead, False),
        *t.acted(str(m.get("projector_hidden_act", "gelu")), f"{p}.act", "v.m1", "v.m2", f"{lead} h"),
        ops.release_names("v.m1"),
        t.linear(f"{p}.linear_2", "v.m2", "features", "h", "h", "projector", lead, False),
        ops.release_names("v.m2", "v.encoded"),
        ops.view("audio_hidden_states", "features", "features.returned", f"{lead} h")._replace(holds="forward"),
    )
    return _listening(m, wiring, after, scattered(joined=False))


BUILDERS = {"qwen2_audio": qwen2_audio, "voxtral": voxtral}
