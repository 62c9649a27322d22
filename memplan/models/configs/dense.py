"""Dense decoders.

Defaults are only those that memory depends on, without sizes that every config has. A sliding window or a partial
rotary factor is read only from families that list it here.
Source: transformers 5.24 configuration classes; for families that it does not have, the code published with the model.
"""

from __future__ import annotations

from memplan.models import tensor_plans as plans
from memplan.models.configs import windows
from memplan.models.facts import WRITTEN_OUT, Family, LengthFacts, ModelFacts
from memplan.models.family_facts import (
    DECODER,
    NO_CLASS,
    AttentionFacts,
    CheckpointFacts,
    ConfigKeys,
    GenerationFacts,
    ParallelFacts,
    ServingFacts,
    TrainingFacts,
)
from memplan.models.objectives import CLASSIFIER
from memplan.models.tensor_plans import TensorParallelPlan

_EQUAL_HEADS: dict[str, tuple[str, ...]] = {"num_key_value_heads": (), "head_dim": ()}
_GPT: dict[str, tuple[str, ...]] = {
    **_EQUAL_HEADS,
    "hidden_size": ("hidden_size", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "intermediate_size": ("n_inner",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "hidden_act": ("activation_function",),
}
# Keys of a GGUF file; the others that most families share are left out.
_GGUF_GPT: dict[str, str | None] = {
    "context_length": "n_positions",
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    **dict.fromkeys(("attention.head_count_kv", "attention.key_length", "attention.sliding_window", "rope.freq_base")),
    **dict.fromkeys(("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")),
}
_DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "n_positions": 1024}


def _multi_query(m: ModelFacts, _: int | None) -> int:
    return 1 if m.get("multi_query", False) else m.num_attention_heads


def _falcon_heads(m: ModelFacts, stated: int | None) -> int:
    if m.get("new_decoder_architecture", False):
        return stated or m.num_attention_heads
    return _multi_query(m, stated)


_WITH_POSITIONS = (*DECODER, "max_position_embeddings")  # a table with a row per position


_GPT_LIKE = Family({}, gated=False, generation=GenerationFacts(ignores_early_exit=True))
_GPT2 = _GPT_LIKE._replace(
    defaults={"tie_word_embeddings": True, "activation_function": "gelu_new", **_DROPOUT},
    keys=ConfigKeys(_GPT, _WITH_POSITIONS),
    lengths=LengthFacts(learned=True),
    stack="gpt",
    attention=AttentionFacts(rotary=False),
)
_GPT_J = _GPT_LIKE._replace(
    defaults={"rotary_dim": 64, "activation_function": "gelu_new", "n_positions": 2048},
    keys=_GPT2.keys,
    stack="gpt",
)
_BLOOM_NAMES: dict[str, tuple[str, ...]] = {
    **_EQUAL_HEADS,
    "hidden_size": ("n_embed", "hidden_size"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "intermediate_size": (),
    "max_position_embeddings": ("seq_length",),
    "hidden_act": (),
}
_BLOOM = _GPT_LIKE._replace(
    defaults={"tie_word_embeddings": True},
    keys=ConfigKeys(_BLOOM_NAMES),
    stack="bloom_mpt",
    attention=AttentionFacts(no_flash_2=NO_CLASS, rotary=False, single_sequence="views"),
    checkpoint=CheckpointFacts(gguf="bloom"),
)
_LAYER_NORM = Family({}, objectives=CLASSIFIER, stack="neox", gated=False)


def _chatglm_heads(m: ModelFacts, stated: int | None) -> int:
    return stated or m.num_attention_heads if m.get("multi_query_attention", False) else m.num_attention_heads


_LLAMA = {"intermediate_size": 11008}
_QWEN2 = {"num_key_value_heads": 32, "intermediate_size": 22016}

_BIASES = {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_down.bias"}
_POST_NORM = {"post_attention_layernorm": "post_attention_norm"}

# A decoder whose attention is one call on the heads of q_proj, k_proj and v_proj.
_DENSE = Family(
    _LLAMA,
    objectives=CLASSIFIER,
    stack="dense",
    attention=AttentionFacts(flex=True),
    parallel=ParallelFacts(plans.LLAMA, context=True),
)
# One that libraries do not divide, and whose cache in engines was not read.
_ALONE = _DENSE._replace(parallel=ParallelFacts(), serving=ServingFacts(is_modelled=False))
# Families whose class ignores `mlp_bias`; in the others it adds biases to the MLP's linear layers.
_NO_MLP_BIAS = _DENSE._replace(keys=ConfigKeys(fixed={"mlp_bias": False}))
_LLAMA_ROW = _DENSE._replace(
    checkpoint=CheckpointFacts(gguf="llama", gguf_keys={"rope.dimension_count": "head_dim"}, gguf_switches=_BIASES),
    parallel=ParallelFacts(plans.LLAMA, context=True, gpt=plans.GPT),
    serving=ServingFacts(adapts_tables=True, draft_tokens=8, has_draft_heads=True),
)

_GEMMA = _DENSE._replace(
    defaults={
        "tie_word_embeddings": True,
        "head_dim": 256,
        "num_key_value_heads": 4,
        "intermediate_size": 9216,
        "sliding_window": 4096,
    },
    keys=ConfigKeys({"hidden_act": ("hidden_activation",)}),
    layers=windows.all_but_every(6),
    stack="gemma",
    checkpoint=CheckpointFacts(gguf="gemma3", gguf_keys={}, gguf_modules=_POST_NORM),
    parallel=ParallelFacts(plans.LLAMA),
)
_GLM = _DENSE._replace(
    defaults={
        "head_dim": 128,
        "num_key_value_heads": 2,
        "intermediate_size": 13696,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
    },
    checkpoint=CheckpointFacts(gguf_fuses=True),
    parallel=ParallelFacts(plans.GLM, megatron=plans.GLM_MEGATRON, context=True),
)

_UNGATED_PLAN = TensorParallelPlan((*plans.QKV, "up_proj"), ("o_proj", "down_proj"))

FAMILIES: dict[str, Family] = {
    "apertus": _DENSE._replace(
        defaults={"intermediate_size": 14336, "hidden_act": "xielu"},
        objectives=("causal_lm",),
        acts=(*WRITTEN_OUT, "xielu"),
        stack="neox",
        parallel=ParallelFacts(_UNGATED_PLAN, context=True),
    ),
    "arcee": _DENSE._replace(
        defaults={"intermediate_size": 18432, "hidden_act": "relu2"},
        gated=False,
        stack="neox",
        checkpoint=CheckpointFacts(gguf="arcee"),
        parallel=ParallelFacts(_UNGATED_PLAN, context=True),
    ),
    "baichuan": Family(
        {"intermediate_size": None},  # 11008 in the code of the 7B model, 13696 in that of the 13B
        keys=ConfigKeys({**_EQUAL_HEADS, "max_position_embeddings": ("max_position_embeddings", "model_max_length")}),
        stack="published_code",
        generation=GenerationFacts(published_cache="tuples"),
        checkpoint=CheckpointFacts(gguf="baichuan"),
    ),
    "biogpt": _GPT2._replace(
        defaults={
            "tie_word_embeddings": True,
            "intermediate_size": 4096,
            "hidden_act": "gelu",
            "dropout": 0.1,
            "attention_dropout": 0.1,
            "max_position_embeddings": 1024,
        },
        keys=ConfigKeys(
            _EQUAL_HEADS,
            _WITH_POSITIONS,
            renamed={"hidden_dropout_prob": "dropout", "attention_probs_dropout_prob": "attention_dropout"},
        ),
        stack="bart",
    ),
    "bitnet": _ALONE._replace(
        defaults={"num_key_value_heads": 5, "intermediate_size": 6912, "hidden_act": "relu2"},
        acts=WRITTEN_OUT,
        objectives=("causal_lm",),
        keys=_NO_MLP_BIAS.keys,
    ),
    "bloom": _BLOOM,
    "chatglm": Family(
        {
            "partial_rotary_factor": 0.5,
            "multi_query_group_num": 1,
            "ffn_hidden_size": 13696,
            "kv_channels": 128,
            "seq_length": 2048,
        },
        keys=ConfigKeys(
            {
                "num_hidden_layers": ("num_hidden_layers", "num_layers"),
                "num_key_value_heads": ("multi_query_group_num",),
                "intermediate_size": ("ffn_hidden_size",),
                "vocab_size": ("padded_vocab_size",),
                "head_dim": ("kv_channels",),
                "max_position_embeddings": ("seq_length",),
            }
        ),
        kv_heads=_chatglm_heads,
        stack="chatglm",
        generation=GenerationFacts(published_cache="tuples"),
        checkpoint=CheckpointFacts(gguf_fuses=True),
    ),
    "codegen": _GPT_J,
    "cohere": _DENSE._replace(
        defaults={"tie_word_embeddings": True, "intermediate_size": 22528},
        checkpoint=CheckpointFacts(gguf="command-r", gguf_keys={}, gguf_switches={"use_qk_norm": "attn_q_norm.weight"}),
        serving=ServingFacts(adapts_tables=True),
        objectives=("causal_lm",),
    ),
    "cohere2": _DENSE._replace(
        defaults={"tie_word_embeddings": True, "intermediate_size": 22528, "sliding_window": 4096},
        layers=windows.all_but_every(4, unrotated="always"),
        generation=GenerationFacts(ignores_early_exit=True),
        checkpoint=CheckpointFacts(gguf="cohere2", gguf_keys={}),
        parallel=ParallelFacts(plans.LLAMA),
        serving=ServingFacts(adapts_tables=True),
        objectives=("causal_lm",),
    ),
    "cwm": _DENSE._replace(
        defaults={"num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 21504, "sliding_window": 8192},
        layers=windows.all_but_every(4, fixed=True, first=True),
        parallel=ParallelFacts(plans.LLAMA),
        serving=ServingFacts(is_modelled=False),
        objectives=("causal_lm",),
    ),
    "diffllama": _ALONE._replace(defaults={"intermediate_size": 8192}, axes=windows.half_the_heads, stack="diffllama"),
    "ernie4_5": _DENSE._replace(
        defaults={"tie_word_embeddings": True, "head_dim": 128, "num_key_value_heads": 2, "intermediate_size": 3072},
        checkpoint=CheckpointFacts(gguf="ernie4_5", gguf_keys={}),
        objectives=("causal_lm",),
    ),
    "exaone": _LLAMA_ROW._replace(
        defaults={"num_key_value_heads": 8, "intermediate_size": 14336},
        keys=ConfigKeys(
            {
                "num_hidden_layers": ("num_layers", "num_hidden_layers"),
                "hidden_act": ("activation_function", "hidden_act"),
            }
        ),
        built_as="llama",
        objectives=("causal_lm",),
    ),
    "exaone4": _DENSE._replace(
        defaults={"num_key_value_heads": 32, "intermediate_size": 16384, "sliding_window": 4096},
        layers=windows.all_but_every(4, unrotated="among windows"),
        stack="olmo",
        generation=GenerationFacts(ignores_early_exit=True),
        checkpoint=CheckpointFacts(gguf="exaone4", gguf_keys={}, gguf_modules=_POST_NORM),
        parallel=ParallelFacts(plans.LLAMA),
        serving=ServingFacts(adapts_tables=True),
    ),
    "falcon": _GPT_LIKE._replace(
        defaults={"tie_word_embeddings": True, "multi_query": True, "parallel_attn": True, "activation": "gelu"},
        keys=ConfigKeys(
            {
                "hidden_size": ("n_embed", "hidden_size"),
                "num_key_value_heads": ("num_kv_heads",),
                "intermediate_size": ("ffn_hidden_size",),
                "head_dim": (),
                "hidden_act": ("activation",),
            }
        ),
        kv_heads=_falcon_heads,
        stack="falcon",
        attention=AttentionFacts(single_sequence="views"),
        checkpoint=CheckpointFacts(
            gguf="falcon",
            gguf_keys={"attention.head_count_kv": "num_kv_heads", "feed_forward_length": "ffn_hidden_size"},
            gguf_switches={"new_decoder_architecture": "attn_norm_2.weight", "bias": "attn_qkv.bias"},
        ),
    ),
    "gemma": _DENSE._replace(
        defaults={"tie_word_embeddings": True, "head_dim": 256, "num_key_value_heads": 16, "intermediate_size": 24576},
        stack="gemma",
        checkpoint=CheckpointFacts(gguf="gemma", gguf_keys={}),
    ),
    "gemma2": _GEMMA._replace(
        defaults={**_GEMMA.defaults, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        layers=windows.all_but_every(2, fixed=True),
        checkpoint=CheckpointFacts(
            gguf="gemma2",
            gguf_keys={name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")},
            gguf_modules=_POST_NORM,
        ),
    ),
    "gemma3_text": _GEMMA,
    "glm": _GLM,
    "glm4": _GLM._replace(
        checkpoint=CheckpointFacts(
            gguf="glm4", gguf_keys={}, gguf_switches={"attention_bias": "attn_q.bias"}, gguf_fuses=True
        )
    ),
    "gpt2": _GPT2._replace(
        checkpoint=CheckpointFacts(gguf="gpt2", gguf_keys=_GGUF_GPT),
        parallel=ParallelFacts(megatron=TensorParallelPlan(("c_attn", "c_fc"), ("c_proj",))),
    ),
    "gpt_bigcode": _GPT2._replace(
        defaults={**_GPT2.defaults, "activation_function": "gelu_pytorch_tanh", "multi_query": True},
        kv_heads=_multi_query,
        attention=AttentionFacts(rotary=False),
        checkpoint=CheckpointFacts(gguf="starcoder"),
    ),
    "gpt_neo": _GPT2._replace(
        defaults={"tie_word_embeddings": True, "activation_function": "gelu_new", "max_position_embeddings": 2048},
        keys=ConfigKeys(
            {
                **_EQUAL_HEADS,
                "num_hidden_layers": ("num_hidden_layers", "num_layers"),
                "num_attention_heads": ("num_attention_heads", "num_heads"),
                "hidden_act": ("activation_function",),
            },
            _WITH_POSITIONS,
        ),
    ),
    "gpt_neox": _GPT_LIKE._replace(
        defaults={
            "rotary_pct": 0.25,
            "intermediate_size": 24576,
            "attention_bias": True,
            "use_parallel_residual": True,
            "hidden_act": "gelu",
        },
        keys=ConfigKeys(_EQUAL_HEADS),
        stack="neox",
        checkpoint=CheckpointFacts(gguf="gptneox"),
        parallel=ParallelFacts(
            TensorParallelPlan(("query_key_value", "dense_h_to_4h"), ("dense", "dense_4h_to_h")), context=True
        ),
    ),
    "gptj": _GPT_J._replace(parallel=ParallelFacts(TensorParallelPlan((*plans.QKV, "fc_in"), ("out_proj", "fc_out")))),
    "granite": _DENSE._replace(
        checkpoint=CheckpointFacts(gguf="granite", gguf_keys={}, gguf_switches=_BIASES),
        serving=ServingFacts(adapts_tables=True),
        objectives=("causal_lm",),
    ),
    "helium": _ALONE._replace(defaults={"num_key_value_heads": 20, "head_dim": 128, "intermediate_size": 7040}),
    "hunyuan_v1_dense": _NO_MLP_BIAS._replace(
        checkpoint=CheckpointFacts(gguf="hunyuan-dense", gguf_keys={}),
        parallel=ParallelFacts(TensorParallelPlan(), context=True),
    ),
    "hyperclovax": _ALONE._replace(defaults={**_LLAMA, "use_post_norm": True}, objectives=("causal_lm",)),
    "internlm2": Family(
        {"bias": True, "intermediate_size": 11008},
        keys=ConfigKeys({"head_dim": ()}),
        stack="published_code",
        generation=GenerationFacts(published_cache="any"),
        checkpoint=CheckpointFacts(
            gguf="internlm2", gguf_keys={"attention.key_length": None}, gguf_switches={"bias": "attn_q.bias"}
        ),
    ),
    "internlm3": _DENSE._replace(
        defaults={"num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 10240},
        keys=ConfigKeys(renamed={"qkv_bias": "attention_bias", "bias": "mlp_bias"}),
        checkpoint=CheckpointFacts(gguf="llama"),
        objectives=("causal_lm",),
    ),
    "iquestcoder": _LLAMA_ROW._replace(
        defaults={"num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 27648}, built_as="llama"
    ),
    "jais2": _DENSE._replace(
        defaults={"intermediate_size": 26624, "hidden_act": "relu2", "attention_bias": True, "mlp_bias": True},
        gated=False,
        objectives=("causal_lm",),
        stack="neox",
        parallel=ParallelFacts(_UNGATED_PLAN, context=True),
        serving=ServingFacts(is_modelled=False),
    ),
    "llama": _LLAMA_ROW,
    "mimo": _NO_MLP_BIAS._replace(
        defaults=_QWEN2,
        attention=AttentionFacts(),
        checkpoint=CheckpointFacts(gguf="qwen2"),
        objectives=("causal_lm",),
        parallel=ParallelFacts(),
    ),
    "minicpm": Family(
        {"tie_word_embeddings": True, "intermediate_size": 11008},
        keys=ConfigKeys({"head_dim": ()}),
        stack="published_code",
        generation=GenerationFacts(published_cache="grows"),
        checkpoint=CheckpointFacts(
            gguf="minicpm", gguf_keys={"attention.key_length": None}, gguf_switches={"attention_bias": "attn_q.bias"}
        ),
        serving=ServingFacts(adapts_tables=True),
    ),
    "ministral": _NO_MLP_BIAS._replace(
        defaults={"num_key_value_heads": 8, "intermediate_size": 14336, "sliding_window": 4096},
        layers=windows.windows_everywhere,
        parallel=ParallelFacts(plans.LLAMA),
    ),
    "ministral3": _NO_MLP_BIAS._replace(
        defaults={"num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336, "sliding_window": None},
        checkpoint=CheckpointFacts(gguf="mistral3", gguf_keys={}),
    ),
    "mistral": _NO_MLP_BIAS._replace(
        defaults={"num_key_value_heads": 8, "intermediate_size": 14336, "sliding_window": 4096},
        checkpoint=CheckpointFacts(gguf="llama"),
        parallel=ParallelFacts(plans.LLAMA, context=True, gpt=plans.GPT),
        serving=ServingFacts(adapts_tables=True, llama_cpp_window=False),
    ),
    "mpt": _BLOOM._replace(
        defaults={"tie_word_embeddings": True, "max_seq_len": 2048},
        keys=ConfigKeys(
            {
                **_BLOOM_NAMES,
                "hidden_size": ("hidden_size", "d_model"),
                "num_hidden_layers": ("num_hidden_layers", "n_layers"),
                "num_attention_heads": ("num_attention_heads", "n_heads"),
                "max_position_embeddings": ("max_seq_len",),
            }
        ),
        checkpoint=CheckpointFacts(gguf="mpt"),
    ),
    "nanochat": _ALONE._replace(
        defaults={"intermediate_size": 8192, "hidden_act": "relu2", "final_logit_softcapping": 15.0},
        keys=ConfigKeys({"head_dim": ()}),
        objectives=("causal_lm",),
        gated=False,
        stack="neox",
    ),
    "nemotron": _GPT_LIKE._replace(
        defaults={"partial_rotary_factor": 0.5, "intermediate_size": 24576, "hidden_act": "relu2"},
        objectives=CLASSIFIER,
        stack="neox",
        checkpoint=CheckpointFacts(gguf="nemotron", gguf_keys={}),
        parallel=ParallelFacts(_UNGATED_PLAN, context=True),
        serving=ServingFacts(adapts_tables=True),
    ),
    "nemotron-nas": Family(
        {},
        keys=ConfigKeys({"num_key_value_heads": (), "intermediate_size": ()}),
        layers=windows.nas_layers,
        stack="nemotron_nas",
    ),
    "olmo": _DENSE._replace(stack="olmo", checkpoint=CheckpointFacts(gguf="olmo", gguf_keys={})),
    "olmo2": _DENSE._replace(
        stack="olmo",
        checkpoint=CheckpointFacts(gguf="olmo2", gguf_keys={}, gguf_modules=_POST_NORM),
        parallel=ParallelFacts(plans.OLMO_2, context=True),
    ),
    "olmo3": _DENSE._replace(
        defaults={**_LLAMA, "sliding_window": 4096},
        layers=windows.all_but_every(4, fixed=True),
        stack="olmo",
        checkpoint=CheckpointFacts(gguf="olmo2", gguf_modules=_POST_NORM),
        parallel=ParallelFacts(plans.OLMO_2),
    ),
    "opt": _GPT2._replace(
        defaults={
            "tie_word_embeddings": True,
            "dropout": 0.1,
            "do_layer_norm_before": True,
            "activation_function": "relu",
            "ffn_dim": 3072,
            "max_position_embeddings": 2048,
        },
        keys=ConfigKeys(
            {**_EQUAL_HEADS, "intermediate_size": ("ffn_dim",), "hidden_act": ("activation_function",)}, _WITH_POSITIONS
        ),
        stack="opt",
    ),
    "phi": _LAYER_NORM._replace(
        defaults={"partial_rotary_factor": 0.5, "intermediate_size": 8192, "hidden_act": "gelu_new"},
        training=TrainingFacts(late_dropout=True),
        checkpoint=CheckpointFacts(gguf="phi2", gguf_keys={}, gguf_switches={"qk_layernorm": "attn_q_norm.weight"}),
        parallel=ParallelFacts(TensorParallelPlan((*plans.QKV, "fc1"), ("dense", "fc2")), context=True),
    ),
    "phi3": _DENSE._replace(
        defaults={"partial_rotary_factor": 1.0, "intermediate_size": 8192, "sliding_window": None},
        checkpoint=CheckpointFacts(gguf="phi3", gguf_keys={"attention.sliding_window": None}, gguf_fuses=True),
        parallel=ParallelFacts(
            TensorParallelPlan((), (), ("qkv_proj", "gate_up_proj"), ("o_proj", "down_proj")),
            megatron=TensorParallelPlan(("qkv_proj", "gate_up_proj"), ("o_proj", "down_proj")),
            context=True,
        ),
        serving=ServingFacts(llama_cpp_window=False),
    ),
    "qwen": Family(
        {"rotary_pct": 1.0, "intermediate_size": 22016, "kv_channels": 128},
        keys=ConfigKeys(
            {  # its first configs have GPT-2's names
                "hidden_size": ("hidden_size", "n_embd"),
                "num_hidden_layers": ("num_hidden_layers", "n_layer"),
                "num_attention_heads": ("num_attention_heads", "n_head"),
                "num_key_value_heads": (),
                "intermediate_size": ("intermediate_size", "ffn_hidden_size"),
                "head_dim": ("kv_channels",),
                "max_position_embeddings": ("max_position_embeddings", "n_positions"),
            }
        ),
        stack="published_code",
        generation=GenerationFacts(published_cache="tuples"),
        checkpoint=CheckpointFacts(gguf="qwen", gguf_modules={"mlp.w2": "ffn_gate", "mlp.w1": "ffn_up"}),
    ),
    "qwen2": _NO_MLP_BIAS._replace(
        defaults={**_QWEN2, "use_sliding_window": False, "sliding_window": 4096},
        layers=windows.windows_after,
        checkpoint=CheckpointFacts(gguf="qwen2", gguf_keys={}),
        parallel=ParallelFacts(plans.LLAMA, context=True, gpt={**plans.GPT, "add_qkv_bias": True}),
    ),
    "qwen3": _NO_MLP_BIAS._replace(
        defaults={**_QWEN2, "head_dim": 128, "use_sliding_window": False, "sliding_window": 4096},
        layers=windows.windows_after,
        checkpoint=CheckpointFacts(
            half_scales=True, gguf="qwen3", gguf_keys={}, gguf_switches={"attention_bias": "attn_q.bias"}
        ),
        parallel=ParallelFacts(plans.LLAMA, context=True, gpt={**plans.GPT, "qk_layernorm": True}),
        serving=ServingFacts(adapts_tables=True),
    ),
    "seed_oss": _DENSE._replace(
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 27648,
            "attention_bias": True,
            "attention_dropout": 0.1,
            "residual_dropout": 0.1,
        },
        checkpoint=CheckpointFacts(
            gguf="seed_oss",
            gguf_keys={},
            gguf_switches={
                "attention_bias": "attn_q.bias",
                "attention_out_bias": "attn_output.bias",
                "mlp_bias": "ffn_down.bias",
            },
        ),
    ),
    "smollm3": _DENSE._replace(
        defaults={
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "intermediate_size": 11008,
            "no_rope_layer_interval": 4,
            "use_sliding_window": False,
            "sliding_window": None,
        },
        layers=windows.some_rotary,
        checkpoint=CheckpointFacts(gguf="smollm3", gguf_keys={}),
    ),
    "stablelm": Family(
        {"partial_rotary_factor": 0.25, "num_key_value_heads": 32, "intermediate_size": 6912},
        keys=ConfigKeys({"head_dim": ()}),
        objectives=CLASSIFIER,
        stack="stablelm",
        generation=GenerationFacts(ignores_early_exit=True),
        checkpoint=CheckpointFacts(
            gguf="stablelm",
            gguf_keys={},
            gguf_switches={"use_qkv_bias": "attn_q.bias", "qk_layernorm": "attn_q_norm.weight"},
        ),
    ),
    "starcoder2": _LAYER_NORM._replace(
        defaults={
            "tie_word_embeddings": True,
            "num_key_value_heads": 2,
            "intermediate_size": 12288,
            "sliding_window": None,
            "use_bias": True,
            "hidden_act": "gelu_pytorch_tanh",
        },
        checkpoint=CheckpointFacts(gguf="starcoder2", gguf_keys={}, gguf_switches={"use_bias": "attn_q.bias"}),
        parallel=ParallelFacts(TensorParallelPlan((*plans.QKV, "c_fc"), ("o_proj", "c_proj")), context=True),
        serving=ServingFacts(llama_cpp_window=False),
    ),
    "vaultgemma": _GEMMA._replace(
        defaults={**_GEMMA.defaults, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        layers=windows.all_but_every(2, fixed=True),
        objectives=("causal_lm",),
        checkpoint=CheckpointFacts(),
        parallel=ParallelFacts(),
        serving=ServingFacts(is_modelled=False),
    ),
}
