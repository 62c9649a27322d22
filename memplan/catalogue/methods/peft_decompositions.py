"""The layers of peft's methods that decompose the frozen matrix, as in `peft_formulas`.

Source: peft 0.21.2 tuners/*/layer.py.
"""

from __future__ import annotations

from memplan.catalogue.kernels import ops
from memplan.catalogue.methods.formula import Factor, Formula, count, word
from memplan.catalogue.methods.peft_layers import Wrapped
from memplan.core.errors import refused
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight


def adamss(layer: Wrapped) -> list[Op]:
    """AdaMSS: low-rank updates of clusters of the output's features, from the input along frozen singular vectors.

    The clusters are those of the weights' values; their sizes, which add up to the features, are taken to be equal.
    """
    f, o, dtype = Formula(layer), layer.options, layer.base_weight.dtype
    number = min(count(layer, "num_subspaces"), layer.rows)
    has_bias = any(not w.matrix for w in layer.op.weights)
    columns = layer.columns + has_bias
    rank = min(layer.rank, layer.rows, columns)
    vectors = Weight(f"{layer.name}.adamss_newB", f"{rank} {columns}", "buffer", layer.dtype, trains=False)
    wide, _ = f.input(dtype, dropout=False)
    x = wide
    if has_bias:
        ones = f.call("ones", shape=f"{layer.lead} 1", dtype=dtype, gradient="none")
        x = f.call("with_ones", wide, ones, shape=f"{layer.lead} {columns}", gradient="part")
    base = f.base()
    low = f.fixed("projected", x, f.cast(vectors, dtype, "newB"), f"{layer.lead} {rank}")
    chunks: list[str] = []
    for i in range(number):
        size = layer.rows // number + (i < layer.rows % number)
        r = min(int(o["subspace_rank"]), size)
        a = f.cast(layer.weight(f"adamss_A.{i}", f"{r} {rank}", 1), dtype, f"A{i}")
        b = f.cast(layer.weight(f"adamss_B.{i}", f"{size} {r}", 1), dtype, f"B{i}")
        inner = f.product(f"low{i}", low, a, f"{layer.lead} {r}", gradient="view")
        chunks.append(f.product(f"out{i}", inner, b, f"{layer.lead} {size}", gradient="view"))
    joined = f.call("joined", *chunks, shape=layer.y_shape, gradient="part")
    index = f.call("index", shape=layer.out, dtype="int64", gradient="none")
    zeros = (Tensor("zeros", layer.y_shape, dtype),)
    delta = f.call("scattered", joined, index, keeps=((1, 0),), scratch=zeros)
    return f.result(f.plus("sum", base, delta), layer.x, wide, x, low, *chunks, index, delta)


def frod(layer: Wrapped) -> list[Op]:
    """FRoD: the frozen matrix as a product of factors, of which the diagonal and a sparse matrix in the middle train.

    The layer itself only runs next to dropout. The factors that layers of one name share wait on the host until the
    Trainer moves the model, and each pass copies them. Halves are multiplied by a dense copy of the sparse matrix.
    """
    f, square, x = Formula(layer), f"{layer.columns} {layer.columns}", layer.x
    rate = float(layer.options["sparse_rate"])
    most = layer.columns * (layer.columns - 1)
    number = max(min(int(layer.columns**2 * rate), most), int(rate > 0 and most > 0))
    values, diagonal = layer.weight("frod_lambda_s_values", str(number)), layer.weight("frod_lambda_l", layer.into)
    v, indices = _frod_names(layer)
    f.shapes |= {v: square, indices: f"2 {number}"}
    frozen = tuple(w._replace(trains=False) for w in layer.op.weights)
    dtype = layer.base_weight.dtype
    if layer.dropout:
        base = f.base()
    else:
        base = ""
        f.operations.append(Op(f"{layer.name}.base_layer", weights=frozen, gradient="none"))
    left = f.cast(Weight(f"{layer.name}.frod_U", layer.matrix, "buffer", dtype, trains=False), f"={x}", "U")
    if layer.moved:
        right = f.cast(v, f"={x}", "V")
    else:
        right = f.call("V", shape=square, dtype=f"={x}", gradient="none")
        indices = f.call("indices", shape=f.shapes[indices], dtype="int64", gradient="none")
    order = tuple(Tensor(name, str(number), "int64") for name in ("flat indices", "their order", "offsets"))
    entries = f.call("entries", f.cast(values, f"={x}", "values"), indices, scratch=order, keeps=((0, 0), (1, 0)))
    places = f.call("places", indices, gradient="none")
    scales = f.cast(diagonal, f"={x}", "lambda")
    dropped = x
    if layer.dropout:
        dropped = f"{layer.y}.dropped"
        f.operations.append(ops.dropout(f"{layer.name}.dropout", x, dropped, layer.x_shape))
        f.shapes[dropped] = layer.x_shape
    z = f.fixed("z", dropped, right, layer.x_shape)
    if dtype == "fp32" and not layer.autocast:
        full = (Scratch(Tensor("gradient", square, dtype), entries),)
        keeps = ((1, 0), (2, 0), (0, 1), (1, 1), (2, 1))
        mixed = f.call("mixed", z, entries, places, keeps=keeps, scratch_back=full, product="matrix")
    else:
        mixed = f.product("mixed", z, f.call("S", entries, places, shape=square, keeps=((0, 0), (1, 0))), layer.x_shape)
    scaled = f.times("scaled", z, scales)
    out = f.fixed("out", f.plus("z_sum", mixed, scaled), left, layer.y_shape)
    total = out
    bias = next((w for w in frozen if not w.matrix), None)
    if layer.dropout:
        again = f.call("again", dropped, frozen[0], shape=layer.y_shape, keeps=((1, 0),), autocast="lower")
        total = f.minus("difference", f.plus("sum", base, out), again)
    elif bias is not None:
        total = f.plus("sum", out, bias)
    return f.result(total, x, left, right, entries, places, scales, dropped, z, mixed, scaled, out)


def _frod_names(layer: Wrapped) -> tuple[str, str]:
    """Return the names of the factor and the indices that layers of one name share."""
    category = ".".join(layer.name.split(".")[-2:])
    return f"frod_V.{category}", f"frod_s_indices.{category}"


def shared_factors(layers: tuple[Wrapped, ...], _: str) -> Op:
    """FRoD's factors of each name of layers, if the Trainer has moved them."""
    weights: dict[str, Weight] = {}
    for layer in layers if layers[0].moved else ():
        (entries,) = (w for op in frod(layer) for w in op.weights if w.name.endswith("frod_lambda_s_values"))
        shapes = (f"{layer.columns} {layer.columns}", layer.base_weight.dtype), (f"2 {entries.shape}", "int64")
        for name, (shape, dtype) in zip(_frod_names(layer), shapes, strict=True):
            weights[name] = Weight(name, shape, "buffer", dtype, trains=False)
    return Op("frod", weights=tuple(weights.values()), gradient="none")


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


def psoft(layer: Wrapped) -> list[Op]:
    """PSOFT: an orthogonal matrix between the layer's principal singular vectors, which stay frozen."""
    f, o, low = Formula(layer), layer.options, f"{layer.lead} r"
    shapes, rank = {"psoft_A": f"r {layer.into}", "psoft_B": f"{layer.out} r"}, layer.rank
    whole = word(layer, "psoft_svd", "full", "lowrank") == "full"
    if word(layer, "ab_svd_init", "psoft_init", "pissa_init") == "psoft_init" and whole and not layer.moved:
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
