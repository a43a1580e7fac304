"""Checks of LoRAs on a GGUF model: equal to the host's on dense weights, step after step, and gone without a trace.

Run as `model_checks.py` is, whose modes and host set-up these checks share.
"""

from __future__ import annotations

import logging
from collections import Counter

from host import model_checks as base  # switches the host to the mode that the command line names, so it comes first

import comfy.model_management  # isort: skip
import comfy.sd  # isort: skip
import torch  # isort: skip
from comfy.patcher_extension import CallbacksMP  # isort: skip
from comfy.weight_adapter import LoRAAdapter  # isort: skip
from host.model_checks import FOLDER, GGUF, MODE, ON_GPU, latent, reference, weights, with_lora
from host.patch_checks import CPU, WEIGHT, close, functions, hooked_latent
from pack.loaders.diffusion import load_diffusion_model
from pack.loaders.low_rank import WAYS
from pack.loaders.patch_at_use import LowRankAtUse
from pack.loaders.quant.dispatch import kept_kernels
from pack.loaders.quant.early import COMMON_RANKS
from pack.lora.apply import ATTACHMENT, Applied, apply
from pack.lora.read import AdapterFile, LoraError, read
from pack.offload.adapters import Adapters, AdapterStream
from pack.offload.attach import apply_block_swap
from pack.offload.attach_adapters import BEYOND, STREAM
from pack.offload.blocks import Block
from pack.offload.costs import GB, SwapRequest
from pack.offload.device import device_for
from pack.offload.plan import BudgetTooSmallError
from pack.offload.streamed_patcher import residency_of
from safetensors.torch import load_file, save_file

LORA = FOLDER / "lora.safetensors"
LAYER = WEIGHT.removesuffix(".weight")
MLP = "diffusion_model.joint_blocks.1.x_block.mlp.fc1"
# In float32 a product beside the weight differs from one with the weight patched by the order of its sums: at most
# 4096 terms, each rounded by 2^-24, in 4 blocks and 2 steps. On a GPU some 60 layers round to 16 bits about 5 times
# each, by 2^-9 / sqrt(3) in the mean square, independently of each other: sqrt(60 x 5 x 2 steps) of that are 0.028, and
# nearly twice that is allowed, because layers amplify what came in.
BOUND = 0.05 if ON_GPU else 1e-4


def adapted(patcher, way: str = "auto", strength: float = 1.0, adapter: AdapterFile | None = None):
    return apply(adapter or read(LORA), patcher, None, strength, 0, way).model


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).norm() < BOUND * other.norm())


def adapter_of(tensors: dict[str, torch.Tensor], name: str = "made.safetensors") -> AdapterFile:
    """What is left of these tensors when they are read from a file."""
    save_file(tensors, FOLDER / name)
    return read(FOLDER / name)


def random(*shape: int, seed: int = 0, scale: float = 0.05) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def low_rank(stem: str, rows: int, columns: int, rank: int = 4, seed: int = 0, **more: torch.Tensor) -> dict:
    pair = {"lora_A.weight": random(rank, columns, seed=seed), "lora_B.weight": random(rows, rank, seed=seed + 1)}
    return {f"{stem}.{ending}": tensor.bfloat16() for ending, tensor in {**pair, **more}.items()}


# --- equality


def check_every_way_equals_core_on_dense_weights() -> None:
    patcher = load_diffusion_model(GGUF)
    plain = latent(patcher)
    for strength in (1.0, -0.7):
        expected = latent(with_lora(reference(), strength))
        assert not near(expected, plain), "the LoRA changes nothing"
        for way in WAYS:
            ours = adapted(patcher, way, strength)
            first = latent(ours)
            assert near(first, expected), (way, strength)
            if way != "runtime" and not ON_GPU:
                assert torch.equal(first, expected), (way, strength)
            assert torch.equal(latent(ours), first), f"run two differs: {way}"
    assert torch.equal(latent(patcher), plain), "a LoRA left something behind"


def check_step_one_equals_step_two() -> None:
    patcher = load_diffusion_model(GGUF)
    for way in WAYS:
        ours = adapted(patcher, way)
        comfy.model_management.load_models_gpu([ours])
        network, device = ours.model.diffusion_model, ours.load_device
        dtype = ours.model.get_dtype_inference()
        inputs = [random(*shape, seed=3).to(device, dtype) for shape in ((1, 16, 16, 16), (1, 77, 4096), (1, 2048))]
        with torch.inference_mode():
            steps = [network(inputs[0], torch.full((1,), 0.5, device=device), inputs[1], y=inputs[2]) for _ in range(3)]
        assert torch.equal(steps[0], steps[1]) and torch.equal(steps[1], steps[2]), way


def check_a_step_finds_its_kernels_compiled() -> None:
    """On a GPU, from when the LoRA was chosen; on a CPU there are none."""
    patcher = load_diffusion_model(GGUF)
    rank = 5  # no common one
    adapter_of(of_rank(rank, weights(patcher)))
    plain, before = latent(patcher, steps=1), compiled()
    ours = adapted(patcher, adapter=read(FOLDER / "made.safetensors", patcher.expect_rank))
    comfy.model_management.load_models_gpu([ours])
    ahead = compiled()
    assert (ahead > before) == ON_GPU
    assert not near(latent(ours, steps=1), plain)
    assert compiled() == ahead, "the step asked for another kernel"


def of_rank(rank: int, found: dict) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA for these weights, where they are matrices."""
    matrices = [(_kohya(name.removesuffix(".weight")), weight) for name, weight in found.items() if weight.dim() == 2]
    made: dict[str, torch.Tensor] = {}
    for seed, (name, weight) in enumerate(matrices):
        rows, columns = weight.shape
        made |= low_rank(name, rows, columns, rank, seed)
    return made


def compiled() -> int:
    """How many kernels are kept when nobody compiles any more, in idle time either."""
    base.compilers_done()
    return kept_kernels()


def check_common_ranks_are_compiled_after_the_first_run() -> None:
    patcher = load_diffusion_model(GGUF)
    plain, found = latent(patcher, steps=1), weights(patcher)
    ahead = compiled()
    assert (ahead > 0) == ON_GPU
    types = Counter(weight._params.ggml_type for weight in found.values() if weight.dim() == 2)
    most = types.most_common(1)[0][0]
    sizes = [weight.numel() for weight in found.values() if weight.dim() == 2 and weight._params.ggml_type == most]
    (wanted,) = (one for one in patcher._kernels_for(16) if one.ggml_type == most)
    assert wanted.shape[0] * wanted.shape[1] == max(sizes) > min(sizes), "there is no kernel for small ones"
    for rank in COMMON_RANKS:
        adapter = adapter_of(of_rank(rank, {n: w for n, w in found.items() if w._params.ggml_type == most}))
        assert not torch.equal(latent(adapted(patcher, adapter=adapter), steps=1), plain)
        assert compiled() == ahead, rank


def check_on_off_on() -> None:
    patcher = load_diffusion_model(GGUF)
    for way in WAYS:
        off, on = latent(patcher, steps=1), latent(adapted(patcher, way), steps=1)
        assert torch.equal(latent(patcher, steps=1), off)
        assert torch.equal(latent(adapted(patcher, way), steps=1), on)
        assert not near(on, off)


def check_two_models_of_one_file_are_apart() -> None:
    one, other = load_diffusion_model(GGUF), load_diffusion_model(GGUF)
    expected = latent(other, steps=1)
    for way in WAYS:
        ours = adapted(one, way)
        with_it = latent(ours, steps=1)
        assert torch.equal(latent(other, steps=1), expected)
        assert torch.equal(latent(ours, steps=1), with_it)


def check_strength_zero_changes_nothing() -> None:
    patcher = load_diffusion_model(GGUF)
    assert adapted(patcher, strength=0.0) is patcher
    expected = latent(patcher)
    through_core = with_lora(patcher, 0.0)  # the host adds patches that add nothing
    assert torch.equal(latent(through_core), expected)


def check_stacks_with_core_in_any_order() -> None:
    expected = latent(with_lora(with_lora(reference(), 0.5), -0.25), steps=1)
    patcher = load_diffusion_model(GGUF)
    for way in WAYS:
        for stack in (
            with_lora(adapted(patcher, way, 0.5), -0.25),
            adapted(with_lora(patcher, 0.5), way, -0.25),
            adapted(adapted(patcher, way, 0.5), "merge", -0.25),
        ):
            found = latent(stack, steps=1)
            assert near(found, expected), way
            assert way == "runtime" or ON_GPU or torch.equal(found, expected), way
    assert len(stack.get_attachment(ATTACHMENT)) == 2


def check_same_way_is_one_function() -> None:
    patcher = load_diffusion_model(GGUF)
    stack = adapted(with_lora(adapted(patcher, "auto", 0.5), -0.25), "auto", 0.125)
    (function,) = stack.weight_wrapper_patches[WEIGHT]
    assert isinstance(function, LowRankAtUse)
    assert [a.scale for a in function.adapters] == [s * function.adapters[0].scale / 0.5 for s in (0.5, -0.25, 0.125)]
    assert len(adapted(patcher, "auto", 0.5).weight_wrapper_patches[WEIGHT][0].adapters) == 1, "clones share a list"
    mixed = adapted(adapted(patcher, "runtime"), "merge")
    assert [f.way for f in mixed.weight_wrapper_patches[WEIGHT]] == ["runtime", "merge"]


def check_hooks_beside_a_lora() -> None:
    expected = hooked_latent(with_lora(reference(), -0.5), scheduled=True)
    patcher = load_diffusion_model(GGUF)
    assert close(hooked_latent(adapted(patcher, "auto", -0.5), scheduled=True), expected)
    assert near(hooked_latent(adapted(patcher, "runtime", -0.5), scheduled=True), expected)


def check_on_a_model_that_is_not_gguf() -> None:
    ours = latent(adapted(reference(), "runtime"))
    assert close(ours, latent(with_lora(reference())))


# --- every kind of adapter


def kinds() -> dict[str, dict[str, torch.Tensor]]:
    """Adapters of one weight [768, 256] and, where the kind can change others, of more."""
    rows, columns = 768, 256
    plain = low_rank(LAYER, rows, columns)
    square = {f"{LAYER}.oft_blocks": random(8, 96, 96, scale=0.01), f"{LAYER}.rescale": torch.ones(rows, 1) * 1.1}
    return {
        "lora": {**plain, f"{LAYER}.alpha": torch.tensor(2.0)},
        "lora of kohya": {
            f"{_kohya(LAYER)}.lora_up.weight": random(rows, 4), f"{_kohya(LAYER)}.lora_down.weight": random(4, columns),
            f"{_kohya(LAYER)}.alpha": torch.tensor(1.5),
        },
        "dora": {**plain, f"{LAYER}.dora_scale": random(rows, 1, scale=0.2) + 1},
        "dora of peft": {**plain, f"{LAYER}.lora_magnitude_vector": random(rows, scale=0.2) + 1},
        "locon": low_rank("diffusion_model.x_embedder.proj", 256, 64),
        "loha": {f"{LAYER}.hada_{end}": random(*shape, seed=i, scale=0.2) for i, (end, shape) in enumerate((
            ("w1_a", (rows, 4)), ("w1_b", (4, columns)), ("w2_a", (rows, 4)), ("w2_b", (4, columns)),
        ))},
        "lokr": {f"{LAYER}.lokr_w1": random(24, 16), f"{LAYER}.lokr_w2": random(32, 16, seed=1)},
        "lokr of two": {
            f"{LAYER}.lokr_w1": random(24, 16), f"{LAYER}.alpha": torch.tensor(4.0),
            f"{LAYER}.lokr_w2_a": random(32, 4, seed=1), f"{LAYER}.lokr_w2_b": random(4, 16, seed=2),
        },
        "glora": {f"{LAYER}.{end}.weight": random(*shape, seed=i) for i, (end, shape) in enumerate((
            ("a1", (4, columns)), ("a2", (columns, 4)), ("b1", (4, columns)), ("b2", (rows, 4)),
        ))},
        "oft": {**square, f"{LAYER}.alpha": torch.tensor(0.5)},
        "boft": {f"{LAYER}.oft_blocks": random(2, 24, 32, 32, scale=0.1), f"{LAYER}.alpha": torch.tensor(9.0)},
        "diff": {f"{LAYER}.diff": random(rows, columns)},
        "set": {f"{LAYER}.set_weight": random(rows, columns)},
        "norm": {f"{LAYER.replace('qkv', 'ln_q')}.w_norm": random(64)},
        "two weights, one of them dora": {
            **low_rank(MLP, 1024, 256, seed=5), **plain, f"{LAYER}.dora_scale": random(rows, 1, scale=0.2) + 1,
        },
    }  # fmt: skip


def check_every_kind_of_adapter_equals_core() -> None:
    patcher, dense = load_diffusion_model(GGUF), reference()
    plain = latent(patcher, steps=1)
    for kind, tensors in kinds().items():
        if kind == "norm" and patcher.is_dynamic():
            continue  # the host's dynamic patcher patches no layer that it does not cast
        adapter = adapter_of(tensors)
        expected = latent(comfy.sd.load_lora_for_models(dense, None, adapter.tensors, 0.8, 0)[0], steps=1)
        assert not torch.equal(expected, plain), f"{kind}: the adapter changes nothing"
        for way in ("auto", "runtime"):
            found = latent(adapted(patcher, way, 0.8, adapter), steps=1)
            assert near(found, expected), (kind, way)
            exact = way != "runtime" or not any(isinstance(f, LowRankAtUse) for f in functions(patcher))
            assert ON_GPU or not exact or torch.equal(found, expected), (kind, way)
    assert torch.equal(latent(patcher, steps=1), plain)


def check_fused_projections_take_their_parts() -> None:
    """diffusers' LoRAs have q, k and v apart, which are rows of one weight here."""
    tensors: dict[str, torch.Tensor] = {}
    for i, part in enumerate("qkv"):
        tensors |= low_rank(f"transformer.transformer_blocks.0.attn.to_{part}", 256, 256, seed=10 * i)
    adapter = adapter_of(tensors)
    expected = latent(comfy.sd.load_lora_for_models(reference(), None, adapter.tensors, 1.0, 0)[0])
    patcher = load_diffusion_model(GGUF)
    assert not torch.equal(expected, latent(patcher))
    for way in WAYS:
        ours = adapted(patcher, way, adapter=adapter)
        (function,) = ours.weight_wrapper_patches[WEIGHT]
        assert [a.start for a in function.adapters] == [0, 256, 512]
        assert near(latent(ours), expected), way


def check_streamed_models_go_every_way() -> None:
    if MODE != "classic":
        return
    patcher = load_diffusion_model(GGUF)
    streamed = apply_block_swap(load_diffusion_model(GGUF), SwapRequest(blocks_to_swap=2))
    plain = latent(patcher, steps=1)
    assert torch.equal(latent(streamed, steps=1), plain)
    assert residency_of(streamed).plan.streamed_bytes > 0
    for way in WAYS:
        expected = latent(adapted(patcher, way), steps=1)
        before, after = adapted(patcher, way), adapted(streamed, way)
        for _ in range(2):
            assert torch.equal(latent(after, steps=1), expected), way
        swapped = apply_block_swap(before, SwapRequest(blocks_to_swap=2))
        assert torch.equal(latent(swapped, steps=1), expected), way
        assert torch.equal(latent(streamed, steps=1), plain), way


def check_loras_stream_with_their_blocks() -> None:
    """On a CPU LoRAs are used where they lie, so they are made to stream; a GPU's budget is for a part of them."""
    if MODE != "classic" and not ON_GPU:
        return
    patcher = load_diffusion_model(GGUF)
    streamed = apply_block_swap(load_diffusion_model(GGUF), SwapRequest(blocks_to_swap=4))
    latent(streamed, steps=1)
    if ON_GPU:
        found = adapted(streamed)._adapters()
        budget = residency_of(streamed).vram_bytes + (found.least_bytes + found.nbytes) // 2
        request = SwapRequest(blocks_to_swap=4, vram_budget_gb=budget / GB)
        streamed = apply_block_swap(load_diffusion_model(GGUF), request)
    locked: list[int] = []
    for way in WAYS if ON_GPU else ("runtime",):
        expected, plain = latent(adapted(patcher, way), steps=1), latent(patcher, steps=1)
        ours = adapted(streamed, way)
        comfy.model_management.load_models_gpu([ours])
        network, adapters = ours.model, adapters_by_block(ours)
        assert len(adapters.blocks) == 4 and adapters.least_bytes < adapters.nbytes
        if not ON_GPU:
            device = device_for(ours.load_device)
            network.__dict__[STREAM] = AdapterStream(adapters, device, 1 << 30, True, locked.append)
        stream = network.__dict__[STREAM]
        with stream.at_home():
            for function in (f for _, found in adapters.blocks for f in found):
                assert not function.move_to(ours.load_device) or not ON_GPU, "it was copied to the device"
        for _ in range(2):
            assert torch.equal(latent(ours, steps=1), expected), way
        assert len(stream._over) == 4 and network.__dict__.get(STREAM) is stream, "the ring was not used"
        assert torch.equal(latent(streamed, steps=1), plain), way
        assert STREAM not in network.__dict__ and sum(locked) == 0, "the stream outlived its LoRA"
        assert not any(f._moved for _, found in adapters.blocks for f in found if ON_GPU)


def adapters_by_block(model) -> Adapters:
    """Those that the network was loaded with."""
    network = model.model
    functions: dict = {}
    for name, found in model.weight_wrapper_patches.items():
        functions.setdefault(network.get_submodule(name.removesuffix(".weight")), []).extend(found)
    names = residency_of(model).names
    return Adapters.of([Block(name, network.diffusion_model.get_submodule(name)) for name in names], functions)


def check_a_budget_pays_for_loras_too() -> None:
    if not ON_GPU:
        return
    patcher = load_diffusion_model(GGUF)
    for way in WAYS:
        expected, plain = latent(adapted(patcher, way), steps=1), latent(patcher, steps=1)
        for megabytes in (2.0, 1.0, 0.5, 0.1):
            request = SwapRequest(vram_budget_gb=megabytes / 1000)
            try:
                streamed = apply_block_swap(load_diffusion_model(GGUF), request)
                alone = latent(streamed, steps=1)
            except BudgetTooSmallError:
                continue
            assert near(alone, plain)
            ours = adapted(streamed, way)
            for _ in range(2):
                assert near(latent(ours, steps=1), expected), (way, megabytes)
                used = ours.model.model_loaded_weight_memory
                assert used <= megabytes * 1e6 or BEYOND in ours.model.__dict__, (way, megabytes, used)
            assert near(latent(streamed, steps=1), plain), (way, megabytes)


def check_loras_make_room_in_the_budget() -> None:
    """A plan that does not fit has them stream with their blocks; if that does not help, they lie beyond the budget.

    On a CPU nothing of that is ever needed: the patcher is told of another device while it decides.
    """
    if ON_GPU:
        return
    streamed = apply_block_swap(load_diffusion_model(GGUF), SwapRequest(blocks_to_swap=4))
    plain, ours = latent(streamed, steps=1), adapted(streamed, "runtime")
    expected, here = latent(ours, steps=1), ours.load_device
    budgets: list[int] = []

    def arrange(failures: int) -> None:
        budgets.append(ours._terms(10**9, 10**9).budget_bytes)
        if len(budgets) <= failures:
            raise BudgetTooSmallError("of the test", 1)

    for failures in range(4):
        ours.keep_adapters()
        budgets.clear()
        ours.load_device = torch.device("cuda")
        everything, least = ours._adapters().nbytes, ours.least_adapter_bytes
        assert 0 < least < everything
        try:
            ours.beside_adapters(CPU, lambda failures=failures: arrange(failures))
        except BudgetTooSmallError:
            assert failures == 3, "the weights alone have room"
        assert ours.adapters_made_room is (failures > 0)
        ours.load_device = here
        assert not ours.adapters_made_room  # a CPU has no room that they could miss
        assert budgets == [10**9 - used for used in (everything, least, 0)[: failures + 1]]
        assert (STREAM in ours.model.__dict__) is (failures > 0) and (BEYOND in ours.model.__dict__) is (failures > 1)
        if failures:
            ours.model.__dict__[STREAM].follow(ours)
        for _ in range(2):
            assert torch.equal(latent(ours, steps=1), expected), failures
    ours.keep_adapters()
    assert torch.equal(latent(ours, steps=1), expected) and torch.equal(latent(streamed, steps=1), plain)


# --- memory and loading


def signatures(patcher) -> list[object]:
    """What the dynamic patcher compares to see whether a page holds its weight."""
    return [m._v_signature for m in patcher.model.modules() if hasattr(m, "_v_signature")]


def check_a_change_reloads_nothing() -> None:
    patcher = load_diffusion_model(GGUF)
    loads: list[str] = []
    patcher.add_callback(CallbacksMP.ON_LOAD, lambda *_: loads.append("load"))
    latent(patcher, steps=1)
    names = {_kohya(name.removesuffix(".weight")) for name in weights(patcher)}
    on_blocks = {name: tensor for name, tensor in load_file(LORA).items() if name.split(".")[0] in names}
    assert len(on_blocks) > 10 and (ON_GPU or len(on_blocks) < len(load_file(LORA)))
    # Every weight that the LoRA changes is quantised, as in most real models, or some of them are plain.
    for adapter in (adapter_of(on_blocks), read(LORA)):
        latent(patcher, steps=1)
        loads.clear()
        pages = signatures(patcher)
        stack = adapted(adapted(patcher, adapter=adapter), "merge", 0.5, adapter)
        for ours in (stack, adapted(patcher, "runtime", 0.5, adapter), patcher, adapted(patcher, adapter=adapter)):
            latent(ours, steps=1)
            wanted = [f for fs in ours.weight_wrapper_patches.values() for f in fs]
            assert {id(f) for f in functions(ours)} == {id(f) for f in wanted}
            assert ours.model.current_weight_patches_uuid == ours.patches_uuid
            if patcher.is_dynamic() and len(adapter.tensors) == len(on_blocks):
                assert all(a is b for a, b in zip(signatures(patcher), pages, strict=True)), "weights were moved again"
        if not patcher.is_dynamic():
            assert not loads, "the model was loaded again"
            latent(patcher, steps=1)
            memory = patcher.model.model_loaded_weight_memory
            latent(adapted(patcher, adapter=adapter), steps=1)
            latent(patcher, steps=1)
            assert patcher.model.model_loaded_weight_memory == memory > 0


def check_a_change_on_a_streamed_model_loads_nothing() -> None:
    if MODE not in ("classic", "gpu-classic"):
        return
    loads: list[str] = []
    for blocks in (0, 2):
        streamed = apply_block_swap(load_diffusion_model(GGUF), SwapRequest(blocks_to_swap=blocks))
        streamed.add_callback(CallbacksMP.ON_LOAD, lambda *_: loads.append("load"))
        off = latent(streamed, steps=1)
        memory = streamed.model.model_loaded_weight_memory
        names = {_kohya(name.removesuffix(".weight")) for name in weights(streamed)}
        adapter = adapter_of({n: tensor for n, tensor in load_file(LORA).items() if n.split(".")[0] in names})
        stack = adapted(adapted(streamed, adapter=adapter), "merge", 0.5, adapter)
        apart = [stack, adapted(streamed, "runtime", 0.5, adapter), adapted(streamed, adapter=adapter)]
        expected = []
        for ours in apart:  # each on a model that has just been loaded
            comfy.model_management.unload_all_models()
            expected.append(latent(ours, steps=1))
        assert not any(torch.equal(one, off) for one in expected), "the LoRA changes nothing"
        assert torch.equal(latent(streamed, steps=1), off), "it left something behind"
        loads.clear()
        for _ in range(2):
            for ours, wanted in zip(apart, expected, strict=True):
                assert torch.equal(latent(ours, steps=1), wanted)
                there = {id(f) for fs in ours.weight_wrapper_patches.values() for f in fs}
                assert {id(f) for f in functions(ours)} == there
                assert ours.model.model_loaded_weight_memory == memory + ours.adapter_bytes
        assert torch.equal(latent(streamed, steps=1), off) and not functions(streamed)
        assert streamed.model.model_loaded_weight_memory == memory
        assert not loads, "the model was loaded again"
        hooked = hooked_latent(stack)
        assert torch.equal(latent(stack, steps=1), expected[0]) and not torch.equal(hooked, expected[0])
        assert not loads


def _kohya(name: str) -> str:
    return "lora_unet_" + name.removeprefix("diffusion_model.").replace(".", "_")


def check_what_is_in_the_weights_is_loaded_again() -> None:
    """A LoRA that also changes a bias, which the host writes into the layer."""
    tensors = {**low_rank(LAYER, 768, 256), f"{LAYER}.diff_b": random(768, scale=0.5)}
    adapter = adapter_of(tensors)
    patcher, plain_model = load_diffusion_model(GGUF), reference()
    off = latent(patcher)
    expected = latent(comfy.sd.load_lora_for_models(plain_model, None, adapter.tensors, 1.0, 0)[0])
    for _ in range(2):
        # The host rounds a patched bias to the type that the file has it in, float16: by 2^-11 of it.
        found = latent(adapted(patcher, adapter=adapter))
        assert (found - expected).norm() < max(BOUND, 4 * 2**-11) * expected.norm()
        assert torch.equal(latent(patcher), off)
    assert not near(expected, off)


def check_partly_offloaded_layers_go_every_way() -> None:
    if MODE != "classic":
        return
    patcher = load_diffusion_model(GGUF)
    for way in WAYS:
        ours = adapted(patcher, way)
        outputs = []
        for memory in (0, 4_000_000):
            comfy.model_management.unload_all_models()
            ours.patch_model(CPU, lowvram_model_memory=memory)
            assert bool(ours.model.model_lowvram) == bool(memory)
            arguments = (torch.ones(1, 16, 16, 16), torch.tensor([0.5]), torch.ones(1, 77, 4096))
            outputs.append(ours.model.diffusion_model(*arguments, y=torch.zeros(1, 2048)))
            ours.unpatch_model(CPU)
        assert torch.equal(*outputs), way


def check_adapters_on_the_gpu_are_let_go() -> None:
    if not ON_GPU:
        return
    patcher = load_diffusion_model(GGUF)
    latent(patcher, steps=1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    ours = adapted(patcher)
    latent(ours, steps=1)
    size = sum(f.nbytes for f in functions(ours))
    assert size > 0 and all(ours.load_device in f._moved for f in functions(ours))
    # torch hands out multiples of 512 bytes, and a layer's factors are two tensors or more.
    assert torch.cuda.memory_allocated() - before < size + 4 * 512 * len(functions(ours)) + (1 << 20)
    latent(patcher, steps=1)
    assert torch.cuda.memory_allocated() - before < 1 << 20, "the adapters stayed"


def check_compiles_with_a_lora() -> None:
    if MODE != "classic":
        return
    patcher = load_diffusion_model(GGUF)
    layer, x = patcher.get_model_object(LAYER), random(3, 256, seed=4)
    for way in ("runtime", "merge"):
        comfy.model_management.load_models_gpu([adapted(patcher, way)])
        with torch.inference_mode():
            expected = layer(x)
            compiled = torch.compile(layer, backend="aot_eager")(x)
        assert torch.allclose(compiled, expected, rtol=0, atol=1e-5), way
        torch._dynamo.reset()


# --- what does not fit


def records(adapter: AdapterFile, patcher) -> tuple[Applied, list[logging.LogRecord]]:
    found: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = found.append  # type: ignore[method-assign,assignment]
    logger = logging.getLogger("sluice.lora")
    logger.addHandler(handler)
    try:
        return apply(adapter, patcher, None, 1.0, 1.0), found
    finally:
        logger.removeHandler(handler)


def check_nothing_that_matches_is_an_error() -> None:
    patcher = load_diffusion_model(GGUF)
    cases = {
        "none of its 2 tensors match a weight of SD3": low_rank("diffusion_model.double_blocks.0.img_attn.qkv", 96, 32),
        "in name and shape": low_rank(LAYER, 768, 128),  # the right name, the wrong shape
        "it changes a text encoder only": low_rank("lora_te1_text_model_encoder_layers_0_mlp_fc1", 96, 32),
    }
    for says, tensors in cases.items():
        try:
            apply(adapter_of(tensors), patcher, None, 1.0, 1.0)
        except LoraError as error:
            assert says in str(error) and str(error).startswith("made.safetensors: "), error
        else:
            raise AssertionError(f"no error: {says}")


def check_a_part_that_does_not_match_is_one_warning() -> None:
    patcher = load_diffusion_model(GGUF)
    strangers = {k: v for i in range(3) for k, v in low_rank(f"diffusion_model.elsewhere.{i}", 8, 8).items()}
    wrong = low_rank(MLP, 1024, 64)
    encoder = low_rank("lora_te1_text_model_encoder_layers_0_mlp_fc1", 96, 32)
    applied, found = records(adapter_of({**low_rank(LAYER, 768, 256), **strangers, **wrong, **encoder}), patcher)
    assert applied.weights == 1 and len(applied.unmatched) == 8
    assert set(applied.unmatched) == {*strangers, *wrong}
    warnings = [r.getMessage() for r in found if r.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "8 of 12 tensors" in warnings[0]
    assert applied.unmatched[0] in warnings[0] and applied.unmatched[3] not in warnings[0]
    _, found = records(adapter_of({**low_rank(LAYER, 768, 256), **encoder}), patcher)
    assert not [r for r in found if r.levelno >= logging.WARNING]
    half = low_rank(LAYER, 768, 256)
    half.pop(f"{LAYER}.lora_A.weight")
    try:
        apply(adapter_of(half), patcher, None, 1.0, 1.0)
    except LoraError as error:
        assert f"'{LAYER}.lora_A.weight' is missing" in str(error)
    else:
        raise AssertionError("half a pair is no error")


def check_what_the_model_remembers() -> None:
    patcher = load_diffusion_model(GGUF)
    ours = adapted(adapted(patcher, "merge", 0.5), "auto", -1.0)
    first, second = ours.get_attachment(ATTACHMENT)
    assert (first.name, first.strength, first.way) == ("lora.safetensors", 0.5, "merge")
    assert (second.strength, second.way, second.weights) == (-1.0, "auto", len(load_file(LORA)) // 3)
    assert patcher.get_attachment(ATTACHMENT) is None
    assert ours.get_attachment("lora_metadata")["license"] == "CC0-1.0"
    patch = ours.weight_wrapper_patches[WEIGHT][0].patches[0]
    assert isinstance(patch[1], LoRAAdapter) and patch[1].weights[0].dtype == torch.float16
    assert len(weights(ours)) > 40


if __name__ == "__main__":
    base.main(globals())
