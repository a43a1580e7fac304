"""A model's file is closed while its weights lie elsewhere, and every weight comes back as it was."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pack.offload.files import StoredFile
from pack.offload.shelf import Shelf
from pack.offload.slots import Slot, slots_of
from test_slots import Network, parameter


class MappedNetwork:
    """A network whose weights lie in a mapped file, and that file for a shelf."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.network = Network()
        self.slots = slots_of(self.network.modules())
        self.offsets: dict[int, int] = {}
        with path.open("wb") as file:
            for slot in self.slots:
                data = slot.weight(lambda stored: None).data
                assert data is not None
                self.offsets[len(self.offsets)] = file.tell()
                file.write(data.numpy().tobytes())
        self.stored = StoredFile.of(path)
        self.mapping: weakref.ref | None = None
        self.places: dict[int, int] = {}
        data = self.reopen()
        for number, slot in enumerate(self.slots):
            slot.rehome(slot.over(data(self.stored, self.offsets[number])[: slot.nbytes]))

    # --- as the shelf wants it

    def close(self) -> bool:
        return self.mapping is None or self.mapping() is None

    def reopen(self) -> Callable[[StoredFile, int], torch.Tensor]:
        if StoredFile.of(self.path) != self.stored:
            raise ValueError(f"{self.path.name} was changed")
        with self.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        array = np.frombuffer(mapped, dtype=np.uint8)
        self.mapping = weakref.ref(mapped)
        everything = torch.from_numpy(array)
        start = everything.data_ptr()
        self.places = {start + offset: offset for offset in self.offsets.values()}
        sizes = {self.offsets[number]: slot.nbytes for number, slot in enumerate(self.slots)}
        return lambda stored, offset: everything[offset : offset + sizes[offset]]

    def located(self, tensor: torch.Tensor) -> tuple[StoredFile, int] | None:
        offset = self.places.get(tensor.data_ptr())
        return None if offset is None else (self.stored, offset)


@pytest.fixture
def mapped(tmp_path: Path) -> MappedNetwork:
    return MappedNetwork(tmp_path / "weights.bin")


def values(slots: list[Slot]) -> list[torch.Tensor]:
    return [slot.home.detach().float().clone() for slot in slots]


def show_elsewhere(slots: list[Slot]) -> None:
    for slot in slots:
        slot.show(slot.moved(torch.device("cpu"), None) if "_qdata" not in vars(slot.home) else own_copy(slot))


def own_copy(slot: Slot) -> torch.nn.Parameter:
    return slot.over(slot.weight(lambda stored: None).data.clone())


def test_file_closes_and_weights_come_back(mapped: MappedNetwork) -> None:
    x = torch.randn(3, 64)
    before, expected = values(mapped.slots), mapped.network(x)
    shelf = Shelf(mapped)
    for _ in range(3):
        show_elsewhere(mapped.slots)
        assert not shelf.holds_any
        assert shelf.put_away(mapped.slots, mapped.located), "something still maps the file"
        assert shelf.holds_any
        assert all(slot.home.is_meta for slot in mapped.slots)
        assert torch.equal(mapped.network(x), expected), "what is shown elsewhere stays there"
        shelf.bring_back()
        assert not shelf.holds_any
        for slot in mapped.slots:
            slot.go_home()
        assert torch.equal(mapped.network(x), expected)
        assert all(map(torch.equal, values(mapped.slots), before))


def test_copies_stand_in_for_weights_that_are_shown_nowhere_else(mapped: MappedNetwork) -> None:
    """As those that stream from memory of the source's own: whoever looks at the network finds them."""
    x = torch.randn(3, 64)
    before, expected = values(mapped.slots), mapped.network(x)
    copied, shown = mapped.slots[::2], mapped.slots[1::2]
    shelf = Shelf(mapped)
    for _ in range(2):
        show_elsewhere(shown)
        copies = {slot: slot.stored.reshape(-1).view(torch.uint8).clone() for slot in copied}
        assert shelf.put_away(shown, mapped.located, copies), "something still maps the file"
        assert all(slot.shown is slot.home and not slot.home.is_meta for slot in copied)
        assert all(slot.home.is_meta for slot in shown)
        assert torch.equal(mapped.network(x), expected)
        shelf.bring_back()
        del copies
        for slot in mapped.slots:
            slot.go_home()
        assert all(map(torch.equal, values(mapped.slots), before))
    assert not mapped.close(), "nothing maps the file"


def test_types_and_shapes_stay_known_while_away(mapped: MappedNetwork) -> None:
    before = [(slot.home.shape, slot.home.dtype, slot.nbytes, type(slot.home)) for slot in mapped.slots]
    show_elsewhere(mapped.slots)
    Shelf(mapped).put_away(mapped.slots, mapped.located)
    assert [(slot.home.shape, slot.home.dtype, slot.nbytes, type(slot.home)) for slot in mapped.slots] == before


def test_weight_that_somebody_holds_keeps_the_file_open(mapped: MappedNetwork) -> None:
    held = mapped.slots[0].home
    show_elsewhere(mapped.slots)
    shelf = Shelf(mapped)
    assert not shelf.put_away(mapped.slots, mapped.located)
    del held
    assert shelf.put_away(mapped.slots, mapped.located), "asked again, it closes"
    shelf.bring_back()


def test_weights_that_lie_in_no_file_stay(mapped: MappedNetwork) -> None:
    mapped.network.extra = torch.nn.Linear(4, 4)
    slots = slots_of(mapped.network.extra.modules())
    homes = [slot.home for slot in slots]
    shelf = Shelf(mapped)
    show_elsewhere(mapped.slots)
    shelf.put_away([*mapped.slots, *slots], mapped.located)
    assert [slot.home for slot in slots] == homes
    shelf.bring_back()
    assert [slot.home for slot in slots] == homes


@pytest.mark.parametrize("change", ["gone", "written to"])
def test_file_that_changed_is_an_error_until_it_is_back(mapped: MappedNetwork, change: str) -> None:
    before = values(mapped.slots)
    show_elsewhere(mapped.slots)
    shelf = Shelf(mapped)
    shelf.put_away(mapped.slots, mapped.located)
    kept = mapped.path.read_bytes()
    if change == "gone":
        mapped.path.unlink()
    else:
        mapped.path.write_bytes(b"x" + kept)
    for _ in range(2):
        with pytest.raises((OSError, ValueError), match=mapped.path.name):
            shelf.bring_back()
        assert shelf.holds_any and all(slot.home.is_meta for slot in mapped.slots)
    mapped.path.write_bytes(kept)
    os.utime(mapped.path, ns=(mapped.stored.mtime_ns, mapped.stored.mtime_ns))
    shelf.bring_back()
    assert all(map(torch.equal, values(mapped.slots), before))


def test_layers_are_told_of_their_new_home() -> None:
    class Layer(torch.nn.Linear):
        def set_home(self, name: str, home: torch.nn.Parameter) -> None:
            self.told = (name, home)

    layer = Layer(4, 4, bias=False)
    (slot,) = slots_of([layer])
    shown = parameter(torch.zeros(4, 4))
    other = parameter(torch.ones(4, 4))
    slot.rehome(other)
    assert layer.weight is other and layer.told == ("weight", other)
    slot.show(shown)
    slot.rehome(parameter(torch.ones(4, 4)))
    assert layer.weight is shown, "what is shown elsewhere stays shown"
