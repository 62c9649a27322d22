"""How libraries shard a run among ranks: rows, each with its source.

Instead of the literature's formula (16 bytes per parameter, divided by the number of ranks), the rows say which tensors
are divided, how they are padded, and which buffers come in addition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import prod

from memplan.catalogue.optimizers.parameter_rules import Parameter
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE, MIB, rounded


class Strategy(NamedTuple):
    """The states that a strategy divides among the ranks, and how.

    name        value of `parallelism.strategy`
    parameters  whether a rank holds only its part of the parameters
    gradients   whether a rank holds only its part of the gradients
    states      whether a rank holds only its part of the optimizer's states
    flat        a unit's weights are concatenated and divided together; otherwise each weight by its first axis
    gathers     FSDP's hooks gather the units
    source      where the facts come from
    """

    name: str
    parameters: bool
    gradients: bool
    states: bool
    flat: bool
    gathers: bool
    source: str


MEGATRON = "megatron_dist_opt"

STRATEGIES = {
    row.name: row
    for row in (
        Strategy("ddp", False, False, False, False, False, "torch 2.13 csrc/distributed/c10d/reducer.cpp"),
        Strategy("fsdp", True, True, True, True, True, "torch 2.13 distributed/fsdp/_flat_param.py, _runtime_utils.py"),
        Strategy("zero0", False, False, False, False, False, "DeepSpeed 0.19.8 runtime/fp16/unfused_optimizer.py"),
        Strategy("zero1", False, False, True, True, False, "DeepSpeed 0.19.8 runtime/zero/stage_1_and_2.py"),
        Strategy("zero2", False, True, True, True, False, "DeepSpeed 0.19.8 runtime/zero/stage_1_and_2.py"),
        Strategy("zero3", True, True, True, False, False, "DeepSpeed 0.19.8 runtime/zero/stage3.py"),
        Strategy(
            MEGATRON,
            False,
            False,
            True,
            True,
            False,
            "megatron-core 0.16.1 core/distributed/param_and_grad_buffer.py, core/optimizer/distrib_optimizer.py",
        ),
        Strategy("fsdp2", True, True, True, False, True, "torch 2.13 distributed/fsdp/_fully_shard/"),
    )
}

STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3}  # DeepSpeed's ZeRO stages

# A rank's part of a weight differs from the weight in shape, so only elementwise optimizers keep the same states of it.
ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "none")

# DeepSpeed's partition is one flat fp32 parameter, which bitsandbytes' kernels treat like any other. It is not an
# nn.Embedding, so transformers' request for fp32 states of embeddings does not apply.
ALLOWED_ON_FLAT_PARTITIONS = (
    "adamw_8bit",
    "adamw_bnb_8bit",
    "lion_8bit",
    "lion_32bit",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
)

# FSDP1 gives the optimizer the rank's slice of each weight as a plain vector (use_orig_params), which bitsandbytes'
# kernels treat like any parameter. They refuse FSDP2's DTensors: bitsandbytes 0.50 has no sharding rule for
# optimizer_update_8bit_blockwise and _32bit, so torch 2.13 raises; traced.
ALLOWED_ON_SLICES = (
    *ALLOWED_ON_FLAT_PARTITIONS,
    *("paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
)

# Bytes of gradients that DDP's reducer collects for one all-reduce, after the first step. The buckets are a second copy
# of all gradients (gradient_as_bucket_view is off in torch and in transformers' Trainer).
FIRST_BUCKET, BUCKET = MIB, 25 * MIB
BUCKETS_SOURCE = "torch 2.13 nn/parallel/distributed.py, csrc/distributed/c10d/reducer.cpp"

# When DDP is constructed it flattens weights into broadcast buffers of this many bytes, two at a time.
BROADCAST, BROADCASTS = 250 * MIB, 2

ALIGNMENT = 2  # every rank's partition of a flat group is a multiple of it, in numbers: nccl_start_alignment_factor


class ZeroSettings(NamedTuple):
    """DeepSpeed's ZeRO configuration with its defaults. Sizes are in numbers, not bytes.

    reduce_bucket    gradients copied into a bucket before they are reduced
    prefetch         weights fetched ahead of their use
    persistent       largest weight that is not divided
    live             most gathered weights with which anything is still fetched ahead
    reuse            a weight used again within this many numbers stays gathered
    sub_group        numbers that the optimizer updates at once
    overlaps         gradients are reduced while others are computed; at stages 1 and 2 into a second bucket
    contiguous       gradients are copied into buckets; otherwise they stay in place until they are reduced
    round_robin      weights are assigned to the ranks in turn
    divides_loading  at stage 3 all ranks divide each weight as it is loaded (deepspeed.zero.Init)
    flattens         at stages 1 and 2 weights are concatenated on the GPU, briefly a second copy; else on the host
    optimizer        device of offloaded optimizer states: `cpu`, `nvme`, or empty for the GPU
    parameters       device of offloaded parameters, likewise
    in_place         a single rank has all weights on its GPU, so a gathered weight is a view of its part
    pins             whether host memory is pinned: the optimizer's, the parameters'
    swaps            NVMe buffers: number of the optimizer's, of the parameters', their size, numbers kept on the host

    Source: DeepSpeed 0.19.8 runtime/zero/config.py, partition_parameters.py _no_gather_coalesced.
    """

    reduce_bucket: int = 500_000_000
    prefetch: int = 50_000_000
    persistent: int = 100_000
    live: int = 1_000_000_000
    reuse: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    overlaps: bool = False
    contiguous: bool = True
    round_robin: bool = False
    divides_loading: bool = True
    flattens: bool = True
    optimizer: str = ""
    parameters: str = ""
    in_place: bool = False
    pins: tuple[bool, bool] = (True, True)
    swaps: tuple[int, int, int, int] = (4, 5, 100_000_000, 1_000_000_000)

    def copies_whole(self, numbers: int) -> bool:
        """Return whether a weight of `numbers` elements is always whole, in addition to the rank's part of it."""
        return numbers <= self.persistent and not self.in_place


# GPU bytes of the norm of gradients that FSDP keeps in host memory, which ranks all-reduce on the GPU: one number in
# FSDP2 (False), four in FSDP1 (True). Source: torch 2.13 nn/utils/clip_grad.py,
# distributed/fsdp/fully_sharded_data_parallel.py clip_grad_norm_; traced.
NORM_OF_HOST = {False: 512, True: 4 * 512}

PARAMETER_START = 64  # Megatron aligns the start of every weight in its buffers to this many numbers
BUCKET_END = 128  # and the end of a bucket to a multiple of this and of the number of ranks

FLAT_PARAMETER_ALIGNMENT = 16  # FSDP1 aligns every weight of a flat parameter to this many bytes, under use_orig_params


def part(numbers: int, world: int) -> int:
    """The share of `numbers` of the rank that holds most."""
    return -(-numbers // world)


def rows_of(shape: tuple[int, ...], world: int) -> tuple[int, ...]:
    """Shape of the part of a weight, divided along its first axis, of the rank that holds most."""
    return (part(shape[0], world), *shape[1:]) if shape else (1,)


def aligned(numbers: int, dtype: str) -> int:
    """Return how many numbers a weight takes up in a flat parameter, with alignment."""
    step = FLAT_PARAMETER_ALIGNMENT // ITEMSIZE[dtype]
    return -(-numbers // step) * step


def buckets(parameters: Sequence[Parameter]) -> Iterator[tuple[int, int]]:
    """Yield DDP's buckets as (bytes of one, number of them), for parameters in the model's order.

    Gradients arrive from the last parameter to the first; each goes into the open bucket of its dtype, and a bucket is
    closed once it has reached its size. Source: `compute_bucket_assignment_by_size` in reducer.cpp.
    """
    sizes: dict[str, list[int]] = {}
    for p in _repeated(parameters):
        sizes.setdefault(p.dtype, []).append(prod(p.shape) * ITEMSIZE[p.dtype])
    for gradients in sizes.values():
        closed: list[int] = []
        filled = 0
        for bytes_ in reversed(gradients):
            filled += bytes_
            if filled >= (BUCKET if closed else FIRST_BUCKET):
                closed.append(filled)
                filled = 0
        if filled:
            closed.append(filled)
        for bytes_, same_size in groupby(sorted(closed, reverse=True)):
            yield rounded(bytes_), len(list(same_size))


def _repeated(parameters: Sequence[Parameter]) -> Iterator[Parameter]:
    """Yield every copy of every parameter, in order. Adjacent parameters with equal `copies` repeat as one block."""
    for copies, group in groupby(parameters, key=lambda p: p.copies):
        block = list(group)
        for _ in range(copies):
            yield from block
