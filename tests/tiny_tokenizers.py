"""Small tokenizers of the kinds that text encoders have, and what llama.cpp's converter makes of them in a GGUF.

Each is trained on a page of text by the library that the real ones come from. What the converter does to tokens
follows its code (`_create_vocab_sentencepiece` and `set_vocab` in llama.cpp's conversion/).
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
TURNS = ("<start_of_turn>", "<end_of_turn>")
TEXTS = (
    "a red seven on white",
    "",
    " leading, trailing ",
    "two  spaces\n\nand\ttabs",
    "<start_of_turn>user\nDraw 1234567 things!<end_of_turn>\n",
    "naïve café, 日本語 and 😀 <0x41> <unk>",
    "It's THEY'RE we'll don't",
)


@dataclass(frozen=True)
class Tiny:
    """A tokenizer: the bytes that the host wants, the metadata that a GGUF has, and what it does to a text."""

    native: bytes
    metadata: dict[str, Any]
    encode: Callable[[str], list[int]]

    @property
    def tokens(self) -> list[str]:
        return self.metadata["tokenizer.ggml.tokens"]


def _trained(lines: Sequence[str], **options: Any) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, byte_fallback=True, minloglevel=2, **options
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def _piece_type(model: sentencepiece.SentencePieceProcessor, number: int) -> int:
    checks = {UNKNOWN: model.is_unknown, CONTROL: model.is_control, UNUSED: model.is_unused, BYTE: model.is_byte}
    return next((kind for kind, check in checks.items() if check(number)), NORMAL)


def bpe(lines: Sequence[str], size: int) -> Tiny:
    """As Gemma 2 and 3 have it: BPE, no dummy prefix, turns, newlines and runs of spaces as user-defined pieces."""
    defined = [*TURNS, "\n", "\n\n", "▁▁", "<unused0>"]
    model = _trained(
        lines,
        model_type="bpe",
        vocab_size=size,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=defined,
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
        **{"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"},
    )
    tokens, scores, types = [], [], []
    for number in range(model.get_piece_size()):
        token, kind, score = model.id_to_piece(number), _piece_type(model, number), model.get_score(number)
        if token in defined or kind in (CONTROL, UNKNOWN):
            # `added_tokens_decoder`: what looks special becomes a control token, the rest has its spaces back.
            special = token.startswith("<")
            kind, score = (CONTROL if special else USER_DEFINED), -1000.0
            token = token if special else token.replace("▁", " ")
        tokens.append(token)
        scores.append(score)
        types.append(kind)
    return Tiny(
        model.serialized_model_proto(),
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.padding_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.ggml.bos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 3,
            "tokenizer.ggml.add_space_prefix": False,
        },
        model.encode,
    )


def unigram(lines: Sequence[str], size: int) -> Tiny:
    """As umT5 has it: unigram, characters normalised by a compiled map, unused rows at the end."""
    model = _trained(
        lines, model_type="unigram", vocab_size=size, **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    )
    numbers = range(model.get_piece_size())
    charsmap = _field(_field(model.serialized_model_proto(), 3), 2)
    padding = [f"[PAD{n}]" for n in range(4)]
    return Tiny(
        model.serialized_model_proto(),
        {
            "tokenizer.ggml.model": "t5",
            "tokenizer.ggml.tokens": [*map(model.id_to_piece, numbers), *padding],
            "tokenizer.ggml.scores": [*map(model.get_score, numbers), *[-10000.0] * len(padding)],
            "tokenizer.ggml.token_type": [*(_piece_type(model, n) for n in numbers), *[UNUSED] * len(padding)],
            "tokenizer.ggml.padding_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.ggml.unknown_token_id": 2,
            "tokenizer.ggml.add_space_prefix": True,
            "tokenizer.ggml.remove_extra_whitespaces": True,
            "tokenizer.ggml.precompiled_charsmap": list(charsmap),
        },
        model.encode,
    )


def _field(message: bytes, wanted: int) -> bytes:
    """The last length-delimited field of a protobuf message with that number."""
    position, found = 0, b""

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            varint()
        elif wire == 5:
            position += 4
        else:
            size = varint()
            if number == wanted:
                found = message[position : position + size]
            position += size
    return found


def byte_level(lines: Sequence[str], size: int, pattern: str, specials: Sequence[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "removed", invert=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def _metadata(model: str, tokenizer: tokenizers.Tokenizer, specials: Sequence[str]) -> dict[str, Any]:
    numbers = tokenizer.get_vocab()
    tokens = sorted(numbers, key=numbers.__getitem__)
    document = json.loads(tokenizer.to_str())
    kinds = dict.fromkeys(specials, CONTROL)
    return {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            kinds.get(token, BYTE if model == "gemma4" and token.startswith("<0x") else NORMAL) for token in tokens
        ],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in document["model"]["merges"]],
    }


def bytes_json(lines: Sequence[str], size: int, pattern: str) -> Tiny:
    """As gpt-oss has it; `pattern` is what its texts are split by."""
    specials = ["<|startoftext|>", "<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>"]
    tokenizer = byte_level(lines, size, pattern, specials)
    return Tiny(
        tokenizer.to_str().encode(),
        _metadata("gpt2", tokenizer, specials) | {"tokenizer.ggml.pre": "gpt-4o"},
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
    )


def spaces_json(lines: Sequence[str], size: int) -> Tiny:
    """As Gemma 4 has it: spaces replaced by a letter, bytes for unknown characters."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", *TURNS]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*specials, *byte_tokens], show_progress=False, max_token_length=12
    )
    tokenizer.train_from_iterator(lines, trainer)
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] in specials]
    native = json.dumps(document)
    plain = tokenizers.Tokenizer.from_str(native)
    metadata = _metadata("gemma4", plain, specials) | {
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
    }
    return Tiny(native.encode(), metadata, lambda text: plain.encode(text, add_special_tokens=False).ids)


def tekken(lines: Sequence[str], size: int, pattern: str) -> Tiny:
    """As Mistral has it: special tokens first, then byte sequences by rank. The merges follow from the ranks."""
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<SPECIAL_5>"]
    tokenizer = byte_level(lines, size, pattern, specials)
    letters = {letter: byte for byte, letter in _letters().items()}
    metadata = _metadata("gpt2", tokenizer, specials) | {"tokenizer.ggml.pre": "tekken"}
    tokens = metadata["tokenizer.ggml.tokens"]
    ranked = [bytes(letters[letter] for letter in token) for token in tokens[len(specials) :]]
    native = {
        "config": {
            "pattern": pattern,
            "num_vocab_tokens": len(ranked),
            "default_vocab_size": len(tokens),
            "default_num_special_tokens": len(specials),
            "version": "v3",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for rank, token in enumerate(ranked)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(specials)
        ],
    }
    return Tiny(json.dumps(native).encode(), metadata, lambda text: tokenizer.encode(text).ids)


def _letters() -> dict[int, str]:
    """GPT-2's `bytes_to_unicode`."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in own}
    for byte in range(256):
        letters.setdefault(byte, chr(256 + len(letters) - len(own)))
    return letters
