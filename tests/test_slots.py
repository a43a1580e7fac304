"""A weight's places: home, over other bytes, and shared between a network and its twin."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from pack.loaders.gguf.types import GGMLType
from pack.loaders.quant.layout import quantized
from pack.offload.files import StoredFile
from pack.offload.slots import Slot, slots_of, twin


def nowhere(tensor: torch.Tensor) -> None:
    """No tensor lies in a file."""


def q8_0(rows: int = 4, columns: int = 64, seed: int = 0) -> QuantizedTensor:
    random = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (rows, columns // 32 * 34), dtype=torch.uint8, generator=random)
    blocks[:, 1::34] = 0x20  # the scale's high byte: small and finite
    return quantized(blocks, GGMLType.Q8_0, (rows, columns))


def parameter(value: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(value, requires_grad=False)


class Network(torch.nn.Module):
    """With a plain layer, a quantised one, one whose weight is the first's, a buffer and a tensor that is neither."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.nn.Linear(64, 8)
        self.quantised = torch.nn.Linear(64, 4, bias=False)
        self.quantised.weight = parameter(q8_0())
        self.tied = torch.nn.Linear(64, 8, bias=False)
        self.tied.weight = self.plain.weight
        self.register_buffer("buffer", torch.arange(3.0))
        self.plain.kept = torch.arange(5.0)  # type: ignore[assignment]
        self.settings = {"a": [1, 2]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(x) + self.tied(x)


def raw(slot: Slot) -> torch.Tensor:
    weight = slot.weight(nowhere)
    assert weight.data is not None and weight.nbytes == slot.nbytes
    return weight.data


def test_shared_weight_is_one_slot_with_all_its_owners() -> None:
    network = Network()
    slots = slots_of(network.modules())
    assert [len(slot.owners) for slot in slots] == [2, 1, 1]
    first = slots[0]
    assert {module for module, _ in first.owners} == {network.plain, network.tied}
    other = parameter(torch.zeros(8, 64))
    first.show(other)
    assert network.plain.weight is network.tied.weight is first.shown is other
    first.go_home()
    assert network.plain.weight is network.tied.weight is first.home


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_plain_weight_over_other_bytes_is_the_same_weight(dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(16, 3, bias=False)
    layer.weight = parameter(torch.randn(3, 16).to(dtype))
    (slot,) = slots_of([layer])
    elsewhere = raw(slot).clone()
    over = slot.over(elsewhere)
    assert over.dtype == dtype and over.shape == (3, 16) and not over.requires_grad
    assert over.data_ptr() == elsewhere.data_ptr() != slot.home.data_ptr()
    assert torch.equal(over.float(), slot.home.float())
    elsewhere.zero_()
    assert not over.float().any() and slot.home.float().any()


def test_quantised_weight_over_other_bytes_is_the_same_weight() -> None:
    layer = torch.nn.Linear(64, 4, bias=False)
    layer.weight = parameter(q8_0())
    (slot,) = slots_of([layer])
    assert slot.streams and slot.nbytes == 4 * 2 * 34
    elsewhere = raw(slot).clone()
    over = slot.over(elsewhere)
    assert isinstance(over, QuantizedTensor) and over._qdata.data_ptr() == elsewhere.data_ptr()
    assert torch.equal(over.dequantize(), slot.home.dequantize()) and over.dtype == slot.home.dtype


def test_what_streams() -> None:
    layer = torch.nn.Linear(16, 8)
    weight, bias = slots_of([layer])
    assert weight.streams
    assert not bias.streams, "a bias frees nothing"
    layer.weight = parameter(torch.randn(16, 8).t())
    assert not slots_of([layer])[0].streams, "its bytes would have to be gathered"
    layer.weight = parameter(torch.empty(8, 16, device="meta"))
    assert not slots_of([layer])[0].streams


def test_weight_in_a_file_is_named_by_it() -> None:
    layer = torch.nn.Linear(16, 8, bias=False)
    (slot,) = slots_of([layer])
    file = StoredFile(Path("model.gguf"), 10_000, 1)
    weight = slot.weight(lambda stored: (file, 512))
    assert (weight.file, weight.offset, weight.nbytes, weight.data) == (file, 512, 8 * 16 * 4, None)


def test_moved_is_a_copy_in_the_asked_type() -> None:
    layer = torch.nn.Linear(16, 8, bias=False)
    (slot,) = slots_of([layer])
    same, narrow = slot.moved(torch.device("cpu"), None), slot.moved(torch.device("cpu"), torch.bfloat16)
    assert same.data_ptr() != slot.home.data_ptr() and torch.equal(same, slot.home)
    assert narrow.dtype == torch.bfloat16 and torch.equal(narrow, slot.home.bfloat16())


def test_forgetting_reaches_every_layer() -> None:
    class Layer(torch.nn.Linear):
        forgotten = 0

        def forget_bound(self) -> None:
            self.forgotten += 1

    layer = Layer(4, 4)
    for slot in slots_of([layer, torch.nn.Linear(4, 4)]):
        slot.forget()
    assert layer.forgotten == 2


# --- the twin


def test_twin_shares_memory_and_not_modules() -> None:
    network = Network()
    other = twin(network)
    assert type(other) is Network and other is not network and other.plain is not network.plain
    mine, theirs = dict(network.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == theirs.keys()
    for name in mine:
        one, two = (getattr(p, "_qdata", p) for p in (mine[name], theirs[name]))
        assert one.data_ptr() == two.data_ptr() and mine[name].shape == theirs[name].shape
    assert other.plain.weight is other.tied.weight
    assert other.buffer is network.buffer and other.plain.kept is network.plain.kept
    x = torch.randn(2, 64)
    assert torch.equal(other(x), network(x))


def test_neither_sees_where_the_others_weights_are() -> None:
    network = Network()
    other = twin(network)
    slot = slots_of(other.modules())[0]
    slot.show(parameter(torch.zeros(8, 64)))
    assert network.plain.weight.any()
    slot.go_home()
    other.plain.register_forward_hook(lambda *args: None)
    other.plain.added = 1  # type: ignore[assignment]
    assert not network.plain._forward_hooks and not hasattr(network.plain, "added")


def test_moving_one_leaves_the_others_homes() -> None:
    """`Module.to` writes to the parameter objects. Another type stands for another device."""
    network = Network()
    other = twin(network)
    slots = slots_of(other.modules())
    before = [raw(slot).clone() for slot in slots]
    network.plain.to(torch.float64)
    assert network.plain.weight.dtype == torch.float64
    assert [slot.home.dtype for slot in slots] == [torch.float32] * 3
    assert all(torch.equal(raw(slot), bytes_before) for slot, bytes_before in zip(slots, before, strict=True))
    slots[0].show(slots[0].home)
    other.plain.to(torch.float16)
    assert network.plain.weight.dtype == torch.float64


def test_twin_without_what_the_device_holds() -> None:
    network = Network()
    pages = object()
    network.plain._pages = pages  # type: ignore[assignment]
    network.settings = {"pages": pages}  # type: ignore[dict-item]
    other = twin(network, [pages])
    assert other.plain._pages is None and network.plain._pages is pages


def test_twin_does_not_keep_the_model_alive() -> None:
    network = Network()
    other = twin(network)
    gone = weakref.ref(network.plain)
    gc.disable()
    try:
        del network
        assert gone() is None
    finally:
        gc.enable()
    assert other(torch.randn(1, 64)).shape == (1, 8)
