"""What may import what, and the other rules of the pack's structure, checked on its syntax trees.

    nodes -> lora | offload | loaders -> loaders/quant -> loaders/gguf

Arrows point down only and siblings do not know each other, so that the file format and the dequantisers can be read,
tested and reused without ComfyUI, and a host that changes is mended in few files. `violations` takes any folder with
the pack's shape, so that the tests can show each rule to bite.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

MAX_LINES = 400

KERNELS = "loaders/quant/kernels"

# Where offloading meets the host's patchers.
ATTACHING = (
    *("offload/attach.py", "offload/attach_adapters.py", "offload/attach_arrival.py", "offload/attach_stages.py"),
    *("offload/attach_unified.py", "offload/location.py", "offload/streamed_patcher.py", "offload/seats.py"),
    "offload/release.py",
)

# About bytes, files and modules alone, so that anybody may use them.
LEAVES = ("loaders/sizes", "loaders/read_ahead", "loaders/named_tensors")

# Layer -> the layers that its files may import, itself included. The longest matching folder is a file's layer.
LAYERS = {
    "": {"nodes"},
    "nodes": {
        *("nodes", "lora", "offload", *ATTACHING),
        *("loaders", *LEAVES, "loaders/safetensors_header", "loaders/quant", "loaders/gguf"),
    },
    "lora": {"lora", *LEAVES, "loaders/safetensors_header", "loaders/quant", "loaders/gguf"},
    "offload": {"offload", *LEAVES},  # sees bytes and modules, never GGUF
    **{path: {"offload", *ATTACHING, "loaders", *LEAVES, "loaders/quant", "loaders/gguf"} for path in ATTACHING},
    "loaders": {"loaders", *LEAVES, "loaders/safetensors_header", "loaders/quant", "loaders/gguf"},
    "loaders/safetensors_header": set(),
    **{path: set() for path in LEAVES},
    "loaders/quant": {"loaders/quant", "loaders/gguf"},
    "loaders/gguf": {"loaders/gguf", "loaders/sizes"},
}

# Module from outside -> the files and folders that may import it. Anything that is neither here nor in the standard
# library is a dependency that nobody decided on.
HOST_FILES = (
    *("nodes", "loaders/ops.py", "loaders/diffusion.py", "loaders/text_encoder.py", "loaders/compat.py"),
    *(
        "loaders/text_layers.py",
        "loaders/scaled_fp8.py",
        "loaders/patcher.py",
        "loaders/patch_at_use.py",
        "loaders/progress.py",
        "lora/apply.py",
        "lora/fit.py",
    ),
    *ATTACHING,
)
OUTSIDE = {
    "numpy": ("nodes", "lora", "offload", "loaders"),
    "torch": ("nodes", "lora", "offload", "loaders"),
    "gguf": ("nodes", "lora", "loaders"),
    "psutil": ("nodes", "offload", "loaders"),
    "triton": (KERNELS,),
    "comfy_kitchen": ("loaders/quant/layout.py", "loaders/cold_weights.py", "offload/slots.py", *HOST_FILES),
    "comfy": HOST_FILES,
    "folder_paths": HOST_FILES,
    "comfy_api": ("__init__.py", "nodes"),
    "comfy_execution": ("nodes", "loaders/compat.py"),
    # The host's own requirements, for the report's route and its plot.
    "aiohttp": ("nodes/report",),
    "PIL": ("nodes/report",),
}
ABOVE_THE_FORMAT = ("torch", "gguf", "psutil")  # loaders/gguf does without these; they are allowed in its parents

# What ComfyUI changes without notice: one module knows these names.
HOST_INTERNALS = {
    *("_v", "_v_weight", "_v_bias", "_v_signature", "_vbar_get", "_prefetch", "_pins", "_pin_state"),
    *("_comfy_tensor_file_slice", "_comfy_tensor_mmap_refs", "_comfy_hostbuf", "TensorFileSlice"),
    *("cast_bias_weight", "uncast_bias_weight", "pick_operations", "run_every_op"),
}
INTERNALS_FILE = "loaders/compat.py"

NAMELESS = {"utils.py", "helpers.py", "common.py", "misc.py"}


@dataclass(frozen=True)
class Source:
    """One parsed file of the pack."""

    root: Path
    path: str  # relative to the pack, with slashes

    @cached_property
    def text(self) -> str:
        return (self.root / self.path).read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def layer(self) -> str:
        return layer_of(self.path)

    def nodes(self, kind: type) -> Iterator:
        return (node for node in ast.walk(self.tree) if isinstance(node, kind))

    def imports(self) -> Iterator[tuple[int, str, bool]]:
        """Line, module and whether it is of the pack; a pack module as a path below its root."""
        for node in self.nodes(ast.Import):
            yield from ((node.lineno, alias.name, False) for alias in node.names)
        for node in self.nodes(ast.ImportFrom):
            if not node.level:
                yield node.lineno, node.module, False
                continue
            folder = self.path.split("/")[: -node.level]
            base = "/".join([*folder, *(node.module.split(".") if node.module else ())])
            for alias in node.names:
                inner = f"{base}/{alias.name}".lstrip("/")
                yield node.lineno, inner if self._is_module(inner) else base, True

    def _is_module(self, path: str) -> bool:
        return (self.root / f"{path}.py").exists() or (self.root / path).is_dir()


def layer_of(path: str) -> str:
    inside = (name for name in LAYERS if name and (path == name or path.startswith(f"{name}/")))
    return max(inside, key=len, default="")


def sources(root: Path) -> list[Source]:
    """Every Python file that ComfyUI would load: the root's `__init__.py` and the folders of the layers."""
    folders = {name.split("/")[0] for name in LAYERS if name}
    files = [root / "__init__.py", *(file for folder in folders for file in (root / folder).rglob("*.py"))]
    return [Source(root, file.relative_to(root).as_posix()) for file in sorted(files) if file.exists()]


# --- the rules: each yields (line, what is wrong)

Found = Iterator[tuple[int, str]]


def layers(source: Source) -> Found:
    for line, module, ours in source.imports():
        if ours and layer_of(module) == "":
            yield line, f"imports {module or 'from the root'}, which is no part of a layer"
        elif ours and layer_of(module) not in LAYERS[source.layer]:
            yield line, f"{source.layer or 'the root'} imports {module}: arrows point down only"


def outside(source: Source) -> Found:
    own = {name.split("/")[0] for name in LAYERS if name} | {"pack", "tools", "tests"}
    for line, module, ours in source.imports():
        top = module.split(".")[0]
        if ours or top in sys.stdlib_module_names:
            continue
        if top in own:
            yield line, f"imports {module} by an absolute name; inside the pack imports are relative"
        elif top not in OUTSIDE:
            yield line, f"imports {module}, which is not among the pack's dependencies"
        elif not _is_in(source.path, OUTSIDE[top]):
            yield line, f"imports {module}, which only {', '.join(OUTSIDE[top])} may"
        elif source.layer == "loaders/gguf" and top in ABOVE_THE_FORMAT:
            yield line, f"imports {module}; the file format needs the standard library and numpy only"


def host_internals(source: Source) -> Found:
    if source.path == INTERNALS_FILE:
        return
    for node in ast.walk(source.tree):
        match node:
            case ast.Attribute(attr=name, value=owner) if name in HOST_INTERNALS and ast.unparse(owner) != "compat":
                yield node.lineno, f"uses the host's {name}; {INTERNALS_FILE} is where it may be known"
            case ast.Constant(value=str(name)) if name in HOST_INTERNALS:
                yield node.lineno, f"names the host's {name}; {INTERNALS_FILE} is where it may be known"
            case ast.ImportFrom(level=0, module=str(module)) if module.split(".")[0] == "comfy":
                for alias in node.names:
                    if alias.name in HOST_INTERNALS or alias.name.startswith("_"):
                        yield node.lineno, f"imports the host's {alias.name}; that belongs into {INTERNALS_FILE}"


def says_nothing(source: Source) -> Found:
    for node in source.nodes(ast.Call):
        name = ast.unparse(node.func)
        if name == "print":
            yield node.lineno, "prints; use the module's logger"
        elif name.endswith("basicConfig"):
            yield node.lineno, "configures logging, which belongs to the host"
        elif name.endswith("getLogger"):
            given = node.args[0] if node.args else None
            logger = given.value if isinstance(given, ast.Constant) else None
            if not isinstance(logger, str) or logger.split(".")[0] != "sluice":
                yield node.lineno, "makes a logger whose name is not 'sluice' or 'sluice.something'"


def size_and_name(source: Source) -> Found:
    lines = source.text.count("\n")
    if lines > MAX_LINES:
        yield lines, f"has {lines} lines, over {MAX_LINES}"
    if Path(source.path).name in NAMELESS:
        yield 1, "has a name that says nothing"
    if source.path.endswith("/__init__.py") and source.tree.body:
        yield 1, "is a package's __init__.py that is not empty"


RULES: tuple[Callable[[Source], Found], ...] = (layers, outside, host_internals, says_nothing, size_and_name)


def violations(root: Path) -> list[str]:
    """Every broken rule as `file:line: what`."""
    return [
        f"{source.path}:{line}: {what}" for source in sources(root) for rule in RULES for line, what in rule(source)
    ]


def _is_in(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)
