"""Small configs of encoders, encoder-decoders and classifying decoders, with their objectives."""

from __future__ import annotations

from typing import Any

_BERT: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "vocab_size": 600,
    "max_position_embeddings": 300,
}
_T5: dict[str, Any] = {
    "model_type": "t5",
    "d_model": 128,
    "num_layers": 3,
    "num_heads": 4,
    "d_kv": 32,
    "d_ff": 256,
    "vocab_size": 600,
    "decoder_start_token_id": 0,
}

SMALL: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", **_BERT},
    "bart": {
        "model_type": "bart",
        "d_model": 128,
        "encoder_layers": 3,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 384,
        "decoder_ffn_dim": 256,
        "vocab_size": 600,
        "max_position_embeddings": 300,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
    },
    "distilbert": {
        "model_type": "distilbert",
        "dim": 128,
        "n_layers": 3,
        "n_heads": 4,
        "hidden_dim": 384,
        "vocab_size": 600,
        "max_position_embeddings": 300,
    },
    "electra": {"model_type": "electra", **_BERT, "embedding_size": 64},
    "modernbert": {
        "model_type": "modernbert",
        **_BERT,
        "num_hidden_layers": 4,
        "local_attention": 64,
        "pad_token_id": 0,
    },
    "roberta": {"model_type": "roberta", **_BERT, "type_vocab_size": 1, "num_labels": 3},
    "xlm-roberta": {"model_type": "xlm-roberta", **_BERT, "num_labels": 1, "classifier_dropout": 0.2},
    "t5": {**_T5, "feed_forward_proj": "relu"},
    "flan-t5": {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 2},
    "mt5": {**_T5, "model_type": "mt5", "tie_word_embeddings": False},
    "umt5": {**_T5, "model_type": "umt5", "tie_word_embeddings": False},
    "whisper": {
        "model_type": "whisper",
        "d_model": 128,
        "encoder_layers": 3,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 384,
        "decoder_ffn_dim": 256,
        "vocab_size": 600,
        "max_source_positions": 200,
        "max_target_positions": 96,
        "num_mel_bins": 40,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 3,
    },
    "vit": {
        "model_type": "vit",
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 384,
        "image_size": 112,
        "patch_size": 8,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    },
}
SMALL["llama"] = {"model_type": "llama", **_BERT, "num_key_value_heads": 2, "num_labels": 1}  # a reward model
SMALL["gemma2"] = {"model_type": "gemma2", **_BERT, "num_key_value_heads": 2, "head_dim": 32, "num_labels": 4}

for _name in ("m2m_100", "marian", "mbart", "pegasus"):
    SMALL[_name] = {**SMALL["bart"], "model_type": _name, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}

SMALL["deberta-v2"] = {
    "model_type": "deberta-v2",
    **_BERT,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 32,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "num_labels": 3,
    "problem_type": "single_label_classification",
    "pad_token_id": 0,
}
SMALL["albert"] = {
    "model_type": "albert",
    **_BERT,
    "embedding_size": 64,
    "num_hidden_layers": 4,
    "num_hidden_groups": 2,
}
_HALF: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "vocab_size": 600,
    "sliding_window": 64,
}
SMALL["t5gemma"] = {"model_type": "t5gemma", "vocab_size": 600, "encoder": _HALF, "decoder": _HALF}
SMALL["mpnet"] = {"model_type": "mpnet", **_BERT, "pad_token_id": 1}
SMALL["gte"] = {"model_type": "gte", **_BERT, "type_vocab_size": 1}
SMALL["jina_embeddings_v3"] = {"model_type": "jina_embeddings_v3", **_BERT}
SMALL["nomic_bert"] = {"model_type": "nomic_bert", **_BERT, "hidden_dropout_prob": 0.1}
SMALL["eurobert"] = {"model_type": "eurobert", **_BERT, "num_key_value_heads": 2, "pad_token_id": 0}
SMALL["ernie"] = {"model_type": "ernie", **_BERT, "use_task_id": True}
SMALL["megatron-bert"] = {"model_type": "megatron-bert", **_BERT}
for _name in ("camembert", "data2vec-text", "roberta-prelayernorm", "xlm-roberta-xl"):
    SMALL[_name] = {**SMALL["roberta"], "model_type": _name}

HEADS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("albert", "eurobert", "gte", "jina_embeddings_v3", "megatron-bert", "nomic_bert"),
        ("masked_lm", "sequence_classification", "token_classification", "feature_extraction"),
    ),
    "bert": ("masked_lm", "sequence_classification", "token_classification", "feature_extraction"),
    **dict.fromkeys(("bart", "m2m_100", "marian", "mbart", "pegasus"), ("seq2seq_lm",)),
    "distilbert": ("masked_lm", "sequence_classification", "token_classification", "feature_extraction"),
    "electra": ("masked_lm", "sequence_classification", "token_classification", "feature_extraction"),
    "modernbert": ("masked_lm", "sequence_classification", "token_classification", "feature_extraction"),
    "deberta-v2": ("masked_lm", "sequence_classification", "token_classification", "feature_extraction"),
    "mpnet": ("masked_lm", "sequence_classification", "token_classification", "feature_extraction"),
    **dict.fromkeys(("camembert", "data2vec-text", "ernie", "roberta"), ("masked_lm", "sequence_classification")),
    **dict.fromkeys(
        ("roberta-prelayernorm", "xlm-roberta-xl"), ("masked_lm", "sequence_classification", "feature_extraction")
    ),
    "xlm-roberta": ("sequence_classification", "token_classification"),
    **dict.fromkeys(("mt5", "t5gemma"), ("seq2seq_lm",)),
    "umt5": ("seq2seq_lm",),
    "t5": ("seq2seq_lm",),
    "flan-t5": ("seq2seq_lm",),
    "whisper": ("seq2seq_lm",),
    "vit": ("image_classification", "feature_extraction"),
    "llama": ("sequence_classification", "feature_extraction"),
    "gemma2": ("sequence_classification", "feature_extraction"),
}
