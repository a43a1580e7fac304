"""The one report of the process, for the node, the route and the event."""

from __future__ import annotations

import sys
from collections.abc import Callable

from .. import settings
from . import memory
from .timeline import Timeline


class Reporter:
    """Without a server it knows of no prompts, and of memory over time only what a node marks."""

    def __init__(self) -> None:
        self.timeline = Timeline(memory.sample)
        self.progress: Callable[[], dict | None] = lambda: None  # how far the prompt is

    def report(self) -> dict:
        """The report as it is now; from any thread."""
        from . import gather  # late: it needs all of the pack, and ComfyUI starts the faster without

        return gather.report(self.progress(), self.timeline.data())


REPORTER = Reporter()


def serve() -> None:
    """Serve the report if a server runs in this process; a script that uses the pack has none."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None:
        from .routes import Served  # the server has loaded what this imports

        Served(server, REPORTER)
        settings.follow(server)
