"""Tensors that go to a GPU through a little locked memory, and what becomes of them there."""

from __future__ import annotations

import pytest
import torch
from pack.loaders.low_rank import Adapter, Factors
from pack.loaders.uploads import Uploads, uploaded, uploading

CPU = torch.device("cpu")


def test_on_a_cpu_nothing_is_copied() -> None:
    tensor = torch.rand(3, 4)
    with uploading(CPU, may_lock=True):
        assert uploaded(tensor, CPU) is tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float32])
def test_scale_is_multiplied_in_float32_and_rounded_once(dtype: torch.dtype, given: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(64, 8, generator=generator).to(given)
    down = torch.randn(8, 32, generator=generator).to(given)
    for scale in (1.0, -0.7, 1 / 3, 1e-3):
        (part,) = Factors([Adapter(up, down, scale)], CPU, dtype).parts
        assert torch.equal(part.b, (up.float() * scale).to(dtype)), scale


@pytest.mark.cuda
def test_every_tensor_arrives_while_the_gpu_is_behind() -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = [(), (0, 3), (7,), (13, 5), (64, 64), (100, 100), (300, 301)]  # the last are larger than a half
    tensors = [torch.randn(shape, generator=generator) for shape in shapes * 40]
    tensors += [tensor.to(torch.bfloat16).t() for tensor in tensors]
    uploads = Uploads(torch.device("cuda", 0), half_bytes=1 << 15)
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        busy = busy @ busy / 64
    there = [torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda") for tensor in tensors]
    for to, tensor in zip(there, tensors, strict=True):
        uploads.fill(to, tensor)
    del uploads
    assert all(torch.equal(tensor, other.cpu()) for tensor, other in zip(tensors, there, strict=True))


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
