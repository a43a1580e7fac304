"""Checks of Offload Mode on ways through a workflow that `stage_checks.py` leaves out. Run as that is."""

from __future__ import annotations

from host import stage_checks as stages  # switches the host to the mode that the command line names, so it comes first

import latent_preview  # isort: skip
import torch  # isort: skip
from comfy.cli_args import LatentPreviewMethod, args  # isort: skip
from host.model_checks import GGUF
from host.stage_checks import NO_ROOM, WITHOUT_ROOM, Picture, is_loaded, latent, nothing_loaded, told
from pack.loaders.diffusion import load_diffusion_model
from pack.offload import seats
from pack.offload.attach_stages import attach_stages
from pack.offload.stages import StagePolicy
from pack.offload.streamed_patcher import StreamedPatcher


def check_two_diffusion_models_that_stream() -> None:
    """Wan 2.2's two models behind one node each: both stream, and neither stays for the other or for the VAE."""
    nothing_loaded()
    policy = StagePolicy("layer_streaming", **NO_ROOM)
    picture = Picture(policy)
    expected = latent(picture.inputs[0])
    nothing_loaded()
    high = picture.model
    low, picture.clip, picture.vae = attach_stages(policy, load_diffusion_model(GGUF), picture.clip, picture.vae)
    assert isinstance(high, StreamedPatcher) and isinstance(low, StreamedPatcher) and high.model is not low.model
    for _ in range(2):
        picture.encode_text()
        assert not is_loaded(high) and not is_loaded(low)
        assert torch.equal(latent(high), expected)
        assert is_loaded(high) and not is_loaded(low) and not is_loaded(picture.clip.patcher)
        assert torch.equal(latent(low), expected)
        assert is_loaded(low) and not is_loaded(high)
        picture.decode(expected)
        assert not is_loaded(high) and not is_loaded(low)


def check_second_pass_of_another_size() -> None:
    """Upscaling: the latent is made larger, sampled again with the same model, and decoded."""

    def twice(picture: Picture) -> tuple[torch.Tensor, ...]:
        picture.encode_text()
        small = picture.decode(picture.sample())
        large = torch.nn.functional.interpolate(small.movedim(-1, 1), scale_factor=2).movedim(1, -1)
        again = picture.vae.encode(large)
        return again, picture.sample(batch=2), picture.decode(again)

    nothing_loaded()
    expected = twice(Picture())
    for mode in WITHOUT_ROOM:
        nothing_loaded()
        assert stages.same(twice(Picture(StagePolicy(mode, **NO_ROOM))), expected), mode


def check_previews_between_steps() -> None:
    """They are made while the diffusion model is in use, and no stage begins for them."""

    def draw(picture: Picture) -> tuple[list[bytes], list[set[str]]]:
        previewer = latent_preview.get_previewer(picture.model.load_device, picture.model.model.latent_format)
        shown: list[bytes] = []
        loaded: list[set[str]] = []

        def callback(step: int, x0: torch.Tensor, x: torch.Tensor, steps: int) -> None:
            shown.append(previewer.decode_latent_to_preview(x0).tobytes())
            loaded.append(picture.loaded())

        picture.encode_text()
        picture.decode(picture.sample(steps=3, callback=callback))
        return shown, loaded

    method, args.preview_method = args.preview_method, LatentPreviewMethod.Latent2RGB
    try:
        nothing_loaded()
        expected, _ = draw(Picture())
        assert len(set(expected)) == 3
        for mode in WITHOUT_ROOM:
            nothing_loaded()
            picture = Picture(StagePolicy(mode, **NO_ROOM))
            for _ in range(2):
                shown, loaded = draw(picture)
                assert shown == expected, mode
                assert all(stages.DIFFUSION in names for names in loaded) and loaded[0] == loaded[-1], (mode, loaded)
    finally:
        args.preview_method = method


def check_text_encoder_that_does_not_fit_says_what_to_do() -> None:
    nothing_loaded()
    picture = Picture(StagePolicy("cond_only"))
    expected = picture.encode_text()
    nothing_loaded()
    latent(picture.model)
    with stages.short_of_memory(picture, picture.clip.patcher, 1) as failures:
        assert torch.equal(picture.encode_text(), expected)
        assert failures == [{stages.DIFFUSION}] and picture.loaded() == {stages.TEXT_ENCODER}
    with stages.short_of_memory(picture, picture.clip.patcher, 2):
        try:
            picture.encode_text()
            raise AssertionError("no error")
        except seats.NoRoomError as error:
            message = str(error)
    name = type(picture.clip.cond_stage_model).__name__
    for words in (name, "does not fit on", "are free; loaded are", "Close other programs", "lower quant"):
        assert words in message, message
    assert torch.equal(picture.encode_text(), expected)


def check_events_are_kept_also_where_they_are_not_logged() -> None:
    nothing_loaded()
    picture = Picture(StagePolicy("cond_diffusion", log_events=False, **NO_ROOM))
    happened = told(picture.draw)
    assert [event.action for event in happened].count("leaves") == 2, happened


if __name__ == "__main__":
    stages.run(globals())
