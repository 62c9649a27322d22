"""LoRA as one autograd function over several layers: unsloth's, and fms-acceleration's copy of it with dropout.

q, k and v share one function, and so do the three layers of a gated MLP; the output projection has its own. Each base
matrix is dequantised, used and freed; adapter matrices are cast to the input's dtype for every product. Backward keeps
the input once for all layers and, with dropout, each adapter's dropped-out copy of it.
Source: unsloth 2025.1 kernels/fast_lora.py, kernels/utils.py matmul_lora; fms-acceleration-foak 0.7 fused_ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from memplan.catalogue.kernels import ops
from memplan.catalogue.quantization.quantization import absmax
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight
from memplan.core.records import NamedTuple

_SOURCE = "unsloth 2025.1 kernels/fast_lora.py"
_QKV, _MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
_SWIGLU = "swiglu"


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
    operations: tuple[Op, ...], takes: Callable[[Op], bool], dtype: str, compute: str, dropout: bool
) -> tuple[Op, ...]:
    """Return the operations with adapted layers replaced by fused functions wherever one exists.

    takes    whether an operation gets an adapter
    dtype    dtype of the adapters
    compute  dtype of the products
    """
    modules: dict[str, dict[str, FusedLayer]] = {}
    for op in operations:
        if takes(op) and op.reads:
            module, _, role = op.name.rpartition(".")
            modules.setdefault(module, {})[role] = _layer(op, dtype)
    units = {op.unit for op in operations}
    out: list[Op] = []
    for op in operations:
        module, _, role = op.name.rpartition(".")
        layers = modules.get(module, {})
        is_gated = _share_input(layers, _MLP[:-1]) and _MLP[-1] in layers and f"{_SWIGLU} {module}" in units
        if role in _QKV and _share_input(layers, _QKV):
            if role == _QKV[0]:
                out += _fused_qkv([layers[n] for n in _QKV], compute, dropout)
        elif role == "o_proj" and role in layers:
            out += _fused_linear(layers[role], compute, dropout)
        elif is_gated and (role in _MLP or op.unit == f"{_SWIGLU} {module}"):
            if role == _MLP[-1]:
                out += _fused_mlp([layers[n] for n in _MLP], compute, dropout)
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


def _dequantised(layer: FusedLayer, compute: str) -> tuple[Tensor, ...]:
    """The dequantised base matrix and its scales; empty if the base is not quantised."""
    if not layer.base.stored:
        return ()
    return (*absmax(layer.base), Tensor("dequantised", layer.base.shape, compute))


def _dequantise_bases(layers: list[FusedLayer], x: str, compute: str) -> Iterator[Op]:
    """One operation per quantised base matrix: dequantised for its product, then freed."""
    for layer in layers:
        if layer.base.stored:
            scratch = _dequantised(layer, compute)
            yield Op(f"{layer.op.name}.base_layer", (x,), scratch=scratch, gradient="none", source=_SOURCE)


def _weights(layers: list[FusedLayer]) -> tuple[Weight, ...]:
    return tuple(w for layer in layers for w in (*layer.op.weights, layer.a, layer.b))


def _keeps(of: tuple[str, ...], saved: tuple[str, ...], becomes: str = "") -> tuple[Keep, ...]:
    """Keep every `saved` tensor for the gradient of any `of`. The gradient of `becomes` is written over that tensor."""
    first = (Keep(becomes, becomes, is_gradient=True),) if becomes else ()
    return (*first, *(Keep(s, o) for o in of for s in saved))


def _backward_scratch(x: str, shape: str, dropout: bool, layers: list[FusedLayer], compute: str) -> tuple[Scratch, ...]:
    """Temporaries of the input's gradient: a product and, with dropout, a mask and the masked product."""
    base = () if dropout else _dequantised(layers[-1], compute)
    product = (Tensor("product", shape, f"={x}"),)
    mask = (Tensor("mask", shape, "bool"), Tensor("masked product", shape, f"={x}")) if dropout else ()
    return tuple(Scratch(t) for t in (*product, *mask, *base))


def _dropped(layer: FusedLayer) -> Tensor:
    return Tensor(f"{layer.op.writes[0].name}.dropped", f"{layer.lead} {layer.into}")


def _function(
    layers: list[FusedLayer],
    name: str,
    outputs: Sequence[Tensor],
    compute: str,
    dropout: bool,
    inner: tuple[Tensor, ...] = (),
    overwrites: bool = True,
) -> Op:
    """One function over layers that read the same input.

    inner       outputs that it keeps for its backward
    overwrites  the gradient of the input is written over the input
    """
    first = layers[0]
    (x,) = first.op.reads
    dropped = tuple(_dropped(layer)._replace(dtype=f"={x}") for layer in layers) if dropout else ()
    kept = (x, *(t.name for t in (*inner, *dropped)))
    targets = (x, *(w.name for layer in layers for w in (layer.a, layer.b)))
    return Op(
        name,
        (x,),
        (*(y._replace(dtype=compute) for y in outputs), *inner, *dropped),
        _weights(layers),
        _keeps(targets, kept, x if overwrites else ""),
        scratch=(Tensor("product", first.op.writes[0].shape, compute),),
        scratch_back=_backward_scratch(x, f"{first.lead} {first.into}", dropout, layers, compute),
        product="matrix",
        source=_SOURCE,
    )


def _fused_qkv(layers: list[FusedLayer], compute: str, dropout: bool) -> Iterator[Op]:
    """q, k and v in one function."""
    yield from _dequantise_bases(layers, layers[0].op.reads[0], compute)
    name = f"{layers[0].op.name.rpartition('.')[0]}.lora_qkv"
    yield _function(layers, name, [layer.op.writes[0] for layer in layers], compute, dropout)


def _fused_linear(layer: FusedLayer, compute: str, dropout: bool) -> Iterator[Op]:
    op = layer.op
    yield from _dequantise_bases([layer], op.reads[0], compute)
    fused = _function([layer], op.name, op.writes, compute, dropout, overwrites=False)
    yield fused._replace(gradient="view")


def _fused_mlp(layers: list[FusedLayer], compute: str, dropout: bool) -> Iterator[Op]:
    """A gated MLP in one function: it keeps its input, gate and up, and recomputes their product in backward."""
    gate, x = layers[0].op, layers[0].op.reads[0]
    shape = gate.writes[0].shape
    inner = tuple(Tensor(name, shape, compute) for name in ("gate", "up"))
    name = f"{gate.name.rpartition('.')[0]}.lora_mlp"
    yield from _dequantise_bases(layers, x, compute)
    fused = _function(layers, name, [layers[-1].op.writes[0]], compute, dropout, inner)
    gradient = Scratch(Tensor("gradient of product", shape, compute))
    yield fused._replace(
        scratch=(*fused.scratch, Tensor("product of an adapter", shape, compute)),
        scratch_back=(gradient, *fused.scratch_back),
    )
    yield ops.release_names(x)
