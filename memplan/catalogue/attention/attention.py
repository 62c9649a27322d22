"""Attention: the kernels that compute it, and which of them torch and transformers choose.

Every variant reads q (`b s a d`), k and v (`b s k d`) and writes the heads' outputs (`b s a d`).
"""

from __future__ import annotations

from memplan.catalogue.attention.flash_attention import flash, flash_2, padded_flash_2, varlen
from memplan.catalogue.attention.flex_attention import flex
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Keep, Op, Scratch, Tensor
from memplan.models.model import ModelSpec

QUERIES, KEYS, SCORES = "b s a d", "b s k d", "b a s s"
FLATTENING = ("eager", "math")  # kernels that multiply batches of matrices, each a head of a sequence
_ATEN = "torch 2.13 aten/src/ATen/native/transformers"


def flattened(op: Op, of_tower: bool = False) -> Op:
    """Return attention's copy of its heads as a view, which suffices for a single sequence, or `of_tower` for a single
    image; leave other operations."""
    is_copy = op.name.endswith("_flat") and not op.view and ("va" in op.writes[0].shape.split()) == of_tower
    return op._replace(view=True) if is_copy else op


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
    """Return the attention of one layer, with the copies of k and v that its kernel needs.

    mask   name of the mask for the kernel, if it takes one; by default the model's mask for the layer's kind
    width  axis of the values' head width
    """
    kernel = _attention(name, q, k, v, y, wiring, grouped, sliding, mask or mask_name(sliding), width)
    return cached(name, wiring, kernel, sliding, (k, v))


def mask_name(sliding: bool) -> str:
    """Return the name of the model's mask for layers with a sliding window, or for those without."""
    return "window_mask" if sliding else "mask"


def cached(
    name: str, wiring: Wiring, kernel: tuple[Op, ...], sliding: bool = False, tensors: tuple[str, ...] = ("k", "v")
) -> tuple[Op, ...]:
    """Return the kernel, reading keys and values of all tokens so far if there is a cache."""
    if not wiring.caching:
        return kernel
    return (Op(f"{name}.cache", tensors, caches="kv_window" if sliding else "kv"), *kernel)


def repeats_by_view(wiring: Wiring, sliding: bool = False) -> bool:
    """Return whether a single key head is repeated for all queries by a view.

    transformers' repeat_kv reshapes an expanded tensor, which copies only if there are several heads. A kernel that
    does not accept such a view copies it itself.
    """
    masked = wiring.has_mask(sliding)
    backend = wiring.masked if masked else wiring.backend
    return backend == "eager" or (backend == "efficient" and masked)


def one_head(name: str, wiring: Wiring, sliding: bool = False) -> tuple[Op, ...]:
    """Return `k.all` and `v.all`, the single head of k and v viewed for every query head, read from the cache if any.

    Source: transformers 5.24 models/llama/modeling_llama.py repeat_kv.
    """
    views = tuple(ops.view(f"{name.rpartition('.')[0]}.repeat_{t}", t, f"{t}.all", "b s a d", "new") for t in "kv")
    return cached(name, wiring, views, sliding)


def keys_and_values(
    m: ModelSpec, name: str, wiring: Wiring, sliding: bool = False, grouped: bool | None = None
) -> tuple[tuple[Op, ...], str, str, Wiring, bool]:
    """Return operations that make a kernel's keys and values, their names, and the kernel's `wiring` and `grouped`.

    A single head that all queries share is viewed for every query head, if the kernel accepts such a view.
    """
    grouped = m.num_key_value_heads != m.num_attention_heads if grouped is None else grouped
    if not (grouped and m.num_key_value_heads == 1 and repeats_by_view(wiring, sliding)):
        return (), "k", "v", wiring, grouped
    return one_head(name, wiring, sliding), "k.all", "v.all", wiring._replace(caching=False), False


def read_shared_cache(name: str, tensors: tuple[str, ...], sliding: bool = False) -> Op:
    """Read the keys and values of all tokens so far that another layer has cached."""
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
    given = wiring.packed is not None and wiring.packed.mask == "given"
    floats = (wiring.float_masks or given) and mask == mask_name(sliding)  # families name masks of their own otherwise
    backend = wiring.masked if masked else wiring.backend
    if wiring.copies and backend != "eager":
        plain = wiring._replace(copies="")
        every = wiring.copies == "all" or (masked and backend != "flex")
        return (
            *_copied(name, q, k, v, grouped, every),
            *laid_out_as(
                y,
                _attention(
                    name, f"{q}.given" if every else q, "k.given", "v.given", y, plain, False, sliding, mask, width
                ),
                every and backend == "flash",
            ),
            ops.release_names("k.given", "v.given", *((f"{q}.given",) if every else ())),
        )
    match backend:
        case "flash" | "flash_2":
            if width != "d":
                return padded_flash_2(name, q, k, v, y, wiring, width)
            if backend == "flash" and wiring.packed is not None and wiring.packed.is_varlen:
                return varlen(name, q, k, v, y, grouped, wiring.packed.repeats)
            heads = ops.view(f"{name}.v_heads", v, "v.heads", "b s k d")
            if backend == "flash_2":
                return _mark_unmasked(wiring, (heads, *flash_2(name, q, k, "v.heads", y, wiring, grouped)))
            return _mark_unmasked(wiring, (heads, flash(name, q, k, "v.heads", y, grouped, wiring.variant)))
        case "efficient":
            packed = (
                wiring.has_one_query and masked and not wiring.copies
            )  # the queries of a head group become rows of one query
            kernel = _efficient(name, q, k, v, y, grouped and not packed, mask if masked else "", width, wiring.records)
            if masked and floats:
                kernel = _with_float_mask(name, y, mask, kernel)
            return _mark_unmasked(wiring, kernel)
        case "math":
            kernel = _math(name, q, k, v, y, grouped, mask if masked else "", width, wiring)
            given = ops.lowered(f"{name}.mask", mask, "bias", "b s s")
            return tuple(given if floats and op.name == f"{name}.mask" else op for op in kernel)
        case "flex" | "eager":
            laid = wiring.is_head_major
            return (
                flex(name, q, k, v, y, grouped, mask, width, wiring.padded)
                if backend == "flex"
                else eager(name, q, k, v, y, grouped, mask if masked else "", width, wiring.drops, laid)
            )
        case other:
            raise AssertionError(other)


def _mark_unmasked(wiring: Wiring, kernel: tuple[Op, ...]) -> tuple[Op, ...]:
    """Mark the kernel as unmasked if no mask hides anything."""
    if wiring.causal:
        return kernel
    return tuple(op._replace(product="whole attention") if op.product == "attention" else op for op in kernel)


def repeated(name: str, k: str, v: str, grouped: bool, width: str) -> tuple[Op, ...]:
    """Repeat k and v for every query head (transformers' repeat_kv, torch's enable_gqa); copies only if grouped."""
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
    """Flash attention writes its output in q's layout. If q is contiguous head by head, the output needs a copy."""
    if not heads_first:
        return kernel
    *before, last = kernel
    outputs = tuple(t._replace(name="heads") if t.name == y else t for t in last.writes)
    keeps = tuple(k._replace(what="heads") if k.what == y else k for k in last.keeps)
    copy = ops.copy(f"{last.name}.contiguous", "heads", y, "b s a d")
    return (*before, last._replace(writes=outputs, keeps=keeps), copy, ops.release_names("heads"))


def _copied(name: str, q: str, k: str, v: str, grouped: bool, copies_all: bool) -> tuple[Op, ...]:
    """Repeat k and v for every query head. `copies_all`: also copy q, and k and v if not repeated.

    Source: transformers 4.48 integrations/sdpa_attention.py sdpa_attention_forward.
    """
    copy_or_view, repeated = ops.copy if copies_all else ops.view, {k: "k.given", v: "v.given"}
    return (
        *(
            op
            for t in (k, v)
            for op in (
                ops.view(f"{name}.{t}_view", t, f"{t}.view", "b s k d", gradient="new"),
                ops.copy(f"{name}.repeat_{t}", f"{t}.view", repeated[t], "b s a d", gradient="new"),
            )
            if grouped
        ),
        *(copy_or_view(f"{name}.{t}_given", t, repeated[t], "b s k d") for t in (k, v) if not grouped),
        *((ops.copy(f"{name}.{q}_given", q, f"{q}.given", "b s a d"),) if copies_all else ()),
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
    records: bool,
    converts: bool = True,
) -> tuple[Op, ...]:
    """Return memory-efficient attention: keeps q, k, v, the output, fp32 row sums (rounded up to 32 rows) and the mask.

    The sums are computed only if autograd `records`. Backward's workspace depends on the tile size that the GPU's
    shared memory allows: `efficient_workspace` bytes per head (see `efficient_workspace_bytes`). Every layer converts a
    boolean mask to q's dtype, and pads the result into another tensor if its rows are no multiple of 8. A float mask is
    not converted (`converts`). Autocast casts the function's arguments. With a mask, k and v are repeated before the
    call, otherwise inside it.
    """
    lse, seed, offset = f"{y}.lse", f"{y}.seed", f"{y}.offset"
    if mask:
        q1, k1, v1 = f"{q}.lowered", "k.lowered", "v.lowered"
        inner = (
            *repeated(name, k, v, grouped, width),
            ops.lowered(f"{name}.q", q, q1, "b s a d"),
            ops.lowered(f"{name}.k", "k.heads", k1, "b s a d"),
            ops.lowered(f"{name}.v", "v.heads", v1, f"b s a {width}"),
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
            ops.lowered(f"{name}.q", q, q1, "b s a d"),
            ops.lowered(f"{name}.k", k, "k.lowered", "b s k d"),
            ops.lowered(f"{name}.v", v, "v.lowered", f"b s k {width}"),
            *repeated(name, "k.lowered", "v.lowered", grouped, width),
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
        ops.release_names("k.heads", "v.heads"),
    )


def _with_float_mask(name: str, y: str, mask: str, kernel: tuple[Op, ...]) -> tuple[Op, ...]:
    """Return the memory-efficient kernel with a float mask, which it keeps.

    Under autocast every layer casts the mask and keeps the cast. If the mask's rows are no multiple of 8, every layer
    pads it and keeps the padded copy.

    Source: torch 2.13 aten/src/ATen/native/transformers/attention.cpp preprocess_mask, pad_bias.
    """
    even, cast_mask, padded, bias = f"{y}.mask.even", f"{y}.mask", f"{y}.mask.padded", f"{y}.bias"
    operations: list[Op] = []
    for op in kernel:
        if op.name == f"{name}.mask":
            operations.append(ops.view(op.name, mask, even, "b s s_even"))  # the part whose autocast copy is kept
            operations.append(ops.lowered(op.name, even, cast_mask, "b s s_even"))
            operations.append(Op(f"{name}.pad_mask", (mask,), (Tensor(padded, "b s s_uneven8", f"={cast_mask}"),)))
        elif bias in op.reads:
            targets = tuple(dict.fromkeys(k.of for k in op.keeps))
            keeps = (
                *(k for k in op.keeps if k.what != bias),
                *(Keep(what, x) for x in targets for what in (cast_mask, padded)),
            )
            reads = (*(r for r in op.reads if r != bias), cast_mask, padded)
            operations.append(op._replace(reads=reads, keeps=keeps, scratch=()))
        else:
            operations.append(op)
    return tuple(operations)


def to_images(name: str, y: str, wiring: Wiring, grouped: bool, mask: str) -> tuple[Op, ...]:
    """Attend from q to k and v of images (`b seen k d`) with a float mask, `b s seen`, in the memory-efficient kernel
    or in transformers' eager products.

    For the kernel, every layer pads a mask whose rows are no multiple of 8.

    Source: torch 2.13 aten/src/ATen/native/transformers/attention.cpp preprocess_mask, pad_bias.
    """
    cast_mask, bias = "bias.lowered", f"{y}.bias"
    masked = (
        ops.lowered(f"{name}.mask", mask, cast_mask, "b s seen"),
        ops.copy(f"{name}.pad_mask", cast_mask, bias, "b s seen8")
        if wiring.pads_image_mask
        else ops.view(f"{name}.mask_same", cast_mask, bias, "b s seen"),
    )

    kernel = (
        eager(name, "q", "k", "v", y, grouped, mask, "d", wiring.drops, wiring.caching)
        if wiring.backend == "eager"
        else _efficient(name, "q", "k", "v", y, grouped and not wiring.decodes, mask, "d", wiring.records, False)
    )

    def seen(t: Tensor) -> Tensor:
        is_key = t.name[:1] in ("k", "v")
        shape = t.shape.replace("efficient_workspace", "seen_workspace").replace(SCORES, "b a s seen")
        return t._replace(shape=" ".join("seen" if is_key and axis == "s" else axis for axis in shape.split()))

    return tuple(
        out._replace(
            writes=tuple(map(seen, out.writes)),
            scratch_back=tuple(s._replace(tensor=seen(s.tensor)) for s in out.scratch_back),
            product="whole attention over seen" if out.product == "attention" else out.product,
        )
        for op in kernel
        for out in (masked if op.name == f"{name}.mask" else (op,))
    )


def eager(  # noqa: PLR0913, PLR0917 (each is a choice of its caller)
    name: str,
    q: str,
    k: str,
    v: str,
    y: str,
    grouped: bool,
    mask: str,
    width: str,
    drop: bool,
    laid: bool = False,
    softmax: str = "fp32",
) -> tuple[Op, ...]:
    """Return transformers' eager_attention_forward: scores, scaled, masked, fp32 softmax, cast back, dropout.

    A product of transposed heads needs them contiguous: always q, and k and v unless repeating or a cache (`laid`) has
    already made them contiguous. `softmax`: its dtype, empty for that of the scores.
    """
    n, scores = name, "b a s s"
    kv_contiguous = grouped or laid
    return (
        *repeated(n, k, v, grouped, width),
        ops.copy(f"{n}.q_flat", q, "q.flat", "b s a d"),
        *(() if kv_contiguous else (ops.copy(f"{n}.k_flat", "k.heads", "k.flat", "b s a d"),)),
        ops.matmul(f"{n}.scores", "q.flat", "k.heads" if kv_contiguous else "k.flat", "scores", scores),
        ops.scale(f"{n}.scaling", "scores", "scaled", scores),
        *_masked_softmax(n, "scaled", "probs.whole" if drop else "probs", mask, q, softmax),
        *((ops.dropout(f"{n}.dropout", "probs.whole", "probs", scores),) if drop else ()),
        *(() if kv_contiguous else (ops.copy(f"{n}.v_flat", "v.heads", "v.flat", f"b s a {width}"),)),
        ops.matmul(f"{n}.product", "probs", "v.heads" if kv_contiguous else "v.flat", "heads", f"b s a {width}"),
        ops.copy(f"{n}.contiguous", "heads", y, f"b s a {width}", gradient="new"),
        ops.release_names("probs", "k.heads", "v.heads"),
    )


def _masked_softmax(n: str, x: str, y: str, mask: str, like: str, dtype: str) -> tuple[Op, ...]:
    shape = "b a s s"
    adds = Op(f"{n}.add_mask", (x, mask), (Tensor("masked", shape),), gradient="same", source=f"{ops.DERIVATIVES}: add")
    return (
        *((adds,) if mask else ()),
        *ops.softmax(f"{n}.softmax", "masked" if mask else x, "softmax", shape, dtype),
        ops.cast(f"{n}.cast", "softmax", y, shape, f"={like}"),
        ops.release_names("masked" if mask else x),
    )


def _math(
    name: str, q: str, k: str, v: str, y: str, grouped: bool, mask: str, width: str, wiring: Wiring
) -> tuple[Op, ...]:
    """Return torch's reference kernel: all fp32, even under autocast, with the causal or given mask added in place.

    The mask and its conversions live until the function returns. Autocast casts the function's arguments. With a mask,
    k and v are repeated before the call, otherwise inside it. A single query per sequence with a mask is passed
    together with the other heads of its group, and nothing is repeated. A product of transposed heads needs them
    contiguous, as in `eager`. What was repeated before the call lives longer than it.
    """
    n, heads, few, scores = name, "b s a d", "b s k d", "b a s s"
    to = f"={q}.low" if wiring.half_math else "fp32"
    packed = bool(mask) and wiring.has_one_query and not wiring.copies
    kv_contiguous = grouped or wiring.is_head_major or packed
    values = f"b s a {width}"
    if mask:
        spread = {"k": few, "v": f"b s k {width}"} if packed else {"k": heads, "v": values}
        prepared = (
            *repeated(n, k, v, grouped and not packed, width),
            *_lowered_heads(n, {q: heads, "k.heads": spread["k"], "v.heads": spread["v"]}),
            Op(
                f"{n}.mask",
                (mask,),
                (Tensor("bias", "b s s", f"={q}.low"),),
                source=f"{_ATEN}/attention.cpp convert_boolean_attn_mask",
            ),
        )
        k_low, v_low = "k.heads.low", "v.heads.low"
        bias32 = (ops.cast(f"{n}.mask_float", "bias", "bias32", "b s s", to),)
    else:
        spread = {"k": few, "v": f"b s k {width}"}
        prepared = (
            ops.view(f"{n}.v_view", v, "v.view", f"b s k {width}", gradient="new"),
            *_lowered_heads(n, {q: heads, k: few, "v.view": f"b s k {width}"}),
        )
        k_low, v_low = f"{k}.low", "v.view.low"
        triangle = Op(f"{n}.causal", (), (Tensor("bias32", "s s", to),), scratch=(Tensor("ones", "s s", "bool"),))
        bias32 = (triangle,) if wiring.causal and not wiring.decodes else ()
    across = spread if packed else {"k": heads, "v": values}
    inside = (
        ops.cast(f"{n}.q_float", f"{q}.low", "q32", heads, to),
        ops.cast(f"{n}.k_float", k_low, "k32", spread["k"], to),
        ops.cast(f"{n}.v_float", v_low, "v32", spread["v"], to),
        *bias32,
        ops.scale(f"{n}.scale_q", "q32", "q.scaled", heads),
        *(
            ops.copy(f"{n}.expand_{t}", f"{t}32", f"{t}.all", shape, gradient="new")
            if grouped and not mask
            else ops.view(f"{n}.expand_{t}", f"{t}32", f"{t}.all", shape)
            for t, shape in across.items()
        ),
        ops.scale(f"{n}.scale_k", "k.all", "k.scaled", across["k"]),
        (ops.view if wiring.has_one_query else ops.copy)(f"{n}.q_flat", "q.scaled", "q.flat", heads),
        (ops.view if kv_contiguous else ops.copy)(f"{n}.k_flat", "k.scaled", "k.flat", across["k"]),
        ops.matmul(f"{n}.scores", "q.flat", "k.flat", "scores", scores)._replace(autocast=""),
        ops.release_names("k.scaled"),
        *ops.softmax(f"{n}.softmax", "scores", "probs.whole" if wiring.drops else "probs", scores, to),
        *((ops.dropout(f"{n}.dropout", "probs.whole", "probs", scores),) if wiring.drops else ()),
        ops.cast(f"{n}.second", "probs", "second", scores, f"={q}.low"),
        (ops.view if kv_contiguous else ops.copy)(f"{n}.v_flat", "v.all", "v.flat", across["v"]),
        ops.matmul(f"{n}.product", "probs", "v.flat", "heads32", values)._replace(autocast=""),
        ops.cast(f"{n}.cast", "heads32", "heads", values, f"={q}.low"),
    )
    masks = (*(("bias",) if mask else ()), *(("bias32",) if bias32 else ()))
    return (
        *prepared,
        *inside,
        ops.release_names("probs", "second", "q.scaled", "k.all", "v.all", f"{q}.low", k_low, v_low, *masks),
        (ops.view if wiring.has_one_query else ops.copy)(f"{n}.contiguous", "heads", y, values, gradient="new"),
        *((ops.release_names("k.heads", "v.heads"),) if mask else ()),
    )


def _lowered_heads(name: str, shapes: dict[str, str]) -> tuple[Op, ...]:
    return tuple(ops.lowered(f"{name}.{x}", x, f"{x}.low", shape) for x, shape in shapes.items())


def mask(wiring: Wiring, x: str, name: str = "mask") -> tuple[Op, ...]:
    """Return the 4-D mask that the model builds once.

    It is boolean for sdpa, and has the model's dtype for eager and before transformers 4.53, which also copied the sdpa
    mask once so that fully masked rows attend to everything.
    """
    is_float = wiring.backend == "eager" or wiring.float_masks
    is_per_row = wiring.masks_rows
    boolean = Tensor("causal", "b s s" if is_per_row else "s s", "bool")
    shape = "s s" if (wiring.one_mask or not is_float or wiring.backend != "eager") and not is_per_row else "b s s"
    scratch = (boolean,) if is_float else (Tensor("causal", "s s", "bool"),)
    if wiring.packed is not None and not is_float:
        scratch = (boolean, boolean._replace(name="pairs of one sequence"))
    if wiring.float_masks and wiring.backend != "eager":
        scratch = (Tensor("mask before rows are unmasked", "b s s", f"={x}"), Tensor("hidden", "b s s", "bool"))
    return (
        Op(
            name,
            (),
            (Tensor(name, shape, f"={x}" if is_float else "bool"),),
            scratch=scratch,
            source="transformers 4.51 modeling_attn_mask_utils.py _unmask_unattended"
            if wiring.float_masks
            else "transformers 5.24 masking_utils.py",
        ),
    )
