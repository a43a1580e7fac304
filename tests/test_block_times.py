"""Block times: the shortest of a few passes, complete once a run, untouched by passes that are broken off."""

from __future__ import annotations

import pytest
import torch
from pack.offload import block_times
from pack.offload.block_times import PASSES, BlockTimes


class Clock:
    """A time that only passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(block_times.time, "perf_counter", clock)
    return clock


def run(times: BlockTimes, clock: Clock, *seconds: float | None) -> bool:
    """One pass in which the blocks take so long (None: it is skipped); whether a round is complete at its end."""
    for block, taken in enumerate(seconds):
        if taken is not None:
            times.start(block)
            clock.now += taken
            times.stop(block)
    return times.complete()


def test_all_alike_as_long_as_nothing_is_known(clock: Clock) -> None:
    times = BlockTimes(3, torch.device("cpu"))
    assert len(set(times.seconds())) == 1 and times.seconds()[0] > 0
    assert not times.complete()
    assert not run(times, clock, 1.0, 2.0, 3.0)
    assert len(set(times.seconds())) == 1, "one pass is no measurement"


def test_shortest_of_the_first_passes(clock: Clock) -> None:
    times = BlockTimes(2, torch.device("cpu"))
    found = [run(times, clock, taken, 2 * taken) for taken in (9.0, 2.0, 4.0, 1.0)]
    assert found.index(True) == PASSES - 1 and sum(found) == 1
    assert times.seconds() == pytest.approx([2.0, 4.0]), "the fourth pass is not measured"


def test_begin_measures_anew_and_keeps_what_is_known(clock: Clock) -> None:
    times = BlockTimes(2, torch.device("cpu"))
    for _ in range(PASSES):
        run(times, clock, 1.0, 2.0)
    times.begin()
    assert times.seconds() == pytest.approx([1.0, 2.0])
    assert [run(times, clock, 5.0, 7.0) for _ in range(PASSES)] == [False] * (PASSES - 1) + [True]
    assert times.seconds() == pytest.approx([5.0, 7.0])


def test_same_times_again_are_no_news(clock: Clock) -> None:
    times = BlockTimes(1, torch.device("cpu"))
    clock.now = 0.0
    assert [run(times, clock, 1.0) for _ in range(PASSES)][-1]
    times.begin()
    clock.now = 0.0
    assert not any(run(times, clock, 1.0) for _ in range(PASSES + 2))


def test_block_that_never_runs_counts_as_the_shortest(clock: Clock) -> None:
    times = BlockTimes(3, torch.device("cpu"))
    assert [run(times, clock, 3.0, None, 2.0) for _ in range(PASSES)][-1], "it is not waited for"
    assert times.seconds() == pytest.approx([3.0, 2.0, 2.0])


def test_block_that_runs_now_and_then_is_waited_for(clock: Clock) -> None:
    times = BlockTimes(2, torch.device("cpu"))
    found = [run(times, clock, 1.0, 5.0 if number % 2 else None) for number in range(2 * PASSES)]
    assert found[-1] and sum(found) == 1


def test_pass_that_is_broken_off_measures_nothing(clock: Clock) -> None:
    times = BlockTimes(2, torch.device("cpu"))
    for _ in range(PASSES):
        times.start(0)
        clock.now += 50.0  # and never stops
        times.begin()
    times.start(0)
    assert not times.complete()
    clock.now += 100.0
    times.begin()
    for _ in range(PASSES):
        run(times, clock, 1.0, 1.0)
    assert times.seconds() == pytest.approx([1.0, 1.0])


@pytest.mark.cuda
def test_gpu_times_are_the_kernels_and_nobody_waits() -> None:
    device = torch.device("cuda")
    times, x = BlockTimes(2, device), torch.zeros(1, device=device)
    rate = (
        torch.cuda.get_device_properties(0).clock_rate * 1e3
        if hasattr(torch.cuda.get_device_properties(0), "clock_rate")
        else 1e9
    )
    for _ in range(PASSES):
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(2):  # in the second pass the GPU is still at the first
                for block, share in ((0, 0.01), (1, 0.04)):
                    times.start(block)
                    torch.cuda._sleep(int(rate * share))
                    x += 1
                    times.stop(block)
            assert not times.complete()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert times.complete()
    short, long = times.seconds()
    assert 2 * short < long


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_that_is_not_the_current_one() -> None:
    times, x = BlockTimes(1, torch.device("cuda", 1)), torch.ones(2048, 2048, device="cuda:1")
    for number in range(PASSES):
        with torch.cuda.device(number % 2):
            times.start(0)
            for _ in range(20):
                x = x @ x / 2048
            times.stop(0)
        torch.cuda.synchronize(1)
    assert times.complete()
    assert times.seconds()[0] > 20 * 2 * 2048**3 / 1e15  # faster than any GPU is
