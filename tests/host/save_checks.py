"""Checks of saving loaded models as GGUF that need the host's own classes, run inside the host.

`python save_checks.py FOLDER TEXT_ENCODER`: FOLDER holds demo.safetensors (float32), demo.gguf (mixed types) and
lora.safetensors; files are written into it. TEXT_ENCODER is a CLIP-L in safetensors. Prints one JSON line for each
check.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

FOLDER, TEXT_ENCODER = Path(sys.argv[1]), Path(sys.argv[2])
sys.argv = ["main.py", "--use-pytorch-cross-attention", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import gguf  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from comfy_kitchen.tensor import QuantizedTensor  # noqa: E402
from pack.loaders.diffusion import load_diffusion_model  # noqa: E402
from pack.loaders.gguf.errors import GGUFError  # noqa: E402
from pack.loaders.gguf.reader import GGUFFile  # noqa: E402
from pack.loaders.model_weights import of_clip, of_model  # noqa: E402
from pack.loaders.quant import reference  # noqa: E402
from pack.loaders.save_model import save_model  # noqa: E402
from pack.loaders.tensors import state_dict  # noqa: E402
from pack.loaders.text_encoder import load_text_encoder  # noqa: E402
from pack.offload.attach import apply_block_swap  # noqa: E402
from pack.offload.costs import SwapRequest  # noqa: E402
from safetensors.torch import load_file  # noqa: E402


def latent(patcher) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 16, 8, 8, generator=generator)
    pooled = torch.randn(1, 2048, generator=generator) * 0.1
    condition = [[torch.randn(1, 77, 4096, generator=generator) * 0.1, {"pooled_output": pooled}]]
    return comfy.sample.sample(
        patcher, noise, 2, 3.0, "euler", "simple", condition, condition, torch.zeros_like(noise),
        disable_pbar=True, seed=1,
    )  # fmt: skip


def core_model():
    return comfy.sd.load_diffusion_model_state_dict(load_file(FOLDER / "demo.safetensors"), disable_dynamic=True)


def with_lora(patcher):
    return comfy.sd.load_lora_for_models(patcher, None, load_file(FOLDER / "lora.safetensors"), 0.8, 0)[0]


def save(patcher, name: str, recipe: str, **options) -> Path:
    new = of_model(patcher)
    path = FOLDER / name
    save_model(path, new.weights, recipe, new.architecture, metadata=new.metadata, sources=new.sources, **options)
    return path


def dequantised(path: Path) -> dict[str, torch.Tensor]:
    """What gguf-py reads in a file, in float32, in the true shapes."""
    reader, tensors = gguf.GGUFReader(path), {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        stated = reader.fields.get(f"comfy.gguf.orig_shape.{tensor.name}")
        shape = [int(n) for n in reversed(tensor.shape)] if stated is None else [int(n) for n in stated.contents()]
        tensors[tensor.name] = torch.from_numpy(np.ascontiguousarray(values)).reshape(shape)
    return tensors


def as_saved(path: Path):
    """Core's model whose weights are what gguf-py reads in the file."""
    return comfy.sd.load_diffusion_model_state_dict(dequantised(path), disable_dynamic=True)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


# --- the checks; each is independent of the others


def check_core_model_comes_back_bit_for_bit() -> None:
    path = save(core_model(), "core.gguf", "Q4_K_M")
    with GGUFFile(path) as file:
        types = {info.ggml_type.name for info in file.tensors.values()}
        assert file.metadata["general.architecture"] == "sd3"
        assert {"general.file_type", "general.quantization_version", "general.alignment"} <= set(file.metadata)
        assert set(file.tensors) == set(load_file(FOLDER / "demo.safetensors"))
    assert {"Q4_K", "Q6_K", "F32"} <= types
    assert torch.equal(latent(load_diffusion_model(path)), latent(as_saved(path)))


def check_lora_on_core_model_is_in_the_file() -> None:
    path = save(with_lora(core_model()), "core_lora.gguf", "F32")
    assert torch.equal(latent(load_diffusion_model(path)), latent(as_saved(path)))
    assert relative(latent(load_diffusion_model(path)), latent(with_lora(core_model()))) < 1e-4
    assert relative(latent(core_model()), latent(with_lora(core_model()))) > 1e-2


def check_lora_on_gguf_model_is_in_the_file() -> None:
    """Also while the model is loaded with it: what saving gives does not depend on what ran before."""
    patcher = with_lora(load_diffusion_model(FOLDER / "demo.gguf"))
    before = save(patcher, "gguf_lora.gguf", "Q8_0")
    expected = latent(patcher)
    after = save(patcher, "gguf_lora_loaded.gguf", "Q8_0")
    assert before.read_bytes() == after.read_bytes()
    assert torch.equal(latent(load_diffusion_model(before)), latent(as_saved(before)))
    assert relative(latent(load_diffusion_model(before)), expected) < 0.02
    assert relative(latent(load_diffusion_model(FOLDER / "demo.gguf")), expected) > 0.02


def check_gguf_model_is_saved_from_what_it_computes_with() -> None:
    patcher = load_diffusion_model(FOLDER / "demo.gguf")
    path = save(patcher, "dense.gguf", "F32")
    assert torch.equal(latent(load_diffusion_model(path)), latent(patcher))


def check_weights_of_the_wanted_type_are_copied() -> None:
    path = save(load_diffusion_model(FOLDER / "demo.gguf"), "same.gguf", "Q4_0")
    copied = 0
    with GGUFFile(FOLDER / "demo.gguf") as old, GGUFFile(path) as new:
        for name, info in old.tensors.items():
            if info.ggml_type.name == new.tensors[name].ggml_type.name == "Q4_0":
                assert bytes(old.view(name)) == bytes(new.view(name)), name
                copied += 1
    assert copied > 20


def check_its_own_file_is_not_replaced() -> None:
    patcher = load_diffusion_model(FOLDER / "demo.gguf")
    before = (FOLDER / "demo.gguf").read_bytes()
    try:
        save(patcher, "demo.gguf", "Q8_0")
    except GGUFError as error:
        assert "read from this very file" in str(error) and "choose another name" in str(error), error
    else:
        raise AssertionError("the file of a loaded model was replaced")
    assert (FOLDER / "demo.gguf").read_bytes() == before
    assert torch.isfinite(latent(patcher)).all()


def check_our_reader_agrees_with_gguf_py() -> None:
    path = save(core_model(), "mixed.gguf", "IQ3_M")
    expected = dequantised(path)
    with GGUFFile(path) as file:
        ours = state_dict(file)
        for name, info in file.tensors.items():
            data = torch.frombuffer(bytearray(file.view(name)), dtype=torch.uint8)
            values = reference.dequantize(data, info.ggml_type, expected[name].shape)
            assert torch.equal(values, expected[name]), name
        assert {name: tuple(t.shape) for name, t in ours.items()} == {n: tuple(t.shape) for n, t in expected.items()}


def check_core_fp8_model_is_multiplied_out() -> None:
    """Scales go into the weights, what serves FP8 arithmetic stays out, and a factor of the inputs goes in, too."""
    plain, scaled, expected = load_file(FOLDER / "demo.safetensors"), {}, {}
    for name, tensor in plain.items():
        if name.startswith("joint_blocks.1.x_block.mlp") and name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            scale = tensor.abs().max() / 448
            scaled[name] = (tensor / scale).to(torch.float8_e4m3fn)
            scaled[f"{layer}.weight_scale"], scaled[f"{layer}.input_scale"] = scale, torch.tensor(0.5)
            scaled[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
            expected[name] = scaled[name].float() * scale
        else:
            scaled[name] = tensor
    patcher = comfy.sd.load_diffusion_model_state_dict(scaled, disable_dynamic=True)
    fc1 = patcher.model.diffusion_model.joint_blocks[1].x_block.mlp.fc1
    assert isinstance(fc1.weight, QuantizedTensor)
    factor = torch.linspace(0.5, 2.0, fc1.weight.shape[1])
    fc1.register_parameter("pre_quant_scale", torch.nn.Parameter(factor, requires_grad=False))
    expected["joint_blocks.1.x_block.mlp.fc1.weight"] *= factor
    saved = dequantised(save(patcher, "fp8.gguf", "F32"))
    assert set(saved) == set(plain)
    assert len(expected) == 2
    for name, tensor in expected.items():
        assert relative(saved[name], tensor) < 2**-8, name  # core dequantises to what it computes in


def check_block_swap_changes_nothing() -> None:
    for number, make in enumerate((lambda: with_lora(load_diffusion_model(FOLDER / "demo.gguf")), core_model)):
        plain = save(make(), f"plain{number}.gguf", "Q5_K_S")
        streamed = apply_block_swap(make(), SwapRequest())
        assert save(streamed, f"streamed{number}.gguf", "Q5_K_S").read_bytes() == plain.read_bytes()
        latent(streamed)
        assert save(streamed, f"after{number}.gguf", "Q5_K_S").read_bytes() == plain.read_bytes()


def encoded(clip) -> torch.Tensor:
    return clip.encode_from_tokens_scheduled(clip.tokenize("a red seven on white"))[0][0]


def check_clip_comes_back_bit_for_bit() -> None:
    given = comfy.sd.load_clip([str(TEXT_ENCODER)], clip_type=comfy.sd.CLIPType.SD3)
    (new,) = of_clip(given)
    assert (new.folder, new.part, new.architecture) == ("clip", "clip_l", "clip_l")
    path = FOLDER / "clip.gguf"
    saved = save_model(path, new.weights, "Q8_0", new.architecture)
    assert sum(choice.ggml_type.name == "Q8_0" for choice in saved.chosen.values()) > 12 * 6
    plain = comfy.sd.load_text_encoder_state_dicts(
        [dequantised(path)], clip_type=comfy.sd.CLIPType.SD3, model_options={"dtype": torch.float32}
    )
    assert torch.equal(encoded(load_text_encoder([path], "sd3")), encoded(plain))
    assert relative(encoded(plain), encoded(given)) < 0.05
    again = of_clip(load_text_encoder([path], "sd3"))[0]
    assert again.sources == (path,)
    save_model(FOLDER / "clip_again.gguf", again.weights, "Q8_0", again.architecture, sources=again.sources)
    first, second = dequantised(path), dequantised(FOLDER / "clip_again.gguf")
    assert all(torch.equal(first[name], second[name]) for name in first | second)


def main() -> None:
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                with torch.inference_mode():
                    check()
                failure = ""
            except Exception:
                failure = traceback.format_exc()
            print(json.dumps({"check": name.removeprefix("check_"), "failure": failure}), flush=True)


if __name__ == "__main__":
    main()
