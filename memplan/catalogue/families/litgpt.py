"""LitGPT's model: one class for all families, q, k and v in one projection, rotary tables in fp32.

Source: litgpt 0.5.3 model.py; lit_gpt of October 2023, which takes the same memory.
"""

from __future__ import annotations

from collections.abc import Iterable

from memplan.catalogue.attention.attention import QUERIES, cached, mask_name
from memplan.catalogue.attention.attention import attention as kernel
from memplan.catalogue.decoder.frame import inputs, lm_head, masks
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Run, Scratch, Stack, Tensor, Weight
from memplan.core.records import NamedTuple
from memplan.models.model import ModelSpec

_SOURCE = "litgpt 0.5.3 model.py"


class LitGPTKind(NamedTuple):
    """A family's row, as LitGPT's config describes it.

    rms        RMSNorm instead of LayerNorm
    offset     norms multiply by `1 + weight`, as Gemma's do
    gated      the MLP has a gate
    parallel   attention and MLP run in parallel
    shared     both read the same norm
    bias       linear layers have biases
    head_bias  the output projection has a bias
    scaled     embeddings are scaled
    post       norms after attention and MLP
    capped     attention scores are soft-capped
    """

    rms: bool = True
    offset: bool = False
    gated: bool = True
    parallel: bool = False
    shared: bool = False
    bias: bool = False
    head_bias: bool = False
    scaled: bool = False
    post: bool = False
    capped: bool = False


KINDS = {
    "llama": LitGPTKind(),
    "mistral": LitGPTKind(),
    "phi3": LitGPTKind(),
    "gemma": LitGPTKind(offset=True, scaled=True),
    "gemma2": LitGPTKind(offset=True, scaled=True, post=True, capped=True),
    "phi": LitGPTKind(rms=False, gated=False, parallel=True, shared=True, bias=True, head_bias=True),
    "gpt_neox": LitGPTKind(rms=False, gated=False, parallel=True, bias=True),
    "falcon": LitGPTKind(rms=False, gated=False, parallel=True, shared=True),
}


SUPPORTED = ", ".join(KINDS)
# Checkpoints whose config of LitGPT has a window and whose config.json has none, or the other way round.
_OTHER_WINDOWS = ("phi-3.5-mini-instruct", "mathstral-7b-v0.1")  # litgpt 0.5.3 and 0.5.13 config.py


def has_family(m: ModelSpec) -> bool:
    """Whether LitGPT's model is written here."""
    return m.model_type in KINDS


def _has_window(m: ModelSpec) -> bool:
    """Whether LitGPT's config has a window, of any length: its layers then mask it, however short the sequence is."""
    name = str(m.card.get("hf_id") or m.get("_name_or_path") or m.name).rpartition("/")[2].lower()
    return (m.sliding_window is not None) != (name in _OTHER_WINDOWS)


def build(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build the model as LitGPT has it. Its output projection is never tied to the embeddings."""
    kind = KINDS[m.model_type]
    table = (Tensor("cos", "s rot", "fp32"), Tensor("sin", "s rot", "fp32"))
    embedding = ops.embedding("transformer.wte", "ids", "tokens" if kind.scaled else "embeds", "v", "h")
    return Stack(
        (
            inputs(False),
            Op("rope_cache", (), table, holds="step", source=_SOURCE),
            embedding,
            *(masks(wiring, "embeds") if wiring.caching else ()),
            *((ops.scale("scale_embeddings", "tokens", "embeds", "b s h"),) if kind.scaled else ()),
        ),
        (Run((_block(m, wiring, kind),), "L"),),
        (*_norm(kind, "transformer.ln_f", "x", "n"), ops.release_names("x"), lm_head("n", bias=kind.head_bias)),
    )


def _block(m: ModelSpec, wiring: Wiring, kind: LitGPTKind) -> Block:
    ao, mo = ("ao.raw", "mo.raw") if kind.post else ("ao", "mo")
    feed = "n1" if kind.shared else "n2"
    after = (
        *(() if kind.shared else _norm(kind, "norm_2", "x" if kind.parallel else "x1", "n2")),
        *_mlp(kind, feed, mo),
        *(_norm(kind, "post_mlp_norm", mo, "mo") if kind.post else ()),
    )
    if kind.parallel:
        residuals = (
            *after,
            ops.add("parallel", "mo", "ao", "branches", "b s h"),
            ops.add("residual", "branches", "x", "y", "b s h"),
        )
    else:
        residuals = (
            ops.add("residual_1", "ao", "x", "x1", "b s h"),
            *after,
            ops.add("residual_2", "mo", "x1", "y", "b s h"),
        )
    return Block(
        "transformer.h",
        (
            *_norm(kind, "norm_1", "x", "n1"),
            *_attention(m, wiring, kind, "n1", ao),
            *(_norm(kind, "post_attention_norm", ao, "ao") if kind.post else ()),
            *residuals,
            ops.release_names(feed, "ao", ao),
        ),
    )


def _norm(kind: LitGPTKind, name: str, x: str, y: str) -> tuple[Op, ...]:
    return _rms_norm(name, x, y, kind.offset) if kind.rms else (ops.layer_norm(name, x, y, "b s h", "h"),)


def _rms_norm(name: str, x: str, y: str, offset: bool) -> tuple[Op, ...]:
    """RMSNorm, fp32 to the end: keeps x, one number per row and, if the weight trains, the normalised x."""
    shape, row = "b s h", "b s"
    x32, square, mean, rstd, n32, y32 = (f"{y}.{part}" for part in ("x32", "square", "mean", "rstd", "n32", "y32"))
    w = Weight(f"{name}.weight", "h", "norm")
    factor = f"{y}.factor"
    return (
        ops.cast(f"{name}.float", x, x32, shape, "fp32"),
        Op(
            f"{name}.square",
            (x32,),
            (Tensor(square, shape),),
            (),
            (Keep(x32, x32),),
            scratch_back=(Scratch(Tensor("product", shape, "fp32")),),
            source=f"{ops.DERIVATIVES}: mul.Tensor",
        ),
        Op(f"{name}.mean", (square,), (Tensor(mean, row),), source=f"{ops.DERIVATIVES}: mean.dim"),
        Op(f"{name}.rsqrt", (mean,), (Tensor(rstd, row),), (), (Keep(rstd, mean),), source=f"{ops.DERIVATIVES}: rsqrt"),
        Op(
            f"{name}.scale",
            (x32, rstd),
            (Tensor(n32, shape),),
            (),
            (Keep(rstd, x32), Keep(x32, rstd)),
            scratch_back=(Scratch(Tensor("product", shape, "fp32"), rstd),),
            source=f"{ops.DERIVATIVES}: mul.Tensor",
        ),
        Op(f"{name}.factor", (), (Tensor(factor, "h", "fp32"),), (w,), source=f"{_SOURCE} RMSNorm"),
        Op(
            f"{name}.weight",
            (n32, factor),
            (Tensor(y32, shape),),
            (),
            (Keep(factor, n32), Keep(n32, factor)),
            scratch_back=(Scratch(Tensor("product", shape, "fp32"), factor),),
            source=f"{ops.DERIVATIVES}: mul.Tensor",
        ),
        ops.cast(f"{name}.cast", y32, y, shape, f"={x}"),
        ops.release_names(x32, mean, n32),
    )


def _attention(m: ModelSpec, wiring: Wiring, kind: LitGPTKind, x: str, y: str) -> tuple[Op, ...]:
    """Attention. q, k and v are parts of one tensor; grouped keys and values are copied for every query head.

    A cache has room for all tokens and for all heads. A single key/value head is cached as one, and expanded
    afterwards.
    """
    single = wiring.caching and m.num_key_value_heads == 1
    grouped = m.num_key_value_heads != m.num_attention_heads and not single
    of_keys = "k" if single else "a"
    name = "attn"
    parts = (
        Tensor("q0", QUERIES),
        Tensor("k0", "b s k d"),
        Tensor("v0", "b s k d"),
    )
    copy = ops.copy if grouped else ops.view
    spread = "new" if grouped else "same"
    heads = (
        ops.view(f"{name}.heads", "qkv", "qkv.heads", "b s qkv", gradient="new"),
        ops.split(f"{name}.split", "qkv.heads", parts),
        copy(f"{name}.q_heads", "q0", "q1", QUERIES),
        copy(f"{name}.k_heads", "k0", "k1", f"b s {of_keys} d", spread),
        copy(f"{name}.v_heads", "v0", "v", f"b s {of_keys} d", spread),
    )
    pairs = (("q", "a"), ("k", of_keys))
    masks_window = wiring.window_masks and not (wiring.caching or kind.capped) and _has_window(m)
    attend = cached(name, wiring, tuple(_capped())) if kind.capped else _sdpa(wiring, masks_window)
    return (
        ops.linear(f"{name}.attn", x, "qkv", "qkv", "h", "attention", kind.bias),
        *heads,
        *(op for t, of in pairs for op in _rope(f"{name}.rope_{t}", f"{t}1", f"{t}.turned", of)),
        *(_concatenate(f"{name}.{t}_cat", f"{t}.turned", f"{t}1", t, of) for t, of in pairs),
        *attend,
        ops.linear(f"{name}.proj", "o", y, "h", "a d", "attention", kind.bias),
        ops.release_names("qkv", "q", "k", "v", "o", "q.turned", "k.turned", *(_MASKS if masks_window else ()), x),
    )


def _rope(name: str, x: str, y: str, heads: str) -> tuple[Op, ...]:
    """Rotate the first `rot` dimensions of every head with fp32 tables: products in fp32, cast back."""
    shape, half = f"b s {heads} rot", f"b s {heads} rot2"
    part, cosine, turned, sine, total = (f"{y}.{t}" for t in ("part", "cosine", "half", "sine", "sum"))
    return (
        ops.view(f"{name}.slice", x, part, shape, gradient="new"),
        ops.rotate_half(f"{name}.rotate_half", part, turned, shape, half),
        Op(f"{name}.cos", (part, "cos"), (Tensor(cosine, shape),), (), (Keep("cos", part),), source=_SOURCE),
        Op(f"{name}.sin", (turned, "sin"), (Tensor(sine, shape),), (), (Keep("sin", turned),), source=_SOURCE),
        ops.add(f"{name}.add", cosine, sine, total, shape),
        ops.release_names(turned),
        ops.cast(f"{name}.cast", total, y, shape, f"={x}"),
        ops.release_names(total),
    )


def _concatenate(name: str, turned: str, x: str, y: str, heads: str) -> Op:
    """Concatenate the rotated and the other dimensions. Their gradient is a view of two parts."""
    return ops.cat(name, (turned, x), y, f"b s {heads} d", dtype=f"={x}", gradient="new")


# The mask of a layer, which torch pads if its rows are no multiple of 8, and what else is made with it.
_MASKS = (mask_name(True), "uneven mask", "too early")


def _window_mask() -> Iterable[Op]:
    """Make the mask of a layer's window: a triangle of what comes later, and one of what is too early.

    Both stay until the layer's attention returns. torch's attention keeps the mask, or a padded copy of it.
    """
    source = f"{_SOURCE} CausalSelfAttention.forward: apply_sliding_window_attention"
    mask, uneven, early = (Tensor(n, s, "=q") for n, s in zip(_MASKS, ("s s_even", "s s_uneven", "s s"), strict=True))
    for name, made in (("attn.mask", (mask, uneven)), ("attn.window", (early,))):
        yield Op(name, ("q",), made, scratch=(Tensor("ones", "s s", "=q"),), gradient="none", source=source)


def _sdpa(wiring: Wiring, masks_window: bool) -> Iterable[Op]:
    """torch's attention. q is stored head by head, and so is the kernel's output, which is copied together."""
    plain = wiring._replace(copies="", windowed=masks_window, float_masks=masks_window)
    is_math, made = wiring.backend == "math", _window_mask() if masks_window else ()
    attend = kernel("attn.attention", "q", "k", "v", "o" if is_math else "heads", plain, False, masks_window)
    yield from (*made, *map(_for_all_sequences, attend))
    if not is_math:
        yield ops.copy("attn.reshape", "heads", "o", QUERIES)


def _for_all_sequences(op: Op) -> Op:
    """Return the operation that pads a mask as one of a mask that all sequences share."""
    if not op.name.endswith(".pad_mask"):
        return op
    return op._replace(writes=tuple(t._replace(shape=t.shape.removeprefix("b ")) for t in op.writes))


def _capped() -> Iterable[Op]:
    """Attention written out: soft-capped scores, a mask of the model's dtype, the softmax in fp32."""
    n, scores = "attn.attention", "b a s s"
    return (
        ops.matmul(f"{n}.scores", "q", "k", "scores", scores),
        ops.scale(f"{n}.scaling", "scores", "scaled", scores),
        *ops.softcap(f"{n}.softcap", "scaled", "capped", scores),
        Op(f"{n}.mask", (), (Tensor("mask", "s s", "=q"),), scratch=(Tensor("window", "s s", "=q"),), source=_SOURCE),
        Op(f"{n}.add_mask", ("capped", "mask"), (Tensor("masked", scores),), gradient="same", source=_SOURCE),
        *ops.softmax(f"{n}.softmax", "masked", "softmax", scores, "fp32"),
        ops.cast(f"{n}.cast", "softmax", "probs", scores, "=q"),
        ops.matmul(f"{n}.product", "probs", "v", "heads", QUERIES),
        ops.release_names("probs", "mask"),
        ops.copy(f"{n}.reshape", "heads", "o", QUERIES, gradient="new"),
    )


def _mlp(kind: LitGPTKind, x: str, y: str) -> tuple[Op, ...]:
    n, bias = "mlp", kind.bias
    if not kind.gated:
        return (
            ops.linear(f"{n}.fc", x, "up", "f", "h", "mlp", bias),
            ops.activation(f"{n}.gelu", "up", "act", "b s f"),
            ops.linear(f"{n}.proj", "act", y, "h", "f", "mlp", bias),
            ops.release_names("act", x),
        )
    return (
        ops.linear(f"{n}.fc_1", x, "gate", "f", "h", "mlp", bias),
        ops.linear(f"{n}.fc_2", x, "up", "f", "h", "mlp", bias),
        ops.activation(f"{n}.silu", "gate", "act", "b s f"),
        ops.mul(f"{n}.product", "act", "up", "product", "b s f"),
        ops.linear(f"{n}.proj", "product", y, "h", "f", "mlp", bias),
        ops.release_names("gate", "up", "product", x),
    )
