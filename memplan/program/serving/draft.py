"""Speculative decoding of serving engines: what proposes tokens, its weights, its layers' keys and values in the pool,
and what the engine makes for it.

A draft model has weights, caches and steps of its own. A head of EAGLE's is a layer or few beside the model, given its
hidden states; EAGLE 3's has those of three layers and a vocabulary of its own. Layers that predict tokens ahead (MTP)
are in the model's own checkpoint, each as its last layer. Both read the model's embeddings and, but for EAGLE 3, use
its head. N-grams take no layers.

Source: vllm 0.33.0 config/speculative.py, v1/worker/gpu/spec_decode, model_executor/models/llama_eagle.py and
llama_eagle3.py, deepseek_mtp.py; sglang 0.5.23 arg_groups/speculative_hook.py, model_executor/pool_configurator.py;
llama.cpp (llama-cpp-python 0.3.36) common/speculative.cpp, common/common.cpp common_base_params_to_speculative."""

from __future__ import annotations

from memplan.catalogue.inference.caches import LayerCache, caches
from memplan.models.model import ModelSpec
from memplan.program.serving.settings import Settings

COMPRESSED = "deepseek_v4"
LAYERS_AHEAD = ("num_nextn_predict_layers", "mtp_num_hidden_layers")  # what configs call layers that predict ahead


def layers_ahead(model: ModelSpec) -> int:
    """How many layers of the checkpoint predict tokens ahead."""
    return next((model.whole(name) for name in LAYERS_AHEAD if model.config.get(name)), 0)


def layers_of(s: Settings) -> tuple[LayerCache, ...]:
    """What the draft's layers keep in the engine's pool."""
    draft = s.draft
    if draft is None or draft.settings is None or s.engine.kind == "llama.cpp":
        return ()
    if draft.method == "mtp":
        return caches(s.model)[-1:] * layers_ahead(s.model)
    return caches(draft.settings.model)


def ahead_of(s: Settings) -> int:
    """Slots that a request has beyond its tokens: for those that were proposed, and for those that a draft with layers
    is about to.

    Source: vllm 0.33.0 v1/core/sched/scheduler.py schedule, config/vllm.py num_lookahead_tokens.
    """
    draft = s.draft
    if draft is None or s.engine.kind != "vllm":
        return 0
    return draft.tokens * (1 if draft.settings is None else 2)
