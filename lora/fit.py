"""Whether an adapter changes as many elements as a weight has, told from the shapes of its tensors.

ComfyUI finds out when it uses the weight: it logs an error, at every step where patches run at use, and the picture is
one without the adapter. What each kind adds to a weight follows from `comfy/weight_adapter`, where the sums are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from comfy.weight_adapter import BOFTAdapter, GLoRAAdapter, LoHaAdapter, LoKrAdapter, LoRAAdapter, OFTAdapter

Matrix = torch.Tensor | None


def fits(patch: Any, target: Any, shape: Sequence[int]) -> bool:
    """Whether the host can apply `patch`; True for kinds that are not known here.

    Args:
        target: as in the host's maps: a name, or (name, (dimension, start, length) or None, ...).
        shape: the weight's, all of it.
    """
    if not isinstance(target, str) and target[1] is not None:
        dim, _, length = target[1]
        shape = (*shape[:dim], length, *shape[dim + 1 :])
    if isinstance(patch, tuple) and patch[0] in ("diff", "set") and len(patch[1]) == 1:
        return tuple(patch[1][0].shape) == tuple(shape)
    check = _KINDS.get(type(patch))
    if check is None:
        return True
    try:
        return check(patch.weights, shape)
    except (AttributeError, IndexError, TypeError):  # a tensor is missing, or has too few dimensions
        return False


def _lora(weights: Sequence[Any], shape: Sequence[int]) -> bool:
    up, down, _, mid, _, reshape = weights
    if reshape is not None:
        return True  # the weight becomes what it needs
    kernel = mid.shape[2:] if mid is not None else ()
    return up[0].numel() == down.shape[0] and up.shape[0] * down[0].numel() * prod(kernel) == prod(shape)


def _loha(weights: Sequence[Any], shape: Sequence[int]) -> bool:
    w1_a, w1_b, _, w2_a, w2_b, t1, t2, _ = weights
    return _product(w1_a, w1_b, t1) == _product(w2_a, w2_b, t2) == prod(shape)


def _lokr(weights: Sequence[Any], shape: Sequence[int]) -> bool:
    w1, w2, _, w1_a, w1_b, w2_a, w2_b, t2, _ = weights
    first = w1.numel() if w1 is not None else _product(w1_a, w1_b, None)
    second = w2.numel() if w2 is not None else _product(w2_a, w2_b, t2)
    return first * second == prod(shape)


def _glora(weights: Sequence[Any], shape: Sequence[int]) -> bool:
    _, _, b1, b2, _, _ = weights  # the newer form is b1 b2, the older b2 b1
    return prod(shape) in (b1.shape[0] * b2[0].numel(), b2.shape[0] * b1[0].numel())


def _oft(weights: Sequence[Any], shape: Sequence[int]) -> bool:
    blocks, size = weights[0].shape[-3:-1]  # of rows; BOFT has several such layers
    return blocks * size == shape[0]


def _product(a: torch.Tensor, b: torch.Tensor, core: Matrix) -> int:
    """Elements of a b, or of what the Tucker core [i, j, ...] makes of a [i, rows] and b [j, columns]."""
    if core is None:
        return a.shape[0] * b.shape[1] if a.shape[1] == b.shape[0] else 0
    return a.shape[1] * b.shape[1] * prod(core.shape[2:]) if core.shape[:2] == (a.shape[0], b.shape[0]) else 0


_KINDS: dict[type, Callable[[Sequence[Any], Sequence[int]], bool]] = {
    LoRAAdapter: _lora,
    LoHaAdapter: _loha,
    LoKrAdapter: _lokr,
    GLoRAAdapter: _glora,
    OFTAdapter: _oft,
    BOFTAdapter: _oft,
}
