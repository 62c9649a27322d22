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
from math import prod

from memplan.catalogue.methods.saving import SOURCE, checkpoint_copies
from memplan.core.units import ITEMSIZE
from memplan.engine.walk import size
from memplan.program.graph import TensorGroup, elements, operations_of, parameters_of, weights_of
from memplan.program.sharding import zero
from memplan.program.sharding.ranks import pieces
from memplan.program.training.program import Program, Structure, division_of
from memplan.spec.training import Saving

_MAX_SHARD = 50 * 10**9  # bytes: transformers 5.24 modeling_utils.py save_pretrained, max_shard_size
_FSDP1 = "torch 2.13 distributed/fsdp/_unshard_param_utils.py _unshard_fsdp_state_params"
_STATES = "torch 2.13 distributed/fsdp/_optim_utils.py _allgather_orig_param_states"
_FSDP2 = "torch 2.13 distributed/_state_dict_utils.py _gather_state_dict"
_ZERO3 = "DeepSpeed 0.19.8 runtime/engine.py _zero3_consolidated_16bit_state_dict"


def kind_of(structure: Structure, saving: Saving) -> str:
    """Return the kind of state dict: `whole` if nothing is sharded, else `full` (gathered) or `sharded`. By default
    accelerate and DeepSpeed gather it under FSDP1 only."""
    if division_of(structure) is None and zero.stage(structure.ranks) < 3:
        return "whole"
    return saving.state_dict or ("full" if structure.ranks.row.flat and not zero.stage(structure.ranks) else "sharded")


def saving_peak(structure: Structure, saving: Saving, program: Program) -> tuple[tuple[TensorGroup, ...], str, int]:
    """Return the temporaries on the GPU at the peak, the name of that moment, and bytes on the first rank's host."""
    kind = kind_of(structure, saving)
    if kind == "whole":
        copies = tuple(_split_experts(structure))
        return copies, "save.convert" if copies else "save", _file_bytes(structure)
    if kind == "sharded":
        return (), "save", 0
    gathers = [*_gathered(structure, saving, program)]
    held, where = max(gathers, key=lambda gather: sum(h.bytes * h.copies for h in gather[0]))
    states = program.states * structure.ranks.world if saving.optimizer and not zero.stage(structure.ranks) else 0
    return held, where, max(_model_bytes(structure), states)  # weights and states are written one after the other


def _split_experts(structure: Structure) -> Iterator[TensorGroup]:
    """Yield the copies of experts that transformers makes. DeepSpeed's state dict is already on the host by then."""
    graph = structure.graph
    if zero.stage(structure.ranks) or graph.recipe.kind not in ("full", "freeze"):
        return
    _, axes = operations_of(graph)
    for w, count, block in weights_of(graph):
        for t in checkpoint_copies(w, graph.model.model_type):
            yield TensorGroup(
                "temp", t.name, block.rstrip("."), t.shape, t.dtype, count, size(t.shape, t.dtype, axes)[1], SOURCE
            )


def _gathered(structure: Structure, saving: Saving, program: Program) -> Iterator[tuple[tuple[TensorGroup, ...], str]]:
    """Yield what each gather holds on the GPU, with the name of the moment."""
    graph, ranks = structure.graph, structure.ranks

    def held(what: str, where: str, numbers: int, dtype: str, source: str) -> TensorGroup:
        return TensorGroup("temp", what, where, str(numbers), dtype, 1, size(str(numbers), dtype, {})[1], source)

    if zero.stage(ranks):
        _, axes = operations_of(graph)
        modules: dict[tuple[str, str], list[TensorGroup]] = {}
        for w, _, block in weights_of(graph):
            if w.group != "buffer":
                module = (block, w.name.rpartition(".")[0])
                modules.setdefault(module, []).append(
                    held(f"gathered {w.name}", block.rstrip("."), elements(w, axes), w.dtype, _ZERO3)
                )
        for tensors in modules.values():
            yield tuple(tensors), "save.gather"
        return
    dtypes = {s.dtype for s in program.optimizer.states if not s.host and len(s.shape) > 0}
    states = max(dtypes, key=lambda dtype: ITEMSIZE[dtype], default="") if saving.optimizer else ""
    for p in pieces(graph, ranks):  # under FSDP1 a piece is a unit, or an adapter within it
        source, of_states = (_FSDP1, _STATES) if ranks.row.flat else (_FSDP2, _FSDP2)
        yield (held(f"gathered {p.name}", p.where, p.whole, p.dtype, source),), "save.gather"
        if p.trains and states:
            tensors = [held(f"gathered state of {p.name}", p.where, p.whole, states, of_states)]
            if ranks.row.flat:
                tensors.append(held("the rank's part of it", p.where, prod(p.shape), states, of_states))
            yield tuple(tensors), "save.gather_states"


def _model_bytes(structure: Structure) -> int:
    """Return the bytes of the model's gathered weights."""
    graph, ranks = structure.graph, structure.ranks
    if zero.stage(ranks):
        _, axes = operations_of(graph)
        return sum(elements(w, axes) * n * ITEMSIZE[w.dtype] for w, n, _ in weights_of(graph) if w.group != "buffer")
    return sum(p.own * ITEMSIZE[p.dtype] * p.copies for p in pieces(graph, ranks))


def _file_bytes(structure: Structure) -> int:
    """Return the host bytes of one file of weights while it is written. A method with adapters saves only those."""
    parameters = [h for h in parameters_of(structure.graph) if h.kind == "parameter"]
    if structure.graph.recipe.kind not in ("full", "freeze"):
        parameters = [h for h in parameters if "lora_" in h.what or h.what.endswith(".saved")]
    return min(sum(h.bytes * h.copies for h in parameters), _MAX_SHARD)
