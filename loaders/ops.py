"""The layers of a GGUF model: the host's own, with weights that may be quantised and are never copied at load.

A layer takes its tensors from the state dict as they are (views of the file mapping), so building a model costs no
memory; it dequantises at each use and lets go of the dense weight at once. Residency stays the host's business:
`cast_weights` brings bytes to the device by whichever patcher owns the model. Moving a layer back to the CPU puts
the mapped view back instead of copying device memory into RAM.

The ops class is made per model (`make_ops`), so two loaded models never share a setting.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor

from . import compat
from .low_rank import FoldedWeight
from .patch_at_use import LowRankAtUse
from .quant import dispatch, reference
from .quant.bound import BoundWeight
from .quant.layout import dense, is_gguf, quantized, reshaped, with_params
from .quant.reference import PLAIN_DTYPES
from .quant.scratch import Scratch

TYPES = {dtype: plain for plain, dtype in PLAIN_DTYPES.items()}


class MappedLayer(torch.nn.Module):
    """What every weight-bearing layer shares; mixed in before the host's layer class.

    The host's constructor runs on the meta device, so it declares shapes and allocates nothing; the state dict then
    assigns. `compute_dtype` and `scratch` are set by `make_ops` on the class made for one model.
    """

    compute_dtype: torch.dtype
    scratch: Scratch
    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    weight_function: list
    bias_function: list

    def __init__(self, *args: Any, device: Any = None, **kwargs: Any) -> None:
        self._home: dict[str, torch.nn.Parameter] = {}
        self._away: dict[str, torch.nn.Parameter] = {}
        self._bound: BoundWeight | None = None
        self._folded_weight: FoldedWeight | None = None
        self._last: Callable[[], Any] = lambda: None  # a weak reference to the last weight
        super().__init__(*args, device="meta", **kwargs)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, torch.Tensor],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in ("weight", "bias"):
            declared, given = self._parameters.get(name), state_dict.get(prefix + name)
            if declared is None or given is None:
                if given is not None:
                    unexpected_keys.append(prefix + name)
                elif declared is not None:
                    missing_keys.append(prefix + name)
                continue
            if given.shape != declared.shape:
                if not _same_row_major(tuple(given.shape), tuple(declared.shape)):
                    error_msgs.append(
                        f"size mismatch for {prefix}{name}: the file has {tuple(given.shape)}, "
                        f"the model needs {tuple(declared.shape)}."
                    )
                    continue
                given = reshaped(given, tuple(declared.shape))
            if name == "weight" and not is_gguf(given) and given.dtype != self.compute_dtype:
                # Some models cast their input to `weight.dtype` (CogVideoX, Hunyuan3D), which must not be the file's.
                plain = TYPES[given.dtype]
                given = quantized(given.reshape(-1).view(torch.uint8), plain, tuple(given.shape))
            if is_gguf(given):
                given = with_params(given, orig_dtype=self.compute_dtype)
            parameter = torch.nn.Parameter(given, requires_grad=False)
            self._parameters[name] = self._home[name] = parameter
            compat.set_model_dtype(self, name, self.compute_dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`Module.to` and friends. Quantised parameters are wrapped anew, mapped ones go home without a copy."""
        parameters = self._parameters
        # Declared but not loaded yet (meta) stays declared: the host may choose a device before it loads.
        ours = {k: p for k, p in parameters.items() if p is not None and (k in self._home or is_gguf(p) or p.is_meta)}
        for name in ours:
            parameters[name] = None
        super()._apply(fn, recurse)
        self.forget_bound()
        self.scratch.clear()
        for name, parameter in ours.items():
            parameters[name] = parameter if parameter.is_meta else self._moved(name, parameter, fn)
        return self

    def is_home(self, name: str) -> bool:
        """Whether the parameter `name` is the mapped one."""
        return self._parameters[name] is self._home.get(name)

    def set_home(self, name: str, parameter: torch.nn.Parameter) -> None:
        """The mapped tensor `name` is `parameter` now: its file was closed, or opened again."""
        self._home[name] = parameter
        self._away.pop(name, None)

    def show_away(self, name: str, parameter: torch.nn.Parameter) -> None:
        """The mapped tensor `name` was copied to a device, as `parameter`. It goes home when the layer does."""
        self._parameters[name] = self._away[name] = parameter
        self.forget_bound()

    def cast_from(self) -> dict[str, torch.Tensor]:
        """What the file has of the parameters of which the layer holds no more than a cast, by name."""
        return {name: home.detach() for name, home in self._home.items() if _is_cast(self._parameters[name], home)}

    def forget_bound(self) -> None:
        """Let go of the calls that are bound to the weight."""
        self._bound = self._folded_weight = None

    def _moved(self, name: str, parameter: torch.nn.Parameter, fn: Any) -> torch.nn.Parameter:
        home = self._home.get(name)
        at_home = home is not None and _same_memory(home, parameter)
        known = at_home or parameter is self._away.get(name)
        if home is not None and known:
            cast = name == "bias" and parameter.device != home.device  # on its way: `_as_used`
            probe = fn(torch.empty(0, dtype=home.dtype if cast else parameter.dtype, device=parameter.device))
            if probe.device == home.device and probe.dtype == home.dtype:
                self._away.pop(name, None)
                return home
        data = self._as_used(name, fn(parameter), parameter.device)
        # What is there already stays the object that it is: wrapped anew outside of inference mode, a quantised one
        # could not be used inside.
        moved = parameter if data is parameter else torch.nn.Parameter(data, requires_grad=False)
        if known:  # also where the host moves it to the device that it is on
            self._away[name] = moved
        return moved

    def _as_used(self, name: str, moved: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A bias on another device is in the compute dtype, else every call would wait for the launch of a cast. (No
        cast can be kept beside the bias: the host writes over it, at hooks, in a way that leaves no trace.)"""
        return moved.to(self.compute_dtype) if name == "bias" and moved.device != device else moved

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **kwargs: Any) -> torch.Tensor:
        """The host asks for the dense weight before it computes a patch."""
        return weight.dequantize() if is_gguf(weight) else weight

    def set_weight(
        self,
        weight: torch.Tensor,
        inplace_update: bool = False,
        seed: Any = None,
        return_weight: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """The host hands back a weight: put it in as it is, a quantised type is never made again.

        With `inplace_update` the host keeps the tensor (hooks cache it) and later writes over the layer's.
        """
        if not isinstance(weight, QuantizedTensor):
            weight = weight.to(self.compute_dtype, copy=inplace_update)
        if return_weight:
            return weight
        self._away.pop("weight", None)  # else what lay on the device would stay there unused
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        return None


def _same_memory(home: torch.nn.Parameter, parameter: torch.nn.Parameter) -> bool:
    """Whether `parameter` is the mapped one: the object itself, or what the host wraps anew when it undoes a patch."""
    if parameter is home:
        return True
    ours, theirs = _bytes(home), _bytes(parameter)
    return ours.device == theirs.device and ours.dtype == theirs.dtype and ours.data_ptr() == theirs.data_ptr()


def _is_cast(parameter: torch.nn.Parameter | None, home: torch.nn.Parameter) -> bool:
    if parameter is None or parameter.dtype == home.dtype or home.is_meta or is_gguf(home):
        return False
    return torch.equal(parameter.detach().to(home.device), home.detach().to(parameter.dtype))


def _same_row_major(given: tuple[int, ...], declared: tuple[int, ...]) -> bool:
    """Whether both shapes list the same elements in the same order with dimensions only merged, split off or of 1."""
    small, large = sorted(([n for n in s if n != 1] for s in (given, declared)), key=len)
    position = 0
    for size in small:
        product = 1
        while position < len(large) and product < size:
            product *= large[position]
            position += 1
        if product != size:
            return False
    return position == len(large)


class MappedLinear(MappedLayer):
    """`y = x W^T + b` with W dequantised for this call, or multiplied as it is where x has few rows."""

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # At few tokens this function's own time is what a step waits for. The wrapper's attributes are read past it
        # (`_qdata`), because `weight.device` and the like cost microseconds each on a tensor subclass.
        compat.run_every_op()
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        if self.weight_function or self.bias_function or _bytes(weight).device != input.device:
            return self._patched_or_elsewhere(input, weight, bias)
        return self._product(input, weight, bias)

    def _patched_or_elsewhere(self, input: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        if self.bias_function or _bytes(weight).device != input.device or not (adapters := self._adapters()):
            return self.forward_comfy_cast_weights(input)
        return self._adapted(input, weight, bias, adapters)

    def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
        adapters = self._adapters()
        in_place = adapters or not self.weight_function
        if in_place and not self.bias_function and (held := compat.hold_resident(self)):
            try:
                if _bytes(held[0]).device == input.device:
                    return self._adapted(input, *held, adapters)
            finally:
                compat.let_go_resident(self)
        if adapters:
            self.weight_function = []  # for which the host would dequantise
        try:
            weight, bias, stream = compat.cast_weights(self, _cast_dtype(self, input), input.dtype, input.device)
        finally:
            if adapters:
                self.weight_function = adapters
        result = self._adapted(input, weight, bias, adapters)
        compat.release_weights(self, weight, bias, stream)
        return result

    def _adapters(self) -> list[LowRankAtUse]:
        """The layer's patches if all of them are plain LoRAs, for which there are shorter ways; else none."""
        functions = self.weight_function
        return functions if functions and all(isinstance(f, LowRankAtUse) for f in functions) else []

    def _adapted(
        self, input: torch.Tensor, weight: Any, bias: torch.Tensor | None, adapters: list[LowRankAtUse]
    ) -> torch.Tensor:
        if not adapters:
            return self._product(input, weight, bias)
        rows, device = input.numel() // input.shape[-1], input.device
        beside = [a for a in adapters if a.runs_beside(rows, weight, device)]
        if len(beside) < len(adapters):
            weight = self._folded(input, weight, [a for a in adapters if a not in beside])
        result = self._product(input, weight, bias)
        for adapter in beside:
            result = adapter.factors(device).add_product(input, result)
        return result

    def _folded(self, input: torch.Tensor, weight: Any, adapters: list[LowRankAtUse]) -> torch.Tensor:
        """The dense weight in the input's dtype, with the adapters in it."""
        if not is_gguf(weight):
            plain = weight.to(input.dtype, copy=True)
        elif torch.compiler.is_compiling():
            plain = dense(weight, input.dtype)
        elif input.device.type == "cpu":
            plain = self._in_scratch(input, weight._qdata, weight._params)
        else:
            first, *adapters = adapters
            factors, folded = first.factors(input.device), self._folded_weight
            if folded is None or not folded.is_of(weight, factors, input.dtype):
                folded = self._folded_weight = FoldedWeight(weight, factors, input.dtype)
            plain = folded.dense(weight, factors)
        for adapter in adapters:
            plain = adapter(plain)
        return plain

    def _product(self, input: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        dtype = input.dtype
        if bias is not None and bias.dtype is not dtype:
            bias = bias.to(dtype)
        if torch.compiler.is_compiling():  # the layout's handler answers with operators that can be traced
            plain = weight if is_gguf(weight) else weight.to(dtype)
            return torch.nn.functional.linear(input, plain, bias)
        bound = self._bound
        if bound is not None and bound.weight is weight and bound.dtype is dtype:
            return bound.linear(input, bias)
        if not is_gguf(weight):
            return torch.nn.functional.linear(input, weight.to(dtype), bias)
        data, params = weight._qdata, weight._params
        if data.device.type == "cpu":
            return torch.nn.functional.linear(input, self._in_scratch(input, data, params), bias)
        if bound := self._bind(weight, dtype):
            return bound.linear(input, bias)
        result = dispatch.linear_of_few(input, data, params.ggml_type, params.orig_shape, bias)
        if result is not None:
            return result
        plain = dispatch.dequantize(data, params.ggml_type, params.orig_shape, dtype)
        return torch.nn.functional.linear(input, plain, bias)

    def _bind(self, weight: Any, dtype: torch.dtype) -> BoundWeight | None:
        """Calls bound to the weight, from the second time on that the same tensor comes, which then stays where it is:
        the layer's own, or what the dynamic patcher holds in a page. One that is streamed is new each time."""
        bound = self._bound
        if bound is None or bound.weight is not weight or bound.dtype is not dtype:
            stays, self._last = self._last() is weight, weakref.ref(weight)
            bound = self._bound = BoundWeight(weight, dtype) if stays else None
        return bound

    def _in_scratch(self, input: torch.Tensor, data: torch.Tensor, params: Any) -> torch.Tensor:
        kept_for_backward = torch.is_grad_enabled() and input.requires_grad
        out = None if kept_for_backward else self.scratch.take(params.orig_shape, input.dtype)
        return reference.dequantize(data, params.ggml_type, params.orig_shape, input.dtype, out=out)


def _bytes(weight: Any) -> torch.Tensor:
    """What lies in memory: the blocks of a quantised weight, or the plain weight."""
    return weight._qdata if isinstance(weight, QuantizedTensor) else weight


class MappedConv(MappedLayer):
    """Convolutions of one to three dimensions; `_conv_forward` is where torch's classes meet."""

    def forward_comfy_cast_weights(self, input: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        weight, bias, stream = compat.cast_weights(self, _cast_dtype(self, input), input.dtype, input.device)
        result = self._conv_forward(input, weight, bias, **kwargs)
        compat.release_weights(self, weight, bias, stream)
        return result

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: Any, **kwargs: Any) -> torch.Tensor:
        bias = None if bias is None else bias.to(input.dtype)
        return super()._conv_forward(input, dense(weight, input.dtype), bias, **kwargs)  # type: ignore[misc]


class MappedEmbedding(MappedLayer):
    """Rows of a table: gathered as quantised bytes where the table lies, then dequantised, never the whole table."""

    def forward(self, input: torch.Tensor, *args: Any, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        compat.run_every_op()
        if self.weight_function:
            return super().forward_comfy_cast_weights(input, out_dtype=out_dtype)  # type: ignore[misc]
        weight = self.weight
        rows = input.to(weight.device)
        dtype = out_dtype or self.compute_dtype
        if is_gguf(weight):
            params = weight._params
            result = reference.dequantize_rows(weight._qdata, params.ggml_type, weight.shape[-1], rows, dtype)
        else:
            result = torch.nn.functional.embedding(rows, weight).to(dtype)
        return result.to(input.device)


class DenseLayer(torch.nn.Module):
    """A layer whose weights are small: they become plain, in the declared type, when they are loaded.

    The host's dynamic patcher would take them in the file's type and cast them at every use.
    """

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        own = {prefix + name: parameter for name, parameter in self._parameters.items() if parameter is not None}
        plain = {k: dense(state_dict[k], p.dtype) for k, p in own.items() if k in state_dict}
        super()._load_from_state_dict({**state_dict, **plain}, prefix, *args)


def _cast_dtype(layer: Any, input: torch.Tensor) -> torch.dtype:
    """A quantised weight travels under its own dtype, else the host would copy its bytes to retag them."""
    weight = layer._parameters["weight"]
    return weight._params.orig_dtype if is_gguf(weight) else input.dtype


def make_ops(storage_dtype: torch.dtype, manual_cast_dtype: torch.dtype | None) -> type:
    """The `custom_operations` class for one model.

    Args:
        storage_dtype: what the host chose for plain weights.
        manual_cast_dtype: what it computes in where that differs, else None.
    """
    base = compat.pick_operations(storage_dtype, manual_cast_dtype)
    dtype, scratch = manual_cast_dtype or storage_dtype, Scratch()
    mixins = {
        "Linear": MappedLinear,
        "Conv1d": MappedConv,
        "Conv2d": MappedConv,
        "Conv3d": MappedConv,
        "Embedding": MappedEmbedding,
        **dict.fromkeys(("LayerNorm", "RMSNorm", "GroupNorm", "ConvTranspose1d", "ConvTranspose2d"), DenseLayer),
    }
    layers = {
        name: type(name, (mixin, getattr(base, name)), {"compute_dtype": dtype, "scratch": scratch})
        for name, mixin in mixins.items()
    }
    return type("SluiceOps", (base,), layers)
