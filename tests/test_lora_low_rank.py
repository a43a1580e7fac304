"""LoRA as two thin matrices: beside the product or folded into the weight, equal to the weight patched in float64."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from pack.loaders.gguf.types import GGMLType
from pack.loaders.low_rank import Adapter, Factors, FoldedWeight, nbytes, packed_bytes
from pack.loaders.quant.layout import quantized
from pack.loaders.sizes import ALIGN

CPU = torch.device("cpu")
N, K, ROWS = 48, 40, 7


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapters(kind: str) -> list[Adapter]:
    """One for all rows, several, and such as a fused projection of q, k and v has, with one for all rows."""
    ranks = {4: 1.0, 3: -0.5, 1: 0.0}
    whole = [Adapter(random(N, r, seed=r), random(r, K, seed=r + 50), scale) for r, scale in ranks.items()]
    thirds = [
        Adapter(random(N // 3, 2, seed=i), random(2, K, seed=i + 50), 0.25 * i, start=i * N // 3) for i in (2, 0, 1, 2)
    ]
    kinds = {"one": whole[:1], "several": whole, "parts": thirds, "parts and whole": [thirds[0], *whole, *thirds[1:]]}
    return kinds[kind]


def delta(found: list[Adapter]) -> torch.Tensor:
    total = torch.zeros(N, K, dtype=torch.float64)
    for a in found:
        total[a.start : a.start + a.up.shape[0]] += a.scale * (a.up.double() @ a.down.double())
    return total


each_kind = pytest.mark.parametrize("kind", ["one", "several", "parts", "parts and whole"])


@each_kind
def test_folded_and_beside_equal_the_patched_weight(kind: str) -> None:
    found = adapters(kind)
    factors = Factors(found, CPU, torch.float32)
    weight, x = random(N, K, seed=9), random(2, ROWS, K, seed=10)
    patched = weight.double() + delta(found)
    # float32: sums of at most 50 products of numbers below 30, each rounded by 2^-24 of it.
    bound = 50 * 30 * 2**-24
    folded = factors.fold(weight.clone())
    assert torch.allclose(folded.double(), patched, rtol=0, atol=bound)
    y = torch.nn.functional.linear(x, weight)
    beside = factors.add_product(x, y)
    assert beside.data_ptr() == y.data_ptr(), "a second result was made"
    assert torch.allclose(beside.double(), x.double() @ patched.T, rtol=0, atol=50 * 200 * 2**-24)
    assert (patched - weight).abs().max() > 1, "the adapters change nothing"


@each_kind
def test_factors_take_no_more_than_the_adapters(kind: str) -> None:
    found = adapters(kind)
    for dtype in (torch.bfloat16, torch.float32):
        factors = Factors(found, CPU, dtype)
        tensors = [factors.a, *(part.b for part in factors.parts)]
        assert {t.dtype for t in tensors} == {dtype}
        assert factors.nbytes == sum(t.nbytes for t in tensors) == nbytes(found, dtype)
        assert nbytes(found, dtype) == sum(a.up.numel() + a.down.numel() for a in found) * dtype.itemsize


@each_kind
def test_factors_in_one_piece_of_memory_are_the_same(kind: str) -> None:
    found = adapters(kind)
    for dtype in (torch.bfloat16, torch.float32):
        expected = Factors(found, CPU, dtype)
        memory = torch.zeros(packed_bytes(found, dtype), dtype=torch.uint8)
        Factors.in_memory(found, dtype, memory, fill=True)
        over = Factors.in_memory(found, dtype, memory.clone())
        assert torch.equal(over.a, expected.a)
        assert [part.rows for part in over.parts] == [part.rows for part in expected.parts]
        assert all(torch.equal(one.b, other.b) for one, other in zip(over.parts, expected.parts, strict=True))
        assert nbytes(found, dtype) <= len(memory) < nbytes(found, dtype) + ALIGN * (1 + len(over.parts))


def test_factors_in_bfloat16_round_the_scaled_factor_once() -> None:
    (found,) = adapters("one")
    scaled = Factors([Adapter(found.up, found.down, 0.3)], CPU, torch.bfloat16)
    assert torch.equal(scaled.parts[0].b, (found.up * 0.3).bfloat16())
    assert torch.equal(scaled.a, found.down.bfloat16())


def test_another_dtype_is_cast_for_the_call() -> None:
    found = adapters("parts")
    factors = Factors(found, CPU, torch.bfloat16)
    x, y = random(3, K, seed=1), torch.zeros(3, N)
    exact = x.double() @ delta(found).T
    got = factors.add_product(x, y)
    assert got.dtype == torch.float32
    # Both factors were rounded to 8 bits: 2^-9 of each product, of which there are at most 4 x 40.
    assert (got - exact).abs().max() < 2 * 2**-8 * (x.abs().double() @ delta_of_sizes(found).T).max()


def delta_of_sizes(found: list[Adapter]) -> torch.Tensor:
    return delta([Adapter(a.up.abs(), a.down.abs(), abs(a.scale), a.start) for a in found])


def test_convolutions_fold_by_their_rows() -> None:
    (found,) = adapters("one")
    weight = random(N, 10, 2, 2, seed=4)
    folded = Factors([found], CPU, torch.float32).fold(weight.clone())
    assert torch.allclose(folded.view(N, K).double(), weight.view(N, K).double() + delta([found]), atol=1e-5)


def test_the_adapters_themselves_stay_as_they_are() -> None:
    found = adapters("several")
    before = [(a.up.clone(), a.down.clone()) for a in found]
    factors = Factors(found, CPU, torch.float32)
    factors.fold(random(N, K, seed=1))
    factors.add_product(random(2, K, seed=2), torch.zeros(2, N))
    assert all(torch.equal(a.up, up) and torch.equal(a.down, down) for a, (up, down) in zip(found, before, strict=True))


@pytest.mark.parametrize(("shape", "crossing"), [((3072, 3072), 1536), ((21504, 3072), 2688), ((3072, 15360), 2560)])
def test_the_way_changes_where_the_operations_are_equal(shape: tuple[int, int], crossing: int) -> None:
    """Where no kernel adds the product while it makes the weight, as on a CPU."""
    factors = Factors([Adapter(torch.zeros(shape[0], 1), torch.zeros(1, shape[1]), 1.0)], CPU, torch.float32)
    weight = torch.empty(shape, device="meta")
    assert factors.run_beside(crossing - 1, weight, shape) and not factors.run_beside(crossing, weight, shape)


def test_a_folded_weight_is_that_of_its_weight_and_factors() -> None:
    shape = (N, 64)
    data = torch.randint(0, 100, (N * 2 * 34,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    weight, other = (torch.nn.Parameter(quantized(data, GGMLType.Q8_0, shape), requires_grad=False) for _ in range(2))
    factors, more = (
        Factors([Adapter(random(N, 2, seed=i), random(2, 64, seed=3), 1.0)], CPU, torch.float32) for i in (1, 2)
    )
    folded = FoldedWeight(weight, factors, torch.float32)
    assert folded.is_of(weight, factors, torch.float32)
    assert not folded.is_of(other, factors, torch.float32)
    assert not folded.is_of(weight, more, torch.float32)
    assert not folded.is_of(weight, factors, torch.float16)
    expected = factors.fold(weight.dequantize().clone())
    for _ in range(3):
        assert torch.equal(folded.dense(weight, factors), expected)
    kept = weakref.ref(factors)
    del factors
    gc.collect()
    assert kept() is None, "it keeps the factors alive"
    assert not folded.is_of(weight, more, torch.float32)
