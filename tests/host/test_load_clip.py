"""Load CLIP (GGUF) as users meet it, through the HTTP API of a real server: pictures, LoRAs, and errors that help.

The demo's text encoder, as GGUF, must give the latent that core's loader gives from the safetensors. Files that are no
usable text encoder are made here; the error box says what to do, and the next prompt runs.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from pack.tools import demo
from pack.tools.server import PromptFailed, Server, Workflow
from safetensors.numpy import load_file

LOADER, TEXT, LORA = "2", "3", "9"
NATIVE = Path(demo.TEXT_ENCODER).name
PROMPT = "red seven on white"
CHOOSE_TEXT_ENCODER = "choose a text encoder here"
FURTHER = ("clip_name2", "clip_name3", "clip_name4")
FIXED_SEED = 1 << 41
seeds = itertools.count(1 << 42)

Arrays = dict[str, np.ndarray]


def workflow(loader: dict[str, Any], prompt: str = PROMPT, seed: int | None = None) -> Workflow:
    """One step at the smallest size, ending in a latent file, with text from `loader`."""
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "1": ("SluiceDiffusionModelLoader", {"model_name": demo.GGUF_FILES["Q8_0"]}),
        TEXT: ("CLIPTextEncode", {"clip": [LOADER, 0], "text": prompt}),
        "5": ("EmptySD3LatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        "6": (
            "KSampler",
            {
                **{"model": ["1", 0], "positive": [TEXT, 0], "negative": [TEXT, 0], "latent_image": ["5", 0]},
                **{"seed": next(seeds) if seed is None else seed, "steps": 2, "cfg": 1.0, "denoise": 1.0},
                **{"sampler_name": "euler", "scheduler": "simple"},
            },
        ),
        "7": ("SaveLatent", {"samples": ["6", 0], "filename_prefix": "load_clip/latent"}),
    }
    made: Workflow = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}
    return made | {LOADER: loader}


def ours(name: str, clip_type: str = "sd3", **others: str) -> dict[str, Any]:
    return {"class_type": "SluiceCLIPLoader", "inputs": {"clip_name1": name, "type": clip_type, **others}}


CORE = {"class_type": "CLIPLoader", "inputs": {"clip_name": NATIVE, "type": "sd3", "device": "default"}}


def latent(server: Server, prompt: Workflow) -> np.ndarray:
    saved = server.queue(prompt)["7"]["latents"][0]
    return load_file(server.output_dir / saved["subfolder"] / saved["filename"])["latent_tensor"]


def drawn(server: Server, loader: dict[str, Any], prompt: str = PROMPT) -> np.ndarray:
    return latent(server, workflow(loader, prompt, FIXED_SEED))


@pytest.fixture(scope="session")
def native(demo_server: Server) -> Arrays:
    """The demo's text encoder."""
    return load_file(demo_server.models_dir / demo.TEXT_ENCODER)


@pytest.fixture
def place(demo_server: Server) -> Iterator[Callable[[str], Path]]:
    """Paths among the server's text encoders, of files that go when the test ends."""
    placed = []

    def path(name: str) -> Path:
        placed.append(demo_server.models_dir / "text_encoders" / name)
        return placed[-1]

    yield path
    for file in placed:
        file.unlink(missing_ok=True)


def write(path: Path, tensors: Arrays, kind: Type = Type.F16, arch: str = "clip_l", **metadata: str | int) -> str:
    """A GGUF with matrices in `kind` and everything else as it is; its name."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_custom_alignment(64)
    for key, value in metadata.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_string)(key.replace("__", "."), value)  # type: ignore[arg-type]
    for name, values in tensors.items():
        matrix = values.ndim == 2 and values.shape[1] % 32 == 0 and kind != Type.F16
        stored = gguf.quants.quantize(values.astype(np.float32), kind) if matrix else values
        writer.add_tensor(name, stored, raw_dtype=kind if matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.name


def failure(server: Server, loader: dict[str, Any], node: str = LOADER) -> str:
    """What the error box of `node` shows; afterwards a sound prompt must run."""
    with pytest.raises(PromptFailed) as failed:
        server.queue(workflow(loader))
    assert list(failed.value.node_errors) == [node], failed.value
    assert np.isfinite(latent(server, workflow(ours(NATIVE)))).all()
    return failed.value.node_errors[node]


def expect(message: str, *words: str) -> None:
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in {message!r}"
    assert len(message) < 1000, "nobody reads that much"


# --- what works


def test_latent_equals_cores(demo_server: Server, native: Arrays, place) -> None:
    expected = drawn(demo_server, CORE)
    half = write(place("half.gguf"), native)
    assert np.array_equal(drawn(demo_server, ours(half)), expected)
    assert np.array_equal(drawn(demo_server, ours(half, device="cpu")), expected)
    assert np.array_equal(drawn(demo_server, ours(NATIVE)), expected)
    other = drawn(demo_server, ours(half), "yellow four on blue")
    quantised = drawn(demo_server, ours(write(place("small.gguf"), native, Type.Q8_0)))
    assert 0 < np.abs(quantised - expected).max() < np.abs(other - expected).max() / 10


def test_one_encoder_twice(demo_server: Server, native: Arrays, place) -> None:
    half = write(place("half.gguf"), native)
    lacking = failure(demo_server, ours(half, "sdxl", clip_name2=NATIVE))
    expect(lacking, "type 'sdxl' also needs CLIP-G", "half.gguf", NATIVE)
    expect(failure(demo_server, ours(half, "sd3", clip_name2=NATIVE)), "half.gguf", "the same kind of text encoder")


def test_lora_on_a_quantised_text_encoder(demo_server: Server, native: Arrays, place) -> None:
    """The demo's LoRA is for the diffusion model; one for the text encoder is made here and must change the latent."""
    from safetensors.numpy import save_file

    name, rng = "lora_te1_text_model_encoder_layers_0_mlp_fc1", np.random.default_rng(0)
    factors = {f"{name}.lora_down.weight": (4, 768), f"{name}.lora_up.weight": (3072, 4)}
    lora = demo_server.models_dir / "loras" / "text.safetensors"
    save_file({key: rng.standard_normal(shape).astype(np.float32) for key, shape in factors.items()}, lora)
    small = ours(write(place("small.gguf"), native, Type.Q8_0))

    def with_lora(loader: dict[str, Any], strength: float) -> np.ndarray:
        prompt = workflow(loader, seed=FIXED_SEED)
        inputs = {"model": ["1", 0], "clip": [LOADER, 0], "lora_name": lora.name}
        inputs |= {"strength_model": 0.0, "strength_clip": strength}
        prompt[LORA] = {"class_type": "LoraLoader", "inputs": inputs}
        prompt[TEXT]["inputs"]["clip"] = [LORA, 1]
        return latent(demo_server, prompt)

    try:
        plain, patched = drawn(demo_server, small), with_lora(small, 0.1)
        assert np.abs(patched - plain).max() > 1e-3
        assert np.array_equal(with_lora(small, 0.1), patched)
        assert np.array_equal(drawn(demo_server, small), plain)
        # Next to the change that the LoRA makes, the encoder's quant type matters little.
        of_core = with_lora(CORE, 0.1) - drawn(demo_server, CORE)
        assert np.abs((patched - plain) - of_core).max() < np.abs(of_core).max() / 5
    finally:
        lora.unlink()


def test_replaced_file_is_used_at_once(demo_server: Server, native: Arrays, place) -> None:
    path = place("replaced.gguf")
    write(path, native, Type.Q8_0)
    before = drawn(demo_server, ours(path.name))
    other = path.with_suffix(".other")
    write(other, native, Type.Q4_0)
    os.replace(other, path)
    assert not np.array_equal(drawn(demo_server, ours(path.name)), before)


def test_menu_offers_both_formats_and_every_type(demo_server: Server, place) -> None:
    place("listed.gguf").write_bytes(b"")
    node = demo_server.object_info()["SluiceCLIPLoader"]["input"]
    names = node["required"]["clip_name1"][1]["options"]
    assert {"listed.gguf", NATIVE} <= set(names)
    core = demo_server.object_info()
    wanted = {t for key in ("CLIPLoader", "DualCLIPLoader") for t in core[key]["input"]["required"]["type"][0]}
    assert wanted <= set(node["required"]["type"][1]["options"])
    assert node["optional"]["clip_name2"][1]["options"][0] == "none"


# --- what does not


def test_diffusion_model(demo_server: Server, place) -> None:
    name = demo.GGUF_FILES["Q8_0"]
    shutil.copyfile(demo_server.models_dir / "diffusion_models" / name, place("diffusion.gguf"))
    expect(failure(demo_server, ours("diffusion.gguf")), "diffusion.gguf", "a diffusion model", CHOOSE_TEXT_ENCODER)


def matrices(*names: str) -> Arrays:
    return {name: np.zeros((8, 64), np.float16) for name in names}


BAD: dict[str, tuple[str, dict[str, Any], Arrays, tuple[str, ...]]] = {
    "unknown architecture": (
        "sd3",
        {"arch": "mamba"},
        matrices("token_embd.weight", "blk.0.ssm_in.weight"),
        ("no text encoder of the architecture 'mamba'", "choose one of these", "t5encoder"),
    ),
    "part of another architecture": (
        "lumina2",
        {"arch": "qwen3"},
        matrices("token_embd.weight", "blk.0.ffn_gate_exps.weight"),
        ("'blk.0.ffn_gate_exps.weight' is no part of a text encoder 'qwen3'", "convert it again"),
    ),
    "projector alone": (
        "qwen_image",
        {"arch": "clip", "general__type": "mmproj"},
        matrices("v.blk.0.attn_q.weight"),
        ("a vision projector", "choose the text encoder's file", "found beside it"),
    ),
    "LoRA": (
        "sd3",
        {"arch": "flux"},
        matrices("double_blocks.0.img_attn.qkv.lora_A.weight"),
        ("a LoRA", CHOOSE_TEXT_ENCODER),
    ),
    "heads not told": (
        "hunyuan_video",
        {"arch": "llama"},
        matrices("token_embd.weight", "blk.0.attn_q.weight"),
        ("'llama.attention.head_count' is None", "convert it again"),
    ),
    "no tokenizer": (
        "lumina2",
        {"arch": "gemma3", "tokenizer__ggml__model": "llama"},
        matrices("token_embd.weight"),
        ("no list 'tokenizer.ggml.tokens'", "made by llama.cpp"),
    ),
    "Qwen3-VL without projector": (
        "krea2",
        {"arch": "qwen3vl", "qwen3vl__embedding_length": 64},
        matrices("token_embd.weight"),
        ("by its vision projector", "into the same folder"),
    ),
    "nothing that belongs to a text encoder": (
        "sd3",
        {"arch": "marvel"},
        matrices("marvels.0.weight"),
        ("knows no text encoder", "'marvel'", "1 tensors", "'marvels.0.weight'", "update ComfyUI"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_no_usable_text_encoder(demo_server: Server, place, case: str) -> None:
    clip_type, metadata, tensors, words = BAD[case]
    name = write(place(f"{case}.gguf"), tensors, **metadata)
    others = {"clip_name2": NATIVE} if clip_type == "hunyuan_video" else {}
    expect(failure(demo_server, ours(name, clip_type, **others)), name, *words)


def test_truncated(demo_server: Server, native: Arrays, place) -> None:
    path = place("cut.gguf")
    write(path, native)
    os.truncate(path, path.stat().st_size // 2)
    expect(failure(demo_server, ours(path.name)), "cut.gguf", "it is incomplete, download it again")


def test_weights_missing(demo_server: Server, native: Arrays, place) -> None:
    lost = "text_model.encoder.layers.3.mlp.fc2.weight"
    name = write(place("lacking.gguf"), {key: value for key, value in native.items() if key != lost})
    expect(failure(demo_server, ours(name)), name, "lacks 1 of", lost, "it is incomplete")


def test_wrong_shape(demo_server: Server, native: Arrays, place) -> None:
    changed = "text_model.encoder.layers.3.mlp.fc2.weight"
    name = write(place("odd.gguf"), native | {changed: native[changed][:, :64].copy()})
    expect(failure(demo_server, ours(name)), name, "layers.3.mlp.fc2.weight", "has the shape", "the model needs")


@pytest.mark.parametrize(
    ("clip_type", "others", "words"),
    [
        ("flux", {}, ("type 'flux' takes 2 files, 1 given", "add the others")),
        ("wan", {"clip_name2": NATIVE}, ("type 'wan' takes 1 file, 2 given", "set the others to none", "sdxl")),
        (
            "sd3",
            {f"clip_name{n}": NATIVE for n in (2, 3, 4)},
            ("type 'sd3' takes 1 or 2 or 3 files, 4 given", "hidream"),
        ),
    ],
)
def test_wrong_number_of_files(demo_server: Server, native: Arrays, place, clip_type, others, words) -> None:
    name = write(place("half.gguf"), native)
    expect(failure(demo_server, ours(name, clip_type, **others)), *words)


def test_file_that_is_not_there(demo_server: Server) -> None:
    with pytest.raises(PromptFailed) as failed:
        demo_server.queue(workflow(ours(NATIVE, "sd3", clip_name3="nowhere.gguf")))
    assert "nowhere.gguf" in str(failed.value)
