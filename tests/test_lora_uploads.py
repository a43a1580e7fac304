"""Tensors that go to a GPU through a little locked memory, and what becomes of them there."""

from __future__ import annotations

import threading

import pytest
import torch
from pack.loaders import uploads as module
from pack.loaders.low_rank import Adapter, Factors
from pack.loaders.uploads import Uploads, upload, uploaded, uploading

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda", 0), marks=pytest.mark.cuda)]


def test_on_a_cpu_nothing_is_copied() -> None:
    tensor = torch.rand(3, 4)
    found: list[torch.Tensor] = []
    with uploading(CPU, may_lock=True):
        assert uploaded(tensor, CPU) is tensor
        upload(tensor, CPU, found.append)
        assert found == [tensor]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float32])
def test_scale_is_multiplied_in_float32_and_rounded_once(dtype: torch.dtype, given: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(64, 8, generator=generator).to(given)
    down = torch.randn(8, 32, generator=generator).to(given)
    for scale in (1.0, -0.7, 1 / 3, 1e-3):
        (part,) = Factors([Adapter(up, down, scale)], CPU, dtype).parts
        assert torch.equal(part.b, (up.float() * scale).to(dtype)), scale


def made() -> list[torch.Tensor]:
    """Of all sizes up to some that are larger than a buffer of 32 KB, not all of them contiguous."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(), (0, 3), (7,), (13, 5), (64, 64), (100, 100), (300, 301)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes * 40]
    return tensors + [tensor.to(torch.bfloat16).t() for tensor in tensors]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_every_tensor_arrives_in_turn_while_the_device_is_behind(device: torch.device) -> None:
    tensors = made()
    uploads = Uploads(device, buffer_bytes=1 << 15)
    if device.type == "cuda":
        busy = torch.randn(4096, 4096, device=device)
        for _ in range(20):
            busy = busy @ busy / 64
    there: list[torch.Tensor] = []
    for tensor in tensors:
        uploads.send(tensor, lambda arrived: there.append(arrived.clone()))
    assert 0 < len(there) < len(tensors), "what came first is used before the last is sent"
    uploads.finish()
    assert all(torch.equal(tensor, other.cpu()) for tensor, other in zip(tensors, there, strict=True))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sluice-upload")]


@pytest.mark.cuda
def test_what_was_sent_before_an_error_arrives() -> None:
    device = torch.device("cuda", 0)
    there = torch.zeros(4, device=device)
    with pytest.raises(KeyError), uploading(device, may_lock=True):
        upload(torch.ones(4), device, there.copy_)
        raise KeyError
    assert there.tolist() == [1] * 4


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_mode_may_be_another_when_it_arrives(device: torch.device) -> None:
    uploads = Uploads(device)
    places = []
    for inference in (True, False):
        with torch.inference_mode(inference):
            places.append(torch.zeros(5, device=device))
            uploads.send(torch.ones(5), places[-1].copy_)
    uploads.finish()
    assert all(place.tolist() == [1] * 5 for place in places)


def test_moves_are_shared_by_their_bytes() -> None:
    moves = [(0, 0, nbytes) for nbytes in (5, 1, 1, 1, 8, 4, 4)]
    assert [[n for *_, n in share] for share in module._shared(moves, 4)] == [[5, 1], [1, 1, 8], [4], [4]]
    assert module._shared([], 4) == [[]]


@pytest.mark.cuda
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_factors_that_were_uploaded_are_the_same(given: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    adapters = [
        Adapter(*(torch.randn(shape, generator=generator).to(given) for shape in ((rows, r), (r, 96))), scale, start)
        for rows, r, scale, start in ((64, 8, 1.0, 0), (64, 5, -0.7, 0), (32, 4, 1 / 3, 64), (64, 3, 1e-3, 0))
    ]
    device = torch.device("cuda", 0)
    expected, pageable = (Factors(adapters, where, torch.bfloat16) for where in (CPU, device))
    with uploading(torch.device("cuda"), may_lock=True):
        locked = Factors(adapters, device, torch.bfloat16)
    for found in (pageable, locked):
        assert found.a.device == device and torch.equal(found.a.cpu(), expected.a)
        assert len(found.parts) == len(expected.parts) == 2
        assert all(torch.equal(one.b.cpu(), other.b) for one, other in zip(found.parts, expected.parts, strict=True))
