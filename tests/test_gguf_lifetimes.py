"""Closing, dropping and reopening a GGUFFile, at any moment and from any thread: never a crash, nothing left behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import builders as b
import psutil
import pytest
import torch
from pack.loaders.gguf.reader import GGUFError, GGUFFile

ROOT = Path(__file__).resolve().parents[1]
linux = pytest.mark.skipif(sys.platform != "linux", reason="counts what /proc shows")
# torch warns that a read-only buffer could be written through the tensor; nobody does.
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable")


def in_subprocess(code: str, *arguments: object) -> str:
    """Run code that could kill its process; returns what it printed."""
    prelude = """
        import gc, sys, threading, types
        pack = types.ModuleType("pack"); pack.__path__ = [sys.argv[1]]; sys.modules["pack"] = pack
        import torch
        from pack.loaders.gguf.reader import GGUFFile
    """
    script = textwrap.dedent(prelude) + textwrap.dedent(code)
    command = [sys.executable, "-c", script, str(ROOT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


def test_tensors_outlive_close_whatever_the_order(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b.gguf_bytes({}, [b.Tensor("w", (1 << 20,), b.I8), b.Tensor("v", (4,))]))
    out = in_subprocess(
        """
        file = GGUFFile(sys.argv[2])
        w = torch.frombuffer(file.view("w"), dtype=torch.uint8)  # nobody else keeps the view
        gc.collect()
        print(file.close(), file.close())
        expected = (torch.arange(1 << 20) % 251).to(torch.uint8)
        assert torch.equal(w, expected)
        part = w[100:200].view(10, 10)  # shares the storage
        storage = w.untyped_storage()
        del w, file
        gc.collect()
        assert part[0, 0] == 100 and storage[5] == 5

        file = GGUFFile(sys.argv[2])
        views = [torch.frombuffer(file.view("w"), dtype=torch.uint8) for _ in range(50)]
        cycle = [views[0]]; cycle.append(cycle)  # freed by the collector only
        del file  # never closed
        gc.collect()
        assert all(torch.equal(v, expected) for v in views)
        del views; del cycle; gc.collect()

        file = GGUFFile(sys.argv[2])
        view = torch.frombuffer(file.view("v"), dtype=torch.float32)
        print(file.close()); del view; print(file.close())
        """,
        path,
    )
    assert out.split() == ["False", "False", "False", "True"]


def test_views_taken_and_dropped_by_threads_while_others_close_and_reopen(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b.gguf_bytes({"t": b.array(b.STRING, ["x"] * 5000)}, [b.Tensor("w", (1 << 16,), b.I8)]))
    out = in_subprocess(
        """
        import time
        from pack.loaders.gguf.reader import GGUFError
        sys.setswitchinterval(1e-5)
        file, failures, reads, stop = GGUFFile(sys.argv[2]), [], [0], time.monotonic() + 2
        expected = (torch.arange(1 << 16) % 251).to(torch.uint8)
        def work(job):
            while time.monotonic() < stop:
                try:
                    job()
                except GGUFError as error:
                    if "was closed" not in str(error):
                        failures.append(error)
                except BaseException as error:
                    failures.append(error)
        def read():
            t = torch.frombuffer(file.view("w"), dtype=torch.uint8)
            assert torch.equal(t, expected)
            reads[0] += 1
        def decode():
            assert len(file.metadata["t"]) == 5000
        def toggle():
            file.close(); file.reopen()
        torch.set_num_threads(1)
        jobs = [read, read, decode, toggle, toggle]
        threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
        [t.start() for t in threads]; [t.join() for t in threads]
        assert not failures, failures[:3]
        assert reads[0] > 20, reads
        print(file.close())
        if sys.platform == "linux":
            assert sys.argv[2] not in open("/proc/self/maps").read()
        """,
        path,
    )
    assert out.split() == ["True"]


@linux
def test_closing_frees_handles_and_mapping(tmp_path):
    paths = b.write_split(
        tmp_path,
        "m",
        [b.gguf_bytes(b.split_keys(i, 3, 3), [b.Tensor(f"w{i}", (64,))]) for i in range(3)],
    )
    process = psutil.Process()

    def mapped() -> set[str]:
        return {m.path for m in process.memory_maps() if m.path.startswith(str(tmp_path))}

    gc.collect()
    before = process.num_fds()
    for _ in range(20):
        file = GGUFFile(paths[1])
        assert mapped() == {str(p) for p in paths}
        tensor = torch.frombuffer(file.view("w2"), dtype=torch.float32)
        assert not file.close()
        assert mapped() == {str(paths[2])}  # the others went at once
        del tensor
        assert mapped() == set() and file.close()
    assert process.num_fds() == before
    GGUFFile(paths[0])  # dropped without close()
    gc.collect()
    assert process.num_fds() == before and mapped() == set()


@linux
def test_an_error_keeps_nothing_open(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b.gguf_bytes({}, [b.Tensor("w", (64,))])[:-8])
    before = psutil.Process().num_fds()
    with pytest.raises(GGUFError) as caught:
        GGUFFile(path)
    assert caught.value.__traceback__ is not None  # alive, with all its frames
    assert psutil.Process().num_fds() == before
    assert not [m for m in psutil.Process().memory_maps() if m.path == str(path)]


def test_reopen_brings_everything_back(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b.gguf_bytes({"list": b.array(b.U8, [1, 2])}, [b.Tensor("w", (4,))]))
    file = GGUFFile(path)
    old = file.view("w")
    assert not file.close() and file.closed
    file.reopen()
    assert not file.closed and bytes(file.view("w")) == bytes(old) and file.metadata["list"] == [1, 2]
    assert not file.close()  # the view of the first mapping still lives
    del old
    assert file.close() and file.close()


def rewrite_in_place(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def replace_by_rename(path: Path, content: bytes) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(content)
    os.replace(other, path)


@pytest.mark.parametrize("change", [rewrite_in_place, replace_by_rename])
def test_reopen_refuses_another_file(tmp_path, change):
    path = tmp_path / "m.gguf"
    original = b.gguf_bytes({"a": 1}, [b.Tensor("w", (4,))])
    path.write_bytes(original)
    file = GGUFFile(path)
    stamp = file.identity[0].mtime_ns
    assert file.same_file() and file.close()

    change(path, b.gguf_bytes({"a": 1}, [b.Tensor("w", (400,))]))
    os.utime(path, ns=(stamp, stamp))
    with pytest.raises(
        GGUFError, match=r"m\.gguf: the file was changed .* \(it had 128 bytes and has .*load the model again"
    ):
        file.reopen()
    assert file.closed and not file.same_file()

    change(path, b.gguf_bytes({"a": 2}, [b.Tensor("w", (4,))]))
    os.utime(path, ns=(stamp, stamp))
    with pytest.raises(GGUFError, match="its header differs"):
        file.reopen()

    change(path, original)
    os.utime(path, ns=(stamp + 5, stamp + 5))
    with pytest.raises(GGUFError, match="time of modification differs"):
        file.reopen()

    path.unlink()
    with pytest.raises(GGUFError, match="no such file"):
        file.reopen()

    change(path, original)
    os.utime(path, ns=(stamp, stamp))
    file.reopen()
    assert bytes(file.view("w")) == bytes(range(16))
    assert file.close()


def test_check_unchanged_sees_what_happens_to_an_open_file(tmp_path):
    path = tmp_path / "m.gguf"
    content = b.gguf_bytes({}, [b.Tensor("w", (4096,))])
    path.write_bytes(content)
    with GGUFFile(path) as file:
        file.check_unchanged()
        file.reopen()  # open already: only a check
        moved = path.rename(path.with_suffix(".moved"))
        with pytest.raises(GGUFError, match=r"moved or deleted .*put it back, or load the model again"):
            file.check_unchanged()
        moved.rename(path)
        file.check_unchanged()
        with open(path, "r+b") as other:
            other.truncate(len(content) - 4096)
        with pytest.raises(GGUFError, match="changed or replaced since it was loaded"):
            file.check_unchanged()
        assert not file.same_file()
