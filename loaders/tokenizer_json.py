"""The JSON that Hugging Face's tokenizers library reads, for byte pair encodings out of a GGUF file's metadata.

Two kinds exist among the host's text encoders. gpt-oss splits a text by a pattern and works on bytes, written as
letters as GPT-2 does; Gemma 4 replaces spaces by a letter of their own and falls back to bytes for what it lacks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from json.encoder import encode_basestring
from typing import Any

# o200k, the pattern of GPT-4o and gpt-oss, as tiktoken publishes it.
O200K_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_SPACE = "▁"


def byte_level_json(tokens: Sequence[str], merges: Sequence[str], added: Sequence[int]) -> bytes:
    """For gpt-oss.

    Args:
        tokens: by number.
        merges: `left right`, in the order of application.
        added: the numbers of tokens that are found in a text before it is split.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": O200K_PATTERN}, "behavior": "Removed", "invert": True}
    return _tokenizer(
        tokens,
        added,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level]},
        decoder=byte_level,
        model={"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False},
        merges=merges,
    )


def spaces_as_letters_json(
    tokens: Sequence[str], merges: Sequence[str], added: Sequence[int], unknown: int | None
) -> bytes:
    """For Gemma 4; `unknown` is the number of the token for what is neither a token nor made of byte tokens."""
    decoders = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return _tokenizer(
        tokens,
        added,
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        pre_tokenizer={
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        decoder={"type": "Sequence", "decoders": decoders},
        model={
            "unk_token": None if unknown is None else tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
        },
        merges=merges,
    )


def _tokenizer(
    tokens: Sequence[str],
    added: Sequence[int],
    model: dict[str, Any],
    merges: Sequence[str],
    **parts: dict[str, Any],
) -> bytes:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": tokens[number], **flags} for number in added],
        "normalizer": None,
        "post_processor": None,
        **parts,
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            **model,
        },
    }
    text = json.dumps(document, ensure_ascii=False).removesuffix("}}")  # the document's end and its model's
    return "".join((text, ', "vocab": {', _numbered(tokens), '}, "merges": [', _pairs(merges), "]}}")).encode()


# Of a quarter and half a million of entries, `json.dumps` would first make dictionaries and lists, which takes three
# times as long as to write them.


def _numbered(tokens: Sequence[str]) -> str:
    return ",".join([f"{quoted}:{number}" for number, quoted in enumerate(map(encode_basestring, tokens))])


def _pairs(merges: Sequence[str]) -> str:
    if any(merge.count(" ") != 1 for merge in merges):
        return json.dumps([merge.split(" ", 1) for merge in merges], ensure_ascii=False)[1:-1]
    quoted = "],[".join(map(encode_basestring, merges))
    return f"[{quoted}]".replace(" ", '","') if merges else ""
