"""Host memory of a run: what a process holds while it loads and in the steps, and a node's processes together.

transformers memory-maps safetensors checkpoints. Weights in their stored dtype are pages of those files, which the
processes of a node share and the system may drop; they are counted apart, as `mapped`. Weights in another dtype are
each process's own. Not counted: Python and the libraries (a few hundred MiB per process), data, and pinned memory that
torch's allocator keeps after its tensors are freed.

Source: transformers 5.24 core_model_loading.py _materialize_copy, modeling_utils.py from_pretrained; safetensors 0.8
safe_open. Measured: a Llama of 509 MiB in bf16, loaded on Linux, takes 88 MiB of private memory as bf16, 1,107 as fp32.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from memplan.catalogue.profiles.profiles import library_behaviour
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE
from memplan.estimate.answer import Host, HostPhase
from memplan.estimate.side_task import SideTask
from memplan.program.graph import Graph, operations_of
from memplan.program.loading import in_order
from memplan.program.sharding.choice import sharding_of
from memplan.program.sharding.ranks import Ranks, kept_dtype
from memplan.program.structure import Structure
from memplan.program.weight_sizes import elements
from memplan.resolve.communicators import NODE
from memplan.spec.parallelism import Parallelism

_STORED = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


class LoadedBytes(NamedTuple):
    """Bytes of a model in the memory of a process that loads it.

    own     private memory
    mapped  pages of mapped files
    """

    own: int
    mapped: int


def host_memory(
    structure: Structure, parallelism: Parallelism, profile: str, in_steps: int, side_tasks: Iterable[SideTask] = ()
) -> Host:
    """Return host memory per process and node, phase by phase; a process has `in_steps` bytes in the steps.

    Of the side tasks in `side_tasks`, every process evaluates, and only the first saves and merges.
    """
    processes = 1 if structure.pipe.schedule == "device_map" else parallelism.world
    ranks = min(processes, parallelism.gpus_per_node or NODE)
    phases = [HostPhase("step", in_steps, ranks * in_steps, 0)]
    if _is_loaded_by_transformers(structure, profile):
        phases.insert(0, _loading_phase(structure, ranks))
    for task in side_tasks:
        if task.host:
            others = (ranks - 1) * task.host if task.phase == "eval" else 0
            rank = in_steps + task.host
            phases.append(HostPhase(task.phase, rank, (ranks - 1) * in_steps + rank + others, 0))
    return Host(ranks, tuple(phases))


def _is_loaded_by_transformers(structure: Structure, profile: str) -> bool:
    """Return whether transformers 5 loads the model."""
    library = library_behaviour(profile, structure.graph.model.model_type, False)
    return library.sharding.tensor_parallel == "transformers" and not structure.buffers


def _loading_phase(structure: Structure, ranks: int) -> HostPhase:
    """Return host memory while the model is loaded.

    If FSDP broadcasts the weights, one process per node loads them; the others only hold shards that are offloaded.
    """
    graph, sharding = structure.graph, structure.ranks
    straight = graph.degrees.tp > 1 or structure.pipe.schedule == "device_map" or sharding_of(structure).loads_parts
    loaded, shards = _loaded_bytes(graph, sharding, straight), sharding_of(structure).host_shards()
    # FSDP2 keeps all weights until the last is sharded, FSDP1 frees them unit by unit
    largest = max(loaded.own, shards) if sharding.offloads and sharding.row.flat else loaded.own + shards
    together = largest + (ranks - 1) * shards if sharding.efficient else ranks * largest
    return HostPhase("load", largest, together, loaded.mapped)


@lru_cache(maxsize=512)
def _loaded_bytes(graph: Graph, ranks: Ranks, straight: bool) -> LoadedBytes:
    """Return the bytes of the model while it is loaded.

    `straight`: weights go directly from the files to the GPU. So do quantised weights, and those that ZeRO-3 shards
    on loading.
    """
    _, axes = operations_of(graph)
    straight = straight or bool(graph.recipe.quantization)
    dtype = ranks.frozen or graph.recipe.weights
    config_dtype = graph.model.config.get("dtype") or graph.model.config.get("torch_dtype")
    stored = _STORED.get(str(config_dtype), dtype)
    # FSDP2 casts weights before it shards them
    casts = ranks.strategy != "none" and ranks.row.gathers and not ranks.row.flat
    own = mapped = 0
    for w in in_order(graph):
        numbers = elements(w, axes)
        if w.group == "buffer":
            continue
        if w.group == "adapter":
            own += 0 if straight else numbers * ITEMSIZE[ranks.trained or w.dtype]
            continue
        mapped += numbers * ITEMSIZE[stored]
        if straight:
            continue
        final = kept_dtype(w, ranks) if casts else dtype
        own += numbers * ITEMSIZE[final] if final != stored else 0
    return LoadedBytes(own, mapped)
