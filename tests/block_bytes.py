"""Random blocks of every quantised type, for whoever has to compare two dequantisers.

Bytes drawn at random are valid blocks of every type, but a half drawn so is hardly ever zero or infinite and
often huge. `random_blocks` keeps every other byte random and draws the block's scales by hand. It knows where
the scales lie and nothing else, and shares no code with any dequantiser.
"""

from __future__ import annotations

import numpy as np
from pack.loaders.gguf.types import BLOCKS, GGMLType

# Offsets of the half-precision scales in a block. IQ1_M's half is split over nibbles; MXFP4 and NVFP4 have
# scales of one byte.
HALF_SCALES: dict[GGMLType, tuple[int, ...]] = {
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_0: (0,),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q8_0: (0,),
    GGMLType.Q2_K: (80, 82),
    GGMLType.Q3_K: (108,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
    GGMLType.IQ1_S: (0,),
    GGMLType.IQ2_XXS: (0,),
    GGMLType.IQ2_XS: (0,),
    GGMLType.IQ2_S: (0,),
    GGMLType.IQ3_XXS: (0,),
    GGMLType.IQ3_S: (0,),
    GGMLType.IQ4_NL: (0,),
    GGMLType.IQ4_XS: (0,),
    GGMLType.TQ1_0: (52,),
    GGMLType.TQ2_0: (64,),
}

# Bits of halves: zeros, the smallest and the largest subnormals, the smallest normals, one, the largest
# finite values, infinities, and NaNs quiet and signalling; all with both signs.
HALF_SPECIALS = np.array(
    [
        bits | sign
        for bits in (0x0000, 0x0001, 0x0155, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0x7C00, 0x7E00, 0x7C01)
        for sign in (0x0000, 0x8000)
    ],
    dtype=np.uint16,
)

# E8M0: two subnormal results, the smallest normal one, one, the largest, and the code that OCP calls NaN.
E8M0_SPECIALS = np.array([0, 1, 2, 127, 128, 254, 255], dtype=np.uint8)

# UE4M3: zero, subnormals, the smallest normal, one, the largest, the code of NaN, and the same with a sign bit.
UE4M3_SPECIALS = np.array([0x00, 0x01, 0x07, 0x08, 0x38, 0x7E, 0x7F, 0x80, 0x81, 0xFF], dtype=np.uint8)


def random_blocks(ggml_type: GGMLType, n: int, rng: np.random.Generator, specials: bool = True) -> np.ndarray:
    """`n` blocks of `ggml_type`: uint8 `[n, nbytes]`, contiguous, writable.

    Guaranteed:
      * All bytes but the scales are uniformly random, so every code book row and every sub-scale can occur.
      * Without `specials` every half scale is finite, either sign, of magnitude 2^-14 to 2 (as weights have);
        MXFP4 scales are 2^-28 to 2^4, NVFP4 scales any finite code. Every dequantised value is then finite and
        far from overflow in float32, bfloat16 and float16.
      * With `specials`, about half of the blocks have for each of their scales independently one of the special
        values above, drawn uniformly, so all pairs occur when n is a few thousand; the others are as without.
        The first len(specials) blocks hold each special once, for the first scale, however small n is otherwise.
    """
    blocks = rng.integers(0, 256, (n, BLOCKS[ggml_type].nbytes), dtype=np.uint8)
    if ggml_type is GGMLType.MXFP4:
        ordinary = rng.integers(100, 132, (n, 1), dtype=np.uint8)
        blocks[:, :1] = _mix(ordinary, E8M0_SPECIALS, rng) if specials else ordinary
    elif ggml_type is GGMLType.NVFP4:
        ordinary = rng.integers(0, 0x7F, (n, 4), dtype=np.uint8)
        blocks[:, :4] = _mix(ordinary, UE4M3_SPECIALS, rng) if specials else ordinary
    else:
        offsets = HALF_SCALES.get(ggml_type, (None,))
        scales = _ordinary_halves((n, len(offsets)), rng)
        if specials:
            scales = _mix(scales, HALF_SPECIALS, rng)
        for scale, offset in zip(scales.T, offsets, strict=True):
            if offset is None:
                _spread_over_nibbles(scale, blocks)
            else:
                blocks[:, offset] = scale & 0xFF
                blocks[:, offset + 1] = scale >> 8
    return blocks


def _ordinary_halves(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Bits of random halves of magnitude 2^-14 to 2, uniform over the bit patterns."""
    return rng.integers(0x0400, 0x4000, shape, dtype=np.uint16) | (rng.integers(0, 2, shape, dtype=np.uint16) << 15)


def _mix(ordinary: np.ndarray, specials: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Replace the scales of half of the rows by specials, and begin with each special once."""
    mixed = np.where(rng.integers(0, 2, (len(ordinary), 1)) == 1, rng.choice(specials, ordinary.shape), ordinary)
    first = min(len(specials), len(ordinary))
    mixed[:first, 0] = specials[:first]
    return mixed


def _spread_over_nibbles(scale: np.ndarray, blocks: np.ndarray) -> None:
    """IQ1_M: nibble i of the half, lowest first, is the top nibble of the i-th 16-bit word from byte 48."""
    for i in range(4):
        nibble = (scale >> (4 * i)) & 0xF
        high = 48 + 2 * i + 1
        blocks[:, high] = (blocks[:, high] & 0x0F) | (nibble << 4)
