"""The data-parallel ranks of a run, how they shard it, and weights as the sharding libraries see them."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from memplan.catalogue.parallelism.sharding import STRATEGIES, Strategy, ZeroSettings
from memplan.core.ir import Tensor, Weight
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE
from memplan.program.graph import TensorGroup
from memplan.program.weight_sizes import dims_of, elements, shape_of


class Ranks(NamedTuple):
    """The data-parallel ranks, and how they shard a run (see `memplan.catalogue.parallelism.sharding`).

    It is one flat record, though long, because it is part of the key of every cached lowering of a sharded run.

    strategy         none, ddp, fsdp, fsdp2, zero0 to zero3, or megatron_dist_opt
    world            ranks that shard the model
    trained          dtype of the rank's part of trained weights, empty if it is the dtype they are gathered in
    frozen           dtype of the rank's part of frozen weights, empty if it is the dtype they are gathered in
    storage          dtype that 4-bit weights are packed into
    loads_whole      a quantised model is loaded whole on every GPU before it is sharded
    moves_whole      a model is moved whole to every GPU before it is sharded
    efficient        one process of a node loads the model and sends the others their parts (cpu_ram_efficient_loading)
    delayed          gradients are reduced only in a step's last micro-batch, and stay whole until then (no_sync)
    regathers        activation checkpointing wraps the gathering, so weights are gathered again in recomputation
    experts          Megatron: ranks that have the same experts, 0 if all have
    expert_replicas  FSDP2: ranks that have the same experts and shard them among themselves, 0 if all do
    keeps            weights stay gathered from forward to backward (reshard_after_forward off)
    ahead            the next unit is prefetched in forward
    prefetches_at    when backward prefetches the next unit: `pre`, `post` or `none`, as FSDP1's BackwardPrefetch
    is_unsharded     FSDP1's NO_SHARD: every rank has the whole flat parameters
    wraps            every block is a unit of its own; otherwise everything but the embeddings and the head is one unit
    ends_apart       FSDP2's root has embeddings, last norm and head, except tables that train and are not tied, and the
                     last block stays gathered
    root_has_ends    FSDP2's root has all weights outside of blocks, and `stays` gathered or is `freed` after forward
    views            gradients are views of DDP's buckets
    records_streams  no buffer in which DDP broadcasts weights is reused before all weights are sent
    replicated       there are several such groups of ranks, which sum their reduced gradients (hybrid sharding)
    offloads         the rank's weights, gradients and states are in host memory, where the optimizer steps
    reduces          dtype that FSDP2 reduces gradients in, empty if it is the dtype weights are gathered in
    casts_last       FSDP2's parts are cast to fp32 one by one once the model is divided, not before
    knobs            DeepSpeed's configuration
    """

    strategy: str = "none"
    world: int = 1
    trained: str = ""
    frozen: str = ""
    storage: str = "uint8"
    loads_whole: bool = True
    moves_whole: bool = False
    efficient: bool = False
    delayed: bool = False
    regathers: bool = False
    experts: int = 0
    expert_replicas: int = 0
    keeps: bool = False
    ahead: bool = False
    prefetches_at: str = "pre"
    is_unsharded: bool = False
    wraps: bool = True
    ends_apart: bool = False
    root_has_ends: str = ""
    views: bool = False
    records_streams: bool = False
    replicated: bool = False
    offloads: bool = False
    reduces: str = ""
    casts_last: bool = False
    knobs: ZeroSettings = ZeroSettings()

    @property
    def row(self) -> Strategy:
        return STRATEGIES[self.strategy]

    @property
    def shard_count(self) -> int:
        """The number of ranks that shard the weights."""
        return 1 if self.is_unsharded else self.world


SINGLE_RANK = Ranks()

# Tensors of a quantised weight that are parameters, of bitsandbytes and, as fms-acceleration makes them, of GPTQ.
# Source: fms-acceleration fms_acceleration_peft/autogptq_utils.py PATCH_FOR_FSDP_TRITON_V2.
PACKED = ("packed", "qweight", "qzeros")


def numbers_of(w: Weight, axes: Mapping[str, int], storage: str) -> tuple[int, str]:
    """Return the elements and dtype of a weight's parameter; for a 4-bit weight, of what it is packed into."""
    return prod(shape_in(w, axes, storage)), sent_dtype(w, storage)


def sent_dtype(w: Weight, storage: str) -> str:
    """Return the dtype that a weight is sent in; for a 4-bit weight, of what it is packed into.

    Stacks of experts are packed into bytes whatever the storage is.
    Source: bitsandbytes 0.50 nn/parametrize.py replace_parameter_4bit.
    """
    return w.dtype if not w.stored else "uint8" if w.stacked else storage


def kept_dtype(w: Weight, ranks: Ranks) -> str:
    """Return the dtype of a rank's part of a weight; for a 4-bit weight, of what it is packed into."""
    sent = sent_dtype(w, ranks.storage)
    return sent if w.stored else (ranks.trained if w.trains else ranks.frozen) or sent


def shape_in(w: Weight, axes: Mapping[str, int], storage: str) -> tuple[int, ...]:
    """Return a weight's shape as the library sees it; for a 4-bit weight, the column it is packed into."""
    if w.stored:
        packed = sum(_exact_bytes(w, t, axes) for t in w.stored if t.name in PACKED)
        return (-(-packed // ITEMSIZE[sent_dtype(w, storage)]), 1)
    is_vector = w.name.endswith(("bias", "norms.weight")) and not w.name.endswith("position_bias")
    # a convolution or a table keeps all its dimensions
    return shape_of(w, axes) if w.rows or is_vector else tuple(dims_of(w, axes))


def _exact_bytes(w: Weight, t: Tensor, axes: Mapping[str, int]) -> int:
    """Return the bytes of one of the tensors that a quantised weight is stored as, not rounded."""
    name, _, block = t.dtype.partition("/")
    return -(-elements(w._replace(shape=t.shape), axes) // int(block or 1)) * ITEMSIZE[name]


def is_scale(held: TensorGroup) -> bool:
    """Whether the tensor holds scales of a 4-bit weight. They are not parameters, so they are never sharded."""
    return "(" in held.what and not held.what.endswith(tuple(f"({name})" for name in PACKED))


def pinned_bytes(bytes_: int) -> int:
    """Return the size of a pinned allocation of `bytes_` bytes, which torch rounds up to a power of two.

    Source: torch 2.13 ATen/core/CachingHostAllocator.h.
    """
    return 1 << (bytes_ - 1).bit_length() if bytes_ else 0
