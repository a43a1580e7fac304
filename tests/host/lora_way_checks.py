"""Checks of what each way of adding a LoRA does and leaves, and of what a file's type and streaming change: nothing.

Run as `model_checks.py` is, whose modes and host set-up these checks share.
"""

from __future__ import annotations

from host import model_checks as base  # switches the host to the mode that the command line names, so it comes first

import comfy.lora  # isort: skip
import comfy.sd  # isort: skip
import torch  # isort: skip
from host.lora_checks import (
    FOLDER,
    LAYER,
    ON_GPU,
    WAYS,
    adapted,
    adapter_of,
    kinds,
    low_rank,
    near,
    of_rank,
    random,
)
from host.model_checks import GGUF, latent, reference, weights
from pack.loaders.diffusion import load_diffusion_model
from pack.loaders.gguf.types import GGMLType
from pack.loaders.low_rank import Adapter, Factors
from pack.loaders.ops import make_ops
from pack.loaders.patch_at_use import LowRankAtUse
from pack.loaders.quant.layout import quantized
from pack.lora.read import read
from pack.offload.attach import apply_block_swap
from pack.offload.costs import SwapRequest
from pack.offload.streamed_patcher import residency_of
from safetensors.torch import load_file, save_file

CPU = torch.device("cpu")


def check_a_mode_is_the_sum_that_it_names() -> None:
    """Told by how they round: beside the weight two products are rounded and added, in the weight one is."""
    shape, x = (96, 64), random(3, 64, seed=4, scale=1.0)
    blocks = torch.randint(0, 100, (shape[0] * 2 * 34,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for i in range(1, len(blocks), 34):
        blocks[i] = 0x20  # scales of about 0.01
    layer = make_ops(torch.float32, None).Linear(64, 96, bias=False)
    layer.load_state_dict({"weight": quantized(blocks, GGMLType.Q8_0, shape)})
    up, down = random(96, 4, seed=5), random(4, 64, seed=6)
    patch = comfy.lora.load_lora({"x.lora_up.weight": up, "x.lora_down.weight": down}, {"x": "x"}, log_missing=False)
    given, adapter = [(0.7, patch["x"], 1.0, None, None)], Adapter(up, down, 0.7)
    dense, factors = layer.weight.dequantize().float(), Factors([adapter], CPU, torch.float32)
    beside = factors.add_product(x, torch.nn.functional.linear(x, dense))
    inside = torch.nn.functional.linear(x, comfy.lora.calculate_weight(given, dense.clone(), "x"))
    assert not torch.equal(beside, inside) and torch.allclose(beside, inside, atol=1e-4)
    for way, expected in (("runtime", beside), ("merge", inside), ("auto", inside)):  # on a CPU
        layer.weight_function = [LowRankAtUse("x", given, [adapter], shape, torch.float32, way)]
        with torch.inference_mode():
            assert torch.equal(layer(x), expected), way


def check_no_patched_copy_is_kept() -> None:
    patcher = load_diffusion_model(GGUF)
    before = {name: weight._qdata.clone() for name, weight in weights(patcher).items()}
    plain = latent(patcher, steps=1)
    adapter = adapter_of(of_rank(4, weights(patcher)) | low_rank(LAYER, 768, 256, seed=9))
    dora = adapter_of({**low_rank(LAYER, 768, 256), f"{LAYER}.dora_scale": random(768, 1, scale=0.2) + 1})
    for way in WAYS:
        ours = adapted(adapted(patcher, way, adapter=adapter), way, adapter=dora)
        assert not torch.equal(latent(ours, steps=1), plain), way
        found = weights(ours)
        assert found.keys() == before.keys(), "a weight was made dense"
        assert all(torch.equal(weight._qdata.to(CPU), before[name]) for name, weight in found.items()), way
        assert not ours.backup.keys() & before.keys() and not ours.patches.keys() & before.keys(), way


def check_every_kind_streams_as_it_stays() -> None:
    patcher = load_diffusion_model(GGUF)
    swapped = {n: apply_block_swap(load_diffusion_model(GGUF), SwapRequest(blocks_to_swap=n)) for n in (1, 4)}
    plain = latent(patcher, steps=1)
    for kind, tensors in kinds().items():
        if kind == "norm" and patcher.is_dynamic():
            continue  # the host's dynamic patcher patches no layer that it does not cast
        adapter = adapter_of(tensors)
        expected = latent(adapted(patcher, "auto", 0.8, adapter), steps=1)
        assert not torch.equal(expected, plain), kind
        for blocks, streamed in swapped.items():
            ours = adapted(streamed, "auto", 0.8, adapter)
            for _ in range(2):
                assert torch.equal(latent(ours, steps=1), expected), (kind, blocks)
            assert len({copy.block for copy in residency_of(ours).plan.copies}) == blocks
    for streamed in swapped.values():
        assert torch.equal(latent(streamed, steps=1), plain)


def check_files_in_any_type_equal_core() -> None:
    """With the file's own numbers, by core. Matrices in float32 are rounded to bfloat16 here, each factor by 2^-9, so
    their product by 2^-8 of what it is; what has 16 bits or 8 is the same."""
    patcher, dense = load_diffusion_model(GGUF), reference()
    plain = latent(patcher, steps=1)
    tensors = {name: tensor.float() * 4 for name, tensor in low_rank(LAYER, 768, 256).items()}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        path = FOLDER / "typed.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, path)
        theirs = load_file(path)
        expected = latent(comfy.sd.load_lora_for_models(dense, None, theirs, 0.8, 0)[0], steps=1)
        effect = (expected - plain).norm()
        assert effect > 0, dtype
        for way in WAYS:
            found = latent(adapted(patcher, way, 0.8, read(path)), steps=1)
            assert torch.equal(latent(adapted(patcher, way, 0.8, read(path)), steps=1), found)
            assert near(found, expected), (dtype, way)
            if not ON_GPU and dtype != torch.float32 and way != "runtime":
                assert torch.equal(found, expected), (dtype, way)
            if not ON_GPU:
                # The effect follows the weight's change up to its curvature: another factor of two.
                slack = 1e-4 * expected.norm()
                assert (found - expected).norm() < 2 * 2**-8 * effect + slack, (dtype, way)


if __name__ == "__main__":
    base.main(globals())
