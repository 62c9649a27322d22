"""Patches that make the libraries behave on fake tensors as they do on a card.

They change modules of the process, so use them only in a child process that ends with its traces.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from memplan.catalogue.quantization.fused_4bit import KernelCard
from memplan.core.errors import ProbeError
from memplan.probe.fake import attention, experts, streams
from memplan.probe.fake import transformers_4 as older
from memplan.probe.fake.parts import hide_shape_propagation
from memplan.probe.libraries import library

_done: list[bool] = []
_originals: dict[str, Any] = {}


def apply(card: KernelCard, padded: bool = True, sequences: int = 0) -> None:
    """Patch the libraries for a trace on `card`. Later calls change only what depends on the card and the batch.

    padded     masks may mask tokens; else those that a model makes itself, as BART's decoder does, mask none
    sequences  number of sequences that are packed into a row, which positions tell; 0 if none are
    """
    F.scaled_dot_product_attention = attention.sdpa(card.capability)  # pyright: ignore[reportAttributeAccessIssue]
    cuda: Any = torch.cuda
    cuda.get_device_capability = lambda *_, **__: card.capability  # pyright: ignore[reportUnknownLambdaType]
    if not _done:
        _done.append(True)
        _torch()
        _cuda(cuda)
        _transformers()
        _peft()
        _bitsandbytes()
        hide_shape_propagation()
    with contextlib.suppress(Exception):
        masking = library("transformers.masking_utils")
        masking.fast_all = lambda tensor: not padded  # pyright: ignore[reportUnknownLambdaType]
        _mark_packed(masking, sequences)
    library("bitsandbytes.functional").name2qmap.clear()  # tables of the previous run
    library("bitsandbytes.optim").GlobalOptimManager._instance = None


def _torch() -> None:
    """Let foreach optimizers take fake tensors and modules move them, and add the missing fake kernels."""
    for module in (library("torch.utils._foreach_utils"), library("torch.optim.optimizer")):
        types: Any = getattr(module, "_foreach_supported_types", None)
        if types is not None and FakeTensor not in types:
            types.append(FakeTensor)
    _originals["isfinite"], torch.isfinite = torch.isfinite, _all_finite
    module_class: Any = nn.Module
    original_apply: Callable[..., Any] = module_class._apply

    def _apply(self: Any, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
        if not any(isinstance(p, FakeTensor) for p in self.parameters(recurse=True)):
            return original_apply(self, fn, recurse)
        if recurse:
            for child in self.children():
                _apply(child, fn)
        for key, parameter in self._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    new = fn(parameter)
                if new is parameter:
                    continue
                if new.device != parameter.device:  # a fake tensor keeps its device
                    self._parameters[key] = nn.Parameter(new, parameter.requires_grad)
                else:
                    parameter.data = new
        for key, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[key] = fn(buffer)
        return self

    module_class._apply = _apply
    _data()
    functional: Any = F
    if hasattr(F, "grouped_mm"):
        functional.grouped_mm = experts.grouped_mm(functional.grouped_mm)
    # Without CUDA these are decomposed before dispatch modes see them; CUDA has a kernel for each.
    if not torch.backends.cuda.is_built():
        kernels: Any = torch.library.Library("aten", "IMPL")
        for name in ("silu_backward", "mish_backward"):
            kernels.impl(name, lambda gradient, x: torch.empty_like(x), "CUDA")  # pyright: ignore
        kernels.impl("_fused_rms_norm", _rms_norm, "CUDA")
        kernels.impl("_fused_rms_norm_backward", _rms_norm_backward, "CUDA")
        _registrations.append(kernels)


def _rms_norm(x: Any, shape: list[int], weight: Any, eps: float | None) -> Any:
    """Return the normalised x, and one fp32 number per row."""
    rows = (*x.shape[: -len(shape)], *[1] * len(shape))
    return torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)


def _rms_norm_backward(gradient: Any, x: Any, shape: list[int], rstd: Any, weight: Any, needed: list[bool]) -> Any:
    return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def _all_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Return torch's mask of finite numbers. BART asks whether `all` are: in a model that trains, they are."""
    mask: Any = _originals["isfinite"](tensor)
    mask.all = lambda: True
    return mask


def _data() -> None:
    """Move a fake tensor to the device of the data it is assigned, as a real tensor."""
    fake: Any = FakeTensor
    plain: Any = torch.Tensor.data

    def assign(self: Any, value: Any) -> None:
        plain.__set__(self, value)
        if isinstance(value, FakeTensor):
            self.fake_device = value.fake_device

    fake.data = property(plain.__get__, assign)


_registrations: list[Any] = []  # a torch.library registration ends with the object


def _cuda(cuda: Any) -> None:
    """Make torch.cuda report a card, on which nothing takes time."""
    cuda.is_bf16_supported = lambda *_, **__: True  # pyright: ignore[reportUnknownLambdaType]
    cuda.current_device = lambda: 0
    streams.apply(cuda, torch.accelerator)
    cuda.synchronize = cuda.empty_cache = lambda *_, **__: None  # pyright: ignore[reportUnknownLambdaType]
    cuda._lazy_init = lambda: None
    # for checkpointed blocks that get no tensor by position
    library("torch.utils.checkpoint").DefaultDeviceType.set_device_type("cuda")
    for name in ("torch.cuda.amp.common", "torch.amp.grad_scaler"):
        module = library(name)
        if hasattr(module, "amp_definitely_not_available"):
            module.amp_definitely_not_available = lambda: False
    mode: Any = library("torch.amp.autocast_mode").autocast
    construct = mode.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        available, cuda.is_available = cuda.is_available, lambda: True
        try:
            construct(self, *args, **kwargs)
        finally:
            cuda.is_available = available

    mode.__init__ = __init__


def _transformers() -> None:
    """Skip the checks of values that fake tensors do not have, make flash-attn available, and hide kernel packages.

    Their kernels do not run without a card.
    """
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    for name in ("fla", "causal_conv1d", "mamba_ssm"):
        modules.setdefault(name, None)
    utils = library("transformers.utils.import_utils")
    utils.is_fake_tensor = lambda tensor: False  # pyright: ignore[reportUnknownLambdaType]
    flash, models = library("transformers.modeling_flash_attention_utils"), library("transformers.modeling_utils")
    if utils.is_torch_greater_or_equal("2.9"):
        library("transformers.integrations.flex_attention").compile_friendly_flex_attention = attention.flex_attention
        library("transformers.masking_utils").create_block_mask = attention.create_block_mask
    if not hasattr(flash, "_lazy_imports"):
        older.flash_attention()
        return
    for check in ("_flash_attn_can_dispatch", "_flash_attn_2_can_dispatch"):  # the second one before 5.24
        setattr(models.PreTrainedModel, check, lambda *_, **__: True)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    versions: Any = getattr(models, "FLASH_ATTENTION_COMPATIBILITY_MATRIX", {})
    for version in versions.values():
        version["general_availability_check"] = lambda *_, **__: True  # pyright: ignore[reportUnknownLambdaType]
    for module in (flash, models):
        for n in (2, 3):
            setattr(module, f"is_flash_attn_{n}_available", lambda *_, **__: True)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    choose: Any = models.PreTrainedModel._check_and_adjust_attn_implementation

    def _as_asked(model: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the attention asked for where a class names kernels of the Hub in its place, which are not loaded."""
        type(model)._compatible_flash_implementations = None
        return choose(model, *args, **kwargs)

    models.PreTrainedModel._check_and_adjust_attn_implementation = _as_asked
    flash._get_unpad_data = _all_tokens
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    third = ModuleType("flash_attn_interface")
    vars(third).update(
        flash_attn_func=attention.flash_attn_3_func,
        flash_attn_varlen_func=attention.flash_attn_3_varlen_func,
        flash_attn_with_kvcache=None,
    )
    vars(package).update(
        flash_attn_func=attention.flash_attn_func,
        flash_attn_varlen_func=attention.flash_attn_varlen_func,
        flash_attn_with_kvcache=None,
    )
    vars(padding).update(pad_input=flash._pad_input, unpad_input=flash._unpad_input)
    imports: Callable[..., Any] = flash._lazy_imports

    def _lazy_imports(*args: Any, **kwargs: Any) -> Any:
        """Import transformers' flash-attn functions, with the package present only meanwhile."""
        modules = {"flash_attn": package, "flash_attn.bert_padding": padding, "flash_attn_interface": third}
        sys.modules.update(modules)
        try:
            return imports(*args, **kwargs)
        finally:
            for name in modules:
                del sys.modules[name]

    flash._lazy_imports = _lazy_imports


def _mark_packed(masking: ModuleType, sequences: int) -> None:
    """Let transformers find that number of sequences in every row by its positions, whose values it cannot read."""
    flash: Any = library("transformers.modeling_flash_attention_utils")
    found: Any = _originals.setdefault("found", vars(masking)["find_packed_sequence_indices"])
    vars(masking)["find_packed_sequence_indices"] = found if sequences else lambda position_ids: None  # pyright: ignore

    def lengths(position_ids: Any) -> tuple[tuple[Any, Any], tuple[int, int]]:
        """Return where each of the sequences begins, and the longest length."""
        ends = torch.zeros(sequences + 1, dtype=torch.int32, device=position_ids.device)
        return (ends, ends), (position_ids.numel() // sequences,) * 2

    def is_packed(position_ids: Any, batch_size: int) -> bool:
        return bool(sequences) and position_ids is not None and batch_size == 1

    flash.prepare_fa_kwargs_from_position_ids, flash._is_packed_sequence = lengths, is_packed


def _all_tokens(mask: Any) -> tuple[Any, Any, int]:
    """Return the indices of tokens that are not padding. Their number depends on the data: all are counted."""
    batch, rows = mask.shape
    lengths = torch.arange(batch + 1, dtype=torch.int32, device=mask.device)
    return torch.arange(batch * rows, device=mask.device), lengths, rows


def cluster_evenly() -> None:
    """Let AdaMSS cluster rows without scikit-learn and values: equally many in each cluster."""
    sys.modules.setdefault("sklearn", module_from_spec(ModuleSpec("sklearn", None)))
    with contextlib.suppress(ProbeError):  # peft before 0.19
        layer = library("peft.tuners.adamss.layer")
        layer.clustering_Z = lambda rows, number, _: ((len(rows), n := min(number, len(rows))), n)  # pyright: ignore
        layer.seg_locations = lambda of: [torch.arange(i, *of) for i in range(of[1])]  # pyright: ignore


def _peft() -> None:
    """Let peft recognise quantised weights without bitsandbytes' classes, which cannot hold fake tensors."""
    original = library("peft.utils.integrations").dequantize_module_weight  # transformers imports scikit-learn it finds
    cluster_evenly()
    torch.random.fork_rng = lambda *_, **__: contextlib.nullcontext()  # pyright: ignore[reportUnknownLambdaType]
    functional = library("bitsandbytes.functional")

    def dequantize_module_weight(module: Any) -> Any:
        weight = module.weight
        if getattr(weight, "quant_state", None) is not None:
            return functional.dequantize_4bit(weight.data, weight.quant_state)
        scales = getattr(getattr(module, "state", None), "SCB", None)
        if scales is None:
            scales = getattr(weight, "SCB", None)
        if scales is not None:
            return functional.int8_vectorwise_dequant(weight.data, scales)
        return original(module)

    for name, module in list(sys.modules.items()):
        if name.startswith("peft.") and getattr(module, "dequantize_module_weight", None) is original:
            vars(module)["dequantize_module_weight"] = dequantize_module_weight


def _bitsandbytes() -> None:
    """Keep paged states out of torch's device memory, and skip the values of quantisation tables."""
    functional = library("bitsandbytes.functional")

    def get_paged(*shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> Any:
        tensor: Any = torch.empty(*shape, dtype=dtype, device="cpu")
        tensor.is_paged, tensor.page_deviceid = True, 0
        return tensor

    def restore(module: Any) -> None:
        """Restore the quant state of gathered weights: bitsandbytes' class, which would, cannot hold fake tensors."""
        if getattr(module.weight, "quant_state", None) is None:
            module.weight.quant_state = module.quant_state

    library("bitsandbytes.nn.modules").fix_4bit_weight_quant_state_from_module = restore
    functional.get_paged = get_paged
    functional.create_dynamic_map = lambda *_, **__: torch.empty(256, dtype=torch.float32)  # pyright: ignore
    functional.fill = functional.prefetch_tensor = lambda *_, **__: None  # pyright: ignore[reportUnknownLambdaType]
    functional.is_on_gpu = lambda *_, **__: True  # pyright: ignore[reportUnknownLambdaType]
