"""Checks of what adapters hold: every kind in 16 bits, the odd forms that are about, and what cannot fit.

Run as `model_checks.py` is, whose modes and host set-up these checks share.
"""

from __future__ import annotations

from host import model_checks as base  # switches the host to the mode that the command line names, so it comes first

import comfy.lora  # isort: skip
import comfy.sd  # isort: skip
import gguf  # isort: skip
import numpy as np  # isort: skip
import torch  # isort: skip
from host.lora_checks import LAYER, MLP, WAYS, adapted, adapter_of, kinds, low_rank, near, random, records
from host.model_checks import FOLDER, GGUF, ON_GPU, latent, reference
from pack.loaders import compat
from pack.loaders.diffusion import load_diffusion_model
from pack.loaders.patch_at_use import patch_at_use
from pack.lora.apply import apply
from pack.lora.read import AdapterFile, LoraError, read

ROWS, COLUMNS = 768, 256  # of LAYER
SENSITIVE, ITS_ROWS = "diffusion_model.joint_blocks.0.x_block.adaLN_modulation.1", 1536  # and COLUMNS
CONVOLUTION, KERNEL = "diffusion_model.x_embedder.proj", (256, 16, 2, 2)


def dora(rows: int = ROWS) -> torch.Tensor:
    return random(rows, 1, seed=7, scale=0.2) + 1


def by_core(adapter: AdapterFile, strength: float = 0.8) -> torch.Tensor:
    patched, _ = comfy.sd.load_lora_for_models(reference(), None, adapter.tensors, strength, 0)
    return latent(patched, steps=1)


def check_every_kind_in_16_bits() -> None:
    """The host computes a patch that it writes into a weight in float32, and one at use in the weight's own type."""
    shape, weight = (ROWS, COLUMNS), random(ROWS, COLUMNS, seed=9, scale=0.02)
    found_kinds = kinds() | {
        "boft with rescale": {**kinds()["boft"], f"{LAYER}.rescale": torch.ones(ROWS, 1) * 1.1},
        "lokr of four, dora": {
            f"{LAYER}.lokr_{end}": random(*sizes, seed=i, scale=0.3) for i, (end, sizes) in enumerate((
                ("w1_a", (24, 4)), ("w1_b", (4, 16)), ("w2_a", (32, 4)), ("w2_b", (4, 16)),
            ))
        } | {f"{LAYER}.dora_scale": dora()},
        "dora of columns": {**low_rank(LAYER, *shape), f"{LAYER}.dora_scale": random(1, COLUMNS, scale=0.2) + 1},
    }  # fmt: skip
    checked = 0
    for kind, tensors in found_kinds.items():
        patches = comfy.lora.load_lora(adapter_of(tensors).tensors, {LAYER: f"{LAYER}.weight"}, log_missing=False)
        if f"{LAYER}.weight" not in patches:
            continue
        checked += 1
        for dtype in (torch.bfloat16, torch.float16):
            given = [(0.8, patches[f"{LAYER}.weight"], 1.0, None, None)]
            start = weight.to(dtype).float()
            expected = comfy.lora.calculate_weight(given, start.clone(), LAYER)
            assert (expected - start).norm() > 0.002 * start.norm(), kind
            functions = (patch_at_use(LAYER, given, shape, dtype), compat.patch_at_use(LAYER, {LAYER: given}))
            for function in functions:
                found = function(start.to(dtype))
                assert found.dtype == dtype
                if any(name in kind for name in ("dora", "oft")):
                    assert torch.equal(found, expected.to(dtype)), (kind, dtype)
                    continue
                # The factors, their product, its multiple and the sum are rounded, each by eps / 2 of what it is.
                error = (found.float() - expected).norm()
                assert error < 2 * torch.finfo(dtype).eps * (expected.norm() + (expected - start).norm()), (kind, dtype)
    assert checked > 12


def check_halves_that_the_host_swaps() -> None:
    """diffusers has the two halves of some layers the other way round, so the host's map has a function there."""
    patcher = load_diffusion_model(GGUF)
    plain = latent(patcher, steps=1)
    for more in ({}, {"dora_scale": dora(512)}):
        adapter = adapter_of(low_rank("transformer.norm_out.linear", 512, 256, **more))
        expected = by_core(adapter)
        assert not torch.equal(expected, plain)
        for way in WAYS:
            found = latent(adapted(patcher, way, 0.8, adapter), steps=1)
            assert near(found, expected) and (ON_GPU or torch.equal(found, expected)), (more.keys(), way)


def check_convolutions_with_a_core_or_a_magnitude() -> None:
    rows, columns, *kernel = KERNEL
    up, down = random(rows, 4, 1, 1), random(4, columns, *kernel, seed=1)
    magnitude = random(rows, seed=2, scale=0.2) + 1
    pair = {f"{CONVOLUTION}.lora_B.weight": up, f"{CONVOLUTION}.lora_A.weight": down}
    forms = {
        "tucker": {
            f"{CONVOLUTION}.lora_up.weight": up, f"{CONVOLUTION}.lora_down.weight": random(4, columns, 1, 1),
            f"{CONVOLUTION}.lora_mid.weight": random(4, 4, *kernel, seed=3, scale=2.0),
        },
        "loha, tucker": {
            f"{CONVOLUTION}.hada_{end}": random(4, *sizes, seed=i, scale=0.3) for i, (end, sizes) in enumerate((
                ("w1_a", (rows,)), ("w1_b", (columns,)), ("t1", (4, *kernel)),
                ("w2_a", (rows,)), ("w2_b", (columns,)), ("t2", (4, *kernel)),
            ))
        },
        "dora": {**pair, f"{CONVOLUTION}.dora_scale": magnitude.view(-1, 1, 1, 1)},
        "dora of peft": {**pair, f"{CONVOLUTION}.lora_magnitude_vector.weight": magnitude.view(1, -1, 1, 1)},
    }  # fmt: skip
    patcher = load_diffusion_model(GGUF)
    plain, found = latent(patcher, steps=1), {}
    for form, tensors in forms.items():
        adapter = adapter_of(tensors)
        applied = apply(adapter, patcher, None, 0.8, 0)
        assert not applied.unmatched
        found[form] = latent(applied.model, steps=1)
        assert near(found[form], by_core(adapter)) and not near(found[form], plain), form
    assert torch.equal(found["dora"], found["dora of peft"])


def check_a_kind_that_is_no_pair_keeps_its_place_in_a_stack() -> None:
    """DoRA scales what was added before it, so the order counts."""
    first, second = adapter_of(low_rank(LAYER, ROWS, COLUMNS)), adapter_of(low_rank(LAYER, ROWS, COLUMNS, seed=20), "b")
    middle = adapter_of({**low_rank(LAYER, ROWS, COLUMNS, seed=10), f"{LAYER}.dora_scale": dora()}, "c")

    def core(patcher, adapter: AdapterFile, strength: float):
        return comfy.sd.load_lora_for_models(patcher, None, adapter.tensors, strength, 0)[0]

    def ours(patcher, adapter: AdapterFile, strength: float):
        return adapted(patcher, "auto", strength, adapter)

    def stacked(patcher, steps: tuple) -> torch.Tensor:
        for step, adapter, strength in zip(steps, (first, middle, second), (3.0, -0.5, 2.0), strict=True):
            patcher = step(patcher, adapter, strength)
        return latent(patcher, steps=1)

    expected, patcher = stacked(reference(), (core, core, core)), load_diffusion_model(GGUF)
    for steps in ((ours, ours, ours), (core, ours, core), (ours, core, ours)):
        found = stacked(patcher, steps)
        assert near(found, expected) and (ON_GPU or torch.equal(found, expected)), steps


def check_quantised_factors_of_a_gguf_adapter() -> None:
    """Of a weight that the latent depends on by more than what 16 bits round away on a GPU."""
    path = FOLDER / "quantised_lora.gguf"
    pair = {"lora_a": random(32, COLUMNS, scale=0.4), "lora_b": random(ITS_ROWS, 32, seed=1)}
    writer = gguf.GGUFWriter(path, "sd3")
    writer.add_string("general.type", "adapter")
    writer.add_float32("adapter.lora.alpha", 16.0)
    kind = gguf.GGMLQuantizationType.Q8_0
    blocks = {name: gguf.quants.quantize(tensor.numpy(), kind) for name, tensor in pair.items()}
    for name, data in blocks.items():
        writer.add_tensor(f"{SENSITIVE}.weight.{name}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    dense = {
        name: torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32)) for name, data in blocks.items()
    }
    same = {
        f"{SENSITIVE}.lora_A.weight": dense["lora_a"],
        f"{SENSITIVE}.lora_B.weight": dense["lora_b"],
        f"{SENSITIVE}.alpha": torch.tensor(16.0),
    }
    patcher, expected = load_diffusion_model(GGUF), by_core(adapter_of(same))
    assert near(latent(adapted(patcher, "auto", 0.8, read(path)), steps=1), expected)
    assert not near(expected, latent(patcher, steps=1))


def check_what_cannot_fit_is_told_and_left_out() -> None:
    """The host would log an error for it at every use of the weight, or stop the picture."""
    good = low_rank(LAYER, ROWS, COLUMNS)
    wrong = {
        "loha": {
            f"{MLP}.hada_{end}": random(*sizes)
            for end, sizes in (("w1_a", (96, 4)), ("w1_b", (4, 32)), ("w2_a", (96, 4)), ("w2_b", (4, 32)))
        },
        "lokr": {f"{MLP}.lokr_w1": random(8, 8), f"{MLP}.lokr_w2": random(8, 8)},
        "half a lokr": {f"{MLP}.lokr_w1_a": random(8, 8)},
        "glora": {f"{MLP}.{end}.weight": random(8, 8) for end in ("a1", "a2", "b1", "b2")},
        "oft": {f"{MLP}.oft_blocks": random(3, 5, 5)},
        "boft": {f"{MLP}.oft_blocks": random(2, 3, 5, 5)},
        "vectors": {f"{MLP}.lora_A.weight": random(4), f"{MLP}.lora_B.weight": random(4)},
        "of rank 0": {f"{MLP}.lora_A.weight": torch.zeros(0, 256), f"{MLP}.lora_B.weight": torch.zeros(1024, 0)},
        "difference": {f"{MLP}.diff": random(8, 8)},
        "bias": {f"{LAYER}.diff_b": random(ROWS - 1)},
        "bias of a layer without": {"diffusion_model.joint_blocks.0.x_block.attn.ln_q.diff_b": random(64)},
        "lonely alpha": {f"{MLP}.alpha": torch.tensor(1.0)},
    }
    patcher = load_diffusion_model(GGUF)
    expected = latent(adapted(patcher, adapter=adapter_of(good)), steps=1)
    for kind, tensors in wrong.items():
        applied, found = records(adapter_of(good | tensors), patcher)
        assert sorted(applied.unmatched) == sorted(tensors), (kind, applied.unmatched)
        assert sum("match nothing" in record.getMessage() for record in found) == 1, kind
        assert torch.equal(latent(applied.model, steps=1), expected), kind
        try:
            apply(adapter_of(tensors), patcher, None, 1.0, 0)
        except LoraError as error:
            assert next(iter(tensors)) in str(error), kind
        else:
            raise AssertionError(f"{kind}: no error where nothing is left")


if __name__ == "__main__":
    base.main(globals())
