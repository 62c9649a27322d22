"""A checkpoint that is stored quantised: what its config's `quantization_config` says, and how it trains.

Adapters train over some formats as they are stored; others are dequantised when they are loaded, because the library
trains nothing over them. Source of what trains: transformers 5.24 quantizers/, `is_trainable` and `is_qat_trainable`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from memplan.catalogue.methods.methods import ADAPTERS
from memplan.catalogue.quantization.inference_formats import Running
from memplan.catalogue.quantization.quantization import FORMATS, FP8_BLOCK, WHOLE
from memplan.core.errors import ConfigError, SpecError, printable
from memplan.models.layers import as_json
from memplan.models.model import ModelSpec
from memplan.program.stack_facts import adaptable, stacks
from memplan.program.stored.checkpoint import built_tensors
from memplan.resolve.inference_formats import RUN, dequantised_fp8, running_checkpoint
from memplan.spec.formats import Quantization
from memplan.spec.training import Method

_FIELD = "quantization_config"
_PLAIN = Quantization()
_BLOCKS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_HEAD = "lm_head"
_MOST_WILD, _LONGEST = 64, 200  # patterns with .* that are read, and letters of a name that one may end with


class Trained(NamedTuple):
    """A method over a checkpoint. `as_stored`: its quantisation is the checkpoint's own; `notes`: what was decided;
    `running`: how its matrices run, where nothing trains over their format."""

    method: Method
    as_stored: bool = False
    notes: tuple[str, ...] = ()
    running: Running | None = None


class Stored(NamedTuple):
    """How a checkpoint is stored: the words of its library, and as a run's `quantization`, None where memplan has no
    such format. `dense`: why it trains dequantised, empty where adapters train over it as it is."""

    words: str
    quantization: Quantization | None
    dense: str = ""
    notes: tuple[str, ...] = ()


def trained(model: ModelSpec, method: Method, trains_fp8: bool, capability: tuple[int, int] | None) -> Trained:
    """The method with how the checkpoint is stored filled in, where the run says nothing else.

    Raises SpecError where the method does not train such a checkpoint, ConfigError where its config says too little.
    """
    config: Any = model.config.get(_FIELD)
    if not isinstance(config, Mapping) or not config:
        return Trained(method)
    stored = stored_as(model, cast(Mapping[str, Any], config))
    dense = stored.dense
    if stored.words == "fp8" and not dense:
        if not trains_fp8:
            dense = "nothing trains over it in this profile"
        elif capability is not None and capability < (8, 9):
            dense = "its kernels need compute capability 8.9"
        elif method.quantization is not None and method.quantization.format != "fp8":
            dense = "the run quantises it otherwise"
        elif method.kind not in ("lora", "qlora"):
            dense = "only LoRA trains over it"
        elif any(_adapted(names, method) for names in stacks(model).values()):
            dense = "peft adds adapters of experts to their matrices, which it cannot in fp8; name targets without them"
    if dense:
        why = f"the checkpoint is stored in {stored.words} and trains dequantised: {dense}"
        return Trained(method, False, (why,))
    asked, given = method.quantization, stored.quantization
    if method.kind not in ADAPTERS:
        raise SpecError(
            f"{_FIELD}: the checkpoint is stored in {stored.words}, and quantised weights do not train in full; use "
            "lora, or the checkpoint it was made from",
            "method.kind",
        )
    if given is None:
        return Trained(method)
    if asked not in (None, _PLAIN) and asked.format != given.format:
        raise SpecError(
            f"method.quantization: the checkpoint is stored in {stored.words}, not {asked.format}; leave it out, or "
            "give the checkpoint it was made from",
            "method.quantization.format",
        )
    if "dora" in method.kind and given.format not in ("nf4", "fp4", "int8"):
        raise SpecError(f"method.kind: peft has no DoRA over {given.format}; use lora", "method.kind")
    _check(model, given)
    row = FORMATS[given.format]
    needs = f"; it needs {row.needs}" if row.needs else ""
    if asked in (None, _PLAIN):
        method = method.model_copy(update={"quantization": given})
    said = f"adapters train over the checkpoint as it is stored: {stored.words}{needs}"
    return Trained(method, True, (said, *stored.notes))


def served(
    model: ModelSpec, method: Method, precision: str, capability: tuple[int, int] | None, formats: bool
) -> Trained:
    """The method with how the checkpoint is stored filled in, where nothing trains: matrices stay as they are stored,
    where memplan has their format. `precision` is the model's dtype, `formats` whether the version runs those that
    nothing trains over.

    Raises SpecError where the run quantises it otherwise, or the version does not load it, ConfigError where its config
    says too little.
    """
    config: Any = model.config.get(_FIELD)
    if not isinstance(config, Mapping) or not config:
        return Trained(method)
    if method.kind in ADAPTERS:
        return trained(model, method, True, capability)
    said = cast(Mapping[str, Any], config)
    how = said.get("quant_method")
    if formats and how in RUN:
        given = running_checkpoint(model, method, said, precision, capability)
        if given.quantization is None:
            return Trained(method, False, given.notes, given.running)
        _same(method.quantization, given.quantization, given.words)
        method = method.model_copy(update={"quantization": given.quantization})
        return Trained(method, given.packed, given.notes, given.running)
    stored = stored_as(model, said)
    asked, given = method.quantization, stored.quantization
    dense = stored.dense if given is None or stored.words != "fp8" else ""
    if stored.words == "fp8" and not dense and capability is not None and capability < (8, 9):
        dense = "its kernels need compute capability 8.9"
    if given is None or dense:
        said = f"the checkpoint is stored in {stored.words} and runs dequantised: {dense}"
        squares = formats and given is not None and stored.words == "fp8"
        return Trained(method, False, (said,), dequantised_fp8(given.skip or ()) if squares and given else None)
    _same(asked, given, stored.words)
    _check(model, given)
    if asked in (None, _PLAIN):
        method = method.model_copy(update={"quantization": given})
    return Trained(method, True, (f"the checkpoint runs as it is stored: {stored.words}", *stored.notes))


def _same(asked: Quantization | None, given: Quantization, words: str) -> None:
    if asked not in (None, _PLAIN) and asked.format != given.format:
        raise SpecError(
            f"method.quantization: the checkpoint is stored in {words}, not {asked.format}; leave it out, or "
            "give the checkpoint it was made from",
            "method.quantization.format",
        )


def _check(model: ModelSpec, quantization: Quantization) -> None:
    """Raise ConfigError where a tensor of the checkpoint has another number of elements than the config says."""
    block = quantization.block_size
    words = 4 if quantization.format == "gptq-int8" else 8  # weights in a word of int32
    for tensor in model.checkpoint.tensors if model.checkpoint is not None else ():
        module, _, part = tensor.name.rpartition(".")
        built = built_tensors(model).get(f"{module}.weight")
        if built is None or len(built.shape) != 2 or part not in _PARTS:
            continue
        out, into = built.shape
        groups = 1 if block == WHOLE else -(-into // block)
        squares = 1 if block == WHOLE else -(-out // FP8_BLOCK) * -(-into // FP8_BLOCK)
        says = {
            "qweight": out * into // words,
            "scales": groups * out,
            "qzeros": groups * out // words,
            "g_idx": into,
            "weight_scale_inv": squares,
        }[part]
        if tensor.elements != says:
            raise ConfigError(
                f"model: {printable(tensor.name, _LONGEST)} has {tensor.elements:,} numbers in the checkpoint, and "
                f"{says:,} by its {_FIELD}",
                "model",
            )


_PARTS = ("qweight", "scales", "qzeros", "g_idx", "weight_scale_inv")


def stored_as(model: ModelSpec, config: Mapping[str, Any]) -> Stored:
    """What a `quantization_config` says. Raises ConfigError and SpecError for what it must say, or is not known."""
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
            return Stored("mxfp4", None, "transformers trains nothing over it: Mxfp4Config(dequantize=True)")
        case "compressed-tensors":
            return _compressed(config)
        case _:
            shown = printable(str(how or "?"), 40)
            known = "gptq, awq, fp8, mxfp4, bitsandbytes, compressed-tensors"
            raise SpecError(f"{_FIELD}: a checkpoint of {shown} is not supported yet; supported: {known}", "model")


def _gptq(model: ModelSpec, config: Mapping[str, Any]) -> Stored:
    """Source: transformers 5.24 utils/quantization_config.py GPTQConfig; gptqmodel 7.7 quantization/config.py."""
    bits, group = _whole(config, "bits", 4), _whole(config, "group_size", 128)
    if bits not in (4, 8):
        raise SpecError(f"{_FIELD}: GPTQ in {bits} bits is not supported yet; supported: 4, 8", "model")
    if config.get("dynamic"):
        raise SpecError(f"{_FIELD}: GPTQ with other settings by layer (dynamic) is not supported yet", "model")
    listed = [name for names in _lists(config.get("modules_in_block_to_quantize")) for name in _names(names)]
    left = [path for path in _inner(model) if listed and not path.endswith(tuple(listed))]
    skip, notes = _skipped(model, [*([] if config.get("lm_head") else [_HEAD]), *left])
    words = f"gptq, {bits} bits in {_grouped(group)}"
    return Stored(words, _quantization(f"gptq-int{bits}", group, skip), _stacked(model), notes)


def _awq(model: ModelSpec, config: Mapping[str, Any]) -> Stored:
    """Source: transformers 5.24 utils/quantization_config.py AwqConfig."""
    bits = _whole(config, "bits", _whole(config, "w_bit", 4))
    group = _whole(config, "group_size", _whole(config, "q_group_size", 128))
    layout = str(config.get("version", config.get("format", "gemm"))).lower()
    if bits != 4 or layout != "gemm":
        raise SpecError(
            f"{_FIELD}: AWQ of {bits} bits, {layout:.20}, is not supported yet; supported: 4, gemm", "model"
        )
    skip, notes = _skipped(model, [_HEAD, *_names(config.get("modules_to_not_convert"))])
    words = f"awq, 4 bits in {_grouped(group)}"
    return Stored(words, _quantization("awq-int4", group, skip), _stacked(model), notes)


def _fp8(model: ModelSpec, config: Mapping[str, Any]) -> Stored:
    """Source: transformers 5.24 utils/quantization_config.py FineGrainedFP8Config."""
    blocks: Any = config.get("weight_block_size", [128, 128])
    sizes = list(cast(Sequence[Any], blocks)) if isinstance(blocks, (list, tuple)) else blocks
    if sizes not in ([128, 128], None):
        raise SpecError(f"{_FIELD}: fp8 in blocks of {as_json(sizes)} is not supported yet; supported: 128", "model")
    listed = config.get("modules_to_not_convert") or config.get("ignored_layers")
    skip, notes = _skipped(model, _names(listed) if listed else [_HEAD])
    dense = "its config says so" if config.get("dequantize") is True else ""
    return Stored("fp8", _quantization("fp8", 128 if sizes else WHOLE, skip), dense, notes)


def _bitsandbytes(model: ModelSpec, config: Mapping[str, Any]) -> Stored:
    """Source: transformers 5.24 utils/quantization_config.py BitsAndBytesConfig."""
    four = bool(config.get("load_in_4bit", config.get("_load_in_4bit")))
    eight = bool(config.get("load_in_8bit", config.get("_load_in_8bit")))
    if not four and not eight:
        return Stored("bitsandbytes", _PLAIN)
    listed = config.get("llm_int8_skip_modules")
    skip, notes = _skipped(model, _names(listed) if listed else [_HEAD])
    if eight:
        return Stored("bitsandbytes, int8", Quantization(format="int8", skip=skip), "", notes)
    format, double = str(config.get("bnb_4bit_quant_type", "fp4")), bool(config.get("bnb_4bit_use_double_quant"))
    if format not in ("nf4", "fp4"):
        raise ConfigError(f"{_FIELD}: bnb_4bit_quant_type must be nf4 or fp4, not {as_json(format)}", _FIELD)
    storages = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    storage = storages.get(str(config.get("bnb_4bit_quant_storage")).removeprefix("torch."), "uint8")
    made = {"format": format, "double_quant": double, "storage": storage, "skip": skip}
    words = f"bitsandbytes, {format}{', double quantisation' if double else ''}"
    return Stored(words, Quantization.model_validate(made), "", notes)


def _compressed(config: Mapping[str, Any]) -> Stored:
    """compressed-tensors dequantises the weights on the first forward pass, or when they are loaded.

    Source: transformers 5.24 utils/quantization_config.py CompressedTensorsConfig.
    """
    kinds: list[str] = []
    groups: Any = config.get("config_groups")
    for group in cast(Mapping[str, Any], groups).values() if isinstance(groups, Mapping) else ():
        weights: Any = cast(Mapping[str, Any], group).get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            said = cast(Mapping[str, Any], weights)
            kinds.append(f"{said.get('type', 'int')}{said.get('num_bits', '?')}")
    words = ", ".join(["compressed-tensors", *dict.fromkeys(printable(kind, 20) for kind in kinds)])
    return Stored(words, None, "the library unpacks it, at the latest on the first forward pass")


def _adapted(names: Sequence[str], method: Method) -> bool:
    """Whether the method adapts a stack of experts that stands for linear layers of such names."""
    targets = method.targets
    return bool(names) and (targets == "all-linear" or any(t.rpartition(".")[2] in names for t in targets))


def _stacked(model: ModelSpec) -> str:
    """Raise SpecError for a mixture of experts: transformers 5 puts these libraries' layers in place of linear ones,
    and has its experts in none.

    Source: transformers 5.24 quantizers/quantizer_gptq.py, quantizer_awq.py: neither has serialized_names.
    """
    if stacks(model):
        raise SpecError(
            f"{_FIELD}: experts that are stored quantised are not supported yet with transformers 5, which loads none "
            "of GPTQ's or AWQ's; before it they were linear layers (profile transformers-4.51)",
            "model",
        )
    return ""


def _quantization(format: str, group: int, skip: tuple[str, ...]) -> Quantization:
    if group != WHOLE and group not in _BLOCKS:
        known = ", ".join(map(str, (WHOLE, *_BLOCKS)))
        raise ConfigError(f"{_FIELD}: group_size must be one of {known}, not {group}", _FIELD)
    made = {"format": format, "block_size": group, "double_quant": False, "skip": skip, "kbit_preparation": False}
    return Quantization.model_validate(made)


def _grouped(group: int) -> str:
    return "one group a column" if group == WHOLE else f"groups of {group}"


def _inner(model: ModelSpec) -> list[str]:
    """The linear layers of the blocks, by their path there."""
    return [path for path in adaptable(model) if "." in path and not path.startswith("model.")]


class _Patterns:
    """Which modules a list leaves out: by name or pattern, from a module's start to a dot of its name, or by its end.

    Source: transformers 5.24 quantizers/quantizers_utils.py should_convert_module. Of regular expressions only `.*` is
    one here, and it is looked for from the left: a config is a stranger's, and none may take forever.
    """

    def __init__(self, listed: Iterable[str]) -> None:
        cleaned = [name.removeprefix("re:").removeprefix("^").removesuffix("$").replace("\\", "") for name in listed]
        self._plain = frozenset(name for name in cleaned if ".*" not in name)
        self._wild = [name.split(".*") for name in dict.fromkeys(cleaned) if ".*" in name][:_MOST_WILD]

    def __call__(self, module: str) -> bool:
        starts = (module[:i] for i, letter in enumerate(f"{module}.") if letter == ".")
        ends = (module[i:] for i in range(max(0, len(module) - _LONGEST), len(module)))
        if any(part in self._plain for part in (*starts, *ends)):
            return True
        return any(_begins(module, parts) for parts in self._wild)


def _begins(module: str, parts: Sequence[str]) -> bool:
    """Whether a module's name begins with `parts`, anything between them, and then ends or has a dot."""
    first, *middle, last = parts
    if not module.startswith(first):
        return False
    at = len(first)
    for part in middle:
        at = module.find(part, at)
        if at < 0:
            return False
        at += len(part)
    while (at := module.find(last, at)) >= 0:
        end = at + len(last)
        if not last or end == len(module) or "." in (module[end], module[end - 1]):
            return True
        at += 1
    return False


def _skipped(model: ModelSpec, patterns: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The modules that are not quantised, by the last part of their names; a note where only some layers' are not."""
    left_out = _Patterns(patterns)
    modules = dict.fromkeys(
        name.rpartition(".")[0] for name, one in built_tensors(model).items() if len(one.shape) == 2
    )
    known = {path.rpartition(".")[2] for path in adaptable(model)} - {_HEAD}
    hit: dict[str, int] = {}
    total: dict[str, int] = {}
    for module in modules:
        last = module.rpartition(".")[2]
        total[last] = total.get(last, 0) + 1
        hit[last] = hit.get(last, 0) + left_out(module)
    skip = [last for last in total if last in known and 2 * hit[last] > total[last]]
    partly = [last for last in total if last in known and 0 < hit[last] < total[last]]
    notes = [
        f"{last} is not quantised in {hit[last]} of {total[last]} layers: counted as {'not ' * (last in skip)}quantised"
        for last in partly
    ]
    head = [_HEAD] if model.tie_word_embeddings or left_out(_HEAD) else []
    return (*head, *skip), tuple(notes)


def _whole(config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value <= 2**20:
        raise ConfigError(f"{_FIELD}: {key} must be a whole number, not {as_json(value)}", _FIELD)
    return value


def _names(value: Any) -> list[str]:
    """The texts of a list; none for what is no list."""
    listed = cast(Sequence[Any], value) if isinstance(value, (list, tuple)) else ()
    return [name for name in listed if isinstance(name, str) and name]


def _lists(value: Any) -> Iterator[Any]:
    """The lists in a list."""
    yield from cast(Sequence[Any], value) if isinstance(value, (list, tuple)) else ()
