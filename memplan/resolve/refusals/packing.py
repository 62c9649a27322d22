"""Packing that a profile does not have, and what is not supported yet with packed batches."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.profiles.profiles import PROFILES, find_profile, library_behaviour
from memplan.core.errors import SpecError, refused
from memplan.resolve.kernels import FLASH_PACKAGES
from memplan.resolve.open_run import OpenRun
from memplan.resolve.refusals.refuse import not_yet_with

_FIELD = "batch.packing"


def packed_batch(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for a packing that the profile does not have, or not with the run's attention, batch or parts."""
    name, facts, attention = r.batch_facts.packing, r.batch_facts, r.library.attention
    is_flash, title = r.kernels.attention in FLASH_PACKAGES, find_profile(r.profile).title
    if name not in attention.packing:
        having = [p.name for p in PROFILES if name in library_behaviour(p.name, "", False).attention.packing]
        own = f"it has {', '.join(attention.packing)}" if attention.packing else f"use {' or '.join(having[:3])}"
        yield refused(_FIELD, f"{title} does not have {name}; {own}")
    if r.trainer != "sft" and (r.trainer, r.library.trainer.log_probs) != ("gkd", "rolled"):
        yield from _of_trainer(r, title)
    if not is_flash and name not in attention.packs_without_flash:
        yield refused("kernels.attention", f"{title} needs flash attention for {name}; use flash_attention_2")
    if name == "neat_packing" and is_flash and not facts.is_single_sequence:
        yield refused("batch.micro", f"with flash attention {title} accepts only 1 for neat_packing")
    if r.loop.padded:
        yield refused("loop.padded", "packed rows are full; leave it out, or batch.packing")
    if r.kernels.attention == "sdpa_cudnn":
        yield not_yet_with("kernels.attention", f"sdpa_cudnn and {_FIELD}", "sdpa, sdpa_efficient, flash_attention_2")
    if facts.media:
        yield refused("batch.images", f"{title} does not pack batches with images; use 0, or leave {_FIELD} out")
    if r.method.virtual_tokens:
        yield not_yet_with("method.kind", _FIELD, "methods without virtual tokens")
    for degree in ("pp", "cp"):
        if getattr(r.parallelism, degree) > 1:
            yield not_yet_with(f"parallelism.{degree}", _FIELD, "1")


def _of_trainer(r: OpenRun, title: str) -> Iterator[SpecError]:
    joins = r.trainer == "dpo" and r.library.trainer.log_probs == "joined"
    if joins and r.batch_facts.packing == "padding_free" and r.kernels.loss != "fused":
        return  # trl 0.24.0 trainer/dpo_trainer.py concatenated_forward
    ignored = "ignores padding_free and pads" if r.trainer == "dpo" and not joins else "pads"
    yield refused(_FIELD, f"{r.trainer} of {title} {ignored} its batches; leave it out")
