"""Packed and padding-free batches, against traced steps of trainers: tests/golden/trace_packing.py."""

from __future__ import annotations

import re
from collections import Counter
from statistics import mean
from typing import Any

import pytest

from benchmarks.accuracy import compared_with_trace, rows, trace_figures
from memplan import RunSpec, estimate
from memplan.core.errors import SpecError
from memplan.planning.step_time import work
from tests.cases import in_groups
from tests.sampling import sampled

ROWS: list[dict[str, Any]] = rows("traced_packing.jsonl")


@in_groups(sampled(ROWS), lambda row: row["name"])
def test_a_packed_step_is_near_its_trace(row: dict[str, Any]) -> None:
    compared = compared_with_trace(row)
    assert compared.peak < 0.02, compared
    assert compared.same
    counted = trace_figures(row["run"]).parameters
    assert (counted.total, counted.trainable) == (row["parameters"], row["trainable"])


def test_packing_is_held_to_sixty_traces() -> None:
    runs = [RunSpec(**row["run"]) for row in ROWS]
    kinds = Counter((run.batch.packing, run.kernels.attention) for run in runs)
    assert sum(kinds.values()) >= 60
    assert len(kinds) >= 10
    assert mean(compared_with_trace(row).peak for row in ROWS) < 0.005


def packed(packing: str | None, **parts: Any) -> RunSpec:
    """Return a LoRA run of 4 sequences of 2,048 tokens, in TRL unless `parts` say otherwise."""
    batch = {"micro": 4, "sequence": 2048, "packing": packing, **parts.pop("batch", {})}
    fixed = {"model": "qwen2-1.5b", "method": "lora", "profile": "trl", "kernels": {"attention": "flash_attention_2"}}
    return RunSpec(**{**fixed, **parts, "batch": batch})


def test_a_packed_row_takes_what_its_tokens_take() -> None:
    """As one long sequence, but for 128 rows of backward's scratch for each sequence; and attention stays in each."""
    joined = estimate(packed("padding_free"))
    one = estimate(packed(None, batch={"micro": 1, "sequence": 4 * 2048}))
    heads, width = 12, 128
    assert 0 <= joined.bytes.allocated - one.bytes.allocated <= 4 * 128 * heads * (width + 1) * 4
    assert work(packed("padding_free")).tokens == work(packed(None)).tokens == 4 * 2048
    assert work(packed("padding_free")).operations == pytest.approx(work(packed(None)).operations, rel=1e-3)
    assert work(packed("bfd")).operations < work(packed("padding_free")).operations


def test_a_mask_of_pairs_is_as_large_as_the_row_squared() -> None:
    """sdpa gets a boolean mask of all pairs of a row's tokens, which each layer converts to bf16."""
    tokens, sdpa = 8 * 4096, {"attention": "sdpa"}
    masked = estimate(packed("bfd", kernels=sdpa, batch={"micro": 8, "sequence": 4096}))
    lines = {line.what: line.bytes for line in masked.ledger if line.what in ("mask", "o.bias")}
    assert lines == {"mask": tokens**2, "o.bias": 2 * tokens**2}
    plain = estimate(packed("wrapped", kernels=sdpa, batch={"micro": 8, "sequence": 4096}))
    assert masked.bytes.allocated - plain.bytes.allocated >= 3 * tokens**2


AXOLOTL = {"profile": "axolotl", "kernels": {"attention": "sdpa"}}
REFUSED = {
    "TRL 1.15 and 1.16 does not have neat_packing; it has bfd, bfd_split, wrapped, pad": packed("neat_packing"),
    "Axolotl 0.21 needs flash attention for padding_free; use flash_": packed("padding_free", **AXOLOTL),
    "with flash attention LLaMA-Factory 0.9.5 accepts only 1 for neat": packed("neat_packing", profile="llamafactory"),
    "dpo of TRL 1.15 and 1.16 ignores padding_free and pads its bat": packed("padding_free", trainer="dpo"),
    "kto of TRL 1.15 and 1.16 pads its batches; leave it out": packed("bfd", trainer="kto"),
    "dpo of TRL 0.24 pads its batches; leave it out": packed("bfd", trainer="dpo", profile="trl-0.24"),
    "packed rows are full; leave it out, or batch.packing": packed("bfd", loop={"padded": True}),
    "batch.packing: only applies to training": packed("bfd", task="generate"),
    "not supported yet with sdpa_cudnn and batch.packing": packed("bfd", kernels={"attention": "sdpa_cudnn"}),
    "parallelism.cp: is not supported yet": packed(
        "bfd", parallelism={"world": 2, "dp": 1, "cp": 2, "strategy": "fsdp2"}
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_packing_that_cannot_be_is_refused(message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        estimate(REFUSED[message])


def test_a_family_that_was_not_read_is_noted() -> None:
    notes = estimate(packed("padding_free", model="qwen3-next-80b-a3b")).notes
    assert "packing: what separates the sequences of a row in qwen3_next is not counted yet" in notes
