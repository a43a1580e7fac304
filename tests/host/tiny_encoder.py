"""What a tiny random text encoder of a family is: the facts from which `encoder_files.py` makes its files.

Keys and shapes are those of the host's own class, built on the meta device. The host writes most sizes down (a Qwen3
4B is 2560 wide), and the real ones would need gigabytes: `sizes` replaces them, for both loaders alike, and leaves
what the host recognises the family by. Which keys belong to which family stays the host's decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

NEWEST = ("0.30.0",)
SINCE_24 = ("0.24.0", *NEWEST)
EVERY = ("0.18.2", *SINCE_24)

VOCABULARY = 600  # words of a tiny encoder, unless the host fixes the number
ROUNDED_UP = 1100  # rows of a table, of which llama.cpp leaves the last out (see `encoder_files.FEWER_ROWS`)
TEXT = "a red seven on white"


@dataclass(frozen=True)
class TinyEncoder:
    """One family: which class of the host it is, how small, and what llama.cpp calls it.

    Args:
        model: the class that holds the weights, as `module:class` in comfy.
        clip_type: the type of the node under which it is loaded.
        arch: llama.cpp's architecture, or "" for a file with the host's names.
        sizes: `module:class` in comfy -> attributes of that class, or arguments of its constructor, replaced.
        json: the same for the files from which the host reads a model's configuration, by file name.
        beside: the other files of the type, which are safetensors.
        beside_as: "" for float32, "plain" and "scaled" for the two ways of 8-bit floats.
        tokenizer: the form in which the host wants the tokenizer beside the weights, or "".
        vision: prefixes of keys that llama.cpp puts into a file of their own.
        unwritten: prefixes of keys that are in none of our files.
        unread: llama.cpp's names of further tensors in its files, for which the host has no use.
        projector: what that file says it is.
        rows: of the table of words.
        image: whether the prompt has a picture in it.
        hosts: the versions that know the family.
    """

    model: str
    clip_type: str
    arch: str
    sizes: Mapping[str, Mapping[str, object]]
    json: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    beside_as: str = ""
    tokenizer: str = ""
    vision: tuple[str, ...] = ()
    unwritten: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    projector: str = ""
    image: bool = False
    rows: int = VOCABULARY
    hosts: tuple[str, ...] = EVERY
    metadata: Mapping[str, object] = field(default_factory=dict)


def decoder(hidden: int = 256, **sizes: object) -> dict[str, object]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **sizes,
    }


LLAMA = "text_encoders.llama"
T5_SIZES = {"d_ff": 512, "d_kv": 64, "d_model": 256, "num_heads": 4, "num_layers": 2, "vocab_size": VOCABULARY}
CLIP_SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 3}
SIGLIP = {
    **{"num_channels": 3, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 64, "image_size": 56},
    **{"intermediate_size": 128, "model_type": "siglip_vision_model", "num_attention_heads": 2},
    **{"num_hidden_layers": 2, "patch_size": 14},
}
QWEN25_VISION = {"hidden_size": 256, "intermediate_size": 256, "num_heads": 4, "num_layers": 1}
QWEN3_VISION = {"hidden_size": 64, "intermediate_size": 128, "depth": 3, "deepstack_visual_indexes": [0, 2]}
QWEN35_VISION = {"hidden_size": 64, "intermediate_size": 128, "depth": 2, "num_heads": 4}
GEMMA4_VISION = {
    **{"hidden_size": 64, "image_size": 56, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2},
    **{"patch_size": 16, "head_dim": 32, "rms_norm_eps": 1e-6, "position_embedding_size": 32},
    "pooling_kernel_size": 3,
}
HEADS = {"attention.head_count": 4, "attention.head_count_kv": 2}

ENCODERS: dict[str, TinyEncoder] = {
    "clip_l": TinyEncoder("clip_model:CLIPTextModel", "stable_diffusion", "", {}, {"sd1_clip_config.json": CLIP_SIZES}),
    "t5_base": TinyEncoder(
        "text_encoders.t5:T5",
        "stable_audio",
        "t5encoder",
        {},
        {"t5_config_base.json": T5_SIZES},
    ),
    "umt5_base": TinyEncoder(
        "text_encoders.t5:T5",
        "ace",
        "t5",
        {},
        {"umt5_config_base.json": T5_SIZES},
        tokenizer="unigram",
    ),
    "t5_xxl": TinyEncoder(
        "text_encoders.t5:T5",
        "sd3",
        "t5",
        {},
        # The host knows it by 24 layers of this width.
        {
            "t5_config_xxl.json": {
                **T5_SIZES,
                "d_model": 32,
                "d_kv": 16,
                "num_heads": 2,
                "d_ff": 10240,
                "num_layers": 24,
            }
        },
        hosts=NEWEST,
    ),
    "llama3": TinyEncoder(
        f"{LLAMA}:Llama2",
        "hunyuan_video",
        "llama",
        {f"{LLAMA}:Llama2Config": decoder(head_dim=64)},
        {"sd1_clip_config.json": CLIP_SIZES},
        beside=("clip_l",),
        metadata=HEADS,
    ),
    "ministral": TinyEncoder(
        f"{LLAMA}:Ministral3_3B",
        "flux2",
        "mistral3",
        {f"{LLAMA}:Ministral3_3BConfig": decoder(3072, head_dim=32, intermediate_size=256)},
        tokenizer="tekken",
        metadata=HEADS,
        hosts=SINCE_24,
    ),
    "qwen25_3b": TinyEncoder(f"{LLAMA}:Qwen25_3B", "omnigen2", "qwen2", {f"{LLAMA}:Qwen25_3BConfig": decoder()}),
    "qwen25_7b": TinyEncoder(
        f"{LLAMA}:Qwen25_7BVLI",
        "qwen_image",
        "qwen2vl",
        {
            f"{LLAMA}:Qwen25_7BVLI_Config": decoder(num_key_value_heads=4),
            "text_encoders.qwen_vl:Qwen2VLVisionTransformer": QWEN25_VISION,
        },
        vision=("visual.",),
        projector="qwen2.5vl_merger",
        image=True,
    ),
    "qwen25_7b_blind": TinyEncoder(
        f"{LLAMA}:Qwen25_7BVLI",
        "qwen_image",
        "qwen2vl",
        {
            f"{LLAMA}:Qwen25_7BVLI_Config": decoder(num_key_value_heads=4),
            "text_encoders.qwen_vl:Qwen2VLVisionTransformer": QWEN25_VISION,
        },
        vision=("visual.",),
        hosts=NEWEST,
    ),
    "qwen3_4b": TinyEncoder(f"{LLAMA}:Qwen3_4B", "lumina2", "qwen3", {f"{LLAMA}:Qwen3_4BConfig": decoder(2560)}),
    "qwen3_8b": TinyEncoder(
        f"{LLAMA}:Qwen3_8B",
        "flux2",
        "qwen3",
        # Three of the layers' results are used.
        {f"{LLAMA}:Qwen3_8BConfig": decoder(4096, head_dim=16, num_hidden_layers=28, intermediate_size=32)},
    ),
    "qwen3vl_8b": TinyEncoder(
        "text_encoders.qwen3vl:Qwen3VL",
        "omnigen2",
        "qwen3vl",
        {
            f"{LLAMA}:Qwen3VL_8BConfig": decoder(),
            "text_encoders.qwen3vl:QWEN3VL_VISION": {"qwen3vl_8b": QWEN3_VISION},
            "text_encoders.qwen3vl:QWEN3VL_VISION_COMMON": {"num_heads": 2},
        },
        vision=("visual.",),
        projector="qwen3vl_merger",
        image=True,
        hosts=NEWEST,
    ),
    "gemma2": TinyEncoder(
        f"{LLAMA}:Gemma2_2B",
        "lumina2",
        "gemma2",
        {f"{LLAMA}:Gemma2_2B_Config": decoder(head_dim=64)},
        tokenizer="bpe",
    ),
    "gemma3_4b": TinyEncoder(
        f"{LLAMA}:Gemma3_4B",
        "lumina2",
        "gemma3",
        {f"{LLAMA}:Gemma3_4B_Config": decoder(head_dim=64)},
        tokenizer="bpe",
    ),
    "gemma3_12b": TinyEncoder(
        f"{LLAMA}:Gemma3_12B",
        "lumina2",
        "gemma3",
        # The host knows it by its number of layers.
        {
            f"{LLAMA}:Gemma3_12B_Config": decoder(
                **{"hidden": 64, "head_dim": 32, "num_hidden_layers": 48, "intermediate_size": 128},
                **{"vocab_size": ROUNDED_UP, "vision_config": SIGLIP, "mm_tokens_per_image": 4},  # type: ignore[arg-type]
            )
        },
        rows=ROUNDED_UP,
        tokenizer="bpe",
        vision=("vision_model.", "multi_modal_projector."),
        projector="gemma3",
        image=True,
    ),
    # Two value heads for each key head, as from the 4B on; a head is four blocks of 32 and half a block of 256.
    "qwen35": TinyEncoder(
        "text_encoders.qwen35:Qwen35",
        "lumina2",
        "qwen35",
        {
            "text_encoders.qwen35:QWEN35_MODELS": {
                "qwen35_2b": decoder(
                    **{"head_dim": 64, "mrope_section": [4, 2, 2], "linear_num_key_heads": 2},  # type: ignore[arg-type]
                    **{"linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 128},
                )
            },
            "text_encoders.qwen35:QWEN35_VISION_DEFAULTS": QWEN35_VISION,
        },
        vision=("visual.",),
        projector="qwen3vl_merger",
        image=True,
        metadata={
            **{"ssm.group_count": 2, "ssm.time_step_rank": 4, "ssm.state_size": 64, "ssm.inner_size": 512},
            **{"block_count": 5, "nextn_predict_layers": 1},
        },
        unread=("blk.4.attn_norm.weight", "blk.4.attn_q.weight", "blk.4.nextn.eh_proj.weight"),
        hosts=NEWEST,
    ),
    "gemma4_e2b": TinyEncoder(
        "text_encoders.gemma4:Gemma4_E2B",
        "lumina2",
        "gemma4",
        {
            "text_encoders.gemma4:Gemma4_E2B_Config": decoder(
                **{"hidden": 64, "head_dim": 32, "global_head_dim": 64, "num_hidden_layers": 35},
                **{"num_key_value_heads": 1, "intermediate_size": 128, "hidden_size_per_layer_input": 32},
                vision_config=GEMMA4_VISION,  # type: ignore[arg-type]
            ),
        },
        tokenizer="spaces",
        vision=("vision_model.", "multi_modal_projector."),
        unwritten=("audio_model.", "audio_projector."),
        unread=("a.blk.0.attn_q.weight", "a.blk.0.attn_q.input_max", "mm.a.input_projection.weight", "v.std_bias"),
        projector="gemma4v",
        hosts=SINCE_24,
    ),
    "gpt_oss": TinyEncoder(
        "text_encoders.gpt_oss:GptOssModel",
        "lens",
        "gpt-oss",
        {
            "text_encoders.gpt_oss:GptOss20BConfig": decoder(
                **{"hidden": 64, "head_dim": 64, "num_hidden_layers": 24, "intermediate_size": 64},
                **{"num_local_experts": 4, "num_experts_per_tok": 2},
            ),
        },
        tokenizer="bytes",
        hosts=SINCE_24,
    ),
}
ENCODERS |= {
    f"llama3_beside_{kind}_fp8": replace(ENCODERS["llama3"], beside_as=kind, hosts=NEWEST)
    for kind in ("plain", "scaled")
}
