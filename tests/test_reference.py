"""The reference dequantisers equal gguf-py's bit for bit, on every type, shape, alignment and scale."""

from __future__ import annotations

import json
import mmap
import os
import random
import subprocess
import sys
import warnings
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from block_bytes import E8M0_SPECIALS, HALF_SCALES, HALF_SPECIALS, UE4M3_SPECIALS, random_blocks
from gguf import quants
from pack.loaders.gguf.types import BLOCKS, NO_REFERENCE, PLAIN, QUANTISED, BlockLayout, GGMLType, byte_size
from pack.loaders.quant import reference

quantised = pytest.mark.parametrize("ggml_type", sorted(QUANTISED), ids=lambda t: t.name)
narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])


@pytest.fixture
def rng():
    seed = int(os.environ.get("SLUICE_SEED") or random.SystemRandom().getrandbits(32))
    print(f"to repeat: SLUICE_SEED={seed}")  # pytest shows it when the test fails
    return np.random.default_rng(seed)


def oracle(blocks: np.ndarray, ggml_type: GGMLType) -> torch.Tensor:
    """gguf-py's float32 values of `blocks`, flat."""
    with np.errstate(all="ignore"):
        values = quants.dequantize(blocks, gguf.GGMLQuantizationType(int(ggml_type)))
    assert values.dtype == np.float32
    return torch.from_numpy(values).flatten()


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal as bits, or both NaN."""
    assert got.dtype == want.dtype and got.shape == want.shape
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    differ = got.contiguous().view(bits) != want.contiguous().view(bits)
    if got.dtype.is_floating_point:
        differ &= ~(got.isnan() & want.isnan())
    where = differ.nonzero()
    assert len(where) == 0, f"{len(where)} of {got.numel()} differ, first at {where[0].tolist()}"


@quantised
@pytest.mark.parametrize("n", [1, 2, 3001])  # one block is contiguous in every way; 3001 have all pairs of specials
def test_equals_gguf_py_bit_for_bit(ggml_type, n, rng):
    blocks = random_blocks(ggml_type, n, rng)
    want = oracle(blocks, ggml_type)
    got = reference.dequantize(torch.from_numpy(blocks), ggml_type, (want.numel(),))
    assert got.is_contiguous()
    assert_same_bits(got, want)


@pytest.mark.cuda
@quantised
def test_equals_gguf_py_on_a_gpu(ggml_type, rng):
    blocks = random_blocks(ggml_type, 3001, rng)
    want = oracle(blocks, ggml_type)
    on_gpu = torch.from_numpy(blocks).cuda()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = reference.dequantize(on_gpu, ggml_type, (want.numel(),), dtype)
        assert got.is_cuda
        assert_same_bits(got.cpu(), want.to(dtype))
    rows = torch.tensor([[2, 0], [2999, 1]])
    got = reference.dequantize_rows(on_gpu, ggml_type, BLOCKS[ggml_type].elements, rows.cuda())
    assert_same_bits(got.cpu(), want.view(3001, -1)[rows])


@quantised
def test_chunks_join_without_a_seam(ggml_type, rng, monkeypatch):
    monkeypatch.setattr(reference, "CPU_CHUNK", 4096)
    blocks = random_blocks(ggml_type, 4096 // BLOCKS[ggml_type].elements * 5 + 1, rng)  # the last chunk is one block
    want = oracle(blocks, ggml_type)
    for dtype in (torch.float32, torch.bfloat16):
        got = reference.dequantize(torch.from_numpy(blocks), ggml_type, (want.numel(),), dtype)
        assert_same_bits(got, want.to(dtype))


@quantised
@narrow
def test_narrow_result_is_the_float32_one_rounded_once(ggml_type, dtype, rng):
    blocks = random_blocks(ggml_type, 500, rng)
    want = oracle(blocks, ggml_type)
    got = reference.dequantize(torch.from_numpy(blocks), ggml_type, (want.numel(),), dtype)
    assert_same_bits(got, want.to(dtype))


@pytest.mark.parametrize(
    "shape",
    [(7680,), (3, 2560), (6, 5, 256), (10, 3, 16, 16), (5, 4, 3, 8, 16), (2560, 3), (40, 64, 3, 1), (1, 7680, 1)],
    ids=str,
)
@pytest.mark.parametrize("ggml_type", [GGMLType.Q8_0, GGMLType.Q4_K, GGMLType.IQ2_XS], ids=lambda t: t.name)
def test_any_shape_even_where_rows_are_not_whole_blocks(ggml_type, shape, rng):
    blocks = random_blocks(ggml_type, 7680 // BLOCKS[ggml_type].elements, rng)
    got = reference.dequantize(torch.from_numpy(blocks), ggml_type, shape)
    assert got.is_contiguous()
    assert_same_bits(got, oracle(blocks, ggml_type).view(shape))


@quantised
def test_works_inside_and_after_inference_mode(ggml_type, rng):
    blocks = torch.from_numpy(random_blocks(ggml_type, 9, rng, specials=False))
    shape = (9 * BLOCKS[ggml_type].elements,)
    with torch.inference_mode():
        inside = reference.dequantize(blocks, ggml_type, shape)
    after = reference.dequantize(blocks, ggml_type, shape)
    weight = torch.ones(shape, requires_grad=True)
    (after * weight).sum().backward()
    assert torch.equal(weight.grad, inside)


@quantised
def test_no_elements_make_an_empty_tensor(ggml_type):
    got = reference.dequantize(torch.empty(0, dtype=torch.uint8), ggml_type, (0, 256), torch.bfloat16)
    assert got.shape == (0, 256) and got.dtype == torch.bfloat16


@pytest.fixture
def mapped_at(tmp_path):
    """A function that puts bytes into a file at an offset and gives them back as a view of its read-only mapping."""
    mappings = []

    def place(raw: np.ndarray, offset: int) -> torch.Tensor:
        path = tmp_path / f"{len(mappings)}.bin"
        path.write_bytes(b"\xa5" * offset + raw.tobytes())
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mappings.append(mapping)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "not writable": what this is about
            return torch.frombuffer(memoryview(mapping)[offset:], dtype=torch.uint8)

    return place


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 6, 32])
@pytest.mark.parametrize("ggml_type", sorted(QUANTISED | PLAIN), ids=lambda t: t.name)
def test_data_in_a_read_only_file_at_any_address(ggml_type, offset, rng, mapped_at):
    # A write to the mapping would kill the process.
    raw = rng.integers(0, 256, (40, BLOCKS[ggml_type].nbytes), dtype=np.uint8)
    shape = (40 * BLOCKS[ggml_type].elements,)
    want = reference.dequantize(torch.from_numpy(raw), ggml_type, shape)
    view = mapped_at(raw, offset)
    assert view.data_ptr() % 32 == offset % 32
    assert_same_bits(reference.dequantize(view, ggml_type, shape), want)


@pytest.mark.parametrize("offset", [1, 2, 4, 9])
@quantised
def test_data_at_any_storage_offset_in_two_dimensions(ggml_type, offset, rng):
    blocks = random_blocks(ggml_type, 30, rng)
    storage = torch.empty(blocks.size + offset, dtype=torch.uint8)
    view = storage[offset:].view(5, -1).copy_(torch.from_numpy(blocks).view(5, -1))
    before = storage.clone()
    want = oracle(blocks, ggml_type)
    assert_same_bits(reference.dequantize(view, ggml_type, (want.numel(),)), want)
    assert torch.equal(storage[offset:], before[offset:])


@pytest.mark.parametrize("ggml_type", sorted(QUANTISED | PLAIN), ids=lambda t: t.name)
def test_rows_gathered_while_quantised_equal_rows_of_the_whole(ggml_type, rng):
    row_elements = 512
    row_blocks = row_elements // BLOCKS[ggml_type].elements
    raw = rng.integers(0, 256, (19 * row_blocks, BLOCKS[ggml_type].nbytes), dtype=np.uint8)
    storage = torch.empty(raw.size + 1, dtype=torch.uint8)
    data = storage[1:].copy_(torch.from_numpy(raw).flatten())
    whole = reference.dequantize(data, ggml_type, (19, row_elements), torch.bfloat16)
    rows = torch.tensor([[3, 18, 0], [0, 7, 3]])
    got = reference.dequantize_rows(data, ggml_type, row_elements, rows, torch.bfloat16)
    assert got.is_contiguous()
    assert_same_bits(got, whole[rows])
    for rows in (torch.tensor(5), torch.empty(0, dtype=torch.int64), torch.tensor([2], dtype=torch.int32)):
        assert_same_bits(
            reference.dequantize_rows(data, ggml_type, row_elements, rows, torch.bfloat16), whole[rows.long()]
        )


def test_rows_that_do_not_exist_or_are_not_whole_blocks_are_refused():
    data = torch.zeros(6 * 144, dtype=torch.uint8)
    for row in (-1, 3):
        with pytest.raises(IndexError):
            reference.dequantize_rows(data, GGMLType.Q4_K, 512, torch.tensor([row]))
    for row_elements in (0, 128, 384, 1024):  # none, half a block, a block and a half, a row that divides nothing
        with pytest.raises(ValueError, match=rf"864 bytes of Q4_K are not rows of {row_elements} elements"):
            reference.dequantize_rows(data, GGMLType.Q4_K, row_elements, torch.tensor([0]))


PLAIN_BYTES = {
    GGMLType.F64: "<f8",
    GGMLType.F32: "<f4",
    GGMLType.F16: "<f2",
    GGMLType.I8: "<i1",
    GGMLType.I16: "<i2",
    GGMLType.I32: "<i4",
    GGMLType.I64: "<i8",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize("ggml_type", sorted(PLAIN), ids=lambda t: t.name)
def test_plain_types_convert_as_torch_does(ggml_type, dtype, rng):
    numbers = rng.integers(-100, 100, 600)
    if ggml_type is GGMLType.BF16:  # numpy has none; its bytes are the upper halves of float32's
        stored = numbers.astype("<f4").view("<u4").__rshift__(16).astype("<u2")
    else:
        stored = numbers.astype(PLAIN_BYTES[ggml_type])
    want = torch.from_numpy(numbers).to(dtype).view(4, 150)
    for pad in (0, 1):
        data = torch.zeros(stored.nbytes + pad, dtype=torch.uint8)[pad:]
        data.copy_(torch.from_numpy(stored.view(np.uint8)))
        assert_same_bits(reference.dequantize(data, ggml_type, (4, 150), dtype), want)


def test_plain_floats_keep_every_bit_pattern():
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for ggml_type, dtype in ((GGMLType.F16, torch.float16), (GGMLType.BF16, torch.bfloat16)):
        got = reference.dequantize(halves.view(torch.uint8), ggml_type, (65536,), dtype)
        assert torch.equal(got.view(torch.int16), halves)
        got = reference.dequantize(halves.view(torch.uint8), ggml_type, (65536,))
        assert_same_bits(got, halves.view(dtype).float())
    doubles = torch.tensor([1 + 2**-40, -0.0, 1e-310, float("inf")], dtype=torch.float64)
    got = reference.dequantize(doubles.view(torch.uint8), GGMLType.F64, (4,), torch.float64)
    assert torch.equal(got.view(torch.int64), doubles.view(torch.int64))


def test_every_type_of_the_table_is_implemented_or_known_to_have_no_reference():
    assert reference.IMPLEMENTED == QUANTISED | PLAIN
    assert set(GGMLType) - reference.IMPLEMENTED == NO_REFERENCE


@pytest.mark.parametrize("ggml_type", [*sorted(NO_REFERENCE), 99], ids=str)
def test_a_type_without_reference_is_named(ggml_type):
    name = getattr(ggml_type, "name", "99")
    for call in (
        lambda data: reference.dequantize(data, ggml_type, (256,)),
        lambda data: reference.dequantize_rows(data, ggml_type, 256, torch.tensor([0])),
    ):
        with pytest.raises(ValueError, match=rf"type {name} cannot be dequantised.*[Cc]onvert.*Q8_0"):
            call(torch.zeros(292, dtype=torch.uint8))


@pytest.mark.parametrize("nbytes", [0, 143, 145, 2 * 144])
def test_wrong_byte_count_names_bytes_and_shape(nbytes):
    with pytest.raises(ValueError, match=rf"{nbytes} bytes are not a Q4_K tensor of shape \(16, 16\)"):
        reference.dequantize(torch.zeros(nbytes, dtype=torch.uint8), GGMLType.Q4_K, (16, 16))


def test_elements_that_are_no_whole_blocks_are_refused():
    with pytest.raises(ValueError, match=r"255 elements take 0\.99\d+ blocks of 144 bytes"):
        reference.dequantize(torch.zeros(144, dtype=torch.uint8), GGMLType.Q4_K, (255,))


def test_data_that_is_not_bytes_and_results_that_are_not_fractions_are_refused():
    with pytest.raises(ValueError, match=r"uint8.*torch\.int8"):
        reference.dequantize(torch.zeros(144, dtype=torch.int8), GGMLType.Q4_K, (256,))
    with pytest.raises(ValueError, match=r"Q4_K holds fractions.*torch\.int32"):
        reference.dequantize(torch.zeros(144, dtype=torch.uint8), GGMLType.Q4_K, (256,), torch.int32)


@pytest.mark.parametrize("elements", [1, 32, 64, 256])
def test_chunks_cover_tensors_of_any_length_once_and_in_order(elements):
    layout = BlockLayout(elements, 17)
    for blocks, chunk in ((0, 1 << 20), (1, 1 << 20), (100, 1), (2**33 // elements + 5, 1 << 28)):
        byte_end = element_end = 0
        for byte_range, element_range in reference.chunks(blocks, layout, chunk):
            assert byte_range.start == byte_end and element_range.start == element_end
            assert byte_range.start % reference.ALIGNMENT == 0
            assert 0 < element_range.stop - element_range.start <= max(chunk, reference.ALIGNMENT * elements)
            byte_end, element_end = byte_range.stop, element_range.stop
        assert (byte_end, element_end) == (blocks * 17, blocks * elements)


@pytest.mark.parametrize("ggml_type", [GGMLType.Q4_0, GGMLType.Q6_K, GGMLType.IQ1_M], ids=lambda t: t.name)
def test_more_than_two_to_the_31_elements(ggml_type):
    shape = (2**31 // 4096 + 3, 4096)  # on the meta device: every index and size is computed, no memory is needed
    data = torch.empty(byte_size(shape, ggml_type), dtype=torch.uint8, device="meta")
    got = reference.dequantize(data, ggml_type, shape, torch.bfloat16)
    assert got.shape == shape and prod(got.shape) > 2**31


@pytest.fixture(scope="module")
def fresh_process() -> dict:
    """What a new process saw of itself: one that imports the reference and turns 68 MB of Q8_0 into 128 MB of bf16."""
    program = """
import json, sys, types
pack = types.ModuleType("pack"); pack.__path__ = [sys.argv[1]]; sys.modules["pack"] = pack
import torch
from pack.loaders.gguf.types import GGMLType
from pack.loaders.quant import reference
gguf_imported = "gguf" in sys.modules
torch.set_num_threads(2)
growth_kb = None
if sys.platform == "linux":
    from resource import RUSAGE_SELF, getrusage
    data = torch.ones(34 << 21, dtype=torch.uint8)
    reference.dequantize(data[:34 << 16], GGMLType.Q8_0, (1 << 21,), torch.bfloat16)
    before = getrusage(RUSAGE_SELF).ru_maxrss
    reference.dequantize(data, GGMLType.Q8_0, (1 << 26,), torch.bfloat16)
    growth_kb = getrusage(RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"gguf_imported": gguf_imported, "growth_kb": growth_kb}))
"""
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run([sys.executable, "-c", program, root], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss differs")
def test_temporaries_are_bounded_by_the_chunk(fresh_process):
    # The whole in float32 would be 256 MB more than the result; a chunk is 4 MB of it.
    assert fresh_process["growth_kb"] < (128 + 32) * 1024


def test_importing_the_reference_does_not_import_gguf(fresh_process):
    assert fresh_process["gguf_imported"] is False


@quantised
def test_random_blocks_do_what_their_docstring_says(ggml_type, rng):
    plain = oracle(random_blocks(ggml_type, 2000, rng, specials=False), ggml_type)
    assert plain.isfinite().all() and plain.half().isfinite().all() and plain.std() > 0
    blocks = random_blocks(ggml_type, 200, rng)
    if ggml_type is GGMLType.MXFP4:
        assert blocks[: len(E8M0_SPECIALS), 0].tolist() == E8M0_SPECIALS.tolist()
    elif ggml_type is GGMLType.NVFP4:
        assert blocks[: len(UE4M3_SPECIALS), 0].tolist() == UE4M3_SPECIALS.tolist()
    else:  # gguf-py finds each special where we put it
        specials = torch.from_numpy(HALF_SPECIALS.view(np.float16).astype(np.float32))
        first = oracle(blocks, ggml_type).view(200, -1)[: len(specials)]
        assert first[specials.isnan()].isnan().all()
        assert not first[specials.isinf()].isfinite().any()
        if len(HALF_SCALES.get(ggml_type, (0,))) == 1:
            assert (first[specials == 0] == 0).all() and (first[specials.isfinite() & (specials != 0)] != 0).any()
