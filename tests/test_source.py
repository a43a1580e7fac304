"""Every rung gives the bytes that the file holds, says why it was taken, fails in words, and leaves nothing behind."""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from fake_device import NotingRegistrar
from pack.offload import disk, host_memory, page_cache, source
from pack.offload.device import HostDevice
from pack.offload.errors import RefusedError, SourceError, StreamError
from pack.offload.files import Key, StoredFile, Weight
from pack.offload.host_memory import Source
from pack.offload.registration import NoRegistrar
from pack.offload.source import LADDER, Choice, choose

PAGE = mmap.PAGESIZE
PLENTY = 1 << 30


def device_with(registrar: NotingRegistrar | NoRegistrar) -> HostDevice:
    device = HostDevice(torch.device("cpu"))
    device.registrar = registrar
    return device


@pytest.fixture
def device() -> HostDevice:
    return device_with(NotingRegistrar())


class Stored:
    """A file of random bytes and weights anywhere in it."""

    def __init__(self, path: Path, seed: int = 0) -> None:
        rng = random.Random(seed)
        self.path, self.content = path, rng.randbytes(40 * PAGE + 123)
        path.write_bytes(self.content)
        self.weights: dict[Key, Weight] = {}
        file, offset = StoredFile.of(path), 0
        for number in range(12):
            offset += rng.choice([0, 0, 7, 3 * PAGE])
            nbytes = rng.randrange(1, 3 * PAGE)
            self.weights[number // 3, number % 3] = Weight(nbytes, file=file, offset=offset)
            offset += nbytes
        self.weights[9, 0] = Weight(PAGE, file=file, offset=len(self.content) - PAGE)

    def truth(self, key: Key) -> bytes:
        weight = self.weights[key]
        return (
            self.content[weight.offset : weight.offset + weight.nbytes] if weight.data is None else _bytes(weight.data)
        )


def _bytes(data: torch.Tensor) -> bytes:
    return data.numpy().tobytes()


def read(source: Source, weights: dict[Key, Weight], key: Key) -> bytes:
    out = torch.full((weights[key].nbytes,), 0xEE, dtype=torch.uint8)
    source.copier(*key, out, None)()
    return _bytes(out)


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return Stored(tmp_path / "model.bin")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that weights of a few pages are cut as those of gigabytes are."""
    monkeypatch.setattr(disk, "PART_BYTES", PAGE)
    monkeypatch.setattr(disk, "SLOT_BYTES", PAGE + 2 * disk.DIRECT_ALIGN)
    monkeypatch.setattr(disk, "RING_BYTES", 6 * disk.SLOT_BYTES)
    monkeypatch.setattr(page_cache, "REGISTER_BYTES", 5 * PAGE)
    monkeypatch.setattr(host_memory, "CHUNK_BYTES", 7 * PAGE)
    monkeypatch.setattr(host_memory, "READ_BYTES", PAGE)


class Held:
    """What this process holds of the system."""

    def __init__(self) -> None:
        process = psutil.Process()
        self.fds, self.threads = process.num_fds(), threading.active_count()
        self.maps = sum("model.bin" in entry.path for entry in process.memory_maps(grouped=False))

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other)

    def __repr__(self) -> str:
        return str(vars(self))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = Held()
    yield
    assert Held() == before


def closing(choice: Choice) -> Choice:
    choice.source.close()
    choice.source.close()
    return choice


@pytest.mark.parametrize("kind", ["page_cache", "pinned", "disk"])
@pytest.mark.parametrize("with_memory", [False, True])
def test_a_source_gives_the_bytes(stored: Stored, device: HostDevice, kind: str, with_memory: bool) -> None:
    if with_memory:
        stored.weights[0, 9] = Weight(5 * PAGE, data=torch.randint(0, 255, (5 * PAGE,), dtype=torch.uint8))
    choice = choose(stored.weights, device, kind=kind, ram_budget_bytes=PLENTY)
    assert (choice.source.kind, choice.refusals) == (kind, ())
    assert ("other weights copied to pinned" in choice.reason) == (with_memory and kind != "pinned")
    rng = random.Random(0)
    keys = list(stored.weights)
    for order in (keys, keys, rng.sample(keys, 5), keys[::-1], keys[3:], [keys[2]] * 3, rng.choices(keys, k=40)):
        for key in order:
            assert read(choice.source, stored.weights, key) == stored.truth(key)
    choice.source.check()
    closing(choice)
    assert device.registrar.registered == {}


@pytest.mark.parametrize("kind", ["page_cache", "pinned", "disk"])
def test_only_memory_of_its_own_is_a_copy(
    stored: Stored, device: HostDevice, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each weight in one piece, so that it can stand in for what is in the file; also one larger than a chunk."""
    monkeypatch.setattr(host_memory, "CHUNK_BYTES", 2 * PAGE)
    assert max(weight.nbytes for weight in stored.weights.values()) > host_memory.CHUNK_BYTES
    choice = choose(stored.weights, device, kind=kind, ram_budget_bytes=PLENTY)
    for key, weight in stored.weights.items():
        copy = choice.source.copy_of(*key)
        assert (copy is not None) == (kind == "pinned")
        if copy is not None:
            assert copy.shape == (weight.nbytes,) and copy.numpy().tobytes() == stored.truth(key)
            del copy
    closing(choice)


@pytest.mark.parametrize("options", [{"may_pin": False}, {"ram_budget_bytes": 10}])
def test_weights_that_stay_pageable_are_named(stored: Stored, device: HostDevice, options: dict) -> None:
    stored.weights[0, 9] = Weight(100, data=torch.zeros(100, dtype=torch.uint8))
    choice = choose(stored.weights, device, **({"kind": "disk", "ram_budget_bytes": PLENTY} | options))
    assert "other weights stay in pageable memory, which is slow: " in choice.reason
    assert read(choice.source, stored.weights, (0, 9)) == bytes(100)
    closing(choice)


def test_in_memory_weights_are_used_where_they_are() -> None:
    data = torch.arange(100, dtype=torch.uint8)
    weights = {(0, 0): Weight(100, data=data)}
    choice = choose(weights, device_with(NoRegistrar("no GPU here")), ram_budget_bytes=PLENTY)
    assert choice.source.kind == "memory"
    assert choice.source.pieces[0, 0][0][1].data_ptr() == data.data_ptr()
    refused = "; not page_cache: no weight is in a file; not pinned: no GPU here; not disk: no weight is in a file"
    assert choice.reason == f"memory: 100 bytes of pageable memory{refused}"


LADDERS = [
    ({}, {}, "page_cache", ()),
    ({"free_ram_bytes": 1 << 16}, {}, "pinned", (("page_cache", "which has room for 52.4 kB"),)),
    ({}, {"read_only": "this driver cannot"}, "pinned", (("page_cache", "this driver cannot"),)),
    ({}, {"most": 2}, "disk", (("page_cache", "limit on locked"), ("pinned", "limit on locked"))),
    ({"ram_budget_bytes": 60_000}, {"read_only": "no"}, "disk", (("page_cache", "no"), ("pinned", "may be pinned"))),
    ({"may_pin": False}, {}, "disk", (("page_cache", "switched off"), ("pinned", "switched off"))),
    ({"kind": "pinned"}, {}, "pinned", ()),
    ({"kind": "pinned", "ram_budget_bytes": 1}, {}, "disk", (("pinned", "1 byte may be pinned"),)),
]


@pytest.mark.parametrize(("options", "limits", "kind", "refusals"), LADDERS)
def test_the_first_rung_that_works_is_taken(
    stored: Stored, options: dict, limits: dict, kind: str, refusals: tuple[tuple[str, str], ...]
) -> None:
    device = device_with(NotingRegistrar(**limits))
    choice = choose(stored.weights, device, **({"ram_budget_bytes": PLENTY} | options))
    for key in stored.weights:
        assert read(choice.source, stored.weights, key) == stored.truth(key)
    assert choice.source.kind == kind
    assert [rung for rung, _ in choice.refusals] == [rung for rung, _ in refusals]
    for (rung, why), (_, part) in zip(choice.refusals, refusals, strict=True):
        assert part in why
        assert f"not {rung}: {why}" in choice.reason
    assert choice.source.pinned_bytes <= options.get("ram_budget_bytes", PLENTY)
    closing(choice)
    assert device.registrar.registered == {}


@pytest.mark.parametrize(
    ("maps", "kind", "refusals"),
    [
        ("no file", "pinned", {"page_cache": "cannot be mapped (No such device)"}),
        ("nothing", None, {"page_cache": "cannot be mapped", "pinned": "gives no", "disk": "gives no"}),
    ],
)
def test_a_system_that_maps_nothing(
    stored: Stored, device: HostDevice, maps: str, kind: str | None, refusals: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without mappings, and no address space at all."""

    def refusing(fileno: int, *args: object, **options: object) -> mmap.mmap:
        if fileno >= 0:
            raise OSError(errno.ENODEV, "No such device")
        if maps == "nothing":
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return make(fileno, *args, **options)  # type: ignore[arg-type]

    make = mmap.mmap
    monkeypatch.setattr(mmap, "mmap", refusing)
    if kind is None:
        with pytest.raises(StreamError, match=r"Cannot allocate memory.*free RAM") as raised:
            choose(stored.weights, device, ram_budget_bytes=PLENTY)
        assert all(part in str(raised.value) for part in refusals.values())
        return
    choice = choose(stored.weights, device, ram_budget_bytes=PLENTY)
    assert choice.source.kind == kind and all(part in dict(choice.refusals)[rung] for rung, part in refusals.items())
    for key in stored.weights:
        assert read(choice.source, stored.weights, key) == stored.truth(key)
    closing(choice)


@pytest.mark.parametrize("most", range(3))
def test_a_registration_that_fails_leaves_none_behind(stored: Stored, most: int) -> None:
    device = device_with(NotingRegistrar(most))
    for rung in ("page_cache", "pinned"):
        device.registrar.asked = 0
        with pytest.raises(RefusedError, match="limit on locked memory"):
            LADDER[rung](host_memory.Request(stored.weights, device, PLENTY, PLENTY))
        assert device.registrar.registered == {}


def test_only_used_pages_are_registered_read_only(stored: Stored, device: HostDevice) -> None:
    used = {
        page for w in stored.weights.values() for page in range(w.offset // PAGE, -(-(w.offset + w.nbytes) // PAGE))
    }
    choice = choose(stored.weights, device, ram_budget_bytes=0)
    assert choice.source.kind == "page_cache" and choice.source.pinned_bytes == 0
    ranges = device.registrar.registered.items()
    assert all(address % PAGE == 0 and read_only and size <= 5 * PAGE for address, (size, read_only) in ranges)
    assert sum(-(-size // PAGE) for _, (size, _) in ranges) == len(used)
    closing(choice)


@pytest.mark.parametrize(
    ("places", "spans"),
    [
        ([(0, 10)], [(0, PAGE)]),
        ([(PAGE - 1, 2), (2 * PAGE, 5)], [(0, 3 * PAGE)]),
        ([(3 * PAGE, 1), (0, PAGE)], [(0, PAGE), (3 * PAGE, 4 * PAGE)]),
        ([(0, 3 * PAGE), (10, 10)], [(0, 3 * PAGE)]),
        ([(9 * PAGE + 1, 90)], [(9 * PAGE, 9 * PAGE + 100)]),
    ],
)
def test_spans(places: list[tuple[int, int]], spans: list[tuple[int, int]]) -> None:
    size = 9 * PAGE + 100
    file = StoredFile(Path("x"), size, 0)
    assert page_cache.used_spans([Weight(n, file=file, offset=offset) for offset, n in places], size) == spans


@pytest.mark.parametrize("kind", ["page_cache", "pinned", "disk"])
@pytest.mark.parametrize("harm", ["cut off", "written to", "deleted", "replaced"])
def test_a_file_that_changed_before_is_an_error(stored: Stored, device: HostDevice, kind: str, harm: str) -> None:
    _do(harm, stored.path)
    with pytest.raises(
        SourceError, match=r"^model.bin: .*; put the file back as it was or download it again, then load"
    ):
        choose(stored.weights, device, kind=kind, ram_budget_bytes=PLENTY)
    assert device.registrar.registered == {}


def _do(harm: str, path: Path) -> None:
    if harm == "cut off":
        os.truncate(path, PAGE)
    elif harm == "written to":
        with open(path, "r+b") as file:
            file.write(b"new")
        os.utime(path, ns=(0, 0))
    elif harm == "deleted":
        path.unlink()
    else:
        other = path.with_name("other")
        other.write_bytes(bytes(path.stat().st_size))
        os.utime(other, ns=(0, 0))
        other.replace(path)


@pytest.mark.parametrize("kind", ["page_cache", "disk"])
@pytest.mark.parametrize("harm", ["cut off", "written to"])
def test_a_file_that_changes_in_use_is_an_error(stored: Stored, device: HostDevice, kind: str, harm: str) -> None:
    choice = choose(stored.weights, device, kind=kind, ram_budget_bytes=PLENTY)
    _do(harm, stored.path)
    with pytest.raises(SourceError, match="the file was changed since it was loaded"):
        choice.source.check()
    closing(choice)


@pytest.mark.parametrize("kind", ["page_cache", "pinned", "disk"])
@pytest.mark.parametrize("harm", ["deleted", "replaced"])
def test_an_open_file_outlives_its_name(stored: Stored, device: HostDevice, kind: str, harm: str) -> None:
    choice = choose(stored.weights, device, kind=kind, ram_budget_bytes=PLENTY)
    _do(harm, stored.path)
    choice.source.check()
    for key in list(stored.weights) * 2:
        assert read(choice.source, stored.weights, key) == stored.truth(key)
    closing(choice)


def test_disk_reads_past_the_end_are_an_error_and_recover(stored: Stored, device: HostDevice) -> None:
    choice = choose(stored.weights, device, kind="disk", ram_budget_bytes=PLENTY)
    keys = list(stored.weights)
    os.truncate(stored.path, 2 * PAGE)
    with pytest.raises(
        SourceError, match=r"model.bin: a weight reaches to byte \d+, the file ends at 8192: it was cut"
    ):
        for key in keys * 3:  # what was read ahead before is still right
            assert read(choice.source, stored.weights, key) == stored.truth(key)
    with pytest.raises(SourceError, match="it was cut off"):
        read(choice.source, stored.weights, keys[-1])
    stored.path.write_bytes(stored.content)
    for key in keys * 2:
        assert read(choice.source, stored.weights, key) == stored.truth(key)
    closing(choice)


def test_a_weight_past_the_end_of_its_file() -> None:
    with pytest.raises(SourceError, match="a weight ends at byte 110, the file has 100"):
        Weight(20, file=StoredFile(Path("model.bin"), 100, 0), offset=90)


@pytest.mark.parametrize("kind", ["pinned", "disk"])
def test_reads_that_come_in_pieces(stored: Stored, device: HostDevice, kind: str, monkeypatch) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: whole(fd, [views[0][:1000]], offset))
    choice = choose(stored.weights, device, kind=kind, ram_budget_bytes=PLENTY)
    for key in stored.weights:
        assert read(choice.source, stored.weights, key) == stored.truth(key)
    closing(choice)


@pytest.mark.parametrize("kind", ["pinned", "disk"])
def test_systems_without_preadv(stored: Stored, device: HostDevice, kind: str, monkeypatch) -> None:
    monkeypatch.delattr(os, "preadv")
    choice = choose(stored.weights, device, kind=kind, ram_budget_bytes=PLENTY)
    for key in list(stored.weights) * 3:
        assert read(choice.source, stored.weights, key) == stored.truth(key)
    closing(choice)


def test_a_file_larger_than_free_ram_is_read_past_the_cache(stored: Stored, device: HostDevice) -> None:
    try:
        os.close(os.open(stored.path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no direct reads")
    choice = choose(stored.weights, device, ram_budget_bytes=60_000, free_ram_bytes=1000)
    assert "past the page cache" in choice.reason
    for key in list(stored.weights) * 3:
        assert read(choice.source, stored.weights, key) == stored.truth(key)
    closing(choice)


def test_disk_reads_ahead_and_says_when(stored: Stored, device: HostDevice) -> None:
    choice = choose(stored.weights, device, kind="disk", ram_budget_bytes=PLENTY)
    for key in list(stored.weights) * 2:
        while not choice.source.ready(*key):
            threading.Event().wait(0.001)
        assert read(choice.source, stored.weights, key) == stored.truth(key)
    closing(choice)


@pytest.mark.parametrize("kind", ["page_cache", "pinned", "disk"])
def test_cycles_leave_nothing(stored: Stored, device: HostDevice, kind: str) -> None:
    for _ in range(20):
        choice = choose(stored.weights, device, kind=kind, ram_budget_bytes=PLENTY)
        read(choice.source, stored.weights, (1, 1))
        closing(choice)


def test_a_name_that_no_rung_has(stored: Stored, device: HostDevice) -> None:
    with pytest.raises(ValueError, match="choose auto, page_cache, pinned, disk, memory"):
        choose(stored.weights, device, kind="nvme", ram_budget_bytes=0)
    with pytest.raises(StreamError, match="memory: the weights are in a file"):
        choose(stored.weights, device, kind="memory", ram_budget_bytes=0)
    assert source.AUTO not in LADDER


@pytest.mark.parametrize(
    "data",
    [torch.zeros(4, dtype=torch.int8), torch.zeros(3, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)[::2]],
)
def test_a_weight_in_memory_is_its_bytes(data: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="given as its bytes"):
        Weight(4, data=data)
