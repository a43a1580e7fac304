"""Multiplying by a quantised weight without dequantising it, against float64 products of the exact weight.

[Note: Tolerance]
A float32 sum of n products, in any order, each rounded at most twice, errs by at most gamma = (n + 2) 2^-24 times the
sum of the magnitudes that went into it. Those are |w| |x|, but where a type has a minimum, w = s q - m, the sums of
s q x and of m x are taken apart. A sub-block of 32 or 16 random q holds both a large and a small q, so that s q and m
are at most three times its largest |w|; to be safe that of the row is taken. Then the result is rounded to the type
of x, by at most 2^-8 (bfloat16), 2^-11 (float16) or 2^-24 of it, and float16 has its subnormals.
"""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from block_bytes import random_blocks
from pack.loaders.gguf.types import BLOCKS, QUANTISED, GGMLType
from pack.loaders.quant import reference

pytest.importorskip("triton", reason="Triton is not installed: its wheels are for Linux")

DEVICE = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

with pytest.MonkeyPatch.context() as patch:
    # What @triton.jit makes of a kernel is decided when the kernel's module is imported.
    if DEVICE.type == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")
    from pack.loaders.quant.kernels import launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
quantised = pytest.mark.parametrize("ggml_type", sorted(QUANTISED), ids=lambda t: t.name)


@pytest.fixture
def rng():
    seed = int(os.environ.get("SLUICE_SEED") or random.SystemRandom().getrandbits(32))
    print(f"to repeat: SLUICE_SEED={seed}")  # pytest shows it when the test fails
    return np.random.default_rng(seed)


def numbers(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(DEVICE)


def weight(ggml_type: GGMLType, shape: tuple[int, int], rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes, and the numbers they encode in float64. All blocks are ordinary: their scales finite."""
    blocks = random_blocks(ggml_type, shape[0] * shape[1] // BLOCKS[ggml_type].elements, rng, specials=False)
    data = torch.from_numpy(blocks.reshape(-1)).to(DEVICE)
    return data, reference.dequantize(data, ggml_type, shape, torch.float32).double()


def check(x: torch.Tensor, ggml_type: GGMLType, rows: int, rng: np.random.Generator) -> None:
    columns = x.shape[-1]
    data, w = weight(ggml_type, (rows, columns), rng)
    bias = numbers(rng, rows).to(x.dtype)
    got = launch.linear(x, data, ggml_type, (rows, columns), bias)
    assert got.dtype == x.dtype and got.shape == (*x.shape[:-1], rows)
    want = x.double() @ w.T + bias.double()
    magnitude = x.double().abs().sum(-1, keepdim=True) * 3 * w.abs().amax(1) + bias.double().abs()
    bound = (columns + 3) * 2.0**-24 * magnitude + ROUNDING[x.dtype] * want.abs() + 2.0**-25
    # Random scales make products that float16 cannot hold; next to its limit either side of it is right.
    limit = torch.finfo(x.dtype).max
    inside, outside = want.abs() < limit - bound, want.abs() > limit * (1 + ROUNDING[x.dtype]) + bound
    worst = ((got.double() - want).abs() / bound)[inside].max()
    assert worst < 1  # see [Note: Tolerance]
    assert got[outside].isinf().all() and inside.any()


@quantised
@pytest.mark.parametrize("m", [1, 3, 8])
def test_equals_the_exact_product(ggml_type, m, rng):
    """Five rows: not whole programs. Three and five superblocks: lanes are left over."""
    check(numbers(rng, m, 768 if m == 3 else 1280), ggml_type, 5, rng)


@quantised
def test_half_precision_input_of_any_rank(ggml_type, rng):
    check((numbers(rng, 2, 1, 512) / 256).to(torch.float16), ggml_type, 6, rng)  # no product overflows


@quantised
def test_nearer_than_the_weight_rounded_to_bfloat16(ggml_type, rng):
    """On random data; the types whose numbers bfloat16 holds exactly lose nothing by that rounding."""
    data, w = weight(ggml_type, (8, 512), rng)
    x = numbers(rng, 2, 512)
    want = x.double() @ w.T
    rounded = x.double() @ w.bfloat16().double().T
    error = (launch.linear(x, data, ggml_type, (8, 512)).double() - want).abs()
    if torch.equal(w.bfloat16().double(), w):
        assert ggml_type in (GGMLType.MXFP4, GGMLType.NVFP4)
    else:
        assert error.mean() < (rounded - want).abs().mean() / 100


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "TQ1_0"])
def test_bytes_at_any_address(name, offset, rng):
    ggml_type = GGMLType[name]
    data, _ = weight(ggml_type, (3, 256), rng)
    buffer = torch.empty(data.numel() + 32, dtype=torch.uint8, device=DEVICE)
    start = -buffer.data_ptr() % 16 + offset
    moved = buffer[start : start + data.numel()]
    moved.copy_(data)
    x = numbers(rng, 1, 256)
    assert torch.equal(launch.linear(x, moved, ggml_type, (3, 256)), launch.linear(x, data, ggml_type, (3, 256)))


def test_lanes_without_a_block_of_their_own_add_nothing(rng):
    """They repeat the last block of the row. Here it is infinite, in another row than the one looked at."""
    blocks = random_blocks(GGMLType.Q8_0, 2 * 3, rng, specials=False)
    blocks[5, :2] = (0x00, 0x7C)
    data = torch.from_numpy(blocks.reshape(-1)).to(DEVICE)
    y = launch.linear(numbers(rng, 1, 96), data, GGMLType.Q8_0, (2, 96))
    assert y[0, 0].isfinite() and not y[0, 1].isfinite()


def test_no_rows_make_no_rows(rng):
    data, _ = weight(GGMLType.Q4_K, (4, 256), rng)
    assert launch.linear(numbers(rng, 0, 256), data, GGMLType.Q4_K, (4, 256)).shape == (0, 4)


@pytest.mark.parametrize(
    ("x_shape", "bias_shape", "what"),
    [((9, 256), (4,), "9 rows"), ((1, 512), (4,), "x of shape"), ((1, 256), (5,), "bias")],
    ids=str,
)
def test_what_does_not_fit_is_refused(x_shape, bias_shape, what, rng):
    data, _ = weight(GGMLType.Q4_K, (4, 256), rng)
    with pytest.raises(ValueError, match=what):
        launch.linear(numbers(rng, *x_shape), data, GGMLType.Q4_K, (4, 256), numbers(rng, *bias_shape))


@pytest.mark.cuda
@quantised
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_layer_of_a_model(ggml_type, dtype, rng):
    """Twice, for the kept kernel's own path."""
    for m in (1, 2, 2, 7):
        check(numbers(rng, m, 3072).to(dtype), ggml_type, 6147, rng)
