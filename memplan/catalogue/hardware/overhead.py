"""What a process takes on a GPU beside torch's tensors: rows, each with its basis and source. None is derived."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from memplan.core.units import MIB


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
# a next run is counted beside the 86 there are (split conformal prediction). tests/estimate/test_band.py sets it and
# tests it.
COVERAGE = 0.94
SHOWN = Share(-34, 73, "measured", "86 runs on T4 and A100 in tests/golden/published.jsonl with a `process` figure")

# The same of several GPUs: 59 of 61, beside the next one.
SHOWN_OF_RANKS = Share(-134, 126, "measured", "61 runs on 2 and 4 A100 in tests/golden/ranks.jsonl, all under FSDP1")

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
    750,
    256 * MIB,
    "assumed",
    "half as much again as the most seen; tests/engine/test_allocator.py looks for a run beyond",
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


class Communicator(NamedTuple):
    """Ranks that send each other tensors: what they divide, how many they are, and whether some are in other nodes."""

    what: str
    ranks: int
    across: bool = False


# What a process on one of 2 GPUs showed: 0.55 GiB before, 2.0 after a barrier, 1.28 once the group was destroyed.
_BARRIER = "ml-engineering, training/performance: nvidia-smi before and after a barrier of 2 GPUs, and once it is over"
_KERNELS, _BUFFERS = 747 * MIB, 738 * MIB  # 1.28 - 0.55 and 2.0 - 1.28 GiB
_CONNECTION = 8 * 512 * 8 * 16 + 120 * 640 * 8 * 8 + 4 * MIB  # bytes of LL, LL128 and Simple
_INIT = "NVIDIA/nccl src/init.cc, src/include/device.h, src/transport/p2p.cc, net.cc"
MEASURED = 4  # ranks of a communicator, at most, whose process was measured


def nccl(communicators: Sequence[Communicator]) -> tuple[Overhead, ...]:
    """What NCCL takes: its kernels, once in a process, and the buffers of every communicator; nothing without any.

    A communicator of 2 GPUs was measured, and processes of 2 and 4 A100 that have one lie in the band their runs set.
    Others are taken for as much, however many ranks they have: a rank of a ring has one neighbour that sends, of a tree
    two instead of one in its middle, for each channel. So at most half as much again inside a node, and twice between
    nodes, where both ends of a connection have buffers. The least of a further one is a ring of two channels.
    """
    if not communicators:
        return ()
    kernels = f"{_BARRIER}; the low end is what 23 runs on 2 and 4 A100 leave for them (fms-acceleration)"
    rows = [Overhead("NCCL's kernels", 112 * MIB, _KERNELS, _KERNELS, "measured", kernels)]
    for i, one in enumerate(communicators):
        what = f"NCCL's buffers, {one.what} communicator of {one.ranks:,}"
        if i == 0 and one.ranks <= MEASURED:
            rows.append(Overhead(what, _BUFFERS, _BUFFERS, _BUFFERS, "measured", _BARRIER))
            continue
        low = _BUFFERS if i == 0 else 2 * _CONNECTION
        high = _BUFFERS * 2 if one.across else _BUFFERS * 3 // 2
        source = f"as measured for 2 GPUs ({_BARRIER}); the range by connections: {_INIT}"
        rows.append(Overhead(what, low, _BUFFERS, high, "assumed", source))
    return tuple(rows)
