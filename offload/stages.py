"""Who leaves VRAM at which boundary between two stages of a picture: the five modes, as data.

A picture is made in stages: texts are encoded, pictures may be encoded by the VAE, a model (or two) samples, the VAE
decodes. A stage begins when its model is about to be loaded. A text encoder's stage is all the texts of a picture, so
it ends when another stage begins; sampling and the VAE's work end when they return. The names of the modes, and what
they mean, are those of stable-diffusion.cpp (pull request 1477).

    none             nobody: the host alone decides
    cond_only        the text encoder, once its texts are encoded
    cond_diffusion   the text encoder, and the diffusion model before the VAE decodes
    aggressive       each, as soon as its own stage ends, whether or not the room is needed
    layer_streaming  as cond_diffusion; the diffusion model streams, so it needs little while it samples

Except in aggressive, nobody moves unless the next stage needs the room.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from ..loaders.sizes import size

GB = 10**9
WEIGHTS_MARGIN = 1.1  # as the host multiplies what it is about to load
SLACK_BYTES = 32 << 20  # for what is allocated meanwhile
SMALL_SHARE = 1 / 16  # of the VRAM that a model which streams would have: what is smaller need not leave for it


class Part(Enum):
    """What can leave, in the order in which it is asked to."""

    TEXT = "text encoder"
    DIFFUSION = "diffusion model"
    VAE = "VAE"


class Moment(Enum):
    TEXT_BEGINS = "text encoding"
    ENCODE_BEGINS = "VAE encode"
    SAMPLING_BEGINS = "sampling"
    DECODE_BEGINS = "VAE decode"
    TEXT_ENDS = "after text encoding"
    SAMPLING_ENDS = "after sampling"
    VAE_ENDS = "after the VAE's work"


BEGINNINGS = frozenset({Moment.TEXT_BEGINS, Moment.ENCODE_BEGINS, Moment.SAMPLING_BEGINS, Moment.DECODE_BEGINS})
ENDS = {Part.TEXT: Moment.TEXT_ENDS, Part.DIFFUSION: Moment.SAMPLING_ENDS, Part.VAE: Moment.VAE_ENDS}

# When a part leaves, if its mode has it leave at all. A second diffusion model (Wan 2.2) begins to sample after the
# first one, and texts of the next picture are encoded when its model is still there.
_TEXT = BEGINNINGS - {Moment.TEXT_BEGINS}
_LEAVES = {Part.TEXT: _TEXT, Part.DIFFUSION: BEGINNINGS}
_AT_ONCE = {
    Part.TEXT: _TEXT,  # not after each of its texts: a picture has at least two
    Part.DIFFUSION: BEGINNINGS | {Moment.SAMPLING_ENDS},
    Part.VAE: BEGINNINGS | {Moment.VAE_ENDS},
}
MODES: dict[str, dict[Part, frozenset[Moment]]] = {
    "none": {},
    "cond_only": {Part.TEXT: _TEXT},
    "cond_diffusion": _LEAVES,
    "aggressive": _AT_ONCE,
    "layer_streaming": _LEAVES,
}

# The stages that come after a part's. Where nobody watches one of them, a part that is to leave does so at the end of
# its own stage, because no later moment is known.
_LATER = {Part.TEXT: {Part.DIFFUSION, Part.VAE}, Part.DIFFUSION: {Part.VAE}, Part.VAE: set(Part)}

# What Release Memory releases, and how: `release.py` does it.
CACHES = "caches"
ALL = "all"
WHAT: dict[str, Part | None] = {
    "text_encoder": Part.TEXT,
    "diffusion_model": Part.DIFFUSION,
    CACHES: None,
    ALL: None,
}
HOW = ("offload", "dispose")

CHOICES = ("auto", "on", "off")
ESTIMATES = ("dryrun", "formula")


@dataclass(frozen=True)
class StagePolicy:
    """The dials of the Offload Mode node."""

    mode: str = "cond_only"
    offload_cond_stage: str = "auto"
    offload_diffusion: str = "auto"
    reload_cond_stage: str = "auto"
    reload_diffusion: str = "auto"
    vram_estimation: str = "dryrun"
    target_free_vram_gb: float = 0.0
    log_events: bool = False

    def __post_init__(self) -> None:
        allowed = {"mode": tuple(MODES), "vram_estimation": ESTIMATES}
        for dial, value in vars(self).items():
            options = allowed.get(dial, CHOICES if isinstance(value, str) else ())
            if options and value not in options:
                raise ValueError(f"Offload Mode: {dial} is {value!r}. Choose one of {', '.join(options)}.")
        if not self.target_free_vram_gb >= 0:
            raise ValueError(f"Offload Mode: target_free_vram_gb is {self.target_free_vram_gb}. Choose 0 or more.")

    @property
    def at_once(self) -> bool:
        """Whether parts leave even where there is room for all."""
        return self.mode == "aggressive"

    @property
    def target_bytes(self) -> int:
        return round(self.target_free_vram_gb * GB)

    def moments(self, part: Part) -> frozenset[Moment]:
        """When `part` may leave."""
        choice = {Part.TEXT: self.offload_cond_stage, Part.DIFFUSION: self.offload_diffusion}.get(part, "auto")
        of_mode = MODES[self.mode].get(part, frozenset())
        if self.mode == "none" or choice == "off":
            return frozenset()
        return of_mode or (_LEAVES[part] if choice == "on" else frozenset())

    def reload(self, part: Part) -> str:
        """on, off, or auto: whether `part` comes back after the picture."""
        choice = {Part.TEXT: self.reload_cond_stage, Part.DIFFUSION: self.reload_diffusion}.get(part, "off")
        return "off" if self.at_once and choice == "auto" else choice


@dataclass(frozen=True)
class Need:
    """What the stage that begins has to have on its device, in bytes."""

    weights: int  # of its model, that are not there yet
    working: int  # activations, and what the host keeps free for itself
    target: int = 0  # what the user wants to be free in any case

    @property
    def nbytes(self) -> int:
        return max(int(self.weights * WEIGHTS_MARGIN) + self.working, self.target)

    def __str__(self) -> str:
        return size(self.nbytes)


def reason_to_leave(
    policy: StagePolicy, part: Part, moment: Moment, watched: Collection[Part], need: Need | None, free_bytes: int
) -> str | None:
    """Why `part` leaves at `moment`; None: it stays.

    Args:
        watched: the parts whose stages anybody is told of.
        need: of the stage that begins; None at the end of one.
        free_bytes: on the device now.
    """
    moments = policy.moments(part)
    if moment is ENDS[part]:
        if moment in moments:
            return f"{policy.mode}: its stage ended"
        if moments and not _LATER[part] & set(watched):
            return f"{policy.mode}: its stage ended, and no later one is connected to an Offload Mode node"
        return None
    if moment not in moments:
        return None
    if policy.at_once:
        return f"{policy.mode}: its stage is over"
    if need is not None and need.nbytes > free_bytes:
        return f"{moment.value} needs {need}, {size(free_bytes)} are free"
    return None


def room_to_make(rest: int, spare: int, others: int, room: int) -> int:
    """For how many bytes of a model that can stream others are to leave.

    Where it streams whether or not the last small one leaves (a VAE), that stays: to move it out and in again takes the
    host as long as its bytes take to stream for dozens of steps, and where compute hides the copies they cost nothing.
    That may be less than nothing: the host adds what the work would like to have, and would make room for that.

    Args:
        rest: of the model, that are not there yet.
        spare: bytes that are free, and not needed for its work.
        others: bytes of those that stay by their mode.
        room: what is free or the model's.
    """
    streams = rest * WEIGHTS_MARGIN > spare + others
    return min(rest, int((spare - SLACK_BYTES) / WEIGHTS_MARGIN)) if streams and others <= SMALL_SHARE * room else rest


@dataclass(frozen=True)
class Absent:
    """A part that left, and may come back after the picture."""

    part: Part
    nbytes: int  # that it had on the device
    choice: str  # on, off, auto


def who_comes_back(absent: Collection[Absent], free_bytes: int) -> list[Absent]:
    """Those to be brought back, in order; the rest are loaded by the host when they are used.

    `on` is tried in any case. `auto` comes back where there is room for all that left: what does not fit together
    would only be moved out again by the stage that comes next, which is not known.
    """
    wanted = [one for one in absent if one.choice != "off"]
    wanted.sort(key=lambda one: (one.choice != "on", one.part is Part.TEXT))
    if sum(one.nbytes for one in wanted) * WEIGHTS_MARGIN <= free_bytes:
        return wanted
    return [one for one in wanted if one.choice == "on"]
