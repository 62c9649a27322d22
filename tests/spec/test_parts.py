"""A run and its parts are plain classes that hold what pydantic makes of the same values, and work in its models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from random import Random
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from memplan import MemplanError, RunSpec
from memplan.core.frozen import FrozenDict
from memplan.spec.base import Part
from memplan.spec.checks import alternatives, part_of
from memplan.spec.training import Method


def parts_in(part: type[Part]) -> Iterator[type[Part]]:
    """Yield a part and those that its fields hold."""
    yield part
    for field in part.model_fields.values():
        for kind in alternatives(field.annotation):
            if isinstance(kind, type) and issubclass(kind, Part):
                yield from parts_in(kind)


PARTS = tuple(dict.fromkeys(parts_in(RunSpec)))
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, -1, 4, 64, 2**20, 2**40, 2**40 + 1, 2**70, 3.0, 0.5, 5e8, float("inf"), float("nan")),
    *("", "1", "true", "x", "bf16", "qlora", "vera", "generate", "amp", "mixed", "Q4_K", "gguf:q4_k_m", "all-linear"),
    *([], ["a"], ("a", "b"), {"b", "a"}, ["rope"], [1, 2], (3, 4), [1, 2, 3], [1.0, 2], ["a", 1], b"x", object()),
    *({}, {"a": {"b": [1, None]}}, {"a": float("inf")}, FrozenDict({"a": 1}), {1: 2}, {"config": {}}, {"micro": 2}),
)


def words(annotation: Any) -> list[Any]:
    """Return the literals of an annotation."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for inner in get_args(annotation) for word in words(inner)]


def draw(random: Random, part: type[Part], depth: int = 0) -> dict[str, Any]:
    """Return a mapping for a part, of which most values are valid."""

    def value(name: str) -> Any:
        annotation = part.model_fields[name].annotation
        inner, known = part_of(annotation), words(annotation)
        if inner and depth < 2 and random.random() < 0.8:
            return draw(random, inner, depth + 1)
        return random.choice(known if known and random.random() < 0.6 else VALUES)

    names = random.sample(list(part.model_fields), min(random.randrange(4), len(part.model_fields)))
    unknown = {"unknown": 1} if random.random() < 0.03 else {}
    required = {"model": "gpt2"} if part.defaults.get("model") is ... else {}
    return {**required, **{name: value(name) for name in names}, **unknown}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_a_value_taken_without_pydantic_is_what_pydantic_makes_of_it(part: type[Part]) -> None:
    random, adapter, taken = Random(part.__name__), TypeAdapter(part), 0
    for _ in range(400):
        given = draw(random, part)
        try:
            plain = part.plain(given)
        except (ValueError, TypeError, MemplanError):  # an unhashable format is a TypeError
            continue
        taken += 1
        validated = adapter.validate_python(given)
        assert (repr(plain), plain.model_fields_set) == (repr(validated), validated.model_fields_set), given
        assert plain == validated
        assert hash(plain) == hash(validated)
        assert plain.model_dump(mode="json") == adapter.dump_python(validated, mode="json")
        assert plain.model_dump() == adapter.dump_python(validated)
    assert taken > 30


def test_parts_are_copied_and_pickled() -> None:
    run = RunSpec(model={"config": {"a": [1]}}, method="qlora")
    for same in (copy.copy(run), copy.deepcopy(run), pickle.loads(pickle.dumps(run)), run.model_copy(deep=True)):
        assert same == run
        assert same.model_fields_set == {"model", "method"}
        assert hash(same) == hash(run)


def test_a_run_is_a_field_of_a_pydantic_model() -> None:
    class Job(BaseModel):
        run: RunSpec

    job = Job.model_validate({"run": {"model": "gpt2", "method": "lora"}})
    assert job.run == RunSpec(model="gpt2", method="lora")
    assert Job.model_validate_json(job.model_dump_json()) == job
    with pytest.raises(ValidationError, match=r"run\.batch\.micro"):
        Job.model_validate({"run": {"model": "gpt2", "batch": {"micro": 0}}})


def test_a_part_cannot_be_changed() -> None:
    method = Method(kind="lora")
    with pytest.raises(ValidationError, match="frozen"):
        method.rank = 8  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError, match="frozen"):
        del method.rank
