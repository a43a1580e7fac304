"""Long work shows in the bar of the node that runs, Cancel ends it in the middle, and the next prompt finds all whole.

Through a server's websocket, as a browser sees it. The server has a slow disk: reads of a megabyte and more take a
while there, and what is in the system's cache is read at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from host.listener import Listener
from host.test_save_gguf import saving
from host.wide_models import write_wide_model
from pack.tools import demo, host
from pack.tools.server import Server, Workflow
from safetensors.torch import load_file, save_file

NAME, OTHER, BLOCKS = "wide.gguf", "other.gguf", 6  # 0.13 GB
LORA, RANK = "wide.safetensors", 4096  # 0.14 GB, much more than is under way when reading is cancelled
SAMPLER, STEPS, SAVER, LORA_LOADER = "6", 1, "3", "30"
SLOW_DISK = """
import os, time

read = os.preadv


def slow(descriptor, buffers, offset, flags=0):
    if not flags and len(buffers[0]) >= 1 << 20:
        time.sleep(0.4)
    return read(descriptor, buffers, offset, flags)


os.preadv = slow
NODE_CLASS_MAPPINGS = {}
"""


@pytest.fixture(scope="module")
def slow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not hasattr(os, "RWF_NOWAIT"):
        pytest.skip("this system does not tell what of a file it has cached")
    base = tmp_path_factory.mktemp("slow")
    (base / "custom_nodes" / "slow_disk").mkdir(parents=True)
    (base / "custom_nodes" / "slow_disk" / "__init__.py").write_text(SLOW_DISK)
    found = host.find()
    demo.prepare_models(found)
    demo.copy_models(base / "models")
    folder = base / "models" / "diffusion_models"
    for name in (NAME, OTHER):
        write_wide_model(folder / name, folder / demo.GGUF_FILES["Q8_0"], BLOCKS)
    write_wide_lora(base / "models" / "loras" / LORA, base / "models" / "loras" / "demo_lora.safetensors")
    with Server(found, base, "--cpu") as running:
        yield running


def write_wide_lora(path: Path, narrow: Path) -> None:
    """The same LoRA with more ranks, which are zero."""
    wide = {}
    for name, tensor in load_file(narrow).items():
        if tensor.dim() == 2:
            rank = tensor.shape.index(min(tensor.shape))
            wider = [RANK if axis == rank else length for axis, length in enumerate(tensor.shape)]
            tensor = torch.zeros(wider, dtype=tensor.dtype)
        wide[name] = tensor
    save_file(wide, path)


@pytest.fixture
def listener(slow_server: Server) -> Iterator[Listener]:
    with Listener(slow_server) as listening:
        yield listening


def prompt(model: str, seed: int) -> Workflow:
    workflow = demo.prompt_for("red seven on white", model, seed)[1]
    workflow[SAMPLER]["inputs"].update(steps=STEPS, cfg=1.0)
    workflow["5"]["inputs"].update(width=64, height=64)
    return workflow


def forget(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # what is not written yet stays cached
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def of_bytes(progress: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of reading, not of steps."""
    return [(value, most) for value, most in progress if most > 1000]


def test_reading_a_cold_model_shows_and_is_cancelled(slow_server: Server, listener: Listener) -> None:
    file = slow_server.models_dir / "diffusion_models" / NAME
    forget(file)
    first = listener.queue(prompt(NAME, seed=1))
    listener.wait_for(lambda kind, data: kind == "progress" and data["max"] > 1000)
    slow_server.post("/interrupt", {})
    assert listener.wait_for_end(first) == "execution_interrupted"
    (*_, (value, total)) = of_bytes(listener.progress(first, SAMPLER))
    assert 0 < value < total <= file.stat().st_size, "it was read to its end all the same"

    # Another model works, and has nothing to show: it is small and was read before.
    second = listener.queue(prompt(demo.GGUF_FILES["Q8_0"], seed=2))
    assert listener.wait_for_end(second) == "execution_success"
    assert listener.progress(second, SAMPLER) and not of_bytes(listener.progress(second, SAMPLER))

    # So does the same one, from where it was broken off.
    third = listener.queue(prompt(NAME, seed=3))
    assert listener.wait_for_end(third) == "execution_success"
    rest = of_bytes(listener.progress(third, SAMPLER))
    assert rest and all(most < total for _, most in rest), "what was read is not read again"
    assert rest[-1][0] == rest[-1][1], "the bar ends full"


def test_reading_for_longer_is_told_in_words(slow_server: Server, listener: Listener) -> None:
    forget(slow_server.models_dir / "diffusion_models" / OTHER)
    assert listener.wait_for_end(listener.queue(prompt(OTHER, seed=4))) == "execution_success"
    texts = listener.texts(SAMPLER)
    assert all(text.startswith(f"reading {OTHER}: ") for text in texts)
    assert re.fullmatch(r".*: [\d.]+ MB of 1\d\d\.\d MB, [\d.]+ MB/s, \d+ s left", texts[0]), texts
    assert re.fullmatch(r".*: 1\d\d\.\d MB in [\d.]+ s \([\d.]+ MB/s\)", texts[-1]), texts


def test_reading_a_cold_lora_shows_and_is_cancelled(slow_server: Server, listener: Listener) -> None:
    file = slow_server.models_dir / "loras" / LORA
    workflow = prompt(demo.GGUF_FILES["Q8_0"], seed=5)
    inputs = {"lora_name": LORA, "strength_model": 1.0, "model": ["1", 0]}
    workflow[LORA_LOADER] = {"class_type": "SluiceLoraLoader", "inputs": inputs}
    workflow[SAMPLER]["inputs"]["model"] = [LORA_LOADER, 0]
    forget(file)
    first = listener.queue(workflow)
    listener.wait_for(lambda kind, data: kind == "progress" and data["max"] > 1000)
    slow_server.post("/interrupt", {})
    assert listener.wait_for_end(first) == "execution_interrupted"
    (*_, (value, total)) = of_bytes(listener.progress(first, LORA_LOADER))
    assert 0 < value < total <= file.stat().st_size, "it was read to its end all the same"

    second = listener.queue(workflow)
    assert listener.wait_for_end(second) == "execution_success"
    rest = of_bytes(listener.progress(second, LORA_LOADER))
    assert rest and all(most < total for _, most in rest), "what was read is not read again"
    assert rest[-1][0] == rest[-1][1], "the bar ends full"


def test_saving_shows(slow_server: Server, listener: Listener) -> None:
    prompt_id = listener.queue(saving("Q4_K_S", "shown/x"))
    assert listener.wait_for_end(prompt_id) == "execution_success"
    shown = listener.progress(prompt_id, SAVER)
    assert len(shown) > 1 and [value for value, _ in shown] == sorted(value for value, _ in shown)
    assert shown[-1][0] == shown[-1][1] > 1_000_000
