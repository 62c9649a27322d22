"""The structure of a training run: everything that decides which tensors exist and when they are alive."""

from __future__ import annotations

from memplan.catalogue.parallelism.pipeline import ENGINES
from memplan.core.records import NamedTuple
from memplan.program.graph import Graph, TensorGroup
from memplan.program.sharding.ranks import SINGLE_RANK, Ranks


class Pipe(NamedTuple):
    """How microbatches pass through a pipeline (see `memplan.catalogue.parallelism.pipeline`).

    engine        library that runs the pipeline, empty without one
    schedule      1f1b, gpipe or device_map
    microbatches  microbatches of one step
    """

    engine: str = ""
    schedule: str = ""
    microbatches: int = 1


class Structure(NamedTuple):
    """Everything in a run except batch and sequence: it decides which tensors exist and when they are alive.

    graph          operations of the forward and backward pass
    accumulates    a step has several micro-batches
    optimizer      name of the optimizer
    foreach        the optimizer steps lists of parameters; None for its default
    state_dtype    dtype of optimizer states, None for the optimizer's own
    momentum       momentum of the optimizer, None for its default
    in_backward    the optimizer steps inside backward
    grads          dtype of gradient buffers that exist throughout, None without such buffers
    master         dtype of master weights, None without them
    clips          gradients are clipped
    scales         a gradient scaler is used
    trainer        the script is transformers' Trainer
    projects_head  a low-rank optimizer projects the head's gradient, too
    holds_outputs  outputs that the script references stay alive in the optimizer step
    on_host        the optimizer's states and step are in host memory
    ranks          how ranks divide weights, gradients and states
    buffers        gradients live in buffers that ranks reduce in place, and no weights are broadcast
    workspace      bytes of a workspace that the model's own kernels hold throughout
    pipe           how microbatches pass through a pipeline
    engine         what a serving engine in the same process holds throughout
    """

    graph: Graph
    accumulates: bool
    optimizer: str
    foreach: bool | None = None
    state_dtype: str | None = None
    momentum: float | None = None
    in_backward: bool = False
    grads: str | None = None
    master: str | None = None
    clips: bool = True
    scales: bool = False
    trainer: bool = False
    projects_head: bool = True
    holds_outputs: bool = False
    on_host: bool = False
    ranks: Ranks = SINGLE_RANK
    buffers: bool = False
    workspace: int = 0
    pipe: Pipe = Pipe()
    engine: tuple[TensorGroup, ...] = ()

    @property
    def schedule(self) -> tuple[str, int, int, int, int]:
        """The pipeline's schedule, stages, this rank's stage, its chunks of layers, and the microbatches of a step."""
        d, pipe = self.graph.degrees, self.pipe
        return pipe.schedule, d.pp, d.stage, d.virtual_stages, pipe.microbatches

    @property
    def is_one_process(self) -> bool:
        """Whether one process runs all stages of a pipeline, each on its own GPU."""
        return bool(self.pipe.engine) and ENGINES[self.pipe.engine].moves_tensors


def chunks_of(structure: Structure) -> tuple[Structure, ...]:
    """Return each chunk of a pipeline rank's layers as a structure of its own."""
    graph = structure.graph
    return tuple(structure._replace(graph=graph._replace(degrees=chunk)) for chunk in graph.degrees.chunks)
