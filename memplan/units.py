"""Bytes: always integers, shown in GiB = 2**30, never GB."""

from __future__ import annotations

KIB, MIB, GIB = 2**10, 2**20, 2**30


def gib(n: int) -> str:
    """`n` bytes as GiB with two decimals, and below 1 GiB in the largest unit of which there is one.

    >>> gib(25_769_803_776), gib(10_485_760), gib(-16_384), gib(512)
    ('24.00 GiB', '10.0 MiB', '-16.0 KiB', '512 bytes')
    """
    if abs(n) >= GIB:
        return f"{n / GIB:.2f} GiB"
    if abs(n) >= MIB:
        return f"{n / MIB:.1f} MiB"
    return f"{n / KIB:.1f} KiB" if abs(n) >= KIB else f"{n} bytes"


def rounded(n: int) -> int:
    """What torch's CUDA caching allocator takes for `n` bytes: the next multiple of 512.

    Source: torch 2.13 c10/cuda/CUDACachingAllocator.cpp round_size.
    """
    return -(-n // 512) * 512
