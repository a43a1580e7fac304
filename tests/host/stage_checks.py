"""Checks of Offload Mode and Release Memory inside the host: who is loaded at which stage, and what is let go of.

Run as `model_checks.py` is, whose modes and host set-up these checks share. The three stages of a picture are run one
after another as nodes run them; what the host has loaded in between is what counts. On a CPU there is always room, so
a large `target_free_vram_gb` stands for a GPU without any.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from host import model_checks as base  # switches the host to the mode that the command line names, so it comes first

import comfy.model_management  # isort: skip
import comfy.model_patcher  # isort: skip
import comfy.sd  # isort: skip
import torch  # isort: skip
from host import encoder_files, swap_checks
from host.model_checks import FOLDER, GGUF, MODE
from host.tiny_encoder import ENCODERS, TEXT, VOCABULARY
from pack.loaders.diffusion import load_diffusion_model
from pack.loaders.text_encoder import load_text_encoder
from pack.offload import attach_stages as attach_stages_module
from pack.offload import estimate, events, seats
from pack.offload.attach import apply_block_swap
from pack.offload.attach_stages import attach_stages
from pack.offload.costs import SwapRequest
from pack.offload.stages import MODES, Moment, StagePolicy
from pack.offload.streamed_patcher import StreamedPatcher, residency_of
from pack.tools.host import ROOT
from safetensors.torch import load_file

NO_ROOM = {"target_free_vram_gb": 1024.0}
TEXT_ENCODER, DIFFUSION, VAE = "text encoder", "diffusion model", "VAE"
TINY = ENCODERS["gemma2"]
ENCODER = FOLDER / "stages-gemma2.gguf"


class Picture:
    """A CLIP, one or two MODELs and a VAE, and the stages of a picture as nodes run them."""

    def __init__(self, policy: StagePolicy | None = None, model: Any = None) -> None:
        self.inputs = (model or load_diffusion_model(GGUF), text_encoder(), autoencoder())
        self.model, self.clip, self.vae = self.inputs if policy is None else attach_stages(policy, *self.inputs)

    def tokens(self) -> dict[str, list]:
        return {
            key: [[(token % VOCABULARY, weight) for token, weight in batch] for batch in batches]
            for key, batches in self.clip.tokenize(TEXT).items()
        }

    def encode_text(self) -> torch.Tensor:
        with torch.no_grad():
            return self.clip.encode_from_tokens_scheduled(self.tokens())[0][0].clone()

    def sample(self, **options: Any) -> torch.Tensor:
        return latent(self.model, **options)

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(samples.clone())

    def encode(self) -> torch.Tensor:
        return self.vae.encode(torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1)))

    def draw(self) -> tuple[list[set[str]], tuple[torch.Tensor, ...]]:
        """What is loaded after two texts, after sampling and after decoding; and what came out."""
        seen, made = [], [self.encode_text(), self.encode_text()]
        seen.append(self.loaded())
        made.append(self.sample())
        seen.append(self.loaded())
        made.append(self.decode(made[-1]))
        seen.append(self.loaded())
        return seen, tuple(made)

    def loaded(self) -> set[str]:
        mine = {DIFFUSION: self.model, TEXT_ENCODER: self.clip.patcher, VAE: self.vae.patcher}
        return {name for name, patcher in mine.items() if is_loaded(patcher)}


def latent(model: Any, **options: Any) -> torch.Tensor:
    return swap_checks.latent(model, **{"steps": 1, **options})


def text_encoder() -> comfy.sd.CLIP:
    if not ENCODER.exists():
        own = ENCODER.with_suffix(f".{os.getpid()}")  # other scripts may be about to write it, too
        encoder_files.write_model(own, TINY, encoder_files.files_of(TINY))
        own.replace(ENCODER)
    return load_text_encoder([ENCODER], TINY.clip_type)


def autoencoder() -> comfy.sd.VAE:
    tensors = {}
    for part in ("encoder", "decoder"):
        given = load_file(ROOT / "demo" / f"taesd3_{part}.safetensors")
        tensors.update({f"taesd_{part}.{name}": tensor for name, tensor in given.items()})
    tensors.update(vae_scale=torch.tensor(1.5305), vae_shift=torch.tensor(0.0609))
    dynamic = comfy.model_patcher.CoreModelPatcher  # the stand-in pages layers of this pack only
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcher
    try:
        return comfy.sd.VAE(sd=tensors)
    finally:
        comfy.model_patcher.CoreModelPatcher = dynamic


def is_loaded(patcher: Any) -> bool:
    loaded = comfy.model_management.current_loaded_models
    return any(entry.model is not None and patcher.is_clone(entry.model) for entry in loaded)


def nothing_loaded() -> None:
    comfy.model_management.unload_all_models()
    comfy.model_management.current_loaded_models.clear()  # a CPU's are in no `unload_all_models` of early hosts
    gc.collect()


def same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def told(function: Callable[[], Any]) -> list[events.Event]:
    """The events of a call."""
    assert len(events.recent_events()) <= events.KEPT
    events._events.clear()
    function()
    return list(events.recent_events())


EVERYBODY = [{TEXT_ENCODER}, {TEXT_ENCODER, DIFFUSION}, {TEXT_ENCODER, DIFFUSION, VAE}]
# Where there is no room and nobody comes back: after the texts, after sampling, after decoding.
WITHOUT_ROOM = {
    "cond_only": [{TEXT_ENCODER}, {DIFFUSION}, {DIFFUSION, VAE}],
    "cond_diffusion": [{TEXT_ENCODER}, {DIFFUSION}, {VAE}],
    "aggressive": [{TEXT_ENCODER}, set(), set()],
    "layer_streaming": [{TEXT_ENCODER}, {DIFFUSION}, {VAE}],
}
NEXT_PICTURE = {  # the VAE is still there, and whom nobody asked to leave
    "cond_only": [{TEXT_ENCODER, DIFFUSION, VAE}, {DIFFUSION, VAE}, {DIFFUSION, VAE}],
    "cond_diffusion": [{TEXT_ENCODER, VAE}, {DIFFUSION, VAE}, {VAE}],
    "aggressive": WITHOUT_ROOM["aggressive"],
    "layer_streaming": [{TEXT_ENCODER, VAE}, {DIFFUSION, VAE}, {VAE}],
}


def check_none_returns_its_inputs() -> None:
    picture = Picture(StagePolicy("none", **NO_ROOM))
    assert all(a is b for a, b in zip(picture.inputs, (picture.model, picture.clip, picture.vae), strict=True))
    assert attach_stages(StagePolicy("none")) == (None, None, None)


def check_each_mode_where_there_is_no_room() -> None:
    nothing_loaded()
    seen, expected = Picture().draw()
    assert seen == EVERYBODY
    for mode, places in WITHOUT_ROOM.items():
        nothing_loaded()
        picture = Picture(StagePolicy(mode, **NO_ROOM))
        for turn in range(3):  # a queue of three
            seen, made = picture.draw()
            assert seen == (NEXT_PICTURE[mode] if turn else places), f"{mode}, picture {turn + 1}: {seen}"
            assert same(made, expected), f"{mode}, picture {turn + 1}"


def check_nothing_moves_where_there_is_room() -> None:
    for mode in MODES.keys() - {"none", "aggressive"}:
        nothing_loaded()
        picture = Picture(StagePolicy(mode))
        moved = told(partial(everybody, picture))
        assert {event.action for event in moved} == {"begins"}, moved
    nothing_loaded()
    assert Picture(StagePolicy("aggressive")).draw()[0] == WITHOUT_ROOM["aggressive"]


def everybody(picture: Picture) -> None:
    for _ in range(2):
        seen = picture.draw()[0]
        assert seen[2] == EVERYBODY[2], seen


def check_parts_that_are_not_connected() -> None:
    """Nobody is told of a later stage, so each leaves when its own ends, as its mode wants it to leave at all."""
    for mode, text_leaves, model_leaves in (("cond_only", True, False), ("cond_diffusion", True, True)):
        nothing_loaded()
        gc.collect()
        plain = Picture()
        _, clip, _ = attach_stages(StagePolicy(mode), None, plain.inputs[1], None)
        plain.clip = clip
        plain.encode_text()
        assert (TEXT_ENCODER not in plain.loaded()) == text_leaves, mode
        del clip
        plain.clip = plain.inputs[1]
        model, none, _ = attach_stages(StagePolicy(mode), plain.inputs[0], None, None)
        assert none is None
        plain.model = model
        plain.sample()
        assert (DIFFUSION not in plain.loaded()) == model_leaves, mode
        del model, plain  # else there would be somebody who is told of sampling


def check_overrides() -> None:
    cases: dict[tuple[str, str, str], list[set[str]]] = {
        ("cond_only", "auto", "on"): WITHOUT_ROOM["cond_diffusion"],
        ("cond_diffusion", "auto", "off"): WITHOUT_ROOM["cond_only"],
        ("cond_diffusion", "off", "off"): EVERYBODY,
        ("cond_diffusion", "off", "auto"): [{TEXT_ENCODER}, {TEXT_ENCODER, DIFFUSION}, {TEXT_ENCODER, VAE}],
        ("aggressive", "off", "off"): [{TEXT_ENCODER}, {TEXT_ENCODER, DIFFUSION}, {TEXT_ENCODER, DIFFUSION}],
    }
    for (mode, cond, diffusion), places in cases.items():
        nothing_loaded()
        policy = StagePolicy(mode, offload_cond_stage=cond, offload_diffusion=diffusion, **NO_ROOM)
        seen = Picture(policy).draw()[0]
        assert seen == places, f"{mode}, {cond}, {diffusion}: {seen}"


def check_they_come_back_after_the_picture() -> None:
    nothing_loaded()
    dynamic = Picture().model.is_dynamic()  # which brings weights back when they are used
    for text, model, back in (
        ("on", "on", {TEXT_ENCODER, DIFFUSION}),
        ("off", "on", {DIFFUSION}),
        ("on", "off", {TEXT_ENCODER}),
        ("off", "off", set()),
        ("auto", "auto", set()),  # there is no room
    ):
        nothing_loaded()
        policy = StagePolicy("cond_diffusion", reload_cond_stage=text, reload_diffusion=model, **NO_ROOM)
        picture = Picture(policy)
        for _ in range(2):
            seen = picture.draw()[0]
            assert seen[1] - {VAE} == {DIFFUSION}
            assert seen[2] == {VAE, *(set() if dynamic else back)}, (text, model, seen)


def check_who_does_not_fit_stays_out() -> None:
    nothing_loaded()
    picture = Picture(StagePolicy("cond_diffusion", reload_diffusion="on", **NO_ROOM))
    if picture.model.is_dynamic():
        return
    picture.encode_text()
    samples = picture.sample()
    free = comfy.model_management.get_free_memory
    try:  # not before: the host would have loaded not a byte of them
        comfy.model_management.get_free_memory = lambda *args, torch_free_too=False: (0, 0) if torch_free_too else 0
        happened = told(partial(picture.decode, samples))
    finally:
        comfy.model_management.get_free_memory = free
    assert [event.what for event in happened if event.action == "stays out"] == ["diffusion model (SD3)"], happened
    assert picture.loaded() == set(), "the VAE was to make room"
    assert picture.draw()[0][2] == {VAE, DIFFUSION}


def check_picture_first() -> None:
    """img2img: the VAE encodes first, when the model of the last picture is still there."""
    nothing_loaded()
    plain = Picture()
    expected = plain.encode()
    picture = Picture(StagePolicy("cond_diffusion", **NO_ROOM))
    picture.encode_text()
    picture.sample()
    assert picture.loaded() == {DIFFUSION}
    assert torch.equal(picture.encode(), expected)
    assert picture.loaded() == {VAE}
    picture.encode_text()
    assert torch.equal(picture.encode(), expected)
    assert picture.loaded() == {VAE}


def check_two_diffusion_models() -> None:
    """As Wan 2.2: one node each, the CLIP and the VAE through both. All that left comes back after the picture."""
    nothing_loaded()
    policy = StagePolicy("cond_diffusion", reload_diffusion="on", **NO_ROOM)
    picture = Picture(policy)
    high = picture.model
    low, picture.clip, picture.vae = attach_stages(policy, load_diffusion_model(GGUF), picture.clip, picture.vae)
    for _ in range(2):
        picture.encode_text()
        assert not is_loaded(high) and not is_loaded(low)
        first = latent(high)
        assert is_loaded(high) and not is_loaded(picture.clip.patcher)
        assert torch.equal(latent(low), first)
        assert is_loaded(low) and not is_loaded(high)
        picture.decode(first)
        assert is_loaded(high) == is_loaded(low) == (not low.is_dynamic())


def check_lora_after_the_node() -> None:
    nothing_loaded()
    picture = Picture(StagePolicy("cond_diffusion", **NO_ROOM))
    adapter = load_file(FOLDER / "lora.safetensors")
    plain_model, _ = comfy.sd.load_lora_for_models(*picture.inputs[:2], adapter, 1.0, 1.0)
    expected = latent(plain_model)
    nothing_loaded()
    picture.model, picture.clip = comfy.sd.load_lora_for_models(picture.model, picture.clip, adapter, 1.0, 1.0)
    picture.clip = picture.clip.clone()
    seen, made = picture.draw()
    assert seen == WITHOUT_ROOM["cond_diffusion"] and torch.equal(made[2], expected)


def check_block_swap_before_the_node() -> None:
    for mode in ("layer_streaming", "cond_diffusion"):
        nothing_loaded()
        model = load_diffusion_model(GGUF)
        expected = latent(model)
        swapped = apply_block_swap(model, SwapRequest(blocks_to_swap=4))
        picture = Picture(StagePolicy(mode, **NO_ROOM), swapped)
        assert residency_of(picture.model) is residency_of(swapped), "its dials were replaced"
        seen, made = picture.draw()
        assert seen == WITHOUT_ROOM[mode] and torch.equal(made[2], expected)
    assert isinstance(Picture(StagePolicy("layer_streaming")).model, StreamedPatcher)


def check_batches_and_broken_off_runs() -> None:
    for mode, places in WITHOUT_ROOM.items():
        nothing_loaded()
        picture = Picture(StagePolicy(mode, **NO_ROOM))
        expected = latent(picture.inputs[0], batch=3)
        picture.encode_text()

        def stop(*args: Any, **kwargs: Any) -> None:
            raise comfy.model_management.InterruptProcessingException

        network = picture.model.model.diffusion_model
        handle = network.register_forward_pre_hook(stop)
        try:
            picture.sample(batch=3)
            raise AssertionError("not broken off")
        except comfy.model_management.InterruptProcessingException:
            handle.remove()
        assert picture.loaded() == places[1], mode
        assert torch.equal(picture.sample(batch=3), expected)


@contextlib.contextmanager
def short_of_memory(picture: Picture, patcher: Any, times: int) -> Iterator[list[set[str]]]:
    """So often the host finds no room for `patcher`; yields what was loaded each time."""
    load = comfy.model_management.load_models_gpu
    failures: list[set[str]] = []

    def short(models: list, *args: Any, **kwargs: Any) -> None:
        if len(failures) < times and any(patcher.is_clone(model) for model in models):
            failures.append(picture.loaded())
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        load(models, *args, **kwargs)

    comfy.model_management.load_models_gpu = short
    try:
        yield failures
    finally:
        comfy.model_management.load_models_gpu = load


def check_room_is_made_once_more_and_then_an_error() -> None:
    nothing_loaded()
    picture = Picture(StagePolicy("cond_only"))
    picture.encode_text()
    with short_of_memory(picture, picture.model, 1) as failures:
        samples = picture.sample()
        assert failures == [{TEXT_ENCODER}] and picture.loaded() == {DIFFUSION} and samples.isfinite().all()
    nothing_loaded()
    with short_of_memory(picture, picture.model, 2):
        try:
            picture.sample()
            raise AssertionError("no error")
        except seats.NoRoomError as error:
            message = str(error)
    assert "SD3" in message and "layer_streaming" in message and "out of memory" in message, message
    assert torch.equal(picture.sample(), samples)


def check_dry_run_of_the_vae_is_what_it_allocates() -> None:
    vae = Picture(StagePolicy("cond_only")).vae
    for moment, call, given, seen in (
        (Moment.DECODE_BEGINS, "decode", torch.zeros(3, 16, 24, 40), torch.zeros(1, 16, 24, 40)),
        (Moment.ENCODE_BEGINS, "encode", torch.zeros(3, 196, 324, 3), torch.zeros(1, 3, 192, 320)),
    ):
        network = vae.first_stage_model
        seen = seen.to(vae.vae_dtype)
        with torch.no_grad(), estimate.Living({id(p.untyped_storage()) for p in network.parameters()}) as living:
            living.see(seen.untyped_storage())
            getattr(network, call)(seen)
        assert attach_stages_module._vae_working(vae, given, moment) == int(living.peak * estimate.SLACK), call
    formula = Picture(StagePolicy("cond_only", vram_estimation="formula")).vae
    samples = torch.zeros(1, 16, 24, 40)
    expected = formula.memory_used_decode(samples.shape, formula.vae_dtype)
    assert attach_stages_module._vae_working(formula, samples, Moment.DECODE_BEGINS) == int(expected)


def check_arguments_by_name() -> None:
    picture = Picture(StagePolicy("cond_diffusion"))
    pixels = picture.vae.decode(samples_in=torch.zeros(1, 16, 8, 8))
    assert torch.equal(pixels, picture.inputs[2].decode(torch.zeros(1, 16, 8, 8)))
    assert torch.equal(picture.vae.encode(pixel_samples=pixels), picture.inputs[2].encode(pixels))
    tiled = picture.vae.decode_tiled(samples=torch.zeros(1, 16, 24, 24), tile_x=16, tile_y=16, overlap=4)
    assert torch.equal(tiled, picture.inputs[2].decode_tiled(torch.zeros(1, 16, 24, 24), 16, 16, 4))
    text = picture.clip.encode_from_tokens(tokens=picture.tokens(), return_pooled=False)
    assert torch.equal(text, picture.inputs[1].encode_from_tokens(picture.tokens()))


def run(checks: dict[str, Any]) -> None:
    if MODE in ("granted", "refused"):  # as the stand-in has it: a device that is not the CPU by its name
        comfy.model_management.text_encoder_device = comfy.model_management.vae_device = lambda: torch.device("cpu", 0)
    with encoder_files.shrunk(TINY):
        base.main(checks)


if __name__ == "__main__":
    run(globals())
