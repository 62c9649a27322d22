"""Memory to save a checkpoint: on a rank's GPU, and in the host memory of the rank that writes it.

On one GPU tensors are copied to the host as they are. With sharded weights, a full state dict is gathered: FSDP1
gathers a unit at a time in the dtype of the parts, FSDP2 a tensor at a time, DeepSpeed stage 3 a module at a time. For
a sharded state dict every rank writes its own parts. transformers 5 splits stacked experts back into the checkpoint's
matrices on the GPU.

Source: accelerate 1.15 accelerator.py get_state_dict, utils/fsdp_utils.py; torch 2.13 distributed/fsdp/
_state_dict_utils.py, _unshard_param_utils.py, _optim_utils.py _allgather_orig_param_states, distributed/
_state_dict_utils.py _gather_state_dict; DeepSpeed 0.19.8 runtime/engine.py _zero3_consolidated_16bit_state_dict;
transformers 5.24 trainer.py save_model, core_model_loading.py Chunk; safetensors 0.8 torch.py _flatten_as_ptr.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.methods.saving import SOURCE, checkpoint_copies
from memplan.core.units import ITEMSIZE
from memplan.program.graph import TensorGroup, operations_of, parameters_of, tensor_group, total_bytes, weights_of
from memplan.program.sharding.choice import sharding_of
from memplan.program.structure import Structure
from memplan.program.training.program import Program
from memplan.spec.training import Saving

_MAX_SHARD = 50 * 10**9  # bytes: transformers 5.24 modeling_utils.py save_pretrained, max_shard_size


def kind_of(structure: Structure, saving: Saving) -> str:
    """Return the kind of state dict: `whole` if nothing is sharded, else `full` (gathered) or `sharded`. By default
    accelerate and DeepSpeed gather it under FSDP1 only."""
    kind = sharding_of(structure).state_dict
    return kind if kind == "whole" else saving.state_dict or kind


def saving_peak(structure: Structure, saving: Saving, program: Program) -> tuple[tuple[TensorGroup, ...], str, int]:
    """Return the temporaries on the GPU at the peak, the name of that moment, and bytes on the first rank's host."""
    kind, sharding = kind_of(structure, saving), sharding_of(structure)
    if kind == "whole":
        copies = () if sharding.saves_from_host else tuple(_split_experts(structure))
        return copies, "save.convert" if copies else "save", _file_bytes(structure)
    if kind == "sharded":
        return (), "save", 0
    dtypes = {s.dtype for s in sharding.optimizer().states if not s.host and len(s.shape) > 0}
    widest = max(dtypes, key=lambda dtype: ITEMSIZE[dtype], default="") if saving.optimizer else ""
    held, where = max(sharding.gathers_to_save(widest), key=lambda gather: total_bytes(gather[0]))
    return held, where, sharding.saved_bytes(program.states if saving.optimizer else 0)


def _split_experts(structure: Structure) -> Iterator[TensorGroup]:
    """Yield the copies of experts that transformers makes."""
    graph = structure.graph
    if graph.recipe.kind not in ("full", "freeze"):
        return
    _, axes = operations_of(graph)
    for w, count, block in weights_of(graph):
        for t in checkpoint_copies(w, graph.model.family.checkpoint.experts):
            yield tensor_group("temp", t.name, t.shape, t.dtype, SOURCE, block.rstrip("."), count, axes)


def _file_bytes(structure: Structure) -> int:
    """Return the host bytes of one file of weights while it is written. A method with adapters saves only those."""
    adapters = {w.name for w, _, _ in weights_of(structure.graph) if w.group == "adapter"}
    parameters = [h for h in parameters_of(structure.graph) if h.kind == "parameter"]
    if structure.graph.recipe.kind not in ("full", "freeze"):
        parameters = [h for h in parameters if h.what in adapters]
    return min(total_bytes(parameters), _MAX_SHARD)
