"""A run with nothing left open: what `resolve` makes and `program` reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.overhead import Communicator
from memplan.program.training.program import Structure
from memplan.spec.base import Part
from memplan.spec.generation import Generation
from memplan.spec.run import Batch


class Decided(NamedTuple):
    """A run with nothing left open. Of its `batch` the structure has only whether it accumulates, and whether it is one
    sequence.

    `communicators` are those that the run's ranks are in. `half` is whether attention computes in 16 bits,
    `large_tiles` whether the card's shared memory holds tiles of 128 x 128; `parts` are the spec's parts with every
    null filled in; `pictures` are the axes that images decide; `beams` the sequences that are generated of each prompt,
    of which `part` tokens are read at once, 0 for all; `assistant` what proposes tokens.
    """

    structure: Structure
    batch: Batch
    gpu: GPU | None
    half: bool
    large_tiles: bool
    notes: tuple[str, ...]
    parts: dict[str, Part]
    pictures: tuple[tuple[str, int], ...] = ()
    communicators: tuple[Communicator, ...] = ()
    beams: int = 1
    part: int = 0
    assistant: Assistant | None = None


TOKENS = (
    20  # proposed in a round where a run does not say: transformers 5.24 configuration_utils.py num_assistant_tokens
)


class Assistant(NamedTuple):
    """What proposes tokens.

    tokens    so many in a round at most
    drafts    the assistant's run, decided; None where tokens are looked up in those before
    shares    its weights are the model's own first layers
    looks     tokens are looked up
    """

    tokens: int
    drafts: Decided | None
    shares: bool
    looks: bool

    @property
    def notes(self) -> Iterator[str]:
        """What to know of it."""
        drafts = self.drafts
        if drafts is not None and not self.shares:
            yield from (f"assistant: {note}" for note in drafts.notes)
        yield (
            "of the tokens proposed in a round none is taken to be accepted but the model's own: accepted ones make "
            "the run shorter, not smaller"
        )

    def said(self, generation: Generation) -> Generation:
        """The run's `generation` with what it leaves open."""
        if self.drafts is None:
            return generation
        own = self.drafts.parts
        update: dict[str, object] = {
            "num_assistant_tokens": generation.num_assistant_tokens or TOKENS,
            "num_assistant_tokens_schedule": generation.num_assistant_tokens_schedule or "constant",
        }
        if not self.shares:
            precision, method = own["precision"], own["method"]
            update["assistant_dtype"] = getattr(precision, "weights", None)
            update["assistant_quantization"] = getattr(method, "quantization", None)
        return generation.model_copy(update=update)
