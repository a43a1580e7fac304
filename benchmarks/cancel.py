"""How long Cancel may have to wait: the longest time between two looks at it, in each work that takes long.

    python dev.py bench cancel [-- --blocks 5 15 --out FILE]

Each work runs to its end on a model in the shapes of FLUX.1-dev (fewer blocks, Q8_0, random), and whenever it looks at
whether the user has cancelled, the time is noted. What lies between two looks, before the first, and after the last is
how long a Cancel at the worst moment waits. Files are dropped from the system's cache first, where the system can.

    open              the header is read and the MODEL is made; without a look, so all of it counts
    load              the weights come from the disk, and to the GPU where there is one
    page_cache, ...   Block Swap arranges the model, a half of which streams from there: read, locked or copied
    LoRA              of 1 GB, read
    convert           a matrix of 9.4 million weights to each type, on the device that Save GGUF takes
    save              the whole model, whose types stay: read, written, on the disk
    dispose           Release Memory, after all weights were used
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results") / "cancel.txt"
MATRIX = (3072, 3072)
LORA_SHAPE = (1 << 14, 1 << 11)  # of each of 16 tensors, in float16
HEAD = f"{'work':24} {'took s':>8} {'looks':>7} {'longest wait s':>15}"


class Looks:
    """The times at which `Progress` looked for Cancel."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._times: list[float] = []

    def install(self) -> None:
        from pack.loaders.progress import Progress

        at = Progress.at

        def noted(progress: Any, done: int) -> None:
            self._times.append(time.perf_counter())
            at(progress, done)

        Progress.at = noted  # type: ignore[method-assign]

    @contextmanager
    def during(self, work: str) -> Iterator[None]:
        self._times = [time.perf_counter()]
        yield
        self._times.append(time.perf_counter())
        waits = [after - before for before, after in zip(self._times, self._times[1:], strict=False)]
        self.told(work, sum(waits), len(waits) - 1, max(waits))

    def told(self, work: str, took: float, looks: int, longest: float) -> None:
        self.lines.append(f"{work:24} {took:8.2f} {looks:7} {longest:15.3f}")
        print(self.lines[-1], flush=True)


def forget(path: Path) -> None:
    """Drop the file from the system's cache."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loading(looks: Looks, path: Path) -> Any:
    import comfy.model_management
    from pack.loaders.diffusion import load_diffusion_model

    forget(path)
    with looks.during("open"):
        model = load_diffusion_model(path, disable_dynamic=True)
    with looks.during("load"):
        comfy.model_management.load_models_gpu([model])
    comfy.model_management.unload_all_models()
    return model


def streaming(looks: Looks, path: Path, kind: str, blocks: int) -> None:
    import comfy.model_management
    from pack.loaders.diffusion import load_diffusion_model
    from pack.offload.attach import stream
    from pack.offload.costs import SwapRequest

    request = SwapRequest(blocks_to_swap=blocks, weight_source=kind)
    model = stream(load_diffusion_model(path, disable_dynamic=True), request)
    forget(path)
    with looks.during(f"Block Swap, {kind}"):
        comfy.model_management.load_models_gpu([model])
    comfy.model_management.unload_all_models()


def reading_a_lora(looks: Looks, folder: Path) -> None:
    import torch
    from pack.loaders.progress import watched
    from pack.lora.read import read
    from safetensors.torch import save_file

    path = folder / "lora.safetensors"
    tensors = {f"blocks.{i}.lora_up.weight": torch.zeros(LORA_SHAPE, dtype=torch.float16) for i in range(16)}
    save_file(tensors, path)
    del tensors
    forget(path)
    with looks.during("LoRA"):
        read(path, watch=watched)
    path.unlink()


def converting(looks: Looks, device: Any) -> None:
    import torch
    from pack.loaders.progress import Progress
    from pack.loaders.quant.quantize import quantize
    from pack.loaders.recipes import RECIPES

    types = sorted({recipe.bulk for recipe in RECIPES.values()}, key=lambda kind: kind.name)
    matrix = torch.randn(MATRIX, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    for kind in types:
        progress = Progress("converting", matrix.numel())
        with looks.during(f"convert, {kind.name}"):
            quantize(matrix, kind, device, progress.at)


def saving(looks: Looks, model: Any, path: Path) -> None:
    from pack.loaders.model_weights import of_model
    from pack.loaders.progress import Progress
    from pack.loaders.save_model import save_model

    target = path.with_name("saved.gguf")
    file = of_model(model)
    progress = Progress("saving", sum(prod(weight.shape) for weight in file.weights))
    forget(path)
    with looks.during("save"):
        save_model(target, file.weights, "Q8_0", file.architecture, progress=lambda done, total: progress.at(done))
    target.unlink()


def disposing(looks: Looks, model: Any) -> None:
    import comfy.model_management
    from pack.offload.release import release

    comfy.model_management.load_models_gpu([model])
    touched = sum(int(weight.view(-1)[::4096].sum()) for weight in _stored(model))
    assert touched >= 0
    with looks.during("dispose"):
        release("diffusion_model", "dispose")


def _stored(model: Any) -> list[Any]:
    import torch

    found = (getattr(parameter, "_qdata", parameter) for parameter in model.model.parameters())
    return [data for data in found if data.dtype is torch.uint8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs=2, default=(5, 15), help="double and single ones of FLUX: 4.2 GB")
    parser.add_argument("--folder", type=Path, help="where to write the files (default: the system's temporary one)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    import comfy.cli_args
    import torch

    sys.argv = sys.argv[:1]
    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    import comfy.model_management
    import gguf
    from pack.benchmarks import _model_files

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    about = f"{platform.machine()}, {gpu}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(about, HEAD, sep="\n", flush=True)
    looks = Looks()
    looks.install()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        path = Path(scratch, "flux.gguf")
        nbytes = _model_files.write(path, gguf.GGMLQuantizationType.Q8_0, "flux", _model_files.flux(*args.blocks))
        model = loading(looks, path)
        kinds = ("page_cache", "pinned", "disk") if torch.cuda.is_available() else ("disk",)
        works: list[Callable[[], None]] = [
            partial(streaming, looks, path, kind, sum(args.blocks) // 2) for kind in kinds
        ]
        works += [lambda: reading_a_lora(looks, Path(scratch)), lambda: saving(looks, model, path)]
        works += [lambda: disposing(looks, model)]
        works += [lambda: converting(looks, comfy.model_management.get_torch_device())]
        for work in works:
            work()
    lines = ["python dev.py bench cancel", about, f"{nbytes / 1e9:.1f} GB of Q8_0", "", HEAD, *looks.lines]
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
