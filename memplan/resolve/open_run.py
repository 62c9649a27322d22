"""A run while its open fields are filled in, and the steps that training and inference share."""

from __future__ import annotations

from typing import Any, Literal, dataclass_transform

from memplan.catalogue.degrees import WHOLE, Degrees
from memplan.catalogue.kernels.packing import PackedRows
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.methods.methods import Recipe
from memplan.catalogue.profiles.behaviour import LibraryBehaviour
from memplan.core.records import NamedTuple
from memplan.models.model import ModelSpec
from memplan.resolve.card import GPUFacts
from memplan.resolve.parallelism import ZERO, divides_weights, is_wrapped, replicas
from memplan.resolve.quantized_checkpoint import CheckpointMethod
from memplan.spec.parallelism import Parallelism
from memplan.spec.roles import Roles
from memplan.spec.run import RunSpec
from memplan.spec.training import Kernels, Loop, Method, Optimizer, Precision


class BatchFacts(NamedTuple):
    """The facts about a batch that the structure of a run depends on.

    accumulates         gradients are accumulated over micro-batches
    windowed            the sequence reaches the sliding window
    is_single_sequence  the micro-batch is one sequence
    loss_chunks         losses computed in chunks, and how many (see `memplan.catalogue.kernels.losses`)
    scans_once          the sequence is one chunk of a layer that scans chunk by chunk
    is_one_image        its vision tower reads one image, or one tile
    has_uneven_patches  the image patches are not a multiple of 8
    media               what the batch has: images, video or clips; "" for none
    pads_tower          audio clips or images are padded, and the padding is masked
    microbatches        micro-batches per step of a pipeline, else 1
    ungrouped           why a step's completions are not those of whole prompts; empty if they are
    packing             how sequences are packed into rows; empty if they are not
    packed              the rows of a packed batch that marks its sequences
    """

    accumulates: bool = False
    windowed: bool = False
    is_single_sequence: bool = False
    loss_chunks: tuple[tuple[str, int], ...] = ()
    scans_once: bool = False
    is_one_image: bool = False
    has_uneven_patches: bool = False
    media: str = ""
    pads_tower: bool = False
    microbatches: int = 1
    ungrouped: str = ""
    packing: str = ""
    packed: PackedRows | None = None


class Parts(NamedTuple):
    """The parts of a run that its structure depends on, apart from the batch."""

    method: Method
    precision: Precision
    optimizer: Optimizer
    kernels: Kernels
    loop: Loop
    parallelism: Parallelism
    profile: str
    trainer: str = "sft"
    reference: str | None = None
    rollout: str = "transformers"
    roles: Roles = Roles()

    @classmethod
    def of(cls, run: RunSpec) -> Parts:
        """Return the parts of a run as they were asked for."""
        parts = run.method, run.precision, run.optimizer, run.kernels, run.loop, run.parallelism
        return cls(*parts, run.profile, run.trainer, run.reference, run.rollout, run.roles)


def found_later(*, init: Literal[False] = False) -> Any:
    """Return the class's value of a field that a step sets."""
    return None


@dataclass_transform(kw_only_default=True, field_specifiers=(found_later,))
class _Fields:
    """A constructor from fields by name, without dataclasses, whose import takes longer than resolving a run."""

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


class OpenRun(_Fields):
    """A run while it is resolved: its parts, which steps fill in, and what the steps find out.

    card             what is read of the GPU, if one was given
    batch_facts      what the structure depends on of the batch
    trains           the run trains
    library          what the profile's library does
    checkpoint       the method applied to the checkpoint
    storages         dtypes that 4-bit weights may be stored in
    run_formats      formats in which the run's weights can run without being trained over
    degrees          the part of the model and of the sequence that one rank computes
    recipe           dtypes, adapters and quantisation of the weights
    attention        the attention of this version of the framework
    attention_dtype  the dtype it computes in
    checkpoints      blocks are checkpointed
    wiring           attention kernels, masks and caches
    notes            notes for the report, in order
    """

    model: ModelSpec
    profile: str
    card: GPUFacts | None = None
    method: Method
    precision: Precision
    optimizer: Optimizer
    kernels: Kernels
    loop: Loop
    parallelism: Parallelism
    trainer: str
    reference: str | None
    rollout: str
    roles: Roles
    batch_facts: BatchFacts
    trains: bool
    library: LibraryBehaviour = found_later()
    checkpoint: CheckpointMethod = found_later()
    storages: tuple[str, ...] = ("uint8",)
    run_formats: tuple[str, ...] = ()
    degrees: Degrees = WHOLE
    recipe: Recipe = found_later()
    attention: str = ""
    attention_dtype: str = ""
    checkpoints: bool = False
    wiring: Wiring = found_later()
    notes: list[str]

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability of the GPU."""
        return self.card.compute_capability if self.card else None

    @property
    def copies(self) -> int:
        """Ranks that hold the same part of the model."""
        return replicas(self.parallelism)

    @property
    def is_wrapped(self) -> bool:
        """Whether the strategy's library holds the model (`memplan.resolve.parallelism.is_wrapped`)."""
        return is_wrapped(self.parallelism)

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP holds the weights."""
        return divides_weights(self.parallelism)

    @property
    def under_deepspeed(self) -> bool:
        """Whether DeepSpeed holds the run."""
        return self.is_wrapped and self.parallelism.strategy in ZERO

    @property
    def is_megatron_model(self) -> bool:
        """Whether the model is Megatron-core's own."""
        return self.model.is_megatron

    @property
    def code(self) -> str:
        """Library that implements the model."""
        return self.library.model.code

    @property
    def style(self) -> str:
        """The profile's tensor parallelism, which identifies its library."""
        return self.library.sharding.tensor_parallel

    @property
    def name(self) -> str:
        """The model's name, or its type."""
        return self.model.name or self.model.model_type
