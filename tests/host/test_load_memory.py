"""Loading a model takes no memory of its own and reads no weights, whatever the model's size."""

from __future__ import annotations

import json
import sys

import pytest

LIMIT = 100e6

# The first load also pays for what the host imports late, the second shows what size costs.
LOAD = """
import gc, json, sys
from pathlib import Path
from pack.benchmarks.load_memory import Memory, start_host

folder = Path(sys.argv[1])
start_host()
from gguf import GGMLQuantizationType
from pack.benchmarks import _model_files
from pack.loaders.diffusion import load_diffusion_model

kind = GGMLQuantizationType.Q4_K
for double_blocks, single_blocks in ((1, 2), (8, 18)):
    path = folder / f"{double_blocks}.gguf"
    size = _model_files.write(path, kind, "flux", _model_files.flux(double_blocks, single_blocks), sparse=True)
    gc.collect()
    before = Memory.now()
    model = load_diffusion_model(path)
    after = Memory.now()
    weights = sum(p.nbytes for p in model.model.diffusion_model.parameters())
    added = {"anonymous": after.anonymous - before.anonymous, "file": after.file - before.file}
    print(json.dumps({"size": size, "weights": weights, **added}))
"""


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory, run_in_host) -> list[dict[str, int]]:
    folder = tmp_path_factory.mktemp("load_memory")
    try:
        printed = run_in_host(LOAD, str(folder))
    finally:
        for path in folder.iterdir():
            path.unlink()
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


@pytest.mark.skipif(sys.platform == "win32", reason="the files are sparse; Windows would write all of them")
def test_loading_adds_little_memory(loads: list[dict[str, int]]) -> None:
    small, large = loads
    assert large["size"] > 3e9 > 6 * small["size"]
    for load in loads:
        assert load["weights"] > 0.99 * load["size"], "the model's weights are not those of the file"
        assert load["anonymous"] < LIMIT, load
        assert load["file"] < LIMIT, f"loading read weights: {load}"
