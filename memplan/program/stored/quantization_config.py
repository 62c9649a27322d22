"""The stored layout of every parameter of a checkpoint, from its `quantization_config`, for inference.

A config lists modules that are not quantised, or groups of modules with the same format. Configs are untrusted input:
their regular expressions are never run, patterns are matched by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, cast

from memplan.catalogue.quantization.quantization import FP8_BLOCK, WHOLE
from memplan.catalogue.quantization.storage import KINDS, Layout, plain
from memplan.core.errors import ConfigError, SpecError, printable
from memplan.core.ir import Weight
from memplan.core.records import NamedTuple
from memplan.models.layers import as_json

FIELD = "quantization_config"
_HEAD = "lm_head"
_MAX_MODULES = 2**16  # modules read from a list
_MAX_PATTERNS = 256  # patterns read from a list, and alternatives expanded from one pattern
_MAX_PATTERN_LENGTH = 400  # characters

LayoutOf = Callable[[str, Weight], Layout | None]
Config = Mapping[str, Any]


class Scheme(NamedTuple):
    """How a checkpoint is stored: in words, and a function that returns a matrix's layout, None if not quantised."""

    words: str
    layout_of: LayoutOf


def scheme_of(config: Config, dtype: str, experts: str = "", has_half_scales: bool = False) -> Scheme:
    """Return how a `quantization_config` says the checkpoint is stored.

    dtype            the model's dtype
    experts          `expert_dtype` of the model's config
    has_half_scales  block scales of its FP8 checkpoints are in the model's dtype, not in fp32 as DeepSeek's

    Raises SpecError for a method or setting that is not supported yet, and ConfigError for an invalid config.
    """
    method = config.get("quant_method")
    read = _READERS.get(method) if isinstance(method, str) else None
    if read is None:
        shown = printable(method or "?", 40) if isinstance(method, str) else as_json(method)[:40]
        raise SpecError(
            f"{FIELD}: a checkpoint of {shown} is not supported yet; supported: {', '.join(sorted(_READERS))}",
            "model",
        )
    scheme = read(config, dtype)
    if method != "fp8":
        return scheme
    # DeepSeek-V4: experts with two weights a byte, and scales that are exponents
    inner, mxfp4, has_fp4_experts = scheme.layout_of, plain("mxfp4"), experts == "fp4"
    scales = "uint8" if has_fp4_experts else dtype if has_half_scales else ""

    def layout_of(name: str, w: Weight) -> Layout | None:
        layout = mxfp4 if has_fp4_experts and w.stacked else inner(name, w)
        return layout._replace(scales=scales or layout.scales) if layout is not None else None

    return Scheme("fp8, experts mxfp4" if has_fp4_experts else scheme.words, layout_of)


def takes_quantisation(w: Weight) -> bool:
    """Whether formats for inference quantise a weight: the matrix of a linear layer or a stack of experts, unless it is
    a router or has a dtype of its own."""
    return (
        ((w.matrix and not w.is_read_as_view) or w.stacked) and w.group not in ("router", "embedding") and not w.dtype
    )


def uniform_layout(layout: Layout, left: Iterable[str]) -> LayoutOf:
    """Return one layout for every matrix except those of the modules in `left`, given by name or pattern."""
    excluded = Modules(left)
    experts = KINDS[layout.format].experts

    def layout_of(name: str, w: Weight) -> Layout | None:
        return None if not takes_quantisation(w) or (w.stacked and not experts) or excluded(name, w) else layout

    return layout_of


def unquantised_layout(_: str, __: Weight) -> Layout | None:
    """Return None: no parameter is quantised."""


class Modules:
    """A list of modules, by name or by pattern (`re:.*self_attn.*`, `*gate`).

    A name matches a module's path from its start up to a dot, or at its end, as transformers and vLLM match them:
    quantizers_utils.py should_convert_module.
    """

    def __init__(self, listed: Iterable[str]) -> None:
        names = [_normalised(name) for name in listed][:_MAX_MODULES]
        self._names = frozenset(name for name in names if name and "*" not in name and "(" not in name)
        self._lengths = {len(name) for name in self._names}
        patterns = [name for name in dict.fromkeys(names) if "*" in name or "(" in name]
        self._patterns = [part.split("*") for name in patterns[:_MAX_PATTERNS] for part in _alternatives(name)]

    def __call__(self, name: str, w: Weight) -> bool:
        """Whether the list has the parameter's module; for a stack of experts, the first expert's."""
        return any(self.has(module) for module in modules_of(name, w))

    def has(self, module: str) -> bool:
        """Whether the list has the module of that path."""
        for length in self._lengths:
            if module[-length:] in self._names:
                return True
            if module[length : length + 1] in ("", ".") and module[:length] in self._names:
                return True
        return any(_matches(module, parts) for parts in self._patterns)


def modules_of(name: str, w: Weight) -> Iterator[str]:
    """Yield the names that a checkpoint may use for a parameter's module, with the prefixes of classes around the
    decoder."""
    path = name.removesuffix(".weight")
    if w.stacked:
        path, _, last = path.rpartition(".")
        path = f"{path}.0.{last.removesuffix('_up_proj')}_proj" if last.endswith("gate_up_proj") else f"{path}.0.{last}"
    yield path
    rest = path.removeprefix("model.")
    yield from (f"model.{rest}", rest, f"model.language_model.{rest}", f"language_model.model.{rest}")


def _normalised(name: str) -> str:
    """Return a name or pattern with `*` as the only wildcard. Other regular expression syntax has no effect."""
    plain = name[:_MAX_PATTERN_LENGTH].removeprefix("re:").removeprefix("^").removesuffix("$")
    return plain.replace("\\", "").replace(".*", "*")


def _alternatives(pattern: str) -> Iterator[str]:
    """Yield a pattern for each combination of the alternatives in its groups.

    >>> list(_alternatives("*mlp.(gate|up)_proj*"))
    ['*mlp.gate_proj*', '*mlp.up_proj*']
    """
    pieces = re.split(r"\(([^()]*)\)", pattern)
    options = [piece.removeprefix("?:").split("|") if i % 2 else [piece] for i, piece in enumerate(pieces)]
    for i, chosen in enumerate(product(*options)):
        if i >= _MAX_PATTERNS:
            return
        yield "".join(chosen)


def _matches(module: str, parts: Sequence[str]) -> bool:
    """Whether a module's name starts with `parts`, with anything between them, up to its end or a dot."""
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


def gptq_settings(config: Config) -> tuple[int, int]:
    """Return the bits and the group size of a GPTQ checkpoint.

    Source: transformers 5.24 utils/quantization_config.py GPTQConfig; gptqmodel 7.7 quantization/config.py.
    """
    bits, group = _int(config, "bits", 4), _int(config, "group_size", 128)
    if bits not in (4, 8):
        raise unsupported(f"GPTQ in {bits} bits", "4, 8")
    return bits, group


def gptq_modules(config: Config) -> list[str]:
    """Return the modules that GPTQ quantises, or an empty list if it is all of them."""
    return [name for names in _listed(config, "modules_in_block_to_quantize") for name in _texts(names)]


def _gptq(config: Config, _: str) -> Scheme:
    """GPTQ, whose `dynamic` excludes modules with the prefix `-:`."""
    bits, group = gptq_settings(config)
    dynamic: Any = config.get("dynamic") or {}
    rules = list(cast(Mapping[str, Any], dynamic)) if isinstance(dynamic, Mapping) else []
    if any(not rule.startswith("-:") for rule in rules):
        raise unsupported("GPTQ with per-layer settings (dynamic)", "excluding layers with `-:`")
    excluded = [*(rule.removeprefix("-:") for rule in rules), *([] if config.get("lm_head") else [_HEAD])]
    listed = gptq_modules(config)
    layout = plain(f"gptq-int{bits}", _checked(group))
    every_layout_of = uniform_layout(layout, excluded)
    if not listed:
        return Scheme(f"gptq, {bits} bits", every_layout_of)
    included = Modules(listed)

    def layout_of(name: str, w: Weight) -> Layout | None:
        return every_layout_of(name, w) if included(name, w) else None

    return Scheme(f"gptq, {bits} bits", layout_of)


def awq_group(config: Config) -> int:
    """Return the group size of an AWQ checkpoint of 4 bits.

    Source: transformers 5.24 utils/quantization_config.py AwqConfig.
    """
    bits = _int(config, "bits", _int(config, "w_bit", 4))
    kind = str(config.get("version", config.get("format", "gemm"))).lower()
    if bits != 4 or kind != "gemm":
        raise unsupported(f"AWQ of {bits} bits, {printable(kind, 20)},", "4, gemm")
    return _int(config, "group_size", _int(config, "q_group_size", 128))


def _awq(config: Config, _: str) -> Scheme:
    excluded = [_HEAD, *names_in(config, "modules_to_not_convert")]
    return Scheme("awq, 4 bits", uniform_layout(plain("awq-int4", _checked(awq_group(config))), excluded))


def fp8_block(config: Config) -> int:
    """Return the sides of the blocks of an FP8 checkpoint, or WHOLE if it has one scale per matrix.

    Source: transformers 5.24 integrations/finegrained_fp8.py, utils/quantization_config.py FineGrainedFP8Config.
    """
    blocks: Any = config.get("weight_block_size", [FP8_BLOCK, FP8_BLOCK])
    sizes = list(cast(Sequence[Any], blocks)) if isinstance(blocks, (list, tuple)) else blocks
    if sizes not in ([FP8_BLOCK, FP8_BLOCK], None):
        raise unsupported(f"fp8 in blocks of {as_json(sizes):.40}", str(FP8_BLOCK))
    return FP8_BLOCK if sizes else WHOLE


def _fp8(config: Config, _: str) -> Scheme:
    listed = names_in(config, "modules_to_not_convert") or names_in(config, "ignored_layers")
    layout = plain("fp8", fp8_block(config))._replace(inputs=config.get("activation_scheme") == "static")
    return Scheme("fp8", uniform_layout(layout, [_HEAD, *listed]))


def _mxfp4(config: Config, _: str) -> Scheme:
    """MXFP4, for stacks of experts only. Source: transformers 5.24 integrations/mxfp4.py replace_with_mxfp4_linear."""
    every_layout_of = uniform_layout(plain("mxfp4"), names_in(config, "modules_to_not_convert"))

    def layout_of(name: str, w: Weight) -> Layout | None:
        return every_layout_of(name, w) if w.stacked else None

    return Scheme("mxfp4", layout_of)


def bitsandbytes_kind(config: Config) -> str:
    """Return bitsandbytes' format: int8, nf4, fp4, or "" if nothing is quantised.

    Source: transformers 5.24 utils/quantization_config.py BitsAndBytesConfig.
    """
    four = bool(config.get("load_in_4bit", config.get("_load_in_4bit")))
    eight = bool(config.get("load_in_8bit", config.get("_load_in_8bit")))
    if not four and not eight:
        return ""
    kind = "int8" if eight else str(config.get("bnb_4bit_quant_type", "fp4"))
    if kind not in ("int8", "nf4", "fp4"):
        raise ConfigError(f"{FIELD}: bnb_4bit_quant_type must be nf4 or fp4, not {as_json(kind):.40}", FIELD)
    return kind


def _bitsandbytes(config: Config, _: str) -> Scheme:
    kind = bitsandbytes_kind(config)
    if not kind:
        return Scheme("bitsandbytes", unquantised_layout)
    layout = plain(kind, double_quant=bool(config.get("bnb_4bit_use_double_quant")))
    return Scheme(f"bitsandbytes, {kind}", uniform_layout(layout, names_in(config, "llm_int8_skip_modules") or [_HEAD]))


def _compressed(config: Config, dtype: str) -> Scheme:
    """compressed-tensors. Source: compressed-tensors 0.20 quantization/quant_config.py, compressors."""
    sparse: Any = config.get("sparsity_config")
    if isinstance(sparse, Mapping) and cast(Config, sparse).get("format", "dense") not in ("dense", None):
        raise unsupported("compressed-tensors with sparse weights", "dense weights")
    groups: Any = config.get("config_groups")
    layouts: list[tuple[Modules | None, Layout]] = []
    for group in cast(Config, groups).values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping):
            settings = cast(Config, group)
            weights: Any = settings.get("weights")
            if isinstance(weights, Mapping):
                targets = names_in(settings, "targets")
                layout = _group_layout(cast(Config, weights), settings, config, dtype)
                layouts.append((None if "Linear" in targets or not targets else Modules(targets), layout))
    ignored = Modules(names_in(config, "ignore"))
    words = ", ".join(["compressed-tensors", *dict.fromkeys(layout.format for _, layout in layouts)])

    def layout_of(name: str, w: Weight) -> Layout | None:
        if not takes_quantisation(w) or ignored(name, w):
            return None
        return next((layout for targets, layout in layouts if targets is None or targets(name, w)), None)

    return Scheme(words, layout_of)


def _group_layout(weights: Config, group: Config, config: Config, dtype: str) -> Layout:
    """Return the layout of one group of a compressed-tensors config."""
    kind, bits = str(weights.get("type", "int")), weights.get("num_bits")
    strategy, size = weights.get("strategy"), _int(weights, "group_size", WHOLE)
    form = str(group.get("format") or config.get("format") or "")
    grouped = _checked(size) if strategy in ("group", "tensor_group") or (strategy is None and size > 0) else WHOLE
    name = ""
    match kind, bits:
        case "float", 8 if strategy == "block":
            if weights.get("block_structure") not in ([128, 128], (128, 128)):
                raise unsupported(f"fp8 in blocks of {as_json(weights.get('block_structure')):.40}", "128x128")
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
        raise unsupported(f"compressed-tensors with {what}", "int4, int8, fp8, mxfp4, mxfp8, nvfp4")
    activations: Any = group.get("input_activations")
    inputs: Config = cast(Config, activations) if isinstance(activations, Mapping) else {}
    fixed = bool(inputs) and (inputs.get("dynamic") is False or inputs.get("strategy") == "tensor_group")
    return Layout(
        name,
        grouped,
        zeros=weights.get("symmetric") is False and name in ("w4a16", "w8a16"),
        order=weights.get("actorder") in ("group", "dynamic"),
        inputs=fixed,
        scales=dtype,
        acts=_acts(inputs, fixed),
    )


def _acts(inputs: Config, fixed: bool) -> str:
    """Return how a layer's inputs are quantised, in the words of `Layout.acts`."""
    if not inputs:
        return ""
    strategy, size = inputs.get("strategy"), _int(inputs, "group_size", WHOLE)
    if strategy == "tensor_group" or inputs.get("dynamic") == "local":
        return f"local/{size}"
    if fixed:
        return "fixed"
    return f"groups/{size}" if strategy == "group" and size > 0 else "rows"


def _modelopt(config: Config, _: str) -> Scheme:
    """NVIDIA's ModelOpt. Source: nvidia-modelopt export/quant_utils.py; vLLM reads the same keys."""
    inner: Any = config.get("quantization")
    settings = cast(Config, inner) if isinstance(inner, Mapping) else config
    algorithm = str(settings.get("quant_algo", "")).upper()
    formats = {"FP8": ("fp8-tensor", WHOLE), "NVFP4": ("nvfp4", 16)}
    if algorithm not in formats:
        raise unsupported(f"ModelOpt's {printable(algorithm or '?', 30)}", ", ".join(formats))
    name, group = formats[algorithm]
    excluded = [*names_in(settings, "exclude_modules"), *names_in(settings, "ignore")] or [_HEAD]
    return Scheme(f"modelopt, {name}", uniform_layout(Layout(name, group, inputs=True, scales="fp32"), excluded))


def _fbgemm(config: Config, _: str) -> Scheme:
    """FBGEMM's FP8, one fp32 scale a row. Source: transformers 5.24 integrations/fbgemm_fp8.py FbgemmFp8Linear."""
    excluded = names_in(config, "modules_to_not_convert") or [_HEAD]
    return Scheme("fbgemm, fp8", uniform_layout(plain("fp8-channel", scales="fp32"), excluded))


_TORCHAO = {
    **dict.fromkeys(("int8_weight_only", "Int8WeightOnlyConfig"), "torchao-int8"),
    **dict.fromkeys(("int8_dynamic_activation_int8_weight", "Int8DynamicActivationInt8WeightConfig"), "torchao-int8"),
    **dict.fromkeys(("int4_weight_only", "Int4WeightOnlyConfig"), "torchao-int4"),
    **dict.fromkeys(("float8_weight_only", "Float8WeightOnlyConfig"), "fp8-channel"),
}


def _torchao(config: Config, dtype: str) -> Scheme:
    """torchao.

    Source: transformers 5.24 utils/quantization_config.py TorchAoConfig; torchao 0.18 quantization/quant_api.py.
    """
    quant_type: Any = config.get("quant_type")
    if isinstance(quant_type, Mapping):
        quant_type = cast(Config, quant_type).get("default", cast(Any, quant_type))
    name: Any = cast(Config, quant_type).get("_type") if isinstance(quant_type, Mapping) else quant_type
    data: Any = (
        cast(Config, quant_type).get("_data") if isinstance(quant_type, Mapping) else config.get("quant_type_kwargs")
    )
    form = _TORCHAO.get(name) if isinstance(name, str) else None
    if form is None:
        supported = ", ".join(n for n in _TORCHAO if n[0].isupper())
        raise unsupported(f"torchao's {printable(str(name or '?'), 40)}", supported)
    kind = KINDS[form]
    group = _int(cast(Config, data), "group_size", kind.group) if isinstance(data, Mapping) else kind.group
    excluded = [_HEAD, *names_in(config, "modules_to_not_convert")]
    dynamic = "rows" if "dynamic" in str(name).lower() else ""
    layout = plain(form, _checked(group), dtype)._replace(acts=dynamic)
    return Scheme(f"torchao, {form}{', inputs too' if dynamic else ''}", uniform_layout(layout, excluded))


def _hqq(config: Config, dtype: str) -> Scheme:
    """HQQ. Source: transformers 5.24 utils/quantization_config.py HqqConfig; hqq 0.2.8 core/quantize.py."""
    inner: Any = config.get("quant_config")
    weights: Any = cast(Config, inner).get("weight_quant_params") if isinstance(inner, Mapping) else None
    settings: Config = cast(Config, weights) if isinstance(weights, Mapping) else {}
    bits = _int(settings, "nbits", 4)
    if bits != 4:
        raise unsupported(f"HQQ in {bits} bits", "4")
    group = _checked(_int(settings, "group_size", 64))
    excluded = names_in(config, "skip_modules") or [_HEAD]
    return Scheme("hqq, 4 bits", uniform_layout(plain("hqq-int4", group, dtype), excluded))


def _quanto(config: Config, dtype: str) -> Scheme:
    """quanto. Source: transformers 5.24 utils/quantization_config.py QuantoConfig; optimum-quanto 0.2.7."""
    kinds = {"int8": "quanto-int8", "int4": "quanto-int4", "float8": "fp8-channel"}
    kind = config.get("weights", "int8")
    if kind not in kinds:
        raise unsupported(f"quanto's weights in {as_json(kind):.30}", ", ".join(kinds))
    excluded = names_in(config, "modules_to_not_convert") or [_HEAD]
    return Scheme(f"quanto, {kind}", uniform_layout(plain(kinds[str(kind)], None, dtype), excluded))


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


def unsupported(what: str, supported: str) -> SpecError:
    """Return the error that something in the config is not supported yet."""
    return SpecError(f"{FIELD}: {what} is not supported yet; supported: {supported}", "model")


def _checked(group: int) -> int:
    """Return the group size. Raises ConfigError for one that no kernel supports."""
    if group != WHOLE and not (8 <= group <= 2**16 and group & (group - 1) == 0):
        raise ConfigError(f"{FIELD}: group_size must be -1 or a power of two from 8 to 65,536, not {group}", FIELD)
    return group


def _int(config: Config, key: str, default: int) -> int:
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


def names_in(config: Config, key: str) -> list[str]:
    """Return the strings of a list in the config, or an empty list without it."""
    return _texts(_listed(config, key))
