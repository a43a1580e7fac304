"""Importing the pack costs its own modules and nothing else: no GPU, no Triton, no file, no thread, no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pack.tools.versions import HOSTS

SCRIPT = Path(__file__).with_name("import_pack.py")

# A pack that does everything that ours must not.
GREEDY = """
import threading, pathlib
try:
    import triton.nonsense
except ImportError:
    pass
from . import outsider_user
pathlib.Path(__file__).with_name("note.txt").write_text("hello")
pathlib.Path(__file__).with_name("cache").mkdir()
waiting = threading.Event()
threading.Thread(target=waiting.wait, daemon=True).start()

class Extension:
    async def get_node_list(self):
        return []

async def comfy_entrypoint():
    return Extension()
"""


@pytest.fixture(scope="module", params=HOSTS)
def imported(run_in_host, request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(run_in_host(SCRIPT, version=request.param).splitlines()[-1])


def test_it_has_nodes(imported: dict[str, Any]) -> None:
    assert imported["nodes"]
    assert {"nodes.load_diffusion_model", "offload.costs"} <= set(imported["modules_of_ours"])


def test_it_imports_nothing_that_the_host_has_not(imported: dict[str, Any]) -> None:
    assert set(imported["modules_from_outside"]) <= {"comfy", "comfy_execution"}  # of the host itself
    assert imported["asked_for"] == []
    assert not [name for name in imported["modules_of_ours"] if "kernels" in name]


def test_it_touches_nothing(imported: dict[str, Any]) -> None:
    assert imported["opened"] == []
    assert imported["events"] == []
    assert imported["new_threads"] == 0
    assert not imported["cuda"]


def test_it_is_small(imported: dict[str, Any]) -> None:
    """0.04 s on two cores; what makes an import slow is what it imports, and that can be counted."""
    assert len(imported["modules_of_ours"]) < 45
    assert "offload.attach" not in imported["modules_of_ours"]
    heavy = ("quant.", "quantize", "tokenizer", "residency", "gather")
    assert [name for name in imported["modules_of_ours"] if any(word in name for word in heavy)] == []


def test_the_watch_sees_what_it_watches_for(run_in_host, tmp_path: Path) -> None:
    files = {"__init__.py": GREEDY, "outsider_user.py": "import this_outsider", "this_outsider.py": ""}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    start = f"import sys, runpy; sys.path.append({str(tmp_path)!r}); sys.argv[1:] = [{str(tmp_path)!r}]\n"
    done = run_in_host(start + f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')")
    found = json.loads(done.splitlines()[-1])
    assert found["modules_from_outside"] == ["this_outsider"]
    assert {name.split(".")[0] for name in found["asked_for"]} == {"triton"}
    assert found["opened"] == [str(tmp_path / "note.txt")]
    assert found["events"] == ["os.mkdir"]
    assert found["new_threads"] == 1
