"""Gemma 4's audio encoder: convolutions, and conformer layers whose attention is computed chunk by chunk in fp32.

Source: transformers 5.24 models/gemma4/modeling_gemma4.py.
"""

from __future__ import annotations

from memplan.catalogue.families.gemma4 import rms_norm
from memplan.catalogue.families.gemma4_vision import clipped
from memplan.catalogue.families.padded_images import selected_by
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision import towers as t
from memplan.catalogue.vision.towers import Tower
from memplan.core.ir import Block, Keep, Op, Run, Scratch, Tensor, Weight
from memplan.models.model import ModelSpec

_TOWER, _PROJECTOR, _GROUP = "model.audio_tower", "model.embed_audio", "audio"
_LEAD, _CHUNKS = "b images grid", "b images uchunks"
_SHAPE, _PADDED = f"{_LEAD} uh", f"{_CHUNKS} uchunk uh"
_CONTEXT, _SCORES = f"{_CHUNKS} ucontext uh", f"{_CHUNKS} uchunk ua ucontext"
_ATEN = "torch 2.13 aten/src/ATen/native"


def _norm(name: str, x: str, y: str) -> tuple[Op, ...]:
    return t.grouped(rms_norm(name, x, y, _SHAPE, "uh"), _GROUP)


def _clamp(name: str, x: str, y: str) -> Op:
    return ops.clamp(name, x, y, _SHAPE, 2)._replace(writes=(Tensor(y, _SHAPE, f"={x}"),))


def _convolution(i: int, x: str, y: str, shapes: tuple[str, str]) -> tuple[Op, ...]:
    """A convolution that halves frames and bands, a norm over the channels, and relu; the mask is applied before.

    `shapes`: of its input and its output.
    """
    n = f"{_TOWER}.subsample_conv_projection.layer{i}"
    wide, shape = shapes
    w = Weight(f"{n}.conv.weight", f"uc{i} {f'uc{i - 1}' if i else 1} 3 3", _GROUP)
    norm = Weight(f"{n}.norm.weight", f"uc{i}", _GROUP)
    contiguous = Tensor("contiguous", shape, f"={y}.conv")
    row = shape.rsplit(" ", 1)[0]
    mean, rstd = Tensor(f"{y}.mean", row, "fp32"), Tensor(f"{y}.rstd", row, "fp32")
    kept = (f"{y}.conv", mean.name, rstd.name)
    return (
        ops.with_constant(f"{n}.mask", x, "input_features_mask", f"{y}.masked", wide, "mul.Tensor", f"={x}"),
        ops.cast(f"{n}.to", f"{y}.masked", f"{y}.in", wide, f"={w.name}"),
        Op(
            f"{n}.conv",
            (f"{y}.in",),
            (Tensor(f"{y}.conv", shape),),
            (w,),
            (Keep(w.name, f"{y}.in"), Keep(f"{y}.in", w.name), Keep(w.name, w.name), Keep(f"{y}.in", f"{y}.in")),
            autocast="lower",
            product="matrix",
            source=f"{ops.DERIVATIVES}: convolution",
        ),
        ops.release_names(f"{y}.masked", f"{y}.in"),
        Op(
            f"{n}.norm",
            (f"{y}.conv",),
            (Tensor(f"{y}.normed", shape, f"={y}.conv"), mean, rstd),
            (norm,),
            (*(Keep(what, f"{y}.conv") for what in (*kept, norm.name)), *(Keep(what, norm.name) for what in kept)),
            scratch=(contiguous,),
            scratch_back=(Scratch(contiguous),),
            autocast="fp32",
            source=f"{ops.DERIVATIVES}: native_layer_norm; {_ATEN}/cuda/layer_norm_kernel.cu layer_norm_cuda",
        ),
        ops.copy(f"{n}.contiguous", f"{y}.normed", f"{y}.square", shape),
        ops.release_names(f"{y}.normed"),
        ops.keeping_output(f"{n}.act", f"{y}.square", y, shape, "threshold"),
        ops.release_names(f"{y}.conv", f"{y}.square", *((x,) if i else ())),
    )


def _before(m: ModelSpec) -> tuple[Op, ...]:
    """The convolutions, sines and cosines of relative positions, and the mask of each chunk's context."""
    n = f"{_TOWER}.rel_pos_enc"
    times, half, whole = Weight(f"{n}.inv_timescales", "uh2", "buffer", "", False), "upositions uh2", "upositions uh"
    project = t.linear(
        f"{_TOWER}.subsample_conv_projection.input_proj_linear",
        "u.rows",
        "embeds",
        "uh",
        "uin",
        _GROUP,
        _LEAD,
        False,
        False,
    )
    every, frames, halved = f"{_LEAD} grid", "b images uframes umel", "b images uhalf uhalfmel uc0"
    return (
        *_convolution(0, "input_features", "u.c0", (frames, halved)),
        *_convolution(1, "u.c0", "u.c1", (halved, f"{_LEAD} uquartermel uc1")),
        ops.copy(f"{project.name}.contiguous", "u.c1", "u.rows", f"{_LEAD} uin"),
        ops.release_names("u.c1"),
        project,
        ops.release_names("u.rows"),
        Op(
            f"{n}.times",
            (),
            (Tensor("u.times", half, "fp32"),),
            (times,),
            scratch=(Tensor("positions", "upositions", "int64"),),
            gradient="none",
        ),
        Op(
            f"{n}.cat",
            (),
            (Tensor("u.wide", whole, "fp32"),),
            scratch=(Tensor("sines", half, "fp32"), Tensor("cosines", half, "fp32")),
            gradient="none",
        ),
        ops.release_names("u.times"),
        ops.cast(f"{n}.to", "u.wide", "u.positions", whole, "=embeds"),
        ops.release_names("u.wide"),
        Op(
            "audio_mask",
            (),
            (Tensor("u.every", every, "=embeds"),),
            scratch=(Tensor("near", every, "bool"),),
            gradient="none",
        ),
        Op(
            "audio_mask.blocks",
            ("u.every",),
            (Tensor("u.mask", f"{_CHUNKS} uchunk ucontext", "=embeds"),),
            scratch=(
                Tensor("padded", "b images upadded upadded", "=embeds"),
                Tensor("padded on the left", "b images upadded umargin", "=embeds"),
                Tensor("places", "uchunks ucontext", "int64"),
            ),
            gradient="none",
        ),
        ops.release_names("u.every"),
    )


def _feed_forward(name: str, x: str, y: str, act: str, clips: bool) -> tuple[Op, ...]:
    wide = f"{_LEAD} 4 uh"
    return (
        _clamp(f"{name}.clamp_input", x, f"{y}.in"),
        *_norm(f"{name}.pre_layer_norm", f"{y}.in", f"{y}.n"),
        ops.release_names(f"{y}.in"),
        *clipped(f"{name}.ffw_layer_1", f"{y}.n", f"{y}.up", "4 uh", "uh", clips, _GROUP),
        ops.release_names(f"{y}.n"),
        *t.acted(act, f"{name}.act_fn", f"{y}.up", f"{y}.act", wide),
        ops.release_names(f"{y}.up"),
        *clipped(f"{name}.ffw_layer_2", f"{y}.act", f"{y}.down", "uh", "4 uh", clips, _GROUP),
        ops.release_names(f"{y}.act"),
        _clamp(f"{name}.clamp_output", f"{y}.down", f"{y}.clamped"),
        ops.release_names(f"{y}.down"),
        *_norm(f"{name}.post_layer_norm", f"{y}.clamped", f"{y}.normed"),
        ops.release_names(f"{y}.clamped"),
        ops.scale(f"{name}.scale", f"{y}.normed", f"{y}.scaled", _SHAPE)._replace(view=True),
        ops.add(f"{name}.add", f"{y}.scaled", x, y, _SHAPE)._replace(view=True),
    )


def _attention(clips: bool, name: str = "self_attn") -> tuple[Op, ...]:
    """Attention of each chunk to its context, from `u.n` to `u.ao`: scores of contents and of relative positions."""

    def projected(n: str) -> tuple[Op, ...]:
        return (
            *clipped(f"{name}.{n}_proj", "u.n", f"u.{n}0", "uh", "uh", clips, _GROUP),
            ops.cast(f"{name}.{n}.float", f"u.{n}0", f"u.{n}1", _SHAPE, "fp32"),
            ops.release_names(f"u.{n}0"),
        )

    def context(n: str, x: str) -> tuple[Op, ...]:
        return (
            ops.copy(f"{name}.pad_{n}", x, f"u.{n}.padded", "b images ureach uh", gradient="new"),
            ops.copy(f"{name}.context_{n}", f"u.{n}.padded", f"u.{n}.context", _CONTEXT, gradient="new"),
            ops.release_names(x, f"u.{n}.padded"),
        )

    def flat(n: str, x: str, shape: str) -> tuple[Op, ...]:
        """A copy that a product needs of heads that are not contiguous."""
        return (
            ops.lowered(f"{name}.{n}", x, f"u.{n}.low", shape),
            ops.copy(f"{name}.{n}_flat", f"u.{n}.low", f"u.{n}.flat", shape),
        )

    scale = Weight(f"{name}.per_dim_scale", "ud", _GROUP)
    cap = Weight(f"{name}.softcap", "", "buffer", "fp32", False)
    relative = t.linear(
        f"{name}.relative_k_proj", "u.positions", "u.r0", "uh", "uh", _GROUP, "upositions", False, False
    )
    places, wide = "b images uchunks ua uchunk upositions", "b images uchunks ua uchunk ucontext1"

    def capped(of: str, x: str, y: str) -> Op:
        return Op(f"{name}.{of}", (x,), (Tensor(y, _SCORES, f"={x}"),), (cap,), (Keep(cap.name, x),))

    return (
        *projected("q"),
        *projected("k"),
        *projected("v"),
        ops.scale(f"{name}.q_scale", "u.q1", "u.q2", _SHAPE),
        Op(
            f"{name}.softplus",
            (),
            (Tensor("u.dims", "ud", f"={scale.name}"),),
            (scale,),
            (Keep(scale.name, scale.name),),
        ),
        ops.spread(f"{name}.per_dim", "u.q2", "u.dims", "u.q3", _SHAPE),
        ops.release_names("u.q1", "u.q2", "u.dims"),
        ops.scale(f"{name}.k_scale", "u.k1", "u.k2", _SHAPE),
        ops.release_names("u.k1"),
        ops.copy(f"{name}.blocks", "u.q3", "u.q", _PADDED, gradient="new"),
        ops.release_names("u.q3"),
        *context("k", "u.k2"),
        *context("v", "u.v1"),
        relative,
        ops.cast(f"{name}.relative.float", "u.r0", "u.r", "upositions uh", "fp32"),
        ops.release_names("u.r0"),
        *flat("q", "u.q", _PADDED),
        *flat("k", "u.k.context", _CONTEXT),
        ops.matmul(f"{name}.contents", "u.q.flat", "u.k.flat", "u.ac", _SCORES),
        ops.release_names("u.q.low", "u.q.flat", "u.k.low", "u.k.flat"),
        *flat("queries", "u.q", _PADDED),
        ops.copy(f"{name}.relative_flat", "u.r", "u.r.flat", "b images upositions uh", gradient="new"),
        ops.matmul(f"{name}.places", "u.queries.flat", "u.r.flat", "u.bd", places),
        ops.release_names("u.queries.low", "u.queries.flat", "u.r.flat"),
        ops.copy(f"{name}.shift", "u.bd", "u.shifted", wide, gradient="new"),
        ops.release_names("u.bd"),
        ops.add(f"{name}.sum", "u.ac", "u.shifted", "u.sum", _SCORES),
        capped("divide", "u.sum", "u.divided"),
        ops.release_names("u.sum"),
        ops.keeping_output(f"{name}.tanh", "u.divided", "u.tanh", _SCORES, "tanh"),
        ops.release_names("u.divided"),
        capped("multiply", "u.tanh", "u.capped"),
        ops.release_names("u.tanh"),
        Op(f"{name}.masked", ("u.mask",), (Tensor("u.hidden", f"{_CHUNKS} uchunk ucontext", "bool"),), gradient="none"),
        ops.masked_fill(f"{name}.fill", "u.capped", "u.hidden", "u.filled", _SCORES),
        ops.release_names("u.capped", "u.hidden"),
        *ops.softmax(f"{name}.softmax", "u.filled", "u.probs", _SCORES, "fp32"),
        ops.release_names("u.filled"),
        *flat("v", "u.v.context", _CONTEXT),
        ops.matmul(f"{name}.product", "u.probs", "u.v.flat", "u.heads", _PADDED),
        ops.release_names("u.v.low", "u.v.flat"),
        ops.copy(f"{name}.reshape", "u.heads", "u.o", _PADDED),
        ops.release_names("u.heads"),
        ops.copy(f"{name}.cut", "u.o", "u.cut", _SHAPE, gradient="new"),
        ops.release_names("u.o"),
        ops.cast(f"{name}.to", "u.cut", "u.small", _SHAPE, "=u.n"),
        *clipped(f"{name}.post", "u.small", "u.ao", "uh", "uh", clips, _GROUP),
        ops.release_names("u.small", "u.cut", "u.q", "u.k.context", "u.v.context", "u.r", "u.ac", "u.shifted", "u.n"),
    )


def _light_convolution(x: str, y: str, act: str, clips: bool, name: str = "lconv1d") -> tuple[Op, ...]:
    """A gated linear layer, a convolution over time of each channel by itself, and a linear layer."""
    kernel = Weight(f"{name}.depthwise_conv1d.weight", "uh 1 ukernel", _GROUP)
    return (
        *_norm(f"{name}.pre_layer_norm", x, "u.l1"),
        *clipped(f"{name}.linear_start", "u.l1", "u.l2", "2 uh", "uh", clips, _GROUP),
        ops.release_names("u.l1"),
        Op(f"{name}.glu", ("u.l2",), (Tensor("u.l3", _SHAPE, "=u.l2"),), (), (Keep("u.l2", "u.l2"),), source="glu"),
        ops.release_names("u.l2"),
        ops.copy(f"{name}.pad", "u.l3", "u.l4", "b images ulong uh", gradient="new"),
        Op(
            f"{name}.depthwise_conv1d",
            ("u.l4",),
            (Tensor("u.l5", _SHAPE),),
            (kernel,),
            (
                Keep(kernel.name, "u.l4"),
                Keep("u.l4", kernel.name),
                Keep(kernel.name, kernel.name),
                Keep("u.l4", "u.l4"),
            ),
            autocast="lower",
            product="matrix",
            source=f"{ops.DERIVATIVES}: convolution",
        ),
        ops.release_names("u.l3", "u.l4"),
        _clamp(f"{name}.clamp", "u.l5", "u.l6"),
        ops.release_names("u.l5"),
        *_norm(f"{name}.conv_norm", "u.l6", "u.l7"),
        ops.release_names("u.l6"),
        *t.acted(act, f"{name}.act_fn", "u.l7", "u.l8", _SHAPE),
        ops.release_names("u.l7"),
        *clipped(f"{name}.linear_end", "u.l8", "u.l9", "uh", "uh", clips, _GROUP),
        ops.release_names("u.l8"),
        ops.add(f"{name}.add", "u.l9", x, y, _SHAPE)._replace(view=True),
    )


def _block(m: ModelSpec) -> Block:
    part = m.part("audio_config")
    clips, act = bool(part.get("use_clipped_linears", True)), str(part.get("hidden_act", "silu"))
    operations = (
        *_feed_forward("feed_forward1", "x", "u.f1", act, clips),
        _clamp("clamp_1", "u.f1", "u.x1"),
        *_norm("norm_pre_attn", "u.x1", "u.n"),
        ops.release_names("u.x1"),
        *_attention(clips),
        _clamp("clamp_2", "u.ao", "u.x2"),
        ops.release_names("u.ao"),
        *_norm("norm_post_attn", "u.x2", "u.x3"),
        ops.release_names("u.x2"),
        ops.add("residual", "u.x3", "u.f1", "u.x4", _SHAPE)._replace(view=True),
        *_light_convolution("u.x4", "u.x5", act, clips),
        ops.release_names("u.x4"),
        *_feed_forward("feed_forward2", "u.x5", "u.f2", act, clips),
        ops.release_names("u.x5"),
        _clamp("clamp_3", "u.f2", "u.x6"),
        ops.release_names("u.f2"),
        *_norm("norm_out", "u.x6", "u.x7"),
        ops.view("output", "u.x7", "y", _SHAPE),
        ops.release_names("u.x6", "u.x7", "u.f1", "u.probs"),
    )
    return Block(f"{_TOWER}.layers", operations, never_checkpointed=True)


def tower_of(m: ModelSpec, wiring: Wiring) -> Tower:
    """Return the audio encoder, from `input_features` to `features`."""
    wide, merged = f"{_LEAD} uo", "b merged h"
    name = f"{_PROJECTOR}.embedding_projection"
    after = (
        t.linear(f"{_TOWER}.output_proj", "x", "u.last", "uo", "uh", _GROUP, _LEAD, True, False),
        ops.release_names("x", "u.mask", "u.positions"),
        *rms_norm(f"{_PROJECTOR}.embedding_pre_projection_norm", "u.last", "u.normed", wide, "uo", affine=False),
        t.linear(name, "u.normed", "u.projected", "h", "uo", _GROUP, _LEAD, False, False),
        ops.release_names("u.normed"),
        selected_by("input_features_mask", "audio_features", "u.projected", "features", merged),
    )
    inputs = (
        Tensor("input_features", "b images uframes umel", "fp32"),
        Tensor("input_features_mask", "b images uframes", "bool"),
        Tensor("mm_token_type_ids", "b s", "int64"),
    )
    return Tower(inputs, _before(m), (Run((_block(m),), "uL"),), after)
