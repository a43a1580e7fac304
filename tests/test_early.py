"""Kernels for LoRAs are compiled while the LoRA is on its way: the last wanted, and never in the way of anything."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from pack.loaders.gguf.types import GGMLType
from pack.loaders.low_rank import Adapter, Factors, parts
from pack.loaders.quant import dispatch, early
from pack.loaders.quant.early import Wanted, busy, compile_soon, compile_when_idle, done

GPU = torch.device("cuda", 0)
SECONDS = 20


def wanted(rank: int, ggml_type: GGMLType = GGMLType.Q8_0, device: torch.device = GPU) -> Wanted:
    return Wanted(device, ggml_type, torch.bfloat16, (64, 512), ((0, 64, rank),))


class Compiler:
    """Takes as long as it is told to for every kernel, and fails for some ranks."""

    def __init__(self, fails: tuple[int, ...] = ()) -> None:
        self.begun: list[int] = []
        self.may_end, self.any_begun = threading.Event(), threading.Event()
        self._fails = fails

    def __call__(self, ggml_type: GGMLType, shape: tuple, dtype: torch.dtype, ranks: list, device: object) -> None:
        (_, rank), *_ = ranks
        self.begun.append(rank)
        self.any_begun.set()
        assert self.may_end.wait(SECONDS)
        if rank in self._fails:
            raise RuntimeError("out of resource: shared memory")


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch):
    made = Compiler(fails=(3,))
    monkeypatch.setattr(dispatch, "compile_with_products", made)
    monkeypatch.setattr(early, "_ever_later", set())
    monkeypatch.setattr(early, "_busy_until", 0.0)
    yield made
    made.may_end.set()
    finish()


def finish() -> None:
    """Until every thread has done what it was made for, and is gone."""
    for thread in threading.enumerate():
        if thread.name.startswith("sluice-compile"):
            thread.join(SECONDS)
            assert not thread.is_alive()


def test_of_one_type_the_last_wanted_is_compiled(compiler: Compiler) -> None:
    compile_soon([wanted(16)])
    assert compiler.any_begun.wait(SECONDS)
    with early._turns:  # the other one is taken
        for rank in (32, 48, 64):
            compile_soon([wanted(rank), wanted(rank + 1, GGMLType.Q4_K)])
        compiler.may_end.set()
    finish()
    assert sorted(compiler.begun) == [16, 64, 65]


def test_what_fails_is_forgotten(compiler: Compiler) -> None:
    compiler.may_end.set()
    compile_soon([wanted(3)])
    finish()
    compile_soon([wanted(4)])
    finish()
    assert compiler.begun == [3, 4]


def test_nothing_is_compiled_for_a_cpu(compiler: Compiler) -> None:
    compiler.may_end.set()
    compile_soon([wanted(16, device=torch.device("cpu"))])
    compile_when_idle([wanted(16, device=torch.device("cpu"))])
    finish()
    assert compiler.begun == []


def test_idle_time_is_for_each_kernel_once_whatever_fails(compiler: Compiler) -> None:
    compiler.may_end.set()
    compile_when_idle([wanted(8), wanted(3), wanted(8), wanted(16)])
    finish()
    compile_when_idle([wanted(8), wanted(32)])
    finish()
    assert compiler.begun == [8, 3, 16, 32]
    assert early._idler is None


def test_what_is_wanted_now_goes_first_and_a_run_is_not_disturbed(compiler: Compiler) -> None:
    compile_when_idle([wanted(rank) for rank in (8, 16, 32)])
    assert compiler.any_begun.wait(SECONDS)
    busy(SECONDS * 10)
    compile_soon([wanted(64)])  # which has no need to wait for those
    compiler.may_end.set()
    for thread in threading.enumerate():
        if thread.name == "sluice-compile":
            thread.join(SECONDS)
    assert compiler.begun == [8, 64]
    busy()  # does not shorten it
    (idler,) = (thread for thread in threading.enumerate() if thread.name == "sluice-compile-idle")
    idler.join(3 * early.PATIENCE)
    assert compiler.begun == [8, 64]
    done()
    finish()
    assert compiler.begun == [8, 64, 16, 32]


def test_a_process_does_not_wait_for_what_nobody_wants() -> None:
    """It ends with the kernel that is being compiled, and what was to come after is left."""
    script = """if True:
        import sys, time, types
        package = types.ModuleType("pack")
        package.__path__ = [sys.argv[1]]
        sys.modules["pack"] = package
        import torch
        from pack.loaders.gguf.types import GGMLType
        from pack.loaders.quant import dispatch
        from pack.loaders.quant.early import Wanted, compile_when_idle

        def compiles(ggml_type, shape, dtype, parts, device):
            print(parts[0][1], flush=True)
            time.sleep(0.3)

        dispatch.compile_with_products = compiles
        gpu = torch.device("cuda", 0)
        compile_when_idle(
            Wanted(gpu, GGMLType.Q8_0, torch.bfloat16, (64, 512), ((0, 64, rank),)) for rank in range(1, 1000)
        )
        time.sleep(0.4)
    """
    command = [sys.executable, "-c", script, str(Path(__file__).parents[1])]
    begun = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.split()
    assert 0 < len(begun) < 100


def test_parts_are_those_of_the_products() -> None:
    def adapter(start: int, rows: int, rank: int) -> Adapter:
        return Adapter(torch.zeros(rows, rank), torch.zeros(rank, 8), 1.0, start)

    for found in (
        [adapter(0, 12, 3)],
        [adapter(0, 12, 3), adapter(0, 12, 4)],
        [adapter(8, 4, 2), adapter(0, 4, 1), adapter(8, 4, 5)],
        [adapter(0, 12, 3), adapter(4, 4, 1)],
    ):
        products = Factors(found, torch.device("cpu"), torch.float32).products
        assert parts(found) == tuple((rows.start, rows.stop, len(a)) for rows, a, _ in products)
