"""State dicts of the tiny text encoders, and the files made of each: GGUF as llama.cpp writes it, and safetensors.

The safetensors holds, in float32 and under the host's names, exactly what `gguf.quants.dequantize` reads out of the
GGUF's blocks, with what llama.cpp's converter does to values undone. The names are gguf-py's own, by which that
converter names tensors; what it does to values is written down here from its code (conversion/*.py). Runs inside the
host.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny_tokenizers
import torch
from gguf import GGMLQuantizationType as Type
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
from host.tiny_encoder import VOCABULARY, TinyEncoder
from host.tiny_files import OTHER_ROWS, ROWS_OF_32, ROWS_OF_256, SMALL, Tensor, declared_whole, random_values, store
from pack.loaders.tokenizer_json import O200K_PATTERN
from pack.loaders.tokenizers import TEKKEN_PATTERN
from safetensors.numpy import save_file

Arrays = dict[str, np.ndarray]


# --- smaller sizes in the host


@contextlib.contextmanager
def shrunk(tiny: TinyEncoder) -> Iterator[None]:
    """Replace, for a while, the sizes that the host writes down."""
    import comfy.sd1_clip

    with contextlib.ExitStack() as undo:
        for place, values in tiny.sizes.items():
            target = found(place)
            if isinstance(target, dict):
                undo.enter_context(updated(target, values))
                continue
            arguments = inspect.signature(target.__init__).parameters
            forced = {name: value for name, value in values.items() if name in arguments}
            undo.callback(setattr, target, "__init__", target.__init__)
            target.__init__ = with_arguments(target.__init__, forced)
            for name in values.keys() - forced.keys():
                undo.callback(setattr, target, name, getattr(target, name))
                setattr(target, name, values[name])
        undo.callback(setattr, comfy.sd1_clip, "json", comfy.sd1_clip.json)
        comfy.sd1_clip.json = types.SimpleNamespace(**{**vars(json), "load": partial(loaded, tiny)})
        yield


def found(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"comfy.{module}"), name)


def with_arguments(function: Callable, values: dict[str, object]) -> Callable:
    def call(*args: object, **kwargs: object) -> object:
        return function(*args, **{**kwargs, **values})

    call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return call


@contextlib.contextmanager
def updated(table: dict, values: dict) -> Iterator[None]:
    before = dict(table)
    table.update(values)
    try:
        yield
    finally:
        table.clear()
        table.update(before)


def loaded(tiny: TinyEncoder, file: Any) -> Any:
    """`json.load`, with the sizes of a configuration replaced."""
    return {**json.load(file), **tiny.json.get(Path(file.name).name, {})}


# --- the host's state dict


def state_dict(tiny: TinyEncoder) -> Arrays:
    """Random numbers for all keys of the host's class; call it within `shrunk`."""
    import comfy.ops

    model = found(tiny.model)
    names = list(inspect.signature(model.__init__).parameters)
    if "config_dict" in names or names[1:2] == ["config_dict"]:
        folder = Path(importlib.import_module("comfy.sd1_clip").__file__).parent  # type: ignore[arg-type]
        config = {}
        for name in tiny.json if "llama" not in tiny.model else ():
            with next(folder.rglob(name)).open() as file:
                config = loaded(tiny, file)
        arguments: tuple = (config, torch.float32, torch.device("meta"), comfy.ops.manual_cast)
    else:
        config = found(next(iter(tiny.sizes)))()
        # Experts are a class of the host's mixed precision only.
        bank = comfy.ops.mixed_precision_ops({}, torch.float32).MoEExperts
        operations = type("Operations", (comfy.ops.manual_cast,), {"MoEExperts": bank})
        arguments = (config, torch.device("meta"), torch.float32, operations)
    with declared_whole():
        built = model(*arguments)
    shapes = {key: tuple(value.shape) for key, value in built.state_dict().items() if value is not None}
    shapes |= {name: tuple(expert_shape(m)) for name, m in experts(built)}
    return {key: within_bounds(key, random_values(key, shape, 0)) for key, shape in shapes.items()}


def within_bounds(key: str, value: np.ndarray) -> np.ndarray:
    """Bounds of activations that cut off a few of them."""
    far = {"_max": 1, "_min": -1}.get(key[-4:])
    return value if far is None or value.ndim else np.asarray(far * (1.5 + abs(value)), np.float32)


def experts(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if type(module).__name__ == "MoEExperts":
            yield f"{name}.weight", module


def expert_shape(module: Any) -> tuple[int, ...]:
    return (module.num_experts, module.out_features, module.in_features)


# --- what llama.cpp makes of it


@dataclass(frozen=True)
class Rule:
    """How the converter changes one tensor: into the parts that it writes, and back."""

    split: Callable[[np.ndarray], list[np.ndarray]] = lambda value: [value]
    join: Callable[[list[np.ndarray]], np.ndarray] = lambda parts: parts[0]


def interleaved(value: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute."""
    rows = value.shape[0] // heads // 2
    return value.reshape(heads, 2, rows, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def apart(value: np.ndarray, heads: int) -> np.ndarray:
    return value.reshape(heads, -1, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def permuting(heads: int) -> Rule:
    return Rule(lambda value: [interleaved(value, heads)], lambda parts: apart(parts[0], heads))


def tiled(value: np.ndarray, axis: int, keys: int, values: int) -> np.ndarray:
    """_LinearAttentionVReorderBase._reorder_v_heads."""
    shape = value.shape
    parts = (*shape[:axis], keys, values // keys, shape[axis] // values, *shape[axis + 1 :])
    return value.reshape(parts).swapaxes(axis, axis + 1).reshape(shape)


def of_linear_attention(tiny: TinyEncoder, part: str) -> Rule:
    """What Qwen3NextModel and Qwen3_5TextModel do to one tensor."""
    keys, values = (int(tiny.metadata[f"ssm.{name}"]) for name in ("group_count", "time_step_rank"))  # type: ignore[call-overload]
    first = 2 * keys * int(tiny.metadata["ssm.state_size"])  # type: ignore[call-overload]
    axis, before = {
        **{"in_proj_qkv.weight": (0, first), "conv1d.weight": (0, first), "out_proj.weight": (1, 0)},
        "norm.weight": (None, 0),
    }.get(part, (0, 0))

    def reordered(value: np.ndarray, keys: int) -> np.ndarray:
        if axis is None:
            return value
        head, tail = np.split(value, [before], axis)
        return np.concatenate([head, tiled(tail, axis, keys, values)], axis)

    def split(value: np.ndarray) -> list[np.ndarray]:
        value = -np.exp(value) if part == "A_log" else value
        value = value.squeeze(1) if part == "conv1d.weight" else value
        return [reordered(value, keys)]

    def join(parts: list[np.ndarray]) -> np.ndarray:
        value = reordered(parts[0], values // keys)
        value = torch.log(-torch.from_numpy(value)).numpy() if part == "A_log" else value
        return value[:, None] if part == "conv1d.weight" else value

    return Rule(split, join)


ONE = np.float32(1)
PLUS_ONE = Rule(lambda value: [value + ONE], lambda parts: parts[0] - ONE)
GATE_AND_UP = Rule(
    lambda value: [value[:, ::2], value[:, 1::2]],
    lambda parts: np.stack(parts, 2).reshape(parts[0].shape[0], -1, *parts[0].shape[2:]),
)
Q_K_V = Rule(lambda value: list(np.split(value, 3)), np.concatenate)
TWO_STEPS = Rule(lambda value: [value[:, :, 0], value[:, :, 1]], lambda parts: np.stack(parts, 2))
FEWER_ROWS = 3


def shortened(rows: int) -> Rule:
    def join(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([parts[0], np.zeros((FEWER_ROWS, parts[0].shape[1]), np.float32)])

    return Rule(lambda value: [value[: rows - FEWER_ROWS]], join)


def llama_cpp(tiny: TinyEncoder, key: str) -> tuple[list[str], Rule]:
    """The names and the rule for a tensor of the language model."""
    numbers = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[tiny.arch], 64)
    hf = key
    if tiny.arch == "gpt-oss":
        hf = f"model.{key}"
    if key.startswith("model.lm_head."):  # the host's own prefix
        hf = key.removeprefix("model.")
    if key.endswith(("sinks", "layer_scalar")):
        hf = f"{hf}.weight"
    if "gate_up_proj." in key:
        found = [names.get_name(hf.replace("gate_up", part), (".weight", ".bias")) for part in ("gate", "up")]
        return found, GATE_AND_UP  # type: ignore[return-value]
    if key.endswith(".dt_bias"):
        hf = key.replace(".dt_bias", ".dt_proj.bias")
    name = names.get_name(hf, (".weight", ".bias"))
    if name is None:
        raise ValueError(f"gguf-py has no name for {key}")
    if tiny.arch in ("llama", "mistral3") and ".q_proj." in key:
        return [name], permuting(tiny.metadata["attention.head_count"])  # type: ignore[arg-type]
    if tiny.arch in ("llama", "mistral3") and ".k_proj." in key:
        return [name], permuting(tiny.metadata["attention.head_count_kv"])  # type: ignore[arg-type]
    if tiny.arch in ("gemma2", "gemma3", "qwen35") and key.endswith("norm.weight") and "linear_attn" not in key:
        return [name], PLUS_ONE
    if ".linear_attn." in key:
        return [name], of_linear_attention(tiny, key.rpartition(".linear_attn.")[2])
    return [name], Rule()


DEEPSTACK = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}
MERGER = {"norm": "v.post_ln", "linear_fc1": "mm.0", "linear_fc2": "mm.2"}


def projector(tiny: TinyEncoder, key: str) -> tuple[list[str], Rule]:
    """The names and the rule for a tensor of the vision projector."""
    names = gguf.get_tensor_name_map(MODEL_ARCH.MMPROJ, 64)
    parts = key.split(".")
    kind = parts[-1]
    if key == "visual.patch_embed.proj.weight":
        return ["v.patch_embd.weight", "v.patch_embd.weight.1"], TWO_STEPS
    if parts[1] == "deepstack_merger_list":
        layer = tiny.sizes["text_encoders.qwen3vl:QWEN3VL_VISION"]["qwen3vl_8b"]["deepstack_visual_indexes"]  # type: ignore[index]
        return [f"v.deepstack.{layer[int(parts[2])]}.{DEEPSTACK[parts[3]]}.{kind}"], Rule()
    if parts[1] == "merger" and parts[2] in MERGER:
        return [f"{MERGER[parts[2]]}.{kind}"], Rule()
    if tiny.arch == "qwen2vl" and ".attn.qkv." in key:
        return [f"v.blk.{parts[2]}.attn_{which}.{kind}" for which in "qkv"], Q_K_V
    if tiny.projector == "gemma4v":
        return gemma4v(names, key)
    hf = key.replace("_weight", ".weight") if key.startswith("multi_modal_projector.") else key
    hf = f"vision_tower.{hf}" if key.startswith("vision_model.") else hf
    name = names.get_name(hf, (".weight", ".bias"))
    if name is None:
        raise ValueError(f"gguf-py has no name for {key}")
    return [name], PLUS_ONE if "soft_emb_norm" in key else Rule()


def gemma4v(names: Any, key: str) -> tuple[list[str], Rule]:
    """What Gemma4VisionAudioModel does, from transformers' names."""
    hf = key.replace("vision_model.encoder.", "vision_model.model.").replace(".linear.weight", ".weight")
    hf = hf.replace("vision_model.patch_embedder.", "model.vision_tower.patch_embedder.")
    hf = hf.replace("multi_modal_projector.", "model.embed_vision.")
    if key.endswith("position_embedding_table"):
        hf += ".weight"
    name = names.get_name(hf, (".weight", ".input_max", ".input_min", ".output_max", ".output_min"))
    if name is None:
        raise ValueError(f"gguf-py has no name for {key}")
    if key.endswith(("_max", "_min")):
        return [name], Rule(lambda value: [value.reshape(1)], lambda parts: parts[0].reshape(()))
    if key.endswith("input_proj.weight"):

        def split(value: np.ndarray) -> list[np.ndarray]:
            side = int((value.shape[1] // 3) ** 0.5)
            return [value.reshape(-1, side, side, 3).transpose(0, 3, 1, 2)]

        return [name], Rule(split, lambda parts: parts[0].transpose(0, 2, 3, 1).reshape(len(parts[0]), -1))
    return [name], Rule()


# --- files


@dataclass
class Files:
    """The tensors of one tiny encoder's files."""

    model: dict[str, Tensor]
    projector: dict[str, Tensor]
    native: Arrays  # what the safetensors holds
    tokenizer: tiny_tokenizers.Tiny | None
    plain: dict[str, Tensor]  # the same under the host's names, as others convert safetensors


def files_of(tiny: TinyEncoder) -> Files:
    """All files of a tiny encoder in a mixture of types; call it within `shrunk`."""
    made = Files({}, {}, {}, tokenizer_of(tiny), {})
    for index, (key, values) in enumerate(state_dict(tiny).items()):
        sees = key.startswith(tiny.vision) if tiny.vision else False
        if (sees and not tiny.projector) or (tiny.unwritten and key.startswith(tiny.unwritten)):
            continue
        if tiny.arch:
            names, rule = projector(tiny, key) if sees else llama_cpp(tiny, key)
        else:
            names, rule = [key], Rule()
        if tiny.arch == "gemma3" and key == "model.embed_tokens.weight" and values.shape[0] >= 1024:
            rule = shortened(values.shape[0])
        stored = [stored_as(part, index) for part in rule.split(values)]
        target = made.projector if sees else made.model
        target |= dict(zip(names, stored, strict=True))
        made.native[key] = np.ascontiguousarray(rule.join([tensor.values for tensor in stored]))
        made.plain[key] = stored[0] if len(stored) == 1 and rule.split(values)[0] is values else as_it_is(made, key)
    for name in tiny.unread:
        target = made.model if name.startswith("blk.") else made.projector
        target[name] = stored_as(np.ones((1, 32) if name.endswith("weight") else 32, np.float32), 0)
    return made


def as_it_is(made: Files, key: str) -> Tensor:
    return Tensor(Type.F32, made.native[key], made.native[key].shape)


def stored_as(values: np.ndarray, index: int) -> Tensor:
    values = np.ascontiguousarray(values)
    row = values.shape[-1] if values.ndim else 1
    if values.ndim < 2 or values.size < SMALL:
        kinds = ["F32"]
    else:
        kinds = OTHER_ROWS if row % 32 else ROWS_OF_32 if row % 256 else ROWS_OF_256
    kind = Type[kinds[index % len(kinds)]]
    return Tensor(kind, store(values, kind, index), values.shape)


def tokenizer_of(tiny: TinyEncoder) -> tiny_tokenizers.Tiny | None:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    size = VOCABULARY - 8
    makers = {
        "": lambda: None,
        "bpe": lambda: tiny_tokenizers.bpe(lines, size),
        "unigram": lambda: tiny_tokenizers.unigram(lines, size),
        "tekken": lambda: tiny_tokenizers.tekken(lines, size, TEKKEN_PATTERN),
        "bytes": lambda: tiny_tokenizers.bytes_json(lines, size, O200K_PATTERN),
        "spaces": lambda: tiny_tokenizers.spaces_json(lines, size),
    }
    return makers[tiny.tokenizer]()


NATIVE_KEYS = {
    **{"bpe": "spiece_model", "unigram": "spiece_model", "tekken": "tekken_model"},
    **{"bytes": "tokenizer_json", "spaces": "tokenizer_json"},
}


def published(tiny: TinyEncoder, key: str) -> str:
    """What a tensor is called in the files that the host's family is published in."""
    if tiny.arch in ("qwen3vl", "qwen35") and key.startswith("visual."):
        return f"model.{key}"
    if tiny.arch == "qwen35" and key.startswith("model."):
        return key.replace("model.", "" if key.startswith("model.lm_head.") else "model.language_model.", 1)
    return key


def write_safetensors(path: Path, tiny: TinyEncoder, made: Files) -> None:
    tensors = {published(tiny, key): value for key, value in made.native.items()}
    if made.tokenizer is not None:
        tensors[NATIVE_KEYS[tiny.tokenizer]] = np.frombuffer(made.tokenizer.native, np.uint8)
    save_file(tensors, path)


def write_with_original_names(path: Path, tiny: TinyEncoder, made: Files) -> None:
    """A GGUF as converters of safetensors make it: the host's names, and the tokenizer as a tensor of signed bytes."""
    tensors = {published(tiny, key): tensor for key, tensor in made.plain.items()}
    if made.tokenizer is not None:
        content = np.frombuffer(made.tokenizer.native, np.int8)
        tensors[NATIVE_KEYS[tiny.tokenizer]] = Tensor(Type.I8, content, content.shape)
    write_gguf(path, tiny.arch or "clip_l", {}, tensors)


def write_gguf(path: Path, arch: str, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_custom_alignment(64)  # as torch allocates, so that BLAS rounds an F32 weight of the file alike
    for key, value in metadata.items():
        add(writer, key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.stored, raw_shape=tensor.stored.shape, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_string(key, value)


def write_model(path: Path, tiny: TinyEncoder, made: Files) -> None:
    hidden = next(t.shape[-1] for name, t in made.model.items() if name.startswith(("token_embd", "text_model.emb")))
    metadata = {f"{tiny.arch}.embedding_length": hidden}
    metadata |= {f"{tiny.arch}.{key}": value for key, value in tiny.metadata.items()}
    metadata |= made.tokenizer.metadata if made.tokenizer is not None else {}
    write_gguf(path, tiny.arch or "clip_l", metadata, made.model)


def write_projector(path: Path, tiny: TinyEncoder, made: Files) -> None:
    hidden = next(t.shape[-1] for name, t in made.model.items() if name.startswith("token_embd"))
    metadata = {
        "general.type": "mmproj",
        "clip.projector_type": tiny.projector,
        "clip.vision.projection_dim": hidden,
    }
    write_gguf(path, "clip", metadata, made.projector)
