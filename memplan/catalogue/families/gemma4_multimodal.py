"""Gemma 4 with its vision tower and audio encoder, of which a batch calls one or none.

Source: transformers 5.24 models/gemma4/modeling_gemma4.py.
"""

from __future__ import annotations

from memplan.catalogue.families import gemma4_audio, gemma4_vision
from memplan.catalogue.families.gemma4 import gemma4
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision.vision import scattered, text_with_tower
from memplan.core.ir import Stack
from memplan.models.model import ModelSpec

_TOWERS = {"audio_config": gemma4_audio.tower_of, "vision_config": gemma4_vision.tower_of}


def with_towers(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build the model. Tokens of an image attend to each other in layers with a window, which then have a mask."""
    blocks = wiring.images and m.config.get("use_bidirectional_attention") == "vision"
    text = gemma4(m, wiring, is_multimodal=True, is_blockwise=blocks)
    has_per_layer = m.config_int("hidden_size_per_layer_input", least=0) > 0
    towers = {key: build(m, wiring) for key, build in _TOWERS.items() if m.part(key)}
    if wiring.images:
        tower = towers.pop("audio_config" if wiring.hears else "vision_config")
        scatter = scattered(joined=not wiring.hears, checks=True)
        last = "ple.table" if has_per_layer else "embeds"
        held = ("image_embeds", "image_tokens", *(("u.last", "u.projected") if wiring.hears else ()))
        text = text_with_tower(wiring, text, tower, scatter, held, last)
    for tower in towers.values():
        text = text_with_tower(wiring._replace(images=False), text, tower)
    return text


BUILDERS = {"gemma4": with_towers}
