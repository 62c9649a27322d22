"""A failure next to its run: what stood there, whether it was to be expected, and what to change."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import all_gpus, find_gpu
from memplan.catalogue.hardware.overhead import cuda_context
from memplan.core.errors import MemplanError
from memplan.core.units import gib
from memplan.estimate.answer import Estimate
from memplan.estimate.estimate import walk
from memplan.estimate.inference import InferenceWalk
from memplan.estimate.training import TrainingWalk
from memplan.explain.asked import MOST_CANDIDATES, name_tensor
from memplan.explain.engines import buffers, compare_statements
from memplan.explain.findings import ASKED, CHANGE, EXPECTED, HELD, LIKELY, POSSIBLE, SURE, Explanation, MemoryRow
from memplan.explain.frames import WEIGHT
from memplan.explain.message import Amount, Message
from memplan.explain.requests import TensorRequest, requests
from memplan.explain.tensors import RunSizes, ledger_lines
from memplan.frameworks.command import options
from memplan.models.cards import find_model
from memplan.planning.plan import plan
from memplan.planning.reach import largest_sequence
from memplan.spec.run import RunSpec, is_default

_NEAR = 5  # percent by which sums of a run and a log may differ and still mean the same moment


def compare_with_run(out: Explanation, run: RunSpec, with_plan: bool) -> None:
    run = _on_card(out, run)
    walked = walk(run)
    answer = Estimate(walked)
    out.answer = answer
    capacity = _capacity(out, walked.gpu)
    made = [*requests(walked, capacity)] if isinstance(walked, TrainingWalk) else []
    failed = made[-1] if made and made[-1].failed else None
    model = find_model(run.model)
    if out.message.form.library == "llama.cpp":
        buffers(out, model, answer)
    else:
        is_served = not isinstance(walked, (TrainingWalk, InferenceWalk))
        sizes = RunSizes(walk(RunSpec(model=run.model)), (WEIGHT,)) if is_served else RunSizes(walked)
        name_tensor(out, sizes, model, failed, lengths_known=not is_served)
    request = out.message.amount("request")
    if request is not None and not out.candidates:
        for line in ledger_lines(request, answer.ledger)[:MOST_CANDIDATES]:
            out.find(ASKED, f"{request.text} is near {line.what}, {gib(line.bytes)}", POSSIBLE, "a line of the ledger")
    _contradictions(out, run)
    _compare(out, answer, *_at_the_batch(out, run, made, failed), request)
    compare_statements(out, answer)
    _expected(out, answer, failed)
    if with_plan:
        _change(out, answer)


def _contradictions(out: Explanation, run: RunSpec) -> None:
    """Say what else in the log the run does not have: ranks, and a phase after the steps."""
    last = max(out.message.ranks, default=0)
    if last >= run.parallelism.world:
        out.contradictions.append(f"the log is of rank {last}, and the run has {run.parallelism.world} GPU")
    phase = out.position.phase
    if phase in _AFTER_STEPS and run.task == "train" and is_default(run, "also"):
        out.contradictions.append(f"it died in {phase}, which the run does not have; add {_AFTER_STEPS[phase]}")


# Phase after the steps -> the option that adds it.
_AFTER_STEPS = {"eval": "--eval-batch-size", "save": "--save", "merge": "--merge trained"}


def _at_the_batch(
    out: Explanation, run: RunSpec, made: Sequence[TensorRequest], failed: TensorRequest | None
) -> tuple[Sequence[TensorRequest], TensorRequest | None]:
    """Return the run's requests, for the batch that asked if its length follows from the request."""
    candidate, certainty = out.candidates[0] if out.candidates else (None, POSSIBLE)
    if candidate is None or certainty == POSSIBLE or candidate.given or not 0 < candidate.sequence < run.batch.sequence:
        return made, failed
    with suppress(MemplanError):
        batch = run.batch.model_copy(update={"sequence": candidate.sequence})
        shorter = walk(run.model_copy(update={"batch": batch}))
        if isinstance(shorter, TrainingWalk):
            out.notes.append(f"Predicted for {run.batch.micro} x {candidate.sequence:,} tokens, the batch that asked.")
            return [*requests(shorter)], None
    return made, failed


def _on_card(out: Explanation, run: RunSpec) -> RunSpec:
    """Return the run on the card of the log; a contradiction if the run names another one."""
    total = out.message.amount("total")
    if total is None:
        return run
    if run.gpu is not None:
        gpu = find_gpu(run.gpu)
        if (
            abs(gpu.usable - total.bytes) * 20 <= total.bytes
            or gpu.driver_total >= total.bytes * 95 // 100 >= gpu.usable * 90 // 100
        ):
            return run
        near = _cards_of(total.bytes)
        text = f"the log's card has {total.text}, and the run's {gpu.title} {gib(gpu.usable)}"
        out.contradictions.append(text + (f"; as {near[0].title}" if near else ""))
        return run.model_copy(update={"gpu": near[0].name}) if near else run
    near = _cards_of(total.bytes)
    if near:
        out.notes.append(f"No card is given: {total.text} is what {near[0].title} has.")
        return run.model_copy(update={"gpu": near[0].name})
    return run


def _cards_of(total: int) -> list[GPU]:
    """Return the NVIDIA cards whose usable memory is nearest to a total, within 3 %."""
    near = [gpu for gpu in all_gpus() if gpu.vendor == "NVIDIA" and abs(gpu.usable - total) * 100 <= 3 * total]
    return sorted(near, key=lambda gpu: abs(gpu.usable - total))


def _capacity(out: Explanation, gpu: GPU | None) -> int | None:
    """Return the bytes that torch could reserve at the failure: what it had, and what was free."""
    message = out.message
    free, reserved = message.amount("free"), _reserved(message)
    if free is not None and reserved is not None:
        return reserved + free.bytes
    if gpu is None:
        return None
    return gpu.usable - cuda_context(gpu.compute_capability).usual


def _reserved(message: Message) -> int | None:
    reserved, allocated, rest = (message.amount(name) for name in ("reserved", "allocated", "unallocated"))
    if reserved is not None:
        return reserved.bytes
    return allocated.bytes + rest.bytes if allocated is not None and rest is not None else None


_KIND_WORDS = {
    "parameter": "weights",
    "gradient": "gradients",
    "optstate": "optimizer states",
    "activation": "activations",
    "temp": "temporaries",
    "buffer": "buffers",
    "other": "workspaces and others",
}


def _compare(
    out: Explanation,
    answer: Estimate,
    made: Sequence[TensorRequest],
    failed: TensorRequest | None,
    request: Amount | None,
) -> None:
    """Put memory at the failure next to what the run predicts at that moment."""
    message = out.message
    allocated, reserved = message.amount("allocated"), _reserved(message)
    at = _moment_of(made, failed, request, allocated)
    is_nearest = at is None and bool(made) and allocated is not None
    if is_nearest and allocated is not None:
        phase = out.position.phase
        at = min(made, key=lambda r: (phase not in ("", r.phase), abs(r.allocated - allocated.bytes)))
        out.notes.append(f"Predicted: {_place(at)}, the moment nearest to what was allocated.")
    for kind, bytes_ in sorted((at.kinds if at else answer.categories).items(), key=lambda item: -item[1]):
        if bytes_ > 0:
            out.rows.append(MemoryRow(_KIND_WORDS.get(kind, kind), None, bytes_))
    if allocated is not None:
        out.rows.append(
            MemoryRow("allocated by torch", allocated.bytes, at.allocated if at else answer.bytes.allocated)
        )
    if reserved is not None:
        out.rows.append(MemoryRow("reserved by torch", reserved, at.reserved if at else answer.bytes.reserved))
    in_use = message.amount("in_use")
    if in_use is not None:
        context = sum(row.usual for row in answer.beside)
        out.rows.append(
            MemoryRow("this process", in_use.bytes, (at.reserved if at else answer.bytes.reserved) + context)
        )
    if at is None or allocated is None or is_nearest:
        return
    place = _place(at)
    off = allocated.bytes - at.allocated
    near = abs(off) * 100 <= _NEAR * max(at.allocated, 1) + 100 * allocated.slack
    if near:
        text = f"{allocated.text} were allocated, as the run predicts for {place} ({gib(at.allocated)})"
        out.find(HELD, text, SURE if at.failed else LIKELY, "the run's allocations, replayed in order")
        return
    top = answer.peak
    if off > 0:
        text = f"{gib(off)} more were allocated than the run predicts for {place} ({gib(at.allocated)})"
        why = "longer sequences, a larger batch, something that the run does not say, or tensors that the script keeps"
        out.find(HELD, text, LIKELY, why)
    elif not at.failed or allocated.bytes < at.allocated:
        text = f"{gib(-off)} less were allocated than the run predicts for {place} ({gib(at.allocated)})"
        text += ": it died earlier, or its batch was smaller"
        out.find(HELD, text, LIKELY, f"the run's peak is at {top.phase} {top.where}".rstrip())


def _moment_of(
    made: Sequence[TensorRequest], failed: TensorRequest | None, request: Amount | None, allocated: Amount | None
) -> TensorRequest | None:
    """Return the request of the replay that the message is about: the one that fails, or the nearest of its size."""
    if failed is not None:
        return failed
    same = [r for r in made if request is not None and abs(r.segment - request.bytes) <= request.slack]
    if not same or allocated is None:
        return None
    return min(same, key=lambda r: abs(r.allocated - allocated.bytes))


def _place(at: TensorRequest) -> str:
    step = f" of step {at.step}" if at.step else ""
    name = f" at {at.where or at.name}" if at.where or at.name else ""
    layer = f", layer {at.repeat + 1} of this pass" if at.repeat and "layer" in at.where else ""
    return f"{at.phase}{step}{name}{layer}"


def _expected(out: Explanation, answer: Estimate, failed: TensorRequest | None) -> None:
    verdict, gpu = answer.verdict.answer, answer.gpu
    if gpu is None:
        out.find(EXPECTED, f"no card is known: the run uses {gib(answer.bytes.used)}", SURE, "name it with --gpu")
        return
    used = f"{gib(answer.bytes.used)} of {gib(gpu.usable)} on {gpu.name}"
    if verdict in ("does not fit", "does not start"):
        when = (
            f"; it dies in {_place(failed)}"
            if failed
            else f"; its peak is in {answer.peak.phase} at {answer.peak.where}"
        )
        out.find(
            EXPECTED, f"yes: memplan says it {verdict}, {used}{when}", LIKELY, "the estimate of the run on this card"
        )
    elif verdict == "tight":
        out.find(
            EXPECTED, f"perhaps: memplan says tight, {used}", LIKELY, "the card's memory is inside the expected range"
        )
    else:
        text = f"no: memplan says it fits, {used}"
        if failed is not None:
            text += f", but not in what the log says was left for torch: there it dies in {_place(failed)}"
        out.find(EXPECTED, text, LIKELY, "then something in the run differs from what it says")
        _longest(out, answer)


def _longest(out: Explanation, answer: Estimate) -> None:
    """Say with which lengths the run would die, and name what contradicts it."""
    if answer.run.task != "train":
        return
    with suppress(MemplanError):
        longest = largest_sequence(answer.asked)
        if longest:
            text = f"batches of up to {answer.run.batch.micro} x {longest:,} tokens fit; a longer one dies"
            out.find(EXPECTED, text, LIKELY, f"the run says {answer.run.batch.sequence:,}")
    if is_default(answer.asked, "also"):
        out.notes.append("Evaluation, saving and merging are not part of the run; --eval and --save add them.")


def _change(out: Explanation, answer: Estimate) -> None:
    if answer.gpu is None or answer.verdict.answer == "fits" or answer.run.task != "train":
        return
    with suppress(MemplanError):
        out.plan = plan(answer.asked)
        best = out.plan.best
        if best is None:
            nearest = out.plan.nearest
            need = f": even with every lever it uses {gib(nearest.answer.bytes.used)}" if nearest else ""
            out.find(CHANGE, f"nothing makes it fit this card{need}", LIKELY, "every lever was tried")
            return
        titles = " and ".join(lever.title for lever in best.levers)
        text = f"{titles}: {gib(best.answer.bytes.used)} instead of {gib(answer.bytes.used)}"
        out.find(CHANGE, text, LIKELY, options(answer.asked, best.run) or "the smallest change to the result")
