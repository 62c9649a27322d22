"""Record every allocation and free of a storage on the device, below autograd, and quickly.

Every ATen call of the script is dispatched here. Its outputs depend only on the shapes, strides and dtypes of its
inputs: torch's fake tensors compute them once, and repeated calls are answered from a cache.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from memplan.catalogue.quantization.fused_4bit import KernelCard
from memplan.core.records import NamedTuple
from memplan.probe.fake.kernels import Scratch, data_free_kernels, scratch_of
from memplan.probe.libraries import library

_C: Any = library("torch._C")
_aten: Any = torch.ops.aten
_DEVICE: Any = torch.ops.prim.device.default
_graph_task: Callable[[], int] = _C._current_graph_task_id
_node: Callable[[], Any] = _C._current_autograd_node
_subclass: Any = torch.Tensor._make_subclass  # pyright: ignore[reportPrivateUsage]

# Calls whose answer depends on more than metadata, or which change their arguments' metadata.
_NEVER_CACHED = frozenset(
    ("set_", "resize_", "resize_as_", "_local_scalar_dense", "lift_fresh", "equal", "nonzero", "_resize_output_")
)

_SHARED = -2

# Tensor subclasses around inner tensors: they dispatch again with those.
_WRAPPERS = frozenset(("DTensor", "AsyncCollectiveTensor", "PackedTensor", "WeightQBitsTensor", "Int8Tensor"))

# FunctionsManual.cpp writes in place into a new gradient, but not for tensor subclasses such as fake tensors.
_IN_PLACE = {
    _aten._index_put_impl.default: _aten._index_put_impl_.default,
    _aten.index_put.default: _aten.index_put_.default,
    _aten.scatter_add.default: _aten.scatter_add_.default,
    _aten.scatter.src: _aten.scatter_.src,
    _aten.scatter.value: _aten.scatter_.value,
    _aten.index_add.default: _aten.index_add_.default,
}


class StorageInfo(NamedTuple):
    """A storage as it is created.

    asked           bytes requested
    shape, dtype    of the first tensor in the storage
    op              the operation that created it
    module          path of the module whose forward ran, or whose gradient was computed
    node            sequence number of the running autograd node, by which the module is found; -1 outside backward
    """

    asked: int
    shape: tuple[int, ...]
    dtype: str
    op: str
    module: str
    node: int


class _Output(NamedTuple):
    """How to recreate an output: as a new storage, a view of the n-th input tensor, or that tensor itself."""

    kind: str
    which: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    asked: int
    state: dict[str, Any]


class _Answer(NamedTuple):
    """A cached call: its outputs, whether they are a list or a tuple, and its kernel's scratch memory."""

    outputs: tuple[_Output | None, ...]
    sequence: type[Any] | None
    scratch: tuple[tuple[str, int], ...]


class _FakeMode(FakeTensorMode):
    """torch's fake tensor mode; tensors that are deep-copied stay in this mode."""

    def __deepcopy__(self, memo: Any) -> _FakeMode:
        return self


class OperationCache(NamedTuple):
    """Facts of operations on one kind of card, shared by all runs.

    scratch       memory that kernels allocate internally, by operation
    replacements  replacements for operations whose outputs depend on the data
    answers       cached calls
    is_cacheable  whether an operation's calls can be cached
    """

    fake: AbstractContextManager[Any]
    scratch: Mapping[Any, Scratch]
    replacements: Mapping[Any, Callable[..., Any]]
    answers: dict[Any, _Answer]
    is_cacheable: dict[Any, bool]


def new_operation_cache(card: KernelCard, fake: bool = True) -> OperationCache:
    """Return an empty cache with the kernels of a card; for tensors with data if `fake` is false."""
    mode = _FakeMode(allow_non_fake_inputs=True) if fake else nullcontext()
    return OperationCache(mode, scratch_of(card), data_free_kernels(), {}, {})


class _Storage(weakref.ref[Any]):
    """A weak reference to a storage, with its number (-1 while it is empty) and what it was `known` as before."""

    __slots__ = ("key", "known", "number")
    key: int
    known: StorageInfo
    number: int


class Interval(NamedTuple):
    """A phase: its name, step (0: none), first and last event, and the event where its loss began (-1: none)."""

    name: str
    step: int
    start: int
    end: int
    loss: int


class Tracker(TorchDispatchMode):
    """A dispatch mode over fake or real tensors that records the events of storages on `device`.

    events      n when storage n is created, ~n when it is freed
    made        what is known of each storage
    intervals   the phases
    recomputed  first and last events of each recomputed checkpointed block
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against dynamo costs time in every call

    def __init__(self, device: str, memory: OperationCache, card: int | None = None) -> None:
        """`card` is the index of the recorded device of that type; None records all."""
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.device = device
        self._card = card
        self._fake, self._scratch, self._instead, self._answers, self._kept = memory
        self.made: list[StorageInfo] = []
        self.events: list[int] = []
        self.intervals: list[Interval] = []
        self.recomputed: list[tuple[int, int]] = []
        self.modules: list[tuple[int, str]] = []  # autograd's sequence number when a module starts or resumes
        self.module = ""
        self.step = 0
        self.loss_at = -1
        self._live: dict[int, _Storage] = {}
        self._last: tuple[int, int] | None = None
        self._calibrating = False
        self._lifted: list[bool] = []

    def __enter__(self) -> Tracker:
        """Create tensors from Python values on the CPU and move them from there, as the fake tensor mode does."""
        super().__enter__()
        self._lifted.append(_C._only_lift_cpu_tensors())
        _C._set_only_lift_cpu_tensors(True)
        return self

    def __exit__(self, *error: Any) -> None:
        _C._set_only_lift_cpu_tensors(self._lifted.pop())
        super().__exit__(*error)  # pyright: ignore[reportUnknownMemberType]

    # Phases

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Record the events inside the context as this phase."""
        start, self.loss_at = len(self.events), -1
        yield
        loss_at = self.loss_at if name == "forward" else -1
        self.intervals.append(Interval(name, self.step, start, len(self.events), loss_at))

    def number_of(self, tensor: torch.Tensor) -> int | None:
        """Return the number of a tensor's storage; None if it is not on the device."""
        local: Any = getattr(tensor, "_local_tensor", tensor)  # a DTensor's shard on this rank
        reference = self._live.get(local.untyped_storage()._cdata)
        return None if reference is None or reference.number < 0 else reference.number

    # Storages

    def _new(self, asked: int, shape: tuple[int, ...], dtype: str, op: str) -> int:
        node = -1
        if _graph_task() != -1:
            running = _node()
            if running is not None:
                node = running._sequence_nr()
        number = len(self.made)
        self.made.append(StorageInfo(asked, shape, dtype, op, self.module, node))
        self.events.append(number)
        return number

    def _watch(self, storage: Any, asked: int, shape: tuple[int, ...], dtype: torch.dtype, op: str) -> None:
        reference = _Storage(storage, self._freed)
        reference.key = key = storage._cdata
        reference.number = self._new(asked, shape, str(dtype)[6:], op)
        self._live[key] = reference

    def _freed(self, reference: _Storage) -> None:
        if self._live.pop(reference.key, None) is not None and reference.number >= 0:
            self.events.append(~reference.number)

    @contextmanager
    def resizing(self) -> Generator[None]:
        """Record resized storages inside the context: FSDP empties storages and fills them again."""
        resize: Callable[..., Any] = torch.UntypedStorage.resize_

        def resize_(storage: Any, size: int) -> Any:
            before = storage.nbytes()
            out = resize(storage, size)
            reference = self._live.get(storage._cdata)
            if reference is not None and size != before:
                self._resized(reference, int(size))
            return out

        storage_class: Any = torch.UntypedStorage
        storage_class.resize_ = resize_
        try:
            yield
        finally:
            storage_class.resize_ = resize

    def _resized(self, reference: _Storage, size: int) -> None:
        """Record a resized storage as freed and, unless it is empty, as a new one."""
        if reference.number >= 0:
            reference.known = self.made[reference.number]
            self.events.append(~reference.number)
            reference.number = -1
        if size:
            made = reference.known
            reference.number = self._new(size, made.shape, made.dtype, made.op)

    def _inside(self, scratch: Sequence[tuple[str, int]]) -> None:
        """Record what a kernel allocates and frees while it runs."""
        numbers = [self._new(bytes_, (bytes_,), "uint8", what) for what, bytes_ in scratch if bytes_ > 0]
        self.events += [~number for number in reversed(numbers)]

    # Calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _C._only_lift_cpu_tensors():  # autograd's own thread, recomputing a checkpointed forward
            _C._set_only_lift_cpu_tensors(True)
        if any(getattr(kind, "__name__", "") in _WRAPPERS for kind in types):
            return NotImplemented  # they dispatch again with their inner tensors
        if func is _DEVICE and type(args[0]) is FakeTensor:
            return args[0].fake_device
        if _graph_task() != -1 and not torch.is_grad_enabled():
            if func is _aten.add.Tensor:
                if not kwargs and self._adds_in_place(args):
                    func = _aten.add_.Tensor
            elif func in _IN_PLACE and _called_by_the_engine():
                func = _IN_PLACE[func]
        tensors: list[Any] = []
        key: list[Any] = [func]
        kept = self._kept.get(func)
        if kept is None:
            kept = self._kept[func] = _is_cacheable(func) and func not in self._instead
        kept = kept and _key_of(args, key, tensors) and (not kwargs or _key_of_keywords(kwargs, key, tensors))
        if kept:
            if not tensors:  # without input tensors the output may have the current default dtype
                key.append(torch.get_default_dtype())
            call = tuple(key)
            answer = self._answers.get(call)
            if answer is None:
                return self._first(call, func, args, kwargs or {}, tensors)
            return self._again(answer, func, tensors)
        return self._ask(func, args, kwargs or {})

    def _ask(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the call on torch's fake tensors, and record its storages."""
        if func is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _no_value(args[0])
        if func in self._instead:
            with self:
                replaced = self._instead[func](*args, **kwargs)
            if replaced is not NotImplemented:
                return replaced
        with self._fake:
            out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self._record(tensor, func)
        scratch = self._scratch.get(func)
        if scratch is not None and self._here(args):
            self._inside(scratch(args, kwargs))
        return out

    def _here(self, args: Any, watched: bool = True) -> bool:
        """Return whether a call runs on the `watched` device, or else any device of its type.

        That is the device of its first tensors; calls without tensors count too.
        """
        first = next((tensor for arg in args for tensor in _tensors(arg)), None)
        return first is None or (self._watches(first.device) if watched else first.device.type == self.device)

    def _watches(self, device: torch.device) -> bool:
        return device.type == self.device and (self._card is None or (device.index or 0) == self._card)

    def _record(self, tensor: Any, func: Any) -> None:
        if not self._watches(tensor.device):
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._live:
            self._watch(storage, storage.nbytes(), tuple(tensor.shape), tensor.dtype, _name(func))

    def _first(self, call: tuple[Any, ...], func: Any, args: Any, kwargs: Any, tensors: list[Any]) -> Any:
        """Run a call for the first time, and cache it if its outputs can be recreated."""
        out: Any = self._ask(func, args, kwargs)
        sequence = _sequence(out)
        outputs: list[_Output | None] = []
        same = {id(tensor): i for i, tensor in enumerate(tensors)}
        input_storages = {tensor.untyped_storage()._cdata: i for i, tensor in enumerate(tensors)}
        for tensor in out if sequence is not None else (out,):
            if tensor is None:
                outputs.append(None)
                continue
            described = _describe(tensor, same, input_storages) if isinstance(tensor, FakeTensor) else None
            if described is None:
                self._kept[func] = self._kept[func] and isinstance(tensor, (FakeTensor, list))
                return out
            outputs.append(described)
        scratch = self._scratch.get(func)
        inside = tuple(scratch(args, kwargs)) if scratch is not None and self._here(args, watched=False) else ()
        self._answers[call] = _Answer(tuple(outputs), sequence, inside)
        return out

    def _again(self, answer: _Answer, func: Any, tensors: list[Any]) -> Any:
        """Answer a call from the cache: create its outputs and record their storages."""
        outputs: list[Any] = []
        for output in answer.outputs:
            if output is None:
                outputs.append(None)
                continue
            if output.kind == "same":
                outputs.append(tensors[output.which])
                continue
            if output.kind == "new":
                element = torch.empty_strided(output.shape, output.stride, dtype=output.dtype, device="meta")
                if self._watches(output.device):
                    self._watch(element.untyped_storage(), output.asked, output.shape, output.dtype, _name(func))
            else:
                element = torch.empty(0, dtype=output.dtype, device="meta")
                storage = tensors[output.which].untyped_storage()
                element.set_(storage, output.offset, output.shape, output.stride)
            tensor = _subclass(FakeTensor, element, False, dispatch_device=True, device_for_backend_keys=output.device)
            tensor.__dict__.update(output.state)
            outputs.append(tensor)
        if answer.scratch and self._here(tensors):
            self._inside(answer.scratch)
        return outputs[0] if answer.sequence is None else answer.sequence(outputs)

    # Sums of gradients

    def _adds_in_place(self, args: Any) -> bool:
        """Return whether torch's engine would add gradients in place if no dispatch mode were active.

        It does so if it holds the last reference to a dense gradient.
        Source: torch 2.13 csrc/autograd/input_buffer.cpp accumulate.
        """
        old, new = args[0], args[1]
        if not isinstance(new, torch.Tensor) or old.shape != new.shape or old.dtype != new.dtype:
            return False
        storage = old.untyped_storage()
        counts = (old._use_count(), _C._storage_Use_Count(storage._cdata))
        if self._calibrating:
            self._last = counts
            return False
        last = self._last
        assert last is not None, "calibrate first"
        return counts[0] <= last[0] and counts[1] <= last[1] and _is_dense(old) and _called_by_the_engine()

    def calibrate(self) -> None:
        """Measure the reference count at which the engine holds the last reference, by summing two gradients."""
        self._calibrating = True
        with self:
            x = torch.ones(4, 4, device=self.device, requires_grad=True)
            h = x * 1.0
            (h * 2.0 + h * 3.0).sum().backward()  # pyright: ignore[reportUnknownMemberType]
        self._calibrating = False
        assert self._last is not None
        del x, h
        self.made.clear()
        self.events.clear()
        self._live.clear()


# How a script answers for the value of a tensor without data; the last entry applies.
scalar_answers: list[Callable[[torch.Tensor], bool | int | float]] = []


def _no_value(tensor: torch.Tensor) -> bool | int | float:
    """Return a value for a tensor without data: false or zero, so nothing is found and nothing is infinite."""
    constant = getattr(tensor, "constant", None)
    if constant is not None:
        return constant.item()
    if scalar_answers:
        return scalar_answers[-1](tensor)
    if tensor.dtype == torch.bool:
        return False
    return 0.0 if tensor.is_floating_point() else 0


def _is_cacheable(func: Any) -> bool:
    tags = {str(tag) for tag in func.tags}
    bad = ("Tag.data_dependent_output", "Tag.dynamic_output_shape", "Tag.inplace_view")
    return func._schema.name.rpartition("::")[2] not in _NEVER_CACHED and not any(tag in tags for tag in bad)


def _key_of(values: Any, key: list[Any], tensors: list[Any]) -> bool:
    """Append what the answer depends on to `key`, and tensors to `tensors`. Return False if a value is unsupported."""
    for value in values:
        kind = cast(type[Any], type(value))
        if kind is FakeTensor or isinstance(value, FakeTensor):
            if value.constant is not None:
                return False
            tensors.append(value)
            key.append(value.shape)
            key.append(value.stride())
            key.append(value.storage_offset())
            key.append(value.dtype)
            key.append(value.fake_device)
        elif kind is int or kind is str or value is None:
            key.append(value)
        elif kind is float or kind is bool:
            key.append(kind)
            key.append(value)
        elif kind is list or kind is tuple:
            key.append(len(value))
            if not _key_of(value, key, tensors):
                return False
        elif isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat)):
            return False
        else:
            key.append(value)
    return True


def _key_of_keywords(kwargs: Any, key: list[Any], tensors: list[Any]) -> bool:
    for name, value in kwargs.items():
        key.append(name)
        if not _key_of((value,), key, tensors):
            return False
    return True


def _describe(tensor: Any, same: dict[int, int], input_storages: dict[int, int]) -> _Output | None:
    """Return how to recreate `tensor`; None if that is not simple.

    `same` and `input_storages` map identities and storages of the input tensors to their indices.
    """
    if tensor.constant is not None or tensor.dtype.is_complex or tensor.is_sparse:
        return None
    shape, stride = tuple(tensor.shape), tensor.stride()
    if any(type(n) is not int for n in (*shape, *stride)):
        return None
    storage = tensor.untyped_storage()
    offset = tensor.storage_offset()
    if id(tensor) in same:
        kind, index = "same", same[id(tensor)]
    elif storage._cdata in input_storages:
        kind, index = "view", input_storages[storage._cdata]
    elif offset:
        return None
    else:
        kind, index = "new", -1
        input_storages[storage._cdata] = _SHARED
    if index == _SHARED:
        return None  # two outputs in one new storage
    asked = storage.nbytes()
    state: dict[str, Any] = tensor.__dict__.copy()
    return _Output(kind, index, shape, stride, offset, tensor.dtype, tensor.fake_device, asked, state)


def _sequence(out: Any) -> Any:
    """Return list or tuple for several outputs; None for one."""
    return list if isinstance(out, list) else tuple if isinstance(out, tuple) else None


def _tensors(out: Any) -> Iterator[Any]:
    if isinstance(out, torch.Tensor):
        yield out
    elif isinstance(out, (list, tuple)):
        for inner in cast(Iterable[Any], out):
            yield from _tensors(inner)


def _name(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")


def _is_dense(tensor: torch.Tensor) -> bool:
    """Return whether the elements fill their storage without overlaps or gaps."""
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _called_by_the_engine() -> bool:
    """Return whether autograd's engine made this call, not a custom function, a hook or a recomputation."""
    frame: Any = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return frame is None or frame.f_code.co_name in ("_engine_run_backward", "_run_backward")
