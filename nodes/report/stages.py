"""Which stage of a prompt a node is, from what goes into it and what comes out: its class may be of any pack."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

LOAD, SAMPLE = "load", "sample"
# Stage, of which at least one goes in (a linked input, by name), of which at least one comes out. The first row that
# fits counts.
STAGES: tuple[tuple[str, frozenset[str], frozenset[str]], ...] = (
    (SAMPLE, frozenset({"model", "guider"}), frozenset({"LATENT", "IMAGE"})),
    ("encode", frozenset({"clip"}), frozenset({"CONDITIONING"})),
    ("encode", frozenset({"vae"}), frozenset({"LATENT"})),
    ("decode", frozenset({"vae", "audio_vae"}), frozenset({"IMAGE", "AUDIO", "VIDEO"})),
)
MODELS = frozenset({"MODEL", "CLIP", "VAE"})


def stage_of(linked: Collection[str], outputs: Collection[str]) -> str | None:
    """The stage of a node with these linked inputs and output types; None: no stage of its own."""
    for stage, into, out in STAGES:
        if not into.isdisjoint(linked) and not out.isdisjoint(outputs):
            return stage
    return LOAD if not linked and not MODELS.isdisjoint(outputs) else None


def stage_of_node(node: Mapping[str, Any]) -> str | None:
    """The same for a node of a prompt, `{"class_type": ..., "inputs": {...}}`."""
    linked = {name for name, value in node.get("inputs", {}).items() if isinstance(value, list)}
    # The host's nodes.py, which has loaded this pack; our own folder has its name.
    classes = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
    outputs = getattr(classes.get(node.get("class_type")), "RETURN_TYPES", ())
    return stage_of(linked, {str(kind) for kind in outputs})
