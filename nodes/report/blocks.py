"""The blocks of models that the host manages by itself, in the form that a streamed model's have (`offload/report.py`).

The classic patcher moves weights, so that each tells where it is. Under dynamic VRAM weights lie in the host's pages,
which come and go within a step, and None is said.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch

from ...offload.blocks import find_blocks

Weights = list[tuple[dict[str, "torch.nn.Parameter | None"], str, int]]  # a module's parameters, a name in it, bytes


class HostBlocks:
    """Finds a network's blocks once, as long as the network lives."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[torch.nn.Module, list[tuple[str, Weights]]] = WeakKeyDictionary()

    def of(self, patcher: Any) -> list[dict[str, Any]]:
        """Of a MODEL; [] for anything else, and where no blocks are known."""
        network = getattr(patcher.model, "diffusion_model", None)
        if network is None:
            return []
        if network not in self._known:
            self._known[network] = [
                (block.name, _weights(block.module)) for block in find_blocks(network) if block.every_step
            ]
        dynamic = patcher.is_dynamic()
        return [
            {
                "name": name,
                "bytes": sum(nbytes for *_, nbytes in weights),
                "resident_bytes": None if dynamic else _resident(weights, patcher.load_device),
                "streamed_bytes": 0,
                "compute_ms": None,
            }
            for name, weights in self._known[network]
        ]


def _weights(block: torch.nn.Module) -> Weights:
    """The large ones: norms and biases say nothing about where a block is."""
    return [
        (module._parameters, name, getattr(parameter, "_qdata", parameter).nbytes)
        for module in block.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() > 1
    ]


def _resident(weights: Weights, device: torch.device) -> int:
    found = ((parameters.get(name), nbytes) for parameters, name, nbytes in weights)
    return sum(nbytes for parameter, nbytes in found if parameter is not None and parameter.device.type == device.type)
