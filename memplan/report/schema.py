"""The published JSON Schema: of a run, as `--spec` takes it, of an answer and of a comparison, as JSON gives them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import BaseModel, Field, create_model
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaWarningKind

from memplan.answer import ANSWERS, KINDS, Band, Bytes, Card, Line, Parameters, Peak, Phase, Verdict
from memplan.comparison import Comparison, Difference
from memplan.spec import PRECISIONS, MethodKind, RunSpec


class _Schema(GenerateJsonSchema):
    def emit_warning(self, kind: JsonSchemaWarningKind, detail: str) -> None:
        """No word about a default that JSON cannot show: it is left out."""


DRAFT = "https://json-schema.org/draft/2020-12/schema"


def run_schema() -> dict[str, Any]:
    """What a run may hold: every field, and the words that stand for a whole part (`"method": "qlora"`)."""
    schema: dict[str, Any] = {"$schema": DRAFT, **RunSpec.model_json_schema(schema_generator=_Schema)}
    words = {"method": {"enum": list(get_args(MethodKind))}, "precision": {"enum": list(PRECISIONS)}}
    for part, word in {**words, "optimizer": {"type": "string"}}.items():
        field = schema["properties"][part]
        field["anyOf"] = [{"$ref": field.pop("$ref")}, word]
    schema["properties"]["gpu"]["anyOf"].append({"type": "integer"})  # YAML's `gpu: 3090`
    return schema


def answer_schema() -> dict[str, Any]:
    """What an answer holds; the command prints a list of them where several GPUs are asked."""
    schema = answer_model().model_json_schema(mode="serialization", schema_generator=_Schema)
    return {"$schema": DRAFT, **schema}


def answer_model() -> type[BaseModel]:
    """A model that reads an answer back from its JSON. Its fields are those of the tuples in `memplan.answer`."""
    categories = _model("Categories", "Bytes at the peak by kind of tensor.", dict.fromkeys(KINDS, int))
    fields = {
        "schema_version": Literal[1],
        "memplan_version": str,
        "run": RunSpec,
        "parameters": _of(Parameters),
        "bytes": _made(Bytes),
        "band": _of(Band),
        "gpu": _of(Card) | None,
        "verdict": _made(Verdict, answer=Literal[(*ANSWERS, None)]),
        "peak": _of(Peak),
        "phases": list[_of(Phase)],
        "categories": categories,
        "ledger": list[_of(Line, kind=Literal[KINDS], basis=Literal["derived", "measured", "assumed"])],
        "host_bytes": int,
        "unsupported": list[str],
        "notes": list[str],
    }
    return _model("Estimate", "One run's answer. Every number of bytes is per GPU, of the worst rank.", fields)


def comparison_schema() -> dict[str, Any]:
    """What `memplan compare` holds as JSON: the answers, and the difference of each but the first from the first."""
    schema = comparison_model().model_json_schema(mode="serialization", schema_generator=_Schema)
    return {"$schema": DRAFT, **schema}


def comparison_model() -> type[BaseModel]:
    """A model that reads a comparison back from its JSON."""
    difference = _of(
        Difference,
        fields=dict[str, Annotated[list[Any], Field(min_length=2, max_length=2)]],
        bytes=_model("Differences", "Bytes of one answer less those of another.", dict.fromkeys(_COUNTS, int)),
        categories=_model("CategoryDifferences", "The same of allocated, by kind.", dict.fromkeys(KINDS, int)),
    )
    fields = {
        "schema_version": Literal[1],
        "memplan_version": str,
        "answers": list[answer_model()],
        "differences": list[difference],
    }
    return _model("Comparison", Comparison.__doc__ or "", fields)


_COUNTS = ("allocated", "reserved", "used", "host")


def _of(fact: type[tuple[Any, ...]], **narrower: Any) -> Any:
    """The tuple's fields as JSON's keys, some with a `narrower` type; defaults are always written, so required."""
    return _model(fact.__name__, fact.__doc__ or "", {**get_type_hints(fact), **narrower})


def _made(fact: type[Any], **narrower: Any) -> Any:
    """The same of a class whose properties are the fields."""
    made = {name: get_type_hints(of.fget)["return"] for name, of in vars(fact).items() if isinstance(of, property)}
    return _model(fact.__name__, fact.__doc__ or "", {**made, **narrower})


def _model(name: str, doc: str, types: dict[str, Any]) -> Any:
    fields: dict[str, Any] = {field: (type_, ...) for field, type_ in types.items()}
    return create_model(name, __doc__=" ".join(doc.split()), **fields)
