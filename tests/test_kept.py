"""Pages that stay locked between two loads: none is locked twice, no more than allowed, and all are given back."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_device import POLICIES, NotingRegistrar
from pack.offload import arrival, kept, page_cache, stretches
from pack.offload.arrival import send
from pack.offload.errors import SourceError
from pack.offload.kept import KeptPages, Limits
from pack.offload.page_cache import locked_bytes
from pack.offload.registration import CudaRegistrar
from pack.offload.source import choose
from test_arrival import Gpu, Model, Registrar
from test_cancelled_source import Cancelled, Canceller
from test_source import (  # noqa: F401  (fixtures)
    PAGE,
    PLENTY,
    Stored,
    device_with,
    nothing_is_left,
    read,
    small_parts,
    stored,
)

CELL = 5 * PAGE


class Host:
    """Allows so many bytes to be locked, and counts them."""

    def __init__(self, most: int = PLENTY) -> None:
        self.most, self.locked = most, 0

    def account(self, nbytes: int) -> None:
        self.locked += nbytes
        assert 0 <= self.locked <= self.most

    def limits(self) -> Limits:
        return Limits(lambda: self.most - self.locked, self.account)


class Driver:
    """NVIDIA's on a system that lets so many bytes be locked."""

    def __init__(self) -> None:
        self.most = PLENTY
        self.ranges: dict[int, int] = {}

    @property
    def locked(self) -> int:
        return sum(self.ranges.values())

    def cuMemHostRegister_v2(self, address, nbytes, flags) -> int:
        if self.locked + nbytes.value > self.most:
            return 2
        self.ranges[address.value] = nbytes.value
        return 0

    def cuMemHostUnregister(self, address) -> int:
        del self.ranges[address.value]
        return 0

    def cuDeviceGetAttribute(self, value, number, index) -> int:
        value._obj.value = 1
        return 0

    def cuGetErrorName(self, error, text) -> int:
        return 0

    def __getattr__(self, name: str):
        return lambda *args: 0  # contexts


@pytest.fixture(autouse=True)
def small_cells(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kept, "CELL_BYTES", CELL)
    monkeypatch.setattr(stretches, "STRETCH_BYTES", CELL)
    monkeypatch.setattr(arrival, "WORTH_LOCKING", 1)
    yield
    gc.collect()
    assert not kept._all.all(), "somebody still has pages"


@pytest.fixture
def free_ram(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def set_to(nbytes: int) -> None:
        monkeypatch.setattr(kept.psutil, "virtual_memory", lambda: SimpleNamespace(available=nbytes))

    return set_to


def brought(model: Model, gpu: Gpu, pages: KeptPages, at: int = 1 << 30) -> None:
    watch = Canceller(at).watch
    model.check(send(model.slots, gpu, lambda slot: None, model.located, True, watch, pages).wait())


def locked(registrar: NotingRegistrar) -> int:
    return sum(nbytes for nbytes, _ in registrar.registered.values())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(4))
def test_the_second_time_nothing_is_locked(tmp_path: Path, policy: str, seed: int) -> None:
    model, registrar, host = Model(tmp_path, seed), Registrar(), Host()
    gpu, pages = Gpu(policy, seed, registrar), KeptPages(host.limits())
    brought(model, gpu, pages)
    asked, nbytes = registrar.asked, pages.nbytes
    assert asked > 10 and nbytes == locked(registrar) == host.locked
    for _ in range(2):
        brought(model, gpu, pages)
    assert (registrar.asked, pages.nbytes) == (asked, nbytes)
    assert pages.give_back() == nbytes and (registrar.registered, host.locked, pages.nbytes) == ({}, 0, 0)
    brought(model, gpu, pages)
    assert registrar.asked == 2 * asked
    pages.give_back()


@pytest.mark.parametrize("cells", [0, 1, 7])
def test_no_more_is_kept_than_the_host_allows(tmp_path: Path, cells: int) -> None:
    model, registrar, host = Model(tmp_path, 1), Registrar(), Host(cells * CELL)
    pages = KeptPages(host.limits())
    for _ in range(2):
        brought(model, Gpu("random", 0, registrar), pages)
        assert locked(registrar) == host.locked == pages.nbytes <= cells * CELL
        assert len(registrar.registered) == cells
    pages.give_back()


def test_no_more_is_kept_than_a_share_of_free_ram(tmp_path: Path, free_ram: Callable[[int], None]) -> None:
    model, registrar, host = Model(tmp_path, 1), Registrar(), Host()
    one, other = KeptPages(host.limits()), KeptPages(host.limits())
    free_ram(32 * CELL)
    brought(model, Gpu("random", 0, registrar), one)
    assert 14 * CELL < one.nbytes <= 16 * CELL
    brought(model, Gpu("random", 1, registrar), other)
    assert one.nbytes + other.nbytes <= 16 * CELL
    assert kept.relieve() == 0 and kept.kept_bytes() == one.nbytes + other.nbytes
    free_ram(2 * CELL)
    assert kept.relieve() >= 14 * CELL and one.nbytes + other.nbytes <= 2 * CELL
    kept.give_all_back()
    assert registrar.registered == {} and host.locked == 0


def test_what_is_in_use_is_not_given_back(stored: Stored) -> None:  # noqa: F811
    registrar, host = Registrar(), Host()
    device, pages = device_with(registrar), KeptPages(host.limits())
    some = {key: weight for key, weight in stored.weights.items() if key[0] < 2}
    source = choose(some, device, ram_budget_bytes=0, kept=pages).source
    use = pages.use(device)
    assert use is not None
    (file,) = source.files.all()  # type: ignore[attr-defined]
    use.mapped(file)
    last = (file.stored, file.stored.size // CELL * CELL, file.stored.size)
    assert last not in use and use.lock(last)
    use.close()
    use.close()
    assert pages.give_back() == last[2] - last[1] and pages.nbytes == locked(registrar) > 0
    for key in some:
        assert read(source, some, key) == stored.truth(key)
    source.close()
    assert pages.give_back() > 0 and registrar.registered == {}


def test_a_source_leaves_its_pages_locked(stored: Stored) -> None:  # noqa: F811
    registrar, host = Registrar(), Host()
    device, pages, rng = device_with(registrar), KeptPages(host.limits()), random.Random(0)
    every = choose(stored.weights, device, ram_budget_bytes=0, kept=pages)
    assert every.source.kind == "page_cache" and "stay registered" in every.reason and not every.refusals
    every.source.close()
    asked = registrar.asked
    assert pages.nbytes == locked(registrar) == host.locked > 0
    for _ in range(5):
        some = dict(rng.sample(list(stored.weights.items()), 5))
        source = choose(some, device, ram_budget_bytes=0, kept=pages).source
        for key in some:
            assert read(source, some, key) == stored.truth(key)
        source.check()
        source.close()
    assert registrar.asked == asked
    pages.give_back()


def test_where_not_all_may_be_kept_a_source_registers_its_own(stored: Stored) -> None:  # noqa: F811
    registrar, host = Registrar(), Host(CELL)
    pages = KeptPages(host.limits())
    choice = choose(stored.weights, device_with(registrar), ram_budget_bytes=0, kept=pages)
    assert choice.source.kind == "page_cache" and "stay registered" not in choice.reason
    for key in stored.weights:
        assert read(choice.source, stored.weights, key) == stored.truth(key)
    choice.source.close()
    pages.give_back()
    assert registrar.registered == {} and host.locked == 0


def test_what_is_kept_for_another_model_cannot_be_had(tmp_path: Path, stored: Stored) -> None:  # noqa: F811
    model, registrar, host = Model(tmp_path, 1), Registrar(), Host()
    pages = KeptPages(host.limits())
    brought(model, Gpu("late", 0, registrar), pages)
    use = pages.use(Gpu("late", 0, registrar))
    assert use is not None
    for cell in list(pages._held.cells):
        assert use.lock(cell)
    needed, others = sum(weight.nbytes for weight in stored.weights.values()), locked(registrar)
    free, own = int(needed / page_cache.SHARE_OF_FREE_RAM) + PAGE, NotingRegistrar()
    choice = choose(stored.weights, device_with(own), ram_budget_bytes=0, free_ram_bytes=free)
    assert "page_cache" in dict(choice.refusals) and own.registered == {}  # it would lock more than there is
    choice.source.close()
    use.close()
    choice = choose(stored.weights, device_with(own), ram_budget_bytes=0, free_ram_bytes=free)
    assert choice.source.kind == "page_cache" and locked(registrar) == 0 < others
    pages_of_two = locked_bytes()
    second = choose(stored.weights, device_with(own), ram_budget_bytes=0, free_ram_bytes=free)  # say for another GPU
    assert second.source.kind == "page_cache" and locked_bytes() <= max(pages_of_two, stored.path.stat().st_size)
    choice.source.close()
    second.source.close()
    assert locked_bytes() == 0


@pytest.mark.parametrize("kind", ["page_cache", "pinned"])
def test_a_limit_of_the_system_is_shared(tmp_path: Path, stored: Stored, kind: str) -> None:  # noqa: F811
    driver, host, other = Driver(), Host(), Stored(tmp_path / "other.bin", 1)
    device = device_with(CudaRegistrar(driver, 0))  # type: ignore[arg-type]
    pages = KeptPages(host.limits())
    choose(other.weights, device, ram_budget_bytes=0, kept=pages).source.close()
    assert driver.locked == pages.nbytes > 0
    driver.most = driver.locked + 3 * PAGE
    choice = choose(stored.weights, device, kind=kind, ram_budget_bytes=PLENTY)
    assert choice.source.kind == kind and pages.nbytes == 0, choice.reason
    choice.source.close()
    assert driver.locked == 0


def test_no_more_is_kept_than_sources_leave(stored: Stored, free_ram: Callable[[int], None]) -> None:  # noqa: F811
    registrar, host = Registrar(), Host()
    source = choose(stored.weights, device_with(NotingRegistrar()), ram_budget_bytes=0).source
    free_ram(int(locked_bytes() / page_cache.SHARE_OF_FREE_RAM))
    pages = KeptPages(host.limits())
    use = pages.use(Gpu("late", 0, registrar))
    assert use is not None and use.has_room(0) and not use.has_room(PAGE)
    source.close()
    assert use.has_room(PAGE)
    use.close()


@pytest.mark.parametrize("refused", ["by the host", "by the driver"])
def test_what_does_without_kept_pages_leaves_none(stored: Stored, refused: str) -> None:  # noqa: F811
    registrar, host = {
        "by the host": (NotingRegistrar(), Host(3 * CELL)),
        "by the driver": (NotingRegistrar(4), Host()),
    }[refused]
    pages = KeptPages(host.limits())
    choice = choose(stored.weights, device_with(registrar), ram_budget_bytes=PLENTY, kept=pages)
    assert "stay registered" not in choice.reason
    assert pages.nbytes == host.locked == 0
    choice.source.close()
    pages.give_back()


@pytest.mark.parametrize("kind", ["page_cache", "pinned"])
def test_a_source_that_needs_the_room_gets_it(tmp_path: Path, stored: Stored, kind: str) -> None:  # noqa: F811
    model, registrar, host = Model(tmp_path, 1), Registrar(), Host()
    pages = KeptPages(host.limits())
    brought(model, Gpu("late", 0, registrar), pages)
    assert pages.nbytes
    needed = sum(weight.nbytes for weight in stored.weights.values())
    budgets = {"page_cache": {"free_ram_bytes": needed}, "pinned": {}}[kind]
    device = device_with(NotingRegistrar())
    choice = choose(stored.weights, device, kind=kind, ram_budget_bytes=needed // 2, **budgets)
    assert pages.nbytes == 0 and host.locked == 0
    if kind == "pinned":
        assert choice.source.kind == "pinned"
    choice.source.close()


@pytest.mark.parametrize("policy", POLICIES)
def test_cancelled_anywhere(tmp_path: Path, policy: str) -> None:
    model, cancelled, host = Model(tmp_path, 3), 0, Host()
    pages, registrar = KeptPages(host.limits()), Registrar()
    for at in range(1000):
        try:
            brought(model, Gpu(policy, at, registrar), pages, at)
        except Cancelled:
            cancelled += 1
            assert locked(registrar) == pages.nbytes == host.locked
            if at % 2:
                pages.give_back()
                assert registrar.registered == {} and host.locked == 0
            continue
        break
    assert cancelled > 10
    pages.give_back()


def test_out_of_memory_and_a_limit_of_the_driver(tmp_path: Path) -> None:
    model, host = Model(tmp_path, 1), Host()
    pages, registrar = KeptPages(host.limits()), Registrar(9)
    whole = sum(slot.nbytes for slot in model.slots)
    with pytest.raises(torch.OutOfMemoryError):
        brought(model, Gpu("late", 0, registrar, memory=whole // 3), pages)
    assert locked(registrar) == pages.nbytes == host.locked
    brought(model, Gpu("late", 0, registrar, memory=whole), pages)  # the rest goes the slow way
    assert locked(registrar) == pages.nbytes == host.locked and len(registrar.registered) <= 9
    pages.give_back()
    assert host.locked == 0


def test_a_file_that_is_replaced_meanwhile_is_told(tmp_path: Path) -> None:
    model, registrar, host = Model(tmp_path, 2), Registrar(), Host()
    pages = KeptPages(host.limits())
    brought(model, Gpu("late", 0, registrar), pages)
    path = model.files[0]
    content = path.read_bytes()
    other = path.with_suffix(".new")
    other.write_bytes(content[::-1])
    os.replace(other, path)
    with pytest.raises(SourceError, match="changed since it was loaded"):
        brought(model, Gpu("late", 0, registrar), pages)
    pages.give_back()
    assert registrar.registered == {}


def test_another_device_and_a_rest(tmp_path: Path) -> None:
    model, registrar, second, host = Model(tmp_path, 2), Registrar(), Registrar(), Host()
    pages, here, there = KeptPages(host.limits()), Gpu("late", 0, registrar), Gpu("late", 0, second)
    there.torch_device = torch.device("cpu", 0)
    brought(model, here, pages)
    use = pages.use(here)
    brought(model, there, pages)  # while the first one is in use, as if nothing were kept
    assert second.registered == {} and second.asked
    assert use is not None
    use.close()
    brought(model, there, pages)
    assert registrar.registered == {} and locked(second) == host.locked == pages.nbytes
    pages.resting = True
    assert pages.use(there) is None
    pages.give_back()
    assert second.registered == {}


def test_a_network(tmp_path: Path) -> None:
    model, registrar, host = Model(tmp_path, 2), Registrar(), Host()
    network, gpu = torch.nn.Linear(1, 1), Gpu("late", 0, registrar)
    assert kept.kept_of(network) is None and kept.give_back(network) == 0
    kept.left(network)
    kept.settle(network)
    with_node = SimpleNamespace(model=network, get_attachment=lambda key: {kept.KEY: host.limits()}[key])
    without = SimpleNamespace(model=network, get_attachment=lambda key: None)
    assert kept.kept_for(without) is None and kept.kept_of(network) is None
    pages = kept.kept_for(with_node)
    assert pages is not None and kept.kept_for(with_node) is kept.kept_of(network) is pages
    brought(model, gpu, pages)
    with kept.leaving_for_a_stage(network):
        kept.left(network)
    assert pages.nbytes
    kept.settle(network)  # it is back after the picture
    assert pages.nbytes and not pages.resting
    kept.settle(network)  # it has not left in the next one
    assert not pages.nbytes and pages.resting and pages.use(gpu) is None
    with kept.leaving_for_a_stage(network):
        kept.left(network)
    brought(model, gpu, pages)
    assert pages.nbytes
    kept.left(network)
    assert not pages.nbytes and registrar.registered == {}
    brought(model, gpu, pages)
    assert kept.kept_for(without) is None and not pages.nbytes
    brought(model, gpu, pages)
    del network, pages, with_node, without
    gc.collect()
    assert registrar.registered == {} and host.locked == 0


def test_a_refusal_of_the_driver_leaves_the_count(tmp_path: Path, stored: Stored) -> None:  # noqa: F811
    registrar, host = NotingRegistrar(2), Host()
    pages = KeptPages(host.limits())
    choice = choose(stored.weights, device_with(registrar), ram_budget_bytes=PLENTY, kept=pages)
    assert (
        choice.source.kind != "page_cache"
        and ("page_cache", "the limit on locked memory is reached") in choice.refusals
    )
    choice.source.close()
    assert host.locked == pages.nbytes == locked(registrar)
    pages.give_back()
    assert host.locked == 0


def test_what_is_locked_is_noted_while_nobody_goes_through_it(tmp_path: Path) -> None:
    """Another thread may give back just then."""
    model, gpu, pages = Model(tmp_path, 1), Gpu("random", 0, Registrar()), KeptPages(Host().limits())
    guard, noted = pages._guard, list[bool]()

    class Cells(set):
        def add(self, cell: object) -> None:
            noted.append(guard._is_owned())  # type: ignore[attr-defined]
            super().add(cell)

    pages._held.cells = Cells()
    brought(model, gpu, pages)
    assert noted and all(noted)
    pages.give_back()
