"""The demo's network, wider and deeper, all of its weights zero: it takes a while to read, and none to make."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType

CHUNK = 16 << 20
HEAD = 64  # the width is that many times the number of blocks
DEMO_BLOCKS = 4
DEMO_WIDTH = HEAD * DEMO_BLOCKS
# Outside the blocks: what is as wide as the network; the rest of a shape is that of texts, times and pictures.
OUTSIDE = {
    "context_embedder.weight": (1, None),
    "final_layer.adaLN_modulation.1.weight": (2, 1),
    "final_layer.adaLN_modulation.1.bias": (2,),
    "final_layer.linear.weight": (None, 1),
    "final_layer.linear.bias": (None,),
    "t_embedder.mlp.0.weight": (1, None),
    "y_embedder.mlp.0.weight": (1, None),
    "x_embedder.proj.weight": (1, None, None, None),
}


def write_wide_model(path: Path, demo: Path, blocks: int) -> int:
    """Write `path` with `blocks` blocks in float32, by the example of the demo's GGUF file; its size in bytes."""
    width = HEAD * blocks
    writer = gguf.GGUFWriter(path, "sd3")
    size = 0
    for name, shape in _shapes(demo, blocks, width):
        nbytes = 4 * prod(shape)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, GGMLQuantizationType.F32)
        size += -(-nbytes // writer.data_alignment) * writer.data_alignment
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    begin = -(-path.stat().st_size // writer.data_alignment) * writer.data_alignment
    with path.open("r+b") as file:
        file.seek(begin)
        for _ in range(0, size, CHUNK):  # written, because reading a hole takes no time
            file.write(bytes(CHUNK))
        file.truncate(begin + size)
        os.fsync(file.fileno())  # what is not on the disk yet is not dropped from the cache either
    return begin + size


def _shapes(demo: Path, blocks: int, width: int) -> list[tuple[str, tuple[int, ...]]]:
    found = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in gguf.GGUFReader(demo).tensors}
    shapes = []
    for name, shape in found.items():
        part, _, rest = name.removeprefix("joint_blocks.").partition(".")
        if not name.startswith("joint_blocks."):
            shapes.append((name, _outside(name, shape, width)))
            continue
        wide = tuple(n if n == HEAD else n // DEMO_WIDTH * width for n in shape)
        if part == "0":
            shapes += [(f"joint_blocks.{number}.{rest}", wide) for number in range(blocks - 1)]
        elif part == str(DEMO_BLOCKS - 1):
            shapes.append((f"joint_blocks.{blocks - 1}.{rest}", wide))
    return shapes


def _outside(name: str, shape: tuple[int, ...], width: int) -> tuple[int, ...]:
    times = OUTSIDE.get(name, tuple(1 for _ in shape))
    return tuple(n if factor is None else factor * width for n, factor in zip(shape, times, strict=True))
