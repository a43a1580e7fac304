"""The report's parts that need no host: a residency as data, the timeline, stages, the text and the plot."""

from __future__ import annotations

import threading

import pytest
import torch
from pack.nodes.report import plot, stages, text, timeline
from pack.offload.blocks import Block
from pack.offload.costs import SwapRequest
from pack.offload.report import state_of
from pack.offload.residency import Residency
from pack.offload.terms import Terms

WIDTH = 64
WEIGHT = WIDTH * WIDTH * 4  # bytes of a block's only large tensor


class Network(torch.nn.Module):
    """Blocks of one layer each, and a layer outside of them."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH, bias=False)) for _ in range(blocks)
        )
        self.last = torch.nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def residency_of(network: Network) -> Residency:
    return Residency([Block(f"blocks.{i}", block) for i, block in enumerate(network.blocks)], SwapRequest())


def terms(budget_bytes: int) -> Terms:
    return Terms(
        budget_bytes=budget_bytes,
        most_bytes=budget_bytes,
        pinned_budget_bytes=0,
        may_pin=False,
        located=lambda tensor: None,
        dtype_of=lambda module, name: None,
        account_pinned=lambda nbytes: None,
        patched_by_host=lambda slot: False,
    )


class Patcher:
    """On whose behalf a residency follows."""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def streamed(request):
    network = Network(4).requires_grad_(False)
    residency = residency_of(network)
    outside = sum(p.nbytes for p in network.last.parameters())
    residency.arrange(network, torch.device(request.param), terms(3 * WEIGHT + outside))
    yield network, residency, outside
    residency.leave()


def run(network: Network, passes: int = 1) -> None:
    """Passes, each waited for."""
    device = network.last.weight.device
    for _ in range(passes):
        network(torch.zeros(1, WIDTH, device=device))
        if device.type == "cuda":
            torch.cuda.synchronize()


class TestState:
    def test_at_home_nothing_is_resident(self) -> None:
        state = state_of(residency_of(Network(3)))
        assert (state.resident_bytes, state.streamed_bytes, state.ring_bytes) == (0, 0, 0)
        assert [(b.bytes, b.resident_bytes, b.streamed_bytes, b.compute_ms) for b in state.blocks] == 3 * [
            (WEIGHT, 0, 0, None)
        ]
        assert state.plan is state.source is state.last_step is state.current_block is None

    def test_bytes_are_those_of_the_weights(self, streamed) -> None:
        network, residency, outside = streamed
        state = state_of(residency)
        assert [b.name for b in state.blocks] == ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]
        assert all(b.resident_bytes + b.streamed_bytes == b.bytes == WEIGHT for b in state.blocks)
        assert state.streamed_bytes == sum(b.streamed_bytes for b in state.blocks) > 0
        assert state.resident_bytes + state.streamed_bytes == sum(p.nbytes for p in network.parameters())
        assert state.resident_bytes + state.ring_bytes <= 3 * WEIGHT + outside
        assert state.plan is not None and state.plan.vram_bytes == state.resident_bytes + state.ring_bytes

    def test_source_and_its_reason(self, streamed) -> None:
        source = state_of(streamed[1]).source
        assert source is not None and source.kind == "memory"
        assert source.reason.startswith("memory: ") and "not page_cache: " in source.reason

    def test_a_boundless_budget_is_none(self) -> None:
        network = Network(2)
        residency = residency_of(network)
        residency.arrange(network, torch.device("cpu"), terms(1 << 60))
        plan = state_of(residency).plan
        assert plan is not None and plan.budget_bytes is None
        residency.leave()

    def test_the_plan_tells_the_times_that_its_blocks_were_measured_to_take(self, streamed) -> None:
        network, residency, _ = streamed
        first = state_of(residency)
        assert first.plan is not None and first.plan.compute_ms == 4 * 1.0  # as long as nothing is known
        residency.follow(Patcher())
        run(network, 8)
        state = state_of(residency)
        measured = [block.compute_ms for block in state.blocks]
        assert state.plan is not None and None not in measured
        assert state.plan.compute_ms == pytest.approx(sum(measured), abs=0.005)
        assert state.plan.step_ms >= max(state.plan.compute_ms, state.plan.copy_ms) - 0.005
        assert state.plan.bound_by == ("copy" if state.plan.copy_ms > state.plan.compute_ms else "compute")
        assert state.plan.text != first.plan.text

    def test_the_current_block_is_the_one_that_computes(self, streamed) -> None:
        network, residency, _ = streamed
        patcher, seen = Patcher(), []
        residency.follow(patcher)
        for block in network.blocks:
            block[0].register_forward_hook(lambda *_: seen.append(state_of(residency).current_block))
        run(network)
        assert seen == [0, 1, 2, 3]
        assert state_of(residency).current_block is None

    def test_a_step_is_measured_from_pass_to_pass_of_one_run(self, streamed) -> None:
        network, residency, _ = streamed
        patcher = Patcher()
        residency.follow(patcher)
        run(network)
        assert state_of(residency).last_step is None  # the pass may still be under way
        residency.times.begin()  # another run: what lies between the two is no step
        run(network)
        assert state_of(residency).last_step is None
        run(network, 5)
        state = state_of(residency)
        step = state.last_step
        assert step is not None and step.compute_ms is not None
        assert 0 < step.compute_ms <= sum(b.compute_ms or 0 for b in state.blocks) + 0.01
        # Rounded to microseconds and to 0.001 GB/s.
        assert step.gb_per_s == pytest.approx(state.streamed_bytes / (step.ms / 1e3) / 1e9, rel=0.05, abs=1e-3)
        assert step.bound_by == ("copy" if step.copy_ms > step.compute_ms else "compute")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def made(*values: tuple) -> tuple[timeline.Timeline, Clock]:
    """A timeline of these samples, a second apart."""
    clock, rest = Clock(), iter(values)
    line = timeline.Timeline(lambda: next(rest), clock)
    for _ in values:
        line.sample(always=True)
        clock.now += 1
    return line, clock


def sample(used: int | None = None, ram: int | None = 1) -> tuple:
    return (used, None, ram, None)


class TestTimeline:
    def test_samples_and_peaks(self) -> None:
        line, _ = made(sample(3), sample(9, 4), sample(5, 2))
        data = line.data()
        assert data["columns"] == ["ms", "vram_used", "vram_allocated", "ram_anonymous", "ram_file"]
        assert data["samples"] == [[0, 3, None, 1, None], [1000, 9, None, 4, None], [2000, 5, None, 2, None]]
        assert data["peak"] == {"vram_used": 9, "vram_allocated": None, "ram_anonymous": 4, "ram_file": None}

    def test_events_close_together_are_one_sample(self) -> None:
        clock = Clock()
        line = timeline.Timeline(sample, clock)
        for _ in range(1000):
            line.sample()
            clock.now += timeline.SECONDS_BETWEEN / 100
        assert 10 <= len(line.data()["samples"]) <= 11

    def test_is_bounded_and_keeps_every_peak(self) -> None:
        count = 20 * timeline.MOST_SAMPLES + 7
        line, _ = made(*(sample(10**6 if i == 1234 else i, i % 100) for i in range(count)))
        data = line.data()
        assert timeline.MOST_SAMPLES // 2 <= len(data["samples"]) <= timeline.MOST_SAMPLES
        assert data["peak"]["vram_used"] == 10**6 and data["peak"]["ram_anonymous"] == 99
        times = [row[0] for row in data["samples"]]
        assert times == sorted(times) and times[-1] == (count - 1) * 1000

    def test_samples_become_rarer_when_they_are_many(self) -> None:
        clock = Clock()
        line = timeline.Timeline(sample, clock)
        taken = 0
        for _ in range(4 * timeline.MOST_SAMPLES):
            before = line.data()["samples"][-1:]
            line.sample()
            taken += line.data()["samples"][-1:] != before
            clock.now += timeline.SECONDS_BETWEEN
        assert taken < 3 * timeline.MOST_SAMPLES

    def test_a_stage_that_goes_on_is_marked_once_and_labels_always(self) -> None:
        line = timeline.Timeline(sample, Clock())
        for stage, label in (("encode", None), ("encode", None), (None, "a"), (None, "a"), ("sample", None)):
            line.mark(stage, label, "7")
        marks = [(mark["stage"], mark["label"]) for mark in line.data()["marks"]]
        assert marks == [("encode", None), (None, "a"), (None, "a"), ("sample", None)]
        assert line.stage == "sample"

    def test_marks_are_bounded(self) -> None:
        line = timeline.Timeline(sample, Clock())
        for i in range(10 * timeline.MOST_MARKS):
            line.mark(label=str(i))
        assert len(line.data()["marks"]) == timeline.MOST_MARKS

    def test_begins_anew(self) -> None:
        line, _ = made(sample(), sample())
        line.begin("next")
        assert (line.data()["samples"], line.data()["marks"], line.data()["prompt_id"]) == ([], [], "next")

    def test_may_be_read_while_it_is_written(self) -> None:
        clock = Clock()
        line = timeline.Timeline(sample, clock)
        stop, failures = threading.Event(), []

        def read() -> None:
            while not stop.is_set():
                data = line.data()
                if len(data["samples"]) > timeline.MOST_SAMPLES:
                    failures.append(len(data["samples"]))

        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(3000):
            line.sample(always=True)
            clock.now += 1
        stop.set()
        reader.join()
        assert failures == []


class TestStages:
    @pytest.mark.parametrize(
        ("stage", "linked", "outputs"),
        [
            ("sample", {"model", "positive", "latent_image"}, {"LATENT"}),  # KSampler
            ("sample", {"noise", "guider", "sampler", "sigmas", "latent_image"}, {"LATENT"}),  # SamplerCustomAdvanced
            ("encode", {"clip"}, {"CONDITIONING"}),  # CLIPTextEncode
            ("encode", {"clip", "vae", "image"}, {"CONDITIONING"}),  # TextEncodeQwenImageEdit
            ("encode", {"pixels", "vae"}, {"LATENT"}),  # VAEEncode
            ("decode", {"samples", "vae"}, {"IMAGE"}),  # VAEDecode
            ("load", set(), {"MODEL", "CLIP", "VAE"}),  # CheckpointLoaderSimple
            (None, {"model", "clip"}, {"MODEL", "CLIP"}),  # LoraLoader
            (None, {"model"}, {"SIGMAS"}),  # BasicScheduler
            (None, {"images"}, set()),  # SaveImage
            (None, set(), {"LATENT"}),  # EmptyLatentImage
        ],
    )
    def test_by_what_goes_in_and_comes_out(self, stage: str | None, linked: set, outputs: set) -> None:
        assert stages.stage_of(linked, outputs) == stage

    def test_a_node_of_an_unknown_class_has_none(self) -> None:
        assert stages.stage_of_node({"class_type": "Gone", "inputs": {"model": ["1", 0]}}) is None


def drawn(line: timeline.Timeline, label: str = "") -> torch.Tensor:
    return plot.plot(line.data(), label)


def has(image: torch.Tensor, colour: tuple[int, int, int]) -> int:
    """Pixels of a colour."""
    return int(((image[0] * 255).round().int() == torch.tensor(colour)).all(-1).sum())


class TestPlot:
    def test_is_an_image(self) -> None:
        image = drawn(made(sample(3), sample(9))[0])
        assert image.shape == (1, plot.HEIGHT, plot.WIDTH, 3) and image.dtype == torch.float32
        assert image.min() >= 0 and image.max() <= 1

    def test_draws_the_series_that_there_are(self) -> None:
        image = drawn(made(sample(3_000_000), sample(9_000_000))[0])
        assert has(image, plot.SERIES["vram_used"][1]) > 50 and has(image, plot.SERIES["ram_anonymous"][1]) > 50
        assert not has(image, plot.SERIES["vram_allocated"][1]) and not has(image, plot.SERIES["ram_file"][1])

    def test_a_line_is_as_high_as_its_value(self) -> None:
        """20 of 25 MB lies at four fifths of the plot's height."""
        line, _ = made(*(sample(20_000_000, None) for _ in range(5)), sample(25_000_000, None))
        image = (drawn(line)[0] * 255).round().int()
        column = (image[plot.TOP :, 200] == torch.tensor(plot.SERIES["vram_used"][1])).all(-1).nonzero().flatten()
        height = plot.HEIGHT - plot.TOP - plot.BOTTOM
        assert column.float().mean().item() == pytest.approx(height / 5, abs=1.5)

    def test_colours_the_stages(self) -> None:
        clock = Clock()
        line = timeline.Timeline(sample, clock)
        for stage, label in (("load", None), ("sample", None), ("decode", "done"), (None, "late")):
            line.mark(stage, label)
            clock.now += 20
        image = drawn(line, "ß" * 300)
        assert has(image, plot.STAGES["sample"]) > 500 and has(image, plot.STAGES["decode"]) > 500
        assert has(image, plot.STAGES["encode"]) == 0

    @pytest.mark.parametrize("values", [[], [sample(None, None)], [sample(0, 0)], [sample(1 << 45, 1)]])
    def test_draws_whatever_there_is(self, values: list) -> None:
        assert drawn(made(*values)[0]).isfinite().all()

    @pytest.mark.parametrize(
        ("largest", "ticks", "expected"),
        [(16.3, 5, (20, 5)), (1.0, 5, (1.0, 0.2)), (0.0, 5, None), (788, 5, (800, 200)), (97.0, 8, (100, 20))],
    )
    def test_axes_hold_the_largest_in_round_steps(self, largest: float, ticks: int, expected: tuple | None) -> None:
        axis = plot.axis(largest, ticks)
        assert axis.top >= largest and 2 <= len(axis.ticks) <= 2 * ticks
        if expected:
            assert (axis.top, axis.step) == pytest.approx(expected)


MODEL = {
    "name": "m.gguf",
    "class": "Flux",
    "architecture": "flux",
    "quant_types": {"Q4_K": 6_500_000_000},
    "device": "cuda:0",
    "bytes": {"total": 7e9, "resident": 4e9, "streamed": 2e9, "on_disk": 1e9, "in_ram": 0, "ring": 5e8},
    "source": {"reason": "page_cache: why"},
    "plan": {"text": "the plan"},
    "last_step": {"ms": 812.5, "compute_ms": 800.0, "copy_ms": 40.0, "gb_per_s": 2.46, "bound_by": "compute"},
    "passes": 19,
    "misses": 1,
    "loras": [{"name": "l.safetensors", "strength": 0.5, "way": "auto", "weights": 24, "bytes": 300_000}],
    "patches": {"at_use": 24, "by_comfyui": 3, "bytes": 300_000},
    "unified_memory": {"mode": "auto", "bytes": 3e9, "rung": "registered", "reason": "registered: it shares memory"},
}
REPORT = {
    "models": [MODEL],
    "host_ram": {
        **{"resident": 2e9, "anonymous": 5e8, "file": None, "shared": 0, "available": 3e9, "total": 8e9},
        "kept_locked": 1_300_000_000,
    },
    "vram": [{"device": "cuda:0", "name": "GPU", "allocated": 4e9, "reserved": 5e9, "free": 1e9, "total": 8e9}],
    "caches": [{"name": "loras", "bytes": 1e6, "bound_bytes": 1e9, "entries": 2, "hits": 3, "misses": 4}],
    "dispatch": [{"what": "cuda", "choice": "triton"}],
    "events": [{"time_ms": 5, "action": "leaves", "what": "text encoder", "nbytes": 4_700_000_000, "why": "sampling"}],
}


def test_the_text_says_every_number() -> None:
    line, _ = made(sample(2_500_000_000), sample(1))
    said = text.text({**REPORT, "timeline": line.data()}, "after sampling")
    for part in (
        *("after sampling", "m.gguf", "flux", "Q4_K 6.50 GB", "7.00 GB", "4.00 GB resident", "2.00 GB streamed"),
        *("1.00 GB in the file", "ring 500.0 MB", "page_cache: why", "the plan", "812.5 ms", "compute 800.0 ms"),
        *("copies 40.0 ms", "2.46 GB/s", "compute binds", "19 passes", "1 misses", "l.safetensors at 0.5 (auto): 24"),
        "used in place 3.00 GB: registered: it shares memory",
        *(
            "anonymous 500.0 MB",
            "file ?",
            "1.30 GB of files kept locked",
            "allocated 4.00 GB",
            "reserved 5.00 GB",
            "1.00 GB of 8.00 GB free",
        ),
        *("3 hits", "cuda: triton", "at most VRAM 2.50 GB"),
        "text encoder leaves, 4.70 GB: sampling",
    ):
        assert part in said, part
    assert "0.0 MB in RAM" not in said


def test_the_text_without_a_model() -> None:
    line = timeline.Timeline(sample, Clock())
    assert "no model is loaded" in text.text({**REPORT, "models": [], "timeline": line.data()})
