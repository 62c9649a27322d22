"""The published JSON Schemas: of a run, as `--spec` takes it, and of answers, comparisons and plans as JSON."""

from __future__ import annotations

from functools import cache, reduce
from inspect import cleandoc
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import BaseModel, Field, TypeAdapter, create_model
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaWarningKind

from memplan.catalogue.hardware.overhead import Overhead
from memplan.catalogue.hardware.token_rates import Span
from memplan.estimate.answer import (
    ANSWERS,
    BASES,
    BY_MEMORY,
    KINDS,
    VIAS,
    Bytes,
    Card,
    Host,
    HostPhase,
    Line,
    Parameters,
    Peak,
    Phase,
    Rank,
    Verdict,
)
from memplan.estimate.demand import Demand
from memplan.estimate.serving import FACTS as SERVING_FACTS
from memplan.estimate.usage import Band
from memplan.frameworks import FRAMEWORKS
from memplan.frameworks.reading.config import FieldOrigin
from memplan.gate.budget import Problem
from memplan.gate.origin import KeyValue, Place
from memplan.gate.rows import Check, CheckedRun, Deciding
from memplan.planning.cluster import PeakComparison, RefusedGrids
from memplan.planning.comparison import Comparison, Difference
from memplan.planning.inference import Limit
from memplan.planning.offers import NearestMiss
from memplan.planning.plan import SEVERITIES, Time
from memplan.planning.reach import AXES
from memplan.planning.roofline import Seconds
from memplan.planning.step_time import Hourly, Range
from memplan.spec.run import RunSpec
from memplan.spec.training import PRECISIONS, MethodKind


class QuietSchema(GenerateJsonSchema):
    """pydantic's schemas, without its warnings."""

    def emit_warning(self, kind: JsonSchemaWarningKind, detail: str) -> None:
        """Do nothing: defaults that JSON cannot express are left out of the schema on purpose."""


_TEXTS = ("engine", "read", "cache_dtype")
_SHARES = ("concurrency", "longest_concurrency")
# Types of the fields of `memplan.estimate.serving.facts`; bytes, tokens and requests are integers.
SERVING: dict[str, Any] = {name: str if name in _TEXTS else float if name in _SHARES else int for name in SERVING_FACTS}

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def run_schema() -> dict[str, Any]:
    """Return the schema of a run, including the shorthands for a section (`"method": "qlora"`)."""
    return allow_words({"$schema": DRAFT, **RunSpec.model_json_schema(schema_generator=QuietSchema)})


def allow_words(schema: dict[str, Any]) -> dict[str, Any]:
    """Add the shorthands for sections to the schema of a run, and return it."""
    words = {"method": {"enum": list(get_args(MethodKind))}, "precision": {"enum": list(PRECISIONS)}}
    for part, word in {**words, "optimizer": {"type": "string"}}.items():
        field = schema["properties"][part]
        field["anyOf"] = [{"$ref": field.pop("$ref")}, word]
    schema["properties"]["gpu"]["anyOf"].append({"type": "integer"})  # YAML's `gpu: 3090`
    return schema


def answer_schema() -> dict[str, Any]:
    """Return the schema of an answer; the command prints a list of answers for several GPUs."""
    return _written(answer_model())


def answer_model() -> type[BaseModel]:
    """Return a model that reads an answer from its JSON. Its fields are those of `memplan.estimate.answer`."""
    categories = _model("Categories", "Bytes at the peak by kind of tensor.", dict.fromkeys(KINDS, int))
    verdict = _verdict()
    host = {"ranks": int, "peak": Literal["load", "step", "eval", "save", "merge"], "phases": list[_of(HostPhase)]}
    fields = {
        "schema_version": Literal[1],
        "memplan_version": str,
        "via": Literal[VIAS],
        "run": RunSpec,
        "parameters": _of(Parameters),
        "bytes": _from_properties(Bytes),
        "band": _of(Band),
        "gpu": _of(Card) | None,
        "verdict": verdict,
        "peak": _of(Peak),
        "phases": list[_of(Phase)],
        "categories": categories,
        "ledger": list[_of(Line, kind=Literal[KINDS], basis=Literal[BASES])],
        "beside": list[_of(Overhead, basis=Literal[BASES])],
        "host_bytes": int,
        "serving": _model("ServingPool", "How a serving engine divides its card.", SERVING) | None,
        "host": _model("Host", Host.__doc__ or "", host),
        "ranks": list[_of(Rank, bytes=_from_properties(Bytes), peak=_of(Peak), verdict=verdict)],
        "unsupported": list[str],
        "notes": list[str],
    }
    text = "One run's answer. Every number of bytes is per GPU, of the worst rank."
    return _model("Estimate", text, fields, origins=list[_of(FieldOrigin)])


def comparison_schema() -> dict[str, Any]:
    """Return the schema of `memplan compare`: the answers, and the difference of each later answer from the first."""
    return _written(comparison_model())


def _written(model: type[BaseModel]) -> dict[str, Any]:
    return {"$schema": DRAFT, **model.model_json_schema(mode="serialization", schema_generator=QuietSchema)}


def comparison_model() -> type[BaseModel]:
    """Return a model that reads a comparison from its JSON."""
    difference = _of(
        Difference,
        fields=dict[str, Annotated[list[Any], Field(min_length=2, max_length=2)]],
        bytes=_model("Differences", "Bytes of one answer minus those of another.", dict.fromkeys(_COUNTS, int)),
        categories=_model(
            "CategoryDifferences",
            "Allocated bytes of one answer minus those of another, by kind.",
            dict.fromkeys(KINDS, int),
        ),
    )
    fields = {
        "schema_version": Literal[1],
        "memplan_version": str,
        "answers": list[answer_model()],
        "differences": list[difference],
    }
    return _model("Comparison", Comparison.__doc__ or "", fields)


_COUNTS = ("allocated", "reserved", "used", "host")


def check_model() -> type[BaseModel]:
    """Return a model that reads a check of runs from its JSON."""
    deciding = _model("Deciding", Deciding.__doc__ or "", {**get_type_hints(Place), "value": Any, "bytes": int})
    lists = {"any_of": list[str], "left_out": list[str], "origins": list[_of(FieldOrigin)], "keys": list[_of(KeyValue)]}
    row = _of(CheckedRun, deciding=deciding | None, fields=dict[str, Any], **lists)
    common = {"schema_version": Literal[1], "memplan_version": str, "fits": bool, "runs": list[row]}
    problem = _model("BudgetProblem", Problem.__doc__ or "", get_type_hints(Problem))
    lists = {"problems": list[problem], "notes": list[str], "moved": list[str]}
    return _model("Check", Check.__doc__ or "", {**common, **lists})


def plan_schema() -> dict[str, Any]:
    """Return the schema of `memplan plan`: one of eight kinds, told apart by `mode`."""
    return {"$schema": DRAFT, **plan_model().json_schema(mode="serialization", schema_generator=QuietSchema)}


@cache
def plan_model() -> TypeAdapter[BaseModel]:
    """Return a model that reads a plan from its JSON."""
    figures = {"run": RunSpec, "bytes": _from_properties(Bytes), "verdict": _verdict()}
    at = _model("Figures", "A decided run, its bytes and its verdict.", figures)
    lines = _model("Lines", "Lines to write in each framework's config.", {f.name: list[str] for f in FRAMEWORKS})
    change = {"options": str, "lines": lines, "notes": dict[str, str]}
    severity = Annotated[int, Field(ge=0, lt=len(SEVERITIES))]
    time = _of(Time, basis=Literal[BASES])
    costs = {"time": time | None, "severity": severity}
    effect = {"keys": list[str], "title": str, "saves": int, "phases": dict[str, int], **costs}
    effect |= {"quality": str, "quality_source": str}
    lever = _model("Lever", "A change, and the allocated bytes that it saves.", effect)
    several = {"levers": list[lever], **change, **figures, "saves": int, "host_bytes": int, **costs}
    proposal = _model("Proposal", "Changes that make the run fit, or come nearest.", several)
    axes = {"axis": Literal[AXES], "value": int | str | None, "at": at | None, "beyond": at | None}
    ends = Literal["memory", "positions", "rank", "models", "nothing"]
    reached = list[_model("Reach", "The largest value that fits, and the run with the next.", {**axes, "binds": ends})]
    longest = _model("Longest", "The longest sequence of a batch; 0 if none fits.", {"batch": int, "sequence": int})
    shown = {"batch": list[int], "sequence": list[int], "allocated": list[list[int]]}
    shown |= {"verdict": list[list[Literal[(*BY_MEMORY, None)]]]}
    map_ = _model("Map", "Runs by batch, then sequence; -1 and null for runs that are refused.", shown)
    rung = _model("Rung", "A change on top of all previous ones.", {**effect, **change, **figures})
    choice = {"title": str, "fits": bool, "time": time | None, "quality": str, "quality_source": str}
    option = _model("Choice", "One option.", {**choice, **change, **figures})
    step = {"title": str, "question": str, "answer": Literal["yes", "no", "not needed"], "reason": str}
    left_out = _model("LeftOut", "Changes that a run's file cannot say.", {"levers": list[str], "reason": str})
    written = {"file": str, "diff": str, "levers": list[str], "at": at | None, "left_out": list[left_out]}
    patch = _model("FilePatch", "The first proposal that a run's file can say, as a unified diff.", written)
    kinds: dict[str, dict[str, Any]] = {
        "levers": {
            "fits": bool,
            "proposals": list[proposal],
            "nearest": proposal | None,
            "tried": int,
            "levers": list[lever],
            "reach": reached,
        },
        "max": {"reach": reached, "frontier": list[longest], "map": map_ | None},
        "ladder": {"plain": _model("Plain", "The run without a change.", {**change, **figures}), "rungs": list[rung]},
        "buy": _offered(figures),
        "advice": {
            "steps": list[_model("Step", "A question and its answer.", {**step, "choices": list[option]})],
            "best": option | None,
        },
        "nodes": _divided(figures),
        "generate": _generating(at),
        "places": _placed(figures),
    }
    common = {"schema_version": Literal[1], "memplan_version": str, **figures}
    common |= {"gpu": _of(Card) | None, "demand": _of(Demand)}
    models = [
        _model(
            f"{mode.capitalize()}Plan",
            f"A plan of mode {mode}.",
            {"mode": Literal[mode], **common, **kind},
            origins=list[_of(FieldOrigin)],
            **({"patch": patch} if mode in ("levers", "generate") else {}),
        )
        for mode, kind in kinds.items()
    ]
    any_of: Any = reduce(lambda one, other: one | other, models)
    return TypeAdapter(any_of)


def _offered(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of mode buy."""
    range_ = _of(Range)
    amounts = {"tokens": int, "seconds": range_, "usd": range_ | None}
    cost = _model("Cost", "The cost of a number of tokens: seconds of all cards together, and US dollars.", amounts)
    pace = {"seconds": range_, "tokens": int, "bound": str, "basis": Literal["measured", "assumed"], "note": str}
    step = _model("Pace", "A step of all cards together.", pace)
    cards = {"gpu": str, "count": int, "strategy": str}
    offer = {"price": _of(Hourly) | None, "step": step | None, "million": cost | None, "whole": cost | None}
    miss = _model("Miss", NearestMiss.__doc__ or "", {**cards, **figures, "lacks": int})
    return {
        "offers": list[_model("Offer", "Cards that hold the run.", {**cards, **figures, **offer}, each=_owned())],
        "considered": int,
        "nearest": miss | None,
        "tokens": int | None,
    }


def _generating(at: Any) -> dict[str, Any]:
    """Return the fields of mode generate."""
    most = _of(Limit, binds=Literal["memory", "positions", "max_num_seqs", "nothing"])
    rate = _of(Seconds)
    amounts = {"weights": int, "requests": int, "at": at | None, "tokens_per_second": rate | None}
    variant = {
        "name": str,
        "refused": str,
        "fits": bool,
        **amounts,
        "quality": str | None,
        "quality_source": str | None,
    }
    choice = _model("Variant", "The run in another format, with another cache, or on several GPUs.", variant)
    counted = {"weight_bytes": int, "cache_bytes": list[int], "operations": int, "experts": list[float]}
    rates = {"seconds": rate, "tokens": int, "requests": int, "tokens_per_second": rate, "per_request": rate}
    facts = {"bound": list[str], **counted, "assumed": list[_of(Span)], "notes": list[str]}
    pace = _model("Roofline", "A step at its best and worst, and every rate that was used.", {**rates, **facts})
    return {
        "fits": bool,
        "requests": most,
        "context": most,
        "degrees": list[choice],
        "placed": list[choice],
        "formats": list[choice],
        "caches": list[choice],
        "mildest": str | None,
        "fewest": int | None,
        "decoding": pace | None,
        "full": pace | None,
        "prompt": pace | None,
        "unpaced": str,
    }


def _placed(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of mode places."""
    cards = {"gpu": str, "gpus": int, "price": _of(Hourly) | None, "requests": int}
    placed = {**cards, "tokens_per_second": _of(Seconds) | None, **figures}
    return {"places": list[_model("Place", "A number of cards that hold the run.", placed, each=_owned())]}


@cache
def _owned() -> Any:
    """Return the facts of a card that is listed to own."""
    facts = {"launch_usd": float, "launch_date": str, "watts": int | None, "slots": int}
    return _model("OwnedCard", "A card to own: its list price when it was first sold, watts, slots.", facts)


def _divided(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of mode nodes."""
    range_ = _of(Range)
    kinds = Literal["dp", "tp", "pp", "cp", "ep"]
    sent = {"kind": kinds, "bytes": int, "link": str, "between_nodes": bool, "seconds": range_, "shown": range_}
    message = _model("Sent", "What a rank sends in a step for one degree.", sent)
    step = {"seconds": range_, "computing": range_, "bubble": range_, "sent": list[message]}
    degrees = dict.fromkeys(get_args(kinds), int)
    grid = {**degrees, "strategy": str, "micro": int, "accumulation": int, "between_nodes": list[kinds]}
    grid |= {"step": _model("GridStep", "The time of a step, in seconds.", step)}
    placed = {**grid, "allocated": int, "verdict": Literal[BY_MEMORY]}
    proposed = _model("Division", "A grid, and the run in it.", {**grid, "options": str, "note": str, **figures})
    share = _model(
        "Share", "Percentage of a link's rate that collectives reach.", dict.fromkeys(("low", "usual", "high"), int)
    )
    facts = {"name": str, "bytes_per_second": float, "basis": str, "source": str}
    facts |= {"share": share, "share_basis": str, "share_source": str}
    link = _model("Link", "A link between GPUs; rates are one way.", facts)
    nodes = {"gpu": str, "nodes": int, "gpus": int, "world": int, "inside": link, "network": link}
    counts: dict[str, Any] = dict.fromkeys(("grids", "fit", "slower", "missed", "too_large", "refused"), int)
    return {
        "cluster": _model("Cluster", "Nodes of GPUs.", nodes),
        "sequences": int,
        "grids": list[_model("Grid", "Degrees and a strategy that fit.", placed)],
        "best": proposed | None,
        "nearest": proposed | None,
        "counts": _model("Counts", "Number of grids by outcome.", counts),
        "refused": list[_of(RefusedGrids)],
        "together": _of(PeakComparison, text=str),
    }


def _of(fact: type[tuple[Any, ...]], **narrower: Any) -> Any:
    """Return a model with the tuple's fields, some with a `narrower` type. All are required: defaults are written."""
    return _model(fact.__name__, fact.__doc__ or "", {**get_type_hints(fact), **narrower})


def _from_properties(fact: type[Any], **narrower: Any) -> Any:
    """Return a model with the class's properties as fields, some with a `narrower` type."""
    properties = {name: p for name, p in vars(fact).items() if isinstance(p, property)}
    types = {name: get_type_hints(p.fget)["return"] for name, p in properties.items()}
    return _model(fact.__name__, fact.__doc__ or "", {**types, **narrower})


def _verdict() -> Any:
    """Return the model of a verdict, which has a reason only if the run does not start."""
    fields = {"answer": Literal[(*ANSWERS, None)], "headroom": int | None}
    return _model("Verdict", Verdict.__doc__ or "", fields, reason=str)


def _model(name: str, doc: str, types: dict[str, Any], **optional: Any) -> Any:
    fields: dict[str, Any] = {field: (type_, ...) for field, type_ in types.items()}
    fields |= {field: (type_ | None, None) for field, type_ in optional.items()}
    return create_model(name, __doc__=cleandoc(doc), **fields)
