"""The axes that a run decides: batch, sequence and, of models that have them, a second sequence, images, chunks,
rows of experts and the like; and those that are derived from them.

What every model has is always there. The rest is made where the program needs it: most runs need none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from memplan.catalogue.attention.attention import efficient_workspace_bytes
from memplan.catalogue.degrees import Degrees
from memplan.catalogue.kernels.losses import CHUNK
from memplan.core.arithmetic import ONE_RUN, Arithmetic, Size
from memplan.models.configs.megatron import padded
from memplan.models.model import ModelSpec
from memplan.program.graph import Graph, built
from memplan.program.training.program import Program


class _Run(NamedTuple):
    """What axes are derived from: of one run ints, of many arrays. `fixed` are the axes of the model, `half` whether
    attention computes in 16 bits, `needs` the axes that are asked for and not there yet, `axes` those that are."""

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
        """Batch times heads, of those that a rank has."""
        return self.b * self.fixed["a"]

    def workspace(self, queries: Any, widths: tuple[int, int], keys: Any = None) -> Any:
        """Bytes that memory-efficient attention's backward takes for a head."""
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
    """The axes that belong to the run, and those derived from them; `by` is how one run's are counted, or many's.

    `pictures` are the axes that its images decide. `target` is the length of what the decoder of an encoder-decoder is
    given; without, as long as the encoder's.
    """
    return axes_of(program.structure.graph, program.needs, micro, sequence, half, large_tiles, by, pictures, target)


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
    """The same for a graph whose sizes need the axes `needs`."""
    degrees = graph.degrees
    b, s = micro, -(-sequence // degrees.cp)
    tokens = b * s
    m = graph.model
    rows = padded(m.vocab_size, degrees.tp) if degrees.style == "megatron" else m.vocab_size
    many, sorts, further = b > 1, tokens > 3072, (s - 1) // CHUNK
    axes = {
        "b": b,
        "s": s,
        "s1": s + 1,
        "s8": -(-s // 8) * 8,
        "s_even": by.choose(s % 8 == 0, s, 0),
        "s_uneven": by.choose(s % 8 == 0, 0, s),
        "s_uneven8": by.choose(s % 8 == 0, 0, -(-s // 8) * 8),
        "s32": -(-s // 32) * 32,
        "s128": -(-s // 128) * 128,
        "targets": by.choose(many, tokens, s + 1),
        "padded_labels": by.choose(many, b * (s + 1), 0),
        "shifted_rows": b * (s - 1),
        "further_chunks": further,
        "lm_one": by.choose(further > 1, CHUNK, 0),
        "lm_rest": by.choose(further > 1, CHUNK * (further - 1), 0),
        "lm_next": by.choose(further > 0, CHUNK, 0),
        "lm_last": s - CHUNK * further,
        "lm_rows": s - CHUNK * further - 1,
        "shifted_labels": by.choose(many, b * (s - 1), 0),
        "sorted_ids": by.choose(sorts, tokens, 0),
        "segments": by.choose(sorts, tokens // 10 + by.least(tokens, rows), 0),
    }
    if degrees.cp > 1:
        axes["s_cp"] = sequence
        axes["s_cp128"] = -(-sequence // 128) * 128
        axes |= {"several": by.choose(b > 1, b, 0), "only": by.choose(b > 1, 0, 1)}
    if degrees.sequence_parallel:
        axes["s_tp"] = -(-s // degrees.tp)
    axes.update(pictures)
    needs = needs.difference(axes)
    if needs:
        fixed = built(graph)[1]
        t = s if target is None else target
        run = _Run(m, degrees, fixed, needs, axes, b, s, t, half, large_tiles, by)
        for derive in _derived(needs):
            axes.update(derive(run))
    return axes


def _workspaces(run: _Run) -> Iterator[tuple[str, Any]]:
    """Of memory-efficient attention; heads are as wide as the model's, or as an axis says (`...workspace.wide`)."""
    for name in run.needs:
        kind, _, width = name.partition(".")
        widths = (run.fixed[width], run.fixed[width]) if width else run.model.head_widths
        if kind == "efficient_fp32":
            yield name, run.by.choose(run.half, 0, widths[1] + 1)
        elif kind == "efficient_workspace":
            yield name, run.workspace(run.s, widths)


def _tables(run: _Run) -> Iterator[tuple[str, Any]]:
    """Partial sums of an embedding's gradient, of a table with other rows than the vocabulary's: `segments_77`."""
    for name in run.needs:
        rows = name.removeprefix("segments_")
        if rows != name and rows.isdigit():
            yield name, _segments(run, run.b * run.s, int(rows))


def _segments(run: _Run, tokens: Any, rows: int) -> Any:
    return run.by.choose(tokens > 3072, tokens // 10 + run.by.least(tokens, rows), 0)


def _distances(run: _Run) -> Iterator[tuple[str, Any]]:
    """Pairs of positions whose distance is looked up in a table, of the encoder and of the decoder: as ids of an
    embedding are sorted for its gradient."""
    for prefix, length in (("", run.s), ("target_", run.t)):
        if f"{prefix}pairs" in run.needs:
            pairs = length * length
            yield f"{prefix}pairs", run.by.choose(pairs > 3072, pairs, 0)
            yield f"{prefix}pair_segments", _segments(run, pairs, run.fixed["buckets"])


def _second_sequence(run: _Run) -> Iterator[tuple[str, Any]]:
    """Of a decoder beside an encoder, whose own tokens are `t`."""
    if not run.model.is_encoder_decoder:
        return
    t, targets, widths = run.t, run.b * run.t, run.model.head_widths
    yield "t", t
    for rounded in (8, 32, 128):
        yield f"t{rounded}", -(-t // rounded) * rounded
    yield "t_uneven", run.by.choose(t % 8 == 0, 0, t)
    yield "t_uneven8", run.by.choose(t % 8 == 0, 0, -(-t // 8) * 8)
    yield "sorted_targets", run.by.choose(targets > 3072, targets, 0)
    yield "target_segments", _segments(run, targets, run.model.vocab_size)
    for name, keys in (("efficient_workspace_t", t), ("efficient_workspace_cross", run.s)):
        if name in run.needs:
            yield name, run.workspace(t, widths, keys)


def chunked(numbers: Mapping[str, int], s: Size, by: Arithmetic[Size]) -> dict[str, Size]:
    """Axes of a model that scans a sequence of `s` tokens chunk by chunk.

    s_conv            rows of a convolution that is padded at both ends
    earlier           the tokens before the last
    chunks, borders   chunks, and the borders of them; `later`, the chunks but one
    s_chunks          rows of whole chunks; `s_later`, of all but one
    s_one, s_two      the same where there is one chunk, and where there are several; `slice`, one chunk of several
    s_whole           the sequence where it is whole chunks; `s_whole_two`, where it is several; `copied`, one chunk
                      where it is; `s_padded`, its rows where it is not
    s_laid            all chunks but one where it is whole chunks, or else the rows of several
    """
    chunk = numbers.get("chunk", 1)
    chunks = -(-s // chunk)
    rows, whole = chunks * chunk, s % chunk == 0
    several = by.choose(chunks > 1, rows, 0)
    return {
        "s_conv": s + numbers.get("kernel", 1) - 1,
        "earlier": s - 1,
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


_SCANNED = frozenset(chunked({}, 1, ONE_RUN))


def _scans(run: _Run) -> Mapping[str, Any]:
    return {} if _SCANNED.isdisjoint(run.needs) else chunked(run.fixed, run.s, run.by)


def _experts(run: _Run) -> Iterator[tuple[str, Any]]:
    """Rows of one expert, where tokens are spread evenly: over all, and over as many as there are groups of."""
    for name, several in (("routed", "E"), ("spread", "groups")):
        if name in run.needs:
            yield name, -(-run.b * run.s * run.fixed["e"] // run.fixed[several])


def _dispatched(run: _Run) -> Iterator[tuple[str, Any]]:
    """Tokens that ranks with a part of the experts each gather, and that go to a rank's experts; those that a rank
    sends and receives, where it has them among others that divide them."""
    own = run.b * run.axes.get("s_tp", run.s)
    part = -(-own // run.degrees.tp)
    if "tokens_part" in run.needs:
        yield "tokens_part", part
    if not run.needs.isdisjoint(("tokens_sent", "tokens_received")):
        sent, most = part * run.fixed["e"], min(run.degrees.imbalance, 1000 * run.degrees.ep)
        yield "tokens_sent", sent
        yield "tokens_received", -(-sent * most // 1000)
    if "tokens_gathered" in run.needs:
        yield "tokens_gathered", own * run.fixed["eg"]
    if "tokens_routed" in run.needs:
        rows = own * run.fixed["et"] * run.fixed["e"]
        yield "tokens_routed", -(-rows * run.fixed.get("capacity", 1000) // 1000)


def _chosen_keys(run: _Run) -> Iterator[tuple[str, Any]]:
    """Of attention to keys that an indexer chooses: how many, and the batch where it is more than one sequence."""
    if "chosen_keys" in run.needs:
        yield "chosen_keys", run.by.least(run.s, run.model.whole("index_topk"))
    if "several" in run.needs:
        yield "several", run.by.choose(run.b > 1, run.b, 0)


def _blocks_of_keys(run: _Run) -> Iterable[tuple[str, Any]]:
    return blocks_of_keys(run.fixed, run.s, run.by).items() if "key_block" in run.fixed else ()


def blocks_of_keys(numbers: Mapping[str, int], s: Size, by: Arithmetic[Size]) -> dict[str, Size]:
    """Axes of attention to blocks that an indexer chooses of `s` keys.

    key_blocks     how many there are; `key_blocks1`, one more; `chosen_blocks`, of those a query attends to
    block_keys     the keys of whole blocks; `padded_keys`, the same where there are fewer, so that scores are padded
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
    """Of keys that stand for a window each, of a small and of a large one: how many, and with those of all tokens."""
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
        "tk": run.by.least(small, run.model.whole("index_topk")),
    }


def _towers(run: _Run) -> Iterator[tuple[str, Any]]:
    """Of attention in a tower: its workspace where that is memory-efficient, and rows of all images packed into one."""
    axes = run.axes
    if "tower_half" not in axes:
        return
    d, heads, half = run.fixed["vd"], run.fixed["va"], bool(axes["tower_half"])
    rows = run.b * axes["patches"]
    for rounded in (8, 32, 128):
        yield f"packed{rounded}", -(-rows // rounded) * rounded
    yield "tower_fp32", 0 if half else d + 1
    for name, of, pairs in (
        ("grid", axes["grid"], heads),
        ("window", axes.get("window", 0), heads),
        ("packed", rows, heads),
        ("batched", axes["grid"], run.b * axes["images"] * heads),
    ):
        if f"{name}_workspace" in run.needs:
            yield f"{name}_workspace", efficient_workspace_bytes(of, (d, d), pairs, half, run.large_tiles, run.by)


def _seen(run: _Run) -> Iterator[tuple[str, Any]]:
    """Of attention from the text to what a tower has seen: its workspace where that is memory-efficient."""
    if "seen_workspace" in run.needs and "seen" in run.axes:
        yield "seen_workspace", run.workspace(run.s, run.model.head_widths, run.axes["seen"])


def _losses(run: _Run) -> Iterator[tuple[str, Any]]:
    """Tokens of a chunk: of LitGPT's chunked loss, and of a fused one."""
    if "lc" in run.needs:
        yield "lc", -(-run.s // 8)
    if "fc" in run.needs:
        tokens = run.b * run.s
        chunk = -(-tokens // -(-run.model.vocab_size // run.model.hidden_size))
        yield "fc", run.by.least(tokens, run.by.power_of_two(chunk))


_Derive = Callable[[_Run], Iterable[tuple[str, Any]] | Mapping[str, Any]]
# What the names begin with, that each of them makes.
_FURTHER: tuple[tuple[tuple[str, ...], _Derive], ...] = (
    (("efficient_",), _workspaces),
    (("segments_",), _tables),
    (("pairs", "pair_segments", "target_pairs", "target_pair_segments"), _distances),
    (("t", "sorted_targets", "efficient_workspace_"), _second_sequence),
    (tuple(_SCANNED), _scans),
    (("routed", "spread"), _experts),
    (("tokens_",), _dispatched),
    (("chosen_keys", "several"), _chosen_keys),
    (("wc", "uc", "kc", "rc_kept", "wh", "uh", "kh", "tk"), _compressed_keys),
    (("key_blocks", "chosen_blocks", "block_keys", "padded_keys"), _blocks_of_keys),
    (("packed", "tower_", "grid_", "window_", "batched_"), _towers),
    (("seen_",), _seen),
    (("lc", "fc"), _losses),
)


@lru_cache(maxsize=256)
def _derived(needs: frozenset[str]) -> tuple[_Derive, ...]:
    return tuple(derive for names, derive in _FURTHER if any(name.startswith(names) for name in needs))
