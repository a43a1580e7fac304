"""The operators that a compiler traces: their declarations are true, and their numbers those of the functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from block_bytes import random_blocks
from pack.loaders.gguf.types import BLOCKS, GGMLType
from pack.loaders.quant import dispatch
from pack.loaders.quant.dispatch import dequantize_op, linear_of_few_op

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
SHAPE = (64, 512)


def data(device: str, ggml_type: GGMLType) -> torch.Tensor:
    count = SHAPE[0] * SHAPE[1] // BLOCKS[ggml_type].elements
    blocks = random_blocks(ggml_type, count, np.random.default_rng(3), specials=False)
    return torch.from_numpy(blocks.reshape(SHAPE[0], -1)).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_declarations_are_true(device: str, dtype: torch.dtype) -> None:
    blocks = data(device, GGMLType.Q4_K)
    x, bias = torch.randn(1, 2, SHAPE[1], device=device, dtype=dtype), torch.randn(SHAPE[0], device=device, dtype=dtype)
    torch.library.opcheck(dequantize_op, (blocks, int(GGMLType.Q4_K), SHAPE, dtype))
    for given in (bias, None):
        torch.library.opcheck(linear_of_few_op, (x, blocks, int(GGMLType.Q4_K), SHAPE, given))


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_are_the_functions(device: str) -> None:
    blocks = data(device, GGMLType.Q8_0)
    x, bias = torch.randn(2, SHAPE[1], device=device), torch.randn(SHAPE[0], device=device)
    dense = dispatch.dequantize(blocks, GGMLType.Q8_0, SHAPE, torch.float32)
    assert torch.equal(dequantize_op(blocks, int(GGMLType.Q8_0), SHAPE, torch.float32), dense)
    expected = dispatch.linear_of_few(x, blocks, GGMLType.Q8_0, SHAPE, bias)
    if expected is None:  # nothing multiplies by blocks here
        expected = torch.nn.functional.linear(x, dense, bias)
    assert torch.equal(linear_of_few_op(x, blocks, int(GGMLType.Q8_0), SHAPE, bias), expected)
