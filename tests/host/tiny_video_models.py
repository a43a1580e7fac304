"""The tiny models that make videos, and the image models of the same families (Anima, HunyuanImage)."""

from __future__ import annotations

from math import prod

from host.tiny_model import AXES, FRAME, NEWEST, SINCE_24, TEXT, TOKENS, VIDEO, WIDTH, Shape, TinyModel

UMT5 = (1, 7, 4096)
BYT5 = {"byt5_in.fc1.weight": (2048, 1472)}


def wan(in_channels: int = 16, out_channels: int = 16) -> dict[str, Shape]:
    return {
        "head.modulation": (1, 2, WIDTH),
        "head.head.weight": (4 * out_channels, WIDTH),
        "blocks.0.ffn.0.weight": (512, WIDTH),
        "blocks.1.ffn.0.weight": (512, WIDTH),
        "patch_embedding.weight": (WIDTH, in_channels, 1, 2, 2),
    }


def hunyuan(patch: Shape, in_channels: int, out_channels: int) -> dict[str, Shape]:
    return {
        "txt_in.individual_token_refiner.blocks.0.norm1.weight": (WIDTH,),
        "txt_in.input_embedder.weight": (WIDTH, TEXT),
        "img_in.proj.weight": (WIDTH, in_channels, *patch),
        "final_layer.linear.weight": (out_channels * prod(patch), WIDTH),
        "double_blocks.0.img_attn.qkv.weight": (3 * WIDTH, WIDTH),
        "single_blocks.0.linear1.weight": (7 * WIDTH, WIDTH),
    }


PREDICT2 = {"blocks.0.mlp.layer1.weight": (4 * WIDTH, WIDTH), "x_embedder.proj.1.weight": (WIDTH, 68)}

VIDEO_MODELS: dict[str, TinyModel] = {
    "wan21_t2v": TinyModel("WAN21_T2V", "wan", VIDEO, UMT5, wan()),
    "wan21_metadata_config": TinyModel(
        "WAN21_T2V",
        "wan",
        VIDEO,
        TOKENS,
        wan(),
        metadata={"config": '{"transformer": {"text_dim": 512}}'},
        layout="rearranged",
    ),
    "wan21_i2v": TinyModel("WAN21_I2V", "wan", VIDEO, UMT5, wan(36) | {"img_emb.proj.0.bias": (1280,)}),
    "wan21_vace": TinyModel(
        "WAN21_Vace",
        "wan",
        VIDEO,
        UMT5,
        wan()
        | {
            "vace_patch_embedding.weight": (WIDTH, 96, 1, 2, 2),
            "vace_blocks.0.before_proj.weight": (WIDTH, WIDTH),
        },
    ),
    "wan22_t2v_high_noise": TinyModel("WAN21_T2V", "wan", VIDEO, UMT5, wan(), seed=1),
    "wan22_t2v_low_noise": TinyModel("WAN21_T2V", "wan", VIDEO, UMT5, wan(), seed=2),
    "wan22_i2v": TinyModel("WAN21_T2V", "wan", VIDEO, UMT5, wan(36)),
    "wan22_5b": TinyModel("WAN22_T2V", "wan", (1, 48, 3, 8, 8), UMT5, wan(48, 48), layout="folded"),
    # Its motion encoder is made of the host's own modules. It runs only where the conditioning has faces, which must
    # have 512 pixels and so take a minute; odd_files.py compares its weights instead.
    "wan22_animate": TinyModel(
        "WAN22_Animate",
        "wan",
        VIDEO,
        UMT5,
        wan(36)
        | {f"blocks.{i}.ffn.0.weight": (512, WIDTH) for i in range(5)}
        | {"face_adapter.fuser_blocks.0.k_norm.weight": (128,)},
        layout="rearranged",
        probe="blocks.0.ffn.",
        hosts=NEWEST,
        plain_parts=True,
    ),
    "hunyuan_video": TinyModel(
        "HunyuanVideo",
        "hyvid",
        VIDEO,
        TOKENS,
        hunyuan((1, 2, 2), 16, 16)
        | {"vector_in.in_layer.weight": (WIDTH, 768), "guidance_in.in_layer.weight": (WIDTH, WIDTH)},
        conditioning={"pooled_output": (1, 768), "guidance": 6.0},
        layout="rearranged",
    ),
    "hunyuan_video15": TinyModel(
        "HunyuanVideo15",
        "hyvid",
        (1, 32, 2, 8, 8),
        TOKENS,
        hunyuan((1, 1, 1), 65, 32)
        | BYT5
        | {"vision_in.proj.0.weight": (1152,), "cond_type_embedding.weight": (3, WIDTH)},
        conditioning={"pooled_output": (1, 768), "conditioning_byt5small": (1, 5, 1472)},
    ),
    "hunyuan_image21": TinyModel(
        "HunyuanImage21",
        "hyvid",
        (1, 64, 8, 8),
        TOKENS,
        hunyuan((1, 1), 64, 64) | BYT5,
        conditioning={"conditioning_byt5small": (1, 5, 1472)},
    ),
    "ltxv": TinyModel(
        "LTXV",
        "ltxv",
        (1, 128, 2, 4, 4),
        TOKENS,
        {
            "adaln_single.emb.timestep_embedder.linear_1.bias": (WIDTH,),
            "transformer_blocks.0.attn2.to_k.weight": (WIDTH, WIDTH),
        },
        metadata={
            "config": '{"transformer": {"num_attention_heads": 2, "attention_head_dim": 128, "caption_channels": 512}}'
        },
        conditioning={"attention_mask": [[1] * 7]},
    ),
    "cosmos1": TinyModel(
        "CosmosT2V",
        "cosmos",
        VIDEO,
        (1, 7, 1024),
        {
            "blocks.block0.blocks.0.block.attn.to_q.0.weight": (WIDTH, WIDTH),
            "x_embedder.proj.1.weight": (WIDTH, 68),
        },
        sizes={"num_blocks": 1, "num_heads": 2},
    ),
    "cosmos_predict2": TinyModel(
        "CosmosT2IPredict2", "cosmos", FRAME, (1, 7, 1024), PREDICT2, sizes={"num_blocks": 1, "num_heads": 2}
    ),
    "anima": TinyModel(
        "Anima",
        "cosmos",
        FRAME,
        (1, 7, WIDTH),
        PREDICT2 | {"llm_adapter.blocks.0.cross_attn.q_proj.weight": (WIDTH, WIDTH)},
        sizes={"num_blocks": 1, "num_heads": 2, "crossattn_emb_channels": WIDTH},
        defaults={
            "comfy.ldm.anima.model.LLMAdapter": {
                "source_dim": WIDTH,
                "target_dim": WIDTH,
                "model_dim": WIDTH,
                "num_layers": 1,
                "num_heads": 2,
            }
        },
        conditioning={"t5xxl_ids": [5, 17, 900, 32000, 1], "t5xxl_weights": (5,)},
    ),
    "kandinsky5": TinyModel(
        "Kandinsky5",
        "kandinsky5",
        VIDEO,
        (1, 7, 3584),
        {
            "visual_transformer_blocks.0.cross_attention.key_norm.weight": (128,),
            "visual_transformer_blocks.0.feed_forward.in_layer.weight": (512, WIDTH),
            "text_transformer_blocks.0.feed_forward.in_layer.weight": (512, WIDTH),
            "visual_embeddings.in_layer.bias": (WIDTH,),
            "visual_embeddings.in_layer.weight": (WIDTH, 132),
            "time_embeddings.in_layer.bias": (WIDTH,),
        },
        sizes={"axes_dims": AXES},
        conditioning={"pooled_output": (1, 768)},
    ),
    "joyimage": TinyModel(
        "JoyImage",
        "joyimage",
        VIDEO,
        UMT5,
        {
            "double_blocks.0.attn.img_attn_qkv.weight": (3 * WIDTH, WIDTH),
            "double_blocks.0.attn.img_attn_q_norm.weight": (128,),
            "condition_embedder.time_embedder.linear_1.weight": (WIDTH, WIDTH),
            "img_in.weight": (WIDTH, 16, 1, 2, 2),
        },
        probe="img_mlp",
        hosts=NEWEST,
    ),
    "cogvideox": TinyModel(
        "CogVideoX_T2V",
        "cogvideox",
        VIDEO,
        (1, 226, TEXT),
        {
            "blocks.0.norm1.linear.weight": (6 * WIDTH, WIDTH),
            "patch_embed.proj.weight": (WIDTH, 16, 2, 2),
            "patch_embed.text_proj.weight": (WIDTH, TEXT),
        },
        hosts=SINCE_24,
        host_follows_file=True,
    ),
}
