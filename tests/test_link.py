"""The measurement of the link to a device, which comes in the middle of other work."""

from __future__ import annotations

import pytest
import torch
from fake_device import POLICIES, FakeDevice
from pack.offload import link


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_that_kernels_still_use_is_not_written_over(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "PROBE_BYTES", 1 << 16)
    device = FakeDevice(policy, seed=3)
    block = torch.full((link.PROBE_BYTES,), 7, dtype=torch.uint8)
    read: list[int] = []
    device.compute(lambda: read.append(int(block.max())))
    # Freed in Python and handed out again at once, as a caching allocator does on one stream.
    monkeypatch.setattr(device, "allocate", lambda nbytes: block)
    assert link._rate(device) > 0
    device.finish()
    assert read == [7] and not block.any()
