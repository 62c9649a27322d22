"""A checkpoint or a run in a format that nothing trains over: how transformers runs its matrices, or why it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from memplan.catalogue.quantization.inference_formats import FOUR_BITS, KERNELS, RUNS, Running
from memplan.catalogue.quantization.quantization import WHOLE
from memplan.catalogue.quantization.storage import Layout, plain
from memplan.core.errors import SpecError
from memplan.models.model import ModelSpec
from memplan.program.stored.checkpoint import parameters
from memplan.program.stored.quantization_config import FIELD, scheme_of
from memplan.spec.formats import Quantization
from memplan.spec.training import Method

_BLOCKS = (WHOLE, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_HEAD = "lm_head"

Config = Mapping[str, Any]

# What transformers 5.24 runs of formats that nothing trains over, and what it does not load.
RUN = ("compressed-tensors", "fbgemm_fp8", "hqq", "modelopt", "mxfp4", "quanto", "torchao")
_NOT_LOADED = {
    "hqq": "quantizers/base.py get_quantize_ops: its quantizer has none since 5.0",
    "modelopt": "quantizers/auto.py AUTO_QUANTIZER_MAPPING",
}


class Given(NamedTuple):
    """How a checkpoint runs: in words, as a run's `quantization`, None where it is whole; how its matrices run, and
    whether they are loaded packed."""

    words: str
    quantization: Quantization | None = None
    running: Running | None = None
    packed: bool = True
    notes: tuple[str, ...] = ()


def running_checkpoint(
    model: ModelSpec, method: Method, config: Config, dtype: str, capability: tuple[int, int] | None
) -> Given:
    """A checkpoint in a format that nothing trains over, as transformers 5.24 runs it: `dtype` is the model's.

    Raises SpecError for what it does not load or was not read, ConfigError for what is no such config.
    """
    how = str(config.get("quant_method"))
    if how in _NOT_LOADED:
        raise SpecError(
            f"{FIELD}: transformers 5.24 loads no checkpoint of {how} ({_NOT_LOADED[how]}); give the checkpoint it "
            "was made from, or a profile of an engine",
            "model",
        )
    at_once = config.get("dequantize") is True or config.get("run_compressed") is False
    scheme = scheme_of(config, dtype)
    linear: dict[Layout, int] = {}
    experts: dict[Layout, int] = {}
    hit: dict[str, int] = {}
    total: dict[str, int] = {}
    for name, w, _ in parameters(model):
        layout = scheme.layout_of(name, w)
        if w.stacked and layout is not None:
            experts[layout] = experts.get(layout, 0) + 1
        elif w.matrix and not w.stacked:
            last = name.removesuffix(".weight").rpartition(".")[2]
            total[last] = total.get(last, 0) + 1
            if layout is not None:
                linear[layout] = linear.get(layout, 0) + 1
                hit[last] = hit.get(last, 0) + 1
    if not linear and not experts:
        return Given(scheme.words, notes=(f"the checkpoint is stored in {scheme.words}, none of its matrices",))
    if len(linear) > 1 or len(experts) > 1:
        raise SpecError(f"{FIELD}: linear layers that are stored in several ways are not supported yet", "model")
    layout, inner = next(iter(linear), None), next(iter(experts), None)
    given = Running(layout or inner or Layout("", WHOLE), "", inner or layout)
    if at_once:
        kernel = "dequantised" if how == "mxfp4" else "decompressed"
        said = f"the checkpoint is stored in {how} and runs dequantised: its config says so"
        skip = _skipped(model, hit, total)
        return Given(how, running=given._replace(kernel=kernel, at_once=True, skip=skip), notes=(said,))
    kernel, notes = _kernel(how, config, given.layout, dtype, capability)
    if given.layout.zeros and kernel == "decompressed":
        raise SpecError(
            f"{FIELD}: transformers 5.24 with compressed-tensors 0.20 loads no packed weights with zero points "
            "(symmetric false): their shapes do not match; say dequantize true, or a profile of an engine",
            "model",
        )
    backend = method.quantization.backend if method.quantization is not None else None
    if how == "mxfp4" and backend == "dequantised":
        kernel, notes = "dequantised", ("its experts are dequantised when they are loaded",)
    skip = _skipped(model, hit, total)
    partly = [last for last in total if 0 < hit.get(last, 0) < total[last]]
    notes += tuple(
        f"{last} is quantised in {hit[last]} of {total[last]} layers: counted as {'not ' * (last in skip)}quantised"
        for last in partly
    )
    named = _named(given.layout, skip if layout is not None else (_HEAD,), kernel)
    running = given._replace(kernel=kernel, lays=_lays(kernel, capability))
    said = f"the checkpoint is stored in {scheme.words}"
    packed = kernel not in ("torchao", "quanto") or how == "torchao"
    return Given(scheme.words, named, running, packed, (f"{said}; {notes[0]}", *notes[1:]))


def _skipped(model: ModelSpec, hit: Mapping[str, int], total: Mapping[str, int]) -> tuple[str, ...]:
    """The modules that are not stored so in most layers, by the last part of their names."""
    skip = tuple(last for last in total if 2 * hit.get(last, 0) <= total[last])
    if model.tie_word_embeddings or (_HEAD not in total and _HEAD not in skip):
        return (_HEAD, *(last for last in skip if last != _HEAD))
    return skip


def dequantised_fp8(skip: tuple[str, ...]) -> Running:
    """FP8 in squares on a card without its kernels, or where its config says so."""
    return Running(plain("fp8"), "dequantised", at_once=True, skip=skip)


def _named(layout: Layout, skip: tuple[str, ...], kernel: str) -> Quantization:
    """A layout as a run has it."""
    block = layout.group if layout.group in _BLOCKS else WHOLE
    made = {"format": layout.format, "block_size": block, "double_quant": False, "skip": skip, "backend": kernel}
    return Quantization.model_validate({**made, "kbit_preparation": False})


def _kernel(
    how: str, config: Config, layout: Layout, dtype: str, capability: tuple[int, int] | None
) -> tuple[str, tuple[str, ...]]:
    """What runs a checkpoint of that library, and a note of it."""
    match how:
        case "mxfp4":
            if capability is not None and capability < KERNELS["triton"].needs:
                return "dequantised", ("its experts are dequantised when they are loaded: its kernels need 7.5",)
            return "triton", (
                "its experts run as they are: with Triton 3.4, the package kernels and compute capability 7.5. Without "
                "those they are dequantised when they are loaded: method.quantization.backend dequantised",
            )
        case "compressed-tensors":
            fits = capability is None or capability >= KERNELS["scaled_mm"].needs
            if config.get("use_optimized_inference") is True and layout.format.startswith("fp8") and fits:
                return "scaled_mm", ("its FP8 layers run as they are: use_optimized_inference",)
            return "decompressed", (
                "it is loaded so, and whole from the first call of the model on, which is counted with loading; with "
                "dequantize true from when it is loaded",
            )
        case "fbgemm_fp8":
            _fits("fbgemm", layout.format, dtype, capability)
            return "fbgemm", ("it runs as it is stored",)
        case _:
            _fits(how, layout.format, dtype, capability)
            return how, ("it is quantised as it is loaded" if how == "quanto" else "it runs as it is stored",)


def note_of(running: Running) -> str:
    """What a run that names a format itself is told of it."""
    format = running.layout.format
    return (
        f"weights in {format}: "
        + {
            "decompressed": "as compressed-tensors loads them, whole from the first call of the model on, which is "
            "counted with loading",
            "scaled_mm": "compressed-tensors with use_optimized_inference",
            "fbgemm": "FbgemmFp8Config",
            "torchao": "TorchAoConfig, quantised as they are loaded",
            "quanto": "QuantoConfig, quantised as they are loaded",
            "triton": "experts as they are stored, with Triton 3.4, the package kernels and compute capability 7.5",
            "dequantised": "experts, dequantised when they are loaded",
        }[running.kernel]
    )


def _lays(kernel: str, capability: tuple[int, int] | None) -> bool:
    """Whether experts are laid anew: on a card of compute capability 9, which one that is not named is taken for."""
    return kernel == "triton" and (capability is None or (9, 0) <= capability < (10, 0))


def _fits(kernel: str, format: str, dtype: str, capability: tuple[int, int] | None) -> None:
    """Raise SpecError where what runs a format does not on the card, or not in the model's dtype."""
    row = FOUR_BITS.get(format, KERNELS[kernel])
    if capability is not None and capability < row.needs:
        need, have = (".".join(map(str, pair)) for pair in (row.needs, capability))
        raise SpecError(
            f"method.quantization.backend: {kernel} needs compute capability {need} for {format}, not {have}", "gpu"
        )
    if row.dtypes and dtype not in row.dtypes:
        raise SpecError(
            f"precision.weights: {kernel} runs {format} in {', '.join(row.dtypes)}, not {dtype}", "precision.weights"
        )


def running_of(
    model: ModelSpec, quantization: Quantization, dtype: str, capability: tuple[int, int] | None
) -> Running | None:
    """How a format that a run names itself runs; None for those that adapters train over.

    Raises SpecError where transformers has no such weights of this model, or on this card.
    """
    known = RUNS.get(quantization.format)
    if known is None or (quantization.format == "fp8" and quantization.backend != "decompressed"):
        return None
    field = "method.quantization"
    kernel = quantization.backend or known[0]
    if kernel not in known:
        raise SpecError(
            f"{field}.backend: {kernel} does not run {quantization.format}; known: {', '.join(known)}",
            f"{field}.backend",
        )
    if kernel in ("triton", "dequantised"):
        if not any(w.stacked for _, w, _ in parameters(model)):
            raise SpecError(
                f"{field}.backend: {kernel} runs experts in mxfp4, which {model.model_type} has none of; known: "
                "decompressed",
                f"{field}.backend",
            )
        if model.model_type != "gpt_oss":
            raise SpecError(f"{field}.format: transformers runs experts in mxfp4 of gpt_oss alone", f"{field}.format")
        if kernel == "triton" and capability is not None and capability < KERNELS["triton"].needs:
            kernel = "dequantised"
    _fits(kernel, quantization.format, dtype, capability)
    group = quantization.block_size if "block_size" in quantization.model_fields_set else None
    scales = "fp32" if kernel in ("fbgemm", "torchao") else dtype
    layout = plain(quantization.format, group, scales)
    acts = _USUAL.get(quantization.format, "") if kernel == "decompressed" else ""
    return Running(layout._replace(acts=acts, inputs=acts == "fixed"), kernel, lays=_lays(kernel, capability))


# How inputs are quantised by llm-compressor's usual schemes of these formats.
# Source: compressed-tensors 0.20 quantization/quant_scheme.py FP8, FP8_DYNAMIC, FP8_BLOCK, W8A8, NVFP4, MXFP8
_USUAL = {
    "fp8": "groups/128",
    "fp8-tensor": "fixed",
    "fp8-channel": "rows",
    "w8a8-int8": "rows",
    "nvfp4": "local/16",
    "mxfp8": "groups/32",
}
