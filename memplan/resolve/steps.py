"""The steps that training and inference share, each of which fills in a part of an open run."""

from __future__ import annotations

from memplan.catalogue.attention.attention import FLATTENING
from memplan.catalogue.parallelism import tensor_parallel
from memplan.core.errors import refused
from memplan.core.units import ITEMSIZE
from memplan.models.model import ModelSpec
from memplan.program.stored.checkpoint import notes as stored_notes
from memplan.resolve.defaults import adapted_experts
from memplan.resolve.kernels import (
    attention_compute_dtype,
    attention_wiring,
    runs_varlen,
    separates_rows,
    tower_kernel,
    version_attention,
    with_profile_wiring,
)
from memplan.resolve.notes import SAMPLES_NOTE, kernel_notes, unknown_note, unmasked_note, unseparated_note
from memplan.resolve.open_run import OpenRun
from memplan.resolve.refusals import training as refusals
from memplan.resolve.refusals.models import flex_attention
from memplan.resolve.refusals.refuse import refuse


def write_experts(run: OpenRun) -> None:
    """Rewrite the model's experts as linear layers if the version has them so."""
    model, experts = run.model, run.library.model.experts
    if experts == "modules" and model.family.training.experts_were:
        run.model = ModelSpec({**model.config, "experts_implementation": "modules"}, model.name, model.card)
    elif run.trains and experts != "stacked" and "E" in model.axes() and not run.is_megatron_model:
        raise refused(
            "profile",
            f"the experts of {run.profile} ({experts}) are not supported yet; use transformers-5 or trl-0.24",
        )


def note_card(run: OpenRun) -> None:
    """Note what is unusual about the GPU."""
    if run.card is not None:
        run.notes += run.card.notes


def note_weights(run: OpenRun) -> None:
    """Note what is unusual about the compute dtype, the checkpoint and the model's code."""
    if run.card is not None:
        run.notes += run.card.dtype_notes(str(run.precision.compute))
    run.notes += [
        *stored_notes(run.model),
        *run.checkpoint.notes,
        *kernel_notes(run.model, run.kernels.packages, run.trains),
    ]


def choose_attention(run: OpenRun) -> None:
    """Choose the attention and the checkpointing of this version of the framework."""
    run.attention, run.checkpoints, notes = version_attention(
        run.model, run.kernels, run.profile, run.library, run.capability
    )
    run.attention_dtype = attention_compute_dtype(run.model, run.recipe)
    run.notes += notes
    if not run.library.model.has_family:
        run.notes.append(unknown_note(run.model, run.profile))


def wire(run: OpenRun) -> None:
    """Choose the kernels of attention and of the vision tower, and what the code around them does."""
    library, facts = run.library, run.batch_facts
    passes_mask = library.attention.masks_padding if run.trains else run.code != "litgpt"  # which only masks its cache
    if run.loop.padded and not passes_mask:
        run.notes.append(unmasked_note(run.profile))
    padded = run.loop.padded and passes_mask
    if run.attention == "flex_attention":
        refuse(flex_attention(run))
    args = run.attention_dtype, run.recipe, run.capability, padded, facts.windowed
    wiring = with_profile_wiring(attention_wiring(run.model, library, run.attention, *args), library, run.attention)
    packed = facts.packed
    if packed is not None and not separates_rows(run.model, wiring._replace(packed=packed), run.code):
        packed = packed._replace(mask="", is_varlen=False)
        run.notes.append(unseparated_note(run.model))
    elif packed is not None and packed.mask == "made" and library.attention.sdpa_varlen and runs_varlen(run):
        packed = packed._replace(mask="", is_varlen=True, repeats=library.attention.sdpa_varlen == "repeated")
    elif packed is not None and packed.is_varlen:
        packed = packed._replace(flattens=not library.attention.gives_lengths)
    if packed is not None and packed.is_varlen and packed.repacks:
        run.notes.append(SAMPLES_NOTE)
    run.wiring = wiring._replace(
        packed=packed,
        target=str(run.precision.compute) if packed is not None and packed.mask == "given" else wiring.target,
        is_single_sequence=facts.is_single_sequence
        and (bool(run.model.family.attention.single_sequence) or wiring.backend in FLATTENING),
        scans_once=facts.scans_once,
        has_fp32_inputs=run.attention_dtype == "fp32",
        images=bool(facts.media),
        packages=run.kernels.packages,
        is_one_image=facts.is_one_image,
        pads_image_mask=facts.has_uneven_patches,
        media=facts.media,
        pads_tower=facts.pads_tower,
        tower=tower_kernel(run.model, run.recipe, run.kernels, run.capability) if facts.media else "",
    )


def divide_matrices(run: OpenRun) -> None:
    """Check that tensor parallelism can divide the run."""
    if run.parallelism.tp > 1:
        refuse(refusals.tensor_parallel(run))
        itemsize = ITEMSIZE[run.precision.weights]
        tensor_parallel.check(run.model, run.degrees, itemsize, adapted_experts(run.model, run.method))
