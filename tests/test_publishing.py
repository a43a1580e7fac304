"""What the registry and ComfyUI-Manager get: complete metadata, few requirements, an archive without our tools, and
nothing in it that talks to anybody."""

from __future__ import annotations

import ast
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from layers import sources
from pack.tools.versions import HOSTS, NEEDED_MODULES

ROOT = Path(__file__).resolve().parents[1]
RAW = "https://raw.githubusercontent.com/comfyui-sluice/ComfyUI-Sluice/main/"
# Modules that open connections. The report's route is answered by the host's own server.
TALKING = {"socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "ftplib", "smtplib", "websockets"}
TALKING |= {"huggingface_hub", "aiohttp.client", "asyncio.streams", "webbrowser", "subprocess"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def published() -> list[Path]:
    """The archive of `comfy node publish`: the files that git tracks, less .comfyignore."""
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    ignored = [line for line in (ROOT / ".comfyignore").read_text().splitlines() if line and line[0] != "#"]

    def kept(name: str) -> bool:
        return not any(name.startswith(line) if line.endswith("/") else fnmatch(name, line) for line in ignored)

    return [Path(name) for name in done.stdout.splitlines() if kept(name) and (ROOT / name).exists()]


def test_metadata_keeps_the_registrys_rules(project: dict[str, Any]) -> None:
    """docs.comfy.org/registry/specifications"""
    about, comfy = project["project"], project["tool"]["comfy"]
    assert re.fullmatch(r"[a-zA-Z](?:[._-]?[a-zA-Z0-9])*", about["name"])
    assert len(about["name"]) < 100
    assert re.fullmatch(r"\d+\.\d+\.\d+", about["version"])
    assert (ROOT / about["license"]["file"]).exists()
    assert {"Repository", "Documentation", "Bug Tracker"} <= set(about["urls"])
    assert comfy["PublisherId"]
    assert comfy["DisplayName"] == about["urls"]["Repository"].rpartition("/")[2]
    assert "web" not in comfy, "__init__.py names it, and ComfyUI would serve it twice"


def test_the_changelog_knows_the_version(project: dict[str, Any]) -> None:
    assert project["project"]["version"] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_icon_is_a_picture_of_the_repository(project: dict[str, Any]) -> None:
    url = project["tool"]["comfy"]["Icon"]
    icon = (ROOT / url.removeprefix(RAW)).read_text(encoding="utf-8")
    match = re.match(r'<svg [^>]*width="(\d+)" height="(\d+)"', icon)
    assert match, "it is no SVG with a size"
    assert int(match[1]) <= 800
    assert int(match[2]) <= 400  # the registry's limits


def test_it_asks_for_the_oldest_comfyui_that_is_tested(project: dict[str, Any]) -> None:
    oldest = min(HOSTS, key=lambda version: [int(part) for part in version.split(".")])
    assert project["tool"]["comfy"]["requires-comfyui"] == f">={oldest.rpartition('.')[0]}.0"


def test_requirements_are_few_and_the_same_everywhere(project: dict[str, Any]) -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert sorted(lines) == sorted(project["project"]["dependencies"])
    names = {re.split(r"[^\w-]", line)[0] for line in lines}
    assert names == {"gguf", "numpy", "psutil"}
    assert names <= set(NEEDED_MODULES["run"])


def test_the_archive_has_all_that_comfyui_reads_and_none_of_our_tools() -> None:
    files = published()
    top = {path.parts[0] for path in files}
    assert {"__init__.py", "requirements.txt", "pyproject.toml", "README.md", "LICENSE", "nodes", "loaders"} <= top
    assert {"lora", "offload", "web", "locales", "example_workflows", "docs"} <= top
    assert top.isdisjoint({"tests", "tools", "demo", "benchmarks", "dev.py", ".ci"})
    assert sum((ROOT / path).stat().st_size for path in files) < 5_000_000


def test_every_line_of_comfyignore_leaves_something_out() -> None:
    lines = [line for line in (ROOT / ".comfyignore").read_text().splitlines() if line and line[0] != "#"]
    assert [line for line in lines if not (ROOT / line).exists()] == []


def talks(tree: ast.AST) -> set[str]:
    """The modules of TALKING that a file imports, wherever it does."""
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name in TALKING or name.split(".")[0] in TALKING}


def test_nothing_in_the_pack_can_open_a_connection() -> None:
    assert {source.path: found for source in sources(ROOT) if (found := talks(source.tree))} == {}
    assert talks(ast.parse("def f():\n    from urllib import request\n    import http.client")) == {
        *("urllib", "urllib.request", "http.client"),
    }


def test_the_web_part_loads_nothing_from_elsewhere() -> None:
    scripts = [path for path in (ROOT / "web").rglob("*") if path.suffix in {".js", ".css", ".html"}]
    outside = re.compile(r"""(?:from|import|url|fetch|src|href)\s*[(=]?\s*["'`]?\s*(?:https?:)?//""")
    assert [path.name for path in scripts if outside.search(path.read_text(encoding="utf-8"))] == []
    assert outside.search('import { a } from "https://cdn.example/x.js"')
