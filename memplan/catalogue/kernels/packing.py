"""Sequence packing: which sequences of a batch are one row, and what keeps the sequences of a row apart.

A strategy is named as its framework names it: TRL's bfd, bfd_split, wrapped and padding_free, Axolotl's sample_packing,
LLaMA-Factory's neat_packing and (for `packing`) knapsack, ms-swift's (for `packing`) binpack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from memplan.core.records import NamedTuple

SAMPLE_TOKENS = 512  # assumed: mean length of the samples that are packed, on which only a kernel's scratch depends


class PackingStrategy(NamedTuple):
    """A strategy of one or several frameworks.

    joins     when the rows of a micro-batch are one row: `always`, with `flash` attention, or never
    marks     what marks the ends of sequences: `positions` that restart; a `mask` of all pairs of tokens; with a mask
              of ones, `kernel` positions, which only flash attention reads; or nothing
    repacks   a row holds as many samples as fit; else those of the micro-batch
    """

    joins: Literal["always", "flash", "never"]
    marks: Literal["positions", "mask", "kernel", ""]
    repacks: bool = True


STRATEGIES = {
    # trl 1.16.0 and 0.24.0 data_utils.py pack_dataset, trainer/sft_trainer.py DataCollatorForLanguageModeling
    **dict.fromkeys(("bfd", "bfd_split"), PackingStrategy("always", "positions")),
    "wrapped": PackingStrategy("never", ""),
    "padding_free": PackingStrategy("always", "positions", repacks=False),
    # axolotl 0.21.0 core/builders/causal.py multipack_real_batches, core/trainers/base.py _create_multipack_sampler
    "sample_packing": PackingStrategy("flash", "positions"),
    # llamafactory 0.9.5 data/processor/supervised.py PackedSupervisedDatasetProcessor, data/collator.py
    "neat_packing": PackingStrategy("never", "mask"),
    "knapsack": PackingStrategy("never", "kernel"),
    # ms-swift 4.6.0 template/base.py packing_row
    "binpack": PackingStrategy("always", "positions"),
}


class PackedRows(NamedTuple):
    """The rows of a packed batch, which comes with its positions.

    mask        the mask that keeps sequences apart: one that the model `made` from positions, one that is `given`, or
                none
    is_varlen   the kernel is told where sequences begin, and needs no mask
    is_one_row  the micro-batch is one row
    repacks     a row holds as many samples as fit; else those of the micro-batch
    repeats     k and v are repeated for every query head before the varlen kernel
    flattens    q, k and v are copied before it unless they are contiguous
    """

    mask: Literal["made", "given", ""]
    is_varlen: bool
    is_one_row: bool
    repacks: bool
    repeats: bool = False
    flattens: bool = False

    def sequences(self, joined: Any, tokens: Any, most: Callable[[Any, Any], Any] = max) -> Any:
        """Return the number of sequences in a row of `tokens`, for which `joined` of the micro-batch have room."""
        return most(joined, -(-tokens // SAMPLE_TOKENS)) if self.repacks else joined


def packed_rows(name: str, is_flash: bool, is_single: bool) -> PackedRows | None:
    """Return the rows that a strategy makes; None if nothing marks the sequences of a row, which is then as any other.

    is_flash   attention is flash-attn's
    is_single  the micro-batch is one row already
    """
    strategy = STRATEGIES[name]
    if not strategy.marks:
        return None
    is_one_row = is_single or strategy.joins == "always" or (strategy.joins == "flash" and is_flash)
    is_varlen = is_flash and is_one_row
    mask = "" if is_varlen else {"positions": "made", "mask": "given"}.get(strategy.marks, "")
    return PackedRows(mask, is_varlen, is_one_row, strategy.repacks)  # pyright: ignore[reportArgumentType]
