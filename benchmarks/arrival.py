"""How long do weights take from the file's cache to the GPU, against one copy from pinned memory?

    python benchmarks/arrival.py --work DIR [--gb 6] [--out results/arrival.json]

A file of random bytes in the shapes of FLUX's blocks, in the page cache, is brought to the GPU by

    stretches     `offload.stretches`: locking, copying and unlocking beside each other (the pack's way), for some
                  lengths of a stretch, numbers of them that may be locked, and threads that lock
    unlocked last the same, with everything unlocked after the last copy
    populated     the same, with the kernel asked to map the pages before they are locked, by four threads
    all at once   lock the whole file, copy it, unlock it
    kept          what was locked before stays so: allocate, and copy
    ring          read into a ring of pinned memory, and copied out of it (`_arrival_ring`)
    pageable      weight by weight out of the mapping, as the host moves a module

A B C D A B C D, each time into memory that the allocator has to ask the driver for, as after a model was unloaded.
Printed are GB/s and the time over that of the link; before that the parts alone (`_arrival_parts`). Needs an NVIDIA
GPU; `--small` takes a small file and a CPU that only notes what is locked, to try the script.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

pack = types.ModuleType("pack")
pack.__path__ = [str(Path(__file__).resolve().parents[1])]
sys.modules["pack"] = pack

from _arrival_parts import Parts, populate  # noqa: E402
from _arrival_ring import Ring  # noqa: E402
from pack.offload import stretches  # noqa: E402
from pack.offload.device import CudaDevice, Device, Event, HostDevice  # noqa: E402
from pack.offload.files import OpenFiles, StoredFile, Weight  # noqa: E402
from pack.offload.page_cache import RegisteredFile, used_spans  # noqa: E402

MIB = 1 << 20
WEIGHTS = tuple(int(3072 * 3072 * times * 34 / 32) for times in (6, 3, 3, 1, 4, 4, 7, 5))  # of Q8_0
ROUNDS = 2  # after one that checks

Way = Callable[[dict[int, Weight], Device], object]


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


class UnlockedLast(stretches.Crossing):
    def _unlock(self, stretch: stretches.Stretch, done: Event, complete: int) -> int:
        self._device.synchronize(done)
        return complete


class PopulatedUnlockedLast(UnlockedLast):
    def _lock(self, stretch: stretches.Stretch) -> str:
        populate(self._mapped[stretch.file], (stretch.start, stretch.stop))
        return super()._lock(stretch)


@dataclass(frozen=True)
class Dials:
    mib: int = 128
    locked: int = 8
    ahead: int = 3
    lockers: int = 1
    crossing: type[stretches.Crossing] = stretches.Crossing

    def __str__(self) -> str:
        kinds = {UnlockedLast: ", unlocked last", PopulatedUnlockedLast: ", populated, unlocked last"}
        said = kinds.get(self.crossing, "")
        return f"stretches {self.mib} MiB x {self.locked}, {self.lockers} threads{said}"

    def __call__(self, weights: dict[int, Weight], device: Device) -> object:
        stretches.STRETCH_BYTES, stretches.LOCKED, stretches.AHEAD = self.mib * MIB, self.locked, self.ahead
        stretches.LOCKERS, usual = self.lockers, stretches.Crossing
        stretches.Crossing = self.crossing  # type: ignore[misc]
        try:
            there, refusal = stretches.copied(weights, device, lambda nbytes: None)
        finally:
            stretches.Crossing = usual  # type: ignore[misc]
        assert not refusal and len(there) == len(weights), refusal
        return there


NO_LIMIT = 1 << 20
WAYS = (
    Dials(),
    Dials(128, NO_LIMIT, crossing=UnlockedLast),
    Dials(128, NO_LIMIT, 8, 4, crossing=PopulatedUnlockedLast),
    *(Ring(8, 32, threads) for threads in (2, 4)),
    *(Ring(mib, places, 8, keep) for mib, places in ((2, 64), (4, 32), (8, 32), (32, 16)) for keep in (False, True)),
    Ring(4, 32, 12, True),
)


def mapping_of(weights: dict[int, Weight], device: Device) -> RegisteredFile:
    files = OpenFiles(weights.values())
    (file,) = files.all()
    mapped = RegisteredFile(file, device.registrar)
    mapped.register(used_spans(weights.values(), file.stored.size))
    files.close()
    return mapped


def copied(mapped: RegisteredFile, weights: dict[int, Weight], device: Device) -> object:
    there = {}
    for number, weight in weights.items():
        there[number] = device.allocate(weight.nbytes)
        for start, data in mapped.pieces(weight):
            there[number][start : start + data.nbytes].copy_(data, non_blocking=True)
            del data  # the mapping could not be closed
    synchronize()
    return there


def all_at_once(weights: dict[int, Weight], device: Device) -> object:
    mapped = mapping_of(weights, device)
    there = copied(mapped, weights, device)
    mapped.close()
    return there


class Kept:
    """Locked at its first turn."""

    def __init__(self) -> None:
        self.mapped: RegisteredFile | None = None

    def __call__(self, weights: dict[int, Weight], device: Device) -> object:
        self.mapped = self.mapped or mapping_of(weights, device)
        return copied(self.mapped, weights, device)


def pageable(data: torch.Tensor, weights: dict[int, Weight], device: Device) -> object:
    return {
        number: data[weight.offset : weight.offset + weight.nbytes].to(device.torch_device, copy=True)
        for number, weight in weights.items()
    }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_busy(seconds: float) -> None:
    if torch.cuda.is_available():
        torch.cuda._sleep(int(seconds * 1.8e9))  # ticks of a clock of about so many


def link_gb_s() -> float:
    if not torch.cuda.is_available():
        return float("nan")
    source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target, times = torch.empty_like(source, device="cuda"), []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        synchronize()
        times.append(time.perf_counter() - start)
    return source.nbytes / median(times) / 1e9


class Notes:
    """A registrar that locks nothing."""

    def read_only_refusal(self) -> str | None:
        return None

    def register(self, address: int, nbytes: int, *, read_only: bool = False) -> None: ...

    def unregister(self, address: int) -> None: ...


def the_device(small: bool) -> Device:
    if not small:
        return CudaDevice(torch.device("cuda"))
    device = HostDevice(torch.device("cpu"))
    device.registrar = Notes()
    return device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the file")
    parser.add_argument("--gb", type=float, default=6)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "arrival.bin"
    make_file(path, int((0.5 if args.small else args.gb) * 1e9))
    weights, device, link = weights_of(path), the_device(args.small), link_gb_s()
    total = sum(weight.nbytes for weight in weights.values())
    hardware = (
        f"{'CPU' if args.small else torch.cuda.get_device_name()}, torch {torch.__version__}, {platform.machine()}"
    )
    print(f"{hardware}; {total / 1e9:.2f} GB in {len(weights)} weights; the link copies {link:.1f} GB/s", flush=True)
    parts = Parts(weights, device, synchronize, empty_cache, keep_busy).rows()
    for name, took in parts.items():
        print(f"{name:58} {took * 1e3:7.1f} ms", flush=True)

    with path.open("rb") as file:
        data = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    ways: dict[str, Way] = {
        **{str(way): way for way in WAYS},
        "all at once": all_at_once,
        "kept": Kept(),
        "pageable": partial(pageable, data),
    }
    checked = {number: data[weight.offset : weight.offset + weight.nbytes] for number, weight in weights.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            empty_cache()
            synchronize()
            start = time.perf_counter()
            there = way(weights, device)
            synchronize()
            times[name].append(time.perf_counter() - start)
            if not turn:
                for number in (0, 1, len(weights) - 1):
                    assert torch.equal(there[number].cpu(), checked[number]), name  # type: ignore[index]
            del there
    rows = []
    for name, seconds in times.items():
        took = median(seconds[1:])  # the first maps the pages, and checks
        rows.append({"way": name, "seconds": took, "first": seconds[0], "gb_s": total / took / 1e9})
        rate = total / took / 1e9
        print(f"{name:58} {took * 1e3:7.1f} ms  {rate:5.1f} GB/s  {link / rate:5.2f} x the link", flush=True)
    if args.out:
        report = {"hardware": hardware, "command": " ".join(sys.argv), "link_gb_s": link, "bytes": total}
        args.out.write_text(json.dumps({**report, "rows": rows, "parts": parts}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
