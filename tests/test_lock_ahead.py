"""Pages that a thread locks before they are asked for: each once, whoever comes first, and none for nobody."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_device import NotingRegistrar
from pack.offload.errors import RefusedError
from pack.offload.files import Weight
from pack.offload.kept import KeptPages
from pack.offload.lock_ahead import NAME, lock_soon
from test_arrival import Gpu, Model, Registrar
from test_kept import CELL, Host, brought, locked, small_cells  # noqa: F401  (a fixture)
from test_source import nothing_is_left  # noqa: F401  (a fixture)

PATIENCE = 60  # seconds until a test fails that hangs


class Once(Registrar):
    """Refuses, as the driver does, what is locked already; and stops where it is told to until it may go on."""

    def __init__(self, stop_at: int = 1 << 30) -> None:
        super().__init__()
        self.stop_at, self.stopped, self.go_on = stop_at, threading.Event(), threading.Event()

    def register(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        if self.asked == self.stop_at:
            self.stopped.set()
            assert self.go_on.wait(PATIENCE)
        if address in self.registered:
            raise RefusedError("it is locked already")
        super().register(address, nbytes, read_only=read_only)


class Waiting:
    """A model that is going to be asked for."""

    def __init__(self, folder: Path, registrar: NotingRegistrar, seed: int = 0, most: int = 1 << 30) -> None:
        assert isinstance(registrar, Registrar)
        self.model, self.host = Model(folder, seed), Host(most)
        self.gpu, self.pages = Gpu("random", seed, registrar), KeptPages(self.host.limits())
        self.weights = [w for w in (slot.weight(self.model.located) for slot in self.model.slots) if w.file is not None]

    def all_locked(self) -> bool:
        return all(self.pages.holds(weight) for weight in self.weights)


@pytest.fixture(autouse=True)
def its_thread_ends(nothing_is_left: None) -> Iterator[None]:  # noqa: F811  (which looks after this has)
    yield
    for thread in threading.enumerate():
        if thread.name == NAME:
            thread.join(PATIENCE)


@pytest.mark.parametrize("seed", range(4))
def test_who_asks_later_finds_them_locked(tmp_path: Path, seed: int) -> None:
    registrar = Once()
    waiting = Waiting(tmp_path, registrar, seed)
    done = lock_soon(waiting.pages, waiting.weights, waiting.gpu).result(PATIENCE)
    assert waiting.all_locked() and done == waiting.pages.nbytes == waiting.host.locked
    asked = registrar.asked
    brought(waiting.model, waiting.gpu, waiting.pages)
    assert registrar.asked == asked
    assert waiting.pages.give_back() == done and not registrar.registered and not waiting.host.locked


@pytest.mark.parametrize("seed", range(4))
def test_who_asks_meanwhile_locks_what_is_not(tmp_path: Path, seed: int) -> None:
    registrar = Once(stop_at=2)
    waiting = Waiting(tmp_path, registrar, seed)
    ahead = lock_soon(waiting.pages, waiting.weights, waiting.gpu)
    assert registrar.stopped.wait(PATIENCE)
    registrar.stop_at = 1 << 30
    threading.Timer(0.05, registrar.go_on.set).start()  # while the other waits for the cell, or has gone on to another
    brought(waiting.model, waiting.gpu, waiting.pages)
    assert ahead.result(PATIENCE) <= waiting.pages.nbytes == waiting.host.locked
    assert waiting.all_locked() and waiting.pages.give_back() and not registrar.registered


def test_it_ends_where_pages_are_given_back(tmp_path: Path) -> None:
    registrar = Once(stop_at=3)
    waiting = Waiting(tmp_path, registrar)
    ahead = lock_soon(waiting.pages, waiting.weights, waiting.gpu)
    later = lock_soon(waiting.pages, waiting.weights, waiting.gpu)
    assert registrar.stopped.wait(PATIENCE)
    waiting.pages.give_back()
    registrar.go_on.set()
    assert 0 < ahead.result(PATIENCE) <= 4 * CELL and later.result(PATIENCE) == 0
    assert not registrar.registered and not waiting.host.locked


def test_no_more_than_the_host_allows(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path, registrar := Once(), most=4 * CELL)
    assert lock_soon(waiting.pages, waiting.weights, waiting.gpu).result(PATIENCE) == locked(registrar) == 4 * CELL
    brought(waiting.model, waiting.gpu, waiting.pages)
    waiting.pages.give_back()


def test_a_file_that_is_gone_or_changed_is_left_alone(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path, registrar := Once())
    waiting.model.files[0].touch()
    assert lock_soon(waiting.pages, waiting.weights, waiting.gpu).result(PATIENCE) == 0 == locked(registrar)
    waiting.model.files[0].unlink()
    assert lock_soon(waiting.pages, waiting.weights, waiting.gpu).result(PATIENCE) == 0 == locked(registrar)


def test_a_model_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    registrar = Once(stop_at=1)
    first = Waiting(tmp_path, registrar)
    ahead = lock_soon(first.pages, first.weights, first.gpu)
    (tmp_path / "other").mkdir()
    other = Waiting(tmp_path / "other", Once())
    weights: list[Weight] = other.weights
    later = lock_soon(other.pages, weights, other.gpu)
    assert registrar.stopped.wait(PATIENCE)
    del other
    registrar.go_on.set()
    assert ahead.result(PATIENCE) and later.result(PATIENCE) == 0
    first.pages.give_back()


def test_without_another_thread_nothing_is_locked_and_the_next_job_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = Waiting(tmp_path, Once())

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        job = lock_soon(waiting.pages, waiting.weights, waiting.gpu)
    assert isinstance(job.exception(PATIENCE), RuntimeError) and not waiting.all_locked()
    assert lock_soon(waiting.pages, waiting.weights, waiting.gpu).result(PATIENCE) > 0 and waiting.all_locked()
    waiting.pages.give_back()
