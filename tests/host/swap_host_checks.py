"""Checks of a MODEL with Block Swap beside what else the host offers: its VRAM flags, controlnets, nodes that skip
steps, and two models in one picture. The latent is always that without Block Swap.

Run as `model_checks.py` is, whose modes and host set-up these checks share.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from host import model_checks as base  # switches the host to the mode that the command line names, so it comes first

import comfy.cldm.mmdit  # isort: skip
import comfy.controlnet  # isort: skip
import comfy.latent_formats  # isort: skip
import comfy.model_management  # isort: skip
import comfy.ops  # isort: skip
import comfy.sample  # isort: skip
import comfy.samplers  # isort: skip
import torch  # isort: skip
from comfy_extras.nodes_easycache import LazyCacheNode
from host.model_checks import GGUF, ON_GPU
from host.swap_checks import BLOCKS, DIALS, LESS, MODELS, close_to, counted_waits, pairs, residency_of, streamed
from pack.loaders.diffusion import load_diffusion_model
from pack.offload.attach import apply_block_swap, stream
from pack.offload.costs import SwapRequest

VRAMState = comfy.model_management.VRAMState
STEPS = 8


def conditioning(**options: Any) -> tuple[list, list]:
    generator = torch.Generator().manual_seed(5)

    def one() -> list:
        pooled = torch.randn(1, 2048, generator=generator) * 0.1
        return [[torch.randn(1, 77, 4096, generator=generator) * 0.1, {"pooled_output": pooled, **options}]]

    return one(), one()


def picture(model: Any, noise: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """`options` are those of the conditioning and of the sampler; `steps` of them are made."""
    steps = options.pop("steps", STEPS)
    sampler = {name: options.pop(name) for name in ("start_step", "last_step", "force_full_denoise") if name in options}
    latent = torch.zeros(1, 16, 8, 8)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3)) if noise is None else noise
    start = sampler.get("start_step", 0)
    return comfy.sample.sample(
        model, torch.zeros_like(noise) if start else noise, steps, 3.0, "euler", "simple", *conditioning(**options),
        noise if start else latent, disable_pbar=True, seed=1, disable_noise=bool(start), **sampler,
    )  # fmt: skip


# --- the host's flags


@contextlib.contextmanager
def started_with(state: Any) -> Iterator[None]:
    """The host as the flag --lowvram, --novram, ... makes it; on the CPU, which knows none, as if it were a GPU."""
    management = comfy.model_management
    before = management.vram_state, management.is_device_cpu
    management.vram_state = state
    if not ON_GPU:
        management.is_device_cpu = lambda device: False
    try:
        yield
    finally:
        management.unload_all_models()
        management.vram_state, management.is_device_cpu = before


def check_flags_of_the_host() -> None:
    """Through its own decision of what a model may have. Under --highvram the host keeps in VRAM what is out of use,
    which a model that is too large for it cannot be."""
    for kind, load in MODELS.items():
        expected = picture(load(), steps=1)
        for state in (VRAMState.HIGH_VRAM, VRAMState.NORMAL_VRAM, VRAMState.LOW_VRAM, VRAMState.NO_VRAM):
            with started_with(state):
                model = load()
                candidates = [streamed(model), apply_block_swap(model, SwapRequest())]
                if kind == "gguf":
                    loaded = load_diffusion_model(GGUF, disable_dynamic=True)
                    candidates.append(stream(loaded, SwapRequest(vram_budget_gb=LESS)))
                for swapped in candidates:
                    said = f"{kind}, {state.name}, {residency_of(swapped).request}"
                    for _ in range(2):
                        assert close_to(picture(swapped, steps=1), expected), said
                        plan, plenty = residency_of(swapped).plan, residency_of(swapped).request == SwapRequest()
                        assert bool(plan.copies) == (state == VRAMState.NO_VRAM or not plenty), said
                        assert swapped.loaded_size() == plan.vram_bytes, said
                        comfy.model_management.unload_all_models()
                        assert swapped.loaded_size() == 0, said
                        devices = {p.device.type for p in swapped.model.parameters()}
                        assert devices == {"cpu"}, f"{said}: {devices} after it was unloaded"
                assert close_to(picture(model, steps=1), expected), f"{kind}, {state.name}: the model itself"


# --- controlnets


def controlnet(model: Any) -> Any:
    """One of the demo model's architecture with random weights, as the host makes it for a file."""
    config = {name: value for name, value in model.model.model_config.unet_config.items() if name != "dtype"}
    device = comfy.model_management.get_torch_device()
    make = partial(comfy.cldm.mmdit.ControlNet, num_blocks=2, control_latent_channels=16, dtype=torch.float32, **config)
    generator = torch.Generator().manual_seed(9)
    plain = make(operations=torch.nn).state_dict()  # the host's own layers may have no weights before they are loaded
    tensors = {name: torch.randn(tensor.shape, generator=generator) * 0.02 for name, tensor in plain.items()}
    network = comfy.controlnet.controlnet_load_state_dict(make(operations=comfy.ops.manual_cast), tensors)
    made = comfy.controlnet.ControlNet(network, compression_ratio=1, load_device=device)
    made.set_cond_hint(torch.randn(1, 16, 8, 8, generator=generator), 1.0, (0.0, 1.0))
    return made


def check_controlnets() -> None:
    """One that begins late and ends early, and another beside it that acts at every step."""
    for kind, model, _, swapped in pairs(**DIALS["a ring for one block"]):
        plain = picture(model)
        early = controlnet(model)
        early.set_cond_hint(early.cond_hint_original, 0.7, (0.2, 0.6))
        both = controlnet(model).set_previous_controlnet(early)
        for which, control in (("early", early), ("both", both)):
            options = {"control": control, "control_apply_to_uncond": True}
            wanted = picture(model, **options)
            assert not torch.equal(wanted, plain), f"{which} changes nothing"
            assert close_to(picture(swapped, **options), wanted), f"{kind}, {which}"
        assert close_to(picture(swapped), plain), kind


# --- steps that are skipped


def check_steps_that_are_cached() -> None:
    """The host's node that answers some steps from those before, for every architecture."""
    arguments = {"reuse_threshold": 1e9, "start_percent": 0.1, "end_percent": 0.9, "verbose": False}
    for kind, model, _, swapped in pairs(**DIALS["a ring for one block"]):
        plain = picture(model)
        wanted = picture(LazyCacheNode.execute(model=model, **arguments).args[0])
        assert not torch.equal(wanted, plain), "nothing is skipped"
        cached = LazyCacheNode.execute(model=swapped, **arguments).args[0]
        entered = counted_waits(residency_of(swapped))
        assert close_to(picture(cached), wanted), kind
        assert 0 < len(entered) < STEPS * BLOCKS, f"{kind}: {len(entered)} blocks ran"
        assert close_to(picture(swapped), plain), kind


# --- two models in one picture


def check_two_experts_stream_each_on_its_own() -> None:
    """As Wan 2.2 has them: one for the first steps, the other for the rest, each with a plan and a ring of its own."""

    def drawn(high: Any, low: Any) -> torch.Tensor:
        half = picture(high, start_step=0, last_step=STEPS // 2, force_full_denoise=False)
        return picture(low, half, start_step=STEPS // 2, force_full_denoise=True)

    for kind, load in MODELS.items():
        high, low = load(), base.with_lora(load())
        expected = drawn(high, low)
        assert not torch.equal(expected, drawn(high, high)), "the experts are alike"
        for dials in (DIALS["everything"], DIALS["every second block"]):
            experts = streamed(high, **dials), streamed(low, **dials)
            found: list[Any] = []
            for _ in range(3):
                assert close_to(drawn(*experts), expected), kind
                ours = [residency_of(expert) for expert in experts]
                facts = [(id(one.choice), one.plan, one.plans_made) for one in ours]
                assert all(one.plan.copies and one.choice for one in ours), f"{kind}: an expert does not stream"
                assert ours[0]._streaming is not ours[1]._streaming
                found.append(facts)
            assert found[0] == found[1] == found[2], f"{kind}: something was loaded or planned again"


if __name__ == "__main__":
    base.main(globals())
