"""Vision towers of vision-language models, from pixels to the features that replace image tokens.

A tower processes the images of a whole batch as one sequence of patches (`b patches`), or image by image. Their sizes
are set per run: see `memplan.models.configs.images`.
"""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue.attention import attention as text_attention
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import renamed
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.errors import UnsupportedModelError
from memplan.core.ir import Block, Keep, Op, Run, Scratch, Tensor, Weight
from memplan.core.records import NamedTuple
from memplan.models.facts import ONE_KERNEL

P = "b patches"
_ATEN = "torch 2.13 aten/src/ATen/native"


class Tower(NamedTuple):
    """A vision tower.

    inputs  what an image processor makes for it
    before  operations before its blocks: read `pixel_values`, write `embeds`
    runs    runs of its blocks
    after   operations after its blocks: read `x`, write `features`
    """

    inputs: tuple[Tensor, ...]
    before: tuple[Op, ...]
    runs: tuple[Run, ...]
    after: tuple[Op, ...]


def linear(
    name: str,
    x: str,
    y: str,
    out: str,
    into: str,
    group: str = "vision",
    lead: str = P,
    bias: bool = True,
    flat: bool = True,
) -> Op:
    """Return a linear layer over patches, whose input is two-dimensional if `flat`, else three-dimensional."""
    return ops.linear(name, x, y, out, into, group, bias, lead=lead, flat=flat)


def norm(name: str, x: str, y: str, shape: str, axis: str, group: str = "vision") -> tuple[Op, ...]:
    return (ops.layer_norm(name, x, y, shape, axis, group=group),)


def strided_norm(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """Return a LayerNorm of hidden states that are contiguous by column, as a convolution leaves them.

    They are copied in forward and in backward.
    """
    (op,) = norm(name, x, y, shape, axis)
    copy = Tensor("contiguous", shape, f"={x}")
    return (
        op._replace(
            scratch=(copy,),
            scratch_back=(Scratch(copy),),
            source=f"{op.source}; {_ATEN}/cuda/layer_norm_kernel.cu layer_norm_cuda",
        ),
    )


def rms_norm(name: str, x: str, y: str, shape: str, axis: str, group: str = "vision") -> tuple[Op, ...]:
    return grouped(ops.rms_norm(name, x, y, shape, axis), group)


def grouped(operations: tuple[Op, ...], group: str) -> tuple[Op, ...]:
    """Return the operations with their weights counted under another group."""
    return tuple(op._replace(weights=tuple(w._replace(group=group) for w in op.weights)) for op in operations)


def convolution(name: str, x: str, y: str, shape: str, bias: bool, asks: bool) -> tuple[Op, ...]:
    """Turn patches into hidden states. Pixels are cast to the weight's dtype; the tower holds the cast to its end.

    `asks`: transformers treats it as the tower's input embeddings, whose output requires a gradient with checkpointing.
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
            (Keep(pixels, w.name), Keep(w.name, w.name)),
            autocast="lower",
            requires_gradient=asks,
            product="matrix",
            source=f"{ops.DERIVATIVES}: convolution",
        ),
    )


def axial_table(prefix: str = "visual.rotary_pos_emb", width: str = "vd4", like: str = "") -> tuple[Op, ...]:
    """Return fp32 cos and sin of every patch's row and column, and their positions.

    `like`: cast to the dtype of that tensor, as in Pixtral, whose rows and columns also have separate frequencies.
    """
    source = "transformers 5.24 models/qwen2_vl/modeling_qwen2_vl.py Qwen2VLVisionRotaryEmbedding"
    f, half, whole, positions = "fp32", f"{P} vd2", f"{P} vd", f"{P} 2"
    angles = whole if like else half
    frequencies = tuple(Weight(f"{prefix}.{n}", width, "buffer", f, False) for n in ("inv_freq", "original_inv_freq"))
    last = {t: f"v.{t}32" if like else f"v.{t}" for t in ("cos", "sin")}
    return (
        Op("visual.positions", (), (Tensor("v.positions", positions, "int64"),)),
        Op(
            "visual.rotary.angles",
            ("v.positions",),
            (Tensor("v.angles", angles, f),),
            frequencies,
            scratch=(Tensor("positions", positions, f),),
            gradient="none",
            source=source,
        ),
        Op("visual.rotary.cos", ("v.angles",), (Tensor("v.cosine", angles, f),), scratch=(Tensor("cos", angles, f),)),
        Op("visual.rotary.sin", ("v.angles",), (Tensor("v.sine", angles, f),), scratch=(Tensor("sin", angles, f),)),
        Op(
            "visual.rotary.cat_cos", ("v.cosine",), (Tensor(last["cos"], whole, f),), scratch=(Tensor("both", half, f),)
        ),
        Op("visual.rotary.cat_sin", ("v.sine",), (Tensor(last["sin"], whole, f),), scratch=(Tensor("both", half, f),)),
        *(
            ops.cast(f"visual.rotary.to_{t}", last[t], f"v.{t}", whole, f"={like}")
            for t in (("cos", "sin") if like else ())
        ),
        ops.release_names("v.angles", *(last.values() if like else ())),
    )


def rotated(
    name: str, x: str, y: str, shape: str, half: str, table: tuple[str, str] = ("v.cos", "v.sin")
) -> tuple[Op, ...]:
    """Return `ops.rotate` with the tower's own table."""
    operations = ops.rotate(name, x, y, shape, half)
    return renamed(operations, {"cos": table[0], "sin": table[1]})


def quick_gelu(name: str, x: str, y: str, shape: str) -> tuple[Op, ...]:
    """Return `x * sigmoid(1.702 x)`, which keeps x and the sigmoid."""
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
    """Return transformers' activation named `act`. Raises UnsupportedModelError if it is not modelled."""
    if act == "quick_gelu":
        return quick_gelu(name, x, y, shape)
    if act not in ONE_KERNEL:
        supported = ", ".join(("quick_gelu", *ONE_KERNEL))
        raise UnsupportedModelError(
            f"vision_config.hidden_act: {act!r:.40} is not supported yet; supported: {supported}", "vision_config"
        )
    return (ops.activation(name, x, y, shape),)


def mlp(
    name: str, x: str, y: str, act: str, layers: tuple[str, str] = ("fc1", "fc2"), lead: str = P, flat: bool = True
) -> tuple[Op, ...]:
    """Return two linear layers with an activation between them."""
    first, second = layers
    return (
        linear(f"{name}.{first}", x, "v.up", "vf", "vh", lead=lead, flat=flat),
        *acted(act, f"{name}.act_fn", "v.up", "v.act", f"{lead} vf"),
        linear(f"{name}.{second}", "v.act", y, "vh", "vf", lead=lead, flat=flat),
        ops.release_names(x),
    )


def gated_mlp(name: str, x: str, y: str, bias: bool, flat: bool = True) -> tuple[Op, ...]:
    """Return `down_proj(act(gate_proj(x)) * up_proj(x))`."""
    return (
        linear(f"{name}.gate_proj", x, "v.gate", "vf", "vh", bias=bias, flat=flat),
        ops.activation(f"{name}.act_fn", "v.gate", "v.act", f"{P} vf"),
        linear(f"{name}.up_proj", x, "v.up", "vf", "vh", bias=bias, flat=flat),
        ops.mul(f"{name}.product", "v.act", "v.up", "v.product", f"{P} vf"),
        linear(f"{name}.down_proj", "v.product", y, "vh", "vf", bias=bias, flat=flat),
        ops.release_names(x),
    )


def block(
    name: str,
    attention: tuple[Op, ...],
    feed: tuple[Op, ...],
    normalise: Callable[[str, str, str, str, str], tuple[Op, ...]] = norm,
    norms: tuple[str, str] = ("norm1", "norm2"),
    lead: str = P,
    held: tuple[str, ...] = (),
) -> Block:
    """Return a block: norm, attention from `v.n1` to `v.ao`, residual; norm, MLP from `v.n2` to `v.mo`, residual.

    held  what its frame holds of its attention's results
    """
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
            *((ops.release_names(*held),) if held else ()),
        ),
    )


def returned(wiring: Wiring) -> tuple[str, ...]:
    """Return what a block gets of its attention and does not use: eager attention's probabilities."""
    return ("probs",) if wiring.tower == "eager" else ()


def encoder_block(
    name: str,
    act: str,
    wiring: Wiring,
    normalise: Callable[[str, str, str, str, str], tuple[Op, ...]] = norm,
    lead: str = "b images grid",
    mask: str = "",
) -> Block:
    """Return a block of CLIP's or SigLIP's tower, which attends to all images of a batch in one call."""
    heads = (
        *(
            linear(f"self_attn.{n}_proj", "v.n1", f"v.{n}", "va vd", "vh", lead=lead, flat=False)
            for n in ("q", "k", "v")
        ),
        *joint_attention("self_attn", "v.q", "v.k", "v.v", "v.o", wiring, mask=mask, converts=True),
        linear("self_attn.out_proj", "v.o", "v.ao", "vh", "va vd", lead=lead, flat=False),
        ops.release_names("v.q", "v.k", "v.v", "v.o", "v.n1"),
    )
    feed = mlp("mlp", "v.n2", "v.mo", act, lead=lead, flat=False)
    return block(name, heads, feed, normalise, ("layer_norm1", "layer_norm2"), lead, returned(wiring))


def embedded_patches(name: str, shape: str) -> tuple[Op, ...]:
    """Return SigLIP's embeddings: patches plus a table of positions, which all images share."""
    position = Weight(f"{name}.position_embedding.weight", "vpositions vh", "vision", rows=1)
    ids = Weight(f"{name}.position_ids", "vpositions", "buffer", "int64", False)
    return (
        *convolution(f"{name}.patch_embedding", "pixel_values", "v.patches", shape, True, asks=True),
        Op(
            f"{name}.position_embedding",
            (),
            (Tensor("v.position", "vpositions vh", f"={position.name}"),),
            (position, ids),
            source=f"{ops.DERIVATIVES}: embedding",
        ),
        ops.add(name, "v.patches", "v.position", "embeds", shape),
    )


class TowerAttention(NamedTuple):
    """The work of one attention call, or of each of several equal calls.

    calls  axis that counts the calls in a sequence; empty for one call
    q      axes of the queries
    rows   axis of a call's rows; axes of rounded rows start with its name
    batch  further axes of a call that processes several images at once
    """

    calls: str
    q: str
    rows: str
    batch: str


IMAGE = TowerAttention("images", f"{P} va vd", "grid", "")
WINDOW = TowerAttention("windows", f"{P} va vd", "window", "")
BATCH = TowerAttention("", "b images grid va vd", "grid", "b images")
PACKED = TowerAttention("", f"{P} va vd", "packed", "")


def attention(
    name: str,
    q: str,
    k: str,
    v: str,
    y: str,
    kernel: str,
    over: TowerAttention,
    mask: str = "",
    keys: str = "",
) -> Op:
    """Return the flash or memory-efficient kernel, see `memplan.catalogue.attention.attention`.

    Several calls reuse the scratch of one, and each keeps 512 bytes of RNG state. `keys`: the axis of the keys that a
    query attends to, if it is not all rows of a call.
    """
    lse, seed, offset = f"{y}.lse", f"{y}.seed", f"{y}.offset"
    state = f"b {over.calls} 64" if over.calls else ""
    saved = (q, k, v, y, lse, seed, offset, *((mask,) if mask else ()))
    batch, rows = over.batch, over.rows
    if kernel == "flash":
        sums = f"{over.q.removesuffix(' vd')}"
        scratch = (
            Tensor("row sums", f"{batch} va {rows}128", "fp32"),
            Tensor("dq accumulated", f"{batch} {rows}128 va vd32", "fp32"),
        )
        source = f"{_ATEN}/transformers/cuda/flash_attn/flash_api.cpp mha_bwd"
    else:
        sums = f"b {over.calls} va {rows}32" if over.calls else f"{batch} va {rows}32"
        workspace = "batched" if batch else rows
        long = P if rows == "packed" else rows
        scratch = (
            Tensor("delta", f"{batch} va {long}", "fp32"),
            Tensor("workspace", f"{batch} va {workspace}_workspace", "uint8"),
            Tensor("output product", f"{batch} {long} va tower_fp32", "fp32"),
        )
        source = f"{_ATEN}/transformers/cuda/attention_backward.cu"
    return Op(
        f"{name}.kernel",
        (q, k, v, *((mask,) if mask else ())),
        (
            Tensor(y, over.q, f"={q}"),
            Tensor(lse, sums, "fp32"),
            Tensor(seed, state, "int64"),
            Tensor(offset, state, "int64"),
        ),
        (),
        tuple(Keep(what, of) for of in (q, k, v) for what in saved),
        scratch_back=tuple(map(Scratch, scratch)),
        autocast="lower",
        recorded=() if kernel == "flash" else (lse,),
        product=f"whole attention over {keys or (P if rows == 'packed' else rows)}",
        source=source,
    )


def joint_attention(
    name: str,
    q: str,
    k: str,
    v: str,
    y: str,
    wiring: Wiring,
    over: TowerAttention = BATCH,
    mask: str = "",
    softmax: str = "fp32",
    converts: bool = False,
) -> tuple[Op, ...]:
    """Return attention over all images of a batch in one call, by a fused kernel or transformers' eager products.

    Only the memory-efficient kernel takes a `mask`. Each call of it `converts` a boolean one to the dtype of q.
    """
    if wiring.tower == "eager":
        return eager(name, q, k, v, y, over, mask, softmax, wiring.is_one_image)
    if converts and mask:
        bias = Tensor(f"{y}.bias", f"{over.batch} {over.rows} {over.rows}", f"={q}")
        source = f"{_ATEN}/transformers/attention.cpp convert_boolean_attn_mask"
        converted = Op(f"{name}.mask", (mask,), (bias,), autocast="lower", gradient="none", source=source)
        return (converted, attention(name, q, k, v, y, "efficient", over, bias.name))
    return (attention(name, q, k, v, y, "efficient" if mask else wiring.tower, over, mask),)


def eager(
    name: str,
    q: str,
    k: str,
    v: str,
    y: str,
    over: TowerAttention,
    mask: str = "",
    softmax: str = "fp32",
    one: bool = False,
) -> tuple[Op, ...]:
    """Return transformers' eager products. The heads of a single image are not copied (`one`, or without a batch)."""
    axes = {"b": over.batch, "s": P if over.rows == "packed" else over.rows, "a": "va", "k": "va", "d": "vd"}
    products = ops.with_axes(text_attention.eager(name, q, k, v, y, False, mask, "d", False, softmax=softmax), axes)
    return tuple(text_attention.flattened(op, of_tower=True) for op in products) if one or not over.batch else products


def _packed(name: str, q: str, k: str, v: str, y: str, target: str, keys: str) -> tuple[Op, ...]:
    """Return flash attention 2 over all images, or all windows, packed in one half-precision sequence.

    Source: transformers 5.24 modeling_flash_attention_utils.py _flash_attention_forward.
    """
    inputs = {x: f"{x}.target" if target else x for x in (q, k, v)}
    return (
        *(ops.cast(f"{name}.cast_{x}", x, to, PACKED.q, target) for x, to in inputs.items() if to != x),
        attention(name, inputs[q], inputs[k], inputs[v], y, "flash", PACKED, keys=keys),
        ops.release_names(q, k, v, *inputs.values()),
    )


def chunked(name: str, q: str, k: str, v: str, y: str, wiring: Wiring, over: TowerAttention) -> tuple[Op, ...]:
    """Attend image by image, or window by window: split the heads, attend in each part, and concatenate the outputs.

    The gradients of the parts are concatenated in new tensors.
    """
    if wiring.tower == "flash_2":
        return _packed(name, q, k, v, y, wiring.target, over.rows)
    if wiring.tower == "eager":
        return _eager_parts(name, q, k, v, y, over.rows)
    parts = tuple(ops.view(f"{name}.split_{t}", t, f"{t}.parts", over.q, gradient="new") for t in (q, k, v))
    return (
        *parts,
        attention(name, f"{q}.parts", f"{k}.parts", f"{v}.parts", f"{y}.parts", wiring.tower, over),
        ops.copy(f"{name}.cat", f"{y}.parts", y, over.q),
        ops.release_names(f"{y}.parts", q, k, v),
    )


def _eager_parts(name: str, q: str, k: str, v: str, y: str, rows: str) -> tuple[Op, ...]:
    """Return eager attention part by part, of `rows` at most.

    The last call, a full part, has the largest temporaries; of the earlier ones there is what they keep, and their
    outputs. Their backward, after that of the last, frees what they keep before it makes gradients of the heads.
    """
    earlier, last = (f"{rows}_earlier", "earlier"), (rows, "last")
    heads = {t: tuple(Tensor(f"{t}.{part}", f"{n} va vd") for n, part in (earlier, last)) for t in (q, k, v)}
    q1, k1, v1, y1 = (f"{t}.earlier" for t in (q, k, v, y))
    n, softmax, probs, pairs = f"{name}.earlier", f"{y1}.softmax", f"{y1}.probs", f"{rows}_earlier_pairs va"
    return (
        *(ops.split(f"{name}.split_{t}", t, parts) for t, parts in heads.items()),
        Op(
            n,
            (q1, k1, v1),
            (Tensor(y1, f"{rows}_earlier va vd", f"={q1}"),),
            (),
            (Keep(k1, q1), Keep(v1, q1), Keep(q1, k1)),
            product=f"whole attention over {rows}",
            source=f"{ops.DERIVATIVES}: bmm",
        ),
        Op(
            f"{n}.softmax",
            (y1,),
            (Tensor(softmax, pairs, "fp32"),),
            (),
            (Keep(softmax, y1),),
            needs_recording=True,
            source=f"{ops.DERIVATIVES}: _softmax",
        ),
        ops.cast(f"{n}.cast", softmax, probs, pairs, f"={q1}")._replace(
            keeps=(Keep(probs, softmax),), needs_recording=True
        ),
        *eager(name, f"{q}.last", f"{k}.last", f"{v}.last", f"{y}.last", TowerAttention("", "", rows, "")),
        ops.cat(f"{name}.cat", (y1, f"{y}.last"), y, f"{P} va vd", gradient="part"),
        ops.release_names(y1, f"{y}.last", q, k, v),
    )


def plain_attention(names: tuple[str, ...], wiring: Wiring, lead: str, bias: bool) -> tuple[Op, ...]:
    """Return attention image by image, with separate q, k and v projections and no rotation."""
    q, k, v, o = names
    return (
        *(linear(n, "v.n1", f"v.{x}", "va vd", "vh", lead=lead, bias=bias) for n, x in ((q, "q"), (k, "k"), (v, "v"))),
        *chunked("attention", "v.q", "v.k", "v.v", "v.o", wiring, IMAGE),
        linear(o, "v.o", "v.ao", "vh", "va vd", lead=lead, bias=bias),
        ops.release_names("v.o", "v.n1"),
    )


def returned_states(x: str, *more: str) -> tuple[Op, ...]:
    """Return views of the tower's last hidden states and of tensors computed from them, which the model returns."""
    return tuple(
        ops.view(f"image_outputs.{name}", name, f"{name}.returned", shape)._replace(holds="forward")
        for name, shape in ((x, f"{P} vh"), *((m, "b merged h") for m in more))
    )
