"""What fails about a kernel, told apart: what was given does not fit (another implementation would fail as well), or
the kernel does not work here, for which a reason is kept."""

from __future__ import annotations


class MismatchError(ValueError):
    """Bytes and shapes that do not fit each other."""


def reason(error: BaseException) -> str:
    """Why, in one piece. A compiler's error holds the source of its program and names the cause beneath."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
