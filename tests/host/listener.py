"""What a server tells a client of it while it works, over its websocket."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import aiohttp
from pack.tools.server import Server, Workflow

TEXT = 3  # of the kinds of binary messages


class Listener:
    """A client that queues workflows and keeps the events of them: (type, data) in the order in which they came."""

    def __init__(self, server: Server, name: str = "listener") -> None:
        self._server, self._name = server, name
        self.events: list[tuple[str, Any]] = []
        self._connected, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._listen()), daemon=True)

    def __enter__(self) -> Listener:
        self._thread.start()
        assert self._connected.wait(30), "the server's websocket does not answer"
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join(30)

    async def _listen(self) -> None:
        url = f"{self._server.url.replace('http', 'ws')}/ws?clientId={self._name}"
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
            self._connected.set()
            while not self._ended.is_set():
                try:
                    message = await socket.receive(timeout=0.05)
                except asyncio.TimeoutError:
                    continue
                if message.type is aiohttp.WSMsgType.TEXT:
                    event = json.loads(message.data)
                    self.events.append((event["type"], event["data"]))
                elif message.type is aiohttp.WSMsgType.BINARY and struct.unpack(">I", message.data[:4])[0] == TEXT:
                    length = struct.unpack(">I", message.data[4:8])[0]
                    node, text = message.data[8 : 8 + length].decode(), message.data[8 + length :].decode()
                    self.events.append(("progress_text", {"node": node, "text": text}))

    def queue(self, workflow: Workflow) -> str:
        return self._server.post("/prompt", {"prompt": workflow, "client_id": self._name})["prompt_id"]

    def wait_for(self, wanted: Callable[[str, Any], bool], timeout: float = 120) -> tuple[str, Any]:
        """The first event that is `wanted`, which may have come already."""
        deadline, seen = time.monotonic() + timeout, 0
        while time.monotonic() < deadline:
            for event in self.events[seen:]:
                seen += 1
                if wanted(*event):
                    return event
            time.sleep(0.01)
        raise AssertionError(f"no such event within {timeout:.0f} s\n{self._server.log_tail()}")

    def wait_for_end(self, prompt_id: str, timeout: float = 300) -> str:
        """How a prompt ended: `execution_success`, `execution_error` or `execution_interrupted`."""
        ends = ("execution_success", "execution_error", "execution_interrupted")
        return self.wait_for(lambda kind, data: kind in ends and data["prompt_id"] == prompt_id, timeout)[0]

    def progress(self, prompt_id: str, node: str) -> list[tuple[int, int]]:
        """What the bar of a node was told: (value, max)."""
        return [
            (data["value"], data["max"])
            for kind, data in self.events
            if kind == "progress" and data["prompt_id"] == prompt_id and data["node"] == node
        ]

    def texts(self, node: str) -> list[str]:
        return [data["text"] for kind, data in self.events if kind == "progress_text" and data["node"] == node]
