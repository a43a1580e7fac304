"""A LoRA of every quantised weight on tiny models of real architectures, resident and with Block Swap, compared.

Runs inside the host as `swap_architectures.py` does, whose devices and plans it uses: `python
lora_swap_architectures.py FOLDER NAME...`. Prints one JSON line for each architecture.
"""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER, *NAMES = sys.argv[1:]
sys.argv = [sys.argv[0], FOLDER]  # no names: nothing is compared while it is imported
from host import swap_architectures as base  # noqa: E402  (sets the host up, so it comes first)

import comfy.model_management  # noqa: E402  isort: skip
import torch  # noqa: E402  isort: skip
from host import compare_latents, tiny_files  # noqa: E402
from host.lora_architectures import adapter_tensors  # noqa: E402
from host.tiny_models import ARCHITECTURES  # noqa: E402
from pack.loaders.diffusion import load_diffusion_model  # noqa: E402
from pack.lora.apply import apply  # noqa: E402
from pack.lora.read import AdapterFile  # noqa: E402
from pack.offload.attach import apply_block_swap  # noqa: E402
from pack.offload.streamed_patcher import residency_of  # noqa: E402


def compare(name: str, folder: Path) -> dict[str, object]:
    tiny, path = ARCHITECTURES[name], folder / f"{name}.gguf"
    result: dict[str, object] = {}
    with tiny_files.shrunk(tiny):
        tiny_files.write_gguf(path, tiny, tiny_files.tensors_of(tiny))
        model = load_diffusion_model(path)
        adapter = AdapterFile(Path("made"), adapter_tensors(model), {})
        plain, plans = compare_latents.sample(model, tiny), base.requests(model)
        for way in ("merge", "runtime"):
            expected = compare_latents.sample(apply(adapter, model, None, 0.7, 0, way).model, tiny)
            result[f"{way}: effect"] = float((expected - plain).norm() / plain.norm())
            for plan in ("quarter", "all", "least"):
                swapped = apply_block_swap(model, plans[plan])
                ours = apply(adapter, swapped, None, 0.7, 0, way).model
                runs = [compare_latents.sample(patcher, tiny) for patcher in (ours, swapped, ours)]
                result[f"{way}, {plan}"] = {
                    "equal": torch.equal(runs[0], expected) and torch.equal(runs[2], expected),
                    "plain_again": torch.equal(runs[1], plain),
                    "streamed": residency_of(ours).plan.streamed_bytes,
                }
                comfy.model_management.unload_all_models()
    return result


if __name__ == "__main__":
    compare_latents.print_each(NAMES, Path(FOLDER), compare)
