"""Whether a file's tensors are all that a model needs, and the error when they are not.

The host takes a file for what its key tensors say and then trusts it: a missing one is a KeyError somewhere in its
detection, or a warning in the log and a layer of uninitialised memory, which draws noise. Here each of these is an
error that names the file and the tensor.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Collection, Iterator

import torch

from .gguf.errors import shown
from .gguf.reader import GGUFError, GGUFFile

log = logging.getLogger("sluice.loaders")

INCOMPLETE_MODEL = "it is incomplete or was converted wrongly, download or convert it again"

# What the host's detection and constructors raise for shapes and names that contradict each other. A RuntimeError is
# left alone, but for one: it may as well be the device's.
_HOST_ERRORS = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, AssertionError, NameError)

# As our layers say it, and as torch does.
_MISMATCH = re.compile(r"size mismatch for (.+?): .*?\(\[?([\d, ]*)\]?\).*?\(\[?([\d, ]*)\]?\)")


@contextlib.contextmanager
def host_builds(file: GGUFFile) -> Iterator[None]:
    """Around code of the host that reads the model off the tensors: what it trips over is the file's fault."""
    try:
        yield
    except GGUFError:
        raise
    except _HOST_ERRORS as error:
        problem = f"ComfyUI cannot make a model of its tensors ({type(error).__name__}: {error})"
        raise GGUFError(file.path, problem, INCOMPLETE_MODEL) from error
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        raise GGUFError(file.path, _mismatch(str(error)), INCOMPLETE_MODEL) from error


def _mismatch(message: str) -> str:
    found = _MISMATCH.findall(message)
    if not found:
        return f"its tensors do not fit the model ({message})"
    name, given, needed = found[0]
    more = f", and {len(found) - 1} more do not fit" if len(found) > 1 else ""
    return f"tensor {shown(name)} has the shape {_shape(given)}, the model needs {_shape(needed)}{more}"


def _shape(numbers: str) -> tuple[int, ...]:
    return tuple(int(n) for n in numbers.split(",") if n.strip())


def fill_missing(file: GGUFFile, network: torch.nn.Module, given: Collection[str]) -> None:
    """Refuse a model that lacks weights; a missing bias is zero, as the host has it.

    Args:
        given: the names that the host looked for in the file's tensors and found.

    Raises:
        GGUFError: it lacks weights.
    """
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
