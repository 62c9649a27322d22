"""Weights on one rank of a serving engine: the model's, its draft's, and the buffers that it makes for the draft.

Source: vllm 0.33.0 model_executor/models/llama_eagle.py and llama_eagle3.py, deepseek_mtp.py,
v1/worker/gpu/spec_decode; sglang 0.5.23 speculative/eagle_worker_v2.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from memplan.core.units import ITEMSIZE
from memplan.program.serving.draft import layers_ahead
from memplan.program.serving.model_weights import TABLE, WeightGroup, model_weights
from memplan.program.serving.rank_share import bytes_on_rank, layer_of, rows_of
from memplan.program.serving.settings import Draft, Settings
from memplan.program.stored.weights import stored_weights


@lru_cache(maxsize=256)
def rank_weights(s: Settings) -> tuple[WeightGroup, ...]:
    """Return the weights on one GPU, by group and dtype."""
    return (*model_weights(s), *draft_weights(s))


def draft_weights(s: Settings) -> Iterator[WeightGroup]:
    """Yield the draft's weights on a rank, and the buffers that the engine makes for it."""
    draft = s.draft
    if draft is None or draft.settings is None:
        return
    if draft.method == "draft_model":
        for h in model_weights(draft.settings):
            if h.group != TABLE:
                yield h._replace(what=f"{h.what} of the draft model")
    elif draft.method == "mtp":
        yield from _mtp_layers(s)
    else:
        yield from _eagle_head(draft.settings, draft.method)
    if s.engine.kind == "vllm":
        yield from _inputs(s, draft)
    if s.engine.kind == "sglang" and draft.method != "draft_model":
        yield from _temporary_copies(s, draft)


def _mtp_layers(s: Settings) -> Iterator[WeightGroup]:
    """Yield the multi-token prediction layers. Each equals the last layer, plus three norms and a projection of the
    concatenated embedding and hidden state."""
    m, layers = s.model, layers_ahead(s.model)
    groups: dict[tuple[str, str, str], list[int]] = {}
    for w in stored_weights(m, s.quantization, s.dtype):
        if layer_of(w.name) == m.num_hidden_layers - 1:
            entry = groups.setdefault((w.group, w.dtype, w.source), [0, 0])
            entry[0] += layers
            entry[1] += layers * bytes_on_rank(s, w)
    for (group, dtype, source), (count, bytes_) in groups.items():
        yield WeightGroup(f"{group} of layers that predict ahead", group, count, dtype, bytes_, source)
    h = m.hidden_size
    source = f"{_VLLM} model_executor/models/deepseek_mtp.py DeepSeekMultiTokenPredictorLayer: eh_proj, enorm, hnorm"
    bytes_ = layers * (2 * h * h + 3 * h) * ITEMSIZE[s.dtype]
    yield WeightGroup("projections and norms of layers that predict ahead", "mlp", 4 * layers, s.dtype, bytes_, source)


def _eagle_head(settings: Settings, method: str) -> Iterator[WeightGroup]:
    """Yield an EAGLE head's layers and projections.

    EAGLE projects the concatenated embedding and hidden state. EAGLE 3 projects hidden states of three layers, and its
    first layer's q, k and v read them concatenated with the embedding.
    """
    m = settings.model
    h, size = m.hidden_size, ITEMSIZE[settings.dtype]
    of_target = m.config_int("target_hidden_size", h)
    layers = [w for w in stored_weights(m, settings.quantization, settings.dtype) if layer_of(w.name) is not None]
    bytes_ = sum(bytes_on_rank(settings, w) for w in layers)
    count = len(layers)
    if method == "eagle":
        source = f"{_VLLM} model_executor/models/llama_eagle.py: no norm before the first layer or after the last"
        yield WeightGroup("layers of the EAGLE head", "mlp", count - 1, settings.dtype, bytes_ - h * size, source)
        joined = 2 * h * h
        yield WeightGroup("projection of the EAGLE head", "mlp", 1, settings.dtype, joined * size, source)
        return
    source = f"{_VLLM} model_executor/models/llama_eagle3.py LlamaDecoderLayer, LlamaModel.fc, d2t"
    wider = sum(bytes_on_rank(settings, w) for w in layers if layer_of(w.name) == 0 and w.name.split(".")[-2] in _QKV)
    yield WeightGroup("layers of the EAGLE 3 head", "mlp", count, settings.dtype, bytes_ + wider, source)
    norms = 2 * h  # one before the first layer, one after the last
    yield WeightGroup(
        "projection and norms of the EAGLE 3 head", "mlp", 3, settings.dtype, (3 * of_target * h + norms) * size, source
    )
    vocabulary = m.config_int("draft_vocab_size", m.vocab_size)
    head_bytes = rows_of(vocabulary) * h * size // settings.tp
    yield WeightGroup("head of the EAGLE 3 head", "lm_head", 1, settings.dtype, head_bytes, source)
    if vocabulary != m.vocab_size:
        yield WeightGroup("ids of the EAGLE 3 head's tokens", "buffer", 1, "int64", 8 * vocabulary, source)


_QKV = frozenset(("q_proj", "k_proj", "v_proj"))
_VLLM = "vllm 0.33.0"


def _temporary_copies(s: Settings, draft: Draft) -> Iterator[WeightGroup]:
    """Yield the embeddings and output projection that SGLang allocates for an EAGLE head before it shares the model's.
    They are freed after the pool has been sized without their bytes."""
    assert draft.settings is not None
    m = draft.settings.model
    bytes_ = rows_of(m.vocab_size) * m.hidden_size * ITEMSIZE[s.dtype] // s.tp
    source = "sglang 0.5.23 speculative/eagle_worker_v2.py alloc_memory_pool, init_lm_head; managers/scheduler.py"
    count = 1 if draft.method == "eagle3" else 2
    copies = "embeddings" if count == 1 else "embeddings and head"
    what = f"{copies} made for the draft, until the pool is there"
    yield WeightGroup(what, "embedding", count, s.dtype, count * bytes_, source)


def _inputs(s: Settings, draft: Draft) -> Iterator[WeightGroup]:
    """Yield the buffers that vLLM's runner makes for the draft: proposed tokens and their probabilities, and the inputs
    of a draft model or the hidden states that a head reads."""
    requests, tokens = s.serving.max_num_seqs or 1, s.steps
    source = f"{_VLLM} v1/worker/gpu/spec_decode"
    proposed = requests * draft.tokens * (8 + 4)
    yield WeightGroup("proposed tokens and their probabilities", TABLE, 2, "int64", proposed, f"{source}/speculator.py")
    if draft.method == "draft_model":
        rows = (tokens + requests) * (4 + 8 + 8)
        yield WeightGroup("inputs of the draft model", TABLE, 3, "int64", rows, f"{source}/standalone_ar/speculator.py")
        return
    assert draft.settings is not None
    wide = tokens * draft.settings.model.hidden_size * ITEMSIZE[s.dtype]
    yield WeightGroup(
        "hidden states for the head", TABLE, 1, s.dtype, wide, f"{source}/target_dependent_ar/speculator.py"
    )
