"""Who has a seat, who leaves it, and who comes back: the host's side of Offload Mode.

A `Seat` is an attachment of a patcher: the part that it plays, by which policy. When a stage is about to begin, the
host's own list of what is loaded is gone through, and who has a seat is asked to leave as `stages` says. So two models
(Wan 2.2), several text encoders and several nodes work together without knowing of each other, and a model without a
seat is never touched. To leave is what the host does itself when it unloads one model.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_base
import comfy.model_management
from comfy.model_patcher import ModelPatcher

from ..loaders import compat
from ..loaders.sizes import size
from .ahead import HEAD_START_BYTES
from .asking import asking
from .attach_arrival import ArrivingPatcher
from .device import device_for
from .errors import ArenaError, first_line
from .events import record
from .kept import KEY as KEPT
from .kept import Limits, kept_for, kept_of, leaving_for_a_stage, relieve, settle
from .location import located
from .lock_ahead import lock_soon
from .plan import BudgetTooSmallError
from .slots import slots_of
from .stages import (
    ENDS,
    GB,
    WEIGHTS_MARGIN,
    Absent,
    Moment,
    Need,
    Part,
    StagePolicy,
    reason_to_leave,
    room_to_make,
    who_comes_back,
)
from .streamed_patcher import StreamedPatcher, residency_of
from .unified import IN_PLACE

log = logging.getLogger("sluice.offload")

KEY = "sluice_stages"  # of the attachment
AHEAD = (StreamedPatcher, ArrivingPatcher)  # what can be sent before the host is asked for it
HOST_EMPTIES = 0.25  # of free VRAM may be torch's cache; where it is more, the host empties it


class NoRoomError(RuntimeError):
    """A model does not fit, even after everything that may leave has left."""


@dataclass(eq=False)
class Session:
    """What the outputs of one node share, and of the nodes whose outputs it was given."""

    parts: frozenset[Part]
    left: dict[Part, list[tuple[weakref.ref[ModelPatcher], int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Seat:
    """The attachment."""

    part: Part
    policy: StagePolicy
    session: Session


_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def seat_of(patcher: ModelPatcher) -> Seat | None:
    return patcher.get_attachment(KEY)


def take_seat(patcher: ModelPatcher, seat: Seat) -> None:
    patcher.set_attachments(KEY, seat)
    leaves = bool(seat.policy.moments(seat.part))
    patcher.set_attachments(KEPT, Limits(compat.pinned_memory_left, compat.account_pinned) if leaves else None)


def open_session(parts: Iterable[Part], earlier: Iterable[Session]) -> Session:
    """A session for these parts, and for those of the sessions that some of them have been in."""
    known = list(earlier)
    session = Session(frozenset(parts).union(*(one.parts for one in known)))
    for one in known:  # whoever is told that the picture is done knows of all that left
        session.left.update(one.left)
        one.left = session.left
    _sessions.add(session)
    return session


def part_of(patcher: ModelPatcher) -> Part | None:
    """Which part any patcher plays, with a seat or without."""
    if patcher.is_clip:
        return Part.TEXT
    return Part.DIFFUSION if isinstance(patcher.model, comfy.model_base.BaseModel) else None


def patchers_that_left() -> list[ModelPatcher]:
    """What has left by a policy, and nobody has loaded since."""
    left = [reference() for session in _sessions for references in session.left.values() for reference, _ in references]
    return [patcher for patcher in left if patcher is not None and not _entries(patcher)]


def lock_what_leaves(
    policy: StagePolicy, leaving: Iterable[ModelPatcher | None], together: Sequence[ModelPatcher]
) -> None:
    """Where not all have room together: have those that leave ready to come, in this order, before they are asked."""
    management = comfy.model_management
    for patcher in leaving:
        if not isinstance(patcher, AHEAD) or not compat.may_pin_memory() or IN_PLACE in patcher.model.__dict__:
            continue
        device = device_for(patcher.load_device)
        there = [other for other in together if other.load_device == patcher.load_device]
        wanted = sum(other.model_size() for other in there) * WEIGHTS_MARGIN + management.minimum_inference_memory()
        free = management.get_free_memory(patcher.load_device) + sum(other.loaded_size() for other in there)
        crowded = policy.at_once or max(wanted, policy.target_bytes) > free
        if not crowded or device.registrar.read_only_refusal() or (pages := kept_for(patcher)) is None:
            continue
        weights = [slot.weight(located) for slot in slots_of(patcher.model.modules()) if slot.streams]
        lock_soon(pages, [weight for weight in weights if weight.file is not None], device)


# --- stages


def begin(moment: Moment, patcher: ModelPatcher, working: float, least: float | None = None) -> None:
    """Before `patcher` is loaded for the stage that begins: who is to leave does, and meanwhile what can be on its way
    is. `loaded` has to follow.

    Args:
        working: bytes that its work needs beside the weights.
        least: bytes of that without which it is not possible, for which the host leaves room.
    """
    seat = seat_of(patcher)
    if seat is None:
        return
    relieve()
    device = patcher.load_device
    reserved = comfy.model_management.extra_reserved_memory()
    inference = comfy.model_management.minimum_inference_memory()
    need = Need(
        weights=_weights_wanted(patcher),
        working=int(max(working + reserved, inference)),
        target=seat.policy.target_bytes,
    )
    taken = int(max((working if least is None else least) + reserved, inference))
    free = int(comfy.model_management.get_free_memory(device))
    record("begins", f"{moment.value} ({_name_of(patcher)})", need.nbytes, f"{size(free)} are free",
           seat.policy.log_events)  # fmt: skip
    try:
        sent = _send_ahead(patcher, free - taken, HEAD_START_BYTES)
        for part in Part:
            for other in list(_seated(part)):
                if other.is_clone(patcher):
                    continue
                theirs = seat_of(other)
                if theirs is None or not (theirs.policy.at_once or other.load_device == device):
                    continue
                reason = reason_to_leave(theirs.policy, part, moment, _watched_parts(), need, free)
                if reason is not None:
                    _leave(other, theirs, reason)
                    free = int(comfy.model_management.get_free_memory(device)) + sent
        if sent:
            _send_ahead(patcher, free - sent - taken)
    except BaseException:
        _recall(patcher)
        raise


def _send_ahead(patcher: ModelPatcher, room: int, most: int | None = None) -> int:
    """What of a model that comes back can be copied while the host gets ready for it; bytes."""
    if not isinstance(patcher, AHEAD) or room <= 0:
        return 0
    if most is not None:
        return patcher.send_ahead(room, most)
    free, cached = comfy.model_management.get_free_memory(patcher.load_device, torch_free_too=True)
    taken = min(room, patcher.model_size())
    if cached - taken > HOST_EMPTIES * (free - taken):
        return 0  # the host would empty torch's cache, and wait for all copies then
    return patcher.send_ahead(room)


def _recall(patcher: ModelPatcher) -> None:
    if isinstance(patcher, AHEAD):
        patcher.recall()


def _asked(patcher: ModelPatcher, working: float) -> int | None:
    """The size of a model for which the host is to make room, beside what was sent ahead; None: all of it."""
    if not isinstance(patcher, AHEAD) or IN_PLACE in patcher.model.__dict__:  # which says less than its size anyway
        return None
    management, device = comfy.model_management, patcher.load_device
    there = int(patcher.loaded_size()) if patcher.current_loaded_device() == device else 0
    rest = patcher.model_size() - max(there, patcher.sent_bytes)
    entries = [one for one in management.current_loaded_models if one.model is not None and one.device == device]
    others = [one.model for one in entries if not one.model.is_clone(patcher)]
    if residency_of(patcher) is not None and all(seat_of(other) for other in others):  # the host decides on the rest
        free = int(management.get_free_memory(device))
        kept = max(working + management.extra_reserved_memory(), management.minimum_inference_memory())
        taken = sum(int(other.loaded_size()) for other in others)
        rest = room_to_make(rest, free - int(kept), taken, free + int(patcher.loaded_size()))
    return there + rest


def _weights_wanted(patcher: ModelPatcher) -> int:
    """Bytes that the host will bring to the device beside what is there."""
    most = patcher.model_size()
    residency = residency_of(patcher)
    if residency is not None and residency.request.vram_budget_gb:
        most = min(most, round(residency.request.vram_budget_gb * GB))
    return max(0, int(most - patcher.loaded_size()))


def end(patcher: ModelPatcher) -> None:
    """After the stage of `patcher`."""
    seat = seat_of(patcher)
    if seat is None or not _entries(patcher):
        return
    reason = reason_to_leave(seat.policy, seat.part, ENDS[seat.part], _watched_parts(), None, 0)
    if reason is not None:
        _leave(patcher, seat, reason)


def _watched_parts() -> set[Part]:
    return {part for session in _sessions for part in session.parts}


def _seated(part: Part) -> Iterator[ModelPatcher]:
    """What is loaded of `part`, on a device whose memory counts."""
    for entry in comfy.model_management.current_loaded_models:
        patcher = entry.model
        if patcher is None or (patcher.load_device.type == "cpu" and not comfy.model_management.cpu_mode()):
            continue
        seat = seat_of(patcher)
        if seat is not None and seat.part is part:
            yield patcher


def _entries(patcher: ModelPatcher) -> list:
    """The host's records of a loaded model, under whichever of its clones."""
    loaded = comfy.model_management.current_loaded_models
    return [entry for entry in loaded if entry.model is not None and patcher.is_clone(entry.model)]


def unload(patcher: ModelPatcher) -> int:
    """Have the host unload one model; the bytes that it had on its device."""
    nbytes = int(patcher.loaded_size())
    for entry in _entries(patcher):
        entry.model_unload()
        comfy.model_management.current_loaded_models.remove(entry)
    comfy.model_management.soft_empty_cache()
    return nbytes


def _leave(patcher: ModelPatcher, seat: Seat, reason: str) -> None:
    with leaving_for_a_stage(patcher.model):
        nbytes = unload(patcher)
    left = seat.session.left.get(seat.part, [])
    others = [one for one in left if (known := one[0]()) is not None and not known.is_clone(patcher)]
    seat.session.left[seat.part] = [*others, (weakref.ref(patcher), nbytes)]
    record(
        "leaves", f"{seat.part.value} ({_name_of(patcher)})", nbytes, reason + _kept(patcher), seat.policy.log_events
    )


def _kept(patcher: ModelPatcher) -> str:
    pages = kept_of(patcher.model)
    return (
        f"; {size(pages.nbytes)} of its file stay locked for its return" if pages is not None and pages.nbytes else ""
    )


def _name_of(patcher: ModelPatcher) -> str:
    return type(patcher.model).__name__


# --- coming back


def bring_back(vae: ModelPatcher) -> None:
    """After the picture: load again what left for it, so that the next one starts at once."""
    seat = seat_of(vae)
    if seat is None:
        return
    for part in Part:
        for loaded_one in _seated(part):
            settle(loaded_one.model)
    waiting: list[tuple[Absent, ModelPatcher]] = []
    for part, patchers in seat.session.left.items():
        for reference, nbytes in patchers:
            patcher = reference()
            if patcher is None or (theirs := seat_of(patcher)) is None or _entries(patcher):
                continue
            if not patcher.is_dynamic():  # there the host loads a weight when it is used, and nothing before
                waiting.append((Absent(part, nbytes, theirs.policy.reload(part)), patcher))
    device = vae.load_device
    kept_free = comfy.model_management.minimum_inference_memory() + seat.policy.target_bytes
    free = int(comfy.model_management.get_free_memory(device) - kept_free)
    coming = who_comes_back([absent for absent, _ in waiting if absent.nbytes], free)
    for absent in coming:
        patcher = next(patcher for one, patcher in waiting if one is absent)
        _bring_one_back(absent, patcher, vae, seat.policy.log_events)


def _bring_one_back(absent: Absent, patcher: ModelPatcher, vae: ModelPatcher, logged: bool) -> None:
    """The picture is finished: whatever happens here is told, and never an error."""
    name = f"{absent.part.value} ({_name_of(patcher)})"
    if not _fits(patcher, absent):
        unload(vae)
    if not _fits(patcher, absent):
        record("stays out", name, absent.nbytes, "there is no room for it beside what is loaded", logged)
        return
    try:
        comfy.model_management.load_models_gpu([patcher])
    except Exception as error:
        unload(patcher)
        log.warning("%s could not be loaded again: %s", name, error)
        record("stays out", name, absent.nbytes, str(error), logged)
    else:
        record("comes back", name, absent.nbytes, "after the picture, for the next one", logged)


def _fits(patcher: ModelPatcher, absent: Absent) -> bool:
    free = comfy.model_management.get_free_memory(patcher.load_device)
    return free - comfy.model_management.minimum_inference_memory() >= absent.nbytes


# --- failure


def loaded(patcher: ModelPatcher, working: float, load: Callable[[], Any]) -> Any:
    """`load()`, after `begin`; if there is no room, once more after everything else has left.

    Raises:
        NoRoomError: there is still no room. Names what holds the memory, and what to change.
    """
    try:
        with asking(patcher.model, _asked(patcher, working)):
            return load()
    except BaseException as error:
        _recall(patcher)
        if not isinstance(error, Exception) or not _is_no_room(error):
            raise
        first = first_line(error)
    others = [entry.model for entry in comfy.model_management.current_loaded_models if entry.model is not None]
    for other in others:
        if not other.is_clone(patcher) and other.load_device == patcher.load_device:
            reason = f"{_name_of(patcher)} did not fit ({first})"
            record("leaves", _name_of(other), unload(other), reason, logged=True)
    unload(patcher)
    patcher.detach()  # what was loaded of it before it failed
    try:
        return load()
    except BudgetTooSmallError:
        raise  # says itself which budget would do
    except Exception as error:
        if not _is_no_room(error):
            raise
        raise NoRoomError(_what_holds_memory(patcher, error)) from error


def _is_no_room(error: Exception) -> bool:
    return isinstance(error, ArenaError | BudgetTooSmallError) or comfy.model_management.is_oom(error)


def _what_holds_memory(patcher: ModelPatcher, error: Exception) -> str:
    device = patcher.load_device
    entries = [entry for entry in comfy.model_management.current_loaded_models if entry.model is not None]
    loaded = [f"{_name_of(e.model)} {size(e.model.loaded_size())}" for e in entries if e.device == device]
    total, free = (
        size(function(device))
        for function in (comfy.model_management.get_total_memory, comfy.model_management.get_free_memory)
    )
    cause = first_line(error)
    return (
        f"Offload Mode: {_name_of(patcher)} ({size(patcher.model_size())}) does not fit on {device}, also after "
        f"all other models were unloaded ({cause}). {free} of {total} are free; loaded are "
        f"{', '.join(loaded) or 'no models'}; the rest is held by other programs or by what a node keeps. Close other "
        "programs that use the GPU, use a smaller picture or batch, a smaller file (a lower quant), or the mode "
        "layer_streaming"
    )
