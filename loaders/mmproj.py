"""The vision projector (mmproj) of a text encoder: where it lies, and its tensors under the host's names.

llama.cpp writes the part of a model that sees into a file of its own, which says so in its metadata
(`general.type` mmproj, `general.architecture` clip). The host knows one file only: there, the part is a prefix
(`visual.`, `vision_model.`) in the text encoder's state dict. So the projector is looked for beside the text encoder
and joined to it. Which one belongs to it its metadata tell: the kind of projector and the width that it projects to.
Names decide between several (two quant types of the same, or the files of two sizes that are equally wide).

What the converter took apart is put together: q, k and v of an attention, and the two time steps of a patch
embedding. What it made a convolution of (Gemma 4) becomes a matrix again. All are small, and the copies are all that
joining costs. The part that hears, in the same file, is left out.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .gguf.errors import shown
from .gguf.reader import GGUFError, GGUFFile
from .quant.layout import dense, is_gguf, quantized
from .tensors import state_dict

log = logging.getLogger("sluice.loaders")

WORD = "mmproj"  # what the name of such a file contains by custom

_KIND = r"(?P<kind>weight|bias|(?:input|output)_(?:max|min))"
_LAYER = re.compile(rf"v\.(?P<list>blk|deepstack)\.(?P<index>\d+)\.(?P<part>\w+)\.{_KIND}")
_BOUNDS = ("_max", "_min")  # that a layer's input and output are held within
_QKV = re.compile(r"(?P<before>v\.blk\.\d+\.attn_)(?P<which>[qkv])(?P<kind>\.(?:weight|bias))")

CONVERT = "convert it again with an up-to-date llama.cpp, or use another conversion"


@dataclass(frozen=True)
class Tower:
    """How the host names one kind of projector's tensors.

    Args:
        projectors: `clip.projector_type` or `clip.vision.projector_type`.
        layers: what a layer's tensors begin with; `{}` is its number.
        layer: llama.cpp's name of a part of a layer -> the host's.
        whole: the same for what is no part of a layer.
        joined_qkv: the host has q, k and v of an attention as one matrix.
        deepstack: what the mergers between layers begin with, numbered as they come.
        norm_shift: what the converter added to this norm's weight -> how much.
        bounded: parts of a layer that are a matrix and its bounds, and the matrix is in a `linear` of its own.
        bare: what is no part of a layer and, in the host, a parameter of its own without `.weight`.
        flat_patches: the host has a matrix where the converter made a convolution of it.
        unused: how the names begin of what the host has no use for, or of what hears.
        layers_needed: how many layers a text encoder has at least with which the host can encode a text, once it sees.
    """

    projectors: tuple[str, ...]
    layers: str
    layer: Mapping[str, str]
    whole: Mapping[str, str]
    joined_qkv: bool = True
    deepstack: str = ""
    norm_shift: tuple[str, float] = ("", 0.0)
    bounded: bool = False
    bare: tuple[str, ...] = ()
    flat_patches: bool = False
    unused: tuple[str, ...] = ()
    layers_needed: int = 0


_QWEN_BLOCK = {"attn_qkv": "attn.qkv", "attn_out": "attn.proj", "ln1": "norm1", "ln2": "norm2"}
_QWEN25 = Tower(
    ("qwen2.5vl_merger", "qwen2vl_merger"),
    "visual.blocks.{}.",
    _QWEN_BLOCK | {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
    {
        "v.patch_embd": "visual.patch_embed.proj",
        "v.post_ln": "visual.merger.ln_q",
        "mm.0": "visual.merger.mlp.0",
        "mm.2": "visual.merger.mlp.2",
    },
)
_QWEN3 = Tower(
    ("qwen3vl_merger",),
    "visual.blocks.{}.",
    _QWEN_BLOCK | {"ffn_up": "mlp.linear_fc1", "ffn_down": "mlp.linear_fc2"},
    {
        "v.patch_embd": "visual.patch_embed.proj",
        "v.position_embd": "visual.pos_embed",
        "v.post_ln": "visual.merger.norm",
        "mm.0": "visual.merger.linear_fc1",
        "mm.2": "visual.merger.linear_fc2",
    },
    deepstack="visual.deepstack_merger_list.{}.",
)
# The same without mergers between layers; the host takes the prefix off again.
_QWEN35 = replace(
    _QWEN3,
    layers=f"model.{_QWEN3.layers}",
    whole={part: f"model.{name}" for part, name in _QWEN3.whole.items()},
    deepstack="",
)
_DEEPSTACK = {"norm": "norm", "fc1": "linear_fc1", "fc2": "linear_fc2"}
_GEMMA3 = Tower(
    ("gemma3",),
    "vision_model.encoder.layers.{}.",
    {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_out": "self_attn.out_proj",
        "ln1": "layer_norm1",
        "ln2": "layer_norm2",
        "ffn_up": "mlp.fc1",
        "ffn_down": "mlp.fc2",
    },
    {
        "v.patch_embd": "vision_model.embeddings.patch_embedding",
        "v.position_embd": "vision_model.embeddings.position_embedding",
        "v.post_ln": "vision_model.post_layernorm",
        "mm.input_projection": "multi_modal_projector.mm_input_projection",
        "mm.soft_emb_norm": "multi_modal_projector.mm_soft_emb_norm",
    },
    joined_qkv=False,
    norm_shift=("mm.soft_emb_norm.weight", 1.0),
    # Seen in 0.18 to 0.30: the encoder of a Gemma 3 4B that sees looks for its tokens under another name than its
    # tokenizer writes them, also from safetensors. It reads text where it does not see. A 12B has 48 layers.
    layers_needed=48,
)

_GEMMA4 = Tower(
    ("gemma4v",),
    "vision_model.encoder.layers.{}.",
    {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_out": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "ln1": "input_layernorm",
        "attn_post_norm": "post_attention_layernorm",
        "ln2": "pre_feedforward_layernorm",
        "ffn_post_norm": "post_feedforward_layernorm",
    },
    {
        "v.patch_embd": "vision_model.patch_embedder.input_proj",
        "v.position_embd": "vision_model.patch_embedder.position_embedding_table",
        "mm.input_projection": "multi_modal_projector.embedding_projection",
    },
    joined_qkv=False,
    bounded=True,
    bare=("v.position_embd",),
    flat_patches=True,
    unused=("a.", "mm.a.", "v.std_"),
)

# `general.architecture` of the text encoder -> the projectors that the host knows for it.
TOWERS: dict[str, Tower] = {
    **{"qwen2vl": _QWEN25, "qwen3vl": _QWEN3, "qwen35": _QWEN35},
    **{"gemma3": _GEMMA3, "gemma4": _GEMMA4},
}

# The host recognises the small Qwen3-VLs by this before it takes it off; of the 32B, which is 5120 wide, it expects
# the names without.
_QWEN3_PREFIX, _WITHOUT_PREFIX = "model.", 5120


def is_projector(file: GGUFFile) -> bool:
    """Whether a file says that it is a vision projector."""
    return file.metadata.get("general.type") == WORD or (
        file.metadata.get("general.architecture") == "clip" and any(name.startswith("v.") for name in file.tensors)
    )


def find_projector(model: GGUFFile) -> GGUFFile | None:
    """The projector beside `model`, open, or None where the host has no use for one or none fits."""
    tower = TOWERS.get(str(model.metadata.get("general.architecture")))
    if tower is None:
        return None
    best: GGUFFile | None = None
    for path in _candidates(model.path):
        try:
            file = GGUFFile(path)
        except GGUFError:
            continue  # not this model's concern; whoever chooses that file is told
        if is_projector(file) and _fits(model, file, tower):
            best = file
            break
        file.close()
    if best is not None and not _large_enough(model, tower):
        log.info("%s reads text only: %s is left out, because %s", model.path.name, best.path.name, _too_small(tower))
        best.close()
        return None
    return best


def check_fits(model: GGUFFile, projector: GGUFFile) -> None:
    """Raises GGUFError unless `projector`, which somebody chose, belongs to `model`."""
    tower = TOWERS.get(str(model.metadata.get("general.architecture")))
    if tower is None or not _fits(model, projector, tower):
        raise GGUFError(
            projector.path,
            f"it is the vision projector of another model than {model.path.name}",
            "choose the mmproj file that was published with the text encoder, or none",
        )
    if not _large_enough(model, tower):
        raise GGUFError(projector.path, _too_small(tower), f"leave it out: {model.path.name} reads text without it")


def _large_enough(model: GGUFFile, tower: Tower) -> bool:
    last = f".{tower.layers_needed - 1}."
    return tower.layers_needed == 0 or any(last in name for name in model.tensors)


def _too_small(tower: Tower) -> str:
    return (
        f"ComfyUI encodes no text with a model of this kind that sees and has fewer than {tower.layers_needed} layers"
    )


def beside(path: str | Path) -> list[Path]:
    """The files by whose names they are vision projectors in the folder of `path`, in a fixed order."""
    return [other for other in sorted(Path(path).parent.glob("*.[gG][gG][uU][fF]")) if WORD in other.name.lower()]


def _candidates(path: Path) -> list[Path]:
    """Files with `mmproj` in their names, those most like the model's first; without any, all other GGUF files."""
    named = beside(path)
    others = named or [other for other in sorted(path.parent.glob("*.[gG][gG][uU][fF]")) if other != path]
    return sorted(others, key=lambda other: -_likeness(path, other))


def _likeness(path: Path, other: Path) -> int:
    """How many words of the two names agree."""
    ours, theirs = (set(re.split(r"[-_. ]+", name.stem.lower())) for name in (path, other))
    return len(ours & theirs)


def _fits(model: GGUFFile, projector: GGUFFile, tower: Tower) -> bool:
    stated = [projector.metadata.get(key) for key in ("clip.projector_type", "clip.vision.projector_type")]
    architecture = model.metadata.get("general.architecture")
    width = model.metadata.get(f"{architecture}.embedding_length")
    return any(kind in tower.projectors for kind in stated) and width == _output_width(projector)


def _output_width(projector: GGUFFile) -> int | None:
    width = projector.metadata.get("clip.vision.projection_dim")
    return width if isinstance(width, int) else None


def vision_tensors(model: GGUFFile, projector: GGUFFile) -> dict[str, torch.Tensor]:
    """The projector's tensors under the names that the host has for them in the state dict of `model`.

    Raises:
        GGUFError: it has a tensor that the host has no name for.
    """
    architecture = str(model.metadata.get("general.architecture"))
    tower = TOWERS[architecture]
    tensors = _repaired(state_dict(projector), tower)
    names = dict(_translated(projector, tower, tensors))
    wide = model.metadata.get(f"{architecture}.embedding_length") == _WITHOUT_PREFIX
    prefix = _QWEN3_PREFIX if tower is _QWEN3 and not wide else ""
    return {prefix + names[name]: tensor for name, tensor in tensors.items()}


def _repaired(tensors: dict[str, torch.Tensor], tower: Tower) -> dict[str, torch.Tensor]:
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(tower.unused)}
    tensors |= {name: tensor.reshape(()) for name, tensor in tensors.items() if name.endswith(_BOUNDS)}
    if tower.flat_patches and "v.patch_embd.weight" in tensors:
        kernel = dense(tensors["v.patch_embd.weight"], torch.float32)
        tensors["v.patch_embd.weight"] = kernel.movedim(1, -1).flatten(1)
    shifted, shift = tower.norm_shift
    if shifted in tensors:
        tensors[shifted] = dense(tensors[shifted], torch.float32) - shift
    later = tensors.pop("v.patch_embd.weight.1", None)
    if later is not None:
        steps = [dense(step, torch.float32) for step in (tensors["v.patch_embd.weight"], later)]
        tensors["v.patch_embd.weight"] = torch.stack(steps, dim=2)
    # Early converters called the first matrix of a two-layer MLP the one that projects down.
    if "v.blk.0.ffn_gate.weight" not in tensors and _projects_down(tensors.get("v.blk.0.ffn_up.weight")):
        swap = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
        tensors = {re.sub(r"ffn_(?:up|down)", lambda m: swap[m[0]], name): t for name, t in tensors.items()}
    return _with_joined_qkv(tensors) if tower.joined_qkv else tensors


def _projects_down(matrix: torch.Tensor | None) -> bool:
    return matrix is not None and matrix.shape[0] < matrix.shape[1]


def _with_joined_qkv(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result = {}
    for name, tensor in tensors.items():
        match = _QKV.fullmatch(name)
        if match is None:
            result[name] = tensor
        elif match["which"] == "q":
            parts = [tensors[f"{match['before']}{which}{match['kind']}"] for which in "qkv"]
            result[f"{match['before']}qkv{match['kind']}"] = _stacked(parts)
    return result


def _stacked(parts: list[torch.Tensor]) -> torch.Tensor:
    """Matrices one below the other: blocks stay blocks where all have the same type."""
    blocks = [part for part in parts if is_gguf(part)]
    if not blocks and len({part.dtype for part in parts}) == 1:
        return torch.cat(parts)
    if len(blocks) < len(parts) or len({part._params.ggml_type for part in blocks}) > 1:
        return torch.cat([dense(part, torch.float32) for part in parts])
    shape = (sum(part.shape[0] for part in blocks), *blocks[0].shape[1:])
    return quantized(torch.cat([part._qdata for part in blocks]), blocks[0]._params.ggml_type, shape)


def _translated(file: GGUFFile, tower: Tower, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    matches = {name: _LAYER.fullmatch(name) for name in tensors}
    stacked = sorted({int(m["index"]) for m in matches.values() if m is not None and m["list"] == "deepstack"})
    for name, match in matches.items():
        translated = None
        if match is None:
            part, _, kind = name.rpartition(".")
            translated = tower.whole.get(part)
            # A parameter of its own in the host, with `_weight` in its name.
            separator = "_" if translated == _GEMMA3.whole["mm.input_projection"] else "."
            if part not in tower.bare:
                translated = translated and f"{translated}{separator}{kind}"
        elif match["list"] == "deepstack" and tower.deepstack and match["part"] in _DEEPSTACK:
            prefix = tower.deepstack.format(stacked.index(int(match["index"])))
            translated = f"{prefix}{_DEEPSTACK[match['part']]}.{match['kind']}"
        elif match["list"] == "blk" and match["part"] in tower.layer:
            matrix = tower.bounded and tensors[name].dim() > 1
            part = f"{tower.layer[match['part']]}{'.linear' if matrix else ''}"
            translated = f"{tower.layers.format(match['index'])}{part}.{match['kind']}"
        if translated is None:
            problem = f"its tensor {shown(name)} is no part of a vision projector that ComfyUI knows"
            raise GGUFError(file.path, problem, CONVERT)
        yield name, translated
