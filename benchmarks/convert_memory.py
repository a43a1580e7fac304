"""What saving a model as GGUF takes in host memory and time: a safetensors file converted, and a loaded MODEL saved.

    python dev.py bench convert_memory [-- --type Q4_K_M]

The model has the shapes of FLUX.1-dev with two blocks of each kind and random weights: 1.0 billion, 2 GB in bfloat16.
Each case runs in a process of its own:

- `file`: the bfloat16 safetensors file, converted as `python dev.py convert` does it.
- `MODEL`: a Q8_0 file of the same, loaded with the pack's loader and saved as the node does it. On a CPU its weights
  are float32 when they are dense.

Memory is the process's anonymous memory (the page cache, from which the weights are read, is the system's), seen every
10 ms. `added` is the peak over what the process had before it began to save; the limit is the largest weight, dense,
and 200 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
BLOCKS = (2, 2)
ALLOWED = 200_000_000  # bytes beside the largest weight
STATUS = Path("/proc/self/status")


def anonymous() -> int:
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return 1024 * int(fields["RssAnon"].split()[0])


def watched(work: Callable[[], Any]) -> tuple[Any, int, int]:
    """The result of `work`, the memory before it, and the most during it."""
    before, seen, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            seen[0] = max(seen[0], anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        return work(), before, seen[0]
    finally:
        done.set()
        watcher.join()


def start_host() -> None:
    import torch

    sys.argv = ["main.py", *([] if torch.cuda.is_available() else ["--cpu"])]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd


def make(folder: Path) -> None:
    """Both files, without holding a model."""
    start_host()
    import torch
    from gguf import GGMLQuantizationType
    from pack.benchmarks import _model_files

    shapes = _model_files.flux(*BLOCKS)
    _model_files.write(folder / "model.gguf", GGMLQuantizationType.Q8_0, "flux", shapes)
    entries, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries).encode()
    generator = torch.Generator().manual_seed(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for shape in shapes.values():
            weight = torch.randn(prod(shape), generator=generator).mul_(0.02).bfloat16()
            file.write(weight.view(torch.uint8).numpy().tobytes())


def save(case: str, folder: Path, kind: str) -> dict[str, Any]:
    import torch
    from pack.loaders.save_model import save_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.zeros(1, device=device)
    target = folder / f"{case}-{kind}.gguf"
    if case == "file":
        from pack.loaders.safetensors_file import SafetensorsFile

        weights, architecture = SafetensorsFile(folder / "model.safetensors").weights(), "flux"
    else:
        start_host()
        from pack.loaders.diffusion import load_diffusion_model
        from pack.loaders.model_weights import of_model

        new = of_model(load_diffusion_model(folder / "model.gguf"))
        weights, architecture = new.weights, new.architecture
    largest = max(prod(w.shape) * w.dtype.itemsize for w in weights)
    saved, before, peak = watched(lambda: save_model(target, weights, kind, architecture, device=device))
    return {
        "case": case,
        "type": kind,
        "device": device,
        "file_bytes": saved.nbytes,
        "types": saved.types,
        "seconds": saved.seconds,
        "million_weights_a_second": sum(prod(w.shape) for w in weights) / saved.seconds / 1e6,
        "largest_weight_bytes": largest,
        "before_bytes": before,
        "added_bytes": peak - before,
        "allowed_bytes": largest + ALLOWED,
    }


def in_process(*arguments: str) -> None:
    # As this process was started: `launch.py --pack COMFYUI SCRIPT`.
    launcher = [sys.executable, str(Path(__file__).parents[1] / "tools" / "launch.py"), "--pack", sys.path[0]]
    done = subprocess.run([*launcher, __file__, *arguments], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{(done.stdout + done.stderr)[-3000:]}")


def hardware() -> str:
    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{name}, {os.cpu_count()} cores, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", action="append", help="may be repeated; Q8_0 and Q4_K_M by default")
    parser.add_argument("--folder", type=Path, help="where the temporary files go; it needs 6 GB")
    parser.add_argument("--out", type=Path, default=RESULTS / "convert_memory", help="without suffix")
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not STATUS.exists():
        raise SystemExit("this benchmark reads /proc, which only Linux has")
    if args.role:
        role, folder, *rest = args.role
        if role == "make":
            return make(Path(folder))
        result = save(role, Path(folder), rest[0])
        Path(rest[1]).write_text(json.dumps(result), encoding="utf-8")
        return None
    head = "case   type          s     M/s  MB written  largest MB  added MB  limit MB"
    lines, rows = [hardware(), head], []
    print(*lines, sep="\n", flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        in_process("--role", "make", scratch)
        for case in ("file", "MODEL"):
            for kind in args.type or ("Q8_0", "Q4_K_M"):
                answer = Path(scratch, "answer.json")
                in_process("--role", case, scratch, kind, str(answer))
                row = json.loads(answer.read_text(encoding="utf-8"))
                rows.append(row)
                sizes = (
                    row[key] / 1e6 for key in ("file_bytes", "largest_weight_bytes", "added_bytes", "allowed_bytes")
                )
                lines.append(
                    f"{case:6} {kind:8} {row['seconds']:6.1f} {row['million_weights_a_second']:7.1f} "
                    "{:11.0f} {:11.0f} {:9.0f} {:9.0f}".format(*sizes)
                )
                print(lines[-1], flush=True)
                Path(scratch, f"{case}-{kind}.gguf").unlink()
    args.out.with_suffix(".json").write_text(json.dumps({"hardware": lines[0], "rows": rows}, indent=1) + "\n")
    args.out.with_suffix(".txt").write_text("\n".join(["python dev.py bench convert_memory", *lines]) + "\n")
    return None


if __name__ == "__main__":
    main()
