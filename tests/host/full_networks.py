"""Networks in their real sizes, to be made without memory for their weights (on the meta device).

Most constructors have the sizes of the released model as their defaults; where they have none, or those of another
model, they are here, as `comfy/model_detection.py` reads them from the released file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class FullNetwork:
    path: str  # of the class, below comfy.ldm
    blocks: str  # to be found: how many in each list, whose numbers are stars
    sizes: Mapping[str, object] = field(default_factory=dict)


UNET = {
    "image_size": 32,
    "in_channels": 4,
    "model_channels": 320,
    "out_channels": 4,
    "use_spatial_transformer": True,
}
FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
CHROMA = {
    **{key: value for key, value in FLUX.items() if key != "guidance_embed"},
    **{"in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5},
    "vec_in_dim": None,
}
COSMOS = {
    **{"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16},
    **{"patch_spatial": 2, "patch_temporal": 1, "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 256},
}
WAN_14B = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}

FULL_NETWORKS: dict[str, FullNetwork] = {
    "sd15": FullNetwork(
        "modules.diffusionmodules.openaimodel.UNetModel",
        "input_blocks.*.*:17 middle_block.*:3 output_blocks.*.*:24",
        UNET
        | {
            "num_res_blocks": [2, 2, 2, 2],
            "channel_mult": [1, 2, 4, 4],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
            "transformer_depth_middle": 1,
            "num_heads": 8,
            "context_dim": 768,
        },
    ),
    "sdxl": FullNetwork(
        "modules.diffusionmodules.openaimodel.UNetModel",
        "input_blocks.*.*:10 input_blocks.*.*.transformer_blocks.*:20 middle_block.*:2 "
        "middle_block.*.transformer_blocks.*:10 output_blocks.*.*:14 "
        "output_blocks.*.*.transformer_blocks.*:30",
        UNET
        | {
            "num_res_blocks": [2, 2, 2],
            "channel_mult": [1, 2, 4],
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "transformer_depth_middle": 10,
            "num_head_channels": 64,
            "context_dim": 2048,
            "use_linear_in_transformer": True,
            "num_classes": "sequential",
            "adm_in_channels": 2816,
        },
    ),
    "stage_c": FullNetwork("cascade.stage_c.StageC", "down_blocks.*.*:96 up_blocks.*.*:96"),
    "stage_b": FullNetwork("cascade.stage_b.StageB", "down_blocks.*.*:118 up_blocks.*.*:118"),
    "sd35_large": FullNetwork(
        "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",
        "joint_blocks.*:38",
        {"depth": 38, "in_channels": 16, "adm_in_channels": 2048, "context_size": 2432, "qk_norm": "rms"},
    ),
    "flux": FullNetwork("flux.model.Flux", "double_blocks.*:19 single_blocks.*:38", FLUX),
    "flux2": FullNetwork(
        "flux.model.Flux",
        "double_blocks.*:8 single_blocks.*:48",
        FLUX
        | {
            "in_channels": 128,
            "out_channels": 128,
            "patch_size": 1,
            "context_in_dim": 15360,
            "hidden_size": 6144,
            "num_heads": 48,
            "mlp_ratio": 3.0,
            "depth": 8,
            "depth_single_blocks": 48,
            "axes_dim": [32, 32, 32, 32],
            "vec_in_dim": None,
            "qkv_bias": False,
            "global_modulation": True,
            "mlp_silu_act": True,
            "ops_bias": False,
        },
    ),
    "chroma": FullNetwork(
        "chroma.model.Chroma", "distilled_guidance_layer.layers.*:5 double_blocks.*:19 single_blocks.*:38", CHROMA
    ),
    "chroma_radiance": FullNetwork(
        "chroma_radiance.model.ChromaRadiance",
        "distilled_guidance_layer.layers.*:5 double_blocks.*:19 single_blocks.*:38",
        CHROMA
        | {"in_channels": 3, "out_channels": 3, "patch_size": 16, "nerf_hidden_size": 64, "nerf_mlp_ratio": 4}
        | {"nerf_depth": 4, "nerf_max_freqs": 8, "nerf_tile_size": 512, "nerf_final_head_type": "conv"}
        | {"nerf_embedder_dtype": None, "use_x0": False, "use_sequential_txt_ids": False},
    ),
    "hunyuan_video": FullNetwork(
        "hunyuan_video.model.HunyuanVideo",
        "txt_in.individual_token_refiner.blocks.*:2 double_blocks.*:20 single_blocks.*:40",
        {key: value for key, value in FLUX.items() if key != "txt_ids_dims"}
        | {"depth": 20, "depth_single_blocks": 40, "theta": 256, "patch_size": [1, 2, 2], "byt5": False}
        | {"meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False},
    ),
    "hunyuan3d_2": FullNetwork("hunyuan3d.model.Hunyuan3Dv2", "double_blocks.*:16 single_blocks.*:32"),
    "hunyuan3d_21": FullNetwork("hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain", "blocks.*:21"),
    "hunyuan_dit": FullNetwork(
        "hydit.models.HunYuanDiT",
        "blocks.*:40",
        {"hidden_size": 1408, "depth": 40, "mlp_ratio": 4.3637, "size_cond": True},
    ),
    "wan21_t2v": FullNetwork("wan.model.WanModel", "blocks.*:40", WAN_14B),
    "wan21_vace": FullNetwork(
        "wan.model.VaceWanModel", "blocks.*:40 vace_blocks.*:8", WAN_14B | {"vace_layers": 8, "vace_in_dim": 96}
    ),
    "wan_s2v": FullNetwork(
        "wan.model.WanModel_S2V",
        "blocks.*:40 audio_injector.injector_adain_layers.*:12 audio_injector.injector.*:12",
        WAN_14B,
    ),
    "wan_humo": FullNetwork("wan.model.HumoWanModel", "blocks.*:40", WAN_14B),
    "wan_camera": FullNetwork("wan.model.CameraWanModel", "blocks.*:40", WAN_14B),
    "wan_animate": FullNetwork(
        "wan.model_animate.AnimateWanModel", "blocks.*:40 face_adapter.fuser_blocks.*:8", WAN_14B
    ),
    "wan_dancer": FullNetwork("wan.model_wandancer.WanDancerModel", "blocks.*:40 music_injector.injector.*:8"),
    "qwen_image": FullNetwork("qwen_image.model.QwenImageTransformer2DModel", "transformer_blocks.*:60"),
    "lumina2": FullNetwork(
        "lumina.model.NextDiT",
        "context_refiner.*:2 noise_refiner.*:2 layers.*:26",
        {"dim": 2304, "n_layers": 26, "n_heads": 24, "n_kv_heads": 8}
        | {"axes_dims": [32, 32, 32], "axes_lens": [300, 512, 512], "cap_feat_dim": 2304},
    ),
    "z_image_pixels": FullNetwork(
        "lumina.model.NextDiTPixelSpace", "context_refiner.*:2 noise_refiner.*:2 layers.*:32"
    ),
    "omnigen2": FullNetwork(
        "omnigen.omnigen2.OmniGen2Transformer2DModel",
        "context_refiner.*:2 noise_refiner.*:2 ref_image_refiner.*:2 layers.*:26",
    ),
    "boogu": FullNetwork(
        "boogu.model.BooguTransformer2DModel",
        "context_refiner.*:2 noise_refiner.*:2 ref_image_refiner.*:2 double_stream_layers.*:8 "
        "single_stream_layers.*:32",
    ),
    "aura": FullNetwork("aura.mmdit.MMDiT", "double_layers.*:4 single_layers.*:32"),
    "hidream": FullNetwork(
        "hidream.model.HiDreamImageTransformer2DModel",
        "caption_projection.*:49 double_stream_blocks.*:16 single_stream_blocks.*:32",
        {"patch_size": 2, "in_channels": 16, "out_channels": 16, "caption_channels": [4096, 4096]}
        | {"llama_layers": list(range(48)), "axes_dims_rope": [64, 32, 32]},
    ),
    "hidream_o1": FullNetwork("hidream_o1.model.HiDreamO1Transformer", "visual.blocks.*:27 language_model.layers.*:36"),
    "cosmos1": FullNetwork(
        "cosmos.model.GeneralDIT",
        "blocks.block*:28",
        COSMOS | {"model_channels": 4096, "num_blocks": 28, "num_heads": 32},
    ),
    "cosmos_predict2": FullNetwork(
        "cosmos.predict2.MiniTrainDIT",
        "blocks.*:28",
        COSMOS | {"model_channels": 2048, "num_blocks": 28, "num_heads": 16},
    ),
    "anima": FullNetwork(
        "anima.model.Anima",
        "llm_adapter.blocks.*:6 blocks.*:28",
        COSMOS | {"model_channels": 2048, "num_blocks": 28, "num_heads": 16},
    ),
    "ltxv": FullNetwork("lightricks.model.LTXVModel", "transformer_blocks.*:28"),
    "ltxav": FullNetwork(
        "lightricks.av_model.LTXAVModel",
        "video_embeddings_connector.transformer_1d_blocks.*:2 "
        "audio_embeddings_connector.transformer_1d_blocks.*:2 transformer_blocks.*:48",
    ),
    "minimax_h3": FullNetwork("minimax.model.MiniMaxH3Model", "token_refiner.blocks.*:2 blocks.*:50"),
    "mochi": FullNetwork(
        "genmo.joint_model.asymm_models_joint.AsymmDiTJoint",
        "blocks.*:48",
        {"in_channels": 12, "hidden_size_x": 3072, "hidden_size_y": 1536, "depth": 48, "num_heads": 24}
        | {
            "mlp_ratio_x": 4.0,
            "use_t5": True,
            "t5_feat_dim": 4096,
            "qk_norm": True,
            "qkv_bias": False,
            "out_bias": True,
        },
    ),
    "pixart_sigma": FullNetwork("pixart.pixartms.PixArtMS", "blocks.*:28"),
    "cogvideox": FullNetwork("cogvideo.model.CogVideoXTransformer3DModel", "blocks.*:30"),
    "krea2": FullNetwork(
        "krea2.model.SingleStreamDiT", "txtfusion.layerwise_blocks.*:2 txtfusion.refiner_blocks.*:2 blocks.*:28"
    ),
    "seedvr2": FullNetwork(
        "seedvr.model.NaDiT", "blocks.*:32", {"norm_eps": 1e-5, "num_layers": 32, "mlp_type": "swiglu"}
    ),
    "pixeldit": FullNetwork("pixeldit.model.PixDiT_T2I", "patch_blocks.*:14 pixel_blocks.*:2"),
    "pid": FullNetwork("pixeldit.pid.PidNet", "patch_blocks.*:14 pixel_blocks.*:2"),
    "kandinsky5": FullNetwork(
        "kandinsky5.model.Kandinsky5", "text_transformer_blocks.*:2 visual_transformer_blocks.*:32"
    ),
    "joyimage": FullNetwork("joyimage.model.JoyImageTransformer3DModel", "double_blocks.*:20"),
    "ideogram4": FullNetwork("ideogram4.model.Ideogram4Transformer2DModel", "layers.*:34"),
    "ernie": FullNetwork("ernie.model.ErnieImageModel", "layers.*:36"),
    "lens": FullNetwork("lens.model.LensTransformer2DModel", "transformer_blocks.*:48"),
    "mage_flow": FullNetwork("mage_flow.model.MageFlowTransformer2DModel", "transformer_blocks.*:12"),
    "stable_audio": FullNetwork("audio.dit.AudioDiffusionTransformer", "transformer.layers.*:24"),
    "ace": FullNetwork("ace.model.ACEStepTransformer2DModel", "lyric_encoder.encoders.*:6 transformer_blocks.*:28"),
    "triposplat": FullNetwork(
        "triposplat.model.LatentSeqMMFlowModel", "context_refiner.*:2 noise_refiner.*:2 blocks.*:24"
    ),
}
