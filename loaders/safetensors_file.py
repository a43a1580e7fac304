"""The tensors of a safetensors file as `Weight`s over its mapping, for conversion without loading it.

Files whose weights are FP8 with a scale apart (`scale_weight`, or `weight_scale` with a `comfy_quant` mark) give the
product. Other quantised formats are refused: ComfyUI itself can read them, so the node can save them.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from .gguf.errors import INCOMPLETE, GGUFError, shown
from .safetensors_header import Entry, MalformedError, UnknownTypeError, parse
from .save_model import Weight

PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # the diffusion model within a checkpoint

# Endings of what belongs to an FP8 weight. A scale is multiplied in; the others serve computation only.
SCALES = (".scale_weight", ".weight_scale")
_COMPANIONS = (*SCALES, ".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")


class SafetensorsFile:
    """A safetensors file, mapped: its metadata, and its tensors without a copy.

    Raises:
        GGUFError: it is missing, cut short, or no safetensors file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                if self._data[8:9] != b"{":
                    remedy = "convert from the model's .safetensors file"
                    raise GGUFError(self.path, "it is no safetensors file", remedy)
                entries, self.metadata = parse(file, len(self._data))
        except UnknownTypeError as error:
            remedy = "load it in ComfyUI and save it with the node Save GGUF"
            raise GGUFError(self.path, str(error), remedy) from error
        except MalformedError as error:
            raise GGUFError(self.path, f"not a sound safetensors file: {error}", INCOMPLETE) from error
        except (OSError, ValueError) as error:  # the latter: an empty file
            raise GGUFError(self.path, f"it cannot be read ({error})", "check its name and folder") from error
        self.tensors = {entry.name: self._tensor(entry) for entry in entries}

    def _tensor(self, entry: Entry) -> torch.Tensor:
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(self._data[entry.offset : entry.offset + entry.nbytes], dtype=torch.uint8)
        if flat.data_ptr() % entry.dtype.itemsize:  # a header of odd length; the format allows it
            flat = flat.clone()
        return flat.view(entry.dtype).view(entry.shape)

    def weights(self) -> list[Weight]:
        """The diffusion model's tensors (all, where none has its prefix), scaled ones with their scale.

        Raises:
            GGUFError: weights are in a quantised format other than scaled FP8.
        """
        tensors = self.tensors
        for prefix in PREFIXES:
            inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            if inside:
                tensors = inside
                break
        return [
            self._weight(name, tensor, tensors) for name, tensor in tensors.items() if not name.endswith(_COMPANIONS)
        ]

    def _weight(self, name: str, tensor: torch.Tensor, tensors: dict[str, torch.Tensor]) -> Weight:
        layer = name.removesuffix(".weight")
        scale = next((tensors[layer + end] for end in SCALES if layer + end in tensors), None)
        shape = tuple(tensor.shape)
        if scale is None or layer == name:
            return Weight(name, shape, tensor.dtype, partial(_itself, tensor))
        fits = scale.numel() == 1 or (tensor.dim() == 2 and scale.numel() == shape[0])
        fits = fits and f"{layer}.pre_quant_scale" not in tensors
        if tensor.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2) or not fits:
            problem = f"tensor {shown(name)} is quantised in a format that is not converted from a file"
            raise GGUFError(self.path, problem, "load it in ComfyUI and save it with the node Save GGUF")
        make: Callable[[], torch.Tensor] = partial(_scaled, tensor, scale)
        return Weight(name, shape, torch.float32, make)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _scaled(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    factor = scale.float().reshape(-1, *([1] * (tensor.dim() - 1))) if scale.numel() > 1 else scale.float().reshape(())
    return tensor.float().mul_(factor)
