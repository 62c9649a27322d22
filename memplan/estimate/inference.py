"""The walk of an inference run: the peak of each phase, on the GPU with the most, and the tensors alive at it.

The weights are loaded, then the model runs forward: once, or over a prompt and token by token. Nothing trains. The
passes come from `memplan.program.inference.passes`, what torch reserves for them from
`memplan.program.inference.replay`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from memplan.catalogue.hardware.overhead import cublas_workspace
from memplan.catalogue.parallelism.device_map_packing import HOST
from memplan.core.cached_property import cached_property
from memplan.core.units import ITEMSIZE
from memplan.engine.allocator import SMALL_REQUEST
from memplan.engine.native import exact, new_allocator
from memplan.engine.walk import alive
from memplan.estimate.answer import Host, HostPhase, Line, Parameters, Phase, Rank, Walk, largest_first
from memplan.estimate.lines import held_line, pass_lines, workspace_line
from memplan.estimate.usage import Usage
from memplan.program.graph import Graph, bytes_of_kinds, operations_of, parameters_of, recorded_inference
from memplan.program.graph import weights_of as graph_weights
from memplan.program.inference import gpus
from memplan.program.inference.passes import InferenceStep, SizedPass, compresses, sized, token_after
from memplan.program.inference.replay import InferenceReplay, load, reserved
from memplan.program.inference.steps import steps_of
from memplan.program.run import ResolvedRun
from memplan.program.weight_sizes import active_elements, elements
from memplan.resolve.batches import check_batch
from memplan.spec.run import RunSpec

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration


class InferenceWalk(Walk):
    """The walk of a run that does not train, on one GPU.

    passes     the passes
    peaks      peak bytes of each pass, with what is held around it
    models     the graphs whose weights are loaded, the model's first
    resident   bytes of weights and buffers
    unsplit    bytes torch counts in addition, because it did not split their blocks
    workspace  bytes of cuBLAS's workspace
    """

    def __init__(self, run: RunSpec, decided: ResolvedRun) -> None:
        self.run, self.decided, self.gpu = run, decided, decided.gpu
        self.communicators = decided.communicators
        self.passes = tuple(sized(step, decided) for step in steps_of(decided))
        self.models = models_of(decided, self.passes[0].step)
        self.resident, self.unsplit, self.load = loaded(self.models, run.loop.expandable_segments)
        self.workspace = cublas_workspace(decided.gpu.compute_capability if decided.gpu else None).usual
        self._tops = [each.peak for each in self.passes]
        tops = zip(self._tops, self.passes, strict=True)
        self.peaks = [top.bytes + self._held_bytes(each.step) for top, each in tops]
        self.phases = [
            Phase("load", None, self.load, ""),
            *map(self._phase, dict.fromkeys(p.phase for p in self.passes)),
        ]

    def _phase(self, name: str) -> Phase:
        i = self._fullest(name)
        where = f"assistant: {self._tops[i].where}" if self.passes[i].step.assists else self._tops[i].where
        return Phase(name, None, self.persistent_bytes + self.peaks[i], where)

    def _fullest(self, phase: str) -> int:
        """Return the index of the pass with the peak of a phase."""
        return max((i for i, each in enumerate(self.passes) if each.phase == phase), key=self.peaks.__getitem__)

    @property
    def persistent_bytes(self) -> int:
        """Bytes held throughout all passes."""
        return self.resident + self.unsplit + self.workspace

    @classmethod
    def fullest(cls, walks: Sequence[Walk]) -> Walk:
        """Return the walk of the GPU with the worst verdict, and of equals the one with the largest peak.

        What torch reserves differs by GPU.
        """
        by_peak = sorted(((walk, walk.usage(None)) for walk in walks), key=lambda each: each[0].peak, reverse=True)
        full = [(walk, usage) for walk, usage in by_peak if not usage.fits]
        if len(full) < 2:  # how badly a single one fails does not matter
            return (full or by_peak)[0][0]
        return next((walk for walk, usage in full if not usage.may_fit), full[0][0])

    def _temporaries(self, passes: Iterable[SizedPass]) -> int:
        """Return the most bytes that one of the passes frees before it ends, if the run is compiled."""
        compiled = passes if self.run.kernels.compile else ()
        return max((each.peak.bytes - each.bytes_left() for each in compiled), default=0)

    @property
    def compiled_away(self) -> int:
        """Temporaries of the pass with the peak, without the logits that it returns."""
        if not self.run.kernels.compile:
            return 0
        returned = sum(line.bytes for line in self.lines(self.top) if line.what == "logits")
        return max(self._temporaries([self.passes[self.peaks.index(max(self.peaks))]]) - returned, 0)

    @property
    def compiled_more(self) -> int:
        """Temporaries of a compiled pass, which CUDA graphs keep in a pool of their own: all but the prefill."""
        return self._temporaries(each for each in self.passes if each.phase != "prefill")

    @property
    def parts(self) -> Mapping[str, object]:
        graph, parallelism = self.decided.structure.graph, self.run.parallelism
        parts: dict[str, object] = {**self.decided.parts, "objective": graph.model.objective}
        if graph.placed is not None:
            device_map = parallelism.device_map or "auto"
            parts["parallelism"] = parallelism.model_copy(update={"stage": graph.placed.card, "device_map": device_map})
        return parts

    @property
    def parameters(self) -> Parameters:
        return inference_parameters(self.models[0])

    def notes(self) -> Iterator[str]:
        yield from self.decided.notes
        if self.run.kernels.compile:
            yield (
                "torch.compile: counted as eager code; the range goes down to no temporaries, and up by those of one "
                "decoding step or forward pass, which CUDA graphs (mode reduce-overhead) keep apart; assumed"
            )
        note = check_batch(self.decided.batch, self.decided.structure.graph.model)
        yield from (note,) if note else ()

    @property
    def host_bytes(self) -> int:
        return self._weights_on_host + self._cache_on_host

    def host(self) -> Host:
        if not self._cache_on_host:
            return super().host()
        return Host(1, (HostPhase("decode", self.host_bytes, self.host_bytes, 0),))

    @property
    def _weights_on_host(self) -> int:
        """Bytes of weights in host memory."""
        structure = self.decided.structure
        structure = structure._replace(graph=self.passes[0].step.graph)
        return gpus.weight_bytes(gpus.on_device(structure, HOST)) if structure.graph.placed is not None else 0

    @cached_property
    def _cache_on_host(self) -> int:
        """Most bytes of an offloaded cache in host memory: all layers but the first, which is back by the end.

        The memory is pinned, and torch rounds pinned memory up to a power of two.

        Source: torch 2.13 ATen/core/CachingHostAllocator.h; aten/src/ATen/native/TensorConversions.cpp _to_copy pins
        non-blocking copies to the host.
        """
        last = self.passes[-1].step
        graph = last.graph
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

    def counts(self, at: Phase) -> Iterator[dict[int, int]]:
        for each in self.passes:
            if each.phase == at.phase:
                yield from each.counts()

    def lines(self, at: Phase) -> list[Line]:
        out: list[Line] = []
        for graph in self.models:
            whose = "assistant" if out else "model"
            axes = {**operations_of(graph)[1], **({} if out else self.passes[0].axes)}
            weights = (
                held_line(h, axes, f"a buffer of the {whose}" if h.kind == "buffer" else f"the {whose}'s weights")
                for h in parameters_of(graph)
            )
            out += map(_assistants, weights) if out else weights
        if self.unsplit:
            what, why = "left unsplit", "torch leaves up to 1 MiB at the end of a weight's block"
            out.append(Line(what, "other", "torch", "", (), "uint8", 1, self.unsplit, why, _UNSPLIT, "derived"))
        if at.phase == "load":
            extra = self.load - self.resident - self.unsplit
            what = "weights before conversion, beyond the converted ones"
            out += [Line(what, "temp", "", "", (), "", 1, extra, "loading", "", "derived")] if extra > 0 else []
        else:
            i = self._fullest(at.phase)
            each = self.passes[i]
            lines = pass_lines(each, each.low(labelled=True).moments[self._tops[i].moment])
            out += [workspace_line(self.gpu), *(map(_assistants, lines) if each.step.assists else lines)]
            out += self._held_lines(each.step)
        return largest_first(line for line in out if line.bytes)

    def _held_lines(self, step: InferenceStep) -> Iterator[Line]:
        """Yield what is held around a pass: tensors the loop keeps references to, and the other model's cache."""
        axes, why = sized(step, self.decided).axes, "the loop keeps a reference to it"
        yield from (held_line(h, axes, why) for h in step.loop_tensors)
        if step.other is not None:
            lines = pass_lines(sized(step.other, self.decided))
            yield from map(_assistants, lines) if step.other.assists else lines

    def _held_bytes(self, step: InferenceStep) -> int:
        """Return the bytes held throughout a pass that are not its own."""
        held = sum(h.bytes * h.copies for h in step.loop_tensors)
        if step.other is None:
            return held
        other = sized(step.other, self.decided)
        return held + other.bytes_left()

    def moments(self) -> Iterator[Phase]:
        for each in self.passes:
            held = self.persistent_bytes + self._held_bytes(each.step)
            yield from (Phase(each.phase, None, held + bytes_, where) for where, bytes_ in each.moments())

    def kinds(self) -> Iterator[Mapping[str, int]]:
        resident = Counter(other=self.unsplit + self.workspace)
        for graph in self.models:
            resident += bytes_of_kinds(parameters_of(graph))
        for each in self.passes:
            held = resident + bytes_of_kinds(each.step.loop_tensors)
            if each.step.other is not None:
                other = sized(each.step.other, self.decided)
                held += next(other.kinds((other.low(labelled=True).left,)))
            yield from (held + live for live in each.kinds())

    def ranks(self, calibration: Calibration | None) -> Iterator[Rank]:
        """Yield the GPUs of a device map; those that hold equal layers are walked once."""
        if not self.decided.has_stages:
            return
        by_kinds: dict[tuple[int, ...], tuple[InferenceWalk, Usage]] = {}
        for on_gpu in self.decided.every_stage():
            placed, kinds = gpus.placement(on_gpu.structure), gpus.layer_kinds_alone(on_gpu.structure)
            if kinds not in by_kinds:
                walk = InferenceWalk(self.run, on_gpu)
                by_kinds[kinds] = walk, walk.usage(calibration)
            walk, usage = by_kinds[kinds] if kinds else by_kinds.pop(kinds)
            walked = gpus.placement(walk.decided.structure).card
            offset = placed.layers.index(placed.card) - placed.layers.index(walked) if kinds else 0
            top = walk.top._replace(where=shift_layer(walk.top.where, offset))
            graph = walk.models[0]
            _, axes = operations_of(graph)
            weights = (pair for pair in graph_weights(graph) if pair[0].group not in ("adapter", "buffer"))
            numbers = sum(elements(w, axes) * n for w, n, _ in weights)
            yield Rank.of(usage, top, placed.card, placed.layers.count(placed.card), numbers)

    @cached_property
    def _replay(self) -> InferenceReplay:
        return replay(self)

    def reserved(self, capacity: int | None = None) -> int | None:
        return reserved(self._replay, capacity)

    def reserved_within(self, most: int) -> int | None:
        return reserved.within(self._replay, most)

    def surely_reserved(self) -> int:
        prompt = tuple(each for each in self.passes if each.phase != "decode")
        if self.decided.assistant is not None or not len(prompt) < len(self.passes) <= 2 * _MIN_DECODING:
            return 0
        return reserved(self.with_passes(prompt)) or 0

    def with_passes(self, passes: tuple[SizedPass, ...]) -> InferenceReplay:
        """Return the replay of some of the run's passes."""
        return InferenceReplay(self.models, passes, self.workspace, self.run.loop.expandable_segments)


_UNSPLIT = "torch 2.13 c10/cuda/CUDACachingAllocator.cpp should_split: the rest of an unsplit block counts as allocated"


def _assistants(line: Line) -> Line:
    """Return a line labelled as the assistant's."""
    return line._replace(where=f"assistant.{line.where}".removesuffix("."))


def models_of(decided: ResolvedRun, first: InferenceStep) -> tuple[Graph, ...]:
    """Return the graphs whose weights are loaded: the model's, and that of an assistant with its own weights.

    The model's is that of the `first` pass, unless that runs less than the model.
    """
    assistant, graph = decided.assistant, decided.structure.graph
    if assistant is not None and assistant.drafts is not None and not assistant.shares:
        return graph, assistant.drafts.structure.graph
    return (graph if assistant or first.graph.wiring.encoder_decoder_half else first.graph,)


@lru_cache(maxsize=512)
@exact
def loaded(graphs: tuple[Graph, ...], expandable: bool) -> tuple[int, int, int]:
    """Return the bytes of weights and buffers, those torch counts in addition for unsplit blocks, and the loading peak.

    The models are loaded one after the other.
    """
    allocator = new_allocator(expandable)
    resident = sum(h.bytes * h.copies for graph in graphs for h in parameters_of(graph))
    for graph in graphs:
        load(graph, allocator)
    return resident, allocator.allocated - resident, allocator.peak_allocated


@lru_cache(maxsize=512)
def inference_parameters(graph: Graph) -> Parameters:
    """Return the parameter counts; none train."""
    graph = graph._replace(placed=None)
    _, axes = operations_of(graph)
    weights = [(w, n) for w, n, _ in graph_weights(graph) if w.group not in ("adapter", "buffer")]
    active = sum(active_elements(w, axes) * n for w, n in weights)
    return Parameters(sum(elements(w, axes) * n for w, n in weights), 0, active)


def shift_layer(where: str, further: int) -> str:
    """Return the same operation, `further` layers later."""
    return _LAYER.sub(lambda match: str(int(match[0]) + further), where, count=1)


_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


_MIN_DECODING, _MAX_DECODING = 8, 32  # decoding passes to replay
PREFILL_EVENTS = 400_000  # allocations and frees of prompt passes to replay


def replay(walk: InferenceWalk) -> InferenceReplay:
    """Return the passes to replay: for decoding, a few evenly spread ones.

    What torch reserves for caches that grow by a token, each in its own block, depends on how often they are
    reallocated. A block is up to 1 MiB larger than requested; a cache that outgrows it takes another, and no later one
    fits the old. So about one pass per block is replayed, at most 32: replaying 32 of 511 passes was within 1.4 % of
    replaying all.
    """
    steps, decided = tuple(each.step for each in walk.passes), walk.decided
    if decided.assistant is not None:
        from memplan.program.inference import assisted

        steps = assisted.steps_of(decided, replayed=True)
    prefill = [step for step in steps if step.phase == "prefill"]
    if len(prefill) > 2 * _MIN_DECODING and decided.assistant is None:
        kept = {id(step) for step in _spread(prefill)}
        steps = tuple(step for step in steps if step.phase != "prefill" or id(step) in kept)
    decoding = [step for step in steps if step.phase == "decode"]
    if decided.assistant is None and len(decoding) > 1:
        first, last = decoding[0], decoding[-1]
        wanted = min(_MAX_DECODING, max(_MIN_DECODING, _growth(walk) // SMALL_REQUEST + 2))
        count = min(wanted, last.past - first.past + 1)
        pasts_between = [first.past + (last.past - first.past) * i // (count - 1) for i in range(1, count - 1)]
        one_pass = last.graph.inference
        is_quantised = one_pass is not None and one_pass.stored is not None
        if is_quantised or compresses(last.graph):  # some passes requantise the cache, or fill a window
            pasts = sorted({*pasts_between, *(step.past for step in decoding)})
            chosen = [token_after(past, decided) for past in pasts]
        else:
            window = decided.structure.graph.model.sliding_window or last.past + 1
            chosen = [
                last._replace(past=n, past_window=min(n, window), window=min(n + 1, window)) for n in pasts_between
            ]
            chosen = [first, *chosen, last]
        steps = (*(step for step in steps if step.phase != "decode"), *chosen)
    passes = tuple(sized(step, decided) for step in steps)
    return walk.with_passes(passes)


def _spread(reading: list[InferenceStep]) -> list[InferenceStep]:
    """Return the passes that read the prompt: all, or if that takes long the first, the last and some between."""
    events = sum(recorded_inference(step.graph).length for step in reading)
    count = max(_MIN_DECODING, PREFILL_EVENTS * len(reading) // events)
    first, middle, last = reading[:2], reading[2:-2], reading[-2:]
    if count >= len(middle):
        return reading
    return [*first, *(middle[i * len(middle) // count] for i in range(count)), *last]


def _growth(walk: InferenceWalk) -> int:
    """Return by how many bytes the largest cache tensor grows between the first and the last decoding pass."""
    first, *_, last = (each for each in walk.passes if each.phase == "decode")
    past = {name: getattr(first.step, name) for name in ("past", "past_window", "window")}
    then, now = sized(last.step._replace(**past), walk.decided).bytes_of_sizes(), last.bytes_of_sizes()
    low = last.low()
    return max((now[key] - then[key] for key in alive(low.left, low.runs, walk.passes[-1].axes)), default=0)
