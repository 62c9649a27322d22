"""`typing.NamedTuple`, but defined in a twentieth of the time: a short command defines 150 and makes few of most.

The standard one compiles every field's type and a constructor. Here types stay text, and the constructor is compiled
for the first instance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple  # noqa: PLC0414 (exported)
else:
    from collections import _tuplegetter as field_at

    def _first_instance(cls, /, *values, **named):
        """Compile the constructor of the class that has the fields, and make an instance with it."""
        owner = next(base for base in cls.__mro__ if "_fields" in vars(base))
        names = "".join(f"{field}, " for field in owner._fields)
        new = eval(f"lambda _cls, {names}: _new(_cls, ({names}))", {"_new": tuple.__new__, "__builtins__": {}})
        new.__name__, new.__qualname__ = "__new__", f"{owner.__qualname__}.__new__"
        new.__defaults__ = tuple(owner._field_defaults.values())
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
