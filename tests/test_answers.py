"""Asking drives that do not answer: nobody waits for them twice, and what lies on others is told all the same."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pack.nodes.report.answers import NO_ANSWER, Errands, FileLooks, Found, NoAnswerError

FOR_EVER = 60.0  # seconds: longer than any of these tests


class Drive:
    """Answers at once, but for the names in `silent`, which answer when it `wakes`."""

    def __init__(self, *silent: str) -> None:
        self.silent = silent
        self.asked: list[str] = []
        self._awake = threading.Event()

    def stat(self, path: Path) -> os.stat_result:
        self.asked.append(path.name)
        if path.name not in self.silent:
            return os.stat(path)
        self._awake.wait(FOR_EVER)
        return os.stat(path)

    def wake(self) -> None:
        self._awake.set()

    def sleep(self) -> None:
        self._awake.clear()


@pytest.fixture
def drive() -> Iterator[Drive]:
    made = Drive("silent.gguf")
    yield made
    made.wake()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / f"{name}.gguf" for name in ("small", "silent", "large", "gone")}
    for nbytes, name in enumerate(("small", "silent", "large"), start=1):
        found[name].write_bytes(bytes(nbytes))
    return found


def test_sizes_of_files(files: dict[str, Path]) -> None:
    found = FileLooks(FOR_EVER).at([files["large"], files["gone"], files["small"], files["large"]])
    assert found == {
        files["large"]: Found("there", 3),
        files["gone"]: Found("gone"),
        files["small"]: Found("there", 1),
    }


def test_a_name_that_no_file_can_have() -> None:
    assert FileLooks(FOR_EVER).at([Path("a\0b")]) == {Path("a\0b"): Found("gone")}


def test_a_silent_file_is_not_waited_for_again(files: dict[str, Path], drive: Drive) -> None:
    """And holds up no other."""
    looks = FileLooks(0.05, 0.0, stat=drive.stat)
    asked = [files["silent"], files["small"], files["large"]]
    while looks.at(asked) != {asked[0]: NO_ANSWER, asked[1]: Found("there", 1), asked[2]: Found("there", 3)}:
        pass  # on a busy machine the others may be late, too
    looks._patience = FOR_EVER
    looks._files[files["silent"]].asked = -FOR_EVER  # which is late
    for _ in range(3):
        found = looks.at(asked)
        assert [found[path].nbytes for path in asked] == [None, 1, 3]
        assert found[files["silent"]].state == "no answer"
    assert drive.asked.count("silent.gguf") == 1


def test_a_file_that_answers_late_is_told(files: dict[str, Path], drive: Drive) -> None:
    looks = FileLooks(0.05, stat=drive.stat)
    assert looks.at([files["silent"]]) == {files["silent"]: NO_ANSWER}
    drive.wake()
    while (found := looks.at([files["silent"]])[files["silent"]]) == NO_ANSWER:
        threading.Event().wait(0.001)
    assert found == Found("there", 2)


def test_a_file_that_falls_silent_is_not_told_of_any_more(files: dict[str, Path], drive: Drive) -> None:
    drive.wake()
    looks = FileLooks(0.05, 0.0, stat=drive.stat)
    while looks.at([files["silent"]])[files["silent"]] == NO_ANSWER:
        pass
    drive.sleep()
    while looks.at([files["silent"]])[files["silent"]] != NO_ANSWER:
        threading.Event().wait(0.001)


def test_a_change_is_seen_once_what_is_known_is_no_longer_fresh(files: dict[str, Path], drive: Drive) -> None:
    path, looks = files["large"], FileLooks(FOR_EVER, FOR_EVER, stat=drive.stat)
    assert looks.at([path]) == {path: Found("there", 3)}
    path.unlink()
    assert looks.at([path]) == {path: Found("there", 3)} and drive.asked == ["large.gguf"]
    looks._fresh = 0.0
    while looks.at([path]) != {path: Found("gone")}:
        threading.Event().wait(0.001)


def test_what_was_found_long_ago_is_not_told(files: dict[str, Path]) -> None:
    path, looks = files["large"], FileLooks(FOR_EVER, kept=0.0)
    assert looks.at([path]) == {path: Found("there", 3)}
    path.unlink()
    assert looks.at([path]) == {path: Found("gone")}


def test_what_nobody_asks_for_is_forgotten(files: dict[str, Path]) -> None:
    looks = FileLooks(FOR_EVER)
    looks.at(files.values())
    looks.at([files["small"]])
    assert set(looks._files) == {files["small"]}


def test_many_threads_ask_at_once(files: dict[str, Path]) -> None:
    looks = FileLooks(FOR_EVER)
    seen: list[Found] = []

    def ask() -> None:
        seen.extend(looks.at(files.values())[files["large"]] for _ in range(50))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [Found("there", 3)] * 200


def test_errands_give_results_and_errors() -> None:
    async def both() -> tuple[object, str]:
        errands = Errands(2, FOR_EVER)
        with pytest.raises(KeyError) as raised:
            await errands.run({}.__getitem__, "missing")
        return await errands.run(max, 3, 5), str(raised.value)

    assert asyncio.run(both()) == (5, "'missing'")


def test_an_errand_that_takes_too_long_keeps_its_thread_only() -> None:
    """The event loop goes on, and the thread serves the next errand once it is free."""
    held, free = threading.Event(), threading.Event()

    def hold() -> bool:
        held.set()
        return free.wait(FOR_EVER)

    async def ask() -> list[object]:
        errands = Errands(1, 0.05)
        with pytest.raises(NoAnswerError):
            await errands.run(hold)
        assert held.is_set()
        with pytest.raises(NoAnswerError):  # the only thread is held up
            await errands.run(len, "abc")
        free.set()
        errands._patience = FOR_EVER
        return [await errands.run(len, "abc") for _ in range(3)]

    assert asyncio.run(ask()) == [3, 3, 3]
