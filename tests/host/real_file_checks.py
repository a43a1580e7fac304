"""A real file in the host: its tensors against gguf-py's, its logits against transformers'.

`python real_file_checks.py FILE`, which is Gemma 3 270M, prints what was found as JSON.

The host has no Gemma 3 of this size, so the sizes of its 4B are replaced by those in the file.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace

(FILE,) = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import gguf  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from host.encoder_files import shrunk  # noqa: E402
from host.tiny_encoder import ENCODERS  # noqa: E402
from pack.loaders.gguf.reader import GGUFFile  # noqa: E402
from pack.loaders.quant.layout import dense, is_gguf  # noqa: E402
from pack.loaders.text_encoder import load_text_encoder  # noqa: E402
from pack.loaders.text_names import DIALECTS  # noqa: E402
from pack.loaders.text_tensors import text_encoder_tensors  # noqa: E402
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint  # noqa: E402

SENTENCE = "The capital of France is"
FALLBACKS: list[str] = []
SIZES = {
    **{"vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18},
    **{"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "rope_scale": [1.0, 1.0]},
    **{"sliding_attention": [512, 512, 512, 512, 512, False]},
}


class Listener(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        FALLBACKS.append(record.getMessage())


def against_gguf_py() -> dict[str, object]:
    """Which tensors differ from what gguf-py reads, and which are none of the file's."""
    wrong = []
    with GGUFFile(FILE) as file:
        ours = text_encoder_tensors(file)
        reader = gguf.GGUFReader(FILE)
        for tensor in reader.tensors:
            name = DIALECTS["gemma3"].translate(tensor.name) or ""
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            if name.endswith("norm.weight"):
                expected -= 1
            given = ours.pop(name, torch.empty(0))
            values = dense(given, torch.float32)
            plain = tensor.tensor_type == gguf.GGMLQuantizationType.F32
            if is_gguf(given) == plain or not np.array_equal(values.numpy(), expected):
                wrong.append(tensor.name)
        return {"tensors_in_file": len(reader.tensors), "wrong": wrong, "left": list(ours)}


def our_logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Of a sentence: its tokens and their logits."""
    tiny = ENCODERS["gemma3_4b"]
    (place,) = tiny.sizes
    with shrunk(replace(tiny, sizes={place: SIZES})):
        clip = load_text_encoder([FILE], "lumina2")
        tokens = torch.tensor([[token for token, _ in clip.tokenize(SENTENCE)["gemma3_4b"][0]]])
        clip.load_model()
        encoder = clip.cond_stage_model.gemma3_4b.transformer.model
        logits = torch.nn.functional.linear(encoder(tokens, dtype=torch.float32)[0], encoder.embed_tokens.weight)
        return tokens, logits


def their_logits(tokens: torch.Tensor) -> torch.Tensor:
    """As `from_pretrained(gguf_file=...)` does it, which asks for one more package to be installed."""
    same = {k: v for k, v in SIZES.items() if k not in ("rope_scale", "sliding_attention")}
    config = transformers.Gemma3TextConfig(**same, sliding_window=512, attn_implementation="eager")  # type: ignore[arg-type, call-arg]
    model = transformers.Gemma3ForCausalLM(config).eval()
    read = load_gguf_checkpoint(FILE, return_tensors=True, model_to_load=model, torch_dtype=torch.float32)
    missing, unexpected = model.load_state_dict(read["tensors"], strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model(tokens).logits


def main() -> None:
    kitchen = logging.getLogger("comfy_kitchen.tensor.base")
    kitchen.setLevel(logging.DEBUG)
    kitchen.addHandler(Listener())
    checked = against_gguf_py()
    FALLBACKS.clear()
    with torch.inference_mode():
        tokens, ours = our_logits()
        theirs = their_logits(tokens)
    found = {
        "tokens": tokens.shape[1],
        "same_words": torch.equal(ours.argmax(-1), theirs.argmax(-1)),
        "difference": float((ours - theirs).abs().max() / theirs.abs().max()),
        "fallbacks": FALLBACKS,
    }
    print(json.dumps(checked | found))


main()
