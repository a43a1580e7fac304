"""The pack's streaming against other libraries that run a model larger than VRAM, on one network in one run.

    python benchmarks/rivals.py --work DIR [--out results/rivals.json] [--layers 19 38] [--share 0.5] [ROW ...]

The network is the transformer of FLUX.1 as diffusers has it, in bf16 with random weights; `--layers` is how many double
and single blocks (FLUX has 19 and 38; a third of each has the same ratio of bytes to compute, and is set up in a third
of the time). One picture of 1024 x 1024 with 512 tokens of text. Every row has the same VRAM, for weights and all else:
`--share` of the weights and `--beside` GB; torch's allocator refuses more. What the resident row took beside its
weights is what one that asks for a budget of weights is told to leave. Rows take turns (A B A B), each time in a
process of their own, which may take `--limit` seconds:

    resident    all in VRAM, without a limit: the floor; always the first
    sluice      the plan, ring and page cache of this pack's Block Swap, on diffusers' modules
    group       diffusers' group offload: block by block on a stream of its own, from pinned memory
    group leaf  the same layer by layer
    mmgp        mmgp with pinned memory and asynchronous transfers; its budget is set to half, because it uses it twice
    flextensor  NVIDIA's FlexTensor in its memory mode, after the passes in which it profiles

`first result` counts from the network over the mapped file to the end of the first step. The file of the weights is
written to DIR when it is missing. diffusers must be installed, and for their rows mmgp (with optimum-quanto and
accelerate) and flextensor; a row that fails says why, and the others go on. Needs an NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import _children
import numpy as np
import torch

pack = types.ModuleType("pack")
pack.__path__ = [str(Path(__file__).resolve().parents[1])]
sys.modules["pack"] = pack

from pack.offload.blocks import find_blocks  # noqa: E402
from pack.offload.costs import SwapRequest  # noqa: E402
from pack.offload.files import StoredFile  # noqa: E402
from pack.offload.residency import Residency, Terms  # noqa: E402

PAGE = 4096
SLACK = 1.1  # of what a pass needs beside the weights: the allocator cannot use every byte
WARM_UP, STEPS = 9, 5  # FlexTensor profiles in the first of them, this pack plans anew
LISTS = ("transformer_blocks", "single_transformer_blocks")
Step = Callable[[], torch.Tensor]
report: dict[str, Any] = {}  # what the row that is set up says of itself


@dataclass(frozen=True)
class Room:
    """VRAM of a row, in bytes: all that torch's allocator may have, and what of it weights may take."""

    total: int
    weights: int

    @property
    def fraction(self) -> float:
        """`total` as a share of the GPU's memory."""
        return min(1.0, self.total / torch.cuda.get_device_properties(0).total_memory)


class Weights:
    """A file with the network's parameters, and networks over its mapping."""

    def __init__(self, path: Path, layers: tuple[int, int]) -> None:
        self._layers = layers
        offset, self._offsets = 0, {}
        for name, parameter in self._empty().named_parameters():
            self._offsets[name] = offset
            offset += -(-parameter.nbytes // PAGE) * PAGE
        self.nbytes = offset
        if not path.exists() or path.stat().st_size != offset:
            self._write(path)
        self._data = torch.from_file(str(path), shared=False, size=offset, dtype=torch.uint8)
        self._stored = StoredFile.of(path)

    def _empty(self) -> torch.nn.Module:
        from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

        double, single = self._layers
        with torch.device("meta"):
            made = FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True)
        return made.to(torch.bfloat16).eval().requires_grad_(False)

    def _write(self, path: Path) -> None:
        torch.manual_seed(0)
        with path.open("wb") as file:
            for name, parameter in self._empty().named_parameters():
                file.seek(self._offsets[name])
                scale = 0.5 if parameter.dim() < 2 else 0.6 / parameter.shape[-1] ** 0.5
                values = torch.randn(parameter.shape, device="cuda", dtype=torch.bfloat16) * scale
                file.write(values.cpu().reshape(-1).view(torch.uint8).numpy().data)
            file.truncate(self.nbytes)

    def network(self) -> torch.nn.Module:
        """A network whose parameters are the mapping."""
        network = self._empty()
        for name, parameter in list(network.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            start = self._offsets[name]
            view = self._data[start : start + parameter.nbytes].view(torch.bfloat16).view(parameter.shape)
            setattr(network.get_submodule(owner), leaf, torch.nn.Parameter(view, requires_grad=False))
        return network

    def located(self, tensor: torch.Tensor) -> tuple[StoredFile, int] | None:
        offset = tensor.data_ptr() - self._data.data_ptr()
        return (self._stored, offset) if 0 <= offset < self.nbytes else None


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    tokens = torch.arange(4096, device="cuda")
    places = torch.stack((torch.zeros_like(tokens), tokens // 64, tokens % 64), dim=1)
    return {
        "hidden_states": values(1, 4096, 64),
        "encoder_hidden_states": values(1, 512, 4096) * 0.1,
        "pooled_projections": values(1, 768) * 0.1,
        "timestep": torch.tensor([0.5], device="cuda", dtype=torch.bfloat16),
        "guidance": torch.tensor([3.5], device="cuda", dtype=torch.bfloat16),
        "img_ids": places.to(torch.bfloat16),
        "txt_ids": torch.zeros(512, 3, device="cuda", dtype=torch.bfloat16),
    }


@contextmanager
def resident(weights: Weights, room: Room) -> Iterator[torch.nn.Module]:
    yield weights.network().to("cuda")


@contextmanager
def sluice(weights: Weights, room: Room) -> Iterator[torch.nn.Module]:
    network = weights.network()
    residency = Residency(find_blocks(network), SwapRequest(min_free_vram_gb=0))
    terms = Terms(
        budget_bytes=room.weights,
        most_bytes=room.weights,
        pinned_budget_bytes=0,
        may_pin=True,
        located=weights.located,
        dtype_of=lambda module, name: None,
        account_pinned=lambda nbytes: None,
        patched_by_host=lambda slot: False,
    )
    residency.arrange(network, torch.device("cuda"), terms)
    residency.follow(residency)
    try:
        yield network
        report["plan"], report["source"] = str(residency.plan), residency.choice and residency.choice.reason
    finally:
        residency.unfollow()
        residency.leave()


def group(level: str) -> Callable[..., Any]:
    @contextmanager
    def rows(weights: Weights, room: Room) -> Iterator[torch.nn.Module]:
        from diffusers.hooks import apply_group_offloading

        network = weights.network()
        options = {"num_blocks_per_group": 1} if level == "block_level" else {}
        apply_group_offloading(
            network, torch.device("cuda"), torch.device("cpu"), level, non_blocking=True, use_stream=True,
            record_stream=True, **options,
        )  # fmt: skip
        yield network

    return rows


@contextmanager
def mmgp(weights: Weights, room: Room) -> Iterator[torch.nn.Module]:
    from mmgp import offload

    network = weights.network()
    running = offload.all(
        {"transformer": network}, pinnedMemory=True, quantizeTransformer=False, asyncTransfers=True,
        budgets={"transformer": room.weights / 2 / (1 << 20)},
    )  # fmt: skip
    try:
        yield network
    finally:
        running.release()
        torch.set_default_device(None)  # it sets one, and every call of torch would look at it


@contextmanager
def flextensor(weights: Weights, room: Room) -> Iterator[torch.nn.Module]:
    import flextensor as library

    network = weights.network()
    for name, child in network.named_children():
        if name not in LISTS:
            child.to("cuda")
    config = library.OffloadConfig(
        include_patterns=[f"{name}.*" for name in LISTS],
        max_gpu_mem_fraction=room.fraction,
        profiling_iters=3,
    )
    try:
        yield library.offload(network, config)
    finally:
        library.release(preserve_model=False)


ROWS: dict[str, Callable[..., Any]] = {
    "resident": resident,
    "sluice": sluice,
    "group": group("block_level"),
    "group leaf": group("leaf_level"),
    "mmgp": mmgp,
    "flextensor": flextensor,
}


def measure(name: str, weights: Weights, room: Room, given: dict[str, torch.Tensor]) -> dict[str, Any]:
    """One turn of one row."""
    torch.cuda.set_per_process_memory_fraction(1.0 if name == "resident" else room.fraction)
    torch.cuda.reset_peak_memory_stats()
    report.clear()
    began = time.perf_counter()
    with ROWS[name](weights, room) as network:
        times = []
        for number in range(WARM_UP + STEPS):
            started = time.perf_counter()
            result = network(**given, return_dict=False)[0]
            torch.cuda.synchronize()  # a sampler shows each step
            times.append((time.perf_counter() - started) * 1e3)
            if number == 0:
                ready = time.perf_counter() - began
        found = {
            "steps_ms": times[WARM_UP:],
            "first_s": ready,
            "peak_gb": torch.cuda.max_memory_reserved() / 1e9,
            "result": result.float().cpu(),
        }
        del network, result
    return {**found, **report}


def work(args: argparse.Namespace, weights: Path) -> None:
    """In a process of its own: write the file, or take one turn of one row."""
    with torch.inference_mode(False), torch.no_grad():
        stored = Weights(weights, tuple(args.layers))
        facts = {
            "hardware": f"{torch.cuda.get_device_name()}, torch {torch.__version__}",
            "weights_bytes": stored.nbytes,
        }
        if args.role == "row":
            total = int(args.share * stored.nbytes + args.beside * 1e9)
            turn = measure(args.rows[0], stored, Room(total, total - int(SLACK * args.need)), inputs())
            np.save(args.work / "result.npy", turn.pop("result").numpy())
            facts["turn"] = turn
    args.out.write_text(json.dumps(facts), encoding="utf-8")


def run_self(args: argparse.Namespace, role: str, *rows: str) -> dict[str, Any]:
    """What `work` says in a process of its own; RuntimeError with the end of its output where it says nothing."""
    answer = args.work / "answer.json"
    answer.unlink(missing_ok=True)
    layers = map(str, args.layers)
    command = [sys.executable, str(Path(__file__).resolve()), "--role", role, "--work", str(args.work), "--out"]
    command += [str(answer), "--share", str(args.share), "--beside", str(args.beside), "--need", str(args.need)]
    command += ["--layers", *layers, "--", *rows]
    try:
        done = _children.run(command, capture_output=True, text=True, errors="replace", timeout=args.limit)
    except subprocess.TimeoutExpired as late:
        said = late.output.decode(errors="replace") if isinstance(late.output, bytes) else late.output or ""
        raise RuntimeError(f"not done within {args.limit:.0f} s; {said[-600:]}") from late
    if not answer.exists():
        raise RuntimeError(f"exit status {done.returncode}; {(done.stdout + done.stderr)[-1500:]}")
    return json.loads(answer.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=list(ROWS))
    parser.add_argument("--work", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, nargs=2, default=(19, 38))
    parser.add_argument("--share", type=float, default=0.5, help="of the weights, that VRAM may hold")
    parser.add_argument("--beside", type=float, default=1.5, help="GB of VRAM beside that share (%(default)s)")
    parser.add_argument("--need", type=float, help="bytes that a pass takes beside the weights; else as it measures")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=float, default=300, help="seconds for one turn of a row (%(default)s)")
    parser.add_argument("--role", choices=("make", "row"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    _children.end_with_parent()
    weights = args.work / f"rivals-{args.layers[0]}-{args.layers[1]}.bin"
    if args.role:
        work(args, weights)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    measured, args.need = args.need is None, args.need or 0.0
    facts = run_self(args, "make")
    nbytes = facts["weights_bytes"]
    said = f"{nbytes / 1e9:.2f} GB of weights, {args.share * nbytes / 1e9 + args.beside:.2f} GB of VRAM"
    print(f"{facts['hardware']}; {args.layers} blocks, {said}", flush=True)
    found: dict[str, dict[str, Any]] = {name: {"turns": []} for name in ["resident", *args.rows]}
    expected = None
    for _ in range(args.rounds):
        for name, row in found.items():
            if "error" in row:
                continue
            try:
                turn = run_self(args, "row", name)["turn"]
            except RuntimeError as error:
                row["error"] = str(error)
                print(f"{name:12} failed: {error}", flush=True)
                continue
            if measured and name == "resident":
                args.need = turn["peak_gb"] * 1e9 - nbytes
            result = np.load(args.work / "result.npy", allow_pickle=False)
            expected = result if expected is None else expected
            turn["difference"] = float(np.linalg.norm(result - expected) / np.linalg.norm(expected))
            row["turns"].append(turn)
            print(
                f"{name:12} step {median(turn['steps_ms']):8.1f} ms  first result {turn['first_s']:5.1f} s  peak "
                f"{turn['peak_gb']:5.2f} GB  difference {turn['difference']:.1e}",
                *(turn[key] for key in ("plan", "source") if key in turn), sep="\n    ", flush=True,
            )  # fmt: skip
            write(args, facts, found)


def write(args: argparse.Namespace, facts: dict[str, Any], found: dict[str, dict[str, Any]]) -> None:
    """After each turn: a run that is ended early leaves what it has."""
    if args.out:
        asked = {"layers": args.layers, "share": args.share, "beside_gb": args.beside, "need_bytes": args.need}
        args.out.write_text(json.dumps({**facts, **asked, "rows": found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
