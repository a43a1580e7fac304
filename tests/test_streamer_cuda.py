"""On a GPU: the streamed bytes are right however slow either stream is, and the computing thread never waits for it."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from pack.offload.costs import BlockCost, Link
from pack.offload.device import CudaDevice
from pack.offload.errors import ArenaError, RefusedError, SourceError
from pack.offload.files import Key, StoredFile, Weight
from pack.offload.plan import StreamPlan, make_plan
from pack.offload.registration import CudaRegistrar
from pack.offload.source import choose
from pack.offload.streamer import POISON, BlockStreamer

pytestmark = pytest.mark.cuda

KINDS = ["page_cache", "pinned", "disk", "memory"]
SLOW = 20_000_000  # clock cycles, about 10 ms
PLENTY = 1 << 32


def plan_of(number: int = 8) -> StreamPlan:
    blocks = [BlockCost(f"block {i}", (3 << 20, (2 << 20) + 100 * i, 1000, 1 << 20), 0.001) for i in range(number)]
    plan = make_plan(blocks, Link(5e9), 20 << 20)
    assert plan.streamed_bytes > 2 * plan.ring_bytes
    return plan


class Checked:
    """A streamed model whose blocks compare their bytes with the truth on the GPU, without the host's help."""

    def __init__(self, folder: Path, kind: str, **options: bool) -> None:
        self.plan, self.device = plan_of(), CudaDevice(torch.device("cuda"))
        random_bytes = torch.Generator().manual_seed(0)
        truth = {
            (copy.block, copy.tensor): torch.randint(0, 255, (copy.nbytes,), dtype=torch.uint8, generator=random_bytes)
            for copy in self.plan.copies
        }
        self.choice = choose(self._weights(folder, kind, truth), self.device, kind=kind, ram_budget_bytes=PLENTY)
        assert self.choice.source.kind == kind, self.choice.reason
        self.truth = {key: data.cuda() for key, data in truth.items()}
        with torch.inference_mode(False):
            self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        self.slow_copies = False
        self.streamer = BlockStreamer(self.plan, self.choice.source, self.device, **options)

    def _weights(self, folder: Path, kind: str, truth: dict[Key, torch.Tensor]) -> dict[Key, Weight]:
        if kind == "memory":
            return {key: Weight(data.nbytes, data=data.pin_memory()) for key, data in truth.items()}
        path = folder / "model.bin"
        path.write_bytes(b"head" + b"".join(data.numpy().tobytes() for data in truth.values()))
        weights, offset, file = {}, 4, StoredFile.of(path)
        for key, data in truth.items():
            weights[key] = Weight(data.nbytes, file=file, offset=offset)
            offset += data.nbytes
        return weights

    def block(self, block: int, *, slow_compute: bool = False) -> None:
        views = self.streamer.wait(block)
        if slow_compute:
            torch.cuda._sleep(SLOW)
        for tensor, view in views.items():
            self.wrong += (view != self.truth[block, tensor]).sum()
        if self.slow_copies:
            with torch.cuda.stream(self.streamer._copying):
                torch.cuda._sleep(SLOW)
        self.streamer.release(block)

    def step(self, **options: bool) -> None:
        for block in range(len(self.plan.blocks)):
            self.block(block, **options)

    def check(self) -> None:
        assert self.wrong.item() == 0
        self.streamer.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slow", ["neither", "compute", "copies"])
@pytest.mark.parametrize("poison", [False, True])
def test_a_slow_stream_changes_nothing(tmp_path: Path, kind: str, slow: str, poison: bool) -> None:
    model = Checked(tmp_path, kind, poison=poison)
    model.slow_copies = slow == "copies"
    for _ in range(3):
        model.step(slow_compute=slow == "compute")
    model.check()


@pytest.mark.parametrize("kind", KINDS)
def test_odd_orders_change_nothing(tmp_path: Path, kind: str) -> None:
    model, rng = Checked(tmp_path, kind, poison=True), random.Random(0)
    for turn in range(12):
        order = rng.choices(range(len(model.plan.blocks)), k=8)
        for block in order:
            model.block(block, slow_compute=rng.random() < 0.2)
        model.slow_copies = bool(turn % 2)
        model.streamer.wait(rng.choice(order))  # broken off here
    model.check()


def test_a_missing_edge_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: without its waits the copy stream overwrites what is in use."""
    model = Checked(tmp_path, "page_cache")
    monkeypatch.setattr(model.device, "wait", lambda stream, event: None)
    for _ in range(3):
        model.step(slow_compute=True)
    assert model.wrong.item() > 0
    model.streamer.close()


@pytest.fixture
def debug_mode_reset() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["page_cache", "pinned", "memory"])
def test_the_computing_thread_never_waits(tmp_path: Path, kind: str, debug_mode_reset: None) -> None:
    model = Checked(tmp_path, kind)
    model.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    busy = torch.cuda.Event()
    model.step(slow_compute=True)
    busy.record()
    assert not busy.query(), "a whole step is enqueued while its first block still computes"
    torch.cuda.set_sync_debug_mode("default")
    model.check()


def test_another_compute_stream(tmp_path: Path) -> None:
    model = Checked(tmp_path, "page_cache")
    for turn in range(4):
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            model.step(slow_compute=bool(turn % 2))
        torch.cuda.current_stream().wait_stream(other)
    model.check()


def test_in_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        model = Checked(tmp_path, "page_cache")
        model.step()
    model.step()
    model.check()


def test_a_refused_registration_leaves_no_error_in_the_thread() -> None:
    registrar = CudaDevice(torch.device("cuda")).registrar
    assert isinstance(registrar, CudaRegistrar)
    for address, nbytes in ((4096, 4096), (ctypes.addressof(ctypes.create_string_buffer(10)), 1 << 44)):
        with pytest.raises(RefusedError, match="CUDA_ERROR"):
            registrar.register(address, nbytes)
        assert torch.ones(3, device="cuda").sum().item() == 3
    caught: list[str] = []

    def elsewhere() -> None:
        try:
            registrar.register(4096, 4096)
        except RefusedError as refusal:
            caught.append(str(refusal))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "CUDA_ERROR" in caught[0]


@pytest.mark.parametrize("kind", ["page_cache", "disk"])
def test_a_file_cut_off_in_use_is_an_error_and_nothing_worse(tmp_path: Path, kind: str) -> None:
    model = Checked(tmp_path, kind)
    model.step()
    os.truncate(tmp_path / "model.bin", 10)
    with pytest.raises(SourceError, match="put the file back"):
        for _ in range(4):
            model.step()
    torch.cuda.synchronize()
    model.check()
    again = Checked(tmp_path, kind)
    again.step()
    again.check()


def test_no_room_for_the_arena() -> None:
    device = CudaDevice(torch.device("cuda"))
    source = choose({}, device, ram_budget_bytes=0).source
    with pytest.raises(ArenaError, match="smaller VRAM budget"):
        BlockStreamer(dataclasses.replace(plan_of(), ring_bytes=1 << 42), source, device)
    assert torch.ones(3, device="cuda").sum().item() == 3
    source.close()


def test_poison_is_what_a_late_reader_gets(tmp_path: Path) -> None:
    model = Checked(tmp_path, "memory", poison=True)
    views = model.streamer.wait(0)

    def spoiled() -> list[torch.Tensor]:
        return [(view == POISON).all() for view in views.values()]

    assert not any(flag.item() for flag in spoiled())  # loads the kernels too, which may take longer than the sleep
    with torch.cuda.stream(model.streamer._copying):
        torch.cuda._sleep(10 * SLOW)
    model.streamer.release(0)
    assert all(flag.item() for flag in spoiled())
    model.check()


@pytest.mark.parametrize("kind", KINDS)
def test_cycles_leave_nothing(tmp_path: Path, kind: str) -> None:
    def held() -> tuple[int, int, int, int]:
        torch.cuda.synchronize()
        maps = sum("model.bin" in line for line in Path("/proc/self/maps").read_text().splitlines())
        return torch.cuda.memory_allocated(), psutil.Process().num_fds(), threading.active_count(), maps

    def cycle() -> None:
        model = Checked(tmp_path, kind)
        model.step()
        model.check()

    cycle()
    before = held()
    for _ in range(10):
        cycle()
        os.unlink(tmp_path / "model.bin") if kind != "memory" else None
    assert held() == before
