"""How much a model of several files takes on the disk, told from the name of one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pack.loaders.gguf.splits import bytes_on_disk


@pytest.mark.parametrize("number", [1, 2, 3])
def test_all_parts_that_are_there_count(tmp_path: Path, number: int) -> None:
    for part, size in ((1, 10), (3, 1000)):
        (tmp_path / f"t5-Q8_0-{part:05d}-of-00003.gguf").write_bytes(bytes(size))
    (tmp_path / "t5-Q4_0-00002-of-00003.gguf").write_bytes(bytes(7))
    (tmp_path / "t5-Q8_0-00002-of-00004.gguf").write_bytes(bytes(7))
    assert bytes_on_disk(tmp_path / f"t5-Q8_0-{number:05d}-of-00003.gguf") == 1010


def test_any_other_file_counts_alone(tmp_path: Path) -> None:
    for name in ("clip_l.safetensors", "model-00001-of-3.gguf"):
        (tmp_path / name).write_bytes(bytes(5))
        assert bytes_on_disk(tmp_path / name) == 5
