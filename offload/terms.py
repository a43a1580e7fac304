"""On what terms a `Residency` may arrange weights, and what it would do on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..loaders.read_ahead import Watch, unwatched
from .kept import KeptPages
from .plan import StreamPlan
from .slots import Located, Slot


@dataclass(frozen=True)
class Terms:
    """What the host allows and knows. Budgets are bytes for this model's weights and ring."""

    budget_bytes: int
    most_bytes: int  # what could be had if the plan for `budget_bytes` is impossible
    pinned_budget_bytes: int
    may_pin: bool
    located: Located
    dtype_of: Callable[[torch.nn.Module, str], torch.dtype | None]  # what the model declares a plain parameter to be
    account_pinned: Callable[[int], None]  # the host counts what is locked, so that it does not lock too much itself
    patched_by_host: Callable[[Slot], bool]  # weights that the host replaces with patched copies, and moves itself
    watch: Watch = unwatched  # around what takes long; its exceptions end the work
    kept: KeptPages | None = None  # of the network's files, which stay locked while it is out for a stage


@dataclass(frozen=True)
class Foreseen:
    """What `arrange` would carry out."""

    plan: StreamPlan
    why: str
    kept: bool  # all lies there already
