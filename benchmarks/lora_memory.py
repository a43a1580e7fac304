"""What reading a LoRA costs the host: peak anonymous memory beside the adapter's size in 16 bits, and time.

    python benchmarks/lora_memory.py --out results/lora_memory.json [--rank 64]

An adapter in the shapes of FLUX.1-dev (every matrix of its blocks) is written in float32, in bfloat16 and as a GGUF in
float32 to a temporary folder. Each reader runs in a process of its own that has imported torch before: ours, and what
ComfyUI's own LoRA node does (safetensors' `load_file`, which keeps the file's type). The peak is that of anonymous
memory (`RssAnon`, seen every 2 ms) beyond what the process had before.

The bound is 1.2 x the adapter in bfloat16 plus its largest tensor in the file; the script fails where ours is above.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = 3072
DOUBLE = ((3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (4 * HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN), (6 * HIDDEN, HIDDEN))
SINGLE = ((7 * HIDDEN, HIDDEN), (HIDDEN, 5 * HIDDEN), (3 * HIDDEN, HIDDEN))
READERS = ("ours", "load_file")


def shapes(blocks: float) -> dict[str, tuple[int, int]]:
    """The matrices of FLUX.1-dev's blocks, or of a part of them."""
    found = {f"double_{i}_{j}": s for i in range(int(19 * blocks) * 2) for j, s in enumerate(DOUBLE)}
    return found | {f"single_{i}_{j}": s for i in range(int(38 * blocks)) for j, s in enumerate(SINGLE)}


def write(folder: Path, rank: int, blocks: float) -> dict[str, Path]:
    tensors = {}
    for name, (rows, columns) in shapes(blocks).items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, columns)
        tensors[f"{name}.lora_up.weight"] = torch.randn(rows, rank)
    paths = {kind: folder / f"{kind}.{kind.split()[-1]}" for kind in ("float32 safetensors", "bfloat16 safetensors")}
    save_file(tensors, paths["float32 safetensors"])
    save_file({k: t.bfloat16() for k, t in tensors.items()}, paths["bfloat16 safetensors"])
    paths["float32 gguf"] = folder / "float32.gguf"
    writer = gguf.GGUFWriter(paths["float32 gguf"], "flux")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths["one Q8_0 difference gguf"] = folder / "q8_0.gguf"
    writer = gguf.GGUFWriter(paths["one Q8_0 difference gguf"], "flux")
    numbers = np.random.default_rng(0).standard_normal((10752, 3072), dtype=np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("single_0_0.diff", gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return paths


def anonymous() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return 1024 * int(fields["RssAnon"].split()[0])


def measure(reader: str, path: Path) -> dict[str, Any]:
    """Read the file once while a thread watches. Runs in a process of its own."""
    package = types.ModuleType("pack")
    package.__path__ = [str(ROOT)]
    sys.modules["pack"] = package
    from pack.loaders.gguf.reader import GGUFFile
    from pack.lora.read import read

    torch.set_num_threads(2)
    (torch.randn(64, 64) @ torch.randn(64, 64)).bfloat16()  # starts torch's threads
    if path.suffix == ".safetensors":
        sizes = [tensor.nbytes for tensor in load_file(path).values()]
    else:
        with GGUFFile(path) as file:
            sizes = [info.nbytes for info in file.tensors.values()]
    gc.collect()
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    tensors = read(path).tensors if reader == "ours" else {k: t.clone() for k, t in load_file(path).items()}
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    kept = sum(tensor.nbytes for tensor in tensors.values())
    half = sum(tensor.numel() * 2 for tensor in tensors.values())
    largest = max(sizes)
    return {
        **{"seconds": seconds, "peak_bytes": max(peak[0], anonymous()) - before, "kept_bytes": kept},
        **{"bfloat16_bytes": half, "largest_tensor_bytes": largest, "bound_bytes": int(1.2 * half) + largest},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--blocks", type=float, default=1.0, help="the part of FLUX.1's blocks that is in the adapter")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        args.out.write_text(json.dumps(measure(args.measure[0], Path(args.measure[1]))), encoding="utf-8")
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for kind, path in write(Path(name), args.rank, args.blocks).items():
            for reader in READERS[: 1 if path.suffix == ".gguf" else None]:
                answer = Path(name) / "answer.json"
                command = [sys.executable, __file__, "--out", str(answer), "--measure", reader, str(path)]
                subprocess.run(command, check=True)
                rows.append({"file": kind, "reader": reader, **json.loads(answer.read_text(encoding="utf-8"))})
                row = rows[-1]
                print(
                    f"{kind:24} {reader:10} {row['seconds']:5.2f} s  peak {row['peak_bytes'] / 1e6:7.1f} MB  kept "
                    f"{row['kept_bytes'] / 1e6:7.1f} MB  bound {row['bound_bytes'] / 1e6:7.1f} MB",
                    flush=True,
                )
    report = {"command": " ".join(sys.argv), "torch": torch.__version__, "rank": args.rank, "results": rows}
    args.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return int(any(row["reader"] == "ours" and row["peak_bytes"] > row["bound_bytes"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
