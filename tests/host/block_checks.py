"""Find the blocks of networks inside the host, and run the networks with no weights of any block but during its call.

`python block_checks.py tiny|small|full|gguf NAME...`. Prints one JSON line for each network: its blocks in the order
found, and which of them are not for every step; and

- of a tiny model or small network what `Watch` saw, and whether the output is what it is with all weights in place;
- of a full one, which has no values, what share of the weights is in blocks, and in the largest of them.

Of a tiny model that the pack loads from a GGUF file only the blocks.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

KIND, *NAMES = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_management  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from host import tiny_files  # noqa: E402
from host.full_networks import FULL_NETWORKS  # noqa: E402
from host.small_networks import SMALL_NETWORKS  # noqa: E402
from host.tiny_files import random_values  # noqa: E402
from host.tiny_models import ARCHITECTURES  # noqa: E402
from pack.loaders.diffusion import load_diffusion_model  # noqa: E402
from pack.offload.blocks import Block, find_blocks  # noqa: E402
from torch import nn  # noqa: E402
from watched_blocks import Watch  # noqa: E402

torch.set_num_threads(1)


def watched(network: nn.Module, run: Callable[[], torch.Tensor]) -> dict[str, object]:
    with torch.inference_mode():
        expected = run()
        blocks = find_blocks(network)
        watch = Watch(blocks)
        found = run()
    return {
        **described(blocks),
        "calls": watch.calls,
        "nested": watch.nested,
        "elsewhere": sorted(watch.elsewhere),
        "finite": bool(torch.isfinite(expected).all()),
        "spread": float(expected.std()),
        "equal": torch.equal(found, expected),
    }


def described(blocks: list[Block]) -> dict[str, object]:
    names = [block.name for block in blocks]
    return {"blocks": names, "not_every_step": [block.name for block in blocks if not block.every_step]}


def check_tiny(name: str) -> dict[str, object]:
    """A model that the host loads, in one step of sampling."""
    tiny = ARCHITECTURES[name]
    with tiny_files.shrunk(tiny):
        weights = {key: torch.from_numpy(values.copy()) for key, values in tiny_files.state_dict(tiny).items()}
        patcher = comfy.sd.load_diffusion_model_state_dict(weights, metadata=dict(tiny.metadata))
    network = patcher.model.diffusion_model
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(tiny.latent, generator=generator)
    context = None if tiny.context is None else torch.randn(tiny.context, generator=generator)
    given = {
        key: torch.tensor(value) if isinstance(value, list) else made(value, generator)
        for key, value in tiny.conditioning.items()
    }

    def run() -> torch.Tensor:
        positive, latent = [[context, dict(given)]], torch.zeros(tiny.latent)
        return comfy.sample.sample(
            patcher, noise, 1, 1.0, "euler", "simple", positive, positive, latent, disable_pbar=True, seed=7
        )

    try:
        return watched(network, run)
    finally:
        comfy.model_management.unload_all_models()


def check_small(name: str) -> dict[str, object]:
    """A network, called directly."""
    small = SMALL_NETWORKS[name]
    network = built(small.path, small.sizes, torch.device("cpu")).eval().requires_grad_(False)
    for key, tensor in network.state_dict().items():  # buffers too, where the file brings them
        if tensor.is_floating_point():
            tensor.copy_(torch.as_tensor(random_values(key, tuple(tensor.shape), 0)))

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        inputs = {key: made(value, generator) for key, value in small.inputs.items()}
        if small.prepare:
            inputs["context"] = getattr(network, small.prepare)(inputs["context"], unprocessed=True)
        output = network(**inputs)
        parts = output if isinstance(output, (list, tuple)) else [output]
        return torch.cat([part.flatten() for part in parts])

    return watched(network, run)


def check_gguf(name: str) -> dict[str, object]:
    tiny = ARCHITECTURES[name]
    with tiny_files.shrunk(tiny), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder, "tiny.gguf")
        tiny_files.write_gguf(path, tiny, tiny_files.tensors_of(tiny))
        return described(find_blocks(load_diffusion_model(path).model.diffusion_model))


def check_full(name: str) -> dict[str, object]:
    full = FULL_NETWORKS[name]
    network = built(full.path, full.sizes, torch.device("meta"))
    blocks = find_blocks(network)
    sizes = [sum(weight.numel() for weight in block.module.parameters()) for block in blocks]
    total = sum(weight.numel() for weight in network.parameters())
    return {
        **described(blocks),
        "billions": total / 1e9,
        "share": sum(sizes) / total,
        "largest": max(sizes, default=0) / total,
    }


def built(path: str, sizes: Mapping[str, object], device: torch.device) -> nn.Module:
    module, _, name = path.rpartition(".")
    make = getattr(importlib.import_module(f"comfy.ldm.{module}"), name)
    return make(**sizes, operations=comfy.ops.disable_weight_init, dtype=torch.float32, device=device)


def made(value: object, generator: torch.Generator) -> object:
    """A random tensor for a shape, several for a list of them, and anything else as it is."""
    if isinstance(value, tuple):
        return torch.randn(value, generator=generator)
    return [made(part, generator) for part in value] if isinstance(value, list) else value


def main() -> None:
    check = {"tiny": check_tiny, "small": check_small, "full": check_full, "gguf": check_gguf}[KIND]
    for name in NAMES:
        try:
            result = check(name)
        except Exception:
            result = {"error": traceback.format_exc()}
        print(json.dumps({"network": name, **result}), flush=True)


main()
