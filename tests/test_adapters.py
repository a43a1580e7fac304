"""LoRAs that come with their block: every block computes with its own, whatever the device does when."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from fake_device import POLICIES, FakeDevice
from pack.offload.adapters import Adapters, AdapterStream
from pack.offload.blocks import Block
from pack.offload.device import HostDevice

CPU = torch.device("cpu")
WIDTH, BLOCKS = 64, 6


class Product:
    """Adds `b a` to a layer's output, from tensors that lie here or were lent."""

    def __init__(self, rank: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.own = torch.randn(2 * rank, WIDTH, generator=generator) / WIDTH**0.5
        self.stays_home = False
        self.lent: torch.Tensor | None = None
        self.uses: list[bool] = []  # whether of what was lent

    @property
    def nbytes(self) -> int:
        return self.own.nbytes

    packed_bytes = nbytes

    def pack(self, memory: torch.Tensor) -> None:
        memory.view(torch.float32).copy_(self.own.view(-1))

    def over(self, memory: torch.Tensor) -> torch.Tensor:
        return memory.view(torch.float32).view_as(self.own)

    def lend(self, device: torch.device, tensors: Any) -> Any:
        before, self.lent = self.lent, tensors
        return before

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.uses.append(self.lent is not None)
        a, b = (self.own if self.lent is None else self.lent).chunk(2)
        return x @ a.t() @ b


class Fixed:
    """A function that cannot be packed."""

    stays_home = False
    nbytes = 1000


class Layer(torch.nn.Module):
    def __init__(self, functions: list[Product]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x + sum((function(x) for function in self.functions), torch.zeros(())))


class Network(torch.nn.Module):
    """Blocks of one to three functions; one of them has none."""

    def __init__(self) -> None:
        super().__init__()
        ranks = [[4], [4, 8], [], [16], [4, 4, 4], [8]]
        self.layers = torch.nn.ModuleList(
            Layer([Product(rank, 10 * i + j) for j, rank in enumerate(found)]) for i, found in enumerate(ranks)
        )

    def forward(self, x: torch.Tensor, order: list[int]) -> torch.Tensor:
        for number in order:
            x = self.layers[number](x)
        return x

    @property
    def adapters(self) -> Adapters:
        functions: dict = {layer: list(layer.functions) for layer in self.layers}  # type: ignore[arg-type]
        functions[self] = [Fixed()]
        return Adapters.of([Block(str(i), layer) for i, layer in enumerate(self.layers)], functions)

    @property
    def functions(self) -> list[list[Any]]:
        """Of each block."""
        return [layer.functions for layer in self.layers]  # type: ignore[misc]


IN_ORDER = list(range(BLOCKS))
X = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(99))


def test_bytes() -> None:
    adapters = Network().adapters
    sizes = [8, 24, 32, 24, 16]
    assert [sum(f.packed_bytes for f in found) for _, found in adapters.blocks] == [n * WIDTH * 4 for n in sizes]
    assert adapters.nbytes == sum(sizes) * WIDTH * 4 + 1000
    # The ring holds the tensors of two blocks that follow each other, at most 24 + 32.
    assert 1000 + 56 * WIDTH * 4 <= adapters.least_bytes < adapters.nbytes
    nothing = Adapters.of([], {})
    assert nothing.nbytes == nothing.least_bytes == 0


@pytest.mark.parametrize("kind", ["host", *POLICIES])
@pytest.mark.parametrize("may_pin", [True, False])
def test_every_block_has_its_own(kind: str, may_pin: bool) -> None:
    network = Network()
    locked: list[int] = []
    orders = [IN_ORDER, IN_ORDER, [0, 3, 4, 5], [0, 0, 1, 5], IN_ORDER]
    expected = [network(X, order) for order in orders]
    device = HostDevice(CPU) if kind == "host" else FakeDevice(kind, seed=5, eager=True)
    stream = AdapterStream(network.adapters, device, 1 << 30, may_pin, locked.append)
    stream.follow(network)
    functions = list(chain.from_iterable(network.functions))
    for function in functions:
        function.uses.clear()
    for order, wanted in zip(orders, expected, strict=True):
        assert torch.equal(network(X, order), wanted), order
    assert all(all(function.uses) and function.uses and function.lent is None for function in functions)
    stream.close()
    assert sum(locked) == 0
    assert torch.equal(network(X, IN_ORDER), expected[0]) and not functions[0].uses[-1]


def test_a_pass_that_is_broken_off_leaves_nothing_lent() -> None:
    network = Network()
    expected = network(X, IN_ORDER)
    stream = AdapterStream(network.adapters, HostDevice(CPU), 0, False, lambda nbytes: None)
    before = object()
    network.functions[1][0].lent = before  # as another model that is loaded may have left it
    stream.enter(1)
    assert network.functions[1][0].lent is not before and network.functions[1][1].lent is not None
    stream.restore()
    assert network.functions[1][0].lent is before and network.functions[1][1].lent is None
    network.functions[1][0].lent = None
    stream.follow(network)
    stream.enter(3)
    assert torch.equal(network(X, IN_ORDER), expected)
    stream.unfollow(object())  # on behalf of somebody else
    network(X, IN_ORDER)
    assert network.functions[0][0].uses[-1]
    stream.unfollow(network)
    network(X, IN_ORDER)
    assert not network.functions[0][0].uses[-1]
    stream.close()


def test_the_host_moves_nothing_meanwhile() -> None:
    network = Network()
    stream = AdapterStream(network.adapters, HostDevice(CPU), 0, False, lambda nbytes: None)
    functions = list(chain.from_iterable(network.functions))
    with stream.at_home():
        assert all(function.stays_home for function in functions)
    assert not any(function.stays_home for function in functions)
    stream.close()
