"""How a run is divided among GPUs, and what is offloaded to the host."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from memplan.spec.base import Count, Flag, GPUs, Natural, Number, Part, Rank


class Offload(Part, frozen=True):
    """What lives on the host between uses. `activations` are all tensors that autograd saves in a forward pass, as
    under torch's `save_on_cpu`; the inputs of checkpointed layers alone are `kernels.checkpointing` `offload`."""

    parameters: Flag = False
    optimizer: Flag = False
    activations: Flag = False


def _whole(value: Any) -> Any:
    """5e8, as DeepSpeed's configs have it, is a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Elements = Annotated[Count, BeforeValidator(_whole)]
Fewest = Annotated[Natural, BeforeValidator(_whole)]
Auto = Literal["auto"]


class OffloadedOptimizer(Part, frozen=True):
    """DeepSpeed's `offload_optimizer`. `buffer_count` are the pinned buffers of what lies on NVMe, of a sub-group
    each."""

    device: Literal["cpu", "nvme"] = "cpu"
    pin_memory: Flag = True
    buffer_count: Count = 4


class OffloadedParameters(Part, frozen=True):
    """DeepSpeed's `offload_param`. Beside NVMe, `buffer_count` pinned buffers of `buffer_size` numbers are in host
    memory, and the first `max_in_cpu` numbers of the weights themselves."""

    device: Literal["cpu", "nvme"] = "cpu"
    pin_memory: Flag = True
    buffer_count: Count = 5
    buffer_size: Elements = 100_000_000
    max_in_cpu: Fewest = 1_000_000_000


class Zero(Part, frozen=True):
    """DeepSpeed's `zero_optimization`, by its own keys and with its own defaults (0.19.8 runtime/zero/config.py).

    Sizes are in numbers, not bytes. `auto` is what transformers' Trainer makes of the hidden size. `overlap_comm` is
    on at stage 3 where it is not said. `allgather_bucket_size` takes no memory: weights are gathered in place.
    `zero3_init_flag`, as accelerate calls it: at stage 3 every weight is divided as it is loaded; without it each rank
    loads the whole model, and divides that on its GPU. What is offloaded is said by `parallelism.offload`; how, here.
    """

    reduce_bucket_size: Elements | Auto = 500_000_000
    allgather_bucket_size: Elements | Auto = 500_000_000
    stage3_prefetch_bucket_size: Fewest | Auto = 50_000_000
    stage3_param_persistence_threshold: Fewest | Auto = 100_000
    stage3_max_live_parameters: Fewest = 1_000_000_000
    stage3_max_reuse_distance: Fewest = 1_000_000_000
    sub_group_size: Elements = 1_000_000_000
    overlap_comm: Flag | None = None
    contiguous_gradients: Flag = True
    round_robin_gradients: Flag = False
    zero3_init_flag: Flag = True
    offload_optimizer: OffloadedOptimizer = OffloadedOptimizer()
    offload_param: OffloadedParameters = OffloadedParameters()


class Parallelism(Part, frozen=True):
    """`world` GPUs and how they divide the work; `gpus_per_node` of them share a host's memory (8 unless said). `etp`
    is `tp` where it is not said, as Megatron has it.

    `schedule` is how a pipeline's microbatches run; with `virtual_stages` 1F1B is interleaved. `first_stage_layers` and
    `last_stage_layers` are what those stages have of the layers, the others the rest in equal parts; or, with
    `ends_as_layers`, embeddings count as a layer there, and the head as one. `zero`: how DeepSpeed is configured,
    under the strategies zero1 to zero3. `context`: ranks that divide sequences (`cp`) pass keys and values around, or
    exchange heads for tokens (DeepSpeed's Ulysses). `expert_imbalance`: of ranks that divide experts (`ep`) and
    take all rows they are sent, the one that is sent most gets so many times the mean. `device_map`: how transformers
    places the modules of a model that is run on the GPUs of one process, or on the host; `stage` is one of them.

    Of FSDP: `shard_group` ranks divide the weights, and such groups are replicas (hybrid sharding; None for all ranks);
    without `reshard_after_forward` weights stay whole from forward to backward (SHARD_GRAD_OP; None: they do in a
    pipeline's stages, where they stay whole for a step); `forward_prefetch` and `backward_prefetch` say when FSDP1 asks
    for the next unit; with `cpu_ram_efficient_loading` one process of a node loads the checkpoint, and the others are
    sent what they have of it. Of DDP: with `bucket_view` gradients lie in the buckets, and a `static_graph` is the same
    in every step.
    """

    world: GPUs = 1
    dp: GPUs = 1
    tp: GPUs = 1
    pp: GPUs = 1
    cp: GPUs = 1
    context: Literal["ring", "ulysses"] = "ring"
    ep: GPUs = 1
    etp: GPUs | None = None
    expert_imbalance: Annotated[Number, Field(ge=1, le=2**20)] = 1.0
    virtual_stages: GPUs = 1
    sequence_parallel: Flag = False
    strategy: Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp2", "megatron_dist_opt"] = "none"
    shard_group: GPUs | None = None
    reshard_after_forward: Flag | None = None
    forward_prefetch: Flag = False
    backward_prefetch: Literal["pre", "post", "none"] = "pre"
    cpu_ram_efficient_loading: Flag = True
    bucket_view: Flag = False
    static_graph: Flag = False
    offload: Offload = Offload()
    zero: Zero = Zero()
    gpus_per_node: GPUs | None = None
    stage: Rank | None = None
    schedule: Literal["1f1b", "gpipe", "device_map"] | None = None
    first_stage_layers: Count | None = None
    last_stage_layers: Count | None = None
    ends_as_layers: Flag | None = None
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
