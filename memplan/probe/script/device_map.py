"""Place a model's modules on several GPUs of one process, or on the host, as transformers and accelerate do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memplan.catalogue.hardware.gpus import find_gpu
from memplan.catalogue.hardware.overhead import cuda_context
from memplan.probe.fake import fake_process_group as group
from memplan.probe.libraries import library
from memplan.spec.run import RunSpec

_UNLIMITED = 2**50  # bytes of a device whose memory is unknown


def is_dispatched(run: RunSpec) -> bool:
    """Return whether the run's modules are placed by a device_map."""
    return run.task != "train" and (run.parallelism.pp > 1 or run.parallelism.device_map is not None)


def map_of(model: Any, run: RunSpec) -> dict[str, Any]:
    """Return where transformers places the modules of a model on the meta device: an index among the GPUs used, or cpu.

    Source: transformers 5.24 integrations/accelerate.py _get_device_map.
    """
    gpu = find_gpu(run.gpu) if run.gpu is not None else None
    free = max(0, gpu.usable - cuda_context(gpu.compute_capability).usual) if gpu is not None else _UNLIMITED
    integration: Any = library("transformers.integrations.accelerate")
    gpus = run.parallelism.world
    if gpus == 1 and run.parallelism.device_map != "sequential":
        free = free * 9 // 10  # transformers' default without max_memory
    max_memory: dict[Any, int] = {**dict.fromkeys(range(gpus), free), "cpu": _UNLIMITED}
    device_map: dict[str, Any] = integration._get_device_map(
        model, run.parallelism.device_map or "auto", max_memory, None
    )
    used = sorted({card for card in device_map.values() if isinstance(card, int)})
    return {path: used.index(card) if isinstance(card, int) else card for path, card in device_map.items()}


def device_lookup(places: dict[str, Any], device: torch.device) -> Callable[[str], torch.device]:
    """Return a function from the name of a parameter or buffer to its device."""

    def device_of(name: str) -> torch.device:
        path = name
        while path and path not in places:
            path = path.rpartition(".")[0]
        card = places[path]
        return torch.device("cpu") if card in ("cpu", "disk") else torch.device(device.type, int(card))

    return device_of


def dispatch(model: Any, places: dict[str, Any], device: torch.device) -> None:
    """Add accelerate's hooks, which copy each module's inputs, and weights kept on the host, to its GPU.

    Source: transformers 5.24 integrations/accelerate.py accelerate_dispatch.
    """
    group.apply()
    for module in ("accelerate.hooks", "accelerate.utils.modeling"):
        library(module).set_module_tensor_to_device = _move
    device_map = {name: card if card in ("cpu", "disk") else f"{device.type}:{card}" for name, card in places.items()}
    if len(set(device_map.values())) == 1:
        return
    library("accelerate").dispatch_model(
        model, device_map=device_map, main_device=f"{device.type}:0", skip_keys=model._skip_keys_device_placement
    )


def _move(module: Any, name: str, device: Any, value: Any = None, **_: Any) -> None:
    """Move a parameter or buffer to another device or to meta; accelerate's own function fails on fake tensors.

    Source: accelerate 1.15 utils/modeling.py set_module_tensor_to_device.
    """
    *path, last = name.split(".")
    for part in path:
        module = getattr(module, part)
    tensors = module._parameters if last in module._parameters else module._buffers
    old = tensors[last]
    if value is None and str(old.device) == str(device):
        return
    new = (old if value is None else value).to(device)
    tensors[last] = torch.nn.Parameter(new, old.requires_grad) if tensors is module._parameters else new
