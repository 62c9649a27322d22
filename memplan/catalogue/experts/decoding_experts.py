"""Experts in decoding: every token's chosen matrices are copied next to each other for one batched product.

On a GPU, `generate` of transformers 5 does this in every pass after the first (`batched_mm` instead of `grouped_mm`).
Tokens are not sorted, but a matrix is copied for each pair of token and chosen expert. The first product's copies live
until the second's have been made.

Source: transformers 5.24 integrations/moe.py batched_mm_experts_forward, and generation/utils.py
_optimize_model_for_decode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memplan.catalogue.experts.routers import CHOSEN, PAIRS, SCORES
from memplan.catalogue.kernels import ops
from memplan.core.ir import Op, Tensor

_SOURCE = "transformers 5.24 integrations/moe.py batched_mm_experts_forward"
# Tensors by which `memplan.catalogue.experts.experts` sorts tokens, which decoding does not need.
_SORTED = frozenset(f"experts.{name}" for name in ("order", "token", "counted", "counts", "offsets", "places"))
_VIEWS = {"experts.ids": CHOSEN, "experts.scores": SCORES, "experts.ordered": "experts.weighted"}


def batched(operations: Sequence[Op]) -> Iterator[Op]:
    """Yield a block's operations with its experts' grouped products as batched ones.

    Matrices stored in another format have kernels of their own, or are dequantised before, and are left as they are.
    """
    folds = {t.name for op in operations if op.product == "fold" for t in op.writes}
    grouped = [op for op in operations if op.product == "grouped"]
    if any(op.weights[0].stored if op.weights else folds.isdisjoint(op.reads) for op in grouped):
        yield from operations
        return
    selected = ""
    biases: list[Op] = []  # read after the matrices
    folded: dict[str, Tensor] = {}  # matrices merged with their adapters
    for source_op in operations:
        op = source_op._replace(reads=tuple(name for name in source_op.reads if name not in _SORTED), keeps=())
        folded |= {t.name: t for t in op.writes if op.product == "fold"}
        output = next((t for t in op.writes if t.name in _VIEWS), None)
        if output is not None:
            yield ops.view(op.name, _VIEWS[output.name], output.name, output.shape)
            continue
        if op.writes and all(t.name in _SORTED for t in op.writes):
            continue
        if op.name.endswith(".bias_of_each") or op.reads == ("experts.up_bias",):
            biases.append(op)
        elif op.product == "grouped":
            previous, matrix = selected, next((folded[name] for name in op.reads if name in folded), None)
            name, shape = (matrix.name, matrix.shape) if matrix else (op.weights[0].name, op.weights[0].shape)
            selected = f"{name} selected"
            selection = Tensor(selected, f"{PAIRS} {' '.join(shape.split()[1:])}", f"={name}")
            reads = (CHOSEN, matrix.name) if matrix else (CHOSEN,)
            yield Op(f"{op.name}.select", reads, (selection,), op.weights, source=_SOURCE)
            if previous:
                yield ops.release_names(previous)
            yield from biases
            biases = []
            yield op._replace(reads=(*op.reads, selected), product="matrix", source=_SOURCE)
        elif op.writes or op.reads or op.weights:
            returns = not op.writes and "experts.rows" in op.reads
            yield op._replace(reads=(*op.reads, selected)) if returns and selected else op
            selected = "" if returns else selected
