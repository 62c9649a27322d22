"""A folder with `adapter_config.json`: peft's adapters, to train further or to serve.

Source: peft 0.21.2 config.py, peft_model.py from_pretrained, tuners/*/config.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from memplan.catalogue.profiles.engines import ENGINES
from memplan.frameworks.reading import trainer
from memplan.frameworks.reading.config import TYPED, Config, Rule
from memplan.models.peft_methods import PEFT_METHODS, default_targets, leads_stream
from memplan.spec.run import NEWEST


def _method(config: Config) -> None:
    kind = (config.text("peft_type") or "lora").lower()
    if kind not in ("lora", *PEFT_METHODS):
        raise config.refuse("peft_type", ", ".join(name.upper() for name in ("lora", *PEFT_METHODS)))
    config.set("method.kind", "dora" if config.flag("use_dora") else kind, "peft_type", "use_dora")
    options = {"use_rslora": True} if config.flag("use_rslora") else {}
    if kind in PEFT_METHODS:
        method = PEFT_METHODS[kind]
        for field in ("method.rank", "method.alpha", "method.dropout"):
            config.found.pop(field, None)
        for name, field in ((method.r, "rank"), (method.dropout, "dropout"), (method.alpha, "alpha")):
            if name and config.number(name) is not None and (field != "rank" or method.rank):
                config.set(f"method.{field}", config.whole(name) if field == "rank" else config.number(name), name)
        options = {name: config.said(name) for name in method.options if config.said(name) is not None}
    if options:
        config.set("method.options", options, *options)
    _targets(config, kind)
    if config.names("modules_to_save"):
        config.set("method.modules_to_save", config.names("modules_to_save"), "modules_to_save")


def _bias(config: Config) -> None:
    if config.get("bias") not in (None, "none"):
        config.leave("bias", "trained biases are not counted")


def _targets(config: Config, kind: str) -> None:
    said = config.get("target_modules")
    names = None if said is None or isinstance(said, str) else config.names("target_modules")
    model = trainer.model_of(config)
    if leads_stream(kind):
        if said is not None and (model is None or len(names or ()) != model.num_hidden_layers):
            config.leave("target_modules", "all layers are counted")
        return
    if said == "all-linear" or names == ["all-linear"]:
        config.set("method.targets", "all-linear", "target_modules")
    elif names is not None:
        config.set("method.targets", sorted({name.rpartition(".")[2] for name in names}), "target_modules")
    elif isinstance(said, str):
        config.leave("target_modules", "a pattern: all linear layers are counted instead")
    elif model is not None and default_targets(kind, model.model_type):
        why = "peft's default for the model's family"
        config.set("method.targets", list(default_targets(kind, model.model_type)), why=why)


def _use(config: Config) -> None:
    """Adapters are trained further, unless an engine serves them or the options say to generate."""
    profile = NEWEST.get(str(config.options.get("profile")), config.options.get("profile"))
    serves = profile in {engine.name for engine in ENGINES}
    if not serves and config.options.get("method.kind") != "generate":
        config.set("loop.trainer", True, why="assumed: transformers' Trainer trains them further")
        return
    rank = config.found.get("method.rank")
    for field in [field for field in config.found if field != "model"]:
        del config.found[field]
    config.set("task", "generate", why=TYPED)
    if serves and rank is not None:
        config.set("serving.lora_slots", 1, why=f"{config.document.name} is one adapter")
        config.found["serving.lora_rank"] = rank._replace(field="serving.lora_rank")
    else:
        config.leave("peft_type", "adapters are not counted when generating, as if they were merged")


RULES: Mapping[str, tuple[Rule, ...]] = {
    "peft": (_method, _bias, _use),
}
