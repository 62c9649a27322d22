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
from memplan.core.units import gib
from memplan.estimate.side_task import BetweenSteps, SideTask, tensors
from memplan.estimate.side_tasks import evaluation, evaluation_run, generated_passes, generating_graph, generation
from memplan.estimate.training_peaks import training_peaks
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


_Tasks = Iterator[Sequence[SideTask]]  # each at the moments that may be its peak


def rollout(run: RunSpec, between: BetweenSteps, decided: ResolvedRun) -> _Tasks:
    """Yield the generation of a step's completions, and the reward model's pass over them; then that of each batch of
    an evaluation. If other GPUs generate, yield the push of weights to them if it gathers any.

    Raises SpecError if the model cannot generate.
    """
    e, steps = run.also.evaluation, _ppo if TRAINERS[run.trainer].own_loop else _tasks
    yield from steps(run, between, decided)
    if e is not None:
        yield from _evaluated(run, between, decided, e)


def _evaluated(run: RunSpec, between: BetweenSteps, decided: ResolvedRun, e: Evaluation) -> _Tasks:
    """Yield what an evaluation does of a step's tasks. PPO's generates a batch at once, and scores it while a variable
    holds the logits."""
    alone = evaluation_run(run.model_copy(update=decided.parts), e)
    inside = decide(alone)._replace(critic=None)
    if not TRAINERS[run.trainer].own_loop:
        for task in _tasks(alone, between, inside):
            yield [moment._replace(phase="eval", name=f"{moment.phase}: {moment.name}") for moment in task]
        return
    sizes = e.micro, inside.batch.new_tokens, inside.structure.graph.model.vocab_size
    logits = tensors("activation", "logits of the evaluation", sizes, "fp32", _LOGITS, "generate")
    generated, _, *rewards = _ppo(alone, between, inside, e.micro)
    yield [moment._replace(phase="eval", name=f"generate: {moment.name}") for moment in generated]
    for reward in rewards:
        yield [moment._replace(phase="eval", held=(*moment.held, logits)) for moment in reward]


def _tasks(run: RunSpec, between: BetweenSteps, decided: ResolvedRun) -> _Tasks:
    batch, moved = decided.batch, run.serving.trainer_offload or ()
    yield from _generation(run, between, decided)
    if batch.scored > batch.micro:
        yield from _log_probs(run, between, decided)
    if "reward" in dict(decided.structure.graph.roles):
        yield (_scoring(run.model_copy(update={"batch": batch}), between, sharding_of(decided.structure)),)
    if decided.critic is not None:
        yield (_without(_critic(decided.critic, between), "optimizer" in moved, optimizer=between.program.states),)


def _log_probs(run: RunSpec, between: BetweenSteps, decided: ResolvedRun) -> _Tasks:
    """Yield the passes for log-probabilities before the step, over more completions than one of its micro-batches has:
    those of an evaluation of as many."""
    rows, is_moved = run.batch.scored, "optimizer" in (run.serving.trainer_offload or ())
    alone = changed(run.model_copy(update=decided.parts), "batch", generations=rows)
    for task in evaluation(alone, Evaluation(micro=rows), between, None):
        each = (_without(moment, is_moved, optimizer=between.program.states) for moment in task)
        yield [moment._replace(phase="rollout", name=f"log-probabilities: {moment.name}") for moment in each]


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


def _critic(critic: ResolvedRun, between: BetweenSteps) -> SideTask:
    """Return the update of a critic, next to what the policy holds between its steps."""
    alone = training_peaks(critic)
    top = alone.top
    own = max(top.peak - alone.program.between_steps(alone.workspace), 0)
    held = tensor_group("gradient", "gradients and activations", own, "uint8", "the critic's update", "critic")
    return SideTask("critic", f"{top.phase}: {top.where}", between.bytes, (held,))


def _scoring(run: RunSpec, between: BetweenSteps, sharding: Sharding) -> SideTask:
    """Return the reward model's pass over a step's completions."""
    scoring, batch = scoring_pass(run, decide), run.batch
    step = steps_of(scoring)[0]
    keeps = library_behaviour(run.profile, step.graph.model.model_type, False).trainer.reward_caches
    if keeps and step.graph.model.objectives[0] == "causal_lm" and step.graph.inference is not None:
        wiring, one_pass = step.graph.wiring._replace(caching=True), step.graph.inference._replace(cache="dynamic")
        step = step._replace(graph=step.graph._replace(wiring=wiring, inference=one_pass))
    held = (*_batch_before(batch.micro * batch.accumulation, batch.tokens), *sharding.held_in("reward"))
    return SideTask("reward", "", between.bytes, held, (sized(step, scoring),), 0)


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
    if _is_decided_again(run):
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


def _is_decided_again(run: RunSpec) -> bool:
    """Return whether the step computes in another precision than the generation."""
    return TRAINERS[run.trainer].backbone in ("every", run.kernels.loss)


def _at_any_lengths(run: RunSpec, decided: ResolvedRun, again: bool) -> RunSpec:
    """Return the run with a batch that stands for all whose operations are the same: its own if there are no others.
    Lengths only matter if the run is decided `again`."""
    batch = decided.batch
    if not again or not depends_on_lengths(decided.structure.graph.model):
        batch = _batch_like(1 if batch.micro == 1 else 2, min(2, batch.accumulation))
    return run.model_copy(update={"batch": batch})


@lru_cache(maxsize=4)
def _batch_like(micro: int, accumulation: int) -> Batch:
    return Batch(micro=micro, accumulation=accumulation)


def _generation(run: RunSpec, between: BetweenSteps, decided: ResolvedRun) -> _Tasks:
    structure, batch = decided.structure, decided.batch
    rows, standing = batch.micro * batch.accumulation, between.bytes
    held = _batch_before(rows, batch.tokens)
    if run.rollout != "transformers":
        gathered = tuple(sharding_of(structure).pushed(merges=structure.graph.recipe.kind in ADAPTERS))
        pushed = SideTask("generate", "vLLM: weights pushed", standing, (*held, *gathered))
        if decided.colocated is None:
            yield from ((pushed,),) if gathered else ()
            return
        moved, p = run.serving.trainer_offload or (), between.program
        own = p.parameters - total_bytes(structure.engine)
        pushed = _without(pushed, "optimizer" in moved, optimizer=p.states)
        task = _without(pushed, "parameters" in moved, parameters=own)
        from memplan.estimate.colocated import by_engine

        yield by_engine(decided.colocated, task, pushed, run)
        return
    policy = _policy(_at_any_lengths(run, decided, _is_decided_again(run)), structure)
    generated = batch.model_copy(update={"micro": rows, "accumulation": 1})
    prompted = decided._replace(structure=policy.structure, batch=generated, pictures=())
    yield generation(prompted, standing, (*held, *policy.gathered), policy.division)


def _ppo(run: RunSpec, between: BetweenSteps, decided: ResolvedRun, at_once: int = 0) -> _Tasks:
    """Yield the generation of PPO's step, and the passes of its other models over `at_once` completions.

    PPOTrainer calls the models past the module that accelerate wraps in autocast. Each returns all its states.

    Source: trl 1.12.0 experimental/ppo/ppo_trainer.py train, experimental/utils.py get_reward; the same in trl 0.24.0.
    """
    batch, standing = decided.batch, between.bytes
    structure = decided.structure._replace(engine=())
    alike = _at_any_lengths(run, decided, _without_autocast(structure.graph) is None)
    policy, scoring = _models_of_ppo(alike, structure)
    rows, words = batch.micro * batch.accumulation, decided.structure.graph.model.vocab_size
    chunk, before = at_once or rollout_chunk(rows), _batch_before(rows, batch.tokens)
    at = decided._replace(batch=batch.model_copy(update={"micro": chunk, "accumulation": 1}), pictures=())
    passes = generated_passes(at._replace(structure=policy.structure, half=_is_half(policy.structure)))
    at = at._replace(pictures=(("completion", batch.new_tokens), ("accumulation", 1)))
    each = _with_logits(passes, rows, chunk, batch.new_tokens, words)
    held = (*before, *policy.gathered)
    yield [SideTask("generate", name, standing, (*held, *kept), of, at) for name, kept, of, at in each]
    tasks: list[SideTask] = []
    for structure, gathered in scoring:
        step = InferenceStep(structure.graph, chunk, batch.sequence)
        scored = sized(step, at._replace(structure=structure, half=_is_half(structure)))
        for role, phase, groups in gathered:
            held = (*before, *groups)
            tasks.append(SideTask(phase, f"{role}: ", standing, held, (scored,), 0))
    yield tasks[:2]  # the reference and the value model
    yield from ((reward,) for reward in tasks[2:])


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
    passes: tuple[SizedPass, ...], rows: int, chunk: int, tokens: int, words: int
) -> Iterator[tuple[str, tuple[TensorGroup, ...], tuple[SizedPass, ...], int]]:
    """Yield the moments of a generation of `chunk` rows at once that may be its peak, as it keeps the logits of all
    tokens: the name, what is kept, and the passes and which of them it is in, if it is in one.

    It keeps the logits of every pass of a chunk of rows, stacks them, and joins the chunks in a padded copy.

    Source: trl 1.12.0 experimental/ppo/ppo_trainer.py generate, batch_generation; trl 0.24.0 trainer/utils.py.
    """

    def logits(what: str, of: int, tokens: int, copies: int = 1) -> TensorGroup:
        return tensors("activation", what, (of, tokens, words), "fp32", _LOGITS, "generate", copies)

    before, padded = (rows // chunk - 1) * chunk, -(-rows // chunk) * chunk
    earlier = (logits("logits of earlier rows", before, tokens),) if before else ()
    made, stacked = logits("logits of a pass", chunk, 1, tokens), logits("stacked logits", chunk, tokens)
    cache = tensors("activation", "keys and values", (passes[-1].bytes_left(),), "uint8", _LOGITS, "generate")
    joined = (logits("logits of all rows", rows, tokens), logits("their padded copy", padded, tokens))
    kept = (*earlier, made._replace(copies=tokens - 1)) if tokens > 1 else earlier
    yield f"{passes[0].phase}: ", earlier, passes, 0
    yield f"{passes[-1].phase}: ", kept, passes, len(passes) - 1
    yield "stacked logits", (*earlier, made, stacked, cache), (), -1
    yield "padded logits", joined, (), -1


def _without(task: SideTask, is_moved: bool, **sizes: int) -> SideTask:
    """Return the task without the bytes of a part of the trainer, if that is on the host meanwhile."""
    if not is_moved:
        return task
    return task._replace(persistent_bytes=task.persistent_bytes - sum(sizes.values()), moved=(*task.moved, *sizes))


def _batch_before(rows: int, tokens: int) -> tuple[TensorGroup, ...]:
    what = "tokens of the generation before"
    ids = tensors("activation", what, (rows, tokens), "int64", _BATCH, "generate")
    return ids, ids._replace(what="their masks")
