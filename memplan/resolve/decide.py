"""Fill in every null of a run, for training and inference."""

from __future__ import annotations

from memplan.catalogue.kernels.losses import CHUNK
from memplan.catalogue.methods.methods import ADAPTERS
from memplan.catalogue.parallelism import context_parallel, tensor_parallel
from memplan.catalogue.profiles.profiles import find_profile, profile_settings
from memplan.core.errors import MemplanError
from memplan.models.cards import find_model
from memplan.models.model import ModelSpec, with_objective
from memplan.program.run import ResolvedRun
from memplan.program.stack_facts import tower_dtype
from memplan.resolve.batches import image_axes, with_lengths
from memplan.resolve.defaults import with_new_tokens, with_use_cache
from memplan.resolve.refusals import refuse
from memplan.resolve.training import (
    PEFT_ALPHA,
    decide_training,
    divides_weights,
    fill_optimizer,
    fill_parts,
    fill_precision,
    without_preparation,
)
from memplan.spec.run import RunSpec


def decide(run: RunSpec, model: ModelSpec | None = None) -> ResolvedRun:
    """Return the run with every null filled in. `model` is the run's model, if it has been looked up already.

    Raises SpecError, UnknownNameError, ConfigError or FactsMissingError.
    """
    refuse(run)
    model = with_objective(model or find_model(run.model), run.objective)
    if run.task != "train":
        run = with_use_cache(with_new_tokens(run))
        from memplan.resolve.assisted import with_assistant
        from memplan.resolve.inference import decide_inference

        return with_assistant(run, model, decide_inference(run, model), decide)
    window = model.sliding_window
    pictures = image_axes(model, run)
    batch = with_lengths(run.batch, model)
    decided = decide_training(
        model,
        run.method,
        run.precision,
        run.optimizer,
        run.kernels,
        run.loop,
        run.profile,
        run.gpu,
        run.batch.accumulation > 1,
        window is not None and batch.sequence >= window,
        batch.micro == 1,
        batch.sequence <= CHUNK,
        run.parallelism,
        bool(run.batch.images),
        dict(pictures).get("seen", 0) % 8 != 0,
        run.batch.accumulation if run.parallelism.pp > 1 else 1,
    )
    context_parallel.check_sequence(batch.sequence, decided.structure.graph.degrees)
    tensor_parallel.check_sequence(batch.sequence, decided.structure.graph.degrees)
    loop = with_use_cache(run).loop
    decided = decided._replace(batch=batch, parts={**decided.parts, "batch": batch, "loop": loop})
    if not pictures:
        return decided
    half = tower_dtype(model, decided.structure.graph.recipe) != "fp32"
    return decided._replace(pictures=(*pictures, ("tower_half", int(half))))


def objective_of(run: RunSpec) -> str:
    """Return the objective of the run's model; causal_lm if memplan does not know its family."""
    try:
        return with_objective(find_model(run.model), run.objective).objective
    except MemplanError:
        return run.objective or "causal_lm"


def fill_from_profile(run: RunSpec) -> RunSpec:
    """Return the run with its profile's defaults filled in, as they are for any model. Raises UnknownNameError."""
    run = with_use_cache(with_new_tokens(run))
    words = profile_settings(find_profile(run.profile).name, "", run.method.quantization is not None)
    method = without_preparation(run.method) if divides_weights(run.parallelism) else run.method
    method, optimizer, kernels = fill_parts(method, run.optimizer, run.kernels, run.precision, words)
    return run.model_copy(update={"method": method, "optimizer": optimizer, "kernels": kernels})


def fill_defaults(run: RunSpec) -> RunSpec:
    """Return the run with every null of its parts filled in, as an answer shows them, for any model.

    Raises as `filled` does.
    """
    run = fill_from_profile(run)
    alpha = {"alpha": run.method.alpha or PEFT_ALPHA} if run.method.kind in ADAPTERS else {}
    return run.model_copy(
        update={
            "method": run.method.model_copy(update=alpha),
            "precision": fill_precision(run.precision),
            "optimizer": fill_optimizer(run.optimizer),
        }
    )
