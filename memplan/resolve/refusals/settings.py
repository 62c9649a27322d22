"""Methods, precisions, optimizers and kernels that are refused whatever the number of GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast, get_args

from memplan.catalogue.kernels.wiring import GENERATING
from memplan.catalogue.methods.methods import ADAPTERS, LORA
from memplan.catalogue.optimizers.optimizers import ON_HOST, OPTIMIZERS
from memplan.catalogue.quantization.quantization import FP8_BLOCK, WHOLE
from memplan.core.errors import SpecError, nearest, refused
from memplan.models.peft_methods import (
    BITSANDBYTES,
    PEFT_METHODS,
    PeftMethod,
    Value,
    computes_again,
    filled_options,
    leads_stream,
)
from memplan.resolve.open_run import OpenRun
from memplan.resolve.refusals.refuse import not_yet, not_yet_with
from memplan.spec.base import LARGEST
from memplan.spec.formats import Quantization, TrainedOver
from memplan.spec.training import Method, Optimizer, Precision

_PLAIN = Method()
_FLOATS = ("bf16", "fp16", "fp32")
_GROUPED_FORMATS = ("gptq-int4", "gptq-int8", "awq-int4")
# Formats of weights that nothing trains over, and what is done instead.
# Source: transformers 5.24 quantizers/quantizer_mxfp4.py and quantizer_torchao.py is_trainable; peft 0.21
# tuners/lora/torchao.py TorchaoLoraLinear._check_dtype_supported.
_NEVER_TRAINED = {
    "mxfp4": "transformers does not train over mxfp4, whose kernels have no backward: its experts train dequantised "
    "(Mxfp4Config(dequantize=True)), which is counted with lora and no format",
    "torchao-int4": "peft and transformers only train over torchao's 8 bits; use torchao-int8, or nf4",
}
_WHOLE_FORMATS = (*_GROUPED_FORMATS, "fp8", "int8", "torchao-int8")


def settings(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for settings that the run's parts do not support."""
    method, kernels = r.method, r.kernels
    if kernels.checkpointing == "selective" and not r.is_megatron_model:
        yield from _selective(r)
    if kernels.every_n_layers > 1:
        yield from _every_n_layers(r)
    if kernels.packages:
        yield from _packages(r)
    yield from _method(method, r.storages, r.run_formats)
    if method.kind in PEFT_METHODS and r.parallelism.world > 1:
        yield not_yet_with(
            "method.kind", f"{method.kind} on {r.parallelism.world} GPUs", f"{', '.join(LORA)}, or one GPU"
        )
    if leads_stream(method.kind):
        yield from _stream(r)
    if method.kind in PEFT_METHODS and PEFT_METHODS[method.kind].own_loss in ("context", "stream") and r.trains:
        yield from _own_loss(r)
    if method.kind in LORA and method.options.get("bias", "none") != "none" and r.parallelism.world > 1:
        yield not_yet("method.options.bias", method.options["bias"], "none on several GPUs")
    if method.kind in LORA and method.trained_tokens and (r.parallelism.world > 1 or not r.trains):
        where = "on several GPUs" if r.trains else "without training"
        yield refused("method.options.trainable_token_indices", f"is not supported yet {where}; leave it out")
    if "lora" in (kernels.fused or ()) and (method.options.get("bias") or method.options.get("rank_pattern")):
        yield not_yet_with(
            "method.options", "bias or rank_pattern with fused LoRA kernels", "kernels.fused without lora"
        )
    p = r.precision
    wide = method.kind == "ln_tuning" and method.adapter_dtype not in (None, p.weights) and method.quantization is None
    if wide and not p.autocast and r.trains:
        yield refused(
            "method.adapter_dtype",
            f"peft's copies of the norms are in {method.adapter_dtype}, and layers in {p.weights} cannot read their "
            f"output; use autocast, or adapters in {p.weights}",
        )
    if not computes_again(method.kind) and kernels.checkpointing != "none":
        yield refused("kernels.checkpointing", f"peft's {method.kind} fails with checkpointing; use none")
    if method.has_prefix and not r.library.generation.further_caches:
        yield refused("method.kind", f"{method.kind} is not supported yet with {r.profile}; use transformers-5")
    if method.kind in PEFT_METHODS and not r.trains:
        yield not_yet("method.kind", method.kind, f"full, {', '.join(LORA)} without training")
    yield from _precision(r.precision, method.quantization)
    yield from _optimizer(r.optimizer)


def _selective(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for runs whose checkpoints cannot keep matrix products yet."""
    field, p = "kernels.checkpointing", r.parallelism
    if r.code not in ("transformers", "torchtitan") or r.kernels.reentrant or r.model.is_encoder_decoder:
        yield not_yet(field, "selective", "none, full, offload")
    q = r.method.quantization
    is_plain = not r.kernels.fused and (q is None or q.format in BITSANDBYTES)
    divided = max(p.cp, p.ep) > 1 or (p.tp > 1 and r.style != "torchtitan")
    if not is_plain or r.model.has_tower or divided:
        what = f"selective and fused kernels, towers, weights not in {', '.join(BITSANDBYTES)}, or cp, ep or tp"
        yield not_yet_with(field, what, "full")


def _every_n_layers(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for checkpointing of some layers that a library, or memplan so far, does not do."""
    field, n = "kernels.every_n_layers", r.kernels.every_n_layers
    if r.kernels.checkpointing == "none":
        yield refused(field, f"{n} only applies with checkpointing, and kernels.checkpointing is none")
    if r.code == "litgpt" or r.is_megatron_model:
        yield not_yet_with(field, r.profile, "1")
    if r.kernels.checkpointing == "offload" or r.kernels.reentrant:
        yield not_yet_with(field, f"{'offload' if not r.kernels.reentrant else 'reentrant'} checkpointing", "1")
    if r.model.has_tower or r.parallelism.pp > 1 or r.parallelism.strategy in ("fsdp", "zero3"):
        yield not_yet_with(field, "towers, pipeline stages, fsdp or zero3", "1")


def _packages(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for packages whose kernels the model does not run, or memplan does not count yet."""
    field, known = "kernels.packages", r.model.family.training.packages
    unused = [name for name in r.kernels.packages if name not in known]
    if unused:
        instead = f"supported: {', '.join(known)}" if known else "leave it out"
        yield refused(field, f"kernels of {unused[0]} are not counted for {r.name}; {instead}")
    if "mamba_ssm" in r.kernels.packages:
        yield from _scans(r, field)
    if r.batch_facts.packed is not None or (r.trainer in GENERATING and r.rollout == "transformers"):
        yield not_yet_with(field, "packed batches, or completions that the model generates itself", "none")


def _scans(r: OpenRun, field: str) -> Iterator[SpecError]:
    """Yield errors for runs that mamba-ssm's function, or memplan so far, does not support."""
    if "causal_conv1d" not in r.kernels.packages:
        yield refused(field, "mamba_ssm is counted together with causal_conv1d; name both")
    if r.method.quantization is not None and not r.model.family.training.scans_alone:
        yield refused(field, "mamba_ssm multiplies by the weight of out_proj itself, which fails quantised; use lora")
    if r.model.family.generation.cache == "mamba-1" and r.model.get("use_bias", False):
        yield refused(field, "mamba_ssm's function for Mamba 1 fails with a bias of out_proj (use_bias)")
    if r.precision.autocast and (r.precision.weights == "fp32" or r.method.quantization is not None):
        yield not_yet_with(field, "mamba_ssm and autocast over fp32 weights", "bf16 weights, or no packages")


def _method(m: Method, storages: tuple[str, ...], runs: tuple[str, ...]) -> Iterator[SpecError]:
    if m.kind not in ADAPTERS:
        for field in ("rank", "alpha", "targets", "dropout", "modules_to_save", "adapter_dtype", "options"):
            if getattr(m, field) != getattr(_PLAIN, field):
                yield no_adapters(m.kind, f"method.{field}")
    if m.kind != "freeze" and m.trainable_layers != _PLAIN.trainable_layers:
        yield only_freeze(m.kind)
    other = PEFT_METHODS.get(m.kind)
    if other is not None:
        yield from _peft_method(m, other)
    elif m.options and m.kind in LORA:
        from memplan.resolve.peft_options import lora_options

        yield from lora_options(m)
    if m.quantization is not None:
        if m.quantization.format in ("hqq-int4", "torchao-int8") and "dora" in m.kind:
            yield not_yet_with("method.kind", f"{m.kind} over {m.quantization.format}", "qlora")
        yield from _quantization(m.quantization, storages, runs)


def _own_loss(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for losses of a model whose method computes another one from its logits."""
    if r.kernels.loss != "hf" or "cross_entropy" in (r.kernels.fused or ()):
        yield not_yet_with("kernels.loss", f"{r.method.kind}, which computes its own loss of all logits", "hf")
    if r.library.loss.logits != "padded":
        yield not_yet_with("profile", r.method.kind, "transformers-5")


def _stream(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for what is not counted yet around layers that a second stream goes through."""
    kernels, p = r.kernels, r.parallelism
    others = {
        f"trainer {r.trainer}": r.trainer != "sft",
        "fused kernels": bool(kernels.fused),
        "flex_attention": kernels.attention == "flex_attention",
        "packed batches": r.batch_facts.packed is not None,
        "offloaded activations": p.offload.activations,
    }
    for other, is_set in others.items():
        if is_set:
            yield not_yet_with("method.kind", f"{r.method.kind} and {other}", "lora")


# Settings without a default in peft, by what a method trains.
_REQUIRED = {
    **dict.fromkeys(("prompt", "prefix"), ("num_virtual_tokens",)),
    "attention": ("adapter_len", "adapter_layers"),
}
# Numbers that may be 0; of a size of blocks it means that the other setting gives their number.
_MAY_BE_0 = ("oft_block_size", "boft_block_size", "num_frozen_tokens")
# Sizes that the method chooses itself if they are not given.
_CHOSEN = ("shadow_num_hidden_layers", "shadow_intermediate_size", "update_hidden_size")
# Settings of which one value is counted, and why.
_ONLY = {"shadow_model": "a copy of the model's class with fewer layers"}
# Weights of a loss, without which the method is not counted.
_LOSSES = ("auxiliary_loss_weight",)


def _peft_method(m: Method, row: PeftMethod) -> Iterator[SpecError]:
    """Yield errors for settings that a method other than LoRA does not have."""
    settings = ", ".join((*filter(None, ("rank" if row.rank else "",)), *row.options)) or "none"
    for field, has in (("rank", row.rank), ("alpha", row.alpha), ("dropout", row.dropout)):
        if not has and getattr(m, field) != getattr(_PLAIN, field):
            yield refused(f"method.{field}", f"{m.kind} has no {field} in peft; its settings are {settings}")
    if row.on in (*_REQUIRED, "tokens", "blocks") and m.targets not in ("default", ()):
        yield refused("method.targets", f"{m.kind} adapts no linear layer; leave them out")
    if row.on == "tokens":
        if m.modules_to_save:
            yield refused("method.modules_to_save", f"{m.kind} has none in peft")
        from memplan.resolve.peft_options import token_indices

        yield from token_indices("method.options.token_indices", m.options.get("token_indices"))
    if "cpt_token_ids" in row.options:
        from memplan.resolve.peft_options import token_indices

        yield from token_indices("method.options.cpt_token_ids", m.options.get("cpt_token_ids"), repeats=True)
    for name in _REQUIRED.get(row.on, ()):
        if name not in row.options:
            continue
        value = m.options.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            given = f"must be given (--peft-options {name}=8)"
            shown = given if value is None else f"must be a whole number above 0, not {value!r:.40}"
            what = "layers" if name == "adapter_layers" else "tokens"
            yield refused(f"method.options.{name}", f"{shown}: the number of {what} that {m.kind} trains")
    for name, value in m.options.items():
        field = f"method.options.{name}"
        if name not in row.options:
            near = nearest(name, tuple(row.options), 1)
            hint = f"did you mean {near[0]}?" if near else f"its settings are {settings}"
            yield refused(field, f"{m.kind} has no such setting in memplan; {hint}")
        elif (default := row.options[name]) is not None and not _is_like(value, default):
            kinds = {bool: "true or false", int: "a whole number", float: "a fraction such as 0.5", str: "a word"}
            yield refused(field, f"must be {kinds[type(default)]}, not {value!r:.40}")
        elif name in _CHOSEN and value is not None and not _is_count(value):
            yield refused(field, f"must be a whole number above 0, not {value!r:.40}")
        else:
            yield from _out_of_range(field, name, value, default)
    frozen = filled_options(m.kind, m.options, "").get("num_frozen_tokens")
    if isinstance(frozen, int) and 0 < m.virtual_tokens <= frozen:
        yield refused("method.options.num_frozen_tokens", f"{frozen} of {m.virtual_tokens} tokens leave none to train")


def _is_like(value: Any, default: Value) -> bool:
    """Whether a value has the type of the default; a whole number is a fraction too."""
    return isinstance(value, type(default)) or (isinstance(default, float) and type(value) is int)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST


def _out_of_range(field: str, name: str, value: Any, default: Value) -> Iterator[SpecError]:
    """Yield an error for a number that the setting does not allow: fractions are below 1, and most counts above 0."""
    if name in _LOSSES:
        if value <= 0:
            yield refused(field, f"must be above 0, not {value}: without its loss the method is not counted yet")
    elif isinstance(default, float) and not 0 <= value < 1:
        yield refused(field, f"must be at least 0 and less than 1, not {value}")
    if name in _ONLY and value != default:
        yield not_yet(field, value, f"{default}, {_ONLY[name]}")
    if isinstance(default, int) and not isinstance(default, bool):
        least = 0 if name in _MAY_BE_0 else min(default, 1)
        if value < least:
            yield refused(field, f"must be at least {least}, not {value!r:.40}")
        if value > LARGEST:
            yield refused(field, f"must be at most {LARGEST}, not {value!r:.40}")


def no_adapters(kind: str, field: str) -> SpecError:
    """Return the error that `field` needs adapters, and the method has none."""
    return refused(field, f"method.kind {kind} has no adapters; {', '.join(LORA)} have")


def only_freeze(kind: str) -> SpecError:
    """Return the error that trainable_layers needs method freeze."""
    field = "method.trainable_layers"
    return refused(field, f"only applies to method.kind freeze, not {kind}")


def _quantization(q: Quantization, storages: tuple[str, ...], runs: tuple[str, ...]) -> Iterator[SpecError]:
    field = "method.quantization"
    trained = cast(tuple[str, ...], get_args(TrainedOver))
    if q.format in runs and q.format not in trained:
        return
    if q.format in _NEVER_TRAINED:
        yield refused(f"{field}.format", _NEVER_TRAINED[q.format])
    if q.format not in trained:
        elsewhere = "others, such as w4a16, for inference; GGUF types with serving engines"
        yield not_yet(f"{field}.format", q.format, f"{', '.join((*trained, *runs))}; {elsewhere}")
    if q.block_size < (16 if q.format in _GROUPED_FORMATS else 32) and not (
        q.block_size == WHOLE and q.format in _WHOLE_FORMATS
    ):
        size = "one scale per column" if q.block_size == WHOLE else f"blocks of {q.block_size}"
        yield refused(f"{field}.block_size", f"{q.format} has no {size}")
    if q.format == "fp8" and q.block_size not in (WHOLE, FP8_BLOCK):
        yield not_yet(f"{field}.block_size", q.block_size, f"{FP8_BLOCK}, or {WHOLE} for one scale per matrix")
    if q.storage not in storages:
        choices = ", ".join(storages)
        if "uint8" not in storages:
            choices += f": FSDP cannot shard integers; --quant-storage {storages[0]} packs them into floats"
        if storages == ("uint8",):
            choices += f"; {', '.join(_FLOATS)} with FSDP"
        yield not_yet(f"{field}.storage", q.storage, choices)
    for name, whole in (("int8", Quantization().block_size), ("torchao-int8", WHOLE)):
        if q.format == name and q.block_size != whole:
            yield refused(f"{field}.block_size", f"{name} has no blocks; nf4 and fp4 have")


def _precision(p: Precision, quantization: Quantization | None) -> Iterator[SpecError]:
    if p.compute in ("fp8", "float8"):
        yield not_yet("precision.compute", p.compute, "bf16, fp16, fp32")
    elif p.autocast and p.compute == "fp32":
        yield refused("precision.compute", "autocast computes in bf16 or fp16, not fp32")
    elif not p.autocast and quantization is None and p.compute not in (None, p.weights):
        yield refused(
            "precision.compute", f"without autocast layers compute in the weights' dtype, {p.weights}, not {p.compute}"
        )
    if p.master is not None and (p.master != "fp32" or p.weights == "fp32"):
        yield refused(
            "precision.master", f"master weights are fp32 copies of bf16 or fp16 weights, not {p.master} of {p.weights}"
        )


def _optimizer(o: Optimizer) -> Iterator[SpecError]:
    row = OPTIMIZERS.get(str(o.name))
    if row is None:
        return  # the catalogue refuses unknown names and suggests the nearest
    states = [rule for rule in (*row.states, *row.projector) if o.momentum or not rule.momentum]
    if o.momentum and not any(rule.momentum for rule in states):
        names = ", ".join(name for name, other in OPTIMIZERS.items() if any(rule.momentum for rule in other.states))
        yield refused("optimizer.momentum", f"{o.name} has no momentum; use {names}")
    if o.state_dtype is not None and not any(rule.dtype == "moment" for rule in states):
        yield refused("optimizer.state_dtype", f"{o.name} has no states whose dtype can be set")


def optimizer_offload(optimizer: str) -> Iterator[SpecError]:
    """Yield an error for an optimizer that cannot step on the host."""
    if optimizer in OPTIMIZERS and optimizer not in ON_HOST:
        yield refused(
            "parallelism.offload", f"{optimizer} (optimizer.name) cannot step on the host; use {' or '.join(ON_HOST)}"
        )
