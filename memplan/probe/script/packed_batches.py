"""Batches of packed sequences, as collators make them: positions that restart, and maybe a mask of token pairs."""

from __future__ import annotations

from typing import Any

from memplan.catalogue.kernels.packing import PackedRows
from memplan.core.records import NamedTuple
from memplan.resolve.decide import decide
from memplan.spec.run import RunSpec


class PackedBatch(NamedTuple):
    """The shape of a packed batch.

    rows       rows and their tokens
    tokens     tokens of a row
    sequences  sequences of a row
    kind       how the rows are packed
    """

    rows: int
    tokens: int
    sequences: int
    kind: PackedRows


def packed_batch(run: RunSpec) -> PackedBatch | None:
    """Return the shape of the run's batch, if its rows are packed and marked."""
    kind = decide(run).structure.graph.wiring.packed if run.batch.packing else None
    if kind is None:
        return None
    micro, tokens = run.batch.micro, run.batch.sequence
    rows, tokens, joined = (1, micro * tokens, micro) if kind.is_one_row else (micro, tokens, 1)
    return PackedBatch(rows, tokens, kind.sequences(joined, tokens), kind)


def packed_sequences(run: RunSpec) -> int:
    """Return how many sequences each row of the run's batch has by its positions; 0 if it is not packed."""
    packed = packed_batch(run)
    return packed.sequences if packed is not None else 0


def packed_inputs(packed: PackedBatch, device: Any, dtype: Any) -> dict[str, Any]:
    """Return token ids and positions, and a mask in `dtype` if the collator makes one."""
    import torch

    shape = packed.rows, packed.tokens
    inputs = {name: torch.zeros(shape, dtype=torch.int64, device=device) for name in ("input_ids", "position_ids")}
    if packed.kind.mask == "given":
        pairs = packed.rows, 1, packed.tokens, packed.tokens
        inputs["attention_mask"] = torch.zeros(pairs, dtype=dtype, device=device)
    return inputs
