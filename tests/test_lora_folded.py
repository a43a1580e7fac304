"""A weight dequantised with a LoRA in it equals both in float64, for every type that the kernel takes.

Without a GPU it runs in Triton's interpreter, which truncates where it should round to bfloat16: float16 only.
"""

from __future__ import annotations

from functools import partial
from threading import Thread

import numpy as np
import pytest
import torch
from block_bytes import random_blocks
from pack.loaders.gguf.types import BLOCKS, QUANTISED, GGMLType
from pack.loaders.quant import dispatch, reference

pytest.importorskip("triton", reason="Triton is not installed: its wheels are for Linux")
from test_kernels import DEVICE

with pytest.MonkeyPatch.context() as patch:
    # What @triton.jit makes of a kernel is decided when the kernel's module is imported.
    if DEVICE.type == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")
    from pack.loaders.quant import kernels
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
@pytest.mark.parametrize(("rows", "rank"), [(64, 16), (80, 5)])
def test_equals_the_reference_with_the_product(ggml_type, dtype, rows, rank) -> None:
    columns = 512
    data = weight(ggml_type, rows, columns)
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(rank, columns, generator=generator).to(dtype)
    b = torch.randn(rows, rank, generator=generator).to(dtype)
    plain = reference.dequantize(data, ggml_type, (rows, columns), torch.float32).double()
    exact = plain + b.double() @ a.double()
    out = torch.full((rows + 2, columns), 7.0, dtype=dtype, device=DEVICE)
    got = folded.dequantize(data.to(DEVICE), ggml_type, a.to(DEVICE), b.to(DEVICE), out[1:-1])
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


@pytest.mark.parametrize(
    "cut", [folded.Cut(rows=16, warps=1), folded.Cut(rows=32, lanes=16, warps=2, programs=1)], ids=str
)
@pytest.mark.parametrize("ggml_type", [GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q8_0], ids=lambda t: t.name)
def test_the_cut_changes_nothing(ggml_type, cut) -> None:
    rows, columns, rank = 70, 512, 24
    data, generator = weight(ggml_type, rows, columns).to(DEVICE), torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=generator).half().to(DEVICE) for shape in ((rank, columns), (rows, rank)))
    expected, got = (torch.empty(rows, columns, dtype=torch.float16, device=DEVICE) for _ in range(2))
    folded.dequantize(data, ggml_type, a, b, expected)
    folded.dequantize(data, ggml_type, a, b, got, cut)
    # The sums of a product are taken in the order of its columns whatever the cut; only their number at a time differs.
    assert torch.allclose(got, expected, rtol=2**-10, atol=2**-10)


@pytest.mark.parametrize(("tiles", "programs"), [(1, 1), (5, 2), (48, 22), (336, 22), (7, 100)])
def test_programs_share_the_tiles(tiles: int, programs: int) -> None:
    step = folded._step(tiles, programs)
    most, fewest = -(-tiles // step), tiles // step
    assert 1 <= step <= min(tiles, programs)
    assert most - fewest <= 1
    assert most == -(-tiles // programs), "fewer programs and more for each"


def test_bound_gives_the_same_bits() -> None:
    """On a GPU; elsewhere nothing is bound."""
    rows, columns = 80, 512
    data, generator = weight(GGMLType.Q4_K, rows, columns).to(DEVICE), torch.Generator().manual_seed(1)
    products = []
    for start, stop, rank in ((0, 32, 8), (32, 64, 16)):
        a, b = (torch.randn(shape, generator=generator).half() for shape in ((rank, columns), (stop - start, rank)))
        products.append((slice(start, stop), a.to(DEVICE), b.to(DEVICE)))
    call = folded.bind(data, GGMLType.Q4_K, (rows, columns), products)
    assert (call is None) == (DEVICE.type != "cuda")
    if call is not None:
        expected = folded.dequantize_rows(data, GGMLType.Q4_K, (rows, columns), products)
        assert torch.equal(call(), expected)
        products[0][1].zero_()  # it uses the tensors and no copies of them
        assert not torch.equal(call(), expected)


@pytest.mark.parametrize("parts", [((0, 96, 24),), ((0, 32, 16), (32, 64, 16)), ((16, 48, 5), (64, 96, 64))], ids=str)
@pytest.mark.parametrize("ggml_type", [GGMLType.Q8_0, GGMLType.Q6_K, GGMLType.IQ4_XS], ids=lambda t: t.name)
def test_compiled_ahead_is_what_will_be_started(ggml_type: GGMLType, parts: tuple) -> None:
    """For bytes and factors as an allocator places them."""
    rows, columns, dtype = 96, 512, torch.float16
    data, out = weight(ggml_type, rows, columns).to(DEVICE), torch.empty(rows, columns, dtype=dtype, device=DEVICE)
    zeros = partial(torch.zeros, dtype=dtype, device=DEVICE)
    products = [(slice(first, end), zeros(rank, columns), zeros(end - first, rank)) for first, end, rank in parts]
    tensors = [data, out, *(factor for _, a, b in products for factor in (a, b))]
    assert not any(tensor.data_ptr() % 16 for tensor in tensors), "torch's allocator places them at multiples of 64"
    ranks = [(slice(start, stop), rank) for start, stop, rank in parts]
    stand_in, factors = folded.stand_ins(ggml_type, (rows, columns), dtype, ranks)
    ahead = folded._parts(stand_in, ggml_type, factors, out.to("meta"), data.device)
    started = folded._parts(data, ggml_type, products, out)
    assert len(started) >= len(parts)
    assert [call.variant for call in ahead] == [call.variant for call in started]
    assert [[t.dtype for t in call.args[:4]] for call in ahead] == [[t.dtype for t in c.args[:4]] for c in started]
    assert [call.options for call in ahead] == [call.options for call in started]


@pytest.mark.cuda
@pytest.mark.parametrize("ggml_type", [GGMLType.Q8_0, GGMLType.IQ4_XS], ids=lambda t: t.name)
def test_a_step_finds_what_was_compiled_ahead(ggml_type: GGMLType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it asks meanwhile: it waits, and nothing is compiled twice."""
    monkeypatch.setattr(folded.kept, "_kept", {})
    rows, columns, parts = 96, 512, [(slice(0, 32), 3), (slice(32, 64), 40)]
    shape = rows, columns
    data, generator = weight(ggml_type, *shape).to(DEVICE), torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half().to(DEVICE)

    products = [(own, random(rank, columns), random(32, rank)) for own, rank in parts]
    one = Thread(target=folded.compile_ahead, args=(ggml_type, shape, torch.float16, parts, data.device))
    one.start()
    got = folded.dequantize_rows(data, ggml_type, shape, products)
    one.join()
    assert folded.kept.count() == 3, "two ranks, and rows that have none"
    plain = reference.dequantize(data.cpu(), ggml_type, shape, torch.float32).double()
    for own, a, b in products:
        plain[own] += b.cpu().double() @ a.cpu().double()
    assert torch.allclose(got.cpu().double(), plain, rtol=2**-9, atol=2**-6)
    folded.compile_ahead(ggml_type, shape, torch.bfloat16, parts, data.device)
    assert folded.kept.count() == 6
    other = [(own, a.bfloat16(), b.bfloat16()) for own, a, b in products]
    folded.dequantize_rows(data, ggml_type, shape, other)
    assert folded.kept.count() == 6, "the step asked for another kernel"


def test_ranks_that_are_too_large_for_a_gpu_are_given_up_and_no_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One with little shared memory cannot compile the kernel for them."""
    rows, columns, kind, own = 16, 512, DEVICE.type, folded.dequantize_rows
    monkeypatch.setitem(dispatch._chosen, kind, (kernels, "triton"))
    monkeypatch.setattr(dispatch, "_too_large", {})

    def with_little_memory(data: torch.Tensor, ggml_type: GGMLType, shape: tuple, products: list) -> torch.Tensor:
        if max(len(a) for _, a, _ in products) > 16:
            raise RuntimeError("out of resource: shared memory")
        return own(data, ggml_type, shape, products)

    monkeypatch.setattr(folded, "dequantize_rows", with_little_memory)
    data = weight(GGMLType.Q4_K, rows, columns).to(DEVICE)

    def made(rank: int) -> torch.Tensor | None:
        a, b = torch.zeros(rank, columns, device=DEVICE).half(), torch.zeros(rows, rank, device=DEVICE).half()
        return dispatch.dequantize_with_products(data, GGMLType.Q4_K, (rows, columns), [(slice(0, rows), a, b)])

    def served(ggml_type: GGMLType = GGMLType.Q4_K) -> list[bool]:
        return [dispatch.adds_products(kind, ggml_type, (rows, columns), torch.float16, r) for r in (16, 32, 64, 128)]

    assert served() == [True] * 4
    assert made(64) is None and "from rank 64 on" in caplog.text and "shared memory" in caplog.text
    assert served() == [True, True, False, False]
    assert made(32) is None and made(16) is not None
    assert served() == [True, False, False, False]
    assert len(caplog.records) == 2 and made(128) is None, "told again"
    assert served(GGMLType.Q6_K) == [True] * 4
