"""Qwen2-VL and Qwen2.5-VL: tokens with positions in time, height and width, and a tower that sees all images as one
sequence of patches; what Qwen3-VL has of them, too."""

from __future__ import annotations

from memplan.catalogue.decoder.windows import renamed
from memplan.catalogue.families.llama import llama
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision import towers as t
from memplan.catalogue.vision.towers import Tower
from memplan.catalogue.vision.vision import joined, scattered
from memplan.core.ir import Block, Op, Run, Stack, Tensor, Weight
from memplan.models.configs.vision import windowed_runs
from memplan.models.model import ModelSpec

_QWEN = "transformers 5.24 models/qwen2_vl/modeling_qwen2_vl.py"


# The language models' positions


def mrope_table(x: str, interleaved: bool) -> tuple[Op, ...]:
    """cos and sin for positions in time, height and width of every token of every sequence, of which one table is made.

    `interleaved`: Qwen3-VL writes the three into one another.
    """
    f, source = "fp32", f"{_QWEN} Qwen2VLRotaryEmbedding"
    three, whole = "3 b s rot2", "b s rot"
    names = ("inv_freq", "original_inv_freq")
    frequencies = tuple(Weight(f"model.rotary_emb.{n}", "rot2", "buffer", f, False) for n in names)
    half = () if interleaved else (Tensor("sections", "b s rot2", f),)
    return (
        Op(
            "rotary.angles",
            ("positions",),
            (Tensor("angles", three, f),),
            frequencies,
            scratch=(Tensor("positions", "3 b s", f),),
            gradient="none",
            source=source,
        ),
        Op("rotary.cos", ("angles",), (Tensor("cos3", three, f),), scratch=(Tensor("cosine", three, f),)),
        Op("rotary.sin", ("angles",), (Tensor("sin3", three, f),), scratch=(Tensor("sine", three, f),)),
        Op("rotary.cat_sin", ("sin3",), (Tensor("sin32", whole, f),), scratch=half),
        Op("rotary.cat_cos", ("cos3",), (Tensor("cos32", whole, f),), scratch=half),
        ops.cast("rotary.cast_cos", "cos32", "cos", whole, f"={x}"),
        ops.cast("rotary.cast_sin", "sin32", "sin", whole, f"={x}"),
        ops.leave("angles", "cos32", "sin32"),
    )


def with_mrope(made: Stack, wiring: Wiring, interleaved: bool = False) -> Stack:
    """The stack with Qwen-VL's positions and rotary table. Without images all three positions are the token's."""
    start = next(i for i, op in enumerate(made.before) if op.name == "rotary.angles")
    before = tuple(GIVEN if wiring.images and op.name == "positions" else op for op in made.before[:start])
    made = made._replace(before=(*before, *mrope_table("embeds", interleaved)))
    if interleaved and not wiring.images:
        return made
    return made._replace(runs=without_positions(made.runs))


GIVEN = Op("positions", (), (Tensor("positions", "3 b s", "int64"),))  # in time, height and width


def without_positions(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    return tuple(r._replace(blocks=tuple(Block(b.name, _unplaced(b.ops)) for b in r.blocks)) for r in runs)


def _unplaced(operations: tuple[Op, ...]) -> tuple[Op, ...]:
    """Blocks that are given no positions."""
    return tuple(
        op._replace(reads=tuple(r for r in op.reads if r != "positions")) if op.name == "return" else op
        for op in operations
    )


# The tower


def qwen_inputs() -> tuple[Tensor, ...]:
    """Pixels in fp32, the sizes of the images, and which tokens stand for them."""
    return (
        Tensor("pixel_values", f"{t.P} vin", "fp32"),
        Tensor("image_grid_thw", "b images 3", "int64"),
        Tensor("mm_token_type_ids", "b s", "int64"),
    )


def qwen_attention(wiring: Wiring, over: t.Kernel = t.IMAGE) -> tuple[Op, ...]:
    """q, k and v in one projection; q and k rotated in fp32 and cast back.

    Source: transformers 5.24 models/qwen2_vl/modeling_qwen2_vl.py VisionAttention.
    """
    shape, half = f"{t.P} va vd", f"{t.P} va vd2"
    return (
        t.linear("attn.qkv", "v.n1", "v.qkv", "3 va vd", "vh"),
        ops.view("attn.heads", "v.qkv", "v.heads", f"{t.P} 3 va vd", gradient="new"),
        ops.split("attn.unbind", "v.heads", (Tensor("v.q0", shape), Tensor("v.k0", shape), Tensor("v.v", shape))),
        *(ops.cast(f"attn.float_{x}", f"v.{x}0", f"v.{x}32", shape, "fp32") for x in "qk"),
        *(op for x in "qk" for op in t.rotated(f"attn.rope_{x}", f"v.{x}32", f"v.{x}turned", shape, half)),
        *(ops.cast(f"attn.cast_{x}", f"v.{x}turned", f"v.{x}", shape, f"=v.{x}0") for x in "qk"),
        ops.leave("v.q32", "v.k32", "v.q0", "v.k0"),
        *t.chunked("attn.attention", "v.q", "v.k", "v.v", "v.o", wiring, over),
        t.linear("attn.proj", "v.o", "v.ao", "vh", "va vd"),
        ops.leave("v.o", "v.n1"),
    )


def merger(name: str, x: str, y: str, layers: tuple[str, str], normed: tuple[Op, ...]) -> tuple[Op, ...]:
    """`normed` makes `{y}.normed` of x; patches of a square side by side; then two layers with a GELU between them."""
    first, second = layers
    lead, g = "b merged", "projector"
    return (
        *normed,
        ops.view(f"{name}.view", f"{y}.normed", f"{y}.square", f"{lead} vm"),
        t.linear(f"{name}.{first}", f"{y}.square", f"{y}.first", "vm", "vm", g, lead),
        ops.activation(f"{name}.gelu", f"{y}.first", f"{y}.act", f"{lead} vm"),
        t.linear(f"{name}.{second}", f"{y}.act", y, "h", "vm", g, lead),
        ops.leave(f"{y}.normed", f"{y}.square", x),
    )


def qwen_before(asks: bool, bias: bool = False) -> tuple[Op, ...]:
    return (
        *t.axial_table()[:1],
        *t.convolution("visual.patch_embed.proj", "pixel_values", "embeds", f"{t.P} vh", bias, asks),
        *t.axial_table()[1:],
    )


def qwen_after(tail: tuple[Op, ...], *more: str) -> tuple[Op, ...]:
    """From the last block to the features, which the tower returns with its last hidden states."""
    return (
        *tail,
        *t.held("x", "features", *more),
        ops.leave("v.positions", "v.cos", "v.sin", "pixel_values.cast"),
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
    text = with_mrope(llama(m, wiring, bias=True, mixed=True), wiring)
    return joined(wiring, text, tower, scattered(), ("image_embeds", "image_mask"))


def qwen2_5_vl(m: ModelSpec, wiring: Wiring) -> Stack:
    """Most blocks see windows of an image: patches are put in their order at the start, and what they make back at the
    end."""
    feed = t.gated_mlp("mlp", "v.n2", "v.mo", bias=True)

    def run(i: int, whole: bool) -> Run:
        over = t.IMAGE if whole else t.WINDOW
        return Run((t.block("visual.blocks", qwen_attention(wiring, over), feed, t.rms_norm),), f"vL{i}")

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
        ops.leave("v.cos0", "v.sin0"),
    )
    normed = t.rms_norm("visual.merger.ln_q", "x", "v.merged.normed", f"{t.P} vh", "vh", "projector")
    merged = merger("visual.merger", "x", "v.merged", ("mlp.0", "mlp.2"), normed)
    back = indexed("visual.reverse", "v.merged", "features", "b merged h")
    tower = Tower(
        qwen_inputs(),
        ordered,
        tuple(run(i, whole) for i, (whole, _) in enumerate(windowed_runs(m), 1)),
        qwen_after((*merged, back)),
    )
    text = with_mrope(llama(m, wiring, bias=True, mixed=True), wiring)
    return joined(wiring, text, tower, scattered(), ("image_embeds", "image_mask"))


def indexed(name: str, x: str, y: str, shape: str) -> Op:
    """Rows in another order, which is known on the host: nothing of it is kept on the GPU."""
    return Op(name, (x,), (Tensor(y, shape, f"={x}"),), source=f"{ops.DERIVATIVES}: index")


BUILDERS = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl}
