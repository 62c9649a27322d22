"""Vision-language models: the language model's config, and the sizes of the vision tower.

Source: transformers 5.24 configuration classes.
"""

from __future__ import annotations

from typing import Any, cast

from memplan.core.errors import ConfigError
from memplan.models.configs import images, towers
from memplan.models.configs.dense import FAMILIES as DENSE
from memplan.models.configs.gemma import MASKS_IMAGES
from memplan.models.configs.moe import expert_axes, sparse_step_layers
from memplan.models.configs.ssm import FAMILIES as SSM
from memplan.models.configs.windows import windows_after
from memplan.models.facts import Family, ModelFacts
from memplan.models.family_facts import (
    NO_CLASS,
    AttentionFacts,
    CheckpointFacts,
    ConfigKeys,
    GenerationFacts,
    ParallelFacts,
    ServingFacts,
)
from memplan.models.layers import Layer, as_json


def qwen3_vl_moe(m: ModelFacts) -> dict[str, int]:
    return {**expert_axes()(m), **towers.qwen3_vl(m)}


def qwen3_5(m: ModelFacts) -> dict[str, int]:
    """Return the axes of the text model and the tower."""
    text = SSM["qwen3_5_text"].axes
    assert text is not None
    return {**text(m), **towers.qwen3_vl(m)}


CROSS = (3, 8, 13, 18, 23, 28, 33, 38)  # Llama 3.2's default cross-attention layers


def crossed(m: ModelFacts) -> tuple[Layer, ...]:
    """Return Llama 3.2's layers, some of which have cross-attention to the image in place of self-attention."""
    listed: object = m.config.get("cross_attention_layers")
    if listed is not None and not isinstance(listed, tuple):
        raise ConfigError(
            f"config: cross_attention_layers must be a list of layers, not {as_json(listed)}", "cross_attention_layers"
        )
    cross = set(CROSS if listed is None else cast(tuple[object, ...], listed))
    k, f = m.num_key_value_heads, m.intermediate_size
    return tuple(
        Layer(False, True, k, f, mixer="cross_attention" if i in cross else "attention")
        for i in range(m.num_hidden_layers)
    )


_QWEN2_VL: dict[str, Any] = {
    "num_key_value_heads": 8,
    "intermediate_size": 29568,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 80,
}

_TEXT = ConfigKeys(decoder="text_config")
# Defaults of the decoders' config classes, which published configs leave out.
_SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAVA = Family(
    {**_SIZES, "vocab_size": 32000}, _TEXT, axes=towers.llava, wraps="llama", stack="fixed_images", images=images.CLIP
)
_QWEN2 = Family(
    _QWEN2_VL,
    _TEXT,
    windows_after,
    towers.qwen2_vl,
    stack="qwen2_vl",
    checkpoint=CheckpointFacts(gguf="qwen2vl"),
    images=images.QWEN2_VL,
)
QWEN2_5_VL = _QWEN2._replace(axes=towers.qwen2_5_vl, images=images.QWEN2_5_VL)
QWEN3_VL_MOE = Family(
    {
        "num_key_value_heads": 16,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "tie_word_embeddings": False,
    },
    _TEXT._replace(renamed={"num_local_experts": "num_experts"}),
    sparse_step_layers,
    qwen3_vl_moe,
    stack="qwen3_vl",
    checkpoint=CheckpointFacts(experts="transposed", gguf="qwen3vlmoe"),
    images=images.QWEN3_VL,
)
_LLAVA_NEXT = LLAVA._replace(serving=ServingFacts(is_modelled=False), images=images.LLAVA_NEXT)
_SIGLIP = _LLAVA_NEXT._replace(wraps="cohere2", stack="text_only")
_SMOLVLM = LLAVA._replace(axes=towers.smolvlm, images=images.IDEFICS3)

_GLM_4V = Family(
    {
        "vocab_size": 151552,
        "hidden_size": 4096,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "intermediate_size": 13696,
        "partial_rotary_factor": 1.0,
    },
    _TEXT._replace(names={"head_dim": ()}),
    axes=towers.glm4v,
    stack="glm4v",
    serving=ServingFacts(is_modelled=False),
    images=images.GLM_4V,
)

FAMILIES: dict[str, Family] = {
    "aya_vision": _SIGLIP._replace(
        defaults={**_SIZES, "tie_word_embeddings": True}, axes=towers.aya_vision, images=images.AYA
    ),
    "cohere2_vision": _SIGLIP._replace(
        defaults={**_SIZES, "tie_word_embeddings": True}, axes=towers.cohere2_vision, images=images.COHERE2
    ),
    "gemma3": DENSE["gemma3_text"]._replace(
        keys=DENSE["gemma3_text"].keys._replace(decoder="text_config"),
        axes=towers.gemma3,
        objectives=("causal_lm",),
        stack="gemma3_vision",
        attention=DENSE["gemma3_text"].attention._replace(no_flash_2=MASKS_IMAGES.no_flash_2),
        parallel=ParallelFacts(wrapped_stem="vision_tower.embeddings."),
        images=images.GEMMA3,
    ),
    "glm46v": _GLM_4V._replace(axes=towers.glm46v),
    "glm4v": _GLM_4V,
    "glm_ocr": _GLM_4V._replace(
        defaults={
            "vocab_size": 59392,
            "hidden_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "intermediate_size": 4096,
            "partial_rotary_factor": 1.0,
        },
        keys=_TEXT,
        axes=towers.glm_ocr,
        images=images.GLM_OCR,
    ),
    "idefics3": _SMOLVLM,
    "internvl": LLAVA._replace(
        defaults={**_SIZES, "vocab_size": 151936, "tie_word_embeddings": True},
        axes=towers.internvl,
        wraps="qwen2",
        images=images.INTERNVL,
    ),
    "lfm2_vl": _SIGLIP._replace(
        defaults={**_SIZES, "tie_word_embeddings": True}, axes=towers.lfm2_vl, wraps="lfm2", images=images.SIGLIP_2
    ),
    "llava": LLAVA,
    "llava_next": _LLAVA_NEXT,
    "llava_next_video": _LLAVA_NEXT._replace(images=images.CLIP._replace(picture=None, is_called=False)),
    "llava_onevision": _SIGLIP._replace(
        defaults={**_SIZES, "vocab_size": 151936}, axes=towers.gemma3, wraps="qwen2", images=images.ONEVISION
    ),
    "mistral3": Family(
        {"tie_word_embeddings": True},
        _TEXT,
        axes=towers.mistral3,
        wraps="mistral",
        stack="mistral3",
        checkpoint=CheckpointFacts(gguf="mistral3"),
        serving=ServingFacts(adapts_tables=True),
        images=images.MISTRAL3,
    ),
    "mllama": Family(
        {"num_key_value_heads": 8, "intermediate_size": 14336},
        _TEXT,
        crossed,
        towers.mllama,
        stack="mllama",
        attention=AttentionFacts(no_flash_2=NO_CLASS),
        generation=GenerationFacts(cache="cross_layers"),
        serving=ServingFacts(is_modelled=False),
        images=images.MLLAMA,
    ),
    "paligemma": LLAVA._replace(
        defaults={"vocab_size": 257152},
        axes=towers.gemma3,
        wraps="gemma",
        attention=MASKS_IMAGES,
        images=images.PALIGEMMA,
    ),
    "qwen2_vl": _QWEN2,
    "qwen2_5_vl": QWEN2_5_VL,
    "qwen3_5": SSM["qwen3_5_text"]._replace(
        keys=SSM["qwen3_5_text"].keys._replace(decoder="text_config"),
        axes=qwen3_5,
        stack="qwen3_vl",
        parallel=ParallelFacts(),
        images=images.QWEN3_5,
    ),
    "qwen3_5_moe": SSM["qwen3_5_moe_text"]._replace(
        keys=SSM["qwen3_5_moe_text"].keys._replace(decoder="text_config"),
        axes=qwen3_5,
        stack="qwen3_vl",
        checkpoint=SSM["qwen3_5_text"].checkpoint._replace(gguf="qwen35moe"),
        parallel=ParallelFacts(),
        images=images.QWEN3_5,
    ),
    "qwen3_vl_moe": QWEN3_VL_MOE,
    "qwen3_vl": Family(
        {"num_key_value_heads": 32, "intermediate_size": 22016, "head_dim": 128},
        _TEXT,
        axes=towers.qwen3_vl,
        stack="qwen3_vl",
        checkpoint=CheckpointFacts(gguf="qwen3vl"),
        images=images.QWEN3_VL,
    ),
    "smolvlm": _SMOLVLM._replace(images=images.SMOLVLM),
}
