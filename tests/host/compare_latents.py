"""Sample from tiny models loaded twice, by the host from safetensors and by the pack from GGUF, and compare.

Runs inside the host: `python compare_latents.py FOLDER NAME...`. Prints one JSON line for each architecture, so that
one start of the host (seconds) serves them all.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

FOLDER, *NAMES = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402
from host import tiny_files  # noqa: E402
from host.tiny_model import TinyModel  # noqa: E402
from host.tiny_models import ARCHITECTURES  # noqa: E402
from pack.loaders.diffusion import load_diffusion_model  # noqa: E402

torch.set_num_threads(1)  # the models are tiny: threads would only wait for one another
HALF = torch.bfloat16


def sample(patcher: ModelPatcher, tiny: TinyModel) -> torch.Tensor:
    """Two Euler steps from fixed noise; what each architecture is conditioned on is random but fixed."""
    generator = torch.Generator().manual_seed(7)

    def tensor(value: object) -> object:
        if isinstance(value, tuple):
            return torch.randn(value, generator=generator)
        return torch.tensor(value) if isinstance(value, list) else value

    latent = torch.zeros(tiny.latent)
    noise = torch.randn(tiny.latent, generator=generator)
    context = None if tiny.context is None else tensor(tiny.context)
    positive = [[context, {key: tensor(value) for key, value in tiny.conditioning.items()}]]
    return comfy.sample.sample(
        patcher, noise, 2, 1.0, "euler", "simple", positive, positive, latent, disable_pbar=True, seed=7
    )


def settled(patcher: ModelPatcher) -> ModelPatcher:
    """`patcher` with two things out of the way that change the last bit of a product and are no weight's value.

    A weight of a safetensors file lies at any multiple of 8 bytes, and BLAS rounds by alignment; and in older hosts
    weights ask for gradients, for which torch folds a matrix product differently.
    """
    for parameter in patcher.model.diffusion_model.parameters():
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(False)
    return patcher


def load_theirs(path: Path, dtype: torch.dtype | None) -> ModelPatcher:
    """As the host's UNETLoader does; to compute in `dtype`, as its ModelComputeDtype node does."""
    patcher = comfy.sd.load_diffusion_model(str(path), model_options={} if dtype is None else {"dtype": dtype})
    if dtype is not None:
        patcher.set_model_compute_dtype(dtype)
    return settled(patcher)


def compare(name: str, folder: Path) -> dict[str, object]:
    tiny = ARCHITECTURES[name]
    paths = {kind: folder / f"{name}.{kind}" for kind in ("safetensors", "gguf", "zeroed.gguf")}
    with tiny_files.shrunk(tiny):
        tensors = tiny_files.tensors_of(tiny)
        probe = tiny_files.probe_key(tensors, tiny)
        tiny_files.write_safetensors(paths["safetensors"], tiny, tensors)
        tiny_files.write_gguf(paths["gguf"], tiny, tensors)
        tiny_files.write_gguf(paths["zeroed.gguf"], tiny, tiny_files.zeroed(tensors, probe))

        theirs, ours = load_theirs(paths["safetensors"], None), load_diffusion_model(paths["gguf"])
        expected, latent = sample(theirs, tiny), sample(ours, tiny)
        without = sample(load_diffusion_model(paths["zeroed.gguf"]), tiny)
        expected_half = sample(load_theirs(paths["safetensors"], HALF), tiny)
        latent_half = sample(load_diffusion_model(paths["gguf"], HALF), tiny)
    result = {
        "families": [type(patcher.model.model_config).__name__ for patcher in (theirs, ours)],
        "finite": all(bool(torch.isfinite(t).all()) for t in (expected, expected_half)),
        "spread": float(expected.std()),
        "difference": float((latent - expected).abs().max()),
        "difference_bfloat16": float((latent_half - expected_half).abs().max()),
        "equal": torch.equal(latent, expected),
        "equal_bfloat16": torch.equal(latent_half, expected_half),
        "probe": probe,
        "difference_without_probe": float((without - expected).abs().max()),
        "bytes": {
            "file": sum(tensor.stored.nbytes for tensor in tensors.values()),
            "ours": ours.model_size(),
            "theirs": theirs.model_size(),
        },
    }
    comfy.model_management.unload_all_models()
    with contextlib.suppress(PermissionError):  # Windows keeps a file that is mapped
        for path in paths.values():
            path.unlink()
    return result


def print_each(names: Sequence[str], folder: Path, compare: Callable[[str, Path], dict[str, object]]) -> None:
    """One JSON line for each architecture: what `compare` says of it, or `error` with how it failed."""
    for name in names:
        try:
            result = compare(name, folder)
        except Exception:
            result = {"error": traceback.format_exc()}
        print(json.dumps({"architecture": name, **result}), flush=True)


if __name__ == "__main__":
    print_each(NAMES, Path(FOLDER), compare)
