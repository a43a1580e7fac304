"""What the thread that computes does for a streamed step of SDXL, counted on a device that does nothing itself.

    python dev.py bench streamed_calls [-- --out results/streamed_calls.json]

SDXL in Q8_0 (86 blocks) streams a quarter, a half and all of its blocks, weight by weight and with those that lie side
by side in the file in one piece (offload/runs.py). Its blocks are entered and left as in a step, but compute nothing,
and copies and events only count: what is left is Python's part of streaming, as its least time, and how often it calls
the driver. No GPU is needed; what a GPU's driver takes for a call comes on top. The file is sparse.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

ARGUMENTS = sys.argv[1:]
sys.argv = ["main.py", "--cpu", "--disable-dynamic-vram"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import gguf  # noqa: E402
import torch  # noqa: E402
from pack.benchmarks import _model_files  # noqa: E402
from pack.loaders.diffusion import load_diffusion_model  # noqa: E402
from pack.offload import residency, runs  # noqa: E402
from pack.offload.blocks import find_blocks  # noqa: E402
from pack.offload.costs import Link, SwapRequest  # noqa: E402
from pack.offload.location import located  # noqa: E402
from pack.offload.terms import Terms  # noqa: E402

SHARES = (0.25, 0.5, 1.0)
ROUNDS = 60
WARM_UP = 6  # steps, in which blocks are timed and weights made
PLENTY = 1 << 36


class CountingDevice:
    """Does nothing, and counts what it is asked for. It is its own registrar, and locks anything."""

    copies_by_itself = False
    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        self.registrar = self
        self.counts: Counter[str] = Counter()
        self._stream, self._nothing = object(), nullcontext()

    def read_only_refusal(self) -> None: ...

    def register(self, address: int, nbytes: int, *, read_only: bool = False) -> None: ...

    def unregister(self, address: int) -> None: ...

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    staging = allocate

    def compute_stream(self) -> object:
        return self._stream

    new_copy_stream = new_event = staticmethod(object)

    def record(self, event: object, stream: object) -> None:
        self.counts["events recorded"] += 1

    def wait(self, stream: object, event: object) -> None:
        self.counts["events waited for"] += 1

    def on(self, stream: object) -> nullcontext:
        self.counts["changes of stream"] += 1
        return self._nothing

    def copier(self, out: torch.Tensor, data: torch.Tensor) -> Callable[[], None]:
        counts = self.counts

        def copy() -> None:
            counts["copies"] += 1

        return copy

    def submit(self, stream: object) -> None: ...

    def synchronize(self, awaited: object) -> None: ...


def measure(network: torch.nn.Module, share: float) -> dict[str, float]:
    blocks, device = find_blocks(network), CountingDevice()
    streamed = residency.Residency(blocks, SwapRequest(blocks_to_swap=round(share * len(blocks))))
    terms = Terms(
        *(PLENTY, PLENTY, PLENTY, True, located),
        dtype_of=lambda module, name: None,
        account_pinned=lambda nbytes: None,
        patched_by_host=lambda slot: False,
    )

    def step() -> None:
        for number in range(len(blocks)):
            streamed.enter(number)
            streamed.exit(number)

    with patch.object(residency, "device_for", lambda place: device), patch.object(
        residency, "link_of", lambda place, kind: Link(54e9)
    ):  # fmt: skip
        streamed.arrange(network, device.torch_device, terms)
        for _ in range(WARM_UP):
            step()
        device.counts.clear()
        step()
        found = dict(device.counts)
        profile = cProfile.Profile()
        profile.runcall(step)
        found["python calls"] = sum(entry.callcount for entry in profile.getstats())
        times = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
        streamed.leave()
    return {**found, "milliseconds": min(times) * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(ARGUMENTS)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "sdxl.gguf"
        _model_files.write(path, gguf.GGMLQuantizationType.Q8_0, "sdxl", _model_files.sdxl(), sparse=True)
        network = load_diffusion_model(path, disable_dynamic=True).model.diffusion_model
        for longest in (0, runs.LONGEST):
            with patch.object(runs, "LONGEST", longest):
                for share in SHARES:
                    rows.append({"share": share, "joined": bool(longest), **measure(network, share)})
                    print(", ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
