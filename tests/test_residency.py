"""Where weights lie: every pass sees its own bytes whatever the plan, and everything goes home again."""

from __future__ import annotations

import gc
import logging
import random
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from fake_device import POLICIES, FakeDevice
from pack.offload import residency as module
from pack.offload import streaming
from pack.offload.blocks import Block
from pack.offload.costs import Link, SwapRequest
from pack.offload.device import HostDevice
from pack.offload.errors import ArenaError
from pack.offload.plan import BudgetTooSmallError
from pack.offload.residency import Residency
from pack.offload.shelf import Shelf
from pack.offload.slots import Slot
from pack.offload.streamer import BlockStreamer
from pack.offload.terms import Terms
from test_slots import q8_0

CPU = torch.device("cpu")
WIDTH, BLOCKS = 64, 6


class Layer(torch.nn.Module):
    """Two weights, one of them quantised, and a bias."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        values = torch.randn(WIDTH, WIDTH, generator=random) / WIDTH**0.5
        self.plain = torch.nn.Parameter(values, requires_grad=False)
        self.bias = torch.nn.Parameter(torch.randn(WIDTH, generator=random), requires_grad=False)
        self.blocks = torch.nn.Parameter(q8_0(WIDTH, WIDTH, seed), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quantised = self.blocks.dequantize()
        return torch.tanh(x @ self.plain.t() + self.bias) + torch.tanh(x @ quantised.t() / quantised.norm())


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, WIDTH)
        self.layers = torch.nn.ModuleList(Layer(number) for number in range(BLOCKS))
        self.register_buffer("offset", torch.ones(WIDTH))
        self.requires_grad_(False)
        self.order: list[int] = list(range(BLOCKS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) + self.offset
        for number in self.order:
            x = x + self.layers[number](x)
        return x


TOTAL = sum(getattr(p, "_qdata", p).nbytes for p in Network().parameters())


def terms(budget: int, most: int = 0, **more: object) -> Terms:
    given = Terms(
        budget_bytes=budget,
        most_bytes=most,
        pinned_budget_bytes=0,
        may_pin=True,
        located=lambda tensor: None,
        dtype_of=lambda module, name: None,
        account_pinned=lambda nbytes: None,
        patched_by_host=lambda slot: False,
    )
    return replace(given, **more)


class Arranged:
    """A network, its residency, and what it should compute."""

    def __init__(self, **dials: object) -> None:
        self.network = Network()
        self.blocks = [Block(f"layers.{number}", layer) for number, layer in enumerate(self.network.layers)]
        self.residency = Residency(self.blocks, SwapRequest(**dials))  # type: ignore[arg-type]
        self.homes = {name: id(p) for name, p in self.network.named_parameters()}
        self.x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
        self.expected = self.network(self.x)

    def arrange(self, budget: int = 1 << 40, **more: object) -> bool:
        moved = self.residency.arrange(self.network, CPU, terms(budget, **more))  # type: ignore[arg-type]
        self.residency.follow(self)
        return moved

    def run(self, passes: int = 1) -> bool:
        """Whether every pass computes what the network computes with its weights at home."""
        return all(torch.equal(self.network(self.x), self.expected) for _ in range(passes))

    def at_home(self) -> bool:
        return {name: id(p) for name, p in self.network.named_parameters()} == self.homes


@pytest.fixture(autouse=True, params=["host", *POLICIES])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU itself, and devices on which copies happen as oddly as their events allow. Released places hold NaN."""
    kind = request.param
    made = HostDevice(CPU) if kind == "host" else FakeDevice(kind, seed=3, eager=True)
    monkeypatch.setattr(module, "device_for", lambda torch_device: made)
    monkeypatch.setattr(module, "link_of", lambda device, source: Link(1e9))
    monkeypatch.setattr(streaming, "BlockStreamer", partial(BlockStreamer, poison=True))


DIALS = [
    *({"blocks_to_swap": count} for count in (0, 1, 2, 3, BLOCKS)),
    *({"vram_budget_gb": share * TOTAL / 1e9, "prefetch_blocks": 0} for share in (0.5, 0.75, 0.9)),
]


@pytest.mark.parametrize("dials", DIALS, ids=str)
def test_every_plan_computes_the_same(dials: dict) -> None:
    case = Arranged(**dials)
    budget = round(dials.get("vram_budget_gb", 1000) * 1e9)
    assert case.arrange(budget)
    assert bool(case.residency.plan.copies) == (dials.get("blocks_to_swap") != 0)
    assert case.run(5)
    assert case.residency.vram_bytes == case.residency.plan.vram_bytes <= budget
    case.residency.leave()
    assert case.at_home() and case.residency.vram_bytes == 0 and not case.residency.arranged
    assert case.run()


def test_weights_are_at_home_between_blocks() -> None:
    case = Arranged(blocks_to_swap=BLOCKS)
    seen = []
    for layer in case.network.layers:
        layer.register_forward_pre_hook(lambda layer, args: seen.append(layer.plain.data_ptr()))
    homes = [layer.plain.data_ptr() for layer in case.network.layers]  # type: ignore[operator]
    case.arrange()
    assert case.run()
    assert not set(seen) & set(homes), "a block computed with its home"
    assert [layer.plain.data_ptr() for layer in case.network.layers] == homes  # type: ignore[operator]
    assert torch.isfinite(case.network.layers[0].plain).all()  # type: ignore[arg-type]


def test_what_was_foreseen_is_not_planned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Arranged()
    case.arrange()
    made: list[object] = []
    plan = Residency._plan

    def counted(residency: Residency, asked: object) -> tuple:
        made.append(asked)
        return plan(residency, asked)  # type: ignore[arg-type]

    monkeypatch.setattr(Residency, "_plan", counted)
    less = terms(round(0.75 * TOTAL))
    foreseen = case.residency.foresee(CPU, less)
    assert foreseen is not None and not foreseen.kept
    assert case.residency.arrange(case.network, CPU, less, foreseen)
    case.residency.follow(case)
    assert case.residency.plan is foreseen.plan and len(made) == 1
    assert case.run(2)


def test_nothing_moves_where_nothing_changed() -> None:
    case = Arranged(blocks_to_swap=3)
    case.arrange()
    facts = case.residency.plan, case.residency.choice
    assert case.run(3)
    for _ in range(3):
        assert case.residency.foresee(CPU, terms(1 << 40)).kept and not case.arrange()
        assert (case.residency.plan, case.residency.choice) == facts and case.residency.plans_made == 1
    assert case.run()


def test_less_room_and_more_again() -> None:
    case = Arranged(prefetch_blocks=0)
    streamed = []
    for share in (1.5, 0.8, 0.5, 0.8, 1.5):
        case.arrange(int(TOTAL * share))
        streamed.append(case.residency.plan.streamed_bytes)
        assert case.run(2)
    # Compute hides the copies here, so more room again is no reason to move anything.
    assert 0 == streamed[0] < streamed[1] < streamed[2] == streamed[3] == streamed[4]


def test_too_little_is_an_error_and_the_least_is_enough() -> None:
    case = Arranged()
    with pytest.raises(BudgetTooSmallError) as error:
        case.arrange(1000)
    least = error.value.smallest_bytes
    assert case.at_home() and not case.residency.arranged and case.run()
    with pytest.raises(BudgetTooSmallError):
        case.arrange(1000, most=least - 1)
    assert case.arrange(least)
    assert case.run(2)


def test_smallest_plan_where_the_host_allows_less_is_made_once() -> None:
    case = Arranged()
    assert case.arrange(1000, most=1 << 40)
    assert case.residency.plan.copies
    for _ in range(3):
        case.residency.times.begin()
        assert case.run(6)  # it is measured, and the plan looked at again
        assert case.residency.foresee(CPU, terms(1000, most=1 << 40)).kept
    assert case.residency.plans_made == 1


@pytest.mark.parametrize("seed", range(8))
def test_blocks_in_any_order(seed: int) -> None:
    rng = random.Random(seed)
    case = Arranged(**rng.choice(DIALS[2:]))  # type: ignore[arg-type]
    case.arrange(round(case.residency.request.vram_budget_gb * 1e9) or 1 << 40)
    for _ in range(12):
        case.network.order = rng.choice(
            [list(range(BLOCKS)), rng.sample(range(BLOCKS), BLOCKS), rng.choices(range(BLOCKS), k=5), [2, 2, 3]]
        )
        case.residency.unfollow()
        case.residency.restore()
        expected = case.network(case.x)
        case.residency.follow(case)
        assert torch.equal(case.network(case.x), expected)
    assert case.at_home() == (not case.residency._placed)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["inside", "between"])
def test_pass_that_is_broken_off(error: type[BaseException], where: str) -> None:
    """torch tells hooks of an Exception, and not of what the host's Cancel is."""
    case = Arranged(blocks_to_swap=BLOCKS)
    case.arrange()
    homes = [layer.plain.data_ptr() for layer in case.network.layers]  # type: ignore[operator]
    for number in range(BLOCKS):
        layer = case.network.layers[number]

        def breaking(*args: object) -> None:
            raise error

        register: Callable = layer.register_forward_pre_hook if where == "inside" else layer.register_forward_hook
        handle = register(breaking)
        with pytest.raises(error):
            case.network(case.x)
        handle.remove()
        case.residency.restore()
        assert [layer.plain.data_ptr() for layer in case.network.layers] == homes  # type: ignore[operator]
        assert case.run(2), number


def test_plan_that_changes_between_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Arranged(prefetch_blocks=0)
    case.arrange(int(0.7 * TOTAL))
    budgets = iter([0.5, 0.9, 0.6, 0.8] * 10)

    def another(plan, blocks, link, budget, steps):  # type: ignore[no-untyped-def]
        return case.residency._make_plan(int(next(budgets) * TOTAL)), "for the test"

    monkeypatch.setattr(module, "replan", another)
    monkeypatch.setattr(case.residency.times, "complete", lambda: True)
    assert case.run(12)
    assert case.residency.plans_made >= 12


def test_better_plan_is_looked_for_again_as_the_loss_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """At first the change may cost more than what the few passes so far have lost."""
    case = Arranged(prefetch_blocks=0)
    case.arrange(int(0.7 * TOTAL))
    asked = []

    def the_same(plan, blocks, link, budget, steps):  # type: ignore[no-untyped-def]
        asked.append(steps)
        return plan, ""

    monkeypatch.setattr(module, "replan", the_same)
    monkeypatch.setattr(case.residency.times, "complete", lambda: case.residency.steps == 3)
    assert case.run(30)
    assert asked == [3, 6, 12, 24]


def test_better_plan_without_room_leaves_the_one_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = Arranged(prefetch_blocks=0)
    case.arrange(int(0.7 * TOTAL))
    before = case.residency.plan
    assert case.run()
    other = case.residency._make_plan(int(0.5 * TOTAL))
    monkeypatch.setattr(module, "replan", lambda *args: (other, "for the test"))
    monkeypatch.setattr(case.residency.times, "complete", lambda: True)
    refused = refusing(monkeypatch, case, lambda nbytes: nbytes == other.ring_bytes)
    with caplog.at_level(logging.WARNING, "sluice.offload"):
        assert case.run(2)
    assert refused and case.residency.plan is before
    assert "no room for a better plan" in caplog.text


def test_better_plan_without_its_file_leaves_the_one_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Copies stand in for the file, which was closed, and then somebody took it away."""
    case = Arranged(prefetch_blocks=0)
    case.arrange(int(0.7 * TOTAL))
    before = case.residency.plan
    other = case.residency._make_plan(int(0.5 * TOTAL))
    monkeypatch.setattr(module, "replan", lambda *args: (other, "for the test"))
    monkeypatch.setattr(case.residency.times, "complete", lambda: True)

    class Gone(Shelf):
        def bring_back(self) -> None:
            raise FileNotFoundError("model.gguf is gone; put it back")

    class File:
        def close(self) -> bool:
            return True

    case.residency.shelf = Gone(File())  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "sluice.offload"):
        assert case.run(3)
    assert case.residency.plan is before and "model.gguf is gone; put it back; the plan before stays" in caplog.text
    case.residency.shelf = None
    assert case.run(3) and case.residency.plan is other


def refusing(monkeypatch: pytest.MonkeyPatch, case: Arranged, refuses: Callable[[int], bool]) -> list[int]:
    """The device has no memory for what `refuses` says; what it refused."""
    device, refused = case.residency._device or module.device_for(CPU), []
    allocate = device.allocate

    def allocate_or_not(nbytes: int) -> torch.Tensor:
        if refuses(nbytes):
            refused.append(nbytes)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return allocate(nbytes)

    monkeypatch.setattr(device, "allocate", allocate_or_not)
    return refused


def test_smaller_plan_where_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = Arranged(prefetch_blocks=0)
    asked: list[int] = []
    refused = refusing(monkeypatch, case, lambda nbytes: asked.append(nbytes) is None and len(asked) <= 2)  # type: ignore[func-returns-value]
    with caplog.at_level(logging.WARNING, "sluice.offload"):
        case.arrange(int(0.95 * TOTAL))
    assert len(refused) == 2 and "planning again for less" in caplog.text
    assert case.residency.plan.vram_bytes <= 0.95 * TOTAL * 0.8**2
    assert case.run(2)


def test_memory_that_is_always_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Arranged(prefetch_blocks=0)
    refusing(monkeypatch, case, lambda nbytes: True)
    with pytest.raises((ArenaError, BudgetTooSmallError)):
        case.arrange(int(0.95 * TOTAL))
    assert case.at_home() and case.run()


def test_weights_that_the_host_patches_are_its_to_move() -> None:
    case = Arranged(blocks_to_swap=3)
    first = case.network.first
    case.arrange(patched_by_host=lambda slot: slot.owners[0] == (first, "weight"))
    assert id(first.weight) == case.homes["first.weight"], "the host's to move"
    patched = torch.nn.Parameter(first.weight + 1, requires_grad=False)
    home, first.weight = first.weight, patched
    case.residency.adopt()
    assert case.residency.foresee(CPU, terms(1 << 40)).kept
    first.weight = torch.nn.Parameter(home.detach(), requires_grad=False)  # as it takes a patch off
    case.residency.disown()
    assert first.weight is home
    assert case.run()


def test_tables_stay_in_ram_if_asked_to() -> None:
    case = Arranged(blocks_to_swap=BLOCKS, offload_embeddings=True)
    case.network.table = torch.nn.Embedding(32, WIDTH)
    case.arrange()
    with_table = Arranged(blocks_to_swap=BLOCKS)
    with_table.network.table = torch.nn.Embedding(32, WIDTH)
    with_table.arrange()
    assert with_table.residency.vram_bytes - case.residency.vram_bytes == 32 * WIDTH * 4
    assert case.network.table in case.residency.streamed_modules(), "the host would move it"
    assert with_table.network.table not in with_table.residency.streamed_modules()


def test_whoever_is_followed_ends_it_and_nobody_else() -> None:
    case, other = Arranged(blocks_to_swap=BLOCKS), Network()
    case.arrange()

    def hooks() -> int:
        return sum(len(layer._forward_pre_hooks) for layer in case.network.layers)

    assert hooks() == BLOCKS
    case.residency.follow(other)
    case.residency.unfollow(other)
    assert hooks() == BLOCKS and case.run()
    case.residency.unfollow(case)
    assert not hooks()
    case.residency.follow(other)
    owner = weakref.ref(other)
    del other
    gc.collect()
    assert owner() is None, "following keeps nobody alive"
    case.residency.unfollow(case)
    assert not hooks()


def test_everything_goes_at_once() -> None:
    case = Arranged(blocks_to_swap=BLOCKS)
    case.arrange()
    assert case.run()
    gc.collect()
    gc.disable()
    try:
        gone = [weakref.ref(what) for what in (case.residency, case.residency._streaming.streamer, case.network)]
        del case
        assert [what() for what in gone] == [None] * 3
    finally:
        gc.enable()


def test_other_modes_of_autograd() -> None:
    case = Arranged(blocks_to_swap=BLOCKS)
    case.arrange()
    assert case.run()
    with torch.inference_mode():
        assert case.run(2)
    with torch.no_grad():
        assert case.run(2)


def slots(case: Arranged) -> Iterator[Slot]:
    return (slot for block in case.residency._blocks for slot in block)


def test_what_of_a_block_may_stream() -> None:
    case = Arranged()
    assert [len(block) for block in case.residency._blocks] == [2] * BLOCKS, "the biases stay"
    assert sum(isinstance(slot.home, QuantizedTensor) for slot in slots(case)) == BLOCKS


def test_times_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host may send a model to the CPU and back."""
    monkeypatch.setattr(module, "device_for", HostDevice)
    arranged, times = Arranged(), []
    for place in ("cpu", "meta", "meta", "cpu"):
        arranged.residency.arrange(arranged.network, torch.device(place), terms(1 << 30))
        times.append(arranged.residency.times)
        assert times[-1] is not None and times[-1].device.type == place
    assert times[1] is times[2] and len({id(found) for found in times}) == 3
