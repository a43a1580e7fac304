"""Run inside a host: load the pack with the host's own loader, with no network, and print as JSON what was said.

A server's port is bound later and by the host; here every attempt to reach the network is an error that is told.
"""

# ruff: noqa: E402  (the GPU is hidden before the host looks for one)
from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import comfy.cli_args

comfy.cli_args.args.cpu = True

from comfy_config import config_parser

import nodes

# Of the host; a checker that starts in the checkout finds our folder of that name.
host_nodes: Any = nodes
PACK = Path(sys.argv[1] if len(sys.argv) > 1 else sys.modules["pack"].__path__[0])
NETWORK = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")

said: list[str] = []
reached: list[str] = []


class Listener(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        said.append(f"{record.levelname}: {record.getMessage()}")


def refuse(event: str, args: tuple[Any, ...]) -> None:
    if event in NETWORK:
        reached.append(event)
        raise OSError("the network is switched off in this test")


sys.addaudithook(refuse)
logging.getLogger().addHandler(Listener(logging.WARNING))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")

    async def load() -> bool:
        return await host_nodes.load_custom_node(str(PACK), module_parent="custom_nodes")

    # The loop's own pair of sockets is made before anything is refused on some systems, so it is made here.
    loop = asyncio.new_event_loop()
    loaded = loop.run_until_complete(load())
    loop.close()

config = config_parser.extract_node_configuration(str(PACK))
report = {
    "loaded": loaded,
    "said": said,
    "warnings": [f"{warning.category.__name__}: {warning.message}" for warning in caught],
    "network": reached,
    "nodes": sorted(name for name in host_nodes.NODE_CLASS_MAPPINGS if name.startswith("Sluice")),
    "web": [str(Path(folder).resolve()) for folder in host_nodes.EXTENSION_WEB_DIRS.values()],
    "config": config.model_dump(),
}
print(json.dumps(report))
