"""Cards as people type them: several in a word, a number of equal ones, or those of this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from memplan.core.errors import SpecError
from memplan.core.records import NamedTuple
from memplan.core.several import several

AUTO = "auto"


class TypedCard(NamedTuple):
    """A card by its name, and how many of it the run is on, if that was typed with it."""

    name: str
    number: int | None


def typed_cards(texts: Iterable[str]) -> Iterator[TypedCard]:
    """Yield the cards that `--gpu` names: `3090,4090` are two to compare, `2x4090` is two of one, `auto` asks the
    driver. Raises SpecError if there is no driver to ask."""
    for text in (part for words in texts for part in words.split(",")):
        number, name = several(text)
        yield TypedCard(_named(name), number)


def with_names_of_cards(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options with the cards' names in `gpu`, and in `gpus` how many a run is on, which is one number for
    all. Raises SpecError for several."""
    if "gpu" not in given:
        return given
    cards = [*typed_cards(given["gpu"])]
    named = {**given, "gpu": [card.name for card in cards]}
    asked: int = given.get("gpus", 0)  # 0 leaves it to the run's file
    numbers = {*(card.number or asked for card in cards), *([asked] if asked else [])}
    if numbers == {0}:
        return named
    if len(numbers) > 1:
        told = " and ".join(str(number or 1) for number in sorted(numbers))
        raise SpecError(f"gpu: a run is on one number of cards, not on {told}; give each its own budget", "gpu")
    return {**named, "gpus": numbers.pop()}


def _named(name: str) -> str:
    """Return the name, or that of this machine's first card for `auto`."""
    if name.lower() != AUTO:
        return name
    from memplan.probe.run.driver import nvidia_smi

    card = nvidia_smi("name", "")
    if not card:
        raise SpecError("gpu: auto asks nvidia-smi, which did not answer; name the card, as in --gpu 3090", "gpu")
    return card
