"""Expert parallelism: each rank holds some experts entirely, and tokens are sent to the ranks of their experts.

As in transformers' training. Tensor-parallel ranks, which have the same tokens, split them first. Each (token, expert)
row is sent to the expert's rank (`tokens_sent`), computed there together with rows from other ranks
(`tokens_received`), sent back, weighted by the router's scores and summed. The number of rows that a rank receives
depends on the data: assumed is the number it sends, times `parallelism.expert_imbalance`.

Source: transformers 5.24 distributed/expert_parallel.py AllToAllEP.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.degrees import Degrees
from memplan.catalogue.experts.routers import CHOSEN, PAIRS, SCORES
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import rewrite_lists
from memplan.core.errors import refused
from memplan.core.ir import Keep, Op, Scratch, Stack, Tensor
from memplan.models.configs import families
from memplan.models.model import ModelSpec

_SOURCE = "transformers 5.24 distributed/expert_parallel.py AllToAllEP"
_PART, _SENT, _RECEIVED = "tokens_part", "tokens_sent", "tokens_received"


def check(model: ModelSpec, degrees: Degrees) -> None:
    """Raise SpecError if the family has no supported expert-parallel plan, or the ranks do not divide its experts."""
    ep, field = degrees.ep, "parallelism.ep"
    if "E" not in model.axes():
        raise refused(field, f"{ep} ranks divide experts, and {model.model_type} has none")
    if not model.family.parallel.experts:
        known = ", ".join(name for name, row in families().items() if row.parallel.experts)
        raise refused(field, f"{ep} is not supported yet for {model.model_type}; supported: {known}")
    if model.axes()["E"] % ep:
        raise refused(field, f"{ep} does not divide {model.axes()['E']} experts")


def divide(stack: Stack, degrees: Degrees) -> Stack:
    """Return the rank's operations, with the experts' operations on its own experts and the rows it receives."""

    def change(operations: tuple[Op, ...]) -> tuple[Op, ...]:
        return tuple(_with_dispatch(operations, degrees))

    return rewrite_lists(stack, change)


def _with_dispatch(operations: tuple[Op, ...], degrees: Degrees) -> Iterator[Op]:
    section: list[Op] = []
    for op in operations:
        if section or op.name.endswith("experts.sort"):
            section.append(op)
        else:
            yield op
        if section and op.name.endswith("experts.return"):
            yield from _dispatched(section, degrees)
            section = []


def _dispatched(section: list[Op], degrees: Degrees) -> Iterator[Op]:
    """The operations of one experts module, from sorting the rows to its return, between the two all-to-alls."""
    name = section[0].name.removesuffix(".sort")
    (gather,) = (op for op in section if op.name == f"{name}.gather")
    (cast,) = (op for op in section if op.name == f"{name}.cast")
    x, y = gather.reads[0], cast.writes[0].name
    width = gather.writes[0].shape.removeprefix(f"{PAIRS} ")
    shared = degrees.tp > 1
    mine, chosen, scores = ("ep.x", "ep.chosen", "ep.scores") if shared else (x, CHOSEN, SCORES)
    lead, pairs = (_PART if shared else "b s"), (f"{_PART} e" if shared else PAIRS)
    yield local_parameters(name)
    if shared:
        yield ops.copy(f"{name}.slice", x, mine, f"{lead} {width}", "new")._replace(source=_SOURCE)
        yield ops.copy(f"{name}.slice_chosen", CHOSEN, chosen, pairs, "none")
        yield ops.copy(f"{name}.slice_scores", SCORES, scores, pairs, "new")
    yield Op(
        f"{name}.argsort",
        (chosen,),
        (Tensor("ep.order", _SENT, "int64"),),
        scratch=(Tensor("sorted", _SENT, "int64"),),
        gradient="none",
        source=_SOURCE,
    )
    yield Op(f"{name}.sent_token", ("ep.order",), (Tensor("ep.token", _SENT, "int64"),), gradient="none")
    yield ops.index(f"{name}.send_rows", mine, "ep.token", "ep.sent", f"{_SENT} {width}")
    yield ops.release_names("ep.token")
    counts = (Tensor("ep.send_counts", "E", "int64"), Tensor("ep.receive_counts", "E", "int64"))
    ones = (Tensor("ones to count with", _SENT, "int64"),)
    yield Op(f"{name}.send_counts", (chosen,), counts, scratch=ones, gradient="none", source=_SOURCE)
    yield Op(f"{name}.all_to_all", ("ep.sent",), (Tensor("ep.received", f"{_RECEIVED} {width}"),), source=_SOURCE)
    ids = Tensor("ep.ids", _RECEIVED, "int64")
    yield Op(
        f"{name}.local_ids",
        ("ep.receive_counts",),
        (ids,),
        scratch=(Tensor("places", _RECEIVED, "int64"),),
        gradient="none",
        source=_SOURCE,
    )
    yield Op(f"{name}.ones", ("ep.ids",), (Tensor("ep.ones", _RECEIVED, "=ep.received"),), gradient="none")
    yield ops.release_names("ep.sent", "ep.send_counts", "ep.receive_counts", mine, chosen)
    yield from _computed(section, name, degrees, {x: "ep.received", SCORES: "ep.ones", CHOSEN: "ep.ids", y: "ep.made"})
    yield Op(f"{name}.all_to_all_back", ("ep.made",), (Tensor("ep.returned", f"{_SENT} {width}"),), source=_SOURCE)
    yield Op(
        f"{name}.put_back",
        ("ep.returned", "ep.order"),
        (Tensor("ep.rows", f"{_SENT} {width}", "=ep.returned"),),
        (),
        (Keep("ep.order", "ep.returned"),),
        source=f"{ops.DERIVATIVES}: index_put_",
    )
    rows_shape = f"{_SENT} {width}"
    yield Op(  # the gradient of a sum is a view
        f"{name}.weigh_rows",
        ("ep.rows", scores),
        (Tensor("ep.summed", f"{lead} {width}"),),
        (),
        (Keep(scores, "ep.rows"), Keep("ep.rows", scores)),
        scratch=(Tensor("weighted rows", rows_shape),),
        scratch_back=(Scratch(Tensor("product", rows_shape, "=ep.summed"), scores, summed=True),),
        autocast="wide",
        source=f"{ops.DERIVATIVES}: mul.Tensor, sum.dim_IntList",
    )
    yield ops.release_names("ep.returned", "ep.rows")
    last = "ep.summed"
    if shared:
        last = "ep.gathered"
        yield Op(f"{name}.all_gather", ("ep.summed",), (Tensor(last, f"b s {width}"),), source=_SOURCE)
        yield ops.release_names("ep.summed")
    yield ops.release_names("ep.received", "ep.ids", "ep.ones", "ep.made", "ep.order", scores)
    yield ops.cast(f"{name}.lower", last, y, f"b s {width}", f"={x}")
    yield ops.release_names(last)._replace(name=f"{name}.returned", returns=name)


def local_parameters(name: str) -> Op:
    """An operation that hands the local shards of a module's DTensor parameters to the operations after it.

    Source: transformers 5.24 distributed/parallel_utils.py _use_local_dtensor_params.
    """
    return Op(f"{name}.local", lends=name, gradient="none", source=_SOURCE)


def _computed(section: list[Op], name: str, degrees: Degrees, names: dict[str, str]) -> Iterator[Op]:
    """The experts' operations on received rows, each for one expert. Rows for none of the rank's experts are masked.

    Source: transformers 5.24 integrations/moe.py grouped_mm_experts_forward.
    """
    names, pending = dict(names), list[Op]()
    for op in section:
        if op.name != ops.release_names().name:  # a product's input is freed before its output is masked
            yield from pending
            pending = []
        yield _on_received_rows(op, names, degrees.ep)
        (y, *_) = (t.name for t in op.writes) if op.writes else ("",)
        if op.name == f"{name}.sort":
            mask = Tensor("ep.mask", _RECEIVED, "bool")
            yield Op(f"{name}.mask", ("experts.ids",), (mask,), gradient="none", source=_SOURCE)
        elif op.name == f"{name}.gather":
            shape = op.writes[0].shape.replace(PAIRS, _RECEIVED)
            new = f"{y}.masked"
            yield ops.masked_fill(f"{name}.mask_rows", y, "ep.mask", new, shape)._replace(view=True)
            names[y] = new
        elif y in ("experts.gate_up", "experts.down"):
            new = f"{y}.masked"
            pending = [
                ops.masked_fill(f"{op.name}.mask", y, "ep.mask", new, op.writes[0].shape.replace(PAIRS, _RECEIVED))
            ]
            names[y] = new
    yield ops.release_names("ep.mask")


def _on_received_rows(op: Op, names: dict[str, str], ep: int) -> Op:
    """The operation on the received rows and the rank's experts."""

    def name(old: str) -> str:
        return names.get(old, old)

    def shape(old: str) -> str:
        rows = old.replace(PAIRS, _RECEIVED)
        return " ".join(f"E/{ep}" if axis == "E" else axis for axis in rows.replace("b s", _RECEIVED).split())

    weights = tuple(w._replace(shape=shape(w.shape)) for w in op.weights)
    return ops.with_shapes(ops.renamed(op, name), shape)._replace(weights=weights)
