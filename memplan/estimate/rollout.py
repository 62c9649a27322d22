"""The generation in a step of TRL's trainers that generate: completions for all the step's micro-batches at once.

It is a `SideTask` between two steps: optimizer states exist, gradients do not. The policy generates without its
checkpoints and without autograd. Its forward is the one that accelerate wraps in autocast and a cast of the logits to
fp32; with adapters that is peft's, and `generate` calls the model inside, without either.

Source: trl 1.16.0 trainer/grpo_trainer.py _generate_single_turn, models/utils.py unwrap_model_for_generation;
accelerate 1.15 accelerator.py prepare_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from memplan.catalogue.inference.one_pass import Cache, Pass
from memplan.catalogue.kernels.wiring import TRAINERS
from memplan.catalogue.methods.methods import ADAPTERS
from memplan.catalogue.profiles.profiles import library_behaviour
from memplan.core.ir import Division
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE, gib, rounded
from memplan.estimate.side_task import SideTask
from memplan.estimate.side_tasks import evaluation, evaluation_run, generated_passes, generating_graph, generation
from memplan.estimate.training_peaks import TrainingPeaks, training_peaks
from memplan.program.graph import Graph, TensorGroup, reference_of, tensor_group, total_bytes, without_gradients
from memplan.program.inference.passes import InferenceStep, SizedPass, sized
from memplan.program.inference.steps import steps_of
from memplan.program.run import ResolvedRun
from memplan.program.sharding.choice import sharding_of
from memplan.program.sharding.sharding import Sharding
from memplan.program.structure import Structure
from memplan.resolve.decide import decide
from memplan.resolve.defaults import with_new_tokens
from memplan.resolve.roles import critic_run, depends_on_lengths, rollout_chunk, scoring_pass
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


class _Policy(NamedTuple):
    """A policy as it generates, at any lengths.

    structure  of its generation's first pass
    division   how weights are divided among ranks, and gathered in each pass
    gathered   what ranks hold meanwhile
    """

    structure: Structure
    division: Division | None
    gathered: tuple[TensorGroup, ...]


@lru_cache(maxsize=256)
def _policy(run: RunSpec, structure: Structure) -> _Policy:
    """Return the policy of a step's structure, given its run from `_at_any_lengths`."""
    graph, sharding = structure.graph, sharding_of(structure)
    wraps = graph.recipe.kind not in ADAPTERS
    if TRAINERS[run.trainer].backbone in ("every", run.kernels.loss):  # its step computes in another precision
        one = Batch(micro=run.batch.micro, sequence=run.batch.tokens)
        update = {"trainer": "sft", "reference": None, "roles": Roles(), "batch": one}
        graph = decide(run.model_copy(update=update)).structure.graph
    library = library_behaviour(run.profile, graph.model.model_type, run.method.quantization is not None)
    ends = graph.recipe.fp32_ends or sharding.generates_with_fp32_ends
    recipe = graph.recipe._replace(autocast=graph.recipe.autocast and wraps, fp32_ends=ends)
    if recipe.sharded_dtype and not wraps:  # FSDP1 casts neither adapters nor their inputs here
        recipe = recipe._replace(adapter_dtype=recipe.sharded_dtype, sharded_dtype="")
    casts = graph.casts_outputs and wraps
    graph = graph._replace(recipe=recipe, trainer=None, checkpoint=False, input_requires_grad=False, hold_outputs=False)
    generating = structure._replace(graph=generating_graph(graph, library, casts, samples=True))
    return _Policy(generating, sharding.generation_division(), tuple(sharding.held_in("generate")))


def _at_any_lengths(run: RunSpec, decided: ResolvedRun) -> RunSpec:
    """Return the run with a batch that stands for all whose operations are the same: its own if there are no others."""
    batch = decided.batch
    if batch.micro > 1 and not depends_on_lengths(decided.structure.graph.model):
        batch = _several(min(2, batch.accumulation))
    return run.model_copy(update={"batch": batch})


@lru_cache(maxsize=2)
def _several(accumulation: int) -> Batch:
    return Batch(micro=2, accumulation=accumulation)


def _generation(run: RunSpec, walked: TrainingPeaks, decided: ResolvedRun) -> tuple[SideTask, ...]:
    structure, batch = decided.structure, decided.batch
    rows, standing = batch.micro * batch.accumulation, walked.program.between_steps(walked.workspace)
    held = _batch_before(rows, batch.tokens)
    if run.rollout != "transformers":
        gathered = tuple(sharding_of(structure).pushed(merges=structure.graph.recipe.kind in ADAPTERS))
        pushed = SideTask("generate", "vLLM: weights pushed", standing, (*held, *gathered))
        if decided.colocated is None:
            return (pushed,) if gathered else ()
        moved, p = run.serving.trainer_offload or (), walked.program
        own = p.parameters - total_bytes(structure.engine)
        pushed = _without(pushed, "optimizer" in moved, optimizer=p.states)
        task = _without(pushed, "parameters" in moved, parameters=own)
        from memplan.estimate.colocated import by_engine

        return (by_engine(decided.colocated, task, pushed, run),)
    policy = _policy(_at_any_lengths(run, decided), structure)
    generated = batch.model_copy(update={"micro": rows, "accumulation": 1})
    prompted = decided._replace(structure=policy.structure, batch=generated, pictures=())
    return (generation(prompted, standing, (*held, *policy.gathered), policy.division),)


def _ppo(run: RunSpec, walked: TrainingPeaks, decided: ResolvedRun, at_once: int = 0) -> Iterator[SideTask]:
    """Yield the generation of PPO's step, and the passes of its other models over `at_once` completions.

    PPOTrainer calls the models past the module that accelerate wraps in autocast. Each returns all its states.

    Source: trl 1.12.0 experimental/ppo/ppo_trainer.py train, experimental/utils.py get_reward; the same in trl 0.24.0.
    """
    batch, standing = decided.batch, walked.program.between_steps(walked.workspace)
    policy, scoring = _models_of_ppo(_at_any_lengths(run, decided), decided.structure._replace(engine=()))
    rows, words = batch.micro * batch.accumulation, decided.structure.graph.model.vocab_size
    chunk, before = at_once or rollout_chunk(rows), _batch_before(rows, batch.tokens)
    at = decided._replace(batch=batch.model_copy(update={"micro": chunk, "accumulation": 1}), pictures=())
    passes = generated_passes(at._replace(structure=policy.structure, half=_is_half(policy.structure)))
    at = at._replace(pictures=(("completion", batch.new_tokens), ("accumulation", 1)))
    where, kept, top, moving = _with_logits(passes, rows, batch.new_tokens, words)
    held = (*before, *policy.gathered, *kept)
    yield SideTask("generate", where, standing, held, passes if moving else (), top, moving)
    tasks: list[SideTask] = []
    for structure, gathered in scoring:
        step = InferenceStep(structure.graph, chunk, batch.sequence)
        scored = sized(step, at._replace(structure=structure, half=_is_half(structure)))
        moving, moment, where = scored.peak
        for role, phase, groups in gathered:
            held = (*before, *groups)
            tasks.append(SideTask(phase, f"{role}: {where}", standing, held, (scored,), (0, moment), moving))
    of_policy, values, *rewards = tasks
    yield values if values.peak > of_policy.peak else of_policy
    yield from rewards


_OfRoles = tuple[tuple[str, str, tuple[TensorGroup, ...]], ...]  # each with its phase, and what ranks hold in it


@lru_cache(maxsize=64)
def _models_of_ppo(run: RunSpec, structure: Structure) -> tuple[_Policy, tuple[tuple[Structure, _OfRoles], ...]]:
    """Return the policy as it generates, and the models that score its completions, given a run as `_policy` is."""
    graph, sharding = _without_autocast(structure.graph), sharding_of(structure)
    if graph is None:
        precision = run.precision.model_copy(update={"autocast": False, "compute": None})
        graph = decide(run.model_copy(update={"precision": precision})).structure.graph
    library = library_behaviour(run.profile, graph.model.model_type, run.method.quantization is not None)
    reference, roles = reference_of(graph), dict(graph.roles)
    assert reference is not None
    value = without_gradients(roles["value"])
    roles["value"] = value._replace(loss="", recipe=value.recipe._replace(keeps=False, copies=""))  # of backward

    def scoring(other: Graph, cache: Cache = "") -> Structure:
        wiring = other.wiring._replace(caching=bool(cache), records=False)
        one_pass = Pass("score", cache, last_only=False)
        scored = other._replace(inference=one_pass, trainer=reference.trainer, wiring=wiring)
        return structure._replace(graph=scored)

    others = {scoring(reference, library.generation.cache): ["reference"]}
    for role in ("value", "reward"):
        if role in roles:
            others.setdefault(scoring(roles[role]), []).append(role)
    generating = generating_graph(graph._replace(trainer=None, roles=()), library, wide=False, samples=True)
    policy = _Policy(structure._replace(graph=generating), None, tuple(sharding.held_in("generate")))
    phases = {"reference": "rollout", "value": "rollout", "reward": "reward"}
    return policy, tuple(
        (each, tuple((role, phases[role], tuple(sharding.held_in(role))) for role in roles))
        for each, roles in others.items()
    )


def _is_half(structure: Structure) -> bool:
    """Return whether a model of PPO's rollout computes attention in 16 bits."""
    return not structure.graph.wiring.has_fp32_inputs


@lru_cache(maxsize=64)
def _without_autocast(graph: Graph) -> Graph | None:
    """Return the graph and its roles outside of autocast; None if attention then computes in another dtype."""
    recipe, roles = graph.recipe._replace(autocast=False), [(role, _without_autocast(g)) for role, g in graph.roles]
    others = tuple((role, other) for role, other in roles if other is not None)
    dtypes = {graph.recipe.compute, graph.recipe.weights} if graph.recipe.autocast else ()
    if len(dtypes) > 1 or len(others) < len(roles):
        return None
    return graph._replace(recipe=recipe, casts_outputs=False, roles=others)


def _with_logits(
    passes: Sequence[SizedPass], rows: int, tokens: int, words: int
) -> tuple[str, tuple[TensorGroup, ...], tuple[int, int], int]:
    """Return the peak of a generation that keeps the logits of all tokens: where, what is kept, and the pass's moment
    with its bytes.

    It keeps the logits of every pass of a chunk of rows, stacks them, and joins the chunks in a padded copy.

    Source: trl 1.12.0 experimental/ppo/ppo_trainer.py generate, batch_generation; trl 0.24.0 trainer/utils.py.
    """
    prompt, last, chunk = passes[0].peak, passes[-1].peak, passes[0].step.batch

    def logits(what: str, of: int, tokens: int, copies: int = 1) -> TensorGroup:
        bytes_ = rounded(of * tokens * words * ITEMSIZE["fp32"])
        return TensorGroup("activation", what, "generate", f"{of} {tokens} {words}", "fp32", copies, bytes_, _LOGITS)

    before, padded = (rows // chunk - 1) * chunk, -(-rows // chunk) * chunk
    earlier = (logits("logits of earlier rows", before, tokens),) if before else ()
    made, stacked = logits("logits of a pass", chunk, 1, tokens), logits("stacked logits", chunk, tokens)
    cache = tensor_group("activation", "keys and values", passes[-1].bytes_left(), "uint8", _LOGITS, "generate")
    joined = (logits("logits of all rows", rows, tokens), logits("their padded copy", padded, tokens))
    kept = (*earlier, made._replace(copies=tokens - 1)) if tokens > 1 else earlier
    moments = (
        (f"{passes[0].phase}: {prompt.where}", earlier, (0, prompt.moment), prompt.bytes),
        (f"{passes[-1].phase}: {last.where}", kept, (len(passes) - 1, last.moment), last.bytes),
        ("stacked logits", (*earlier, made, stacked, cache), (-1, -1), 0),
        ("padded logits", joined, (-1, -1), 0),
    )
    return max(moments, key=lambda moment: moment[3] + total_bytes(moment[1]))


def _without(task: SideTask, is_moved: bool, **sizes: int) -> SideTask:
    """Return the task without the bytes of a part of the trainer, if that is on the host meanwhile."""
    if not is_moved:
        return task
    return task._replace(persistent_bytes=task.persistent_bytes - sum(sizes.values()), moved=(*task.moved, *sizes))


def _batch_before(rows: int, tokens: int) -> tuple[TensorGroup, ...]:
    what = "tokens of the generation before"
    ids = tensor_group("activation", what, f"{rows} {tokens}", "int64", _BATCH, "generate")
    return ids, ids._replace(what="their masks")
