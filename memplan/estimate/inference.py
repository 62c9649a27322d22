"""Inference: the weights are loaded, and the model runs forward, once, or over a prompt and token by token. The peak of
each phase, on the GPU that holds most, and the tensors that are alive at it.

Nothing trains. `memplan.program.inference.passes` has the passes, `memplan.program.inference.replay` what torch
reserves for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from memplan.catalogue.hardware.overhead import cublas_workspace, cuda_context, nccl
from memplan.catalogue.parallelism.device_map_packing import HOST
from memplan.catalogue.parallelism.device_maps import Placed
from memplan.core.cached_property import cached_property
from memplan.core.units import ITEMSIZE
from memplan.engine.allocator import SMALL_REQUEST, Allocator
from memplan.engine.walk import alive
from memplan.estimate.answer import Bytes, Line, Peak, Phase, Rank, Verdict
from memplan.estimate.calibration import Calibration
from memplan.estimate.lines import alive_lines, held_line
from memplan.estimate.usage import Usage, around
from memplan.program.graph import Graph, active, built, elements, inferred, parameters_of, recorded_inference
from memplan.program.graph import weights_of as graph_weights
from memplan.program.inference.passes import Most, Step, bytes_of, compresses, live, most_of, numbers_of, token_after
from memplan.program.inference.replay import Replay, load
from memplan.program.inference.steps import steps_of
from memplan.program.run import Decided


class Walked(NamedTuple):
    """A run's peaks: of loading, and of every pass."""

    decided: Decided
    steps: tuple[Step, ...]
    axes: tuple[dict[str, int], ...]
    peaks: tuple[Most, ...]
    parameters: int
    unsplit: int
    loading: int
    workspace: int

    @property
    def graph(self) -> Graph:
        """A graph with all weights of the model."""
        return whole(self.decided, self.steps)

    @property
    def models(self) -> tuple[Graph, ...]:
        """The graphs whose weights are loaded, the model's first."""
        return models_of(self.decided, self.steps)

    @property
    def resting(self) -> int:
        """What is there throughout all passes."""
        return self.parameters + self.unsplit + self.workspace

    @property
    def host(self) -> int:
        """Bytes of weights that are in host memory."""
        graph = self.steps[0].graph
        if graph.placed is None:
            return 0
        there = graph._replace(placed=graph.placed._replace(card=HOST))
        return sum(h.bytes * h.copies for h in parameters_of(there))

    @property
    def phases(self) -> list[Phase]:
        """The peak of every phase."""
        out = [Phase("load", None, self.loading, "")]
        for name in dict.fromkeys(step.phase for step in self.steps):
            i = self._top(name)
            low = inferred(self.steps[i].graph)
            peak = self.resting + self.peaks[i].bytes
            where = low.moments[self.peaks[i].moment].where
            out.append(Phase(name, None, peak, f"assistant: {where}" if self.steps[i].assists else where))
        return out

    @property
    def host_bytes(self) -> int:
        """The most that an offloaded cache has in host memory: what all layers keep but the first, which comes back
        when the last is done. It is pinned, and torch rounds pinned memory up to a power of two.

        Source: torch 2.13 ATen/core/CachingHostAllocator.h; aten/src/ATen/native/TensorConversions.cpp _to_copy pins
        what it copies to the host without blocking.
        """
        last, graph = self.steps[-1], self.steps[-1].graph
        now = graph.inference
        if now is None or not now.cache.startswith("offloaded"):
            return 0
        from memplan.catalogue.inference.caches import LayerCache, caches

        width, tokens = ITEMSIZE[graph.recipe.compute], last.room if now.static else last.past + last.fed

        def pinned(layer: LayerCache) -> int:
            each = (last.batch * p.entries(tokens, layer.last, 0) * p.elements for p in layer.parts if p.per == "token")
            return sum(1 << (n * width - 1).bit_length() for n in each if n)

        layers = [layer for layer in caches(graph.model) if layer.token_elements]
        sent = [pinned(layer) for layer in layers if not now.static or layer.window is None]
        return sum(sent) - sent[0] if len(sent) > 1 else sum(sent)

    def left(self, step: Step, axes: Mapping[str, int]) -> list[tuple[str, int]]:
        """What a pass leaves for the next: names, and bytes of all tensors of that name."""
        low = inferred(step.graph, labelled=True)
        sizes = bytes_of(low, {**built(step.graph)[1], **axes})
        there = alive(low.left, low.runs, {**built(step.graph)[1], **axes})
        return [(low.sizes[key][5], sizes[key] * count) for key, count in there.items() if count]

    def counts(self, phase: str) -> Iterator[dict[int, int]]:
        """How many tensors of each size, in bytes, are alive at every moment of a phase."""
        for step, axes in zip(self.steps, self.axes, strict=True):
            if step.phase != phase:
                continue
            low = inferred(step.graph)
            sizes = bytes_of(low, axes)
            for moment in low.moments:
                found: dict[int, int] = {}
                for key, count in alive(moment, low.runs, axes).items():
                    found[sizes[key]] = found.get(sizes[key], 0) + count
                yield found

    def _top(self, phase: str) -> int:
        """Which pass of a phase takes the most."""
        return max((i for i, s in enumerate(self.steps) if s.phase == phase), key=lambda i: self.peaks[i].bytes)

    def lines(self, phase: str) -> list[Line]:
        """Every tensor alive at a phase's peak, largest first."""
        out: list[Line] = []
        for graph in self.models:
            whose = "assistant" if out else "model"
            axes = {**built(graph)[1], **({} if out else self.axes[0])}
            weights = (
                held_line(h, axes, f"a buffer of the {whose}" if h.kind == "buffer" else f"the {whose}'s weights")
                for h in parameters_of(graph)
            )
            out += map(_assistants, weights) if out else weights
        if self.unsplit:
            what, why = "left unsplit", "ends of blocks that weights have to themselves, up to 1 MiB each"
            out.append(Line(what, "other", "torch", "", (), "uint8", 1, self.unsplit, why, _UNSPLIT, "derived"))
        if phase == "load":
            more = self.loading - self.parameters - self.unsplit
            what = "weights before they are converted, less what comes after"
            out += [Line(what, "temp", "", "", (), "", 1, more, "loading", "", "derived")] if more > 0 else []
        else:
            i = self._top(phase)
            capability = self.decided.gpu.compute_capability if self.decided.gpu else None
            row = cublas_workspace(capability)
            why = "one for each thread that multiplies matrices"
            workspace = Line(row.what, "other", "torch", "", (), "uint8", 1, row.usual, why, row.source, row.basis)
            low = inferred(self.steps[i].graph, labelled=True)
            moment = low.moments[self.peaks[i].moment]
            stack, own = built(self.steps[i].graph)
            lines = alive_lines(stack, {**own, **self.axes[i]}, low, moment)
            out += [
                workspace,
                *(map(_assistants, lines) if self.steps[i].assists else lines),
                *self._beside(self.steps[i]),
            ]
        return sorted((line for line in out if line.bytes), key=lambda line: (-line.bytes, line.where, line.what))

    def _beside(self, step: Step) -> Iterator[Line]:
        """What is there beside a pass: what the loop has names for, and the other model's cache."""
        yield from (held_line(h, {}, "the loop has a name for it") for h in step.beside)
        if step.other is not None:
            axes = numbers_of(step.other, self.decided)
            low = inferred(step.other.graph, labelled=True)
            stack, own = built(step.other.graph)
            lines = alive_lines(stack, {**own, **axes}, low, low.left)
            yield from map(_assistants, lines) if step.other.assists else lines


def _assistants(line: Line) -> Line:
    """A line of the assistant's, told apart from the model's."""
    return line._replace(where=f"assistant.{line.where}".removesuffix("."))


def walk(decided: Decided, expandable: bool = False) -> Walked:
    """The peak of every phase. `expandable`: torch's allocator has expandable segments."""
    steps = steps_of(decided)
    axes = tuple(numbers_of(step, decided) for step in steps)
    peaks = [_with_beside(step, numbers, decided) for step, numbers in zip(steps, axes, strict=True)]
    resident, unsplit, most = loaded(models_of(decided, steps), expandable)
    workspace = cublas_workspace(decided.gpu.compute_capability if decided.gpu else None).usual
    return Walked(decided, steps, axes, tuple(peaks), resident, unsplit, most, workspace)


def _with_beside(step: Step, numbers: dict[str, int], decided: Decided) -> Most:
    """The most of a pass, with what is there beside it."""
    most = most_of(step.graph, numbers)
    return most._replace(bytes=most.bytes + beside_of(step, decided))


def beside_of(step: Step, decided: Decided) -> int:
    """Bytes of what is there throughout a pass and none of its own."""
    held = sum(h.bytes * h.copies for h in step.beside)
    if step.other is None:
        return held
    axes = numbers_of(step.other, decided)
    low = inferred(step.other.graph)
    return held + live(low, low.left, axes, bytes_of(low, axes))


def models_of(decided: Decided, steps: tuple[Step, ...]) -> tuple[Graph, ...]:
    """The graphs whose weights are loaded: the model's, and an assistant's that has weights of its own."""
    assistant = decided.assistant
    if assistant is None or assistant.drafts is None or assistant.shares:
        return (whole(decided, steps),)
    return decided.structure.graph, assistant.drafts.structure.graph


def whole(decided: Decided, steps: tuple[Step, ...]) -> Graph:
    """The graph of a run's passes with all weights of the model, though a pass may be of an encoder or a decoder."""
    return decided.structure.graph if decided.assistant or steps[0].graph.wiring.part else steps[0].graph


_UNSPLIT = (
    "torch 2.13 c10/cuda/CUDACachingAllocator.cpp should_split: what is left of a large block counts as allocated"
)


@lru_cache(maxsize=512)
def loaded(graphs: tuple[Graph, ...], expandable: bool) -> tuple[int, int, int]:
    """Bytes of weights and buffers; those that torch counts beside them, because blocks were not split; and the most
    there are while they are loaded, model by model."""
    allocator = Allocator(expandable)
    resident = sum(h.bytes * h.copies for graph in graphs for h in parameters_of(graph))
    for graph in graphs:
        load(graph, allocator)
    return resident, allocator.allocated - resident, allocator.peak_allocated


@lru_cache(maxsize=512)
def counted(graph: Graph) -> tuple[int, int, int]:
    """The parameters of the model, of which none train, and those that a token meets."""
    graph = graph._replace(placed=None)
    _, axes = built(graph)
    own = [(w, n) for w, n, _ in graph_weights(graph) if w.group not in ("adapter", "buffer")]
    return sum(elements(w, axes) * n for w, n in own), 0, sum(active(w, axes) * n for w, n in own)


class Engine(NamedTuple):
    """Where an answer's ledger and timeline come from."""

    walked: Walked
    peak: str
    expandable: bool = False
    calibration: Calibration | None = None

    def lines(self) -> Iterable[Line]:
        return self.walked.lines(self.peak)

    def moments(self) -> Iterator[Phase]:
        w = self.walked
        for step, axes in zip(w.steps, w.axes, strict=True):
            low, beside = inferred(step.graph), beside_of(step, w.decided)
            sizes = bytes_of(low, axes)
            for moment in low.moments:
                bytes_ = w.resting + beside + live(low, moment, axes, sizes)
                yield Phase(moment.phase, None, bytes_, moment.where)

    def ranks(self) -> Iterable[Rank]:
        decided = self.walked.decided
        placed = decided.structure.graph.placed
        if placed is None or placed.cards == 1:
            return
        alike: dict[tuple[int, ...], tuple[Walked, Usage]] = {}
        for one in every_card(decided):
            kinds = layers_alone(one)
            if kinds not in alike:
                walked = walk(one, self.expandable)
                alike[kinds] = walked, usage_of(walked, self.expandable, self.calibration)
            walked, usage = alike[kinds] if kinds else alike.pop(kinds)
            top = max(walked.phases, key=lambda phase: phase.peak)
            graph, card = walked.decided.structure.graph, _placed(one).card
            further = placed.layers.index(card) - placed.layers.index(_placed(walked.decided).card) if kinds else 0
            _, axes = built(graph)
            own = (pair for pair in graph_weights(graph) if pair[0].group not in ("adapter", "buffer"))
            yield Rank(
                card,
                sum(place == card for place in placed.layers),
                sum(elements(w, axes) * n for w, n, _ in own),
                1,
                Bytes(usage),
                Peak(top.phase, layers_on(top.where, further)),
                Verdict(usage, decided.gpu.usable if decided.gpu else None),
            )


def layers_on(where: str, further: int) -> str:
    """The same place, that many layers further on."""
    return _LAYER.sub(lambda found: str(int(found[0]) + further), where, count=1)


_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def layers_alone(decided: Decided) -> tuple[int, ...]:
    """The kinds of the layers on a GPU that has nothing else: GPUs with equal ones hold the same. Empty for others."""
    graph, placed = decided.structure.graph, _placed(decided)
    ends = {0, placed.rotary, placed.embeds, *(card for _, card in (*placed.before, *placed.after))}
    if placed.card in ends:
        return ()
    stack, axes = built(graph._replace(placed=None))
    kinds = [id(block) for run in stack.runs for _ in range(axes[run.times]) for block in run.blocks]
    return tuple(kind for kind, card in zip(kinds, placed.layers, strict=True) if card == placed.card)


def every_card(decided: Decided) -> Iterator[Decided]:
    """The run on each GPU that modules are on."""
    structure = decided.structure
    placed = _placed(decided)
    for card in range(placed.cards):
        graph = structure.graph._replace(placed=placed._replace(card=card))
        yield decided._replace(structure=structure._replace(graph=graph))


def worst(decided: Decided, stage: int | None, expandable: bool) -> Walked:
    """The run on the GPU that holds most, or on the one that was asked for."""
    placed = decided.structure.graph.placed
    if placed is None or placed.cards == 1 or stage is not None:
        return walk(decided, expandable)
    every = [walk(one, expandable) for one in _may_be_worst(decided)]
    every.sort(key=lambda walked: -max(phase.peak for phase in walked.phases))
    if decided.gpu is None:
        return every[0]
    return max(every, key=lambda walked: _WORSE.index(usage_of(walked, expandable, None).answer or ""))


def _may_be_worst(decided: Decided) -> Iterator[Decided]:
    """The GPUs of which one holds most: of those with layers alone the one with the most of them, by bytes."""
    first, *others = every_card(decided)
    *inner, last = others
    yield first
    if inner:
        yield max(inner, key=lambda one: loaded((one.structure.graph,), False)[0])
    yield last


_WORSE = ("", "fits", "tight", "does not fit")  # answers; what torch reserves differs from GPU to GPU


def _placed(decided: Decided) -> Placed:
    placed = decided.structure.graph.placed
    assert placed is not None
    return placed


def usage_of(walked: Walked, expandable: bool, calibration: Calibration | None) -> Usage:
    """What a GPU's process takes of it."""
    decided = walked.decided
    capability = decided.gpu.compute_capability if decided.gpu else None
    beside = around(cuda_context(capability), calibration, nccl(decided.communicators))
    phases = walked.phases
    top = max(phase.peak for phase in phases)
    return Usage(Unreplayed(walked, expandable), walked.parameters, phases[0].peak, top, decided.gpu, beside)


class Unreplayed:
    """A run whose passes are listed when a replay is asked for: that takes longer than their peaks."""

    is_long = False  # the passes of long ones are thinned

    def __init__(self, walked: Walked, expandable: bool) -> None:
        self._of = walked, expandable

    @cached_property
    def _replay(self) -> Replay:
        return replay(*self._of)

    def reserved(self, capacity: int | None = None) -> int | None:
        return self._replay.reserved(capacity)

    def apart(self) -> int:
        return 0

    def beside(self) -> int:
        return 0


_FEWEST, _MOST = 8, 32  # passes that are replayed of those that decode
PREFILL_EVENTS = 400_000  # allocations and frees that are replayed of the passes that read a prompt


def replay(walked: Walked, expandable: bool) -> Replay:
    """The run's passes for a replay: of those that decode some, evenly spread.

    What torch holds of caches that grow by a token, each in a block of its own, depends on how often they do. A block
    has up to 1 MiB more than was asked for; a cache that outgrows it takes another, and none needs one that small
    again. So often a pass is replayed, but 32 times at most: replays of 32 of 511 passes held within 1.4 % what those
    of all did.
    """
    steps = walked.steps
    if walked.decided.assistant is not None:
        from memplan.program.inference import assisted

        steps = assisted.steps_of(walked.decided, replayed=True)
    reading = [step for step in steps if step.phase == "prefill"]
    if len(reading) > 2 * _FEWEST and walked.decided.assistant is None:
        kept = {id(step) for step in _spread(reading)}
        steps = tuple(step for step in steps if step.phase != "prefill" or id(step) in kept)
    decoding = [step for step in steps if step.phase == "decode"]
    if walked.decided.assistant is None and len(decoding) > 1:
        first, last = decoding[0], decoding[-1]
        often = min(_MOST, max(_FEWEST, _growth(walked) // SMALL_REQUEST + 2))
        count = min(often, last.past - first.past + 1)
        between = [first.past + (last.past - first.past) * i // (count - 1) for i in range(1, count - 1)]
        now = last.graph.inference
        anew = now is not None and now.stored is not None
        if anew or compresses(last.graph):  # some of them quantise all anew, or fill a window
            pasts = sorted({*between, *(step.past for step in decoding)})
            some = [token_after(past, walked.decided) for past in pasts]
        else:
            window = walked.decided.structure.graph.model.sliding_window or last.past + 1
            some = [last._replace(past=n, past_window=min(n, window), window=min(n + 1, window)) for n in between]
            some = [first, *some, last]
        steps = (*(step for step in steps if step.phase != "decode"), *some)
    axes = tuple(tuple(numbers_of(step, walked.decided).items()) for step in steps)
    return Replay(walked.models, steps, axes, walked.workspace, expandable)


def _spread(reading: list[Step]) -> list[Step]:
    """The passes that read a prompt; if replaying all takes long, the first and the last, and some between."""
    events = sum(recorded_inference(step.graph).length for step in reading)
    count = max(_FEWEST, PREFILL_EVENTS * len(reading) // events)
    first, between, last = reading[:2], reading[2:-2], reading[-2:]
    if count >= len(between):
        return reading
    return [*first, *(between[i * len(between) // count] for i in range(count)), *last]


def _growth(walked: Walked) -> int:
    """By how many bytes the largest tensor of a cache grows from the first pass that decodes to the last."""
    first, *_, last = (step for step in walked.steps if step.phase == "decode")
    low = inferred(last.graph)
    at_first = last._replace(past=first.past, past_window=first.past_window, window=first.window)
    then, now = (bytes_of(low, numbers_of(step, walked.decided)) for step in (at_first, last))
    return max((now[key] - then[key] for key in alive(low.left, low.runs, walked.axes[-1])), default=0)
