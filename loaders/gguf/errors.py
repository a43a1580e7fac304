"""The one error of the file format, and what to tell someone whose "model" is not a GGUF file.

Nine of ten unreadable models are not malformed: they are a web page saved under the model's name, a
Git LFS pointer, a half-finished download, or another format. Their first bytes say which, so the
error can say what to do.
"""

from __future__ import annotations

from pathlib import Path

INCOMPLETE = "it is incomplete, download it again"
DAMAGED = "it is damaged or was written by a faulty tool, download or convert it again"
NEWER = "update ComfyUI-Sluice; if it is up to date already, the file is damaged, download it again"


class GGUFError(ValueError):
    """A model file cannot be used. Reads `<file>: <what is wrong and where>; <what to do>`."""

    def __init__(self, path: str | Path, problem: str, remedy: str) -> None:
        super().__init__(path, problem, remedy)
        self.path = Path(path)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        # A file name may hold bytes that are no UTF-8; the message must survive JSON and a terminal.
        return f"{self.path.name or self.path}: {self.problem}; {self.remedy}".encode("utf-8", "replace").decode()


def shown(name: str) -> str:
    """A name from the file, quoted for a message: printable and short, however hostile."""
    return repr(name if len(name) <= 100 else f"{name[:60]}...{name[-30:]}")


_CONVERT = "convert it to GGUF, or load it with ComfyUI's own loader"
_WEB_PAGE = ("it is an HTML page, not a model: the download saved the web page", "use the file's own download link")
_ANSWER = ("it is a text, probably a server's error message, not a model", "download it again")
_OLD = ("it is a GGML file from before GGUF", "download or convert a GGUF version")
_ARCHIVE = ("it is a packed archive", "unpack it and use the .gguf file inside")

# First bytes (text in lower case) -> what the file is, what to do.
_SIGNATURES: dict[bytes, tuple[str, str]] = {
    b"version https://git-lfs": (
        "it is a Git LFS pointer, not the model itself",
        "run `git lfs pull` in its repository, or download the file itself",
    ),
    b"<!doctype": _WEB_PAGE,
    b"<html": _WEB_PAGE,
    b"<?xml": _ANSWER,
    b'{"': _ANSWER,
    b"pk\x03\x04": ("it is a PyTorch file or another zip archive", _CONVERT),
    b"\x80\x02": ("it is a pickled PyTorch file", _CONVERT),
    b"\x1f\x8b": _ARCHIVE,
    b"7z\xbc\xaf": _ARCHIVE,
    b"\x28\xb5\x2f\xfd": _ARCHIVE,
    b"rar!": _ARCHIVE,
    b"tjgg": _OLD,
    b"fmgg": _OLD,
    b"lmgg": _OLD,
    b"\0\0\0\0\0\0\0\0": ("it begins with zeros: space was reserved for it, the download never filled it", INCOMPLETE),
}


def not_gguf(path: str | Path, head: bytes) -> GGUFError:
    """The error for a file that does not begin with `GGUF`, from its first bytes (64 are enough)."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n").lower()
    for signature, (what, remedy) in _SIGNATURES.items():
        if text.startswith(signature):
            return GGUFError(path, f"not a GGUF file: {what}", remedy)
    if head[8:9] == b"{":
        return GGUFError(path, "not a GGUF file: it is a safetensors file", _CONVERT)
    if b"GGUF".startswith(head):
        return GGUFError(path, f"the file ends after {len(head)} bytes", INCOMPLETE)
    problem = f"not a GGUF file: it begins with {head[:4]!r} where 'GGUF' must stand"
    return GGUFError(path, problem, "choose another file, or download it again")
