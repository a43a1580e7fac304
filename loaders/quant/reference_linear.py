"""Dequantisers of the types whose integers lie evenly: value = scale x integer, plus or minus an offset.

Each docstring gives the block's bytes (`d:2` is a field `d` of two bytes; `d`, `m` and `dmin` are IEEE halves)
and the formula. Source: the structs of ggml-common.h and the functions dequantize_row_* of ggml-quants.c,
llama.cpp. Why the steps are cut as they are: block_fields, [Note: Fast on a CPU].

The formulas are exact up to the last operation: a half (11 bits) times a sub-scale (at most 8) times a
quantised integer (at most 6) has no more bits than a float32 holds. So only a final sum rounds, and the result
is the correctly rounded value whichever way the product is bracketed, fused or not. What must stay as written
is which factors meet a zero, an infinity or a NaN: (q - 8) d, never q d - 8 d.
"""

from __future__ import annotations

import torch

from ..gguf.types import GGMLType
from .block_fields import bit_table, dequantises, field, fields_at, half, look_up, nibbles, parts


@dequantises(GGMLType.Q4_0)
def q4_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`d:2 qs:16`. Elements 0-15 are the low nibbles, 16-31 the high ones; d (q - 8)."""
    scale = half(blocks, 0)
    low, high = nibbles(blocks, bias=8)
    torch.mul(low[:, 2:], scale, out=out[:, :16])
    torch.mul(high[:, 2:], scale, out=out[:, 16:])


@dequantises(GGMLType.Q4_1)
def q4_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`d:2 m:2 qs:16`. Nibbles as in Q4_0; d q + m."""
    scale = half(blocks, 0)
    low, high = nibbles(blocks)
    torch.mul(low[:, 4:], scale, out=out[:, :16])
    torch.mul(high[:, 4:], scale, out=out[:, 16:])
    out.add_(half(blocks, 2))


def _five_bits(blocks: torch.Tensor, start: int, bias: int, out: torch.Tensor) -> None:
    """out = q - bias for `qh:4 qs:16` at byte `start`: a nibble of qs, 16 more where its bit of qh is set."""
    fifth = look_up(bit_table(blocks.device), field(blocks, start, 4)).view(-1, 32).float()
    low, high = nibbles(blocks, bias)
    torch.add(low[:, start + 4 :], fifth[:, :16], alpha=16, out=out[:, :16])
    torch.add(high[:, start + 4 :], fifth[:, 16:], alpha=16, out=out[:, 16:])


@dequantises(GGMLType.Q5_0)
def q5_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`d:2 qh:4 qs:16`. Nibbles as in Q4_0, bit i of qh is the fifth bit of element i; d (q - 16)."""
    _five_bits(blocks, 2, 16, out)
    out.mul_(half(blocks, 0))


@dequantises(GGMLType.Q5_1)
def q5_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`d:2 m:2 qh:4 qs:16`. Bits as in Q5_0; d q + m."""
    _five_bits(blocks, 4, 0, out)
    out.mul_(half(blocks, 0)).add_(half(blocks, 2))


@dequantises(GGMLType.Q8_0)
def q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`d:2 qs:32`. Signed bytes; d q."""
    integers = blocks.view(torch.int8).float()
    torch.mul(integers[:, 2:], half(blocks, 0), out=out)


@dequantises(GGMLType.Q2_K)
def q2_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`scales:16 qs:64 d:2 dmin:2`. 16 groups g of 16 elements: d low(scales[g]) q - dmin high(scales[g]).

    The 32 bytes of one half of qs hold 128 elements: bits 0-1 of all bytes first, then bits 2-3, 4-5, 6-7.
    """
    runs = out.view(-1, 4, 32)
    for run, q in enumerate(parts(blocks[:, 16:80], 2)):
        runs[:, run].copy_(q.view(-1, 32))
    scale, minimum = nibbles(field(blocks, 0, 16))
    groups = out.view(-1, 16, 16)
    groups.mul_(scale.mul_(half(blocks, 80)).unsqueeze(-1)).sub_(minimum.mul_(half(blocks, 82)).unsqueeze(-1))


@dequantises(GGMLType.Q3_K)
def q3_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`hmask:32 qs:64 scales:12 d:2`. 16 groups of 16: d (scale - 32) (q - 4), q of two bits and a third of hmask.

    qs as in Q2_K. Bit 4 h + k of hmask[l] belongs to element 128 h + 32 k + l. A scale has six bits: the low four
    are the low nibbles of scales[0:8], then their high nibbles; the high two are bits 0-1 of scales[8:12], then
    bits 2-3, 4-5, 6-7.
    """
    hmask = field(blocks, 0, 32)
    third = torch.cat((hmask, hmask >> 4), dim=1)  # bit k of both halves, laid out as qs
    runs = out.view(-1, 4, 32)
    for run, q in enumerate(parts(blocks[:, 32:96], 2)):
        q.add_((third >> run).bitwise_and_(1), alpha=4).sub_(4)
        runs[:, run].copy_(q.view(torch.int8).view(-1, 32))

    packed = field(blocks, 96, 12)
    low = torch.cat(nibbles(packed[:, :8], bias=32), dim=1)
    top = torch.cat(tuple(parts(packed[:, 8:], 2)), dim=1).float()
    scale = low.add_(top, alpha=16).mul_(half(blocks, 108))
    out.view(-1, 16, 16).mul_(scale.unsqueeze(-1))


def _k_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """d scale and dmin minimum of eight groups, float32 `[n, 8, 1]` each, from `d:2 dmin:2 scales:12`.

    The six-bit scales A-H and minima a-h, with each letter standing for one of their bits, are

        bytes 0-3   EEAAAAAA FFBBBBBB GGCCCCCC HHDDDDDD
        bytes 4-7   eeaaaaaa ffbbbbbb ggcccccc hhdddddd
        bytes 8-11  eeeeEEEE ffffFFFF ggggGGGG hhhhHHHH

    Four bytes are worked at a time, as a word.
    """
    words = field(blocks, 4, 12, torch.int32)
    first = words[:, :2]  # of scales, of minima
    low = fields_at(words[:, 2], range(0, 8, 4), 0x0F0F0F0F)
    unpacked = torch.empty((2, len(blocks), 2), dtype=torch.int32, device=blocks.device)
    unpacked[:, :, 0] = (first & 0x3F3F3F3F).t()
    unpacked[:, :, 1] = (first >> 2).bitwise_and_(0x30303030).bitwise_or_(low).t()
    factors = field(blocks, 0, 4, torch.float16).float().t()
    scale, minimum = unpacked.view(torch.uint8).float().mul_(factors.unsqueeze(-1)).unsqueeze(-1)
    return scale, minimum


@dequantises(GGMLType.Q4_K)
def q4_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`d:2 dmin:2 scales:12 qs:128`. Eight groups g of 32: d scale[g] q - dmin minimum[g].

    Each 32 bytes of qs hold two groups: the low nibbles, then the high ones.
    """
    scale, minimum = _k_scales(blocks)
    groups = out.view(-1, 8, 32)
    for parity, q in enumerate(nibbles(blocks[:, 16:])):
        torch.mul(q.view(-1, 4, 32), scale[:, parity::2], out=groups[:, parity::2])
    groups.sub_(minimum)


@dequantises(GGMLType.Q5_K)
def q5_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`d:2 dmin:2 scales:12 qh:32 qs:128`. As Q4_K; bit g of qh[l] is the fifth bit of element l of group g."""
    scale, minimum = _k_scales(blocks)
    qs, qh = blocks[:, 48:], field(blocks, 16, 32)
    fifth = torch.cat(tuple(qh >> shift for shift in (0, 2, 4, 6)), dim=1)  # bits 0 and 1, laid out as qs
    groups = out.view(-1, 8, 32)
    for parity, q in enumerate((qs & 15, qs >> 4)):
        q.add_((fifth >> parity).bitwise_and_(1), alpha=16)
        torch.mul(q.float().view(-1, 4, 32), scale[:, parity::2], out=groups[:, parity::2])
    groups.sub_(minimum)


@dequantises(GGMLType.Q6_K)
def q6_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`ql:128 qh:64 scales:16 d:2`. 16 groups g of 16: d scales[g] (q - 32), scales signed bytes.

    Each half of 128 elements has 64 bytes of ql and 32 of qh. The low four bits of q are the 64 low nibbles,
    then the 64 high ones; the high two are bits 0-1 of the 32 bytes, then bits 2-3, 4-5, 6-7.
    """
    top = [part.view(-1, 32) for part in parts(blocks[:, 128:192], 2)]
    halves = out.view(-1, 2, 64)
    for nibble, q in enumerate((blocks[:, :128] & 15, blocks[:, :128] >> 4)):
        q.add_(torch.cat(top[2 * nibble : 2 * nibble + 2], dim=1).view(-1, 128), alpha=16).sub_(32)
        halves[:, nibble].copy_(q.view(torch.int8).view(-1, 64))
    scale = field(blocks, 192, 16, torch.int8).float().mul_(half(blocks, 208))
    out.view(-1, 16, 16).mul_(scale.unsqueeze(-1))


@dequantises(GGMLType.TQ1_0)
def tq1_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`qs:48 qh:4 d:2`. d (t - 1), t a digit 0-2; a byte is a fraction of 256 and holds its digits in base three.

    Digit k is the integer part of 3 x / 256, where x is the byte times 3^k modulo 256: 0 below 86, 1 below 171,
    else 2. Order: digits 0 of qs[0:32], digits 1, ... digits 4; the same of qs[32:48]; digits 0-3 of qh.
    """
    digits, rest = [], blocks
    for _ in range(5):
        digits.append((rest >= 86).view(torch.int8).add_((rest >= 171).view(torch.int8)).sub_(1))
        rest = rest * 3
    fields = ((0, 32, 5), (32, 48, 5), (48, 52, 4))
    pieces = [digits[k][:, first:last] for first, last, count in fields for k in range(count)]
    out.copy_(torch.cat(pieces, dim=1))
    out.mul_(half(blocks, 52))


@dequantises(GGMLType.TQ2_0)
def tq2_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`qs:64 d:2`. d (q - 1), two bits each in the order of Q2_K."""
    runs = out.view(-1, 4, 32)
    for run, q in enumerate(parts(blocks[:, :64], 2)):
        runs[:, run].copy_(q.sub_(1).view(torch.int8).view(-1, 32))
    out.mul_(half(blocks, 64))
