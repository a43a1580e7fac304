"""A LoRA on a text encoder from a GGUF file makes no part of it dense in host memory for longer than a layer's run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("lora_memory_checks.py")
SLACK = 32 << 20  # the allocator's, and what Python keeps


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells anonymous memory from mapped files")
def test_lora_on_a_text_encoder_keeps_it_mapped(run_in_host, tmp_path: Path) -> None:
    printed = run_in_host(SCRIPT, str(tmp_path))
    found = json.loads(next(line for line in printed.splitlines() if line.startswith('{"peaks"')))
    # While a layer runs: its dense weight, the product of the factors, and that in the weight's type.
    working = 3 * found["largest"]
    assert found["dense"] > 6 * (found["adapter"] + working + SLACK), "the encoder is too small to tell"
    assert max(found["peaks"]) < found["adapter"] + working + SLACK, found
    assert max(found["stays"]) < found["adapter"] + SLACK, found
