"""The tokenizer of a GGUF text encoder, in the form in which the host wants it beside the weights.

Most of the host's text encoders bring their own tokenizer. Some take it from the state dict, as bytes: a
sentencepiece model (`spiece_model`: umT5, Gemma 2 and 3), Mistral's tekken (`tekken_model`) or the JSON of the
tokenizers library (`tokenizer_json`: Gemma 4, gpt-oss). A GGUF file holds the vocabulary as metadata instead, so the
form is made again from that. A vocabulary has up to 262144 entries; each form is made in well under a second.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from . import sentencepiece_proto
from .gguf.reader import GGUFError, GGUFFile
from .tokenizer_json import byte_level_json, spaces_as_letters_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types, and sentencepiece's

INCOMPLETE = "use a conversion that has its tokenizer, such as one made by llama.cpp"

# As in Mistral's tekken.json, versions 3 and later.
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Vocabulary:
    """What the metadata of a file says of its tokenizer."""

    file: GGUFFile

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"tokenizer.ggml.{key}", default)

    def special(self, role: str) -> int | None:
        """The number of the token with a role (`bos`, `eos`, `unknown`, `padding`)."""
        number = self.get(f"{role}_token_id")
        return number if isinstance(number, int) and 0 <= number < len(self.tokens) else None

    @cached_property
    def tokens(self) -> list[str]:
        return self._list("tokens", str)

    @cached_property
    def types(self) -> list[int]:
        return self._list("token_type", int) if "tokenizer.ggml.token_type" in self.file.metadata else [NORMAL] * self.n

    @cached_property
    def scores(self) -> list[float]:
        return self._list("scores", float)

    @property
    def n(self) -> int:
        return len(self.tokens)

    def _list(self, key: str, kind: type) -> list[Any]:
        values = self.get(key)
        if not isinstance(values, list) or not values or not isinstance(values[0], kind):
            raise self.error(f"it has no list 'tokenizer.ggml.{key}', from which its tokenizer could be made")
        if key != "tokens" and len(values) != self.n:
            raise self.error(f"'tokenizer.ggml.{key}' has {len(values)} entries for {self.n} tokens")
        return values

    def error(self, problem: str) -> GGUFError:
        return GGUFError(self.file.path, problem, INCOMPLETE)


def _sentencepiece(vocabulary: Vocabulary) -> bytes:
    """For umT5 and Gemma. llama.cpp marks what Gemma's sentencepiece model calls user-defined (`<start_of_turn>`, ...)
    as control tokens, which sentencepiece would not look for in a text; and it writes their spaces as spaces."""
    roles = {role: vocabulary.special(role) for role in ("unknown", "bos", "eos", "padding")}
    reserved = {number for number in roles.values() if number is not None}
    types = list(vocabulary.types)
    if vocabulary.get("model") == "llama":
        types = [
            USER_DEFINED if kind == CONTROL and number not in reserved else kind for number, kind in enumerate(types)
        ]
    if roles["unknown"] is None:
        roles["unknown"] = next((number for number, kind in enumerate(types) if kind == UNKNOWN), None)
    if roles["unknown"] is None:
        raise vocabulary.error("its tokenizer has no token for what it does not know")
    types[roles["unknown"]] = UNKNOWN
    return sentencepiece_proto.model(
        [token.replace(" ", "▁") for token in vocabulary.tokens],
        vocabulary.scores,
        types,
        roles,
        bpe=vocabulary.get("model") == "llama",
        add_dummy_prefix=bool(vocabulary.get("add_space_prefix", True)),
        remove_extra_whitespaces=bool(vocabulary.get("remove_extra_whitespaces", False)),
        charsmap=bytes(b & 0xFF for b in vocabulary.get("precompiled_charsmap", [])),
        byte_fallback=BYTE in types,
    )


def _byte_values() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _tekken(vocabulary: Vocabulary) -> bytes:
    """Mistral's: special tokens first, then the others by rank, as bytes."""
    value_of = _byte_values()
    specials = next((n for n, kind in enumerate(vocabulary.types) if kind == NORMAL), vocabulary.n)
    try:
        ranked = [bytes([value_of[letter] for letter in token]) for token in vocabulary.tokens[specials:]]
    except KeyError as error:
        raise vocabulary.error(f"a token of its tokenizer has the letter {error}, which stands for no byte") from error
    return json.dumps(
        {
            "config": {
                "pattern": TEKKEN_PATTERN,
                "num_vocab_tokens": len(ranked),
                "default_vocab_size": vocabulary.n,
                "default_num_special_tokens": specials,
                "version": "v3",
            },
            "vocab": [
                {"rank": rank, "token_bytes": base64.b64encode(token).decode("ascii"), "token_str": None}
                for rank, token in enumerate(ranked)
            ],
            "special_tokens": [
                {"rank": rank, "token_str": token, "is_control": True}
                for rank, token in enumerate(vocabulary.tokens[:specials])
            ],
        }
    ).encode()


def _merges(vocabulary: Vocabulary) -> list[str]:
    merges = vocabulary.get("merges")
    if not isinstance(merges, list) or not merges or not isinstance(merges[0], str):
        raise vocabulary.error("it has no list 'tokenizer.ggml.merges', from which its tokenizer could be made")
    return merges


def _json_of_bytes(vocabulary: Vocabulary) -> bytes:
    added = [n for n, kind in enumerate(vocabulary.types) if kind in (CONTROL, USER_DEFINED)]
    return byte_level_json(vocabulary.tokens, _merges(vocabulary), added)


def _json_of_spaces(vocabulary: Vocabulary) -> bytes:
    added = [n for n, kind in enumerate(vocabulary.types) if kind in (CONTROL, USER_DEFINED)]
    unknown = vocabulary.special("unknown")
    return spaces_as_letters_json(vocabulary.tokens, _merges(vocabulary), added, unknown)


@dataclass(frozen=True)
class Form:
    """A tokenizer as the host wants it: its key in the state dict and how it is made."""

    key: str
    make: Callable[[Vocabulary], bytes]


_SPIECE, _TEKKEN = Form("spiece_model", _sentencepiece), Form("tekken_model", _tekken)

# (general.architecture, tokenizer.ggml.model) -> what the host wants; what is not here, it brings itself.
FORMS: dict[tuple[str, str], Form] = {
    ("gemma2", "llama"): _SPIECE,
    ("gemma3", "llama"): _SPIECE,
    ("llama", "gpt2"): _TEKKEN,  # but for Llama 3's, see below
    ("mistral3", "gpt2"): _TEKKEN,
    ("gemma4", "gemma4"): Form("tokenizer_json", _json_of_spaces),
    ("gpt-oss", "gpt2"): Form("tokenizer_json", _json_of_bytes),
}
TOKENIZER_KEYS = frozenset(form.key for form in FORMS.values())
TEKKEN_PRE = "tekken"  # `tokenizer.ggml.pre`
# Of the T5s, umT5 and Pile-T5 (AuraFlow) have relative positions in every layer. Only umT5's tokenizer is not the
# host's, which knows the other, an XL, by the rows of a matrix.
_EVERY_LAYER_MARK = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
_PILE_T5_MARK, _PILE_T5_ROWS = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight", 5120


def tokenizer_tensors(file: GGUFFile, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tokenizer under the host's key as uint8, or nothing where the host has its own or the tensors hold one.

    Args:
        tensors: the file's, by the host's names.

    Raises:
        GGUFError: the host needs one, and the metadata does not tell it.
    """
    form = _form(file, tensors)
    if form is None or form.key in tensors:
        return {}
    return {form.key: torch.frombuffer(bytearray(form.make(Vocabulary(file))), dtype=torch.uint8)}


def _form(file: GGUFFile, tensors: Mapping[str, torch.Tensor]) -> Form | None:
    if _EVERY_LAYER_MARK in tensors:
        known_by = tensors.get(_PILE_T5_MARK)
        return None if known_by is not None and known_by.shape[0] == _PILE_T5_ROWS else _SPIECE
    architecture, model = (str(file.metadata.get(key)) for key in ("general.architecture", "tokenizer.ggml.model"))
    form = FORMS.get((architecture, model))
    if form is _TEKKEN and architecture == "llama" and file.metadata.get("tokenizer.ggml.pre") != TEKKEN_PRE:
        return None
    return form
