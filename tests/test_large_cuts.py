"""The configurations for large weights make the same bits, and the same products, as those for small ones do.

Which is taken depends on the size alone. Here all sizes are large, so that a few blocks show it.
"""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from block_bytes import random_blocks
from pack.loaders.gguf.types import BLOCKS, QUANTISED, GGMLType
from pack.loaders.quant import reference

pytest.importorskip("triton", reason="Triton is not installed: its wheels are for Linux")
from test_kernels import DEVICE, DTYPES, assert_same_bits, launch, placed
from test_skinny import check, multiply, numbers

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
quantised = pytest.mark.parametrize("ggml_type", sorted(QUANTISED), ids=lambda t: t.name)


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(os.environ.get("SLUICE_SEED") or random.SystemRandom().getrandbits(32))
    print(f"to repeat: SLUICE_SEED={seed}")  # pytest shows it when the test fails
    return np.random.default_rng(seed)


@quantised
def test_dequantised(ggml_type: GGMLType, rng, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two full programs and a part of one, enough blocks for each special scale once."""
    kernel = launch.KERNELS[ggml_type]
    monkeypatch.setattr(launch, "SMALL", 0)
    cuts, choose = [], launch.Kernel.cut

    def noted(kernel: launch.Kernel, elements: int) -> tuple[int, int]:
        cuts.append(choose(kernel, elements))
        return cuts[-1]

    monkeypatch.setattr(launch.Kernel, "cut", noted)
    blocks = max(2 * kernel.large[0] // kernel.per_block + 3, 26)
    data = placed(random_blocks(ggml_type, blocks, rng), 0)
    shape = (blocks, BLOCKS[ggml_type].elements)
    for dtype in DTYPES:
        want = reference.dequantize(data, ggml_type, shape, dtype)
        got = launch.dequantize(data, ggml_type, shape, dtype)
        assert got.device == DEVICE
        assert_same_bits(got, want)
    assert cuts and set(cuts) == {kernel.large}


@quantised
def test_multiplied(ggml_type: GGMLType, rng, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of rows that fills no program."""
    monkeypatch.setattr(multiply, "MANY_ROWS", 0)
    assert launch.KERNELS[ggml_type].skinny_rows > 1, "or both sizes have one cut"
    x = numbers(rng, 2, 512)
    check(x, ggml_type, 2 * launch.KERNELS[ggml_type].skinny_rows + 1, rng, launch.KERNELS[ggml_type])
