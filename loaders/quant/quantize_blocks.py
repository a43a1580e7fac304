"""Quantisers of the types with one scale for each 16, 32 or 256 values: Q4_0 to Q8_0, IQ4_NL, MXFP4, NVFP4, TQ*.

Each takes float32 `[n, elements]` and returns the blocks, uint8 `[n, nbytes]`. The layout of each is in the docstring
of its dequantiser, in reference_linear and reference_codebook.
"""

from __future__ import annotations

from functools import cache

import torch

from ..gguf.types import GGMLType
from .quantize_search import best_affine, best_scale, integers, inverse, ratio, steps, to_half, to_scale
from .quantize_table import half_bytes, pack_bits, pack_nibbles, pack_pairs, quantises
from .reference_codebook import IQ4


def _symmetric(x: torch.Tensor, low: int, high: int, tops: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale as a half [n, 1] and integers less `low`, uint8 [n, 32]."""
    scale, _ = best_scale(x, integers(low, high), tops)
    scale = to_scale(scale)
    q = (x * inverse(scale)).round_().clamp_(low, high).sub_(low)
    return scale, q.to(torch.uint8)


def _affine(x: torch.Tensor, top: int, tops: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of scale and offset [n, 4] and the codes, uint8 [n, 32]."""
    scale, offset = best_affine(x, top, tops, offset_above_zero=True)
    scale, offset = to_scale(scale), to_half(offset)
    q = ((x - offset) * inverse(scale)).round_().clamp_(0, top).to(torch.uint8)
    return torch.cat((half_bytes(scale), half_bytes(offset)), dim=1), q


def _halves(q: torch.Tensor) -> torch.Tensor:
    """32 codes of four bits in 16 bytes: elements 0-15 the low nibbles, 16-31 the high ones."""
    return pack_nibbles(q[:, :16], q[:, 16:])


def _fifth_bits(q: torch.Tensor) -> torch.Tensor:
    """Bit 4 of each of 32 codes, as the bits of four bytes."""
    return pack_bits((q >> 4).view(-1, 4, 8))


@quantises(GGMLType.Q4_0)
def q4_0(x: torch.Tensor) -> torch.Tensor:
    scale, q = _symmetric(x, -8, 7, steps(-9, -6.5, 11))
    return torch.cat((half_bytes(scale), _halves(q)), dim=1)


@quantises(GGMLType.Q4_1)
def q4_1(x: torch.Tensor) -> torch.Tensor:
    head, q = _affine(x, 15, steps(14, 17.5, 8))
    return torch.cat((head, _halves(q)), dim=1)


@quantises(GGMLType.Q5_0)
def q5_0(x: torch.Tensor) -> torch.Tensor:
    scale, q = _symmetric(x, -16, 15, steps(-17, -15, 9))
    return torch.cat((half_bytes(scale), _fifth_bits(q), _halves(q & 15)), dim=1)


@quantises(GGMLType.Q5_1)
def q5_1(x: torch.Tensor) -> torch.Tensor:
    head, q = _affine(x, 31, steps(30, 32.5, 6))
    return torch.cat((head, _fifth_bits(q), _halves(q & 15)), dim=1)


@quantises(GGMLType.Q8_0)
def q8_0(x: torch.Tensor) -> torch.Tensor:
    """With 127 steps the maximum's own scale is as good as any; no search."""
    scale = to_scale(x.abs().amax(-1, keepdim=True) / 127)
    q = (x * inverse(scale)).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat((half_bytes(scale), q.view(torch.uint8)), dim=1)


# --- code books of sixteen values

E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)  # twice the magnitudes of FP4


@cache
def _iq4_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The bounds between the values of IQ4_NL, and for each whole number from -128 to 127 the nearest value."""
    values = torch.tensor(IQ4, dtype=torch.float32)
    bounds = (values[1:] + values[:-1]) / 2
    return bounds.to(device), values[torch.bucketize(torch.arange(-128.0, 128.0), bounds)].to(device)


def iq4_codes(x: torch.Tensor) -> torch.Tensor:
    """For values in units of the scale the numbers of the nearest entries of IQ4, int32."""
    return torch.bucketize(x, _iq4_tables(x.device)[0], out_int32=True)


def iq4_values(x: torch.Tensor) -> torch.Tensor:
    """The nearest entries themselves, by way of the nearest whole number: quick, and off by no more than half of one,
    as is enough while scales are compared."""
    index = x.round_().clamp_(-128, 127).add_(128).int()
    return _iq4_tables(x.device)[1].index_select(0, index.view(-1)).view(x.shape)


IQ4_TOPS = (*steps(-145, -95, 9), *steps(90, 125, 6))


@quantises(GGMLType.IQ4_NL)
def iq4_nl(x: torch.Tensor) -> torch.Tensor:
    scale = to_scale(best_scale(x, iq4_values, IQ4_TOPS)[0])
    q = iq4_codes(x * inverse(scale)).to(torch.uint8)
    return torch.cat((half_bytes(scale), _halves(q)), dim=1)


def _e2m1_code(magnitude: torch.Tensor) -> torch.Tensor:
    """Numbers of the nearest entries of E2M1, int32."""
    values = torch.tensor(E2M1, dtype=torch.float32, device=magnitude.device)
    return torch.bucketize(magnitude, (values[1:] + values[:-1]) / 2, out_int32=True)


def _best_of(x: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the `scales` [n, candidates] reproduces a group best with E2M1, [n, 1], and the signed codes."""
    values = torch.tensor(E2M1, dtype=torch.float32, device=x.device)
    magnitude = x.abs()
    best = x.new_full((len(x), 1), float("inf"))
    choice = torch.zeros((len(x), 1), dtype=torch.int64, device=x.device)
    for k in range(scales.shape[1]):
        scale = scales[:, k : k + 1]
        y = values.index_select(0, _e2m1_code(magnitude * inverse(scale)).view(-1)).view(x.shape).mul_(scale)
        error = (y - magnitude).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        choice = torch.where(better, k, choice)
    code = _e2m1_code(magnitude * inverse(scales.gather(1, choice))).to(torch.uint8)
    return choice, code.add_((x < 0).to(torch.uint8), alpha=8)


@quantises(GGMLType.MXFP4)
def mxfp4(x: torch.Tensor) -> torch.Tensor:
    """The scale is a power of two: the two around largest / 6, which may clip or not, and one more on each side."""
    exponent = torch.frexp(x.abs().amax(-1, keepdim=True)).exponent  # of a number below 2^exponent
    candidates = exponent + torch.arange(-5, -1, dtype=torch.int32, device=x.device) + 128
    candidates = candidates.clamp_(2, 254)
    scales = torch.ldexp(torch.ones_like(candidates, dtype=torch.float32), candidates - 128)
    choice, q = _best_of(x, scales)
    return torch.cat((candidates.gather(1, choice).to(torch.uint8), _halves(q)), dim=1)


@quantises(GGMLType.NVFP4)
def nvfp4(x: torch.Tensor) -> torch.Tensor:
    """The scale of 16 values is one of 126 that FP8 E4M3 can hold: tried are those that map the maximum to 3 to 6."""
    codes = torch.arange(127, dtype=torch.uint8, device=x.device)
    table = codes.view(torch.float8_e4m3fn).float() / 2  # E2M1 holds doubles
    groups = x.reshape(-1, 16)
    nearest = torch.searchsorted(table, groups.abs().amax(-1, keepdim=True) / 12)
    candidates = (nearest + torch.arange(-3, 8, device=x.device)).clamp_(0, 126)
    choice, q = _best_of(groups, table[candidates])
    packed = pack_nibbles(q[:, :8], q[:, 8:]).view(-1, 32)
    return torch.cat((candidates.gather(1, choice).to(torch.uint8).view(-1, 4), packed), dim=1)


# --- ternary


def _ternary(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale [n, 1] and digits 0-2, uint8 [n, 256], with the least squared error that there is.

    With the k largest magnitudes kept, the best scale is their mean and the error is less by their sum's square over k.
    """
    largest = x.abs().sort(dim=-1, descending=True).values
    sums = largest.cumsum(-1)
    count = torch.arange(1, x.shape[-1] + 1, device=x.device)
    kept = (sums * sums / count).argmax(-1, keepdim=True)
    scale = to_scale(ratio(sums.gather(1, kept), (kept + 1).float()))
    return scale, (x * inverse(scale)).round_().clamp_(-1, 1).add_(1).to(torch.uint8)


@quantises(GGMLType.TQ1_0)
def tq1_0(x: torch.Tensor) -> torch.Tensor:
    """Five digits to a byte as ceil(256 n / 243), so that multiplying by 3 brings them out; four in the last bytes."""
    scale, q = _ternary(x)
    pieces = []
    for first, width, count in ((0, 32, 5), (160, 16, 5), (240, 4, 4)):
        digits = q[:, first : first + width * count].view(-1, count, width).int()
        number = torch.zeros_like(digits[:, 0])
        for k in range(5):
            number = number * 3 + (digits[:, k] if k < count else 0)
        pieces.append(((number * 256 + 242) // 243).to(torch.uint8))
    return torch.cat((*pieces, half_bytes(scale)), dim=1)


@quantises(GGMLType.TQ2_0)
def tq2_0(x: torch.Tensor) -> torch.Tensor:
    scale, q = _ternary(x)
    return torch.cat((pack_pairs(q), half_bytes(scale)), dim=1)
