"""Adapter files: every dtype and both formats, what is rounded and what is not, damage, pickles, and the cache."""

from __future__ import annotations

import gc
import json
import pickle
import struct
import threading
import zipfile
from pathlib import Path
from typing import Any

import builders as b
import numpy as np
import pytest
import torch
from block_bytes import random_blocks
from pack.loaders import safetensors_header
from pack.loaders.gguf.errors import GGUFError
from pack.loaders.gguf.types import GGMLType
from pack.loaders.quant import reference
from pack.loaders.safetensors_header import DTYPES, MalformedError
from pack.lora import filling, keys
from pack.lora import read as reading
from pack.lora.cache import AdapterCache, CacheState
from pack.lora.garbage import put_off
from pack.lora.read import LoraError, read
from safetensors.torch import save_file

STEM = "diffusion_model.blocks.0.attn"


def raw_safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


# --- safetensors


def test_every_dtype_is_kept_or_rounded_once(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for dtype in DTYPES.values():
        values = torch.rand(5, 7, generator=generator) * 100
        tensors[str(dtype)] = values.to(dtype)
    save_file(tensors, tmp_path / "a.safetensors", {"ss_base": "flux"})
    found = read(tmp_path / "a.safetensors")
    assert found.metadata == {"ss_base": "flux"}
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        wanted = tensor.to(torch.bfloat16) if tensor.dtype in (torch.float32, torch.float64) else tensor
        got = found.tensors[name]
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8)), name
    assert found.nbytes == sum(tensor.nbytes for tensor in found.tensors.values())


def test_vectors_and_numbers_keep_their_precision(tmp_path: Path) -> None:
    tensors = {"alpha": torch.tensor(13.7), "norm": torch.rand(9), "dora": torch.rand(9, 1), "none": torch.rand(0, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    found = read(tmp_path / "a.safetensors").tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_large_and_many_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "BATCH_BYTES", 10_000)  # so that every thread has some
    monkeypatch.setattr(filling, "SINGLE_BYTES", 0)
    generator = torch.Generator().manual_seed(2)
    tensors = {f"{n}.wide": torch.randn(40, 37 * n, generator=generator) for n in range(1, 40)}
    tensors |= {f"{n}.short": torch.randn(40, 37 * n, generator=generator).half() for n in range(1, 40)}
    tensors["large"] = torch.randn(3, filling.STAGED, generator=generator)[:, :-1].contiguous()
    save_file(tensors, tmp_path / "a.safetensors")
    with torch.inference_mode():  # as nodes run
        found = read(tmp_path / "a.safetensors").tensors
    assert all(torch.equal(found[k], t.bfloat16() if t.dtype == torch.float32 else t) for k, t in tensors.items())
    found["large"].add_(1)  # of no inference mode


def test_runs_of_kept_tensors_end_where_a_type_would_lie_at_an_odd_address(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    given: dict[str, torch.Tensor] = {}
    for n in range(30):  # in a file of ours tensors lie in any order, and of any length
        given[f"{n}.byte"] = torch.randint(0, 255, (2 * n + 1,), dtype=torch.uint8, generator=generator)
        given[f"{n}.half"] = torch.randn(7, n, generator=generator).half()
        given[f"{n}.alpha"] = torch.randn((), generator=generator)
        given[f"{n}.wide"] = torch.randn(5, n, generator=generator)
        given[f"{n}.large"] = torch.randn(331, 251 + n, generator=generator).bfloat16()
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, data = {}, b""
    for name, tensor in given.items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        data += raw
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_safetensors(header, data))
    assert len(data) > 2 * filling.HUGE_PAGE
    found = read(path).tensors
    assert list(found) == list(given)
    for name, tensor in given.items():
        wanted = tensor.bfloat16() if name.endswith("wide") and tensor.shape[1] > 1 else tensor
        assert found[name].dtype == wanted.dtype and torch.equal(found[name], wanted), name
    with path.open("rb") as file:
        _, jobs = filling.lay_out(safetensors_header.parse(file, path.stat().st_size)[0])
    assert len(jobs) < len(given)


def test_a_file_that_is_replaced_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    one, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path in (one, other):
        save_file({"t": torch.rand(8, 8)}, path)
    with one.open("rb") as opened:
        other.replace(one)
        with pytest.raises(MalformedError, match="replaced"):
            filling.fill_batch(one, opened, [])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "a.safetensors"
    save_file({f"{n}": torch.rand(8, 8).to(dtype) for n in range(5)}, path)
    with path.open("rb") as opened:
        entries, _ = safetensors_header.parse(opened, path.stat().st_size)
        _, jobs = filling.lay_out(entries)
        with path.open("r+b") as file:
            file.truncate(entries[2].offset + 9)
        with pytest.raises(MalformedError, match="ends within tensor '2'"):
            filling.fill(path, opened, jobs, lambda nbytes: None)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (raw_safetensors({}, length=1 << 40), "its header says that it is"),
        (b"\x08\0\0\0\0\0\0\0{", "its header says that it is"),
        (raw_safetensors(b"{nonsense"), "its header is no JSON"),
        (raw_safetensors(b"[" * 100_000), "neither a safetensors nor a GGUF file"),
        (raw_safetensors(b"{" + b'"a":{' * 50_000), "its header is no JSON"),
        (raw_safetensors({"t": 5}), "which is not known"),
        (raw_safetensors({"t": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}), "'Q4', which is not known"),
        (raw_safetensors({"t": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}), "no proper shape"),
        (raw_safetensors({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}), "no proper shape"),
        (raw_safetensors({"t": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}), "no proper shape"),
        (raw_safetensors({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)), "is said to lie"),
        (
            raw_safetensors({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in ("t", "u")}, bytes(8)),
            "'t' and 'u' are said to lie at the same place",
        ),
        (
            raw_safetensors({"t": {"dtype": "F32", "shape": [1 << 47, 1 << 47, 0], "data_offsets": [0, 0]}}),
            "a shape that no tensor has",
        ),
        (raw_safetensors({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(7)), "is said to lie"),
        (raw_safetensors({"t": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}), "is said to lie"),
        (b"", "the file ends after 0 bytes"),
        (b"<!DOCTYPE html><html>", "the download saved the web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    ],
)
def test_broken_files_say_what_is_wrong(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoraError) as raised:
        read(path)
    text = str(raised.value)
    assert text.startswith("broken.safetensors: ") and "; " in text
    assert says in text or says in repr(raised.value.__cause__), text


@pytest.mark.parametrize("name", ["lora.pt", "lora.safetensors", "lora.ckpt"])
def test_pickles_are_never_loaded(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for write in (torch.save, _pickle, _zip):
        write({"x": torch.ones(2)}, path)
        with pytest.raises(LoraError, match=r"pickled PyTorch file.*safetensors version"):
            read(path)


def _pickle(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


def _zip(value: object, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")


def test_names_are_told_whatever_the_types(tmp_path: Path) -> None:
    path = tmp_path / "mxfp8.safetensors"
    scale = {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}
    path.write_bytes(raw_safetensors({"__metadata__": {"a": "b"}, "scale": scale}, bytes(2)))
    with path.open("rb") as file:
        assert safetensors_header.names(file, path.stat().st_size) == {"scale"}


def test_memory_that_is_not_there_is_no_error_of_the_file() -> None:
    with pytest.raises(RuntimeError, match=r"(?i)memory|alloc"):  # torch's own, which is no OSError
        filling._memory(1 << 47)  # more than a process can address


def test_missing_file_is_an_error_of_the_same_form(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=r"gone\.safetensors: it cannot be read .*; check its name"):
        read(tmp_path / "gone.safetensors")


def test_garbage_is_looked_for_again_after_an_error_and_left_alone_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(raw_safetensors(b"{nonsense"))
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            with pytest.raises(LoraError):
                read(tmp_path / "a.safetensors")
            with put_off(), put_off():
                assert not gc.isenabled()
            assert gc.isenabled() == enabled
        finally:
            gc.enable()


# --- GGUF


def gguf_adapter(alpha: float | None) -> bytes:
    rng = np.random.default_rng(3)
    metadata: dict[str, object] = {"general.type": "adapter", "adapter.type": "lora"}
    if alpha is not None:
        metadata["adapter.lora.alpha"] = alpha
    tensors = [
        b.Tensor(f"{STEM}.weight.lora_a", (4, 32), b.F32, rng.standard_normal((4, 32)).astype(np.float32).tobytes()),
        b.Tensor(f"{STEM}.weight.lora_b", (64, 4), b.F16, rng.standard_normal((64, 4)).astype(np.float16).tobytes()),
        b.Tensor("lora_unet_x.lora_up.weight", (2, 32), b.Q8_0),
    ]
    return b.gguf_bytes(metadata, tensors)


@pytest.mark.parametrize("alpha", [8.0, 0.0, None])
def test_gguf_adapters_get_the_names_that_comfyui_knows(tmp_path: Path, alpha: float | None) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_adapter(alpha))
    rng = np.random.default_rng(3)
    a = torch.from_numpy(rng.standard_normal((4, 32)).astype(np.float32))
    up = torch.from_numpy(rng.standard_normal((64, 4)).astype(np.float16))
    found = read(path)
    names = [f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight", "lora_unet_x.lora_up.weight"]
    assert found.tensors.keys() == {*names, *([f"{STEM}.alpha"] if alpha else [])}
    assert torch.equal(found.tensors[names[0]], a.bfloat16())
    assert torch.equal(found.tensors[names[1]], up)
    if alpha:
        assert found.tensors[f"{STEM}.alpha"].item() == alpha
    payload = torch.frombuffer(bytearray(b.Tensor("q", (2, 32), b.Q8_0).payload), dtype=torch.uint8)
    expected = reference.dequantize(payload, GGMLType.Q8_0, (2, 32), torch.bfloat16)
    assert torch.equal(found.tensors[names[2]], expected)
    assert found.metadata["adapter.type"] == "lora"
    path.unlink()  # nothing holds it
    assert torch.isfinite(found.tensors[names[1]]).all()


@pytest.mark.parametrize("blocks_at_once", [1, 3, 7, 1000])
def test_quantised_factors_are_read_by_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks_at_once: int
) -> None:
    monkeypatch.setattr(reading, "SLICE", blocks_at_once * 34 + 5)
    blocks = random_blocks(GGMLType.Q8_0, 20, np.random.default_rng(5), specials=False)
    given = b.Tensor("lora_unet_x.diff", (10, 64), b.Q8_0, blocks.tobytes())
    path = tmp_path / "a.gguf"
    path.write_bytes(b.gguf_bytes({"general.type": "adapter"}, [given]))
    payload = torch.frombuffer(bytearray(given.payload), dtype=torch.uint8)
    (found,) = read(path).tensors.values()
    assert torch.equal(found, reference.dequantize(payload, GGMLType.Q8_0, (10, 64), torch.bfloat16))


def test_damaged_gguf_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_adapter(8.0)[:-100])
    with pytest.raises(GGUFError, match=r"a\.gguf"):
        read(path)


# --- names


@pytest.mark.parametrize("name", ["x.lora_magnitude_vector", "x.lora_magnitude_vector.weight"])
def test_peft_magnitudes_become_dora_columns(name: str) -> None:
    (found,) = keys.canonical({name: torch.arange(3.0)}).items()
    assert found[0] == "x.dora_scale" and found[1].tolist() == [[0], [1], [2]]
    (found,) = keys.canonical({name: torch.arange(3.0).view(1, 3, 1, 1)}).items()  # of a convolution
    assert found[1].shape == (3, 1, 1, 1)


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        ("blocks.0.q.lora_A.weight", "diffusion_model.blocks.0.q.lora_A.weight"),
        ("base_model.model.blocks.0.q.lora_B.weight", "diffusion_model.blocks.0.q.lora_B.weight"),
        ("model.diffusion_model.blocks.0.q.alpha", "diffusion_model.blocks.0.q.alpha"),
        ("transformer.blocks.0.q.lokr_w1", "diffusion_model.blocks.0.q.lokr_w1"),
        ("diffusion_model.blocks.0.q.diff_b", "diffusion_model.blocks.0.q.diff_b"),
        ("kohya_blocks_0_q.lora_up.weight", "kohya_blocks_0_q.lora_up.weight"),
        ("blocks.1.q.lora_A.weight", "blocks.1.q.lora_A.weight"),
        ("no known ending", "no known ending"),
    ],
)
def test_prefixes_that_comfyui_does_not_map(given: str, becomes: str) -> None:
    known = {"diffusion_model.blocks.0.q", "kohya_blocks_0_q"}
    assert list(keys.with_known_prefix({given: 1}, known)) == [becomes]


@pytest.mark.parametrize("ending", keys.ENDINGS)
def test_names_are_split_where_the_weight_ends(ending: str) -> None:
    assert keys.split(f"lora_unet_a.b_c{ending}") == ("lora_unet_a.b_c", ending)


# --- the cache


def write_lora(path: Path, rows: int) -> None:
    save_file({"x.lora_up.weight": torch.ones(rows, 8, dtype=torch.bfloat16)}, path)


def test_cache_keeps_the_last_used_within_its_bound(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path in paths:
        write_lora(path, 16)  # 256 bytes
    cache = AdapterCache(bound_bytes=600)
    first = cache.get(paths[0])
    assert cache.get(paths[1]) is not first and cache.get(paths[0]) is first
    cache.get(paths[2])  # 1 is the oldest now
    assert cache.get(paths[0]) is first
    state = cache.state()
    assert (state.nbytes, state.bound_bytes, state.files, state.hits, state.misses) == (512, 600, 2, 2, 3)
    cache.get(paths[1])
    assert cache.state().misses == 4
    cache.clear()
    assert cache.state().nbytes == 0


def test_cache_tells_its_state_while_a_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lora(tmp_path / "a.safetensors", 16)
    cache, before = AdapterCache(bound_bytes=600), reading.read
    states: list[CacheState] = []

    def slow(*given: Any) -> reading.AdapterFile:
        asked = threading.Thread(target=lambda: states.append(cache.state()))
        asked.start()
        asked.join(10)
        return before(*given)

    monkeypatch.setattr(reading, "read", slow)
    cache.get(tmp_path / "a.safetensors")
    assert [state.misses for state in states] == [1] and cache.state().files == 1


@pytest.mark.parametrize("length", [0x280, 0x380, 0x10480, 0x30580])
def test_header_whose_length_begins_like_a_pickle(tmp_path: Path, length: int) -> None:
    header = json.dumps({"a.alpha": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_safetensors(header.ljust(length), struct.pack("<f", 3.0)))
    assert path.read_bytes().startswith(reading.PICKLES)
    assert read(path).tensors["a.alpha"].tolist() == [3.0]


@pytest.mark.parametrize("endings", [("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")])
def test_rank_is_told_before_the_tensors_are_read(
    tmp_path: Path, endings: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    told: list[object] = []
    pairs = {f"{STEM}.{i}.{ending}": rank for i, rank in enumerate((8, 4, 4)) for ending in endings}
    tensors = {n: torch.zeros((64, r) if n.endswith(endings[0]) else (r, 64)) for n, r in pairs.items()}
    save_file(tensors, path)
    fill = reading.fill

    def telling(*given: Any) -> None:
        told.append("read")
        fill(*given)

    monkeypatch.setattr(reading, "fill", telling)
    cache = AdapterCache(bound_bytes=1 << 20)
    for _ in range(2):
        cache.get(path, told.append)
    assert told == [4, "read"], "what is kept is not read, and nothing is told of it"
    save_file({f"{STEM}.diff": torch.zeros(64, 64)}, path)
    told.clear()
    cache.get(path, told.append)
    assert told == ["read"]


def test_cache_reads_a_replaced_file_anew_and_keeps_no_giant(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_lora(path, 16)
    cache = AdapterCache(bound_bytes=600)
    old = cache.get(path)
    path.unlink()
    write_lora(path, 32)
    new = cache.get(path)
    assert new is not old and len(new.tensors["x.lora_up.weight"]) == 32
    assert cache.state().files == 1
    path.unlink()
    write_lora(path, 64)
    assert cache.get(path).nbytes == 1024
    assert cache.state().nbytes == 0


def test_only_names_that_a_tensor_goes_on_from_are_looked_for() -> None:
    names = {"a.b": 1, "a": 2, "lora_unet_c_d": 3, "a.b.lo": 4, "lora_unet": 5, "other": 6}
    assert keys.concerned(names, ["a.b.lora_up.weight", "lora_unet_c_d_lora.up.weight", "other"]) == {
        **{"a.b": 1, "a": 2, "lora_unet_c_d": 3, "lora_unet": 5}
    }
