"""Let go of a model's file while nothing needs it, and open it again.

When all weights lie on the device, or as copies in locked memory, the mapping of their file serves nobody: it keeps
pages in the process, and on Windows it keeps anybody from replacing the file. So each home is put away. What stands in
for it is the copy, or else has its type and its shape and no memory; and the home is made again over a new mapping
before a weight has to go there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Protocol

import torch

from .files import StoredFile
from .slots import Located, Slot

log = logging.getLogger("sluice.offload")


class ModelFile(Protocol):
    """The file that a model was loaded from, in one part or several."""

    def close(self) -> bool:
        """Whether nothing of it is mapped any more."""

    def reopen(self) -> Callable[[StoredFile, int], torch.Tensor]:
        """Open it again; what this returns gives the bytes (uint8) of the tensor at an offset of a part.

        Raises:
            Exception: it is not the file that was loaded; the text is for the user.
        """


class Shelf:
    """The homes of one network that are put away. Only for homes that nobody else holds."""

    def __init__(self, file: ModelFile) -> None:
        self._file = file
        self._away: list[tuple[Slot, StoredFile, int]] = []

    @property
    def holds_any(self) -> bool:
        return bool(self._away)

    def put_away(
        self, slots: Iterable[Slot], located: Located, copies: Mapping[Slot, torch.Tensor] = MappingProxyType({})
    ) -> bool:
        """Put away what lies in the file, and close it; whether it is closed. The weights must be shown elsewhere, or
        be among `copies`, as bytes that nobody changes."""
        self.empty((*slots, *copies), located, copies)
        return self.close()

    def empty(
        self, slots: Iterable[Slot], located: Located, copies: Mapping[Slot, torch.Tensor] = MappingProxyType({})
    ) -> None:
        """Put away what lies in the file, which stays open: that of several networks is found as long as it is."""
        if not self._away:
            found = ((slot, slot.location(located)) for slot in slots)
            self._away = [(slot, *place) for slot, place in found if place is not None]
            for slot, *_ in self._away:
                copy = copies.get(slot)
                nothing = torch.empty(slot.nbytes, dtype=torch.uint8, device="meta")
                slot.rehome(slot.over(nothing if copy is None else copy))

    def close(self) -> bool:
        """Close the file; whether nothing of it is mapped any more."""
        closed = self._file.close()
        if not closed:
            log.debug("the model's file stays mapped: something still looks at a weight")
        return closed

    def bring_back(self) -> None:
        """Make the homes again.

        Raises:
            Exception: as `ModelFile.reopen` does; the homes stay away then.
        """
        if not self._away:
            return
        data = self._file.reopen()
        while self._away:
            slot, stored, offset = self._away.pop()
            slot.rehome(slot.over(data(stored, offset)))
