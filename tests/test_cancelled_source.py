"""Wherever the user cancels while weights are read, locked or copied, nothing stays behind, and the next try works."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fake_device import NotingRegistrar
from pack.loaders.read_ahead import Told
from pack.offload.arrival import send
from pack.offload.device import HostDevice
from pack.offload.files import Weight, WeightFile
from pack.offload.slots import Slot
from pack.offload.source import choose
from test_slots import parameter
from test_source import (  # noqa: F401  (fixtures)
    PAGE,
    PLENTY,
    Stored,
    device,
    nothing_is_left,
    read,
    small_parts,
    stored,
)


class Cancelled(BaseException):
    """As the host's: no `Exception`."""


class Canceller:
    """Watches, and cancels the n-th time that it is told something."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.begun: list[str] = []
        self.unfinished: dict[str, int] = {}

    @contextmanager
    def watch(self, what: str, total: int) -> Iterator[Told]:
        self.begun.append(what)
        self.unfinished[what] = total

        def told(nbytes: int) -> None:
            self.unfinished[what] -= nbytes
            self.left -= 1
            if self.left < 0:
                raise Cancelled

        yield told
        assert self.unfinished.pop(what) == 0, f"{what}: the bar does not end at {total}"


@pytest.mark.parametrize("kind", ["page_cache", "pinned", "disk"])
def test_cancelled_anywhere(stored: Stored, device: HostDevice, kind: str) -> None:  # noqa: F811
    stored.weights[0, 9] = Weight(5 * PAGE, data=torch.randint(0, 255, (5 * PAGE,), dtype=torch.uint8))
    options = {"kind": kind, "ram_budget_bytes": PLENTY}
    registrar = device.registrar
    assert isinstance(registrar, NotingRegistrar)
    for at in range(1000):
        canceller = Canceller(at)
        try:
            choice = choose(stored.weights, device, watch=canceller.watch, **options)  # type: ignore[arg-type]
        except Cancelled:
            assert registrar.registered == {}, at
            continue
        break
    assert at > {"page_cache": 5, "pinned": 20, "disk": 3}[kind], "it could not be cancelled in the middle"
    assert choice.source.kind == kind and not canceller.unfinished
    assert all(read(choice.source, stored.weights, key) == stored.truth(key) for key in stored.weights)
    choice.source.close()
    assert registrar.registered == {}


def test_cancelled_while_a_disk_hangs(stored: Stored, device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    hanging, goes_on, reading = threading.Event(), threading.Event(), WeightFile.read_into

    def hangs(*arguments: Any) -> None:
        if hanging.is_set():
            goes_on.wait(60)
        reading(*arguments)

    canceller = Canceller(1000)
    choice = choose(stored.weights, device, kind="disk", ram_budget_bytes=PLENTY, watch=canceller.watch)
    hanging.set()
    monkeypatch.setattr(WeightFile, "read_into", hangs)
    canceller.left = 0
    with pytest.raises(Cancelled):
        for _ in range(3):  # what was read before is still there
            for key in stored.weights:
                read(choice.source, stored.weights, key)
    goes_on.set()
    canceller.left = 1000
    assert all(read(choice.source, stored.weights, key) == stored.truth(key) for key in stored.weights)
    choice.source.close()


def test_bringing_weights_is_told_and_cancelled(
    device: HostDevice,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slots = [Slot(parameter(torch.full((PAGE,), float(number)))) for number in range(4)]
    arguments = (slots, device, lambda slot: None, lambda tensor: None, True)
    with pytest.raises(Cancelled):
        send(*arguments, watch=Canceller(2).watch)
    patient = Canceller(100)
    arrived = send(*arguments, watch=patient.watch).wait()
    assert patient.begun == ["copying weights"] and not patient.unfinished
    assert [float(one[0]) for one in arrived] == [0, 1, 2, 3]
