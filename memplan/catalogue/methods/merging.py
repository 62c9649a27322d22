"""Merging adapters: what peft makes on the device to add one layer's product B A to the weight it is beside.

peft goes from layer to layer (`merge_and_unload`), so one layer's tensors are there at a time. `merge` lists what is
alive at each point at which memory is about to fall. Shapes are the weight's own; dtypes are literal.

Source: peft 0.21.2 tuners/lora/layer.py, bnb.py and variants.py, utils/integrations.py; bitsandbytes 0.50.2
nn/modules.py Params4bit._quantize, Int8Params._quantize; transformers 5.24 integrations/moe.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from memplan.catalogue.quantization.quantization import absmax, family_of
from memplan.core.ir import Stack, Tensor, Weight

_LORA = "peft 0.21.2 tuners/lora/layer.py"
_BNB = "peft 0.21.2 tuners/lora/bnb.py"
_DORA = "peft 0.21.2 tuners/lora/variants.py DoraLinearVariant"
_WIDTH = {"fp32": 2, "bf16": 1, "fp16": 1}


class Adapted(NamedTuple):
    """A weight that has an adapter: the block it is in, how that is called, and the dtype of A and B."""

    weight: Weight
    block: str
    name: str
    dtype: str
    dora: bool = False
    embedding: bool = False

    @property
    def mergeable(self) -> bool:
        """Whether peft merges into how the weight is stored: not into GPTQ's and AWQ's."""
        return not self.weight.stored or family_of(self.weight) in ("4bit", "int8")


def adapted(stack: Stack) -> Iterator[Adapted]:
    """The stack's weights that have adapters, in the model's order, each kind once."""
    groups = [("", (*stack.before, *(op for run in stack.runs for op in run.before), *stack.after, *stack.loss))]
    groups += [(block.name, block.ops) for run in stack.runs for block in run.blocks]
    for block, operations in groups:
        weights = {w.name: w for op in operations for w in op.weights}
        for name, b in weights.items():
            path, _, half = name.partition(".lora_")
            if b.group != "adapter" or half.removesuffix(".weight") not in ("B", "embedding_B"):
                continue
            w = weights.get(f"{path}.weight") or weights.get(path)
            if w is not None:
                dora = f"{path}.lora_magnitude_vector.weight" in weights
                yield Adapted(w, block, path, b.dtype, dora, half == "embedding_B")


class Made(NamedTuple):
    """What is alive beside the model at one point of a layer's merge, and where that was read."""

    tensors: tuple[Tensor, ...]
    source: str


def merge(one: Adapted) -> tuple[Made, ...]:
    """What merging one layer makes.

    The product is scaled into a tensor of its own. A whole weight is added to in place, whatever the two dtypes. A
    quantised one is dequantised, the sum sent to the host, brought back and quantised there, before the old one goes.
    """
    w = one.weight

    def whole(name: str, dtype: str) -> Tensor:
        return Tensor(name, w.shape, dtype)

    product, delta = whole("product of B and A", one.dtype), whole("scaled product of B and A", one.dtype)
    if w.stored:
        return tuple(_requantised(one, product, delta))
    wide = max(one.dtype, w.dtype, key=lambda dtype: _WIDTH[dtype])
    if one.dora:
        base = whole("copy of the weight", w.dtype)
        scaled, summed = whole("scaled product, times one", one.dtype), whole("adapted weight", wide)
        cast = (whole("merged weight", w.dtype),) if wide != w.dtype else ()
        return (
            Made((product, delta), _DORA),
            Made((delta, base, scaled, summed), _DORA),
            Made((delta, base, summed, whole("adapted weight, scaled", wide), *cast), _DORA),
        )
    source = f"{_LORA} Linear.merge"
    cast = (one.embedding or w.stacked) and one.dtype != w.dtype
    return (
        Made((product, delta), source),
        *((Made((delta, whole("the same as the weight's", w.dtype)), source),) if cast else ()),
    )


def _requantised(one: Adapted, product: Tensor, delta: Tensor) -> Iterator[Made]:
    w = one.weight
    four = family_of(w) == "4bit"
    source = f"{_BNB} {'Linear4bit' if four else 'Linear8bitLt'}.merge"
    base = Tensor("dequantised weight", w.shape, w.dtype if four else "fp32")
    wide = max(one.dtype, base.dtype, key=lambda dtype: _WIDTH[dtype])
    merged = Tensor("merged weight", w.shape, wide)
    if one.dora:  # autograd records it: what is scaled stays for the gradient of the factor
        source = f"{_DORA}.merge_safe"
        again, copy = (
            Tensor(name, w.shape, base.dtype) for name in ("weight, dequantised again", "copy of the weight")
        )
        scaled, summed = Tensor("scaled product, times one", w.shape, one.dtype), merged._replace(name="adapted weight")
        product_ = merged._replace(name="adapted weight, scaled")
        merged = merged._replace(dtype=base.dtype)
        yield Made((base, product, delta), source)
        yield Made((base, delta, again, copy), source)
        yield Made((base, delta, copy, scaled, summed), source)
        yield Made((base, delta, copy, again, summed, product_, *((merged,) if wide != base.dtype else ())), source)
        beside = (base, summed, merged)
    else:
        yield Made((base, product, delta), source)
        if not four and one.dtype != "fp32":
            half = Tensor("dequantised weight, cast", w.shape, one.dtype)
            yield Made((base, delta, half, merged._replace(dtype=one.dtype)), source)
            merged = merged._replace(dtype=one.dtype)
        beside = (base, delta, merged)
    if not four:
        yield Made((*beside, Tensor("merged weight, from the host", w.shape, "fp16"), *w.stored), source)
        return
    back = merged._replace(name="merged weight, from the host")
    scales = absmax(w)  # of a doubly quantised matrix: in fp32, and less their mean
    packed, *others = w.stored
    centred = tuple(t._replace(name="absmax less its mean") for t in scales)
    yield Made((*beside, back, packed, *(scales or others), *centred, *(others if scales else ())), source)
