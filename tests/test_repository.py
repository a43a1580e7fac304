"""The repository as it is published: metadata that agrees, files that every system can hold, nothing of one machine."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it for Python 3.10

ROOT = Path(__file__).resolve().parents[1]
MAX_BYTES = 25_000_000
BINARY = {".safetensors", ".png", ".gguf"}
PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"}

# What must not be in a published file. In pieces, for this file is published too.
FOREIGN = {
    "a package registry's host": re.compile(r"pypi\." + r"org|python" + r"hosted"),
    "an absolute path of one machine": re.compile(
        r"(?<![\w.~-])/(?:work|root|home|Users|mnt|tmp)" + r"/|[A-Z]:\\" + r"Users"
    ),
    "an address with a password": re.compile(r"https?://[^/\s:@]+:[^/\s@]+" + "@"),
    "a page that is not part of the repository": re.compile(
        r"\bshared/(?:des" + r"ign|lab)\b|\b(?:contract|baselines|comfyui-internals|streaming-and-kernels)" + r"\.md\b"
    ),
}

# How Windows and macOS see a path.
RESERVED = re.compile(r"^(con|prn|aux|nul|com\d|lpt\d)$", re.IGNORECASE)


def published() -> list[str]:
    """Every file that is tracked or would be: what git lists, or everything in a copy without git."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode == 0:
        names = set(listed.stdout.decode().split("\0")) - {""}
        return sorted(name for name in names if (ROOT / name).is_file())
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()} | {".git"}
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return sorted(path.as_posix() for path in files if not ignored & set(path.parts))


def foreign(text: str) -> list[str]:
    return [what for what, pattern in FOREIGN.items() if pattern.search(text)]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# --- metadata


def test_comfy_registry_gets_what_it_asks_for(project: dict[str, Any]) -> None:
    comfy = project["tool"]["comfy"]
    assert comfy["PublisherId"]
    assert comfy["DisplayName"] == "ComfyUI-Sluice"
    assert re.fullmatch(r">=0\.18(\.0)?", comfy["requires-comfyui"])
    assert "web" not in comfy  # WEB_DIRECTORY serves it; both would serve it twice
    assert re.fullmatch(r"[a-z0-9-]+", project["project"]["name"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert project["project"]["requires-python"] == ">=3.10"
    assert project["project"]["description"]
    for file in (project["project"]["license"]["file"], project["project"]["readme"]):
        assert (ROOT / file).is_file()


def test_requirements_are_the_projects_and_never_torch(project: dict[str, Any]) -> None:
    required = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert required == project["project"]["dependencies"]
    assert [re.split(r"[<>=!~]", line)[0] for line in required] == ["gguf", "numpy", "psutil"]


def test_readme_installs_from_the_projects_address(project: dict[str, Any]) -> None:
    assert f"git clone {project['project']['urls']['Repository']}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_changelog_begins_with_what_comes_next(project: dict[str, Any]) -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first = re.findall(r"^## (.+)$", text, re.MULTILINE)[0]
    assert first == "Unreleased" or first.startswith(project["project"]["version"])
    assert project["project"]["version"] in text


def test_licence_is_apache_2_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert " ".join(text.split()).startswith("Apache License Version 2.0, January 2004 http://www.apache.org/licenses/")
    for section in ("1. Definitions.", "9. Accepting Warranty", "END OF TERMS AND CONDITIONS", "APPENDIX"):
        assert section in text


# --- files


def test_no_file_is_too_large() -> None:
    assert [name for name in published() if (ROOT / name).stat().st_size > MAX_BYTES] == []


def test_no_file_is_a_pickle() -> None:
    assert [name for name in published() if PurePosixPath(name).suffix in PICKLES] == []


def test_every_system_can_hold_the_files() -> None:
    names = published()
    assert [name for name, count in Counter(name.lower() for name in names).items() if count > 1] == []
    assert [name for name in names if re.search(r'[<>:"|?*\\]|[. ](/|$)', name) or len(name) > 120] == []
    assert [n for n in names if any(RESERVED.match(part.split(".")[0]) for part in n.split("/"))] == []


def test_nothing_of_one_machine_is_published() -> None:
    texts = {name: (ROOT / name).read_bytes() for name in published() if PurePosixPath(name).suffix not in BINARY}
    found = {name: foreign(text.decode("utf-8", "replace")) for name, text in texts.items()}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "text",
    [
        "see /wo" + "rk/main/x.py",
        "open('/ro" + "ot/.cache')",
        'Path("/tm' + 'p/x")',
        r"C:\Us" + r"ers\me",
        "--index-url https://pyp" + "i.org/simple",
        "https://files.python" + "hosted.org/",
        "https://me:secret" + "@host/",
        "as shared/des" + "ign says",
        "see contra" + "ct.md",
    ],
)
def test_what_is_foreign_is_found(text: str) -> None:
    assert len(foreign(text)) == 1


@pytest.mark.parametrize("text", ["demo/work/x", "~/work/x", "homes/x", "https://example.org/root/x", "the contract"])
def test_what_is_not_foreign_is_left_alone(text: str) -> None:
    assert foreign(text) == []
