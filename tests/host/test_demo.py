"""The demo's pictures show what was asked for: the digit and both colours, from either GGUF file.

Core's own loader draws the same prompts from the unquantised weights in the same run; a digit is the asked one when
its shape agrees with that picture and with no other digit's.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from pack.tools import demo
from pack.tools.server import Server
from PIL import Image
from scipy import ndimage

pytestmark = pytest.mark.slow

# The colours that the demo model was trained on.
COLOURS = {
    "red": (222, 40, 42),
    "orange": (245, 138, 24),
    "yellow": (250, 221, 50),
    "green": (34, 154, 66),
    "blue": (36, 104, 232),
    "purple": (136, 36, 152),
    "white": (250, 250, 250),
    "black": (18, 18, 20),
}
HOLES = {"three": 0, "four": 0, "seven": 0, "eight": 2}
# Between the nearest two of these colours lie 90 units; pictures of the unquantised model stay within 15.
COLOUR_TOLERANCE = 30.0
UNQUANTISED = "demo_mmdit.safetensors"


@pytest.fixture(scope="module")
def pictures(demo_server: Server) -> dict[tuple[str, str], np.ndarray]:
    """Every prompt drawn from every file, as (height, width, RGB) by (prompt, file)."""
    drawn = {}
    for model in (*demo.GGUF_FILES.values(), UNQUANTISED):
        for prompt in demo.PROMPTS:
            saved, api = demo.prompt_for(prompt, model)
            if model == UNQUANTISED:
                api["1"] = {"class_type": "UNETLoader", "inputs": {"unet_name": model, "weight_dtype": "default"}}
            (png,) = demo_server.images(demo_server.queue(api, ui=saved))
            drawn[prompt, model] = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(np.float32)
    return drawn


def background_and_stroke(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The colour of the border, the colour of what differs most from it, and where that is."""
    border = np.concatenate([picture[:4].reshape(-1, 3), picture[-4:].reshape(-1, 3)])
    background = np.median(border, axis=0)
    distance = np.linalg.norm(picture - background, axis=-1)
    far = distance > 0.8 * np.percentile(distance, 99)
    stroke = np.median(picture[far], axis=0)
    return background, stroke, np.linalg.norm(picture - stroke, axis=-1) < distance


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Shared area over joint area of two shapes."""
    return float((one & other).sum() / (one | other).sum())


@pytest.mark.parametrize("model", demo.GGUF_FILES.values())
@pytest.mark.parametrize("prompt", demo.PROMPTS)
def test_picture_has_the_asked_colours(pictures, prompt: str, model: str) -> None:
    background, stroke, _ = background_and_stroke(pictures[prompt, model])
    asked_stroke, _, _, asked_background = prompt.split()
    for found, asked in ((background, asked_background), (stroke, asked_stroke)):
        distances = {name: float(np.linalg.norm(found - rgb)) for name, rgb in COLOURS.items()}
        assert min(distances, key=distances.__getitem__) == asked
        assert distances[asked] < COLOUR_TOLERANCE


@pytest.mark.parametrize("model", demo.GGUF_FILES.values())
@pytest.mark.parametrize("prompt", demo.PROMPTS)
def test_picture_shows_the_asked_digit(pictures, prompt: str, model: str) -> None:
    shapes = {key: background_and_stroke(picture)[2] for key, picture in pictures.items()}
    agreement = {other: overlap(shapes[prompt, model], shapes[other, UNQUANTISED]) for other in demo.PROMPTS}
    runner_up = max(value for other, value in agreement.items() if other != prompt)
    assert agreement[prompt] > 0.8, agreement
    assert agreement[prompt] > runner_up + 0.2, agreement


@pytest.mark.parametrize("prompt", demo.PROMPTS)
def test_digit_is_one_stroke_with_its_holes(pictures, prompt: str) -> None:
    """What makes an eight an eight does not depend on another picture."""
    _, _, shape = background_and_stroke(pictures[prompt, demo.GGUF_FILES["Q8_0"]])
    parts, _ = ndimage.label(shape, np.ones((3, 3)))
    gaps, _ = ndimage.label(~shape)
    assert (np.bincount(parts.ravel())[1:] > 40).sum() == 1
    assert (np.bincount(gaps.ravel())[1:] > 40).sum() - 1 == HOLES[prompt.split()[1]]


def test_picture_carries_the_workflow_that_opens_in_the_frontend(demo_server: Server, tmp_path: Path) -> None:
    model = demo.GGUF_FILES["Q8_0"]
    picture = demo.draw(demo_server, demo.PROMPTS[0], model, tmp_path)
    with Image.open(picture.path) as png:
        saved = json.loads(png.info["workflow"])
    assert saved == demo.prompt_for(demo.PROMPTS[0], model)[0]
