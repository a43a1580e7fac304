"""Run a script inside a ComfyUI host: `python launch.py [--pack] COMFYUI SCRIPT [ARGS]`.

The host's folder goes first on the path, as if the script lay there.  With `--pack` the checkout is importable as
the package `pack`, without its `__init__.py` (which registers nodes), and tests/ comes last on the path.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import runpy
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class _TorchvisionOperators(importlib.abc.MetaPathFinder):
    """Define torchvision's operators where its library does not load, just before torchvision is first imported.

    The package index has only CUDA builds of torchvision for Linux.  Beside a torch without CUDA their library
    fails to load, and torchvision's Python code then refuses to import because two operators are unknown to torch.
    Nothing here ever calls them, so declaring them is enough.
    """

    operators = ("nms", "qnms")
    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    library: object = None  # the declarations live as long as this object

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        spec = importlib.machinery.PathFinder.find_spec(name)
        if torch.version.cuda or spec is None or spec.origin is None or self._loads(Path(spec.origin).parent):
            return
        library = torch.library.Library("torchvision", "DEF")
        for operator in self.operators:
            library.define(operator + self.schema)
        type(self).library = library

    @staticmethod
    def _loads(folder: Path) -> bool:
        import torch

        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            if (extension := folder / f"_C{suffix}").exists():
                try:
                    torch.ops.load_library(str(extension))
                except OSError:
                    return False
                return True
        return False


def main(argv: list[str]) -> None:
    with_pack = argv[0] == "--pack"
    comfyui, script, *args = argv[with_pack:]
    # This file's own folder must go: its server.py would hide ComfyUI's.
    sys.path[0] = comfyui
    if with_pack:
        pack = types.ModuleType("pack")
        pack.__path__ = [str(ROOT)]
        sys.modules["pack"] = pack
        sys.path += [str(ROOT / "tests")]
    sys.meta_path.insert(0, _TorchvisionOperators())
    sys.argv = [script, *args]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
