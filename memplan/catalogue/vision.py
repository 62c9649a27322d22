"""Vision-language models: a tower and a language model that reads what it makes of images in place of their tokens.

Without images the tower's weights are there, and nothing of it runs.
"""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue import delta, experts, ops
from memplan.catalogue import towers as t
from memplan.catalogue.attention import Wiring, to_images
from memplan.catalogue.gemma import alternating
from memplan.catalogue.gemma import rms_norm as gemma_norm
from memplan.catalogue.llama import decoder_block, gated_mlp, llama, llama_attention, returned, rope_and_scale
from memplan.catalogue.mixed import renamed
from memplan.catalogue.moe import either
from memplan.catalogue.towers import Tower
from memplan.families.vision import decoder_of, deepstack, intermediate, size, stretches, windowed_runs
from memplan.ir import Block, Keep, Op, Run, Scratch, Stack, Tensor, Weight
from memplan.models import ModelSpec

_QWEN = "transformers 5.24 models/qwen2_vl/modeling_qwen2_vl.py"
_DEEPSTACK = "transformers 5.24 models/qwen3_vl/modeling_qwen3_vl.py Qwen3VLTextModel._deepstack_process"
_INDEX = "torch 2.13 aten/src/ATen/native/cuda/IndexKernel.cpp masked_scatter__cuda, masked_select_out_cuda_impl"


# The two together


def skipped(operations: tuple[Op, ...]) -> tuple[Op, ...]:
    """The operations that have weights, which a run leaves out."""
    return tuple(op._replace(skipped=True, unit="", asks=False) for op in operations if op.weights)


def joined(
    wiring: Wiring, text: Stack, tower: Tower, scatter: tuple[Op, ...] = (), held: tuple[str, ...] = ()
) -> Stack:
    """The tower, and then the text's stack on what `scatter` makes (`stream`) of its embeddings `text` and `features`.

    `held`: what the model's frame refers to until its language model has returned.
    """
    if not wiring.images:
        between = tuple(op for run in tower.runs for op in run.before)
        still = tuple(
            Run(
                tuple(Block(b.name, (ops.view("skip", "x", "y", "b s h"), *skipped(b.ops))) for b in run.blocks),
                run.times,
            )
            for run in tower.runs
        )
        before = (*skipped((*tower.before, *between, *tower.after)), *text.before)
        return text._replace(before=before, runs=(*still, *text.runs))
    at = next(i for i, op in enumerate(text.before) if any(w.name == "embeds" for w in op.writes))
    inputs, *embedding = text.before[: at + 1]
    rest = renamed(text.before[at + 1 :], {"embeds": "stream"})
    first, *others = (r._replace(before=renamed(r.before, {"embeds": "stream"})) for r in text.runs)
    after = renamed(text.after, {"embeds": "stream"})
    done = next(i for i, op in enumerate(after) if op.name == "return" and "x" in op.reads)
    return text._replace(
        before=(
            inputs._replace(writes=(*inputs.writes, *tower.inputs)),
            *renamed(tuple(embedding), {"embeds": "text"}),
            *tower.before,
        ),
        runs=(*tower.runs, first._replace(before=(*tower.after, *scatter, *rest)), *others),
        after=(*after[:done], after[done]._replace(reads=(*after[done].reads, *held)), *after[done + 1 :]),
    )


def scattered(features: str = "features", joined: bool = True) -> tuple[Op, ...]:
    """Features in place of the embeddings of the tokens that stand for them.

    `joined`: they are split into images, and joined again. On the way back the mask is spread over the hidden axis, and
    every place that it marks has an index of three numbers.
    """
    shape, whole = "b merged h", "b s h"
    parts = (
        (
            ops.view("images.split", features, "images.parts", shape, gradient="new"),
            ops.copy("images.cat", "images.parts", "images.all", shape),
        )
        if joined
        else (ops.view("images.view", features, "images.all", shape),)
    )
    spread = Tensor("mask spread", whole, "bool")
    return (
        *parts,
        ops.cast("images.to", "images.all", "image_embeds", shape, "=text"),
        Op("image_mask", (), (Tensor("image_mask", "b s", "bool"),), scratch=(Tensor("video mask", "b s", "bool"),)),
        Op(
            "masked_scatter",
            ("text", "image_embeds", "image_mask"),
            (Tensor("stream", whole, "=text"),),
            (),
            (Keep("image_mask", "text"), Keep("image_mask", "image_embeds")),
            scratch=(spread, Tensor("prefix sums", whole, "int64")),
            scratch_back=(
                Scratch(spread, "image_embeds"),
                Scratch(Tensor("indices", f"3 {shape}", "int64"), "image_embeds"),
            ),
            source=_INDEX,
        ),
    )


# Qwen's language models: positions of three kinds


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
    before = tuple(_GIVEN if wiring.images and op.name == "positions" else op for op in made.before[:start])
    made = made._replace(before=(*before, *mrope_table("embeds", interleaved)))
    if interleaved and not wiring.images:
        return made
    return made._replace(runs=_without_positions(made.runs))


_GIVEN = Op("positions", (), (Tensor("positions", "3 b s", "int64"),))  # in time, height and width


def _without_positions(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    return tuple(r._replace(blocks=tuple(Block(b.name, _unplaced(b.ops)) for b in r.blocks)) for r in runs)


def _unplaced(operations: tuple[Op, ...]) -> tuple[Op, ...]:
    """Blocks that are given no positions."""
    return tuple(
        op._replace(reads=tuple(r for r in op.reads if r != "positions")) if op.name == "return" else op
        for op in operations
    )


def _qwen_before(asks: bool, bias: bool = False) -> tuple[Op, ...]:
    return (
        *t.axial_table()[:1],
        *t.convolution("visual.patch_embed.proj", "pixel_values", "embeds", f"{t.P} vh", bias, asks),
        *t.axial_table()[1:],
    )


def _qwen_after(tail: tuple[Op, ...], *more: str) -> tuple[Op, ...]:
    """From the last block to the features, which the tower returns with its last hidden states."""
    return (
        *tail,
        *t.held("x", "features", *more),
        ops.leave("v.positions", "v.cos", "v.sin", "pixel_values.cast"),
    )


def qwen2_vl(m: ModelSpec, wiring: Wiring) -> Stack:
    block = t.block("visual.blocks", t.qwen_attention(wiring), t.mlp("mlp", "v.n2", "v.mo", "quick_gelu"))
    normed = t.norm("visual.merger.ln_q", "x", "features.normed", f"{t.P} vh", "vh", "projector")
    tower = Tower(
        t.qwen_inputs(),
        _qwen_before(asks=True),
        (Run((block,), "vL1"),),
        _qwen_after(t.merger("visual.merger", "x", "features", ("mlp.0", "mlp.2"), normed)),
    )
    text = with_mrope(llama(m, wiring, bias=True, mixed=True), wiring)
    return joined(wiring, text, tower, scattered(), ("image_embeds", "image_mask"))


def qwen2_5_vl(m: ModelSpec, wiring: Wiring) -> Stack:
    """Most blocks see windows of an image: patches are put in their order at the start, and what they make back at the
    end."""
    feed = t.gated_mlp("mlp", "v.n2", "v.mo", bias=True)

    def run(i: int, whole: bool) -> Run:
        over = t.IMAGE if whole else t.WINDOW
        return Run((t.block("visual.blocks", t.qwen_attention(wiring, over), feed, t.rms_norm),), f"vL{i}")

    first, convolution, *table = _qwen_before(asks=True)
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
    merged = t.merger("visual.merger", "x", "v.merged", ("mlp.0", "mlp.2"), normed)
    back = indexed("visual.reverse", "v.merged", "features", "b merged h")
    tower = Tower(
        t.qwen_inputs(),
        ordered,
        tuple(run(i, whole) for i, (whole, _) in enumerate(windowed_runs(m), 1)),
        _qwen_after((*merged, back)),
    )
    text = with_mrope(llama(m, wiring, bias=True, mixed=True), wiring)
    return joined(wiring, text, tower, scattered(), ("image_embeds", "image_mask"))


def indexed(name: str, x: str, y: str, shape: str) -> Op:
    """Rows in another order, which is known on the host: nothing of it is kept on the GPU."""
    return Op(name, (x,), (Tensor(y, shape, f"={x}"),), source=f"{ops.DERIVATIVES}: index")


def qwen3_tower(m: ModelSpec, wiring: Wiring) -> Tower:
    """Learned positions are interpolated between four of a grid; the outputs of some blocks are merged on their own."""
    act = str(m.part("vision_config").get("hidden_act", "gelu_pytorch_tanh"))
    layers = ("linear_fc1", "linear_fc2")
    block = t.block("visual.blocks", t.qwen_attention(wiring), t.mlp("mlp", "v.n2", "v.mo", act, layers))
    shape, four = f"{t.P} vh", f"{t.P} 4 vh"
    embedding = Weight("visual.pos_embed.weight", "vpositions vh", "vision", rows=1)
    first, pixels, patches, *table = _qwen_before(asks=False, bias=True)
    before = (
        first,
        Op(
            "visual.interpolation",
            (),
            (Tensor("v.corners", f"{t.P} 4", "int64"), Tensor("v.weights", f"{t.P} 4", "fp32")),
        ),
        pixels,
        patches._replace(writes=(patches.writes[0]._replace(name="v.patches"),)),
        Op(
            "visual.pos_embed",
            ("v.corners",),
            (Tensor("v.four", four, f"={embedding.name}"),),
            (embedding,),
            (Keep("v.corners", embedding.name),),
            source=f"{ops.DERIVATIVES}: embedding",
        ),
        Op(
            "visual.pos_embed.weigh",
            ("v.four", "v.weights"),
            (Tensor("v.weighed", four, "fp32"),),
            (),
            (Keep("v.weights", "v.four"),),
            source=f"{ops.DERIVATIVES}: mul.Tensor",
        ),
        Op("visual.pos_embed.sum", ("v.weighed",), (Tensor("v.position", shape),), source=f"{ops.DERIVATIVES}: sum"),
        ops.cast("visual.pos_embed.to", "v.position", "v.place", shape, "=v.patches"),
        ops.add("visual.place", "v.patches", "v.place", "embeds", shape),
        *table,
    )
    deep = deepstack(m)
    count = len(tuple(stretches(size(m, "depth", 27), deep)))
    runs = [Run((block,), "vL1")]
    for i in range(1, count):
        name = f"visual.deepstack_merger_list.{i - 1}"
        runs.append(Run((block,), f"vL{i + 1}", (*_deep(name, i - 1), ops.cast("stream", "x", "stream", shape, "=x"))))
    normed = t.norm("visual.merger.norm", "x", "features.normed", shape, "vh", "projector")
    last = max(deep, default=-1) == size(m, "depth", 27) - 1
    tail = (*(_deep(f"visual.deepstack_merger_list.{len(deep) - 1}", len(deep) - 1) if last else ()),)
    merged = t.merger("visual.merger", "x", "features", layers, normed)
    more = tuple(f"deep{i}" for i in range(len(deep)))
    after = (*_qwen_after((*tail, *merged), *more), ops.leave("v.corners", "v.weights", "v.position"))
    return Tower(t.qwen_inputs(), before, tuple(runs), after)


def _deep(name: str, i: int) -> tuple[Op, ...]:
    """What the `i`th of some blocks made, merged; here the norm is over merged patches."""
    normed = (
        ops.view(f"{name}.shuffle", "x", f"deep{i}.shuffled", "b merged vm"),
        *t.norm(f"{name}.norm", f"deep{i}.shuffled", f"deep{i}.normed", "b merged vm", "vm", "projector"),
    )
    return t.merger(name, "x", f"deep{i}", ("linear_fc1", "linear_fc2"), normed)


def with_deepstack(m: ModelSpec, made: Stack) -> Stack:
    """After each of the language model's first blocks the merged output of one of the tower's is added to the tokens of
    images: hidden states are copied, and rows of the copy replaced."""
    (run,), deep = made.runs, range(len(deepstack(m)))
    joints = tuple(
        (
            Op(
                f"deepstack.{i}.rows",
                ("x", "image_mask"),
                (Tensor(f"deep{i}.rows", "b merged h"),),
                scratch=(Tensor("indices", "2 b merged", "int64"),),
                scratch_back=(Scratch(Tensor("indices", "2 b merged", "int64"), "x"),),
                source=_DEEPSTACK,
            ),
            ops.add(f"deepstack.{i}.add", f"deep{i}.rows", f"deep{i}.all", f"deep{i}.local", "b merged h"),
            Op(
                f"deepstack.{i}.put",
                ("x", f"deep{i}.local", "image_mask"),
                (Tensor(f"deep{i}.stream", "b s h"),),
                (),
                (Keep("image_mask", "x"), Keep("image_mask", f"deep{i}.local")),
                scratch=(Tensor("rows", "b merged h"),),
                scratch_back=(Scratch(Tensor("zeros", "b merged h", f"=deep{i}.local"), "x"),),
                source=_DEEPSTACK,
            ),
            ops.cast(f"deepstack.{i}", f"deep{i}.stream", "stream", "b s h", f"=deep{i}.stream"),
        )
        for i in deep
    )
    if not joints:
        return made
    runs = (
        Run(run.blocks, "one"),
        *(Run(run.blocks, "one", joint) for joint in joints[:-1]),
        Run(run.blocks, "after", joints[-1]),
    )
    return made._replace(runs=runs)


def _deep_embeds(m: ModelSpec) -> tuple[Op, ...]:
    """What is added, each split into images and joined again."""
    shape = "b merged h"
    return tuple(
        op
        for i in range(len(deepstack(m)))
        for op in (
            ops.view(f"deepstack.{i}.split", f"deep{i}", f"deep{i}.parts", shape, gradient="new"),
            ops.copy(f"deepstack.{i}.cat", f"deep{i}.parts", f"deep{i}.all", shape),
        )
    )


def _qwen3_vl(m: ModelSpec, wiring: Wiring, text: Stack) -> Stack:
    made = with_mrope(text, wiring, interleaved=True)
    held = ("image_embeds", "image_mask", *(f"deep{i}.all" for i in range(len(deepstack(m)))))
    made = with_deepstack(m, made) if wiring.images else made
    return joined(wiring, made, qwen3_tower(m, wiring), (*scattered(), *_deep_embeds(m)), held)


def qwen3_vl(m: ModelSpec, wiring: Wiring) -> Stack:
    bias = m.get("attention_bias", False)
    return _qwen3_vl(m, wiring, llama(m, wiring, bias=bias, out_bias=bias, qk_norm=True))


def qwen3_vl_moe(m: ModelSpec, wiring: Wiring) -> Stack:
    """Qwen3-VL with experts, of which peft adapts nothing."""
    routed = experts.softmax_router("mlp.gate", "n2", normalise=True, stands_for=())
    ffn = either(experts.mixture("n2", routed, experts.experts("n2", "mo", gate_up=(), down=())))
    bias = m.get("attention_bias", False)
    return _qwen3_vl(m, wiring, llama(m, wiring, bias=bias, out_bias=bias, qk_norm=True, mlp=ffn))


def qwen3_5(m: ModelSpec, wiring: Wiring) -> Stack:
    """Qwen3.5 with a tower like Qwen3-VL's, none of whose blocks' output goes further by itself."""
    text = delta.qwen3_5(m, wiring)
    if wiring.images:
        before = tuple(_GIVEN if op.name == "positions" else op for op in text.before)
        text = text._replace(before=before, runs=_without_positions(text.runs))
    return joined(wiring, text, qwen3_tower(m, wiring), scattered(), ("image_embeds", "image_mask"))


# Gemma 3 and Mistral 3


def gemma3(m: ModelSpec, wiring: Wiring) -> Stack:
    """SigLIP sees one size of image; what it makes is pooled and multiplied into the language model's width.

    Tokens of an image see each other, and so all layers of the language model have a mask.
    """
    lead = "b images grid"
    shape = f"{lead} vh"
    act = str(m.part("vision_config").get("hidden_act", "gelu_pytorch_tanh"))
    heads = (
        *(
            t.linear(f"self_attn.{n}_proj", "v.n1", f"v.{n}", "va vd", "vh", lead=lead, flat=False)
            for n in ("q", "k", "v")
        ),
        t.attention("self_attn", "v.q", "v.k", "v.v", "v.o", wiring.tower, t.BATCH),
        t.linear("self_attn.out_proj", "v.o", "v.ao", "vh", "va vd", lead=lead, flat=False),
        ops.leave("v.q", "v.k", "v.v", "v.o", "v.n1"),
    )
    block = t.block(
        "vision_tower.encoder.layers",
        heads,
        t.mlp("mlp", "v.n2", "v.mo", act, lead=lead, flat=False),
        t.strided_norm,
        norms=("layer_norm1", "layer_norm2"),
        lead=lead,
    )
    n = "vision_tower.embeddings"
    position = Weight(f"{n}.position_embedding.weight", "vpositions vh", "vision", rows=1)
    ids = Weight(f"{n}.position_ids", "vpositions", "buffer", "int64", False)
    before = (
        *t.convolution(f"{n}.patch_embedding", "pixel_values", "v.patches", shape, True, asks=True),
        Op(
            f"{n}.position_embedding",
            (),
            (Tensor("v.position", "vpositions vh", f"={position.name}"),),
            (position, ids),
            source=f"{ops.DERIVATIVES}: embedding",
        ),
        ops.add(n, "v.patches", "v.position", "embeds", shape),
    )
    n = "multi_modal_projector"
    weight = Weight(f"{n}.mm_input_projection_weight", "vh h", "projector", rows=1)
    pooled = "b merged vh"
    after = (
        *t.strided_norm("vision_tower.post_layernorm", "x", "v.last", shape, "vh"),
        ops.leave("x", "embeds"),
        ops.copy(f"{n}.contiguous", "v.last", "v.square", shape),
        Op(
            f"{n}.avg_pool",
            ("v.square",),
            (Tensor("v.pooled", pooled),),
            (),
            (Keep("v.square", "v.square"),),
            source=f"{ops.DERIVATIVES}: avg_pool2d",
        ),
        *t.grouped(gemma_norm(f"{n}.mm_soft_emb_norm", "v.pooled", "v.normed", pooled, "vh"), "projector"),
        ops.copy(f"{n}.reshape", "v.normed", "v.rows", pooled),
        Op(
            n,
            ("v.rows",),
            (Tensor("features", "b merged h"),),
            (weight,),
            (Keep(weight.name, "v.rows"), Keep("v.rows", weight.name)),
            autocast="lower",
            product="matrix",
            source=f"{ops.DERIVATIVES}: mm",
        ),
        *t.held("v.last", "features"),
        ops.leave("v.pooled", "v.square", "v.last", "v.normed"),
    )
    inputs = (Tensor("pixel_values", f"{lead} vin", "fp32"), Tensor("token_type_ids", "b s", "int64"))
    tower = Tower(inputs, before, (Run((block,), "vL1"),), after)
    text = alternating(m, wiring._replace(padded=wiring.padded or wiring.images), own_table=True)
    if wiring.images and not wiring.padded:
        first = text.before[0]
        given = first._replace(writes=tuple(w for w in first.writes if w.name != "attention_mask"))
        text = text._replace(before=(given, *text.before[1:]))
    return joined(wiring, text, tower, scattered(joined=False), ("image_embeds", "image_mask"))


def mistral3(m: ModelSpec, wiring: Wiring) -> Stack:
    """Pixtral: a tower like Mistral's language model, whose patches are merged four by four."""
    shape, heads, half = f"{t.P} vh", f"{t.P} va vd", f"{t.P} va vd2"
    attend = (
        *(
            op
            for n, back in (("q", "new"), ("k", "new"), ("v", "same"))
            for op in (
                t.linear(f"attention.{n}_proj", "v.n1", f"v.{n}0", "va vd", "vh", bias=False, flat=False),
                ops.view(f"attention.{n}_heads", f"v.{n}0", f"v.{n}1", heads, back),
            )
        ),
        *(op for n in "qk" for op in t.rotated(f"attention.rope_{n}", f"v.{n}1", f"v.{n}", heads, half)),
        ops.leave("v.q1", "v.k1"),
        t.attention("attention", "v.q", "v.k", "v.v1", "v.o", "efficient", t.PACKED, "v.mask"),
        t.linear("attention.o_proj", "v.o", "v.ao", "vh", "va vd", bias=False, flat=False),
        ops.leave("v.q", "v.k", "v.v1", "v.o", "v.n1"),
    )
    block = t.block(
        "vision_tower.transformer.layers",
        attend,
        t.gated_mlp("feed_forward", "v.n2", "v.mo", bias=False, flat=False),
        t.rms_norm,
        ("attention_norm", "ffn_norm"),
    )
    before = (
        *t.convolution("vision_tower.patch_conv", "pixel_values", "v.patches", shape, False, asks=True),
        ops.copy("vision_tower.cat", "v.patches", "v.packed", shape, gradient="new"),
        *t.rms_norm("vision_tower.ln_pre", "v.packed", "embeds", shape, "vh"),
        *t.axial_table("vision_tower.patch_positional_embedding", "vd2", "embeds"),
        Op("vision_tower.mask", (), (Tensor("v.mask", f"{t.P} {t.P}", "=embeds"),)),
    )
    n, bias = "multi_modal_projector", m.get("multimodal_projector_bias", False)
    g = "projector"
    after = (
        ops.leave("v.patches", "v.mask", "v.cos", "v.sin", "v.positions"),
        *t.rms_norm(f"{n}.norm", "x", "v.normed", shape, "vh", g),
        ops.view(f"{n}.patch_merger.split", "v.normed", "v.images", shape, gradient="new"),
        ops.copy(f"{n}.patch_merger.unfold", "v.images", "v.unfolded", "b merged vm", gradient="new"),
        ops.copy(f"{n}.patch_merger.cat", "v.unfolded", "v.square", "b merged vm"),
        t.linear(f"{n}.patch_merger.merging_layer", "v.square", "v.merged", "vh", "vm", g, "b merged", bias=False),
        t.linear(f"{n}.linear_1", "v.merged", "v.m1", "h", "vh", g, "b merged", bias=bias),
        ops.activation(f"{n}.act", "v.m1", "v.m2", "b merged h"),
        t.linear(f"{n}.linear_2", "v.m2", "features", "h", "h", g, "b merged", bias=bias),
        *t.held("x", "features"),
        ops.leave("v.unfolded", "v.square", "v.merged", "embeds"),
    )
    tower = Tower((Tensor("pixel_values", f"{t.P} vin", "fp32"),), before, (Run((block,), "vL1"),), after)
    text = llama(m, wiring, turn=rope_and_scale) if decoder_of(m) == "ministral3" else llama(m, wiring)
    return joined(wiring, text, tower, scattered(), ("image_embeds", "image_mask"))


# Llama 3.2

_MLLAMA = "transformers 5.24 models/mllama/modeling_mllama.py"
_ROWS, _SEEN = "b images grid vh", "b seen h"  # rows of all tiles with their padding; what the language model sees
_CLASS = "vision_model.class_embedding"  # the first parameter, whose dtype is the model's


def mllama(m: ModelSpec, wiring: Wiring) -> Stack:
    """Some layers look at the images; without any they are left out, as the tower is.

    The tower runs before the embeddings of tokens, and its blocks are never checkpointed.
    """
    attend = llama_attention(m, wiring, "n1", "ao")
    plain = decoder_block(attend, gated_mlp("n2", "mo"), held=returned(wiring))
    crossing = _crossing(m.num_key_value_heads != m.num_attention_heads, wiring)
    if not wiring.images:
        crossing = (ops.view("skip", "x", "y", "b s h"), *skipped(crossing))
    cross = Block("model.layers", crossing)
    made = llama(m, wiring)
    runs = tuple(
        Run(tuple(cross if layer.mixer == "cross_attention" else plain for layer in run.pattern), run.times)
        for run in m.runs
    )
    before = tuple(
        ops.embedding("model.embed_tokens", "ids", "embeds", "v8", "h") if op.name == "model.embed_tokens" else op
        for op in made.before
    )
    made, tower = made._replace(before=before, runs=runs), _mllama_tower(m)
    if not wiring.images:
        return joined(wiring, made, tower)
    inputs, *rest = before
    stream = {"embeds": "stream"}
    first, *others = runs
    after = renamed(made.after, stream)
    done = next(i for i, op in enumerate(after) if op.name == "return" and "x" in op.reads)
    return made._replace(
        before=(inputs._replace(writes=(*inputs.writes, *tower.inputs)), *tower.before),
        runs=(
            *tower.runs,
            first._replace(before=(*tower.after, *_cross_mask(), *renamed(tuple(rest), stream))),
            *others,
        ),
        after=(*after[:done], ops.leave(*after[done].reads, "features", "cross_mask", "rows_seen"), *after[done + 1 :]),
    )


def _crossing(grouped: bool, wiring: Wiring) -> tuple[Op, ...]:
    """A layer that attends to images: both of its branches pass a gate, and the second is zero for tokens that see no
    image."""
    g, name, shape, q, k = "attention", "cross_attn", "b s h", "b s a d", "b seen k d"
    return (
        *ops.rms_norm("input_layernorm", "x", "n1", shape, "h"),
        ops.linear(f"{name}.q_proj", "n1", "q0", "a d", "h", g),
        ops.view(f"{name}.q_heads", "q0", "q1", q, "new"),
        *ops.rms_norm(f"{name}.q_norm", "q1", "q", q, "d"),
        ops.linear(f"{name}.k_proj", "features", "k0", "k d", "h", g, lead="b seen"),
        ops.linear(f"{name}.v_proj", "features", "v", "k d", "h", g, lead="b seen"),
        ops.view(f"{name}.k_heads", "k0", "k1", k, "new"),
        *ops.rms_norm(f"{name}.k_norm", "k1", "k", k, "d"),
        ops.leave("k1"),
        *to_images(f"{name}.attention", "o", wiring, grouped, "cross_mask"),
        ops.linear(f"{name}.o_proj", "o", "ao", "h", "a d", g),
        ops.leave("q", "k", "v", "o", "n1", "q1"),
        *_gated("cross_attn_attn_gate", "ao", "ao.gated", shape, g),
        ops.add("residual_1", "x", "ao.gated", "x1", shape),
        ops.leave("ao", "ao.gated"),
        *ops.rms_norm("post_attention_layernorm", "x1", "n2", shape, "h"),
        *gated_mlp("n2", "mo"),
        Op(
            "mlp.rows_seen",
            ("mo", "rows_seen"),
            (Tensor("mo.seen", shape),),
            (),
            (Keep("rows_seen", "mo"),),
            source=f"{ops.DERIVATIVES}: mul.Tensor",
        ),
        ops.leave("mo"),
        *_gated("cross_attn_mlp_gate", "mo.seen", "mo.gated", shape, g),
        ops.add("residual_2", "x1", "mo.gated", "y", shape),
        ops.leave("mo.seen", "mo.gated"),
    )


def _gate(name: str, y: str, group: str) -> Op:
    """The tanh of a number, which keeps its output."""
    return Op(
        name,
        (),
        (Tensor(y, "1"),),
        (Weight(name, "1", group),),
        (Keep(y, name),),
        source=f"{ops.DERIVATIVES}: tanh",
    )


def _gated(name: str, x: str, y: str, shape: str, group: str = "vision") -> tuple[Op, ...]:
    """x times the tanh of a number, for whose gradient the product is made whole before it is summed."""
    gate = f"{y}.gate"
    return (
        _gate(name, gate, group),
        Op(
            f"{name}.mul",
            (gate, x),
            (Tensor(y, shape),),
            (),
            (Keep(x, gate), Keep(gate, x)),
            scratch_back=(Scratch(Tensor("product", shape, f"={y}"), gate),),
            source=f"{ops.DERIVATIVES}: mul.Tensor",
        ),
    )


def _cross_mask() -> tuple[Op, ...]:
    """What each token sees of images, in numbers of the model's dtype, and which tokens see any.

    Source: transformers 5.24 models/mllama/modeling_mllama.py _prepare_cross_attention_mask.
    """
    like, whole = f"={_CLASS}", "b s seen"
    return (
        Op("cross_mask.repeat", (), (Tensor("cross_mask.whole", whole, "int64"),), gradient="none"),
        Op("cross_mask.invert", (), (Tensor("cross_mask.inverted32", whole, "fp32"),), gradient="none"),
        ops.cast("cross_mask.to", "cross_mask.inverted32", "cross_mask.inverted", whole, like),
        ops.leave("cross_mask.inverted32"),
        Op(
            "cross_mask.fill",
            ("cross_mask.inverted",),
            (Tensor("cross_mask", whole, like),),
            scratch=(Tensor("hidden", whole, "bool"),),
            gradient="none",
            source=_MLLAMA,
        ),
        ops.leave("cross_mask.whole"),
        Op(
            "rows_seen",
            (),
            (Tensor("rows_seen", "b s 1", like),),
            scratch=(Tensor("seen", whole, "bool"),),
            gradient="none",
            source=_MLLAMA,
        ),
        ops.leave("cross_mask.inverted"),
    )


def _tile(name: str, x: str, y: str, shape: str) -> tuple[Op, ...]:
    """An embedding for every tile by the image's aspect ratio, through a gate."""
    w = Weight(f"{name}.embedding.weight", "vratios vtiles vh", "vision", rows=1)
    rows, gated = f"{y}.tiles", f"{y}.gated"
    return (
        _by_ratio(f"{name}.embedding", rows, "vtiles vh", w),
        *_gated(f"{name}.gate", rows, gated, "b images vtiles vh"),
        ops.add(f"{name}.add", x, gated, y, shape),
        ops.leave(rows, gated),
    )


def _by_ratio(name: str, y: str, shape: str, w: Weight) -> Op:
    return Op(
        name,
        ("aspect_ratio_ids",),
        (Tensor(y, f"b images {shape}", f"={w.name}"),),
        (w,),
        (Keep("aspect_ratio_ids", w.name),),
        source=f"{ops.DERIVATIVES}: embedding",
    )


def _mllama_tower(m: ModelSpec) -> Tower:
    """Tiles of an image, one sequence with its padding: layers whose output goes on from some of them, and others with
    gates."""
    n, rows = "vision_model", "b images vtiles vrows vh"
    place, table = f"{n}.gated_positional_embedding", "vratios vtiles vrows vh"
    own = Weight(_CLASS, "vh", "vision")
    position = Weight(f"{place}.embedding", "vrows vh", "vision", rows=1)
    tiles = Weight(f"{place}.tile_embedding.weight", table, "vision", rows=1)
    inner = intermediate(m)
    before = (
        *t.convolution(f"{n}.patch_embedding", "pixel_values", "v.patches", f"{t.P} vh", False, asks=True),
        *_tile(f"{n}.pre_tile_positional_embedding", "v.patches", "v.tiled", f"{t.P} vh"),
        Op(_CLASS, ("v.tiled",), (Tensor("v.classed", rows),), (own,), source=f"{ops.DERIVATIVES}: cat"),
        ops.leave("v.tiled"),
        _gate(f"{place}.gate", "v.gate", "vision"),
        Op(
            f"{place}.embedding",
            ("v.gate",),
            (Tensor("v.position", "vrows vh"),),
            (position,),
            (Keep("v.gate", position.name), Keep(position.name, "v.gate")),
            source=f"{ops.DERIVATIVES}: mul.Tensor",
        ),
        ops.add(f"{place}.add", "v.classed", "v.position", "v.placed", rows),
        _by_ratio(f"{place}.tile_embedding", "v.tiles", "vtiles vrows vh", tiles),
        *_gated(f"{place}.gate", "v.tiles", "v.tiles.gated", rows),
        ops.leave("v.classed"),
        ops.add(f"{place}.add_tiles", "v.placed", "v.tiles.gated", "v.whole", rows),
        ops.leave("v.position", "v.tiles", "v.tiles.gated", "v.placed"),
        *t.norm(f"{n}.layernorm_pre", "v.whole", "v.normed", rows, "vh"),
        ops.leave("v.whole"),
        ops.copy(f"{n}.pad", "v.normed", "embeds", _ROWS, gradient="new"),
        ops.leave("v.normed"),
        Op(f"{n}.mask.rows", (), (Tensor("v.mask.rows", "b images grid", f"={_CLASS}"),), gradient="none"),
        Op(
            f"{n}.mask",
            ("v.mask.rows",),
            (Tensor("v.mask", "b images grid grid"),),
            scratch=(Tensor("product", "b images grid grid"),),
            gradient="none",
            autocast="lower",
            source=f"{_MLLAMA} _prepare_aspect_ratio_attention_mask",
        ),
    )
    local, last = _mllama_layer("transformer", ()), _mllama_layer("global_transformer", ("gate_attn", "gate_ffn"))
    count = len(tuple(stretches(size(m, "num_hidden_layers", 32), inner)))
    states = tuple(f"v.state{i}" for i in range(len(inner)))
    # a view has the shape of what its gradient is a view of
    kept = tuple((ops.view(state, "x", state, "b images grid vinner vh"),) for state in states)
    runs = [Run((local,), "vL1")]
    for i in range(1, count):
        runs.append(Run((local,), f"vL{i + 1}", (*kept[i - 1], ops.cast("stream", "x", "stream", _ROWS, "=x"))))
    between = (
        ops.leave("embeds"),
        *(op for view in kept[count - 1 :] for op in view),
        *t.norm(f"{n}.layernorm_post", "x", "v.post", _ROWS, "vh"),
        *_tile(f"{n}.post_tile_positional_embedding", "v.post", "v.global", _ROWS),
        ops.leave("v.post"),
        ops.cast("stream", "v.global", "stream", _ROWS, "=v.global"),
    )
    runs.append(Run((last,), f"vL{count + 1}", between))
    parts = ("v.last", *(("v.inner",) if states else ()))
    stacked = (
        Op(f"{n}.stack", states, (Tensor("v.stacked", "b images grid vinner vh"),), gradient="same", source=_MLLAMA),
        ops.view(f"{n}.inner", "v.stacked", "v.inner", "b seen vo", gradient="new"),
    )
    after = (
        ops.leave("v.global"),
        ops.view(f"{n}.last", "x", "v.last", "b seen vo", gradient="new"),
        *(stacked if states else ()),
        Op(f"{n}.cat", parts, (Tensor("v.features", "b seen vo"),), gradient="same", source=_MLLAMA),
        ops.view("image_outputs", "v.features", "v.returned", "b seen vo")._replace(holds="forward"),
        ops.leave("x", "v.patches", "v.mask", *states, *(("v.stacked",) if states else ()))._replace(releases=True),
        t.linear("multi_modal_projector", "v.features", "features", "h", "vo", "projector", "b seen", flat=False),
    )
    inputs = (
        Tensor("pixel_values", f"{t.P} vin", "fp32"),
        Tensor("aspect_ratio_ids", "b images", "int64"),
        Tensor("aspect_ratio_mask", "b images vtiles", "int64"),
        Tensor("cross_attention_mask", "b s images vtiles", "int64"),
    )
    return Tower(inputs, before, tuple(runs), after)


def _mllama_layer(name: str, gates: tuple[str, ...]) -> Block:
    """A layer of the tower, which holds what each returns until its end; with `gates`, one for each of its branches."""
    lead = "b images grid"
    attend = (
        *(
            t.linear(f"self_attn.{n}_proj", "v.n1", f"v.{n}", "va vd", "vh", lead=lead, bias=False, flat=False)
            for n in ("q", "k", "v")
        ),
        t.attention("self_attn", "v.q", "v.k", "v.v", "v.o", "efficient", t.BATCH, "v.mask"),
        t.linear("self_attn.o_proj", "v.o", "v.ao", "vh", "va vd", lead=lead, bias=False, flat=False),
        ops.leave("v.q", "v.k", "v.v", "v.o", "v.n1"),
    )
    made = t.block(
        f"vision_model.{name}.layers",
        attend,
        t.mlp("mlp", "v.n2", "v.mo", "gelu", lead=lead, flat=False),
        norms=("input_layernorm", "post_attention_layernorm"),
        lead=lead,
    )
    branches = {"residual_1": (gates[0], "v.ao"), "residual_2": (gates[1], "v.mo")} if gates else {}
    operations = tuple(
        op for old in made.ops for op in (_through(old, *branches[old.name]) if old.name in branches else (old,))
    )
    held = tuple(op._replace(holds="states") if op.name == "residual_2" else op for op in operations)
    return Block(made.name, held, lasting=True)


def _through(residual: Op, gate: str, branch: str) -> tuple[Op, ...]:
    """The branch, gated, and then added."""
    gated = f"{branch}.gated"
    x, _ = residual.reads
    return (
        *_gated(gate, branch, gated, _ROWS),
        ops.leave(branch),
        residual._replace(reads=(x, gated)),
        ops.leave(gated),
    )


BUILDERS: dict[str, Callable[[ModelSpec, Wiring], Stack]] = {
    "gemma3": gemma3,
    "mistral3": mistral3,
    "mllama": mllama,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
}
