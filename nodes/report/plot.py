"""The timeline as a picture: memory over the time of a prompt, with its stages above.

Drawn with Pillow, which ComfyUI brings, at twice the size and then halved, for smooth lines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, SCALE = 768, 384, 2
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 70, 40  # margins of the plot in its final size
TEXT, SMALL = 15, 13  # heights of letters
LONGEST = 80  # letters of a label

BACKGROUND, INK, FAINT, GRID = (250, 250, 248), (40, 40, 44), (120, 120, 126), (222, 222, 220)
# Distinct also for who does not tell red from green.
SERIES = {
    "vram_used": ("VRAM", (0, 114, 178)),
    "vram_allocated": ("of it torch's", (86, 180, 233)),
    "ram_anonymous": ("RAM", (213, 94, 0)),
    "ram_file": ("RAM of files", (0, 158, 115)),
}
STAGES = {"load": (226, 226, 222), "encode": (216, 203, 232), "sample": (198, 222, 240), "decode": (206, 230, 200)}
UNITS = ((1e9, "GB"), (1e6, "MB"))


@dataclass(frozen=True)
class _Axis:
    """From 0 to `top`, in steps that are easy to read."""

    top: float
    step: float

    @property
    def ticks(self) -> list[float]:
        return [self.step * i for i in range(round(self.top / self.step) + 1)]


def plot(timeline: dict, label: str = "") -> torch.Tensor:
    """An IMAGE (1, HEIGHT, WIDTH, 3), float32 in [0, 1], of what `Timeline.data()` gave."""
    picture = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), BACKGROUND)
    _Plot(ImageDraw.Draw(picture), timeline).draw(label)
    return torch.from_numpy(np.asarray(picture.reduce(SCALE), dtype=np.float32) / 255.0)[None]


def axis(largest: float, ticks: int) -> _Axis:
    """An axis that holds `largest`, with about so many ticks."""
    rough = max(largest, 1e-9) / ticks
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough * 0.999)
    return _Axis(step * max(1, math.ceil(largest / step - 1e-9)), step)


class _Plot:
    def __init__(self, draw: ImageDraw.ImageDraw, timeline: dict) -> None:
        self._draw = draw
        self._marks = timeline["marks"]
        self._samples = timeline["samples"]
        columns = timeline["columns"]
        values = {name: [row[columns.index(name)] for row in self._samples] for name in SERIES}
        self._series = {name: line for name, line in values.items() if any(v is not None for v in line)}
        self._seconds = [row[0] / 1e3 for row in self._samples]
        end = max([*self._seconds, *(mark["ms"] / 1e3 for mark in self._marks)], default=0.0)
        self._x = axis(max(end, 0.1), 8)
        largest = max((v for line in self._series.values() for v in line if v is not None), default=1)
        self._unit, self._unit_name = next((unit for unit in UNITS if largest >= unit[0]), UNITS[-1])
        self._y = axis(largest / self._unit, 5)
        self._end = max(end, 0.1)

    def draw(self, label: str) -> None:
        title = f"Memory over the prompt{f': {label}' if label else ''}"
        self._text((LEFT, 8), title[:LONGEST], INK, TEXT)
        if not self._samples:
            self._text((LEFT, TOP), "no prompt has run yet", FAINT, TEXT)
            return
        self._grid()
        self._stages()
        for name in reversed(self._series):
            self._line(name)
        self._labels()
        self._legend()

    # --- coordinates, in the final size

    def _at(self, seconds: float, value: float) -> tuple[float, float]:
        x = LEFT + seconds / self._end * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - value / self._y.top * (HEIGHT - TOP - BOTTOM)

    def _text(self, at: tuple[float, float], text: str, colour: tuple, height: int, anchor: str = "la") -> None:
        self._draw.text((at[0] * SCALE, at[1] * SCALE), text, fill=colour, font=_font(height), anchor=anchor)

    def _rule(self, *points: tuple[float, float], colour: tuple, width: float) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self._draw.line(scaled, fill=colour, width=round(width * SCALE), joint="curve")

    # --- parts

    def _grid(self) -> None:
        for tick in self._y.ticks:
            self._rule(self._at(0, tick), self._at(self._end, tick), colour=GRID, width=1)
            unit = f" {self._unit_name}" if tick == self._y.ticks[-1] else ""
            self._text((LEFT - 6, self._at(0, tick)[1]), f"{tick:g}{unit}", INK, SMALL, "rm")
        for tick in self._x.ticks:
            if tick <= self._end:
                x, y = self._at(tick, 0)
                unit = " s" if tick + self._x.step > self._end else ""
                self._rule((x, y), (x, y + 4), colour=FAINT, width=1)
                self._text((x, y + 7), f"{tick:g}{unit}", INK, SMALL, "ma")

    def _stages(self) -> None:
        """Bands above the plot, and a line where each begins."""
        staged = [mark for mark in self._marks if mark["stage"] is not None]
        ends = [*(mark["ms"] / 1e3 for mark in staged[1:]), self._end]
        for mark, end in zip(staged, ends, strict=False):  # without a stage there is one end too many
            begin = mark["ms"] / 1e3
            left, right = self._at(begin, 0)[0], self._at(end, 0)[0]
            box = [left * SCALE, (TOP - 20) * SCALE, max(right, left + 1) * SCALE, (TOP - 2) * SCALE]
            self._draw.rectangle(box, fill=STAGES.get(mark["stage"], GRID))
            self._rule((left, TOP - 20), (left, HEIGHT - BOTTOM), colour=FAINT, width=0.5)
            if right - left > _width(mark["stage"], SMALL) + 6:
                self._text(((left + right) / 2, TOP - 11), mark["stage"], INK, SMALL, "mm")

    def _labels(self) -> None:
        """What Memory Report nodes said, each in the first row where there is room."""
        ends: list[float] = []  # of each row, how far it is taken
        for mark in self._marks:
            if not mark["label"]:
                continue
            words = mark["label"][:LONGEST]
            x = self._at(mark["ms"] / 1e3, 0)[0]
            self._rule((x, TOP), (x, HEIGHT - BOTTOM), colour=INK, width=1)
            left = x + 4 if x + 4 + _width(words, SMALL) < WIDTH - RIGHT else x - 4 - _width(words, SMALL)
            row = next((row for row, end in enumerate(ends) if end < left), len(ends))
            ends[row : row + 1] = [left + _width(words, SMALL) + 4]
            self._text((left, TOP + 4 + row * (SMALL + 3)), words, INK, SMALL)

    def _line(self, name: str) -> None:
        colour = SERIES[name][1]
        known = [(s, v) for s, v in zip(self._seconds, self._series[name], strict=True) if v is not None]
        points = [self._at(seconds, value / self._unit) for seconds, value in known]
        if len(points) == 1:
            points.append((points[0][0] + 2, points[0][1]))
        self._rule(*points, colour=colour, width=2.2)

    def _legend(self) -> None:
        x: float = LEFT
        for name, line in self._series.items():
            said, colour = SERIES[name]
            peak = max(value for value in line if value is not None)
            words = f"{said} {peak / self._unit:.3g}"
            self._rule((x, 38), (x + 18, 38), colour=colour, width=3)
            self._text((x + 23, 38), words, INK, SMALL, "lm")
            x += 23 + _width(words, SMALL) + 20
        self._text((x, 38), f"{self._unit_name}, the most of each", FAINT, SMALL, "lm")


@cache
def _font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(height * SCALE)


def _width(text: str, height: int) -> float:
    return _font(height).getlength(text) / SCALE
