"""Unusable model files, as users meet them: the loader's error box says what to do, and the next prompt runs.

Everything goes through the HTTP API of a real server: queue a workflow, read the error of its node from the history,
queue a sound one. Files that are no GGUF, or broken in their bytes, come from `broken_files`; files that are sound
GGUF but no usable diffusion model are the demo model with one thing changed.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import builders as b
import numpy as np
import pytest
from broken_files import BROKEN
from pack.loaders.gguf.reader import GGUFFile
from pack.tools import demo
from pack.tools.server import PromptFailed, Server, Workflow
from safetensors.numpy import load_file

LOADER, SAMPLER = "1", "6"
GOOD = demo.GGUF_FILES["Q8_0"]
CORRUPT = "it is damaged or was written by a faulty tool, download or convert it again"
INCOMPLETE = "it is incomplete or was converted wrongly, download or convert it again"
UNFITTING = "this version of ComfyUI and ComfyUI-Sluice do not fit each other (update both)"
DETECTION = "in ComfyUI/comfy/model_detection.py:"
CHOOSE = "choose a diffusion model here"
CUT_OFF = "it is incomplete, download it again"

Tensors = dict[str, b.Tensor]
FIXED_SEED = 1 << 40
seeds = itertools.count()  # a workflow that the server has seen already would not run again


def workflow(model: str, **loader_inputs: object) -> Workflow:
    """One step at the smallest size, ending in a latent file."""
    inputs: dict[str, dict] = {
        LOADER: {"model_name": model, **loader_inputs},
        "2": {"clip_name": Path(demo.TEXT_ENCODER).name, "type": "sd3", "device": "default"},
        "3": {"clip": ["2", 0], "text": "red seven on white"},
        "5": {"width": 64, "height": 64, "batch_size": 1},
        SAMPLER: {
            **{"model": [LOADER, 0], "positive": ["3", 0], "negative": ["3", 0], "latent_image": ["5", 0]},
            **{"seed": next(seeds), "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"},
            "denoise": 1.0,
        },
        "7": {"samples": [SAMPLER, 0], "filename_prefix": "bad_input/latent"},
    }
    types = {
        LOADER: "SluiceDiffusionModelLoader",
        **{"2": "CLIPLoader", "3": "CLIPTextEncode", "5": "EmptySD3LatentImage"},
        **{SAMPLER: "KSampler", "7": "SaveLatent"},
    }
    return {node: {"class_type": types[node], "inputs": values} for node, values in inputs.items()}


def latent(server: Server, model: str | Workflow, seed: int | None = None) -> np.ndarray:
    prompt = workflow(model) if isinstance(model, str) else model
    if seed is not None:
        prompt[SAMPLER]["inputs"]["seed"] = seed
    saved = server.queue(prompt)["7"]["latents"][0]
    return load_file(server.output_dir / saved["subfolder"] / saved["filename"])["latent_tensor"]


def failure(server: Server, model: str, node: str = LOADER, **loader_inputs: object) -> str:
    """What the error box of `node` shows; afterwards a sound workflow must run."""
    with pytest.raises(PromptFailed) as failed:
        server.queue(workflow(model, **loader_inputs))
    assert list(failed.value.node_errors) == [node], failed.value
    assert np.isfinite(latent(server, GOOD)).all()
    return failed.value.node_errors[node]


@pytest.fixture(scope="session")
def tensors(demo_server: Server) -> Tensors:
    """The demo model's tensors, to be written again with one thing changed."""
    with GGUFFile(demo_server.models_dir / "diffusion_models" / GOOD) as file:
        return {
            info.name: b.Tensor(info.name, info.shape, int(info.ggml_type), bytes(file.view(info.name)))
            for info in file.tensors.values()
        }


@pytest.fixture
def place(demo_server: Server) -> Iterator[Callable[[str, bytes], Path]]:
    """Put files into the server's folder of diffusion models until the test ends."""
    placed = []

    def put(name: str, content: bytes) -> Path:
        path = demo_server.models_dir / "diffusion_models" / name
        path.write_bytes(content)
        placed.append(path)
        return path

    yield put
    for path in placed:
        path.unlink(missing_ok=True)


def written(tensors: Tensors, **metadata: object) -> bytes:
    return b.gguf_bytes({"general.architecture": "sd3", **metadata}, list(tensors.values()))


# --- files that cannot be read


def cut(keep: float) -> Callable[[Tensors], bytes]:
    def make(tensors: Tensors) -> bytes:
        content = written(tensors)
        return content[: int(len(content) * keep)]

    return make


def overwritten(tensors: Tensors) -> bytes:
    content = bytearray(written(tensors))
    place = content.index(b"joint_blocks.1.x_block.mlp.fc1.weight")
    content[place - 4 : place + 60] = np.random.default_rng(0).bytes(64)
    return bytes(content)


def with_type(number: int) -> Callable[[Tensors], bytes]:
    """One tensor of that type, its bytes all zero."""
    b.BLOCK_SIZES.update({9: (32, 40), 15: (256, 292), 41: (128, 18)})

    def make(tensors: Tensors) -> bytes:
        name = "joint_blocks.0.x_block.mlp.fc1.weight"
        elements, nbytes = b.BLOCK_SIZES.get(number, (1, 1))
        shape = tensors[name].shape
        changed = b.Tensor(name, shape, number, bytes(shape[0] * shape[1] // elements * nbytes))
        return written({**tensors, name: changed})

    return make


UNREADABLE: dict[str, tuple[Callable[[Tensors], bytes], tuple[str, ...]]] = {
    "cut in the weights": (cut(0.6), ("ends at byte", "the file has", CUT_OFF)),
    "cut in the header": (cut(0.0005), ("download it again",)),
    "overwritten in the header": (overwritten, ("download or convert it again",)),
    "unknown type": (with_type(77), ("fc1.weight", "unknown tensor type 77", "update ComfyUI-Sluice")),
    **{
        f"no dequantiser for {kind}": (
            with_type(number),
            ("fc1.weight", kind, "use a conversion in another type, such as Q8_0 or Q4_K"),
        )
        for kind, number in (("Q8_1", 9), ("Q8_K", 15), ("Q1_0", 41))
    },
}
# The reader's own tests go through all of them; these are the ones that users meet, and a few hostile ones.
FROM_CORPUS = (
    *("empty", "web page", "git lfs", "safetensors", "torch zip", "reserved space", "version 1", "big-endian"),
    *("huge tensor count", "largest string", "string array too long", "arrays too deep", "shape of 2^504", "overlap"),
    *("largest offset", "tensor name not UTF-8"),
)


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_file(demo_server: Server, place, tensors: Tensors, case: str) -> None:
    make, words = UNREADABLE[case]
    name = place(f"{case}.gguf", make(tensors)).name
    expect(failure(demo_server, name), name, *words)


@pytest.mark.parametrize("case", FROM_CORPUS)
def test_broken_file(demo_server: Server, place, case: str) -> None:
    content, words = BROKEN[case]
    name = place(f"{case}.gguf", content).name
    expect(failure(demo_server, name), name, *words)


def expect(message: str, *words: str) -> None:
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in {message!r}"
    assert len(message) < 1000, "nobody reads that much"


# --- sound GGUF files that are no usable diffusion model


def matrices(*names: str) -> Tensors:
    return {name: b.Tensor(name, (8, 64), b.Q8_0) for name in names}


BLOCK = "blk.0.attn_q.weight"
OTHER_KINDS: dict[str, tuple[dict[str, object], Tensors, tuple[str, ...]]] = {
    "unknown architecture": (
        {"general.architecture": "marvel"},
        matrices("marvels.0.weight", "marvels.1.weight"),
        ("knows no diffusion model", "'marvel'", "2 tensors", "'marvels.0.weight'", "update ComfyUI"),
    ),
    "no architecture": ({}, matrices("w"), ("knows no diffusion model", "no architecture stated", "update ComfyUI")),
    "no tensors": ({"general.architecture": "flux"}, {}, ("it holds no tensors", INCOMPLETE)),
    "T5 by its tensors": (
        {},
        matrices("token_embd.weight", "enc.blk.0.attn_q.weight"),
        ("a text encoder", "load it with Load CLIP (GGUF)", CHOOSE),
    ),
    "LLM by its tensors": (
        {"general.architecture": "qwen3"},
        matrices("output_norm.weight", BLOCK),
        ("a text encoder", "load it with Load CLIP (GGUF)", CHOOSE),
    ),
    "T5 by its architecture": (
        {"general.architecture": "t5"},
        matrices("shared.weight"),
        ("a text encoder", "load it with Load CLIP (GGUF)", CHOOSE),
    ),
    "mmproj by its tensors": (
        {"general.architecture": "clip"},
        matrices("mm.0.weight", "v.blk.0.attn_q.weight"),
        ("a vision projector of a text encoder (mmproj)", CHOOSE),
    ),
    "mmproj by its architecture": (
        {"general.architecture": "clip", "general.type": "mmproj"},
        matrices("resampler.weight"),
        ("a vision projector of a text encoder (mmproj)", CHOOSE),
    ),
    "LoRA of diffusers": (
        {"general.architecture": "flux"},
        matrices("transformer.blocks.0.attn.to_q.lora_A.weight", "transformer.blocks.0.attn.to_q.lora_B.weight"),
        ("a LoRA", "a LoRA loader", CHOOSE),
    ),
    "LoRA of kohya": (
        {},
        matrices("lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"),
        ("a LoRA", "a LoRA loader", CHOOSE),
    ),
    "LoRA of llama.cpp": (
        {"general.architecture": "qwen3", "general.type": "adapter"},
        matrices(f"{BLOCK}.lora_a", f"{BLOCK}.lora_b"),
        ("a LoRA", "a LoRA loader", CHOOSE),
    ),
    "LoKr": ({}, matrices("diffusion_model.blocks.0.attn.lokr_w1"), ("a LoRA", "a LoRA loader", CHOOSE)),
    "VAE": (
        {},
        matrices("encoder.conv_in.weight", "decoder.conv_out.weight"),
        ("a VAE", "'Load VAE'", CHOOSE),
    ),
    "VAE of Wan": (
        {"general.architecture": "wan"},
        matrices("encoder.conv1.weight", "decoder.head.2.weight"),
        ("a VAE", "'Load VAE'", CHOOSE),
    ),
}


@pytest.mark.parametrize("case", OTHER_KINDS)
def test_file_of_another_kind(demo_server: Server, place, case: str) -> None:
    metadata, rows, words = OTHER_KINDS[case]
    name = place(f"{case}.gguf", b.gguf_bytes(metadata, list(rows.values()))).name
    expect(failure(demo_server, name), name, *words)


def without(*parts: str) -> Callable[[Tensors], bytes]:
    return lambda tensors: written({k: t for k, t in tensors.items() if not any(part in k for part in parts)})


def reshaped(name: str, shape: tuple[int, ...]) -> Callable[[Tensors], bytes]:
    return lambda tensors: written({**tensors, name: b.Tensor(name, shape, b.F32)})


def stating(value: object) -> Callable[[Tensors], bytes]:
    return lambda tensors: written(tensors, **{"comfy.gguf.orig_shape.x_embedder.proj.weight": value})


ORIG_SHAPE = "'comfy.gguf.orig_shape.x_embedder.proj.weight'"
UNFIT: dict[str, tuple[Callable[[Tensors], bytes], tuple[str, ...]]] = {
    "a matrix missing": (
        without("joint_blocks.2.x_block.mlp.fc1.weight"),
        ("lacks 1 of the model's", "'joint_blocks.2.x_block.mlp.fc1.weight'", INCOMPLETE),
    ),
    "a norm missing": (
        without("joint_blocks.2.x_block.attn.ln_q.weight"),
        ("lacks 1 of the model's", "'joint_blocks.2.x_block.attn.ln_q.weight'", INCOMPLETE),
    ),
    "a whole block missing": (without("joint_blocks.1."), ("lacks", "'joint_blocks.1.", INCOMPLETE)),
    "the last layer missing": (without("final_layer."), ("final_layer", INCOMPLETE)),
    "what detection reads missing": (
        without("x_embedder.proj.weight"),
        ("ComfyUI cannot make a model of its tensors", "'x_embedder.proj.weight'", DETECTION, UNFITTING),
    ),
    "a wrong shape": (
        reshaped("joint_blocks.0.x_block.attn.proj.weight", (256, 128)),
        ("'joint_blocks.0.x_block.attn.proj.weight'", "(256, 128)", "(256, 256)", INCOMPLETE),
    ),
    "a bias of a wrong shape": (
        reshaped("joint_blocks.0.x_block.attn.proj.bias", (255,)),
        ("'joint_blocks.0.x_block.attn.proj.bias'", "(255,)", "(256,)", INCOMPLETE),
    ),
    "a norm of a wrong shape": (
        reshaped("joint_blocks.0.x_block.attn.ln_q.weight", (63,)),
        ("'joint_blocks.0.x_block.attn.ln_q.weight'", "(63,)", "(64,)", INCOMPLETE),
    ),
    "a scalar where detection reads a shape": (
        reshaped("x_embedder.proj.weight", ()),
        ("ComfyUI cannot make a model of its tensors", DETECTION, UNFITTING),
    ),
    "orig_shape of other size": (stating(b.array(b.INT32, [256, 16, 2, 3])), (ORIG_SHAPE, "[256, 16, 2, 3]", CORRUPT)),
    "orig_shape negative": (stating(b.array(b.INT32, [-256, -16, 2, 2])), (ORIG_SHAPE, CORRUPT)),
    "orig_shape of words": (stating(b.array(b.STRING, ["256", "wide"])), (ORIG_SHAPE, CORRUPT)),
    "orig_shape no list": (stating(16384), (ORIG_SHAPE, CORRUPT)),
}


@pytest.mark.parametrize("case", UNFIT)
def test_model_with_something_wrong(demo_server: Server, place, tensors: Tensors, case: str) -> None:
    make, words = UNFIT[case]
    name = place(f"{case}.gguf", make(tensors)).name
    expect(failure(demo_server, name), name, *words)


# --- what a user chooses wrongly, and files that change under a loaded model


def test_missing_file(demo_server: Server) -> None:
    message = failure(demo_server, "gone.gguf")
    expect(message, "'gone.gguf' is in none of the model folders", "choose another file", "refresh the list")
    assert str(demo_server.models_dir / "diffusion_models") in message


def test_file_outside_the_model_folders(demo_server: Server, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.gguf").write_bytes(b.gguf_bytes())
    for name in (str(tmp_path / "elsewhere.gguf"), os.path.relpath(tmp_path / "elsewhere.gguf")):
        expect(failure(demo_server, name), "is in none of the model folders")


def test_unknown_compute_dtype(demo_server: Server) -> None:
    message = failure(demo_server, GOOD, compute_dtype="int4")
    expect(message, "compute_dtype", "'int4'", "auto", "bfloat16", "float16", "float32")


def test_missing_part_of_a_split_model(demo_server: Server, place, tensors: Tensors) -> None:
    parts = [place(name, content) for name, content in split(tensors).items()]
    parts[1].unlink()
    message = failure(demo_server, parts[0].name)
    expect(message, parts[0].name, f"part 2 of 2 of the model, {parts[1].name}, is missing", "download it into that")


def split(tensors: Tensors) -> dict[str, bytes]:
    rows = list(tensors.values())
    halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    return {
        f"halved-{i + 1:05d}-of-00002.gguf": b.gguf_bytes(b.split_keys(i, 2, len(rows)), half)
        for i, half in enumerate(halves)
    }


def another(tensors: Tensors) -> Tensors:
    """A model of the same size that draws something else; what differs is in the last part of a split one."""
    name = "y_embedder.mlp.2.bias"
    ones = np.full(tensors[name].shape, 0x3F80, "<u2")
    return {**tensors, name: b.Tensor(name, tensors[name].shape, b.BF16, ones.tobytes())}


def rename_over(path: Path, content: bytes) -> None:
    other = path.with_suffix(".partial")
    other.write_bytes(content)
    other.replace(path)


def rewrite(path: Path, content: bytes) -> None:
    """Into the same inode, which the loaded model has mapped."""
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


REPLACE = pytest.mark.parametrize(
    "replace",
    [
        rename_over,
        pytest.param(
            rewrite,
            marks=pytest.mark.skipif(os.name == "nt", reason="Windows lets nobody write into a mapped file"),
        ),
    ],
)


@REPLACE
def test_replaced_file_is_used_at_once(demo_server: Server, place, tensors: Tensors, replace) -> None:
    first, second = written(tensors), written(another(tensors))
    path = place("replaced.gguf", first)
    before = latent(demo_server, path.name, FIXED_SEED)
    replace(path, second)
    after = latent(demo_server, path.name, FIXED_SEED)
    assert not np.array_equal(before, after)
    assert np.array_equal(after, latent(demo_server, place("second.gguf", second).name, FIXED_SEED))


def linked(model: str) -> Workflow:
    """The model's name comes from another node."""
    prompt = workflow(model)
    prompt["8"] = {"class_type": "ComfySwitchNode", "inputs": {"switch": True, "on_true": model, "on_false": GOOD}}
    prompt[LOADER]["inputs"]["model_name"] = ["8", 0]
    return prompt


def test_name_from_another_node(demo_server: Server, place, tensors: Tensors) -> None:
    path = place("linked.gguf", written(tensors))
    first = latent(demo_server, linked(path.name), FIXED_SEED)
    assert np.array_equal(first, latent(demo_server, path.name, FIXED_SEED))
    rename_over(path, written(another(tensors)))
    assert not np.array_equal(first, latent(demo_server, linked(path.name), FIXED_SEED))
    with pytest.raises(PromptFailed) as failed:
        demo_server.queue(linked("nowhere.gguf"))
    expect(failed.value.node_errors[LOADER], "'nowhere.gguf' is in none of the model folders")


@REPLACE
def test_replaced_part_is_used_at_once(demo_server: Server, place, tensors: Tensors, replace) -> None:
    first, last = (place(name, content) for name, content in split(tensors).items())
    before = latent(demo_server, first.name, FIXED_SEED)
    replace(last, split(another(tensors))[last.name])
    assert not np.array_equal(before, latent(demo_server, first.name, FIXED_SEED))


@REPLACE
@pytest.mark.parametrize("keep", [0.6, 0.0005, 0.0])
def test_file_cut_under_a_loaded_model(demo_server: Server, place, tensors: Tensors, replace, keep: float) -> None:
    path = place("loaded.gguf", written(tensors))
    latent(demo_server, path.name)
    replace(path, cut(keep)(tensors))
    expect(failure(demo_server, path.name), path.name, CUT_OFF)


@REPLACE
def test_file_corrupted_under_a_loaded_model(demo_server: Server, place, tensors: Tensors, replace) -> None:
    path = place("loaded.gguf", written(tensors))
    latent(demo_server, path.name)
    replace(path, overwritten(tensors))
    expect(failure(demo_server, path.name), path.name, "download or convert it again")


@pytest.mark.skipif(os.name == "nt", reason="Windows lets nobody delete a mapped file")
def test_file_deleted_under_a_loaded_model(demo_server: Server, place, tensors: Tensors) -> None:
    path = place("deleted.gguf", written(tensors))
    latent(demo_server, path.name)
    path.unlink()
    expect(failure(demo_server, path.name), "'deleted.gguf' is in none of the model folders", "put it there")
    path.write_bytes(written(tensors))
    latent(demo_server, path.name)
