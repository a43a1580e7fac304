"""A picture in too little VRAM: what Offload Mode's modes cost against every stage alone with all VRAM free.

    python benchmarks/stages.py --work DIR --out results/stages.json [--free 10] [--steps 20] [MODE ...]

A text encoder of T5-XXL's shapes and a diffusion model of FLUX.1's, both Q8_0 by the pack's loaders, and FLUX's VAE
make a picture of 1024 x 1024: 256 tokens, 20 steps, decode. With `--free` GB of VRAM (an allocation outside torch holds
the rest) no two of the first two fit together, and the diffusion model does not fit at all. Each mode has a process of
its own, in which are measured

    alone      while all VRAM is free: before each stage everything is unloaded, so a stage is loading its model and its
               work; and each stage again, loaded already. In the first mode's process, for all modes
    MODE       with the ballast: the next pictures of a queue, from the text to the pixels, after one that warms up
    switch     from the host being asked for the next model to its weights being there, with what had to leave: its
               bytes on the device over that time, beside the rate of one copy from pinned memory. The first time is
               that of the picture that warms up, when no page of the file is locked yet
    dispose    the process's memory before the two models are loaded, in use, and after Release Memory has disposed of
               all. Before that the pictures of `alone` are made of models of their own, which are disposed of, because
               what Triton, CUDA's libraries and Python load at their first use stays: "fresh" is the memory before that

The files are random with finite scales and are written to DIR when they are missing (18 GB). PYTHONPATH must hold
ComfyUI and its packages; `dev.py bench` sees to that. `--small` has small networks and
runs on a CPU, to try the script.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import importlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
MODES = ("cond_diffusion", "cond_only", "aggressive", "layer_streaming", "none")
STAGES = ("text", "sample", "decode")
WORDS = "a lighthouse on a cliff above a stormy sea, oil on canvas, " * 15  # about 256 tokens


@dataclass(frozen=True)
class Size:
    """What is drawn with: the text encoder's type in the host, the diffusion model's blocks, the latent's side."""

    text: str
    clip_type: str
    blocks: tuple[int, int]
    side: int


SIZES = {False: Size("t5_xxl", "chroma", (19, 38), 128), True: Size("t5_base", "stable_audio", (1, 1), 8)}


def make_files(folder: Path, size: Size) -> tuple[Path, Path]:
    """The two GGUF files; written when they are missing. In the host."""
    import _model_files as files

    folder.mkdir(parents=True, exist_ok=True)
    text, diffusion = folder / f"{size.text}_q8_0.gguf", folder / f"flux_{sum(size.blocks)}_q8_0.gguf"
    for path, architecture, shapes in (
        (text, "t5", lambda: getattr(files, size.text)()),
        (diffusion, "flux", lambda: files.flux(*size.blocks)),
    ):
        if not path.exists():
            partial = path.with_suffix(".part")
            files.write(partial, files.Type.Q8_0, architecture, shapes())
            partial.rename(path)
    return text, diffusion


def load_both(folder: Path, size: Size) -> tuple[Any, Any]:
    """CLIP and MODEL, by the nodes as the host finds them."""
    import folder_paths

    host_nodes = importlib.import_module("nodes")
    text, diffusion = make_files(folder, size)
    for kind in ("diffusion_models", "text_encoders"):
        folder_paths.add_model_folder_path(kind, str(folder))
    if "SluiceCLIPLoader" not in host_nodes.NODE_CLASS_MAPPINGS:
        assert asyncio.run(host_nodes.load_custom_node(str(HERE.parent))), "the pack does not load"
    node = {name: host_nodes.NODE_CLASS_MAPPINGS[f"Sluice{name}"] for name in ("CLIPLoader", "DiffusionModelLoader")}
    clip = node["CLIPLoader"].execute(clip_name1=text.name, type=size.clip_type).args[0]
    model = node["DiffusionModelLoader"].execute(model_name=diffusion.name).args[0]
    return clip, model


class Studio:
    """Makes pictures and notes when what began and how much was loaded for it."""

    def __init__(self, clip: Any, model: Any, vae: Any, size: Size, steps: int) -> None:
        import comfy.model_management

        self.clip, self.model, self.vae, self.size, self.steps = clip, model, vae, size, steps
        self.seconds: dict[str, float] = {}
        self.switches: list[dict] = []
        self._began, self._stage = 0.0, ""
        self._work: dict[str, Callable[[Any], Any]] = {
            "text": self._text, "sample": self._sample, "decode": self._decode,
        }  # fmt: skip
        self._load = comfy.model_management.load_models_gpu
        comfy.model_management.load_models_gpu = self._loading

    def _loading(self, models: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._began:
            return self._load(models, *args, **kwargs)
        result = self._load(models, *args, **kwargs)
        synchronize()
        loaded = sum(int(model.loaded_size()) for model in models)
        took = time.perf_counter() - self._began
        self.switches.append({"to": self._stage, "seconds": took, "bytes": loaded})
        self._began = 0.0
        return result

    def close(self) -> None:
        """Let the host load by itself again."""
        import comfy.model_management

        comfy.model_management.load_models_gpu = self._load

    def stage(self, name: str, given: Any) -> Any:
        self._stage, start = name, time.perf_counter()
        result = self._work[name](given)
        synchronize()
        self.seconds[name] = time.perf_counter() - start
        return result

    def _switch(self) -> None:
        """The next thing is to ask for the stage's model."""
        self._began = time.perf_counter()

    def picture(self) -> Any:
        result = None
        for name in STAGES:
            result = self.stage(name, result)
        return result

    def _text(self, _: Any) -> Any:
        tokens = self.clip.tokenize(WORDS)
        self._switch()
        return self.clip.encode_from_tokens(tokens)

    def _sample(self, text: Any) -> Any:
        import comfy.sample
        import torch

        side = self.size.side
        noise = torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(0))
        wide = torch.nn.functional.pad(text.float().cpu(), (0, 4096 - text.shape[-1])).clamp(-1, 1)
        condition = [[wide, {"pooled_output": torch.zeros(1, 768), "guidance": 3.5}]]
        latent = torch.zeros_like(noise)
        self._switch()
        return comfy.sample.sample(
            self.model, noise, self.steps, 1.0, "euler", "simple", condition, condition, latent, disable_pbar=True,
            seed=1,
        )  # fmt: skip

    def _decode(self, latent: Any) -> Any:
        self._switch()
        return self.vae.decode(latent)


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory_mb() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return {line.split(":")[0]: int(line.split()[1]) / 1e3 for line in lines if line.startswith("Rss")}


def copies_gb_s() -> float:
    """The rate of a copy of 1 GiB from pinned memory; the median of some."""
    import torch

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


def hold_back(free_gb: float) -> None:
    """Take away all VRAM but so much."""
    import torch

    if not torch.cuda.is_available() or not free_gb:
        return
    torch.zeros(1, device="cuda")
    available, _ = torch.cuda.mem_get_info()
    runtime = ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).split('.')[0]}")
    ballast = ctypes.c_void_p()
    assert runtime.cudaMalloc(ctypes.byref(ballast), ctypes.c_size_t(int(available - free_gb * 1e9))) == 0


def start_host(args: argparse.Namespace) -> None:
    if not args.small:
        import flux_step

        return flux_step.start_host(args.dynamic)
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    return comfy.options.enable_args_parsing()


def worker(case: str, args: argparse.Namespace) -> dict:
    start_host(args)
    import torch

    with torch.inference_mode():  # as the host runs its nodes
        return measured(case, args)


def measured(case: str, args: argparse.Namespace) -> dict:
    import _model_files
    import comfy.sd
    import torch

    size, link = SIZES[args.small], copies_gb_s()
    torch.cuda.empty_cache()
    vae = comfy.sd.VAE(sd=_model_files.flux_autoencoder())
    vae.decode(torch.zeros(1, 16, size.side, size.side))  # CUDA's libraries are loaded, too
    unload_all()
    fresh = memory_mb()
    result: dict[str, Any] = {"case": case, "link_gb_s": link, "alone": [], "pictures": []}
    free = Studio(*load_both(args.work, size), vae, size, args.steps)
    for number in range(1 + args.alone):
        found = alone(free)
        result["alone"] += [found] if number else []
    disposed(free)
    free.close()
    del free
    gc.collect()
    hold_back(args.free)
    before = memory_mb()
    studio = Studio(*arranged(case, args.work, size, vae), size, args.steps)
    image = studio.picture()
    result["first_switches"] = list(studio.switches)
    assert bool(image.isfinite().all()), "the picture has no numbers"
    for _ in range(args.pictures):
        studio.switches.clear()
        start = time.perf_counter()
        again = studio.picture()
        result["pictures"].append({**studio.seconds, "total": time.perf_counter() - start})
        assert torch.equal(again, image), "the same picture came out differently"
    result["switches"] = list(studio.switches)
    result["memory_mb"] = {"fresh": fresh, "before": before, **disposed(studio)}
    if torch.cuda.is_available():
        result["peak_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return result


def arranged(case: str, folder: Path, size: Size, vae: Any) -> tuple[Any, Any, Any]:
    """CLIP, MODEL and VAE behind an Offload Mode node."""
    clip, model = load_both(folder, size)
    attached = importlib.import_module("nodes").NODE_CLASS_MAPPINGS["SluiceOffloadMode"]
    model, clip, vae = attached.execute(mode=case, model=model, clip=clip, vae=vae).args
    return clip, model, vae


def unload_all() -> None:
    import comfy.model_management as management

    management.unload_all_models()
    management.soft_empty_cache()


def alone(studio: Studio) -> dict[str, float]:
    """Seconds of each stage with its model to be loaded first and nothing else there; and again, loaded."""
    result, given = {}, None
    for name in STAGES:
        unload_all()
        made = studio.stage(name, given)
        result[name] = studio.seconds[name]
        studio.stage(name, given)
        result[f"{name}_loaded"] = studio.seconds[name]
        given = made
    result["total"] = sum(result[name] for name in STAGES)
    result["total_loaded"] = sum(result[f"{name}_loaded"] for name in STAGES)
    return result


def disposed(studio: Studio) -> dict[str, dict[str, float]]:
    """Memory while the last models are loaded, and after disposing of everything."""
    release = importlib.import_module("nodes").NODE_CLASS_MAPPINGS["SluiceReleaseMemory"]
    in_use = memory_mb()
    release.execute(anything=None, what="all", how="dispose")
    gc.collect()
    return {"in use": in_use, "disposed": memory_mb()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", default=MODES)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--free", type=float, default=10, help="GB of VRAM to leave")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=2, help="of a mode, after one to warm up")
    parser.add_argument(
        "--alone", type=int, default=2, help="times each stage is run alone, in the first mode's process"
    )
    parser.add_argument("--dynamic", action="store_true", help="with the host's dynamic VRAM")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--role", choices=("worker", "make"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "make":
        start_host(args)
        make_files(args.work, SIZES[args.small])
        return
    if args.role == "worker":
        case = args.modes[0]
        args.out.write_text(json.dumps(worker(case, args)), encoding="utf-8")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    found: list[dict] = []
    for case in ("make", *args.modes):
        answer = args.work / "answer.json"
        answer.unlink(missing_ok=True)
        role = "make" if case == "make" else "worker"
        options = ["--role", role, "--work", str(args.work), "--out", str(answer)]
        dials = {"free": args.free, "steps": args.steps, "pictures": args.pictures, "alone": 0 if found else args.alone}
        options += [part for dial, value in dials.items() for part in (f"--{dial}", str(value))]
        options += [*(f"--{dial}" for dial in ("small", "dynamic") if vars(args)[dial]), case]
        start = time.perf_counter()
        done = subprocess.run([*inside_the_host(), *options], capture_output=True, text=True)
        print(f"{case}: {time.perf_counter() - start:.0f} s in all", flush=True)
        if role == "make":
            assert done.returncode == 0, done.stderr[-3000:]
        elif answer.exists():
            found.append(json.loads(answer.read_text(encoding="utf-8")))
            print(told(found[-1], found[0]["alone"]), flush=True)
        else:
            print(f"failed\n{done.stderr[-3000:]}", flush=True)
    report = {"hardware": hardware(), "free_gb": args.free, "steps": args.steps, "command": " ".join(sys.argv)}
    args.out.write_text(json.dumps({**report, "results": found}, indent=1), encoding="utf-8")


def inside_the_host() -> list[str]:
    """This script as `dev.py bench` began it."""
    comfy = importlib.util.find_spec("comfy")
    assert comfy is not None and comfy.submodule_search_locations, "PYTHONPATH does not hold ComfyUI"
    host = str(Path(comfy.submodule_search_locations[0]).parent)
    return [sys.executable, str(HERE.parent / "tools" / "launch.py"), host, str(Path(__file__).resolve())]


def told(found: dict, alone: list[dict]) -> str:
    """The figures of one mode, a line each, beside those of the stages alone."""
    case, link, memory = found["case"], found["link_gb_s"], found["memory_mb"]
    total = median(picture["total"] for picture in found["pictures"])
    lines = [f"{case}: {total:.3f} s a picture"]
    if alone:
        whole, loaded = (median(picture[name] for picture in alone) for name in ("total", "total_loaded"))
        lines[0] += (
            f"; its stages alone {whole:.3f} s: {total / whole:.3f} x "
            f"(loaded already {loaded:.3f} s: {total / loaded:.3f} x)"
        )
    for when, switches in (("first", found["first_switches"]), ("later", found["switches"])):
        for one in switches:
            milliseconds, copy = one["seconds"] * 1e3, one["bytes"] / link / 1e6
            lines.append(
                f"  switch to {one['to']:6} {when}: {milliseconds:6.1f} ms, {one['bytes'] / 1e9:5.2f} GB take "
                f"{copy:6.1f} ms at the link's {link:.1f} GB/s: {milliseconds / copy:.2f} x"
            )
    sums = {when: sum(at.values()) for when, at in memory.items()}
    lines.append(
        "  RAM: " + ", ".join(f"{when} {nbytes:.0f} MB" for when, nbytes in sums.items())
        + f": {sums['disposed'] - sums['before']:+.0f} MB after dispose"
    )  # fmt: skip
    for name, rows in (("alone", found["alone"]), (case, found["pictures"])):
        for row in rows:
            lines.append(f"    {name}: " + "  ".join(f"{stage} {1e3 * seconds:.0f}" for stage, seconds in row.items()))
    for when, at in memory.items():
        lines.append(f"    {when}: " + ", ".join(f"{kind} {nbytes:.0f} MB" for kind, nbytes in at.items()))
    return "\n".join([*lines, f"    peak {found.get('peak_reserved_gb', 0):.2f} GB reserved"])


def hardware() -> str:
    import flux_step
    import torch

    return flux_step.hardware() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    main()
