"""A run's sequence lengths, resolved for its model, and the axes that its images add."""

from __future__ import annotations

from memplan.core.errors import refused
from memplan.models.facts import Family
from memplan.models.model import ModelSpec
from memplan.spec.run import Batch

_IMAGES_PROFILE = "transformers-5"
_MEDIA = (
    ("batch.images", "images"),
    ("batch.frames", "pictures of a video"),
    ("batch.clips", "windows of audio clips"),
)


def image_axes(model: ModelSpec, batch: Batch, profile: str) -> tuple[tuple[str, int], ...]:
    """Return the axes set by the images or audio clips of a batch, as (axis, size) pairs.

    Raises SpecError if the model has no tower for them or they do not fit the sequence.
    """
    if batch.image_size is not None and not (batch.images or batch.frames):
        raise refused("batch.image_size", "there are no images; set batch.images too")
    if batch.clip_seconds is not None and not batch.clips:
        raise refused("batch.clip_seconds", "there are no audio clips; set batch.clips too")
    if not batch.sees:
        return ()
    from memplan.models.configs.images import axes_of, pictures_of

    field, what = next(words for words in _MEDIA if getattr(batch, words[0].removeprefix("batch.")))
    check_sees(model, field)
    if profile != _IMAGES_PROFILE:
        raise refused(field, f"needs profile {_IMAGES_PROFILE}, not {profile}")
    count, picture = pictures_of(model, *batch.seen)
    tokens = count * picture.tokens
    if tokens > batch.sequence:
        raise refused(
            field,
            f"{count} {what} of {picture.tokens} tokens each do not fit batch.sequence {batch.sequence}, which must be "
            f"at least {tokens}",
        )
    return tuple(axes_of(model, count, picture).items())


def check_sees(model: ModelSpec, field: str) -> None:
    """Raise SpecError if the model has no tower for what the field counts, or one that is not supported yet."""
    from memplan.models.configs.images import takes_images

    hears = field == "batch.clips"
    if takes_images(model, hears):
        return
    key, name, what = (
        ("audio_config", "audio encoder", "clips") if hears else ("vision_config", "vision tower", "images")
    )
    if not model.part(key):
        raise refused(field, f"{model.name or model.model_type} has no {name}")
    raise refused(field, f"{what} are not supported yet for {model.model_type}; supported: 0 (text only)")


def decoder_prompt_tokens(batch: Batch, row: Family) -> int:
    """Return how many tokens an encoder-decoder's decoder starts generating from."""
    return batch.target_sequence or row.generation.prompt_tokens


def with_lengths(batch: Batch, model: ModelSpec, generates: bool = False) -> Batch:
    """Return the batch with its lengths filled in: what the encoder reads, and what its decoder is given.

    If the run `generates`, the decoder's length is that of its prompt, else of its whole sequence.
    Raises SpecError for lengths that the model does not accept.
    """
    name = model.name or model.model_type
    fixed = model.only_sequence
    if fixed is not None and batch.sequence not in (fixed, Batch().sequence):
        raise refused(
            "batch.sequence", f"the encoder of {name} always reads {fixed} tokens, not {batch.sequence}; leave it out"
        )
    if not model.is_encoder_decoder:
        if batch.target_sequence is not None:
            raise refused("batch.target_sequence", f"{name} is not an encoder-decoder; use batch.sequence")
        return batch if fixed is None else batch.model_copy(update={"sequence": fixed})
    sequence = fixed or batch.sequence
    if generates:
        target, new_tokens = decoder_prompt_tokens(batch, model.family), batch.new_tokens
        if model.longest_target is not None and target + new_tokens > model.longest_target:
            raise refused(
                "batch.new_tokens",
                f"{new_tokens} new tokens after a decoder prompt of {target} exceed the {model.longest_target} "
                f"learned positions of {name}; at most {max(0, model.longest_target - target)} fit",
            )
        return batch.model_copy(update={"sequence": sequence, "target_sequence": target})
    target = batch.target_sequence or (fixed and model.longest_target) or sequence
    if model.longest_target is not None and target > model.longest_target:
        raise refused(
            "batch.target_sequence",
            f"{target} tokens exceed the {model.longest_target} learned positions of {name}'s decoder",
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
        raise refused(
            "batch.sequence",
            f"{batch.sequence} tokens exceed the {most} learned positions of {model.name or model.model_type}",
        )
    return f"sequence {batch.sequence} exceeds the {most} positions of the model's config"
