"""Decoding one token with compressed keys, as DeepSeek V4 does after a prompt.

The cache holds the keys of the newest window's tokens, the keys of full windows, and the projections of tokens in the
unfinished window. Every token appends its projections to the latter in a new tensor. The last token of a window
computes the window's key, which is appended to the others in another new tensor. Until the first token after a prompt,
the prompt's unfinished window is a view of the projections of the entire prompt.

Axes of this module, for small (`c`) and large (`h`) windows:

    wc_before, wh_before           the windows before this token
    buffer_c, buffer_h             tokens of the unfinished window, including this one
    buffer_c_before, ..h_before    tokens of the cached projections, or of the prompt they are a view of
    rc_before                      tokens per window if a window precedes this token, else 0
"""

from __future__ import annotations

from collections.abc import Mapping

from memplan.catalogue.attention.compressed_keys import HEAVY, SOURCE, SPARSE, Windows, compressed, pooled, projected
from memplan.catalogue.kernels import ops
from memplan.core.ir import Op, Tensor

_CACHE = f"{SOURCE} DeepseekV4HCACache.store_compression_weights, update_compressor_states"
_OVERLAP = f"{SOURCE} DeepseekV4CSACache.update_overlap_state"
_KINDS = (SPARSE, HEAVY)
LEFT = {  # maps the axes of a pass's cached tensors, before and after it, to one axis for both
    **dict.fromkeys(("buffer_c", "buffer_c_before", "buffer_h", "buffer_h_before"), "kv"),
    "wc_before": "wc",
    "wh_before": "wh",
    "rc_before": "rc",
    "rc_kept": "rc",
}


def first_and_last(axes: Mapping[str, int], past: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the kinds of windows that the token after `past` others begins, and the kinds that it completes."""
    begins = tuple(w.kind for w in _KINDS if past % axes[w.rate] == 0)
    fills = tuple(w.kind for w in _KINDS if (past + 1) % axes[w.rate] == 0)
    return begins, fills


def turning_points(axes: Mapping[str, int], first: int, last: int) -> set[int]:
    """Return the tokens from `first` to `last`, by number of tokens before them, at which the cache may be largest.

    For each kind of window: the last token that completes one, its two neighbours, and the first that completes one.
    """
    candidates: set[int] = set()
    for rate in (axes[w.rate] for w in _KINDS):
        last_complete = (last + 1) // rate * rate - 1
        candidates |= {last_complete - 1, last_complete, last_complete + 1, -(-(first + 1) // rate) * rate - 1}
    return {past for past in candidates if first <= past <= last}


def axes_of_token(axes: Mapping[str, int], past: int, prompt: int, window: int, top: int) -> dict[str, int]:
    """Return the axes of the token after `past` tokens.

    prompt  tokens of the prompt, read in one pass
    window  tokens of the sliding window that attention sees
    top     most small windows that attention selects
    """
    token_axes = {"rc_before": axes["rc"] if past >= axes["rc"] else 0, "rc_kept": axes["rc"]}
    for w, kind in ((SPARSE, "c"), (HEAVY, "h")):
        rate = axes[w.rate]
        windows = (past + 1) // rate
        token_axes |= {
            w.number: windows,
            f"{w.number}1": windows + 1,
            f"{w.number}_before": past // rate,
            f"buffer_{kind}": past % rate + 1,
            f"buffer_{kind}_before": prompt if past == prompt else (past - 1) % rate + 1,
            w.keys: window + windows,
            w.with_sink: window + windows + 1,
            w.masked: window + windows if windows else 0,
        }
    return {**token_axes, "tk": min(top, token_axes[SPARSE.number])}


def _appended(name: str, x: str, t: str, w: Windows, out: str, begins: bool) -> Op:
    """Join the cached projections with the token's own. The first token of a window has only its own."""
    own, before = f"{x}.c.{t}", f"{x}.c.{t} before"
    kind = w.rate[-1]
    past = Tensor(before, f"b buffer_{kind}_before {out}", f"={own}")
    joined = Tensor(f"{own}.waiting", f"b buffer_{kind} {out}", f"={own}")
    reads = (own,) if begins else (before, own)
    return Op(f"{name}.cache.{t}", reads, (joined,), view=begins, holds="cache", past=(past,), source=_CACHE)


def _unchanged(name: str, y: str, shape: str, dtype: str, source: str) -> Op:
    """Hand on a cached tensor unchanged."""
    before = Tensor(f"{y} before", shape, dtype)
    return Op(name, (before.name,), (Tensor(y, shape, dtype),), view=True, holds="cache", past=(before,), source=source)


def token_compressor(
    name: str, x: str, y: str, w: Windows, width: str, where: str, begins: bool, fills: bool
) -> tuple[Op, ...]:
    """Return the keys `y` of all windows so far, `width` wide. A token that `fills` a window computes its key."""
    double, c = w.kind == "sparse", f"{y}.c"
    out, like = f"2 {width}" if double else width, f"={y}.c.kv"
    projections = (
        *projected(name, x, y, out),
        *(_appended(name, y, t, w, out, begins) for t in ("kv", "gate")),
        ops.release_names(*(f"{c}.{t} before" for t in ("kv", "gate"))),
    )
    halves = {"kv": like, "gate": "fp32"}
    if not fills:
        unchanged_halves = (
            _unchanged(f"{name}.overlap.{t}", f"{c}.{t}.half", f"b rc_before {width}", dtype, _OVERLAP)
            for t, dtype in halves.items()
        )
        # only for the dtype of a sum over a window
        summed = Op(f"{name}.like", (f"{c}.kv",), (Tensor(f"{c}.sum", "0"),), autocast="wide")
        cached_keys = _unchanged(f"{name}.cache.keys", y, f"b {w.number} {width}", f"={c}.sum", _CACHE)
        return (*projections, *(unchanged_halves if double else ()), summed, cached_keys)
    window, new_key = w._replace(number="1", tokens=w.rate), f"{y}.new"
    overlap = tuple(
        Op(
            f"{name}.overlap.{t}",
            (used,),
            (Tensor(f"{c}.{t}.half", f"b {w.rate} {width}", halves[t]),),
            past=(Tensor(f"{c}.{t}.half before", f"b rc_before {width}", halves[t]),),
            holds="cache",
            source=_OVERLAP,
        )
        for t, used in (("kv", f"{c}.kv.used"), ("gate", f"{c}.gate.biased"))
    )
    before = Tensor(f"{y} before", f"b {w.number}_before {width}", f"={new_key}")
    keys = Tensor(y, f"b {w.number} {width}", f"={new_key}")
    return (
        *projections,
        *pooled(
            name, y, new_key, f"{c}.kv.waiting", f"{c}.gate.waiting", window, width, where, overlap if double else ()
        ),
        Op(f"{name}.cache.keys", (before.name, new_key), (keys,), holds="cache", past=(before,), source=_CACHE),
    )


def token_compressed(y: str, double: bool, fills: bool) -> tuple[Op, ...]:
    """The function that computed the keys `y` returns."""
    if not fills:
        return (ops.release_names(f"{y}.c.kv", f"{y}.c.gate"),)
    halves = (f"{y}.c.{t}.half before" for t in ("kv", "gate"))
    return (compressed(y, double), *((ops.release_names(*halves),) if double else ()))
