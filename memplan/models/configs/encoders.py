"""Encoders and encoder-decoders: BERT, RoBERTa, BART, T5, Whisper, ViT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.core.errors import ConfigError, UnsupportedModelError
from memplan.models.configs.layer_lists import SLIDING, kinds
from memplan.models.configs.windows import all_but_every
from memplan.models.facts import ONE_KERNEL, WRITTEN_OUT, Family, LengthFacts, ModelFacts
from memplan.models.family_facts import (
    NO_CLASS,
    AttentionFacts,
    ConfigKeys,
    GenerationFacts,
    ParallelFacts,
    ServingFacts,
    TrainingFacts,
)
from memplan.models.layers import MOST_LAYERS, Layer, as_json
from memplan.models.objectives import ENCODER

_NO_GROUPS: dict[str, tuple[str, ...]] = {"num_key_value_heads": (), "head_dim": ()}
_BERT: dict[str, Any] = {
    "tie_word_embeddings": True,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "classifier_dropout": None,
}


def _classes(m: ModelFacts) -> Mapping[str, int]:
    return {"c": m.num_labels}


def _electra(m: ModelFacts) -> Mapping[str, int]:
    width = m.config_int("embedding_size")
    return {**_classes(m), "p": width, "p32": -(-width // 32) * 32}


def _albert(m: ModelFacts) -> Mapping[str, int]:
    """Return ELECTRA's axes. The layers of a group share their weights, and are not counted as layers."""
    groups, key = m.config_int("num_hidden_groups", 1, most=MOST_LAYERS), "num_hidden_groups"
    if m.num_hidden_layers % groups:
        raise UnsupportedModelError(f"{key}: {groups} groups do not divide {m.num_hidden_layers} layers", key)
    if m.config_int("inner_group_num", 1) != 1:
        raise UnsupportedModelError("inner_group_num: only 1 is supported yet for albert", "inner_group_num")
    return {**_electra(m), "L1": 1}


def _deberta(m: ModelFacts) -> Mapping[str, int]:
    """Return the axes with the number of relative distances."""
    buckets, longest = (m.config_int(key, least=-1) for key in ("position_buckets", "max_relative_positions"))
    span = next((n for n in (buckets, longest) if n > 0), m.max_position_embeddings or 0)
    return {**_classes(m), "spans": 2 * span}


def _mpnet(m: ModelFacts) -> Mapping[str, int]:
    """Return the axes with the buckets of relative distances."""
    return {**_classes(m), **_buckets(m)}


def _buckets(m: ModelFacts) -> Mapping[str, int]:
    """Return the axes of a bias of relative positions."""
    buckets = m.config_int("relative_attention_num_buckets", 32)
    return {"buckets": buckets, "a32": -(-m.num_attention_heads // 32) * 32}


def _half_window(m: ModelFacts) -> int:
    """Return the tokens on one side that ModernBERT's sliding layers attend to."""
    return m.config_int("local_attention") // 2


def _modernbert_layers(m: ModelFacts) -> tuple[Layer, ...]:
    """Return ModernBERT's layers: all but every third have a window, and the first has no norm before its attention."""
    every = m.config_int("global_attn_every_n_layers", 3)
    sliding = kinds(m, "layer_types", SLIDING, [i % every > 0 for i in range(m.num_hidden_layers)])
    layer = Layer(False, True, m.num_key_value_heads, m.intermediate_size)
    return tuple(
        layer._replace(sliding=s, mixer="attention" if i else "unnormed attention") for i, s in enumerate(sliding)
    )


def _usable_positions(m: ModelFacts) -> int:
    """Return RoBERTa's longest sequence: positions start after the padding id, so the table's first rows are unused."""
    return (m.max_position_embeddings or 0) - 1 - m.config_int("pad_token_id", 1, 0)


_ENCODER = Family(
    _BERT,
    ConfigKeys(_NO_GROUPS),
    axes=_classes,
    objectives=ENCODER,
    gated=False,
    lengths=LengthFacts(learned=True),
    stack="bert",
    parallel=ParallelFacts(wraps_twice=True),
)
_ROBERTA = _ENCODER._replace(
    defaults={**_BERT, "pad_token_id": 1}, lengths=LengthFacts(learned=True, longest=_usable_positions)
)
_PRE_NORM = _ROBERTA._replace(stack="pre_norm_bert")
_ROTARY = _ENCODER._replace(lengths=LengthFacts(), stack="rotary_bert")

_VIT: dict[str, Any] = {
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
    "pooler_output_size": None,
}


def _side(m: ModelFacts, key: str) -> tuple[int, int]:
    """Return height and width, which a config gives as two numbers or as one."""
    value: Any = m.get(key)
    sides = (value, value) if isinstance(value, int) else value
    if not (isinstance(sides, tuple) and len(sides) == 2 and all(type(n) is int and 1 <= n <= 2**16 for n in sides)):  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        raise ConfigError(f"config: {key} must be a whole number or two, not {as_json(value)}", key)
    return sides  # pyright: ignore[reportUnknownVariableType]


def _patches(m: ModelFacts) -> int:
    (height, width), (rows, columns) = _side(m, "image_size"), _side(m, "patch_size")
    if rows > height or columns > width:
        raise ConfigError(f"config: patch_size {rows} is larger than image_size {height}", "patch_size")
    return (height // rows) * (width // columns)


def _tokens(m: ModelFacts) -> int:
    """Return the number of patches, plus the class token."""
    return _patches(m) + 1


def _vit(m: ModelFacts) -> Mapping[str, int]:
    (height, width), (rows, columns) = _side(m, "image_size"), _side(m, "patch_size")
    channels = m.config_int("num_channels", 3)
    return {
        **_classes(m),
        "patches": _patches(m),
        "s": _tokens(m),
        "patch": channels * rows * columns,
        "pixels": channels * height * width,
        "pooled": m.config_int("pooler_output_size", m.hidden_size),
    }


_WHISPER: dict[str, Any] = {
    "tie_word_embeddings": True,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
    "num_mel_bins": 80,
    "activation_function": "gelu",
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "max_source_positions": 1500,
    "max_target_positions": 448,
}


_WHISPER_KEYS = ConfigKeys(
    {
        **_NO_GROUPS,
        "hidden_size": ("d_model", "hidden_size"),
        "num_hidden_layers": ("encoder_layers", "num_hidden_layers"),
        "num_attention_heads": ("encoder_attention_heads", "num_attention_heads"),
        "intermediate_size": ("encoder_ffn_dim",),
        "max_position_embeddings": (),
        "hidden_act": ("activation_function",),
    }
)


def _frames(m: ModelFacts) -> int:
    """Return the encoder's positions; each covers two frames of the recording."""
    return m.config_int("max_source_positions", 1500)


def _targets(m: ModelFacts) -> int:
    return m.config_int("max_target_positions", 448)


def _positions(m: ModelFacts) -> int:
    return m.max_position_embeddings or 0


def _halves(m: ModelFacts) -> dict[str, int]:
    """Return the axes of a decoder next to an encoder, which must have as many heads."""
    heads = m.config_int("decoder_attention_heads", m.num_attention_heads)
    if heads != m.num_attention_heads:
        raise UnsupportedModelError(
            f"decoder_attention_heads: {heads} is not supported yet with {m.num_attention_heads} in the encoder",
            "decoder_attention_heads",
        )
    return {"D": m.config_int("decoder_layers", most=MOST_LAYERS), "fd": m.config_int("decoder_ffn_dim")}


def _marian(m: ModelFacts) -> Mapping[str, int]:
    if not m.get("share_encoder_decoder_embeddings", True):
        key = "share_encoder_decoder_embeddings"
        raise UnsupportedModelError(f"{key}: false is not supported yet for marian; supported: true", key)
    return _halves(m)


def _whisper(m: ModelFacts) -> Mapping[str, int]:
    frames = _frames(m)
    return {**_halves(m), "s": frames, "frames": 2 * frames, "mel": m.config_int("num_mel_bins", 80)}


_T5: dict[str, Any] = {
    "tie_word_embeddings": True,
    "d_kv": 64,
    "d_ff": 2048,
    "num_decoder_layers": None,
    "relative_attention_num_buckets": 32,
    "dropout_rate": 0.1,
    "feed_forward_proj": "relu",
}


def _any_target(m: ModelFacts) -> None:
    """Return None, no limit: T5's positions are a bias of the scores."""


def _t5(m: ModelFacts) -> Mapping[str, int]:
    decoders = m.config_int("num_decoder_layers", m.num_hidden_layers, most=MOST_LAYERS)
    feeds = m.get("feed_forward_proj", "relu")
    if not isinstance(feeds, str) or feeds.removeprefix("gated-") not in WRITTEN_OUT:
        raise UnsupportedModelError(
            f"feed_forward_proj: {as_json(feeds)} is not supported yet; supported: {', '.join(WRITTEN_OUT)}, each also "
            "with gated- before it",
            "feed_forward_proj",
        )
    return {
        "L1": 1,
        "L2": m.num_hidden_layers - 1,
        "D1": 1,
        "D2": decoders - 1,
        **_buckets(m),
    }


def _t5gemma(m: ModelFacts) -> Mapping[str, int]:
    """Return the axes of a decoder's runs, which are the encoder's. Both halves must have the same sizes."""
    encoder = m.part("encoder")
    heads = ("num_attention_heads", "num_key_value_heads", "head_dim")
    for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "sliding_window", *heads):
        if encoder.get(key, m.config.get(key)) != m.config.get(key):
            message = f"{as_json(encoder[key])} is not supported yet with {as_json(m.config.get(key))} in the decoder"
            raise UnsupportedModelError(f"encoder.{key}: {message}", "encoder")
    if m.probability("dropout_rate") > 0:
        raise UnsupportedModelError("dropout_rate: only 0 is supported yet for t5gemma", "dropout_rate")
    return {run.times.replace("L", "D"): run.number for run in m.runs}


def _umt5(m: ModelFacts) -> Mapping[str, int]:
    """Return T5's axes: every layer is one that makes a bias."""
    axes = _t5(m)
    return {**axes, "L1": axes["L1"] + axes["L2"], "L2": 0, "D1": axes["D1"] + axes["D2"], "D2": 0}


_T5_ROW = Family(
    _T5,
    keys=ConfigKeys(
        {
            "hidden_size": ("d_model", "hidden_size"),
            "num_hidden_layers": ("num_layers", "num_hidden_layers"),
            "num_attention_heads": ("num_heads", "num_attention_heads"),
            "num_key_value_heads": (),
            "head_dim": ("d_kv", "head_dim"),
            "intermediate_size": ("d_ff",),
            "max_position_embeddings": (),
            "hidden_act": (),
        }
    ),
    axes=_t5,
    objectives=("seq2seq_lm",),
    gated=False,
    lengths=LengthFacts(target=_any_target),
    stack="t5",
    attention=AttentionFacts(
        unsupported=("sdpa_math",), no_flash_2="it adds positions to the attention scores", single_sequence="layers"
    ),
    training=TrainingFacts(never_quantised=("wo",)),
)

_BART = Family(
    {
        "tie_word_embeddings": True,
        "vocab_size": 50265,
        "d_model": 1024,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "encoder_attention_heads": 16,
        "decoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
        "decoder_ffn_dim": 4096,
        "max_position_embeddings": 1024,
        "activation_function": "gelu",
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
    },
    keys=_WHISPER_KEYS._replace(names={**_WHISPER_KEYS.names, "max_position_embeddings": ("max_position_embeddings",)}),
    axes=_halves,
    objectives=("seq2seq_lm",),
    gated=False,
    lengths=LengthFacts(learned=True, target=_positions),
    stack="bart",
    serving=ServingFacts(is_modelled=False),
)

# Source: transformers 5.24 configuration classes.
FAMILIES: dict[str, Family] = {
    "albert": _ENCODER._replace(
        defaults={
            **_BERT,
            "embedding_size": 128,
            "intermediate_size": 16384,
            "hidden_act": "gelu_new",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "classifier_dropout_prob": 0.1,
        },
        axes=_albert,
        stack="albert",
        training=TrainingFacts(no_checkpoints=True),
        parallel=ParallelFacts(),
    ),
    "bart": _BART,
    "bert": _ENCODER,
    "camembert": _ROBERTA,
    "data2vec-text": _ROBERTA,
    "deberta-v2": _ENCODER._replace(
        defaults={
            **_BERT,
            "type_vocab_size": 0,
            "relative_attention": False,
            "max_relative_positions": -1,
            "position_buckets": -1,
            "norm_rel_ebd": "none",
            "share_att_key": False,
            "conv_kernel_size": 0,
            "legacy": True,
            "pooler_dropout": 0.0,
            "position_biased_input": True,
        },
        axes=_deberta,
        lengths=LengthFacts(),
        training=TrainingFacts(shares_a_graph=True),
        stack="deberta",
        attention=AttentionFacts(no_flash_2=NO_CLASS, rotary=False),
        parallel=ParallelFacts(),
    ),
    "distilbert": _ENCODER._replace(
        defaults={
            "tie_word_embeddings": True,
            "vocab_size": 30522,
            "dim": 768,
            "n_layers": 6,
            "n_heads": 12,
            "hidden_dim": 3072,
            "activation": "gelu",
            "dropout": 0.1,
            "attention_dropout": 0.1,
            "seq_classif_dropout": 0.2,
            "max_position_embeddings": 512,
        },
        keys=ConfigKeys(
            {
                **_NO_GROUPS,
                "hidden_size": ("dim",),
                "num_hidden_layers": ("n_layers",),
                "num_attention_heads": ("n_heads",),
                "intermediate_size": ("hidden_dim",),
                "hidden_act": ("activation",),
            }
        ),
        stack="distilbert",
    ),
    "electra": _ENCODER._replace(
        defaults={**_BERT, "embedding_size": 128, "hidden_size": 256, "intermediate_size": 1024}, axes=_electra
    ),
    "ernie": _ENCODER._replace(
        defaults={**_BERT, "task_type_vocab_size": 3, "use_task_id": False}, parallel=ParallelFacts()
    ),
    "eurobert": _ROTARY._replace(
        defaults={"intermediate_size": 3072, "max_position_embeddings": 8192},
        keys=ConfigKeys(),
        gated=True,
        stack="eurobert",
        parallel=ParallelFacts(),
    ),
    "gte": _ROTARY._replace(
        defaults={**_BERT, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 8192, "type_vocab_size": 1},
        gated=True,
    ),
    "jina_embeddings_v3": _ROTARY._replace(
        defaults={**_BERT, "intermediate_size": 4096, "max_position_embeddings": 8194, "type_vocab_size": 1}
    ),
    "modernbert": _ENCODER._replace(
        defaults={
            "tie_word_embeddings": True,
            "intermediate_size": 1152,
            "hidden_activation": "gelu",
            "max_position_embeddings": 8192,
            "local_attention": 128,
        },
        keys=ConfigKeys({**_NO_GROUPS, "hidden_act": ("hidden_activation",)}),
        layers=_modernbert_layers,
        acts=ONE_KERNEL,
        lengths=LengthFacts(window=_half_window),
        stack="modernbert",
        parallel=ParallelFacts(),
    ),
    "m2m_100": _BART._replace(
        defaults={**_BART.defaults, "vocab_size": 128112, "activation_function": "relu", "attention_dropout": 0.1},
        lengths=LengthFacts(target=_any_target),
    ),
    "marian": _BART._replace(defaults={**_BART.defaults, "vocab_size": 58101}, axes=_marian),
    "mbart": _BART,
    "pegasus": _BART,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "megatron-bert": _ENCODER._replace(
        defaults={**_BERT, "intermediate_size": 4096},
        stack="pre_norm_bert",
        attention=AttentionFacts(no_flash_2=NO_CLASS),
        parallel=ParallelFacts(),
    ),
    "roberta-prelayernorm": _PRE_NORM._replace(parallel=ParallelFacts()),
    "xlm-roberta-xl": _PRE_NORM._replace(
        defaults={
            **_BERT,
            "intermediate_size": 10240,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "pad_token_id": 1,
        }
    ),
    "mpnet": _ROBERTA._replace(
        defaults={**_BERT, "vocab_size": 30527, "pad_token_id": 1, "type_vocab_size": 0},
        axes=_mpnet,
        stack="mpnet",
        attention=AttentionFacts(no_flash_2=NO_CLASS),
        training=TrainingFacts(no_checkpoints=True),
    ),
    "mt5": _T5_ROW._replace(defaults={**_T5, "d_ff": 1024, "feed_forward_proj": "gated-gelu"}),
    "nomic_bert": _ROTARY._replace(
        defaults={
            **_BERT,
            "hidden_act": "silu",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "max_position_embeddings": 2048,
        },
        keys=ConfigKeys({"num_key_value_heads": ()}),
        gated=True,
    ),
    "t5": _T5_ROW,
    "t5gemma": Family(
        {
            "tie_word_embeddings": True,
            "vocab_size": 256000,
            "hidden_size": 2304,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "intermediate_size": 9216,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        keys=ConfigKeys({"hidden_act": ("hidden_activation",)}, decoder="decoder"),
        layers=all_but_every(2, fixed=True),
        axes=_t5gemma,
        objectives=("seq2seq_lm",),
        lengths=LengthFacts(target=_any_target),
        stack="t5gemma",
        attention=AttentionFacts(unsupported=("flash_attention_2", "flash_attention_3")),
        generation=GenerationFacts(is_modelled=False),
        serving=ServingFacts(is_modelled=False),
    ),
    "umt5": _T5_ROW._replace(defaults={**_T5, "d_ff": 1024, "feed_forward_proj": "gated-gelu"}, axes=_umt5),
    "whisper": Family(
        _WHISPER,
        keys=_WHISPER_KEYS,
        axes=_whisper,
        objectives=("seq2seq_lm",),
        gated=False,
        lengths=LengthFacts(fixed=_frames, target=_targets),
        stack="whisper",
        generation=GenerationFacts(suppresses=True, prompt_tokens=4),
    ),
    "vit": _ENCODER._replace(
        defaults=_VIT,
        keys=ConfigKeys(
            {**_NO_GROUPS, "max_position_embeddings": (), "vocab_size": ()},
            required=("hidden_size", "num_hidden_layers", "num_attention_heads"),
        ),
        axes=_vit,
        objectives=("image_classification", "feature_extraction"),
        lengths=LengthFacts(fixed=_tokens),
        stack="vit",
    ),
}
