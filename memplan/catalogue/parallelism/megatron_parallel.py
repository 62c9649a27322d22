"""Megatron-core's tensor and sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198).

A rank's model has fewer heads, a narrower FFN and a smaller vocabulary, and its collectives work in place. With
sequence parallelism a rank has a part of the tokens (`s_tp`) outside of matrix products: the input of a product is
all-gathered into one buffer that all products share, in backward too, and its output is reduce-scattered.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.degrees import Degrees
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import matrix, rewrite
from memplan.core.ir import Keep, Op, Scratch, Stack, Tensor, Weight

_SOURCE = "megatron-core 0.12 tensor_parallel"
_ADAPTER = "megatron-bridge 0.3.1 and 0.6.2 peft/utils.py ParallelLinearAdapter"
_ADAPTED_INPUT = (
    "megatron-bridge 0.3.1 peft/utils.py get_adapter_attributes_from_linear: return_layernorm_output_gathered"
)
_LINEAR = f"{_SOURCE}/layers.py LinearWithGradAccumulationAndAsyncCommunication"
_ALL = "b s h"


def divide(stack: Stack, columns: tuple[str, ...], rows: tuple[str, ...], degrees: Degrees) -> Stack:
    """Return the rank's operations, given a stack built from the rank's part of the model.

    columns  names of column-parallel linear layers
    rows     names of row-parallel linear layers
    """
    divides_rank = degrees.divides_rank

    def change(op: Op) -> Iterator[Op]:
        name, half = module_of(op)
        parts = degrees.etp if op.name.startswith("mlp.experts.") else degrees.tp
        divides = divides_rank and ((half == "lora_A" and name in columns) or (half == "lora_B" and name in rows))
        yield from gathered(op, parts, _ADAPTER) if divides and parts > 1 else _with_tensor_parallelism(op)

    stack = rewrite(stack, change)
    if not degrees.sequence_parallel:
        return stack
    before = _with_sequence_parallelism(_scattered(stack.before), columns, rows, divides_rank)
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
            before=_with_sequence_parallelism(run.before, columns, rows, divides_rank),
            blocks=tuple(
                b._replace(ops=_with_sequence_parallelism(b.ops, columns, rows, divides_rank)) for b in run.blocks
            ),
        )
        for run in stack.runs
    )
    heads = tuple(op.name.rpartition(".")[2] for op in stack.after if matrix(op))
    has_buffer = any(
        op.name == buffer.name for op in before
    )  # a mixture of experts brings a larger one, which is shared
    return Stack(
        before if has_buffer else (*before, buffer),
        runs,
        _with_sequence_parallelism(stack.after, (*columns, *heads), rows, divides_rank),
        stack.loss,
    )


def module_of(op: Op) -> tuple[str, str]:
    """Return the linear layer of an operation, and which half of its adapter the operation is, if any.

    lora_B of a column-parallel layer is divided like the layer, and lora_A of a row-parallel layer; peft replicates the
    other matrices, and Megatron-Bridge divides their rows.
    Source: peft 0.21 tuners/lora/model.py _create_and_replace, add_lora_tp_hooks_dtensor.
    """
    path, _, last = op.name.rpartition(".")
    if last in ("lora_A", "lora_B", "base_layer"):
        return path.rpartition(".")[2], last.removeprefix("base_layer")
    return last, ""


def part(axes: str, t: int) -> str:
    """Return the share of the product of axes of the rank that has most."""
    return f"{axes.replace(' ', '*')}/{t}"


def gathered(op: Op, t: int, source: str, held: tuple[str, ...] = ()) -> Iterator[Op]:
    """A linear layer of which a rank has some rows, and the gather of its output: rank by rank, then copied into one
    contiguous tensor. Tensors in `held` stay alive meanwhile."""
    lead, out, into = ops.axes_of(op)
    local = f"{op.name}.part"

    def divided(w: Weight) -> Weight:
        return w._replace(shape=f"{part(out, t)} {into}", rows=1) if w.matrix else w._replace(shape=part(out, t))

    one = Tensor(local, f"{lead} {part(out, t)}")
    yield op._replace(writes=(one,), weights=tuple(map(divided, op.weights)))
    ranks = Tensor(f"{op.name}.parts", f"{t} {one.shape}", f"={local}")
    yield Op(f"{op.name}.gather", (local, *held), op.writes[:1], scratch=(ranks,), source=source)


def _with_tensor_parallelism(op: Op) -> Iterator[Op]:
    """A linear layer with its collective in place, or an embedding table of which a rank holds some rows."""
    if matrix(op):
        yield op._replace(gradient="new", source=_LINEAR)
    elif any(w.group == "embedding" and w.rows and w.shape.startswith("v ") for w in op.weights):
        (w, *_), local_ids = op.weights, Tensor(f"{op.name}.own_ids", "b s", "int64")
        keeps = tuple(Keep(local_ids.name, k.of) if k.of == w.name else k for k in op.keeps)
        yield op._replace(
            writes=(*op.writes, local_ids),
            keeps=keeps,
            scratch=(*op.scratch, Tensor("tokens of other ranks", "b s", "bool")),
            source=f"{_SOURCE}/layers.py VocabParallelEmbedding",
        )
    else:
        yield op


def _scattered(before: tuple[Op, ...]) -> tuple[Op, ...]:
    """The operations before the blocks, with the tokens scattered once the embeddings are complete.

    A lookup that writes `embeds` itself is reduce-scattered (see `_reduce_scattered_lookup`). If positions are added,
    the sum is scattered by a copy, before any dropout.
    """
    index = next(i for i, op in enumerate(before) if any(t.name == "embeds" for t in op.writes))
    last, full = before[index], Tensor("embeds.whole", _ALL)
    if last.weights:
        return before
    if len(last.writes) > 1:  # dropout
        (x,) = last.reads
        scatter = _scatter(f"{last.name}.scatter", x, Tensor("scattered", "b s_tp h"))
        keeps = tuple(k._replace(of="scattered" if k.of == x else k.of) for k in last.keeps)
        return (*before[:index], scatter, last._replace(reads=("scattered",), keeps=keeps), *before[index + 1 :])
    last = last._replace(writes=(full,))
    return (*before[:index], last, _scatter("scatter", full.name, Tensor("embeds", "b s_tp h")), *before[index + 1 :])


def _scatter(name: str, x: str, y: Tensor, kind: str = "scatter") -> Op:
    """A rank's tokens of `x`, by `scatter` or `reduce_scatter`; the gradient is gathered into new storage."""
    return Op(name, (x,), (y,), source=f"{_SOURCE}/mappings.py {kind}_to_sequence_parallel_region")


def _with_gathered_inputs(operations: tuple[Op, ...], columns: tuple[str, ...]) -> Iterator[Op]:
    """The operations, with adapted layers that return their gathered input, which the adapter reads and keeps."""
    whole: dict[str, str] = {}
    for op in operations:
        if op.name.endswith(".base_layer") and matrix(op) and module_of(op)[0] in columns:
            (x,), y = op.reads, f"{op.name}.input"
            yield Op(f"{op.name}.gather", (x,), (Tensor(y, _ALL, f"={x}"),), source=_ADAPTED_INPUT)
            yield ops.release_names(x)
            whole[x] = y
        yield op if whole.keys().isdisjoint(op.reads) else ops.renamed(op, lambda name: whole.get(name, name))


def _with_sequence_parallelism(
    operations: tuple[Op, ...], columns: tuple[str, ...], rows: tuple[str, ...], divides_rank: bool
) -> tuple[Op, ...]:
    """The operations with the tokens divided, except between a product that gathers and one that scatters.

    An adapter whose rank is not divided gathers and scatters as its layer does, but at its rank.
    """
    of_all_tokens: set[str] = {"tokens", "summed", "embeds.whole", "places"}
    out: list[Op] = []
    for op in _with_gathered_inputs(operations, columns) if divides_rank else operations:
        name, half = module_of(op)
        is_plain = op.name.rpartition(".")[2] == name
        if matrix(op) and name in columns and (is_plain or (not divides_rank and half != "lora_A")):
            of_all_tokens.update(t.name for t in op.writes)
            gradient = Tensor("gradient of all tokens", f"b s {ops.axes_of(op)[2]}", f"={op.reads[0]}")
            out.append(op._replace(scratch_back=(*op.scratch_back, Scratch(gradient, op.reads[0]))))
        elif name in rows and matrix(op) and (not half or (not divides_rank and half == "lora_A")):
            y, summand = op.writes[0], f"{op.name}.summand"
            out.append(op._replace(writes=(y._replace(name=summand),)))
            out.append(
                _scatter(f"{op.name}.reduce_scatter", summand, y._replace(shape=_part(y.shape)), "reduce_scatter")
            )
        elif op.name.endswith(".lora_B.gather") and op.reads[0] in of_all_tokens:
            (y,) = op.writes
            out.append(op._replace(writes=(y._replace(name=f"{y.name}.whole"),)))
            out.append(ops.view(f"{op.name}.scatter", f"{y.name}.whole", y.name, "b s_tp h", "new"))
        elif op.name.endswith(".base_layer.gather") or not of_all_tokens.isdisjoint(op.reads):
            of_all_tokens.update(t.name for t in op.writes if op.name != "return" and "s_tp" not in t.shape)
            out.append(op)
        elif any(w.group == "embedding" and w.rows for w in op.weights):
            out.append(_reduce_scattered_lookup(op))
        else:
            out.append(ops.with_shapes(op, _part) if op.reads else op)
    return tuple(out)


def _reduce_scattered_lookup(op: Op) -> Op:
    """A lookup that writes the embeddings itself: it covers all tokens and is then reduce-scattered."""
    y, *others = op.writes
    if y.name != "embeds":
        return op
    all_tokens = y._replace(name="the rank's summand")
    return op._replace(
        writes=(y._replace(shape="b s_tp h"), *others),
        scratch=(*op.scratch, all_tokens),
        scratch_back=(*op.scratch_back, Scratch(Tensor("gradient of all tokens", _ALL, f"={y.name}"))),
    )


def _part(shape: str) -> str:
    """The shape of a rank's tokens; unchanged if it has no token axis or, like a mask's, covers pairs of tokens."""
    first, *others = shape.removeprefix("b ").split() or [""]
    if not shape.startswith("b ") or first != "s" or any(axis.startswith("s") for axis in others):
        return shape
    return " ".join(("b", "s_tp", *others))
