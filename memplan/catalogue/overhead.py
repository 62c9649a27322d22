"""What a process takes on a GPU beside torch's tensors: rows, each with its basis and source. None is derived."""

from __future__ import annotations

from typing import NamedTuple

from memplan.units import MIB


class Overhead(NamedTuple):
    """Bytes as low, usual and high; `basis` is measured or assumed."""

    what: str
    low: int
    usual: int
    high: int
    basis: str
    source: str


# cuBLAS takes a workspace per handle from torch's allocator; forward and backward threads have a handle each.
_CUBLAS = "torch 2.13 aten/src/ATen/cuda/CublasHandlePool.cpp; two handles of 8,519,680 bytes seen on an A100"
_WORKSPACE, _WORKSPACE_HOPPER = 8_519_680, 32 * MIB


def cublas_workspace(capability: tuple[int, int] | None) -> Overhead:
    """One handle's workspace. Hopper and later data-centre parts take 32 MiB (read in the source, not measured)."""
    if capability and capability[0] in (9, 10):
        return Overhead("cuBLAS workspace", *(_WORKSPACE_HOPPER,) * 3, basis="assumed", source=_CUBLAS)
    return Overhead("cuBLAS workspace", *(_WORKSPACE,) * 3, basis="measured", source=_CUBLAS)


class Share(NamedTuple):
    """A range around a figure, in thousandths of it."""

    low: int
    high: int
    basis: str
    source: str


# What published runs showed, beyond what memplan says they use: the shortest range with 94 of 100 of them in it, where
# a next run is counted beside the 86 there are (split conformal prediction). tests/test_band.py sets it and tests it.
COVERAGE = 0.94
SHOWN = Share(-34, 73, "measured", "86 runs on T4 and A100 in tests/golden/published.jsonl with a `process` figure")

# The same of several GPUs, where torch has pools for each stream that collectives run on; all 23, beside the next one.
SHOWN_OF_RANKS = Share(-98, 141, "measured", "23 runs on 2 and 4 A100 in tests/golden/ranks.jsonl, all under FSDP1")

# Cross-entropy kernels that write the gradient over the logits (kernels.fused): 14 published LoRA and QLoRA runs on an
# A100 with room (fms-acceleration; Llama 3 8B, Mistral 7B, Santacoder) hold 0.7 to 2.0 more copies of what the kernel
# writes over than any replay, the median 1.2; three of Granite's, whose logits are scaled first, hold none. One copy is
# counted. The tensor that needs it was not found.
COPIES_AGAIN = 1


class Spare(NamedTuple):
    """What is added to a figure so that it is a bound: a share in thousandths of a part of it, and bytes."""

    share: int
    bytes: int
    basis: str
    source: str


# On a full card, where torch gives back what is wholly free before it fails, a run lives in the tensors at its peak and
# this: a share of what comes and goes of them, and bytes. Of 1,038 runs (tests/golden/*.jsonl), replayed at smaller and
# smaller capacities, the last to die needed a half and 128 MiB.
LIVING = Spare(
    750, 256 * MIB, "assumed", "half as much again as the most seen; tests/test_allocator.py looks for a run beyond"
)


def cuda_context(capability: tuple[int, int] | None) -> Overhead:
    """What the driver holds for a process before torch's first tensor, and the kernels loaded since."""
    name = "CUDA context and loaded kernels"
    match capability:
        case (7, 5):
            source = (
                "T4, torch 2.10+cu128: 140.9 MiB by mem_get_info in 43 published runs (fitcheck); "
                "the high end, for kernels loaded later, is assumed"
            )
            return Overhead(name, 141 * MIB, 141 * MIB, 300 * MIB, "measured", source)
        case (7, 0):
            source = "V100: 1.3 GiB published, with all kernels loaded at once; the rest of the range is assumed"
            return Overhead(name, 450 * MIB, 900 * MIB, 1331 * MIB, "assumed", source)
        case (8, 0):
            source = (
                "A100: 455 to 525 MiB beyond what a replay reserves in 11 runs (fms-acceleration, torch 2.4); 0.47 GiB "
                "with kernels loaded when needed, 0.9 GiB with all (ml-engineering, torch 2.1, 1.13); NVML beyond "
                "reserved 1,403 to 1,428 MiB in 43 runs (optimum-benchmark, torch 2.1); the usual is between"
            )
            return Overhead(name, 455 * MIB, 750 * MIB, 1428 * MIB, "measured", source)
        case _:
            source = "no published reading for this architecture: the range seen on T4 and A100, and a value between"
            return Overhead(name, 141 * MIB, 500 * MIB, 1428 * MIB, "assumed", source)


def nccl(world: int) -> Overhead:
    """What NCCL takes for its communicators and their buffers where there are several ranks."""
    name = "NCCL's buffers"
    if world == 1:
        return Overhead(name, 0, 0, 0, "derived", "one GPU needs none")
    source = (
        "1.45 GiB beyond the CUDA context after a barrier of 2 GPUs (ml-engineering, training/performance); the low "
        "end is the least that 23 runs on 2 and 4 A100 show beyond segments and context (fms-acceleration); how it "
        "grows with more ranks was not measured"
    )
    return Overhead(name, 850 * MIB, 1485 * MIB, 1485 * MIB, "measured", source)
