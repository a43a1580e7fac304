"""How long a vocabulary of 262,144 words takes: to open, to make its tokenizer, to become a CLIP, to be looked up.

    python dev.py bench vocabulary [-- --rounds 5 --out results/vocabulary.json]

The file has Gemma 2's shapes with two layers (a table of 262,144 x 2304 in Q8_0, 642 MB), random weights, and tokens
that are made up but as long as Gemma's. Then each form of a tokenizer is made by itself, out of as many tokens and
merges as its model has. Every round runs in this process with the file in the page cache; the host itself takes
sentencepiece's model apart for its own list of words, which is its time, not ours. On a machine with other work to do,
the CPU's time says more than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ARGUMENTS = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.text_encoders.llama  # noqa: E402
import gguf  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from pack.loaders.gguf.reader import GGUFFile  # noqa: E402
from pack.loaders.text_encoder import load_text_encoder  # noqa: E402
from pack.loaders.text_tensors import text_encoder_tensors  # noqa: E402
from pack.loaders.tokenizers import tokenizer_tensors  # noqa: E402

WORDS, WIDTH, LAYERS = 262144, 2304, 3
UMT5_MARK = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
FEWER_LAYERS = {"vocab_size": WORDS, "num_hidden_layers": LAYERS}


def write(path: Path) -> None:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "gemma2")
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"w{number:x}▁" for number in range(WORDS - 4))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(number) for number in range(WORDS)])
    writer.add_token_types([3, 3, 3, 2] + [1] * (WORDS - 4))
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)

    def add(name: str, rows: int, columns: int) -> None:
        blocks = rng.integers(0, 256, (rows, columns // 32, 34), dtype=np.uint8)
        blocks[..., :2] = np.array([0.001], np.float16).view(np.uint8)
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    add("token_embd.weight", WORDS, WIDTH)
    sizes = {"attn_q": (2048, WIDTH), "attn_k": (1024, WIDTH), "attn_v": (1024, WIDTH), "attn_output": (WIDTH, 2048)}
    sizes |= {"ffn_gate": (9216, WIDTH), "ffn_up": (9216, WIDTH), "ffn_down": (WIDTH, 9216)}
    norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    for layer in range(LAYERS):
        for name, (rows, columns) in sizes.items():
            add(f"blk.{layer}.{name}.weight", rows, columns)
        for name in norms:
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass(frozen=True)
class Kind:
    """A tokenizer of a model, with as many tokens and merges as that has."""

    architecture: str
    model: str
    tokens: int
    merges: int = 0
    pre: str = ""
    marks: tuple[str, ...] = ()  # tensors by which it is known


KINDS = {
    "sentencepiece (Gemma 3)": Kind("gemma3", "llama", WORDS),
    "sentencepiece (umT5)": Kind("t5", "t5", 256384, marks=(UMT5_MARK,)),
    "tekken (Mistral)": Kind("mistral3", "gpt2", 131072, pre="tekken"),
    "tokenizer.json (Gemma 4)": Kind("gemma4", "gemma4", WORDS, 514906),
    "tokenizer.json (gpt-oss)": Kind("gpt-oss", "gpt2", 201088, 446189),
}


def write_tokenizer(path: Path, kind: Kind) -> None:
    writer = gguf.GGUFWriter(path, kind.architecture)
    writer.add_tokenizer_model(kind.model)
    writer.add_tokenizer_pre(kind.pre)
    writer.add_token_list(["<pad>", "<eos>", "<bos>", "<unk>", *(f"w{number:x}" for number in range(kind.tokens - 4))])
    writer.add_token_scores([-float(number) for number in range(kind.tokens)])
    writer.add_token_types([3, 3, 3, 2] + [1] * (kind.tokens - 4))
    writer.add_unk_token_id(3)
    if kind.merges:
        writer.add_token_merges([f"w{number:x} \u0120{number}" for number in range(kind.merges)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


Times = dict[str, list[tuple[float, float]]]


@contextmanager
def timed(seconds: Times, stage: str) -> Iterator[None]:
    start, busy = time.perf_counter(), time.process_time()
    yield
    seconds.setdefault(stage, []).append((time.perf_counter() - start, time.process_time() - busy))


def run(path: Path, seconds: Times) -> None:
    with timed(seconds, "open the file"):
        file = GGUFFile(path)
    with timed(seconds, "name and map all tensors, with the tokenizer"):
        tensors = text_encoder_tensors(file)
    del tensors
    file.close()
    with timed(seconds, "file to CLIP, with the host's own time"):
        clip = load_text_encoder([path], "lumina2")
    tokens = torch.arange(256).reshape(1, -1) * 1000
    with timed(seconds, "look 256 words up"):
        clip.cond_stage_model.gemma2_2b.transformer.model.embed_tokens(tokens, out_dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(ARGUMENTS)
    torch.set_num_threads(2)
    config = comfy.text_encoders.llama.Gemma2_2B_Config
    config.__init__.__defaults__ = tuple(
        FEWER_LAYERS.get(name, old)
        for name, old in zip(config.__dataclass_fields__, config.__init__.__defaults__, strict=True)
    )
    seconds: Times = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "vocabulary.gguf"
        write(path)
        for _ in range(options.rounds):
            run(path, seconds)
        for name, kind in KINDS.items():
            write_tokenizer(path, kind)
            for _ in range(options.rounds):
                with GGUFFile(path) as file, timed(seconds, f"make {name}"):
                    tokenizer_tensors(file, dict.fromkeys(kind.marks, torch.zeros(1)))
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    print(f"{WORDS} words x {WIDTH}, Q8_0; {machine}")
    print(f"{'median of ' + str(options.rounds):46s}  on the clock   of the CPU")
    for stage, values in seconds.items():
        wall, busy = (median(column) for column in zip(*values, strict=True))
        print(f"{stage:46s} {wall:9.3f} s   {busy:9.3f} s")
    if options.out:
        options.out.write_text(json.dumps({"machine": machine, "seconds": seconds}, indent=1), encoding="utf-8")


main()
