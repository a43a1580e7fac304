"""`GET /sluice/report`, and the same object as the websocket event `sluice.memory` while prompts run.

Both are made in the server's thread, not in the one that computes, and the event at most once in SECONDS_BETWEEN, with
the last state always told, and only if a browser listens. `GET /sluice/file?folder=...&name=...` tells what a file is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from aiohttp import web
from comfy_execution.progress import add_progress_handler

from . import files
from .follow import Follower
from .reporter import Reporter

log = logging.getLogger("sluice.report")

ROUTE, FILE_ROUTE = "/sluice/report", "/sluice/file"
EVENT = "sluice.memory"
SECONDS_BETWEEN = 0.5


class Served:
    """A reporter on a `PromptServer`, whose prompts it follows; the server keeps it."""

    def __init__(self, server: Any, reporter: Reporter) -> None:
        self._server, self._reporter = server, reporter
        self._follower = Follower(reporter.timeline, self._changed)
        self._due = False
        self._sent = float("-inf")
        reporter.progress = self._progress
        server.routes.get(ROUTE)(self._answer)
        server.routes.get(FILE_ROUTE)(_describe_file)
        add_progress_handler(self._follower)

    async def _answer(self, request: web.Request) -> web.Response:
        return web.json_response(self._reporter.report())

    def _progress(self) -> dict | None:
        running, _ = self._server.prompt_queue.get_current_queue_volatile()
        return self._follower.progress({item[1] for item in running})

    def _changed(self) -> None:
        """Called by the thread that computes, at every step: it leaves the work to the server's."""
        if not self._due and self._server.sockets:
            self._due = True
            self._server.loop.call_soon_threadsafe(self._plan_event)

    def _plan_event(self) -> None:
        wait = self._sent + SECONDS_BETWEEN - time.monotonic()
        self._server.loop.call_later(max(wait, 0), self._send)

    def _send(self) -> None:
        self._due, self._sent = False, time.monotonic()
        try:
            self._server.send_sync(EVENT, self._reporter.report())
        except Exception:  # a prompt must not end because of a report
            log.exception("the event %s could not be made", EVENT)


async def _describe_file(request: web.Request) -> web.Response:
    asked = (request.query.get("folder", ""), request.query.get("name", ""))
    try:
        # A header on a slow disk must not hold up the server.
        return web.json_response(await asyncio.get_running_loop().run_in_executor(None, files.describe, *asked))
    except files.NoSuchFileError as error:
        return web.json_response({"error": str(error)}, status=404)
    except FileNotFoundError:  # listed, and gone since
        gone = "the file is no longer there; press R in ComfyUI to refresh the lists"
        return web.json_response({"error": gone}, status=404)
    except OSError as error:  # not all of it: it names folders
        return web.json_response({"error": f"the file cannot be read: {error.strerror}"}, status=422)
    except ValueError as error:
        return web.json_response({"error": str(error)}, status=422)
