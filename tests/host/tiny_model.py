"""What a tiny random model of an architecture is: the facts from which `tiny_files.py` makes its files.

A state dict of a real architecture is made in three steps, all inside the host, so that few key names are copied here:

1. `signature` names the keys, with tiny shapes, that `comfy.model_detection` reads to recognise the architecture and
   to learn its sizes (or, for a UNet, `config` holds the arguments of its constructor).
2. The host detects that signature and builds the whole model from it on the meta device: all keys, all shapes.
3. Every key gets random numbers, scaled so that activations stay near one through the network.

Some sizes cannot be learned from a state dict: the host writes them down (Qwen-Image always has 24 heads) and the
real ones would need gigabytes. Exactly those are replaced, for both loaders alike: `sizes` in the configuration after
the host's match, `table` in the host's table of families before it, `defaults` in a constructor's defaults. Which
keys belong to which architecture stays the host's decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Shape = tuple[int, ...]

NEWEST = ("0.30.0",)
SINCE_24 = ("0.24.0", *NEWEST)
EVERY = ("0.18.2", *SINCE_24)

WIDTH, TEXT = 256, 512  # of a model and of its text: multiples of 256, so that K-quants fit
IMAGE, FRAME, VIDEO = (1, 16, 8, 8), (1, 16, 1, 8, 8), (1, 16, 3, 8, 8)
TOKENS = (1, 7, TEXT)
AXES = (32, 48, 48)  # rope axes of a head of 128


@dataclass(frozen=True)
class TinyModel:
    """One architecture: how its state dict is made, what it is conditioned on, and where it is tried."""

    family: str  # the class of comfy.supported_models that detection must choose
    gguf: str  # general.architecture, as converters write it
    latent: Shape
    context: Shape | None = None  # the text encoder's output: batch, tokens, width
    signature: Mapping[str, Shape] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    sizes: Mapping[str, object] = field(default_factory=dict)
    table: Mapping[str, object] = field(default_factory=dict)
    defaults: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    conditioning: Mapping[str, object] = field(
        default_factory=dict
    )  # a tuple: shape of a random tensor; a list: itself
    hosts: tuple[str, ...] = EVERY
    dialect: str = "native"  # how the file spells its keys, see tiny_dialects.py
    layout: str = "true"  # how the file lays out shapes that ggml has trouble with, see LAYOUTS in tiny_files.py
    probe: str = ""  # a part of the key of a weight that the latent must depend on; empty: the largest
    seed: int = 0
    host_follows_file: bool = False  # the host computes parts of it in the file's dtype, whatever it was told
    plain_parts: bool = False  # much of it is no layer of ours and so plain in memory
