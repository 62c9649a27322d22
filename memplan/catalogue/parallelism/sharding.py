"""How libraries divide a run among ranks: rows, each with its source.

What is a formula in the literature (16 bytes a parameter by the number of ranks) is here which tensors are divided,
how they are padded, and which ones come beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import prod
from typing import NamedTuple

from memplan.catalogue.optimizers.parameter_rules import Parameter
from memplan.core.units import ITEMSIZE, MIB, rounded


class Strategy(NamedTuple):
    """What a strategy divides among the ranks, and how.

    parameters, gradients, states   whether a rank holds only its part of them
    flat     of a unit's weights together, one after the other; otherwise every weight by its first axis
    gathers  units are gathered by FSDP's hooks
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

# Modules outside of blocks that FSDP2 makes units of their own, by the start of their weights' names.
# Source: transformers 5.24 models/siglip/modeling_siglip.py, gemma4/modeling_gemma4.py _no_split_modules.
STEMS = {"gemma3": "vision_tower.embeddings.", "gemma4": "model.vision_tower.patch_embedder."}

# Families whose _no_split_modules name the embeddings: accelerate 1.15 wraps them, and then the table inside them.
WRAPPED_TWICE = ("bert", "roberta", "vit", "xlm-roberta")

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}  # of DeepSpeed's ZeRO

# A rank's part of a weight has another shape than the weight, so only an optimizer that takes every number by itself
# has the same states of it.
ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "none")

# DeepSpeed's partition is one flat fp32 parameter, of which bitsandbytes' kernels keep states as of any other; it is
# none of the embeddings that transformers asks fp32 states for.
OF_FLAT_PARTS = ("adamw_8bit", "adamw_bnb_8bit", "lion_8bit", "lion_32bit", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit")

# FSDP1 gives the optimizer what its part has of each weight, a plain vector (use_orig_params), of which bitsandbytes'
# kernels keep states as of any parameter. They do not take FSDP2's parts, which are DTensors: bitsandbytes 0.50 has no
# sharding rule for its operations (optimizer_update_8bit_blockwise and _32bit), and torch 2.13 stops; traced.
OF_SLICES = (
    *OF_FLAT_PARTS,
    *("paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
)

# The bytes of gradients that DDP's reducer gathers for one all-reduce, after the first step. The buckets hold all
# gradients again (gradient_as_bucket_view is off, in torch and in transformers' Trainer).
FIRST_BUCKET, BUCKET = MIB, 25 * MIB
BUCKETS_SOURCE = "torch 2.13 nn/parallel/distributed.py, csrc/distributed/c10d/reducer.cpp"

# What DDP broadcasts at once when it is made: weights are flattened into buffers of so many bytes, two at a time.
BROADCAST, BROADCASTS = 250 * MIB, 2

ALIGNMENT = 2  # numbers of a flat group that every rank's partition is a multiple of: nccl_start_alignment_factor


class Knobs(NamedTuple):
    """How DeepSpeed is configured, with its own defaults; sizes in numbers. Source: 0.19.8 runtime/zero/config.py.

    reduce_bucket   gradients that are copied into a bucket before they are reduced
    prefetch        weights that are fetched ahead of their use
    persistent      weights so small that they are not divided
    live            weights that may be whole for anything to be fetched ahead
    reuse           how soon a weight is used again that stays whole
    sub_group       numbers that the optimizer takes at once
    overlaps        gradients are reduced while others are computed: at stages 1 and 2 into a second bucket
    contiguous      gradients are copied into buckets; otherwise they wait where they are
    round_robin     weights are laid one after the other by turns of the ranks
    divides_loading at stage 3 each weight is divided as it is loaded (deepspeed.zero.Init), by all ranks
    flattens        at stages 1 and 2 weights are laid together on the GPU, which has them twice then; else on the host
    optimizer       where its states are if not on the GPU: cpu or nvme; `parameters` likewise
    pins            whether host memory of the optimizer is pinned, and of the parameters
    swaps           NVMe's buffers of the optimizer, of the parameters, numbers of one, numbers kept in host memory
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
    pins: tuple[bool, bool] = (True, True)
    swaps: tuple[int, int, int, int] = (4, 5, 100_000_000, 1_000_000_000)


# Bytes on the GPU of the norm of gradients that FSDP has in host memory, which ranks sum there: FSDP2's (False) one
# number, FSDP1's (True) four. Source: torch 2.13 nn/utils/clip_grad.py, distributed/fsdp/fully_sharded_data_parallel.py
# clip_grad_norm_; traced.
NORM_OF_HOST = {False: 512, True: 4 * 512}

PARAMETER_START = 64  # numbers that Megatron aligns every weight of its buffers to
BUCKET_END = 128  # and, with the number of ranks, the end of a bucket

ALIGNED = 16  # bytes that FSDP1 aligns every weight of a flat parameter to, under use_orig_params


def part(numbers: int, world: int) -> int:
    """What the rank that has most holds of so many numbers."""
    return -(-numbers // world)


def rows_of(shape: tuple[int, ...], world: int) -> tuple[int, ...]:
    """The part of a weight that the rank with most holds: so many rows of its first axis."""
    return (part(shape[0], world), *shape[1:]) if shape else (1,)


def aligned(numbers: int, dtype: str) -> int:
    """How many numbers a weight takes in a flat parameter."""
    step = ALIGNED // ITEMSIZE[dtype]
    return -(-numbers // step) * step


def buckets(parameters: Sequence[Parameter]) -> Iterator[tuple[int, int]]:
    """DDP's buckets: bytes of one and how many such, for parameters in the model's order.

    Gradients come last parameter first, each goes into the open bucket of its dtype, and a bucket that has reached
    its size is closed. Source: `compute_bucket_assignment_by_size` in reducer.cpp.
    """
    sizes: dict[str, list[int]] = {}
    for p in _one_by_one(parameters):
        sizes.setdefault(p.dtype, []).append(prod(p.shape) * ITEMSIZE[p.dtype])
    for each in sizes.values():
        closed: list[int] = []
        filled = 0
        for bytes_ in reversed(each):
            filled += bytes_
            if filled >= (BUCKET if closed else FIRST_BUCKET):
                closed.append(filled)
                filled = 0
        if filled:
            closed.append(filled)
        for bytes_, alike in groupby(sorted(closed, reverse=True)):
            yield rounded(bytes_), len(list(alike))


def _one_by_one(parameters: Sequence[Parameter]) -> Iterator[Parameter]:
    """Every parameter by itself: those in a row with the same number of copies are blocks, one after the other."""
    for copies, group in groupby(parameters, key=lambda p: p.copies):
        block = list(group)
        for _ in range(copies):
            yield from block
