"""Checks of a loaded GGUF model that need the host's own classes, run inside the host.

`python model_checks.py FOLDER MODE [REGEX]`: FOLDER holds demo.gguf and demo.safetensors with the same numbers and
lora.safetensors; MODE is `classic`, or `granted` / `refused` for the dynamic patcher with a stand-in for the one part
that needs an NVIDIA driver, its allocator of device pages (see `dynamic_vram`); `gpu-classic` and `gpu-dynamic` are
the two patchers as they are, on a GPU. With REGEX only the checks that it finds run. Prints one JSON line for each.
"""

from __future__ import annotations

import gc
import json
import logging
import re
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

FOLDER, MODE = Path(sys.argv[1]), sys.argv[2]
ONLY = re.compile("".join(sys.argv[3:4]))
ON_GPU = MODE.startswith("gpu")
# torch's attention, because the host's own measures free memory in the middle of a block, which cannot be traced.
sys.argv = [
    "main.py",
    "--use-pytorch-cross-attention",
    *([] if ON_GPU else ["--cpu"]),
    *(["--disable-dynamic-vram"] if MODE == "gpu-classic" else []),
]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy_aimdo.control  # noqa: E402

if MODE == "gpu-dynamic":
    comfy_aimdo.control.init(simple_vram_headroom=None)  # before its other modules are imported, as main.py does
import comfy.hooks  # noqa: E402
import comfy.memory_management  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import pack.loaders.ops  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from comfy_kitchen.tensor import QuantizedTensor  # noqa: E402
from pack.loaders.diffusion import ATTACHMENT, load_diffusion_model  # noqa: E402
from pack.loaders.gguf.errors import GGUFError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

GGUF, SAFETENSORS = FOLDER / "demo.gguf", FOLDER / "demo.safetensors"
CPU = torch.device("cpu")


def dynamic_vram(granted: bool) -> None:
    """Switch the host to its dynamic patcher on the CPU.

    The real allocator hands out device pages through the NVIDIA driver and may refuse a page when memory is short;
    this one hands out host memory and grants or refuses always. All code of the patcher itself is the host's.
    """
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch
    from comfy.cli_args import args

    class Pages:
        def __init__(self, size: int, device: int) -> None:
            self.used = 0
            self.memory: dict[int, torch.Tensor] = {}

        def alloc(self, size: int) -> tuple:
            offset, self.used = self.used, self.used + size
            self.memory[offset] = torch.empty(size, dtype=torch.uint8)
            return self, offset, size

        def prioritize(self) -> None: ...

        def free_memory(self, size: int) -> int:
            return 0

        def loaded_size(self) -> int:
            return self.used

    class NoHostBuffer:
        def __init__(self, *args: object) -> None:
            self.size = 0

    args.disable_pinned_memory = True
    comfy.memory_management.aimdo_enabled = True
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.model_management.is_device_cpu = lambda device: False
    comfy.model_management.NUM_STREAMS = 0
    comfy.model_management.get_torch_device = lambda: torch.device("cpu", 0)
    comfy_aimdo.model_vbar.ModelVBAR = Pages
    comfy_aimdo.model_vbar.vbar_fault = lambda page: b"signature" if granted else None
    comfy_aimdo.model_vbar.vbar_signature_compare = lambda a, b: a is not None and a == b
    comfy_aimdo.model_vbar.vbar_unpin = lambda page: None
    comfy_aimdo.host_buffer.HostBuffer = NoHostBuffer
    comfy_aimdo.torch.aimdo_to_tensor = lambda page, device: page[0].memory[page[1]]
    # A device that is not the CPU: layers whose weights are paged take the way of weights that lie elsewhere, and the
    # host compares the device with where the weight lies, from which "cpu" the text differs.
    forward = pack.loaders.ops.MappedLinear.forward

    def forward_from_elsewhere(layer, x):
        return layer.forward_comfy_cast_weights(x) if hasattr(layer, "_v") else forward(layer, x)

    pack.loaders.ops.MappedLinear.forward = forward_from_elsewhere
    cast = comfy.ops.cast_bias_weight

    def cast_from_elsewhere(layer, *args, **kwargs):
        if hasattr(layer, "_v"):
            CASTS.add(id(layer))
            kwargs["device"] = str(kwargs["device"] if "device" in kwargs else args[0].device)
        return cast(layer, *args, **kwargs)

    comfy.ops.cast_bias_weight = cast_from_elsewhere


CASTS: set[int] = set()  # the layers (by id) whose weights came through the dynamic patcher


def real_dynamic_vram() -> None:
    """Switch the host to its dynamic patcher on the GPU, as its main.py does."""
    devices = ((d.index, 0) for d in comfy.model_management.get_all_torch_devices())
    assert comfy_aimdo.control.init_devices(devices), "dynamic VRAM does not start on this machine"
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


class UnhandledOps(logging.Handler):
    """Collects the operations for which the host had to dequantise a whole weight."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        logger = logging.getLogger("comfy_kitchen.tensor.base")
        logger.setLevel(logging.DEBUG)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


UNHANDLED = UnhandledOps()


def latent(patcher, steps: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 16, 8, 8, generator=generator)
    pooled = torch.randn(1, 2048, generator=generator) * 0.1
    condition = [[torch.randn(1, 77, 4096, generator=generator) * 0.1, {"pooled_output": pooled}]]
    return comfy.sample.sample(
        patcher, noise, steps, 3.0, "euler", "simple", condition, condition, torch.zeros_like(noise),
        disable_pbar=True, seed=1,
    )  # fmt: skip


def reference():
    """The same numbers as plain weights; under the classic patcher where the dynamic one is a stand-in.

    In 16 bits on a GPU: where the host's dynamic patcher gives way to the classic one (hooks), it leaves weights that
    are not in the model's type to layers that do not cast.
    """
    if not ON_GPU:
        return comfy.sd.load_diffusion_model_state_dict(load_file(SAFETENSORS), disable_dynamic=True)
    half = FOLDER / "half.safetensors"
    if not half.exists():
        save_file({name: tensor.half() for name, tensor in load_file(SAFETENSORS).items()}, half)
    return comfy.sd.load_diffusion_model(str(half))


def with_lora(patcher, strength: float = 1.0):
    adapter = load_file(FOLDER / "lora.safetensors")
    return comfy.sd.load_lora_for_models(patcher, None, adapter, strength, 0)[0]


def weights(patcher) -> dict[str, QuantizedTensor]:
    return {k: p for k, p in patcher.model.named_parameters() if isinstance(p, QuantizedTensor)}


def compilers_done() -> None:
    """Wait until no kernel is compiled for somebody who has not asked for it yet."""
    for thread in threading.enumerate():
        if thread.name.startswith("sluice-compile"):
            thread.join(60)


def plain_tensors_of(sizes: set[int]) -> list[torch.Tensor]:
    """Living plain float tensors with as many elements as some quantised weight."""
    gc.collect()
    found = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and not isinstance(t, QuantizedTensor)]
    return [t for t in found if t.is_floating_point() and t.numel() in sizes]


def file_is_mapped() -> bool:
    return any(m.path == str(GGUF) for m in psutil.Process().memory_maps(grouped=False))


# --- the checks; each is independent of the others


def check_latent_equals_dequantised_safetensors() -> None:
    patcher, plain_model = load_diffusion_model(GGUF), reference()
    assert ("classic" not in MODE) == patcher.is_dynamic()
    assert len(weights(patcher)) > 40
    expected, first = latent(plain_model), latent(patcher)
    if ON_GPU:
        # Few rows are multiplied by the blocks themselves there, nearer to the exact product than a dense weight in
        # 16 bits: one rounding of 2^-9 (bfloat16) in each layer, over 2 steps of 4 blocks, stays below 5 %.
        assert (first - expected).norm() < 0.05 * expected.norm()
    else:
        assert torch.equal(first, expected)
    assert MODE not in ("granted", "refused") or len(CASTS) > 40
    assert torch.equal(latent(patcher), first), "a second run differs from the first"
    assert first.isfinite().all() and first.std() > 0.1


def check_no_dense_weight_outlives_its_op() -> None:
    patcher = load_diffusion_model(GGUF)
    plain = {p.numel() for p in patcher.model.parameters() if not isinstance(p, QuantizedTensor)}
    sizes = {p.numel() for p in weights(patcher).values()} - plain
    assert len(sizes) > 3
    before = {id(t) for t in plain_tensors_of(sizes)}
    latent(patcher)
    after = [t for t in plain_tensors_of(sizes) if id(t) not in before]
    assert not after, f"{len(after)} dense tensors of weight size live on, such as {after[0].shape}"


def check_no_operation_dequantises_unasked() -> None:
    UNHANDLED.found.clear()
    patcher = with_lora(load_diffusion_model(GGUF))
    latent(patcher)
    assert not UNHANDLED.found, UNHANDLED.found[:3]
    weights(patcher)["diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"].sum()
    assert UNHANDLED.found, "the listener heard nothing, so this check could not have failed"


def check_sizes_are_the_files() -> None:
    patcher = load_diffusion_model(GGUF)
    file = patcher.get_attachment(ATTACHMENT).file
    total = sum(info.nbytes for info in file.tensors.values())
    # Plain tensors that the host holds in float32 on this device may be wider than in the file, never the blocks.
    assert abs(patcher.model_size() - total) < 0.1 * total
    for name, weight in weights(patcher).items():
        info = file.tensors[name.removeprefix("diffusion_model.")]
        if info.ggml_type is not weight._params.ggml_type:
            continue  # a small tensor, dequantised when it was loaded
        assert weight.nbytes == info.nbytes and tuple(weight.shape) == info.shape
        assert comfy.memory_management.vram_aligned_size(weight) < info.nbytes + 1024


def check_weights_are_the_mapping() -> None:
    patcher = load_diffusion_model(GGUF)
    file = patcher.get_attachment(ATTACHMENT).file
    for name, weight in weights(patcher).items():
        if weight._params.ggml_type is not file.tensors[name.removeprefix("diffusion_model.")].ggml_type:
            continue  # a small tensor, dequantised when it was loaded
        view = torch.frombuffer(file.view(name.removeprefix("diffusion_model.")), dtype=torch.uint8)
        assert weight._qdata.data_ptr() == view.data_ptr(), name


def check_host_reads_file_slices() -> None:
    read = getattr(comfy.memory_management, "read_tensor_file_slice_into", None)
    if read is None:
        return  # this host reads through the mapping
    patcher = load_diffusion_model(GGUF)
    for weight in list(weights(patcher).values())[:5]:
        buffer = torch.zeros(comfy.memory_management.vram_aligned_size(weight), dtype=torch.uint8)
        target = comfy.memory_management.interpret_gathered_like([weight], buffer)[0]
        assert read(weight, target), "the host does not know where the weight lies"
        assert torch.equal(target._qdata, weight._qdata)
        assert target._params.ggml_type is weight._params.ggml_type


def check_moving_back_restores_the_mapping() -> None:
    network = load_diffusion_model(GGUF).model.diffusion_model
    home = {k: p.data_ptr() for k, p in network.named_parameters() if isinstance(p, QuantizedTensor)}
    layer = network.joint_blocks[0].x_block.attn.qkv
    assert layer.weight.device == CPU
    dtype = layer.weight.dtype
    layer.to(torch.float64)  # stands for any device: the moved parameter is another tensor
    assert isinstance(layer.weight, QuantizedTensor) and layer.weight.dtype == torch.float64
    layer.to(dtype)
    assert {k: p.data_ptr() for k, p in network.named_parameters() if isinstance(p, QuantizedTensor)} == home
    layer.weight = torch.nn.Parameter(layer.weight.detach(), requires_grad=False)  # as a patcher undoes a patch
    layer.to(torch.float64).to(dtype)
    assert layer.weight.data_ptr() == home["joint_blocks.0.x_block.attn.qkv.weight"]
    layer.weight = torch.nn.Parameter(torch.ones(layer.weight.shape), requires_grad=False)  # as a patcher does
    layer.to(torch.float64).to(dtype)
    assert layer.weight.sum() == layer.weight.numel(), "a replaced weight was thrown away"


def check_compute_dtype_stays_with_its_model() -> None:
    wide, narrow = load_diffusion_model(GGUF), load_diffusion_model(GGUF, torch.bfloat16)
    assert {p.dtype for p in weights(wide).values()} == {wide.model.get_dtype_inference()}
    assert {p.dtype for p in weights(narrow).values()} == {torch.bfloat16}
    expected = latent(wide)
    latent(narrow)
    assert torch.equal(latent(wide), expected)


def check_lora_equals_core_on_dense_weights() -> None:
    if ON_GPU:
        return  # the host computes a patch in float32 and rounds it stochastically; on the CPU all is float32
    patcher, plain_model = load_diffusion_model(GGUF), reference()
    plain, adapted = latent(patcher), with_lora(patcher)
    expected = latent(with_lora(plain_model))
    assert torch.equal(latent(adapted), expected)
    assert torch.equal(latent(adapted), expected), "step and run must not change a patched weight"
    assert not torch.equal(plain, expected), "the adapter changes nothing, so this check could not have failed"
    assert torch.equal(latent(patcher), plain), "removing the adapter left something behind"
    both = with_lora(with_lora(patcher, 0.5), -0.25)
    assert torch.equal(latent(both), latent(with_lora(with_lora(plain_model, 0.5), -0.25)))


def check_two_models_of_one_file_are_apart() -> None:
    one, other = load_diffusion_model(GGUF), load_diffusion_model(GGUF)
    expected = latent(other)
    latent(with_lora(one))
    assert torch.equal(latent(other), expected)


def check_host_can_make_it_again() -> None:
    patcher = load_diffusion_model(GGUF)
    expected = latent(patcher)
    factory, arguments = patcher.cached_patcher_init
    assert not factory(*arguments, disable_dynamic=True).is_dynamic()
    if hasattr(patcher, "deepclone_multigpu"):  # since 0.20
        copy = patcher.deepclone_multigpu(new_load_device=patcher.load_device)
        assert copy.model is not patcher.model
        assert torch.equal(latent(copy), expected)
    if patcher.is_dynamic():
        static = patcher.clone(disable_dynamic=True)
        assert not static.is_dynamic() and len(weights(static)) == len(weights(patcher))


def check_changed_file_is_an_error_at_the_next_run() -> None:
    patcher = load_diffusion_model(GGUF)
    latent(patcher, steps=1)
    original = GGUF.stat()
    try:
        import os

        os.utime(GGUF, ns=(original.st_atime_ns, original.st_mtime_ns + 10**9))
        try:
            latent(patcher, steps=1)
        except GGUFError as error:
            assert "demo.gguf" in str(error)
        else:
            raise AssertionError("a changed file went unnoticed")
    finally:
        os.utime(GGUF, ns=(original.st_atime_ns, original.st_mtime_ns))
    latent(patcher, steps=1)


def check_dropping_the_model_releases_the_file() -> None:
    comfy.model_management.unload_all_models()
    gc.collect()
    process = psutil.Process()
    patcher = load_diffusion_model(GGUF)
    latent(patcher, steps=1)
    assert file_is_mapped()
    comfy.model_management.unload_all_models()
    del patcher
    comfy.model_management.cleanup_models_gc()
    gc.collect()
    comfy.model_management.reset_cast_buffers()  # the executor does, after each node; they remember a layer
    gc.collect()
    assert not file_is_mapped()
    assert str(GGUF) not in {f.path for f in process.open_files()}


def check_partial_load() -> None:
    """The classic patcher keeps some layers on the offload device and casts them at each use."""
    if MODE != "classic":
        return
    patcher = load_diffusion_model(GGUF)
    expected, adapted = latent(patcher), with_lora(patcher)
    expected_adapted = latent(adapted)
    for candidate, wanted in ((patcher.clone(), expected), (adapted.clone(), expected_adapted)):
        comfy.model_management.unload_all_models()
        candidate.patch_model(CPU, lowvram_model_memory=4_000_000)
        assert candidate.model.model_lowvram
        pooled = torch.zeros(1, 2048)
        out = candidate.model.diffusion_model(
            torch.ones(1, 16, 16, 16), torch.tensor([0.5]), context=torch.ones(1, 77, 4096), y=pooled
        )
        partial = [m for m in candidate.model.modules() if getattr(m, "prev_comfy_cast_weights", None) is not None]
        assert len(partial) > 5, "nothing was offloaded"
        candidate.unpatch_model(CPU)
        candidate.patch_model(CPU)
        again = candidate.model.diffusion_model(
            torch.ones(1, 16, 16, 16), torch.tensor([0.5]), context=torch.ones(1, 77, 4096), y=pooled
        )
        candidate.unpatch_model(CPU)
        assert torch.equal(out, again)
        assert torch.equal(latent(candidate), wanted)


def check_compiles_whole_and_once() -> None:
    """Core's TorchCompileModel node; without a GPU, what it does but with the back end that needs no C compiler."""
    if MODE in ("granted", "refused"):
        return
    from comfy_extras.nodes_torch_compile import TorchCompileModel, set_torch_compile_wrapper
    from torch._dynamo.utils import counters

    patcher = load_diffusion_model(GGUF)
    expected = latent(patcher)
    if ON_GPU:
        compiled = TorchCompileModel.execute(patcher, "inductor").args[0]
    else:
        compiled = patcher.clone()
        set_torch_compile_wrapper(model=compiled, backend="aot_eager")
    counters.clear()
    assert same_compiled(latent(compiled), expected)
    assert not counters["graph_break"], counters["graph_break"]
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 4, f"{graphs} graphs: the model is compiled in pieces"
    assert same_compiled(latent(compiled, steps=3), latent(patcher, steps=3))
    assert counters["stats"]["unique_graphs"] == graphs, "another run compiled again"


def same_compiled(compiled: torch.Tensor, eager: torch.Tensor) -> bool:
    """Inductor computes in float32 what lies between two matrix products, eager rounds each operation to 16 bits: a
    few roundings of 2^-9 (bfloat16) in each of 4 blocks over 3 steps."""
    return bool((compiled - eager).norm() < 0.05 * eager.norm()) if ON_GPU else torch.equal(compiled, eager)


class LargestFloat(TorchDispatchMode):
    """Remembers the most elements of a float tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.elements = max(self.elements, result.numel())
        return result


def check_embedding_gathers_rows() -> None:
    from pack.loaders.gguf.types import GGMLType
    from pack.loaders.ops import make_ops
    from pack.loaders.quant.layout import quantized

    rows, width = 4099, 256
    blocks = torch.randint(0, 256, (rows, width // 256 * 210), dtype=torch.uint8)
    blocks[:, 208:] = torch.tensor([0, 0x2C], dtype=torch.uint8)  # a Q6_K block's scale, 0.0625
    table = quantized(blocks, GGMLType.Q6_K, (rows, width))
    layer = make_ops(torch.float32, None).Embedding(rows, width)
    layer.load_state_dict({"weight": table})
    tokens = torch.randint(0, rows, (2, 7))
    expected = table.dequantize()[tokens]
    with torch.no_grad(), LargestFloat() as seen:
        assert torch.equal(layer(tokens), expected)
    assert seen.elements < rows * width // 100, "the whole table was dequantised"
    assert layer(tokens, out_dtype=torch.bfloat16).dtype == torch.bfloat16


def check_convolutions_and_linear_equal_plain_ones() -> None:
    from pack.loaders.gguf.types import BLOCKS, GGMLType
    from pack.loaders.ops import make_ops
    from pack.loaders.quant.layout import quantized

    ops = make_ops(torch.float32, None)
    cases = {
        "Linear": ((64, 96), (2, 5, 64), {}),
        "Conv1d": ((64, 96, 3), (2, 64, 9), {"padding": 1}),
        "Conv2d": ((64, 96, 3, 3), (2, 64, 6, 6), {"padding": 1, "stride": 2}),
        "Conv3d": ((64, 96, 2, 2, 2), (1, 64, 4, 4, 4), {"groups": 2}),
    }
    for name, ((inputs, outputs, *kernel), shape, options) in cases.items():
        weight_shape = (outputs, inputs // options.get("groups", 1), *kernel)
        layout, count = BLOCKS[GGMLType.Q8_0], torch.Size(weight_shape).numel()
        blocks = torch.randint(0, 256, (count // layout.elements, layout.nbytes), dtype=torch.uint8)
        blocks[:, :2] = torch.tensor([0, 0x20], dtype=torch.uint8)  # the block's scale, 2 ** -7
        weight = quantized(blocks.flatten(), GGMLType.Q8_0, weight_shape)
        bias, x = torch.randn(outputs), torch.randn(shape)
        ours = getattr(ops, name)(inputs, outputs, *[tuple(kernel)] if kernel else [], **options)
        plain = getattr(torch.nn, name)(inputs, outputs, *[tuple(kernel)] if kernel else [], **options)
        ours.load_state_dict({"weight": weight, "bias": bias})
        plain.load_state_dict({"weight": weight.dequantize(), "bias": bias})
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                assert torch.equal(ours(x), plain(x)), name
                assert torch.equal(ours.forward_comfy_cast_weights(x), plain(x)), name
                if name == "Linear":
                    assert torch.equal(torch.nn.functional.linear(x, weight, bias), plain(x))
        UNHANDLED.found.clear()
        ours(x)
        assert not UNHANDLED.found, UNHANDLED.found


def check_slices_and_transposes_stay_quantised() -> None:
    from pack.loaders.gguf.types import GGMLType
    from pack.loaders.quant.layout import is_gguf, quantized

    blocks = torch.randint(0, 256, (96, 2 * 34), dtype=torch.uint8)
    blocks[:, [0, 1, 34, 35]] = torch.tensor([0, 0x20, 0, 0x24], dtype=torch.uint8)
    weight = quantized(blocks, GGMLType.Q8_0, (96, 64))
    plain = weight.dequantize()
    part = weight[32:64]
    assert is_gguf(part) and part._qdata.data_ptr() == weight._qdata[32:].data_ptr()
    assert torch.equal(part.dequantize(), plain[32:64])
    assert is_gguf(weight[90:200]) and torch.equal(weight[90:200].dequantize(), plain[90:200])
    assert torch.equal(weight[:, 3:9], plain[:, 3:9])
    assert is_gguf(weight.t()) and torch.equal(weight.t().dequantize(), plain.t())
    assert torch.equal(weight.t().t().dequantize(), plain)
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert torch.equal(torch.mm(x, weight.t()), torch.mm(x, plain.t()))
        assert torch.equal(torch.addmm(torch.ones(96), x, weight.t()), torch.addmm(torch.ones(96), x, plain.t()))
    assert torch.equal(weight.clone().dequantize(), plain) and torch.equal(weight.to(torch.bfloat16).dequantize(),
                                                                          plain.bfloat16())  # fmt: skip


def first_attention() -> None:
    """At the first attention of a process torch sets its own order of kernels over the host's (`priority_order` in its
    sdp_utils.cpp), so that this one is made by another kernel than all later ones, and rounds differently."""
    q = torch.zeros(1, 1, 16, 64, dtype=torch.float16, device=comfy.model_management.get_torch_device())
    comfy.ops.scaled_dot_product_attention(q, q, q)


def main(checks: dict[str, Any]) -> None:
    """Run every `check_*` of a script's globals in the mode that the command line names."""
    torch.set_num_threads(2)
    if MODE in ("granted", "refused"):
        dynamic_vram(granted=MODE == "granted")
    elif MODE == "gpu-dynamic":
        real_dynamic_vram()
    if ON_GPU:
        first_attention()
    for name, check in sorted(checks.items()):
        if not name.startswith("check_") or not ONLY.search(name.removeprefix("check_")):
            continue
        start = time.monotonic()
        try:
            with torch.inference_mode(mode=False):
                check()
            outcome = ""
        except Exception:
            outcome = traceback.format_exc()
        print(
            json.dumps({"check": name.removeprefix("check_"), "failure": outcome, "seconds": time.monotonic() - start}),
            flush=True,
        )


if __name__ == "__main__":
    main(globals())
