"""The blocks of every architecture, found in the host's own networks: which they are, and that they can be streamed.

Tiny models are sampled from and small networks called with the weights of a block in place during that block's call
only (`block_checks.py`). Networks of full size show that the blocks hold nearly all weights.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from host.full_networks import FULL_NETWORKS
from host.small_networks import SMALL_NETWORKS
from host.tiny_models import ARCHITECTURES
from pack.tools.versions import HOSTS, MAIN_HOST

SCRIPT = Path(__file__).with_name("block_checks.py")

# The blocks of the tiny models, in order. `layers.0-2` are three; a question mark is behind those that do not run in
# every step. A tiny model may have so few that one is taken apart, as a large part of the whole (cosmos1).
BLOCKS = {
    "sd15": (
        "input_blocks.1.0-1 input_blocks.2.0 input_blocks.3.0-1 middle_block.0-2 "
        "output_blocks.0.0-1 output_blocks.1.0-2 output_blocks.2.0-1 output_blocks.3.0-1"
    ),
    "sdxl": (
        "input_blocks.1.0 input_blocks.2.0 input_blocks.3.0 input_blocks.4.0-1 input_blocks.5.0-1 input_blocks.6.0 "
        "input_blocks.7.0 input_blocks.7.1.transformer_blocks.0-1 "
        "input_blocks.8.0 input_blocks.8.1.transformer_blocks.0-1 "
        "middle_block.0 middle_block.1.transformer_blocks.0-1 middle_block.2 "
        "output_blocks.0.0 output_blocks.0.1.transformer_blocks.0-1 "
        "output_blocks.1.0 output_blocks.1.1.transformer_blocks.0-1 "
        "output_blocks.2.0 output_blocks.2.1.transformer_blocks.0-1 output_blocks.2.2 "
        "output_blocks.3.0-1 output_blocks.4.0-1 output_blocks.5.0-2 "
        "output_blocks.6.0 output_blocks.7.0 output_blocks.8.0"
    ),
    "sd3": "joint_blocks.0-3",
    "flux": "double_blocks.0 single_blocks.0",
    "flux2": "double_blocks.0 single_blocks.0",
    "longcat": "double_blocks.0 single_blocks.0",
    "chroma": "distilled_guidance_layer.layers.0 double_blocks.0 single_blocks.0",
    "qwen_image": "transformer_blocks.0",
    "lumina2": "context_refiner.0 noise_refiner.0 layers.0",
    "z_image": "context_refiner.0 noise_refiner.0 layers.0",
    "hidream": "caption_projection.0-2 double_stream_blocks.0 single_stream_blocks.0",
    "hidream_o1": "visual.blocks.0? language_model.layers.0-1",
    "aura": "double_layers.0 single_layers.0",
    "pixart_sigma": "blocks.0",
    "omnigen2": "context_refiner.0 noise_refiner.0 ref_image_refiner.0? layers.0",
    "boogu": ("context_refiner.0 noise_refiner.0 ref_image_refiner.0? double_stream_layers.0 single_stream_layers.0"),
    "ideogram4": "layers.0",
    "krea2": "txtfusion.layerwise_blocks.0-1 txtfusion.refiner_blocks.0-1 blocks.0",
    "ernie": "layers.0",
    "lens": "transformer_blocks.0",
    "mage_flow": "transformer_blocks.0",
    "wan21_t2v": "blocks.0-1",
    "wan21_i2v": "blocks.0-1",
    "wan21_vace": "blocks.0 vace_blocks.0 blocks.1",
    "wan22_5b": "blocks.0-1",
    "wan22_animate": "blocks.0 face_adapter.fuser_blocks.0 blocks.1-4",
    "hunyuan_video": "txt_in.individual_token_refiner.blocks.0-1 double_blocks.0 single_blocks.0",
    "hunyuan_video15": "txt_in.individual_token_refiner.blocks.0-1 double_blocks.0 single_blocks.0",
    "hunyuan_image21": "txt_in.individual_token_refiner.blocks.0-1 double_blocks.0 single_blocks.0",
    "ltxv": "transformer_blocks.0",
    "cosmos1": "blocks.block0.blocks.0-2",
    "cosmos_predict2": "blocks.0",
    "anima": "llm_adapter.blocks.0? blocks.0",
    "kandinsky5": "text_transformer_blocks.0 visual_transformer_blocks.0",
    "joyimage": "double_blocks.0",
    "cogvideox": "blocks.0",
}
# These take part only where there are reference images or faces, which the tiny models are not given.
NOT_CALLED = {
    "hidream_o1": "visual.",
    "omnigen2": "ref_image_refiner.",
    "boogu": "ref_image_refiner.",
    "wan22_animate": "face_adapter.",
}
# Run in another order than found: every other family of these names refines the text first.
OTHER_ORDER = {"triposplat"}

QUANTISED = ("flux", "sdxl", "wan21_vace", "hidream", "cosmos1")  # some whose blocks depend on the sizes of parts

NETWORKS = {
    "tiny": {name: (text, ARCHITECTURES[name].hosts) for name, text in BLOCKS.items()},
    "small": {name: (small.blocks, small.hosts) for name, small in SMALL_NETWORKS.items()},
    "gguf": {name: (BLOCKS[name], (MAIN_HOST,)) for name in QUANTISED},
    "full": {name: (full.blocks, (MAIN_HOST,)) for name, full in FULL_NETWORKS.items()},
}
RUNS = [
    (kind, version, name)
    for kind in ("tiny", "small")
    for version in HOSTS
    for name, (_, hosts) in NETWORKS[kind].items()
    if version in hosts
]


def listed(text: str) -> tuple[list[str], list[str]]:
    """All blocks that a line like `layers.0-2 visual.0?` names, and those that do not run in every step."""
    every: list[str] = []
    sometimes: list[str] = []
    for word in text.split():
        path, dot, numbers = word.rstrip("?").rpartition(".")
        first, _, last = numbers.partition("-")
        names = [f"{path}{dot}{number}" for number in range(int(first), int(last or first) + 1)]
        every += names
        sometimes += names if word.endswith("?") else []
    return every, sometimes


@pytest.fixture(scope="session")
def outcomes(run_in_host):
    """What `block_checks.py` says of a network; runs it once for each kind and host."""
    done: dict[tuple[str, str], dict[str, dict]] = {}

    def outcome(kind: str, version: str, name: str) -> dict:
        if (kind, version) not in done:
            names = [name for name, (_, hosts) in NETWORKS[kind].items() if version in hosts]
            lines = run_in_host(SCRIPT, kind, *names, version=version).splitlines()
            results = [json.loads(line) for line in lines if line.startswith('{"network"')]
            done[kind, version] = {result["network"]: result for result in results}
        found = done[kind, version][name]
        assert "error" not in found, found["error"]
        return found

    return outcome


@pytest.mark.parametrize(("kind", "version", "name"), RUNS)
def test_blocks_can_be_streamed(outcomes, kind: str, version: str, name: str) -> None:
    found = outcomes(kind, version, name)
    blocks, sometimes = listed(NETWORKS[kind][name][0])
    assert found["blocks"] == blocks
    assert found["not_every_step"] == sometimes
    assert found["nested"] == found["elsewhere"] == []
    assert found["finite"] and found["spread"] > 0.01
    assert found["equal"], "weights of a block were used outside of its call"

    absent = NOT_CALLED.get(name) if kind == "tiny" else None
    in_order = [block for block in blocks if not (absent and block.startswith(absent))]
    called = list(dict.fromkeys(found["calls"]))
    assert sorted(called) == sorted(in_order)
    assert (called == in_order) == (name not in OTHER_ORDER)
    times = Counter(found["calls"])
    assert all(times[block] == 1 for block in in_order if block not in sometimes)


@pytest.mark.parametrize("name", QUANTISED)
def test_a_gguf_model_has_the_blocks_of_the_original(outcomes, name: str) -> None:
    found = outcomes("gguf", MAIN_HOST, name)
    assert (found["blocks"], found["not_every_step"]) == listed(BLOCKS[name])


@pytest.mark.parametrize("name", FULL_NETWORKS)
def test_blocks_hold_nearly_all_weights(outcomes, name: str) -> None:
    found = outcomes("full", MAIN_HOST, name)
    lists = Counter(re.sub(r"(?<=block)\d+$|\b\d+\b", "*", block) for block in found["blocks"])
    assert " ".join(f"{path}:{count}" for path, count in lists.items()) == FULL_NETWORKS[name].blocks
    assert found["share"] > 0.9
    # Two at a time must be little of the whole. Only Hunyuan3D 2.1, with its mixtures of experts, has larger ones.
    assert found["largest"] < (0.12 if name == "hunyuan3d_21" else 0.09)
