"""Which products with bitsandbytes' 4-bit matrices read the packed weights instead of a dequantised copy.

Passes without gradients multiply a few rows by packed weights. How many is chosen by the card, and by the outputs and
inputs of the matrix. Source of all limits: bitsandbytes 0.50 backends/cuda/ops.py gemm_4bit,
_gemm_4bit_use_custom_cuda; a test compares them with the installed file's.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from functools import lru_cache
from math import prod
from typing import Literal

from memplan.catalogue.hardware.gpu import GPU
from memplan.core.ir import Tensor, Weight
from memplan.core.records import NamedTuple

# Multiprocessors of a common card of each compute capability: NVIDIA's architecture whitepapers (T4, A100, RTX 3090,
# RTX 4090, H100 SXM, B200, RTX 5090).
_PROCESSORS = {(7, 5): 40, (8, 0): 108, (8, 6): 82, (8, 9): 128, (9, 0): 132, (10, 0): 148, (12, 0): 170}
_ALWAYS_PACKED = 4  # rows
_HIGH_BANDWIDTH = ((8, 0), (9, 0))
_SMALL = 4 * 2**20  # elements of a matrix
_COPIED = "@copied:"
Copies = Literal["", "by rows", "always"]  # when a product dequantises a packed matrix first


class KernelCard(NamedTuple):
    """The properties of a card that kernels depend on: compute capability and number of multiprocessors."""

    capability: tuple[int, int]
    processors: int


def card_of(capability: tuple[int, int] | None) -> KernelCard:
    """Return the card for a compute capability; an A100 if None."""
    capability = capability or (8, 0)
    nearest = max((known for known in _PROCESSORS if known <= capability), default=(7, 5))
    return KernelCard(capability, _PROCESSORS[nearest])


class _Matrix(NamedTuple):
    """A matrix of `n` outputs and `k` inputs. `blocks` of 64 outputs are spread over the card's multiprocessors."""

    n: int
    k: int
    processors: int

    @property
    def blocks(self) -> int:
        return -(-self.n // 64)

    @property
    def waves(self) -> float:
        """Blocks per multiprocessor."""
        return self.blocks / self.processors


_Condition = Callable[[_Matrix], bool]


def _any(_: _Matrix) -> bool:
    return True


def _wide(m: _Matrix) -> bool:
    return m.k < m.n


def _not_wide(m: _Matrix) -> bool:
    return m.k >= m.n


def _twice_as_tall(m: _Matrix) -> bool:
    return m.k > 2 * m.n


# Compute capability -> the most rows that are multiplied by packed weights, by the least waves and a condition. The
# first that holds counts. `_OTHERS` is for those that have none: 8.9, 12.1 below one wave, and unknown cards.
_Limits = tuple[tuple[float, _Condition, int], ...]
_LARGE: Mapping[tuple[int, int], _Limits] = {
    (7, 5): ((3, _wide, 128), (0.5, _any, 64), (0, _any, 32)),
    (8, 0): (
        (3, _any, 128),
        (1, _wide, 64),
        (1, _any, 32),
        (0.25, lambda m: m.k >= 3 * m.n and m.blocks * 4 > m.processors, 0),
        (0, lambda m: m.k == m.n and m.blocks >= 48 and m.waves < 0.6, 0),
        (0, lambda m: m.k <= m.n and m.waves < 0.5, 128),
        (1 / 3, lambda m: m.waves < 0.5, 0),
        (0.5, _wide, 128),
        (0, _any, 16),
    ),
    (8, 6): ((1, _any, 128), (0.5, _any, 64), (0, _any, 16)),
    (9, 0): (
        (3, _any, 64),
        (2, _any, 48),
        (1, _any, 32),
        (0.5, lambda m: m.k >= m.n and m.waves < 0.75, 0),
        (0.5, _any, 16),
    ),
    (10, 0): ((3, _any, 32), (1, _wide, 8)),
    (12, 0): (
        (3, _any, 256),
        (2, _any, 128),
        (0.8, _not_wide, 96),
        (0.8, _any, 64),
        (0.5, lambda m: 2 * m.k >= m.n and m.blocks >= 128, 64),
        (0.5, _any, 8),
        (0, lambda m: _twice_as_tall(m) and m.blocks > 64, 16),
        (0, _any, 8),
    ),
}
_OTHERS: _Limits = (
    (3, _any, 256),
    (2, _any, 128),
    (0.8, lambda m: _twice_as_tall(m) or m.blocks >= 200, 128),
    (0.8, _not_wide, 128),
    (0.8, _any, 64),
    (0.5, _twice_as_tall, 64),
    (0.5, lambda m: m.blocks >= 64, 8),
    (0.5, _any, 32),
    (0, lambda m: m.k >= 3 * m.n and m.blocks <= 48, 12),
    (0, lambda m: m.k > m.n and m.blocks <= 48, 10),
    (0, lambda m: _twice_as_tall(m) or m.blocks < 48, 16),
    (0, _any, 8),
)


def _first(limits: _Limits, m: _Matrix) -> int:
    return next((rows for waves, holds, rows in limits if m.waves >= waves and holds(m)), 0)


def _of_large(rows: int, m: _Matrix, capability: tuple[int, int]) -> bool:
    """Return whether a large matrix is read packed, of cards with limits by waves."""
    if 4 < rows < 8:
        if rows == 5 or capability not in _HIGH_BANDWIDTH or m.blocks < (36 if capability == (9, 0) else 48):
            return True
        if m.k > m.n:
            return m.waves >= 0.75
        return m.k != m.n or (m.waves >= 0.6 if capability == (8, 0) else not 0.6 <= m.waves < 0.75)
    if capability == (12, 1) and m.waves >= 1:
        return rows <= 256
    return rows <= _first(_LARGE.get(capability, _OTHERS), m)


def _of_small(rows: int, m: _Matrix, capability: tuple[int, int]) -> bool:
    """Return whether a matrix of fewer than 4 Mi elements is read packed."""
    is_high = capability in _HIGH_BANDWIDTH
    if 2 * m.k < m.n:
        if is_high:
            one, several = (1536, 512) if capability == (8, 0) else (512, 320)
            return rows <= (one if 3 * m.blocks < m.processors else several)
        if capability == (7, 5):
            return rows <= (320 if m.waves >= 3 or m.k < 704 else 64 if m.k >= 1024 else 96)
        return rows <= (192 if m.waves < 1 and m.blocks * m.k > m.processors * 320 else 320)
    if capability == (8, 0) and m.waves <= 0.25:
        return rows <= (384 if m.k < m.n else 32 if m.waves <= 0.125 else 128)
    if capability == (7, 5) and m.waves < 1 and rows > 8:
        return rows <= 64
    if m.waves <= 0.25:
        return rows <= (32 if m.k < m.n or is_high else 23)
    return m.waves <= 0.5 and rows <= 16


def reads_packed(rows: int, outputs: int, inputs: int, compute: str, card: KernelCard) -> bool:
    """Return whether a product of up to 1,536 rows reads a packed matrix.

    compute  dtype of the product
    """
    capability = card.capability if card.capability[0] != 9 else (9, 0)
    major = capability[0]
    if rows <= _ALWAYS_PACKED:
        return True
    if compute == "fp32" or card.capability < (7, 5) or (major == 7 and compute != "fp16"):
        return rows < 8
    if capability == (8, 7) or major == 11:
        return False
    m = _Matrix(outputs, inputs, card.processors)
    if major == 10:
        return rows <= _first(_LARGE[10, 0], m)
    return (_of_small if outputs * inputs < _SMALL else _of_large)(rows, m, capability)


def copied(tensors: tuple[Tensor, ...], w: Weight, lead: str, compute: str) -> tuple[Tensor, ...]:
    """Return the copies of a matrix with an axis of size 1 if a product of `lead` rows makes them, else 0.

    Adapters over other libraries' packed weights are counted with a copy of the matrix for more than a few rows.
    """
    axes = w.shape.split()
    out, into = axes[: w.rows], axes[w.rows :]
    is_bitsandbytes = w.stored[1].name == "absmax"
    block = w.stored[1].dtype.partition("/")[2] if is_bitsandbytes else "1"
    compute = compute if is_bitsandbytes else ""
    name = ":".join((*(".".join(part) for part in (lead.split(), out, into)), compute, block))
    return tuple(t._replace(shape=f"{_COPIED}{name} {t.shape}") for t in tensors)


def copied_axes(
    needs: frozenset[str], sizes: dict[str, int], fixed: dict[str, int], few_rows: int, gpu: GPU | None
) -> dict[str, int]:
    """Return the sizes of those axes in `needs` that `copied` adds, given those of the run and of the model.

    few_rows  most rows of a product that may read packed weights
    """
    found: dict[str, int] = {}
    parsed = _parsed(needs)
    if not parsed:
        return found
    card, axes = card_of(gpu.compute_capability if gpu is not None else None), ChainMap(sizes, fixed)
    if gpu is not None and gpu.compute_capability is None:  # AMD's kernels take no more
        few_rows = min(few_rows, _ALWAYS_PACKED)
    for axis, lengths, compute, block in parsed:
        rows, n, k = (prod(int(name) if name.isdigit() else axes[name] for name in names) for names in lengths)
        fits = reads_packed(rows, n, k, compute, card) if compute else rows <= _ALWAYS_PACKED
        found[axis] = int(not (fits and rows <= few_rows and k % block == 0))
    return found


@lru_cache(maxsize=256)
def _parsed(needs: frozenset[str]) -> tuple[tuple[str, tuple[list[str], ...], str, int], ...]:
    """Return the axes that `copied` adds, each with the axes of its rows, outputs and inputs, its dtype and block."""
    split = ((axis, axis.removeprefix(_COPIED).split(":")) for axis in needs if axis.startswith(_COPIED))
    return tuple((axis, tuple(part.split(".") for part in parts[:3]), parts[3], int(parts[4])) for axis, parts in split)
