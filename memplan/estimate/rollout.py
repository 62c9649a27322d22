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
from typing import TYPE_CHECKING

from memplan.catalogue.inference.one_pass import Cache, Pass
from memplan.catalogue.kernels.wiring import TRAINERS
from memplan.catalogue.methods.methods import ADAPTERS
from memplan.catalogue.profiles.profiles import library_behaviour
from memplan.estimate.serving import why_not_started
from memplan.estimate.side_task import SideTask
from memplan.estimate.side_tasks import evaluation, evaluation_run, generation
from memplan.estimate.training_peaks import TrainingPeaks, training_peaks
from memplan.estimate.usage import Answer, Replay, Usage
from memplan.models.cards import find_model
from memplan.program.graph import Graph, TensorGroup, reference_of, tensor_group, total_bytes, without_gradients
from memplan.program.inference.passes import InferenceStep, sized
from memplan.program.inference.steps import steps_of
from memplan.program.run import ResolvedRun
from memplan.program.serving.budget import Budget
from memplan.program.sharding.choice import sharding_of
from memplan.program.sharding.sharding import Sharding
from memplan.resolve.colocated import awake
from memplan.resolve.decide import decide
from memplan.resolve.defaults import with_new_tokens
from memplan.resolve.roles import decided_at, padded_rows, rollout_chunk, scoring_pass
from memplan.spec.roles import Roles
from memplan.spec.run import Batch, RunSpec, changed
from memplan.spec.training import Evaluation, Precision

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration

_LOGITS = "trl 1.12.0 experimental/ppo/ppo_trainer.py generate, batch_generation; the same in trl 0.24.0"
_BATCH = "trl 1.16.0 trainer/grpo_trainer.py _prepare_inputs: _buffered_inputs"


def rollout(run: RunSpec, walked: TrainingPeaks, decided: ResolvedRun) -> tuple[SideTask, ...]:
    """Return the generation of a step's completions, and the reward model's pass over them; then that of each batch of
    an evaluation. If other GPUs generate, return the push of weights to them if it gathers any.

    Raises SpecError if the model cannot generate.
    """
    if TRAINERS[run.trainer].own_loop:
        return tuple(_ppo(run, walked, decided, sharding_of(decided.structure)))
    sharding = sharding_of(decided.structure)
    has_reward = "reward" in dict(decided.structure.graph.roles)
    reward = (_scoring(with_new_tokens(run), walked, sharding),) if has_reward else ()
    critic = (_critic(decided.critic, walked, run),) if decided.critic is not None else ()
    scored = _log_probs(run, walked, decided) if run.batch.scored > run.batch.micro else ()
    tasks, e = (*_generation(run, walked, decided), *scored, *reward, *critic), run.also.evaluation
    if e is None:
        return tasks
    evaluated = evaluation_run(run.model_copy(update=decided.parts), e)
    during = rollout(evaluated, walked, decide(evaluated)._replace(critic=None))
    return (*tasks, *(task._replace(phase="eval", where=f"{task.phase}: {task.where}") for task in during))


def _log_probs(run: RunSpec, walked: TrainingPeaks, decided: ResolvedRun) -> Iterator[SideTask]:
    """Yield the passes for log-probabilities before the step, over more completions than one of its micro-batches has:
    those of an evaluation of as many."""
    rows, standing = run.batch.scored, walked.program.between_steps(walked.workspace)
    alone = changed(run.model_copy(update=decided.parts), "batch", generations=rows)
    for task in evaluation(alone, Evaluation(micro=rows), walked, None, standing):
        moved = _without(task, "optimizer" in (run.serving.trainer_offload or ()), optimizer=walked.program.states)
        yield moved._replace(phase="rollout", where=f"log-probabilities: {task.where}")


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
    scoring, batch = scoring_pass(run, "reward", decide), run.batch
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
        woken = awake(decided.colocated, run.profile) if run.serving.sleep else ()
        return (_by_engine(decided.colocated, task, pushed, woken),)
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


def _ppo(run: RunSpec, walked: TrainingPeaks, decided: ResolvedRun, sharding: Sharding) -> Iterator[SideTask]:
    """Yield the generation of PPO's step, and the passes of its other models over the completions.

    PPOTrainer calls the models past the module that accelerate wraps in autocast. Each returns all its states.

    Source: trl 1.12.0 experimental/ppo/ppo_trainer.py train, experimental/utils.py get_reward; the same in trl 0.24.0.
    """
    batch, standing = decided.batch, walked.program.between_steps(walked.workspace)
    alone = _decided_alone(decided.batch, run, precision=_without_autocast(run.precision))
    graph, rows = alone.structure.graph, batch.micro * batch.accumulation
    chunk, held = rollout_chunk(rows), _batch_before(rows, batch.tokens)
    library = library_behaviour(run.profile, graph.model.model_type, run.method.quantization is not None)
    prompted = _of_rows(alone, graph._replace(trainer=None, roles=()), chunk)
    gathered = tuple(sharding.held_in("generate"))
    task = generation(prompted, library, False, standing, (*held, *gathered), samples=True)
    yield max(_keeping_logits(task, rows, chunk, batch.new_tokens, graph.model.vocab_size), key=lambda task: task.peak)
    reference, others = reference_of(graph), dict(graph.roles)
    assert reference is not None

    def scored(role: str, resolved: ResolvedRun, other: Graph, cache: Cache = "") -> SideTask:
        wiring = other.wiring._replace(caching=bool(cache), records=False)
        other = other._replace(inference=Pass(role, cache, last_only=False), trainer=reference.trainer, wiring=wiring)
        step = InferenceStep(other, chunk, batch.sequence)
        passed = sized(step, _of_rows(resolved, other, chunk, batch.new_tokens))
        moving, moment, where = passed.peak
        phase = "reward" if role == "reward" else "rollout"
        gathered = tuple(sharding.held_in(role))
        return SideTask(phase, f"{role}: {where}", standing, (*held, *gathered), (passed,), (0, moment), moving)

    policy = scored("reference", alone, reference, library.generation.cache)
    values = scored("value", scoring_pass(run, "value", decide), without_gradients(others["value"]))
    yield max(policy, values, key=lambda task: task.peak)
    if "reward" in others:
        yield scored("reward", scoring_pass(run, "reward", decide), others["reward"])


def _decided_alone(batch: Batch, run: RunSpec, **changes: object) -> ResolvedRun:
    """Return the run with another batch, and with changes."""
    several = _several(min(2, batch.accumulation))
    return decided_at(batch, run.model_copy(update={**changes, "batch": several}), find_model(run.model), decide)


@lru_cache(maxsize=2)
def _several(accumulation: int) -> Batch:
    return Batch(micro=2, accumulation=accumulation)


@lru_cache(maxsize=64)
def _without_autocast(precision: Precision) -> Precision:
    return precision.model_copy(update={"autocast": False, "compute": None})


def _of_rows(decided: ResolvedRun, graph: Graph, rows: int, new_tokens: int = 0) -> ResolvedRun:
    batch = decided.batch.model_copy(update={"micro": rows, "accumulation": 1})
    completion = (("completion", new_tokens), ("accumulation", 1)) if new_tokens else ()
    return decided._replace(structure=decided.structure._replace(graph=graph), batch=batch, pictures=completion)


def _keeping_logits(task: SideTask, rows: int, chunk: int, tokens: int, words: int) -> Iterator[SideTask]:
    """Yield the moments at which a generation that keeps the logits of all tokens can peak.

    It keeps the logits of every pass of a chunk of rows, stacks them, and joins the chunks in a padded copy.

    Source: trl 1.12.0 experimental/ppo/ppo_trainer.py generate, batch_generation; trl 0.24.0 trainer/utils.py.
    """

    def logits(what: str, of: int, tokens: int, copies: int = 1) -> TensorGroup:
        return tensor_group("activation", what, f"{of} {tokens} {words}", "fp32", _LOGITS, "generate", copies)

    before = (rows // chunk - 1) * chunk
    earlier = (*task.held, *((logits("logits of earlier rows", before, tokens),) if before else ()))
    for at, made in ((0, 0), (len(task.passes) - 1, tokens - 1)):
        moving, moment, where = task.passes[at].peak
        where = f"{task.passes[at].phase}: {where}"
        held = (*earlier, logits("logits of a pass", chunk, 1, made)) if made else earlier
        yield task._replace(where=where, held=held, top=(at, moment), moving=moving)
    passes, stacked = logits("logits of a pass", chunk, 1, tokens), logits("stacked logits", chunk, tokens)
    cache = tensor_group("activation", "keys and values", task.passes[-1].bytes_left(), "uint8", _LOGITS, "generate")
    after = task._replace(passes=(), top=(-1, -1), moving=0)
    yield after._replace(where="stacked logits", held=(*earlier, passes, stacked, cache))
    joined = (logits("logits of all rows", rows, tokens), logits("their padded copy", padded_rows(rows), tokens))
    yield after._replace(where="padded logits", held=(*task.held, *joined))


def _without(task: SideTask, is_moved: bool, **sizes: int) -> SideTask:
    """Return the task without the bytes of a part of the trainer, if that is on the host meanwhile."""
    if not is_moved:
        return task
    return task._replace(persistent_bytes=task.persistent_bytes - sum(sizes.values()), moved=(*task.moved, *sizes))


def _by_engine(b: Budget, standing: SideTask, pushed: SideTask, woken: tuple[TensorGroup, ...]) -> SideTask:
    """Return the generation by a colocated vLLM engine at its largest step, or while the weights are pushed to it, when
    a sleeping one has `woken` its weights only."""
    step = tensor_group("temp", "vLLM's step", b.step.bytes, "uint8", "vllm 0.33.0 v1/worker/gpu_model_runner.py")
    batch = (h for h in pushed.held if h.where == "generate")
    task = standing._replace(where=f"vLLM: {b.step.where}", held=(*batch, *woken, step))
    pushed = pushed._replace(held=(*pushed.held, *woken[1:]))
    return max(task, pushed, key=lambda moment: moment.peak)._replace(empties_cache=bool(woken))


def _batch_before(rows: int, tokens: int) -> tuple[TensorGroup, ...]:
    what = "tokens of the generation before"
    ids = tensor_group("activation", what, f"{rows} {tokens}", "int64", _BATCH, "generate")
    return ids, ids._replace(what="their masks")


class ColocatedUsage(Usage):
    """Usage of a card that a run shares with an engine: it does not start if vLLM refuses the share that it gets."""

    def __init__(self, walk: Replay, engine: Budget, calibration: Calibration | None) -> None:
        super().__init__(walk, calibration)
        self._engine = engine

    @property
    def answer(self) -> Answer | None:
        return super().answer if self._engine.starts or not self.may_fit else "does not start"

    @property
    def reason(self) -> str | None:
        return None if self._engine.starts else why_not_started(self._engine, self._engine)
