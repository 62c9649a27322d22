"""A run as the user describes it, in Hugging Face's terms: frozen, hashable, and the same in Python, JSON and YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from memplan.models.objectives import Objective
from memplan.spec.base import Count, Natural, Part, Pixels, Seconds
from memplan.spec.checks import After
from memplan.spec.generation import Generation, InlineModel
from memplan.spec.parallelism import Parallelism
from memplan.spec.roles import Roles
from memplan.spec.serving import Serving
from memplan.spec.training import Also, Kernels, Loop, Method, Optimizer, Precision

# Fields of a batch that are left out unless they are set.
_OPTIONAL = ("frames", "clips", "clip_seconds", "generations", "scored", "packing", "lengths", "batching")

# The newest supported version of each framework, used when a profile names no version.
NEWEST = {
    "transformers": "transformers-5",
    "trl": "trl-1.15",
    "axolotl": "axolotl-0.21",
    "llamafactory": "llamafactory-0.9.5",
    "ms-swift": "ms-swift-4.6",
    "unsloth": "unsloth-2026.10",
    "openrlhf": "openrlhf-0.11",
    "automodel": "automodel-0.7",
    "verl": "verl-0.9",
    "litgpt": "litgpt-2024",
    "vllm": "vllm-0.33",
    "vllm-v0": "vllm-v0-0.8",
    "sglang": "sglang-0.5",
    "tgi": "tgi-3",
    "llama.cpp": "llama.cpp-2026",
}


_OTHER_NAMES = {
    **dict.fromkeys(("hf", "huggingface", "peft"), "transformers"),
    **dict.fromkeys(("llama-factory", "llama_factory"), "llamafactory"),
    **dict.fromkeys(("llamacpp", "llama-cpp", "ollama", "lmstudio", "lm-studio"), "llama.cpp"),
    **dict.fromkeys(("nemo-automodel", "nemo_automodel"), "automodel"),
    "swift": "ms-swift",
}


def _with_version(name: str) -> str:
    lowered = name.lower()
    family = lowered.removesuffix("-latest")  # such as torchtune-latest, whose newest is torchtune
    return NEWEST.get(_OTHER_NAMES.get(family, family), name if family == lowered else family)


ProfileName = Annotated[str, After(_with_version)]
TrainerName = Literal["sft", "dpo", "kto", "orpo", "cpo", "simpo", "reward", "grpo", "rloo", "ppo", "gkd", "distill"]
ReferenceKind = Literal["copy", "adapters", "precomputed", "none"]
RolloutKind = Literal["transformers", "colocate", "server"]
PackingName = Literal[
    "bfd", "bfd_split", "wrapped", "padding_free", "sample_packing", "neat_packing", "knapsack", "binpack"
]


class Batch(Part):
    """How many tokens one step processes.

    micro            sequences per GPU and forward pass; when generating, prompts
    sequence         tokens per sequence, including those of its images and clips; for an encoder-decoder, the encoder's
                     tokens. Image and audio encoders have a fixed length, which their config sets. When the run
                     generates, tokens of the prompt
    accumulation     passes per optimizer step
    new_tokens       tokens generated after each prompt; 0 for the default of 256, or the trainer's
    generations      completions of each prompt, of trainers that generate; 0 for the trainer's default
    scored           completions of one pass without gradients that computes log-probabilities before the step, of
                     trainers that generate; 0 for `micro`
    images           images per sequence
    frames           frames of a video in each sequence, instead of images
    image_size       pixels of an image or frame: the side of a square, or (height, width)
    clips            audio clips per sequence
    clip_seconds     length of a clip; None for the length of the audio encoder's window, which is 30 s in Whisper's
    packing          how the framework packs sequences, or joins those of a micro-batch without padding
                     (`memplan.catalogue.kernels.packing`); None: each sequence is a row
    lengths          token counts of the data set's sequences: a file, `max`, or percentiles, as in
                     `p50=700,p99=3800,max=8192`. `sequence` is what they are cut to, and becomes the longest that can
                     occur. None: all are equal
    batching         how such sequences come into batches; None: `packed` if the run packs, else `random`
    target_sequence  tokens of an encoder-decoder's decoder. None for `sequence`, or for the decoder's learned positions
                     if the encoder has a fixed length; when generating, for 1 start token (4 for Whisper)
    """

    micro: Count = 1
    sequence: Count = 2048
    accumulation: Count = 1
    new_tokens: Natural = 0
    generations: Natural = 0
    scored: Natural = 0
    images: Natural = 0
    frames: Natural = 0
    image_size: Pixels | tuple[Pixels, Pixels] | None = None
    clips: Natural = 0
    clip_seconds: Seconds | None = None
    target_sequence: Count | None = None
    packing: PackingName | None = None
    lengths: str | None = None
    batching: Literal["random", "grouped", "packed", "padded"] | None = None
    _is_kept = False  # `lengths` may name a file

    @classmethod
    def expanded(cls, value: Any) -> Any:
        """Set the longest sequence that can occur, of sequences that are not all equal."""
        batch = cast("Mapping[str, Any]", value)
        if not isinstance(value, (dict, Mapping)) or not isinstance(batch.get("lengths"), str):
            return batch
        from memplan.spec.lengths import with_longest

        return with_longest({"sequence": cls.defaults["sequence"], **batch})

    @property
    def sees(self) -> bool:
        """Whether its sequences have images, a video or audio clips."""
        return bool(self.media)

    @property
    def media(self) -> str:
        """The media of its sequences: images, video or clips; "" without any."""
        return "clips" if self.clips else "video" if self.frames else "images" if self.images else ""

    @property
    def seen(self) -> tuple[int, int, int | tuple[int, int] | None, int, int | None]:
        """Its images, video and audio, as `memplan.models.configs.images.pictures_of` takes them."""
        return self.images, self.frames, self.image_size, self.clips, self.clip_seconds

    @property
    def tokens(self) -> int:
        """Tokens per sequence in training, which include those of a completion that the step generates."""
        return self.sequence + self.new_tokens

    def written(self, values: dict[str, Any]) -> dict[str, Any]:
        """Leave out the completions of a trainer that does not generate, and what is not said of unequal sequences."""
        return {k: v for k, v in values.items() if v or k not in _OPTIONAL}


class RunSpec(Part):
    """A run to estimate. Some parts accept a word: `method="qlora"`, `precision="amp"`, `optimizer="sgd"`.

    The profile (`memplan.catalogue.profiles.profiles`) decides every field left at None; the answer's `run` holds the
    decided values. A profile without a version is the newest version of that framework.

    model      card name, Hugging Face id, path of a config.json or GGUF file, or `{"config": {...}}`
    objective  what the model is trained for, which sets its head and loss; None for the config's `architectures`
    trainer    trainer of TRL. With any but `sft`, `batch.micro` counts its examples: pairs of sequences, for most
    reference  reference model of a trainer that has one: a `copy` of the model, the model itself with its `adapters`
               disabled, log-probabilities `precomputed` before training, or `none`; None for the trainer's default
    roles      other models of the trainer's step: a teacher, a reference, a reward and a value model
    rollout    what generates for a trainer that does: transformers' `generate`, vLLM on the same GPU (`colocate`, set
               up by `serving`), or a vLLM `server` on other GPUs
    gpu        name of a GPU; None to estimate without a verdict
    """

    if TYPE_CHECKING:  # pydantic accepts more types than the fields have

        def __init__(  # noqa: PLR0913 (a part of the run each)
            self,
            *,
            model: str | InlineModel | Mapping[str, Any],
            task: Literal["train", "forward", "generate"] = ...,
            objective: Objective | None = ...,
            trainer: TrainerName = ...,
            reference: ReferenceKind | None = ...,
            roles: Roles | Mapping[str, Any] = ...,
            rollout: RolloutKind = ...,
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
    trainer: TrainerName = "sft"
    reference: ReferenceKind | None = None
    roles: Roles = Roles()
    rollout: RolloutKind = "transformers"
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

    @classmethod
    def expanded(cls, value: Any) -> Any:
        """Choose the newest TRL for one of its trainers, if no profile is given, and set the loop that they have; put
        a model that transformers runs on several GPUs on all of them, as `device_map="auto"` does."""
        if not isinstance(value, (dict, Mapping)):
            return value
        values = cast("Mapping[str, Any]", value)
        runs = values.get("task") in ("forward", "generate")
        if runs and str(values.get("profile", "transformers")).startswith("transformers"):
            values = {**values, "parallelism": _on_all_gpus(values.get("parallelism", {}))}
        if values.get("trainer", "sft") == "sft":
            return values
        loop: Any = values.get("loop", {})
        if isinstance(loop, (Mapping, Loop)):
            loop = {**dict(cast(Mapping[str, Any], loop)), "trainer": True}
        values = {"profile": "trl", **values, "loop": loop}
        if values["trainer"] != "reward" or str(values["profile"]).startswith("llamafactory"):
            return values  # LLaMA-Factory scores next to the language model's head
        return {"objective": "sequence_classification", **values}

    def written(self, values: dict[str, Any]) -> dict[str, Any]:
        """Leave out what only a trainer of TRL has, if the run has none."""
        own = ("trainer", "reference", "roles", "rollout")
        dropped = own if all(is_default(self, name) for name in own) else own[2:3] * is_default(self, "roles")
        return {k: v for k, v in values.items() if k not in dropped}


def _on_all_gpus(parallelism: Any) -> Any:
    """Return the parallelism, with a device_map if all it says is a number of GPUs."""
    if not isinstance(parallelism, Mapping):
        return parallelism
    given = dict(cast(Mapping[str, Any], parallelism))
    return {**given, "device_map": "auto"} if given.keys() == {"world"} and given["world"] != 1 else given


def is_default(run: RunSpec, part: str) -> bool:
    """Return whether a part of the run says nothing."""
    value, default = getattr(run, part), RunSpec.defaults[part]
    return value is default or value == default


def changed(run: RunSpec, part: str, **values: Any) -> RunSpec:
    """Return a copy of the run with `values` set in one part; a `sequence` is that of all. Raises MemplanError."""
    old: Part = getattr(run, part)
    equal = {"lengths": None, "batching": None} if "sequence" in values else {}
    return RunSpec.model_validate({**dict(run), part: {**dict(old), **equal, **values}})
