"""Models whose vision tower is loaded in front of any decoder, but not run: only text is estimated.

Source: transformers 5.24 models/llava_onevision, aya_vision, cohere2_vision and lfm2_vl.
"""

from __future__ import annotations

from functools import partial

from memplan.catalogue.decoder.decoder import stack_of
from memplan.catalogue.families import fixed_images, padded_images
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision.uncalled_towers import newline, siglip, two_layers
from memplan.core.ir import Stack
from memplan.models.configs import family
from memplan.models.model import ModelSpec

_PROJECTOR = "multi_modal_projector"


def _text(m: ModelSpec, wiring: Wiring) -> Stack:
    return stack_of(m, wiring, family(m.family.wraps).stack, m.family.wraps)


def llava_onevision(m: ModelSpec, wiring: Wiring) -> Stack:
    if wiring.images:
        return fixed_images.llava_onevision(m, wiring)
    projector = two_layers(_PROJECTOR, "h", "vh", bias=m.get("multimodal_projector_bias", True))
    return siglip(m, _text(m, wiring), (*newline(), *projector))


def cohere2_vision(m: ModelSpec, wiring: Wiring, norm: str = "") -> Stack:
    if wiring.images:
        return fixed_images.cohere2_vision(m, wiring, norm)
    return siglip(m, _text(m, wiring), two_layers(_PROJECTOR, "valigned", "vm", "valigned2", norm=norm))


def lfm2_vl(m: ModelSpec, wiring: Wiring) -> Stack:
    if wiring.images:
        return padded_images.lfm2_vl(m, wiring)
    norm = "layer_norm" if m.get("projector_use_layernorm", True) else ""
    projector = two_layers(_PROJECTOR, "valigned", "vm", bias=m.get("projector_bias", True), norm=norm)
    return siglip(m, _text(m, wiring), projector, numbered=False)


BUILDERS = {
    "aya_vision": partial(cohere2_vision, norm="layernorm"),
    "cohere2_vision": cohere2_vision,
    "lfm2_vl": lfm2_vl,
    "llava_onevision": llava_onevision,
}
