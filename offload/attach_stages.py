"""Offload Mode on MODEL, CLIP and VAE: who leaves VRAM when another begins.

Each output is a clone whose patcher has a seat (`seats`); clones of it (LoRA nodes and the like) have the same one. It
tells when its stage begins and ends:

    MODEL  wrappers around the preparation of sampling, and around sampling
    CLIP   a subclass made for the clone, because the host loads a text encoder through the CLIP
    VAE    a subclass made for the copy, for the same reason
"""

from __future__ import annotations

import copy
import logging
from functools import cache
from typing import Any

import comfy.sampler_helpers
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..loaders import compat
from .attach import apply_block_swap, can_stream
from .costs import SwapRequest
from .estimate import Answers, dry_run
from .seats import KEY, Seat, begin, bring_back, end, loaded, lock_what_leaves, open_session, seat_of, take_seat
from .stages import Moment, Part, StagePolicy
from .streamed_patcher import StreamedPatcher

log = logging.getLogger("sluice.offload")

_answers = Answers()


def attach_stages(policy: StagePolicy, model: Any = None, clip: Any = None, vae: Any = None) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE under `policy`; in mode `none` the very objects that were given.

    Raises:
        ValueError: layer_streaming on a model without blocks that could stream.
    """
    if policy.mode == "none":
        return model, clip, vae
    # The VAE of a checkpoint without one has no patcher; the host says so when it is used.
    patchers = (model, getattr(clip, "patcher", None), getattr(vae, "patcher", None))
    watched = dict(zip((Part.DIFFUSION, Part.TEXT, Part.VAE), patchers, strict=True))
    present = {part: patcher for part, patcher in watched.items() if patcher is not None}
    session = open_session(present, [seat.session for patcher in present.values() if (seat := seat_of(patcher))])
    if Part.DIFFUSION in present:
        model = _watched_model(model, policy)
        take_seat(model, Seat(Part.DIFFUSION, policy, session))
    if Part.TEXT in present:
        clip = clip.clone()
        clip.__class__ = _watched_clip(type(clip))  # type: ignore[arg-type]
        take_seat(clip.patcher, Seat(Part.TEXT, policy, session))
    if Part.VAE in present:
        vae = copy.copy(vae)
        vae.patcher = vae.patcher.clone()
        vae.__class__ = _watched_vae(type(vae))  # type: ignore[arg-type]
        take_seat(vae.patcher, Seat(Part.VAE, policy, session))
    lock_what_leaves(policy, [getattr(clip, "patcher", None), model], list(present.values()))
    return model, clip, vae


def forget_estimates() -> None:
    """Drop what dry runs found."""
    _answers.clear()


# --- MODEL


def _watched_model(model: ModelPatcher, policy: StagePolicy) -> ModelPatcher:
    if policy.mode == "layer_streaming" and not isinstance(model, StreamedPatcher):
        if not can_stream(model):
            raise ValueError(
                f"Offload Mode: no blocks were found in this model ({type(model.model).__name__}), so its layers "
                "cannot stream; choose cond_diffusion"
            )
        model = apply_block_swap(model, SwapRequest())
    else:
        model = model.clone()
    for kind, wrapper in ((WrappersMP.PREPARE_SAMPLING, _prepare), (WrappersMP.OUTER_SAMPLE, _sample)):
        model.remove_wrappers_with_key(kind, KEY)  # of a node before this one
        model.add_wrapper_with_key(kind, KEY, wrapper)
    return model


def _prepare(executor: Any, model: ModelPatcher, noise_shape: Any, conds: Any, *args: Any, **kwargs: Any) -> Any:
    working, least = comfy.sampler_helpers.estimate_memory(model, noise_shape, conds)
    begin(Moment.SAMPLING_BEGINS, model, working, least)
    return loaded(model, working, lambda: executor(model, noise_shape, conds, *args, **kwargs))


def _sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    model = executor.class_obj.model_patcher
    try:
        return executor(*args, **kwargs)
    finally:
        end(model)


# --- CLIP


@cache
def _watched_clip(base: type) -> type:
    """`base` that tells when it encodes; itself if it does."""
    return base if issubclass(base, _WatchedCLIP) else type(f"Sluice{base.__name__}", (_WatchedCLIP, base), {})


class _WatchedCLIP:
    """Mixed in before the host's class."""

    patcher: ModelPatcher
    cond_stage_model: Any

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        clone = super().clone(*args, **kwargs)  # type: ignore[misc]
        clone.__class__ = _watched_clip(type(clone))  # type: ignore[arg-type]
        return clone

    def load_model(self, tokens: Any = None) -> Any:
        tokens = {} if tokens is None else tokens
        estimate = getattr(self.cond_stage_model, "memory_estimation_function", None)
        working = estimate(tokens, device=self.patcher.load_device) if estimate is not None else 0
        begin(Moment.TEXT_BEGINS, self.patcher, working)
        return loaded(self.patcher, working, lambda: super(_WatchedCLIP, self).load_model(tokens))  # type: ignore[misc]

    def encode_from_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self._encode("encode_from_tokens", args, kwargs)

    def encode_from_tokens_scheduled(self, *args: Any, **kwargs: Any) -> Any:
        return self._encode("encode_from_tokens_scheduled", args, kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self._encode("generate", args, kwargs)

    def _encode(self, name: str, args: tuple, kwargs: dict) -> Any:
        try:
            return getattr(super(), name)(*args, **kwargs)
        finally:
            end(self.patcher)


# --- VAE


@cache
def _watched_vae(base: type) -> type:
    """`base` that tells when it works; itself if it does."""
    return base if issubclass(base, _WatchedVAE) else type(f"Sluice{base.__name__}", (_WatchedVAE, base), {})


class _WatchedVAE:
    """Mixed in before the host's class."""

    patcher: ModelPatcher

    # The first argument has the host's name, by which it may be given.

    def decode(self, samples_in: Any, *args: Any, **kwargs: Any) -> Any:
        return self._work("decode", Moment.DECODE_BEGINS, samples_in, args, kwargs)

    def decode_tiled(self, samples: Any, *args: Any, **kwargs: Any) -> Any:
        return self._work("decode_tiled", Moment.DECODE_BEGINS, samples, args, kwargs)

    def encode(self, pixel_samples: Any, *args: Any, **kwargs: Any) -> Any:
        return self._work("encode", Moment.ENCODE_BEGINS, pixel_samples, args, kwargs)

    def encode_tiled(self, pixel_samples: Any, *args: Any, **kwargs: Any) -> Any:
        return self._work("encode_tiled", Moment.ENCODE_BEGINS, pixel_samples, args, kwargs)

    def _work(self, name: str, moment: Moment, tensor: Any, args: tuple, kwargs: dict) -> Any:
        begin(moment, self.patcher, _vae_working(self, tensor, moment))
        try:
            result = getattr(super(), name)(tensor, *args, **kwargs)
        finally:
            end(self.patcher)
        if moment is Moment.DECODE_BEGINS:
            bring_back(self.patcher)
        return result


def _vae_working(vae: Any, tensor: Any, moment: Moment) -> int:
    """Bytes for the activations of the VAE's next call: what a dry run found, or what the host's formula says."""
    decodes = moment is Moment.DECODE_BEGINS
    seat = seat_of(vae.patcher)
    try:
        shape = _seen_by_vae(vae, tensor, decodes)
        if seat is not None and seat.policy.vram_estimation == "dryrun":
            key = (shape, vae.vae_dtype, vae.patcher.load_device, decodes)
            found = _answers.get(vae.first_stage_model, key, lambda: _dry_run(vae, shape, decodes))
            if found is not None:
                return found
        formula = vae.memory_used_decode if decodes else vae.memory_used_encode
        return int(formula(shape, vae.vae_dtype))
    except Exception as error:  # the host will say it better when it tries the same
        log.debug("the VAE's need is not known: %s", error)
        return 0


def _dry_run(vae: Any, shape: tuple[int, ...], decodes: bool) -> int | None:
    network = vae.first_stage_model
    one = (1, *shape[1:])  # the host works through a batch as memory allows
    try:
        return dry_run(
            network,
            (lambda copy, given: copy.decode(given)) if decodes else (lambda copy, given: copy.encode(given)),
            *(one, vae.vae_dtype, vae.patcher.load_device),
            *(compat.dynamic_state, compat.forget_dynamic_state),
        )
    except Exception as error:
        log.info("no dry run of %s (%s): ComfyUI's formula is used", type(network).__name__, error)
        return None


def _seen_by_vae(vae: Any, tensor: Any, decodes: bool) -> tuple[int, ...]:
    """The shape that the VAE's network is given."""
    shape = tuple(tensor.shape)
    if decodes:
        return (*shape[:2], *shape[3:]) if vae.latent_dim == 2 and len(shape) == 5 else shape
    count, *space, _ = shape
    if vae.crop_input:
        ratio = vae.spacial_compression_encode()
        space = [length // ratio * ratio for length in space]
    if vae.latent_dim == 3 and len(space) < 3:
        return (count, vae.output_channels, 1, *space) if vae.not_video else (1, vae.output_channels, count, *space)
    return (count, vae.output_channels, *space)
