"""example_workflows/, but for the demo's, written from what is below: `.venv/bin/python tools/example_workflows.py`.

Each model family as its own documentation runs it, with this pack's nodes where they have something to do. File names
are those under which the models are published; a note in each workflow says where that is. A test fails when a file is
not what this makes, or is not what a real server accepts.
"""

from __future__ import annotations

import json
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if "pack" not in sys.modules:  # run as a script
    sys.modules["pack"] = types.ModuleType("pack")
    sys.modules["pack"].__path__ = [str(ROOT)]

from pack.tools.graph import Graph, Node  # noqa: E402

FOLDER = ROOT / "example_workflows"

HUB = "https://huggingface.co"
CORE = f"{HUB}/comfyanonymous/flux_text_encoders"
FILES = {
    "clip_l.safetensors": ("text_encoders", CORE),
    "clip_g.safetensors": ("text_encoders", f"{HUB}/Comfy-Org/stable-diffusion-3.5-fp8"),
    "t5-v1_1-xxl-encoder-Q5_K_M.gguf": ("text_encoders", f"{HUB}/city96/t5-v1_1-xxl-encoder-gguf"),
    "umt5-xxl-encoder-Q5_K_M.gguf": ("text_encoders", f"{HUB}/city96/umt5-xxl-encoder-gguf"),
    "Qwen2.5-VL-7B-Instruct-Q4_K_M.gguf": ("text_encoders", f"{HUB}/unsloth/Qwen2.5-VL-7B-Instruct-GGUF"),
    "Qwen3-4B-Q4_K_M.gguf": ("text_encoders", f"{HUB}/unsloth/Qwen3-4B-GGUF"),
    "mistral_3_small_flux2_fp8.safetensors": ("text_encoders", f"{HUB}/Comfy-Org/flux2-dev"),
    "flux1-dev-Q4_K_S.gguf": ("diffusion_models", f"{HUB}/city96/FLUX.1-dev-gguf"),
    "flux2-dev-Q4_K_M.gguf": ("diffusion_models", f"{HUB}/city96/FLUX.2-dev-gguf"),
    "qwen-image-Q4_K_M.gguf": ("diffusion_models", f"{HUB}/city96/Qwen-Image-gguf"),
    "z_image_turbo-Q4_K_M.gguf": ("diffusion_models", f"{HUB}/jayn7/Z-Image-Turbo-GGUF"),
    "Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf": ("diffusion_models", f"{HUB}/QuantStack/Wan2.2-T2V-A14B-GGUF"),
    "Wan2.2-T2V-A14B-LowNoise-Q4_K_M.gguf": ("diffusion_models", f"{HUB}/QuantStack/Wan2.2-T2V-A14B-GGUF"),
    "sd3.5_large-Q5_1.gguf": ("diffusion_models", f"{HUB}/city96/stable-diffusion-3.5-large-gguf"),
    "sd_xl_base_1.0-Q8_0.gguf": ("diffusion_models", f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0"),
    "ltx-video-2b-v0.9.5-Q8_0.gguf": ("diffusion_models", f"{HUB}/city96/LTX-Video-0.9.5-gguf"),
    "Hyper-FLUX.1-dev-8steps-lora.safetensors": ("loras", f"{HUB}/ByteDance/Hyper-SD"),
    "FLUX-dev-lora-add_details.safetensors": ("loras", f"{HUB}/Shakker-Labs/FLUX.1-dev-LoRA-add-details"),
    "Flux2TurboComfyv2.safetensors": ("loras", f"{HUB}/Comfy-Org/flux2-dev"),
    "Qwen-Image-Lightning-8steps-V1.0.safetensors": ("loras", f"{HUB}/lightx2v/Qwen-Image-Lightning"),
    **{
        f"wan2.2_t2v_lightx2v_4steps_lora_v1.1_{noise}_noise.safetensors": (
            "loras",
            f"{HUB}/Comfy-Org/Wan_2.2_ComfyUI_Repackaged",
        )
        for noise in ("high", "low")
    },
    "pixel_art_style_z_image_turbo.safetensors": ("loras", f"{HUB}/tarn59/pixel_art_style_lora_z_image_turbo"),
    "SD35-lora-Chinese-Line-Art.safetensors": ("loras", f"{HUB}/Shakker-Labs/SD3.5-LoRA-Chinese-Line-Art"),
    "sdxl_lightning_8step_lora.safetensors": ("loras", f"{HUB}/ByteDance/SDXL-Lightning"),
    "sd_xl_offset_example-lora_1.0.safetensors": ("loras", f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0"),
    "ltxv_095_cakeify_lora.safetensors": ("loras", f"{HUB}/Lightricks/LTX-Video-Cakeify-LoRA"),
    "ae.safetensors": ("vae", f"{HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged"),
    "flux2-vae.safetensors": ("vae", f"{HUB}/Comfy-Org/flux2-dev"),
    "qwen_image_vae.safetensors": ("vae", f"{HUB}/Comfy-Org/Qwen-Image_ComfyUI"),
    "wan_2.1_vae.safetensors": ("vae", f"{HUB}/Comfy-Org/Wan_2.2_ComfyUI_Repackaged"),
    "sd3.5_vae.safetensors": ("vae", f"{HUB}/stabilityai/stable-diffusion-3.5-large"),
    "sdxl_vae.safetensors": ("vae", f"{HUB}/stabilityai/sdxl-vae"),
    "ltx-video-2b-v0.9.5.safetensors": ("checkpoints", f"{HUB}/Lightricks/LTX-Video"),
}

BUDGET = (
    "**Block Swap Config** is the one dial for VRAM: at 0 the weights take what is free, and what does not fit streams "
    "from the file while the model computes. Choose a number of GB to leave more room."
)
STACK = "For more LoRAs, one node after the other."
STAGES = (
    "**Offload Mode** lets the text encoder leave VRAM when the prompt is encoded, and the model before the VAE "
    "decodes, only if the room is needed. Choose `none` to leave it to ComfyUI."
)


def note(graph: Graph, heading: str, files: list[str], *remarks: str) -> None:
    """What to download, where to put it, and what to know."""
    graph.column("Read me", 460)
    lines = [f"## {heading}", "", "Other quant types of the same models will do; choose them in the nodes.", ""]
    folders = dict.fromkeys(FILES[name][0] for name in files)
    for folder in folders:
        lines += [f"**models/{folder}**", ""]
        lines += [f"- [{name}]({FILES[name][1]})" for name in files if FILES[name][0] == folder]
        lines.append("")
    graph.note("\n\n".join(["\n".join(lines).strip(), *remarks, BUDGET, STAGES]), "Models and hints")


class Loaded:
    """Loaders, LoRA and Offload Mode, which all families have in common: a model, a text encoder and a VAE."""

    def __init__(self, graph: Graph, models: list[str], kind: str, clips: list[str], vae: str) -> None:
        graph.column("Models")
        swap = graph.add("SluiceBlockSwapConfig")
        self.models = [graph.add("SluiceDiffusionModelLoader", model_name=name, block_swap=swap) for name in models]
        names = {f"clip_name{number}": name for number, name in enumerate(clips, 1)}
        self.clip: Any = graph.add("SluiceCLIPLoader", type=kind, **names)
        if FILES[vae][0] == "checkpoints":  # there is no file with the VAE alone
            self.vae: Any = graph.add("CheckpointLoaderSimple", ckpt_name=vae)[2]
        else:
            self.vae = graph.add("VAELoader", vae_name=vae)

    def staged(self, graph: Graph, *stacks: list[tuple[str, float]]) -> list[Any]:
        """The models after their LoRAs, a stack for each, and Offload Mode, which CLIP and VAE go through, too."""
        graph.column("LoRAs and stages" if stacks else "Stages")
        applied = list(self.models)
        for place, stack in enumerate(stacks):
            for name, strength in stack:
                inputs = {"model": applied[place], "lora_name": name, "strength_model": strength}
                applied[place] = graph.add("SluiceLoraLoader", **inputs)
        for place, model in enumerate(applied):
            stage = graph.add("SluiceOffloadMode", mode="cond_diffusion", model=model, clip=self.clip, vae=self.vae)
            applied[place], self.clip, self.vae = stage, stage[1], stage[2]
        return applied


def texts(graph: Graph, clip: Any, positive: str, negative: str | None = None) -> tuple[Node, Node]:
    """Both conditionings; without a negative text, the empty one that guidance-distilled models take."""
    graph.column("Prompt", 400)
    first = graph.add("CLIPTextEncode", "Prompt", clip=clip, text=positive)
    if negative is None:
        return first, graph.add("ConditioningZeroOut", conditioning=first)
    return first, graph.add("CLIPTextEncode", "Negative prompt", clip=clip, text=negative)


def picture(graph: Graph, samples: Any, vae: Any, prefix: str) -> None:
    graph.add("SaveImage", images=graph.add("VAEDecode", samples=samples, vae=vae), filename_prefix=prefix)


def video(graph: Graph, samples: Any, vae: Any, prefix: str, fps: float) -> None:
    decoded = graph.add("VAEDecodeTiled", samples=samples, vae=vae)
    graph.add("SaveVideo", video=graph.add("CreateVideo", images=decoded, fps=fps), filename_prefix=f"video/{prefix}")


def flux1(graph: Graph) -> None:
    names = ["flux1-dev-Q4_K_S.gguf", "clip_l.safetensors", "t5-v1_1-xxl-encoder-Q5_K_M.gguf", "ae.safetensors"]
    loras = {"Hyper-FLUX.1-dev-8steps-lora.safetensors": 0.125, "FLUX-dev-lora-add_details.safetensors": 0.6}
    remark = (
        "The first LoRA makes 8 steps enough, at a strength of 0.125. Without it: bypass its **Apply LoRA** (Ctrl+B), "
        f"20 steps. The second adds details. {STACK}"
    )
    note(graph, "FLUX.1 dev", [*names, *loras], remark)
    loaded = Loaded(graph, names[:1], "flux", names[1:3], names[3])
    (model,) = loaded.staged(graph, list(loras.items()))
    positive, negative = texts(graph, loaded.clip, "a lighthouse on a cliff at dawn, film photograph, soft fog")
    guided = graph.add("FluxGuidance", conditioning=positive, guidance=3.5)
    latent = graph.add("EmptySD3LatentImage", width=1024, height=1024)
    graph.column("Sampling")
    samples = graph.add(
        "KSampler",
        **{"model": model, "positive": guided, "negative": negative, "latent_image": latent, "seed": 1, "steps": 8},
        **{"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"},
    )
    picture(graph, samples, loaded.vae, "flux1")


def flux2(graph: Graph) -> None:
    names = ["flux2-dev-Q4_K_M.gguf", "mistral_3_small_flux2_fp8.safetensors", "flux2-vae.safetensors"]
    lora = "Flux2TurboComfyv2.safetensors"
    remark = "The LoRA makes 8 steps enough. Without it: bypass **Apply LoRA** (Ctrl+B), 20 steps."
    note(graph, "FLUX.2 dev", [*names, lora], remark)
    loaded = Loaded(graph, names[:1], "flux2", names[1:2], names[2])
    (model,) = loaded.staged(graph, [(lora, 1.0)])
    graph.column("Prompt", 400)
    text = graph.add("CLIPTextEncode", "Prompt", clip=loaded.clip, text="a red fox reading a map, watercolour on paper")
    guided = graph.add("FluxGuidance", conditioning=text, guidance=4.0)
    latent = graph.add("EmptyFlux2LatentImage", width=1024, height=1024)
    sigmas = graph.add("Flux2Scheduler", steps=8, width=1024, height=1024)
    graph.column("Sampling")
    samples = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=1),
        guider=graph.add("BasicGuider", model=model, conditioning=guided),
        sampler=graph.add("KSamplerSelect", sampler_name="euler"),
        sigmas=sigmas,
        latent_image=latent,
    )
    picture(graph, samples, loaded.vae, "flux2")


def qwen_image(graph: Graph) -> None:
    names = ["qwen-image-Q4_K_M.gguf", "Qwen2.5-VL-7B-Instruct-Q4_K_M.gguf", "qwen_image_vae.safetensors"]
    lora = "Qwen-Image-Lightning-8steps-V1.0.safetensors"
    remark = (
        "The LoRA makes 8 steps without guidance enough. Without it: bypass **Apply LoRA** (Ctrl+B), 20 steps, cfg 4."
    )
    editing = "For Qwen-Image-Edit, put the text encoder's `mmproj` file beside it: it is found and joined."
    note(graph, "Qwen-Image", [*names, lora], remark, editing)
    loaded = Loaded(graph, names[:1], "qwen_image", names[1:2], names[2])
    (model,) = loaded.staged(graph, [(lora, 1.0)])
    positive, negative = texts(graph, loaded.clip, 'a bookshop window with a sign that says "open late"', "")
    latent = graph.add("EmptySD3LatentImage", width=1328, height=1328)
    graph.column("Sampling")
    shifted = graph.add("ModelSamplingAuraFlow", model=model, shift=3.1)
    samples = graph.add(
        "KSampler",
        **{"model": shifted, "positive": positive, "negative": negative, "latent_image": latent, "seed": 1, "steps": 8},
        **{"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"},
    )
    picture(graph, samples, loaded.vae, "qwen_image")


def z_image(graph: Graph) -> None:
    names = ["z_image_turbo-Q4_K_M.gguf", "Qwen3-4B-Q4_K_M.gguf", "ae.safetensors"]
    lora = "pixel_art_style_z_image_turbo.safetensors"
    remark = f"The LoRA listens to *Pixel art style*. Without it: bypass **Apply LoRA** (Ctrl+B). {STACK}"
    note(graph, "Z-Image Turbo", [*names, lora], remark)
    loaded = Loaded(graph, names[:1], "lumina2", names[1:2], names[2])
    (model,) = loaded.staged(graph, [(lora, 1.0)])
    text = "Pixel art style. A fisherman in a harbour, warm evening light, close-up"
    positive, negative = texts(graph, loaded.clip, text)
    latent = graph.add("EmptySD3LatentImage", width=1024, height=1024)
    graph.column("Sampling")
    shifted = graph.add("ModelSamplingAuraFlow", model=model, shift=3.0)
    samples = graph.add(
        "KSampler",
        **{"model": shifted, "positive": positive, "negative": negative, "latent_image": latent, "seed": 1, "steps": 8},
        **{"cfg": 1.0, "sampler_name": "res_multistep", "scheduler": "simple"},
    )
    picture(graph, samples, loaded.vae, "z_image")


def wan22(graph: Graph) -> None:
    noises = ("high", "low")
    models = [f"Wan2.2-T2V-A14B-{noise.title()}Noise-Q4_K_M.gguf" for noise in noises]
    loras = [f"wan2.2_t2v_lightx2v_4steps_lora_v1.1_{noise}_noise.safetensors" for noise in noises]
    clip, vae = "umt5-xxl-encoder-Q5_K_M.gguf", "wan_2.1_vae.safetensors"
    note(
        graph,
        "Wan 2.2, text to video, 14B",
        [*models, clip, vae, *loras],
        "Two experts take turns: high noise draws the first steps, low noise the rest. Both share one budget, and the "
        "second gets the room of the first.",
        "The LoRAs make 4 steps without guidance enough. Without them: bypass both, 20 steps, cfg 3.5, and the change "
        "at step 10.",
    )
    loaded = Loaded(graph, models, "wan", [clip], vae)
    experts = loaded.staged(graph, *([(lora, 1.0)] for lora in loras))
    positive, negative = texts(
        graph,
        loaded.clip,
        "a sailing boat turns into the wind, spray over the bow, drone shot",
        "blurry, static, subtitles",
    )
    latent: Any = graph.add("EmptyHunyuanLatentVideo", width=640, height=640, length=81)
    graph.column("Sampling")
    common = {"steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "noise_seed": 1}
    turns = (
        {"add_noise": "enable", "start_at_step": 0, "end_at_step": 2, "return_with_leftover_noise": "enable"},
        {"add_noise": "disable", "start_at_step": 2, "end_at_step": 4, "return_with_leftover_noise": "disable"},
    )
    for noise, expert, turn in zip(noises, experts, turns, strict=True):
        shifted = graph.add("ModelSamplingSD3", model=expert, shift=5.0)
        inputs = {"model": shifted, "positive": positive, "negative": negative, "latent_image": latent}
        latent = graph.add("KSamplerAdvanced", f"Sampler, {noise} noise", **inputs, **turn, **common)
    graph.column("Video")
    video(graph, latent, loaded.vae, "wan22", 16.0)


def sd35(graph: Graph) -> None:
    clips = ["clip_l.safetensors", "clip_g.safetensors", "t5-v1_1-xxl-encoder-Q5_K_M.gguf"]
    model, vae = "sd3.5_large-Q5_1.gguf", "sd3.5_vae.safetensors"
    lora = "SD35-lora-Chinese-Line-Art.safetensors"
    remark = f"`{vae}` is the repository's `vae/diffusion_pytorch_model.safetensors`, saved under this name."
    style = f"The LoRA listens to *Chinese line art*. Without it: bypass **Apply LoRA** (Ctrl+B). {STACK}"
    note(graph, "Stable Diffusion 3.5 Large", [model, *clips, vae, lora], remark, style)
    loaded = Loaded(graph, [model], "sd3", clips, vae)
    (staged,) = loaded.staged(graph, [(lora, 1.0)])
    positive, negative = texts(graph, loaded.clip, "Chinese line art, two cranes between reeds at a lake", "")
    latent = graph.add("EmptySD3LatentImage", width=1024, height=1024)
    graph.column("Sampling")
    samples = graph.add(
        "KSampler",
        **{"model": staged, "positive": positive, "negative": negative, "latent_image": latent, "seed": 1, "steps": 20},
        **{"cfg": 4.0, "sampler_name": "euler", "scheduler": "sgm_uniform"},
    )
    picture(graph, samples, loaded.vae, "sd35")


def sdxl(graph: Graph) -> None:
    clips = ["clip_l.safetensors", "clip_g.safetensors"]
    model, vae = "sd_xl_base_1.0-Q8_0.gguf", "sdxl_vae.safetensors"
    loras = {"sdxl_lightning_8step_lora.safetensors": 1.0, "sd_xl_offset_example-lora_1.0.safetensors": 0.3}
    remark = (
        f"`{model}` you make yourself: **Load Checkpoint** with `sd_xl_base_1.0.safetensors`, its MODEL into **Save "
        "GGUF**, type Q8_0, and rename the file. Any SDXL checkpoint will do; take its CLIP and VAE where it has its "
        "own."
    )
    stack = (
        "The first LoRA makes 8 steps without guidance enough. Without it: bypass its **Apply LoRA** (Ctrl+B), 25 "
        f"steps, cfg 7. The second makes dark darker and light lighter. {STACK}"
    )
    note(graph, "SDXL", [model, *clips, vae, *loras], remark, stack)
    loaded = Loaded(graph, [model], "sdxl", clips, vae)
    (staged,) = loaded.staged(graph, list(loras.items()))
    positive, negative = texts(
        graph, loaded.clip, "an old tram in a snowy street, evening, photograph", "text, watermark"
    )
    latent = graph.add("EmptyLatentImage", width=1024, height=1024)
    graph.column("Sampling")
    samples = graph.add(
        "KSampler",
        **{"model": staged, "positive": positive, "negative": negative, "latent_image": latent, "seed": 1, "steps": 8},
        **{"cfg": 1.0, "sampler_name": "euler", "scheduler": "sgm_uniform"},
    )
    picture(graph, samples, loaded.vae, "sdxl")


def ltx(graph: Graph) -> None:
    model, clip = "ltx-video-2b-v0.9.5-Q8_0.gguf", "t5-v1_1-xxl-encoder-Q5_K_M.gguf"
    lora, vae = "ltxv_095_cakeify_lora.safetensors", "ltx-video-2b-v0.9.5.safetensors"
    prompts = "This model needs long prompts: a short one gives a poor video. `CAKEIFY` is what the LoRA listens to."
    only_vae = "Of the checkpoint only the VAE is used: it is not to be had alone."
    note(graph, "LTX-Video 2B", [model, clip, vae, lora], prompts, only_vae, STACK)
    loaded = Loaded(graph, [model], "ltxv", [clip], vae)
    (staged,) = loaded.staged(graph, [(lora, 1.0)])
    positive, negative = texts(
        graph,
        loaded.clip,
        "CAKEIFY a person using a knife to cut a cake shaped like a rubber boot. The boot is dark green and stands on "
        "a wooden table beside a window. The camera is close and does not move. The knife goes down slowly, and a "
        "slice of sponge and white cream falls to the side. The light is soft, and the scene looks like real footage.",
        "low quality, worst quality, deformed, distorted, motion smear, motion artifacts",
    )
    latent = graph.add("EmptyLTXVLatentVideo", width=768, height=512, length=97)
    timed = graph.add("LTXVConditioning", positive=positive, negative=negative, frame_rate=25.0)
    graph.column("Sampling")
    sigmas = graph.add("LTXVScheduler", latent=latent, steps=30)
    sampler = graph.add("KSamplerSelect", sampler_name="euler")
    samples = graph.add(
        "SamplerCustom",
        **{"model": staged, "positive": timed, "negative": timed[1], "sampler": sampler, "sigmas": sigmas},
        **{"latent_image": latent, "add_noise": True, "noise_seed": 1, "cfg": 3.0},
    )
    graph.column("Video")
    video(graph, samples, loaded.vae, "ltx", 25.0)


RECIPES: tuple[Callable[[Graph], None], ...] = (flux1, flux2, qwen_image, z_image, wan22, sd35, sdxl, ltx)


def name_of(recipe: Callable[[Graph], None]) -> str:
    return f"sluice_{recipe.__name__}"


def written(recipe: Callable[[Graph], None], definitions: dict[str, Any]) -> str:
    """The file's content, for a server with these `/object_info` definitions."""
    graph = Graph(definitions, name_of(recipe))
    recipe(graph)
    return json.dumps(graph.saved(), indent=2, ensure_ascii=False) + "\n"


def place_files(models: Path) -> None:
    """An empty file for each model, so that a server offers their names."""
    for name, (folder, _) in FILES.items():
        place = models / folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()


def main() -> None:
    from pack.tools import host
    from pack.tools.server import Server

    with tempfile.TemporaryDirectory() as base:
        place_files(Path(base) / "models")
        with Server(host.find(), Path(base), "--cpu") as server:
            definitions = server.object_info()
    for recipe in RECIPES:
        path = FOLDER / f"{name_of(recipe)}.json"
        path.write_text(written(recipe, definitions), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
