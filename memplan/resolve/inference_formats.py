"""How transformers runs weights in a format that cannot be trained over, or why it cannot run them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.catalogue.quantization.inference_formats import (
    DEQUANTISED_ON_LOADING,
    FOUR_BITS,
    KERNELS,
    RUNS,
    InferenceFormat,
)
from memplan.catalogue.quantization.quantization import WHOLE
from memplan.catalogue.quantization.storage import Layout, plain
from memplan.core.errors import SpecError, refused
from memplan.core.records import NamedTuple
from memplan.models.model import ModelSpec
from memplan.program.stored.checkpoint import parameters
from memplan.program.stored.quantization_config import FIELD, scheme_of
from memplan.spec.formats import Quantization
from memplan.spec.training import Method

_BLOCKS = (WHOLE, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_HEAD = "lm_head"

Config = Mapping[str, Any]

# Formats that cannot be trained over: those transformers 5.24 runs, and those it cannot load.
LOADED_FORMATS = ("compressed-tensors", "fbgemm_fp8", "hqq", "modelopt", "mxfp4", "quanto", "torchao")
_NOT_LOADED = {
    "hqq": "quantizers/base.py get_quantize_ops: its quantizer has no such method since 5.0",
    "modelopt": "quantizers/auto.py AUTO_QUANTIZER_MAPPING",
}


class RunnableCheckpoint(NamedTuple):
    """How a quantised checkpoint runs.

    words         its format, for messages
    quantization  the run's `quantization`, or None if the weights are dequantised
    running       how its matrices run
    packed        whether they are loaded packed
    notes         what to tell the user
    """

    words: str
    quantization: Quantization | None = None
    running: InferenceFormat | None = None
    packed: bool = True
    notes: tuple[str, ...] = ()


def running_checkpoint(
    model: ModelSpec, method: Method, config: Config, dtype: str, capability: tuple[int, int] | None
) -> RunnableCheckpoint:
    """Return how transformers 5.24 runs a checkpoint in a format that cannot be trained over.

    `dtype` is the model's. Raises SpecError for what transformers does not load or memplan has not read, ConfigError
    for an invalid config.
    """
    how = str(config.get("quant_method"))
    if how in _NOT_LOADED:
        raise SpecError(
            f"{FIELD}: transformers 5.24 cannot load {how} checkpoints ({_NOT_LOADED[how]}); use the unquantised "
            "checkpoint, or the profile of a serving engine",
            "model",
        )
    is_dequantised = config.get("dequantize") is True or config.get("run_compressed") is False
    scheme = scheme_of(config, dtype)
    linear: dict[Layout, int] = {}
    experts: dict[Layout, int] = {}
    quantised: dict[str, int] = {}
    total: dict[str, int] = {}
    for name, w, _ in parameters(model):
        layout = scheme.layout_of(name, w)
        if w.stacked and layout is not None:
            experts[layout] = experts.get(layout, 0) + 1
        elif w.matrix and not w.stacked:
            leaf = name.removesuffix(".weight").rpartition(".")[2]
            total[leaf] = total.get(leaf, 0) + 1
            if layout is not None:
                linear[layout] = linear.get(layout, 0) + 1
                quantised[leaf] = quantised.get(leaf, 0) + 1
    if not linear and not experts:
        return RunnableCheckpoint(
            scheme.words,
            notes=(f"the checkpoint is declared as {scheme.words}, but none of its matrices are quantised",),
        )
    if len(linear) > 1 or len(experts) > 1:
        raise SpecError(f"{FIELD}: linear layers stored in several formats are not supported yet", "model")
    layout, expert_layout = next(iter(linear), None), next(iter(experts), None)
    base = InferenceFormat(layout or expert_layout or Layout("", WHOLE), "", expert_layout or layout)
    if is_dequantised and base.layout.format not in DEQUANTISED_ON_LOADING:
        text = f"transformers 5.24 does not dequantise {how} checkpoints on loading; leave out dequantize"
        raise SpecError(f"{FIELD}: {text}", "model")
    if is_dequantised:
        kernel = "dequantised" if how == "mxfp4" else "decompressed"
        how_stored = f"the checkpoint is stored in {how} and runs dequantised: its config says so"
        skip = _skipped(model, quantised, total)
        return RunnableCheckpoint(
            how, running=base._replace(kernel=kernel, at_once=True, skip=skip), notes=(how_stored,)
        )
    kernel, notes = _kernel(how, config, base.layout, dtype, capability)
    if base.layout.zeros and kernel == "decompressed":
        raise SpecError(
            f"{FIELD}: transformers 5.24 with compressed-tensors 0.20 cannot load packed weights with zero points "
            "(symmetric false), because their shapes do not match; set dequantize true in the config, or use the "
            "profile of a serving engine",
            "model",
        )
    backend = method.quantization.backend if method.quantization is not None else None
    if how == "mxfp4" and backend == "dequantised":
        kernel, notes = "dequantised", ("its experts are dequantised on loading",)
    skip = _skipped(model, quantised, total)
    mixed = [leaf for leaf in total if 0 < quantised.get(leaf, 0) < total[leaf]]
    notes += tuple(
        f"{leaf} is quantised in {quantised[leaf]} of {total[leaf]} layers: counted as "
        f"{'not ' * (leaf in skip)}quantised"
        for leaf in mixed
    )
    quantization = _as_quantization(base.layout, skip if layout is not None else (_HEAD,), kernel)
    running = base._replace(kernel=kernel, lays=_repacks_experts(kernel, capability))
    how_stored = f"the checkpoint is stored in {scheme.words}"
    packed = kernel not in ("torchao", "quanto") or how == "torchao"
    return RunnableCheckpoint(scheme.words, quantization, running, packed, (f"{how_stored}; {notes[0]}", *notes[1:]))


def _skipped(model: ModelSpec, quantised: Mapping[str, int], total: Mapping[str, int]) -> tuple[str, ...]:
    """Return the last name parts of the modules that most layers leave unquantised."""
    skip = tuple(leaf for leaf in total if 2 * quantised.get(leaf, 0) <= total[leaf])
    if model.tie_word_embeddings or (_HEAD not in total and _HEAD not in skip):
        return (_HEAD, *(leaf for leaf in skip if leaf != _HEAD))
    return skip


def dequantised_fp8(skip: tuple[str, ...]) -> InferenceFormat:
    """Return how block-quantised FP8 runs if the config, or a card without FP8 kernels, dequantises it."""
    return InferenceFormat(plain("fp8"), "dequantised", at_once=True, skip=skip)


def _as_quantization(layout: Layout, skip: tuple[str, ...], kernel: str) -> Quantization:
    """Return a layout as a run's `quantization`."""
    block = layout.group if layout.group in _BLOCKS else WHOLE
    fields = {"format": layout.format, "block_size": block, "double_quant": False, "skip": skip, "backend": kernel}
    return Quantization.model_validate({**fields, "kbit_preparation": False})


def _kernel(
    how: str, config: Config, layout: Layout, dtype: str, capability: tuple[int, int] | None
) -> tuple[str, tuple[str, ...]]:
    """Return the kernel that runs a checkpoint of the library `how`, and notes on it."""
    match how:
        case "mxfp4":
            if capability is not None and capability < KERNELS["triton"].needs:
                return "dequantised", (
                    "its experts are dequantised on loading: the kernels need compute capability 7.5",
                )
            return "triton", (
                "its experts run packed, which takes Triton 3.4, the `kernels` package and compute capability 7.5; "
                "without these they are dequantised on loading (method.quantization.backend dequantised)",
            )
        case "compressed-tensors":
            fits = capability is None or capability >= KERNELS["scaled_mm"].needs
            if config.get("use_optimized_inference") is True and layout.format.startswith("fp8") and fits:
                return "scaled_mm", ("its FP8 layers run as stored (use_optimized_inference)",)
            return "decompressed", (
                "it is loaded packed and dequantised in the first forward pass, which is counted as part of loading "
                "(with dequantize true it is dequantised on loading)",
            )
        case "fbgemm_fp8":
            _check_kernel("fbgemm", layout.format, dtype, capability)
            return "fbgemm", ("it runs as stored",)
        case _:
            _check_kernel(how, layout.format, dtype, capability)
            return how, ("it is quantised on loading" if how == "quanto" else "it runs as stored",)


def note_of(running: InferenceFormat) -> str:
    """Return the note on a format that the run itself names."""
    format = running.layout.format
    return (
        f"weights in {format}: "
        + {
            "decompressed": "loaded packed by compressed-tensors and dequantised in the first forward pass, which is "
            "counted as part of loading",
            "scaled_mm": "compressed-tensors with use_optimized_inference",
            "fbgemm": "FbgemmFp8Config",
            "torchao": "TorchAoConfig, quantised on loading",
            "quanto": "QuantoConfig, quantised on loading",
            "triton": "experts run packed, with Triton 3.4, the `kernels` package and compute capability 7.5",
            "dequantised": "experts, dequantised on loading",
        }[running.kernel]
    )


def _repacks_experts(kernel: str, capability: tuple[int, int] | None) -> bool:
    """Return whether Triton's kernels re-lay out the experts, as on compute capability 9.

    A run without a card is taken to be on one.
    """
    return kernel == "triton" and (capability is None or (9, 0) <= capability < (10, 0))


def _check_kernel(kernel: str, format: str, dtype: str, capability: tuple[int, int] | None) -> None:
    """Raise SpecError if the kernel does not support the card, or not the model's dtype."""
    row = FOUR_BITS.get(format, KERNELS[kernel])
    if capability is not None and capability < row.needs:
        need, have = (".".join(map(str, pair)) for pair in (row.needs, capability))
        raise SpecError(
            f"method.quantization.backend: {kernel} needs compute capability {need} for {format}, not {have}", "gpu"
        )
    if row.dtypes and dtype not in row.dtypes:
        raise refused("precision.weights", f"{kernel} runs {format} with {', '.join(row.dtypes)}, not {dtype}")


def format_running(
    model: ModelSpec, quantization: Quantization, dtype: str, capability: tuple[int, int] | None
) -> InferenceFormat | None:
    """Return how the format that a run names runs, or None for formats that adapters train over.

    Raises SpecError if transformers cannot run the model in it, or not on this card.
    """
    known = RUNS.get(quantization.format)
    if known is None or (quantization.format == "fp8" and quantization.backend != "decompressed"):
        return None
    field = "method.quantization"
    kernel = quantization.backend or known[0]
    if kernel not in known:
        raise refused(f"{field}.backend", f"{kernel} does not run {quantization.format}; choose {', '.join(known)}")
    if kernel in ("triton", "dequantised"):
        if not any(w.stacked for _, w, _ in parameters(model)):
            raise refused(
                f"{field}.backend",
                f"{kernel} only runs mxfp4 experts, and {model.model_type} has no experts; use decompressed",
            )
        if not model.family.checkpoint.runs_mxfp4:
            raise refused(f"{field}.format", "transformers only runs mxfp4 experts for gpt_oss")
        if kernel == "triton" and capability is not None and capability < KERNELS["triton"].needs:
            kernel = "dequantised"
    _check_kernel(kernel, quantization.format, dtype, capability)
    group = quantization.block_size if "block_size" in quantization.model_fields_set else None
    scales = "fp32" if kernel in ("fbgemm", "torchao") else dtype
    layout = plain(quantization.format, group, scales)
    acts = _INPUT_SCHEMES.get(quantization.format, "") if kernel == "decompressed" else ""
    return InferenceFormat(
        layout._replace(acts=acts, inputs=acts == "fixed"), kernel, lays=_repacks_experts(kernel, capability)
    )


# How llm-compressor's default schemes quantise the inputs, by format.
# Source: compressed-tensors 0.20 quantization/quant_scheme.py FP8, FP8_DYNAMIC, FP8_BLOCK, W8A8, NVFP4, MXFP8
_INPUT_SCHEMES = {
    "fp8": "groups/128",
    "fp8-tensor": "fixed",
    "fp8-channel": "rows",
    "w8a8-int8": "rows",
    "nvfp4": "local/16",
    "mxfp8": "groups/32",
}
