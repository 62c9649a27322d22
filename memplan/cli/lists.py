"""`memplan models`, `gpus` and `profiles`: lists of valid input."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from memplan.cli.commands import Subcommand, Switch, own
from memplan.cli.outcome import show
from memplan.core.errors import UnknownNameError

_TEXT = "Text to search for in names, ids and kinds. Default everything."
_LISTS = {
    "models": "List the bundled models: parameters, layers, positions, licence.",
    "gpus": "List the GPUs: usable memory, compute capability, bf16 support, bandwidth, and dated prices.",
    "profiles": "List the profiles (frameworks and versions), and the defaults that each sets.",
}


_FILTERS = {
    "models": {
        "min": own("Least parameters, as in 7e9 or 7B. Default 0."),
        "max": own("Most parameters. Default no limit."),
        "sort": own(
            "name, parameters, layers or positions. Default name.",
            choices=("name", "parameters", "layers", "positions"),
        ),
    },
    "gpus": {
        "min": own("Least memory as sold, as in 24GiB. Default 0."),
        "max": own("Most memory as sold. Default no limit."),
        "sort": own(
            "name, memory, bandwidth, price (list price) or rent. Default the table's order.",
            choices=("name", "memory", "bandwidth", "price", "rent"),
        ),
    },
}


def command(name: str) -> Subcommand:
    text = own(_TEXT, list[str], completes=name.removesuffix("s"), is_argument=True)
    others = {**_FILTERS.get(name, {}), "json": own("As JSON.", Switch)}
    if name == "profiles":
        others["all"] = own("Every row of each profile, with its source.", Switch)
    return Subcommand(name, partial(_print_list, name), {"Arguments": {"text": text}, "Options": others}, _LISTS[name])


def _print_list(name: str, given: Mapping[str, Any]) -> int:
    from memplan.report.listing import Wanted, cards, models, profiles

    words, json = " ".join(given.get("text", ())), "json" in given
    if name == "profiles":
        listed = profiles(words, json, "all" in given)
    else:
        from memplan.core.units import amount_of, size_of

        limit = {"models": amount_of, "gpus": size_of}[name]
        least, most = (limit(given[end], end) if end in given else None for end in ("min", "max"))
        sort = given.get("sort", "")
        choices = _FILTERS[name]["sort"].choices
        if sort and sort not in choices:
            raise UnknownNameError("sort", sort, choices)
        listed = {"models": models, "gpus": cards}[name](words, json, Wanted(least, most, sort))
    show(listed, "json" if json else "table")
    return 0
