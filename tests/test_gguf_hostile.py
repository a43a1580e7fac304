"""Malformed files: each is refused with a GGUFError that names the file, the place, the cause and the remedy."""

from __future__ import annotations

import os
import struct
import sys
import time
from pathlib import Path

import builders as b
import pytest
from broken_files import AGAIN, BROKEN
from fuzz_gguf import FOUND, explore, mutations, place_for_mutants, seeds
from hypothesis import HealthCheck, given, settings
from pack.loaders.gguf.errors import shown
from pack.loaders.gguf.reader import GGUFError, GGUFFile

T = b.Tensor


def refused(path: Path, *words: str) -> str:
    """The message of the error that opening `path` gives; it must hold all `words` and look like a message of ours."""
    with pytest.raises(GGUFError) as caught:
        GGUFFile(path)
    message = str(caught.value)
    assert message == f"{caught.value.path.name}: {caught.value.problem}; {caught.value.remedy}"
    for word in (path.name if caught.value.path == path else "", *words):
        assert word in message, f"{word!r} is not in: {message}"
    assert len(message) < 500 and message.isprintable()
    return message


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file(tmp_path, case):
    content, words = BROKEN[case]
    path = tmp_path / "broken model.gguf"
    path.write_bytes(content)
    start = time.process_time()
    refused(path, *words)
    assert time.process_time() - start < 0.5


def rich_file() -> bytes:
    meta = {
        "general.alignment": 8,
        "name": "é",
        "tokens": b.array(b.STRING, ["a", "bc"]),
        "scores": b.array(b.FLOAT32, [1.0, 2.0]),
        "deep": b.array(b.ARRAY, [b.array(b.U8, [1])]),
        "flag": True,
    }
    return b.gguf_bytes(meta, [T("w", (2, 32), b.Q8_0), T("v", (3,)), T("e", (0,))], alignment=8)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "cut.gguf"
    content = rich_file()
    padding = 4  # after the 12 bytes of "v"
    path.write_bytes(content)
    GGUFFile(path).close()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        if length >= len(content) - padding:
            with GGUFFile(path) as file:
                assert bytes(file.view("v")) == bytes(range(12)) and bytes(file.view("e")) == b""
        else:
            message = refused(path)
            assert "again" in message.split("; ")[-1], message


def test_names_from_the_file_cannot_disfigure_a_message(tmp_path):
    path = tmp_path / "m.gguf"
    name = "\x1b[31m\n\u202e" + "x" * 9999
    path.write_bytes(b.gguf_bytes({}, [T(name, (4,), 77)]))
    assert shown(name) in refused(path, r"'\x1b[31m\n\u202e", "...", "unknown tensor type 77")


# Paths that are no files


def test_missing_file_and_folder(tmp_path):
    refused(tmp_path / "absent.gguf", "there is no such file", "check its name")
    refused(tmp_path / "absent" / "m.gguf", "there is no such file", "check its name")
    folder = tmp_path / "folder.gguf"
    folder.mkdir()
    refused(folder, "it is a folder", "choose a .gguf file")
    (tmp_path / "plain").write_bytes(b"x")
    refused(tmp_path / "plain" / "m.gguf", "there is no such file")
    with pytest.raises(GGUFError, match=r"it cannot be opened"):
        GGUFFile("null\0byte.gguf")
    refused(tmp_path / ("x" * 300 + ".gguf"), "it cannot be opened", "check its path")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    refused(tmp_path / "pipe.gguf", "not a regular file")


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users and permissions")
def test_permission_denied(tmp_path):
    path = tmp_path / "secret.gguf"
    path.write_bytes(b.gguf_bytes())
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # root may read everything, nobody may not
        os.seteuid(65534)
    try:
        refused(path, "it may not be read", "give the user that runs ComfyUI permission")
    finally:
        os.seteuid(user)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names there are text")
def test_a_file_name_of_other_bytes_gives_a_message_that_can_be_encoded(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.gguf"))
    path.write_bytes(b"x" * 30)
    with pytest.raises(GGUFError) as caught:
        GGUFFile(path)
    assert "not a GGUF file" in str(caught.value).encode("utf-8").decode()


# Split models


def part(no: int, count: int = 3, total: int = 3, name: str | None = None) -> bytes:
    return b.gguf_bytes(b.split_keys(no, count, total), [T(name or f"w{no}", (4,))])


def test_split_part_missing(tmp_path):
    paths = b.write_split(tmp_path, "model", [part(i) for i in range(3)])
    paths[1].unlink()
    words = (
        "part 2 of 3 of the model, model-00002-of-00003.gguf, is missing from",
        str(tmp_path),
        "download it into that folder",
    )
    for given_path in (paths[0], paths[2]):
        assert given_path.name in refused(given_path, *words)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        pytest.param(
            [part(0), part(0, name="x"), part(2)],
            ("part 2 of 3, its metadata 'split.no' makes it part 1",),
            id="number repeated",
        ),
        pytest.param(
            [part(1), part(2), part(0)],
            ("part 1 of 3, its metadata 'split.no' makes it part 2",),
            id="numbers in a circle",
        ),
        pytest.param([part(0), part(1, count=4), part(2)], ("of a model of 4 parts", "one of 3"), id="another count"),
        pytest.param(
            [part(0, count=65535)] * 3,
            ("its name says 3 parts, its metadata 'split.count' says 65535",),
            id="count beyond the name",
        ),
        pytest.param([part(0), b.gguf_bytes({}, [T("w1", (4,))]), part(2)], ("of a model of 1 parts",), id="stranger"),
        pytest.param(
            [part(0), part(1, name="w0"), part(2)],
            ("tensor 'w0' is also in model-00001-of-00003.gguf",),
            id="tensor in two parts",
        ),
        pytest.param(
            [part(i, total=7) for i in range(3)], ("announces 7 tensors, the parts hold 3",), id="tensor count"
        ),
        pytest.param(
            [part(0), part(1)[:-40], part(2)], ("model-00002-of-00003.gguf: tensor 'w1'", AGAIN), id="part cut off"
        ),
        pytest.param([part(0), b"", part(2)], ("model-00002-of-00003.gguf: the file is empty", AGAIN), id="part empty"),
    ],
)
def test_split_parts_that_do_not_belong_together(tmp_path, parts, words):
    paths = b.write_split(tmp_path, "model", parts)
    refused(paths[0], *words)


def test_split_part_that_is_a_link_to_another(tmp_path):
    paths = b.write_split(tmp_path, "model", [part(i) for i in range(3)])
    paths[2].unlink()
    paths[2].symlink_to(paths[0])
    refused(paths[0], "model-00003-of-00003.gguf", "'split.no' makes it part 1")


def test_split_with_as_many_parts_as_a_name_can_say(tmp_path):
    path = tmp_path / "model-00001-of-65535.gguf"
    path.write_bytes(part(0, count=65535))
    refused(path, "part 2 of 65535 of the model", "is missing")


# Work is bounded


def test_as_much_as_the_limits_allow_takes_no_second(tmp_path):
    path = tmp_path / "long.gguf"
    for content in (
        b.gguf_bytes({}, [T(str(i), (0,)) for i in range(1 << 16)]),
        b.gguf_bytes({str(i): 1 for i in range(1 << 16)}),
        b.gguf_bytes({"k": b.Value(b.ARRAY, struct.pack("<IQ", b.STRING, 1 << 22) + bytes(8 << 22))}),
        b.gguf_bytes({"k": b.Value(b.ARRAY, struct.pack("<IQ", b.ARRAY, 1 << 18) + bytes(12 << 18))}),
    ):
        path.write_bytes(content)
        start = time.process_time()
        GGUFFile(path).close()
        assert time.process_time() - start < 1.5


def test_beyond_the_limits_is_refused_at_once(tmp_path):
    path = tmp_path / "long.gguf"
    for content, words in (
        (b.gguf_bytes({}, [T(str(i), (0,)) for i in range((1 << 16) + 1)]), "the tensor table announces 65537 tensors"),
        (b.gguf_bytes({str(i): 1 for i in range((1 << 16) + 1)}), "the header announces 65537 metadata keys"),
        (
            b.gguf_bytes({"k": b.Value(b.ARRAY, struct.pack("<IQ", b.STRING, (1 << 22) + 1) + bytes(9 << 22))}),
            "is an array of 4194305 strings or arrays, more than any model has",
        ),
    ):
        path.write_bytes(content)
        start = time.process_time()
        refused(path, words)
        assert time.process_time() - start < 0.2


# Fuzzing, in short. fuzz_gguf.py does it for long and keeps what breaks the reader in tests/hostile/,
# beside mutants of a long search that got far into it.


@pytest.fixture(scope="module")
def fuzz_path(tmp_path_factory) -> Path:
    return place_for_mutants(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kept", sorted(FOUND.glob("*.gguf")), ids=lambda path: path.stem)
def test_kept_mutant(kept, fuzz_path):
    assert explore(kept.read_bytes(), fuzz_path) == "refused"


def test_a_mutated_file_opens_or_is_refused(fuzz_path):
    outcomes = {"opened": 0, "refused": 0}

    @settings(max_examples=1500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(mutations(seeds()))
    def check(content: bytes) -> None:
        outcomes[explore(content, fuzz_path)] += 1

    check()
    assert min(outcomes.values()) > 50, outcomes
