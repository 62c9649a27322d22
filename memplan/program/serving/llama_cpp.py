"""llama.cpp: a cache with a fixed number of slots of a fixed length, allocated at the start, and one compute buffer.

Source: llama.cpp (llama-cpp-python 0.3.36) src/llama-context.cpp, src/llama-kv-cache.cpp, src/llama-kv-cache-iswa.cpp,
src/llama-memory-recurrent.cpp, src/llama-graph.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from memplan.catalogue.inference.caches import CONVOLUTION, LayerCache, caches
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE
from memplan.models.layers import Layer
from memplan.program.serving.draft import layers_ahead
from memplan.program.serving.pool import Slots
from memplan.program.serving.rank_share import TOWERS, buffer_of, layer_of
from memplan.program.serving.settings import Settings
from memplan.program.stored.weights import stored_weights

_PAD = 256  # tokens: lengths are rounded up to a multiple


def padded(tokens: int) -> int:
    return -(-tokens // _PAD) * _PAD


def pool(s: Settings, available: int) -> Slots:
    """Return the cache of the GPU's layers, which does not depend on `available`."""
    del available
    slots, longest = s.serving.max_num_seqs or 1, padded(s.longest)
    total = sum(_cache_bytes(s, c, slots, longest) for c in s.caches)
    if s.draft is not None and s.draft.settings is not None:  # a second context with equal slots
        total += pool(s.draft.settings, 0).total * (layers_ahead(s.model) if s.draft.method == "mtp" else 1)
    return Slots(longest * slots, slots, total, longest)


def _cache_bytes(s: Settings, c: LayerCache, slots: int, longest: int) -> int:
    """Return the bytes of one layer's cache."""
    if c.kind == "state":
        kernel = s.model.axes()["kernel"]
        dropped = sum(p.elements // kernel for p in c.parts if p.name.startswith(CONVOLUTION))  # one column less
        return slots * _states(s) * (sum(p.elements for p in c.parts) - dropped) * ITEMSIZE["fp32"]
    return slots * _cells(s, c, longest) * sum(s.cache_bytes(p) for p in c.parts)


def _states(s: Settings) -> int:
    """Return the states of one slot: with multi-token prediction also those before each proposed token.

    Source: src/llama-arch.cpp llm_arch_supports_rs_rollback, common/common.h need_n_rs_seq.
    """
    if s.draft is None or s.draft.method != "mtp" or not s.model.family.checkpoint.gguf_rolls:
        return 1
    return 1 + s.draft.tokens


def _cells(s: Settings, c: LayerCache, longest: int) -> int:
    """Return the tokens of one slot: with a window, the window and one step, but no more than without."""
    if _windowed(s, c) and c.window is not None:
        return padded(min(longest, c.window + s.steps))
    return longest


def _windowed(s: Settings, c: LayerCache) -> bool:
    """Whether a layer caches only a sliding window or a chunk. Source: src/llama-kv-cache-iswa.cpp."""
    has_window = c.kind in ("sliding", "chunked") and s.model.family.serving.llama_cpp_window
    return has_window and bool(s.serving.hybrid_cache)


class ComputeBuffer(NamedTuple):
    """The peak of a graph: where it is, and the tensors alive, each with its shape in numbers and its bytes."""

    where: str
    alive: tuple[tuple[str, tuple[int, ...], int], ...]

    @property
    def bytes(self) -> int:
        return sum(bytes_ for _, _, bytes_ in self.alive)


_COPIES = 4  # ggml/src/ggml-backend.cpp GGML_SCHED_MAX_COPIES
_I32, _I64, _F32 = 4, 8, 4
_Row = tuple[str, tuple[int, ...], int]


def pipelined(s: Settings) -> bool:
    """Whether several GPUs that have all layers pipeline their steps, which takes four copies of a GPU's inputs.

    Source: src/llama-context.cpp, pipeline_parallel.
    """
    every_layer = (s.serving.gpu_layers or 0) > s.model.num_hidden_layers
    return s.ranks.cards > 1 and every_layer and not s.serving.overrides


def outputs(s: Settings) -> int:
    """Return the tokens of a step that get logits: in llama-server, one for each slot.

    Source: tools/server/server-context.cpp server_output_limits.
    """
    return min(s.steps, s.serving.max_num_seqs or 1)


def compute_buffer(s: Settings, logits: int | None = None) -> ComputeBuffer:
    """Return the compute buffer of the GPU's graph for a step of `ubatch` tokens with a full cache; `logits` tokens get
    logits.

    llama.cpp reserves it before it has data, and tests compare this with what it reserves for 40 models, GPUs and
    settings. For a dense layer it is exact to the byte: at the peak there are three rows of the FFN's width, and three
    of the hidden width, one of which is a hole left by a freed row. With pipelined steps there are four copies of each
    input.
    """
    logits = outputs(s) if logits is None else logits
    layers = _computed(s)
    if not layers and not s.stage.headed:
        return ComputeBuffer("nothing", ())
    buffers = [_output(s, logits)] if s.stage.headed else []
    if layers:
        buffers += [*_ffn(s, layers), *_mixer(s, layers)]
    inputs = tuple(_inputs(s, logits))
    if pipelined(s):
        received = ("hidden", "the FFN's output") if s.stage.receives_hidden else ("embeddings",)
        inputs = (*inputs, *(_row(what, s.steps, s.model.hidden_size) for what in received))
        inputs = tuple((f"{what}, {_COPIES} times", shape, _COPIES * bytes_) for what, shape, bytes_ in inputs)
        return max((b._replace(alive=(*b.alive, *inputs)) for b in buffers), key=lambda b: b.bytes)
    later = tuple(row for row in inputs if row[0] != "mask") if _host_layers(s) else inputs  # the mask is freed by then
    inputs_at = {"output": (), "attention": inputs}
    with_inputs = [b._replace(alive=(*b.alive, *inputs_at.get(b.where, later))) for b in buffers]
    return max((*with_inputs, *_offloaded(s, with_inputs, layers)), key=lambda b: b.bytes)


def _host_layers(s: Settings) -> int:
    """Return the number of layers on the host."""
    return max(0, s.model.num_hidden_layers + 1 - (s.serving.gpu_layers or 0))


def _computed(s: Settings) -> tuple[Layer, ...]:
    """Return the layers that the GPU computes: its own, and on the first GPU also the host's if a step has 32 or more
    tokens.

    Source: ggml-cuda.cu ggml_backend_cuda_device_offload_op.
    """
    first, last = s.stage.first, s.stage.last
    mine, on_host = s.model.layers[first:last], _host_layers(s)
    return (*s.model.layers[:on_host], *mine) if on_host and not s.stage.number and s.steps >= _LEAST_COPIED else mine


_LEAST_COPIED = 32  # tokens: ggml-cuda.cu ggml_backend_cuda_device_offload_op min_batch_size


def _row(what: str, *shape: int, size: int = _F32) -> _Row:
    return what, shape, size * prod(shape)


def _inputs(s: Settings, logits: int) -> Iterator[_Row]:
    """Yield a step's inputs besides tokens: masks, positions, indices of keys and values, and which tokens get logits.

    Source: src/llama-graph.cpp build_attn_inp_kv, build_inp_pos, build_inp_out_ids; src/llama-kv-cache.cpp
    build_input_v_idxs, which has an index for every element of values that are stored transposed.
    """
    steps, longest, flash = s.steps, padded(s.longest), s.serving.flash_attention
    kinds = dict.fromkeys((_cells(s, c, longest), _windowed(s, c)) for c in caches(s.model) if c.kind != "state")
    yield _row("positions", steps, size=_I32)
    for cells, _ in kinds:
        yield _row("mask", steps, cells, size=2 if flash else 4)
        yield _row("where keys go", steps, size=_I64)
        if "kl" in s.model.axes():
            continue
        values = 1 if flash else max(p.elements for c in caches(s.model) for p in c.parts if p.name == "values")
        yield _row("where values go", steps, values, size=_I64)
    if s.stage.headed:
        yield "which tokens have logits", (logits,), -(-logits * _I32 // 32) * 32


def _output(s: Settings, logits: int) -> ComputeBuffer:
    hidden = _row("hidden", s.steps, s.model.hidden_size)
    return ComputeBuffer("output", (_row("logits", logits, s.model.vocab_size), hidden))


def _ffn(s: Settings, layers: tuple[Layer, ...]) -> Iterator[ComputeBuffer]:
    """Yield the buffers of the FFN and of the experts. Outputs of experts reuse a freed row if it is wide enough."""
    m, steps = s.model, s.steps
    axes, h = m.axes(), m.hidden_size
    width = max((layer.f for layer in layers if layer.ffn not in ("experts", "hashed", "none", "")), default=0)
    three = (_row("hidden", steps, h), _row("residual", steps, h), _row("room of a freed row", steps, h))
    if width:
        rows = three[:2] if m.family.checkpoint.gguf_fuses else three
        gates = tuple(_row(what, steps, width) for what in ("gate", "up", "activated"))
        yield ComputeBuffer("mlp", (*rows, *gates))
    if "E" in axes and any(layer.ffn in ("experts", "hashed") for layer in layers):
        e, wide = axes["e"], axes.get("m") or max(layer.f for layer in layers)
        gates = tuple(_row(f"experts' {what}", steps, e, wide) for what in ("gate", "up", "activated"))
        if h <= 2 * wide:
            yield ComputeBuffer("experts", (*three, *gates))
        else:
            extra = (_row("experts' outputs", steps, e, h), _row("their sum", steps, h))
            yield ComputeBuffer("experts", (*three, *gates, *extra))


def _mixer(s: Settings, layers: tuple[Layer, ...]) -> Iterator[ComputeBuffer]:
    """Yield the buffers of attention and of state-space scans.

    Latent attention runs in the latent space, with keys as wide as a latent. Scores exist without flash attention. A
    scan's output tensor ends with its states.
    """
    m, steps = s.model, s.steps
    axes, h, a = m.axes(), m.hidden_size, m.num_attention_heads
    rows = (_row("hidden", steps, h), _row("residual", steps, h))
    mixers = {layer.mixer for layer in layers}
    if "mamba" in mixers:
        inner, state = axes["inner"], (_row("states", 1, axes["inner"] * axes["mn"]))
        if "convolved" in axes:
            wide, ahead = axes["convolved"], steps + axes["kernel"] - 1
            tensors = (_row("projected", steps, axes["projected"]), _row("with earlier columns", ahead, wide))
            tensors = (*tensors, _row("convolved", steps, wide))
        else:
            tensors = (_row("projected", steps, 2 * inner),)
            tensors = (*tensors, _row("convolved", steps, inner), _row("steps", steps, inner))
        yield ComputeBuffer("scan", (*rows, *tensors, _row("output", steps, inner), state))
    if not mixers - {"mamba", "none", "linear_attention"}:
        return
    if "kl" in axes:
        latent, key = axes["kl"], axes["klr"]
        tensors = (
            *(_row("q", steps, a, axes["d"]), _row("q in the latent's space", steps, a, key)),
            *(_row("output in the latent's space", steps, a, latent), _row("latent, and normed", 2, steps, latent)),
        )
        rows = (*rows, _row("normed", steps, h), _row("room of a freed row", steps, h))
    elif "d" in axes:
        tensors = (_row("q", steps, a, axes["d"]), _row("output", steps, a, axes["d"]))
    else:
        return
    scores = () if s.serving.flash_attention else (_row("scores", a, steps, padded(s.longest)),)
    yield ComputeBuffer("attention", (*rows, *tensors, *scores))


def _offloaded(s: Settings, buffers: list[ComputeBuffer], layers: tuple[Layer, ...]) -> Iterator[ComputeBuffer]:
    """Yield the buffers of what the first GPU computes with matrices or caches of the host.

    Of a host layer, it is the largest matrix with the FFN's rows, or the keys and values. A matrix that an override
    keeps on the host comes with the inputs too, as the caches are on the GPU. In a layer of another GPU two of them are
    there at once.
    Source: ggml/src/ggml-backend.cpp ggml_backend_sched_backend_id_from_cur, ggml_backend_sched_split_graph.
    """
    on_host, overrides = _host_layers(s), bool(s.serving.overrides)
    if s.stage.number or not (on_host or overrides) or s.steps < _LEAST_COPIED:
        return
    of_layers = moved = 0
    gate_up = (2 * s.model.axes().get("m", 0),)  # two matrices in a file
    elsewhere: dict[int, list[int]] = {}  # matrices of each layer of another GPU
    for w in stored_weights(s.model, s.quantization, s.dtype):
        layer = layer_of(w.name)
        if w.group in TOWERS or layer is None:
            continue
        is_gate_up = w.shape[1:2] == gate_up
        bytes_ = w.bytes // 2 if is_gate_up else w.bytes
        if layer < on_host:
            of_layers = max(of_layers, bytes_)
        elif overrides and buffer_of(s, w) == "CPU":
            moved = max(moved, bytes_)
            if layer >= s.stage.last:
                elsewhere.setdefault(layer, []).extend([bytes_] * (1 + is_gate_up))
    if elsewhere:
        two = max(sum(sizes) - max(sizes) for sizes in elsewhere.values())
        hidden = _row("hidden", s.steps, s.model.hidden_size)
        yield ComputeBuffer("a layer of another card", (hidden, ("two matrices of the host's", (), two)))
    if moved:
        rows = max((b for b in buffers if b.where in ("mlp", "experts")), key=lambda b: b.bytes)
        yield rows._replace(where="a matrix of the host's", alive=(*rows.alive, ("a matrix of the host's", (), moved)))
    if not on_host:
        return
    rows = max(_ffn(s, layers), key=lambda b: b.bytes, default=ComputeBuffer("", ()))
    yield ComputeBuffer("a layer of the host's", (*rows.alive, ("a matrix of the host's", (), of_layers)))
    longest = padded(s.longest)
    caches_ = [c for c in caches(s.model)[:on_host] if c.parts and c.kind != "state"]
    largest_cache = max((_cells(s, c, longest) * sum(s.cache_bytes(p) for p in c.parts) for c in caches_), default=0)
    mask = _row("mask", s.steps, longest, size=2 if s.serving.flash_attention else 4)
    cache = ("keys and values of the host's", (), largest_cache)
    yield ComputeBuffer("attention of the host's", (_row("six rows", 6, s.steps, s.model.hidden_size), mask, cache))
