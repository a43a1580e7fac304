"""A real browser on a running ComfyUI: what the tests of the live view and the pictures in docs/ are made with.

The browser is the system's Chromium (or Chrome), driven by Playwright, whose own browsers are not needed. It reaches
the server and nothing else.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from .server import Server
from .steps import SetupError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
USUAL_PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
    "C:/Program Files (x86)/Microsoft/Edge/Application/msedge.exe",
)
ARGUMENTS = (
    "--no-sandbox",  # which containers do not have
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
# A user who has seen the tour, and who gets no news.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.41.21",
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.Workflow.Persist": False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "Comfy.RightSidePanel.IsOpen": False,
}
# What the frontend itself says in the console, without any pack, on a server that is new and has no network.
THE_FRONTENDS = (
    *("net::ERR_", "Failed to load resource", "comfy.org", "graph accessed before initialization"),
    "huggingface.co",  # where it looks for the models of its default workflow
)
OURS = "ComfyUI-Sluice"


def find() -> str:
    """The browser's path. The variable SLUICE_BROWSER names another.

    Raises:
        SetupError: there is none; the message says how to get one.
    """
    named = os.environ.get("SLUICE_BROWSER")
    found = named or next(filter(None, map(shutil.which, NAMES)), None)
    found = found or next((place for place in USUAL_PLACES if Path(place).exists()), None)
    if found is None or (named and shutil.which(named) is None):
        how = "apt-get install chromium" if sys.platform == "linux" else "install Chrome or Chromium"
        raise SetupError(f"there is no browser{f' at {named}' if named else ''}: {how}, or name one in SLUICE_BROWSER")
    return found


@contextmanager
def browser() -> Iterator[Browser]:
    """The browser, without a window."""
    from playwright.sync_api import sync_playwright

    path = find()
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        try:
            yield running
        finally:
            running.close()


@dataclass
class Tab:
    """ComfyUI in a page of its own; `errors` are what the console and uncaught exceptions said."""

    page: Page
    errors: list[str] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        running: Browser,
        server: Server,
        *,
        theme: Literal["dark", "light"] = "dark",
        width: int = 1400,
        height: int = 900,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> Tab:
        """A new user's view of the server; `settings` are more of the frontend's own."""
        server.post("/settings", {**SETTINGS, "Comfy.ColorPalette": theme, **settings})
        page = running.new_page(
            viewport={"width": width, "height": height}, color_scheme=theme, reduced_motion="reduce"
        )
        tab = cls(page)
        page.on("pageerror", lambda error: tab.errors.append(str(error)))
        page.on("console", tab._listen)
        page.goto(server.url)
        page.wait_for_function("window.app?.vueAppReady", timeout=60_000)
        page.wait_for_selector("#graph-canvas", timeout=60_000)
        page.wait_for_selector(".p-blockui-mask-document", state="detached", timeout=60_000)  # lies over it at first
        return tab

    def _listen(self, said: ConsoleMessage) -> None:
        if said.type == "error":
            self.errors.append(f"{said.text} ({said.location.get('url')})")

    def own_errors(self) -> list[str]:
        """Those that a ComfyUI without the pack does not have."""
        return [said for said in self.errors if OURS in said or not any(part in said for part in THE_FRONTENDS)]

    def drop(self, file: Path) -> None:
        """Drop a workflow's file on the canvas, as a user's mouse would, and wait until its nodes are there."""
        content = base64.b64encode(file.read_bytes()).decode()
        self.page.evaluate(
            """async ([name, content]) => {
                const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
                const transfer = new DataTransfer();
                transfer.items.add(new File([bytes], name, { type: "application/json" }));
                const canvas = document.querySelector("#graph-canvas");
                const box = canvas.getBoundingClientRect();
                const at = { clientX: box.x + box.width / 2, clientY: box.y + box.height / 2 };
                for (const kind of ["dragenter", "dragover", "drop"]) {
                    const options = { bubbles: true, cancelable: true, dataTransfer: transfer, ...at };
                    canvas.dispatchEvent(new DragEvent(kind, options));
                }
            }""",
            [file.name, content],
        )
        types = sorted(node["type"] for node in json.loads(file.read_text(encoding="utf-8"))["nodes"])
        self.page.wait_for_function(
            "(types) => String(app.graph._nodes.map((node) => node.type).sort()) === String(types)", arg=types
        )

    def run(self) -> None:
        """Press the button that queues the workflow."""
        self.page.get_by_role("button", name=re.compile("^Run")).first.click()

    def run_to_the_end(self, server: Server, seconds: float = 120) -> dict[str, Any]:
        """`run`, and wait; what the server's history, which is cleared before, says of it."""
        server.post("/history", {"clear": True})
        self.run()
        deadline = time.monotonic() + seconds
        while not (history := server.get("/history")):
            assert time.monotonic() < deadline, "nothing was run"
            time.sleep(0.1)
        (entry,) = history.values()
        return entry

    def close(self) -> None:
        self.page.close()
