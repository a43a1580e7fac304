"""Writing GGUF files: what both readers read is what was given, and a file appears whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from pack.loaders.gguf.errors import GGUFError
from pack.loaders.gguf.reader import GGUFFile
from pack.loaders.gguf.types import GGMLType
from pack.loaders.gguf.writer import GGUFWriter, NewTensor

METADATA = {
    "general.architecture": "flux",
    "general.file_type": 15,
    "a.text": "Süd 漢字 " + "x" * 70_000,
    "a.number": 0.25,
    "a.switch": True,
    "a.shape": [320, 4, 3, 3],
    "a.factors": [0.5, -1.5],
    "a.words": ["one", "", "three"],
    "an.empty.list": [],
}
TENSORS = [
    NewTensor("blocks.0.weight", (4, 512), GGMLType.Q4_K),
    NewTensor("blocks.0.bias", (5,), GGMLType.F32),  # 20 bytes: padded
    NewTensor("table", (2, 3, 4, 32), GGMLType.Q8_0),
    NewTensor("v_pred", (0,), GGMLType.F32),
    NewTensor("number", (1,), GGMLType.BF16),
]


def bytes_of(tensor: NewTensor) -> np.ndarray:
    return np.random.default_rng(len(tensor.name)).integers(0, 256, tensor.nbytes, dtype=np.uint8)


def write(path: Path, tensors: list[NewTensor] = TENSORS) -> GGUFWriter:
    with GGUFWriter(path, METADATA, tensors) as writer:
        for tensor in tensors:
            writer.write(bytes_of(tensor))
    return writer


def test_our_reader_reads_what_was_written(tmp_path: Path) -> None:
    writer = write(tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").stat().st_size == writer.nbytes
    with GGUFFile(tmp_path / "a.gguf") as file:
        assert dict(file.metadata) == METADATA | {"general.alignment": 32}
        assert (file.version, file.alignment) == (3, 32)
        assert [(t.name, t.shape, t.ggml_type) for t in file.tensors.values()] == [
            (t.name, t.shape, t.ggml_type) for t in TENSORS
        ]
        for tensor in TENSORS:
            assert bytes(file.view(tensor.name)) == bytes_of(tensor).tobytes()


def test_gguf_py_reads_what_was_written(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert {key: reader.fields[key].contents() for key in METADATA if METADATA[key] != []} == {
        key: value for key, value in METADATA.items() if value != []
    }
    for ours, theirs in zip(TENSORS, reader.tensors, strict=True):
        assert (theirs.name, tuple(reversed(theirs.shape)), int(theirs.tensor_type)) == (
            ours.name,
            ours.shape,
            ours.ggml_type,
        )
        assert theirs.data.tobytes() == bytes_of(ours).tobytes()


def test_a_file_without_tensors_is_sound(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", [])
    with GGUFFile(tmp_path / "a.gguf") as file:
        assert not file.tensors


class Cancelled(BaseException):
    """As the host's own, no Exception."""


@pytest.mark.parametrize("error", [Cancelled, KeyboardInterrupt, RuntimeError])
def test_what_ends_early_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a.gguf").write_bytes(b"old")
    with pytest.raises(error), GGUFWriter(tmp_path / "a.gguf", METADATA, TENSORS) as writer:
        writer.write(bytes_of(TENSORS[0]))
        assert len(list(tmp_path.iterdir())) == 2
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    assert (tmp_path / "a.gguf").read_bytes() == b"old"


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"old")
    with GGUFWriter(tmp_path / "a.gguf", METADATA, TENSORS) as writer:
        for tensor in TENSORS:
            assert (tmp_path / "a.gguf").read_bytes() == b"old"
            writer.write(bytes_of(tensor))
    assert (tmp_path / "a.gguf").stat().st_size == writer.nbytes
    assert len(list(tmp_path.iterdir())) == 1


def test_a_tensor_that_was_forgotten_is_an_error(tmp_path: Path) -> None:
    forgotten = pytest.raises(ValueError, match=r"4 tensors were not written, beginning with 'blocks\.0\.bias'")
    with forgotten, GGUFWriter(tmp_path / "a.gguf", METADATA, TENSORS) as writer:
        writer.write(bytes_of(TENSORS[0]))
    assert not list(tmp_path.iterdir())


def test_bytes_must_be_those_of_the_tensor(tmp_path: Path) -> None:
    wrong = pytest.raises(ValueError, match=r"takes 1152 bytes, 20 were given")
    with wrong, GGUFWriter(tmp_path / "a.gguf", METADATA, TENSORS) as writer:
        writer.write(bytes_of(TENSORS[1]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([TENSORS[0], TENSORS[0]], "2 tensors of 1 different names"),
        ([NewTensor("conv", (2, 2, 2, 2, 32), GGMLType.Q8_0)], "has 5 dimensions, GGUF has 4"),
        ([NewTensor("w", (2, 48), GGMLType.Q8_0)], "not a whole number of Q8_0 blocks"),
    ],
)
def test_what_gguf_cannot_hold_is_an_error(tmp_path: Path, tensors: list[NewTensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GGUFWriter(tmp_path / "a.gguf", {}, tensors)


def test_a_disk_without_room_is_an_error_at_once(tmp_path: Path) -> None:
    huge = [NewTensor("w", (1 << 24, 1 << 28), GGMLType.F32)]
    no_room = pytest.raises(GGUFError, match=r"a\.gguf: it will take .* GB, the disk has .* left; free some space")
    with no_room, GGUFWriter(tmp_path / "a.gguf", METADATA, huge):
        raise AssertionError("was entered")
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"there is no folder .*nowhere; choose another folder or create it"):
        write(tmp_path / "nowhere" / "a.gguf")


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[2])
import conftest, test_gguf_writer as t
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # no file of this process may grow beyond it
t.write(t.Path(sys.argv[1]), [t.NewTensor("w", (64, 256), t.GGMLType.F32)])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the limit is the system's, and Windows has none")
def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"old")
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "a.gguf"), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "GGUFError: a.gguf: writing it failed: no file of this size is allowed there" in done.stderr, done.stderr
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.gguf", b"old")]
