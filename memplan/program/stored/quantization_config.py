"""How a checkpoint is stored by its `quantization_config`, parameter by parameter, for running it.

A config names modules that are left out, or groups of modules that are stored alike; here each of the model's matrices
finds what is said of it. A config is a stranger's: no regular expression of it is run, patterns are taken apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple, cast

from memplan.catalogue.quantization.quantization import FP8_BLOCK, WHOLE
from memplan.catalogue.quantization.storage import KINDS, Layout, plain
from memplan.core.errors import ConfigError, SpecError, printable
from memplan.core.ir import Weight
from memplan.models.layers import as_json

FIELD = "quantization_config"
_HEAD = "lm_head"
_MOST_LISTED = 2**16  # modules that a config lists
_MOST_WILD = 256  # patterns that are read, and forms of one pattern
_LONGEST = 400  # letters of a pattern

LayoutOf = Callable[[str, Weight], Layout | None]
Config = Mapping[str, Any]


class Scheme(NamedTuple):
    """How a checkpoint is stored: in words, and the layout of each matrix, None where it is not quantised."""

    words: str
    layout_of: LayoutOf


def scheme_of(config: Config, dtype: str, experts: str = "", family: str = "") -> Scheme:
    """What a `quantization_config` says. `dtype` is the model's own, `experts` its config's `expert_dtype`, `family`
    its model_type.

    Raises SpecError for a method or a setting that is not supported yet, ConfigError for what is no such config.
    """
    how = config.get("quant_method")
    read = _READERS.get(how) if isinstance(how, str) else None
    if read is None:
        shown = printable(how or "?", 40) if isinstance(how, str) else as_json(how)[:40]
        raise SpecError(
            f"{FIELD}: a checkpoint of {shown} is not supported yet; supported: {', '.join(sorted(_READERS))}",
            "model",
        )
    scheme = read(config, dtype)
    if how != "fp8":
        return scheme
    inner, apart = scheme.layout_of, plain("mxfp4")  # DeepSeek-V4: experts in two weights a byte, scales are exponents
    four = experts == "fp4"
    scales = "uint8" if four else dtype if family in _SCALES_IN_16_BITS else ""

    def of(name: str, w: Weight) -> Layout | None:
        layout = apart if four and w.stacked else inner(name, w)
        return layout._replace(scales=scales or layout.scales) if layout is not None else None

    return Scheme("fp8, experts mxfp4" if four else scheme.words, of)


# Families whose makers' FP8 checkpoints have the scales of squares in the model's dtype, where DeepSeek's have fp32.
# Source: the header of Qwen/Qwen3-1.7B-FP8, 196 scales in BF16, as https://github.com/modular/modular/issues/7142 has
# it; https://github.com/HabanaAI/vllm-fork/pull/2141, of Qwen3's dense models.
_SCALES_IN_16_BITS = frozenset(("qwen3",))


def takes(w: Weight) -> bool:
    """Whether formats for running a model take a weight: a linear layer's matrix or a stack of experts, no router, and
    nothing that its class keeps in a dtype of its own."""
    return ((w.matrix and not w.viewed) or w.stacked) and w.group not in ("router", "embedding") and not w.dtype


def everywhere(layout: Layout, left: Iterable[str]) -> LayoutOf:
    """One layout for every matrix but those of the modules in `left`, by name or pattern."""
    left_out = Modules(left)
    experts = KINDS[layout.format].experts

    def of(name: str, w: Weight) -> Layout | None:
        return None if not takes(w) or (w.stacked and not experts) or left_out(name, w) else layout

    return of


def plainly(_: str, __: Weight) -> Layout | None:
    """Nothing is quantised."""


class Modules:
    """A list of modules: by name, from its start to a dot or by its end, or by pattern (`re:.*self_attn.*`, `*gate`).

    The ends of names are how transformers and vLLM read such lists: quantizers_utils.py should_convert_module.
    """

    def __init__(self, listed: Iterable[str]) -> None:
        names = [_cleaned(name) for name in listed][:_MOST_LISTED]
        self._plain = frozenset(name for name in names if name and "*" not in name and "(" not in name)
        wild = [name for name in dict.fromkeys(names) if "*" in name or "(" in name]
        self._wild = [part.split("*") for name in wild[:_MOST_WILD] for part in _forms(name)]

    def __call__(self, name: str, w: Weight) -> bool:
        """Whether the list has the module of a parameter; of a stack, that of its first expert."""
        return any(self._has(module) for module in modules_of(name, w))

    def _has(self, module: str) -> bool:
        starts = (module[:i] for i, letter in enumerate(f"{module}.") if letter == ".")
        ends = (module[i:] for i in range(len(module)))
        if any(part in self._plain for part in (*starts, *ends)):
            return True
        return any(_matches(module, parts) for parts in self._wild)


def modules_of(name: str, w: Weight) -> Iterator[str]:
    """What a checkpoint may call the module of a parameter, by what classes around the decoder put before its name."""
    path = name.removesuffix(".weight")
    if w.stacked:
        path, _, last = path.rpartition(".")
        path = f"{path}.0.{last.removesuffix('_up_proj')}_proj" if last.endswith("gate_up_proj") else f"{path}.0.{last}"
    yield path
    rest = path.removeprefix("model.")
    yield from (f"model.{rest}", rest, f"model.language_model.{rest}", f"language_model.model.{rest}")


def _cleaned(name: str) -> str:
    """A name or pattern in one notation: `*` for anything. Other marks of regular expressions mean nothing."""
    return name[:_LONGEST].removeprefix("re:").removeprefix("^").removesuffix("$").replace("\\", "").replace(".*", "*")


def _forms(pattern: str) -> Iterator[str]:
    """A pattern for each way through its groups of alternatives.

    >>> list(_forms("*mlp.(gate|up)_proj*"))
    ['*mlp.gate_proj*', '*mlp.up_proj*']
    """
    pieces = re.split(r"\(([^()]*)\)", pattern)
    ways = [piece.removeprefix("?:").split("|") if i % 2 else [piece] for i, piece in enumerate(pieces)]
    for i, chosen in enumerate(product(*ways)):
        if i >= _MOST_WILD:
            return
        yield "".join(chosen)


def _matches(module: str, parts: Sequence[str]) -> bool:
    """Whether a module's name begins with `parts`, anything between them, and then ends or has a dot."""
    first, *middle = parts
    if not module.startswith(first):
        return False
    at = len(first)
    for i, part in enumerate(middle):
        if i == len(middle) - 1:
            return not part or _ends(module, part, at)
        at = module.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return at == len(module) or module[at] == "."


def _ends(module: str, part: str, at: int) -> bool:
    while (at := module.find(part, at)) >= 0:
        end = at + len(part)
        if end == len(module) or "." in (module[end], module[end - 1]):
            return True
        at += 1
    return False


def _gptq(config: Config, _: str) -> Scheme:
    """Source: gptqmodel 7.7 quantization/config.py; `dynamic` names modules that are left out with `-:`."""
    bits, group = _whole(config, "bits", 4), _whole(config, "group_size", 128)
    if bits not in (4, 8):
        raise _later(f"GPTQ in {bits} bits", "4, 8")
    dynamic: Any = config.get("dynamic") or {}
    rules = list(cast(Mapping[str, Any], dynamic)) if isinstance(dynamic, Mapping) else []
    if any(not rule.startswith("-:") for rule in rules):
        raise _later("GPTQ with other settings by layer (dynamic)", "layers that are left out")
    left = [*(rule.removeprefix("-:") for rule in rules), *([] if config.get("lm_head") else [_HEAD])]
    listed = [name for names in _listed(config, "modules_in_block_to_quantize") for name in _texts(names)]
    layout = plain(f"gptq-int{bits}", _checked(group))
    whole = everywhere(layout, left)
    if not listed:
        return Scheme(f"gptq, {bits} bits", whole)
    some = Modules(listed)

    def of(name: str, w: Weight) -> Layout | None:
        return whole(name, w) if some(name, w) else None

    return Scheme(f"gptq, {bits} bits", of)


def _awq(config: Config, _: str) -> Scheme:
    """Source: transformers 5.24 utils/quantization_config.py AwqConfig."""
    bits = _whole(config, "bits", _whole(config, "w_bit", 4))
    group = _whole(config, "group_size", _whole(config, "q_group_size", 128))
    kind = str(config.get("version", config.get("format", "gemm"))).lower()
    if bits != 4 or kind != "gemm":
        raise _later(f"AWQ of {bits} bits, {printable(kind, 20)},", "4, gemm")
    left = [_HEAD, *_names(config, "modules_to_not_convert")]
    return Scheme("awq, 4 bits", everywhere(plain("awq-int4", _checked(group)), left))


def _fp8(config: Config, _: str) -> Scheme:
    """Source: transformers 5.24 integrations/finegrained_fp8.py, utils/quantization_config.py FineGrainedFP8Config."""
    blocks: Any = config.get("weight_block_size", [FP8_BLOCK, FP8_BLOCK])
    sizes = list(cast(Sequence[Any], blocks)) if isinstance(blocks, (list, tuple)) else blocks
    if sizes not in ([FP8_BLOCK, FP8_BLOCK], None):
        raise _later(f"fp8 in blocks of {as_json(sizes):.40}", str(FP8_BLOCK))
    listed = _names(config, "modules_to_not_convert") or _names(config, "ignored_layers")
    layout = plain("fp8", FP8_BLOCK if sizes else WHOLE)._replace(inputs=config.get("activation_scheme") == "static")
    return Scheme("fp8", everywhere(layout, [_HEAD, *listed]))


def _mxfp4(config: Config, _: str) -> Scheme:
    """Stacks of experts alone. Source: transformers 5.24 integrations/mxfp4.py replace_with_mxfp4_linear."""
    whole = everywhere(plain("mxfp4"), _names(config, "modules_to_not_convert"))

    def of(name: str, w: Weight) -> Layout | None:
        return whole(name, w) if w.stacked else None

    return Scheme("mxfp4", of)


def _bitsandbytes(config: Config, _: str) -> Scheme:
    """Source: transformers 5.24 utils/quantization_config.py BitsAndBytesConfig."""
    four = bool(config.get("load_in_4bit", config.get("_load_in_4bit")))
    eight = bool(config.get("load_in_8bit", config.get("_load_in_8bit")))
    if not four and not eight:
        return Scheme("bitsandbytes", plainly)
    kind = "int8" if eight else str(config.get("bnb_4bit_quant_type", "fp4"))
    if kind not in ("int8", "nf4", "fp4"):
        raise ConfigError(f"{FIELD}: bnb_4bit_quant_type must be nf4 or fp4, not {as_json(kind):.40}", FIELD)
    layout = plain(kind, double_quant=bool(config.get("bnb_4bit_use_double_quant")))
    return Scheme(f"bitsandbytes, {kind}", everywhere(layout, _names(config, "llm_int8_skip_modules") or [_HEAD]))


def _compressed(config: Config, dtype: str) -> Scheme:
    """Source: compressed-tensors 0.20 quantization/quant_config.py, compressors."""
    sparse: Any = config.get("sparsity_config")
    if isinstance(sparse, Mapping) and cast(Config, sparse).get("format", "dense") not in ("dense", None):
        raise _later("compressed-tensors with sparse weights", "dense ones")
    groups: Any = config.get("config_groups")
    found: list[tuple[Modules | None, Layout]] = []
    for group in cast(Config, groups).values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping):
            said = cast(Config, group)
            weights: Any = said.get("weights")
            if isinstance(weights, Mapping):
                targets = _names(said, "targets")
                layout = _of_group(cast(Config, weights), said, config, dtype)
                found.append((None if "Linear" in targets or not targets else Modules(targets), layout))
    left = Modules(_names(config, "ignore"))
    words = ", ".join(["compressed-tensors", *dict.fromkeys(layout.format for _, layout in found)])

    def of(name: str, w: Weight) -> Layout | None:
        if not takes(w) or left(name, w):
            return None
        return next((layout for targets, layout in found if targets is None or targets(name, w)), None)

    return Scheme(words, of)


def _of_group(weights: Config, group: Config, config: Config, dtype: str) -> Layout:
    """The layout of what one group of a compressed-tensors config says."""
    kind, bits = str(weights.get("type", "int")), weights.get("num_bits")
    strategy, size = weights.get("strategy"), _whole(weights, "group_size", WHOLE)
    form = str(group.get("format") or config.get("format") or "")
    grouped = _checked(size) if strategy in ("group", "tensor_group") or (strategy is None and size > 0) else WHOLE
    name = ""
    match kind, bits:
        case "float", 8 if strategy == "block":
            if weights.get("block_structure") not in ([128, 128], (128, 128)):
                raise _later(f"fp8 in blocks of {as_json(weights.get('block_structure')):.40}", "128x128")
            name, grouped = "fp8", FP8_BLOCK
        case "float", 8 if grouped == 32:
            name = "mxfp8"
        case "float", 8 if grouped == WHOLE:
            name = "fp8-tensor" if strategy == "tensor" else "fp8-channel"
        case "float", 4 if grouped in (16, 32):
            name = {16: "nvfp4", 32: "mxfp4"}[grouped]
        case "int", 4:
            name = "w4a16"
        case "int", 8:
            name = "w8a16" if "pack" in form else "w8a8-int8"
        case _:
            pass
    if not name or (name == "w8a8-int8" and grouped != WHOLE):
        what = f"{kind:.20} of {as_json(bits):.20} bits, {as_json(strategy):.20}"
        raise _later(f"compressed-tensors with {what}", "int4, int8, fp8, mxfp4, mxfp8, nvfp4")
    inputs: Any = group.get("input_activations")
    given: Config = cast(Config, inputs) if isinstance(inputs, Mapping) else {}
    fixed = bool(given) and (given.get("dynamic") is False or given.get("strategy") == "tensor_group")
    return Layout(
        name,
        grouped,
        zeros=weights.get("symmetric") is False and name in ("w4a16", "w8a16"),
        order=weights.get("actorder") in ("group", "dynamic"),
        inputs=fixed,
        scales=dtype,
        acts=_acts(given, fixed),
    )


def _acts(given: Config, fixed: bool) -> str:
    """How a layer's inputs are quantised, as a layout has it."""
    if not given:
        return ""
    strategy, size = given.get("strategy"), _whole(given, "group_size", WHOLE)
    if strategy == "tensor_group" or given.get("dynamic") == "local":
        return f"local/{size}"
    if fixed:
        return "fixed"
    return f"groups/{size}" if strategy == "group" and size > 0 else "rows"


def _modelopt(config: Config, _: str) -> Scheme:
    """NVIDIA's ModelOpt. Source: nvidia-modelopt export/quant_utils.py; vLLM reads the same keys."""
    inner: Any = config.get("quantization")
    said = cast(Config, inner) if isinstance(inner, Mapping) else config
    algorithm = str(said.get("quant_algo", "")).upper()
    formats = {"FP8": ("fp8-tensor", WHOLE), "NVFP4": ("nvfp4", 16)}
    if algorithm not in formats:
        raise _later(f"ModelOpt's {printable(algorithm or '?', 30)}", ", ".join(formats))
    name, group = formats[algorithm]
    left = [*_names(said, "exclude_modules"), *_names(said, "ignore")] or [_HEAD]
    return Scheme(f"modelopt, {name}", everywhere(Layout(name, group, inputs=True, scales="fp32"), left))


def _fbgemm(config: Config, _: str) -> Scheme:
    """Source: transformers 5.24 integrations/fbgemm_fp8.py FbgemmFp8Linear: a scale a row in fp32."""
    left = _names(config, "modules_to_not_convert") or [_HEAD]
    return Scheme("fbgemm, fp8", everywhere(plain("fp8-channel", scales="fp32"), left))


_TORCHAO = {
    **dict.fromkeys(("int8_weight_only", "Int8WeightOnlyConfig"), "torchao-int8"),
    **dict.fromkeys(("int8_dynamic_activation_int8_weight", "Int8DynamicActivationInt8WeightConfig"), "torchao-int8"),
    **dict.fromkeys(("int4_weight_only", "Int4WeightOnlyConfig"), "torchao-int4"),
    **dict.fromkeys(("float8_weight_only", "Float8WeightOnlyConfig"), "fp8-channel"),
}


def _torchao(config: Config, dtype: str) -> Scheme:
    """Source: transformers 5.24 utils/quantization_config.py TorchAoConfig; torchao 0.18 quantization/quant_api.py."""
    said: Any = config.get("quant_type")
    if isinstance(said, Mapping):
        said = cast(Config, said).get("default", cast(Any, said))
    name: Any = cast(Config, said).get("_type") if isinstance(said, Mapping) else said
    data: Any = cast(Config, said).get("_data") if isinstance(said, Mapping) else config.get("quant_type_kwargs")
    form = _TORCHAO.get(name) if isinstance(name, str) else None
    if form is None:
        raise _later(f"torchao's {printable(str(name or '?'), 40)}", ", ".join(n for n in _TORCHAO if n[0].isupper()))
    kind = KINDS[form]
    group = _whole(cast(Config, data), "group_size", kind.group) if isinstance(data, Mapping) else kind.group
    left = [_HEAD, *_names(config, "modules_to_not_convert")]
    dynamic = "rows" if "dynamic" in str(name).lower() else ""
    layout = plain(form, _checked(group), dtype)._replace(acts=dynamic)
    return Scheme(f"torchao, {form}{', inputs too' if dynamic else ''}", everywhere(layout, left))


def _hqq(config: Config, dtype: str) -> Scheme:
    """Source: transformers 5.24 utils/quantization_config.py HqqConfig; hqq 0.2.8 core/quantize.py."""
    inner: Any = config.get("quant_config")
    said: Any = cast(Config, inner).get("weight_quant_params") if isinstance(inner, Mapping) else None
    settings: Config = cast(Config, said) if isinstance(said, Mapping) else {}
    bits = _whole(settings, "nbits", 4)
    if bits != 4:
        raise _later(f"HQQ in {bits} bits", "4")
    group = _checked(_whole(settings, "group_size", 64))
    left = _names(config, "skip_modules") or [_HEAD]
    return Scheme("hqq, 4 bits", everywhere(plain("hqq-int4", group, dtype), left))


def _quanto(config: Config, dtype: str) -> Scheme:
    """Source: transformers 5.24 utils/quantization_config.py QuantoConfig; optimum-quanto 0.2.7."""
    kinds = {"int8": "quanto-int8", "int4": "quanto-int4", "float8": "fp8-channel"}
    kind = config.get("weights", "int8")
    if kind not in kinds:
        raise _later(f"quanto's weights in {as_json(kind):.30}", ", ".join(kinds))
    left = _names(config, "modules_to_not_convert") or [_HEAD]
    return Scheme(f"quanto, {kind}", everywhere(plain(kinds[str(kind)], None, dtype), left))


_READERS: dict[str, Callable[[Config, str], Scheme]] = {
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed,
    "fbgemm_fp8": _fbgemm,
    "fp8": _fp8,
    "gptq": _gptq,
    "hqq": _hqq,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
    "quanto": _quanto,
    "torchao": _torchao,
}


def _later(what: str, supported: str) -> SpecError:
    return SpecError(f"{FIELD}: {what} is not supported yet; supported: {supported}", "model")


def _checked(group: int) -> int:
    """A size of groups. Raises ConfigError for one that no kernel has."""
    if group != WHOLE and not (8 <= group <= 2**16 and group & (group - 1) == 0):
        raise ConfigError(f"{FIELD}: group_size must be -1 or a power of two from 8 to 65,536, not {group}", FIELD)
    return group


def _whole(config: Config, key: str, default: int) -> int:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value <= 2**20:
        raise ConfigError(f"{FIELD}: {key} must be a whole number, not {as_json(value):.60}", FIELD)
    return value


def _listed(config: Config, key: str) -> Sequence[Any]:
    value: Any = config.get(key)
    return cast(Sequence[Any], value) if isinstance(value, (list, tuple)) else ()


def _texts(value: Any) -> list[str]:
    listed = cast(Sequence[Any], value) if isinstance(value, (list, tuple)) else ()
    return [name for name in listed if isinstance(name, str) and name]


def _names(config: Config, key: str) -> list[str]:
    """The texts of a list of the config; none where it has no such list."""
    return _texts(_listed(config, key))
