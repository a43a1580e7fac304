"""A GPU's order of work without a GPU: queues that run when they like, as far as the events between them allow.

Every call only appends to the queue of its stream. What a real device would do at some unknown time happens here at the
worst or at a random one, so a missing edge between two streams shows as wrong bytes, in every run with the same seed:

    late     copies happen when compute waits for them, compute first of all else
    early    copies happen as soon as the events let them, compute when a copy or the end waits for it
    random   after every call, some of what could happen does; for a while one stream is fast, then another

With `eager` the compute stream is the calling thread itself, as for modules that run on the CPU: it is never behind,
and its waiting for an event makes the copies happen then.

The driver's part, to lock memory, is a `NotingRegistrar`.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from pack.offload.errors import RefusedError
from pack.offload.registration import NoRegistrar, Registrar

POLICIES = ("late", "early", "random")


class NotingRegistrar:
    """Lets any memory be registered, up to a number of times, and knows what is."""

    def __init__(self, most: int = 1 << 30, read_only: str | None = None) -> None:
        self.registered: dict[int, tuple[int, bool]] = {}
        self.asked = 0
        self._most, self._read_only = most, read_only

    def read_only_refusal(self) -> str | None:
        return self._read_only

    def register(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        self.asked += 1
        if self.asked > self._most:
            raise RefusedError("the limit on locked memory is reached")
        self.registered[address] = nbytes, read_only

    def unregister(self, address: int) -> None:
        del self.registered[address]


@dataclass(eq=False)
class Marker:
    """A point in a stream."""

    stream: FakeStream
    reached: bool = False


@dataclass(eq=False)
class FakeStream:
    name: str
    queue: deque[Callable[[], object] | Marker] = field(default_factory=deque)  # a call, or a point to wait for


class FakeEvent:
    marker: Marker | None = None


class FakeDevice:
    torch_device = torch.device("cpu")
    copies_by_itself = True

    def __init__(
        self, policy: str = "late", seed: int = 0, *, eager: bool = False, registrar: Registrar | None = None
    ) -> None:
        self.registrar = registrar or NoRegistrar("there is no GPU")
        self.staged: set[int] = set()  # addresses of host memory that may be copied from as it is
        self.host_waits = 0  # by the thread that made the device
        self._policy, self._random, self._eager = policy, random.Random(seed), eager
        self._lock, self._owner = threading.RLock(), threading.get_ident()
        self._compute = FakeStream("compute")
        self._streams = [self._compute]
        self._fast = self._compute
        self._on: FakeStream | None = None

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Memory that a kernel enqueued before still writes to, as an allocator that knows its stream may give out."""
        memory = torch.empty(nbytes, dtype=torch.uint8)
        self.compute(lambda: memory.fill_(0xEE))
        return memory

    def staging(self, nbytes: int) -> torch.Tensor:
        memory = torch.full((nbytes,), 0xDD, dtype=torch.uint8)
        self.staged.add(memory.data_ptr())
        return memory

    def compute_stream(self) -> FakeStream:
        return self._compute

    def change_compute_stream(self) -> None:
        """From now on the caller computes elsewhere, without waiting for what it computed before."""
        self._streams.append(FakeStream(f"compute {len(self._streams)}"))
        self._compute = self._streams[-1]

    def new_copy_stream(self) -> FakeStream:
        self._streams.insert(0, FakeStream(f"copy {len(self._streams)}"))
        return self._streams[0]

    def new_event(self) -> FakeEvent:
        return FakeEvent()

    def record(self, event: FakeEvent, stream: FakeStream) -> None:
        marker = event.marker = Marker(stream)
        self._enqueue(stream, lambda: setattr(marker, "reached", True))

    def wait(self, stream: FakeStream, event: FakeEvent) -> None:
        if event.marker is not None:
            self._enqueue(stream, event.marker)

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        self._on = stream
        try:
            yield
        finally:
            self._on = None

    def copier(self, out: torch.Tensor, data: torch.Tensor) -> Callable[[], None]:
        def copy() -> None:
            assert self._on is not None, "a copy outside of its stream"
            self._enqueue(self._on, lambda: out.copy_(data))

        return copy

    def fill(self, out: torch.Tensor, value: int, stream: FakeStream) -> None:
        self._enqueue(stream, lambda: out.fill_(value))

    def compute(self, kernel: Callable[[], object]) -> None:
        """Enqueue something on the compute stream."""
        self._enqueue(self._compute, kernel)

    def submit(self, stream: FakeStream) -> None: ...

    def synchronize(self, awaited: FakeEvent | FakeStream) -> None:
        self.host_waits += threading.get_ident() == self._owner
        with self._lock:
            if isinstance(awaited, FakeStream):
                self._empty(awaited)
            elif awaited.marker is not None:
                self._reach(awaited.marker)

    def finish(self) -> None:
        """Everything that was enqueued has happened."""
        with self._lock:
            for stream in self._streams if self._policy == "early" else reversed(self._streams):
                self._empty(stream)

    def _enqueue(self, stream: FakeStream, operation: Callable[[], object] | Marker) -> None:
        with self._lock:
            stream.queue.append(operation)
            if self._eager and stream is self._compute:
                self._empty(stream)
            if self._policy == "early":
                while any(self._step(stream) for stream in self._streams if stream.name.startswith("copy")):
                    pass
            elif self._policy == "random":
                if self._random.random() < 0.05:
                    self._fast = self._random.choice(self._streams)
                for _ in range(self._random.randrange(4)):
                    self._step(self._fast)

    def _empty(self, stream: FakeStream) -> None:
        while stream.queue:
            self._force(stream)

    def _reach(self, marker: Marker) -> None:
        while not marker.reached:
            assert marker.stream.queue, "a point that is not in its stream was waited for"
            self._force(marker.stream)

    def _force(self, stream: FakeStream) -> None:
        """Run the first of a queue, and before it what it waits for."""
        first = stream.queue[0]
        if isinstance(first, Marker):
            self._reach(first)
        self._step(stream)

    def _step(self, stream: FakeStream) -> bool:
        """Run the first of a queue if its turn has come."""
        if not stream.queue:
            return False
        first = stream.queue[0]
        if isinstance(first, Marker):
            if not first.reached:
                return False
        else:
            first()
        stream.queue.popleft()
        return True
