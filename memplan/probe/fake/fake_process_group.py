"""Patches of torch's distributed modules that let one rank run on fake tensors without the other ranks.

They change modules of the process, so use them only in a child process that ends with its traces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # pyright: ignore[reportPrivateUsage]

from memplan.probe.libraries import library

_aten: Any = torch.ops.aten
_done: list[bool] = []


def apply() -> None:
    """Patch torch's distributed modules, once."""
    if _done:
        return
    _done.append(True)
    library("torch.distributed._tools.fake_collectives")
    _use_real_meshes()
    _patch_fsdp1()
    _skip_shape_check()


def _use_real_meshes() -> None:
    """Compute device meshes with real tensors, because the values of their ranks are read."""
    mesh: Any = library("torch.distributed.device_mesh").DeviceMesh
    for name in ("__init__", "__getitem__", "_flatten", "_unflatten"):
        if hasattr(mesh, name):
            setattr(mesh, name, _outside_modes(getattr(mesh, name)))
    mesh.mesh = property(_outside_modes(mesh.mesh.fget))


def _outside_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


def _patch_fsdp1() -> None:
    """Make FSDP1, which checks for a card before its first step, accept the fake one."""
    runtime: Any = library("torch.distributed.fsdp._runtime_utils")
    lazy_init: Callable[..., Any] = runtime._lazy_init
    cuda: Any = torch.cuda

    def _lazy_init(*args: Any, **kwargs: Any) -> Any:
        available, cuda.is_available = cuda.is_available, lambda: True
        try:
            return lazy_init(*args, **kwargs)
        finally:
            cuda.is_available = available

    for name in ("_runtime_utils", "_unshard_param_utils", "fully_sharded_data_parallel"):
        library(f"torch.distributed.fsdp.{name}")._lazy_init = _lazy_init

    flat = library("torch.distributed.fsdp._flat_param")
    flat._same_storage = lambda a, b: _storage(a) == _storage(b)  # pyright: ignore[reportUnknownLambdaType]
    fake: Any = FakeTensor
    fake.data_ptr = _address
    fake.pin_memory = _pinned
    flat._data_ptr_allocated = _is_allocated
    for name in ("_common_utils", "_flat_param", "_runtime_utils"):
        module = library(f"torch.distributed.fsdp.{name}")
        if hasattr(module, "_no_dispatch_record_stream"):
            module._no_dispatch_record_stream = lambda *_: None  # pyright: ignore[reportUnknownLambdaType]


def _pinned(tensor: Any, *_: Any) -> Any:
    """Return a copy in host memory: fake tensors do not support pinned memory."""
    return tensor.clone()


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _address(tensor: Any) -> int:
    """Return a unique stand-in for a tensor's address, by which FSDP1 tells whether two tensors are the same."""
    return _storage(tensor) + tensor.storage_offset() * tensor.element_size()


def _is_allocated(tensor: Any) -> bool:
    return tensor.untyped_storage().nbytes() > 0


def _storage(tensor: Any) -> int:
    return tensor.untyped_storage()._cdata


def _skip_shape_check() -> None:
    """Disable DDP's comparison of shapes across ranks, which reads values."""
    library("torch.nn.parallel.distributed")._verify_param_shape_across_processes = _nothing


class _Logger:
    """DDP's statistics, disabled because a build without CUDA has no timer for them."""

    def __getattr__(self, name: str) -> Any:
        return _nothing


class _RealHostTensors(TorchDispatchMode):
    """Give DDP real host tensors for its bookkeeping, and answer broadcasts with what was sent."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten.empty.memory_format and kwargs.get("device", torch.device("cpu")).type == "cpu":
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func is _aten.copy_.default and type(args[0]) is torch.Tensor:
            return args[0]
        return func(*args, **kwargs)


class _Reducer:
    """torch's reducer, which rebuilds its buckets after the first backward pass and broadcasts their order."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def _rebuild_buckets(self) -> bool:
        with _RealHostTensors():
            return self._reducer._rebuild_buckets()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)


def reduce_locally(replicated: Any) -> None:
    """Reduce DDP's buckets immediately and in place, instead of waiting for the other ranks; disable its statistics."""

    def summed(_: Any, bucket: Any) -> Any:
        futures: Any = torch.futures
        future = futures.Future()
        future.set_result(bucket.buffer())
        return future

    summed.__annotations__.clear()
    replicated.register_comm_hook(None, summed)
    replicated.logger = _Logger()
    replicated.reducer = _Reducer(replicated.reducer)
