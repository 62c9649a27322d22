"""The vision towers of vision-language models, from pixels to what the language model reads in place of their tokens.

A tower sees the images of a whole batch: as one sequence of patches (`b patches`), or image by image. How large they
are is the run's: see `memplan.families.vision`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from memplan.catalogue import ops
from memplan.catalogue.attention import Wiring
from memplan.catalogue.mixed import renamed
from memplan.ir import Block, Keep, Op, Run, Scratch, Tensor, Weight

P = "b patches"
_ATEN = "torch 2.13 aten/src/ATen/native"


class Tower(NamedTuple):
    """The operations before its blocks, which read `pixel_values` and write `embeds`; the runs of its blocks; those
    after, which read `x` and write `features`. `inputs`: what a processor makes of images for it."""

    inputs: tuple[Tensor, ...]
    before: tuple[Op, ...]
    runs: tuple[Run, ...]
    after: tuple[Op, ...]


class Chunk(NamedTuple):
    """What attention is computed over at once: the axis that counts them in a sequence, and how many rows each has."""

    number: str
    rows: str


IMAGE, WINDOW = Chunk("images", "grid"), Chunk("windows", "window")


def linear(
    name: str, x: str, y: str, out: str, into: str, group: str = "vision", lead: str = P, bias: bool = True
) -> Op:
    """A linear layer over patches, which lie in two dimensions."""
    return ops.linear(name, x, y, out, into, group, bias, lead=lead, flat=True)


def norm(name: str, x: str, y: str, shape: str, axis: str, group: str = "vision") -> tuple[Op, ...]:
    return (ops.layer_norm(name, x, y, shape, axis, group=group),)


def rms_norm(name: str, x: str, y: str, shape: str, axis: str, group: str = "vision") -> tuple[Op, ...]:
    return grouped(ops.rms_norm(name, x, y, shape, axis), group)


def grouped(operations: tuple[Op, ...], group: str) -> tuple[Op, ...]:
    """The operations, their weights counted under another group."""
    return tuple(op._replace(weights=tuple(w._replace(group=group) for w in op.weights)) for op in operations)


def convolution(name: str, x: str, y: str, shape: str, bias: bool, asks: bool) -> tuple[Op, ...]:
    """Patches to hidden states; pixels are cast to the weight's dtype before, and stay in it as long as the tower runs.

    `asks`: transformers takes it for the tower's input embeddings, whose output asks for a gradient with checkpointing.
    """
    w = Weight(f"{name}.weight", "vh vin", "vision")
    b = (Weight(f"{name}.bias", "vh", "vision"),) if bias else ()
    pixels = f"{x}.cast"
    return (
        Op(f"{name}.pixels", (x,), (Tensor(pixels, f"{P} vin", f"={w.name}"),), (w,), cast=True, gradient="none"),
        Op(
            name,
            (pixels,),
            (Tensor(y, shape),),
            (w, *b),
            (Keep(pixels, w.name),),
            autocast="lower",
            asks=asks,
            source=f"{ops.DERIVATIVES}: convolution",
        ),
    )


def axial_table(prefix: str = "visual.rotary_pos_emb", width: str = "vd4") -> tuple[Op, ...]:
    """cos and sin of every patch's row and column, in fp32, and the positions they are of."""
    source = "transformers 5.24 models/qwen2_vl/modeling_qwen2_vl.py Qwen2VLVisionRotaryEmbedding"
    f, half, whole, positions = "fp32", f"{P} vd2", f"{P} vd", f"{P} 2"
    frequencies = tuple(Weight(f"{prefix}.{n}", width, "buffer", f, False) for n in ("inv_freq", "original_inv_freq"))
    return (
        Op("visual.positions", (), (Tensor("v.positions", positions, "int64"),)),
        Op(
            "visual.rotary.angles",
            ("v.positions",),
            (Tensor("v.angles", half, f),),
            frequencies,
            scratch=(Tensor("positions", positions, f),),
            gradient="none",
            source=source,
        ),
        Op("visual.rotary.cos", ("v.angles",), (Tensor("v.cosine", half, f),), scratch=(Tensor("cosine", half, f),)),
        Op("visual.rotary.sin", ("v.angles",), (Tensor("v.sine", half, f),), scratch=(Tensor("sine", half, f),)),
        Op("visual.rotary.cat_cos", ("v.cosine",), (Tensor("v.cos", whole, f),), scratch=(Tensor("both", half, f),)),
        Op("visual.rotary.cat_sin", ("v.sine",), (Tensor("v.sin", whole, f),), scratch=(Tensor("both", half, f),)),
        ops.leave("v.angles"),
    )


def rotated(
    name: str, x: str, y: str, shape: str, half: str, table: tuple[str, str] = ("v.cos", "v.sin")
) -> tuple[Op, ...]:
    """`ops.rotate` with the tower's own table."""
    turned = ops.rotate(name, x, y, shape, half)
    return renamed(turned, {"cos": table[0], "sin": table[1]})


def quick_gelu(name: str, x: str, y: str, shape: str) -> tuple[Op, ...]:
    """`x * sigmoid(1.702 x)`: keeps x and the sigmoid."""
    return (
        ops.scale(f"{name}.scale", x, f"{y}.scaled", shape),
        Op(
            f"{name}.sigmoid",
            (f"{y}.scaled",),
            (Tensor(f"{y}.sigmoid", shape),),
            (),
            (Keep(f"{y}.sigmoid", f"{y}.scaled"),),
            source=f"{ops.DERIVATIVES}: sigmoid",
        ),
        ops.mul(name, x, f"{y}.sigmoid", y, shape),
    )


def acted(act: str, name: str, x: str, y: str, shape: str) -> tuple[Op, ...]:
    """The activation of that name in transformers."""
    return quick_gelu(name, x, y, shape) if act == "quick_gelu" else (ops.activation(name, x, y, shape),)


def mlp(name: str, x: str, y: str, act: str, layers: tuple[str, str] = ("fc1", "fc2"), lead: str = P) -> tuple[Op, ...]:
    """Two layers with an activation between them."""
    first, second = layers
    return (
        linear(f"{name}.{first}", x, "v.up", "vf", "vh", lead=lead),
        *acted(act, f"{name}.act_fn", "v.up", "v.act", f"{lead} vf"),
        linear(f"{name}.{second}", "v.act", y, "vh", "vf", lead=lead),
        ops.leave(x),
    )


def gated_mlp(name: str, x: str, y: str, bias: bool, lead: str = P) -> tuple[Op, ...]:
    """`down_proj(act(gate_proj(x)) * up_proj(x))`."""
    return (
        linear(f"{name}.gate_proj", x, "v.gate", "vf", "vh", lead=lead, bias=bias),
        ops.activation(f"{name}.act_fn", "v.gate", "v.act", f"{lead} vf"),
        linear(f"{name}.up_proj", x, "v.up", "vf", "vh", lead=lead, bias=bias),
        ops.mul(f"{name}.product", "v.act", "v.up", "v.product", f"{lead} vf"),
        linear(f"{name}.down_proj", "v.product", y, "vh", "vf", lead=lead, bias=bias),
        ops.leave(x),
    )


def block(
    name: str,
    attention: tuple[Op, ...],
    feed: tuple[Op, ...],
    normalise: Callable[[str, str, str, str, str], tuple[Op, ...]] = norm,
    norms: tuple[str, str] = ("norm1", "norm2"),
    lead: str = P,
) -> Block:
    """Norm, attention from `v.n1` to `v.ao`, residual; norm, MLP from `v.n2` to `v.mo`, residual."""
    shape = f"{lead} vh"
    return Block(
        name,
        (
            *normalise(norms[0], "x", "v.n1", shape, "vh"),
            *attention,
            ops.add("residual_1", "x", "v.ao", "v.x1", shape),
            *normalise(norms[1], "v.x1", "v.n2", shape, "vh"),
            *feed,
            ops.add("residual_2", "v.x1", "v.mo", "y", shape),
        ),
    )


def chunked(name: str, q: str, k: str, v: str, y: str, wiring: Wiring, chunk: Chunk) -> tuple[Op, ...]:
    """Attention image by image, or window by window: heads are split, each part attended to, what comes out joined.

    The gradients of the parts are joined into new ones; the kernel's scratch is that of one part at a time.
    """
    shape = f"{P} va vd"
    parts = tuple(ops.view(f"{name}.split_{t}", t, f"{t}.parts", shape, gradient="new") for t in (q, k, v))
    kernel = _flash if wiring.tower == "flash" else _efficient
    return (
        *parts,
        *kernel(name, f"{q}.parts", f"{k}.parts", f"{v}.parts", f"{y}.parts", chunk),
        ops.copy(f"{name}.cat", f"{y}.parts", y, shape),
        ops.leave(f"{y}.parts", q, k, v),
    )


def _flash(name: str, q: str, k: str, v: str, y: str, chunk: Chunk) -> tuple[Op, ...]:
    """See `memplan.catalogue.attention.flash`."""
    lse, seed, offset = f"{y}.lse", f"{y}.seed", f"{y}.offset"
    rows = f"{chunk.rows}128"
    made = (
        Tensor(y, f"{P} va vd"),
        Tensor(lse, f"{P} va", "fp32"),
        Tensor(seed, f"b {chunk.number} 64", "int64"),  # two numbers a call, in 512 bytes
        Tensor(offset, f"b {chunk.number} 64", "int64"),
    )
    scratch = (Tensor("row sums", f"va {rows}", "fp32"), Tensor("dq accumulated", f"{rows} va vd32", "fp32"))
    return (
        Op(
            f"{name}.kernel",
            (q, k, v),
            made,
            (),
            tuple(Keep(what, of) for of in (q, k, v) for what in (q, k, v, y, lse, seed, offset)),
            scratch_back=tuple(map(Scratch, scratch)),
            autocast="lower",
            source=f"{_ATEN}/transformers/cuda/flash_attn/flash_api.cpp mha_bwd",
        ),
    )


def _efficient(name: str, q: str, k: str, v: str, y: str, chunk: Chunk) -> tuple[Op, ...]:
    """See `memplan.catalogue.attention`."""
    lse, seed, offset = f"{y}.lse", f"{y}.seed", f"{y}.offset"
    made = (
        Tensor(y, f"{P} va vd", f"={q}"),
        Tensor(lse, f"b {chunk.number} va {chunk.rows}32", "fp32"),
        Tensor(seed, f"b {chunk.number} 64", "int64"),
        Tensor(offset, f"b {chunk.number} 64", "int64"),
    )
    scratch = (
        Tensor("delta", f"va {chunk.rows}", "fp32"),
        Tensor("workspace", f"va {chunk.rows}_workspace", "uint8"),
        Tensor("output product", f"{chunk.rows} va tower_fp32", "fp32"),
    )
    return (
        Op(
            f"{name}.kernel",
            (q, k, v),
            made,
            (),
            tuple(Keep(what, of) for of in (q, k, v) for what in (q, k, v, y, lse, seed, offset)),
            scratch_back=tuple(map(Scratch, scratch)),
            autocast="lower",
            source=f"{_ATEN}/transformers/cuda/attention_backward.cu",
        ),
    )


def plain_attention(names: tuple[str, ...], wiring: Wiring, lead: str, bias: bool) -> tuple[Op, ...]:
    """q, k and v in projections of their own."""
    q, k, v, o = names
    return (
        *(linear(n, "v.n1", f"v.{x}", "va vd", "vh", lead=lead, bias=bias) for n, x in ((q, "q"), (k, "k"), (v, "v"))),
        *chunked("attention", "v.q", "v.k", "v.v", "v.o", wiring, IMAGE),
        linear(o, "v.o", "v.ao", "vh", "va vd", lead=lead, bias=bias),
        ops.leave("v.o", "v.n1"),
    )


# Qwen's


def qwen_attention(wiring: Wiring, chunk: Chunk = IMAGE) -> tuple[Op, ...]:
    """q, k and v in one projection; q and k rotated in fp32 and cast back.

    Source: transformers 5.24 models/qwen2_vl/modeling_qwen2_vl.py VisionAttention.
    """
    shape, half = f"{P} va vd", f"{P} va vd2"
    return (
        linear("attn.qkv", "v.n1", "v.qkv", "3 va vd", "vh"),
        ops.view("attn.heads", "v.qkv", "v.heads", f"{P} 3 va vd", gradient="new"),
        ops.split("attn.unbind", "v.heads", (Tensor("v.q0", shape), Tensor("v.k0", shape), Tensor("v.v", shape))),
        *(ops.cast(f"attn.float_{t}", f"v.{t}0", f"v.{t}32", shape, "fp32") for t in "qk"),
        *(op for t in "qk" for op in rotated(f"attn.rope_{t}", f"v.{t}32", f"v.{t}turned", shape, half)),
        *(ops.cast(f"attn.cast_{t}", f"v.{t}turned", f"v.{t}", shape, f"=v.{t}0") for t in "qk"),
        ops.leave("v.q32", "v.k32", "v.q0", "v.k0"),
        *chunked("attn.attention", "v.q", "v.k", "v.v", "v.o", wiring, chunk),
        linear("attn.proj", "v.o", "v.ao", "vh", "va vd"),
        ops.leave("v.o", "v.n1"),
    )


def merger(
    name: str,
    x: str,
    y: str,
    layers: tuple[str, str],
    normed: tuple[Op, ...],
    group: str = "projector",
) -> tuple[Op, ...]:
    """`normed` makes `v.merge` of x: patches of a square side by side; then two layers with a GELU between them."""
    first, second = layers
    lead = "b merged"
    return (
        *normed,
        ops.view(f"{name}.view", "v.merge", "v.square", f"{lead} vm"),
        linear(f"{name}.{first}", "v.square", "v.m1", "vm", "vm", group, lead),
        ops.activation(f"{name}.gelu", "v.m1", "v.m2", f"{lead} vm"),
        linear(f"{name}.{second}", "v.m2", y, "h", "vm", group, lead),
        ops.leave("v.merge", "v.square", x),
    )


def held(x: str, *more: str) -> tuple[Op, ...]:
    """The model returns the tower's last hidden states, and what is made of them, with its own."""
    return tuple(
        ops.view(f"image_outputs.{name}", name, f"{name}.returned", shape)._replace(holds="forward")
        for name, shape in ((x, f"{P} vh"), *((m, "b merged h") for m in more))
    )


def qwen_inputs() -> tuple[Tensor, ...]:
    """Pixels in fp32, the sizes of the images, and which tokens stand for them."""
    return (
        Tensor("pixel_values", f"{P} vin", "fp32"),
        Tensor("image_grid_thw", "b images 3", "int64"),
        Tensor("mm_token_type_ids", "b s", "int64"),
    )
