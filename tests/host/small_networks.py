"""Small networks of the architectures that no tiny model in `tiny_models.py` covers: made by their constructors, with
what their forward is given. Without detection, loading and sampling, they cost a few lines each.

In `inputs`, a tuple is the shape of a random tensor, and a list holds several such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from host.tiny_model import EVERY, NEWEST, SINCE_24


@dataclass(frozen=True)
class SmallNetwork:
    """How to make one, and to call it."""

    path: str  # of the class, below comfy.ldm
    blocks: str  # to be found, in order, as test_blocks.py writes them
    sizes: Mapping[str, object]
    inputs: Mapping[str, object]
    hosts: tuple[str, ...] = EVERY
    prepare: str = ""  # the method that makes its context of what the text encoder gives


WAN = {"dim": 256, "ffn_dim": 256, "num_heads": 2, "num_layers": 4, "text_dim": 64, "text_len": 16}
WAN_INPUTS = {"x": (1, 16, 2, 4, 4), "timestep": torch.tensor([500.0]), "context": (1, 7, 64)}

UNET_VIDEO = {
    "image_size": 32,
    "in_channels": 8,
    "model_channels": 32,
    "out_channels": 4,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "context_dim": 64,
    "num_classes": "sequential",
    "adm_in_channels": 32,
    "use_temporal_attention": True,
    "use_temporal_resblock": True,
    "extra_ff_mix_layer": True,
    "video_kernel_size": [3, 1, 1],
    "merge_strategy": "learned_with_images",
}

SMALL_NETWORKS: dict[str, SmallNetwork] = {
    "svd": SmallNetwork(
        "modules.diffusionmodules.openaimodel.UNetModel",
        "input_blocks.1.0-1 input_blocks.2.0 input_blocks.3.0-1 middle_block.0-2 output_blocks.0.0-1 "
        "output_blocks.1.0-2 output_blocks.2.0-1 output_blocks.3.0-1",
        UNET_VIDEO,
        {
            "x": (2, 8, 8, 8),
            "timesteps": torch.tensor([500.0, 500.0]),
            "context": (2, 1, 64),
            "y": (2, 32),
            "num_video_frames": 2,
        },
    ),
    "stage_c": SmallNetwork(
        "cascade.stage_c.StageC",
        "down_blocks.0.0-2 down_blocks.1.0-5 up_blocks.0.0-5 up_blocks.1.0-2",
        {"c_hidden": [64, 64], "nhead": [2, 2], "blocks": [[1, 2], [2, 1]], "c_cond": 64},
        {
            "x": (1, 16, 8, 8),
            "r": torch.tensor([0.5]),
            "clip_text": (1, 7, 1280),
            "clip_text_pooled": (1, 1, 1280),
            "clip_img": (1, 1, 768),
        },
    ),
    "stage_b": SmallNetwork(
        "cascade.stage_b.StageB",
        "down_blocks.0.0-1 down_blocks.1.0-1 down_blocks.2.0-2 down_blocks.3.0-2 up_blocks.0.0-2 "
        "up_blocks.1.0-2 up_blocks.2.0-1 up_blocks.3.0-1",
        {
            "c_hidden": [32, 32, 64, 64],
            "nhead": [-1, -1, 2, 2],
            "blocks": [[1, 1, 1, 1], [1, 1, 1, 1]],
            "block_repeat": [[1, 1, 1, 1], [1, 1, 1, 1]],
            "c_cond": 64,
        },
        {"x": (1, 4, 32, 32), "r": torch.tensor([0.5]), "effnet": (1, 16, 4, 4), "clip": (1, 1, 1280)},
    ),
    "sd35_context_processor": SmallNetwork(
        "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",
        "context_processor.layers.0-1 joint_blocks.0-1",
        {"depth": 2, "in_channels": 16, "pos_embed_max_size": 16, "num_patches": 256, "adm_in_channels": 64}
        | {"context_size": 128, "context_processor_layers": 2, "input_size": None},
        {"x": (1, 16, 8, 8), "timesteps": torch.tensor([500.0]), "context": (1, 7, 128), "y": (1, 64)},
    ),
    "chroma_radiance": SmallNetwork(
        "chroma_radiance.model.ChromaRadiance",
        "distilled_guidance_layer.layers.0-1 double_blocks.0 single_blocks.0-1",
        {"in_channels": 3, "out_channels": 3, "context_in_dim": 64, "hidden_size": 128, "mlp_ratio": 4.0}
        | {"num_heads": 1, "depth": 1, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000}
        | {"patch_size": 4, "qkv_bias": True, "in_dim": 64, "out_dim": 128, "hidden_dim": 64, "n_layers": 2}
        | {"txt_ids_dims": [], "vec_in_dim": None, "nerf_hidden_size": 16, "nerf_mlp_ratio": 4, "nerf_depth": 2}
        | {"nerf_max_freqs": 4, "nerf_tile_size": 2, "nerf_final_head_type": "conv", "nerf_embedder_dtype": None}
        | {"use_x0": False, "use_sequential_txt_ids": False},
        {"x": (1, 3, 16, 16), "timestep": torch.tensor([0.5]), "context": (1, 7, 64), "guidance": torch.tensor([0.0])},
        hosts=SINCE_24,
    ),
    "hunyuan3d_2": SmallNetwork(
        "hunyuan3d.model.Hunyuan3Dv2",
        "double_blocks.0 single_blocks.0-1",
        {"in_channels": 16, "context_in_dim": 64, "hidden_size": 128, "num_heads": 2, "depth": 1}
        | {"depth_single_blocks": 2},
        {"x": (1, 16, 32), "timestep": torch.tensor([0.5]), "context": (1, 7, 64)},
    ),
    "hunyuan3d_21": SmallNetwork(
        "hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain",
        "blocks.0-4",
        {"in_channels": 16, "hidden_size": 128, "context_dim": 64, "depth": 5, "num_heads": 2, "num_moe_layers": 2}
        | {"guidance_cond_proj_dim": 128},
        {"x": (2, 16, 32), "t": torch.tensor([0.5, 0.5]), "context": (2, 7, 64)},
    ),
    "hunyuan_dit": SmallNetwork(
        "hydit.models.HunYuanDiT",
        "blocks.0-3",
        {"hidden_size": 128, "depth": 4, "num_heads": 2, "text_states_dim": 64, "text_states_dim_t5": 64},
        {
            "x": (1, 4, 8, 8),
            "t": torch.tensor([500.0]),
            "context": (1, 77, 64),
            "text_embedding_mask": torch.ones(1, 77, dtype=torch.long),
            "encoder_hidden_states_t5": (1, 256, 64),
            "text_embedding_mask_t5": torch.ones(1, 256, dtype=torch.long),
        },
    ),
    "mochi": SmallNetwork(
        "genmo.joint_model.asymm_models_joint.AsymmDiTJoint",
        "blocks.0-1",
        {"in_channels": 12, "hidden_size_x": 128, "hidden_size_y": 64, "depth": 2, "num_heads": 2, "mlp_ratio_x": 96.0}
        | {"use_t5": True, "t5_feat_dim": 64, "t5_token_length": 8, "rope_theta": 10000.0, "attend_to_padding": False}
        | {"qkv_bias": False, "qk_norm": True, "out_bias": True, "learn_sigma": False, "patch_embed_bias": True},
        {
            "x": (1, 12, 2, 4, 4),
            "timestep": torch.tensor([500.0]),
            "context": (1, 8, 64),
            "attention_mask": torch.ones(1, 8, dtype=torch.long),
            "num_tokens": 8,
        },
    ),
    "stable_audio": SmallNetwork(
        "audio.dit.AudioDiffusionTransformer",
        "transformer.layers.0-1",
        {"io_channels": 16, "embed_dim": 128, "cond_token_dim": 64, "global_cond_dim": 128, "depth": 2, "num_heads": 2},
        {"x": (1, 16, 8), "timestep": torch.tensor([0.5]), "context": (1, 7, 64), "global_embed": (1, 128)},
    ),
    "ace": SmallNetwork(
        "ace.model.ACEStepTransformer2DModel",
        "lyric_encoder.encoders.0-5 transformer_blocks.0-1",
        {"num_layers": 2, "inner_dim": 128, "attention_head_dim": 64, "num_attention_heads": 2, "mlp_ratio": 2.0}
        | {"lyric_hidden_size": 1024, "text_embedding_dim": 64},
        {
            "x": (1, 8, 16, 16),
            "timestep": torch.tensor([0.5]),
            "context": (1, 7, 64),
            "speaker_embeds": (1, 512),
            "lyric_token_idx": torch.tensor([[3, 4, 5, 6, 7]]),
            "lyric_mask": torch.ones(1, 5, dtype=torch.long),
        },
    ),
    "ace15": SmallNetwork(
        "ace.ace_step15.AceStepConditionGenerationModel",
        "encoder.lyric_encoder.layers.0 encoder.timbre_encoder.layers.0 "
        "tokenizer.attention_pooler.layers.0 detokenizer.layers.0-1 decoder.layers.0-1",
        {"hidden_size": 128, "text_hidden_dim": 64, "num_dit_layers": 2, "num_lyric_layers": 1, "num_timbre_layers": 1}
        | {"num_tokenizer_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "intermediate_size": 128}
        | {"fsq_dim": 128, "encoder_hidden_size": 128, "encoder_intermediate_size": 128, "encoder_num_heads": 2},
        {
            "x": (1, 64, 10),
            "timestep": torch.tensor([0.5]),
            "context": (1, 7, 64),
            "lyric_embed": (1, 5, 64),
            "refer_audio": (1, 64, 10),
        },
        hosts=SINCE_24,
    ),
    "triposplat": SmallNetwork(
        "triposplat.model.LatentSeqMMFlowModel",
        "context_refiner.0 noise_refiner.0 blocks.0-1",
        {"q_token_length": 32, "model_channels": 128, "cond_channels": 64, "num_blocks": 2, "num_refiner_blocks": 1},
        {"x": [(1, 32, 16), (1, 1, 5)], "t": torch.tensor([0.5]), "context": (1, 7, 64)},
        hosts=SINCE_24,
    ),
    "pixeldit": SmallNetwork(
        "pixeldit.model.PixDiT_T2I",
        "patch_blocks.0-1 pixel_blocks.0-1",
        {"num_groups": 2, "hidden_size": 128, "pixel_attn_hidden_size": 128, "pixel_num_groups": 2, "patch_depth": 2}
        | {"txt_embed_dim": 64, "patch_size": 4},
        {"x": (1, 3, 16, 16), "timesteps": torch.tensor([0.5]), "context": (1, 7, 64)},
        hosts=SINCE_24,
    ),
    "pid": SmallNetwork(
        "pixeldit.pid.PidNet",
        "patch_blocks.0-3 pixel_blocks.0-1",
        {"num_groups": 2, "hidden_size": 128, "pixel_attn_hidden_size": 128, "pixel_num_groups": 2, "patch_depth": 4}
        | {"txt_embed_dim": 64, "lq_hidden_dim": 32},
        {
            "x": (1, 3, 32, 32),
            "timesteps": torch.tensor([0.5]),
            "context": (1, 7, 64),
            "lq_latent": (1, 16, 1, 1),
            "degrade_sigma": torch.tensor([0.1]),
        },
        hosts=SINCE_24,
    ),
    "minimax_h3": SmallNetwork(
        "minimax.model.MiniMaxH3Model",
        "token_refiner.blocks.0-1? blocks.0-1",
        {"hidden_size": 128, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 128, "text_dim": 64}
        | {"ffn_hidden_size": 128, "time_embed_hidden_size": 128, "time_embed_dim": 64},
        {"x": [(1, 24, 2, 4, 4), (1, 32, 2, 8)], "timestep": torch.tensor([500.0]), "context": (1, 7, 64)},
        hosts=NEWEST,
    ),
    "seedvr2": SmallNetwork(
        "seedvr.model.NaDiT",
        "blocks.0-3",
        {"norm_eps": 1e-5, "num_layers": 4, "mlp_type": "swiglu", "vid_dim": 128, "heads": 1, "mm_layers": 2}
        | {"vid_out_norm": True},
        {
            "x": (1, 16, 1, 8, 8),
            "timestep": torch.tensor([500.0]),
            "context": (1, 7, 5120),
            "condition": (1, 17, 1, 8, 8),
            "transformer_options": {"cond_or_uncond": [0]},
        },
        hosts=NEWEST,
    ),
    "ltxav": SmallNetwork(
        "lightricks.av_model.LTXAVModel",
        "video_embeddings_connector.transformer_1d_blocks.0-1? "
        "audio_embeddings_connector.transformer_1d_blocks.0-1? transformer_blocks.0-1",
        {"in_channels": 16, "audio_in_channels": 128, "cross_attention_dim": 128, "audio_cross_attention_dim": 64}
        | {"attention_head_dim": 64, "audio_attention_head_dim": 32, "num_attention_heads": 2}
        | {"audio_num_attention_heads": 2, "caption_channels": 64, "num_layers": 2}
        | {"connector_attention_head_dim": 32, "connector_num_attention_heads": 2},
        {
            "x": [(1, 16, 2, 4, 4), (1, 8, 4, 16)],
            "timestep": torch.tensor([0.5]),
            "context": (1, 128, 64),
            "transformer_options": {},
        },
        prepare="preprocess_text_embeds",
    ),
    "wan_s2v": SmallNetwork(
        "wan.model.WanModel_S2V",
        "blocks.0 audio_injector.injector_adain_layers.0 audio_injector.injector.0 blocks.1-2 "
        "audio_injector.injector_adain_layers.1 audio_injector.injector.1 blocks.3 "
        "audio_injector.injector_adain_layers.2 audio_injector.injector.2",
        {**WAN, "audio_dim": 64, "audio_inject_layers": [0, 2, 3]},
        {**WAN_INPUTS, "audio_embed": (1, 25, 64, 8)},
    ),
    "wan_humo": SmallNetwork(
        "wan.model.HumoWanModel",
        "blocks.0-3",
        WAN,
        {**WAN_INPUTS, "audio_embed": (1, 2, 8, 5, 1280)},
    ),
    "wan_camera": SmallNetwork(
        "wan.model.CameraWanModel",
        "blocks.0-3",
        {**WAN, "model_type": "t2v"},
        {**WAN_INPUTS, "camera_conditions": (1, 24, 2, 32, 32)},
    ),
    "wan_animate": SmallNetwork(
        "wan.model_animate.AnimateWanModel",
        "blocks.0 face_adapter.fuser_blocks.0 blocks.1-4",
        {**WAN, "num_layers": 5, "in_dim": 16},
        {**WAN_INPUTS, "face_pixel_values": (1, 3, 1, 512, 512)},
    ),
    "wan_dancer": SmallNetwork(
        "wan.model_wandancer.WanDancerModel",
        "blocks.0 music_injector.injector.0 blocks.1-2 music_injector.injector.1 blocks.3",
        {**WAN, "in_dim": 16, "audio_inject_layers": [0, 2], "music_dim": 64, "music_latent_dim": 64, "music_heads": 1},
        {**WAN_INPUTS, "x": (1, 16, 2, 8, 8), "audio_embed": (1, 16, 35)},
        hosts=SINCE_24,
    ),
    "wan_scail": SmallNetwork(
        "wan.model.SCAILWanModel", "blocks.0-3", {**WAN, "in_dim": 16}, {**WAN_INPUTS, "pose_latents": (1, 16, 2, 4, 4)}
    ),
    "z_image_pixels": SmallNetwork(
        "lumina.model.NextDiTPixelSpace",
        "context_refiner.0 noise_refiner.0 layers.0-1 dec_net.res_blocks.0-3",
        {"decoder_hidden_size": 64, "patch_size": 4, "in_channels": 3, "dim": 128, "n_layers": 2, "n_refiner_layers": 1}
        | {"n_heads": 1, "n_kv_heads": 1, "axes_dims": [32, 48, 48], "axes_lens": [300, 512, 512], "cap_feat_dim": 64},
        {"x": (1, 3, 16, 16), "timesteps": torch.tensor([0.5]), "context": (1, 7, 64), "num_tokens": 7},
    ),
}
