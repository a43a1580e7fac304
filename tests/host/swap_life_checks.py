"""Checks of what a MODEL with Block Swap holds on to and lets go of, and of what goes wrong: files that change, memory
that is refused, reads that fail. After each of them the next run works.

Run as `model_checks.py` is, whose modes and host set-up these checks share.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from host import model_checks as base  # switches the host to the mode that the command line names, so it comes first

import comfy.model_management  # isort: skip
import comfy.sd  # isort: skip
import pack.offload.residency  # isort: skip
import pack.offload.streamed_patcher  # isort: skip
import psutil  # isort: skip
import torch  # isort: skip
from fake_device import FakeDevice, NotingRegistrar
from host.model_checks import FOLDER, GGUF, ON_GPU, SAFETENSORS
from host.swap_checks import (
    BLOCKS,
    DIALS,
    MODELS,
    bytes_of,
    close_to,
    latent,
    pairs,
    residency_of,
    same_bytes,
    streamed,
)
from pack.loaders import compat
from pack.loaders.diffusion import load_diffusion_model
from pack.loaders.gguf.errors import GGUFError
from pack.offload.attach import stream
from pack.offload.costs import SwapRequest
from pack.offload.device import device_for
from pack.offload.errors import SourceError
from pack.offload.files import WeightFile
from pack.offload.plan import make_plan

TIGHT = DIALS["a ring for one block"]
CPU = torch.device("cpu")
Interrupt = comfy.model_management.InterruptProcessingException
MB = 1 << 20


# --- nothing is left


def check_dropped_model_goes_at_once() -> None:
    for kind, load in MODELS.items():
        swapped = streamed(load())
        latent(swapped)
        gc.collect()
        gc.disable()
        try:
            network = weakref.ref(swapped.model)
            residency = weakref.ref(residency_of(swapped))
            streamer = weakref.ref(residency()._streaming.streamer)  # type: ignore[union-attr]
            layer = weakref.ref(swapped.model.diffusion_model.joint_blocks[0])
            del swapped
            for what in (network, layer, residency, streamer):
                assert what() is None, f"{kind}: a {type(what()).__name__} waits for the garbage collector"
        finally:
            gc.enable()
        comfy.model_management.cleanup_models()


def held() -> dict[str, int]:
    """What this process holds, after everything that can go has gone."""
    comfy.model_management.cleanup_models_gc()
    gc.collect()
    comfy.model_management.soft_empty_cache()
    base.compilers_done()
    process = psutil.Process()
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    maps = process.memory_maps(grouped=False)
    return {
        "threads": threading.active_count(),
        "descriptors": process.num_fds(),
        "anonymous": int(status["RssAnon"].split()[0]) * 1024,
        "file": int(status["RssFile"].split()[0]) * 1024,
        "model maps": sum(str(FOLDER) in m.path for m in maps),
        "maps": len(maps),
        "vram": torch.cuda.memory_allocated() if ON_GPU else 0,
    }


def check_fifty_cycles_leave_nothing() -> None:
    """Loaded and unloaded by the host, and loaded from the file, applied and dropped."""
    kept = [
        streamed(load_diffusion_model(GGUF)),
        stream(load_diffusion_model(GGUF, disable_dynamic=True), SwapRequest()),  # gives up its file while it is loaded
    ]

    def cycle(number: int) -> None:
        candidates = [*kept]
        if number % 5 == 0:
            candidates += [streamed(load()) for load in MODELS.values()]
        for candidate in candidates:
            latent(candidate, steps=1)
            comfy.model_management.unload_all_models()
            assert candidate.loaded_size() == 0

    def after_cycles(count: int) -> list[dict[str, int]]:
        found = []
        for number in range(count):
            cycle(number)
            if number >= count - 5:  # what the allocators keep goes up and down by tens of megabytes
                found.append(held())
        return found

    earlier, later = after_cycles(15), after_cycles(50)
    before = {what: max(found[what] for found in earlier) for what in earlier[0]}
    after = {what: min(found[what] for found in later) for what in later[0]}
    for what in ("threads", "descriptors", "model maps", "vram"):
        assert after[what] <= before[what], f"{what}: {before[what]} and then {after[what]}"
    assert after["maps"] <= before["maps"] + 20, f"{before['maps']} maps and then {after['maps']}"
    # The allocators keep some; one forgotten ring or model would be 50 of at least 1.5 MB.
    for what in ("anonymous", "file"):
        assert after[what] <= before[what] + 60 * MB, f"{what}: {(after[what] - before[what]) / MB:.0f} MB more"


def check_unloaded_model_holds_no_thread_and_no_file() -> None:
    comfy.model_management.unload_all_models()
    model = load_diffusion_model(GGUF)
    before = held()
    swapped = streamed(model, blocks_to_swap=BLOCKS, weight_source="disk")
    latent(swapped)
    names = {thread.name for thread in threading.enumerate()}
    assert any(name.startswith("sluice-read") for name in names), "nothing was read by threads"
    comfy.model_management.unload_all_models()
    after = held()
    assert not any(thread.name.startswith("sluice") for thread in threading.enumerate())
    assert {w: after[w] for w in ("threads", "descriptors")} == {w: before[w] for w in ("threads", "descriptors")}


def check_sizes_are_true() -> None:
    for kind, load in MODELS.items():
        model = load()
        total = model.model_size()
        for dials in DIALS.values():
            share = total / 6_962_208
            swapped = streamed(model, **{k: v * share if k == "vram_budget_gb" else v for k, v in dials.items()})
            assert swapped.model_size() == total and swapped.loaded_size() == 0
            before = torch.cuda.memory_allocated() if ON_GPU else 0
            latent(swapped, steps=1)
            plan = residency_of(swapped).plan
            assert swapped.loaded_size() == plan.vram_bytes == residency_of(swapped).vram_bytes
            if "vram_budget_gb" in dials:
                assert swapped.loaded_size() <= dials["vram_budget_gb"] * share * 1e9, f"{kind}: {dials}"
            if ON_GPU:  # with what a dtype of the model's takes beside the file's, and the allocator's rounding
                there = torch.cuda.memory_allocated() - before
                assert abs(there - plan.vram_bytes) < 0.1 * plan.vram_bytes + 2 * MB, (there, plan.vram_bytes)
            swapped.detach()
            assert swapped.loaded_size() == 0


# --- the file


@contextlib.contextmanager
def copied(kind: str, name: str) -> Iterator[Path]:
    path = FOLDER / f"{name}{GGUF.suffix if kind == 'gguf' else SAFETENSORS.suffix}"
    shutil.copy(GGUF if kind == "gguf" else SAFETENSORS, path)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def load_from(path: Path):
    return load_diffusion_model(path) if path.suffix == ".gguf" else comfy.sd.load_diffusion_model(str(path))


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\0" * 4096)
    os.utime(path, ns=(1, 1))


def check_changed_file_is_an_error_and_no_crash() -> None:
    """Between two runs, and while a run streams from it."""
    cases = list(itertools.product(MODELS, (cut_off, rewritten), (False, True)))
    if not ON_GPU:
        # What stays of a quantised model is, on the CPU, the mapping itself: nobody survives the end of that.
        cases.remove(("gguf", cut_off, True))
    for kind, change, during in cases:
        with copied(kind, "changing") as path:
            swapped = streamed(load_from(path))
            expected = latent(swapped)
            in_memory = "no weight is in a file" in residency_of(swapped).choice.reason  # the host read it all
            try:
                if not during:
                    change(path)
                found = latent(with_change(swapped, partial(change, path)) if during else swapped)
            except (GGUFError, SourceError) as raised:
                assert path.name in str(raised) and "again" in str(raised), raised
            else:
                said = f"{kind}, {change.__name__}, during={during}: nobody noticed"
                assert in_memory and torch.equal(found, expected), said
            assert swapped.loaded_size() in (0, residency_of(swapped).vram_bytes)
            del swapped
            comfy.model_management.unload_all_models()
            gc.collect()
            shutil.copy(GGUF if kind == "gguf" else SAFETENSORS, path)
            again = streamed(load_from(path))
            assert close_to(latent(again), expected), f"{kind}: the next run"
            del again
            comfy.model_management.unload_all_models()
            gc.collect()


def with_change(model, change: Callable[[], None]):
    """The file changes after the first evaluation of the model."""
    calls = []  # type: ignore[var-annotated]

    def wrapper(apply_model: Callable, args: dict) -> torch.Tensor:
        result = apply_model(args["input"], args["timestep"], **args["c"])
        if not calls:
            change()
        calls.append(1)
        return result

    clone = model.clone()
    clone.set_model_unet_function_wrapper(wrapper)
    return clone


def check_deleted_or_replaced_file_still_streams() -> None:
    """What is open stays what it was; a new file at the same path is another one."""
    for kind in ("gguf", "plain"):
        expected = latent(MODELS[kind]())
        for replace in (False, True):
            with copied(kind, "leaving") as path:
                swapped = streamed(load_from(path), **DIALS["everything"])
                assert torch.equal(latent(swapped), expected) or ON_GPU

                def change(path: Path = path, replace: bool = replace) -> None:
                    path.unlink()
                    if replace:
                        path.write_bytes(b"something else")

                found = latent(with_change(swapped, change))
                assert torch.equal(found, latent(MODELS[kind]())) or ON_GPU
                # The next run says so, or works from what is still open; it never draws another picture.
                with contextlib.suppress(GGUFError, SourceError):
                    assert torch.equal(latent(swapped), expected) or ON_GPU
                comfy.model_management.unload_all_models()
                with contextlib.suppress(GGUFError, SourceError):
                    assert torch.equal(latent(swapped), expected) or ON_GPU
                del swapped
                comfy.model_management.unload_all_models()
                gc.collect()


def check_file_is_let_go_while_all_weights_are_resident() -> None:
    """And is opened again when a weight has to come from it: as it was, or with an error that names it."""
    if not ON_GPU:  # on the CPU the mapping is where the weights are
        return
    with copied("gguf", "shelved") as path:

        def mappings() -> int:
            process = psutil.Process()
            maps = sum(m.path == str(path) for m in process.memory_maps(grouped=False))
            return maps + sum(file.path == str(path) for file in process.open_files())

        def loaded():
            return stream(load_diffusion_model(path, disable_dynamic=True), SwapRequest())

        model = loaded()
        assert mappings(), "nothing was mapped to begin with"
        expected = latent(model)
        for _ in range(2):
            assert not residency_of(model).plan.copies and not mappings(), "all is resident, and the file still mapped"
            assert torch.equal(latent(model), expected)
            assert model.partially_unload(model.offload_device, model.loaded_size() // 4) > 0
            assert residency_of(model).plan.copies and mappings(), "weights stream, from where?"
            assert close_to(latent(model), expected)
            comfy.model_management.unload_all_models()
            assert same_bytes(bytes_of(model), bytes_of(load_diffusion_model(path, disable_dynamic=True)))
            assert close_to(latent(model), expected)
            model = loaded()
            assert torch.equal(latent(model), expected)
        contents = path.read_bytes()
        path.unlink()
        path.write_bytes(contents + b"x")
        comfy.model_management.unload_all_models()
        try:
            latent(model)
        except Exception as error:
            assert path.name in str(error), error
        else:
            raise AssertionError("another file took its place, and nobody noticed")
        model = loaded()
        assert torch.equal(latent(model), expected), "the next run"
        del model
        comfy.model_management.unload_all_models()
        gc.collect()
        assert not mappings(), "a model that is gone holds the file"


def check_file_is_let_go_where_all_that_streams_is_copied() -> None:
    """What is in VRAM and what was copied to locked RAM needs no file; a plan that streams less opens it again."""
    if not ON_GPU:
        return
    with copied("gguf", "copied") as path:

        def mapped() -> int:
            process = psutil.Process()
            return sum(m.path == str(path) for m in process.memory_maps(grouped=False)) + sum(
                file.path == str(path) for file in process.open_files()
            )

        loaded = load_diffusion_model(path, disable_dynamic=True)
        whole = bytes_of(loaded)
        model = stream(loaded, SwapRequest(vram_budget_gb=0.0066, weight_source="pinned"))
        del loaded
        assert mapped(), "nothing was mapped to begin with"
        expected = latent(load_diffusion_model(GGUF, disable_dynamic=True))
        for _ in range(2):
            for _ in range(2):
                assert close_to(latent(model), expected)
                residency = residency_of(model)
                assert residency.choice.source.kind == "pinned" and residency.plan.copies
                assert not mapped(), "all is copied, and the file still mapped"
                assert same_bytes(bytes_of(model), whole), "what streams is found in its copy"
            held = residency.plan.streamed_bytes
            assert model.partially_unload(model.offload_device, model.loaded_size() // 20) > 0
            assert residency.plan.streamed_bytes > held and not mapped()
            assert close_to(latent(base.with_lora(model)), latent(base.with_lora(load_diffusion_model(GGUF))))
            assert close_to(latent(model), expected) and not mapped()
            comfy.model_management.unload_all_models()
            assert mapped() and same_bytes(bytes_of(model), whole), "weights are at home in the file again"
        del model, residency
        comfy.model_management.unload_all_models()
        gc.collect()
        assert not mapped(), "a model that is gone holds the file"


def check_copies_stand_in_for_what_streams() -> None:
    """The same with a stand-in for the GPU's copies and its locked memory, where what stays keeps the file open."""
    if ON_GPU:
        return
    own, left = pack.offload.residency.device_for, compat.pinned_memory_left
    pack.offload.residency.device_for = lambda device: FakeDevice("late", eager=True, registrar=NotingRegistrar())
    compat.pinned_memory_left = lambda: 1 << 30
    try:
        plain = load_diffusion_model(GGUF)
        expected, whole = latent(plain), bytes_of(plain)
        adapted = latent(base.with_lora(plain))
        model = stream(load_diffusion_model(GGUF), SwapRequest(vram_budget_gb=0.0066, weight_source="pinned"))
        for _ in range(2):
            assert torch.equal(latent(model), expected)
            residency = residency_of(model)
            copies = residency._streaming.copies()
            assert residency.choice.source.kind == "pinned" and copies
            residency.shelf.put_away((), residency._terms.located, copies)
            residency._streaming.forget_homes()
            assert all(slot.location(residency._terms.located) is None and slot.shown is slot.home for slot in copies)
            assert torch.equal(latent(model), expected) and same_bytes(bytes_of(model), whole)
            del copies
            with planned_again(residency, 6_400_000):
                assert torch.equal(latent(model, steps=2), expected), "the plan changes between two passes"
            assert not residency.shelf.holds_any and same_bytes(bytes_of(model), whole)
            assert model.partially_unload(model.offload_device, model.loaded_size() // 20) > 0
            assert not residency.shelf.holds_any and torch.equal(latent(model), expected)
            assert torch.equal(latent(base.with_lora(model)), adapted)
            comfy.model_management.unload_all_models()
            assert same_bytes(bytes_of(model), whole)
    finally:
        pack.offload.residency.device_for, compat.pinned_memory_left = own, left


@contextlib.contextmanager
def planned_again(residency, budget: int) -> Iterator[None]:
    """At the first pass from now on, for another budget."""
    made, keep = residency.plans_made, pack.offload.residency.replan

    def another(plan, blocks, link, budget_bytes, steps):
        if residency.plans_made > made:
            return plan, ""
        return make_plan(blocks, link, budget, outside_bytes=plan.outside_bytes), "for the test"

    pack.offload.residency.replan = another
    residency.times.complete = lambda: True
    try:
        yield
        assert residency.plans_made > made, "nothing was planned"
    finally:
        pack.offload.residency.replan = keep
        del residency.times.complete


def check_room_is_made_for_others_when_the_file_is_gone() -> None:
    """Weights that would have to stream now cannot; that is no business of the model that needs the room."""
    with copied("gguf", "gone") as path:
        swapped = streamed(load_from(path), vram_budget_gb=0.05)
        expected = latent(swapped)
        assert not residency_of(swapped).plan.copies
        (loaded,) = (m for m in comfy.model_management.current_loaded_models if m.model is swapped)
        path.unlink()
        assert loaded.model_unload(swapped.loaded_size() // 20) is True, "then all of it goes"
        comfy.model_management.current_loaded_models.remove(loaded)
        assert swapped.loaded_size() == 0 and not residency_of(swapped).arranged
        with contextlib.suppress(GGUFError, SourceError):
            assert torch.equal(latent(swapped), expected)
        del swapped, loaded
        comfy.model_management.unload_all_models()
        gc.collect()


def check_reads_that_fail() -> None:
    """From the third read of a run on, the file ends early or the disk reports an error; then all is well again."""
    model = load_diffusion_model(GGUF)
    expected, read = latent(model), WeightFile._read_at
    swapped = streamed(model, **DIALS["from disk"])  # through the smallest ring, so every pass reads
    assert torch.equal(latent(swapped), expected) or ON_GPU
    homes = bytes_of(swapped)
    for failure in (0, OSError(5, "Input/output error")):
        for failures in (range(2, 10**6), range(2, 3)):
            calls = itertools.count()

            def failing(file: WeightFile, view: memoryview, offset: int, that=(calls, failure, failures)) -> int:
                if next(that[0]) not in that[2]:
                    return read(file, view, offset)
                if isinstance(that[1], OSError):
                    raise that[1]
                return that[1]

            WeightFile._read_at = failing
            try:  # of a model so small a GPU's source has read some steps ahead before the third read
                found = latent(swapped, steps=2 if len(failures) == 1 else 16)
            except SourceError as error:
                assert GGUF.name in str(error), error
                assert "cut off" in str(error) or "check the disk" in str(error), error
            else:  # one read that failed ahead of time is tried once more
                assert len(failures) == 1 and (torch.equal(found, expected) or ON_GPU), f"{failure!r} went unnoticed"
            finally:
                WeightFile._read_at = read
            assert next(calls) > 2
            assert same_bytes(bytes_of(swapped), homes)
            assert torch.equal(latent(swapped), expected) or ON_GPU, "the next run"


def check_short_reads_are_read_on() -> None:
    model = load_diffusion_model(GGUF)
    expected, read = latent(model), WeightFile._read_at

    def short(file: WeightFile, view: memoryview, offset: int) -> int:
        return read(file, view[: max(len(view) // 3, 1)], offset)

    WeightFile._read_at = short
    try:
        assert torch.equal(latent(streamed(model, blocks_to_swap=BLOCKS, weight_source="disk")), expected) or ON_GPU
    finally:
        WeightFile._read_at = read


# --- cancelled


def check_cancelled_wherever_loading_looks() -> None:
    """While weights are read, locked or copied, also to make room for another model. What was there stays whole."""
    for load in MODELS.values():
        swapped = streamed(load(), weight_source="pinned")
        homes, expected = bytes_of(swapped), latent(swapped)
        for moves in (swapped.detach, partial(swapped.partially_unload, CPU, MB)):
            told = 0
            for at in itertools.count():
                comfy.model_management.current_loaded_models.clear()
                try:
                    with cancelling(at) as asked:
                        moves()
                        latent(swapped)
                    break
                except Interrupt:
                    told = asked[0]
                    assert residency_of(swapped).at_home and swapped.loaded_size() == 0, at
                    assert same_bytes(bytes_of(swapped), homes), at
                    assert torch.equal(latent(swapped), expected), at
            assert told, "nothing was told"


@contextlib.contextmanager
def cancelling(at: int) -> Iterator[list[int]]:
    """The user cancels when the streamer says for the `at`-th time how far it is."""
    asked = [0]

    @contextlib.contextmanager
    def watched(what: str, total: int) -> Iterator[Callable[[int], None]]:
        def told(nbytes: int) -> None:
            asked[0] += 1
            if asked[0] > at:
                raise Interrupt

        told(0)
        yield told

    own = pack.offload.streamed_patcher.watched
    pack.offload.streamed_patcher.watched = watched
    try:
        yield asked
    finally:
        pack.offload.streamed_patcher.watched = own


# --- no room


class Said(logging.Handler):
    """What the streamer's log says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    said, logger = Said(), logging.getLogger("sluice.offload")
    logger.addHandler(said)
    try:
        yield said.lines
    finally:
        logger.removeHandler(said)


@contextlib.contextmanager
def refusing(numbers: set[int]) -> Iterator[list[int]]:
    """The device refuses these of the allocations from now on."""
    device = type(device_for(comfy.model_management.get_torch_device()))
    allocate, asked = device.allocate, []

    def allocate_or_not(self: object, nbytes: int) -> torch.Tensor:
        asked.append(nbytes)
        if len(asked) - 1 in numbers:
            raise torch.OutOfMemoryError("out of memory, for the test")
        return allocate(self, nbytes)

    device.allocate = allocate_or_not
    try:
        yield asked
    finally:
        device.allocate = allocate


def check_smaller_plan_where_memory_is_refused() -> None:
    for kind, _, expected, _ in pairs():
        model = MODELS[kind]()
        plenty = 0.9 * model.model_size() / 1e9
        normal = streamed(model, vram_budget_gb=plenty)
        latent(normal, steps=1)
        for numbers in ({0}, {1}, {0, 1}):
            swapped = streamed(model, vram_budget_gb=plenty)
            with refusing(numbers) as asked, listening() as lines:
                found = latent(swapped)
            assert torch.equal(found, expected) or ON_GPU, f"{kind}, {numbers}"
            if asked and 0 in numbers:
                assert any("out of memory" in line and "planning again for less" in line for line in lines), lines
                assert residency_of(swapped).plan.vram_bytes < residency_of(normal).plan.vram_bytes
        swapped = streamed(model, vram_budget_gb=plenty)
        with refusing(set(range(100))):
            try:
                latent(swapped)
            except RuntimeError as error:
                assert "free VRAM" in str(error) or "memory" in str(error)
            else:
                raise AssertionError("memory that was refused a hundred times was not missed")
        assert swapped.loaded_size() == 0
        assert torch.equal(latent(swapped), expected) or ON_GPU, f"{kind}: the next run"


if __name__ == "__main__":
    base.main(globals())
