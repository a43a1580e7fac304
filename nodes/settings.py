"""What the user chose under "Sluice" in ComfyUI's settings dialog (web/js/settings.js), as the server needs it.

The host's frontend keeps the dialog's values in `comfy.settings.json` of the user's folder, which the host writes
whenever one changes. It is read here when it has changed, so a setting counts from the next prompt on, also for
prompts from scripts and without any browser. A value that makes no sense, written by hand for instance, is the default.

A server with several users has such a file for each, and no prompt says whose it is: there the defaults hold.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args

from ..offload.costs import RANGES, SOURCES, SwapRequest

log = logging.getLogger("sluice.settings")

PACK = logging.getLogger("sluice")
FILE, USER = "comfy.settings.json", "default"
PREFIX = "sluice."  # of the names in the file
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}


@dataclass(frozen=True)
class Settings:
    """The defaults are what counts without a file."""

    weight_source: str = SwapRequest().weight_source  # of models without a Block Swap Config, as the next
    reserve_gb: float = SwapRequest().min_free_vram_gb
    unified_memory: str = "off"  # as `offload.unified.MODES`
    log_level: str = "info"

    def swap_request(self) -> SwapRequest:
        """What a model gets that has no Block Swap Config."""
        return SwapRequest(weight_source=self.weight_source, min_free_vram_gb=self.reserve_gb)


def _is_reserve(value: Any) -> bool:
    low, high, _ = RANGES["min_free_vram_gb"]
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


SENSIBLE: dict[str, Callable[[Any], bool]] = {
    "weight_source": lambda value: value in SOURCES,
    "reserve_gb": _is_reserve,
    "unified_memory": lambda value: value in ("off", "auto", "force"),
    "log_level": lambda value: isinstance(value, str) and value in LEVELS,
}


def current() -> Settings:
    """The settings as they are now; the defaults on a server of several users, for no prompt says whose it is."""
    if args.multi_user:
        return Settings()
    path = Path(folder_paths.get_user_directory(), USER, FILE)
    try:
        status = path.stat()
    except OSError:
        return Settings()
    return _read(path, status.st_mtime_ns, status.st_size)


def _set_log_level(name: str) -> None:
    level = LEVELS[name]
    usual = level == logging.INFO  # what the host has set up for everybody
    PACK.setLevel(logging.NOTSET if usual else level)
    consoles = [handler for handler in logging.root.handlers if type(handler) is logging.StreamHandler]
    hidden = level < logging.INFO and all(handler.level > level for handler in consoles)
    if hidden and not any(isinstance(handler, _Details) for handler in PACK.handlers):
        PACK.addHandler(_Details())
    for handler in PACK.handlers[:]:
        if isinstance(handler, _Details) and not hidden:
            PACK.removeHandler(handler)


class _Details(logging.StreamHandler):
    """Shows on the console what the host's own console is set to leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(lambda record: record.levelno < logging.INFO)


def follow(server: Any) -> None:
    """Do as the settings say, now and whenever a prompt is queued on this `PromptServer`."""

    def queued(prompt: Any) -> Any:
        from ..offload import unified  # late: ComfyUI starts the faster without

        chosen = current()
        _set_log_level(chosen.log_level)
        unified.set_mode(chosen.unified_memory)
        return prompt

    _set_log_level(current().log_level)
    server.add_on_prompt_handler(queued)


@lru_cache(1)
def _read(path: Path, changed: int, size: int) -> Settings:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s), so the default settings count; correct it or delete it", path.name, error)
        return Settings()
    chosen = {}
    for name, is_sensible in SENSIBLE.items():
        value = stored.get(PREFIX + name) if isinstance(stored, dict) else None
        if value is None:
            continue
        if is_sensible(value):
            chosen[name] = value
        else:
            log.warning(
                "the setting %s%s is %.80r, which is none of its values: the default counts", PREFIX, name, value
            )
    return Settings(**chosen)
