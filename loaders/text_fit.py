"""Whether the files are all that a text encoder needs, what can be done where they are not, and the error else.

The host fills a text encoder from whatever it is given and writes what is missing into the log. Weights that are
missing are uninitialised memory there, and the picture is noise. Here it is an error that names the file, or the
encoder that no file is for. Three things may be missing: the part that sees (a file without projector reads text all
the same), the matrix that only writing text needs, and CLIP's projection of the pooled vector, which is the identity
then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .clip_types import ENCODERS
from .fit import INCOMPLETE_MODEL, MissingPart
from .gguf.errors import shown
from .gguf.reader import GGUFError, GGUFFile
from .ops import MappedLayer

_SEES = (
    "put its vision projector (mmproj-*.gguf) into the same folder and load it again, or leave the picture out of the "
    "prompt"
)
_HEARS = "leave the sound out of the prompt, or load the text encoder from safetensors"
_WRITES = "use a conversion with its output matrix"

# Parts of an encoder that a file may lack, by the name of the module -> what to do when one is used.
OPTIONAL = {
    **dict.fromkeys(("visual", "vision_model", "multi_modal_projector"), _SEES),
    **dict.fromkeys(("audio_model", "audio_projector"), _HEARS),
    "lm_head": _WRITES,
}

_IDENTITY = "text_projection.weight"
_UNUSED = ("logit_scale",)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Given:
    """One file's tensors, as the host was given them."""

    path: Any
    shapes: Mapping[str, Shape]
    gguf: GGUFFile | None


def complete(encoder: torch.nn.Module, clip_type: str, given: list[Given]) -> None:
    """Fill or refuse what the files left out of `encoder`, the host's `cond_stage_model`.

    Raises:
        GGUFError: a file lacks weights, or is for nothing in this type.
        ValueError: none of the files is for one of the encoders.
    """
    # By shape, too: CLIP-L's names are all among CLIP-G's, and no other of the host's encoders come so close.
    holders = {(n, _plain(shape)): index for index, file in enumerate(given) for n, shape in file.shapes.items()}
    used: set[int] = set()
    unfed = []
    for child, module in encoder.named_children():
        weights = [p for layer in module.modules() if isinstance(layer, MappedLayer) for p in layer.parameters(False)]
        if weights and all(weight.is_meta for weight in weights):
            unfed.append(child)
            continue
        sources = {name: _source(name, _plain(p.shape), holders) for name, p in module.named_parameters()}
        feeding = {index for index in sources.values() if index is not None}
        used |= feeding
        if any(given[index].gguf is not None for index in feeding):
            _fill(module, sources, given[min(feeding)])
    unused = [file for index, file in enumerate(given) if index not in used and file.gguf is not None]
    fed = {name for index in used for name in given[index].shapes}
    twice = [file for file in unused if not fed.isdisjoint(file.shapes)]
    if strangers := [file for file in unused if file not in twice]:
        problem = f"it is none of the text encoders of type '{clip_type}'{_needed(unfed)}"
        raise GGUFError(strangers[0].path, problem, "choose another file or another type")
    if unfed:
        files = ", ".join(file.path.name for file in given)
        raise ValueError(
            f"type '{clip_type}' also needs {_known(unfed)}, which none of the files is ({files}); choose that file, "
            f"too, or another type"
        )
    if twice:
        problem = f"another of the files is the same kind of text encoder, and type '{clip_type}' takes one of it"
        raise GGUFError(twice[0].path, problem, "choose another file, or none")


def _known(encoders: Iterable[str]) -> str:
    return ", ".join(ENCODERS.get(encoder, encoder) for encoder in encoders)


def _needed(encoders: list[str]) -> str:
    named = [encoder for encoder in encoders if encoder in ENCODERS]
    return f", which needs {_known(named)}" if named else ""


def _source(name: str, shape: Shape, holders: Mapping[tuple[str, Shape], int]) -> int | None:
    """The file that holds a parameter: the host strips some of the first parts of its name, how many differs."""
    parts = name.split(".")
    keys = ((".".join(parts[i:]), shape) for i in range(len(parts)))
    return next((holders[key] for key in keys if key in holders), None)


def _plain(shape: Shape) -> Shape:
    """torch loads one number in a row where a model has a number by itself."""
    return tuple(shape) or (1,)


def _fill(module: torch.nn.Module, sources: Mapping[str, int | None], file: Given) -> None:
    missing = [name for name, source in sources.items() if source is None and not name.endswith(_UNUSED)]
    missing = [name for name in missing if not _was_given(module, name)]
    for part, remedy in _missing_parts(module, missing):
        parent, _, name = part.rpartition(".")
        setattr(module.get_submodule(parent), name, MissingPart(file.path, name, remedy))
        missing = [other for other in missing if not other.startswith(f"{part}.")]
    for name in [name for name in missing if name.endswith(_IDENTITY)]:
        layer = module.get_submodule(name.rpartition(".")[0])
        identity = torch.eye(module.get_parameter(name).shape[0])
        layer.register_parameter("weight", torch.nn.Parameter(identity, requires_grad=False))
        missing.remove(name)
    if missing:
        which = shown(missing[0]) if len(missing) == 1 else f"such as {shown(missing[0])}"
        problem = f"it lacks {len(missing)} of the text encoder's {len(sources)} tensors, {which}"
        raise GGUFError(file.path, problem, INCOMPLETE_MODEL)


def _was_given(module: torch.nn.Module, name: str) -> bool:
    """Whether a layer of ours took its weight from a name that the host had changed."""
    layer, _, key = name.rpartition(".")
    owner = module.get_submodule(layer)
    return isinstance(owner, MappedLayer) and not owner._parameters[key].is_meta  # type: ignore[union-attr]


def _missing_parts(module: torch.nn.Module, missing: list[str]) -> Iterator[tuple[str, str]]:
    """The optional parts of which nothing was given, with their remedies."""
    lacking = set(missing)
    for name, part in module.named_modules():
        own = [f"{name}.{key}" for key, _ in part.named_parameters()]
        remedy = OPTIONAL.get(name.rpartition(".")[2])
        if remedy is not None and own and lacking.issuperset(own):
            yield name, remedy
