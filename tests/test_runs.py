"""Weights that lie side by side in a file are copied in one piece, and each is found again in it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_device import POLICIES, FakeDevice, NotingRegistrar
from pack.loaders.sizes import ALIGN
from pack.offload import residency as residency_module
from pack.offload import runs as runs_module
from pack.offload import streaming
from pack.offload.blocks import Block
from pack.offload.costs import Link, SwapRequest
from pack.offload.files import StoredFile
from pack.offload.residency import Residency
from pack.offload.runs import GAP_SHARE, LONGEST, Run, runs_of
from pack.offload.slots import Slot, slots_of
from pack.offload.streamer import BlockStreamer
from pack.offload.terms import Terms

CPU = torch.device("cpu")
WIDTH, BLOCKS = 128, 4


def parameter(value: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(value, requires_grad=False)


@dataclass
class Layout:
    """A file under construction, and where in it tensors lie."""

    path: Path
    data: bytearray = field(default_factory=lambda: bytearray(b"head" * 64))
    offsets: dict[int, int] = field(default_factory=dict)  # of a tensor, by its address

    def put(self, tensor: torch.Tensor, gap: int = 0) -> None:
        self.data += b"\xff" * gap
        self.offsets[tensor.data_ptr()] = len(self.data)
        self.data += tensor.numpy().tobytes()

    def located(self, tensor: torch.Tensor) -> tuple[StoredFile, int] | None:
        offset = self.offsets.get(tensor.data_ptr())
        return None if offset is None else (StoredFile(self.path, len(self.data), 0), offset)


def slot_of(nbytes: int, seed: int) -> Slot:
    values = torch.randint(0, 256, (1, nbytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Slot(parameter(values))


@pytest.mark.parametrize("seed", range(30))
def test_every_weight_is_in_one_run_and_its_bytes_are_its_own(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    layout, blocks = Layout(tmp_path / "model"), []
    for block in range(rng.randrange(1, 100)):
        slots = [slot_of(ALIGN * rng.randrange(1, 200), 1000 * block + i) for i in range(rng.randrange(1, 6))]
        for slot in rng.sample(slots, len(slots)):  # a file has them in another order than the network
            if rng.random() < 0.9:
                layout.put(slot.home, rng.choice([0, 0, ALIGN, 2 * ALIGN, 50 * ALIGN, 40]))
        blocks.append(slots)
    total = sum(slot.nbytes for slots in blocks for slot in slots)
    whole = torch.frombuffer(layout.data, dtype=torch.uint8)
    found = runs_of(blocks, layout.located)
    for slots, runs in zip(blocks, found, strict=True):
        assert sorted(map(id, (slot for run in runs for slot in run.slots))) == sorted(map(id, slots))
        for run in runs:
            weight = run.weight(layout.located)
            assert weight.nbytes == run.nbytes == run.starts[-1] + run.slots[-1].nbytes and run.starts[0] == 0
            data = whole[weight.offset : weight.offset + run.nbytes] if weight.data is None else weight.data
            over = run.over(data)
            assert [slot for slot, _ in over] == list(run.slots)
            assert all(torch.equal(there, slot.home) for slot, there in over)
            assert all(start % ALIGN == 0 for start in run.starts)
            assert len(run.slots) == 1 or run.nbytes <= total // runs_module.SHARE
            assert run.nbytes - sum(slot.nbytes for slot in run.slots) <= run.nbytes / GAP_SHARE
    assert runs_of(blocks, layout.located) == found, "and the next look sees the same"


def neighbours(*pairs: tuple[int, int], path: Path) -> tuple[list[Slot], Layout]:
    """Weights of so many bytes, each after a gap of so many."""
    layout, slots = Layout(path), []
    for number, (gap, nbytes) in enumerate(pairs):
        slots.append(slot_of(nbytes, number))
        layout.put(slots[-1].home, gap)
    return slots, layout


@pytest.mark.parametrize(
    ("gap", "size", "together"),
    [
        (0, 100 * ALIGN, True),
        (ALIGN, 100 * ALIGN, True),  # a bias
        (2 * ALIGN, 100 * ALIGN, False),  # too much to copy for nothing
        (32, 100 * ALIGN, False),  # the second would not be aligned as it is by itself
        (ALIGN - 32, 100 * ALIGN + 32, True),  # what another tensor fills up
    ],
)
def test_what_is_joined(gap: int, size: int, together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_module, "SHARE", 1)
    slots, layout = neighbours((0, size), (gap, 100 * ALIGN), path=tmp_path)
    others = [slot_of(100 * ALIGN, 9)]  # so that the model is long enough
    runs = runs_of([slots, others], layout.located)[0]
    assert [len(run.slots) for run in runs] == ([2] if together else [1, 1])
    runs = [run for block in runs_of([[slot] for slot in slots], layout.located) for run in block]
    assert [len(run.slots) for run in runs] == [1, 1], "of two blocks"
    runs = runs_of([slots], lambda tensor: None)[0]
    assert [run.slots for run in runs] == [(slot,) for slot in slots], "in no file"


def test_a_run_ends_where_it_is_long_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots, layout = neighbours(*[(0, 64 * ALIGN)] * 64, path=tmp_path)
    longest = []
    for share in (64, 16, 1):
        monkeypatch.setattr(runs_module, "SHARE", share)
        longest.append(max(len(run.slots) for run in runs_of([slots], layout.located)[0]))
    assert longest == [1, 4, 64]
    monkeypatch.setattr(runs_module, "LONGEST", 130 * ALIGN)
    assert {len(run.slots) for run in runs_of([slots], layout.located)[0]} == {2}
    assert LONGEST < 64 << 20, "what a plan chooses from is not coarser than the tensors of a large model are"


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.two(torch.tanh(self.one(x))))


class Mapped:
    """A network in a file, streamed from there."""

    def __init__(self, path: Path, **dials: object) -> None:
        torch.manual_seed(0)
        self.network = torch.nn.Sequential(*(Layer() for _ in range(BLOCKS)))
        with path.open("wb") as file:
            places: list[tuple[Slot, int]] = []
            for slot in slots_of(self.network.modules()):
                places.append((slot, file.tell()))
                file.write(slot.home.detach().numpy().tobytes())
        self._stored, self._offsets = StoredFile.of(path), {}
        whole = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
        for slot, offset in places:
            slot.rehome(slot.over(whole[offset : offset + slot.nbytes]))
            self._offsets[slot.home.data_ptr()] = offset
        self.x = torch.randn(3, WIDTH)
        self.expected = self.network(self.x)
        blocks = [Block(str(number), layer) for number, layer in enumerate(self.network)]
        self.residency = Residency(blocks, SwapRequest(**dials))  # type: ignore[arg-type]

    def located(self, tensor: torch.Tensor) -> tuple[StoredFile, int] | None:
        offset = self._offsets.get(tensor.data_ptr())
        return None if offset is None else (self._stored, offset)

    def arrange(self) -> list[Run]:
        """The runs that stream."""
        plenty = 1 << 30
        terms = Terms(
            *(plenty, plenty, plenty, True, self.located),
            dtype_of=lambda module, name: None,
            account_pinned=lambda nbytes: None,
            patched_by_host=lambda slot: False,
        )
        self.residency.arrange(self.network, CPU, terms)
        self.residency.follow(self)
        plan = self.residency.plan
        assert plan is not None
        return [self.residency._runs[copy.block][copy.tensor] for copy in plan.copies]


@pytest.fixture(params=POLICIES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[NotingRegistrar]:
    registrar = NotingRegistrar()
    made = FakeDevice(request.param, seed=5, eager=True, registrar=registrar)
    monkeypatch.setattr(residency_module, "device_for", lambda torch_device: made)
    monkeypatch.setattr(residency_module, "link_of", lambda device, source: Link(1e9))
    monkeypatch.setattr(streaming, "BlockStreamer", partial(BlockStreamer, poison=True))
    monkeypatch.setattr(runs_module, "SHARE", 3)
    yield registrar
    assert not registrar.registered


@pytest.mark.parametrize("source", ["page_cache", "pinned", "disk"])
@pytest.mark.parametrize("blocks", [1, 2, BLOCKS])
def test_streamed_run_by_run_a_network_computes_the_same(
    tmp_path: Path, device: NotingRegistrar, source: str, blocks: int
) -> None:
    case = Mapped(tmp_path / "model", blocks_to_swap=blocks, weight_source=source)
    homes = [id(p) for p in case.network.parameters()]
    streamed = case.arrange()
    assert case.residency.choice is not None and case.residency.choice.source.kind == source
    assert [len(run.slots) for run in streamed] == [2] * blocks, "two weights, and the bias between them"
    for _ in range(4):
        assert torch.equal(case.network(case.x), case.expected)
        assert all(run.slots[0].shown is run.slots[0].home for run in streamed)
    case.residency.leave()
    assert [id(p) for p in case.network.parameters()] == homes
    assert torch.equal(case.network(case.x), case.expected)


def test_a_model_that_left_its_file_is_planned_anew(tmp_path: Path, device: NotingRegistrar) -> None:
    case = Mapped(tmp_path / "model", blocks_to_swap=2)
    assert [len(run.slots) for run in case.arrange()] == [2, 2]
    case.residency.leave()
    case._offsets = {}
    assert [len(run.slots) for run in case.arrange()] == [1] * 4
    assert torch.equal(case.network(case.x), case.expected)
    case.residency.leave()
