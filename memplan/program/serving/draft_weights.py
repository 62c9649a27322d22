"""A draft's weights on a rank, and what the engine makes for it.

Source: vllm 0.33.0 model_executor/models/llama_eagle.py and llama_eagle3.py, deepseek_mtp.py,
v1/worker/gpu/spec_decode; sglang 0.5.23 speculative/eagle_worker_v2.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.core.units import ITEMSIZE
from memplan.program.serving.draft import layers_ahead
from memplan.program.serving.model_weights import TABLE, Held, model_weights
from memplan.program.serving.rank_share import layer_of, of_rank, rows_of
from memplan.program.serving.settings import Draft, Settings
from memplan.program.stored.weights import stored_weights


def draft_weights(s: Settings) -> Iterator[Held]:
    """The draft's weights on a rank, and what the engine makes for it."""
    draft = s.draft
    if draft is None or draft.settings is None:
        return
    if draft.method == "draft_model":
        for h in model_weights(draft.settings):
            if h.group != TABLE:
                yield h._replace(what=f"{h.what} of the draft model")
    elif draft.method == "mtp":
        yield from _layers_that_predict(s)
    else:
        yield from _head(draft.settings, draft.method)
    if s.engine.kind == "vllm":
        yield from _inputs(s, draft)
    if s.engine.kind == "sglang" and draft.method != "draft_model":
        yield from _copies(s, draft)


def _layers_that_predict(s: Settings) -> Iterator[Held]:
    """Each as the last layer, with a projection of an embedding and hidden states side by side, and three norms."""
    m, many = s.model, layers_ahead(s.model)
    found: dict[tuple[str, str, str], list[int]] = {}
    for w in stored_weights(m, s.quantization, s.dtype):
        if layer_of(w.name) == m.num_hidden_layers - 1:
            entry = found.setdefault((w.group, w.dtype, w.source), [0, 0])
            entry[0] += many
            entry[1] += many * of_rank(s, w)
    for (group, dtype, source), (count, bytes_) in found.items():
        yield Held(f"{group} of layers that predict ahead", group, count, dtype, bytes_, source)
    h = m.hidden_size
    source = f"{_VLLM} model_executor/models/deepseek_mtp.py DeepSeekMultiTokenPredictorLayer: eh_proj, enorm, hnorm"
    bytes_ = many * (2 * h * h + 3 * h) * ITEMSIZE[s.dtype]
    yield Held("projections and norms of layers that predict ahead", "mlp", 4 * many, s.dtype, bytes_, source)


def _head(own: Settings, method: str) -> Iterator[Held]:
    """A head's layers, with what they read beside each other: of EAGLE an embedding and hidden states through one
    matrix; of EAGLE 3 hidden states of three layers so, beside an embedding in the first layer's q, k and v."""
    m = own.model
    h, size = m.hidden_size, ITEMSIZE[own.dtype]
    of_target = m.whole("target_hidden_size", h)
    layers = [w for w in stored_weights(m, own.quantization, own.dtype) if layer_of(w.name) is not None]
    bytes_ = sum(of_rank(own, w) for w in layers)
    count = len(layers)
    if method == "eagle":
        source = f"{_VLLM} model_executor/models/llama_eagle.py: no norm before the first layer or after the last"
        yield Held("layers of the EAGLE head", "mlp", count - 1, own.dtype, bytes_ - h * size, source)
        joined = 2 * h * h
        yield Held("projection of the EAGLE head", "mlp", 1, own.dtype, joined * size, source)
        return
    source = f"{_VLLM} model_executor/models/llama_eagle3.py LlamaDecoderLayer, LlamaModel.fc, d2t"
    wider = sum(of_rank(own, w) for w in layers if layer_of(w.name) == 0 and w.name.split(".")[-2] in _QKV)
    yield Held("layers of the EAGLE 3 head", "mlp", count, own.dtype, bytes_ + wider, source)
    norms = 2 * h  # of hidden states before the first layer, and after the last
    yield Held(
        "projection and norms of the EAGLE 3 head", "mlp", 3, own.dtype, (3 * of_target * h + norms) * size, source
    )
    words = m.whole("draft_vocab_size", m.vocab_size)
    yield Held("head of the EAGLE 3 head", "lm_head", 1, own.dtype, rows_of(words) * h * size // own.tp, source)
    if words != m.vocab_size:
        yield Held("which tokens those are", "buffer", 1, "int64", 8 * words, source)


_QKV = frozenset(("q_proj", "k_proj", "v_proj"))
_VLLM = "vllm 0.33.0"


def _copies(s: Settings, draft: Draft) -> Iterator[Held]:
    """SGLang makes a head's embeddings and output projection before it knows that they are the model's, and lets them
    go when the pool has been made without their bytes."""
    assert draft.settings is not None
    m = draft.settings.model
    bytes_ = rows_of(m.vocab_size) * m.hidden_size * ITEMSIZE[s.dtype] // s.tp
    source = "sglang 0.5.23 speculative/eagle_worker_v2.py alloc_memory_pool, init_lm_head; managers/scheduler.py"
    count = 1 if draft.method == "eagle3" else 2
    made = "embeddings" if count == 1 else "embeddings and head"
    what = f"{made} made for the draft, until the pool is there"
    yield Held(what, "embedding", count, s.dtype, count * bytes_, source)


def _inputs(s: Settings, draft: Draft) -> Iterator[Held]:
    """What vLLM's runner makes for the draft: its inputs, one more a request of a model by itself; of a head hidden
    states of every token of a step; and masks for every token that is proposed."""
    requests, tokens = s.serving.max_num_seqs or 1, s.steps
    source = f"{_VLLM} v1/worker/gpu/spec_decode"
    proposed = requests * draft.tokens * (8 + 4)
    yield Held("proposed tokens, and how sure they are", TABLE, 2, "int64", proposed, f"{source}/speculator.py")
    if draft.method == "draft_model":
        rows = (tokens + requests) * (4 + 8 + 8)
        yield Held("inputs of the draft model", TABLE, 3, "int64", rows, f"{source}/standalone_ar/speculator.py")
        return
    assert draft.settings is not None
    wide = tokens * draft.settings.model.hidden_size * ITEMSIZE[s.dtype]
    yield Held("hidden states for the head", TABLE, 1, s.dtype, wide, f"{source}/target_dependent_ar/speculator.py")
