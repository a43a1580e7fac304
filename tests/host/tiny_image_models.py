"""The tiny models that make images; keys and sizes are those that `comfy/model_detection.py` reads."""

from __future__ import annotations

from host.tiny_model import AXES, FRAME, IMAGE, NEWEST, SINCE_24, TEXT, TOKENS, WIDTH, TinyModel

LATENT_4, LATENT_128 = (1, 4, 8, 8), (1, 128, 4, 4)

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_checkpoint": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}

# What every relative of Flux shows: one double and one single block.
FLUX = {
    "img_in.weight": (WIDTH, 64),
    "txt_in.weight": (WIDTH, TEXT),
    "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
    "single_blocks.0.norm.key_norm.scale": (128,),
}
FLUX_SCHNELL = FLUX | {"vector_in.in_layer.weight": (WIDTH, 768)}
FLUX_DEV = FLUX_SCHNELL | {"guidance_in.in_layer.weight": (WIDTH, WIDTH)}

LUMINA = {
    "cap_embedder.1.weight": (WIDTH, TEXT),
    "noise_refiner.0.attention.k_norm.weight": (128,),
    "layers.0.attention.k_norm.weight": (128,),
}
LUMINA_SIZES = {
    "n_heads": 2,
    "n_kv_heads": 1,
    "axes_dims": list(AXES),
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 1.0,
    "n_refiner_layers": 1,
}

IMAGE_MODELS: dict[str, TinyModel] = {
    "sd15": TinyModel(
        "SD15",
        "sd1",
        LATENT_4,
        (1, 7, 768),
        config=UNET
        | {
            "model_channels": 64,
            "num_res_blocks": [1, 1],
            "channel_mult": [1, 2],
            "transformer_depth": [1, 1],
            "transformer_depth_output": [1, 1, 1, 1],
            "transformer_depth_middle": 1,
            "use_linear_in_transformer": False,
            "context_dim": 768,
            "adm_in_channels": None,
        },
        table={"model_channels": 64},
        layout="rearranged",
    ),
    "sdxl": TinyModel(
        "SDXL",
        "sdxl",
        LATENT_4,
        (1, 7, 2048),
        config=UNET
        | {
            "model_channels": 32,
            "num_res_blocks": [2, 2, 2],
            "channel_mult": [1, 2, 4],
            "transformer_depth": [0, 0, 1, 1, 2, 2],
            "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
            "transformer_depth_middle": 2,
            "use_linear_in_transformer": True,
            "context_dim": 2048,
            "num_classes": "sequential",
            "adm_in_channels": 2816,
        },
        table={"model_channels": 32, "transformer_depth": [0, 0, 1, 1, 2, 2]},
        conditioning={"pooled_output": (1, 1280)},
        layout="rearranged",
    ),
    "sd3": TinyModel(
        "SD3",
        "sd3",
        IMAGE,
        TOKENS,
        {
            "joint_blocks.0.context_block.attn.qkv.weight": (3 * WIDTH, WIDTH),
            "joint_blocks.0.context_block.attn.ln_q.weight": (64,),
            "x_embedder.proj.weight": (WIDTH, 16, 2, 2),
            "final_layer.linear.weight": (64, WIDTH),
            "y_embedder.mlp.0.weight": (WIDTH, TEXT),
            "context_embedder.weight": (WIDTH, TEXT),
            "pos_embed": (1, 64, WIDTH),
        },
        conditioning={"pooled_output": (1, TEXT)},
    ),
    "flux": TinyModel(
        "Flux", "flux", IMAGE, TOKENS, FLUX_DEV, conditioning={"pooled_output": (1, 768), "guidance": 3.5}
    ),
    # "pig" is what the files of one converter state, whatever is in them.
    "flux_schnell": TinyModel(
        "FluxSchnell", "pig", IMAGE, TOKENS, FLUX_SCHNELL, conditioning={"pooled_output": (1, 768)}
    ),
    "flux_fill": TinyModel(
        "FluxInpaint",
        "sdxl",  # wrong, and nothing depends on it
        IMAGE,
        TOKENS,
        FLUX_DEV | {"img_in.weight": (WIDTH, 384)},
        conditioning={"pooled_output": (1, 768), "guidance": 3.5},
    ),
    "flux2": TinyModel(
        "Flux2",
        "flux",
        LATENT_128,
        TOKENS,
        FLUX
        | {
            "img_in.weight": (WIDTH, 128),
            "double_stream_modulation_img.lin.weight": (6 * WIDTH, WIDTH),
            "guidance_in.in_layer.weight": (WIDTH, WIDTH),
        },
        conditioning={"guidance": 4.0, "pooled_output": (1, 768)},  # 0.18 asks for the latter and ignores it
    ),
    "longcat": TinyModel("LongCatImage", "flux", IMAGE, (1, 7, 3584), FLUX | {"txt_in.weight": (WIDTH, 3584)}),
    "chroma": TinyModel(
        "Chroma",
        "flux",
        IMAGE,
        TOKENS,
        FLUX | {"distilled_guidance_layer.norms.0.scale": (WIDTH,)},
        sizes={"out_dim": WIDTH, "hidden_dim": WIDTH, "n_layers": 1},
        conditioning={"pooled_output": (1, 768)},
    ),
    "qwen_image": TinyModel(
        "QwenImage",
        "qwen_image",
        FRAME,
        TOKENS,
        {
            "txt_norm.weight": (TEXT,),
            "img_in.weight": (WIDTH, 64),
            "transformer_blocks.0.img_mod.1.bias": (6 * WIDTH,),
        },
        sizes={"num_attention_heads": 2, "joint_attention_dim": TEXT},
    ),
    "lumina2": TinyModel("Lumina2", "lumina2", IMAGE, TOKENS, LUMINA, sizes=LUMINA_SIZES),
    "z_image": TinyModel(
        "ZImage",
        "lumina2",
        IMAGE,
        TOKENS,
        LUMINA | {"cap_pad_token": (1, WIDTH)},
        sizes=LUMINA_SIZES
        | {"n_kv_heads": 2, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32},
        table={"dim": WIDTH},
    ),
    "hidream": TinyModel(
        "HiDream",
        "hidream",
        IMAGE,
        (1, 7, WIDTH),
        {"caption_projection.0.linear.weight": (WIDTH, WIDTH)},
        sizes={
            "num_attention_heads": 2,
            "num_layers": 1,
            "num_single_layers": 1,
            "caption_channels": [WIDTH, WIDTH],
            "llama_layers": [0, 1],
            "text_emb_dim": WIDTH,
        },
        conditioning={"pooled_output": (1, WIDTH), "conditioning_llama3": (1, 2, 7, WIDTH)},
    ),
    "hidream_o1": TinyModel(
        "HiDreamO1",
        "hidream",
        (1, 3, 64, 64),
        None,
        {"t_embedder1.mlp.0.weight": (WIDTH, WIDTH), "x_embedder.proj1.weight": (WIDTH // 4, 3072)},
        sizes={
            "text_config_overrides": {
                "hidden_size": WIDTH,
                "intermediate_size": 512,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
            },
            "vision_config_overrides": {"hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "depth": 1},
        },
        conditioning={"text_input_ids": [3, 1000, 70000, 9, 151673]},
        probe="language_model.layers.0.mlp",
        hosts=SINCE_24,
    ),
    "aura": TinyModel(
        "AuraFlow",
        "aura",
        LATENT_4,
        TOKENS,
        {
            "double_layers.0.attn.w1q.weight": (WIDTH, WIDTH),
            "single_layers.0.attn.w1q.weight": (WIDTH, WIDTH),
            "cond_seq_linear.weight": (WIDTH, TEXT),
            "positional_encoding": (1, 64, WIDTH),
        },
        sizes={"dim": WIDTH, "n_heads": 2, "global_conddim": WIDTH},
        table={"cond_seq_dim": TEXT},
    ),
    "pixart_sigma": TinyModel(
        "PixArtSigma",
        "pixart",
        (1, 4, 64, 64),  # its position embedding needs as much
        (1, 7, 4096),
        {
            "t_block.1.weight": (6 * WIDTH, WIDTH),
            "blocks.0.scale_shift_table": (6, WIDTH),
            "y_embedder.y_embedding": (16, 4096),
        },
        sizes={"hidden_size": WIDTH, "num_heads": 4},
    ),
    "omnigen2": TinyModel(
        "Omnigen2",
        "omnigen2",
        IMAGE,
        TOKENS,
        {"time_caption_embed.timestep_embedder.linear_1.bias": (WIDTH,)},
        sizes={
            "axes_dim_rope": list(AXES),
            "hidden_size": WIDTH,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "text_feat_dim": TEXT,
        },
        conditioning={"attention_mask": [[1] * 7]},
    ),
    "boogu": TinyModel(
        "Boogu",
        "boogu",
        IMAGE,
        TOKENS,
        {
            "double_stream_layers.0.img_instruct_attn.processor.img_to_q.weight": (WIDTH, WIDTH),
            "single_stream_layers.0.attn.to_q.weight": (WIDTH, WIDTH),
            "noise_refiner.0.attn.to_q.weight": (WIDTH, WIDTH),
            "x_embedder.weight": (WIDTH, 64),
            "time_caption_embed.caption_embedder.0.weight": (TEXT,),
        },
        sizes={"axes_dim_rope": list(AXES), "num_attention_heads": 2, "num_kv_heads": 1},
        conditioning={"attention_mask": [[1] * 7]},
        hosts=NEWEST,
    ),
    "ideogram4": TinyModel(
        "Ideogram4",
        "ideogram4",
        LATENT_128,
        TOKENS,
        {
            "embed_image_indicator.weight": (2, WIDTH),
            "input_proj.weight": (WIDTH, 128),
            "layers.0.attention.qkv.weight": (3 * WIDTH, WIDTH),
        },
        sizes={
            "num_attention_heads": 2,
            "attention_head_dim": 128,
            "intermediate_size": 512,
            "adaln_dim": WIDTH,
            "llm_features_dim": TEXT,
        },
        hosts=SINCE_24,
    ),
    "krea2": TinyModel(
        "Krea2",
        "krea2",
        FRAME,
        (1, 7, 2 * WIDTH),
        {
            "txtfusion.projector.weight": (1, 2),
            "txtfusion.layerwise_blocks.0.prenorm.scale": (WIDTH,),
            "first.weight": (WIDTH, 64),
            "blocks.0.attn.wq.weight": (WIDTH, WIDTH),
            "blocks.0.attn.wk.weight": (128, WIDTH),
        },
        sizes={"txtheads": 2, "txtkvheads": 2},
        hosts=NEWEST,
    ),
    "ernie": TinyModel(
        "ErnieImage",
        "ernie",
        LATENT_128,
        TOKENS,
        {"layers.0.mlp.linear_fc2.weight": (WIDTH, 512)},
        sizes={
            "hidden_size": WIDTH,
            "num_attention_heads": 2,
            "num_layers": 1,
            "ffn_hidden_size": 512,
            "text_in_dim": TEXT,
        },
        hosts=SINCE_24,
    ),
    "lens": TinyModel(
        "Lens",
        "lens",
        LATENT_128,
        (1, 7, 2 * WIDTH),
        {
            "transformer_blocks.0.attn.norm_added_q.weight": (64,),
            "transformer_blocks.0.img_mlp.w1.weight": (512, WIDTH),
            "img_in.weight": (WIDTH, 128),
            "proj_out.weight": (128, WIDTH),
            "txt_norm.0.weight": (WIDTH,),
            "txt_norm.1.weight": (WIDTH,),
        },
        hosts=SINCE_24,
    ),
    "mage_flow": TinyModel(
        "MageFlow",
        "mage_flow",
        LATENT_128,
        (1, 7, 2560),
        {
            "txt_norm.weight": (2560,),
            "proj_out.weight": (128, WIDTH),
            "transformer_blocks.0.img_mod.1.bias": (6 * WIDTH,),
        },
        sizes={"num_attention_heads": 2},
        hosts=NEWEST,
    ),
}
