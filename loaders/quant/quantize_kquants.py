"""Quantisers of the types whose 256 values share one or two halves and whose groups have small integers for scales:
Q2_K to Q6_K and IQ4_XS.

First each group gets the scale (and offset) that suits it best, then those are written as integers times the block's
half, then the values get the codes that are nearest under what the file will really say, and at last the half is
solved for once more. Layouts: the docstrings of reference_linear and reference_codebook.
"""

from __future__ import annotations

import torch

from ..gguf.types import GGMLType
from .quantize_blocks import IQ4_TOPS, iq4_codes, iq4_values
from .quantize_search import (
    Codes,
    best_affine,
    best_scale,
    integers,
    inverse,
    ratio,
    refit,
    shared_scale,
    steps,
    to_scale,
)
from .quantize_table import half_bytes, pack_bits, pack_nibbles, pack_pairs, quantises, word_bytes

# --- scale times code


def _scaled(
    x: torch.Tensor, size: int, codes: Codes, tops: tuple[float, ...], levels: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factor [n, 1], integer scales [n, groups] and x in units of the scales [n, groups, size], for one block a row."""
    groups = x.view(-1, size)
    scale, weight = (v.view(len(x), -1) for v in best_scale(groups, codes, tops))
    low, high = levels
    factor, level = shared_scale(scale, weight, integers(low, high), (low, low + 1))
    level_of = level.unsqueeze(-1)
    x = x.view(len(x), -1, size)
    y = codes(x * inverse(factor.unsqueeze(-1) * level_of)) * level_of
    factor = refit(x.flatten(1), y.flatten(1), factor)
    return factor, level, x * inverse(factor.unsqueeze(-1) * level_of)


@quantises(GGMLType.Q6_K)
def q6_k(x: torch.Tensor) -> torch.Tensor:
    factor, level, units = _scaled(x, 16, integers(-32, 31), steps(-33, -30.5, 6), (-128, 127))
    q = units.round_().clamp_(-32, 31).add_(32).to(torch.uint8).view(-1, 2, 4, 32)  # halves of four runs
    low = pack_nibbles(q[:, :, :2] & 15, q[:, :, 2:] & 15)
    top = pack_pairs((q >> 4).flatten(1))
    scales = level.to(torch.int8).view(torch.uint8)
    return torch.cat((low.flatten(1), top, scales, half_bytes(factor)), dim=1)


@quantises(GGMLType.Q3_K)
def q3_k(x: torch.Tensor) -> torch.Tensor:
    factor, level, units = _scaled(x, 16, integers(-4, 3), steps(-4.9, -3.0, 13), (-32, 31))
    q = units.round_().clamp_(-4, 3).add_(4).to(torch.uint8).view(-1, 8, 32)
    # Bit 4 h + k of byte l is for element 128 h + 32 k + l, which is run 4 h + k of eight.
    third = pack_bits((q >> 2).transpose(1, 2))
    s = level.add(32).to(torch.uint8)
    low, top = s & 15, (s >> 4).view(-1, 4, 4)
    scales = (pack_nibbles(low[:, :8], low[:, 8:]), top[:, 0] | top[:, 1] << 2 | top[:, 2] << 4 | top[:, 3] << 6)
    return torch.cat((third, pack_pairs((q & 3).flatten(1)), *scales, half_bytes(factor)), dim=1)


@quantises(GGMLType.IQ4_XS)
def iq4_xs(x: torch.Tensor) -> torch.Tensor:
    factor, level, units = _scaled(x, 32, iq4_values, IQ4_TOPS, (-32, 31))
    q = iq4_codes(units).to(torch.uint8)
    s = level.add(32).to(torch.int64)
    places = torch.arange(0, 16, 2, device=x.device)
    top = word_bytes(((s >> 4) << places).sum(-1, keepdim=True), 2)
    low = pack_nibbles((s[:, ::2] & 15).to(torch.uint8), (s[:, 1::2] & 15).to(torch.uint8))
    return torch.cat((half_bytes(factor), top, low, pack_nibbles(q[..., :16], q[..., 16:]).flatten(1)), dim=1)


# --- scale times code, less a minimum


def _shifted(
    x: torch.Tensor, size: int, top: int, tops: tuple[float, ...], levels: int, level_tops: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The halves d and dmin [n, 2], scales and minima as integers up to `levels` [n, groups] each, codes [n, groups,
    size], for one block a row; the last three uint8."""
    scale, offset = best_affine(x.view(-1, size), top, tops, offset_above_zero=False)
    scale, offset = scale.view(len(x), -1), offset.view(len(x), -1, 1)
    x = x.view(len(x), -1, size)
    ones = torch.ones_like(scale)

    def codes(scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return (x - offset).mul_(inverse(scale)).round_().clamp_(0, top)

    d, scales = shared_scale(scale, ones, integers(0, levels), level_tops)
    scales = scales.unsqueeze(-1)
    # The offsets that suit the scales which the file will have.
    scale = d.unsqueeze(-1) * scales
    offset = (x - codes(scale, offset) * scale).mean(-1).clamp_(max=0)
    dmin, minima = shared_scale(-offset, ones, integers(0, levels), level_tops)
    minima = minima.unsqueeze(-1)

    y = codes(scale, -dmin.unsqueeze(-1) * minima) * scales
    d, dmin = _refit_both(x, y, minima, d, dmin)
    q = codes(d.unsqueeze(-1) * scales, -dmin.unsqueeze(-1) * minima)
    scales, minima = (v.squeeze(-1).to(torch.uint8) for v in (scales, minima))
    return torch.cat((d, dmin), dim=1), scales, minima, q.to(torch.uint8)


def _refit_both(
    x: torch.Tensor, y: torch.Tensor, minima: torch.Tensor, d: torch.Tensor, dmin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The d and dmin with which d y - dmin minima comes closest to x, where that has one answer with both positive."""
    size = x.shape[-1]

    def total(v: torch.Tensor) -> torch.Tensor:
        return v.flatten(1).sum(-1, keepdim=True)

    yy, ym, mm = total(y * y), total(y.sum(-1, keepdim=True) * minima), total(minima * minima) * size
    xy, xm = total(x * y), total(x.sum(-1, keepdim=True) * minima)
    determinant = yy * mm - ym * ym
    new_d = to_scale(ratio(mm * xy - ym * xm, determinant))
    new_dmin = to_scale(ratio(ym * xy - yy * xm, determinant))
    sound = (determinant > 1e-3 * yy * mm) & (new_d > 0) & (new_dmin > 0)
    return torch.where(sound, new_d, d), torch.where(sound, new_dmin, dmin)


def _twelve_bytes(scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """Eight scales and eight minima of six bits, as the diagram at reference_linear's `_k_scales` has them."""
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = minima[:, :4] | minima[:, 4:] >> 4 << 6
    return torch.cat((first, second, pack_nibbles(scales[:, 4:] & 15, minima[:, 4:] & 15)), dim=1)


@quantises(GGMLType.Q4_K)
def q4_k(x: torch.Tensor) -> torch.Tensor:
    halves, scales, minima, q = _shifted(x, 32, 15, steps(13, 17.5, 10), 63, (63,))
    qs = pack_nibbles(q[:, ::2], q[:, 1::2])
    return torch.cat((half_bytes(halves), _twelve_bytes(scales, minima), qs.flatten(1)), dim=1)


@quantises(GGMLType.Q5_K)
def q5_k(x: torch.Tensor) -> torch.Tensor:
    halves, scales, minima, q = _shifted(x, 32, 31, steps(30, 32.5, 6), 63, (63,))
    fifth = pack_bits((q >> 4).transpose(1, 2))  # bit g of byte l: element l of group g
    qs = pack_nibbles(q[:, ::2] & 15, q[:, 1::2] & 15)
    return torch.cat((half_bytes(halves), _twelve_bytes(scales, minima), fifth, qs.flatten(1)), dim=1)


@quantises(GGMLType.Q2_K)
def q2_k(x: torch.Tensor) -> torch.Tensor:
    halves, scales, minima, q = _shifted(x, 16, 3, steps(2.4, 4.2, 13), 15, steps(13, 16, 7))
    return torch.cat((pack_nibbles(scales, minima), pack_pairs(q.flatten(1)), half_bytes(halves)), dim=1)
