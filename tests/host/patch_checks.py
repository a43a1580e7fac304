"""Checks of what the host does with the patches of a GGUF model: hooks, merges, saved files, memory, odd shapes.

Run as `model_checks.py` is, whose modes and host set-up these checks share.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from host import model_checks as base  # switches the host to the mode that the command line names, so it comes first

import comfy.hooks  # isort: skip
import comfy.model_management  # isort: skip
import comfy.sample  # isort: skip
import comfy.sd  # isort: skip
import comfy.weight_adapter  # isort: skip
import gguf  # isort: skip
import numpy as np  # isort: skip
import torch  # isort: skip
from comfy_extras.nodes_model_merging import ModelMergeSimple  # isort: skip
from host.model_checks import FOLDER, GGUF, MODE, ON_GPU, SAFETENSORS, latent, reference, weights, with_lora
from pack.loaders.diffusion import load_diffusion_model
from pack.loaders.gguf.types import GGMLType
from pack.loaders.ops import make_ops
from pack.loaders.patch_at_use import PatchAtUse
from pack.loaders.patcher import PatchingAtUse
from pack.loaders.quant.layout import quantized
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

CPU, META = torch.device("cpu"), torch.device("meta")
WEIGHT = "diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"


def functions(patcher) -> list[PatchAtUse]:
    """The patches on the model's layers now."""
    found = [f for m in patcher.model.modules() for f in getattr(m, "weight_function", ())]
    return [f for f in found if isinstance(f, PatchAtUse)]


def hooked_latent(patcher, mode=comfy.hooks.EnumHookMode.MaxSpeed, adapter=None, scheduled: bool = False):
    """One picture whose positive prompt alone has the LoRA, so that the host puts it on and off at every step."""
    hooks = comfy.hooks.create_hook_lora(adapter or load_file(FOLDER / "lora.safetensors"), 1.0, 1.0)
    if scheduled:
        frames = comfy.hooks.HookKeyframeGroup()
        frames.add(comfy.hooks.HookKeyframe(strength=1.0))
        frames.add(comfy.hooks.HookKeyframe(strength=0.3, start_percent=0.5))
        hooks.set_keyframes_on_hooks(frames)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 16, 8, 8, generator=generator)
    pooled = torch.randn(1, 2048, generator=generator) * 0.1
    negative = [[torch.randn(1, 77, 4096, generator=generator) * 0.1, {"pooled_output": pooled}]]
    positive = comfy.hooks.set_hooks_for_conditioning(negative, hooks)
    patcher = patcher.clone()
    patcher.set_hook_mode(mode)
    return comfy.sample.sample(
        patcher, noise, 3, 3.0, "euler", "simple", positive, negative, torch.zeros_like(noise),
        disable_pbar=True, seed=1,
    )  # fmt: skip


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal, but for the host's own rounding on a GPU (it patches in float32, a function in the compute dtype)."""
    return torch.allclose(one, other, rtol=0.05, atol=0.05) if ON_GPU else torch.equal(one, other)


# --- hooks


def check_hooks_equal_core_and_leave_nothing() -> None:
    patcher = load_diffusion_model(GGUF)
    plain, count = latent(patcher), len(weights(patcher))
    for mode in comfy.hooks.EnumHookMode:
        expected = hooked_latent(reference(), mode)
        assert close(hooked_latent(patcher, mode), expected)
        assert close(hooked_latent(patcher, mode), expected), "a second run differs"
        assert not functions(patcher) and len(weights(patcher)) == count
        assert torch.equal(latent(patcher), plain), "the hook left something behind"
        assert not torch.allclose(expected, plain, rtol=0.05, atol=0.05), "the hook changes nothing"


def check_hooks_follow_their_schedule_beside_a_lora() -> None:
    expected = hooked_latent(with_lora(reference(), -0.5), scheduled=True)
    patcher = load_diffusion_model(GGUF)
    assert close(hooked_latent(with_lora(patcher, -0.5), scheduled=True), expected)
    assert not torch.allclose(expected, hooked_latent(reference()), rtol=0.05, atol=0.05)


def check_one_hook_replaces_another() -> None:
    """The host goes from one cached group to the next without taking the first off."""
    patcher = load_diffusion_model(GGUF).clone(disable_dynamic=True)
    groups = []
    for strength in (1.0, -0.5):
        hooks = comfy.hooks.create_hook_lora(load_file(FOLDER / "lora.safetensors"), strength, 1.0)
        groups.append(hooks)
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    patcher.register_all_hook_patches(comfy.hooks.HookGroup.combine_all_hooks(groups), target)
    for group in (*groups, *groups):
        patcher.patch_hooks(group)
        layer = patcher.get_model_object(WEIGHT.removesuffix(".weight"))
        ours = [f for f in layer.weight_function if isinstance(f, PatchAtUse)]
        assert [f.patches[0][0] for f in ours] == [group.hooks[0].strength_model]
    patcher.patch_hooks(None)
    assert not functions(patcher)


def plain_file() -> Path:
    """The model's numbers in a GGUF file without any quantised weight."""
    path = FOLDER / "plain.gguf"
    if not path.exists():
        writer = gguf.GGUFWriter(path, "sd3")
        for name, tensor in load_file(SAFETENSORS).items():
            writer.add_tensor(name, tensor.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def check_hooks_on_plain_weights_and_biases() -> None:
    """The host writes hooked plain weights in place; those of a file are its read-only mapping."""
    bias = WEIGHT.replace(".weight", ".diff_b")
    size = load_file(SAFETENSORS)[WEIGHT.removeprefix("diffusion_model.").replace(".weight", ".bias")].shape
    adapter = {**load_file(FOLDER / "lora.safetensors"), bias: torch.full(size, 0.5)}
    patcher = load_diffusion_model(plain_file())
    plain, expected = latent(patcher), hooked_latent(reference(), adapter=adapter)
    assert not torch.equal(expected, hooked_latent(reference())), "the bias changes nothing"
    for _ in range(2):
        assert close(hooked_latent(patcher, adapter=adapter), expected)
        assert torch.equal(latent(patcher), plain)


def check_clones_without_dynamic_vram_patch_at_use() -> None:
    static = load_diffusion_model(GGUF).clone(disable_dynamic=True)
    assert isinstance(static, PatchingAtUse) and isinstance(static.clone(), PatchingAtUse)
    with_lora(static)
    assert not static.weight_wrapper_patches, "a LoRA on a clone reached the original"
    assert WEIGHT in with_lora(static).weight_wrapper_patches


# --- merges and saved files


def check_merge_takes_the_lora_along() -> None:
    one, other = load_diffusion_model(GGUF), load_diffusion_model(GGUF)
    merged = latent(ModelMergeSimple().merge(one, with_lora(other), 0.4)[0])
    expected = latent(ModelMergeSimple().merge(reference(), with_lora(reference()), 0.4)[0])
    # Merged biases are rounded to the type that the file has them in.
    assert torch.allclose(merged, expected, rtol=0, atol=0.05 if ON_GPU else 1e-5)
    assert (expected - latent(one)).abs().max() > 0.1, "the merge changes nothing"


def check_saved_model_is_dense_and_the_same() -> None:
    path = FOLDER / f"saved-{MODE}.safetensors"
    patcher = load_diffusion_model(GGUF)
    for model in (patcher, with_lora(patcher), ModelMergeSimple().merge(patcher, with_lora(patcher), 0.4)[0]):
        expected = latent(model)
        comfy.sd.save_checkpoint(str(path), model)
        saved = load_file(path)
        assert all(tensor.is_floating_point() for tensor in saved.values())
        assert saved[f"model.{WEIGHT}"].shape == weights(patcher)[WEIGHT].shape
        numbers = {k: t.to(torch.float16 if ON_GPU else torch.float32) for k, t in saved.items()}  # as in `reference`
        again = comfy.sd.load_diffusion_model_state_dict(numbers, disable_dynamic=True)
        # Saved, merged biases are rounded to the file's type; the dynamic patcher does not round them at use.
        assert close(latent(again), expected) or torch.allclose(latent(again), expected, rtol=0, atol=1e-5)
        assert torch.equal(latent(model), expected), "saving changed the model"
    path.unlink()


def check_saved_biases_are_the_files_wherever_the_model_ran() -> None:
    patcher = load_diffusion_model(GGUF, disable_dynamic=True)
    before = {name: tensor.clone() for name, tensor in patcher.model_state_dict_for_saving().items() if "bias" in name}
    latent(patcher)
    patched, cast = (patcher.model.get_submodule(WEIGHT.replace("qkv.weight", name)) for name in ("qkv", "proj"))
    with torch.no_grad():
        cast.bias = torch.nn.Parameter(cast.bias.to(torch.float16), requires_grad=False)  # as on a GPU
        patched.bias = torch.nn.Parameter(patched.bias.to(torch.float16) + 1, requires_grad=False)
    after = patcher.model_state_dict_for_saving()
    changed = WEIGHT.replace("weight", "bias")
    assert torch.equal(after[changed], patched.bias) and len(before) > 20
    for name in before.keys() - {changed}:
        assert after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]), name


def check_saving_makes_one_weight_at_a_time() -> None:
    patcher = with_lora(load_diffusion_model(GGUF))
    latent(patcher, steps=1)
    tensors = patcher.state_dict_for_saving()
    lazy = {k: t for k, t in tensors.items() if t.is_meta}
    assert {f"model.{name}" for name in weights(patcher)} <= lazy.keys()
    dense = lazy[f"model.{WEIGHT}"].to("cpu")
    assert dense.device == CPU and dense.is_contiguous()
    gone = weakref.ref(dense)
    del dense
    gc.collect()
    assert gone() is None


# --- patches that give a weight another shape


def widened(patcher):
    """What the Flux control LoRAs do to `img_in`: twice the inputs; then another patch of that shape."""
    shape = weights(patcher)[WEIGHT].shape if weights(patcher) else dict(patcher.model.named_parameters())[WEIGHT].shape
    generator = torch.Generator().manual_seed(1)
    narrow, first, second = (torch.randn(shape[0], n, generator=generator) for n in (shape[1], *(2 * shape[1],) * 2))
    patcher = patcher.clone()
    patcher.add_patches({WEIGHT: ("diff", (narrow,))}, 0.25)
    assert patcher.add_patches({WEIGHT: ("diff", (first, {"pad_weight": True}))}, 0.5) == [WEIGHT]
    patcher.add_patches({WEIGHT: ("diff", (second,))}, 0.125)
    return patcher


def widened_by_lora(patcher):
    """The same by a LoRA whose file has a `reshape_weight` for it."""
    rows, columns = weights(patcher)[WEIGHT].shape if weights(patcher) else patcher.get_model_object(WEIGHT).shape
    generator = torch.Generator().manual_seed(2)
    up, down = torch.randn(rows, 4, generator=generator), torch.randn(4, 2 * columns, generator=generator)
    patcher = patcher.clone()
    lora = comfy.weight_adapter.LoRAAdapter(set(), (up, down, None, None, None, [rows, 2 * columns]))
    assert patcher.add_patches({WEIGHT: lora}, 0.5) == [WEIGHT]
    return patcher


def check_reshaping_patches_go_the_hosts_way() -> None:
    for way in (widened, widened_by_lora):
        reshaping_goes_the_hosts_way(way)


def reshaping_goes_the_hosts_way(widened: Callable[[Any], Any]) -> None:
    patcher, plain_model = load_diffusion_model(GGUF), reference()
    before, count = latent(patcher), len(weights(patcher))
    saved, inputs = [], weights(patcher)[WEIGHT].shape[1]
    for model in (patcher, plain_model):
        wide = widened(model)
        assert WEIGHT in wide.patches and not wide.weight_wrapper_patches.get(WEIGHT)
        comfy.model_management.unload_all_models()
        if model is patcher:
            lazy = wide.model_state_dict_for_saving()[WEIGHT]
        comfy.model_management.load_models_gpu([wide])
        weight = wide.get_model_object(WEIGHT)
        saved.append(weight.detach().float().clone())
        assert weight.shape[1] == 2 * inputs
        comfy.model_management.unload_all_models()
    assert lazy.is_meta and lazy.shape == saved[0].shape
    assert torch.allclose(lazy.to("cpu").float(), saved[0].cpu(), atol=0.05 if ON_GPU else 0)
    assert torch.allclose(saved[0], saved[1], atol=0.05 if ON_GPU else 0, rtol=0.05 if ON_GPU else 0)
    assert len(weights(patcher)) == count and torch.equal(latent(patcher), before)


# --- memory


def check_adapters_move_with_their_layers() -> None:
    patcher = with_lora(load_diffusion_model(GGUF))
    function = patcher.weight_wrapper_patches[WEIGHT][0]
    tensors = [t for t in function.patches[0][1].weights if isinstance(t, torch.Tensor)]
    size = sum(t.numel() for t in tensors if t.dim() == 2) * function.dtype.itemsize
    assert function.nbytes == size > 0
    assert function.move_to(CPU) == 0, "nothing was anywhere else"
    assert patcher.clone().weight_wrapper_patches[WEIGHT][0] is function, "clones would copy once more"
    assert function.move_to(META) == size and function.move_to(META) == size
    moved = function.factors(META)
    assert moved is function.factors(META) and moved.nbytes == size and moved.a.device == META
    assert {t.device for t in tensors} == {CPU}, "the adapter itself was moved"
    assert function.move_to(CPU) == size and function.move_to(CPU) == 0
    merge = ModelMergeSimple().merge(patcher, patcher, 0.4)[0].weight_wrapper_patches[WEIGHT][-1]
    assert merge.move_to(META) == 0, "a second model went to the device"
    assert PatchAtUse(WEIGHT, [(1.0, ("model_as_lora", (torch.ones(9),)), 1.0, None, None)]).move_to(META) == 0
    if ON_GPU:
        latent(patcher)
        assert patcher.load_device in function._moved
        comfy.model_management.unload_all_models()
        assert not function._moved


def check_unloaded_model_lets_the_adapters_go() -> None:
    patcher = load_diffusion_model(GGUF)
    adapted = with_lora(patcher)
    latent(adapted)
    assert len(functions(patcher)) > 10
    adapter = weakref.ref(adapted.weight_wrapper_patches[WEIGHT][0])
    comfy.model_management.unload_all_models()
    assert not functions(patcher)
    del adapted
    gc.collect()
    assert adapter() is None, "something still holds the patches"


def check_replaced_weight_leaves_no_copy_on_the_device() -> None:
    ops = make_ops(torch.float32, None)
    layer = ops.Linear(64, 96)
    blocks = torch.from_numpy(np.zeros((96, 2 * 34), np.uint8))
    layer.load_state_dict({"weight": quantized(blocks, GGMLType.Q8_0, (96, 64)), "bias": torch.zeros(96)})
    layer.to(torch.bfloat16)  # stands for any device
    copy = weakref.ref(layer.weight)
    replacement = torch.ones(96, 64)
    layer.set_weight(replacement, inplace_update=True)
    assert layer.weight.data_ptr() != replacement.data_ptr(), "the host writes over one of them later"
    gc.collect()
    assert copy() is None


def check_weight_that_was_moved_twice_comes_home_without_a_copy() -> None:
    """The host moves a model that fits to the device layer by layer, and then once more as a whole."""
    ops = make_ops(torch.float32, None)
    layer = ops.Linear(64, 96)
    blocks = torch.from_numpy(np.zeros((96, 2 * 34), np.uint8))
    layer.load_state_dict({"weight": quantized(blocks, GGMLType.Q8_0, (96, 64)), "bias": torch.zeros(96)})
    weight, bias = layer.weight, layer.bias
    for _ in range(2):
        layer.to(torch.bfloat16)  # stands for any device
    assert layer.weight is not weight
    layer.to(torch.float32)
    assert layer.weight is weight and layer.bias is bias


def check_bias_that_was_cast_on_its_way_comes_home_without_a_copy() -> None:
    """On another device a bias is in the compute dtype; at home it is the file's, of another dtype or not."""
    for stored in (torch.bfloat16, torch.float16, torch.float32):
        with FakeTensorMode():  # tensors of any device, without their bytes
            layer = make_ops(torch.float16, None).Linear(64, 96)
            layer.load_state_dict({"weight": torch.ones(96, 64).half(), "bias": torch.ones(96, dtype=stored)})
            weight, bias = layer.weight, layer.bias
            for _ in range(2):
                layer.to("cuda:0")
                assert layer.bias.device.type == layer.weight.device.type == "cuda"
                assert layer.bias.dtype is torch.float16
            layer.to("cpu")
        assert layer.weight is weight and layer.bias is bias, stored


def check_mapped_weights_are_not_given_to_be_locked() -> None:
    patcher = load_diffusion_model(GGUF, disable_dynamic=True)
    asked, own = [], comfy.model_management.pin_memory

    def asking(tensor: torch.Tensor) -> bool:
        asked.append(tensor)
        return own(tensor)

    comfy.model_management.pin_memory = asking
    try:
        names = [WEIGHT, WEIGHT.replace("weight", "bias"), WEIGHT.replace("qkv", "ln_q")]
        for name in names:
            patcher.pin_weight_to_device(name)
        patcher.unpin_all_weights()
    finally:
        comfy.model_management.pin_memory = own
    assert len(asked) == 1 and asked[0] is patcher.model.get_parameter(names[2]), "a norm has memory of its own"


def check_weight_that_is_there_stays_what_it_is() -> None:
    """Whoever moves models does so outside of the executor's inference mode, too."""
    ops, blocks = make_ops(torch.float32, None), torch.from_numpy(np.zeros((96, 2 * 34), np.uint8))
    with torch.inference_mode():
        layer = ops.Linear(64, 96)
        layer.load_state_dict({"weight": quantized(blocks, GGMLType.Q8_0, (96, 64)), "bias": torch.zeros(96)})
        layer.weight = torch.nn.Parameter(layer.weight.clone(), requires_grad=False)  # stands for one on the device
    elsewhere = layer.weight
    layer.to("cpu")
    with torch.inference_mode():
        assert layer.state_dict().keys() == {"weight", "bias"}
    assert layer.weight is elsewhere


if __name__ == "__main__":
    base.main(globals())
