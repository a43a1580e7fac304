"""Bytes in words, and up to the next multiple."""

from __future__ import annotations

import math

ALIGN = 256  # bytes; what the CUDA allocator grants, and more than any kernel's widest load needs
UNITS = ((1e9, "GB", 2), (1e6, "MB", 1), (1e3, "kB", 1))


def aligned(nbytes: int, to: int = ALIGN) -> int:
    """The next multiple of `to`."""
    return -(-nbytes // to) * to


def size(nbytes: float) -> str:
    """In the decimal unit that suits: 12.70 GB, 6.9 MB, 4.1 kB, 512 bytes."""
    for unit, name, digits in UNITS:
        # What would be rounded up to 1000 of a unit is one of the next.
        if abs(nbytes) >= unit - unit / 2e4:
            return f"{nbytes / unit:.{digits}f} {name}"
    return f"{nbytes:.0f} byte{'' if nbytes == 1 else 's'}"


def gb_up(nbytes: float) -> str:
    """In GB, rounded up, so that a user who types the number into a dial gets enough; no finer than dials are."""
    digits = 2 if nbytes >= 1e9 else 3
    return f"{math.ceil(nbytes / 1e9 * 10**digits) / 10**digits:.{digits}f} GB"
