"""The kernels compile to machine code for GPUs that the tests do not run on: Triton needs none of them for that.

Every type for an AMD Instinct; for AMD Radeons and NVIDIA's Ampere and Blackwell, two of them. What the machine code
does there is not shown by this.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pack.loaders.gguf.types import QUANTISED

pytest.importorskip("triton", reason="Triton is not installed: its wheels are for Linux")

SOME = ("Q4_K", "IQ2_S")
COMPILE = """
import json, sys, types
sys.modules["pack"] = package = types.ModuleType("pack")
package.__path__ = [sys.argv[1]]
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pack.loaders.gguf.types import GGMLType
from pack.loaders.quant.kernels import launch, programs

TENSORS = {torch.float32: "*fp32", torch.int32: "*i32"}
backend, architecture, width = json.loads(sys.argv[2])

def compiled(program, pointers, integers, constants, warps):
    kinds = [TENSORS[v.dtype] if isinstance(v, torch.Tensor) else "constexpr" for v in constants]
    kinds = [*pointers, *integers, *kinds]
    at = len(pointers) + len(integers)
    known = {(at + i,): v for i, v in enumerate(constants) if not isinstance(v, torch.Tensor)}
    source = ASTSource(program, dict(zip(program.arg_names, kinds, strict=True)), known)
    target = GPUTarget(backend, architecture, width)
    return list(triton.compile(source, target=target, options={"num_warps": warps}).asm)[-1]

made = {}
data = torch.empty(64, dtype=torch.uint8)
for name in sys.argv[3:]:
    ggml_type = GGMLType[name]
    kernel = launch.KERNELS[ggml_type]
    head = launch.decoder(kernel, ggml_type, data, kernel.per_block)
    lanes, warps = kernel.small
    last = [compiled(programs.dequantize, ["*u8", "*bf16"], ["i32"], (*head, lanes, False), warps)]
    if name in ("Q4_K", "IQ2_S"):
        head = launch.decoder(kernel, ggml_type, data, kernel.skinny_per_block)
        cut = 4, 2, kernel.skinny_rows, kernel.skinny_lanes
        pointers = ["*u8", *["*bf16"] * 3]
        last.append(compiled(programs.skinny, pointers, ["i32", "i32"], (*head, *cut), kernel.skinny_lanes // 32))
    made[name] = last
print(json.dumps(made))
"""

TARGETS = {
    "AMD Instinct MI300": ("hip", "gfx942", 64),
    "AMD Radeon 7900": ("hip", "gfx1100", 32),
    "NVIDIA A100": ("cuda", 80, 32),
    "NVIDIA RTX 5090": ("cuda", 120, 32),
}


@pytest.mark.slow
@pytest.mark.parametrize("gpu", TARGETS)
def test_compiles_for(gpu: str) -> None:
    root = Path(__file__).resolve().parents[1]
    names = sorted(t.name for t in QUANTISED) if "Instinct" in gpu else SOME
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = [sys.executable, "-W", "ignore", "-c", COMPILE, str(root), json.dumps(TARGETS[gpu]), *names]
    done = subprocess.run(run, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(done.stdout.splitlines()[-1])
    assert set(made) == set(names)
    assert {kind for kinds in made.values() for kind in kinds} == {{"hip": "hsaco", "cuda": "cubin"}[TARGETS[gpu][0]]}
