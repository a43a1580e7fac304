"""Offload Mode and Release Memory as users meet them: the demo's workflow through the HTTP API of a real server."""

from __future__ import annotations

import io
import json
import re
import time
import urllib.request
from typing import Any

import numpy as np
import pytest
from pack.tools import demo
from pack.tools.server import PromptFailed, Server, Workflow
from PIL import Image

GGUF = demo.GGUF_FILES["Q8_0"]
LOADER, CLIP, PROMPT, NEGATIVE, LATENT, SAMPLER, VAE, DECODE, SAVE = "123456789"
MODE = "20"
MOVES = re.compile(r" (begins|leaves|comes back|stays out|(?:is )?released) \([\d.]+ (?:bytes?|[kMG]B)\): ")
LEAVES = re.compile(r"(text encoder|diffusion model|VAE) \(.*?\) leaves .*?(sampling|VAE \w+code|stage)")
BEGINS = re.compile(r"(text encoding|sampling|VAE decode) \(.*begins")
NO_ROOM = {"target_free_vram_gb": 1024.0}
MODES = ("none", "cond_only", "cond_diffusion", "aggressive", "layer_streaming")
# Who left, and for which stage or after which, for a picture that is the first one.
LEFT = {
    "none": [],
    "cond_only": [("text encoder", "sampling")],
    "cond_diffusion": [("text encoder", "sampling"), ("diffusion model", "VAE decode")],
    "aggressive": [("text encoder", "stage"), ("diffusion model", "stage"), ("VAE", "stage")],
    "layer_streaming": [("text encoder", "sampling"), ("diffusion model", "VAE decode")],
}


def workflow(mode: str | None = None, seed: int = 3, **dials: Any) -> Workflow:
    """The demo at the smallest size, through an Offload Mode node if there is a mode."""
    _, api = demo.prompt_for("red seven on white", GGUF, seed)
    api[LATENT]["inputs"].update(width=64, height=64)
    api[SAMPLER]["inputs"].update(steps=2)
    if mode is not None:
        inputs = {"mode": mode, "model": [LOADER, 0], "clip": [CLIP, 0], "vae": [VAE, 0], "log_events": True, **dials}
        api[MODE] = {"class_type": "SluiceOffloadMode", "inputs": inputs}
        users = ((SAMPLER, "model", 0), (PROMPT, "clip", 1), (NEGATIVE, "clip", 1), (DECODE, "vae", 2))
        for node, name, output in users:
            api[node]["inputs"][name] = [MODE, output]
    return api


def picture(server: Server, api: Workflow) -> np.ndarray:
    (png,) = server.images(server.queue(api))
    return np.asarray(Image.open(io.BytesIO(png)))


def events(server: Server, since: int) -> list[str]:
    """What the log says of stages after its first `since` bytes."""
    with server.log_path.open("rb") as log:
        log.seek(since)
        lines = log.read().decode(errors="replace").splitlines()
    return [line for line in lines if MOVES.search(line)]


def left(lines: list[str]) -> list[tuple[str, str]]:
    """Part and stage of every line that says that somebody left."""
    found = (LEAVES.search(line) for line in lines)
    return [(match[1], match[2]) for match in found if match]


def fresh(server: Server) -> int:
    """Nothing loaded and nothing cached; the log's length."""
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)  # the server does it between two prompts
    return server.log_path.stat().st_size


@pytest.fixture(scope="module")
def plain(demo_server: Server) -> dict[int, np.ndarray]:
    return {seed: picture(demo_server, workflow(seed=seed)) for seed in range(3, 6)}


@pytest.mark.parametrize("mode", MODES)
def test_same_picture_and_who_left_for_it(demo_server: Server, plain, mode: str) -> None:
    start = fresh(demo_server)
    dials = {**NO_ROOM, "reload_cond_stage": "off", "reload_diffusion": "off"}
    assert np.array_equal(picture(demo_server, workflow(mode, **dials)), plain[3])  # type: ignore[arg-type]
    lines = events(demo_server, start)
    assert left(lines) == LEFT[mode], lines
    begun = [match[1] for line in lines if (match := BEGINS.search(line))]
    stages = ["text encoding", "text encoding", "sampling", "VAE decode"]
    assert begun == ([] if mode == "none" else stages)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"{demo_server.url}/sluice/report", timeout=30) as answer:
        reported = json.load(answer)["events"][-len(lines) :] if lines else []
    assert len(reported) == len(lines)
    for one, line in zip(reported, lines, strict=True):
        assert f"{one['what']} {one['action']}" in line
    # A second run of the same prompt with other seeds: a queue.
    for seed in (4, 5, 3):
        assert np.array_equal(picture(demo_server, workflow(mode, seed, **dials)), plain[seed])


def test_nothing_moves_where_there_is_room(demo_server: Server, plain) -> None:
    start = fresh(demo_server)
    for mode in ("cond_only", "cond_diffusion", "layer_streaming"):
        assert np.array_equal(picture(demo_server, workflow(mode)), plain[3])
    assert left(events(demo_server, start)) == []


def test_it_comes_back_after_the_picture(demo_server: Server, plain) -> None:
    start = fresh(demo_server)
    dials = {**NO_ROOM, "reload_cond_stage": "on", "reload_diffusion": "on"}
    for seed in (3, 4):
        assert np.array_equal(picture(demo_server, workflow("cond_diffusion", seed, **dials)), plain[seed])
    back = [line for line in events(demo_server, start) if " comes back " in line]
    assert [("text encoder" in line, "diffusion model" in line) for line in back[:2]] == [(False, True), (True, False)]
    assert len(back) >= 3


def test_second_pass_over_the_decoded_picture(demo_server: Server) -> None:
    """As img2img and upscale passes: decode, encode, sample again with the same model, decode."""

    def twice(mode: str | None) -> Workflow:
        api = workflow(mode, **(NO_ROOM if mode else {}))  # type: ignore[arg-type]
        vae = api[DECODE]["inputs"]["vae"]
        api["30"] = {"class_type": "VAEEncode", "inputs": {"pixels": [DECODE, 0], "vae": vae}}
        again = {**api[SAMPLER]["inputs"], "latent_image": ["30", 0], "denoise": 0.6, "seed": 9}
        api["31"] = {"class_type": "KSampler", "inputs": again}
        api["32"] = {"class_type": "VAEDecode", "inputs": {"samples": ["31", 0], "vae": vae}}
        api[SAVE]["inputs"]["images"] = ["32", 0]
        return api

    expected = picture(demo_server, twice(None))
    for mode in ("cond_diffusion", "aggressive", "layer_streaming"):
        start = fresh(demo_server)
        assert np.array_equal(picture(demo_server, twice(mode)), expected), mode
        if mode == "cond_diffusion":
            stages = [stage for part, stage in left(events(demo_server, start)) if part == "diffusion model"]
            assert stages == ["VAE decode", "VAE decode"]


@pytest.mark.parametrize("how", ["offload", "dispose"])
@pytest.mark.parametrize("what", ["text_encoder", "diffusion_model", "caches", "all"])
def test_release_memory_in_a_workflow(demo_server: Server, plain, what: str, how: str) -> None:
    """After the sampler, on the LATENT; it runs each time, and the next prompt loads again."""
    for seed in (3, 4, 4):
        api = workflow(seed=seed)
        inputs = {"anything": [SAMPLER, 0], "what": what, "how": how}
        api["40"] = {"class_type": "SluiceReleaseMemory", "inputs": inputs}
        api[DECODE]["inputs"]["samples"] = ["40", 0]
        start = demo_server.log_path.stat().st_size
        assert np.array_equal(picture(demo_server, api), plain[seed])
        released = [line for line in events(demo_server, start) if "Release Memory" in line]
        if what in ("diffusion_model", "all") and seed == 3:
            wanted = "its file is closed" if how == "dispose" else "Release Memory"
            assert any("SD3 " in line and wanted in line for line in released), released
        if what in ("caches", "all"):
            assert any("caches released" in line for line in released), released


@pytest.mark.parametrize("dial", [{"mode": "gentle"}, {"target_free_vram_gb": -1.0}, {"reload_diffusion": "maybe"}])
def test_wrong_values_are_refused_at_the_node(demo_server: Server, dial: dict) -> None:
    api = workflow("cond_only")
    api[MODE]["inputs"].update(dial)
    with pytest.raises(PromptFailed) as failed:
        demo_server.queue(api)
    assert list(failed.value.node_errors) == [MODE] and next(iter(dial)) in failed.value.node_errors[MODE]
