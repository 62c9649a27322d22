"""The layers of peft's newer methods, each written as its forward is: a formula of tensors and parameters.

Source: peft 0.21.2 tuners/*/layer.py.
"""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue.kernels import ops
from memplan.catalogue.methods.formula import Formula, word
from memplan.catalogue.methods.peft_decompositions import adamss, frod, osf, psoft, shared_factors, tinylora
from memplan.catalogue.methods.peft_layers import Wrapped, part
from memplan.catalogue.methods.peft_updates import divides
from memplan.catalogue.methods.xlora import xlora
from memplan.core.errors import refused
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight


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
    ab = word(layer, "config_A_B", "lora", "vector", "constant", "none")
    c = word(layer, "config_C", "lora", "vector", "none")
    de = word(layer, "config_D_E", "constant", "vector", "none")
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


def poly(layer: Wrapped) -> list[Op]:
    """Poly: LoRA whose matrices mix those of a few skills, by weights that a router draws for a sequence's task."""
    f, o = Formula(layer), layer.options
    splits, skills, tasks = (int(o[name]) for name in ("n_splits", "n_skills", "n_tasks"))
    divides("n_splits", splits, layer, layer.rows, layer.columns)
    f.by_sequence("poly")
    a = layer.weight("poly_lora_A", f"{splits} {skills} {layer.columns // splits} r", 3)
    b = layer.weight("poly_lora_B", f"{splits} {skills} r {layer.rows // splits}", 3)
    base = f.base()
    logits = layer.weight("poly_router.module_logits", f"{tasks} {splits * skills}", 1)
    chosen = f.call("chosen", logits, "tasks", shape=f"b {splits} {skills}", keeps=((1, 0),))
    chance = f.call("clamped", f.call("chance", chosen, keeps=((-1, 0),)), keeps=((0, 0),))
    noisy = f.call("noisy", chance, f.call("negative", chance), keeps=((0, 0), (1, 1)))
    drawn = f.call("clipped", f.call("drawn", noisy, keeps=((-1, 0),)), keeps=((0, 0),))
    total = f.call("total", drawn, shape=f"b {splits} 1")
    weights = f.call("weights", drawn, total, keeps=((1, 0), (0, 1), (1, 1)))
    halves: list[str] = []
    for half, w, shape in (("A", a, f"b {layer.into} r"), ("B", b, f"b r {layer.out}")):
        mixed = f.product(f"{half}.mixed", weights, w, shape)
        halves.append(f.call(half, mixed) if splits > 1 else mixed)
    x = f.cast(layer.x, f"={halves[0]}", "x")
    low = f.product("low", x, halves[0], f"{layer.lead} r")
    delta = f.scale("scaled", f.product("delta", low, halves[1], layer.y_shape))
    total = f.call("sum", base, delta, dtype=f"={base}", view=True, gradient="same")
    return f.result(total, layer.x, x, weights, *halves)


def _tasks(layers: tuple[Wrapped, ...], _: str) -> Op:
    """The task of each sequence, which all layers read."""
    return Op("tasks", (), (Tensor("tasks", "b", "int64"),), gradient="none", holds="forward")


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
    "frod": shared_factors,
    "lily": _shared_experts,
    "poly": _tasks,
    "pvera": _shared_distributions,
    "unilora": lambda layers, dtype: _shared("unilora_theta_d", layers, dtype, "theta_d_length"),
    "vblora": lambda layers, dtype: _shared("vblora_vector_bank", layers, dtype, "num_vectors", "vector_length"),
}
FORMULAS: dict[str, Callable[[Wrapped], list[Op]]] = {
    "adamss": adamss,
    "beft": beft,
    "deft": deft,
    "frod": frod,
    "glora": glora,
    "gralora": gralora,
    "hra": hra,
    "lily": lily,
    "osf": osf,
    "peanut": peanut,
    "poly": poly,
    "psoft": psoft,
    "pvera": pvera,
    "shira": shira,
    "supertuning": supertuning,
    "tinylora": tinylora,
    "unilora": unilora,
    "vblora": vblora,
    "waveft": waveft,
    "xlora": xlora,
}
