"""Weights whose pages are locked are sent and not waited for: what is computed after that finds them whole, and nothing
is let go of while they are being copied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_device import POLICIES
from pack.offload import kept
from pack.offload.arrival import OnTheWay, send
from pack.offload.errors import SourceError
from pack.offload.kept import KeptPages
from pack.offload.placed import Placed
from test_arrival import Gpu, Model, Registrar
from test_cancelled_source import Cancelled, Canceller
from test_kept import Host, brought, locked, small_cells  # noqa: F401  (a fixture)
from test_residency import terms
from test_source import nothing_is_left  # noqa: F401  (a fixture)


class Sender:
    """A model that was brought before, so that its pages are locked."""

    def __init__(self, folder: Path, policy: str = "late", seed: int = 0) -> None:
        self.model, self.registrar, self.host = Model(folder, seed), Registrar(), Host()
        self.gpu, self.pages = Gpu(policy, seed, self.registrar), KeptPages(self.host.limits())
        brought(self.model, self.gpu, self.pages)

    def send(self, canceller: Canceller | None = None) -> OnTheWay:
        watch = (canceller or Canceller(1 << 30)).watch
        return send(self.model.slots, self.gpu, lambda slot: None, self.model.located, True, watch, self.pages)

    def nothing_is_in_use(self) -> bool:
        return self.pages.give_back() > 0 == locked(self.registrar) == self.host.locked


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(8))
def test_what_is_computed_next_finds_them_whole(tmp_path: Path, policy: str, seed: int) -> None:
    sender = Sender(tmp_path, policy, seed)
    gpu, asked, waits = sender.gpu, sender.registrar.asked, sender.gpu.host_waits
    way = sender.send()
    seen: list[torch.Tensor] = []
    gpu.compute(lambda: seen.extend(parameter.clone() for parameter in way.parameters))
    assert (gpu.host_waits, sender.registrar.asked) == (waits, asked)
    gpu.finish()
    sender.model.check(seen)
    sender.model.check(way.wait())
    assert sender.nothing_is_in_use()


def test_pages_stay_locked_until_they_are_copied(tmp_path: Path) -> None:
    sender = Sender(tmp_path)
    nbytes = sender.pages.nbytes
    way = sender.send()
    assert sender.pages.give_back() == 0 and sender.pages.nbytes == nbytes
    sender.model.check(way.wait())  # the copies look whether what they read is locked
    assert sender.nothing_is_in_use()


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_copied_after_they_were_given_up(tmp_path: Path, policy: str) -> None:
    sender = Sender(tmp_path, policy)
    way = sender.send()
    way.close()
    for parameter in way.parameters:
        parameter.fill_(7)
    sender.gpu.finish()
    assert all(bool((parameter == 7).all()) for parameter in way.parameters)
    assert sender.nothing_is_in_use()


def changed(sender: Sender, way: OnTheWay) -> None:
    sender.model.files[0].touch()
    way.wait()


@pytest.mark.parametrize(
    ("end", "error"),
    [(lambda sender, way: way.wait(), Cancelled), (changed, SourceError)],
    ids=["cancelled", "changed"],
)
def test_who_waits_is_told(tmp_path: Path, end: Callable[[Sender, OnTheWay], object], error: type) -> None:
    sender = Sender(tmp_path)
    way = sender.send(Canceller(0 if error is Cancelled else 1 << 30))
    with pytest.raises(error):
        end(sender, way)
    assert sender.nothing_is_in_use()


def test_what_was_changed_on_its_way_is_not_there(tmp_path: Path) -> None:
    sender = Sender(tmp_path)
    placed, slots = Placed(), sender.model.slots
    given = replace(terms(1 << 40), located=sender.model.located, kept=sender.pages)
    placed.send(slots, sender.gpu, lambda slot: None, given)
    assert len(placed) == len(slots)
    sender.model.files[0].touch()
    with pytest.raises(SourceError):
        placed.wait()
    assert not placed, "the next run would take them for what was loaded"
    placed.wait()
    assert sender.nothing_is_in_use()


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_too_little_memory(tmp_path: Path, share: float) -> None:
    sender = Sender(tmp_path, "random")
    sender.gpu.memory = int(share * sum(slot.nbytes for slot in sender.model.slots[:-2]))
    with pytest.raises(torch.OutOfMemoryError):
        sender.send()
    sender.gpu.memory = 1 << 30
    sender.model.check(sender.send().wait())
    assert sender.nothing_is_in_use()


def test_pages_that_were_given_back_are_locked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where that happens after it was looked whether they are locked."""
    for holds in (None, lambda pages, weight: True):
        sender = Sender(tmp_path)
        sender.pages.give_back()
        if holds is not None:
            monkeypatch.setattr(kept.KeptPages, "holds", holds)
        sender.model.check(sender.send().wait())
        assert sender.nothing_is_in_use()
