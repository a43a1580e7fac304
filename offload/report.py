"""What a `Residency` holds and does, as plain data that another thread may take while the model runs.

Everything here is known already: nothing is measured, locked or waited for, and no weight is touched. What changes
meanwhile (the plan at a pass boundary, the current block) is read once, so a snapshot may be a moment old and its
parts belong together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .costs import GB
from .plan import StreamPlan, predict
from .residency import Residency
from .streaming import Streaming

BOUNDLESS = 1 << 53  # budgets beyond are those of a CPU, where weights may take what they like


@dataclass(frozen=True)
class BlockState:
    """One block. `bytes` are all its weights; what is neither resident nor streamed is at home."""

    name: str
    bytes: int
    resident_bytes: int
    streamed_bytes: int  # at every pass
    compute_ms: float | None  # measured; None as long as it was not


@dataclass(frozen=True)
class SourceState:
    """Where streamed weights come from, and why from there."""

    kind: str
    reason: str
    pinned_bytes: int


@dataclass(frozen=True)
class PlanState:
    """A plan in numbers; times are predictions."""

    text: str
    budget_bytes: int | None  # None: as much as they like
    vram_bytes: int
    ring_bytes: int
    link_gb_per_s: float
    compute_ms: float
    copy_ms: float
    step_ms: float
    bound_by: str


@dataclass(frozen=True)
class StepState:
    """The last pass. `copy_ms` is what its copies take at the link's measured speed."""

    ms: float
    compute_ms: float | None
    copy_ms: float
    gb_per_s: float  # streamed bytes over `ms`
    bound_by: str


@dataclass(frozen=True)
class SwapState:
    """A network's residency."""

    resident_bytes: int
    streamed_bytes: int
    ring_bytes: int
    blocks: tuple[BlockState, ...]
    current_block: int | None
    source: SourceState | None
    plan: PlanState | None
    last_step: StepState | None
    passes: int  # on this plan
    plans_made: int
    misses: int  # blocks that had to wait for copies that nobody had foreseen


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def state_of(residency: Residency) -> SwapState:
    """A snapshot; without a plan while the weights are at home."""
    plan = residency.plan if residency.arranged else None
    streaming = residency._streaming
    blocks = _blocks(residency, plan)
    return SwapState(
        resident_bytes=sum(block.resident_bytes for block in blocks) + (plan.outside_bytes if plan else 0),
        streamed_bytes=plan.streamed_bytes if plan else 0,
        ring_bytes=plan.ring_bytes if plan else 0,
        blocks=blocks,
        current_block=streaming.inside if streaming else None,
        source=_source(streaming),
        plan=_plan(_with_times_of_now(plan, residency)) if plan else None,
        last_step=_step(residency, plan) if plan else None,
        passes=residency.steps,
        plans_made=residency.plans_made,
        misses=streaming.streamer.misses if streaming else 0,
    )


def _blocks(residency: Residency, plan: StreamPlan | None) -> tuple[BlockState, ...]:
    streamed = [0] * len(residency.names)
    for copy in plan.copies if plan else ():
        streamed[copy.block] += copy.nbytes
    if plan:
        sizes = [block.nbytes for block in plan.blocks]
    else:
        sizes = [sum(slot.nbytes for slot in slots) for slots in residency._blocks]
    seconds = residency.times.measured() if residency.times else [None] * len(sizes)
    return tuple(
        BlockState(name, size, size - moving if plan else 0, moving, None if time is None else _ms(time))
        for name, size, moving, time in zip(residency.names, sizes, streamed, seconds, strict=True)
    )


def _source(streaming: Streaming | None) -> SourceState | None:
    if streaming is None:
        return None
    choice = streaming.choice
    return SourceState(choice.source.kind, choice.reason, choice.source.pinned_bytes)


def _with_times_of_now(plan: StreamPlan, residency: Residency) -> StreamPlan:
    """The plan as it stands by what its blocks were measured to take: the first is made before there is any
    measurement, and stays as long as it serves."""
    if residency.times is None:
        return plan
    seconds = residency.times.seconds()
    blocks = tuple(replace(block, compute_seconds=s) for block, s in zip(plan.blocks, seconds, strict=True))
    return replace(plan, blocks=blocks, step_seconds=predict(seconds, plan.copies, plan.link))


def _plan(plan: StreamPlan) -> PlanState:
    return PlanState(
        text=str(plan),
        budget_bytes=plan.budget_bytes if plan.budget_bytes < BOUNDLESS else None,
        vram_bytes=plan.vram_bytes,
        ring_bytes=plan.ring_bytes,
        link_gb_per_s=round(plan.link.bytes_per_second / GB, 3),
        compute_ms=_ms(plan.compute_seconds),
        copy_ms=_ms(plan.copy_seconds),
        step_ms=_ms(plan.step_seconds),
        bound_by=plan.bound_by,
    )


def _step(residency: Residency, plan: StreamPlan) -> StepState | None:
    seconds = residency.times.pass_seconds() if residency.times else None
    if not seconds or residency.times is None:
        return None
    known = [block for block in residency.times.measured() if block is not None]
    compute = sum(known) if known else None
    bound_by = plan.bound_by if compute is None else "copy" if plan.copy_seconds > compute else "compute"
    return StepState(
        ms=_ms(seconds),
        compute_ms=None if compute is None else _ms(compute),
        copy_ms=_ms(plan.copy_seconds),
        gb_per_s=round(plan.streamed_bytes / seconds / GB, 3),
        bound_by=bound_by,
    )
