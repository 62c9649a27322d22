"""Copies that saving a checkpoint makes on the device.

transformers 5 keeps a layer's experts as one parameter and converts it back to the checkpoint's layout before anything
goes to the host, for all layers at once.

Source: transformers 5.24 conversion_mapping.py, core_model_loading.py revert_weight_conversion, Chunk, Transpose.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.core.ir import Tensor, Weight

SOURCE = "transformers 5.24 core_model_loading.py revert_weight_conversion"

# Families whose checkpoints store gate and up separately, per expert or stacked: saving copies each half.
_SPLIT_GATE_UP = frozenset(
    (
        *("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite"),
        *("glm_moe_dsa", "hunyuan_v1_moe", "jamba", "kimi_k25", "kimi_linear", "mimo_v2_flash", "minimax_m2"),
        *("mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "step3p7"),
    )
)
# Families whose checkpoints store the experts transposed.
_TRANSPOSED = frozenset(("qwen3_vl_moe",))


def checkpoint_copies(w: Weight, model_type: str) -> Iterator[Tensor]:
    """Yield the copies that saving makes of a weight; most weights need none."""
    if not w.stacked or w.stored:
        return
    if model_type in _TRANSPOSED:
        yield Tensor(f"{w.name}, transposed", w.shape, w.dtype)
    elif model_type in _SPLIT_GATE_UP and w.name.endswith("gate_up_proj"):
        experts, two, *rest = w.shape.split()
        assert two == "2"
        for name in ("gate_proj", "up_proj"):
            yield Tensor(w.name.replace("gate_up_proj", name), " ".join((experts, *rest)), w.dtype)
