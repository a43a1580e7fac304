"""What the streamer needs of a device: memory, two streams, and events between them.

Four of the calls (`record`, `wait`, `fill`, and what `copier` makes) only *enqueue*, and none of them waits on the
host. On the CPU there is one stream, the program itself, so enqueued means done. The tests add a third device, on which
an enqueued copy happens as late, as early or as oddly as the events allow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch

from .registration import Registrar, registrar_for

Stream = Any  # what the device makes them
Event = Any

# Windows' display driver collects commands before it submits them; asking for the state of a stream makes it submit.
BATCHES_COMMANDS = sys.platform == "win32"


class Device(Protocol):
    """A device's memory and order of work."""

    torch_device: torch.device
    registrar: Registrar
    copies_by_itself: bool  # from locked memory, while the program goes on

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Uninitialised bytes. RuntimeError when there is no room."""

    def staging(self, nbytes: int) -> torch.Tensor:
        """Uninitialised bytes of host memory that a copy from needs not be waited for; to be kept until it is done."""

    def compute_stream(self) -> Stream:
        """The stream in which the calling thread computes now."""

    def new_copy_stream(self) -> Stream: ...

    def new_event(self) -> Event: ...

    def record(self, event: Event, stream: Stream) -> None:
        """The event now stands for all that was enqueued on `stream` so far."""

    def wait(self, stream: Stream, event: Event) -> None:
        """What is enqueued on `stream` from now on starts after what the event stands for now."""

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        """Around copies: switching to a stream costs more than enqueueing one there."""

    def copier(self, out: torch.Tensor, data: torch.Tensor) -> Callable[[], object]:
        """What enqueues the copy of `data`, in host memory, to `out` on the device, on the stream that `on` was given,
        each time it is called."""

    def fill(self, out: torch.Tensor, value: int, stream: Stream) -> None: ...

    def submit(self, stream: Stream) -> None:
        """Let what is enqueued begin."""

    def synchronize(self, awaited: Event | Stream) -> None:
        """Block the calling thread until the event, or all of the stream, is done."""


class CudaDevice:
    """One GPU through torch's streams and its allocator, so that the host's accounting sees the memory."""

    copies_by_itself = True

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.torch_device = torch.device("cuda", index)
        self.registrar: Registrar = registrar_for(self.torch_device)
        self._stream: tuple[int, torch.cuda.Stream] | None = None  # the last that computed, by its address

    def allocate(self, nbytes: int) -> torch.Tensor:
        with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode
            return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)

    def staging(self, nbytes: int) -> torch.Tensor:
        with torch.inference_mode(False):
            try:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # the system locks no more; a copy from other memory is waited for
                return torch.empty(nbytes, dtype=torch.uint8)

    def compute_stream(self) -> torch.cuda.Stream:
        address = torch._C._cuda_getCurrentRawStream(self.torch_device.index)
        if self._stream is None or self._stream[0] != address:
            # An object for each question is the dearest part of asking.
            self._stream = address, torch.cuda.current_stream(self.torch_device)
        return self._stream[1]

    def new_copy_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.torch_device)

    def new_event(self) -> torch.cuda.Event:
        return torch.cuda.Event(blocking=True)  # a thread that waits for it sleeps

    def record(self, event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        event.record(stream)

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[object]:
        return torch.cuda.stream(stream)

    def copier(self, out: torch.Tensor, data: torch.Tensor) -> Callable[[], object]:
        return partial(out.copy_, data, non_blocking=True)

    def fill(self, out: torch.Tensor, value: int, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            out.fill_(value)

    def submit(self, stream: torch.cuda.Stream) -> None:
        if BATCHES_COMMANDS:
            stream.query()

    def synchronize(self, awaited: torch.cuda.Event | torch.cuda.Stream) -> None:
        awaited.synchronize()


class HostDevice:
    """The CPU: everything happens at once."""

    copies_by_itself = False

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device
        self.registrar: Registrar = registrar_for(device)

    def allocate(self, nbytes: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)

    def staging(self, nbytes: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8)

    def compute_stream(self) -> None:
        return None

    new_copy_stream = new_event = compute_stream

    def record(self, event: None, stream: None) -> None: ...

    def wait(self, stream: None, event: None) -> None: ...

    def on(self, stream: None) -> AbstractContextManager[object]:
        return nullcontext()

    def copier(self, out: torch.Tensor, data: torch.Tensor) -> Callable[[], object]:
        return partial(out.copy_, data)

    def fill(self, out: torch.Tensor, value: int, stream: None) -> None:
        out.fill_(value)

    def submit(self, stream: None) -> None: ...

    def synchronize(self, awaited: None) -> None: ...


def device_for(device: torch.device) -> Device:
    """CUDA (and ROCm, which torch calls the same) with streams, any other device in the program's own order."""
    if device.type == "cuda":
        return CudaDevice(device)
    return HostDevice(torch.empty(0, device=device).device)  # as tensors there say it, with an index or without
