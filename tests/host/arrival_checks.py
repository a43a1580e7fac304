"""Checks of GGUF models that the host loads whole: brought through locked pages, they are the same and leave nothing.

Run as `model_checks.py` is, whose modes and host set-up these checks share. On the CPU no page can be locked; there a
registrar that only takes notes stands for the driver, the weights arrive in memory of their own, and the host then
sends them home as it would to any device where they are already.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from host import model_checks as base  # switches the host to the mode that the command line names, so it comes first

import comfy.model_management  # isort: skip
import torch  # isort: skip
from fake_device import NotingRegistrar
from host import encoder_files, patch_checks, stage_checks
from host.model_checks import CPU, GGUF, MODE, ON_GPU, latent, weights, with_lora
from host.unified_checks import unload
from pack.loaders import compat, progress
from pack.loaders.diffusion import load_diffusion_model
from pack.loaders.text_encoder import load_text_encoder
from pack.offload import ahead, arrival, attach_arrival, kept, residency, seats
from pack.offload.attach import apply_block_swap
from pack.offload.attach_arrival import ArrivingPatcher, arriving
from pack.offload.attach_stages import attach_stages
from pack.offload.costs import SwapRequest
from pack.offload.device import HostDevice, device_for
from pack.offload.release import release
from pack.offload.stages import StagePolicy
from pack.offload.streamed_patcher import StreamedPatcher

Interrupt = comfy.model_management.InterruptProcessingException


NOTES = NotingRegistrar()


def noting(device: torch.device) -> Any:
    """The device, or the CPU with a registrar."""
    place = device_for(device)
    if isinstance(place, HostDevice):
        place.registrar, place.copies_by_itself = NOTES, True
    return place


@contextmanager
def arrivals() -> Iterator[list[set[int]]]:
    """What was copied through locked pages, whatever its size: the numbers of bytes of each time."""
    copied, worth, least, seen = arrival.copied, arrival.WORTH_LOCKING, ahead.LEAST_BYTES, []
    left = compat.pinned_memory_left
    if not ON_GPU:
        compat.pinned_memory_left = lambda: 1 << 30  # the host locks no memory on a CPU

    def noted(given: Any, *args: Any) -> Any:
        there, refusal = copied(given, *args)
        assert not refusal, refusal
        seen.append({weight.nbytes for weight in given.values()})
        return there, refusal

    arrival.copied, arrival.WORTH_LOCKING, ahead.LEAST_BYTES = noted, 1, 1
    attach_arrival.device_for = residency.device_for = seats.device_for = noting
    try:
        yield seen
    finally:
        arrival.copied, arrival.WORTH_LOCKING, ahead.LEAST_BYTES = copied, worth, least
        attach_arrival.device_for = residency.device_for = seats.device_for = device_for
        compat.pinned_memory_left = left
    assert not NOTES.registered


def classic() -> Any:
    return load_diffusion_model(GGUF, disable_dynamic=True)


def check_model() -> None:
    expected = latent(classic())
    with arrivals() as seen:
        model = arriving(classic())
        home = {name: weight._qdata.data_ptr() for name, weight in weights(model).items()}
        largest = max(weight._qdata.nbytes for weight in weights(model).values())
        for run in range(3):
            assert torch.equal(latent(model), expected), run
            assert {weight._qdata.device.type for weight in weights(model).values()} == {"cuda" if ON_GPU else "cpu"}
            if run:
                unload()
                assert {name: weight._qdata.data_ptr() for name, weight in weights(model).items()} == home
    assert len(seen) == 2, "a run without a load between brought them again"
    assert all(largest in sizes for sizes in seen)


def check_lora() -> None:
    expected = [latent(with_lora(classic(), strength)) for strength in (1.0, 0.5)]
    with arrivals() as seen:
        model = arriving(classic())
        assert torch.equal(latent(with_lora(model)), expected[0])
        assert torch.equal(latent(with_lora(model, 0.5)), expected[1])
        unload()
    assert seen


def check_hooks() -> None:
    expected = patch_checks.hooked_latent(classic())
    with arrivals() as seen:
        assert torch.equal(patch_checks.hooked_latent(arriving(classic())), expected)
        unload()
    assert seen


def check_weight_that_the_host_replaces_comes_home() -> None:
    """What the host keeps to put back is the mapped weight, and no copy of it from the device."""
    name = patch_checks.WEIGHT
    with arrivals() as seen:
        model = arriving(classic())
        home = weights(model)[name]._qdata.data_ptr()
        comfy.model_management.load_models_gpu([patch_checks.widened(model)])
        assert name not in weights(model), "nothing was replaced"
        unload()
        assert weights(model)[name]._qdata.data_ptr() == home
    assert seen


def check_text_encoder() -> None:
    if MODE == "gpu-dynamic":
        return  # the file is made from a network of the host's, whose weights are not there under dynamic VRAM
    picture = stage_checks.Picture()
    expected = picture.encode_text()
    with arrivals() as seen:
        clip = load_text_encoder([stage_checks.ENCODER], stage_checks.TINY.clip_type, disable_dynamic=True)
        assert isinstance(arriving(clip.patcher), ArrivingPatcher)
        picture.clip = clip
        for _ in range(2):
            assert torch.equal(picture.encode_text(), expected)
            unload()
        release("text_encoder", "dispose")
        assert torch.equal(picture.encode_text(), expected)
        unload()
    assert len(seen) == 3


def check_what_does_not_fit_is_left_to_the_host() -> None:
    model = arriving(classic())
    model.model_patches_to(model.load_device)
    with arrivals() as seen:
        model.patch_model(model.load_device, lowvram_model_memory=model.model_size() // 2)
        assert not seen
        if ON_GPU:
            assert sum(weight.device.type == "cuda" for weight in model.model.parameters()) > 0
        model.detach()
        model.patch_model(model.load_device, lowvram_model_memory=1e32)
        assert seen
        model.detach()
    assert all(weight.device == CPU for weight in weights(model).values())


def check_cancelled() -> None:
    expected = latent(classic())
    bar, calls = progress.Progress.at, 0

    def cancelled(self: Any, done: int) -> None:
        raise Interrupt

    with arrivals() as seen:
        model = arriving(classic())
        progress.Progress.at = cancelled
        try:
            latent(model)
        except Interrupt:
            calls += 1
        finally:
            progress.Progress.at = bar
        assert calls == 1 and not seen
        assert all(weight.device == CPU for weight in weights(model).values())
        assert torch.equal(latent(model), expected)
        unload()


def check_block_swap_on_top() -> None:
    """It brings what stays by itself."""
    expected = latent(classic())
    with arrivals() as seen:
        model = apply_block_swap(arriving(classic()), SwapRequest(blocks_to_swap=2))
        assert torch.equal(latent(model), expected)
        assert ON_GPU or not seen
        unload()


def moving(policy: StagePolicy, model: Any) -> stage_checks.Picture:
    """A picture whose models come through locked pages."""
    picture = stage_checks.Picture(None, model)
    arriving(picture.inputs[1].patcher)
    picture.model, picture.clip, picture.vae = attach_stages(policy, *picture.inputs)
    return picture


def kept_bytes(picture: stage_checks.Picture) -> list[int]:
    """Of the diffusion model and of the text encoder."""
    pages = [kept.kept_of(network) for network in (picture.model.model, picture.clip.patcher.model)]
    return [0 if one is None else one.nbytes for one in pages]


def streaming(model: Any) -> Any:
    return apply_block_swap(model, SwapRequest(blocks_to_swap=2))


def check_pages_stay_locked_while_a_model_is_out_for_a_stage() -> None:
    for made in (arriving, streaming):
        stage_checks.nothing_loaded()
        _, expected = stage_checks.Picture(None, classic()).draw()
        stage_checks.nothing_loaded()
        locked = comfy.model_management.TOTAL_PINNED_MEMORY
        with arrivals():
            picture = moving(StagePolicy("cond_diffusion", **stage_checks.NO_ROOM), made(classic()))
            seen, drawn = picture.draw()
            assert stage_checks.same(drawn, expected) and seen == stage_checks.WITHOUT_ROOM["cond_diffusion"]
            asked, nbytes = NOTES.asked, kept_bytes(picture)
            assert all(nbytes) or MODE == "gpu-dynamic", nbytes
            assert comfy.model_management.TOTAL_PINNED_MEMORY - locked >= sum(nbytes)
            for _ in range(2):
                drawn = picture.draw()[1]
                assert stage_checks.same(drawn, expected)
                assert NOTES.asked == asked and kept_bytes(picture) == nbytes
            leaving = [event for event in stage_checks.told(picture.draw) if event.action == "leaves"]
            assert [event.what for event in leaving if "stay locked for its return" in event.why], leaving
            release("diffusion_model", "offload")
            assert kept_bytes(picture)[0] == 0
            picture.encode_text()
            unload()  # as the host does where another model needs the room
            assert kept_bytes(picture) == [0, 0]
            assert stage_checks.same(picture.draw()[1], expected)
            release("all", "dispose")
            assert kept_bytes(picture) == [0, 0]
        assert locked == comfy.model_management.TOTAL_PINNED_MEMORY


@contextmanager
def sent_ahead() -> Iterator[dict[str, int]]:
    """Bytes that were on their way before the host was asked for their model."""
    classes = (StreamedPatcher, ArrivingPatcher)
    nbytes: dict[str, int] = {}
    before = [one.send_ahead for one in classes]

    def noting_bytes(send: Any) -> Any:
        def noted(patcher: Any, *args: Any) -> int:
            sent, name = send(patcher, *args), type(patcher.model).__name__
            nbytes[name] = nbytes.get(name, 0) + sent
            return sent

        return noted

    for one, send in zip(classes, before, strict=True):
        one.send_ahead = noting_bytes(send)
    try:
        yield nbytes
    finally:
        for one, send in zip(classes, before, strict=True):
            one.send_ahead = send


def check_what_comes_back_is_sent_before_the_host_is_asked() -> None:
    for made in (arriving, streaming):
        stage_checks.nothing_loaded()
        with arrivals():
            picture = moving(StagePolicy("cond_diffusion", **stage_checks.NO_ROOM), made(classic()))
            networks = [picture.clip.patcher.model, picture.model.model]
            with sent_ahead() as nbytes:
                expected = picture.draw()[1]
                assert not nbytes.get(type(networks[1]).__name__) or made is arriving, "nobody knows yet what stays"
            for _ in range(2):
                with sent_ahead() as nbytes:
                    seen, drawn = picture.draw()
                assert stage_checks.same(drawn, expected)
                assert seen == stage_checks.NEXT_PICTURE["cond_diffusion"] or MODE == "gpu-dynamic", seen
                streamed = made is streaming
                names = [
                    type(one).__name__ for one in networks if MODE != "gpu-dynamic" or (streamed and one is networks[1])
                ]
                assert all(nbytes[name] > 0 for name in names), nbytes
            release("all", "offload")
            assert kept_bytes(picture) == [0, 0]


def check_small_weights_go_home_without_a_copy() -> None:
    stage_checks.nothing_loaded()
    with arrivals():
        picture = moving(StagePolicy("cond_diffusion", **stage_checks.NO_ROOM), arriving(classic()))
        if not picture.clip.patcher.is_dynamic():
            network = picture.clip.patcher.model
            homes = {name: id(weight) for name, weight in network.named_parameters()}
            for _ in range(2):
                picture.encode_text()
                away = {name: id(weight) for name, weight in network.named_parameters()}
                norms = [name for name in homes if "norm" in name]
                assert norms and all(away[name] != homes[name] for name in norms)
                picture.sample()
                assert {name: id(weight) for name, weight in network.named_parameters()} == homes
        release("all", "offload")


def check_cancelled_before_the_host_loads_what_was_sent() -> None:
    manager, load = comfy.model_management, comfy.model_management.load_models_gpu

    def cancelled(*args: Any, **kwargs: Any) -> None:
        raise Interrupt

    for made in (arriving, streaming):
        stage_checks.nothing_loaded()
        with arrivals():
            picture = moving(StagePolicy("cond_diffusion", **stage_checks.NO_ROOM), made(classic()))
            expected = picture.draw()[1]
            for stage, patcher in ((picture.encode_text, picture.clip.patcher), (picture.sample, picture.model)):
                manager.load_models_gpu = cancelled
                try:
                    with sent_ahead() as nbytes:
                        stage()
                    raise AssertionError("not cancelled")
                except Interrupt:
                    pass
                finally:
                    manager.load_models_gpu = load
                assert nbytes.get(type(patcher.model).__name__) or MODE == "gpu-dynamic"
                assert patcher.loaded_size() == 0 or patcher.is_dynamic()
                assert all(weight.device == CPU for weight in patcher.model.state_dict().values())
                if not patcher.is_dynamic():
                    pages = kept.kept_of(patcher.model)
                    assert pages.nbytes == pages.give_back(), "some are in use"
            assert stage_checks.same(picture.draw()[1], expected)
            release("all", "offload")


def check_without_the_node_nothing_stays_locked() -> None:
    for made in (arriving, streaming):
        stage_checks.nothing_loaded()
        with arrivals():
            model = made(classic())
            picture = moving(StagePolicy("cond_diffusion", **stage_checks.NO_ROOM), model)
            picture.draw()
            picture.encode_text()
            assert kept_bytes(picture)[0] or MODE == "gpu-dynamic"
            comfy.model_management.load_models_gpu([model])
            assert kept_bytes(picture)[0] == 0
            unload()


def check_the_node_may_come_before_block_swap() -> None:
    stage_checks.nothing_loaded()
    with arrivals():
        picture = moving(StagePolicy("cond_diffusion", **stage_checks.NO_ROOM), classic())
        picture.model = streaming(picture.model)
        picture.draw()
        assert kept_bytes(picture)[0] or MODE == "gpu-dynamic"
        release("all", "offload")


def check_what_the_host_forgets_is_counted_again() -> None:
    manager = comfy.model_management
    before, most = manager.TOTAL_PINNED_MEMORY, manager.MAX_PINNED_MEMORY
    manager.MAX_PINNED_MEMORY = before + 100
    compat.account_pinned(70)
    manager.TOTAL_PINNED_MEMORY = 0  # as 0.18's `unpin_memory` leaves it
    assert compat.pinned_memory_left() <= before + 30
    manager.TOTAL_PINNED_MEMORY = 0
    compat.account_pinned(-70)
    assert manager.TOTAL_PINNED_MEMORY >= 0
    manager.TOTAL_PINNED_MEMORY, manager.MAX_PINNED_MEMORY = before, most


def check_locked_memory_may_be_let_go_while_it_is_counted() -> None:
    """As the collector does, at any moment, with that of a network that is gone."""
    manager = comfy.model_management
    before, by_host = manager.TOTAL_PINNED_MEMORY, manager.PINNED_MEMORY
    compat.account_pinned(70)

    class Collected(dict):
        def copy(self) -> dict:
            manager.PINNED_MEMORY = by_host
            compat.account_pinned(-70)
            return dict(by_host)

    manager.PINNED_MEMORY = Collected()
    counting = threading.Thread(target=compat.account_pinned, args=(5,), daemon=True)
    counting.start()
    counting.join(20)
    assert not counting.is_alive(), "it waits for itself"
    compat.account_pinned(-5)
    assert before == manager.TOTAL_PINNED_MEMORY


def check_nothing_stays_locked_where_there_is_room_for_all() -> None:
    stage_checks.nothing_loaded()
    with arrivals():
        picture = moving(StagePolicy("cond_diffusion"), arriving(classic()))
        for _ in range(2):
            assert picture.draw()[0][2] == stage_checks.EVERYBODY[2]
            assert kept_bytes(picture) == [0, 0]
        unload()


def check_cancelled_on_the_way_back() -> None:
    stage_checks.nothing_loaded()
    bar = progress.Progress.at

    def cancelled(self: Any, done: int) -> None:
        raise Interrupt

    with arrivals():
        picture = moving(StagePolicy("cond_diffusion", **stage_checks.NO_ROOM), arriving(classic()))
        expected = picture.draw()[1]
        progress.Progress.at = cancelled
        try:
            picture.sample()
            raise AssertionError("not cancelled")
        except Interrupt:
            pass
        finally:
            progress.Progress.at = bar
        assert kept_bytes(picture)[0] == 0 and not picture.loaded() & {stage_checks.DIFFUSION}
        assert all(weight.device == CPU for weight in weights(picture.model).values())
        assert stage_checks.same(picture.draw()[1], expected)
        release("all", "offload")


def check_the_dynamic_patcher_is_left_alone() -> None:
    model = load_diffusion_model(GGUF)
    kind = type(model)
    assert isinstance(arriving(model), ArrivingPatcher) == (MODE != "gpu-dynamic") == (type(model) is not kind)


if __name__ == "__main__":
    with encoder_files.shrunk(stage_checks.TINY):
        base.main(globals())
