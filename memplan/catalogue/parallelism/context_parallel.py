"""Context parallelism: each rank has a part of every sequence, and attention passes keys and values around.

As torch's `context_parallel` has it, which accelerate and TorchTitan use: keys and values of all ranks are gathered at
once, the kernel attends to one rank's after the other, and its outputs are merged in fp32. So that causal attention is
the same work everywhere, a rank has a slice of the sequence's first half and one of its second; every step but the
first then computes on half the queries or half the keys.

Or as DeepSpeed's Ulysses has it, which transformers' Trainer uses too: ranks exchange what they have of all heads for
what all have of some, and attend to whole sequences with those.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.degrees import Degrees
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import rewrite
from memplan.core.errors import SpecError
from memplan.core.ir import Op, Scratch, Stack, Tensor
from memplan.models.model import ModelSpec

_SOURCE = "torch 2.13 distributed/tensor/experimental/_context_parallel/_attention.py _templated_ring_attention"
_Q, _K = "b s a d", "b s k d"

# Dense decoders whose attention is one call of torch's, on heads as the projections make them.
FAMILIES = (
    *("cohere", "ernie4_5", "gemma", "granite", "internlm3", "llama", "ministral3", "mistral", "olmo"),
    *("olmo2", "qwen2", "qwen3", "seed_oss", "smollm3"),
)


_WAYS = {"ring": "pass keys and values around", "ulysses": "exchange heads, as far as memplan follows them,"}


def check(model_type: str, backend: str, masked: bool, degrees: Degrees) -> None:
    """Raise SpecError for a family or a kernel whose attention is not passed around."""
    field = "parallelism.cp"
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise SpecError(f"{field}: {degrees.cp} is not supported yet for {model_type}; supported: {known}", field)
    if masked or backend != "flash":
        why = "a mask" if masked else f"{backend} attention"
        raise SpecError(
            f"{field}: {degrees.cp} ranks {_WAYS[degrees.context]} only under torch's flash attention, not with "
            f"{why}; it runs in 16 bits on cards since Ampere, without padding and windows",
            field,
        )


def check_heads(model: ModelSpec, degrees: Degrees) -> None:
    """Raise SpecError where ranks that exchange heads would not have as many each."""
    n, a, k, field = degrees.cp, model.num_attention_heads, model.num_key_value_heads, "parallelism.cp"
    wrong = [f"does not divide {a} attention heads"] * bool(a % n)
    wrong += [f"neither divides {k} key/value heads nor is a multiple of them"] * bool(k % n and n % k)
    if wrong:
        raise SpecError(f"{field}: {n} {' and '.join(wrong)}, which Ulysses exchanges", field)


def check_sequence(sequence: int, degrees: Degrees) -> None:
    """Raise SpecError where ranks would not have two slices of the same number of tokens each."""
    field, slices = "parallelism.cp", 2 * degrees.cp
    if degrees.context == "ulysses" and sequence % degrees.cp:
        raise SpecError(f"{field}: {degrees.cp} ranks do not divide a sequence of {sequence} tokens", field)
    if degrees.context == "ulysses":
        return
    if degrees.cp > 1 and sequence % slices:
        raise SpecError(
            f"{field}: {degrees.cp} ranks have two slices of a sequence each, and {slices} do not divide {sequence}",
            field,
        )


def around(stack: Stack, degrees: Degrees, heads: tuple[int, int] = (0, 0)) -> Stack:
    """The rank's operations: its tokens everywhere, and attention to those of all."""

    def change(op: Op) -> Iterator[Op]:
        if op.product == "attention" and degrees.context == "ulysses":
            yield from _exchanged(op, degrees.cp, *heads)
        elif op.product == "attention":
            yield from _ring(op, degrees.cp)
        elif op.view and op.name.endswith(".v_heads"):
            yield op._replace(gradient="new")  # it comes head by head
        else:
            yield op

    return rewrite(stack, change)


def _ring(op: Op, cp: int) -> Iterator[Op]:
    """The kernel on one rank's keys after the other. Tensors are those of the rank that has most: not the last one,
    whose output needs no copy, and with more than two ranks one in the middle, which merges whole outputs.

    The first step's gradients are there while the second's are made, and stand for what is returned.
    """
    y, *others = op.writes
    q, k, _ = op.reads
    heads, grouped = f"{y.name}.heads", any(s.tensor.name.startswith("dk") for s in op.scratch_back)
    gathered = Tensor("keys and values of all ranks", f"{2 * cp} {_K}", f"={k}")
    merged = (Tensor("merged output", _Q, "fp32"), Tensor("merged with the next", _Q, "fp32"))
    if cp == 2:  # the second step is of half the queries and of all keys; the kernel's types have 16 bits
        halves = (Tensor("output of a step in fp32", _Q, "fp32/2"), Tensor("beside the output", _Q, "bf16/2"))
        step = (Tensor("dq of a step", _Q, "bf16/2"), Tensor("dk and dv of a step", f"2 {_K}", f"={k}"))
        kernel = (
            Tensor("dq accumulated", "b s128 a d32", "fp32/2"),
            Tensor("dk and dv expanded", f"2 {_Q}", f"={k}"),
        )
    else:  # of all queries and half the keys
        halves = (Tensor("output of a step in fp32", _Q, "fp32"), Tensor("difference", _Q, "fp32"))
        step = (Tensor("dq of a step", _Q, f"={q}"), Tensor("dk and dv of a step", _K, f"={k}"))
        kernel = (Tensor("dq accumulated", "b s128 a d32", "fp32"), Tensor("dk and dv expanded", _Q, f"={k}"))
    forward = (gathered, *merged, *halves)
    back = (
        gathered,
        Tensor("dq summed", _Q, "fp32"),
        *(Tensor(f"d{t} summed", _K, "fp32") for t in "kv"),
        Tensor("keys and values to send", f"2 {_K}", f"={k}"),
        Tensor("gradients to send", f"2 {_K}", "fp32"),
        Tensor("gradients received", f"2 {_K}", "fp32"),
        *step,
        Tensor("row sums", "b a s128", "fp32"),
        *(kernel if grouped else kernel[:1]),
    )
    yield op._replace(
        writes=(y._replace(name=heads), *others),
        keeps=tuple(keep._replace(what=heads if keep.what == y.name else keep.what) for keep in op.keeps),
        scratch=forward,
        scratch_back=tuple(map(Scratch, back)),
        product="attention over s_cp",
        source=_SOURCE,
    )
    yield ops.copy(f"{op.name}.contiguous", heads, y.name, y.shape)
    yield ops.leave(heads)


_ULYSSES = "DeepSpeed 0.19.8 runtime/sequence_parallel/ulysses_sp.py UlyssesSPAttentionHF"


def _exchanged(op: Op, n: int, query_heads: int, key_value_heads: int) -> Iterator[Op]:
    """Queries, keys and values are laid by rank, exchanged, and laid head by head; the kernel attends to all tokens
    with a rank's heads; its output is exchanged back. Of fewer key heads than ranks each is repeated.
    """
    y = op.writes[0]
    of_all = {"s": "s_cp", "s128": "s_cp128", "a": f"a/{n}", "k": f"k/{n}"}
    names: dict[str, str] = {}
    grouped = query_heads // n > max(1, key_value_heads // n)
    for t, heads in zip(op.reads, ("a", "k", "k"), strict=True):
        here, local = t, f"b s {heads} d"
        if heads == "k" and n > key_value_heads:
            local = f"b s {n} d"
            yield ops.copy(f"{op.name}.repeat_{t}", t, f"{t}.repeated", local, "new")
            here = f"{t}.repeated"
        yield ops.copy(f"{op.name}.lay_{t}", here, f"{t}.sent", local, "new")._replace(source=_ULYSSES)
        yield _all_to_all(op, f"{t}.sent", f"{t}.received", local)
        names[t] = f"{t}.heads"
    for t, heads in zip(op.reads, ("a", "k", "k"), strict=True):
        yield ops.copy(f"{op.name}.heads_{t}", f"{t}.received", names[t], f"b s_cp {heads}/{n} d")
    kernel, laid, final = f"{y.name}.heads", f"{y.name}.laid", y.name
    (attends,) = ops.with_axes((op,), of_all)
    yield attends._replace(
        reads=tuple(names[t] for t in op.reads),
        writes=(Tensor(kernel, f"b s_cp a/{n} d", f"={names[op.reads[0]]}"), *attends.writes[1:]),
        keeps=tuple(
            keep._replace(
                what=kernel if keep.what == y.name else names.get(keep.what, keep.what),
                of=names.get(keep.of, keep.of),
            )
            for keep in op.keeps
        ),
        scratch=tuple(_like(t, names) for t in attends.scratch),
        scratch_back=tuple(
            s._replace(tensor=_like(s.tensor, names), of=names.get(s.of, s.of))
            for s in attends.scratch_back
            if grouped or not s.tensor.name.startswith(("dk", "dv"))
        ),
        product="attention over s_cp",
    )
    lay = ops.copy if query_heads > n else ops.view  # one head lies as it should
    yield lay(f"{op.name}.contiguous", kernel, laid, f"b s_cp a/{n} d")
    yield ops.leave(kernel)
    yield ops.copy(f"{op.name}.lay", laid, f"{y.name}.sent", "several s a d")
    # of a single sequence what was received is turned and laid out at once
    several, one = Tensor(f"{y.name}.received", "several s a d"), Tensor(f"{y.name}.received.one", "only s a d")
    yield _all_to_all(op, f"{y.name}.sent", several.name, "b s a d")._replace(writes=(several, one))
    yield ops.copy(f"{op.name}.tokens", several.name, f"{y.name}.turned", "several s a d", "new")
    yield ops.leave(f"{y.name}.sent")
    yield Op(
        f"{op.name}.out", (f"{y.name}.turned", one.name), (Tensor(final, "b s a d"),), gradient="same", source=_ULYSSES
    )
    # those of several sequences are gone by then, when there is less than before
    yield ops.leave(laid, *names.values())


def _like(t: Tensor, names: dict[str, str]) -> Tensor:
    """A tensor whose dtype may be that of another, under its new name."""
    return t._replace(dtype=f"={names.get(t.dtype[1:], t.dtype[1:])}") if t.dtype.startswith("=") else t


def _all_to_all(op: Op, x: str, y: str, shape: str) -> Op:
    """The gradient is made contiguous first."""
    back = (Scratch(Tensor("contiguous gradient", shape, f"={x}")),)
    return Op(f"{op.name}.all_to_all_{x}", (x,), (Tensor(y, shape),), scratch_back=back, source=_ULYSSES)
