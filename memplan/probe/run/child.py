"""The tracing process, `python -m memplan.probe.run.child`: reads questions as lines on stdin, answers on stdout.

It makes torch and the libraries see a CUDA device that does not exist, and ends with its parent.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from memplan.core.errors import MemplanError, ProbeError, refused
from memplan.core.units import gib
from memplan.probe import limits
from memplan.probe.fake import fake_device
from memplan.spec.run import RunSpec

_memories: dict[Any, Any] = {}  # by card: what earlier traces have recorded about operations


def main(memory: int = 0, seconds: int = 0) -> None:
    """Answer questions until stdin ends. The libraries' output goes to stderr, and they cannot read stdin.

    With limits, `memory` bytes and `seconds` of processor time, the process is restricted: see `limits`.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    questions = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if memory:
        limits.restrict(memory, seconds)
    for line in questions:
        question = json.loads(line)
        try:
            answer = _answer(
                RunSpec.model_validate(question["run"]),
                question["steps"],
                question["device"],
                question["data"],
                question.get("parameters"),
                restricted=bool(memory),
            )
        except Exception as error:  # memplan's own errors, and whatever the libraries raise for an unsupported run
            ours = isinstance(error, MemplanError)
            answer = {
                "error": type(error).__name__ if ours else "ProbeError",
                "message": str(error) if ours else _line_about(error),
                "field": error.field if isinstance(error, MemplanError) else "",
            }
            if memory and any(words in f"{answer['message']} {error!r}" for words in _OUT_OF_MEMORY):
                answer |= {"error": "ProbeError", "message": _TOO_LITTLE.format(gib(memory))}
            if not ours:
                traceback.print_exc()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    sys.stderr.flush()
    os._exit(0)  # torch's threads for the fake device cannot be joined


# How Python, C++ and torch report that memory ran out.
_OUT_OF_MEMORY = ("MemoryError", "bad_alloc", "can't allocate memory")
_TOO_LITTLE = "probe: the step cannot be traced: it takes more memory than the {} that a trace may use"


def _line_about(error: Exception) -> str:
    """Return one line with the error and its place in the libraries."""
    frames = traceback.extract_tb(error.__traceback__)
    library_frames = [frame for frame in frames if f"{os.sep}memplan{os.sep}" not in frame.filename]
    where = library_frames[-1] if library_frames else frames[-1]
    message = " ".join(str(error).split())
    place = "/".join(Path(where.filename).parts[-3:])
    if type(error).__name__ in ("DynamicOutputShapeException", "DataDependentOutputException"):
        return f"probe: the step cannot be traced: what it allocates depends on the data ({message:.100})"
    return f"probe: the step cannot be traced: {type(error).__name__}: {message:.300} ({place}:{where.lineno})"


def _answer(
    run: RunSpec, steps: int, device: str, data: bool, most: int | None = None, *, restricted: bool = False
) -> dict[str, Any]:
    """Return the trace of a run on `device`, with fake tensors or, with `data`, real ones.

    Raises ProbeError for a model of more than `most` parameters, SpecError for a sequence beyond its learned positions.
    """
    if "torch" not in sys.modules:
        fake_device.load()
    import torch

    from memplan.catalogue.hardware.gpus import find_gpu
    from memplan.catalogue.kernels.wiring import GENERATING
    from memplan.catalogue.quantization.fused_4bit import card_of
    from memplan.probe.fake import fake_tensor_patches as patches
    from memplan.probe.fake import recording
    from memplan.probe.fake.modules import mark_loss_start, module_names
    from memplan.probe.fake.tracker import Tracker, new_operation_cache
    from memplan.probe.libraries import library, versions
    from memplan.probe.script import distributed_wrapping as wrapping
    from memplan.probe.script import packed_batches, script
    from memplan.probe.script.model import base_of, unwrapped
    from memplan.probe.script.side_tasks import run_all

    for name in ("peft", "bitsandbytes"):  # imported here, so that tensors created on import are not recorded
        library(name)
    patched = _trainers_context(run)
    if restricted:
        limits.seal()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    start = time.monotonic()
    gpu = find_gpu(run.gpu) if run.gpu is not None else None
    card = card_of(gpu.compute_capability if gpu is not None else None)
    patches.apply(card, run.loop.padded, packed_batches.packed_sequences(run))
    key = (card, data, run.trainer in GENERATING and repr(run.batch))  # whose masks do not select all
    if key not in _memories:
        _memories[key] = new_operation_cache(card, fake=not data)
    tracker = Tracker(device, _memories[key], run.parallelism.stage)
    tracker.calibrate()
    labels = recording.StorageLabels(tracker)
    scripts: list[Any] = []

    @contextmanager
    def phase(name: str) -> Generator[None]:
        with tracker.phase(name):
            yield
        if scripts:
            _note(scripts[0], labels, name)

    gc.disable()  # tensors in reference cycles stay alive, as they do until Python happens to collect
    try:
        with patched, wrapping.ranks(run), tracker.resizing(), tracker:
            training = script.build(run, device, phase)
            scripts.append(training)
            total, active = training.counted
            _check(training.model, run, total, most)
            _note(training, labels, "load")
            mark_loss_start(tracker, base_of(training.model))
            with module_names(tracker, unwrapped(training.model)):
                for step in range(1, steps + 1):
                    tracker.step = step
                    training.step()
                tracker.step = 0
                run_all(training)
        recorded = recording.report(tracker, labels)
    finally:
        gc.enable()
    answer = {
        **recorded,
        "parameters": total,
        "trainable": training.trainable,
        "active": active,
        "built": type(base_of(training.model)).__name__,
        "versions": versions(),
        "seconds": round(time.monotonic() - start, 3),
        "notes": _notes(run, base_of(training.model)),
    }
    del training
    scripts.clear()
    _collect()
    return answer


def _collect() -> None:
    """Collect what a trace leaves. What stays, such as the libraries, is not visited again, which takes 0.3 s."""
    gc.collect()
    gc.freeze()


def _trainers_context(run: RunSpec) -> AbstractContextManager[None]:
    """Import the run's trainer of TRL, before tensors are fake, and return the context that it runs in."""
    if run.trainer == "sft":
        return nullcontext()
    from memplan.probe.script.trl_trainers import prepared, trainer_module

    trainer_module(run)
    return prepared(run)


def _note(training: Any, labels: Any, phase: str) -> None:
    """Label parameters, gradients and optimizer states at the end of the phases that may create them."""
    from memplan.probe.fake import recording
    from memplan.probe.script.model import unwrapped

    if phase in ("load", "forward"):
        model = unwrapped(training.model)
        labels.note("parameter", recording.parameters_of(model))
        labels.note("buffer", recording.buffers_of(model))
        if training.assistant is not None:
            labels.note("parameter", _assistant_tensors(recording.parameters_of(training.assistant)))
            labels.note("buffer", _assistant_tensors(recording.buffers_of(training.assistant)))
    if phase in ("forward", "backward"):
        labels.note("gradient", recording.gradients_of(training.parameters, labels))
    if phase in ("load", "backward", "step"):
        labels.note("optstate", recording.states_of(training.optimizers, labels))
    if training.scaler is not None:
        tensors = (getattr(training.scaler, name, None) for name in ("_scale", "_growth_tracker"))
        labels.note("other", (("scale of the loss", t) for t in tensors if t is not None))


def _assistant_tensors(tensors: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Prefix the names of the assistant's tensors, to tell them from the model's."""
    return ((f"assistant.{name}", tensor) for name, tensor in tensors)


def _check(model: Any, run: RunSpec, total: int, most: int | None) -> None:
    """Raise for a model that is too large to trace, or whose learned positions are too few for the run."""
    if most is not None and total > most:
        raise ProbeError(f"model: {total:,} parameters; a trace takes at most {most:,}", "model")
    from memplan.probe.script.model import base_of, facts_of
    from memplan.probe.script.parameter_counts import positions
    from memplan.resolve.batches import decoder_prompt_tokens

    field, tokens = "batch.sequence", run.batch.sequence + run.batch.new_tokens
    if getattr(base_of(model).config, "is_encoder_decoder", False):  # the position tables are the decoder's
        field, tokens = "batch.target_sequence", run.batch.target_sequence or 0
        if run.task == "generate":
            field = "batch.new_tokens"
            tokens = decoder_prompt_tokens(run.batch, facts_of(model)) + run.batch.new_tokens
    for name, rows in positions(model):
        if tokens > rows:
            raise refused(field, f"{tokens} tokens, but the model has learned positions for {rows} ({name})")


def _notes(run: RunSpec, base: Any) -> list[str]:
    notes: list[str] = []
    if run.kernels.attention == "flash_attention_2" and run.loop.padded:
        notes.append("the number of padding tokens depends on the data: the trace counts every token")
    implementation = getattr(base.config, "_attn_implementation", None)
    if run.kernels.attention is None and implementation == "eager":
        notes.append(f"transformers' {type(base).__name__} does not support sdpa: its attention is eager")
    return notes


if __name__ == "__main__":
    try:
        main(*map(int, sys.argv[1:]))
    except ProbeError as error:
        sys.exit(str(error))
