"""Every fact of a family of models, one `Family` per model_type.

There is one module per kind of model, each with `FAMILIES`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from memplan.core.errors import UnsupportedModelError
from memplan.models.facts import Family, ModelFacts

# Module -> the kind of its families, as an error message calls them, and their model_types. Only the needed module is
# imported.
_FAMILIES: dict[str, tuple[str, str]] = {
    "dense": (
        "",
        "apertus arcee baichuan biogpt bitnet bloom chatglm codegen cohere cohere2 cwm diffllama ernie4_5 exaone "
        "exaone4 falcon gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gptj granite helium "
        "hunyuan_v1_dense hyperclovax internlm2 internlm3 iquestcoder jais2 llama mimo minicpm ministral "
        "ministral3 mistral mpt nanochat nemotron nemotron-nas olmo olmo2 olmo3 opt phi phi3 qwen qwen2 qwen3 "
        "seed_oss smollm3 stablelm starcoder2 vaultgemma",
    ),
    "mla": (
        "mixture of experts, multi-head latent attention",
        "axk1 deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 glm4_moe_lite glm_moe_dsa kimi_k2 kimi_k25 kimi_k3 "
        "kimi_linear minicpm3 mistral4 sarvam_mla youtu",
    ),
    "moe": (
        "mixture of experts",
        "afmoe cohere2_moe dbrx deepseek dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe granitemoe granitemoeshared "
        "hunyuan_v1_moe hy_v3 mellum minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe sarvam_moe solar_open",
    ),
    "vision": (
        "vision-language",
        "aya_vision cohere2_vision gemma3 glm46v glm4v glm_ocr idefics3 internvl lfm2_vl llava llava_next "
        "llava_next_video llava_onevision mistral3 mllama paligemma qwen2_vl qwen2_5_vl qwen3_5 qwen3_5_moe qwen3_vl "
        "qwen3_vl_moe smolvlm",
    ),
    "audio": ("audio-language", "qwen2_5_omni_thinker qwen2_audio qwen3_omni_moe_thinker voxtral"),
    "ssm": (
        "state space, recurrent, linear attention",
        "bamba falcon_h1 falcon_mamba granitemoehybrid jamba lara_mini lfm2 lfm2_moe lfm3 mamba mamba2 "
        "nemotron_h qwen3_5_moe_text qwen3_5_text qwen3_next",
    ),
    "block_sparse": ("mixture of experts", "minimax_m3 minimax_m3_vl_text step3p7"),
    "gemma": ("", "gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text"),
    "llama4": ("mixture of experts", "llama4 llama4_text"),
    "gpt_oss": ("mixture of experts", "flint gpt_oss granite_swa granitemoe_swa kolibri1 laguna mimo_v2_flash"),
    "megatron": ("", "megatron_gpt"),
    "encoders": (
        "encoder",
        "albert bart bert camembert data2vec-text deberta-v2 distilbert electra ernie eurobert gte "
        "jina_embeddings_v3 m2m_100 marian mbart megatron-bert modernbert mpnet mt5 nomic_bert pegasus "
        "roberta roberta-prelayernorm t5 t5gemma umt5 vit whisper xlm-roberta xlm-roberta-xl",
    ),
}
MODULES: dict[str, str] = {
    model_type: module for module, (_, model_types) in _FAMILIES.items() for model_type in model_types.split()
}
DENSE = "dense"  # the module of dense decoders


def family(model_type: str) -> Family:
    """Return the family of a model_type. Raises KeyError for an unsupported one."""
    return import_module(f"memplan.models.configs.{MODULES[model_type]}").FAMILIES[model_type]


@cache
def around(model_type: str, wrapped: str) -> Family:
    """Return the row of a model with a vision tower around a decoder `wrapped`: both rows' facts.

    Raises UnsupportedModelError for a text model that is no decoder, or has a tower of its own.
    """
    row, decoder = family(model_type), family(wrapped)
    if decoder.images is not None or "causal_lm" not in decoder.objectives:
        why = f"is not supported yet for {model_type}; supported: decoders, such as {row.wraps}"
        raise UnsupportedModelError(f"config: text_config.model_type {wrapped} {why}", "text_config")

    def axes(m: ModelFacts) -> dict[str, int]:
        return {**(decoder.axes(m) if decoder.axes else {}), **(row.axes(m) if row.axes else {})}

    return decoder._replace(
        defaults={**decoder.defaults, **row.defaults},
        keys=decoder.keys._replace(decoder=row.keys.decoder),
        axes=axes,
        built_as="",
        wraps=decoder.built_as or wrapped,
        objectives=row.objectives,
        stack=row.stack,
        attention=decoder.attention._replace(
            no_flash_2=decoder.attention.no_flash_2 or row.attention.no_flash_2,
            single_sequence=decoder.attention.single_sequence or row.attention.single_sequence,
        ),
        generation=decoder.generation._replace(all_logits=row.generation.all_logits),
        checkpoint=row.checkpoint,
        parallel=row.parallel,
        serving=decoder.serving if row.serving.is_modelled else row.serving,
        images=row.images,
    )


def kind_of(model_type: str) -> str:
    """Return the kinds of a family, as an error message calls them; "" for a dense decoder."""
    return _FAMILIES[MODULES[model_type]][0]


@cache
def families() -> dict[str, Family]:
    """Return every family by model_type, in alphabetical order, without those that transformers builds as another."""
    rows = ((model_type, family(model_type)) for model_type in sorted(MODULES))
    return {model_type: row for model_type, row in rows if not row.built_as}
