"""Fill in every null of a run, for training and inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from operator import itemgetter
from typing import Any, cast

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.kernels.losses import loss_chunks
from memplan.catalogue.kernels.packing import packed_rows
from memplan.catalogue.kernels.wiring import TRAINERS
from memplan.catalogue.methods.methods import LORA
from memplan.catalogue.parallelism import context_parallel, tensor_parallel
from memplan.catalogue.profiles.profile_table import known_name
from memplan.catalogue.profiles.profiles import library_behaviour
from memplan.core.cached_property import cached_property
from memplan.core.errors import MemplanError, errors_about
from memplan.models.cards import find_model
from memplan.models.model import ModelSpec, with_objective
from memplan.program.graph import Graph, TensorGroup, operations_of, tensor_group
from memplan.program.run import ResolvedRun
from memplan.program.sharding.choice import sharding_of
from memplan.program.stack_facts import tower_dtype
from memplan.program.structure import Structure
from memplan.program.training.program import program
from memplan.resolve.batches import image_axes, with_lengths
from memplan.resolve.card import GPUFacts, find_card
from memplan.resolve.defaults import (
    PEFT_ALPHA,
    defaults_of,
    fill_optimizer,
    fill_parts,
    fill_precision,
    loop_with_use_cache,
    with_defaults,
    with_new_tokens,
    with_use_cache,
)
from memplan.resolve.kernels import FLASH_PACKAGES
from memplan.resolve.open_run import BatchFacts, Parts
from memplan.resolve.parallelism import divides_weights
from memplan.resolve.ranks import without_preparation
from memplan.resolve.refusals.across_parts import contradictions
from memplan.resolve.refusals.refuse import refuse
from memplan.resolve.refusals.vendors import not_on
from memplan.resolve.roles import critic_run, depends_on_lengths, graphs_of_roles, logits_of_completions, models_of
from memplan.resolve.training import decide_training
from memplan.spec.run import Batch, RunSpec, is_default


def decide(run: RunSpec, model: ModelSpec | None = None) -> ResolvedRun:
    """Return the run with every null filled in. `model` is the run's model, if it has been looked up already.

    Raises SpecError, UnknownNameError, ConfigError or FactsMissingError.
    """
    return Resolver.of(run, model).on(run.gpu, run.batch)


_Pictures = tuple[tuple[str, int], ...]
_Lengths = tuple[Batch, int, BatchFacts, _Pictures]  # as `Resolver.lengths` returns them
_SHARED = tuple(name for name in RunSpec.defaults if name not in ("batch", "gpu"))
_SHARED_OF_BATCH = tuple(name for name in Batch.defaults if name not in ("micro", "sequence"))
_shared = cast(Callable[[Any], Any], itemgetter(*_SHARED))
_shared_of_batch = cast(Callable[[Any], Any], itemgetter(*_SHARED_OF_BATCH))
_MOST_KEPT = 512  # results of a resolver, by GPU and facts about the batch


@lru_cache(maxsize=512)
def _consistent(shared: tuple[Any, ...], of_batch: tuple[Any, ...]) -> RunSpec:
    """Return a run with these parts, of any lengths and without a GPU, and the profile that counts.

    Raises SpecError if parts contradict each other.
    """
    given = set[str]()
    batch = Batch.model_construct(given, **dict(zip(_SHARED_OF_BATCH, of_batch, strict=True)))
    run = with_known_profile(RunSpec.model_construct(given, **dict(zip(_SHARED, shared, strict=True)), batch=batch))
    refuse(contradictions(run))
    return run


class Resolver:
    """Fills in every null of runs that differ only in their GPU, micro-batch and sequence length: what none of these
    decides is found once.

    run    one of the runs, with the profile that counts
    model  its model, with the head that it trains
    """

    def __init__(self, run: RunSpec, model: ModelSpec) -> None:
        self._run, self._model = run, model
        self._last: tuple[Batch, _Lengths] | None = None
        self._trained: dict[tuple[str | None, BatchFacts, int], ResolvedRun] = {}

    @classmethod
    def of(cls, run: RunSpec, model: ModelSpec | None = None) -> Resolver:
        """Return what fills in this run. Arguments and errors as of `decide`."""
        if run.task == "train":
            alike = _consistent(_shared(vars(run)), _shared_of_batch(vars(run.batch)))
            return _resolver(alike, with_objective(model or find_model(run.model), run.objective))
        run = with_known_profile(run)
        refuse(contradictions(run))
        return cls(run, with_objective(model or find_model(run.model), run.objective))

    def on(self, name: str | None, batch: Batch) -> ResolvedRun:
        """Return the run of a batch on the GPU with this name, or without one. Errors as of `decide`."""
        gpu, card = _card_of(self._run, name)
        if self._run.task != "train":
            run = with_use_cache(with_new_tokens(self._run.model_copy(update={"gpu": name, "batch": batch})))
            from memplan.resolve.assisted import with_assistant
            from memplan.resolve.inference import decide_inference

            return with_assistant(run, self._model, decide_inference(run, self._model, run.task == "generate"), decide)
        lengths = self.lengths(batch)
        key = name, lengths[2], batch.micro if self._rows_decide else batch.micro == 1
        decided = self._trained.get(key)
        if decided is not None and decided.colocated is not None:
            from memplan.resolve.colocated import at_lengths, colocated_settings

            engine = at_lengths(decided.colocated, colocated_settings(self._run, name, lengths[0], self._model))
            decided = None if engine is None else decided._replace(colocated=engine)
        if decided is None:
            run = self._run.model_copy(update={"gpu": name, "batch": batch})
            decided = _train(with_new_tokens(run), self._model, gpu, card, lengths)
            if self._is_alike(decided):
                decided = decided._replace(alike=object())
                if len(self._trained) >= _MOST_KEPT:
                    self._trained.clear()
                self._trained[key] = decided
            return decided
        _check_sequence(decided, lengths[0])
        return decided._replace(batch=lengths[0], parts={**decided.parts, "batch": lengths[0]})

    @cached_property
    def _rows_decide(self) -> bool:
        """Whether each micro-batch of the training run has a structure of its own."""
        return TRAINERS[self._run.trainer].own_loop or self._run.rollout == "colocate"

    def _is_alike(self, decided: ResolvedRun) -> bool:
        """Whether lengths decide no more of the structure of the training run than the facts about the batch say."""
        if decided.critic is not None:
            return False
        if is_default(self._run, "roles"):
            return True
        batch, reward = decided.batch, models_of(self._run).get("reward")
        if reward is not None and batch.micro == 1 and 1 in (batch.accumulation, reward.micro):
            return False  # it scores one sequence
        return not any(depends_on_lengths(graph.model) for _, graph in decided.structure.graph.roles)

    @cached_property
    def _generated(self) -> dict[str, int]:
        """The fields of the batch that the trainer fills in."""
        batch = with_new_tokens(self._run).batch
        is_filled = batch is not self._run.batch
        return {"new_tokens": batch.new_tokens, "generations": batch.generations} if is_filled else {}

    def lengths(self, batch: Batch) -> _Lengths:
        """Return the batch with its lengths filled in, its tokens, the facts about it, and the axes of its images."""
        last = self._last  # of any thread
        if last is not None and last[0] is batch:
            return last[1]
        run, model, given, window = self._run, self._model, batch, self._model.sliding_window
        sees, is_single, trainer, packed = batch.sees, batch.micro == 1, TRAINERS[run.trainer], None
        pictures = image_axes(model, batch, run.profile)
        batch = with_lengths(batch.model_copy(update=self._generated) if self._generated else batch, model)
        length = batch.tokens + run.method.virtual_tokens
        if batch.packing and trainer.packs:
            packed = packed_rows(batch.packing, run.kernels.attention in FLASH_PACKAGES, is_single)
        if packed is not None and packed.is_one_row:
            length, is_single = length * batch.micro * trainer.rows, True
        facts = BatchFacts(
            accumulates=batch.accumulation > 1,
            windowed=window is not None and length >= window,
            is_single_sequence=is_single,
            loss_chunks=loss_chunks(batch.micro, length),
            scans_once=length <= model.scan_chunk,
            is_one_image=is_single and dict(pictures).get("images") == 1,
            has_uneven_patches=sees and dict(pictures).get("seen", 0) % 8 != 0,
            media=batch.media,
            pads_tower=sees and dict(pictures).get("unread", 0) > 0,
            microbatches=batch.accumulation if run.parallelism.pp > 1 else 1,
            ungrouped=_ungrouped(run, batch) if batch.generations and run.roles.value is None else "",
            packing=batch.packing or "",
            packed=packed,
        )
        found = batch, length, facts, pictures
        self._last = given, found
        return found


_resolver = lru_cache(maxsize=512)(Resolver)


@lru_cache(maxsize=1024)
def _card_of(run: RunSpec, name: str | None) -> tuple[GPU | None, GPUFacts | None]:
    """Return a GPU and its facts, or None for both without a name. Raises SpecError for a run that it does not run."""
    gpu, card = find_card(name, run.parallelism.world > 1) if name is not None else (None, None)
    if gpu is not None:
        refuse(not_on(gpu, run))
    return gpu, card


def _train(run: RunSpec, model: ModelSpec, gpu: GPU | None, card: GPUFacts | None, lengths: _Lengths) -> ResolvedRun:
    (batch, length, facts, pictures), others = lengths, tuple[tuple[str, Graph], ...]()
    if not is_default(run, "roles"):
        others = graphs_of_roles(run, model, length, facts, card, decide_training, decide)
    decided = decide_training(model, Parts.of(run), card, facts, others)
    _check_sequence(decided, batch)
    loop = loop_with_use_cache(run.loop, trains=True)
    if pictures:
        half = tower_dtype(model, decided.structure.graph.recipe) != "fp32"
        pictures = (*pictures, ("tower_half", int(half)))
    if batch.new_tokens:
        pictures = (*pictures, ("completion", batch.new_tokens), ("accumulation", batch.accumulation))
    parts = {**decided.parts, "batch": batch, "loop": loop}
    if TRAINERS[run.trainer].own_loop:
        kept = logits_of_completions(batch, decided.structure.graph)
        decided = decided._replace(structure=decided.structure._replace(engine=(kept,)))
    step = decided.structure.graph.trainer
    if step is not None and step.copies_adapters:
        adapters = (w for w in sharding_of(decided.structure).weights() if ".lora_" in w.what)
        reference = tuple(w._replace(what=f"ref.{w.what}") for w in adapters)
        decided = decided._replace(structure=decided.structure._replace(engine=reference))
    if run.rollout == "colocate":
        from memplan.resolve.colocated import asleep, awake, colocated_budget, colocated_settings

        engine = colocated_budget(colocated_settings(run, run.gpu, batch, model))
        held = (*(() if run.serving.sleep else awake(engine, run.profile)), *asleep(engine))
        held = (*decided.structure.engine, *held)
        decided = decided._replace(structure=decided.structure._replace(engine=held), colocated=engine)
        own = {"tensor_parallel": run.serving.tensor_parallel, "trainer_offload": run.serving.trainer_offload}
        update = {"sleep": bool(run.serving.sleep), **own}
        parts["serving"] = engine.settings.serving.model_copy(update=update)
    update = critic_run(run)
    if update is not None:
        with errors_about("roles.value.model"):
            critic = decide(update)
        held = (*decided.structure.engine, *_resident_critic(critic.structure))
        decided = decided._replace(structure=decided.structure._replace(engine=held), critic=critic)
    return decided._replace(batch=batch, gpu=gpu, pictures=pictures, parts=parts)


def _check_sequence(decided: ResolvedRun, batch: Batch) -> None:
    """Raise SpecError if GPUs cannot divide the sequence."""
    degrees = decided.structure.graph.degrees
    if degrees.cp > 1:
        context_parallel.check_sequence(batch.sequence, degrees)
    if degrees.tp > 1:
        tensor_parallel.check_sequence(batch.sequence, degrees)


def _resident_critic(structure: Structure) -> Iterator[TensorGroup]:
    """Yield what a critic holds between its updates: its weights, the states of its optimizer, and buffers."""
    p, sharding, axes = program(structure), sharding_of(structure), operations_of(structure.graph)[1]
    for w in sharding.weights():
        shape = " ".join(str(axes.get(axis, axis)) for axis in w.shape.split())  # the policy's differ
        yield w._replace(what=f"value.{w.what}", shape=shape)
    for s in (s for s in sharding.optimizer().states if not s.host):
        what, shape = f"value.{s.parameter} {s.what}", " ".join(map(str, s.shape))
        yield TensorGroup("optstate", what, "optimizer", shape, s.dtype, s.count, s.bytes, p.optimizer.source)
    buffers = p.between_steps(0) - p.parameters - p.states
    if buffers:
        yield tensor_group("other", "value.buffers", buffers, "uint8", "the critic's update", "critic")


def _ungrouped(run: RunSpec, batch: Batch) -> str:
    """Return why a step's completions are not those of whole prompts; empty if they are, or none are generated.

    Some trainers generate one completion of a prompt, and a critic compares none.

    Source: trl 1.16.0 trainer/grpo_config.py __post_init__: generation_batch_size.
    """
    replicas, group = run.parallelism.dp, batch.generations
    completions = batch.micro * batch.accumulation * replicas
    if TRAINERS[run.trainer].completions == 1:
        return "" if group == 1 else "this trainer generates one completion of a prompt; use 1"
    if group == 1:
        takes_one = library_behaviour(run.profile, "", False).trainer.takes_one
        return "" if takes_one else "needs at least 2 completions of a prompt, to compare them"
    if completions % group == 0:
        return ""
    parts = batch.accumulation * replicas
    micro = next(n for n in range(batch.micro, batch.micro + group) if n * parts % group == 0)
    return (
        f"{group} completions of a prompt do not divide the {completions} that a step generates (micro x accumulation "
        f"x GPUs); use --batch-size {micro}, or other --gpus or --generations"
    )


def with_known_profile(run: RunSpec) -> RunSpec:
    """Return the run with the profile that counts for the version it names."""
    known = known_name(run.profile)
    return run if known == run.profile else run.model_copy(update={"profile": known})


def profile_note(run: RunSpec) -> Iterator[str]:
    """Yield a note if another profile counts for the version that the run names."""
    known = known_name(run.profile)
    if known != run.profile:
        yield f"profile: {run.profile} is counted as {known}, the nearest version at or below it"


def objective_of(run: RunSpec) -> str:
    """Return the objective of the run's model; causal_lm if memplan does not know its family."""
    try:
        return with_objective(find_model(run.model), run.objective).objective
    except MemplanError:
        return run.objective or "causal_lm"


def fill_from_profile(run: RunSpec) -> RunSpec:
    """Return the run with its profile's defaults filled in, as they are for any model. Raises UnknownNameError."""
    run = with_use_cache(with_new_tokens(run))
    defaults = defaults_of(library_behaviour(run.profile, "", run.method.quantization is not None), run.trainer)
    method = without_preparation(run.method) if divides_weights(run.parallelism) else run.method
    method, optimizer, kernels = fill_parts(method, run.optimizer, run.kernels, run.precision, defaults)
    return run.model_copy(update={"method": method, "optimizer": optimizer, "kernels": kernels})


def fill_defaults(run: RunSpec) -> RunSpec:
    """Return the run with every null of its parts filled in, as an answer shows them, for any model.

    Raises as `filled` does.
    """
    run = fill_from_profile(run)
    alpha = {"alpha": run.method.alpha or PEFT_ALPHA} if run.method.kind in LORA else {}
    return run.model_copy(
        update={
            "method": run.method.model_copy(update=alpha),
            "precision": fill_precision(run.precision),
            "kernels": with_defaults(run.kernels, attention="sdpa"),
            "optimizer": fill_optimizer(run.optimizer),
        }
    )
