"""The base of a run's parts, and the numbers and names that their fields take."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from memplan.core.frozen import FrozenDict, frozen

Dtype = Literal["bf16", "fp16", "fp32"]

_MOST = 2**40  # no batch, sequence or rank is larger: absurd input must not become an absurd answer
Count = Annotated[int, Field(ge=1, le=_MOST, strict=True)]
Natural = Annotated[int, Field(ge=0, le=_MOST, strict=True)]
GPUs = Annotated[int, Field(ge=1, le=2**20, strict=True)]  # more than any cluster has
Rank = Annotated[int, Field(ge=0, lt=2**20, strict=True)]  # one of them, counted from 0
Pixels = Annotated[int, Field(ge=1, le=2**20, strict=True)]
Number = Annotated[float, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]


def _json(value: dict[str, Any]) -> FrozenDict:
    """A frozen copy of what JSON can hold. Raises ValueError for anything else."""

    def check(inner: Any, depth: int) -> None:
        if depth > _DEEPEST:
            raise ValueError(f"is nested more than {_DEEPEST} deep")
        if inner is None or isinstance(inner, (str, int)):
            return
        if isinstance(inner, float):
            if not isfinite(inner):
                raise ValueError(f"holds {inner}, which JSON cannot")
        elif isinstance(inner, (Mapping, list, tuple)):
            items = cast(Mapping[str, Any], inner).values() if isinstance(inner, Mapping) else cast(list[Any], inner)
            for item in items:
                check(item, depth + 1)
        else:
            raise ValueError(f"holds a {type(inner).__name__}, which JSON cannot")

    check(value, 0)
    return frozen(value)


def _ordered(value: Any) -> Any:
    """A set as a sorted list: it has no order of its own, and equal runs are to have equal JSON."""
    return sorted(cast(set[str], value), key=str) if isinstance(value, (set, frozenset)) else value


_DEEPEST = 64
Json = Annotated[dict[str, Any], AfterValidator(_json)]
Names = Annotated[tuple[str, ...], BeforeValidator(_ordered)]


class Part(BaseModel, frozen=True):
    """Base of every part of a run: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
