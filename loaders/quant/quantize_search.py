"""How the quantisers find scales: the common part of all block formats, as searches over rows of a matrix.

Every format says that a value is a scale times a code (times nothing, or plus an offset), where the codes of a group of
16 to 256 values come from a small set. With the codes given, the scale with the least squared error has a closed form;
with the scale given, the best codes are the nearest. So a search tries some scales around the one that makes the
largest value just representable, takes the nearest codes of each, solves for the scale, and keeps the best. A second
level, of scales that are themselves small integers times one half-precision factor, is fitted in the same way.

The least *squared* error of the weights is what is minimised throughout, each value counting the same: as long as
nothing is known of a layer's inputs, that is what the error of its output is proportional to. llama.cpp's own
quantisers (ggml-quants.c: make_qx_quants, make_qkx2_quants, make_qp_quants, which have the same two steps) weigh large
values more; `benchmarks/quantize_quality.py` compares the outcome by both measures.

All functions take float32 of shape [groups, size], work on any device, and never divide by zero: a group of zeros gets
the scale 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Codes = Callable[[torch.Tensor], torch.Tensor]  # values in units of the scale -> the nearest codes; may work in place

LARGEST_HALF, SMALLEST_HALF = 65504.0, 2.0**-24


def inverse(x: torch.Tensor) -> torch.Tensor:
    """1 / x, and 0 where x is 0 or so small that the quotient would be infinite."""
    return torch.where(x.abs() < 2**-126, 0.0, 1.0 / x)


def ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b == 0, 0.0, a / b)


def to_half(x: torch.Tensor) -> torch.Tensor:
    """`x` as the file will hold it: rounded to float16, back in float32, never infinite."""
    return x.clamp(-LARGEST_HALF, LARGEST_HALF).half().float()


def to_scale(x: torch.Tensor) -> torch.Tensor:
    """As `to_half`, but what is a little too small becomes the smallest: with it some codes are left, with 0 none."""
    magnitude = x.abs()
    small = (magnitude < SMALLEST_HALF) & (magnitude > SMALLEST_HALF / 16)
    return torch.where(small, x.sign() * SMALLEST_HALF, to_half(x))


def integers(low: int, high: int) -> Codes:
    """The nearest integers from `low` to `high`."""
    return lambda x: x.round_().clamp_(low, high)


def extreme(x: torch.Tensor) -> torch.Tensor:
    """The value of the largest magnitude in each group, with its sign: [groups, 1]."""
    low, high = x.aminmax(dim=-1, keepdim=True)
    return torch.where(-low > high, low, high)


def best_scale(
    x: torch.Tensor, codes: Codes, tops: Sequence[float], reach: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale of each group with which `codes` reproduce it best.

    Args:
        tops: what `reach` is tried as, in units of the scale.
        reach: a measure of each group, [groups, 1]; its extreme with its sign by default.

    Returns:
        scale and its weight, the sum of the squared codes (what an error of the scale costs): [groups, 1] each.
    """
    per_unit = inverse(extreme(x) if reach is None else reach)
    best = x.new_full((len(x), 1), -1.0)
    scale, weight = torch.zeros_like(best), torch.zeros_like(best)
    for top in tops:
        q = codes(x * (per_unit * top))
        squares = (q * q).sum(-1, keepdim=True)
        product = q.mul_(x).sum(-1, keepdim=True)
        fit = ratio(product, squares)
        gain = fit * product  # by how much less the squared error is than with all codes 0
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better, fit, scale)
        weight = torch.where(better, squares, weight)
    return scale, weight


def best_affine(
    x: torch.Tensor, top: int, tops: Sequence[float], offset_above_zero: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset of each group for codes 0 to `top`: x = scale q + offset.

    Args:
        tops: as which code the group's maximum is tried, the minimum being 0.
        offset_above_zero: whether the format can hold an offset above 0; else those groups get the offset 0.

    Returns:
        scale (0 or more) and offset: [groups, 1] each.
    """
    size = x.shape[-1]
    low, high = x.aminmax(dim=-1, keepdim=True)
    if not offset_above_zero:
        low = low.clamp(max=0)
    per_unit = inverse(high - low)
    total = x.sum(-1, keepdim=True)
    above = x - low
    best = x.new_full((len(x), 1), -1.0)
    scale, offset = torch.zeros_like(best), low.clone()
    for code in tops:
        q = (above * (per_unit * code)).round_().clamp_(0, top)
        n1, n2 = q.sum(-1, keepdim=True), (q * q).sum(-1, keepdim=True)
        product = q.mul_(x).sum(-1, keepdim=True)
        determinant = size * n2 - n1 * n1
        a = ratio(size * product - total * n1, determinant)
        b = ratio(n2 * total - n1 * product, determinant)
        sound = determinant > 0
        if not offset_above_zero:
            without = (b > 0) | ~sound
            a = torch.where(without, ratio(product, n2), a)
            b = torch.where(without, 0.0, b)
            sound = n2 > 0
        gain = a * product + b * total
        better = (gain > best) & sound & (a >= 0)
        best = torch.where(better, gain, best)
        scale = torch.where(better, a, scale)
        offset = torch.where(better, b, offset)
    return scale, offset


def shared_scale(
    scales: torch.Tensor, weights: torch.Tensor, codes: Codes, tops: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the scales of a block's groups, [blocks, groups], as codes times one factor that the file holds as a half.

    Returns:
        factor [blocks, 1], rounded to a half; codes [blocks, groups].
    """
    root = weights.sqrt()
    per_unit = inverse(extreme(scales))
    best = scales.new_full((len(scales), 1), float("inf"))
    factor = torch.zeros_like(best)
    for top in tops:
        q = codes(scales * (per_unit * top))
        fit = ratio((weights * q * scales).sum(-1, keepdim=True), (weights * q * q).sum(-1, keepdim=True))
        error = ((scales - fit * q) * root).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        factor = torch.where(better, fit, factor)
    return _rounded(scales, root, codes, to_scale(factor))


def _rounded(
    scales: torch.Tensor, root: torch.Tensor, codes: Codes, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The half `factor` or the next larger one, and the codes. Small halves lie far apart, and what was rounded down
    may leave the largest scale out of reach."""
    larger = (
        (factor.half().view(torch.int16) + (factor != 0)).view(torch.float16).float().clamp(-LARGEST_HALF, LARGEST_HALF)
    )
    fits = [(half, codes(scales * inverse(half))) for half in (factor, larger)]
    errors = [((scales - half * q) * root).square_().sum(-1, keepdim=True) for half, q in fits]
    second = errors[1] < errors[0]
    return torch.where(second, larger, factor), torch.where(second, fits[1][1], fits[0][1])


def refit(x: torch.Tensor, y: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The factor of `y` [blocks, elements] that comes closest to `x`, as a half; `factor` where y is all zero."""
    squares = (y * y).sum(-1, keepdim=True)
    return torch.where(squares > 0, to_scale(ratio((x * y).sum(-1, keepdim=True), squares)), factor)


def steps(first: float, last: float, count: int) -> tuple[float, ...]:
    """`count` numbers from `first` to `last`, evenly."""
    return tuple(first + (last - first) * k / (count - 1) for k in range(count))
