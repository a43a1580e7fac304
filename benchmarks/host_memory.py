"""Whose is the RAM that a process takes while it streams: stage by stage, and by what the memory is mapped for.

    python benchmarks/host_memory.py --model FLUX.gguf [--out results/host_memory.json]

Anonymous and shared memory of this process (pages of files are the system's) after each of these stages, and which
mappings grew:

    native      two blocks of FLUX's shape in bf16 by the host itself: what torch, cuBLAS and attention load anyway
    triton      Triton is imported
    kernels     a weight is dequantised: the pack's kernels are compiled, or come from Triton's cache (TRITON_CACHE_DIR)
    loaded      the model is loaded with Block Swap, half of its blocks swapped
    step, steps the first picture, and a second one
    unloaded    everything has been let go of

PYTHONPATH must hold ComfyUI and its packages; run it by tools/launch.py. Needs an NVIDIA GPU, and Linux.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

SHOWN, LEAST = 5, 4 << 20  # of the mappings that grew most in a stage, those that grew by so many bytes


def own_memory() -> Counter[str]:
    """Bytes that are this process's own, by the file or the use of the mapping."""
    found: Counter[str] = Counter()
    name = ""
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            parts = line.split(maxsplit=5)
            name = Path(parts[5]).name if len(parts) == 6 else "anonymous"
        elif line.startswith("Anonymous:"):
            found[name] += int(line.split()[1]) * 1024
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found["shared"] = int(re.findall(r"RssShmem:\s+(\d+)", status)[0]) * 1024
    return found


class Stages:
    """Notes what a stage added."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._first = self._before = own_memory()

    def ended(self, name: str) -> None:
        now = own_memory()
        grew = {key: now[key] - self._before[key] for key in now if now[key] - self._before[key] >= LEAST}
        by = dict(sorted(grew.items(), key=lambda item: -item[1])[:SHOWN])
        total = now.total() - self._first.total()
        self.rows.append(
            {"stage": name, "total_bytes": total, "added_bytes": now.total() - self._before.total(), "by": by}
        )
        mappings = ", ".join(f"{key} {nbytes / 1e6:.0f}" for key, nbytes in by.items())
        print(f"{name:9} {total / 1e6:7.0f} MB ({self.rows[-1]['added_bytes'] / 1e6:+5.0f}: {mappings})", flush=True)
        self._before = now


def native_blocks(torch: Any) -> None:
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    network = Flux(
        image_model="flux", in_channels=16, out_channels=16, patch_size=2, vec_in_dim=768, context_in_dim=4096,
        hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56],
        theta=10000, txt_ids_dims=[], qkv_bias=True, guidance_embed=True, dtype=torch.bfloat16, device="cuda",
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    for parameter in network.parameters():
        parameter.fill_(0.01)
    values = {"device": "cuda", "dtype": torch.bfloat16}
    for side in (128, 32):
        network(
            torch.zeros(1, 16, side, side, **values), torch.ones(1, **values), torch.zeros(1, 256, 4096, **values),
            torch.zeros(1, 768, **values), torch.ones(1, **values),
        )  # fmt: skip
    torch.cuda.synchronize()


def picture(torch: Any, model: Any) -> None:
    import comfy.sample

    noise = torch.zeros(1, 16, 128, 128)
    condition = [[torch.zeros(1, 256, 4096), {"pooled_output": torch.zeros(1, 768), "guidance": 3.5}]]
    comfy.sample.sample(
        model,
        noise,
        3,
        1.0,
        "euler",
        "simple",
        condition,
        condition,
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=1,
    )
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file of FLUX's shapes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from pack.benchmarks.streaming import start_host

    start_host()
    import comfy.model_management
    import torch
    from pack.loaders.diffusion import load_diffusion_model
    from pack.loaders.gguf.types import GGMLType
    from pack.loaders.quant import dispatch
    from pack.offload.attach import stream
    from pack.offload.blocks import find_blocks
    from pack.offload.costs import SwapRequest
    from pack.offload.streamed_patcher import residency_of

    with torch.inference_mode():
        torch.randn(64, 64, device="cuda") @ torch.randn(64, 64, device="cuda")  # CUDA's own memory is no model's
        stages = Stages()
        native_blocks(torch)
        stages.ended("native")
        import triton  # noqa: F401

        stages.ended("triton")
        data = torch.zeros(64, 34 * 96, dtype=torch.uint8, device="cuda")
        dispatch.dequantize(data, GGMLType.Q8_0, (64, 3072), torch.bfloat16)
        torch.cuda.synchronize()
        stages.ended("kernels")
        model = load_diffusion_model(args.model, disable_dynamic=True)
        blocks = len(find_blocks(model.model.diffusion_model))
        model = stream(model, SwapRequest(blocks_to_swap=blocks // 2))
        comfy.model_management.load_models_gpu([model])
        stages.ended("loaded")
        picture(torch, model)
        stages.ended("step")
        picture(torch, model)
        stages.ended("steps")
        print(residency_of(model).plan, residency_of(model).choice.reason, sep="\n")
        comfy.model_management.unload_all_models()
        del model
        gc.collect()
        comfy.model_management.soft_empty_cache()
        stages.ended("unloaded")
    if args.out:
        gpu = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        args.out.write_text(json.dumps({"hardware": gpu, "stages": stages.rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
