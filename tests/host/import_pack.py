"""Run inside a host: import a pack as ComfyUI's own loader does and print, as JSON, everything that it did.

    import_pack.py [FOLDER]      ours when no folder is named

The host is imported first, as it is when it loads custom nodes, and told that there is no GPU.
"""

# ruff: noqa: E402, F401  (the GPU is hidden before the host looks for one; the host is imported to be there)
from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
import threading
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import comfy.cli_args

comfy.cli_args.args.cpu = True

import comfy.sd
import comfy_api.latest
import folder_paths
import torch

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else sys.modules["pack"].__path__[0])
MODULE_FILES = {".py", ".pyc", ".so", ".pyd"}
# Unwanted even inside a `try`. What the host has loaded already costs nothing and is not seen.
WATCHED = {"gguf", "triton", "transformers"}
NETWORK = {"socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
EVENTS = NETWORK | {"subprocess.Popen", "os.system", "os.mkdir", "os.remove"}

opened: list[str] = []
events: list[str] = []
asked: list[str] = []
watching = False


def audit(event: str, args: tuple) -> None:
    if not watching:
        return
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        path = Path(os.fsdecode(args[0]))
        # Python writes a compiled module under its name and a number, then renames it.
        if path.suffix not in MODULE_FILES and path.parent.name != "__pycache__":
            opened.append(str(path))
    elif event == "import" and args[0].split(".")[0] in WATCHED:
        asked.append(args[0])
    elif event in EVENTS and not (event == "os.mkdir" and str(args[0]).endswith("__pycache__")):
        events.append(event)


def load() -> tuple[object, str]:
    """As the host's nodes.py: under the folder's path, with the dots replaced."""
    name = str(ROOT).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module, name


before, threads = set(sys.modules), threading.active_count()
sys.addaudithook(audit)
watching = True
start = time.perf_counter()
module, name = load()
extension = asyncio.run(module.comfy_entrypoint())  # type: ignore[attr-defined]
nodes = asyncio.run(extension.get_node_list())
seconds = time.perf_counter() - start
watching = False

new = {module for module in sys.modules if module not in before}
outside = {m.split(".")[0] for m in new if not m.startswith(name)} - set(sys.stdlib_module_names)
report = {
    "nodes": [node.__name__ for node in nodes],
    "seconds": round(seconds, 3),
    "modules_of_ours": sorted(m.removeprefix(name).lstrip(".") for m in new if m.startswith(name)),
    "modules_from_outside": sorted(outside),
    "asked_for": asked,
    "opened": opened,
    "events": events,
    "new_threads": threading.active_count() - threads,
    "cuda": torch.cuda.is_initialized(),
}
print(json.dumps(report))
