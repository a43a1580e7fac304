"""Checks of Release Memory inside the host: what is let go of, and that the next use finds it again.

Run as `stage_checks.py` is, whose models and host set-up these checks share.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from host import stage_checks as stages  # switches the host to the mode that the command line names, so it comes first

import comfy.model_management  # isort: skip
import comfy.sd  # isort: skip
import torch  # isort: skip
from host import encoder_files
from host.model_checks import FOLDER, GGUF, MODE, ON_GPU, SAFETENSORS
from host.stage_checks import (
    DIFFUSION,
    ENCODER,
    TEXT_ENCODER,
    VAE,
    Picture,
    is_loaded,
    latent,
    nothing_loaded,
    same,
    told,
)
from host.tiny_encoder import ENCODERS
from pack.loaders.diffusion import load_diffusion_model
from pack.loaders.gguf.errors import GGUFError
from pack.loaders.text_encoder import load_text_encoder
from pack.offload.attach import apply_block_swap, stream
from pack.offload.costs import SwapRequest
from pack.offload.release import release
from pack.offload.stages import StagePolicy
from safetensors.torch import load_file


def maps_of(path: Path) -> int:
    return sum(line.endswith(f" {path}") for line in Path("/proc/self/maps").read_text().splitlines())


def check_released_by_kind() -> None:
    for what, left in (
        ("text_encoder", {DIFFUSION, VAE}),
        ("diffusion_model", {TEXT_ENCODER, VAE}),
        ("caches", {TEXT_ENCODER, DIFFUSION, VAE}),
        ("all", set()),
    ):
        nothing_loaded()
        picture = Picture()
        expected = picture.draw()[1]
        happened = told(lambda what=what: release(what, "offload"))
        assert picture.loaded() == left, (what, picture.loaded())
        assert happened and all("Release Memory" in event.why for event in happened)
        assert same(picture.draw()[1], expected), what


def applied(model: Any) -> Any:
    return apply_block_swap(model, SwapRequest(blocks_to_swap=4))


def check_disposed_model_lets_go_of_its_file() -> None:
    """And is whole again when it is used, copied, merged or saved."""
    kinds: dict[str, Callable[[Path], Any]] = {
        "plain": load_diffusion_model,
        "applied": lambda path: applied(load_diffusion_model(path)),
        "streamed": lambda path: stream(load_diffusion_model(path, disable_dynamic=True), SwapRequest()),
    }
    cases: tuple[tuple[str, Callable[[Any], Any]], ...] = (
        ("plain", latent),
        ("plain", lambda model: latent(applied(model))),
        ("plain", lambda model: {k: v.clone() for k, v in model.model_state_dict_for_saving().items()}),
        ("plain", lambda model: model.get_key_patches("diffusion_model.")),
        ("applied", lambda model: latent(model.clone())),
        ("applied", lambda model: latent(applied(model))),
        ("streamed", latent),
    )
    expected = latent(load_diffusion_model(GGUF))
    for number, (kind, use) in enumerate(cases):
        nothing_loaded()
        path = FOLDER / f"disposed-{number}.gguf"
        shutil.copy(GGUF, path)
        model = kinds[kind](path)
        mapped = not (ON_GPU and kind == "streamed")  # which lets go of a file whose weights are all on the GPU
        assert torch.equal(latent(model), expected)
        gc.collect()
        assert bool(maps_of(path)) == mapped, number
        release("diffusion_model", "dispose")
        gc.collect()
        assert not maps_of(path), number
        release("all", "dispose")  # again, for nothing
        for _ in range(2):
            found = use(model)
            assert bool(maps_of(path)) == mapped, number
            assert not isinstance(found, torch.Tensor) or torch.equal(found, expected), number
        assert torch.equal(latent(model), expected), number


def check_model_that_the_host_unloaded_lets_go_of_its_file() -> None:
    """Also one that was never loaded, and the network of Block Swap over the same mapping."""
    nothing_loaded()
    path = FOLDER / "unloaded.gguf"
    shutil.copy(GGUF, path)
    model = load_diffusion_model(path)
    swapped = applied(model)
    expected = latent(swapped)
    for entry in list(comfy.model_management.current_loaded_models):
        entry.model_unload()  # as the host does where another model needs the room
        comfy.model_management.current_loaded_models.remove(entry)
    gc.collect()
    assert maps_of(path) and not told(lambda: release("diffusion_model", "offload"))
    happened = told(lambda: release("diffusion_model", "dispose"))
    gc.collect()
    assert not maps_of(path)
    assert len([event for event in happened if "its file is closed" in event.why]) >= 2, happened
    assert torch.equal(latent(model), expected) and torch.equal(latent(swapped), expected)


def check_disposed_model_that_is_dropped_opens_no_file() -> None:
    """A clone goes when a workflow changes, and the model itself, whose file may be gone by then."""
    nothing_loaded()
    path = FOLDER / "dropped.gguf"
    shutil.copy(GGUF, path)
    model = load_diffusion_model(path)
    expected = latent(model)
    clone = model.clone()
    release("diffusion_model", "dispose")
    gc.collect()
    del clone
    gc.collect()
    assert not maps_of(path)
    assert torch.equal(latent(model), expected) and maps_of(path)
    release("diffusion_model", "dispose")
    path.unlink()
    failed: list[Any] = []
    sys.unraisablehook, hook = failed.append, sys.unraisablehook
    try:
        del model
        gc.collect()
    finally:
        sys.unraisablehook = hook
    assert not failed, failed


def check_cancelled_between_two_models() -> None:
    nothing_loaded()
    picture = Picture()
    expected = picture.draw()[1]
    assert picture.loaded() == {TEXT_ENCODER, DIFFUSION, VAE}
    comfy.model_management.interrupt_current_processing()
    try:
        release("all", "dispose")
        raise AssertionError("not cancelled")
    except comfy.model_management.InterruptProcessingException:
        assert len(picture.loaded()) == 2, "the first was not released, or not it alone"
    assert same(picture.draw()[1], expected)
    release("all", "dispose")
    assert not picture.loaded() and not maps_of(GGUF)


def check_merged_with_a_disposed_model() -> None:
    nothing_loaded()
    one, other = load_diffusion_model(GGUF), load_diffusion_model(GGUF)

    def merged() -> torch.Tensor:
        model = one.clone()
        model.add_patches(other.get_key_patches("diffusion_model."), 0.5, 0.5)
        return latent(model)

    expected = merged()
    latent(other)
    release("diffusion_model", "dispose")
    assert torch.equal(merged(), expected)


def check_disposed_text_encoder_lets_go_of_its_file() -> None:
    nothing_loaded()
    picture = Picture()
    expected = picture.encode_text()
    assert maps_of(ENCODER)
    release("text_encoder", "dispose")
    gc.collect()
    assert not maps_of(ENCODER)
    assert torch.equal(picture.encode_text(), expected) and maps_of(ENCODER)


def check_disposed_after_it_left() -> None:
    nothing_loaded()
    picture = Picture(StagePolicy("aggressive"))
    expected = picture.draw()[1]
    release("all", "dispose")
    gc.collect()
    assert not maps_of(GGUF) and not maps_of(ENCODER)
    assert same(picture.draw()[1], expected)


def check_file_that_changed_after_it_was_disposed() -> None:
    nothing_loaded()
    path = FOLDER / "changed.gguf"
    shutil.copy(GGUF, path)
    model = load_diffusion_model(path)
    expected = latent(model)
    release("diffusion_model", "dispose")
    path.rename(path.with_suffix(".away"))
    for _ in range(2):
        try:
            latent(model)
            raise AssertionError("no error")
        except GGUFError as error:
            assert path.name in str(error)
    path.with_suffix(".away").rename(path)
    assert torch.equal(latent(model), expected)


def check_file_cut_off_before_it_is_read() -> None:
    """An error before the mapping is touched, which would end the process."""
    kinds: dict[str, Callable[[Path], Any]] = {
        "plain": load_diffusion_model,
        "streamed": lambda path: stream(load_diffusion_model(path, disable_dynamic=True), SwapRequest()),
        "text": lambda path: load_text_encoder([path], stages.TINY.clip_type).patcher,
    }
    for kind, made in kinds.items():
        nothing_loaded()
        path = FOLDER / f"cut-{kind}.gguf"
        shutil.copy(GGUF if kind != "text" else ENCODER, path)
        patcher = made(path)
        os.truncate(path, path.stat().st_size // 2)
        uses = [lambda patcher=patcher: comfy.model_management.load_models_gpu([patcher])]
        for use in [*uses, patcher.model_state_dict_for_saving]:
            try:
                use()
                raise AssertionError(f"{kind}: no error")
            except GGUFError as error:
                assert path.name in str(error) and "changed" in str(error), error
        assert not is_loaded(patcher)


def check_model_of_the_host_says_that_its_ram_stays() -> None:
    nothing_loaded()
    model = comfy.sd.load_diffusion_model_state_dict(load_file(SAFETENSORS), disable_dynamic=True)
    expected = latent(model)
    (event,) = told(lambda: release("diffusion_model", "dispose"))
    assert "stay in RAM" in event.why and not is_loaded(model)
    assert torch.equal(latent(model), expected)


def check_text_encoder_from_safetensors_says_what_stays() -> None:
    """Of two files, one of them GGUF, and of one file."""
    if MODE != "classic":  # granted: the host reads safetensors through what the stand-in stands in for
        return
    nothing_loaded()
    tiny = ENCODERS["llama3"]
    path, beside = FOLDER / "pair.gguf", FOLDER / "pair.safetensors"
    with encoder_files.shrunk(tiny):
        encoder_files.write_model(path, tiny, encoder_files.files_of(tiny))
        encoder_files.write_safetensors(beside, ENCODERS["clip_l"], encoder_files.files_of(ENCODERS["clip_l"]))
        pair = load_text_encoder([path, beside], tiny.clip_type)
        alone = load_text_encoder([beside], "stable_diffusion")
    # The host keeps what is all of safetensors in 16 bits; the file has 32.
    for clip, closed, share in ((pair, "its file is closed; ", 1.0), (alone, "", 0.5)):
        weights = {name: weight.clone() for name, weight in clip.patcher.model.state_dict().items()}
        clip.load_model()
        happened = told(lambda: release("text_encoder", "dispose"))
        (why,) = {event.why for event in happened if event.what == type(clip.patcher.model).__name__}
        stated = re.search(
            rf"Release Memory: {closed}(?:its )?([0-9.]+) MB stay in RAM, because they were not mapped", why
        )
        wanted = share * beside.stat().st_size
        assert stated and 0.95 < float(stated[1]) * 1e6 / wanted < 1.1, (why, wanted)
        gc.collect()
        assert not maps_of(path)
        clip.load_model()
        found = clip.patcher.model.state_dict()
        assert all(torch.equal(found[name], weight) for name, weight in weights.items())
        del found  # which looks at the file


def check_words_that_do_not_exist() -> None:
    for call in (
        lambda: release("everything", "offload"),
        lambda: release("all", "delete"),
        lambda: StagePolicy("gentle"),
        lambda: StagePolicy(reload_diffusion="maybe"),
    ):
        try:
            call()
            raise AssertionError("no error")
        except ValueError as error:
            assert "all" in str(error) or "auto" in str(error) or "cond_only" in str(error) or "offload" in str(error)


if __name__ == "__main__":
    stages.run(globals())
