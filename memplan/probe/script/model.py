"""Build a run's model from its config with random weights: quantise it, add adapters, freeze layers."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from memplan.catalogue.methods.methods import ADAPTERS, AXOLOTLS_EMBEDDINGS
from memplan.core.errors import MemplanError, ProbeError, SpecError
from memplan.models.cards import find_config
from memplan.models.configs import MODULES, families
from memplan.models.facts import Family
from memplan.models.objectives import modules_to_train
from memplan.models.peft_methods import PEFT_METHODS, adapts_modules, default_targets, filled_options
from memplan.probe.libraries import class_named, library, model_class, objective_of
from memplan.probe.script import expert_parallel
from memplan.probe.script.device_map import device_lookup, dispatch, is_dispatched, map_of
from memplan.probe.script.quantized import quantisable_names, quantise, quantise_stack
from memplan.probe.script.tensor_parallel import divide, is_part, local_of, part_of
from memplan.resolve.decide import decide
from memplan.spec.run import RunSpec
from memplan.spec.training import Method, Precision

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Config keys that describe a file or a program rather than the model.
_NOT_THE_MODEL = ("model_type", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype")
_NEITHER = ("_name_or_path", "quantization_config", "_attn_implementation", "attn_implementation")


def lower_of(precision: Precision) -> torch.dtype:
    """Return the dtype that autocast computes in."""
    return DTYPES[precision.compute or ("bf16" if precision.weights == "fp32" else precision.weights)]


def build_model(run: RunSpec, device: torch.device) -> Any:
    """Return the run's model on `device`, with random weights, in the run's dtypes and with its adapters.

    The model is built on the meta device and then allocated weight by weight, so that loading never holds it in two
    dtypes. Raises ProbeError if transformers does not have the class, ConfigError for an invalid config.
    """
    model = empty_model(run)
    trains = run.task == "train"
    places = map_of(model, run) if is_dispatched(run) else {"": 0}
    materialise(model, run, device_lookup(places, device) if is_dispatched(run) else lambda _: device)
    if is_dispatched(run):
        dispatch(model, places, device)
    kind = run.method.kind
    if trains and run.method.quantization is not None:
        _prepare(model, run)
    if run.method.frozen:
        parts = re.compile(_parts(run.method.frozen))
        for name, parameter in model.named_parameters():
            if parts.fullmatch(name):
                parameter.requires_grad_(False)
    if kind in ADAPTERS:
        model = adapt(model, run)
    elif kind == "freeze":
        _freeze(model, run.method.trainable_layers)
    if trains and run.kernels.checkpointing != "none":
        offloads, every = run.kernels.checkpointing == "offload", run.kernels.every_n_layers
        _checkpoint(model, bool(run.kernels.reentrant), offloads, every, run.kernels.checkpointing == "selective")
    model.train(trains)
    return model


def empty_model(run: RunSpec) -> Any:
    """Return the model on the meta device: shapes and dtypes, no memory."""
    fields: Mapping[str, Any] = find_config(run.model)
    model_type = str(fields.get("model_type", ""))
    objective = objective_of(run)
    transformers = library("transformers")
    if run.objective is None and model_type not in MODULES and (named := class_named(fields)):
        build = getattr(transformers, named)._from_config
    else:
        auto = model_class(model_type, sees=bool(fields.get("vision_config")), objective=objective)
        build = partial(getattr(transformers, auto).from_config, trust_remote_code=False)
    model_fields = {key: _plain(value) for key, value in fields.items() if key not in (*_NOT_THE_MODEL, *_NEITHER)}
    options: dict[str, Any] = {"dtype": DTYPES[run.precision.weights]}
    if (attention := run.kernels.attention) is not None:  # else sdpa, or eager if the class supports nothing else
        options["attn_implementation"] = "sdpa" if attention.startswith("sdpa") else attention
    config: Any
    try:
        config = transformers.AutoConfig.for_model(model_type, **model_fields)
        if objective == "seq2seq_lm" and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = 0  # the start token's value does not affect memory
        if objective == "sequence_classification" and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = 0  # decoders look for the last token that is not padding
        if not hasattr(config, "dtype"):  # its name before transformers 4.56
            options["torch_dtype"] = options.pop("dtype")
        with torch.device("meta"):
            model: Any = build(config, **options)
        if run.parallelism.tp > 1:
            divide(model, run)
        elif run.parallelism.ep > 1:
            expert_parallel.divide_experts_for_fsdp2(model, run)
        if run.precision.weights == "fp16":  # as loading does
            for path, parameter in model.named_parameters():
                if any(f".{name}." in f".{path}" for name in model._keep_in_fp32_modules or ()):
                    parameter.data = parameter.data.float()
        model.tie_weights()  # as loading does: not every version has tied them by now
        _untie(model, fields)
        _add_output_field(model, model_type)
        return model
    except MemplanError:
        raise
    except Exception as error:  # a model class may raise anything for a foreign config
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ProbeError(
            f"model: transformers cannot build {model_type} from this config: {reason:.300}", "model"
        ) from (error)


def _untie(model: Any, config: Mapping[str, Any]) -> None:
    """Untie the head if the config says so: T5's config class always ties it, but loading a separate weight does not.

    Source: transformers 5.24 models/t5/configuration_t5.py, modeling_utils.py tie_weights.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings
    if config.get("tie_word_embeddings") is False and head is not None and head.weight is table().weight:
        head.weight = nn.Parameter(torch.empty_like(head.weight), head.weight.requires_grad)


def _add_output_field(model: Any, model_type: str) -> None:
    """Add the output field that Llama 4's vision-language model reads and its decoder's outputs do not have.

    Source: transformers 5.24 models/llama4/modeling_llama4.py Llama4ForConditionalGeneration.forward.
    """
    if model_type == "llama4":
        outputs: Any = sys.modules[type(model).__module__].MoeCausalLMOutputWithPast
        if not hasattr(outputs, "image_outputs"):
            outputs.image_outputs = None


def _plain(value: Any) -> Any:
    """Return JSON lists and dicts for the spec's frozen containers, and the floats that JSON cannot represent.

    Source: transformers 5.24 configuration_utils.py PreTrainedConfig._decode_special_floats.
    """
    if isinstance(value, Mapping):
        fields = cast(Mapping[str, Any], value)
        tag = fields.get("__float__") if len(fields) == 1 else None
        if tag in ("Infinity", "-Infinity", "NaN"):
            return float(tag)
        return {key: _plain(inner) for key, inner in fields.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(inner) for inner in cast(list[Any], value)]
    return value


def materialise(model: Any, run: RunSpec, home: Callable[[str], torch.device]) -> None:
    """Allocate every parameter and buffer on the device that `home` returns for its name, in the model's order.

    Shared tensors stay shared.
    """
    allocated: dict[int, torch.Tensor] = {}
    quantization = run.method.quantization
    saved = modules_to_train(objective_of(run), run.method.modules_to_save, hasattr(model, "score"))
    quantised = set(quantisable_names(model, quantization, saved)) if quantization is not None else set[str]()
    precision = run.precision
    compute = lower_of(precision) if precision.autocast else DTYPES[str(precision.compute or precision.weights)]

    def allocate(t: torch.Tensor, name: str) -> torch.Tensor:
        if id(t) not in allocated:
            device = home(name)
            new = part_of(t, _random(local_of(t), device)) if is_part(t) else _random(t, device)
            allocated[id(t)] = nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
        return allocated[id(t)]

    if quantised:  # transformers' quantizers set it, and flash attention 2 reads it
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._is_quantized = True
    for name, module in list(model.named_modules()):
        if name in quantised and quantization is not None:
            model.set_submodule(name, quantise(module, quantization, compute, home(name)))
            continue
        for key, parameter in [*module._parameters.items()]:
            if parameter is not None and parameter.device.type in ("meta", "cpu"):  # `torch.normal` ignores meta
                path = f"{name}.{key}"
                if quantization is not None and quantization.experts and "expert" in name and parameter.ndim > 2:
                    module._parameters[key] = nn.Parameter(_random(parameter, home(path)))
                    quantise_stack(module, key, quantization)
                else:
                    module._parameters[key] = allocate(parameter, path)
        buffers = {key: b for key, b in module._buffers.items() if b is not None and b.is_meta}
        for key, buffer in buffers.items():
            module._buffers[key] = allocate(buffer, f"{name}.{key}")
        attributes = cast(dict[str, Any], vars(module))
        for key, value in list(attributes.items()):
            if isinstance(value, torch.Tensor) and value.is_meta:
                setattr(module, key, allocate(value, f"{name}.{key}"))
        if buffers:
            _compute_buffers(model, module)


def _random(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor like `t`, filled so that a step computes finite numbers: small random matrices, norms of 1."""
    new = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    if not t.is_floating_point():
        return new.zero_()
    return new.normal_(std=0.02) if t.ndim > 1 else new.fill_(1.0)


def _compute_buffers(model: Any, module: Any) -> None:
    """Run transformers' initialisation for computed buffers, such as rotary frequencies."""
    initialise = getattr(module, "_init_weights", None) or getattr(model, "_init_weights", None)
    if initialise is not None and not module._parameters:
        with torch.no_grad():
            initialise(module)


def _prepare(model: Any, run: RunSpec) -> None:
    """Run peft's `prepare_model_for_kbit_training`, and cast back what TRL 0.12 or Axolotl does."""
    quantization = run.method.quantization
    preparation = quantization.kbit_preparation if quantization is not None else False
    if preparation is False:
        for parameter in model.parameters():
            parameter.requires_grad = False
        return
    dtype = DTYPES[run.precision.weights]
    if str(preparation).startswith("axolotl"):
        _prepare_as_axolotl(model, dtype, casts_embeddings=preparation == "axolotl-0.12")
        return
    library("peft").prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if preparation == "trl":
        for name, module in model.named_modules():
            if any(part in name for part in ("lm_head", "embed_tokens", "wte", "wpe")):
                weight: Any = getattr(module, "weight", None)
                if weight is not None:
                    weight.data = weight.data.to(dtype)


def _prepare_as_axolotl(model: Any, dtype: torch.dtype, casts_embeddings: bool) -> None:
    """Cast to fp32 what Axolotl casts, and back what it casts back.

    Source: axolotl 0.12.2 and 0.21.0 loaders/model.py _configure_embedding_dtypes, monkeypatch/peft/utils.py.
    """

    def convert(to: torch.dtype, with_embeddings: bool) -> None:
        for name, module in model.named_modules():
            is_embedding = any(part in name for part in AXOLOTLS_EMBEDDINGS) and hasattr(module, "weight")
            if "norm" in name or (with_embeddings and is_embedding):
                module.to(to)

    convert(torch.float32, casts_embeddings)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = False
        is_left = any(part in name for part in AXOLOTLS_EMBEDDINGS) and not casts_embeddings
        if parameter.dtype == dtype and type(parameter).__name__ != "Params4bit" and not is_left:
            parameter.data = parameter.data.to(torch.float32)
    convert(dtype, True)


# peft's task types by objective; it has none for the others.
_TASKS = {
    "causal_lm": "CAUSAL_LM",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "feature_extraction": "FEATURE_EXTRACTION",
}


def _arguments(model: Any) -> Mapping[str, Any]:
    """Return the parameters of the model's `forward` by name."""
    return inspect.signature(model.forward).parameters


def adapt(model: Any, run: RunSpec) -> Any:
    """Return the model with peft's adapters on the targets, in `adapter_dtype` (default: fp32, as in peft)."""
    peft, method, objective = library("peft"), run.method, objective_of(run)
    saved = list(modules_to_train(objective, method.modules_to_save, hasattr(model, "score")))
    config = adapter_config(
        method,
        model.config.model_type,
        task_type=_TASKS.get(objective) if "input_ids" in _arguments(model) else None,
        **({"target_modules": target_modules(run, model)} if adapts_modules(method.kind) else {}),
        **({"exclude_modules": _parts(method.frozen)} if method.frozen else {}),
        **({"modules_to_save": saved} if saved else {}),
    )
    dtype = method.adapter_dtype or "fp32"
    if method.kind == "xlora":
        load_no_adapters(model, config)
    if method.options.get("init_lora_weights") == "corda":
        _add_eigens(model, config)
    try:
        adapted: Any = peft.get_peft_model(model, config, autocast_adapter_dtype=dtype == "fp32")
    except ValueError as error:  # targets that are missing, or that peft cannot adapt
        raise ProbeError(
            f"method.targets: peft refuses: {' '.join(str(error).split()):.300}", "method.targets"
        ) from error
    for module in adapted.modules():
        if hasattr(module, "module_dropout") and not isinstance(module.module_dropout, float):
            module.module_dropout = dict.fromkeys(module.module_dropout, _AboveNothing())
    prefix = getattr(adapted.base_model, "prefix", None)  # a prompt's encoder is in fp32
    for name, parameter in adapted.named_parameters():
        inner = name.removeprefix("base_model.lora_model.")  # X-LoRA's
        is_adapter = prefix is not None and f".{prefix}" in inner and "shadow_backbone" not in inner
        if is_adapter and parameter.dtype != DTYPES[dtype]:
            parameter.data = parameter.data.to(DTYPES[dtype])
    return adapted


def _add_eigens(model: Any, config: Any) -> None:
    """Give each adapted layer the factors that CorDA's pass over data leaves there: preprocess_corda."""
    corda = library("peft.tuners.lora.corda")
    for _, layer in corda.target_modules(model, config):
        sizes = (layer.nf, layer.nx) if hasattr(layer, "nf") else (layer.out_features, layer.in_features)
        u, v = (torch.ones(size, config.r, device=layer.weight.device) for size in sizes)
        layer.eigens = corda.CordaEigens(S_WC=torch.ones(config.r, device=u.device), U_WC=u, V_WC=v)


def load_no_adapters(model: Any, config: Any) -> None:
    """Let X-LoRA add adapters with random weights to a model instead of loading them, and set what it demands."""

    def add(lora_model: Any, adapter_name: str, **_: Any) -> None:
        lora_model.peft_config[adapter_name] = config.lora
        lora_model.inject_adapter(lora_model.model, adapter_name)
        lora_model._cast_adapter_dtype(adapter_name=adapter_name, autocast_adapter_dtype=True)

    library("peft.tuners.xlora.model")._load_adapter_into_lora_model = add
    config.hidden_size, model.config.use_cache = model.config.get_text_config().hidden_size, False


def adapter_config(method: Method, model_type: str, **more: Any) -> Any:
    """Return peft's config of a method, with the settings of the method and `more`."""
    peft: Any = library("peft")
    kind = method.kind
    known = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[kind.upper()]] if kind in PEFT_METHODS else peft.LoraConfig
    settings = _settings(method, model_type)
    if kind != "xlora":
        return known(**settings, **more)
    lora = {name: settings.pop(name) for name in ("r", "lora_alpha", "lora_dropout") if name in settings}
    names = {str(i): "" for i in range(settings.pop("adapters"))}
    config = known(**settings, adapters=names, task_type=more.pop("task_type", None))
    config.lora = peft.LoraConfig(**lora, **more)
    return config


def _settings(method: Method, model_type: str) -> dict[str, Any]:
    """Return the method's own settings, by peft's names."""
    row = PEFT_METHODS.get(method.kind)
    if row is None:
        return {
            "r": method.rank,
            "lora_alpha": method.alpha or 8,
            "lora_dropout": method.dropout,
            "use_dora": "dora" in method.kind,
            **_plain(method.options),
        }
    named = {row.r: method.rank if row.rank else None, row.dropout: method.dropout, row.alpha: method.alpha}
    settings = {name: value for name, value in named.items() if name and value is not None}
    options = filled_options(method.kind, method.options, model_type)
    if method.kind == "ia3":
        options["feedforward_modules"] = str(options["feedforward_modules"] or "").split()  # pyright: ignore
    if "cpt_token_ids" in options:
        tokens = options.pop("cpt_token_ids")
        settings |= {"cpt_token_ids": [0] * tokens, "cpt_tokens_type_mask": [4] * tokens}  # pyright: ignore
    if method.kind == "adalora":
        settings["total_step"] = 1000  # when the ranks are fixed does not change a step's memory
    return {**settings, **_plain(options)}


class _AboveNothing:
    """A probability of 0, which any random number exceeds, also a fake one."""

    def __lt__(self, other: object) -> bool:
        return True


# Patterns for the paths of modules and parameters in each part of models with a tower.
_PROJECTOR = (
    r"visual\.(deepstack_)?merger|multi_modal_projector|embed_vision\.(multimodal_embedder|embedding_projection)"
)
_PARTS = {
    "vision": rf"(?!.*({_PROJECTOR})).*(visual\.|vision_tower|vision_model|embed_vision).*",
    "audio": r".*(audio_tower|embed_audio).*",
    "projector": rf".*({_PROJECTOR}).*",
    "language": r"(?!.*(visual\.|vision_(tower|model)|embed_(vision|audio)|audio_tower|multi_modal_projector)).*",
}


def _parts(names: Iterable[str]) -> str:
    """Return a regular expression for the paths in the named parts; empty if there are none."""
    return "|".join(f"({_PARTS[name]})" for name in names)


def target_modules(run: RunSpec, model: Any) -> str | list[str]:
    """Return the modules to adapt, by their names in this model if memplan knows it (q_proj may be a fused qkv).

    With quantised experts these are the names of the linear layers.
    Source: axolotl 0.21 loaders/adapter.py find_all_linear_names.
    """
    named = run.method.targets
    if named == "all-linear" and run.method.quantization is not None and run.method.quantization.experts:
        head = model.get_output_embeddings()
        layers = (path for path, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head)
        return [*dict.fromkeys(path.rpartition(".")[2] for path in layers)]
    if named == "all-linear" or run.method.pattern:
        return str(named)
    if named == "default":
        return list(default_targets(run.method.kind, str(find_config(run.model).get("model_type"))))
    try:
        known = decide(run).structure.graph.recipe.targets
    except MemplanError:  # a family without a stack, or a field that only the estimate refuses: use the names unchanged
        known = named
    return list(known)


def _freeze(model: Any, trainable: int) -> None:
    """Freeze all but the last `trainable` layers of the language model, like LLaMA-Factory's freeze tuning."""
    layers = max(_language_lists(model), key=len, default=None)
    if layers is None:
        raise SpecError("method.kind: freeze needs a model with a list of layers", "method.kind")
    model.requires_grad_(False)
    for layer in list(layers)[-trainable:]:
        layer.requires_grad_(True)


def _language_lists(model: Any) -> Iterator[nn.ModuleList]:
    """Yield the lists of layers, without those inside of a layer, as T5's blocks have."""
    language, part = re.compile(_PARTS["language"]), "decoder." if model.config.is_encoder_decoder else ""
    for name, module in model.named_modules():
        is_of_layers = isinstance(module, nn.ModuleList) and not any(path.isdigit() for path in name.split("."))
        if is_of_layers and language.fullmatch(f"{name}.") and part in f"{name}.":
            yield module


def _wrappers() -> tuple[type[Any], ...]:
    """Return torch's wrapper classes for training on several GPUs that are already imported."""
    modules = (("torch.nn.parallel", "DistributedDataParallel"), ("torch.distributed.fsdp", "FullyShardedDataParallel"))
    return tuple(getattr(sys.modules[name], kind) for name, kind in modules if name in sys.modules)


def unwrapped(model: Any) -> Any:
    """Return the model inside torch's wrappers for several GPUs, or the model itself."""
    while isinstance(model, _wrappers()):
        model = model.module
    return model


def base_of(model: Any) -> Any:
    """Return transformers' model inside torch's, peft's and PPO's wrappers, or the model itself."""
    model = unwrapped(model)
    model = getattr(model, "policy", model)
    return model.get_base_model() if hasattr(model, "peft_config") else model


def facts_of(model: Any) -> Family:
    """Return the facts of a model's family; those of a family without any, if memplan does not know it."""
    return families().get(base_of(model).config.model_type, Family({}))


def _products_saved() -> Any:
    """Return the contexts of a checkpoint that keeps what takes long to compute, as torchtitan's SelectiveAC does."""
    checkpoint = library("torch.utils.checkpoint")
    listed = library("torch._functorch.partitioners").get_default_op_list().compute_intensive_ops
    kept = {op.default for op in listed}
    policies = checkpoint.CheckpointPolicy

    def policy(_: Any, op: Any, *arguments: Any, **keywords: Any) -> Any:
        return policies.MUST_SAVE if op in kept else policies.PREFER_RECOMPUTE

    return checkpoint.create_selective_checkpoint_contexts(policy)


def _checkpoint(model: Any, reentrant: bool, offload: bool, every: int, selective: bool) -> None:
    """Enable transformers' checkpointing of the first of `every` layers; `offload` keeps their inputs on the host."""
    base = base_of(model)
    if selective:
        base.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": _products_saved})
        return
    if hasattr(base, "activation_checkpointing_enable"):
        more = {**({"offload": True} if offload else {}), **({"every_n_layers": every} if every > 1 else {})}
        base.activation_checkpointing_enable({"use_reentrant": reentrant}, **more)
        if reentrant:
            base.enable_input_require_grads()  # transformers itself does it for models that read token ids
        return
    if offload or every > 1:
        field = f"kernels.{'checkpointing' if offload else 'every_n_layers'}"
        raise ProbeError(f"{field}: {'offload' if offload else every} needs transformers 5.24 or later", field)
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})  # transformers before 5
    if base is not model:
        base.enable_input_require_grads()
