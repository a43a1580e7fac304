"""An adapter file as tensors of at most two bytes a number, read without ever having it twice.

LoRAs are shared in float32 as often as not, although the model computes in 16 bits. Read whole and then converted,
one costs three times what is left of it in the end, for a moment. Here they are read and converted piece by piece,
each small enough for a core's cache, so that the peak is the result; and by several threads (filling.py), because one
alone is slower than the system's cache of the file, from which a LoRA that is chosen often comes.

What is rounded to bfloat16 are matrices in float32 and float64. What has two bytes or less a number stays as it is;
so do vectors and numbers (alpha, DoRA's magnitudes, replaced norms), which are small and scale whole weights.

Pickled files (.pt, .ckpt, .bin, .pth) run code when they are loaded, so they are refused by what they contain,
whatever their name is.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from ..loaders import safetensors_header
from ..loaders.gguf.errors import INCOMPLETE, GGUFError, not_gguf, shown
from ..loaders.gguf.reader import GGUFFile
from ..loaders.gguf.types import BLOCKS, NO_REFERENCE, PLAIN, GGMLType
from ..loaders.quant.dispatch import dequantize
from ..loaders.quant.reference import PLAIN_DTYPES
from ..loaders.read_ahead import Watch, read_ahead, unwatched
from ..loaders.safetensors_header import Entry
from . import keys
from .filling import fill, is_wide, lay_out
from .garbage import put_off

PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
SLICE = 4 << 20  # bytes of a quantised tensor that are turned into numbers at once
PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")


class LoraError(GGUFError):
    """A LoRA cannot be used. Reads like a GGUFError, whatever the format."""


PICKLED = (
    "it is a pickled PyTorch file, which could run any code when it is loaded, so it never is",
    "look for a .safetensors version, or convert it with a tool that you trust",
)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's tensors under the names that ComfyUI knows, in host memory, and its metadata."""

    path: Path
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read(
    path: str | os.PathLike[str], rank_known: Callable[[int], None] | None = None, watch: Watch = unwatched
) -> AdapterFile:
    """Read the safetensors or GGUF adapter at `path`; which one it is, its first bytes say.

    Args:
        rank_known: told, before a safetensors file's tensors are read, the rank that most of its low-rank pairs have.
        watch: told of what has to come from the disk; what it raises ends the reading.

    Raises:
        LoraError: no such file, no adapter, a pickled one, or a damaged one.
    """
    path = Path(path)
    try:
        with path.open("rb", buffering=0) as file:
            head = file.read(64)
            is_safetensors = head[8:9] == b"{"  # before that is a length, whose bytes may be those of a pickle
            if head.startswith(b"GGUF") or is_safetensors:
                read_ahead(file.fileno(), [(0, os.fstat(file.fileno()).st_size)], watch, path.name)
            if head.startswith(b"GGUF"):
                tensors, metadata = _from_gguf(path)
            elif path.suffix.lower() in PICKLE_SUFFIXES or (head.startswith(PICKLES) and not is_safetensors):
                raise LoraError(path, *PICKLED)
            elif is_safetensors:
                tensors, metadata = _from_safetensors(path, file, rank_known, watch)
            else:
                told = not_gguf(path, head)
                problem = told.problem.replace("not a GGUF file", "neither a safetensors nor a GGUF file")
                raise LoraError(path, problem, told.remedy)
    except OSError as error:
        raise LoraError(
            path, f"it cannot be read ({error.strerror})", "check its name, folder and permissions"
        ) from error
    return AdapterFile(path, tensors, metadata)


def _from_safetensors(
    path: Path, file: BinaryIO, rank_known: Callable[[int], None] | None, watch: Watch
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    file.seek(0)
    try:
        with put_off():
            entries, metadata = safetensors_header.parse(file, path.stat().st_size)
            if rank_known is not None and (rank := _rank(entries)):
                rank_known(rank)
            tensors, jobs = lay_out(entries)
        with watch(f"loading {path.name}", sum(job.nbytes for job in jobs)) as told:
            fill(path, file, jobs, told)
    except safetensors_header.MalformedError as error:
        raise LoraError(path, f"not a sound safetensors file: {error}", INCOMPLETE) from error
    return keys.canonical(tensors), metadata


def _rank(entries: Sequence[Entry]) -> int:
    """That of most low-rank pairs; 0 where there are none."""
    ranks = Counter(entry.shape[0] for entry in entries if entry.shape and entry.name.endswith(keys.DOWN))
    return ranks.most_common(1)[0][0] if ranks else 0


def _from_gguf(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with GGUFFile(path) as file:
        tensors = dict(_gguf_tensors(file))
        alpha = file.metadata.get("adapter.lora.alpha")
        metadata = {key: value for key in file.metadata if isinstance(value := file.metadata[key], str)}
    return keys.canonical(keys.of_gguf(tensors, alpha)), metadata


def _gguf_tensors(file: GGUFFile) -> Iterator[tuple[str, torch.Tensor]]:
    for name, info in file.tensors.items():
        if info.ggml_type in NO_REFERENCE:
            problem = f"tensor {shown(name)} is of type {info.ggml_type.name}, which nothing turns back exactly"
            raise LoraError(file.path, problem, "use a conversion to F16 or Q8_0")
        if info.nbytes == 0:
            yield name, torch.empty(info.shape)
            continue
        if info.ggml_type not in PLAIN:
            yield name, _dequantized(file.view(name), info.ggml_type, info.shape)
            continue
        mapped = torch.frombuffer(bytearray(file.view(name)), dtype=torch.uint8)
        tensor = mapped.view(PLAIN_DTYPES[info.ggml_type]).view(info.shape)
        yield name, tensor.to(torch.bfloat16) if is_wide(tensor.dtype, info.shape) else tensor


def _dequantized(data: memoryview, ggml_type: GGMLType, shape: tuple[int, ...]) -> torch.Tensor:
    """In bfloat16, by slices: neither a copy of the bytes nor the numbers in float32 are ever whole."""
    layout, whole = BLOCKS[ggml_type], torch.empty(shape, dtype=torch.bfloat16)
    step = SLICE // layout.nbytes
    for start in range(0, len(data) // layout.nbytes, step):
        piece = torch.frombuffer(bytearray(data[start * layout.nbytes :][: step * layout.nbytes]), dtype=torch.uint8)
        elements = piece.numel() // layout.nbytes * layout.elements
        out = whole.view(-1)[start * layout.elements :][:elements]
        out.copy_(dequantize(piece, ggml_type, (elements,), torch.bfloat16))
    return whole
