"""Quantisers of the types whose codes are rows of a code book: IQ1, IQ2 and IQ3.

A row stands for eight or four values at once: magnitudes of three to eight levels (IQ2, IQ3; the signs are stored
apart), or -1, 0 and 1, all shifted by an eighth up or down (IQ1). Of all combinations of levels the book has a part
only, so the nearest row has to be looked for, in two ways:

* While scales are tried, every value goes to its nearest level, and a table says for each combination of levels (3^8
  or 8^4) which row is nearest to it. A gather for eight values, and near enough to compare scales by.
* At the end the exact nearest row: the largest of x . row - |row|^2 / 2 over all rows, as a matrix product.

llama.cpp (ggml-quants.c, quantize_row_iq*_impl) finds rows among the neighbours of a combination instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from ..gguf.types import GGMLType
from .quantize_search import Codes, best_scale, inverse, refit, shared_scale, steps
from .quantize_table import half_bytes, pack_bits, pack_nibbles, quantises, word_bytes
from .reference_codebook import _grid

CPU_PRODUCTS = 1 << 21  # products of a matrix multiplication held at a time, 8 MB
DEVICE_PRODUCTS = 1 << 26


class Book(NamedTuple):
    """A code book on a device, in units of a block's half times (2 s + 1), where s is a group's small integer."""

    rows: torch.Tensor  # [rows, width]
    half_squares: torch.Tensor  # [rows], |row|^2 / 2
    nearest: torch.Tensor  # [levels ^ width, width], the row nearest to each combination of levels
    weights: torch.Tensor  # [width], what a level of each place counts in the number of a combination
    first: float  # the lowest level
    step: float  # between levels, about
    levels: int


@cache
def _book(name: str, unit: int, device: torch.device) -> Book:
    """The book of type `name`, its integers divided by `unit`."""
    packed = _grid(name, torch.device("cpu"))
    width = packed.element_size()
    rows = packed.view(torch.int8).view(-1, width).float() / unit
    values = rows.unique()
    levels = len(values)
    weights = levels ** torch.arange(width)
    combinations = values[torch.arange(levels**width).unsqueeze(1) // weights % levels]
    half_squares = rows.square().sum(-1) / 2
    nearest = rows[_nearest(combinations, rows, half_squares)[1]]
    step = float(values[-1] - values[0]) / (levels - 1)
    return Book(
        rows.to(device),
        half_squares.to(device),
        nearest.to(device),
        weights.float().to(device),
        first=float(values[0]),
        step=step,
        levels=levels,
    )


def _nearest(x: torch.Tensor, rows: torch.Tensor, half_squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How near the nearest row is to each x [n, width] (the larger, the nearer) and its number, int64."""
    products = CPU_PRODUCTS if x.device.type == "cpu" else DEVICE_PRODUCTS
    pieces = x.split(max(1, products // len(rows)))
    found = [torch.addmm(half_squares, piece, rows.t(), beta=-1).max(dim=-1) for piece in pieces]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def _by_table(book: Book, x: torch.Tensor) -> torch.Tensor:
    """The rows that the table gives for x [groups, size], in its shape."""
    level = x.sub(book.first).mul_(1 / book.step).round_().clamp_(0, book.levels - 1)
    number = level.view(-1, len(book.weights)).mul_(book.weights).sum(-1).int()  # no product of matrices: exact
    return book.nearest.index_select(0, number).view(x.shape)


def _odd(top: int) -> Codes:
    """The nearest of 1, 3, 5, ... 2 top + 1."""
    return lambda x: x.sub(1).div_(2).round_().clamp_(0, top).mul_(2).add_(1)


# --- magnitudes and signs


@dataclass(frozen=True)
class Magnitudes:
    """What tells the IQ2 and IQ3 types apart."""

    unit: int  # what the book's integers are divided by
    group: int  # values that share a small integer s
    even: bool  # signs are stored in seven bits for eight: an even number of minus signs
    tops: tuple[float, ...]  # as what the largest magnitude of a group is tried, in units of the book's largest


_IQ2 = steps(0.8, 1.2, 9)
_IQ3 = steps(0.8, 1.15, 10)
MAGNITUDES = {
    GGMLType.IQ2_XXS: Magnitudes(8, 32, True, _IQ2),
    GGMLType.IQ2_XS: Magnitudes(8, 16, True, _IQ2),
    GGMLType.IQ2_S: Magnitudes(8, 16, False, _IQ2),
    GGMLType.IQ3_XXS: Magnitudes(4, 32, True, _IQ3),
    GGMLType.IQ3_S: Magnitudes(1, 32, False, _IQ3),
}


def _split_signs(x: torch.Tensor, even: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Magnitudes [n, 256] and sign bytes [n, 32]. Where the number of minus signs must be even and is not, the smallest
    of the eight gets the wrong sign: its magnitude is negative."""
    eights = x.view(len(x), -1, 8)
    negative, magnitude = eights < 0, eights.abs()
    if even:
        odd = negative.sum(-1, keepdim=True) % 2 == 1
        smallest = torch.zeros_like(negative).scatter_(-1, magnitude.argmin(-1, keepdim=True), True)
        turned = smallest & odd
        negative = negative ^ turned
        magnitude = torch.where(turned, -magnitude, magnitude)
    return magnitude.flatten(1), pack_bits(negative.to(torch.uint8))


class Coded(NamedTuple):
    """256 values a row, as a type of MAGNITUDES stores them: [n, ...]."""

    d: torch.Tensor  # bytes of the half, uint8 [n, 2]
    s: torch.Tensor  # small integers, int64 [n, groups]
    rows: torch.Tensor  # numbers of rows, int64 [n, 256 / width]
    signs: torch.Tensor  # uint8 [n, 32]


def _coded(x: torch.Tensor, ggml_type: GGMLType) -> Coded:
    kind = MAGNITUDES[ggml_type]
    book = _book(ggml_type.name, kind.unit, x.device)
    magnitude, signs = _split_signs(x, kind.even)
    top = float(book.first + book.step * (book.levels - 1))
    tops = tuple(top * part for part in kind.tops)
    groups = magnitude.view(-1, kind.group)
    scale, weight = best_scale(groups, lambda v: _by_table(book, v), tops)
    shape = (len(x), -1)
    d, level = shared_scale(scale.view(shape), weight.view(shape), _odd(15), steps(28, 34, 5))
    units = magnitude.view(len(x), -1, kind.group) * inverse(d * level).unsqueeze(-1)
    rows = _nearest(units.view(-1, book.rows.shape[1]), book.rows, book.half_squares)[1]
    y = book.rows[rows].view(units.shape) * level.unsqueeze(-1)
    d = refit(magnitude, y.flatten(1), d)
    return Coded(half_bytes(d), (level.long() - 1) // 2, rows.view(shape), signs)


def _signs_and_scale(coded: Coded) -> torch.Tensor:
    """Words of four seven-bit signs and, above them, four bits of scale: int64 [n, 8]."""
    places = torch.arange(0, 28, 7, device=coded.signs.device)
    signs = ((coded.signs.long() & 127).view(-1, 8, 4) << places).sum(-1)
    return signs | coded.s << 28


def _low(rows: torch.Tensor) -> torch.Tensor:
    return (rows & 255).to(torch.uint8)


def _scale_nibbles(s: torch.Tensor) -> torch.Tensor:
    return pack_nibbles(s[:, ::2].to(torch.uint8), s[:, 1::2].to(torch.uint8))


@quantises(GGMLType.IQ2_XXS)
def iq2_xxs(x: torch.Tensor) -> torch.Tensor:
    coded = _coded(x, GGMLType.IQ2_XXS)
    aux = word_bytes(_signs_and_scale(coded), 4).view(-1, 8, 4)
    return torch.cat((coded.d, torch.cat((_low(coded.rows).view(-1, 8, 4), aux), dim=-1).flatten(1)), dim=1)


@quantises(GGMLType.IQ2_XS)
def iq2_xs(x: torch.Tensor) -> torch.Tensor:
    coded = _coded(x, GGMLType.IQ2_XS)
    words = coded.rows | (coded.signs.long() & 127) << 9
    return torch.cat((coded.d, word_bytes(words, 2), _scale_nibbles(coded.s)), dim=1)


@quantises(GGMLType.IQ2_S)
def iq2_s(x: torch.Tensor) -> torch.Tensor:
    coded = _coded(x, GGMLType.IQ2_S)
    places = torch.arange(0, 8, 2, device=x.device)
    top = ((coded.rows >> 8).view(-1, 8, 4) << places).sum(-1).to(torch.uint8)
    return torch.cat((coded.d, _low(coded.rows), coded.signs, top, _scale_nibbles(coded.s)), dim=1)


@quantises(GGMLType.IQ3_XXS)
def iq3_xxs(x: torch.Tensor) -> torch.Tensor:
    coded = _coded(x, GGMLType.IQ3_XXS)
    return torch.cat((coded.d, _low(coded.rows), word_bytes(_signs_and_scale(coded), 4)), dim=1)


@quantises(GGMLType.IQ3_S)
def iq3_s(x: torch.Tensor) -> torch.Tensor:
    coded = _coded(x, GGMLType.IQ3_S)
    top = pack_bits((coded.rows >> 8).to(torch.uint8).view(-1, 8, 8))
    return torch.cat((coded.d, _low(coded.rows), top, coded.signs, _scale_nibbles(coded.s)), dim=1)


# --- -1, 0, 1 and a shift

SHIFT = 1 / 8
_IQ1_TOPS = steps(0.6, 1.1, 8)  # a group's root mean square in units of the scale


def _shifted_by_table(book: Book, sharing: int) -> Codes:
    """Rows by the table, all of `sharing` values shifted up or all down, whichever is nearer."""

    def codes(x: torch.Tensor) -> torch.Tensor:
        x = x.view(-1, sharing)
        up, down = (_by_table(book, x - shift).add_(shift) for shift in (SHIFT, -SHIFT))
        up_is_nearer = (up - x).square_().sum(-1, keepdim=True) < (down - x).square_().sum(-1, keepdim=True)
        return torch.where(up_is_nearer, up, down)

    return codes


def _one_bit(x: torch.Tensor, group: int, sharing: int) -> tuple[torch.Tensor, ...]:
    """Half [n, 1], s [n, groups], numbers of rows [n, 32] and whether each is shifted down, for one block a row.

    Args:
        group: values that share an s.
        sharing: values that share a shift.
    """
    book = _book("IQ1_S", 1, x.device)
    by_table = _shifted_by_table(book, sharing)
    groups = x.view(-1, group)
    reach = groups.square().mean(-1, keepdim=True).sqrt()
    scale, weight = best_scale(groups, lambda v: by_table(v).view(v.shape), _IQ1_TOPS, reach)
    shape = (len(x), -1)
    d, level = shared_scale(scale.view(shape), weight.view(shape), _odd(7), steps(13, 17, 5))
    units = (x.view(len(x), -1, group) * inverse(d * level).unsqueeze(-1)).view(-1, 8)
    scores, numbers = [], []
    for shift in (SHIFT, -SHIFT):
        rows = book.rows + shift
        score, number = _nearest(units, rows, rows.square().sum(-1) / 2)
        scores.append(score.view(-1, sharing // 8).sum(-1))
        numbers.append(number)
    down = (scores[1] > scores[0]).repeat_interleave(sharing // 8)
    rows = torch.where(down, numbers[1], numbers[0])
    shift_of = torch.where(down, -SHIFT, SHIFT).unsqueeze(-1)
    y = (book.rows[rows] + shift_of).view(len(x), -1, group) * level.unsqueeze(-1)
    d = refit(x, y.flatten(1), d)
    return d, (level.long() - 1) // 2, rows.view(shape), down.view(shape).long()


@quantises(GGMLType.IQ1_S)
def iq1_s(x: torch.Tensor) -> torch.Tensor:
    d, s, rows, down = _one_bit(x, group=32, sharing=32)
    places = torch.arange(0, 12, 3, device=x.device)
    words = ((rows >> 8).view(-1, 8, 4) << places).sum(-1) | s << 12 | down[:, ::4] << 15
    return torch.cat((half_bytes(d), _low(rows), word_bytes(words, 2)), dim=1)


@quantises(GGMLType.IQ1_M)
def iq1_m(x: torch.Tensor) -> torch.Tensor:
    """The half is not stored in one place: each of four words has four of its bits above four s."""
    d, s, rows, down = _one_bit(x, group=16, sharing=8)
    nibbles = (rows >> 8 | down << 3).to(torch.uint8)
    places = torch.arange(0, 12, 3, device=x.device)
    half = d.half().view(torch.int16).long()
    quarters = half >> torch.arange(0, 16, 4, device=x.device) & 15
    words = (s.view(-1, 4, 4) << places).sum(-1) | quarters << 12
    return torch.cat((_low(rows), pack_nibbles(nibbles[:, ::2], nibbles[:, 1::2]), word_bytes(words, 2)), dim=1)
