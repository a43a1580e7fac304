"""GGUF and safetensors files become a CLIP: the host detects and builds it, our layers make it free of copies.

Each GGUF file becomes a state dict with the host's names (`text_tensors.py`), safetensors are read by the host, and
the host's own `load_text_encoder_state_dicts` does the rest with our layer classes (`text_layers.py`), so whatever it
can detect can be loaded. What it lets pass in silence is checked before and after: how many files a type is made of
(`clip_types.py`), whether a file is a text encoder at all, and whether weights are missing (`text_fit.py`).

The CLIP's patcher remembers its files (attachment `sluice`), applies LoRAs to quantised weights at use, and can be
made again by the host from the paths. Every time a text is encoded the files are checked to be the same.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from . import architectures, clip_types, mmproj, safetensors_header
from .diffusion import ATTACHMENT, LoadedModel, described, let_go
from .fit import host_builds
from .gguf.errors import shown
from .gguf.reader import GGUFError, GGUFFile
from .patcher import check_files_of, patch_at_use_from_now_on
from .scaled_fp8 import with_host_weights
from .text_fit import Given, complete
from .text_layers import Vocabulary, text_ops
from .text_tensors import Tensors, plain_where_read_whole, text_encoder_tensors
from .tokenizers import TOKENIZER_KEYS

log = logging.getLogger("sluice.loaders")

GGUF = ".gguf"
SAFETENSORS = (".safetensors", ".sft")

# Parameters that no layer of ours holds, norms above all, keep the file's numbers in float32; they are small. The host
# loads a text encoder at once where it makes it on the device that it computes on, and then fills what is missing with
# zeros; a CPU by another name is never that device.
_AS_GIVEN = {"dtype": torch.float32, "initial_device": torch.device("cpu", 0)}

# Types for which the host can do with Qwen3-VL's language model alone. Elsewhere it takes that for a Qwen3 without
# the projector, which turns positions at another speed.
_WITHOUT_SIGHT = ("ideogram4",)

# Types of which the host takes a further file that it does not detect by itself.
_WITH_MORE = ("ltxv", "hunyuan_dit")


@dataclass(frozen=True)
class LoadedTextEncoder(LoadedModel):
    """What a text encoder was made from: its largest GGUF file, and the others."""

    others: tuple[LoadedModel, ...] = ()

    def __repr__(self) -> str:
        return " + ".join([super().__repr__(), *map(repr, self.others)])


class MappedCLIP(comfy.sd.CLIP):
    """The host's class, with two answers of its own: weights to save are dense (hosts before 0.20 take them here), and
    the network that encodes is the patcher's, also after Select CLIP Device gave it another patcher."""

    @property
    def cond_stage_model(self) -> Any:
        return self.patcher.model

    @cond_stage_model.setter
    def cond_stage_model(self, network: Any) -> None:
        self.__dict__["cond_stage_model"] = network  # for whoever makes it the host's class again

    def clone(self, *args: Any, **kwargs: Any) -> MappedCLIP:
        clone = super().clone(*args, **kwargs)
        clone.__class__ = MappedCLIP
        return clone

    def get_sd(self) -> dict[str, torch.Tensor]:
        return self.patcher.model_state_dict_for_saving() | self.tokenizer.state_dict()


@dataclass(frozen=True)
class Source:
    """One file that becomes one state dict."""

    path: Path
    tensors: Tensors
    files: tuple[GGUFFile, ...] = ()  # the GGUF file and its projector


def load_text_encoder(
    paths: Sequence[str | Path],
    clip_type: str,
    device: torch.device | None = None,
    embedding_directory: Sequence[str] | None = None,
    disable_dynamic: bool = False,
) -> comfy.sd.CLIP:
    """Load the text encoder made of the files at `paths`, GGUF (any part of a split one) and safetensors mixed.

    Args:
        clip_type: one of `clip_types.offered`, in lower case.
        device: where it computes and stays, or None for where the host puts it.
        embedding_directory: the host's folders of textual inversions.
        disable_dynamic: make a classic patcher even where the host's dynamic VRAM is on (the host asks for that).

    Raises:
        GGUFError: a file is no sound GGUF file, no text encoder, none of this type, or lacks tensors.
        ValueError: the type takes another number of files, or needs an encoder that none of them is.
    """
    given = [Path(path) for path in paths]
    for path in given:
        if path.suffix.lower() not in (GGUF, *SAFETENSORS):
            remedy = "convert it, or load it with ComfyUI's own Load CLIP"
            raise GGUFError(path, "it is neither GGUF nor safetensors", remedy)
    files: list[GGUFFile] = []
    try:
        clip, loaded = _build(given, files, clip_type, device, embedding_directory, disable_dynamic)
    except Exception as error:
        for file in files:
            let_go(file, error)
        raise
    arguments = ([str(path) for path in given], clip_type, device, embedding_directory)
    clip.patcher.cached_patcher_init = (_patcher_of, arguments)
    if loaded is not None:
        clip.patcher.set_attachments(ATTACHMENT, loaded)
        log.info("loaded %r", loaded)
    return clip


def _patcher_of(
    paths: Sequence[str],
    clip_type: str,
    device: torch.device | None,
    embedding_directory: Sequence[str] | None,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    return load_text_encoder(paths, clip_type, device, embedding_directory, disable_dynamic).patcher


def _build(
    paths: Sequence[Path],
    files: list[GGUFFile],
    clip_type: str,
    device: torch.device | None,
    embedding_directory: Sequence[str] | None,
    disable_dynamic: bool,
) -> tuple[comfy.sd.CLIP, LoadedTextEncoder | None]:
    """The CLIP and what it was made from; every GGUF file is put into `files` when it is open."""
    options: dict[str, Any] = {} if device is None else {"load_device": device, "offload_device": device}
    host_type = getattr(comfy.sd.CLIPType, clip_type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
    if not any(path.suffix.lower() == GGUF for path in paths):
        clip_types.check_count(clip_type, len(paths))
        names = [str(path) for path in sorted(paths, key=_brings_no_tokenizer)]
        return comfy.sd.load_clip(names, embedding_directory, host_type, options, disable_dynamic), None
    sources = _sources(paths, files, clip_type)
    clip_types.check_count(clip_type, len(sources))
    for source in sources:
        _check_is_text_encoder(source, clip_type)
    state_dicts = [source.tensors for source in sources]
    with _blaming(sources):
        clip = comfy.sd.load_text_encoder_state_dicts(
            state_dicts,
            embedding_directory=embedding_directory,
            clip_type=host_type,
            model_options={**options, **_AS_GIVEN, "custom_operations": text_ops()},
            disable_dynamic=disable_dynamic,
        )
    # The host may have renamed the tensors in its list, and looked for them by the new names.
    given = [
        Given(
            source.path,
            {name: tuple(tensor.shape) for name, tensor in {**source.tensors, **tensors}.items()},
            source.files[0] if source.files else None,
        )
        for source, tensors in zip(sources, state_dicts, strict=True)
    ]
    complete(clip.cond_stage_model, clip_type, given)
    # Both are finished, and have no state that ours lack; a patcher made once more would be a second for one model.
    clip.__class__ = MappedCLIP
    patch_at_use_from_now_on(clip.patcher)
    clip.patcher.size = 0  # counted when parts that the file lacks were still declared
    _check_files_at_use(clip.cond_stage_model, files)
    check_files_of(clip.cond_stage_model, files)
    ranked = sorted((described(file) for file in files), key=lambda one: -sum(one.tensor_types.values()))
    largest = ranked[0]
    return clip, LoadedTextEncoder(largest.file, largest.architecture, largest.tensor_types, tuple(ranked[1:]))


def _sources(paths: Sequence[Path], files: list[GGUFFile], clip_type: str) -> list[Source]:
    opened: list[GGUFFile | Path] = []
    projectors: list[GGUFFile] = []
    for path in paths:
        if path.suffix.lower() != GGUF:
            opened.append(path)
            continue
        file = GGUFFile(path)
        files.append(file)
        (projectors if mmproj.is_projector(file) else opened).append(file)
    if projectors and not any(isinstance(one, GGUFFile) for one in opened):
        problem = f"this is a {architectures.MMPROJ}, not a text encoder"
        raise GGUFError(projectors[0].path, problem, "choose the text encoder's file; this one is found beside it")
    sources = []
    for one in opened:
        if isinstance(one, Path):
            sources.append(Source(one, _of_safetensors(one)))
            continue
        projector = _projector_of(one, projectors, files)
        tensors = text_encoder_tensors(one, projector)
        blind = not any("visual." in name for name in tensors)
        if blind and clip_type not in _WITHOUT_SIGHT and _architecture(one) == "qwen3vl":
            problem = "ComfyUI knows Qwen3-VL by its vision projector, and there is none in this file or beside it"
            raise GGUFError(one.path, problem, "put the model's mmproj-*.gguf into the same folder")
        sources.append(Source(one.path, tensors, (one,) if projector is None else (one, projector)))
    if projectors:
        mmproj.check_fits(next(one for one in opened if isinstance(one, GGUFFile)), projectors[0])
    # The host looks for the tokenizer of a pair in the first file (LTX's: Gemma and the connectors).
    return sorted(sources, key=lambda source: TOKENIZER_KEYS.isdisjoint(source.tensors))


def _brings_no_tokenizer(path: Path) -> bool:
    """Of a safetensors file. What is wrong with one is for the host to say."""
    with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
        return TOKENIZER_KEYS.isdisjoint(safetensors_header.names(file, path.stat().st_size))
    return True


def _architecture(file: GGUFFile) -> str:
    return str(file.metadata.get("general.architecture", ""))


def _projector_of(file: GGUFFile, chosen: list[GGUFFile], files: list[GGUFFile]) -> GGUFFile | None:
    """The projector of `file`: a chosen one that fits (taken from the list), or the one beside it."""
    for projector in chosen:
        with contextlib.suppress(GGUFError):
            mmproj.check_fits(file, projector)
            chosen.remove(projector)
            return projector
    found = mmproj.find_projector(file)
    if found is not None:
        files.append(found)
        log.info("%s sees with %s", file.path.name, found.path.name)
    return found


def _of_safetensors(path: Path) -> Tensors:
    tensors, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    tensors, _ = comfy.utils.convert_old_quants(tensors, model_prefix="", metadata=metadata)
    return with_host_weights(path, plain_where_read_whole(tensors))


def _check_is_text_encoder(source: Source, clip_type: str) -> None:
    if not source.files or comfy.sd.detect_te_model(source.tensors) is not None or clip_type in _WITH_MORE:
        return
    file = source.files[0]
    kind = architectures.other_kind(file.metadata, file.tensors)
    if kind in (None, architectures.TEXT_ENCODER) and not _is_diffusion_model(source.tensors):
        stated = shown(_architecture(file)) if _architecture(file) else "not stated"
        first = ", ".join(shown(name) for name in list(file.tensors)[:3])
        raise GGUFError(
            source.path,
            f"this ComfyUI knows no text encoder with these tensors (architecture {stated}; {len(file.tensors)} "
            f"tensors, beginning with {first})",
            "update ComfyUI; if it is up to date, the text encoder is not supported in this form or size",
        )
    raise GGUFError(
        source.path,
        f"this is a {kind or 'diffusion model'}, not a text encoder",
        "choose a text encoder here, and load this file with the loader of its kind",
    )


def _is_diffusion_model(tensors: Tensors) -> bool:
    prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)} or tensors
    try:
        return comfy.model_detection.model_config_from_unet(own, "") is not None
    except (LookupError, ValueError, TypeError, AttributeError):  # it detects by reading on from a first sign
        return True


@contextlib.contextmanager
def _blaming(sources: Sequence[Source]) -> Iterator[None]:
    """Around the host's building: what it trips over is the fault of the file whose tensor it names, or the first."""
    ggufs = [source for source in sources if source.files]
    try:
        with host_builds(ggufs[0].files[0]):
            yield
    except GGUFError as error:
        named = (s.path for s in ggufs if any(shown(name)[1:-1] in error.problem for name in s.tensors))
        raise GGUFError(next(named, error.path), error.problem, error.remedy) from error


def _check_files_at_use(encoder: torch.nn.Module, files: Sequence[GGUFFile]) -> None:
    """Before a vocabulary is read, which every encoder begins with, its files must be those that were opened."""

    def check(*_: Any) -> None:
        for file in files:
            file.check_unchanged()

    for layer in encoder.modules():
        if isinstance(layer, Vocabulary):
            layer.register_forward_pre_hook(check)
