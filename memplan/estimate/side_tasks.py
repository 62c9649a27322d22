"""The side tasks of a training run: evaluating, generating, saving, merging adapters.

Each is a `SideTask`: bytes in addition to what is held between two steps, when gradients are freed and the optimizer's
states exist. An evaluation runs forward passes of the model being trained, without dropout and without autograd.

Source: transformers 5.24 trainer.py evaluation_loop and prediction_step, trainer_pt_utils.py EvalLoopContainer,
trainer_seq2seq.py prediction_step; for merging, memplan.catalogue.methods.merging; for saving,
memplan.program.training.saving.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from memplan.catalogue.inference.decoding import returned_by
from memplan.catalogue.inference.one_pass import Cache, Pass
from memplan.catalogue.kernels.wiring import TRAINERS
from memplan.catalogue.methods.merging import adapted_weights, merge_moments
from memplan.catalogue.profiles.behaviour import LibraryBehaviour
from memplan.catalogue.profiles.profiles import library_behaviour
from memplan.core.errors import UnsupportedModelError, refused
from memplan.core.ir import Division, Tensor
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE
from memplan.engine.gather import left_whole
from memplan.engine.walk import size
from memplan.estimate.side_task import BetweenSteps, SideTask, largest
from memplan.models.model import ModelSpec
from memplan.program.graph import Graph, TensorGroup, lower_inference, operations_of, parameters_of, total_bytes
from memplan.program.inference.passes import InferenceStep, SizedPass, sized
from memplan.program.inference.steps import steps_of
from memplan.program.loading import loading_peak
from memplan.program.run import ResolvedRun
from memplan.program.sharding.choice import sharding_of
from memplan.program.training.saving import saving_peak
from memplan.program.weight_sizes import elements
from memplan.resolve.batches import check_batch, with_lengths
from memplan.resolve.decide import decide
from memplan.resolve.inference import keeps_every_cache
from memplan.resolve.refusals.refuse import refuse
from memplan.resolve.refusals.side_tasks import refused_side_tasks
from memplan.spec.run import RunSpec, changed
from memplan.spec.training import Also, Evaluation, Loop

_LOOP = "transformers 5.24 trainer.py Trainer.evaluation_loop"
_CONTAINER = "transformers 5.24 trainer_pt_utils.py EvalLoopContainer.add"


def side_tasks_of(
    run: RunSpec, between: BetweenSteps, decided: ResolvedRun, model: ModelSpec | None
) -> tuple[SideTask, ...]:
    """Return the run's side tasks, in the order they run. Raises SpecError."""
    also = run.also
    if also == Also():
        return ()
    run = run.model_copy(update=decided.parts)  # a side task runs with the profile's defaults too
    refuse(refused_side_tasks(run, decided.structure.graph))
    tasks: list[SideTask] = []
    if also.evaluation is not None and not TRAINERS[run.trainer].own_loop:  # whose evaluation computes no loss
        tasks += map(largest, evaluation(run, also.evaluation, between, model))
    if also.saving is not None:
        held, where, host = saving_peak(decided.structure, also.saving, between.program)
        tasks.append(SideTask("save", where, between.bytes, held, host=host))
    if also.merging is not None:
        tasks.append(_merge(run, between, decided, model))
    return tuple(tasks)


def notes_of(run: RunSpec, asked: tuple[SideTask, ...]) -> Iterator[str]:
    """Yield notes on the side tasks."""
    e = run.also.evaluation
    if e is None or not asked:
        return
    step = asked[0].passes[0].step
    longer = run.batch.model_copy(update={"sequence": e.sequence or run.batch.sequence})
    note = check_batch(longer, step.graph.model)
    if note is not None and e.sequence is not None and e.sequence > run.batch.sequence:
        yield f"evaluation: {note}"
    if e.kept_batches and e.accumulation is None and e.preprocess is None and not e.batch_metrics:
        yield (
            f"evaluation: the logits of {e.kept_batches} batches stay on the GPU until the last one; "
            "eval_accumulation_steps moves them to the host earlier, preprocess_logits_for_metrics keeps less of them"
        )


def evaluation(
    run: RunSpec, e: Evaluation, between: BetweenSteps, model: ModelSpec | None
) -> Iterator[Sequence[SideTask]]:
    """Yield an evaluation, and the generation in it: each at the moments that may be its peak."""
    decided_ = decide(evaluation_run(run, e), model)
    kind, quantised = decided_.structure.graph.model.model_type, run.method.quantization is not None
    library = library_behaviour(run.profile, kind, quantised)
    division = sharding_of(decided_.structure).division()
    caching = bool(run.loop.use_cache) or (run.loop.trainer and library.generation.evaluation_caches)
    cache = library.generation.cache if caching else ""
    one_pass = Pass("eval", cache, casts_logits=library.loss.logits == "model")
    graph = _evaluation_graph(decided_.structure.graph, one_pass, caching=caching)
    step = InferenceStep(graph, e.micro, decided_.batch.sequence, division=division)
    batch = sized(step, decided_)
    standing = between.bytes + between.program.passing["forward"]
    kept = _kept(e, graph, batch.axes, run.parallelism.dp)
    loss = TensorGroup("activation", "loss of a batch, referenced by the loop", "evaluation", "", "fp32", 1, 512, _LOOP)
    referenced = () if e.batch_metrics else (loss,)  # with batch_metrics the loop drops its references
    during, joined = (*kept.during, *referenced), (*kept.joined, *referenced)
    batches = batches_on_gpu(e) if kept.each else 1
    task = SideTask("eval", "", standing, during, (batch,), 0, kept.each, batches, e.concatenates, kept.host)
    yield task, task._replace(name="evaluation.concat", held=joined, at=-1)
    if e.new_tokens:
        asked = decided_.batch.model_copy(update={"new_tokens": e.new_tokens, "target_sequence": None})
        generating = generating_graph(decided_.structure.graph, library, one_pass.casts_logits)
        structure = decided_.structure._replace(graph=generating)
        yield generation(decided_._replace(structure=structure, batch=asked), standing)


def evaluation_run(run: RunSpec, e: Evaluation) -> RunSpec:
    """Return the run as its evaluation runs the model: other lengths, and no checkpointing or dropout."""
    of_model = run.kernels.loss == "fused" and run.trainer == "sft"  # other trainers have losses of their own
    fuses = library_behaviour(run.profile, "", False).loss.fuses_evaluation if e.fuses is None else e.fuses
    loss = "hf" if of_model and (e.kept_batches or not fuses) else run.kernels.loss
    kernels = {"checkpointing": "none", "reentrant": None, "loss": loss}
    alone = changed(run, "also", evaluation=None, saving=None, merging=None)
    alone = changed(alone, "kernels", **kernels)
    alone = changed(alone, "loop", hold_outputs=Loop().hold_outputs)
    batch = {"micro": e.micro, "sequence": e.sequence or run.batch.sequence, "accumulation": 1}
    alone = changed(alone, "batch", **batch, scored=0)
    if run.method.dropout:
        alone = changed(alone, "method", dropout=0.0)
    return alone


def _evaluation_graph(graph: Graph, now: Pass, caching: bool) -> Graph:
    """Return the graph in evaluation mode."""
    caching = caching or graph.wiring.prefixed
    wiring = graph.wiring._replace(
        records=False, caching=caching, caches=False, last_only=now.generates and now.last_only
    )
    return graph._replace(
        wiring=wiring,
        recipe=graph.recipe._replace(dropout=False),
        inference=now,
        input_requires_grad=False,
        rank=graph.rank,
    )


class _Kept(NamedTuple):
    """Tensors that an evaluation keeps of finished batches.

    during  tensors held during the last batch's pass
    joined  tensors held while its predictions are concatenated with those before
    each    bytes of each tensor of a batch
    host    bytes of all batches in host memory
    """

    during: tuple[TensorGroup, ...] = ()
    joined: tuple[TensorGroup, ...] = ()
    each: tuple[int, ...] = ()
    host: int = 0


def batches_on_gpu(e: Evaluation) -> int:
    """Return the most batches whose predictions are on the GPU at once."""
    return min(e.kept_batches, e.accumulation or e.kept_batches)


def _kept(e: Evaluation, graph: Graph, axes: Mapping[str, int], ranks: int) -> _Kept:
    """Return what is kept of predictions and labels, gathered from all `ranks`."""
    logits = _batch_logits(graph) if e.kept_batches else None
    if logits is None:
        return _Kept()
    if e.preprocess == "argmax":
        logits = Tensor("likeliest tokens", " ".join(logits.shape.split()[:-1]), "int64")
    labels = Tensor("labels", logits.shape.rpartition(" ")[0] if e.preprocess is None else logits.shape, "int64")
    on_gpu = batches_on_gpu(e)
    tensors = (logits, labels)

    def held(t: Tensor, what: str, count: int, source: str) -> TensorGroup:
        """Return the tensor of `count` batches, gathered from all ranks."""
        shape = f"{count * ranks} {t.shape}"
        bytes_ = size(shape, t.dtype, axes)[1]
        return TensorGroup("activation", f"{t.name}{what}", "evaluation", shape, t.dtype, 1, bytes_, source)

    if e.batch_metrics:
        return _Kept(joined=tuple(held(t, " of a batch, of all ranks", 1, _LOOP) for t in tensors) if ranks > 1 else ())
    each = tuple(held(t, " of a batch", 1, _CONTAINER) for t in tensors)
    host = sum(ITEMSIZE["fp32" if t.dtype == "bf16" else t.dtype] * _numbers(t, axes) for t in tensors)
    host *= e.kept_batches * ranks
    bytes_of_each = tuple(h.bytes for h in each)
    if not e.concatenates:
        earlier = tuple(h._replace(copies=on_gpu - 1) for h in each) if on_gpu > 1 else ()
        return _Kept(earlier, (), bytes_of_each, host)
    if on_gpu < e.kept_batches:  # the host concatenates too, copying the earlier ones
        host *= 2
    if on_gpu == 1:
        return _Kept((), (), bytes_of_each, host)
    previous = tuple(held(t, " of the previous batches", on_gpu - 1, _CONTAINER) for t in tensors)
    last = tuple(held(t, " of the previous batch, referenced by the loop", 1, _LOOP) for t in tensors if on_gpu > 2)
    while_joining = (
        previous[0],
        each[0],
        held(logits, " of all batches, concatenated", on_gpu, _CONTAINER),
        previous[1],
        each[1],
    )
    return _Kept((*previous, *last), while_joining, bytes_of_each, host)


def _numbers(t: Tensor, axes: Mapping[str, int]) -> int:
    out = 1
    for token in t.shape.split():
        out *= int(token) if token.isdigit() else axes[token]
    return out


def _batch_logits(graph: Graph) -> Tensor | None:
    """Return the logits of a batch, with their dtype."""
    stack, _ = operations_of(graph)
    logits = returned_by(stack, bool(graph.inference and graph.inference.casts_logits))
    if logits is None:
        return None
    low = lower_inference(graph, labelled=True)
    casts = {t.name: op.reads[0] for op in (*stack.after, *stack.loss) if op.cast and op.reads for t in op.writes}
    names = (logits.name, casts.get(logits.name))  # a cast to the dtype that they have is dropped
    kept_keys = (
        key
        for key, n in zip(low.sizes, range(len(low.sizes)), strict=True)
        if low.left.counts.get(n) and key[5] in names
    )
    shape, dtype, *_ = next(kept_keys)
    return Tensor("logits", shape, dtype)


def generation(
    decided_: ResolvedRun, standing: int, held: tuple[TensorGroup, ...] = (), division: Division | None = None
) -> Sequence[SideTask]:
    """Return the generation of tokens after each of a batch's sequences, as transformers' generate does it, at the
    peak of each pass.

    decided_  the run of `generating_graph`
    held      tensors held meanwhile
    division  as of `generated_passes`
    """
    passes = generated_passes(decided_, division)
    each = enumerate(passes)
    return [SideTask("generate", f"{one.phase}: ", standing, held, passes, at) for at, one in each]


def generated_passes(decided_: ResolvedRun, division: Division | None = None) -> tuple[SizedPass, ...]:
    """Return the passes of a generation, which gathers weights in each as `division` says."""
    batch = with_lengths(decided_.batch, decided_.structure.graph.model, generates=True)
    prompted = decided_ if batch is decided_.batch else decided_._replace(batch=batch)
    steps = steps_of(prompted)
    if division is not None:
        left = division._replace(whole=left_whole(division))
        steps = (steps[0]._replace(division=division), *(step._replace(division=left) for step in steps[1:]))
    return tuple(sized(step, prompted) for step in steps)


@lru_cache(maxsize=256)
def generating_graph(graph: Graph, library: LibraryBehaviour, wide: bool, *, samples: bool = False) -> Graph:
    """Return the graph of a generation's first pass.

    wide     the logits of a pass are cast to fp32
    samples  tokens are sampled, from all of them

    Raises SpecError or UnsupportedModelError.
    """
    kind, facts = graph.model.model_type, graph.model.family.generation
    if graph.model.objective not in ("causal_lm", "seq2seq_lm") or not facts.is_modelled:
        raise refused("also.evaluation.new_tokens", f"generation is not supported yet for {graph.model.name or kind}")
    cache: Cache = "legacy" if library.generation.cache == "legacy" else "dynamic"
    crosses = graph.model.is_encoder_decoder
    one_pass = Pass(
        "prefill",
        cache,
        library.generation.last_logits and not graph.model.has_all_logits,
        wide,
        few_rows=library.weights.few_rows,
        samples=samples,
        has_encoder=crosses,
        suppresses=facts.suppresses,
        batches_later_passes=library.model.experts == "stacked",
        warps=not samples,
        has_row_positions=samples,
    )
    evaluation_graph = _evaluation_graph(graph, one_pass, caching=True)
    if not keeps_every_cache(evaluation_graph):
        raise UnsupportedModelError(
            f"also.evaluation.new_tokens: generation is not supported yet for model_type {kind} with this attention",
            "also.evaluation.new_tokens",
        )
    return evaluation_graph


def _merge(run: RunSpec, between: BetweenSteps, decided: ResolvedRun, model: ModelSpec | None) -> SideTask:
    """Return the merge of adapters, layer by layer: the peak is the largest layer's product."""
    merging = run.also.merging
    assert merging is not None
    graph, alone, loads, standing = decided.structure.graph, None, 0, between.bytes
    if merging.model == "reloaded":
        graph = alone = _reloaded_graph(run, model)
        weights, loads = _loaded_alone(graph)
        standing = weights + between.workspace
    held, where, host = _largest_merge(graph)
    return SideTask("merge", where, standing, held, host=0 if alone else host, own_process_graph=alone, loads=loads)


@lru_cache(maxsize=128)
def _loaded_alone(graph: Graph) -> tuple[int, int]:
    """Return the bytes of a model's weights, and the peak of loading them."""
    return total_bytes(parameters_of(graph)), loading_peak(graph)


@lru_cache(maxsize=128)
def _largest_merge(graph: Graph) -> tuple[tuple[TensorGroup, ...], str, int]:
    """Return the tensors of the largest layer's merge, the operation, and the bytes in host memory of the largest
    quantised layer."""
    stack, axes = operations_of(graph)
    best: tuple[tuple[TensorGroup, ...], str] = ((), "")
    host = 0
    for adapter in adapted_weights(stack):
        if not adapter.mergeable:
            raise refused(
                "also.merging",
                "peft only merges into unquantised and bitsandbytes weights; set model reloaded, which "
                "is not quantised",
            )
        where = f"{adapter.block}.{adapter.name}".lstrip(".")
        for merge_step in merge_moments(adapter):
            held = tuple(
                TensorGroup(
                    "temp", t.name, where, t.shape, t.dtype, 1, size(t.shape, t.dtype, axes)[1], merge_step.source
                )
                for t in merge_step.tensors
            )
            best = max(best, (held, f"{where}.merge"), key=lambda candidate: total_bytes(candidate[0]))
        if graph.recipe.quantization:
            host = max(host, elements(adapter.weight, axes) * ITEMSIZE["fp32"])
    held, operation = best
    return held, operation, host


def _reloaded_graph(run: RunSpec, model: ModelSpec | None) -> Graph:
    """Return the run's model as reloaded for merging: unsharded, in one dtype, not prepared for training."""
    merging = run.also.merging
    assert merging is not None
    kind = {"qlora": "lora", "qdora": "dora"}.get(run.method.kind, run.method.kind)
    merge_run = changed(run, "also", evaluation=None, saving=None, merging=None)
    merge_run = changed(merge_run, "method", kind=kind, quantization=None)
    merge_run = RunSpec.model_validate(
        {**dict(merge_run), "precision": merging.dtype or run.precision.weights, "parallelism": {}, "optimizer": {}}
    )
    return decide(merge_run, model).structure.graph
