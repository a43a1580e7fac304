"""When to leave a plan for another one. Changing it moves weights, and doing so at every look at the VRAM thrashes.

- A plan that no longer fits is left at once.
- Otherwise the time that it loses, step by step, against the plan that would be made now must have added up to what
  the change costs: the time to copy the tensors that would become resident. Free VRAM that comes and goes is thus
  followed only if it stays; at worst as much time is lost as one change costs.
- Gains below `WORTHWHILE` are within the noise of what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..loaders.sizes import size
from .costs import BlockCost, Link, ms
from .plan import StreamPlan, make_plan, predict

WORTHWHILE = 0.02  # of a step


def replan(
    plan: StreamPlan, blocks: Sequence[BlockCost], link: Link, budget_bytes: int, steps: int
) -> tuple[StreamPlan, str]:
    """The plan to go on with and why: `plan` itself and an empty string as long as it serves.

    Args:
        blocks: the costs as now measured, the budget as it is now.
        steps: that ran on `plan`.

    Raises:
        BudgetTooSmallError: as `make_plan` does.
    """
    dials = {
        "prefetch_blocks": plan.prefetch_blocks,
        "blocks_to_swap": plan.blocks_to_swap,
        "outside_bytes": plan.outside_bytes,
    }
    if [block.tensor_bytes for block in blocks] != [block.tensor_bytes for block in plan.blocks]:
        return make_plan(blocks, link, budget_bytes, **dials), "the model's tensors changed"
    if plan.vram_bytes > budget_bytes:
        better = make_plan(blocks, link, budget_bytes, **dials)
        return better, f"{size(budget_bytes)} of VRAM are left and the plan takes {size(plan.vram_bytes)}"

    now = predict([block.compute_seconds for block in blocks], plan.copies, link)
    if now <= (1 + WORTHWHILE) * sum(block.compute_seconds for block in blocks):
        return plan, ""  # spares the search: no plan is faster than compute alone
    better = make_plan(blocks, link, budget_bytes, **dials)
    gain = now - better.step_seconds
    kept = {(copy.block, copy.tensor) for copy in better.copies}
    arriving = sum(copy.nbytes for copy in plan.copies if (copy.block, copy.tensor) not in kept)
    if gain < WORTHWHILE * now or gain * steps < link.seconds(arriving):
        return plan, ""
    return better, f"a step takes {ms(now)} and could take {ms(better.step_seconds)}"
