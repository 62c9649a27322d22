"""What of a matrix is on one card: of those of a pipeline's stage, a rank's part.

Source: vllm 0.33.0 model_executor/layers/linear.py and vocab_parallel_embedding.py, whose classes SGLang and TGI took.
"""

from __future__ import annotations

from memplan.program.serving.settings import Settings
from memplan.program.stored.weights import StoredWeight

# Projections to a latent, and an indexer's, which every rank computes whole.
WHOLE = frozenset(("q_a_proj", "kv_a_proj_with_mqa", "kv_a_proj", "indexer", "wk", "wq_b", "weights_proj"))
_OF_STREAMS = frozenset(("attn_hc", "ffn_hc", "hc_head", "compressor", "kv_proj"))  # DeepSeek V4's
_FUSED = frozenset(("qkv_proj", "c_attn", "query_key_value", "Wqkv", "W_pack", "wqkv", "qkv"))
_KEYS = frozenset(("k_proj", "v_proj"))
_POSITIONS = frozenset(("wpe", "embed_positions", "position_embeddings", "position_embedding"))
TOWERS = ("vision", "projector", "audio")


def layer_of(name: str) -> int | None:
    """The number of the layer that a weight is of."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def here(s: Settings, w: StoredWeight) -> bool:
    """Whether the stage has it. Of llama.cpp the embeddings stay with the host, but a tied table is there twice."""
    stage, llama_cpp = s.stage, s.engine.kind == "llama.cpp"
    if w.group in TOWERS:  # llama.cpp has a file of its own for a tower
        unseen = s.engine.kind == "vllm" and s.serving.limit_images == 0 and s.serving.limit_videos in (0, None)
        return not (llama_cpp or unseen) and (stage.number == 0 or s.words.get("towers", "all") == "all")
    layer = layer_of(w.name)
    if layer is not None:
        return stage.first <= layer < stage.last
    if w.group == "buffer" and llama_cpp:  # factors of rotations, which every card with layers has
        return stage.layers > 0
    if w.group == "embedding":
        return stage.headed and s.model.tie_word_embeddings if llama_cpp else stage.embedded
    return stage.headed


_ROUNDED = 64  # vllm 0.33.0 vocab_parallel_embedding.py DEFAULT_VOCAB_PADDING_SIZE


def rows_of(tokens: int) -> int:
    """Rows that a table of so many tokens is padded to."""
    return -(-tokens // _ROUNDED) * _ROUNDED


def of_rank(s: Settings, w: StoredWeight) -> int:
    """Bytes of a tensor on one of the ranks."""
    words, tp = frozenset(w.name.split(".")), s.tp
    if w.group in ("embedding", "lm_head") and not words & _POSITIONS and len(w.shape) == 2:
        rows = w.shape[0]
        each = w.bytes // rows if w.bytes % rows == 0 else None
        if each is not None and rows == s.model.vocab_size:
            return rows_of(rows) * each // (tp if w.group == "embedding" else s.ranks.dense)
    if "experts" in words:
        return _of_experts(s, w)
    if w.group == "mlp":
        tp = 1 if words & SHARED and apart(s) else s.ranks.dense
    if tp == 1 or len(w.shape) < 2 or w.group in ("norm", "router") or words & WHOLE or words & _POSITIONS:
        return w.bytes
    if s.model.model_type == "deepseek_v4" and words & _OF_STREAMS:
        return w.bytes
    if w.group in TOWERS:
        return -(-w.bytes // tp)
    return heads_of(s, words, w.bytes, tp)


def heads_of(s: Settings, words: frozenset[str], whole: int, ranks: int) -> int:
    """A rank's part of the outputs of a matrix. Key/value heads that are fewer than ranks are there several times."""
    a, k = s.model.num_attention_heads, s.model.num_key_value_heads
    if words & _KEYS:
        return whole * -(-k // ranks) // k
    if words & _FUSED:
        return whole * (a // ranks + 2 * -(-k // ranks)) // (a + 2 * k)
    return -(-whole // ranks)


SHARED = frozenset(("shared_expert", "shared_experts"))


def apart(s: Settings) -> bool:
    """Whether ranks have shared experts whole: vLLM's where they divide the tokens among them before the experts.
    Source: vllm 0.33.0 config/parallel.py use_sequence_parallel_moe, models/deepseek_v2.py DeepseekV2MLP."""
    return s.engine.kind == "vllm" and s.ranks.ep > 1 and s.tp > 1 and s.ranks.sharing > 1


def _of_experts(s: Settings, w: StoredWeight) -> int:
    """A rank's part of a layer's experts: so many of them, the most that one has, and of each a part of its width."""
    experts, ep, etp = s.model.axes().get("E", 1), s.ranks.ep, s.ranks.etp
    mine = w.bytes * -(-experts // ep) // experts
    whole = w.shape[:1] == (experts,) and len(w.shape) == 2 and "gate_up" not in w.name  # a bias of the outputs
    return mine if whole else -(-mine // etp)
