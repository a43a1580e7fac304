"""The weights of a network that lie in files and are not cached, read before the host touches them.

The host moves a network module by module, or on a CPU computes with the mapping as it is; either way a weight is read
page by page in the middle of that. Read ahead, it comes at the disk's speed, with a progress bar and a Cancel button.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import psutil
import torch
from comfy_kitchen.tensor import QuantizedTensor

from . import compat
from .progress import watched
from .read_ahead import Span, read_ahead

log = logging.getLogger("sluice.loaders")

SHARE_OF_FREE_RAM = 0.5  # more would be dropped from the cache before it is used


def read_weights_ahead(network: torch.nn.Module, device: torch.device) -> None:
    """Read what `network` needs on `device`, as far as there is room in the cache.

    Raises:
        comfy.model_management.InterruptProcessingException: the user pressed Cancel; the network is as it was.
    """
    spans = _spans(network, device)
    needed = sum(stop - start for found in spans.values() for start, stop in found)
    if needed > SHARE_OF_FREE_RAM * psutil.virtual_memory().available:
        return
    for path, found in spans.items():
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            log.debug("%s is not read ahead: %s", path, error)
            continue
        try:
            read_ahead(descriptor, found, watched, Path(path).name)
        finally:
            os.close(descriptor)


def _spans(network: torch.nn.Module, device: torch.device) -> dict[str, list[Span]]:
    """Where in which files the weights at home are. Of a table that stays, only the rows of a text are needed."""
    spans: dict[str, list[Span]] = {}
    for module in network.modules():
        if device.type == "cpu" and isinstance(module, torch.nn.Embedding):
            continue
        for parameter in module._parameters.values():
            if parameter is None or parameter.is_meta:
                continue
            data = parameter._qdata if isinstance(parameter, QuantizedTensor) else parameter
            found = compat.file_slice(data) if data.device.type == "cpu" else None
            if found is not None:
                path, _, _, offset = found
                spans.setdefault(path, []).append((offset, offset + data.nbytes))
    return spans
