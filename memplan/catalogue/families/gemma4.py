"""Gemma 4: normalised values, wide heads in full-attention layers, reused keys, per-layer embeddings, experts.

Experts, if there are any, come in addition to the dense MLP.

Source: transformers 5.24 models/gemma4/modeling_gemma4.py.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import KEYS, QUERIES, attention, cached, mask_name, read_shared_cache
from memplan.catalogue.decoder.frame import (
    after,
    inputs,
    local,
    masks,
    returned,
    rotary_tables,
    runs,
    table_names,
)
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.scaling import scaled_embedding
from memplan.catalogue.experts import experts, routers
from memplan.catalogue.families.gemma import capped_logits
from memplan.catalogue.inference.decoding import for_last
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.positions import positions
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Scratch, Stack, Tensor, Weight
from memplan.models.configs.gemma import REUSED, STORED
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_SOURCE = "transformers 5.24 models/gemma4/modeling_gemma4.py"

_WIDEST = 256  # widest head that flash attention takes, and that sdpa attention repeats by itself

# Axes of a full-attention layer, whose heads differ in width and number from a sliding-window layer's.
GLOBAL = {
    "d": "dg",
    "k": "kg",
    "rot": "dg",
    "rot2": "dg2",
    "d32": "dg32",
    "efficient_workspace": "efficient_workspace.dg",
    "efficient_fp32": "efficient_fp32.dg",
}


def rms_norm(name: str, x: str, y: str, shape: str, axis: str, affine: bool = True) -> tuple[Op, ...]:
    """RMSNorm that raises the mean square to a power and casts the weight to fp32 in every call.

    The power keeps its input, which a local variable also holds until the product is made.
    """
    plain = ops.rms_norm(name, x, y, shape, axis)[:-3]
    with_power = (_power(op, shape) if op.name == f"{name}.rsqrt" else op for op in plain)
    normalise = (*with_power, ops.release_names(f"{y}.shifted"))
    n32, factor, y32 = f"{y}.n32", f"{y}.factor", f"{y}.y32"
    if not affine:
        return (*normalise, ops.cast(f"{name}.type_as", n32, y, shape, f"={x}"))
    return (
        *normalise,
        Op(
            f"{name}.float_weight",
            (),
            (Tensor(factor, axis, "fp32"),),
            (Weight(f"{name}.weight", axis, "norm"),),
            cast=True,
            source=f"{_SOURCE} Gemma4RMSNorm",
        ),
        ops.spread(f"{name}.weight", n32, factor, y32, shape),
        ops.cast(f"{name}.type_as", y32, y, shape, f"={x}"),
    )


def _power(op: Op, shape: str) -> Op:
    row = shape.rsplit(" ", 1)[0]
    (x,) = op.reads
    return op._replace(
        name=f"{op.name.removesuffix('.rsqrt')}.pow_half",
        keeps=(Keep(x, x),),
        scratch_back=(Scratch(Tensor("power", row, "fp32")), Scratch(Tensor("times exponent", row, "fp32"))),
        source=f"{ops.DERIVATIVES}: pow.Tensor_Scalar",
    )


def project_query(name: str, x: str, bias: bool) -> tuple[Op, ...]:
    """q: projected, normalised head by head, rotated."""
    return (
        ops.linear(f"{name}.q_proj", x, "q0", "a d", "h", "attention", bias),
        ops.view(f"{name}.q_heads", "q0", "q1", QUERIES),
        *rms_norm(f"{name}.q_norm", "q1", "q2", QUERIES, "d"),
        ops.release_names("q1"),
        *ops.rotate(f"{name}.rope_q", "q2", "q", QUERIES, "b s a rot2"),
        ops.release_names("q2"),
    )


def project_key(name: str) -> tuple[Op, ...]:
    """k, from the projected heads `k1`: normalised, rotated."""
    return (
        *rms_norm(f"{name}.k_norm", "k1", "k2", KEYS, "d"),
        *ops.rotate(f"{name}.rope_k", "k2", "k", KEYS, "b s k rot2"),
        ops.release_names("k2"),
    )


def project_heads(name: str, x: str, t: str, bias: bool) -> tuple[Op, ...]:
    """The projected heads `k1` or `v1`, not yet normalised."""
    return (
        ops.linear(f"{name}.{t}_proj", x, f"{t}0", "k d", "h", "attention", bias),
        ops.view(f"{name}.{t}_heads", f"{t}0", f"{t}1", KEYS),
    )


def shared_names(sliding: bool) -> tuple[str, str]:
    """Return the names of the keys and values that later layers, sliding-window or full-attention ones, reuse."""
    return ("local_keys", "local_values") if sliding else ("keys", "values")


def shared_attention(
    m: ModelSpec, wiring: Wiring, layer: Layer, y: str, name: str, bias: bool, wide: bool = False
) -> tuple[Op, ...]:
    """Attention of q to the layer's keys or an earlier layer's, and the output projection.

    `wide`: heads are wider than 256.
    """
    keys, values = shared_names(layer.sliding) if layer.mixer == REUSED else ("k", "v")
    grouped = layer.k != m.num_attention_heads
    repeated: tuple[Op, ...] = ()
    masked = wiring.has_mask(layer.sliding)
    repeats_first = masked or wide  # transformers repeats heads itself for a mask, or if they are wider than 256
    kernel = wiring.masked if masked else wiring.backend
    expands_by_view = kernel == "efficient" and repeats_first
    if grouped and layer.k == 1 and (expands_by_view or kernel == "eager"):
        repeated = tuple(ops.view(f"{name}.repeat_{t}", t, f"{t}.all", QUERIES, "new") for t in (keys, values))
        keys, values, grouped = f"{keys}.all", f"{values}.all", False  # expanding a single head makes no copy
    stored = shared_names(layer.sliding) if layer.mixer == STORED else ()
    cache_ops = cached(f"{name}.attention", wiring, (), layer.sliding)
    reuse_ops = (
        (read_shared_cache(f"{name}.attention", shared_names(layer.sliding), layer.sliding),) if wiring.caching else ()
    )
    wiring = wiring._replace(caching=False)
    return (
        *(reuse_ops if layer.mixer == REUSED else cache_ops),
        *(ops.view(f"{name}.store_{t}", t, kept, KEYS) for t, kept in zip("kv", stored, strict=False)),
        *repeated,
        *attention(
            f"{name}.attention", "q", keys, values, "o", wiring, grouped, layer.sliding, mask_name(layer.sliding)
        ),
        ops.linear(f"{name}.o_proj", "o", y, "h", "a d", "attention", bias),
    )


def wired(wiring: Wiring, width: int) -> Wiring:
    """Return the wiring for heads of `width`; flash attention takes heads of up to 256."""
    flash = wiring.backend == "flash" and width > _WIDEST
    return wiring._replace(backend="efficient") if flash else wiring


def _heads(m: ModelSpec, wiring: Wiring, layer: Layer, x: str, y: str, name: str = "self_attn") -> tuple[Op, ...]:
    bias = m.get("attention_bias", False)
    keys_are_values = m.get("attention_k_eq_v", False) and not layer.sliding
    wide = not layer.sliding and m.config_int("global_head_dim") > _WIDEST
    key_value_ops: tuple[Op, ...] = ()
    if layer.mixer != REUSED:
        v = (ops.view(f"{name}.v_is_k", "k1", "v1", KEYS),) if keys_are_values else project_heads(name, x, "v", bias)
        key_value_ops = (
            *project_heads(name, x, "k", bias),
            *v,
            *project_key(name),
            ops.release_names("k1"),
            *rms_norm(f"{name}.v_norm", "v1", "v", KEYS, "d", affine=False),
            ops.release_names("v1"),
        )
    held_names = () if layer.mixer == REUSED else ("k", "v")
    return (
        *project_query(name, x, bias),
        *key_value_ops,
        *shared_attention(m, wiring, layer, y, name, bias, wide),
        ops.release_names("q", *held_names, "o", x),
    )


def per_layer(x: str, y: str) -> tuple[Op, ...]:
    """Gate `x` by the layer's slice of the per-layer embeddings, project, normalise, and add it to x."""
    return (
        *gated_embedding(x),
        ops.add("residual_3", x, "own.normed", y, "b s h"),
        ops.release_names("own.normed"),
    )


def gated_embedding(x: str, *leaving: str) -> tuple[Op, ...]:
    """Gate `x` by the layer's slice of the per-layer embeddings, project and normalise it; x may be `leaving`."""
    return (
        ops.linear("per_layer_input_gate", x, "own.gate", "ple", "h", "mlp"),
        *((ops.release_names(*leaving),) if leaving else ()),
        ops.activation("own.act_fn", "own.gate", "own.act", "b s ple"),
        ops.release_names("own.gate"),
        ops.mul("own.product", "own.act", "per_layer", "own.gated", "b s ple"),
        ops.release_names("own.act"),
        ops.linear("per_layer_projection", "own.gated", "own.out", "h", "ple", "mlp"),
        ops.release_names("own.gated"),
        *rms_norm("post_per_layer_input_norm", "own.out", "own.normed", "b s h", "h"),
        ops.release_names("own.out"),
    )


def layer_embedding() -> Op:
    """The layer's slice of the per-layer embeddings: a view, whose gradient is as wide as all of them."""
    return Op("per_layer_input", ("per_layer_inputs",), (Tensor("per_layer", "b s ple"),), view=True)


def per_layer_inputs(x: str, ids: str = "ids", buffers: bool = False, held: bool = False) -> tuple[Op, ...]:
    """Per-layer embeddings: rows of a separate table, plus a projection of the token's embedding.

    buffers  the scales are tensors, and the first multiplies in place
    held     a calling function also holds the table's rows
    """
    table = ops.embedding("model.embed_tokens_per_layer", ids, "ple.table", "v_ple", "all_ple")
    (lookup,) = ops.with_axes((table,), {"h32": "all_ple32"})
    unscaled = Tensor("unscaled", "b s all_ple", f"={lookup.weights[0].name}")
    factor = Weight("model.embed_tokens_per_layer.embed_scale", "", "buffer", "fp32", False)
    first, second = (
        ((Weight(f"model.{n}", "", "buffer", "fp32", False),) if buffers else ())
        for n in ("per_layer_projection_scale", "per_layer_input_scale")
    )
    name, wide, shape = "model.per_layer_model_projection", "b s all_ple", "b s layers ple"
    return (
        lookup._replace(weights=(*lookup.weights, factor), scratch=(unscaled,)),
        ops.linear(name, x, "ple.projected", "all_ple", "h", "mlp"),
        ops.scale(f"{name}.scale", "ple.projected", "ple.scaled", wide)._replace(
            view=buffers, weights=first, writes=(Tensor("ple.scaled", wide, "=ple.projected"),)
        ),
        ops.view(f"{name}.layers", "ple.scaled", "ple.split", shape),
        *rms_norm("model.per_layer_projection_norm", "ple.split", "ple.normed", shape, "ple"),
        ops.release_names("ple.scaled"),
        ops.add("model.per_layer_inputs.add", "ple.normed", "ple.table", "ple.sum", shape),
        ops.scale("model.per_layer_inputs.scale", "ple.sum", "per_layer_inputs", shape)._replace(
            weights=second, writes=(Tensor("per_layer_inputs", shape, "=ple.sum"),)
        ),
        ops.release_names("ple.normed", "ple.sum", *(() if held else ("ple.table",))),
    )


_HELD = ("router.probs", routers.SCORES, routers.CHOSEN, "ho.normed", "eo.normed")


def _router(x: str) -> tuple[Op, ...]:
    """A router with its own norm and scale. Selected scores are normalised, and multiplied by a number per expert.

    Source: transformers 5.24 models/gemma4/modeling_gemma4.py Gemma4TextRouter.
    """
    scale = Weight("router.per_expert_scale", "E", "router")
    return (
        *rms_norm("router.norm", x, "router.in", "b s h", "h", affine=False),
        ops.multiply_weight(
            "router.scale", "router.in", "router.scaled", "b s h", Weight("router.scale", "h", "router")
        ),
        ops.scale("router.root", "router.scaled", "router.input", "b s h"),
        ops.release_names("router.in", "router.scaled"),
        ops.linear("router.proj", "router.input", "router.logits", "E", "h", "router", flat=True),
        *ops.softmax("router.softmax", "router.logits", "router.probs", "b s E", "fp32"),
        routers.top_k("router.topk", "router.probs", "router.top"),
        *routers.normalised("router.normalise", "router.top", "router.normal"),
        ops.lookup("router.scale_of", routers.CHOSEN, "router.own", routers.PAIRS, scale, "index"),
        ops.mul("router.weigh", "router.normal", "router.own", routers.SCORES, routers.PAIRS),
        ops.release_names("router.input", "router.logits", "router.normal", "router.own"),
    )


def _mixture(x: str, y: str) -> tuple[Op, ...]:
    """The outputs of the dense MLP and of the experts for the same residual, each normalised, and added."""
    return (
        *rms_norm("post_feedforward_layernorm_1", x, "ho.normed", "b s h", "h"),
        *_router("x1"),
        *rms_norm("pre_feedforward_layernorm_2", "x1", "n3", "b s h", "h"),
        *experts.experts("n3", "eo", "experts", gate_up=(), down=()),
        ops.release_names("n3"),
        *rms_norm("post_feedforward_layernorm_2", "eo", "eo.normed", "b s h", "h"),
        ops.release_names("eo"),
        ops.add("experts_and_mlp", "ho.normed", "eo.normed", y, "b s h"),
        ops.release_names(x),
    )


_MASKS = ("image_mask", "video_mask", "audio_mask", "any_mask")


def _text_embeddings(has_per_layer: bool) -> tuple[Op, ...]:
    """The multimodal model's embedding of a text: it looks for image tokens among the ids, and replaces them."""
    masks = tuple(Tensor(name, "b s", "bool") for name in _MASKS)
    return (
        Op("model.text_ids", ("ids",), (Tensor("text.ids", "b s", "int64"), *masks), gradient="none"),
        scaled_embedding()._replace(reads=("text.ids",), keeps=(Keep("text.ids", "model.embed_tokens.weight"),)),
        *(
            (Op("model.text_embeds", ("embeds",), (Tensor("text.embeds", "b s h"),), gradient="none"),)
            if has_per_layer
            else ()
        ),
    )


def gemma4(m: ModelSpec, wiring: Wiring, is_multimodal: bool = False, is_blockwise: bool = False) -> Stack:
    """Build the text decoder.

    is_multimodal  as the model for images and sound calls it
    is_blockwise   tokens of an image attend to each other in layers with a window, which then have a mask of every row
    """
    narrow = wiring._replace(padded=wiring.padded or is_blockwise)
    block_ids = (Op("blocks", (), (Tensor("blocks", "b s", "int64"),), gradient="none"),) if is_blockwise else ()
    made = (*masks(wiring, "embeds", False), *masks(narrow, "embeds", True))
    has_per_layer = m.config_int("hidden_size_per_layer_input", least=0) > 0
    wide = wired(wiring, m.config_int("global_head_dim"))

    # layers that cache nothing run on the last token only, if only its logits are needed
    cuts = wiring.last_only and not wiring.decodes and wiring.backend != "flash_2"
    cuts = cuts and any(layer.mixer == REUSED for layer in m.layers)

    def block(layer: Layer) -> Block:
        last_only = cuts and layer.mixer == REUSED
        layer_wiring = (narrow if layer.sliding else wide)._replace(decodes=last_only or wiring.decodes)
        heads = _heads(m, layer_wiring, layer, "n1", "ao")
        last, branch = "y1" if has_per_layer else "y0", "mixed" if layer.ffn == "experts" else "mo"
        operations = (
            *((layer_embedding(),) if has_per_layer else ()),
            *rms_norm("input_layernorm", "x", "n1", "b s h", "h"),
            *(heads if layer.sliding else ops.with_axes(heads, GLOBAL)),
            *rms_norm("post_attention_layernorm", "ao", "ao.normed", "b s h", "h"),
            ops.release_names("ao"),
            ops.add("residual_1", "x", "ao.normed", "x1", "b s h"),
            ops.release_names("ao.normed"),
            *rms_norm("pre_feedforward_layernorm", "x1", "n2", "b s h", "h"),
            *ops.with_axes(gated_mlp("n2", "mo"), {"f": f"f{layer.f}"}),
            *(_mixture("mo", "mixed") if layer.ffn == "experts" else ()),
            *rms_norm("post_feedforward_layernorm", branch, "mo.normed", "b s h", "h"),
            ops.release_names(branch),
            ops.add("residual_2", "x1", "mo.normed", "y0", "b s h"),
            ops.release_names("mo.normed"),
            *(per_layer("y0", last) if has_per_layer else ()),
            Op(
                "layer_scalar",
                (last,),
                (Tensor("y", "b s h", f"={last}"),),
                (Weight("layer_scalar", "1", "buffer", "fp32", False),),
                (Keep("layer_scalar", last),),
                view=True,
                source=f"{_SOURCE} Gemma4TextDecoderLayer: in place",
            ),
            ops.release_names("positions", *returned(wiring), *(_HELD if layer.ffn == "experts" else ())),
        )
        operations = for_last(operations, shared_names(layer.sliding)) if last_only else operations
        layer_block = Block("model.layers", operations, shared_names(layer.sliding) if layer.mixer == STORED else ())
        return local(layer_block) if layer.sliding else layer_block

    has_sliding = any(layer.sliding for layer in m.layers)
    last = after(m, wiring, norm=rms_norm, table=table_names(has_sliding), made=(*made, *block_ids))
    last = for_last(last) if cuts else last
    return Stack(
        (
            inputs(wiring.padded),
            *(_text_embeddings(has_per_layer) if is_multimodal else (scaled_embedding(),)),
            *(
                per_layer_inputs("embeds", "text.ids" if is_multimodal else "ids", held=is_multimodal)
                if has_per_layer
                else ()
            ),
            positions(),
            *block_ids,
            *made,
            *ops.with_axes(rotary_tables(), GLOBAL),
            *(rotary_tables(True)[len(rotary_tables()) :] if has_sliding else ()),
        ),
        runs(m, block),
        release_shared(
            capped_logits(last) if m.get("final_logit_softcapping") is not None else last,
            m,
            has_per_layer,
            is_multimodal,
        ),
    )


def release_shared(last: tuple[Op, ...], m: ModelSpec, has_per_layer: bool, whole: bool = False) -> tuple[Op, ...]:
    """Return `last` with shared keys and values released when the decoder returns.

    `whole`: what the multimodal model holds is released as well.
    """
    stored = {name for layer in m.layers if layer.mixer == STORED for name in shared_names(layer.sliding)}
    held = ("text.ids", *_MASKS, *(("text.embeds", "ple.table") if has_per_layer else ())) if whole else ()
    names = (*sorted(stored), *(("per_layer_inputs",) if has_per_layer else ()), *held)
    i = next(i for i, op in enumerate(last) if op.name == "return" and "embeds" in op.reads)
    return (*last[:i], last[i]._replace(reads=(*last[i].reads, *names)), *last[i + 1 :])


BUILDERS = {"gemma4_text": gemma4, "gemma4_unified_text": gemma4}
