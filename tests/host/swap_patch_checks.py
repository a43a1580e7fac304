"""Checks of patches on a MODEL with Block Swap: LoRAs, hooks, merges, saving, clones, of the host and of the pack.

Run as `model_checks.py` is, whose modes and host set-up these checks share. Unlike in `swap_checks.py`, what is in the
ring stays there until something takes its place: a patch that was written into it would be seen, and added again.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from host import model_checks as base  # switches the host to the mode that the command line names, so it comes first

import comfy.hooks  # isort: skip
import comfy.model_management  # isort: skip
import comfy.sd  # isort: skip
import pack.offload.residency  # isort: skip
import pack.offload.streaming  # isort: skip
import torch  # isort: skip
from comfy_extras.nodes_model_merging import ModelMergeSimple  # isort: skip
from host.model_checks import FOLDER, MODE, ON_GPU, with_lora
from host.patch_checks import close, hooked_latent
from host.swap_checks import BLOCKS, DIALS, MODELS, bytes_of, latent, pairs, residency_of, same_bytes, streamed
from pack.loaders.ops import MappedLayer
from pack.offload.attach import apply_block_swap
from pack.offload.costs import SwapRequest
from pack.offload.plan import StreamPlan
from pack.offload.streamer import BlockStreamer
from safetensors.torch import load_file

pack.offload.streaming.BlockStreamer = BlockStreamer

TIGHT = DIALS["a ring for one block"]
# A bias and a norm stay on the device while the weight of the same layer streams.
EXTRA = "diffusion_model.joint_blocks.0.x_block.attn.qkv"


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """On a GPU the host rounds a patched weight stochastically where it stays, and not where it is patched at use."""
    return bool((one - other).norm() < 0.05 * other.norm()) if ON_GPU else torch.equal(one, other)


def facts(model) -> tuple:
    """What must not change where only patches change.

    On a GPU the host takes a plain weight that it patched back from RAM, so there the weights are put in place again;
    and blocks as small as these take another time at each look, after which a plan may change: `plans_made_for`.
    """
    residency = residency_of(model)
    plan, source = residency.plan, residency.choice and residency.choice.source
    if not ON_GPU:
        return residency.plans_made, plan, source
    if isinstance(model.model.diffusion_model.joint_blocks[0].x_block.attn.qkv, MappedLayer):
        return source and source.kind
    return plan.copies, plan.vram_bytes, source and source.kind


@contextmanager
def plans_made_for() -> Iterator[list[str]]:
    """Why weights were put in place meanwhile, but for how long blocks take."""

    class Reasons(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if isinstance(record.args, tuple) and len(record.args) == 2 and isinstance(record.args[1], StreamPlan):
                whys.append(str(record.args[0]))

    whys: list[str] = []
    logger, handler = pack.offload.residency.log, Reasons(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield whys
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        whys[:] = [why for why in whys if not why.startswith("a step takes ")]


def check_lora_before_and_after_block_swap() -> None:
    for dials in (DIALS["everything"], DIALS["some of each block"], DIALS["nothing"]):
        for kind, model, plain, swapped in pairs(**dials):
            expected = latent(with_lora(model))
            assert not torch.equal(expected, plain), "the adapter changes nothing"
            before = apply_block_swap(with_lora(model), residency_of(swapped).request)
            after = with_lora(swapped)
            for candidate, wanted in ((before, expected), (after, expected), (swapped, plain), (after, expected)):
                for _ in range(2):
                    assert near(latent(candidate), wanted), f"{kind}, {dials}"
            assert near(latent(model), plain) and near(latent(before), expected)


def check_strength_changes_reload_nothing() -> None:
    for kind, model, plain, swapped in pairs(**TIGHT):
        strengths = (1.0, 0.5, -0.75, 1.0)
        expected = [latent(with_lora(model, strength)) for strength in strengths]
        assert near(latent(swapped), plain)
        known, homes = facts(swapped), bytes_of(swapped)
        with plans_made_for() as reasons:
            for strength, wanted in zip(strengths * 2, expected * 2, strict=True):
                assert near(latent(with_lora(swapped, strength)), wanted), f"{kind}: {strength}"
                assert near(latent(swapped), plain), f"{kind}: the adapter left something behind"
                assert facts(swapped) == known, f"{kind}: moved or planned again for a patch"
        assert not reasons or (ON_GPU and kind == "plain"), f"{kind}: {reasons}"
        assert same_bytes(bytes_of(swapped), homes)


def check_clones_with_other_patches_in_turn() -> None:
    for kind, model, plain, swapped in pairs(**DIALS["some of each block"]):
        clones = {strength: with_lora(swapped, strength) for strength in (0.25, 1.0)}
        clones[3.0] = with_lora(with_lora(swapped, 1.0), 2.0)
        expected = {0.25: latent(with_lora(model, 0.25)), 1.0: latent(with_lora(model))}
        expected[3.0] = latent(with_lora(with_lora(model, 1.0), 2.0))
        for strength in (0.25, 1.0, 3.0, 0.25, 3.0, 1.0):
            assert near(latent(clones[strength]), expected[strength]), f"{kind}: {strength}"
        comfy.model_management.unload_all_models()
        for strength in (3.0, 0.25):
            assert near(latent(clones[strength]), expected[strength]), f"{kind}: {strength} after unloading"
        clones.clear()
        gc.collect()
        assert near(latent(swapped), plain), kind


def check_bias_and_norm_patches() -> None:
    adapter = load_file(FOLDER / "lora.safetensors")
    shapes = {name: p.shape for name, p in MODELS["plain"]().model.named_parameters()}
    adapter |= {f"{EXTRA}.diff_b": torch.full(shapes[f"{EXTRA}.bias"], 0.5)}

    def patched(model):
        return comfy.sd.load_lora_for_models(model, None, adapter, 1.0, 0)[0]

    for kind, model, plain, swapped in pairs():
        expected = latent(patched(model))
        assert not torch.equal(expected, latent(with_lora(model))), "the bias changes nothing"
        for _ in range(2):
            found = latent(patched(swapped))
            # The host rounds the patched bias to the file's bfloat16 (2^-9 of 0.5) where it replaces it.
            assert near(found, expected) or (kind == "gguf" and (found - expected).abs().max() < 0.01), kind
            assert near(latent(swapped), plain), kind


def check_patches_survive_partial_unload() -> None:
    for kind, model, _, _ in pairs():
        expected = latent(with_lora(model))
        swapped = with_lora(streamed(model, vram_budget_gb=0.05))
        latent(swapped, steps=1)
        assert not residency_of(swapped).plan.copies
        assert swapped.partially_unload(swapped.offload_device, swapped.loaded_size() // 20) > 0
        assert residency_of(swapped).plan.copies
        assert near(latent(swapped), expected), kind
        comfy.model_management.unload_all_models()
        assert near(latent(swapped), expected), kind


# --- hooks


def check_hooks_equal_core_and_leave_nothing() -> None:
    for kind, model, plain, swapped in pairs():
        for mode in comfy.hooks.EnumHookMode:
            expected = hooked_latent(model, mode)
            homes = bytes_of(swapped)
            for _ in range(2):
                assert close(hooked_latent(swapped, mode), expected), f"{kind}, {mode}"
                assert same_bytes(bytes_of(swapped), homes), f"{kind}: the hook was written into a weight"
            assert near(latent(swapped), plain), f"{kind}: the hook left something behind"
            assert not torch.allclose(expected, hooked_latent(model, mode, scheduled=True)), "hooks change nothing"


def check_scheduled_hooks_beside_a_lora() -> None:
    for kind, model, plain, swapped in pairs(**DIALS["some of each block"]):
        expected = hooked_latent(with_lora(model, -0.5), scheduled=True)
        assert close(hooked_latent(with_lora(swapped, -0.5), scheduled=True), expected), kind
        assert near(latent(swapped), plain), kind


# --- merges, saving


def check_merges() -> None:
    for kind, model, plain, swapped in pairs():
        expected = latent(ModelMergeSimple().merge(model, with_lora(model), 0.4)[0])
        for one, other in ((swapped, with_lora(swapped)), (model, with_lora(swapped)), (swapped, with_lora(model))):
            merged = latent(ModelMergeSimple().merge(one, other, 0.4)[0])
            assert torch.allclose(merged, expected, rtol=0, atol=0.05 if ON_GPU else 1e-5), kind
        assert near(latent(swapped), plain), kind


def check_saved_weights_are_the_originals() -> None:
    path = FOLDER / f"swapped-{MODE}.safetensors"
    for kind, model, plain, swapped in pairs(**TIGHT):
        for change in (lambda m: m, with_lora):
            saved = []
            for candidate in (change(model), change(swapped)):
                latent(candidate, steps=1)  # loaded: the ring holds some of the weights, or poison
                comfy.sd.save_checkpoint(str(path), candidate)
                saved.append(load_file(path))
            assert saved[0].keys() == saved[1].keys()
            for name, tensor in saved[0].items():
                assert near(saved[1][name].float(), tensor.float()), f"{kind}: {name}"
        assert near(latent(swapped), plain), kind
    path.unlink()


def check_state_dict_is_the_model_it_was_made_from() -> None:
    for kind, model, _, swapped in pairs(**TIGHT):
        comfy.model_management.unload_all_models()
        homes = bytes_of(model)
        for _ in range(2):
            assert same_bytes(bytes_of(swapped), homes), kind
            latent(swapped, steps=1)
        assert swapped.model_size() == model.model_size()
        assert swapped.get_key_patches().keys() == model.get_key_patches().keys()


# --- the node twice


def check_applied_again_replaces_the_settings() -> None:
    for kind, model, plain, swapped in pairs():
        expected = latent(with_lora(model))
        patched = with_lora(swapped)
        latent(patched, steps=1)
        again = apply_block_swap(patched, SwapRequest(blocks_to_swap=2))
        assert near(latent(again), expected), kind
        residency = residency_of(again)
        assert len({copy.block for copy in residency.plan.copies}) == 2 and residency.request.blocks_to_swap == 2
        assert len(again.injections) == len(swapped.injections) == 1
        assert [len(found) for found in again.callbacks.values()] == [len(f) for f in swapped.callbacks.values()]
        assert near(latent(swapped), plain) and near(latent(patched), expected), kind
        assert len({copy.block for copy in residency_of(swapped).plan.copies}) == BLOCKS
        if again.cached_patcher_init is not None:
            factory, arguments = again.cached_patcher_init
            assert residency_of(factory(*arguments)).request.blocks_to_swap == 2


if __name__ == "__main__":
    base.main(globals())
