"""The forward of one of peft's layers, written as a formula of tensors and parameters."""

from __future__ import annotations

from typing import Any

from memplan.catalogue.kernels import ops
from memplan.catalogue.methods.peft_layers import Wrapped
from memplan.core.errors import UnknownNameError, refused
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight

Factor = str | Weight


class Formula:
    """The operations of a layer; each method appends one and returns the name of the tensor that it computes."""

    def __init__(self, layer: Wrapped) -> None:
        self.layer, self.operations = layer, list[Op]()
        self.shapes = {layer.x: layer.x_shape}

    def call(
        self,
        name: str,
        *factors: Factor,
        shape: str = "",
        dtype: str = "",
        keeps: tuple[tuple[int, int], ...] = (),
        **fields: Any,
    ) -> str:
        """Append an operation that keeps factors for the gradients of others, by position; -1 is its output."""
        y = f"{self.layer.y}.{name}"
        names = (*(f if isinstance(f, str) else f.name for f in factors), y)
        self.shapes[y] = shape or self.shape(factors[0])
        self.operations.append(
            Op(
                f"{self.layer.name}.{name}",
                tuple(f for f in factors if isinstance(f, str)),
                (Tensor(y, self.shapes[y], dtype),),
                tuple(f for f in factors if isinstance(f, Weight)),
                tuple(Keep(names[what], names[of]) for what, of in keeps),
                source=ops.DERIVATIVES,
            )._replace(**fields)
        )
        return y

    def shape(self, factor: Factor) -> str:
        return factor.shape if isinstance(factor, Weight) else self.shapes[factor]

    def by_sequence(self, kind: str) -> None:
        """Raise SpecError if the layer's input has no axis of sequences, because the model has flattened it."""
        if self.layer.op.gradient == "new":
            message = f"{kind} fails on {self.layer.name}, whose input has no axis of sequences; name others"
            raise refused("method.targets", message)

    def base(self) -> str:
        """Return the output of the frozen layer."""
        y = f"{self.layer.y}.base"
        self.operations += self.layer.base(self.layer.x, y)
        self.shapes[y] = self.layer.y_shape
        return y

    def cast(self, factor: Factor, dtype: str, name: str) -> str:
        return self.call(name, factor, dtype=dtype, cast=True)

    def input(self, dtype: str = "", dropout: bool = True) -> tuple[str, str]:
        """Return the input in the adapter's dtype, and what dropout leaves of it."""
        x = self.cast(self.layer.x, dtype or self.layer.dtype, "x")
        if not (self.layer.dropout and dropout):
            return x, x
        dropped = f"{self.layer.y}.dropped"
        self.operations.append(ops.dropout(f"{self.layer.name}.dropout", x, dropped, self.layer.x_shape))
        self.shapes[dropped] = self.layer.x_shape
        return x, dropped

    def product(self, name: str, a: Factor, b: Factor, shape: str, **fields: Any) -> str:
        """Return a matrix product, which keeps both factors."""
        fields = {"autocast": "lower", "product": "matrix", **fields}
        return self.call(name, a, b, shape=shape, keeps=((1, 0), (0, 1)), **fields)

    def fixed(self, name: str, a: str, b: Factor, shape: str) -> str:
        """Return a product with a matrix that does not train."""
        fields = {"autocast": "lower", "product": "matrix", "gradient": "view"}
        return self.call(name, a, b, shape=shape, keeps=((1, 0),), **fields)

    def through(self, new: str, x: str) -> str:
        """Return the output of the layer with a new matrix instead of the frozen one."""
        y = self.product("out", x, new, self.layer.y_shape, gradient="view")
        bias = tuple(v._replace(trains=False) for v in self.layer.op.weights if not v.matrix)
        self.operations[-1] = self.operations[-1]._replace(weights=bias)
        return y

    def lora(self, a: Factor, b: Factor, base: str, *locals_: str) -> list[Op]:
        """Return the operations that end with LoRA of two matrices that are computed."""
        x, dropped = self.input()
        low = self.product("low", dropped, a, f"{self.layer.lead} r", gradient="view")
        delta = self.product("delta", low, b, self.layer.y_shape, gradient="view")
        return self.result(self.plus("sum", base, delta), self.layer.x, x, *locals_)

    def times(self, name: str, a: Factor, b: Factor) -> str:
        """Return the product by elements. A `b` of another shape is spread, and its gradient is made in full first."""
        small = self.shape(a) != self.shape(b)
        y, of = f"={self.layer.y}.{name}", b if isinstance(b, str) else b.name
        summed = (Scratch(Tensor("product", self.shape(a), y), of, summed=True),) if small else ()
        return self.call(name, a, b, keeps=((1, 0), (0, 1)), scratch_back=summed)

    def scale(self, name: str, a: Factor) -> str:
        return self.call(name, a)

    def plus(self, name: str, a: Factor, b: Factor) -> str:
        return self.call(name, a, b, gradient="same")

    def minus(self, name: str, a: Factor, b: str) -> str:
        negative = Scratch(Tensor("negative", self.shape(b), f"={b}"), b, summed=True)
        return self.call(name, a, b, gradient="same", scratch_back=(negative,))

    def relu(self, name: str, a: Factor) -> str:
        return self.call(name, a, keeps=((-1, 0),))

    def release(self, *names: str) -> None:
        """Python's locals let go of these tensors."""
        self.operations.append(ops.release_names(*names))

    def result(self, y: str, like: str, *locals_: str) -> list[Op]:
        """Return the operations, the last of which casts `y` to the dtype of `like`. Locals are released after it."""
        layer = self.layer
        back = ops.cast(f"{layer.name}.cast_back", y, layer.y, layer.y_shape, f"={like}")
        return [*self.operations, back, ops.release_names(layer.x, *locals_)]


_MOST = 256  # parts that are operations of their own


def count(layer: Wrapped, setting: str) -> int:
    """Return a setting that is a number of parts. Raises SpecError."""
    value = layer.options[setting]
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
        must, told = (
            (f"be given (--peft-options {setting}=4):", "") if value is None else ("be", f", not {value!r:.40}")
        )
        raise refused(f"method.options.{setting}", f"must {must} a whole number from 1 to {_MOST}{told}")
    return value


def word(layer: Wrapped, setting: str, *known: str) -> str:
    """Return a setting that is one of the known words. Raises UnknownNameError."""
    value = str(layer.options[setting])
    if value not in known:
        raise UnknownNameError(f"method.options.{setting}", value, known)
    return value
