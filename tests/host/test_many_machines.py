"""docs/many_machines.md works as pasted: two servers, one model folder, one queue."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from pack.tools import demo
from pack.tools.host import ROOT
from pack.tools.server import Server
from pack.tools.versions import HOSTS
from PIL import Image

PAGE = (ROOT / "docs" / "many_machines.md").read_text(encoding="utf-8")
URLS = ("http://127.0.0.1:8188", "http://127.0.0.1:8189")
MODEL = demo.GGUF_FILES["Q8_0"]
SEEDS = range(8)


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture(scope="module")
def servers(demo_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """The first has the models, the second has the page's yaml."""
    base = tmp_path_factory.mktemp("second")
    paths = base / "extra_model_paths.yaml"
    shared = block("yaml")
    assert "/srv/models" in shared
    paths.write_text(shared.replace("/srv/models", demo_server.models_dir.as_posix()))
    with Server(demo_server.host, base, "--cpu", "--extra-model-paths-config", str(paths)) as second:
        yield demo_server, second


def run(folder: Path, *urls: str) -> dict[int, str]:
    """Run the page's script; which server drew which seed."""
    script = block("python")
    for documented, url in zip(URLS, urls, strict=True):
        assert documented in script
        script = script.replace(documented, url)
    (folder / "demo").mkdir(parents=True)
    shutil.copy(ROOT / "demo" / "demo_workflow_api.json", folder / "demo")
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {int(seed): url for seed, url in re.findall(r"^seed (\d+) on (\S+): success$", done.stdout, re.MULTILINE)}


def pictures(folder: Path) -> dict[int, np.ndarray]:
    found = {path: re.match(r"seed(\d+)-", path.name) for path in folder.glob("*.png")}
    return {int(match[1]): np.asarray(Image.open(path)) for path, match in found.items() if match}


def test_two_servers_draw_what_one_draws(servers: tuple[Server, Server], tmp_path: Path) -> None:
    first, second = servers
    drawn = run(tmp_path / "two", first.url, second.url)
    assert sorted(drawn) == list(SEEDS) and set(drawn.values()) == {first.url, second.url}
    # A server that is not there gives its picture to the other.
    assert set(run(tmp_path / "one", first.url, "http://127.0.0.1:9").values()) == {first.url}
    ours, theirs = pictures(tmp_path / "two"), pictures(tmp_path / "one")
    assert sorted(ours) == sorted(theirs) == list(SEEDS)
    assert all(np.array_equal(ours[seed], theirs[seed]) for seed in SEEDS)
    assert not np.array_equal(ours[0], ours[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_files_bytes_are_in_memory_once(servers: tuple[Server, Server]) -> None:
    _, prompt = demo.prompt_for("red seven on white", MODEL)
    mapped = []
    for server in servers:
        server.queue(prompt)
        mapped.append(mapping(server))
    size = (servers[0].models_dir / "diffusion_models" / MODEL).stat().st_size
    for one in map(mapping, servers):
        assert one.rss > 0.5 * size, "the model was not used"
        assert one.anonymous == one.private_dirty == 0, "a copy of its own"
        assert one.shared_clean > 0.9 * one.rss, "not the other's pages"


def mapping(server: Server):
    """The mapping of the model's file in a server's process."""
    assert server.process is not None
    found = psutil.Process(server.process.pid).memory_maps(grouped=True)
    (one,) = [entry for entry in found if entry.path.endswith(f"/{MODEL}")]
    return one


@pytest.mark.parametrize("version", HOSTS)
def test_the_second_servers_options_exist(run_in_host: Callable[..., str], version: str) -> None:
    command = block("bash").split()
    assert command[:2] == ["python", "main.py"]
    script = """
import sys
given = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
from comfy.cli_args import parser
found = parser.parse_args(given)
print(found.port, found.cuda_device, found.output_directory, found.temp_directory, found.database_url)
"""
    told = run_in_host(script, *command[2:], version=version)
    assert told.split() == ["8189", "1", "output2", "temp2", "sqlite:///:memory:"]
