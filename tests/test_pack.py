"""Small tensors that travel in one piece arrive as they would one by one, whenever the device copies."""

from __future__ import annotations

import random

import pytest
import torch
from fake_device import POLICIES, FakeDevice
from pack.offload import pack as module
from pack.offload.device import HostDevice
from pack.offload.pack import Pack, can_pack
from pack.offload.slots import Slot
from test_slots import q8_0

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64)
CPU = torch.device("cpu")


def tensors(seed: int) -> list[tuple[torch.Tensor, torch.dtype]]:
    """Of any shape, also without elements or not contiguous, some to be cast."""
    rng, made = random.Random(seed), []
    for _ in range(30):
        shape = [rng.randrange(0, 9) for _ in range(rng.randrange(4))]
        values = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
        tensor = values.to(rng.choice(DTYPES))
        made.append((tensor.transpose(0, -1) if tensor.dim() > 1 else tensor, rng.choice([tensor.dtype, *DTYPES[:3]])))
    return made


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(8))
def test_what_is_computed_next_finds_them(policy: str, seed: int) -> None:
    device, given = FakeDevice(policy, seed), tensors(seed)
    pack = Pack(given, device)
    seen: list[torch.Tensor] = []
    device.compute(lambda: seen.extend(there.clone() for there in pack.arrived))
    assert not device.host_waits
    device.finish()
    for (tensor, dtype), found in zip(given, seen, strict=True):
        assert found.dtype == dtype and torch.equal(found, tensor.to(dtype))


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_copied_after_it_was_closed(policy: str) -> None:
    device = FakeDevice(policy, 1)
    pack = Pack([(torch.ones(100), torch.float32)] * 5, device)
    there = list(pack.arrived)
    pack.close()
    for tensor in there:
        tensor.fill_(7)
    device.finish()
    assert all(bool((tensor == 7).all()) for tensor in there) and not pack.arrived


@torch.inference_mode()  # as the host runs its nodes
def test_a_quantised_weight_and_one_that_is_cast() -> None:
    device = FakeDevice("late")
    slots = [Slot(torch.nn.Parameter(q8_0(64, 64, 1), requires_grad=False)), Slot(torch.nn.Parameter(torch.rand(7, 3)))]
    pack = Pack([slot.as_moved(torch.bfloat16) for slot in slots], device)
    moved = [slot.over_moved(there) for slot, there in zip(slots, pack.arrived, strict=True)]
    device.finish()
    for slot, parameter in zip(slots, moved, strict=True):
        expected = slot.moved(CPU, torch.bfloat16)
        assert type(parameter.data) is type(expected.data) and parameter.dtype == expected.dtype
        dense = [getattr(one, "dequantize", lambda one=one: one)() for one in (parameter, expected)]
        assert torch.equal(*dense)


@pytest.mark.parametrize(
    ("nbytes", "fits"), [([], False), ([0], False), ([8, 8], True), ([9], False), ([8] * 5, False)]
)
def test_what_goes_into_one(monkeypatch: pytest.MonkeyPatch, nbytes: list[int], fits: bool) -> None:
    monkeypatch.setattr(module, "EACH_BYTES", 8)
    monkeypatch.setattr(module, "ALL_BYTES", 32)
    assert can_pack(FakeDevice(), nbytes) == fits
    assert not can_pack(HostDevice(CPU), nbytes)
