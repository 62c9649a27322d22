"""The passes of a run in which nothing trains: what each is given, and how much of it is alive at most.

Of the passes that decode tokens the first and the last are walked: caches grow from one to the other, but those of a
layer that keeps a window only, which are as long as the prompt until the first of them is over. A model's numbers are
put in once; batch, prompt and tokens then take microseconds. A moment that another of its pass never falls below is
left out (`memplan.engine.walk.prune`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from memplan.catalogue.attention import compressed_tokens
from memplan.catalogue.inference import offloaded_caches, quantized_caches
from memplan.catalogue.inference.one_pass import Part
from memplan.catalogue.inference.quantized_caches import Stored
from memplan.catalogue.quantization.packed_kernels import MANY_ROWS
from memplan.core.arithmetic import ONE_RUN
from memplan.core.ir import Division
from memplan.engine.lower import Moment
from memplan.engine.step import Lowered
from memplan.engine.walk import ONE, Term, Variable, alive, chain, largest, prune, rows, size, values
from memplan.program.axes import axes_of, blocks_of_keys
from memplan.program.graph import Graph, Held, built, inferred
from memplan.program.run import Decided


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


def encoder_step(decided: Decided) -> Step:
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


def decoder_steps(graph: Graph, decided: Decided) -> tuple[Step, ...]:
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
    starts = range(0, prompt, part)
    walked = {*starts[:2], *starts[-2:]}
    if now.stored is not None and now.stored.grouped:
        walked.update(starts[-1 - -(-now.stored.residual // part) :])
    for past in sorted(walked):
        fed = min(part, prompt - past)
        quantized = now.stored.quantized_of(past // part, part) if now.stored is not None else 0
        after = now.stored.after(quantized, past - quantized, fed)[0] if now.stored is not None else 0
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
    if stored is None:
        return 0, 0
    last = (prompt - 1) // part * part
    quantized = stored.quantized_of(last // part, part)
    return stored.after(quantized, last - quantized, prompt - last)


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
        more[f"{name}_even"] = 0 if more[name] % 8 else more[name]
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
