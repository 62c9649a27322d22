"""Merging adapters: the tensors peft makes on the device to add one layer's product B A to its weight.

peft merges layer by layer (`merge_and_unload`), so only one layer's tensors are alive at a time. `merge` lists the
live tensors at every point just before memory falls. Shapes are the weight's; dtypes are literal.

Source: peft 0.21.2 tuners/lora/layer.py, bnb.py and variants.py, utils/integrations.py; bitsandbytes 0.50.2
nn/modules.py Params4bit._quantize, Int8Params._quantize; transformers 5.24 integrations/moe.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.quantization.quantization import absmax, family_of
from memplan.core.ir import Stack, Tensor, Weight
from memplan.core.records import NamedTuple

_LORA = "peft 0.21.2 tuners/lora/layer.py"
_BNB = "peft 0.21.2 tuners/lora/bnb.py"
_DORA = "peft 0.21.2 tuners/lora/variants.py DoraLinearVariant"
_WIDTH = {"fp32": 2, "bf16": 1, "fp16": 1}


class AdaptedWeight(NamedTuple):
    """A weight with an adapter.

    block  name of the block it is in; empty outside of blocks
    name   path of its layer
    dtype  dtype of A and B
    """

    weight: Weight
    block: str
    name: str
    dtype: str
    dora: bool = False
    embedding: bool = False

    @property
    def mergeable(self) -> bool:
        """Whether peft can merge into the weight's format: not into GPTQ or AWQ."""
        return not self.weight.stored or family_of(self.weight) in ("4bit", "int8")


def adapted_weights(stack: Stack) -> Iterator[AdaptedWeight]:
    """Yield the stack's weights that have adapters, in the model's order, those of a repeated block once."""
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
                yield AdaptedWeight(w, block, path, b.dtype, dora, half == "embedding_B")


class MergeMoment(NamedTuple):
    """The tensors alive in addition to the model at one point of a layer's merge, and the source of that."""

    tensors: tuple[Tensor, ...]
    source: str


def merge_moments(one: AdaptedWeight) -> tuple[MergeMoment, ...]:
    """Return the live tensors at each point of merging one layer.

    The product is scaled into a new tensor. An unquantised weight is added to in place, whatever the two dtypes. A
    quantised weight is dequantised; the sum goes to the host, comes back and is quantised before the old one is freed.
    """
    w = one.weight

    def like_weight(name: str, dtype: str) -> Tensor:
        return Tensor(name, w.shape, dtype)

    product, delta = like_weight("product of B and A", one.dtype), like_weight("scaled product of B and A", one.dtype)
    if w.stored:
        return tuple(_requantised(one, product, delta))
    wide = max(one.dtype, w.dtype, key=lambda dtype: _WIDTH[dtype])
    if one.dora:
        base = like_weight("copy of the weight", w.dtype)
        scaled, summed = like_weight("scaled product, times one", one.dtype), like_weight("adapted weight", wide)
        cast = (like_weight("merged weight", w.dtype),) if wide != w.dtype else ()
        return (
            MergeMoment((product, delta), _DORA),
            MergeMoment((delta, base, scaled, summed), _DORA),
            MergeMoment((delta, base, summed, like_weight("adapted weight, scaled", wide), *cast), _DORA),
        )
    source = f"{_LORA} Linear.merge"
    cast = (one.embedding or w.stacked) and one.dtype != w.dtype
    return (
        MergeMoment((product, delta), source),
        *(
            (MergeMoment((delta, like_weight("scaled product, in the weight's dtype", w.dtype)), source),)
            if cast
            else ()
        ),
    )


def _requantised(one: AdaptedWeight, product: Tensor, delta: Tensor) -> Iterator[MergeMoment]:
    w = one.weight
    is_4bit = family_of(w) == "4bit"
    source = f"{_BNB} {'Linear4bit' if is_4bit else 'Linear8bitLt'}.merge"
    base = Tensor("dequantised weight", w.shape, w.dtype if is_4bit else "fp32")
    wide = max(one.dtype, base.dtype, key=lambda dtype: _WIDTH[dtype])
    merged = Tensor("merged weight", w.shape, wide)
    if one.dora:  # autograd records the product and keeps its inputs for the gradient of the factor
        source = f"{_DORA}.merge_safe"
        second, copy = (
            Tensor(name, w.shape, base.dtype) for name in ("weight, dequantised again", "copy of the weight")
        )
        scaled, summed = Tensor("scaled product, times one", w.shape, one.dtype), merged._replace(name="adapted weight")
        rescaled = merged._replace(name="adapted weight, scaled")
        merged = merged._replace(dtype=base.dtype)
        yield MergeMoment((base, product, delta), source)
        yield MergeMoment((base, delta, second, copy), source)
        yield MergeMoment((base, delta, copy, scaled, summed), source)
        yield MergeMoment(
            (base, delta, copy, second, summed, rescaled, *((merged,) if wide != base.dtype else ())), source
        )
        live = (base, summed, merged)
    else:
        yield MergeMoment((base, product, delta), source)
        if not is_4bit and one.dtype != "fp32":
            half = Tensor("dequantised weight, cast", w.shape, one.dtype)
            yield MergeMoment((base, delta, half, merged._replace(dtype=one.dtype)), source)
            merged = merged._replace(dtype=one.dtype)
        live = (base, delta, merged)
    if not is_4bit:
        yield MergeMoment((*live, Tensor("merged weight, from the host", w.shape, "fp16"), *w.stored), source)
        return
    from_host = merged._replace(name="merged weight, from the host")
    scales = absmax(w)  # with double quantisation: fp32, and once more minus their mean
    packed, *others = w.stored
    centred = tuple(t._replace(name="absmax minus its mean") for t in scales)
    yield MergeMoment((*live, from_host, packed, *(scales or others), *centred, *(others if scales else ())), source)
