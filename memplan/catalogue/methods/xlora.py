"""X-LoRA: several LoRA adapters on each layer, scaled for each token by a classifier of the model's hidden states.

A first forward pass without gradients computes the hidden states. It needs less than the pass that follows, which keeps
as much and more.

Source: peft 0.21.2 tuners/xlora/model.py, layer.py, classifier.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from memplan.catalogue.kernels import ops
from memplan.catalogue.methods.formula import Formula, count
from memplan.catalogue.methods.peft_layers import Wrapped
from memplan.core.errors import refused
from memplan.core.ir import Op, Stack, Tensor

_SCALINGS = "scalings"


def xlora(layer: Wrapped) -> list[Op]:
    """The sum of a layer's adapters, each of the input times its scaling."""
    f, o = Formula(layer), layer.options
    number, trains = count(layer, "adapters"), bool(o["use_trainable_adapters"])
    count(layer, "xlora_depth")
    f.by_sequence("xlora")
    f.shapes[_SCALINGS] = f"{layer.lead} {number}"
    own = f.call(_SCALINGS, _SCALINGS, view=True)
    result = base = f.base()
    x = f.cast(layer.x, layer.dtype, "x")
    scaled = ""
    for i in range(number):
        a = layer.weight(f"lora_A.{i}", f"r {layer.into}", 1)._replace(trains=trains)
        b = layer.weight(f"lora_B.{i}", f"{layer.out} r", len(layer.out.split()))._replace(trains=trains)
        scaled = f.times(f"scaled{i}", x, f.call(f"scaling{i}", own, shape=f"{layer.lead} 1", view=True))
        given = scaled
        if layer.dropout:
            given = f"{layer.y}.dropped{i}"
            f.operations.append(ops.dropout(f"{layer.name}.dropout{i}", scaled, given, layer.x_shape))
        low = f.product(f"low{i}", given, a, f"{layer.lead} r", gradient="view")
        delta = f.scale(
            f"weighed{i}", f.scale(f"delta{i}", f.product(f"out{i}", low, b, layer.y_shape, gradient="view"))
        )
        result = f.call(f"sum{i}", result, delta, dtype=f"={base}", view=True, gradient="same")
    return f.result(result, layer.x, x, scaled, own)


def with_scalings(stack: Stack, options: Mapping[str, Any], dtype: str, axes: Mapping[str, int]) -> Stack:
    """Return the stack with the classifier that computes the scalings of all layers before its first operation.

    Raises SpecError for models whose layers peft finds no adapters for.
    """
    layers = [
        (block.name, axes[run.times])
        for run in stack.runs
        for block in run.blocks
        for op in block.ops
        if op.name.endswith(f".{_SCALINGS}")
    ]
    outside = next((name for name, _ in layers if not name.startswith("model.")), "")
    if outside:
        message = f"peft's xlora loads no adapters of layers outside of `model`, such as {outside}; use lora"
        raise refused("method.kind", message)
    operations = _classifier(options, sum(times for _, times in layers), dtype)
    return stack._replace(before=(*operations, *stack.before))


def _classifier(options: Mapping[str, Any], layers: int, dtype: str) -> Iterator[Op]:
    n, number, depth = "internal_xlora_classifier", options["adapters"], int(options["xlora_depth"])
    x, into = "xlora.hidden", "h"
    yield Op(f"{n}.pass", (), (Tensor(x, "b s h", dtype),), gradient="none")
    for i in range(depth):
        last = i == depth - 1
        classes = str(number * (layers if options["layerwise_scalings"] else 1))
        out, y = classes if last else str(options["xlora_size"]), f"xlora.{i}"
        layer = ops.linear(f"{n}.layers.{3 * i}", x, y, out, into, "adapter", True)
        yield layer._replace(weights=tuple(w._replace(dtype=dtype, matrix=False) for w in layer.weights))
        x, into = y, out
        if not last:
            yield ops.keeping_output(f"{n}.layers.{3 * i + 1}", y, f"{y}.relu", f"b s {out}", "relu")
            yield ops.dropout(f"{n}.layers.{3 * i + 2}", f"{y}.relu", f"{y}.dropped", f"b s {out}")
            x = f"{y}.dropped"
    shape = f"b s {layers} {number}"
    yield ops.scale(f"{n}.temperature", x, "xlora.logits", shape)
    *rest, softmax = ops.softmax(f"{n}.softmax", "xlora.logits", _SCALINGS, shape)
    yield from rest
    yield softmax._replace(holds="step")
