"""What the user says: a run, in Hugging Face's words. Frozen, hashable, and the same in Python, JSON and YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator

from memplan.models.objectives import Objective
from memplan.spec.base import Count, Natural, Part, Pixels
from memplan.spec.generation import Generation, InlineModel
from memplan.spec.parallelism import Parallelism
from memplan.spec.serving import Serving
from memplan.spec.training import Also, Kernels, Loop, Method, Optimizer, Precision

# A framework without a version is the newest that is read.
NEWEST = {
    "transformers": "transformers-5",
    "trl": "trl-0.24",
    "axolotl": "axolotl-0.12",
    "llamafactory": "llamafactory-0.9",
    "unsloth": "unsloth-2025",
    "litgpt": "litgpt-2024",
    "vllm": "vllm-0.33",
    "sglang": "sglang-0.5",
    "tgi": "tgi-3",
    "llama.cpp": "llama.cpp-2026",
}


def _versioned(name: str) -> str:
    return NEWEST.get(name.lower(), name)


ProfileName = Annotated[str, AfterValidator(_versioned)]


class Batch(Part, frozen=True):
    """`micro` sequences of `sequence` tokens per GPU and pass, `accumulation` passes per step. In generation they are
    prompts, and `new_tokens` follow each: 256 where none are asked for.

    Each sequence has `images` of `image_size` pixels, a side or height and width; their tokens are part of `sequence`.
    Of an encoder-decoder `sequence` is what the encoder reads, and the decoder is given `target_sequence` tokens: by
    default as many, or as many as it has positions for. To generate it begins with those: with one by default, Whisper
    with four. What an encoder of images or recordings reads is fixed by its config.
    """

    micro: Count = 1
    sequence: Count = 2048
    accumulation: Count = 1
    new_tokens: Natural = 0
    images: Natural = 0
    image_size: Pixels | tuple[Pixels, Pixels] | None = None
    target_sequence: Count | None = None


class RunSpec(Part, frozen=True):
    """A whole run. Words are accepted for parts: `method="qlora"`, `precision="amp"`, `optimizer="sgd"`.

    `objective` is what the model is trained for, its head and loss; None for what its config's `architectures` say.
    None is left to the profile (`memplan.catalogue.profiles.profiles`), which without a version is the newest of that
    framework; the answer's `run` holds what it decided.
    """

    if TYPE_CHECKING:  # what pydantic accepts is more than what the fields are

        def __init__(
            self,
            *,
            model: str | InlineModel | Mapping[str, Any],
            task: Literal["train", "forward", "generate"] = ...,
            objective: Objective | None = ...,
            method: Method | str | Mapping[str, Any] = ...,
            precision: Precision | str | Mapping[str, Any] = ...,
            optimizer: Optimizer | str | Mapping[str, Any] = ...,
            batch: Batch | Mapping[str, Any] = ...,
            kernels: Kernels | Mapping[str, Any] = ...,
            loop: Loop | Mapping[str, Any] = ...,
            generation: Generation | Mapping[str, Any] = ...,
            also: Also | Mapping[str, Any] = ...,
            parallelism: Parallelism | Mapping[str, Any] = ...,
            serving: Serving | Mapping[str, Any] = ...,
            profile: str = ...,
            gpu: str | None = ...,
        ) -> None: ...

    model: str | InlineModel
    task: Literal["train", "forward", "generate"] = "train"
    objective: Objective | None = None
    method: Method = Method()
    precision: Precision = Precision()
    optimizer: Optimizer = Optimizer()
    batch: Batch = Batch()
    kernels: Kernels = Kernels()
    loop: Loop = Loop()
    generation: Generation = Generation()
    also: Also = Also()
    parallelism: Parallelism = Parallelism()
    serving: Serving = Serving()
    profile: ProfileName = "transformers-5"
    gpu: str | None = None


def changed(run: RunSpec, part: str, **values: Any) -> RunSpec:
    """The run with some values of one part changed. Raises SpecError or pydantic's ValidationError for a bad one."""
    old: Part = getattr(run, part)
    return RunSpec.model_validate({**dict(run), part: {**dict(old), **values}})
