"""Which layers, embeddings and head each card of an engine has, where it lays layers on several.

Source: vllm 0.33.0 distributed/utils.py get_pp_indices; sglang 0.5.23 distributed/utils.py get_pp_indices; llama.cpp
(llama-cpp-python 0.3.36) src/llama-model.cpp load_tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple


class Stage(NamedTuple):
    """What one card has of a model.

    number       of the card, the first is 0
    first, last  its layers: from `first` to before `last`
    embedded     whether the table of tokens is there; headed, the last norm and the head
    fed          whether it computes on what another card passes on
    """

    number: int
    first: int
    last: int
    embedded: bool = True
    headed: bool = True
    fed: bool = False

    @property
    def layers(self) -> int:
        return self.last - self.first

    @property
    def text(self) -> str:
        """Its layers in words, counted from 0."""
        held = f"layers {self.first} to {self.last - 1}" if self.layers > 1 else f"layer {self.first}"
        parts = ["the embeddings"] * self.embedded + [held] * bool(self.layers) + ["the head"] * self.headed
        return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts) or "nothing"


def whole(layers: int) -> Stage:
    """One card that has all."""
    return Stage(0, 0, layers)


def pipeline(layers: int, stages: int, extra: str) -> tuple[Stage, ...]:
    """Stages of a pipeline. What is left over of equal parts goes, a layer each, to those before the last (`extra` is
    "middle", vLLM's), or to the last ("last", SGLang's)."""
    each, left = divmod(layers, stages)
    have = [each] * stages
    for i in range(left):
        have[-(i + 2) if extra == "middle" else -(i + 1)] += 1
    ends = list(accumulate(have))
    return tuple(
        Stage(i, end - n, end, i == 0, i == stages - 1, i > 0)
        for i, (n, end) in enumerate(zip(have, ends, strict=True))
    )


def by_card(layers: int, offloaded: int, cards: int, split: Sequence[float]) -> tuple[Stage, ...]:
    """llama.cpp's: of the layers and the head behind them the last `offloaded`, in the proportions of `split`, equal
    parts without one. The table of tokens stays with the host. Of cards with no layers the first alone is listed, and
    the first after others that have some."""
    start, count = max(layers + 1 - offloaded, 0), min(offloaded, layers + 1)
    parts = [Fraction(p) for p in split]
    total = sum(parts)
    points = [done / total for done in accumulate(parts)]

    def card_of(i: int) -> int:
        if not points:
            return (i - start) * cards // count
        return next(card for card, end in enumerate(points) if end > Fraction(i - start, count))

    of = {i: card_of(i) for i in range(start, layers + 1)}
    least = min(of.values(), default=cards)
    without = next((card for card in range(least, cards) if card not in of.values()), 0)
    found: list[Stage] = []
    for card in sorted({0, without, *of.values()}):
        mine = [i for i, there in of.items() if there == card and i < layers]
        first, last = (mine[0], mine[-1] + 1) if mine else (layers, layers)
        found.append(Stage(card, first, last, False, of.get(layers) == card, card > least))
    return tuple(found)
