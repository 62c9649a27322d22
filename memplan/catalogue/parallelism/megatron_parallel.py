"""Tensor and sequence parallelism as Megatron-core has them (Korthikanti et al. 2022, arXiv:2205.05198).

A rank's model has fewer heads, a narrower FFN and a smaller vocabulary, and its collectives write over what they read.
With sequence parallelism a rank has a part of the tokens (`s_tp`) wherever no matrix is: what a matrix reads is
gathered into one buffer that all matrices share, again on the way back, and what it makes is summed and divided.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.kernels.rewriting import matrix, rewrite
from memplan.core.ir import Keep, Op, Scratch, Stack, Tensor

_SOURCE = "megatron-core 0.12 tensor_parallel"
_LINEAR = f"{_SOURCE}/layers.py LinearWithGradAccumulationAndAsyncCommunication"
_ALL = "b s h"


def divide(stack: Stack, columns: tuple[str, ...], rows: tuple[str, ...], sequence: bool) -> Stack:
    """The rank's operations of a stack that was built of the rank's part of the model. `columns` and `rows` are what
    linear layers are called of which it has some rows or some columns; `sequence`: tokens are divided too."""
    stack = rewrite(stack, _one)
    if not sequence:
        return stack
    before = _tokens_divided(_scattered(stack.before), columns, rows)
    buffer = Op(
        "all-gather buffer",
        (),
        (Tensor("gathered", _ALL, "=embeds"),),
        gradient="none",
        holds="step",
        source=f"{_SOURCE}/utils.py GlobalMemoryBuffer",
    )
    runs = tuple(
        run._replace(
            before=_tokens_divided(run.before, columns, rows),
            blocks=tuple(b._replace(ops=_tokens_divided(b.ops, columns, rows)) for b in run.blocks),
        )
        for run in stack.runs
    )
    heads = tuple(op.name.rpartition(".")[2] for op in stack.after if matrix(op))
    larger = any(op.name == buffer.name for op in before)  # of a mixture of experts, who share it
    return Stack(
        before if larger else (*before, buffer),
        runs,
        _tokens_divided(stack.after, (*columns, *heads), rows),
        stack.loss,
    )


def _one(op: Op) -> Iterator[Op]:
    """An operation whose collective writes over what it reads; a table of which a rank has some rows."""
    if matrix(op):
        yield op._replace(gradient="new", source=_LINEAR)
    elif any(w.group == "embedding" and w.rows and w.shape.startswith("v ") for w in op.weights):
        (w, *_), own = op.weights, Tensor(f"{op.name}.own_ids", "b s", "int64")
        keeps = tuple(Keep(own.name, k.of) if k.of == w.name else k for k in op.keeps)
        yield op._replace(
            writes=(*op.writes, own),
            keeps=keeps,
            scratch=(*op.scratch, Tensor("tokens of other ranks", "b s", "bool")),
            source=f"{_SOURCE}/layers.py VocabParallelEmbedding",
        )
    else:
        yield op


def _scattered(before: tuple[Op, ...]) -> tuple[Op, ...]:
    """What comes before the blocks, with the tokens divided where the embeddings are done.

    The lookup alone is summed and divided at once; with positions added, the sum is copied, and then dropped from.
    """
    at = next(i for i, op in enumerate(before) if any(t.name == "embeds" for t in op.writes))
    last, whole = before[at], Tensor("embeds.whole", _ALL)
    if last.weights:
        return before
    if len(last.writes) > 1:  # dropout
        (x,) = last.reads
        copy = _divided(f"{last.name}.scatter", x, "scattered", "copied")
        keeps = tuple(k._replace(of="scattered" if k.of == x else k.of) for k in last.keeps)
        return (*before[:at], copy, last._replace(reads=("scattered",), keeps=keeps), *before[at + 1 :])
    made = last._replace(writes=(whole,))
    return (*before[:at], made, _divided("scatter", whole.name, "embeds", "copied"), *before[at + 1 :])


def _divided(name: str, x: str, y: str, how: str) -> Op:
    """A rank's tokens of what is there for all; the gradient is gathered into new storage."""
    source = f"{_SOURCE}/mappings.py " + ("scatter" if how == "copied" else "reduce_scatter")
    return Op(name, (x,), (Tensor(y, "b s_tp h"),), source=f"{source}_to_sequence_parallel_region")


def _tokens_divided(operations: tuple[Op, ...], columns: tuple[str, ...], rows: tuple[str, ...]) -> tuple[Op, ...]:
    """The operations with the tokens divided wherever no matrix is: between one that gathers and one that scatters,
    all are there."""
    inside: set[str] = {"tokens", "summed", "embeds.whole", "places"}
    out: list[Op] = []
    for op in operations:
        name = op.name.rpartition(".")[2]
        if matrix(op) and name in columns:
            inside.update(t.name for t in op.writes)
            whole = Scratch(Tensor("gradient of all tokens", _ALL, f"={op.reads[0]}"), op.reads[0])
            out.append(op._replace(scratch_back=(*op.scratch_back, whole)))
        elif matrix(op) and name in rows:
            y, summand = op.writes[0], f"{op.name}.summand"
            out.append(op._replace(writes=(y._replace(name=summand),)))
            out.append(_divided(f"{op.name}.reduce_scatter", summand, y.name, "summed"))
        elif not inside.isdisjoint(op.reads):
            inside.update(t.name for t in op.writes if op.name != "return" and "s_tp" not in t.shape)
            out.append(op)
        elif any(w.group == "embedding" and w.rows for w in op.weights):
            out.append(_looked_up(op))
        else:
            out.append(op._replace(**_with_part_of_tokens(op)) if op.reads else op)
    return tuple(out)


def _looked_up(op: Op) -> Op:
    """The lookup that makes the embeddings by itself: of all tokens, then summed and divided."""
    y, *others = op.writes
    if y.name != "embeds":
        return op
    all_tokens = y._replace(name="the rank's summand")
    return op._replace(
        writes=(y._replace(shape="b s_tp h"), *others),
        scratch=(*op.scratch, all_tokens),
        scratch_back=(*op.scratch_back, Scratch(Tensor("gradient of all tokens", _ALL, f"={y.name}"))),
    )


def _part(t: Tensor) -> Tensor:
    """A rank's tokens of it; the whole, where it is of pairs of tokens, as masks are, or of none."""
    first, *others = t.shape.removeprefix("b ").split() or [""]
    if not t.shape.startswith("b ") or first != "s" or any(axis.startswith("s") for axis in others):
        return t
    return t._replace(shape=" ".join(("b", "s_tp", *others)))


def _with_part_of_tokens(op: Op) -> dict[str, tuple[Tensor, ...] | tuple[Scratch, ...]]:
    return {
        "writes": tuple(map(_part, op.writes)),
        "scratch": tuple(map(_part, op.scratch)),
        "scratch_back": tuple(s._replace(tensor=_part(s.tensor)) for s in op.scratch_back),
    }
