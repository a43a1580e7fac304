"""Adapters under every name that the host knows a weight by, on tiny models and text encoders.

Runs inside the host as `compare_latents.py` does: `python lora_dialects.py FOLDER NAME...`. Prints one JSON line for
each architecture. The host's names are sorted into dialects, each with one name for a weight at most; an adapter with
all names of a dialect must become the same patches as the host makes of it.
"""

from __future__ import annotations

from pathlib import Path

from host import compare_latents as base  # sets the host up, so it comes first

import comfy.lora  # isort: skip
import torch  # isort: skip
from host import encoder_files, tiny_files
from host.tiny_encoder import ENCODERS
from host.tiny_models import ARCHITECTURES
from pack.loaders.diffusion import load_diffusion_model
from pack.loaders.named_tensors import named_tensors
from pack.loaders.text_encoder import load_text_encoder
from pack.lora.apply import apply
from pack.lora.read import AdapterFile

ENDINGS = ((".lora_B.weight", ".lora_A.weight"), ("_lora.up.weight", "_lora.down.weight"))


def dialects(names: dict) -> list[dict]:
    """The host's map in parts, in each of which a weight (or a part of one) has one name."""
    found: list[dict] = []
    for name, target in names.items():
        part = next((part for part in found if target not in part.values()), None)
        if part is None:
            found.append(part := {})
        part[name] = target
    return found


def adapter_of(names: dict, shapes: dict[str, tuple], endings: tuple[str, str]) -> dict[str, torch.Tensor]:
    """A pair of rank 1 for every matrix, and a difference for everything else."""
    tensors: dict[str, torch.Tensor] = {}
    for name, target in names.items():
        weight, offset = (target, None) if isinstance(target, str) else (target[0], target[1])
        shape = list(shapes[weight])
        if offset is not None:
            shape[offset[0]] = offset[2]
        if weight.endswith(".weight") and len(shape) > 1:
            pair = (torch.zeros(shape[0], 1), torch.zeros(1, *shape[1:]))
            tensors |= {f"{name}{ending}": tensor for ending, tensor in zip(endings, pair, strict=True)}
        else:
            tensors[f"{name}.diff"] = torch.zeros(shape)
    return tensors


def added(patcher) -> set[tuple]:
    """Which tensors change which weight, how strongly, and where in it."""
    patches = [(name, patch) for name, found in patcher.patches.items() for patch in found]
    for name, functions in patcher.weight_wrapper_patches.items():
        patches += [(name, patch) for function in functions for patch in function.patches]
    return {(name, *tensors_of(patch[1]), patch[0], patch[3]) for name, patch in patches}


def tensors_of(value) -> list[int]:
    weights = value[1] if isinstance(value, tuple) else value.weights
    return [tensor.data_ptr() for tensor in weights if isinstance(tensor, torch.Tensor)]


def tried(names: dict, network: torch.nn.Module, model, clip) -> dict[str, object]:
    """Every dialect of `names`, by us and by the host on clones of the same patcher."""
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(network, buffers=True)}
    weights = {name: target if isinstance(target, str) else target[0] for name, target in names.items()}
    names = {name: target for name, target in names.items() if weights[name] in shapes}
    wrong, count = [], 0
    for part in dialects(names):
        for endings in ENDINGS:
            tensors = adapter_of(part, shapes, endings)
            applied = apply(AdapterFile(Path("made"), tensors, {}), model, clip, 0.5, 0.5)
            own = applied.model if clip is None else applied.clip.patcher
            patcher = (model if clip is None else clip.patcher).clone()
            patcher.add_patches(comfy.lora.load_lora(tensors, names, log_missing=False), 0.5)
            count += len(part)
            if applied.unmatched or applied.weights != len(part) or added(own) != added(patcher):
                wrong.append([endings[0], next(iter(part)), len(part), applied.weights, applied.unmatched[:3]])
    return {"names": count, "wrong": wrong}


def of_model(name: str, folder: Path) -> dict[str, object]:
    tiny, path = ARCHITECTURES[name], folder / f"{name}.gguf"
    with tiny_files.shrunk(tiny):
        tiny_files.write_gguf(path, tiny, tiny_files.tensors_of(tiny))
        patcher = load_diffusion_model(path)
        return tried(comfy.lora.model_lora_keys_unet(patcher.model, {}), patcher.model, patcher, None)


def of_encoder(name: str, folder: Path) -> dict[str, object]:
    tiny, path = ENCODERS[name], folder / f"{name}.gguf"
    with encoder_files.shrunk(tiny):
        encoder_files.write_model(path, tiny, encoder_files.files_of(tiny))
        clip = load_text_encoder([path], tiny.clip_type)
        network = clip.cond_stage_model
        return tried(comfy.lora.model_lora_keys_clip(network, {}), network, None, clip)


def compare(name: str, folder: Path) -> dict[str, object]:
    return (of_encoder if name in ENCODERS else of_model)(name, folder)


if __name__ == "__main__":
    base.print_each(base.NAMES, Path(base.FOLDER), compare)
