"""GPU memory of a process in addition to torch's tensors: rows, each with basis and source. None is derived."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from memplan.core.records import NamedTuple
from memplan.core.units import MIB


class Overhead(NamedTuple):
    """A range of bytes.

    what    what takes them
    low     lower end
    usual   the usual value, which is counted
    high    upper end
    basis   `measured` or `assumed`
    source  where the figures come from
    """

    what: str
    low: int
    usual: int
    high: int
    basis: str
    source: str


# cuBLAS takes one workspace per handle from torch's allocator; the forward and backward threads each have a handle.
_CUBLAS = "torch 2.13 aten/src/ATen/cuda/CublasHandlePool.cpp; two handles of 8,519,680 bytes seen on an A100"
_WORKSPACE, _WORKSPACE_HOPPER = 8_519_680, 32 * MIB


@cache
@cache
def cublas_workspace(capability: tuple[int, int] | None) -> Overhead:
    """One handle's workspace. Hopper and later data-centre GPUs take 32 MiB (read in the source, not measured)."""
    if capability and capability[0] in (9, 10):
        return Overhead("cuBLAS workspace", *(_WORKSPACE_HOPPER,) * 3, basis="assumed", source=_CUBLAS)
    return Overhead("cuBLAS workspace", *(_WORKSPACE,) * 3, basis="measured", source=_CUBLAS)


class Share(NamedTuple):
    """A range around a figure, in thousandths of the figure."""

    low: int
    high: int
    basis: str
    source: str


# What torch.compile keeps for backward, minus what eager autograd keeps: its partitioner recomputes cheap operations
# and keeps logits in half precision instead of log-probabilities in fp32.
COMPILED = Share(-500, 0, "measured", "9 partitions by AOTAutograd of torch 2.13, tests/golden/traced_compiled.jsonl")

# Measured minus predicted memory of published runs: the shortest range that a next run falls into with probability
# COVERAGE, by split conformal prediction from 86 runs. tests/estimate/test_band.py sets and tests it.
COVERAGE = 0.94
PREDICTION_BAND = Share(
    -34, 73, "measured", "86 runs on T4 and A100 in tests/golden/published.jsonl with a `process` figure"
)

# Likewise for several GPUs: 59 of 61 runs lie in it.
PREDICTION_BAND_OF_RANKS = Share(
    -152, 126, "measured", "61 runs on 2 and 4 A100 in tests/golden/ranks.jsonl, all under FSDP1"
)

# Cross-entropy kernels that write the gradient over the logits (kernels.fused): 14 published LoRA and QLoRA runs on an
# A100 with memory to spare (fms-acceleration; Llama 3 8B, Mistral 7B, Santacoder) hold 0.7 to 2.0 more copies of the
# overwritten tensor than any replay, median 1.2; three Granite runs, whose logits are scaled first, hold none. One copy
# is counted. The tensor responsible was not found.
EXTRA_LOSS_COPIES = 1


class Margin(NamedTuple):
    """A margin that turns a figure into a bound.

    share   thousandths of a part of the figure
    bytes   a constant
    basis   `measured` or `assumed`
    source  where the figures come from
    """

    share: int
    bytes: int
    basis: str
    source: str


# A run survives on a full card with the tensors at its peak plus this margin: a share of the tensors that come and go,
# and a constant. torch releases fully free segments before it fails. Of 1,038 runs (tests/golden/*.jsonl) replayed at
# shrinking capacities, the most demanding needed a half and 128 MiB.
SURVIVAL_MARGIN = Margin(
    750,
    256 * MIB,
    "assumed",
    "1.5 times the most seen; tests/engine/test_allocator.py searches for a run that needs more",
)


@cache
def cuda_context(capability: tuple[int, int] | None) -> Overhead:
    """Bytes the driver holds for a process before torch's first tensor, and kernels loaded later."""
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
                "A100: 455 to 525 MiB more than a replay reserves in 11 runs (fms-acceleration, torch 2.4); 0.47 GiB "
                "with kernels loaded on demand, 0.9 GiB with all (ml-engineering, torch 2.1, 1.13); NVML shows 1,403 "
                "to 1,428 MiB more than reserved in 43 runs (optimum-benchmark, torch 2.1); the usual value is between"
            )
            return Overhead(name, 455 * MIB, 750 * MIB, 1428 * MIB, "measured", source)
        case _:
            source = "no published reading for this architecture: the range seen on T4 and A100, and a value in between"
            return Overhead(name, 141 * MIB, 500 * MIB, 1428 * MIB, "assumed", source)


class Communicator(NamedTuple):
    """A group of ranks that communicate.

    what         the kind of parallelism, or `world`
    ranks        number of ranks
    spans_nodes  whether the group spans nodes
    """

    what: str
    ranks: int
    spans_nodes: bool = False


# A process on one of 2 GPUs: 0.55 GiB before, 2.0 after a barrier, 1.28 once the group was destroyed.
_BARRIER = "ml-engineering, training/performance: nvidia-smi before and after a barrier of 2 GPUs, and once it is over"
_KERNELS, _BUFFERS = 747 * MIB, 738 * MIB  # 1.28 - 0.55 and 2.0 - 1.28 GiB
_CONNECTION = 8 * 512 * 8 * 16 + 120 * 640 * 8 * 8 + 4 * MIB  # bytes of LL, LL128 and Simple
_INIT = "NVIDIA/nccl src/init.cc, src/include/device.h, src/transport/p2p.cc, net.cc"
MEASURED = 4  # largest communicator, in ranks, with a measured process


def nccl(communicators: Sequence[Communicator]) -> tuple[Overhead, ...]:
    """Return NCCL's memory: its kernels once per process, and the buffers of every communicator; empty without any.

    A communicator of 2 GPUs was measured, and processes with one on 2 and 4 A100 lie in the band that their runs set.
    Other communicators are assumed to take as much, whatever their number of ranks: per channel, a rank has one sending
    neighbour in a ring, and in the middle of a tree two. So at most 1.5 times as much within a node, and twice as much
    between nodes, where both ends of a connection have buffers. Any further one takes at least a ring of two channels.
    """
    if not communicators:
        return ()
    kernels = f"{_BARRIER}; the low end is what 23 runs on 2 and 4 A100 leave for them (fms-acceleration)"
    rows = [Overhead("NCCL's kernels", 112 * MIB, _KERNELS, _KERNELS, "measured", kernels)]
    for i, communicator in enumerate(communicators):
        what = f"NCCL's buffers, {communicator.what} communicator of {communicator.ranks:,}"
        if i == 0 and communicator.ranks <= MEASURED:
            rows.append(Overhead(what, _BUFFERS, _BUFFERS, _BUFFERS, "measured", _BARRIER))
            continue
        low = _BUFFERS if i == 0 else 2 * _CONNECTION
        high = _BUFFERS * 2 if communicator.spans_nodes else _BUFFERS * 3 // 2
        source = f"as measured for 2 GPUs ({_BARRIER}); the range by number of connections: {_INIT}"
        rows.append(Overhead(what, low, _BUFFERS, high, "assumed", source))
    return tuple(rows)
