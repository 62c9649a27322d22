"""GLM-4.1V, GLM-4.6V Flash and GLM-OCR: GLM-4's text model with M-RoPE, and a tower that ends with a convolution.

Source: transformers 5.24 models/glm4v/modeling_glm4v.py, glm46v/modeling_glm46v.py, glm_ocr/modeling_glm_ocr.py.
"""

from __future__ import annotations

from memplan.catalogue.decoder.decoder import Decoder, decoder
from memplan.catalogue.decoder.mlp import fused_mlp
from memplan.catalogue.decoder.rotation import attend_heads_first, partial_rope
from memplan.catalogue.families.dense import GLM_NORMS
from memplan.catalogue.families.qwen2_vl import qwen_attention, qwen_before, qwen_inputs, with_mrope
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision import towers as t
from memplan.catalogue.vision.towers import Tower
from memplan.catalogue.vision.vision import scattered, text_with_tower
from memplan.core.ir import Keep, Op, Run, Stack, Tensor, Weight
from memplan.models.model import ModelSpec

_LEAD, _GROUP = "b merged", "projector"


def _merged() -> tuple[Op, ...]:
    """Return the features: a convolution over each square of patches, a norm with a GELU, and a gated MLP."""
    n, down = "visual.merger", "visual.downsample"
    w, bias = Weight(f"{down}.weight", "h vm", "vision"), Weight(f"{down}.bias", "h", "vision")

    def linear(name: str, x: str, y: str, out: str, into: str) -> Op:
        return t.linear(f"{n}.{name}", x, y, out, into, _GROUP, _LEAD, bias=False)

    wide = f"{_LEAD} vcontext"
    return (
        *t.rms_norm("visual.post_layernorm", "x", "v.normed", f"{t.P} vh", "vh"),
        ops.view(f"{down}.squares", "v.normed", "v.squares", f"{_LEAD} vm"),
        Op(
            down,
            ("v.squares",),
            (Tensor("v.down", f"{_LEAD} h"),),
            (w, bias),
            tuple(Keep(what, of) for of in ("v.squares", w.name) for what in ("v.squares", w.name)),
            autocast="lower",
            product="matrix",
            source=f"{ops.DERIVATIVES}: convolution",
        ),
        ops.release_names("v.normed", "v.squares"),
        linear("proj", "v.down", "v.projected", "h", "h"),
        *t.norm(f"{n}.post_projection_norm", "v.projected", "v.merged", f"{_LEAD} h", "h", _GROUP),
        ops.release_names("v.projected"),
        ops.activation(f"{n}.act1", "v.merged", "v.acted", f"{_LEAD} h"),
        ops.release_names("v.merged"),
        linear("gate_proj", "v.acted", "v.gate", "vcontext", "h"),
        ops.activation(f"{n}.act_fn", "v.gate", "v.act", wide),
        linear("up_proj", "v.acted", "v.up", "vcontext", "h"),
        ops.mul(f"{n}.product", "v.act", "v.up", "v.product", wide),
        linear("down_proj", "v.product", "features", "h", "vcontext"),
        ops.release_names("v.acted", "x"),
    )


def _placed() -> tuple[Op, ...]:
    """Return GLM-4.1V's embeddings: patches, normalised, plus positions interpolated from a learned grid in fp32.

    Source: Glm4vVisionEmbeddings; torch 2.13 aten/src/ATen/native/cuda/GridSampler.cu.
    """
    shape, grid, n = f"{t.P} vh", "vh vpositions", "visual.embeddings"
    table = Weight(f"{n}.position_embedding.weight", "vpositions vh", "vision", rows=1)
    number, share = (Tensor("positions", t.P, dtype) for dtype in ("int64", "fp32"))
    return (
        Op(f"{n}.cast_table", (), (Tensor("v.grid", grid, "fp32"),), (table,), cast=True),
        Op(
            f"{n}.sequences",
            (),
            (Tensor("v.sequence", t.P, "int64"),),
            scratch=(number, Tensor("before", f"images {t.P}", "bool")),
        ),
        Op(f"{n}.heights", ("v.sequence",), (Tensor("v.heights", t.P, "fp32"),), scratch=(number,)),
        Op(f"{n}.widths", ("v.sequence",), (Tensor("v.widths", t.P, "fp32"),), scratch=(number,)),
        Op(f"{n}.across", ("v.widths",), (Tensor("v.across", t.P, "fp32"),), scratch=(share, share)),
        Op(f"{n}.down", ("v.heights",), (Tensor("v.down_to", t.P, "fp32"),), scratch=(share, share)),
        ops.cat(f"{n}.stack", ("v.across", "v.down_to"), "v.places", f"{t.P} 2"),
        Op(
            f"{n}.sample",
            ("v.grid", "v.places"),
            (Tensor("v.sampled", shape, "fp32"),),
            (),
            (Keep("v.grid", "v.grid"), Keep("v.places", "v.grid")),
            source=f"{ops.DERIVATIVES}: grid_sampler_2d",
        ),
        ops.cast(f"{n}.cast", "v.sampled", "v.place", shape, f"={table.name}"),
        ops.add(n, "v.patches", "v.place", "embeds", shape),
        ops.release_names(
            *("v.grid", "v.sequence", "v.heights", "v.widths", "v.across", "v.down_to", "v.places", "v.sampled"),
            *("v.place", "v.patches"),
        ),
    )


def _build(m: ModelSpec, wiring: Wiring, attention: tuple[Op, ...], feed: tuple[Op, ...], text: Decoder) -> Stack:
    first, pixels, patches, *table = qwen_before(asks=False, bias=True)
    if "vpositions" in m.axes():
        patches = patches._replace(writes=(patches.writes[0]._replace(name="v.raw"),))
        normed = t.rms_norm("visual.post_conv_layernorm", "v.raw", "v.patches", f"{t.P} vh", "vh")
        table = [*normed, ops.release_names("v.raw"), *table, *_placed()]
    block = t.block("visual.blocks", attention, feed, t.rms_norm)
    returned = tuple(
        ops.view(f"image_outputs.{name}", name, f"{name}.returned", f"{_LEAD} h")._replace(holds="forward")
        for name in ("v.down", "features")
    )
    after = (
        *_merged(),
        *returned,
        ops.release_names("v.down", "v.positions", "v.cos", "v.sin", "pixel_values.cast"),
    )
    tower = Tower(qwen_inputs(), (first, pixels, patches, *table), (Run((block,), "vL1"),), after)
    decoder_stack = with_mrope(decoder(m, wiring, text), wiring)
    return text_with_tower(wiring, decoder_stack, tower, scattered(), ("image_embeds", "image_mask"))


def glm4v(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build GLM-4.1V, whose tower's only biases are those of q, k and v, if the config asks for them."""
    attention = qwen_attention(wiring, bias=_biased(m, False), out_bias=False)
    return _build(m, wiring, attention, t.gated_mlp("mlp", "v.n2", "v.mo", bias=False), _TEXT._replace(bias=True))


def glm_ocr(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build GLM-OCR, whose tower normalises q and k, and embeds no positions."""
    bias = _biased(m, True)
    attention = qwen_attention(wiring, bias=bias, out_bias=bias, norm=t.rms_norm)
    return _build(m, wiring, attention, t.gated_mlp("mlp", "v.n2", "v.mo", bias=bias), _TEXT)


def _biased(m: ModelSpec, default: bool) -> bool:
    return bool(m.part("vision_config").get("attention_bias", default))


_TEXT = Decoder(rotate=partial_rope, attend=attend_heads_first, mlp=fused_mlp, norms=GLM_NORMS)

BUILDERS = {"glm46v": glm4v, "glm4v": glm4v, "glm_ocr": glm_ocr}
