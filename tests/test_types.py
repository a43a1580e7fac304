"""The block table equals gguf-py's."""

from __future__ import annotations

import gguf
import pytest
from pack.loaders.gguf.types import BLOCKS, GGMLType, byte_size


def test_every_type_of_gguf_py_is_known_with_the_same_geometry():
    theirs = {int(t): size for t, size in gguf.GGML_QUANT_SIZES.items()}
    ours = {int(t): (layout.elements, layout.nbytes) for t, layout in BLOCKS.items()}
    assert {k: v for k, v in ours.items() if k in theirs} == theirs
    assert set(BLOCKS) == set(GGMLType)


def test_byte_size_counts_blocks_and_refuses_a_broken_row():
    assert byte_size((3, 512), GGMLType.Q4_K) == 3 * 2 * 144
    assert byte_size((), GGMLType.F32) == 4
    with pytest.raises(ValueError, match="48 elements"):
        byte_size((2, 48), GGMLType.Q8_0)
