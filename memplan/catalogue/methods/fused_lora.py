"""LoRA as one autograd function for several layers: unsloth's, and fms-acceleration's copy of it that knows dropout.

q, k and v are one function, and so is a gated MLP; the output projection is one alone. A base matrix is made whole,
used and let go; an adapter's matrices are cast to the input's dtype for every product. What is kept is the input, once
for all layers, and with dropout what each adapter saw of it.
Source: unsloth 2025.1 kernels/fast_lora.py, kernels/utils.py matmul_lora; fms-acceleration-foak 0.7 fused_ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from memplan.catalogue.kernels import ops
from memplan.catalogue.quantization.quantization import absmax
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight

_SOURCE = "unsloth 2025.1 kernels/fast_lora.py"
_QKV, _MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
_SWIGLU = "swiglu"


class Layer(NamedTuple):
    """A frozen linear layer and its adapter: `out` and `into` are the axes of its matrix, `lead` those of its rows."""

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
    """The operations with those layers joined that `takes` an adapter, of fp32 `dtype` or another, as one function can.

    `compute` is the dtype products come in.
    """
    modules: dict[str, dict[str, Layer]] = {}  # the adapted layers of each module
    for op in operations:
        if takes(op) and op.reads:
            module, _, role = op.name.rpartition(".")
            modules.setdefault(module, {})[role] = _layer(op, dtype)
    units = {op.unit for op in operations}
    out: list[Op] = []
    for op in operations:
        module, _, role = op.name.rpartition(".")
        layers = modules.get(module, {})
        gated = _of_one_input(layers, _MLP[:-1]) and _MLP[-1] in layers and f"{_SWIGLU} {module}" in units
        if role in _QKV and _of_one_input(layers, _QKV):
            if role == _QKV[0]:
                out += _together([layers[n] for n in _QKV], compute, dropout)
        elif role == "o_proj" and role in layers:
            out += _alone(layers[role], compute, dropout)
        elif gated and (role in _MLP or op.unit == f"{_SWIGLU} {module}"):
            if role == _MLP[-1]:
                out += _gated([layers[n] for n in _MLP], compute, dropout)
        else:
            out.append(op)
    return tuple(out)


def _of_one_input(layers: Mapping[str, Layer], roles: Sequence[str]) -> bool:
    """Whether a module has all of those layers, and they read the same tensor, as one function of it does."""
    return all(role in layers for role in roles) and len({layers[role].op.reads for role in roles}) == 1


def _layer(op: Op, dtype: str) -> Layer:
    base = next(w for w in op.weights if w.matrix)
    lead, out, into = ops.axes_of(op)
    a = Weight(f"{op.name}.lora_A.weight", f"r {into}", "adapter", dtype, matrix=True, rows=1)
    b = Weight(f"{op.name}.lora_B.weight", f"{out} r", "adapter", dtype, matrix=True, rows=len(out.split()))
    return Layer(op, base, a, b, out, into, lead)


def _whole(layer: Layer, compute: str) -> tuple[Tensor, ...]:
    """The base matrix made whole, with its scales; nothing where it is stored whole."""
    if not layer.base.stored:
        return ()
    return (*absmax(layer.base), Tensor("dequantised", layer.base.shape, compute))


def _forward(layers: list[Layer], x: str, compute: str) -> Iterator[Op]:
    """Each base matrix for its product."""
    for layer in layers:
        if layer.base.stored:
            yield Op(
                f"{layer.op.name}.base_layer", (x,), scratch=_whole(layer, compute), gradient="none", source=_SOURCE
            )


def _weights(layers: list[Layer]) -> tuple[Weight, ...]:
    return tuple(w for layer in layers for w in (*layer.op.weights, layer.a, layer.b))


def _keeps(of: tuple[str, ...], what: tuple[str, ...], becomes: str = "") -> tuple[Keep, ...]:
    """What the function keeps is kept for whichever gradient; that of `becomes` is written over it."""
    first = (Keep(becomes, becomes, becomes=True),) if becomes else ()
    return (*first, *(Keep(w, o) for o in of for w in what))


def _back(x: str, shape: str, masked: bool, layers: list[Layer], compute: str) -> tuple[Scratch, ...]:
    """What is added to the input's gradient: a product, and with dropout a mask and the product under it."""
    wide = tuple(t for t in _whole(layers[-1], compute)) if not masked else ()
    added = (Tensor("product", shape, f"={x}"),)
    mask = (Tensor("mask", shape, "bool"), Tensor("masked product", shape, f"={x}")) if masked else ()
    return tuple(Scratch(t) for t in (*added, *mask, *wide))


def _dropped(layer: Layer) -> Tensor:
    return Tensor(f"{layer.op.writes[0].name}.dropped", f"{layer.lead} {layer.into}")


def _together(layers: list[Layer], compute: str, dropout: bool) -> Iterator[Op]:
    """q, k and v: the gradient of their input is written over the input."""
    x = layers[0].op.reads[0]
    dropped = tuple(_dropped(layer)._replace(dtype=f"={x}") for layer in layers) if dropout else ()
    kept = (x, *(t.name for t in dropped))
    targets = (x, *(w.name for layer in layers for w in (layer.a, layer.b)))
    shape = f"{layers[0].lead} {layers[0].into}"
    yield from _forward(layers, x, compute)
    yield Op(
        f"{layers[0].op.name.rpartition('.')[0]}.lora_qkv",
        (x,),
        (*(layer.op.writes[0]._replace(dtype=compute) for layer in layers), *dropped),
        _weights(layers),
        _keeps(targets, kept, x),
        scratch=(Tensor("product", layers[0].op.writes[0].shape, compute),),
        scratch_back=_back(x, shape, dropout, layers, compute),
        product="matrix",
        source=_SOURCE,
    )


def _alone(layer: Layer, compute: str, dropout: bool) -> Iterator[Op]:
    (x,), y = layer.op.reads, layer.op.writes[0]
    dropped = (_dropped(layer)._replace(dtype=f"={x}"),) if dropout else ()
    yield from _forward([layer], x, compute)
    yield Op(
        layer.op.name,
        (x,),
        (y._replace(dtype=compute), *dropped),
        _weights([layer]),
        _keeps((x, layer.a.name, layer.b.name), (x, *(t.name for t in dropped))),
        scratch=(Tensor("product", y.shape, compute),),
        scratch_back=_back(x, f"{layer.lead} {layer.into}", dropout, [layer], compute),
        gradient="view",
        product="matrix",
        source=_SOURCE,
    )


def _gated(layers: list[Layer], compute: str, dropout: bool) -> Iterator[Op]:
    """A gated MLP keeps its input, the gate and what it multiplies; their product is made again in backward."""
    x, y = layers[0].op.reads[0], layers[-1].op.writes[0]
    dropped = tuple(_dropped(layer)._replace(dtype=f"={x}") for layer in layers) if dropout else ()
    wide = layers[0].op.writes[0].shape
    inner = tuple(Tensor(name, wide, compute) for name in ("gate", "up"))
    kept = (x, *(t.name for t in (*inner, *dropped)))
    targets = (x, *(w.name for layer in layers for w in (layer.a, layer.b)))
    yield from _forward(layers, x, compute)
    yield Op(
        f"{layers[0].op.name.rpartition('.')[0]}.lora_mlp",
        (x,),
        (y._replace(dtype=compute), *inner, *dropped),
        _weights(layers),
        _keeps(targets, kept, x),
        scratch=(Tensor("product", wide, compute), Tensor("product of an adapter", wide, compute)),
        scratch_back=(
            Scratch(Tensor("gradient of product", wide, compute)),
            *_back(x, f"{layers[0].lead} {layers[0].into}", dropout, layers, compute),
        ),
        product="matrix",
        source=_SOURCE,
    )
    yield ops.leave(x)
