"""The process that traces: `python -m memplan.probe.child`, a question a line on stdin, an answer a line on stdout.

It makes torch see a card that is not there, and the libraries believe so; it ends with its parent.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memplan.errors import MemplanError, ProbeError
from memplan.probe import fake_device
from memplan.spec import RunSpec

_known: dict[Any, Any] = {}  # what traces before this one have learnt of operations, by card


def main() -> None:
    """Answer until stdin ends. What the libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = _answer(
                RunSpec.model_validate(question["run"]), question["steps"], question["device"], question["data"]
            )
        except MemplanError as error:
            answer = {"error": type(error).__name__, "message": str(error), "field": error.field}
        except Exception as error:  # of the libraries, on a run they do not take: its last line says where
            answer = {"error": "ProbeError", "message": _line_about(error), "field": ""}
            traceback.print_exc()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    sys.stderr.flush()
    os._exit(0)  # torch's threads of a device that is not there cannot be joined


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


def _answer(run: RunSpec, steps: int, device: str, data: bool) -> dict[str, Any]:
    """The trace of a run on `device`, of fake tensors or, with `data`, of real ones."""
    if "torch" not in sys.modules:
        fake_device.load()
    import torch

    from memplan.gpus import find_gpu
    from memplan.probe import patches, recording, script
    from memplan.probe.kernels import card_of
    from memplan.probe.libraries import library, versions
    from memplan.probe.model import base_of, parameters_in
    from memplan.probe.modules import loss_apart, named
    from memplan.probe.tracker import Tracker, memory_of

    for name in ("peft", "bitsandbytes"):  # what their imports make is none of the run's
        library(name)
    torch.set_num_threads(1)
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    started = time.monotonic()
    gpu = find_gpu(run.gpu) if run.gpu is not None else None
    card = card_of(gpu.compute_capability if gpu is not None else None)
    patches.apply(card)
    if (card, data) not in _known:
        _known[card, data] = memory_of(card, fake=not data)
    tracker = Tracker(device, _known[card, data])
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
        with tracker:
            training = script.build(run, device, phase)
            built.append(training)
            _note(training, known, "load")
            loss_apart(tracker, base_of(training.model))
            with named(tracker, training.model):
                for step in range(1, steps + 1):
                    tracker.step = step
                    training.step()
        found = recording.report(tracker, known)
    finally:
        gc.enable()
    trainable = sum(p.numel() for p in training.parameters)
    answer = {
        **found,
        "parameters": parameters_in(training.model),
        "trainable": trainable,
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 3),
        "notes": _notes(run),
    }
    del training
    built.clear()
    gc.collect()
    return answer


def _note(training: Any, known: Any, phase: str) -> None:
    """What is a parameter, a gradient, a state: looked up at the end of the phases that may make some."""
    from memplan.probe import recording

    if phase in ("load", "forward"):
        known.note("parameter", recording.parameters_of(training.model))
        known.note("buffer", recording.buffers_of(training.model))
    if phase in ("forward", "backward"):
        known.note("gradient", recording.gradients_of(training.parameters))
    if phase in ("load", "backward", "step"):
        known.note("optstate", recording.states_of(training.optimizers))
    if training.scaler is not None:
        tensors = (getattr(training.scaler, name, None) for name in ("_scale", "_growth_tracker"))
        known.note("other", (t for t in tensors if t is not None))


def _notes(run: RunSpec) -> list[str]:
    notes: list[str] = []
    if run.kernels.attention == "flash_attention_2" and run.loop.padded:
        notes.append("how many tokens are padding is in the data: all are taken to be there")
    return notes


if __name__ == "__main__":
    try:
        main()
    except ProbeError as error:
        sys.exit(str(error))
