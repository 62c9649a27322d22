"""Tensor parallelism: one rank's part of a model, as a library divides it, and the collectives between ranks.

A rank has a part of the heads and of the FFN's width, so it is described as a model with fewer heads and a narrower
FFN; its part of any other matrix shows in the shape (`v/4 h`: a quarter of the rows). Norms, the residual stream and
tensors outside of the blocks are replicated on every rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from memplan.catalogue.degrees import Degrees
from memplan.catalogue.families import litgpt, torchtitan
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import matrix, rewrite
from memplan.catalogue.parallelism import megatron_parallel
from memplan.catalogue.parallelism.expert_parallel import local_parameters
from memplan.catalogue.parallelism.megatron_parallel import gathered, module_of, part
from memplan.core.errors import nearest, refused
from memplan.core.ir import Op, Scratch, Stack, Tensor, operations
from memplan.models.configs import families
from memplan.models.configs.megatron import padded
from memplan.models.facts import Family
from memplan.models.model import ModelSpec
from memplan.models.tensor_plans import TensorParallelPlan

_SOURCE = "transformers 5.24 distributed/tensor_parallel.py"


# torchtitan and LitGPT each divide all of their models alike. LitGPT divides the layers of its blocks and replicates
# embeddings and head. Source: litgpt 0.5.3 generate/tp.py.
_TITAN: dict[str, TensorParallelPlan] = dict.fromkeys(
    torchtitan.KINDS, TensorParallelPlan(("qkv_proj",), ("down_proj",))
)
_LITGPT: dict[str, TensorParallelPlan] = dict.fromkeys(
    litgpt.KINDS, TensorParallelPlan(("attn", "fc", "fc_1", "fc_2"), ("proj",))
)


def plan_of(model_type: str, row: Family, style: str) -> TensorParallelPlan | None:
    """Return how a library divides a family's linear layers, or None if it does not."""
    facts = row.parallel
    match style:
        case "torchtitan":
            return _TITAN.get(model_type)
        case "litgpt":
            return _LITGPT.get(model_type)
        case "megatron":
            is_plain = facts.plan is not None and not facts.plan.gathered and not facts.plan.experts
            return facts.megatron or (facts.plan if is_plain else None)
        case _:
            return facts.plan


def _plan(model: ModelSpec, style: str) -> TensorParallelPlan:
    plan = plan_of(model.model_type, model.family, style)
    assert plan is not None
    return plan


def local_model(model: ModelSpec, degrees: Degrees) -> ModelSpec:
    """Return the model that one rank computes, with its share of the heads, FFN width and vocabulary."""
    t, plan, v = degrees.tp, _plan(model, degrees.style), model.vocab_size
    a, k, f = model.num_attention_heads, model.num_key_value_heads, model.intermediate_size
    if plan.heads:
        a, k = a // t, k // t
    if degrees.style == "megatron":
        v = padded(v, t)
    if degrees.style == "torchtitan":
        v = -(-v // t)
    width = -(-f // t) if plan.width else f
    return model.resized(num_attention_heads=a, num_key_value_heads=k, intermediate_size=width, vocab_size=v)


def local_expert_axes(model: ModelSpec, degrees: Degrees) -> dict[str, int]:
    """Return the widths of a rank's parts of the experts and of the shared experts; empty if nothing is divided.

    Under expert parallelism, ranks hold different experts, each of full width.
    """
    t, plan, axes = degrees.tp, _plan(model, degrees.style), model.axes()
    if not plan.experts or "m" not in axes:
        return {}
    shared = {"fs": axes["fs"] // t} if "fs" in axes and plan.width and not plan.replicated else {}
    return {"m": axes["m"] // (t if degrees.ep == 1 else 1), **shared}


def check(model: ModelSpec, degrees: Degrees, itemsize: int, adapted: tuple[str, ...] = ()) -> None:
    """Raise SpecError if the family has no tensor-parallel plan, or the degree does not divide its heads or widths.

    The message names the supported families, or every number that is not divided. `adapted` are adapter targets that
    expert matrices stand for. torch's grouped products need rows of a multiple of 16 bytes, at `itemsize` bytes per
    number.
    Source: torch 2.13 aten/src/ATen/native/GroupedMMUtils.h check_valid_strides_and_return_transposed.
    """
    t, field = degrees.tp, "parallelism.tp"
    plan = plan_of(model.model_type, model.family, degrees.style)
    if plan is None:
        fails = model.family.parallel.fails
        if degrees.style != "megatron" and fails:
            raise refused(field, f"transformers 5.24 does not run {model.model_type} on {t}: {fails}")
        known = [name for name, row in families().items() if plan_of(name, row, degrees.style)]
        near = ", ".join(nearest(model.model_type, known))
        raise refused(
            field, f"{t} is not supported yet for {model.model_type}; supported: {len(known)} families, such as {near}"
        )
    axes = model.axes()
    width = axes.get("m", 0) if plan.experts and degrees.ep == 1 else 0
    counted = {
        "attention heads": model.num_attention_heads if plan.heads else 0,
        "key/value heads": model.num_key_value_heads if plan.heads else 0,
        "of the FFN's width": model.intermediate_size if degrees.style == "megatron" else 0,
        "of an expert's width": width,
        "of the shared experts' width": axes.get("fs", 0) if plan.experts and plan.width and not plan.replicated else 0,
    }
    left = [f"{n} {what}" for what, n in counted.items() if n % t]
    if left:
        raise refused(field, f"{t} does not divide {' and '.join(left)}")
    if width // t * itemsize % 16:
        raise refused(
            field,
            f"{t} leaves experts {width // t} wide, and torch's grouped products take rows of a multiple of "
            f"16 bytes ({16 // itemsize} numbers)",
        )
    if plan.experts and adapted:
        raise refused(
            "method.targets",
            f"peft 0.21 fails to adapt experts ({', '.join(adapted)}) that tensor parallelism has "
            "divided; name linear layers, such as q_proj and o_proj",
        )


def check_sequence(sequence: int, degrees: Degrees) -> None:
    """Raise SpecError if sequence-parallel ranks would have different numbers of tokens."""
    t, field = degrees.tp, "parallelism.sequence_parallel"
    if degrees.sequence_parallel and sequence % t:
        raise refused(field, f"{t} ranks do not divide a sequence of {sequence} tokens")


def divide(stack: Stack, model: ModelSpec, degrees: Degrees, records: bool = True) -> Stack:
    """Return the rank's operations, given a stack built from the rank's part of the model, adapters included.

    `records`: autograd records the pass. If not, linear layers take local tensors instead of DTensors.
    """
    t, plan = degrees.tp, _plan(model, degrees.style)
    records = records or degrees.style == "litgpt"  # LitGPT's all-reduce always writes a new tensor
    if degrees.style == "megatron":
        return megatron_parallel.divide(stack, plan.columns, plan.rows, degrees)
    if degrees.style == "torchtitan":
        return torchtitan.divide(stack, degrees.sequence_parallel)
    uses = Counter(w.name for op in operations(stack) for w in op.weights)

    def change(op: Op) -> Iterator[Op]:
        if plan.experts and degrees.ep == 1 and op.name.endswith("experts.sort"):
            yield local_parameters(op.name.removesuffix(".sort"))
        if degrees.style == "litgpt" and module_of(op)[0] not in (*plan.columns, *plan.rows):
            yield op
            return
        if not op.weights or not set(plan.replicated).isdisjoint(op.name.split(".")):
            yield op
            return
        w, (name, half) = matrix(op), module_of(op)
        if any(v.group == "embedding" and v.rows and not v.matrix for v in op.weights):
            yield _embedding(op, t, tied=uses[op.weights[0].name] > 1)
        elif w is None:
            yield op
        elif name in plan.columns:
            yield from (op,) if half == "lora_A" else _columns(op)
        elif name in plan.rows:
            yield from (op,) if half == "lora_B" else _rows(op) if records else _rows_in_place(op)
        elif half:
            yield op
        elif name in plan.gathered or op in stack.after:
            yield from _gathered(op, t, records)
        elif name in plan.split:
            yield from _split(op, t, records)
        else:
            yield op

    return rewrite(stack, change)


def _with_names(op: Op, names: Mapping[str, str]) -> Op:
    """The operation with new names for tensors it reads or writes."""
    return ops.renamed(op, lambda name: names.get(name, name))


def _replicated_input(op: Op) -> tuple[Op, str]:
    """A view of the replicated input, and its name. In backward an all-reduce sums its gradient into a new tensor."""
    (x,) = op.reads
    lead, _, into = ops.axes_of(op)
    name = f"{op.name}.input"
    return ops.view(name, x, name, f"{lead} {into}", "new")._replace(source=f"{_SOURCE} ColwiseParallel"), name


def _columns(op: Op) -> Iterator[Op]:
    """A column-parallel layer, whose output stays divided."""
    view, x = _replicated_input(op)
    yield view
    yield _with_names(op, {op.reads[0]: x})


def _all_reduce(name: str, x: str, y: str, shape: str, style: str) -> Op:
    """An all-reduce into a new tensor; in backward the gradient passes through."""
    return Op(name, (x,), (Tensor(y, shape),), gradient="same", source=f"{_SOURCE} {style}")


def _rows(op: Op) -> Iterator[Op]:
    """A row-parallel layer and the all-reduce of its partial sums."""
    y = op.writes[0]
    summand = f"{op.name}.summand"
    yield _with_names(op, {y.name: summand})
    yield _all_reduce(f"{op.name}.all_reduce", summand, y.name, y.shape, "RowwiseParallel")


def _rows_in_place(op: Op, x: str = "") -> Iterator[Op]:
    """A row-parallel layer whose partial sums are all-reduced in place; adding the bias then makes a new tensor.

    Until then the input, or the tensor `x` that it is a slice of, stays alive.

    Source: transformers 5.24 distributed/tensor_parallel.py RowwiseParallel.transform_output_post_forward.
    """
    matrices = tuple(w for w in op.weights if w.matrix or w.stored)
    biases = tuple(w for w in op.weights if w not in matrices)
    y, summand = op.writes[0], f"{op.name}.summand"
    yield _with_names(op, {y.name: summand})._replace(weights=matrices)
    inputs = tuple(dict.fromkeys((*op.reads[:1], *filter(None, (x,)))))
    if not biases:
        yield ops.view(f"{op.name}.all_reduce", summand, y.name, y.shape)._replace(source=f"{_SOURCE} RowwiseParallel")
        return
    source = f"{_SOURCE} RowwiseParallel"
    yield Op(f"{op.name}.bias", (summand, *inputs), (y,), weights=biases, source=source)


def _gathered(op: Op, t: int, records: bool = True) -> Iterator[Op]:
    """A column-parallel layer whose output is all-gathered rank by rank, then copied into one contiguous tensor."""
    view, x = _replicated_input(op)
    yield view
    held = () if records else (x,)  # the layer's call still holds its input
    yield from gathered(_with_names(op, {op.reads[0]: x}), t, f"{_SOURCE} ColwiseParallel", held)


def _split(op: Op, t: int, records: bool = True) -> Iterator[Op]:
    """A row-parallel layer that first copies its slice of a replicated input; the partial sums are all-reduced."""
    lead, out, into = ops.axes_of(op)
    x, y, local, summand = op.reads[0], op.writes[0], f"{op.name}.input", f"{op.name}.summand"
    share = part(into, t)
    yield ops.copy(f"{op.name}.split", x, local, f"{lead} {share}", "new")
    weights = tuple(w._replace(shape=f"{out} {share}") if w.matrix else w for w in op.weights)
    if not records:
        yield from _rows_in_place(_with_names(op, {x: local})._replace(weights=weights), x)
        return
    yield _with_names(op, {x: local, y.name: summand})._replace(weights=weights)
    yield _all_reduce(f"{op.name}.all_reduce", summand, y.name, y.shape, "RowwiseParallel")


def _embedding(op: Op, t: int, tied: bool) -> Op:
    """A lookup of the tokens whose rows the rank has; an all-reduce sums the ranks' results.

    The gradient is computed for the full table and stays that size. If the table is `tied` to the head, the rank's part
    is copied out instead and added to the head's gradient, into a new tensor.
    Source: torch 2.13 distributed/tensor/_ops/_embedding_ops.py, which divides no gradient by rows.
    """
    y, (w, *others) = op.writes[0], op.weights
    rows, axis = w.shape.split()
    share = f"{part(rows, t)} {axis}"
    table = w._replace(shape=share, gradient="" if tied else w.shape)
    gradients = (Tensor("gradient of all rows", w.shape, f"={w.name}"), Tensor("sum of gradients", share, f"={w.name}"))
    backward = tuple(Scratch(tensor, w.name) for tensor in gradients) if tied else ()
    return op._replace(
        weights=(table, *others),
        scratch=(*op.scratch, Tensor("the rank's summand", y.shape, y.dtype)),
        scratch_back=(*op.scratch_back, *backward),
        source=f"{_SOURCE} EmbeddingParallel",
    )
