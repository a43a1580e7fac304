"""What Block Swap costs the thread that runs the network, for each block and each copy, where nothing else binds.

    python benchmarks/block_cost.py [--out results/block_cost.json]

At few tokens a step takes as long as Python needs to enqueue it, and then so does streaming. Blocks that do nothing are
run without Block Swap and with it, with one tensor that streams in each of them and with six; the difference is what a
block and its copies cost: hooks, events, weights shown and taken away. `measured` are the first passes of a run, in
which blocks are timed. On a GPU if there is one, else on the CPU, where a copy is made at once.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch

pack = types.ModuleType("pack")
pack.__path__ = [str(Path(__file__).resolve().parents[1])]
sys.modules["pack"] = pack

from pack.offload.block_times import PASSES  # noqa: E402
from pack.offload.blocks import Block  # noqa: E402
from pack.offload.costs import SwapRequest  # noqa: E402
from pack.offload.residency import Residency, Terms  # noqa: E402

BLOCKS, WIDTH = 86, 32  # as many blocks as SDXL has; tensors so small that their bytes cost nothing on a link
FEW, MANY = 1, 6  # tensors of a block; more would fill the queue of the device, and the host wait for it
ROUNDS = 100
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Idle(torch.nn.Module):
    """A block with weights and nothing to compute."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        for number in range(tensors):
            weight = torch.zeros(WIDTH, WIDTH, dtype=torch.float16)
            self.register_parameter(f"weight{number}", torch.nn.Parameter(weight, requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def terms() -> Terms:
    plenty = 1 << 34
    return Terms(
        budget_bytes=plenty,
        most_bytes=plenty,
        pinned_budget_bytes=plenty,
        may_pin=True,
        located=lambda tensor: None,
        dtype_of=lambda module, name: None,
        account_pinned=lambda nbytes: None,
        patched_by_host=lambda slot: False,
    )


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def fastest(step: Callable[[], None], prepare: Callable[[], None] = lambda: None, steps: int = 1) -> float:
    """Microseconds of the calling thread for a block."""
    best = float("inf")
    for _ in range(ROUNDS):
        prepare()
        wait()
        began = time.perf_counter()
        for _ in range(steps):
            step()
        best = min(best, (time.perf_counter() - began) / steps)
    wait()
    return best * 1e6 / BLOCKS


def measure(tensors: int) -> dict[str, float]:
    blocks = torch.nn.ModuleList(Idle(tensors) for _ in range(BLOCKS))
    x = torch.zeros(1, device=DEVICE)

    def step() -> None:
        for block in blocks:
            block(x)

    bare = fastest(step)
    residency = Residency(
        [Block(str(number), block) for number, block in enumerate(blocks)], SwapRequest(blocks_to_swap=BLOCKS)
    )
    residency.arrange(blocks, DEVICE, terms())
    assert len(residency.plan.copies) == BLOCKS * tensors, "not everything streams"
    residency.follow(residency)

    def run() -> None:  # another one begins
        residency.times.begin()
        wait()

    timed = fastest(step, run, PASSES)
    for _ in range(PASSES + 1):
        step()
        wait()
    streaming = fastest(step)
    residency.unfollow()
    residency.leave()
    return {"bare": bare, "streaming": streaming - bare, "measured": timed - bare}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with torch.inference_mode():
        few, many = measure(FEW), measure(MANY)
    place = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU ({platform.machine()})"
    print(
        f"{place}, torch {torch.__version__}: {few['streaming']:.1f} us for a block with {FEW} copy, "
        f"{many['streaming']:.1f} us with {MANY}; where blocks are timed {few['measured']:.1f} and "
        f"{many['measured']:.1f}; a module's own call takes {few['bare']:.1f}"
    )
    if arguments.out:
        facts = {"device": place, "torch": torch.__version__, "microseconds": {FEW: few, MANY: many}}
        arguments.out.write_text(json.dumps(facts, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
