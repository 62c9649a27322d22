"""The generation in a step of TRL's trainers that generate: completions for all the step's micro-batches at once.

It is a `SideTask` between two steps: optimizer states exist, gradients do not. The policy generates without its
checkpoints and without autograd. Its forward is the one that accelerate wraps in autocast and a cast of the logits to
fp32; with adapters that is peft's, and `generate` calls the model inside, without either.

Source: trl 1.16.0 trainer/grpo_trainer.py _generate_single_turn, models/utils.py unwrap_model_for_generation;
accelerate 1.15 accelerator.py prepare_model.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from memplan.catalogue.inference.one_pass import Cache, Pass
from memplan.catalogue.kernels.wiring import TRAINERS
from memplan.catalogue.methods.methods import ADAPTERS
from memplan.catalogue.profiles.profiles import library_behaviour
from memplan.core.units import gib
from memplan.estimate.side_task import SideTask
from memplan.estimate.side_tasks import evaluation, evaluation_run, generated_passes, generation
from memplan.estimate.training_peaks import TrainingPeaks, training_peaks
from memplan.models.cards import find_model
from memplan.program.graph import Graph, TensorGroup, reference_of, tensor_group, total_bytes, without_gradients
from memplan.program.inference.passes import InferenceStep, sized
from memplan.program.inference.steps import steps_of
from memplan.program.run import ResolvedRun
from memplan.program.sharding.choice import sharding_of
from memplan.program.sharding.sharding import Sharding
from memplan.resolve.decide import decide
from memplan.resolve.defaults import with_new_tokens
from memplan.resolve.roles import critic_run, decided_at, rollout_chunk, scoring_pass
from memplan.spec.roles import Roles
from memplan.spec.run import Batch, RunSpec, changed
from memplan.spec.training import Evaluation

_LOGITS = "trl 1.12.0 experimental/ppo/ppo_trainer.py generate, batch_generation; the same in trl 0.24.0"
_BATCH = "trl 1.16.0 trainer/grpo_trainer.py _prepare_inputs: _buffered_inputs"


def rollout(run: RunSpec, walked: TrainingPeaks, decided: ResolvedRun) -> tuple[SideTask, ...]:
    """Return the generation of a step's completions, and the reward model's pass over them; then that of each batch of
    an evaluation. If other GPUs generate, return the push of weights to them if it gathers any.

    Raises SpecError if the model cannot generate.
    """
    e, steps = run.also.evaluation, _ppo if TRAINERS[run.trainer].own_loop else _tasks
    return (*steps(run, walked, decided), *(() if e is None else _evaluated(run, walked, decided, e)))


def _evaluated(run: RunSpec, walked: TrainingPeaks, decided: ResolvedRun, e: Evaluation) -> Iterator[SideTask]:
    """Yield what an evaluation does of a step's tasks. PPO's generates a batch at once, and scores it while a variable
    holds the logits."""
    alone = evaluation_run(run.model_copy(update=decided.parts), e)
    inside = decide(alone)._replace(critic=None)
    if not TRAINERS[run.trainer].own_loop:
        tasks = _tasks(alone, walked, inside)
        yield from (task._replace(phase="eval", where=f"{task.phase}: {task.where}") for task in tasks)
        return
    shape = f"{e.micro} {inside.batch.new_tokens} {inside.structure.graph.model.vocab_size}"
    logits = tensor_group("activation", "logits of the evaluation", shape, "fp32", _LOGITS, "generate")
    generated, _, *rewards = _ppo(alone, walked, inside, e.micro)
    yield generated._replace(phase="eval", where=f"generate: {generated.where}")
    yield from (reward._replace(phase="eval", held=(*reward.held, logits)) for reward in rewards)


def _tasks(run: RunSpec, walked: TrainingPeaks, decided: ResolvedRun) -> Iterator[SideTask]:
    sharding = sharding_of(decided.structure)
    yield from _generation(run, walked, decided)
    if run.batch.scored > run.batch.micro:
        yield from _log_probs(run, walked, decided)
    if "reward" in dict(decided.structure.graph.roles):
        yield _scoring(with_new_tokens(run), walked, sharding)
    if decided.critic is not None:
        yield _critic(decided.critic, walked, run)


def _log_probs(run: RunSpec, walked: TrainingPeaks, decided: ResolvedRun) -> Iterator[SideTask]:
    """Yield the passes for log-probabilities before the step, over more completions than one of its micro-batches has:
    those of an evaluation of as many."""
    rows, standing = run.batch.scored, walked.program.between_steps(walked.workspace)
    alone = changed(run.model_copy(update=decided.parts), "batch", generations=rows)
    for task in evaluation(alone, Evaluation(micro=rows), walked, None, standing):
        moved = _without(task, "optimizer" in (run.serving.trainer_offload or ()), optimizer=walked.program.states)
        yield moved._replace(phase="rollout", where=f"log-probabilities: {task.where}")


def elsewhere(run: RunSpec) -> Iterator[str]:
    """Yield what a critic takes that trains on GPUs of its own, if the run has one."""
    value = run.roles.value
    if value is None or value.location == "gpu" or TRAINERS[run.trainer].own_loop:
        return
    here = run.roles.model_copy(update={"value": value.model_copy(update={"location": "gpu"})})
    critic = critic_run(with_new_tokens(run.model_copy(update={"roles": here})))
    assert critic is not None
    each = gib(training_peaks(decide(critic)).top.peak)
    yield f"the critic on GPUs of its own: {each} allocated on each, if they are {run.parallelism.world:,} too"


def _critic(critic: ResolvedRun, walked: TrainingPeaks, run: RunSpec) -> SideTask:
    """Return the update of a critic, next to what the policy holds between its steps."""
    alone = training_peaks(critic)
    top, standing = alone.top, walked.program.between_steps(walked.workspace)
    own = max(top.peak - alone.program.between_steps(alone.workspace), 0)
    held = tensor_group("gradient", "gradients and activations", own, "uint8", "the critic's update", "critic")
    task = SideTask("critic", f"{top.phase}: {top.where}", standing, (held,))
    return _without(task, "optimizer" in (run.serving.trainer_offload or ()), optimizer=walked.program.states)


def _scoring(run: RunSpec, walked: TrainingPeaks, sharding: Sharding) -> SideTask:
    """Return the reward model's pass over a step's completions."""
    scoring, batch = scoring_pass(run, decide), run.batch
    step = steps_of(scoring)[0]
    keeps = library_behaviour(run.profile, step.graph.model.model_type, False).trainer.reward_caches
    if keeps and step.graph.model.objectives[0] == "causal_lm" and step.graph.inference is not None:
        wiring, one_pass = step.graph.wiring._replace(caching=True), step.graph.inference._replace(cache="dynamic")
        step = step._replace(graph=step.graph._replace(wiring=wiring, inference=one_pass))
    scored = sized(step, scoring)
    moving, moment, where = scored.peak
    held = (*_batch_before(batch.micro * batch.accumulation, batch.tokens), *sharding.held_in("reward"))
    standing = walked.program.between_steps(walked.workspace)
    return SideTask("reward", where, standing, held, (scored,), (0, moment), moving)


def _generation(run: RunSpec, walked: TrainingPeaks, decided: ResolvedRun) -> tuple[SideTask, ...]:
    structure, batch = decided.structure, decided.batch
    graph, rows = structure.graph, batch.micro * batch.accumulation
    wraps = graph.recipe.kind not in ADAPTERS
    sharding, standing = sharding_of(structure), walked.program.between_steps(walked.workspace)
    held = _batch_before(rows, batch.tokens)
    if run.rollout != "transformers":
        gathered = tuple(sharding.pushed(merges=not wraps))
        pushed = SideTask("generate", "vLLM: weights pushed", standing, (*held, *gathered))
        if decided.colocated is None:
            return (pushed,) if gathered else ()
        moved, p = run.serving.trainer_offload or (), walked.program
        own = p.parameters - total_bytes(structure.engine)
        pushed = _without(pushed, "optimizer" in moved, optimizer=p.states)
        task = _without(pushed, "parameters" in moved, parameters=own)
        from memplan.estimate.colocated import by_engine

        return (by_engine(decided.colocated, task, pushed, run),)
    if TRAINERS[run.trainer].backbone in ("every", run.kernels.loss):  # its step computes in another precision
        one = _several(1).model_copy(update={"micro": batch.micro, "sequence": batch.tokens})
        graph = _decided_alone(one, run, trainer="sft", reference=None, roles=Roles()).structure.graph
    held += tuple(sharding.held_in("generate"))
    library = library_behaviour(run.profile, graph.model.model_type, run.method.quantization is not None)
    ends = graph.recipe.fp32_ends or sharding.generates_with_fp32_ends
    recipe = graph.recipe._replace(autocast=graph.recipe.autocast and wraps, fp32_ends=ends)
    if recipe.sharded_dtype and not wraps:  # FSDP1 casts neither adapters nor their inputs here
        recipe = recipe._replace(adapter_dtype=recipe.sharded_dtype, sharded_dtype="")
    graph = graph._replace(recipe=recipe, trainer=None, checkpoint=False, input_requires_grad=False, hold_outputs=False)
    generated = batch.model_copy(update={"micro": rows, "accumulation": 1})
    prompted = decided._replace(structure=structure._replace(graph=graph), batch=generated, pictures=())
    casts, division = graph.casts_outputs and wraps, sharding.generation_division()
    return (generation(prompted, library, casts, standing, held, samples=True, division=division),)


def _ppo(run: RunSpec, walked: TrainingPeaks, decided: ResolvedRun, at_once: int = 0) -> Iterator[SideTask]:
    """Yield the generation of PPO's step, and the passes of its other models over `at_once` completions.

    PPOTrainer calls the models past the module that accelerate wraps in autocast. Each returns all its states.

    Source: trl 1.12.0 experimental/ppo/ppo_trainer.py train, experimental/utils.py get_reward; the same in trl 0.24.0.
    """
    batch, standing = decided.batch, walked.program.between_steps(walked.workspace)
    sharding = sharding_of(decided.structure)
    graph, rows = _past_autocast(run, decided), batch.micro * batch.accumulation
    chunk, held = at_once or rollout_chunk(rows), _batch_before(rows, batch.tokens)
    library = library_behaviour(run.profile, graph.model.model_type, run.method.quantization is not None)
    generating, *scoring = _models_of_rollout(graph, library.generation.cache)
    passes = generated_passes(_of_rows(decided, generating, chunk), library, False, samples=True)
    task = SideTask("generate", "", standing, (*held, *sharding.held_in("generate")), passes)
    yield _keeping_logits(task, rows, chunk, batch.new_tokens, graph.model.vocab_size)
    tasks: list[SideTask] = []
    for roles, other in scoring:
        step = InferenceStep(other, chunk, batch.sequence)
        passed = sized(step, _of_rows(decided, other, chunk, batch.new_tokens))
        moving, moment, where = passed.peak
        for role in roles:
            phase, gathered = "reward" if role == "reward" else "rollout", sharding.held_in(role)
            at = (passed,), (0, moment), moving
            tasks.append(SideTask(phase, f"{role}: {where}", standing, (*held, *gathered), *at))
    policy, values, *rewards = tasks
    yield max(policy, values, key=lambda task: task.peak)
    yield from rewards


def _past_autocast(run: RunSpec, decided: ResolvedRun) -> Graph:
    """Return the graph of a run, and those of its roles, as its models compute outside of autocast."""
    graph = _without_autocast(decided.structure.graph)
    if graph is not None:
        return graph
    precision = run.precision.model_copy(update={"autocast": False, "compute": None})
    return _decided_alone(decided.batch, run, precision=precision).structure.graph


@lru_cache(maxsize=64)
def _without_autocast(graph: Graph) -> Graph | None:
    """Return the graph and its roles outside of autocast; None if attention then computes in another dtype."""
    recipe, roles = graph.recipe._replace(autocast=False), [(role, _without_autocast(g)) for role, g in graph.roles]
    others = tuple((role, other) for role, other in roles if other is not None)
    dtypes = {graph.recipe.compute, graph.recipe.weights} if graph.recipe.autocast else ()
    if len(dtypes) > 1 or len(others) < len(roles):
        return None
    return graph._replace(recipe=recipe, casts_outputs=False, roles=others)


@lru_cache(maxsize=64)
def _models_of_rollout(graph: Graph, kept: Cache) -> tuple[Graph, *tuple[tuple[tuple[str, ...], Graph], ...]]:
    """Return the policy's graph as it generates, and those of the models that score its completions, by their roles."""
    reference, roles = reference_of(graph), dict(graph.roles)
    assert reference is not None
    value = without_gradients(roles["value"])
    roles["value"] = value._replace(loss="", recipe=value.recipe._replace(keeps=False, copies=""))  # of backward

    def scoring(other: Graph, cache: Cache = "") -> Graph:
        wiring = other.wiring._replace(caching=bool(cache), records=False)
        return other._replace(inference=Pass("score", cache, last_only=False), trainer=reference.trainer, wiring=wiring)

    others: dict[Graph, tuple[str, ...]] = {scoring(reference, kept): ("reference",)}
    for role in ("value", "reward"):
        if role in roles:
            other = scoring(roles[role])
            others[other] = (*others.get(other, ()), role)
    return graph._replace(trainer=None, roles=()), *((names, other) for other, names in others.items())


def _decided_alone(batch: Batch, run: RunSpec, **changes: object) -> ResolvedRun:
    """Return the run with another batch, and with changes."""
    several = _several(min(2, batch.accumulation))
    return decided_at(batch, run.model_copy(update={**changes, "batch": several}), find_model(run.model), decide)


@lru_cache(maxsize=2)
def _several(accumulation: int) -> Batch:
    return Batch(micro=2, accumulation=accumulation)


def _of_rows(decided: ResolvedRun, graph: Graph, rows: int, new_tokens: int = 0) -> ResolvedRun:
    batch = decided.batch.model_copy(update={"micro": rows, "accumulation": 1})
    completion = (("completion", new_tokens), ("accumulation", 1)) if new_tokens else ()
    structure, half = decided.structure._replace(graph=graph), not graph.wiring.has_fp32_inputs
    return decided._replace(structure=structure, batch=batch, half=half, pictures=completion)


def _keeping_logits(task: SideTask, rows: int, chunk: int, tokens: int, words: int) -> SideTask:
    """Return a generation that keeps the logits of all tokens, at its peak.

    It keeps the logits of every pass of a chunk of rows, stacks them, and joins the chunks in a padded copy.

    Source: trl 1.12.0 experimental/ppo/ppo_trainer.py generate, batch_generation; trl 0.24.0 trainer/utils.py.
    """

    def logits(what: str, of: int, tokens: int, copies: int = 1) -> TensorGroup:
        return tensor_group("activation", what, f"{of} {tokens} {words}", "fp32", _LOGITS, "generate", copies)

    before, prompt, last = (rows // chunk - 1) * chunk, task.passes[0], task.passes[-1]
    earlier = (logits("logits of earlier rows", before, tokens),) if before else ()
    passes, stacked = logits("logits of a pass", chunk, 1, tokens), logits("stacked logits", chunk, tokens)
    made = (passes._replace(copies=tokens - 1),) if tokens > 1 else ()
    cache = tensor_group("activation", "keys and values", last.bytes_left(), "uint8", _LOGITS, "generate")
    padded = -(-rows // chunk) * chunk
    joined = (logits("logits of all rows", rows, tokens), logits("their padded copy", padded, tokens))
    (first, *at), (second, *then) = prompt.peak, last.peak
    moments = (
        (first, (0, at[0]), f"{prompt.phase}: {at[1]}", earlier),
        (second, (len(task.passes) - 1, then[0]), f"{last.phase}: {then[1]}", (*earlier, *made)),
        (0, (-1, -1), "stacked logits", (*earlier, passes, stacked, cache)),
        (0, (-1, -1), "padded logits", joined),
    )
    moving, top, where, kept = max(moments, key=lambda moment: moment[0] + total_bytes(moment[3]))
    run = task.passes if moving else ()
    return task._replace(where=where, held=(*task.held, *kept), passes=run, top=top, moving=moving)


def _without(task: SideTask, is_moved: bool, **sizes: int) -> SideTask:
    """Return the task without the bytes of a part of the trainer, if that is on the host meanwhile."""
    if not is_moved:
        return task
    return task._replace(persistent_bytes=task.persistent_bytes - sum(sizes.values()), moved=(*task.moved, *sizes))


def _batch_before(rows: int, tokens: int) -> tuple[TensorGroup, ...]:
    what = "tokens of the generation before"
    ids = tensor_group("activation", what, f"{rows} {tokens}", "int64", _BATCH, "generate")
    return ids, ids._replace(what="their masks")
