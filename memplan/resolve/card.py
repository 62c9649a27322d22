"""The facts about a GPU that a run is resolved by. Cards with equal facts share what is resolved for them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import ambiguous_with, find_gpu
from memplan.core.records import NamedTuple


class GPUFacts(NamedTuple):
    """The facts of a card by which a run is resolved.

    compute_capability  as of `GPU`
    notes               notes on the card, and on the name it was requested by
    bf16_notes          notes on a run that computes in bf16
    usable              usable bytes, for a run on several GPUs: how they shard it may depend on that
    """

    compute_capability: tuple[int, int] | None
    notes: tuple[str, ...]
    bf16_notes: tuple[str, ...]
    usable: int | None

    def dtype_notes(self, compute: str) -> tuple[str, ...]:
        """Return notes on a run that computes in this dtype."""
        return self.bf16_notes if compute == "bf16" else ()


@lru_cache(maxsize=4096)
def find_card(typed: str, on_several: bool) -> tuple[GPU, GPUFacts]:
    """Return the GPU that `typed` names, and its facts for a run on one such card or `on_several`.

    Raises UnknownNameError.
    """
    gpu = find_gpu(typed)
    usable = gpu.usable if on_several else None
    return gpu, GPUFacts(gpu.compute_capability, tuple(_notes(gpu, typed)), tuple(_bf16_notes(gpu)), usable)


def _bf16_notes(gpu: GPU) -> Iterator[str]:
    if "bf16" not in gpu.native_dtypes:
        yield f"bf16 is not native to {gpu.title}: slow or refused there; fp16 takes the same memory"


_MOST_NAMED = 8  # cards that a note lists


def _notes(gpu: GPU, typed: str) -> Iterator[str]:
    others = () if typed == gpu.name else ambiguous_with(typed)
    if others:
        named = [o.name for o in others[:_MOST_NAMED]]
        more = f" or {len(others) - _MOST_NAMED} others" if len(others) > _MOST_NAMED else ""
        yield f"{typed!r} is taken to mean {gpu.title}; it could also be {', '.join(named)}{more}"
    if gpu.driver_basis == "rule":
        yield f"{gpu.title}'s usable memory is a conservative estimate: no driver reading was found"
    if gpu.vendor != "NVIDIA":
        yield f"kernels are assumed to be those of NVIDIA compute capability 8.0; not measured on {gpu.vendor}"
