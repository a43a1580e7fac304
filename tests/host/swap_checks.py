"""Checks of a MODEL with Block Swap while it runs: whatever streams, and whatever happens to a pass, the latent is that
of the model it was made from, bit for bit.

Run as `model_checks.py` is, whose modes and host set-up these checks share. A released place of the ring is overwritten
with NaN, so nobody can use one by mistake and get away with it.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from host import model_checks as base  # switches the host to the mode that the command line names, so it comes first

import comfy.model_management  # isort: skip
import comfy.sample  # isort: skip
import comfy.sd  # isort: skip
import pack.offload.residency  # isort: skip
import pack.offload.streaming  # isort: skip
import torch  # isort: skip
from comfy_extras.nodes_model_advanced import ModelSamplingSD3  # isort: skip
from comfy_kitchen.tensor import QuantizedTensor
from host.model_checks import FOLDER, GGUF, ON_GPU, SAFETENSORS, reference
from pack.loaders.diffusion import load_diffusion_model
from pack.offload import runs
from pack.offload.attach import apply_block_swap, stream
from pack.offload.costs import SwapRequest
from pack.offload.plan import BudgetTooSmallError, make_plan
from pack.offload.streamed_patcher import residency_of
from pack.offload.streamer import BlockStreamer
from safetensors.torch import load_file, save_file

pack.offload.streaming.BlockStreamer = partial(BlockStreamer, poison=True)

BLOCKS = 4  # of the demo model
SIZE = 6_962_208  # bytes of the GGUF
LESS = 0.0056  # GB: most of the GGUF streams, and some of its blocks' weights stay
DIALS: dict[str, dict[str, Any]] = {
    "everything": {"blocks_to_swap": BLOCKS},
    "every second block": {"blocks_to_swap": 2},
    "all but one block": {"blocks_to_swap": BLOCKS - 1},
    "some of each block": {"vram_budget_gb": LESS},
    "a ring for one block": {"vram_budget_gb": LESS, "prefetch_blocks": 0},
    "nothing": {"blocks_to_swap": 0},
    "from disk": {"blocks_to_swap": BLOCKS, "weight_source": "disk"},
    "from pinned memory": {"blocks_to_swap": BLOCKS, "weight_source": "pinned"},
}
Interrupt = comfy.model_management.InterruptProcessingException


def latent(patcher, steps: int = 2, batch: int = 1, negative_tokens: int = 77, callback=None) -> torch.Tensor:
    """A picture; prompts of different lengths are two calls of the model for each step, and else one."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(batch, 16, 8, 8, generator=generator)

    def condition(tokens: int) -> list:
        pooled = torch.randn(1, 2048, generator=generator) * 0.1
        return [[torch.randn(1, tokens, 4096, generator=generator) * 0.1, {"pooled_output": pooled}]]

    return comfy.sample.sample(
        patcher, noise, steps, 3.0, "euler", "simple", condition(77), condition(negative_tokens),
        torch.zeros_like(noise), disable_pbar=True, seed=1, callback=callback,
    )  # fmt: skip


def plain_model():
    """From a file, by the host's own loader."""
    return comfy.sd.load_diffusion_model(str(SAFETENSORS)) if not ON_GPU else reference()


MODELS: dict[str, Callable[[], Any]] = {"gguf": lambda: load_diffusion_model(GGUF), "plain": plain_model}


def scaled(dials: dict[str, Any], share: float) -> dict[str, Any]:
    """The same for a model that is so much larger."""
    return {dial: value * share if dial == "vram_budget_gb" else value for dial, value in dials.items()}


def streamed(model, **dials):
    return apply_block_swap(model, SwapRequest(**(dials or DIALS["everything"])))


def pairs(**dials) -> Iterator[tuple[str, Any, torch.Tensor, Any]]:
    """Of each kind of file: the latent of its MODEL, and this MODEL with Block Swap."""
    for kind, load in MODELS.items():
        model = load()
        yield kind, model, latent(model), streamed(model, **scaled(dials, model.model_size() / SIZE))


def bytes_of(model) -> dict[str, torch.Tensor]:
    """What whoever looks at the network's weights sees, in memory of its own.

    A plain weight is on a GPU in the compute dtype, so there plain ones are compared in that, wherever they are.
    """
    computed = (model.model.manual_cast_dtype or model.model.get_dtype()) if ON_GPU else None

    def seen(weight: torch.Tensor) -> torch.Tensor:
        stored = getattr(weight, "_qdata", None)
        if stored is not None:
            return stored.detach().to("cpu", copy=True)
        return weight.detach().to("cpu", computed if weight.is_floating_point() else None, copy=True)

    return {name: seen(weight) for name, weight in model.model.diffusion_model.state_dict().items()}


def shown_by(model) -> dict[str, int]:
    return {name: id(parameter) for name, parameter in model.model.named_parameters()}


def same_bytes(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)) for name in one
    )


def blocks_of(model) -> torch.nn.ModuleList:
    return model.model.diffusion_model.joint_blocks


def close_to(one: torch.Tensor, other: torch.Tensor) -> bool:
    """A GPU's library may choose another kernel for a weight that lies at another place: a rounding of 2^-11 (float16)
    in each layer."""
    return bool((one - other).norm() < 0.02 * other.norm()) if ON_GPU else torch.equal(one, other)


# --- the latent


def check_every_plan_gives_the_same_latent() -> None:
    for kind, load in MODELS.items():
        model = load()
        expected = latent(model)
        assert expected.isfinite().all() and expected.std() > 0.1
        share = model.model_size() / SIZE
        resident = latent(streamed(model, **DIALS["nothing"]))
        assert close_to(resident, expected), f"{kind}: resident differs from the host"
        for name, dials in DIALS.items():
            candidate = streamed(model, **scaled(dials, share))
            runs = [latent(candidate) for _ in range(3)]
            assert all(torch.equal(run, resident) for run in runs), f"{kind}, {name}"
            assert bool(residency_of(candidate).plan.copies) == (name != "nothing"), (kind, name)
        assert close_to(latent(model), expected), f"{kind}: the model itself changed"


def check_weights_side_by_side_are_copied_in_one_piece() -> None:
    """As those of large models are: `runs` joins what is small against the model, and this one's weights are not."""
    before = runs.SHARE
    runs.SHARE = 3
    try:
        for name in ("everything", "every second block", "from disk", "from pinned memory"):
            for kind, model, expected, swapped in pairs(**DIALS[name]):
                assert all(close_to(latent(swapped), expected) for _ in range(2)), (kind, name)
                residency = residency_of(swapped)
                copied = [residency._runs[copy.block][copy.tensor] for copy in residency.plan.copies]
                weights = sum(len(run.slots) for run in copied)
                in_file = kind == "gguf"  # the host may have loaded its own into memory
                assert (weights > len(copied)) or not in_file, f"{name}: {len(copied)} copies of {weights} weights"
                assert close_to(latent(base.with_lora(swapped)), latent(base.with_lora(model))), (kind, name)
                comfy.model_management.unload_all_models()
                assert same_bytes(bytes_of(swapped), bytes_of(model)), (kind, name)
    finally:
        runs.SHARE = before


def check_inference_mode_of_the_executor() -> None:
    """Nodes run in it, the thread that unloads models does not."""
    for load in MODELS.values():
        with torch.inference_mode():
            model = load()
            expected, swapped = latent(model), streamed(model)
            assert close_to(latent(swapped), expected)
        comfy.model_management.unload_all_models()
        assert swapped.loaded_size() == 0
        with torch.inference_mode():
            part = streamed(model, vram_budget_gb=0.05)
            assert close_to(latent(part), expected)
        freed = part.partially_unload(part.offload_device, part.loaded_size() // 20)
        assert freed > 0
        with torch.inference_mode():
            assert close_to(latent(part), expected) and close_to(latent(swapped), expected)
        del model, swapped, part
        gc.collect()


def check_separate_calls_and_batches() -> None:
    for kind, load in MODELS.items():
        model = load()
        calls = {"separate": {"negative_tokens": 154}, "batch": {"batch": 3}, "long": {"steps": 7}}
        expected = {name: latent(model, **options) for name, options in calls.items()}
        swapped = streamed(model)
        for name, options in (*calls.items(), *reversed(calls.items())):
            assert close_to(latent(swapped, **options), expected[name]), f"{kind}, {name}"


def check_plan_changes_between_passes() -> None:
    """Each time that the blocks have been measured, the plan of another budget; the weights move between two passes."""
    budgets = iter([5_700_000, 6_500_000, 5_600_000, 7_500_000, 5_900_000] * 100)

    def another(plan, blocks, link, budget_bytes, steps):
        seen.add(plan.copies)
        return make_plan(blocks, link, next(budgets), outside_bytes=plan.outside_bytes), "for the test"

    seen: set[tuple] = set()
    model = load_diffusion_model(GGUF)
    expected = latent(model, steps=20)
    swapped = streamed(model, vram_budget_gb=0.0058)
    latent(swapped)
    residency = residency_of(swapped)
    made, keep = residency.plans_made, pack.offload.residency.replan
    try:
        pack.offload.residency.replan = another
        residency.times.complete = lambda: True  # at each pass
        assert close_to(latent(swapped, steps=20), expected)
    finally:
        pack.offload.residency.replan = keep
        del residency.times.complete
    assert residency.plans_made >= made + 19 and len(seen) >= 3
    assert close_to(latent(swapped, steps=20), expected)


def check_compiled_by_the_host() -> None:
    """What core's TorchCompileModel does, with the back end that needs no C compiler."""
    from comfy_extras.nodes_torch_compile import set_torch_compile_wrapper

    model = load_diffusion_model(GGUF)
    expected = latent(model)
    swapped = streamed(model)
    compiled = swapped.clone()
    set_torch_compile_wrapper(model=compiled, backend="aot_eager")
    for _ in range(2):
        assert close_to(latent(compiled), expected)
    assert residency_of(compiled).choice is not None
    assert close_to(latent(swapped), expected)


def check_compute_dtype_of_the_user() -> None:
    for kind, load in MODELS.items():
        model = load()
        narrow = model.clone()
        narrow.set_model_compute_dtype(torch.bfloat16)
        expected, before = latent(narrow), latent(model)
        after = streamed(model).clone()
        after.set_model_compute_dtype(torch.bfloat16)
        for candidate in (after, streamed(narrow)):
            assert close_to(latent(candidate), expected), kind
        assert not torch.equal(expected, before), "the dtype changes nothing"
        assert close_to(latent(streamed(model)), before), kind


def check_object_patches() -> None:
    for kind, load in MODELS.items():
        model = load()
        plain = latent(model)
        shifted = ModelSamplingSD3().patch(model, 1.5)[0]
        # Of another model: where the host's dynamic patcher loads `shifted` after `model`, it puts the buffers of the
        # sampling that it replaced into the new one.
        expected = latent(ModelSamplingSD3().patch(load(), 1.5)[0])
        assert not torch.equal(plain, expected), "the node changes nothing"
        swapped = streamed(model)
        for candidate, wanted in (
            (streamed(shifted), expected), (ModelSamplingSD3().patch(swapped, 1.5)[0], expected), (swapped, plain),
            (ModelSamplingSD3().patch(swapped, 1.5)[0], expected),
        ):  # fmt: skip
            assert close_to(latent(candidate), wanted), kind
        residency = residency_of(swapped)
        assert residency.plans_made == 1, f"{kind}: planned {residency.plans_made} times"


def check_scaled_types_of_the_host() -> None:
    """A checkpoint in scaled fp8: the bytes of its weights stream, their scales stay."""
    path, tensors = FOLDER / "scaled.safetensors", {}
    for name, tensor in load_file(SAFETENSORS).items():
        tensors[name] = tensor.bfloat16()
        if name.startswith("joint_blocks") and name.endswith(("qkv.weight", "fc1.weight", "fc2.weight")):
            scale = tensor.abs().max() / 448
            stem = name.removesuffix("weight")
            tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors[f"{stem}weight_scale"] = scale
            kind = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
            tensors[f"{stem}comfy_quant"] = kind
    save_file(tensors, path)
    model = comfy.sd.load_diffusion_model(str(path))
    assert sum(isinstance(p, QuantizedTensor) for p in model.model.parameters()) > 10
    expected = latent(model)
    for dials in (DIALS["everything"], DIALS["every second block"], DIALS["nothing"]):
        swapped = streamed(model, **dials)
        for _ in range(2):
            assert close_to(latent(swapped), expected), dials
            comfy.model_management.unload_all_models()
        assert close_to(latent(model), expected)


def check_streamed_in_place() -> None:
    """As this pack's loader does it: the MODEL itself, and Block Swap applied to that."""
    expected = latent(load_diffusion_model(GGUF, disable_dynamic=True))
    model = stream(load_diffusion_model(GGUF, disable_dynamic=True), SwapRequest(**DIALS["some of each block"]))
    adapted = latent(base.with_lora(load_diffusion_model(GGUF, disable_dynamic=True)))
    for _ in range(2):
        assert close_to(latent(model), expected)
        assert close_to(latent(base.with_lora(model)), adapted)
        again = apply_block_swap(model, SwapRequest(blocks_to_swap=2))
        assert close_to(latent(again), expected) and close_to(latent(model), expected)
        assert residency_of(again).request.blocks_to_swap == 2
        comfy.model_management.unload_all_models()
    factory, arguments = model.cached_patcher_init
    assert close_to(latent(factory(*arguments)), expected)


# --- passes that are broken off, and blocks that are skipped


def replaced(model, block: int, function: Callable) -> Any:
    """A clone whose block `function(args, call the block itself)` stands for."""
    clone = model.clone()
    clone.set_model_patch_replace(
        lambda args, extra: function(args, extra["original_block"]), "dit", "double_block", block
    )
    return clone


def check_cancelled_then_run_again() -> None:
    def cancel(args: dict, original: Callable) -> dict:
        raise Interrupt

    for kind, _, expected, swapped in pairs(**DIALS["a ring for one block"]):
        latent(swapped, steps=1)
        homes, shown = bytes_of(swapped), shown_by(swapped)
        for block in range(BLOCKS):
            with contextlib.suppress(Interrupt):  # between two blocks
                latent(replaced(swapped, block, cancel))
            assert same_bytes(bytes_of(swapped), homes) and shown_by(swapped) == shown
            for call in (1, 2):
                inside = blocks_of(swapped)[block].x_block.attn.proj  # type: ignore[union-attr]
                with contextlib.suppress(Interrupt), raised_in(inside, Interrupt(), call):  # type: ignore[arg-type]
                    latent(swapped, steps=3)
                    raise AssertionError("nothing was cancelled")
                # Nobody may find another weight's bytes in the network, or soon another's.
                assert same_bytes(bytes_of(swapped), homes), f"{kind}: block {block}"
                assert shown_by(swapped) == shown, f"{kind}: block {block} is still shown over the ring"
                assert close_to(latent(swapped), expected), f"{kind}: block {block}"


def check_error_in_a_block_then_run_again() -> None:
    for kind, _, expected, swapped in pairs():
        homes = bytes_of(swapped)
        for block in range(BLOCKS):
            inside = blocks_of(swapped)[block].x_block.mlp.fc2  # type: ignore[union-attr]
            with contextlib.suppress(ValueError), raised_in(inside, ValueError("of the test"), 2):  # type: ignore[arg-type]
                latent(swapped)
                raise AssertionError("nothing was raised")
            assert same_bytes(bytes_of(swapped), homes), f"{kind}: block {block}"
            assert close_to(latent(swapped), expected), f"{kind}: block {block}"


@contextlib.contextmanager
def raised_in(layer: torch.nn.Module, error: BaseException, call: int) -> Iterator[None]:
    calls = 0

    def hook(module: torch.nn.Module, args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def check_skipped_repeated_and_early_ended_blocks() -> None:
    def skip(args: dict, original: Callable) -> dict:
        return {"img": args["img"], "txt": args["txt"]}

    def twice(args: dict, original: Callable) -> dict:
        return original({**args, **original(args)})

    def now_and_then() -> Callable:
        calls = iter(range(10**6))
        return lambda args, original: skip(args, original) if next(calls) % 3 == 1 else original(args)

    def end_early(model: Any) -> Any:
        return replaced(replaced(model, 1, skip), 2, skip)

    # The last block takes no text, so it is never replaced here.
    changes: dict[str, Callable] = {
        "first skipped": lambda model: replaced(model, 0, skip),
        "skipped": lambda model: replaced(model, 1, skip),
        "early end": end_early,
        "twice": lambda model: replaced(replaced(model, 0, twice), 2, twice),
        "now and then": lambda model: replaced(model, 1, now_and_then()),
    }
    for name, dials in (("everything", DIALS["everything"]), ("tight", DIALS["a ring for one block"])):
        for kind, model, expected, swapped in pairs(**dials):
            plain = latent(model, steps=3)
            for change, applied in changes.items():
                wanted = latent(applied(model), steps=3)
                assert not torch.equal(wanted, plain), f"{change} changes nothing"
                assert close_to(latent(applied(swapped), steps=3), wanted), f"{kind}, {name}, {change}"
            assert close_to(latent(swapped), expected), f"{kind}, {name}"


def check_clone_that_goes_during_a_run_takes_nothing_along() -> None:
    """The host ejects a MODEL that is dropped; one that shares the network may be running just then."""
    for kind, _, expected, swapped in pairs():
        latent(swapped, steps=1)
        clones = [swapped.clone()]
        candidate = swapped.clone()

        def wrapper(apply_model: Callable, args: dict, clones: list = clones) -> torch.Tensor:
            if clones:
                clones.pop()
                gc.collect()
            return apply_model(args["input"], args["timestep"], **args["c"])

        candidate.set_model_unet_function_wrapper(wrapper)
        waited = counted_waits(residency_of(swapped))
        assert close_to(latent(candidate), expected), kind
        assert not clones and sum(waited) >= 2 * BLOCKS, f"{kind}: only {sum(waited)} blocks streamed"


def counted_waits(residency: Any) -> list[int]:
    """Gets a 1 for each block that the streamer serves from now on."""
    counts: list[int] = []
    follow = residency.enter

    def enter(block: int) -> None:
        counts.append(int(residency.choice is not None))
        follow(block)

    residency.enter = enter
    return counts


def check_host_never_waits_within_the_blocks() -> None:
    """In the steady state: from before the first block to after the last, nothing makes the CPU wait for the GPU."""
    if not ON_GPU:
        return
    for kind, _, expected, swapped in pairs(**DIALS["a ring for one block"]):
        latent(swapped, steps=4)
        blocks, mode, passes = blocks_of(swapped), torch.cuda.set_sync_debug_mode, []  # type: ignore[var-annotated]

        def begin(*args: object, mode: Callable = mode, passes: list = passes) -> None:
            passes.append(1)
            mode("error")

        def end(*args: object, mode: Callable = mode) -> None:
            mode("default")

        handles = [
            blocks[0].register_forward_pre_hook(begin, prepend=True),
            blocks[-1].register_forward_hook(end, always_call=True),
        ]
        try:
            # The weights are in the way of no hook: the host injects ours anew at each run, so these stay outermost.
            assert close_to(latent(swapped), expected) and passes, kind
        finally:
            mode("default")
            for handle in handles:
                handle.remove()
        source = residency_of(swapped).choice.source.kind
        assert source in ("page_cache", "pinned"), f"{kind} streams from {source}"


def check_a_slow_stream_changes_nothing() -> None:
    """Copies that come late and compute that is late in reading, at every block: only the events keep the order."""
    if not ON_GPU:
        return
    for kind, _, expected, swapped in pairs(**DIALS["a ring for one block"]):
        normal = latent(swapped, steps=3)
        for which in ("compute", "copies"):
            with slowed(swapped, which) as blocks:
                found = latent(swapped, steps=3)
            assert close_to(found, normal), f"{kind}: slow {which}"
            assert len(blocks) >= 3 * BLOCKS, f"{kind}: only {len(blocks)} blocks were slow"
        assert close_to(latent(swapped), expected), kind


@contextlib.contextmanager
def slowed(model, which: str) -> Iterator[list[int]]:
    """Each block first sleeps for some milliseconds, or whatever is copied after it has begun does."""
    blocks: list[int] = []

    def sleep(module: torch.nn.Module, args: object) -> None:
        streamer = residency_of(model)._streaming.streamer
        stream = streamer._copying if which == "copies" else torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(5_000_000)
        blocks.append(1)

    handles = [block.register_forward_pre_hook(sleep) for block in blocks_of(model)]
    try:
        yield blocks
    finally:
        for handle in handles:
            handle.remove()


# --- several models, several budgets


def check_copied_model_has_no_memory_of_its_own() -> None:
    """Not of weights, nor of what layers derived from them while they ran."""
    copied = torch.UntypedStorage.__deepcopy__

    def refuse(storage: torch.UntypedStorage, memo: dict) -> torch.UntypedStorage:
        raise AssertionError(f"{storage.nbytes()} bytes on {storage.device} would be copied")

    for load in MODELS.values():
        model = load()
        for _ in range(2):
            latent(model)
        torch.UntypedStorage.__deepcopy__ = refuse  # type: ignore[assignment,method-assign]
        try:
            streamed(model)
        finally:
            torch.UntypedStorage.__deepcopy__ = copied  # type: ignore[method-assign]


def check_models_in_turn() -> None:
    gguf, plain = load_diffusion_model(GGUF), plain_model()
    swapped = [streamed(gguf), streamed(gguf, vram_budget_gb=LESS), streamed(plain)]
    expected = latent(gguf), latent(plain)
    order = [(gguf, 0), *((model, 0) for model in swapped[:2]), (plain, 1), (swapped[2], 1)]
    for _ in range(2):
        for model, which in (*order, *reversed(order)):
            assert close_to(latent(model), expected[which])
        comfy.model_management.unload_all_models()
    devices = {p.device.type for model in (*swapped, gguf) for p in model.model.parameters()}
    assert devices == {"cpu"}


def check_partial_and_full_unload() -> None:
    for kind, _, expected, swapped in pairs(**DIALS["nothing"]):
        latent(swapped, steps=1)
        residency, everything = residency_of(swapped), swapped.loaded_size()
        (loaded,) = (m for m in comfy.model_management.current_loaded_models if m.model is swapped)
        assert everything >= swapped.model_size() - 4096
        freed = swapped.partially_unload(swapped.offload_device, everything // 10)
        # Whole blocks are asked for, so there is no other plan: the host unloads the model.
        assert freed == 0 and swapped.loaded_size() == everything
        assert loaded.model_unload(everything // 10) is True
        assert swapped.loaded_size() == 0 and not residency.arranged
        comfy.model_management.current_loaded_models.remove(loaded)
        assert close_to(latent(swapped), expected), kind
    for kind, model, expected, _ in pairs():
        swapped = streamed(model, vram_budget_gb=0.05)
        latent(swapped, steps=1)
        residency, everything = residency_of(swapped), swapped.loaded_size()
        assert not residency.plan.copies
        before = bytes_of(swapped)
        for part in (everything // 20, everything // 50, 1000):
            held = swapped.loaded_size()
            freed = swapped.partially_unload(swapped.offload_device, part)
            assert freed >= part, f"{kind}: {freed} of {part} bytes"
            assert swapped.loaded_size() == held - freed == residency.vram_bytes
            assert residency.plan.vram_bytes == residency.vram_bytes and residency.plan.copies
            assert same_bytes(bytes_of(swapped), before)
        assert swapped.partially_unload(swapped.offload_device, swapped.loaded_size() - 1000) == 0
        assert close_to(latent(swapped), expected), kind
        for _ in range(2):
            comfy.model_management.unload_all_models()
            assert swapped.loaded_size() == 0 and not residency.arranged and residency.choice is None
            assert close_to(latent(swapped), expected), kind


def check_budgets_of_the_host() -> None:
    """--highvram, --normalvram, --lowvram and --novram differ in what the host offers a MODEL that it loads."""
    for kind, model, expected, _ in pairs():
        swapped = streamed(model)
        for offered in (1e32, 0.1, 700e6, 1e32, 600e6, 0.1):
            swapped.partially_load(swapped.load_device, offered)
            assert swapped.model.current_weight_patches_uuid == swapped.patches_uuid
            assert close_to(latent(swapped), expected), f"{kind}, {offered:g} bytes"
            swapped.detach()
            assert swapped.loaded_size() == 0
    for dials in ({}, {"blocks_to_swap": 2}):  # straight to the methods that it calls
        swapped = streamed(load_diffusion_model(GGUF), **dials)
        for memory in (0, 1e32, 300e6):
            swapped.patch_model(swapped.load_device, lowvram_model_memory=memory)
            assert swapped.loaded_size() == residency_of(swapped).vram_bytes > 0
            swapped.unpatch_model(swapped.offload_device)
            assert swapped.loaded_size() == 0


def check_nothing_happens_where_nothing_changed() -> None:
    for kind, _, expected, swapped in pairs():
        latent(swapped)
        residency = residency_of(swapped)
        facts = residency.choice, residency.plan, residency.plans_made
        shown = shown_by(swapped)
        for _ in range(3):
            assert close_to(latent(swapped), expected)
            assert (residency.choice, residency.plan, residency.plans_made) == facts, kind
            assert shown_by(swapped) == shown


def check_another_model_of_it_for_another_gpu() -> None:
    for kind, _, expected, swapped in pairs():
        if not hasattr(swapped, "deepclone_multigpu"):  # since 0.20
            return
        latent(swapped, steps=1)
        if swapped.cached_patcher_init is None:
            continue
        copy = swapped.deepclone_multigpu(new_load_device=swapped.load_device)
        assert copy.model is not swapped.model and residency_of(copy) is not residency_of(swapped)
        assert close_to(latent(copy), expected) and close_to(latent(swapped), expected), kind
        assert residency_of(copy).plan.copies


def check_pinned_memory_switched_off() -> None:
    arguments = comfy.model_management.args
    before, arguments.disable_pinned_memory = arguments.disable_pinned_memory, True
    try:
        for kind, _, expected, swapped in pairs():
            assert close_to(latent(swapped), expected), kind
            assert residency_of(swapped).choice.source.pinned_bytes == 0
            assert "switched off" in residency_of(swapped).choice.reason
    finally:
        arguments.disable_pinned_memory = before


def check_too_small_a_budget_says_what_works() -> None:
    for kind, _, expected, _ in pairs():
        model = MODELS[kind]()
        small = streamed(model, vram_budget_gb=0.001)
        try:
            latent(small)
        except BudgetTooSmallError as error:
            said = str(error)
            smallest = error.smallest_bytes
        else:
            raise AssertionError("0.001 GB was enough")
        assert "raise vram_budget_gb to" in said and "Block Swap" in said
        typed = float(said.split("raise vram_budget_gb to ")[1].split(" GB")[0])
        assert smallest <= typed * 1e9
        assert small.loaded_size() == 0 and not residency_of(small).arranged
        assert close_to(latent(streamed(model, vram_budget_gb=typed)), expected), kind
        assert close_to(latent(streamed(model, vram_budget_gb=smallest / 1e9)), expected), kind
        assert close_to(latent(model), expected)


def check_sensible_errors() -> None:
    model = load_diffusion_model(GGUF)
    swapped = streamed(model, blocks_to_swap=BLOCKS + 1)
    try:
        latent(swapped)
    except ValueError as error:
        assert f"blocks_to_swap is {BLOCKS + 1}, but this model has {BLOCKS} blocks" in str(error)
    else:
        raise AssertionError("more blocks than there are went unnoticed")
    for dial, value in {"vram_budget_gb": -1, "blocks_to_swap": -2, "prefetch_blocks": 99}.items():
        try:
            SwapRequest(**{dial: value})
        except ValueError as error:
            assert dial in str(error) and "Choose" in str(error)
        else:
            raise AssertionError(f"{dial} = {value} was taken")
    network, model.model.diffusion_model = model.model.diffusion_model, torch.nn.Linear(4, 4)
    try:
        apply_block_swap(model, SwapRequest())
    except ValueError as error:
        assert "no blocks were found" in str(error) and "remove the node" in str(error)
    else:
        raise AssertionError("a model without blocks was taken")
    model.model.diffusion_model = network
    latent(model, steps=1)


if __name__ == "__main__":
    base.main(globals())
