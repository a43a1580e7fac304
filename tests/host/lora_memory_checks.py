"""Host memory of a LoRA on a text encoder of T5's shape from a GGUF file, as one line of JSON in bytes.

    launch.py --pack COMFYUI lora_memory_checks.py FOLDER

The encoder is random and narrow, and has the 24 layers and the long middle by which the host knows T5-XXL.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from dataclasses import replace
from pathlib import Path

FOLDER = Path(sys.argv[1])
sys.argv = ["main.py", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import gguf  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from host import encoder_files  # noqa: E402
from host.tiny_encoder import ENCODERS, TEXT  # noqa: E402
from pack.loaders.text_encoder import load_text_encoder  # noqa: E402
from pack.lora.apply import apply  # noqa: E402
from pack.lora.read import read  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

WIDTH, MIDDLE, RANK = 256, 10240, 32
SIZES = {"d_model": WIDTH, "d_kv": 64, "num_heads": WIDTH // 64, "vocab_size": 32128}
T5 = ENCODERS["t5_xxl"]
TINY = replace(T5, json={"t5_config_xxl.json": {**T5.json["t5_config_xxl.json"], **SIZES}})
ENCODER, LORA = FOLDER / "t5.gguf", FOLDER / "t5_lora.safetensors"


def make_files() -> None:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(ENCODER, TINY.arch)
    adapter: dict[str, torch.Tensor] = {}
    shapes = {key: value.shape for key, value in encoder_files.state_dict(TINY).items()}
    written: set[str] = set()
    for key, shape in shapes.items():
        (name,), _ = encoder_files.llama_cpp(TINY, key)
        if name in written:  # the host names the table of words twice
            continue
        written.add(name)
        if len(shape) < 2 or shape[1] % 32:
            writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32) * 0.02 + (len(shape) == 1))
            continue
        blocks = rng.integers(0, 256, (shape[0] * shape[1] // 32, 34), dtype=np.uint8)
        blocks[:, :2] = np.frombuffer(np.float16(0.0003).tobytes(), np.uint8)
        writer.add_tensor(name, blocks.reshape(shape[0], -1), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        if key.startswith("encoder.block"):
            stem = f"text_encoders.t5xxl.transformer.{key.removesuffix('.weight')}"
            adapter[f"{stem}.lora_down.weight"] = torch.randn(RANK, shape[1]).bfloat16() * 0.01
            adapter[f"{stem}.lora_up.weight"] = torch.randn(shape[0], RANK).bfloat16() * 0.01
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(adapter, LORA)


class Peak:
    """Anonymous memory, seen every 2 ms: file mappings, which the system takes back when it likes, do not count."""

    def __init__(self) -> None:
        self.highest = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        pause = threading.Event()
        while not pause.wait(0.002):
            self.highest = max(self.highest, anonymous())

    def beyond(self, before: int) -> int:
        """The peak since the last call."""
        highest, self.highest = max(self.highest, anonymous()), 0
        return highest - before


def anonymous() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return 1024 * int(fields["RssAnon"].split()[0])


def hidden(clip) -> torch.Tensor:
    with torch.no_grad():
        return clip.encode_from_tokens(clip.tokenize(TEXT)).clone()


def main() -> None:
    torch.set_num_threads(2)
    with encoder_files.shrunk(TINY):
        make_files()
        peak = Peak()
        clip = load_text_encoder([ENCODER], TINY.clip_type)
        plain = hidden(clip)
        hidden(clip)
        before = anonymous()
        peak.beyond(before)
        adapter = read(LORA)
        peaks, stays = [], []
        for strength in (1.0, 0.5, -1.0):
            applied = apply(adapter, None, clip, 1.0, strength)
            assert applied.weights > 100 and not applied.unmatched
            assert not torch.equal(hidden(applied.clip), plain), "the LoRA changes nothing"
            peaks.append(peak.beyond(before))
            ctypes.CDLL(None).malloc_trim(0)  # what a layer worked with is kept by the allocator otherwise
            stays.append(anonymous() - before)
        assert torch.equal(hidden(clip), plain)
    dense = sum(p.numel() for p in clip.cond_stage_model.parameters()) * 4
    print(json.dumps({"peaks": peaks, "stays": stays, "adapter": adapter.nbytes, "dense": dense,
                      "largest": WIDTH * MIDDLE * 4}))  # fmt: skip


if __name__ == "__main__":
    main()
