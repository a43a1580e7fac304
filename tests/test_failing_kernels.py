"""A kernel that does not work leaves its type, and no other, to torch: the same bits, the reason kept, told once.

Without a GPU the kernels are those of Triton's interpreter, chosen for the CPU by hand. The one that fails has a
decoder that no Triton compiles.
"""

# ruff: noqa: N803  (upper case marks what is known at compile time, as is usual in Triton)
from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from block_bytes import random_blocks
from pack.loaders.gguf.types import BLOCKS, GGMLType
from pack.loaders.quant import dispatch, reference

pytest.importorskip("triton", reason="Triton is not installed: its wheels are for Linux")
import triton
import triton.language as tl

DEVICE = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
SHAPE = (6, 512)

with pytest.MonkeyPatch.context() as patch:
    # What @triton.jit makes of a kernel is decided where it is defined.
    if DEVICE.type == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")
    from pack.loaders.quant import kernels
    from pack.loaders.quant.kernels import launch, multiply

    @triton.jit
    def broken(src, lane, magic, table, ALIGN: tl.constexpr, PER_BLOCK: tl.constexpr):
        return magic.there_is_no_such_function(lane)


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(autouse=True)
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known yet of what works, and kernels serve the device."""
    for name in ("_failures", "_not_few", "_too_large"):
        monkeypatch.setattr(dispatch, name, {})
    monkeypatch.setattr(dispatch, "_chosen", {DEVICE.type: (kernels, "triton")})
    monkeypatch.setattr(multiply, "_failures", {})


def break_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> GGMLType:
    ggml_type = GGMLType[name]
    monkeypatch.setitem(launch.KERNELS, ggml_type, replace(launch.KERNELS[ggml_type], decode=broken))
    return ggml_type


def blocks_of(ggml_type: GGMLType) -> torch.Tensor:
    count = SHAPE[0] * SHAPE[1] // BLOCKS[ggml_type].elements
    blocks = random_blocks(ggml_type, count, np.random.default_rng(11), specials=False)
    return torch.from_numpy(blocks).reshape(-1).to(DEVICE)


@pytest.mark.parametrize("bound", [False, True], ids=["called", "bound"])
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "IQ3_S"])
def test_torch_takes_over_and_it_is_told_once(
    name: str, bound: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ggml_type = break_kernel(name, monkeypatch)
    data = blocks_of(ggml_type)
    want = reference.dequantize(data, ggml_type, SHAPE, torch.float16)
    for _ in range(3):
        if bound:
            got = dispatch.bind(data, ggml_type, SHAPE, torch.float16)()
        else:
            got = dispatch.dequantize(data, ggml_type, SHAPE, torch.float16)
        assert torch.equal(got, want)
    reason = dispatch.choices()[f"{DEVICE.type} {name}"]
    assert reason.startswith("torch: its kernel failed: ") and "there_is_no_such_function" in reason
    assert len([r for r in caplog.records if r.levelname == "WARNING" and name in r.getMessage()]) == 1


def test_other_types_keep_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = break_kernel("Q4_K", monkeypatch)
    dispatch.dequantize(blocks_of(failing), failing, SHAPE, torch.float16)
    used, run = [], launch.run_dequantize

    def noted(kernel: launch.Kernel, ggml_type: GGMLType, *args: Any) -> None:
        used.append(ggml_type)
        run(kernel, ggml_type, *args)

    monkeypatch.setattr(launch, "run_dequantize", noted)
    for ggml_type in (failing, GGMLType.Q5_K):
        data = blocks_of(ggml_type)
        want = reference.dequantize(data, ggml_type, SHAPE, torch.float16)
        assert torch.equal(dispatch.dequantize(data, ggml_type, SHAPE, torch.float16), want)
    assert used == [GGMLType.Q5_K]


def test_few_rows_are_torchs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ggml_type = break_kernel("IQ2_XS", monkeypatch)
    data, x = blocks_of(ggml_type), torch.ones(1, SHAPE[1], device=DEVICE)
    assert dispatch.few_elements(DEVICE.type, ggml_type, SHAPE) >= x.numel()
    call = dispatch.bind_linear(data, ggml_type, SHAPE, None)
    assert call is not None and call(x) is None and call(x) is None
    assert dispatch.linear_of_few(x, data, ggml_type, SHAPE, None) is None
    product = dispatch.linear_of_few_op(x, data, int(ggml_type), SHAPE, None)
    assert torch.equal(product, torch.nn.functional.linear(x, reference.dequantize(data, ggml_type, SHAPE)))


def test_few_rows_that_fail_leave_the_weights_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object) -> None:
        raise RuntimeError("out of registers")

    monkeypatch.setattr(multiply, "linear", failing)
    ggml_type = GGMLType.Q4_K
    data, x = blocks_of(ggml_type), torch.ones(1, SHAPE[1], device=DEVICE)
    assert dispatch.linear_of_few(x, data, ggml_type, SHAPE, None) is None
    assert dispatch.few_elements(DEVICE.type, ggml_type, SHAPE) == -1
    assert not dispatch._failures and dispatch._kernels(DEVICE.type, ggml_type) is kernels
    assert "out of registers" in dispatch.choices()[f"{DEVICE.type} Q4_K few rows"]


def test_what_triton_refuses_is_a_fault_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise ValueError("Pointer argument (at 0) cannot be accessed from Triton")

    monkeypatch.setattr(launch, "run_dequantize", refused)
    data = blocks_of(GGMLType.Q8_0)
    want = reference.dequantize(data, GGMLType.Q8_0, SHAPE, torch.float16)
    assert torch.equal(dispatch.dequantize(data, GGMLType.Q8_0, SHAPE, torch.float16), want)
    assert "cannot be accessed" in dispatch.choices()[f"{DEVICE.type} Q8_0"]


def test_memory_that_runs_out_is_no_fault_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(launch, "run_dequantize", full)
    with pytest.raises(torch.OutOfMemoryError):
        dispatch.dequantize(blocks_of(GGMLType.Q8_0), GGMLType.Q8_0, SHAPE, torch.float16)
    assert not dispatch._failures


def test_bytes_that_do_not_fit_are_no_fault_of_the_kernel() -> None:
    with pytest.raises(ValueError, match="Q8_0"):
        dispatch.dequantize(blocks_of(GGMLType.Q8_0)[:-1], GGMLType.Q8_0, SHAPE, torch.float16)
    assert not dispatch._failures


def test_factors_that_do_not_fit_are_no_fault_of_the_kernel() -> None:
    data, a, b = blocks_of(GGMLType.Q8_0), torch.zeros(4, 512, device=DEVICE), torch.zeros(6, 5, device=DEVICE)
    with pytest.raises(ValueError, match="do not fit"):
        product = slice(0, 6), a.bfloat16(), b.bfloat16()
        dispatch.dequantize_with_products(data, GGMLType.Q8_0, SHAPE, [product])
    assert not dispatch._too_large
