"""What proposes tokens in speculative decoding, and the draft model's own settings."""

from __future__ import annotations

from memplan.core.errors import SpecError, about
from memplan.models.cards import find_config, find_model
from memplan.models.model import ModelSpec
from memplan.program.serving.draft import COMPRESSED, LAYERS_AHEAD, layers_ahead
from memplan.program.serving.layer_ranges import whole
from memplan.program.serving.settings import Draft, Settings

METHODS = {
    "vllm": ("draft_model", "eagle", "eagle3", "mtp", "ngram"),
    "sglang": ("draft_model", "eagle", "eagle3", "mtp", "ngram"),
    "tgi": (),
    "llama.cpp": ("draft_model",),
}
_HEADS = ("eagle", "eagle3")


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


def _model(s: Settings, method: str) -> ModelSpec:
    """The draft's model; of a head its layers alone, and of layers that predict ahead the model's last ones."""
    asked = s.serving.draft_model
    if method == "mtp":
        ahead = layers_ahead(s.model)
        if not ahead:
            raise SpecError(
                f"serving.speculative_method: {s.model.name or s.model.model_type} has no layers that predict tokens "
                f"ahead ({' or '.join(LAYERS_AHEAD)} in its config)",
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
