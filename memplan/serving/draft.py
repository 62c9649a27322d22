"""Speculative decoding of serving engines: what proposes tokens, its weights, its layers' keys and values in the pool,
and what the engine makes for it.

A draft model has weights, caches and steps of its own. A head of EAGLE's is a layer or few beside the model, given its
hidden states; EAGLE 3's has those of three layers and a vocabulary of its own. Layers that predict tokens ahead (MTP)
are in the model's own checkpoint, each as its last layer. Both read the model's embeddings and, but for EAGLE 3, use
its head. N-grams take no layers.

Source: vllm 0.33.0 config/speculative.py, v1/worker/gpu/spec_decode, model_executor/models/llama_eagle.py and
llama_eagle3.py, deepseek_mtp.py; sglang 0.5.23 arg_groups/speculative_hook.py, model_executor/pool_configurator.py;
llama.cpp (llama-cpp-python 0.3.36) common/speculative.cpp, common/common.cpp common_base_params_to_speculative.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from memplan.cards import find_config, find_model
from memplan.catalogue.caches import LayerCache, caches
from memplan.errors import SpecError, about
from memplan.models import ModelSpec
from memplan.serving.stages import whole
from memplan.units import ITEMSIZE

if TYPE_CHECKING:
    from memplan.serving.passes import Step
    from memplan.serving.settings import Settings
    from memplan.serving.weights import Held

METHODS = {
    "vllm": ("draft_model", "eagle", "eagle3", "mtp", "ngram"),
    "sglang": ("draft_model", "eagle", "eagle3", "mtp", "ngram"),
    "tgi": (),
    "llama.cpp": ("draft_model",),
}
COMPRESSED = "deepseek_v4"
_HEADS = ("eagle", "eagle3")
_LAYERS_AHEAD = ("num_nextn_predict_layers", "mtp_num_hidden_layers")  # what configs call layers that predict ahead


class Draft(NamedTuple):
    """What proposes tokens: by which method, so many in a step, and the engine's settings for its model, whose layers
    are those that have keys and values; None of n-grams."""

    method: str
    tokens: int
    settings: Settings | None

    @property
    def model(self) -> ModelSpec | None:
        return self.settings.model if self.settings else None


def decide(s: Settings) -> Draft | None:
    """What proposes the run's tokens, None where nothing does. Raises SpecError for what the engine does not take."""
    asked, kind = s.serving, s.engine.kind
    method = asked.speculative_method or ("draft_model" if asked.draft_model is not None else None)
    if method is None:
        for name in ("num_speculative_tokens", "draft_weights"):
            if getattr(asked, name) is not None:
                raise SpecError(
                    f"serving.{name}: is of speculative decoding; say speculative_method", f"serving.{name}"
                )
        return None
    field = "serving.speculative_method"
    if method not in METHODS[kind]:
        known = ", ".join(METHODS[kind]) or "none"
        raise SpecError(f"{field}: {method} is not supported yet with {s.engine.name}; supported: {known}", field)
    if method == "draft_model" and s.engine.name == "vllm-0.11":
        raise SpecError(f"{field}: vLLM 0.11 has no draft models; eagle, eagle3, mtp and ngram", field)
    needs = method in ("draft_model", *_HEADS)
    if needs != (asked.draft_model is not None):
        why = f"{method} needs one" if needs else f"is none of {method}"
        raise SpecError(f"serving.draft_model: {why}", "serving.draft_model")
    if s.model.model_type == COMPRESSED:
        raise SpecError(f"{field}: is not supported yet beside {COMPRESSED}'s compressed caches", field)
    if s.ranks.pp > 1 or s.ranks.cards > 1:
        raise SpecError(f"{field}: {method} is not supported yet on several stages or cards of {s.engine.name}", field)
    if asked.draft_weights is not None and not needs:
        raise SpecError(f"serving.draft_weights: {method} has no model of its own", "serving.draft_weights")
    model = _model(s, method) if method != "ngram" else None
    tokens = asked.num_speculative_tokens or _tokens(s, method)
    if model is None:
        return Draft(method, tokens, None)
    quantization = asked.draft_weights if method != "mtp" else s.quantization
    serving = asked.model_copy(update={"lora_slots": 0, "speculative_method": None, "draft_model": None})
    if kind == "llama.cpp":
        serving = serving.model_copy(update={"cache_dtype": "fp16", "gpu_layers": model.num_hidden_layers + 1})
    ranks = s.ranks._replace(ep=1, etp=s.ranks.tp) if method != "mtp" else s.ranks
    own = s._replace(
        model=model,
        quantization=quantization,
        serving=serving,
        ranks=ranks,
        stage=whole(model.num_hidden_layers),
        draft=None,
    )
    return Draft(method, tokens, own)


def _tokens(s: Settings, method: str) -> int:
    """How many where nothing is said."""
    match s.engine.kind:
        case "sglang":  # arg_groups/speculative_hook.py _auto_choose_speculative_params, _handle_ngram
            return 12 if method == "ngram" else 8 if s.model.model_type == "llama" and method != "draft_model" else 4
        case "llama.cpp":
            return 3  # common/common.h common_params_speculative_draft.n_max
        case _:
            ahead = layers_ahead(s.model)
            if method == "mtp" and ahead:
                return ahead
            field = "serving.num_speculative_tokens"
            raise SpecError(f"{field}: vLLM has no number of its own for {method}; say one", field)


def layers_ahead(model: ModelSpec) -> int:
    """How many layers of the checkpoint predict tokens ahead."""
    return next((model.whole(name) for name in _LAYERS_AHEAD if model.config.get(name)), 0)


def _model(s: Settings, method: str) -> ModelSpec:
    """The draft's model; of a head its layers alone, and of layers that predict ahead the model's last ones."""
    asked = s.serving.draft_model
    if method == "mtp":
        ahead = layers_ahead(s.model)
        if not ahead:
            raise SpecError(
                f"serving.speculative_method: {s.model.name or s.model.model_type} has no layers that predict tokens "
                f"ahead ({' or '.join(_LAYERS_AHEAD)} in its config)",
                "serving.speculative_method",
            )
        return s.model
    assert asked is not None
    if method == "draft_model":
        with about("serving.draft_model"):
            found = find_model(asked)
        if found.vocab_size != s.model.vocab_size and s.engine.kind != "llama.cpp":
            raise SpecError(
                f"serving.draft_model: a vocabulary of {found.vocab_size}, where {s.model.name or s.model.model_type} "
                f"has {s.model.vocab_size}: {s.engine.title} needs the same",
                "serving.draft_model",
            )
        return found
    with about("serving.draft_model"):
        config = dict(find_config(asked))
    if config.get("model_type") != "llama":
        raise SpecError(
            f"serving.draft_model: heads of {method} are written like Llama's layers; this config is of "
            f"{config.get('model_type')}",
            "serving.draft_model",
        )
    return ModelSpec({**config, "architectures": ("LlamaForCausalLM",)})


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


def held_of(s: Settings) -> Iterator[Held]:
    """The draft's weights on a rank, and what the engine makes for it."""
    from memplan.serving.weights import held

    draft = s.draft
    if draft is None or draft.settings is None:
        return
    if draft.method == "draft_model":
        for h in held(draft.settings):
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


TABLE = "table"  # the group of what a runner has for requests


def _layers_that_predict(s: Settings) -> Iterator[Held]:
    """Each as the last layer, with a projection of an embedding and hidden states side by side, and three norms."""
    from memplan.serving.shares import layer_of, of_rank
    from memplan.serving.weights import Held
    from memplan.stored import stored_weights

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
    from memplan.serving.shares import layer_of, of_rank, rows_of
    from memplan.serving.weights import Held
    from memplan.stored import stored_weights

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
    from memplan.serving.shares import rows_of
    from memplan.serving.weights import Held

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
    from memplan.serving.weights import Held

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


def step_of(s: Settings, tokens: int, requests: int) -> Step | None:
    """The largest moment of the draft's own step, with the model's hidden states beside it; None where that is no more
    than one layer of the model takes."""
    from memplan.serving.passes import Alive, largest

    draft = s.draft
    if draft is None or draft.settings is None or draft.method == "mtp":
        return None
    own = largest(draft.settings, tokens, requests)
    if s.engine.kind == "llama.cpp":
        return own
    shape = (tokens, s.model.hidden_size)
    hidden = Alive("hidden", "s h", shape, s.dtype, shape[0] * shape[1] * ITEMSIZE[s.dtype])
    return own._replace(where=f"draft: {own.where}", alive=(*own.alive, hidden))
