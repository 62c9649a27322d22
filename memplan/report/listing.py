"""The catalogue of models, of GPUs and of profiles, searched: what `memplan models`, `gpus` and `profiles` print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any, cast

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import all_gpus, find_gpu
from memplan.catalogue.profiles import engines
from memplan.catalogue.profiles.engines import ENGINES, Engine
from memplan.catalogue.profiles.profiles import PROFILES, WHEN, Profile, Row
from memplan.core.errors import UnknownNameError
from memplan.core.units import GIB
from memplan.models.cards import card_names, load_card
from memplan.models.model import ModelSpec
from memplan.report.text import Column, Screen, screen, table


def models(text: str, as_json: bool) -> str:
    """The bundled models with `text` in their name, id, alias, type or licence."""
    found = _search("model", text, map(load_card, card_names()), _model_words)
    if as_json:
        return _json([_model_facts(model) for model in found])
    columns = (
        Column("model"),
        Column("parameters", right=True),
        Column("layers", right=True),
        Column("positions", right=True, optional=True),
        Column("licence", optional=True),
        Column("Hugging Face id", optional=True),
    )
    rows = [
        (
            model.name,
            f"{model.card['parameters']:,}",
            str(model.num_hidden_layers),
            str(model.max_position_embeddings or ""),
            str(model.card.get("licence", "")),
            str(model.card["hf_id"]),
        )
        for model in found
    ]
    return "\n".join(table(columns, rows, _screen())) + "\n"


def _screen() -> Screen:
    """The terminal; a pipe, where lines are searched for words, gets every column."""
    piped = sys.stdout is None or not sys.stdout.isatty()  # pyright: ignore[reportUnnecessaryComparison] (where closed)
    return Screen(sys.maxsize) if piped and "COLUMNS" not in os.environ else screen()


def _model_words(model: ModelSpec) -> Iterable[str]:
    card = model.card
    return (model.name, model.model_type, str(card["hf_id"]), str(card.get("licence", "")), *card.get("aliases", ()))


def _model_facts(model: ModelSpec) -> dict[str, Any]:
    facts = {key: str(value) if key == "checked" else value for key, value in model.card.items()}
    return {
        "name": model.name,
        "model_type": model.model_type,
        "layers": model.num_hidden_layers,
        "positions": model.max_position_embeddings,
        **facts,
    }


def cards(text: str, as_json: bool) -> str:
    """The GPUs with `text` in their name, title, alias, vendor, architecture or market, or that it names otherwise."""
    try:
        named = find_gpu(text).name if text else ""
    except UnknownNameError:
        named = ""
    found = _search("gpu", text, all_gpus(), lambda gpu: (*_gpu_words(gpu), *([text] if gpu.name == named else [])))
    if as_json:
        return _json([_gpu_facts(gpu) for gpu in found])
    columns = (
        Column("GPU"),
        Column("usable GiB", right=True),
        Column("capability", right=True, optional=True),
        Column("bf16", optional=True),
        Column("GB/s", right=True, optional=True),
        Column("USD an hour", optional=True),
    )
    rows = [
        (
            gpu.name,
            f"{gpu.usable / GIB:.2f}" + (f" × {gpu.devices}" if gpu.devices > 1 else ""),
            "{}.{}".format(*gpu.compute_capability) if gpu.compute_capability else "",
            "yes" if "bf16" in gpu.native_dtypes else "no",
            f"{gpu.bandwidth_gbps:g}" if gpu.bandwidth_gbps else "",
            _price(gpu),
        )
        for gpu in found
    ]
    return "\n".join(table(columns, rows, _screen())) + "\n"


def _gpu_words(gpu: GPU) -> tuple[str, ...]:
    return (gpu.name, gpu.title, gpu.vendor, gpu.architecture, gpu.market, *gpu.aliases)


def _gpu_facts(gpu: GPU) -> dict[str, Any]:
    nested = {"sources": [s._asdict() for s in gpu.sources], "prices": [p._asdict() for p in gpu.prices]}
    return {**gpu._asdict(), "usable": gpu.usable, **nested}


def _price(gpu: GPU) -> str:
    """From the least to the most asked, and when that was last looked up."""
    asked = [price for price in gpu.prices if price.date]
    if not asked:
        return ""
    low, high = min(p.usd_per_hour for p in asked), max(p.usd_per_hour for p in asked)
    return (f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}") + f" ({max(p.date for p in asked)})"


def profiles(text: str, as_json: bool) -> str:
    """The profiles with `text` in their name or title, and what each sets: its own rows, over those it is like."""
    found = _search("profile", text, (*PROFILES, *ENGINES), lambda profile: (profile.name, profile.title))
    if as_json:
        return _json([_profile_facts(profile) for profile in found])
    columns = (Column("profile"), Column("sets"), Column("to"), Column("source", optional=True))
    rows: list[tuple[str, ...]] = []
    for profile in found:
        like = f"all that {profile.like} sets, but:" if profile.like else ""
        rows.append((profile.name, profile.title, like, profile.read))
        rows += [("", _of(row), _shown(row.value), row.source) for row in profile.rows]
        rows += [("", "not counted yet", wait, "") for wait in profile.waits]
    return "\n".join(table(columns, rows, _screen())) + "\n"


def _of(row: Row | engines.Row) -> str:
    """The field, and which runs it is set for."""
    if isinstance(row, engines.Row):
        field = row.field if row.field in engines.WORDS else f"serving.{row.field}"
        return field if row.basis == "derived" else f"{field} ({row.basis})"
    only = [WHEN[row.when]] if row.when else []
    if row.model_types:
        only.append("of " + ", ".join(row.model_types))
    return f"{row.field} {' '.join(only)}".strip()


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(str(part) for part in cast(tuple[object, ...], value)) or "none"
    return str(value) or "nothing"


def _profile_facts(profile: Profile | Engine) -> dict[str, Any]:
    return {**profile._asdict(), "rows": [row._asdict() for row in profile.rows]}


def _search(field: str, text: str, rows: Iterable[Any], words: Callable[[Any], Iterable[str]]) -> Sequence[Any]:
    """The rows that have `text` in one of their words, or else every part of it in some word."""
    rows = list(rows)
    parts = text.lower().split()
    of = {row.name: [word.lower() for word in words(row)] for row in rows}
    found = [row for row in rows if any(text.lower() in word for word in of[row.name])]
    found = found or [row for row in rows if all(any(p in word for word in of[row.name]) for p in parts)]
    if not found:
        names = [row.name for row in rows]
        near = get_close_matches(text.lower(), names, n=3, cutoff=0.4) or names
        raise UnknownNameError(field, text, near)
    return found


def _json(facts: list[dict[str, Any]]) -> str:
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
