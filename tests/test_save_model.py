"""Safetensors files as weights, and weights into GGUF files: one at a time, whole or not at all."""

from __future__ import annotations

import json
import os
import struct
import threading
import weakref
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from pack.loaders import architecture_names
from pack.loaders.gguf import writer
from pack.loaders.gguf.errors import GGUFError
from pack.loaders.gguf.reader import GGUFFile
from pack.loaders.gguf.types import GGMLType
from pack.loaders.recipes import parse_overrides
from pack.loaders.safetensors_file import SafetensorsFile
from pack.loaders.save_model import Weight, save_model
from safetensors.torch import save_file

GENERATOR = torch.Generator().manual_seed(4)


def matrices(prefix: str = "") -> dict[str, torch.Tensor]:
    """Two blocks of three matrices with a bias each, an embedder, a convolution in one of the blocks."""
    tensors = {f"{prefix}embedder.weight": torch.randn(32, 64, generator=GENERATOR)}
    for index in (0, 1):
        for part in ("qkv", "proj", "fc1"):
            name = f"{prefix}blocks.{index}.{part}"
            tensors[f"{name}.weight"] = torch.randn(32, 512, generator=GENERATOR).bfloat16()
            tensors[f"{name}.bias"] = torch.randn(32, generator=GENERATOR)
    tensors[f"{prefix}blocks.1.conv.weight"] = torch.randn(32, 16, 3, 3, generator=GENERATOR).half()
    return tensors


def weights(tensors: dict[str, torch.Tensor]) -> list[Weight]:
    return [Weight(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()]


def read(path: Path) -> dict[str, torch.Tensor]:
    """What gguf-py reads, in float32 and true shapes."""
    reader, found = gguf.GGUFReader(path), {}
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        stated = reader.fields.get(f"comfy.gguf.orig_shape.{tensor.name}")
        shape = [int(n) for n in reversed(tensor.shape)] if stated is None else stated.contents()
        found[tensor.name] = values.reshape([int(n) for n in shape])
    return found


# --- safetensors


def test_a_safetensors_file_is_its_tensors(tmp_path: Path) -> None:
    tensors = matrices()
    save_file(tensors, tmp_path / "a.safetensors", {"title": "a model"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.metadata == {"title": "a model"}
    found = {w.name: w.make() for w in file.weights()}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_of_a_checkpoint_the_diffusion_model_is_taken(tmp_path: Path, prefix: str) -> None:
    rest = {"first_stage_model.x.weight": torch.zeros(4, 4), "cond_stage_model.y.weight": torch.zeros(4, 4)}
    save_file(matrices(prefix) | rest, tmp_path / "a.safetensors")
    assert {w.name for w in SafetensorsFile(tmp_path / "a.safetensors").weights()} == set(matrices())


@pytest.mark.parametrize("end", [".scale_weight", ".weight_scale"])
@pytest.mark.parametrize("rows", [False, True])
def test_scaled_fp8_is_multiplied_out(tmp_path: Path, end: str, rows: bool) -> None:
    stored = torch.randn(8, 32, generator=GENERATOR).to(torch.float8_e4m3fn)
    scale = torch.rand(8 if rows else 1, generator=GENERATOR)
    extra = {"scaled_fp8": torch.zeros(0), "a.input_scale": torch.ones(1), "a.comfy_quant": torch.zeros(3).byte()}
    tensors = {"a.weight": stored, f"a{end}": scale, "b.weight": stored.clone()} | extra
    save_file(tensors, tmp_path / "a.safetensors")
    found = {w.name: w for w in SafetensorsFile(tmp_path / "a.safetensors").weights()}
    assert set(found) == {"a.weight", "b.weight"}
    assert torch.equal(found["a.weight"].make(), stored.float() * (scale.view(-1, 1) if rows else scale))
    assert torch.equal(found["b.weight"].make().float(), stored.float())


def test_other_quantised_formats_are_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(8, 16).byte(), "a.weight_scale": torch.zeros(8)}, tmp_path / "a.safetensors")
    with pytest.raises(GGUFError, match=r"'a\.weight' is quantised in a format .* load it in ComfyUI and save it"):
        SafetensorsFile(tmp_path / "a.safetensors").weights()


def header(entries: object, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it cannot be read"),
        (b"GGUF" + bytes(60), "it is no safetensors file; convert from"),
        (struct.pack("<Q", 1000) + b'{"a"', "its header says that it is 1000 bytes long, the file has 12"),
        (struct.pack("<Q", 4) + b'{"a"', "its header is no JSON"),
        (header({"a": {"dtype": "F32", "shape": [2]}}), "tensor 'a' has no proper shape or place"),
        (
            header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),
            "'a' of 8 bytes is said to lie at .* of",
        ),
        (
            header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)),
            "'a' of 12 bytes is said to lie",
        ),
        (header({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, bytes(1)), "is of type 'F4'"),
    ],
)
def test_a_broken_file_is_an_error_that_says_so(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(GGUFError, match=message):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_a_header_of_odd_length_is_read(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32)
    entry = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    for pad in range(4):
        content = header(entry | {"__metadata__": {"x": "y" * pad}}, values.tobytes())
        (tmp_path / "a.safetensors").write_bytes(content)
        (weight,) = SafetensorsFile(tmp_path / "a.safetensors").weights()
        assert torch.equal(weight.make(), torch.arange(6.0).view(2, 3))


# --- saving


def test_what_is_saved_is_read_by_gguf_py(tmp_path: Path) -> None:
    tensors = matrices()
    saved = save_model(tmp_path / "a.gguf", weights(tensors), "Q5_K_S", "flux", metadata={"general.name": "a model"})
    assert saved.nbytes == (tmp_path / "a.gguf").stat().st_size
    with GGUFFile(saved.path) as file:
        assert {key: file.metadata[key] for key in file.metadata} == {
            "general.architecture": "flux",
            "general.quantization_version": 2,
            "general.file_type": 16,
            "general.name": "a model",
            "general.alignment": 32,
            "comfy.gguf.orig_shape.blocks.1.conv.weight": [32, 16, 3, 3],
        }
        types = {name: info.ggml_type for name, info in file.tensors.items()}
    assert types["blocks.0.qkv.weight"] is types["blocks.1.conv.weight"] is GGMLType.Q5_K
    assert types["blocks.0.qkv.bias"] is types["embedder.weight"] is GGMLType.F32
    found = read(saved.path)
    for name, tensor in tensors.items():
        difference = (found[name] - tensor.float()).norm() / tensor.float().norm()
        assert difference < (0.04 if types[name] is GGMLType.Q5_K else 1e-9), name


def test_blocks_of_the_wanted_type_are_copied_and_others_made_anew(tmp_path: Path) -> None:
    tensors = {name: t for name, t in matrices().items() if name.startswith("blocks") and t.dim() == 2}
    blocks = torch.from_numpy(gguf.quantize(np.ones((32, 512), np.float32), gguf.GGMLQuantizationType.Q8_0))
    old = [Weight(w.name, w.shape, w.dtype, w.make, (GGMLType.Q8_0, blocks)) for w in weights(tensors)]
    same = save_model(tmp_path / "same.gguf", old, "Q8_0", "flux")
    other = save_model(tmp_path / "other.gguf", old, "Q6_K", "flux")
    assert all((values - 1).abs().max() < 1e-3 for values in read(same.path).values())
    for name, values in read(other.path).items():
        assert (values - tensors[name].float()).norm() < 0.02 * tensors[name].float().norm()


def test_overrides_decide(tmp_path: Path) -> None:
    overrides = parse_overrides(["proj=F32", "embedder=Q4_0"])
    saved = save_model(tmp_path / "a.gguf", weights(matrices()), "Q4_0", "flux", overrides=overrides)
    with GGUFFile(saved.path) as file:
        types = {name: info.ggml_type for name, info in file.tensors.items()}
    assert types["blocks.0.proj.weight"] is GGMLType.F32
    assert types["embedder.weight"] is GGMLType.Q4_0


def test_each_weight_is_made_when_its_turn_comes_and_let_go(tmp_path: Path) -> None:
    made: list[weakref.ref] = []

    def make() -> torch.Tensor:
        assert not [array for array in made if array() is not None], "an earlier weight is still there"
        memory = np.ones((32, 512), np.float32)  # lives as long as the last tensor over it
        made.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    lazy = [Weight(f"blocks.{i}.part{j}.weight", (32, 512), torch.float32, make) for i in (0, 1) for j in range(3)]
    save_model(tmp_path / "a.gguf", lazy, "Q4_K_M", "flux")
    assert len(made) == 6


def test_progress_counts_every_element(tmp_path: Path) -> None:
    tensors, told = matrices(), []
    save_model(
        tmp_path / "a.gguf", weights(tensors), "Q4_0", "flux", progress=lambda done, total: told.append((done, total))
    )
    total = sum(t.numel() for t in tensors.values())
    assert {t for _, t in told} == {total}
    assert [d for d, _ in told] == sorted(d for d, _ in told)
    assert told[0][0] == 0
    assert told[-1][0] == total


def test_an_end_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def cancel(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path / "a.gguf", weights(matrices()), "Q4_0", "flux", progress=cancel)
    assert not list(tmp_path.iterdir())


def test_an_end_at_any_moment_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a weight is quantised, while one is written, and while the disk is waited for."""
    slow, goes_on, sync = threading.Event(), threading.Event(), os.fsync

    def slow_sync(descriptor: int) -> None:
        slow.set()
        goes_on.wait(60)
        sync(descriptor)

    monkeypatch.setattr(writer, "PIECE_BYTES", 1 << 10)
    monkeypatch.setattr(writer, "PATIENCE", 0.01)
    monkeypatch.setattr(os, "fsync", slow_sync)
    left = 0

    def cancel(done: int, total: int) -> None:
        nonlocal left
        left -= 1
        if left < 0 or slow.is_set():
            raise KeyboardInterrupt

    for told in range(1000):
        left = told
        with pytest.raises(KeyboardInterrupt):
            save_model(tmp_path / "a.gguf", weights(matrices()), "Q4_0", "flux", progress=cancel)
        assert not list(tmp_path.iterdir())
        if slow.is_set():
            break
    assert slow.is_set() and told > 20
    goes_on.set()
    slow.clear()
    monkeypatch.setattr(os, "fsync", sync)
    left = 1000
    save_model(tmp_path / "a.gguf", weights(matrices()), "Q4_0", "flux", progress=cancel)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_its_own_source_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"mapped")
    for same in (tmp_path / "a.gguf", tmp_path / "x" / ".." / "a.gguf"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(GGUFError, match=r"a\.gguf: the model .* is read from this very file.*choose another name"):
            save_model(same, weights(matrices()), "Q4_0", "flux", sources=[tmp_path / "a.gguf"])
    assert (tmp_path / "a.gguf").read_bytes() == b"mapped"


def test_a_weight_with_nans_is_named(tmp_path: Path) -> None:
    tensors = matrices()
    tensors["blocks.1.fc1.weight"][3, 5] = float("nan")
    with pytest.raises(GGUFError, match=r"'blocks\.1\.fc1\.weight' cannot be stored: it holds the number nan"):
        save_model(tmp_path / "a.gguf", weights(tensors), "Q4_0", "flux")
    assert not list(tmp_path.iterdir())


def test_a_dtype_without_a_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"'x' is of torch\.complex64, which GGUF has no type for"):
        save_model(tmp_path / "a.gguf", weights({"x": torch.zeros(2, dtype=torch.complex64)}), "Q4_0", "flux")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.int64, torch.uint8])
def test_what_is_kept_keeps_its_value(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, 1.0, 2.0, 96.0]).to(dtype)
    save_model(tmp_path / "a.gguf", weights({"x": values, "number": values[2]}), "Q4_0", "flux")
    with GGUFFile(tmp_path / "a.gguf") as file:
        assert "comfy.gguf.orig_shape.number" not in file.metadata  # ComfyUI-GGUF trips over a list that is empty
        assert [info.shape for info in file.tensors.values()] == [(4,), (1,)]
    if dtype.is_floating_point and dtype is not torch.float64:  # gguf-py dequantises no others
        assert torch.equal(read(tmp_path / "a.gguf")["x"], values.float())


# --- names


class Base: ...


class Flux(Base): ...


class FluxInpaint(Flux): ...


def test_architectures_have_their_converters_names() -> None:
    assert architecture_names.of_diffusion_model(FluxInpaint) == "flux"
    assert architecture_names.of_diffusion_model(Base) == "base"
    names = ("t5xxl", "umt5xxl", "qwen25_7b", "qwen3_4b", "clip_l", "llama", "gemma2_2b")
    found = [architecture_names.of_text_encoder(name) for name in names]
    assert found == ["t5encoder", "t5encoder", "qwen2vl", "qwen3", "clip_l", "llama", "gemma2"]
