"""Which module a storage is for: the one whose forward runs, and in backward the one whose gradient is computed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn

from memplan.probe.fake.tracker import Tracker
from memplan.probe.libraries import library

_C: Any = library("torch._C")
_NAME = "_name_in_the_trace"


def plain(name: str) -> str:
    """A module's or parameter's path without the wrappers that FSDP1 puts around units."""
    return name.replace("_fsdp_wrapped_module.", "").removesuffix("._fsdp_wrapped_module")


@contextmanager
def named(tracker: Tracker, model: Any) -> Generator[None]:
    """While inside, every module's forward pass says so to the tracker, and checkpointed blocks that they run again."""
    for name, module in model.named_modules():
        vars(module)[_NAME] = plain(name)
    module_class: Any = nn.Module
    checkpoint: Any = library("torch.utils.checkpoint")
    called, recomputation = module_class.__call__, checkpoint._recomputation_hook
    sequence_number = _C._autograd._get_sequence_nr
    running = _C._current_graph_task_id

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = self.__dict__.get(_NAME)
        if name is None:
            return called(self, *args, **kwargs)
        outer, tracker.module = tracker.module, name
        forward = running() == -1
        if forward:
            tracker.modules.append((sequence_number(), name))
        try:
            return called(self, *args, **kwargs)
        finally:
            tracker.module = outer
            if forward:
                tracker.modules.append((sequence_number(), outer))

    class Recomputation:
        """torch's hooks of a block that runs again, which note where that begins and ends."""

        def __init__(self, *args: Any) -> None:
            self.hooks = recomputation(*args)

        def __enter__(self) -> Any:
            self.began = len(tracker.events)
            return self.hooks.__enter__()

        def __exit__(self, *args: Any) -> Any:
            out = self.hooks.__exit__(*args)
            tracker.recomputed.append((self.began, len(tracker.events)))
            return out

    module_class.__call__, checkpoint._recomputation_hook = call, Recomputation
    try:
        yield
    finally:
        module_class.__call__, checkpoint._recomputation_hook = called, recomputation


def loss_apart(tracker: Tracker, base: Any) -> None:
    """Have the model's loss function tell the tracker where a forward pass ends and the loss begins.

    Models that compute their loss otherwise have no loss apart.
    """
    function: Any = getattr(base, "loss_function", None)
    if function is None:
        return

    def loss_function(*args: Any, **kwargs: Any) -> Any:
        tracker.loss_at = len(tracker.events)
        return function(*args, **kwargs)

    kind: Any = type(base)  # pyright: ignore[reportUnknownVariableType]
    named = getattr(kind, "loss_function", None)
    if isinstance(named, property) and named.fset is None:  # transformers 4.46 to 4.48
        apart = {"__module__": kind.__module__, "loss_function": property(lambda _: loss_function)}  # pyright: ignore[reportUnknownLambdaType]
        base.__class__ = type(kind.__name__, (kind,), apart)
    else:
        base.loss_function = loss_function
