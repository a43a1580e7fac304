"""Qwen 3.5's linear attention comes back from llama.cpp's order of heads, in every kind of storage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from block_bytes import random_blocks
from pack.loaders.gguf.types import BLOCKS, GGMLType
from pack.loaders.linear_attention import Heads, as_trained
from pack.loaders.quant.layout import dense, is_gguf, quantized

HEADS = Heads(keys=2, values=6, key_width=64, value_width=128)
ONE_EACH = Heads(keys=4, values=4, key_width=64, value_width=128)
HIDDEN = 256


def tiled(tensor: torch.Tensor, axis: int, heads: Heads = HEADS, before: int = 0) -> torch.Tensor:
    """What the converter does: the first value head of every key head, then the second, and so on."""
    head, tail = tensor.split([before, tensor.shape[axis] - before], axis)
    per_key = heads.values // heads.keys
    parts = tail.unflatten(axis, (heads.keys, per_key, -1)).transpose(axis, axis + 1)
    return torch.cat([head, parts.flatten(axis, axis + 2)], axis)


def stored(ggml_type: GGMLType, rows: int, columns: int) -> torch.Tensor:
    blocks = rows * columns // BLOCKS[ggml_type].elements
    data = random_blocks(ggml_type, blocks, np.random.default_rng(7), specials=False)
    return quantized(torch.from_numpy(data.reshape(-1)), ggml_type, (rows, columns))


TYPES = [GGMLType.Q8_0, GGMLType.Q4_0, GGMLType.Q4_K, GGMLType.Q6_K]


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize(
    ("part", "before", "rows"),
    [("in_proj_qkv.weight", 256, 256 + 768), ("in_proj_z.weight", 0, 768), ("in_proj_a.weight", 0, 6)],
)
def test_rows_come_back_as_blocks(part: str, before: int, rows: int, ggml_type: GGMLType) -> None:
    tensor = stored(ggml_type, rows, HIDDEN)
    found = as_trained(HEADS, part, tensor)
    assert is_gguf(found) and found._params.ggml_type is ggml_type
    assert torch.equal(tiled(dense(found, torch.float32), 0, before=before), dense(tensor, torch.float32))
    assert not torch.equal(dense(found, torch.float32), dense(tensor, torch.float32))


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_columns_come_back_as_blocks_where_a_head_is_whole_blocks(ggml_type: GGMLType) -> None:
    tensor = stored(ggml_type, HIDDEN, 768)
    found = as_trained(HEADS, "out_proj.weight", tensor)
    assert is_gguf(found) is (BLOCKS[ggml_type].elements <= HEADS.value_width)
    assert torch.equal(tiled(dense(found, torch.float32), 1), dense(tensor, torch.float32))


def test_what_is_plain_comes_back() -> None:
    random = torch.Generator().manual_seed(3)
    kernel = torch.randn(256 + 768, 1, 4, generator=random)
    assert torch.equal(as_trained(HEADS, "conv1d.weight", tiled(kernel[:, 0], 0, before=256)), kernel)
    bias = torch.randn(6, generator=random)
    assert torch.equal(as_trained(HEADS, "dt_bias", tiled(bias, 0)), bias)
    decay = torch.rand(6, generator=random) * 5 - 2
    found = as_trained(HEADS, "A_log", tiled(-torch.exp(decay), 0))
    # exp and log each err by a unit in the last place of what they give, and an error of exp is one of its argument.
    assert ((found - decay).abs() <= 2.0**-22 * (1 + decay.abs())).all()
    norm = torch.randn(128, generator=random)
    assert as_trained(HEADS, "norm.weight", norm) is norm


@pytest.mark.parametrize("part", ["in_proj_qkv.weight", "in_proj_z.weight", "out_proj.weight"])
def test_one_value_head_for_each_key_head_is_no_copy(part: str) -> None:
    rows, columns = {"in_proj_qkv.weight": (1024, HIDDEN), "in_proj_z.weight": (512, HIDDEN)}.get(part, (HIDDEN, 512))
    tensor = stored(GGMLType.Q4_K, rows, columns)
    assert as_trained(ONE_EACH, part, tensor) is tensor


def test_another_number_of_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(512, 256\), and 6 heads take 768"):
        as_trained(HEADS, "in_proj_z.weight", stored(GGMLType.Q8_0, 512, HIDDEN))


@pytest.mark.parametrize(
    "wrong", [{}, {"ssm.group_count": 0}, {"ssm.time_step_rank": 5}, {"ssm.inner_size": 100}, {"ssm.state_size": "64"}]
)
def test_metadata_that_contradicts_itself_names_no_heads(wrong: dict) -> None:
    sound = {"ssm.group_count": 2, "ssm.time_step_rank": 6, "ssm.state_size": 64, "ssm.inner_size": 768}
    assert Heads.of({f"qwen35.{key}": value for key, value in sound.items()}, "qwen35") == HEADS
    given = {f"qwen35.{key}": value for key, value in (sound | wrong).items()} if wrong else {}
    assert Heads.of(given, "qwen35") is None
