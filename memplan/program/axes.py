"""Sizes of the axes that a run decides: batch, sequence, a second sequence, images, chunks, rows of experts, and the
axes derived from them.

Axes that every model has are always returned. Others are computed only if the program needs them; most runs need none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from memplan.catalogue.attention.efficient_workspace import efficient_workspace_bytes
from memplan.catalogue.degrees import Degrees
from memplan.catalogue.kernels.fused import MULTIPROCESSORS
from memplan.catalogue.kernels.losses import CHUNK, SINGLE_CHUNK
from memplan.catalogue.kernels.trl_losses import CHUNK as NLL_CHUNK
from memplan.catalogue.kernels.trl_losses import FUSED_TOKENS, PART_TOKENS, PART_WIDTH, TILE_TOKENS, TILE_WIDTH
from memplan.catalogue.kernels.unsloth_loss import CHUNK_BYTES, LEAST_LOGITS, LEAST_ROWS, TILE_ROWS, TILE_WORDS
from memplan.catalogue.methods.shadow import SHADOW, shadow_model
from memplan.core.arithmetic import ONE_RUN, Arithmetic, Size
from memplan.core.records import NamedTuple
from memplan.models.configs.megatron import padded
from memplan.models.model import ModelSpec
from memplan.models.peft_methods import leads_stream
from memplan.program.graph import Graph, operations_of
from memplan.program.training.program import Program

_UNSORTED = 3072  # indices whose gradient torch sums unsorted: 2.13 cuda/Embedding.cu embedding_dense_backward_cuda


class _Run(NamedTuple):
    """Inputs that axes are derived from: ints for one run, arrays for many.

    fixed        axes of the model
    needs        axes that are needed and not in `axes` yet
    axes         axes already known
    b, s, t      batch, sequence, and the decoder's sequence
    half         attention computes in 16 bits
    large_tiles  the GPU's shared memory holds tiles of 128 x 128
    by           arithmetic for one run or for many
    """

    model: ModelSpec
    degrees: Degrees
    fixed: Mapping[str, int]
    needs: frozenset[str]
    axes: Mapping[str, Any]
    b: Any
    s: Any
    t: Any
    half: bool
    large_tiles: bool
    by: Arithmetic[Any]

    @property
    def pairs(self) -> Any:
        """Batch times the rank's heads."""
        return self.b * self.fixed["a"]

    def workspace(self, queries: Any, widths: tuple[int, int], keys: Any = None) -> Any:
        """Workspace bytes of memory-efficient attention's backward, per head."""
        return efficient_workspace_bytes(queries, widths, self.pairs, self.half, self.large_tiles, self.by, keys)


def run_axes(
    program: Program,
    micro: Size,
    sequence: Size,
    half: bool,
    large_tiles: bool,
    by: Arithmetic[Size],
    pictures: Iterable[tuple[str, int]] = (),
    target: Size | None = None,
) -> dict[str, Size]:
    """Return the axes that the run decides, and those derived from them.

    by        arithmetic for one run or for many
    pictures  axes that images decide
    target    length of the decoder's sequence in an encoder-decoder; default: as long as the encoder's
    """
    return axes_of(
        program.structure.graph, program.moments.needs, micro, sequence, half, large_tiles, by, pictures, target
    )


def axes_of(
    graph: Graph,
    needs: frozenset[str],
    micro: Size,
    sequence: Size,
    half: bool,
    large_tiles: bool,
    by: Arithmetic[Size],
    pictures: Iterable[tuple[str, int]] = (),
    target: Size | None = None,
) -> dict[str, Size]:
    """Return the axes of a run of the graph, including every axis in `needs`. Other arguments as of `run_axes`."""
    degrees, more = graph.degrees, dict(pictures)
    completion = more.get("completion", 0)
    sequence = sequence + completion
    packed, joined = graph.wiring.packed, 1
    rows_of_one = 1 if graph.trainer is None else graph.trainer.rows
    b = micro * rows_of_one
    if packed is not None and packed.is_one_row:
        b, sequence, joined = by.least(b, 1), b * sequence, b
    prefix = graph.recipe.prefix
    s = -(-sequence // degrees.cp) + graph.recipe.virtual_tokens - prefix
    axes: dict[str, Any] = {**more, "b": b, "s": s}
    if graph.inference is not None and needs.issubset(axes):
        return axes
    tokens = b * s
    m = graph.model
    rows = padded(m.vocab_size, degrees.tp) if degrees.style == "megatron" else m.vocab_size
    has_several, sorts, further = b > 1, tokens > _UNSORTED, by.choose(s > SINGLE_CHUNK, (s - 1) // CHUNK, 0)
    axes = {
        "b": b,
        "s": s,
        "text": sequence,
        **rounded_axes("s", s, by),
        "targets": by.choose(has_several, tokens, s + 1),
        "padded_labels": by.choose(has_several, b * (s + 1), 0),
        "shifted_rows": b * (s - 1),
        "further_chunks": further,
        "lm_one": by.choose(further > 1, CHUNK, 0),
        "lm_rest": by.choose(further > 1, CHUNK * (further - 1), 0),
        "lm_next": by.choose(further > 0, CHUNK, 0),
        "lm_last": s - CHUNK * further,
        "lm_rows": s - CHUNK * further - 1,
        "shifted_labels": by.choose(has_several, b * (s - 1), 0),
        "sorted_ids": by.choose(sorts, tokens, 0),
        "segments": by.choose(sorts, tokens // 10 + by.least(tokens, rows), 0),
    }
    if graph.wiring.padded or packed is not None:
        own = joined if packed is None else packed.sequences(joined, s, by.most)
        axes |= {"s_varlen": s + 128 * own, "s_own": -(-s // own)}
    if prefix:
        for name in ("kv", "kv_window"):
            axes |= {name: s + prefix, name.replace("kv", "past"): prefix, **rounded_axes(name, s + prefix, by)}
    if degrees.cp > 1:
        axes["s_cp"] = sequence
        axes["s_cp128"] = -(-sequence // 128) * 128
        axes |= {"several": by.choose(b > 1, b, 0), "only": by.choose(b > 1, 0, 1)}
    if degrees.sequence_parallel:
        axes["s_tp"] = -(-s // degrees.tp)
    axes.update(more)
    if completion:
        scored = s - 1 if graph.trainer is not None and graph.trainer.prompt_logits else completion
        axes |= {"kept": scored + 1, "completion_rows": b * scored}
        axes["generated"] = b * more["accumulation"]
        axes |= {"earlier_rows": (b - 1) * completion, "fused_tokens": by.least(completion, FUSED_TOKENS)}
    inside = graph.roles
    if leads_stream(graph.recipe.kind):
        small, full = shadow_model(m, dict(graph.recipe.options)), graph.recipe._replace(kind="full")
        inside = ((SHADOW, graph._replace(model=small, recipe=full)),)
    for role, other in inside:
        own = frozenset(name.removeprefix(f"{role}.") for name in needs if name.startswith(f"{role}."))
        if own:
            by_name = axes_of(other, own, micro, sequence - completion, half, large_tiles, by, pictures, target)
            axes |= {f"{role}.{name}": by_name[name] for name in own}
        if role == "teacher" and "chunk_words" in needs:
            words = max(m.vocab_size, other.model.vocab_size)
            axes |= {"chunk_words": words, "chunk_padded": words * (m.vocab_size != other.model.vocab_size)}
    needs = needs.difference(axes)
    if needs:
        fixed = operations_of(graph)[1]
        t = s if target is None else target
        run = _Run(m, degrees, fixed, needs, axes, b, s, t, half, large_tiles, by)
        for derive in _derived(needs):
            axes.update(derive(run))
    return axes


def rounded_axes(name: str, length: Size, by: Arithmetic[Size]) -> dict[str, Size]:
    """Return the axes of a length: one more, and rounded up to multiples; an even length is a multiple of 8."""
    up_to_8 = -(-length // 8) * 8
    return {
        f"{name}1": length + 1,
        f"{name}8": up_to_8,
        f"{name}32": -(-length // 32) * 32,
        f"{name}128": -(-length // 128) * 128,
        f"{name}_even": by.choose(length % 8 == 0, length, 0),
        f"{name}_uneven": by.choose(length % 8 == 0, 0, length),
        f"{name}_uneven8": by.choose(length % 8 == 0, 0, up_to_8),
    }


def _workspaces(run: _Run) -> Iterator[tuple[str, Any]]:
    """Workspaces of memory-efficient attention. A suffix names the axis of the head width (`...workspace.wide`);
    without one, heads are as wide as the model's."""
    for name in run.needs:
        kind, _, width = name.partition(".")
        widths = (run.fixed[width], run.fixed[width]) if width else run.model.head_widths
        if kind == "efficient_fp32":
            yield name, run.by.choose(run.half, 0, widths[1] + 1)
        elif kind == "efficient_workspace":
            yield name, run.workspace(run.s, widths, run.axes.get("kv"))


def _embedding_segments(run: _Run) -> Iterator[tuple[str, Any]]:
    """Partial sums of the gradient of an embedding table whose rows are not the vocabulary: `segments_77`."""
    for name in run.needs:
        rows = name.removeprefix("segments_")
        if rows != name and rows.isdigit():
            yield name, _segments(run, run.b * run.s, int(rows))


def _segments(run: _Run, tokens: Any, rows: int) -> Any:
    return run.by.choose(tokens > _UNSORTED, tokens // 10 + run.by.least(tokens, rows), 0)


def _relative_positions(run: _Run) -> Iterator[tuple[str, Any]]:
    """Pairs of positions in encoder and decoder whose distance indexes an embedding table. Its gradient sorts them."""
    for prefix, length in (("", run.s), ("target_", run.t)):
        if f"{prefix}pairs" in run.needs:
            pairs = length * length
            yield f"{prefix}pairs", run.by.choose(pairs > _UNSORTED, pairs, 0)
            yield f"{prefix}pair_segments", _segments(run, pairs, run.fixed["buckets"])


def _second_sequence(run: _Run) -> Iterator[tuple[str, Any]]:
    """Axes of the decoder of an encoder-decoder, whose tokens are `t`."""
    if not run.model.is_encoder_decoder:
        return
    t, targets, widths = run.t, run.b * run.t, run.model.head_widths
    yield "t", t
    yield from rounded_axes("t", t, run.by).items()
    yield "sorted_targets", run.by.choose(targets > _UNSORTED, targets, 0)
    yield "target_segments", _segments(run, targets, run.model.vocab_size)
    for name, keys in (("efficient_workspace_t", t), ("efficient_workspace_cross", run.s)):
        if name in run.needs:
            yield name, run.workspace(t, widths, keys)


def chunked(numbers: Mapping[str, int], s: Size, by: Arithmetic[Size]) -> dict[str, Size]:
    """Return the axes of a model that scans a sequence of `s` tokens chunk by chunk.

    s_conv       rows of a convolution padded at both ends
    earlier      tokens before the last two
    second_last  the token before the last, if there is one
    chunks       number of chunks
    borders      number of chunk borders, both ends included
    later        chunks after the first
    s_chunks     rows of all chunks, the last one padded
    s_later      rows of all chunks but one
    s_one        `s_chunks` if there is one chunk, else 0
    s_two        `s_chunks` if there are several chunks, else 0
    slice        rows of one chunk if there are several, else 0
    s_whole      the sequence if it is a multiple of the chunk, else 0
    s_whole_two  the sequence if it is a multiple of the chunk and has several chunks, else 0
    s_padded     `s_chunks` if the sequence is not a multiple of the chunk, else 0
    copied       rows of one chunk if the sequence is a multiple of the chunk, else 0
    s_laid       `s_later` if the sequence is a multiple of the chunk, else `s_two`
    """
    chunk = numbers.get("chunk", 1)
    chunks = -(-s // chunk)
    rows, whole = chunks * chunk, s % chunk == 0
    several = by.choose(chunks > 1, rows, 0)
    return {
        "s_conv": s + numbers.get("kernel", 1) - 1,
        "earlier": by.most(0, s - 2),
        "second_last": by.least(s - 1, 1),
        "chunks": chunks,
        "borders": chunks + 1,
        "later": chunks - 1,
        "s_chunks": rows,
        "s_later": rows - chunk,
        "s_one": by.choose(chunks > 1, 0, rows),
        "s_two": several,
        "slice": by.choose(chunks > 1, chunk, 0),
        "s_whole": by.choose(whole, s, 0),
        "s_whole_two": by.choose(whole, several, 0),
        "s_padded": by.choose(whole, 0, rows),
        "copied": by.choose(whole, chunk, 0),
        "s_laid": by.choose(whole, rows - chunk, several),
    }


_ROWS_OF_CHUNK = 512  # ms-swift 4.6.0 rlhf_trainers/gkd_loss.py jsd_loss: chunk_size
_SCANNED = frozenset((*chunked({}, 1, ONE_RUN), "scanned", "scanned_C", "scan_splits", "scan_parts"))


def _scans(run: _Run) -> Mapping[str, Any]:
    """Axes of scans by chunks, and of Mamba 1's by tokens.

    scanned      outputs of tokens, each rounded to 512 bytes
    scanned_C    bf16 copies of C of the `earlier` tokens, each rounded to 512 bytes
    scan_parts   parts of 2,048 tokens, after each of which mamba-ssm's scan of Mamba 1 keeps the states
    scan_splits  parts of each group's heads that mamba-ssm sums one after the other
    """
    if _SCANNED.isdisjoint(run.needs):
        return {}
    step = 256 if run.half else 128
    tokens = run.s * -(-run.b * run.fixed.get("inner", 0) // step) * step
    axes = {**chunked(run.fixed, run.s, run.by), "scanned": tokens, "scan_parts": -(-run.s // 2048)}
    axes["scanned_C"] = axes["earlier"] * -(-run.b * run.fixed.get("mn", 0) // 256) * 256
    heads = run.fixed.get("mh", 1)
    of_group = heads // run.fixed.get("mg", 1)
    together = run.by.least(-(-run.b * axes["chunks"] * heads // MULTIPROCESSORS), of_group)
    return {**axes, "scan_splits": -(-of_group // together)}


def _experts(run: _Run) -> Iterator[tuple[str, Any]]:
    """Rows of one expert if tokens are spread evenly over all experts (`routed`), or over groups of them (`spread`)."""
    for name, parts in (("routed", "E"), ("spread", "groups")):
        if name in run.needs:
            yield name, -(-run.b * run.s * run.fixed["e"] // run.fixed[parts])


def _expert_tokens(run: _Run) -> Iterator[tuple[str, Any]]:
    """Tokens of expert parallelism: a rank's share of them, those it sends and receives, those gathered from all ranks,
    and those routed to its experts."""
    tokens = run.b * run.axes.get("s_tp", run.s)
    part = -(-tokens // run.degrees.tp)
    if "tokens_part" in run.needs:
        yield "tokens_part", part
    if not run.needs.isdisjoint(("tokens_sent", "tokens_received")):
        sent, most = part * run.fixed["e"], min(run.degrees.imbalance, 1000 * run.degrees.ep)
        yield "tokens_sent", sent
        yield "tokens_received", -(-sent * most // 1000)
    if "tokens_gathered" in run.needs:
        yield "tokens_gathered", tokens * run.fixed["eg"]
    if "tokens_routed" in run.needs:
        rows = tokens * run.fixed["et"] * run.fixed["e"]
        yield "tokens_routed", -(-rows * run.fixed.get("capacity", 1000) // 1000)


def _chosen_keys(run: _Run) -> Iterator[tuple[str, Any]]:
    """Keys that an indexer chooses for sparse attention, and the batch size if it has more than one sequence."""
    if "chosen_keys" in run.needs:
        yield "chosen_keys", run.by.least(run.s, run.model.config_int("index_topk"))
    if "several" in run.needs:
        yield "several", run.by.choose(run.b > 1, run.b, 0)


def _blocks_of_keys(run: _Run) -> Iterable[tuple[str, Any]]:
    return blocks_of_keys(run.fixed, run.s, run.by).items() if "key_block" in run.fixed else ()


def blocks_of_keys(numbers: Mapping[str, int], s: Size, by: Arithmetic[Size]) -> dict[str, Size]:
    """Return the axes of attention to blocks of keys that an indexer chooses among `s` keys.

    key_blocks     number of blocks
    key_blocks1    number of blocks plus one
    chosen_blocks  blocks that a query attends to
    block_keys     keys of all blocks, the last one padded
    padded_keys    `block_keys` if the last block is padded, else 0
    """
    blocks = -(-s // numbers["key_block"])
    whole = blocks * numbers["key_block"]
    return {
        "key_blocks": blocks,
        "key_blocks1": blocks + 1,
        "chosen_blocks": by.least(blocks, numbers["ti"]),
        "block_keys": whole,
        "padded_keys": by.choose(whole == s, 0, whole),
    }


def _compressed_keys(run: _Run) -> Mapping[str, Any]:
    """Compressed keys, one for each small or large window of tokens: their number, alone and with the tokens' keys."""
    if run.needs.isdisjoint(("wc", "kc", "wh", "kh")):
        return {}
    s, small, large = run.s, run.s // run.fixed["rc"], run.s // run.fixed["rh"]
    return {
        "wc": small,
        "uc": small * run.fixed["rc"],
        "wc1": small + 1,
        "kc": s + small,
        "kc1": s + small + 1,
        "kc_masked": run.by.choose(small > 0, s + small, 0),
        "rc_kept": run.by.choose(small > 0, run.fixed["rc"], 0),
        "wh": large,
        "uh": large * run.fixed["rh"],
        "kh": s + large,
        "kh1": s + large + 1,
        "kh_masked": run.by.choose(large > 0, s + large, 0),
        "tk": run.by.least(small, run.model.config_int("index_topk")),
    }


def _flex_blocks(run: _Run) -> Iterator[tuple[str, Any]]:
    """Numbers in a mask of blocks of 128 tokens: four of each row of blocks and four of each block, each tensor rounded
    to 512 bytes."""
    blocks = -(-run.s // 128)
    yield "block_mask", 4 * sum(-(-run.b * n // 128) * 128 for n in (blocks, blocks * blocks))


def _towers(run: _Run) -> Iterator[tuple[str, Any]]:
    """Axes of attention in a vision tower: workspaces of memory-efficient attention, the rows of all images packed into
    one sequence, and the rows and pairs of rows of all calls but one."""
    axes = run.axes
    if "tower_half" not in axes:
        return
    d, heads = axes.get("head_width", run.fixed["vd"]), axes.get("heads", run.fixed["va"])
    half = bool(axes["tower_half"])
    rows = run.b * axes["patches"]
    for rounded in (8, 32, 128):
        yield f"packed{rounded}", -(-rows // rounded) * rounded
    yield "tower_fp32", 0 if half else d + 1
    padded = run.b * axes["images"] * axes["grid"]
    yield "tower_ids", run.by.choose(padded > _UNSORTED, padded, 0)
    if "tower_segments" in run.needs:
        yield "tower_segments", _segments(run, padded, run.fixed["vpositions"])
    calls = {"grid": (run.b * axes["patches"], run.b * axes["images"] * axes["grid"] ** 2)}
    if "window" in axes:
        calls["window"] = (run.b * axes["patches"], run.b * axes["window_pairs"])
    for name, (rows_of_all, pairs_of_all) in calls.items():
        yield f"{name}_earlier", rows_of_all - axes[name]
        yield f"{name}_earlier_pairs", pairs_of_all - axes[name] ** 2
    for name, queries, pairs in (
        ("grid", axes["grid"], heads),
        ("window", axes.get("window", 0), heads),
        ("packed", rows, heads),
        ("batched", axes["grid"], run.b * axes["images"] * heads),
    ):
        if f"{name}_workspace" in run.needs:
            yield f"{name}_workspace", efficient_workspace_bytes(queries, (d, d), pairs, half, run.large_tiles, run.by)


def _cross_attention(run: _Run) -> Iterator[tuple[str, Any]]:
    """Workspace of memory-efficient cross-attention from the text to the tower's output."""
    if "seen_workspace" in run.needs and "seen" in run.axes:
        yield "seen_workspace", run.workspace(run.s, run.model.head_widths, run.axes["seen"])


def _losses(run: _Run) -> Iterator[tuple[str, Any]]:
    """Tokens of torchtune's chunks (`lc`, and the last) and of Liger's (`fc`); chunks and tiles of TRL's losses."""
    by = run.by
    rows = run.axes["completion_rows"] if "completion" in run.axes else run.b * (run.s - 1)
    if "nll_tokens" in run.needs:
        yield "nll_tokens", by.least(rows, NLL_CHUNK)
        yield "nll_several", by.choose(rows > NLL_CHUNK, 1, 0)
    if "tile_tokens" in run.needs:
        words = run.model.vocab_size
        yield "tile_tokens", by.least(rows, TILE_TOKENS)
        yield "tile_words", min(words, TILE_WIDTH)
        further = min(words - TILE_WIDTH, TILE_WIDTH) if words > TILE_WIDTH else by.choose(rows > TILE_TOKENS, words, 0)
        yield "next_tile_words", further
        last = words - (-(-words // TILE_WIDTH) - 1) * TILE_WIDTH
        yield "tile_words_last", last
        yield "tile_words_early", min(words, TILE_WIDTH) + further - last
    if "few_tokens" in run.needs:
        few, part = by.least(rows, PART_TOKENS), min(run.model.vocab_size, PART_WIDTH)
        last = (run.model.vocab_size - 1) % part + 1
        yield "few_tokens", few
        yield "part_words", part
        yield "part_words_last", last
        more = by.most(2 * few * part, (few + part) * run.model.hidden_size)
        yield "part_operands", more + 2 * few * (part - last)
    for kind in ("frozen", "trained"):
        if f"fused_logits_{kind}" in run.needs:
            yield from _fused_chunks(run, rows, kind)
    pairs = ("row_tokens", "earlier_pairs", "half_tokens", "half_rows", "entropy_rows", "chosen_copied")
    if not run.needs.isdisjoint(pairs):
        yield "row_tokens", run.s - 1
        yield "earlier_pairs", rows - 2 * (run.s - 1)
        yield "half_tokens", run.b * run.s // 2
        yield "half_rows", rows // 2
        yield "chosen_copied", by.choose(run.b > 2, rows // 2, 0)
        yield "entropy_rows", by.least(rows, 128)  # trl 1.13 trainer/utils.py entropy_from_logits: chunk_size
    if "chunk_rows" in run.needs:
        last, several = (rows - 1) % _ROWS_OF_CHUNK + 1, rows > _ROWS_OF_CHUNK
        earlier = by.choose(several, _ROWS_OF_CHUNK, 0)
        yield "chunk_rows", by.most(2 * last, 2 * earlier - 7 * last)
        both = rows + by.most(5 * earlier, rows - 6 * earlier) - 7 * last
        yield "chunk_rows_back", by.most(5 * last, by.choose(several, by.most(rows - 6 * last, both), 0))
    if "lc_last" in run.needs:
        chunk = -(-run.s // 8)
        yield "lc", chunk
        yield "lc_last", (run.s - 1) % chunk + 1
    if "fc" in run.needs:
        tokens = run.b * run.s
        chunk = -(-tokens // -(-run.model.vocab_size // run.model.hidden_size))
        yield "fc", run.by.least(tokens, run.by.power_of_two(chunk))


def _fused_chunks(run: _Run, rows: Any, kind: str) -> Iterator[tuple[str, Any]]:
    """Logits, rows and rows' gradients of one chunk or tile of Unsloth's loss, and rows of its log-probabilities.

    Source: unsloth_zoo 2026.10.9 fused_losses/fused_linear.py fused_linear_rows, _tiled_layout, _tiled_vocab.
    """
    by, words = run.by, run.model.vocab_size
    least = min(max(1 << (LEAST_LOGITS // words).bit_length() - 1, LEAST_ROWS), TILE_ROWS)
    liger = by.power_of_two(rows * run.model.hidden_size // words + 1) // 2
    chunk = by.least(by.most(liger, least), min(TILE_ROWS, CHUNK_BYTES // (4 * words)))
    chunk = by.least(chunk, rows)
    sums, scored = by.choose(rows > chunk, 2 * chunk, chunk), chunk
    logits = chunk * -(-words // 8) * 8
    splits = -(-words // TILE_WORDS)
    parts = 7 * splits * chunk if splits > 2 else 0
    if kind == "frozen" and words > 2 * TILE_WORDS:
        is_tiled = rows >= TILE_ROWS
        logits = by.choose(is_tiled, TILE_ROWS * TILE_WORDS, logits)
        parts = by.choose(is_tiled, 8 * splits * TILE_ROWS, parts)
        chunk = by.choose(is_tiled, TILE_ROWS + by.least(TILE_ROWS, rows - TILE_ROWS), chunk)
        sums, scored = by.choose(is_tiled, TILE_ROWS, sums), by.choose(is_tiled, TILE_ROWS, scored)
    yield f"fused_logits_{kind}", logits
    yield f"fused_rows_{kind}", chunk
    yield f"fused_sums_{kind}", sums
    yield f"fused_scored_{kind}", scored
    yield f"fused_parts_{kind}", parts


_Derive = Callable[[_Run], Iterable[tuple[str, Any]] | Mapping[str, Any]]
# Prefixes of the axes that each function yields.
_OF_LOSSES = (
    *("lc", "fc", "chunk_", "nll_", "tile_", "few_", "part_", "fused_", "row_", "earlier_", "half_", "entropy_"),
    "chosen_copied",
)
_DERIVATIONS: tuple[tuple[tuple[str, ...], _Derive], ...] = (
    (("efficient_",), _workspaces),
    (("segments_",), _embedding_segments),
    (("pairs", "pair_segments", "target_pairs", "target_pair_segments"), _relative_positions),
    (("t", "sorted_targets", "efficient_workspace_"), _second_sequence),
    (tuple(_SCANNED), _scans),
    (("routed", "spread"), _experts),
    (("tokens_",), _expert_tokens),
    (("chosen_keys", "several"), _chosen_keys),
    (("wc", "uc", "kc", "rc_kept", "wh", "uh", "kh", "tk"), _compressed_keys),
    (("key_blocks", "chosen_blocks", "block_keys", "padded_keys"), _blocks_of_keys),
    (("block_mask",), _flex_blocks),
    (("packed", "tower_", "grid_", "window_", "batched_"), _towers),
    (("seen_",), _cross_attention),
    (_OF_LOSSES, _losses),
)


@lru_cache(maxsize=256)
def _derived(needs: frozenset[str]) -> tuple[_Derive, ...]:
    return tuple(derive for names, derive in _DERIVATIONS if any(name.startswith(names) for name in needs))
