"""Convert a diffusion model from safetensors to GGUF: `python dev.py convert -- IN OUT --type Q4_K_M`.

    python dev.py convert -- model.safetensors                          # model-Q4_K_M.gguf, beside it
    python dev.py convert -- model.safetensors small.gguf --type Q3_K_M --set img_mod=Q5_K --set txt_mlp=Q4_K

IN is a diffusion model alone or a checkpoint with one in it; FP8 weights with scales are multiplied out. It is read as
it is needed: beside the largest weight, some 200 MB of memory. ComfyUI says which architecture it is; for anything else
(a text encoder, names of diffusers) give --arch. Which weights keep their precision: web/docs/SluiceSaveGGUF.md.

It runs inside a ComfyUI, which dev.py finds or makes.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any

from pack.loaders.architecture_names import of_diffusion_model
from pack.loaders.gguf.errors import GGUFError
from pack.loaders.recipes import RECIPES, parse_overrides
from pack.loaders.safetensors_file import SafetensorsFile
from pack.loaders.save_model import Saved, Weight, save_model

SECONDS_BETWEEN_LINES = 1.0
CARRIED = {"title": "general.name", "license": "general.license", "config": "config"}  # safetensors' key -> GGUF's


class RefusedError(Exception):
    """What was asked for cannot be done; the message is for whoever asked."""


def architecture_of(path: Path, weights: list[Weight]) -> str:
    """What ComfyUI takes the tensors for, by the name that GGUF files have for it."""
    # Heavy, and not needed where --arch is given. The host reads its options when it is imported.
    import torch

    sys.argv = ["main.py", *([] if torch.cuda.is_available() else ["--cpu"])]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_detection

    tensors = {weight.name: weight.make() for weight in weights}  # views of the mapping, nothing is read
    config = comfy.model_detection.model_config_from_unet(tensors, "")
    if config is None:
        raise RefusedError(
            f"{path.name}: ComfyUI knows no diffusion model with these tensors, such as {next(iter(tensors), 'none')}; "
            "if it is one in diffusers' names, convert the original single file, else give --arch NAME"
        )
    return of_diffusion_model(type(config))


class Line:
    """One line on the terminal, renewed: percent, rate, time left. Without a terminal, nothing."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._shown = 0.0
        self._on = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._on or not done or (now - self._shown < SECONDS_BETWEEN_LINES and done < total):
            return
        self._shown = now
        rate = done / (now - self._start)
        text = f"\r{done / total:4.0%}  {rate / 1e6:6.1f} million weights/s  {(total - done) / rate:5.0f} s left"
        print(text, end="\n" if done >= total else "", file=sys.stderr, flush=True)


def convert(source: Path, target: Path, args: argparse.Namespace) -> Saved:
    """Write `target` from `source` as the arguments say."""
    if target.exists() and not args.force:
        raise RefusedError(f"{target} exists; choose another name, or add --force to replace it")
    overrides = parse_overrides(args.set)
    file = SafetensorsFile(source)
    weights = file.weights()
    metadata: dict[str, Any] = {key: file.metadata[name] for name, key in CARRIED.items() if name in file.metadata}
    return save_model(
        target,
        weights,
        args.type,
        args.arch or architecture_of(source, weights),
        overrides=overrides,
        metadata=metadata,
        device=args.device,
        progress=Line(),
        sources=(source,),
    )


def _stop(number: int, _: object) -> None:
    """End once, so that what was half written is removed undisturbed."""
    for known in (signal.SIGINT, signal.SIGTERM):
        signal.signal(known, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="dev.py convert --", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("target", type=Path, nargs="?", metavar="OUT")
    parser.add_argument("--type", choices=RECIPES, default="Q4_K_M")
    parser.add_argument("--set", action="append", default=[], metavar="PATTERN=TYPE", help="may be repeated")
    parser.add_argument("--arch", metavar="NAME", help="general.architecture, instead of what ComfyUI detects")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; the first GPU if there is one")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--list", action="store_true", help="say what each tensor became, and why")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    target = args.target or args.source.with_name(f"{args.source.stem}-{args.type}.gguf")
    try:
        saved = convert(args.source, target, args)
    except (GGUFError, RefusedError, ValueError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    if args.list:
        for name, choice in saved.chosen.items():
            print(f"{choice.ggml_type.name:8} {'x'.join(map(str, choice.shape)):>16}  {name}  ({choice.reason})")
    print(f"{saved.path}: {saved.nbytes / 1e6:.1f} MB in {saved.seconds:.1f} s, {saved.types}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
