"""Plain torch dequantises on any device: by tensor operations alone, and by none that Apple's GPUs lack.

The meta device has no numbers: whatever looks at one, or goes over the CPU or numpy, fails there. MPS has no float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pack.loaders.gguf.types import QUANTISED, GGMLType, byte_size
from pack.loaders.quant import reference
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
quantised = pytest.mark.parametrize("ggml_type", sorted(QUANTISED), ids=lambda t: t.name)


class Operations(TorchDispatchMode):
    """Keeps what every operation takes and makes."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.tensors += [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        return result


@pytest.fixture
def no_numpy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*args: object) -> None:
        raise AssertionError("numpy is on the way of every weight")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "from_numpy", refuse)
        patch.setattr(torch.Tensor, "numpy", refuse)
        yield


def tables_made(ggml_type: GGMLType) -> None:
    """What is computed once for a device is there."""
    reference.dequantize(torch.empty(byte_size((1, 256), ggml_type), dtype=torch.uint8, device=META), ggml_type, (256,))


@quantised
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_operation_stays_on_the_device(ggml_type: GGMLType, dtype: torch.dtype, request) -> None:
    tables_made(ggml_type)
    request.getfixturevalue("no_numpy")
    shape = (40, 512)
    data = torch.empty(byte_size(shape, ggml_type), dtype=torch.uint8, device=META)
    with Operations() as seen:
        reference.dequantize(data, ggml_type, shape, dtype)
        reference.dequantize_rows(data, ggml_type, 512, torch.empty(3, dtype=torch.int64, device=META), dtype)
    devices = {t.device for t in seen.tensors if t.dim()}
    assert len(seen.tensors) > 10 and devices == {META}
    assert not {t.dtype for t in seen.tensors} & {torch.float64, torch.complex128}


@quantised
def test_no_numpy_where_numbers_are(ggml_type: GGMLType, request) -> None:
    shape = (40, 512)
    data = torch.zeros(byte_size(shape, ggml_type), dtype=torch.uint8)
    first = reference.dequantize(data, ggml_type, shape)
    request.getfixturevalue("no_numpy")
    assert torch.equal(reference.dequantize(data, ggml_type, shape), first)
