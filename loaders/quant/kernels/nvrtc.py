"""Machine code from CUDA C by the NVRTC that comes with torch, kept on disk: no compiler need be installed.

A program takes NVRTC half a second, so what it made is kept in Triton's cache folder, in files named by all that went
in: source, definitions, architecture and NVRTC's version. Each begins with a digest of the rest, so that one that is
damaged is made again. The oldest go when there are more than a few models need.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger("sluice.quant")

SOURCES = Path(__file__).with_name("cuda")
KEPT = 128  # files of some 20 KB
DIGEST = hashlib.sha256().digest_size


class CudaError(RuntimeError):
    """NVRTC is not there, or it or the driver refused."""


@cache
def library() -> ctypes.CDLL:
    """NVRTC as it comes with torch, or is found where the system looks.

    Raises:
        CudaError: there is none; with what was tried.
    """
    major = (torch.version.cuda or "12").split(".")[0]
    beside = Path(torch.__file__).parent / "lib"
    wheels = Path(torch.__file__).parents[1] / "nvidia"
    if sys.platform == "win32":
        found = sorted(beside.glob(f"nvrtc64_{major}*_0.dll"))
        names = [*map(str, found), f"nvrtc64_{major}0_0.dll"]
    else:
        found = sorted(beside.glob(f"libnvrtc*.so.{major}")) + sorted(wheels.glob(f"*/lib/libnvrtc.so.{major}"))
        names = [f"libnvrtc.so.{major}", *map(str, found), "libnvrtc.so"]
    reasons = []
    for name in names:
        try:
            rtc = ctypes.CDLL(name)
        except OSError as error:
            reasons.append(str(error))
            continue
        rtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        return rtc
    raise CudaError("no NVRTC: " + "; ".join(reasons))


@cache
def version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


@cache
def source_of(name: str) -> bytes:
    """The file `name` of cuda/ and all headers there, for the names of what is kept."""
    files = [SOURCES / name, *sorted(SOURCES.glob("*.h"))]
    return b"".join(file.name.encode() + b"\0" + file.read_bytes() + b"\0" for file in files)


def folder() -> Path:
    """Where machine code is kept: in the folder that Triton keeps its own in."""
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache") / "sluice"


def compiled(name: str, definitions: tuple[str, ...], architecture: str) -> bytes:
    """Machine code of cuda/`name` for `architecture`, such as sm_90; from disk if it was made before.

    Raises:
        CudaError: with the compiler's complaints.
    """
    facts = "\0".join([architecture, version(), *definitions, ""]).encode()
    file = folder() / f"{hashlib.sha256(facts + source_of(name)).hexdigest()[:32]}.cubin"
    code = _read(file)
    if code is None:
        code = _compile(name, definitions, architecture)
        _keep(file, code)
    return code


def _read(file: Path) -> bytes | None:
    try:
        data = file.read_bytes()
    except OSError:
        return None
    code = data[DIGEST:]
    return code if code and hashlib.sha256(code).digest() == data[:DIGEST] else None


def _keep(file: Path, code: bytes) -> None:
    """Write it as a whole, whoever else does so or reads at the same time. A disk that refuses costs time only."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".", delete=False) as made:
            made.write(hashlib.sha256(code).digest() + code)
        try:
            os.replace(made.name, file)
        except OSError:  # Windows, while another process reads it
            os.unlink(made.name)
            raise
        others = [(other.stat().st_mtime, other) for other in file.parent.glob("*.cubin")]
    except OSError as error:
        log.info("machine code is not kept in %s: %s", file.parent, error)
        return
    for _, old in sorted(others)[:-KEPT]:
        with contextlib.suppress(OSError):
            old.unlink()


def _compile(name: str, definitions: tuple[str, ...], architecture: str) -> bytes:
    rtc, program, size = library(), ctypes.c_void_p(), ctypes.c_size_t()
    status = rtc.nvrtcCreateProgram(ctypes.byref(program), (SOURCES / name).read_bytes(), name.encode(), 0, None, None)
    if status:
        raise CudaError(f"nvrtcCreateProgram: {rtc.nvrtcGetErrorString(status).decode()}")
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    options += [b"--include-path=" + os.fsencode(SOURCES), *(d.encode() for d in definitions)]
    try:
        status = rtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if status:
            rtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            complaints = ctypes.create_string_buffer(size.value + 1)
            rtc.nvrtcGetProgramLog(program, complaints)
            why = complaints.value.decode(errors="replace").strip() or rtc.nvrtcGetErrorString(status).decode()
            raise CudaError(f"{name} {' '.join(definitions)} for {architecture}: {why}")
        rtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        rtc.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        rtc.nvrtcDestroyProgram(ctypes.byref(program))
