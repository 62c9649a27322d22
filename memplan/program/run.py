"""A fully resolved run: what `resolve` returns and `program` reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.overhead import Communicator
from memplan.core.records import NamedTuple
from memplan.program.inference import gpus
from memplan.program.structure import Structure
from memplan.program.training import pipeline
from memplan.spec.base import Part
from memplan.spec.generation import Generation
from memplan.spec.run import Batch

if TYPE_CHECKING:
    from memplan.program.serving.budget import Budget


class ResolvedRun(NamedTuple):
    """A run with every default filled in.

    structure      everything that does not depend on batch and sequence sizes; of `batch` it only knows whether it
                   accumulates and whether it is a single sequence
    batch          batch and sequence sizes
    gpu            the GPU, if one was given
    half           attention computes in 16 bits
    large_tiles    the GPU's shared memory holds tiles of 128 x 128
    notes          notes for the report
    parts          the sections of the spec with every null filled in
    pictures       axes that images decide
    communicators  NCCL communicators that the run's ranks are in
    beams          sequences generated for each prompt
    part           prompt tokens read at once (chunked prefill), 0 for all
    assistant      what proposes tokens in assisted generation
    colocated      how a vLLM engine on the same GPU, which generates for a trainer, divides its share
    critic         the update of a value model with an optimizer of its own, on the same GPUs
    alike          the same object for runs that differ in their lengths alone; None if lengths decide more
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
    colocated: Budget | None = None
    critic: ResolvedRun | None = None
    alike: object | None = None

    @property
    def trains(self) -> bool:
        """Whether the run trains; if not, it runs the model forward."""
        return self.structure.graph.inference is None

    @property
    def has_stages(self) -> bool:
        """Whether layers are spread over several GPUs, which then differ: in a pipeline, or by a device map."""
        graph = self.structure.graph
        return graph.degrees.pp > 1 or (graph.placed is not None and graph.placed.cards > 1)

    def every_stage(self) -> Iterator[ResolvedRun]:
        """Yield the run on the ranks of each stage, or on each GPU of a device map."""
        stages = pipeline.every_stage if self.trains else gpus.every_gpu
        return (self._replace(structure=structure) for structure in stages(self.structure))

    def fullest_stages(self) -> Iterator[ResolvedRun]:
        """Yield the run on the stages, or the GPUs of a device map, that may hold the most."""
        stages = pipeline.may_be_worst if self.trains else gpus.may_be_fullest
        return (self._replace(structure=structure) for structure in stages(self.structure))


TOKENS = 20  # default tokens per round: transformers 5.24 configuration_utils.py num_assistant_tokens


class Assistant(NamedTuple):
    """The assistant that proposes tokens in assisted generation.

    tokens           most tokens proposed in a round
    drafts           the assistant model's resolved run; None for prompt lookup
    shares           the assistant is the model's own first layers
    looks_up_prompt  tokens are looked up in the prompt (prompt lookup decoding)
    """

    tokens: int
    drafts: ResolvedRun | None
    shares: bool
    looks_up_prompt: bool

    @property
    def notes(self) -> Iterator[str]:
        """Yield notes for the report."""
        drafts = self.drafts
        if drafts is not None and not self.shares:
            yield from (f"assistant: {note}" for note in drafts.notes)
        yield (
            "each round is assumed to accept none of the proposed tokens: accepted tokens make the run shorter, not "
            "smaller"
        )

    def with_assistant_defaults(self, generation: Generation) -> Generation:
        """Return `generation` with the assistant's defaults filled in."""
        if self.drafts is None:
            return generation
        parts = self.drafts.parts
        update: dict[str, object] = {
            "num_assistant_tokens": generation.num_assistant_tokens or TOKENS,
            "num_assistant_tokens_schedule": generation.num_assistant_tokens_schedule or "constant",
        }
        if not self.shares:
            precision, method = parts["precision"], parts["method"]
            update["assistant_dtype"] = getattr(precision, "weights", None)
            update["assistant_quantization"] = getattr(method, "quantization", None)
        return generation.model_copy(update=update)
