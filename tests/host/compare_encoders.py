"""Encode a text with tiny encoders loaded twice, by the host from safetensors and by the pack from GGUF, and compare.

Runs inside the host: `python compare_encoders.py FOLDER NAME...`. Prints one JSON line for each family.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from pathlib import Path

FOLDER, *NAMES = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.text_encoders.flux  # noqa: E402
import torch  # noqa: E402
from comfy_kitchen.tensor import QuantizedTensor  # noqa: E402
from host import encoder_files  # noqa: E402
from host.tiny_encoder import ENCODERS, TEXT, VOCABULARY, TinyEncoder  # noqa: E402
from host.tiny_files import Tensor, zeroed  # noqa: E402
from pack.loaders.quant.layout import is_gguf  # noqa: E402
from pack.loaders.text_encoder import load_text_encoder  # noqa: E402
from pack.loaders.text_layers import Vocabulary  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

torch.set_num_threads(1)
FALLBACKS: list[str] = []  # what made a whole weight dense because nothing of ours handles it


class Listener(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        FALLBACKS.append(record.getMessage())


kitchen = logging.getLogger("comfy_kitchen.tensor.base")
kitchen.setLevel(logging.DEBUG)
kitchen.addHandler(Listener())


def newer_mistral(data: torch.Tensor) -> dict:
    """The host's `load_mistral_tokenizer` for a transformers whose converter reads a file."""
    from transformers.integrations.mistral import MistralConverter

    path = Path(FOLDER) / "tekken.json"
    path.write_bytes(data.numpy().tobytes())
    return {"tokenizer_object": MistralConverter(str(path)).converted(), "legacy": False}


comfy.text_encoders.flux.load_mistral_tokenizer = newer_mistral


def tokens_for(clip: comfy.sd.CLIP, tiny: TinyEncoder) -> dict | list:
    """The text's tokens, with numbers that the tiny vocabulary has, and a picture where the family sees."""
    tokens = clip.tokenize(TEXT)
    if isinstance(tokens, list):
        return within(tokens, tiny, tiny.rows)
    clip_rows = 49408
    rows = clip_rows if not tiny.arch else tiny.rows
    return {key: within(batches, tiny, clip_rows if key in "lg" else rows) for key, batches in tokens.items()}


def within(batches: list, tiny: TinyEncoder, rows: int) -> list:
    limit = min(rows, VOCABULARY) if tiny.arch and rows == tiny.rows else rows
    result = [[(int(t[0]) % limit, *t[1:]) if isinstance(t[0], int) else t for t in b] for b in batches]
    if tiny.rows > VOCABULARY:
        result[0].insert(5, (tiny.rows - 1, 1.0))
    if tiny.image:
        picture = torch.rand((1, 56, 56, 3), generator=torch.Generator().manual_seed(3))
        result[0].insert(3, ({"type": "image", "data": picture, "original_type": "image"}, 1.0))
    return result


def settled(clip: comfy.sd.CLIP) -> comfy.sd.CLIP:
    """Weights where torch would allocate them: BLAS rounds by alignment."""
    for parameter in clip.cond_stage_model.parameters():
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(False)
    return clip


def load_theirs(paths: list[Path], tiny: TinyEncoder) -> comfy.sd.CLIP:
    clip_type = getattr(comfy.sd.CLIPType, tiny.clip_type.upper())
    return settled(comfy.sd.load_clip([str(path) for path in paths], None, clip_type, {"dtype": torch.float32}))


def encoded(clip: comfy.sd.CLIP, tokens: dict) -> dict[str, torch.Tensor]:
    if "gemma4" in tokens:  # which the host only lets write, not encode
        return {"cond": written_logits(clip, tokens["gemma4"])}
    found = clip.encode_from_tokens(tokens, return_dict=True)
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}


def written_logits(clip: comfy.sd.CLIP, tokens: list) -> torch.Tensor:
    clip.load_model(tokens)
    (model,) = (m for m in clip.cond_stage_model.children() if hasattr(m, "transformer"))
    numbers = [[token[0] for token in batch] for batch in tokens]
    embeds = model.process_tokens(numbers, torch.device("cpu"))
    hidden = model.transformer.model(None, embeds=embeds, input_ids=torch.tensor(numbers))[0]
    Made.writing = True
    logits = model.transformer.logits(hidden)[:, -1]
    Made.writing = False
    picture = torch.rand((1, 96, 96, 3), generator=torch.Generator().manual_seed(3))
    seen = model.transformer.preprocess_embed({"type": "image", "data": picture}, torch.device("cpu"))[0]
    return torch.cat([hidden[:, -1], logits, seen.reshape(1, -1)], dim=-1)


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key].float() - other[key].float()).abs().max()) for key in one)


class Made(TorchDispatchMode):
    """How many numbers the plain tensors have that operations make."""

    writing = False  # logits are a product with the whole table; on a CPU it is dense for that

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if is_plain(result) and result.is_floating_point() and not (Made.writing or result.is_meta):
            memory = result.untyped_storage().data_ptr()
            if all(arg.untyped_storage().data_ptr() != memory for arg in args if is_plain(arg)):  # no view of the file
                self.sizes.add(result.numel())
        return result


def is_plain(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, QuantizedTensor)


def tables_of(clip: comfy.sd.CLIP, tiny: TinyEncoder, sizes: set[int]) -> dict[str, tuple[bool, bool]]:
    """The GGUF's tables of words: whether anything as large was made of numbers, and whether that would be seen."""
    found = {}
    for name, layer in clip.cond_stage_model.named_modules():
        table = None if name.startswith(tiny.beside) else getattr(layer, "weight", None)
        if isinstance(layer, Vocabulary) and isinstance(table, torch.Tensor) and is_gguf(table):
            with Made() as whole:
                table.dequantize()
            found[name] = (table.numel() in sizes, table.numel() in whole.sizes)
    return found


def probe_of(tensors: dict[str, Tensor]) -> str:
    """The quantised weight that the result must be seen to depend on: the largest of the layers' MLPs."""
    quantised = [n for n, t in tensors.items() if t.type.name not in ("F32", "F16", "BF16") and n.endswith(".weight")]
    layers = [n for n in quantised if "ffn" in n or "mlp" in n]
    return max(layers, key=lambda n: tensors[n].stored.nbytes)


def compare(name: str, folder: Path) -> dict[str, object]:
    tiny = ENCODERS[name]
    folder = folder / name
    folder.mkdir()
    theirs_path, ours_path = folder / f"{name}.safetensors", folder / f"{name}-Q4_K_M.gguf"
    with encoder_files.shrunk(tiny):
        made = encoder_files.files_of(tiny)
        encoder_files.write_safetensors(theirs_path, tiny, made)
        encoder_files.write_model(ours_path, tiny, made)
        if made.projector:
            encoder_files.write_projector(folder / f"mmproj-{name}-F16.gguf", tiny, made)
        beside, dense = [], []
        for other in tiny.beside:
            files = beside_files(other, folder, tiny.beside_as)
            beside.append(files[0])
            dense.append(files[1])
        theirs = load_theirs([theirs_path, *dense], tiny)
        with Made() as loading:
            ours = load_text_encoder([ours_path, *beside], tiny.clip_type)
        tokens = tokens_for(theirs, tiny)
        same_tokens = str(theirs.tokenize(TEXT)) == str(ours.tokenize(TEXT))
        expected = encoded(theirs, tokens_for(theirs, tiny))  # type: ignore[arg-type]
        FALLBACKS.clear()
        with Made() as encoding:
            result = encoded(ours, tokens)  # type: ignore[arg-type]
        fallbacks = list(FALLBACKS)
        named = folder / f"{name}-names.gguf"
        encoder_files.write_with_original_names(named, tiny, made)
        by_names = encoded(load_text_encoder([named, *beside], tiny.clip_type), tokens_for(theirs, tiny))  # type: ignore[arg-type]
        probe = probe_of(made.model)
        made.model = zeroed(made.model, probe)
        changed = folder / f"{name}-zeroed.gguf"
        encoder_files.write_model(changed, tiny, made)
        without = encoded(load_text_encoder([changed, *beside], tiny.clip_type), tokens_for(theirs, tiny))  # type: ignore[arg-type]
        found = {
            "classes": [type(c.cond_stage_model).__name__ for c in (theirs, ours)],
            "same_tokens": same_tokens,
            "finite": all(bool(torch.isfinite(t.float()).all()) for t in expected.values()),
            "spread": float(expected["cond"].float().std()),
            "difference": difference(result, expected),
            "equal": all(torch.equal(result[key], expected[key]) for key in expected),
            "equal_by_names": all(torch.equal(by_names[key], expected[key]) for key in expected),
            "probe": probe,
            "difference_without_probe": difference(without, expected),
            "fallbacks": fallbacks,
            "tables": tables_of(ours, tiny, loading.sizes | encoding.sizes),
            "quantised": sum(isinstance(p, QuantizedTensor) for p in ours.cond_stage_model.parameters()),
            "bytes": {"ours": ours.patcher.model_size(), "theirs": theirs.patcher.model_size()},
        }
    comfy.model_management.unload_all_models()
    return found


def beside_files(name: str, folder: Path, kind: str) -> tuple[Path, Path]:
    """A safetensors of another encoder with 8-bit floats, plain or scaled by the host's convention, if `kind` says so;
    and one with the same numbers in float32."""
    path, dense = folder / f"{name}.safetensors", folder / f"{name}-dense.safetensors"
    encoder_files.write_safetensors(dense, ENCODERS[name], encoder_files.files_of(ENCODERS[name]))
    tensors = load_file(dense)
    given = {}
    for key, value in list(tensors.items()):
        if not kind or value.dim() < 2 or value.numel() < 1024 or "position" in key:
            given[key] = value
            continue
        scale = value.abs().max() / 448 if kind == "scaled" and "token" not in key else torch.ones(())
        given[key] = (value / scale).to(torch.float8_e4m3fn)
        tensors[key] = given[key].to(torch.float32) * scale
        if kind == "scaled" and "token" not in key:
            given[f"{key.removesuffix('.weight')}.scale_weight"] = scale.reshape(1)
    if kind == "scaled":
        given["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(given, path)
    save_file(tensors, dense)
    return path, dense


def main() -> None:
    for name in NAMES:
        try:
            with torch.inference_mode():  # as the host executes nodes
                result = compare(name, Path(FOLDER))
        except Exception:
            result = {"error": traceback.format_exc()}
        print(json.dumps({"encoder": name, **result}), flush=True)


main()
