"""Broken GGUF files: a name, the file's bytes, and words that the error about it must hold (place, cause, remedy)."""

from __future__ import annotations

import struct
from typing import Any

import builders as b

T = b.Tensor
HUGE = 1 << 60


def aligned(value: object) -> bytes:
    return b.gguf_bytes({"general.alignment": value}, [T("w", (4,))])


def nested(depth: int) -> b.Value:
    value = b.array(b.U8, [1])
    for _ in range(depth):
        value = b.array(b.ARRAY, [value])
    return value


def key(value: object) -> bytes:
    """A file with the metadata `k`."""
    return b.gguf_bytes({"k": value})


def one(*row: Any, **wrong: Any) -> bytes:
    """A file with the tensor `w`."""
    return b.gguf_bytes({}, [T("w", *row, **wrong)])


AGAIN = "download it again"
CONVERT = "download or convert it again"
UPDATE = "update ComfyUI-Sluice"

# name -> (content, words of the message)
BROKEN: dict[str, tuple[bytes, tuple[str, ...]]] = {
    # No GGUF at all
    "empty": (b"", ("the file is empty (0 bytes)", AGAIN)),
    "three bytes": (b"GGU", ("the file ends after 3 bytes", AGAIN)),
    "magic only": (b"GGUF", ("the header needs 4 bytes at byte 4, the file ends at byte 4", AGAIN)),
    "unknown magic": (
        b"MODELMODEL",
        ("not a GGUF file: it begins with b'MODE' where 'GGUF' must stand", "another file"),
    ),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ("Git LFS pointer", "git lfs pull")),
    "web page": (
        b"\n <!DOCTYPE html><html>",
        ("it is an HTML page, not a model: the download saved the web page", "link"),
    ),
    "web page with BOM": (b"\xef\xbb\xbf<HTML>", ("HTML page",)),
    "server error": (b'{"error": "Access denied"}', ("a server's error message", AGAIN)),
    "xml error": (b"<?xml version='1.0'?><Error/>", ("a server's error message", AGAIN)),
    "safetensors": (struct.pack("<Q", 30) + b'{"w":{"dtype":"F32"}}', ("safetensors file", "convert it to GGUF")),
    "torch zip": (b"PK\x03\x04" + bytes(40), ("PyTorch file", "convert it to GGUF")),
    "torch pickle": (b"\x80\x02}q\x00.", ("pickled PyTorch file", "convert it to GGUF")),
    "gzip": (b"\x1f\x8b\x08" + bytes(20), ("packed archive", "unpack it")),
    "ggjt": (b"tjgg\x03\0\0\0" + bytes(20), ("GGML file from before GGUF", "download or convert a GGUF version")),
    "reserved space": (bytes(4096), ("begins with zeros", "never filled", AGAIN)),
    # The first lines
    "version 0": (b.gguf_bytes(version=0), ("the header names GGUF version 0",)),
    "version 1": (b.gguf_bytes(version=1), ("GGUF version 1", "reads 2 and 3", "newer version")),
    "version 4": (b.gguf_bytes(version=4), ("GGUF version 4", "reads 2 and 3", UPDATE)),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ("big-endian", "little-endian version")),
    "huge key count": (
        b.gguf_bytes({"a": 1}, key_count=HUGE),
        ("the header announces 1152921504606846976 metadata keys",),
    ),
    "huge tensor count": (
        b.gguf_bytes({}, [T("w", (4,))], tensor_count=HUGE),
        ("the tensor table announces", "tensors"),
    ),
    "one key too many": (b.gguf_bytes({"a": 1}, [T("w", (99,))], key_count=2), ("tensor 1 of 1 has an empty name",)),
    "one tensor too many": (b.gguf_bytes({}, [T("w", (99,))], tensor_count=2), ("tensor 2 of 2 has an empty name",)),
    "empty key": (b.gguf_bytes({"": 1}), ("metadata key 1 of 1 has an empty name", CONVERT)),
    # Metadata
    "huge key length": (
        b.gguf_bytes([("k", 1)]).replace(b.text("k"), b.text("k", HUGE)),
        ("metadata key 1 of 1 has a name of", "at most 65535"),
    ),
    "key past the end": (
        b.gguf_bytes([("k", 1)]).replace(b.text("k"), b.text("k", 999)),
        ("metadata key 1 of 1 needs 999 bytes at byte 32", AGAIN),
    ),
    "key not UTF-8": (
        b.gguf_bytes([(b"\xff\xfe", 1)]),
        ("metadata key 1 of 1 holds a string at byte 32 that is not UTF-8", CONVERT),
    ),
    "value not UTF-8": (key(b"caf\xe9"), ("metadata key 'k' holds a string", "not UTF-8", CONVERT)),
    "huge string": (key(b.string("v", HUGE)), ("metadata key 'k' needs 1152921504606846976 bytes", AGAIN)),
    "largest string": (key(b.string("v", (1 << 64) - 1)), ("metadata key 'k' needs", AGAIN)),
    "same key twice": (b.gguf_bytes([("k", 1), ("k", 2)]), ("metadata key 'k' appears twice", CONVERT)),
    "unknown value type": (key(b.Value(13, bytes(8))), ("metadata key 'k' has the unknown value type 13", UPDATE)),
    "bool of 2": (key(b.number(b.BOOL, 2)), ("metadata key 'k' holds the bool 2", CONVERT)),
    "array of unknown type": (key(b.array(99, [1])), ("'k' is an array of the unknown value type 99", UPDATE)),
    "huge number array": (key(b.array(b.U32, [1], HUGE)), ("'k' is an array of 1152921504606846976 elements", AGAIN)),
    "overflowing array": (key(b.array(b.U64, [1], (1 << 61) + 1)), ("'k' is an array of", "elements", AGAIN)),
    "huge string array": (key(b.array(b.STRING, ["a"], HUGE)), ("'k' is an array of", AGAIN)),
    "string array too long": (
        key(b.array(b.STRING, ["abcdefgh"] * 8, 12)),
        ("'k' is an array of 12 strings that runs past the file's end", AGAIN),
    ),
    "huge string in array": (
        key(b.Value(b.ARRAY, struct.pack("<IQ", b.STRING, 2) + b.text("a", (1 << 64) - 1) + bytes(40))),
        ("metadata key 'k' is an array of 2 strings that runs past",),
    ),
    "huge nested array": (key(b.array(b.ARRAY, [], HUGE)), ("'k' is an array of", AGAIN)),
    "arrays too deep": (key(nested(9)), ("metadata key 'k' nests arrays more than 4 deep",)),
    # Alignment
    "alignment 0": (aligned(0), ("metadata key 'general.alignment' is 0, it must be a power of two", CONVERT)),
    "alignment 4": (aligned(4), ("'general.alignment' is 4",)),
    "alignment 48": (aligned(48), ("'general.alignment' is 48",)),
    "alignment 2^31": (aligned(1 << 31), ("'general.alignment' is 2147483648",)),
    "alignment -8": (aligned(b.number(b.INT32, -8)), ("'general.alignment' is -8",)),
    "alignment text": (aligned("32"), ("'general.alignment' is no number",)),
    "alignment list": (aligned(b.array(b.U32, [32])), ("'general.alignment' is no number",)),
    "alignment bool": (aligned(True), ("'general.alignment' is True",)),
    "alignment float": (aligned(32.0), ("'general.alignment' is 32.0",)),
    # Tensor table
    "same tensor twice": (
        b.gguf_bytes({}, [T("w", (4,)), T("w", (4,))]),
        ("tensor 'w' appears twice", CONVERT),
    ),
    "tensor name not UTF-8": (
        b.gguf_bytes({}, [T(b"\xc3", (4,))]),
        ("tensor 1 of 1 holds a string", "not UTF-8", CONVERT),
    ),
    "huge tensor name": (one((4,), name_nbytes=HUGE), ("tensor 1 of 1 has a name of", CONVERT)),
    "nine dimensions": (one((1,) * 9), ("tensor 'w' has 9 dimensions, at most 8", CONVERT)),
    "2^32-1 dimensions": (one((4,), dims=(1 << 32) - 1), ("tensor 'w' has 4294967295 dimensions",)),
    "overflowing shape": (
        one((1 << 33, 1 << 31), data=b""),
        ("tensor 'w' ends at byte 73786976294838206", "the file has", CONVERT),
    ),
    "shape of 2^504": (one(((1 << 63),) * 8, data=b""), ("tensor 'w' ends at byte", CONVERT)),
    "unknown tensor type": (one((4,), 77), ("tensor 'w' has the unknown tensor type 77", UPDATE)),
    "largest tensor type": (one((4,), (1 << 32) - 1), ("unknown tensor type 4294967295", UPDATE)),
    "broken row": (
        one((2, 48), b.Q8_0),
        ("tensor 'w': rows of 48 elements are not a whole number of Q8_0 blocks", CONVERT),
    ),
    "block scalar": (one((), b.Q8_0), ("tensor 'w': rows of 1 elements", CONVERT)),
    "off alignment": (one((16,), offset=4), ("tensor 'w' begins at byte 4 of the data", "alignment of 32", CONVERT)),
    "past the end": (one((16,), offset=320), ("tensor 'w' ends at byte", "the file has", AGAIN)),
    "largest offset": (one((16,), offset=(1 << 64) - 32), ("tensor 'w' ends at byte", CONVERT)),
    "empty tensor far out": (one((0,), offset=1 << 63), ("tensor 'w' is empty and lies at byte", CONVERT)),
    "overlap": (
        b.gguf_bytes({}, [T("first", (16,)), T("second", (16,), offset=32)]),
        ("tensor 'second' begins at byte", "inside tensor 'first'", CONVERT),
    ),
    "same place": (
        b.gguf_bytes({}, [T("first", (16,)), T("second", (16,), offset=0)]),
        ("inside tensor 'first'", CONVERT),
    ),
    "cut off": (
        b.gguf_bytes({}, [T("blk.3.attn_q.weight", (150,))])[:640],
        ("tensor 'blk.3.attn_q.weight' ends at byte 696, the file has 640; it is incomplete, download it again",),
    ),
    # split.* of a wrong kind
    "split count text": (b.gguf_bytes({"split.count": "2"}), ("metadata key 'split.count' is not a whole number",)),
    "split count list": (b.gguf_bytes({"split.count": b.array(b.U16, [2])}), ("'split.count' is not a whole number",)),
    "split without a name": (
        b.gguf_bytes(b.split_keys(1, 3, 1)),
        ("it is part 2 of 3 of a split model", "-00002-of-00003.gguf"),
    ),
} | {
    f"retired type {number}": (
        one((256,), number),
        (f"tensor 'w' has the type {name} ({number}), which ggml retired", "newer file"),
    )
    for number, name in {
        4: "Q4_2",
        5: "Q4_3",
        31: "Q4_0_4_4",
        32: "Q4_0_4_8",
        33: "Q4_0_8_8",
        36: "IQ4_NL_4_4",
        37: "IQ4_NL_4_8",
        38: "IQ4_NL_8_8",
    }.items()
}
