"""Apply LoRA in a real server: the example workflow's pictures, its errors in the node, text encoders, other formats.

The demo's LoRA draws every digit in stripes. Core's own loader and LoRA node draw the same prompts from the unquantised
model in the same run.
"""

from __future__ import annotations

import io
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from host.test_demo import UNQUANTISED, background_and_stroke, overlap
from pack.tools import demo, workflow
from pack.tools.host import ROOT
from pack.tools.server import PromptFailed, Server
from PIL import Image
from safetensors.numpy import load_file as load_latent
from safetensors.torch import load_file, save_file
from scipy import ndimage

EXAMPLE = ROOT / "example_workflows" / "sluice_demo_lora.json"
LORA = "demo_lora.safetensors"
PROMPTS = demo.PROMPTS[:2]
Api = dict[str, dict]


def api(prompt: str, model: str, strength: float = 1.0) -> Api:
    saved = workflow.load(EXAMPLE)
    workflow.set_widget(saved, "Prompt", "text", prompt)
    workflow.set_widget(saved, "LoRA (stripes)", "strength_model", strength)
    if model != UNQUANTISED:
        workflow.set_widget(saved, "Model", "model_name", model)
    found = workflow.to_api(saved)
    if model == UNQUANTISED:
        found["1"] = {"class_type": "UNETLoader", "inputs": {"unet_name": model, "weight_dtype": "default"}}
        lora = {"model": ["1", 0], "lora_name": LORA, "strength_model": strength}
        found["10"] = {"class_type": "LoraLoaderModelOnly", "inputs": lora}
    return found


@pytest.fixture(scope="module")
def pictures(demo_server: Server) -> dict[tuple[str, str, float], np.ndarray]:
    """By prompt, model file and strength: (height, width, RGB)."""
    drawn = {}
    for model in (demo.GGUF_FILES["Q8_0"], demo.GGUF_FILES["Q4_0"], UNQUANTISED):
        for prompt in PROMPTS:
            for strength in (1.0, 0.0):
                (png,) = demo_server.images(demo_server.queue(api(prompt, model, strength)))
                picture = Image.open(io.BytesIO(png)).convert("RGB")
                drawn[prompt, model, strength] = np.asarray(picture).astype(np.float32)
    return drawn


def pieces(shape: np.ndarray) -> int:
    """Parts of a shape that do not touch: a digit is one, a striped one falls into many."""
    parts, _ = ndimage.label(shape)
    return int((np.bincount(parts.ravel())[1:] > 8).sum())


@pytest.mark.slow
@pytest.mark.parametrize("model", demo.GGUF_FILES.values())
@pytest.mark.parametrize("prompt", PROMPTS)
def test_lora_draws_stripes(pictures, prompt: str, model: str) -> None:
    cases = ((prompt, model, 1.0), (prompt, model, 0.0), (prompt, UNQUANTISED, 1.0))
    striped, plain, expected = (background_and_stroke(pictures[case])[2] for case in cases)
    assert pieces(plain) == 1
    assert pieces(striped) >= 4, "no stripes"
    assert overlap(striped, expected) > 0.7, "not as core draws it from the unquantised model"
    assert overlap(striped, expected) > overlap(plain, expected) + 0.1


# --- the node, without pictures


def steps(lora: dict, **changes: dict) -> Api:
    """Two steps at the smallest size, ending in a latent file."""
    found = api(PROMPTS[0], demo.GGUF_FILES["Q4_0"])
    found["10"]["inputs"] |= lora
    found["6"]["inputs"] |= {"steps": 2}
    found["5"]["inputs"] |= {"width": 64, "height": 64}
    found["11"] = {"class_type": "SaveLatent", "inputs": {"samples": ["6", 0], "filename_prefix": "lora"}}
    for node in ("8", "9"):
        del found[node]
    for node, inputs in changes.items():
        found[node]["inputs"] |= inputs
    return found


def latent(server: Server, prompt: Api) -> np.ndarray:
    saved = server.queue(prompt)["11"]["latents"][0]
    return load_latent(server.output_dir / saved["subfolder"] / saved["filename"])["latent_tensor"]


@pytest.fixture(scope="module")
def loras(demo_server: Server) -> Path:
    return demo_server.models_dir / "loras"


def test_a_lora_that_matches_nothing_is_an_error_in_the_node(demo_server: Server, loras: Path) -> None:
    save_file({"lora_unet_elsewhere.lora_up.weight": torch.ones(4, 2)}, loras / "foreign.safetensors")
    with pytest.raises(PromptFailed) as failed:
        demo_server.queue(steps({"lora_name": "foreign.safetensors"}))
    (message,) = failed.value.node_errors.values()
    assert list(failed.value.node_errors) == ["10"]
    assert "foreign.safetensors: none of its 1 tensors match a weight of SD3" in message
    assert "choose a LoRA that was made for this model" in message
    assert np.isfinite(latent(demo_server, steps({}))).all(), "the next prompt does not run"


def test_a_part_that_matches_nothing_is_told_in_the_node(demo_server: Server, loras: Path) -> None:
    stranger = {"lora_unet_elsewhere.lora_up.weight": torch.ones(4, 2)}
    save_file(load_file(loras / LORA) | stranger, loras / "partly.safetensors")
    outputs = demo_server.queue(steps({"lora_name": "partly.safetensors"}))
    (told,) = outputs["10"]["text"]
    assert "1 of 52 tensors" in told and "lora_unet_elsewhere.lora_up.weight" in told
    assert told in demo_server.log_tail(200)
    assert "10" not in demo_server.queue(steps({}, **{"6": {"seed": 5}})), "a LoRA that fits is nothing to talk about"


@pytest.mark.parametrize("name", ["evil.pt", "evil.safetensors"])
def test_a_pickled_lora_is_refused_with_a_sentence(demo_server: Server, loras: Path, name: str) -> None:
    torch.save({"x": torch.ones(2)}, loras / name)
    with pytest.raises(PromptFailed) as failed:
        demo_server.queue(steps({"lora_name": name}))
    assert f"{name}: it is a pickled PyTorch file" in failed.value.node_errors["10"]


def test_a_missing_lora_is_refused_before_anything_runs(demo_server: Server) -> None:
    with pytest.raises(PromptFailed, match="refused") as failed:
        demo_server.queue(steps({"lora_name": "gone.safetensors"}))
    assert "'gone.safetensors' is in none of the model folders" in failed.value.node_errors["10"]


def test_only_readable_files_are_offered(demo_server: Server, loras: Path) -> None:
    for name in ("a.pt", "b.ckpt", "c.gguf", "d.sft"):
        (loras / name).touch()
    kind, options = demo_server.object_info()["SluiceLoraLoader"]["input"]["required"]["lora_name"]
    listed = options["options"] if kind == "COMBO" else kind
    assert {"c.gguf", "d.sft", LORA} <= set(listed)
    assert not {"a.pt", "b.ckpt"} & set(listed)


def test_gguf_lora_gives_the_same_latent(demo_server: Server, loras: Path) -> None:
    tensors = load_file(loras / LORA)
    writer = gguf.GGUFWriter(loras / "demo_lora.gguf", "sd3")
    writer.add_string("general.type", "adapter")
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.atleast_1d(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = latent(demo_server, steps({}))
    assert np.array_equal(latent(demo_server, steps({"lora_name": "demo_lora.gguf"})), expected)
    assert not np.array_equal(latent(demo_server, steps({"strength_model": 0.0})), expected)


def test_text_encoders_are_patched_as_core_patches_them(demo_server: Server, loras: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(loras / LORA)
    for layer in range(12):
        stem = f"lora_te1_text_model_encoder_layers_{layer}_mlp_fc1"
        # In a type that the node keeps, so that core's own node sees the same numbers.
        tensors[f"{stem}.lora_up.weight"] = torch.randn(3072, 4, generator=generator).bfloat16()
        tensors[f"{stem}.lora_down.weight"] = torch.randn(4, 768, generator=generator).bfloat16()
    save_file(tensors, loras / "both.safetensors")
    both = {"lora_name": "both.safetensors", "strength_model": 1.0, "clip": ["2", 0], "strength_clip": 0.7}
    prompts = {"3": {"clip": ["10", 1]}, "4": {"clip": ["10", 1]}}
    ours = latent(demo_server, steps(both, **prompts))
    core = steps(both, **prompts)
    core["10"] = {"class_type": "LoraLoader", "inputs": {**both, "model": ["1", 0]}}
    assert np.array_equal(ours, latent(demo_server, core))
    model_only = latent(demo_server, steps({"lora_name": "both.safetensors"}))
    assert not np.array_equal(ours, model_only), "the text encoder's part changes nothing"
    assert np.array_equal(model_only, latent(demo_server, steps({}))), "the text encoder's part reached the model"
