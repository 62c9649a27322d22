"""Attention: the kernels that compute it, and which of them torch and transformers take.

Every variant reads q (`b s a d`), k and v (`b s k d`) and writes the heads' outputs (`b s a d`)."""

from __future__ import annotations

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.arithmetic import Arithmetic, Size
from memplan.core.ir import Keep, Op, Scratch, Tensor

_ATEN = "torch 2.13 aten/src/ATen/native/transformers"


# Families that flash attention 2 does not run with, and why.
# Source: transformers 5.24, `_supports_flash_attn` and `_compatible_flash_implementations` of their classes.
_IMAGES = "it drops the mask over images"
NO_FLASH_2 = {
    "deepseek_v32": "its class does not support it",
    "deepseek_v4": "it knows no sinks, and its heads are wider than 256",
    "gemma4": _IMAGES,
    "gemma4_text": "its widest heads are wider than 256",
    "glm_moe_dsa": "its class does not support it",
    "gpt_oss": "it knows no sinks",
    "llama4": "it attends to no chunks",
    "llama4_text": "it attends to no chunks",
    "mimo_v2_flash": "it knows no sinks",
    "mllama": "its class does not support it",
    "minimax_m3_vl_text": "it takes no mask of blocks",
    "step3p7": "its class does not support it",
}

# Families whose heads are views of a projection of more than them: of a single sequence they can be flattened as views.
JOINED = (
    *("bloom", "deepseek_v2", "deepseek_v3", "falcon", "glm4_moe_lite", "gpt_bigcode", "gpt_neox", "kimi_k25"),
    *("deepseek_v4", "megatron_gpt", "minicpm3", "mpt", "phi3"),
)
SINGLE = (*JOINED, "t5")  # families that treat a single sequence differently


def flattened(op: Op) -> Op:
    """Attention's copy of heads, made so that they lie one after another, as the view that a single sequence needs."""
    return op._replace(view=True) if op.name.endswith("_flat") and not op.view else op


def attention(
    name: str,
    q: str,
    k: str,
    v: str,
    y: str,
    wiring: Wiring,
    grouped: bool,
    sliding: bool = False,
    mask: str = "",
    width: str = "d",
) -> tuple[Op, ...]:
    """The attention of one layer, with the copies of k and v its kernel needs. `width` is that of a head's values.

    Where the kernel is given a mask, it is the one the model makes for the layer's kind, unless `mask` names another.
    """
    kernel = _attention(name, q, k, v, y, wiring, grouped, sliding, mask or mask_name(sliding), width)
    return cached(name, wiring, kernel, sliding, (k, v))


def mask_name(sliding: bool) -> str:
    """The name of the mask that the model makes for layers with a window, or for those without."""
    return "window_mask" if sliding else "mask"


def cached(
    name: str, wiring: Wiring, kernel: tuple[Op, ...], sliding: bool = False, tensors: tuple[str, ...] = ("k", "v")
) -> tuple[Op, ...]:
    """The kernel, given keys and values of all tokens so far where there is a cache of them."""
    if not wiring.caching:
        return kernel
    return (Op(f"{name}.cache", tensors, caches="kv_window" if sliding else "kv"), *kernel)


def repeats_by_view(wiring: Wiring, sliding: bool = False) -> bool:
    """Whether the one head that all queries share is repeated by a view: transformers' repeat_kv reshapes what it has
    expanded, which copies of several heads alone; a kernel that takes no such view copies it itself."""
    masked = wiring.has_mask(sliding)
    backend = wiring.masked if masked else wiring.backend
    return (backend == "efficient" and masked) or (backend == "eager" and not wiring.records)


def one_head(name: str, wiring: Wiring, sliding: bool = False) -> tuple[Op, ...]:
    """`k` and `v` of one head seen for every query head as `k.all` and `v.all`, once they are cached.

    Source: transformers 5.24 models/llama/modeling_llama.py repeat_kv.
    """
    views = tuple(ops.view(f"{name.rpartition('.')[0]}.repeat_{t}", t, f"{t}.all", "b s a d", "new") for t in "kv")
    return cached(name, wiring, views, sliding)


def reused(name: str, tensors: tuple[str, ...], sliding: bool = False) -> Op:
    """The place where keys and values of all tokens so far are read that another layer has put there."""
    return Op(f"{name}.cache", tensors, caches="kv_window" if sliding else "kv", view=True)


def _attention(
    name: str,
    q: str,
    k: str,
    v: str,
    y: str,
    wiring: Wiring,
    grouped: bool,
    sliding: bool,
    mask: str,
    width: str,
) -> tuple[Op, ...]:
    masked = wiring.has_mask(sliding)
    floats = wiring.float_masks and mask == mask_name(sliding)  # a mask of another name is made by the family's code
    backend = wiring.masked if masked else wiring.backend
    if wiring.copies and backend != "eager":
        plain = wiring._replace(copies="")
        every = wiring.copies == "all" or masked
        return (
            *_copied(name, q, k, v, grouped, every),
            *laid_out_as(
                y,
                _attention(
                    name, f"{q}.given" if every else q, "k.given", "v.given", y, plain, False, sliding, mask, width
                ),
                every and backend == "flash",
            ),
            ops.leave("k.given", "v.given", *((f"{q}.given",) if every else ())),
        )
    match backend:
        case "flash" | "flash_2":
            if width != "d":
                return _padded_flash_2(name, q, k, v, y, wiring, width)
            heads = ops.view(f"{name}.v_heads", v, "v.heads", "b s k d")
            if backend == "flash_2":
                return _seen(wiring, (heads, *_flash_2(name, q, k, "v.heads", y, wiring, grouped)))
            return _seen(wiring, (heads, flash(name, q, k, "v.heads", y, grouped)))
        case "efficient":
            packed = wiring.one and masked and not wiring.copies  # a group of heads' queries as rows of one
            kernel = _efficient(name, q, k, v, y, grouped and not packed, mask if masked else "", width, wiring.records)
            if masked and floats:
                kernel = _with_float_mask(name, y, mask, kernel)
            return _seen(wiring, kernel)
        case "math":
            kernel = _math(name, q, k, v, y, grouped, mask if masked else "", width, wiring)
            given = _lowered(f"{name}.mask", mask, "bias", "b s s")
            return tuple(given if floats and op.name == f"{name}.mask" else op for op in kernel)
        case "eager":
            laid = wiring.lays
            return _eager(name, q, k, v, y, grouped, mask if masked else "", width, wiring.drops, laid)
        case other:
            raise AssertionError(other)


def _seen(wiring: Wiring, kernel: tuple[Op, ...]) -> tuple[Op, ...]:
    """The kernel, told that no mask hides anything where none does."""
    if wiring.causal:
        return kernel
    return tuple(op._replace(product="whole attention") if op.product == "attention" else op for op in kernel)


def flash(name: str, q: str, k: str, v: str, y: str, grouped: bool) -> Op:
    """Keeps q, k, v, the output, one fp32 number a row and head, and the state of the random generator.

    Its backward holds an fp32 gradient of q over rows rounded up to 128 (`s128`) and head widths to 32 (`d32`);
    with fewer key heads than query heads, gradients of k and v for every query head.
    """
    lse, seed, offset = f"{y}.lse", f"{y}.seed", f"{y}.offset"
    expanded = (Tensor("dk expanded", "b s a d", f"={k}"), Tensor("dv expanded", "b s a d", f"={k}")) if grouped else ()
    scratch = (Tensor("row sums", "b a s128", "fp32"), Tensor("dq accumulated", "b s128 a d32", "fp32"), *expanded)
    return Op(
        name,
        (q, k, v),
        (
            Tensor(y, "b s a d"),
            Tensor(lse, "b a s", "fp32"),
            Tensor(seed, "2", "int64"),
            Tensor(offset, "", "int64"),
        ),
        (),
        tuple(Keep(what, of) for of in (q, k, v) for what in (q, k, v, y, lse, seed, offset)),
        scratch_back=tuple(Scratch(t) for t in scratch),
        autocast="lower",
        product="attention",
        source=f"{_ATEN}/cuda/flash_attn/flash_api.cpp mha_bwd",
    )


def _flash_2(name: str, q: str, k: str, v: str, y: str, wiring: Wiring, grouped: bool) -> tuple[Op, ...]:
    """fp32 heads are cast to half precision first. Of a padded batch the tokens are gathered into one sequence, and
    what comes out is put back among zeros.

    Source: transformers 5.24 modeling_flash_attention_utils.py _upad_input, _pad_input.
    """
    shapes = {q: "b s a d", k: "b s k d", v: "b s k d"}
    made: list[Op] = []
    given = {x: x for x in shapes}
    if wiring.target:
        made += (ops.cast(f"{name}.cast_{x}", x, f"{x}.target", shape, wiring.target) for x, shape in shapes.items())
        given = {x: f"{x}.target" for x in shapes}
    if not wiring.padded:
        return (*made, flash(name, given[q], given[k], given[v], y, grouped))
    tokens, out = f"{y}.tokens", f"{y}.gathered"
    made.append(Op(f"{name}.tokens", (), (Tensor(tokens, "b s", "int64"),), gradient="none"))
    for x in (k, v, q):
        made.append(_moved(f"{name}.gather_{x}", given[x], f"{x}.gathered", shapes[x], tokens))
    made.append(flash(name, f"{q}.gathered", f"{k}.gathered", f"{v}.gathered", out, grouped))
    made.append(_moved(f"{name}.pad", out, y, shapes[q], tokens))
    return (*made, ops.leave(tokens, *(f"{x}.gathered" for x in shapes), *(given[x] for x in shapes if given[x] != x)))


def _padded_flash_2(name: str, q: str, k: str, v: str, y: str, wiring: Wiring, width: str) -> tuple[Op, ...]:
    """Values narrower than queries are padded with zeros to their width, and what comes out is cut again.

    Source: transformers 5.24 integrations/flash_attention.py flash_attention_forward.
    """
    heads, out = "b s a d", f"{y}.wide"
    return (
        ops.copy(f"{name}.pad_values", v, "v.heads", heads, gradient="new"),
        *_flash_2(name, q, k, "v.heads", out, wiring, False),
        ops.leave("v.heads"),
        ops.view(f"{name}.cut", out, f"{y}.cut", f"b s a {width}", gradient="new"),
        ops.copy(f"{name}.contiguous", f"{y}.cut", y, f"b s a {width}"),
    )


def _moved(name: str, x: str, y: str, shape: str, tokens: str) -> Op:
    return Op(
        name, (x, tokens), (Tensor(y, shape, f"={x}"),), (), (Keep(tokens, x),), source=f"{ops.DERIVATIVES}: index"
    )


def _repeated(name: str, k: str, v: str, grouped: bool, width: str) -> tuple[Op, ...]:
    """k and v for every query head (transformers' repeat_kv, torch's enable_gqa): copies, if there are fewer."""
    if not grouped:
        return (
            ops.view(f"{name}.v_heads", v, "v.heads", f"b s a {width}"),
            ops.view(f"{name}.k_same", k, "k.heads", "b s a d"),
        )
    return (
        ops.copy(f"{name}.repeat_k", k, "k.heads", "b s a d", gradient="new"),
        ops.view(f"{name}.v_view", v, "v.view", f"b s k {width}", gradient="new"),
        ops.copy(f"{name}.repeat_v", "v.view", "v.heads", f"b s a {width}", gradient="new"),
    )


def laid_out_as(y: str, kernel: tuple[Op, ...], heads_first: bool) -> tuple[Op, ...]:
    """Flash attention lays out what it makes as it finds q: head by head where that was made contiguous, and so the
    heads are copied together."""
    if not heads_first:
        return kernel
    *before, last = kernel
    made = tuple(t._replace(name="heads") if t.name == y else t for t in last.writes)
    keeps = tuple(k._replace(what="heads") if k.what == y else k for k in last.keeps)
    copy = ops.copy(f"{last.name}.contiguous", "heads", y, "b s a d")
    return (*before, last._replace(writes=made, keeps=keeps), copy, ops.leave("heads"))


def _copied(name: str, q: str, k: str, v: str, grouped: bool, every: bool) -> tuple[Op, ...]:
    """k and v repeated for every query head; `every`: what that did not copy is made contiguous.

    Source: transformers 4.48 integrations/sdpa_attention.py sdpa_attention_forward.
    """
    same, given = ops.copy if every else ops.view, {k: "k.given", v: "v.given"}
    return (
        *(
            op
            for t in (k, v)
            for op in (
                ops.view(f"{name}.{t}_view", t, f"{t}.view", "b s k d", gradient="new"),
                ops.copy(f"{name}.repeat_{t}", f"{t}.view", given[t], "b s a d", gradient="new"),
            )
            if grouped
        ),
        *(same(f"{name}.{t}_given", t, given[t], "b s k d") for t in (k, v) if not grouped),
        *((ops.copy(f"{name}.{q}_given", q, f"{q}.given", "b s a d"),) if every else ()),
    )


def _efficient(
    name: str,
    q: str,
    k: str,
    v: str,
    y: str,
    grouped: bool,
    mask: str,
    width: str,
    records: bool = True,
    converts: bool = True,
) -> tuple[Op, ...]:
    """Memory-efficient attention: keeps q, k, v, the output, a row of fp32 sums rounded up to 32 rows, and the mask.
    The sums are made only where autograd `records`.

    A boolean mask becomes one of q's dtype in every layer, and where its rows are no multiple of 8 they are padded to
    one in another tensor beside that, unless it is of numbers already (`converts`). The workspace of its backward
    depends on the tile the card's shared memory allows: `efficient_workspace` bytes a head (see
    `efficient_workspace_bytes`).
    Autocast casts what the function is given: with a mask k and v are repeated before it, without one inside.
    """
    lse, seed, offset = f"{y}.lse", f"{y}.seed", f"{y}.offset"
    if mask:
        q1, k1, v1 = f"{q}.lowered", "k.lowered", "v.lowered"
        inner = (
            *_repeated(name, k, v, grouped, width),
            _lowered(f"{name}.q", q, q1, "b s a d"),
            _lowered(f"{name}.k", "k.heads", k1, "b s a d"),
            _lowered(f"{name}.v", "v.heads", v1, f"b s a {width}"),
            Op(
                f"{name}.mask",
                (mask,),
                (Tensor(f"{y}.bias", "b s s8", f"={q1}"),),
                scratch=(Tensor("zero", "", f"={q1}"), Tensor("minus infinity", "", f"={q1}")),
                source=f"{_ATEN}/attention.cpp convert_boolean_attn_mask",
            ),
        )
    else:
        q1, k1, v1 = f"{q}.lowered", "k.heads", "v.heads"
        inner = (
            _lowered(f"{name}.q", q, q1, "b s a d"),
            _lowered(f"{name}.k", k, "k.lowered", "b s k d"),
            _lowered(f"{name}.v", v, "v.lowered", f"b s k {width}"),
            *_repeated(name, "k.lowered", "v.lowered", grouped, width),
        )
    kept = (q1, k1, v1, y, lse, seed, offset)
    bias = tuple(Keep(f"{y}.bias", of, seen="b a s s") for of in (q1, k1, v1)) if mask else ()
    return (
        *inner,
        Op(
            name,
            (q1, k1, v1, *((f"{y}.bias",) if mask else ())),
            (
                Tensor(y, f"b s a {width}", f"={q1}"),
                Tensor(lse, "b a s32" if records else "0", "fp32"),
                Tensor(seed, "", "int64"),
                Tensor(offset, "", "int64"),
            ),
            (),
            (*(Keep(what, of) for of in (q1, k1, v1) for what in kept), *bias),
            scratch=(Tensor("mask before it is padded", "b s s_uneven", f"={q1}"),) if mask and converts else (),
            scratch_back=(
                Scratch(Tensor("delta", "b a s", "fp32")),
                Scratch(Tensor("workspace", "b a efficient_workspace", "uint8")),
                Scratch(Tensor("output product", "b s a efficient_fp32", "fp32")),
            ),
            autocast="lower",
            product="attention",
            source=f"{_ATEN}/cuda/attention_backward.cu",
        ),
        ops.leave("k.heads", "v.heads"),
    )


def _with_float_mask(name: str, y: str, mask: str, kernel: tuple[Op, ...]) -> tuple[Op, ...]:
    """The memory-efficient kernel given a mask of numbers, which it keeps. Under autocast every layer casts the mask
    and keeps the cast; if its rows are no multiple of 8, every layer pads it and keeps the padded copy.

    Source: torch 2.13 aten/src/ATen/native/transformers/attention.cpp preprocess_mask, pad_bias.
    """
    seen, given, padded, bias = f"{y}.mask.even", f"{y}.mask", f"{y}.mask.padded", f"{y}.bias"
    made: list[Op] = []
    for op in kernel:
        if op.name == f"{name}.mask":
            made.append(ops.view(op.name, mask, seen, "b s s_even"))  # which is all that autocast casts to be kept
            made.append(_lowered(op.name, seen, given, "b s s_even"))
            made.append(Op(f"{name}.pad_mask", (mask,), (Tensor(padded, "b s s_uneven8", f"={given}"),)))
        elif bias in op.reads:
            of = tuple(dict.fromkeys(k.of for k in op.keeps))
            keeps = (*(k for k in op.keeps if k.what != bias), *(Keep(what, x) for x in of for what in (given, padded)))
            reads = (*(r for r in op.reads if r != bias), given, padded)
            made.append(op._replace(reads=reads, keeps=keeps, scratch=()))
        else:
            made.append(op)
    return tuple(made)


def to_images(name: str, y: str, wiring: Wiring, grouped: bool, mask: str) -> tuple[Op, ...]:
    """Attention from q to k and v of images (`b seen k d`) with a mask of numbers, `b s seen`: the memory-efficient
    kernel. A mask whose rows are no multiple of 8 is padded in every layer.

    Source: torch 2.13 aten/src/ATen/native/transformers/attention.cpp preprocess_mask, pad_bias.
    """
    given, bias = "bias.lowered", f"{y}.bias"
    masked = (
        _lowered(f"{name}.mask", mask, given, "b s seen"),
        ops.copy(f"{name}.pad_mask", given, bias, "b s seen8")
        if wiring.uneven
        else ops.view(f"{name}.mask_same", given, bias, "b s seen"),
    )

    def seen(t: Tensor) -> Tensor:
        own = t.name[:1] in ("k", "v")
        shape = t.shape.replace("efficient_workspace", "seen_workspace")
        return t._replace(shape=" ".join("seen" if own and axis == "s" else axis for axis in shape.split()))

    return tuple(
        made._replace(
            writes=tuple(map(seen, made.writes)),
            scratch_back=tuple(s._replace(tensor=seen(s.tensor)) for s in made.scratch_back),
            product="whole attention over seen" if made.product else "",
        )
        for op in _efficient(name, "q", "k", "v", y, grouped, mask, "d", converts=False)
        for made in (masked if op.name == f"{name}.mask" else (op,))
    )


def _lowered(name: str, x: str, y: str, shape: str) -> Op:
    """Autocast's cast where the function is called; nothing without autocast."""
    source = "torch 2.13 aten/src/ATen/autocast_mode.h lower_precision_fp"
    return Op(f"{name}.autocast", (x,), (Tensor(y, shape),), cast=True, autocast="lower", source=source)


def _eager(
    name: str, q: str, k: str, v: str, y: str, grouped: bool, mask: str, width: str, drop: bool, laid: bool = False
) -> tuple[Op, ...]:
    """transformers' eager_attention_forward: scores, scaled, masked, softmax in fp32, cast back, dropout.

    A product of transposed heads needs them contiguous: q always, k and v where neither repeating nor a cache (`laid`)
    has made them so.
    """
    n, scores = name, "b a s s"
    lies = grouped or laid
    return (
        *_repeated(n, k, v, grouped, width),
        ops.copy(f"{n}.q_flat", q, "q.flat", "b s a d"),
        *(() if lies else (ops.copy(f"{n}.k_flat", "k.heads", "k.flat", "b s a d"),)),
        ops.matmul(f"{n}.scores", "q.flat", "k.heads" if lies else "k.flat", "scores", scores),
        ops.scale(f"{n}.scaling", "scores", "scaled", scores),
        *_masked_softmax(n, "scaled", "probs.whole" if drop else "probs", mask, q),
        *((ops.dropout(f"{n}.dropout", "probs.whole", "probs", scores),) if drop else ()),
        *(() if lies else (ops.copy(f"{n}.v_flat", "v.heads", "v.flat", f"b s a {width}"),)),
        ops.matmul(f"{n}.product", "probs", "v.heads" if lies else "v.flat", "heads", f"b s a {width}"),
        ops.copy(f"{n}.contiguous", "heads", y, f"b s a {width}", gradient="new"),
        ops.leave("probs", "k.heads", "v.heads"),
    )


def _masked_softmax(n: str, x: str, y: str, mask: str, like: str) -> tuple[Op, ...]:
    shape = "b a s s"
    adds = Op(f"{n}.add_mask", (x, mask), (Tensor("masked", shape),), gradient="same", source=f"{ops.DERIVATIVES}: add")
    return (
        *((adds,) if mask else ()),
        *ops.softmax(f"{n}.softmax", "masked" if mask else x, "softmax", shape, "fp32"),
        ops.cast(f"{n}.cast", "softmax", y, shape, f"={like}"),
        ops.leave("masked" if mask else x),
    )


def _math(
    name: str, q: str, k: str, v: str, y: str, grouped: bool, mask: str, width: str, wiring: Wiring
) -> tuple[Op, ...]:
    """torch's reference: everything in fp32, under autocast too, the causal or given mask added in place. The mask and
    what was made of it are there until the function returns.

    Autocast casts what the function is given; with a mask k and v are repeated before it, without one inside. But one
    query a sequence is handed over with those of its group's other heads, if there is a mask, and nothing is repeated.
    A product of transposed heads needs them contiguous, as in `_eager`.
    """
    n, heads, few, scores = name, "b s a d", "b s k d", "b a s s"
    to = f"={q}.low" if wiring.half_math else "fp32"
    packed = bool(mask) and wiring.one and not wiring.copies
    lies = grouped or wiring.lays or packed
    values = f"b s a {width}"
    if mask:
        spread = {"k": few, "v": f"b s k {width}"} if packed else {"k": heads, "v": values}
        given = (
            *_repeated(n, k, v, grouped and not packed, width),
            *_lowered_heads(n, {q: heads, "k.heads": spread["k"], "v.heads": spread["v"]}),
            Op(
                f"{n}.mask",
                (mask,),
                (Tensor("bias", "b s s", f"={q}.low"),),
                source=f"{_ATEN}/attention.cpp convert_boolean_attn_mask",
            ),
        )
        k_low, v_low = "k.heads.low", "v.heads.low"
        made = (ops.cast(f"{n}.mask_float", "bias", "bias32", "b s s", to),)
    else:
        spread = {"k": few, "v": f"b s k {width}"}
        given = (
            ops.view(f"{n}.v_view", v, "v.view", f"b s k {width}", gradient="new"),
            *_lowered_heads(n, {q: heads, k: few, "v.view": f"b s k {width}"}),
        )
        k_low, v_low = f"{k}.low", "v.view.low"
        triangle = Op(f"{n}.causal", (), (Tensor("bias32", "s s", to),), scratch=(Tensor("ones", "s s", "bool"),))
        made = (triangle,) if wiring.causal and not wiring.decodes else ()
    across = spread if packed else {"k": heads, "v": values}
    inside = (
        ops.cast(f"{n}.q_float", f"{q}.low", "q32", heads, to),
        ops.cast(f"{n}.k_float", k_low, "k32", spread["k"], to),
        ops.cast(f"{n}.v_float", v_low, "v32", spread["v"], to),
        *made,
        ops.scale(f"{n}.scale_q", "q32", "q.scaled", heads),
        *(
            ops.copy(f"{n}.expand_{t}", f"{t}32", f"{t}.all", shape, gradient="new")
            if grouped and not mask
            else ops.view(f"{n}.expand_{t}", f"{t}32", f"{t}.all", shape)
            for t, shape in across.items()
        ),
        ops.scale(f"{n}.scale_k", "k.all", "k.scaled", across["k"]),
        (ops.view if wiring.one else ops.copy)(f"{n}.q_flat", "q.scaled", "q.flat", heads),
        (ops.view if lies else ops.copy)(f"{n}.k_flat", "k.scaled", "k.flat", across["k"]),
        ops.matmul(f"{n}.scores", "q.flat", "k.flat", "scores", scores)._replace(autocast=""),
        *ops.softmax(f"{n}.softmax", "scores", "probs.whole" if wiring.drops else "probs", scores, to),
        *((ops.dropout(f"{n}.dropout", "probs.whole", "probs", scores),) if wiring.drops else ()),
        ops.cast(f"{n}.second", "probs", "second", scores, f"={q}.low"),
        (ops.view if lies else ops.copy)(f"{n}.v_flat", "v.all", "v.flat", across["v"]),
        ops.matmul(f"{n}.product", "probs", "v.flat", "heads32", values)._replace(autocast=""),
        ops.cast(f"{n}.cast", "heads32", "heads", values, f"={q}.low"),
    )
    masks = (*(("bias",) if mask else ()), *(("bias32",) if made else ()))
    return (
        *given,
        *inside,
        ops.leave("second", "q.scaled", "k.all", "v.all", f"{q}.low", k_low, v_low, *masks),
        (ops.view if wiring.one else ops.copy)(f"{n}.contiguous", "heads", y, values, gradient="new"),
    )


def _lowered_heads(name: str, shapes: dict[str, str]) -> tuple[Op, ...]:
    return tuple(_lowered(f"{name}.{x}", x, f"{x}.low", shape) for x, shape in shapes.items())


def mask(wiring: Wiring, x: str, name: str = "mask") -> tuple[Op, ...]:
    """The 4-D mask the model makes once: boolean for sdpa, of the model's dtype for eager and before transformers 4.53.

    Before 4.53 the mask for sdpa was copied once, so that rows that see nothing see everything.
    """
    numbers = wiring.backend == "eager" or wiring.float_masks
    boolean = Tensor("causal", "b s s" if wiring.padded else "s s", "bool")
    shape = "s s" if (wiring.one_mask or not numbers or wiring.backend != "eager") and not wiring.padded else "b s s"
    scratch = (boolean,) if numbers else (Tensor("causal", "s s", "bool"),)
    if wiring.float_masks and wiring.backend != "eager":
        scratch = (Tensor("mask before rows are unmasked", "b s s", f"={x}"), Tensor("hidden", "b s s", "bool"))
    return (
        Op(
            name,
            (),
            (Tensor(name, shape, f"={x}" if numbers else "bool"),),
            scratch=scratch,
            source="transformers 4.51 modeling_attn_mask_utils.py _unmask_unattended"
            if wiring.float_masks
            else "transformers 5.24 masking_utils.py",
        ),
    )


def large_tiles(capability: tuple[int, int] | None) -> bool:
    """Whether a card's shared memory holds tiles of 128 x 128, which sm86, sm89 and sm120 have too little for.

    Source: torch 2.13 aten/src/ATen/native/transformers/cuda/attention_backward.cu; read, not measured.
    """
    return capability is None or capability == (8, 0) or capability[0] in (9, 10)


def efficient_workspace_bytes(
    s: Size,
    widths: tuple[int, int],
    pairs: Size,
    half: bool,
    large_tiles: bool,
    by: Arithmetic[Size],
    keys: Size | None = None,
) -> Size:
    """Bytes of workspace that memory-efficient attention's backward takes for one head of one sequence.

    `widths` are a head's of queries and keys, and of values; `pairs` is batch x heads; `by` is how one run's are
    counted, or many's. `keys`: how many there are, where they are of another sequence than the `s` queries.
    Source: torch 2.13 aten/src/ATen/native/transformers/cuda/mem_eff_attention/kernel_backward.h.
    """
    d, most = widths[0], max(widths)
    if most <= 64:
        rows, columns, widest = 64, 64, 64
    elif most <= 96:
        rows, columns, widest = 128, 64, 96
    elif most <= 128 and large_tiles:
        rows, columns, widest = 128, 128, 128
    else:
        rows, columns, widest = 64, 64, 128 if most <= 128 else 65536
    size = -(-s // rows) * -(-d // columns) * (rows * columns * 4 + 16)
    if half and widest > rows:  # dk and dv do not stay in registers: fp32, once per split of the keys
        blocks = -(-(s if keys is None else keys) // columns)
        splits = by.most(1, by.least(blocks, 200 // pairs))
        padded = sum(-(-width // rows) * rows for width in widths)
        size = size + 4 * splits * (blocks * columns) * padded
    return size
