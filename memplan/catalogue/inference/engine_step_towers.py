"""Memory of a vision tower in a serving engine, which runs it before allocating the KV cache pool.

Axes of this module:

    vn   patches of all images in the batch
    vhp  the rank's part of the tower's width
    vfp  the rank's part of the tower's FFN width
    vt   rows of its output

No gradients are computed. Python frames hold a block's input, and arguments until the module that received them
returns.

Source: vllm 0.33.0 model_executor/models/qwen2_5_vl.py Qwen2_5_VisionBlock, Qwen2_5_VisionAttention; qwen3_vl.py,
qwen2_vl.py, siglip.py, pixtral.py and mllama4.py are alike.
"""

from __future__ import annotations

from memplan.catalogue.inference.instant import Instant
from memplan.core.ir import Tensor
from memplan.models.facts import ImageFacts

_PIXELS, _INPUT, _NORMED = Tensor("pixels", "vn vin"), Tensor("the block's input", "vn vh"), Tensor("normed", "vn vh")
_AFTER, _OUTPUT = Tensor("after attention", "vn vh"), Tensor("the FFN's output", "vn vh")
_TURNED = (Tensor("q and k, side by side", "vn 2 vhp"), Tensor("q and k, rotated", "vn 2 vhp"))
_GATED = (Tensor("gate and up", "vn 2 vfp"), Tensor("activated", "vn vfp"), _OUTPUT)
_PLAIN = (Tensor("up", "vn vfp"), Tensor("activated", "vn vfp"))
# Tensors of each kind of FFN, and what else is alive: a fused norm adds the residual into a new tensor.
_ROWS = {
    "plain": (*_PLAIN, _AFTER),
    "gated": (*_GATED, _AFTER),
    "fused": (*_GATED, Tensor("attention's output", "vn vh"), Tensor("the residual with it", "vn vh")),
}


def tower_instants(images: ImageFacts) -> tuple[Instant, ...]:
    """Return the tower's candidate peaks."""
    source = "vllm 0.33.0 model_executor/models/qwen2_5_vl.py Qwen2_5_VisionBlock.forward, and alike"
    held = (_PIXELS, _INPUT, _NORMED)
    rotated = _TURNED if images.is_rotated else ()
    attention = (*held, Tensor("q, k and v", "vn 3 vhp"), *rotated, Tensor("output", "vn vhp"))
    return Instant("encoder.attention", attention, source), Instant("encoder.mlp", (*held, *_ROWS[images.ffn]), source)


# The tower's output, alive during the language model's step.
MADE = Tensor("the encoder's output", "vt h")
