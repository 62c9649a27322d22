"""The draft of speculative decoding: its method, and the settings of a draft model."""

from __future__ import annotations

from memplan.catalogue.inference.cache_formats import FIRST_VLLM
from memplan.core.errors import errors_about, refused
from memplan.models.cards import find_config, find_model
from memplan.models.configs import families
from memplan.models.model import ModelSpec
from memplan.program.serving.draft import LAYERS_AHEAD, layers_ahead
from memplan.program.serving.layer_ranges import whole
from memplan.program.serving.settings import Draft, Settings

METHODS = {  # by kind of engine, or by name
    **dict.fromkeys(FIRST_VLLM, ()),
    "vllm-0.11": ("eagle", "eagle3", "mtp", "ngram"),
    "vllm": ("draft_model", "eagle", "eagle3", "mtp", "ngram"),
    "sglang": ("draft_model", "eagle", "eagle3", "mtp", "ngram"),
    "tgi": (),
    "llama.cpp": ("draft_model", "mtp"),
}
_HEADS = ("eagle", "eagle3")
_DRAFTS = {"cache_dtype": "fp16", "override_tensor": None, "n_cpu_moe": None}  # llama.cpp has own options for these


def decide_draft(s: Settings) -> Draft | None:
    """Return what proposes the run's tokens, or None. Raises SpecError for what the engine rejects."""
    asked, kind = s.serving, s.engine.kind
    method = asked.speculative_method or ("draft_model" if asked.draft_model is not None else None)
    if method is None:
        for name in ("num_speculative_tokens", "draft_weights"):
            if getattr(asked, name) is not None:
                raise refused(f"serving.{name}", "needs speculative decoding; set speculative_method too")
        return None
    field = "serving.speculative_method"
    methods = METHODS.get(s.engine.name, METHODS[kind])
    if method not in methods:
        known = ", ".join(methods) or "none"
        raise refused(field, f"{method} is not supported yet with {s.engine.name}; supported: {known}")
    needs_model = method in ("draft_model", *_HEADS)
    if needs_model != (asked.draft_model is not None):
        why = f"is required with {method}" if needs_model else f"does not apply to {method}; leave it out"
        raise refused("serving.draft_model", f"{why}")
    if s.model.has_compressed_cache:
        raise refused(field, f"is not supported yet with {s.model.model_type}'s compressed cache")
    if s.ranks.pp > 1 or s.ranks.cards > 1:
        raise refused(field, f"{method} is not supported yet with {s.engine.name} on several stages or GPUs")
    if asked.draft_weights is not None and not needs_model:
        raise refused("serving.draft_weights", f"{method} has no draft model")
    model = _draft_model(s, method) if method != "ngram" else None
    tokens = asked.num_speculative_tokens or _default_tokens(s, method)
    if model is None:
        return Draft(method, tokens, None)
    quantization = asked.draft_weights if method != "mtp" else s.quantization
    serving = asked.model_copy(update={"lora_slots": 0, "speculative_method": None, "draft_model": None})
    stage = whole(model.num_hidden_layers)
    if kind == "llama.cpp" and method == "mtp":  # a context for layers like the last one, with the model's head
        stage = stage._replace(first=stage.last - 1)
    elif kind == "llama.cpp":
        serving = serving.model_copy(update=_DRAFTS | {"gpu_layers": model.num_hidden_layers + 1})
    ranks = s.ranks._replace(ep=1, etp=s.ranks.tp) if method != "mtp" else s.ranks
    draft = s._replace(
        model=model,
        quantization=quantization,
        serving=serving,
        ranks=ranks,
        stage=stage,
        draft=None,
    )
    return Draft(method, tokens, draft)


def _sglang_tokens(s: Settings, method: str) -> int:
    if method == "ngram":
        return 12
    return s.model.family.serving.draft_tokens if method != "draft_model" else 4


def _default_tokens(s: Settings, method: str) -> int:
    """Return the default number of proposed tokens."""
    match s.engine.kind:
        case "sglang":  # arg_groups/speculative_hook.py _auto_choose_speculative_params, _handle_ngram
            return _sglang_tokens(s, method)
        case "llama.cpp":
            return 3  # common/common.h common_params_speculative_draft.n_max
        case _:
            ahead = layers_ahead(s.model)
            if method == "mtp" and ahead:
                return ahead
            field = "serving.num_speculative_tokens"
            raise refused(field, f"vLLM has no default for {method}; set it")


def _draft_model(s: Settings, method: str) -> ModelSpec:
    """Return the draft's model: an EAGLE head's own layers, or for MTP the served model itself."""
    name = s.serving.draft_model
    if method == "mtp":
        ahead = layers_ahead(s.model)
        if not ahead:
            raise refused(
                "serving.speculative_method",
                f"mtp needs multi-token prediction layers, and {s.model.name or s.model.model_type} has none "
                f"({' or '.join(LAYERS_AHEAD)} in its config)",
            )
        return s.model
    assert name is not None
    if method == "draft_model":
        with errors_about("serving.draft_model"):
            draft = find_model(name)
        if draft.vocab_size != s.model.vocab_size and s.engine.kind != "llama.cpp":
            raise refused(
                "serving.draft_model",
                f"has a vocabulary of {draft.vocab_size}, but {s.model.name or s.model.model_type} one of "
                f"{s.model.vocab_size}; {s.engine.title} needs them equal",
            )
        return draft
    with errors_about("serving.draft_model"):
        config = dict(find_config(name))
    row = families().get(str(config.get("model_type")))
    if row is None or not row.serving.has_draft_heads:
        raise refused(
            "serving.draft_model", f"{method} heads need a config of model_type llama, not {config.get('model_type')}"
        )
    return ModelSpec({**config, "architectures": ("LlamaForCausalLM",)})
