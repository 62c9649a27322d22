"""Memory of a rank under FSDP1 or FSDP2: its shards, and the units gathered while a pass uses them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import groupby
from math import prod

from memplan.catalogue.optimizers.parameter_rules import Parameter
from memplan.catalogue.optimizers.states import OptimizerMemory
from memplan.catalogue.parallelism.sharding import NORM_OF_HOST
from memplan.core.cached_property import cached_property
from memplan.core.ir import Division, Tensor
from memplan.core.units import ITEMSIZE
from memplan.engine.gather import REST, ROOT
from memplan.engine.walk import size
from memplan.program.graph import Graph, TensorGroup, parameters_of, tensor_group
from memplan.program.sharding import fsdp_loading
from memplan.program.sharding.fsdp_units import (
    Piece,
    copied_model,
    division,
    pieces,
    stays_gathered,
    units_of,
    unreduced_gradients,
)
from memplan.program.sharding.ranks import Ranks, is_scale, pinned_bytes, sent_dtype
from memplan.program.sharding.sharding import Saved, Sharding, stepped_on_host, with_copies
from memplan.program.structure import Structure

_STATES = "torch 2.13 distributed/fsdp/_optim_utils.py _allgather_orig_param_states"
_KEPT = "torch 2.13 distributed/fsdp/_runtime_utils.py _post_forward_reshard, which leaves the root"
_FSDP1 = "torch 2.13 distributed/fsdp/_unshard_param_utils.py _unshard_fsdp_state_params"
_FSDP2 = "torch 2.13 distributed/_state_dict_utils.py _gather_state_dict"
_HOST_NAMES = {
    "parameter": "parts of weights, pinned",
    "gradient": "parts of gradients, pinned",
    "optstate": "the optimizer's states",
    "temp": "what the update makes",
}


class FullySharded(Sharding):
    """One of the ranks that FSDP shards weights, gradients and states among."""

    def __init__(self, run: Structure) -> None:
        super().__init__(run)
        self.is_flat = run.ranks.row.flat
        self.source = run.ranks.row.source
        self.state_dict = "full" if self.is_flat else "sharded"

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Everything that is sharded, in the model's order."""
        return pieces(self.graph, self.ranks)

    @cached_property
    def units(self) -> Division:
        """The units that a pass gathers."""
        return division(self.graph, self.ranks)

    def division(self, later: bool = False, opens: bool = False) -> Division | None:
        return self.units._replace(whole=()) if later else self.units

    @property
    def generates_with_fp32_ends(self) -> bool:
        return self.is_flat and any(p.unit == ROOT and p.dtype == "fp32" != p.sent for p in self.pieces)

    def generation_division(self) -> Division:
        """Return the units that a generation gathers: under FSDP1 all but the root, which is whole throughout."""
        return self.units._replace(
            units=tuple(u for u in self.units.units if not (self.is_flat and u[0] == ROOT)), whole=()
        )

    def pushed(self, *, merges: bool) -> Iterator[TensorGroup]:
        largest = max(self.pieces, key=lambda piece: piece.whole * ITEMSIZE[piece.dtype])
        yield tensor_group("parameter", f"{largest.name}, gathered", largest.whole, largest.dtype, self.source)

    def held_in(self, phase: str) -> Iterator[TensorGroup]:
        """Yield what FSDP1 holds while a trainer's model generates: the root's weights whole, in the dtype they are
        kept in, and the gradients of the step before, until the next forward pass.

        Source: trl 1.16.0 trainer/grpo_trainer.py _generate_single_turn (summon_full_params); torch 2.13
        distributed/fsdp/_flat_param.py _reset_flat_param_grad_info_if_needed.
        """
        for p in self.pieces if self.is_flat and phase == "generate" else ():
            if p.unit == ROOT:
                yield tensor_group("parameter", f"{p.name}, gathered to generate", p.whole, p.dtype, self.source)
            elif p.trains:
                what, shape = f"{p.name}.grad of the step before", " ".join(map(str, p.shape))
                yield tensor_group("gradient", what, shape, p.dtype, self.source, p.where, p.copies)

    def weights(self) -> Iterator[TensorGroup]:
        """Yield the rank's parts of sharded weights, of those of a copy that is the reference model, and everything
        that is not sharded."""
        yield from self._weights(self.graph, self.pieces)
        yield from self.weights_of_roles()
        yield from self.run.engine
        copied = copied_model(self.graph, self.ranks)
        if copied is None:
            return
        of_copy = pieces(*copied)
        for held in self._weights(copied[0], of_copy):
            yield held._replace(what=f"reference.{held.what}")
        for p in of_copy:
            if stays_gathered(p.unit, copied[1]):
                what = f"reference.{p.name}, gathered by its first forward"
                yield tensor_group("parameter", what, p.whole, p.sent, _KEPT)

    def _weights(self, graph: Graph, sharded: Iterable[Piece]) -> Iterator[TensorGroup]:
        for p in sharded if not self.ranks.offloads else ():
            parts = self.ranks.expert_replicas if p.module else self.ranks.shard_count
            what = f"{p.name}, one of {parts} parts" if parts > 1 else p.name
            shape = " ".join(map(str, p.shape))
            yield tensor_group("parameter", what, shape, p.dtype, self.source, p.where, p.copies)
        for held in parameters_of(graph):
            if held.kind == "buffer" or is_scale(held):
                yield held

    def gradients(self) -> Iterator[TensorGroup]:
        """Yield the rank's parts of sharded gradients after backward."""
        if self.ranks.offloads:
            return
        piece_of = {p.unit: p for p in self.pieces}
        for name, unit in self.units.units:
            where, copies = (piece_of[name].where, piece_of[name].copies) if name != REST else ("", 1)
            inner = (t for _, unit in (*unit.nested, *unit.modules) for t in unit.parts)
            for t in (*unit.parts, *inner):
                yield tensor_group("gradient", t.name, t.shape, t.dtype, self.source, where, copies)

    def accumulated(self) -> Iterator[TensorGroup]:
        """Yield the gradients that a later micro-batch finds: whole if only the last micro-batch reduces them."""
        return self.whole_gradients() if self.ranks.delayed else self.gradients()

    def whole_gradients(self) -> Iterator[TensorGroup]:
        """Yield the whole gradients that a micro-batch without reduction leaves."""
        for p in self.pieces:
            for t in unreduced_gradients([p] if p.trains else [], self.ranks):
                yield tensor_group("gradient", t.name, t.shape, t.dtype, self.source, p.where, p.copies)

    def accumulates_in(self, phase: str) -> bool:
        return not (phase == "backward" and self.ranks.delayed)

    def trained(self) -> list[Parameter]:
        """Return the rank's parts of trained parameters. Only transformers' Trainer tells the optimizer which are
        embeddings."""
        out: list[Parameter] = []
        for _, group in groupby(self.pieces, key=lambda piece: piece.unit):
            out += with_copies((parameter, p.copies) for p in group if p.trains for parameter in self._parameters_of(p))
        return out

    def _parameters_of(self, piece: Piece) -> Iterator[Parameter]:
        slices = [(name, (count,), embedding) for name, count, embedding in piece.slices]
        if not slices and not self.graph.flattens_frozen:
            slices = [(piece.name, piece.shape, False)]
        for name, shape, embedding in slices:
            path = f"{piece.where}.{name}".lstrip(".")
            yield Parameter(path, shape, piece.dtype, embedding=self.run.trainer and embedding)

    def optimizer(self) -> OptimizerMemory:
        memory = super().optimizer()
        return stepped_on_host(memory) if self.ranks.offloads else memory

    def clipping(self) -> int:
        if not self.ranks.offloads:
            return super().clipping()
        return NORM_OF_HOST[self.is_flat] if self.run.clips else 0

    def host(self) -> Iterator[TensorGroup]:
        """Yield what a rank holds in host memory if FSDP offloads parameters.

        These are its pinned parts of weights and gradients, and the optimizer states. FSDP1 has a gradient for every
        flat parameter, frozen ones included. If a later micro-batch adds to FSDP2's gradients, one gradient at a time
        is copied in addition. The optimizer step takes the scratch of one parameter's update: torch's foreach needs a
        GPU.

        Source: torch 2.13 distributed/fsdp/_flat_param.py init_flat_param_attributes, _fully_shard/_fsdp_param.py,
        _fsdp_collectives.py; aten/src/ATen/native/TensorConversions.cpp, which pins non-blocking copies to the host.
        """
        if not self.ranks.offloads:
            return
        largest = 0
        for p in self.pieces:
            numbers = prod(p.shape)
            part, bytes_ = f"{p.name}, one of {self.ranks.world} parts, pinned", numbers * ITEMSIZE[p.dtype]
            kinds = [("parameter", part)]
            if p.trains or self.is_flat:
                kinds.append(("gradient", f"gradient of {part}"))
                largest = max(largest, bytes_)
            for kind, what in kinds:
                pinned = pinned_bytes(bytes_)
                yield TensorGroup(kind, what, p.where, str(numbers), p.dtype, p.copies, pinned, self.source)
        if self.run.accumulates and not self.ranks.delayed and not self.is_flat:
            what = "gradient of a later micro-batch"
            yield TensorGroup("temp", what, "", str(largest), "uint8", 1, largest, self.source)
        optimizer = self.memory_of(self.trained(), in_lists=False)
        for state in optimizer.states:
            bytes_ = ITEMSIZE[state.dtype] * prod(state.shape)
            shape, what = " ".join(map(str, state.shape)), f"{state.parameter} {state.what}".strip()
            yield TensorGroup("optstate", what, "", shape, state.dtype, state.count, bytes_, optimizer.source)
        if optimizer.later:
            what, bytes_ = optimizer.scratch, optimizer.later
            yield TensorGroup("temp", what, "", str(bytes_), "uint8", 1, bytes_, optimizer.source)

    def host_shards(self) -> int:
        shards = sum(prod(p.shape) * ITEMSIZE[p.dtype] * p.copies for p in self.pieces)
        return shards if self.ranks.offloads else 0

    def host_name(self, held: TensorGroup) -> str:
        return _HOST_NAMES[held.kind]

    def own_loading_events(self, together: bool) -> Iterable[tuple[int, int]] | None:
        if self.graph.code == "torchtitan":
            return None
        return fsdp_loading.loading_events(self.graph, self.ranks, together)

    def mixed_dtypes(self) -> tuple[str, ...]:
        """Return the dtypes of weights that FSDP1 would flatten together, or that FSDP2 would reduce together.

        Source: torch 2.13 distributed/fsdp/_fully_shard/_fsdp_param_group.py _init_mp_dtypes.
        """
        storage = self.ranks.storage
        if self.is_flat:
            units = (weights for *_, weights in units_of(self.graph, self.ranks))
            dtypes = ({sent_dtype(w, storage) for w in unit if w.group != "adapter"} for unit in units)
        else:
            by_unit = groupby(self.pieces, key=lambda piece: piece.unit)
            dtypes = ({p.dtype for p in group if p.trains} for _, group in by_unit)
        return next((tuple(sorted(of_unit)) for of_unit in dtypes if len(of_unit) > 1), ())

    def idle_in_streams(self) -> int:
        return _idle_in_streams(self.graph, self.ranks)

    def gathers_to_save(self, states: str) -> Iterator[Saved]:
        """Yield what is gathered to save a full state dict: FSDP1 gathers a unit at a time, or an adapter within it,
        FSDP2 a tensor at a time."""
        source, of_states = (_FSDP1, _STATES) if self.is_flat else (_FSDP2, _FSDP2)
        for p in self.pieces:
            yield (tensor_group("temp", f"gathered {p.name}", p.whole, p.dtype, source, p.where),), "save.gather"
            if p.trains and states:
                what = f"gathered state of {p.name}"
                tensors = [tensor_group("temp", what, p.whole, states, of_states, p.where)]
                if self.is_flat:
                    what = "the rank's part of it"
                    tensors.append(tensor_group("temp", what, prod(p.shape), states, of_states, p.where))
                yield tuple(tensors), "save.gather_states"

    def saved_bytes(self, states: int) -> int:
        weights = sum(p.own * ITEMSIZE[p.dtype] * p.copies for p in self.pieces)
        return max(weights, states * self.ranks.world)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors whose shapes are numbers."""
    return sum(size(t.shape, t.dtype, {})[1] for t in tensors)


@lru_cache(maxsize=1024)
def _idle_in_streams(graph: Graph, ranks: Ranks) -> int:
    """Return the bytes of at most two gathered units and one being reduced."""
    units = [u for _, unit in division(graph, ranks).units for u in (unit, *(inner for _, inner in unit.modules))]

    def most(tensors: Iterable[tuple[Tensor, ...]]) -> int:
        return max(map(tensor_bytes, tensors), default=0)

    gathered = max(most(unit.whole for unit in units), most(unit.message for unit in units))
    return 2 * gathered + most(unit.joined for unit in units)
