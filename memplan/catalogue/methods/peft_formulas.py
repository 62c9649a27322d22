"""The layers of peft's newer methods, each written as its forward is: a formula of tensors and parameters.

Source: peft 0.21.2 tuners/*/layer.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memplan.catalogue.kernels import ops
from memplan.catalogue.methods.peft_layers import Wrapped, part
from memplan.catalogue.methods.peft_updates import divides
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


def _word(layer: Wrapped, setting: str, *known: str) -> str:
    """Return a setting that is one of the known words. Raises UnknownNameError."""
    value = str(layer.options[setting])
    if value not in known:
        raise UnknownNameError(f"method.options.{setting}", value, known)
    return value


def beft(layer: Wrapped) -> list[Op]:
    """BEFT: a bias."""
    f = Formula(layer)
    base = f.base()
    total = f.plus("sum", base, layer.weight("beft_bias", f"1 {layer.out}", 1))
    return f.result(total, base, base)


def deft(layer: Wrapped) -> list[Op]:
    """DEFT: the output less its projection on a few directions, plus LoRA along them, all in fp32."""
    f, o = Formula(layer), layer.options
    low = f"{layer.lead} r"
    p = layer.weight("deft_P", f"{layer.out} r", len(layer.out.split()))._replace(is_read_as_view=True)
    base = f.base()
    wide = f.cast(base, "fp32", "wide")
    x, dropped = f.input("fp32")
    directions = f.cast(p, "fp32", "P")
    right = f.relu("right", directions)
    projected = f.product("projected", wide, right, low)
    correction = f.product("correction", projected, directions, layer.y_shape)
    result = f.minus("corrected", wide, correction)
    f.release(wide)
    if not o["para"]:
        r = f.cast(layer.weight("deft_R", f"r {layer.into}", 1), "fp32", "R")
        scaled = f.scale("R_scaled", r)
        added = f.product("added", f.product("low", dropped, scaled, low), directions, layer.y_shape)
        result = f.plus("sum", result, added)
        f.release(scaled)
    return f.result(result, layer.x, base, x, right, correction)


def gralora(layer: Wrapped) -> list[Op]:
    """GraLoRA: LoRA of k blocks of the input, whose parts are dealt to k blocks of the output."""
    f, o = Formula(layer), layer.options
    k, hybrid = int(o["gralora_k"]), int(o["hybrid_r"])
    divides("gralora_k", k, layer, layer.rows, layer.columns, layer.rank)
    a = layer.weight("gralora_A", f"{k} {layer.columns // k} r", 2)
    b = layer.weight("gralora_B", f"{k} r {layer.rows // k}", 2)
    low = f"{layer.lead} {k} r"
    base = f.base()
    x, dropped = f.input()
    dealt = f.call("dealt", f.product("low", dropped, a, low), gradient="new")
    joined = f.call("joined", f.product("out", dealt, b, layer.y_shape), gradient="new")
    delta = f.scale("scaled", f.cast(joined, f"={base}", "delta"))
    result = f.call("sum", base, delta, dtype=f"={base}", view=True, gradient="same")
    if hybrid:
        c, d = (
            layer.weight("gralora_A_general", f"{hybrid} {layer.into}", 1),
            layer.weight("gralora_B_general", f"{layer.out} {hybrid}", len(layer.out.split())),
        )
        _, dropped = f.input()
        general = f.product("general", f.product("general_low", dropped, c, f"{layer.lead} {hybrid}"), d, layer.y_shape)
        delta = f.scale("general_scaled", f.cast(general, f"={base}", "general_delta"))
        result = f.call("general_sum", result, delta, dtype=f"={base}", view=True, gradient="same")
    return f.result(result, layer.x, x, joined)


def hra(layer: Wrapped) -> list[Op]:
    """HRA: the frozen matrix times r Householder reflections, each of which is a matrix as wide as the input."""
    f, square = Formula(layer), f"{layer.columns} {layer.columns}"
    if layer.rank > layer.columns:
        raise refused("method.rank", f"{layer.rank} is more than the {layer.columns} features of {layer.name}")
    u = layer.weight("hra_u", f"{layer.into} r", len(layer.into.split()))
    eye = f.call("eye", shape=square, dtype="fp32", gradient="none")
    norm = f.call("norm", u, shape="r", keeps=((0, 0), (-1, 0)))
    unit = f.call("unit", u, norm, keeps=((1, 0), (0, 1), (1, 1)))
    reflected = f.call("identity", shape=square, dtype=layer.dtype, gradient="none")
    for i in range(layer.rank):
        column = f.call(f"u{i}", unit, shape=f"{layer.columns} 1", view=True)
        product = f.product(f"column{i}", f.scale(f"twice{i}", reflected), column, f"{layer.columns} 1")
        new = f.minus(f"reflected{i}", reflected, f.product(f"outer{i}", product, column, square))
        f.release(reflected)
        reflected = new
    f.release(norm, unit)
    turned = f.product("turned", f.cast(eye, layer.dtype, "eye_cast"), reflected, square)
    w = layer.base_weight._replace(trains=False)
    wide = f.cast(w, f"={turned}", "wide")
    new = f.product("matrix", wide, turned, layer.matrix)
    f.release(turned, eye, reflected)
    x, _ = f.input(f"={new}", dropout=False)
    y = f.through(new, x)
    return f.result(y, layer.x, x, new, wide)


def lily(layer: Wrapped) -> list[Op]:
    """Lily: LoRA whose second matrix a router mixes from experts, which layers of one name share.

    Under all-linear they share them in models of at least 20 linear layers; in smaller ones peft names layers by path.
    """
    f, number, low = Formula(layer), int(layer.options["num_B"]), f"{layer.lead} r"
    if number < 2:
        raise refused("method.options.num_B", f"must be at least 2, not {number}: the router chooses among them")
    experts = _lily_experts(layer)
    f.shapes[experts.name] = experts.shape
    base = f.base()
    x, _ = f.input(dropout=False)
    hidden = f.product("hidden", x, layer.weight("lily_A", f"r {layer.into}", 1), low, gradient="view")
    router = layer.weight("lily_router", f"{number} r", 1)
    logits = f.product("logits", hidden, router, f"{layer.lead} {number}", gradient="view")
    chances = f"{layer.y}.chances"
    f.operations += ops.softmax(f"{layer.name}.softmax", logits, chances, f.shapes[logits])
    f.shapes[chances] = f.shapes[logits]
    mean = f.call("mean", chances, shape=str(number))
    combined = f.product("combined", mean, experts.name, f"r {layer.out}")
    delta = f.product("delta", hidden, combined, layer.y_shape, gradient="view")
    total = f.plus("sum", base, f.cast(f.scale("scaled", delta), f"={base}", "delta_cast"))
    return f.result(total, total, base, x, hidden, logits, chances, mean, combined, delta)


def _lily_experts(layer: Wrapped) -> Weight:
    """Return the matrices that Lily's layers of one name and shape share."""
    name = f"lily_B.{layer.name.rpartition('.')[2]}.{layer.rows}x{layer.columns}"
    return Weight(name, f"{layer.options['num_B']} r {layer.out}", "adapter", layer.dtype, rows=2)


def osf(layer: Wrapped) -> list[Op]:
    """OSF: the small half of the singular vectors and values, less what they were.

    Vectors in the model's dtype are views of all of them, until the Trainer moves them. Casting them loses the hooks
    that project their gradients, and the gradient of V is then a view of that of V and its initial value together.
    """
    f, smaller = Formula(layer), min(layer.rows, layer.columns)
    kept = layer.options["effective_rank"] or smaller // 2
    if not isinstance(kept, int) or kept < 1:
        raise refused("method.options.effective_rank", f"must be a whole number above 0, not {kept!r:.40}")
    rank = smaller - min(kept, smaller)
    high, cast = smaller - rank, layer.base_weight.dtype != layer.dtype
    all_of_them = layer.base_weight.dtype == "fp32" and not layer.moved
    shapes = {"U": f"{layer.rows} {rank}", "S": str(rank), "V": f"{rank} {layer.columns}"}
    u, s, v = (layer.weight(f"{name}_low", shape, int(name != "S")) for name, shape in shapes.items())
    v = v._replace(gradient=f"{2 * rank} {layer.columns}" if cast else "")
    rest = {f"{name}_low_init": shape for name, shape in shapes.items()}
    rest |= {"U_high": f"{layer.rows} {high}"} if layer.rows > layer.columns else {}
    rest |= {"V_high": f"{high} {layer.columns}"} if layer.columns > layer.rows or all_of_them else {}
    rest |= {"S_high": str(high)} if all_of_them else {}
    buffers = [
        Weight(f"{layer.name}.{name}", shape, "buffer", layer.dtype, trains=False) for name, shape in rest.items()
    ]
    u0, s0, v0 = buffers[:3]
    base = f.base()
    f.operations.append(Op(f"{layer.name}.high", weights=tuple(buffers[3:]), gradient="none"))
    us = f.times("US", u, s)
    us0 = f.call("US0", u0, s0, gradient="none")
    negative = f.call("negative", us0, gradient="none")
    a = f.call("A", us, negative, shape=f"{layer.rows} {2 * rank}", gradient="same")
    b = f.call("B", v, v0, shape=f"{2 * rank} {layer.columns}", gradient="same")
    x, _ = f.input(f"={a}", dropout=False)
    h = f.product("low", x, b, f"{layer.lead} {2 * rank}", gradient="view")
    delta = f.product("delta", h, a, layer.y_shape, gradient="view")
    total = f.plus("sum", base, f.cast(delta, f"={layer.x}", "delta_cast"))
    return f.result(total, total, base, x, h, a, b, delta)


def peanut(layer: Wrapped) -> list[Op]:
    """PEANuT: a small network that computes the update from the frozen matrix."""
    f, depth = Formula(layer), int(layer.options["depth"])
    small = f"{layer.into} r"
    base = f.base()
    w = layer.base_weight._replace(trains=False)
    wide = f.cast(w, layer.dtype, "wide")
    a = layer.weight("peanut_A", f"r {layer.out}", 1)._replace(is_read_as_view=True)
    z = f.relu("act", f.product("low", wide, a, small))
    residuals: list[str] = []
    for i in range(depth):
        residuals.append(z)
        z = f.relu(f"encoded{i}.act", f.product(f"encoded{i}", z, layer.weight(f"encoders.{i}", "r r", 1), small))
    for i in range(depth):
        z = f.relu(f"decoded{i}.act", f.product(f"decoded{i}", z, layer.weight(f"decoders.{i}", "r r", 1), small))
        z = f.plus(f"decoded{i}.sum", z, residuals[depth - 1 - i])
    b = layer.weight("peanut_B", f"{layer.out} r", len(layer.out.split()))
    delta = f.product("matrix", z, b, f"{layer.into} {layer.out}")
    f.release(wide, z, *residuals)
    scaled = f.scale("scaled", delta)
    f.release(delta)
    x, _ = f.input(f"={scaled}", dropout=False)
    change = f.product("delta", x, scaled, layer.y_shape, gradient="view")
    total = f.plus("sum", base, f.cast(change, f"={base}", "delta_cast"))
    return f.result(total, total, base, x, scaled, change)


def psoft(layer: Wrapped) -> list[Op]:
    """PSOFT: an orthogonal matrix between the layer's principal singular vectors, which stay frozen."""
    f, o, low = Formula(layer), layer.options, f"{layer.lead} r"
    shapes, rank = {"psoft_A": f"r {layer.into}", "psoft_B": f"{layer.out} r"}, layer.rank
    whole = _word(layer, "psoft_svd", "full", "lowrank") == "full"
    if _word(layer, "ab_svd_init", "psoft_init", "pissa_init") == "psoft_init" and whole and not layer.moved:
        # A stays a view of all singular vectors, until the Trainer moves it
        shapes["singular_vectors"] = f"{min(layer.rows, layer.columns) - rank} {layer.columns}"
    first, second, *rest = (
        Weight(f"{layer.name}.{name}", shape, "buffer", "fp32", trains=False) for name, shape in shapes.items()
    )
    number = rank * (rank - 1) // 2
    w = layer.weight("psoft_R.weight", str(number) if o["psoft_orth"] else "r r", 0 if o["psoft_orth"] else 1)
    base = f.base()
    f.operations.append(Op(f"{layer.name}.svd", weights=tuple(rest), gradient="none"))
    x, dropped = f.input("fp32")
    xa = f.fixed("low", dropped, first, low)
    r: Factor = w
    if o["psoft_orth"]:
        indices = tuple(
            Weight(f"{layer.name}.psoft_R.{name}", str(number), "buffer", "int64", trains=False)
            for name in ("rows", "cols")
        )
        f.operations.append(Op(f"{layer.name}.psoft_R.indices", weights=indices, gradient="none"))
        skew = f.call("skew", f.call("upper", w, shape="r r"))
        eye = f.call("eye", shape="r r", gradient="none", dtype=layer.dtype)
        plus, minus = f.plus("plus", skew, eye), f.minus("minus", eye, skew)
        r = f.call("solved", plus, minus, keeps=((1, 0), (1, 1), (-1, 0), (-1, 1)))
        lu, pivots = Tensor(f"{r}.lu", "r r", f"={plus}"), Tensor(f"{r}.pivots", "r", "int32")
        solved = f.operations[-1]
        kept = tuple(Keep(t.name, minus) for t in (lu, pivots))
        f.operations[-1] = solved._replace(writes=(*solved.writes, lu, pivots), keeps=(*solved.keeps, *kept))
        f.release(skew, eye)
    for name in ("vector_b", "vector_a"):
        if o["psoft_mag_b" if name == "vector_b" else "psoft_mag_a"]:
            r = f.times(f"by_{name}", r, layer.weight(f"psoft_R.{name}", "r"))
    xr = f.product("turned", xa, r, low, gradient="view")
    difference = f.minus("difference", xr, xa)
    delta = f.fixed("delta", difference, second, layer.y_shape)
    total = f.plus("sum", base, f.scale("scaled", delta))
    return f.result(total, base, base, x, dropped, xa, xr, delta)


def pvera(layer: Wrapped) -> list[Op]:
    """PVeRA: VeRA whose low-rank activations are drawn from learned distributions."""
    f, low = Formula(layer), f"{layer.lead} r"
    d, b = layer.weight("pvera_lambda_d", str(2 * layer.rank)), layer.weight("pvera_lambda_b", layer.out)
    both = f"{layer.lead} {2 * layer.rank}"
    base = f.base()
    x, dropped = f.input()
    first, second = "pvera_A", "pvera_B"
    if layer.autocast:
        first, second = f"{layer.y}.first", f"{layer.y}.second"
        f.operations.append(
            part(f"{layer.name}.pvera_A.cast", "pvera_A", first, f"{2 * layer.rank} {layer.into}", layer.compute)
        )
    a = f.fixed("a", dropped, first, both)
    scaled = f.times("scaled", a, d)
    log = f.scale("half", scaled)
    f.operations[-1] = f.operations[-1]._replace(writes=(Tensor(log, low),))
    std = f.call("std", log, shape=low, keeps=((-1, 0),))
    noise = f.call("noise", shape=low, dtype=f"={std}", gradient="none")
    drawn = f.call("drawn", scaled, f.call("spread", std, noise, keeps=((1, 0),)), shape=low, gradient="new")
    f.release(std, noise)
    if layer.autocast:
        f.operations.append(part(f"{layer.name}.pvera_B.cast", "pvera_B", second, f"{layer.out} r", layer.compute))
    total = f.plus("sum", base, f.times("delta", f.fixed("b", drawn, second, layer.y_shape), b))
    return f.result(total, layer.x, x, scaled)


def supertuning(layer: Wrapped) -> list[Op]:
    """Super-Tuning: the few entries of the frozen matrix with the largest values, in a copy of the matrix."""
    f, o = Formula(layer), layer.options
    number = int(layer.rows * layer.columns * (1 - float(o["sparsity"])))
    w = layer.base_weight._replace(trains=False)
    stored = Weight(f"{layer.name}.supertuning_indices", str(number), "buffer", "int32", trains=False)
    values = layer.weight("supertuning_values", str(number))
    indices = f.call("indices", stored, dtype="int64", gradient="none")
    cast = f.cast(values, f"={w.name}", "values")
    f.shapes[w.name] = layer.matrix
    new = f.call("matrix", cast, indices, w, shape=layer.matrix, dtype=f"={w.name}", keeps=((1, 0),))
    y = f.through(new, layer.x)
    return f.result(y, y, indices, cast, new)


def glora(layer: Wrapped) -> list[Op]:
    """GLoRA: the frozen matrix times one update plus another, and a bias likewise; a second product of the layer."""
    f, w = Formula(layer), layer.base_weight._replace(trains=False)
    bias = next((v._replace(trains=False) for v in layer.op.weights if not v.matrix), None)
    rows, columns = len(layer.out.split()), len(layer.into.split())

    def path(name: str, kind: str, out: str, into: str) -> str:
        """Return a part in the model's dtype: a product, a parameter, or zeros."""
        full = f"{out} {into}".strip()
        number = rows if out == layer.out else columns
        if kind == "lora":
            first = layer.weight(f"glora_{name}.Xd", f"{out} r", number)
            second = layer.weight(f"glora_{name}.Xu", f"r {into}", 1)
            y = f.product(f"{name}.full", first, second, full, product="fold")
        elif kind in ("vector", "constant"):
            shape = "1" if kind == "constant" else f"{out} 1" if into else out
            y = f.call(f"{name}.full", layer.weight(f"glora_{name}.X", shape), gradient="same")
        else:
            zeros = Weight(f"{layer.name}.glora_{name}.zeros", full, "buffer", w.dtype, trains=False)
            return f.call(name, zeros, dtype=f"={w.name}", gradient="none", cast=True)
        return f.cast(y, f"={w.name}", name)

    base = f.base()
    ab = _word(layer, "config_A_B", "lora", "vector", "constant", "none")
    c = _word(layer, "config_C", "lora", "vector", "none")
    de = _word(layer, "config_D_E", "constant", "vector", "none")
    parts = [path(name, ab, layer.out, layer.into) for name in ("A", "B")]
    parts += [path("C", c if bias else "", layer.into, "1")]
    parts += [path(name, de if bias else "", layer.out, "") for name in ("D", "E")]
    times = f.call("times_A", w, parts[0], shape=layer.matrix, keeps=((0, 1),))
    new = f.plus("matrix", f.plus("and_A", w, times), parts[1])
    y = f.product("out", layer.x, new, layer.y_shape, gradient="view")
    total = f.plus("sum", base, y)
    return f.result(f.minus("difference", total, f.scale("once", base)), base, base, y, new, *parts)


def shira(layer: Wrapped) -> list[Op]:
    """SHiRA: a few entries of the frozen matrix, added to a copy of it."""
    f = Formula(layer)
    number = layer.rank * (layer.rows + layer.columns)
    w = layer.base_weight._replace(trains=False)
    values = layer.weight("shira_weight", str(number))
    indices = Weight(f"{layer.name}.shira_indices", f"2 {number}", "buffer", "int32", trains=False)
    wide = f.call("wide_indices", indices, dtype="int64", gradient="none")
    common = f"{layer.dtype}!{w.name}"
    f.shapes[w.name] = layer.matrix
    new = f.call(
        "matrix",
        f.scale("sparse", values),
        wide,
        w,
        shape=layer.matrix,
        dtype=f"={w.name}",
        keeps=((0, 0), (1, 0)),
        scratch=tuple(Tensor(name, layer.matrix, common) for name in ("copy in the dtype of the entries", "sum")),
        scratch_back=(Scratch(Tensor("gradient in the dtype of the entries", layer.matrix, common)),),
        source="torch 2.13 aten/src/ATen/native/sparse/cuda/SparseCUDATensorMath.cu add_out_dense_sparse_cuda",
    )
    y = f.through(new, layer.x)
    return f.result(y, y, new)


def tinylora(layer: Wrapped) -> list[Op]:
    """TinyLoRA: LoRA between frozen singular vectors, whose small matrix a few numbers combine from random ones."""
    f, number = Formula(layer), int(layer.options["u"])
    rank = min(layer.rank, layer.rows, layer.columns)
    low = f"{layer.lead} {rank}"
    shapes = {"A": f"{rank} {layer.into}", "B": f"{layer.out} {rank}", "P": f"{number} {rank} {rank}"}
    a, b, p = (
        Weight(f"{layer.name}.tinylora_{name}", shape, "buffer", layer.dtype, trains=False)
        for name, shape in shapes.items()
    )
    base = f.base()
    v = layer.weight("tinylora_v", str(number))
    projections = f.cast(p, layer.dtype, "P")
    r = f.call("R", v, projections, shape=f"{rank} {rank}", keeps=((1, 0),))
    small = f.cast(r, f"={a.name}", "R_cast")
    x, dropped = f.input(f"={a.name}")
    turned = f.product("turned", f.fixed("low", dropped, a, low), small, low, gradient="view")
    delta = f.fixed("delta", turned, b, layer.y_shape)
    return f.result(f.plus("sum", base, delta), layer.x, x, dropped, turned, delta, r, small)


def unilora(layer: Wrapped) -> list[Op]:
    """Uni-LoRA: LoRA whose entries are scaled copies of a few numbers, which all layers share."""
    f = Formula(layer)
    base = f.base()
    f.shapes["unilora_theta_d"] = str(layer.options["theta_d_length"])
    halves: list[str] = []
    for half, shape in (("A", f"r {layer.into}"), ("B", f"{layer.out} r")):
        indices = Weight(f"{layer.name}.unilora_indices_{half}", shape, "buffer", "int64", trains=False)
        scales = Weight(f"{layer.name}.unilora_scales_{half}", shape, "buffer", layer.dtype, trains=False)
        chosen = f.call(f"{half}.chosen", "unilora_theta_d", indices, shape=shape, keeps=((1, 0),))
        halves.append(f.call(half, chosen, scales, keeps=((1, 0),)))
    return f.lora(halves[0], halves[1], base, *halves)


def vblora(layer: Wrapped) -> list[Op]:
    """VB-LoRA: LoRA whose matrices are made of weighted vectors from a bank, which all layers share."""
    f, o = Formula(layer), layer.options
    number, length, k = (int(o[name]) for name in ("num_vectors", "vector_length", "topk"))
    divides("vector_length", length, layer, layer.rows, layer.columns)
    f.shapes["vblora_vector_bank"] = f"{number} {length}"
    base = f.base()
    halves: list[str] = []
    for half, blocks in (("A", f"r {layer.columns // length}"), ("B", f"{layer.rows // length} r")):
        logits = layer.weight(f"vblora_logits_{half}", f"{blocks} {number}", 2)
        values = f.call(f"{half}.topk", logits, shape=f"{blocks} {k}")
        indices = Tensor(f"{values}.indices", f"{blocks} {k}", "int64")
        top = f.operations[-1]
        f.operations[-1] = top._replace(writes=(*top.writes, indices), keeps=(Keep(indices.name, logits.name),))
        f.shapes[indices.name] = indices.shape
        weights = f"{layer.y}.{half}.weights"
        f.operations += ops.softmax(f"{layer.name}.{half}.softmax", values, weights, f"{blocks} {k}")
        f.shapes[weights] = f"{blocks} {k}"
        f.release(values)
        vectors = f.call(
            f"{half}.vectors", "vblora_vector_bank", indices.name, shape=f"{blocks} {k} {length}", keeps=((1, 0),)
        )
        summed = f.call(f"{half}.sum", f.times(f"{half}.product", vectors, weights), shape=f"{blocks} {length}")
        f.release(weights)
        halves.append(summed if half == "A" else f.call("B.reshaped", summed, gradient="same"))
    return f.lora(halves[0], halves[1], base, *halves)


def waveft(layer: Wrapped) -> list[Op]:
    """WaveFT: a dense update whose wavelet coefficients are trained at a few places."""
    f, o = Formula(layer), layer.options
    number, even = int(o["n_frequency"]), f"{-(-layer.rows // 2) * 2} {-(-layer.columns // 2) * 2}"
    if not 0 < number <= layer.rows * layer.columns:
        message = f"{number} is not among the {layer.rows * layer.columns} of {layer.name}"
        raise refused("method.options.n_frequency", message)
    w = layer.weight("waveft_spectrum", str(number))
    base = f.base()
    indices = f.call("indices", shape=f"2 {number}", dtype="int64", gradient="none")
    held: tuple[str, ...] = ()
    if not o["use_idwt"]:
        dense = f.call("dense", w, indices, shape=layer.matrix, keeps=((1, 0),))
    else:
        valid = f.call("valid", shape=str(number), dtype="bool", gradient="none")
        padded = f.call("padded", indices, gradient="none")
        places = f.call("places", padded, gradient="none")
        chosen = f.call("chosen", w, valid, keeps=((1, 0),))
        spectrum = f.call("dense", chosen, places, shape=even, keeps=((1, 0),))
        filters = f.call("filters", shape="4 1 2 2", dtype=layer.dtype, gradient="none")
        stacked = f.call("stacked", spectrum)
        dense = f.call("waves", stacked, filters, keeps=((0, 0), (1, 0)), autocast="lower")
        held = (spectrum, indices, padded, valid, chosen)
    scaled = f.scale("scaled", dense)
    f.release(*held)
    x, _ = f.input(f"={scaled}", dropout=False)
    total = f.plus("sum", base, f.product("delta", x, scaled, layer.y_shape, gradient="view"))
    return f.result(total, layer.x, x, scaled)


def _shared(name: str, layers: tuple[Wrapped, ...], dtype: str, *sizes: str) -> Op:
    """A parameter that all layers share, whose sizes are settings."""
    shape = " ".join(str(layers[0].options[size]) for size in sizes)
    return Op(name, weights=(Weight(name, shape, "adapter", dtype, rows=len(sizes) - 1),))


def _shared_distributions(layers: tuple[Wrapped, ...], dtype: str) -> Op:
    """PVeRA's matrices, as large as the largest layer needs, in both directions."""
    rows, columns = (max(getattr(layer, side) for layer in layers) for side in ("rows", "columns"))
    weights = (("pvera_A", f"{2 * layers[0].rank} {columns}"), ("pvera_B", f"{rows} r"))
    return Op("pvera", weights=tuple(Weight(n, s, "buffer", dtype, trains=False) for n, s in weights), gradient="none")


def _shared_experts(layers: tuple[Wrapped, ...], dtype: str) -> Op:
    """Lily's matrices, of each name and shape of layers."""
    weights = {w.name: w._replace(dtype=dtype) for w in map(_lily_experts, layers)}
    return Op("lily", weights=tuple(weights.values()))


SHARED_FORMULAS: dict[str, Callable[[tuple[Wrapped, ...], str], Op]] = {
    "lily": _shared_experts,
    "pvera": _shared_distributions,
    "unilora": lambda layers, dtype: _shared("unilora_theta_d", layers, dtype, "theta_d_length"),
    "vblora": lambda layers, dtype: _shared("vblora_vector_bank", layers, dtype, "num_vectors", "vector_length"),
}
FORMULAS: dict[str, Callable[[Wrapped], list[Op]]] = {
    "beft": beft,
    "deft": deft,
    "glora": glora,
    "gralora": gralora,
    "hra": hra,
    "lily": lily,
    "osf": osf,
    "peanut": peanut,
    "psoft": psoft,
    "pvera": pvera,
    "shira": shira,
    "supertuning": supertuning,
    "tinylora": tinylora,
    "unilora": unilora,
    "vblora": vblora,
    "waveft": waveft,
}
