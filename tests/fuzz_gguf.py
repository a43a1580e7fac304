"""Fuzz the GGUF reader: whatever a file holds, it opens or raises GGUFError, soon and in little memory.

    python tests/fuzz_gguf.py --seconds 600

Sound files are edited at random (a byte, a number of 4 or 8 bytes, a cut, a repetition). Files that give an
outcome not seen before are edited further, so that the search goes deeper than the seeds. A file that
breaks the rule is kept in tests/hostile/, where test_gguf_hostile.py opens it ever after.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
import struct
import tempfile
import time
import traceback
from pathlib import Path

import builders as b
import conftest  # noqa: F401  makes `pack` importable when this file is run as a program
import hypothesis.strategies as st
from pack.loaders.gguf.reader import GGUFError, GGUFFile

FOUND = Path(__file__).parent / "hostile"
LIMIT_SECONDS = 1.0
LIMIT_BYTES = 200 << 20

INTERESTING = [0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 31, 32, 255, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
INTERESTING += [1 << 32, (1 << 61) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1]

Edit = tuple[str, int, int]  # what, where (modulo the length), with which number


def seeds() -> list[bytes]:
    """Sound files that together hold every construct of the format."""
    numbers = {f"n{kind}": b.number(kind, 1) for kind in range(13) if kind not in (b.STRING, b.ARRAY)}
    arrays = {f"a{kind}": b.array(kind, [1, 0]) for kind in range(13) if kind not in (b.STRING, b.ARRAY)}
    texts = {"s": "flux", "a": b.array(b.STRING, ["", "ab"]), "d": b.array(b.ARRAY, [b.array(b.STRING, ["x"])])}
    tensors = [b.Tensor("q", (2, 32), b.Q8_0), b.Tensor("v", (3,)), b.Tensor("e", (0,)), b.Tensor("s", ())]
    return [
        b.gguf_bytes(),
        b.gguf_bytes(numbers),
        b.gguf_bytes(arrays),
        b.gguf_bytes(texts),
        b.gguf_bytes({}, tensors),
        b.gguf_bytes({"general.alignment": 8}, tensors, alignment=8, version=2),
        b.gguf_bytes(b.split_keys(1, 2, 5), tensors),
    ]


def edited(content: bytes, edits: list[Edit]) -> bytes:
    for what, where, number in edits:
        at = where % (len(content) + 1)
        if what == "byte":
            content = content[:at] + bytes([number & 255]) + content[at + 1 :]
        elif what == "u32":
            content = content[:at] + struct.pack("<I", number & 0xFFFFFFFF) + content[at + 4 :]
        elif what == "u64":
            content = content[:at] + struct.pack("<Q", number) + content[at + 8 :]
        elif what == "cut":
            content = content[:at]
        elif what == "remove":
            content = content[:at] + content[at + number % 16 + 1 :]
        else:  # repeat
            content = content[: at + number % 64 + 1] + content[at:]
    return content


KINDS = ["byte", "byte", "u32", "u64", "u64", "cut", "remove", "repeat"]


def mutations(contents: list[bytes]) -> st.SearchStrategy[bytes]:
    number = st.one_of(st.sampled_from(INTERESTING), st.integers(0, (1 << 64) - 1))
    edit = st.tuples(st.sampled_from(KINDS), st.integers(0, 1 << 12), number)
    return st.builds(edited, st.sampled_from(contents), st.lists(edit, min_size=1, max_size=5))


def open_and_read_all(path: Path) -> str:
    """'opened' or the error's message; any exception but GGUFError passes through."""
    try:
        file = GGUFFile(path)
    except GGUFError as error:
        return str(error)
    with file:
        for key in file.metadata:
            try:
                file.metadata[key]
            except GGUFError:
                assert file.metadata._values[key] is not None  # only what is decoded late may still fail
        ends: dict[int, int] = {}
        for info in sorted(file.tensors.values(), key=lambda t: (t.part, t.offset)):
            with file.view(info.name) as view:
                assert len(bytes(view)) == info.nbytes
            assert not info.nbytes or info.offset >= ends.get(info.part, 0)
            ends[info.part] = max(info.offset + info.nbytes, ends.get(info.part, 0))
    assert file.close()
    return "opened"


def explore(content: bytes, path: Path) -> str:
    """Write and open a file; 'opened' or 'refused'."""
    path.write_bytes(content)
    return "opened" if open_and_read_all(path) == "opened" else "refused"


def place_for_mutants(folder: Path) -> Path:
    """Where to write them: a mutant that still calls itself part 2 of 2 finds a sound part 1 beside it."""
    sibling = b.gguf_bytes(b.split_keys(0, 2, 5), [b.Tensor("first", (4,))])
    return b.write_split(folder, "m", [sibling, b""])[1]


def limit_memory() -> None:
    """Make an allocation far beyond the present size fail, where the system can."""
    try:
        import resource
    except ImportError:
        return
    import psutil

    limit = psutil.Process().memory_info().vms + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def fuzz(seconds: float, seed: int) -> int:
    rng = random.Random(seed)
    corpus, outcomes, finds, runs = seeds(), set[str](), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        path = place_for_mutants(Path(folder))
        limit_memory()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            runs += 1
            edits = [
                (
                    rng.choice(KINDS),
                    rng.randrange(1 << 12),
                    rng.choice([*INTERESTING, rng.getrandbits(64), rng.getrandbits(8)]),
                )
                for _ in range(rng.choice([1, 1, 2, 3, 5]))
            ]
            content = edited(rng.choice(corpus), edits)
            path.write_bytes(content)
            start, failure = time.process_time(), ""
            try:
                outcome = open_and_read_all(path)
            except BaseException:
                outcome, failure = "failed", traceback.format_exc()
                if "KeyboardInterrupt" in failure:
                    raise
            if time.process_time() - start > LIMIT_SECONDS:
                failure = failure or "took too long"
            if failure:
                finds += 1
                FOUND.mkdir(exist_ok=True)
                find = FOUND / f"{hashlib.sha256(content).hexdigest()[:12]}.gguf"
                find.write_bytes(content)
                print(f"{find}: {failure}", flush=True)
            shape = re.sub(r"(['\"]).*\1|\d+", "#", outcome)
            if shape not in outcomes or (outcome == "opened" and len(corpus) < 300):
                outcomes.add(shape)
                if len(content) < 1 << 14:
                    corpus.append(content)
    print(f"{runs} files, {len(outcomes)} kinds of outcome, {finds} finds, seed {seed}")
    return finds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    arguments = parser.parse_args()
    raise SystemExit(1 if fuzz(arguments.seconds, arguments.seed) else 0)
