"""The memory of one rank of a training run over time. A strategy that shards the run overrides what it changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar

from memplan.catalogue.kernels.own_axes import own_shape
from memplan.catalogue.optimizers.parameter_rules import Parameter
from memplan.catalogue.optimizers.states import OptimizerMemory, clipping, optimizer_memory, row_of
from memplan.catalogue.parallelism.pipeline import GradientReduction, PipelineMoment
from memplan.catalogue.parallelism.sharding import BROADCAST, BROADCASTS, BUCKETS_SOURCE, buckets
from memplan.core.cached_property import cached_property
from memplan.core.ir import Division, Tensor, Weight
from memplan.core.records import NamedTuple
from memplan.engine.storages import COMPUTING
from memplan.engine.walk import size
from memplan.program.graph import (
    Graph,
    TensorGroup,
    operations_of,
    other_models,
    parameters_of,
    reference_copy,
    tensor_group,
    total_bytes,
    weights_of,
)
from memplan.program.loading import EMPTIED, loading, loading_peak, most_at_once
from memplan.program.stack_facts import looked_up_weights, trained_tables
from memplan.program.structure import Structure
from memplan.program.weight_sizes import shape_of

Saved = tuple[tuple[TensorGroup, ...], str]  # what is gathered at once to be saved, and the name of the moment


class Gathering(NamedTuple):
    """The allocations and frees of weights that a pass gathers apart from its own operations.

    stream  the stream they are allocated on
    events  storage numbers with their bytes, or with 0 for a free
    most    number of events up to the peak
    bytes   bytes at the peak
    """

    stream: int = COMPUTING
    events: tuple[tuple[int, int], ...] = ()
    most: int = 0
    bytes: int = 0


class Sharding:
    """A rank's part of a training run. This base class is the run on one GPU, which shards nothing.

    `memplan.program.sharding.choice.sharding_of` chooses the class.

    gradients_in_buckets  gradients are views of communication buckets and have no memory of their own
    sends_gradients       a pass leaves no gradient of its own: each is reduced as soon as it is computed
    replaces_gradients    the update reads other gradients, which replace those that a pass leaves
    gathers_for_step      sharded weights stay gathered for all passes of a step, and their gradients whole to its end
    loads_parts           each weight is sharded as it is loaded
    state_dict            kind of state dict saved by default: `whole` if nothing is sharded, `full` if it is gathered,
                          `sharded` if every rank writes its own parts
    saves_from_host       the state dict is on the host before it is converted to the checkpoint's format
    """

    gradients_in_buckets: bool = False
    sends_gradients: bool = False
    replaces_gradients: ClassVar[bool] = False
    gathers_for_step: ClassVar[bool] = False
    loads_parts: bool = False
    state_dict: str = "whole"
    saves_from_host: ClassVar[bool] = False

    def __init__(self, run: Structure) -> None:
        self.run = run
        self.graph = run.graph
        self.ranks = run.ranks

    # passes

    @property
    def frees_gradients(self) -> bool:
        """Whether each gradient is consumed as soon as it is computed, by an optimizer that steps in backward."""
        return self.run.in_backward or row_of(self.run.optimizer).frees_gradients

    @property
    def leaves_no_gradients(self) -> bool:
        """Whether a pass leaves no new gradient: each is consumed, added to another, or sent away at once."""
        return self.sends_gradients or self.run.grads is not None or self.frees_gradients

    def division(self, later: bool = False, opens: bool = False) -> Division | None:
        """Return the units of weights that one pass gathers and reduces, or None if it does neither. With `opens`, the
        units of the pass that gathers weights for the rest of the step."""
        return None

    @property
    def generates_with_fp32_ends(self) -> bool:
        """Whether a trainer's model generates with its embeddings, last norm and head in fp32, unlike its blocks."""
        return False

    def generation_division(self) -> Division | None:
        """Return the units of weights that each pass of a generation within training gathers."""
        return self.division()

    def pushed(self, *, merges: bool) -> Iterable[TensorGroup]:
        """Return what is gathered at once while weights are pushed to an engine, which `merges` adapters first.

        Source: trl 1.16.0 generation/vllm_generation.py _iter_named_params.
        """
        return ()

    def held_in(self, phase: str) -> Iterable[TensorGroup]:
        """Return what ranks hold during a phase of a pass, in addition to the moments' tensors."""
        return ()

    # memory between passes

    def weights(self) -> Iterator[TensorGroup]:
        """Yield the weights and buffers that a rank holds, those of other models, and what an engine in the same
        process holds."""
        yield from self.stored(self.graph)
        copy = reference_copy(self.graph)
        for held in self.stored(copy) if copy is not None else ():
            yield held._replace(what=f"reference.{held.what}")
        yield from self.weights_of_roles()
        yield from self.run.engine

    def stored(self, graph: Graph) -> Iterable[TensorGroup]:
        """Return the weights and buffers of the model, or of another one in its step, that a rank holds."""
        return parameters_of(graph)

    def weights_of_roles(self) -> Iterator[TensorGroup]:
        """Yield the weights of other models, which every rank holds whole unless DeepSpeed prepares them for ZeRO 3.

        Source: accelerate 1.15 accelerator.py prepare_model: evaluation_mode.
        """
        for role, other in self.graph.roles:
            if role == "value":  # whose weights are the graph's own
                continue
            for held in self.stored(other):
                yield held._replace(what=f"{role}.{held.what}", shape=own_shape(held.shape, role))

    def gradients(self) -> Iterator[TensorGroup]:
        """Yield the gradients that the optimizer reads: whole, or the rank's part of them."""
        _, axes = operations_of(self.graph)
        for w, count, where in weights_of(self.graph):
            if w.trains:
                dtype, shape = self.run.grads or w.dtype, w.gradient or w.shape
                name, block = f"{w.name}.grad", where.rstrip(".")
                yield tensor_group("gradient", name, shape, dtype, "autograd", block, count, axes)

    def accumulated(self) -> Iterator[TensorGroup]:
        """Yield the gradients that a later micro-batch finds."""
        return self.gradients()

    def accumulated_bytes(self) -> int:
        """Return the bytes of gradients that a later micro-batch finds, without those in buffers of their own."""
        return 0 if self.run.grads or not self.run.accumulates else total_bytes(self.accumulated())

    def accumulates_in(self, phase: str) -> bool:
        """Whether accumulated gradients exist throughout a phase of a later micro-batch, not reduced unit by unit."""
        return True

    def reduction_buffers(self) -> Iterable[TensorGroup]:
        """Return what gradient reduction holds throughout. For a model with a workspace of its own, that workspace."""
        if not self.run.workspace:
            return ()
        source = "TransformerEngine 2.3 pytorch/module/base.py get_workspace"
        return (tensor_group("other", "workspace of Transformer Engine", self.run.workspace, "uint8", source),)

    # the optimizer's step

    def trained(self) -> list[Parameter]:
        """Return the parameters passed to the optimizer, in the model's order. A run of equal layers is its first layer
        and one entry for the others."""
        return self._trained

    @cached_property
    def _trained(self) -> list[Parameter]:
        return self._parameters(lambda w: w.trains)

    def _parameters(self, is_meant: Callable[[Weight], bool]) -> list[Parameter]:
        _, axes = operations_of(self.graph)
        out: list[Parameter] = []
        blocks: dict[str, list[tuple[Parameter, int]]] = {}
        # bitsandbytes 0.50 optim/optimizer.py check_overrides: a manager keeps by index what embeddings have. All that
        # steps in backward has one index, so after a decoder's embeddings the encoder's weights are treated alike.
        tables = trained_tables(self.graph) if self.run.in_backward and self.graph.model.is_encoder_decoder else []
        last = max((i for i, _ in tables), default=0)
        for i, (w, count, where) in enumerate(weights_of(self.graph)):
            if not is_meant(w):
                continue
            embedding = self.run.trainer and (i < last or w.name in looked_up_weights(self.graph))
            target = w.matrix and not w.transposed and (self.run.projects_head or w.group != "lm_head")
            vocabulary = w.group in ("embedding", "lm_head")
            p = Parameter(f"{where}{w.name}", shape_of(w, axes), w.dtype, 1, embedding, target, vocabulary)
            if where:
                blocks.setdefault(where, []).append((p, count))
            else:
                out += [copy for block in blocks.values() for copy in with_copies(block)]
                out.append(p)
                blocks.clear()
        return [*out, *(copy for block in blocks.values() for copy in with_copies(block))]

    def memory_of(self, trained: list[Parameter], in_lists: bool = True) -> OptimizerMemory:
        """Return the memory of the run's optimizer for these parameters, in lists or one after another."""
        run, foreach = self.run, self.run.foreach if in_lists or not self.run.foreach else False
        return optimizer_memory(
            run.optimizer,
            trained,
            foreach=foreach,
            state_dtype=run.state_dtype,
            momentum=run.momentum,
            master=run.master,
            in_backward=run.in_backward,
            on_host=run.on_host and not run.ranks.knobs.optimizer,
        )

    def optimizer(self) -> OptimizerMemory:
        """Return the optimizer's memory. States made by its constructor are of parameters without gradients, too. If
        tensor parallelism shards weights whose gradients are whole, the update begins with a copy of the rank's parts.

        Source: torch 2.13 distributed/tensor/_dispatch.py redistribute_local_args.
        """
        memory = self.memory_of(self.trained())
        if memory.at_once:
            waiting = self.memory_of(self._parameters(lambda w: w.idle))
            memory = memory._replace(states=(*memory.states, *waiting.states))
        _, axes = operations_of(self.graph)
        of_graph = weights_of(self.graph)
        whole = [(w, n) for w, n, _ in of_graph if w.gradient and w.trains and w.group != "adapter"]
        local = sum(size(w.shape, w.dtype, axes)[1] * n for w, n in whole)
        if max(memory.first, memory.later) >= local or memory.frees_gradients or self.run.optimizer == "none":
            return memory
        scratch = "the rank's parts of whole gradients"
        return memory._replace(first=max(memory.first, local), later=max(memory.later, local), scratch=scratch)

    def clipping(self) -> int:
        """Return the bytes between backward and the update: norms of gradients, or gradients that are converted."""
        return clipping(self.trained()) if self.run.clips and not self.frees_gradients else 0

    def gradient_conversion(self) -> Iterable[TensorGroup]:
        """Return the temporaries while the gradients of the update are built from those of the passes."""
        return ()

    def host(self) -> Iterable[TensorGroup]:
        """Return what is offloaded to a rank's host memory."""
        return ()

    def host_shards(self) -> int:
        """Return the bytes of a rank's parts of weights in host memory, not rounded."""
        return 0

    def host_name(self, held: TensorGroup) -> str:
        """Return what a note on host memory calls the tensors."""
        return held.what

    # loading

    def own_loading_events(self, together: bool) -> Iterable[tuple[int, int]] | None:
        """Return what loading allocates and frees if that divides or copies weights. `together` is as in
        `loading_events`."""
        return None

    def loading_events(self, together: bool = False) -> Iterable[tuple[int, int]]:
        """Return what loading allocates and frees (see `memplan.program.loading.loading`). With `together`, equal
        tensors that are allocated and freed at once may be merged, as thousands of ranks have thousands of them.

        transformers' Trainer empties torch's cache before it prepares the model: transformers 4.51 to 5.24 trainer.py
        _inner_training_loop, accelerate 1.15 utils/memory.py release_memory.
        """
        own = self.own_loading_events(together)
        if own is not None:
            return own
        if self.graph.code == "torchtitan":  # allocates each part once, uninitialised: trainer.py to_empty
            return enumerate(h.bytes for h in self.weights() for _ in range(h.copies))
        events = loading(*self._loaded)
        return (*events, (EMPTIED, 0)) if self.run.trainer else events

    def loading_peak(self) -> int:
        """Return the peak bytes while the model loads."""
        own = self.own_loading_events(together=True)
        if own is not None:
            return most_at_once(own)
        return total_bytes(self.weights()) if self.graph.code == "torchtitan" else loading_peak(*self._loaded)

    @property
    def _loaded(self) -> tuple[Graph, ...]:
        """The models that are loaded, in order."""
        return (self.graph, *(other for _, other in other_models(self.graph)))

    def broadcasting(self, weights: int) -> int:
        """Return the peak bytes while ranks are sent `weights` bytes of the first one's; 0 if none are sent."""
        return 0

    def broadcast_buffers(self) -> Iterable[int]:
        """Return the bytes of buffers that take segments of their own while ranks are sent weights."""
        return ()

    def on_gpu(self, room: int) -> Structure:
        """Return the run on GPUs with `room` usable bytes."""
        return self.run

    def mixed_dtypes(self) -> tuple[str, ...]:
        """Return the dtypes of weights that must have one dtype to be sharded together, if they have several."""
        return ()

    # pipeline stages, whose weights may be gathered for all passes of a step

    def reductions(self) -> tuple[GradientReduction, ...]:
        """Return when each chunk's gradients are reduced, if that happens once at the end of its passes."""
        return ()

    def openings(self) -> tuple[PipelineMoment, ...]:
        """Return each chunk's first forward pass, if it gathers the chunk's weights for the step and can be the
        peak."""
        return ()

    def gathered(self, moment: PipelineMoment) -> Iterable[TensorGroup]:
        """Return the output of the all-gather for the moment's chunk, before it is copied into the weights."""
        return ()

    def reduced(self, moment: PipelineMoment) -> Iterable[TensorGroup]:
        """Return the weights and gradients of all chunks while the gradients of the moment's chunk are reduced."""
        return ()

    def held_at(self, moment: PipelineMoment, chunk: int) -> Iterable[TensorGroup]:
        """Return the whole weights and gradients of the rank's `chunk` at a moment, or the reduced gradients."""
        return ()

    def released(self) -> Counter[str]:
        """Return the bytes of each kind that the reduction of a chunk's gradients releases."""
        return Counter()

    # a replay of the allocations

    def late_gradients(self) -> frozenset[str]:
        """Return the names of weights outside of blocks whose gradients wait for the next gradient to be reduced."""
        return frozenset()

    def gathering(self) -> Gathering:
        """Return the weights that a pass gathers apart from its own operations."""
        return Gathering()

    def reduction_streams(self) -> Iterable[tuple[int, int]]:
        """Return the stream and bytes of each tensor that is allocated in backward to reduce gradients."""
        return ()

    def idle_in_streams(self) -> int:
        """Return the most bytes that can lie free in the pools of communication streams, where the compute stream
        cannot use them. A replay models the pools; a bound without a replay has to leave room for them."""
        return 0

    def step_messages(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the output of the largest all-gather and the input of the largest reduce-scatter of a step, if weights
        are gathered for a step."""
        return (), ()

    # saving

    def gathers_to_save(self, states: str) -> Iterator[Saved]:
        """Yield what each gather of a full state dict holds on the GPU. `states` is the widest dtype of optimizer
        states that are saved too, if any."""
        return iter(())

    def saved_bytes(self, states: int) -> int:
        """Return the host bytes of a full state dict: of the weights or of the optimizer's states, which are written
        one after the other. `states` are the rank's bytes of those that are saved."""
        return 0


class DataParallel(Sharding):
    """One of several equal ranks, which reduce their gradients.

    With gradient_as_bucket_view gradients are views of the buckets. If only a step's last micro-batch reduces, that is
    true of that micro-batch alone.
    """

    def __init__(self, run: Structure) -> None:
        super().__init__(run)
        self.gradients_in_buckets = run.ranks.views
        self.sends_gradients = run.ranks.views and not run.ranks.delayed

    def accumulated(self) -> Iterator[TensorGroup]:
        return iter(()) if self.sends_gradients else super().accumulated()

    def reduction_buffers(self) -> Iterable[TensorGroup]:
        return super().reduction_buffers() or [
            tensor_group("other", "bucket of gradients", bytes_, "uint8", BUCKETS_SOURCE, copies=count)
            for bytes_, count in buckets(self._parameters(lambda w: w.requires_grad))
        ]

    def broadcasting(self, weights: int) -> int:
        return 0 if self.run.buffers else weights + min(weights, BROADCASTS * BROADCAST)

    def broadcast_buffers(self) -> Iterable[int]:
        """Return the buffers if torch records NCCL's stream for them: the process runs ahead of that stream, so each
        is freed before it is sent, and all of them together are as large as the weights that are copied. A first
        weight as large as a buffer, such as the embeddings, is sent as it is.

        Source: torch 2.7 csrc/distributed/c10d/comm.cpp broadcast_coalesced, flatten_dense_tensors,
        c10/cuda/CUDACachingAllocator.cpp free.
        """
        if not self.ranks.records_streams:
            return ()
        first = next((held.bytes for held in self.weights()), 0)
        full, rest = divmod(total_bytes(self.weights()) - first * (first >= BROADCAST), BROADCAST)
        return [BROADCAST] * full + [rest] * bool(rest)

    def on_gpu(self, room: int) -> Structure:
        """Return the run on GPUs with `room` usable bytes. On a full one torch waits until buffers have been sent."""
        records = self.ranks.records_streams and 2 * total_bytes(self.weights()) <= room
        return self.run._replace(ranks=self.ranks._replace(records_streams=records))


def with_copies(block: Iterable[tuple[Parameter, int]]) -> list[Parameter]:
    """Return the parameters of a block, then those of the blocks like it, given the number of all these blocks."""
    block = list(block)
    return [*(p for p, _ in block), *(p._replace(copies=n - 1) for p, n in block if n > 1)]


def stepped_on_host(memory: OptimizerMemory) -> OptimizerMemory:
    """Return the memory of an optimizer whose states and update are in host memory."""
    states = tuple(s._replace(bytes=0, host=True) for s in memory.states)
    return memory._replace(states=states, first=0, later=0, scratch="", foreach_lists=())
