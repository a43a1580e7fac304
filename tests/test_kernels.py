"""The Triton kernels equal the reference bit for bit: every type, alignment, tail and scale.

Without a GPU the same kernels run in Triton's interpreter, slowly, on a few blocks. It truncates where it should round
to bfloat16, so that bfloat16 is compared on GPUs only; the rounding is the only step in which output types differ.
"""

from __future__ import annotations

import os
import random
from math import gcd

import numpy as np
import pytest
import torch
from block_bytes import random_blocks
from pack.loaders.gguf.types import BLOCKS, QUANTISED, GGMLType
from pack.loaders.quant import reference

pytest.importorskip("triton", reason="Triton is not installed: its wheels are for Linux")

DEVICE = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]

with pytest.MonkeyPatch.context() as patch:
    # What @triton.jit makes of a kernel is decided when the kernel's module is imported.
    if DEVICE.type == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")
    from pack.loaders.quant.kernels import launch

# Infinities and NaNs are part of the data, and numpy, which the interpreter computes with, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
quantised = pytest.mark.parametrize("ggml_type", sorted(QUANTISED), ids=lambda t: t.name)


@pytest.fixture
def rng():
    seed = int(os.environ.get("SLUICE_SEED") or random.SystemRandom().getrandbits(32))
    print(f"to repeat: SLUICE_SEED={seed}")  # pytest shows it when the test fails
    return np.random.default_rng(seed)


def placed(blocks: np.ndarray, offset: int) -> torch.Tensor:
    """The bytes of `blocks` on the device at an address that is `offset` past a multiple of 16, nothing after them."""
    buffer = torch.empty(blocks.size + 32, dtype=torch.uint8, device=DEVICE)
    start = -buffer.data_ptr() % 16 + offset
    view = buffer[start : start + blocks.size]
    view.copy_(torch.from_numpy(blocks.reshape(-1)))
    return view


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal as bits, or both NaN."""
    assert got.dtype == want.dtype and got.shape == want.shape
    bits = {2: torch.int16, 4: torch.int32}[got.element_size()]
    same = (got.view(bits) == want.view(bits)) | (got.isnan() & want.isnan())
    where = (~same).nonzero()
    assert len(where) == 0, f"{len(where)} of {got.numel()} differ, first at {where[0].tolist()}"


def few_blocks(ggml_type: GGMLType, rng: np.random.Generator) -> np.ndarray:
    """Two full programs and a third that has one block; enough blocks for each special scale once."""
    kernel = launch.KERNELS[ggml_type]
    return random_blocks(ggml_type, max(2 * kernel.small[0] // kernel.per_block + 1, 25), rng)


def test_every_type_has_a_kernel():
    assert set(launch.KERNELS) == QUANTISED


@quantised
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(ggml_type, dtype, rng):
    data = placed(few_blocks(ggml_type, rng), 0)
    shape = (data.numel() // BLOCKS[ggml_type].nbytes, BLOCKS[ggml_type].elements)
    got = launch.dequantize(data, ggml_type, shape, dtype)
    assert got.device == DEVICE
    assert_same_bits(got, reference.dequantize(data, ggml_type, shape, dtype))


@quantised
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_any_alignment(ggml_type, offset, rng):
    data = placed(few_blocks(ggml_type, rng), offset)
    shape = (data.numel() // BLOCKS[ggml_type].nbytes * BLOCKS[ggml_type].elements,)
    assert_same_bits(launch.dequantize(data, ggml_type, shape), reference.dequantize(data, ggml_type, shape))


@quantised
def test_writes_its_own_output_and_nothing_else(ggml_type, rng):
    """Into a slice of a larger tensor, aligned to no more than an element, from a single block."""
    blocks = random_blocks(ggml_type, 1, rng)
    elements = BLOCKS[ggml_type].elements
    around = torch.full((elements + 34,), 7.0, dtype=torch.float16, device=DEVICE)
    out = around[17 : 17 + elements]
    data = placed(blocks, 0)
    assert launch.dequantize(data, ggml_type, (elements,), torch.float16, out=out) is out
    assert_same_bits(out, reference.dequantize(data, ggml_type, (elements,), torch.float16))
    assert (around[:17] == 7).all() and (around[17 + elements :] == 7).all()


def test_data_that_is_a_transposed_view_is_taken_in_its_own_order(rng):
    data = placed(random_blocks(GGMLType.Q8_0, 34, rng), 0).view(34, 34).t()
    shape = (34, 32)
    got = launch.dequantize(data, GGMLType.Q8_0, shape)
    assert_same_bits(got, reference.dequantize(data, GGMLType.Q8_0, shape))


def test_no_blocks_make_no_elements():
    empty = torch.empty(0, dtype=torch.uint8, device=DEVICE)
    assert launch.dequantize(empty, GGMLType.Q4_K, (0, 256), torch.bfloat16).shape == (0, 256)


@pytest.mark.parametrize(
    ("nbytes", "shape"), [(143, (256,)), (145, (256,)), (144, (128,)), (288, (256,)), (0, (256,))], ids=str
)
def test_bytes_that_are_not_those_of_the_shape_are_refused(nbytes, shape):
    with pytest.raises(ValueError, match="Q4_K"):
        launch.dequantize(torch.zeros(nbytes, dtype=torch.uint8, device=DEVICE), GGMLType.Q4_K, shape)


def test_out_with_gaps_is_refused():
    out = torch.empty(256, 2, device=DEVICE)[:, 0]
    with pytest.raises(ValueError, match="contiguous"):
        launch.dequantize(torch.zeros(144, dtype=torch.uint8, device=DEVICE), GGMLType.Q4_K, (256,), out=out)


@pytest.mark.parametrize("address", range(0x10000, 0x10011))
def test_alignment_is_true_of_every_block(address):
    known = launch.alignment(address)
    assert address % known == 0
    for ggml_type in QUANTISED:
        for i in range(4):
            assert (address + i * BLOCKS[ggml_type].nbytes) % gcd(BLOCKS[ggml_type].nbytes, known) == 0


@pytest.mark.cuda
@quantised
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_blocks_equal_the_reference(ggml_type, dtype, rng):
    """Enough blocks for all pairs of special scales and all rows of a grid; twice, for the kept kernel's own path."""
    data = placed(random_blocks(ggml_type, 30_001, rng), 0)
    shape = (30_001 * BLOCKS[ggml_type].elements,)
    want = reference.dequantize(data, ggml_type, shape, dtype)
    for _ in range(2):
        assert_same_bits(launch.dequantize(data, ggml_type, shape, dtype), want)


@pytest.mark.parametrize("name", ["Q4_K", "MXFP4", "IQ4_NL"])
def test_a_bound_call_makes_the_same_bits_each_time_anew(name, rng):
    ggml_type = GGMLType[name]
    data = placed(few_blocks(ggml_type, rng), 0)
    shape = (data.numel() // BLOCKS[ggml_type].nbytes, BLOCKS[ggml_type].elements)
    call = launch.bind(data, ggml_type, shape, torch.float16)
    want = reference.dequantize(data, ggml_type, shape, torch.float16)
    first, second = call(), call()
    assert_same_bits(first, want)
    assert_same_bits(second, want)
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("ggml_type", sorted(QUANTISED), ids=lambda t: t.name)
def test_more_than_two_to_the_31_elements(ggml_type, rng):
    layout = BLOCKS[ggml_type]
    pattern = placed(random_blocks(ggml_type, 4099, rng), 0)  # a prime number: no power of two falls on its start
    repeats = 2**31 // (4099 * layout.elements) + 2
    data = pattern.repeat(repeats)
    want = reference.dequantize(pattern, ggml_type, (4099 * layout.elements,), torch.bfloat16).view(torch.int16)
    got = launch.dequantize(data, ggml_type, (repeats, 4099 * layout.elements), torch.bfloat16)
    assert got.numel() > 2**31
    nan = want.view(torch.bfloat16).isnan()
    for row in got:
        assert torch.equal(row.view(torch.int16)[~nan], want[~nan]) and row[nan].isnan().all()


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_where_the_data_is(rng):
    data = placed(random_blocks(GGMLType.IQ2_S, 40, rng), 0).to("cuda:1")
    shape = (40, 256)
    want = reference.dequantize(data, GGMLType.IQ2_S, shape, torch.float32)
    with torch.cuda.device(0):
        got = launch.dequantize(data, GGMLType.IQ2_S, shape)
        bound = launch.bind(data, GGMLType.IQ2_S, shape, torch.float32)
        assert_same_bits(bound(), want)
    assert_same_bits(got, want)
    with torch.cuda.device(1):
        assert_same_bits(bound(), want)
