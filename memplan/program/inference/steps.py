"""The passes of an inference run, in order."""

from __future__ import annotations

from memplan.catalogue.quantization.packed_kernels import MANY_ROWS
from memplan.program.inference.passes import Step, decoder_steps, encoder_step, over_source
from memplan.program.run import Decided


def steps_of(decided: Decided) -> tuple[Step, ...]:
    """The passes of a run, in order: of those that decode, the first and the last."""
    graph, batch = decided.structure.graph, decided.batch
    assert graph.inference is not None
    if decided.assistant is not None:
        from memplan.program.inference import assisted

        return assisted.steps_of(decided)
    many, now = MANY_ROWS.get(graph.inference.loaded.backend, 0), graph.inference
    if many and batch.micro * decided.beams * min(decided.part or batch.sequence, batch.sequence) >= many:
        now = now._replace(unpacks=True)
        graph = graph._replace(inference=now)
    if not now.generates:
        return (Step(graph, batch.micro, batch.sequence),)
    if graph.model.is_encoder_decoder:
        return (encoder_step(decided), *decoder_steps(over_source(graph), decided))
    return decoder_steps(graph, decided)
