"""Inference as a rewrite of a stack: no labels, no loss, and keys and values that stay for the tokens to come.

The prompt is read in one pass, which leaves what it caches (`holds`); every further token is a pass with a sequence of
one, over what the pass before left (`past`). Where a family's operations say that something is cached (`Op.caches`),
the operations of the cache take that one's place, and what the kernel after it makes of keys and values has their axis:

    kv, past                all tokens so far, and those before this pass
    kv_window, past_window  the same of a layer that keeps those of its window
    kv_static               those that a cache of fixed size has room for
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from memplan.catalogue import ops
from memplan.ir import Block, Op, Run, Stack, Tensor

Cache = Literal["", "dynamic", "legacy"]
TOKENS = ("s", "s1", "s8", "s32", "s128", "s_uneven")  # axes of a sequence's tokens

_CACHE = "transformers 5.24 cache_utils.py"
_GENERATE = "transformers 5.24 generation/utils.py GenerationMixin._sample"


# Families whose decoding was not read yet.
NOT_YET = (
    frozenset[str]()
    if True
    else frozenset(
        (
            *("baichuan", "bloom", "chatglm", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "falcon"),
            *(
                "falcon_mamba",
                "gemma3n_text",
                "gemma4",
                "gemma4_text",
                "glm4_moe_lite",
                "glm_moe_dsa",
                "gpt_neo",
                "gpt_oss",
            ),
            *("granitemoehybrid", "internlm2", "jamba", "kimi_k25", "kimi_k3", "kimi_linear", "llama4", "llama4_text"),
            *(
                "mamba",
                "mamba2",
                "megatron_gpt",
                "mimo_v2_flash",
                "minicpm",
                "minicpm3",
                "minimax_m3_vl_text",
                "mllama",
            ),
            *("mpt", "nemotron_h", "qwen", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text"),
            *("qwen3_5_text", "qwen3_next", "qwen3_vl", "qwen3_vl_moe", "step3p7", "gemma3", "mistral3", "dbrx"),
        )
    )
)


class Pass(NamedTuple):
    """One pass of inference: `forward`, `prefill` or `decode`, and what keeps its keys and values; or `eval`, of a
    model that trains, with its loss.

    last_only   the head is given the last token alone, as transformers' logits_to_keep has it
    wide        the model itself makes its logits fp32, all of them
    few_rows    as many as a product with 4-bit weights has at most where it makes no whole matrix of them
    """

    phase: str
    cache: Cache = ""
    last_only: bool = True
    wide: bool = False
    few_rows: int = 0

    @property
    def generates(self) -> bool:
        return self.phase in ("prefill", "decode")

    @property
    def evaluates(self) -> bool:
        return self.phase == "eval"

    @property
    def decodes(self) -> bool:
        return self.phase == "decode"


def inference(stack: Stack, now: Pass) -> Stack:
    """The stack as the pass runs it."""

    def changed(block: Block) -> Block:
        return block._replace(ops=tuple(_still(_cached(block.ops, now))))

    runs = tuple(
        Run(tuple(map(changed, run.blocks)), run.times, tuple(_still(_masked(run.before, now)))) for run in stack.runs
    )
    before = tuple(_inputs(op, now) if op.name == "inputs" else op for op in _still(_masked(stack.before, now)))
    after = tuple(_wide(tuple(_still(_head(stack.after, now))), now))
    return Stack(before, runs, (*after, *_next_token(after, now)))


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


def uncached(stack: Stack) -> bool:
    """Whether some block leaves nothing for the tokens to come."""
    return any(all(op.holds != "cache" for op in block.ops) for run in stack.runs for block in run.blocks)


def _still(some: Iterable[Op]) -> Iterator[Op]:
    """Nothing asks for a gradient."""
    return (op._replace(asks=False) for op in some)


def _inputs(op: Op, now: Pass) -> Op:
    """Token ids, and in generation a mask of ones beside all of them; the model of a token alone is given that."""
    tokens = "kv" if now.decodes else "s"
    made = [t for t in op.writes if t.name != "labels"]
    if now.generates:
        made = [t for t in made if t.name != "attention_mask"]
        made.append(Tensor("attention_mask", f"b {tokens}", "int64"))
        made += [Tensor("all ids", "b kv", "int64")] if now.decodes else []
    return op._replace(writes=tuple(made), source=_GENERATE if now.generates else op.source)


def _masked(some: tuple[Op, ...], now: Pass) -> Iterator[Op]:
    """Masks made once for all layers are of one token's row in decoding."""
    for op in some:
        axis = "kv_window" if "window" in op.name else "kv"
        yield along(op, axis, op.name in _OF_ALL) if now.decodes and not op.weights else op


def _cached(some: tuple[Op, ...], now: Pass) -> Iterator[Op]:
    """A block's operations with those of its caches."""
    made: dict[str, Tensor] = {}
    names: dict[str, str] = {}  # what names mean from the cache on
    keyed: set[str] = set()
    axis = ""
    for given in some:
        op = _renamed(given, names)
        if op.caches:
            axis = op.caches
            yield from _update(op, [made[name] for name in op.reads], now)
            names |= {name: _named(name) for name in op.reads}
            keyed = {_named(name) for name in op.reads}
            continue
        if axis and now.decodes:
            of_keys = bool(op.reads) and keyed.issuperset(op.reads)
            keyed |= {t.name for t in op.writes} if of_keys else set()
            op = along(op, axis, of_keys)
        made |= {t.name: t for t in op.writes}
        yield op


_OF_ALL = ("alibi", "ones")  # made before the blocks for all tokens so far
_NAMES = {"kv.normed": "latent", "k.turned": "rotated key"}


def _named(name: str) -> str:
    """What the cache of a tensor is called."""
    found = _NAMES.get(name) or {"k": "key", "v": "value"}.get(name.partition(".")[0], name)
    return f"{found} cache"


def _renamed(op: Op, names: Mapping[str, str]) -> Op:
    if names.keys().isdisjoint(op.reads):
        return op
    return op._replace(reads=tuple(names.get(name, name) for name in op.reads))


def _update(op: Op, tensors: list[Tensor], now: Pass) -> Iterator[Op]:
    """The cache of a layer takes what is new: what it had and that are joined in a tensor of their own, one after the
    other, and the names before are the caller's until all are. With a window both are made before the old ones go."""
    source = f"{_CACHE} DynamicLayer.update, DynamicSlidingWindowLayer.update"
    windowed = op.caches == "kv_window"
    old: list[str] = []
    if windowed:
        yield from _kept(f"{op.name}.window", Tensor("length of the window", "", "int64"), now, source)
    for t in tensors:
        new = _named(t.name)
        what, before = new.removesuffix(" cache"), f"{new} before"
        shape = _keyed(t.shape, op.caches) if now.decodes else t.shape
        past = (Tensor(before, _keyed(t.shape, op.caches.replace("kv", "past")), f"={t.name}"),) if now.decodes else ()
        old += [before] if now.decodes else []
        if past and now.cache == "legacy":  # the caller has all of them until the model returns
            alias = Tensor(f"{before}, the caller's", past[0].shape)
            yield Op(f"{op.name}.{what}s_before", (before, t.name), (alias,), past=past, view=True, holds="forward")
        yield Op(
            f"{op.name}.{what}s",
            (*((before,) if now.decodes else ()), t.name),
            (Tensor(new, shape, f"={t.name}"),),
            past=past if now.cache != "legacy" else (),
            holds="cache",
            source=source,
        )
    yield ops.leave(*(t.name for t in tensors), *(old if windowed else ()))


def _kept(name: str, t: Tensor, now: Pass, source: str) -> Iterator[Op]:
    """A tensor that the first pass makes and the others find."""
    if not now.decodes:
        yield Op(name, (), (t,), holds="cache", source=source)
        return
    before = t._replace(name=f"{t.name} before")
    yield Op(name, (before.name,), (t,), past=(before,), view=True, holds="cache", source=source)


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
        yield _of_last(op) if head and now.generates and now.last_only else op


def _of_last(op: Op) -> Op:
    def tensor(t: Tensor) -> Tensor:
        return t._replace(shape=" ".join(token for token in t.shape.split() if token not in TOKENS))

    return op._replace(writes=tuple(map(tensor, op.writes)), scratch=tuple(map(tensor, op.scratch)))


def _wide(some: tuple[Op, ...], now: Pass) -> Iterator[Op]:
    """All logits that the model makes are cast to fp32 by itself, in versions that did so."""
    yield from some
    if now.wide:
        made = next(op for op in reversed(some) if op.writes).writes[0]
        yield ops.cast("float", made.name, f"{made.name}.float", made.shape, "fp32")
        yield ops.leave(made.name)


def _next_token(after: tuple[Op, ...], now: Pass) -> Iterator[Op]:
    """The last token's logits, copied in fp32, and the token they say."""
    if not now.generates:
        return
    logits = next(op for op in reversed(after) if op.writes).writes[0].name
    yield Op("generate.scores", (logits,), (Tensor("next token logits", "b v", "fp32"),), source=_GENERATE)
    yield Op("generate.argmax", ("next token logits",), (Tensor("next token", "b", "int64"),), source=_GENERATE)
    yield ops.leave(logits)
