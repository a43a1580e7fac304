"""What can go wrong while weights stream, each said as what, where, and what to do next."""

from __future__ import annotations

from pathlib import Path

from ..loaders.sizes import size


class StreamError(RuntimeError):
    """Weights cannot be streamed. The model is whole: after the remedy, the next run works."""


class SourceError(StreamError):
    """The bytes of a weight cannot be had from their file. Reads `<file>: <what and where>; <what to do>`."""

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        super().__init__(path, problem, remedy)
        self.path, self.problem, self.remedy = path, problem, remedy

    def __str__(self) -> str:
        # A file name may hold bytes that are no UTF-8; the message must survive JSON and a terminal.
        return f"{self.path.name or self.path}: {self.problem}; {self.remedy}".encode("utf-8", "replace").decode()


class ArenaError(StreamError):
    """The ring's one allocation failed. The caller answers with a plan for less VRAM."""

    def __init__(self, nbytes: int, reason: str) -> None:
        super().__init__(
            f"the streaming ring of {size(nbytes)} could not be allocated ({reason}); "
            "plan again with a smaller VRAM budget, or free VRAM"
        )
        self.nbytes = nbytes


def first_line(error: BaseException) -> str:
    """What torch says, without its advice."""
    return str(error).split("\n")[0]


class RefusedError(Exception):
    """A rung of the source ladder cannot be used here; its text is the reason. Normal, and answered by the next."""


class NoRoomToLockError(RefusedError):
    """It would be allowed, or may be, if less were locked already."""
