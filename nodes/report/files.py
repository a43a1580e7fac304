"""What a model file is, by its header alone: `GET /sluice/file`, for the badge that a loader node wears.

Only files that the loader nodes offer are looked at, so that the route tells nothing about others. A header is read
once for as long as the file stays the same, and no tensor's bytes are touched.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

from .. import model_files

PREFIX = "sluice_"  # of the groups' names in the host; a caller says `diffusion_models`
LONG_HEADER = 4 << 20  # bytes; to parse a longer one would hold up every other thread for seconds
KEPT = 256  # files


class NoSuchFileError(LookupError):
    """No loader node offers this file."""


def describe(folder: str, name: str) -> dict[str, Any]:
    """`{"name": ..., "bytes": of all parts, "architecture": or None, "quant_types": {type: bytes}}`.

    Args:
        folder: a group of `model_files`, without its prefix: `diffusion_models`, `text_encoders` or `loras`.
        name: as the loader node has it.

    Raises:
        NoSuchFileError: that is none.
        ValueError: the file is no sound one; the message says what to do, and no folder that `name` does not.
    """
    group = PREFIX + folder
    if group not in model_files.GROUPS:
        known = ", ".join(known.removeprefix(PREFIX) for known in model_files.GROUPS)
        raise NoSuchFileError(f"there is no folder {folder!r}; there are {known}")
    if name not in model_files.names(group):
        raise NoSuchFileError(f"{folder} has no file {name!r}; press R in ComfyUI to refresh the lists")
    path = Path(os.path.abspath(model_files.find(group, name)))
    try:
        return {"name": name, **_described(path, model_files.stamp(group, name))}
    except ValueError as error:
        above = str(path).removesuffix(os.path.normpath(name)).rstrip(os.sep)
        raise ValueError(str(error).replace(above, folder)) from error


@lru_cache(KEPT)
def _described(path: Path, stamp: str) -> dict[str, Any]:
    if not path.is_file():  # to open a named pipe would wait for its writer
        raise ValueError(f"{path.name}: it is not a regular file; choose another")
    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    return _of_safetensors(path) if is_safetensors else _of_gguf(path)


def _of_gguf(path: Path) -> dict[str, Any]:
    from ...loaders.diffusion import described
    from ...loaders.gguf.reader import GGUFFile

    with GGUFFile(path) as file:
        loaded = described(file)
        nbytes = sum(part.stat().st_size for part in file.parts)
        stated = loaded.architecture if "general.architecture" in file.metadata else None
        return {"bytes": nbytes, "architecture": stated, "quant_types": loaded.tensor_types}


def _of_safetensors(path: Path) -> dict[str, Any]:
    from ...loaders import safetensors_header

    nbytes = path.stat().st_size
    names = {dtype: name for name, dtype in safetensors_header.DTYPES.items()}
    sizes: Counter[str] = Counter()
    try:
        with path.open("rb") as file:
            if LONG_HEADER < int.from_bytes(file.read(8), "little") <= nbytes - 8:
                return {"bytes": nbytes, "architecture": None, "quant_types": {}}
            file.seek(0)
            for entry in safetensors_header.parse(file, nbytes)[0]:
                sizes[names[entry.dtype]] += entry.nbytes
    except safetensors_header.UnknownTypeError:
        sizes.clear()  # newer than this pack, which is no reason to say that the file is bad
    except safetensors_header.MalformedError as error:
        raise ValueError(f"{path.name}: not a sound safetensors file: {error}; download it again") from error
    return {"bytes": nbytes, "architecture": None, "quant_types": dict(sizes.most_common())}
