"""Experts as tokens are decoded: the matrices that each token chose, copied side by side for one batched product.

`generate` of transformers 5 takes them so for every pass after the first one on a GPU (`batched_mm` in place of
`grouped_mm`): no token is sorted, but there is a copy of a matrix for every token and expert it chooses, of the first
product's until those of the second are there.

Source: transformers 5.24 integrations/moe.py batched_mm_experts_forward, and generation/utils.py
_optimize_model_for_decode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memplan.catalogue.experts.routers import CHOSEN, PAIRS, SCORES
from memplan.catalogue.kernels import ops
from memplan.core.ir import Op, Tensor

_SOURCE = "transformers 5.24 integrations/moe.py batched_mm_experts_forward"
# What `memplan.catalogue.experts.experts` makes to sort tokens by expert, and is not made here.
_SORTED = frozenset(f"experts.{name}" for name in ("order", "token", "counted", "counts", "offsets", "places"))
_VIEWS = {"experts.ids": CHOSEN, "experts.scores": SCORES, "experts.ordered": "experts.weighted"}


def batched(some: Sequence[Op]) -> Iterator[Op]:
    """A block's operations with the grouped products of its experts as batched ones; those that are stored in another
    format have kernels of their own."""
    if any(op.product == "grouped" and op.weights and op.weights[0].stored for op in some):
        yield from some
        return
    selected = ""
    biases: list[Op] = []  # selected after the matrices
    folded: dict[str, Tensor] = {}  # matrices that adapters were added to
    for given in some:
        op = given._replace(reads=tuple(name for name in given.reads if name not in _SORTED), keeps=())
        folded |= {t.name: t for t in op.writes if op.product == "fold"}
        seen = next((t for t in op.writes if t.name in _VIEWS), None)
        if seen is not None:
            yield ops.view(op.name, _VIEWS[seen.name], seen.name, seen.shape)
            continue
        if op.writes and all(t.name in _SORTED for t in op.writes):
            continue
        if op.name.endswith(".bias_of_each") or op.reads == ("experts.up_bias",):
            biases.append(op)
        elif op.product == "grouped":
            before, own = selected, next((folded[name] for name in op.reads if name in folded), None)
            name, shape = (own.name, own.shape) if own else (op.weights[0].name, op.weights[0].shape)
            selected = f"{name} selected"
            copied = Tensor(selected, f"{PAIRS} {' '.join(shape.split()[1:])}", f"={name}")
            reads = (CHOSEN, own.name) if own else (CHOSEN,)
            yield Op(f"{op.name}.select", reads, (copied,), op.weights, source=_SOURCE)
            if before:
                yield ops.leave(before)
            yield from biases
            biases = []
            yield op._replace(reads=(*op.reads, selected), product="matrix", source=_SOURCE)
        elif op.writes or op.reads:
            returns = not op.writes and "experts.rows" in op.reads
            yield op._replace(reads=(*op.reads, selected)) if returns and selected else op
            selected = "" if returns else selected
