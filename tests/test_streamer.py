"""Whatever is called in whatever order, and whenever the device does what it was told: a block sees its own bytes."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from fake_device import POLICIES, FakeDevice, FakeEvent, FakeStream
from pack.offload.costs import BlockCost, Link
from pack.offload.device import Device, HostDevice
from pack.offload.errors import ArenaError, SourceError, StreamError
from pack.offload.files import Key, StoredFile, Weight
from pack.offload.host_memory import Source
from pack.offload.plan import StreamPlan, make_plan
from pack.offload.ring import Stream
from pack.offload.source import choose
from pack.offload.streamer import POISON, BlockStreamer

SEEDS = range(12)
LINK = Link(1e9)


def tight_plan(seed: int) -> StreamPlan:
    """A plan in whose ring most places are used again and again."""
    rng = random.Random(seed)
    plans = (small_plan(rng) for _ in range(100))
    return next(plan for plan in plans if plan.streamed_bytes > 1.5 * plan.ring_bytes)


def small_plan(rng: random.Random) -> StreamPlan:
    """A plan over tensors of a few hundred bytes, with a ring of any length that its stream allows."""
    blocks = tuple(
        BlockCost(f"block {number}", tuple(rng.randrange(1, 1500) for _ in range(rng.randrange(1, 5))), 1.0)
        for number in range(rng.randrange(2, 9))
    )
    chunks = [
        [(tensor, nbytes) for tensor, nbytes in enumerate(block.tensor_bytes) if rng.random() < 0.8] for block in blocks
    ]
    stream = Stream(chunks, depth=rng.randrange(1, 3))
    smallest = stream.smallest_ring().nbytes
    ring = stream.largest_ring(rng.randrange(smallest, smallest * 2 + 1)) or stream.smallest_ring()
    plan = make_plan(blocks, LINK, 1 << 30)
    return dataclasses.replace(plan, copies=ring.copies, ring_bytes=ring.nbytes)


def truth_of(plan: StreamPlan, seed: int = 0) -> dict[Key, torch.Tensor]:
    random_bytes = torch.Generator().manual_seed(seed)
    return {
        (copy.block, copy.tensor): torch.randint(0, 255, (copy.nbytes,), dtype=torch.uint8, generator=random_bytes)
        for copy in plan.copies
    }


def in_memory(truth: Mapping[Key, torch.Tensor], device: Device) -> Source:
    weights = {key: Weight(data.nbytes, data=data) for key, data in truth.items()}
    return choose(weights, device, kind="memory", ram_budget_bytes=0).source


class Model:
    """Calls blocks as a model's forward does, and notes which of them saw other bytes than its own."""

    def __init__(self, plan: StreamPlan, device: FakeDevice, source: Source | None = None, **options: bool) -> None:
        self.plan, self.device, self.truth = plan, device, truth_of(plan)
        self.streamer = BlockStreamer(plan, source or in_memory(self.truth, device), device, **options)
        self.calls = 0
        self.wrong: list[tuple[int, int]] = []

    def begin(self, block: int) -> None:
        views = self.streamer.wait(block)
        assert set(views) == set(self.plan.streamed(block))
        for _ in range(2):  # a block has several kernels
            self.device.compute(lambda: self._look(block, views))

    def _look(self, block: int, views: Mapping[int, torch.Tensor]) -> None:
        self.calls += 1
        self.wrong += [(block, tensor) for tensor in views if not torch.equal(views[tensor], self.truth[block, tensor])]

    def block(self, block: int) -> None:
        self.begin(block)
        self.streamer.release(block)

    def step(self) -> None:
        for block in range(len(self.plan.blocks)):
            self.block(block)

    def check(self) -> None:
        self.device.finish()
        assert self.calls
        assert self.wrong == []


def odd_pass(model: Model, rng: random.Random) -> None:
    """One pass of a model whose blocks are skipped, repeated, called out of order, or that is cancelled in a block."""
    order = list(range(len(model.plan.blocks)))
    kind = rng.choice(["in order", "skip", "twice", "shuffled", "cancelled", "cancelled at once", "told"])
    if kind == "skip":
        order = [block for block in order if rng.random() < 0.6]
    elif kind == "twice":
        order = [block for block in order for _ in range(rng.choice([1, 1, 2]))]
    elif kind == "shuffled":
        rng.shuffle(order)
    elif kind == "told":
        model.streamer.prefetch(rng.choice(order))
    if kind.startswith("cancelled"):
        stop = 0 if kind == "cancelled at once" else rng.choice(order)
        for block in order[:stop]:
            model.block(block)
        model.begin(stop)
        if rng.random() < 0.3:
            model.streamer.prefetch(0)
        return
    for block in order:
        model.block(block)
        if rng.random() < 0.1:
            model.streamer.release(rng.choice(order))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_block_sees_its_bytes(policy: str, poison: bool, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(4):
        model = Model(small_plan(rng), FakeDevice(policy, seed), poison=poison)
        for _ in range(20):
            odd_pass(model, rng)
        model.step()
        model.check()
        assert model.device.host_waits == 0
        model.streamer.close()


@pytest.mark.parametrize("policy", POLICIES)
def test_modules_that_compute_at_once_see_their_bytes(policy: str) -> None:
    rng = random.Random(5)
    for seed in SEEDS:
        model = Model(tight_plan(seed), FakeDevice(policy, seed, eager=True), poison=bool(seed % 2))
        for _ in range(6):
            odd_pass(model, rng)
        model.step()
        model.check()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", SEEDS)
def test_streams_that_know_nothing_of_each_other(policy: str, seed: int) -> None:
    rng = random.Random(seed)
    model = Model(tight_plan(seed), FakeDevice(policy, seed))
    block = 0
    for _ in range(80):
        model.begin(block)
        if rng.random() < 0.3:
            model.streamer.release(block)
        if rng.random() < 0.5:
            model.device.change_compute_stream()
        if rng.random() < 0.4:
            block = rng.randrange(len(model.plan.blocks))
    model.check()


def test_a_plan_of_the_planner_streams() -> None:
    blocks = [BlockCost(f"block {i}", (3 << 20, 2 << 20, 1000, 1 << 20), 0.001 + i % 2 * 0.001) for i in range(6)]
    plan = make_plan(blocks, Link(5e9), 24 << 20)
    assert plan.copies
    model = Model(plan, FakeDevice("random", 3))
    for _ in range(3):
        model.step()
    model.check()


def test_without_anything_to_stream_nothing_is_needed() -> None:
    plan = make_plan([BlockCost("block", (5 << 20,), 1.0)], LINK, 1 << 30)
    assert not plan.copies
    device = HostDevice(torch.device("cpu"))
    streamer = BlockStreamer(plan, in_memory({}, device), device)
    streamer.prefetch(0)
    assert dict(streamer.wait(0)) == {}
    streamer.release(0)
    streamer.close()


def test_the_cpu_as_a_device() -> None:
    plan = small_plan(random.Random(1))
    truth, device = truth_of(plan), HostDevice(torch.device("cpu"))
    streamer = BlockStreamer(plan, in_memory(truth, device), device)
    for _ in range(3):
        for block in range(len(plan.blocks)):
            for tensor, view in streamer.wait(block).items():
                assert torch.equal(view, truth[block, tensor])
            streamer.release(block)
    streamer.close()


class DeafDevice(FakeDevice):
    """Forgets to wait for events on one kind of stream."""

    def __init__(self, deaf: str, policy: str, seed: int) -> None:
        super().__init__(policy, seed)
        self._deaf = deaf

    def wait(self, stream: FakeStream, event: FakeEvent) -> None:
        if not stream.name.startswith(self._deaf):
            super().wait(stream, event)


@pytest.mark.parametrize(
    ("deaf", "policy"), [("copy", "early"), ("copy", "random"), ("compute", "late"), ("compute", "random")]
)
def test_the_fake_device_shows_a_missing_edge(deaf: str, policy: str) -> None:
    found = 0
    for seed in SEEDS:
        model = Model(tight_plan(seed), DeafDevice(deaf, policy, seed))
        for _ in range(10):
            model.step()
        model.device.finish()
        found += bool(model.wrong)
    assert found == len(SEEDS)


class Noting:
    """A source that notes what is copied."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.copied: list[Key] = []
        self.checks = 0

    def check(self) -> None:
        self.checks += 1

    def copier(self, block: int, tensor: int, out: torch.Tensor, stream: FakeStream) -> Callable[[], None]:
        made = self._source.copier(block, tensor, out, stream)

        def copy() -> None:
            self.copied.append((block, tensor))
            made()

        return copy

    def __getattr__(self, name: str) -> object:
        return getattr(self._source, name)


@pytest.mark.parametrize("seed", SEEDS)
def test_in_order_the_copies_are_made_when_the_plan_says(seed: int) -> None:
    plan = small_plan(random.Random(seed))
    device = FakeDevice("late")
    source = Noting(in_memory(truth_of(plan), device))
    streamer = BlockStreamer(plan, source, device)
    streamer.prefetch(0)
    for step in range(4):
        assert source.checks >= step
        for block in range(len(plan.blocks)):
            streamer.wait(block)
            assert step < 2 or not source.copied  # nothing is late, and nothing starts but by a release
            streamer.release(block)
            if step >= 2:
                allowed = [(copy.block, copy.tensor) for copy in plan.copies_after(block)]
                kept = [key for key in allowed if key not in source.copied]
                assert [key for key in allowed if key not in kept] == source.copied
                assert all(_alone(plan, key) for key in kept), "only what nothing overwrites is not copied again"
            source.copied.clear()
    assert streamer.misses == 0


def _alone(plan: StreamPlan, key: Key) -> bool:
    (mine,) = (copy for copy in plan.copies if (copy.block, copy.tensor) == key)
    others = [copy for copy in plan.copies if copy is not mine]
    return not any(o.offset < mine.offset + mine.nbytes and mine.offset < o.offset + o.nbytes for o in others)


def test_the_next_step_is_under_way_before_this_one_ends() -> None:
    model = Model(tight_plan(2), FakeDevice("late"))
    model.step()
    before = model.streamer.misses
    for _ in range(3):
        model.step()
    assert model.streamer.misses == before


@pytest.mark.parametrize("seed", SEEDS)
def test_after_an_odd_pass_copies_run_ahead_again(seed: int) -> None:
    model, rng = Model(tight_plan(seed), FakeDevice("late")), random.Random(seed)
    for _ in range(5):
        odd_pass(model, rng)
        model.streamer.prefetch(0)
        before = model.streamer.misses
        model.step()
        assert model.streamer.misses == before


def test_views_stay_where_they_are() -> None:
    plan = small_plan(random.Random(4))
    device = HostDevice(torch.device("cpu"))
    streamer = BlockStreamer(plan, in_memory(truth_of(plan), device), device)
    seen: list[list[int]] = []
    for _ in range(3):
        seen.append([])
        for block in range(len(plan.blocks)):
            seen[-1] += [view.data_ptr() for view in streamer.wait(block).values()]
            streamer.release(block)
    assert seen[0] == seen[1] == seen[2]


class CountingDevice(FakeDevice):
    """Counts what the computing thread asks of the device."""

    def __init__(self) -> None:
        super().__init__("late")
        self.asked: list[str] = []

    def compute_stream(self) -> FakeStream:
        self.asked.append("which stream")
        return super().compute_stream()

    def record(self, event: FakeEvent, stream: FakeStream) -> None:
        self.asked.append(f"record on {stream.name.split()[0]}")
        super().record(event, stream)

    def wait(self, stream: FakeStream, event: FakeEvent) -> None:
        self.asked.append(f"wait on {stream.name.split()[0]}")
        super().wait(stream, event)

    def copier(self, out: torch.Tensor, data: torch.Tensor) -> Callable[[], None]:
        self.asked.append("copier")
        return super().copier(out, data)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_block_costs_two_events_and_one_without_copies_none(seed: int) -> None:
    plan, device = tight_plan(seed), CountingDevice()
    model = Model(plan, device)
    for _ in range(3):
        model.step()
    streaming, waited = 0, 0
    for block in range(len(plan.blocks)):
        device.asked.clear()
        model.block(block)
        streams = int(bool(plan.streamed(block)))
        for what in ("which stream", "wait on compute", "record on compute"):
            assert device.asked.count(what) == streams, (block, device.asked)
        assert "copier" not in device.asked, "what a copy needs is made once"
        streaming, waited = streaming + streams, waited + device.asked.count("wait on copy")
    assert waited <= streaming, "the copies wait for a block that computed more than once"
    model.check()


def test_poison_spoils_what_is_used_after_its_release() -> None:
    plan = small_plan(random.Random(6))
    device = FakeDevice("late")
    streamer = BlockStreamer(plan, in_memory(truth_of(plan), device), device, poison=True)
    block = plan.copies[0].block
    views = streamer.wait(block)
    streamer.release(block)
    seen: list[bool] = []
    device.compute(lambda: seen.extend(bool((view == POISON).all()) for view in views.values()))
    device.synchronize(device.compute_stream())
    assert seen and all(seen)


def test_an_arena_that_does_not_fit_is_an_error_that_says_so() -> None:
    plan = dataclasses.replace(small_plan(random.Random(0)), ring_bytes=1 << 60)
    device = HostDevice(torch.device("cpu"))
    with pytest.raises(ArenaError, match="smaller VRAM budget") as caught:
        BlockStreamer(plan, in_memory(truth_of(plan), device), device)
    assert caught.value.nbytes == 1 << 60


def test_a_plan_that_does_not_fit_its_ring_is_refused() -> None:
    plan = small_plan(random.Random(0))
    device = HostDevice(torch.device("cpu"))
    with pytest.raises(ValueError, match="ring has"):
        BlockStreamer(dataclasses.replace(plan, ring_bytes=1), in_memory(truth_of(plan), device), device)


@pytest.mark.parametrize("policy", POLICIES)
def test_closing_waits_for_the_copies_and_ends_everything(policy: str) -> None:
    plan = small_plan(random.Random(9))
    model = Model(plan, FakeDevice(policy))
    model.step()
    model.begin(0)
    model.streamer.close()
    model.streamer.close()
    assert all(not stream.queue for stream in model.device._streams)
    for verb in (model.streamer.prefetch, model.streamer.wait, model.streamer.release):
        with pytest.raises(StreamError, match="unloaded"):
            verb(0)
    model.check()


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[tuple[Model, Path]]:
    plan = tight_plan(11)
    file = tmp_path / "weights.bin"
    truth = truth_of(plan)
    file.write_bytes(b"".join(data.numpy().tobytes() for data in truth.values()))
    weights, offset = {}, 0
    stored = StoredFile.of(file)
    for key, data in truth.items():
        weights[key] = Weight(data.nbytes, file=stored, offset=offset)
        offset += data.nbytes
    device = FakeDevice("random", 1)
    model = Model(plan, device, choose(weights, device, kind="disk", ram_budget_bytes=0).source)
    yield model, file
    model.streamer.close()


def test_from_disk_every_block_sees_its_bytes(on_disk: tuple[Model, Path]) -> None:
    model, _ = on_disk
    rng = random.Random(3)
    for _ in range(30):
        odd_pass(model, rng)
    model.check()


def test_a_file_that_was_written_to_is_noticed_within_a_step(on_disk: tuple[Model, Path]) -> None:
    model, file = on_disk
    model.step()
    os.utime(file, ns=(0, 0))
    with pytest.raises(SourceError, match=r"changed since it was loaded \(written to\)"):
        for _ in range(2):
            model.step()


def test_a_changed_file_is_an_error_and_the_next_run_works(on_disk: tuple[Model, Path]) -> None:
    model, file = on_disk
    model.step()
    whole, status = file.read_bytes(), file.stat()
    os.truncate(file, 10)
    with pytest.raises(SourceError, match="then, 10 bytes now\\); put the file back"):
        for _ in range(3):
            model.step()
    file.write_bytes(whole)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    model.device.finish()
    assert model.wrong == []
    for _ in range(2):
        model.step()
    model.check()
