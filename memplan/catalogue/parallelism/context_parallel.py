"""Context parallelism: each rank has a part of every sequence, and attention spans the ranks.

`ring` is torch's `context_parallel`, which accelerate and TorchTitan use. Keys and values of all ranks are gathered at
once, the kernel attends to one rank's after another, and its outputs are merged in fp32. To balance causal attention,
a rank has one slice of the sequence's first half and one of its second, so every step but the first computes on half
the queries or half the keys.

`ulysses` is DeepSpeed's, which transformers' Trainer also uses. Ranks exchange their tokens of all heads for all tokens
of some heads, and attend to full sequences with those heads.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.degrees import Degrees
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import rewrite
from memplan.core.errors import refused
from memplan.core.ir import Op, Scratch, Stack, Tensor
from memplan.models.model import ModelSpec

_SOURCE = "torch 2.13 distributed/tensor/experimental/_context_parallel/_attention.py _templated_ring_attention"
_Q, _K = "b s a d", "b s k d"

_CONTEXTS = {"ring": "ring attention", "ulysses": "Ulysses"}


def check(model: ModelSpec, backend: str, masked: bool, degrees: Degrees) -> None:
    """Raise SpecError if the family or the attention kernel does not support context parallelism."""
    field = "parallelism.cp"
    if not model.family.parallel.context:
        raise refused(
            field,
            f"{degrees.cp} is not supported yet for {model.model_type}; supported: decoders whose attention is one "
            "causal call without windows, such as llama, qwen3 and mixtral",
        )
    if masked or backend != "flash":
        why = "a mask" if masked else f"{backend} attention"
        raise refused(
            field,
            f"{_CONTEXTS[degrees.context]} over {degrees.cp} ranks is supported only with torch's flash "
            f"attention, not with {why}; that takes 16-bit tensors on Ampere or newer GPUs, no padding and no window",
        )


def check_heads(model: ModelSpec, degrees: Degrees) -> None:
    """Raise SpecError if Ulysses ranks would have different numbers of heads."""
    n, a, k, field = degrees.cp, model.num_attention_heads, model.num_key_value_heads, "parallelism.cp"
    wrong = [f"does not divide {a} attention heads"] * bool(a % n)
    wrong += [f"neither divides {k} key/value heads nor is a multiple of them"] * bool(k % n and n % k)
    if wrong:
        raise refused(field, f"{n} {' and '.join(wrong)}, which Ulysses exchanges")


def check_sequence(sequence: int, degrees: Degrees) -> None:
    """Raise SpecError if the ranks' slices of the sequence would differ in length."""
    field, slices = "parallelism.cp", 2 * degrees.cp
    if degrees.context == "ulysses" and sequence % degrees.cp:
        raise refused(field, f"{degrees.cp} ranks do not divide a sequence of {sequence} tokens")
    if degrees.context == "ulysses":
        return
    if degrees.cp > 1 and sequence % slices:
        raise refused(
            field, f"{degrees.cp} ranks have two slices of a sequence each, and {slices} does not divide {sequence}"
        )


def with_context_parallelism(stack: Stack, degrees: Degrees, heads: tuple[int, int] = (0, 0)) -> Stack:
    """Return the rank's operations: its own tokens everywhere, and attention over the tokens of all ranks.

    `heads` are the numbers of query and key/value heads, for Ulysses.
    """

    def change(op: Op) -> Iterator[Op]:
        if op.product == "attention" and degrees.context == "ulysses":
            yield from _ulysses(op, degrees.cp, *heads)
        elif op.product == "attention":
            yield from _ring(op, degrees.cp)
        elif op.view and op.name.endswith(".v_heads"):
            yield op._replace(gradient="new")  # the ring's gradient is laid out by heads
        else:
            yield op

    return rewrite(stack, change)


def _ring(op: Op, cp: int) -> Iterator[Op]:
    """The kernel on one rank's keys after another, as the rank with the most memory runs it.

    That is not the last rank, whose output needs no copy; with more than two ranks it is one in the middle, which
    merges full outputs. The first step's gradients are alive during the second step; the returned gradients, of the
    same size, are not counted again.
    """
    y, *others = op.writes
    q, k, _ = op.reads
    heads, grouped = f"{y.name}.heads", any(s.tensor.name.startswith("dk") for s in op.scratch_back)
    gathered = Tensor("keys and values of all ranks", f"{2 * cp} {_K}", f"={k}")
    merged = (Tensor("merged output", _Q, "fp32"), Tensor("merged with the next", _Q, "fp32"))
    if cp == 2:  # the second step has half the queries and all keys; the kernel's dtypes have 16 bits
        outputs = (Tensor("output of a step in fp32", _Q, "fp32/2"), Tensor("output of a step", _Q, "bf16/2"))
        step = (Tensor("dq of a step", _Q, "bf16/2"), Tensor("dk and dv of a step", f"2 {_K}", f"={k}"))
        kernel = (
            Tensor("dq accumulated", "b s128 a d32", "fp32/2"),
            Tensor("dk and dv expanded", f"2 {_Q}", f"={k}"),
        )
    else:  # all queries and half the keys
        outputs = (Tensor("output of a step in fp32", _Q, "fp32"), Tensor("difference", _Q, "fp32"))
        step = (Tensor("dq of a step", _Q, f"={q}"), Tensor("dk and dv of a step", _K, f"={k}"))
        kernel = (Tensor("dq accumulated", "b s128 a d32", "fp32"), Tensor("dk and dv expanded", _Q, f"={k}"))
    forward = (gathered, *merged, *outputs)
    backward = (
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
        scratch_back=tuple(map(Scratch, backward)),
        product="attention over s_cp",
        source=_SOURCE,
    )
    yield ops.copy(f"{op.name}.contiguous", heads, y.name, y.shape)
    yield ops.release_names(heads)


_ULYSSES = "DeepSpeed 0.19.8 runtime/sequence_parallel/ulysses_sp.py UlyssesSPAttentionHF"


def _ulysses(op: Op, n: int, query_heads: int, key_value_heads: int) -> Iterator[Op]:
    """Attention over all tokens with a rank's share of the heads.

    Queries, keys and values are copied into rank order, exchanged, and copied into head order; the kernel's output is
    exchanged back. Key/value heads are repeated if there are fewer than ranks.
    """
    y = op.writes[0]
    full_sequence = {"s": "s_cp", "s128": "s_cp128", "a": f"a/{n}", "k": f"k/{n}"}
    names: dict[str, str] = {}
    grouped = query_heads // n > max(1, key_value_heads // n)
    for t, heads in zip(op.reads, ("a", "k", "k"), strict=True):
        x, local = t, f"b s {heads} d"
        if heads == "k" and n > key_value_heads:
            local = f"b s {n} d"
            yield ops.copy(f"{op.name}.repeat_{t}", t, f"{t}.repeated", local, "new")
            x = f"{t}.repeated"
        yield ops.copy(f"{op.name}.lay_{t}", x, f"{t}.sent", local, "new")._replace(source=_ULYSSES)
        yield _all_to_all(op, f"{t}.sent", f"{t}.received", local)
        names[t] = f"{t}.heads"
    for t, heads in zip(op.reads, ("a", "k", "k"), strict=True):
        yield ops.copy(f"{op.name}.heads_{t}", f"{t}.received", names[t], f"b s_cp {heads}/{n} d")
    kernel, laid, final = f"{y.name}.heads", f"{y.name}.laid", y.name
    (attention,) = ops.with_axes((op,), full_sequence)
    yield attention._replace(
        reads=tuple(names[t] for t in op.reads),
        writes=(Tensor(kernel, f"b s_cp a/{n} d", f"={names[op.reads[0]]}"), *attention.writes[1:]),
        keeps=tuple(
            keep._replace(
                what=kernel if keep.what == y.name else names.get(keep.what, keep.what),
                of=names.get(keep.of, keep.of),
            )
            for keep in op.keeps
        ),
        scratch=tuple(_with_new_dtype_name(t, names) for t in attention.scratch),
        scratch_back=tuple(
            s._replace(tensor=_with_new_dtype_name(s.tensor, names), of=names.get(s.of, s.of))
            for s in attention.scratch_back
            if grouped or not s.tensor.name.startswith(("dk", "dv"))
        ),
        product="attention over s_cp",
    )
    lay = ops.copy if query_heads > n else ops.view  # a single head is contiguous already
    yield lay(f"{op.name}.contiguous", kernel, laid, f"b s_cp a/{n} d")
    yield ops.release_names(kernel)
    yield ops.copy(f"{op.name}.lay", laid, f"{y.name}.sent", "several s a d")
    # for a single sequence, one copy transposes what was received into the output
    several, one = Tensor(f"{y.name}.received", "several s a d"), Tensor(f"{y.name}.received.one", "only s a d")
    yield _all_to_all(op, f"{y.name}.sent", several.name, "b s a d")._replace(writes=(several, one))
    yield ops.copy(f"{op.name}.tokens", several.name, f"{y.name}.turned", "several s a d", "new")
    yield ops.release_names(f"{y.name}.sent")
    yield Op(
        f"{op.name}.out", (f"{y.name}.turned", one.name), (Tensor(final, "b s a d"),), gradient="same", source=_ULYSSES
    )
    # with several sequences these are freed earlier, but by then less is alive than at the peak
    yield ops.release_names(laid, *names.values())


def _with_new_dtype_name(t: Tensor, names: dict[str, str]) -> Tensor:
    """The tensor with its `=x` dtype, if it has one, pointing to the new name of `x`."""
    return t._replace(dtype=f"={names.get(t.dtype[1:], t.dtype[1:])}") if t.dtype.startswith("=") else t


def _all_to_all(op: Op, x: str, y: str, shape: str) -> Op:
    """An all-to-all, whose backward first makes the gradient contiguous."""
    scratch = (Scratch(Tensor("contiguous gradient", shape, f"={x}")),)
    return Op(f"{op.name}.all_to_all_{x}", (x,), (Tensor(y, shape),), scratch_back=scratch, source=_ULYSSES)
