"""Tiny models of real architectures, loaded by core, saved as GGUF, loaded by the pack, compared.

Runs inside the host: `python save_architectures.py FOLDER NAME...`. Prints one JSON line for each architecture: whether
the latent equals that of core's model whose weights are what gguf-py reads in the file.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

FOLDER, *NAMES = sys.argv[1:]
sys.argv = [sys.argv[0], FOLDER]  # no names: nothing is compared while it is imported
from host.compare_latents import load_theirs, print_each, sample  # noqa: E402  (switches the host to the CPU)

import comfy.model_management  # noqa: E402  isort: skip
import comfy.sd  # noqa: E402  isort: skip
import gguf  # noqa: E402  isort: skip
import numpy as np  # noqa: E402  isort: skip
import torch  # noqa: E402  isort: skip
from host import tiny_files  # noqa: E402
from host.tiny_models import ARCHITECTURES  # noqa: E402
from pack.loaders.diffusion import load_diffusion_model  # noqa: E402
from pack.loaders.model_weights import of_model  # noqa: E402
from pack.loaders.save_model import save_model  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def read(path: Path) -> dict[str, torch.Tensor]:
    reader, found = gguf.GGUFReader(path), {}
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        stated = reader.fields.get(f"comfy.gguf.orig_shape.{tensor.name}")
        shape = [int(n) for n in reversed(tensor.shape)] if stated is None else stated.contents()
        found[tensor.name] = values.reshape([int(n) for n in shape]).contiguous()
    return found


def compare(name: str, folder: Path) -> dict[str, object]:
    tiny = ARCHITECTURES[name]
    given, saved, plain = (folder / f"{name}.{end}" for end in ("safetensors", "gguf", "plain.safetensors"))
    with tiny_files.shrunk(tiny):
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in tiny_files.state_dict(tiny).items()}
        save_file(tensors, given, dict(tiny.metadata) or None)
        theirs = comfy.sd.load_diffusion_model(str(given))
        new = of_model(theirs)
        types = save_model(saved, new.weights, "Q4_K_M", new.architecture, metadata=new.metadata).types
        save_file(read(saved), plain, dict(tiny.metadata) or None)
        ours, expected = load_diffusion_model(saved), load_theirs(plain, None)
        latents = [sample(patcher, tiny) for patcher in (ours, expected, theirs)]
    result = {
        "architecture_in_file": new.architecture,
        "families": [type(patcher.model.model_config).__name__ for patcher in (ours, expected)],
        "types": types,
        "difference": float((latents[0] - latents[1]).abs().max()),
        "distance": float((latents[0] - latents[2]).norm() / latents[2].norm()),
        "spread": float(latents[1].std()),
    }
    comfy.model_management.unload_all_models()
    del ours, expected, theirs, new
    with contextlib.suppress(PermissionError):
        for path in (given, saved, plain):
            path.unlink()
    return result


print_each(NAMES, Path(FOLDER), compare)
