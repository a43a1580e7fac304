"""A weight dequantised with a LoRA in it equals both in float64, for every type that the kernel takes.

Without a GPU it runs in Triton's interpreter, which truncates where it should round to bfloat16: float16 only.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from block_bytes import random_blocks
from pack.loaders.gguf.types import BLOCKS, QUANTISED, GGMLType
from pack.loaders.quant import reference

pytest.importorskip("triton", reason="Triton is not installed: its wheels are for Linux")
from test_kernels import DEVICE

with pytest.MonkeyPatch.context() as patch:
    # What @triton.jit makes of a kernel is decided when the kernel's module is imported.
    if DEVICE.type == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")
    from pack.loaders.quant.kernels import folded

DTYPES = [torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
TYPES = sorted(t for t in QUANTISED if folded.fits(t, (16, 512), torch.float16))


def weight(ggml_type: GGMLType, rows: int, columns: int) -> torch.Tensor:
    """Random blocks with small finite scales."""
    rng = np.random.default_rng(7)
    layout = BLOCKS[ggml_type]
    blocks = random_blocks(ggml_type, rows * columns // layout.elements, rng)
    data = torch.from_numpy(blocks.reshape(rows, -1).copy())
    values = reference.dequantize(data, ggml_type, (rows, columns), torch.float32)
    # Special scales are test_kernels' business; here whole blocks with one are replaced by the first that has none.
    by_block = values.view(-1, layout.elements)
    sound = (by_block.isfinite() & (by_block.abs() < 1000)).all(1)
    flat = data.view(-1, layout.nbytes)
    flat[~sound] = flat[int(sound.nonzero()[0])].clone()
    return flat.reshape(rows, -1)


def test_most_types_fit() -> None:
    assert set(QUANTISED) - set(TYPES) == {GGMLType.TQ1_0}
    assert not folded.fits(GGMLType.Q4_K, (16, 512), torch.float32)
    assert not folded.fits(GGMLType.Q8_0, (16, 288), torch.float16)


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "rank"), [(16, 16), (21, 5)])
def test_equals_the_reference_with_the_product(ggml_type, dtype, rows, rank) -> None:
    columns = 512
    data = weight(ggml_type, rows, columns)
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(rank, columns, generator=generator).to(dtype)
    b = torch.randn(rows, rank, generator=generator).to(dtype)
    plain = reference.dequantize(data, ggml_type, (rows, columns), torch.float32).double()
    exact = plain + b.double() @ a.double()
    out = torch.full((rows + 2, columns), 7.0, dtype=dtype, device=DEVICE)
    got = folded.dequantize(data.to(DEVICE), ggml_type, a.to(DEVICE), b.to(DEVICE), out[1:-1], rows=16, warps=4)
    assert (out[0] == 7).all() and (out[-1] == 7).all(), "wrote past its rows"
    # One rounding to the output's dtype, and float32 sums of `rank` products.
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 2**-20 * (b.double().abs() @ a.double().abs() + plain.abs())
    assert ((got.cpu().double() - exact).abs() <= bound + torch.finfo(dtype).tiny).all()


def test_products_of_some_rows_leave_the_others() -> None:
    """As a fused projection has them, in any order, with a gap between and after."""
    rows, columns = 48, 256
    data, generator = weight(GGMLType.Q4_K, rows, columns), torch.Generator().manual_seed(1)
    expected = reference.dequantize(data, GGMLType.Q4_K, (rows, columns), torch.float32).double()
    products = []
    for start, stop, rank in ((20, 36, 16), (0, 16, 3)):
        a, b = (torch.randn(shape, generator=generator).half() for shape in ((rank, columns), (stop - start, rank)))
        expected[start:stop] += b.double() @ a.double()
        products.append((slice(start, stop), a.to(DEVICE), b.to(DEVICE)))
    got = folded.dequantize_rows(data.to(DEVICE), GGMLType.Q4_K, (rows, columns), products).cpu().double()
    assert torch.allclose(got, expected, rtol=2**-10, atol=2**-9)
    plain = reference.dequantize(data, GGMLType.Q4_K, (rows, columns), torch.float16).double()
    assert torch.equal(got[16:20], plain[16:20]) and torch.equal(got[36:], plain[36:])


def test_shapes_that_do_not_fit_are_refused() -> None:
    data = weight(GGMLType.Q8_0, 16, 256).to(DEVICE)
    out = torch.empty(16, 256, dtype=torch.float16, device=DEVICE)
    a, b = (
        torch.empty(4, 256, dtype=torch.float16, device=DEVICE),
        torch.empty(16, 5, dtype=torch.float16, device=DEVICE),
    )
    with pytest.raises(ValueError, match="do not fit"):
        folded.dequantize(data, GGMLType.Q8_0, a, b, out)
