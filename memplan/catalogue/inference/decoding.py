"""Inference as a rewrite of a stack: no labels, no loss, and keys and values that stay for the tokens to come.

The prompt is read in one pass, which leaves what it caches (`holds`); every further token is a pass with a sequence of
one, over what the pass before left (`past`). Where a family's operations say that something is cached (`Op.caches`),
the operations of the cache take that one's place, and what the kernel after it makes of keys and values has their axis:

    kv, past                all tokens so far, and those before this pass
    kv_window, past_window  the same of a layer that keeps those of its window
    kv_static               those that a cache of fixed size has room for
    source                  those that an encoder has read, of which keys and values are made in the first pass alone
    quantized, residual     those of a quantised cache that were quantised before this pass, and that were not

What a quantised cache makes of them is in `memplan.catalogue.inference.quantized_caches`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from memplan.catalogue.experts.decoding_experts import batched
from memplan.catalogue.inference import offloaded_caches, quantized_caches
from memplan.catalogue.inference.next_token import GENERATE, OF_PART, looked_up, named_before, next_token
from memplan.catalogue.inference.one_pass import Pass
from memplan.catalogue.kernels import ops
from memplan.core.ir import Block, Op, Run, Stack, Tensor, outside

TOKENS = ("s", "s1", "s8", "s32", "s128", "s_even", "s_uneven", "s_uneven8")  # axes of a sequence's tokens

_CACHE = "transformers 5.24 cache_utils.py"
_LITGPT = "litgpt 0.5.3 generate/sequentially.py sequential, model.py"


# Families whose decoding was not read yet: Megatron's runs in an engine of its own.
NOT_YET = frozenset(("megatron_gpt",))
# Families whose code, published with their weights, keeps caches its own way.
CACHED_BY_ITS_CODE = ("baichuan", "chatglm", "internlm2", "minicpm", "qwen")
# Those of them that return tuples whatever they are given, and those that take no cache of fixed size: of modeling_*.py
# InternLM2's alone says `_supports_static_cache`.
RETURNS_TUPLES = ("baichuan", "chatglm", "qwen")
NO_STATIC_CACHE = (*RETURNS_TUPLES, "minicpm")
# Families whose generation config has tokens that are never chosen, and so a further row of scores without them.
# Source: transformers 5.24 models/whisper/generation_whisper.py _retrieve_logit_processors.
SUPPRESSES = frozenset(("whisper",))


def inference(stack: Stack, now: Pass) -> Stack:
    """The stack as the pass runs it. Where a family makes a mask whatever kernel is asked for, attention sees all that
    a static cache has room for."""
    now = now._replace(room=now.room or any(op.name == "mask" for op in stack.before))
    stack = _given(stack)

    def changed(block: Block) -> Block:
        own = tuple(batched(block.ops)) if now.batches else block.ops
        return block._replace(ops=tuple(_still(_cached(own, now))))

    runs = tuple(
        Run(tuple(map(changed, run.blocks)), run.times, tuple(_still(_masked(run.before, now)))) for run in stack.runs
    )
    before = tuple(_given_mask(_inputs(op, now), now) for op in _still(_masked(stack.before, now)))
    named = tuple(named_before(now)) if now.extends or now.verifies else ()
    if named:  # there all the time: from when there is a dtype to name
        at = next((i for i, op in enumerate(before, 1) if any(t.name == "embeds" for t in op.writes)), len(before))
        before = (*before[:at], Op("generate.before", (), named, source=GENERATE), *before[at:])
    if now.lingers:
        prompt = Tensor("logits of the prompt", "b past v", "fp32" if now.wide else "=embeds")
        before = (*before, Op("generate.lingers", (), (prompt,), holds="step", source=GENERATE))
    before = (*before, looked_up(now)) if now.looks else before
    after = tuple(_wide((*_still(_head(stack.after, now)), *_last_hidden(stack.after)), now))
    if now.extends and not now.decodes:
        after = (*after, ops.leave(OF_PART))
    kept = (t for run in runs for block in run.blocks for op in block.ops if op.holds == "cache" for t in op.writes)
    return Stack(before, runs, (*after, *next_token(after, now, [t for t in kept if t.name in _REORDERED])))


def keeping(stack: Stack) -> Iterator[tuple[str, int]]:
    """Of every run of blocks how many leave something for the tokens to come, and the axis of how often they do."""
    for run in stack.runs:
        yield run.times, sum(any(op.holds == "cache" for op in block.ops) for block in run.blocks)


def evaluation(stack: Stack, now: Pass) -> Stack:
    """The stack, with its loss, as an evaluation runs it: nothing is recorded, and what the model returned stays until
    its caller has it."""
    runs = tuple(
        Run(
            tuple(b._replace(ops=tuple(_still(_cached(b.ops, now)))) for b in run.blocks),
            run.times,
            tuple(_still(run.before)),
        )
        for run in stack.runs
    )
    tail = (*stack.after, *stack.loss)
    returned = returned_by(stack, now.wide)
    after = (op._replace(holds=RETURNED) if returned and returned in op.writes else op for op in tail)
    return Stack(tuple(_still(stack.before)), runs, tuple(_still(after)))


RETURNED = "returned"  # what `Op.holds` says of what an evaluation's caller is given


def returned_by(stack: Stack, wide: bool) -> Tensor | None:
    """The logits that a model with its loss returns: as they are cast for that last, where they are, or by itself
    (`wide`); None where there are never all of them."""
    made = {t.name: t for op in (*stack.after, *stack.loss) for t in op.writes}
    whole = [t for op in stack.after for t in op.writes if t.shape.split() == ["b", "s", "v"]]
    cast = made.get("outputs") or (made.get("logits32") if wide else None)
    return cast or made.get("logits") or (whole[-1] if whole else None)


def _still(some: Iterable[Op]) -> Iterator[Op]:
    """Nothing asks for a gradient."""
    return (op._replace(asks=False) for op in some)


def _given(stack: Stack) -> Stack:
    """A decoder's ids, which are made of labels where there are some, are given where there are none."""
    made = [op for some in outside(stack) for op in some if op.name == "decoder_input_ids"]
    if not made:
        return stack
    (ids,) = made
    before = (op._replace(writes=(*op.writes, *ids.writes)) if op.name == "inputs" else op for op in stack.before)
    runs = (run._replace(before=tuple(op for op in run.before if op != ids)) for run in stack.runs)
    return stack._replace(before=tuple(op for op in before if op != ids), runs=tuple(runs))


def _given_mask(op: Op, now: Pass) -> Op:
    """In assisted generation the loops hold the mask, and `memplan.resolve.assisted` counts it: an operation that reads
    it reads the ids instead, which have its dtype and live as long."""
    if not (now.verifies or now.proposes):
        return op
    return op._replace(reads=tuple("ids" if name == "attention_mask" else name for name in op.reads))


def _inputs(op: Op, now: Pass) -> Op:
    """Token ids, and in generation a mask of ones beside all of them; the model of a token alone is given that."""
    if op.name != "inputs":
        return op
    tokens = "kv" if now.decodes else "prompt" if now.part else "s"
    made = [t for t in op.writes if t.name != "labels"]
    if (
        now.verifies or now.proposes
    ):  # the rest is counted with what the loops have names for (`memplan.resolve.assisted`)
        return op._replace(writes=tuple(t for t in made if t.name != "attention_mask"), source=GENERATE)
    if now.generates and now.crosses:
        made += [Tensor("all ids", "b kv", "int64")] if now.decodes else []
    elif now.generates:
        made = [t for t in made if t.name != "attention_mask"]
        made.append(Tensor("attention_mask", f"b {tokens}", "int64"))
        made += [Tensor("all ids", f"b {tokens}", "int64")] if now.decodes else []
        made = [t._replace(shape=f"b {tokens}") if t.name == "ids" and now.part else t for t in made]
    return op._replace(writes=tuple(made), source=GENERATE if now.generates or now.encodes else op.source)


def _masked(some: tuple[Op, ...], now: Pass) -> Iterator[Op]:
    """Masks made once for all layers are of one token's row in decoding."""
    for op in some:
        axis = now.keys("kv_window" if "window" in op.name else "kv")
        yield along(op, axis, op.name in _OF_ALL) if axis and not op.weights else op


def _cached(some: tuple[Op, ...], now: Pass) -> Iterator[Op]:
    """A block's operations with those of its caches."""
    made: dict[str, Tensor] = {}
    root: dict[str, str] = {}  # what views are of
    names: dict[str, str] = {}  # what names mean from the cache on
    keyed: set[str] = set()
    axis = ""
    for given in some:
        op = _renamed(given, names)
        if op.caches == "state":
            made |= {t.name: t for t in op.writes}
            (t,) = op.writes
            if t.dtype.startswith("="):
                t = t._replace(dtype=f"={names.get(t.dtype[1:], t.dtype[1:])}")
            yield from _kept(op.name, t, now, f"{_CACHE} LinearAttentionLayer", op.reads)
            continue
        if op.caches == "source":
            yield from _crossed(op, now)
            names |= {name: _named(name) for t in op.writes for name in (t.name.replace(".kept", ""),)}
            continue
        if op.caches:
            axis = now.keys(op.caches)
            if op.view:  # another layer's
                keyed |= set(op.reads)
                continue
            tensors = [made[name] for name in op.reads]
            if now.static:
                yield from _sent_back(_written(op, tensors, now), op.caches, now)
                if now.longer and op.caches == "kv_window" and not now.decodes:  # they are handed back as they came
                    continue
            elif now.stored is not None:
                new = [(t, _named(t.name)) for t in tensors]
                if not now.extends:  # they are handed back as they came
                    yield from quantized_caches.prompt(op.name, new, _keyed, now.stored, now.beams)
                    continue
                yield from quantized_caches.tokens(op.name, new, _keyed, axis, now.stored, now.anew, now.beams)
            else:
                roots = [root.get(name, name) for name in op.reads]
                yield from _sent_back(_update(op, tensors, now, roots, made), op.caches, now)
            names |= {name: _named(name) for name in op.reads}
            keyed |= {_named(name) for name in op.reads}
            continue
        if axis:
            of_keys = bool(op.reads) and keyed.issuperset(op.reads)
            keyed |= {t.name for t in op.writes} if of_keys else set()
            op = along(op, axis, of_keys)
        made |= {t.name: t for t in op.writes}
        if op.view and op.reads:
            root |= {t.name: root.get(op.reads[0], op.reads[0]) for t in op.writes}
        yield op


def _crossed(op: Op, now: Pass) -> Iterator[Op]:
    """Keys and values of what an encoder has read: the first pass puts them in tensors of the cache's own, and the
    others find them there."""
    source = f"{_CACHE} EncoderDecoderCache, DynamicLayer.update, StaticLayer.update"
    caches = [t._replace(name=_named(t.name.replace(".kept", ""))) for t in op.writes]
    if now.decodes:
        for t in caches:
            yield from _kept(f"{op.name}.{t.name}", t, now, source)
        if now.static:
            yield from _kept(f"{op.name}.length", _LENGTH_ACROSS, now, source)
        return
    if now.static:
        yield from _in_place(op, op.reads, caches, now, source)
    else:
        for name, t in zip(op.reads, caches, strict=True):
            yield Op(f"{op.name}.{name}", (name,), (t,), holds="cache", source=source)
    yield ops.leave(*op.reads)


_LENGTH_ACROSS = Tensor("length of the cross cache", "", "int64")
_REORDERED = (
    *("key cache", "value cache", "latent cache", "index key cache"),
    *("key cache residual", "value cache residual"),
    *("cross key cache", "cross value cache"),
)
_OF_ALL = ("alibi", "ones")  # made before the blocks for all tokens so far
_NAMES = {"kv.normed": "latent", "k.turned": "rotated key", "index.k": "index key"}
_FIRST = {"k": "key", "k1": "key", "v": "value", "v0": "value", "v1": "value"}  # by what comes before a full stop


def _sent_back(some: Iterable[Op], axis: str, now: Pass) -> Iterator[Op]:
    """The operations of a layer's cache, told that what they make goes to the host, where it does; lengths do not."""
    offloads = now.offloads(axis)
    away = offloaded_caches.AWAY_WINDOW if axis == "kv_window" else offloaded_caches.AWAY
    for op in some:
        goes = offloads and op.holds == "cache" and not op.writes[0].name.startswith("length")
        yield op._replace(holds=away) if goes else op


def _named(name: str) -> str:
    """What the cache of a tensor is called."""
    found = _NAMES.get(name) or _FIRST.get(name.partition(".")[0], name)
    return f"cross {found} cache" if name.endswith(".cross") else f"{found} cache"


def _renamed(op: Op, names: Mapping[str, str]) -> Op:
    if names.keys().isdisjoint(op.reads):
        return op
    return op._replace(reads=tuple(names.get(name, name) for name in op.reads))


def _update(op: Op, tensors: list[Tensor], now: Pass, roots: list[str], made: Mapping[str, Tensor]) -> Iterator[Op]:
    """The cache of a layer takes what is new: what it had and that are joined in a tensor of their own, one after the
    other, and the names before are the caller's until all are. With a window both are made before the old ones go.

    `roots` are what the tensors are views of, of those `made`: all of it is what a prompt leaves that is kept as it is.
    """
    source = op.source or f"{_CACHE} DynamicLayer.update, DynamicSlidingWindowLayer.update"
    windowed = op.caches == "kv_window"
    old: list[str] = []
    if windowed:
        yield from _kept(f"{op.name}.window", Tensor("length of the window", "", "int64"), now, source)
    for i, t in enumerate(tensors):
        new = _named(t.name)
        what, before = new.removesuffix(" cache"), f"{new} before"
        grown = f"{op.caches}_grown" if windowed and now.records else op.caches
        kept = t.shape
        if op.holds and now.first and roots[i] in made:
            kept = made[roots[i]].shape if roots[i] not in roots[:i] else "0"
        shape = _keyed(t.shape, grown) if now.extends else t.shape
        past = (Tensor(before, _keyed(kept, op.caches.replace("kv", "past")), f"={t.name}"),) if now.extends else ()
        if op.holds and not now.extends:
            yield Op(f"{op.name}.{what}s", (t.name,), (Tensor(new, shape),), view=True, holds="cache", source=source)
            continue
        old += [before] if now.extends else []
        if past and now.cache == "legacy":  # the caller has all of them until the model returns
            alias = Tensor(f"{before}, the caller's", past[0].shape)
            yield Op(f"{op.name}.{what}s_before", (before, t.name), (alias,), past=past, view=True, holds="forward")
        yield Op(
            f"{op.name}.{what}s",
            (*((before,) if now.extends else ()), t.name),
            (Tensor(new, shape, f"={t.name}"),),
            past=past if now.cache != "legacy" else (),
            holds="cache",
            source=source,
        )
    yield ops.leave(*(t.name for t in tensors), *(old if windowed else ()))


def _written(op: Op, tensors: list[Tensor], now: Pass) -> Iterator[Op]:
    """A static cache takes what is new: the first pass makes all tensors of a layer, and every one writes into them. Of
    a window that is full all are moved by one, in tensors of their own before they are written back."""
    source = f"{_CACHE} StaticLayer.update, StaticSlidingWindowLayer.update"
    shapes = {t.name: _keyed(t.shape, f"{op.caches}_static") for t in tensors}
    kept = [Tensor(_named(t.name), shapes[t.name], f"={t.name}") for t in tensors]
    moves = now.decodes and now.longer and op.caches == "kv_window"
    rolled = tuple(Tensor(f"{t.name} moved", shapes[t.name], f"={t.name}") for t in tensors)
    moved = (*rolled, Tensor("place of the last", "", "int64")) if moves else ()
    yield from _in_place(op, tuple(t.name for t in tensors), kept, now, source, moved)
    yield ops.leave(*(t.name for t in tensors))


def _in_place(
    op: Op, given: tuple[str, ...], kept: list[Tensor], now: Pass, source: str, moved: tuple[Tensor, ...] = ()
) -> Iterator[Op]:
    """What is `given` is written into the tensors `kept`, at places that are counted, or after all were `moved`."""
    for name, t in zip(given, kept, strict=True):
        yield from _kept(f"{op.name}.{name}", t, now, source, (name,))
    length = _LENGTH_ACROSS if op.caches == "source" else Tensor("length of the cache", "", "int64")
    yield from _kept(f"{op.name}.length", length, now, source)
    tokens = next(token for token in kept[0].shape.split() if token != "b") if op.caches == "source" else "s"
    places = tuple(Tensor(f"places {i}", tokens, "int64") for i in range(2))
    yield Op(f"{op.name}.write", given[:1], scratch=moved or places, source=source)


def _kept(name: str, t: Tensor, now: Pass, source: str, reads: tuple[str, ...] = ()) -> Iterator[Op]:
    """A tensor that the first pass makes and the others find, and write in place."""
    if not now.decodes and now.made and t.shape:
        made = t._replace(name=f"{t.name} as it was made", dtype=now.made)
        yield Op(name, (made.name, *reads), (t,), past=(made,), holds="cache", source=f"{_LITGPT} KVCache.forward")
        return
    if not now.extends:
        yield Op(name, reads, (t,), holds="cache", source=source)
        return
    before = t._replace(name=f"{t.name} before")
    yield Op(name, (before.name, *reads), (t,), past=(before,), view=True, holds="cache", source=source)


def _keyed(shape: str, axis: str) -> str:
    """A shape of one sequence's tokens, of as many as the axis says."""
    return " ".join(axis + token[1:] if token in TOKENS else token for token in shape.split())


def along(op: Op, axis: str, of_keys: bool = False) -> Op:
    """The operation with the tokens that keys are of: the second of a shape that has tokens twice, and all where what
    it makes is `of_keys` alone."""

    def shape(text: str) -> str:
        tokens = text.split()
        places = [i for i, token in enumerate(tokens) if token in TOKENS]
        for i in places[1:2] if len(places) > 1 else places if of_keys else ():
            tokens[i] = axis + tokens[i][1:]
        return " ".join(tokens)

    def tensor(t: Tensor) -> Tensor:
        return t._replace(shape=shape(t.shape))

    return op._replace(writes=tuple(map(tensor, op.writes)), scratch=tuple(map(tensor, op.scratch)))


def _head(some: tuple[Op, ...], now: Pass) -> Iterator[Op]:
    """The output projection, of the last token alone where that is all it is given."""
    head = False
    for op in some:
        head = head or op.name.startswith("lm_head") or any("v" in t.shape.split() for t in op.writes)
        if not (head and now.generates and now.last_only):
            yield op
        else:
            yield _of_rows(op) if now.verifies else _of_last(op)


def _of_rows(op: Op) -> Op:
    """With as many tokens as there are logits of."""

    def tensor(t: Tensor) -> Tensor:
        return t._replace(shape=" ".join("verified" if token == "s" else token for token in t.shape.split()))

    return op._replace(writes=tuple(map(tensor, op.writes)), scratch=tuple(map(tensor, op.scratch)))


def _last_hidden(some: tuple[Op, ...]) -> Iterator[Op]:
    """What the head is given stays until the model returns: the decoder's outputs have it."""
    head = next((op for op in some if any("v" in t.shape.split() for t in op.writes) and op.reads), None)
    if head is not None:
        yield ops.leave(head.reads[0])


def for_last(some: tuple[Op, ...], keys: Iterable[str] = ()) -> tuple[Op, ...]:
    """The operations for the last token alone, over the `keys` of all."""
    keyed = set(keys)
    made: list[Op] = []
    for op in some:
        if op.reads and keyed.issuperset(op.reads):
            keyed |= {t.name for t in op.writes}
            made.append(op)
        else:
            made.append(_of_last(op, once=True))
    return tuple(made)


def _of_last(op: Op, once: bool = False) -> Op:
    """Without the axis of tokens; `once`: the first alone, where there is one of keys too."""

    def shape(text: str) -> str:
        tokens = text.split()
        places = [i for i, token in enumerate(tokens) if token in TOKENS][: 1 if once else None]
        return " ".join(token for i, token in enumerate(tokens) if i not in places)

    def tensor(t: Tensor) -> Tensor:
        return t._replace(shape=shape(t.shape))

    return op._replace(writes=tuple(map(tensor, op.writes)), scratch=tuple(map(tensor, op.scratch)))


def _wide(some: tuple[Op, ...], now: Pass) -> Iterator[Op]:
    """All logits that the model makes are cast to fp32 by itself, in versions that did so."""
    yield from some
    if now.wide:
        last = next(op for op in reversed(some) if op.writes)
        made = last.writes[0]
        yield ops.cast("float", made.name, f"{made.name}.float", made.shape, "fp32")
        yield ops.leave(made.name, *last.reads[:1])  # what the head was given is the outputs' last_hidden_state
