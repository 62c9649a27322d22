"""Replace linear layers by quantised layers of bitsandbytes, hqq or torchao, with real or fake weights.

bitsandbytes' parameter classes cannot hold a fake tensor, so a plain parameter with the same attributes stands in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from memplan.probe.libraries import library
from memplan.spec.formats import Quantization

STORAGE = {"uint8": torch.uint8, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def quantisable_names(model: Any, quantization: Quantization, saved: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the names of the modules to quantise, and mark the model as quantised.

    All plain linear layers except the head, those that `skip` names, and those in `saved` (trained as full copies).

    Source: transformers 5.24 integrations/bitsandbytes.py replace_with_bnb_linear.
    """
    conv1d = library("transformers.pytorch_utils").Conv1D
    head = model.get_output_embeddings()
    kept = (*(quantization.skip or ()), *saved, *(getattr(model, "_keep_in_fp32_modules", None) or ()))
    for name, module in model.named_modules():
        plain = type(module) is nn.Linear or isinstance(module, conv1d)
        if plain and module is not head and {*name.split(".")}.isdisjoint(kept):
            yield name
    for kind in ("4bit", "8bit"):
        setattr(model, f"is_loaded_in_{kind}", (kind == "8bit") == (quantization.format == "int8"))
    model.is_quantized, model.quantization_method = True, quantization.format.partition("-")[0]  # which peft reads


def quantise(module: Any, quantization: Quantization, compute: torch.dtype, device: torch.device) -> Any:
    """Return a quantised layer that replaces `module`, whose weight is on the meta device.

    The weight is created on `device` in its own dtype, quantised and freed.
    """
    transposed = type(module) is not nn.Linear  # transformers' Conv1D keeps [in, out]
    shape = module.weight.shape[::-1] if transposed else module.weight.shape
    weight = torch.empty(shape, dtype=module.weight.dtype, device=device)
    weight.normal_(std=0.02)
    bias: Any = getattr(module, "bias", None)
    if bias is not None:
        bias = nn.Parameter(torch.zeros(bias.shape, dtype=bias.dtype, device=device), requires_grad=False)
    layer = _MAKERS.get(quantization.format, _four_bits)(weight, quantization, compute)
    layer.bias = bias
    layer.source_cls = type(module)
    return layer


def quantise_stack(module: Any, name: str, quantization: Quantization) -> None:
    """Quantise a parameter of several matrices in place, to be dequantised whenever it is read.

    Source: axolotl 0.21 monkeypatch/moe_quant.py patch_moe_quantization_on_load.
    """
    library("bitsandbytes.nn.parametrize").replace_parameter_4bit(
        module,
        name,
        compress_statistics=quantization.double_quant,
        quant_type=quantization.format,
        blocksize=quantization.block_size,
    )
    stored = module.parametrizations[name]
    stored.original.quant_state = stored[0].quant_state  # as of a layer's weight, by which parameters are counted


def _four_bits(weight: torch.Tensor, quantization: Quantization, compute: torch.dtype) -> Any:
    bnb = library("bitsandbytes")
    settings: dict[str, Any] = {
        "blocksize": quantization.block_size,
        "compress_statistics": quantization.double_quant,
        "quant_type": quantization.format,
        "quant_storage": STORAGE[quantization.storage],
    }
    layer = _bare_layer(bnb.nn.Linear4bit, weight)
    if not isinstance(weight, FakeTensor):
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **settings).to(weight.device)
        layer.quant_state = layer.weight.quant_state
    else:
        packed, state = bnb.functional.quantize_4bit(weight, **settings)
        layer.weight = nn.Parameter(packed, requires_grad=False)
        for key, value in {**settings, "quant_state": state, "bnb_quantized": True}.items():
            setattr(layer.weight, key, value)
        layer.quant_state = state
    layer.compute_dtype, layer.compute_type_is_set = compute, True
    layer.quant_storage, layer.support_avx512bf16_for_cpu = STORAGE[quantization.storage], False
    return layer


def _int8(weight: torch.Tensor, quantization: Quantization, compute: torch.dtype) -> Any:
    """Return an LLM.int8 layer with transformers' outlier threshold, 6."""
    bnb = library("bitsandbytes")
    layer = _bare_layer(bnb.nn.Linear8bitLt, weight)
    layer.state, layer.index = bnb.MatmulLtState(), None
    layer.state.threshold, layer.state.has_fp16_weights, layer.state.use_pool = 6.0, False, True
    if not isinstance(weight, FakeTensor):
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(weight.device)
        return layer
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
    parameter: Any = nn.Parameter(codes, requires_grad=False)
    parameter.CB, parameter.SCB, parameter.has_fp16_weights = codes, scales, False
    layer.weight = parameter
    return layer


def _hqq(weight: torch.Tensor, quantization: Quantization, compute: torch.dtype) -> Any:
    """Return an HQQ layer without the search for its scales, which reads numbers."""
    layer = _bare_layer(library("hqq.core.quantize").HQQLinear, weight)
    layer.set_backend(layer.backend)
    rows, block = weight.numel() // quantization.block_size, quantization.block_size
    codes, scales = torch.empty((rows // 2, block), dtype=torch.uint8, device=weight.device), (rows, 1)
    layer.W_q = nn.Parameter(codes, requires_grad=False)
    meta: dict[str, Any] = dict.fromkeys(("quant_scale", "quant_zero", "view_as_float"), False)
    meta |= {"nbits": 4, "group_size": block, "axis": 1, "packing": "4bit_u8", "shape": weight.shape}
    meta |= {name: torch.zeros(scales, dtype=compute, device=weight.device) for name in ("scale", "zero")}
    layer.meta = {**meta, "compute_dtype": compute}
    layer.compute_dtype, layer.device, layer.ready = compute, weight.device, True
    return layer


def _torchao(weight: torch.Tensor, quantization: Quantization, compute: torch.dtype) -> Any:
    """Return a linear layer whose weight torchao stores in 8 bits, with a scale a row."""
    torchao = library("torchao.quantization")
    layer = _bare_layer(nn.Linear, weight)
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), None
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    return layer


_MAKERS = {"int8": _int8, "hqq-int4": _hqq, "torchao-int8": _torchao}


def _bare_layer(kind: Any, weight: torch.Tensor) -> Any:
    """Return a layer of a bitsandbytes class without running its constructor, which allocates weights."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    return layer
