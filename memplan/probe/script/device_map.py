"""A model whose modules lie on several GPUs of one process, or on the host, as transformers and accelerate put them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memplan.catalogue.hardware.gpus import find_gpu
from memplan.catalogue.hardware.overhead import cuda_context
from memplan.probe.fake import fake_process_group as group
from memplan.probe.libraries import library
from memplan.spec.run import RunSpec

_ROOM = 2**50  # bytes of what nothing is known of


def is_dispatched(run: RunSpec) -> bool:
    """Whether a run's modules are placed by a device_map."""
    return run.task != "train" and (run.parallelism.pp > 1 or run.parallelism.device_map is not None)


def map_of(model: Any, run: RunSpec) -> dict[str, Any]:
    """Where transformers places the modules of a model without memory: the number of a GPU among those it uses, or cpu.

    Source: transformers 5.24 integrations/accelerate.py _get_device_map.
    """
    gpu = find_gpu(run.gpu) if run.gpu is not None else None
    free = max(0, gpu.usable - cuda_context(gpu.compute_capability).usual) if gpu is not None else _ROOM
    place: Any = library("transformers.integrations.accelerate")
    cards = run.parallelism.world
    if cards == 1 and run.parallelism.device_map != "sequential":
        free = free * 9 // 10  # as where no memory is named
    room: dict[Any, int] = {**dict.fromkeys(range(cards), free), "cpu": _ROOM}
    found: dict[str, Any] = place._get_device_map(model, run.parallelism.device_map or "auto", room, None)
    used = sorted({card for card in found.values() if isinstance(card, int)})
    return {path: used.index(card) if isinstance(card, int) else card for path, card in found.items()}


def homes(places: dict[str, Any], device: torch.device) -> Callable[[str], torch.device]:
    """The device of a parameter or buffer by its name."""

    def home(name: str) -> torch.device:
        path = name
        while path and path not in places:
            path = path.rpartition(".")[0]
        card = places[path]
        return torch.device("cpu") if card in ("cpu", "disk") else torch.device(device.type, int(card))

    return home


def dispatch(model: Any, places: dict[str, Any], device: torch.device) -> None:
    """Give every module its hooks, which copy what it is given to its GPU, and its weights where those are on the host.

    Source: transformers 5.24 integrations/accelerate.py accelerate_dispatch.
    """
    group.apply()
    for module in ("accelerate.hooks", "accelerate.utils.modeling"):
        library(module).set_module_tensor_to_device = _move
    on = {name: card if card in ("cpu", "disk") else f"{device.type}:{card}" for name, card in places.items()}
    if len(set(on.values())) == 1:
        return
    library("accelerate").dispatch_model(
        model, device_map=on, main_device=f"{device.type}:0", skip_keys=model._skip_keys_device_placement
    )


def _move(module: Any, name: str, device: Any, value: Any = None, **_: Any) -> None:
    """A module's parameter or buffer on another device, or without memory: of a tensor without data accelerate cannot
    make a parameter of the same class.

    Source: accelerate 1.15 utils/modeling.py set_module_tensor_to_device.
    """
    *path, last = name.split(".")
    for part in path:
        module = getattr(module, part)
    of = module._parameters if last in module._parameters else module._buffers
    old = of[last]
    if value is None and str(old.device) == str(device):
        return
    new = (old if value is None else value).to(device)
    of[last] = torch.nn.Parameter(new, old.requires_grad) if of is module._parameters else new
