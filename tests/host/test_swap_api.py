"""Block Swap as users meet it: workflows with its nodes, queued through the HTTP API of a real server."""

from __future__ import annotations

import itertools
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from pack.tools import demo
from pack.tools.server import PromptFailed, Server, Workflow
from safetensors.numpy import load_file

GGUF, PLAIN = demo.GGUF_FILES["Q8_0"], "demo_mmdit.safetensors"
LORA = "demo_lora.safetensors"
LOADER, CONFIG, APPLY, LORA_NODE, SAMPLER, SAVE = "1", "2", "3", "4", "5", "6"
EVERYTHING = {"blocks_to_swap": 4}
FIXED_SEED = 1 << 41
names = itertools.count()


def workflow(
    model: str = GGUF,
    dials: dict | None = None,
    by: str = "apply",
    lora: str = "",
    seed: int = FIXED_SEED,
    steps: int = 2,
) -> Workflow:
    """Two steps at the smallest size, ending in a latent file of its own.

    Args:
        dials: of Block Swap Config; None is a workflow without Block Swap.
        by: whether the loader ("loader") or Apply Block Swap ("apply") is given them.
        lora: "before" or "after" Block Swap is applied, or not at all.
    """
    gguf = model.endswith(".gguf")
    loader = {"model_name": model} if gguf else {"unet_name": model, "weight_dtype": "default"}
    nodes: dict[str, tuple[str, dict]] = {
        LOADER: ("SluiceDiffusionModelLoader" if gguf else "UNETLoader", loader),
        "10": ("CLIPLoader", {"clip_name": Path(demo.TEXT_ENCODER).name, "type": "sd3", "device": "default"}),
        "11": ("CLIPTextEncode", {"clip": ["10", 0], "text": "red seven on white"}),
        "12": ("EmptySD3LatentImage", {"width": 64, "height": 64, "batch_size": 1}),
    }
    last = LOADER
    order = ["lora", "swap"] if lora == "before" else ["swap", "lora"]
    for part in order:
        if part == "swap" and dials is not None:
            nodes[CONFIG] = ("SluiceBlockSwapConfig", {"vram_budget_gb": 0.0, **dials})
            if by == "loader":
                loader["block_swap"] = [CONFIG, 0]  # type: ignore[assignment]
            else:
                nodes[APPLY] = ("SluiceApplyBlockSwap", {"model": [last, 0], "block_swap": [CONFIG, 0]})
                last = APPLY
        elif part == "lora" and lora:
            inputs = {"model": [last, 0], "lora_name": LORA, "strength_model": 1.0}
            nodes[LORA_NODE] = ("LoraLoaderModelOnly", inputs)
            last = LORA_NODE
    nodes[SAMPLER] = (
        "KSampler",
        {
            **{"model": [last, 0], "positive": ["11", 0], "negative": ["11", 0], "latent_image": ["12", 0]},
            **{
                "seed": seed,
                "steps": steps,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        },
    )
    nodes[SAVE] = ("SaveLatent", {"samples": [SAMPLER, 0], "filename_prefix": f"swap/{next(names)}"})
    return {node: {"class_type": kind, "inputs": inputs} for node, (kind, inputs) in nodes.items()}


def latent(server: Server, *args, **kwargs) -> np.ndarray:
    saved = server.queue(workflow(*args, **kwargs))[SAVE]["latents"][0]
    return load_file(server.output_dir / saved["subfolder"] / saved["filename"])["latent_tensor"]


def failure(server: Server, node: str, *args, **kwargs) -> str:
    """What the error box of `node` shows; afterwards a sound workflow runs."""
    with pytest.raises(PromptFailed) as failed:
        server.queue(workflow(*args, **kwargs))
    assert list(failed.value.node_errors) == [node], failed.value
    assert np.isfinite(latent(server, GGUF, EVERYTHING)).all()
    return failed.value.node_errors[node]


@pytest.fixture(scope="module")
def expected(demo_server: Server) -> dict[tuple[str, bool], np.ndarray]:
    """Without Block Swap, by file and whether the LoRA is on."""
    return {
        (model, bool(lora)): latent(demo_server, model, lora=lora) for model in (GGUF, PLAIN) for lora in ("", "after")
    }


@pytest.mark.parametrize("lora", ["", "before", "after"])
@pytest.mark.parametrize(("model", "by"), [(GGUF, "loader"), (GGUF, "apply"), (PLAIN, "apply")])
def test_latent_is_that_without_block_swap(demo_server: Server, expected, model: str, by: str, lora: str) -> None:
    if by == "loader" and lora == "before":
        pytest.skip("the loader comes first")
    for dials in (EVERYTHING, {"blocks_to_swap": 2, "prefetch_blocks": 0}, {"weight_source": "disk", **EVERYTHING}, {}):
        assert np.array_equal(latent(demo_server, model, dials, by, lora), expected[model, bool(lora)]), dials
    assert np.array_equal(latent(demo_server, model), expected[model, False])


def test_runs_one_after_another(demo_server: Server) -> None:
    seeds = range(3)
    without = [latent(demo_server, seed=seed) for seed in seeds]
    assert not np.array_equal(without[0], without[1])
    for seed in (*seeds, *seeds):  # the model stays loaded
        assert np.array_equal(latent(demo_server, GGUF, EVERYTHING, "loader", seed=seed), without[seed])
    demo_server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1)  # the server does it between two prompts
    for seed in seeds:
        assert np.array_equal(latent(demo_server, GGUF, EVERYTHING, "loader", seed=seed), without[seed])


def test_cancelled_and_run_again(demo_server: Server, expected) -> None:
    for delay in (0.3, 0.6, 1.0):

        def cancel(delay: float = delay) -> None:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and not demo_server.get("/queue")["queue_running"]:
                time.sleep(0.02)
            time.sleep(delay)
            demo_server.post("/interrupt", {})

        canceller = threading.Thread(target=cancel)
        canceller.start()
        with pytest.raises(PromptFailed):
            demo_server.queue(workflow(GGUF, EVERYTHING, "loader", seed=next(names), steps=2000))
        canceller.join()
        assert np.array_equal(latent(demo_server, GGUF, EVERYTHING, "loader"), expected[GGUF, False])


@pytest.mark.parametrize("model", [GGUF, PLAIN])
def test_too_small_a_budget_names_one_that_works(demo_server: Server, expected, model: str) -> None:
    message = failure(demo_server, SAMPLER, model, {"vram_budget_gb": 0.001})
    assert "Block Swap: the weights may take 1.0 MB of VRAM, but need" in message
    found = re.search(r"raise vram_budget_gb to ([\d.]+) GB", message)
    assert found, message
    assert np.array_equal(latent(demo_server, model, {"vram_budget_gb": float(found[1])}), expected[model, False])


def test_more_blocks_than_there_are(demo_server: Server) -> None:
    message = failure(demo_server, SAMPLER, GGUF, {"blocks_to_swap": 40})
    assert "blocks_to_swap is 40, but this model has 4 blocks. Choose 0 to 4, or -1" in message


@pytest.mark.parametrize("dials", [{"vram_budget_gb": -1.0}, {"prefetch_blocks": 41}, {"blocks_to_swap": -2}])
def test_values_out_of_range_are_refused_at_their_node(demo_server: Server, dials: dict) -> None:
    message = failure(demo_server, CONFIG, GGUF, dials)
    assert next(iter(dials)) in message


def test_unknown_source_is_refused_at_its_node(demo_server: Server) -> None:
    assert "weight_source" in failure(demo_server, CONFIG, GGUF, {"weight_source": "tape"})


def test_file_that_is_replaced_is_loaded_anew(demo_server: Server, expected) -> None:
    folder = demo_server.models_dir / "diffusion_models"
    path = folder / "replaced.gguf"
    shutil.copy(folder / GGUF, path)
    try:
        assert np.array_equal(latent(demo_server, path.name, EVERYTHING, "loader"), expected[GGUF, False])
        other = demo.GGUF_FILES["Q4_0"]
        shutil.copy(folder / other, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        found = latent(demo_server, path.name, EVERYTHING, "loader")
        assert np.array_equal(found, latent(demo_server, other)) and not np.array_equal(found, expected[GGUF, False])
        with path.open("r+b") as file:  # the same file, written to
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(PromptFailed) as failed:
            demo_server.queue(workflow(path.name, EVERYTHING, "loader", seed=1))
        assert "download" in str(failed.value)
    finally:
        path.unlink(missing_ok=True)
    assert np.array_equal(latent(demo_server, GGUF, EVERYTHING, "loader"), expected[GGUF, False])
