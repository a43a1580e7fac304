"""LoRAs on a patcher whose weights stream: counted in its budget, and streamed where they do not fit (adapters.py)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import comfy.utils
import torch

from ..loaders import compat
from ..loaders.patch_at_use import PatchAtUse
from ..loaders.patcher import PatchingAtUse
from ..loaders.sizes import size
from .adapters import Adapters, AdapterStream
from .blocks import Block
from .device import device_for
from .plan import BudgetTooSmallError

log = logging.getLogger("sluice.offload")

# On a network, while it is loaded:
STREAM = "_sluice_adapter_stream"
BEYOND = "_sluice_adapters_beyond"  # the budget


def adapter_stream_of(model: torch.nn.Module) -> AdapterStream | None:
    """What brings the LoRAs of a network with their blocks, where not all of them stay on the device."""
    return model.__dict__.get(STREAM)


class StreamingAdapters(PatchingAtUse):
    """Mixed in before the host's patcher. Budgets and clones as there; what streams belongs to the network."""

    @property
    def adapter_bytes(self) -> int:
        """The VRAM that this patcher's LoRAs take beside the plan of its weights."""
        if adapter_stream_of(self.model) is not None:
            return self._adapters().least_bytes
        functions = (f for found in self.weight_wrapper_patches.values() for f in found if isinstance(f, PatchAtUse))
        return sum(f.nbytes for f in functions) if self.load_device.type != "cpu" else 0

    @property
    def adapters_made_room(self) -> bool:
        """Whether they stream, or lie beyond the budget, because it was too small."""
        return self.load_device.type != "cpu" and bool(self.model.__dict__.keys() & {STREAM, BEYOND})

    @property
    def budgeted_adapter_bytes(self) -> int:
        """What of that the weights' budget pays."""
        return 0 if BEYOND in self.model.__dict__ else self.adapter_bytes

    @property
    def least_adapter_bytes(self) -> int:
        """The VRAM that they take when as much of them as possible streams."""
        adapters = self._adapters()
        return min(adapters.nbytes, adapters.least_bytes)

    def _adapters(self) -> Adapters:
        functions: dict[torch.nn.Module, list] = {}
        if self.load_device.type != "cpu":  # where they are used as they lie
            for key, found in self.weight_wrapper_patches.items():
                layer = comfy.utils.get_attr(self.model, key.rpartition(".")[0])
                functions.setdefault(layer, []).extend(f for f in found if isinstance(f, PatchAtUse))
        if not functions:
            return Adapters((), ())
        network = self.model.diffusion_model
        blocks = [Block(name, network.get_submodule(name)) for name in self.model._sluice_residency.names]
        return Adapters.of(blocks, functions)

    def beside_adapters(self, device: torch.device, arrange: Callable[[], object]) -> None:
        """`arrange()` the weights in what the LoRAs leave of the budget, which may have to be more and more.

        Raises:
            BudgetTooSmallError: it is too small for the weights alone.
        """
        try:
            arrange()
            return
        except BudgetTooSmallError:
            if not self.budgeted_adapter_bytes:
                raise
        if self._stream_adapters(device):
            try:
                arrange()
                return
            except BudgetTooSmallError:
                pass
        self.model.__dict__[BEYOND] = True
        arrange()
        log.warning(
            "%s of LoRAs stay in VRAM beyond the budget, which is too small for them; raise vram_budget_gb",
            size(self.adapter_bytes),
        )

    def _stream_adapters(self, device: torch.device) -> bool:
        """From now on those of blocks come with their block; False where they do already, or nothing is gained."""
        adapters = self._adapters()
        if adapter_stream_of(self.model) is not None or adapters.least_bytes >= adapters.nbytes:
            return False
        kept = compat.pinned_memory_left(), compat.may_pin_memory(), compat.account_pinned
        self.model.__dict__[STREAM] = AdapterStream(adapters, device_for(device), *kept)
        log.info("LoRAs stream: %s of VRAM instead of %s", size(adapters.least_bytes), size(adapters.nbytes))
        return True

    def keep_adapters(self) -> None:
        """From now on they stay on the device, in the budget."""
        self.model.__dict__.pop(BEYOND, None)
        if (stream := self.model.__dict__.pop(STREAM, None)) is not None:
            stream.close()

    def adapters_at_home(self) -> AbstractContextManager[None]:
        """While the host loads the model: what streams is not moved."""
        stream = adapter_stream_of(self.model)
        return nullcontext() if stream is None else stream.at_home()
