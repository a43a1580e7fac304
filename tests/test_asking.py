"""What the host is told of a model's size while it makes room for it."""

from __future__ import annotations

import threading

import pytest
import torch
from pack.offload.asking import asked_for, asking

ONE, OTHER = torch.nn.Module(), torch.nn.Module()


def test_only_inside_and_only_of_that_model() -> None:
    with asking(ONE, 5):
        assert (asked_for(ONE, 8), asked_for(ONE, 3), asked_for(OTHER, 8)) == (5, 3, 8)
        with asking(ONE, None):
            assert asked_for(ONE, 8) == 8
        assert asked_for(ONE, 8) == 5
    assert asked_for(ONE, 8) == 8


def test_other_threads_see_the_size() -> None:
    seen: list[int] = []
    with asking(ONE, 5):
        thread = threading.Thread(target=lambda: seen.append(asked_for(ONE, 8)))
        thread.start()
        thread.join()
    assert seen == [8]


def test_an_error_ends_it() -> None:
    with pytest.raises(KeyError), asking(ONE, 5):
        raise KeyError
    assert asked_for(ONE, 8) == 8
