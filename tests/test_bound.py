"""Calls bound to a weight that stays where it is: the same numbers as the calls that are not, at every repetition."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from block_bytes import random_blocks
from pack.loaders.gguf.types import BLOCKS, GGMLType
from pack.loaders.quant import dispatch
from pack.loaders.quant.bound import BoundWeight
from pack.loaders.quant.layout import quantized

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
SHAPE = (96, 512)


def made(device: str, ggml_type: GGMLType = GGMLType.Q4_K) -> tuple[BoundWeight, torch.Tensor, torch.Tensor]:
    """The bound weight, the same weight dense, and a bias."""
    rng = np.random.default_rng(7)
    count = SHAPE[0] * SHAPE[1] // BLOCKS[ggml_type].elements
    data = torch.from_numpy(random_blocks(ggml_type, count, rng, specials=False).reshape(-1)).to(device)
    weight = quantized(data, ggml_type, SHAPE)
    plain = dispatch.dequantize(data, ggml_type, SHAPE, torch.float32)
    return BoundWeight(weight, torch.float32), plain, torch.arange(SHAPE[0], device=device, dtype=torch.float32)


def unbound(bound: BoundWeight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    data, params = bound.weight._qdata, bound.weight._params
    few = dispatch.linear_of_few(x, data, params.ggml_type, params.orig_shape, bias)
    if few is not None:
        return few
    plain = dispatch.dequantize(data, params.ggml_type, params.orig_shape, x.dtype)
    return torch.nn.functional.linear(x, plain, bias)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ggml_type", [GGMLType.Q4_K, GGMLType.Q8_0])
def test_same_numbers_as_unbound(device: str, ggml_type: GGMLType) -> None:
    bound, plain, bias = made(device, ggml_type)
    for rows in (1, 3, 40, 1, 3, 40):
        for given in (bias, None, bias):
            x = torch.randn(rows, SHAPE[1], device=device)
            assert torch.equal(bound.linear(x, given), unbound(bound, x, given)), rows
    assert torch.equal(bound.dense(), plain) and bound.dense().data_ptr() != bound.weight._qdata.data_ptr()


@pytest.mark.parametrize("device", DEVICES)
def test_a_bias_that_is_written_over_or_replaced_counts(device: str) -> None:
    bound, _, bias = made(device)
    x = torch.randn(1, SHAPE[1], device=device)
    first = [bound.linear(x, bias) for _ in range(3)][-1]
    bias += 1000
    assert torch.equal(bound.linear(x, bias), unbound(bound, x, bias))
    assert torch.allclose(bound.linear(x, bias), first + 1000)
    other = bias - 2000
    assert torch.equal(bound.linear(x, other), unbound(bound, x, other))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_reach_the_input(device: str) -> None:
    bound, plain, bias = made(device)
    for rows in (1, 40):
        x = torch.randn(rows, SHAPE[1], device=device)
        bound.linear(x, bias)
        x.requires_grad_()
        bound.linear(x, bias).sum().backward()
        assert torch.allclose(x.grad, plain.sum(0).expand_as(x), rtol=1e-4, atol=1e-2)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
def test_every_dense_weight_is_a_new_one(device: str) -> None:
    bound, plain, _ = made(device)
    one, other = bound.dense(), bound.dense()
    one.zero_()
    assert torch.equal(other, plain)


@pytest.mark.parametrize("device", DEVICES)
def test_a_copied_layer_binds_for_itself(device: str) -> None:
    bound, _, bias = made(device)
    for _ in range(2):
        bound.linear(torch.randn(1, SHAPE[1], device=device), bias)
    bound.dense()
    assert copy.deepcopy({"layer": bound}) == {"layer": None}
