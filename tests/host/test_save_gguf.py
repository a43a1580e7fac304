"""Saving what is loaded as GGUF in the real host: what is saved is what is loaded again, bit for bit.

What needs the host's classes is in save_checks.py; here they are run, and the node is queued on a server.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import gguf
import pytest
from pack.loaders.gguf.reader import GGUFFile
from pack.tools import demo, host
from pack.tools.gpu_checks import checks_of
from pack.tools.server import PromptFailed, Server, Workflow
from pack.tools.to_gguf import RECIPES, convert
from pack.tools.versions import HOSTS
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).with_name("save_checks.py")
CHECKS = checks_of(SCRIPT)
SOURCE = demo.DEMO / "demo_mmdit.safetensors"


@pytest.fixture(scope="module")
def outcomes(run_in_host, tmp_path_factory: pytest.TempPathFactory):
    """Run all checks in one host once, when the first of them is asked for."""
    folder = tmp_path_factory.mktemp("saved")
    convert(SOURCE, folder / "demo.gguf", "sd3", RECIPES["Q4_0"])
    save_file({name: tensor.float() for name, tensor in load_file(SOURCE).items()}, folder / "demo.safetensors")
    shutil.copy(demo.DEMO / "demo_lora.safetensors", folder / "lora.safetensors")
    demo.prepare_models(host.find())
    done: dict[str, dict[str, str]] = {}

    def outcome(version: str, check: str) -> str:
        if version not in done:
            text_encoder = demo.MODELS / demo.TEXT_ENCODER
            lines = run_in_host(SCRIPT, str(folder), str(text_encoder), version=version).splitlines()
            results = [json.loads(line) for line in lines if line.startswith('{"check"')]
            done[version] = {r["check"]: r["failure"] for r in results}
        return done[version][check]

    return outcome


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("version", HOSTS)
def test_in_host(outcomes, version: str, check: str) -> None:
    failure = outcomes(version, check)
    assert not failure, failure


SAVED_AS = {
    **{"sd15": "sd1", "sdxl": "sdxl", "flux2": "flux", "qwen_image": "qwen_image", "z_image": "lumina2"},
    **{
        "wan21_i2v": "wan",
        "wan21_metadata_config": "wan",
        "ltxv": "ltxv",
        "hunyuan_video": "hyvid",
        "hidream": "hidream",
    },
}


@pytest.fixture(scope="module")
def architectures(run_in_host, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    script = SCRIPT.with_name("save_architectures.py")
    printed = run_in_host(script, str(tmp_path_factory.mktemp("tiny")), *SAVED_AS)
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"architecture"')]
    return {line["architecture"]: line for line in lines}


@pytest.mark.parametrize("name", SAVED_AS)
def test_a_model_of_every_kind_comes_back(architectures: dict[str, dict], name: str) -> None:
    """Convolutions, five dimensions, parameters that are no layer's, `config` in the metadata."""
    found = architectures[name]
    assert "error" not in found, found["error"]
    assert found["architecture_in_file"] == SAVED_AS[name]
    assert len(set(found["families"])) == 1
    assert "Q4_K" in found["types"] or "Q5_0" in found["types"]
    assert found["difference"] == 0
    assert 1e-5 < found["distance"] < 0.3


# --- the node


def saving(quant_type: str, filename: str, parts: tuple[str, ...] = ("model",), **inputs: object) -> Workflow:
    """Core's loaders into Save GGUF."""
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": SOURCE.name, "weight_dtype": "default"}},
        "2": {
            "class_type": "CLIPLoader",
            "inputs": {"clip_name": Path(demo.TEXT_ENCODER).name, "type": "sd3", "device": "default"},
        },
        "3": {
            "class_type": "SluiceSaveGGUF",
            "inputs": {
                "filename": filename,
                "quant_type": quant_type,
                **{part: [{"model": "1", "clip": "2"}[part], 0] for part in parts},
                **inputs,
            },
        },
    }


def test_saved_files_are_where_the_loaders_look(demo_server: Server) -> None:
    written = demo_server.queue(saving("Q5_K_M", "mine/demo", ("model", "clip"), overrides="adaLN=Q8_0"))["3"]["text"]
    model, clip = (Path(path) for path in written)
    assert model == demo_server.output_dir / "diffusion_models" / "mine" / "demo-Q5_K_M_00001_.gguf"
    assert clip == demo_server.output_dir / "clip" / "mine" / "demo-clip_l-Q5_K_M_00001_.gguf"
    with GGUFFile(model) as file:
        types = {name: info.ggml_type.name for name, info in file.tensors.items()}
    assert types["joint_blocks.1.x_block.adaLN_modulation.1.weight"] == "Q8_0"
    assert types["joint_blocks.1.x_block.attn.proj.weight"] == "Q5_K"
    loader = demo_server.object_info()["SluiceDiffusionModelLoader"]["input"]["required"]["model_name"]
    names = loader[0] if isinstance(loader[0], list) else loader[1]["options"]
    assert str(Path("mine", model.name)) in names
    again = demo_server.queue(saving("Q5_K_M", "mine/demo", device="cpu"))["3"]["text"]
    assert again == [str(model.with_name("demo-Q5_K_M_00002_.gguf"))]


def test_a_picture_from_a_saved_model(demo_server: Server, tmp_path: Path) -> None:
    (path,) = demo_server.queue(saving("Q6_K", "picture"))["3"]["text"]
    picture = demo.draw(demo_server, demo.PROMPTS[0], Path(path).name, tmp_path)
    assert picture.path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (saving("Q4_0", "x", ()), "there is nothing to save: connect a model, a clip, or both"),
        (saving("Q4_0", "x", overrides="img_mod"), "'img_mod' does not say PATTERN=TYPE"),
        (saving("Q4_0", "../../x"), "outside the output folder"),
    ],
)
def test_what_cannot_be_saved_is_said_in_the_nodes_box(demo_server: Server, prompt: Workflow, message: str) -> None:
    with pytest.raises(PromptFailed) as failed:
        demo_server.queue(prompt)
    assert message in failed.value.node_errors["3"]


def test_cancel_leaves_nothing(demo_server: Server) -> None:
    folder = demo_server.output_dir / "diffusion_models" / "cancelled"
    body = {"prompt": saving("IQ1_S", "cancelled/x"), "client_id": "sluice"}
    prompt_id = demo_server.post("/prompt", body)["prompt_id"]
    while not list(folder.glob("*.partial")):
        assert prompt_id not in demo_server.get(f"/history/{prompt_id}"), "it ended before it could be cancelled"
        time.sleep(0.01)
    demo_server.post("/interrupt", {})
    while not (entry := demo_server.get(f"/history/{prompt_id}").get(prompt_id)):
        time.sleep(0.05)
    assert "execution_interrupted" in [event for event, _ in entry["status"]["messages"]]
    assert not list(folder.iterdir())


# --- python dev.py convert


def run_convert(*args: object) -> subprocess.CompletedProcess[str]:
    found = host.find()
    command = found.command(host.ROOT / "tools" / "convert.py", *map(str, args))
    return subprocess.run(command, env=found.env(), capture_output=True, text=True, timeout=300)


def test_convert_writes_beside_its_source(tmp_path: Path) -> None:
    source = Path(shutil.copy(SOURCE, tmp_path / "demo.safetensors"))
    done = run_convert(source, "--type", "Q3_K_M", "--set", "fc1=Q8_0", "--list")
    assert done.returncode == 0, done.stderr
    target = tmp_path / "demo-Q3_K_M.gguf"
    assert done.stdout.splitlines()[-1].startswith(f"{target}: ")
    assert re.search(
        r"^Q8_0 +1024x256  joint_blocks.0.x_block.mlp.fc1.weight  \(asked for\)$", done.stdout, re.MULTILINE
    )
    fields = gguf.GGUFReader(target).fields
    assert [fields[f"general.{key}"].contents() for key in ("architecture", "name", "license", "file_type")] == [
        "sd3",
        "digits demo MMDiT",
        "CC0-1.0",
        12,
    ]
    again = run_convert(source, "--type", "Q3_K_M")
    assert again.returncode == 1
    assert again.stderr.strip() == f"convert: {target} exists; choose another name, or add --force to replace it"
    assert run_convert(source, target, "--type", "Q8_0", "--arch", "sd3", "--force").returncode == 0
    assert gguf.GGUFReader(target).fields["general.file_type"].contents() == 7


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_convert_that_is_ended_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, str(host.ROOT / "dev.py"), "convert", "--", str(SOURCE), str(tmp_path / "x.gguf")]
    options = ["--type", "IQ1_S", "--arch", "sd3"]
    # A shell that runs the tests in the background has them, and what they start, ignore Ctrl-C.
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, preexec_fn=listening) as process:
        while not list(tmp_path.iterdir()):
            assert process.poll() is None, "it ended before it could be ended"
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert process.stderr is not None
        told = process.stderr.read().decode()
    assert not list(tmp_path.iterdir())
    assert ("convert: interrupted, nothing was written" in told) == (number is signal.SIGINT)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("demo_lora.safetensors", (), "ComfyUI knows no diffusion model with these tensors"),
        ("README.md", (), "README.md: it is no safetensors file"),
        ("missing.safetensors", (), "missing.safetensors: it cannot be read"),
        ("demo_mmdit.safetensors", ("--set", "x"), "'x' does not say PATTERN=TYPE"),
    ],
)
def test_convert_says_what_is_wrong(tmp_path: Path, source: str, options: tuple[str, ...], message: str) -> None:
    done = run_convert(demo.DEMO / source, tmp_path / "x.gguf", *options)
    assert done.returncode == 1
    assert done.stderr.startswith("convert: ")
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
