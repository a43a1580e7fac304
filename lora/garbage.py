"""No search for garbage while thousands of objects are made that all stay.

Python looks through everything that a process has when enough objects have been made since it last did: a quarter of a
second in a host with its models. Eight LoRAs are enough for that, and none of what they are made of is garbage.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def put_off() -> Iterator[None]:
    """Around work that takes no more than a moment, or as its decorator."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
