"""GGUFFile on sound files: what it reads equals what gguf-py wrote and reads, and costs little."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from pathlib import Path

import builders as b
import gguf
import numpy as np
import psutil
import pytest
from pack.loaders.gguf.reader import GGUFError, GGUFFile
from pack.loaders.gguf.types import GGMLType

linux = pytest.mark.skipif(sys.platform != "linux", reason="counts what /proc shows")


def write_with_gguf_py(
    path: Path, *, alignment: int | None = None, split_max_tensors: int = 0
) -> dict[str, np.ndarray]:
    """A small model with every kind of metadata and several tensor types; returns the raw bytes by name."""
    writer = gguf.GGUFWriter(path, "flux", split_max_tensors=split_max_tensors)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_name("naïve 模型")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -30000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 1 << 63)
    writer.add_int64("i64", -(1 << 62))
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_array("tokens", ["<s>", "", "é", "🙂" * 100])
    writer.add_array("scores", [0.5, -1.25, 1e30])
    writer.add_array("types", [1, -2, 3])
    writer.add_array("flags", [True, False, True])
    rng = np.random.default_rng(0)
    raw: dict[str, np.ndarray] = {}
    for i, quant in enumerate([None, "Q8_0", "Q4_0", "Q5_1", "F16", "BF16"]):
        dense = rng.standard_normal((3 + i, 2, 64), dtype=np.float32)
        if quant is None:
            writer.add_tensor(f"blk.{i}.weight", dense)
            raw[f"blk.{i}.weight"] = dense
        else:
            kind = gguf.GGMLQuantizationType[quant]
            packed = gguf.quants.quantize(dense, kind)
            writer.add_tensor(f"blk.{i}.weight", packed, raw_dtype=kind)
            raw[f"blk.{i}.weight"] = packed
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return raw


@pytest.mark.parametrize("alignment", [None, 8, 16, 32, 64, 256, 4096])
def test_a_file_of_gguf_py_reads_as_gguf_py_reads_it(tmp_path, alignment):
    path = tmp_path / "model.gguf"
    raw = write_with_gguf_py(path, alignment=alignment)
    theirs = gguf.GGUFReader(path)
    with GGUFFile(path) as ours:
        assert (ours.version, ours.alignment, ours.parts) == (3, alignment or 32, (path,))
        expected = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
        assert dict(ours.metadata) == expected
        assert list(ours.metadata) == list(expected)
        assert list(ours.tensors) == [t.name for t in theirs.tensors] == list(raw)
        for t in theirs.tensors:
            info = ours.tensors[t.name]
            assert info.shape == tuple(int(n) for n in reversed(t.shape))
            assert info.ggml_type.name == t.tensor_type.name
            assert (info.offset, info.nbytes) == (t.data_offset, t.n_bytes)
            assert bytes(ours.view(t.name)) == raw[t.name].tobytes()
    del theirs


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_a_built_file_reads_back(tmp_path, version, alignment):
    path = tmp_path / "built.gguf"
    tensors = [
        b.Tensor("scalar", ()),
        b.Tensor("empty", (0, 7)),
        b.Tensor("conv", (2, 3, 4, 5, 6), b.F16),
        b.Tensor("quant", (5, 256), b.Q4_K),
        b.Tensor("x" * 300, (33,), b.I8),
        b.Tensor("empty at the end", (4, 0), b.Q8_0),
    ]
    meta = {
        "general.alignment": alignment,
        "n": 3,
        "deep": b.array(b.ARRAY, [b.array(b.U8, [1, 2]), b.array(b.STRING, ["a"])]),
    }
    path.write_bytes(b.gguf_bytes(meta, tensors, version=version, alignment=alignment))
    with GGUFFile(path) as file:
        assert (file.version, file.alignment) == (version, alignment)
        assert dict(file.metadata) == {"general.alignment": alignment, "n": 3, "deep": [[1, 2], ["a"]]}
        assert [(t.name, t.shape, int(t.ggml_type)) for t in file.tensors.values()] == [
            (t.name, t.shape, t.number) for t in tensors
        ]
        for t in tensors:
            assert bytes(file.view(t.name)) == t.payload
            assert file.tensors[t.name].offset % alignment == 0


def test_metadata_is_a_cheap_mapping(tmp_path):
    path = tmp_path / "m.gguf"
    long = "tokenizer " * 20_000
    path.write_bytes(b.gguf_bytes({"a": 1, "bad": b.array(b.STRING, [b"\xff"]), "long": long, "f": 1.5}))
    file = GGUFFile(path)
    assert "bad" in file.metadata and len(file.metadata) == 4 and list(file.metadata) == ["a", "bad", "long", "f"]
    assert file.metadata.get("absent", "fallback") == "fallback"
    with pytest.raises(KeyError):
        file.metadata["absent"]
    assert file.metadata["long"] == long
    with pytest.raises(GGUFError, match=r"m\.gguf: metadata key 'bad' holds a string at byte .* not UTF-8"):
        file.metadata["bad"]
    file.close()
    assert file.metadata["a"] == 1
    with pytest.raises(GGUFError, match=r"m\.gguf: the file was closed; reopen"):
        file.metadata["long"]


def test_views_are_read_only_and_need_an_open_file(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b.gguf_bytes({}, [b.Tensor("w", (4,))]))
    file = GGUFFile(path)
    view = file.view("w")
    assert view.readonly and view.nbytes == 16 and view.contiguous
    with pytest.raises(KeyError):
        file.view("v")
    del view
    assert file.close()
    with pytest.raises(GGUFError, match="the file was closed; reopen"):
        file.view("w")
    with pytest.raises(GGUFError, match="the file was closed; reopen"):
        file.file_handle(0)


def test_file_handle_reads_the_same_bytes_unbuffered(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b.gguf_bytes({}, [b.Tensor("v", (8,)), b.Tensor("w", (4, 32), b.Q8_0)]))
    with GGUFFile(path) as file:
        info, handle = file.tensors["w"], file.file_handle(0)
        assert handle is file.file_handle(0)
        buffer = bytearray(info.nbytes)
        handle.seek(info.offset)
        assert handle.readinto(buffer) == info.nbytes
        assert buffer == bytes(file.view("w"))
    assert handle.closed


@pytest.mark.parametrize("name", ["模型 é ü.gguf", "with space & 'quotes'.GGUF"])
def test_unusual_paths(tmp_path, name, monkeypatch):
    (tmp_path / name).write_bytes(b.gguf_bytes({"a": 1}))
    monkeypatch.chdir(tmp_path)
    file = GGUFFile(name)
    monkeypatch.chdir("/")
    file.close()
    file.reopen()  # by absolute path
    assert file.path == tmp_path / name and file.close()


# Split models


def test_a_split_model_opens_as_one_from_any_part(tmp_path):
    raw = write_with_gguf_py(tmp_path / "model.gguf", split_max_tensors=2)
    paths = tuple(sorted(tmp_path.glob("*.gguf")))
    assert [p.name for p in paths] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for given in paths:
        with GGUFFile(given) as file:
            assert file.path == given and file.parts == paths
            assert list(file.tensors) == list(raw)
            assert file.metadata["general.architecture"] == "flux"
            assert [t.part for t in file.tensors.values()] == [0, 0, 1, 1, 2, 2]
            for name, expected in raw.items():
                info = file.tensors[name]
                assert bytes(file.view(name)) == expected.tobytes()
                handle = file.file_handle(info.part)
                handle.seek(info.offset)
                assert handle.read(info.nbytes) == expected.tobytes()
            assert len(file.identity) == 3


def test_parts_have_alignments_of_their_own_and_the_first_may_hold_no_tensor(tmp_path):
    first = b.gguf_bytes({"general.architecture": "flux", **b.split_keys(0, 2, 1)})
    second = b.gguf_bytes({"general.alignment": 256, **b.split_keys(1, 2, 1)}, [b.Tensor("w", (3,))], alignment=256)
    paths = b.write_split(tmp_path, "m", [first, second])
    with GGUFFile(paths[0]) as file:
        assert file.tensors["w"].part == 1 and file.tensors["w"].offset % 256 == 0
        assert bytes(file.view("w")) == bytes(range(12))


def test_a_split_of_one_part_needs_no_special_name(tmp_path):
    path = tmp_path / "renamed.gguf"
    path.write_bytes(b.gguf_bytes(b.split_keys(0, 1, 1), [b.Tensor("w", (3,))]))
    with GGUFFile(path) as file:
        assert file.parts == (path,)


# Cost


@pytest.fixture(scope="module")
def big_vocabulary(tmp_path_factory) -> Path:
    n, m = 256_000, 500_000
    lengths = np.full(n, 9, "<u8")
    tokens = np.empty((n, 17), np.uint8)
    tokens[:, :8] = lengths.view(np.uint8).reshape(n, 8)
    tokens[:, 8:] = np.frombuffer("".join(f"tok{i:06d}" for i in range(n)).encode(), np.uint8).reshape(n, 9)
    merges = np.tile(np.frombuffer(b.text("ab cd"), np.uint8), m)

    def string_array(count: int, raw: bytes) -> b.Value:
        return b.Value(b.ARRAY, b.array(b.STRING, [], count).payload + raw)

    meta = {
        "general.architecture": "gemma2",
        "tokenizer.ggml.tokens": string_array(n, tokens.tobytes()),
        "tokenizer.ggml.scores": b.Value(b.ARRAY, b.array(b.FLOAT32, [], n).payload + np.zeros(n, "<f4").tobytes()),
        "tokenizer.ggml.token_type": b.Value(b.ARRAY, b.array(b.INT32, [], n).payload + np.ones(n, "<i4").tobytes()),
        "tokenizer.ggml.merges": string_array(m, merges.tobytes()),
    }
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.gguf"
    path.write_bytes(b.gguf_bytes(meta, [b.Tensor(f"blk.{i}.weight", (32,)) for i in range(600)]))
    return path


@linux
def test_a_large_vocabulary_costs_nothing_until_it_is_asked_for(big_vocabulary):
    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    GGUFFile(big_vocabulary).close()
    gc.collect()
    before, seconds = anonymous(), []
    for _ in range(5):
        start = time.process_time()
        file = GGUFFile(big_vocabulary)
        seconds.append(time.process_time() - start)
        grown = anonymous() - before
        assert "tokenizer.ggml.merges" in file.metadata
        file.close()
        assert grown < 20e6
    assert min(seconds) < 0.2, seconds
    with GGUFFile(big_vocabulary) as file:
        tokens = file.metadata["tokenizer.ggml.tokens"]
        assert len(tokens) == 256_000 and tokens[0] == "tok000000" and tokens[-1] == "tok255999"
        assert len(file.metadata["tokenizer.ggml.merges"]) == 500_000


@linux
def test_only_header_pages_of_a_big_file_are_touched(tmp_path):
    path = tmp_path / "big.gguf"
    nbytes = 3 << 30  # sparse: no disk is used
    header = b.gguf_bytes({}, [b.Tensor("w", (nbytes,), b.I8, data=b"")])
    path.write_bytes(header)
    os.truncate(path, len(header) + nbytes)
    before = psutil.Process().memory_info().rss
    with GGUFFile(path) as file:
        view = file.view("w")
        assert len(view) == nbytes and view[-1] == 0
        assert file.tensors["w"].ggml_type is GGMLType.I8
        assert psutil.Process().memory_info().rss - before < 20e6
        del view


def test_two_threads_may_open_the_same_file(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b.gguf_bytes({"a": 1}, [b.Tensor("w", (64,))]))
    found: list[bytes] = []

    def work() -> None:
        for _ in range(50):
            with GGUFFile(path) as file:
                found.append(bytes(file.view("w")))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200 and len(set(found)) == 1
