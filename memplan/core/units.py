"""Bytes: always integers, shown in GiB (2**30), never GB."""

from __future__ import annotations

import re

from memplan.core.errors import printable, refused

KIB, MIB, GIB = 2**10, 2**20, 2**30

# Bytes of one element.
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}


def decimal(n: int, unit: int, digits: int) -> str:
    """Return `n` bytes in units of `unit`, rounded to `digits` decimals with integer arithmetic, exact at any size.

    >>> decimal(25_769_803_776, GIB, 1), decimal(-(2**100) - 2**29, GIB, 1)
    ('24.0', '-1,180,591,620,717,411,303,424.5')
    """
    whole, rest = divmod((2 * abs(n) * 10**digits + unit) // (2 * unit), 10**digits)
    return f"{'-' if n < 0 else ''}{whole:,}.{rest:0{digits}}"


def gib(n: int) -> str:
    """Return `n` bytes as GiB with two decimals; below 1 GiB, in the largest unit that fits.

    >>> gib(25_769_803_776), gib(10_485_760), gib(-16_384), gib(512)
    ('24.00 GiB', '10.0 MiB', '-16.0 KiB', '512 bytes')
    """
    if abs(n) >= GIB:
        return f"{decimal(n, GIB, 2)} GiB"
    if abs(n) >= MIB:
        return f"{decimal(n, MIB, 1)} MiB"
    return f"{decimal(n, KIB, 1)} KiB" if abs(n) >= KIB else f"{n} bytes"


def rounded(n: int) -> int:
    """Return the bytes that torch's CUDA caching allocator takes for `n` bytes: the next multiple of 512.

    Source: torch 2.13 c10/cuda/CUDACachingAllocator.cpp round_size.
    """
    return -(-n // 512) * 512


_NUMBER = re.compile(r"(\d{1,20}(?:\.\d{1,20})?(?:e\+?\d{1,2})?)\s*([a-z]*)", re.ASCII | re.IGNORECASE)
_BINARY = {"kib": KIB, "mib": MIB, "gib": GIB, "tib": 2**40}
_SIZES = {"": 1, "b": 1, "bytes": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, **_BINARY}
_AMOUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def size_of(text: str, field: str) -> int:
    """Parse bytes: `2GiB`, `2048 MiB`, `2GB` (10**9 each), `2e9` or a plain number, rounded down.

    Raises SpecError about `field` for any other text.

    >>> size_of("2GiB", "headroom"), size_of("1.5 mib", "headroom"), size_of("2e9", "headroom")
    (2147483648, 1572864, 2000000000)
    """
    return _parse(text, field, _SIZES, "not a size; write 2GiB, 2048MiB, 2GB or bytes")


def amount_of(text: str, field: str) -> int:
    """Parse a whole number: `1e9`, `100M`, `2B` (10**9) or plain digits, rounded down.

    Raises SpecError about `field` for any other text.

    >>> amount_of("1e9", "tokens"), amount_of("2.5B", "tokens"), amount_of("100M", "tokens")
    (1000000000, 2500000000, 100000000)
    """
    return _parse(text, field, _AMOUNTS, "not a number; write 1e9, 100M, 2B or plain digits")


def _parse(text: str, field: str, units: dict[str, int], problem: str) -> int:
    match = _NUMBER.fullmatch(text.strip().replace(",", "").replace("_", ""))
    unit = units.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise refused(field, f"{printable(text, 40)!r} is {problem}")
    from fractions import Fraction

    return int(Fraction(match[1]) * unit)
