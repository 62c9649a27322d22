"""Llama and the families that are written like it: RMSNorm before, gated MLP, rotary positions, no biases or few."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from memplan.catalogue import ops
from memplan.catalogue.attention import Wiring, attention, mask, mask_name, one_head, repeats_by_view
from memplan.ir import Block, Keep, Op, Run, Stack, Tensor, Weight
from memplan.layers import Layer
from memplan.models import ModelSpec

_Q, _K = "b s a d", "b s k d"


def inputs(padded: bool) -> Op:
    """Token ids and labels (and the attention mask of a padded batch): the script holds them through the step."""
    names = ("ids", "labels", *(("attention_mask",) if padded else ()))
    return Op("inputs", (), tuple(Tensor(n, "b s", "int64") for n in names), holds="step")


def rotary_table(x: str, positions: str = "positions", dtype: str = "") -> tuple[Op, ...]:
    """cos and sin for every position, made in fp32 and cast to the model's dtype (LlamaRotaryEmbedding) or `dtype`."""
    f, source = "fp32", "transformers 5.24 models/llama/modeling_llama.py LlamaRotaryEmbedding"
    return (
        Op(
            "rotary.angles",
            (positions,),
            (Tensor("angles", "s rot2", f),),
            tuple(
                Weight(f"model.rotary_emb.{n}", "rot2", "buffer", f, False) for n in ("inv_freq", "original_inv_freq")
            ),
            scratch=(Tensor("positions", "s", f),),
            source=source,
        ),
        Op("rotary.cat", ("angles",), (Tensor("both", "s rot", f),)),
        Op("rotary.cos", ("both",), (Tensor("cos32", "s rot", f),), scratch=(Tensor("cosine", "s rot", f),)),
        Op("rotary.sin", ("both",), (Tensor("sin32", "s rot", f),), scratch=(Tensor("sine", "s rot", f),)),
        Op("rotary.cast_cos", ("cos32",), (Tensor("cos", "s rot", dtype or f"={x}"),), cast=True, source=source),
        Op("rotary.cast_sin", ("sin32",), (Tensor("sin", "s rot", dtype or f"={x}"),), cast=True, source=source),
        ops.leave("angles", "both", "cos32", "sin32"),
    )


def positions() -> Op:
    return Op("positions", (), (Tensor("positions", "s", "int64"),), scratch=(Tensor("arange", "s", "int64"),))


def rope(name: str, q: str, k: str) -> tuple[Op, ...]:
    """q and k rotated, all of each head's width."""
    return (
        *ops.rotate(f"{name}.rope_q", q, "q", _Q, "b s a rot2"),
        *ops.rotate(f"{name}.rope_k", k, "k", _K, "b s k rot2"),
        ops.leave(q, k),
    )


def rope_and_norm(name: str, q: str, k: str) -> tuple[Op, ...]:
    """Hunyuan's RMSNorm over each head comes after the rotation."""
    return (
        *ops.rotate(f"{name}.rope_q", q, "q.rotated", _Q, "b s a rot2"),
        *ops.rotate(f"{name}.rope_k", k, "k.rotated", _K, "b s k rot2"),
        ops.leave(q, k),
        *ops.rms_norm(f"{name}.query_layernorm", "q.rotated", "q", _Q, "d"),
        ops.leave("q.rotated"),
        *ops.rms_norm(f"{name}.key_layernorm", "k.rotated", "k", _K, "d"),
        ops.leave("k.rotated"),
    )


def rope_and_scale(name: str, q: str, k: str) -> tuple[Op, ...]:
    """Ministral 3 multiplies q by a number a position, `1 + beta * log(1 + floor(position / length))`, in q's dtype."""
    steps = (Tensor("logarithm", "s", "fp32"), Tensor("scaled", "s", "fp32"))
    return (
        *ops.rotate(f"{name}.rope_q", q, "q.rotated", _Q, "b s a rot2"),
        *ops.rotate(f"{name}.rope_k", k, "k", _K, "b s k rot2"),
        ops.leave(q, k),
        Op(f"{name}.factors", ("positions",), (Tensor("factors32", "s", "fp32"),), scratch=steps),
        Op(f"{name}.cast_factors", ("factors32",), (Tensor("factors", "s", "=q.rotated"),), cast=True),
        Op(
            f"{name}.scale_query",
            ("q.rotated", "factors"),
            (Tensor("q", _Q),),
            (),
            (Keep("factors", "q.rotated"),),
            source="transformers 5.24 models/ministral3/modeling_ministral3.py Ministral3Attention",
        ),
    )


def llama_attention(
    m: ModelSpec,
    wiring: Wiring,
    x: str,
    y: str,
    *,
    bias: bool = False,
    out_bias: bool = False,
    qk_norm: bool = False,
    whole_norm: bool = False,
    rotary: bool = True,
    sliding: bool = False,
    turn: Callable[[str, str, str], tuple[Op, ...]] = rope,
    attend: Callable[..., tuple[Op, ...]] = attention,
    grouped: bool | None = None,
    name: str = "self_attn",
) -> tuple[Op, ...]:
    """Projections, rotation, attention, output projection. `qk_norm` is Qwen3's RMSNorm over each head, `whole_norm`
    OLMoE's over all heads.

    `turn(name, q, k)` makes the rotated `q` and `k`. Where nothing is rotated, their gradients need no copy to be seen
    as the projection's, unless the kernel gives them head by head. `attend` has the arguments of `attention`.
    `grouped`: fewer key heads than query heads, where a layer has other numbers than the model.
    """
    g = "attention"
    grouped = m.num_key_value_heads != m.num_attention_heads if grouped is None else grouped
    q1, k1 = ("q2", "k2") if qk_norm else ("q1", "k1")
    backend = wiring.masked if wiring.has_mask(sliding) else wiring.backend
    back_q = "new" if rotary or qk_norm or backend in ("eager", "math") else "same"
    back_k = "new" if back_q == "new" or (grouped and backend == "efficient") else "same"
    k, v, repeated, heads = "k", "v", (), wiring
    if grouped and m.num_key_value_heads == 1 and repeats_by_view(wiring, sliding):
        k, v, grouped = "k.all", "v.all", False
        repeated, heads = one_head(f"{name}.attention", wiring, sliding), wiring._replace(caching=False)
    turned = turn(name, q1, k1) if rotary else (ops.view(f"{name}.q", q1, "q", _Q), ops.view(f"{name}.k", k1, "k", _K))

    def projected(t: str, heads: str, width: str) -> tuple[Op, ...]:
        if not whole_norm:
            return (ops.linear(f"{name}.{t}_proj", x, f"{t}0", heads, "h", g, bias),)
        return (
            ops.linear(f"{name}.{t}_proj", x, f"{t}.raw", heads, "h", g, bias),
            *ops.rms_norm(f"{name}.{t}_norm", f"{t}.raw", f"{t}0", f"b s {width}", width),
            ops.leave(f"{t}.raw"),
        )

    return (
        *projected("q", "a d", "ad"),
        ops.view(f"{name}.q_heads", "q0", "q1", _Q, back_q),
        *((*ops.rms_norm(f"{name}.q_norm", "q1", "q2", _Q, "d"), ops.leave("q1")) if qk_norm else ()),
        *projected("k", "k d", "kd"),
        ops.view(f"{name}.k_heads", "k0", "k1", _K, back_k),
        *((*ops.rms_norm(f"{name}.k_norm", "k1", "k2", _K, "d"), ops.leave("k1")) if qk_norm else ()),
        ops.linear(f"{name}.v_proj", x, "v", "k d", "h", g, bias),
        *turned,
        *repeated,
        *attend(f"{name}.attention", "q", k, v, "o", heads, grouped, sliding, mask_name(sliding)),
        ops.linear(f"{name}.o_proj", "o", y, "h", "a d", g, out_bias),
        ops.leave("q", "k", "v", "o", x),
    )


def gated_mlp(
    x: str,
    y: str,
    name: str = "mlp",
    bias: bool = False,
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    width: str = "f",
    flat: bool = False,
) -> tuple[Op, ...]:
    """`down_proj(act(gate_proj(x)) * up_proj(x))`. `flat`: of an input that the model made two-dimensional."""
    gate, up, down = projections
    shape, linear = f"b s {width}", partial(ops.linear, group="mlp", bias=bias, flat=flat)
    act, product = ops.unit(
        f"swiglu {name}",
        ops.activation(f"{name}.act_fn", "gate", "act", shape),
        ops.mul(f"{name}.product", "act", "up", "product", shape),
    )
    return (
        linear(f"{name}.{gate}", x, "gate", width, "h"),
        act,
        linear(f"{name}.{up}", x, "up", width, "h"),
        product,
        linear(f"{name}.{down}", "product", y, "h", width),
        ops.leave(x),
    )


def lm_head(x: str, tied_to: str = "", bias: bool = False) -> Op:
    """The output projection; tied, it uses the embedding's weight."""
    op = ops.linear("lm_head", x, "logits", "v", "h", "lm_head", bias)
    if not tied_to:
        return op
    own = op.weights[0].name
    tied = Weight(tied_to, "v h", "embedding", matrix=True, rows=1)
    keeps = tuple(k._replace(what=k.what.replace(own, tied_to), of=k.of.replace(own, tied_to)) for k in op.keeps)
    return op._replace(weights=(tied, *op.weights[1:]), keeps=keeps)


def masks(wiring: Wiring, x: str, sliding: bool = False) -> tuple[Op, ...]:
    """The mask of the full or of the sliding layers, where one is made.

    Without padding sdpa needs one mask for the whole batch: of a window, and of all that a static cache has room for.
    A window's has two booleans beside it while it is made.
    """
    name = mask_name(sliding)
    if not wiring.has_mask(sliding):
        return ()
    if wiring.backend == "eager" or wiring.padded:
        return mask(wiring, x, name)
    parts = (Tensor("within the window", "s s", "bool"), Tensor("causal", "s s", "bool")) if sliding else ()
    dtype = f"={x}" if wiring.float_masks else "bool"
    return (Op(name, (), (Tensor(name, "s s", dtype),), scratch=parts, source="transformers 5.24 masking_utils.py"),)


def before(
    wiring: Wiring,
    sliding: tuple[bool, ...] = (False,),
    embedded: tuple[Op, ...] = (),
    table_dtype: str = "",
    rotary: bool = True,
) -> tuple[Op, ...]:
    """Up to the first block. `sliding`: which kinds of layers there are. `embedded`: instead of plain embeddings.
    `rotary`: positions turn heads, by one table for all layers."""
    return (
        inputs(wiring.padded),
        *(embedded or (ops.embedding("model.embed_tokens", "ids", "embeds", "v", "h"),)),
        positions(),
        *(op for kind in sliding for op in masks(wiring, "embeds", kind)),
        *(rotary_table("embeds", dtype=table_dtype) if rotary else ()),
    )


def after(
    m: ModelSpec,
    wiring: Wiring,
    sliding: tuple[bool, ...] = (False,),
    bias: bool = False,
    norm: Callable[[str, str, str, str, str], tuple[Op, ...]] = ops.rms_norm,
    rotary: bool = True,
    name: str = "model.norm",
) -> tuple[Op, ...]:
    """The last norm and the output projection. `rotary` as in `before`."""
    made = [op.name for kind in sliding for op in masks(wiring, "embeds", kind)]
    table = ("cos", "sin") if rotary else ()
    return (
        *norm(name, "x", "n", "b s h", "h"),
        ops.leave("x", "embeds", "positions", *table, *made),
        lm_head("n", "model.embed_tokens.weight" if m.tie_word_embeddings else "", bias),
    )


def returned(wiring: Wiring) -> tuple[str, ...]:
    """What an attention module returns beside its output, and the block holds though it has no use for it."""
    return ("probs",) if wiring.backend == "eager" else ()


def decoder_block(
    attention_ops: tuple[Op, ...],
    mlp_ops: tuple[Op, ...],
    branch: Callable[[str, str, str], tuple[Op, ...]] | None = None,
    norm: Callable[[str, str, str, str, str], tuple[Op, ...]] = ops.rms_norm,
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm"),
    held: tuple[str, ...] = (),
) -> Block:
    """Norm, attention from `n1` to `ao`, residual; norm, MLP from `n2` to `mo`, residual.

    `branch(name, x, y)` is what a family does to a branch before it is added; `held` stays to the end of the block.
    """
    ao, mo = ("ao", "mo") if branch is None else ("ao.branch", "mo.branch")
    return Block(
        "model.layers",
        (
            *norm(norms[0], "x", "n1", "b s h", "h"),
            *attention_ops,
            *(branch("attention_branch", "ao", ao) if branch else ()),
            ops.add("residual_1", "x", ao, "x1", "b s h"),
            *((ops.leave("ao"),) if branch else ()),
            *norm(norms[1], "x1", "n2", "b s h", "h"),
            *mlp_ops,
            *(branch("mlp_branch", "mo", mo) if branch else ()),
            ops.add("residual_2", "x1", mo, "y", "b s h"),
            ops.leave("positions", *(("mo",) if branch else ()), *held),
        ),
    )


def runs(m: ModelSpec, block: Callable[[Layer], Block]) -> tuple[Run, ...]:
    """The model's layers, as its config repeats them. Equal layers are one block."""
    blocks = {layer: block(layer) for layer in dict.fromkeys(layer for run in m.runs for layer in run.pattern)}
    return tuple(Run(tuple(map(blocks.__getitem__, run.pattern)), run.times) for run in m.runs)


def llama(
    m: ModelSpec,
    wiring: Wiring,
    *,
    bias: bool = False,
    out_bias: bool = False,
    qk_norm: bool = False,
    turn: Callable[[str, str, str], tuple[Op, ...]] = rope,
    mixed: bool = False,
    mlp: Callable[[Layer], tuple[Op, ...]] | None = None,
) -> Stack:
    """Llama, Mistral, Ministral 3, InternLM 3, Qwen2 (biases on q, k, v), Qwen3 (norms on q and k), Hunyuan, SmolLM 3.

    `mixed`: layers with and without a window; the mask of those without is made even if there are none. `mlp`: what a
    layer has from `n2` to `mo` instead of a gated MLP.
    """
    gated = gated_mlp("n2", "mo", bias=m.get("mlp_bias", False))

    def block(layer: Layer) -> Block:
        heads = llama_attention(
            m,
            wiring,
            "n1",
            "ao",
            bias=bias,
            out_bias=out_bias,
            qk_norm=qk_norm,
            rotary=layer.rotary,
            sliding=layer.sliding,
            turn=turn,
        )
        return decoder_block(heads, mlp(layer) if mlp else gated, held=returned(wiring))

    sliding = tuple(sorted({*(layer.sliding for layer in m.layers), *((False,) if mixed else ())}))
    return Stack(before(wiring, sliding), runs(m, block), after(m, wiring, sliding))


def configured(m: ModelSpec, wiring: Wiring, **variant: Any) -> Stack:
    """The config says whether the attention's projections have biases."""
    bias = m.get("attention_bias", False)
    return llama(m, wiring, bias=bias, out_bias=bias, **variant)


BUILDERS = {
    "hunyuan_v1_dense": partial(configured, turn=rope_and_norm),
    "internlm3": configured,
    "llama": configured,
    "mistral": llama,
    "ministral": partial(llama, mixed=True),
    "ministral3": partial(llama, turn=rope_and_scale),
    "qwen2": partial(llama, bias=True, mixed=True),
    "mimo": partial(llama, bias=True),
    "qwen3": partial(configured, qk_norm=True, mixed=True),
    "smollm3": partial(configured, mixed=True),
}
