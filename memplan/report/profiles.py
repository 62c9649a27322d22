"""The output of `memplan profiles`: a line for each profile, or what some of them set and what that changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from memplan.catalogue.profiles.engines import EngineDefaults
from memplan.catalogue.profiles.profile_table import WHEN, EngineSetting, Profile, ServingEngine, Setting
from memplan.catalogue.profiles.profiles import holds, without
from memplan.core.errors import MemplanError
from memplan.core.records import NamedTuple
from memplan.core.units import GIB
from memplan.estimate.estimate import estimate
from memplan.models.cards import load_card
from memplan.report.blocks import Block, Column, Notes, Table, Text
from memplan.report.display import display
from memplan.report.text import Screen, screen
from memplan.spec.run import RunSpec

# The settings that matter most, in a practitioner's words. Others are shown only with --all.
MAIN = {
    "optimizer.name": "optimizer",
    "kernels.checkpointing": "activation checkpointing",
    "kernels.reentrant": "reentrant checkpointing",
    "kernels.loss": "loss",
    "kernels.fused": "fused kernels",
    "logits": "how the loss reads logits",
    "method.adapter_dtype": "dtype of adapters",
    "method.quantization.kbit_preparation": "fp32 casts before QLoRA",
    "fp32_ends": "norms, embeddings, head in fp32",
    "experts": "how experts are written",
    "sdpa_copies": "copies before attention",
    "masks_padding": "masks of padded batches",
    "memory_utilization": "share of the GPU's memory",
    "block_size": "tokens of a cache block",
    "cache_dtype": "dtype of the cache",
    "cuda_graphs": "CUDA graphs",
    "prefix_caching": "prefix caching",
    "max_num_batched_tokens": "tokens of a step",
    "max_num_seqs": "requests at once",
}
_MODEL = "llama-3.1-8b"
EXAMPLE = {
    "model": _MODEL,
    "method": "qlora",
    "precision": {"weights": "bf16", "compute": "bf16", "autocast": True},
    "batch": {"micro": 4, "sequence": 2048},
}
_SHOWN = f"QLoRA of {_MODEL}, 4 x 2,048 tokens, bf16 autocast"
_WIDEST = 100


class SettingLine(NamedTuple):
    """A line of a profile's settings; `change` is in GiB, and empty if it cannot be said."""

    name: str
    value: str
    change: str
    source: str


def profile_list(profiles: Sequence[Profile | ServingEngine]) -> str:
    """Return a line for each profile, with what the example takes."""
    columns: list[Column[Profile | ServingEngine]] = [
        Column("profile", lambda profile: profile.name),
        Column("framework", lambda profile: profile.title),
        Column("GiB", _example, right=True),
    ]
    about = f"GiB: {_SHOWN}. memplan profiles NAME shows what a profile sets, --all every row with its source."
    return display([Table(columns, profiles), Text(about)], _screen())


def settings(profiles: Sequence[Profile | ServingEngine], every_row: bool) -> str:
    """Return what each profile sets and, in GiB, what the example would lose with its base profile's value instead."""
    blocks: list[Block] = []
    for profile in profiles:
        like = f" Like {profile.like}, except:" if profile.like else ""
        lines = list(_lines(profile, every_row))
        columns: list[Column[SettingLine]] = [
            Column("setting", lambda line: line.name, wraps=True),
            Column("value", lambda line: line.value, wraps=True),
        ]
        if any(line.change for line in lines):
            columns.append(Column("GiB", lambda line: line.change, right=True))
        if every_row:
            columns.append(Column("source", lambda line: line.source, wraps=True))
        blocks.append(Text(f"{profile.name}: {profile.title}, as read in {profile.read}.{like}"))
        if lines:
            blocks.append(Table(columns, lines))
        hidden = len({row.field for row in profile.rows} - MAIN.keys())
        if hidden and not every_row:
            blocks.append(Text(f"{hidden} more setting{'s' * (hidden > 1)}: memplan profiles {profile.name} --all"))
        if profile.waits:
            blocks.append(Notes(profile.waits, "Not counted yet"))
    if any(isinstance(profile, Profile) and profile.like for profile in profiles):
        blocks.append(Text(f"GiB: what it changes for {_SHOWN}."))
    return display(blocks, _screen())


def _screen() -> Screen:
    shown = screen()
    return shown._replace(width=min(shown.width, _WIDEST))


def _lines(profile: Profile | ServingEngine, every_row: bool) -> Iterator[SettingLine]:
    family = load_card(_MODEL).model_type
    counts = {row.field: row for row in profile.rows if not isinstance(row, Setting) or holds(row, family, True)}
    for row in profile.rows:
        if every_row or row.field in MAIN:
            change = _change(profile, row.field) if counts.get(row.field) is row else ""
            yield SettingLine(_named(row), _format(row.value), change, row.source)


def _example(profile: Profile | ServingEngine) -> str:
    return "" if isinstance(profile, ServingEngine) else f"{_bytes(profile.name) / GIB:.2f}"


def _bytes(profile: str) -> int:
    return estimate(RunSpec.model_validate({**EXAMPLE, "profile": profile})).bytes.allocated


def _change(profile: Profile | ServingEngine, field: str) -> str:
    """Return the GiB that the profile's rows for a field add to the example, compared with its base profile's.

    Empty if the profile has no base, or the run would be refused.
    """
    if isinstance(profile, ServingEngine) or not profile.like:
        return ""
    try:
        change = _bytes(profile.name) - _bytes(without(profile, field).name)
    except MemplanError:
        return ""
    return f"{change / GIB:+.2f}" if abs(change) >= GIB / 200 else "0"


def _named(row: Setting | EngineSetting) -> str:
    """Return the name of the field, and which runs it is set for."""
    name = MAIN.get(row.field, row.field.rpartition(".")[2].replace("_", " "))
    if isinstance(row, EngineSetting):
        name = f"{name} (an option)" if row.field in EngineDefaults._fields else name
        return name if row.basis == "derived" else f"{name}, {row.basis}"
    conditions = [WHEN[row.when]] if row.when else []
    if row.model_types:
        shown = ", ".join(row.model_types[:3])
        conditions.append(f"of {shown}{' and alike' if len(row.model_types) > 3 else ''}")
    return f"{name} {' '.join(conditions)}".strip()


def _format(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(str(part) for part in cast(tuple[object, ...], value)) or "none"
    return str(value) or "none"
