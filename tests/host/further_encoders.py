"""Further sizes and classes of text encoders through `compare_encoders.py`, which prints what it does for the others.

Runs inside the host: `python further_encoders.py FOLDER NAME...`.
"""

from __future__ import annotations

from collections.abc import Mapping

from host.tiny_encoder import CLIP_SIZES, ENCODERS, LLAMA, NEWEST, T5_SIZES, TinyEncoder, decoder

SMALL_CLIP = {**CLIP_SIZES, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "projection_dim": 64}
# The host knows these by 24 layers, and by their width where they have a gate.
LARGE_T5 = {**T5_SIZES, "d_model": 32, "d_kv": 16, "num_heads": 2, "num_layers": 24}


def of_clip(clip_type: str, file: str, layers: int) -> TinyEncoder:
    json = {file: {**SMALL_CLIP, "num_hidden_layers": layers}}
    return TinyEncoder("clip_model:CLIPTextModel", clip_type, "", {}, json, hosts=NEWEST)


def of_t5(clip_type: str, file: str, width: int, tokenizer: str = "") -> TinyEncoder:
    json = {file: {**LARGE_T5, "d_ff": width}}
    return TinyEncoder("text_encoders.t5:T5", clip_type, "t5", {}, json, tokenizer=tokenizer, hosts=NEWEST)


FURTHER: Mapping[str, TinyEncoder] = {
    "clip_g": of_clip("sd3", "clip_config_bigg.json", 32),
    "clip_h": of_clip("stable_diffusion", "sd2_clip_config.json", 24),
    "t5_xxl_ungated": of_t5("cosmos", "t5_old_config_xxl.json", 2048),
    "umt5_xxl": of_t5("wan", "umt5_config_xxl.json", 10240, "unigram"),
    "qwen3_06b": TinyEncoder(
        f"{LLAMA}:Qwen3_06B", "lumina2", "qwen3", {f"{LLAMA}:Qwen3_06BConfig": decoder(1024)}, hosts=NEWEST
    ),
    "ovis": TinyEncoder(
        f"{LLAMA}:Ovis25_2B", "ovis", "qwen3", {f"{LLAMA}:Ovis25_2BConfig": decoder(2048)}, hosts=NEWEST
    ),
}

if __name__ == "__main__":
    ENCODERS |= FURTHER
    import host.compare_encoders  # noqa: F401  (compares what the command line names)
