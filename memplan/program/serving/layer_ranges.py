"""Which layers, embeddings and head each GPU has when an engine spreads layers over several.

Source: vllm 0.33.0 distributed/utils.py get_pp_indices; sglang 0.5.23 distributed/utils.py get_pp_indices; llama.cpp
(llama-cpp-python 0.3.36) src/llama-model.cpp load_tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

from memplan.core.records import NamedTuple


class Stage(NamedTuple):
    """The part of a model on one GPU.

    number           number of the GPU, from 0
    first            first layer
    last             last layer, plus one
    embedded         the GPU has the embeddings
    headed           the GPU has the last norm and the head
    receives_hidden  the GPU receives hidden states from another one
    """

    number: int
    first: int
    last: int
    embedded: bool = True
    headed: bool = True
    receives_hidden: bool = False

    @property
    def layers(self) -> int:
        return self.last - self.first

    @property
    def text(self) -> str:
        """Its part in words, with layers counted from 0."""
        layers = f"layers {self.first} to {self.last - 1}" if self.layers > 1 else f"layer {self.first}"
        parts = ["the embeddings"] * self.embedded + [layers] * bool(self.layers) + ["the head"] * self.headed
        return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts) or "nothing"


def whole(layers: int) -> Stage:
    """Return the stage of a single GPU that has the whole model."""
    return Stage(0, 0, layers)


def pipeline(layers: int, stages: int, extra: str) -> tuple[Stage, ...]:
    """Return the stages of a pipeline.

    Layers left over after an equal split go one each to the stages before the last (`extra` is "middle", as in vLLM),
    or to the last stages ("last", as in SGLang).
    """
    each, remainder = divmod(layers, stages)
    counts = [each] * stages
    for i in range(remainder):
        counts[-(i + 2) if extra == "middle" else -(i + 1)] += 1
    ends = list(accumulate(counts))
    return tuple(
        Stage(i, end - n, end, i == 0, i == stages - 1, i > 0)
        for i, (n, end) in enumerate(zip(counts, ends, strict=True))
    )


def by_card(layers: int, offloaded: int, cards: int, split: Sequence[float]) -> tuple[Stage, ...]:
    """Return the GPUs of llama.cpp that differ, with the layers on each.

    layers     layers of the model; the head counts as one more after them
    offloaded  how many of these, from the end, are on GPUs
    cards      number of GPUs
    split      proportions of the GPUs, equal if empty

    The embeddings stay on the host. Of GPUs without layers, only the first GPU and the first one after GPUs with layers
    are listed.
    """
    start, count = max(layers + 1 - offloaded, 0), min(offloaded, layers + 1)
    parts = [Fraction(p) for p in split]
    total = sum(parts)
    points = [end / total for end in accumulate(parts)]

    def card_of(i: int) -> int:
        if not points:
            return (i - start) * cards // count
        return next(card for card, end in enumerate(points) if end > Fraction(i - start, count))

    card_of_layer = {i: card_of(i) for i in range(start, layers + 1)}
    least = min(card_of_layer.values(), default=cards)
    empty = next((card for card in range(least, cards) if card not in card_of_layer.values()), 0)
    stages: list[Stage] = []
    for card in sorted({0, empty, *card_of_layer.values()}):
        mine = [i for i, of_layer in card_of_layer.items() if of_layer == card and i < layers]
        first, last = (mine[0], mine[-1] + 1) if mine else (layers, layers)
        stages.append(Stage(card, first, last, False, card_of_layer.get(layers) == card, card > least))
    return tuple(stages)
