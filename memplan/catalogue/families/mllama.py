"""Llama 3.2 Vision: a tower for image tiles, and some decoder layers that cross-attend to its output.

Source: transformers 5.24 models/mllama/modeling_mllama.py.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import to_images
from memplan.catalogue.decoder.attention import llama_attention
from memplan.catalogue.decoder.decoder import Decoder, decoder
from memplan.catalogue.decoder.encoder_decoder import cached_across
from memplan.catalogue.decoder.frame import decoder_block, returned
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import renamed, skipped
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision import towers as t
from memplan.catalogue.vision.towers import Tower
from memplan.catalogue.vision.vision import outlived, text_with_tower
from memplan.core.ir import Block, Keep, Op, Run, Stack, Tensor, Weight
from memplan.models.configs.towers import intermediate, run_lengths, size
from memplan.models.model import ModelSpec

_MLLAMA = "transformers 5.24 models/mllama/modeling_mllama.py"
_ROWS, _SEEN = "b images grid vh", "b seen h"  # rows of all tiles, padded; rows that the language model sees
_CLASS = "vision_model.class_embedding"  # the first parameter, whose dtype counts as the model's


def mllama(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Llama 3.2 Vision. Without images, its cross-attention layers are skipped, and so is its tower.

    The tower runs before the token embeddings, and its blocks are never checkpointed.
    """
    attend = llama_attention(m, wiring, "n1", "ao")
    sees = wiring.images and not wiring.has_cross_cache
    given = ("features", "cross_mask", "rows_seen") if sees else ()  # to every layer, whose checkpoint references it
    plain = decoder_block(attend, gated_mlp("n2", "mo"), held=(*returned(wiring), *given))
    cross_ops = _cross_attention(m.num_key_value_heads != m.num_attention_heads, wiring)
    if not (wiring.images or wiring.has_cross_cache):
        cross_ops = (ops.view("skip", "x", "y", "b s h"), *skipped(cross_ops))
    cross = Block("model.layers", cross_ops)
    text = decoder(m, wiring, Decoder(mlp_bias="mlp_bias"))
    runs = tuple(
        Run(tuple(cross if layer.mixer == "cross_attention" else plain for layer in run.pattern), run.times)
        for run in m.runs
    )
    before = tuple(
        ops.embedding("model.embed_tokens", "ids", "embeds", "v8", "h") if op.name == "model.embed_tokens" else op
        for op in text.before
    )
    text, tower = text._replace(before=before, runs=runs), _mllama_tower(m, wiring)
    if not (wiring.images or wiring.has_cross_cache):
        return text_with_tower(wiring, text, tower)
    inputs, *rest = before
    if wiring.has_cross_cache:
        all_inputs = inputs._replace(writes=(*inputs.writes, *(_generation_input(t) for t in tower.inputs), _ROW))
        return text._replace(
            before=(all_inputs, *skipped(tower.before), *_cross_mask(), *rest),
            after=outlived(text.after, ("cross_mask", "rows_seen")),
        )
    stream = {"embeds": "stream"}
    first, *others = runs
    return text._replace(
        before=(inputs._replace(writes=(*inputs.writes, *tower.inputs)), *tower.before),
        runs=(
            *tower.runs,
            first._replace(before=(*tower.after, *_cross_mask(), *renamed(tuple(rest), stream))),
            *others,
        ),
        after=outlived(renamed(text.after, stream), ("features", "cross_mask", "rows_seen")),
    )


# What one token sees of the images, in addition to the mask of all tokens.
_ROW = Tensor("cross_attention_mask of a token", "b s images vtiles", "int64")


def _generation_input(t: Tensor) -> Tensor:
    """Return an input in the shape generation keeps: the mask over images grows by a row for every token.

    Source: transformers 5.24 models/mllama/modeling_mllama.py _update_model_kwargs_for_generation.
    """
    return t._replace(shape="b kv images vtiles") if t.name == "cross_attention_mask" else t


def _cross_attention(grouped: bool, wiring: Wiring) -> tuple[Op, ...]:
    """A cross-attention layer. Both branches are gated; the second is zero for tokens that see no image.

    Once the keys and values of the images are cached, they are not computed again.
    """
    g, name, shape, q, k = "attention", "cross_attn", "b s h", "b s a d", "b seen k d"
    key_value_ops = (
        ops.linear(f"{name}.k_proj", "features", "k0", "k d", "h", g, lead="b seen"),
        ops.linear(f"{name}.v_proj", "features", "v", "k d", "h", g, lead="b seen"),
        ops.view(f"{name}.k_heads", "k0", "k1", k, "new"),
        *ops.rms_norm(f"{name}.k_norm", "k1", "k", k, "d"),
        ops.release_names("k1"),
    )
    cache = cached_across(f"{name}.attention", "q", wiring.has_cross_cache, k) if wiring.caching else ()
    return (
        *ops.rms_norm("input_layernorm", "x", "n1", shape, "h"),
        ops.linear(f"{name}.q_proj", "n1", "q0", "a d", "h", g),
        ops.view(f"{name}.q_heads", "q0", "q1", q, "new"),
        *ops.rms_norm(f"{name}.q_norm", "q1", "q", q, "d"),
        *(skipped(key_value_ops) if wiring.has_cross_cache else key_value_ops),
        *cache,
        *to_images(f"{name}.attention", "o", wiring, grouped, "cross_mask"),
        ops.linear(f"{name}.o_proj", "o", "ao", "h", "a d", g),
        ops.release_names("q", "k", "v", "o", "n1", "q1"),
        *_gated("cross_attn_attn_gate", "ao", "ao.gated", shape, g),
        ops.add("residual_1", "x", "ao.gated", "x1", shape),
        ops.release_names("ao", "ao.gated"),
        *ops.rms_norm("post_attention_layernorm", "x1", "n2", shape, "h"),
        *gated_mlp("n2", "mo"),
        ops.with_constant("mlp.rows_seen", "mo", "rows_seen", "mo.seen", shape, "mul.Tensor"),
        ops.release_names("mo"),
        *_gated("cross_attn_mlp_gate", "mo.seen", "mo.gated", shape, g),
        ops.add("residual_2", "x1", "mo.gated", "y", shape),
        ops.release_names("mo.seen", "mo.gated"),
    )


def _gate(name: str, y: str, group: str) -> Op:
    """The tanh of a scalar parameter, which keeps its output."""
    return Op(
        name,
        (),
        (Tensor(y, "1"),),
        (Weight(name, "1", group),),
        (Keep(y, name),),
        source=f"{ops.DERIVATIVES}: tanh",
    )


def _gated(name: str, x: str, y: str, shape: str, group: str = "vision") -> tuple[Op, ...]:
    """x times the tanh of a scalar. For its gradient the product is materialised before it is summed."""
    gate = f"{y}.gate"
    return (
        _gate(name, gate, group),
        ops.spread(f"{name}.mul", x, gate, y, shape, small_first=True),
    )


def _cross_mask() -> tuple[Op, ...]:
    """The mask over images for each token, in the model's dtype, and which tokens see any image.

    Source: transformers 5.24 models/mllama/modeling_mllama.py _prepare_cross_attention_mask.
    """
    like, shape = f"={_CLASS}", "b s seen"
    return (
        Op("cross_mask.repeat", (), (Tensor("cross_mask.whole", shape, "int64"),), gradient="none"),
        Op("cross_mask.invert", (), (Tensor("cross_mask.inverted32", shape, "fp32"),), gradient="none"),
        ops.cast("cross_mask.to", "cross_mask.inverted32", "cross_mask.inverted", shape, like),
        ops.release_names("cross_mask.inverted32"),
        Op(
            "cross_mask.fill",
            ("cross_mask.inverted",),
            (Tensor("cross_mask", shape, like),),
            scratch=(Tensor("hidden", shape, "bool"),),
            gradient="none",
            source=_MLLAMA,
        ),
        ops.release_names("cross_mask.whole"),
        Op(
            "rows_seen",
            (),
            (Tensor("rows_seen", "b s 1", like),),
            scratch=(Tensor("seen", shape, "bool"),),
            gradient="none",
            source=_MLLAMA,
        ),
        ops.release_names("cross_mask.inverted"),
    )


def _add_tile_embedding(name: str, x: str, y: str, shape: str) -> tuple[Op, ...]:
    """Add an embedding for every tile, looked up by the image's aspect ratio and gated."""
    w = Weight(f"{name}.embedding.weight", "vratios vtiles vh", "vision", rows=1)
    rows, gated = f"{y}.tiles", f"{y}.gated"
    return (
        _by_ratio(f"{name}.embedding", rows, "vtiles vh", w),
        *_gated(f"{name}.gate", rows, gated, "b images vtiles vh"),
        ops.add(f"{name}.add", x, gated, y, shape),
        ops.release_names(rows, gated),
    )


def _by_ratio(name: str, y: str, shape: str, w: Weight) -> Op:
    return ops.lookup(name, "aspect_ratio_ids", y, f"b images {shape}", w)


def _mllama_tower(m: ModelSpec, wiring: Wiring) -> Tower:
    """The tower. The tiles of an image are one padded sequence; some local layers' outputs are also returned.

    Global layers, whose branches are gated, follow the local ones.
    """
    n, rows = "vision_model", "b images vtiles vrows vh"
    place, table = f"{n}.gated_positional_embedding", "vratios vtiles vrows vh"
    class_embedding = Weight(_CLASS, "vh", "vision")
    position = Weight(f"{place}.embedding", "vrows vh", "vision", rows=1)
    tiles = Weight(f"{place}.tile_embedding.weight", table, "vision", rows=1)
    inner = intermediate(m)
    before = (
        *t.convolution(f"{n}.patch_embedding", "pixel_values", "v.patches", f"{t.P} vh", False, asks=True),
        *_add_tile_embedding(f"{n}.pre_tile_positional_embedding", "v.patches", "v.tiled", f"{t.P} vh"),
        Op(_CLASS, ("v.tiled",), (Tensor("v.classed", rows),), (class_embedding,), source=f"{ops.DERIVATIVES}: cat"),
        ops.release_names("v.tiled"),
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
        ops.release_names("v.classed"),
        ops.add(f"{place}.add_tiles", "v.placed", "v.tiles.gated", "v.whole", rows),
        ops.release_names("v.position", "v.tiles", "v.tiles.gated", "v.placed"),
        *t.norm(f"{n}.layernorm_pre", "v.whole", "v.normed", rows, "vh"),
        ops.release_names("v.whole"),
        ops.copy(f"{n}.pad", "v.normed", "embeds", _ROWS, gradient="new"),
        ops.release_names("v.normed"),
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
    local = _mllama_layer("transformer", (), wiring)
    last = _mllama_layer("global_transformer", ("gate_attn", "gate_ffn"), wiring)
    count = len(tuple(run_lengths(size(m, "num_hidden_layers"), inner)))
    states = tuple(f"v.state{i}" for i in range(len(inner)))
    # each view is declared in the shape of the tensor that its gradient is a view of
    kept = tuple((ops.view(state, "x", state, "b images grid vinner vh"),) for state in states)
    runs = [Run((local,), "vL1")]
    for i in range(1, count):
        runs.append(Run((local,), f"vL{i + 1}", (*kept[i - 1], ops.cast("stream", "x", "stream", _ROWS, "=x"))))
    between = (
        ops.release_names("embeds"),
        *(op for view in kept[count - 1 :] for op in view),
        *t.norm(f"{n}.layernorm_post", "x", "v.post", _ROWS, "vh"),
        *_add_tile_embedding(f"{n}.post_tile_positional_embedding", "v.post", "v.global", _ROWS),
        ops.release_names("v.post"),
        ops.cast("stream", "v.global", "stream", _ROWS, "=v.global"),
    )
    runs.append(Run((last,), f"vL{count + 1}", between))
    parts = ("v.last", *(("v.inner",) if states else ()))
    stacked = (
        Op(f"{n}.stack", states, (Tensor("v.stacked", "b images grid vinner vh"),), gradient="same", source=_MLLAMA),
        ops.view(f"{n}.inner", "v.stacked", "v.inner", "b seen vo", gradient="new"),
    )
    after = (
        ops.release_names("v.global"),
        ops.view(f"{n}.last", "x", "v.last", "b seen vo", gradient="new"),
        *(stacked if states else ()),
        Op(f"{n}.cat", parts, (Tensor("v.features", "b seen vo"),), gradient="same", source=_MLLAMA),
        ops.view("image_outputs", "v.features", "v.returned", "b seen vo")._replace(holds="forward"),
        ops.release_names("x", "v.patches", "v.mask", *states, *(("v.stacked",) if states else ()))._replace(
            releases="states"
        ),
        t.linear("multi_modal_projector", "v.features", "features", "h", "vo", "projector", "b seen", flat=False),
    )
    inputs = (
        Tensor("pixel_values", f"{t.P} vin", "fp32"),
        Tensor("aspect_ratio_ids", "b images", "int64"),
        Tensor("aspect_ratio_mask", "b images vtiles", "int64"),
        Tensor("cross_attention_mask", "b s images vtiles", "int64"),
    )
    return Tower(inputs, before, tuple(runs), after)


def _mllama_layer(name: str, gates: tuple[str, ...], wiring: Wiring) -> Block:
    """A layer of the tower, which holds all layers' outputs to its end. `gates` has one per branch, or none."""
    lead = "b images grid"
    attend = (
        *(
            t.linear(f"self_attn.{n}_proj", "v.n1", f"v.{n}", "va vd", "vh", lead=lead, bias=False, flat=False)
            for n in ("q", "k", "v")
        ),
        *t.joint_attention("self_attn", "v.q", "v.k", "v.v", "v.o", wiring, mask="v.mask"),
        t.linear("self_attn.o_proj", "v.o", "v.ao", "vh", "va vd", lead=lead, bias=False, flat=False),
        ops.release_names("v.q", "v.k", "v.v", "v.o", "v.n1"),
    )
    layer = t.block(
        f"vision_model.{name}.layers",
        attend,
        t.mlp("mlp", "v.n2", "v.mo", "gelu", lead=lead, flat=False),
        norms=("input_layernorm", "post_attention_layernorm"),
        lead=lead,
        held=t.returned(wiring),
    )
    branches = {"residual_1": (gates[0], "v.ao"), "residual_2": (gates[1], "v.mo")} if gates else {}
    operations = tuple(
        op
        for old in layer.ops
        for op in (_gated_residual(old, *branches[old.name]) if old.name in branches else (old,))
    )
    held = tuple(op._replace(holds="states") if op.name == "residual_2" else op for op in operations)
    return Block(layer.name, held, never_checkpointed=True)


def _gated_residual(residual: Op, gate: str, branch: str) -> tuple[Op, ...]:
    """Gate the branch before it is added."""
    gated = f"{branch}.gated"
    x, _ = residual.reads
    return (
        *_gated(gate, branch, gated, _ROWS),
        ops.release_names(branch),
        residual._replace(reads=(x, gated)),
        ops.release_names(gated),
    )


BUILDERS = {"mllama": mllama}
