"""Bytes: always integers, shown in GiB = 2**30, never GB."""

from __future__ import annotations

KIB, MIB, GIB = 2**10, 2**20, 2**30

# Bytes of one element.
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}


def decimal(n: int, unit: int, digits: int) -> str:
    """`n` bytes in units of `unit`, rounded to some digits: of integers, which no number is too large for.

    >>> decimal(25_769_803_776, GIB, 1), decimal(-(2**100) - 2**29, GIB, 1)
    ('24.0', '-1,180,591,620,717,411,303,424.5')
    """
    whole, rest = divmod((2 * abs(n) * 10**digits + unit) // (2 * unit), 10**digits)
    return f"{'-' if n < 0 else ''}{whole:,}.{rest:0{digits}}"


def gib(n: int) -> str:
    """`n` bytes as GiB with two decimals, and below 1 GiB in the largest unit of which there is one.

    >>> gib(25_769_803_776), gib(10_485_760), gib(-16_384), gib(512)
    ('24.00 GiB', '10.0 MiB', '-16.0 KiB', '512 bytes')
    """
    if abs(n) >= GIB:
        return f"{decimal(n, GIB, 2)} GiB"
    if abs(n) >= MIB:
        return f"{decimal(n, MIB, 1)} MiB"
    return f"{decimal(n, KIB, 1)} KiB" if abs(n) >= KIB else f"{n} bytes"


def rounded(n: int) -> int:
    """What torch's CUDA caching allocator takes for `n` bytes: the next multiple of 512.

    Source: torch 2.13 c10/cuda/CUDACachingAllocator.cpp round_size.
    """
    return -(-n // 512) * 512
