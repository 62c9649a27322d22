"""Which GPU transformers' device_map places each module on: by bytes, in the model's order.

Source: transformers 5.24 integrations/accelerate.py get_balanced_memory, infer_auto_device_map;
quantizers/quantizer_bnb_4bit.py adjust_max_memory.
"""

from __future__ import annotations

from collections.abc import Sequence

HOST = -1  # instead of a GPU's number


def gpu_shares(
    modules: Sequence[int], layers: slice, leaf: int, gpus: int, policy: str, free: int | None, quantised: bool
) -> list[int | None]:
    """Return how many bytes of modules each GPU may take; None means no limit.

    modules    bytes of each module
    layers     which of the modules are layers
    leaf       bytes of the largest module without submodules
    gpus       number of GPUs
    policy     `balanced`, `balanced_low_0` or `sequential`
    free       free bytes of a GPU, if known
    quantised  whether bitsandbytes quantises the model, which leaves a tenth of each GPU free

    A single GPU gets nine tenths of its free bytes, unless the policy is `sequential`.
    """
    room: list[int | None] = [free] * gpus
    if policy != "sequential":
        low_zero = policy == "balanced_low_0" and gpus > 1
        if gpus == 1 and free is not None:
            room = [free * 9 // 10]
        total = sum(modules)
        share = total // (gpus - 1 if low_zero else gpus) + int(1.25 * max(*modules[layers], leaf))
        for i in range(gpus - 1):
            if not (low_zero and i == 0):
                room[i] = share if free is None else min(share, free)
        if low_zero:
            rest = [n for n in room[1:] if n is not None]
            least = max(0, total - sum(rest)) if len(rest) == gpus - 1 else 0
            room[0] = least if free is None else min(least, free)
    return [None if n is None else n * 9 // 10 for n in room] if quantised else room


def place_modules(modules: Sequence[int], room: Sequence[int | None], offloads: bool) -> list[int]:
    """Return each module's GPU, filling the GPUs in order up to their shares.

    modules   bytes of each module
    room      bytes each GPU may take, from `shares`
    offloads  modules that fit no GPU go to the host (`HOST`); otherwise to the last GPU

    The first GPU leaves room for the largest module still to come.
    """
    placement: list[int] = []
    gpu = used = 0
    for i, size in enumerate(modules):
        while gpu < len(room):
            most = room[gpu]
            if most is None or used + size <= most - (max(modules[i + 1 :], default=0) if gpu == 0 else 0):
                break
            gpu, used = gpu + 1, 0
        if gpu < len(room):
            used += size
        placement.append(gpu if gpu < len(room) else HOST if offloads else len(room) - 1)
    return placement
