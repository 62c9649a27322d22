"""What torch's distributed modules must believe so that one rank of several runs on fake tensors, without the others.

All of it changes modules of the process: it belongs into a child that ends with its traces.
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
    _meshes_real()
    _card_for_fsdp()
    _no_look_at_the_others()


def _meshes_real() -> None:
    """A mesh is a tensor of ranks, whose values are asked for."""
    mesh: Any = library("torch.distributed.device_mesh").DeviceMesh
    for name in ("__init__", "__getitem__", "_flatten", "_unflatten"):
        if hasattr(mesh, name):
            setattr(mesh, name, _unseen(getattr(mesh, name)))
    mesh.mesh = property(_unseen(mesh.mesh.fget))


def _unseen(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


def _card_for_fsdp() -> None:
    """There is a card, for FSDP1 that asks before its first step."""
    runtime: Any = library("torch.distributed.fsdp._runtime_utils")
    begin: Callable[..., Any] = runtime._lazy_init
    cuda: Any = torch.cuda

    def _lazy_init(*args: Any, **kwargs: Any) -> Any:
        available, cuda.is_available = cuda.is_available, lambda: True
        try:
            return begin(*args, **kwargs)
        finally:
            cuda.is_available = available

    for name in ("_runtime_utils", "_unshard_param_utils", "fully_sharded_data_parallel"):
        library(f"torch.distributed.fsdp.{name}")._lazy_init = _lazy_init

    flat = library("torch.distributed.fsdp._flat_param")
    flat._same_storage = lambda a, b: _storage(a) == _storage(b)  # pyright: ignore[reportUnknownLambdaType]
    fake: Any = FakeTensor
    fake.data_ptr = _address
    fake.pin_memory = _pinned
    flat._data_ptr_allocated = _filled
    for name in ("_common_utils", "_flat_param", "_runtime_utils"):
        module = library(f"torch.distributed.fsdp.{name}")
        if hasattr(module, "_no_dispatch_record_stream"):
            module._no_dispatch_record_stream = lambda *_: None  # pyright: ignore[reportUnknownLambdaType]


def _pinned(tensor: Any, *_: Any) -> Any:
    """A copy in host memory: of pinned memory no fake tensor knows."""
    return tensor.clone()


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _address(tensor: Any) -> int:
    """Where a tensor lies: FSDP1 asks whether two are the same, and no tensor without data lies anywhere."""
    return _storage(tensor) + tensor.storage_offset() * tensor.element_size()


def _filled(tensor: Any) -> bool:
    return tensor.untyped_storage().nbytes() > 0


def _storage(tensor: Any) -> int:
    return tensor.untyped_storage()._cdata


def _no_look_at_the_others() -> None:
    """DDP compares the ranks' shapes by their values, which are not there."""
    library("torch.nn.parallel.distributed")._verify_param_shape_across_processes = _nothing


class _Logger:
    """DDP's statistics, for which a build without CUDA has no clock."""

    def __getattr__(self, name: str) -> Any:
        return _nothing


class _HostNumbers(TorchDispatchMode):
    """What DDP writes down in host memory is there, and what others would answer is what was sent."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten.empty.memory_format and kwargs.get("device", torch.device("cpu")).type == "cpu":
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func is _aten.copy_.default and type(args[0]) is torch.Tensor:
            return args[0]
        return func(*args, **kwargs)


class _Reducer:
    """torch's reducer, which has its buckets anew after the first backward pass and sends their order to the others."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def _rebuild_buckets(self) -> bool:
        with _HostNumbers():
            return self._reducer._rebuild_buckets()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)


def answer_at_once(replicated: Any) -> None:
    """Have DDP's buckets summed at once, in place, where its own hook would wait for the other ranks; unwatched."""

    def summed(_: Any, bucket: Any) -> Any:
        futures: Any = torch.futures
        future = futures.Future()
        future.set_result(bucket.buffer())
        return future

    summed.__annotations__.clear()
    replicated.register_comm_hook(None, summed)
    replicated.logger = _Logger()
    replicated.reducer = _Reducer(replicated.reducer)
