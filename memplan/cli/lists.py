"""`memplan models`, `gpus` and `profiles`: lists of valid input."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from memplan.cli.commands import Subcommand, Switch, own
from memplan.cli.outcome import show

_TEXT = "Text to search for in names, ids and kinds. Default everything."
_LISTS = {
    "models": "List the bundled models: parameters, layers, positions, licence.",
    "gpus": "List the GPUs: usable memory, compute capability, bf16 support, bandwidth, and dated prices.",
    "profiles": "List the profiles (frameworks and versions), and the defaults that each sets.",
}


def command(name: str) -> Subcommand:
    text = own(_TEXT, list[str], completes=name.removesuffix("s"), is_argument=True)
    options = {"Arguments": {"text": text}, "Options": {"json": own("As JSON.", Switch)}}
    if name == "profiles":
        options["Options"]["all"] = own("Every row of each profile, with its source.", Switch)
    return Subcommand(name, partial(_print_list, name), options, _LISTS[name])


def _print_list(name: str, given: Mapping[str, Any]) -> int:
    from memplan.report.listing import cards, models, profiles

    words, json = " ".join(given.get("text", ())), "json" in given
    if name == "profiles":
        listed = profiles(words, json, "all" in given)
    else:
        listed = {"models": models, "gpus": cards}[name](words, json)
    show(listed, "json" if json else "table")
    return 0
