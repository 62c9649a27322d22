"""A quantised checkpoint: what its `quantization_config` says, and how a run trains or runs it.

Adapters train over some formats as stored. Others are dequantised on loading, because the library cannot train over
them. Source: transformers 5.24 quantizers/, `is_trainable` and `is_qat_trainable`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from memplan.catalogue.methods.methods import ADAPTERS
from memplan.catalogue.quantization.inference_formats import InferenceFormat
from memplan.catalogue.quantization.quantization import FORMATS, FP8_BLOCK, WHOLE
from memplan.core.errors import ConfigError, SpecError, printable, refused
from memplan.core.records import NamedTuple
from memplan.models.model import ModelSpec
from memplan.program.stack_facts import adaptable, stacks
from memplan.program.stored.checkpoint import built_tensors
from memplan.program.stored.quantization_config import (
    FIELD,
    Modules,
    awq_group,
    bitsandbytes_kind,
    fp8_block,
    gptq_modules,
    gptq_settings,
    names_in,
    scheme_of,
)
from memplan.resolve.inference_formats import LOADED_FORMATS, dequantised_fp8, running_checkpoint
from memplan.spec.formats import Quantization
from memplan.spec.training import Method

_PLAIN = Quantization()
_BLOCKS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_HEAD = "lm_head"
_LONGEST = 200  # characters of a name that are shown


class CheckpointMethod(NamedTuple):
    """A method applied to a checkpoint.

    method     the method, with the quantisation filled in
    as_stored  whether that quantisation is the checkpoint's own
    notes      what was decided
    running    how its matrices run, if the format cannot be trained over
    """

    method: Method
    as_stored: bool = False
    notes: tuple[str, ...] = ()
    running: InferenceFormat | None = None


class CheckpointFormat(NamedTuple):
    """How a checkpoint is stored.

    words            its format, in the library's words
    quantization     its format as a run's `quantization`, or None if memplan has no such format
    why_dequantised  why it is dequantised to train, or "" if adapters train over it
    notes            what to tell the user
    """

    words: str
    quantization: Quantization | None
    why_dequantised: str = ""
    notes: tuple[str, ...] = ()


def method_for_training(
    model: ModelSpec, method: Method, why_not_fp8: str, capability: tuple[int, int] | None
) -> CheckpointMethod:
    """Return the method for training, with the checkpoint's quantisation filled in unless the run sets its own.

    why_not_fp8  why nothing trains over fp8 here, or ""

    Raises SpecError if the method cannot train this checkpoint, ConfigError if its config is incomplete.
    """
    config: Any = model.config.get(FIELD)
    if not isinstance(config, Mapping) or not config:
        return CheckpointMethod(method)
    stored = checkpoint_format(model, cast(Mapping[str, Any], config))
    dense = stored.why_dequantised
    if stored.words == "fp8" and not dense:
        if method.kind not in ("lora", "qlora"):
            dense = "only LoRA trains over it"
        elif why := _why_not_fp8(method, capability) or why_not_fp8:
            dense = why
        elif model.config.get("expert_dtype") == "fp4":
            dense = "transformers 5.24 computes no gradients through its experts in fp4"
        elif any(_adapted(names, method) for names in stacks(model).values()):
            dense = "peft adds expert adapters to their matrices, which fails in fp8; name targets other than experts"
    if dense:
        why = f"the checkpoint is stored in {stored.words} and trains dequantised: {dense}"
        return CheckpointMethod(method, False, (why,))
    asked, actual = method.quantization, stored.quantization
    if method.kind not in ADAPTERS:
        raise SpecError(
            f"{FIELD}: the checkpoint is stored in {stored.words}, and quantised weights cannot be fully trained; use "
            "lora, or the unquantised checkpoint",
            "method.kind",
        )
    if actual is None:
        return CheckpointMethod(method)
    _check_format(asked, actual, stored.words)
    if "dora" in method.kind and actual.format not in ("nf4", "fp4", "int8"):
        raise refused("method.kind", f"peft has no DoRA over {actual.format}; use lora")
    _check_sizes(model, actual)
    row = FORMATS[actual.format]
    needs = f"; it needs {row.needs}" if row.needs else ""
    if asked in (None, _PLAIN):
        method = method.model_copy(update={"quantization": actual})
    how_trained = f"adapters train over the checkpoint as stored: {stored.words}{needs}"
    return CheckpointMethod(method, True, (how_trained, *stored.notes))


def method_for_inference(
    model: ModelSpec, method: Method, precision: str, capability: tuple[int, int] | None, formats: bool
) -> CheckpointMethod:
    """Return the method for inference, with the checkpoint's quantisation filled in.

    Matrices stay as stored if memplan has their format. `precision` is the model's dtype; `formats` says whether this
    version runs formats that cannot be trained over.
    Raises SpecError if the run asks for another quantisation or the version cannot load the checkpoint, ConfigError
    if its config is incomplete.
    """
    config: Any = model.config.get(FIELD)
    if not isinstance(config, Mapping) or not config:
        return CheckpointMethod(method)
    if method.kind in ADAPTERS:
        return method_for_training(model, method, "", capability)
    declared = cast(Mapping[str, Any], config)
    how = declared.get("quant_method")
    if formats and how in LOADED_FORMATS:
        checkpoint = running_checkpoint(model, method, declared, precision, capability)
        if checkpoint.quantization is None:
            return CheckpointMethod(method, False, checkpoint.notes, checkpoint.running)
        _check_format(method.quantization, checkpoint.quantization, checkpoint.words)
        method = method.model_copy(update={"quantization": checkpoint.quantization})
        return CheckpointMethod(method, checkpoint.packed, checkpoint.notes, checkpoint.running)
    stored = checkpoint_format(model, declared)
    asked, actual = method.quantization, stored.quantization
    dense = stored.why_dequantised if actual is None or stored.words != "fp8" else ""
    if stored.words == "fp8" and not dense:
        dense = _why_not_fp8(method, capability)
    if actual is None or dense:
        note = f"the checkpoint is stored in {stored.words} and runs dequantised: {dense}"
        is_fp8 = formats and actual is not None and stored.words == "fp8" and asked is None
        return CheckpointMethod(
            method, False, (note,), dequantised_fp8(actual.skip or ()) if is_fp8 and actual else None
        )
    _check_format(asked, actual, stored.words)
    _check_sizes(model, actual)
    if asked in (None, _PLAIN):
        method = method.model_copy(update={"quantization": actual})
    return CheckpointMethod(method, True, (f"the checkpoint runs as stored: {stored.words}", *stored.notes))


def _why_not_fp8(method: Method, capability: tuple[int, int] | None) -> str:
    """Return why a checkpoint in fp8 is dequantised on every path, or ""."""
    if method.quantization is not None and method.quantization.format != "fp8":
        return "transformers makes another format only of a copy in 16 bits"
    if capability is not None and capability < (8, 9):
        return "its kernels need compute capability 8.9"
    return ""


def _check_format(asked: Quantization | None, actual: Quantization, words: str) -> None:
    """Raise SpecError if the run asks for another format than the checkpoint has."""
    if asked not in (None, _PLAIN) and asked.format != actual.format:
        raise SpecError(
            f"method.quantization: the checkpoint is stored in {words}, not {asked.format}; leave it out, or "
            "use the unquantised checkpoint",
            "method.quantization.format",
        )


def _check_sizes(model: ModelSpec, quantization: Quantization) -> None:
    """Raise ConfigError if a tensor of the checkpoint has another size than its config implies."""
    block = quantization.block_size
    words = 4 if quantization.format == "gptq-int8" else 8  # weights per int32
    for tensor in model.checkpoint.tensors if model.checkpoint is not None else ():
        module, _, part = tensor.name.rpartition(".")
        weight = built_tensors(model).get(f"{module}.weight")
        if weight is None or len(weight.shape) != 2 or part not in _PARTS:
            continue
        out, inputs = weight.shape
        groups = 1 if block == WHOLE else -(-inputs // block)
        blocks = 1 if block == WHOLE else -(-out // FP8_BLOCK) * -(-inputs // FP8_BLOCK)
        implied = {
            "qweight": out * inputs // words,
            "scales": groups * out,
            "qzeros": groups * out // words,
            "g_idx": inputs,
            "weight_scale_inv": blocks,
        }[part]
        if tensor.elements != implied:
            raise ConfigError(
                f"model: {printable(tensor.name, _LONGEST)} has {tensor.elements:,} elements in the checkpoint, but "
                f"its {FIELD} implies {implied:,}",
                "model",
            )


_PARTS = ("qweight", "scales", "qzeros", "g_idx", "weight_scale_inv")


def checkpoint_format(model: ModelSpec, config: Mapping[str, Any]) -> CheckpointFormat:
    """Return how a checkpoint is stored, from its `quantization_config`.

    Raises ConfigError for an invalid config, SpecError for an unsupported format.
    """
    how = config.get("quant_method")
    match how:
        case "gptq":
            return _gptq(model, config)
        case "awq":
            return _awq(model, config)
        case "fp8":
            return _fp8(model, config)
        case "bitsandbytes":
            return _bitsandbytes(model, config)
        case "mxfp4":
            return CheckpointFormat("mxfp4", None, "transformers cannot train over it: Mxfp4Config(dequantize=True)")
        case "compressed-tensors":
            return _compressed(config)
        case "torchao":
            return _torchao(model, config)
        case _:
            shown = printable(str(how or "?"), 40)
            known = "gptq, awq, fp8, mxfp4, bitsandbytes, compressed-tensors, torchao"
            raise SpecError(f"{FIELD}: {shown} checkpoints are not supported yet; supported: {known}", "model")


def _gptq(model: ModelSpec, config: Mapping[str, Any]) -> CheckpointFormat:
    bits, group = gptq_settings(config)
    if config.get("dynamic"):
        raise SpecError(f"{FIELD}: GPTQ with per-layer settings (dynamic) is not supported yet", "model")
    listed = gptq_modules(config)
    not_listed = [path for path in _block_layers(model) if listed and not path.endswith(tuple(listed))]
    skip, notes = _skipped(model, [*([] if config.get("lm_head") else [_HEAD]), *not_listed])
    words = f"gptq, {bits} bits in {_group_words(group)}"
    return CheckpointFormat(words, _quantization(f"gptq-int{bits}", group, skip), _refuse_experts(model), notes)


def _awq(model: ModelSpec, config: Mapping[str, Any]) -> CheckpointFormat:
    group = awq_group(config)
    skip, notes = _skipped(model, [_HEAD, *names_in(config, "modules_to_not_convert")])
    words = f"awq, 4 bits in {_group_words(group)}"
    return CheckpointFormat(words, _quantization("awq-int4", group, skip), _refuse_experts(model), notes)


def _fp8(model: ModelSpec, config: Mapping[str, Any]) -> CheckpointFormat:
    block = fp8_block(config)
    key = "modules_to_not_convert" if config.get("modules_to_not_convert") else "ignored_layers"
    skip, notes = _skipped(model, names_in(config, key) if config.get(key) else [_HEAD])
    dense = "its config says so" if config.get("dequantize") is True else ""
    return CheckpointFormat("fp8", _quantization("fp8", block, skip), dense, notes)


def _bitsandbytes(model: ModelSpec, config: Mapping[str, Any]) -> CheckpointFormat:
    kind, key = bitsandbytes_kind(config), "llm_int8_skip_modules"
    if not kind:
        return CheckpointFormat("bitsandbytes", _PLAIN)
    skip, notes = _skipped(model, names_in(config, key) if config.get(key) else [_HEAD])
    if kind == "int8":
        return CheckpointFormat("bitsandbytes, int8", Quantization(format="int8", skip=skip), "", notes)
    double = bool(config.get("bnb_4bit_use_double_quant"))
    storages = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    storage = storages.get(str(config.get("bnb_4bit_quant_storage")).removeprefix("torch."), "uint8")
    fields = {"format": kind, "double_quant": double, "storage": storage, "skip": skip}
    words = f"bitsandbytes, {kind}{', double quantisation' if double else ''}"
    return CheckpointFormat(words, Quantization.model_validate(fields), "", notes)


def _torchao(model: ModelSpec, config: Mapping[str, Any]) -> CheckpointFormat:
    """Return torchao's format, which adapters train over in 8 bits."""
    words = scheme_of(config, "bf16").words
    if words != "torchao, torchao-int8":
        raise SpecError(f"{FIELD}: nothing trains over {words}, only over weights alone in int8", "model")
    skip, notes = _skipped(model, [_HEAD, *names_in(config, "modules_to_not_convert")])
    return CheckpointFormat(words, Quantization.model_validate({"format": "torchao-int8", "skip": skip}), "", notes)


def _compressed(config: Mapping[str, Any]) -> CheckpointFormat:
    """Return compressed-tensors' format. The library dequantises on loading or in the first forward pass.

    Source: transformers 5.24 utils/quantization_config.py CompressedTensorsConfig.
    """
    kinds: list[str] = []
    groups: Any = config.get("config_groups")
    for group in cast(Mapping[str, Any], groups).values() if isinstance(groups, Mapping) else ():
        weights: Any = cast(Mapping[str, Any], group).get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            settings = cast(Mapping[str, Any], weights)
            kinds.append(f"{settings.get('type', 'int')}{settings.get('num_bits', '?')}")
    words = ", ".join(["compressed-tensors", *dict.fromkeys(printable(kind, 20) for kind in kinds)])
    return CheckpointFormat(words, None, "the library unpacks it, at the latest on the first forward pass")


def _adapted(names: Sequence[str], method: Method) -> bool:
    """Return whether the method adapts a stack of experts that stands for linear layers of these names."""
    targets = method.targets
    if isinstance(targets, str):
        return bool(names) and targets == "all-linear"
    return bool(names) and any(t.rpartition(".")[2] in names for t in targets)


def _refuse_experts(model: ModelSpec) -> str:
    """Raise SpecError for a mixture of experts; otherwise return "".

    In transformers 5 GPTQ and AWQ only replace linear layers, and experts are not linear layers.

    Source: transformers 5.24 quantizers/quantizer_gptq.py, quantizer_awq.py: neither has serialized_names.
    """
    if stacks(model):
        raise SpecError(
            f"{FIELD}: experts quantised by GPTQ or AWQ are not supported with transformers 5, which cannot load "
            "them; use profile transformers-4.51, where experts are linear layers",
            "model",
        )
    return ""


def _quantization(format: str, group: int, skip: tuple[str, ...]) -> Quantization:
    if group != WHOLE and group not in _BLOCKS:
        known = ", ".join(map(str, (WHOLE, *_BLOCKS)))
        raise ConfigError(f"{FIELD}: group_size must be one of {known}, not {group}", FIELD)
    fields = {"format": format, "block_size": group, "double_quant": False, "skip": skip, "kbit_preparation": False}
    return Quantization.model_validate(fields)


def _group_words(group: int) -> str:
    return "one group per column" if group == WHOLE else f"groups of {group}"


def _block_layers(model: ModelSpec) -> list[str]:
    """Return the paths of the linear layers inside blocks."""
    return [path for path in adaptable(model) if "." in path and not path.startswith("model.")]


def _skipped(model: ModelSpec, patterns: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the last name parts of modules that are not quantised, and a note on those that only some layers skip."""
    is_skipped = Modules(patterns).has
    modules = dict.fromkeys(
        name.rpartition(".")[0] for name, tensor in built_tensors(model).items() if len(tensor.shape) == 2
    )
    known = {path.rpartition(".")[2] for path in adaptable(model)} - {_HEAD}
    skipped: dict[str, int] = {}
    total: dict[str, int] = {}
    for module in modules:
        leaf = module.rpartition(".")[2]
        total[leaf] = total.get(leaf, 0) + 1
        skipped[leaf] = skipped.get(leaf, 0) + is_skipped(module)
    skip = [leaf for leaf in total if leaf in known and 2 * skipped[leaf] > total[leaf]]
    mixed = [leaf for leaf in total if leaf in known and 0 < skipped[leaf] < total[leaf]]
    notes = [
        f"{leaf} is not quantised in {skipped[leaf]} of {total[leaf]} layers: counted as "
        f"{'not ' * (leaf in skip)}quantised"
        for leaf in mixed
    ]
    head = [_HEAD] if model.tie_word_embeddings or is_skipped(_HEAD) else []
    return (*head, *skip), tuple(notes)
