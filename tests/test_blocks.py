"""Blocks of networks that nobody has listed: by their structure alone, and never one that could not be streamed."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from pack.offload.blocks import Block, find_blocks
from torch import nn
from watched_blocks import Watch

WIDTH = 16


class Layer(nn.Module):
    """What most networks are made of: some layers, called from its own forward."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.attn = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ff(self.attn(x))


class Wide(Layer):
    """Another class."""


class Stage(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Network(nn.Module):
    """Whatever it is given, by name. Without a forward: these tests look at its structure only."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def blocks(count: int, kind: type[nn.Module] = Layer) -> nn.ModuleList:
    return nn.ModuleList(kind() for _ in range(count))


def names(network: nn.Module) -> list[str]:
    return [block.name for block in find_blocks(network)]


def numbered(path: str, count: int) -> list[str]:
    return [f"{path}.{i}" for i in range(count)]


def test_the_members_of_alike_layers_are_blocks() -> None:
    trunk = blocks(5)
    found = find_blocks(Network(stem=nn.Linear(WIDTH, WIDTH), trunk=trunk, head=nn.Linear(WIDTH, WIDTH)))
    assert [block.name for block in found] == numbered("trunk", 5)
    assert [block.module for block in found] == list(trunk)
    assert all(block.every_step for block in found)


def test_several_lists_come_in_the_order_they_were_made() -> None:
    inner = Network(deep=blocks(3, Wide))
    assert names(Network(b=blocks(2), a=inner, c=blocks(2))) == [
        "b.0",
        "b.1",
        "a.deep.0",
        "a.deep.1",
        "a.deep.2",
        "c.0",
        "c.1",
    ]


def test_a_sequence_of_alike_layers_is_a_list() -> None:
    assert names(Network(trunk=nn.Sequential(Layer(), Layer(), Layer()))) == numbered("trunk", 3)


@pytest.mark.parametrize(
    "part",
    [
        nn.Sequential(Layer(), Wide(), nn.Linear(WIDTH, WIDTH)),  # members of different kinds
        blocks(1),
        nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4)),  # bare layers, whose weight anybody may read
        nn.Linear(WIDTH, WIDTH),
        nn.ModuleList(nn.Identity() for _ in range(4)),
        Layer(),
        nn.ModuleList(),
    ],
)
def test_what_is_no_stack_has_no_blocks(part: nn.Module) -> None:
    assert names(Network(part=part)) == []


def test_a_known_name_makes_a_list_of_what_would_be_none() -> None:
    mixed = nn.ModuleList([Layer(), Wide(), nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Identity())])
    assert names(Network(transformer_blocks=mixed)) == numbered("transformer_blocks", 2)
    assert names(Network(layers=blocks(1))) == ["layers.0"]


def test_a_stack_that_holds_next_to_nothing_is_left_alone() -> None:
    small = nn.ModuleList(Layer(4) for _ in range(4))
    assert names(Network(trunk=blocks(12), small=small)) == numbered("trunk", 12)


def test_lists_and_dicts_of_lists_stand_for_their_members() -> None:
    """They are never called themselves."""
    pairs = nn.ModuleList(nn.ModuleDict({"attn": Layer(), "ff": Layer()}) for _ in range(2))
    assert names(Network(trunk=pairs)) == ["trunk.0.attn", "trunk.0.ff", "trunk.1.attn", "trunk.1.ff"]
    levels = nn.ModuleList(blocks(n) for n in (1, 2))
    assert names(Network(trunk=levels)) == ["trunk.0.0", "trunk.1.0", "trunk.1.1"]
    assert names(Network(trunk=nn.ModuleDict({"a": Layer(), "b": Layer()}))) == ["trunk.a", "trunk.b"]


def test_few_large_stages_stand_for_their_layers_and_many_small_ones_for_themselves() -> None:
    few = Network(stages=nn.ModuleList(Stage(6) for _ in range(2)))
    assert names(few) == [*numbered("stages.0.layers", 6), *numbered("stages.1.layers", 6)]
    many = Network(stages=nn.ModuleList(Stage(2) for _ in range(30)))
    assert names(many) == numbered("stages", 30)


def test_a_block_in_two_places_is_one_block() -> None:
    repeated = Layer()
    network = Network(trunk=nn.ModuleList([repeated, Layer(), repeated]), again=nn.ModuleList([repeated, Layer()]))
    assert names(network) == ["trunk.0", "trunk.1", "again.1"]


def test_of_a_block_that_shares_weights_the_rest_is_found() -> None:
    layers = [Layer() for _ in range(4)]
    for layer in layers:
        layer.attn = layers[0].attn  # one module in all of them
    assert names(Network(trunk=nn.ModuleList(layers))) == ["trunk.0.attn", *(f"trunk.{i}.ff" for i in range(4))]

    layers, head = [Layer() for _ in range(4)], nn.Linear(WIDTH, 2 * WIDTH)
    tied = layers[1].ff[0]
    assert isinstance(tied, nn.Linear)
    tied.weight = head.weight  # one parameter of one of them, used elsewhere too
    found = names(Network(trunk=nn.ModuleList(layers), head=head))
    assert found == ["trunk.0", "trunk.1.attn", "trunk.2", "trunk.3"]


def test_a_module_without_parameters_may_be_shared() -> None:
    layers = [Layer() for _ in range(3)]
    for layer in layers:
        layer.add_module("activation", layers[0].attn[1])
    assert names(Network(trunk=nn.ModuleList(layers))) == numbered("trunk", 3)


def test_the_quantised_network_has_the_blocks_of_the_original() -> None:
    """Weights are counted, not bytes: a large embedding that stays in a wide type does not push a list out."""
    trunk = blocks(3)
    network = Network(trunk=trunk, embed=nn.Embedding(4500, WIDTH))
    before = names(network)
    for parameter in trunk.parameters():
        parameter.data = parameter.data.to(torch.float8_e4m3fn)
    assert names(network) == before == numbered("trunk", 3)


class RandomNetwork(nn.Module):
    """Nested lists of blocks, some of them shared, repeated, or tied to one another; runs all of them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self.made: list[Layer] = []
        for i in range(self.rng.randint(1, 3)):
            self.add_module(f"part{i}", self._part(2))
        for _ in range(self.rng.choice([0, 0, 1, 2]) if self.made else 0):
            a, b = self.rng.choices(self.made, k=2)
            if self.rng.random() < 0.5:
                a.ff = b.ff
            else:
                a.attn[0].weight = b.attn[0].weight

    def _part(self, levels: int) -> nn.Module:
        kind = self.rng.choice(["list", "list", "dict", "sequence", "layer"] if levels else ["layer", "layer", "bare"])
        if kind == "bare":
            return nn.Linear(WIDTH, WIDTH)
        if kind == "layer":
            return self._layer()
        if kind == "sequence":
            return nn.Sequential(*(self._layer() for _ in range(self.rng.randint(1, 4))))
        members = [self._part(levels - 1) for _ in range(self.rng.randint(1, 4))]
        return nn.ModuleList(members) if kind == "list" else nn.ModuleDict({f"m{i}": m for i, m in enumerate(members)})

    def _layer(self) -> Layer:
        if self.made and self.rng.random() < 0.2:
            return self.rng.choice(self.made)
        self.made.append(Layer())
        return self.made[-1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.children():
            x = self._run(part, x)
        return x

    def _run(self, part: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if isinstance(part, (nn.ModuleList, nn.ModuleDict)):
            for member in part.children():
                x = self._run(member, x)
            return x
        return torch.tanh(part(x))


def check_apart(found: list[Block]) -> None:
    """No two blocks share a module with weights, or a parameter."""
    modules = Counter(id(m) for block in found for m in block.module.modules() if list(m.parameters()))
    parameters = Counter(id(p) for block in found for p in block.module.parameters())
    assert set(modules.values()) | set(parameters.values()) <= {1}


def test_blocks_of_random_networks_can_be_streamed() -> None:
    kinds: Counter[str] = Counter()
    for seed in range(150):
        torch.manual_seed(seed)
        network = RandomNetwork(seed).requires_grad_(False)
        x = torch.randn(3, WIDTH)
        expected = network(x)
        found = find_blocks(network)
        check_apart(found)
        modules = dict(network.named_modules(remove_duplicate=False))
        assert all(modules[block.name] is block.module for block in found)
        watch = Watch(found)
        assert torch.equal(network(x), expected), seed
        assert not watch.nested and not watch.elsewhere, seed
        assert set(watch.calls) == {block.name for block in found}, seed
        parts = any(isinstance(block.module, nn.Sequential) for block in found)
        kinds["parts" if parts else "whole" if found else "none"] += 1
    assert min(kinds["none"], kinds["parts"], kinds["whole"]) >= 5, kinds
