"""Host memory of a run: what a process has while the model is loaded and in the steps, and a node's processes together.

transformers opens checkpoints of safetensors as mapped files: weights in the dtype they are stored in are pages of the
files, which processes of a node share and the system may drop; counted apart, as `mapped`. Weights in another dtype are
each process's own. Not counted: Python and the libraries' own (a few hundred MiB a process), data, and what torch's
allocator of pinned memory keeps of tensors that are gone.

Source: transformers 5.24 core_model_loading.py _materialize_copy, modeling_utils.py from_pretrained; safetensors 0.8
safe_open; a Llama of 509 MiB in bf16 loaded so on Linux: as bf16 88 MiB of memory of its own, as fp32 1,107.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import prod
from typing import NamedTuple

from memplan.catalogue.profiles.profiles import decided, find_profile
from memplan.core.units import ITEMSIZE
from memplan.estimate.answer import Host, HostPhase
from memplan.estimate.side_task import Aside
from memplan.program.graph import Graph, built, elements
from memplan.program.loading import in_order
from memplan.program.sharding import zero
from memplan.program.sharding.ranks import Ranks, kept_dtype, pieces
from memplan.program.training.program import Structure
from memplan.resolve.communicators import NODE
from memplan.spec.parallelism import Parallelism

_STORED = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


class Loaded(NamedTuple):
    """Bytes of a model in the memory of a process that loads it: its `own`, and those of `mapped` files."""

    own: int
    mapped: int


def on_host(
    structure: Structure, parallelism: Parallelism, profile: str, in_steps: int, asides: Iterable[Aside] = ()
) -> Host:
    """What a process of the run has in host memory, `in_steps` bytes of it in the steps, and its node. Beside them, in
    `asides`, every process evaluates, and the first alone saves and merges."""
    processes = 1 if structure.pipe.schedule == "device_map" else parallelism.world
    ranks = min(processes, parallelism.gpus_per_node or NODE)
    phases = [HostPhase("step", in_steps, ranks * in_steps, 0)]
    if _by_transformers(structure, profile):
        phases.insert(0, _loading(structure, ranks))
    for aside in asides:
        if aside.host:
            others = (ranks - 1) * aside.host if aside.phase == "eval" else 0
            most = in_steps + aside.host
            phases.append(HostPhase(aside.phase, most, (ranks - 1) * in_steps + most + others, 0))
    return Host(ranks, tuple(phases))


def _by_transformers(structure: Structure, profile: str) -> bool:
    """Whether transformers 5 loads the model."""
    name = find_profile(profile).name
    words: Mapping[str, object] = decided(name, structure.graph.model.model_type, False)
    return words["tensor_parallel"] == "transformers" and not structure.buffers


def _loading(structure: Structure, ranks: int) -> HostPhase:
    """Where FSDP sends weights, one process of a node loads them; the others have their parts of what is offloaded."""
    graph, own = structure.graph, structure.ranks
    found = _loaded(graph, own, straight=graph.degrees.tp > 1 or structure.pipe.schedule == "device_map")
    parts = sum(prod(p.shape) * ITEMSIZE[p.dtype] * p.copies for p in pieces(graph, own)) if own.offloads else 0
    # FSDP2's weights are all there until the last is divided, FSDP1's go unit by unit
    most = max(found.own, parts) if own.offloads and own.row.flat else found.own + parts
    together = most + (ranks - 1) * parts if own.efficient else ranks * most
    return HostPhase("load", most, together, found.mapped)


@lru_cache(maxsize=512)
def _loaded(graph: Graph, ranks: Ranks, straight: bool) -> Loaded:
    """`straight`: weights go from the files to the GPU, as quantised ones do in any case, and what ZeRO's
    stage 3 divides as it comes."""
    _, axes = built(graph)
    divides = zero.stage(ranks) == 3 and ranks.knobs.divides_loading
    straight = straight or bool(graph.recipe.quantization) or divides
    dtype = ranks.frozen or graph.recipe.weights
    said = graph.model.config.get("dtype") or graph.model.config.get("torch_dtype")
    stored = _STORED.get(str(said), dtype)
    casts = ranks.world > 1 and ranks.row.gathers and not ranks.row.flat  # FSDP2's are, before they are divided
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
        last = kept_dtype(w, ranks) if casts else dtype
        own += numbers * ITEMSIZE[last] if last != stored else 0
    return Loaded(own, mapped)
