"""Context parallelism: each rank has a part of every sequence, and attention passes keys and values around.

As torch's `context_parallel` has it, which accelerate and TorchTitan use: keys and values of all ranks are gathered at
once, the kernel attends to one rank's after the other, and its outputs are merged in fp32. So that causal attention is
the same work everywhere, a rank has a slice of the sequence's first half and one of its second; every step but the
first then computes on half the queries or half the keys.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue import ops
from memplan.catalogue.methods import rewrite
from memplan.degrees import Degrees
from memplan.errors import SpecError
from memplan.ir import Op, Scratch, Stack, Tensor

_SOURCE = "torch 2.13 distributed/tensor/experimental/_context_parallel/_attention.py _templated_ring_attention"
_Q, _K = "b s a d", "b s k d"

# Dense decoders whose attention is one call of torch's, on heads as the projections make them.
FAMILIES = (
    *("cohere", "ernie4_5", "gemma", "granite", "internlm3", "llama", "ministral3", "mistral", "olmo"),
    *("olmo2", "qwen2", "qwen3", "seed_oss", "smollm3"),
)


def check(model_type: str, backend: str, masked: bool, degrees: Degrees) -> None:
    """Raise SpecError for a family or a kernel whose attention is not passed around."""
    field = "parallelism.cp"
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise SpecError(f"{field}: {degrees.cp} is not supported yet for {model_type}; supported: {known}", field)
    if masked or backend != "flash":
        why = "a mask" if masked else f"{backend} attention"
        raise SpecError(
            f"{field}: {degrees.cp} ranks pass keys and values around only under torch's flash attention, not with "
            f"{why}; it runs in 16 bits on cards since Ampere, without padding and windows",
            field,
        )


def check_sequence(sequence: int, degrees: Degrees) -> None:
    """Raise SpecError where ranks would not have two slices of the same number of tokens each."""
    field, slices = "parallelism.cp", 2 * degrees.cp
    if degrees.cp > 1 and sequence % slices:
        raise SpecError(
            f"{field}: {degrees.cp} ranks have two slices of a sequence each, and {slices} do not divide {sequence}",
            field,
        )


def around(stack: Stack, degrees: Degrees) -> Stack:
    """The rank's operations: its tokens everywhere, and attention to those of all."""

    def change(op: Op) -> Iterator[Op]:
        if op.product == "attention":
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
