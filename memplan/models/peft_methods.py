"""peft's methods other than LoRA, by peft's names: their settings and defaults, and the layers that they adapt.

Source: peft 0.21.2 tuners/*/config.py, utils/constants.py TRANSFORMERS_MODELS_TO_*_TARGET_MODULES_MAPPING.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, cast

from memplan.core.records import NamedTuple

Value = int | float | bool | str | None
Targets = Mapping[str, str]  # model_type -> names of modules, separated by spaces

_NONE: Mapping[str, Value] = MappingProxyType({})
# The formats of bitsandbytes.
BITSANDBYTES = ("nf4", "fp4", "int8")


class PeftMethod(NamedTuple):
    """One of peft's methods.

    targets  the modules that it adapts by default, by model_type; empty if it adapts none
    rank     its default rank; 0 if it has no rank
    options  its other settings that memory depends on, by peft's names, with peft's defaults
    dropout  peft's name of the dropout of the adapters' input; empty if it has none
    r        peft's name of the rank
    alpha    peft's name of the scale; empty if it has none
    formats  formats of quantised layers that it can adapt
    conv1d   whether it adapts transformers' Conv1D, as in GPT-2, too
    refuses  models whose linear layers are of a class that it does not adapt, or whose key heads it mistakes
    again    whether checkpointed layers can compute it again: peft refuses a prefix, and a pass's hooks end with it
    own_loss what its model does to the loss: adds that of A's and B's `orthogonality` in training, or that of a second
             `stream` where it enters the blocks, or computes another, of tokens in `context`, from the logits that the
             model below returns
    on       what it trains: adapters of `linear` layers, copies of `norms`, a `prompt` of virtual tokens, the keys and
             values of a `prefix` of virtual tokens in every layer, tokens that the last layers' `attention` reads,
             rows of the embeddings (`tokens`), or a second stream through all `blocks`
    """

    targets: Targets = MappingProxyType({})
    rank: int = 0
    options: Mapping[str, Value] = _NONE
    dropout: str = ""
    r: str = "r"
    alpha: str = ""
    formats: tuple[str, ...] = ()
    conv1d: bool = False
    refuses: tuple[str, ...] = ()
    again: bool = True
    own_loss: Literal["", "orthogonality", "context", "stream"] = ""
    on: Literal["linear", "norms", "prompt", "prefix", "attention", "tokens", "blocks"] = "linear"


def _each(model_types: str, names: str) -> dict[str, str]:
    return dict.fromkeys(model_types.split(), names)


_LORA: Targets = {
    **_each(
        "llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3 opt gptj gpt_neo", "q_proj v_proj"
    ),
    **_each("bloom gpt_neox chatglm falcon", "query_key_value"),
    **_each("bert roberta xlm-roberta", "query value"),
    **_each("gpt2 gpt_bigcode", "c_attn"),
    "t5": "q v",
    "mpt": "Wqkv",
    "phi": "q_proj v_proj fc1 fc2",
    "codegen": "qkv_proj",
    "nemotron_h": "q_proj k_proj v_proj o_proj",
}
_WITHOUT_FC: Targets = {**_LORA, "phi": "q_proj v_proj"}
_C_PROJ: Targets = {**_LORA, **_each("gpt2 gpt_bigcode", "mlp.c_proj")}
_ADALORA: Targets = {
    **{
        name: names
        for name, names in _LORA.items()
        if name not in "xlm-roberta chatglm codegen mpt falcon mistral mixtral stablelm phi"
    },
    "t5": "q k v o wi wo",
    "opt": "q_proj k_proj v_proj out_proj fc1 fc2",
    "roberta": "query key value dense",
}
_BEFT: Targets = {
    **_each("llama llama4 mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 opt gptj gpt_neo phi", "v_proj"),
    **_each("bert roberta", "value"),
    "t5": "v",
}
_OSF: Targets = {
    **_each(
        "llama llama4 mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 phi",
        "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj",
    ),
    **_each("gpt2 gpt_bigcode", "c_attn c_proj"),
    **_each("bloom gpt_neox falcon", "query_key_value dense_4h_to_h"),
    "opt": "q_proj k_proj v_proj out_proj fc1 fc2",
    "gptj": "q_proj k_proj v_proj out_proj fc_in fc_out",
}
_VBLORA: Targets = {
    **{
        name: names
        for name, names in _LORA.items()
        if name not in "xlm-roberta chatglm codegen mpt falcon mistral mixtral stablelm phi"
    },
    "t5": "q k v o wi wo",
    "opt": "q_proj k_proj v_proj out_proj fc1 fc2",
}
_IA3: Targets = {
    **_each("llama4 gemma gemma2 gemma3_text qwen2 qwen3", "q_proj v_proj down_proj"),
    **_each("llama mistral", "k_proj v_proj down_proj"),
    **_each("gpt2 gpt_bigcode", "c_attn mlp.c_proj"),
    **_each("gpt_neox falcon", "query_key_value dense_4h_to_h"),
    **_each("bert roberta", "key value output.dense"),
    "mixtral": "k_proj v_proj w2",
    "t5": "k v wo",
    "bloom": "query_key_value mlp.dense_4h_to_h",
    "opt": "q_proj k_proj fc2",
    "gptj": "q_proj v_proj fc_out",
    "gpt_neo": "q_proj v_proj c_proj",
    "phi": "q_proj v_proj fc2",
}
_NORMS: Targets = {
    **_each("llama mistral gemma", "input_layernorm post_attention_layernorm norm"),
    **_each("bloom falcon", "input_layernorm post_attention_layernorm ln_f"),
    **_each(
        "gemma2 gemma3_text",
        "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm",
    ),
    **_each("qwen2 qwen3", "post_attention_layernorm"),
    "gpt2": "ln_1 ln_2 ln_f",
    "gptj": "ln_1 ln_f",
    "phi": "input_layernorm final_layernorm",
    "t5": "layer_norm final_layer_norm",
}
_MISTAKEN = ("dbrx", "falcon")  # models whose key heads peft mistakes
# IA3's targets that are scaled at their input.
FEEDFORWARD: Targets = {model_type: names.split()[-1] for model_type, names in _IA3.items()}

PEFT_METHODS: dict[str, PeftMethod] = {
    "adalora": PeftMethod(
        _ADALORA,
        12,
        dropout="lora_dropout",
        r="init_r",
        alpha="lora_alpha",
        formats=BITSANDBYTES,
        conv1d=True,
        own_loss="orthogonality",
    ),
    "adamss": PeftMethod(_LORA, 100, {"num_subspaces": 5, "subspace_rank": 1}),
    "adaption_prompt": PeftMethod(
        {"llama": "self_attn", "mistral": "self_attn"},
        options={"adapter_len": None, "adapter_layers": None},
        conv1d=True,
        on="attention",
    ),
    "beft": PeftMethod(_BEFT),
    "boft": PeftMethod(
        _LORA, options={"boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 1}, formats=BITSANDBYTES
    ),
    "c3a": PeftMethod(_C_PROJ, options={"block_size": 256}),
    "cartridge": PeftMethod(
        options={"num_virtual_tokens": None, "num_frozen_tokens": 1},
        refuses=_MISTAKEN,
        formats=BITSANDBYTES,
        conv1d=True,
        again=False,
        on="prefix",
    ),
    "cpt": PeftMethod(
        options={"cpt_token_ids": None}, formats=BITSANDBYTES, conv1d=True, own_loss="context", on="prompt"
    ),
    "deft": PeftMethod(_LORA, 8, {"para": False}, dropout="deft_dropout", conv1d=True),
    "delora": PeftMethod(_LORA, 8),
    "fourierft": PeftMethod(_C_PROJ, options={"n_frequency": 1000}, conv1d=True),
    "frod": PeftMethod(_WITHOUT_FC, options={"sparse_rate": 0.01}, dropout="frod_dropout", conv1d=True),
    "glora": PeftMethod(
        _LORA, 8, {"config_A_B": "lora", "config_C": "lora", "config_D_E": "constant"}, refuses=("falcon",)
    ),
    "gralora": PeftMethod(
        _LORA, 32, {"gralora_k": 2, "hybrid_r": 0}, dropout="gralora_dropout", alpha="alpha", conv1d=True
    ),
    "hira": PeftMethod(_LORA, 32, dropout="hira_dropout", formats=BITSANDBYTES, conv1d=True),
    "hra": PeftMethod(_LORA, 8),
    "ia3": PeftMethod(_IA3, options={"feedforward_modules": None}, formats=BITSANDBYTES, conv1d=True),
    "lily": PeftMethod(_LORA, 32, {"num_B": 2}),
    "loha": PeftMethod(_LORA, 8, alpha="alpha"),
    "lokr": PeftMethod(_LORA, 8, {"decompose_both": False, "decompose_factor": -1}, alpha="alpha"),
    "ln_tuning": PeftMethod(_NORMS, formats=BITSANDBYTES, conv1d=True, on="norms"),
    "miss": PeftMethod(_LORA, 64, dropout="miss_dropout", formats=BITSANDBYTES),
    "oft": PeftMethod(
        _LORA,
        options={
            "r": 0,
            "oft_block_size": 32,
            "block_share": False,
            "use_cayley_neumann": True,
            "num_cayley_neumann_terms": 5,
        },
        formats=BITSANDBYTES,
    ),
    "multitask_prompt_tuning": PeftMethod(
        options={"num_virtual_tokens": None, "num_tasks": 1, "num_ranks": 1},
        formats=BITSANDBYTES,
        conv1d=True,
        on="prompt",
    ),
    "osf": PeftMethod(_OSF, options={"effective_rank": None}),
    "peanut": PeftMethod(_LORA, 32, {"depth": 0}),
    "poly": PeftMethod(_LORA, 8, {"n_tasks": 1, "n_skills": 4, "n_splits": 1}, again=False),
    "psoft": PeftMethod(
        _LORA,
        32,
        {
            "psoft_orth": True,
            "psoft_mag_b": True,
            "psoft_mag_a": True,
            "psoft_svd": "full",
            "ab_svd_init": "psoft_init",
        },
        dropout="psoft_dropout",
        alpha="psoft_alpha",
    ),
    "p_tuning": PeftMethod(
        options={"num_virtual_tokens": None, "encoder_hidden_size": None},
        formats=BITSANDBYTES,
        conv1d=True,
        on="prompt",
    ),
    "prefix_tuning": PeftMethod(
        options={"num_virtual_tokens": None, "prefix_projection": False, "encoder_hidden_size": None},
        refuses=_MISTAKEN,
        formats=BITSANDBYTES,
        conv1d=True,
        again=False,
        on="prefix",
    ),
    "prompt_tuning": PeftMethod(options={"num_virtual_tokens": None}, formats=BITSANDBYTES, conv1d=True, on="prompt"),
    "pvera": PeftMethod(_WITHOUT_FC, 256, dropout="pvera_dropout", conv1d=True),
    "randlora": PeftMethod(_LORA, 32, dropout="randlora_dropout", formats=BITSANDBYTES, conv1d=True),
    "road": PeftMethod(_LORA, options={"variant": "road_1", "group_size": 64}, formats=BITSANDBYTES),
    "shadow": PeftMethod(
        rank=8,
        options={
            "shadow_model": "mirror",
            "shadow_num_hidden_layers": None,
            "shadow_intermediate_size": None,
            "share_embeddings": True,
            "update_hidden_size": None,
            "shadow_dropout": 0.2,
            "auxiliary_loss_weight": 0.05,
        },
        alpha="shadow_alpha",
        formats=BITSANDBYTES,
        conv1d=True,
        own_loss="stream",
        on="blocks",
    ),
    "shira": PeftMethod(_WITHOUT_FC, 32),
    "supertuning": PeftMethod(_LORA, options={"sparsity": 0.99}),
    "tinylora": PeftMethod(_LORA, 2, {"u": 64}, dropout="tinylora_dropout", conv1d=True),
    "trainable_tokens": PeftMethod(options={"token_indices": None}, formats=BITSANDBYTES, conv1d=True, on="tokens"),
    "unilora": PeftMethod(_LORA, 4, {"theta_d_length": 256}, dropout="unilora_dropout", conv1d=True),
    "vblora": PeftMethod(
        _VBLORA,
        4,
        {"num_vectors": 256, "vector_length": 256, "topk": 2},
        dropout="vblora_dropout",
        conv1d=True,
    ),
    "waveft": PeftMethod(_C_PROJ, options={"n_frequency": 2592, "use_idwt": True}, conv1d=True),
    "vera": PeftMethod(_WITHOUT_FC, 256, dropout="vera_dropout", formats=BITSANDBYTES, conv1d=True),
    "xlora": PeftMethod(  # whose adapters are LoRA's
        _LORA,
        8,
        {
            "adapters": None,
            "layerwise_scalings": False,
            "xlora_depth": 1,
            "xlora_size": 2048,
            "use_trainable_adapters": False,
        },
        dropout="lora_dropout",
        alpha="lora_alpha",
        again=False,
    ),
}


def default_targets(method: str, model_type: str) -> tuple[str, ...]:
    """Return the modules that a method adapts by default; empty if peft has no default for the model."""
    targets = PEFT_METHODS[method].targets if method in PEFT_METHODS else _LORA
    return tuple(targets.get(model_type, "").split())


def has_targets(method: str, model_type: str) -> bool:
    """Whether a method has targets of its own in models of a type."""
    return model_type in PEFT_METHODS[method].targets


def refuses_layers(method: str, model_type: str) -> bool:
    """Whether a method does not adapt the class of the model's linear layers."""
    return method in PEFT_METHODS and model_type in PEFT_METHODS[method].refuses


def trains_prefix(method: str) -> bool:
    """Whether a method trains keys and values of virtual tokens in every layer."""
    return method in PEFT_METHODS and PEFT_METHODS[method].on == "prefix"


def leads_stream(method: str) -> bool:
    """Whether a method leads the hidden states of a second model through the blocks."""
    return method in PEFT_METHODS and PEFT_METHODS[method].on == "blocks"


def computes_again(method: str) -> bool:
    """Whether checkpointed layers can compute a method's adapters again."""
    return method not in PEFT_METHODS or PEFT_METHODS[method].again


def has_rank(method: str) -> bool:
    """Whether a method has adapters with a rank."""
    return method not in PEFT_METHODS or bool(PEFT_METHODS[method].rank)


# Methods that leave out modules by their config's `exclude_modules`.
EXCLUDING = (
    *("adalora", "boft", "deft", "delora", "fourierft", "hira", "hra", "ia3", "lily", "loha", "lokr", "miss", "oft"),
    *("peanut", "psoft", "vblora", "waveft"),
)


def adapts_modules(method: str) -> bool:
    """Whether a method is told which modules to adapt."""
    return method not in PEFT_METHODS or PEFT_METHODS[method].on in ("linear", "norms")


def filled_options(method: str, options: Mapping[str, Value], model_type: str) -> dict[str, Value]:
    """Return all of a method's settings, with peft's defaults for those that are not in `options`."""
    filled = {**PEFT_METHODS[method].options, **options}
    if method == "ia3" and filled["feedforward_modules"] is None:
        filled["feedforward_modules"] = FEEDFORWARD.get(model_type, "")
    if isinstance(filled.get("adapters"), Mapping):  # X-LoRA's paths by name
        filled["adapters"] = len(cast(Mapping[str, Value], filled["adapters"]))
    if "cpt_token_ids" in filled:
        filled["cpt_token_ids"] = virtual_tokens(options)
    return filled


def virtual_tokens(options: Mapping[str, object]) -> int:
    """Return the number of trained tokens before each sequence; CPT's config lists the tokens that they start as."""
    given = options.get("cpt_token_ids", options.get("num_virtual_tokens")) or 0
    return len(cast(tuple[object, ...], given)) if isinstance(given, tuple) else int(cast(int, given))
