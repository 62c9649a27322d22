"""How long a run's sequences are, for the model that reads them, and what its images make of them."""

from __future__ import annotations

from memplan.core.errors import SpecError
from memplan.models.model import ModelSpec
from memplan.spec.run import Batch, RunSpec

_SEEN = "transformers-5"  # the profile whose vision-language models are counted with images


def axes_of_images(model: ModelSpec, run: RunSpec) -> tuple[tuple[str, int], ...]:
    """The axes that the images of the run decide. Raises SpecError where the model sees none, or they do not fit."""
    batch, called = run.batch, model.name or model.model_type
    if not batch.images:
        if batch.image_size is not None:
            raise SpecError("batch.image_size: the size of no image; say batch.images too", "batch.image_size")
        return ()
    from memplan.models.configs.images import axes_of, picture_of, sees
    from memplan.models.configs.vision import is_vision

    if not is_vision(model.model_type) and not model.part("vision_config"):
        raise SpecError(f"batch.images: {called} has no vision tower", "batch.images")
    if not sees(model.model_type):
        raise SpecError(
            f"batch.images: what the tower of {model.model_type} takes for images is not supported yet; supported: 0, "
            "text alone",
            "batch.images",
        )
    if run.profile != _SEEN:
        raise SpecError(
            f"batch.images: images are counted as profile {_SEEN} has them, not {run.profile}", "batch.images"
        )
    picture = picture_of(model, batch.image_size)
    tokens = batch.images * picture.tokens
    if tokens > batch.sequence:
        raise SpecError(
            f"batch.images: {batch.images} of {picture.tokens} tokens each are more than batch.sequence, "
            f"{batch.sequence}; at least {tokens} hold them",
            "batch.images",
        )
    return tuple(axes_of(model, batch.images, picture).items())


# The tokens that a decoder beside an encoder begins to generate from, where they are not the start token alone: of
# Whisper those of the start, the language, the task and of no timestamps.
# Source: transformers 5.24 models/whisper/generation_whisper.py _retrieve_init_tokens.
_FIRST_TOKENS = {"whisper": 4}


def prompt_of_decoder(batch: Batch, model_type: str) -> int:
    """The tokens of its own that a decoder beside an encoder is given before it generates."""
    return batch.target_sequence or _FIRST_TOKENS.get(model_type, 1)


def lengths(batch: Batch, model: ModelSpec, generates: bool = False) -> Batch:
    """The batch with its lengths: what an encoder of images or recordings reads, and what a decoder beside it is given,
    before it `generates` or in all.

    Raises SpecError for lengths that the model does not take.
    """
    name = model.name or model.model_type
    only = model.only_sequence
    if only is not None and batch.sequence not in (only, Batch().sequence):
        raise SpecError(
            f"batch.sequence: the encoder of {name} reads {only} tokens by its config, not {batch.sequence}; "
            "leave it out",
            "batch.sequence",
        )
    if not model.is_encoder_decoder:
        if batch.target_sequence is not None:
            raise SpecError(
                f"batch.target_sequence: {name} has no decoder beside an encoder; batch.sequence is its length",
                "batch.target_sequence",
            )
        return batch if only is None else batch.model_copy(update={"sequence": only})
    sequence = only or batch.sequence
    if generates:
        target, new = prompt_of_decoder(batch, model.model_type), batch.new_tokens
        if model.longest_target is not None and target + new > model.longest_target:
            raise SpecError(
                f"batch.new_tokens: {new} after {target} that the decoder of {name} begins with, and it has learned "
                f"positions for {model.longest_target}; at most {max(0, model.longest_target - target)}",
                "batch.new_tokens",
            )
        return batch.model_copy(update={"sequence": sequence, "target_sequence": target})
    target = batch.target_sequence or model.longest_target or sequence
    if model.longest_target is not None and target > model.longest_target:
        raise SpecError(
            f"batch.target_sequence: {target} tokens, but the decoder of {name} has learned positions for "
            f"{model.longest_target}",
            "batch.target_sequence",
        )
    return batch.model_copy(update={"sequence": sequence, "target_sequence": target})


def check_batch(batch: Batch, model: ModelSpec) -> str | None:
    """A note where the sequence is longer than the model's positions; SpecError where positions are learned."""
    most = model.longest_sequence
    if most is None or batch.sequence <= most or model.only_sequence is not None:
        return None
    if model.learned_positions:
        raise SpecError(
            f"batch.sequence: {batch.sequence} tokens, but {model.name or model.model_type} has learned positions "
            f"for {most}",
            "batch.sequence",
        )
    return f"sequence {batch.sequence} is beyond the {most} positions of the model's config"
