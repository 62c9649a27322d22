"""Tokens per second when running a model: a roofline of what a step reads and computes, as a best and a worst case.

A decoding step reads, once per batch, every weight that one of its tokens uses, and every request's caches; the pass
over a prompt multiplies all of its tokens with every weight. Bytes and operations are counted from the stored tensors
and the layers' caches; seconds come from rows of `memplan.catalogue.hardware.token_rates` and `.links`, each of which
is listed in the answer. There is no usual figure, only two ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from math import prod

from memplan.catalogue import build
from memplan.catalogue.hardware import links, token_rates
from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.token_rates import Span
from memplan.catalogue.inference.cache_formats import cache_format
from memplan.catalogue.inference.caches import Latent, LayerCache, caches
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Op
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE
from memplan.models.model import ModelSpec
from memplan.planning.step_time import limits
from memplan.program.stored.checkpoint import parameters
from memplan.program.stored.weights import StoredWeight, stored_weights
from memplan.program.weight_sizes import active_elements, elements
from memplan.spec.formats import Quantization

# Share of memory bandwidth that kernels reach, by the dtype of a stored tensor (memplan's and ggml's names). Other
# dtypes are packed formats.
_READ_RATES = {
    **dict.fromkeys(("bf16", "fp16", "fp32", "BF16", "F16", "F32"), token_rates.PLAIN),
    **dict.fromkeys(("fp8", "int8", "Q8_0"), token_rates.EIGHT),
}
_BITSANDBYTES = ("nf4", "fp4", "int8")
_GPUS_PER_SERVER = 8  # more GPUs communicate over the network
_TOWERS = ("vision", "projector", "audio")  # read once for a prompt's images, never for a token
# All-reduces of a layer: after attention and after its MLP. Shoeybi et al. 2019, arXiv:1909.08053, section 3
_ALL_REDUCES = 2


class Load(NamedTuple):
    """A model, and how it is run.

    quantization  weight format, as `stored_weights` takes it
    dtype         dtype of computation and of unquantised weights
    cache_dtype   dtype of keys and values: memplan's name, or ggml's in lower case; empty for `dtype`
    latent        how latent attention is cached (`memplan.catalogue.inference.caches`)
    tp            tensor-parallel degree, which divides matrices and the caches' heads
    share         returns the bytes of a stored tensor on one rank; None divides matrices evenly
    host          microseconds that the host takes per step, if `recorded`
    recorded      whether CUDA graphs are used; if not, the host launches every kernel
    """

    model: ModelSpec
    quantization: str | Quantization | None = None
    dtype: str = "bf16"
    cache_dtype: str = ""
    latent: Latent = "latent"
    tp: int = 1
    share: Callable[[StoredWeight], int] | None = None
    host: Span = token_rates.SCHEDULING
    recorded: bool = True


class DecodingWork(NamedTuple):
    """The work of one rank in a step.

    weights     (rate, bytes) of weights that are read
    caches      bytes of caches that are read at the first and at the last new token
    operations  operations of products with weights
    attending   operations of attention
    sent        bytes of one all-reduce
    sums        number of all-reduces
    kernels     kernels that the host launches
    experts     experts that a layer reads, and all it has; (0, 0) without experts
    """

    weights: tuple[tuple[Span, int], ...]
    caches: tuple[int, int]
    operations: int
    attending: int
    sent: int
    sums: int
    kernels: int
    experts: tuple[float, int]

    @property
    def bytes(self) -> int:
        """Bytes of weights that are read."""
        return sum(n for _, n in self.weights)


class Seconds(NamedTuple):
    """Seconds at the best and at the worst end of all rates."""

    low: float
    high: float


class DecodingPace(NamedTuple):
    """The speed of a step.

    step      seconds
    tokens    tokens of the step over all requests
    requests  concurrent requests
    bound     what takes longest at the best and the worst end: memory, products or the host
    work      work of one rank
    assumed   every rate that was used
    notes     substitutes for rates the card does not have, and what is left out
    """

    step: Seconds
    tokens: int
    requests: int
    bound: tuple[str, str]
    work: DecodingWork
    assumed: tuple[Span, ...]
    notes: tuple[str, ...]

    @property
    def tokens_per_second(self) -> Seconds:
        """Tokens per second over all requests, the lowest first."""
        return Seconds(self.tokens / self.step.high, self.tokens / self.step.low)

    @property
    def per_request(self) -> Seconds:
        """Tokens per second of each request, the lowest first."""
        return Seconds(*(n / self.requests for n in self.tokens_per_second))


def distinct(every: int, chosen: int, tokens: int) -> float:
    """Return the expected number of distinct experts that `tokens` use if each chooses `chosen` of `every` at random.

    >>> distinct(128, 8, 1), round(distinct(128, 8, 16), 1), distinct(8, 8, 3)
    (8.0, 82.4, 8.0)
    """
    return every * (1 - (1 - chosen / every) ** tokens)


@lru_cache(maxsize=512)
def decoding(load: Load, prompt: int, new_tokens: int, requests: int) -> DecodingWork:
    """Return the work of a decoding step: one token for each request.

    Caches are counted at the prompt's length and at all tokens but the last.
    """
    read = _weight_reads(load, requests)
    first, last = prompt, prompt + max(0, new_tokens - 1)
    caches_ = tuple(requests * _cached(load, n, prompt) for n in (first, last))
    return DecodingWork(
        read.weights,
        (caches_[0], caches_[1]),
        2 * requests * read.multiplied,
        requests * _attending(load, caches(load.model, load.latent), 1, last, prompt),
        requests * load.model.hidden_size * ITEMSIZE[load.dtype],
        _sums(load),
        0 if load.recorded else _kernels(load.model),
        read.experts,
    )


@lru_cache(maxsize=512)
def prefilling(load: Load, prompt: int, requests: int = 1) -> DecodingWork:
    """Return the work of a pass over prompts: every token through every layer, logits only for the last token."""
    tokens = prompt * requests
    read = _weight_reads(load, tokens)
    return DecodingWork(
        read.weights,
        (0, 0),
        2 * (tokens * (read.multiplied - read.head) + requests * read.head),
        requests * _attending(load, caches(load.model, "expanded"), prompt, prompt, prompt),
        tokens * load.model.hidden_size * ITEMSIZE[load.dtype],
        _sums(load),
        0 if load.recorded else _kernels(load.model),
        read.experts,
    )


def decode(load: Load, gpu: GPU, prompt: int, new_tokens: int, requests: int = 1) -> DecodingPace:
    """Return the decoding speed of concurrent requests, which each get a token per step."""
    return _pace(load, gpu, decoding(load, prompt, new_tokens, requests), requests, requests)


def prefill(load: Load, gpu: GPU, prompt: int, requests: int = 1) -> DecodingPace | None:
    """Return the speed of reading prompts; None if the catalogue has no rate for the card's products."""
    if _rates(gpu, load)[0] is None:
        return None
    work = prefilling(load, prompt, requests)
    return _pace(load, gpu, work, prompt * requests, requests)


def _pace(load: Load, gpu: GPU, work: DecodingWork, tokens: int, requests: int) -> DecodingPace:
    ends: list[tuple[float, str]] = []
    (fast, slow), note = _rates(gpu, load)[1:]
    link = links.node_link(gpu, load.tp) if load.tp <= _GPUS_PER_SERVER else links.network(gpu)
    for best in (True, False):

        def share_at_end(span: Span, best: bool = best) -> float:
            return (span.high if best else span.low) / 100

        bandwidth = (gpu.bandwidth_gbps or 0) * 1e9 / gpu.devices
        reads = (*work.weights, (token_rates.PLAIN, work.caches[not best]))
        reading = sum(n / (bandwidth * share_at_end(span)) for span, n in reads)
        rate = fast if best else slow
        computing = 0.0
        if rate is not None:
            computing = work.operations / (rate * share_at_end(token_rates.PRODUCTS))
            computing += work.attending / (rate * share_at_end(token_rates.ATTENTION))
        host = work.kernels * (token_rates.LAUNCH.low if best else token_rates.LAUNCH.high) * 1e-6
        parts = {"memory": reading, "products": computing, "the host": host}
        bound = max(parts, key=parts.__getitem__)
        # At best everything overlaps; at worst reading and computing take turns.
        busy = parts[bound] if best else max(reading + computing, host)
        between = 0.0 if work.kernels else (load.host.low if best else load.host.high) * 1e-6
        ends.append((busy + _communication(load, work, link, best) + between, bound))
    (low, first), (high, second) = ends
    assumed = tuple(_assumed(load, work, link, fast is not None))
    return DecodingPace(
        Seconds(low, high), tokens, requests, (first, second), work, assumed, tuple(_notes(load, work, note))
    )


def _assumed(load: Load, work: DecodingWork, link: links.Link, computes: bool) -> Iterator[Span]:
    yield from (span for span, _ in work.weights)
    if computes:
        yield token_rates.PRODUCTS
        if work.attending:
            yield token_rates.ATTENTION
    yield load.host if load.recorded else token_rates.LAUNCH
    if load.tp > 1:
        share, hop = link.share, link.hop
        yield Span(f"{link.name}, {share.what}", share.low, share.high, share.basis, share.source)
        yield Span(f"{link.name}, {hop.what}", hop.low, hop.high, hop.basis, hop.source)


def _notes(load: Load, work: DecodingWork, note: str) -> Iterator[str]:
    if note:
        yield note
    if work.experts[1]:
        yield (
            f"tokens are assumed to choose experts uniformly: {work.experts[0]:.1f} of {work.experts[1]} are read in a "
            "layer; if some are chosen more often, fewer are read"
        )
    if any(p.name == "index keys" for layer in caches(load.model, load.latent) for p in layer.parts):
        yield "attention that selects keys by an index is counted as reading all of them: long contexts are faster"
    if load.tp > 1:
        yield "at best an all-reduce takes one hop, as in one kernel; at worst it goes round a ring twice"


def _communication(load: Load, work: DecodingWork, link: links.Link, best: bool) -> float:
    """Return the seconds of all-reduces: a ring sends 2 (n - 1) / n of the tensor."""
    n = load.tp
    if n == 1:
        return 0.0
    share = link.share.high if best else link.share.low
    hops = 1 if best else 2 * (n - 1)
    hop = (link.hop.low if best else link.hop.high) * 1e-7
    return work.sums * (2 * (n - 1) / n * work.sent / (link.bytes * share / 100) + hops * hop)


def _rates(gpu: GPU, load: Load) -> tuple[float | None, tuple[float | None, float | None], str]:
    """Return operations per second in `load.dtype`, then at best and at worst, and a note.

    Formats with 8-bit weights and inputs may use the card's 8-bit units.
    """
    known = limits(gpu, frozenset((load.dtype,)))
    slow = known.operations[load.dtype] if known else None
    note = (
        known.note
        if known
        else f"{gpu.title} has no rate for matrix products in the catalogue: only reading is counted"
    )
    name, fast = format_of(load), slow
    eight = gpu.fp8_tflops if name.startswith(("fp8", "mxfp8")) else gpu.int8_tops if name.startswith("w8a8") else None
    if slow is not None and eight is not None:
        fast = max(slow, eight * 1e12 / gpu.devices)
    return slow, (fast, slow), note


def format_of(load: Load) -> str:
    """Return the name of the weight format; empty if none was given."""
    quantization = load.quantization
    return quantization.format if isinstance(quantization, Quantization) else quantization or ""


class _WeightReads(NamedTuple):
    """Weight bytes by rate, and parameters multiplied per token: all of them, and the head's."""

    weights: tuple[tuple[Span, int], ...]
    multiplied: int
    head: int
    experts: tuple[float, int]


@lru_cache(maxsize=512)
def _weight_reads(load: Load, tokens: int) -> _WeightReads:
    """Return what a pass of `tokens` tokens reads of the weights on one rank."""
    model, axes = load.model, load.model.axes()
    chosen = {p.name: (active_elements(p.weight, axes), elements(p.weight, axes), p.weight) for p in parameters(model)}
    multiplied = head = 0
    weights: dict[Span, int] = {token_rates.PLAIN: 0}
    experts = (0.0, 0)
    name = format_of(load)
    seen: set[str] = set()
    for w in stored_weights(model, load.quantization, load.dtype):
        if w.group in _TOWERS:
            continue
        used, every, weight = chosen.get(w.name, (1, 1, None))
        part, bytes_ = 1.0, _on_rank(load, w)
        if used < every:
            n = axes["E"]
            read = distinct(n, n * used // every, tokens)
            experts, part = (read, n), read / n
        if w.group == "embedding" and not model.tie_word_embeddings:
            part = min(1.0, tokens / w.shape[0])
        span = _READ_RATES.get(w.dtype, token_rates.FEWER)
        if span is not token_rates.PLAIN and name in _BITSANDBYTES:
            span = token_rates.BITSANDBYTES
        weights[span] = weights.get(span, 0) + round(bytes_ * part)
        multiplies = weight is not None and weight.rows and (w.group != "embedding" or model.tie_word_embeddings)
        if multiplies and w.name not in seen:
            numbers = prod(w.shape) * used // every // load.tp
            multiplied += numbers
            head += numbers if w.group in ("lm_head", "embedding") else 0
        seen.add(w.name)
    return _WeightReads(tuple(weights.items()), multiplied, head, experts)


def _on_rank(load: Load, w: StoredWeight) -> int:
    if load.share is not None:
        return load.share(w)
    return -(-w.bytes // load.tp) if len(w.shape) > 1 and w.group not in ("norm", "router") else w.bytes


def _cached(load: Load, tokens: int, source: int) -> int:
    """Return the bytes of one request's caches on a rank that a step reads."""
    total = 0
    for layer in caches(load.model, load.latent):
        for part in layer.parts:
            entries = part.entries(tokens, layer.last, source)
            kept = cache_format(part.stored_in(load.dtype, load.cache_dtype or load.dtype))
            heads = part.heads if part.per == "token" and part.heads else 0
            each = -(-heads // load.tp) * kept.head(part.elements // heads) if heads else kept.head(part.on(load.tp))
            total += entries * each
    return total


def _attending(load: Load, layers: Iterable[LayerCache], tokens: int, context: int, source: int) -> int:
    """Return the operations of attention for the last `tokens` of `context`: two products over every visible key."""
    return sum(_layer_attention(load.model, layer, tokens, context, source) for layer in layers) // load.tp


def _layer_attention(model: ModelSpec, layer: LayerCache, tokens: int, context: int, source: int) -> int:
    """Return the operations of attention in one layer.

    A head's key and value are as wide as their cache entries; with latent attention, scores and outputs are both as
    wide as the latent.
    """
    width = sum(p.elements // max(1, p.heads) for p in layer.parts if p.per == "token" and p.every == 1)
    if layer.kind == "latent":
        width += next((p.elements for p in layer.parts if p.name == "latent"), 0)
    seen = sum(min(context - tokens + 1 + i, layer.window or context) for i in (0, tokens - 1)) * tokens // 2
    if layer.window is not None and tokens > layer.window:
        seen = layer.window * (tokens - layer.window) + layer.window * (layer.window + 1) // 2
    across = sum(p.elements // max(1, p.heads) for p in layer.parts if p.per == "source")
    return 2 * model.num_attention_heads * (seen * width + tokens * source * across)


def _sums(load: Load) -> int:
    return _ALL_REDUCES * load.model.num_hidden_layers if load.tp > 1 else 0


@lru_cache(maxsize=64)
def _kernels(model: ModelSpec) -> int:
    """Return the ops of a forward pass that write something, which is about the number of kernels."""
    stack, axes = build(model, Wiring("flash", "efficient")), model.axes()

    def writing(ops: tuple[Op, ...]) -> int:
        return sum(1 for op in ops if op.writes and not op.view)

    each = (writing(r.before) + axes[r.times] * sum(writing(b.ops) for b in r.blocks) for r in stack.runs)
    return writing(stack.before) + sum(each) + writing(stack.after)
