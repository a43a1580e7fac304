"""Checks of weights that are used where their file is mapped: the same bits as copied ones, and nothing left behind.

Run as `model_checks.py` is, whose modes and host set-up these checks share. Unified memory is forced: on a GPU of any
kind the mapping is registered and read over the bus, on the CPU the layers get tensors over the mapping.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from host import model_checks as base  # switches the host to the mode that the command line names, so it comes first

import comfy.model_management  # isort: skip
import torch  # isort: skip
from host import encoder_files, patch_checks, stage_checks
from host.model_checks import FOLDER, GGUF, MODE, ON_GPU, file_is_mapped, latent, weights, with_lora
from pack.loaders.diffusion import ATTACHMENT, load_diffusion_model
from pack.loaders.quant.layout import is_gguf
from pack.loaders.text_encoder import load_text_encoder
from pack.offload import device_view, unified
from pack.offload.attach import apply_block_swap
from pack.offload.attach_unified import in_place_if_wanted, in_place_of, state_of, use_in_place, wanted
from pack.offload.costs import SwapRequest
from pack.offload.release import release
from pack.offload.streamed_patcher import residency_of
from safetensors.torch import load_file

RUNG = unified.REGISTERED if ON_GPU else unified.MAPPING


@contextmanager
def mode(word: str) -> Iterator[None]:
    unified.set_mode(word)
    try:
        yield
    finally:
        unified.set_mode(unified.OFF)


def classic():
    return load_diffusion_model(GGUF, disable_dynamic=True)


def unload() -> None:
    for entry in list(comfy.model_management.current_loaded_models):
        entry.model_unload()
        comfy.model_management.current_loaded_models.remove(entry)


def check_same_bits_as_copied_weights() -> None:
    expected = latent(classic())
    with mode(unified.FORCE):
        model = use_in_place(classic())
        assert torch.equal(latent(model), expected)
        state = in_place_of(model)
        assert state.window.rung == RUNG, state.reason
        assert torch.equal(latent(model), expected), "a second run differs from the first"
        unload()
        assert state.window is None and not state.slots
        assert torch.equal(latent(model), expected), "loaded again, it differs"


def check_weights_are_the_mapping() -> None:
    with mode(unified.FORCE):
        model = use_in_place(classic())
        file = model.get_attachment(ATTACHMENT).file
        total, whole = sum(info.nbytes for info in file.tensors.values()), model.clone().model_size()
        latent(model)
    state = in_place_of(model)
    assert state.nbytes > 0.8 * total
    assert model.loaded_size() < 0.2 * total, "what is in place counts as if it were on the device"
    assert model.model_size() == model.clone().model_size() == model.clone().clone().model_size() == whole
    seen = 0
    for name, weight in weights(model).items():
        info = file.tensors[name.removeprefix("diffusion_model.")]
        if weight._params.ggml_type is not info.ggml_type:
            continue  # a small tensor, dequantised when it was loaded
        assert weight._qdata.device.type == ("cuda" if ON_GPU else "cpu"), name
        if ON_GPU:
            spans = [(there.data_ptr(), there.data_ptr() + there.nbytes) for *_, there in state.window._spans]
            assert any(start <= weight._qdata.data_ptr() < stop for start, stop in spans), name
        else:
            view = torch.frombuffer(file.view(name.removeprefix("diffusion_model.")), dtype=torch.uint8)
            assert weight._qdata.data_ptr() == view.data_ptr(), name
        seen += 1
    assert seen > 40


def check_unloading_lets_go_of_the_file() -> None:
    gc.collect()
    with mode(unified.FORCE):
        model = use_in_place(classic())
        latent(model)
        assert file_is_mapped()
        release("diffusion_model", "dispose")
        gc.collect()
        assert not file_is_mapped(), "something still looks at the mapping"
        expected = latent(classic())
        assert torch.equal(latent(model), expected), "after its file was opened again, it differs"
        unload()


def check_model_that_dies_while_loaded_lets_go() -> None:
    gc.collect()
    before = len(device_view._living)
    with mode(unified.FORCE):
        model = use_in_place(classic())
        latent(model)
        assert len(device_view._living) > before
        unload()
        del model
    gc.collect()
    assert len(device_view._living) == before


def check_lora_at_use() -> None:
    expected = [latent(with_lora(classic(), strength)) for strength in (1.0, 0.5)]
    with mode(unified.FORCE):
        model = use_in_place(classic())
        assert torch.equal(latent(with_lora(model)), expected[0])
        window = in_place_of(model).window
        assert torch.equal(latent(with_lora(model, 0.5)), expected[1])
        assert in_place_of(model).window is window, "another strength took the weights out of their place"
        assert torch.equal(latent(model), latent(classic()))
        unload()


def check_hooks() -> None:
    if MODE == "gpu-dynamic":
        return  # the host's hooks and its pages are looked at elsewhere
    expected = patch_checks.hooked_latent(classic())
    with mode(unified.FORCE):
        assert torch.equal(patch_checks.hooked_latent(use_in_place(classic())), expected)
        unload()


def check_plain_weights_that_the_host_patches() -> None:
    """By a patch, which it writes into a copy, and by a hook, which it writes into the weight."""
    if ON_GPU:
        return  # the file's float32 is computed with in 16 bits there, and so no weight is plain

    def made():
        return load_diffusion_model(patch_checks.plain_file(), disable_dynamic=True)

    with mode(unified.FORCE):
        model = use_in_place(made())
        latent(model)
        assert not any(is_gguf(slot.home) for slot in in_place_of(model).slots)
        names = {id(p): name for name, p in model.model.named_parameters()}
        plain = [names[id(slot.shown)] for slot in in_place_of(model).slots][:4]
        before = [model.model.get_parameter(name).clone() for name in plain]
        patches = {name: ("diff", (torch.full_like(w, 0.01),)) for name, w in zip(plain, before, strict=True)}
        unload()

        def patched(patcher) -> torch.Tensor:
            clone = patcher.clone()
            assert set(clone.add_patches(patches)) == set(plain)
            return latent(clone)

        assert torch.equal(patched(model), patched(made()))
        assert torch.equal(latent(model), latent(made()))
        adapter = load_file(FOLDER / "lora.safetensors")
        assert torch.equal(
            patch_checks.hooked_latent(model, adapter=adapter), patch_checks.hooked_latent(made(), adapter=adapter)
        )
        unload()
        now = [model.model.get_parameter(name) for name in plain]
        assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True)), "the file's own numbers changed"


def check_block_swap_takes_over() -> None:
    expected = latent(classic())
    with mode(unified.FORCE):
        model = use_in_place(classic())
        latent(model)
        swapped = apply_block_swap(model, SwapRequest(blocks_to_swap=4))
        assert in_place_of(swapped) is None and residency_of(swapped) is not None
        assert in_place_of(model).window is None, "two networks look through one window"
        assert torch.equal(latent(swapped), expected)
        assert torch.equal(latent(model), expected) and in_place_of(model).window is not None
        unload()


def check_switched_off_is_the_ordinary_way() -> None:
    expected = latent(classic())
    with mode(unified.FORCE):
        model = use_in_place(classic())
    assert torch.equal(latent(model), expected)
    state = state_of(model)
    assert (state["rung"], state["bytes"], state["reason"]) == (None, 0, "switched off")
    assert model.loaded_size() >= 0.9 * model.model_size()
    unload()


def check_only_who_wants_it() -> None:
    assert wanted() == (False, "switched off")
    with mode(unified.AUTO):
        found, why = wanted()
        assert not found and ("memory of its own" in why if ON_GPU else "CPU" in why), why
        assert in_place_of(in_place_if_wanted(classic())) is None
    with mode(unified.FORCE):
        assert wanted()[0]
        model = in_place_if_wanted(classic())
        assert in_place_of(model) is not None
        again = model.cached_patcher_init[0](*model.cached_patcher_init[1], disable_dynamic=True)
        assert in_place_of(again) is not None and again.model is not model.model


def check_dynamic_model_is_refused() -> None:
    if MODE != "gpu-dynamic":
        return
    try:
        use_in_place(load_diffusion_model(GGUF))
    except ValueError as error:
        assert "disable_dynamic" in str(error)
    else:
        raise AssertionError("a dynamic model went through")


def check_text_encoder() -> None:
    if MODE == "gpu-dynamic":
        return  # the file is made from a network of the host's, whose weights are not there under dynamic VRAM
    path = stage_checks.ENCODER
    stage_checks.text_encoder()  # makes the file

    def encoded(in_place: bool) -> torch.Tensor:
        clip = load_text_encoder([path], stage_checks.TINY.clip_type, disable_dynamic=True)
        if in_place:
            in_place_if_wanted(clip.patcher)
            assert in_place_of(clip.patcher) is not None
        picture = stage_checks.Picture.__new__(stage_checks.Picture)
        picture.clip = clip
        result = picture.encode_text()
        if in_place:
            assert in_place_of(clip.patcher).nbytes > 0, state_of(clip.patcher)["reason"]
        unload()
        return result

    expected = encoded(False)
    with mode(unified.FORCE):
        assert torch.equal(encoded(True), expected)


if __name__ == "__main__":
    with encoder_files.shrunk(stage_checks.TINY):
        base.main(globals())
