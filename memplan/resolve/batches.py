"""A run's sequence lengths, resolved for its model, and the axes that its images add."""

from __future__ import annotations

from memplan.core.errors import SpecError
from memplan.models.model import ModelSpec
from memplan.spec.run import Batch, RunSpec

_IMAGES_PROFILE = "transformers-5"  # the only profile whose vision-language models are counted with images


def image_axes(model: ModelSpec, run: RunSpec) -> tuple[tuple[str, int], ...]:
    """Return the axes set by the run's images, as (axis, size) pairs.

    Raises SpecError if the model has no vision tower or the images do not fit the sequence.
    """
    batch, name = run.batch, model.name or model.model_type
    if not batch.images:
        if batch.image_size is not None:
            raise SpecError("batch.image_size: there are no images; set batch.images too", "batch.image_size")
        return ()
    from memplan.models.configs.images import axes_of, picture_of, takes_images
    from memplan.models.configs.vision import is_vision

    if not is_vision(model.model_type) and not model.part("vision_config"):
        raise SpecError(f"batch.images: {name} has no vision tower", "batch.images")
    if not takes_images(model.model_type):
        raise SpecError(
            f"batch.images: images are not supported yet for {model.model_type}; supported: 0 (text only)",
            "batch.images",
        )
    if run.profile != _IMAGES_PROFILE:
        raise SpecError(f"batch.images: needs profile {_IMAGES_PROFILE}, not {run.profile}", "batch.images")
    picture = picture_of(model, batch.image_size)
    tokens = batch.images * picture.tokens
    if tokens > batch.sequence:
        raise SpecError(
            f"batch.images: {batch.images} images of {picture.tokens} tokens each do not fit batch.sequence "
            f"{batch.sequence}, which must be at least {tokens}",
            "batch.images",
        )
    return tuple(axes_of(model, batch.images, picture).items())


# Tokens a decoder starts generating from, if more than the start token. Whisper: start, language, task, no timestamps.
# Source: transformers 5.24 models/whisper/generation_whisper.py _retrieve_init_tokens.
_PROMPT_TOKENS = {"whisper": 4}


def decoder_prompt_tokens(batch: Batch, model_type: str) -> int:
    """Return how many tokens an encoder-decoder's decoder starts generating from."""
    return batch.target_sequence or _PROMPT_TOKENS.get(model_type, 1)


def with_lengths(batch: Batch, model: ModelSpec, generates: bool = False) -> Batch:
    """Return the batch with its lengths filled in: what the encoder reads, and what its decoder is given.

    If the run `generates`, the decoder's length is that of its prompt, else of its whole sequence.
    Raises SpecError for lengths that the model does not accept.
    """
    name = model.name or model.model_type
    fixed = model.only_sequence
    if fixed is not None and batch.sequence not in (fixed, Batch().sequence):
        raise SpecError(
            f"batch.sequence: the encoder of {name} always reads {fixed} tokens, not {batch.sequence}; leave it out",
            "batch.sequence",
        )
    if not model.is_encoder_decoder:
        if batch.target_sequence is not None:
            raise SpecError(
                f"batch.target_sequence: {name} is not an encoder-decoder; use batch.sequence",
                "batch.target_sequence",
            )
        return batch if fixed is None else batch.model_copy(update={"sequence": fixed})
    sequence = fixed or batch.sequence
    if generates:
        target, new_tokens = decoder_prompt_tokens(batch, model.model_type), batch.new_tokens
        if model.longest_target is not None and target + new_tokens > model.longest_target:
            raise SpecError(
                f"batch.new_tokens: {new_tokens} new tokens after a decoder prompt of {target} exceed the "
                f"{model.longest_target} learned positions of {name}; at most "
                f"{max(0, model.longest_target - target)} fit",
                "batch.new_tokens",
            )
        return batch.model_copy(update={"sequence": sequence, "target_sequence": target})
    target = batch.target_sequence or model.longest_target or sequence
    if model.longest_target is not None and target > model.longest_target:
        raise SpecError(
            f"batch.target_sequence: {target} tokens exceed the {model.longest_target} learned positions of {name}'s "
            "decoder",
            "batch.target_sequence",
        )
    return batch.model_copy(update={"sequence": sequence, "target_sequence": target})


def check_batch(batch: Batch, model: ModelSpec) -> str | None:
    """Return a note if the sequence is longer than the model's positions.

    Raises SpecError if those positions are learned.
    """
    most = model.longest_sequence
    if most is None or batch.sequence <= most or model.only_sequence is not None:
        return None
    if model.learned_positions:
        raise SpecError(
            f"batch.sequence: {batch.sequence} tokens exceed the {most} learned positions of "
            f"{model.name or model.model_type}",
            "batch.sequence",
        )
    return f"sequence {batch.sequence} exceeds the {most} positions of the model's config"
