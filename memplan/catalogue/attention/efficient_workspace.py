"""The memory-efficient kernel's tiles and the workspace of its backward."""

from __future__ import annotations

from memplan.core.arithmetic import Arithmetic, Size


def large_tiles(capability: tuple[int, int] | None) -> bool:
    """Return whether the GPU's shared memory fits tiles of 128 x 128, which that of sm86, sm89 and sm120 does not.

    Source: torch 2.13 aten/src/ATen/native/transformers/cuda/attention_backward.cu; read, not measured.
    """
    return capability is None or capability == (8, 0) or capability[0] in (9, 10)


def efficient_workspace_bytes(
    s: Size,
    widths: tuple[int, int],
    pairs: Size,
    half: bool,
    large_tiles: bool,
    by: Arithmetic[Size],
    keys: Size | None = None,
) -> Size:
    """Return the workspace of memory-efficient attention's backward for one head of one sequence, in bytes.

    widths  head width of queries and keys, and of values
    pairs   batch x heads
    by      arithmetic for one run or for arrays of runs
    keys    number of keys, if it differs from the `s` queries

    Source: torch 2.13 aten/src/ATen/native/transformers/cuda/mem_eff_attention/kernel_backward.h.
    """
    d, most = widths[0], max(widths)
    if most <= 64:
        rows, columns, widest = 64, 64, 64
    elif most <= 96:
        rows, columns, widest = 128, 64, 96
    elif most <= 128 and large_tiles:
        rows, columns, widest = 128, 128, 128
    else:
        rows, columns, widest = 64, 64, 128 if most <= 128 else 65536
    size = -(-s // rows) * -(-d // columns) * (rows * columns * 4 + 16)
    if half and widest > rows:  # dk and dv spill from registers to fp32, once per split of the keys
        blocks = -(-(s if keys is None else keys) // columns)
        splits = by.most(1, by.least(blocks, 200 // pairs))
        padded = sum(-(-width // rows) * rows for width in widths)
        size = size + 4 * splits * (blocks * columns) * padded
    return size
