"""The generated pages of docs/reference: options, runs, JSON, profiles and GPUs. `benchmarks.manual` writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import cleandoc
from itertools import groupby
from pathlib import Path
from textwrap import wrap
from typing import Any

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import all_gpus, mig_instances
from memplan.catalogue.profiles.engines import ENGINES
from memplan.catalogue.profiles.profiles import PROFILES
from memplan.core.units import GIB
from memplan.report.schema import answer_schema, comparison_schema, plan_schema, run_schema
from memplan.serve.endpoints import ENDPOINTS, REVIEW
from memplan.serve.openapi import openapi
from memplan.spec.fields import field_of
from memplan.spec.options import OPTIONS, Option, flag

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
_WRITTEN = "Written by `python -m benchmarks.manual`; a test holds it to the program."


def pages() -> Iterator[tuple[Path, str]]:
    """Yield each page and its text."""
    for name, lines in (
        ("options", options()),
        ("run", run()),
        ("json", answers()),
        ("profile-list", profiles()),
        ("gpus", gpus()),
        ("http", http()),
    ):
        yield FOLDER / f"{name}.md", "\n".join(lines) + "\n"


def _prose(text: str) -> Iterator[str]:
    yield from wrap(" ".join(text.split()), 120, break_on_hyphens=False, break_long_words=False)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield "|" + "|".join("---:" if n in right else "---" for n, _ in enumerate(titles)) + "|"
    for row in rows:
        yield f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in row)} |"


# --- options -----------------------------------------------------------------------------------------------


def options() -> Iterator[str]:
    yield from ("# Options of a run", "", _WRITTEN, "")
    yield from _prose(
        """Every command that takes a run takes these. [Command line](cli.md) has the options of each command, and
        [Fields of a run](run.md) the fields that they set. Text in `code` is typed as it stands."""
    )
    for heading, group in OPTIONS.items():
        rows = [_option(name, option) for name, option in group.items() if not option.is_argument]
        if rows:
            yield from ("", f"## {heading}", "")
            yield from _table(("option", "what it does", "default", "sets", "also"), rows)


def _option(name: str, option: Option) -> tuple[str, ...]:
    field = field_of(option.field) if option.field else None
    choices = option.choices or (field.choices if field else ())
    help = option.help.replace("{choices}", ", ".join(f"`{choice}`" for choice in choices))
    text, _, default = help.partition(" Default ")
    default = default.rstrip(".") if default else field.default if field else ""
    also = ", ".join(f"`{flag(alias)}`" for alias in option.aliases)
    return f"`{flag(name)}`", text, default, f"`{option.field}`" if option.field else "", also


# --- schemas -----------------------------------------------------------------------------------------------


def run() -> Iterator[str]:
    yield from ("# Fields of a run", "", _WRITTEN, "")
    yield from _prose(
        """A run as JSON, YAML or `memplan.RunSpec`. Whatever is left out or `null` is filled in by the
        [profile](profiles.md); the answer's `run` has every value. `memplan schema run` prints the JSON Schema. A word
        can stand for a part: `method: qlora`, `precision: amp`, `optimizer: sgd`."""
    )
    schema = run_schema()
    yield from _sections(schema, {"Run": schema})


def answers() -> Iterator[str]:
    yield from ("# Answers as JSON", "", _WRITTEN, "")
    yield from _prose(
        """`--json` prints an answer; several cards give a list of answers. Bytes are integers. `memplan schema answer`,
        `comparison` and `plan` print the JSON Schemas. Fields are added, but none changes its meaning unless
        `schema_version` changes, too."""
    )
    schemas = (answer_schema(), comparison_schema(), plan_schema())
    tops = {str(schema.get("title", "")): schema for schema in schemas}
    definitions = {name: part for schema in schemas for name, part in schema.get("$defs", {}).items()}
    of_run = {*run_schema()["$defs"], "RunSpec"}
    yield from _sections({"$defs": {n: p for n, p in definitions.items() if n not in of_run}}, tops, of_run)


def http() -> Iterator[str]:
    yield from ("# Addresses of the service", "", _WRITTEN, "")
    yield from _prose(
        """The answers of `memplan serve` ([guide](../guides/service.md)). Bodies and answers are JSON; an answer with a
        status from 400 is a [ProblemDetail](#problemdetail), as `application/problem+json`. `GET /v1/openapi.json` is
        this page for programs."""
    )
    schemas: Mapping[str, Any] = openapi()["components"]["schemas"]
    own = (
        "RunBatch",
        "FitsQuestion",
        "PlaceQuestion",
        "Job",
        "NodeShape",
        "PlanQuestion",
        "CheckQuestion",
        "Estimates",
    )
    own += ("Fits", "Fit", "Placement", "PlacedJob", "Seat", "PendingJob", "Check", "CheckedRun", "BudgetProblem")
    tops = {name: schemas[name] for name in (*own, "Deciding", "KeyValue", "ProblemDetail")}
    links = {"RunSpec": "run.md", "Estimate": "json.md#estimate", "Plan": "json.md", "List": "", "Schema": ""}
    links |= {name: f"#{name.lower()}" for name in tops}
    rows = (
        (
            f"`{each.method} {each.path}`",
            each.text + "".join(f" Option `{option.name}`: {option.text}" for option in each.options),
            _link(each.question.__name__ if each.question is not None else "", links),
            _link(each.answer, links),
        )
        for each in (*ENDPOINTS, REVIEW)
    )
    yield ""
    yield from _table(("address", "what it answers", "body", "answer"), rows)
    yield from _sections({}, tops, ("RunSpec", "FieldOrigin", "Estimate"))


def _link(name: str, links: Mapping[str, str]) -> str:
    return f"[{name}]({links[name]})" if links.get(name) else name.lower()


def _sections(schema: Mapping[str, Any], tops: Mapping[str, Any], elsewhere: Iterable[str] = ()) -> Iterator[str]:
    """Yield a section for each object: first those at the top, then their parts."""
    parts: dict[str, Any] = {**tops, **{n: p for n, p in schema.get("$defs", {}).items() if "properties" in p}}
    known = {name: f"#{name.lower()}" for name in parts} | {name: f"run.md#{name.lower()}" for name in elsewhere}
    known["RunSpec"] = "run.md"
    for name, part in parts.items():
        if "properties" not in part:  # one of several objects
            yield from ("", f"## {name}", "", f"{_type(part, known)}.".capitalize())
            continue
        text, meanings = _described(part.get("description", ""))
        yield from ("", f"## {name}", "")
        yield from (text, "") if text else ()
        fields: Mapping[str, Mapping[str, Any]] = part["properties"]
        told = {key: meanings.get(key) or of.get("description") or _sentence(of, parts) for key, of in fields.items()}
        columns = {
            "field": [f"`{key}`" for key in fields],
            "type": [_type(of, known) for of in fields.values()],
            "default": [_default(of) for of in fields.values()],
            "meaning": [*told.values()],
        }
        columns = {title: cells for title, cells in columns.items() if any(cells)}
        yield from _table([*columns], zip(*columns.values(), strict=True))


def _sentence(of: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    """Return the first sentence about the object that a field holds, or a list of which it holds."""
    choices = [of, of.get("items", {}), *of.get("anyOf", ())]
    names = [choice["$ref"].rpartition("/")[2] for choice in choices if "$ref" in choice]
    description = parts[names[0]].get("description", "") if names and names[0] in parts else ""
    return f"{description.partition('.')[0]}." if description else ""


def _described(description: str) -> tuple[str, dict[str, str]]:
    """Return a docstring's text without its list of fields, and the meaning of each field."""
    text: list[str] = []
    meanings: dict[str, str] = {}
    names: list[str] = []
    for line in cleandoc(description).splitlines():
        match = re.match(r"^((?:\w+)(?:, \w+)*) {2,}(\S.*)$", line)
        if match:
            names = match[1].split(", ")
            meanings.update(dict.fromkeys(names, match[2]))
        elif names and line.startswith("  "):
            meanings.update({name: f"{meanings[name]} {line.strip()}" for name in names})
        else:
            names = []
            text.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(text)).strip(), meanings


def _type(of: Mapping[str, Any], known: Mapping[str, str]) -> str:
    """Return the type of a JSON value in words."""
    if "$ref" in of:
        name = of["$ref"].rpartition("/")[2]
        return f"[{name}]({known[name]})" if name in known else name
    for key in ("anyOf", "oneOf", "allOf"):
        if key in of:
            return " or ".join(dict.fromkeys(_type(choice, known) for choice in of[key]))
    if "enum" in of:
        return ", ".join(f"`{choice}`" for choice in of["enum"])
    if "const" in of:
        return f"`{of['const']}`"
    if of.get("type") == "array":
        return f"list of {_type(of['items'], known)}" if "items" in of else "list"
    if of.get("type") == "object" and isinstance(of.get("additionalProperties"), dict):
        return f"object of {_type(of['additionalProperties'], known)}"
    return _TYPES.get(of.get("type", ""), "anything")


_TYPES = {
    "integer": "integer",
    "number": "number",
    "string": "text",
    "boolean": "`true`, `false`",
    "null": "`null`",
    "object": "object",
}


def _default(of: Mapping[str, Any]) -> str:
    """Return the default as JSON; empty for the default of a part, which has a section of its own."""
    value = of.get("default", {})
    return "" if isinstance(value, dict) else f"`{json.dumps(value)}`"


# --- profiles and GPUs -------------------------------------------------------------------------------------


def profiles() -> Iterator[str]:
    yield from ("# List of profiles", "", _WRITTEN, "")
    yield from _prose(
        """[Profiles](profiles.md) says what they are and how versions differ. `memplan profiles NAME` lists what one
        sets, and by how much each setting changes one run; `--all` adds the file that each value was read in."""
    )
    for heading, listed in (("Training, and transformers", PROFILES), ("Serving engines", ENGINES)):
        yield from ("", f"## {heading}", "")
        rows = [(f"`{profile.name}`", profile.title, f"{len(profile.rows)}") for profile in listed]
        yield from _table(("profile", "framework and versions", "rows"), rows, right=(2,))


def gpus() -> Iterator[str]:
    cards = all_gpus()
    yield from ("# GPUs", "", _WRITTEN, "")
    yield from _prose(
        f"""The {len(cards)} cards of `gpus.toml`. *usable* is what all programs can use together, by the driver's or
        torch's own reading; a chip that is sold with several sizes of memory has the smallest. Rates are dense.
        `memplan gpus NAME --json` has all facts, each with its source."""
    )
    order = sorted(cards, key=lambda gpu: (gpu.vendor != "NVIDIA", gpu.vendor))
    for vendor, group in groupby(order, key=lambda gpu: gpu.vendor):
        yield from ("", f"## {vendor}", "")
        titles = ("name", "card", "usable GiB", "GB/s", "bf16 TFLOPS", "capability", "watts", "other names")
        yield from _table(titles, map(_gpu, group), right=(2, 3, 4, 5, 6))
    yield from ("", "## MIG instances", "")
    yield from _prose(
        """A card and a profile name an instance, as in `--gpu a100-80gb:3g.40gb`; `memplan gpus mig` lists them."""
    )
    rows = [
        (f"`{gpu.name}`", ", ".join(f"`{one.mig}` {one.usable / GIB:.2f}" for one in mig_instances(gpu)))
        for gpu in cards
        if mig_instances(gpu)
    ]
    yield from _table(("card", "profiles, and usable GiB of an instance"), rows)


def _gpu(gpu: GPU) -> tuple[str, ...]:
    def number(n: float | None) -> str:
        return f"{n:g}" if n else ""

    usable = f"{gpu.usable / GIB:.1f}" + (f" × {gpu.devices}" if gpu.devices > 1 else "")
    capability = "{}.{}".format(*gpu.compute_capability) if gpu.compute_capability else ""
    rates = (number(gpu.bandwidth_gbps), number(gpu.bf16_tflops), capability, number(gpu.tdp_watts))
    return f"`{gpu.name}`", gpu.title, usable, *rates, ", ".join(f"`{alias}`" for alias in gpu.aliases)
