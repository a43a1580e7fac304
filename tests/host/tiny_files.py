"""State dicts of the tiny models, and the two files made of each: a GGUF and a safetensors with the same numbers.

The safetensors holds, in float32, exactly what `gguf.quants.dequantize` reads out of the GGUF's blocks, so that a
latent sampled from the one must equal a latent sampled from the other. Runs inside the host.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from host.tiny_dialects import DIALECTS, Arrays
from host.tiny_model import Shape, TinyModel
from safetensors.numpy import save_file

# Mostly Q8_0, and every other type here and there; the K and IQ types only where a row is a whole number of 256.
COMMON = ["Q8_0", "Q4_K", "Q6_K", "Q8_0", "Q4_0", "BF16", "Q5_K", "Q8_0", "F16", "Q3_K", "Q5_1", "Q8_0"]
ROWS_OF_256 = [*COMMON, "IQ4_XS", "Q2_K", "Q4_1", "IQ3_S", "Q5_0", "IQ2_XXS"]
ROWS_OF_32 = ["Q8_0", "Q4_0", "Q8_0", "BF16", "Q5_1", "Q8_0", "IQ4_NL", "F16", "Q5_0", "Q8_0", "Q4_1"]
OTHER_ROWS = ["F16", "BF16", "F32"]
SMALL = 1024  # elements; what has fewer stays F32

# gguf-py dequantises these but cannot quantise: where in a block its float16 scales lie (ggml-common.h).
SCALES = {
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q4_K: (0, 2),
    Type.Q5_K: (0, 2),
    Type.Q6_K: (208,),
    Type.IQ2_XXS: (0,),
    Type.IQ3_S: (0,),
    Type.IQ4_NL: (0,),
    Type.IQ4_XS: (0,),
}


@contextlib.contextmanager
def shrunk(tiny: TinyModel) -> Iterator[None]:
    """Replace, for a while, the sizes that the host does not learn from a state dict."""
    from comfy import model_detection, supported_models

    family = getattr(supported_models, tiny.family)
    table, detect = family.unet_config, model_detection.model_config_from_unet

    def detect_tiny(*args, **kwargs):
        config = detect(*args, **kwargs)
        if config is not None:
            config.unet_config.update(tiny.sizes)
        return config

    with contextlib.ExitStack() as undo:
        for path, values in tiny.defaults.items():
            module, _, name = path.rpartition(".")
            undo.enter_context(changed_defaults(getattr(importlib.import_module(module), name).__init__, values))
        undo.callback(setattr, family, "unet_config", table)
        undo.callback(setattr, model_detection, "model_config_from_unet", detect)
        family.unet_config = table | tiny.table
        model_detection.model_config_from_unet = detect_tiny
        yield


@contextlib.contextmanager
def changed_defaults(function: Callable, values: dict[str, object]) -> Iterator[None]:
    before = function.__defaults__ or ()
    names = [p.name for p in inspect.signature(function).parameters.values() if p.default is not p.empty]
    function.__defaults__ = tuple(values.get(name, old) for name, old in zip(names, before, strict=True))
    try:
        yield
    finally:
        function.__defaults__ = before


@contextlib.contextmanager
def declared_whole() -> Iterator[None]:
    """Under dynamic VRAM the host's Linear has no weight before one is loaded, and a state dict lacks it."""
    from comfy import memory_management

    before, memory_management.aimdo_enabled = memory_management.aimdo_enabled, False
    try:
        yield
    finally:
        memory_management.aimdo_enabled = before


def shapes_of(tiny: TinyModel) -> dict[str, Shape]:
    """All keys and shapes of the model that the host builds from the signature; call it within `shrunk`."""
    from comfy import model_detection, ops, supported_models

    signature = {key: torch.empty(shape, device="meta") for key, shape in tiny.signature.items()}
    if tiny.config:
        config = getattr(supported_models, tiny.family)(dict(tiny.config))
    else:
        config = model_detection.model_config_from_unet(signature, "", metadata=dict(tiny.metadata))
    if type(config).__name__ != tiny.family:
        raise ValueError(f"the signature of {tiny.family} is detected as {type(config).__name__}")
    config.custom_operations = ops.disable_weight_init
    config.set_inference_dtype(torch.float32, None)
    with declared_whole():
        model = config.get_model(signature, "", device=torch.device("meta")).diffusion_model
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def random_values(key: str, shape: Shape, seed: int) -> np.ndarray:
    """Numbers that keep activations near one: weights by their fan-in, the scales of norms about one."""
    rng = np.random.default_rng([zlib.crc32(key.encode()), seed])
    noise = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) >= 2:
        return noise / np.float32(np.prod(shape[1:]) ** 0.5)
    return noise * np.float32(0.1) + np.float32(key.endswith((".weight", ".scale")))


def state_dict(tiny: TinyModel) -> Arrays:
    native = {key: random_values(key, shape, tiny.seed) for key, shape in shapes_of(tiny).items()}
    return DIALECTS[tiny.dialect](native, tiny)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF: its bytes, as an array of rows, and what they stand for."""

    type: Type
    stored: np.ndarray
    shape: Shape  # the model's; that of `stored` may differ

    @property
    def rows(self) -> Shape:
        return self.stored.shape[:-1]

    @property
    def values(self) -> np.ndarray:
        return gguf.quants.dequantize(self.stored, self.type).astype(np.float32).reshape(self.shape)


def with_noise_in(values: np.ndarray, kind: Type, seed: int) -> np.ndarray:
    """Blocks of random bits in the shape of `values`, their scales set so that the numbers spread as `values` do."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (values.size // block, size), dtype=np.uint8)

    def set_scales(scale: float) -> np.ndarray:
        for start in SCALES[kind]:
            raw[:, start : start + 2] = np.array([scale], np.float16).view(np.uint8)
        return raw.reshape(*values.shape[:-1], -1)

    spread = gguf.quants.dequantize(set_scales(1.0), kind).std()
    return set_scales(values.std() / spread)


def store(values: np.ndarray, kind: Type, seed: int) -> np.ndarray:
    if kind in SCALES:
        return with_noise_in(values, kind, seed)
    return gguf.quants.quantize(values, kind)


def rearranged(key: str, shape: Shape) -> Shape:
    wanted = len(shape) > 1 and prod(shape) >= SMALL and shape[-1] % 256 and prod(shape) % 256 == 0
    return (prod(shape) // 256, 256) if wanted else shape


def dropped(key: str, shape: Shape) -> Shape:
    return dropped(key, shape[1:]) if len(shape) > 1 and shape[0] == 1 else shape


def pixel_convolutions(key: str, shape: Shape) -> Shape:
    return (*shape, 1, 1) if key.endswith((".proj_in.weight", ".proj_out.weight")) and len(shape) == 2 else shape


# How a file has a tensor's shape. "true" and "folded": 5-D ones as they are, as city96's fix_5d_tensors.py writes them,
# or the first two of five dimensions folded into one and nothing noted, as ggml's four dimensions make sd.cpp do.
# "rearranged": rows of 256 wherever the elements allow, with the true shape in `comfy.gguf.orig_shape.<key>`, as
# city96's convert.py does for SD1 and SDXL. "dropped": without the leading dimensions of 1, which `ggml_n_dims` does
# not count. "pixel_convolutions": SDXL's projections as sd.cpp has them.
LAYOUTS: dict[str, Callable[[str, Shape], Shape]] = {
    "true": lambda key, shape: shape,
    "rearranged": rearranged,
    "folded": lambda key, shape: (shape[0] * shape[1], *shape[2:]) if len(shape) == 5 else shape,
    "dropped": dropped,
    "pixel_convolutions": pixel_convolutions,
}


def tensors_of(tiny: TinyModel) -> dict[str, Tensor]:
    """The tiny model in a mixture of types; call it within `shrunk`."""
    tensors = {}
    for index, (key, values) in enumerate(state_dict(tiny).items()):
        stored_shape = LAYOUTS[tiny.layout](key, values.shape)
        if values.ndim < 2 or values.size < SMALL:
            kinds = ["F32"]
        else:
            row = stored_shape[-1]
            kinds = OTHER_ROWS if row % 32 else ROWS_OF_32 if row % 256 else ROWS_OF_256
        kind = Type[kinds[index % len(kinds)]]
        tensors[key] = Tensor(kind, store(values.reshape(stored_shape), kind, index), values.shape)
    return tensors


def write_gguf(path: Path, tiny: TinyModel, tensors: dict[str, Tensor]) -> None:
    writer = gguf.GGUFWriter(path, tiny.gguf)
    writer.add_custom_alignment(64)  # as torch allocates, so that BLAS rounds an F32 weight of the file alike
    for key, value in tiny.metadata.items():
        writer.add_string(key, value)
    for key, tensor in tensors.items():
        if tiny.layout == "rearranged" and tensor.rows != tensor.shape[:-1]:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", list(tensor.shape))
        writer.add_tensor(key, tensor.stored, raw_shape=tensor.stored.shape, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_safetensors(path: Path, tiny: TinyModel, tensors: dict[str, Tensor]) -> None:
    save_file({key: np.ascontiguousarray(t.values) for key, t in tensors.items()}, path, dict(tiny.metadata) or None)


def zeroed(tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    """The same tensors with one all zero, in float32."""
    shape = tensors[key].shape
    return tensors | {key: Tensor(Type.F32, np.zeros(shape, np.float32), shape)}


def probe_key(tensors: dict[str, Tensor], tiny: TinyModel) -> str:
    """The quantised weight that the latent must be seen to depend on: the largest with `probe` in its key."""
    quantised = {k: t for k, t in tensors.items() if t.type.name not in OTHER_ROWS and tiny.probe in k}
    return max((k for k in quantised if k.endswith(".weight")), key=lambda k: quantised[k].stored.nbytes)
