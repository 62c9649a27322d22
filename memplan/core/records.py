"""`typing.NamedTuple`, but defined in a twentieth of the time: a short command defines 150 and makes few of most.

The standard one compiles every field's type and a constructor. Here types stay text, and classes with equally many
fields share one compiled constructor, whose arguments are renamed for the first instance.
"""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple  # noqa: PLC0414 (exported)
else:
    from collections import _tuplegetter as field_at

    @cache
    def _constructor(fields):
        """Compile the constructor of records with a number of fields."""
        names = "".join(f"_{n}, " for n in range(fields))
        return eval(f"lambda _cls, {names}: _new(_cls, ({names}))", {"_new": tuple.__new__, "__builtins__": {}})

    def _first_instance(cls, /, *values, **named):
        """Name the constructor's arguments like the fields of the class that has them, and make an instance with it."""
        owner = next(base for base in cls.__mro__ if "_fields" in vars(base))
        shared = _constructor(len(owner._fields))
        code = shared.__code__.replace(co_varnames=("_cls", *owner._fields), co_name="__new__")
        new = FunctionType(code, shared.__globals__, "__new__", tuple(owner._field_defaults.values()))
        new.__qualname__ = f"{owner.__qualname__}.__new__"
        owner.__new__ = staticmethod(new)
        return new(cls, *values, **named)

    def _make(cls, values):
        made = tuple.__new__(cls, values)
        return made if len(made) == len(cls._fields) else cls(*made)  # which says what is missing or too many

    class _Definition(type):
        """Makes a subclass of tuple of a class statement with the base NamedTuple."""

        def __new__(cls, name, bases, space):
            if not bases:
                return super().__new__(cls, name, bases, space)
            fields = tuple(space.get("__annotations__", ()))
            defaults = {field: space[field] for field in fields if field in space}
            numbers = {field: n for n, field in enumerate(fields)}
            getters = {field: field_at(n, "") for field, n in numbers.items()}
            record = {"_fields": fields, "_field_defaults": defaults, "__match_args__": fields, "__slots__": ()}
            record["_numbers"] = numbers
            return type(name, (tuple,), {**_METHODS, **space, **record, **getters})

    class NamedTuple(metaclass=_Definition):
        """Base of class statements, as `typing.NamedTuple` is; the methods are those of its subclasses."""

        def _replace(self, /, **changes):
            values, numbers = list(self), self._numbers
            try:
                for field, value in changes.items():
                    values[numbers[field]] = value
            except KeyError as error:
                raise TypeError(f"{type(self).__name__} has no field {error}") from None
            return tuple.__new__(type(self), values)

        def _asdict(self):
            return dict(zip(self._fields, self, strict=False))

        def __repr__(self):
            return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._asdict().items())})"

        def __getnewargs__(self):
            return tuple(self)

    _METHODS = {name: vars(NamedTuple)[name] for name in ("_replace", "_asdict", "__repr__", "__getnewargs__")}
    _METHODS |= {"__new__": _first_instance, "_make": classmethod(_make)}
