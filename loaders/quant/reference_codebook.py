"""Dequantisers of the types that look their values up: IQ*, MXFP4, NVFP4.

Docstrings as in reference_linear. Words (`u16`, `u32`) are little-endian. The code books of the IQ types are
those of ggml-common.h; they are taken from the `gguf` package, which is imported when the first such tensor
is met, not with this module (it costs a noticeable part of a second).

Tables are one-dimensional, one entry a code book row: eight int8 values in an int64, four in an int32, so a
gather moves a row at a time. They are constants of the formats and kept for every device that used them: all
together are 56 kB, and 16 kB more on the CPU.
"""

from __future__ import annotations

from functools import cache

import torch

from ..gguf.types import GGMLType
from .block_fields import bit_table, dequantises, field, fields_at, half, look_up

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # kvalues_iq4nl


@cache
def _grid(name: str, device: torch.device) -> torch.Tensor:
    """Code book of type `name`, an int64 or int32 for each row of eight or four int8 values."""
    from gguf import quants

    source = getattr(quants, name)
    source.init_grid()
    rows = torch.from_numpy(source.grid).reshape(source.grid_shape).to(torch.int8)
    return rows.view(torch.int64 if source.grid_shape[1] == 8 else torch.int32).flatten().to(device)


@cache
def _shifted_grid(device: torch.device) -> torch.Tensor:
    """IQ1's code book in eighths, first with its rows an eighth up, then an eighth down: entry row + 2048 down."""
    rows = _grid("IQ1_S", torch.device("cpu")).view(torch.int8) * 8
    return torch.cat((rows + 1, rows - 1)).view(torch.int64).to(device)


@cache
def _signs(count: int, device: torch.device) -> torch.Tensor:
    """Eight +1 or -1 for each sign byte (`count` 256), or for each seven-bit index whose parity is bit 7 (128)."""
    byte = torch.arange(count, dtype=torch.int64)
    set_bits = fields_at(byte, range(8), 1)
    if count == 128:  # ksigns_iq2xs: an even number of minus signs
        set_bits[:, 7] = set_bits.sum(dim=1) % 2
    return (1 - 2 * set_bits).to(torch.int8).view(torch.int64).flatten().to(device)


@cache
def _pairs(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """For each byte the values of its nibbles: the low one's in bits 0-7 of an int16, the high one's in 8-15."""
    table = torch.tensor(values, dtype=torch.int8)
    byte = torch.arange(256)
    return torch.stack((table[byte & 15], table[byte >> 4]), dim=1).view(torch.int16).flatten().to(device)


@cache
def _ue4m3(device: torch.device) -> torch.Tensor:
    """Half the value of every FP8 E4M3 code, without regard to its sign bit; 0x7F stands for zero."""
    code = torch.arange(256)
    mantissa, exponent = code & 7, (code >> 3) & 15
    value = torch.where(exponent == 0, mantissa, (mantissa + 8) << (exponent - 1).clamp(min=0))  # times 2^9
    return value.masked_fill_(code == 0x7F, 0).float().mul_(2**-10).to(device)


def _look_up_nibbles(values: tuple[int, ...], packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of the low and of the high nibbles of `packed`, as float32 of its shape."""
    pairs = _pairs(values, packed.device).index_select(0, packed.reshape(-1).int()).view(packed.shape)
    return (pairs << 8).bitwise_right_shift_(8).float(), (pairs >> 8).float()


def _store(integers: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """out = scale x integers, `scale` of shape [n, groups]."""
    torch.mul(integers.float().view(*scale.shape, -1), scale.unsqueeze(-1), out=out.view(*scale.shape, -1))


def _nibble_scales(packed: torch.Tensor) -> torch.Tensor:
    """The nibbles of every byte, low first, as float32 `[n, 2 bytes]`."""
    return fields_at(packed, range(0, 8, 4), 15).flatten(1).float()


def _seven_bit_signs(aux: torch.Tensor) -> torch.Tensor:
    """Signs of the four seven-bit indices in bits 0-27 of every word."""
    return look_up(_signs(128, aux.device), fields_at(aux, range(0, 28, 7), 127))


@dequantises(GGMLType.IQ2_XXS)
def iq2_xxs(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`d:2 (rows:4 aux:u32) x 8`. Each 32 elements: four rows of eight, four sign indices, d (s + 1/2) / 4.

    aux: bits 0-27 the sign indices, seven bits each, bits 28-31 s.
    """
    words = field(blocks, 2, 64, torch.int32).view(-1, 8, 2)
    aux = words[..., 1]
    rows = words[..., :1].contiguous().view(torch.uint8)
    integers = look_up(_grid("IQ2_XXS", blocks.device), rows).mul_(_seven_bit_signs(aux))
    scale = (aux >> 28).bitwise_and_(15).float().add_(0.5).mul_(half(blocks, 0)).mul_(0.25)
    _store(integers, scale, out)


@dequantises(GGMLType.IQ2_XS)
def iq2_xs(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`d:2 qs:u16 x 32 scales:8`. Each 8 elements: row = q & 511, sign index = q >> 9; each 16: d (s + 1/2) / 4.

    The s are the nibbles of scales, low before high.
    """
    q = field(blocks, 2, 64, torch.int16).int()
    signs = look_up(_signs(128, blocks.device), (q >> 9).bitwise_and_(127))
    integers = look_up(_grid("IQ2_XS", blocks.device), q & 511).mul_(signs)
    scale = _nibble_scales(field(blocks, 66, 8)).add_(0.5).mul_(half(blocks, 0)).mul_(0.25)
    _store(integers, scale, out)


@dequantises(GGMLType.IQ2_S)
def iq2_s(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`d:2 qs:32 signs:32 qh:8 scales:8`. As IQ2_XS, but row = qs[i] and two bits of qh above it, and sign bytes."""
    rows = field(blocks, 2, 32).int()
    rows |= fields_at(field(blocks, 66, 8), range(0, 8, 2), 3).view(-1, 32).int() << 8
    signs = look_up(_signs(256, blocks.device), field(blocks, 34, 32))
    integers = look_up(_grid("IQ2_S", blocks.device), rows).mul_(signs)
    scale = _nibble_scales(field(blocks, 74, 8)).add_(0.5).mul_(half(blocks, 0)).mul_(0.25)
    _store(integers, scale, out)


@dequantises(GGMLType.IQ3_XXS)
def iq3_xxs(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`d:2 qs:64 aux:u32 x 8`. Each 4 elements a grid row qs[i]; aux as in IQ2_XXS; d (s + 1/2) / 2."""
    aux = field(blocks, 66, 32, torch.int32)
    rows = field(blocks, 2, 64)
    integers = look_up(_grid("IQ3_XXS", blocks.device), rows).mul_(_seven_bit_signs(aux))
    scale = (aux >> 28).bitwise_and_(15).float().add_(0.5).mul_(half(blocks, 0)).mul_(0.5)
    _store(integers, scale, out)


@dequantises(GGMLType.IQ3_S)
def iq3_s(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`d:2 qs:64 qh:8 signs:32 scales:4`. Row = qs[i] and a bit of qh above it; sign bytes; each 32: d (2 s + 1)."""
    rows = field(blocks, 2, 64).int()
    rows |= look_up(bit_table(blocks.device), field(blocks, 66, 8)).view(-1, 64).int() << 8
    signs = look_up(_signs(256, blocks.device), field(blocks, 74, 32))
    integers = look_up(_grid("IQ3_S", blocks.device), rows).mul_(signs)
    scale = _nibble_scales(field(blocks, 106, 4)).mul_(2).add_(1).mul_(half(blocks, 0))
    _store(integers, scale, out)


@dequantises(GGMLType.IQ1_S)
def iq1_s(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`d:2 qs:32 qh:u16 x 8`. Each 8 elements: row g of qs[i] and three bits of qh above it; d (2 s + 1) (g + delta).

    qh of 32 elements: bits 0-11 the four rows' high bits, 12-14 s, 15 whether delta is -1/8 or +1/8.
    """
    qh = field(blocks, 34, 16, torch.int16).int()
    rows = fields_at(qh, range(0, 12, 3), 7).bitwise_or_((qh >> 12).bitwise_and_(8).unsqueeze(-1)) << 8
    rows = rows.view(-1, 32).bitwise_or_(field(blocks, 2, 32))
    scale = (qh >> 12).bitwise_and_(7).mul_(2).add_(1).float().mul_(half(blocks, 0)).mul_(0.125)
    _store(look_up(_shifted_grid(blocks.device), rows), scale, out)


@dequantises(GGMLType.IQ1_M)
def iq1_m(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`qs:32 qh:16 scales:u16 x 4`. As IQ1_S, delta for each 8 elements, s for each 16.

    A nibble of qh: bits 0-2 the row's high bits, bit 3 delta's sign. A word of scales: four s of three bits,
    and in bits 12-15 a nibble of the half d, lowest first.
    """
    rows = fields_at(field(blocks, 32, 16), range(0, 8, 4), 15).view(-1, 32).int() << 8
    rows |= field(blocks, 0, 32)
    words = field(blocks, 48, 8, torch.int16).int()
    top = (words >> 12).bitwise_and_(15)
    d = (top[:, :1] | top[:, 1:2] << 4 | top[:, 2:3] << 8 | top[:, 3:] << 12).to(torch.int16).view(torch.float16)
    scale = fields_at(words, range(0, 12, 3), 7).flatten(1).mul_(2).add_(1).float().mul_(d.float()).mul_(0.125)
    _store(look_up(_shifted_grid(blocks.device), rows), scale, out)


@dequantises(GGMLType.IQ4_NL)
def iq4_nl(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`d:2 qs:16`. Nibbles as in Q4_0; d IQ4[q]."""
    scale = half(blocks, 0)
    low, high = _look_up_nibbles(IQ4, blocks[:, 2:])
    torch.mul(low, scale, out=out[:, :16])
    torch.mul(high, scale, out=out[:, 16:])


@dequantises(GGMLType.IQ4_XS)
def iq4_xs(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`d:2 scales_h:u16 scales_l:4 qs:128`. Eight groups g of 32, 16 bytes each as in IQ4_NL: d (s - 32) IQ4[q].

    s is nibble g of scales_l with bits 2g and 2g + 1 of scales_h above it.
    """
    n = len(blocks)
    top = fields_at(field(blocks, 2, 2, torch.int16).int().view(n), range(0, 16, 2), 3).float()
    scale = _nibble_scales(blocks[:, 4:8]).sub_(32).add_(top, alpha=16).mul_(half(blocks, 0)).unsqueeze(-1)
    groups = out.view(n, 8, 2, 16)
    for part, values in enumerate(_look_up_nibbles(IQ4, blocks[:, 8:])):
        torch.mul(values.view(n, 8, 16), scale, out=groups[:, :, part])


def _e2m1(q: torch.Tensor) -> torch.Tensor:
    """Twice the FP4 values of nibbles `q`, int8: 0 1 2 3 4 6 8 12 and, from q = 8 on, their negatives (0 stays 0)."""
    magnitude = (q & 7).view(torch.int8)
    steeper = (magnitude - 4).clamp_min_(0)  # from 4 on steps are 2
    steepest = (magnitude - 6).clamp_min_(0)  # from 8 on they are 4
    sign = (q >> 3).view(torch.int8).mul_(-2).add_(1)
    return magnitude.add_(steeper).add_(steepest, alpha=2).mul_(sign)


@dequantises(GGMLType.MXFP4)
def mxfp4(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`e:1 qs:16`. Nibbles as in Q4_0; 2^(e - 128) E2M1[q], where E2M1 is the doubled FP4 table (e is E8M0).

    2^-127 and 2^-128 are subnormal in float32, so their bits are made by hand.
    """
    e = blocks[:, :1].int()
    scale = torch.where(e < 2, 0x200000 << e, (e - 1) << 23).view(torch.float32)
    torch.mul(_e2m1(blocks & 15).float()[:, 1:], scale, out=out[:, :16])
    torch.mul(_e2m1(blocks >> 4).float()[:, 1:], scale, out=out[:, 16:])


@dequantises(GGMLType.NVFP4)
def nvfp4(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """`scales:4 qs:32`. Four groups of 16, 8 bytes each, low nibbles first: UE4M3(scale) / 2 x E2M1[q].

    UE4M3 is FP8 E4M3 whose sign bit ggml ignores.
    """
    scale = _ue4m3(blocks.device).index_select(0, blocks[:, :4].reshape(-1).int()).view(-1, 4)
    words = field(blocks, 4, 32, torch.int64)  # a group each
    q = torch.stack((words, words >> 4), dim=-1).bitwise_and_(0x0F0F0F0F0F0F0F0F).view(torch.uint8)
    _store(_e2m1(q), scale, out)
