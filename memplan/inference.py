"""Inference as passes: the weights are loaded, and the model runs forward, once, or over a prompt and token by token.

Nothing trains. Of the passes that decode tokens the first and the last are walked: caches grow from one to the other,
but those of a layer that keeps a window only, which are as long as the prompt until the first of them is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from memplan.answer import Bytes, Line, Peak, Phase, Rank, Verdict
from memplan.catalogue import compressed_tokens, offloaded_caches, quantized_caches
from memplan.catalogue.dealing import HOST
from memplan.catalogue.device_maps import Placed
from memplan.catalogue.overhead import cublas_workspace, cuda_context, nccl
from memplan.catalogue.packed import MANY_ROWS
from memplan.engine.allocator import SMALL_REQUEST, Allocator, Block, OutOfMemoryError
from memplan.engine.lower import Moment
from memplan.engine.record import FREED, Recorded
from memplan.engine.step import Lowered
from memplan.engine.walk import ONE, Term, Variable, alive, chain, largest, prune, rows, size, values
from memplan.graph import (
    Graph,
    Held,
    active,
    built,
    elements,
    inferred,
    loading,
    parameters_of,
    recorded_inference,
)
from memplan.graph import weights_of as graph_weights
from memplan.ir import Division
from memplan.run_axes import axes_of, blocks_of_keys
from memplan.segments import replay_loading
from memplan.sizes import ONE_RUN
from memplan.tensors import alive_lines, held_line
from memplan.units import ITEMSIZE
from memplan.usage import Usage, around

if TYPE_CHECKING:
    from memplan.calibration import Calibration
    from memplan.catalogue.decoding import Part
    from memplan.catalogue.quantized_caches import Stored
    from memplan.resolve import Decided


class Step(NamedTuple):
    """One pass of a run: its graph, and how long its sequences are: `fed` tokens, `before` them `past` ones, of which a
    layer with a window has `past_window`. A static cache has `room` for so many. Of a quantised one `quantized` are so
    before the pass, and the rest of its `past` waits. `source` tokens were read by an encoder, of so many `prompts`.
    `division`: its weights are divided among ranks.

    In assisted generation the last `cropped` of the past tokens are in the cache's tensors, but were cut off. The cache
    of a layer with a window has `grown` tokens after the pass, of which attention sees `window`. `rows` logits are
    returned, `before` were so in the round before, of `outputs` rows; `proposed` tokens there are. `assists`: the pass
    is the assistant's. `beside`: what is there throughout it, with the cache that the `other` model's pass left."""

    graph: Graph
    batch: int
    fed: int
    past: int = 0
    past_window: int = 0
    window: int = 0
    room: int = 0
    source: int = 0
    prompts: int = 0
    division: Division | None = None
    cropped: int = 0
    grown: int = 0
    rows: int = 1
    before: int = 1
    outputs: int = 1
    proposed: int = 0
    assists: bool = False
    beside: tuple[Held, ...] = ()
    other: Step | None = None
    quantized: int = 0

    @property
    def residual(self) -> int:
        """Tokens of a quantised cache that were not quantised when the pass began."""
        return self.past - self.quantized

    @property
    def residual_after(self) -> int:
        """Those when it is over."""
        now = self.graph.inference
        if now is None or now.stored is None:
            return 0
        return now.stored.after(self.quantized, self.residual, self.fed)[1]

    @property
    def phase(self) -> str:
        return self.graph.inference.phase if self.graph.inference else ""


class Most(NamedTuple):
    """The most bytes of a pass beside the weights, and the moment they are there at."""

    bytes: int
    moment: int


def steps_of(decided: Decided) -> tuple[Step, ...]:
    """The passes of a run, in order: of those that decode, the first and the last."""
    graph, batch = decided.structure.graph, decided.batch
    assert graph.inference is not None
    if decided.assistant is not None:
        from memplan import assisted

        return assisted.steps_of(decided)
    many, now = MANY_ROWS.get(graph.inference.loaded.backend, 0), graph.inference
    if many and batch.micro * decided.beams * min(decided.part or batch.sequence, batch.sequence) >= many:
        now = now._replace(unpacks=True)
        graph = graph._replace(inference=now)
    if not now.generates:
        return (Step(graph, batch.micro, batch.sequence),)
    if graph.model.is_encoder_decoder:
        return (_encoding(decided), *_read(over_source(graph), decided))
    return _read(graph, decided)


def _encoding(decided: Decided) -> Step:
    """The pass of an encoder, whose decoder generates after it: of every prompt once, however many beams there are."""
    graph, batch = decided.structure.graph, decided.batch
    assert graph.inference is not None
    wiring = graph.wiring._replace(part="encoder", caching=False, beams=decided.beams > 1)
    one = graph._replace(wiring=wiring, inference=graph.inference._replace(phase="encode", cache=""))
    return Step(one, batch.micro, batch.sequence, source=batch.sequence, prompts=batch.micro)


def looks_across(graph: Graph) -> bool:
    """Whether layers attend to images beside the tokens, and cache keys and values of them."""
    return graph.wiring.images and any(layer.mixer == "cross_attention" for layer in graph.model.layers)


def compresses(graph: Graph) -> bool:
    """Whether layers keep keys that stand for windows of tokens."""
    return any(layer.mixer in ("sparse", "heavy") for layer in graph.model.layers)


def over_source(graph: Graph) -> Graph:
    """An encoder-decoder's decoder alone, over what the encoder has left."""
    return graph._replace(wiring=graph.wiring._replace(part="decoder"))


def _read(graph: Graph, decided: Decided) -> tuple[Step, ...]:
    """The passes of a decoder: those over its prompt, and those of a token that are walked."""
    decoding = (_token(graph, past, decided) for past in _decoding(decided))
    return (*_prompt(graph, decided), *decoding)


def token_after(past: int, decided: Decided) -> Step:
    """The pass that decodes the token after so many."""
    graph = decided.structure.graph
    return _token(over_source(graph) if graph.model.is_encoder_decoder else graph, past, decided)


def _length(decided: Decided) -> int:
    """The tokens of the decoder's prompt."""
    batch = decided.batch
    return (batch.target_sequence or 1) if decided.structure.graph.model.is_encoder_decoder else batch.sequence


def _room(decided: Decided) -> int:
    """The tokens that a cache of fixed size has room for: the last one is never fed to the model."""
    return _length(decided) + decided.batch.new_tokens - 1


def _source(graph: Graph, decided: Decided) -> tuple[int, int]:
    """The tokens that an encoder has read, and of how many prompts."""
    return (decided.batch.sequence if graph.wiring.part else 0, decided.batch.micro)


def _prompt(graph: Graph, decided: Decided) -> Iterator[Step]:
    """The passes that read the prompt: one, or of one that is read in parts the first two and those that are the last
    of a whole part and of all. What waits in a quantised cache grows from part to part, so that there it is all since
    tokens were last quantised."""
    now, prompt, window = graph.inference, _length(decided), graph.model.sliding_window or 0
    assert now is not None
    rows, part = decided.batch.micro * decided.beams, min(decided.part or prompt, prompt)
    if part == prompt:
        if graph.wiring.part:  # one token sees all there are
            alone = now.static and prompt == 1
            graph = graph._replace(wiring=graph.wiring._replace(decodes=prompt == 1, static=now.static))
            graph = graph._replace(inference=now._replace(room=now.room or alone))
        seen = min(prompt, window or prompt)
        yield Step(graph, rows, prompt, 0, 0, seen, _room(decided), *_source(graph, decided))
        return
    starts = list(range(0, prompt, part))
    walked = {*starts[:2], *starts[-2:]}
    if now.stored is not None and now.stored.grouped:
        walked.update(starts[-1 - -(-now.stored.residual // part) :])
    quantized = 0
    for past in starts:
        fed = min(part, prompt - past)
        after = now.stored.after(quantized, past - quantized, fed)[0] if now.stored is not None else 0
        if past in walked:
            anew = now.stored is not None and now.stored.grouped and after != quantized
            which: Part = "first" if not past else "last" if past + fed == prompt else "middle"
            own = graph._replace(inference=now._replace(part=which, anew=anew and bool(past)))
            if past:
                masked = own.wiring.padded or own.wiring.backend != "flash_2"
                longer = bool(window) and past + fed > window
                wiring = own.wiring._replace(padded=masked, windowed=bool(window), handed_back=False, images=False)
                inference = own.inference._replace(longer=longer) if own.inference else None
                own = own._replace(wiring=wiring, inference=inference)
            kept = min(past, window - 1) if window else past
            if past and window and now.cache == "dynamic":  # the pass before left a view of all that it had
                kept = min(past - part, window - 1) + part
            seen = (min(past, window - 1) if window else past) + fed
            yield Step(own, rows, fed, past, kept, seen, _room(decided), quantized=quantized)
        quantized = after


def _token(graph: Graph, past: int, decided: Decided) -> Step:
    """The pass of the graph that decodes the token after so many."""
    prompt, rows, now = _length(decided), decided.batch.micro * decided.beams, graph.inference
    assert now is not None
    window, many = graph.model.sliding_window or 0, MANY_ROWS.get(now.loaded.backend, 0)

    def windowed(tokens: int) -> int:
        return min(tokens, window) if window else tokens

    crosses = bool(graph.wiring.part)
    longer = bool(window) and past + 1 > window
    static = now.static
    wiring = graph.wiring._replace(
        decodes=True,
        images=False,
        tower="",
        windowed=bool(window) and past + 1 >= window,
        crossed=crosses or looks_across(graph),
        handed_back=False,
        static=static,
    )
    if static and not crosses and wiring.backend == "flash_2":  # a mask says which keys are there: they are gathered
        wiring = wiring._replace(padded=True)
    if compresses(graph):
        begins, fills = compressed_tokens.first_and_last(graph.model.axes(), past)
        wiring = wiring._replace(begins=begins, fills=fills)
    recipe = graph.recipe
    if rows <= now.few_rows:
        recipe = recipe._replace(copies=False)
    lingers = past == prompt and not (now.last_only or crosses)
    unpacks = bool(many) and rows >= many
    token = now._replace(phase="decode", longer=longer, lingers=lingers, first=past == prompt, unpacks=unpacks)
    token = token._replace(batches=now.switches)
    if crosses:
        token = token._replace(room=now.room or (static and prompt == 1))
    quantized = 0
    if now.stored is not None:
        before, waiting = _of_prompt(decided, now.stored)
        quantized = _quantized(before, waiting, past - prompt, now.stored)
        anew = now.stored.after(quantized, past - quantized, 1)[0] != quantized
        token = token._replace(anew=anew and now.stored.grouped)
    one = graph._replace(wiring=wiring, recipe=recipe, inference=token)
    # what the prompt's pass left of a window is a view of all that it had
    kept = _left_of_prompt(decided, window) if past == prompt else windowed(past)
    if (decided.beams > 1 or now.cache == "offloaded") and window:  # but a copy of it is of the window alone
        kept = min(past, window - 1)
    return Step(
        one, rows, 1, past, kept, windowed(past + 1), _room(decided), *_source(graph, decided), quantized=quantized
    )


def _left_of_prompt(decided: Decided, window: int) -> int:
    """The tokens of what the last pass over the prompt had of a layer with a window."""
    prompt = _length(decided)
    before = (prompt - 1) // decided.part * decided.part if decided.part else 0
    return (min(before, window - 1) if window else before) + prompt - before


def _of_prompt(decided: Decided, stored: Stored | None) -> tuple[int, int]:
    """How many tokens of the prompt a quantised cache has quantised when all are read, and how many wait."""
    prompt = _length(decided)
    part = min(decided.part or prompt, prompt)
    quantized, waiting = 0, 0
    if stored is None:
        return quantized, waiting
    for past in range(0, prompt, part):
        quantized, waiting = stored.after(quantized, waiting, min(part, prompt - past))
    return quantized, waiting


def _decoding(decided: Decided) -> Iterable[int]:
    """The tokens before each of the passes that decode and are walked: the first and the last. Of a quantised cache
    also the last that quantises all anew, with the one before it, when most tokens wait; where keys stand for windows
    of tokens, also those that fill some."""
    now, prompt, new = decided.structure.graph.inference, _length(decided), decided.batch.new_tokens - 1
    if not new:
        return ()
    found = {prompt, prompt + new - 1}
    if now is not None and now.stored is not None and now.stored.grouped:
        _, waiting = _of_prompt(decided, now.stored)
        anew = prompt - waiting + (waiting + new) // now.stored.residual * now.stored.residual - 1
        found |= {past for past in (anew - 1, anew) if past >= prompt}
    if compresses(decided.structure.graph):
        found |= compressed_tokens.turning_points(decided.structure.graph.model.axes(), prompt, prompt + new - 1)
    return sorted(found)


def _quantized(quantized: int, waiting: int, tokens: int, stored: Stored) -> int:
    """How many are quantised once so many `tokens` were added to the prompt, one after the other."""
    more = waiting + tokens
    return quantized + (more // stored.residual * stored.residual if stored.grouped else more)


def numbers_of(step: Step, decided: Decided) -> dict[str, int]:
    """Every axis of a pass with its number."""
    if step.assists:
        assert decided.assistant is not None
        assert decided.assistant.drafts is not None
        decided = decided.assistant.drafts
    fixed = built(step.graph)[1]
    window = step.graph.model.sliding_window
    more = {
        "kv": step.past - step.cropped + step.fed,
        "past": step.past,
        "kv_window": step.window,
        "past_window": step.past_window,
        "kv_static": step.room,
        "kv_window_static": min(step.room, step.graph.model.sliding_window or step.room),
        "prompt": decided.batch.sequence,
        offloaded_caches.KEPT: min(step.past + step.fed, max(1, window) - 1) if window else step.past + step.fed,
        quantized_caches.QUANTIZED: step.quantized,
        quantized_caches.RESIDUAL: step.residual,
        quantized_caches.AFTER: step.residual_after,
        quantized_caches.RANKED: int(step.phase == "decode"),
        "kv_window_grown": step.grown,
        "verified": step.rows,
        "verified_before": step.before,
        "outputs_before": step.outputs,
        "proposed": step.proposed,
        "kernel1": fixed.get("kernel", 0) + 1,
        "source": step.source,
        "prompts": step.prompts,
        "rows": step.prompts * decided.beams,
    }
    if step.graph.model.config.get("index_topk"):
        more["chosen_keys"] = min(more["kv"], step.graph.model.whole("index_topk"))
    if step.phase == "decode" and compresses(step.graph):
        top = step.graph.model.whole("index_topk")
        more |= compressed_tokens.axes_of_token(fixed, step.past, _length(decided), step.window, top)
    if "key_block" in fixed:
        static = step.graph.inference is not None and step.graph.inference.keys("kv") == "kv_static"
        more |= blocks_of_keys(fixed, step.room if static else more["kv"], ONE_RUN)
    for name in ("kv", "kv_window", "kv_static", "kv_window_static", "source"):
        more |= {f"{name}{to}": -(-more[name] // to) * to for to in (8, 32, 128)}
        more[f"{name}1"] = more[name] + 1
        more[f"{name}_uneven"] = more[name] if more[name] % 8 else 0
        more[f"{name}_uneven8"] = more[f"{name}8"] if more[name] % 8 else 0
    axes = axes_of(
        step.graph,
        contenders(step.graph, step.division).needs.difference(more),
        step.batch,
        step.fed,
        decided.half,
        decided.large_tiles,
        ONE_RUN,
        decided.pictures,
        decided.batch.target_sequence,
    )
    return {**fixed, **axes, **more}


def bytes_of(low: Lowered, axes: Mapping[str, int]) -> list[int]:
    """The bytes of a storage of each of a pass's sizes."""
    return [size(key[0], key[1], axes)[1] for key in low.sizes]


def live(low: Lowered, moment: Moment, axes: Mapping[str, int], sizes: list[int]) -> int:
    """Bytes alive at a moment of a pass."""
    return sum(sizes[key] * count for key, count in alive(moment, low.runs, axes).items())


class Contenders(NamedTuple):
    """The moments of a pass that can be its peak, over the sizes that the run decides; `products` bound them. `needs`
    are the axes of its sizes that are not the model's."""

    variables: tuple[Variable, ...]
    products: tuple[Variable, ...]
    terms: tuple[Term, ...]
    needs: frozenset[str]


_AT_LEAST_ONE = frozenset(("b", "s", "s1", "s8", "s32", "s128", "kv", "kv1", "kv8", "kv32", "kv128", "kv_static"))


@lru_cache(maxsize=512)
def contenders(graph: Graph, division: Division | None = None) -> Contenders:
    """The moments of a pass that can be its peak: milliseconds, and then kept."""
    low, own = inferred(graph, division=division), built(graph)[1]
    fixed = {axis: n for axis, n in own.items() if axis not in _AT_LEAST_ONE}  # Whisper's `s` is its encoder's
    fixed["kernel1"] = own.get("kernel", 0) + 1
    sizes = [size(key[0], key[1], fixed) for key in low.sizes]
    variables = tuple(sorted({variable for variable, _ in sizes}))
    along = chain([v for v in variables if _AT_LEAST_ONE.issuperset(v.axes)] or [ONE])  # others may be of no tokens
    every = rows(low.moments, low.runs, fixed, sizes, variables)
    terms = prune(((row, i) for i, row in enumerate(every)), variables, along)
    needs = frozenset(axis for key in low.sizes for axis in key[0].split() if not axis.isdigit())
    return Contenders(variables, tuple(map(Variable, along)), terms, needs.difference(fixed))


def most_of(graph: Graph, axes: Mapping[str, int], division: Division | None = None) -> Most:
    """The most bytes alive at a moment of a pass."""
    found = contenders(graph, division)
    return Most(*largest(found.terms, values(found.variables, axes), values(found.products, axes)))


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
        from memplan.catalogue.caches import LayerCache, caches

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
        for one in every_card(decided):
            card, walked = _placed(one).card, walk(one, self.expandable)
            usage = usage_of(walked, self.expandable, self.calibration)
            top = max(walked.phases, key=lambda phase: phase.peak)
            graph = one.structure.graph
            _, axes = built(graph)
            own = (pair for pair in graph_weights(graph) if pair[0].group not in ("adapter", "buffer"))
            yield Rank(
                card,
                sum(place == card for place in placed.layers),
                sum(elements(w, axes) * n for w, n, _ in own),
                1,
                Bytes(usage),
                Peak(top.phase, top.where),
                Verdict(usage, decided.gpu.usable if decided.gpu else None),
            )


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


def replay(walked: Walked, expandable: bool) -> Replay:
    """The run's passes for a replay: of those that decode some, evenly spread.

    What torch holds of caches that grow by a token, each in a block of its own, depends on how often they do. A block
    has up to 1 MiB more than was asked for; a cache that outgrows it takes another, and none needs one that small
    again. So often a pass is replayed, but 32 times at most: replays of 32 of 511 passes held within 1.4 % what those
    of all did.
    """
    steps = walked.steps
    if walked.decided.assistant is not None:
        from memplan import assisted

        steps = assisted.steps_of(walked.decided, replayed=True)
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


def _growth(walked: Walked) -> int:
    """By how many bytes the largest tensor of a cache grows from the first pass that decodes to the last."""
    first, *_, last = (step for step in walked.steps if step.phase == "decode")
    low = inferred(last.graph)
    at_first = last._replace(past=first.past, past_window=first.past_window, window=first.window)
    then, now = (bytes_of(low, numbers_of(step, walked.decided)) for step in (at_first, last))
    return max((now[key] - then[key] for key in alive(low.left, low.runs, walked.axes[-1])), default=0)


class Replay(NamedTuple):
    """What decides the allocations of a run: its models, its passes, their axes, cuBLAS's workspace, how the allocator
    works."""

    models: tuple[Graph, ...]
    steps: tuple[Step, ...]
    axes: tuple[tuple[tuple[str, int], ...], ...]
    workspace: int
    expandable: bool

    def reserved(self, capacity: int | None = None) -> int | None:
        return _reserved(self, capacity)


@lru_cache(maxsize=1024)
def _reserved(replay: Replay, capacity: int | None) -> int | None:
    """The peak of what torch reserves, on a card with `capacity` bytes for it; None where it runs out of memory."""
    allocator = Allocator(replay.expandable, capacity)
    try:
        for graph in replay.models:
            load(graph, allocator)
        allocator.alloc(replay.workspace)
        left: dict[bool, list[Left]] = {False: [], True: []}  # the model's, the assistant's
        beside: dict[tuple[Held, int], Block] = {}
        for step, axes in zip(replay.steps, replay.axes, strict=True):
            there = {(h, i) for h in step.beside for i in range(h.copies)}
            for gone in [key for key in beside if key not in there]:
                allocator.free(beside.pop(gone))
            beside |= {key: allocator.alloc(key[0].bytes) for key in sorted(there - beside.keys())}
            whose = step.assists
            left[whose] = replayed(recorded_inference(step.graph), dict(axes), allocator, left[whose])
    except OutOfMemoryError:
        return None
    return allocator.peak_reserved


def load(graph: Graph, allocator: Allocator) -> None:
    """Replay loading, from one block for many weights where the version makes that first."""
    warms = graph.inference.loaded.warms if graph.inference else ""
    if warms:
        total = sum(h.bytes * h.copies for h in parameters_of(graph))
        allocator.free(allocator.alloc(total if warms == "all" else total // 2))
    replay_loading(loading(graph), allocator)


class Left(NamedTuple):
    """A tensor that one pass leaves for the next: its size as axes and as bytes, and the block that it is in."""

    key: tuple[str, ...]
    bytes: int
    block: Block


def replayed(recording: Recorded, axes: Mapping[str, int], allocator: Allocator, left: Iterable[Left]) -> list[Left]:
    """Replay a pass, which begins with what the one before `left`, in order; returns what it leaves itself."""
    bytes_ = [size(key[0], key[1], axes)[1] for key in recording.sizes]
    blocks: dict[int, Left] = {}
    given = list(left)
    for number, event in recording.events:
        if event == FREED:
            allocator.free(blocks.pop(number).block)
            continue
        key = recording.sizes[event]
        if given:  # what was left comes first, as it is
            alike = [i for i, other in enumerate(given) if _left(other.key) == _left(key)]
            as_large = (i for i in alike if given[i].bytes == bytes_[event])
            blocks[number] = Left(key, bytes_[event], given.pop(next(as_large, alike[0] if alike else 0)).block)
        else:
            blocks[number] = Left(key, bytes_[event], allocator.alloc(bytes_[event]))
    return list(blocks.values())


_TOKENS: dict[str, str] = {
    **dict.fromkeys(("s", "kv", "past", "kv_window", "past_window", quantized_caches.QUANTIZED), "kv"),
    quantized_caches.AFTER: quantized_caches.RESIDUAL,
    **compressed_tokens.LEFT,
}


@lru_cache(maxsize=1024)
def _left(key: tuple[str, ...]) -> tuple[str, ...]:
    """What a tensor is known by that one pass leaves and the next finds: its shape, however many tokens it has, and
    its dtype."""
    return (" ".join(_TOKENS.get(axis, axis) for axis in key[0].split()), *key[1:])
