"""A sentencepiece model written field by field, without sentencepiece's or protobuf's Python classes.

Field numbers are those of sentencepiece_model.proto, where nothing is ever renumbered:

    ModelProto      1 pieces, repeated   2 trainer_spec   3 normalizer_spec
    SentencePiece   1 piece   2 score (float)   3 type
    TrainerSpec     3 model_type (1 unigram, 2 BPE)   4 vocab_size   35 byte_fallback
                    40 to 43 unk_id bos_id eos_id pad_id   45 to 48 unk_piece bos_piece eos_piece pad_piece
    NormalizerSpec  1 name   2 precompiled_charsmap   3 add_dummy_prefix   4 remove_extra_whitespaces
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

_VARINT, _BYTES = 0, 2
_NORMAL = 1  # the default type, which is not written
_ROLES = ("unknown", "bos", "eos", "padding")


def model(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    roles: Mapping[str, int | None],
    *,
    bpe: bool,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    charsmap: bytes,
    byte_fallback: bool,
) -> bytes:
    """A serialised ModelProto.

    Args:
        pieces, scores, types: one of each for every token.
        roles: the numbers of the tokens `unknown`, `bos`, `eos` and `padding`, None for one that there is not.
        bpe: whether the scores are ranks of merges, or else logarithms of probabilities.
        charsmap: how characters are normalised, compiled; empty for not at all.
    """
    trainer = [_number(3, 2 if bpe else 1), _number(4, len(pieces)), _number(35, byte_fallback)]
    for index, role in enumerate(_ROLES):
        number = roles.get(role)
        # -1 as protobuf writes it, in 64 bits.
        trainer.append(_number(40 + index, (1 << 64) - 1 if number is None else number))
        if number is not None:
            trainer.append(_bytes(45 + index, pieces[number].encode()))
    normalizer = [
        _bytes(1, b"nmt_nfkc" if charsmap else b"identity"),
        _bytes(2, charsmap),
        _number(3, add_dummy_prefix),
        _number(4, remove_extra_whitespaces),
    ]
    return b"".join([*_pieces(pieces, scores, types), _bytes(2, b"".join(trainer)), _bytes(3, b"".join(normalizer))])


def _pieces(pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[bytes]:
    """Every piece as a field of the model. The loop runs a quarter of a million times."""
    packed = struct.pack(f"<{len(scores)}f", *scores)
    kinds = {kind: b"" if kind == _NORMAL else _number(3, kind) for kind in set(types)}
    lengths = [_varint(length) for length in range(1 << 10)]
    fields = []
    for index, (piece, kind) in enumerate(zip(pieces, types, strict=True)):
        text = piece.encode()
        size = len(text)
        body = b"\x0a%b%b\x15%b%b" % (
            lengths[size] if size < 1 << 10 else _varint(size),
            text,
            packed[4 * index : 4 * index + 4],
            kinds[kind],
        )
        size = len(body)
        fields.append(b"\x0a" + (lengths[size] if size < 1 << 10 else _varint(size)) + body)
    return fields


def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first, the top bit set on all but the last."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(value)) + value
