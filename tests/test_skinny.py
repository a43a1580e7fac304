"""Multiplying by a quantised weight without dequantising it, against float64 products of the exact weight.

[Note: Tolerance]
A float32 sum of n products, in any order, each rounded at most twice, errs by at most gamma = (n + 2) 2^-24 times the
sum of the magnitudes that went into it. Those are |w| |x|, but where a type has a minimum, w = s q - m, the sums of
s q x and of m x are taken apart. A sub-block of 32 or 16 random q holds both a large and a small q, so that s q and m
are at most three times its largest |w|; to be safe that of the row is taken. Then the result is rounded to the type
of x, by at most 2^-8 (bfloat16), 2^-11 (float16) or 2^-24 of it, and float16 has its subnormals.
Matrix instructions are given integers that are 128 too large, or less than 256 with the type's own zero; what that adds
is taken off the sum of each sub-block. Such a sum is made by at most 16 additions that each err by 2^-23 (the unit cuts
off) of 256 s |x|, and s, the step between two numbers, is at most the row's largest |w|: half of 2^-11 of that, twice
for the two parts of a signed byte. In tiles the integers are too large by the zero point alone, at most 128, and each
sum of x that a minimum is multiplied by errs by 2^-17 of it: both are within that.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

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
    from pack.loaders.quant.kernels import multiply, staging, tiling

# Each type by the program for matrix instructions, with a number of rows and a type of x in turn.
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BY_MATRIX = [(t, [1, 2, 3, 8][i % 4], DTYPES[i % 3]) for i, t in enumerate(multiply.FRAGMENTS)]

# By tiles, one or two of them, likewise. With few blocks and warps, for Triton's interpreter takes seconds for each.
BY_TILES = [
    (t, 1 + tiles, [5, 8, 7][(i + tiles) % 3], DTYPES[(i + 2 * tiles) % 3])
    for i, t in enumerate(tiling.TILINGS)
    for tiles in range(2)
]


def few_tiles(ggml_type: GGMLType, tiles: int = 1) -> tiling.Tiling:
    segment = 1 if BLOCKS[ggml_type].elements == 256 else 2
    return replace(tiling.TILINGS[ggml_type], small=tiling.Cut(tiles, segment, stages=2, warps=2, above=0))


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


def check(x: torch.Tensor, ggml_type: GGMLType, rows: int, rng: np.random.Generator, config=None) -> None:
    columns = x.shape[-1]
    data, w = weight(ggml_type, (rows, columns), rng)
    bias = numbers(rng, rows).to(x.dtype)
    got = multiply.linear(x, data, ggml_type, (rows, columns), bias, config)
    assert got.dtype == x.dtype and got.shape == (*x.shape[:-1], rows)
    want = x.double() @ w.T + bias.double()
    magnitude = x.double().abs().sum(-1, keepdim=True) * 3 * w.abs().amax(1) + bias.double().abs()
    bound = (columns + 3) * 2.0**-24 * magnitude + ROUNDING[x.dtype] * want.abs() + 2.0**-25
    if ggml_type in multiply.FRAGMENTS:
        bound += 2.0**-11 * x.double().abs().sum(-1, keepdim=True) * w.abs().amax(1)
    if DEVICE.type == "cpu" and x.dtype == torch.bfloat16:
        bound += ROUNDING[x.dtype] * want.abs()  # the interpreter cuts off where it should round
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


@pytest.mark.parametrize(("ggml_type", "m", "dtype"), BY_MATRIX, ids=lambda p: getattr(p, "name", str(p)))
def test_by_matrix_instructions(ggml_type, m, dtype, rng):
    """Nine rows and few blocks: neither whole programs nor whole steps. Without a GPU the instruction is worked out."""
    columns = 512 if BLOCKS[ggml_type].elements == 256 else 9 * 32
    check((numbers(rng, m, columns) / 256).to(dtype), ggml_type, 9, rng, multiply.FRAGMENTS[ggml_type])


@pytest.mark.parametrize(("ggml_type", "tiles", "m", "dtype"), BY_TILES, ids=lambda p: getattr(p, "name", str(p)))
def test_by_tiles(ggml_type, tiles, m, dtype, rng):
    """Like the above; without a GPU the bytes are not copied but read where they lie."""
    columns = 768 if BLOCKS[ggml_type].elements == 256 else 5 * 32
    check((numbers(rng, m, columns) / 256).to(dtype), ggml_type, 9, rng, few_tiles(ggml_type, tiles))


@pytest.mark.parametrize("align", [16, 8, 4, 2, 1])
@pytest.mark.parametrize("ggml_type", tiling.TILINGS, ids=lambda t: t.name)
def test_segments_fit_shared_memory_without_two_rows_in_a_bank(ggml_type, align):
    """32 lanes read a word each at once, 16 lanes two: eight rows or four, from as many banks as there are words."""
    by = tiling.TILINGS[ggml_type]
    for cut in (by.large, by.small):
        nbytes = cut.segment * BLOCKS[ggml_type].nbytes
        pitch = tiling.pitch(nbytes, align, by.width)
        assert pitch % 16 == 0 and pitch >= -(-(nbytes + 16 - align) // 16) * 16
        assert pitch * 16 * cut.tiles * cut.stages * cut.warps <= staging.LIMIT
        words = {(g * pitch // 4 + k) % 32 for g in range(32 // by.width) for k in range(by.width)}
        assert len(words) == 32


@pytest.mark.parametrize(
    "right", [multiply.FRAGMENTS[GGMLType.Q4_0], few_tiles(GGMLType.Q4_0)], ids=["matrix", "tiles"]
)
def test_a_program_that_is_wrong_is_noticed(right, rng):
    """As one would be whose lanes hold other elements than the instruction takes them for."""
    data, _ = weight(GGMLType.Q4_0, (9, 128), rng)
    x = numbers(rng, 1, 128)
    multiply.linear(x, data, GGMLType.Q4_0, (9, 128), None, right)
    with pytest.raises(multiply.WrongResultError):
        multiply.linear(x, data, GGMLType.Q4_0, (9, 128), None, replace(right, zero=right.zero + 4))


@quantised
def test_half_precision_input_of_any_rank(ggml_type, rng):
    check((numbers(rng, 2, 1, 512) / 256).to(torch.float16), ggml_type, 6, rng)  # no product overflows


NEARER = [(ggml_type, None) for ggml_type in sorted(QUANTISED)]
NEARER += [(t, multiply.FRAGMENTS[t]) for t in (GGMLType.Q2_K, GGMLType.Q8_0)]
NEARER += [(t, few_tiles(t)) for t in (GGMLType.Q4_K, GGMLType.Q8_0)]


@pytest.mark.parametrize(("ggml_type", "config"), NEARER, ids=lambda p: getattr(p, "name", type(p).__name__))
def test_nearer_than_the_weight_rounded_to_bfloat16(ggml_type, config, rng):
    """On random data; the types whose numbers bfloat16 holds exactly lose nothing by that rounding."""
    data, w = weight(ggml_type, (8, 512), rng)
    x = numbers(rng, 2, 512)
    want = x.double() @ w.T
    rounded = x.double() @ w.bfloat16().double().T
    error = (multiply.linear(x, data, ggml_type, (8, 512), None, config).double() - want).abs()
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
    assert torch.equal(multiply.linear(x, moved, ggml_type, (3, 256)), multiply.linear(x, data, ggml_type, (3, 256)))


def test_lanes_without_a_block_of_their_own_add_nothing(rng):
    """They repeat the last block of the row. Here it is infinite, in another row than the one looked at."""
    blocks = random_blocks(GGMLType.Q8_0, 2 * 3, rng, specials=False)
    blocks[5, :2] = (0x00, 0x7C)
    data = torch.from_numpy(blocks.reshape(-1)).to(DEVICE)
    y = multiply.linear(numbers(rng, 1, 96), data, GGMLType.Q8_0, (2, 96))
    assert y[0, 0].isfinite() and not y[0, 1].isfinite()


def test_no_rows_make_no_rows(rng):
    data, _ = weight(GGMLType.Q4_K, (4, 256), rng)
    assert multiply.linear(numbers(rng, 0, 256), data, GGMLType.Q4_K, (4, 256)).shape == (0, 4)


def test_more_rows_than_are_worth_it_make_none(rng):
    data, _ = weight(GGMLType.Q4_K, (4, 256), rng)
    assert multiply.linear(numbers(rng, multiply.SKINNY_ROWS + 1, 256), data, GGMLType.Q4_K, (4, 256)) is None


@pytest.mark.parametrize(
    ("x_shape", "bias_shape", "what"),
    [((9, 512), (4,), "x of shape"), ((1, 512), (4,), "x of shape"), ((1, 256), (5,), "bias")],
    ids=str,
)
def test_what_does_not_fit_is_refused(x_shape, bias_shape, what, rng):
    data, _ = weight(GGMLType.Q4_K, (4, 256), rng)
    with pytest.raises(ValueError, match=what):
        multiply.linear(numbers(rng, *x_shape), data, GGMLType.Q4_K, (4, 256), numbers(rng, *bias_shape))


COMPILE = """
import re, sys, types
sys.modules["pack"] = package = types.ModuleType("pack")
package.__path__ = [sys.argv[1]]
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pack.loaders.gguf.types import GGMLType
from pack.loaders.quant.kernels import matrix, multiply, tiles, tiling

if sys.argv[2] == "tiles":
    by, program = tiling.TILINGS[GGMLType.Q4_K], tiles.tiles
    values = tiling.arguments(by, by.small, GGMLType.Q4_K, 3072, 16, False)
else:
    fragment, program = multiply.FRAGMENTS[GGMLType.Q4_K], matrix.matrix
    head = fragment.places, fragment.decode, fragment.units, fragment.minus_zero
    values = *head, 144, 256, 16, 12, int(sys.argv[2]), 4, 2, False
kinds = ["*u8", "*bf16", "*bf16", "*bf16", "i32", "i32"] + ["constexpr"] * len(values)
constants = {(6 + i,): value for i, value in enumerate(values)}
aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
source = ASTSource(program, dict(zip(program.arg_names, kinds)), constants, aligned)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
ir = compiled.asm["ttgir"]
layouts = dict(re.findall(r"^(#\\w+) = (#ttg.blocked<.*>)$", ir, re.M))
instructions = [line for line in ir.splitlines() if "elementwise_inline_asm" in line]
used = {name for line in instructions for name in re.findall(r"#\\w+(?=>)", line)}
print(*(layouts[name] for name in used), "mma.sync" in compiled.asm["ptx"], sep=";")
"""


@pytest.mark.parametrize("m", ["1", "8", "tiles"])
def test_lanes_lie_as_the_instruction_reads_them(m):
    """Element i of a tensor of a program is lane i's. Triton decides that; it compiles without a GPU."""
    root = Path(__file__).resolve().parents[1]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = [sys.executable, "-c", COMPILE, str(root), m]
    printed = subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout.strip()
    natural = "#ttg.blocked<{sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [4], order = [0]}>"
    assert printed == f"{natural};True"


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "IQ2_XS"])
def test_a_bound_call_gives_the_same_product(name, rng):
    """Again and again, for other x, other numbers of rows and x that is not contiguous."""
    ggml_type = GGMLType[name]
    data, _ = weight(ggml_type, (5, 512), rng)
    bias = numbers(rng, 5)

    def unbound(x: torch.Tensor) -> torch.Tensor:
        return multiply.linear(x, data, ggml_type, (5, 512), bias)

    call = multiply.bind(data, ggml_type, (5, 512), bias, unbound)
    for x in (numbers(rng, 1, 512), numbers(rng, 1, 512), numbers(rng, 2, 512), numbers(rng, 512, 2).t()):
        assert torch.equal(call(x), unbound(x)) and torch.equal(call(x), unbound(x))


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_call_is_bound_to_its_own_gpu(rng):
    """Asked for, the first time and later, while the other one is current, and while its own is."""
    data, _ = weight(GGMLType.Q8_0, (64, 512), rng)
    there, x = data.to("cuda:1"), numbers(rng, 2, 512)
    want = multiply.linear(x, data, GGMLType.Q8_0, (64, 512))

    def unbound(x: torch.Tensor) -> torch.Tensor:
        return multiply.linear(x, there, GGMLType.Q8_0, (64, 512))

    call = multiply.bind(there, GGMLType.Q8_0, (64, 512), None, unbound)
    for current in (0, 0, 1, 1, 0):
        with torch.cuda.device(current):
            assert torch.equal(call(x.to("cuda:1")).to(want.device), want)


def test_a_bound_call_refuses_what_it_is_told_to():
    data = torch.zeros(4 * 34, dtype=torch.uint8, device=DEVICE)
    call = multiply.bind(data, GGMLType.Q8_0, (4, 32), None, lambda x: None)
    assert call(torch.zeros(1, 32, device=DEVICE)) is None


@pytest.mark.cuda
@quantised
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_of_a_model(ggml_type, dtype, rng):
    """Twice, for the kept kernel's own path."""
    for m in (1, 2, 2, 7):
        check(numbers(rng, m, 3072).to(dtype), ggml_type, 6147, rng)


@pytest.mark.cuda
@pytest.mark.parametrize("ggml_type", tiling.TILINGS, ids=lambda t: t.name)
@pytest.mark.parametrize("offset", [0, 2, 8])
@pytest.mark.parametrize("columns", [3072, 2816, 256])
def test_tiles_of_rows_that_begin_anywhere(ggml_type, offset, columns, rng):
    """Rows that end within a segment or a step, and bytes before and after them that are no numbers."""
    by = tiling.TILINGS[ggml_type]
    data, w = weight(ggml_type, (83, columns), rng)
    buffer = torch.full((data.numel() + 64,), 0xFF, dtype=torch.uint8, device=DEVICE)
    moved = buffer[32 + offset : 32 + offset + data.numel()]
    moved.copy_(data)
    x = numbers(rng, 8, columns)
    bound = (x.double().abs() @ w.abs().T).amax() * 2.0**-10
    for config in (by, replace(by, small=by.large)):
        y = multiply.linear(x, moved, ggml_type, (83, columns), None, config)
        assert ((y.double() - x.double() @ w.T).abs() <= bound).all()
