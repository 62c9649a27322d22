"""What a training run does beside its steps, where it is asked for: evaluates, generates, saves, merges adapters.

Each is an `Aside`: bytes beside what stands between two steps, when gradients are gone and the optimizer's states are
there. An evaluation is forward passes of the model as it trains, without dropout and of which nothing is recorded.

Source: transformers 5.24 trainer.py evaluation_loop and prediction_step, trainer_pt_utils.py EvalLoopContainer,
trainer_seq2seq.py prediction_step; of merging, memplan.catalogue.methods.merging; of saving,
memplan.program.training.saving."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from memplan.catalogue.inference.decoding import NOT_YET, SUPPRESSES, returned_by
from memplan.catalogue.inference.one_pass import Cache, Pass
from memplan.catalogue.methods.merging import adapted, merge
from memplan.catalogue.profiles.profiles import decided as words_of
from memplan.catalogue.profiles.profiles import find_profile
from memplan.core.errors import SpecError, UnsupportedModelError
from memplan.core.ir import Tensor
from memplan.core.units import ITEMSIZE
from memplan.engine.walk import size
from memplan.estimate.side_task import Aside
from memplan.estimate.walk import Walked
from memplan.models.model import ModelSpec
from memplan.program.graph import Graph, Held, built, elements, inferred, parameters_of
from memplan.program.inference.passes import Step, most_of, numbers_of
from memplan.program.inference.steps import steps_of
from memplan.program.loading import loading, most_at_once
from memplan.program.run import Decided
from memplan.program.training.program import division_in_pass
from memplan.program.training.saving import saved
from memplan.resolve.batches import check_batch, lengths
from memplan.resolve.decide import decide
from memplan.resolve.inference import caches_all
from memplan.resolve.refusals import refuse_also
from memplan.spec.run import RunSpec, changed
from memplan.spec.training import Also, Evaluation, Loop

_LOOP = "transformers 5.24 trainer.py Trainer.evaluation_loop"
_CONTAINER = "transformers 5.24 trainer_pt_utils.py EvalLoopContainer.add"


def asides(run: RunSpec, walked: Walked, decided: Decided, model: ModelSpec | None) -> tuple[Aside, ...]:
    """What the run does beside its steps, in the order it comes in. Raises SpecError."""
    also = run.also
    if also == Also():
        return ()
    refuse_also(run, decided.structure.graph)
    standing = walked.program.standing(walked.workspace)
    out: list[Aside] = []
    if also.evaluation is not None:
        out += _evaluated(run, also.evaluation, walked, model, standing)
    if also.saving is not None:
        held, where, host = saved(decided.structure, also.saving, walked.program)
        out.append(Aside("save", where, standing, held, host=host))
    if also.merging is not None:
        out.append(_merged(run, walked, decided, model, standing))
    return tuple(out)


def notes_of(run: RunSpec, asked: tuple[Aside, ...]) -> Iterator[str]:
    """What to know of them."""
    e = run.also.evaluation
    if e is None:
        return
    step, _ = asked[0].passes[0]
    longer = run.batch.model_copy(update={"sequence": e.sequence or run.batch.sequence})
    note = check_batch(longer, step.graph.model)
    if note is not None and e.sequence is not None and e.sequence > run.batch.sequence:
        yield f"evaluation: {note}"
    if e.kept_batches and e.accumulation is None and e.preprocess is None and not e.batch_metrics:
        yield (
            f"evaluation: the logits of {e.kept_batches} batches stay on the GPU until all are over; "
            "eval_accumulation_steps takes them to the host earlier, preprocess_logits_for_metrics keeps less of them"
        )


def _evaluated(run: RunSpec, e: Evaluation, walked: Walked, model: ModelSpec | None, standing: int) -> Iterator[Aside]:
    """An evaluation, and what it generates."""
    found = _deciding(run, e, model)
    words = words_of(
        find_profile(run.profile).name, found.structure.graph.model.model_type, run.method.quantization is not None
    )
    division = division_in_pass(found.structure, later=False)
    caching = bool(run.loop.use_cache) or words["forward_caches"]
    cache = words["cache"] if caching else ""
    now = Pass("eval", cache, wide=words["logits"] == "model")
    graph = _still(found.structure.graph, now, caching=caching)
    step = Step(graph, e.micro, found.batch.sequence, division=division)
    axes = numbers_of(step, found)
    low = inferred(graph, division=division)
    moving, moment = most_of(graph, axes, division)
    standing += walked.program.passing["forward"]
    passes = ((step, tuple(axes.items())),)
    kept = _kept(e, graph, axes, run.parallelism.dp)
    loss = Held("activation", "loss of a batch, by the loop's name", "evaluation", "", "fp32", 1, 512, _LOOP)
    named = () if e.batch_metrics else (loss,)  # the loop lets go of them by itself there
    during, joined = (*kept.during, *named), (*kept.joined, *named)
    where, batches = low.moments[moment].where, together_of(e) if kept.each else 1
    one = Aside(
        "eval", where, standing, during, passes, (0, moment), moving, kept.each, batches, e.concatenates, kept.host
    )
    if sum(h.bytes * h.copies for h in joined) > moving + one.beside:
        one = one._replace(where="evaluation.concat", held=joined, moving=0, top=(-1, -1))
    yield one
    if e.new_tokens:
        yield _generated(e, found, graph, words, now.wide, standing)


def _deciding(run: RunSpec, e: Evaluation, model: ModelSpec | None) -> Decided:
    """The run as its evaluation runs the model: with other lengths, and nothing of it checkpointed or dropped."""
    loss = "hf" if e.kept_batches and run.kernels.loss == "fused" else run.kernels.loss
    kernels = {"checkpointing": "none", "reentrant": None, "loss": loss}
    one = changed(run, "also", evaluation=None, saving=None, merging=None)
    one = changed(one, "kernels", **kernels)
    one = changed(one, "loop", hold_outputs=Loop().hold_outputs)
    batch = {"micro": e.micro, "sequence": e.sequence or run.batch.sequence, "accumulation": 1}
    one = changed(one, "batch", **batch)
    if run.method.dropout:
        one = changed(one, "method", dropout=0.0)
    return decide(one, model)


def _still(graph: Graph, now: Pass, caching: bool) -> Graph:
    """The graph in evaluation."""
    wiring = graph.wiring._replace(
        records=False, caching=caching, caches=False, last_only=now.generates and now.last_only
    )
    return graph._replace(
        wiring=wiring, recipe=graph.recipe._replace(dropout=False), inference=now, leaf=False, rank=graph.rank
    )


class _Kept(NamedTuple):
    """What is kept of batches that are over: `during` the last one's pass, and when it is `joined` to them; bytes of
    `each` batch's tensors, and of all in host memory."""

    during: tuple[Held, ...] = ()
    joined: tuple[Held, ...] = ()
    each: tuple[int, ...] = ()
    host: int = 0


def together_of(e: Evaluation) -> int:
    """Of how many batches predictions are on the GPU at most."""
    return min(e.kept_batches, e.accumulation or e.kept_batches)


def _kept(e: Evaluation, graph: Graph, axes: dict[str, int], ranks: int) -> _Kept:
    """Predictions and labels; with several ranks those of all, which are gathered."""
    logits = _returned(graph)
    if not e.kept_batches or logits is None:
        return _Kept()
    if e.preprocess == "argmax":
        logits = Tensor("likeliest tokens", " ".join(logits.shape.split()[:-1]), "int64")
    labels = Tensor("labels", logits.shape.rpartition(" ")[0] if e.preprocess is None else logits.shape, "int64")
    together = together_of(e)
    kinds = (logits, labels)

    def held(t: Tensor, what: str, count: int, source: str) -> Held:
        """As many batches in one tensor, of all ranks: they are gathered."""
        shape = f"{count * ranks} {t.shape}"
        bytes_ = size(shape, t.dtype, axes)[1]
        return Held("activation", f"{t.name}{what}", "evaluation", shape, t.dtype, 1, bytes_, source)

    if e.batch_metrics:
        return _Kept(joined=tuple(held(t, " of a batch, of all ranks", 1, _LOOP) for t in kinds) if ranks > 1 else ())
    each = tuple(held(t, " of a batch", 1, _CONTAINER) for t in kinds)
    host = sum(ITEMSIZE["fp32" if t.dtype == "bf16" else t.dtype] * _numbers(t, axes) for t in kinds)
    host *= e.kept_batches * ranks
    bytes_of_each = tuple(h.bytes for h in each)
    if not e.concatenates:
        found = tuple(h._replace(copies=together - 1) for h in each) if together > 1 else ()
        return _Kept(found, (), bytes_of_each, host)
    if together < e.kept_batches:  # those before are joined anew on the host
        host *= 2
    if together == 1:
        return _Kept((), (), bytes_of_each, host)
    before = tuple(held(t, " of the batches before", together - 1, _CONTAINER) for t in kinds)
    last = tuple(held(t, " of the batch before, by the loop's name", 1, _LOOP) for t in kinds if together > 2)
    joining = (before[0], each[0], held(logits, " of all batches, joined", together, _CONTAINER), before[1], each[1])
    return _Kept((*before, *last), joining, bytes_of_each, host)


def _numbers(t: Tensor, axes: dict[str, int]) -> int:
    out = 1
    for token in t.shape.split():
        out *= int(token) if token.isdigit() else axes[token]
    return out


def _returned(graph: Graph) -> Tensor | None:
    """The logits that a batch leaves, with their dtype."""
    stack, _ = built(graph)
    found = returned_by(stack, bool(graph.inference and graph.inference.wide))
    if found is None:
        return None
    low = inferred(graph, labelled=True)
    own = (
        key
        for key, n in zip(low.sizes, range(len(low.sizes)), strict=True)
        if low.left.counts.get(n) and key[5] == found.name
    )
    shape, dtype, *_ = next(own)
    return Tensor("logits", shape, dtype)


def _generated(
    e: Evaluation, found: Decided, graph: Graph, words: Mapping[str, Any], wide: bool, standing: int
) -> Aside:
    """Tokens generated after each of an evaluation's sequences."""
    kind = graph.model.model_type
    if graph.model.objective not in ("causal_lm", "seq2seq_lm") or kind in NOT_YET:
        raise SpecError(
            f"also.evaluation.new_tokens: generation is not supported yet for {graph.model.name or kind}",
            "also.evaluation.new_tokens",
        )
    way: Cache = "legacy" if words["cache"] == "legacy" else "dynamic"
    crosses = graph.model.is_encoder_decoder  # whose heads are given every token of the decoder's prompt
    last_only, few_rows, switches = (
        words["last_logits"] and not crosses,
        words["few_rows"],
        words["experts"] == "stacked",
    )
    now = Pass("prefill", way, last_only, wide, few_rows=few_rows, crosses=crosses, switches=switches)
    now = now._replace(suppresses=kind in SUPPRESSES)
    one = _still(graph, now, caching=True)
    if not caches_all(one):
        raise UnsupportedModelError(
            f"also.evaluation.new_tokens: generation is not supported yet for model_type {kind} with this attention",
            "also.evaluation.new_tokens",
        )
    asked = found.batch.model_copy(update={"new_tokens": e.new_tokens, "target_sequence": None})
    batch = lengths(asked, graph.model, generates=True)
    prompted = found._replace(structure=found.structure._replace(graph=one), batch=batch)
    passes: list[tuple[Step, tuple[tuple[str, int], ...]]] = []
    peaks: list[tuple[int, int]] = []
    for step in steps_of(prompted):
        axes = numbers_of(step, prompted)
        passes.append((step, tuple(axes.items())))
        peaks.append(most_of(step.graph, axes))
    top = max(range(len(peaks)), key=lambda i: peaks[i][0])
    moving, moment = peaks[top]
    where = f"{passes[top][0].phase}: {inferred(passes[top][0].graph).moments[moment].where}"
    return Aside("generate", where, standing, (), tuple(passes), (top, moment), moving)


def _merged(run: RunSpec, walked: Walked, decided: Decided, model: ModelSpec | None, standing: int) -> Aside:
    """Adapters merged layer by layer, all of them still there: the largest layer's product."""
    merging = run.also.merging
    assert merging is not None
    graph, alone, loads = decided.structure.graph, None, 0
    if merging.model == "reloaded":
        graph = alone = _reloaded(run, model)
        standing = sum(h.bytes * h.copies for h in parameters_of(graph)) + walked.workspace
        loads = most_at_once(loading(graph))
    stack, axes = built(graph)
    best: tuple[tuple[Held, ...], str] = ((), "")
    for one in adapted(stack):
        if not one.mergeable:
            raise SpecError(
                "also.merging: peft merges into whole weights and into bitsandbytes' alone; say reloaded, which is "
                "not quantised",
                "also.merging",
            )
        where = f"{one.block}.{one.name}".lstrip(".")
        for made in merge(one):
            held = tuple(
                Held("temp", t.name, where, t.shape, t.dtype, 1, size(t.shape, t.dtype, axes)[1], made.source)
                for t in made.tensors
            )
            best = max(best, (held, f"{where}.merge"), key=lambda found: sum(h.bytes for h in found[0]))
    host = 0
    if not alone and graph.recipe.quantization:
        host = max(elements(one.weight, axes) * ITEMSIZE["fp32"] for one in adapted(stack))
    return Aside("merge", best[1], standing, best[0], host=host, alone=alone, loads=loads)


def _reloaded(run: RunSpec, model: ModelSpec | None) -> Graph:
    """The run's model as it is loaded to merge adapters into it: whole, in one dtype, with nothing prepared."""
    merging = run.also.merging
    assert merging is not None
    kind = {"qlora": "lora", "qdora": "dora"}.get(run.method.kind, run.method.kind)
    one = changed(run, "also", evaluation=None, saving=None, merging=None)
    one = changed(one, "method", kind=kind, quantization=None)
    one = RunSpec.model_validate(
        {**dict(one), "precision": merging.dtype or run.precision.weights, "parallelism": {}, "optimizer": {}}
    )
    return decide(one, model).structure.graph
