"""Cold parts of a file are read before they are needed, in pieces between which the work may be ended."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pack.loaders import read_ahead as module
from pack.loaders.read_ahead import PIECE_BYTES, Told, Watch, cold_pieces, read_ahead, unwatched

SIZE = 24 << 20


class Watched:
    """Whoever watches, and ends the work when `limit` bytes are done."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.begun: list[tuple[str, int]] = []
        self.done = 0

    @contextmanager
    def watch(self, what: str, total: int) -> Iterator[Told]:
        self.begun.append((what, total))
        yield self.told

    def told(self, nbytes: int) -> None:
        self.done += nbytes
        if self.limit is not None and self.done >= self.limit:
            raise KeyboardInterrupt


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "model.gguf"
    with made.open("wb") as file:
        file.write(os.urandom(SIZE))
        file.flush()
        os.fsync(file.fileno())
    return made


@pytest.fixture(params=["_by_reading", "_by_mapping"])
def descriptor(path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of the file, none of which is cached, and each way to find that out; skips where neither tells."""
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system cannot be told to forget a file")
    opened = os.open(path, os.O_RDONLY)
    os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
    if not is_cold(opened, 0) or getattr(module, request.param)(opened) is None:
        os.close(opened)
        pytest.skip("this file system keeps every file cached, or does not tell")
    monkeypatch.setattr(module, "_cached", getattr(module, request.param))
    yield opened
    os.close(opened)


def is_cold(descriptor: int, offset: int) -> bool:
    """Asked in the way that does not make the system read it."""
    cached = module._by_mapping(descriptor)
    return cached is not None and not cached(offset)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("sluice-ahead")]


def test_reads_what_is_cold_and_tells_of_it(descriptor: int) -> None:
    watched = Watched()
    assert read_ahead(descriptor, [(0, SIZE)], watched.watch, "model.gguf") == SIZE
    assert watched.begun == [("reading model.gguf", SIZE)] and watched.done == SIZE
    assert not cold_pieces(descriptor, [(0, SIZE)])
    assert not threads()


def test_what_is_cached_shows_nothing(descriptor: int) -> None:
    read_ahead(descriptor, [(0, SIZE)], unwatched, "model.gguf")
    watched = Watched()
    assert read_ahead(descriptor, [(0, SIZE)], watched.watch, "model.gguf") == 0
    assert not watched.begun


def test_reads_the_spans_and_no_more(descriptor: int) -> None:
    first, last = (0, PIECE_BYTES), (16 << 20, (16 << 20) + PIECE_BYTES)
    assert read_ahead(descriptor, [last, first], unwatched, "model.gguf") == 2 * PIECE_BYTES
    assert is_cold(descriptor, 12 << 20)


def test_ends_when_told_and_leaves_no_thread(descriptor: int) -> None:
    watched = Watched(limit=PIECE_BYTES)
    with pytest.raises(KeyboardInterrupt):
        read_ahead(descriptor, [(0, SIZE)], watched.watch, "model.gguf")
    assert watched.done == PIECE_BYTES
    assert not threads()
    assert read_ahead(descriptor, [(0, SIZE)], unwatched, "model.gguf") < SIZE, "what was read is still there"


def test_whoever_watches_is_asked_while_a_read_takes_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network's file may hang for longer than a user waits."""
    release, told = threading.Event(), Watched()

    def hangs(descriptor: int, piece: module.Span, own: threading.local) -> int:
        release.wait(60)
        return piece[1] - piece[0]

    def ends(nbytes: int) -> None:
        release.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_read", hangs)
    monkeypatch.setattr(module, "cold_pieces", lambda descriptor, spans: list(spans))
    monkeypatch.setattr(told, "told", ends)
    with path.open("rb") as file, pytest.raises(KeyboardInterrupt):
        read_ahead(file.fileno(), [(0, SIZE)], told.watch, "model.gguf")
    assert not threads()


def test_file_that_ends_early_is_left_to_whoever_needs_it(descriptor: int) -> None:
    assert read_ahead(descriptor, [(SIZE - 4096, SIZE + (8 << 20))], unwatched, "model.gguf")


def test_spans_are_joined_and_cut() -> None:
    mb = 1 << 20
    pieces = list(module._pieces([(9 * mb, 10 * mb), (0, mb), (mb + 10, 2 * mb), (0, 5 * mb)]))
    assert pieces == [(0, 4 * mb), (4 * mb, 5 * mb), (9 * mb, 10 * mb)]
    assert list(module._pieces([])) == []


def test_a_watch_of_nobody(path: Path) -> None:
    watch: Watch = unwatched
    with path.open("rb") as file:
        read_ahead(file.fileno(), [(0, SIZE)], watch, "model.gguf")
        assert not cold_pieces(file.fileno(), [(0, SIZE)])
