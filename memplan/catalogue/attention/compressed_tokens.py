"""One token's step of keys that stand for windows of tokens: DeepSeek V4's, after a prompt.

A cache has the tokens' keys of the newest window, the keys of windows that are full, and of a window that is not full
yet what its tokens made. Every token adds itself to those, in a tensor of its own; the last of a window makes a key,
which is put beside the others in a tensor of its own too. What a prompt left is a view of all that its tokens made,
until the first token after it.

Axes of its own, of windows of a small and of a large size (`c`, `h`):

    wc_before, wh_before           the windows before this token
    buffer_c, buffer_h             the tokens of the one that it is in, with itself
    buffer_c_before, ..h_before    the tokens of the tensor that waits, or of a prompt that it is a view of
    rc_before                      the tokens of a window, where there is one before this token; else 0
"""

from __future__ import annotations

from collections.abc import Mapping

from memplan.catalogue.attention.compressed_keys import HEAVY, SOURCE, SPARSE, Windows, compressed, pooled, projected
from memplan.catalogue.kernels import ops
from memplan.core.ir import Op, Tensor

_CACHE = f"{SOURCE} DeepseekV4HCACache.store_compression_weights, update_compressor_states"
_OVERLAP = f"{SOURCE} DeepseekV4CSACache.update_overlap_state"
_KINDS = (SPARSE, HEAVY)
LEFT = {  # the axes of what one pass leaves and the next finds, by one word for both; of what waits by that for tokens
    **dict.fromkeys(("buffer_c", "buffer_c_before", "buffer_h", "buffer_h_before"), "kv"),
    "wc_before": "wc",
    "wh_before": "wh",
    "rc_before": "rc",
    "rc_kept": "rc",
}


def first_and_last(axes: Mapping[str, int], past: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The kinds of windows that the token after so many is the first of, and the last of."""
    begins = tuple(w.kind for w in _KINDS if past % axes[w.rate] == 0)
    fills = tuple(w.kind for w in _KINDS if (past + 1) % axes[w.rate] == 0)
    return begins, fills


def turning_points(axes: Mapping[str, int], first: int, last: int) -> set[int]:
    """Tokens, from the `first` to the `last`, where what is kept may be most, each by how many are before it: the last
    that fills a window of each kind with the ones before and after it, and the first that fills one."""
    found: set[int] = set()
    for rate in (axes[w.rate] for w in _KINDS):
        filled = (last + 1) // rate * rate - 1
        found |= {filled - 1, filled, filled + 1, -(-(first + 1) // rate) * rate - 1}
    return {past for past in found if first <= past <= last}


def axes_of_token(axes: Mapping[str, int], past: int, prompt: int, window: int, top: int) -> dict[str, int]:
    """The axes of the token after `past`, of which the `prompt` was read at once; attention sees so many of a `window`
    and at most the `top` of the small windows."""
    found = {"rc_before": axes["rc"] if past >= axes["rc"] else 0, "rc_kept": axes["rc"]}
    for w, kind in ((SPARSE, "c"), (HEAVY, "h")):
        rate = axes[w.rate]
        windows = (past + 1) // rate
        found |= {
            w.number: windows,
            f"{w.number}1": windows + 1,
            f"{w.number}_before": past // rate,
            f"buffer_{kind}": past % rate + 1,
            f"buffer_{kind}_before": prompt if past == prompt else (past - 1) % rate + 1,
            w.keys: window + windows,
            w.with_sink: window + windows + 1,
            w.masked: window + windows if windows else 0,
        }
    return {**found, "tk": min(top, found[SPARSE.number])}


def _waiting(name: str, x: str, t: str, w: Windows, out: str, begins: bool) -> Op:
    """What waits, joined with the token's own; that alone where the token is a window's first."""
    own, before = f"{x}.c.{t}", f"{x}.c.{t} before"
    kind = w.rate[-1]
    past = Tensor(before, f"b buffer_{kind}_before {out}", f"={own}")
    joined = Tensor(f"{own}.waiting", f"b buffer_{kind} {out}", f"={own}")
    reads = (own,) if begins else (before, own)
    return Op(f"{name}.cache.{t}", reads, (joined,), view=begins, holds="cache", past=(past,), source=_CACHE)


def _stays(name: str, y: str, shape: str, dtype: str, source: str) -> Op:
    """What the cache has, as it is."""
    before = Tensor(f"{y} before", shape, dtype)
    return Op(name, (before.name,), (Tensor(y, shape, dtype),), view=True, holds="cache", past=(before,), source=source)


def token_compressor(
    name: str, x: str, y: str, w: Windows, width: str, where: str, begins: bool, fills: bool
) -> tuple[Op, ...]:
    """The keys `y` of all windows so far, `width` wide; a token that `fills` one makes the last of them."""
    double, c = w.kind == "sparse", f"{y}.c"
    out, like = f"2 {width}" if double else width, f"={y}.c.kv"
    some = (
        *projected(name, x, y, out),
        *(_waiting(name, y, t, w, out, begins) for t in ("kv", "gate")),
        ops.leave(*(f"{c}.{t} before" for t in ("kv", "gate"))),
    )
    halves = {"kv": like, "gate": "fp32"}
    if not fills:
        same = (
            _stays(f"{name}.overlap.{t}", f"{c}.{t}.half", f"b rc_before {width}", dtype, _OVERLAP)
            for t, dtype in halves.items()
        )
        # of the dtype that a sum over a window has
        summed = Op(f"{name}.like", (f"{c}.kv",), (Tensor(f"{c}.sum", "0"),), autocast="wide")
        found = _stays(f"{name}.cache.keys", y, f"b {w.number} {width}", f"={c}.sum", _CACHE)
        return (*some, *(same if double else ()), summed, found)
    one, own = w._replace(number="1", tokens=w.rate), f"{y}.new"
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
    before = Tensor(f"{y} before", f"b {w.number}_before {width}", f"={own}")
    keys = Tensor(y, f"b {w.number} {width}", f"={own}")
    return (
        *some,
        *pooled(name, y, own, f"{c}.kv.waiting", f"{c}.gate.waiting", one, width, where, overlap if double else ()),
        Op(f"{name}.cache.keys", (before.name, own), (keys,), holds="cache", past=(before,), source=_CACHE),
    )


def token_compressed(y: str, double: bool, fills: bool) -> tuple[Op, ...]:
    """The function that made the keys `y` returns."""
    if not fills:
        return (ops.leave(f"{y}.c.kv", f"{y}.c.gate"),)
    halves = (f"{y}.c.{t}.half before" for t in ("kv", "gate"))
    return (compressed(y, double), *((ops.leave(*halves),) if double else ()))
