"""Which rung a device gets, that a window shows the bytes where they are, and that it leaves nothing behind."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from block_bytes import random_blocks
from pack.loaders.gguf.types import BLOCKS, QUANTISED, GGMLType
from pack.loaders.quant import reference
from pack.offload import device_view, unified
from pack.offload.device_view import bytes_at
from pack.offload.errors import RefusedError
from pack.offload.page_cache import PAGE
from pack.offload.unified import Facts, Window, ladder, open_window, spans_of

CPU = torch.device("cpu")
DEVICE = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU

try:
    import triton  # noqa: F401  (its own functions must be as they always are)

    with pytest.MonkeyPatch.context() as patch:
        # What @triton.jit makes of a kernel is decided when the kernel's module is imported.
        if DEVICE.type == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        from pack.loaders.quant.kernels import launch, multiply
except ImportError:  # no Triton: its wheels are for Linux
    launch = multiply = None  # type: ignore[assignment]

CANNOT = "this driver or GPU cannot register read-only memory"
DEVICES = {
    "GB10": Facts("GB10", integrated=True, host_pages=True, read_only_refusal=CANNOT),
    "GH200": Facts("GH200", host_pages=True),
    "Orin": Facts("Orin", integrated=True),
    "Strix Halo": Facts("Strix Halo", integrated=True),
    "H200": Facts("H200"),
    "B300": Facts("B300", read_only_refusal=CANNOT),
    "old iGPU": Facts("old iGPU", integrated=True, read_only_refusal=CANNOT),
    "CPU": Facts("cpu", is_cpu=True, read_only_refusal="there is no way for cpu"),
    "MPS": Facts("mps", read_only_refusal="there is no way for mps"),
}
AUTO = {"GB10": ("host_pages",), "GH200": ("host_pages", "registered"), "Orin": ("registered",)} | {
    "Strix Halo": ("registered",)
}
FORCED = AUTO | {"H200": ("registered",), "CPU": ("mapping",)}


@pytest.fixture(autouse=True)
def _switched_off_again():
    yield
    unified.set_mode(unified.OFF)


@pytest.mark.parametrize("name", DEVICES)
def test_rungs_of_each_device(name: str) -> None:
    assert ladder(DEVICES[name], "off").rungs == ()
    assert ladder(DEVICES[name], "auto").rungs == AUTO.get(name, ())
    assert ladder(DEVICES[name], "force").rungs == FORCED.get(name, ())


@pytest.mark.parametrize(
    ("name", "mode", "reason"),
    [
        ("H200", "off", "switched off"),
        ("H200", "auto", "H200 has memory of its own, in which weights are faster"),
        ("H200", "force", "forced on H200, which reads it over its bus"),
        ("B300", "force", f"B300 cannot read the file's mapping: {CANNOT}"),
        ("old iGPU", "auto", f"old iGPU cannot read the file's mapping: {CANNOT}"),
        ("GB10", "auto", "the GPU follows the CPU's page tables"),
        ("Orin", "auto", "the GPU shares the CPU's memory"),
        ("CPU", "auto", "the model computes on the CPU, which reads the mapping in any case"),
    ],
)
def test_reasons(name: str, mode: str, reason: str) -> None:
    assert ladder(DEVICES[name], mode).reason == reason


def test_mode_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="'on' is none of off, auto, force"):
        unified.set_mode("on")
    unified.set_mode("auto")
    assert unified.mode() == "auto"


@pytest.mark.parametrize(("word", "mode"), [("force", "force"), (" Auto ", "auto"), ("", "off"), ("yes", "off")])
def test_environment_goes_before_the_setting(word: str, mode: str) -> None:
    code = (
        "import sys, types; pack = types.ModuleType('pack'); pack.__path__ = [sys.argv[1]]\n"
        "sys.modules['pack'] = pack\n"
        "from pack.offload import unified\n"
        "before = unified.mode(); unified.set_mode('auto'); print(before, unified.mode())"
    )
    root = str(Path(__file__).resolve().parents[1])
    env = {**os.environ, unified.VARIABLE: word}
    done = subprocess.run([sys.executable, "-c", code, root], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [mode, mode if word else "auto"]
    assert ("is none of" in done.stderr) == (word == "yes")


# --- tensors over memory that is there


def test_the_last_view_gone_is_told_once() -> None:
    memory = torch.arange(64, dtype=torch.uint8)
    told: list[int] = []
    view = bytes_at(memory.data_ptr(), 64, CPU, lambda: told.append(threading.get_ident()))
    assert torch.equal(view, memory) and view.data_ptr() == memory.data_ptr() and not view.is_inference()
    part = view[8:24].view(torch.int32)
    del view
    gc.collect()
    assert not told and part[0] == memory[8:12].view(torch.int32)
    other = threading.Thread(target=lambda parts: parts.clear(), args=([part],))
    del part
    other.start()
    other.join()
    gc.collect()
    assert len(told) == 1


def test_what_is_left_at_the_end_of_the_program_harms_nobody() -> None:
    code = (
        "import sys, types; pack = types.ModuleType('pack'); pack.__path__ = [sys.argv[1]]\n"
        "sys.modules['pack'] = pack\n"
        "import torch\n"
        "from pack.offload.device_view import bytes_at\n"
        "memory = torch.zeros(64, dtype=torch.uint8)\n"
        "sys.kept = [bytes_at(memory.data_ptr(), 64, memory.device, lambda: print('late')) for _ in range(3)]\n"
        "torch.kept_too = sys.kept[0][1:]\n"
        "class Cycle: pass\n"
        "cycle = Cycle(); cycle.itself, cycle.tensor = cycle, sys.kept[1]\n"
    )
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


# --- windows


class FileWithGuard:
    """Bytes mapped read-only from a file that ends where its last page does; the page after it may not be touched."""

    def __init__(self, folder: Path, content: bytes) -> None:
        front = -len(content) % PAGE
        path = folder / f"{len(content)}.bin"
        path.write_bytes(b"\xff" * front + content)
        size = front + len(content)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        arguments: list[Any] = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.mmap.argtypes = arguments
        libc.munmap.argtypes = arguments[:2]
        anonymous, fixed, nothing = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0x10, 0
        begin = libc.mmap(None, size + PAGE, nothing, anonymous, -1, 0)
        with path.open("rb") as file:
            assert libc.mmap(begin, size, mmap.PROT_READ, mmap.MAP_SHARED | fixed, file.fileno(), 0) == begin
        self.unmap: Callable[[], object] = lambda: libc.munmap(begin, size + PAGE)
        memory = (ctypes.c_char * len(content)).from_address(begin + front)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)
        assert (self.tensor.data_ptr() + self.tensor.nbytes) % PAGE == 0


linux = pytest.mark.skipif(sys.platform != "linux", reason="places a mapping by Linux's mmap")
RUNG = unified.REGISTERED if DEVICE.type == "cuda" else unified.MAPPING


@linux
@pytest.mark.parametrize("ggml_type", sorted(QUANTISED), ids=lambda t: t.name)
def test_nothing_is_read_past_the_last_mapped_byte(ggml_type: GGMLType, tmp_path: Path) -> None:
    """A tensor that ends with its file and its page, as the last one of a GGUF file may. The page after it is a trap
    for the CPU, and no registered memory for the GPU."""
    rng = np.random.default_rng(int(ggml_type))
    for rows, blocks in ((1, 1), (5, 3)):
        stored = random_blocks(ggml_type, rows * blocks, rng, specials=False)
        file = FileWithGuard(tmp_path, stored.tobytes())
        window = Window(RUNG, DEVICE, [file.tensor])
        data = window.of(file.tensor)
        shape = (rows, blocks * BLOCKS[ggml_type].elements)
        expected = reference.dequantize(torch.from_numpy(stored.reshape(-1).copy()), ggml_type, shape, torch.float32)
        assert torch.equal(reference.dequantize(data, ggml_type, shape, torch.float32).cpu(), expected)
        rows_read = reference.dequantize_rows(
            data.view(rows, -1), ggml_type, shape[1], torch.tensor([rows - 1], device=DEVICE), torch.float32
        )
        assert torch.equal(rows_read.cpu(), expected[-1:])
        if launch is not None:
            assert torch.equal(launch.dequantize(data, ggml_type, shape, torch.float32).cpu(), expected)
            x = torch.ones(2, shape[1], device=DEVICE)
            product = multiply.linear(x, data.view(rows, -1), ggml_type, shape, None)
            bound = (shape[1] + 2) * 2.0**-21 * expected.abs().sum(1)
            assert product is None or ((product.cpu() - expected.sum(1)).abs() <= bound).all()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        del data
        window.close()
        del file.tensor
        file.unmap()


def test_a_window_shows_the_bytes_where_they_are() -> None:
    memory = torch.randint(0, 255, (5 * PAGE,), dtype=torch.uint8)
    tensors = [memory[10:100], memory[PAGE : PAGE + 7], memory[4 * PAGE : 4 * PAGE + 50]]
    gc.collect()
    before = len(device_view._living)
    window = Window(unified.MAPPING, CPU, tensors)
    assert window.nbytes == 90 + 7 + 50
    seen = [window.of(tensor) for tensor in tensors]
    assert all(torch.equal(a, b) and a.data_ptr() == b.data_ptr() for a, b in zip(seen, tensors, strict=True))
    assert len(device_view._living) > before
    window.close()
    del seen
    gc.collect()
    assert len(device_view._living) == before


def test_spans_are_whole_pages_and_neighbours_are_one() -> None:
    memory = torch.empty(16 * PAGE, dtype=torch.uint8)
    first = -(-memory.data_ptr() // PAGE) * PAGE - memory.data_ptr()
    pages = memory[first : first + 14 * PAGE]
    tensors = [pages[9 * PAGE + 5 : 9 * PAGE + 6], pages[10 : PAGE + 1], pages[2 * PAGE : 4 * PAGE], pages[0:0]]
    begin = pages.data_ptr()
    assert spans_of(tensors) == [(begin, begin + 4 * PAGE), (begin + 9 * PAGE, begin + 10 * PAGE)]


class Driver:
    """Registers anything, up to a number of times, and may see neighbouring pieces apart."""

    def __init__(self, most: int = 100, apart: int = 0) -> None:
        self.registered: dict[int, int] = {}
        self._most, self._apart = most, apart

    def register(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        if len(self.registered) == self._most:
            raise RefusedError("the limit on locked memory is reached")
        assert read_only
        self.registered[address] = nbytes

    def unregister(self, address: int) -> None:
        del self.registered[address]

    def device_address(self, address: int) -> int:
        return address + self._apart * len(self.registered)


def registered(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Window:
    monkeypatch.setattr(unified, "REGISTER_BYTES", PAGE)
    monkeypatch.setattr(unified, "mapping_registrar", lambda device: driver)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    memory = torch.zeros(3 * PAGE, dtype=torch.uint8)
    return Window(unified.REGISTERED, CPU, [memory])


def test_registration_ends_with_the_last_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    window = registered(driver, monkeypatch)
    assert len(driver.registered) >= 3 and set(driver.registered.values()) == {PAGE}
    *_, held = window._spans[0]
    window.close()
    assert driver.registered, "pages were unregistered under a tensor"
    del held
    gc.collect()
    assert not driver.registered


@pytest.mark.parametrize(
    ("driver", "reason"),
    [(Driver(most=2), "limit on locked memory"), (Driver(apart=PAGE), "addresses that are not neighbours")],
)
def test_refused_registration_leaves_nothing(driver: Driver, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RefusedError, match=reason):
        registered(driver, monkeypatch)
    assert not driver.registered


def test_first_rung_that_reads_right_is_taken() -> None:
    tensor = torch.zeros(100, dtype=torch.uint8)
    unified.set_mode(unified.FORCE)
    window, reason = open_window(CPU, [tensor], lambda window: None)
    assert window is not None and reason == "mapping: forced on the CPU"
    window.close()
    window, reason = open_window(CPU, [tensor], lambda window: "the device reads other bytes than the CPU")
    assert window is None and reason == "mapping: the device reads other bytes than the CPU"
    unified.set_mode(unified.OFF)
    assert open_window(CPU, [tensor], lambda window: None) == (None, "switched off")


def test_a_device_without_a_driver_says_so() -> None:
    with pytest.raises(RefusedError, match="not for cpu"):
        Window(unified.REGISTERED, CPU, [torch.zeros(100, dtype=torch.uint8)])


@pytest.mark.cuda
def test_gpu_sees_a_read_only_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(3 * PAGE + 100))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensor = torch.frombuffer(memoryview(mapped), dtype=torch.uint8)[96:]
    allocated = torch.cuda.memory_allocated()
    unified.set_mode(unified.FORCE)
    window, reason = open_window(DEVICE, [tensor], lambda window: None)
    assert window is not None, reason
    seen = window.of(tensor)
    assert seen.device == DEVICE and torch.cuda.memory_allocated() == allocated
    assert torch.equal(seen.cpu(), tensor)
    assert torch.equal(seen[8:16].view(torch.int64).cpu(), tensor[8:16].view(torch.int64))
    window.close()
    del seen, tensor
    gc.collect()
    mapped.close()  # BufferError if something still held it
    assert torch.ones(3, device=DEVICE).sum() == 3, "an error was left behind"
