"""Gemma 4: values normalised too, wide heads where there is no window, keys that later layers reuse, embeddings in
every layer, and experts beside the dense MLP.

Source: transformers 5.24 models/gemma4/modeling_gemma4.py.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import attention, cached, mask_name, reused
from memplan.catalogue.decoder.frame import inputs as given
from memplan.catalogue.decoder.frame import masks, returned, runs
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.scaling import scaled_embedding
from memplan.catalogue.decoder.windows import after, local, tables
from memplan.catalogue.experts import experts, routers
from memplan.catalogue.families.gemma import capped_logits
from memplan.catalogue.inference.decoding import for_last
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.positions import positions
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision.uncalled_towers import gemma4_towers
from memplan.core.ir import Block, Keep, Op, Scratch, Stack, Tensor, Weight
from memplan.models.configs.gemma import REUSED, STORED
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_SOURCE = "transformers 5.24 models/gemma4/modeling_gemma4.py"
_Q, _K = "b s a d", "b s k d"

_WIDEST = 256  # a head that flash attention takes, and that sdpa repeats itself

# The axes of a layer without a window, whose heads have a width and a number of their own.
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
    """Normalised by a power of the mean, which keeps what it is a power of, and a local name does until the product is
    made; the weight is cast to fp32 every time."""
    plain = ops.rms_norm(name, x, y, shape, axis)[:-3]
    made = (_power(op, shape) if op.name == f"{name}.rsqrt" else op for op in plain)
    normalise = (*made, ops.leave(f"{y}.shifted"))
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


def query(name: str, x: str, bias: bool) -> tuple[Op, ...]:
    """q: projected, normalised head by head, rotated."""
    return (
        ops.linear(f"{name}.q_proj", x, "q0", "a d", "h", "attention", bias),
        ops.view(f"{name}.q_heads", "q0", "q1", _Q),
        *rms_norm(f"{name}.q_norm", "q1", "q2", _Q, "d"),
        ops.leave("q1"),
        *ops.rotate(f"{name}.rope_q", "q2", "q", _Q, "b s a rot2"),
        ops.leave("q2"),
    )


def key(name: str) -> tuple[Op, ...]:
    """k, from the heads `k1`: normalised, rotated."""
    return (
        *rms_norm(f"{name}.k_norm", "k1", "k2", _K, "d"),
        *ops.rotate(f"{name}.rope_k", "k2", "k", _K, "b s k rot2"),
        ops.leave("k2"),
    )


def projected(name: str, x: str, t: str, bias: bool) -> tuple[Op, ...]:
    """`k1` or `v1`: the heads as they are projected."""
    return (
        ops.linear(f"{name}.{t}_proj", x, f"{t}0", "k d", "h", "attention", bias),
        ops.view(f"{name}.{t}_heads", f"{t}0", f"{t}1", _K),
    )


def shared(sliding: bool) -> tuple[str, str]:
    """What the keys and values that later layers reuse are called, by whether those have a window."""
    return ("local_keys", "local_values") if sliding else ("keys", "values")


def attend(
    m: ModelSpec, wiring: Wiring, layer: Layer, y: str, name: str, bias: bool, wide: bool = False
) -> tuple[Op, ...]:
    """Attention of q to the layer's own keys or to those of a layer before, and the output projection.

    `wide`: heads are wider than 256.
    """
    keys, values = shared(layer.sliding) if layer.mixer == REUSED else ("k", "v")
    grouped = layer.k != m.num_attention_heads
    repeated: tuple[Op, ...] = ()
    masked = wiring.has_mask(layer.sliding)
    before = masked or wide  # transformers repeats heads itself for a mask, and for heads beyond 256
    kernel = wiring.masked if masked else wiring.backend
    spread = kernel == "efficient" and before
    if grouped and layer.k == 1 and (spread or (kernel == "eager" and not wiring.records)):
        repeated = tuple(ops.view(f"{name}.repeat_{t}", t, f"{t}.all", _Q, "new") for t in (keys, values))
        keys, values, grouped = f"{keys}.all", f"{values}.all", False  # one head is repeated without a copy
    stored = shared(layer.sliding) if layer.mixer == STORED else ()
    own = cached(f"{name}.attention", wiring, (), layer.sliding)
    again = (reused(f"{name}.attention", shared(layer.sliding), layer.sliding),) if wiring.caching else ()
    wiring = wiring._replace(caching=False)
    return (
        *(again if layer.mixer == REUSED else own),
        *(ops.view(f"{name}.store_{t}", t, kept, _K) for t, kept in zip("kv", stored, strict=False)),
        *repeated,
        *attention(
            f"{name}.attention", "q", keys, values, "o", wiring, grouped, layer.sliding, mask_name(layer.sliding)
        ),
        ops.linear(f"{name}.o_proj", "o", y, "h", "a d", "attention", bias),
    )


def wired(wiring: Wiring, width: int) -> Wiring:
    """Flash attention takes heads of up to 256."""
    flash = wiring.backend == "flash" and width > _WIDEST
    return wiring._replace(backend="efficient") if flash else wiring


def _heads(m: ModelSpec, wiring: Wiring, layer: Layer, x: str, y: str, name: str = "self_attn") -> tuple[Op, ...]:
    bias = m.get("attention_bias", False)
    same = m.get("attention_k_eq_v", False) and not layer.sliding
    wide = not layer.sliding and m.whole("global_head_dim") > _WIDEST
    made: tuple[Op, ...] = ()
    if layer.mixer != REUSED:
        v = (ops.view(f"{name}.v_is_k", "k1", "v1", _K),) if same else projected(name, x, "v", bias)
        made = (
            *projected(name, x, "k", bias),
            *v,
            *key(name),
            ops.leave("k1"),
            *rms_norm(f"{name}.v_norm", "v1", "v", _K, "d", affine=False),
            ops.leave("v1"),
        )
    own = () if layer.mixer == REUSED else ("k", "v")
    return (*query(name, x, bias), *made, *attend(m, wiring, layer, y, name, bias, wide), ops.leave("q", *own, "o", x))


def per_layer(x: str, y: str) -> tuple[Op, ...]:
    """`x` gated by what the layer has of the token's own embeddings, normalised and added to x."""
    return (
        ops.linear("per_layer_input_gate", x, "own.gate", "ple", "h", "mlp"),
        ops.activation("own.act_fn", "own.gate", "own.act", "b s ple"),
        ops.leave("own.gate"),
        ops.mul("own.product", "own.act", "per_layer", "own.gated", "b s ple"),
        ops.leave("own.act"),
        ops.linear("per_layer_projection", "own.gated", "own.out", "h", "ple", "mlp"),
        ops.leave("own.gated"),
        *rms_norm("post_per_layer_input_norm", "own.out", "own.normed", "b s h", "h"),
        ops.leave("own.out"),
        *((ops.add("residual_3", x, "own.normed", y, "b s h"), ops.leave("own.normed")) if y else ()),
    )


def own_embeddings() -> Op:
    """The layer's part of what all layers have for the token: a view, whose gradient is as wide as all of it."""
    return Op("per_layer_input", ("per_layer_inputs",), (Tensor("per_layer", "b s ple"),), view=True)


def per_layer_inputs(x: str, ids: str = "ids", buffers: bool = False, held: bool = False) -> tuple[Op, ...]:
    """What the layers have for a token: rows of a table of their own, and a projection of the token's embedding.

    `buffers`: the scales are tensors, the first multiplied in place. `held`: a frame outside has a name for the rows.
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
        ops.leave("ple.scaled"),
        ops.add("model.per_layer_inputs.add", "ple.normed", "ple.table", "ple.sum", shape),
        ops.scale("model.per_layer_inputs.scale", "ple.sum", "per_layer_inputs", shape)._replace(
            weights=second, writes=(Tensor("per_layer_inputs", shape, "=ple.sum"),)
        ),
        ops.leave("ple.normed", "ple.sum", *(() if held else ("ple.table",))),
    )


_HELD = ("router.probs", routers.SCORES, routers.CHOSEN, "ho.normed", "eo.normed")


def _router(x: str) -> tuple[Op, ...]:
    """The router's own norm and scale; what it chose is normalised, and scaled by a number of the expert's.

    Source: transformers 5.24 models/gemma4/modeling_gemma4.py Gemma4TextRouter.
    """
    scale = Weight("router.per_expert_scale", "E", "router")
    return (
        *rms_norm("router.norm", x, "router.in", "b s h", "h", affine=False),
        ops.weigh("router.scale", "router.in", "router.scaled", "b s h", Weight("router.scale", "h", "router")),
        ops.scale("router.root", "router.scaled", "router.input", "b s h"),
        ops.leave("router.in", "router.scaled"),
        ops.linear("router.proj", "router.input", "router.logits", "E", "h", "router", flat=True),
        *ops.softmax("router.softmax", "router.logits", "router.probs", "b s E", "fp32"),
        routers.top_k("router.topk", "router.probs", "router.top"),
        *routers.normalised("router.normalise", "router.top", "router.normal"),
        Op(
            "router.scale_of",
            (routers.CHOSEN,),
            (Tensor("router.own", routers.PAIRS, f"={scale.name}"),),
            (scale,),
            (Keep(routers.CHOSEN, scale.name),),
            source=f"{ops.DERIVATIVES}: index",
        ),
        ops.mul("router.weigh", "router.normal", "router.own", routers.SCORES, routers.PAIRS),
        ops.leave("router.input", "router.logits", "router.normal", "router.own"),
    )


def _mixture(x: str, y: str) -> tuple[Op, ...]:
    """What the dense MLP made and what the experts make of the same residual, each normalised, together."""
    return (
        *rms_norm("post_feedforward_layernorm_1", x, "ho.normed", "b s h", "h"),
        *_router("x1"),
        *rms_norm("pre_feedforward_layernorm_2", "x1", "n3", "b s h", "h"),
        *experts.experts("n3", "eo", "experts", gate_up=(), down=()),
        ops.leave("n3"),
        *rms_norm("post_feedforward_layernorm_2", "eo", "eo.normed", "b s h", "h"),
        ops.leave("eo"),
        ops.add("experts_and_mlp", "ho.normed", "eo.normed", y, "b s h"),
        ops.leave(x),
    )


def _text_alone(own: bool) -> tuple[Op, ...]:
    """The model for images looks for their tokens among the ids, and puts others in their place."""
    masks = tuple(Tensor(f"{what} mask", "b s", "bool") for what in ("image", "video", "audio", "any"))
    return (
        Op("model.text_ids", ("ids",), (Tensor("text.ids", "b s", "int64"),), scratch=masks, gradient="none"),
        scaled_embedding()._replace(reads=("text.ids",), keeps=(Keep("text.ids", "model.embed_tokens.weight"),)),
        *((Op("model.text_embeds", ("embeds",), (Tensor("text.embeds", "b s h"),), gradient="none"),) if own else ()),
    )


def gemma4(m: ModelSpec, wiring: Wiring, whole: bool = False) -> Stack:
    """The decoder; `whole`: as the model for images and sound calls it for a text."""
    own = m.whole("hidden_size_per_layer_input", least=0) > 0
    wide = wired(wiring, m.whole("global_head_dim"))

    # layers that cache nothing themselves are given the last token alone where no other's logits are asked for
    cuts = wiring.last_only and not wiring.decodes and wiring.backend != "flash_2"
    cuts = cuts and any(layer.mixer == REUSED for layer in m.layers)

    def block(layer: Layer) -> Block:
        last_only = cuts and layer.mixer == REUSED
        wired_ = (wiring if layer.sliding else wide)._replace(decodes=last_only or wiring.decodes)
        heads = _heads(m, wired_, layer, "n1", "ao")
        last, branch = "y1" if own else "y0", "mixed" if layer.ffn == "experts" else "mo"
        made = (
            *((own_embeddings(),) if own else ()),
            *rms_norm("input_layernorm", "x", "n1", "b s h", "h"),
            *(heads if layer.sliding else ops.with_axes(heads, GLOBAL)),
            *rms_norm("post_attention_layernorm", "ao", "ao.normed", "b s h", "h"),
            ops.leave("ao"),
            ops.add("residual_1", "x", "ao.normed", "x1", "b s h"),
            ops.leave("ao.normed"),
            *rms_norm("pre_feedforward_layernorm", "x1", "n2", "b s h", "h"),
            *ops.with_axes(gated_mlp("n2", "mo"), {"f": f"f{layer.f}"}),
            *(_mixture("mo", "mixed") if layer.ffn == "experts" else ()),
            *rms_norm("post_feedforward_layernorm", branch, "mo.normed", "b s h", "h"),
            ops.leave(branch),
            ops.add("residual_2", "x1", "mo.normed", "y0", "b s h"),
            ops.leave("mo.normed"),
            *(per_layer("y0", last) if own else ()),
            Op(
                "layer_scalar",
                (last,),
                (Tensor("y", "b s h", f"={last}"),),
                (Weight("layer_scalar", "1", "buffer", "fp32", False),),
                (Keep("layer_scalar", last),),
                view=True,
                source=f"{_SOURCE} Gemma4TextDecoderLayer: in place",
            ),
            ops.leave("positions", *returned(wiring), *(_HELD if layer.ffn == "experts" else ())),
        )
        made = for_last(made, shared(layer.sliding)) if last_only else made
        local_block = Block("model.layers", made, shared(layer.sliding) if layer.mixer == STORED else ())
        return local(local_block) if layer.sliding else local_block

    two = any(layer.sliding for layer in m.layers)
    last = after(m, wiring, True, rms_norm, two)
    last = for_last(last) if cuts else last
    return Stack(
        (
            given(wiring.padded),
            *(_text_alone(own) if whole else (scaled_embedding(),)),
            *(per_layer_inputs("embeds", "text.ids" if whole else "ids", held=whole) if own else ()),
            positions(),
            *masks(wiring, "embeds", False),
            *masks(wiring, "embeds", True),
            *ops.with_axes(tables(), GLOBAL),
            *(tables(True)[len(tables()) :] if two else ()),
        ),
        runs(m, block),
        forgotten(capped_logits(last) if m.get("final_logit_softcapping") is not None else last, m, own, whole),
    )


def forgotten(last: tuple[Op, ...], m: ModelSpec, own: bool, whole: bool = False) -> tuple[Op, ...]:
    """`last`, where what layers shared goes as the decoder returns, and what the model around it held."""
    stored = {name for layer in m.layers if layer.mixer == STORED for name in shared(layer.sliding)}
    held = ("text.ids", *(("text.embeds", "ple.table") if own else ())) if whole else ()
    names = (*sorted(stored), *(("per_layer_inputs",) if own else ()), *held)
    i = next(i for i, op in enumerate(last) if op.name == "return" and "embeds" in op.reads)
    return (*last[:i], last[i]._replace(reads=(*last[i].reads, *names)), *last[i + 1 :])


def with_towers(m: ModelSpec, wiring: Wiring) -> Stack:
    """A text read by the model for images and sound, whose towers are there."""
    return gemma4_towers(m, gemma4(m, wiring, whole=True))


BUILDERS = {"gemma4": with_towers, "gemma4_text": gemma4}
