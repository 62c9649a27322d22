"""Speculative decoding in serving engines: a draft's layers, and their keys and values in the pool.

A draft model has weights, caches and steps of its own. An EAGLE head is one or a few layers that read the model's
hidden states; an EAGLE 3 head reads those of three layers and has a vocabulary of its own. Multi-token prediction (MTP)
layers are in the model's own checkpoint, each like its last layer. EAGLE and MTP use the model's embeddings and, except
EAGLE 3, its head. N-grams need no layers.

Source: vllm 0.33.0 config/speculative.py, v1/worker/gpu/spec_decode, model_executor/models/llama_eagle.py and
llama_eagle3.py, deepseek_mtp.py; sglang 0.5.23 arg_groups/speculative_hook.py, model_executor/pool_configurator.py;
llama.cpp (llama-cpp-python 0.3.36) common/speculative.cpp, common/common.cpp common_base_params_to_speculative.
"""

from __future__ import annotations

from memplan.catalogue.inference.caches import LayerCache, caches
from memplan.models.model import ModelSpec
from memplan.program.serving.settings import Settings

LAYERS_AHEAD = ("num_nextn_predict_layers", "mtp_num_hidden_layers")  # config keys of the number of MTP layers


def layers_ahead(model: ModelSpec) -> int:
    """Return the number of multi-token prediction layers in the checkpoint."""
    return next((model.config_int(name) for name in LAYERS_AHEAD if model.config.get(name)), 0)


def layers_of(s: Settings) -> tuple[LayerCache, ...]:
    """Return the caches of the draft's layers in the engine's pool."""
    draft = s.draft
    if draft is None or draft.settings is None or s.engine.kind == "llama.cpp":
        return ()
    if draft.method == "mtp":
        return caches(s.model)[-1:] * layers_ahead(s.model)
    return caches(draft.settings.model)


def lookahead_slots(s: Settings) -> int:
    """Return a request's slots beyond its tokens: for proposed tokens, and for those that a draft with layers will
    propose next.

    Source: vllm 0.33.0 v1/core/sched/scheduler.py schedule, config/vllm.py num_lookahead_tokens.
    """
    draft = s.draft
    if draft is None or s.engine.kind != "vllm":
        return 0
    return draft.tokens * (1 if draft.settings is None else 2)
