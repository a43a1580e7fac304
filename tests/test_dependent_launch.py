"""Kernels that are launched before the one in front has ended wait for its end before they touch any memory."""

# ruff: noqa: N803  (upper case marks what is known at compile time, as is usual in Triton)
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from block_bytes import random_blocks
from pack.loaders.gguf.types import BLOCKS, GGMLType
from pack.loaders.quant import dispatch, reference

pytest.importorskip("triton", reason="Triton is not installed: its wheels are for Linux")
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, globaltimer

with pytest.MonkeyPatch.context() as patch:
    # What @triton.jit makes of a kernel is decided when the kernel's module is imported.
    if not torch.cuda.is_available():
        patch.setenv("TRITON_INTERPRET", "1")
    from pack.loaders.quant.kernels import dependent, launch

SHAPE = (1024, 3072)
TYPES = pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "IQ4_NL"])

COMPILE = """
import sys, types
sys.modules["pack"] = package = types.ModuleType("pack")
package.__path__ = [sys.argv[1]]
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pack.loaders.gguf.types import BLOCKS, GGMLType
from pack.loaders.quant.kernels import dependent, launch, programs

kernel, layout = launch.KERNELS[GGMLType[sys.argv[2]]], BLOCKS[GGMLType[sys.argv[2]]]
early = sys.argv[3] == "early"
blocks = kernel.chunks, kernel.decode, layout.nbytes, layout.elements, kernel.per_block, 2
constants = {(4 + i,): value for i, value in enumerate((*blocks, 64, early))}
kinds = ["*u8", "*bf16", "i32", "*fp32"] + ["constexpr"] * len(constants)
source = ASTSource(programs.dequantize, dict(zip(programs.dequantize.arg_names, kinds)), constants)
options = {"num_warps": 1, **(dependent.OPTIONS if early else {})}
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
assert compiled.metadata.launch_pdl == early
print(compiled.asm["ptx"])
"""


def instructions(name: str, how: str) -> list[str]:
    """The program's PTX for compute capability 9.0; it is compiled without a GPU."""
    root = Path(__file__).resolve().parents[1]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = [sys.executable, "-c", COMPILE, str(root), name, how]
    return subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout.splitlines()


@TYPES
def test_no_memory_is_touched_before_the_wait(name: str) -> None:
    lines = instructions(name, "early")
    (wait,) = (n for n, line in enumerate(lines) if "griddepcontrol.wait" in line)
    touched = [n for n, line in enumerate(lines) if "global" in line and ("ld." in line or "st." in line)]
    assert len(touched) > 4 and min(touched) > wait
    assert not any("griddepcontrol.launch_dependents" in line for line in lines)


def test_without_it_there_is_no_wait() -> None:
    assert not any("griddepcontrol" in line for line in instructions("Q8_0", "late"))


def weight(name: str, device: str, seed: int) -> torch.Tensor:
    count = SHAPE[0] * SHAPE[1] // BLOCKS[GGMLType[name]].elements
    blocks = random_blocks(GGMLType[name], count, np.random.default_rng(seed), specials=False)
    return torch.from_numpy(blocks).reshape(-1).to(device)


def test_a_launch_that_fails_is_given_up_and_the_reason_kept(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """Triton's interpreter cannot wait for a kernel, its compiler does not know the option."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    monkeypatch.setitem(dependent._reasons, device, None)
    monkeypatch.setattr(dependent, "OPTIONS", {"no_such_option": True})
    blocks = random_blocks(GGMLType.TQ1_0, 7, np.random.default_rng(5), specials=False)
    data = torch.from_numpy(blocks).reshape(-1).to(device)
    assert dependent.allowed(device)
    dense = launch.dequantize(data, GGMLType.TQ1_0, (7, 256), torch.float32)
    assert torch.equal(dense, reference.dequantize(data, GGMLType.TQ1_0, (7, 256), torch.float32))
    assert not dependent.allowed(device) and "it failed" in str(dependent._reasons[device])
    assert "launching them early failed" in caplog.text


@triton.jit
def slow_and_hasty(out, seen, fresh, data, words_of_out, words_of_data, nanoseconds, WORDS: tl.constexpr):
    """Says at once that it can be followed; after that time copies `out` to `seen` and `fresh` to `data`."""
    gdc_launch_dependents()
    begun = globaltimer()
    now = begun
    while now - begun < nanoseconds:
        now = globaltimer()
    word = tl.arange(0, WORDS)
    for start in range(tl.program_id(0) * WORDS, words_of_out, tl.num_programs(0) * WORDS):
        inside = start + word < words_of_out
        tl.store(seen + start + word, tl.load(out + start + word, mask=inside), mask=inside)
    for start in range(tl.program_id(0) * WORDS, words_of_data, tl.num_programs(0) * WORDS):
        inside = start + word < words_of_data
        tl.store(data + start + word, tl.load(fresh + start + word, mask=inside), mask=inside)


def words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32).reshape(-1)


@pytest.fixture
def early() -> None:
    """Skips the test where there is no such launch."""
    device = torch.device("cuda", torch.cuda.current_device())
    if not dependent.allowed(device):
        pytest.skip(str(dependent.choices()))


@pytest.mark.cuda
@TYPES
def test_what_the_kernel_in_front_does_late_is_waited_for(name: str, early: None) -> None:
    """It reads what was in the dense weight's memory, and writes the bytes, while the next one is already there."""
    ggml_type = GGMLType[name]
    data, first = weight(name, "cuda", 0), weight(name, "cuda", 1)
    out = torch.empty(SHAPE, dtype=torch.bfloat16, device="cuda")
    seen = torch.empty_like(out)
    for turn in range(6):
        before, fresh = out.clone(), weight(name, "cuda", turn) if turn % 2 else first
        args = words(out), words(seen), words(fresh), words(data)
        torch.cuda.synchronize()
        slow_and_hasty[(8,)](*args, args[0].numel(), args[3].numel(), 300_000, 1024)
        launch.dequantize(data, ggml_type, SHAPE, torch.bfloat16, out=out)
        assert torch.equal(seen.view(torch.int16), before.view(torch.int16)), "written too early"
        assert torch.equal(data, fresh)
        assert torch.equal(out, reference.dequantize(fresh, ggml_type, SHAPE, torch.bfloat16)), "read too early"


@pytest.mark.cuda
@TYPES
def test_a_captured_graph_makes_what_the_bytes_are_when_it_runs(name: str, early: None) -> None:
    ggml_type, kind = GGMLType[name], torch.bfloat16
    data, fresh = weight(name, "cuda", 0), weight(name, "cuda", 0)
    bound = launch.bind(data, ggml_type, SHAPE, kind)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        data.copy_(fresh)  # no kernel is in front of the first
        one = bound()
        half = one * 0.5
        other = launch.dequantize(data, ggml_type, SHAPE, kind)
    for seed in range(1, 4):
        fresh.copy_(weight(name, "cuda", seed))
        graph.replay()
        dense = reference.dequantize(fresh, ggml_type, SHAPE, kind)
        assert torch.equal(one, dense) and torch.equal(half, dense * 0.5) and torch.equal(other, dense)


@pytest.mark.cuda
def test_the_report_says_how_kernels_are_launched(early: None) -> None:
    device = f"cuda:{torch.cuda.current_device()}"
    dispatch.dequantize(weight("Q8_0", device, 0), GGMLType.Q8_0, SHAPE, torch.bfloat16)
    assert dispatch.choices()[f"{device} launch"] == "while the kernel before ends"
