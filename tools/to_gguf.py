"""Turn a diffusion model in safetensors into a GGUF file: `python tools/to_gguf.py IN OUT --type Q8_0 --arch sd3`.

Matrices become quantised blocks (by the `gguf` package); everything that is small or delicate keeps the file's own
bits: norms, biases, 1-D tensors, and convolutions whose rows are no whole number of blocks.  GGUF knows at most four
dimensions, so a tensor with more is stored as a matrix, and `comfy.gguf.orig_shape.NAME` holds its true shape.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GGMLType

QUANTISATION_VERSION = 2  # of the block formats; the only one that files in use have
SMALLEST_QUANTISED = 1024  # elements; below it a quantised tensor saves nothing worth a rounding


@dataclass(frozen=True)
class Recipe:
    """The type of most matrices, and another for those that a model is most sensitive to."""

    bulk: GGMLType
    delicate: GGMLType
    file_type: gguf.LlamaFileType


RECIPES = {
    "Q8_0": Recipe(GGMLType.Q8_0, GGMLType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "Q5_1": Recipe(GGMLType.Q5_1, GGMLType.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
    "Q4_0": Recipe(GGMLType.Q4_0, GGMLType.Q5_1, gguf.LlamaFileType.MOSTLY_Q4_0),
}
# Embedders, modulations and the last layer: few weights, and every block's input or scale depends on them.
DELICATE = re.compile(r"(embedder|_embedding|_in\.|modulation|adaln|final_layer|proj_out)", re.IGNORECASE)

# safetensors' names of the types whose bits GGUF can hold as they are.
KEPT = {
    "F64": GGMLType.F64,
    "F32": GGMLType.F32,
    "F16": GGMLType.F16,
    "BF16": GGMLType.BF16,
    "I8": GGMLType.I8,
    "I16": GGMLType.I16,
    "I32": GGMLType.I32,
    "I64": GGMLType.I64,
}

FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # as numpy reads them; it has no bfloat16


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file, its bytes as they lie there."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray  # uint8

    def to_float32(self) -> np.ndarray:
        if self.dtype == "BF16":  # the upper half of a float32
            wide = self.data.view(FLOATS["BF16"]).astype(np.uint32) << 16
            return wide.view(np.float32).reshape(self.shape)
        return self.data.view(FLOATS[self.dtype]).astype(np.float32).reshape(self.shape)


def read_safetensors(path: Path) -> tuple[dict[str, str], Iterator[Tensor]]:
    """The metadata of a safetensors file and its tensors, mapped and not read."""
    data = np.memmap(path, np.uint8, mode="r")
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    header: dict[str, Any] = json.loads(data[8 : 8 + length].tobytes())
    metadata = header.pop("__metadata__", {})

    def tensors() -> Iterator[Tensor]:
        for name, entry in header.items():
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            yield Tensor(name, entry["dtype"], tuple(entry["shape"]), data[start:end])

    return metadata, tensors()


def chosen_type(tensor: Tensor, recipe: Recipe) -> GGMLType:
    """The type that a tensor is stored in."""
    if tensor.dtype not in KEPT:
        raise ValueError(f"tensor {tensor.name!r} is {tensor.dtype}, which GGUF cannot hold; convert it to BF16 first")
    wanted = recipe.delicate if DELICATE.search(tensor.name) else recipe.bulk
    block_elements, _ = gguf.GGML_QUANT_SIZES[wanted]
    fits = len(tensor.shape) > 1 and stored_shape(tensor.shape)[-1] % block_elements == 0
    large = int(np.prod(tensor.shape)) >= SMALLEST_QUANTISED
    is_weight = tensor.name.endswith("weight") and "norm" not in tensor.name and tensor.dtype in FLOATS
    return wanted if fits and large and is_weight else KEPT[tensor.dtype]


def stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file: as it is, or a matrix where GGUF has not enough dimensions."""
    return shape if len(shape) <= 4 else (shape[0], int(np.prod(shape[1:])))


def convert(source: Path, target: Path, arch: str, recipe: Recipe) -> dict[str, int]:
    """Write `source` as GGUF to `target`, in one move; return how many tensors got each type."""
    metadata, tensors = read_safetensors(source)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    writer = gguf.GGUFWriter(partial, arch)
    writer.add_name(metadata.get("title", source.stem))
    writer.add_quantization_version(QUANTISATION_VERSION)
    writer.add_file_type(recipe.file_type)
    if "license" in metadata:
        writer.add_license(metadata["license"])
    if "config" in metadata:  # some architectures are told apart by it
        writer.add_string("config", metadata["config"])
    counts: dict[str, int] = {}
    for tensor in tensors:
        kind = chosen_type(tensor, recipe)
        counts[kind.name] = counts.get(kind.name, 0) + 1
        shape = stored_shape(tensor.shape)
        if shape != tensor.shape:
            writer.add_array(f"comfy.gguf.orig_shape.{tensor.name}", list(tensor.shape))
        if kind is KEPT[tensor.dtype]:
            data = np.asarray(tensor.data).reshape(*shape[:-1], -1)
        else:
            data = gguf.quantize(tensor.to_float32().reshape(shape), kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--type", choices=RECIPES, default="Q8_0")
    parser.add_argument("--arch", required=True, help="general.architecture: flux, sd3, sdxl, wan, qwen_image, ...")
    args = parser.parse_args()
    counts = convert(args.source, args.target, args.arch, RECIPES[args.type])
    print(f"{args.target}: {args.target.stat().st_size:,} bytes,", ", ".join(f"{n} x {t}" for t, n in counts.items()))


if __name__ == "__main__":
    main()
