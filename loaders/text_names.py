"""What llama.cpp calls a text encoder's tensors, and what the host calls them. Tables only; no tensor is touched.

llama.cpp's converter gives the tensors of every language model one set of names (`blk.0.attn_q.weight`), changes a
few values on the way, and says in `general.architecture` which model it was. The host detects a text encoder by the
names that transformers gives it. A `Dialect` is the way back for one group of architectures: names here, changed
values in `text_tensors.py`. Source of the names: gguf-py's constants.py; of the changes: llama.cpp's converter.

A file whose tensors have the host's names already (converted by others from a safetensors) needs no dialect.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

_LAYER = re.compile(r"(?P<stack>enc\.)?blk\.(?P<index>\d+)\.(?P<part>\w+)(?:\.(?P<kind>weight|bias))?")
_WHOLE = re.compile(r"(?P<part>[\w.]+)\.(?P<kind>weight|bias)")

# Tensors that only llama.cpp needs: rotary frequencies that it computed in advance, the decoder of a whole T5, and
# layers that predict further tokens.
_UNUSED = re.compile(r"rope_freqs\.|dec\.|blk\.\d+\.(attn_rot_embd|nextn)\b")

# How llama.cpp's names begin, told apart from the host's.
_MARKS = ("token_embd.", "blk.", "enc.blk.")

# Where other tools put a text encoder's tensors that they took out of a checkpoint.
_PREFIX = re.compile(r"(?:cond_stage_model|text_encoders\.\w+|conditioner\.embedders\.\d+)\.(?:transformer|model)\.")


@dataclass(frozen=True)
class Dialect:
    """Names of one group of architectures.

    Args:
        layers: what a layer's tensors begin with; `{}` is the layer's number.
        layer: llama.cpp's name of a part of a layer -> the host's.
        whole: the same for what is no part of a layer.
        bare: parts that the host has as parameters of their own, without `.weight`.
        norm_shift: what the converter added to every norm's weight, because transformers adds it when it runs.
        unshifted: the end of the name of the norms of which that is not so.
        interleaved_heads: the rows of q and k are in the order of GPT-J's rotary embedding, pairs side by side.
        linear_attention: what a layer of linear attention has is changed, too (`linear_attention.py`).
    """

    layers: str
    layer: Mapping[str, str]
    whole: Mapping[str, str]
    bare: Mapping[str, str] = field(default_factory=dict)
    norm_shift: float = 0.0
    unshifted: tuple[str, ...] = ()
    interleaved_heads: bool = False
    linear_attention: bool = False

    def translate(self, name: str) -> str | None:
        """The host's name for llama.cpp's `name`; "" for a tensor that the host does not need, None if unknown."""
        if _UNUSED.match(name):
            return ""
        match = _LAYER.fullmatch(name)
        if match is None:
            match, prefix, table = _WHOLE.fullmatch(name), "", self.whole
            if match is None:
                return None
        else:
            prefix, table = self.layers.format(match["index"]), self.layer
        if (part := self.bare.get(match["part"])) is not None:
            return prefix + part
        part = table.get(match["part"])
        return None if part is None or match["kind"] is None else f"{prefix}{part}.{match['kind']}"


_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_DECODER = _ATTENTION | _MLP | {"ffn_norm": "post_attention_layernorm"}
_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_GEMMA = (
    _ATTENTION
    | _MLP
    | {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
)
_GEMMA4 = _GEMMA | {
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}
_GEMMA4_MODEL = _MODEL | {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}

_QWEN35 = (
    _ATTENTION
    | _MLP
    | {
        "post_attention_norm": "post_attention_layernorm",
        "attn_qkv": "linear_attn.in_proj_qkv",
        "attn_gate": "linear_attn.in_proj_z",
        "ssm_alpha": "linear_attn.in_proj_a",
        "ssm_beta": "linear_attn.in_proj_b",
        "ssm_conv1d": "linear_attn.conv1d",
        "ssm_norm": "linear_attn.norm",
        "ssm_out": "linear_attn.out_proj",
    }
)
_QWEN35_MODEL = {
    "token_embd": "model.language_model.embed_tokens",
    "output_norm": "model.language_model.norm",
    "output": "lm_head",
}

# The host's experts are one matrix with the rows of gate and up in turn, llama.cpp's are two: `text_layers.py`.
_GPT_OSS = _ATTENTION | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_exps": "mlp.experts.gate_up_proj.gate",
    "ffn_up_exps": "mlp.experts.gate_up_proj.up",
    "ffn_down_exps": "mlp.experts.down_proj",
}

_T5 = {
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
_T5_GATED = {"ffn_gate": "layer.1.DenseReluDense.wi_0", "ffn_up": "layer.1.DenseReluDense.wi_1"}
_T5_MODEL = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm", "output": "lm_head"}

_LLAMA = Dialect("model.layers.{}.", _DECODER, _MODEL, interleaved_heads=True)
_QWEN = Dialect("model.layers.{}.", _DECODER, _MODEL)
_GEMMA_2_3 = Dialect("model.layers.{}.", _GEMMA, _MODEL, norm_shift=1.0)
_T5_ENCODER = Dialect("encoder.block.{}.", _T5 | _T5_GATED, _T5_MODEL)
_T5_UNGATED = Dialect("encoder.block.{}.", _T5 | {"ffn_up": "layer.1.DenseReluDense.wi"}, _T5_MODEL)

DIALECTS: dict[str, Dialect] = {
    "t5": _T5_ENCODER,
    "t5encoder": _T5_ENCODER,
    "llama": _LLAMA,
    "mistral3": _LLAMA,
    "qwen2": _QWEN,
    "qwen2vl": _QWEN,
    "qwen3": _QWEN,
    "qwen3vl": _QWEN,
    "qwen35": Dialect(
        "model.language_model.layers.{}.",
        _QWEN35,
        _QWEN35_MODEL,
        bare={"ssm_a": "linear_attn.A_log", "ssm_dt": "linear_attn.dt_bias"},
        norm_shift=1.0,
        unshifted=("linear_attn.norm.weight",),
        linear_attention=True,
    ),
    "gemma": _GEMMA_2_3,
    "gemma2": _GEMMA_2_3,
    "gemma3": _GEMMA_2_3,
    "gemma4": Dialect("model.layers.{}.", _GEMMA4, _GEMMA4_MODEL, bare={"layer_output_scale": "layer_scalar"}),
    "gpt-oss": Dialect(
        "layers.{}.",
        _GPT_OSS,
        {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"},
        bare={"attn_sinks": "self_attn.sinks"},
    ),
}


def is_llama_cpp(names: Collection[str]) -> bool:
    """Whether these are llama.cpp's names of a language model."""
    return any(name.startswith(_MARKS) for name in names)


def dialect_of(architecture: str, names: Collection[str]) -> Dialect | None:
    """The dialect of a file with llama.cpp's `names`, or None where the host has no such text encoder."""
    dialect = DIALECTS.get(architecture)
    if any(name.startswith("enc.blk.") for name in names):  # whatever the file calls itself
        return _T5_ENCODER if "enc.blk.0.ffn_gate.weight" in names else _T5_UNGATED
    return dialect


def without_prefix(name: str) -> str:
    """The host's name of a tensor that was taken out of a checkpoint under that checkpoint's."""
    return _PREFIX.sub("", name, count=1)
