"""Qwen2-VL and Qwen2.5-VL: positions in time, height and width (M-RoPE), and a tower.

The tower sees all images as one sequence of patches. Qwen3-VL shares parts of this.
"""

from __future__ import annotations

from memplan.catalogue.decoder.decoder import decoder
from memplan.catalogue.decoder.frame import Norm
from memplan.catalogue.families.dense import QWEN_2
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.positions import rotary_angles
from memplan.catalogue.kernels.rewriting import renamed
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision import towers as t
from memplan.catalogue.vision.towers import Tower
from memplan.catalogue.vision.vision import scattered, text_with_tower
from memplan.core.ir import Block, Op, Run, Stack, Tensor
from memplan.models.configs.towers import windowed_runs
from memplan.models.model import ModelSpec

_QWEN = "transformers 5.24 models/qwen2_vl/modeling_qwen2_vl.py"


# The language models' positions


def mrope_table(x: str, interleaved: bool) -> tuple[Op, ...]:
    """One table of cos and sin from the positions in time, height and width of every token of every sequence.

    `interleaved`: Qwen3-VL interleaves the three.
    """
    f, three, table_shape = "fp32", "3 b s rot2", "b s rot"
    half = () if interleaved else (Tensor("sections", "b s rot2", f),)
    return (
        rotary_angles(f"{_QWEN} Qwen2VLRotaryEmbedding", "3 b s")._replace(gradient="none"),
        Op("rotary.cos", ("angles",), (Tensor("cos3", three, f),), scratch=(Tensor("cosine", three, f),)),
        Op("rotary.sin", ("angles",), (Tensor("sin3", three, f),), scratch=(Tensor("sine", three, f),)),
        Op("rotary.cat_sin", ("sin3",), (Tensor("sin32", table_shape, f),), scratch=half),
        Op("rotary.cat_cos", ("cos3",), (Tensor("cos32", table_shape, f),), scratch=half),
        ops.cast("rotary.cast_cos", "cos32", "cos", table_shape, f"={x}"),
        ops.cast("rotary.cast_sin", "sin32", "sin", table_shape, f"={x}"),
        ops.release_names("angles", "cos32", "sin32"),
    )


def with_mrope(stack: Stack, wiring: Wiring, interleaved: bool = False) -> Stack:
    """Return the stack with M-RoPE positions and table. Without images, all three positions are the token's."""
    start = next(i for i, op in enumerate(stack.before) if op.name == "rotary.angles")
    before = tuple(MROPE_POSITIONS if wiring.images and op.name == "positions" else op for op in stack.before[:start])
    stack = stack._replace(before=(*before, *mrope_table("embeds", interleaved)))
    if interleaved and not wiring.images:
        return stack
    return stack._replace(runs=without_positions(stack.runs))


MROPE_POSITIONS = Op("positions", (), (Tensor("positions", "3 b s", "int64"),))  # in time, height and width


def without_positions(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    return tuple(r._replace(blocks=tuple(Block(b.name, _drop_positions(b.ops)) for b in r.blocks)) for r in runs)


def _drop_positions(operations: tuple[Op, ...]) -> tuple[Op, ...]:
    """Return the ops of a block that is given no positions."""
    return tuple(
        op._replace(reads=tuple(r for r in op.reads if r != "positions")) if op.name == "return" else op
        for op in operations
    )


# The tower


def qwen_inputs() -> tuple[Tensor, ...]:
    """Pixels in fp32, the sizes of the images, and the token types that mark image tokens."""
    return (
        Tensor("pixel_values", f"{t.P} vin", "fp32"),
        Tensor("image_grid_thw", "b images 3", "int64"),
        Tensor("mm_token_type_ids", "b s", "int64"),
    )


def qwen_attention(
    wiring: Wiring,
    over: t.TowerAttention = t.IMAGE,
    bias: bool = True,
    out_bias: bool = True,
    norm: Norm | None = None,
    is_joint: bool = True,
) -> tuple[Op, ...]:
    """Attention; q and k are normalised by `norm`, rotated in fp32 and cast back.

    `is_joint`: q, k and v are one projection.

    Source: transformers 5.24 models/qwen2_vl/modeling_qwen2_vl.py VisionAttention.
    """
    shape, half = f"{t.P} va vd", f"{t.P} va vd2"
    q, k = ("v.q0", "v.k0") if norm is None else ("v.q.whole", "v.k.whole")
    projections = (
        (
            t.linear("attn.qkv", "v.n1", "v.qkv", "3 va vd", "vh", bias=bias),
            ops.view("attn.heads", "v.qkv", "v.heads", f"{t.P} 3 va vd", gradient="new"),
            ops.split("attn.unbind", "v.heads", (Tensor(q, shape), Tensor(k, shape), Tensor("v.v", shape))),
        )
        if is_joint
        else tuple(t.linear(f"attn.{x}", "v.n1", y, "va vd", "vh") for x, y in (("q", q), ("k", k), ("v", "v.v")))
    )
    return (
        *projections,
        *(
            op
            for x, whole in (("q", q), ("k", k))
            if norm is not None
            for op in (*norm(f"attn.{x}_norm", whole, f"v.{x}0", shape, "vd"), ops.release_names(whole))
        ),
        *(ops.cast(f"attn.float_{x}", f"v.{x}0", f"v.{x}32", shape, "fp32") for x in "qk"),
        *(op for x in "qk" for op in t.rotated(f"attn.rope_{x}", f"v.{x}32", f"v.{x}turned", shape, half)),
        *(ops.cast(f"attn.cast_{x}", f"v.{x}turned", f"v.{x}", shape, f"=v.{x}0") for x in "qk"),
        ops.release_names("v.q32", "v.k32", "v.q0", "v.k0"),
        *t.chunked("attn.attention", "v.q", "v.k", "v.v", "v.o", wiring, over),
        t.linear("attn.proj", "v.o", "v.ao", "vh", "va vd", bias=out_bias),
        ops.release_names("v.o", "v.n1"),
    )


def merger(name: str, x: str, y: str, layers: tuple[str, str], normed: tuple[Op, ...]) -> tuple[Op, ...]:
    """Merge the patches of each square: norm, concatenate, then two linear layers with a GELU between them.

    `normed` are the ops that write `{y}.normed` from x.
    """
    first, second = layers
    lead, g = "b merged", "projector"
    return (
        *normed,
        ops.view(f"{name}.view", f"{y}.normed", f"{y}.square", f"{lead} vm"),
        t.linear(f"{name}.{first}", f"{y}.square", f"{y}.first", "vm", "vm", g, lead),
        ops.activation(f"{name}.gelu", f"{y}.first", f"{y}.act", f"{lead} vm"),
        t.linear(f"{name}.{second}", f"{y}.act", y, "h", "vm", g, lead),
        ops.release_names(f"{y}.normed", f"{y}.square", x),
    )


def qwen_before(asks: bool, bias: bool = False) -> tuple[Op, ...]:
    return (
        *t.axial_table()[:1],
        *t.convolution("visual.patch_embed.proj", "pixel_values", "embeds", f"{t.P} vh", bias, asks),
        *t.axial_table()[1:],
    )


def qwen_after(tail: tuple[Op, ...], *more: str) -> tuple[Op, ...]:
    """From the last block to the features, which the tower returns together with its last hidden states."""
    return (
        *tail,
        *t.returned_states("x", "features", *more),
        ops.release_names("v.positions", "v.cos", "v.sin", "pixel_values.cast"),
    )


def qwen2_vl(m: ModelSpec, wiring: Wiring) -> Stack:
    block = t.block("visual.blocks", qwen_attention(wiring), t.mlp("mlp", "v.n2", "v.mo", "quick_gelu"))
    normed = t.norm("visual.merger.ln_q", "x", "features.normed", f"{t.P} vh", "vh", "projector")
    tower = Tower(
        qwen_inputs(),
        qwen_before(asks=True),
        (Run((block,), "vL1"),),
        qwen_after(merger("visual.merger", "x", "features", ("mlp.0", "mlp.2"), normed)),
    )
    text = with_mrope(decoder(m, wiring, QWEN_2), wiring)
    return text_with_tower(wiring, text, tower, scattered(), ("image_embeds", "image_mask"))


def qwen2_5_vl(m: ModelSpec, wiring: Wiring) -> Stack:
    text = with_mrope(decoder(m, wiring, QWEN_2), wiring)
    return text_with_tower(wiring, text, windowed_tower(m, wiring), scattered(), ("image_embeds", "image_mask"))


def windowed_tower(m: ModelSpec, wiring: Wiring, is_joint: bool = True) -> Tower:
    """Return Qwen2.5-VL's tower, most of whose blocks attend within windows of an image.

    Patches are sorted by window before the blocks, and their merged features are put back in order afterwards.
    `is_joint`: q, k and v are one projection.
    """
    feed = t.gated_mlp("mlp", "v.n2", "v.mo", bias=True)

    def run(i: int, full_image: bool) -> Run:
        attention = qwen_attention(wiring, t.IMAGE if full_image else t.WINDOW, is_joint=is_joint)
        return Run((t.block("visual.blocks", attention, feed, t.rms_norm),), f"vL{i}")

    first, convolution, *table = qwen_before(asks=True)
    pixels, patches = convolution, table[0]
    ordered = (
        first,
        pixels,
        patches._replace(writes=(patches.writes[0]._replace(name="v.patches"),)),
        indexed("visual.window_order", "v.patches", "embeds", f"{t.P} vh"),
        *renamed(tuple(table[1:-1]), {"v.cos": "v.cos0", "v.sin": "v.sin0"}),
        table[-1],
        *(indexed(f"visual.window_order_{n}", f"v.{n}0", f"v.{n}", f"{t.P} vd") for n in ("cos", "sin")),
        ops.release_names("v.cos0", "v.sin0"),
    )
    normed = t.rms_norm("visual.merger.ln_q", "x", "v.merged.normed", f"{t.P} vh", "vh", "projector")
    merged = merger("visual.merger", "x", "v.merged", ("mlp.0", "mlp.2"), normed)
    back = indexed("visual.reverse", "v.merged", "features", "b merged h")
    return Tower(
        qwen_inputs(),
        ordered,
        tuple(run(i, full_image) for i, (full_image, _) in enumerate(windowed_runs(m), 1)),
        qwen_after((*merged, back)),
    )


def indexed(name: str, x: str, y: str, shape: str) -> Op:
    """Reorder rows. The order is known on the host, and nothing is kept for backward on the GPU."""
    return Op(name, (x,), (Tensor(y, shape, f"={x}"),), source=f"{ops.DERIVATIVES}: index")


BUILDERS = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl}
