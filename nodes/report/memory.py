"""What the system says of memory: this process's RAM, and each GPU's.

Asking makes no GPU wait and costs tens of microseconds on Linux, where the kernel says which pages of RAM are a file's.
Elsewhere those parts are None.
"""

from __future__ import annotations

import contextlib
import mmap
from functools import cache
from pathlib import Path

import comfy.model_management
import psutil
import torch

from ...offload.kept import kept_bytes
from .timeline import Values

STATUS, STATM = Path("/proc/self/status"), Path("/proc/self/statm")
PARTS = {"anonymous": "RssAnon:", "file": "RssFile:", "shared": "RssShmem:"}


def host_ram() -> dict[str, int | None]:
    """Bytes of RAM: what this process has of each kind, all that it has, the machine's total and available, and what of
    files is locked."""
    machine = psutil.virtual_memory()
    parts: dict[str, int | None] = dict.fromkeys(PARTS)
    resident = None
    with contextlib.suppress(OSError, KeyError):
        said = dict(
            line.split(maxsplit=1) for line in STATUS.read_text().splitlines() if line.startswith(("Rss", "Vm"))
        )
        parts = {part: int(said[name].split()[0]) * 1024 for part, name in PARTS.items()}
        resident = sum(size or 0 for size in parts.values())
    if resident is None:
        resident = psutil.Process().memory_info().rss
    known = {"resident": resident, "total": machine.total, "available": machine.available, "kept_locked": kept_bytes()}
    return {**parts, **known}


def vram() -> list[dict[str, int | str | None]]:
    """Bytes of each GPU in use: what torch gave out and what it holds for that, what is free for anybody, and all."""
    found: list[dict[str, int | str | None]] = []
    for device in gpus():
        allocated = reserved = None
        if device.type == "cuda":
            stats = torch.cuda.memory_stats(device)
            allocated, reserved = (stats.get(f"{kind}_bytes.all.current", 0) for kind in ("allocated", "reserved"))
            if device != gpus()[0] and not reserved:
                continue  # to ask an idle GPU would give it a context of some hundred MB
            free, total = torch.cuda.mem_get_info(device)
            name = torch.cuda.get_device_name(device)
        else:
            free = comfy.model_management.get_free_memory(device)
            total = comfy.model_management.get_total_memory(device)
            name = device.type
        found.append(
            {
                "device": str(device),
                "name": name,
                "allocated": allocated,
                "reserved": reserved,
                "free": int(free),
                "total": int(total),
            }
        )
    return found


def sample() -> Values:
    """The cheapest numbers for the timeline; of several GPUs, the one that ComfyUI computes on."""
    return (*_vram_in_use(), *_ram_in_use())


@cache
def gpus() -> tuple[torch.device, ...]:
    """The devices with memory of their own. ComfyUI's first; () where it computes on the CPU."""
    main = comfy.model_management.get_torch_device()
    if main.type in ("cpu", "mps"):
        return ()
    if main.type != "cuda":
        return (main,)
    indices = sorted(range(torch.cuda.device_count()), key=lambda index: index != (main.index or 0))
    return tuple(torch.device("cuda", index) for index in indices)


def _vram_in_use() -> tuple[int | None, int | None]:
    if not gpus():
        return None, None
    device = gpus()[0]
    if device.type != "cuda":
        total = comfy.model_management.get_total_memory(device)
        return int(total - comfy.model_management.get_free_memory(device)), None
    free, total = torch.cuda.mem_get_info(device)
    return total - free, torch.cuda.memory_stats(device).get("allocated_bytes.all.current", 0)


def _ram_in_use() -> tuple[int | None, int | None]:
    """Pages of nobody's file, and of files."""
    try:
        _, resident, shared, *_ = map(int, STATM.read_bytes().split())
    except OSError:
        return psutil.Process().memory_info().rss, None
    return (resident - shared) * mmap.PAGESIZE, shared * mmap.PAGESIZE
