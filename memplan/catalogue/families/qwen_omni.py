"""The thinkers of Qwen2.5-Omni and Qwen3-Omni: a vision tower and an audio encoder, of which a batch calls one or none.

The encoder cuts clips into chunks. Its convolutions read them padded to the longest; its layers see the positions of
all clips as one sequence, and attend within windows.

Source: transformers 5.24 models/qwen2_5_omni/modeling_qwen2_5_omni.py,
models/qwen3_omni_moe/modeling_qwen3_omni_moe.py.
"""

from __future__ import annotations

from memplan.catalogue.decoder.decoder import decoder
from memplan.catalogue.families.dense import QWEN_2, QWEN_3
from memplan.catalogue.families.mixtures import softmax_mixture
from memplan.catalogue.families.qwen2_vl import windowed_tower, with_mrope
from memplan.catalogue.families.qwen3_vl import (
    Mergers,
    deepstack_features,
    qwen3_tower,
    with_deepstack,
)
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import skipped
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision import towers as t
from memplan.catalogue.vision.towers import Tower
from memplan.catalogue.vision.vision import scattered, text_with_tower
from memplan.core.ir import Keep, Op, Run, Stack, Tensor, Weight
from memplan.models.model import ModelSpec

_MERGERS = Mergers("merger_list", "ln_q", ("mlp.0", "mlp.2"))
_TOWER, _GROUP = "audio_tower", "audio"
_AXES = {"vh": "uh", "va": "ua", "vd": "ud", "vd32": "ud32", "vf": "uf"}
_CONV1, _CONV2D = f"{_TOWER}.conv1", f"{_TOWER}.conv2d1"
_FIRST = {_CONV1: "uh uin 3", _CONV2D: "uc 1 3 3"}  # shapes of the first convolution's weights
_INPUTS = (
    Tensor("input_features", "b images uin uframes", "fp32"),
    Tensor("feature_attention_mask", "b images uframes", "int32"),
)
_LENGTHS = (  # of clips and of chunks, and where windows end: locals until the encoder returns
    Tensor("u.lengths", "b images", "int64"),
    Tensor("u.chunks", "b uchunks", "int64"),
    Tensor("u.ends", "b windows", "int32"),
)
_SHAPE, _CHUNKS = f"{t.P} uh", "b uchunks"


def _read(first: str, *more: Tensor) -> tuple[Op, ...]:
    """Select the frames of clips before their padding, pad chunks of them, and cast them for the `first` convolution.

    `more`: indices of positions, in addition to those that are no padding.
    """
    frames, padded = "b uheard uin", f"{_CHUNKS} uchunk uin"
    return (
        Op(
            f"{_TOWER}.frames",
            ("feature_attention_mask",),
            (Tensor("u.frames", frames, "fp32"),),
            scratch=(
                Tensor("mask", "b images uframes", "bool"),
                Tensor("places", "2 b uheard", "int64"),
            ),
            gradient="none",
        ),
        Op(f"{_TOWER}.chunks", ("u.frames",), (Tensor("u.padded", padded, "fp32"),), gradient="none"),
        Op(
            f"{_TOWER}.indices",
            (),
            (Tensor("u.valid", t.P, "int64"), *_LENGTHS, *more),
            gradient="none",
        ),
        Op(
            f"{first}.features",
            ("u.padded",),
            (Tensor("u.mel", padded, f"={first}.weight"),),
            (Weight(f"{first}.weight", _FIRST[first], _GROUP),),
            cast=True,
            gradient="none",
        ),
        ops.release_names("u.padded"),
    )


def _placed(x: str) -> tuple[Op, ...]:
    """Add the table of positions to each chunk."""
    shape = f"{_CHUNKS} urows uh"
    table = Weight(f"{_TOWER}.positional_embedding", "upositions uh", "buffer", "fp32", False)
    return (
        Op(f"{_TOWER}.place", (x,), (Tensor("u.place", "urows uh", f"={x}"),), (table,), gradient="none"),
        ops.add(f"{_TOWER}.placed", x, "u.place", "u.placed", shape),
    )


def _chosen(x: str) -> Op:
    """The positions of chunks without those of the padding, as one sequence."""
    return ops.with_constant(f"{_TOWER}.index_select", x, "u.valid", "embeds", _SHAPE, "index_select", f"={x}")


def _convolution(name: str, x: str, y: str, shape: str, weight: str) -> Op:
    w, bias = Weight(f"{name}.weight", weight, _GROUP), Weight(f"{name}.bias", weight.split(maxsplit=1)[0], _GROUP)
    keeps = (Keep(w.name, x), Keep(x, w.name), Keep(w.name, w.name), Keep(x, x))
    return Op(
        name,
        (x,),
        (Tensor(y, shape),),
        (w, bias),
        keeps,
        autocast="lower",
        product="matrix",
        source=f"{ops.DERIVATIVES}: convolution",
    )


def _layers(m: ModelSpec, wiring: Wiring, key_bias: bool) -> tuple[Run, ...]:
    """Layers of Whisper's encoder over all positions."""
    act = str(m.part("audio_config").get("activation_function", "gelu"))
    attention = (
        *(t.linear(f"self_attn.{x}_proj", "v.n1", f"v.{x}", "va vd", "vh", bias=key_bias or x != "k") for x in "qkv"),
        *t.chunked("self_attn.attention", "v.q", "v.k", "v.v", "v.o", wiring, t.WINDOW),
        t.linear("self_attn.out_proj", "v.o", "v.ao", "vh", "va vd"),
        ops.release_names("v.o", "v.n1"),
    )
    feed = (
        t.linear("fc1", "v.n2", "v.up", "vf", "vh"),
        *t.acted(act, "activation_fn", "v.up", "v.act", f"{t.P} vf"),
        t.linear("fc2", "v.act", "v.mo", "vh", "vf"),
    )
    layer = t.block(f"{_TOWER}.layers", attention, feed, norms=("self_attn_layer_norm", "final_layer_norm"))
    return (Run((layer._replace(ops=t.grouped(ops.with_axes(layer.ops, _AXES), _GROUP)),), "uL"),)


def _halving(m: ModelSpec, wiring: Wiring) -> Tower:
    """Return Qwen2.5-Omni's encoder: two convolutions halve the frames, and pairs of positions are averaged."""
    wide, narrow = f"{_CHUNKS} uchunk uh", f"{_CHUNKS} urows uh"
    halved = tuple(Tensor(f"u.{name}", "b images", "int64") for name in ("positions", "tokens"))
    before = (
        *skipped(t.grouped((ops.embedding(f"{_TOWER}.audio_bos_eos_token", "ids", "token", "2", "h"),), _GROUP)),
        *_read(_CONV1, Tensor("u.pairs", "b merged", "int64"), *halved),
        Op(
            f"{_TOWER}.mask",
            (),
            (Tensor("u.mask", f"{_CHUNKS} uchunk", "int64"),),
            scratch=(Tensor("heard", f"{_CHUNKS} uchunk", "bool"),),
            gradient="none",
        ),
        _convolution(_CONV1, "u.mel", "u.c1", wide, _FIRST[_CONV1])._replace(requires_gradient=True),
        ops.activation(f"{_TOWER}.gelu_1", "u.c1", "u.g1", wide),
        ops.with_constant(f"{_TOWER}.masked", "u.g1", "u.mask", "u.m1", wide, "mul.Tensor"),
        ops.release_names("u.c1", "u.g1"),
        _convolution(f"{_TOWER}.conv2", "u.m1", "u.c2", narrow, "uh uh 3"),
        ops.activation(f"{_TOWER}.gelu_2", "u.c2", "u.g2", narrow),
        ops.release_names("u.c2", "u.m1"),
        *_placed("u.g2"),
        ops.release_names("u.g2", "u.place"),
        ops.copy(f"{_TOWER}.rows", "u.placed", "u.rows", narrow),
        _chosen("u.rows"),
        ops.release_names("u.rows"),
    )
    half = "b merged uh"
    after = (
        Op(
            f"{_TOWER}.pool",
            ("x", "u.pairs"),
            (Tensor("u.pooled", half, "=x"), Tensor("u.seconds", "b merged", "int64")),
            (),
            (Keep("u.pairs", "x"), Keep("u.seconds", "x")),
            scratch=(Tensor("first", half, "=x"), Tensor("second", half, "=x")),
            source=f"{ops.DERIVATIVES}: index.Tensor",
        ),
        *t.norm(f"{_TOWER}.ln_post", "u.pooled", "u.normed", half, "uh", _GROUP),
        t.linear(f"{_TOWER}.proj", "u.normed", "features", "h", "uh", _GROUP, "b merged"),
        ops.release_names("x", "u.pooled", "u.normed", "u.valid", "u.pairs", "u.mel", "u.mask", "u.placed"),
        ops.release_names("u.frames", *(x.name for x in (*_LENGTHS, *halved))),
    )
    return Tower(_INPUTS, before, _layers(m, wiring, key_bias=False), after)


def _eighths(m: ModelSpec, wiring: Wiring) -> Tower:
    """Return Qwen3-Omni's encoder: three convolutions halve frames and bands, and a linear layer joins the bands."""
    channels = "uc uc 3 3"
    shapes = tuple(
        f"{_CHUNKS} uc {bands} {frames}"
        for bands, frames in (("umel1", "uhalf"), ("umel2", "uquarter"), ("umel3", "urows"))
    )
    act = str(m.part("audio_config").get("activation_function", "gelu"))
    convolved = tuple(
        op
        for i, shape in enumerate(shapes, 1)
        for op in (
            _convolution(
                f"{_TOWER}.conv2d{i}",
                f"u.g{i - 1}" if i > 1 else "u.mel",
                f"u.c{i}",
                shape,
                channels if i > 1 else _FIRST[_CONV2D],
            )._replace(requires_gradient=i == 1),
            ops.activation(f"{_TOWER}.gelu_{i}", f"u.c{i}", f"u.g{i}", shape),
            ops.release_names(f"u.c{i}"),
        )
    )
    rows = f"{_CHUNKS} urows"
    before = (
        *_read(_CONV2D),
        *convolved,
        ops.copy(f"{_TOWER}.cat", "u.g3", "u.all", shapes[-1]),
        ops.copy(f"{_TOWER}.contiguous", "u.all", "u.bands", f"{rows} uflat"),
        t.linear(f"{_TOWER}.conv_out", "u.bands", "u.out", "uh", "uflat", _GROUP, rows, False, False),
        ops.release_names("u.all", "u.bands"),
        *_placed("u.out"),
        ops.release_names("u.out"),
        _chosen("u.placed"),
    )
    after = (
        *t.norm(f"{_TOWER}.ln_post", "x", "u.normed", _SHAPE, "uh", _GROUP),
        ops.release_names("x"),
        t.linear(f"{_TOWER}.proj1", "u.normed", "u.p1", "uh", "uh", _GROUP),
        ops.release_names("u.normed"),
        *t.acted(act, f"{_TOWER}.act", "u.p1", "u.p2", _SHAPE),
        ops.release_names("u.p1"),
        t.linear(f"{_TOWER}.proj2", "u.p2", "features", "h", "uh", _GROUP),
        ops.release_names("u.p2", "u.valid", "u.mel", "u.g3", "u.place", "u.placed", "u.frames"),
        ops.release_names(*(x.name for x in _LENGTHS)),
    )
    return Tower(_INPUTS, before, _layers(m, wiring, key_bias=True), after)


def qwen2_5_omni(m: ModelSpec, wiring: Wiring) -> Stack:
    text = with_mrope(decoder(m, wiring, QWEN_2), _placed_by(wiring))
    return _with_towers(wiring, text, _halving(m, wiring), windowed_tower(m, wiring, is_joint=False))


def qwen3_omni(m: ModelSpec, wiring: Wiring) -> Stack:
    sees = wiring.images and not wiring.hears
    row = QWEN_3._replace(mlp_bias=False, experts=softmax_mixture)
    text = with_mrope(decoder(m, wiring, row), _placed_by(wiring), interleaved=True)
    eyes, deep = qwen3_tower(m, wiring, _MERGERS), deepstack_features(m)
    text = with_deepstack(m, text) if sees else text
    return _with_towers(wiring, text, _eighths(m, wiring), eyes, deep if sees else ())


def _placed_by(wiring: Wiring) -> Wiring:
    """Return the wiring of positions: those of images are computed only if there is a mask of padding."""
    return wiring._replace(images=wiring.images and wiring.padded and not wiring.hears)


def _with_towers(wiring: Wiring, text: Stack, ears: Tower, eyes: Tower, deep: tuple[Op, ...] = ()) -> Stack:
    """Return the text's stack with the tower that the batch calls, and the weights of the other.

    `deep`: operations on features of images that are also added to the language model's layers.
    """
    resting = wiring._replace(images=False)
    eyes = eyes._replace(inputs=tuple(x for x in eyes.inputs if x.name != "mm_token_type_ids"))
    if not wiring.images:
        return text_with_tower(resting, text_with_tower(resting, text, eyes), ears)
    called, other = (ears, eyes) if wiring.hears else (eyes, ears)
    other_mask = Op("other_mask", (), (Tensor("other_mask", "b s", "bool"),))  # a local of the frame, never read
    held = ("image_embeds", "image_mask", "other_mask", *(w.name for op in deep for w in op.writes))
    if wiring.media == "video":  # the model returns images' states, and only its frame holds a video's
        returned = [op for op in called.after if op.holds == "forward"]
        held = (*held, *(w.name for op in returned for w in op.writes))
        called = called._replace(after=tuple(op._replace(holds="") if op in returned else op for op in called.after))
    scatter = (other_mask, *scattered(joined=not wiring.hears), *deep)
    return text_with_tower(resting, text_with_tower(wiring, text, called, scatter, held), other)


BUILDERS = {"qwen2_5_omni_thinker": qwen2_5_omni, "qwen3_omni_moe_thinker": qwen3_omni}
