"""Does streaming cost what physics says? Blocks of matmuls whose weights come through the ring, for every source.

    python benchmarks/stream_engine.py --work DIR [--gb 6.7] [--out results/stream_engine.json]

A file of random bytes, in the page cache, is streamed whole in every step, under matmuls sized so that R, the time of
the copies over that of the compute, is 0.7 and 1.4. Printed are the step's compute alone, its copies alone, both
together, and the last over the larger of the first two, which is 1 where nothing is lost. Needs an NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

pack = types.ModuleType("pack")
pack.__path__ = [str(Path(__file__).resolve().parents[1])]
sys.modules["pack"] = pack

from pack.offload.costs import BlockCost, Link  # noqa: E402
from pack.offload.device import CudaDevice  # noqa: E402
from pack.offload.files import Key, StoredFile, Weight  # noqa: E402
from pack.offload.plan import StreamPlan, make_plan  # noqa: E402
from pack.offload.source import choose  # noqa: E402
from pack.offload.streamer import BlockStreamer  # noqa: E402

BLOCKS, TENSORS = 57, 6
RATIOS = (0.7, 1.4)
REPEATS, STEPS = 3, 4
ROWS, WIDTH, STEP = 4608, 3072, 512  # a matmul of FLUX's shape, and how finely its width is chosen


@dataclass(frozen=True)
class Row:
    """One measurement. Times are medians, in milliseconds."""

    source: str
    ratio: float
    compute_ms: float
    copy_ms: float
    together_ms: float
    copy_gb_s: float
    times_max: float
    issue_ms: float  # what the computing thread spends on a whole step of the three verbs
    open_s: float
    anonymous_mb: int


def make_file(path: Path, nbytes: int) -> None:
    if path.exists() and path.stat().st_size == nbytes:
        return
    pattern = np.random.default_rng(0).integers(0, 256, 64 << 20, dtype=np.uint8)
    with open(path, "wb") as file:
        left = nbytes
        while left:
            left -= file.write(pattern[: min(left, len(pattern))].data)


def timed(step: Callable[[], None], repeats: int = REPEATS) -> float:
    """Milliseconds of one of several steps in a row, as in sampling; the median of some such rows."""
    step()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3 / STEPS)
    return median(times)


def issued(step: Callable[[], None]) -> float:
    """Milliseconds that the calling thread needs for one step."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    return (time.perf_counter() - began) * 1e3


def own_memory() -> int:
    """Anonymous and shared memory of this process, in bytes. Pages of mapped files are the system's."""
    status = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in status if line.startswith(("RssAnon:", "RssShmem:")))


def matmuls(milliseconds: float) -> Callable[[], None]:
    """A kernel, or a few, that take about as long."""
    a = torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(WIDTH, 16384, device="cuda", dtype=torch.bfloat16)

    def run(width: int) -> None:
        while width > 0:
            torch.mm(a, b[:, : min(width, b.shape[1])])
            width -= b.shape[1]

    width = 8 * STEP
    for _ in range(3):  # a matmul's time is nearly in proportion to its width
        now = timed(partial(repeat, partial(run, width)), 1) / BLOCKS
        width = max(STEP, round(width * milliseconds / now / STEP) * STEP)
    return partial(run, width)


def repeat(kernel: Callable[[], None]) -> None:
    for _ in range(BLOCKS):
        kernel()


Kernels = dict[float, Callable[[], None]]  # by R


def measure(kind: str, weights: dict[Key, Weight], plan: StreamPlan, kernels: Kernels) -> list[Row]:
    device = CudaDevice(torch.device("cuda"))
    before = own_memory()
    began = time.perf_counter()
    choice = choose(weights, device, kind=kind, ram_budget_bytes=32 << 30)
    opened = time.perf_counter() - began
    print(choice.reason, flush=True)
    anonymous = own_memory() - before
    streamer = BlockStreamer(plan, choice.source, device)

    def step(kernel: Callable[[], None] | None) -> None:
        for block in range(BLOCKS):
            streamer.wait(block)
            if kernel:
                kernel()
            streamer.release(block)

    copy = timed(partial(step, None))
    if not kernels:  # the first source, which is the fastest, sets the compute
        kernels |= {ratio: matmuls(copy / ratio / BLOCKS) for ratio in RATIOS}
    rows = []
    for ratio, kernel in kernels.items():
        compute, together, issue = [], [], []
        for _ in range(REPEATS):  # in turns: the clock of a GPU wanders
            compute.append(timed(partial(repeat, kernel), 1))
            together.append(timed(partial(step, kernel), 1))
            issue.append(issued(partial(step, None)))
        c, t = median(compute), median(together)
        gb_s = plan.streamed_bytes / copy / 1e6
        row = Row(choice.source.kind, ratio, c, copy, t, gb_s, t / max(c, copy), median(issue), opened, anonymous >> 20)
        print(
            f"{row.source:10} R {ratio}: compute {c:.1f} ms, copy {copy:.1f} ms ({gb_s:.1f} GB/s), together {t:.1f} ms "
            f"= {row.times_max:.3f} x max; verbs {row.issue_ms:.1f} ms, opened in {opened:.2f} s, "
            f"{row.anonymous_mb} MiB of its own",
            flush=True,
        )
        rows.append(row)
    streamer.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp"))
    parser.add_argument("--gb", type=float, default=6.7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("sources", nargs="*", default=["page_cache", "pinned", "disk"])
    arguments = parser.parse_args()

    size = int(arguments.gb * 1e9) // (BLOCKS * TENSORS)
    path = arguments.work / "stream_engine.bin"
    make_file(path, size * BLOCKS * TENSORS)
    file = StoredFile.of(path)
    block = (size,) * TENSORS
    plan = make_plan(
        [BlockCost(f"block {i}", block, 1e-3) for i in range(BLOCKS)], Link(55e9), 3 * sum(block), blocks_to_swap=BLOCKS
    )
    print(plan, flush=True)
    weights = {
        (copy.block, copy.tensor): Weight(copy.nbytes, file=file, offset=(copy.block * TENSORS + copy.tensor) * size)
        for copy in plan.copies
    }
    kernels: Kernels = {}
    rows = [row for kind in arguments.sources for row in measure(kind, weights, plan, kernels)]
    if arguments.out:
        facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "system": platform.system()}
        plan_text = str(plan)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(
            json.dumps({**facts, "plan": plan_text, "rows": [asdict(row) for row in rows]}, indent=1)
        )


if __name__ == "__main__":
    main()
