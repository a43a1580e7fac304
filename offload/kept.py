"""Pages of a model's file that stay locked while the model is out of VRAM for a stage: its way back is one copy.

To lock pages takes longer than to copy them over a fast link, and so does the unlocking. A model that an Offload Mode
node moves out and in at every picture would pay both each time, so its network has `KeptPages`: what is locked for
one arrival, or for streaming, is locked for the next, too. They are pages of the system's own cache of the file, which
can be used by all programs, but not dropped. So they are given back

    when the model leaves in any other way    unloaded by the host, Release Memory, its network gone
    after a picture in which nobody left      there is room for all, so no way back is to come
    when RAM gets short                       looked at whenever a stage begins
    when something else may not be locked     because these are

and never are more than the host allows to be locked, or than a share of the RAM that is free.

The file is cut into cells of one length from its beginning, whoever asks for which weights, because the driver locks
no page twice and no copy may read from two locks.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import psutil
import torch

from .device import Device
from .files import StoredFile, Weight, WeightFile
from .living import Living
from .page_cache import SHARE_OF_FREE_RAM as SHARE_LOCKED
from .page_cache import RegisteredFile, locked_bytes

CELL_BYTES = 128 << 20
SHARE_OF_FREE_RAM = 0.5  # they stay while nothing runs, too: the other half is for other programs

Cell = tuple[StoredFile, int, int]  # from the beginning of a page to the end of one, or of the file


def cells(weight: Weight) -> Iterator[Cell]:
    """Those that a weight in a file lies on."""
    assert weight.file is not None
    first, end = weight.offset // CELL_BYTES * CELL_BYTES, weight.offset + weight.nbytes
    for start in range(first, end, CELL_BYTES):
        yield weight.file, start, min(start + CELL_BYTES, weight.file.size)


@dataclass(frozen=True)
class Limits:
    """What the host says of locked memory."""

    left: Callable[[], int]  # bytes that may still be locked
    account: Callable[[int], None]  # told of bytes that are locked, and of the same less when they are not any more


@dataclass
class _Held:
    """What is to be undone when the pages are not needed any more, or their owner is gone."""

    limits: Limits
    device: torch.device | None = None
    files: dict[StoredFile, RegisteredFile] = field(default_factory=dict)
    cells: set[Cell] = field(default_factory=set)

    @property
    def nbytes(self) -> int:
        return sum(stop - start for _, start, stop in list(self.cells))

    def unlock(self, cells: Iterable[Cell]) -> int:
        freed = 0
        for cell in cells:
            file, start, stop = cell
            self.cells.discard(cell)
            self.files[file].unlock(start)
            self.limits.account(start - stop)
            freed += stop - start
        return freed

    def close(self) -> None:
        self.unlock(list(self.cells))
        while self.files:
            self.files.popitem()[1].close()


class KeptPages:
    """Of the files of one network, for one device at a time."""

    def __init__(self, limits: Limits) -> None:
        self.moved = False  # it left for a stage since `settle` looked last
        self.resting = False  # as things are it need not leave: nothing is to be kept
        self._held = _Held(limits)
        self._in_use: Counter[Cell] = Counter()
        self._users = 0
        self._guard = threading.RLock()
        self._locking: set[Cell] = set()  # by some thread, just now
        self._locked = threading.Condition(self._guard)
        self.times_given_back = 0
        weakref.finalize(self, self._held.close).atexit = False  # the end of the process unlocks everything
        _all.add(self)

    @property
    def nbytes(self) -> int:
        """That are locked now."""
        return self._held.nbytes

    def holds(self, weight: Weight) -> bool:
        """Whether all of a weight in a file is locked."""
        return all(cell in self._held.cells for cell in cells(weight))

    # --- use

    def use(self, device: Device) -> Use | None:
        """Begin to use pages on `device`; None where nothing is to be kept, or is in use on another device."""
        with self._guard:
            if self.resting:
                return None
            if self._held.device not in (None, device.torch_device):
                if self._users:
                    return None
                self._held.close()
            self._held.device = device.torch_device
            self._users += 1
        return Use(self, device)

    def _lock(self, cell: Cell) -> bool:
        file, start, stop = cell
        with self._guard:
            self._locked.wait_for(lambda: cell not in self._locking)
            here = cell in self._held.cells
            if not here and not self._room(stop - start):
                return False
            self._in_use[cell] += 1
            if here:
                return True
            self._held.limits.account(stop - start)
            self._locking.add(cell)
        try:
            self._held.files[file].lock(start, stop)
            with self._guard:  # `give_back` may be going through them
                self._held.cells.add(cell)
        except BaseException:
            self._held.limits.account(start - stop)
            self._let_go(cell)
            raise
        finally:
            with self._guard:
                self._locking.discard(cell)
                self._locked.notify_all()
        return True

    def _room(self, nbytes: int) -> bool:
        kept = kept_bytes()
        available = psutil.virtual_memory().available  # which counts cached pages, also locked ones
        return (
            nbytes <= self._held.limits.left()
            and kept + nbytes <= SHARE_OF_FREE_RAM * available
            and locked_bytes() + nbytes <= SHARE_LOCKED * available
        )

    def _let_go(self, cell: Cell) -> None:
        with self._guard:
            self._in_use[cell] -= 1

    def _mapped(self, file: WeightFile, device: Device) -> RegisteredFile:
        with self._guard:
            if file.stored not in self._held.files:
                self._held.files[file.stored] = RegisteredFile(file, device.registrar)
            return self._held.files[file.stored]

    def _end_use(self) -> None:
        with self._guard:
            self._users -= 1

    # --- giving back

    def give_back(self) -> int:
        """Unlock what nobody uses; bytes."""
        with self._guard:
            self.times_given_back += 1
            freed = self._held.unlock([cell for cell in self._held.cells if not self._in_use[cell]])
            if not self._users:
                self._held.close()
                self._in_use.clear()
        return freed


class Use:
    """Some pages in use: they stay until `close`. Of one owner; `lock` may be called by several threads of it."""

    def __init__(self, pages: KeptPages, device: Device) -> None:
        self._pages, self._device = pages, device
        self._cells: list[Cell] = []
        self._open = True

    @staticmethod
    def cells(weights: Iterable[Weight]) -> list[Cell]:
        """All that weights in files lie on, in order."""
        return list(dict.fromkeys(cell for weight in weights for cell in cells(weight)))

    def __contains__(self, cell: Cell) -> bool:
        """Whether a cell is locked now."""
        return cell in self._pages._held.cells

    def has_room(self, nbytes: int) -> bool:
        """Whether so much more may be kept, as things are."""
        return not nbytes or self._pages._room(nbytes)

    def mapped(self, file: WeightFile) -> RegisteredFile:
        """The mapping that cells of `file` are locked in, which stays the keeper's."""
        return self._pages._mapped(file, self._device)

    def lock(self, cell: Cell) -> bool:
        """Lock a cell of a mapped file, if it is not; False where no more may be kept.

        Raises:
            RefusedError: the driver does not lock it.
        """
        locked = self._pages._lock(cell)
        if locked:
            self._cells.append(cell)
        return locked

    def close(self) -> None:
        """No copy from there may be under way any more."""
        if self._open:
            self._open = False
            while self._cells:
                self._pages._let_go(self._cells.pop())
            self._pages._end_use()

    def give_back(self) -> None:
        """`close`, and unlock what nobody else uses."""
        self.close()
        self._pages.give_back()


_all: Living[KeptPages] = Living()
_of_networks: weakref.WeakKeyDictionary[torch.nn.Module, KeptPages] = weakref.WeakKeyDictionary()
_leaving: set[int] = set()  # networks, by their id, that are on their way out for a stage


class Patcher(Protocol):
    """What is asked of a MODEL's or CLIP's."""

    model: torch.nn.Module

    def get_attachment(self, key: str) -> object: ...


KEY = "sluice_kept_pages"  # of the attachment with the `Limits` of a patcher that may leave for a stage


def kept_for(patcher: Patcher) -> KeptPages | None:
    """What is used to load `patcher`, if it may leave for a stage; what was kept for another one of its network, which
    an Offload Mode node had, is given back otherwise."""
    limits = patcher.get_attachment(KEY)
    if not isinstance(limits, Limits):
        give_back(patcher.model)
        return None
    if patcher.model not in _of_networks:
        _of_networks[patcher.model] = KeptPages(limits)
    return _of_networks[patcher.model]


def kept_of(network: torch.nn.Module) -> KeptPages | None:
    return _of_networks.get(network)


@contextmanager
def leaving_for_a_stage(network: torch.nn.Module) -> Iterator[None]:
    """While the host unloads it: it is going to come back, so that its pages stay."""
    _leaving.add(id(network))
    try:
        if (pages := kept_of(network)) is not None:
            pages.moved, pages.resting = True, False
        yield
    finally:
        _leaving.discard(id(network))


def left(network: torch.nn.Module) -> None:
    """The weights of `network` are home: give its pages back, unless it leaves for a stage."""
    if id(network) not in _leaving:
        give_back(network)


def give_back(network: torch.nn.Module) -> int:
    """Unlock what is kept for a network and not in use; bytes."""
    pages = kept_of(network)
    return pages.give_back() if pages is not None else 0


def settle(network: torch.nn.Module) -> None:
    """After a picture, of a network that is loaded: if it did not have to leave, keep nothing until it has to."""
    if (pages := kept_of(network)) is not None:
        pages.resting, pages.moved = not pages.moved, False
        if pages.resting:
            pages.give_back()


def kept_bytes() -> int:
    """That are locked now, of all networks."""
    return sum(pages.nbytes for pages in _all.all())


def give_all_back() -> int:
    """Unlock whatever is not in use, of all networks; bytes."""
    return sum(pages.give_back() for pages in _all.all())


def relieve() -> int:
    """Where free RAM has become short, give back until no more than the share of it is kept; bytes."""
    freed = 0
    for pages in sorted(_all.all(), key=lambda pages: -pages.nbytes):
        if kept_bytes() <= SHARE_OF_FREE_RAM * psutil.virtual_memory().available:
            break
        freed += pages.give_back()
    return freed
