"""Checks of the host's multi-GPU nodes on our models: whatever device computes what, the latent is that of one GPU.

Run as `model_checks.py` is, whose modes and host set-up these checks share. `gpu-classic` and `gpu-dynamic` need two
GPUs of one kind. In `classic` the CPU stands for both, as `cpu` and as `cpu:0`: what the nodes, the worker threads and
our loaders do with each other is the same there, and what a second GPU adds (its context, its kernels) is not seen.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from host import model_checks as base  # switches the host to the mode that the command line names, so it comes first

import comfy.model_management  # isort: skip
import comfy.ops  # isort: skip
import torch  # isort: skip
from comfy_extras import nodes_multigpu  # isort: skip
from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode, SelectCLIPDeviceNode, SelectModelDeviceNode  # isort: skip
from host import encoder_files, stage_checks
from host.model_checks import GGUF, ON_GPU, with_lora
from host.patch_checks import CPU
from host.swap_checks import BLOCKS, LESS, latent, plain_model
from pack.loaders.diffusion import load_diffusion_model
from pack.loaders.patch_at_use import PatchAtUse
from pack.offload.attach import apply_block_swap, stream
from pack.offload.costs import SwapRequest
from pack.offload.streamed_patcher import residency_of

DEVICES = (
    [torch.device("cuda", 0), torch.device("cuda", 1)] if ON_GPU else [torch.device("cpu"), torch.device("cpu", 0)]
)
Interrupt = comfy.model_management.InterruptProcessingException


def streaming(**dials: Any) -> Any:
    return stream(load_diffusion_model(GGUF, disable_dynamic=True), SwapRequest(**dials))


KINDS: dict[str, Callable[[], Any]] = {
    "resident": lambda: streaming(blocks_to_swap=0),
    "streamed": lambda: streaming(blocks_to_swap=BLOCKS),
    "some of each block": lambda: streaming(vram_budget_gb=LESS),
    "applied": lambda: apply_block_swap(load_diffusion_model(GGUF), SwapRequest(blocks_to_swap=BLOCKS)),
    "safetensors": lambda: apply_block_swap(plain_model(), SwapRequest(blocks_to_swap=BLOCKS)),
    "the host's": lambda: load_diffusion_model(GGUF),
}


def two_calls(model: Any) -> torch.Tensor:
    """A latent of two texts of different lengths: one GPU also computes them one after the other."""
    return latent(model, negative_tokens=154)


def split(model: Any) -> Any:
    comfy.model_management.cleanup_models_gc()  # as the executor does before a prompt
    # The node stumbles over models that were collected with what they are clones of, whose network lives.
    loaded = comfy.model_management.current_loaded_models
    loaded[:] = [entry for entry in loaded if entry.model is not None]
    return MultiGPUCFGSplitNode.execute(model, 2).args[0]


def clone_of(model: Any) -> Any:
    """What the host made for the second device."""
    (clone,) = model.get_additional_models_with_key("multigpu")
    assert clone.load_device == DEVICES[1], clone.load_device
    return clone


@contextmanager
def computing(*models: Any) -> Iterator[list[tuple[int, torch.device, str]]]:
    """Which of the networks computes, on which device, in which thread."""
    seen: list[tuple[int, torch.device, str]] = []

    def watching(number: int) -> Callable:
        def hook(module: Any, args: tuple) -> None:
            seen.append((number, args[0].device, threading.current_thread().name))

        return hook

    handles = [m.model.diffusion_model.register_forward_pre_hook(watching(n)) for n, m in enumerate(models)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def check_both_compute_and_the_latent_is_equal() -> None:
    for kind, made in KINDS.items():
        with torch.inference_mode():  # the executor's, which the host's worker threads are not in
            model = made()
            expected = two_calls(model)
            both = split(model)
            with computing(both, clone_of(both)) as seen:
                runs = [two_calls(both) for _ in range(3)]
            assert all(torch.equal(run, expected) for run in runs), kind
            assert {(n, device.index if ON_GPU else n) for n, device, _ in seen} == {(0, 0), (1, 1)}, (kind, seen)
            assert len({thread for *_, thread in seen}) > 1, kind
            assert torch.equal(two_calls(model), expected), f"{kind}: the model itself changed"
        nothing_left(both)


def check_each_device_has_its_own_plan() -> None:
    both = split(KINDS["streamed"]())
    two_calls(both)
    mine, other = residency_of(both), residency_of(clone_of(both))
    assert mine is not other and mine.plan.copies and other.plan.copies
    places = [torch.empty(0, device=device).device for device in DEVICES]  # as tensors name it: a CPU has no index
    assert [r._device.torch_device for r in (mine, other)] == places
    assert mine.steps and other.steps
    nothing_left(both)


def check_loras() -> None:
    for kind in ("streamed", "resident"):
        model = KINDS[kind]()
        plain = two_calls(model)
        for strength in (1.0, 0.5):
            patched = with_lora(model, strength)
            expected = two_calls(patched)
            assert not torch.equal(expected, plain)
            assert torch.equal(two_calls(split(patched)), expected), (kind, strength)
            assert torch.equal(two_calls(with_lora(split(model), strength)), expected), (kind, strength)
        assert torch.equal(two_calls(model), plain), kind


def check_a_device_keeps_its_loras_when_another_unloads() -> None:
    for kind in ("streamed", "resident", "the host's"):
        both = split(with_lora(KINDS[kind](), 1.0))
        expected = two_calls(both)
        mine, others = (functions_of(model) for model in (both, clone_of(both)))
        assert len(mine) == len(others) > 0 and not {id(f) for f in mine} & {id(f) for f in others}, kind
        # To the CPU nothing is copied, so another device stands for both there.
        places = DEVICES if ON_GPU else [torch.device("meta")] * 2
        for functions, place in zip((mine, others), places, strict=True):
            for function in functions:
                function.move_to(place)
        kept = [function.factors(places[1]) for function in others]
        assert all(function.move_to(CPU) == function.nbytes for function in mine), f"{kind}: too much"
        both.detach()
        assert all(f.factors(places[1]) is before for f, before in zip(others, kept, strict=True)), f"{kind}: copied"
        assert torch.equal(two_calls(both), expected), kind
        assert [id(f) for f in functions_of(clone_of(both))] == [id(f) for f in others], f"{kind}: made anew"
        nothing_left(both)


def functions_of(model: Any) -> list[PatchAtUse]:
    """What patches the loaded layers of a model at use."""
    layers = model.model.diffusion_model.modules()
    return [f for layer in layers for f in getattr(layer, "weight_function", ()) if isinstance(f, PatchAtUse)]


def check_block_swap_after_the_split() -> None:
    model = load_diffusion_model(GGUF)
    expected = two_calls(model)
    both = apply_block_swap(split(model), SwapRequest(blocks_to_swap=BLOCKS))
    assert all(torch.equal(two_calls(both), expected) for _ in range(2))
    assert residency_of(both).plan.copies and residency_of(clone_of(both)).plan.copies
    nothing_left(both)


def check_broken_off_in_a_worker() -> None:
    both = split(KINDS["streamed"]())
    expected = two_calls(both)

    def stop(*_: Any) -> None:
        raise Interrupt

    for network in (both.model.diffusion_model, clone_of(both).model.diffusion_model):
        handle = network.joint_blocks[2].register_forward_pre_hook(stop)
        try:
            two_calls(both)
            raise AssertionError("not broken off")
        except Interrupt:
            handle.remove()
        assert torch.equal(two_calls(both), expected)
    nothing_left(both)


def check_model_on_a_chosen_device() -> None:
    for kind, made in KINDS.items():
        model = made()
        expected = two_calls(model)
        for choice, device in (("gpu:1", DEVICES[1]), ("gpu:0", DEVICES[0]), ("default", DEVICES[0])):
            chosen = SelectModelDeviceNode.execute(model, choice).args[0]
            assert chosen.load_device == device, (kind, choice)
            with computing(chosen) as seen:
                assert torch.equal(two_calls(chosen), expected), (kind, choice)
            assert {there.index for _, there, _ in seen} == ({device.index} if ON_GPU else {None}), (kind, seen)
        split_after = split(SelectModelDeviceNode.execute(model, "gpu:0").args[0])
        assert torch.equal(two_calls(split_after), expected), kind
        nothing_left(model, chosen, split_after)


def check_text_encoder_on_a_chosen_device() -> None:
    picture, texts = stage_checks.Picture(), []
    for choice, device in (("gpu:0", DEVICES[0]), ("gpu:1", DEVICES[1])):
        clip = SelectCLIPDeviceNode.execute(picture.inputs[1], choice).args[0]
        assert clip.patcher.load_device == device
        assert clip.cond_stage_model is clip.patcher.model, "one network is loaded and another one computes"
        picture.clip = clip
        texts.append(picture.encode_text().cpu())
    assert torch.equal(*texts)


def nothing_left(*models: Any) -> None:
    """Of what was loaded, on any device."""
    for model in models:
        for patcher in (model, *model.get_additional_models_with_key("multigpu")):
            patcher.detach()
    comfy.model_management.current_loaded_models.clear()
    gc.collect()
    base.compilers_done()
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("sluice")]
    assert not names, names


def stand_in() -> None:
    """Two names of the CPU for two GPUs, where there is none."""
    management: Any = comfy.model_management
    management.get_all_torch_devices = lambda exclude_current=False: list(DEVICES)
    management.resolve_gpu_device_option = lambda option: {f"gpu:{n}": d for n, d in enumerate(DEVICES)}.get(option)

    def as_for_a_gpu(patcher: Any, device: Any, *_: Any, **__: Any) -> Any:
        """A model that is sent to the CPU is not made anew."""
        chosen = DEVICES[0] if device is None else device
        return nodes_multigpu._retarget_patcher(patcher, chosen, patcher.offload_device)

    nodes_multigpu._apply_patcher_device = as_for_a_gpu


def settle_attention() -> None:
    """torch 2.11 computes the very first attention of a process on an H200 another way than all later ones: from there
    on the first pass differs by 2e-5 from the next, on whichever device came first."""
    for device in DEVICES:
        states = torch.randn(1, 4, 93, 64, dtype=torch.float16, device=device)
        comfy.ops.scaled_dot_product_attention(states, states, states)


if __name__ == "__main__":
    if ON_GPU:
        settle_attention()
    else:
        stand_in()
    with encoder_files.shrunk(stage_checks.TINY):
        base.main(globals())
