"""The pack keeps its layers, and the checker that says so (layers.py) finds every kind of breach."""

from __future__ import annotations

from pathlib import Path

import pytest
from layers import INTERNALS_FILE, MAX_LINES, OUTSIDE, layer_of, sources, violations

ROOT = Path(__file__).resolve().parents[1]

SOUND = {
    "__init__.py": "from comfy_api.latest import io\n\n\ndef get():\n    from .nodes.load import Load\n",
    "nodes/__init__.py": "",
    "nodes/load.py": "import folder_paths\nfrom ..loaders.model import load\nfrom . import files\n",
    "nodes/files.py": "import os\n",
    "loaders/__init__.py": "",
    "loaders/model.py": "import logging\nfrom . import compat\nfrom .quant.dispatch import go\n"
    'log = logging.getLogger("sluice.loaders")\ncompat.cast_bias_weight(1)\n',
    "loaders/compat.py": "import comfy.ops\ncomfy.ops.cast_bias_weight\nx._v = 1\n",
    "loaders/quant/__init__.py": "",
    "loaders/quant/dispatch.py": "import torch\nfrom ..gguf import types\nfrom .kernels import launch\n",
    "loaders/quant/layout.py": "import comfy_kitchen\n",
    "loaders/quant/kernels/__init__.py": "",
    "loaders/quant/kernels/launch.py": "import triton.language as tl\nfrom ...gguf.types import A\n",
    "loaders/gguf/__init__.py": "",
    "loaders/gguf/types.py": "import enum\nimport numpy\n",
    "lora/apply.py": "import comfy.lora\nfrom ..loaders.quant.layout import is_gguf\n",
    "offload/plan.py": "import psutil\n",
    "tools/other.py": "import nonsense\nprint(1)\n",
}

# A file, what it must not hold, and a part of what is said about it.
BREACHES = [
    ("loaders/gguf/types.py", "import torch", "standard library and numpy only"),
    ("loaders/gguf/types.py", "from ..quant import dispatch", "arrows point down only"),
    ("loaders/gguf/types.py", "from .. import model", "arrows point down only"),
    ("loaders/gguf/types.py", "def f():\n    import torch", "standard library and numpy only"),
    ("loaders/quant/dispatch.py", "from ..model import load", "arrows point down only"),
    ("loaders/quant/dispatch.py", "import comfy.ops", "imports comfy.ops, which only"),
    ("loaders/quant/dispatch.py", "from comfy_kitchen.tensor import QuantizedTensor", "which only"),
    ("loaders/quant/dispatch.py", "try:\n    import triton\nexcept ImportError:\n    triton = None", "imports triton"),
    ("loaders/quant/kernels/launch.py", "from ....nodes import load", "arrows point down only"),
    ("loaders/model.py", "import comfy.sd", "imports comfy.sd, which only"),
    ("loaders/model.py", "from ..lora import apply", "arrows point down only"),
    ("loaders/model.py", "from ..nodes.load import Load", "arrows point down only"),
    ("loaders/model.py", "from ..tools import other", "no part of a layer"),
    ("loaders/model.py", "from .. import tests", "no part of a layer"),
    ("loaders/model.py", "from loaders.quant import dispatch", "relative"),
    ("loaders/model.py", "import pack.loaders.quant", "relative"),
    ("loaders/model.py", "import requests", "not among the pack's dependencies"),
    ("loaders/model.py", "x._v", "uses the host's _v"),
    ("loaders/model.py", 'getattr(x, "_prefetch")', "names the host's _prefetch"),
    ("loaders/model.py", "x._comfy_tensor_file_slice = 1", "uses the host's _comfy_tensor_file_slice"),
    ("loaders/model.py", 'print("loaded")', "prints"),
    ("loaders/model.py", "logging.basicConfig()", "configures logging"),
    ("loaders/model.py", "logging.getLogger(__name__)", "logger whose name"),
    ("loaders/model.py", 'logging.getLogger("sluicegate")', "logger whose name"),
    ("loaders/model.py", "logging.getLogger()", "logger whose name"),
    ("loaders/model.py", "x = 1\n" * MAX_LINES, f"over {MAX_LINES}"),
    ("loaders/utils.py", "x = 1", "says nothing"),
    ("loaders/__init__.py", "x = 1", "not empty"),
    ("nodes/load.py", "from comfy.ops import _private", "imports the host's _private"),
    ("nodes/load.py", "import comfy.ops\ncomfy.ops.cast_bias_weight", "uses the host's cast_bias_weight"),
    ("lora/apply.py", "from ..loaders import model", "arrows point down only"),
    ("lora/apply.py", "from ..offload import plan", "arrows point down only"),
    ("lora/read.py", "import comfy.lora", "imports comfy.lora, which only"),
    ("offload/plan.py", "from ..loaders.gguf import types", "arrows point down only"),
    ("offload/plan.py", "import comfy.model_management", "which only"),
    ("__init__.py", "from .loaders import model", "arrows point down only"),
]


def write(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return root


def test_the_pack_keeps_every_rule() -> None:
    assert violations(ROOT) == []


def test_every_file_of_the_pack_is_looked_at() -> None:
    paths = {source.path for source in sources(ROOT)}
    assert {"__init__.py", "nodes/load_diffusion_model.py", "loaders/gguf/types.py", INTERNALS_FILE} <= paths
    assert not [path for path in paths if path.startswith(("tests", "tools", "benchmarks", "demo", "."))]


def test_files_that_rules_name_exist() -> None:
    """A rule about a file that was renamed would allow, or forbid, nothing."""
    planned = {"loaders/text_encoder.py", "lora", "lora/apply.py", "offload", "offload/attach.py"}
    places = {place for allowed in OUTSIDE.values() for place in allowed} | {INTERNALS_FILE}
    assert [place for place in sorted(places - planned) if not (ROOT / place).exists()] == []


def test_a_sound_tree_has_no_violations(tmp_path: Path) -> None:
    assert violations(write(tmp_path, SOUND)) == []


@pytest.mark.parametrize(("path", "breach", "said"), BREACHES)
def test_a_breach_is_found(tmp_path: Path, path: str, breach: str, said: str) -> None:
    found = violations(write(tmp_path, SOUND | {path: f"{SOUND.get(path, '')}{breach}\n"}))
    assert len(found) == 1, found
    assert found[0].startswith(f"{path}:")
    assert said in found[0]


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("__init__.py", ""),
        ("nodes/load.py", "nodes"),
        ("loaders/ops.py", "loaders"),
        ("loaders/quantity.py", "loaders"),
        ("loaders/quant/kernels/iq.py", "loaders/quant"),
        ("loaders/gguf/types.py", "loaders/gguf"),
    ],
)
def test_the_longest_folder_is_a_files_layer(path: str, layer: str) -> None:
    assert layer_of(path) == layer
