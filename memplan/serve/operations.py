"""Operations of a worker process: each takes a question and returns what is written as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from functools import lru_cache
from typing import Any, cast, get_args
from urllib.parse import parse_qs

from memplan.catalogue.hardware.gpus import find_gpu
from memplan.core.errors import ConfigError, MemplanError, SpecError, UnknownNameError, errors_about, refused
from memplan.core.files import given_files
from memplan.estimate.answer import DUMPED, Bytes, Estimate, Verdict
from memplan.estimate.demand import Demand
from memplan.estimate.estimate import estimate
from memplan.gate.budget import budget
from memplan.gate.rows import Answers, Check, Task, checked
from memplan.models.cards import find_model, parse_config
from memplan.planning.cluster import FixedDegrees, cluster_of
from memplan.planning.fitting import fits
from memplan.planning.lengths import dumped
from memplan.planning.many import warm
from memplan.planning.placement import place
from memplan.probe.route import estimates
from memplan.report import listing, plans
from memplan.report.plans.planned import MODES, PlanRequest, planned
from memplan.report.schema import answer_schema, comparison_schema, plan_schema, run_schema
from memplan.serve.messages import Question, Reply
from memplan.serve.openapi import openapi
from memplan.serve.problems import RequestError, problem_of
from memplan.serve.questions import (
    MOST_CARDS,
    MOST_RUNS,
    CheckQuestion,
    FitsQuestion,
    Mode,
    PlaceQuestion,
    PlanQuestion,
)
from memplan.serve.settings import ServerSettings
from memplan.serve.webhook import reviewed
from memplan.spec.parallelism import Parallelism
from memplan.spec.run import RunSpec

MOST_DEPTH = 64
_SCHEMAS = {"answer": answer_schema, "run": run_schema, "comparison": comparison_schema, "plan": plan_schema}
Operation = Callable[[Question, ServerSettings], object]


def answer(question: Question, settings: ServerSettings) -> Reply:
    """Return the reply to a question. Raises MemplanError for one that has no answer."""
    with nullcontext() if settings.files else given_files({}):
        found = OPERATIONS[question.operation](question, settings)
    return Reply(200, "", json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace"))


def body_of(question: Question) -> dict[str, Any]:
    """Return the JSON object of a request. Raises RequestError for anything else, or one that is too deep."""
    try:
        values = cast(dict[str, Any], parse_config(question.body.decode("utf-8-sig"), "the request"))
    except UnicodeDecodeError:
        raise RequestError(400, "invalid_json", "the request: not text in UTF-8") from None
    except ConfigError as error:
        raise RequestError(400, "invalid_json", str(error)) from None
    level: list[Any] = [values]
    for _ in range(MOST_DEPTH):
        level = [inner for each in level for inner in _inside(each) if isinstance(inner, (dict, list))]
        if not level:
            return values
    raise RequestError(400, "too_deep", f"the request: nested more than {MOST_DEPTH} deep")


def _inside(value: Any) -> Iterable[Any]:
    return cast(dict[str, Any], value).values() if isinstance(value, dict) else cast(list[Any], value)


def option(question: Question, name: str) -> str:
    """Return an option of the address, such as `?fields=verdict`; empty if it is not there. Raises RequestError."""
    return _options(question.query).get(name, "")


@lru_cache(maxsize=256)
def _options(query: str) -> Mapping[str, str]:
    try:
        return {name: ",".join(values) for name, values in parse_qs(query, max_num_fields=_MOST_OPTIONS).items()}
    except ValueError:
        raise RequestError(400, "invalid_query", f"the address: must have at most {_MOST_OPTIONS} options") from None


_MOST_OPTIONS = 16


def estimate_run(run: RunSpec, settings: ServerSettings) -> Estimate:
    via = "auto" if settings.trace else "engine"
    [answer] = estimates([(run, None)], via, online=settings.online)
    return answer


def _fields(question: Question) -> tuple[str, ...] | None:
    """Return which parts of an answer are asked for, or figures in them; None for all."""
    fields = tuple(name for name in option(question, "fields").split(",") if name)
    for name in fields:
        if name not in DUMPED and name not in FIGURES:
            raise UnknownNameError("fields", name, (*DUMPED, *FIGURES))
    return fields or None


# Figures that are asked for alone, because others of their part take a replay.
FIGURES = tuple(
    f"{part}.{name}"
    for part, of in (("bytes", Bytes), ("verdict", Verdict))
    for name, each in vars(of).items()
    if isinstance(each, property)
)


def _dumped(answer: Estimate, fields: tuple[str, ...] | None) -> dict[str, Any]:
    if fields is None:
        return dumped(answer)
    parts = answer.model_dump([name for name in fields if name in DUMPED])
    for name in fields:
        part, _, figure = name.partition(".")
        if figure:
            parts.setdefault(part, {})[figure] = getattr(getattr(answer, part), figure)
    return parts


def _estimate(question: Question, settings: ServerSettings) -> object:
    fields = _fields(question)
    return _dumped(estimate_run(RunSpec.model_validate(body_of(question)), settings), fields)


def _estimates(question: Question, settings: ServerSettings) -> object:
    body, fields = body_of(question), _fields(question)
    runs: object = body.get("runs")
    if not isinstance(runs, list) or body.keys() != {"runs"}:
        raise SpecError("runs: the request must have a list of runs, and nothing else", "runs")
    listed = cast(list[object], runs)
    if len(listed) > MOST_RUNS:
        raise SpecError(f"runs: must be at most {MOST_RUNS:,}, not {len(listed):,}", "runs")

    def one(run: object) -> dict[str, Any]:
        try:
            return _dumped(estimate_run(RunSpec.model_validate(run), settings), fields)
        except Exception as error:
            return {"problem": json.loads(problem_of(error).content)}

    return {"answers": [one(run) for run in listed]}


def _fits(question: Question, _: ServerSettings) -> object:
    asked = FitsQuestion.model_validate(body_of(question))
    found = fits(asked.run, asked.pool)
    return {"fits": [{"gpu": fit.gpu.name, "answer": fit.answer, "refusal": fit.refusal} for fit in found]}


def _place(question: Question, _: ServerSettings) -> object:
    asked = PlaceQuestion.model_validate(body_of(question))
    if len(asked.jobs) > MOST_RUNS:
        raise refused("jobs", f"must be at most {MOST_RUNS:,}, not {len(asked.jobs):,}")
    cards = sum(node.count * node.cards * max(1, len(node.mig)) for node in asked.pool)
    if cards > MOST_CARDS:
        raise refused("pool", f"must have at most {MOST_CARDS:,} GPUs, not {cards:,}")
    return place(asked.jobs, asked.pool, asked.policy).as_dict()


def _plan(question: Question, _: ServerSettings) -> object:
    asked = PlanQuestion.model_validate(body_of(question))
    run, demand = asked.run, Demand(asked.tight, asked.headroom)
    mode = _MODES.get(asked.mode, asked.mode)
    modes = MODES.get(run.task, (mode,))
    if mode not in modes:
        choices = " or ".join(name for name in get_args(Mode) if _MODES.get(name, name) in modes)
        raise SpecError(f"mode: {asked.mode} only applies to training; for task {run.task} choose {choices}", "mode")
    request = PlanRequest(mode, run, demand, axis=asked.axis, tokens=asked.tokens, most=asked.most)
    if mode != "buy":
        if run.gpu is None:
            raise SpecError(f"run.gpu: mode {asked.mode} needs a card", "run.gpu")
        demand.check(find_gpu(run.gpu))
    if mode == "nodes":
        assert run.gpu is not None
        if asked.nodes is None or asked.gpus is None:
            field = "gpus" if asked.nodes else "nodes"
            raise SpecError(f"{field}: mode nodes needs it, the number of {_COUNTED[field]}", field)
        if run.parallelism != Parallelism():
            raise SpecError("run.parallelism: mode nodes finds it; leave it out", "run.parallelism")
        cluster = cluster_of(find_gpu(run.gpu), asked.nodes, asked.gpus, asked.network_gbps)
        request = request._replace(cluster=cluster, pinned=FixedDegrees(sequences=asked.global_batch))
    return plans.dump(planned(request))


_MODES = {"fit": "levers", "advise": "advice"}
_COUNTED = {"nodes": "nodes", "gpus": "GPUs per node"}


def _check(question: Question, settings: ServerSettings) -> object:
    asked = CheckQuestion.model_validate(body_of(question))
    unknown = next((name for name in asked.runs if name not in asked.files), None)
    if unknown is not None:
        raise UnknownNameError("runs", unknown, asked.files)
    limits = budget(
        asked.runs or asked.files,
        asked.gpu,
        number=asked.gpus,
        fail=asked.fail,
        warn=asked.warn,
        band=asked.band,
        framework=asked.framework,
    )
    if not limits.gpus or not limits.runs:
        field = "files" if limits.gpus else "gpu"
        raise SpecError(f"{field}: name at least one", field)
    answers = Answers()
    with nullcontext() if settings.files else given_files(asked.files):
        rows = [row for name in limits.runs for row in checked(Task(name, limits, bool(asked.runs)), answers)]
    return Check(tuple(sorted(rows, key=lambda row: row.worst))).model_dump()


def _listed(listed: Callable[[str, bool], str]) -> Operation:
    return lambda question, _: json.loads(listed(option(question, "text"), True))


def _schema(question: Question, _: ServerSettings) -> object:
    of = option(question, "of") or "answer"
    if of not in _SCHEMAS:
        raise UnknownNameError("of", of, _SCHEMAS)
    return _SCHEMAS[of]()


def _review(question: Question, settings: ServerSettings) -> object:
    assert settings.review is not None
    return reviewed(body_of(question), settings.review, lambda run: estimate_run(run, settings), question.query)


def _page(question: Question, settings: ServerSettings) -> object:
    assert settings.page is not None
    return json.loads(settings.page.answer(question.body.decode("utf-8", "replace")))


OPERATIONS: Mapping[str, Operation] = {
    "estimate": _estimate,
    "estimates": _estimates,
    "fits": _fits,
    "place": _place,
    "plan": _plan,
    "check": _check,
    "gpus": _listed(listing.cards),
    "models": _listed(listing.models),
    "schema": _schema,
    "openapi": lambda question, settings: openapi(),
    "review": _review,
    "page": _page,
}


def make_ready(models: tuple[str, ...]) -> None:
    """Compute what answers for the models share, so that forked processes have it. Raises MemplanError.

    An answer and an error that need everything that is made once are computed too.
    """
    with errors_about("warm"):
        warm(models)
    for model in (*models, _SAMPLE):
        with suppress(MemplanError):
            estimate(RunSpec.model_validate({"model": model, "task": "generate", "gpu": "h100"})).model_dump()
    with suppress(MemplanError):
        RunSpec.model_validate({"model": {"config": {}}, "batch": {"micro": "one"}})
    with suppress(MemplanError), given_files({}):
        find_model("an-owner/a-model")


_SAMPLE = "qwen2-7b"
