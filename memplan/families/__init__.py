"""What the config classes of mixtures of experts, state spaces, encoders, vision-language models and the like fill in.

One module per theme; each has `FAMILIES`, a `Family` per model_type. `memplan.config_classes` has the dense decoders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from memplan.layers import Layer

if TYPE_CHECKING:
    from memplan.models import ModelSpec

DECODER = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")  # what a config must say

# transformers' activations that are one kernel, which keeps what it reads. Source: torch 2.13 derivatives.yaml.
ONE_KERNEL = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "hardswish", "leaky_relu", "mish", "relu6")
WRITTEN_OUT = (*ONE_KERNEL, "gelu_new", "relu", "relu2")  # and those that `memplan.catalogue.gpt.activation` has beside


class Family(NamedTuple):
    """One model_type.

    defaults   what its config class fills in where the config is silent, if memory depends on it
    names      standard name -> what its configs call it, in the order looked up; () where it has none
    required   standard names that a config must have
    layers     what differs from layer to layer; None where all are alike
    axes       letters and words of its own for shapes, added to those of `ModelSpec.axes`
    decoder    the key of the nested config that has the decoder's keys: they count as the config's own
    built_as   another model_type whose classes transformers builds from this config
    positions  positions are looked up in a table, so that no longer sequence can run
    objectives what models of the family are trained for (`memplan.objectives`), the usual first
    longest    the longest sequence, where that is not `max_position_embeddings`
    only       the one length that the encoder takes: patches of an image, frames of a recording
    whole      modules that transformers never quantises: what it would keep in fp32 of an fp16 model
    lacks      kernels of attention that its classes do not take
    target     the longest sequence that the decoder of an encoder-decoder takes; None where it has no table
    acts       activations, by transformers' names, whose kernels its stack has
    """

    defaults: Mapping[str, Any]
    names: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    required: tuple[str, ...] = DECODER
    layers: Callable[[ModelSpec], tuple[Layer, ...]] | None = None
    axes: Callable[[ModelSpec], Mapping[str, int]] | None = None
    decoder: str = ""
    built_as: str = ""
    positions: bool = False
    objectives: tuple[str, ...] = ("causal_lm",)
    longest: Callable[[ModelSpec], int] | None = None
    whole: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    only: Callable[[ModelSpec], int] | None = None
    target: Callable[[ModelSpec], int | None] | None = None
    acts: tuple[str, ...] = ONE_KERNEL


# Which module knows which model_type: only the one asked for is imported.
_MODEL_TYPES: dict[str, str] = {
    "mla": "deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 glm4_moe_lite glm_moe_dsa kimi_k2 kimi_k25 kimi_k3 "
    "kimi_linear minicpm3",
    "moe": "dbrx deepseek ernie4_5_moe glm4_moe granitemoe hunyuan_v1_moe minimax_m2 mixtral olmoe phimoe "
    "qwen2_moe qwen3_moe",
    "vision": "gemma3 mistral3 mllama qwen2_vl qwen2_5_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe",
    "ssm": "falcon_mamba granitemoehybrid jamba mamba mamba2 nemotron_h qwen3_5_moe_text qwen3_5_text qwen3_next",
    "blocks": "minimax_m3_vl_text step3p7",
    "gemma": "gemma3n_text gemma4 gemma4_text",
    "llama4": "llama4 llama4_text",
    "sinks": "gpt_oss mimo_v2_flash",
    "megatron": "megatron_gpt",
    "encoders": "bert roberta xlm-roberta t5 whisper vit",
}
MODULES: dict[str, str] = {
    model_type: module for module, model_types in _MODEL_TYPES.items() for model_type in model_types.split()
}


def family(model_type: str) -> Family | None:
    """What its config class fills in; None for a model_type that no module here knows."""
    module = MODULES.get(model_type)
    return import_module(f"memplan.families.{module}").FAMILIES[model_type] if module else None
