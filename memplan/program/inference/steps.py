"""The passes of an inference run, in order."""

from __future__ import annotations

from memplan.catalogue.quantization.packed_kernels import MANY_ROWS
from memplan.program.inference.passes import InferenceStep, decoder_graph, decoder_steps, encoder_step
from memplan.program.run import ResolvedRun


def steps_of(decided: ResolvedRun) -> tuple[InferenceStep, ...]:
    """Return the passes of a run, in order. Of the decoding passes only the first and the last."""
    graph, batch = decided.structure.graph, decided.batch
    assert graph.inference is not None
    if decided.assistant is not None:
        from memplan.program.inference import assisted

        return assisted.steps_of(decided)
    min_rows, inference_pass = MANY_ROWS.get(graph.inference.loaded.backend, 0), graph.inference
    if min_rows and batch.micro * decided.beams * min(decided.part or batch.sequence, batch.sequence) >= min_rows:
        inference_pass = inference_pass._replace(unpacks=True)
        graph = graph._replace(inference=inference_pass)
    if not inference_pass.generates:
        return (InferenceStep(graph, batch.micro, batch.sequence),)
    if graph.model.is_encoder_decoder:
        return (encoder_step(decided), *decoder_steps(decoder_graph(graph), decided))
    return decoder_steps(graph, decided)
