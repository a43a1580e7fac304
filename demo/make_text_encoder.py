#!/usr/bin/env python3
"""Write the text encoder of the demo: a CLIP-L that was never trained.

    python make_text_encoder.py demo_clip_l.safetensors     # 247 MB, needs numpy only

The file holds fp16 weights, the same bits on every machine, and goes to
models/text_encoders.  Load it with CLIPLoader, type "sd3".

Why it works: the demo only has to tell a few words apart, and a random transformer gives
every word its own direction.  The diffusion model learned to read those directions.

How the weights are made: PCG64 seeded with 0 gives a stream of raw 64-bit numbers; the
sum of the eight bytes of one number is a bell-shaped integer, scaled and rounded to fp16.
Each matrix is a window sliding over such a sequence, W[i, j] = v[i + j], so neighbouring
rows share no direction but the whole encoder comes from 0.2 million numbers.
"""

import hashlib
import json
import struct
import sys

import numpy as np

SEED, WIDTH, HIDDEN, LAYERS, VOCAB, LENGTH = 0, 768, 3072, 12, 49408, 77


def entries():
    """Yield (name, vector, shape, strides): every weight is a strided view of a vector."""
    bits = np.random.PCG64(SEED)

    def window(name, rows, cols, std):
        n = rows + cols - 1
        raw = bits.random_raw(n).astype("<u8").view(np.uint8).reshape(n, 8)
        v = raw.sum(axis=1, dtype=np.int32) - 1020  # mean 0, std 209.02
        v = (v.astype(np.float32) * np.float32(std / 209.02)).astype(np.float16)
        return name, v, (rows, cols), (1, 1)

    def constant(name, n, value):
        return name, np.full(1, value, np.float16), (n,), (0,)

    yield window("text_model.embeddings.token_embedding.weight", VOCAB, WIDTH, 1.0)
    yield window("text_model.embeddings.position_embedding.weight", LENGTH, WIDTH, 0.3)
    for i in range(LAYERS):
        p = f"text_model.encoder.layers.{i}."
        for n in ("layer_norm1", "layer_norm2"):
            yield constant(f"{p}{n}.weight", WIDTH, 1)
            yield constant(f"{p}{n}.bias", WIDTH, 0)
        for n, std in (("q_proj", 1.0), ("k_proj", 1.0), ("v_proj", 1.0), ("out_proj", 1.0)):
            yield window(f"{p}self_attn.{n}.weight", WIDTH, WIDTH, std / WIDTH**0.5)
            yield constant(f"{p}self_attn.{n}.bias", WIDTH, 0)
        yield window(f"{p}mlp.fc1.weight", HIDDEN, WIDTH, 1.0 / WIDTH**0.5)
        yield constant(f"{p}mlp.fc1.bias", HIDDEN, 0)
        yield window(f"{p}mlp.fc2.weight", WIDTH, HIDDEN, 0.5 / HIDDEN**0.5)
        yield constant(f"{p}mlp.fc2.bias", WIDTH, 0)
    yield constant("text_model.final_layer_norm.weight", WIDTH, 1)
    yield constant("text_model.final_layer_norm.bias", WIDTH, 0)
    yield window("text_projection.weight", WIDTH, WIDTH, 1.0 / WIDTH**0.5)


def dense(vector, shape, strides):
    view = np.lib.stride_tricks.as_strided(vector, shape, [s * vector.itemsize for s in strides])
    return np.ascontiguousarray(view)


def write_safetensors(path):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, _, shape, _ in entries():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as f:
        for part in [struct.pack("<Q", len(head)), head]:
            f.write(part)
            digest.update(part)
        for _, vector, shape, strides in entries():
            part = dense(vector, shape, strides).astype("<f2").tobytes()
            f.write(part)
            digest.update(part)
    print(path, offset + len(head) + 8, "bytes, sha256", digest.hexdigest())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_safetensors(sys.argv[1])
