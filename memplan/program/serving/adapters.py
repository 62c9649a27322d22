"""Adapter slots that an engine allocates before its pool: A and B of the largest rank for every matrix it adapts.

Source: vllm 0.33.0 lora/layers/base_linear.py, column_parallel_linear.py, row_parallel_linear.py, fused_moe.py,
vocab_parallel_embedding.py, logits_processor.py create_lora_weights, lora/utils.py get_supported_lora_modules; sglang
0.5.23 lora/mem_pool.py, whose buffers are the same, but without embeddings, head and routers.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.program.serving.rank_share import SHARED, WHOLE, has_whole_shared_experts, heads_of, is_on_stage, layer_of
from memplan.program.serving.settings import Settings
from memplan.program.stored.weights import StoredWeight, stored_weights

# Matrices that ranks divide by their inputs: A is divided, B is whole.
_ROWS = frozenset(("o_proj", "down_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "w2", "wo", "fc_out"))


def slot(s: Settings, divided: bool = True) -> int:
    """Return the elements of one adapter of the largest rank: the GPU's part, or with `divided` off the entire adapter,
    as kept on the host."""
    rank = s.serving.lora_rank or 0
    weights = {w.name: w for w in stored_weights(s.model, None, s.dtype)}.values()
    return rank * sum(sum(_widths(s, w, divided)) for w in weights if not divided or is_on_stage(s, w))


def _widths(s: Settings, w: StoredWeight, divided: bool) -> Iterator[int]:
    """Yield the columns of A and the rows of B, on a rank or in total."""
    words, last = frozenset(w.name.split(".")), w.name.removesuffix(".weight").rpartition(".")[2]
    vllm = s.engine.kind == "vllm"
    if w.group in ("embedding", "lm_head") and vllm and s.model.family.serving.adapts_tables and len(w.shape) == 2:
        yield from w.shape  # whole on every rank
        if w.group == "embedding" and s.model.tie_word_embeddings:
            yield from w.shape
        return
    kinds = ("attention", "mixer", "mlp", "router") if vllm else ("attention", "mixer", "mlp")
    if w.group not in kinds or layer_of(w.name) is None or len(w.shape) < 2:
        return
    out, into = w.shape[-2:]
    if "experts" in words:
        if len(w.shape) != 3:  # a bias
            return
        ep, etp = (s.ranks.ep, s.ranks.etp) if divided else (1, 1)
        mine = -(-w.shape[0] // ep)
        if last.startswith("gate_up"):
            yield mine * into * (1 if s.model.family.serving.shares_gate_a else 2)
            yield mine * -(-out // etp)
        else:
            yield mine * -(-into // etp)
            yield mine * out
        return
    whole = w.group == "router" or words & WHOLE or (words & SHARED and has_whole_shared_experts(s)) or not divided
    ranks = 1 if whole else s.ranks.dense if w.group == "mlp" else s.tp
    yield -(-into // ranks) if last in _ROWS else into
    yield out if last in _ROWS else heads_of(s, words, out, ranks)
