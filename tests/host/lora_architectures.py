"""A LoRA of every quantised weight on tiny models of real architectures, from GGUF and by the host on dense weights.

Runs inside the host as `compare_latents.py` does, from whose files and sampling it takes the models: `python
lora_architectures.py FOLDER NAME...`. Prints one JSON line for each architecture.
"""

from __future__ import annotations

import json
import traceback
from pathlib import Path

from host import compare_latents as base  # sets the host up, so it comes first

import comfy.model_management  # isort: skip
import comfy.sd  # isort: skip
import torch  # isort: skip
from host import tiny_files
from host.tiny_models import ARCHITECTURES
from pack.loaders.diffusion import load_diffusion_model
from pack.loaders.quant.layout import is_gguf
from pack.lora.apply import apply
from pack.lora.read import read
from safetensors.torch import save_file

RANK = 4


def adapter_tensors(patcher) -> dict[str, torch.Tensor]:
    """Pairs for every quantised weight; of a convolution, with its kernel in the first factor."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in patcher.model.named_parameters():
        if not (is_gguf(weight) and name.endswith(".weight") and weight.dim() >= 2):
            continue
        stem, (rows, *columns) = name.removesuffix(".weight"), weight.shape
        size = torch.Size(columns).numel()
        down = torch.randn(RANK, *columns, generator=generator) / size**0.5
        up = torch.randn(rows, RANK, *[1] * (len(columns) - 1), generator=generator) * 0.3 / RANK**0.5
        tensors |= {f"{stem}.lora_down.weight": down.bfloat16(), f"{stem}.lora_up.weight": up.bfloat16()}
        tensors[f"{stem}.alpha"] = torch.tensor(3.0)
    return tensors


def compare(name: str, folder: Path) -> dict[str, object]:
    tiny = ARCHITECTURES[name]
    dense, file, lora = (folder / f"{name}.{end}" for end in ("safetensors", "gguf", "lora.safetensors"))
    with tiny_files.shrunk(tiny):
        tensors = tiny_files.tensors_of(tiny)
        tiny_files.write_safetensors(dense, tiny, tensors)
        tiny_files.write_gguf(file, tiny, tensors)
        theirs, ours = base.load_theirs(dense, None), load_diffusion_model(file)
        save_file(adapter_tensors(ours), lora)
        adapter = read(lora)
        plain = base.sample(ours, tiny)
        expected = base.sample(comfy.sd.load_lora_for_models(theirs, None, adapter.tensors, 0.7, 0)[0], tiny)
        applied = {way: apply(adapter, ours, None, 0.7, 0, way) for way in ("merge", "runtime")}
        found = {way: base.sample(one.model, tiny) for way, one in applied.items()}
        result = {
            "weights": applied["merge"].weights,
            "unmatched": len(applied["merge"].unmatched),
            "effect": float((expected - plain).norm() / plain.norm()),
            "difference": {way: float((latent - expected).norm() / expected.norm()) for way, latent in found.items()},
            "repeats": torch.equal(base.sample(applied["runtime"].model, tiny), found["runtime"]),
            "plain_again": torch.equal(base.sample(ours, tiny), plain),
        }
    comfy.model_management.unload_all_models()
    return result


def main() -> None:
    for name in base.NAMES:
        try:
            result = compare(name, Path(base.FOLDER))
        except Exception:
            result = {"error": traceback.format_exc()}
        print(json.dumps({"architecture": name, **result}), flush=True)


if __name__ == "__main__":
    main()
