"""Inference as a rewrite of a stack: no labels, no loss, and keys and values cached for later tokens.

The prompt is read in one pass, whose cached tensors (`holds`) stay. Every further token is a pass over a sequence of
one, on what the previous pass left (`past`). Each operation marked with `Op.caches` is replaced by the operations of
the cache. What later kernels compute from keys and values then has one of these axes:

    kv, past                all tokens so far, and those before this pass
    kv_window, past_window  the tokens in a sliding layer's window, and those before this pass
    kv_static               the capacity of a static cache
    source                  tokens that an encoder has read; their keys and values are computed in the first pass only
    quantized, residual     tokens that were quantised before this pass, and tokens that were not

Quantised caches are in `memplan.catalogue.inference.quantized_caches`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from memplan.catalogue.experts.decoding_experts import batched
from memplan.catalogue.inference import offloaded_caches, quantized_caches
from memplan.catalogue.inference.next_token import GENERATE, OF_PART, looked_up, named_before, next_token
from memplan.catalogue.inference.one_pass import Pass
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import once_each, rewrite_lists
from memplan.core.ir import Op, Run, Stack, Tensor, outside

TOKENS = ("s", "s1", "s8", "s32", "s128", "s_even", "s_uneven", "s_uneven8")  # axes of a sequence's tokens

_CACHE = "transformers 5.24 cache_utils.py"
_LITGPT = "litgpt 0.5.3 generate/sequentially.py sequential, model.py"


def inference(stack: Stack, now: Pass) -> Stack:
    """Return the stack as the pass runs it.

    In families that build a mask for every kernel, attention sees the full capacity of a static cache.
    """
    now = now._replace(reads_capacity=now.reads_capacity or any(op.name == "mask" for op in stack.before))
    stack = _with_decoder_ids(stack)

    @once_each
    def changed(operations: tuple[Op, ...]) -> tuple[Op, ...]:
        return tuple(_without_grad(with_cache(tuple(batched(operations)) if now.batches else operations, now)))

    runs = tuple(
        Run(
            tuple(b._replace(ops=changed(b.ops)) for b in run.blocks),
            run.times,
            tuple(_without_grad(with_keys(run.before, now))),
        )
        for run in stack.runs
    )
    before = tuple(_without_mask(_inputs(op, now), now) for op in _without_grad(with_keys(stack.before, now)))
    if now.has_row_positions:
        before = tuple(map(_of_rows_each, before))
    previous = tuple(named_before(now)) if now.extends or now.verifies else ()
    if previous:  # alive throughout, from the point at which a dtype can be named
        at = next((i for i, op in enumerate(before, 1) if any(t.name == "embeds" for t in op.writes)), len(before))
        before = (*before[:at], Op("generate.before", (), previous, source=GENERATE), *before[at:])
    if now.holds_prompt_logits:
        prompt = Tensor("logits of the prompt", "b past v", "fp32" if now.casts_logits else "=embeds")
        before = (*before, Op("generate.lingers", (), (prompt,), holds="step", source=GENERATE))
    before = (*before, looked_up(now)) if now.uses_lookup else before
    after = tuple(_cast_logits((*_without_grad(_head(stack.after, now)), *_last_hidden(stack.after)), now))
    if now.extends and not now.decodes:
        after = (*after, ops.release_names(OF_PART))
    cached = (t for run in runs for block in run.blocks for op in block.ops if op.holds == "cache" for t in op.writes)
    return Stack(before, runs, (*after, *next_token(after, now, [t for t in cached if t.name in _REORDERED])))


def keeping(stack: Stack) -> Iterator[tuple[str, int]]:
    """Yield for each run of blocks how many blocks cache something, and the axis that counts the run's repetitions."""
    for run in stack.runs:
        yield run.times, sum(any(op.holds == "cache" for op in block.ops) for block in run.blocks)


def evaluation(stack: Stack, now: Pass, *, returns: bool = True) -> Stack:
    """Return the stack with its loss as an evaluation runs it: autograd records nothing.

    The model's outputs live until its caller has received them, if it `returns` them.
    """
    changed = once_each(lambda operations: tuple(_without_grad(with_cache(operations, now))))
    runs = tuple(
        Run(tuple(b._replace(ops=changed(b.ops)) for b in run.blocks), run.times, tuple(_without_grad(run.before)))
        for run in stack.runs
    )
    tail = (*stack.after, *stack.loss)
    returned = returned_by(stack, now.casts_logits) if returns else None
    after = (op._replace(holds=RETURNED) if returned and returned in op.writes else op for op in tail)
    return Stack(tuple(_without_grad(stack.before)), runs, tuple(_without_grad(after)))


def with_caches(stack: Stack) -> Stack:
    """Return the stack as training runs it with a cache, if it has one, and positions for each sequence."""
    now = Pass("train", "dynamic", last_only=False)
    stack = stack._replace(before=tuple(map(_of_rows_each, stack.before)))
    return rewrite_lists(stack, lambda operations: tuple(with_cache(operations, now)))


RETURNED = "returned"  # value of `Op.holds` for what an evaluation's caller receives


def returned_by(stack: Stack, wide: bool) -> Tensor | None:
    """Return the logits that a model with a loss returns, or None if they never exist all at once.

    They are the fp32 cast of the outputs if there is one, or the model's own cast (`wide`), or the logits themselves.
    """
    tensors = {t.name: t for op in (*stack.after, *stack.loss) for t in op.writes}
    all_logits = [t for op in stack.after for t in op.writes if t.shape.split() == ["b", "s", "v"]]
    cast = tensors.get("outputs") or (tensors.get("logits32") if wide else None)
    return cast or tensors.get("logits") or (all_logits[-1] if all_logits else None)


def _without_grad(operations: Iterable[Op]) -> Iterator[Op]:
    """Mark the operations as not requiring gradients."""
    return (op._replace(requires_gradient=False) if op.requires_gradient else op for op in operations)


def _with_decoder_ids(stack: Stack) -> Stack:
    """Move a decoder's ids, which are computed from the labels, to the inputs."""
    shifts = [op for operations in outside(stack) for op in operations if op.name == "decoder_input_ids"]
    if not shifts:
        return stack
    (ids,) = shifts
    before = (op._replace(writes=(*op.writes, *ids.writes)) if op.name == "inputs" else op for op in stack.before)
    runs = (run._replace(before=tuple(op for op in run.before if op != ids)) for run in stack.runs)
    return stack._replace(before=tuple(op for op in before if op != ids), runs=tuple(runs))


def _without_mask(op: Op, now: Pass) -> Op:
    """Read the ids instead of the attention mask in assisted generation.

    There the loops hold the mask, and `memplan.resolve.assisted` counts it. The ids have its dtype and lifetime.
    """
    if not (now.verifies or now.proposes):
        return op
    return op._replace(reads=tuple("ids" if name == "attention_mask" else name for name in op.reads))


def _inputs(op: Op, now: Pass) -> Op:
    """Return token ids and, in generation, a mask of ones for all tokens, even if a pass reads only one token."""
    if op.name != "inputs":
        return op
    tokens = "kv" if now.decodes else "prompt" if now.part else "s"
    tensors = [t for t in op.writes if t.name != "labels"]
    if now.verifies or now.proposes:  # `memplan.resolve.assisted` counts the loops' tensors
        return op._replace(writes=tuple(t for t in tensors if t.name != "attention_mask"), source=GENERATE)
    if now.generates and now.has_encoder:
        tensors += [Tensor("all ids", "b kv", "int64")] if now.decodes else []
    elif now.generates:
        tensors = [t for t in tensors if t.name != "attention_mask"]
        tensors.append(Tensor("attention_mask", f"b {tokens}", "int64"))
        tensors += [Tensor("all ids", f"b {tokens}", "int64")] if now.decodes else []
        tensors = [t._replace(shape=f"b {tokens}") if t.name == "ids" and now.part else t for t in tensors]
    return op._replace(writes=tuple(tensors), source=GENERATE if now.generates or now.encodes else op.source)


def with_keys(operations: tuple[Op, ...], now: Pass) -> Iterator[Op]:
    """Yield masks built once for all layers, reduced to one token's row in decoding."""
    for op in operations:
        axis = now.keys("kv_window" if "window" in op.name else "kv")
        yield along(op, axis, op.name in _OF_ALL) if axis and not op.weights else op


def with_cache(operations: tuple[Op, ...], now: Pass) -> Iterator[Op]:
    """Yield a block's operations with those of its caches."""
    tensors_by_name: dict[str, Tensor] = {}
    viewed: dict[str, str] = {}  # name of the tensor that a view aliases
    renames: dict[str, str] = {}  # names that the cache replaces from here on
    key_names: set[str] = set()
    axis = ""
    for source_op in operations:
        op = (_renamed_kept if now.phase == "train" else _renamed)(source_op, renames) if renames else source_op
        if op.caches == "state":
            tensors_by_name |= {t.name: t for t in op.writes}
            (t,) = op.writes
            if t.dtype.startswith("="):
                t = t._replace(dtype=f"={renames.get(t.dtype[1:], t.dtype[1:])}")
            yield from _persistent(op.name, t, now, f"{_CACHE} LinearAttentionLayer", op.reads)
            continue
        if op.caches == "source":
            yield from _crossed(op, now)
            renames |= {name: _named(name) for t in op.writes for name in (t.name.replace(".kept", ""),)}
            continue
        if op.caches:
            axis = now.keys(op.caches)
            if op.view:  # the cache of another layer
                key_names |= set(op.reads)
                continue
            tensors = [tensors_by_name[name] for name in op.reads]
            if now.static:
                yield from _offloaded(_written(op, tensors, now), op.caches, now)
                if now.longer and op.caches == "kv_window" and not now.decodes:  # attention reads the uncached tensors
                    continue
            elif now.stored is not None:
                new = [(t, _named(t.name)) for t in tensors]
                if not now.extends:  # attention reads the uncached tensors
                    yield from quantized_caches.prompt(op.name, new, _keyed, now.stored, now.beams)
                    continue
                yield from quantized_caches.tokens(
                    op.name, new, _keyed, axis, now.stored, now.requantises_cache, now.beams
                )
            else:
                roots = [viewed.get(name, name) for name in op.reads]
                yield from _offloaded(_update(op, tensors, now, roots, tensors_by_name), op.caches, now)
            renames |= {name: _named(name) for name in op.reads}
            key_names |= {_named(name) for name in op.reads}
            continue
        if axis:
            of_keys = bool(op.reads) and key_names.issuperset(op.reads)
            key_names |= {t.name for t in op.writes} if of_keys else set()
            op = along(op, axis, of_keys)
        tensors_by_name |= {t.name: t for t in op.writes}
        if op.view and op.reads:
            viewed |= {t.name: viewed.get(op.reads[0], op.reads[0]) for t in op.writes}
        yield op


def _crossed(op: Op, now: Pass) -> Iterator[Op]:
    """Yield the cache of keys and values of the encoder's output: the first pass fills it, later passes read it."""
    source = f"{_CACHE} EncoderDecoderCache, DynamicLayer.update, StaticLayer.update"
    caches = [t._replace(name=_named(t.name.replace(".kept", ""))) for t in op.writes]
    if now.decodes:
        for t in caches:
            yield from _persistent(f"{op.name}.{t.name}", t, now, source)
        if now.static:
            yield from _persistent(f"{op.name}.length", _LENGTH_ACROSS, now, source)
        return
    if now.static:
        yield from _in_place(op, op.reads, caches, now, source)
    else:
        for name, t in zip(op.reads, caches, strict=True):
            yield Op(f"{op.name}.{name}", (name,), (t,), holds="cache", source=source)
    yield ops.release_names(*op.reads)


_LENGTH_ACROSS = Tensor("length of the cross cache", "", "int64")
_REORDERED = (
    *("key cache", "value cache", "latent cache", "index key cache"),
    *("key cache residual", "value cache residual"),
    *("cross key cache", "cross value cache"),
)
_OF_ALL = ("alibi", "ones")  # computed before the blocks, for all tokens so far
_NAMES = {"kv.normed": "latent", "k.turned": "rotated key", "index.k": "index key"}
_FIRST = {"k": "key", "k1": "key", "v": "value", "v0": "value", "v1": "value"}  # by the part of the name before a dot


def _offloaded(operations: Iterable[Op], axis: str, now: Pass) -> Iterator[Op]:
    """Yield the operations of a layer's cache, marking what is offloaded to the host. Lengths stay."""
    offloads = now.offloads(axis)
    away = offloaded_caches.AWAY_WINDOW if axis == "kv_window" else offloaded_caches.AWAY
    for op in operations:
        is_offloaded = offloads and op.holds == "cache" and not op.writes[0].name.startswith("length")
        yield op._replace(holds=away) if is_offloaded else op


def _named(name: str) -> str:
    """Return the name of a tensor's cache."""
    label = _NAMES.get(name) or _FIRST.get(name.partition(".")[0], name)
    return f"cross {label} cache" if name.endswith(".cross") else f"{label} cache"


def _renamed(op: Op, names: Mapping[str, str]) -> Op:
    if names.keys().isdisjoint(op.reads):
        return op
    return op._replace(reads=tuple(names.get(name, name) for name in op.reads))


def _renamed_kept(op: Op, names: Mapping[str, str]) -> Op:
    """Return the operation with what it keeps for backward renamed, too."""

    def new(name: str) -> str:
        return names.get(name, name)

    keeps = tuple(k._replace(what=new(k.what), of=new(k.of)) for k in op.keeps)
    scratch = tuple(s._replace(of=new(s.of)) for s in op.scratch_back)
    return _renamed(op, names)._replace(keeps=keeps, scratch_back=scratch)


def _update(
    op: Op, tensors: list[Tensor], now: Pass, roots: list[str], tensors_by_name: Mapping[str, Tensor]
) -> Iterator[Op]:
    """Yield the update of a layer's cache: each old tensor is concatenated with the new tokens in a new tensor.

    The caller's names keep the new tokens until all are done; with a window, they also keep the old tensors. `roots`:
    names of the tensors that the new ones are views of. A prompt that is cached without a copy keeps all of them.
    """
    source = op.source or f"{_CACHE} DynamicLayer.update, DynamicSlidingWindowLayer.update"
    windowed = op.caches == "kv_window"
    old: list[str] = []
    if windowed:
        yield from _persistent(f"{op.name}.window", Tensor("length of the window", "", "int64"), now, source)
    for i, t in enumerate(tensors):
        new = _named(t.name)
        label, before = new.removesuffix(" cache"), f"{new} before"
        grown = f"{op.caches}_grown" if windowed and now.records else op.caches
        kept = t.shape
        if op.holds and now.first and roots[i] in tensors_by_name:
            kept = tensors_by_name[roots[i]].shape if roots[i] not in roots[:i] else "0"
        shape = _keyed(t.shape, grown) if now.extends else t.shape
        past = (Tensor(before, _keyed(kept, op.caches.replace("kv", "past")), f"={t.name}"),) if now.extends else ()
        if op.holds and not now.extends:
            yield Op(f"{op.name}.{label}s", (t.name,), (Tensor(new, shape),), view=True, holds="cache", source=source)
            continue
        old += [before] if now.extends else []
        if past and now.cache == "legacy":  # the caller holds all of them until the model returns
            alias = Tensor(f"{before}, the caller's", past[0].shape)
            yield Op(f"{op.name}.{label}s_before", (before, t.name), (alias,), past=past, view=True, holds="forward")
        yield Op(
            f"{op.name}.{label}s",
            (*((before,) if now.extends else ()), t.name),
            (Tensor(new, shape, f"={t.name}"),),
            past=past if now.cache != "legacy" else (),
            holds="cache",
            source=source,
        )
    yield ops.release_names(*(t.name for t in tensors), *(old if windowed else ()))


def _written(op: Op, tensors: list[Tensor], now: Pass) -> Iterator[Op]:
    """Yield the update of a static cache: the first pass allocates a layer's tensors, and every pass writes into them.

    A full window is shifted by one in new tensors before it is written back.
    """
    source = f"{_CACHE} StaticLayer.update, StaticSlidingWindowLayer.update"
    shapes = {t.name: _keyed(t.shape, f"{op.caches}_static") for t in tensors}
    static = [Tensor(_named(t.name), shapes[t.name], f"={t.name}") for t in tensors]
    shifts = now.decodes and now.longer and op.caches == "kv_window"
    shifted = tuple(Tensor(f"{t.name} moved", shapes[t.name], f"={t.name}") for t in tensors)
    extra = (*shifted, Tensor("place of the last", "", "int64")) if shifts else ()
    yield from _in_place(op, tuple(t.name for t in tensors), static, now, source, extra)
    yield ops.release_names(*(t.name for t in tensors))


def _in_place(
    op: Op, new_tokens: tuple[str, ...], static: list[Tensor], now: Pass, source: str, shifted: tuple[Tensor, ...] = ()
) -> Iterator[Op]:
    """Yield the writes of `new_tokens` into the `static` tensors: at counted positions, or after a shift by one."""
    for name, t in zip(new_tokens, static, strict=True):
        yield from _persistent(f"{op.name}.{name}", t, now, source, (name,))
    length = _LENGTH_ACROSS if op.caches == "source" else Tensor("length of the cache", "", "int64")
    yield from _persistent(f"{op.name}.length", length, now, source)
    tokens = next(token for token in static[0].shape.split() if token != "b") if op.caches == "source" else "s"
    places = tuple(Tensor(f"places {i}", tokens, "int64") for i in range(2))
    yield Op(f"{op.name}.write", new_tokens[:1], scratch=shifted or places, source=source)


def _persistent(name: str, t: Tensor, now: Pass, source: str, reads: tuple[str, ...] = ()) -> Iterator[Op]:
    """Yield a tensor that the first pass allocates and later passes read and write in place."""
    if not now.decodes and now.allocated_dtype and t.shape:
        allocated = t._replace(name=f"{t.name} as it was made", dtype=now.allocated_dtype)
        yield Op(
            name, (allocated.name, *reads), (t,), past=(allocated,), holds="cache", source=f"{_LITGPT} KVCache.forward"
        )
        return
    if not now.extends:
        yield Op(name, reads, (t,), holds="cache", source=source)
        return
    before = t._replace(name=f"{t.name} before")
    yield Op(name, (before.name, *reads), (t,), past=(before,), view=True, holds="cache", source=source)


def _keyed(shape: str, axis: str) -> str:
    """Return a shape with its token axes replaced by `axis`."""
    return " ".join(axis + token[1:] if token in TOKENS else token for token in shape.split())


def along(op: Op, axis: str, of_keys: bool = False) -> Op:
    """Return the operation with the key tokens' axis: on the second of two token axes, or on all if `of_keys`.

    `of_keys`: the operation reads only keys and values.
    """

    def shape(text: str) -> str:
        tokens = text.split()
        places = [i for i, token in enumerate(tokens) if token in TOKENS]
        for i in places[1:2] if len(places) > 1 else places if of_keys else ():
            tokens[i] = axis + tokens[i][1:]
        return " ".join(tokens)

    return ops.with_shapes(op, shape)


def _head(operations: tuple[Op, ...], now: Pass) -> Iterator[Op]:
    """Yield the output projection, for the last token only if that is all it is given."""
    head = False
    for op in operations:
        head = head or op.name.startswith("lm_head") or any("v" in t.shape.split() for t in op.writes)
        if not (head and now.generates and now.last_only):
            yield op
        else:
            yield _of_rows(op) if now.verifies else _of_last(op)


def _of_rows(op: Op) -> Op:
    """Return the operation for the tokens whose logits are computed."""
    return ops.with_shapes(op, lambda text: " ".join("verified" if axis == "s" else axis for axis in text.split()))


def _of_rows_each(op: Op) -> Op:
    """Return positions, and the rotation computed from them, for each sequence."""
    if not op.name.startswith(("positions", "rotary")):
        return op
    return op._replace(
        writes=tuple(t._replace(shape=t.shape if "b" in t.shape.split() else f"b {t.shape}") for t in op.writes)
    )


def _last_hidden(operations: tuple[Op, ...]) -> Iterator[Op]:
    """Keep the head's input until the model returns, since the decoder's outputs contain it."""
    head = next((op for op in operations if any("v" in t.shape.split() for t in op.writes) and op.reads), None)
    if head is not None:
        yield ops.release_names(head.reads[0])


def for_last(operations: tuple[Op, ...], keys: Iterable[str] = ()) -> tuple[Op, ...]:
    """Return the operations for the last token only, attending to the `keys` of all tokens."""
    key_names = set(keys)
    rewritten: list[Op] = []
    for op in operations:
        if op.reads and key_names.issuperset(op.reads):
            key_names |= {t.name for t in op.writes}
            rewritten.append(op)
        else:
            rewritten.append(_of_last(op, once=True))
    return tuple(rewritten)


def _of_last(op: Op, once: bool = False) -> Op:
    """Return the operation without its token axis. `once`: drop only the first token axis and leave that of keys."""

    def shape(text: str) -> str:
        tokens = text.split()
        places = [i for i, token in enumerate(tokens) if token in TOKENS][: 1 if once else None]
        return " ".join(token for i, token in enumerate(tokens) if i not in places)

    return ops.with_shapes(op, shape)


def _cast_logits(operations: tuple[Op, ...], now: Pass) -> Iterator[Op]:
    """Cast all logits to fp32, in versions in which the model does so."""
    yield from operations
    if now.casts_logits:
        last = next(op for op in reversed(operations) if op.writes)
        logits = last.writes[0]
        yield ops.cast("float", logits.name, f"{logits.name}.float", logits.shape, "fp32")
        yield ops.release_names(logits.name, *last.reads[:1])  # the head's input is the outputs' last_hidden_state
