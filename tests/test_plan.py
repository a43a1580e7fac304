"""The plan of what streams: carried out byte by byte, compared with other policies and with what is possible at all."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise

import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from pack.loaders.sizes import ALIGN, aligned
from pack.offload.costs import AUTO, SMALL_BYTES, BlockCost, Link, SwapRequest
from pack.offload.plan import BudgetTooSmallError, StreamPlan, everything, make_plan, predict
from pack.offload.replan import replan
from pack.offload.ring import Stream
from pack.offload.shares import diffuse, spread, water_fill
from pack.offload.simulate import step_seconds

GEN5 = Link(55e9, latency=0.0)
SMALL = (12288,) * 4
LONG = {"warm_up": 60, "measured": 60}


def flux(bytes_per_weight: float = 1.0625, seconds: float = 0.1) -> list[BlockCost]:
    """FLUX.1: 19 double blocks of 340 M weights, 38 single ones of 142 M, all computing about equally long."""

    def block(name: str, millions: tuple[float, ...]) -> BlockCost:
        return BlockCost(name, tuple(int(m * 1e6 * bytes_per_weight) for m in millions) + SMALL, seconds / 57)

    double, single = (28.3, 9.4, 37.7, 37.7, 56.6) * 2, (66.1, 47.2, 28.3)
    return [block(f"double.{i}", double) for i in range(19)] + [block(f"single.{i}", single) for i in range(38)]


def wan(bytes_per_weight: float = 1.0625, seconds: float = 0.4) -> list[BlockCost]:
    sizes = tuple(int(m * 1e6 * bytes_per_weight) for m in (26.2,) * 8 + (70.8,) * 2) + SMALL
    return [BlockCost(f"blocks.{i}", sizes, seconds / 40) for i in range(40)]


def total(blocks: list[BlockCost]) -> int:
    return sum(block.nbytes for block in blocks)


def exact(blocks: list[BlockCost], plan: StreamPlan, link: Link = GEN5) -> float:
    return predict([block.compute_seconds for block in blocks], plan.copies, link, **LONG)


# --- random models


@st.composite
def models(draw: st.DrawFn, spread_by: float = 10.0, runs: bool = True) -> list[BlockCost]:
    """1 to 80 blocks of 1 to 12 streamable tensors, copy time of it all 0.1 to 8 times the compute time."""
    count = draw(st.integers(1, 80))
    kinds = draw(st.integers(1, 4)) if runs and draw(st.booleans()) else count
    random = draw(st.randoms(use_true_random=False))
    made = []
    for _ in range(kinds):
        parts = [random.uniform(0.05, 1) for _ in range(random.randint(1, 12))]
        size = random.uniform(60e6, 60e6 * spread_by) / sum(parts)
        tensors = tuple(int(size * part) for part in parts) + (12288,) * random.randint(0, 4)
        made.append((tensors, random.uniform(1, spread_by)))
    chosen = [made[i * kinds // count] for i in range(count)]
    copying = sum(sum(tensors) for tensors, _ in chosen) / GEN5.bytes_per_second
    ratio = math.exp(draw(st.floats(math.log(0.1), math.log(8))))
    unit = copying / ratio / sum(seconds for _, seconds in chosen)
    return [BlockCost(f"b{i}", tensors, seconds * unit) for i, (tensors, seconds) in enumerate(chosen)]


depths = st.integers(0, 2)
portions = st.floats(0.02, 1.05)


def plan_or_none(blocks: list[BlockCost], budget: int, depth: int) -> StreamPlan | None:
    try:
        return make_plan(blocks, GEN5, budget, prefetch_blocks=depth)
    except BudgetTooSmallError:
        return None


def plan_or_reject(blocks: list[BlockCost], budget: int, depth: int) -> StreamPlan:
    """A plan, or another example of the property where the budget is too small for any."""
    plan = plan_or_none(blocks, budget, depth)
    if plan is None:
        reject()
    return plan


def carry_out(plan: StreamPlan, steps: int = 4) -> None:
    """Run the streamer's loop on a ring of owned byte ranges, every copy as early as the plan allows it.

    That is the copy engine at its fastest; a slower one overwrites later and so harms nothing that this one spares.
    """
    held: dict[tuple[int, int], tuple[int, int, int]] = {}  # (block, tensor) -> (start, end, step it is for)
    order = []

    def copy_in(copies: tuple, step: int) -> None:
        for copy in copies:
            start, end = copy.offset, copy.offset + aligned(copy.nbytes)
            assert start % ALIGN == 0 and end <= plan.ring_bytes
            for key in [key for key, (low, high, _) in held.items() if low < end and start < high]:
                del held[key]
            held[copy.block, copy.tensor] = (start, end, step)
            order.append((step, plan.copies.index(copy)))

    streaming = [block for block in range(len(plan.blocks)) if plan.streamed(block)]
    copy_in(plan.first_copies, 0)
    for step in range(steps):
        for block in range(len(plan.blocks)):
            if block in streaming:
                turn = streaming.index(block)
                for ahead in range(min(plan.prefetch_blocks + 1, len(streaming))):  # it and those that it prefetches
                    other = streaming[(turn + ahead) % len(streaming)]
                    due = step + (turn + ahead) // len(streaming)
                    for tensor in plan.streamed(other):
                        assert held.get((other, tensor), (0, 0, -1))[2] == due, (step, block, other, tensor)
            after = plan.copies_after(block)
            copy_in(tuple(copy for copy in after if copy.block > block), step)
            copy_in(tuple(copy for copy in after if copy.block <= block), step + 1)
    assert order == sorted(order)  # one stream, in order, none left out
    assert all(later - earlier == 1 for (_, earlier), (_, later) in pairwise(order) if later)


@settings(max_examples=30, deadline=None)
@given(models(), portions, depths)
def test_every_plan_can_be_carried_out_within_its_budget(blocks: list[BlockCost], portion: float, depth: int) -> None:
    plan = plan_or_reject(blocks, int(total(blocks) * portion), depth)
    assert plan.vram_bytes <= plan.budget_bytes
    assert plan.resident_bytes + sum(aligned(copy.nbytes) for copy in plan.copies) == everything(blocks, 0)
    assert all(copy.nbytes == blocks[copy.block].tensor_bytes[copy.tensor] >= SMALL_BYTES for copy in plan.copies)
    assert len({(copy.block, copy.tensor) for copy in plan.copies}) == len(plan.copies)
    assert plan.step_seconds == pytest.approx(exact(blocks, plan), rel=0.005)
    carry_out(plan)


# --- against other policies


def rivals(blocks: list[BlockCost], budget: int, depth: int) -> dict[str, float]:
    """Step seconds of the usual policies: each streams as little as fits and has the ring that the rest allows."""
    whole, count = [block.streamable for block in blocks], len(blocks)
    room = [block.streamable_bytes for block in blocks]
    policies = {
        "leading": [[()] * stay + whole[stay:] for stay in range(count, -1, -1)],
        "nth": [
            [whole[i] if (i + 1) * n // count > i * n // count else () for i in range(count)] for n in range(count + 1)
        ],
        "same": [diffuse(blocks, [bytes_ * part / 64 for bytes_ in room]) for part in range(65)],
    }
    found = {}
    for name, candidates in policies.items():
        for chosen in candidates:
            stream = Stream([[(i, b.tensor_bytes[i]) for i in c] for b, c in zip(blocks, chosen, strict=True)], depth)
            ring = stream.largest_ring(budget - everything(blocks, 0) + stream.nbytes)
            if ring:
                found[name] = predict([block.compute_seconds for block in blocks], ring.copies, GEN5)
                break
    return found


@settings(max_examples=30, deadline=None)
@given(models(), portions, depths)
def test_no_other_policy_is_faster_by_more_than_2_percent(blocks: list[BlockCost], portion: float, depth: int) -> None:
    """One tensor's copy is allowed besides: whole tensors round, and a rival may be lucky by less than one."""
    budget = int(total(blocks) * portion)
    plan = plan_or_reject(blocks, budget, depth)
    tensor = max(max(block.tensor_bytes) for block in blocks) / GEN5.bytes_per_second
    for name, seconds in rivals(blocks, budget, depth).items():
        assert plan.step_seconds <= 1.02 * seconds + tensor, name


# --- against what is possible at all


def least_streamed(blocks: list[BlockCost], budget: int, depth: int) -> float:
    """A lower bound on the bytes that any plan streams, were tensors divisible.

    S streamed bytes leave Q - S resident, so S - W >= Q - budget for a ring of W. The ring holds any depth + 1
    consecutive chunks, so a tiling of the blocks by groups of depth + 1 streams at most W in each group, and at most
    what the group has: S <= sum of min(W, group). The smallest W for which both can hold, for every tiling, gives S.
    """
    sizes = [block.streamable_bytes for block in blocks]
    excess, size = total(blocks) - budget, depth + 1
    if excess <= 0:
        return 0.0
    tilings = [
        [sum(sizes[max(i, 0) : max(i + size, 0)]) for i in range(-shift, len(sizes), size)] for shift in range(size)
    ]
    ring = 0.0
    for groups in tilings:
        # sum of min(W, group) - W rises with W until one group is left, through a corner at every group's size
        least, below = math.inf, 0
        for number, group in enumerate(sorted(groups)):
            slope = len(groups) - number - 1
            if slope > 0 and below + slope * group >= excess:
                least = (excess - below) / slope
                break
            below += group
        ring = max(ring, least)
    return excess + ring


@settings(max_examples=30, deadline=None)
@given(models(spread_by=3.0, runs=False), portions, depths)
def test_step_is_within_2_percent_of_the_ideal(blocks: list[BlockCost], portion: float, depth: int) -> None:
    """T <= 1.02 x max(compute, least bytes that any plan streams / link), and what rounding to whole tensors costs.

    The latter: a tensor more in each of the depth + 1 chunks of the ring is VRAM that resident weights lack,
    and so as many bytes more to stream; streaming x more lengthens the ring by x (depth + 1) / blocks again. One more
    for the ring's laps, which end between tensors.

    Where it is true: there are more blocks than the ring could hold three times, and two whole blocks of VRAM more
    than the smallest plan takes. Below that the ring cannot even out blocks whose copies and compute differ, as FLUX
    with everything streamed shows (`test_two_slots_are_too_few_where_copies_equal_compute`). Neither is it true of long
    runs of blocks with many bytes and runs with few: no ring evens those out, and the bound knows nothing of time.
    """
    group = depth + 1
    assume(len(blocks) > 3 * group)
    budget = int(total(blocks) * portion)
    plan_or_reject(blocks, budget - 2 * max(block.nbytes for block in blocks), depth)
    plan = plan_or_reject(blocks, budget, depth)
    rate = GEN5.bytes_per_second
    least = least_streamed(blocks, budget, depth)
    assert least <= plan.streamed_bytes + ALIGN * len(plan.copies)  # or it is no lower bound
    ideal = max(plan.compute_seconds, least / rate)
    rounding = (group * len(blocks) / (len(blocks) - group) + 1) * max(max(b.tensor_bytes) for b in blocks) / rate
    assert plan.step_seconds <= 1.02 * ideal + rounding


@pytest.mark.parametrize("rate", [55e9, 25e9, 12e9])
@pytest.mark.parametrize("portion", [0.25, 0.4, 0.5, 0.6, 0.75])
@pytest.mark.parametrize("model", [flux, wan])
def test_real_shapes_are_within_3_percent_without_allowances(model, portion: float, rate: float) -> None:
    blocks, link = model(), Link(rate, latency=0.0)
    budget = int(total(blocks) * portion)
    plan = make_plan(blocks, link, budget)
    ideal = max(plan.compute_seconds, least_streamed(blocks, budget, 1) / rate)
    assert exact(blocks, plan, link) <= 1.03 * ideal
    assert exact(blocks, plan, link) <= 1.01 * max(plan.compute_seconds, plan.copy_seconds)


# --- the tables of known schedules


def slotted(count: int, streamed: list[int], copy: float, slots: int) -> float:
    """Uniform blocks of one second through equal slots, over the ideal."""
    copies: list[list[tuple[float, int]]] = [[] for _ in range(count)]
    for turn, block in enumerate(streamed):
        copies[block] = [(copy, streamed[turn - slots])]
    return step_seconds([1.0] * count, copies, **LONG) / max(count, copy * len(streamed))


@pytest.mark.parametrize(
    ("portion", "copy", "two", "four"),
    [(0.25, 2, 1.20, 1.10), (0.25, 4, 1.60, 1.40), (0.5, 2, 1.45, 1.35), (0.5, 4, 1.18, 1.07), (1, 2, 1.0, 1.0)],
)
def test_a_resident_prefix_wastes_time_and_even_spreading_does_not(portion, copy, two, four) -> None:
    count = 40
    tail = list(range(count - round(count * portion), count))
    even = [i for i, chunk in enumerate(spread(wan(), len(tail))) if chunk]
    assert slotted(count, tail, copy, 2) == pytest.approx(two, abs=0.01)
    assert slotted(count, tail, copy, 4) == pytest.approx(four, abs=0.01)
    assert slotted(count, even, copy, 2) <= 1.01


def test_flux_at_half_its_bytes_needs_bytes_in_proportion_to_compute() -> None:
    """Copying everything takes twice the compute time: half of it could just be hidden, and no usual policy does it."""
    blocks = flux(seconds=total(flux()) / GEN5.bytes_per_second / 2)
    budget = round(0.54 * total(blocks))
    compute = sum(block.compute_seconds for block in blocks)
    found = {name: seconds / compute for name, seconds in rivals(blocks, budget, 1).items()}
    assert min(found.values()) >= 1.15, found
    assert exact(blocks, make_plan(blocks, GEN5, budget)) <= 1.005 * compute


def test_two_slots_are_too_few_where_copies_equal_compute() -> None:
    """All of FLUX through a ring of two double blocks costs 1.2 steps; the next VRAM makes double blocks resident."""
    blocks = flux(seconds=total(flux()) / GEN5.bytes_per_second)
    compute = sum(block.compute_seconds for block in blocks)
    all_streams = Stream([[(i, block.tensor_bytes[i]) for i in block.streamable] for block in blocks], 1)
    tight = predict([b.compute_seconds for b in blocks], all_streams.smallest_ring().copies, GEN5, **LONG)
    assert tight / compute == pytest.approx(1.20, abs=0.02)
    plan = make_plan(blocks, GEN5, round(0.25 * total(blocks)))
    assert plan.step_seconds <= 1.01 * compute
    resident = [1 - len(plan.streamed(i)) / len(block.streamable) for i, block in enumerate(blocks)]
    assert sum(resident[:19]) / 19 > 0.25 and sum(resident[19:]) == 0


# --- limits, dials, errors


def test_a_model_that_fits_streams_nothing() -> None:
    blocks = flux()
    plan = make_plan(blocks, GEN5, everything(blocks, 0))
    assert (plan.copies, plan.ring_bytes, plan.streamed_bytes) == ((), 0, 0)
    assert plan.step_seconds == pytest.approx(0.1) and plan.bound_by == "compute"
    assert "nothing streams" in str(plan)


def test_more_vram_is_never_slower_and_a_plan_is_data() -> None:
    blocks = flux()
    budgets = range(1_000_000_000, 13_000_000_000, 10**9)
    plans = [make_plan(blocks, GEN5, budget) for budget in budgets]
    assert all(more.step_seconds <= 1.002 * less.step_seconds for less, more in pairwise(plans))
    assert plans[0] == make_plan(blocks, GEN5, budgets[0])
    with pytest.raises(FrozenInstanceError):
        plans[0].ring_bytes = 0
    assert "copy binds" in str(plans[0]) and "compute binds" in str(plans[-2])
    assert len(plans[0].table().splitlines()) == 57


@settings(max_examples=15, deadline=None)
@given(models(), depths)
def test_too_small_a_budget_says_one_that_works(blocks: list[BlockCost], depth: int) -> None:
    with pytest.raises(BudgetTooSmallError) as caught:
        make_plan(blocks, GEN5, 0, prefetch_blocks=depth)
    assert make_plan(blocks, GEN5, caught.value.smallest_bytes, prefetch_blocks=depth).vram_bytes


def test_too_small_a_budget_names_the_smallest_and_the_remedies() -> None:
    blocks = flux()
    with pytest.raises(BudgetTooSmallError, match="prefetch_blocks to 0") as caught:
        make_plan(blocks, GEN5, 10**9, outside_bytes=5 * 10**8)
    smallest = caught.value.smallest_bytes
    assert make_plan(blocks, GEN5, smallest, outside_bytes=5 * 10**8).resident_bytes >= 5 * 10**8
    with pytest.raises(BudgetTooSmallError):
        make_plan(blocks, GEN5, smallest - ALIGN, outside_bytes=5 * 10**8)
    assert f"raise vram_budget_gb to {math.ceil(smallest / 1e7) / 100:.2f} GB" in str(caught.value)
    with pytest.raises(BudgetTooSmallError, match="swap more blocks"):
        make_plan(blocks, GEN5, 6 * 10**9, blocks_to_swap=5)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 20, 56, 57])
def test_blocks_to_swap_streams_that_many_whole_blocks_spread_over_the_time(count: int) -> None:
    blocks = flux()
    plan = make_plan(blocks, GEN5, 2 * total(blocks), blocks_to_swap=count)
    swapped = [i for i in range(57) if plan.streamed(i)]
    assert len(swapped) == count
    assert all(plan.streamed(i) == blocks[i].streamable for i in swapped)
    assert all(abs(after - before - 57 / count) <= 1 for before, after in pairwise(swapped))


def test_no_ring_holds_all_that_streams() -> None:
    """It would free nothing, and what streams in name only still costs its hooks."""
    blocks = flux()
    everything = make_plan(blocks, GEN5, 2 * total(blocks), blocks_to_swap=0).vram_bytes
    for share in (0.1, 0.3, 0.6, 0.9, 0.99, 0.999, 1.0):
        plan = make_plan(blocks, GEN5, int(share * everything))
        assert plan.ring_bytes < plan.streamed_bytes or not plan.copies
        assert bool(plan.copies) == (share < 1)
    for count in (2, 3, 5, 20):
        plan = make_plan(blocks, GEN5, 2 * total(blocks), blocks_to_swap=count, prefetch_blocks=40)
        assert plan.ring_bytes < plan.streamed_bytes and plan.vram_bytes < everything


def test_one_slow_block_does_not_change_how_many_are_swapped() -> None:
    blocks = [replace(block, compute_seconds=50.0) if i == 3 else block for i, block in enumerate(wan())]
    assert all(sum(map(bool, spread(blocks, count))) == count for count in range(41))


def test_values_out_of_range_say_what_to_choose() -> None:
    with pytest.raises(ValueError, match="Choose 0 to 57, or -1"):
        make_plan(flux(), GEN5, 10**10, blocks_to_swap=58)
    with pytest.raises(ValueError, match="no blocks were found"):
        make_plan([], GEN5, 10**10)
    with pytest.raises(ValueError, match="give every block the same"):
        BlockCost("blocks.0", (1,), 0.0)
    with pytest.raises(ValueError, match="measure it again"):
        Link(0.0)
    for dial, value in [("blocks_to_swap", -2), ("prefetch_blocks", 41), ("vram_budget_gb", -1.0)]:
        with pytest.raises(ValueError, match=f"{dial} is {value}. Choose"):
            SwapRequest(**{dial: value})


def test_the_dials_give_a_budget() -> None:
    free, step = 12 * 10**9, 2 * 10**9
    assert SwapRequest().budget(free, step) == 9_500_000_000
    assert SwapRequest(vram_budget_gb=6).budget(free, step) == 6 * 10**9
    assert SwapRequest(vram_budget_gb=11).budget(free, step) == 9_500_000_000  # never more than is there
    assert SwapRequest(min_free_vram_gb=11).budget(free, step) == 0
    assert SwapRequest().blocks_to_swap == AUTO


def test_water_filling_is_in_proportion_up_to_what_a_block_has() -> None:
    assert water_fill([100, 100, 10], [1.0, 2.0, 1.0], 70) == pytest.approx([20, 40, 10])
    assert water_fill([100, 100, 10], [1.0, 2.0, 1.0], 210) == pytest.approx([100, 100, 10])


# --- when to change a plan


def test_a_plan_is_kept_until_a_better_one_has_paid_for_the_change() -> None:
    blocks = flux()
    tight = make_plan(blocks, GEN5, 4 * 10**9)
    assert replan(tight, blocks, GEN5, 4 * 10**9, 1000) == (tight, "")
    assert replan(tight, blocks, GEN5, 4_100_000_000, 1000)[0] is tight  # too little to gain
    assert replan(tight, blocks, GEN5, 9 * 10**9, 0)[0] is tight  # may be gone again at the next step
    wide, reason = replan(tight, blocks, GEN5, 9 * 10**9, 10)
    assert wide.step_seconds < 0.7 * tight.step_seconds and "a step takes" in reason
    slower = [replace(block, compute_seconds=block.compute_seconds * 2) for block in blocks]
    assert replan(wide, slower, GEN5, 9 * 10**9, 1000)[0] is wide  # compute binds all the more


def test_a_plan_that_no_longer_fits_is_left_at_once() -> None:
    blocks = flux()
    wide = make_plan(blocks, GEN5, 9 * 10**9, outside_bytes=10**8, prefetch_blocks=2)
    smaller, reason = replan(wide, blocks, GEN5, 6 * 10**9, 0)
    assert smaller.vram_bytes <= 6 * 10**9 and "6.00 GB of VRAM are left" in reason
    assert (smaller.outside_bytes, smaller.prefetch_blocks) == (10**8, 2)
    with pytest.raises(BudgetTooSmallError):
        replan(wide, blocks, GEN5, 10**8, 0)
    assert replan(wide, wan(), GEN5, 9 * 10**9, 0)[1] == "the model's tensors changed"
