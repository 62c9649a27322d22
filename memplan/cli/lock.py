"""`memplan lock` and `memplan init`: the files that a team commits for `memplan check`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memplan.cli.commands import Subcommand, Switch, own
from memplan.cli.gpu_names import with_names_of_cards
from memplan.cli.outcome import show, warn
from memplan.core.errors import SpecError, printable

_FOLDERS = own(
    "Run files, or folders to look for some in. Default this one.", list[str], metavar="FOLDERS", is_argument=True
)


def command(name: str) -> Subcommand:
    if name == "lock":
        online = own("Ask the Hugging Face Hub for configs that are not here. Default off.", Switch)
        return Subcommand(name, lock, {"Options": {"online": online}})
    gpus = own("The GPU that must hold the runs; repeatable. Default the smallest that holds each.", list[str])
    output = own("Write to this file, or with - print. Default memplan.toml.")
    return Subcommand(name, init, {"Arguments": {"folders": _FOLDERS}, "Options": {"gpu": gpus, "output": output}})


def lock(given: Mapping[str, Any]) -> int:
    """Write memplan.lock: the model's config, the profile and the bytes behind each answer of the budgets.

    With it, memplan check needs no network, no token and no cache. Exit codes: 0 written; 2 wrong input; 3 a model's
    config is not available.
    """
    from memplan.cli.check import in_folder_of_budgets
    from memplan.gate.check import check
    from memplan.gate.lock import NAME, lock_of
    from memplan.models.cards import find_config

    in_folder_of_budgets(())
    found = check(processes=None)
    if "online" in given:
        models = {row.fields.get("model") for row in found.rows}
        for name in sorted(name for name in models if isinstance(name, str) and "/" in name):
            find_config(name, online=True)  # into the Hub's cache, where the second check finds it
        found = check(processes=None)
    text = lock_of(found).text()
    show(text, "json", NAME)
    show(f"{NAME}: {len({row.run for row in found.rows})} runs\n")
    return 0


def init(given: Mapping[str, Any]) -> int:
    """Write memplan.toml, with a budget of the run files that are found.

    Exit codes: 0 written; 2 wrong input, no run file, or memplan.toml exists.
    """
    from memplan.gate.discovery import discover

    given, target = with_names_of_cards(given), given.get("output", "memplan.toml")
    if target != "-" and Path(target).exists():
        raise SpecError(f"output: {printable(target, 80)} exists; edit it, or name another with --output", "output")
    folders = [Path(folder) for folder in given.get("folders", ()) or ["."]]
    found = discover(folders, given.get("gpu", ()), given.get("gpus"))
    for note in found.left_out:
        warn(f"left out: {note}")
    show(found.text, output=None if target == "-" else target)
    if target != "-":
        show(f"{printable(target, 80)}: {found.runs} run{'s' * (found.runs > 1)}; memplan check compares with it\n")
    return 0
