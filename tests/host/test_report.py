"""`/sluice/report`, the Memory Report node and the event `sluice.memory` in a running server tell the same truth."""

from __future__ import annotations

import asyncio
import io
import json
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import aiohttp
import numpy as np
import pytest
from pack.loaders.gguf.reader import GGUFFile
from pack.tools import demo
from pack.tools.host import ROOT
from pack.tools.server import Server
from PIL import Image

FILE = demo.GGUF_FILES["Q8_0"]
BUDGET_GB = 0.01  # the demo's weights take 0.0113
SWAP = {"class_type": "SluiceBlockSwapConfig", "inputs": {"vram_budget_gb": BUDGET_GB}}
# What goes on changing while nothing runs, or tells when it was told.
VOLATILE = ("time_ms", "host_ram", "vram", "prompt", "timeline")


def workflow(streamed: bool, seed: int, steps: int = 8, label: str = "after sampling") -> dict[str, Any]:
    """The demo with a Memory Report after the sampler and one after the decoder."""
    _, api = demo.prompt_for("red seven on white", FILE, seed)
    api["6"]["inputs"]["steps"] = steps
    if streamed:
        api["20"] = SWAP
        api["1"]["inputs"]["block_swap"] = ["20", 0]
    api["21"] = {"class_type": "SluiceMemoryReport", "inputs": {"anything": ["6", 0], "label": label}}
    api["22"] = {"class_type": "SluiceMemoryReport", "inputs": {"anything": ["8", 0]}}
    api["8"]["inputs"]["samples"] = ["21", 0]
    return api


def ask(server: Server) -> dict[str, Any]:
    """The route's answer, which must be JSON in the strict sense: no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"the report holds {constant}")

    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"{server.url}/sluice/report", timeout=30) as answer:
        return json.loads(answer.read(), parse_constant=refuse)


def lasting(report: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name not in VOLATILE}


def demo_model(report: dict[str, Any]) -> dict[str, Any]:
    (model,) = [model for model in report["models"] if model["name"] == FILE]
    return model


def unload(server: Server) -> None:
    if not ask(server)["models"]:
        return  # the server would do it after the next prompt
    server.post("/free", {"unload_models": True, "free_memory": True})
    deadline = time.monotonic() + 30
    while ask(server)["models"]:
        assert time.monotonic() < deadline, "the models were not unloaded"
        time.sleep(0.05)


class Listener:
    """The events of one client of the websocket, while the `with` block runs."""

    def __init__(self, server: Server, client: str = "sluice") -> None:
        self._url = f"{server.url}/ws?clientId={client}"
        self.events: list[dict[str, Any]] = []
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._listen()))

    async def _listen(self) -> None:
        self._stop = asyncio.Event()
        async with aiohttp.ClientSession() as session, session.ws_connect(self._url, max_msg_size=0) as socket:
            stopping = asyncio.ensure_future(self._stop.wait())
            while not stopping.done():
                receiving = asyncio.ensure_future(socket.receive())
                await asyncio.wait({receiving, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if not receiving.done():
                    receiving.cancel()
                    return
                self._ready.set()  # the server speaks first
                if receiving.result().type is aiohttp.WSMsgType.TEXT:
                    message = json.loads(receiving.result().data)
                    if message["type"] == "sluice.memory":
                        self.events.append(message["data"])

    def __enter__(self) -> Listener:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module", params=[False, True], ids=["resident", "streamed"])
def run(request, demo_server: Server) -> Iterator[dict[str, Any]]:
    """One prompt: what its nodes gave, the events meanwhile, and the route's answer afterwards."""
    unload(demo_server)
    with Listener(demo_server) as listener:
        outputs = demo_server.queue(workflow(request.param, seed=31 + request.param))
        time.sleep(1)  # events are told late rather than never
        after = ask(demo_server)
    yield {
        "streamed": request.param,
        "outputs": outputs,
        "events": listener.events,
        "after": after,
        "nodes": [outputs[node]["sluice"][0] for node in ("21", "22")],
        "pictures": [demo_server.images({"": outputs[node]})[0] for node in ("21", "22")],
    }
    unload(demo_server)


def test_route_node_and_event_say_the_same(run) -> None:
    """The last node ran after all work was done, the last event came after that."""
    at_node, told = run["nodes"][1], run["events"][-1]
    assert lasting(at_node) == lasting(run["after"]) == lasting(told)
    assert told["timeline"] == run["after"]["timeline"] and told["prompt"] == run["after"]["prompt"]
    count = len(at_node["timeline"]["samples"])
    assert at_node["timeline"]["samples"] == run["after"]["timeline"]["samples"][:count]
    assert not told["prompt"]["running"] and at_node["prompt"]["running"]


def test_bytes_are_those_of_the_file(run, demo_server: Server) -> None:
    model = demo_model(run["after"])
    with GGUFFile(demo_server.models_dir / "diffusion_models" / FILE) as file:
        sizes = {name: info.nbytes for name, info in file.tensors.items()}
        types = {info.ggml_type.name for info in file.tensors.values()}
        large = {name: info.nbytes for name, info in file.tensors.items() if len(info.shape) > 1}
    assert model["quant_types"].keys() == types and sum(model["quant_types"].values()) == sum(sizes.values())
    assert model["architecture"] == "sd3" and model["kind"] == "diffusion_model" and model["class"] == "SD3"
    assert model["files"] == [
        {
            "name": FILE,
            "bytes": (demo_server.models_dir / "diffusion_models" / FILE).stat().st_size,
            "state": "there",
        }
    ]
    # Beside the file's tensors there are the sampler's few constants, and biases may be cast to another type.
    assert model["bytes"]["total"] == pytest.approx(sum(sizes.values()), rel=0.01)
    assert [block["name"] for block in model["blocks"]] == [f"joint_blocks.{i}" for i in range(4)]
    for block in model["blocks"]:
        ours = sum(nbytes for name, nbytes in large.items() if f"{block['name']}." in name)
        assert block["bytes"] == pytest.approx(ours, rel=0.02) and block["bytes"] > 0


def test_bytes_divide_into_parts(run) -> None:
    for report in (*run["nodes"], run["after"]):
        for model in report["models"]:
            parts = model["bytes"]
            assert all(isinstance(value, int) and value >= 0 for value in parts.values())
            assert parts["total"] == sum(parts[part] for part in ("resident", "streamed", "on_disk", "in_ram"))
    assert {model["kind"] for model in run["after"]["models"]} == {"diffusion_model", "text_encoder", "vae"}
    names = {model["kind"]: model["name"] for model in run["after"]["models"]}
    assert names["text_encoder"] == demo.TEXT_ENCODER.rpartition("/")[2]


def test_a_streamed_model_is_within_its_budget(run) -> None:
    model = demo_model(run["after"])
    if not run["streamed"]:
        assert model["managed_by"] == "comfyui" and model["bytes"]["streamed"] == 0
        assert all(b["resident_bytes"] == b["bytes"] and not b["streamed_bytes"] for b in model["blocks"])
        assert model["plan"] is model["source"] is model["last_step"] is None
        return
    assert model["managed_by"] == "sluice" and model["bytes"]["streamed"] > 0
    assert model["plan"]["vram_bytes"] <= model["plan"]["budget_bytes"] == BUDGET_GB * 1e9
    assert model["bytes"]["resident"] + model["bytes"]["ring"] == pytest.approx(model["plan"]["vram_bytes"], rel=0.01)
    assert sum(block["streamed_bytes"] for block in model["blocks"]) == model["bytes"]["streamed"]
    assert model["source"]["kind"] in model["source"]["reason"]
    # Of 8 steps, the first is none that followed another. A plan that was made anew in between starts at nothing.
    assert (model["passes"], model["misses"]) == (7, 0) or (model["plans_made"] > 1 and 0 < model["passes"] < 7)


def test_the_last_step_is_measured(run) -> None:
    after = run["after"]
    assert 0 < after["prompt"]["step_ms"] < 60_000
    if run["streamed"]:
        step = demo_model(after)["last_step"]
        assert 0 < step["compute_ms"] < 60_000 and 0 < step["ms"] < 60_000
        assert step["bound_by"] == ("copy" if step["copy_ms"] > step["compute_ms"] else "compute")


def test_the_timeline_covers_the_prompt(run) -> None:
    timeline = run["after"]["timeline"]
    stages = [mark["stage"] for mark in timeline["marks"] if mark["stage"]]
    assert stages.index("encode") < stages.index("sample") < stages.index("decode")
    assert [mark["label"] for mark in timeline["marks"] if mark["label"]] == ["after sampling", "report"]
    times = [row[0] for row in timeline["samples"]]
    assert times == sorted(times) and len(times) >= 10 and times[0] < 500
    assert all(mark["ms"] <= times[-1] for mark in timeline["marks"])
    for row in timeline["samples"]:
        assert row[1:3] == [None, None]  # a CPU has no VRAM
        assert 50e6 < row[3] < 64e9 and 1e6 < row[4] < 64e9
    assert timeline["peak"]["ram_anonymous"] == max(row[3] for row in timeline["samples"])


def test_ram_is_the_servers(run, demo_server: Server) -> None:
    ram = ask(demo_server)["host_ram"]
    assert ram["resident"] == ram["anonymous"] + ram["file"] + ram["shared"]
    peak = demo_server.peak_memory_bytes()
    assert peak is not None and 0.2 * peak < ram["resident"] <= 1.05 * peak < ram["total"]


def test_events_are_throttled(run) -> None:
    made = [event["time_ms"] for event in run["events"]]
    assert len(made) >= 2
    assert min(later - earlier for earlier, later in pairwise(made)) >= 495  # 500, less what rounding takes


def test_the_node_passes_through_and_shows_text_and_plot(run) -> None:
    said = run["outputs"]["21"]["text"][0]
    weights = demo_model(run["nodes"][0])["bytes"]
    assert said.startswith("Memory: after sampling\n") and f"{weights['total'] / 1e6:.1f} MB" in said
    assert ("streamed each pass" in said) == run["streamed"]
    for png in run["pictures"]:
        picture = np.asarray(Image.open(io.BytesIO(png)))
        assert picture.shape == (384, 768, 3) and picture.std() > 10
    assert run["outputs"]["9"]["images"]  # what is behind the nodes was made


def test_measuring_changes_no_pixel(run, demo_server: Server) -> None:
    api = workflow(run["streamed"], seed=31 + run["streamed"])
    for node in ("21", "22"):
        del api[node]
    api["8"]["inputs"]["samples"] = ["6", 0]
    unload(demo_server)  # so that it samples anew
    pictures = [demo_server.images({"": one["9"]})[0] for one in (run["outputs"], demo_server.queue(api))]
    measured, plain = (np.asarray(Image.open(io.BytesIO(png))) for png in pictures)
    assert np.array_equal(measured, plain) and measured.std() > 10


def test_without_a_model(demo_server: Server) -> None:
    unload(demo_server)
    report = ask(demo_server)
    assert report["models"] == [] and report["host_ram"]["resident"] > 0
    api = {
        "1": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "2": {"class_type": "SluiceMemoryReport", "inputs": {"anything": ["1", 0], "label": str(time.time())}},
    }
    outputs = demo_server.queue(api)
    assert "no model is loaded" in outputs["2"]["text"][0] and outputs["2"]["sluice"][0]["models"] == []


def test_answers_while_a_prompt_runs(demo_server: Server) -> None:
    """Asked again and again in the middle of sampling, it is sound each time, and sees the work go on."""
    body = {"prompt": workflow(True, seed=99, steps=2000), "client_id": "sluice"}
    prompt = demo_server.post("/prompt", body)["prompt_id"]

    def until(enough: Callable[[dict], bool]) -> list[dict]:
        """Every answer, the last of which is `enough`."""
        found = [ask(demo_server)]
        deadline = time.monotonic() + 60
        while not enough(found[-1]):
            assert time.monotonic() < deadline
            time.sleep(0.02)
            found.append(ask(demo_server))
        return found

    def at_step(count: int) -> Callable[[dict], bool]:
        return lambda report: bool(report["prompt"]) and report["prompt"]["step"] >= count

    try:
        until(lambda report: at_step(1)(report) and report["prompt"]["id"] == prompt)
        during = until(at_step(20))
        for report in during:
            assert report["prompt"]["id"] == prompt and report["prompt"]["running"]
            assert (report["prompt"]["stage"], report["prompt"]["node"]) == ("sample", "6")
            parts = demo_model(report)["bytes"]
            assert parts["total"] == parts["resident"] + parts["streamed"]
        assert demo_model(during[-1])["passes"] > demo_model(during[0])["passes"]
        model = demo_model(until(lambda report: demo_model(report)["current_block"] is not None)[-1])
        assert model["current_block"] in range(len(model["blocks"]))
    finally:
        demo_server.post("/interrupt", {})
    after = until(lambda report: not report["prompt"]["running"])[-1]
    assert demo_model(after)["current_block"] is None and after["prompt"]["node"] is None
    unload(demo_server)


def test_loras_and_their_cache(demo_server: Server) -> None:
    unload(demo_server)
    before = ask(demo_server)
    for seed in (61, 62):  # the second finds the file read
        api = workflow(False, seed=seed, steps=2, label=str(seed))
        inputs = {"model": ["1", 0], "lora_name": "demo_lora.safetensors", "strength_model": 0.5 + seed / 1000}
        api["30"] = {"class_type": "SluiceLoraLoader", "inputs": inputs}
        api["6"]["inputs"]["model"] = ["30", 0]
        outputs = demo_server.queue(api)
    report = outputs["22"]["sluice"][0]
    (lora,) = demo_model(report)["loras"]
    assert (lora["name"], lora["strength"], lora["way"]) == ("demo_lora.safetensors", 0.562, "auto")
    patches = demo_model(report)["patches"]
    assert lora["weights"] == patches["at_use"] + patches["by_comfyui"] > 0
    assert 0 < lora["bytes"] <= (ROOT / "demo" / "demo_lora.safetensors").stat().st_size
    old, new = ({cache["name"]: cache for cache in one["caches"]}["loras"] for one in (before, report))
    read = new["misses"] - old["misses"]  # 0 where an earlier test of this server left it in the cache
    assert new["hits"] - old["hits"] + read == 2 and read <= 1 and new["entries"] >= 1
    assert 0 < new["bytes"] <= new["bound_bytes"]
    assert f"LoRA demo_lora.safetensors at 0.562 (auto): {lora['weights']} weights" in outputs["22"]["text"][0]
    unload(demo_server)


# --- docs/report.md


def fields(value: Any, place: str = "") -> set[str]:
    """Every field of a report as the documentation names it."""
    if isinstance(value, dict):
        inner = {f"{place}.{name}".lstrip("."): part for name, part in value.items()}
        free = place.endswith("quant_types")
        return set() if free else set(inner) | {name for at, part in inner.items() for name in fields(part, at)}
    if isinstance(value, list):
        return {name for part in value for name in fields(part, f"{place}[]")}
    return set()


TYPES: dict[str, Any] = {
    "integer": int,
    "number": (int, float),
    "string": str,
    "boolean": bool,
    "object": dict,
    "array": list,
}


def values(report: Any, path: list[str]) -> list[Any]:
    if report is None or not path:
        return [report] if not path else []
    name, *rest = path
    inside = report[name.removesuffix("[]")]
    return [found for part in (inside if name.endswith("[]") else [inside]) for found in values(part, rest)]


def test_every_field_is_documented_with_its_type(run) -> None:
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.\[\]]+)` \| ([\w ]+) \|", page, re.MULTILINE))
    report = run["after"]
    assert fields(report) <= rows.keys()
    if run["streamed"]:  # then all there is is there, except for GPUs, and for what other tests of the server leave
        absent = rows.keys() - fields(report)
        assert {field.split("[]")[0] for field in absent} <= {"vram", "models", "events"}
        assert {field for field in absent if field.startswith("models")} <= {
            f"models[].loras[].{name}" for name in ("name", "strength", "way", "weights", "bytes")
        }
    for field, kind in rows.items():
        allowed = kind.split(" or ")
        for value in values(report, field.split(".")):
            if value is None:
                assert "null" in allowed, field
            else:
                assert any(isinstance(value, TYPES[one]) for one in allowed if one != "null"), (field, value)
