"""FLUX.1-dev's shapes (11.9 B parameters) as bf16, fp8 and GGUF files that hold one model. Runs in the host.

A product's speed depends on its numbers: a GPU at its power limit clocks lower the more bits change from one to the
next. So the weights are normally distributed as those of a trained model are, and the GGUF files are the bf16 file
quantised, not random blocks. To be quick, only a pattern of each distribution is made, and repeated.
"""

from __future__ import annotations

import sys
import types
from functools import cache
from pathlib import Path

import gguf
import torch
from safetensors.torch import save_file

PACK = Path(__file__).resolve().parents[1]
if "pack" not in sys.modules:
    pack = types.ModuleType("pack")
    pack.__path__ = [str(PACK)]
    sys.modules["pack"] = pack

from pack.loaders.gguf.types import GGMLType  # noqa: E402
from pack.loaders.quant.quantize import quantize  # noqa: E402

PATTERN = 1 << 25  # elements: 64 MB in bfloat16, more than any cache; whole blocks of every type
SMALL = 1 << 16  # elements; converters leave what is smaller as it is
GAIN = 0.6  # of a layer; keeps float16 activations finite


def write(folder: Path, kinds: set[str], pattern: int = PATTERN, depth: tuple[int, int] = (19, 38)) -> None:
    """Write `flux_KIND.safetensors` (bf16, fp8) and `flux_KIND.gguf` (a quant type) for each of `kinds`.

    Args:
        pattern: elements.
        depth: double and single blocks.
    """
    import _model_files

    shapes = _model_files.flux(*depth)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    @cache
    def values(fan_in: int) -> torch.Tensor:
        """bfloat16 of one distribution, whatever kinds are made."""
        made = torch.randn(pattern, generator=torch.Generator().manual_seed(fan_in))
        return (made * GAIN / fan_in**0.5).bfloat16()

    @cache
    def blocks(fan_in: int, kind: GGMLType) -> torch.Tensor:
        return quantize(values(fan_in), kind, device)

    def weight(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) < 2:
            return torch.full(shape, 0.5, dtype=torch.bfloat16)
        return _repeated(values(shape[-1]), torch.Size(shape).numel()).view(shape)

    if kinds & {"bf16", "fp8"}:
        weights = {key: weight(shape) for key, shape in shapes.items()}
        if "bf16" in kinds:
            save_file(weights, folder / "flux_bf16.safetensors")
        if "fp8" in kinds:
            eight = {k: w.to(torch.float8_e4m3fn) if w.dim() == 2 else w for k, w in weights.items()}
            save_file(eight, folder / "flux_fp8.safetensors")
        del weights
    for name in sorted(kinds - {"bf16", "fp8"}):
        kind = GGMLType[name.upper()]
        elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind.value)]
        writer = gguf.GGUFWriter(str(folder / f"flux_{name}.gguf"), "flux")
        for key, shape in shapes.items():
            count = torch.Size(shape).numel()
            if len(shape) == 2 and count >= SMALL and shape[-1] % elements == 0:
                data = _repeated(blocks(shape[-1], kind), count // elements * nbytes).view(shape[0], -1)
                writer.add_tensor(key, data.numpy(), raw_dtype=gguf.GGMLQuantizationType(kind.value))
            else:
                writer.add_tensor(key, weight(shape).float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _repeated(pattern: torch.Tensor, count: int) -> torch.Tensor:
    return pattern.repeat(-(-count // pattern.numel()))[:count]
