"""Checks of files whose models have parts that need special care, run inside the host: `python odd_files.py FOLDER`.

Prints one JSON line for each check.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import traceback
from dataclasses import replace
from pathlib import Path

FOLDER = Path(sys.argv[1])
sys.argv = ["main.py", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from host import tiny_files  # noqa: E402
from host.tiny_model import WIDTH, TinyModel  # noqa: E402
from host.tiny_models import ARCHITECTURES  # noqa: E402
from pack.loaders.diffusion import load_diffusion_model  # noqa: E402
from pack.loaders.fit import make_plain_elsewhere  # noqa: E402
from pack.loaders.gguf.errors import GGUFError  # noqa: E402
from pack.loaders.quant.layout import is_gguf  # noqa: E402

HEADS = {"num_attention_heads": 2, "attention_head_dim": 128}
LTXAV = TinyModel(
    "LTXAV",
    "ltxv",
    (1, 128, 2, 4, 4),
    signature={
        "adaln_single.emb.timestep_embedder.linear_1.bias": (WIDTH,),
        "audio_adaln_single.linear.weight": (WIDTH,),
        "transformer_blocks.0.attn2.to_k.weight": (WIDTH, WIDTH),
    },
    metadata={
        "config": json.dumps(
            {
                "transformer": {
                    **HEADS,
                    **{f"audio_{key}": value for key, value in HEADS.items()},
                    **{f"connector_{key}": value for key, value in HEADS.items()},
                    **{"caption_channels": WIDTH, "cross_attention_dim": WIDTH, "audio_cross_attention_dim": WIDTH},
                }
            }
        )
    },
)


def load(tiny: TinyModel, without: str = "nothing", name: str = "model.gguf"):
    """The loaded model, and the file's numbers."""
    with tiny_files.shrunk(tiny):
        tensors = {key: t for key, t in tiny_files.tensors_of(tiny).items() if without not in key}
        tiny_files.write_gguf(FOLDER / name, tiny, tensors)
        return load_diffusion_model(FOLDER / name), tensors


def check_blocks_in_modules_of_the_host() -> None:
    """Wan Animate's motion encoder, whose parameters are copied into, or assigned."""
    patcher, tensors = load(ARCHITECTURES["wan22_animate"])
    network = patcher.model.diffusion_model
    encoder = {k: p for k, p in network.named_parameters() if k.startswith("motion_encoder.")}
    assert {tensors[key].type.name for key in encoder} >= {"Q8_0", "Q4_K", "IQ4_XS"}
    for key, parameter in encoder.items():
        assert not is_gguf(parameter)
        assert torch.equal(parameter, torch.from_numpy(tensors[key].values)), key
    key = "motion_encoder.enc.fc.0.weight"
    quantised = next(p for p in network.parameters() if is_gguf(p))
    ours = {k for k, p in network.named_parameters() if is_gguf(p)}
    layer = network.motion_encoder.enc.fc[0]
    layer.weight = torch.nn.Parameter(quantised, requires_grad=False)  # as a host that assigns
    make_plain_elsewhere(network, torch.bfloat16)
    assert not is_gguf(layer.weight) and torch.equal(layer.weight, quantised.dequantize().bfloat16()), key
    assert {k for k, p in network.named_parameters() if is_gguf(p)} == ours


def check_shapes_of_ones_in_modules_of_the_host() -> None:
    """No table names `FusedLeakyReLU.bias`, (1, channels, 1, 1) in the model and (channels, 1, 1) in the file."""
    patcher, tensors = load(replace(ARCHITECTURES["wan22_animate"], layout="dropped"))
    changed = [key for key, t in tensors.items() if t.stored.ndim == 3 and key.endswith(".bias")]
    assert changed, "no tensor was written with fewer dimensions, so this check could not have failed"
    network = patcher.model.diffusion_model
    for key in changed:
        assert torch.equal(network.get_parameter(key), torch.from_numpy(tensors[key].values)), key


def check_connectors_beside_the_text_encoder() -> None:
    """LTX-2 without embeddings connectors takes processed text, and asks for them where they are needed."""
    whole, _ = load(LTXAV)
    text = torch.randn(1, 128, WIDTH)
    processed = whole.model.diffusion_model.preprocess_text_embeds(text, unprocessed=True)
    assert processed.shape[-1] == 2 * WIDTH

    patcher, tensors = load(LTXAV, without="_connector.", name="bare.gguf")
    network = patcher.model.diffusion_model
    assert tensors and not any("connector" in name for name, _ in network.named_parameters())
    comfy.model_management.load_models_gpu([patcher])
    assert network.preprocess_text_embeds(processed) is processed
    for unprocessed, context in ((True, processed), (False, text)):
        try:
            network.preprocess_text_embeds(context, unprocessed=unprocessed)
        except GGUFError as error:
            assert "bare.gguf: it has no tensors 'video_embeddings_connector.*'" in str(error), error
            assert "embeddings connectors" in str(error).rpartition(";")[2], error
        else:
            raise AssertionError("a connector without weights was used")
    try:
        load(LTXAV, without="video_embeddings_connector.transformer_1d_blocks.1.", name="half.gguf")
    except GGUFError as error:
        assert "'video_embeddings_connector.transformer_1d_blocks.1." in str(error), error
    else:
        raise AssertionError("half a connector went unnoticed")


def check_refused_file_is_let_go() -> None:
    """Though whoever shows the error keeps it, and with it the frames it came through."""
    tiny = ARCHITECTURES["flux"]
    cases = {
        "lacks.gguf": "double_blocks.0.img_mlp.0.weight",  # refused at the end
        "detection.gguf": "txt_in.weight",  # an error of the host's own
        "unknown.gguf": "_blocks.",  # no model at all
    }
    errors = []
    for name, without in cases.items():
        try:
            load(tiny, without, name)
        except GGUFError as error:
            errors.append(error)
        mapped = [m.path for m in psutil.Process().memory_maps(grouped=False) if m.path == str(FOLDER / name)]
        assert not mapped, f"{name}: {errors[-1]}"
    assert len(errors) == len(cases) and all(error.__traceback__ for error in errors), errors


def main() -> None:
    torch.set_num_threads(2)
    logging.disable(logging.WARNING)
    for name, check in sorted(globals().items()):
        if not name.startswith("check_"):
            continue
        try:
            check()
            outcome = ""
        except Exception:
            outcome = traceback.format_exc()
        gc.collect()
        print(json.dumps({"check": name.removeprefix("check_"), "failure": outcome}), flush=True)


main()
