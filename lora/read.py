"""An adapter file as tensors of at most two bytes a number, read without ever having it twice.

LoRAs are shared in float32 as often as not, although the model computes in 16 bits. Read whole and then converted,
one costs three times what is left of it in the end, for a moment. Here they are read and converted piece by piece,
each small enough for a core's cache, so that the peak is the result; and by several threads, because one alone is
slower than the system's cache of the file, from which a LoRA that is chosen often comes.

What is rounded to bfloat16 are matrices in float32 and float64. What has two bytes or less a number stays as it is;
so do vectors and numbers (alpha, DoRA's magnitudes, replaced norms), which are small and scale whole weights.

Pickled files (.pt, .ckpt, .bin, .pth) run code when they are loaded, so they are refused by what they contain,
whatever their name is.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch

from ..loaders import safetensors_header
from ..loaders.gguf.errors import INCOMPLETE, GGUFError, not_gguf, shown
from ..loaders.gguf.reader import GGUFFile
from ..loaders.gguf.types import NO_REFERENCE, PLAIN
from ..loaders.quant.dispatch import dequantize
from ..loaders.quant.reference import PLAIN_DTYPES
from ..loaders.read_ahead import Watch, read_ahead, unwatched
from ..loaders.safetensors_header import Entry
from ..loaders.sizes import aligned
from . import keys

WIDE = (torch.float32, torch.float64)
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
THREADS = 4  # that read; more are no faster
BATCH_BYTES = 8 << 20  # that one of them reads before it asks for more
STAGED = 1 << 15  # numbers that are read and rounded at a time: torch does so many without further threads


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
        entries, metadata = safetensors_header.parse(file, path.stat().st_size)
        if rank_known is not None and (rank := _rank(entries)):
            rank_known(rank)
        tensors = _laid_out(entries)
        total = sum(entry.nbytes for entry in entries)
        with (
            ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool,
            watch(f"loading {path.name}", total) as told,
        ):
            for nbytes in pool.map(partial(_fill, tensors, path, file), _batches(entries)):
                told(nbytes)
    except safetensors_header.MalformedError as error:
        raise LoraError(path, f"not a sound safetensors file: {error}", INCOMPLETE) from error
    return keys.canonical(tensors), metadata


def _rank(entries: Sequence[Entry]) -> int:
    """That of most low-rank pairs; 0 where there are none."""
    ranks = Counter(entry.shape[0] for entry in entries if entry.shape and entry.name.endswith(keys.DOWN))
    return ranks.most_common(1)[0][0] if ranks else 0


def _laid_out(entries: Sequence[Entry]) -> dict[str, torch.Tensor]:
    """A tensor for each entry, of the type that it is kept in, all in one piece of memory."""
    dtypes = [torch.bfloat16 if _is_wide(entry.dtype, entry.shape) else entry.dtype for entry in entries]
    sizes = [prod(entry.shape) * dtype.itemsize for entry, dtype in zip(entries, dtypes, strict=True)]
    tensors, offset, total = {}, 0, sum(aligned(nbytes) for nbytes in sizes)
    with torch.inference_mode(False):  # the threads that fill it are outside of that
        memory = torch.empty(total, dtype=torch.uint8)
        for entry, dtype, nbytes in zip(entries, dtypes, sizes, strict=True):
            tensors[entry.name] = memory[offset : offset + nbytes].view(dtype).view(entry.shape)
            offset += aligned(nbytes)
    return tensors


def _batches(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """The entries in the order of the file, which disks like, in portions for one thread each."""
    batch: list[Entry] = []
    nbytes = 0
    for entry in entries:
        batch.append(entry)
        nbytes += entry.nbytes
        if nbytes >= BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
    yield batch


def _fill(tensors: dict[str, torch.Tensor], path: Path, opened: BinaryIO, batch: list[Entry]) -> int:
    """The bytes of the batch, which is in `tensors` now."""
    with path.open("rb", buffering=0) as file:  # a place to read at of its own
        if not os.path.sameopenfile(file.fileno(), opened.fileno()):
            raise safetensors_header.MalformedError("it was replaced while it was read")
        for entry in batch:
            out = tensors[entry.name].view(-1)
            if out.dtype == entry.dtype:
                safetensors_header.read_into(file, entry, out)
                continue
            staging = torch.empty(min(out.numel(), STAGED), dtype=entry.dtype)
            for first in range(0, out.numel(), STAGED):
                part = out[first : first + STAGED]
                safetensors_header.read_into(file, entry, staging[: part.numel()], first)
                part.copy_(staging[: part.numel()])
    return sum(entry.nbytes for entry in batch)


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
        mapped = torch.frombuffer(bytearray(file.view(name)), dtype=torch.uint8)
        if info.ggml_type in PLAIN:
            tensor = mapped.view(PLAIN_DTYPES[info.ggml_type]).view(info.shape)
        else:
            tensor = dequantize(mapped, info.ggml_type, info.shape, torch.bfloat16)
        yield name, tensor.to(torch.bfloat16) if _is_wide(tensor.dtype, info.shape) else tensor


def _is_wide(dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return dtype in WIDE and sum(n > 1 for n in shape) > 1
