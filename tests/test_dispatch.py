"""Which implementation serves a device, decided once, with a reason that says what to do."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from pack.loaders.gguf.types import GGMLType
from pack.loaders.quant import dispatch

SHAPE = (6, 512)


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_chosen", "_failures", "_too_large"):
        monkeypatch.setattr(dispatch, name, {})


@pytest.mark.parametrize("kind", ["cpu", "mps", "some_npu"])
def test_devices_without_triton_have_torch_and_say_so(kind: str, undecided: None) -> None:
    assert dispatch.few_elements(kind, GGMLType.Q4_K, SHAPE) == -1
    assert not dispatch.adds_products(kind, GGMLType.Q4_K, SHAPE, torch.bfloat16, 16)
    assert dispatch.choices() == {kind: f"torch: there are no kernels for {kind}"}


@pytest.mark.parametrize("kind", sorted(dispatch.TRITON_DEVICES), ids=lambda kind: f"on_{kind}")  # not as the marker
def test_without_triton_the_reason_says_what_to_install(
    kind: str, undecided: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else found(name, *a))
    assert dispatch.few_elements(kind, GGMLType.Q4_K, SHAPE) == -1
    assert "pip install triton-windows" in dispatch.choices()[kind]


def test_a_triton_that_cannot_be_imported_is_told_and_not_tried_again(
    undecided: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sluice.quant")
    kernels = f"{dispatch.__package__}.kernels"
    for name in [name for name in sys.modules if name == kernels or name.startswith(f"{kernels}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # as if its import failed
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: object())
    for _ in range(3):
        assert dispatch.few_elements("cuda", GGMLType.Q8_0, SHAPE) == -1
    assert "Triton does not work here" in dispatch.choices()["cuda"]
    assert "triton" in dispatch.choices()["cuda"].partition("(")[2], "why is missing"
    assert len(caplog.records) == 1
