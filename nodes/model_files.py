"""The model files that a node offers, from the host's own folders.

The host lists only the extensions that its folders allow, and widening those would make core's loaders offer files
they cannot read. So the GGUF files of a group of folders get a folder name of ours, kept equal to theirs.
"""

from __future__ import annotations

import os

import folder_paths

# Our folder name -> the host's and other packs' folder names whose .gguf files it lists.
GROUPS = {"sluice_diffusion_models": ("diffusion_models", "unet", "unet_gguf")}


def _group_paths(group: str) -> list[str]:
    known = folder_paths.folder_names_and_paths
    paths = [path for name in GROUPS[group] if name in known for path in known[name][0]]
    known[group] = (list(dict.fromkeys(paths)), {".gguf"})
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
    """Changes when the file does, so that the host loads a replaced file again."""
    path = folder_paths.get_full_path(group, name)
    if path is None:
        return ""
    status = os.stat(path)
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def _is_later_part(name: str) -> bool:
    stem = name[: -len(".gguf")]
    number, _, count = stem[-14:].partition("-of-")
    return len(stem) > 15 and number.isdigit() and count.isdigit() and stem[-15] == "-" and int(number) > 1
