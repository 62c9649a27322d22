"""Many runs at once, in several processes, and models made ready before they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from typing import Any, cast

from memplan.core.errors import InternalError, MemplanError, SpecError, printable, refused
from memplan.core.workers import mapped, processes_for
from memplan.estimate.answer import Estimate
from memplan.estimate.estimate import estimate
from memplan.models.cards import find_model
from memplan.planning.fitting import fits
from memplan.resolve.decide import decide
from memplan.spec.pool import listed
from memplan.spec.run import Batch, RunSpec, changed

_METHODS = ("full", "lora", "qlora")


def estimate_many(
    runs: Iterable[RunSpec | Mapping[str, Any]], processes: int | None = None
) -> list[Estimate | MemplanError]:
    """Return the answer of each run in order, or the error that refuses it.

    processes  how many to use; None for one per core, and one for a few runs. A process is a fork, which has what was
               estimated before, and ends with the call; where there is no fork, all runs are answered in this one

    The answers are those of `estimate`, with the verdict and `bytes.used` already computed.
    """
    asked = listed("runs", runs)
    if processes is not None and processes < 1:
        raise refused("processes", f"must be at least 1, not {processes}")
    number = min(processes or processes_for(len(asked)), processes_for(1 << 20), len(asked)) or 1
    by_model: dict[str, list[int]] = {}
    for index, run in enumerate(asked):
        fields = cast(Mapping[str, Any], run if isinstance(run, Mapping) else {})
        model = run.model if isinstance(run, RunSpec) else fields.get("model")
        by_model.setdefault(repr(model), []).append(index)
    most = max(1, len(asked) // (number * _GROUPS))
    groups = [indices[i : i + most] for indices in by_model.values() for i in range(0, len(indices), most)]
    answers: list[Any] = [None] * len(asked)
    found = mapped(_answers, [[asked[index] for index in group] for group in groups], min(number, len(groups)) or 1)
    for index, answer in zip(chain(*groups), chain(*found), strict=True):
        answers[index] = answer
    return answers


_GROUPS = 8  # of runs for each process, at least. A group's answers are sent together, so they share their model


def _answers(runs: list[RunSpec | Mapping[str, Any]]) -> list[Estimate | MemplanError]:
    return [_answer(run) for run in runs]


def _answer(run: RunSpec | Mapping[str, Any]) -> Estimate | MemplanError:
    try:
        answer = estimate(RunSpec.model_validate(run))
        _ = answer.verdict.answer, answer.bytes.used  # pickled with the answer
    except MemplanError as error:
        return error
    except Exception as error:  # of one run, which must not end the others
        return InternalError(f"{type(error).__name__} {printable(str(error), 80)}")
    return answer


def warm(models: Iterable[str | RunSpec]) -> None:
    """Make ready what answers about these models share, so that the first one takes milliseconds.

    A model is made ready to be trained in full, with LoRA and with QLoRA; a run, to be asked for with any batch,
    sequence and GPU. Raises MemplanError for an unknown model.
    """
    for model in listed("models", models):
        for run in [model] if isinstance(model, RunSpec) else _runs_of(model):
            _ = estimate(run).bytes.used
            with suppress(MemplanError):  # a trainer may not take the other batch
                for micro in (run.batch.micro, run.batch.micro + 1):  # a second size finds what can be the peak at any
                    fits(changed(run, "batch", micro=micro))


def _runs_of(model: str) -> Iterator[RunSpec]:
    """Yield the runs that a model is made ready for, at a length that it has positions for. Raises MemplanError."""
    found, sequence = find_model(model), Batch().sequence
    if found.only_sequence is None and found.longest_sequence is not None:
        sequence = min(sequence, found.longest_sequence)
    for method in _METHODS:
        run = RunSpec(model=model, method=method, batch={"sequence": sequence})
        with suppress(SpecError):  # of a method that the model cannot be trained with
            decide(run)
            yield run
