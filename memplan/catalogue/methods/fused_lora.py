"""LoRA as one autograd function over several layers: unsloth's, and copies of it.

q, k and v share one function, and so do the three layers of a gated MLP; the output projection has its own. Each base
matrix is dequantised, used and freed; adapter matrices are cast to the input's dtype for every product. Backward keeps
the input once for all layers and, with dropout, each adapter's dropped-out copy of it. unsloth writes the input's
gradient over the input. Axolotl writes it into a new tensor, and keeps the adapters as cast.
Source: unsloth 2025.1 and 2026.10 kernels/fast_lora.py, kernels/utils.py matmul_lora; axolotl 0.21 kernels/lora.py;
fms-acceleration-foak 0.7 fused_ops, for dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from memplan.catalogue.kernels import ops
from memplan.catalogue.methods.peft_layers import features
from memplan.catalogue.quantization.quantization import absmax, quantised_linear
from memplan.core.ir import Keep, Op, Scratch, Stack, Tensor, Weight
from memplan.core.records import NamedTuple

_QKV, _MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
_SWIGLU = "swiglu"


class LoraLibrary(NamedTuple):
    """How a library writes the functions.

    takes_bias        layers with a bias have such functions too; else they are left to peft
    adds_products     an adapter's product is added to the layer's, not multiplied into the sum
    has_buffer        matrices are dequantised into one buffer, without scales of their own
    keeps_casts       the adapters' casts to the dtype of the products are kept
    overwrites_input  the input's gradient is written over the input where it can be
    takes_dora        the functions have DoRA too; else its layers are left to peft
    owns_swiglu       the library fuses SwiGLU in these functions only
    adds_in_place     a layer's own product is separate, and added to the adapter's in place; only MLPs are functions
    """

    source: str
    takes_bias: bool = True
    adds_products: bool = False
    has_buffer: bool = False
    keeps_casts: bool = False
    overwrites_input: bool = True
    takes_dora: bool = False
    owns_swiglu: bool = False
    adds_in_place: bool = False


LIBRARIES = {
    "unsloth": LoraLibrary("unsloth 2025.1 kernels/fast_lora.py", adds_products=True),
    "unsloth-2026": LoraLibrary(
        "unsloth 2026.10.9 kernels/fast_lora.py", takes_bias=False, has_buffer=True, owns_swiglu=True
    ),
    "automodel": LoraLibrary(
        "nemo_automodel 0.7.0 components/_peft", overwrites_input=False, owns_swiglu=True, adds_in_place=True
    ),
    "axolotl": LoraLibrary("axolotl 0.21 kernels/lora.py", keeps_casts=True, overwrites_input=False, takes_dora=True),
}


class LoraFunctions(NamedTuple):
    """The functions of a run.

    compute  dtype of the products
    dropout  whether the adapters have dropout
    is_dora  whether they are DoRA's
    """

    library: LoraLibrary
    compute: str
    dropout: bool
    is_dora: bool = False


class FusedLayer(NamedTuple):
    """A frozen linear layer and its adapter.

    a, b  the adapter's matrices
    out   output axes of the base matrix
    into  input axes of the base matrix
    lead  the activations' leading axes
    """

    op: Op
    base: Weight
    a: Weight
    b: Weight
    out: str
    into: str
    lead: str


def fuse_lora(
    operations: tuple[Op, ...], takes: Callable[[Op], bool], dtype: str, how: LoraFunctions
) -> tuple[Op, ...]:
    """Return the operations with adapted layers replaced by fused functions wherever one exists.

    takes    whether an operation gets an adapter
    dtype    dtype of the adapters
    """
    modules: dict[str, dict[str, FusedLayer]] = {}
    for op in operations:
        has_bias = any(not w.rows for w in op.weights)
        if takes(op) and op.reads and (how.library.takes_bias or not has_bias):
            module, _, role = op.name.rpartition(".")
            modules.setdefault(module, {})[role] = _layer(op, dtype)
    written = {(op.unit, t.name) for op in operations for t in op.writes}
    separate = how.library.adds_in_place
    out: list[Op] = []
    for op in operations:
        module, _, role = op.name.rpartition(".")
        layers = modules.get(module, {})
        is_gated = _share_input(layers, _MLP[:-1]) and _MLP[-1] in layers
        is_gated = is_gated and (f"{_SWIGLU} {module}", layers[_MLP[-1]].op.reads[0]) in written  # not its dropout
        if separate and (
            how.dropout or any(layer.base.stored or len(layer.op.weights) > 1 for layer in layers.values())
        ):
            is_gated = False
        if separate and role in layers and not (is_gated and role in _MLP):
            out += _separate(layers[role], how)
        elif role in _QKV and _share_input(layers, _QKV):
            if role == _QKV[0]:
                out += _fused_qkv([layers[n] for n in _QKV], how)
        elif role == "o_proj" and role in layers:
            out += _fused_linear(layers[role], how)
        elif is_gated and (role in _MLP or op.unit == f"{_SWIGLU} {module}"):
            if role == _MLP[-1]:
                out += _fused_mlp([layers[n] for n in _MLP], how)
        else:
            out.append(op)
    return tuple(out)


def _share_input(layers: Mapping[str, FusedLayer], roles: Sequence[str]) -> bool:
    """Whether a module has a layer for every role, and all of them read the same tensor."""
    return all(role in layers for role in roles) and len({layers[role].op.reads for role in roles}) == 1


def _layer(op: Op, dtype: str) -> FusedLayer:
    base = next(w for w in op.weights if w.matrix)
    lead, out, into = ops.axes_of(op)
    a = Weight(f"{op.name}.lora_A.weight", f"r {into}", "adapter", dtype, matrix=True, rows=1)
    b = Weight(f"{op.name}.lora_B.weight", f"{out} r", "adapter", dtype, matrix=True, rows=len(out.split()))
    return FusedLayer(op, base, a, b, out, into, lead)


def _dequantised(layer: FusedLayer, how: LoraFunctions) -> tuple[Tensor, ...]:
    """The dequantised base matrix, and its scales if it has no buffer; empty if it is not quantised."""
    if not layer.base.stored:
        return ()
    scales = () if how.library.has_buffer else absmax(layer.base)
    return (*scales, Tensor("dequantised", layer.base.shape, how.compute))


def with_matrix_buffer(stack: Stack, how: LoraFunctions, axes: Mapping[str, int]) -> Stack:
    """Return the stack with the buffer in which matrices are dequantised, as large as the largest one."""
    listed = (block.ops for run in stack.runs for block in run.blocks)
    shapes = {
        w.shape for block in listed for op in block if op.source == how.library.source for w in op.weights if w.stored
    }
    if not shapes:
        return stack
    largest = max(shapes, key=lambda shape: features(shape, axes))
    buffer = Weight("buffer of dequantised matrices", largest, "buffer", how.compute, False)
    return stack._replace(before=(*stack.before, Op("dequantised", weights=(buffer,), gradient="none")))


def _dequantise_bases(
    layers: list[FusedLayer], how: LoraFunctions, made: Sequence[tuple[Tensor, ...]] = ()
) -> Iterator[Op]:
    """One operation per quantised base matrix: dequantised for its product, then freed.

    made  what the function has allocated by the end of each product; not counted if products are added
    """
    for layer, results in zip(layers, made or [()] * len(layers), strict=True):
        if layer.base.stored:
            matrix = () if how.library.has_buffer else _dequantised(layer, how)
            scratch = (*matrix, *(() if how.library.adds_products else results))
            (x,), source = layers[0].op.reads, how.library.source
            yield Op(f"{layer.op.name}.base_layer", (x,), scratch=scratch, gradient="none", source=source)


def _weights(layers: list[FusedLayer], how: LoraFunctions) -> tuple[Weight, ...]:
    return tuple(
        w
        for layer in layers
        for w in (*layer.op.weights, layer.a, layer.b, *(_magnitude(layer, how) if how.is_dora else ()))
    )


def _magnitude(layer: FusedLayer, how: LoraFunctions) -> tuple[Weight, Weight]:
    """DoRA's magnitudes, and the norms that are cached until the adapter changes."""
    n = layer.op.name
    norm = Weight(f"{n}.weight_norm", layer.out, "buffer", how.compute, trains=False)
    return Weight(f"{n}.lora_magnitude_vector.weight", layer.out, "adapter", layer.a.dtype), norm


def _combined(layers: list[FusedLayer], how: LoraFunctions) -> tuple[Tensor, ...]:
    """Each layer's output before it is scaled, and the scale, which DoRA's functions keep."""
    if not how.is_dora:
        return ()
    outputs = (layer.op.writes[0] for layer in layers)
    return tuple(
        t
        for y, layer in zip(outputs, layers, strict=True)
        for t in (Tensor(f"{y.name}.combined", y.shape, how.compute), Tensor(f"{y.name}.scale", layer.out, how.compute))
    )


def _dora_parts(layers: list[FusedLayer], how: LoraFunctions) -> tuple[Tensor, ...]:
    """The layer's and the adapter's outputs, which a function of DoRA holds until it returns."""
    return tuple(
        Tensor(part, layer.op.writes[0].shape, how.compute)
        for layer in (layers if how.is_dora else ())
        for part in ("output of the layer", "output of the adapter")
    )


def _keeps(of: tuple[str, ...], saved: tuple[str, ...], becomes: str = "") -> tuple[Keep, ...]:
    """Keep every `saved` tensor for the gradient of any `of`. The gradient of `becomes` is written over that tensor."""
    first = (Keep(becomes, becomes, is_gradient=True),) if becomes else ()
    return (*first, *(Keep(s, o) for o in of for s in saved))


def _products(layers: list[FusedLayer], how: LoraFunctions) -> tuple[Tensor, ...]:
    """Temporaries of a product with an adapter, which is added or multiplied into the sum."""
    first = layers[0]
    if how.library.adds_products:
        return (Tensor("product", first.op.writes[0].shape, how.compute),)
    return (Tensor("x times A", f"{first.lead} r", how.compute),)


def _backward_scratch(layers: list[FusedLayer], how: LoraFunctions) -> tuple[Scratch, ...]:
    """Temporaries of the input's gradient: products with adapters and, with dropout, a mask and the masked product."""
    first = layers[0]
    (x,), shape = first.op.reads, f"{first.lead} {first.into}"
    base = () if how.dropout else _dequantised(layers[-1], how)
    product: tuple[Tensor, ...] = (Tensor("product", shape, f"={x}"),)
    if not how.library.adds_products:
        product = tuple(Tensor("gradient times B", f"{first.lead} r", how.compute) for _ in layers)
    scaled = tuple(
        Tensor("scaled gradient", layer.op.writes[0].shape, how.compute) for layer in (layers if how.is_dora else ())
    )
    mask = (Tensor("mask", shape, "bool"), Tensor("masked product", shape, f"={x}")) if how.dropout else ()
    return tuple(Scratch(t) for t in (*product, *scaled, *mask, *base))


def _dropped(layer: FusedLayer) -> Tensor:
    return Tensor(f"{layer.op.writes[0].name}.dropped", f"{layer.lead} {layer.into}")


def _cast_adapters(layers: list[FusedLayer], compute: str) -> tuple[Tensor, ...]:
    """The adapters' matrices in the dtype of the products, which some libraries keep."""
    adapters = (w for layer in layers for w in (layer.a, layer.b))
    return tuple(Tensor(f"{w.name} in {compute}", w.shape, compute) for w in adapters if w.dtype != compute)


def _function(
    layers: list[FusedLayer],
    name: str,
    outputs: Sequence[Tensor],
    how: LoraFunctions,
    inner: tuple[Tensor, ...] = (),
    overwrites: bool = True,
) -> Op:
    """One function over layers that read the same input.

    inner       outputs that it keeps for its backward
    overwrites  the gradient of the input is written over the input, if the library does so
    """
    first, compute = layers[0], how.compute
    (x,) = first.op.reads
    dropped = tuple(_dropped(layer)._replace(dtype=f"={x}") for layer in layers) if how.dropout else ()
    cast = _cast_adapters(layers, compute) if how.library.keeps_casts else ()
    combined = _combined(layers, how)
    weights = _weights(layers, how)
    kept = (x, *(t.name for t in (*inner, *dropped, *cast, *combined)))
    targets = (x, *(w.name for w in weights if w.group == "adapter"))
    return Op(
        name,
        (x,),
        (*(y._replace(dtype=compute) for y in outputs), *inner, *dropped, *cast, *combined),
        weights,
        _keeps(targets, kept, x if overwrites and how.library.overwrites_input else ""),
        scratch=(*_products(layers, how), *_dora_parts(layers, how)),
        scratch_back=_backward_scratch(layers, how),
        product="matrix",
        source=how.library.source,
    )


def _fused_qkv(layers: list[FusedLayer], how: LoraFunctions) -> Iterator[Op]:
    """q, k and v in one function."""
    outputs = [layer.op.writes[0]._replace(dtype=how.compute) for layer in layers]
    yield from _dequantise_bases(layers, how, [tuple(outputs[: n + 1]) for n in range(len(outputs))])
    yield _function(layers, f"{layers[0].op.name.rpartition('.')[0]}.lora_qkv", outputs, how)


def _fused_linear(layer: FusedLayer, how: LoraFunctions) -> Iterator[Op]:
    op = layer.op
    yield from _dequantise_bases([layer], how, [tuple(y._replace(dtype=how.compute) for y in op.writes)])
    fused = _function([layer], op.name, op.writes, how, overwrites=False)
    yield fused._replace(gradient="view")


def _separate(layer: FusedLayer, how: LoraFunctions) -> Iterator[Op]:
    """A linear layer, and a function of its adapter that keeps only its input; their sum is written over the latter.

    Source: nemo_automodel 0.7.0 components/_peft/lora.py LinearLoRA.forward, LoRATritonFunction.
    """
    op, source = layer.op, how.library.source
    (x,), (y,) = op.reads, op.writes
    own, delta, products = f"{y.name}.base", f"{y.name}.delta", (f"{layer.lead} r", how.compute)
    base: tuple[Op, ...] = (op._replace(name=f"{op.name}.base_layer", writes=(y._replace(name=own),)),)
    if layer.base.stored:
        base = tuple(quantised_linear(op, f"{op.name}.base_layer", own, how.compute))
    for o in base:  # no longer a matrix that takes an adapter
        yield o._replace(weights=tuple(w._replace(matrix=False) for w in o.weights))
    yield Op(
        f"{op.name}.lora",
        (x,),
        (Tensor(delta, y.shape, f"={x}"),),
        (layer.a, layer.b),
        (*(Keep(x, w.name) for w in (layer.a, layer.b)), *(Keep(w.name, x) for w in (layer.a, layer.b))),
        scratch=(Tensor("x times A", *products), Tensor("scaled", *products)),
        scratch_back=(Scratch(Tensor("gradient times B", *products)), Scratch(Tensor("x times A", *products))),
        product="matrix",
        source=source,
    )
    if how.dropout:
        yield ops.dropout(f"{op.name}.lora_dropout", delta, f"{delta}.dropped", y.shape)
        yield ops.release_names(delta)
        delta = f"{delta}.dropped"
    added = ops.add(f"{op.name}.add", delta, own, y.name, y.shape)
    yield added._replace(view=True, source=source)
    yield ops.release_names(x, own, delta)


def _fused_mlp(layers: list[FusedLayer], how: LoraFunctions) -> Iterator[Op]:
    """A gated MLP in one function: it keeps its input, gate and up, and recomputes their product in backward."""
    gate, x = layers[0].op, layers[0].op.reads[0]
    shape = gate.writes[0].shape
    inner = tuple(Tensor(name, shape, how.compute) for name in ("gate", "up"))
    output, hidden = layers[-1].op.writes[0]._replace(dtype=how.compute), Tensor("hidden", shape, how.compute)
    name = f"{gate.name.rpartition('.')[0]}.lora_mlp"
    yield from _dequantise_bases(layers, how, [inner[:1], inner, (*inner, hidden, output)])
    fused = _function(layers, name, [output], how, inner)
    gradient = (Scratch(Tensor("gradient of product", shape, how.compute)),)
    if how.library.adds_in_place:
        gradient += (Scratch(Tensor("product", shape, how.compute), early=True),)
    yield fused._replace(
        scratch=(*fused.scratch, hidden),
        scratch_back=(*gradient, *fused.scratch_back),
    )
    yield ops.release_names(x)
