"""OpenAPI 3.1 of the service, from the models that check its questions and that the published schemas are made of."""

from __future__ import annotations

from inspect import cleandoc
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter, create_model
from pydantic.json_schema import JsonSchemaMode

from memplan.core.version import __version__
from memplan.estimate.answer import ANSWERS
from memplan.planning.fitting import Fit
from memplan.planning.placement import Placement, Seat
from memplan.report.schema import QuietSchema, allow_words, answer_model, check_model, plan_model
from memplan.serve.endpoints import ENDPOINTS, Endpoint
from memplan.serve.problems import MEDIA_TYPE

_REF = "#/components/schemas/{model}"


class ProblemDetail(BaseModel):
    """The fault of a request."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    field: str = ""
    suggestions: list[str] = []


def openapi() -> dict[str, Any]:
    """Return the description of the service."""
    estimate: Any = answer_model()
    refused: Any = create_model("Refused", problem=(ProblemDetail, ...))
    fit = _model("Fit", Fit.__doc__, gpu=str, answer=Literal[(*ANSWERS, None)], refusal=str)
    seat = _model("Seat", Seat.__doc__, machine=str, cards=list[int])
    named: dict[str, Any] = {"job": int, "name": str}
    placed = _model("PlacedJob", _PLACED, **named, gpu=str, gpus=int, seats=list[seat], bytes=int, host_bytes=int)
    pending = _model("PendingJob", _PENDING, **named, code=str, reason=str)
    jobs: dict[str, Any] = {"placed": list[placed], "pending": list[pending]}
    each: dict[str, Any] = {"answers": (list[estimate | refused], ...)}
    answers: dict[str, Any] = {
        "Estimate": estimate,
        "Estimates": create_model("Estimates", **each),
        "Fits": _model("Fits", "Whether each GPU holds the run.", fits=list[fit]),
        "Placement": _model("Placement", Placement.__doc__, **jobs, cards_used=int, cards=int),
        "Check": check_model(),
        "ProblemDetail": ProblemDetail,
    }
    questions = {each.question.__name__: each.question for each in ENDPOINTS if each.question is not None}
    inputs: list[tuple[str, JsonSchemaMode, TypeAdapter[Any]]] = [
        *((name, "validation", TypeAdapter(model)) for name, model in questions.items()),
        *((name, "serialization", TypeAdapter(model)) for name, model in answers.items()),
        ("Plan", "serialization", plan_model()),
    ]
    refs, schemas = TypeAdapter.json_schemas(inputs, ref_template=_REF, schema_generator=QuietSchema)
    allow_words(schemas["$defs"]["RunSpec"])
    by_name = {name: schema for (name, _), schema in refs.items()}
    by_name |= {"List": {"type": "array", "items": {"type": "object"}}, "Schema": {"type": "object"}}
    paths = {each.path: {each.method.lower(): _operation(each, by_name)} for each in ENDPOINTS}
    info = {"title": "memplan", "version": __version__, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas["$defs"]}}


_PLACED = (
    """A job, by its place among the jobs, and the GPUs it is placed on; bytes of each, at the band's upper end."""
)
_PENDING = (
    """A job that is not placed, and why: code too_large, too_few_cards, host_memory or no_free_card, or an error's."""
)


def _model(title: str, doc: str | None, /, **types: Any) -> Any:
    fields: dict[str, Any] = {field: (type_, ...) for field, type_ in types.items()}
    return create_model(title, __doc__=cleandoc(doc or ""), **fields)


def _operation(each: Endpoint, named: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": named[each.answer]}} if each.answer else {}
    responses: dict[str, Any] = {"200": {"description": each.text, **({"content": content} if content else {})}}
    if each.answer:
        wrong = {"description": "A problem.", "content": {MEDIA_TYPE: {"schema": named["ProblemDetail"]}}}
        responses |= dict.fromkeys(_PROBLEMS if each.question else _PROBLEMS[:1], wrong)
    operation: dict[str, Any] = {"operationId": each.operation or each.path.strip("/"), "summary": each.text}
    if each.options:
        operation["parameters"] = [
            {"name": option.name, "in": "query", "description": option.text, "schema": {"type": "string"}}
            for option in each.options
        ]
    if each.question is not None:
        body = {"application/json": {"schema": named[each.question.__name__]}}
        operation["requestBody"] = {"required": True, "content": body}
    return {**operation, "responses": responses}


_PROBLEMS = ("422", "400", "408", "413", "415", "429")
