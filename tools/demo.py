"""The demo: a small trained model, as two GGUF files, draws digits in a real ComfyUI.

The models lie in demo/, except for the text encoder (247 MB), which demo/make_text_encoder.py writes again with the
same bits.  The workflow is the one in example_workflows/ that users open; only its prompt, file and seed are changed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import workflow
from .host import CACHE, ROOT, Host, has_gpu
from .server import Server
from .steps import SetupError, Step, run_steps

DEMO = ROOT / "demo"
WORKFLOW = ROOT / "example_workflows" / "sluice_demo.json"
BASE = CACHE / "comfyui"  # the base directory that `demo` and `comfy` share
MODELS = BASE / "models"
OUTPUT = ROOT / "output"

TEXT_ENCODER = "text_encoders/demo_clip_l.safetensors"
TEXT_ENCODER_SHA256 = "69ad05a40d71fe6ab5bf74cada7a83915befc5d8a379e5969433180c73fb1ac7"
GGUF_FILES = {"Q8_0": "demo_mmdit-Q8_0.gguf", "Q4_0": "demo_mmdit-Q4_0.gguf"}

# What lies in demo/ as it is, by its place among the host's models.
SHIPPED = (
    "diffusion_models/demo_mmdit.safetensors",
    "loras/demo_lora.safetensors",
    "vae_approx/taesd3_encoder.safetensors",
    "vae_approx/taesd3_decoder.safetensors",
)

PROMPTS = ("red seven on white", "yellow four on blue", "green three on black", "white eight on purple")
SEED = 11


@dataclass(frozen=True)
class Picture:
    prompt: str
    model: str
    path: Path
    seconds: float


def prepare_models(host: Host) -> None:
    """Complete the demo's models in MODELS."""
    stamps = CACHE / "demo"
    source = DEMO / "demo_mmdit.safetensors"
    script = (DEMO / "make_text_encoder.py").read_text(encoding="utf-8")
    converter = (ROOT / "tools" / "to_gguf.py").read_text(encoding="utf-8")
    encoder = MODELS / TEXT_ENCODER
    steps = [Step("text encoder", stamps / "text_encoder", (script,), encoder, partial(_make_encoder, host, encoder))]
    for kind, name in GGUF_FILES.items():
        target = MODELS / "diffusion_models" / name
        inputs = (_sha256(source), converter)
        steps.append(
            Step(f"{kind} model", stamps / kind, inputs, target, partial(_convert, host, source, target, kind))
        )
    for place in SHIPPED:
        file, target = DEMO / Path(place).name, MODELS / place
        steps.append(Step(file.name, stamps / file.name, (_sha256(file),), target, partial(_copy, file, target)))
    run_steps(steps)


def copy_models(target: Path) -> None:
    """Copy the demo's models to another models folder, for a server whose files a test may spoil."""
    for place in (TEXT_ENCODER, *SHIPPED, *(f"diffusion_models/{name}" for name in GGUF_FILES.values())):
        _copy(MODELS / place, target / place)


def prompt_for(text: str, model: str, seed: int = SEED) -> tuple[dict[str, Any], dict[str, Any]]:
    """The demo workflow for this prompt and model file, as the frontend saves it and in API form."""
    saved = workflow.load(WORKFLOW)
    workflow.set_widget(saved, "Prompt", "text", text)
    workflow.set_widget(saved, "Model", "model_name", model)
    workflow.set_widget(saved, "Sampler", "seed", seed)
    prefix = f"sluice_demo/{text.replace(' ', '_')}-{Path(model).stem.rpartition('-')[2]}"
    workflow.set_widget(saved, "Save", "filename_prefix", prefix)
    return saved, workflow.to_api(saved)


def draw(server: Server, text: str, model: str, folder: Path) -> Picture:
    """Run the demo workflow on the server and keep its picture as `folder`/PROMPT-MODEL.png."""
    saved, api = prompt_for(text, model)
    start = time.monotonic()
    (png,) = server.images(server.queue(api, ui=saved))
    seconds = time.monotonic() - start
    path = folder / f"{text.replace(' ', '_')}-{Path(model).stem}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png)
    return Picture(text, model, path, seconds)


def run(host: Host) -> None:
    """Draw every prompt with every model and print where the pictures are and what they cost."""
    start = time.monotonic()
    prepare_models(host)
    arguments = [] if has_gpu(host) else ["--cpu"]
    with Server(host, BASE, *arguments) as server:
        print(f"ComfyUI answers at {server.url} after {time.monotonic() - start:.1f} s; its log: {server.log_path}")
        for model in GGUF_FILES.values():
            for text in PROMPTS:
                picture = draw(server, text, model, OUTPUT)
                print(f"{picture.path}  {picture.seconds:.1f} s", flush=True)
        peak = server.peak_memory_bytes()
    memory = "not known on this system" if peak is None else f"{peak / 2**30:.2f} GiB"
    count = len(GGUF_FILES) * len(PROMPTS)
    print(f"{count} pictures; {time.monotonic() - start:.1f} s in all; the server's peak memory: {memory}")


def _make_encoder(host: Host, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    unchecked = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        _run(host, DEMO / "make_text_encoder.py", str(unchecked))
        if (got := _sha256(unchecked)) != TEXT_ENCODER_SHA256:
            raise SetupError(
                f"demo/make_text_encoder.py wrote a file with SHA-256 {got}, expected {TEXT_ENCODER_SHA256}: numpy's "
                f"generator or rounding differs on this machine, and the demo model would not understand its prompts."
            )
        unchecked.replace(target)
    finally:
        unchecked.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _convert(host: Host, source: Path, target: Path, kind: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _run(host, ROOT / "tools" / "to_gguf.py", str(source), str(target), "--type", kind, "--arch", "sd3")


def _run(host: Host, *command: str | Path) -> None:
    done = subprocess.run(
        [str(host.python), *map(str, command)], env=host.env(), capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        raise SetupError(f"{command[0]} failed:\n{(done.stdout + done.stderr).strip()}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
