"""Checks of a text encoder from GGUF files that need the host's own classes: memory, patches, clones, files.

Run as `model_checks.py` is, whose modes and host set-up these checks share; FOLDER is empty at first.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

from host import model_checks as base  # switches the host to the mode that the command line names, so it comes first

import comfy.model_management  # isort: skip
import comfy.sd  # isort: skip
import psutil  # isort: skip
import torch  # isort: skip
from comfy_kitchen.tensor import QuantizedTensor  # isort: skip
from host import encoder_files
from host.model_checks import FOLDER, MODE, ON_GPU
from host.tiny_encoder import ENCODERS, TEXT, VOCABULARY
from pack.loaders.diffusion import ATTACHMENT
from pack.loaders.gguf.errors import GGUFError
from pack.loaders.text_encoder import MappedCLIP, load_text_encoder
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

TINY = ENCODERS["gemma2"]
GGUF, SAFETENSORS = FOLDER / "gemma2.gguf", FOLDER / "gemma2.safetensors"
LAYER = "gemma2_2b.transformer.model.layers.1.mlp.up_proj"
HIDDEN, MIDDLE = 256, 512


def make_files() -> None:
    made = encoder_files.files_of(TINY)
    encoder_files.write_model(GGUF, TINY, made)
    encoder_files.write_safetensors(SAFETENSORS, TINY, made)


def ours(path: Path = GGUF, **options: object) -> comfy.sd.CLIP:
    return load_text_encoder([path], TINY.clip_type, **options)  # type: ignore[arg-type]


def theirs(path: Path = SAFETENSORS) -> comfy.sd.CLIP:
    """The same numbers as plain weights, under the classic patcher."""
    clip = comfy.sd.load_text_encoder_state_dicts(
        [load_file(path)],
        clip_type=comfy.sd.CLIPType.LUMINA2,
        model_options={"dtype": torch.float32},
        disable_dynamic=True,
    )
    for parameter in clip.cond_stage_model.parameters():
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(False)
    return clip


def hidden(clip: comfy.sd.CLIP) -> torch.Tensor:
    tokens = {key: [[(t % VOCABULARY, w) for t, w in batch] for batch in b] for key, b in clip.tokenize(TEXT).items()}
    with torch.no_grad():
        return clip.encode_from_tokens(tokens).clone()


def with_lora(clip: comfy.sd.CLIP, strength: float = 1.0) -> comfy.sd.CLIP:
    generator = torch.Generator().manual_seed(1)
    name = f"text_encoders.{LAYER}"
    adapter = {
        f"{name}.lora_down.weight": torch.randn(4, HIDDEN, generator=generator) * 0.1,
        f"{name}.lora_up.weight": torch.randn(MIDDLE, 4, generator=generator) * 0.1,
    }
    return comfy.sd.load_lora_for_models(None, clip, adapter, 0, strength)[1]


def weights(clip: comfy.sd.CLIP) -> dict[str, QuantizedTensor]:
    return {k: p for k, p in clip.cond_stage_model.named_parameters() if isinstance(p, QuantizedTensor)}


def check_hidden_states_equal_dequantised_safetensors() -> None:
    clip = ours()
    assert ("classic" not in MODE) == clip.patcher.is_dynamic()
    assert len(weights(clip)) > 20
    first, expected = hidden(clip), hidden(theirs())
    assert torch.equal(first, expected)
    assert torch.equal(hidden(clip), first), "a second run differs from the first"
    assert MODE == "classic" or len(base.CASTS) > 10


def check_lora_equals_core_on_dense_weights() -> None:
    clip, plain_model = ours(), theirs()
    plain, adapted = hidden(clip), with_lora(clip)
    expected = hidden(with_lora(plain_model))
    # A product beside the weight's instead of a patched weight: the same sum in another order.
    assert (hidden(adapted) - expected).norm() < 1e-5 * expected.norm()
    assert torch.equal(hidden(adapted), hidden(adapted))
    assert (plain - expected).norm() > 1e-2 * expected.norm(), "the adapter changes nothing"
    assert torch.equal(hidden(clip), plain), "removing the adapter left something behind"
    assert not with_lora(clip).patcher.patches, "a patch for a quantised weight goes the host's way, which is dense"


def check_clones_share_the_model() -> None:
    clip = ours()
    clone = clip.clone()
    assert isinstance(clone, MappedCLIP) and isinstance(clone.clone(), MappedCLIP)
    assert type(clone.patcher) is type(clip.patcher)
    assert clone.patcher.get_attachment(ATTACHMENT) is clip.patcher.get_attachment(ATTACHMENT)
    expected = hidden(clip)
    hidden(with_lora(clone))
    assert torch.equal(hidden(clip), expected)


def check_vocabulary_is_never_dense() -> None:
    """No operation, from loading to the result, makes as many numbers as the table has."""

    class Numbers(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.is_floating_point() and not result.is_meta:
                Numbers.made = max(Numbers.made, 0 if isinstance(result, QuantizedTensor) else result.numel())
            return result

    with Numbers():
        clip = ours()
        hidden(clip)
        read = Numbers.made
        table = weights(clip)["gemma2_2b.transformer.model.embed_tokens.weight"]
        table.dequantize()
    assert Numbers.made == table.numel(), "the watcher saw nothing, so this check could not have failed"
    assert MIDDLE * HIDDEN <= read < table.numel()


def check_weights_are_the_mapping_also_after_unloading() -> None:
    clip = ours()
    loaded = clip.patcher.get_attachment(ATTACHMENT)
    names = encoder_files.gguf.get_tensor_name_map(encoder_files.gguf.MODEL_ARCH.GEMMA2, 8)
    for _ in range(2):
        for name, weight in weights(clip).items():
            stored = names.get_name(name.removeprefix("gemma2_2b.transformer."), (".weight",))
            view = torch.frombuffer(loaded.file.view(stored), dtype=torch.uint8)
            assert weight._qdata.data_ptr() == view.data_ptr(), name
            assert weight.nbytes == loaded.file.tensors[stored].nbytes
        hidden(with_lora(clip))
        comfy.model_management.unload_all_models()


def check_report_knows_file_architecture_and_types() -> None:
    loaded = ours().patcher.get_attachment(ATTACHMENT)
    assert (loaded.file.path, loaded.architecture, loaded.others) == (GGUF, "gemma2", ())
    assert sum(loaded.tensor_types.values()) == sum(info.nbytes for info in loaded.file.tensors.values())
    assert "gemma2.gguf (gemma2: " in repr(loaded)


def check_host_can_make_it_again() -> None:
    clip = ours()
    factory, arguments = clip.patcher.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert not again.is_dynamic() and again.model is not clip.cond_stage_model
    assert len([p for p in again.model.parameters() if isinstance(p, QuantizedTensor)]) == len(weights(clip))
    if clip.patcher.is_dynamic():
        static = clip.clone(disable_dynamic=True)
        assert not static.patcher.is_dynamic()


def check_saved_weights_are_dense() -> None:
    clip = ours()
    expected = hidden(clip)
    saving = getattr(clip, "state_dict_for_saving", clip.get_sd)
    prefix = "gemma2_2b.transformer."
    tensors = {name.removeprefix(prefix): t.to("cpu").contiguous() for name, t in saving().items() if prefix in name}
    assert all(not isinstance(t, QuantizedTensor) for t in tensors.values())
    path = FOLDER / "saved.safetensors"
    save_file({**tensors, "spiece_model": clip.tokenizer.state_dict()["spiece_model"]}, path)
    assert torch.equal(hidden(theirs(path)), expected)


def check_changed_file_is_noticed() -> None:
    path = FOLDER / "changed.gguf"
    path.write_bytes(GGUF.read_bytes())
    clip = ours(path)
    expected = hidden(clip)
    os.utime(path, (0, 0))
    try:
        hidden(clip)
    except GGUFError as error:
        assert "changed.gguf" in str(error)
    else:
        raise AssertionError("a changed file was read")
    assert torch.equal(hidden(ours(path)), expected)


def check_nothing_stays_when_it_is_dropped() -> None:
    path = FOLDER / "dropped.gguf"
    path.write_bytes(GGUF.read_bytes())
    clip = ours(path)
    hidden(clip)
    assert mapped(path)
    comfy.model_management.unload_all_models()
    del clip
    gc.collect()
    comfy.model_management.cleanup_models()
    gc.collect()
    assert not mapped(path)


def mapped(path: Path) -> bool:
    return any(m.path == str(path) for m in psutil.Process().memory_maps(grouped=False))


def check_no_operation_dequantises_unasked() -> None:
    base.UNHANDLED.found.clear()
    hidden(with_lora(ours()))
    assert not base.UNHANDLED.found, base.UNHANDLED.found[:3]


def check_logits_of_a_tied_table_do_not_make_it_dense() -> None:
    """In 16 bits, in which the host computes new words on a GPU. On the CPU it casts the table, and the product is made
    here as it is where the table lies on the device."""
    with torch.inference_mode():
        clip = ours()
        clip.load_model()
        language = next(m for m in clip.cond_stage_model.modules() if hasattr(m, "logits"))
        table = language.model.embed_tokens
        device = torch.device("cuda") if ON_GPU else torch.device("cpu")
        x = torch.randn(1, 3, HIDDEN, device=device, generator=torch.Generator(device).manual_seed(0)).bfloat16()
        exact = table.weight.to(device=device).dequantize().double()
        expected = x[:, -1:].double() @ exact.T
        base.UNHANDLED.found.clear()
        weight = table.weight.to(x)
        assert isinstance(weight, QuantizedTensor) and weight.dtype is x.dtype
        found = torch.nn.functional.linear(x[:, -1:], weight)
        # One rounding of the weight and one of the sum to 8 bits, and float32 sums in between.
        bound = 2.0**-7 * (x[:, -1:].double().abs() @ exact.abs().T) + 1e-6
        assert ((found - expected).abs() <= bound).all()
        assert not base.UNHANDLED.found, base.UNHANDLED.found[:3]
        by_host = language.logits(x)
        assert ((by_host - expected).abs() <= bound).all()
        resident = table.weight.device.type == "cuda"
        assert table.comfy_cast_weights is not resident
        table.weight_function = [lambda dense: dense + 1]
        assert table.comfy_cast_weights, "a patch would be left out"
        moved = x[:, -1:].double() @ (exact + 1).T
        bound = 2.0**-7 * (x[:, -1:].double().abs() @ (exact + 1).abs().T) + 1e-6
        assert ((language.logits(x) - moved).abs() <= bound).all()
        table.weight_function = []


if __name__ == "__main__":
    if MODE != "classic":  # as the stand-in does for diffusion models: a device that is not the CPU by its name
        comfy.model_management.text_encoder_device = lambda: torch.device("cpu", 0)
    with encoder_files.shrunk(TINY):
        make_files()
        base.main(globals())
