"""Searches the catalogues of models, GPUs and profiles: the output of `memplan models`, `gpus` and `profiles`."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from math import inf
from typing import Any, TypeVar

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import all_gpus, find_gpu, mig_instances
from memplan.catalogue.profiles.behaviour import PRINTED
from memplan.catalogue.profiles.engines import ENGINES
from memplan.catalogue.profiles.profile_table import Profile, ServingEngine
from memplan.catalogue.profiles.profiles import PROFILES
from memplan.core.errors import MemplanError, UnknownNameError
from memplan.core.records import NamedTuple
from memplan.core.units import GIB
from memplan.models.cards import card_names, load_card
from memplan.models.model import ModelSpec
from memplan.program.stored.quantization_config import FIELD, scheme_of
from memplan.report.blocks import Column, Table
from memplan.report.display import display
from memplan.report.text import Screen, screen

T = TypeVar("T")


class Wanted(NamedTuple):
    """Which rows to list: least and most parameters or bytes as sold, and what to sort by, the best first."""

    least: int | None = None
    most: int | None = None
    sort: str = ""

    def of(self, rows: Iterable[T], size: Callable[[T], int], keys: Mapping[str, Callable[[T], Any]]) -> list[T]:
        found = [
            row for row in rows if (self.least or 0) <= size(row) and (self.most is None or size(row) <= self.most)
        ]
        return sorted(found, key=keys[self.sort]) if self.sort else found


ANY = Wanted()


def models(text: str, as_json: bool, wanted: Wanted = ANY) -> str:
    """Return the bundled models with `text` in their name, id, alias, type or licence."""
    keys: dict[str, Callable[[ModelSpec], Any]] = {
        "name": lambda model: model.name,
        "parameters": lambda model: -model.card["parameters"],
        "layers": lambda model: -model.num_hidden_layers,
        "positions": lambda model: -(model.max_position_embeddings or 0),
    }
    found = _search("model", text, map(load_card, card_names()), _model_words)
    matches = wanted.of(found, lambda model: int(model.card["parameters"]), keys)
    if as_json:
        return _json([_model_facts(model) for model in matches])
    columns: list[Column[ModelSpec]] = [
        Column("model", lambda model: model.name),
        Column("parameters", lambda model: short_count(model.card["parameters"]), right=True),
        Column("layers", lambda model: str(model.num_hidden_layers), right=True),
        Column("positions", _positions, right=True, optional=True),
        Column("licence", lambda model: str(model.card.get("licence", "")), optional=True),
        Column("Hugging Face id", lambda model: str(model.card["hf_id"]), optional=True),
    ]
    return display([Table(columns, matches)], wide_screen())


def wide_screen() -> Screen:
    """Return the terminal, or, for a pipe, whose output is probably searched, a screen with room for every column."""
    piped = sys.stdout is None or not sys.stdout.isatty()  # pyright: ignore[reportUnnecessaryComparison] (where closed)
    return Screen(sys.maxsize) if piped and "COLUMNS" not in os.environ else screen()


def _model_words(model: ModelSpec) -> Iterable[str]:
    card = model.card
    return (model.name, model.model_type, str(card["hf_id"]), str(card.get("licence", "")), *card.get("aliases", ()))


def _model_facts(model: ModelSpec) -> dict[str, Any]:
    facts = {key: str(value) if key == "checked" else value for key, value in model.card.items()}
    config = model.config.get(FIELD)
    if config:
        facts["stored"] = scheme_of(config, "bf16", str(model.config.get("expert_dtype", ""))).words
    return {
        "name": model.name,
        "model_type": model.model_type,
        "layers": model.num_hidden_layers,
        "positions": model.max_position_embeddings,
        **facts,
    }


def _positions(model: ModelSpec) -> str:
    return f"{model.max_position_embeddings:,}" if model.max_position_embeddings else ""


def short_count(n: int) -> str:
    """Return a number of parameters as names of models have it.

    >>> short_count(7_615_616_512), short_count(596_049_920)
    ('7.6B', '596M')
    """
    if n >= _BILLION:
        return f"{n / _BILLION:,.1f}B"
    return f"{n / 10**6:,.0f}M"


_BILLION = 10**9


def cards(text: str, as_json: bool, wanted: Wanted = ANY) -> str:
    """Return the GPUs with `text` in their name, title, alias, vendor, architecture or market, or that it names."""
    try:
        named = find_gpu(text).name if text else ""
    except MemplanError:
        named = ""
    known = all_gpus()
    if ":" in text or "mig" in text.lower():
        known = (*known, *(instance for gpu in known for instance in mig_instances(gpu)))
    keys: dict[str, Callable[[GPU], Any]] = {
        "name": lambda gpu: gpu.name,
        "memory": lambda gpu: -gpu.usable,
        "bandwidth": lambda gpu: -(gpu.bandwidth_gbps or 0),
        "price": lambda gpu: gpu.launch_usd or inf,
        "rent": lambda gpu: min((price.usd_per_hour for price in gpu.prices if price.date), default=inf),
    }
    size = re.fullmatch(r"(\d+) ?g(i?b)?", text.lower())
    if size is not None:
        found: Sequence[GPU] = [gpu for gpu in all_gpus() if int(size[1]) in (gpu.memory_gb, *gpu.memory_options_gb)]
    else:
        found = _search("gpu", text, known, lambda gpu: (*_gpu_words(gpu), *([text] if gpu.name == named else [])))
    matches = wanted.of(found, lambda gpu: int(gpu.memory_gb * GIB), keys)
    if as_json:
        return _json([_gpu_facts(gpu) for gpu in matches])
    columns: list[Column[GPU]] = [
        Column("GPU", lambda gpu: gpu.name),
        Column("usable GiB", _usable, right=True),
        Column("capability", _capability, right=True, optional=True),
        Column("bf16", lambda gpu: "yes" if "bf16" in gpu.native_dtypes else "no", optional=True),
        Column("GB/s", lambda gpu: f"{gpu.bandwidth_gbps:g}" if gpu.bandwidth_gbps else "", right=True, optional=True),
        Column("list price", _list_price, right=True, optional=True),
        Column("USD an hour", _price, optional=True),
    ]
    return display([Table(columns, matches)], wide_screen())


def _usable(gpu: GPU) -> str:
    return f"{gpu.usable / GIB:.2f}" + (f" × {gpu.devices}" if gpu.devices > 1 else "")


def _capability(gpu: GPU) -> str:
    return "{}.{}".format(*gpu.compute_capability) if gpu.compute_capability else ""


def _gpu_words(gpu: GPU) -> tuple[str, ...]:
    return (gpu.name, gpu.title, gpu.vendor, gpu.architecture, gpu.market, *gpu.aliases)


def _gpu_facts(gpu: GPU) -> dict[str, Any]:
    nested = {"sources": [s._asdict() for s in gpu.sources], "prices": [p._asdict() for p in gpu.prices]}
    facts = {**gpu._asdict(), "usable": gpu.usable, **nested}
    return facts if gpu.mig else {name: value for name, value in facts.items() if name != "mig"}


def _list_price(gpu: GPU) -> str:
    return f"{gpu.launch_usd:,.0f} ({(gpu.launch_date or '')[:4]})" if gpu.launch_usd is not None else ""


def _price(gpu: GPU) -> str:
    """Return the range of prices and the date of the latest one."""
    dated = [price for price in gpu.prices if price.date]
    if not dated:
        return ""
    low, high = min(p.usd_per_hour for p in dated), max(p.usd_per_hour for p in dated)
    return (f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}") + f" ({max(p.date for p in dated)})"


def profiles(text: str, as_json: bool, every_row: bool = False) -> str:
    """Return the profiles with `text` in their name or title: a line each, or what up to three of them set."""
    matches = _search("profile", text, (*PROFILES, *ENGINES), lambda profile: (profile.name, profile.title))
    if as_json:
        return _json([_profile_facts(profile) for profile in matches])
    from memplan.report.profiles import profile_list, settings

    return settings(matches, every_row) if every_row or (text and len(matches) <= 3) else profile_list(matches)


def _profile_facts(profile: Profile | ServingEngine) -> dict[str, Any]:
    return {
        **profile._asdict(),
        "rows": [{**row._asdict(), "field": PRINTED.get(row.field, row.field)} for row in profile.rows],
    }


def _search(field: str, text: str, rows: Iterable[Any], words: Callable[[Any], Iterable[str]]) -> Sequence[Any]:
    """Return the rows that have `text` in one of their words, or else every part of it in some word."""
    rows = list(rows)
    parts = text.lower().split()
    by_name = {row.name: [word.lower() for word in words(row)] for row in rows}

    def has(row: Any, part: str) -> bool:
        """Whether a word has the part; a number in it is a whole one, so that 7b is not 27b."""
        pattern = (r"(?<![\d.])" if part[:1].isdigit() else "") + re.escape(part)
        return any(re.search(pattern, word) for word in by_name[row.name])

    matches = [row for row in rows if has(row, text.lower())]
    matches = matches or [row for row in rows if all(has(row, part) for part in parts)]
    if not matches:
        names = [row.name for row in rows]
        near = get_close_matches(text.lower(), names, n=3, cutoff=0.4) or names
        raise UnknownNameError(field, text, near)
    return matches


def _json(facts: list[dict[str, Any]]) -> str:
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
