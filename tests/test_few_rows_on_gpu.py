"""The CUDA program for few rows on a GPU that it is taken on, and what is done where it cannot be had.

The tolerance is the one of test_few_rows_cuda.py, derived in its `bound`.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from block_bytes import random_blocks
from pack.loaders.gguf.types import BLOCKS, GGMLType
from pack.loaders.quant import dispatch, reference
from pack.loaders.quant.kernels import few_rows, nvrtc
from test_few_rows_cuda import bound

pytest.importorskip("triton", reason="Triton is not installed: its wheels are for Linux")

MEASURED = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not MEASURED, reason="needs a GPU of compute capability 9.0")
TYPES = (GGMLType.Q4_0, GGMLType.Q8_0, GGMLType.Q4_K, GGMLType.Q6_K)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(os.environ.get("SLUICE_SEED") or random.SystemRandom().getrandbits(32))
    print(f"to repeat: SLUICE_SEED={seed}")  # pytest shows it when the test fails
    return np.random.default_rng(seed)


@pytest.fixture
def multiply():
    """The programs, with nothing found out yet about which of them work."""
    from pack.loaders.quant.kernels import driver, multiply, products

    kept = dict(multiply._failures)
    yield multiply
    multiply._failures.clear()
    multiply._failures.update(kept)
    driver.function.cache_clear()
    products._unbound.cache_clear()


def numbers(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).cuda()


def weight(ggml_type: GGMLType, shape: tuple[int, int], rng: np.random.Generator, lead: int = 0) -> torch.Tensor:
    """The bytes of one, at `lead` past a multiple of 16; what lies around it is no number."""
    blocks = random_blocks(ggml_type, shape[0] * shape[1] // BLOCKS[ggml_type].elements, rng, specials=False)
    data = torch.from_numpy(blocks.reshape(-1))
    around = torch.full((data.numel() + 64,), 0xFF, dtype=torch.uint8, device="cuda")
    inside = around[32 + lead : 32 + lead + data.numel()]
    inside.copy_(data)
    return inside


def product(ggml_type: GGMLType, shape: tuple[int, int], m: int, dtype: torch.dtype, bias: torch.Tensor | None):
    """The program, also where it would not be taken."""
    from pack.loaders.quant.kernels import driver, few_rows, products

    index = torch.cuda.current_device()
    kind = 0 if bias is None else 1 if bias.dtype == torch.float32 else 2
    return products.Product(few_rows.Plan(ggml_type, *shape, m, driver.gpu(index)), dtype, kind, index)


def check(multiply, ggml_type, shape, m, dtype, bias_dtype, rng, lead=0, program=None) -> None:
    """By `multiply.linear`, or by `program`."""
    data = weight(ggml_type, shape, rng, lead)
    w = reference.dequantize(data, ggml_type, shape, torch.float32).double()
    x = (numbers(rng, m, shape[1]) / 256).to(dtype)
    bias = None if bias_dtype is None else numbers(rng, shape[0]).to(bias_dtype)
    plus = 0 if bias is None else bias.double()
    if program:
        got = torch.full((m, shape[0]), 7.0, dtype=dtype, device="cuda")
        program(ggml_type, shape, m, dtype, bias).start(data, x, bias, got)
    else:
        got = multiply.linear(x, data, ggml_type, shape, bias)
    want = x.double() @ w.T
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    allowed = bound(ggml_type, x.double(), w) + rounding * (want + plus).abs() + 2.0**-24
    finite = (want + plus).abs() < 0.9 * torch.finfo(dtype).max
    assert finite.any() and (((got.double() - want - plus).abs() / allowed)[finite] < 1).all()


# Few rows and many, rows that do not fill tiles or programs, long ones in clusters, an odd number of slices.
SHAPES = [(1, 256), (50, 512), (777, 2816), (3072, 3072), (3072, 12288), (9216, 3072), (5000, 5120), (40000, 768)]


@pytest.mark.cuda
@on_hopper
@pytest.mark.parametrize(
    ("ggml_type", "shape"),
    [(t, shape) for t in few_rows.TYPES for shape in (SHAPES if t in TYPES else SHAPES[2:5])],
    ids=lambda p: getattr(p, "name", str(p)),
)
def test_equals_the_exact_product(ggml_type, shape, rng, multiply):
    for m, dtype, bias in (
        (1, torch.bfloat16, torch.bfloat16),
        (8, torch.bfloat16, torch.float32),
        (5, torch.float16, None),
        (2, torch.float16, torch.float16),
    ):
        check(multiply, ggml_type, shape, m, dtype, bias, rng, program=product)


@pytest.mark.cuda
@on_hopper
def test_it_is_taken_where_it_is_faster_and_can_be(rng, multiply):
    from pack.loaders.quant.kernels import products

    def program(ggml_type, columns, lead=0, dtype=torch.bfloat16, rows=9216, m=8):
        data = weight(ggml_type, (rows, columns), rng, lead)
        x = numbers(rng, m, columns).to(dtype)
        return multiply.planned(ggml_type, (rows, columns), data, x, None, m).program

    for ggml_type in TYPES:
        assert program(ggml_type, 3072) == program(ggml_type, 3072, m=1) == products.SOURCE
        assert program(ggml_type, 3072, rows=3072) == products.SOURCE
        assert program(ggml_type, 3072, rows=3072, m=1) != products.SOURCE
    assert set(products.FROM) == set(SCALES)
    assert program(GGMLType.Q8_0, 256) != products.SOURCE
    assert program(GGMLType.Q8_0, 3072, lead=2) != products.SOURCE
    assert program(GGMLType.Q8_0, 288) != products.SOURCE
    assert program(GGMLType.Q8_0, 3072, dtype=torch.float32) != products.SOURCE
    assert program(GGMLType.IQ2_XS, 3072) != products.SOURCE
    assert "CUDA C" in products.choices()[f"cuda:{torch.cuda.current_device()} few rows"]
    check(multiply, GGMLType.Q8_0, (9216, 3072), 8, torch.bfloat16, None, rng, lead=2)


# Where a block has its scales, and scales for which products of products of random blocks neither grow nor vanish.
SCALES = {
    GGMLType.Q8_0: {0: 2.0**-12},
    GGMLType.Q4_0: {0: 2.0**-11},
    GGMLType.Q4_K: {0: 2.0**-14, 2: 7.5 * 2.0**-14},
    GGMLType.Q6_K: {208: 2.0**-16},
    GGMLType.Q4_1: {0: 2.0**-11, 2: -7.5 * 2.0**-11},
    GGMLType.Q5_0: {0: 2.0**-12},
    GGMLType.Q2_K: {80: 2.0**-10, 82: 1.5 * 2.0**-10},
    GGMLType.Q3_K: {108: 2.0**-12},
    GGMLType.Q5_K: {0: 2.0**-15, 2: 15.5 * 2.0**-15},
    GGMLType.IQ4_XS: {0: 2.0**-17},
}


@pytest.mark.cuda
@on_hopper
@pytest.mark.parametrize("ggml_type", SCALES, ids=lambda t: t.name)
def test_bound_calls_in_a_row_wait_for_what_they_read(ggml_type, rng, multiply):
    """Each begins before the one in front has ended and reads what that writes. On a stream of its own, behind a copy
    of x and in front of a kernel that overwrites it."""
    shape = (5120, 5120)  # all numbers of rows are multiplied by the program
    layers = []
    for _ in range(4):
        data, bias = weight(ggml_type, shape, rng), numbers(rng, shape[0]).bfloat16() / 64
        for at, scale in SCALES[ggml_type].items():
            half = torch.tensor(scale, dtype=torch.float16, device="cuda").view(1).view(torch.uint8)
            data.view(-1, BLOCKS[ggml_type].nbytes)[:, at : at + 2] = half

        def unbound(x, data=data, bias=bias):
            return multiply.linear(x, data, ggml_type, shape, bias)

        layers.append((unbound, multiply.bind(data, ggml_type, shape, bias, unbound)))
    stream = torch.cuda.Stream()
    for m in (1, 8):
        start = numbers(rng, m, shape[1]).bfloat16()
        want = start
        for unbound, _ in layers * 3:
            want = unbound(want)
            torch.cuda.synchronize()
        assert want.isfinite().all() and 0.001 < want.abs().mean() < 1000
        stream.wait_stream(torch.cuda.current_stream())
        for _ in range(20):
            with torch.cuda.stream(stream):
                got = start.clone()
                for _, call in layers * 3:
                    before, got = got, call(got)
                    before.zero_()
            stream.synchronize()
            assert torch.equal(got, want)
            with torch.cuda.stream(stream):
                got = start.clone()
                for _, call in layers * 3:
                    got = call(got)
            stream.synchronize()
            assert torch.equal(got, want)
    assert not multiply._failures


@pytest.mark.cuda
@on_hopper
def test_a_source_that_does_not_compile_leaves_the_product_to_triton(rng, multiply, monkeypatch, tmp_path):
    from pack.loaders.quant.kernels import driver, products

    broken = tmp_path / "cuda"
    shutil.copytree(nvrtc.SOURCES, broken)
    with (broken / "few_rows.cu").open("a") as source:
        source.write("\nthis is no C;\n")
    monkeypatch.setattr(nvrtc, "SOURCES", broken)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for cache in (nvrtc.source_of, driver.function, products._unbound):
        cache.cache_clear()
    check(multiply, GGMLType.Q4_K, (9216, 3072), 4, torch.bfloat16, None, rng)
    nvrtc.source_of.cache_clear()
    ((program, why),) = ((p, why) for (p, _), why in multiply._failures.items())
    assert program == products.SOURCE and "this is no C" in why
    assert any("this is no C" in choice for choice in multiply.choices().values())
    assert not nvrtc.folder().exists()


AGAIN = """
import sys, types
sys.modules["pack"] = package = types.ModuleType("pack")
package.__path__ = [sys.argv[1]]
import torch
from pack.loaders.gguf.types import GGMLType
from pack.loaders.quant.kernels import multiply, nvrtc

made = []
compile_it = nvrtc._compile
nvrtc._compile = lambda *args: made.append(args) or compile_it(*args)
data = torch.zeros(9216 * 3072 // 32 * 34, dtype=torch.uint8, device="cuda")
x = torch.ones(1, 3072, dtype=torch.bfloat16, device="cuda")
assert not multiply.linear(x, data, GGMLType.Q8_0, (9216, 3072)).any() and not multiply._failures
print(len(made))
"""


@pytest.mark.cuda
@on_hopper
def test_a_second_process_compiles_nothing_but_what_is_damaged(tmp_path):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}

    def compiled() -> str:
        run = [sys.executable, "-c", AGAIN, str(ROOT)]
        return subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout.strip()

    assert [compiled(), compiled()] == ["1", "0"]
    (kept,) = (tmp_path / "sluice").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert compiled() == "1" and kept.read_bytes() == whole


def test_what_is_kept_is_whole_or_made_again(tmp_path):
    file = tmp_path / "made" / "x.cubin"
    assert nvrtc._read(file) is None
    nvrtc._keep(file, b"code")
    assert nvrtc._read(file) == b"code"
    whole = file.read_bytes()
    for damaged in (b"", whole[:10], whole[:-1], whole + b"\0", bytes([whole[0] ^ 1]) + whole[1:]):
        file.write_bytes(damaged)
        assert nvrtc._read(file) is None
    assert [path.name for path in file.parent.iterdir()] == ["x.cubin"]


def test_the_oldest_make_room(tmp_path):
    for i in range(nvrtc.KEPT + 3):
        nvrtc._keep(tmp_path / f"{i}.cubin", b"code")
        os.utime(tmp_path / f"{i}.cubin", (i, i))
    nvrtc._keep(tmp_path / "last.cubin", b"code")
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == nvrtc.KEPT and "last.cubin" in left and "3.cubin" not in left and "4.cubin" in left


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    nvrtc._keep(tmp_path / "file" / "x.cubin", b"code")
    assert nvrtc._read(tmp_path / "file" / "x.cubin") is None


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA")
def test_where_there_is_no_nvrtc_the_reason_is_told():
    with pytest.raises(nvrtc.CudaError, match=r"no NVRTC: .*libnvrtc"):
        nvrtc.library()


def test_other_devices_have_no_such_program():
    from pack.loaders.quant.kernels import products

    x, data = torch.zeros(1, 256, dtype=torch.bfloat16), torch.zeros(4 * 144, dtype=torch.uint8)
    assert products.planned(GGMLType.Q4_K, (4, 256), data, x, None, 1) is None
    assert not any("CUDA C" in choice for choice in dispatch.choices().values())


@pytest.mark.cuda
@on_hopper
@pytest.mark.parametrize("m", [9, 16, 17, 24])
@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_more_rows_go_in_eights(ggml_type: GGMLType, m: int, multiply, rng: np.random.Generator) -> None:
    shape = (9216, 3072)
    data, bias = weight(ggml_type, shape, rng), numbers(rng, shape[0]).bfloat16()
    x = numbers(rng, 1, m, shape[1]).bfloat16()
    assert dispatch.few_elements("cuda", ggml_type, shape) == 24 * shape[1]
    parts = [multiply.linear(part, data, ggml_type, shape, bias) for part in x[0].split(8)]
    call = dispatch.bind_linear(data, ggml_type, shape, bias)
    for _ in range(3):
        assert torch.equal(dispatch.linear_of_few(x, data, ggml_type, shape, bias), torch.cat(parts)[None])
        assert torch.equal(call(x), torch.cat(parts)[None])
    many = numbers(rng, 25, shape[1]).bfloat16()
    assert dispatch.linear_of_few(many, data, ggml_type, shape, bias) is None
    assert multiply.linear(many, data, ggml_type, shape, bias) is None and not multiply._failures
