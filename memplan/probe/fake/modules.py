"""Attribute storages to modules: the one whose forward runs, or in backward the one whose gradient is computed."""

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
    """Return a module's or parameter's path without FSDP1's wrappers."""
    return name.replace("_fsdp_wrapped_module.", "").removesuffix("._fsdp_wrapped_module")


@contextmanager
def module_names(tracker: Tracker, model: Any) -> Generator[None]:
    """Report to the tracker, inside the context, each module's forward pass and each recomputed checkpointed block."""
    for name, module in model.named_modules():
        vars(module)[_NAME] = plain(name)
    module_class: Any = nn.Module
    checkpoint: Any = library("torch.utils.checkpoint")
    original_call, recomputation = module_class.__call__, checkpoint._recomputation_hook
    sequence_number = _C._autograd._get_sequence_nr
    graph_task_id = _C._current_graph_task_id

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = self.__dict__.get(_NAME)
        if name is None:
            return original_call(self, *args, **kwargs)
        outer, tracker.module = tracker.module, name
        forward = graph_task_id() == -1
        if forward:
            tracker.modules.append((sequence_number(), name))
        try:
            return original_call(self, *args, **kwargs)
        finally:
            tracker.module = outer
            if forward:
                tracker.modules.append((sequence_number(), outer))

    class Recomputation:
        """torch's recomputation hooks, which also record the events between which a block is recomputed."""

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
        module_class.__call__, checkpoint._recomputation_hook = original_call, recomputation


def mark_loss_start(tracker: Tracker, base: Any) -> None:
    """Have the model's loss function report to the tracker where the loss begins.

    Models that compute their loss otherwise have no separate phase `loss`.
    """
    function: Any = getattr(base, "loss_function", None)
    if function is None:
        return

    def loss_function(*args: Any, **kwargs: Any) -> Any:
        tracker.loss_at = len(tracker.events)
        return function(*args, **kwargs)

    kind: Any = type(base)  # pyright: ignore[reportUnknownVariableType]
    attribute = getattr(kind, "loss_function", None)
    if isinstance(attribute, property) and attribute.fset is None:  # transformers 4.46 to 4.48
        namespace = {"__module__": kind.__module__, "loss_function": property(lambda _: loss_function)}  # pyright: ignore[reportUnknownLambdaType]
        base.__class__ = type(kind.__name__, (kind,), namespace)
    else:
        base.loss_function = loss_function
