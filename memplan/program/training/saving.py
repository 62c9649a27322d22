"""What saving a checkpoint takes on a rank's GPU, and in the host memory of the rank that writes it.

On one GPU tensors go to the host as they are. Where ranks have parts, a whole state dict is gathered: FSDP1 a unit at a
time, in the dtype of the parts; FSDP2 a tensor at a time; DeepSpeed at stage 3 a module at a time. Sharded, every rank
writes its own. transformers 5 turns the experts it keeps as one parameter back into a checkpoint's matrices on the GPU.

Source: accelerate 1.15 accelerator.py get_state_dict, utils/fsdp_utils.py; torch 2.13 distributed/fsdp/
_state_dict_utils.py, _unshard_param_utils.py, _optim_utils.py _allgather_orig_param_states, distributed/
_state_dict_utils.py _gather_state_dict; DeepSpeed 0.19.8 runtime/engine.py _zero3_consolidated_16bit_state_dict;
transformers 5.24 trainer.py save_model, core_model_loading.py Chunk; safetensors 0.8 torch.py _flatten_as_ptr.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from memplan.catalogue.methods.saving import SOURCE, turned_back
from memplan.core.units import ITEMSIZE
from memplan.engine.walk import size
from memplan.program.graph import Held, built, elements, parameters_of, weights_of
from memplan.program.sharding import zero
from memplan.program.sharding.ranks import pieces
from memplan.program.training.program import Program, Structure, division_of
from memplan.spec.training import Saving

_SHARD = 50 * 10**9  # bytes: transformers 5.24 modeling_utils.py save_pretrained, max_shard_size
_FSDP1 = "torch 2.13 distributed/fsdp/_unshard_param_utils.py _unshard_fsdp_state_params"
_STATES = "torch 2.13 distributed/fsdp/_optim_utils.py _allgather_orig_param_states"
_FSDP2 = "torch 2.13 distributed/_state_dict_utils.py _gather_state_dict"
_ZERO3 = "DeepSpeed 0.19.8 runtime/engine.py _zero3_consolidated_16bit_state_dict"


def kind_of(structure: Structure, saving: Saving) -> str:
    """Whether a state dict is gathered whole, where ranks have parts: as accelerate and DeepSpeed have it by default,
    under FSDP1 alone."""
    if division_of(structure) is None and zero.stage(structure.ranks) < 3:
        return "whole"
    return saving.state_dict or ("full" if structure.ranks.row.flat and not zero.stage(structure.ranks) else "sharded")


def saved(structure: Structure, saving: Saving, program: Program) -> tuple[tuple[Held, ...], str, int]:
    """What is there on the GPU when most is, where that is, and the bytes on the first rank's host."""
    kind = kind_of(structure, saving)
    if kind == "whole":
        copies = tuple(_turned_back(structure))
        return copies, "save.convert" if copies else "save", _written(structure)
    if kind == "sharded":
        return (), "save", 0
    every = [*_gathered(structure, saving, program)]
    held, where = max(every, key=lambda found: sum(h.bytes * h.copies for h in found[0]))
    states = program.states * structure.ranks.world if saving.optimizer and not zero.stage(structure.ranks) else 0
    return held, where, max(_whole(structure), states)  # one file after the other


def _turned_back(structure: Structure) -> Iterator[Held]:
    """The copies that transformers makes of experts. DeepSpeed's state dict is on the host by then."""
    graph = structure.graph
    if zero.stage(structure.ranks) or graph.recipe.kind not in ("full", "freeze"):
        return
    _, axes = built(graph)
    for w, count, block in weights_of(graph):
        for t in turned_back(w, graph.model.model_type):
            yield Held(
                "temp", t.name, block.rstrip("."), t.shape, t.dtype, count, size(t.shape, t.dtype, axes)[1], SOURCE
            )


def _gathered(structure: Structure, saving: Saving, program: Program) -> Iterator[tuple[tuple[Held, ...], str]]:
    """What is gathered together, one after the other."""
    graph, ranks = structure.graph, structure.ranks

    def held(what: str, where: str, numbers: int, dtype: str, source: str) -> Held:
        return Held("temp", what, where, str(numbers), dtype, 1, size(str(numbers), dtype, {})[1], source)

    if zero.stage(ranks):
        _, axes = built(graph)
        modules: dict[tuple[str, str], list[Held]] = {}
        for w, _, block in weights_of(graph):
            if w.group != "buffer":
                module = (block, w.name.rpartition(".")[0])
                modules.setdefault(module, []).append(
                    held(f"gathered {w.name}", block.rstrip("."), elements(w, axes), w.dtype, _ZERO3)
                )
        for some in modules.values():
            yield tuple(some), "save.gather"
        return
    dtypes = {s.dtype for s in program.optimizer.states if not s.host and len(s.shape) > 0}
    states = max(dtypes, key=lambda dtype: ITEMSIZE[dtype], default="") if saving.optimizer else ""
    for p in pieces(graph, ranks):  # under FSDP1 a unit is one, or an adapter within it
        source, of_states = (_FSDP1, _STATES) if ranks.row.flat else (_FSDP2, _FSDP2)
        yield (held(f"gathered {p.name}", p.where, p.whole, p.dtype, source),), "save.gather"
        if p.trains and states:
            found = [held(f"gathered state of {p.name}", p.where, p.whole, states, of_states)]
            if ranks.row.flat:
                found.append(held("the rank's part of it", p.where, prod(p.shape), states, of_states))
            yield tuple(found), "save.gather_states"


def _whole(structure: Structure) -> int:
    """Bytes of the model's weights, whole, as they are gathered."""
    graph, ranks = structure.graph, structure.ranks
    if zero.stage(ranks):
        _, axes = built(graph)
        return sum(elements(w, axes) * n * ITEMSIZE[w.dtype] for w, n, _ in weights_of(graph) if w.group != "buffer")
    return sum(p.own * ITEMSIZE[p.dtype] * p.copies for p in pieces(graph, ranks))


def _written(structure: Structure) -> int:
    """What one file of weights takes in host memory while it is written: with adapters, those alone."""
    every = [h for h in parameters_of(structure.graph) if h.kind == "parameter"]
    if structure.graph.recipe.kind not in ("full", "freeze"):
        every = [h for h in every if "lora_" in h.what or h.what.endswith(".saved")]
    return min(sum(h.bytes * h.copies for h in every), _SHARD)
