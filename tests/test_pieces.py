"""Weights share memory on the device in few pieces, and leave together with those they share it with."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from fake_device import FakeDevice
from pack.offload import stretches
from pack.offload.files import StoredFile
from pack.offload.kept import KeptPages
from pack.offload.pieces import Pieces
from pack.offload.placed import Placed
from pack.offload.slots import memory_of
from pack.offload.terms import Terms
from test_arrival import Gpu, Model, Registrar
from test_kept import Host, brought, small_cells  # noqa: F401  (a fixture)
from test_source import PAGE, PLENTY, nothing_is_left  # noqa: F401  (a fixture)


class Counting(FakeDevice):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def allocate(self, nbytes: int) -> torch.Tensor:
        self.sizes.append(nbytes)
        return super().allocate(nbytes)


@pytest.mark.parametrize("seed", range(5))
def test_places_are_aligned_and_apart(seed: int) -> None:
    rng, device, most = random.Random(seed), Counting(), 10_000
    nbytes = {number: rng.choice([1, 255, 256, 257, 3000, 9999, 20_000]) for number in rng.sample(range(500), 100)}
    pieces = Pieces(nbytes, device, most)
    places = {number: pieces.place(number) for number in rng.sample(sorted(nbytes), len(nbytes))}
    taken: dict[int, list[tuple[int, int]]] = {}
    for number, place in places.items():
        start = place.storage_offset()
        assert place.nbytes == nbytes[number] and start % 256 == 0
        taken.setdefault(place.untyped_storage().data_ptr(), []).append((start, start + place.nbytes))
    for ranges in taken.values():
        ranges.sort()
        assert all(one[1] <= other[0] for one, other in pairwise(ranges))
        assert ranges[-1][1] <= most or len(ranges) == 1
    assert len(device.sizes) == len(taken) < len(nbytes)
    assert sum(device.sizes) < sum(nbytes.values()) + 256 * len(nbytes)


def test_each_its_own() -> None:
    device = Counting()
    pieces = Pieces({1: 100, 2: 200, 3: 300}, device, 0)
    assert [pieces.place(number).nbytes for number in (3, 1, 2)] == device.sizes == [300, 100, 200]


def test_who_shares_memory_leaves_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stretches, "PIECE_BYTES", 20 * PAGE)
    model, gpu, host = Model(tmp_path, 0), Gpu("random", 0, Registrar()), Host()
    pages = KeptPages(host.limits())
    brought(model, gpu, pages)
    for slot, number in zip(model.slots, range(len(model.slots)), strict=True):
        module = torch.nn.Module()
        module.register_parameter(f"w{number}", slot.home)
        slot.owners.append((module, f"w{number}"))
    terms = Terms(
        PLENTY, PLENTY, PLENTY, True, model.located, lambda *_: None, lambda _: None, lambda _: False, kept=pages
    )
    placed = Placed()
    placed.send(model.slots, gpu, lambda slot: None, terms)
    placed.wait()
    model.check([slot.shown for slot in model.slots])  # type: ignore[misc]
    first = model.slots[0]
    together = [slot for slot in model.slots if memory_of(placed[slot]) == memory_of(placed[first])]
    assert 1 < len(together) < len(model.slots)
    placed.go_home([first])
    assert all((slot in placed) == (slot not in together) for slot in model.slots)
    assert all((slot.shown is slot.home) == (slot in together) for slot in model.slots)
    placed.go_home(placed)
    assert not placed and all(slot.shown is slot.home for slot in model.slots)
    pages.give_back()


def test_what_lies_side_by_side_in_a_file_does_so_in_a_piece() -> None:
    """But for what overlaps, is far from the one before or would not be aligned; and one copy brings it."""
    nbytes = {0: 512, 1: 256, 2: 300, 3: 256, 4: 256, 5: 256}
    offsets = {0: 64, 1: 64 + 512, 2: 64 + 512 + 256 + 512, 3: 64, 4: 64 + 256 + 10, 5: 1 << 30}
    pieces = Pieces(nbytes, FakeDevice(), 1 << 20, offsets)
    assert [pieces.beside(number, number - 1) for number in nbytes] == [False, True, True, False, False, False]
    assert [pieces.start(number) for number in nbytes] == [0, 512, 1280, 1792, 2048, 2304]
    assert not pieces.beside(2, 0)


class Copying(Gpu):
    """Knows how often it was asked to copy."""

    copies = 0

    def copier(self, out: torch.Tensor, data: torch.Tensor) -> Callable[[], None]:
        self.copies += 1
        return super().copier(out, data)


@pytest.mark.parametrize("seed", range(8))
def test_neighbours_come_in_one_copy(tmp_path: Path, seed: int) -> None:
    """Whole, whatever lies between them and wherever a lock ends."""
    rng, model = random.Random(seed), Model.__new__(Model)
    path = tmp_path / "model.bin"
    path.write_bytes(rng.randbytes(60 * PAGE))
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    model.files, model.slots, model._where = [path], [], {}
    offset = 256 * rng.randrange(3)
    while offset + 12 * PAGE < len(data):
        nbytes = 256 * rng.randrange(1, 40)
        model._add(data[offset : offset + nbytes], StoredFile.of(path), offset)
        offset += nbytes + rng.choice([0, 0, 256, 2 * PAGE])
    for number in range(0, len(model.slots) - 4, 7):  # some come in another order
        model.slots[number : number + 3] = reversed(model.slots[number : number + 3])
    gpu, pages = Copying("random", seed, Registrar()), KeptPages(Host().limits())
    for _ in range(2):
        gpu.copies = 0
        brought(model, gpu, pages)
        assert gpu.copies < len(model.slots)
    pages.give_back()
