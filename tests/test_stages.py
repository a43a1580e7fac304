"""Who leaves VRAM when: the table of modes, the decision, and who comes back. And what a dry run finds."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from pack.offload import events, stages
from pack.offload.estimate import KEPT, SLACK, Answers, dry_run
from pack.offload.stages import (
    CHOICES,
    ENDS,
    GB,
    MODES,
    Absent,
    Moment,
    Need,
    Part,
    StagePolicy,
    reason_to_leave,
    room_to_make,
    who_comes_back,
)

ALL = frozenset(Part)
TIGHT = Need(weights=4 * GB, working=2 * GB)
BEGINS = {
    Part.TEXT: {Moment.TEXT_BEGINS},
    Part.DIFFUSION: {Moment.SAMPLING_BEGINS},
    Part.VAE: {Moment.ENCODE_BEGINS, Moment.DECODE_BEGINS},
}


def leaves(policy: StagePolicy, part: Part, moment: Moment, free: int = 0, watched=ALL) -> bool:
    need = None if moment in ENDS.values() else TIGHT
    return reason_to_leave(policy, part, moment, watched, need, free) is not None


# Without room, where all parts are watched: mode -> part -> the other parts whose beginning it leaves for.
FOR_WHOM = {
    "none": {},
    "cond_only": {Part.TEXT: {Part.DIFFUSION, Part.VAE}},
    "cond_diffusion": {Part.TEXT: {Part.DIFFUSION, Part.VAE}, Part.DIFFUSION: {Part.TEXT, Part.VAE}},
    "aggressive": {part: ALL - {part} for part in Part},
    "layer_streaming": {Part.TEXT: {Part.DIFFUSION, Part.VAE}, Part.DIFFUSION: {Part.TEXT, Part.VAE}},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", Part)
def test_who_leaves_for_whom(mode: str, part: Part) -> None:
    policy = StagePolicy(mode)
    for other in ALL - {part}:
        expected = other in FOR_WHOM[mode].get(part, ())  # type: ignore[attr-defined]
        assert {leaves(policy, part, moment) for moment in BEGINS[other]} == {expected}, other


@pytest.mark.parametrize("mode", MODES.keys() - {"aggressive"})
def test_nobody_moves_where_there_is_room(mode: str) -> None:
    for part, moment in itertools.product(Part, Moment):
        assert not leaves(StagePolicy(mode), part, moment, free=TIGHT.nbytes)
    moved = [part for part in Part if leaves(StagePolicy(mode), part, Moment.DECODE_BEGINS, free=TIGHT.nbytes - 1)]
    assert moved == [part for part in Part if Part.VAE in FOR_WHOM[mode].get(part, ())]  # type: ignore[attr-defined]


def test_aggressive_moves_at_the_end_of_a_stage() -> None:
    policy = StagePolicy("aggressive")
    room = 1 << 50
    assert leaves(policy, Part.DIFFUSION, Moment.SAMPLING_ENDS, room)
    assert leaves(policy, Part.VAE, Moment.VAE_ENDS, room)
    assert not leaves(policy, Part.TEXT, Moment.TEXT_ENDS, room)  # there are more texts
    assert leaves(policy, Part.TEXT, Moment.SAMPLING_BEGINS, room)


def test_end_of_a_stage_where_nothing_later_is_watched() -> None:
    policy = StagePolicy("cond_diffusion")
    assert leaves(policy, Part.TEXT, Moment.TEXT_ENDS, watched={Part.TEXT})
    assert not leaves(policy, Part.TEXT, Moment.TEXT_ENDS, watched={Part.TEXT, Part.VAE})
    assert leaves(policy, Part.DIFFUSION, Moment.SAMPLING_ENDS, watched={Part.TEXT, Part.DIFFUSION})
    assert not leaves(policy, Part.DIFFUSION, Moment.SAMPLING_ENDS, watched=ALL)
    assert not leaves(StagePolicy("cond_only"), Part.DIFFUSION, Moment.SAMPLING_ENDS, watched={Part.DIFFUSION})


@pytest.mark.parametrize("mode", MODES)
def test_overrides(mode: str) -> None:
    dials = {Part.TEXT: "offload_cond_stage", Part.DIFFUSION: "offload_diffusion"}
    for part, choice in itertools.product(dials, CHOICES):
        policy = StagePolicy(mode, **{dials[part]: choice})
        expected = {"auto": part in FOR_WHOM[mode], "on": mode != "none", "off": False}[choice]  # type: ignore[operator]
        assert leaves(policy, part, Moment.DECODE_BEGINS) == expected, (part, choice)
        (other,) = dials.keys() - {part}
        assert leaves(policy, other, Moment.DECODE_BEGINS) == leaves(StagePolicy(mode), other, Moment.DECODE_BEGINS)


def test_need() -> None:
    assert Need(weights=10, working=5).nbytes == 16  # the host asks for a tenth more than the weights
    assert Need(weights=10, working=5, target=100).nbytes == 100
    assert StagePolicy(target_free_vram_gb=1.5).target_bytes == 1_500_000_000


@pytest.mark.parametrize(
    ("rest", "spare", "others", "room", "expected"),
    [
        (1200, 881, 20, 1000, 800),  # it streams, with the VAE or without: nobody leaves
        (1200, 880, 70, 1000, 1200),  # too large to stay
        (800, 870, 20, 1000, 800),  # it fits once the other has left
        (700, 880, 20, 1000, 700),
        (1200, -50, 20, 1000, -45),
        (1200, 881, 0, 1000, 800),
    ],
)
def test_for_what_others_leave(
    rest: int, spare: int, others: int, room: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "SLACK_BYTES", 0)
    assert room_to_make(rest, spare, others, room) == expected


def test_reason_tells_numbers() -> None:
    reason = reason_to_leave(StagePolicy("cond_only"), Part.TEXT, Moment.SAMPLING_BEGINS, ALL, TIGHT, 3 * GB)
    assert reason == "sampling needs 6.40 GB, 3.00 GB are free"


@pytest.mark.parametrize(
    "wrong", [{"mode": "gentle"}, {"reload_diffusion": "maybe"}, {"vram_estimation": "guess"},
              {"target_free_vram_gb": -1.0}, {"target_free_vram_gb": float("nan")}],
)  # fmt: skip
def test_wrong_values_are_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"Offload Mode: {next(iter(wrong))} is .*Choose"):
        StagePolicy(**wrong)


# --- coming back


def test_who_comes_back() -> None:
    text, model = Absent(Part.TEXT, 5 * GB, "auto"), Absent(Part.DIFFUSION, 6 * GB, "auto")
    assert who_comes_back([text, model], 13 * GB) == [model, text]
    assert who_comes_back([text, model], 12 * GB) == []  # all of them, with a tenth to spare, or nobody
    assert who_comes_back([text], 12 * GB) == [text]
    forced = Absent(Part.TEXT, 5 * GB, "on")
    assert who_comes_back([forced, model], 0) == [forced]
    assert who_comes_back([forced, model], 13 * GB) == [forced, model]
    assert who_comes_back([Absent(Part.DIFFUSION, GB, "off")], 100 * GB) == []


def test_reload_choices() -> None:
    assert StagePolicy("cond_diffusion").reload(Part.DIFFUSION) == "auto"
    assert StagePolicy("aggressive").reload(Part.TEXT) == "off"
    assert StagePolicy("aggressive", reload_cond_stage="on").reload(Part.TEXT) == "on"
    assert StagePolicy("aggressive", reload_cond_stage="on").reload(Part.DIFFUSION) == "off"
    assert StagePolicy("cond_only").reload(Part.VAE) == "off"


# --- events


def test_events_are_bounded_and_in_order(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "sluice.offload"):
        for number in range(events.KEPT + 10):
            events.record("leaves", f"model {number}", number, "test", logged=number == 5)
    kept = events.recent_events()
    assert len(kept) == events.KEPT
    assert [event.nbytes for event in kept] == list(range(10, events.KEPT + 10))
    assert [record.getMessage() for record in caplog.records] == ["model 5 leaves (5 bytes): test"]


# --- dry runs

CPU = torch.device("cpu")


class Doubling(torch.nn.Module):
    """Needs, in the middle of its call, its input and two tensors of twice its size."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 128, bias=False)
        self.back = torch.nn.Linear(128, 64, bias=False)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.layer(x)
        wide = torch.relu(wide)  # while the first one is still there
        return self.back(wide)


def test_dry_run_finds_the_most_that_lives_at_once() -> None:
    network = Doubling()
    rows = 1000
    one = rows * 64 * 4
    with torch.inference_mode():
        found = dry_run(network, lambda copy, given: copy(given), (rows, 64), torch.float32, CPU)
    assert found == int((one + 2 * one + 2 * one) * SLACK)
    assert network(torch.zeros(1, 64)).shape == (1, 64), "the network itself was changed"
    assert {p.device.type for p in network.parameters()} == {"cpu"} and type(network.layer.weight.data) is torch.Tensor


def test_dry_run_takes_no_memory() -> None:
    huge = dry_run(Doubling(), lambda copy, given: copy(given), (1 << 30, 64), torch.float32, CPU)
    assert huge > 1 << 40


def test_dry_run_of_what_looks_at_values_is_an_error() -> None:
    with pytest.raises(Exception, match=r".+"):
        dry_run(Doubling(), lambda copy, given: given.sum().item() > 0, (4, 64), torch.float32, CPU)


def test_answers_are_bounded_and_go_with_their_network() -> None:
    answers, network, asked = Answers(), Doubling(), []
    for size in [*range(KEPT + 5), KEPT + 4]:
        assert answers.get(network, size, lambda size=size: asked.append(size) or size) == size  # type: ignore[func-returns-value]
    assert asked == list(range(KEPT + 5)) and len(answers) == KEPT
    assert answers.get(network, "none", lambda: None) is None
    assert answers.get(network, "none", lambda: 1) is None, "it was tried again"
    del network
    gc.collect()
    assert len(answers) == 0
