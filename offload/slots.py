"""A network's weights as bytes that may lie elsewhere for a while.

A `Slot` is one weight: where modules refer to it, its *home* (the tensor that the network was loaded with, usually over
the file), and the same weight over other bytes, of the ring or of the device. Going home costs nothing, because the
home is never given up.

`twin` makes the network that the streamer works on: its own modules over the same homes. A model that is streamed thus
shares memory with the one it was made from, and neither can see where the other's weights are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor

from .files import StoredFile, Weight

Located = Callable[[torch.Tensor], "tuple[StoredFile, int] | None"]  # a tensor's file and offset, if it lies in one


class Slot:
    """One parameter and every place in the network that names it."""

    def __init__(self, home: torch.nn.Parameter) -> None:
        self.home = home
        self.owners: list[tuple[torch.nn.Module, str]] = []

    @property
    def stored(self) -> torch.Tensor:
        """What lies in memory: the blocks of a quantised weight, or the plain weight."""
        return self.home._qdata if isinstance(self.home, QuantizedTensor) else self.home.detach()

    @property
    def nbytes(self) -> int:
        return (self.home._qdata if isinstance(self.home, QuantizedTensor) else self.home).nbytes

    @property
    def streams(self) -> bool:
        """Whether its bytes can be copied as they are; others would have to be gathered first. Biases and norms stay: a
        copy of them frees nothing."""
        return self.home.dim() > 1 and self.stored.is_contiguous() and self.stored.device.type == "cpu"

    def location(self, located: Located) -> tuple[StoredFile, int] | None:
        """The file and offset of its bytes, if they lie in one."""
        return located(self.stored)

    def weight(self, located: Located) -> Weight:
        """Where its bytes are, for a source."""
        stored, found = self.stored, self.location(located)
        if found is not None:
            return Weight(stored.nbytes, file=found[0], offset=found[1])
        return Weight(stored.nbytes, data=stored.reshape(-1).view(torch.uint8))

    def over(self, data: torch.Tensor) -> torch.nn.Parameter:
        """The weight with `data` (uint8, `nbytes` long, on any device) as its bytes."""
        stored = self.stored
        there = data.view(stored.dtype).view(stored.shape)
        if not isinstance(self.home, QuantizedTensor):
            return torch.nn.Parameter(there, requires_grad=False)
        with torch.inference_mode():  # as the executor has it: inside, nobody could use one that was made outside
            quantized = QuantizedTensor(there, self.home._layout_cls, self.home._params.to_device(data.device))
            return torch.nn.Parameter(quantized, requires_grad=False)

    def as_moved(self, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.dtype]:
        """What `moved` would copy, and as what, for who copies it and gives what arrived to `over_moved`."""
        return self.stored, self.stored.dtype if dtype is None or isinstance(self.home, QuantizedTensor) else dtype

    def over_moved(self, there: torch.Tensor) -> torch.nn.Parameter:
        if isinstance(self.home, QuantizedTensor):
            return self.over(there.view(-1).view(torch.uint8))
        return torch.nn.Parameter(there, requires_grad=False)

    def moved(self, device: torch.device, dtype: torch.dtype | None, at_once: bool = False) -> torch.nn.Parameter:
        """A copy on `device`, in `dtype` unless it is quantised.

        Args:
            at_once: go on before it is there. NVIDIA's driver has read memory that is not locked by then.
        """
        if isinstance(self.home, QuantizedTensor):
            with torch.inference_mode():
                return torch.nn.Parameter(self.home.to(device), requires_grad=False)
        return torch.nn.Parameter(self.home.detach().to(device, dtype, at_once, copy=True), requires_grad=False)

    def show(self, parameter: torch.nn.Parameter) -> None:
        for module, name in self.owners:
            module._parameters[name] = parameter

    def go_home(self) -> None:
        self.show(self.home)

    def rehome(self, home: torch.nn.Parameter) -> None:
        """From now on `home` is where the weight lies when it is at home. Who sees the old one sees the new one."""
        for module, name in self.owners:
            if module._parameters[name] is self.home:
                module._parameters[name] = home
            if told := getattr(module, "set_home", None):
                told(name, home)
        self.home = home

    def forget(self) -> None:
        """Have the layers let go of what they derived from the weight (bound kernels), which would keep its bytes."""
        for module, _ in self.owners:
            if forget := getattr(module, "forget_bound", None):
                forget()

    @property
    def shown(self) -> torch.nn.Parameter | None:
        module, name = self.owners[0]
        return module._parameters[name]


def memory_of(parameter: torch.nn.Parameter) -> int:
    """What tells memory that a parameter lies in from other memory: others may lie in the same."""
    stored = parameter._qdata if isinstance(parameter, QuantizedTensor) else parameter
    return stored.untyped_storage().data_ptr()


def slots_of(modules: Iterable[torch.nn.Module]) -> list[Slot]:
    """The parameters of `modules`, in their order; one that several of them share is one slot."""
    found: dict[int, Slot] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), Slot(parameter)).owners.append((module, name))
    return list(found.values())


def twin(model: torch.nn.Module, drop: Iterable[Any] = ()) -> Any:
    """A copy of `model` whose parameters are over the same memory, and whose buffers and other tensors are the same.

    The parameters are objects of their own: `Module.to` moves one in place, and would take the other model's along.

    What the model itself has beside modules (its configuration, its latent format) is shared, too.

    Args:
        drop: objects that the copy must not have; where `model` refers to them, the copy has None.
    """
    memo: dict[int, Any] = {id(value): value for value in vars(model).values() if not isinstance(value, dict | list)}
    for module in model.modules():
        kept = [value for value in vars(module).values() if isinstance(value, dict)]
        tensors = (
            value for held in (vars(module), *kept) for value in held.values() if isinstance(value, torch.Tensor)
        )
        memo.update((id(tensor), _own(tensor)) for tensor in tensors if id(tensor) not in memo)
    memo.update((id(value), None) for value in drop)
    return copy.deepcopy(model, memo)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, torch.nn.Parameter):
        return tensor
    slot = Slot(tensor)
    own = slot.over(slot.stored)
    own.__dict__.update(vars(tensor))
    return own
