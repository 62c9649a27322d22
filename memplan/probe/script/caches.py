"""The caches that transformers' `generate` makes before it calls the model, and what they must believe of fake tensors.

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

# What a quantised cache's backends are in, and what installs that.
_PACKAGES = {"quanto": ("optimum", "optimum-quanto"), "hqq": ("hqq", "hqq")}
_done: set[str] = set()


def cache_of(run: RunSpec, config: Any, vision: Any = None) -> Any:
    """The cache of a run, of a model whose decoder has that `config`, and whose tower the `vision`; None where the
    model makes its own.

    Raises ProbeError where a backend's package is not installed.
    """
    generation, batch = run.generation, run.batch
    transformers, kind = library("transformers"), generation.cache_implementation or "dynamic"
    offloads = kind.startswith("offloaded")
    if offloads:
        anything: Any = torch
        anything.Stream = Stream
    if kind in ("static", "offloaded_static", "offloaded_hybrid"):
        longest = batch.sequence + batch.new_tokens - 1
        made = transformers.StaticCache(config=config, max_cache_len=longest, offloading=offloads)
        if batch.images:  # of layers that attend to images, as Mllama's _prepare_static_cache has it
            rows = (vision.image_size // vision.patch_size) ** 2 + 1
            layer_of: Any = library("transformers.cache_utils").StaticLayer
            for layer in getattr(config, "cross_attention_layers", ()):
                made.layers[layer] = layer_of(max_cache_len=batch.images * vision.max_num_tiles * rows)
        return made
    if offloads:
        return transformers.DynamicCache(config=config, offloading=True)
    if kind != "quantized":
        return None
    asked = {} if generation.cache_config is None else generation.cache_config.model_dump(exclude_none=True)
    backend = asked.pop("backend", "quanto")
    if backend in _PACKAGES:
        package, name = _PACKAGES[backend]
        if find_spec(package) is None:
            field = "generation.cache_config.backend"
            raise ProbeError(f"{field}: {backend} is in {name}, which is not installed; pip install {name}", field)
        _prepare(backend)
    return transformers.QuantizedCache(backend=backend, config=config, **asked)


def _prepare(backend: str) -> None:
    if backend not in _done:
        _done.add(backend)
        {"quanto": _quanto, "hqq": _hqq}[backend]()


def _quanto() -> None:
    """quanto's operations in Python are seen below its names for them, and unpacking is the CUDA kernel it compiles; a
    fake tensor is packed as a plain one.

    Source: optimum-quanto 0.2.7 library/quantize.py, library/extensions/cuda/unpack.cu, tensor/weights/qbits.py.
    """
    written: dict[str, Any] = {}  # an operation's function goes when it is registered
    registers: Any = torch.library.impl

    def keeping(name: str, types: Any, func: Any = None, **options: Any) -> Any:
        def register(function: Any) -> Any:
            written.setdefault(name, function)
            registers(name, types, function, **options)
            return function

        return register if func is None else registers(name, types, func, **options)

    registry: Any = torch.library
    registry.impl = keeping
    library("optimum.quanto")
    registry.impl = registers
    qbits, packed = library("optimum.quanto.tensor.weights.qbits"), library("optimum.quanto.tensor.packed")
    operations: Any = torch.ops.quanto

    def unpack(data: Any, bits: int) -> Any:
        return torch.empty((data.shape[0] * (8 // bits), *data.shape[1:]), dtype=data.dtype, device=data.device)

    operations.quantize_affine, operations.unpack = written["quanto::quantize_affine"], unpack
    weights: Any = qbits.WeightQBitsTensor
    made = weights.__init__

    def __init__(self: Any, qtype: Any, axis: Any, group: Any, size: Any, stride: Any, data: Any, *rest: Any) -> None:  # noqa: N807
        if not isinstance(data, packed.PackedTensor):
            data = packed.PackedTensor.pack(data, qtype.bits)
        made(self, qtype, axis, group, size, stride, data, *rest)

    weights.__init__ = __init__


def _hqq() -> None:
    """Its search for scales goes on while the error falls, which data decides: to the second step at least, when the
    first one's tensors are still there.

    Source: hqq 0.2.8 core/optimize.py optimize_weights_proximal_legacy.
    """
    optimize, fake = library("hqq.core.optimize"), cast(Any, FakeTensor)
    search = optimize.optimize_weights_proximal_legacy.__wrapped__  # out of inference mode, which fake tensors lack

    def searched(*args: Any, **kwargs: Any) -> Any:
        falls = iter((True,))

        def less(error: Any, least: Any) -> bool:
            torch.lt(error, least)
            return next(falls, False)

        fake.__lt__ = less
        try:
            with torch.no_grad():
                return search(*args, **kwargs)
        finally:
            del fake.__lt__

    library("hqq.core.quantize").Quantizer.optimize_weights = searched
