"""The degrees that divide a run among GPUs by something else than its data: who computes which part of it."""

from __future__ import annotations

from typing import NamedTuple


class Degrees(NamedTuple):
    """Which part of the model and of a sequence one rank computes.

    tp                 ranks that divide each matrix; `sequence_parallel`: they divide the sequence between matrices too
    cp, context        ranks that divide the sequence, and how they attend to all of it: ring, ulysses
    ep, etp            ranks that divide the experts, and each expert's matrices
    imbalance          rows that the rank receives of those that it sends to others' experts, in thousandths
    pp, stage          stages of a pipeline, and this rank's, the first being 0
    virtual_stages     chunks of layers that a stage has
    layers             how many of the model's each stage has, in order; of several chunks each is a stage here
    style              whose tensor parallelism it is: transformers, megatron
    """

    tp: int = 1
    sequence_parallel: bool = False
    cp: int = 1
    context: str = "ring"
    ep: int = 1
    etp: int = 1
    imbalance: int = 1000
    pp: int = 1
    stage: int = 0
    virtual_stages: int = 1
    layers: tuple[int, ...] = ()
    style: str = "transformers"

    @property
    def of_all_layers(self) -> Degrees:
        """The same of a model whose layers no stages divide."""
        return self._replace(pp=1, stage=0, virtual_stages=1, layers=())

    @property
    def chunks(self) -> tuple[Degrees, ...]:
        """The degrees of each of a rank's chunks of layers, as if it were a stage by itself."""
        pp = self.pp * self.virtual_stages
        stages = range(self.stage, pp, self.pp)
        return tuple(self._replace(pp=pp, stage=stage, virtual_stages=1) for stage in stages)


WHOLE = Degrees()
