"""The service's addresses, each with its question and its answer: routes, OpenAPI and the reference page have them."""

from __future__ import annotations

from typing import Any

from memplan.core.records import NamedTuple
from memplan.serve.page import QUESTIONS
from memplan.serve.questions import CheckQuestion, FitsQuestion, PlaceQuestion, PlanQuestion, RunBatch
from memplan.serve.settings import ServerSettings
from memplan.spec.run import RunSpec


class AddressOption(NamedTuple):
    """An option in the address."""

    name: str
    text: str


class Endpoint(NamedTuple):
    """An address.

    operation  what a worker process does; empty for what the server itself answers
    question   the type of the body; None for a GET
    answer     the name of the answer's schema
    is_long    whether it may take seconds, so that it never has all processes
    """

    method: str
    path: str
    operation: str
    text: str
    question: Any = None
    answer: str = ""
    options: tuple[AddressOption, ...] = ()
    is_long: bool = False


_FIELDS = AddressOption(
    "fields", "Only these parts of an answer, or figures in them: `verdict.answer,bytes.allocated`."
)
_TEXT = AddressOption("text", "Only those with this text in their names.")
_ESTIMATE = "How much memory a run takes, when, and whether it fits."
_LISTS = "List the {}, as `memplan {} --json` does."

ENDPOINTS = (
    Endpoint("POST", "/v1/estimate", "estimate", _ESTIMATE, RunSpec, "Estimate", (_FIELDS,)),
    Endpoint("POST", "/v1/estimates", "estimates", "The same for many runs.", RunBatch, "Estimates", (_FIELDS,), True),
    Endpoint("POST", "/v1/fits", "fits", "Which of many GPUs hold a run.", FitsQuestion, "Fits"),
    Endpoint("POST", "/v1/place", "place", "Where jobs go in a pool.", PlaceQuestion, "Placement", is_long=True),
    Endpoint("POST", "/v1/plan", "plan", "What to change or buy.", PlanQuestion, "Plan", is_long=True),
    Endpoint("POST", "/v1/check", "check", "Whether runs of files fit.", CheckQuestion, "Check", is_long=True),
    Endpoint("GET", "/v1/gpus", "gpus", _LISTS.format("GPUs", "gpus"), answer="List", options=(_TEXT,)),
    Endpoint("GET", "/v1/models", "models", _LISTS.format("bundled models", "models"), None, "List", (_TEXT,)),
    Endpoint(
        "GET",
        "/v1/schema",
        "schema",
        "A JSON Schema, as `memplan schema` prints it.",
        answer="Schema",
        options=(AddressOption("of", "`answer`, `run`, `comparison` or `plan`. Default `answer`."),),
    ),
    Endpoint("GET", "/v1/openapi.json", "openapi", "This description, as OpenAPI 3.1.", answer="Schema"),
    Endpoint("GET", "/healthz", "", "200 while the server runs."),
    Endpoint("GET", "/readyz", "", "200 once it answers, else 503."),
    Endpoint("GET", "/metrics", "", "Prometheus metrics."),
)
REVIEW = Endpoint("POST", "/review", "review", "AdmissionReview v1 of a pod; only of `memplan webhook`.")
PAGE = Endpoint("POST", QUESTIONS, "page", "A question of the web page; only with --web.", is_long=True)


def endpoints_of(settings: ServerSettings) -> tuple[Endpoint, ...]:
    others = (REVIEW, settings.review), (PAGE, settings.page)
    return (*ENDPOINTS, *(endpoint for endpoint, setting in others if setting is not None))
