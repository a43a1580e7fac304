"""A tokenizer that is made again from a GGUF's metadata does to every text what the one does that it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import builders as b
import pytest
import tiny_tokenizers as tiny
import torch
from pack.loaders import tokenizer_json, tokenizers
from pack.loaders.gguf.reader import GGUFError, GGUFFile

sentencepiece = pytest.importorskip("sentencepiece")
LINES = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").splitlines()
SIZE = 900
Tensors = dict[str, torch.Tensor]
UMT5 = {"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": torch.zeros(8, 2)}


def array(values: list[Any]) -> b.Value:
    return b.array({str: 8, float: 6, int: 5}[type(values[0])], values)


def opened(folder: Path, architecture: str, metadata: dict[str, Any]) -> GGUFFile:
    path = folder / "encoder.gguf"
    encoded = {key: array(value) if isinstance(value, list) else value for key, value in metadata.items()}
    path.write_bytes(b.gguf_bytes({"general.architecture": architecture, **encoded}, []))
    return GGUFFile(path)


def remade(folder: Path, architecture: str, made: tiny.Tiny, tensors: Tensors | None = None) -> tuple[str, bytes]:
    with opened(folder, architecture, made.metadata) as file:
        ((key, tensor),) = tokenizers.tokenizer_tensors(file, tensors or {}).items()
        return key, tensor.numpy().tobytes()


def proto(content: bytes) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=content)


@pytest.mark.parametrize(
    ("architecture", "made", "tensors"),
    [
        ("gemma2", tiny.bpe(LINES, SIZE), {}),
        ("gemma3", tiny.bpe(LINES, SIZE), {}),
        ("t5", tiny.unigram(LINES, SIZE), UMT5),
    ],
    ids=["gemma2", "gemma3", "umt5"],
)
def test_sentencepiece(tmp_path: Path, architecture: str, made: tiny.Tiny, tensors: Tensors) -> None:
    key, content = remade(tmp_path, architecture, made, tensors)
    assert key == "spiece_model"
    ours, theirs = proto(content), proto(made.native)
    for text in (*tiny.TEXTS, *LINES):
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)), text
    for role in ("bos_id", "eos_id", "pad_id", "unk_id"):
        assert getattr(ours, role)() == getattr(theirs, role)()


@pytest.mark.parametrize(
    ("architecture", "made"),
    [
        ("gpt-oss", tiny.bytes_json(LINES, SIZE, tokenizer_json.O200K_PATTERN)),
        ("gemma4", tiny.spaces_json(LINES, SIZE)),
    ],
    ids=["gpt-oss", "gemma4"],
)
def test_json(tmp_path: Path, architecture: str, made: tiny.Tiny) -> None:
    import tokenizers as library

    key, content = remade(tmp_path, architecture, made)
    assert key == "tokenizer_json"
    ours = library.Tokenizer.from_str(content.decode())
    for text in (*tiny.TEXTS, *LINES):
        numbers = ours.encode(text, add_special_tokens=False).ids
        assert numbers == made.encode(text), text
        assert ours.decode(numbers) == library.Tokenizer.from_str(made.native.decode()).decode(numbers), text


@pytest.mark.parametrize("architecture", ["llama", "mistral3"])
def test_tekken(tmp_path: Path, architecture: str) -> None:
    made = tiny.tekken(LINES, SIZE, tokenizers.TEKKEN_PATTERN)
    key, content = remade(tmp_path, architecture, made)
    assert key == "tekken_model"
    assert json.loads(content) == json.loads(made.native)


def test_host_keeps_its_own_tokenizers(tmp_path: Path) -> None:
    llama3 = tiny.tekken(LINES, SIZE, tokenizers.TEKKEN_PATTERN).metadata | {"tokenizer.ggml.pre": "llama-bpe"}
    for architecture, metadata in (
        ("llama", llama3),
        ("qwen3", llama3),
        ("t5encoder", tiny.unigram(LINES, SIZE).metadata),
    ):
        with opened(tmp_path, architecture, metadata) as file:
            assert tokenizers.tokenizer_tensors(file, {}) == {}


def test_relative_positions_in_every_layer_are_umt5s_but_for_pile_t5s(tmp_path: Path) -> None:
    """AuraFlow's Pile-T5-XL, the only one of that width, has the host's tokenizer and need not bring one."""
    name = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"
    with opened(tmp_path, "t5", {}) as file:
        assert tokenizers.tokenizer_tensors(file, {**UMT5, name: torch.zeros(5120, 2)}) == {}
        for others in ({}, {name: torch.zeros(10240, 2)}):
            with pytest.raises(GGUFError):
                tokenizers.tokenizer_tensors(file, {**UMT5, **others})


def test_tokenizer_among_the_tensors_is_kept(tmp_path: Path) -> None:
    with opened(tmp_path, "gemma3", tiny.bpe(LINES, SIZE).metadata) as file:
        assert tokenizers.tokenizer_tensors(file, {"spiece_model": torch.zeros(1)}) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.scores": None}, "no list 'tokenizer.ggml.scores'"),
        ({"tokenizer.ggml.tokens": None}, "no list 'tokenizer.ggml.tokens'"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "'tokenizer.ggml.token_type' has 2 entries"),
    ],
)
def test_vocabulary_that_says_too_little(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    metadata = {k: v for k, v in (tiny.bpe(LINES, SIZE).metadata | change).items() if v is not None}
    with opened(tmp_path, "gemma3", metadata) as file, pytest.raises(GGUFError) as error:
        tokenizers.tokenizer_tensors(file, {})
    assert words in str(error.value)
    assert "made by llama.cpp" in str(error.value)
