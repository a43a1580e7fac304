"""What can be sent before anybody has planned: what is locked, in order, as far as there is room."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pack.offload import ahead
from pack.offload.ahead import sendable, unchanged
from pack.offload.kept import KeptPages
from test_arrival import Gpu, Model, Registrar
from test_kept import Host, brought, small_cells  # noqa: F401  (a fixture)
from test_residency import terms
from test_source import nothing_is_left  # noqa: F401  (a fixture)


@pytest.fixture(autouse=True)
def little_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "LEAST_BYTES", 1)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_as_much_as_there_is_room_for(tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, gpu, pages = Model(tmp_path, 1), Gpu("early", 1, Registrar()), KeptPages(Host().limits())
    assert sendable(model.slots, model.located, pages, 1 << 30) == []
    brought(model, gpu, pages)
    in_files = [slot for slot in model.slots if slot.location(model.located) is not None]
    room = round(share * sum(slot.nbytes for slot in in_files))
    chosen = sendable(model.slots, model.located, pages, room)
    assert chosen == in_files[: len(chosen)]
    left = room - sum(slot.nbytes for slot in chosen)
    assert left >= 0 and (len(chosen) == len(in_files) or left < in_files[len(chosen)].nbytes)
    monkeypatch.setattr(ahead, "LEAST_BYTES", room + 1)
    assert sendable(model.slots, model.located, pages, room) == [], "it is not worth it"
    pages.give_back()


def test_what_is_changed_on_its_way_is_not_sent(tmp_path: Path) -> None:
    slots = Model(tmp_path, 2).slots
    for slot in slots:
        slot.owners.append((torch.nn.Module(), "weight"))
    patched, cast, same = slots[:3]
    dtypes = {id(cast.owners[0][0]): torch.float16, id(same.owners[0][0]): same.home.dtype}
    given = replace(
        terms(0), patched_by_host=lambda slot: slot is patched, dtype_of=lambda module, name: dtypes.get(id(module))
    )
    assert list(unchanged(slots, given)) == slots[2:]
