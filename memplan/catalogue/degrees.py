"""The parallel degrees that divide the model or a sequence among GPUs. Data parallelism is not one of them."""

from __future__ import annotations

from memplan.core.records import NamedTuple


class Degrees(NamedTuple):
    """Which part of the model and of a sequence one rank computes.

    tp                 ranks that divide each matrix
    sequence_parallel  the tensor-parallel ranks also divide the sequence between matrices
    cp                 ranks that divide the sequence
    context            how those ranks attend to all of it: `ring` or `ulysses`
    ep                 ranks that divide the experts
    etp                ranks that divide each expert's matrices
    imbalance          rows a rank receives per thousand rows it sends to other ranks' experts
    pp                 stages of the pipeline
    stage              this rank's stage, counted from 0
    virtual_stages     chunks of layers per stage
    layers             number of model layers in each stage, in order; with several chunks, in each chunk
    style              whose tensor parallelism: `transformers` or `megatron`
    divides_rank       of `megatron`: ranks divide both halves of an adapter, not only the half that its layer divides
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
    divides_rank: bool = True

    @property
    def without_pipeline(self) -> Degrees:
        """The same degrees without pipeline parallelism: one stage holds all layers."""
        return self._replace(pp=1, stage=0, virtual_stages=1, layers=())

    @property
    def chunks(self) -> tuple[Degrees, ...]:
        """The degrees of each of the rank's chunks of layers, each treated as a stage of its own."""
        pp = self.pp * self.virtual_stages
        stages = range(self.stage, pp, self.pp)
        return tuple(self._replace(pp=pp, stage=stage, virtual_stages=1) for stage in stages)


WHOLE = Degrees()
