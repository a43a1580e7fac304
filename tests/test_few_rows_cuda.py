"""The CUDA program that multiplies few rows, run thread by thread on the CPU: every index it makes, and its arithmetic.

g++ compiles kernels/cuda/few_rows.cu behind cuda_on_cpu.h, so that what a GPU would run is run, for each type against
the float64 product. What a CPU cannot show is what NVRTC makes of it; that is in test_few_rows_on_gpu.py.
The tolerance is `bound`, and the rounding of the result to the type of x.
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
from pack.loaders.quant import reference
from pack.loaders.quant.kernels import few_rows, nvrtc

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++")
on_cpu = pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs g++ and Linux's ucontext")
H200 = few_rows.Gpu(132, 232448)
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

MAIN = """
#include "few_rows.cu"

static std::vector<unsigned char> contents(const char* path) {
    FILE* file = std::fopen(path, "rb");
    std::fseek(file, 0, SEEK_END);
    std::vector<unsigned char> bytes(std::ftell(file) + 64);
    std::rewind(file);
    if (std::fread(bytes.data(), 1, bytes.size(), file) != bytes.size() - 64)
        std::exit(2);
    std::fclose(file);
    return bytes;
}

int main(int, char** args) {
    auto weight = contents(args[1]), x = contents(args[2]), bias = contents(args[3]);
    int n = std::atoi(args[5]), k = std::atoi(args[6]), m = std::atoi(args[7]), rows = std::atoi(args[8]);
    int depth = std::atoi(args[9]);
    std::vector<unsigned char> out(n * m * (OUT_IS_F32 ? 4 : 2), 0xff);
    machine::weight = weight.data();
    machine::weight_end = weight.data() + (weight.size() - 64 + 15) / 16 * 16;
    machine::run((n + rows - 1) / rows * SPLIT, THREADS, [&] {
        const u16* rows_of_x = (const u16*)x.data();
        few_rows(weight.data(), rows_of_x, bias.data(), out.data(), n, k, m, rows, depth, std::atoi(args[10]));
    });
    FILE* file = std::fopen(args[4], "wb");
    std::fwrite(out.data(), 1, out.size(), file);
    std::fclose(file);
}
"""


def emulated(
    plan, data: np.ndarray, x: torch.Tensor, bias: torch.Tensor, result: torch.dtype, folder: Path
) -> torch.Tensor:
    """What the program would make of it, in the type `result`."""
    assert COMPILER
    source, program = folder / "main.cpp", folder / "program"
    source.write_text(MAIN)
    defined = [f"-DSHARED={plan.shared}", *plan.definitions(x.dtype, result)]
    places = ["-I", str(nvrtc.SOURCES), "-include", str(ROOT / "tests" / "cuda_on_cpu.h")]
    flags = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-w"]
    flags += [
        "-fsanitize=alignment",
        "-fno-sanitize-recover=alignment",
    ]  # a GPU loads words from multiples of their size
    subprocess.run([COMPILER, *flags, *defined, *places, str(source), "-o", str(program)], check=True)
    (folder / "weight").write_bytes(data.tobytes())
    (folder / "x").write_bytes(x.view(torch.int16).numpy().tobytes())
    (folder / "bias").write_bytes(bias.view(torch.int16).numpy().tobytes())
    files = [str(folder / name) for name in ("weight", "x", "bias", "out")]
    stages, rows = plan.stages_and_rows
    numbers = [plan.n, plan.k, plan.m, rows, stages, 1 if bias.dtype == torch.float32 else 2]
    ran = subprocess.run([str(program), *files, *map(str, numbers)], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    out = np.frombuffer((folder / "out").read_bytes(), dtype=np.uint8).copy()
    return torch.from_numpy(out).view(result).view(plan.m, plan.n)


DEFAULT = ()  # the cut of a large GPU, for a multiprocessor's share of a layer

# Few multiprocessors and warps give programs several tiles, several goes over them and a ring that is used again.
CASES = [  # type, n, k, m, (warps, stages, split), multiprocessors, x, result
    (GGMLType.Q4_0, 70, 3072, 8, DEFAULT, 1, torch.bfloat16, torch.float32),
    (GGMLType.Q8_0, 140, 1024, 8, DEFAULT, 1, torch.bfloat16, torch.float32),
    (GGMLType.Q6_K, 130, 1280, 8, (5, 3), 1, torch.bfloat16, torch.float32),
    (GGMLType.Q8_0, 36, 3072, 1, DEFAULT, 1, torch.bfloat16, torch.float32),
    (GGMLType.Q4_K, 38, 3072, 8, DEFAULT, 1, torch.bfloat16, torch.bfloat16),
    (GGMLType.Q4_K, 24, 5120, 8, DEFAULT, 1, torch.bfloat16, torch.float32),
    (GGMLType.Q8_0, 70, 1024, 8, (4, 3), 1, torch.bfloat16, torch.float32),
    (GGMLType.Q4_K, 70, 3072, 8, (3, 2, 4), 4, torch.bfloat16, torch.float32),
    (GGMLType.Q6_K, 24, 12288, 8, DEFAULT, 2, torch.bfloat16, torch.float32),
    (GGMLType.Q4_K, 36, 12288, 8, DEFAULT, 2, torch.bfloat16, torch.float32),
    (GGMLType.Q8_0, 40, 768, 8, (2, 2), 1, torch.bfloat16, torch.float32),
    (GGMLType.Q8_0, 33, 512, 1, (2, 3), 2, torch.float16, torch.float16),
    (GGMLType.Q8_0, 90, 768, 8, (2, 4), 1, torch.bfloat16, torch.float32),
    (GGMLType.Q4_0, 72, 1024, 5, (2, 3), 2, torch.bfloat16, torch.bfloat16),
    (GGMLType.Q4_K, 40, 768, 8, (2, 2), 1, torch.bfloat16, torch.float32),
    (GGMLType.Q6_K, 40, 768, 8, (2, 2), 1, torch.bfloat16, torch.float32),
    (GGMLType.Q6_K, 77, 1536, 8, (6, 4), 1, torch.bfloat16, torch.float32),
    (GGMLType.Q6_K, 35, 1280, 7, (3, 3), 2, torch.float16, torch.float32),
    (GGMLType.Q4_0, 100, 1280, 8, (2, 3, 2), 4, torch.bfloat16, torch.float32),
    (GGMLType.Q6_K, 40, 1792, 3, (2, 2, 2), 4, torch.bfloat16, torch.float32),
    (GGMLType.Q2_K, 38, 3072, 8, DEFAULT, 1, torch.bfloat16, torch.float32),
    (GGMLType.Q2_K, 40, 768, 5, (2, 2), 1, torch.float16, torch.float32),
    (GGMLType.Q2_K, 40, 1280, 8, (5, 4), 1, torch.bfloat16, torch.float32),
    (GGMLType.Q3_K, 38, 3072, 8, DEFAULT, 1, torch.bfloat16, torch.float32),
    (GGMLType.Q3_K, 35, 1280, 7, (3, 3), 2, torch.float16, torch.float32),
    (GGMLType.Q3_K, 77, 1536, 8, (6, 4), 1, torch.bfloat16, torch.float32),
    (GGMLType.IQ4_NL, 38, 3072, 8, DEFAULT, 1, torch.bfloat16, torch.float32),
    (GGMLType.IQ4_NL, 40, 768, 5, (2, 2), 1, torch.float16, torch.float32),
    (GGMLType.IQ4_XS, 38, 3072, 8, DEFAULT, 1, torch.bfloat16, torch.float32),
    (GGMLType.IQ4_XS, 35, 1280, 7, (3, 3), 2, torch.float16, torch.float32),
    (GGMLType.Q5_K, 40, 768, 8, (2, 2), 1, torch.bfloat16, torch.float32),
    (GGMLType.Q5_0, 40, 768, 4, (2, 2), 1, torch.bfloat16, torch.float32),
    (GGMLType.Q4_1, 40, 768, 8, (2, 2), 1, torch.bfloat16, torch.float32),
    (GGMLType.Q5_1, 40, 768, 6, (3, 2), 1, torch.bfloat16, torch.float32),
]


def bound(ggml_type: GGMLType, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """How far a product of `x` [m, k] and `w` [n, k], float64, may be from the exact one before it is rounded: [m, n].

    A sum of float32 errs by 2^-23 (the matrix instruction cuts off) of the magnitudes that go into it for each of its
    k + 3 additions. Those are |w| |x|, but integers are too large by the zero point. A group holds both a large and a
    small integer, so what goes into its sum is at most three times its largest |w| for each |x|. To be safe that of the
    row is taken. What the zero point of 128 adds for eight bits is within that too. The minima of superblocks meet sums
    of x that are two bfloat16, which err by 2^-17.
    """
    magnitude = x.abs().sum(-1, keepdim=True) * w.abs().amax(1)
    return magnitude * 3 * ((x.shape[-1] + 3) * 2.0**-23 + 2.0**-17)


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(os.environ.get("SLUICE_SEED") or random.SystemRandom().getrandbits(32))
    print(f"to repeat: SLUICE_SEED={seed}")  # pytest shows it when the test fails
    return np.random.default_rng(seed)


@on_cpu
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(getattr(p, "name", p)) for p in c[:5]))
def test_equals_the_exact_product(case, rng, tmp_path):
    ggml_type, n, k, m, cut, multiprocessors, dtype, result = case
    plan = few_rows.Plan(ggml_type, n, k, m, few_rows.Gpu(multiprocessors, H200.shared), few_rows.Cut(*cut))
    data = random_blocks(ggml_type, n * k // BLOCKS[ggml_type].elements, rng, specials=False).reshape(-1)
    w = reference.dequantize(torch.from_numpy(data), ggml_type, (n, k), torch.float32).double()
    x = (torch.from_numpy(rng.standard_normal((m, k)).astype(np.float32)) / 256).to(dtype)
    bias = torch.from_numpy(rng.standard_normal(n).astype(np.float32)).to(result)
    want = x.double() @ w.T
    rounding = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[result]
    got = emulated(plan, data, x, bias, result, tmp_path).double() - bias.double()
    errors = (got - want).abs()
    allowed = bound(ggml_type, x.double(), w) + rounding * (want.abs() + bias.double().abs()) + 2.0**-24
    known = (want + bias.double()).abs() < 0.9 * torch.finfo(result).max
    assert known.any() and (errors / allowed)[known].max() < 1
    if result == torch.float32:
        rounded = (x.double() @ w.bfloat16().double().T - want).abs()
        assert errors.mean() < rounded.mean() / 100


@pytest.mark.parametrize("m", [1, 8])
@pytest.mark.parametrize("ggml_type", few_rows.TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("shape", [(18432, 3072), (3072, 12288), (3072, 15360), (5120, 5120), (1, 256)], ids=str)
@pytest.mark.parametrize("gpu", [H200, few_rows.Gpu(84, 101376), few_rows.Gpu(108, 166912)], ids=str)
def test_a_product_fits_the_gpu(gpu, shape, ggml_type, m):
    """Shared memory, registers, every row in a program, and no two rows that a load touches at once in one bank."""
    plan = few_rows.Plan(ggml_type, *shape, m, gpu)
    stages, rows = plan.stages_and_rows
    assert stages >= 2 and plan.shared <= gpu.shared and plan.threads * 72 <= 65536
    assert (plan.grid // plan.split - 1) * rows < shape[0] <= plan.grid // plan.split * rows
    assert plan.grid % plan.split == 0 and (plan.split == 1 or gpu == H200)
    at_once = few_rows.TYPES[ggml_type].words
    words = {(g * plan.pitch // 4 + c) % 32 for g in range(8 // at_once) for c in range(4 * at_once)}
    assert plan.pitch % 16 == 0 and len(words) == 32


@pytest.mark.parametrize(
    "case", [(GGMLType.IQ2_XS, 64, 256, 1), (GGMLType.Q8_0, 64, 288, 1), (GGMLType.Q8_0, 64, 256, 9)]
)
def test_what_there_is_no_program_for_is_refused(case):
    with pytest.raises(ValueError, match="there is a program for 1 to 8 rows"):
        few_rows.Plan(*case, H200)
