"""Weights, wherever they come from, into a GGUF file: one at a time, quantised on a device, written, forgotten.

A `Weight` says what a tensor will be and makes it when its turn comes, so a model that is quantised, mapped, patched
by LoRAs or lying on a GPU is never whole in host memory: beside the caller's own, this holds the dense weight of the
moment, its blocks, and some tens of megabytes.

A weight that has blocks of the wanted type already, and no patch, is copied as it is.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from .gguf.errors import GGUFError, shown
from .gguf.types import PLAIN, GGMLType
from .gguf.writer import GGUFWriter, NewTensor
from .quant.quantize import UnrepresentableError, quantize
from .quant.reference import PLAIN_DTYPES
from .recipes import RECIPES, Chosen, Wanted, choose, summary

log = logging.getLogger("sluice.save")

QUANTISATION_VERSION = 2  # of the block formats; the only one that files in use have

# What holds the bits of a dtype. Of those that GGUF has no type for, a wider one that holds every value; bytes (a
# tokenizer) become signed ones with the same bits.
_OWN = {dtype: plain for plain, dtype in PLAIN_DTYPES.items()} | {
    **dict.fromkeys((torch.float8_e4m3fn, torch.float8_e5m2), GGMLType.BF16),
    torch.uint8: GGMLType.I8,
    torch.bool: GGMLType.I8,
}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Weight:
    """A tensor to be saved.

    Args:
        dtype: of what `make` returns.
        make: returns the dense tensor of `shape`, on any device.
        blocks: its type and bytes (uint8) where it is quantised already and not patched.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]
    blocks: tuple[GGMLType, torch.Tensor] | None = None


@dataclass(frozen=True)
class Saved:
    """What was written."""

    path: Path
    nbytes: int
    seconds: float
    types: str  # such as "320 x Q4_K, 520 x BF16"
    chosen: Mapping[str, Chosen] = field(repr=False)


def save_model(
    path: str | Path,
    weights: Sequence[Weight],
    recipe: str,
    architecture: str,
    *,
    overrides: Iterable[tuple[Any, GGMLType]] = (),
    metadata: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    sources: Iterable[Path] = (),
) -> Saved:
    """Write `weights` to `path`, which appears when all of it is there.

    Args:
        recipe: a key of `RECIPES`.
        architecture: `general.architecture`.
        overrides: patterns of names with the type that they shall have, `recipes.parse_overrides`.
        metadata: more keys for the file.
        device: where quantising is done.
        progress: told the elements done and all elements, at least every few tenths of a second; what it raises ends
            the work and removes what was written.
        sources: files that the weights are read from, which must not be overwritten meanwhile.

    Raises:
        GGUFError: the file cannot be written, would replace one of `sources`, or a tensor cannot be stored.
    """
    path, start = Path(path), time.monotonic()
    _refuse_sources(path, sources)
    named = {weight.name: weight for weight in weights}
    wanted = [Wanted(w.name, w.shape, _own(path, w), w.blocks[0] if w.blocks else None) for w in named.values()]
    chosen = choose(wanted, RECIPES[recipe], overrides)
    keys: dict[str, Any] = {
        "general.architecture": architecture,
        "general.quantization_version": QUANTISATION_VERSION,
        "general.file_type": RECIPES[recipe].file_type,
        **(metadata or {}),
    }
    for name, choice in chosen.items():
        if choice.shape != named[name].shape != ():  # torch takes one number for none of dimensions by itself
            keys[f"comfy.gguf.orig_shape.{name}"] = list(named[name].shape)
    tensors = [NewTensor(name, choice.shape, choice.ggml_type) for name, choice in chosen.items()]
    total, done, furthest = sum(prod(w.shape) for w in named.values()), 0, 0

    def told(elements: int = 0) -> None:
        """Of the weight at hand; a bar does not go back while it is written."""
        nonlocal furthest
        furthest = max(furthest, done + elements)
        if progress is not None:
            progress(furthest, total)

    with GGUFWriter(path, keys, tensors, meanwhile=told) as writer:
        for name, choice in chosen.items():
            told()
            writer.write(_encoded(path, named[name], choice, device, told).numpy())
            done += prod(named[name].shape)
    saved = Saved(path, writer.nbytes, time.monotonic() - start, summary(chosen), chosen)
    log.info("saved %s: %.1f MB in %.1f s (%s)", path.name, saved.nbytes / 1e6, saved.seconds, saved.types)
    return saved


def _encoded(
    path: Path, weight: Weight, choice: Chosen, device: torch.device | str, told: Callable[[int], None]
) -> torch.Tensor:
    """The tensor's bytes, uint8 on the CPU."""
    if weight.blocks is not None and weight.blocks[0] is choice.ggml_type:
        return weight.blocks[1].reshape(-1).cpu().contiguous()
    tensor = weight.make().detach()
    if tuple(tensor.shape) != weight.shape:
        raise ValueError(f"tensor {shown(weight.name)} was announced as {weight.shape} and is {tuple(tensor.shape)}")
    if choice.ggml_type in PLAIN and (tensor.dtype is PLAIN_DTYPES[choice.ggml_type] or tensor.dtype in _BYTES):
        return tensor.cpu().contiguous().view(-1).view(torch.uint8)
    try:
        return quantize(tensor.reshape(choice.shape), choice.ggml_type, device, told)
    except UnrepresentableError as error:
        remedy = "choose a wider type for it (overrides), or repair the model"
        raise GGUFError(path, f"tensor {shown(weight.name)} cannot be stored: {error}", remedy) from error


_BYTES = (torch.uint8, torch.bool)


def _own(path: Path, weight: Weight) -> GGMLType:
    if weight.dtype not in _OWN:
        problem = f"tensor {shown(weight.name)} is of {weight.dtype}, which GGUF has no type for"
        raise GGUFError(path, problem, "convert the model to bfloat16 first")
    return _OWN[weight.dtype]


def _refuse_sources(path: Path, sources: Iterable[Path]) -> None:
    for source in sources:
        if path.exists() and source.exists() and os.path.samefile(path, source):
            problem = "the model that is to be saved is read from this very file, which therefore cannot be replaced"
            raise GGUFError(path, problem, "choose another name; afterwards you may delete the old file")
