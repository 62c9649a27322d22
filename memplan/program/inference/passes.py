"""The passes of an inference run, and the peak bytes of each.

Only the first and the last decoding pass are computed, as caches grow from one to the other. (A layer with a sliding
window is the exception: its cache is as long as the prompt until the first decoding pass is over.) A model's numbers
are filled in once; after that another batch, prompt or number of tokens takes microseconds. Moments that can never be
the peak are left out (`memplan.engine.walk.prune`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from operator import mul

from memplan.catalogue.attention import compressed_tokens
from memplan.catalogue.inference import offloaded_caches, quantized_caches
from memplan.catalogue.inference.one_pass import PromptPart
from memplan.catalogue.inference.quantized_caches import CacheQuantization
from memplan.catalogue.quantization.fused_4bit import copied_axes
from memplan.catalogue.quantization.packed_kernels import MANY_ROWS
from memplan.core.arithmetic import ONE_RUN
from memplan.core.cached_property import cached_property
from memplan.core.expression import arithmetic_of
from memplan.core.frozen import FrozenDict
from memplan.core.ir import Division
from memplan.core.once import once
from memplan.core.records import NamedTuple
from memplan.engine.largest import PhaseTerms
from memplan.engine.lowered import Lowered
from memplan.engine.moments import Moment
from memplan.engine.walk import (
    ONE,
    Term,
    bytes_at_each,
    chain,
    counts_at_each,
    kinds_at_each,
    prune,
    rows,
    size,
    values,
)
from memplan.models.model import ModelSpec
from memplan.program.axes import axes_of, blocks_of_keys, rounded_axes
from memplan.program.graph import Graph, TensorGroup, lower_inference, operations_of
from memplan.program.run import ResolvedRun


class InferenceStep(NamedTuple):
    """One pass of an inference run, with the lengths of its sequences in tokens.

    graph        its operations
    batch        sequences
    fed          tokens that the pass reads
    past         tokens already in the cache
    past_window  tokens in the cache of a layer with a sliding window
    window       tokens that attention sees in a layer with a sliding window
    room         tokens that a static cache has room for
    source       tokens that an encoder has read
    prompts      prompts that an encoder has read
    division     how weights are divided among ranks
    quantized    tokens of `past` that a quantised cache has quantised before the pass

    For assisted generation:

    cropped       last tokens of `past` that were rejected but are still in the cache's tensors
    grown         tokens in the cache of a layer with a sliding window after the pass
    rows          rows of logits that the pass returns
    before        rows of logits that the previous round used
    outputs       rows of logits that the previous round returned
    proposed      tokens proposed in the round
    assists       the pass is the assistant's
    loop_tensors  tensors that the generation loop holds throughout the pass
    other         latest pass of the other model, whose cache stays allocated
    """

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
    loop_tensors: tuple[TensorGroup, ...] = ()
    other: InferenceStep | None = None
    quantized: int = 0

    @property
    def residual(self) -> int:
        """Tokens of a quantised cache that are not quantised before the pass."""
        return self.past - self.quantized

    @property
    def residual_after(self) -> int:
        """Tokens of a quantised cache that are not quantised after the pass."""
        pass_ = self.graph.inference
        if pass_ is None or pass_.stored is None:
            return 0
        return pass_.stored.after(self.quantized, self.residual, self.fed)[1]

    @property
    def phase(self) -> str:
        return self.graph.inference.phase if self.graph.inference else ""


class PassPeak(NamedTuple):
    """The peak bytes of a pass without the weights, and the index and the operation of the peak's moment."""

    bytes: int
    moment: int
    where: str


def encoder_step(decided: ResolvedRun) -> InferenceStep:
    """Return the encoder's pass before its decoder generates. It reads each prompt once, for all beams together."""
    graph, batch = decided.structure.graph, decided.batch
    assert graph.inference is not None
    wiring = graph.wiring._replace(encoder_decoder_half="encoder", caching=False, beams=decided.beams > 1)
    encoder = graph._replace(
        wiring=wiring, inference=graph.inference._replace(phase="encode", cache="", spans_autocast=False)
    )
    return InferenceStep(encoder, batch.micro, batch.sequence, source=batch.sequence, prompts=batch.micro)


def cross_attends_to_images(graph: Graph) -> bool:
    """Whether some layers cross-attend to images, and cache their keys and values."""
    return graph.wiring.images and any(layer.mixer == "cross_attention" for layer in graph.model.layers)


def compresses(graph: Graph) -> bool:
    """Whether some layers keep compressed keys, one for each window of tokens."""
    return _compresses(graph.model)


@lru_cache(maxsize=128)
def _compresses(model: ModelSpec) -> bool:
    return any(layer.mixer in ("sparse", "heavy") for layer in model.layers)


def decoder_graph(graph: Graph) -> Graph:
    """Return the graph of an encoder-decoder's decoder alone, which reads the encoder's output."""
    return graph._replace(wiring=graph.wiring._replace(encoder_decoder_half="decoder"))


def decoder_steps(graph: Graph, decided: ResolvedRun) -> tuple[InferenceStep, ...]:
    """Return the passes of a decoder: those over its prompt, and the decoding passes that can be the largest."""
    decoding = (_token(graph, past, decided) for past in _decoding(decided))
    return (*_prompt(graph, decided), *decoding)


def token_after(past: int, decided: ResolvedRun) -> InferenceStep:
    """Return the pass that decodes the token after `past` tokens."""
    graph = decided.structure.graph
    return _token(decoder_graph(graph) if graph.model.is_encoder_decoder else graph, past, decided)


def _length(decided: ResolvedRun) -> int:
    """Return the tokens of the decoder's prompt."""
    batch = decided.batch
    return (batch.target_sequence or 1) if decided.structure.graph.model.is_encoder_decoder else batch.sequence


def _constant(graph: Graph, prompt: int, decided: ResolvedRun) -> tuple[int, int, int]:
    """Return the tokens that a static cache has room for, and the tokens and the prompts that an encoder has read.

    The last token is never fed to the model.
    """
    batch = decided.batch
    return prompt + batch.new_tokens - 1, batch.sequence if graph.wiring.encoder_decoder_half else 0, batch.micro


def _prompt(graph: Graph, decided: ResolvedRun) -> Iterator[InferenceStep]:
    """Yield the passes that read the prompt: one, or for a prompt read in parts the first two and the last two.

    The unquantised tokens of a quantised cache grow from part to part, so with such a cache all parts since tokens
    were last quantised are included.
    """
    pass_, prompt, window = graph.inference, _length(decided), graph.model.sliding_window or 0
    assert pass_ is not None
    rows, part = decided.batch.micro * decided.beams, min(decided.part or prompt, prompt)
    if part == prompt:
        if graph.wiring.encoder_decoder_half:  # a prompt of one token sees the entire static cache
            is_single = pass_.static and prompt == 1
            graph = graph._replace(wiring=graph.wiring._replace(decodes=prompt == 1, static=pass_.static))
            graph = graph._replace(inference=pass_._replace(reads_capacity=pass_.reads_capacity or is_single))
        seen = min(prompt, window or prompt)
        yield InferenceStep(graph, rows, prompt, 0, 0, seen, *_constant(graph, prompt, decided))
        return
    starts = range(0, prompt, part)
    candidates = {*starts[:2], *starts[-2:]}
    if pass_.stored is not None and pass_.stored.grouped:
        candidates.update(starts[-1 - -(-pass_.stored.residual // part) :])
    for past in sorted(candidates):
        fed = min(part, prompt - past)
        quantized = pass_.stored.quantized_of(past // part, part) if pass_.stored is not None else 0
        after = pass_.stored.after(quantized, past - quantized, fed)[0] if pass_.stored is not None else 0
        requantises = pass_.stored is not None and pass_.stored.grouped and after != quantized
        which: PromptPart = "first" if not past else "last" if past + fed == prompt else "middle"
        part_graph = graph._replace(inference=pass_._replace(part=which, requantises_cache=requantises and bool(past)))
        if past:
            masked = part_graph.wiring.padded or part_graph.wiring.backend != "flash_2"
            longer = bool(window) and past + fed > window
            wiring = part_graph.wiring._replace(
                padded=masked, windowed=bool(window), keeps_cache_layout=False, images=False
            )
            inference = part_graph.inference._replace(longer=longer) if part_graph.inference else None
            part_graph = part_graph._replace(wiring=wiring, inference=inference)
        kept = min(past, window - 1) if window else past
        if past and window and pass_.cache == "dynamic":  # the previous pass left a view of all its tokens
            kept = min(past - part, window - 1) + part
        seen = (min(past, window - 1) if window else past) + fed
        room = prompt + decided.batch.new_tokens - 1
        yield InferenceStep(part_graph, rows, fed, past, kept, seen, room, quantized=quantized)


def within(tokens: int, window: int) -> int:
    """Return the tokens that a window sees; all without one."""
    return min(tokens, window) if window else tokens


def _token(graph: Graph, past: int, decided: ResolvedRun) -> InferenceStep:
    """Return the graph's pass that decodes the token after `past` tokens."""
    prompt, rows, pass_ = _length(decided), decided.batch.micro * decided.beams, graph.inference
    assert pass_ is not None
    window, min_rows = graph.model.sliding_window or 0, MANY_ROWS.get(pass_.loaded.backend, 0)
    compressed = compressed_tokens.first_and_last(graph.model.axes(), past) if compresses(graph) else ((), ())
    quantized, requantises = 0, False
    if pass_.stored is not None:
        before, waiting = _quantised_prompt(decided, pass_.stored)
        quantized = _quantised_after(before, waiting, past - prompt, pass_.stored)
        requantises = pass_.stored.grouped and pass_.stored.after(quantized, past - quantized, 1)[0] != quantized
    windowed, longer = bool(window and past + 1 >= window), bool(window and past + 1 > window)
    unpacks, first = bool(min_rows and rows >= min_rows), bool(past == prompt)
    decoding = _decoding_graph(graph, first, bool(prompt == 1), windowed, longer, unpacks, requantises, *compressed)
    # the prompt's pass leaves the window as a view of all its tokens
    kept = _tokens_behind_view(decided, window) if first else within(past, window)
    if (decided.beams > 1 or pass_.cache == "offloaded") and window:  # here it was copied, and has the window only
        kept = min(past, window - 1)
    seen = within(past + 1, window)
    constant = _constant(graph, prompt, decided)
    return InferenceStep(decoding, rows, 1, past, kept, seen, *constant, quantized=quantized)


@lru_cache(maxsize=512)
def _decoding_graph(
    graph: Graph,
    first: bool,
    single: bool,
    windowed: bool,
    longer: bool,
    unpacks: bool,
    requantises: bool,
    begins: tuple[str, ...],
    fills: tuple[str, ...],
) -> Graph:
    """Return the graph of a decoding pass.

    first     it follows the prompt's pass
    single    the prompt is one token
    windowed  its tokens fill the window of a sliding layer
    begins    kinds of windows of compressed keys that it begins
    fills     kinds of these windows that it completes

    The others are as of `memplan.catalogue.inference.one_pass.Pass`.
    """
    pass_, crosses = graph.inference, bool(graph.wiring.encoder_decoder_half)
    assert pass_ is not None
    wiring = graph.wiring._replace(
        decodes=True,
        images=False,
        tower="",
        windowed=windowed,
        has_cross_cache=crosses or cross_attends_to_images(graph),
        keeps_cache_layout=False,
        static=pass_.static,
        opened_windows=begins,
        filled_windows=fills,
    )
    if pass_.static and not crosses and wiring.backend == "flash_2":  # a mask selects the filled keys: gathered
        wiring = wiring._replace(padded=True)
    token = pass_._replace(
        phase="decode",
        longer=longer,
        holds_prompt_logits=first and not (pass_.last_only or graph.model.has_all_logits),
        first=first and _caches_without_copy(graph),
        unpacks=unpacks,
        batches=pass_.batches_later_passes,
        keeps_skipped_casts=pass_.spans_autocast and (crosses or graph.wiring.images),
        reads_capacity=pass_.reads_capacity or (crosses and pass_.static and single),
        requantises_cache=requantises,
    )
    return graph._replace(wiring=wiring, inference=token)


@lru_cache(maxsize=512)
def _caches_without_copy(graph: Graph) -> bool:
    """Return whether a layer may cache the prompt as it is, so that the pass after it finds more than it reads.

    Of other models all decoding passes run the same operations.
    """
    if graph.inference is not None and graph.inference.cache.startswith("offloaded"):  # which holds nothing on the GPU
        return True
    blocks = (block for run in operations_of(graph)[0].runs for block in run.blocks)
    return any(op.view and op.holds == "cache" for block in blocks for op in block.ops)


def _tokens_behind_view(decided: ResolvedRun, window: int) -> int:
    """Return the tokens that the prompt's last pass had in a layer with a window, of which it leaves a view."""
    prompt = _length(decided)
    before = (prompt - 1) // decided.part * decided.part if decided.part else 0
    return (min(before, window - 1) if window else before) + prompt - before


def _quantised_prompt(decided: ResolvedRun, stored: CacheQuantization | None) -> tuple[int, int]:
    """Return how many tokens of the prompt are quantised and how many are not, once a quantised cache has them all."""
    prompt = _length(decided)
    part = min(decided.part or prompt, prompt)
    if stored is None:
        return 0, 0
    last_part = (prompt - 1) // part * part
    quantized = stored.quantized_of(last_part // part, part)
    return stored.after(quantized, last_part - quantized, prompt - last_part)


def _decoding(decided: ResolvedRun) -> Iterable[int]:
    """Return the number of past tokens of each decoding pass that can be the largest.

    These are the first and the last pass. With a quantised cache, also the last pass that quantises all tokens again,
    and the one before it, when most tokens are unquantised. With compressed keys, also passes that complete a window.
    """
    pass_, prompt, new = decided.structure.graph.inference, _length(decided), decided.batch.new_tokens - 1
    if not new:
        return ()
    later = {0, new - 1}  # tokens after the prompt's
    if pass_ is not None and pass_.stored is not None and pass_.stored.grouped:
        _, waiting = _quantised_prompt(decided, pass_.stored)
        requantising = (waiting + new) // pass_.stored.residual * pass_.stored.residual - waiting - 1
        later |= {tokens for tokens in (requantising - 1, requantising) if tokens >= 0}
    if compresses(decided.structure.graph):
        turning = compressed_tokens.turning_points(decided.structure.graph.model.axes(), prompt, prompt + new - 1)
        later |= {past - prompt for past in turning}
    return [prompt + tokens for tokens in sorted(later)]


def _quantised_after(quantized: int, waiting: int, tokens: int, stored: CacheQuantization) -> int:
    """Return how many tokens are quantised after `tokens` were decoded one by one. `quantized` and `waiting` count the
    prompt's tokens."""
    unquantised = waiting + tokens
    return quantized + (unquantised // stored.residual * stored.residual if stored.grouped else unquantised)


def _kept_offloaded(step: InferenceStep) -> int:
    window, tokens = step.graph.model.sliding_window, step.past + step.fed
    return min(tokens, max(1, window) - 1) if window else tokens


# Lengths of a pass by the axis that stands for them.
_LENGTHS: Mapping[str, Callable[[InferenceStep, ResolvedRun], int]] = {
    "kv": lambda step, _: step.past - step.cropped + step.fed,
    "past": lambda step, _: step.past,
    "kv_window": lambda step, _: step.window,
    "past_window": lambda step, _: step.past_window,
    "kv_static": lambda step, _: step.room,
    "kv_window_static": lambda step, _: within(step.room, step.graph.model.sliding_window or 0),
    "prompt": lambda _, decided: decided.batch.sequence,
    offloaded_caches.KEPT: lambda step, _: _kept_offloaded(step),
    quantized_caches.QUANTIZED: lambda step, _: step.quantized,
    quantized_caches.RESIDUAL: lambda step, _: step.residual,
    quantized_caches.AFTER: lambda step, _: step.residual_after,
    quantized_caches.RANKED: lambda step, _: int(step.phase == "decode"),
    "kv_window_grown": lambda step, _: step.grown,
    "verified": lambda step, _: step.rows,
    "verified_before": lambda step, _: step.before,
    "outputs_before": lambda step, _: step.outputs,
    "proposed": lambda step, _: step.proposed,
    "source": lambda step, _: step.source,
    "prompts": lambda step, _: step.prompts,
    "rows": lambda step, decided: step.prompts * decided.beams,
}
_ROUNDED = ("kv", "kv_window", "kv_static", "kv_window_static", "source")


_AT_LEAST_ONE = frozenset(("b", "s", "s1", "s8", "s32", "s128", "kv", "kv1", "kv8", "kv32", "kv128", "kv_static"))


def fixed_axes(graph: Graph) -> dict[str, int]:
    """Return the axes of a pass that no run decides."""
    axes = operations_of(graph)[1]
    fixed = {axis: n for axis, n in axes.items() if axis not in _AT_LEAST_ONE}  # Whisper's `s` is its encoder's
    return {**fixed, "kernel1": axes.get("kernel", 0) + 1}


_FEW = 2  # sizes at which an estimate asks for the peak of a pass: those of the first and of the last token


class Contenders:
    """The moments of a pass that can be its peak, at any sizes.

    variables   sizes that the run decides
    needs       axes of `variables` that are not the model's
    fixed       sizes of the model's axes
    lengths     lengths of the pass that are needed
    rounded     lengths of which rounded values are needed
    compresses  whether some layers keep compressed keys
    """

    def __init__(self, graph: Graph, division: Division | None = None) -> None:
        low, fixed = lower_inference(graph, division=division), fixed_axes(graph)
        sizes = [size(key[0], key[1], fixed) for key in low.sizes]
        self.variables = variables = tuple(sorted({variable for variable, _ in sizes}))
        *coefficients, self._left = rows((*low.moments.unnamed, low.left), low.runs, fixed, sizes, variables)
        self._rows = dict[tuple[int, ...], int]()  # their first moments
        for moment, row in enumerate(coefficients):
            self._rows.setdefault(row, moment)
        self._along = chain(tuple(v for v in variables if _AT_LEAST_ONE.issuperset(v.axes)) or (ONE,))  # else may be 0
        self._sums_left = _FEW
        self._last: tuple[Mapping[str, int], PassPeak] | None = None
        self._lowering, self._where = (graph, division), dict[int, str]()
        needs = frozenset(axis for key in low.sizes for axis in key[0].split() if not axis.isdigit())
        self.needs, self.fixed, self.compresses = needs.difference(fixed), operations_of(graph)[1], compresses(graph)
        self.rounded = tuple(n for n in _ROUNDED if not self.needs.isdisjoint(rounded_axes(n, 0, ONE_RUN)))
        self.lengths = tuple(n for n in _LENGTHS if n in self.needs or n in self.rounded or n == "kv")

    def peak(self, sizes: Mapping[str, int]) -> PassPeak:
        """Return the peak bytes of the pass, and its moment. That of the last sizes is kept."""
        last = self._last
        if last is None or last[0] is not sizes:
            bytes_, moment = self._most(values(self.variables, sizes))
            last = self._last = sizes, PassPeak(bytes_, moment, self.where(moment))
        return last[1]

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """The moments that can be the peak. Finding them takes longer than the sums of all moments at a few sizes."""
        return prune(self._rows.items(), self.variables, self._along)

    @cached_property
    def _of_terms(self) -> PhaseTerms:
        return PhaseTerms([self.terms])

    def _most(self, numbers: list[int]) -> tuple[int, int]:
        """Return the most bytes and their moment: at the first sizes from the sums of all moments, unless several of
        these are equally large."""
        if self._sums_left:
            self._sums_left -= 1
            sums = [sum(map(mul, row, numbers)) for row in self._rows]
            most = max(sums, default=0)
            if sums.count(most) == 1:
                return most, [*self._rows.values()][sums.index(most)]
        return self._of_terms.largest(numbers)[0]

    def where(self, moment: int) -> str:
        """Return the operation of a moment."""
        if moment not in self._where:
            graph, division = self._lowering
            self._where[moment] = lower_inference(graph, division=division).moments[moment].where
        return self._where[moment]

    def bytes_left(self, sizes: Mapping[str, int]) -> int:
        """Return the bytes that the pass leaves."""
        return sum(map(mul, self._left, values(self.variables, sizes)))


@lru_cache(maxsize=512)
@once
def contenders(graph: Graph, division: Division | None = None) -> Contenders:
    """Return the moments of a pass that can be its peak. Takes milliseconds, then is cached."""
    return Contenders(graph, division)


def _sizes_of(step: InferenceStep, decided: ResolvedRun, moments: Contenders) -> FrozenDict:
    """Return the sizes of every axis that a pass needs and no model decides."""
    if step.assists:
        assert decided.assistant is not None
        assert decided.assistant.drafts is not None
        decided = decided.assistant.drafts
    graph, needs, fixed, by = step.graph, moments.needs, moments.fixed, arithmetic_of(step.batch, step.fed, step.past)
    sizes = {name: _LENGTHS[name](step, decided) for name in moments.lengths}
    if "chosen_keys" in needs:
        sizes["chosen_keys"] = by.least(sizes["kv"], graph.model.config_int("index_topk"))
    if moments.compresses and step.phase == "decode":
        top = graph.model.config_int("index_topk")
        sizes |= compressed_tokens.axes_of_token(fixed, step.past, _length(decided), step.window, top)
    if "key_block" in fixed:
        static = graph.inference is not None and graph.inference.keys("kv") == "kv_static"
        sizes |= blocks_of_keys(fixed, step.room if static else sizes["kv"], by)
    for name in moments.rounded:
        sizes |= rounded_axes(name, sizes[name], by)
    axes = axes_of(
        graph,
        needs.difference(sizes),
        step.batch,
        step.fed,
        decided.half,
        decided.large_tiles,
        by,
        decided.pictures,
        decided.batch.target_sequence,
    )
    sizes = axes | sizes
    few_rows = graph.inference.few_rows if graph.inference is not None else 0
    return FrozenDict(sizes | copied_axes(needs, sizes, fixed, few_rows, decided.gpu))


class SizedPass(NamedTuple):
    """A pass with a number for each of its axes. Bytes are without the weights.

    sizes       of the axes that no model decides
    contenders  the moments that can be its peak
    """

    step: InferenceStep
    sizes: FrozenDict
    contenders: Contenders

    @property
    def axes(self) -> Mapping[str, int]:
        return {**fixed_axes(self.step.graph), **self.sizes}

    @property
    def phase(self) -> str:
        return self.step.phase

    @property
    def peak(self) -> PassPeak:
        return self.contenders.peak(self.sizes)

    def low(self, labelled: bool = False) -> Lowered:
        """Return the lowered moments of the pass; its tensors have names if `labelled`."""
        return lower_inference(self.step.graph, labelled, self.step.division)

    def bytes_of_sizes(self) -> list[int]:
        """Return the bytes of one storage of each size of the pass."""
        axes = self.axes
        return [size(key[0], key[1], axes)[1] for key in self.low().sizes]

    def counts(self) -> Iterator[dict[int, int]]:
        """Yield how many storages of each size in bytes are alive at every moment."""
        low = self.low()
        return counts_at_each(low.moments.unnamed, low.runs, self.axes, self.bytes_of_sizes())

    def bytes_left(self) -> int:
        """Return the bytes that the pass leaves."""
        return self.contenders.bytes_left(self.sizes)

    def moments(self) -> Iterator[tuple[str, int]]:
        """Yield where each moment of the pass is, and the bytes alive at it."""
        low = self.low()
        live = bytes_at_each(low.moments.unnamed, low.runs, self.axes, self.bytes_of_sizes())
        yield from ((moment.where, bytes_) for moment, bytes_ in zip(low.moments, live, strict=True))

    def kinds(self, moments: Iterable[Moment] | None = None) -> Iterator[Counter[str]]:
        """Yield the bytes of each kind alive at every moment of the pass, or at those of `moments`."""
        low, axes = self.low(labelled=True), self.axes
        sizes = [size(key[0], key[1], axes)[1] for key in low.sizes]
        every = low.moments.unnamed if moments is None else moments
        return kinds_at_each(every, low.runs, axes, sizes, low.kinds)


def sized(step: InferenceStep, decided: ResolvedRun) -> SizedPass:
    """Return a pass of the run with a number for each of its axes."""
    moments = contenders(step.graph, step.division)
    return SizedPass(step, _sizes_of(step, decided, moments), moments)
