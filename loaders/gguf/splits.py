"""Which files make up a model that was split: `name-00001-of-00003.gguf` and its siblings.

The convention is llama.cpp's gguf-split: every part is a whole GGUF file with its own tensor table,
data and alignment; the first also holds the model's metadata. `split.count`, `split.no` (from 0) and
`split.tensors.count` say what belongs together, the names say where it is. Any part stands for the
whole model, so a user cannot choose the wrong one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import DAMAGED, GGUFError

_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)
SAME_DOWNLOAD = "put all parts of one and the same model into one folder"


def bytes_on_disk(path: Path) -> int:
    """Of a file and, if its name says that it is one part of a split model, of the parts beside it."""
    match = _PART_NAME.fullmatch(path.name)
    if match is None:
        return path.stat().st_size
    names = (f"{match['stem']}-{n:05d}-of-{match['count']}{match['suffix']}" for n in range(1, int(match["count"]) + 1))
    return sum(part.stat().st_size for name in names if (part := path.with_name(name)).is_file())


def part_paths(path: Path, metadata: Mapping[str, Any]) -> tuple[Path, ...]:
    """All files of the model that `path`, with its `metadata`, is a part of; itself alone if it was not split.

    Raises:
        GGUFError: a part is missing, or the file's name and its metadata disagree.
    """
    count = whole_number(path, metadata, "split.count", default=1)
    if count <= 1:
        return (path,)
    match = _PART_NAME.fullmatch(path.name)
    number = whole_number(path, metadata, "split.no", default=-1) + 1
    if match is None:
        expected = f"{path.stem}-{number:05d}-of-{count:05d}.gguf"
        problem = f"it is part {number} of {count} of a split model, its name does not say so"
        raise GGUFError(path, problem, f"give the parts their names back, like {expected}")
    if int(match["count"]) != count:
        problem = f"its name says {int(match['count'])} parts, its metadata 'split.count' says {count}"
        raise GGUFError(path, problem, f"{SAME_DOWNLOAD}, under their own names")
    paths = []
    for part in range(1, count + 1):
        sibling = path.with_name(f"{match['stem']}-{part:05d}-of-{match['count']}{match['suffix']}")
        if not sibling.is_file():
            problem = f"part {part} of {count} of the model, {sibling.name}, is missing from {sibling.parent}"
            raise GGUFError(path, problem, "download it into that folder")
        paths.append(sibling)
    return tuple(paths)


def check_part(path: Path, metadata: Mapping[str, Any], index: int, count: int) -> None:
    """Refuse a file that is not part `index` (from 0) of `count`, whatever its name says."""
    its_count = whole_number(path, metadata, "split.count", default=1)
    number = whole_number(path, metadata, "split.no", default=-1)
    if its_count != count:
        problem = f"it is of a model of {its_count} parts ('split.count'), the part opened with it of one of {count}"
        raise GGUFError(path, problem, SAME_DOWNLOAD)
    if number != index:
        problem = f"its name makes it part {index + 1} of {count}, its metadata 'split.no' makes it part {number + 1}"
        raise GGUFError(path, problem, f"{SAME_DOWNLOAD}, under their own names")


def whole_number(path: Path, metadata: Mapping[str, Any], key: str, default: int) -> int:
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise GGUFError(path, f"metadata key {key!r} is not a whole number", DAMAGED)
    return value
