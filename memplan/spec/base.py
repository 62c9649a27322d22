"""The base class of a run's parts, and the types of their fields."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from memplan.core.frozen import FrozenDict, frozen

Dtype = Literal["bf16", "fp16", "fp32"]

_LARGEST = 2**40  # far above any real batch, sequence or rank, so that absurd input is an error, not an absurd answer
Count = Annotated[int, Field(ge=1, le=_LARGEST, strict=True)]
Natural = Annotated[int, Field(ge=0, le=_LARGEST, strict=True)]
GPUs = Annotated[int, Field(ge=1, le=2**20, strict=True)]  # more than any cluster has
Rank = Annotated[int, Field(ge=0, lt=2**20, strict=True)]  # index of a GPU
Pixels = Annotated[int, Field(ge=1, le=2**20, strict=True)]
Number = Annotated[float, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]


def _json(value: dict[str, Any]) -> FrozenDict:
    """Return a frozen copy. Raises ValueError for a value that JSON cannot represent."""

    def check(inner: Any, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError(f"is nested more than {_MAX_DEPTH} deep")
        if inner is None or isinstance(inner, (str, int)):
            return
        if isinstance(inner, float):
            if not isfinite(inner):
                raise ValueError(f"holds {inner}, which JSON cannot represent")
        elif isinstance(inner, (Mapping, list, tuple)):
            items = cast(Mapping[str, Any], inner).values() if isinstance(inner, Mapping) else cast(list[Any], inner)
            for item in items:
                check(item, depth + 1)
        else:
            raise ValueError(f"holds a {type(inner).__name__}, which JSON cannot represent")

    check(value, 0)
    return frozen(value)


def _sort_set(value: Any) -> Any:
    """Return a set as a sorted list, so that equal runs have equal JSON; any other value unchanged."""
    return sorted(cast(set[str], value), key=str) if isinstance(value, (set, frozenset)) else value


_MAX_DEPTH = 64
Json = Annotated[dict[str, Any], AfterValidator(_json)]
Names = Annotated[tuple[str, ...], BeforeValidator(_sort_set)]


class Part(BaseModel, frozen=True):
    """Base class of a run and its parts: frozen, and unknown keys are errors.

    Validators are built for the first run, not on import: help only needs the fields. Defaults are constructed without.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, defer_build=True)
