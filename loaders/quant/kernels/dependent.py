"""Where a kernel may be launched before the one in front of it has ended, and why that is safe.

[Note: Dependent launch]
A kernel of its own for each dense weight costs a step the time in which the GPU has ended one kernel and not begun the
next. NVIDIA's programmatic dependent launch takes some of it: the programs are placed, and work out their addresses,
as soon as all blocks of the kernel in front have ended (or have said that they can be followed), and then wait for its
end. The program that dequantises reads and writes nothing before that wait, and every thread of it waits, so that

- bytes that the kernel in front writes are read as it leaves them;
- memory that the kernel in front still reads, such as the dense weight before in the allocator's same place, is written
  when it has ended;
- what is in front of that kernel has ended too, because a kernel ends after all that it had to wait for;
- it never says that it can be followed, so a kernel behind it that is launched in this way begins after all of its
  programs have waited.

Where there is no such launch, or it was not asked for, the wait is no more than an instruction.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

import torch
import triton

from .failures import reason

log = logging.getLogger("sluice.quant")

LEAST = (9, 0)  # compute capability
OPTIONS: dict[str, Any] = {"launch_pdl": True}  # of Triton's compiler, which keeps it for each launch

try:
    from triton.language.extra.cuda import gdc_wait
except ImportError:  # before Triton 3.3
    gdc_wait = None

_reasons: dict[torch.device, str | None] = {}  # device -> why not, or None


def allowed(device: torch.device) -> bool:
    """Whether kernels on `device` are launched in this way."""
    if device not in _reasons:
        _reasons[device] = _find_out(device)
    return _reasons[device] is None


def give_up(device: torch.device, error: Exception) -> None:
    """A kernel works on `device` without, and not with it."""
    why = reason(error)
    _reasons[device] = f"it failed: {why}"
    log.warning("kernels on %s wait for the end of the one before: launching them early failed: %s", device, why)


def choices() -> dict[str, str]:
    """CUDA device to what was decided for it."""
    return {
        f"{device} launch": f"after the kernel before: {why}" if why else "while the kernel before ends"
        for device, why in list(_reasons.items())
        if device.type == "cuda"
    }


def _find_out(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return "not an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST:
        return "compute capability {}.{} has no dependent launch".format(*capability)
    if gdc_wait is None or not _compiler_knows():
        return f"Triton {triton.__version__} has no dependent launch"
    return None


def _compiler_knows() -> bool:
    """Whether Triton's compiler for NVIDIA's GPUs has the option; one that it does not know would be ignored."""
    from triton.backends.nvidia.compiler import CUDAOptions

    return OPTIONS.keys() <= {field.name for field in fields(CUDAOptions)}
