"""Peak of each inference phase, on the GPU with the most, and the tensors alive at it.

The weights are loaded, then the model runs forward: once, or over a prompt and token by token. Nothing trains. The
passes come from `memplan.program.inference.passes`, what torch reserves for them from
`memplan.program.inference.replay`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from memplan.catalogue.hardware.overhead import cublas_workspace, cuda_context, nccl
from memplan.catalogue.parallelism.device_map_packing import HOST
from memplan.catalogue.parallelism.device_maps import ModulePlacement
from memplan.core.cached_property import cached_property
from memplan.core.units import ITEMSIZE
from memplan.engine.allocator import SMALL_REQUEST, Allocator
from memplan.engine.walk import alive
from memplan.estimate.answer import Bytes, Line, Peak, Phase, Rank, Verdict
from memplan.estimate.lines import alive_lines, held_line
from memplan.estimate.usage import Usage, process_overhead
from memplan.program.graph import (
    Graph,
    active_elements,
    elements,
    lower_inference,
    operations_of,
    parameters_of,
    recorded_inference,
)
from memplan.program.graph import weights_of as graph_weights
from memplan.program.inference.passes import (
    InferenceStep,
    PassPeak,
    bytes_of,
    compresses,
    live,
    numbers_of,
    pass_peak,
    token_after,
)
from memplan.program.inference.replay import InferenceReplay, load
from memplan.program.inference.steps import steps_of
from memplan.program.run import ResolvedRun

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration


class InferenceWalk(NamedTuple):
    """The peaks of a run: of loading, and of every pass.

    steps       the passes
    axes        the axes of each pass
    peaks       the peak of each pass
    parameters  bytes of weights and buffers
    unsplit     bytes torch counts in addition, because it did not split their blocks
    loading     peak bytes while the weights are loaded
    workspace   bytes of cuBLAS's workspace
    """

    decided: ResolvedRun
    steps: tuple[InferenceStep, ...]
    axes: tuple[dict[str, int], ...]
    peaks: tuple[PassPeak, ...]
    parameters: int
    unsplit: int
    loading: int
    workspace: int

    @property
    def graph(self) -> Graph:
        """A graph with all the weights of the model."""
        return model_graph(self.decided, self.steps)

    @property
    def models(self) -> tuple[Graph, ...]:
        """The graphs whose weights are loaded, the model's first."""
        return models_of(self.decided, self.steps)

    @property
    def resident_bytes(self) -> int:
        """Bytes held throughout all passes."""
        return self.parameters + self.unsplit + self.workspace

    @property
    def host(self) -> int:
        """Bytes of weights in host memory."""
        graph = self.steps[0].graph
        if graph.placed is None:
            return 0
        on_host = graph._replace(placed=graph.placed._replace(card=HOST))
        return sum(h.bytes * h.copies for h in parameters_of(on_host))

    @property
    def phases(self) -> list[Phase]:
        """The peak of every phase."""
        out = [Phase("load", None, self.loading, "")]
        for name in dict.fromkeys(step.phase for step in self.steps):
            i = self._top(name)
            low = lower_inference(self.steps[i].graph)
            peak = self.resident_bytes + self.peaks[i].bytes
            where = low.moments[self.peaks[i].moment].where
            out.append(Phase(name, None, peak, f"assistant: {where}" if self.steps[i].assists else where))
        return out

    @property
    def host_bytes(self) -> int:
        """Most bytes of an offloaded cache in host memory: all layers but the first, which is back by the end.

        The memory is pinned, and torch rounds pinned memory up to a power of two.

        Source: torch 2.13 ATen/core/CachingHostAllocator.h; aten/src/ATen/native/TensorConversions.cpp _to_copy pins
        non-blocking copies to the host.
        """
        last, graph = self.steps[-1], self.steps[-1].graph
        one_pass = graph.inference
        if one_pass is None or not one_pass.cache.startswith("offloaded"):
            return 0
        from memplan.catalogue.inference.caches import LayerCache, caches

        width, tokens = ITEMSIZE[graph.recipe.compute], last.room if one_pass.static else last.past + last.fed

        def pinned(layer: LayerCache) -> int:
            sizes = (
                last.batch * p.entries(tokens, layer.last, 0) * p.elements for p in layer.parts if p.per == "token"
            )
            return sum(1 << (n * width - 1).bit_length() for n in sizes if n)

        layers = [layer for layer in caches(graph.model) if layer.token_elements]
        sent = [pinned(layer) for layer in layers if not one_pass.static or layer.window is None]
        return sum(sent) - sent[0] if len(sent) > 1 else sum(sent)

    def left(self, step: InferenceStep, axes: Mapping[str, int]) -> list[tuple[str, int]]:
        """Return what a pass leaves for the next one, as names with the bytes of all tensors of that name."""
        low = lower_inference(step.graph, labelled=True)
        sizes = bytes_of(low, {**operations_of(step.graph)[1], **axes})
        alive_ = alive(low.left, low.runs, {**operations_of(step.graph)[1], **axes})
        return [(low.sizes[key][5], sizes[key] * count) for key, count in alive_.items() if count]

    def counts(self, phase: str) -> Iterator[dict[int, int]]:
        """Yield for every moment of a phase how many tensors of each size in bytes are alive."""
        for step, axes in zip(self.steps, self.axes, strict=True):
            if step.phase != phase:
                continue
            low = lower_inference(step.graph)
            sizes = bytes_of(low, axes)
            for moment in low.moments:
                tally: dict[int, int] = {}
                for key, count in alive(moment, low.runs, axes).items():
                    tally[sizes[key]] = tally.get(sizes[key], 0) + count
                yield tally

    def _top(self, phase: str) -> int:
        """Return the index of the pass with the peak of a phase."""
        return max((i for i, s in enumerate(self.steps) if s.phase == phase), key=lambda i: self.peaks[i].bytes)

    def lines(self, phase: str) -> list[Line]:
        """Return every tensor alive at a phase's peak, largest first."""
        out: list[Line] = []
        for graph in self.models:
            whose = "assistant" if out else "model"
            axes = {**operations_of(graph)[1], **({} if out else self.axes[0])}
            weights = (
                held_line(h, axes, f"a buffer of the {whose}" if h.kind == "buffer" else f"the {whose}'s weights")
                for h in parameters_of(graph)
            )
            out += map(_assistants, weights) if out else weights
        if self.unsplit:
            what, why = "left unsplit", "torch leaves up to 1 MiB at the end of a weight's block"
            out.append(Line(what, "other", "torch", "", (), "uint8", 1, self.unsplit, why, _UNSPLIT, "derived"))
        if phase == "load":
            extra = self.loading - self.parameters - self.unsplit
            what = "weights before conversion, beyond the converted ones"
            out += [Line(what, "temp", "", "", (), "", 1, extra, "loading", "", "derived")] if extra > 0 else []
        else:
            i = self._top(phase)
            capability = self.decided.gpu.compute_capability if self.decided.gpu else None
            row = cublas_workspace(capability)
            why = "one for each thread that multiplies matrices"
            workspace = Line(row.what, "other", "torch", "", (), "uint8", 1, row.usual, why, row.source, row.basis)
            low = lower_inference(self.steps[i].graph, labelled=True)
            moment = low.moments[self.peaks[i].moment]
            stack, fixed = operations_of(self.steps[i].graph)
            lines = alive_lines(stack, {**fixed, **self.axes[i]}, low, moment)
            out += [
                workspace,
                *(map(_assistants, lines) if self.steps[i].assists else lines),
                *self._held_lines(self.steps[i]),
            ]
        return sorted((line for line in out if line.bytes), key=lambda line: (-line.bytes, line.where, line.what))

    def _held_lines(self, step: InferenceStep) -> Iterator[Line]:
        """Yield what is held around a pass: tensors the loop keeps references to, and the other model's cache."""
        yield from (held_line(h, {}, "the loop keeps a reference to it") for h in step.loop_tensors)
        if step.other is not None:
            axes = numbers_of(step.other, self.decided)
            low = lower_inference(step.other.graph, labelled=True)
            stack, own = operations_of(step.other.graph)
            lines = alive_lines(stack, {**own, **axes}, low, low.left)
            yield from map(_assistants, lines) if step.other.assists else lines


def _assistants(line: Line) -> Line:
    """Return a line labelled as the assistant's."""
    return line._replace(where=f"assistant.{line.where}".removesuffix("."))


def walk(decided: ResolvedRun, expandable: bool = False) -> InferenceWalk:
    """Return the peak of every phase. `expandable`: torch's allocator uses expandable segments."""
    steps = steps_of(decided)
    axes = tuple(numbers_of(step, decided) for step in steps)
    peaks = [_peak_of(step, numbers, decided) for step, numbers in zip(steps, axes, strict=True)]
    resident, unsplit, most = loaded(models_of(decided, steps), expandable)
    workspace = cublas_workspace(decided.gpu.compute_capability if decided.gpu else None).usual
    return InferenceWalk(decided, steps, axes, tuple(peaks), resident, unsplit, most, workspace)


def _peak_of(step: InferenceStep, numbers: dict[str, int], decided: ResolvedRun) -> PassPeak:
    """Return the peak of a pass, including what is held around it."""
    most = pass_peak(step.graph, numbers)
    return most._replace(bytes=most.bytes + held_around_pass(step, decided))


def held_around_pass(step: InferenceStep, decided: ResolvedRun) -> int:
    """Return the bytes held throughout a pass that are not its own."""
    held = sum(h.bytes * h.copies for h in step.loop_tensors)
    if step.other is None:
        return held
    axes = numbers_of(step.other, decided)
    low = lower_inference(step.other.graph)
    return held + live(low, low.left, axes, bytes_of(low, axes))


def models_of(decided: ResolvedRun, steps: tuple[InferenceStep, ...]) -> tuple[Graph, ...]:
    """Return the graphs whose weights are loaded: the model's, and that of an assistant with its own weights."""
    assistant = decided.assistant
    if assistant is None or assistant.drafts is None or assistant.shares:
        return (model_graph(decided, steps),)
    return decided.structure.graph, assistant.drafts.structure.graph


def model_graph(decided: ResolvedRun, steps: tuple[InferenceStep, ...]) -> Graph:
    """Return the graph with all the weights of the model, even if a pass only runs the encoder or the decoder."""
    return (
        decided.structure.graph if decided.assistant or steps[0].graph.wiring.encoder_decoder_half else steps[0].graph
    )


_UNSPLIT = "torch 2.13 c10/cuda/CUDACachingAllocator.cpp should_split: the rest of an unsplit block counts as allocated"


@lru_cache(maxsize=512)
def loaded(graphs: tuple[Graph, ...], expandable: bool) -> tuple[int, int, int]:
    """Return the bytes of weights and buffers, those torch counts in addition for unsplit blocks, and the loading peak.

    The models are loaded one after the other.
    """
    allocator = Allocator(expandable)
    resident = sum(h.bytes * h.copies for graph in graphs for h in parameters_of(graph))
    for graph in graphs:
        load(graph, allocator)
    return resident, allocator.allocated - resident, allocator.peak_allocated


@lru_cache(maxsize=512)
def inference_parameters(graph: Graph) -> tuple[int, int, int]:
    """Return the total, trainable (0) and active parameters."""
    graph = graph._replace(placed=None)
    _, axes = operations_of(graph)
    weights = [(w, n) for w, n, _ in graph_weights(graph) if w.group not in ("adapter", "buffer")]
    return sum(elements(w, axes) * n for w, n in weights), 0, sum(active_elements(w, axes) * n for w, n in weights)


class InferenceDetails(NamedTuple):
    """The ledger, timeline and ranks of an inference answer."""

    walked: InferenceWalk
    peak: str
    expandable: bool = False
    calibration: Calibration | None = None

    def lines(self) -> Iterable[Line]:
        return self.walked.lines(self.peak)

    def moments(self) -> Iterator[Phase]:
        w = self.walked
        for step, axes in zip(w.steps, w.axes, strict=True):
            low, held_bytes = lower_inference(step.graph), held_around_pass(step, w.decided)
            sizes = bytes_of(low, axes)
            for moment in low.moments:
                bytes_ = w.resident_bytes + held_bytes + live(low, moment, axes, sizes)
                yield Phase(moment.phase, None, bytes_, moment.where)

    def ranks(self) -> Iterable[Rank]:
        decided = self.walked.decided
        placed = decided.structure.graph.placed
        if placed is None or placed.cards == 1:
            return
        by_kinds: dict[tuple[int, ...], tuple[InferenceWalk, Usage]] = {}
        for on_card in each_gpu(decided):
            kinds = layer_kinds_alone(on_card)
            if kinds not in by_kinds:
                walked = walk(on_card, self.expandable)
                by_kinds[kinds] = walked, usage_of(walked, self.expandable, self.calibration)
            walked, usage = by_kinds[kinds] if kinds else by_kinds.pop(kinds)
            top = max(walked.phases, key=lambda phase: phase.peak)
            graph, card = walked.decided.structure.graph, _placed(on_card).card
            offset = placed.layers.index(card) - placed.layers.index(_placed(walked.decided).card) if kinds else 0
            _, axes = operations_of(graph)
            weights = (pair for pair in graph_weights(graph) if pair[0].group not in ("adapter", "buffer"))
            yield Rank(
                card,
                sum(place == card for place in placed.layers),
                sum(elements(w, axes) * n for w, n, _ in weights),
                1,
                Bytes(usage),
                Peak(top.phase, shift_layer(top.where, offset)),
                Verdict(usage, decided.gpu.usable if decided.gpu else None),
            )


def shift_layer(where: str, further: int) -> str:
    """Return the same operation, `further` layers later."""
    return _LAYER.sub(lambda match: str(int(match[0]) + further), where, count=1)


_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def layer_kinds_alone(decided: ResolvedRun) -> tuple[int, ...]:
    """Return the kinds of the layers on a GPU that holds nothing else, or () for other GPUs.

    GPUs with equal kinds hold the same.
    """
    graph, placed = decided.structure.graph, _placed(decided)
    ends = {0, placed.rotary, placed.embeds, *(card for _, card in (*placed.before, *placed.after))}
    if placed.card in ends:
        return ()
    stack, axes = operations_of(graph._replace(placed=None))
    kinds = [id(block) for run in stack.runs for _ in range(axes[run.times]) for block in run.blocks]
    return tuple(kind for kind, card in zip(kinds, placed.layers, strict=True) if card == placed.card)


def each_gpu(decided: ResolvedRun) -> Iterator[ResolvedRun]:
    """Yield the run on each GPU that holds modules."""
    structure = decided.structure
    placed = _placed(decided)
    for card in range(placed.cards):
        graph = structure.graph._replace(placed=placed._replace(card=card))
        yield decided._replace(structure=structure._replace(graph=graph))


def walk_fullest_gpu(decided: ResolvedRun, stage: int | None, expandable: bool) -> InferenceWalk:
    """Return the run on the GPU with the most, or on the one the run asks for."""
    placed = decided.structure.graph.placed
    if placed is None or placed.cards == 1 or stage is not None:
        return walk(decided, expandable)
    walks = [walk(on_card, expandable) for on_card in _may_be_worst(decided)]
    walks.sort(key=lambda walked: -max(phase.peak for phase in walked.phases))
    if decided.gpu is None:
        return walks[0]
    return max(walks, key=lambda walked: _ORDER.index(usage_of(walked, expandable, None).answer or ""))


def _may_be_worst(decided: ResolvedRun) -> Iterator[ResolvedRun]:
    """Yield the GPUs that may hold the most: the first, the last, and the largest that only has layers."""
    first, *others = each_gpu(decided)
    *middle, last = others
    yield first
    if middle:
        yield max(middle, key=lambda on_card: loaded((on_card.structure.graph,), False)[0])
    yield last


_ORDER = ("", "fits", "tight", "does not fit")  # answers from best to worst; what torch reserves differs by GPU


def _placed(decided: ResolvedRun) -> ModulePlacement:
    placed = decided.structure.graph.placed
    assert placed is not None
    return placed


def usage_of(walked: InferenceWalk, expandable: bool, calibration: Calibration | None) -> Usage:
    """Return what the run takes of its GPU."""
    decided = walked.decided
    capability = decided.gpu.compute_capability if decided.gpu else None
    overhead = process_overhead(cuda_context(capability), calibration, nccl(decided.communicators))
    phases = walked.phases
    top = max(phase.peak for phase in phases)
    return Usage(LazyReplay(walked, expandable), walked.parameters, phases[0].peak, top, decided.gpu, overhead)


class LazyReplay:
    """A replay that lists its passes only when asked for, because that takes longer than their peaks."""

    is_long = False  # long runs only replay some of their passes

    def __init__(self, walked: InferenceWalk, expandable: bool) -> None:
        self._of = walked, expandable

    @cached_property
    def _replay(self) -> InferenceReplay:
        return replay(*self._of)

    def reserved(self, capacity: int | None = None) -> int | None:
        return self._replay.reserved(capacity)

    def free_in_other_streams(self) -> int:
        return 0

    def unreplayed_bytes(self) -> int:
        return 0


_MIN_DECODING, _MAX_DECODING = 8, 32  # decoding passes to replay
PREFILL_EVENTS = 400_000  # allocations and frees of prompt passes to replay


def replay(walked: InferenceWalk, expandable: bool) -> InferenceReplay:
    """Return the passes to replay: for decoding, a few evenly spread ones.

    What torch reserves for caches that grow by a token, each in its own block, depends on how often they are
    reallocated. A block is up to 1 MiB larger than requested; a cache that outgrows it takes another, and no later one
    fits the old. So about one pass per block is replayed, at most 32: replaying 32 of 511 passes was within 1.4 % of
    replaying all.
    """
    steps = walked.steps
    if walked.decided.assistant is not None:
        from memplan.program.inference import assisted

        steps = assisted.steps_of(walked.decided, replayed=True)
    prefill = [step for step in steps if step.phase == "prefill"]
    if len(prefill) > 2 * _MIN_DECODING and walked.decided.assistant is None:
        kept = {id(step) for step in _spread(prefill)}
        steps = tuple(step for step in steps if step.phase != "prefill" or id(step) in kept)
    decoding = [step for step in steps if step.phase == "decode"]
    if walked.decided.assistant is None and len(decoding) > 1:
        first, last = decoding[0], decoding[-1]
        wanted = min(_MAX_DECODING, max(_MIN_DECODING, _growth(walked) // SMALL_REQUEST + 2))
        count = min(wanted, last.past - first.past + 1)
        pasts_between = [first.past + (last.past - first.past) * i // (count - 1) for i in range(1, count - 1)]
        one_pass = last.graph.inference
        is_quantised = one_pass is not None and one_pass.stored is not None
        if is_quantised or compresses(last.graph):  # some passes requantise the cache, or fill a window
            pasts = sorted({*pasts_between, *(step.past for step in decoding)})
            chosen = [token_after(past, walked.decided) for past in pasts]
        else:
            window = walked.decided.structure.graph.model.sliding_window or last.past + 1
            chosen = [
                last._replace(past=n, past_window=min(n, window), window=min(n + 1, window)) for n in pasts_between
            ]
            chosen = [first, *chosen, last]
        steps = (*(step for step in steps if step.phase != "decode"), *chosen)
    axes = tuple(tuple(numbers_of(step, walked.decided).items()) for step in steps)
    return InferenceReplay(walked.models, steps, axes, walked.workspace, expandable)


def _spread(reading: list[InferenceStep]) -> list[InferenceStep]:
    """Return the passes that read the prompt: all, or if that takes long the first, the last and some between."""
    events = sum(recorded_inference(step.graph).length for step in reading)
    count = max(_MIN_DECODING, PREFILL_EVENTS * len(reading) // events)
    first, middle, last = reading[:2], reading[2:-2], reading[-2:]
    if count >= len(middle):
        return reading
    return [*first, *(middle[i * len(middle) // count] for i in range(count)), *last]


def _growth(walked: InferenceWalk) -> int:
    """Return by how many bytes the largest cache tensor grows between the first and the last decoding pass."""
    first, *_, last = (step for step in walked.steps if step.phase == "decode")
    low = lower_inference(last.graph)
    at_first = last._replace(past=first.past, past_window=first.past_window, window=first.window)
    then, now = (bytes_of(low, numbers_of(step, walked.decided)) for step in (at_first, last))
    return max((now[key] - then[key] for key in alive(low.left, low.runs, walked.axes[-1])), default=0)
