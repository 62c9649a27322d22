"""The process that traces: `python -m memplan.probe.run.child`, a question a line on stdin, an answer a line on stdout.

It makes torch see a card that is not there, and the libraries believe so; it ends with its parent.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memplan.core.errors import MemplanError, ProbeError, SpecError
from memplan.core.units import gib
from memplan.probe import limits
from memplan.probe.fake import fake_device
from memplan.spec.run import RunSpec

_known: dict[Any, Any] = {}  # what traces before this one have learnt of operations, by card


def main(memory: int = 0, seconds: int = 0) -> None:
    """Answer until stdin ends. What the libraries print goes to stderr, and there is nobody whom they could ask.

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
        except Exception as error:  # memplan's own, or of the libraries, on a run they do not take
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
    os._exit(0)  # torch's threads of a device that is not there cannot be joined


# What Python, C++ and torch say.
_OUT_OF_MEMORY = ("MemoryError", "bad_alloc", "can't allocate memory")
_TOO_LITTLE = "probe: the step cannot be traced: it takes more memory than the {} that a trace may have"


def _line_about(error: Exception) -> str:
    """One line: what it was, and where in the libraries."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if f"{os.sep}memplan{os.sep}" not in frame.filename]
    where = outside[-1] if outside else frames[-1]
    said = " ".join(str(error).split())
    place = "/".join(Path(where.filename).parts[-3:])
    if type(error).__name__ in ("DynamicOutputShapeException", "DataDependentOutputException"):
        return f"probe: the step cannot be traced: what it allocates depends on the data ({said:.100})"
    return f"probe: the step cannot be traced: {type(error).__name__}: {said:.300} ({place}:{where.lineno})"


def _answer(
    run: RunSpec, steps: int, device: str, data: bool, most: int | None = None, *, restricted: bool = False
) -> dict[str, Any]:
    """The trace of a run on `device`, of fake tensors or, with `data`, of real ones.

    Raises ProbeError for a model of more than `most` parameters, SpecError for a sequence beyond its learned positions.
    """
    if "torch" not in sys.modules:
        fake_device.load()
    import torch

    from memplan.catalogue.hardware.gpus import find_gpu
    from memplan.probe.fake import fake_tensor_patches as patches
    from memplan.probe.fake import recording
    from memplan.probe.fake.kernels import card_of
    from memplan.probe.fake.modules import loss_apart, named
    from memplan.probe.fake.tracker import Tracker, memory_of
    from memplan.probe.libraries import library, versions
    from memplan.probe.script import distributed_wrapping as wrapping
    from memplan.probe.script import script
    from memplan.probe.script.model import base_of, unwrapped
    from memplan.probe.script.side_tasks import run_all

    for name in ("peft", "bitsandbytes"):  # what their imports make is none of the run's
        library(name)
    if restricted:
        limits.seal()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    started = time.monotonic()
    gpu = find_gpu(run.gpu) if run.gpu is not None else None
    card = card_of(gpu.compute_capability if gpu is not None else None)
    patches.apply(card)
    if (card, data) not in _known:
        _known[card, data] = memory_of(card, fake=not data)
    tracker = Tracker(device, _known[card, data], run.parallelism.stage)
    tracker.calibrate()
    known = recording.Known(tracker)
    built: list[Any] = []

    @contextmanager
    def phase(name: str) -> Generator[None]:
        with tracker.phase(name):
            yield
        if built:
            _note(built[0], known, name)

    gc.disable()  # what lies in cycles stays: on a card it does until Python happens to look
    try:
        with wrapping.ranks(run), tracker.resizing(), tracker:
            training = script.build(run, device, phase)
            built.append(training)
            total, active = training.counted
            _check(training.model, run, total, most)
            _note(training, known, "load")
            loss_apart(tracker, base_of(training.model))
            with named(tracker, unwrapped(training.model)):
                for step in range(1, steps + 1):
                    tracker.step = step
                    training.step()
                tracker.step = 0
                run_all(training)
        found = recording.report(tracker, known)
    finally:
        gc.enable()
    answer = {
        **found,
        "parameters": total,
        "trainable": training.trainable,
        "active": active,
        "built": type(base_of(training.model)).__name__,
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 3),
        "notes": _notes(run, base_of(training.model)),
    }
    del training
    built.clear()
    gc.collect()
    return answer


def _note(training: Any, known: Any, phase: str) -> None:
    """What is a parameter, a gradient, a state: looked up at the end of the phases that may make some."""
    from memplan.probe.fake import recording
    from memplan.probe.script.model import unwrapped

    if phase in ("load", "forward"):
        model = unwrapped(training.model)
        known.note("parameter", recording.parameters_of(model))
        known.note("buffer", recording.buffers_of(model))
        if training.assistant is not None:
            known.note("parameter", _of_assistant(recording.parameters_of(training.assistant)))
            known.note("buffer", _of_assistant(recording.buffers_of(training.assistant)))
    if phase in ("forward", "backward"):
        known.note("gradient", recording.gradients_of(training.parameters, known))
    if phase in ("load", "backward", "step"):
        known.note("optstate", recording.states_of(training.optimizers, known))
    if training.scaler is not None:
        tensors = (getattr(training.scaler, name, None) for name in ("_scale", "_growth_tracker"))
        known.note("other", (("scale of the loss", t) for t in tensors if t is not None))


def _of_assistant(tensors: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The assistant's tensors, told apart from the model's."""
    return ((f"assistant.{name}", tensor) for name, tensor in tensors)


def _check(model: Any, run: RunSpec, total: int, most: int | None) -> None:
    """Raise for what would be traced, but is no model or does not run."""
    if most is not None and total > most:
        raise ProbeError(f"model: {total:,} parameters; a trace takes at most {most:,}", "model")
    from memplan.probe.script.model import base_of
    from memplan.probe.script.parameter_counts import positions
    from memplan.resolve.batches import prompt_of_decoder

    field, tokens = "batch.sequence", run.batch.sequence + run.batch.new_tokens
    if getattr(base_of(model).config, "is_encoder_decoder", False):  # the tables are the decoder's
        field, tokens = "batch.target_sequence", run.batch.target_sequence or 0
        if run.task == "generate":
            field = "batch.new_tokens"
            tokens = prompt_of_decoder(run.batch, base_of(model).config.model_type) + run.batch.new_tokens
    for name, rows in positions(model):
        if tokens > rows:
            raise SpecError(f"{field}: {tokens} tokens, but the model has learned positions for {rows} ({name})", field)


def _notes(run: RunSpec, base: Any) -> list[str]:
    notes: list[str] = []
    if run.kernels.attention == "flash_attention_2" and run.loop.padded:
        notes.append("how many tokens are padding is in the data: all are taken to be there")
    had = getattr(base.config, "_attn_implementation", None)
    if run.kernels.attention.startswith("sdpa") and had == "eager":
        notes.append(f"transformers' {type(base).__name__} has no sdpa: its attention is eager")
    return notes


if __name__ == "__main__":
    try:
        main(*map(int, sys.argv[1:]))
    except ProbeError as error:
        sys.exit(str(error))
