"""How long do weights take from the file's cache to the GPU, against one copy from pinned memory?

    python benchmarks/arrival.py --work DIR [--gb 6] [--out results/arrival.json]

A file of random bytes in the shapes of FLUX's blocks, in the page cache, is brought to the GPU by

    stretches     `offload.stretches`: locking, copying and unlocking beside each other (the pack's way), for some
                  lengths of a stretch and numbers of them that may be locked
    in turn       the same with one stretch at a time: lock it, copy it, unlock it
    all at once   lock the whole file, copy it, unlock it
    pageable      weight by weight out of the mapping, as the host moves a module

A B C D A B C D, each time into memory that the allocator has to ask the driver for, as after a model was unloaded.
Printed are GB/s and the time over that of the link. Needs an NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import json
import mmap
import platform
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

pack = types.ModuleType("pack")
pack.__path__ = [str(Path(__file__).resolve().parents[1])]
sys.modules["pack"] = pack

from pack.offload import stretches  # noqa: E402
from pack.offload.device import CudaDevice  # noqa: E402
from pack.offload.files import OpenFiles, StoredFile, Weight  # noqa: E402
from pack.offload.page_cache import RegisteredFile, used_spans  # noqa: E402

MIB = 1 << 20
WEIGHTS = tuple(int(3072 * 3072 * times * 34 / 32) for times in (6, 3, 3, 1, 4, 4, 7, 5))  # of Q8_0
STRETCHES = ((32, 16), (64, 12), (128, 8), (256, 6))  # MiB, and how many may be locked
ROUNDS = 3

Way = Callable[[dict[int, Weight], CudaDevice], object]


def make_file(path: Path, nbytes: int) -> None:
    if path.exists() and path.stat().st_size == nbytes:
        return
    part = np.random.default_rng(0).integers(0, 256, 64 * MIB, dtype=np.uint8).tobytes()
    with path.open("wb") as file:
        for start in range(0, nbytes, len(part)):
            file.write(part[: nbytes - start])


def weights_of(path: Path) -> dict[int, Weight]:
    stored, offset = StoredFile.of(path), 0
    weights: dict[int, Weight] = {}
    while offset + max(WEIGHTS) < stored.size:
        nbytes = WEIGHTS[len(weights) % len(WEIGHTS)]
        weights[len(weights)] = Weight(nbytes, file=stored, offset=offset)
        offset += -(-nbytes // 32) * 32
    return weights


def by_stretches(mib: int, locked: int, ahead: int, weights: dict[int, Weight], device: CudaDevice) -> object:
    stretches.STRETCH_BYTES, stretches.LOCKED, stretches.AHEAD = mib * MIB, locked, ahead
    there, refusal = stretches.copied(weights, device, lambda nbytes: None)
    assert not refusal and len(there) == len(weights), refusal
    return there


def all_at_once(weights: dict[int, Weight], device: CudaDevice) -> object:
    files = OpenFiles(weights.values())
    (file,) = files.all()
    mapped = RegisteredFile(file, device.registrar)
    mapped.register(used_spans(weights.values(), file.stored.size))
    there = {number: device.allocate(weight.nbytes) for number, weight in weights.items()}
    for number, weight in weights.items():
        for start, data in mapped.pieces(weight):
            there[number][start : start + data.nbytes].copy_(data, non_blocking=True)
    torch.cuda.synchronize()
    mapped.close()
    files.close()
    return there


def pageable(data: torch.Tensor, weights: dict[int, Weight], device: CudaDevice) -> object:
    return {
        number: data[weight.offset : weight.offset + weight.nbytes].to(device.torch_device)
        for number, weight in weights.items()
    }


def link_gb_s() -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target, times = torch.empty_like(source, device="cuda"), []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return source.nbytes / median(times) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the file")
    parser.add_argument("--gb", type=float, default=6)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "arrival.bin"
    make_file(path, int(args.gb * 1e9))
    weights, device, link = weights_of(path), CudaDevice(torch.device("cuda")), link_gb_s()
    total = sum(weight.nbytes for weight in weights.values())
    with path.open("rb") as file:
        data = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    ways: dict[str, Way] = {
        **{f"stretches {mib} MiB x {locked}": partial(by_stretches, mib, locked, 3) for mib, locked in STRETCHES},
        "in turn 128 MiB": partial(by_stretches, 128, 1, 1),
        "all at once": all_at_once,
        "pageable": partial(pageable, data),
    }
    checked = {number: data[weight.offset : weight.offset + weight.nbytes] for number, weight in weights.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
            start = time.perf_counter()
            there = way(weights, device)
            torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
            if not turn:
                for number in (0, 1, len(weights) - 1):
                    assert torch.equal(there[number].cpu(), checked[number]), name  # type: ignore[index]
            del there
    hardware = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {platform.machine()}"
    print(f"{hardware}; {total / 1e9:.2f} GB in {len(weights)} weights; the link copies {link:.1f} GB/s")
    rows = []
    for name, seconds in times.items():
        took = median(seconds[1:])  # the first maps the pages, and checks
        rows.append({"way": name, "seconds": took, "first": seconds[0], "gb_s": total / took / 1e9})
        print(
            f"{name:22} {took * 1e3:7.1f} ms  {rows[-1]['gb_s']:5.1f} GB/s  {link * took * 1e9 / total:5.2f} x the link"
        )
    if args.out:
        report = {"hardware": hardware, "command": " ".join(sys.argv), "link_gb_s": link, "bytes": total, "rows": rows}
        args.out.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
