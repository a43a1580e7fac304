"""Whether a file's tensors are all that a model needs, what can be done where they are not, and the error else.

The host takes a file for what its key tensors say and then trusts it: a missing one is a KeyError somewhere in its
detection, or a warning in the log and a layer of uninitialised memory, which draws noise. Here each of these is an
error that names the file and the tensor.

Parts of a model that are no layers of ours (Wan Animate's motion encoder) take neither blocks nor shapes that differ
by dimensions of 1. Which they are shows when the host loads their weights, so those are made plain then, and the host
tries again.
"""

from __future__ import annotations

import contextlib
import logging
import re
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePath
from typing import Any, TypeVar

import torch

from .gguf.errors import shown
from .gguf.reader import GGUFError, GGUFFile
from .ops import MappedLayer
from .quant.layout import dense, is_gguf, reshaped

log = logging.getLogger("sluice.loaders")

INCOMPLETE_MODEL = "it is incomplete or was converted wrongly, download or convert it again"
UNFIT = (
    "it is incomplete or was converted wrongly (download or convert it again), or this version of ComfyUI and "
    "ComfyUI-Sluice do not fit each other (update both)"
)

# Parts that the host also takes from a file beside the text encoder, and leaves alone in the diffusion model when the
# text comes processed (LTX-2: comfy/ldm/lightricks/av_model.py, comfy/text_encoders/lt.py). Name -> remedy.
_WITH_TEXT_ENCODER = "load the text encoder together with its embeddings connectors, or use a conversion that has them"
OPTIONAL_PARTS = {
    "video_embeddings_connector": _WITH_TEXT_ENCODER,
    "audio_embeddings_connector": _WITH_TEXT_ENCODER,
}

# What the host's detection and constructors raise for shapes and names that contradict each other. A RuntimeError is
# left alone, but for one: it may as well be the device's.
_HOST_ERRORS = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, AssertionError, NameError)

# As our layers say it, and as torch does.
_MISMATCH = re.compile(r"size mismatch for (.+?): .*?\(\[?([\d, ]*)\]?\).*?\(\[?([\d, ]*)\]?\)")
_NOT_COPIED = re.compile(r'While copying the parameter named "(.+?)"')

Model = TypeVar("Model")


@contextlib.contextmanager
def host_builds(file: GGUFFile) -> Iterator[None]:
    """Around code of the host that reads the model off the tensors: what it trips over is the file's fault."""
    try:
        yield
    except GGUFError:
        raise
    except _HOST_ERRORS as error:
        what = f"{type(error).__name__}: {error}, in {_origin(error)}"
        raise GGUFError(file.path, f"ComfyUI cannot make a model of its tensors ({what})", UNFIT) from error
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        raise GGUFError(file.path, _mismatch(str(error)), INCOMPLETE_MODEL) from error


def _origin(error: BaseException) -> str:
    """Where it was raised, as `folder/file.py:line`."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{'/'.join(PurePath(last.filename).parts[-3:])}:{last.lineno}"


def built(build: Callable[[dict[str, torch.Tensor]], Model], tensors: dict[str, torch.Tensor]) -> Model:
    """`build(tensors)`; when the host refuses some of them, once more with those as plain tensors of its shapes."""
    try:
        return build(dict(tensors))
    except RuntimeError as error:
        repaired = dict(_repaired(tensors, str(error)))
        if not repaired:
            raise
    return build(tensors | repaired)


def _repaired(tensors: dict[str, torch.Tensor], message: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name in _NOT_COPIED.findall(message):
        if is_gguf(tensors.get(name)):
            yield name, dense(tensors[name], torch.float32)
    for name, given, needed in _MISMATCH.findall(message):
        without_ones = [[n for n in _shape(shape) if n != 1] for shape in (given, needed)]
        if name in tensors and without_ones[0] == without_ones[1]:
            yield name, reshaped(tensors[name], _shape(needed))


def make_plain_elsewhere(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """Weights that a host which assigns instead of copying has put, as blocks, into modules that are none of ours."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if is_gguf(parameter) and not isinstance(module, MappedLayer):
                plain = torch.nn.Parameter(dense(parameter, dtype), requires_grad=False)
                module.register_parameter(name, plain)


def _mismatch(message: str) -> str:
    found = _MISMATCH.findall(message)
    if not found:
        return f"its tensors do not fit the model ({message})"
    name, given, needed = found[0]
    more = f", and {len(found) - 1} more do not fit" if len(found) > 1 else ""
    return f"tensor {shown(name)} has the shape {_shape(given)}, the model needs {_shape(needed)}{more}"


def _shape(numbers: str) -> tuple[int, ...]:
    return tuple(int(n) for n in numbers.split(",") if n.strip())


class MissingPart(torch.nn.Module):
    """In the place of a part that the file lacks and the model can do without, until it is asked for."""

    def __init__(self, path: Path, name: str, remedy: str) -> None:
        super().__init__()
        self.path = path
        self.name = name
        self.remedy = remedy

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        problem = f"it has no tensors {shown(self.name + '.*')}, which this prompt needs"
        raise GGUFError(self.path, problem, self.remedy)


def fill_missing(file: GGUFFile, network: torch.nn.Module, given: Collection[str]) -> None:
    """Refuse a model that lacks weights; a missing bias is zero, as the host has it, and an optional part an error
    when it is used.

    Args:
        given: the names that the host looked for in the file's tensors and found.

    Raises:
        GGUFError: it lacks weights.
    """
    for part in OPTIONAL_PARTS:
        if hasattr(network, part) and not any(name.startswith(f"{part}.") for name in given):
            setattr(network, part, MissingPart(file.path, part, OPTIONAL_PARTS[part]))
            log.info("%s has no %s: load the text encoder that has it, which processes the text", file.path.name, part)
    parameters = dict(network.named_parameters())
    missing = [name for name in parameters if name not in given]
    weights = [name for name in missing if not name.endswith(".bias")]
    if weights:
        which = shown(weights[0]) if len(weights) == 1 else f"such as {shown(weights[0])}"
        problem = f"it lacks {len(weights)} of the model's {len(parameters)} tensors, {which}"
        raise GGUFError(file.path, problem, INCOMPLETE_MODEL)
    for name in missing:
        layer, _, key = name.rpartition(".")
        declared = parameters[name]
        zeros = torch.zeros(declared.shape, dtype=declared.dtype, device="cpu" if declared.is_meta else declared.device)
        network.get_submodule(layer).register_parameter(key, torch.nn.Parameter(zeros, requires_grad=False))
    if missing:
        log.warning(
            "%s: %d biases are not in the file and are zero, such as %s", file.path.name, len(missing), missing[0]
        )
