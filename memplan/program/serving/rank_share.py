"""The part of a stored weight on one GPU, given its pipeline stage and its rank.

Source: vllm 0.33.0 model_executor/layers/linear.py and vocab_parallel_embedding.py, whose classes SGLang and TGI took.
"""

from __future__ import annotations

import re
import string

from memplan.program.serving.settings import Settings
from memplan.program.stored.gguf import names_in_gguf
from memplan.program.stored.weights import StoredWeight

# Projections to a latent, and an indexer's, which every rank has whole.
WHOLE = frozenset(("q_a_proj", "kv_a_proj_with_mqa", "kv_a_proj", "indexer", "wk", "wq_b", "weights_proj"))
_FUSED = frozenset(("qkv_proj", "c_attn", "query_key_value", "Wqkv", "W_pack", "wqkv", "qkv"))
_KEYS = frozenset(("k_proj", "v_proj"))
_POSITIONS = frozenset(("wpe", "embed_positions", "position_embeddings", "position_embedding"))
TOWERS = ("vision", "projector", "audio")


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a weight belongs to, None outside of layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def buffer_of(s: Settings, w: StoredWeight) -> str:
    """Return the buffer that llama.cpp is told to keep a tensor in, such as `CPU` or `CUDA1`; empty if it is not told.

    A parameter that a file stores as several tensors is moved if all of them are.
    Source: llama.cpp (llama-cpp-python 0.3.36) src/llama-model-loader.cpp create_tensor.
    """
    overrides = s.serving.overrides
    if not overrides:
        return ""
    in_file = w.part and w.dtype.isupper()  # ggml's types
    names = (w.part,) if in_file else names_in_gguf(s.model).get(w.name, ())
    matched = {next((b for pattern, b in overrides if re.search(pattern, name)), "") for name in names}
    return matched.pop() if len(matched) == 1 else ""


def is_on_stage(s: Settings, w: StoredWeight) -> bool:
    """Whether the stage has the weight. llama.cpp keeps the embeddings on the host, but a tied table on both."""
    stage, llama_cpp = s.stage, s.engine.kind == "llama.cpp"
    if w.group in TOWERS:  # llama.cpp loads a tower from a file of its own
        text_only = s.engine.kind == "vllm" and s.serving.limit_images == 0 and s.serving.limit_videos in (0, None)
        return not (llama_cpp or text_only) and (stage.number == 0 or s.behaviour.towers == "all")
    buffer = buffer_of(s, w) if llama_cpp else ""
    if buffer:
        return buffer[-1].isdigit() and int(buffer.lstrip(string.ascii_letters)) == stage.number
    layer = layer_of(w.name)
    if layer is not None:
        return stage.first <= layer < stage.last
    if w.group == "buffer" and llama_cpp:  # rotary factors, which every GPU with layers has
        return stage.layers > 0
    if w.group == "embedding":
        return stage.headed and s.model.tie_word_embeddings if llama_cpp else stage.embedded
    return stage.headed


_VOCABULARY_PADDING = 64  # vllm 0.33.0 vocab_parallel_embedding.py DEFAULT_VOCAB_PADDING_SIZE


def rows_of(tokens: int) -> int:
    """Return the rows of an embedding table for `tokens` tokens, with padding."""
    return -(-tokens // _VOCABULARY_PADDING) * _VOCABULARY_PADDING


def bytes_on_rank(s: Settings, w: StoredWeight) -> int:
    """Return the bytes of a tensor on one rank."""
    words, tp = frozenset(w.name.split(".")), s.tp
    if w.group in ("embedding", "lm_head") and not words & _POSITIONS and len(w.shape) == 2:
        rows = w.shape[0]
        row_bytes = w.bytes // rows if w.bytes % rows == 0 else None
        if row_bytes is not None and rows == s.model.vocab_size:
            return rows_of(rows) * row_bytes // (tp if w.group == "embedding" else s.ranks.dense)
    if "experts" in words:
        return _experts_bytes(s, w)
    if w.group == "mlp":
        tp = 1 if words & SHARED and has_whole_shared_experts(s) else s.ranks.dense
    if tp == 1 or len(w.shape) < 2 or w.group in ("norm", "router") or words & WHOLE or words & _POSITIONS:
        return w.bytes
    if words & s.model.family.serving.whole:
        return w.bytes
    if w.group in TOWERS:
        return -(-w.bytes // tp)
    return heads_of(s, words, w.bytes, tp)


def heads_of(s: Settings, words: frozenset[str], whole: int, ranks: int) -> int:
    """Return a rank's part of a matrix divided by its outputs. If key/value heads are fewer than ranks, they are
    replicated."""
    a, k = s.model.num_attention_heads, s.model.num_key_value_heads
    if words & _KEYS:
        return whole * -(-k // ranks) // k
    if words & _FUSED:
        return whole * (a // ranks + 2 * -(-k // ranks)) // (a + 2 * k)
    return -(-whole // ranks)


SHARED = frozenset(("shared_expert", "shared_experts"))


def has_whole_shared_experts(s: Settings) -> bool:
    """Whether ranks have shared experts whole, as in vLLM if ranks divide the tokens before the experts.

    Source: vllm 0.33.0 config/parallel.py use_sequence_parallel_moe, models/deepseek_v2.py DeepseekV2MLP.
    """
    return s.engine.kind == "vllm" and s.ranks.ep > 1 and s.tp > 1 and s.ranks.sharing > 1


def _experts_bytes(s: Settings, w: StoredWeight) -> int:
    """Return the bytes of a layer's experts on the rank with most: its share of the experts, and of their width."""
    experts, ep, etp = s.model.axes().get("E", 1), s.ranks.ep, s.ranks.etp
    mine = w.bytes * -(-experts // ep) // experts
    is_output_bias = w.shape[:1] == (experts,) and len(w.shape) == 2 and "gate_up" not in w.name
    return mine if is_output_bias else -(-mine // etp)
