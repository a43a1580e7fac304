"""Bytes in words: the unit suits, nothing is rounded to nothing, and what a user types is enough."""

from __future__ import annotations

import pytest
from pack.loaders.sizes import ALIGN, aligned, gb_up, size
from pack.offload.costs import BlockCost, Link
from pack.offload.plan import BudgetTooSmallError, make_plan


@pytest.mark.parametrize(
    ("nbytes", "said"),
    [
        *((0, "0 bytes"), (1, "1 byte"), (512, "512 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (4096, "4.1 kB")),
        *((999_949, "999.9 kB"), (999_999, "1.0 MB"), (6_962_208, "7.0 MB"), (999_990_000, "1.00 GB")),
        *((12_700_000_000, "12.70 GB"), (0.5, "0 bytes"), (-3e9, "-3.00 GB")),
    ],
)
def test_size(nbytes: float, said: str) -> None:
    assert size(nbytes) == said


@pytest.mark.parametrize(("nbytes", "to", "multiple"), [(0, 256, 0), (1, 256, 256), (512, 256, 512), (33, 32, 64)])
def test_aligned(nbytes: int, to: int, multiple: int) -> None:
    assert aligned(nbytes, to) == multiple
    assert aligned(ALIGN - 1) == aligned(ALIGN) == ALIGN


@pytest.mark.parametrize(
    ("nbytes", "said"),
    [(1, "0.001 GB"), (4_000_001, "0.005 GB"), (999_000_001, "1.000 GB"), (6_241_000_000, "6.25 GB")],
)
def test_what_a_user_types_is_enough(nbytes: int, said: str) -> None:
    assert gb_up(nbytes) == said
    assert float(said.split()[0]) * 1e9 >= nbytes


def test_plans_of_tiny_models_are_told_in_their_unit() -> None:
    blocks = [BlockCost(f"blocks.{n}", (300_000, 300_000), 0.001, small_bytes=1) for n in range(4)]
    told = str(make_plan(blocks, Link(1e9), 1_700_000))
    assert "0.00" not in told and " of 1.7 MB VRAM" in told
    with pytest.raises(BudgetTooSmallError, match=r"may take 40\.0 kB of VRAM, but need 1\.2 MB .*to 0\.002 GB"):
        make_plan(blocks, Link(1e9), 40_000)
