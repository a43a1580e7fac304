"""README.md's support matrix, written from the code: `.venv/bin/python tools/support_matrix.py`.

What is listed is what exists: the types that the dequantisers register, the types in the kernels' table, and the
architectures whose latents the tests compare. A test fails when the text between the markers is not what this makes.
"""

from __future__ import annotations

import ast
import sys
import types
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
KERNELS = ROOT / "loaders" / "quant" / "kernels" / "launch.py"
BEGIN = "<!-- support matrix: written by tools/support_matrix.py -->"
END = "<!-- end of the support matrix -->"

SPELLINGS = {
    "native": "the original's, as ComfyUI has them",
    "prefixed": "`model.diffusion_model.` before each",
    "diffusers": "diffusers'",
    "original": "the first release's, where ComfyUI has others",
}


def kernel_types() -> set[str]:
    """The types in the kernels' table; read, not imported, for Triton is not everywhere."""
    if not KERNELS.exists():
        return set()
    for node in ast.walk(ast.parse(KERNELS.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.AnnAssign)
            and ast.unparse(node.target) == "KERNELS"
            and isinstance(node.value, ast.Dict)
        ):
            return {key.attr for key in node.value.keys if isinstance(key, ast.Attribute)}
    raise ValueError(f"{KERNELS} has no table KERNELS")


def quant_types() -> list[str]:
    """One row for each block size and each kind of support."""
    from pack.loaders.gguf.types import BLOCKS
    from pack.loaders.quant.reference import IMPLEMENTED

    kernels = kernel_types()
    rows: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
    for kind, block in sorted(BLOCKS.items(), key=lambda item: item[1].elements):
        plain = block.elements == 1
        weights = "one" if plain else str(block.elements)
        kernel = "needs none" if plain else "yes" if kind.name in kernels else "no"
        row = (weights, *(("yes", kernel) if kind in IMPLEMENTED else ("no, refused with an error", "no")))
        rows.setdefault(row, []).append((8 * block.nbytes / block.elements, kind.name))
    lines = ["| weights in a block | types (bits for each weight) | plain torch | Triton kernel |", "|-|-|-|-|"]
    for (weights, loads, kernel), found in sorted(rows.items(), key=lambda item: item[0][1] != "yes"):
        names = ", ".join(f"{name} ({bits:.3g})" for bits, name in sorted(found))
        lines.append(f"| {weights} | {names} | {loads} | {kernel} |")
    return lines


def architectures() -> list[str]:
    """The families of the host by the versions that they are compared on, then the spellings of their keys."""
    from host.tiny_models import ARCHITECTURES

    hosts: dict[str, set[str]] = {}
    spellings: dict[str, set[str]] = {}
    for tiny in ARCHITECTURES.values():
        hosts.setdefault(tiny.family, set()).update(tiny.hosts)
        spellings.setdefault(tiny.dialect, set()).add(tiny.family)
    by_hosts: dict[tuple[str, ...], list[str]] = {}
    for family, versions in hosts.items():
        by_hosts.setdefault(tuple(sorted(versions)), []).append(family)
    lines = ["| ComfyUI | architectures, by ComfyUI's names |", "|-|-|"]
    lines += [f"| {_listed(versions)} | {_listed(names)} |" for versions, names in sorted(by_hosts.items())]
    lines += ["", "| tensor names | tested with |", "|-|-|"]
    lines += [
        f"| {text} | {'all of these' if spelling == 'native' else _listed(spellings[spelling])} |"
        for spelling, text in SPELLINGS.items()
        if spelling in spellings
    ]
    return lines


def text_encoders() -> list[str]:
    """The families by the versions that they are compared on, with llama.cpp's name for what it converts."""
    from host.tiny_encoder import ENCODERS

    hosts: dict[str, set[str]] = {}
    for tiny in ENCODERS.values():
        name = tiny.model.partition(":")[2] + (f" ({tiny.arch})" if tiny.arch else "")
        hosts.setdefault(name, set()).update(tiny.hosts)
    by_hosts: dict[tuple[str, ...], list[str]] = {}
    for name, versions in hosts.items():
        by_hosts.setdefault(tuple(sorted(versions)), []).append(name)
    lines = ["| ComfyUI | text encoders, by ComfyUI's names (and llama.cpp's) |", "|-|-|"]
    return lines + [f"| {_listed(versions)} | {_listed(names)} |" for versions, names in sorted(by_hosts.items())]


def matrix() -> str:
    """The text between the markers, markers included."""
    parts = (
        ["**Quant types.** One file may mix them."],
        quant_types(),
        [
            "**Architectures.** ComfyUI itself detects the model, so others may load too. For these a test compares,",
            "on the CPU, the latent from a GGUF file with the latent from the same weights in a safetensors file that",
            "ComfyUI loads: in float32 they are equal bit for bit.",
        ],
        architectures(),
        [
            "**Text encoders.** Compared in the same way, by what they make of a text. Others that ComfyUI detects may",
            "load from files with the original tensor names.",
        ],
        text_encoders(),
    )
    return "\n\n".join([BEGIN, *("\n".join(part) for part in parts), END])


def updated(readme: str) -> str:
    """`readme` with the current matrix between its markers."""
    before, found, rest = readme.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"README.md lacks the line {END if found else BEGIN!r}")
    return before + matrix() + after


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names, key=str.lower))


def main() -> None:
    # As in the tests: the checkout is the package `pack`, and tests/ is on the path instead of this folder.
    pack = types.ModuleType("pack")
    pack.__path__ = [str(ROOT)]
    sys.modules["pack"] = pack
    sys.path[0] = str(ROOT / "tests")
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
