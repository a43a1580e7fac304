"""Sample from tiny models of every architecture, as they are and with Block Swap, and compare.

Runs inside the host as `compare_latents.py` does, and makes the models as that does: `python swap_architectures.py
FOLDER NAME...`. The copies are those of a device that makes them as late, as early or as oddly as the events allow, and
a released place of the ring is overwritten with NaN. Prints one JSON line for each architecture.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from functools import partial
from pathlib import Path

FOLDER, *NAMES = sys.argv[1:]
sys.argv = [sys.argv[0], FOLDER]  # no names: nothing is compared while it is imported
from host import compare_latents  # noqa: E402  (switches the host to the CPU, so it comes first)

import comfy.model_management  # noqa: E402  isort: skip
import pack.offload.residency  # noqa: E402  isort: skip
import pack.offload.streaming  # noqa: E402  isort: skip
import torch  # noqa: E402  isort: skip
from comfy.model_patcher import ModelPatcher  # noqa: E402  isort: skip
from fake_device import POLICIES, FakeDevice, NotingRegistrar  # noqa: E402
from host import tiny_files  # noqa: E402
from host.tiny_models import ARCHITECTURES  # noqa: E402
from pack.loaders.diffusion import load_diffusion_model  # noqa: E402
from pack.offload.attach import apply_block_swap  # noqa: E402
from pack.offload.costs import SwapRequest  # noqa: E402
from pack.offload.plan import BudgetTooSmallError  # noqa: E402
from pack.offload.streamed_patcher import residency_of  # noqa: E402
from pack.offload.streamer import BlockStreamer  # noqa: E402

pack.offload.streaming.BlockStreamer = partial(BlockStreamer, poison=True)
made = itertools.count()


def some_device(device: torch.device) -> FakeDevice:
    """Where the network computes at once, and copies wait."""
    number = next(made)
    return FakeDevice(POLICIES[number % len(POLICIES)], number, eager=True, registrar=NotingRegistrar())


pack.offload.residency.device_for = some_device


def requests(model: ModelPatcher) -> dict[str, SwapRequest]:
    """None, a quarter, half or all of the blocks stream; and whatever does in the least VRAM that works."""
    probe = apply_block_swap(model, SwapRequest(vram_budget_gb=1e-6, prefetch_blocks=0))
    try:
        probe.partially_load(probe.load_device, 1e32)
    except BudgetTooSmallError as error:
        least = error.smallest_bytes + 1
    count = len(residency_of(probe).names)
    parts = {"none": 0, "quarter": -(-count // 4), "half": -(-count // 2), "all": count}
    return {
        **{name: SwapRequest(blocks_to_swap=blocks) for name, blocks in parts.items()},
        "least": SwapRequest(vram_budget_gb=least / 1e9, prefetch_blocks=0),
    }


def compare(name: str, folder: Path) -> dict[str, object]:
    tiny = ARCHITECTURES[name]
    paths = {kind: folder / f"{name}.{kind}" for kind in ("safetensors", "gguf")}
    result: dict[str, object] = {}
    with tiny_files.shrunk(tiny):
        tensors = tiny_files.tensors_of(tiny)
        tiny_files.write_safetensors(paths["safetensors"], tiny, tensors)
        tiny_files.write_gguf(paths["gguf"], tiny, tensors)
        for kind, load in (
            ("gguf", load_diffusion_model),
            ("safetensors", partial(compare_latents.load_theirs, dtype=None)),
        ):
            model = load(paths[kind])
            expected = compare_latents.sample(model, tiny)
            found: dict[str, object] = {"finite": bool(expected.isfinite().all())}
            for plan, request in requests(model).items():
                swapped = apply_block_swap(model, request)
                runs = [compare_latents.sample(swapped, tiny) for _ in range(2 if plan in ("half", "least") else 1)]
                carried_out = residency_of(swapped).plan
                found[plan] = {
                    "equal": all(torch.equal(run, expected) for run in runs),
                    "share": carried_out.streamed_bytes / sum(block.streamable_bytes for block in carried_out.blocks),
                    "blocks": len({copy.block for copy in carried_out.copies}) / len(carried_out.blocks),
                }
                comfy.model_management.unload_all_models()
            result[kind] = found
    with contextlib.suppress(PermissionError):  # Windows keeps a file that is mapped
        for path in paths.values():
            path.unlink()
    return result


compare_latents.print_each(NAMES, Path(FOLDER), compare)
