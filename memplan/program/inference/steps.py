"""The passes of an inference run, in order."""

from __future__ import annotations

from memplan.catalogue.quantization.packed_kernels import MANY_ROWS
from memplan.engine.walk import counts_at_each
from memplan.program.graph import Graph, TensorGroup, lower_inference, operations_of, tensor_group
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
        encoder = encoder_step(decided)
        decoder = decoder_steps(decoder_graph(graph), decided)
        if inference_pass.spans_autocast:
            casts = _casts_left(encoder.graph)
            decoder = tuple(step._replace(loop_tensors=casts) for step in decoder)
        return (encoder, *decoder)
    return decoder_steps(graph, decided)


def _casts_left(encoder: Graph) -> tuple[TensorGroup, ...]:
    """Return the casts of an encoder's weights, which an autocast context around all passes keeps from its pass on."""
    assert encoder.inference is not None
    spanned = encoder._replace(inference=encoder.inference._replace(spans_autocast=True))
    low, axes = lower_inference(spanned, labelled=True), operations_of(spanned)[1]
    left = next(counts_at_each((low.left,), low.runs, axes, range(len(low.sizes))))
    return tuple(
        tensor_group(kind, name, shape, dtype, source, where, left[i], axes)
        for i, (shape, dtype, kind, where, _, name, source) in enumerate(low.sizes)
        if left[i] and name.startswith("autocast(")
    )
