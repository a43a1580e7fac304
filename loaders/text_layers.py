"""What text encoders need of layers beyond those of diffusion models: large vocabularies and experts.

`text_ops` makes the layer classes for one text encoder. Activations of every text encoder of the host are float32,
so that is what weights are dequantised to, whatever the file says of norms and biases.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from comfy.ops import CastWeightBiasOp

from . import compat
from .ops import MappedEmbedding, MappedLayer, make_ops
from .quant.layout import QuantizedTensor, dense, is_gguf, quantized

VOCABULARY = 1024  # rows from which on a table is one of words
_TOLERANCE = 0.01


class Vocabulary(MappedEmbedding):
    """A table of words that may have a few rows fewer or more than the host declares.

    Checkpoints round the number of rows up, and llama.cpp leaves the empty ones out (Gemma 3 has 262208 in the host,
    262144 words). A number past the table is a token that the model never saw; its row is zero.
    """

    num_embeddings: int

    @property
    def comfy_cast_weights(self) -> bool:
        """Whether the host must cast the table before it multiplies by it, as it does for the logits of a language
        model without a matrix of its own for them. It would dequantise all of it for each token, in 16 bits on a GPU.
        A table that lies on the device and is not patched can be multiplied by as it is (`quant.layout`)."""
        weight = self._parameters.get("weight")
        forced = "prev_comfy_cast_weights" in self.__dict__  # the host had it cast in any case
        at_home = weight is None or _stored(weight).device.type in ("cpu", "meta")
        return forced or at_home or bool(self.weight_function)

    @comfy_cast_weights.setter
    def comfy_cast_weights(self, value: bool) -> None: ...

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        given, declared = state_dict.get(f"{prefix}weight"), self._parameters["weight"]
        if given is not None and declared is not None and _nearly(given.shape, declared.shape):
            self._parameters["weight"] = torch.nn.Parameter(declared.new_empty(given.shape), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, input: torch.Tensor, *args: Any, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        rows = self.weight.shape[0]
        if rows >= self.num_embeddings:
            return super().forward(input, *args, out_dtype=out_dtype)
        found = super().forward(input.clamp(max=rows - 1), *args, out_dtype=out_dtype)
        return found.masked_fill((input >= rows).unsqueeze(-1), 0)


def _stored(weight: torch.Tensor) -> torch.Tensor:
    """What lies in memory."""
    return weight._qdata if isinstance(weight, QuantizedTensor) else weight


def _nearly(given: torch.Size, declared: torch.Size) -> bool:
    if len(given) != 2 or given == declared or given[1] != declared[1] or declared[0] < VOCABULARY:
        return False
    return abs(given[0] - declared[0]) <= _TOLERANCE * declared[0]


class MappedExperts(MappedLayer):
    """The matrices of all experts [experts, out, in]; the few that a text needs are dequantised one at a time.

    llama.cpp stores gate and up apart, the host wants one product with the columns of both in turn. Where the state
    dict has `gate.` and `up.`, the layer becomes these two and puts the products together, instead of copying most of
    the model's weights into another order.
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int, bias: bool = True, **kwargs: Any) -> None:
        super().__init__((num_experts, out_features, in_features), bias, **kwargs)
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.gate: MappedExperts | None = None
        self.up: MappedExperts | None = None
        self._resident: tuple[Any, torch.Tensor | None] | None = None

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        if f"{prefix}gate.weight" in state_dict:
            sizes = (self.num_experts, self.in_features, self.out_features // 2, self.bias is not None)
            self.gate, self.up = (type(self)(*sizes) for _ in range(2))  # torch loads children after their parent
            self._parameters.update(weight=None, bias=None)
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    @contextlib.contextmanager
    def bank_resident(self, input: torch.Tensor) -> Iterator[MappedExperts]:
        """Within it, all experts lie on the device of `input`."""
        if self.gate is not None and self.up is not None:
            with self.gate.bank_resident(input), self.up.bank_resident(input):
                yield self
            return
        dtype = self.weight._params.orig_dtype if is_gguf(self.weight) else input.dtype
        weight, bias, stream = compat.cast_weights(self, dtype, input.dtype, input.device)
        self._resident = (weight, bias)
        try:
            yield self
        finally:
            self._resident = None
            compat.release_weights(self, weight, bias, stream)

    def expert_linear(self, input: torch.Tensor, i: int) -> torch.Tensor:
        """`input` (tokens, in) through expert `i` -> (tokens, out)."""
        if self.gate is not None and self.up is not None:
            halves = [half.expert_linear(input, i) for half in (self.gate, self.up)]
            return torch.stack(halves, dim=-1).flatten(-2)
        if self._resident is None:
            with self.bank_resident(input):
                return self.expert_linear(input, i)
        weight, bias = self._resident
        matrix = dense(_expert(weight, i), input.dtype)
        return torch.nn.functional.linear(input, matrix, None if bias is None else bias[i].to(input.dtype))


def _expert(weight: torch.Tensor, i: int) -> torch.Tensor:
    """Expert `i` as a view."""
    if not is_gguf(weight):
        return weight[i]
    params = weight._params
    return quantized(weight._qdata.view(weight.shape[0], -1)[i], params.ggml_type, params.orig_shape[1:])


class _Bank(torch.nn.Module, CastWeightBiasOp):
    """The host's kind of layer with a weight and a bias for each expert."""

    comfy_cast_weights = True

    def __init__(self, shape: tuple[int, int, int], bias: bool, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)
        rows = torch.nn.Parameter(torch.empty(shape[:2], device=device, dtype=dtype), requires_grad=False)
        self.register_parameter("bias", rows if bias else None)


def text_ops() -> type:
    """The `custom_operations` class for one text encoder."""
    # The host's classes that cast at each use: its plain ones would multiply float32 by the float16 of a safetensors.
    ops: Any = make_ops(torch.float16, torch.float32)
    shared = {"compute_dtype": torch.float32, "scratch": ops.Linear.scratch}
    ops.Embedding = type("Embedding", (Vocabulary, *ops.Embedding.__bases__[1:]), shared)
    ops.MoEExperts = type("MoEExperts", (MappedExperts, _Bank), shared)
    return ops
