"""What a network needs beside its weights for one call, found by a dry run: no memory, no arithmetic.

The call is made with tensors that have a device, a dtype and a shape, and nothing else (torch's fake tensors), on a
copy of the network over such weights; every operation, attention included, allocates what it would allocate on that
device. The largest sum of what lives at once is the answer. It takes about as long as launching the operations does
(0.1 s for a VAE's decoder), so answers are kept for each network and shape.

What no dry run can see is a library's own workspace and the allocator's rounding; `SLACK` allows for them.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .slots import twin

SLACK = 1.2
KEPT = 32  # answers for each network


class Living(TorchDispatchMode):
    """Sums up the storages that operations make while they live, and remembers the largest sum.

    Args:
        ignored: ids of storages that live as long as this, such as the weights.
    """

    def __init__(self, ignored: set[int]) -> None:
        super().__init__()
        self._ignored = ignored
        self._storages: dict[int, weakref.ref] = {}
        self._bytes = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return result

    def see(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = id(storage), storage.nbytes()
        if key in self._storages or key in self._ignored:
            return

        def gone(_: Any) -> None:
            del self._storages[key]
            self._bytes -= nbytes

        self._storages[key] = weakref.ref(storage, gone)
        self._bytes += nbytes
        self.peak = max(self.peak, self._bytes)


def dry_run(
    network: torch.nn.Module,
    call: Callable[[Any, torch.Tensor], Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    drop: Callable[[torch.nn.Module], list] = lambda network: [],
    forget: Callable[[torch.nn.Module], None] = lambda network: None,
) -> int:
    """Bytes that `call(network, input)` needs on `device` beside the weights, the input of `shape` included.

    Args:
        drop, forget: what the host keeps on a network for a device, and how to take it off a copy (`slots.twin`).

    Raises:
        Exception: the network does what only real numbers allow, such as looking at a value.
    """
    copy = twin(network, drop(network))
    forget(copy)
    with torch.no_grad(), FakeTensorMode(), _quietly():
        for module in copy.modules():
            for kept, wrap in ((module._parameters, _parameter), (module._buffers, lambda tensor: tensor)):
                for name, tensor in kept.items():
                    if tensor is not None:
                        kept[name] = wrap(torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
        given = torch.empty(shape, dtype=dtype, device=device)
        weights = [tensor.untyped_storage() for tensor in (*copy.parameters(), *copy.buffers())]
        with Living({id(storage) for storage in weights}) as living:
            living.see(given.untyped_storage())
            call(copy, given)
    return int(living.peak * SLACK)


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def _quietly() -> Any:
    """Without what the caller's inference mode adds to each tensor."""
    return torch.inference_mode(False)


class Answers:
    """What dry runs found, for as long as the network lives; the oldest of many shapes go."""

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[torch.nn.Module, OrderedDict] = weakref.WeakKeyDictionary()

    def get(self, network: torch.nn.Module, key: Hashable, find: Callable[[], int | None]) -> int | None:
        """What was found for `key` before, or what `find` says now; None is kept, too."""
        known = self._of.setdefault(network, OrderedDict())
        if key not in known:
            known[key] = find()
            while len(known) > KEPT:
                known.popitem(last=False)
        return known[key]

    def clear(self) -> None:
        self._of.clear()

    def __len__(self) -> int:
        return sum(len(known) for known in self._of.values())
