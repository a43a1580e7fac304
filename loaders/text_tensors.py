"""From a GGUF text encoder to the state dict that the host detects and loads, still without reading its weights.

Names change (`text_names.py`), and two things that llama.cpp's converter did to values are undone:

- It stores the norms of Gemma 2 and 3 with the 1 added that the model adds when it runs; the host adds it, too. One
  is taken off again, in float32, which is exact to half a unit in the last place of 1.
- It reorders the rows of q and k in Llama's architectures for a rotary embedding that turns neighbouring pairs; the
  host turns the halves of a head. The rows come back by gathering whole quantised rows. That is the only copy of
  weights that loading makes: two matrices of each layer in their quant type, about 8 % of a Llama 3 8B. (A view
  could not do it: the order within a head has two strides, and a block format allows one. Reordering the output of
  the layer instead would need no copy, but patches are written for the order of the host.)

Qwen 3.5 has a third thing, its linear attention (`linear_attention.py`).

What the host reads as a whole instead of through a layer becomes plain here, and nothing else does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .gguf.errors import shown
from .gguf.reader import GGUFError, GGUFFile
from .linear_attention import Heads, as_trained
from .mmproj import vision_tensors
from .quant.layout import dense, is_gguf, quantized
from .tensors import state_dict
from .text_names import DIALECTS, Dialect, dialect_of, is_llama_cpp, without_prefix
from .tokenizers import TOKENIZER_KEYS, tokenizer_tensors

CONVERT = "convert it again with an up-to-date llama.cpp, or use another conversion"

# Tables and matrices that the host adds or multiplies as they are, past the layers that would dequantise them.
_READ_WHOLE = ("position_embedding.weight", "mlp.router.weight", "mm_input_projection_weight")

# What the host looks for in an encoder with experts; our layers hold the two halves (`text_layers.py`).
_EXPERTS, _EXPERTS_MARK = "layers.0.mlp.experts.gate_up_proj.gate.weight", "layers.0.mlp.experts.gate_up_proj.weight"

Tensors = dict[str, torch.Tensor]


def text_encoder_tensors(file: GGUFFile, projector: GGUFFile | None = None) -> Tensors:
    """The tensors of the text encoder in `file` under the host's names, with its tokenizer where the host wants one.

    Args:
        projector: the vision projector (mmproj) that belongs to it.

    Raises:
        GGUFError: the host has no text encoder of this architecture, or the file contradicts its metadata.
    """
    tensors = state_dict(file)
    if is_llama_cpp(tensors):
        tensors = _translated(file, tensors)
    else:
        tensors = {without_prefix(name): tensor for name, tensor in tensors.items()}
    if projector is not None:
        tensors |= vision_tensors(file, projector)
    if _EXPERTS in tensors:
        tensors[_EXPERTS_MARK] = tensors[_EXPERTS]
    # GGUF has no unsigned bytes, so a tokenizer among the tensors was written as signed ones.
    tensors |= {name: tensors[name].view(torch.uint8) for name in TOKENIZER_KEYS if name in tensors}
    plain = plain_where_read_whole(tensors)
    return plain | tokenizer_tensors(file, plain)


def plain_where_read_whole(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The same tensors, with what the host reads past its layers as float32."""
    return {
        name: dense(tensor, torch.float32) if name.endswith(_READ_WHOLE) and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def _translated(file: GGUFFile, tensors: Tensors) -> Tensors:
    architecture = str(file.metadata.get("general.architecture", ""))
    dialect = dialect_of(architecture, tensors)
    if dialect is None:
        raise GGUFError(
            file.path,
            f"ComfyUI has no text encoder of the architecture {shown(architecture)}",
            f"choose one of these: {', '.join(DIALECTS)}",
        )
    result = {}
    further = _further_layers(file, architecture)
    for name, tensor in tensors.items():
        if name.startswith(further):
            continue
        translated = dialect.translate(name)
        if translated is None:
            problem = f"its tensor {shown(name)} is no part of a text encoder {shown(architecture)} that ComfyUI knows"
            raise GGUFError(file.path, problem, CONVERT)
        if translated:
            result[translated] = _as_trained(file, architecture, dialect, name, translated, tensor)
    return result


def _as_trained(
    file: GGUFFile, architecture: str, dialect: Dialect, name: str, translated: str, tensor: torch.Tensor
) -> torch.Tensor:
    if dialect.norm_shift and translated.endswith("norm.weight") and not translated.endswith(dialect.unshifted):
        return dense(tensor, torch.float32) - dialect.norm_shift
    if dialect.linear_attention and ".linear_attn." in translated:
        return _of_linear_attention(file, architecture, name, translated, tensor)
    if dialect.interleaved_heads and ".attn_q." in name:
        return _halves_apart(tensor, _heads(file, f"{architecture}.attention.head_count", tensor))
    if dialect.interleaved_heads and ".attn_k." in name:
        return _halves_apart(tensor, _heads(file, f"{architecture}.attention.head_count_kv", tensor))
    return tensor


def _further_layers(file: GGUFFile, architecture: str) -> tuple[str, ...]:
    """How the names of the layers begin that predict further tokens, which llama.cpp counts behind the model's own."""
    further, layers = (file.metadata.get(f"{architecture}.{key}", 0) for key in ("nextn_predict_layers", "block_count"))
    if type(further) is not int or type(layers) is not int:
        return ()
    return tuple(f"blk.{index}." for index in range(max(layers - further, 0), layers) if further <= layers)


def _of_linear_attention(
    file: GGUFFile, architecture: str, name: str, translated: str, tensor: torch.Tensor
) -> torch.Tensor:
    heads = Heads.of(file.metadata, architecture)
    if heads is None:
        problem = f"its metadata keys {shown(architecture + '.ssm.*')} do not say how many heads it has"
        raise GGUFError(file.path, problem, CONVERT)
    try:
        return as_trained(heads, translated.rpartition(".linear_attn.")[2], tensor)
    except ValueError as error:
        raise GGUFError(file.path, f"its tensor {shown(name)} {error}", CONVERT) from error


def _heads(file: GGUFFile, key: str, tensor: torch.Tensor) -> int:
    heads = file.metadata.get(key)
    if not isinstance(heads, int) or heads < 1 or tensor.shape[0] % (2 * heads):
        problem = f"its metadata key {shown(key)} is {heads!r}, which does not divide {tensor.shape[0]} rows into heads"
        raise GGUFError(file.path, problem, CONVERT)
    return heads


def _halves_apart(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows from pairs side by side (h, i, half) to halves apart (h, half, i)."""
    rows = tensor.shape[0]
    order = torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)
    if not is_gguf(tensor):
        return tensor[order]
    data, params = tensor._qdata, tensor._params
    if data.shape[0] != rows:  # rows that are no whole blocks cannot be taken apart
        return dense(tensor, torch.float32)[order]
    return quantized(data[order], params.ggml_type, params.orig_shape, params.orig_dtype)
