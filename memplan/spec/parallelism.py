"""How a run is divided among GPUs, and what is offloaded to the host."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Annotated, Any, Literal, cast

from memplan.spec.base import MOST_GPUS, Count, Flag, GPUs, Natural, Number, Part, Rank
from memplan.spec.checks import Before, Strict


class Offload(Part):
    """Parts of a run that are kept in host memory between uses.

    parameters   weights
    optimizer    optimizer states, and the optimizer step itself
    activations  all tensors that autograd saves in forward, as torch's `save_on_cpu` does. To offload only the inputs
                 of checkpointed layers, set `kernels.checkpointing` to `offload`
    """

    parameters: Flag = False
    optimizer: Flag = False
    activations: Flag = False


def _integral_float(value: Any) -> Any:
    """Return a float such as 5e8, as DeepSpeed's configs write it, as an int; any other value unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Elements = Annotated[Count, Before(_integral_float)]
ElementsOrZero = Annotated[Natural, Before(_integral_float)]
Auto = Literal["auto"]


class OffloadedOptimizer(Part):
    """DeepSpeed's `offload_optimizer`. With NVMe, `buffer_count` pinned buffers hold one sub-group each."""

    device: Literal["cpu", "nvme"] = "cpu"
    pin_memory: Flag = True
    buffer_count: Count = 4


class OffloadedParameters(Part):
    """DeepSpeed's `offload_param`. With NVMe, host memory holds `buffer_count` pinned buffers of `buffer_size` elements
    each, and the first `max_in_cpu` elements of the weights."""

    device: Literal["cpu", "nvme"] = "cpu"
    pin_memory: Flag = True
    buffer_count: Count = 5
    buffer_size: Elements = 100_000_000
    max_in_cpu: ElementsOrZero = 1_000_000_000


class Zero(Part):
    """DeepSpeed's `zero_optimization`, with its keys and defaults (0.19.8 runtime/zero/config.py).

    Sizes are in elements, not bytes. `auto` is the value that transformers' Trainer derives from the hidden size.

    allgather_bucket_size  takes no memory: weights are gathered in place
    overlap_comm           None for on at stage 3, off below
    zero3_init_flag        accelerate's name: at stage 3 each weight is sharded as it is loaded; if off, every rank
                           loads the whole model and shards it on its GPU
    offload_optimizer      how optimizer states are offloaded, if `parallelism.offload` says that they are
    offload_param          how weights are offloaded, likewise
    """

    reduce_bucket_size: Elements | Auto = 500_000_000
    allgather_bucket_size: Elements | Auto = 500_000_000
    stage3_prefetch_bucket_size: ElementsOrZero | Auto = 50_000_000
    stage3_param_persistence_threshold: ElementsOrZero | Auto = 100_000
    stage3_max_live_parameters: ElementsOrZero = 1_000_000_000
    stage3_max_reuse_distance: ElementsOrZero = 1_000_000_000
    sub_group_size: Elements = 1_000_000_000
    overlap_comm: Flag | None = None
    contiguous_gradients: Flag = True
    round_robin_gradients: Flag = False
    zero3_init_flag: Flag = True
    offload_optimizer: OffloadedOptimizer = OffloadedOptimizer()
    offload_param: OffloadedParameters = OffloadedParameters()


class Parallelism(Part):
    """How the work is divided among GPUs: `world` = `dp` x `tp` x `pp` x `cp`, or any number with a `device_map`.

    world                      number of GPUs
    dp                         data-parallel replicas
    tp                         tensor-parallel GPUs
    pp                         pipeline stages
    cp                         context-parallel GPUs, which divide each sequence
    context                    how `cp` ranks exchange: `ring` passes keys and values around, `ulysses` (DeepSpeed's, or
                               Megatron-core's a2a) swaps tokens for heads
    ep                         expert-parallel GPUs
    etp                        tensor-parallel GPUs of each expert; None for `tp`, as in Megatron
    expert_imbalance           tokens sent to the busiest `ep` rank, as a multiple of the mean, if no tokens are dropped
    virtual_stages             chunks of layers per stage, for interleaved 1F1B
    sequence_parallel          whether `tp` ranks also divide the tokens outside attention and MLP
    strategy                   how replicas divide weights, gradients and optimizer states; `zero0` is DeepSpeed
                               without ZeRO
    shard_group                FSDP: ranks that share one copy of the weights (hybrid sharding); None for all ranks, 1
                               for NO_SHARD
    reshard_after_forward      FSDP: false keeps weights whole from forward to backward (SHARD_GRAD_OP). None for true,
                               except in pipeline stages, where weights stay whole for the step
    forward_prefetch           FSDP1: whether the next unit is gathered during forward
    backward_prefetch          FSDP1: when the next unit is gathered during backward
    cpu_ram_efficient_loading  FSDP: one process per node loads the checkpoint and sends the others their shards
    bucket_view                DDP: gradients are views of the buckets (`gradient_as_bucket_view`)
    static_graph               DDP: the graph is the same in every step
    find_unused_parameters     DDP: ranks look for weights without gradients. None as the trainer does: without
                               checkpointing, and TRL 1.16 always
    offload                    what is kept in host memory
    zero                       DeepSpeed's settings, for zero1 to zero3
    gpus_per_node              GPUs that share one host's memory; None for 8
    stage                      pipeline stage, or GPU of a device map, to answer for; None for the one that needs most
    schedule                   order of a pipeline's microbatches
    first_stage_layers         layers of the first stage; the stages without a number share the rest equally
    last_stage_layers          layers of the last stage, likewise
    ends_as_layers             count the embeddings and the head as one layer each when dividing layers into stages
    device_map                 how transformers places a model's modules on the GPUs of one process, or on the host
    """

    world: GPUs = 1
    dp: GPUs = 1
    tp: GPUs = 1
    pp: GPUs = 1
    cp: GPUs = 1
    context: Literal["ring", "ulysses"] = "ring"
    ep: GPUs = 1
    etp: GPUs | None = None
    expert_imbalance: Annotated[Number, Strict(ge=1, le=2**20)] = 1.0
    virtual_stages: GPUs = 1
    sequence_parallel: Flag = False
    strategy: Literal["none", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp", "fsdp2", "megatron_dist_opt"] = "none"
    shard_group: GPUs | None = None
    reshard_after_forward: Flag | None = None
    forward_prefetch: Flag = False
    backward_prefetch: Literal["pre", "post", "none"] = "pre"
    cpu_ram_efficient_loading: Flag = True
    bucket_view: Flag = False
    static_graph: Flag = False
    find_unused_parameters: Flag | None = None
    offload: Offload = Offload()
    zero: Zero = Zero()
    gpus_per_node: GPUs | None = None
    stage: Rank | None = None
    schedule: Literal["1f1b", "gpipe", "device_map"] | None = None
    first_stage_layers: Count | None = None
    last_stage_layers: Count | None = None
    ends_as_layers: Flag | None = None
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None

    def written(self, values: dict[str, Any]) -> dict[str, Any]:
        """Leave out whether DDP looks for unused parameters, unless it is said."""
        return {k: v for k, v in values.items() if v is not None or k != "find_unused_parameters"}

    @classmethod
    def expanded(cls, value: Any) -> Any:
        """Fill in what follows from the GPUs, as the command line does: `dp` from `world`, `world` from the other
        degrees, and `ddp` if replicas have no strategy."""
        if not isinstance(value, Mapping):
            return value
        given = cast(Mapping[str, Any], value)
        degrees = [given.get(name, 1) for name in ("tp", "pp", "cp")]
        is_valid = all(type(n) is int and 1 <= n <= MOST_GPUS for n in degrees)
        model_ranks = prod(degrees) if is_valid else 0
        world = given.get("world", model_ranks)
        is_valid = is_valid and type(world) is int and 1 < world <= MOST_GPUS and world % model_ranks == 0
        if not is_valid or "dp" in given or given.get("device_map") is not None:
            return given
        replicas = world // model_ranks
        return {**({"strategy": "ddp"} if replicas > 1 else {}), **given, "world": world, "dp": replicas}
