"""`GET /sluice/report`, and the same object as the websocket event `sluice.memory` while prompts run.

Both are made in the server's thread, not in the one that computes, and the event at most once in SECONDS_BETWEEN, with
the last state always told, and only if a browser listens. `GET /sluice/file?folder=...&name=...` tells what a file is.

A drive that does not answer holds up neither: what is asked of files is asked by other threads (`answers`).
"""

from __future__ import annotations

import logging
import time
from typing import Any

from aiohttp import web
from comfy_execution.progress import add_progress_handler

from . import files
from .answers import Errands, NoAnswerError
from .follow import Follower
from .reporter import Reporter

log = logging.getLogger("sluice.report")

ROUTE, FILE_ROUTE = "/sluice/report", "/sluice/file"
EVENT = "sluice.memory"
SECONDS_BETWEEN = 0.5
HEADERS_AT_ONCE, HEADER_SECONDS = 4, 10.0  # a slow disk takes a moment for a large header


class Served:
    """A reporter on a `PromptServer`, whose prompts it follows; the server keeps it."""

    def __init__(self, server: Any, reporter: Reporter) -> None:
        self._server, self._reporter = server, reporter
        self._follower = Follower(reporter.timeline, self._changed)
        self._errands = Errands(HEADERS_AT_ONCE, HEADER_SECONDS)
        self._due = False
        self._sent = float("-inf")
        reporter.progress = self._progress
        server.routes.get(ROUTE)(self._answer)
        server.routes.get(FILE_ROUTE)(self._describe_file)
        add_progress_handler(self._follower)

    async def _answer(self, request: web.Request) -> web.Response:
        return web.json_response(self._reporter.report())

    async def _describe_file(self, request: web.Request) -> web.Response:
        asked = (request.query.get("folder", ""), request.query.get("name", ""))
        try:
            return web.json_response(await self._errands.run(files.describe, *asked))
        except NoAnswerError:
            error, status = f"the file's drive has not answered for {HEADER_SECONDS:.0f} s; see if it is there", 504
        except files.NoSuchFileError as missing:
            error, status = str(missing), 404
        except FileNotFoundError:  # listed, and gone since
            error, status = "the file is no longer there; press R in ComfyUI to refresh the lists", 404
        except OSError as failed:  # not all of it: it names folders
            error, status = f"the file cannot be read: {failed.strerror}", 422
        except ValueError as unsound:
            error, status = str(unsound), 422
        return web.json_response({"error": error}, status=status)

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
