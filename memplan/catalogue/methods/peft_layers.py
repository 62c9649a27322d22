"""The layers that peft's methods other than LoRA put around a frozen linear layer: parameters and operations.

Each function returns the operations that replace the linear layer, in the order of peft's `forward`.

Source: peft 0.21.2 tuners/*/layer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import Any

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import matrix, renamed
from memplan.catalogue.quantization.fused_4bit import Copies
from memplan.catalogue.quantization.quantization import family_of, quantised_linear
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight
from memplan.core.records import NamedTuple


class Wrapped(NamedTuple):
    """A frozen linear layer that an adapter wraps.

    op        its operation
    rows      number of output features
    columns   number of input features
    rank      rank of the adapter, for shapes that depend on it
    options   the method's other settings
    dtype     dtype of the adapter
    compute   dtype in which a 4-bit layer computes
    autocast  whether the run uses autocast
    dropout   whether the adapter has dropout
    moved     whether the Trainer has moved all buffers to the GPU
    copies    when 4-bit matrices are dequantised first
    """

    op: Op
    rows: int
    columns: int
    rank: int
    options: Mapping[str, Any]
    dtype: str
    compute: str
    autocast: bool
    dropout: bool
    moved: bool
    copies: Copies

    @property
    def name(self) -> str:
        return self.op.name

    @property
    def x(self) -> str:
        return self.op.reads[0]

    @property
    def y(self) -> str:
        return self.op.writes[0].name

    @property
    def y_shape(self) -> str:
        return self.op.writes[0].shape

    @property
    def lead(self) -> str:
        return ops.axes_of(self.op)[0]

    @property
    def out(self) -> str:
        return ops.axes_of(self.op)[1]

    @property
    def into(self) -> str:
        return ops.axes_of(self.op)[2]

    @property
    def x_shape(self) -> str:
        return f"{self.lead} {self.into}"

    @property
    def matrix(self) -> str:
        return f"{self.out} {self.into}"

    @property
    def base_weight(self) -> Weight:
        w = matrix(self.op)
        assert w is not None
        return w

    @property
    def is_4bit(self) -> bool:
        w = self.base_weight
        return bool(w.stored) and family_of(w) == "4bit"

    @property
    def is_bitsandbytes(self) -> bool:
        return bool(self.base_weight.stored)

    def weight(self, name: str, shape: str, rows: int = 0, dtype: str = "") -> Weight:
        """Return a parameter of the adapter that trains. `rows` as in `Weight`; 0 for a vector."""
        return Weight(f"{self.name}.{name}", shape, "adapter", dtype or self.dtype, rows=rows)

    def base(self, x: str, y: str) -> Iterable[Op]:
        """Return the frozen layer, reading `x` and writing `y`."""
        (op,) = renamed((self.op,), {self.x: x})
        if self.base_weight.stored:
            return quantised_linear(op, f"{self.name}.base_layer", y, self.compute, copies=self.copies)
        return (op._replace(name=f"{self.name}.base_layer", writes=(op.writes[0]._replace(name=y),)),)

    def product(self, name: str, x: str, matrix: str | Weight, y: str, shape: str, source: str = "") -> Op:
        """Return `x @ matrix` for an activation x: a computed matrix, a shared buffer or a parameter."""
        m = matrix if isinstance(matrix, str) else matrix.name
        return Op(
            f"{self.name}.{name}",
            (x, m) if isinstance(matrix, str) else (x,),
            (Tensor(y, shape),),
            () if isinstance(matrix, str) else (matrix,),
            (Keep(m, x), Keep(x, m)),
            gradient=self.op.gradient,
            autocast="lower",
            product="matrix",
            source=source or f"{ops.DERIVATIVES}: mm",
        )

    def dropped(self, x: str, name: str) -> tuple[str, tuple[Op, ...]]:
        """Return the adapter's input after dropout, and the operation, if there is dropout."""
        if not self.dropout:
            return x, ()
        y = f"{self.y}.dropped"
        return y, (ops.dropout(f"{self.name}.{name}", x, y, self.x_shape),)


def fold(name: str, a: str | Weight, b: str | Weight, y: str, shape: str) -> Op:
    """Return the product of two small matrices, each a parameter or computed."""
    weights = tuple(w for w in (a, b) if isinstance(w, Weight))
    first, second = (w if isinstance(w, str) else w.name for w in (a, b))
    return Op(
        name,
        tuple(t for t in (a, b) if isinstance(t, str)),
        (Tensor(y, shape),),
        weights,
        (Keep(first, second), Keep(second, first)),
        autocast="lower",
        product="fold",
        source=f"{ops.DERIVATIVES}: mm",
    )


def ia3(layer: Wrapped) -> Iterator[Op]:
    """(IA)³: the input of a feedforward layer, or the output of any other, times a learned vector.

    bitsandbytes' layers cast the input to fp32 first, unless the run uses autocast.
    """
    p, n, x = layer.y, layer.name, layer.x
    names = str(layer.options.get("feedforward_modules") or "").split()
    before = any(f".{n}".endswith(f".{name}") for name in names)
    axis = layer.into if before else layer.out
    shape = f"1 {axis}" if before else f"{axis} 1"
    w = layer.weight("ia3_l", shape, rows=1 if before else len(axis.split()))
    scaling, inner = f"{p}.scaling", x
    yield Op(f"{n}.ia3_scaling", (), (Tensor(scaling, axis),), (w,), source=f"{ops.DERIVATIVES}: mul.Scalar")
    widens = layer.is_bitsandbytes and not layer.autocast
    if widens or (before and not layer.is_bitsandbytes):
        inner = f"{p}.x"
        yield ops.cast(f"{n}.cast", x, inner, layer.x_shape, "fp32" if widens else f"={w.name}")
    given = inner
    if before:
        yield _times(f"{n}.scale", inner, scaling, f"{p}.product", layer.x_shape)
        given = f"{p}.input"
        like = f"{p}.product" if layer.is_bitsandbytes else x
        yield ops.cast(f"{n}.cast_product", f"{p}.product", given, layer.x_shape, f"={like}")
    yield from layer.base(given, f"{p}.base")
    result = f"{p}.base"
    if not before:
        yield _times(f"{n}.scale", result, scaling, f"{p}.product", layer.y_shape)
        result = f"{p}.product"
    if layer.is_4bit:
        yield ops.copy(f"{n}.clone", result, f"{p}.clone", layer.y_shape)
        yield ops.release_names(result)
        result = f"{p}.clone"
    keeps_dtype = layer.is_bitsandbytes and layer.autocast
    yield ops.cast(f"{n}.cast_back", result, p, layer.y_shape, f"={result if keeps_dtype else f'{p}.base'}")
    yield ops.release_names(x, inner, scaling, *((given,) if before and not layer.is_bitsandbytes else ()))


def _times(name: str, x: str, small: str, y: str, shape: str) -> Op:
    """Return `x * small`, in which both gradients are computed in full before the small one is summed."""
    return ops.spread(name, x, small, y, shape, summed=True)


def vera(layer: Wrapped) -> Iterator[Op]:
    """VeRA: two random matrices, shared by all layers, scaled by learned vectors."""
    p, n, x = layer.y, layer.name, layer.x
    result = f"{p}.base"
    yield from layer.base(x, result)
    if layer.is_4bit:
        yield ops.copy(f"{n}.clone", result, f"{p}.clone", layer.y_shape)
        yield ops.release_names(result)
        result = f"{p}.clone"
    d, b = layer.weight("vera_lambda_d", "r"), layer.weight("vera_lambda_b", layer.out)
    inner, low = f"{p}.x", f"{layer.lead} r"
    yield ops.cast(f"{n}.cast", x, inner, layer.x_shape, layer.dtype)
    dropped, drops = layer.dropped(inner, "vera_dropout")
    yield from drops
    first, second = "vera_A", "vera_B"
    if layer.autocast:  # which casts the part of each matrix that the layer uses
        first, second = f"{p}.first", f"{p}.second"
        yield part(f"{n}.vera_A.cast", "vera_A", first, f"r {layer.into}", layer.compute)
    yield layer.product("vera_A", dropped, first, f"{p}.a", low)
    yield ops.multiply_weight(f"{n}.vera_lambda_d", f"{p}.a", f"{p}.d", low, d)
    if layer.autocast:
        yield part(f"{n}.vera_B.cast", "vera_B", second, f"{layer.out} r", layer.compute)
    yield layer.product("vera_B", f"{p}.d", second, f"{p}.b", layer.y_shape)
    yield ops.multiply_weight(f"{n}.vera_lambda_b", f"{p}.b", f"{p}.delta", layer.y_shape, b)
    yield ops.add(f"{n}.add", result, f"{p}.delta", f"{p}.sum", layer.y_shape)
    yield ops.cast(f"{n}.cast_back", f"{p}.sum", p, layer.y_shape, f"={p}.base")
    yield ops.release_names(x, inner)


def part(name: str, shared: str, y: str, shape: str, dtype: str) -> Op:
    """Return a cast of a part of a shared buffer."""
    return Op(
        name, (shared,), (Tensor(y, shape, dtype),), cast=True, gradient="none", source=f"{ops.DERIVATIVES}: _to_copy"
    )


def _shared_projections(layers: tuple[Wrapped, ...], dtype: str) -> Op:
    """VeRA's matrices, as large as the largest layer needs, in both directions."""
    rows, columns = (max(getattr(layer, side) for layer in layers) for side in ("rows", "columns"))
    weights = (("vera_A", f"r {columns}"), ("vera_B", f"{rows} r"))
    return Op("vera", weights=tuple(Weight(n, s, "buffer", dtype, trains=False) for n, s in weights), gradient="none")


def loha(layer: Wrapped) -> Iterator[Op]:
    """LoHa: the product of W1 and W2 by elements, each a product of two low-rank matrices, in one autograd function.

    Its backward computes both products again.
    """
    p, n, x = layer.y, layer.name, layer.x
    full = layer.matrix
    weights = tuple(
        layer.weight(
            f"hada_w{i}_{half}",
            *((f"{layer.out} r", len(layer.out.split())) if half == "a" else (f"r {layer.into}", 1)),
        )
        for i in (1, 2)
        for half in ("a", "b")
    )
    yield from layer.base(x, f"{p}.base")
    yield Op(
        f"{n}.hada",
        (),
        (Tensor(f"{p}.matrix", full),),
        weights,
        scratch=tuple(Tensor(f"product {i}", full, layer.compute if layer.autocast else "") for i in (1, 2)),
        scratch_back=tuple(
            Scratch(Tensor(name, full, layer.dtype))
            for name in ("scaled gradient", "gradient of product 1", "product 1", "gradient of product 2")
        ),
        autocast="lower",
        product="fold",
        source="peft 0.21.2 tuners/loha/layer.py HadaWeight",
    )
    yield from plus_product(layer, f"{p}.matrix")


def plus_product(layer: Wrapped, delta: str) -> Iterator[Op]:
    """LyCORIS's layers: the result plus `x @ delta.T`, x in the dtype of delta."""
    p, n, x = layer.y, layer.name, layer.x
    inner = f"{p}.x"
    yield ops.cast(f"{n}.cast", x, inner, layer.x_shape, f"={delta}")
    yield layer.product("delta", inner, delta, f"{p}.delta", layer.y_shape)
    yield ops.release_names(inner, delta)
    yield ops.add(f"{n}.add", f"{p}.base", f"{p}.delta", f"{p}.sum", layer.y_shape)
    yield ops.cast(f"{n}.cast_back", f"{p}.sum", p, layer.y_shape, f"={x}")
    yield ops.release_names(x)


def lokr(layer: Wrapped) -> Iterator[Op]:
    """LoKr: the Kronecker product of W1 and W2, each whole or a product of two low-rank matrices."""
    p, n, x = layer.y, layer.name, layer.x
    factor = int(layer.options["decompose_factor"])
    (out_l, out_k), (in_m, in_n) = factorization(layer.rows, factor), factorization(layer.columns, factor)
    whole = (
        not (layer.options["decompose_both"] and layer.rank < max(out_l, in_m) / 2),
        not layer.rank < max(out_k, in_n) / 2,
    )
    yield from layer.base(x, f"{p}.base")
    sides: list[str | Weight] = []
    for i, (rows, columns) in enumerate(((out_l, in_m), (out_k, in_n))):
        name = f"lokr_w{i + 1}"
        if whole[i]:
            sides.append(layer.weight(name, f"{rows} {columns}", rows=1))
            continue
        a, b = layer.weight(f"{name}_a", f"{rows} r", 1), layer.weight(f"{name}_b", f"r {columns}", 1)
        yield fold(f"{n}.{name}", a, b, f"{p}.w{i + 1}", f"{rows} {columns}")
        sides.append(f"{p}.w{i + 1}")
    first, second = (side if isinstance(side, str) else side.name for side in sides)
    yield Op(
        f"{n}.kron",
        tuple(side for side in sides if isinstance(side, str)),
        (Tensor(f"{p}.kron", layer.matrix),),
        tuple(side for side in sides if isinstance(side, Weight)),
        (Keep(first, second), Keep(second, first)),
        scratch_back=tuple(
            Scratch(Tensor(f"product for W{i}", layer.matrix, f"={p}.kron"), side, summed=True)
            for i, side in ((1, first), (2, second))
        ),
        source=f"{ops.DERIVATIVES}: mul.Tensor, for torch.kron",
    )
    yield ops.scale(f"{n}.scaling", f"{p}.kron", f"{p}.matrix", layer.matrix)
    yield from plus_product(layer, f"{p}.matrix")


def factorization(dimension: int, factor: int) -> tuple[int, int]:
    """Return two factors of a dimension, the smaller first, near `factor` or, if that is -1, near each other.

    >>> factorization(128, -1), factorization(127, -1), factorization(128, 4)
    ((8, 16), (1, 127), (4, 32))
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = dimension if factor == -1 else factor
    m, n = 1, dimension
    while m < n:
        new = next(k for k in range(m + 1, dimension + 1) if dimension % k == 0)
        if new > limit:
            break
        m, n = new, dimension // new
    return min(m, n), max(m, n)


def adalora(layer: Wrapped) -> Iterator[Op]:
    """AdaLoRA: LoRA with a learned factor per rank, added to the result in place."""
    p, n, x = layer.y, layer.name, layer.x
    result, shape = f"{p}.base", layer.y_shape
    yield from layer.base(x, result)
    if layer.is_4bit:
        yield ops.copy(f"{n}.clone", result, f"{p}.clone", shape)
        yield ops.release_names(result)
        result = f"{p}.clone"
    a = layer.weight("lora_A", f"r {layer.into}", 1)
    e = layer.weight("lora_E", "r 1", 1)
    b = layer.weight("lora_B", f"{layer.out} r", len(layer.out.split()))._replace(is_read_as_view=True)
    number = layer.weight("ranknum", "1")  # a constant that trains, because moving it to the GPU makes it a parameter
    yield Op(f"{n}.ranknum", (), (Tensor(f"{p}.ranknum", "1"),), (number,), gradient="same")
    casts = not (layer.is_bitsandbytes and layer.autocast)
    inner = x
    if casts:
        inner = f"{p}.x"
        wide = "fp32" if layer.is_bitsandbytes and not layer.is_4bit else layer.dtype
        yield ops.cast(f"{n}.cast", x, inner, layer.x_shape, wide)
    dropped, drops = layer.dropped(inner, "lora_dropout")
    yield from drops
    yield Op(
        f"{n}.lora_AE",
        (),
        (Tensor(f"{p}.ae", a.shape),),
        (a, e),
        (Keep(a.name, e.name), Keep(e.name, a.name)),
        scratch_back=(Scratch(Tensor("product", a.shape, a.dtype), e.name, summed=True),),
        source=f"{ops.DERIVATIVES}: mul.Tensor",
    )
    low = f"{layer.lead} r"
    yield layer.product("lora_A", dropped, f"{p}.ae", f"{p}.a", low)
    yield layer.product("lora_B", f"{p}.a", b, f"{p}.b", shape)
    delta = f"{p}.b"
    if layer.is_bitsandbytes and casts:
        yield ops.cast(f"{n}.cast_back", delta, f"{p}.b.cast", shape, f"={result}")
        delta = f"{p}.b.cast"
    yield ops.scale(f"{n}.scaling", delta, f"{p}.scaled", shape)
    yield Op(
        f"{n}.ranks",
        (f"{p}.scaled", f"{p}.ranknum"),
        (Tensor(f"{p}.delta", shape),),
        (),
        (
            Keep(f"{p}.ranknum", f"{p}.scaled"),
            Keep(f"{p}.scaled", f"{p}.ranknum"),
            Keep(f"{p}.ranknum", f"{p}.ranknum"),
        ),
        scratch_back=(
            Scratch(Tensor("gradient, negated", shape, f"={p}.delta"), f"{p}.ranknum"),
            Scratch(Tensor("quotient", shape, f"={p}.delta"), f"{p}.ranknum"),
            Scratch(Tensor("product", shape, f"={p}.delta"), f"{p}.ranknum", summed=True),
        ),
        source=f"{ops.DERIVATIVES}: div.Tensor",
    )
    add, in_place = ops.add(f"{n}.add", result, f"{p}.delta", p, shape), layer.is_4bit or not layer.is_bitsandbytes
    yield add._replace(view=True, writes=(Tensor(p, shape, f"={result}"),)) if in_place else add
    yield ops.release_names(x, inner, f"{p}.ranknum")


def oft(layer: Wrapped) -> Iterator[Op]:
    """OFT: the input, in blocks, times orthogonal matrices, which the Cayley transform computes from parameters."""
    p, n, x = layer.y, layer.name, layer.x
    o, columns = layer.options, layer.columns
    size = columns // nearest_divisor(columns, o["r"]) if o["r"] else nearest_divisor(columns, o["oft_block_size"])
    blocks = columns // size
    trained = 1 if o["block_share"] else blocks
    w = layer.weight("oft_R.weight", f"{trained} {size * (size - 1) // 2}", 1)
    inner, each = f"{p}.x", f"{trained} {size} {size}"
    index = str(size * (size - 1) // 2)
    buffers = tuple(Weight(f"{n}.oft_R.{name}", index, "buffer", "int64", trains=False) for name in ("rows", "cols"))
    yield ops.cast(f"{n}.cast", x, inner, layer.x_shape, layer.dtype)
    yield Op(f"{n}.oft_R.indices", weights=buffers, gradient="none")
    yield Op(f"{n}.oft_R.index_put", (), (Tensor(f"{p}.upper", each),), (w,), source=f"{ops.DERIVATIVES}: index_put_")
    skew = f"{p}.skew"
    yield Op(f"{n}.oft_R.skew", (f"{p}.upper",), (Tensor(skew, each),), source=f"{ops.DERIVATIVES}: sub.Tensor")
    rotation = f"{p}.rotation"
    yield from _cayley(layer, skew, rotation, each)
    turned = rotation
    if o["block_share"]:
        turned = f"{p}.rotations"
        yield ops.copy(f"{n}.oft_R.repeat", rotation, turned, f"{blocks} {size} {size}", "new")
    source = f"{ops.DERIVATIVES}: bmm, for torch.einsum"
    yield ops.view(f"{n}.oft_R.blocks", inner, f"{p}.blocks", layer.x_shape, "new")
    yield layer.product("oft_R", f"{p}.blocks", turned, f"{p}.turned", layer.x_shape, source)
    yield ops.copy(f"{n}.oft_R.reshape", f"{p}.turned", f"{p}.rotated", layer.x_shape)
    yield ops.release_names(inner, f"{p}.turned", rotation, turned)
    yield ops.cast(f"{n}.cast_back", f"{p}.rotated", f"{p}.input", layer.x_shape, f"={x}")
    yield from layer.base(f"{p}.input", p)
    yield ops.release_names(x, f"{p}.rotated", f"{p}.input")


def _cayley(layer: Wrapped, skew: str, rotation: str, each: str) -> Iterator[Op]:
    """The Cayley transform of skew-symmetric matrices: a few terms of its Neumann series, summed in place."""
    p, n, terms = layer.y, layer.name, int(layer.options["num_cayley_neumann_terms"])
    sums: list[str] = []
    if terms > 1:
        sums.append(skew)
    power = skew
    if terms > 2:
        if layer.autocast:  # which casts each factor of the square, and caches neither
            power = f"{p}.skew.cast"
            yield ops.cast(f"{n}.oft_R.cast", skew, power, each, layer.compute)
        for i in range(max(terms - 2, 2)):
            new = f"{p}.power{i}"
            yield ops.matmul(f"{n}.oft_R.power{i}", power, skew, new, each)
            sums.append(new)
            power = new
    yield Op(f"{n}.oft_R.sum", tuple(sums), (Tensor(rotation, each),), gradient="same", source="add_")
    yield ops.release_names(*sums)


def nearest_divisor(features: int, wanted: int) -> int:
    """Return the divisor of `features` that is nearest to `wanted`, the smaller of two.

    Source: peft 0.21.2 tuners/oft/layer.py adjust_oft_parameters.

    >>> nearest_divisor(96, 32), nearest_divisor(100, 32), nearest_divisor(100, 23)
    (32, 25, 25)
    """
    if wanted >= features:
        return features
    higher = next(n for n in range(wanted, features + 1) if features % n == 0)
    lower = next(n for n in range(wanted, 0, -1) if features % n == 0)
    return lower if wanted - lower <= higher - wanted else higher


def boft(layer: Wrapped) -> Iterator[Op]:
    """BOFT: the input times a matrix of orthogonal blocks as wide as the input, the result times a learned vector."""
    p, n, x = layer.y, layer.name, layer.x
    o, columns = layer.options, layer.columns
    size = int(o["boft_block_size"]) or columns // int(o["boft_block_num"])
    number, square = columns // size, f"{columns} {columns}"
    blocks = f"{number} {size} {size}"
    r, s = layer.weight("boft_R", f"1 {blocks}", 2), layer.weight("boft_s", f"{layer.out} 1", len(layer.out.split()))
    source = "peft 0.21.2 tuners/boft/layer.py Linear.forward"
    # peft leaves it on the host, except around an 8-bit layer, with which it moves the whole module
    moved = layer.moved or (layer.is_bitsandbytes and not layer.is_4bit)
    permutation = Weight(f"{n}.boft_P", f"1 {square}", "buffer", "fp32", trains=False)
    yield Op(
        f"{n}.eye",
        (),
        (Tensor(f"{p}.eye", square, f"={x}"), Tensor(f"{p}.ones", f"{layer.out} 1", f"={x}")),
        gradient="none",
    )
    yield Op(f"{n}.less", (), (Tensor(f"{p}.less", blocks),), (r,), source=f"{ops.DERIVATIVES}: sub.Tensor")
    yield ops.scale(f"{n}.half", f"{p}.less", f"{p}.skew", blocks)
    yield Op(f"{n}.identity", (), (Tensor(f"{p}.id", f"{size} {size}", "fp32"),), gradient="none")
    for sign in ("plus", "minus"):
        yield ops.add_number(f"{n}.{sign}", f"{p}.skew", f"{p}.{sign}", blocks)._replace(
            writes=(Tensor(f"{p}.{sign}", blocks, "fp32"),)
        )
    yield Op(
        f"{n}.solve",
        (f"{p}.plus", f"{p}.minus"),
        (
            Tensor(f"{p}.q", blocks),
            Tensor(f"{p}.lu", blocks, f"={p}.plus"),
            Tensor(f"{p}.pivots", f"{number} {size}", "int32"),
        ),
        (),
        tuple(
            Keep(what, of)
            for of in (f"{p}.plus", f"{p}.minus")
            for what in (f"{p}.plus", f"{p}.q", f"{p}.lu", f"{p}.pivots")
        ),
        source=f"{ops.DERIVATIVES}: _linalg_solve_ex",
    )
    yield ops.release_names(f"{p}.id", f"{p}.skew")
    yield ops.cast(f"{n}.cast_rotation", f"{p}.q", f"{p}.blocks", blocks, layer.dtype)
    yield Op(
        f"{n}.block_diag", (f"{p}.blocks",), (Tensor(f"{p}.diagonal", square),), source=f"{ops.DERIVATIVES}: block_diag"
    )
    yield Op(
        f"{n}.permutation",
        (),
        (Tensor(f"{p}.permutation", square, f"={x}"),),
        (permutation,) if moved else (),
        cast=moved,
        gradient="none",
    )
    yield ops.cast(f"{n}.cast", f"{p}.diagonal", f"{p}.d", square, f"={x}")
    yield ops.release_names(f"{p}.diagonal")
    yield layer.product("bmm", f"{p}.d", f"{p}.permutation", f"{p}.dp", square, source)
    yield layer.product("permute", f"{p}.dp", f"{p}.permutation", f"{p}.pdp", square, source)
    yield layer.product("rotate", f"{p}.pdp", f"{p}.eye", f"{p}.rotation", square, source)
    yield Op(
        f"{n}.boft_s",
        (f"{p}.ones",),
        (Tensor(f"{p}.s", f"{layer.out} 1"),),
        (s,),
        (Keep(f"{p}.ones", s.name),),
        source=f"{ops.DERIVATIVES}: mul.Tensor",
    )
    yield ops.cast(f"{n}.rotation", f"{p}.rotation", f"{p}.turns", square, f"={x}")
    yield layer.product("rotated", x, f"{p}.turns", f"{p}.rotated", layer.x_shape, source)
    result = f"{p}.base"
    yield from layer.base(f"{p}.rotated", result)
    bias = tuple(v._replace(trains=False) for v in layer.op.weights if not v.matrix)
    if layer.is_4bit:  # whose first call has cast the bias
        bias = tuple(v._replace(dtype=layer.compute) for v in bias)
    if bias:
        yield Op(f"{n}.unbias", (result,), (Tensor(f"{p}.unbiased", layer.y_shape),), bias, gradient="same")
        result = f"{p}.unbiased"
    yield _times(f"{n}.scale", result, f"{p}.s", f"{p}.scaled", layer.y_shape)
    result = f"{p}.scaled"
    if bias:
        yield Op(f"{n}.bias", (result,), (Tensor(f"{p}.biased", layer.y_shape),), bias, gradient="same")
        result = f"{p}.biased"
    yield ops.cast(f"{n}.cast_back", result, p, layer.y_shape, f"={x}")
    live = ("turns", "rotated", "s", "ones", "d", "permutation", "pdp", "blocks")
    yield ops.release_names(x, *(f"{p}.{name}" for name in live))


LAYERS: dict[str, Callable[[Wrapped], Iterator[Op]]] = {
    "adalora": adalora,
    "boft": boft,
    "ia3": ia3,
    "loha": loha,
    "lokr": lokr,
    "oft": oft,
    "vera": vera,
}
# What all layers of a method share, before the first operation.
SHARED: dict[str, Callable[[tuple[Wrapped, ...], str], Op]] = {"vera": _shared_projections}


def features(shape: str, axes: Mapping[str, int]) -> int:
    """Return the size of some axes."""
    return prod(int(axis) if axis.isdigit() else axes[axis] for axis in shape.split())
