"""Axes of the vision tower of Step-3.7, whose weights are loaded but whose forward pass is not estimated.

Source: transformers 5.24 configuration classes.
"""

from __future__ import annotations

from collections.abc import Mapping

from memplan.core.errors import ConfigError
from memplan.models.configs.towers import size
from memplan.models.facts import ModelFacts
from memplan.models.layers import as_json


def step_tower(m: ModelFacts) -> Mapping[str, int]:
    h, side, patch = size(m, "hidden_size", 1536, "width"), size(m, "image_size", 728), size(m, "patch_size", 14)
    ratio: object = m.part("vision_config").get("mlp_ratio", 8960 / 1536)
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1000:
        raise ConfigError(f"config: vision_config.mlp_ratio must be a number, not {as_json(ratio)}", "mlp_ratio")
    return {
        "vL": size(m, "num_hidden_layers", 47, "layers"),
        "vh": h,
        "vf": int(h * ratio),
        "vd4": max(1, h // size(m, "num_attention_heads", 16, "heads") // 4),
        "vin": size(m, "num_channels", 3) * patch * patch,
        "vpositions": (side // patch) ** 2,
    }
