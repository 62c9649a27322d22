"""The optimizers that a probe runs, created as transformers' Trainer creates them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from memplan.probe.libraries import library
from memplan.probe.refusals import BITSANDBYTES
from memplan.spec.training import Optimizer

_LR = 1e-4


def make_optimizer(wanted: Optimizer, parameters: Iterable[nn.Parameter]) -> Any:
    """Return an optimizer with one group of `parameters` and no weight decay; None for `none`.

    The names are those of `probe.refusals`.
    """
    params = list(parameters)
    name = wanted.name
    if name == "none":
        return None
    if name in BITSANDBYTES:
        kind, bits, paged = BITSANDBYTES[name]
        options = {"is_paged": True} if paged else {}  # not every class accepts it
        return getattr(library("bitsandbytes.optim"), kind)(params, lr=_LR, optim_bits=bits, **options)
    if name == "adafactor":
        adafactor = library("transformers.optimization").Adafactor
        return adafactor(params, lr=_LR, scale_parameter=False, relative_step=False)
    foreach = wanted.foreach is not False
    momentum = wanted.momentum or 0.0
    match name:
        case "adamw_torch":
            return torch.optim.AdamW(params, lr=_LR, weight_decay=0.0, foreach=foreach)
        case "adamw_torch_fused":
            return torch.optim.AdamW(params, lr=_LR, weight_decay=0.0, fused=True)
        case "sgd":
            return torch.optim.SGD(params, lr=_LR, momentum=momentum, foreach=foreach)
        case "rmsprop":
            return torch.optim.RMSprop(params, lr=_LR, momentum=momentum, foreach=foreach)
        case "adagrad":
            return _with_states_on_device(torch.optim.Adagrad(params, lr=_LR, foreach=foreach))
        case other:
            raise AssertionError(other)


class HostOptimizer:
    """An optimizer with its states and step on the host, like torchao's CPUOffloadOptimizer."""

    def __init__(self, wanted: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        self.pairs = [(p, nn.Parameter(p.detach().to("cpu", copy=True))) for p in parameters]
        self.inner = make_optimizer(wanted, [host for _, host in self.pairs])
        self.state = self.inner.state

    @torch.no_grad()
    def step(self) -> None:
        for parameter, host in self.pairs:
            host.grad = None if parameter.grad is None else parameter.grad.to("cpu", copy=True)
        self.inner.step()
        for parameter, host in self.pairs:
            parameter.copy_(host)


def _with_states_on_device(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Move the states to their parameters' devices, as accelerate 1.15 does before the first step."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                state[key] = value.to(parameter.device)
    return optimizer


def keep_embedding_states_in_32_bits(model: nn.Module, wanted: Optimizer) -> None:
    """Have bitsandbytes keep the states of embeddings in 32 bits, as the Trainer does."""
    if wanted.name in BITSANDBYTES and BITSANDBYTES[wanted.name][1] == 8:
        manager = library("bitsandbytes.optim").GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
