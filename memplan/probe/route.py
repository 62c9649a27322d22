"""Answer a run from memplan's own stacks, or by tracing its step, for any model class in transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, cast

from memplan.core.errors import MemplanError, ProbeError, SpecError, UnknownNameError, UnsupportedModelError
from memplan.estimate.estimate import estimate as by_engine
from memplan.models.cards import find_config, find_model
from memplan.spec.generation import InlineModel
from memplan.spec.run import RunSpec

if TYPE_CHECKING:
    from memplan.estimate.answer import Estimate
    from memplan.estimate.calibration import Calibration
    from memplan.frameworks.reading.config import FieldOrigin
    from memplan.models.model import ModelSpec
    from memplan.probe.run.trace import Tracer

Via = Literal["engine", "trace", "auto"]
VIAS: tuple[Via, ...] = ("auto", "engine", "trace")
# Fields whose errors a trace cannot work around: a head without a training class, a weights file without a config.
_UNTRACED = ("architectures", "model")


def estimate(
    run: RunSpec | str | InlineModel | Mapping[str, Any],
    calibration: Calibration | None = None,
    model: ModelSpec | None = None,
    *,
    via: Via = "engine",
    cache: bool = True,
    **fields: Any,
) -> Estimate:
    """Return how much memory the run takes, when, and whether it fits.

    run             the run, or its model (a name, id, path or `{"config": {...}}`), and the run's other `fields`, as in
                    `estimate("qwen2-7b", method="qlora", gpu="3090")`; with a run, they replace its own
    calibration     profile of a measured machine; used for runs on its card only
    model           the model that the run names, if already looked up (`memplan.find_model`)
    via             `engine` computes from memplan's stacks and has no side effects;
                    `trace` runs the step on tensors without data in a new process;
                    `auto` traces only what memplan has no stack for
    cache           whether traces are kept in the user's cache folder

    A trace uses the installed torch, transformers and peft (`pip install 'memplan[probe]'`) and takes seconds. It works
    for every model class that transformers builds from a config, and for tasks that the engine does not support yet.
    `auto` traces unknown families, and configs with an activation or a kind of layer unknown to the family's stack.

    Raises SpecError, UnknownNameError, ConfigError, ProbeError or FactsMissingError (all MemplanError) if the run
    cannot be answered. A run that does not fit is an answer, not an error.
    """
    if fields or not isinstance(run, RunSpec):
        fields = {**(dict(run) if isinstance(run, RunSpec) else {"model": run}), **fields}
        run = RunSpec.model_validate(fields)
    if via == "engine":
        answer = by_engine(run, calibration, model)
    else:
        [answer] = estimates([(run, calibration)], via, cache=cache)
    derived = tuple(_derived(fields.get("parallelism"), run)) if fields else ()
    return answer.read_from(derived, ()) if derived else answer


_DERIVED = {
    "world": "derived: tp x pp x cp",
    "dp": "derived: world / (tp x pp x cp)",
    "strategy": "derived: replicas without a strategy are DDP's",
}


def _derived(given: object, run: RunSpec) -> Iterator[FieldOrigin]:
    """Yield the fields of the parallelism that were filled in."""
    if not isinstance(given, Mapping):
        return
    for name, why in _DERIVED.items():
        if name not in cast(Mapping[str, Any], given) and name in run.parallelism.model_fields_set:
            from memplan.frameworks.reading.config import FieldOrigin

            yield FieldOrigin(f"parallelism.{name}", getattr(run.parallelism, name), why)


def estimates(
    runs: Iterable[tuple[RunSpec, Calibration | None]],
    via: Via = "auto",
    *,
    cache: bool = True,
    online: bool = False,
    engine: Callable[..., Estimate] = by_engine,
) -> list[Estimate]:
    """Return the answers of several runs, each with its card's calibration; all traces share one process.

    online  whether models unknown to memplan are looked up on the Hub (see `memplan.models.cards.find_model`)
    engine  function that answers a run from memplan's stacks
    """
    if via not in VIAS:
        raise UnknownNameError("via", via, VIAS)
    answers: list[Estimate] = []
    models: dict[str | InlineModel, ModelSpec] = {}  # each model is looked up once
    with ExitStack() as stack:
        tracer: Tracer | None = None
        for run, calibration in runs:
            unsupported: UnsupportedModelError | None = None
            if online and run.generation.assistant_model is not None:
                find_config(run.generation.assistant_model, online=True)  # fetches it into the Hub's cache
            if via != "trace":
                try:
                    if online and run.model not in models:
                        models[run.model] = find_model(run.model, online)
                    answers.append(engine(run, calibration, *((models[run.model],) if online else ())))
                    continue
                except UnsupportedModelError as error:
                    if via == "engine" or error.field in _UNTRACED:
                        raise
                    unsupported = error
            from memplan.probe.answer import traced_answer
            from memplan.probe.limits import DEFAULT_LIMITS
            from memplan.probe.run.trace import Tracer

            tracer = tracer or stack.enter_context(Tracer(DEFAULT_LIMITS))
            try:
                answers.append(
                    traced_answer(_with_local_config(run) if online else run, tracer, calibration, keep=cache)
                )
            except (ProbeError, SpecError, UnknownNameError) as error:
                if unsupported is None:
                    raise
                raise _unanswerable(run, unsupported, error) from None
    return answers


def _with_local_config(run: RunSpec) -> RunSpec:
    """Return the run with its model's config inlined, or with its Hub id, whose config is in the Hub's cache by now."""
    config = find_config(run.model, online=True)
    if not isinstance(run.model, str) or "/" in run.model:
        return run
    return run.model_copy(update={"model": InlineModel(config={"_name_or_path": run.model, **config})})


def _unanswerable(run: RunSpec, unsupported: UnsupportedModelError, untraced: MemplanError) -> UnsupportedModelError:
    """Return the error for a config that memplan has no stack for and cannot trace, with both reasons."""
    line = str(unsupported)
    if untraced.field == "model" and find_config(run.model).get("auto_map"):
        line = f"{_as_clause(line)} its class is custom code (auto_map), which memplan never runs;"
    return UnsupportedModelError(
        f"{_as_clause(line)} nor can its step be traced: {_reason(untraced)}", unsupported.field
    )


def _reason(error: MemplanError) -> str:
    return str(error).removeprefix("probe: ").removeprefix("the step cannot be traced: ")


def _as_clause(line: str) -> str:
    return line if line.endswith(("?", ";")) else f"{line};"


def without_a_trace(error: UnsupportedModelError, what: str) -> UnsupportedModelError:
    """Return the error of a command that tries too many runs to trace, for a config that can only be traced."""
    if error.field in _UNTRACED:
        return error
    return UnsupportedModelError(
        f"{_as_clause(str(error))} memplan estimate can trace it, but {what} tries too many runs for that", error.field
    )
