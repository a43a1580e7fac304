"""The quantisers: as near to the weights as llama.cpp's, exact where a type is exact, and never worse than nothing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.loaders.gguf.types import BLOCKS, NO_REFERENCE, QUANTISED, GGMLType
from pack.loaders.quant import quantize as module
from pack.loaders.quant import reference
from pack.loaders.quant.quantize import UnrepresentableError, quantize

ROOT = Path(__file__).resolve().parents[1]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "quantize_quality.json").read_text(encoding="utf-8"))
LIBGGUF = {row["type"]: row for row in RESULTS["rows"]}
TYPES = sorted(QUANTISED, key=lambda kind: kind.name)

spec = importlib.util.spec_from_file_location("quantize_quality", ROOT / "benchmarks" / "quantize_quality.py")
assert spec is not None and spec.loader is not None
quality = importlib.util.module_from_spec(spec)
spec.loader.exec_module(quality)
WEIGHTS = {name: make() for name, make in quality.WEIGHTS.items()}

each_type = pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)


def decoded(weights: torch.Tensor, kind: GGMLType, device: str = "cpu") -> torch.Tensor:
    return reference.dequantize(quantize(weights, kind, device), kind, weights.shape)


def error(weights: torch.Tensor, other: torch.Tensor) -> float:
    return float((weights.double() - other.double()).norm() / weights.double().norm())


def test_every_type_that_is_read_is_written() -> None:
    assert set(module.QUANTISERS) == QUANTISED
    assert {row["type"] for row in RESULTS["rows"]} == {kind.name for kind in QUANTISED}


@pytest.mark.parametrize("name", WEIGHTS)
@each_type
def test_error_is_within_2_percent_of_libgguf(kind: GGMLType, name: str) -> None:
    """Its errors on the same numbers, as the benchmark wrote them down."""
    theirs = LIBGGUF[kind.name][f"{name}_libgguf"]["error"]
    assert error(WEIGHTS[name], decoded(WEIGHTS[name], kind)) <= 1.02 * theirs


GGUF_PY = [kind for kind in TYPES if kind.name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")]


@pytest.mark.parametrize("kind", GGUF_PY, ids=lambda kind: kind.name)
def test_error_is_no_larger_than_gguf_pys(kind: GGMLType) -> None:
    number = gguf.GGMLQuantizationType[kind.name]
    for weights in WEIGHTS.values():
        theirs = gguf.dequantize(gguf.quantize(weights.numpy(), number), number)
        assert error(weights, decoded(weights, kind)) <= 1.0001 * error(weights, torch.from_numpy(theirs))


@each_type
def test_gguf_py_reads_the_same(kind: GGMLType) -> None:
    weights = WEIGHTS["demo"][:16]
    theirs = gguf.dequantize(quantize(weights, kind).numpy(), gguf.GGMLQuantizationType[kind.name])
    assert torch.equal(torch.from_numpy(theirs.astype(np.float32)), decoded(weights, kind))


@each_type
def test_zeros_stay_zeros(kind: GGMLType) -> None:
    assert torch.count_nonzero(decoded(torch.zeros(3, 512), kind)) == 0


# The code books of the others need not have a row of equal values.
WITH_EQUAL_VALUES = [kind for kind in TYPES if not kind.name.startswith(("IQ1", "IQ2", "IQ3"))]


@pytest.mark.parametrize("kind", WITH_EQUAL_VALUES, ids=lambda kind: kind.name)
def test_values_equal_to_their_groups_scale_are_exact(kind: GGMLType) -> None:
    """A block of one value, up to what rounding a scale does: to a half, for small ones to one of few halves and of
    the integers of a group (a 128th), to three bits or a power of two (an eighth)."""
    coarse = 1 / 8 if kind in (GGMLType.MXFP4, GGMLType.NVFP4) else 1 / 128
    for value, bound in ((1.0, 2**-10), (-0.75, 2**-10), (0.0117, coarse)):
        weights = torch.full((2, 256), value)
        assert error(weights, decoded(weights, kind)) <= bound, value


@pytest.mark.parametrize("kind", [GGMLType.TQ1_0, GGMLType.TQ2_0], ids=lambda kind: kind.name)
def test_three_values_are_exact(kind: GGMLType) -> None:
    digits = torch.randint(-1, 2, (8, 1024), generator=torch.Generator().manual_seed(1))
    for scale in (1.0, 0.03125, 3.0):
        assert torch.equal(decoded(digits * scale, kind), digits * scale)


@pytest.mark.parametrize("kind", [GGMLType.MXFP4, GGMLType.NVFP4], ids=lambda kind: kind.name)
def test_fp4_is_exact_on_its_own_numbers(kind: GGMLType) -> None:
    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6])
    weights = codes[torch.randint(0, 15, (4, 512), generator=torch.Generator().manual_seed(2))]
    weights[:, ::16] = 6  # so that each group's scale is known
    for scale in (1.0, 0.25):
        assert torch.equal(decoded(weights * scale, kind), weights * scale)


@pytest.mark.parametrize("kind", [GGMLType.Q8_0, GGMLType.Q4_0, GGMLType.Q5_0, GGMLType.Q6_K], ids=lambda k: k.name)
def test_whole_numbers_that_the_codes_can_hold_are_exact(kind: GGMLType) -> None:
    low = {GGMLType.Q8_0: -127, GGMLType.Q4_0: -8, GGMLType.Q5_0: -16, GGMLType.Q6_K: -32}[kind]
    weights = torch.randint(low + 1, -low, (4, 512), generator=torch.Generator().manual_seed(3)).float()
    weights[:, ::16] = low  # the scale is 1
    assert torch.equal(decoded(weights, kind), weights)


@each_type
def test_size_of_the_pieces_does_not_matter(kind: GGMLType, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = WEIGHTS["demo"][:12]
    whole = quantize(weights, kind)
    monkeypatch.setattr(module, "CPU_CHUNK", 512)
    done: list[int] = []
    pieces = quantize(weights, kind, check=done.append)
    assert torch.equal(whole, pieces)
    assert done == list(range(512, weights.numel() + 1, 512))


@each_type
def test_shape_and_strides(kind: GGMLType) -> None:
    layout = BLOCKS[kind]
    weights = WEIGHTS["demo"][:8].view(2, 4, 256)
    blocks = quantize(weights, kind)
    assert blocks.dtype == torch.uint8
    assert blocks.shape == (2, 4, 256 // layout.elements * layout.nbytes)
    turned = weights.transpose(0, 1)
    assert torch.equal(quantize(turned, kind), quantize(turned.contiguous(), kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_any_float_may_come_in(dtype: torch.dtype) -> None:
    weights = WEIGHTS["demo"][:8].to(dtype)
    assert torch.equal(quantize(weights, GGMLType.Q4_K), quantize(weights.float(), GGMLType.Q4_K))


@pytest.mark.parametrize("kind", [GGMLType.F32, GGMLType.F16, GGMLType.BF16], ids=lambda kind: kind.name)
def test_plain_types_are_torchs_rounding(kind: GGMLType) -> None:
    weights = WEIGHTS["demo"][:4, :33]
    assert torch.equal(decoded(weights, kind), weights.to(reference.PLAIN_DTYPES[kind]).float())


@each_type
def test_what_has_no_code_is_refused(kind: GGMLType) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        weights = WEIGHTS["demo"][:4].clone()
        weights[2, 17] = value
        with pytest.raises(UnrepresentableError, match=r"holds the number (nan|inf)"):
            quantize(weights, kind)


def test_a_number_too_large_for_a_half_is_refused() -> None:
    weights = torch.full((1, 256), 70000.0)
    for kind in (GGMLType.F16, GGMLType.Q8_0, GGMLType.Q4_K):
        with pytest.raises(UnrepresentableError, match=r"70000, and .* nothing beyond 65504"):
            quantize(weights, kind)
    assert torch.equal(decoded(weights, GGMLType.F32), weights)


@pytest.mark.parametrize("kind", sorted(NO_REFERENCE), ids=lambda kind: kind.name)
def test_types_that_nothing_decodes_are_not_written(kind: GGMLType) -> None:
    with pytest.raises(ValueError, match=f"nothing writes GGUF type {kind.name}; choose one of IQ1_M"):
        quantize(torch.zeros(1, 256), kind)


@each_type
def test_rows_must_be_whole_blocks(kind: GGMLType) -> None:
    with pytest.raises(ValueError, match="not a whole number"):
        quantize(torch.zeros(64, BLOCKS[kind].elements // 2), kind)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(TYPES),
    seed=st.integers(0, 2**31),
    scale=st.floats(-9, 3.3),
    tail=st.sampled_from([0.0, 1.0, 3.0]),
    offset=st.sampled_from([0.0, 1.0, -4.0]),
)
def test_never_worse_than_nothing(kind: GGMLType, seed: int, scale: float, tail: float, offset: float) -> None:
    """For weights of any size, with heavy tails or far from zero: finite, and no larger an error than zeros have. Those
    below 10^-5 are smaller than the steps of a half can follow; they must not come out as something large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((4, 512), generator=generator)
    weights = ((x * x.abs().pow(tail) + offset) * 10**scale).clamp(-2688, 2688)
    y = decoded(weights, kind)
    assert y.isfinite().all()
    if scale >= -5:
        assert error(weights, y) <= 1.0 + 1e-6
    else:
        assert float(y.abs().max()) <= max(2 * float(weights.abs().max()), 2**-13)


@pytest.mark.cuda
@each_type
def test_a_gpu_does_the_same(kind: GGMLType) -> None:
    """Sums are taken in another order there, so now and then another scale wins by a hair."""
    for weights in WEIGHTS.values():
        here, there = (error(weights, decoded(weights, kind, device)) for device in ("cpu", "cuda"))
        assert abs(here - there) < 1e-3 * here
