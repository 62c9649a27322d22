"""The layers of peft's HiRA, MiSS, RoAd, DeLoRA and C3A: parameters and operations, as in `peft_layers`.

Source: peft 0.21.2 tuners/*/layer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from memplan.catalogue.kernels import ops
from memplan.catalogue.methods.peft_layers import Wrapped, fold, part, plus_product
from memplan.catalogue.quantization.quantization import dequantise
from memplan.core.errors import UnknownNameError, refused
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight


def hira(layer: Wrapped) -> Iterator[Op]:
    """HiRA: the input times the frozen matrix that is multiplied, by elements, by a product of two small ones.

    bitsandbytes' matrices are dequantised for it; under autocast nothing is cast around them.
    """
    p, n, x = layer.y, layer.name, layer.x
    inner, product, result = x, f"{p}.ab", f"{p}.base"
    a = layer.weight("hira_A", f"r {layer.into}", 1)
    b = layer.weight("hira_B", f"{layer.out} r", len(layer.out.split()))
    w = layer.base_weight._replace(trains=False)
    frozen = (w,)
    if layer.is_bitsandbytes and not layer.is_4bit:
        yield _dequantised(layer)
    yield from layer.base(x, result)
    if layer.is_4bit:
        yield ops.copy(f"{n}.clone", result, f"{p}.clone", layer.y_shape)
        yield ops.release_names(result)
        result = f"{p}.clone"
        yield _dequantised(layer)
    if layer.is_bitsandbytes:
        frozen = ()
    casts = not (layer.is_bitsandbytes and layer.autocast)
    if not layer.is_bitsandbytes:
        yield fold(f"{n}.hira_AB", a, b, product, layer.matrix)
    if casts:
        inner = f"{p}.x"
        yield ops.cast(f"{n}.cast", x, inner, layer.x_shape, layer.dtype)
    dropped, drops = layer.dropped(inner, "hira_dropout")
    yield from drops
    if layer.is_bitsandbytes:
        yield fold(f"{n}.hira_AB", a, b, product, layer.matrix)
    matrix = w.name if frozen else f"{p}.dequantised"
    yield Op(
        f"{n}.scale",
        (product,) if frozen else (matrix, product),
        (Tensor(f"{p}.scaled", layer.matrix),),
        frozen,
        (Keep(matrix, product),),
        source=f"{ops.DERIVATIVES}: mul.Tensor",
    )
    yield layer.product("hira", dropped, f"{p}.scaled", f"{p}.delta", layer.y_shape)
    delta = f"{p}.delta"
    if layer.is_bitsandbytes and casts:
        delta = f"{p}.delta.cast"
        yield ops.cast(f"{n}.cast_delta", f"{p}.delta", delta, layer.y_shape, f"={result}")
    if frozen:
        yield ops.release_names(f"{p}.scaled")
    yield ops.add(f"{n}.add", result, delta, f"{p}.sum", layer.y_shape)
    yield ops.cast(f"{n}.cast_back", f"{p}.sum", p, layer.y_shape, f"={result}" if casts else f"={p}.sum")
    yield ops.release_names(x, inner, dropped, product, delta, *(() if frozen else (matrix, f"{p}.scaled")))


def _dequantised(layer: Wrapped) -> Op:
    """The frozen matrix of a layer of bitsandbytes in the dtype that it had before, or in fp32 from 8 bits."""
    y = f"{layer.y}.dequantised"
    if layer.is_4bit:
        return dequantise(layer.base_weight, f"{layer.name}.dequantise", y, layer.matrix)
    tensor = Tensor(y, layer.matrix, "fp32")
    return Op(f"{layer.name}.dequantise", (), (tensor,), (layer.base_weight,), gradient="none")


def miss(layer: Wrapped) -> Iterator[Op]:
    """MiSS: groups of r features of the input, summed, times one matrix of r rows."""
    p, n, x, rank = layer.y, layer.name, layer.x, layer.rank
    result = f"{p}.base"
    yield from layer.base(x, result)
    if layer.is_4bit:
        yield ops.copy(f"{n}.clone", result, f"{p}.clone", layer.y_shape)
        yield ops.release_names(result)
        result = f"{p}.clone"
    given, shape = x, layer.x_shape
    if layer.columns % rank:
        given, shape = f"{p}.padded", f"{layer.lead} {-(-layer.columns // rank) * rank}"
        yield ops.copy(f"{n}.pad", x, given, shape, "new")
    inner, low = f"{p}.x", f"{layer.lead} {rank}"
    yield ops.cast(f"{n}.cast", given, inner, shape, layer.dtype)
    dropped = inner
    if layer.dropout:
        dropped = f"{p}.dropped"
        yield ops.dropout(f"{n}.miss_dropout", inner, dropped, shape)
    yield Op(f"{n}.sum", (dropped,), (Tensor(f"{p}.low", low),), gradient="new", source=f"{ops.DERIVATIVES}: sum.dim")
    w = layer.weight("miss_block", f"{rank} {layer.out}", 1)
    yield layer.product("miss", f"{p}.low", w, f"{p}.delta", layer.y_shape)
    yield ops.add(f"{n}.add", result, f"{p}.delta", f"{p}.sum", layer.y_shape)
    yield ops.cast(f"{n}.cast_back", f"{p}.sum", p, layer.y_shape, f"={x}")
    yield ops.release_names(x, inner)


# Numbers of each variant's parameters for every two output features.
_ROAD = {"road_1": 1, "road_2": 2, "road_4": 4}


def road(layer: Wrapped) -> Iterator[Op]:
    """RoAd: pairs of the output's features, rotated and scaled."""
    p, n, x = layer.y, layer.name, layer.x
    variant, shape, y, out = str(layer.options["variant"]), layer.y_shape, f"{p}.y", str(layer.rows)
    if variant not in _ROAD:
        raise UnknownNameError("method.options.variant", variant, tuple(_ROAD))
    divides("group_size", int(layer.options["group_size"]), layer, layer.rows)
    theta, alpha = (layer.weight(f"road_{name}", str(layer.rows // 2 * _ROAD[variant])) for name in ("theta", "alpha"))
    casts = not (layer.is_bitsandbytes and layer.autocast)
    yield from layer.base(x, f"{p}.base")
    if casts:
        yield ops.cast(f"{n}.cast", f"{p}.base", y, shape, layer.dtype)
    else:
        y = f"{p}.base"
    given: list[str | Weight] = [theta, alpha]
    if variant != "road_2":  # which has a parameter for each feature
        given = [f"{p}.theta", f"{p}.alpha"]
        for name, w in (("theta", theta), ("alpha", alpha)):
            tensor = Tensor(f"{p}.{name}", out)
            yield Op(f"{n}.{name}", (), (tensor,), (w,), source=f"{ops.DERIVATIVES}: repeat_interleave, flatten")
    angles, scales = given
    for function in ("cos", "sin"):
        of, column = f"{p}.{function}", f"{p}.{function}.column"
        yield _small(f"{n}.{function}", (angles,), of, out, ((0, 0),))
        yield _small(f"{n}.{function}.scale", (scales, of), column, out, ((0, 1), (1, 0)))
    yield ops.rotate_half(f"{n}.rotate", y, f"{p}.rotated", shape, f"{layer.lead} {layer.rows // 2}")
    for name, tensor in (("cos", y), ("sin", f"{p}.rotated")):
        yield ops.spread(f"{n}.{name}.product", tensor, f"{p}.{name}.column", f"{p}.{name}.part", shape, summed=True)
    yield ops.add(f"{n}.add", f"{p}.cos.part", f"{p}.sin.part", f"{p}.turned", shape)
    yield ops.release_names(y, f"{p}.rotated", f"{p}.cos.column", f"{p}.sin.column")
    like = f"{p}.turned" if layer.is_bitsandbytes else f"{p}.base"
    yield ops.cast(f"{n}.cast_back", f"{p}.turned", p, shape, f"={like}")
    yield ops.release_names(x, f"{p}.turned")


def _small(name: str, inputs: tuple[str | Weight, ...], y: str, shape: str, keeps: tuple[tuple[int, int], ...]) -> Op:
    """Return an operation of tensors and parameters that keeps an input for another's gradient, by their positions."""
    names = [t if isinstance(t, str) else t.name for t in inputs]
    return Op(
        name,
        tuple(t for t in inputs if isinstance(t, str)),
        (Tensor(y, shape),),
        tuple(t for t in inputs if isinstance(t, Weight)),
        tuple(Keep(names[what], names[of]) for what, of in keeps),
        source=f"{ops.DERIVATIVES}: cos, sin, mul.Tensor",
    )


def divides(setting: str, size: int, layer: Wrapped, *features: int) -> None:
    """Raise SpecError if the size does not divide a number of the layer's features."""
    for number in features:
        if size < 1 or number % size:
            raise refused(f"method.options.{setting}", f"{size} does not divide the {number} features of {layer.name}")


def delora(layer: Wrapped) -> Iterator[Op]:
    """DeLoRA: LoRA of the normalised input, with a factor for each rank that normalises both matrices."""
    p, n, x = layer.y, layer.name, layer.x
    a = layer.weight("delora_A", f"r {layer.into}", 1)
    b = layer.weight("delora_B", f"{layer.out} r", len(layer.out.split()))
    bound = layer.weight("delora_lambda", "1")
    norms = Weight(f"{n}.delora_w_norm", layer.into, "buffer", layer.dtype, trains=False)
    low = f"{layer.lead} r"
    yield from layer.base(x, f"{p}.base")
    yield Op(f"{n}.zeros", (), (Tensor(f"{p}.zeros", layer.y_shape, f"={p}.base"),), gradient="none")
    yield Op(f"{n}.norms", (x,), (Tensor(f"{p}.normed", layer.x_shape),), (norms,), (Keep(norms.name, x),))
    yield layer.product("delora_A", f"{p}.normed", a, f"{p}.a", low)
    for name, w in (("A", a), ("B", b)):
        norm = f"{p}.{name}.norm"
        yield Op(f"{n}.{name}.norm", (), (Tensor(norm, "r"),), (w,), (Keep(w.name, w.name), Keep(norm, w.name)))
        yield Op(f"{n}.{name}.clamp", (norm,), (Tensor(f"{p}.{name}.n", "r"),), (), (Keep(norm, norm),))
    yield ops.mul(f"{n}.norm_product", f"{p}.A.n", f"{p}.B.n", f"{p}.n", "r")
    yield Op(f"{n}.bound", (), (Tensor(f"{p}.bound", "1"),), (bound,), source=f"{ops.DERIVATIVES}: div.Scalar")
    yield ops.divide(f"{n}.factor", f"{p}.bound", f"{p}.n", f"{p}.factor", "r")
    yield ops.release_names(f"{p}.A.n", f"{p}.B.n")
    yield ops.spread(f"{n}.scale", f"{p}.a", f"{p}.factor", f"{p}.scaled", low, summed=True)
    yield layer.product("delora_B", f"{p}.scaled", b, f"{p}.b", layer.y_shape)
    yield ops.add(f"{n}.add_to_zeros", f"{p}.zeros", f"{p}.b", f"{p}.update", layer.y_shape)._replace(view=True)
    yield ops.cast(f"{n}.cast", f"{p}.update", f"{p}.delta", layer.y_shape, f"={p}.base")
    yield ops.add(f"{n}.add", f"{p}.base", f"{p}.delta", f"{p}.sum", layer.y_shape)
    yield ops.cast(f"{n}.cast_back", f"{p}.sum", p, layer.y_shape, f"={x}")
    yield ops.release_names(x, f"{p}.base", f"{p}.update", f"{p}.b", f"{p}.factor")


def c3a(layer: Wrapped) -> Iterator[Op]:
    """C3A: circular convolutions of blocks of the input, computed by Fourier transforms in one autograd function."""
    p, n, x = layer.y, layer.name, layer.x
    size = int(layer.options["block_size"])
    kernel = f"{layer.rows // size} {layer.columns // size} {size}"
    divides("block_size", size, layer, layer.rows, layer.columns)
    w = layer.weight("c3a_kernel", kernel, 2)
    cast = f"{p}.kernel" if w.dtype != "fp32" else w.name
    inner, spectrum = f"{p}.x", f"{layer.lead} 2 {layer.out}"
    yield from layer.base(x, f"{p}.base")
    yield ops.cast(f"{n}.cast", x, inner, layer.x_shape, "fp32")
    if w.dtype != "fp32":
        yield Op(f"{n}.kernel.to", (), (Tensor(cast, kernel, "fp32"),), (w,), cast=True)
    yield Op(
        f"{n}.c3a",
        (inner,) if cast == w.name else (inner, cast),
        (Tensor(f"{p}.real", spectrum, "fp32"),),
        (w,) if cast == w.name else (),
        tuple(Keep(what, of) for what in (inner, cast) for of in (inner, cast)),
        scratch=(
            Tensor("spectrum of the input", f"{layer.lead} 2 {layer.into}", "fp32"),
            Tensor("spectrum of the kernel", f"2 {kernel}", "fp32"),
            Tensor("product", spectrum, "fp32"),
        ),
        scratch_back=(
            Scratch(Tensor("spectrum of the gradient", spectrum, "fp32")),
            Scratch(Tensor("product", f"{layer.lead} 2 {layer.into}", "fp32")),
        ),
        source="peft 0.21.2 tuners/c3a/utils.py BlockCircularConvolution",
    )
    yield ops.scale(f"{n}.scale", f"{p}.real", f"{p}.delta32", layer.y_shape)
    yield ops.release_names(f"{p}.real", inner, *((cast,) if cast != w.name else ()))
    yield ops.cast(f"{n}.to", f"{p}.delta32", f"{p}.delta", layer.y_shape, f"={p}.base")
    add = ops.add(f"{n}.add", f"{p}.base", f"{p}.delta", f"{p}.sum", layer.y_shape)
    yield add._replace(view=True, writes=(Tensor(f"{p}.sum", layer.y_shape, f"={p}.base"),))
    yield ops.cast(f"{n}.cast_back", f"{p}.sum", p, layer.y_shape, f"={x}")
    yield ops.release_names(x, f"{p}.delta32")


def fourierft(layer: Wrapped) -> Iterator[Op]:
    """FourierFT: a dense update whose spectrum has a few trained entries."""
    p, n, full = layer.y, layer.name, layer.matrix
    number = int(layer.options["n_frequency"])
    if not 0 < number <= layer.rows * layer.columns:
        raise refused("method.options.n_frequency", f"{number} is not among the {layer.rows * layer.columns} of {n}")
    w = layer.weight("fourierft_spectrum", str(number))
    dense, indices, spectrum = f"{p}.dense", f"{p}.indices", f"2 {full}"
    source = "peft 0.21.2 tuners/fourierft/layer.py FourierFTLayer.get_delta_weight"
    yield from layer.base(layer.x, f"{p}.base")
    yield Op(f"{n}.indices", (), (Tensor(indices, f"2 {number}", "int64"),), gradient="none", source=source)
    yield Op(f"{n}.zeros", (), (Tensor(dense, full, "fp32"),), gradient="none", source=source)
    yield Op(
        f"{n}.ifft2",
        (dense,),
        (Tensor(f"{p}.spectrum", spectrum, "fp32"),),
        (w,),
        (Keep(indices, w.name),),
        scratch=(Tensor("complex copy", spectrum, "fp32"),),
        scratch_back=(Scratch(Tensor("gradient of the spectrum", spectrum, "fp32"), w.name),),
        source=source,
    )
    yield Op(
        f"{n}.scale",
        (f"{p}.spectrum",),
        (Tensor(f"{p}.matrix32", full, "fp32"),),
        scratch_back=(Scratch(Tensor("scaled gradient", full, "fp32")),),
        source=source,
    )
    yield ops.cast(f"{n}.to", f"{p}.matrix32", f"{p}.matrix", full, layer.dtype)
    yield ops.release_names(dense, indices, f"{p}.matrix32")
    yield from plus_product(layer, f"{p}.matrix")


def randlora(layer: Wrapped) -> Iterator[Op]:
    """RandLora: an update of full rank from random bases that all layers share, scaled by learned numbers."""
    p, n, x = layer.y, layer.name, layer.x
    small, large, bases = min(layer.rows, layer.columns), max(layer.rows, layer.columns), _bases(layer)
    number = layer.rank * bases
    scale, gamma = (
        layer.weight("randlora_lambda", f"{layer.rank} {bases}", 1),
        layer.weight("randlora_gamma", f"{bases} {small}", 1),
    )
    shape_b, low = f"{large} {number}", f"{layer.lead} {number}"
    yield from layer.base(x, f"{p}.base")
    b = "randlora_B"
    yield Op(
        f"{n}.scaled_bases",
        (),
        (Tensor(f"{p}.A", f"{number} {small}"),),
        (scale, gamma),
        scratch=(Tensor("product with lambda", f"{number} {small}", layer.dtype),),
        source="peft 0.21.2 tuners/randlora/layer.py UniqueBaseGrad",
    )
    inner = f"{p}.x"
    yield ops.cast(f"{n}.cast", x, inner, layer.x_shape, layer.dtype)
    dropped, drops = layer.dropped(inner, "randlora_dropout")
    yield from drops
    used = b
    if layer.autocast:
        used = f"{p}.B.cast"
        yield part(f"{n}.randlora_B.cast", b, used, shape_b, layer.compute)
    first, second = (f"{p}.A", used) if small == layer.columns else (used, f"{p}.A")
    yield layer.product("first", dropped, first, f"{p}.low", low)
    yield layer.product("second", f"{p}.low", second, f"{p}.b", layer.y_shape)
    yield ops.scale(f"{n}.scaling", f"{p}.b", f"{p}.delta", layer.y_shape)
    yield ops.add(f"{n}.add", f"{p}.base", f"{p}.delta", f"{p}.sum", layer.y_shape)
    yield ops.cast(f"{n}.cast_back", f"{p}.sum", p, layer.y_shape, f"={x}")
    yield ops.release_names(x, inner, f"{p}.A")


def _bases(layer: Wrapped) -> int:
    """Number of bases of which each has the layer's rank, so that together they have full rank."""
    return -(-min(layer.rows, layer.columns) // layer.rank)


def shared_bases(layers: tuple[Wrapped, ...], dtype: str) -> Op:
    """RandLora's bases, as large as the largest layer needs."""
    rows, columns = (max(getattr(layer, side) for layer in layers) for side in ("rows", "columns"))
    small, large, rank = min(rows, columns), max(rows, columns), layers[0].rank
    shapes = (("randlora_A", f"{rank} 1 {small}"), ("randlora_B", f"{large} {-(-small // rank)} {rank}"))
    return Op(
        "randlora", weights=tuple(Weight(n, s, "buffer", dtype, trains=False) for n, s in shapes), gradient="none"
    )


# What all layers of a method share, as `SHARED` of `peft_layers`.
SHARED_BASES: dict[str, Callable[[tuple[Wrapped, ...], str], Op]] = {"randlora": shared_bases}
UPDATES: dict[str, Callable[[Wrapped], Iterator[Op]]] = {
    "c3a": c3a,
    "delora": delora,
    "fourierft": fourierft,
    "hira": hira,
    "miss": miss,
    "randlora": randlora,
    "road": road,
}
