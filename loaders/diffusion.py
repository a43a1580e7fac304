"""A GGUF file becomes a MODEL: the host detects and builds it, our layers and tensors make it free of copies.

The file is mapped, its tensors become state-dict entries over the mapping (`tensors.py`), and the host's own
`load_diffusion_model_state_dict` does the rest with our layer classes (`ops.py`). What the host would do to plain
tensors by copying is done here on names only: prefixes, and diffusers' names (`diffusers_names.py`).

The model remembers its file (attachment `sluice`), checks before each sampling run that it is unchanged, and can be
made again by the host from its path, which core's hooks, device selectors and multi-GPU clones rely on.
"""

from __future__ import annotations

import gc
import logging
import traceback
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP

from . import architectures, diffusers_names
from .fit import INCOMPLETE_MODEL, built, fill_missing, host_builds, make_plain_elsewhere
from .gguf.errors import shown
from .gguf.reader import GGUFError, GGUFFile
from .ops import make_ops
from .patcher import check_files_of, patching_at_use
from .tensors import state_dict, with_plain_projections

log = logging.getLogger("sluice.loaders")

ATTACHMENT = "sluice"


@dataclass(frozen=True)
class LoadedModel:
    """What a model was made from; the report reads it."""

    file: GGUFFile
    architecture: str
    tensor_types: dict[str, int]  # type name -> bytes in the file

    def __repr__(self) -> str:
        types = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in self.tensor_types.items())
        return f"{self.file.path.name} ({self.architecture}: {types})"


def load_diffusion_model(
    path: str | Path, compute_dtype: torch.dtype | None = None, disable_dynamic: bool = False
) -> ModelPatcher:
    """Load the diffusion model in the GGUF file at `path` (any part of a split one).

    Args:
        compute_dtype: what activations and dequantised weights are in; None leaves it to the host, which chooses by
            architecture and device.
        disable_dynamic: make a classic patcher even where the host's dynamic VRAM is on (the host asks for that).

    Raises:
        GGUFError: no sound GGUF file, no diffusion model, an architecture that this ComfyUI does not know, or one
            that lacks tensors.
    """
    file = GGUFFile(path)
    try:
        model = _build(file, compute_dtype, disable_dynamic)
    except Exception as error:
        let_go(file, error)
        raise
    model.cached_patcher_init = (load_diffusion_model, (str(path), compute_dtype))
    model.set_attachments(ATTACHMENT, described(file))
    model.add_callback(CallbacksMP.ON_PRE_RUN, partial(_check_file, file))
    check_files_of(model.model, [file])
    log.info("loaded %r", model.get_attachment(ATTACHMENT))
    return model


def _build(file: GGUFFile, compute_dtype: torch.dtype | None, disable_dynamic: bool) -> ModelPatcher:
    if not file.tensors:
        raise GGUFError(file.path, "it holds no tensors", INCOMPLETE_MODEL)
    metadata = {"config": file.metadata["config"]} if "config" in file.metadata else None
    with host_builds(file):
        tensors, config = _detected(file, metadata)
        unet = None if config else comfy.model_detection.model_config_from_diffusers_unet(tensors)
        config = config or unet
    if config is None:
        raise _not_a_diffusion_model(file)
    device = comfy.model_management.get_torch_device()
    supported = list(config.supported_inference_dtypes)
    storage = compute_dtype or comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(tensors), supported_dtypes=supported
    )
    # The host would compute in another dtype where it thinks the device slow in this one; a user's choice stands.
    chosen = compute_dtype is not None
    manual_cast = None if chosen else comfy.model_management.unet_manual_cast(storage, device, supported)
    options = {"dtype": storage, "custom_operations": make_ops(storage, manual_cast)}
    with host_builds(file):
        load = partial(
            comfy.sd.load_diffusion_model_state_dict,
            model_options=options,
            metadata=metadata,
            disable_dynamic=disable_dynamic,
        )
        model = built(load, tensors)
        if unet is not None:
            names = comfy.utils.unet_to_diffusers(unet.unet_config)
            tensors = {names[name]: tensor for name, tensor in tensors.items() if name in names}
        fill_missing(file, model.model.diffusion_model, config.process_unet_state_dict(tensors))
        make_plain_elsewhere(model.model.diffusion_model, storage)
    model.model.manual_cast_dtype = manual_cast
    return patching_at_use(model)


def _detected(file: GGUFFile, metadata: dict | None) -> tuple[dict[str, torch.Tensor], Any]:
    """The file's tensors under the first names that the host detects a model by, and what it detected, or None."""
    tensors = state_dict(file)
    prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
    tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)} or tensors
    for spelling in (lambda: tensors, lambda: with_plain_projections(tensors), lambda: _of_diffusers(file, tensors)):
        candidate = spelling()
        if not candidate:
            continue
        config = comfy.model_detection.model_config_from_unet(candidate, "", metadata=metadata)
        if config is not None:
            return candidate, config
    return tensors, None


def _of_diffusers(file: GGUFFile, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    try:
        return diffusers_names.convert(tensors, comfy.model_detection.convert_diffusers_mmdit)
    except (ValueError, RuntimeError) as error:  # the latter is the host's, where shapes of two parts disagree
        raise GGUFError(file.path, str(error), INCOMPLETE_MODEL) from error


def _not_a_diffusion_model(file: GGUFFile) -> GGUFError:
    architecture = file.metadata.get("general.architecture")
    kind = architectures.other_kind(file.metadata, file.tensors)
    if kind is not None:
        return GGUFError(file.path, f"this is a {kind}, not a diffusion model", architectures.REMEDIES[kind])
    stated = f"architecture {shown(str(architecture))}" if architecture else "no architecture stated"
    first = ", ".join(shown(name) for name in list(file.tensors)[:3])
    return GGUFError(
        file.path,
        f"this ComfyUI knows no diffusion model with these tensors ({stated}; {len(file.tensors)} tensors, "
        f"beginning with {first})",
        "update ComfyUI; if it is up to date, the model is not supported in this form: look for another conversion",
    )


def let_go(file: GGUFFile, error: BaseException) -> None:
    """Nothing of a refused file stays mapped, else Windows would not let anybody replace it: whoever shows the error
    keeps its traceback, and that the tensors in the frames of the functions that have ended."""
    seen: set[int] = set()
    chain = [error]
    while chain:
        link = chain.pop()
        if id(link) in seen:
            continue
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        chain += [cause for cause in (link.__cause__, link.__context__) if cause is not None]
    if not file.close():
        gc.collect()  # a half-made model has references in circles


def _check_file(file: GGUFFile, patcher: ModelPatcher) -> None:
    file.check_unchanged()


def described(file: GGUFFile) -> LoadedModel:
    sizes: Counter[str] = Counter()
    for info in file.tensors.values():
        sizes[info.ggml_type.name] += info.nbytes
    architecture = str(file.metadata.get("general.architecture", "no architecture stated"))
    return LoadedModel(file, architecture, dict(sizes.most_common()))
