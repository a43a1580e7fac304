"""What takes the dequantisation of Q8_0 out of a FLUX step: other loads and stores, or doing it where SMs are idle?

    python benchmarks/dequantise_ahead.py --out dequantise_ahead.json     (CUDA, Triton; no ComfyUI; 16 GB of VRAM)
    python benchmarks/dequantise_ahead.py --small                         (checks alone; also without a GPU)

A chain of blocks with FLUX.1-dev's widths, order and work between the products, without its modulation layers, runs in
many ways that take turns. All ways of one group multiply by the same values, because how fast an H200 multiplies
can depend on them (at its power limit): `normal`, whose bf16 weights are what their Q8_0 bytes stand for, and
`random q8_0`, `random q4_k`, the files that flux_step.py makes, beside `unquantised`, what it multiplies for bf16.

    present     what the layers do: a new tensor for each dense weight, on the stream of the product
    scratch     into one of two kept buffers, by a copy of the kernel, with other cache hints, order, grid, or with
                programmatic dependent launch (the launch overlaps the end of the kernel before)
    ahead       into the other buffer, on a second stream. A weight is released together with a product or with
                attention, but after it: the GPU hands out the blocks of kernels in the order in which they arrive, so
                the dequantisation takes the SMs that the last wave of the other leaves idle
                (how many it leaves depends on the number of tokens: --text)

On a GPU, every way's dense weights and the result of a pass are compared with those of the present way, as bits, before
and after the timing. Without one, the kernels run in Triton's interpreter, and what another stream does is done once as
early and once as late as its events allow.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import triton

ROOT = Path(__file__).resolve().parents[1]
package = types.ModuleType("pack")  # the checkout as a package, without its __init__, which needs ComfyUI
package.__path__ = [str(ROOT)]
sys.modules["pack"] = package

from _dense_ahead import Ahead, Early, Late, Present, Release, Scratch, SideStream  # noqa: E402
from _flux_chain import DEVICE, Chain, Dense, Size, Weights, groups  # noqa: E402
from _q8_0_forms import CUDA, Form  # noqa: E402

SMALL = Size(width=64, head=32, image=24, text=8, doubles=1, singles=2)


FORMS = {
    "scratch": Form(),
    "scratch, stores evict_last": Form(store="evict_last"),
    "scratch, stores evict_first": Form(store="evict_first"),
    "scratch, loads evict_first": Form(load="evict_first"),
    "scratch, loads evict_first, stores evict_last": Form(load="evict_first", store="evict_last"),
    "scratch, backwards": Form(backwards=True),
    "scratch, backwards, loads evict_first": Form(backwards=True, load="evict_first"),
    "scratch, 128 lanes of 4 warps": Form(cut=(128, 4)),
    "scratch, 8 resident programs": Form(cut=(512, 4), resident=8),
    "scratch, dependent launch": Form(overlap=True),
}
BY_ATTENTION = Release(attention=2)
# Name: form, release, priority of the second stream, cycles of delay, all else on a stream of higher priority.
AHEADS: dict[str, tuple[Form, Release, int, int, bool]] = {
    "ahead by products": (Form(), Release(), 0, 0, False),
    "ahead by products, of high priority": (Form(), Release(), -1, 0, False),
    "ahead by products, 10 us later": (Form(), Release(), 0, 17000, False),
    "ahead by products, of low priority": (Form(), Release(), 0, 0, True),
    "ahead by products and 1 by attention": (Form(), Release(attention=1), 0, 0, False),
    "ahead by products and 2 by attention": (Form(), BY_ATTENTION, 0, 0, False),
    "ahead by 2 by attention alone": (Form(), Release(product=False, attention=2), 0, 0, False),
    "ahead by products and 2 by attention, 10 us later": (Form(), BY_ATTENTION, 0, 17000, False),
    "ahead by products and 2 by attention, of low priority": (Form(), BY_ATTENTION, 0, 0, True),
    "ahead by products and 2 by attention, resident": (Form(cut=(512, 4), resident=2), BY_ATTENTION, 0, 0, False),
    # A product's 384 threads of 168 registers leave a multiprocessor room for one warp of 32.
    "ahead by products, warps of 32 registers": (Form(cut=(32, 1), registers=32), Release(), 0, 0, False),
}


@dataclass
class Case:
    group: str
    way: Dense
    turns: list[float] = field(default_factory=list)  # ms of a pass
    clocks: list[tuple[int, int]] = field(default_factory=list)  # MHz, W


def cases(found: dict[str, Weights], sides: dict[str, Any], wanted: Callable[[str], bool]) -> dict[str, Case]:
    """The ways that are wanted, by name; a group's bf16 and present way always are. One that does not compile is told
    of and left out: a GPU is not always to be had a second time."""
    made = {}
    for group, weights in found.items():
        ways: dict[str, Callable[[], Dense]] = {f"{group}: bf16": partial(Dense, weights)}
        if weights.kind is not None:
            ways[f"{group}: present"] = partial(Present, weights)
        if group == "normal":
            ways[f"{group}: bf16 once more"] = partial(Dense, weights)
            ways |= ways_of_mine(weights, sides)
        for name, make in ways.items():
            if not (wanted(name) or name.endswith((": bf16", ": present"))):
                continue
            try:
                made[name] = Case(group, make())
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
    return made


def ways_of_mine(weights: Weights, sides: dict[str, Any]) -> dict[str, Callable[[], Dense]]:
    largest = [max(w.numel() for w in weights.dense[first::2]) for first in range(2)]
    buffers = [torch.empty(n, dtype=torch.bfloat16, device=DEVICE) for n in largest]
    ways: dict[str, Callable[[], Dense]] = {
        name: partial(Scratch, weights, form, buffers) for name, form in FORMS.items()
    }
    tried = set()
    for name, (form, release, priority, delay, under) in AHEADS.items():
        if not CUDA and (form, release) in tried:  # what else there is, is streams
            continue
        tried.add((form, release))
        for when, side in sides.items():
            ways[name + when] = partial(Ahead, weights, form, buffers, release, side(priority, delay), under)
    return ways


@contextlib.contextmanager
def on_stream(way: Dense) -> Iterator[None]:
    """On the way's stream, which begins and ends with the others."""
    if CUDA:
        torch.cuda.synchronize()
    with way.stream():
        yield
    if CUDA:
        torch.cuda.synchronize()


def drop_wrong(chain: Chain, made: dict[str, Case]) -> bool:
    """Whether ways were taken out of `made`, because their dense weights or results are not their group's, as bits."""
    expected, before = dict[str, torch.Tensor](), len(made)
    for name, case in list(made.items()):
        wrong, way = [], case.way
        with on_stream(way), torch.inference_mode():
            wrong += [
                f"weight {i}" for i, dense in enumerate(way.weights.dense) if not torch.equal(way.weight(i), dense)
            ]
            for n in range(2 + isinstance(way, Ahead) * CUDA):
                if isinstance(way, Scratch):
                    for out in way.out:
                        out.fill_(float("nan"))
                if CUDA:
                    torch.cuda.synchronize()
                result = chain.run(way)
                if not torch.equal(result, right := expected.setdefault(case.group, result)):
                    wrong.append(f"pass {n} by {float((result - right).norm() / right.norm()):.1e}")
        if not result.isfinite().all() or (isinstance(way, Ahead) and not any(way.plan.values())):
            wrong.append("nothing to see")
        if wrong:
            print(f"{name}: WRONG, left out: {', '.join(wrong)}", flush=True)
            del made[name]
    print(f"{len(made)} of {before} ways give the dense weights and the result of their group, bit for bit", flush=True)
    return len(made) < before


def turn(chain: Chain, case: Case, passes: int) -> None:
    with on_stream(case.way):
        events = []
        for n in range(passes + 2):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            chain.run(case.way)
            stop.record()
            events += [(start, stop)] if n > 1 else []
        with contextlib.suppress(Exception):  # neither is known without NVML and its package
            case.clocks.append((torch.cuda.clock_rate(), torch.cuda.power_draw() // 1000))  # the GPU is still at it
    case.turns.append(statistics.median(start.elapsed_time(stop) for start, stop in events))


def table(made: dict[str, Case], whole: float) -> Iterator[str]:
    yield f"{'':62}  ms of a pass  (by turn)          x bf16  - present, whole step     MHz    W"
    for name, case in made.items():
        bf16 = made[f"{case.group}: bf16"].turns
        present = made.get(f"{case.group}: present", made[f"{case.group}: bf16"]).turns
        ratio = statistics.median(a / b for a, b in zip(case.turns, bf16, strict=True))
        less = statistics.median(a - b for a, b in zip(case.turns, present, strict=True)) * whole
        clocks = [f"{statistics.median(values):6.0f}" for values in zip(*case.clocks, strict=True)]
        yield (
            f"{name:62}  {statistics.median(case.turns):8.3f}  ({min(case.turns):8.3f} to {max(case.turns):8.3f})  "
            f"{ratio:6.4f}  {less:+8.2f} ms  " + "  ".join(clocks)
        )


def kernels(chain: Chain, case: Case) -> list[dict[str, Any]]:
    """What a pass starts, by name and shape, the longest first: what room it leaves on a multiprocessor."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler, on_stream(case.way):
        chain.run(case.way)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    rows: dict[str, dict[str, Any]] = {}
    for event in (e for e in events if e.get("cat") == "kernel"):
        facts = {key: event["args"].get(key) for key in ("grid", "block", "registers per thread", "shared memory")}
        row = rows.setdefault(event["name"] + str(facts), {"name": event["name"], **facts, "us": []})
        row["us"].append(event["dur"])
    return sorted(rows.values(), key=lambda row: -sum(row["us"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="check small weights and stop; needs no GPU")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=6, help="timed ones of a turn")
    parser.add_argument("--text", type=int, default=256, help="tokens of the prompt, flux_step.py's by default")
    parser.add_argument(
        "--only", default="", help="words; ways whose names hold none are left out, bf16 and present never"
    )
    parser.add_argument("--kernels", action="store_true", help="also list the kernels of a pass, by torch's profiler")
    args = parser.parse_args()
    if not (args.small or CUDA):
        parser.error("timing needs a CUDA GPU; without one: --small")
    torch.manual_seed(0)
    size = SMALL if args.small else Size(width=3072, head=128, image=4096, text=args.text, doubles=3, singles=6)
    chain, found = Chain(size), dict(groups(size))
    sides = {"": SideStream} if CUDA else {", early": lambda *_: Early(), ", late": lambda *_: Late()}
    made = cases(found, sides, lambda name: not args.only or any(word in name for word in args.only.split()))
    chain.run(next(iter(made.values())).way)  # torch chooses the program of a process's first attention differently
    failed = drop_wrong(chain, made)
    if args.small:
        raise SystemExit(failed)
    for n in range(args.rounds):
        for case in list(made.values())[:: 1 if n % 2 == 0 else -1]:
            turn(chain, case, args.passes)
    whole = 19 / size.doubles
    print(*table(made, whole), sep="\n", flush=True)
    report: dict[str, Any] = {
        "hardware": f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}",
        "command": " ".join(sys.argv),
        "passes_of_a_step": whole,
        "ms": {name: case.turns for name, case in made.items()},
        "mhz_watt": {name: case.clocks for name, case in made.items()},
    }
    if args.out:
        args.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    failed |= drop_wrong(chain, made)
    for name in ("normal: bf16", "normal: present") if args.kernels else ():
        rows = report[f"kernels of {name}"] = kernels(chain, made[name])
        print(f"{name}: {sum(sum(row['us']) for row in rows) / 1e3:.3f} ms of kernels in a pass")
        for row in rows[:14]:
            print(f"  {sum(row['us']):8.0f} us", len(row["us"]), *list(row.values())[1:-1], row["name"][:80])
    if args.out:
        args.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
