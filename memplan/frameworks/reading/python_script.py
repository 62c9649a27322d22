"""Training scripts and notebooks of transformers, TRL and Unsloth: the calls that load, adapt and train a model.

Source: transformers 5.24 modeling_utils.py from_pretrained, utils/quantization_config.py BitsAndBytesConfig; peft
0.21.2 tuners/lora/config.py; trl 1.16 trainer/sft_trainer.py; unsloth 2026.10.9 models/loader.py, llama.py, rl.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from memplan.core.errors import SpecError
from memplan.core.records import NamedTuple
from memplan.frameworks.change_table import pairs
from memplan.frameworks.reading import trainer, trl
from memplan.frameworks.reading.config import Config, Unread
from memplan.frameworks.reading.document import Document
from memplan.frameworks.reading.python_calls import UNKNOWN, CallsOfScript, PythonCall
from memplan.frameworks.reading.run_format import RunFormat, format_named

_OF_TRL = ("SFT", "DPO", "KTO", "ORPO", "CPO", "Reward", "GRPO", "RLOO", "GKD", "Distillation")
_TRAINERS = {f"{name}Trainer": f"{name}Config" for name in _OF_TRL} | {
    "Trainer": "TrainingArguments",
    "Seq2SeqTrainer": "Seq2SeqTrainingArguments",
}
_CONFIGS = (*_TRAINERS.values(), "UnslothTrainingArguments")
_OTHERS = ("PPO", "Online", "XPO", "Nash", "PRM", "BCO")
# Arguments of trainers that are other models -> keys of TRL's command line; a reference is as large as the policy.
_ROLES = {
    "teacher_model": "teacher_model_name_or_path",
    "reward_funcs": "reward_model_name_or_path",
    "ref_model": "",
}
_UNSLOTH = ("FastLanguageModel", "FastModel", "FastVisionModel", "FastTextModel")
# Arguments of a call -> keys of TRL's command line.
_LOADED = pairs(
    "0=model_name_or_path pretrained_model_name_or_path=model_name_or_path dtype torch_dtype=dtype attn_implementation "
    "load_in_4bit load_in_8bit"
)
_QUANTISED = pairs("load_in_4bit load_in_8bit bnb_4bit_quant_type bnb_4bit_use_double_quant=use_bnb_nested_quant")
_ADAPTERS = pairs(
    "r=lora_r lora_alpha lora_dropout target_modules=lora_target_modules modules_to_save=lora_modules_to_save use_dora "
    "use_rslora target_parameters=lora_target_parameters"
)
_TRAINED = pairs("max_seq_length=max_length packing max_length max_prompt_length beta")
# Keys of a config's `model_init_kwargs` -> keys of TRL's command line; memory does not depend on the others.
_INITIAL = {name: _LOADED[name] for name in ("dtype", "torch_dtype", "attn_implementation", "load_in_4bit")}
# Beginnings of arguments that memory does not depend on.
_WITHOUT_MEMORY = (
    *("output_dir", "push_to_hub", "hub_", "run_name", "report_to", "logging", "trackio", "save", "seed", "max_steps"),
    *("learning_rate", "lr_scheduler", "warmup", "weight_decay", "num_train_epochs", "vllm_server"),
)
# What classes default to where TRL's command line has another default.
_DEFAULTS = {"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "bnb_4bit_quant_type": "fp4", "dtype": "auto"}
# Arguments of Unsloth's -> keys of its command line, or names of what is not one of them.
_UNSLOTH_LOADED = pairs(
    "0=model model_name=model max_seq_length=training.max_seq_length load_in_4bit=training.load_in_4bit "
    "full_finetuning=training.training_type use_gradient_checkpointing=training.gradient_checkpointing load_in_8bit "
    "load_in_fp8 qat_scheme fast_inference unsloth_tiled_mlp"
)
_UNSLOTH_ADAPTED = pairs(
    "r=lora.lora_r lora_alpha=lora.lora_alpha lora_dropout=lora.lora_dropout target_modules=lora.target_modules "
    "use_gradient_checkpointing=training.gradient_checkpointing use_rslora=lora.use_rslora "
    "finetune_vision_layers=lora.finetune_vision_layers finetune_language_layers=lora.finetune_language_layers "
    "finetune_attention_modules=lora.finetune_attention_modules finetune_mlp_modules=lora.finetune_mlp_modules "
    "layers_to_transform qat_scheme modules_to_save target_parameters"
)
_UNSLOTH_TRAINED = pairs(
    "per_device_train_batch_size=training.batch_size optim=training.optim packing=training.packing "
    "gradient_accumulation_steps=training.gradient_accumulation_steps max_seq_length=training.max_seq_length "
    "max_length=training.max_seq_length eval_strategy neftune_noise_alpha"
)
# What the trainers that compare or generate read: keys of TRL's, of which its loader sets three.
_UNSLOTH_LOADED_RL = pairs(
    "fast_inference=use_vllm gpu_memory_utilization=vllm_gpu_memory_utilization "
    "unsloth_vllm_standby=vllm_enable_sleep_mode"
)
_UNSLOTH_RL = (
    *("num_generations", "max_completion_length", "max_prompt_length", "steps_per_generation", "num_iterations"),
    *("generation_batch_size", "beta", "loss_type", "cpo_alpha", "precompute_ref_log_probs"),
)
_UNSLOTH_DEFAULTS = {
    "training.batch_size": 4,
    "training.gradient_accumulation_steps": 2,
    "lora.lora_r": 16,
    "lora.lora_alpha": 16,
    "lora.lora_dropout": 0.0,
}
_UNSLOTH_RL_DEFAULTS = {"num_generations": 8, "max_completion_length": 256, "vllm_gpu_memory_utilization": 0.5}


class ScriptRun(NamedTuple):
    """A script as a framework's file: the keys that its calls set, their defaults, what cannot be told, the trainer as
    a command of TRL's, and whether the trainer's arguments are flags of its command line."""

    document: Document
    form: RunFormat
    told: tuple[str, ...]
    defaults: Mapping[str, Any]
    unread: tuple[Unread, ...]
    command: str = ""
    parses_flags: bool = False


class _Keys:
    """The keys that calls set, with their lines."""

    def __init__(self, script: CallsOfScript) -> None:
        self.script = script
        self.values: dict[str, Any] = {}
        self.lines: dict[tuple[str, ...], int | str] = {}
        self.names: dict[str, str] = {}
        self.unread: list[Unread] = []

    def take(self, call: PythonCall | None, names: Mapping[str, str] | None = None) -> None:
        """Set the keys of a call's arguments; of all that have a name, if `names` is None."""
        for argument, value in call.arguments.items() if call is not None else ():
            if argument.startswith("**") or (names is None and not argument.isdecimal()):
                key = argument
            elif names is not None and argument in names:
                key = names[argument]
            else:
                continue
            place = self.script.places.get(call.lines[argument], call.lines[argument]) if call is not None else 0
            if value is UNKNOWN:
                note = "cannot be told without running the script"
                if not argument.startswith(_WITHOUT_MEMORY):
                    name = key if argument.isdecimal() else argument
                    self.unread.append(Unread(f"{self.script.name}:{place}", name, note))
            elif value is not None:
                self.put(key, value, place, argument if not argument.isdecimal() else "")

    def put(self, key: str, value: Any, place: int | str, name: str = "") -> None:
        *parts, last = key.split(".")
        inner = self.values
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[last] = value
        self.lines[tuple(key.split("."))] = place
        if name:
            self.names[key] = name

    def document(self) -> Document:
        return Document(self.script.name, self.script.path, self.values, self.lines, self.names)


def trainer_of(script: CallsOfScript) -> PythonCall | None:
    """Return the call that makes a script's first trainer."""
    return next((call for call in script.calls if call.name in _TRAINERS or call.name == "UnslothTrainer"), None)


def run_of_script(script: CallsOfScript) -> ScriptRun:
    """Return the run that a script's first trainer starts. Raises SpecError if there is none."""
    training = trainer_of(script)
    unread = [Unread(f"{script.name}:{place}", "the cell", "is not Python, so not read") for place in script.skipped]
    other = next((c for c in script.calls if c.name.endswith("Trainer") and c.name.startswith(_OTHERS)), None)
    if other is not None and (training is None or other.line < training.line):
        place = script.places.get(other.line, other.line)
        raise SpecError(f"{script.name}:{place}: {other.name} is not supported yet; supported: {', '.join(_TRAINERS)}")
    if training is None:
        skipped = f", and {unread[0].where} is not Python" if unread else ""
        raise SpecError(f"{script.name} has no trainer that is read{skipped}; {', '.join(_TRAINERS)} and Unsloth's are")
    loads = [call for call in script.calls if call.name == "from_pretrained" and call.of in _UNSLOTH]
    place = script.places.get(training.line, training.line)
    told = (f"{script.name}:{place} {training.name}",)
    keys = _Keys(script)
    keys.unread += unread
    for call in script.calls:
        if call.name in _TRAINERS and call.line > training.line and call.name != training.name:
            at = f"{script.name}:{script.places.get(call.line, call.line)}"
            keys.unread.append(Unread(at, call.name, f"a second trainer; {training.name} is counted"))
    if loads:
        return _of_unsloth(keys, _last(loads, training), training, told)
    return _of_transformers(keys, training, told)


def _last(calls: list[PythonCall], before: PythonCall) -> PythonCall:
    """Return the last of the calls before one, or else the first."""
    return ([call for call in calls if call.line <= before.line] or calls[:1])[-1]


def _named(script: CallsOfScript, before: PythonCall, *names: str) -> PythonCall | None:
    calls = [call for call in script.calls if call.name in names]
    return _last(calls, before) if calls else None


def _of_unsloth(keys: _Keys, load: PythonCall, training: PythonCall, told: tuple[str, ...]) -> ScriptRun:
    script = keys.script
    keys.take(load, _UNSLOTH_LOADED)
    adapted = _named(script, training, "get_peft_model")
    keys.take(adapted, _UNSLOTH_ADAPTED)
    keys.take(_named(script, training, *_CONFIGS), _UNSLOTH_TRAINED)
    lengths = dict.fromkeys(("max_seq_length", "max_length"), "training.max_seq_length")
    keys.take(training, {**lengths, "packing": "training.packing"})
    is_full = keys.values.get("training", {}).get("training_type") is True or adapted is None
    by, name = (load, "from_pretrained") if is_full or adapted is None else (adapted, "get_peft_model")
    keys.put("training.training_type", "full" if is_full else "lora", script.places.get(by.line, by.line), name)
    keys.values.setdefault("lora", {})
    defaults, command = _UNSLOTH_DEFAULTS, ""
    if training.name.removesuffix("Trainer") in _OF_TRL[1:]:
        keys.take(load, _UNSLOTH_LOADED_RL)
        for call in (_named(script, training, *_CONFIGS), training):
            keys.take(call, {name: name for name in _UNSLOTH_RL})
        keys.values |= {"use_peft": not is_full}
        keys.values.pop("fast_inference", None)
        defaults, command = {**defaults, **_UNSLOTH_RL_DEFAULTS}, told[0]
    silent = (*_UNSLOTH_TRAINED.values(), *_UNSLOTH_RL, "use_peft")
    form = format_named("unsloth")._replace(matter=_MATTER, silent=silent)
    return ScriptRun(keys.document(), form, told, defaults, tuple(keys.unread), command)


_MATTER = {
    **dict.fromkeys(("load_in_8bit", "load_in_fp8"), "the weights' format"),
    **dict.fromkeys(("fast_inference", "unsloth_tiled_mlp", "neftune_noise_alpha"), "not counted"),
    **dict.fromkeys(("target_parameters", "layers_to_transform"), "what trains"),
    "qat_scheme": "fake quantisation",
    "eval_strategy": "evaluation",
}


def _of_transformers(keys: _Keys, training: PythonCall, told: tuple[str, ...]) -> ScriptRun:
    script = keys.script
    loads = [call for call in script.calls if call.name == "from_pretrained"]
    stored = [call for call in loads if call.of.startswith("Peft") and call.line < training.line]  # adapters
    models = [call for call in loads if re.search("Model|For[A-Z]", call.of) and not call.of.startswith("Peft")]
    variable = training.variables.get("model", training.variables.get("0"))
    others = {training.variables[role] for role in _ROLES if role in training.variables}
    own = [call for call in models if variable in call.targets or not others.intersection(call.targets)]
    own = [call for call in own if variable in call.targets] or own
    load = _last(own, training) if own else None
    keys.take(load, _LOADED)
    keys.take(_named(script, training, "BitsAndBytesConfig"), _QUANTISED)
    _take_stored(keys, training)
    keys.take(_named(script, training, *_CONFIGS))
    initial: object = keys.values.pop("model_init_kwargs", None)
    for name, value in cast("dict[str, Any]", initial).items() if isinstance(initial, dict) else ():
        if name in _INITIAL and value is not UNKNOWN:
            keys.put(_INITIAL[name], value, keys.lines[("model_init_kwargs",)], f"model_init_kwargs.{name}")
    adapters = _named(script, training, "LoraConfig")
    keys.take(adapters, _ADAPTERS)
    keys.take(training, _TRAINED)
    parses = _named(script, training, "HfArgumentParser", "TrlParser") is not None
    named = "model" if "model" in training.arguments else "0"
    if isinstance(training.arguments.get(named), str):
        keys.put("model_name_or_path", training.arguments[named], training.lines[named], "model")
    if adapters is not None:
        keys.put("use_peft", True, script.places.get(adapters.line, adapters.line), "LoraConfig")
    elif stored:
        adapter = _last(stored, training)
        place = script.places.get(adapter.line, adapter.line)
        keys.put("use_peft", True, place, f"{adapter.of}.{adapter.name}")
        note = "the adapter's own settings are not known: rank 8 on peft's default modules is counted"
        keys.unread.append(Unread(f"{script.name}:{place}", f"{adapter.of}.{adapter.name}", note))
    defaults = dict(_DEFAULTS)
    if load is None:
        del defaults["dtype"]
    if training.name.removesuffix("Trainer") in _OF_TRL:
        for role, key in _ROLES.items():
            loaded = [call for call in models if training.variables.get(role) in call.targets]
            name = loaded[-1].arguments.get("0") if loaded else training.arguments.get(role)
            if key and isinstance(name, str):
                keys.put(key, name, script.places.get(training.lines[role], training.lines[role]), role)
        return ScriptRun(keys.document(), format_named("trl"), told, defaults, tuple(keys.unread), told[0], parses)
    prepared = _named(script, training, "prepare_model_for_kbit_training")
    defaults["prepares"] = prepared is not None
    return ScriptRun(keys.document(), _TRAINER, told, defaults, tuple(keys.unread), parses_flags=parses)


def _take_stored(keys: _Keys, training: PythonCall) -> None:
    """Set the format of weights that another library than bitsandbytes stores."""
    script = keys.script
    call = _named(script, training, "HqqConfig", "TorchAoConfig")
    if call is None:
        return
    place = script.places.get(call.line, call.line)
    is_int8 = "int8_weight_only" in call.arguments.values() or _named(script, training, "Int8WeightOnlyConfig")
    if call.name == "HqqConfig" and call.arguments.get("nbits", 4) == 4:
        keys.put("stored_format", "hqq-int4", place, call.name)
    elif call.name == "TorchAoConfig" and is_int8:
        keys.put("stored_format", "torchao-int8", place, call.name)
    else:
        keys.unread.append(Unread(f"{script.name}:{place}", call.name, "the weights are counted unquantised"))


def _kbit(config: Config) -> None:
    """A script that trains with transformers' Trainer prepares quantised weights itself, or not at all."""
    if "method.quantization.format" in config.found:
        does = bool(config.defaults.get("prepares"))
        why = f"{config.document.name} {'calls' if does else 'does not call'} prepare_model_for_kbit_training"
        config.set("method.quantization.kbit_preparation", does, why=why)


def _precision(config: Config) -> None:
    name = str(config.get("dtype") or "auto")
    casts = "fp16" if config.flag("fp16") else "bf16" if config.flag("bf16") else None
    keys = ("dtype", *((casts,) if casts else ()))
    trainer.lower_precision(config, trainer.DTYPES.get(name, "bf16"), casts, *keys)
    if name == "auto" and "precision.weights" in config.found:
        origin = config.found["precision.weights"]
        config.found["precision.weights"] = origin._replace(why="the checkpoint's dtype, assumed bf16")


def _length(config: Config) -> None:
    if config.value("batch.sequence") is None:
        trainer.assume_length(config, "the length of samples")


_, *_LATER, _, _EVALUATION = trl.RULES["transformers"]
_TRAINER = format_named("transformers")._replace(rules=(trl.method, _kbit, _length, *_LATER, _precision, _EVALUATION))
