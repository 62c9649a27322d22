"""The base class of a run's parts, and the types of their fields."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, lru_cache
from math import inf, isfinite
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, cast, dataclass_transform

from memplan.core.errors import MemplanError
from memplan.core.frozen import FrozenDict, frozen
from memplan.core.records import NamedTuple
from memplan.spec.checks import After, Before, Check, NotPlainError, Strict, check_of

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
    from pydantic_core import CoreSchema, SchemaValidator

Dtype = Literal["bf16", "fp16", "fp32"]

LARGEST = 2**40  # far above any real batch, sequence or rank, so that absurd input is an error, not an absurd answer
Count = Annotated[int, Strict(ge=1, le=LARGEST)]
Natural = Annotated[int, Strict(ge=0, le=LARGEST)]
MOST_GPUS = 2**20  # more than any cluster has
GPUs = Annotated[int, Strict(ge=1, le=MOST_GPUS)]
Rank = Annotated[int, Strict(ge=0, lt=2**20)]  # index of a GPU
Pixels = Annotated[int, Strict(ge=1, le=2**20)]
Seconds = Annotated[int, Strict(ge=1, le=2**20)]
Number = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]


def _json(value: dict[str, Any]) -> FrozenDict:
    """Return a frozen copy. Raises ValueError for a value that JSON cannot represent."""

    def check(inner: Any, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError(f"is nested more than {_MAX_DEPTH} deep")
        if inner is None or isinstance(inner, (str, int)):
            return
        if isinstance(inner, float):
            if not isfinite(inner):
                tag = {inf: "Infinity", -inf: "-Infinity"}.get(inner, "NaN")
                written = f'{{"__float__": "{tag}"}}'
                raise ValueError(f"holds {inner}, which JSON cannot represent; write {written} as transformers does")
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
Json = Annotated[dict[str, Any], After(_json)]
Names = Annotated[tuple[str, ...], Before(_sort_set)]


class FieldInfo(NamedTuple):
    """The type of a part's field and its default, which is `...` if it has none."""

    annotation: Any
    default: Any


class _Checks(dict[str, Check]):
    """The checks of a part's fields, each made for the first value."""

    def __init__(self, part: type[Part]) -> None:
        super().__init__()
        self._part = part

    def __missing__(self, name: str) -> Check:
        if name not in self._part.defaults:
            raise NotPlainError
        check = self[name] = check_of(self._part.annotation(name))
        return check


class _Fields:
    """The fields of a part by name, whose types are evaluated when they are first asked for."""

    def __get__(self, instance: object, owner: type[Part]) -> dict[str, FieldInfo]:
        return _fields_of(owner)


@cache
def _fields_of(part: type[Part]) -> dict[str, FieldInfo]:
    return {name: FieldInfo(part.annotation(name), default) for name, default in part.defaults.items()}


_UNCLEAR = (ValueError, MemplanError)  # of several errors, pydantic raises the first in the order of the fields


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Part:
    """Base class of a run and its parts: frozen, compared by value, and unknown keys are errors.

    It has the methods of a pydantic model and is one for pydantic, which is imported for what `memplan.spec.checks`
    leaves to it, for schemas and for JSON.
    """

    __slots__ = ("__dict__", "__pydantic_extra__", "__pydantic_fields_set__", "__pydantic_private__", "_hash")
    _hash: int
    __pydantic_fields_set__: set[str]
    __pydantic_root_model__: ClassVar[bool] = False  # read by pydantic 2.9 for schemas

    model_config: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}
    model_fields: ClassVar[_Fields] = _Fields()
    defaults: ClassVar[dict[str, Any]] = {}  # every field, in order; `...` has no default
    _required: ClassVar[tuple[str, ...]]  # fields without a default
    _checks: ClassVar[_Checks]
    _is_kept: ClassVar[bool] = True  # equal fields are the same part, so that it is checked, hashed and compared once
    _pydantic: ClassVar[tuple[TypeAdapter[Any], SchemaValidator]]

    def __init_subclass__(cls) -> None:
        cls.defaults = {**cls.defaults, **{name: cls.__dict__.get(name, ...) for name in cls.__annotations__}}
        cls._required = tuple(name for name, default in cls.defaults.items() if default is ...)
        cls._checks = _Checks(cls)

    def __init__(self, /, **values: Any) -> None:
        try:
            self._fill(*self._checked(values))
        except _UNCLEAR:
            self._explained(lambda validator: validator.validate_python(values, self_instance=self))

    def _fill(self, values: dict[str, Any], fields_set: set[str]) -> Self:
        setting = object.__setattr__
        setting(self, "__dict__", values)
        setting(self, "__pydantic_fields_set__", fields_set)
        return self

    @classmethod
    def expanded(cls, value: Any) -> Any:
        """Return what a shorthand stands for; any other value unchanged."""
        return value

    def written(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return what pydantic writes of the part, given the `values` of the fields that it writes."""
        return values

    @classmethod
    def annotation(cls, name: str) -> Any:
        """Return the type of a field."""
        owner = next(kind for kind in cls.__mro__ if name in kind.__annotations__)
        return eval(owner.__annotations__[name], vars(sys.modules[owner.__module__]))

    @classmethod
    def _checked(cls, value: Any) -> tuple[dict[str, Any], set[str]]:
        """Return the values of all fields and the names of those that were given. Raises NotPlainError."""
        given = cls.expanded(value)
        if not isinstance(given, dict):
            raise NotPlainError
        values, checks = dict(cls.defaults), cls._checks
        for name, field_value in cast("dict[str, Any]", given).items():
            values[name] = checks[name](field_value)
        for name in cls._required:
            if values[name] is ...:
                raise NotPlainError
        return values, set(cast("dict[str, Any]", given))

    @classmethod
    def plain(cls, value: Any) -> Self:
        """Return a part for a part, a word or a mapping whose values need no conversion. Raises NotPlainError."""
        if isinstance(value, cls):
            return value
        if type(value) is str:
            return cls._of_word(value)
        if cls._is_kept and type(value) is dict:
            fields = cast("dict[str, Any]", value)
            if all(type(k) is str and type(v) in _SCALARS for k, v in fields.items()):
                return cls._of_fields(**fields)
        return cls.__new__(cls)._fill(*cls._checked(value))

    @classmethod
    @lru_cache(maxsize=1024)
    def _of_word(cls, word: str) -> Self:
        return cls.__new__(cls)._fill(*cls._checked(word))

    @classmethod
    @lru_cache(maxsize=1024, typed=True)
    def _of_fields(cls, /, **fields: Any) -> Self:
        return cls.__new__(cls)._fill(*cls._checked(fields))

    @classmethod
    def model_validate(cls, obj: Any, **more: Any) -> Self:
        """Return a part for a mapping, a shorthand or a part. Raises MemplanError."""
        if not more:
            try:
                return cls.plain(obj)
            except _UNCLEAR:
                pass
        return cls._explained(lambda validator: validator.validate_python(obj, **more))

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **more: Any) -> Self:
        return cls._explained(lambda validator: validator.validate_json(json_data, **more))

    @classmethod
    def _explained(cls, validated: Callable[[SchemaValidator], Any]) -> Any:
        """Return what the validator makes of a value. Raises FieldError in place of pydantic's error."""
        from pydantic_core import ValidationError

        from memplan.spec.failures import field_error

        try:
            return validated(cls._validator())
        except ValidationError as error:
            raise field_error(error, cls) from None

    @classmethod
    def model_construct(cls, _fields_set: set[str] | None = None, **values: Any) -> Self:
        """Return a part with values that are not checked."""
        return cls.__new__(cls)._fill({**cls.defaults, **values}, set(values) if _fields_set is None else _fields_set)

    @classmethod
    def model_json_schema(cls, **more: Any) -> dict[str, Any]:
        return cls._adapter().json_schema(**more)

    @property
    def model_fields_set(self) -> set[str]:
        """The names of the fields that were given."""
        return self.__pydantic_fields_set__

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with some fields replaced, which are not checked. Frozen values are shared even if `deep`."""
        values, fields_set = {**vars(self), **(update or {})}, {*self.__pydantic_fields_set__, *(update or ())}
        return type(self).__new__(type(self))._fill(values, fields_set)

    def model_dump(self, *, mode: Literal["json", "python"] = "python", **more: Any) -> dict[str, Any]:
        """Return the fields as plain values; with mode `json`, lists in place of tuples."""
        if more:
            return self._adapter().dump_python(self, mode=mode, **more)
        return _dumped(self, list if mode == "json" else tuple)

    def model_dump_json(self, **more: Any) -> str:
        return self._adapter().dump_json(self, **more).decode()

    @classmethod
    def _adapter(cls) -> TypeAdapter[Self]:
        return cls._built()[0]

    @classmethod
    def _validator(cls) -> SchemaValidator:
        return cls._built()[1]

    @classmethod
    def _built(cls) -> tuple[TypeAdapter[Self], SchemaValidator]:
        """Return what pydantic makes of this part's schema: an adapter, and the validator that errors are named by."""
        if "_pydantic" not in cls.__dict__:
            from pydantic import TypeAdapter
            from pydantic_core import SchemaValidator

            adapter = TypeAdapter(cls)
            cls._pydantic = adapter, SchemaValidator(adapter.core_schema, {"title": cls.__name__})
        return cls._pydantic

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema that pydantic would make of a model with these fields."""
        from pydantic_core import core_schema

        fields: dict[str, core_schema.ModelField] = {}
        for name, default in cls.defaults.items():
            schema = handler.generate_schema(cls.annotation(name))
            if isinstance(default, FrozenDict):  # pydantic warns that it cannot write one into a JSON schema
                schema = core_schema.with_default_schema(schema, default_factory=type(default))
            elif default is not ...:
                schema = core_schema.with_default_schema(schema, default=default)
            fields[name] = core_schema.model_field(schema)
        config = core_schema.CoreConfig(title=cls.__name__, extra_fields_behavior="forbid", allow_inf_nan=False)
        inner = core_schema.model_fields_schema(fields, model_name=cls.__name__)
        ref = f"{cls.__module__}.{cls.__qualname__}:{id(cls)}"
        writes: Any = core_schema.wrap_serializer_function_ser_schema(lambda part, write: part.written(write(part)))
        more: Any = {} if cls.written is Part.written else {"serialization": writes}
        if "expanded" not in cls.__dict__:
            return core_schema.model_schema(cls, inner, config=config, frozen=True, ref=ref, **more)
        model = core_schema.model_schema(cls, inner, config=config, frozen=True, **more)
        return core_schema.no_info_before_validator_function(cls.expanded, model, ref=ref)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Add the title and description, which pydantic 2.9 leaves out of a class that is not its own."""
        from inspect import cleandoc

        written = handler(schema)
        target = handler.resolve_ref_schema(written)
        target.setdefault("title", cls.__name__)
        target.setdefault("description", cleandoc(cls.__doc__ or ""))
        return written

    def __setattr__(self, name: str, value: Any) -> None:
        raise self._frozen(name, value)

    def __delattr__(self, name: str) -> None:
        raise self._frozen(name, None)

    def _frozen(self, name: str, value: Any) -> Exception:
        from pydantic_core import ValidationError

        error: Any = {"type": "frozen_instance", "loc": (name,), "input": value}
        return ValidationError.from_exception_data(type(self).__name__, [error])

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:  # kept, because answers are cached by the parts of their runs
        try:
            return self._hash
        except AttributeError:
            object.__setattr__(self, "_hash", hash(tuple(vars(self).values())))
            return self._hash

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from vars(self).items()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self)})"

    def __str__(self) -> str:
        return " ".join(f"{name}={value!r}" for name, value in self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), vars(self), self.__pydantic_fields_set__)


def _restored(part: type[Part], values: dict[str, Any], fields_set: set[str]) -> Part:
    """Return a part that was pickled or copied."""
    return part.model_construct(fields_set, **values)


_SCALARS = (str, int, float, bool, NoneType)


def _dumped(value: Any, sequence: Callable[[Iterator[Any]], Any]) -> Any:
    if isinstance(value, tuple):
        return sequence(_dumped(inner, sequence) for inner in cast(tuple[Any, ...], value))
    if not isinstance(value, (Part, dict)):
        return value
    items = value.written(vars(value)) if isinstance(value, Part) else cast(dict[str, Any], value)
    return {name: inner if type(inner) in _SCALARS else _dumped(inner, sequence) for name, inner in items.items()}
