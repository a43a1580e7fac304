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
from .quant import dispatch, reference
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
        self._cast_bias: tuple[torch.Tensor, torch.Tensor] | None = None
        self._bound: tuple[Any, torch.dtype, dispatch.Weight] | None = None
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
        self._cast_bias = self._bound = None
        self.scratch.clear()
        for name, parameter in ours.items():
            parameters[name] = parameter if parameter.is_meta else self._moved(name, parameter, fn)
        return self

    def _moved(self, name: str, parameter: torch.nn.Parameter, fn: Any) -> torch.nn.Parameter:
        home = self._home.get(name)
        at_home = home is not None and _same_memory(home, parameter)
        if home is not None and (at_home or parameter is self._away.get(name)):
            probe = fn(torch.empty(0, dtype=parameter.dtype, device=parameter.device))
            if probe.device == home.device and probe.dtype == home.dtype:
                self._away.pop(name, None)
                return home
        moved = torch.nn.Parameter(fn(parameter), requires_grad=False)
        if at_home:
            self._away[name] = moved
        return moved

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
            return self.forward_comfy_cast_weights(input)
        return self._product(input, weight, bias)

    def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias, stream = compat.cast_weights(self, _cast_dtype(self, input), input.dtype, input.device)
        result = self._product(input, weight, bias)
        compat.release_weights(self, weight, bias, stream)
        return result

    def _product(self, input: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        dtype = input.dtype
        if bias is not None and bias.dtype != dtype:
            bias = self._bias_as(bias, dtype)
        if not is_gguf(weight):
            return torch.nn.functional.linear(input, weight if weight.dtype == dtype else weight.to(dtype), bias)
        if torch.compiler.is_compiling():  # the layout's handler answers with operators that can be traced
            return torch.nn.functional.linear(input, weight, bias)
        data, params = weight._qdata, weight._params
        if data.device.type == "cpu":
            plain = self._in_scratch(input, data, params)
        else:
            result = dispatch.linear_of_few(input, data, params.ggml_type, params.orig_shape, bias)
            if result is not None:
                return result
            plain = self._dense(weight, dtype)
        return torch.nn.functional.linear(input, plain, bias)

    def _dense(self, weight: Any, dtype: torch.dtype) -> torch.Tensor:
        """The dense weight; by a bound call from the third time on that the same tensor comes, which then stays where
        it is: the layer's own, or what the dynamic patcher holds in a page. One that is streamed is new each time."""
        bound = self._bound
        if bound is not None and bound[0] is weight and bound[1] == dtype:
            return bound[2]()
        data, params = weight._qdata, weight._params
        if self._last() is weight:
            self._bound = (weight, dtype, dispatch.bind(data, params.ggml_type, params.orig_shape, dtype))
        else:
            self._bound, self._last = None, weakref.ref(weight)
        return dispatch.dequantize(data, params.ggml_type, params.orig_shape, dtype)

    def _in_scratch(self, input: torch.Tensor, data: torch.Tensor, params: Any) -> torch.Tensor:
        kept_for_backward = torch.is_grad_enabled() and input.requires_grad
        out = None if kept_for_backward else self.scratch.take(params.orig_shape, input.dtype)
        return reference.dequantize(data, params.ggml_type, params.orig_shape, input.dtype, out=out)

    def _bias_as(self, bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The bias in the input's dtype, kept until the layer moves: a cast costs a launch at every call. The file's
        own stays, because some layers see inputs of another dtype than the model's."""
        if torch.compiler.is_compiling():
            return bias.to(dtype)
        if self._cast_bias is None or self._cast_bias[0] is not bias or self._cast_bias[1].dtype != dtype:
            self._cast_bias = (bias, bias.to(dtype))
        return self._cast_bias[1]


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
    """A layer whose weights are small: what is quantised in the file becomes plain when it is loaded."""

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        own = {k: v for k, v in state_dict.items() if k.startswith(prefix) and is_gguf(v)}
        plain = {**state_dict, **{k: dense(v, torch.float32) for k, v in own.items()}} if own else state_dict
        super()._load_from_state_dict(plain, prefix, *args)


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
