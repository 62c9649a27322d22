"""How a run is answered: from memplan's own stacks, or by a trace of its step, for any class that transformers has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal

from memplan.core.errors import MemplanError, ProbeError, SpecError, UnknownNameError, UnsupportedModelError
from memplan.estimate.estimate import estimate as by_engine
from memplan.models.cards import find_config, find_model
from memplan.spec.generation import InlineModel

if TYPE_CHECKING:
    from memplan.estimate.answer import Estimate
    from memplan.estimate.calibration import Calibration
    from memplan.models.model import ModelSpec
    from memplan.probe.run.trace import Tracer
    from memplan.spec.run import RunSpec

Via = Literal["engine", "trace", "auto"]
VIAS: tuple[Via, ...] = ("auto", "engine", "trace")
# What no trace makes up for: a head that no class for training has, a file of weights that gives no config.
_UNTRACED = ("architectures", "model")


def estimate(
    run: RunSpec,
    calibration: Calibration | None = None,
    model: ModelSpec | None = None,
    *,
    via: Via = "engine",
    cache: bool = True,
) -> Estimate:
    """How much memory the run takes, when, and whether it fits.

    `calibration` is a machine's own profile, for runs on the card it is of; others are answered without it. `model` is
    the one that the run names, where it has been looked up already (`memplan.find_model`).

    `via` the engine, which is pure. `trace` starts a process that takes the step on tensors without data, with the
    installed torch, transformers and peft (`pip install 'memplan[probe]'`): it answers for every model class that
    transformers builds from a config, in seconds, and for tasks that the engine does not know yet; with `cache` the
    trace is kept in the user's cache folder. `auto` traces only what memplan has no stack for: a family, or a config of
    one with an activation or a kind of layer that its stack does not know.

    Raises SpecError, UnknownNameError, ConfigError, ProbeError or FactsMissingError (all MemplanError) where the run
    cannot be answered. A run that does not fit is an answer, not an error.
    """
    if via == "engine":
        return by_engine(run, calibration, model)
    [answer] = estimates([(run, calibration)], via, cache=cache)
    return answer


def estimates(
    runs: Iterable[tuple[RunSpec, Calibration | None]],
    via: Via = "auto",
    *,
    cache: bool = True,
    online: bool = False,
    engine: Callable[..., Estimate] = by_engine,
) -> list[Estimate]:
    """The answers of several runs, each with the profile of its card; those that are traced are so in one process.

    `online`: a model without a card is asked of the Hub (see `memplan.models.cards.find_model`). `engine` answers a run
    from memplan's stacks.
    """
    if via not in VIAS:
        raise UnknownNameError("via", via, VIAS)
    answers: list[Estimate] = []
    found: dict[str | InlineModel, ModelSpec] = {}  # what the Hub said, which is asked once
    with ExitStack() as stack:
        tracer: Tracer | None = None
        for run, calibration in runs:
            unsupported: UnsupportedModelError | None = None
            if online and run.generation.assistant_model is not None:
                find_config(run.generation.assistant_model, online=True)  # which lies in the Hub's cache then
            if via != "trace":
                try:
                    if online and run.model not in found:
                        found[run.model] = find_model(run.model, online)
                    answers.append(engine(run, calibration, *((found[run.model],) if online else ())))
                    continue
                except UnsupportedModelError as error:
                    if via == "engine" or error.field in _UNTRACED:
                        raise
                    unsupported = error
            from memplan.probe.answer import traced_answer
            from memplan.probe.limits import USUAL
            from memplan.probe.run.trace import Tracer

            tracer = tracer or stack.enter_context(Tracer(USUAL))
            try:
                answers.append(traced_answer(_known(run) if online else run, tracer, calibration, keep=cache))
            except (ProbeError, SpecError, UnknownNameError) as error:
                if unsupported is None:
                    raise
                raise _neither(run, unsupported, error) from None
    return answers


def _known(run: RunSpec) -> RunSpec:
    """The run with a model that is here: an id's config lies in the Hub's cache once it has been asked for."""
    config = find_config(run.model, online=True)
    if not isinstance(run.model, str) or "/" in run.model:
        return run
    return run.model_copy(update={"model": InlineModel(config={"_name_or_path": run.model, **config})})


def _neither(run: RunSpec, unsupported: UnsupportedModelError, untraced: MemplanError) -> UnsupportedModelError:
    """The error about a config without a stack whose step cannot be traced: what is nearest, and what stands in the
    way of a trace."""
    line = str(unsupported)
    if untraced.field == "model" and find_config(run.model).get("auto_map"):
        line = f"{_ended(line)} its class is code of its own (auto_map), which memplan never runs;"
    return UnsupportedModelError(f"{_ended(line)} nor can its step be traced: {_reason(untraced)}", unsupported.field)


def _reason(error: MemplanError) -> str:
    return str(error).removeprefix("probe: ").removeprefix("the step cannot be traced: ")


def _ended(line: str) -> str:
    return line if line.endswith(("?", ";")) else f"{line};"


def without_a_trace(error: UnsupportedModelError, what: str) -> UnsupportedModelError:
    """The error of a command that asks the engine for many runs, about a config that can only be traced."""
    if error.field in _UNTRACED:
        return error
    return UnsupportedModelError(
        f"{_ended(str(error))} memplan estimate can trace it, but {what} tries too many runs for that", error.field
    )
