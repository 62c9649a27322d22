"""Which modules of a model transformers' device_map deals to which GPU, by their bytes, in the model's order.

Source: transformers 5.24 integrations/accelerate.py get_balanced_memory, infer_auto_device_map;
quantizers/quantizer_bnb_4bit.py adjust_max_memory.
"""

from __future__ import annotations

from collections.abc import Sequence

HOST = -1  # instead of a GPU's number


def shares(
    modules: Sequence[int], layers: slice, leaf: int, gpus: int, policy: str, free: int | None, quantised: bool
) -> list[int | None]:
    """How many bytes of modules each GPU may be given, None for any number. `layers`: those of the `modules` that are
    layers; `leaf`: the largest module without modules; `free`: what a GPU has free, None where nothing is known of it.

    Raises nothing. A model on one GPU is given nine tenths of what that has, unless it is dealt in sequence.
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


def place(modules: Sequence[int], room: Sequence[int | None], offloads: bool) -> list[int]:
    """Place modules of so many bytes one after another, until a GPU has its share. The first GPU leaves room for the
    largest module to come. What no GPU takes is on the host, or on the last GPU unless that `offloads`."""
    on: list[int] = []
    gpu = used = 0
    for i, size in enumerate(modules):
        while gpu < len(room):
            most = room[gpu]
            if most is None or used + size <= most - (max(modules[i + 1 :], default=0) if gpu == 0 else 0):
                break
            gpu, used = gpu + 1, 0
        if gpu < len(room):
            used += size
        on.append(gpu if gpu < len(room) else HOST if offloads else len(room) - 1)
    return on
