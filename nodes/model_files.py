"""The model files that a node offers, from the host's own folders.

The host lists only the extensions that its folders allow, and widening those would make core's loaders offer files
they cannot read. So the GGUF files of a group of folders get a folder name of ours, kept equal to theirs.
"""

from __future__ import annotations

import os
import re
from glob import escape, glob

import folder_paths

# Our folder name -> the host's and other packs' folder names whose .gguf files it lists.
GROUPS = {
    "sluice_diffusion_models": ("diffusion_models", "unet", "unet_gguf"),
    "sluice_text_encoders": ("text_encoders", "clip", "clip_gguf"),
    "sluice_loras": ("loras",),
}
ALSO_LISTED = {group: {".safetensors", ".sft"} for group in ("sluice_text_encoders", "sluice_loras")}

_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE | re.DOTALL)


def _group_paths(group: str) -> list[str]:
    known = folder_paths.folder_names_and_paths
    paths = [path for name in GROUPS[group] if name in known for path in known[name][0]]
    known[group] = (list(dict.fromkeys(paths)), {".gguf"} | ALSO_LISTED.get(group, set()))
    return known[group][0]


def names(group: str) -> list[str]:
    """The files of a group, as the host names them (relative, with subfolders). Later parts of split models are
    left out: the first one opens the model."""
    _group_paths(group)
    listed = folder_paths.get_filename_list(group)
    return [name for name in listed if not _is_later_part(name)]


def find(group: str, name: str) -> str:
    """The path of a listed file.

    Raises:
        FileNotFoundError: none of the group's folders has it.
    """
    paths = _group_paths(group)
    path = folder_paths.get_full_path(group, name)
    if path is None:
        raise FileNotFoundError(
            f"'{name}' is in none of the model folders ({', '.join(paths)}); put it there or choose another file "
            f"(press R in ComfyUI to refresh the list)"
        )
    return path


def stamp(group: str, name: str) -> str:
    """Changes when the file or another part of its model does, so that the host loads a replaced file again."""
    path = folder_paths.get_full_path(group, name)
    if path is None:
        return ""
    match = _PART_NAME.fullmatch(path)
    parts = sorted(glob(f"{escape(match['stem'])}-*-of-{match['count']}.gguf")) if match else [path]
    status = [(part, os.stat(part)) for part in parts]
    return "; ".join(f"{part} {found.st_size} {found.st_mtime_ns}" for part, found in status)


def _is_later_part(name: str) -> bool:
    match = _PART_NAME.fullmatch(name)
    return match is not None and int(match["number"]) > 1
