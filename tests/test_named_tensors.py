"""Names of a network's tensors: those that torch finds, in its order, and every name of what has several."""

from __future__ import annotations

from typing import Any

import torch
from pack.loaders.named_tensors import named_tensors


def network() -> torch.nn.Module:
    inner = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.ReLU())
    outer: Any = torch.nn.Module()
    outer.own = torch.nn.Parameter(torch.zeros(1))
    outer.register_buffer("state", torch.ones(2))
    outer.first, outer.again = inner, inner
    outer.tied = torch.nn.Linear(2, 3, bias=False)
    outer.tied.weight = inner[0].weight
    outer.missing = None
    outer.register_parameter("empty", None)
    return outer


def test_parameters_and_buffers_have_the_names_that_torch_gives_them() -> None:
    made = network()
    named = list(named_tensors(made))
    wanted = list(made.named_parameters(remove_duplicate=False))
    assert [name for name, _ in named] == [name for name, _ in wanted]
    assert all(one is other for (_, one), (_, other) in zip(named, wanted, strict=True))
    assert {"first.0.weight", "again.0.weight", "tied.weight"} <= dict(named).keys()
    both = dict(named_tensors(made, buffers=True))
    assert both.keys() == dict(wanted).keys() | dict(made.named_buffers(remove_duplicate=False)).keys()
