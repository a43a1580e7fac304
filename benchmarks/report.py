"""What measuring costs: the report of a FLUX.1-dev that streams with a LoRA on it, a sample of memory, a step told of.

    python dev.py bench report [-- --step-ms 162]

The file is sparse: nothing here reads a weight, and what counts is the number of blocks and patches. In a step run, in
the thread that computes, only the last two rows: the host tells of a step's end, at most ten times a second a sample is
taken, and a pass over the blocks takes two time stamps. The report itself is made by the server's thread, twice a
second and only where a browser listens. It shares Python's lock with the thread that computes, so its share is given,
too. The last lines set these beside a step of --step-ms (default: this model's on an H200, as in README).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

RESULTS = Path(__file__).with_name("results") / "report.txt"
RANK = 4
EVENTS_A_SECOND = 2


def median_us(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def flux_models(folder: Path):
    """One that streams, with a LoRA; and one that the host manages."""
    import gguf
    import torch
    from comfy.weight_adapter import LoRAAdapter
    from pack.benchmarks import _model_files
    from pack.loaders.diffusion import load_diffusion_model
    from pack.loaders.quant.layout import is_gguf
    from pack.offload.attach import stream
    from pack.offload.costs import SwapRequest

    path = folder / "flux.gguf"
    _model_files.write(path, gguf.GGMLQuantizationType.Q8_0, "flux", _model_files.flux(), sparse=True)
    plain = load_diffusion_model(path, disable_dynamic=True)
    model = stream(load_diffusion_model(path, disable_dynamic=True), SwapRequest(blocks_to_swap=20))
    patches = {}
    for name, weight in model.model.named_parameters():
        if is_gguf(weight) and weight.dim() == 2:
            up, down = torch.zeros(weight.shape[0], RANK), torch.zeros(RANK, weight.shape[1])
            patches[name] = LoRAAdapter(set(), (up, down, None, None, None, None))
    model.add_patches(patches)
    return model, plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-ms", type=float, default=162.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    import comfy.cli_args
    import torch

    sys.argv = sys.argv[:1]
    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    import comfy.model_management
    from pack.nodes.report import gather, memory
    from pack.nodes.report.follow import Follower
    from pack.nodes.report.timeline import MOST_SAMPLES, Timeline
    from pack.offload.block_times import BlockTimes
    from pack.offload.streamed_patcher import residency_of

    with tempfile.TemporaryDirectory() as folder:
        model, plain = flux_models(Path(folder))
        comfy.model_management.load_models_gpu([model])
        timeline = Timeline(memory.sample)
        for _ in range(MOST_SAMPLES):
            timeline.sample(always=True)
        report = gather.report(None, timeline.data())
        (told,) = report["models"]
        assert told["bytes"]["streamed"] > 1e9 and told["patches"]["at_use"] > 300

        follower = Follower(timeline, lambda: None)
        follower.set_registry(SimpleNamespace(prompt_id="benchmark"))
        times = BlockTimes(1, residency_of(model)._device.torch_device)

        def one_block_passes() -> None:
            for _ in range(100):
                times.start(0)
                times.stop(0)

        rows = {
            "report": median_us(lambda: gather.report(None, timeline.data()), 100),
            "a model that does not stream": median_us(lambda: gather.model_report(plain, {}), 100),
            "report as JSON": median_us(lambda: json.dumps(report), 100),
            "sample of memory": median_us(lambda: timeline.sample(always=True), 500),
            "step told of, with a sample": median_us(lambda: follower.update_handler("1", 1, 20, {}, ""), 500),
            "begin of a pass": median_us(one_block_passes, 50) / 100,
        }
        rows["step told of, with a sample"] += rows["sample of memory"]  # most of those measured took none
        step_us = args.step_ms * 1e3
        in_step = rows["step told of, with a sample"] + rows["begin of a pass"]
        beside = (rows["report"] + rows["report as JSON"]) * EVENTS_A_SECOND / 1e6
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        lines = [
            f"{platform.machine()}, {gpu}, torch {torch.__version__}, Python {platform.python_version()}",
            f"{len(told['blocks'])} blocks, {told['patches']['at_use']} patched weights, "
            f"{len(json.dumps(report)) / 1e3:.0f} kB of JSON",
            "",
            *(f"{name:30} {took:8.1f} us" for name, took in rows.items()),
            "",
            f"in a step of {args.step_ms:g} ms: {100 * in_step / step_us:.3f} %",
            f"beside it, events for a browser: {100 * beside:.2f} % of the time",
        ]
        text = "\n".join(lines) + "\n"
        sys.stdout.write(text)
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
        comfy.model_management.unload_all_models()


if __name__ == "__main__":
    main()
