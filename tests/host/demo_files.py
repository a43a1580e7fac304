"""The files that the check scripts run on: `python demo_files.py FOLDER`, or `write(folder)`.

The demo model as Q4_0/Q5_1 (`demo.gguf`), the same numbers in float32 (`demo.safetensors`), and its LoRA.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
from pack.tools.demo import DEMO
from pack.tools.to_gguf import RECIPES, convert
from safetensors.numpy import save_file


def write(folder: Path) -> Path:
    convert(DEMO / "demo_mmdit.safetensors", folder / "demo.gguf", "sd3", RECIPES["Q4_0"])
    reader = gguf.GGUFReader(folder / "demo.gguf")
    dense = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        dense[tensor.name] = np.ascontiguousarray(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        )
    save_file(dense, folder / "demo.safetensors")
    shutil.copy(DEMO / "demo_lora.safetensors", folder / "lora.safetensors")
    return folder


if __name__ == "__main__":
    write(Path(sys.argv[1]))
