"""The caches that transformers' `generate` creates before it calls the model, and their patches for fake tensors.

Source: transformers 5.24 generation/utils.py _prepare_cache_for_generation, cache_utils.py.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor

from memplan.core.errors import ProbeError
from memplan.probe.fake.streams import Stream
from memplan.probe.libraries import library
from memplan.spec.run import RunSpec

# Backend of a quantised cache: the package it imports, and the distribution to install.
_PACKAGES = {"quanto": ("optimum", "optimum-quanto"), "hqq": ("hqq", "hqq")}
_done: set[str] = set()


def cache_of(run: RunSpec, config: Any, vision: Any = None) -> Any:
    """Return the cache of a run; None if the model creates its own.

    `config` is the decoder's, `vision` the vision tower's. Raises ProbeError if a backend's package is not installed.
    """
    generation, batch = run.generation, run.batch
    transformers, kind = library("transformers"), generation.cache_implementation or "dynamic"
    offloads = kind.startswith("offloaded")
    if offloads:
        torch_module: Any = torch
        torch_module.Stream = Stream
    if kind in ("static", "offloaded_static", "offloaded_hybrid"):
        longest = batch.sequence + batch.new_tokens - 1
        cache = transformers.StaticCache(config=config, max_cache_len=longest, offloading=offloads)
        if batch.images:  # layers that attend to images, as in Mllama's _prepare_static_cache
            rows = (vision.image_size // vision.patch_size) ** 2 + 1
            layer_of: Any = library("transformers.cache_utils").StaticLayer
            for layer in getattr(config, "cross_attention_layers", ()):
                cache.layers[layer] = layer_of(max_cache_len=batch.images * vision.max_num_tiles * rows)
        return cache
    if offloads:
        return transformers.DynamicCache(config=config, offloading=True)
    if kind != "quantized":
        return None
    settings = {} if generation.cache_config is None else generation.cache_config.model_dump(exclude_none=True)
    backend = settings.pop("backend", "quanto")
    if backend in _PACKAGES:
        package, name = _PACKAGES[backend]
        if find_spec(package) is None:
            field = "generation.cache_config.backend"
            raise ProbeError(f"{field}: {backend} is in {name}, which is not installed; pip install {name}", field)
        _prepare(backend)
    return transformers.QuantizedCache(backend=backend, config=config, **settings)


def _prepare(backend: str) -> None:
    if backend not in _done:
        _done.add(backend)
        {"quanto": _quanto, "hqq": _hqq}[backend]()


def _quanto() -> None:
    """Patch quanto: call its Python operations directly, so that their ATen calls are recorded, replace unpacking by
    the output of its CUDA kernel, and pack fake tensors.

    Source: optimum-quanto 0.2.7 library/quantize.py, library/extensions/cuda/unpack.cu, tensor/weights/qbits.py.
    """
    functions: dict[str, Any] = {}  # registering discards an operation's Python function
    original_impl: Any = torch.library.impl

    def recording_impl(name: str, types: Any, func: Any = None, **options: Any) -> Any:
        def register(function: Any) -> Any:
            functions.setdefault(name, function)
            original_impl(name, types, function, **options)
            return function

        return register if func is None else original_impl(name, types, func, **options)

    registry: Any = torch.library
    registry.impl = recording_impl
    library("optimum.quanto")
    registry.impl = original_impl
    qbits, packed = library("optimum.quanto.tensor.weights.qbits"), library("optimum.quanto.tensor.packed")
    operations: Any = torch.ops.quanto

    def unpack(data: Any, bits: int) -> Any:
        return torch.empty((data.shape[0] * (8 // bits), *data.shape[1:]), dtype=data.dtype, device=data.device)

    operations.quantize_affine, operations.unpack = functions["quanto::quantize_affine"], unpack
    weights: Any = qbits.WeightQBitsTensor
    original_init = weights.__init__

    def __init__(self: Any, qtype: Any, axis: Any, group: Any, size: Any, stride: Any, data: Any, *rest: Any) -> None:  # noqa: N807
        if not isinstance(data, packed.PackedTensor):
            data = packed.PackedTensor.pack(data, qtype.bits)
        original_init(self, qtype, axis, group, size, stride, data, *rest)

    weights.__init__ = __init__


def _hqq() -> None:
    """Patch hqq's search for scales, which stops depending on the data, to run two steps.

    In the second step the first step's tensors are still alive.

    Source: hqq 0.2.8 core/optimize.py optimize_weights_proximal_legacy.
    """
    optimize, fake = library("hqq.core.optimize"), cast(Any, FakeTensor)
    # __wrapped__ is without inference mode, which fake tensors do not support
    search = optimize.optimize_weights_proximal_legacy.__wrapped__

    def searched(*args: Any, **kwargs: Any) -> Any:
        improves = iter((True,))

        def less(error: Any, least: Any) -> bool:
            torch.lt(error, least)
            return next(improves, False)

        fake.__lt__ = less
        try:
            with torch.no_grad():
                return search(*args, **kwargs)
        finally:
            del fake.__lt__

    library("hqq.core.quantize").Quantizer.optimize_weights = searched
