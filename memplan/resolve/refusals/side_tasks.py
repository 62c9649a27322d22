"""Side tasks (evaluation, saving, merging) that a training run cannot do."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.kernels.wiring import TRAINERS
from memplan.catalogue.methods.methods import ADAPTERS, LORA
from memplan.core.errors import SpecError, refused
from memplan.models.peft_methods import PEFT_METHODS, leads_stream
from memplan.program.graph import Graph
from memplan.resolve.parallelism import WHOLE_WEIGHTS, replicas
from memplan.resolve.refusals.refuse import not_yet, not_yet_with
from memplan.spec.run import RunSpec
from memplan.spec.training import Evaluation

KEPT_BATCHES = 32_768  # whose logits are on the GPU at once: each is a separate allocation to replay


def refused_side_tasks(run: RunSpec, graph: Graph) -> Iterator[SpecError]:
    """Yield errors for side tasks (evaluation, saving, merging) that a run with its defaults filled in cannot do."""
    also, degrees = run.also, graph.degrees
    degree = next((name for name in ("pp", "cp", "ep") if getattr(run.parallelism, name) > 1), None)
    if degree is not None:
        yield not_yet_with("also", f"{degree} {getattr(run.parallelism, degree)}", "data parallelism, sharding and tp")
    tp = run.parallelism.tp
    for part in ("saving", "merging"):
        if tp > 1 and getattr(also, part) is not None:
            yield not_yet_with(f"also.{part}", f"tp {tp}", "also.evaluation")
    if tp > 1 and also.evaluation is not None and also.evaluation.kept_batches:
        yield not_yet_with("also.evaluation.kept_batches", f"tp {tp}", "0")
    if graph.code != "transformers" or degrees.style != "transformers" or graph.model.is_megatron:
        yield refused("also", f"is not supported yet with {run.profile}")
    for part in ("saving", "merging") if TRAINERS[run.trainer].own_loop else ():
        if getattr(also, part) is not None:
            yield not_yet_with(f"also.{part}", f"trainer {run.trainer}", "also.evaluation")
    if also.evaluation is not None:
        scans_alone = graph.model.family.training.scans_alone
        if "mamba_ssm" in run.kernels.packages and not scans_alone:  # which has another function for it
            yield not_yet_with("kernels.packages", "mamba_ssm and evaluation", "no packages")
        yield from _evaluation(run, also.evaluation)
    if also.merging is not None:
        if run.method.kind not in ADAPTERS:
            yield refused("also.merging", f"method {run.method.kind} has no adapters to merge")
        if run.method.kind in PEFT_METHODS:
            yield not_yet_with("also.merging", f"method {run.method.kind}", ", ".join(LORA))
        if also.merging.model == "trained" and also.merging.dtype is not None:
            yield refused("also.merging.dtype", "only applies to a reloaded model (also.merging.model reloaded)")
        if also.merging.model == "trained" and run.parallelism.world > 1:
            yield not_yet_with("also.merging.model", f"{run.parallelism.world} GPUs", "reloaded")


def _evaluation(run: RunSpec, e: Evaluation) -> Iterator[SpecError]:
    group, completions = run.batch.generations, e.micro * run.parallelism.dp
    if group and completions % group:
        ways = f"{group} completions of a prompt do not divide its {completions}"
        yield refused("also.evaluation.micro", f"{ways}; use a multiple of {group} (--eval-batch-size {group})")
    if e.new_tokens and leads_stream(run.method.kind):
        yield not_yet_with("also.evaluation.new_tokens", f"method {run.method.kind}", "0")
    for field in ("kept_batches", "new_tokens") if run.trainer != "sft" else ():
        if getattr(e, field):
            yield refused(f"also.evaluation.{field}", f"an evaluation of {run.trainer} keeps its loss only; use 0")
    if e.kept_batches and run.kernels.loss not in ("hf", "fused"):
        why = f"loss {run.kernels.loss} never holds all logits at once; use hf or fused"
        yield refused("also.evaluation.kept_batches", why)
    for field in ("accumulation", "preprocess", "batch_metrics", "concatenates"):
        if not e.kept_batches and getattr(e, field) != getattr(Evaluation(), field):
            name = f"also.evaluation.{field}"
            yield refused(name, "no logits are kept; set also.evaluation.kept_batches too")
    if e.batch_metrics and (e.accumulation is not None or not e.concatenates):
        name = f"also.evaluation.{'accumulation' if e.accumulation is not None else 'concatenates'}"
        yield refused(name, "with batch_metrics nothing of a batch is kept; leave it out")
    kept = 0 if e.batch_metrics else min(e.kept_batches, e.accumulation or e.kept_batches)
    if kept > KEPT_BATCHES:
        name = f"also.evaluation.{'kept_batches' if e.accumulation is None else 'accumulation'}"
        yield refused(
            name,
            f"keeps the logits of {kept:,} batches on the GPU at once, and memplan counts at most {KEPT_BATCHES:,}; "
            "use a smaller also.evaluation.accumulation (--eval-accumulation-steps)",
        )
    if e.new_tokens and e.kept_batches:
        yield refused("also.evaluation.kept_batches", "with new_tokens tokens are kept, not logits; leave it out")
    p = run.parallelism
    if e.new_tokens and replicas(p) > 1 and p.strategy not in WHOLE_WEIGHTS:
        yield not_yet(
            "also.evaluation.new_tokens",
            e.new_tokens,
            f"0 with {p.strategy}, whose ranks gather weights; or strategy ddp, zero1 or zero2, or tp alone",
        )
